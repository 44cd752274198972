"""The weights of a UNet and of text encoders on their device, quantised on the way if wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from palp_fast.nn.frozen import quantise_layers
from palp_fast.nn.lean import NOT_QUANTISED, QUANTISED

_FILE = "diffusion_pytorch_model.safetensors"


def unet_of_folder(source: Path | str, dtype: torch.dtype, form: str | None, device) -> nn.Module:
    """The UNet of a diffusers folder or hub id; form: "int8", "nf4" or None.

    Quantised from the safetensors file of a local folder it is read, moved and quantised layer by layer, and never
    whole in memory; elsewhere it is read whole into the memory of the CPU first.
    """
    from diffusers import UNet2DConditionModel

    file = Path(source) / "unet" / _FILE
    if form is None or not file.is_file():
        unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", dtype=dtype)
        return placed(unet, dtype, form, device)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(source, subfolder="unet"))
    with safe_open(file, "pt") as weights:
        return placed(unet, dtype, form, device, _filling(weights))


def _filling(weights) -> Callable[[nn.Module, str], None]:
    """Gives a layer its parameters from an open safetensors file; a missing one raises SafetensorError."""

    def fill(layer: nn.Module, path: str) -> None:
        for name, empty in layer._parameters.items():
            if empty is not None:
                value = weights.get_tensor(f"{path}.{name}" if path else name)
                layer._parameters[name] = nn.Parameter(value.view(empty.shape), requires_grad=False)

    return fill


def placed(
    module: nn.Module, dtype: torch.dtype, form: str | None, device, fill=None, *, backend: str = "auto"
) -> nn.Module:
    """A module moved to dtype and device, frozen, in eval mode; with `form`, its layers are quantised one by one."""
    module.eval().requires_grad_(False)
    if form is not None:
        quantise_layers(module, form, QUANTISED, dtype=dtype, device=device, skip=NOT_QUANTISED, fill=fill)
        for layer in module.modules():
            if hasattr(layer, "backend"):
                layer.backend = backend
    else:
        # Not the module's own .to, which warns of modules kept in fp32 even where there are none.
        nn.Module.to(module, device, dtype)
    return module
