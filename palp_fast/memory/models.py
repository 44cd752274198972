"""A model's parts without values: of its configuration files, or of the two families that presets are made for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from palp_fast.memory.stock import StockUNet
from palp_fast.nn.frozen import quantise_layers
from palp_fast.nn.lean import QUANTISED, UnsupportedUNet, check, lean_unet
from palp_fast.reference.dtypes import BASE_DTYPES
from palp_fast.reference.quantised import FORMATS
from palp_fast.resolve import base_dtype, compute_dtype

_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "projection_dim": 768,
}
_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}


@dataclass(frozen=True)
class Configs:
    """Of a model's parts, as their files have them; resolution in pixels."""

    unet: dict
    text: tuple[dict, ...]
    vae: dict
    resolution: int


FAMILIES = {
    "SD1.x": Configs({"sample_size": 64, "cross_attention_dim": 768}, (_CLIP_L,), _VAE, 512),
    "SDXL": Configs({
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816}, (_CLIP_L, _CLIP_G), _VAE, 1024),
}


def configs_of(facts) -> Configs:
    """Of a model by its facts (models.facts); reads no weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    names = ["text_encoder", "text_encoder_2"] if facts.family == "sdxl" else ["text_encoder"]
    return Configs(
        UNet2DConditionModel.load_config(facts.source, subfolder="unet"),
        tuple(CLIPTextConfig.from_pretrained(facts.source, subfolder=name).to_dict() for name in names),
        AutoencoderKL.load_config(facts.source, subfolder="vae"), facts.resolution)


@dataclass(frozen=True)
class Parts:
    """Modules on the meta device: the UNet with LoRA, text encoders, VAE.

    stock: the UNet where it runs by diffusers' own modules, None: it is lean; why: the reason for that.
    """

    unet: nn.Module
    encoders: list[nn.Module]
    vae: nn.Module
    stock: StockUNet | None = None
    why: str = ""


def parts_of(configs: Configs, cfg, teacher: bool = False, lean: bool | None = None) -> Parts:
    """As the Trainer of a resolved config would load them; teacher: as another teacher; lean: as of the Trainer.

    Raises ConfigError for what diffusers' own modules cannot do, where they run.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    form = base_dtype(cfg, teacher)
    form = form if form in FORMATS else None
    targets = "none" if teacher else cfg.lora_targets
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.device("meta"):
        with _default(BASE_DTYPES[compute_dtype(cfg, teacher)]):
            unet = UNet2DConditionModel.from_config(configs.unet).eval().requires_grad_(False)
            encoders = [kind(CLIPTextConfig(**text)) for kind, text in zip(kinds, configs.text)]
        vae = AutoencoderKL.from_config(configs.vae).requires_grad_(False)
        stock, why = None, _obstacle(unet, lean)
        if not why:
            lean_unet(unet, rank=cfg.rank, lora_targets=targets, base_dtype=form)
        for encoder in encoders:
            encoder.requires_grad_(False)
            if form is not None:
                quantise_layers(encoder, form, QUANTISED)
    if why:
        stock = StockUNet(unet, cfg.replace(lora_targets=targets, base_dtype=base_dtype(cfg, teacher)))
    return Parts(unet, encoders, vae, stock, why)


def _obstacle(unet: nn.Module, lean: bool | None) -> str:
    """Why a UNet does not become a lean one; "" where it does."""
    if lean is False:
        return "by diffusers' own modules (lean=False)"
    try:
        check(unet)
    except UnsupportedUNet as error:
        if lean:
            raise
        return f"by diffusers' own modules ({error})"
    return ""


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Within, parameters are made in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def nbytes(module: nn.Module, which: Callable[[torch.Tensor], bool] = lambda tensor: True) -> int:
    """Bytes of what is frozen, each storage once; which: of these tensors alone."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not t.requires_grad and which(t)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
