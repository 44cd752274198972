"""The lean UNet's forward pass in bytes: follows palp_fast/nn/lean_model.py, lean_attention.py and lean_layers.py."""

from __future__ import annotations

from itertools import zip_longest

from torch import nn

from palp_fast import offload
from palp_fast.memory.inner import inner
from palp_fast.memory.tape import Tape, Value
from palp_fast.nn.lora import LoRALinear
from palp_fast.quantised import QuantisedWeight

_FP32 = 4


class Pass:
    """One call of a lean UNet (on the meta device) for `batch` samples at side x side latents.

    adapted: samples with their LoRA factors, count: rows (nn.expand); computed: prompts whose keys and values this call
    makes; lora: whether any row has LoRA; fixed: prompts with ready-made ones; prompt_grad: prompts want a gradient;
    waits: each weight is on the device while it is read (offload).
    """

    def __init__(
        self, tape: Tape, unet: nn.Module, batch: int, side: int, tokens: int, *, adapted: int, count: int,
        computed: int, fixed: int = 0, lora: bool = True, prompt_grad: bool = False, waits: bool = False,
    ):
        self.tape, self.unet, self.batch, self.side, self.tokens = tape, unet, batch, side, tokens
        self.adapted, self.count, self.computed, self.fixed, self.lora = adapted, count, computed, fixed, lora
        self.waits = waits
        width = unet.config.cross_attention_dim
        made = tape.leaf if prompt_grad else tape.make
        self.context = made(computed, tokens, width) if computed else None
        # SDXL's embedding knows the prompt.
        per_prompt = unet.config.addition_embed_type is not None
        emb = unet.time_embedding.linear_2.out_features
        self.emb = (made if per_prompt else tape.make)(count if per_prompt else batch, 1, emb)

    def run(self) -> Value:
        """The prediction."""
        unet, tape = self.unet, self.tape
        sample = tape.make(self.batch, self.side**2, unet.config.in_channels)
        x = self.conv(sample, unet.conv_in)
        skips = [x]
        for block in unet.down_blocks:
            x = self.down(x, block, skips)
        if unet.mid_block is not None:
            for resnet, transformer in _units(unet.mid_block):
                x = self.unit(x, None, resnet, transformer, unet.mid_block)
        for block in unet.up_blocks:
            x = self.up(x, block, skips)
        x = self.take(x, self.count)
        x = self.norm(x, unet.conv_norm_out)
        if tape.grad:
            return self.conv(x, unet.conv_out)
        wide = tape.make(x.rows, x.pixels, x.channels * max(1, _FP32 // tape.itemsize))
        made = self.conv(wide, unet.conv_out)
        return tape.make(made.rows, made.pixels, made.channels * max(1, _FP32 // tape.itemsize))

    def down(self, x: Value, block, skips: list[Value]) -> Value:
        for resnet, transformer in _units(block):
            x = self.unit(x, None, resnet, transformer, block)
            skips.append(x)
        for downsampler in block.downsamplers or ():
            x = self.conv(x, downsampler.conv, pixels=x.pixels // 4)
            skips.append(x)
        return x

    def up(self, x: Value, block, skips: list[Value]) -> Value:
        for resnet, transformer in _units(block):
            x = self.unit(x, skips.pop(), resnet, transformer, block)
        for upsampler in block.upsamplers or ():
            x = self.conv(self.tape.apply([x], (x.rows, 4 * x.pixels, x.channels)), upsampler.conv)
        return x

    def unit(self, x: Value, skip: Value | None, resnet, transformer, block) -> Value:
        again = self.tape.recomputed if block.gradient_checkpointing else lambda function, *values: function(*values)

        def entry(x: Value, skip: Value | None, *_) -> tuple[Value, ...]:
            x = self.resnet(x, skip, resnet)
            return (x,) if transformer is None else (x, self.enter(x, transformer))

        x, *tokens = again(entry, x, skip)
        if transformer is None:
            return x
        (tokens,) = tokens
        for inner in transformer.transformer_blocks:
            (tokens,) = again(lambda value, inner=inner: (self.block(value, inner),), tokens)
        made = self.linear(tokens, transformer.proj_out)
        return self.tape.added(made, self.take(x, made.rows))

    def resnet(self, x: Value, skip: Value | None, module) -> Value:
        parts = [x] if skip is None else [x, skip]
        if skip is not None and not self._shares(x, skip, module):
            parts = [self.tape.cat([x, self.take(skip, x.rows)])]
        h = self._of_parts(parts, lambda part: self.conv(self.norm(part, module.norm1), module.conv1))
        if module.time_emb_proj is not None:
            shift = self.linear(self.emb, module.time_emb_proj)
            rows = max(h.rows, shift.rows)
            h = self.tape.added(self.take(h, rows), self.take(shift, rows))
        h = self.conv(self.norm(h, module.norm2), module.conv2)
        shortcut = module.conv_shortcut
        x = parts[0] if shortcut is None else self._of_parts(parts, lambda part: self.linear(part, shortcut))
        return self.tape.added(h, self.take(x, h.rows))

    def _shares(self, x: Value, skip: Value, module) -> bool:
        alone = skip.rows < x.rows or (self.tape.grad and x.node and not skip.node)
        whole_groups = x.channels * module.norm1.num_groups % (x.channels + skip.channels) == 0
        divisible = not isinstance(module.conv1.weight, QuantisedWeight)
        return bool(alone and whole_groups and divisible and module.conv_shortcut is not None)

    def _of_parts(self, parts: list[Value], layer) -> Value:
        if len(parts) == 1:
            return layer(parts[0])
        x, skip = parts
        shared = layer(skip)
        return self.tape.added(layer(x), self.take(shared, x.rows))

    def enter(self, x: Value, transformer) -> Value:
        return self.linear(self.norm(x, transformer.norm), transformer.proj_in)

    def block(self, x: Value, block) -> Value:
        if isinstance(block.attn1.to_q, LoRALinear):
            x = self.take(x, max(x.rows, self.adapted))
        x = self.attention(self.layer_norm(x, block.norm1), x, block.attn1)
        if block.attn2 is not None:
            x = self.take(x, self.count)
            x = self.attention(self.layer_norm(x, block.norm2), x, block.attn2)
        return self.feed_forward(self.layer_norm(x, block.norm3), x, block.ff)

    def attention(self, x: Value, residual: Value, module) -> Value:
        lora = isinstance(module.to_q, LoRALinear) and (self.lora or self.tape.grad)
        if module.recompute and self.tape.grad:
            made = self._recomputed(x, module)
        else:
            made = self._attended(x, module)
        out = module.to_out[0]
        if not lora:
            return self.tape.added(self.linear(made, out), residual)
        sizes = made.rows, made.pixels, out.out_features
        return self.tape.apply([made], sizes, keep_inputs=[made], residual=residual, trained=_factors(out),
                               **self.inside("lora_linear", sizes, self.dense(out)))

    def _attended(self, x: Value, module) -> Value:
        width, cross = module.to_q.out_features, module.is_cross_attention
        kv = self.keys_values(module) if cross else None
        first = [module.to_q] if cross else [module.to_q, module.to_k, module.to_v]
        made = self.projected(x, first)
        inputs = [made] if kv is None else [made, kv]
        lse = x.rows * module.heads * x.pixels * _FP32
        inside = self.scores(x, module) if module.recompute else {}  # else torch's attention serves, on a CPU too
        return self.tape.apply(inputs, (x.rows, x.pixels, width), keep_inputs=inputs, keep_out=True, keep=lse, **inside)

    def scores(self, x: Value, module, dense: int = 0) -> dict[str, int]:
        """What softmax attention takes for itself."""
        keys = self.tokens if module.is_cross_attention else x.pixels
        return self.inside("attention", (x.rows * module.heads, x.pixels, keys), dense)

    def keys_values(self, module) -> Value:
        made = self.projected(self.context, [module.to_k, module.to_v]) if self.context is not None else None
        if not self.fixed:
            return made
        rows = self.fixed + (0 if made is None else made.rows)
        return self.tape.make(rows, self.tokens, 2 * module.to_k.out_features)

    def projected(self, x: Value, layers: list) -> Value:
        """Projections of one input, side by side; x is kept where they have LoRA."""
        trained = sum(map(_factors, layers))
        one = x.rows, x.pixels, layers[0].out_features
        out = *one[:2], sum(layer.out_features for layer in layers)
        return self.tape.apply([x], out, keep_inputs=[x] if trained else [], trained=trained,
                               **self.inside("lora_projections", one, sum(map(self.dense, layers))))

    def _recomputed(self, x: Value, module) -> Value:
        """q, k and v of both passes beside their gradients in the backward pass."""
        width, cross = module.to_q.out_features, module.is_cross_attention
        layers = [module.to_q, module.to_k, module.to_v]
        own, item = (1 if cross else 3), self.tape.itemsize
        made = own * x.rows * x.pixels * width * item
        if cross:
            made += 2 * self.computed * self.tokens * width * item
        inputs = [x, self.context] if cross else [x]
        inside = self.scores(x, module, max(map(self.dense, layers)) * (1 if cross else 3))
        inside = {"scratch": inside["scratch"] + made, "back": inside["back"] + 2 * made}
        lse = x.rows * module.heads * x.pixels * _FP32
        return self.tape.apply(
            inputs, (x.rows, x.pixels, width), keep_inputs=inputs, keep_out=True, keep=lse,
            trained=sum(map(_factors, layers)), **inside)

    def feed_forward(self, x: Value, residual: Value, module) -> Value:
        first, last = module.net[0].proj, module.net[2]

        def activated(x: Value) -> tuple[Value]:
            wide = self.linear(x, first)
            sizes = x.rows, x.pixels, wide.channels // 2
            return (self.tape.apply([wide], sizes, keep_inputs=[wide], **self.inside("geglu", sizes)),)

        (made,) = self.tape.recomputed(activated, x) if module.recompute else activated(x)
        return self.tape.added(self.linear(made, last), residual)

    def norm(self, x: Value, module) -> Value:
        """GroupNorm with SiLU."""
        stats = 2 * x.rows * (module.num_groups * x.channels // module.num_channels) * _FP32
        sizes = x.rows, x.pixels, x.channels
        return self.tape.apply([x], sizes, keep_inputs=[x], keep=stats, **self.inside("group_norm", sizes))

    def layer_norm(self, x: Value, module) -> Value:
        out = module.keep == "output"
        stats = (1 if out else 2) * x.rows * x.pixels * _FP32
        sizes = x.rows, x.pixels, x.channels
        return self.tape.apply([x], sizes, keep_inputs=[] if out else [x], keep_out=out, keep=stats,
                               **self.inside("layer_norm", sizes))

    def linear(self, x: Value, layer) -> Value:
        """A frozen product over channels."""
        scratch, channels = self.dense(layer), getattr(layer, "out_features", None) or layer.out_channels
        return self.tape.apply([x], (x.rows, x.pixels, channels), scratch=scratch, back=scratch)

    def conv(self, x: Value, layer, pixels: int | None = None) -> Value:
        scratch = self.dense(layer)
        return self.tape.apply([x], (x.rows, pixels or x.pixels, layer.out_channels), scratch=scratch, back=scratch)

    def inside(self, kind: str, sizes: tuple[int, int, int], dense: int = 0) -> dict[str, int]:
        """What an operator takes for itself, with a dequantised weight of `dense` bytes."""
        found = inner(kind, sizes[0] * sizes[1] * sizes[2], self.tape.itemsize, self.tape.plain)
        return {name: size + dense for name, size in found.items()}

    def dense(self, layer) -> int:
        """Bytes of a quantised weight while it is dequantised, and of one that waits elsewhere while it is read."""
        weight = layer.weight
        made = weight.shape[0] * weight.width * self.tape.itemsize if isinstance(weight, QuantisedWeight) else 0
        if self.waits:
            read = getattr(layer, "sums", None)
            parts = [read] if read is not None else [layer.bias, *_tensors(weight)]
            made += sum(part.nbytes for part in parts if part is not None and offload.waits(part))
        return made

    def take(self, x: Value, rows: int) -> Value:
        return x if x.rows == rows else self.tape.make(rows, x.pixels, x.channels)


def _units(block):
    return zip_longest(block.resnets, getattr(block, "attentions", ()))


def _tensors(weight) -> list:
    return [weight.codes, weight.scale] if isinstance(weight, QuantisedWeight) else [weight]


def _factors(layer) -> int:
    """Bytes of LoRA factors of a layer."""
    return layer.lora_a.nbytes + layer.lora_b.nbytes if isinstance(layer, LoRALinear) else 0
