"""The transformer of a UNet: attention with LoRA, feed-forward, and their blocks, by palp_fast.functional.

Tokens are [rows, N, d]; the classes keep diffusers' modules and names.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from palp_fast import functional
from palp_fast.functional.weights import AttentionWeights, Projections
from palp_fast.nn.frozen import keep, kept
from palp_fast.nn.lean_layers import added, pointwise, product, recomputed
from palp_fast.nn.lora import LoRALinear
from palp_fast.quantised import QuantisedWeight, Weight


class LeanAttention(Attention):
    """lora_attention with its residual. q, k and v (of cross-attention k and v) are views of one packed weight.

    recompute: q, k and v are made again in the backward pass. keeps_on_cpu: but not on the CPU.
    """

    backend = "auto"
    recompute = keeps_on_cpu = False
    only = {
        **dict.fromkeys(("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "added_kv_proj_dim"), (None,)),
        **dict.fromkeys(("use_bias", "residual_connection", "is_causal", "pre_only"), (False,)),
        "rescale_output_factor": (1,), "scale_qk": (True,),
    }

    @classmethod
    def obstacle(cls, module: Attention) -> str | None:
        if type(module.processor) not in (AttnProcessor, AttnProcessor2_0):
            return f"its attention processor is {type(module.processor).__name__}"
        if not module.inner_dim == module.inner_kv_dim == module.to_q.weight.shape[0] == module.to_out[0].in_features:
            return f"its keys are {module.inner_kv_dim} wide, its queries {module.inner_dim}"
        return None

    def converted(self) -> None:
        self.packed_names = ("to_k", "to_v") if self.is_cross_attention else ("to_q", "to_k", "to_v")
        weights = [getattr(self, name).weight for name in self.packed_names]
        if isinstance(weights[0], QuantisedWeight):
            keep(self, "packed", QuantisedWeight.cat(weights), persistent=False)
        else:
            self.register_buffer("packed_weight", torch.cat(weights), persistent=False)
        self._share()

    @property
    def packed(self) -> Weight:
        """The weights of `packed_names`, one below the other."""
        found = kept(self, "packed")
        return self._buffers["packed_weight"] if found is None else found

    def _share(self) -> None:
        """The single weights are views of the packed one, again after a move or a copy."""
        packed, count = self.packed, len(self.packed_names)
        rows = packed.shape[0] // count
        for i, name in enumerate(self.packed_names):
            first, end = i * rows, (i + 1) * rows
            part = packed.rows(first, end) if isinstance(packed, QuantisedWeight) else packed[first:end]
            getattr(self, name).hold(part)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._share()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self._share()

    def set_processor(self, processor, *_, **__) -> None:
        if hasattr(self, "packed_names"):
            raise ValueError("a lean UNet has no attention processors; allowed: those of the UNet before lean_unet")
        super().set_processor(processor)

    def forward(self, x: Tensor, residual: Tensor, call) -> Tensor:
        """x [rows, N, d], the normalised input -> [rows, N, d] with residual added."""
        context = kv = kv_index = None
        provider, again = self._plan(x)
        if self.is_cross_attention:
            context, kv_index = call.context, call.rows.kv_index
            if call.prompt_kv is not None:
                made = None if context is None else self.keys_values(context, call.context_scale)
                context, kv = None, call.prompt_kv.joined(self, made)
        if isinstance(self.to_q, LoRALinear) and not _off(scale := call.scale(len(x))):
            return functional.lora_attention(
                x, context, self._weights(), self.heads, lora_scale=scale, kv=kv, kv_index=kv_index,
                residual=residual, recompute=again, provider=provider, backend=self.backend)
        args = x, context, call.context_scale, kv, kv_index, provider
        made = recomputed(self._attended, *args) if again else self._attended(*args)
        return added(pointwise(made, self.to_out[0]), residual)

    def _attended(self, x, context, context_scale, kv, kv_index, provider) -> Tensor:
        """Attention without LoRA on q and out."""
        if self.is_cross_attention:
            q = pointwise(x, self.to_q)
            k, v = self.keys_values(context, context_scale) if kv is None else kv
        else:
            q, k, v = self._frozen(x)
        options = {"kv_index": kv_index, "provider": provider, "backend": self.backend}
        return functional.attention(q, k, v, self.heads, **options)

    def keys_values(self, context: Tensor, lora_scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """k, v [P, M, d] of prompts [P, M, d_c]."""
        context = context.to(self.packed.dtype)
        if isinstance(self.to_k, LoRALinear) and not _off(lora_scale):
            return functional.lora_projections(context, self._packed(), lora_scale, backend=self.backend)
        return self._frozen(context)

    def _frozen(self, x: Tensor) -> tuple[Tensor, ...]:
        made = product(x, self.packed, None, self.backend)
        return made.chunk(len(self.packed_names), dim=-1)

    def _packed(self) -> Projections:
        layers = [getattr(self, name) for name in self.packed_names]
        return Projections(self.packed, tuple(a.lora_a for a in layers), tuple(a.lora_b for a in layers))

    def _weights(self) -> AttentionWeights:
        inputs, q, out = (self._packed(),), self.to_q, self.to_out[0]
        if self.is_cross_attention:
            inputs = (Projections(q.weight, (q.lora_a,), (q.lora_b,)), *inputs)
        return AttentionWeights(inputs, out.weight, out.bias, (out.lora_a, out.lora_b))

    def _plan(self, x: Tensor) -> tuple[str, bool]:
        """(provider, whether to recompute): on the CPU torch's attention is the fast one, and it keeps q, k and v."""
        fast = x.device.type == "cpu" and x.dtype != torch.float64 and self.backend == "auto"
        if not fast or (self.recompute and not self.keeps_on_cpu):
            return "auto", self.recompute
        return "sdpa", False


def _off(lora_scale: float | Tensor) -> bool:
    """Whether LoRA adds nothing: the teacher alone, where no factor wants a gradient."""
    return not torch.is_grad_enabled() and not isinstance(lora_scale, Tensor) and lora_scale == 0


class LeanFeedForward(FeedForward):
    """Linear, GEGLU, linear, residual. recompute: the first product is made again in the backward pass."""

    recompute = False
    only = {}

    @classmethod
    def obstacle(cls, module: FeedForward) -> str | None:
        found = [type(layer) for layer in module.net]
        if found[:2] == [GEGLU, nn.Dropout] and len(found) == 3:
            return None
        return f"it is made of {', '.join(kind.__name__ for kind in found)}"

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        activated = recomputed(self._activated, x) if self.recompute else self._activated(x)
        return added(self.net[2](activated), residual)

    def _activated(self, x: Tensor) -> Tensor:
        first = self.net[0].proj
        return functional.geglu(first(x), backend=first.backend)


class LeanTransformerBlock(BasicTransformerBlock):
    """Self-attention, cross-attention, feed-forward, each after its normalisation and added to its input."""

    only = {"norm_type": ("layer_norm",), "pos_embed": (None,), "only_cross_attention": (False,),
            "_chunk_size": (None,)}

    @classmethod
    def obstacle(cls, module: BasicTransformerBlock) -> str | None:
        if module.attn1.is_cross_attention or (module.attn2 is not None and not module.attn2.is_cross_attention):
            return "its first attention is not to itself, or its second is"
        return None

    def choose_kept(self, memory: str) -> None:
        """What stays of a block for the backward pass, by memory mode ("low" recomputes the block as it is in "fast").

        A query of cross-attention costs as much to keep as any, and 2 % of a forward pass to make again.
        """
        again = memory == "balanced"
        self.attn1.recompute, self.ff.recompute = again, again
        self.norm1.next_keeps_output(isinstance(self.attn1.to_q, LoRALinear) or again)
        self.norm3.next_keeps_output(again)
        if self.attn2 is not None:
            self.attn2.recompute, self.attn2.keeps_on_cpu = True, not again
            self.norm2.next_keeps_output(True)

    def forward(self, x: Tensor, call) -> Tensor:
        if isinstance(self.attn1.to_q, LoRALinear):
            x = call.rows.take(x, max(len(x), call.rows.adapted))
        x = self.attn1(self.norm1(x), x, call)
        if self.attn2 is not None:
            x = call.rows.take(x, call.rows.count)
            x = self.attn2(self.norm2(x), x, call)
        return self.ff(self.norm3(x), x)


class LeanTransformer(Transformer2DModel):
    """tokens = enter(image); blocks; leave(tokens, image): the projections are products over channels."""

    only = {"is_input_continuous": (True,), "is_input_vectorized": (False,), "caption_channels": (None,)}

    def enter(self, x: Tensor) -> Tensor:
        """[rows, C, H, W] -> tokens [rows, H W, d]."""
        tokens = self.norm(x).movedim(1, -1).flatten(1, 2)
        return pointwise(tokens, self.proj_in)

    def leave(self, tokens: Tensor, x: Tensor, call) -> Tensor:
        """Tokens -> [rows, C, H, W], the image x that was entered with added."""
        made = pointwise(tokens, self.proj_out).unflatten(1, tuple(x.shape[-2:])).movedim(-1, 1)
        return added(made, call.rows.take(x, len(made)))
