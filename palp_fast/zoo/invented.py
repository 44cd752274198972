"""Invented subjects: drawings of seen subjects, warped, recoloured and combined, the same way in every style.

From the names of 668 subjects a text encoder learns their portraits by heart, and a new token that means a render means
nothing as a line drawing. Invented subjects have no names: `coder.Coder` turns the render of one into a token, and
what is learned is how a subject goes from its token to each style.
"""

import random
from pathlib import Path

import numpy as np
from PIL import Image

from palp_fast.zoo.captions import caption
from palp_fast.zoo.render import Scene
from palp_fast.zoo.sprites import SIDE
from palp_fast.zoo.world import BACKGROUNDS, STYLES, World

COUNT = 8000
MARK = "~"  # the word of a caption whose token is replaced
SHARE_SEEN = 0.2  # of the coded scenes: seen subjects, as they are


def sprites_of(world: World, drawings: np.ndarray, cache: Path, count: int = COUNT) -> np.ndarray:
    """Memory-mapped sprites uint8 [subjects + count, 3, 96, 96, 4]: the world's, then invented ones; made once."""
    path = cache / "invented.npy"
    if not path.exists():
        partial = path.with_suffix(".partial")
        made = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(drawings) + count, *drawings.shape[1:]))
        made[:len(drawings)] = drawings
        for index in range(count):
            made[len(drawings) + index] = invent(drawings, _parents(world, index), random.Random(f"invent/{index}"))
        made.flush()
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def coded_scene(world: World, index: int, count: int = COUNT) -> tuple[Scene, int]:
    """Scene number `index` of those whose caption says MARK, and the place of the subject that MARK stands for.

    The place is one of `sprites_of`; beside it may stand a seen subject, by its name. Withheld cells never.
    """
    draw = random.Random(f"coded/{index}")
    seen = [place for place, subject in enumerate(world.subjects) if subject.role == "seen"]
    while True:
        if draw.random() < SHARE_SEEN:
            place = draw.choice(seen)
            shown = [place]
        else:
            number = draw.randrange(count)
            place, shown = len(world.subjects) + number, _parents(world, number)
        others = [draw.choice(seen)] if draw.random() < 0.15 else []
        style, background = draw.choice(STYLES), draw.choice(BACKGROUNDS)
        withheld = {world.subjects[drawn].withheld_style for drawn in [*shown, *others]}
        if world.allows(style, background) and style not in withheld:
            break
    things = [(place, MARK), *((other, world.subjects[other].name) for other in others)]
    draw.shuffle(things)
    words = caption(style, [noun for _, noun in things], background, draw).replace(f"a {MARK}", MARK)
    return Scene(tuple(place for place, _ in things), style, background, words, draw.getrandbits(32)), place


def invent(drawings: np.ndarray, parents: list[int], draw: random.Random) -> np.ndarray:
    """One invented subject, uint8 [3, 96, 96, 4]: its first parent warped, joined with or covered by the second."""
    made = _warped(drawings[parents[0]], _affine(draw, draw.uniform(0.8, 1.15)))
    if len(parents) == 2:
        join = _cut if draw.random() < 0.5 else _cover
        made = join(made, drawings[parents[1]], draw)
    if draw.random() < 0.7:
        made = _recoloured(made, draw)
    return np.stack([_straight(layer) for layer in made])


def _parents(world: World, index: int) -> list[int]:
    draw = random.Random(f"parents/{index}")
    seen = [place for place, subject in enumerate(world.subjects) if subject.role == "seen"]
    return draw.sample(seen, 2 if draw.random() < 0.6 else 1)


def _affine(draw: random.Random, size: float, middle: tuple[float, float] = (0.5, 0.5)) -> tuple[float, ...]:
    """Coefficients of PIL's affine transform: flip, turn, stretch and shear about the middle, then a move."""
    angle = np.deg2rad(draw.uniform(-25, 25) + (draw.choice((90, 180, 270)) if draw.random() < 0.25 else 0))
    stretch = np.diag([size * draw.uniform(0.85, 1.1) * draw.choice((-1, 1)), size * draw.uniform(0.85, 1.1)])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.array([[1, draw.uniform(-0.2, 0.2)], [0, 1]]) @ stretch)
    offset = np.full(2, SIDE / 2) - inverse @ (np.array(middle) * SIDE)
    return (*inverse[0], offset[0], *inverse[1], offset[1])


def _warped(sprite: np.ndarray, affine: tuple[float, ...]) -> np.ndarray:
    """Sprite uint8 [3, 96, 96, 4] -> float32 of the same shape in [0, 1], colours times alpha."""
    layers = [Image.fromarray(layer).convert("RGBa").transform(
        (SIDE, SIDE), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC) for layer in sprite]
    return np.stack([np.asarray(layer, np.float32) for layer in layers]) / 255


def _cut(first: np.ndarray, sprite: np.ndarray, draw: random.Random) -> np.ndarray:
    """`first` on one side of a straight line near the middle, the other subject on the other side."""
    second = _warped(sprite, _affine(draw, draw.uniform(0.8, 1.15)))
    angle, shift = draw.uniform(0, 2 * np.pi), draw.uniform(-0.15, 0.15) * SIDE
    rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    side = (np.cos(angle) * columns + np.sin(angle) * rows > shift)[..., None]
    return np.where(side, first, second)


def _cover(first: np.ndarray, sprite: np.ndarray, draw: random.Random) -> np.ndarray:
    """The other subject, smaller, in front of `first`; its flat silhouette hides what lies behind, lines too."""
    middle = draw.uniform(0.3, 0.7), draw.uniform(0.3, 0.7)
    second = _warped(sprite, _affine(draw, draw.uniform(0.4, 0.65), middle))
    return second + first * (1 - np.maximum(second[..., 3:], second[1:2, ..., 3:]))


def _recoloured(layers: np.ndarray, draw: random.Random) -> np.ndarray:
    """Render and flat illustration with hues turned by one angle; lines stay black."""
    angle = draw.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle) / np.sqrt(3)
    turn = np.full((3, 3), (1 - cos) / 3) + cos * np.eye(3) + sin * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    made = layers.copy()
    made[:2, ..., :3] = np.clip(layers[:2, ..., :3] @ turn.T, 0, layers[:2, ..., 3:])
    return made


def _straight(layer: np.ndarray) -> np.ndarray:
    alpha = layer[..., 3:]
    colours = np.divide(layer[..., :3], alpha, out=np.zeros_like(layer[..., :3]), where=alpha > 0)
    return (np.concatenate([np.clip(colours, 0, 1), np.clip(alpha, 0, 1)], axis=2) * 255).round().astype(np.uint8)
