"""Looks inside a run: a LoRA, fixed-seed samples of y and y_P, and x0_hat pictures (the paper's Fig. 5)."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from PIL import Image

from palp_fast import functional
from palp_fast.conditioning import subject_names
from palp_fast.export import write_atomic
from palp_fast.generate import sample
from palp_fast.prompts import fill
from palp_fast.result import write_files

_IMAGES, _STEPS, _GUIDANCE = 2, 25, 7.5
# Not a step of any run, so that the noise of the pictures is no training noise.
_NOISE_STEP = 2**31


def draw(trainer, folder: Path) -> None:
    """Writes the LoRA and token files, y-<i>.png, <y_P name>-<i>.png and <y_P name>-x0.png to `folder`.

    Pictures are decoded one by one; trainer.tiles: in tiles.
    """
    components = trainer.components
    write_files(folder, trainer)
    tiles = components.decoding_in_tiles(trainer.resolution) if trainer.tiles else contextlib.nullcontext()
    with components.on_device(components.vae, *components.text_encoders), tiles:
        _pictures(trainer, folder)


def _pictures(trainer, folder: Path) -> None:
    cfg, components = trainer.config, trainer.components
    # The stock pipeline spells out the further words of a token with several vectors by itself.
    words = {subject.placeholder: subject.token for subject in cfg.subjects}
    prompts = {"y": cfg.prompt} | dict(zip(subject_names(cfg), [subject.prompt for subject in cfg.subjects]))
    size = {"height": trainer.resolution, "width": trainer.resolution}
    pipeline = components.pipeline()
    for name, prompt in prompts.items():
        settings = {"n": _IMAGES, "steps": _STEPS, "guidance_scale": _GUIDANCE, "seed": cfg.seed}
        for i, image in enumerate(sample(pipeline, fill(prompt, words), **settings, **size)):
            _save(image, folder / f"{name}-{i}.png")
    for i, name in enumerate(subject_names(cfg)):
        _save(x0_picture(trainer, i), folder / f"{name}-x0.png")


@torch.no_grad()
def x0_picture(trainer, subject: int) -> Image.Image:
    """x0_hat of the subject's first photo at a quarter, half and three quarters of the schedule, left to right."""
    table = trainer.components.alphas_cumprod
    t = torch.tensor([len(table) * quarter // 4 for quarter in (1, 2, 3)], device=table.device)
    latents = trainer.draws.latents[[trainer.draws.first_photo(subject)] * 3]
    x_t, _ = functional.add_noise(latents, t, table, seed=trainer.config.seed, step=_NOISE_STEP)
    pred = trainer.predict(x_t, t, trainer.conditioning(subject).subject.rows([0, 0, 0]))
    pixels = torch.cat([trainer.components.to_pixels(x0[None]) for x0 in trainer.space.x0(pred, x_t, t)])
    row = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(2, 0, 3, 1).flatten(1, 2)
    return Image.fromarray(row.cpu().numpy())


def _save(image, path):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
