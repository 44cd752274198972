"""Frozen layers of a UNet: the same parameters under the same names, computed by palp_fast.functional.

Images are channels-last throughout. A class says in `only` which values of its attributes it computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palp_fast import functional
from palp_fast.nn.frozen import FrozenWeight, kept
from palp_fast.quantised import QuantisedWeight


def recomputed(function, *args):
    """function(*args), computed again in the backward pass; only its arguments are kept. Nothing in it is random."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def added(made: Tensor, more: Tensor) -> Tensor:
    """made + more, where nothing is recorded in the memory of made, which no one else has."""
    return made + more if torch.is_grad_enabled() else made.add_(more)


class LeanConv2d(FrozenWeight, nn.Conv2d):
    """frozen_conv2d; one of 1 x 1 as a product over channels."""

    backend = "auto"
    only = {"padding_mode": ("zeros",)}

    def converted(self) -> None:
        if kept(self, "weight") is None:
            self.hold(self.weight.detach().contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1:
            return pointwise(x.movedim(1, -1), self).movedim(-1, 1)
        options = self.stride, self.padding, self.dilation, self.groups
        return functional.frozen_conv2d(x, self.weight, self.bias, *options, backend=self.backend)


class LeanLinear(FrozenWeight, nn.Linear):
    """frozen_linear."""

    backend = "auto"
    only = {}

    def forward(self, x: Tensor) -> Tensor:
        return functional.frozen_linear(x, self.weight, self.bias, backend=self.backend)


class LeanGroupNorm(nn.GroupNorm):
    """group_norm_silu."""

    backend = "auto"
    only = {}

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        options = {"silu": silu, "backend": self.backend}
        return functional.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, **options)


class LeanLayerNorm(nn.LayerNorm):
    """layer_norm, its backward pass from its output where the next layer keeps that, too."""

    backend = "auto"
    only = {}
    keep = "input"

    def converted(self) -> None:
        self.invertible = self.elementwise_affine and _invertible(self.weight, self.bias)

    def next_keeps_output(self, keeps: bool) -> None:
        self.keep = "output" if keeps and self.invertible else "input"

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight, self.bias, self.eps, keep=self.keep, backend=self.backend)


def _invertible(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the normalised input can be had back from the output with at most four times its rounding."""
    if weight.is_meta or torch._subclasses.fake_tensor.is_fake(weight):
        return True
    if bool((weight == 0).any()):
        return False
    ratio = torch.zeros(()) if bias is None else (bias.float() / weight.float()).square().mean().sqrt()
    return bool(ratio <= 4)


def pointwise(x: Tensor, layer: nn.Module) -> Tensor:
    """A 1 x 1 convolution or a linear layer on x [..., channels]."""
    weight = layer.weight
    weight = weight.matrix() if isinstance(weight, QuantisedWeight) else weight.flatten(1)
    return functional.frozen_linear(x, weight, layer.bias, backend=layer.backend)


class LeanResnet(ResnetBlock2D):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))), rows expanded where their time embeddings differ."""

    only = {"up": (False,), "down": (False,), "time_embedding_norm": ("default",), "skip_time_act": (False,),
            "output_scale_factor": (1,)}

    def forward(self, x: Tensor, call) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(call.emb)[:, :, None, None]
            rows = max(len(h), len(shift))
            h = added(call.rows.take(h, rows), call.rows.take(shift, rows))
        h = self.conv2(self.norm2(h, silu=True))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return added(h, call.rows.take(x, len(h)))


class LeanDownsample(Downsample2D):
    """A convolution of stride 2."""

    only = {"use_conv": (True,), "norm": (None,)}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)


class LeanUpsample(Upsample2D):
    """Nearest neighbours, then a convolution. size: [height, width] of the result, None: twice that of x."""

    only = {"use_conv": (True,), "use_conv_transpose": (False,), "norm": (None,), "interpolate": (True,),
            "name": ("conv",)}

    def forward(self, x: Tensor, size=None) -> Tensor:
        height, width = (2 * side for side in x.shape[-2:]) if size is None else size
        return self.conv(F.interpolate(x, size=(height, width), mode="nearest"))
