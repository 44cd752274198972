"""LoRA on the attention projections of a stock diffusers UNet2DConditionModel, with a strength per sample.

W x + lora_scale (lora_alpha / rank) B A x (Hu et al., arXiv 2106.09685). One forward pass may hold teacher samples
(lora_scale 0) beside student samples (lora_scale 1): the no-grad predictions of a PALP step are one batch.
"""

import contextlib
import math

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from palp_fast import functional
from palp_fast.nn.frozen import FrozenWeight

_PROJECTIONS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "cross_kv": ("to_k", "to_v"),
    "none": (),
}


class LoRAScale:
    """The strength of every LoRA layer of one UNet during the current forward pass: a float or a tensor [B]."""

    def __init__(self):
        self.value = 1.0


class LoRALinear(FrozenWeight, nn.Linear):
    """A frozen nn.Linear with a trainable low-rank term in fp32.

    forward: x [..., d_in] -> [..., d_out] = x W^T + bias + lora_scale (lora_alpha / rank) (x A^T) B^T.
    The weight, quantised or not, and bias are those of `base`, not copies, under the same names. lora_a [rank, d_in]
    starts as peft's (uniform within 1 / sqrt(d_in), from `generator`), lora_b [d_out, rank] as zero.
    """

    def __init__(self, base, rank, lora_alpha=None, *, scale=None, generator=None, backend="auto"):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bias = base.bias
        self.hold(base.weight)
        self.rank, self.lora_alpha = rank, float(rank if lora_alpha is None else lora_alpha)
        self.scale = LoRAScale() if scale is None else scale
        self.backend = backend
        bound = 1 / math.sqrt(self.in_features)
        lora_a = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(lora_a.to(base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=base.weight.device))

    def forward(self, x):
        lora_scale = self.scale.value * (self.lora_alpha / self.rank)
        return functional.lora_linear(
            x, self.weight, self.bias, self.lora_a, self.lora_b, lora_scale, backend=self.backend
        )


def inject_lora(unet, targets, rank, lora_alpha, generator, backend="auto"):
    """Replaces attention projections of `unet` in place -> {module path inside the UNet: LoRALinear}.

    targets, generator: as of `adapt`. Afterwards unet(..., lora_scale=s) takes a float or a tensor [B], one strength
    per sample; left out, it is 1.
    """
    scale = LoRAScale()
    layers = adapt(unet, targets, rank, lora_alpha, generator, backend, scale)
    _accept_lora_scale(unet, scale)
    return layers


def adapt(unet, targets, rank, lora_alpha, generator=None, backend="auto", scale=None):
    """Replaces attention projections by LoRALinear in place -> {module path inside the UNet: LoRALinear}.

    targets: "attention" (q, k, v, out of self- and cross-attention), "cross_kv" (cross-attention k and v) or "none".
    generator: a CPU torch.Generator, so that the same seed gives the same A on every device.
    """
    layers = {}
    attentions = [(path, module) for path, module in unet.named_modules() if isinstance(module, Attention)]
    for path, attention in attentions:
        if targets == "cross_kv" and not attention.is_cross_attention:
            continue
        for name in _PROJECTIONS[targets]:
            base = attention.get_submodule(name)
            layer = LoRALinear(base, rank, lora_alpha, scale=scale, generator=generator, backend=backend)
            attention.set_submodule(name, layer)
            layers[f"{path}.{name}"] = layer
    return layers


def attach_lora(unet, layers, lora_alpha, *, strength=1.0):
    """Puts trained factors into `unet` in place: layers {module path: (lora_a [r, d_in], lora_b [d_out, r])}.

    strength multiplies lora_alpha. Raises ValueError for a path that the UNet lacks or that has LoRA already.
    """
    for path, (lora_a, lora_b) in layers.items():
        try:
            base = unet.get_submodule(path)
        except AttributeError:
            raise ValueError(f"the UNet has no module {path!r}; the LoRA was made for another model") from None
        if type(base) is not nn.Linear:
            raise ValueError(f"{path!r} is a {type(base).__name__}, not a plain linear layer")
        layer = LoRALinear(base, len(lora_a), lora_alpha * strength)
        with torch.no_grad():
            layer.lora_a.copy_(lora_a)
            layer.lora_b.copy_(lora_b)
        unet.set_submodule(path, layer.requires_grad_(False))


def _accept_lora_scale(unet, scale):
    """Takes `lora_scale=` off every call of `unet`; a call that fails leaves the default behind, too."""

    def take(module, args, kwargs):
        scale.value = kwargs.pop("lora_scale", 1.0)
        return args, kwargs

    def restore(module, args, kwargs, output):
        scale.value = 1.0

    unet.register_forward_pre_hook(take, with_kwargs=True)
    unet.register_forward_hook(restore, with_kwargs=True, always_call=True)
    unet.palp_lora_scale = scale


def enable_gradient_checkpointing(unet):
    """diffusers' gradient checkpointing; the recomputation sees the lora_scale of the pass that it repeats."""
    scale = unet.palp_lora_scale

    @contextlib.contextmanager
    def at(value):
        current, scale.value = scale.value, value
        try:
            yield
        finally:
            scale.value = current

    def run(module, *args):
        now = scale.value
        return checkpoint(module.__call__, *args, use_reentrant=False,
                          context_fn=lambda: (contextlib.nullcontext(), at(now)))

    unet.enable_gradient_checkpointing(run)
