"""Models of the size that users train, with random weights, as diffusers folders under runs/models.

Layer sizes of the UNet, the autoencoder and the text encoders are those of SD 1.5 and SDXL base; the tokenizer is that
of emoji-64, and the token tables are as long as it needs.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import diffusers
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from palp_fast.models import MODELS

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "models"
UNETS = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4,
}
SCALING = {"sd15": 0.18215, "sdxl": 0.13025}
_POOL = 1_048_573  # random numbers that all weights are made of: a prime, so that rows do not repeat them in step


def unet(size: str, device: str) -> diffusers.UNet2DConditionModel:
    """The UNet in fp16; on the meta device without memory."""
    with torch.device("meta"):
        made = diffusers.UNet2DConditionModel(**UNETS[size]).half()
    return made if device == "meta" else _filled(made)


def folder(size: str) -> Path:
    """The model's folder, written in fp16 the first time: 2 GB for "sd15", 7 GB for "sdxl"."""
    path = FOLDER / size
    if not (path / "model_index.json").exists():
        _write(size, path)
    return path


def _write(size: str, path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODELS["emoji-64"], subfolder="tokenizer")
    tokenizer.model_max_length = 77
    parts = {
        "vae": _random(diffusers.AutoencoderKL, **VAE, sample_size=512, scaling_factor=SCALING[size]),
        "unet": unet(size, "cpu"),
        "scheduler": diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        "tokenizer": tokenizer,
        "text_encoder": _random(CLIPTextModel, _text(tokenizer, 768, 12, 12)),
    }
    if size == "sdxl":
        second = _random(CLIPTextModelWithProjection, _text(tokenizer, 1280, 32, 20, projection_dim=1280))
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts, tokenizer_2=tokenizer, text_encoder_2=second, add_watermarker=False)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(path)


def _text(tokenizer, width: int, layers: int, heads: int, **more) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **more)


def _random(kind: type, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        made = kind(*args, **kwargs).half()
    return _filled(made)


@torch.no_grad()
def _filled(module: nn.Module) -> nn.Module:
    """In memory, matrices with entries of standard deviation fan-in^-1/2; far faster than drawing every weight.

    Text encoders add less in every layer the more they have, as one starts training them: SDXL reads their states
    without a norm, and states far above 1 make its attention choose single tokens, so that rounding changes everything.
    """
    module.to_empty(device="cpu")
    layers = getattr(module.config, "num_hidden_layers", 1)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        size = 0.02 if "embedding" in name else parameter[0].numel() ** -0.5
        if name.endswith(("out_proj.weight", "fc2.weight")):
            size *= (2 * layers) ** -0.5
        # From another place for every layer: equal matrices for q and k would make each token attend to itself.
        values = (size * pool.roll(zlib.crc32(name.encode()) % _POOL)).to(parameter.dtype)
        for part in parameter.view(-1).split(_POOL):
            part.copy_(values[: len(part)])
    return module


if __name__ == "__main__":
    for chosen in sys.argv[1:] or UNETS:
        print(folder(chosen))
