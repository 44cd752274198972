"""Several predictions of the same samples in one pass: what rows share is computed once, until they differ.

Three levels: samples; samples with their LoRA factor, from the first LoRA layer on; rows, from the first
cross-attention on, where prompts differ (for SDXL from the first residual block on, whose time embedding knows the
prompt).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Rows:
    """Which sample, prompt and LoRA factor each row of a pass has.

    Row r is a prediction for sample r % batch under prompt row_prompt[r], one of those given to the call, with LoRA
    factor lora_scale[r]. Rows are numbers on the host, so that what they share is known without asking the device; all
    tensors are made here, once.

    batch: B; row_prompt: k B ints; lora_scale: a float or k B floats; fixed: prompts 0 .. fixed - 1 are those of the
    call's prompt_kv, which serves them where the factor is 0. Raises ValueError for lengths and numbers out of range.
    """

    def __init__(
        self, batch: int, row_prompt: Sequence[int], lora_scale: float | Sequence[float] = 1.0, *, fixed: int = 0,
        device: str | torch.device = "cpu",
    ):
        prompts, self.device, self.fixed = list(row_prompt), torch.device(device), fixed
        if not prompts or len(prompts) % batch:
            raise ValueError(f"row_prompt has {len(prompts)} rows: allowed is a multiple of batch={batch}")
        if min(prompts) < 0:
            raise ValueError(f"row_prompt has {min(prompts)}: allowed are numbers of prompts, from 0")
        factors = [float(lora_scale)] * len(prompts) if isinstance(lora_scale, (int, float)) else list(lora_scale)
        if len(factors) != len(prompts):
            raise ValueError(f"lora_scale has {len(factors)} factors for {len(prompts)} rows: allowed are as many")
        samples = [r % batch for r in range(len(prompts))]
        halves = list(dict.fromkeys(zip(samples, factors)))
        self.batch, self.adapted, self.count = batch, len(halves), len(prompts)
        self.most_prompts = max(prompts) + 1
        self._scales = {
            self.adapted: self._factor([factor for _, factor in halves]), self.count: self._factor(factors)}
        self._index = {
            (batch, self.adapted): self._numbers([sample for sample, _ in halves]),
            (self.adapted, self.count): self._numbers([halves.index(half) for half in zip(samples, factors)]),
            (batch, self.count): self._numbers(samples)}
        self.row_prompt = self._numbers(prompts)
        self._plan_prompts(prompts, factors)

    def _plan_prompts(self, prompts: list[int], factors: list[float]) -> None:
        """Keys and values: of the fixed prompts first, then of each other prompt with each factor that it has.

        computed: [J] the prompts of the call to compute them for; computed_scale: a float or [J], their factors;
        kv_index: [k B] for every row, None if row r has number r.
        """
        pairs = list(zip(prompts, factors))
        others = [pair for pair in dict.fromkeys(pairs) if not (pair[1] == 0 and pair[0] < self.fixed)]
        number = {pair: self.fixed + j for j, pair in enumerate(others)}
        index = [number.get(pair, pair[0]) for pair in pairs]
        self._computed = [prompt for prompt, _ in others]
        self.computed = self._numbers(self._computed)
        self.computed_scale = self._factor([factor for _, factor in others])
        is_own = index == list(range(self.fixed + len(others)))
        self.kv_index = None if is_own else self._numbers(index)

    def computes_all(self, prompts: int) -> bool:
        """Whether `computed` is every one of so many prompts, in their order."""
        return self._computed == list(range(prompts))

    def _numbers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _factor(self, values: list[float]) -> float | Tensor:
        """A float where all are the same."""
        if len(set(values)) <= 1:
            return values[0] if values else 1.0
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def scale(self, rows: int) -> float | Tensor:
        """The LoRA factor at the level of so many rows: a float, or [rows]."""
        return self._scales[rows]

    def take(self, x: Tensor, rows: int) -> Tensor:
        """x at the level of so many rows, x itself if it is there; images stay channels-last."""
        if x.shape[0] == rows:
            return x
        index = self._index[x.shape[0], rows]
        if x.dim() == 4:
            return x.movedim(1, -1).index_select(0, index).movedim(-1, 1)
        return x.index_select(0, index)


class OwnPrompts:
    """The rows of a plain call: each sample has its own prompt; lora_scale is a float or [B]."""

    kv_index = None
    fixed = 0

    def __init__(self, batch: int, lora_scale: float | Tensor):
        self.batch = self.adapted = self.count = batch
        self.computed_scale = lora_scale

    def scale(self, rows: int) -> float | Tensor:
        return self.computed_scale

    def take(self, x: Tensor, rows: int) -> Tensor:
        return x


class PromptKV:
    """Keys and values of fixed prompts under the teacher (LoRA factor 0), for every cross-attention: made once a run.

    Made by LeanUNet.prompt_kv; values: {module: (k, v)}, [count, M, d] each.
    """

    def __init__(self, count: int, values: dict):
        self.count, self.values = count, values

    def joined(self, module, made: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Those of a module, with others behind them."""
        fixed = self.values[module]
        return fixed if made is None else tuple(torch.cat(pair) for pair in zip(fixed, made))
