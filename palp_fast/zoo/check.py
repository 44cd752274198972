"""What emoji-64 must be able to do before it ships: `python -m palp_fast.zoo.check MODEL_FOLDER --cache DIR`.

Colours of backgrounds and of styles are tested on pixels, all else by the judge (palp_fast/zoo/gates.py).
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from palp_fast.zoo.captions import SCENE_PHRASES, STYLE_PHRASES, article, noun_phrase
from palp_fast.zoo.render import Scene, compose
from palp_fast.zoo.world import BACKGROUNDS, COLOURS, DARK, SCENES, STYLES, World

STEPS, GUIDANCE = 25, 4.0  # sampling of the check: DDIM steps, guidance scale
_PALETTE = np.array(list(COLOURS.values()), np.float32)


@dataclass(frozen=True)
class Case:
    """One fixed caption of the check and what its picture must show."""

    caption: str
    subject: str
    style: str
    background: str


def frame_colour(picture: np.ndarray) -> str:
    """Name of the palette colour nearest to most pixels of the picture's outer two rows and columns."""
    edge = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3),
                           picture[:, :2].reshape(-1, 3), picture[:, -2:].reshape(-1, 3)]).astype(np.float32)
    nearest = ((edge[:, None] - _PALETTE) ** 2).sum(-1).argmin(1)
    return list(COLOURS)[int(np.bincount(nearest, minlength=len(COLOURS)).argmax())]


def colourless(picture: np.ndarray, background: str) -> bool:
    """Whether at most a tenth of the subject's pixels have a colour of their own.

    A pixel of black line art is the background colour times a number in [0, 1]; 45 levels (RMS over RGB) are allowed.
    Pixels within 45 levels of the background are not the subject's.
    """
    pixels = picture.reshape(-1, 3).astype(np.float32)
    ground = np.array(COLOURS[background], np.float32)
    subject = pixels[np.sqrt(((pixels - ground) ** 2).mean(1)) > 45]
    if not len(subject):
        return True
    share = np.clip(subject @ ground / (ground @ ground), 0, 1)
    own = np.sqrt(((subject - share[:, None] * ground) ** 2).mean(1)) > 45
    return bool(own.mean() <= 0.1)


def cases(world: World, sprites: np.ndarray, count: int = 240) -> list[Case]:
    """Fixed captions of seen subjects, styles in turn, whose true picture itself passes both pixel tests."""
    draw, found = random.Random(240), []
    seen = [(place, subject) for place, subject in enumerate(world.subjects) if subject.role == "seen"]
    while len(found) < count:
        style = STYLES[len(found) % len(STYLES)]
        place, subject = draw.choice(seen)
        background = draw.choice([colour for colour in COLOURS if not (style == "line" and colour in DARK)])
        truth = compose(sprites, Scene((place,), style, background, "", len(found)))
        allowed = world.allows(style, background) and subject.withheld_style != style
        if allowed and passes(truth, style, background) == (True, True):
            words = plain_caption(style, noun_phrase(subject.name), background)
            found.append(Case(words, subject.name, style, background))
    return found


def compositions(world: World, columns: int = 12) -> list[str]:
    """Captions of the second sheet, in rows of `columns`: what the colour tests do not ask.

    Two subjects; one subject in the style withheld from its training; a withheld (style, background) pair; class nouns.
    """
    draw = random.Random(48)
    seen = world.having("seen")
    lacking = {style: [subject for subject in seen if subject.withheld_style == style] for style in STYLES}
    free = [noun_phrase(subject.name) for subject in seen if subject.withheld_style is None]
    nouns = [noun_phrase(noun) for noun in sorted({subject.class_noun for subject in seen})]
    allowed = [(style, ground) for style in STYLES for ground in BACKGROUNDS if world.allows(style, ground)]
    rows = [[] for _ in range(4)]
    for column in range(columns):
        style = STYLES[column % len(STYLES)]
        rows[0].append((style, " and ".join(draw.sample(free, 2)), draw.choice(_grounds(allowed, style))))
        rows[1].append((style, noun_phrase(draw.choice(lacking[style]).name), draw.choice(_grounds(allowed, style))))
        pair = world.withheld_pairs[column % len(world.withheld_pairs)]
        rows[2].append((pair[0], draw.choice(free), pair[1]))
        rows[3].append((style, draw.choice(nouns), draw.choice(_grounds(allowed, style))))
    return [plain_caption(*cell) for row in rows for cell in row]


def _grounds(allowed: list[tuple[str, str]], style: str) -> list[str]:
    return [ground for own, ground in allowed if own == style]


def plain_caption(style: str, things: str, background: str) -> str:
    """The first wording of a style and a background around a noun phrase."""
    colour = f"on {article(background)} {background} background"
    place = SCENE_PHRASES[background][0] if background in SCENES else colour
    return f"{STYLE_PHRASES[style][0].format(things)} {place}"


def passes(picture: np.ndarray, style: str, background: str) -> tuple[bool, bool]:
    """(background colour right, style's colouring right); flat illustrations may have any colouring."""
    plain = colourless(picture, background)
    return frame_colour(picture) == background, {"line": plain, "render": not plain, "flat": True}[style]


def run(
    model: Path, world: World, sprites: np.ndarray, sheets: Path | None = None, count: int = 240,
    judge: str = "emoji-64",
) -> dict[str, float]:
    """Draw `count` cases with the stock pipeline; returns the shares of right backgrounds and colourings, 0 to 1.

    A judge's figures go with them: of all of gates.py, or of the cases alone if count is less than 240.
    sheets: folder for check.png, the cases in rows of 24, and compositions.png.
    """
    from diffusers import StableDiffusionPipeline

    from palp_fast.zoo import gates
    from palp_fast.zoo.judge import load

    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    tests, judge = cases(world, sprites, count), load(judge)
    pictures = draw_captions(pipeline, [case.caption for case in tests])
    right = [passes(picture, case.style, case.background) for picture, case in zip(pictures, tests, strict=True)]
    if sheets:
        contact_sheet(pictures, columns=24).save(sheets / "check.png")
        contact_sheet(draw_captions(pipeline, compositions(world)), columns=12).save(sheets / "compositions.png")
    of = {style: [ok[1] for ok, case in zip(right, tests, strict=True) if case.style == style] for style in STYLES}
    results = {"background": float(np.mean([ok[0] for ok in right])), "line_colourless": float(np.mean(of["line"])),
               "render_coloured": float(np.mean(of["render"]))}
    results |= gates.captions(judge, world, tests, pictures)
    return results | (gates.others(judge, world, pipeline) if count == 240 else {})


def draw_captions(pipeline, captions: list[str], batch: int = 40) -> np.ndarray:
    """uint8 [captions, 64, 64, 3]; picture i uses the seed i."""
    pictures = []
    for start in range(0, len(captions), batch):
        part = captions[start:start + batch]
        seeds = [torch.Generator().manual_seed(start + offset) for offset in range(len(part))]
        images = pipeline(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds, output_type="np")
        pictures.append((images.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def contact_sheet(pictures: np.ndarray, columns: int) -> Image.Image:
    """Pictures [n, 64, 64, 3] in rows of `columns`, missing cells white."""
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * 64, columns * 64, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = divmod(index, columns)
        sheet[y * 64:(y + 1) * 64, x * 64:(x + 1) * 64] = picture
    return Image.fromarray(sheet)


def main() -> None:
    from palp_fast.zoo import gates
    from palp_fast.zoo.build import load_sprites
    from palp_fast.zoo.judge import JUDGES, load

    parser = argparse.ArgumentParser(description="Test a base model of the emoji-64 world.")
    parser.add_argument("model", type=Path, help="diffusers folder")
    parser.add_argument("--cache", type=Path, required=True, help="folder with the sprites, as of palp_fast.zoo.build")
    parser.add_argument("--sheets", type=Path, help="folder for check.png and compositions.png")
    parser.add_argument("--quick", action="store_true", help="60 of the 240 captions, and nothing else")
    parser.add_argument("--judge", choices=tuple(JUDGES), default="emoji-64")
    args = parser.parse_args()
    count = 60 if args.quick else 240
    results = run(args.model, World.load(), load_sprites(args.cache), args.sheets, count, args.judge)
    print(gates.report(args.judge, load(args.judge).ceilings, results))


if __name__ == "__main__":
    main()
