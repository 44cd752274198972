"""Make emoji-64 from its sources: `python -m palp_fast.zoo.build --cache DIR`; run it again to go on after a stop.

Stages: fetch (npm), sprites, pictures, autoencoder, tokenizer, invented subjects, latents, language, diffusion,
contrast, assembly, check. Every random draw is seeded by its step, so that a resumed build draws what an uninterrupted
one would.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer

from palp_fast.zoo import (
    autoencoder,
    check,
    contrast,
    diffusion,
    invented,
    language,
    latents,
    pictures,
    sources,
    sprites,
    tokenizer,
    world,
)
from palp_fast.zoo.coder import Captions, Coder, Mixture, mark_ids, small_renders
from palp_fast.zoo.render import Scene, compose, training_scene
from palp_fast.zoo.training import Log, save

PACKAGE = Path(__file__).parent
MODEL = PACKAGE / "emoji-64"
DEMO_SUBJECT = "bus"


def load_sprites(cache: Path) -> np.ndarray:
    """Sprites uint8 [subjects, 3, 96, 96, 4] of the joined list, rasterised once."""
    path = cache / "sprites.npy"
    if not path.exists():
        np.save(path, sprites.rasterise(cache, world.join(cache)))
    return np.load(path)


def world_of(cache: Path) -> tuple[world.World, np.ndarray]:
    """The world and its sprites, from the sprites in `cache` or, the first time, from the fetched sources."""
    if (cache / "sprites.npy").exists():
        return world.World.load(), load_sprites(cache)
    sources.fetch(cache)
    drawings = load_sprites(cache)
    return make_world(cache, drawings), drawings


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


def mixtures(
    cache: Path, made: world.World, drawings: np.ndarray, words: CLIPTokenizer, captions: list[str], scaling: float
) -> dict[str, Mixture]:
    """What the text encoder learns from ("portraits") and what the UNet does ("pictures"), with one untrained coder.

    drawings: the world's and the invented ones, as of `invented.sprites_of`; captions: of the pictures.
    """
    torch.manual_seed(0)
    coder, ids, renders = Coder(language.WIDTH), tokenizer.ids_of(words, captions), small_renders(drawings)
    scenes = [invented.coded_scene(made, index) for index in range(latents.CODED)]
    coded_ids = tokenizer.ids_of(words, [scene.caption for scene, _ in scenes])
    coded_renders = renders[torch.tensor([place for _, place in scenes])]
    found = {}
    for kind, files, share in (("portraits", ("portraits.npy", "coded_portraits.npy"), language.CODED_SHARE),
                               ("pictures", ("latents.npy", "coded_latents.npy"), diffusion.CODED_SHARE)):
        shown, coded_shown = (np.load(cache / file) for file in files)
        chances = picture_chances(made, len(shown)) if kind == "pictures" else None
        found[kind] = Mixture(
            Captions(ids[:len(shown)], shown, chances=chances),
            Captions(coded_ids[:len(coded_shown)], coded_shown, coded_renders), mark_ids(words), coder, scaling, share)
    return found


def picture_chances(made: world.World, count: int) -> torch.Tensor:
    """How often the UNet sees each of the first pictures, relative to the others, fp32 [count]."""
    pairs = torch.tensor([len(training_scene(made, index).subjects) == 2 for index in range(count)])
    return torch.where(pairs, diffusion.PAIRS, 1.0)


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
    pipeline.to("cpu", torch.float16).save_pretrained(target)
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
    parser.add_argument("--decoder-steps", type=int, default=autoencoder.DECODER_STEPS, help="after those")
    parser.add_argument("--diffusion-steps", type=int, default=diffusion.STEPS)
    parser.add_argument("--contrast-steps", type=int, default=contrast.STEPS, help="after those")
    parser.add_argument("--diffusion-batch", type=int, default=diffusion.BATCH, help="pictures of a step of the UNet")
    parser.add_argument("--warm-start", type=Path, help="finished model folder whose UNet is trained further")
    args = parser.parse_args()
    cache = args.cache
    torch.set_flush_denormal(True)  # tiny gradients of rare words would slow every pass over them
    if args.warm_start:
        warm_start(args.warm_start, cache, args.autoencoder_steps + args.decoder_steps)
    made, drawings = world_of(cache)
    pictures.render_all(cache, made, drawings)
    vae = autoencoder.train(
        cache, made, drawings, Log(cache / "log.jsonl", "autoencoder"), args.autoencoder_steps, args.decoder_steps)
    captions = json.loads((cache / "captions.json").read_text())
    words = tokenizer.trained(captions, cache / "tokenizer")
    everything = invented.sprites_of(made, drawings, cache)
    latents.cache_pictures(cache, vae)
    latents.cache_portraits(cache, made, drawings, vae)
    latents.cache_coded(cache, made, everything, vae)
    scaling = 1 / float(np.load(cache / "latents.npy", mmap_mode="r")[:4096].astype(np.float32).std())
    learned_from = mixtures(cache, made, everything, words, captions, scaling)
    encoder = language.trained(cache, words, learned_from["portraits"], Log(cache / "log.jsonl", "language"))
    unet = diffusion.train(
        cache, encoder, learned_from["pictures"], Log(cache / "log.jsonl", "diffusion"), args.diffusion_steps,
        args.diffusion_batch)
    apart = contrast.contrasts(learned_from["pictures"].named, captions, words)
    unet = contrast.train(
        cache, encoder, unet, apart, scaling, Log(cache / "log.jsonl", "contrast"), args.contrast_steps,
        args.diffusion_batch)
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
