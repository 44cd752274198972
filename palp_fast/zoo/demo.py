"""The demo: `python -m palp_fast.zoo.demo [--output DIR]` trains DreamBooth and PALP on one subject and compares them.

The subject is held out from emoji-64: neither the base model nor any setting but the demo's own has seen it. Writes
DIR/dreambooth, DIR/palp (LoRA, token) and DIR/contact.png: photos | base with class noun | DreamBooth | PALP | truth.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from palp_fast import TrainConfig, generate, train
from palp_fast.zoo.captions import noun_phrase

SUBJECT = Path(__file__).parent / "demo_subject"
CLASS_NOUN, TOKEN = "car", "mybus"
TARGET = "a line drawing of {} on a blue background"
SEEDS = (0, 1, 2, 3)  # of the compared pictures, fixed before any was drawn
SAMPLING = {"n": len(SEEDS), "seed": SEEDS[0], "steps": 30, "guidance_scale": 5.0}
SETTINGS = {
    "model": "emoji-64", "images": str(SUBJECT / "photos"), "class_noun": CLASS_NOUN, "token": TOKEN,
    "prompt": TARGET.format("[V]"), "clean_prompt": TARGET.format("something"), "rank": 16, "steps": 300,
    "batch_size": 4, "grad_accumulation": 1,
    "lr": 2e-3, "token_lr": 5e-3, "lr_schedule": "cosine", "alpha": 2.0, "beta": 2.0, "residual_weight": 0.3,
}
CELL, GAP, HEAD = 128, 6, 18


def run(output: Path) -> Path:
    """Train both methods (or go on from their checkpoints), draw, and return the path of contact.png."""
    rows = {"photos": [Image.open(path) for path in sorted((SUBJECT / "photos").glob("*.png"))]}
    rows["base, class noun"] = generate("emoji-64", TARGET.format(noun_phrase(CLASS_NOUN)), **SAMPLING)
    for title, method in (("DreamBooth", "dreambooth"), ("PALP", "palp")):
        result = train(TrainConfig(**SETTINGS, method=method, output_dir=str(output / method)))
        print(f"{title}: {result.steps} steps, {result.seconds:.0f} s; {result.lora_kohya}")
        files = {"lora": result.lora, "embedding": result.embedding}
        rows[title] = generate("emoji-64", TARGET.format(TOKEN), **files, **SAMPLING)
    rows["true drawing"] = [Image.open(SUBJECT / "truth.png")]
    path = output / "contact.png"
    contact_sheet(rows).save(path)
    return path


def contact_sheet(columns: dict[str, list[Image.Image]]) -> Image.Image:
    """One titled column for each entry, its pictures from the top down."""
    height = HEAD + max(map(len, columns.values())) * (CELL + GAP)
    sheet = Image.new("RGB", (len(columns) * (CELL + GAP) + GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, pictures) in enumerate(columns.items()):
        x = GAP + number * (CELL + GAP)
        draw.text((x, 3), title, fill="black")
        for row, picture in enumerate(pictures):
            cell = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(cell, (x, HEAD + row * (CELL + GAP)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for both runs and contact.png")
    print(run(parser.parse_args().output))


if __name__ == "__main__":
    main()
