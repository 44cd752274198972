"""Latents of the training set and of the portraits that the text encoder learns from, made once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from palp_fast.zoo.autoencoder import to_pixels
from palp_fast.zoo.render import Portraits, training_scene
from palp_fast.zoo.training import mixed
from palp_fast.zoo.world import World

PORTRAITS = 50_000  # of the first captions


def cache_pictures(cache: Path, autoencoder: AutoencoderKL) -> None:
    """Write latents.npy, of pictures.npy; a finished file is left alone."""
    pictures = np.load(cache / "pictures.npy", mmap_mode="r")
    _cache(cache / "latents.npy", autoencoder, len(pictures), pictures.__getitem__)


def cache_portraits(cache: Path, world: World, sprites: np.ndarray, autoencoder: AutoencoderKL) -> None:
    """Write portraits.npy, of the first PORTRAITS scenes; a finished file is left alone."""
    portraits = Portraits(sprites)

    def draw(part: slice) -> np.ndarray:
        return np.stack([portraits.draw(training_scene(world, index)) for index in range(*part.indices(PORTRAITS))])

    _cache(cache / "portraits.npy", autoencoder, PORTRAITS, draw)


@torch.no_grad()
def _cache(path: Path, autoencoder: AutoencoderKL, count: int, pictures: Callable[[slice], np.ndarray]) -> None:
    """Posterior means fp16 [count, 8, 16, 16], unscaled, of uint8 pictures [n, 64, 64, 3] taken 64 at a time."""
    if path.exists():
        return
    latents = np.empty((count, 8, 16, 16), np.float16)
    for start in range(0, count, 64):
        with mixed():
            posterior = autoencoder.encode(to_pixels(pictures(slice(start, start + 64)))).latent_dist
        latents[start:start + 64] = posterior.mode().float().numpy()
    np.save(path, latents)
