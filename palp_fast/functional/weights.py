"""The weights of an attention layer as its operators read them: packed by input, LoRA factors beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palp_fast import checks
from palp_fast.quantised import QuantisedWeight, Weight

Pair = tuple[Tensor, Tensor]  # LoRA factors A [r, d_in] and B [d_out, r]


@dataclass(frozen=True, eq=False)
class Projections:
    """One to three frozen projections of one input, and their LoRA factors.

    packed: [W_1; W_2; W_3] of [d_out, d_in] each, quantised or not; below weights that are not, if there are shadows,
    [A_1; A_2; A_3] of [r, d_in] each in the same dtype. lora_a, lora_b: the factors themselves, usually fp32
    parameters. Who changes lora_a writes the shadows, too: an optimizer that is given them as its `shadows`, or
    refresh(). tail: the shadows beside quantised weights.
    """

    packed: Weight
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    tail: Tensor | None = None

    @staticmethod
    def pack(weights: Sequence[Weight], pairs: Sequence[Pair], *, shadows: bool = False) -> Projections:
        """Copies `weights` into one buffer, with room for shadows if wanted; the factors are kept as they are.

        Shadows have the dtype of the weights, beside quantised ones that from which these were made. Raises TypeError
        or ValueError unless there are one to three matrices of one shape and kind, each with a pair that fits, all of
        one rank.
        """
        if not 1 <= len(weights) <= 3 or len(pairs) != len(weights):
            raise ValueError(f"{len(weights)} weights with {len(pairs)} pairs: allowed are one to three, with as many")
        for i, (weight, (lora_a, lora_b)) in enumerate(zip(weights, pairs)):
            checks.frozen_like(f"weights[{i}]", weight, weights[0])
            checks.lora(weight, weight, None, lora_a, lora_b)
            checks.table(f"pairs[{i}][0]", lora_a, pairs[0][0].shape, pairs[0][0])
            for side, factor, first in zip("01", (lora_a, lora_b), pairs[0]):
                if factor.dtype != first.dtype:
                    raise TypeError(f"pairs[{i}][{side}] has dtype {factor.dtype}: allowed is {first.dtype}")
        tail = [lora_a.detach().to(weights[0].dtype) for lora_a, _ in pairs] if shadows else []
        lora_a, lora_b = zip(*pairs)
        if isinstance(weights[0], QuantisedWeight):
            return Projections(QuantisedWeight.cat(weights), lora_a, lora_b, torch.cat(tail) if tail else None)
        return Projections(torch.cat([*(weight.detach() for weight in weights), *tail]), lora_a, lora_b)

    @property
    def count(self) -> int:
        """Number of projections."""
        return len(self.lora_a)

    @property
    def weight(self) -> Weight:
        """[count d_out, d_in], a view."""
        return self.packed if isinstance(self.packed, QuantisedWeight) else self.packed[: self._rows]

    @property
    def parts(self) -> list[Weight]:
        """The weight of each projection, views."""
        if not isinstance(self.packed, QuantisedWeight):
            return list(self.weight.chunk(self.count))
        rows = self.lora_b[0].shape[0]
        return [self.packed.rows(i * rows, (i + 1) * rows) for i in range(self.count)]

    @property
    def shadow(self) -> Tensor | None:
        """[count r, d_in], a view, or None."""
        if isinstance(self.packed, QuantisedWeight):
            return self.tail
        tail = self.packed[self._rows:]
        return tail if len(tail) else None

    @property
    def _rows(self) -> int:
        return self.count * self.lora_b[0].shape[0]

    def shadows(self) -> dict[Tensor, Tensor]:
        """{lora_a: its shadow}, as optimizers take them."""
        return {} if self.shadow is None else dict(zip(self.lora_a, self.shadow.chunk(self.count)))

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes the shadows."""
        for lora_a, shadow in self.shadows().items():
            shadow.copy_(lora_a)

    def factors(self) -> list[Tensor | None]:
        """a_1, b_1, a_2, b_2, a_3, b_3, None beyond the last."""
        there = [factor for pair in zip(self.lora_a, self.lora_b) for factor in pair]
        return [*there, *[None] * (6 - len(there))]


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Frozen weights and LoRA factors of an attention layer, as `lora_attention` takes them.

    inputs: (q, k and v together,) for self-attention, (q, k and v together) for cross-attention, whose k and v have
    another input; (q,) for ready-made keys and values. out: the out projection [d, d]; out_bias: [d] or None;
    out_lora: its factors.
    """

    inputs: tuple[Projections, ...]
    out: Weight
    out_bias: Tensor | None
    out_lora: Pair

    @staticmethod
    def pack(
        weights: dict[str, Weight],
        lora: dict[str, Pair],
        out_bias: Tensor | None = None,
        *,
        cross: bool = False,
        shadows: bool = False,
    ) -> AttentionWeights:
        """From separate matrices named "q", "k", "v" and "out"; the first three are copied, as Projections.pack says.

        cross: k and v have another input than q. Without "k" and "v" the layer takes ready-made keys and values.
        """
        names = [("q",), ("k", "v")] if cross else [("q", "k", "v")]
        if "k" not in weights and "v" not in weights:
            names = [("q",)]
        groups = [([weights[name] for name in group], [lora[name] for name in group]) for group in names]
        inputs = tuple(Projections.pack(*group, shadows=shadows) for group in groups)
        checks.lora(weights["out"], weights["out"], out_bias, *lora["out"])
        return AttentionWeights(inputs, weights["out"], out_bias, lora["out"])

    def shadows(self) -> dict[Tensor, Tensor]:
        """{lora_a: its shadow}, as optimizers take them."""
        return {a: shadow for projections in self.inputs for a, shadow in projections.shadows().items()}
