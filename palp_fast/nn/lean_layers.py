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

from palp_fast import autocast, functional
from palp_fast.functional import inexact
from palp_fast.nn.frozen import FrozenWeight, is_quantised, kept
from palp_fast.ops.registry import overload
from palp_fast.quantised import QuantisedWeight, Weight


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

    def forward(self, x: Tensor, channels: slice | None = None) -> Tensor:
        """channels: those of the input that x holds, None: all; the bias belongs to the first ones."""
        weight, bias = self.weight, self.bias
        if channels is not None:
            weight, bias = weight[:, channels], None if channels.start else bias
        if self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1:
            return product(x.movedim(1, -1), _matrix(weight), bias, self.backend).movedim(-1, 1)
        options = self.stride, self.padding, self.dilation, self.groups
        return functional.frozen_conv2d(x, weight, bias, *options, backend=self.backend)


class LeanLinear(FrozenWeight, nn.Linear):
    """frozen_linear."""

    backend = "auto"
    only = {}

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias, self.backend)


class LeanGroupNorm(nn.GroupNorm):
    """group_norm_silu."""

    backend = "auto"
    only = {}

    def forward(self, x: Tensor, silu: bool = False, channels: slice | None = None) -> Tensor:
        """channels: those that x holds, whole groups of them; None: all."""
        weight, bias, groups = self.weight, self.bias, self.num_groups
        if channels is not None:
            weight, bias, groups = weight[channels], bias[channels], groups * x.shape[1] // self.num_channels
        return functional.group_norm_silu(x, groups, weight, bias, self.eps, silu=silu, backend=self.backend)


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
    return product(x, _matrix(layer.weight), layer.bias, layer.backend)


def product(x: Tensor, weight: Weight, bias: Tensor | None, backend: str) -> Tensor:
    """frozen_linear; on the CPU torch's own where it does the same: it costs less to call and keeps no input either."""
    plain = x.device.type == "cpu" and backend == "auto" and not isinstance(weight, QuantisedWeight)
    own = plain and x.dtype == weight.dtype and not inexact.asked(x, weight)
    return F.linear(x, weight, bias) if own else functional.frozen_linear(x, weight, bias, backend=backend)


def _matrix(weight: Weight) -> Weight:
    """[d_out, d_in] of a linear layer or of a 1 x 1 convolution."""
    return weight.matrix() if isinstance(weight, QuantisedWeight) else weight.flatten(1)


class LeanResnet(ResnetBlock2D):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))), rows expanded where their time embeddings differ."""

    only = {"up": (False,), "down": (False,), "time_embedding_norm": ("default",), "skip_time_act": (False,),
            "output_scale_factor": (1,)}

    def forward(self, x: Tensor, call, skip: Tensor | None = None) -> Tensor:
        """skip: more channels behind those of x, perhaps of fewer rows."""
        parts = [x] if skip is None else [x, skip]
        if skip is not None and not self._shares(x, skip):
            parts = [torch.cat([x, call.rows.take(skip, len(x))], dim=1)]
        h = self._of_parts(parts, call, self._convolved)
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(call.emb)[:, :, None, None]
            rows = max(len(h), len(shift))
            h = added(call.rows.take(h, rows), call.rows.take(shift, rows))
        h = self.conv2(self.norm2(h, silu=True))
        x = parts[0] if self.conv_shortcut is None else self._of_parts(parts, call, self.conv_shortcut)
        return added(h, call.rows.take(x, len(h)))

    def _shares(self, x: Tensor, skip: Tensor) -> bool:
        """Whether channels of the skip by themselves save products: of fewer rows, or without a gradient."""
        alone = len(skip) < len(x) or (torch.is_grad_enabled() and x.requires_grad and not skip.requires_grad)
        whole_groups = x.shape[1] * self.norm1.num_groups % (x.shape[1] + skip.shape[1]) == 0
        divisible = not is_quantised(self.conv1)
        return alone and whole_groups and divisible and self.conv_shortcut is not None

    def _of_parts(self, parts: list[Tensor], call, layer) -> Tensor:
        """layer(channels together), linear between its channels, as the sum of those of each part."""
        if len(parts) == 1:
            return layer(parts[0])
        x, skip = parts
        shared = layer(skip, slice(x.shape[1], None))
        return added(layer(x, slice(x.shape[1])), call.rows.take(shared, len(x)))

    def _convolved(self, x: Tensor, channels: slice | None = None) -> Tensor:
        return self.conv1(self.norm1(x, silu=True, channels=channels), channels)


class LeanDownsample(Downsample2D):
    """A convolution of stride 2."""

    only = {"use_conv": (True,), "norm": (None,)}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)


class _Transposed(torch.autograd.Function):
    """apply(x, weight, bias, backend): the transposed convolution of stride 2 and padding 1 by weight [C, d_out, 4, 4].

    Operators of frozen_conv2d, each the other's backward pass; keeps the weight alone.
    """

    OPTIONS = [2, 2], [1, 1], [1, 1], 1

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """[B, C, H, W] -> [B, d_out, 2 H, 2 W]."""
        ctx.save_for_backward(weight)
        ctx.backend = backend
        size = [2 * side for side in x.shape[2:]]
        y = overload("frozen_conv2d_bwd", x.device, backend)(x, weight, size, *_Transposed.OPTIONS)
        return y if bias is None else y.add_(bias.to(y.dtype)[:, None, None])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        op = overload("frozen_conv2d", grad.device, ctx.backend)
        return op(grad, weight, None, *_Transposed.OPTIONS), None, None, None


class LeanUpsampleConv2d(LeanConv2d):
    """A 3 x 3 convolution of a picture doubled by nearest neighbours, with four ninths of its products where it keeps
    `sums`: every pixel meets taps that read the same neighbour, so their weights are summed beforehand.

    A transposed convolution then (Dumoulin and Visin, arXiv 1603.07285, section 4): tap (i, j) of `sums`
    [C, d_out, 4, 4] holds the weights by which a pixel enters that of the result at (i - 1, j - 1) from its own double.
    """

    def keep_sums(self, keep: bool) -> None:
        """Makes `sums`, 16 / 9 of the weight's memory, or drops them."""
        ones = self.stride == self.padding == self.dilation == (1, 1)
        fits = self.kernel_size == (3, 3) and ones and self.groups == 1 and kept(self, "weight") is None
        self.register_buffer("sums", _tap_sums(self.weight) if keep and fits else None, persistent=False)

    def doubled(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, d_out, 2 H, 2 W]."""
        if (sums := self.sums) is None:
            return self(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        run = lambda x: _Transposed.apply(x, sums.to(x.dtype), self.bias, self.backend)  # noqa: E731
        return autocast.product(run, x)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.keep_sums(self.sums is not None)
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.keep_sums(self.sums is not None)


def _tap_sums(weight: Tensor) -> Tensor:
    """[d_out, C, 3, 3] -> [C, d_out, 4, 4] channels-last, rounded once."""
    turned = weight.detach().flip(2, 3).transpose(0, 1).to(torch.promote_types(weight.dtype, torch.float32))
    sums = sum(F.pad(turned, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1))
    return sums.to(weight.dtype).contiguous(memory_format=torch.channels_last)


class LeanUpsample(Upsample2D):
    """Nearest neighbours, then a convolution. size: [height, width] of the result, None: twice that of x."""

    only = {"use_conv": (True,), "use_conv_transpose": (False,), "norm": (None,), "interpolate": (True,),
            "name": ("conv",)}

    def converted(self) -> None:
        self.conv.__class__ = LeanUpsampleConv2d
        self.conv.keep_sums(False)

    def forward(self, x: Tensor, size=None) -> Tensor:
        if size is None:
            return self.conv.doubled(x)
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))
