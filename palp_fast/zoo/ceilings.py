"""Ceilings of a judge: its scores on true pictures of compositions it never saw, after the autoencoder round trip."""

from pathlib import Path

import numpy as np

from palp_fast.zoo.judge import Judge
from palp_fast.zoo.judge_pool import round_trips
from palp_fast.zoo.judge_scenes import Scenes
from palp_fast.zoo.render import Scene
from palp_fast.zoo.scores import MARKS, Wanted, marks
from palp_fast.zoo.world import STYLES, TARGETS

# Least shares of a judge that may be used, in each style of the first three tests.
LIMITS = {"style": 0.99, "background": 0.98, "top1": 0.90}


def tests(scenes: Scenes) -> dict[str, list[Scene]]:
    """Test name -> its scenes, none of whose compositions and seeds training has.

    render, flat, line: every subject once; held out: each held-out subject in each style; targets: each held-out
    subject in each of the fair test's targets, with its second subject where it has one.
    """
    found = {style: [scenes.draw(f"ceiling/{style}/{place}", places=(place,), style=style, reserved=True)
                     for place in scenes.places] for style in STYLES}
    found["held out"] = [_held_out(scenes, place, style) for place in scenes.held_out for style in STYLES]
    found["targets"] = [_target(scenes, place, number) for place in scenes.held_out for number in range(len(TARGETS))]
    return found


def _held_out(scenes: Scenes, place: int, style: str) -> Scene:
    return scenes.draw(f"ceiling/held out/{place}/{style}", places=(place,), style=style, reserved=True)


def _target(scenes: Scenes, place: int, number: int) -> Scene:
    _, style, background, second = TARGETS[number]
    places = (place,) if second is None else (place, scenes.places[scenes.names.index(second)])
    return Scene(places, style, background, "", 10**6 + place * len(TARGETS) + number)


def measure(judge: Judge, scenes: Scenes, sprites: np.ndarray, cache: Path) -> dict[str, dict[str, float]]:
    """{test: {mark: share right}}, the marks of palp_fast/zoo/scores.py; round trips are kept in `cache`."""
    found, names = {}, scenes.world.subjects
    for test, shown in tests(scenes).items():
        pictures = round_trips(cache / f"judge-ceiling-{test.replace(' ', '-')}.npy", sprites, shown)
        wanted = [Wanted(names[scene.subjects[0]].name, scene.style, scene.background,
                         names[scene.subjects[1]].name if len(scene.subjects) == 2 else None) for scene in shown]
        right = marks(judge, scenes.world, judge.read(pictures), wanted)
        found[test] = {mark: round(float(right[mark].mean()), 4) for mark in MARKS} | {"pictures": len(shown)}
    return found


def short_of(ceilings: dict[str, dict[str, float]]) -> list[str]:
    """What of LIMITS a judge does not reach, in words; [] for one that may be used."""
    return [f"{mark} of {style}: {ceilings[style][mark]:.1%} < {limit:.0%}"
            for style in STYLES for mark, limit in LIMITS.items() if ceilings[style][mark] < limit]


def table(name: str, ceilings: dict[str, dict[str, float]]) -> str:
    """The ceilings as a Markdown table, to be printed above every result."""
    lines = [f"| ceilings of judge {name}, true pictures | n | {' | '.join(MARKS)} |", "|---" * (len(MARKS) + 2) + "|"]
    for test, row in ceilings.items():
        lines.append(f"| {test} | {row['pictures']} | " + " | ".join(f"{row[mark]:.1%}" for mark in MARKS) + " |")
    return "\n".join(lines)
