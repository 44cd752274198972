"""From diffusers' UNet to a lean one: the table of classes, and what is refused.

Every module of the UNet becomes one of the class beside its own, in place: parameters, names and configuration stay,
the forward pass is another one. A class that is not in the table, or an option that its lean class does not compute,
is refused by name.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.upsampling import Upsample2D
from torch import nn

from palp_fast import checks
from palp_fast.nn import lean_attention, lean_layers, lean_model
from palp_fast.nn.frozen import quantise_layers
from palp_fast.nn.lora import LoRALinear, adapt
from palp_fast.reference.dtypes import BASE_DTYPES
from palp_fast.reference.quantised import FORMATS

TABLE = {
    UNet2DConditionModel: lean_model.LeanUNet,
    blocks.DownBlock2D: lean_model.LeanDownBlock,
    blocks.CrossAttnDownBlock2D: lean_model.LeanCrossAttnDownBlock,
    blocks.UNetMidBlock2D: lean_model.LeanMidBlock,
    blocks.UNetMidBlock2DCrossAttn: lean_model.LeanCrossAttnMidBlock,
    blocks.UpBlock2D: lean_model.LeanUpBlock,
    blocks.CrossAttnUpBlock2D: lean_model.LeanCrossAttnUpBlock,
    Transformer2DModel: lean_attention.LeanTransformer,
    BasicTransformerBlock: lean_attention.LeanTransformerBlock,
    Attention: lean_attention.LeanAttention,
    FeedForward: lean_attention.LeanFeedForward,
    ResnetBlock2D: lean_layers.LeanResnet,
    Downsample2D: lean_layers.LeanDownsample,
    Upsample2D: lean_layers.LeanUpsample,
    nn.Conv2d: lean_layers.LeanConv2d,
    nn.Linear: lean_layers.LeanLinear,
    nn.GroupNorm: lean_layers.LeanGroupNorm,
    nn.LayerNorm: lean_layers.LeanLayerNorm,
}
# They stay as they are: called by those above, or holding what those read.
KEPT = (Timesteps, TimestepEmbedding, GEGLU, nn.SiLU, nn.Dropout, nn.ModuleList)
# Layers whose weights may be quantised, before the UNet is converted as well; the first and the last convolution,
# a thousandth of the weights, stay as they are.
QUANTISED = {nn.Linear: lean_layers.LeanLinear, nn.Conv2d: lean_layers.LeanConv2d}
NOT_QUANTISED = ("conv_in", "conv_out")

_NONE, _NO = (None,), (None, False)
CONFIG = {
    "addition_embed_type": (None, "text_time"), "class_embed_type": _NONE, "num_class_embeds": _NONE,
    "encoder_hid_dim_type": _NONE, "time_embedding_type": ("positional",), "time_embedding_act_fn": _NONE,
    "timestep_post_act": _NONE, "time_cond_proj_dim": _NONE, "attention_type": ("default",),
    "cross_attention_norm": _NONE, "dual_cross_attention": _NO, "center_input_sample": _NO,
}
MEMORY = ("fast", "balanced", "low")


class UnsupportedUNet(ValueError):
    """A UNet with a class or an option that the lean forward pass does not compute."""

    def __init__(self, reason: str):
        super().__init__(f"{reason}; the lean UNet does not compute that, "
                         "palp_fast.Trainer(config, lean=False) trains such a UNet by diffusers' own modules")


def lean_unet(
    unet: UNet2DConditionModel, *, rank: int, lora_alpha: float | None = None, memory: str = "fast",
    base_dtype: str | torch.dtype | None = None, lora_targets: str = "attention",
    generator: torch.Generator | None = None, backend: str = "auto",
) -> UNet2DConditionModel:
    """Converts a loaded UNet in place, with LoRA (B zero) on its attention and all else frozen, and returns it.

    Called as before, also with `lora_scale=` (a float or [B]) and `rows=` (LeanUNet.forward). Its trainable parameters
    are the fp32 factors, `lora_a` and `lora_b` of the modules that `lora_layers` lists.

    rank: of the LoRA, whose strength is lora_alpha / rank (None: 1). memory: "fast" keeps for the backward pass what
    each operator needs; "balanced" makes q, k, v and the first product of feed-forward layers again; "low" recomputes
    whole blocks. base_dtype: "fp32", "bf16", "fp16" or a torch.dtype for the frozen weights; "int8" or "nf4": linear
    layers and convolutions but the first and last are quantised, the rest stays; None: all stay as they are.
    lora_targets: "attention", "cross_kv" (keys and values of cross-attention) or "none". generator: a CPU generator for
    A. backend: of every operator. Raises UnsupportedUNet, a ValueError that names what cannot be converted, before
    anything is changed, TypeError or ValueError for other arguments.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"unet={type(unet).__name__}: allowed is diffusers' UNet2DConditionModel")
    checks.integer("rank", rank, 1)
    if lora_alpha is not None:
        checks.positive("lora_alpha", lora_alpha)
    _one_of("memory", memory, MEMORY)
    _one_of("lora_targets", lora_targets, ("attention", "cross_kv", "none"))
    form = base_dtype if base_dtype in FORMATS else None
    dtype = None if form else _dtype(base_dtype)
    check(unet)
    unet.requires_grad_(False)
    if dtype is not None:
        nn.Module.to(unet, dtype)  # not the UNet's own, which warns of modules kept in fp32 where there are none
    if form is not None:
        quantise_layers(unet, form, QUANTISED, skip=NOT_QUANTISED)
    adapt(unet, lora_targets, rank, lora_alpha, generator, backend)
    for module in reversed(list(unet.modules())):  # children first
        _convert(module, backend)
    unet.strength = 1.0 if lora_alpha is None else lora_alpha / rank
    unet.has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in unet.modules())
    set_memory(unet, memory)
    return unet


def lora_layers(unet: nn.Module) -> dict[str, LoRALinear]:
    """{diffusers module path inside the UNet: layer}, in the order of the modules."""
    return {path: module for path, module in unet.named_modules() if isinstance(module, LoRALinear)}


def set_memory(unet: nn.Module, memory: str) -> None:
    """Switches the memory mode of a lean UNet."""
    for module in unet.modules():
        if isinstance(module, lean_attention.LeanTransformerBlock):
            module.choose_kept(memory)
        elif isinstance(module, lean_layers.LeanUpsampleConv2d):
            module.keep_sums(memory == "fast")
        elif hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = memory == "low"


def check(unet: UNet2DConditionModel) -> None:
    """Raises UnsupportedUNet unless every module and option can be converted."""
    if type(unet) is not UNet2DConditionModel:
        raise UnsupportedUNet(f"the UNet is a {type(unet).__name__}")
    for name, allowed in CONFIG.items():
        if (value := unet.config.get(name, allowed[0])) not in allowed:
            raise UnsupportedUNet(f"the UNet's {name} is {value!r}")
    if unet.conv_norm_out is None:
        raise UnsupportedUNet("the UNet's norm_num_groups is None")
    for path, module in unet.named_modules():
        if (reason := _obstacle(module)) is not None:
            raise UnsupportedUNet(f"{path or 'the UNet'}: {reason}")
    if unet.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in unet.modules()):
        raise UnsupportedUNet("the UNet has dropout and is in training mode (unet.eval() switches it off)")


def _obstacle(module: nn.Module) -> str | None:
    if type(module) in (*KEPT, *QUANTISED.values()):
        return None
    lean = TABLE.get(type(module))
    if lean is None:
        return f"it is a {type(module).__name__}"
    for name, allowed in lean.only.items():
        if (value := getattr(module, name, allowed[0])) not in allowed:
            return f"its {name} is {value!r}"
    return lean.obstacle(module) if hasattr(lean, "obstacle") else None


def _convert(module: nn.Module, backend: str) -> None:
    if type(module) not in (*TABLE, *QUANTISED.values()):
        return
    module.__class__ = TABLE.get(type(module), type(module))
    if hasattr(module, "backend"):
        module.backend = backend
    if hasattr(module, "converted"):
        module.converted()


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(map(repr, allowed))}")


def _dtype(base_dtype) -> torch.dtype | None:
    if base_dtype is None or (isinstance(base_dtype, torch.dtype) and base_dtype.is_floating_point):
        return base_dtype
    _one_of("base_dtype", base_dtype, (*BASE_DTYPES, *FORMATS))
    return BASE_DTYPES[base_dtype]
