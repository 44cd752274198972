"""diffusers' own modules in bytes: their passes run on the meta device, every storage counted while it lives."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palp_fast import methods, predict
from palp_fast.conditioning import Condition
from palp_fast.memory.inner import inner
from palp_fast.models import join_precisions

_DEVICE = torch.device("meta")


class StockParts(SimpleNamespace):
    """What predict.StockPredictions and join_precisions read of models.Components."""

    vae = None
    device = _DEVICE

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype


class StockUNet:
    """A UNet of diffusers' own modules with LoRA, on the meta device, as the Trainer of a config runs it.

    unet: as its configuration makes it, in the dtype that it computes in; made into one with LoRA in place.
    """

    def __init__(self, unet: nn.Module, cfg):
        self._counted: dict[tuple, int] = {}
        sdxl = unet.config.addition_embed_type is not None
        self.parts = StockParts(unet=unet, family="sdxl" if sdxl else "sd", vae_scale=8)
        with _DEVICE:
            self.predictions = predict.StockPredictions(self.parts, cfg, None)
        if self.parts.dtype != torch.float32:
            join_precisions(self.parts)
        self.trained = [factor for layer in self.predictions.layers.values() for factor in (layer.lora_a, layer.lora_b)]

    def graph(self, sizes, learned: bool, grown: bool) -> tuple[int, int, int]:
        """(the most in the pass with a graph, what is kept, the most in the backward pass) of a step.

        sizes: step.Sizes; learned: prompts want a gradient; grown: LoRA gradients grow during the backward pass.
        """
        for factor in self.trained:
            factor.grad = None if grown else torch.empty_like(factor)
        prompts = self._prompts(sizes.subjects, sizes.tokens)
        for part in (prompts.hidden, prompts.pooled):
            if part is not None:
                part.requires_grad_(learned)
        x, t, index = self._sample(sizes), self._timesteps(sizes), [i % sizes.subjects for i in range(sizes.batch)]
        with _as_on_a_device(), Alive(self._known(), partial(_inside_lora, sizes.plain)) as alive:
            made = self.predictions.with_graph(x, t, prompts, index)
            forward, saved = alive.peak, alive.alive
            alive.mark()
            made.backward(torch.empty_like(made))
            backward = alive.peak
        for factor in self.trained:
            factor.grad = None
        return forward, saved, backward

    def without_grad(self, sizes, passes: list[methods.Pass]) -> int:
        """The most in no-grad predictions, all of them one pass; counted once."""
        key = sizes, tuple(passes)
        if key not in self._counted:
            self._counted[key] = self._without_grad(sizes, passes)
        return self._counted[key]

    @torch.no_grad()
    def _without_grad(self, sizes, passes: list[methods.Pass]) -> int:
        self.predictions.fix({one.prompt: self._prompts(1, sizes.tokens) for one in passes}, passes)
        subject, index = self._prompts(1, sizes.tokens), [0] * sizes.batch
        x, t = self._sample(sizes), self._timesteps(sizes)
        with _as_on_a_device(), Alive(self._known(), partial(_inside_lora, sizes.plain)) as alive:
            self.predictions.without_graph(x, t, subject, index, passes)
            return alive.peak

    def _known(self) -> Iterable[Tensor]:
        unet = self.parts.unet
        return (*unet.parameters(), *unet.buffers(), *(f.grad for f in self.trained if f.grad is not None))

    def _sample(self, sizes) -> Tensor:
        return torch.empty(sizes.batch, self.parts.unet.config.in_channels, sizes.side, sizes.side, device=_DEVICE)

    def _timesteps(self, sizes) -> Tensor:
        return torch.empty(sizes.batch, dtype=torch.int64, device=_DEVICE)

    def _prompts(self, count: int, tokens: int) -> Condition:
        config, pooled = self.parts.unet.config, None
        if self.parts.family == "sdxl":
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            pooled = torch.empty(count, width, dtype=self.parts.dtype, device=_DEVICE)
        hidden = torch.empty(count, tokens, config.cross_attention_dim, dtype=self.parts.dtype, device=_DEVICE)
        return Condition(hidden, pooled)


class Alive(TorchDispatchMode):
    """Bytes of storages from the operator that makes them until they are freed, but for those of `known` tensors.

    alive: now; peak: the most since `mark`. inside(func, args): bytes that an operator takes for itself while it runs.
    """

    def __init__(self, known: Iterable[Tensor] = (), inside: Callable[..., int] = lambda func, args: 0):
        super().__init__()
        self.alive = self.peak = 0
        self._inside = inside
        self._refs = {tensor.untyped_storage()._cdata: None for tensor in known}

    def mark(self) -> None:
        self.peak = self.alive

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.alive + self._inside(func, args))
        return results

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._refs = {}

    def _add(self, storage) -> None:
        key = storage._cdata
        if key not in self._refs:
            nbytes = storage.nbytes()
            self.alive += nbytes
            self._refs[key] = weakref.ref(storage, lambda _: self._free(key, nbytes))

    def _free(self, key: int, nbytes: int) -> None:
        self._refs.pop(key, None)
        self.alive -= nbytes


def _inside_lora(plain: frozenset[str], func, args) -> int:
    """What LoRA takes for itself."""
    if func.namespace != "palp_fast" or "lora_linear" not in func._schema.name:
        return 0
    is_backward = func._schema.name.endswith("_bwd")
    x, weight = args[1 if is_backward else 0], args[1]
    numbers = x.numel() // x.shape[-1] * weight.shape[0]
    return inner("lora_linear", numbers, x.dtype.itemsize, plain)["back" if is_backward else "scratch"]


@contextlib.contextmanager
def _as_on_a_device() -> Iterator[None]:
    """Within, attention keeps what the kernels of CPUs and cards keep: the meta device has none but the plain one."""
    right, fast = F.scaled_dot_product_attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: fast(q, k, v)[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = right
