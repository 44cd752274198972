"""The rendered training set: pictures and captions on disk, made once."""

import json
from pathlib import Path

import numpy as np

from palp_fast.zoo.render import SIDE, compose, training_scene
from palp_fast.zoo.world import World

COUNT = 100_000


def render_all(cache: Path, world: World, sprites: np.ndarray, count: int = COUNT) -> None:
    """Write pictures.npy (uint8 [count, 64, 64, 3]) and captions.json; a finished set is left alone."""
    if (cache / "captions.json").exists():
        return
    pictures = np.lib.format.open_memmap(cache / "pictures.npy", "w+", np.uint8, (count, SIDE, SIDE, 3))
    captions = []
    for index in range(count):
        scene = training_scene(world, index)
        pictures[index] = compose(sprites, scene)
        captions.append(scene.caption)
    pictures.flush()
    (cache / "captions.json").write_text(json.dumps(captions))
