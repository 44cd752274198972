"""Drawing with stock diffusers pipelines: stock loaders for LoRA and tokens, one seed per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils import is_peft_available
from PIL import Image
from safetensors.torch import load_file

from .conditioning import warn_of_length
from .errors import ConfigError
from .export import load_lora
from .models import load_components
from .nn.lora import attach_lora
from .prompts import placeholders

Embedding = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


def generate(
    model,
    prompt: str,
    lora: str | Path | None = None,
    embedding: Embedding | None = None,
    n: int = 4,
    steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int = 0,
    *,
    lora_strength: float = 1.0,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    batch_size: int = 1,
) -> list[Image.Image]:
    """Draw n pictures of `prompt` with a model reference and, if given, a LoRA file and token files.

    lora: a PEFT or kohya LoRA file. embedding: a token file, several, or {token word: file}; a bare file's stem is its
    token word, which the prompt must use (not a placeholder such as [V]). Picture i comes from a CPU generator with
    seed + i, whatever n is. height, width in pixels; None: the model's own. device "auto": CUDA if there is one;
    dtype None: fp16 on CUDA, fp32 elsewhere. Raises ConfigError for arguments out of range and missing files.
    """
    _check(prompt, n, steps, batch_size, _files(lora, embedding))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    pipeline = load_components(model, dtype=dtype, device=torch.device(device)).pipeline()
    apply_files(pipeline, lora, embedding, lora_strength=lora_strength)
    for field, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        words = pipeline.maybe_convert_prompt(text, pipeline.tokenizer)
        warn_of_length(field, text, pipeline.tokenizer(words, verbose=False).input_ids, pipeline.tokenizer)
    options = {"negative_prompt": negative_prompt, "height": height, "width": width, "batch_size": batch_size}
    return sample(pipeline, prompt, n=n, steps=steps, guidance_scale=guidance_scale, seed=seed, **options)


def sample(
    pipeline,
    prompt: str,
    *,
    n: int = 4,
    steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int = 0,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
) -> list[Image.Image]:
    """Draw n pictures with a live pipeline; picture i is the same for every n at batch_size 1, to rounding at others.

    The model folder's scheduler decides; a DDPM one, which would add fresh noise at each of few steps, samples as DDIM
    with eta 0. The pipeline's own scheduler object is left as it was.
    """
    scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    try:
        while len(images) < n:
            count = min(batch_size, n - len(images))
            generators = [torch.Generator("cpu").manual_seed(seed + len(images) + i) for i in range(count)]
            pipeline.scheduler = sampling_scheduler(scheduler)
            images += pipeline(
                prompt,
                # SDXL takes its zero embedding only for None, which means the empty prompt everywhere else.
                negative_prompt=negative_prompt or None,
                num_images_per_prompt=count,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generators,
                height=height,
                width=width,
            ).images
    finally:
        pipeline.scheduler = scheduler
    return images


def sampling_scheduler(scheduler):
    """A fresh scheduler to sample with: of the same class and config, DDIM in place of DDPM."""
    kind = DDIMScheduler if type(scheduler) is DDPMScheduler else type(scheduler)
    return kind.from_config(scheduler.config)


def apply_files(pipeline, lora=None, embedding: Embedding | None = None, *, lora_strength: float = 1.0) -> None:
    """Load a LoRA file and token files into a diffusers pipeline in place, by its own loaders.

    Those load LoRA through peft; without peft, our own layers take its place in the UNet.
    """
    for token, file in token_files(embedding).items():
        load_token(pipeline, token, file)
    if lora is None:
        return
    if not is_peft_available():
        attach_lora(pipeline.unet, *load_lora(lora), strength=lora_strength)
        return
    file = Path(lora)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="palp")
    pipeline.set_adapters("palp", adapter_weights=lora_strength)


def load_token(pipeline, token: str, file: str | Path) -> None:
    """Add one token to the pipeline's tokenizer(s) and text encoder(s) from a token file."""
    if getattr(pipeline, "text_encoder_2", None) is None:
        pipeline.load_textual_inversion(str(file), token=token)
        return
    rows = load_file(str(file))
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(pipeline, part + suffix) for part in ("tokenizer", "text_encoder")}
        pipeline.load_textual_inversion(rows[key], token=token, **parts)


def token_files(embedding: Embedding | None) -> dict[str, Path]:
    """{token word: file} from any accepted form; a bare file's stem is its token word."""
    if embedding is None:
        return {}
    if isinstance(embedding, Mapping):
        return {token: Path(file) for token, file in embedding.items()}
    files = [embedding] if isinstance(embedding, (str, Path)) else embedding
    return {Path(file).stem: Path(file) for file in files}


def _files(lora, embedding) -> dict[str, Path]:
    named = {f"embedding[{token!r}]": file for token, file in token_files(embedding).items()}
    return named if lora is None else {"lora": Path(lora), **named}


def _check(prompt: str, n: int, steps: int, batch_size: int, files: Mapping[str, Path]) -> None:
    for name, value in (("n", n), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}: {value}; allowed: 1 or more")
    if found := placeholders(prompt):
        raise ConfigError(f"prompt: {prompt!r} has the placeholder {found[0]}; write the token word in its place")
    for name, file in files.items():
        if not file.is_file():
            raise ConfigError(f"{name}: {str(file)!r} is not a file")
