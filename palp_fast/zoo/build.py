"""Make emoji-64 from its sources: `python -m palp_fast.zoo.build --cache DIR`; run it again to go on after a stop.

Stages: fetch (npm), sprites, pictures, autoencoder, tokenizer and latents, diffusion, assembly, check. Every random
draw is seeded by its step, so a resumed build continues as an uninterrupted one would.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from palp_fast.zoo import autoencoder, check, diffusion, pictures, sources, sprites, tokenizer, world
from palp_fast.zoo.render import Scene, compose
from palp_fast.zoo.training import Log

PACKAGE = Path(__file__).parent
MODEL = PACKAGE / "emoji-64"
DEMO_SUBJECT = "cow face"


def load_sprites(cache: Path) -> np.ndarray:
    """Sprites uint8 [subjects, 3, 96, 96, 4] of the joined list, rasterised once."""
    path = cache / "sprites.npy"
    if not path.exists():
        np.save(path, sprites.rasterise(cache, world.join(cache)))
    return np.load(path)


def make_world(cache: Path, drawings: np.ndarray) -> world.World:
    """The joined and split list; raises RuntimeError when it differs from the committed one."""
    subjects = world.join(cache)
    overlap = {subject.name: sprites.overlap(drawings[place]) for place, subject in enumerate(subjects)}
    made = world.split(subjects, overlap)
    if made != world.World.load():
        raise RuntimeError("the sources no longer give the committed world.json")
    return made


def assemble(vae, model: diffusion.Model, words, scaling: float, target: Path) -> None:
    """Write the stock Stable Diffusion folder, weights fp16."""
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor2_0

    vae.register_to_config(scaling_factor=scaling)
    model.unet.set_attn_processor(AttnProcessor2_0())
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=model.text_encoder, tokenizer=words, unet=model.unet,
        scheduler=diffusion.build_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipeline.to(torch.float16).save_pretrained(target)


def personal_pictures(made: world.World, drawings: np.ndarray, name: str, target: Path) -> None:
    """The demo's photos, 3d renders on the four personal backgrounds, and truth.png, the line drawing on blue."""
    place = made.subjects.index(made.named(name))
    target.mkdir(parents=True, exist_ok=True)
    for number, background in enumerate(world.PERSONAL_BACKGROUNDS):
        picture = compose(drawings, Scene((place,), "render", background, "", 1000 + number))
        check.Image.fromarray(picture).save(target / f"photo_{number}.png")
    truth = compose(drawings, Scene((place,), "line", "blue", "", 1100))
    check.Image.fromarray(truth).save(target.parent / "truth.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for downloads, pictures and checkpoints")
    parser.add_argument("--output", type=Path, default=MODEL, help="model folder to write")
    parser.add_argument("--autoencoder-steps", type=int, default=autoencoder.STEPS)
    parser.add_argument("--diffusion-steps", type=int, default=diffusion.STEPS)
    args = parser.parse_args()
    cache = args.cache
    sources.fetch(cache)
    drawings = load_sprites(cache)
    made = make_world(cache, drawings)
    pictures.render_all(cache, made, drawings)
    vae = autoencoder.train(cache, made, drawings, Log(cache / "log.jsonl", "autoencoder"), args.autoencoder_steps)
    words = tokenizer.learn(json.loads((cache / "captions.json").read_text()), cache / "tokenizer")
    diffusion.cache_latents(cache, vae)
    scaling = 1 / float(np.load(cache / "latents.npy", mmap_mode="r")[:4096].astype(np.float32).std())
    model = diffusion.train(cache, words, scaling, Log(cache / "log.jsonl", "diffusion"), args.diffusion_steps)
    assemble(vae, model, words, scaling, args.output)
    personal_pictures(made, drawings, DEMO_SUBJECT, PACKAGE / "demo_subject" / "photos")
    results = check.run(args.output, made, drawings, cache / "check.png")
    held = autoencoder.squared_error(vae.float(), autoencoder.held_out_pictures(made, drawings))
    Log(cache / "log.jsonl", "check")(args.diffusion_steps, autoencoder_squared_error=held, **results)
    if args.output == MODEL:
        shutil.copy(cache / "log.jsonl", PACKAGE / "build_log.jsonl")


if __name__ == "__main__":
    main()
