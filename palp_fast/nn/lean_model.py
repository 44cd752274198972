"""The blocks of a UNet and the UNet itself, calling the lean layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from palp_fast import autocast, checks
from palp_fast.nn.expand import OwnPrompts, PromptKV, Rows
from palp_fast.nn.lean_attention import LeanAttention
from palp_fast.nn.lean_layers import recomputed


@dataclass(frozen=True)
class Call:
    """What one pass gives to every layer.

    emb: SiLU of the time embedding, [rows at some level, width]; context: the prompts whose keys and values are
    computed, [J, M, d_c] or None; context_scale: their LoRA factor; strength: lora_alpha / rank.
    """

    rows: Rows | OwnPrompts
    emb: Tensor
    context: Tensor | None
    prompt_kv: PromptKV | None
    strength: float

    def scale(self, rows: int) -> float | Tensor:
        """The LoRA factor at the level of so many rows."""
        return self._strong(self.rows.scale(rows))

    @property
    def context_scale(self) -> float | Tensor:
        return self._strong(self.rows.computed_scale)

    def _strong(self, scale: float | Tensor) -> float | Tensor:
        return scale if self.strength == 1 else scale * self.strength


class _Block:
    """What down, middle and up blocks share: residual blocks with or without a transformer behind each.

    gradient_checkpointing (memory mode "low"): residual block and entry of the transformer are recomputed as one, and
    each transformer block by itself.
    """

    only = {}

    def units(self) -> list[tuple]:
        return list(zip_longest(self.resnets, getattr(self, "attentions", ())))

    def run(self, resnet, transformer, x: Tensor, skip: Tensor | None, call: Call) -> Tensor:
        again = recomputed if self.gradient_checkpointing else lambda function, *args: function(*args)
        x, tokens = again(_resnet_and_entry, resnet, transformer, x, skip, call)
        if transformer is None:
            return x
        for block in transformer.transformer_blocks:
            tokens = again(block, tokens, call)
        return transformer.leave(tokens, x, call)


def _resnet_and_entry(resnet, transformer, x, skip, call):
    x = resnet(x, call, skip)
    return x, None if transformer is None else transformer.enter(x)


class _Down(_Block):
    def forward(self, x: Tensor, call: Call) -> tuple[Tensor, list[Tensor]]:
        """(the image to go on with, those that the up blocks read)."""
        outputs = []
        for resnet, transformer in self.units():
            x = self.run(resnet, transformer, x, None, call)
            outputs.append(x)
        for downsampler in self.downsamplers or ():
            x = downsampler(x)
            outputs.append(x)
        return x, outputs


class _Middle(_Block):
    def forward(self, x: Tensor, call: Call) -> Tensor:
        for resnet, transformer in self.units():
            x = self.run(resnet, transformer, x, None, call)
        return x


class _Up(_Block):
    def forward(self, x: Tensor, skips: list[Tensor], call: Call, size) -> Tensor:
        """skips: taken from the end; size: of the result where it is not twice that of x, else None."""
        for resnet, transformer in self.units():
            x = self.run(resnet, transformer, x, skips.pop(), call)
        for upsampler in self.upsamplers or ():
            x = upsampler(x, size)
        return x


class LeanDownBlock(_Down, DownBlock2D):
    pass


class LeanCrossAttnDownBlock(_Down, CrossAttnDownBlock2D):
    pass


class LeanMidBlock(_Middle, UNetMidBlock2D):
    pass


class LeanCrossAttnMidBlock(_Middle, UNetMidBlock2DCrossAttn):
    pass


class LeanUpBlock(_Up, UpBlock2D):
    pass


class LeanCrossAttnUpBlock(_Up, CrossAttnUpBlock2D):
    pass


class LeanUNet(UNet2DConditionModel):
    """A UNet2DConditionModel converted by palp_fast.nn.lean_unet; diffusers' modules, parameters and call.

    strength: lora_alpha / rank; memory: "fast", "balanced" or "low".
    """

    only = {}

    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, *,
        lora_scale: float | Tensor | None = None, rows: Rows | None = None, prompt_kv: PromptKV | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None, return_dict: bool = True, **unknown,
    ) -> UNet2DConditionOutput | tuple:
        """What the UNet predicts at sample [B, C, h, w] and timestep (a number or [B]).

        encoder_hidden_states: [B, M, d_c], or [P, M, d_c] with rows; lora_scale: a float or [B], left out 1.
        rows: several predictions of each sample in one pass -> [k B, C, h, w]; then text_embeds is [P, width] and
        time_ids [B, 6]. prompt_kv: keys and values of the first prompts, for the teacher. Without grad a call that
        names lora_scale or rows returns fp32, whatever the dtype of the UNet: guidance multiplies rounding.
        Raises ValueError for arguments of diffusers' that need another path, and for rows that do not fit.
        """
        self._check(sample, encoder_hidden_states, lora_scale, rows, prompt_kv, unknown)
        wide = not torch.is_grad_enabled() and (lora_scale is not None or rows is not None)
        if rows is None:
            rows = OwnPrompts(len(sample), 1.0 if lora_scale is None else lora_scale)
        if autocast.dtype_on(sample.device.type) is None:
            sample = sample.to(self.conv_in.weight.dtype)
        emb = self._time_embedding(sample, timestep, encoder_hidden_states, added_cond_kwargs, rows)
        call = Call(rows, emb, _computed_prompts(encoder_hidden_states, rows), prompt_kv, self.strength)
        made = self._predict(sample.contiguous(memory_format=torch.channels_last), call, wide)
        return UNet2DConditionOutput(sample=made) if return_dict else (made,)

    def _predict(self, sample: Tensor, call: Call, wide: bool) -> Tensor:
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, call)
            skips += outputs
        if self.mid_block is not None:
            x = self.mid_block(x, call)
        uneven = any(side % 2**self.num_upsamplers for side in sample.shape[-2:])
        for i, block in enumerate(self.up_blocks):
            left = len(skips) - len(block.resnets)
            size = skips[left - 1].shape[-2:] if uneven and i < len(self.up_blocks) - 1 else None
            x = block(x, skips, call, size)
        x = call.rows.take(x, call.rows.count)
        x = self.conv_norm_out(x, silu=True)
        if not wide:
            return self.conv_out(x)
        with autocast.off(x.device.type):
            return self.conv_out(x.float())

    def _time_embedding(self, sample, timestep, prompts, added, rows) -> Tensor:
        """SiLU of the embedding of timesteps and, for SDXL, of pooled prompts and sizes."""
        emb = self.time_embedding(self.get_time_embed(sample, timestep))
        if self.config.addition_embed_type is not None:
            added = dict(added or {})
            if isinstance(rows, Rows) and {"text_embeds", "time_ids"} <= added.keys():
                added["text_embeds"] = added["text_embeds"][rows.row_prompt]
                added["time_ids"] = rows.take(added["time_ids"], rows.count)
            more = self.get_aug_embed(emb=emb, encoder_hidden_states=prompts, added_cond_kwargs=added)
            emb = rows.take(emb, len(more)) + more
        return F.silu(emb)

    def _check(self, sample, prompts, lora_scale, rows, prompt_kv, unknown) -> None:
        for name, value in unknown.items():
            if value is not None and value != {}:
                raise ValueError(f"{name}: a lean UNet does not take it; allowed: None, or the UNet before lean_unet")
        if self.training and self.has_dropout:
            raise ValueError("the UNet has dropout and is in training mode; allowed for a lean UNet: unet.eval()")
        checks.floating("sample", sample)
        if rows is None:
            if prompt_kv is not None:
                raise ValueError("prompt_kv without rows: allowed is Rows(..., fixed=prompt_kv.count)")
            if len(prompts) != len(sample):
                raise ValueError(f"encoder_hidden_states has {len(prompts)} prompts for {len(sample)} samples: "
                                 "allowed are as many, or rows that say which belongs to which")
            return
        if lora_scale is not None:
            raise ValueError("lora_scale beside rows: allowed is the lora_scale of rows")
        if rows.batch != len(sample):
            raise ValueError(f"rows are of {rows.batch} samples, sample has {len(sample)}")
        if rows.most_prompts > len(prompts):
            raise ValueError(f"rows name prompt {rows.most_prompts - 1} of {len(prompts)} in encoder_hidden_states")
        if rows.fixed != (0 if prompt_kv is None else prompt_kv.count):
            raise ValueError(f"rows.fixed is {rows.fixed}: allowed is the count of prompt_kv, without it 0")

    @torch.no_grad()
    def prompt_kv(self, prompts: Tensor) -> PromptKV:
        """Keys and values of prompts [F, M, d_c] without LoRA, in every cross-attention."""
        modules = [m for m in self.modules() if isinstance(m, LeanAttention) and m.is_cross_attention]
        return PromptKV(len(prompts), {module: module.keys_values(prompts, 0.0) for module in modules})

    def set_attn_processor(self, processor, *_, **__) -> None:
        raise ValueError("a lean UNet has no attention processors; allowed: those of the UNet before lean_unet")

    def fuse_qkv_projections(self) -> None:
        raise ValueError("q, k and v of a lean UNet are one product already")

    def enable_freeu(self, *_, **__) -> None:
        raise ValueError("a lean UNet has no FreeU; allowed: the UNet before lean_unet")


def _computed_prompts(prompts: Tensor, rows: Rows | OwnPrompts) -> Tensor | None:
    """Those whose keys and values this pass computes."""
    if isinstance(rows, OwnPrompts):
        return prompts
    if len(rows.computed) == 0:
        return None
    return prompts if rows.computes_all(len(prompts)) else prompts[rows.computed]
