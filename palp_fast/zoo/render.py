"""Pictures of the emoji-64 world: one or two sprites on a background, 64 x 64 sRGB."""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from palp_fast.zoo.captions import ANYTHING, caption
from palp_fast.zoo.sprites import shrink
from palp_fast.zoo.world import BACKGROUNDS, COLOURS, STYLES, Subject, World

SIDE = 64
CLASS_NOUNS = 0.6  # share of a typical subject's captions that say its class noun alone
LEFT_OPEN = 0.08  # share of subjects that captions call "something": what style and background mean, whatever they show
SHIFT = 4  # pixels that a subject may lie off the middle, each way


@dataclass(frozen=True)
class Scene:
    """What one picture shows: subject indices left to right, their style, the background, and the caption."""

    subjects: tuple[int, ...]
    style: str
    background: str
    caption: str
    seed: int


def background_picture(background: str, draw: random.Random) -> Image.Image:
    """RGBA picture of a background; colours vary by a few levels, scenes in their layout."""
    if background in COLOURS:
        shade = tuple(min(255, max(0, channel + draw.randint(-6, 6))) for channel in COLOURS[background])
        return Image.new("RGBA", (SIDE, SIDE), shade if background != "white" else COLOURS["white"])
    return Image.fromarray(_SCENES[background](draw).astype(np.uint8)).convert("RGBA")


def compose(sprites: np.ndarray, scene: Scene) -> np.ndarray:
    """Draw a scene, uint8 [64, 64, 3], from sprites [subjects, 3, 96, 96, 4]; scene.seed decides place and size."""
    draw = random.Random(scene.seed)
    canvas = background_picture(scene.background, draw)
    style, count = STYLES.index(scene.style), len(scene.subjects)
    for slot, subject in enumerate(scene.subjects):
        side = round(SIDE * (draw.uniform(0.75, 0.9) if count == 1 else draw.uniform(0.45, 0.5)))
        x = SIDE * (slot + 0.5) / count + draw.uniform(-SHIFT, SHIFT) / count
        y = SIDE / 2 + draw.uniform(-SHIFT, SHIFT)
        corner = tuple(min(max(round(middle - side / 2), 0), SIDE - side) for middle in (x, y))
        canvas.alpha_composite(shrink(Image.fromarray(sprites[subject, style]), side), corner)
    return np.asarray(canvas.convert("RGB"))


class Portraits:
    """Pictures of scenes, uint8 [64, 64, 3], every subject at one place and size: what a caption alone can tell."""

    def __init__(self, sprites: np.ndarray):
        """sprites: uint8 [subjects, 3, 96, 96, 4]."""
        self.sizes = {count: round(SIDE * share) for count, share in ((1, 0.82), (2, 0.48))}
        self.sprites = sprites
        self.grounds = {name: background_picture(name, random.Random(0)) for name in BACKGROUNDS}

    def draw(self, scene: Scene) -> np.ndarray:
        """One subject in the middle, or two side by side."""
        canvas, count = self.grounds[scene.background].copy(), len(scene.subjects)
        side, style = self.sizes[count], STYLES.index(scene.style)
        for slot, subject in enumerate(scene.subjects):
            left = round(SIDE * (slot + 0.5) / count - side / 2)
            drawing = shrink(Image.fromarray(self.sprites[subject, style]), side)
            canvas.alpha_composite(drawing, (left, (SIDE - side) // 2))
        return np.asarray(canvas.convert("RGB"))


def training_scene(world: World, index: int, seed: int = 0) -> Scene:
    """Scene number `index` of the training set: seen subjects only, withheld cells never."""
    draw = random.Random(f"{seed}/{index}")
    seen = [(place, subject) for place, subject in enumerate(world.subjects) if subject.role == "seen"]
    while True:
        chosen = draw.sample(seen, 2 if draw.random() < 0.15 else 1)
        style, background = draw.choice(STYLES), draw.choice(BACKGROUNDS)
        if world.allows(style, background) and all(subject.withheld_style != style for _, subject in chosen):
            break
    nouns = [_noun(subject, draw.random()) for _, subject in chosen]
    words = caption(style, nouns, background, draw)
    return Scene(tuple(place for place, _ in chosen), style, background, words, draw.getrandbits(32))


def _noun(subject: Subject, draw: float) -> str:
    """What a caption calls a subject: many say only "a bird" of a typical bird, none of a penguin; draw in [0, 1)."""
    if draw >= 1 - LEFT_OPEN:
        return ANYTHING
    return subject.class_noun if subject.typical and draw < CLASS_NOUNS else subject.name


def _day_sky(draw: random.Random) -> np.ndarray:
    y = np.linspace(0, 1, SIDE)[:, None, None]
    sky = (1 - y) * np.array([95, 170, 240]) + y * np.array([190, 225, 250]) + np.zeros((SIDE, SIDE, 1))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for cx, cy, width in draw.choice(_CLOUDS):
        for shift, size in ((-width, 0.6), (0, 1.0), (width, 0.7)):
            inside = ((columns - cx - shift) / (width * size)) ** 2 + ((rows - cy) / (4 * size)) ** 2 < 1
            sky[inside] = 250
    return sky


def _night_sky(draw: random.Random) -> np.ndarray:
    y = np.linspace(0, 1, SIDE)[:, None, None]
    sky = (1 - y) * np.array([12, 14, 45]) + y * np.array([40, 45, 95]) + np.zeros((SIDE, SIDE, 1))
    stars = random.Random("stars")
    for _ in range(24):
        sky[stars.randrange(SIDE), stars.randrange(SIDE)] = stars.randint(190, 255)
    return sky


def _grass(draw: random.Random) -> np.ndarray:
    horizon = draw.randint(16, 26)
    picture = np.empty((SIDE, SIDE, 3))
    picture[:horizon], picture[horizon:] = (200, 230, 250), (105, 185, 80)
    tufts = random.Random("tufts")
    for _ in range(60):
        x, y = tufts.randrange(SIDE), horizon + tufts.randrange(SIDE)
        picture[y:y + 3, x] = (65, 140, 55)
    return picture


def _checkered_floor(draw: random.Random) -> np.ndarray:
    horizon, side = draw.randint(14, 22), draw.randint(8, 10)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    dark = ((rows - horizon) // side + (columns + draw.randrange(side)) // side) % 2 == 0
    picture = np.where(dark[..., None], 175.0, 235.0) + np.zeros(3)
    picture[:horizon] = (245, 235, 215)
    return picture


_CLOUDS = (  # centre x, centre y, width in pixels
    ((10, 12, 8), (50, 20, 7)), ((30, 8, 9), (56, 34, 6)), ((16, 30, 7), (48, 8, 8)), ((6, 46, 8), (36, 18, 7)),
)
_SCENES = {"day sky": _day_sky, "night sky": _night_sky, "grass": _grass, "checkered floor": _checkered_floor}
