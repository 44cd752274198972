"""How a layer keeps a frozen weight: a Parameter, or codes and scale of a quantised one as buffers."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from palp_fast.functional.quantise import quantise
from palp_fast.quantised import QuantisedWeight, Weight


def keep(module: nn.Module, name: str, weight: QuantisedWeight, persistent: bool = True) -> None:
    """Registers codes and scale as buffers of a module, name_codes and name_scale; `kept` makes the object again."""
    for part in ("codes", "scale"):
        module.register_buffer(f"{name}_{part}", getattr(weight, part), persistent)
    module.__dict__[f"{name}_form"] = weight.shape, weight.dtype, weight.channels_last


def kept(module: nn.Module, name: str) -> QuantisedWeight | None:
    """What `keep` took, None if it was not called."""
    form = module.__dict__.get(f"{name}_form")
    if form is None:
        return None
    return QuantisedWeight(module._buffers[f"{name}_codes"], module._buffers[f"{name}_scale"], *form)


class FrozenWeight:
    """Mixin of linear layers and convolutions: `weight` is a Parameter or a QuantisedWeight."""

    @property
    def weight(self) -> Weight:
        found = kept(self, "weight")
        return self._parameters["weight"] if found is None else found

    def hold(self, weight: Weight) -> None:
        """Takes the weight in place of its own."""
        if isinstance(weight, QuantisedWeight):
            self._parameters.pop("weight", None)
            keep(self, "weight", weight)
        else:
            own = isinstance(weight, nn.Parameter)
            self._parameters["weight"] = weight if own else nn.Parameter(weight, requires_grad=False)


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer of this module has a quantised weight; reads no weights."""
    return any(isinstance(m, FrozenWeight) and "weight_form" in m.__dict__ for m in module.modules())


@torch.no_grad()
def quantise_layers(
    module: nn.Module, form: str, classes: dict[type, type], *, dtype: torch.dtype | None = None,
    device: str | torch.device | None = None, skip: Collection[str] = (),
    fill: Callable[[nn.Module, str], None] | None = None,
) -> None:
    """Moves a module to a dtype and a device, layer by layer, and quantises the weights of those in `classes`.

    form: "int8" or "nf4"; classes: {class of a layer: the one with FrozenWeight that it becomes}; skip: paths of layers
    that are moved alone. fill(layer, path) gives a layer of a module without values its parameters, before it is moved.
    So at most one layer at a time exists in full on the device. Raises ValueError for weights that are not finite.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    for path, layer in list(module.named_modules()):
        if fill is not None:
            fill(layer, path)
        if dtype is not None or device is not None:
            layer._apply(move, recurse=False)
        if type(layer) in classes and path not in skip:
            weight = layer.weight.detach()
            if weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            layer.__class__ = classes[type(layer)]
            layer.hold(quantise(weight, form, name=f"{path}.weight"))
