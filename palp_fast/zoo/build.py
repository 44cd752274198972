"""Make emoji-64 from its sources: `python -m palp_fast.zoo.build --cache DIR`; run it again to go on after a stop.

Stages: fetch (npm), sprites, pictures, autoencoder, tokenizer, latents, language, diffusion, assembly, check. Every
random draw is seeded by its step, so that a resumed build draws what an uninterrupted one would.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from palp_fast.zoo import autoencoder, check, diffusion, language, latents, pictures, sources, sprites, tokenizer, world
from palp_fast.zoo.render import Scene, compose
from palp_fast.zoo.training import Log, save

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
    stand_ins = sprites.typical(drawings, made)
    for subject in made.subjects:
        subject.typical = subject.name in stand_ins
    if made != world.World.load():
        raise RuntimeError("the sources no longer give the committed world.json")
    return made


def assemble(vae, encoder, unet, words, scaling: float, target: Path) -> None:
    """Write the stock Stable Diffusion folder, weights fp16."""
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor2_0

    vae.register_to_config(scaling_factor=scaling)
    unet.set_attn_processor(AttnProcessor2_0())
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=words, unet=unet,
        scheduler=diffusion.build_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipeline.to(torch.float16).save_pretrained(target)
    # transformers loads in the dtype that the config names, diffusers in fp32: let them agree.
    config = target / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def personal_pictures(made: world.World, drawings: np.ndarray, name: str, target: Path) -> None:
    """The demo's photos, 3d renders on the four personal backgrounds, and truth.png, the line drawing on blue."""
    place = made.subjects.index(made.named(name))
    target.mkdir(parents=True, exist_ok=True)
    for number, background in enumerate(world.PERSONAL_BACKGROUNDS):
        picture = compose(drawings, Scene((place,), "render", background, "", 1000 + number))
        Image.fromarray(picture).save(target / f"photo_{number}.png")
    truth = compose(drawings, Scene((place,), "line", "blue", "", 1100))
    Image.fromarray(truth).save(target.parent / "truth.png")


def warm_start(model: Path, cache: Path, autoencoder_steps: int) -> None:
    """Make a finished model the starting point: its tokenizer, autoencoder and text encoder stay, its UNet trains on.

    Does nothing in a cache that has a UNet checkpoint already.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    if (cache / "diffusion.pt").exists():
        return
    shutil.copytree(model / "tokenizer", cache / "tokenizer", dirs_exist_ok=True)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder", dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32).state_dict()
    save(cache / "autoencoder.pt", model=vae.state_dict(), step=autoencoder_steps)
    save(cache / "language.pt", encoder=encoder.state_dict())
    save(cache / "diffusion.pt", unet=unet, average=unet, step=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for downloads, pictures and checkpoints")
    parser.add_argument("--output", type=Path, default=MODEL, help="model folder to write")
    parser.add_argument("--autoencoder-steps", type=int, default=autoencoder.STEPS)
    parser.add_argument("--diffusion-steps", type=int, default=diffusion.STEPS)
    parser.add_argument("--warm-start", type=Path, help="finished model folder whose UNet is trained further")
    args = parser.parse_args()
    cache = args.cache
    torch.set_flush_denormal(True)  # tiny gradients of rare words would slow every pass over them
    sources.fetch(cache)
    if args.warm_start:
        warm_start(args.warm_start, cache, args.autoencoder_steps)
    drawings = load_sprites(cache)
    made = make_world(cache, drawings)
    pictures.render_all(cache, made, drawings)
    vae = autoencoder.train(cache, made, drawings, Log(cache / "log.jsonl", "autoencoder"), args.autoencoder_steps)
    captions = json.loads((cache / "captions.json").read_text())
    words = tokenizer.trained(captions, cache / "tokenizer")
    ids = tokenizer.ids_of(words, captions)
    latents.cache_pictures(cache, vae)
    latents.cache_portraits(cache, made, drawings, vae)
    scaling = 1 / float(np.load(cache / "latents.npy", mmap_mode="r")[:4096].astype(np.float32).std())
    encoder = language.trained(cache, words, ids, scaling, Log(cache / "log.jsonl", "language"))
    unet = diffusion.train(cache, encoder, ids, scaling, Log(cache / "log.jsonl", "diffusion"), args.diffusion_steps)
    assemble(vae, encoder, unet, words, scaling, args.output)
    for name in ("vocab.json", "merges.txt"):  # what transformers before 5 reads
        shutil.copy(cache / "tokenizer" / name, args.output / "tokenizer" / name)
    personal_pictures(made, drawings, DEMO_SUBJECT, PACKAGE / "demo_subject" / "photos")
    results = check.run(args.output, made, drawings, cache)
    held = autoencoder.squared_error(vae.float(), autoencoder.held_out_pictures(made, drawings))
    Log(cache / "log.jsonl", "check")(args.diffusion_steps, autoencoder_squared_error=held, **results)
    if args.output == MODEL:
        shutil.copy(cache / "log.jsonl", PACKAGE / "build_log.jsonl")


if __name__ == "__main__":
    main()
