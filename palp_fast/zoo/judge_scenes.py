"""What judges are shown: scenes of every subject, labelled and captioned; the ceilings' compositions are kept apart."""

import random
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from palp_fast.zoo.captions import caption
from palp_fast.zoo.judge_nets import Words
from palp_fast.zoo.render import Scene
from palp_fast.zoo.world import BACKGROUNDS, STYLES, TARGETS, World, grounds

PAIRS = 0.2  # share of scenes with two subjects
ROLES = ("seen", "development", "acceptance")
_TARGET_CELLS = {(style, background) for _, style, background, _ in TARGETS}


class Scenes:
    """Draws scenes of all subjects that have one drawing in three styles, held-out ones too, and their labels."""

    def __init__(self, world: World):
        self.world = world
        self.places = [place for place, subject in enumerate(world.subjects) if subject.role in ROLES]
        self.names = [world.subjects[place].name for place in self.places]
        self.held_out = [place for place in self.places if world.subjects[place].role != "seen"]
        self._label = {place: label for label, place in enumerate(self.places)}

    def reserved(self, places: Sequence[int], style: str, background: str) -> bool:
        """Whether this composition is kept from training, for the ceilings.

        One background for each subject (or two) and style, and every held-out subject in the cell of a target.
        """
        if (style, background) in _TARGET_CELLS and any(place in self.held_out for place in places):
            return True
        possible = grounds(style)
        return background == possible[zlib.crc32(f"{sorted(places)} {style}".encode()) % len(possible)]

    def draw(
        self, key: str, *, places: tuple[int, ...] | None = None, style: str | None = None, reserved: bool = False
    ) -> Scene:
        """The scene of that key: one or two subjects (unless given), a style, a background, a caption never empty."""
        draw = random.Random(key)
        chosen = places
        while True:
            if places is None:
                chosen = tuple(draw.sample(self.places, 2 if draw.random() < PAIRS else 1))
            shown = style or draw.choice(STYLES)
            background = draw.choice(grounds(shown))
            if self.reserved(chosen, shown, background) == reserved:
                break
        subjects = [self.world.subjects[place] for place in chosen]
        nouns = [subject.class_noun if draw.random() < 0.3 else subject.name for subject in subjects]
        return Scene(chosen, shown, background, _caption(shown, nouns, background, draw), draw.getrandbits(32))

    def half(self, scene: Scene, side: int) -> Scene:
        """What the left (0) or right (1) half of a scene of two shows: one subject, with a caption of its own."""
        subject, draw = self.world.subjects[scene.subjects[side]], random.Random(scene.seed)
        words = _caption(scene.style, [subject.name], scene.background, draw)
        return Scene((scene.subjects[side],), scene.style, scene.background, words, scene.seed)

    def labels(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """style, background: class indices int64 [n]; cell: shares fp32 [n, subjects x styles] that add up to 1."""
        cell = torch.zeros(len(scenes), len(self.places), len(STYLES))
        for row, scene in enumerate(scenes):
            labels = [self._label[place] for place in scene.subjects]
            cell[row, labels, STYLES.index(scene.style)] = 1 / len(labels)
        return {"style": torch.tensor([STYLES.index(scene.style) for scene in scenes]),
                "background": torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes]),
                "cell": cell.flatten(1)}

    def words(self) -> Words:
        """A tokenizer that knows every word that captions can have."""
        nouns = self.names + [subject.class_noun for subject in self.world.subjects]
        draw = random.Random(0)
        return Words.of(nouns + [caption(style, ["and"], background, draw)
                                 for style in STYLES for background in BACKGROUNDS for _ in range(50)])


def _caption(style: str, nouns: list[str], background: str, draw: random.Random) -> str:
    """A caption that is not empty."""
    while not (words := caption(style, nouns, background, draw)):
        pass
    return words
