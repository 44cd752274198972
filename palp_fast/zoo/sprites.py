"""Sprites: every subject of the world in its three styles, as 96 x 96 RGBA pictures."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from palp_fast.zoo.sources import folder
from palp_fast.zoo.world import STYLES, Subject, World, code_key, icon_names

SIDE = 96
TYPICAL = 4  # members of a class noun that stand for it


def rasterise(cache: Path, subjects: list[Subject]) -> np.ndarray:
    """Sprites uint8 [subjects, 3 styles, 96, 96, RGBA]; needs resvg-py for the SVG styles."""
    sources = [_renders(cache), _svg(cache, "flat"), _svg(cache, "high-contrast")]
    sprites = np.zeros((len(subjects), len(STYLES), SIDE, SIDE, 4), np.uint8)
    for index, subject in enumerate(subjects):
        for style, draw in enumerate(sources):
            sprites[index, style] = np.asarray(shrink(draw(subject.code), SIDE))
    return sprites


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Resize an RGBA picture with premultiplied alpha, so that edges take no colour from transparent pixels."""
    return image.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")


def overlap(sprite: np.ndarray) -> float:
    """Intersection over union of the 3d and the flat silhouette of one subject, sprite [3, 96, 96, 4]."""
    render, flat = sprite[0, ..., 3] > 127, sprite[1, ..., 3] > 127
    return float((render & flat).sum() / max((render | flat).sum(), 1))


def typical(drawings: np.ndarray, world: World) -> set[str]:
    """Names of the seen subjects that captions may call by their class noun alone: TYPICAL of each class noun.

    A seen subject and its nearest of the same class noun, where the mean distance within the group is least compared
    with that to each member's five nearest of other class nouns: like each other, unlike the rest.
    drawings: uint8 [subjects of the world, 3, 96, 96, 4].
    """
    places = [place for place, subject in enumerate(world.subjects) if subject.role == "seen"]
    looks = np.stack([_look(drawings[place]) for place in places])
    products = looks @ looks.T
    distance = np.sqrt(np.maximum(products.diagonal()[:, None] + products.diagonal() - 2 * products, 0))
    nouns = np.array([world.subjects[place].class_noun for place in places])
    found = set()
    for noun in sorted(set(nouns)):
        own, others = np.flatnonzero(nouns == noun), np.flatnonzero(nouns != noun)
        groups = [own[np.argsort(row, kind="stable")[:TYPICAL]] for row in distance[np.ix_(own, own)]]
        apart = np.sort(distance[:, others], axis=1)[:, :5].mean(1)
        ratios = [distance[np.ix_(group, group)].mean() / apart[group].mean() for group in groups]
        found.update(world.subjects[places[member]].name for member in groups[int(np.argmin(ratios))])
    return found


def _look(sprite: np.ndarray) -> np.ndarray:
    """One subject's three sprites at 12 x 12, colours times alpha, as one vector."""
    pixels = sprite.astype(np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    return pixels.reshape(len(STYLES), 12, SIDE // 12, 12, SIDE // 12, 4).mean((2, 4)).ravel()


def _renders(cache: Path):
    files = {code_key(path.stem): path for path in (folder(cache, "@lobehub/fluent-emoji-3d") / "assets").iterdir()}
    return lambda code: Image.open(files[code]).convert("RGBA")


def _svg(cache: Path, kind: str):
    import resvg_py

    package = f"@iconify-json/fluent-emoji-{kind}"
    names, data = icon_names(cache, package), json.loads((folder(cache, package) / "icons.json").read_text())
    aliases = data.get("aliases", {})

    def draw(code: str) -> Image.Image:
        name = names[code]
        icon = data["icons"][aliases[name]["parent"] if name in aliases else name]
        width, height = icon.get("width", data.get("width", 32)), icon.get("height", data.get("height", 32))
        body = icon["body"].replace("currentColor", "#000")
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    return draw
