"""What a base model of the emoji-64 world must be able to do before anything is measured on it, by a judge."""

import random
from collections.abc import Sequence

import numpy as np

from palp_fast.zoo.captions import noun_phrase
from palp_fast.zoo.ceilings import short_of, table
from palp_fast.zoo.check import Case, draw_captions, plain_caption
from palp_fast.zoo.judge import Judge
from palp_fast.zoo.scores import Wanted, class_nouns, marks
from palp_fast.zoo.world import STYLES, World, grounds

# figure -> (least, most) share; those of the captions hold in each style
LIMITS = {"style": (0.98, 1.0), "background": (0.95, 1.0), "top1": (0.40, 1.0), "top5": (0.70, 1.0)}
OTHER_LIMITS = {"class_noun": (0.70, 1.0), "withheld_style": (0.90, 1.0), "withheld_top5": (0.40, 1.0),
                "held_out_top1": (0.0, 0.03)}
WITHHELD = 60  # captions of withheld styles, and as many of withheld pairs


def captions(judge: Judge, world: World, cases: Sequence[Case], pictures: np.ndarray) -> dict[str, float]:
    """Shares of pictures [n, 64, 64, 3] that show what their caption says, {"<style>_<mark>": share}."""
    right = _marks(judge, world, cases, pictures)
    rows = {style: [case.style == style for case in cases] for style in STYLES}
    return {f"{style}_{mark}": float(right[mark][rows[style]].mean()) for style in STYLES for mark in LIMITS}


def others(judge: Judge, world: World, pipeline) -> dict[str, float]:
    """Shares of right pictures of class nouns, of withheld cells, and of names that training never had."""
    def drawn(cases: Sequence[Case]) -> np.ndarray:
        return draw_captions(pipeline, [case.caption for case in cases])

    nouns, cells, names = class_noun_cases(world), withheld_cases(world), held_out_cases(world)
    found = class_nouns(judge, world, judge.read(drawn(nouns)))
    withheld = _marks(judge, world, cells, drawn(cells))
    held = _marks(judge, world, names, drawn(names))
    return {"class_noun": float(np.mean([noun == case.subject for noun, case in zip(found, nouns, strict=True)])),
            "withheld_style": float(withheld["style"].mean()), "withheld_top5": float(withheld["top5"].mean()),
            "held_out_top1": float(held["top1"].mean())}


def class_noun_cases(world: World) -> list[Case]:
    """Each class noun in each style; `subject` of these cases is the class noun."""
    nouns = sorted({subject.class_noun for subject in world.having("seen")})
    return _cases(world, "class nouns", [(noun, style) for noun in nouns for style in STYLES])


def withheld_cases(world: World) -> list[Case]:
    """Seen subjects in the style withheld from their training, and any subject in a withheld (style, background)."""
    draw, seen = random.Random("withheld"), world.having("seen")
    lacking = draw.sample([subject for subject in seen if subject.withheld_style], WITHHELD)
    free = draw.sample([subject for subject in seen if not subject.withheld_style], WITHHELD)
    cases = _cases(world, "withheld styles", [(subject.name, subject.withheld_style) for subject in lacking])
    for number, subject in enumerate(free):
        style, background = world.withheld_pairs[number % len(world.withheld_pairs)]
        words = plain_caption(style, noun_phrase(subject.name), background)
        cases.append(Case(words, subject.name, style, background))
    return cases


def held_out_cases(world: World) -> list[Case]:
    """Each held-out subject by its name in each style: whoever draws it has seen it."""
    held = world.having("development", "acceptance")
    return _cases(world, "held out", [(subject.name, style) for subject in held for style in STYLES])


def _cases(world: World, key: str, cells: Sequence[tuple[str, str]]) -> list[Case]:
    draw, found = random.Random(key), []
    for noun, style in cells:
        background = draw.choice([ground for ground in grounds(style) if world.allows(style, ground)])
        found.append(Case(plain_caption(style, noun_phrase(noun), background), noun, style, background))
    return found


def _marks(judge: Judge, world: World, cases: Sequence[Case], pictures: np.ndarray) -> dict[str, np.ndarray]:
    wanted = [Wanted(case.subject, case.style, case.background) for case in cases]
    return marks(judge, world, judge.read(pictures), wanted)


def limits() -> dict[str, tuple[float, float]]:
    """Figure -> (least, most), as `captions` and `others` name them."""
    return {f"{style}_{mark}": limit for style in STYLES for mark, limit in LIMITS.items()} | OTHER_LIMITS


def report(judge: str, ceilings: dict[str, dict[str, float]], results: dict[str, float]) -> str:
    """The judge's ceilings, then every figure of check.run with its limit and whether it holds, as Markdown."""
    lines = [table(judge, ceilings), *(f"below its limit: {what}" for what in short_of(ceilings)), "",
             "| base model | wanted | found | |", "|---|---|---|---|"]
    for name, found in results.items():
        least, most = limits().get(name, (None, None))
        if least is None:
            lines.append(f"| {name} (pixels) | | {found:.1%} | |")
            continue
        wanted = f">= {least:.0%}" if most == 1.0 else f"<= {most:.0%}"
        lines.append(f"| {name} | {wanted} | {found:.1%} | {'ok' if least <= found <= most else 'not reached'} |")
    missing = [name for name in limits() if name not in results]
    return "\n".join([*lines, *(["", f"not measured: {', '.join(missing)}"] if missing else [])])
