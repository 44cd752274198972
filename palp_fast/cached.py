"""Latents of photos and conditions of prompts, taken from the cache on disk where they are there already."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from palp_fast import cache, conditioning
from palp_fast.conditioning import Condition
from palp_fast.resolve import base_dtype, compute_dtype


def latents(components, place: Callable, pictures: list[Tensor], device: str) -> Iterator[Tensor]:
    """[photos, C, h, w] fp32 on `device` for each of pictures [photos, 3, H, W], each photo kept by itself.

    Only the encoder, its settings, the photo's pixels and the kind of device decide what is found. place: called before
    the VAE is needed.
    """
    vae = components.vae

    @functools.cache
    def maker() -> str:
        return cache.key(vae.encoder, vae.quant_conv, _settings(vae.config), torch.device(device).type)

    def encoded(photo: Tensor) -> dict[str, Tensor]:
        place()
        return {"latents": components.to_latents(photo[None])}

    for photos in pictures:
        made = [cache.fetch("latents", lambda: cache.key(maker(), photo), lambda: encoded(photo))["latents"]
                for photo in photos]
        yield torch.cat([one.to(device) for one in made])


def conditions(
    components, texts: dict[str, str | list[str] | None], cfg, place: Callable[[], object], teacher: bool = False
) -> dict[str, Condition]:
    """conditioning.encode_all of a resolved config's prompts, on its device, kept together; teacher: by its teacher.

    The text encoders with their settings and token rows, what they are computed in, the token ids and the kind of
    device decide what is found. place: called before the text encoders are needed.
    """
    encoders, texts = components.text_encoders, {name: text for name, text in texts.items() if text is not None}

    def name() -> str:
        ids = [conditioning.tokenize(components.tokenizers, [text] if isinstance(text, str) else text)
               for text in (*texts.values(), "")]
        dtypes = base_dtype(cfg, teacher), compute_dtype(cfg, teacher)
        computed = *dtypes, torch.device(cfg.device).type, str(components.zero_empty)
        return cache.key(
            *encoders, *(_settings(encoder.config.to_dict()) for encoder in encoders), *computed, *texts,
            *(per_encoder for prompts in ids for per_encoder in prompts))

    def encoded() -> dict[str, Tensor]:
        place()
        found = conditioning.encode_all(components, texts).items()
        return {f"{prompt}.{part}": value for prompt, condition in found for part, value in vars(condition).items()
                if value is not None}

    found = {part: value.to(cfg.device) for part, value in cache.fetch("prompts", name, encoded).items()}
    return {prompt: Condition(found[f"{prompt}.hidden"], found.get(f"{prompt}.pooled")) for prompt in (*texts, "empty")}


def _settings(config: dict) -> str:
    """What a configuration says, but for the name and version of its file."""
    return repr(sorted((name, str(value)) for name, value in config.items()
                       if not name.startswith("_") and name != "transformers_version"))
