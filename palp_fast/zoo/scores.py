"""What is right in pictures of the emoji-64 world, by a judge: style, background, subject, identity, all at once."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from palp_fast.zoo.judge import Judge, Reading
from palp_fast.zoo.world import TARGETS, Subject, World

DISTRACTORS = 19
MARKS = ("style", "background", "top1", "top5", "identity", "second", "joint")


@dataclass(frozen=True)
class Wanted:
    """What one picture must show; second: the other subject of a scene of two."""

    subject: str
    style: str
    background: str
    second: str | None = None


def distractors(world: World, name: str) -> list[str]:
    """19 seen subjects that a picture of `name` must not be taken for: of its class noun first, then any others.

    The second subjects of the fair test's targets are never among them. The same in every call.
    """
    subject, draw = world.named(name), random.Random(f"distractors of {name}")
    apart = {name, *(second for *_, second in TARGETS)}
    seen = [other for other in world.having("seen") if other.name not in apart]
    alike = [other for other in seen if other.class_noun == subject.class_noun]
    others = [other for other in seen if other.class_noun != subject.class_noun]
    first = draw.sample(alike, min(DISTRACTORS, len(alike)))
    return [other.name for other in first + draw.sample(others, DISTRACTORS - len(first))]


def marks(judge: Judge, world: World, reading: Reading, wanted: Sequence[Wanted]) -> dict[str, np.ndarray]:
    """Which pictures are right in what: bool arrays [n] by the names in MARKS.

    top1, top5: the subject is the likeliest, or among the five likeliest. identity: likelier than each of its 19
    distractors; chance is 5 %. Of two subjects, the half where the second one is likelier is its own, and the first one
    is read in the other half. second: the likeliest subject of its half; True where none is wanted. joint: style,
    background, second and identity.
    """
    place = {name: index for index, name in enumerate(judge.subjects)}
    right = {name: np.zeros(len(wanted), bool) for name in MARKS}
    for row, want in enumerate(wanted):
        own, logits = place[want.subject], reading.subject[row].numpy()
        right["second"][row] = True
        if want.second:
            other, sides = place[want.second], reading.halves[row].log_softmax(1).numpy()
            side = int(sides[:, other].argmax())
            logits, right["second"][row] = sides[1 - side], sides[side].argmax() == other
        likeliest = np.argsort(-logits, kind="stable")
        rivals = [place[name] for name in distractors(world, want.subject)]
        right["style"][row] = reading.style[row] == want.style
        right["background"][row] = reading.background[row] == want.background
        right["top1"][row] = likeliest[0] == own
        right["top5"][row] = own in likeliest[:5]
        right["identity"][row] = logits[own] > logits[rivals].max()
    right["joint"] = right["style"] & right["background"] & right["second"] & right["identity"]
    return right


def class_nouns(judge: Judge, world: World, reading: Reading) -> list[str]:
    """Class noun of the likeliest subject of each picture."""
    names: dict[str, Subject] = {subject.name: subject for subject in world.subjects}
    return [names[judge.subjects[place]].class_noun for place in reading.subject.argmax(1).tolist()]


def diversity(embedding: Tensor) -> float:
    """Mean over all pairs of pictures of 1 - cosine; embedding: unit vectors [n >= 2, width]."""
    count = len(embedding)
    products = (embedding @ embedding.T).sum() - embedding.square().sum()
    return float(1 - products / (count * (count - 1)))
