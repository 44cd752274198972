"""AdamW and Lion with 8-bit state, updated flat: a few large tensor operations whatever the number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor

from palp_fast.reference.flat_state import FlatState
from palp_fast.reference.optimizers import adamw_ref, lion_ref

__all__ = ["AdamW8bit", "Lion8bit"]


class _Flat8bit(torch.optim.Optimizer):
    """What both optimizers share: flat state, norm over all groups, steps that a bad gradient leaves undone.

    `grad_norm` (before clipping) and `skipped_steps` are 0-d tensors on the device of the first group's state, None
    and 0 before the first step.
    """

    MOMENTS: dict[str, bool] = {}
    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf instead of unscaling

    def __init__(self, params: Iterable, defaults: dict, max_grad_norm: float | None) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: allowed is a number > 0, or None")
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self.skipped_steps: Tensor | int = 0
        self._flat: dict[int, list[FlatState]] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """As torch.optim; the group's hyperparameters are checked."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update from the gradients; parameters without one keep value and state. Returns the closure's loss.

        Gradients are scaled by min(1, max_grad_norm / (norm + 1e-6)), as clip_grad_norm_ over all groups. If any
        gradient is not finite, nothing changes and `skipped_steps` grows by one; no value leaves the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for index, group in enumerate(self.param_groups):
            for flat in self._group_state(index, group):
                grads = [param.grad for param in flat.params]
                if any(grad is not None for grad in grads):
                    _check_grads(grads)
                    work.append((group, flat, grads, flat.gather(grads)))
        if work:
            finite, factor = self._norm([rows for *_, rows in work])
            for group, flat, grads, rows in work:
                self._update(group, flat, grads, rows.mul_(factor.to(flat.device)), finite.to(flat.device))
        return loss

    def _norm(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(all gradients finite, factor for each), both 0-d; sets grad_norm and counts a skipped step."""
        home = rows[0].device
        # fp64: the square of a large but finite fp32 gradient must not overflow.
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64).to(home) for part in rows]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        finite = norm.isfinite()
        factor = torch.ones_like(norm)
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if grad_scale is not None:
            factor = factor / grad_scale.to(home)
            norm = norm * factor
        if found_inf is not None:
            finite = finite & (found_inf.to(home) == 0).reshape(())
        if self.max_grad_norm is not None:
            factor = factor * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.grad_norm = norm.to(torch.float32)
        self.skipped_steps = self.skipped_steps + (~finite).to(torch.int64)
        return finite, factor.to(torch.float32)

    def _update(self, group: dict, flat: FlatState, grads: list, rows: Tensor, finite: Tensor) -> None:
        """The rule on one flat state; rows of parameters without gradient, or all if not finite, are kept."""
        active = finite.expand(len(grads))
        if any(grad is None for grad in grads):
            active = finite & torch.tensor([grad is not None for grad in grads]).to(flat.device)
        keep = ~active[flat.owner][:, None]
        steps = flat.steps + 1
        param = flat.gather(flat.params)
        moments = tuple(moment.read() for moment in flat.moments)
        new_param, new_moments = self._rule(param, rows, moments, steps.double()[flat.owner][:, None], group)
        for moment, value in zip(flat.moments, new_moments):
            moment.write(value, keep)
        flat.scatter(torch.where(keep, param, new_param))
        torch.where(active, steps, flat.steps, out=flat.steps)

    def _rule(self, param: Tensor, grad: Tensor, moments: tuple, step: Tensor, group: dict) -> tuple[Tensor, tuple]:
        raise NotImplementedError

    def _group_state(self, index: int, group: dict) -> list[FlatState]:
        """The flat states of a group: 8-bit tensors and, if the caller set min_8bit_size, 32-bit ones."""
        states = self._flat.get(index)
        moved = states is not None and any(param.device != flat.device for flat in states for param in flat.params)
        if states is None or moved:
            params = [param for param in group["params"] if param.numel() > 0]
            large = [param for param in params if param.numel() >= group["min_8bit_size"]]
            small = [param for param in params if param.numel() < group["min_8bit_size"]]
            parts = ((large, True), (small, False))
            states = [self._new_state(part, group, quantised) for part, quantised in parts if part]
            self._flat[index] = states
        return states

    def _new_state(self, params: list[Tensor], group: dict, quantised: bool) -> FlatState:
        for param in params:
            if param.device != params[0].device:
                raise ValueError(f"a param group lies on {params[0].device} and {param.device}: allowed is one device")
        flat = FlatState(params, group["block_size"], self.MOMENTS, quantised)
        for index, param in enumerate(params):
            if self.state.get(param):
                flat.adopt(index, self.state[param])
            self.state[param] = flat.states[index]
        return flat

    def state_dict(self) -> dict:
        """As torch.optim, plus "skipped_steps": per parameter plain tensors that load on any device."""
        return {**super().state_dict(), "skipped_steps": int(self.skipped_steps)}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch.optim; codes and scales are taken as they are. Raises ValueError for another layout."""
        groups = state_dict["param_groups"]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.skipped_steps = state_dict.get("skipped_steps", 0)
        self._flat.clear()
        self.state.clear()
        saved = chain.from_iterable(group["params"] for group in groups)
        for key, param in zip(saved, chain.from_iterable(group["params"] for group in self.param_groups)):
            if key in state_dict["state"]:
                self.state[param] = dict(state_dict["state"][key])
        for index, group in enumerate(self.param_groups):
            self._group_state(index, group)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for name, value in (("_flat", {}), ("max_grad_norm", None), ("grad_norm", None), ("skipped_steps", 0)):
            self.__dict__.setdefault(name, value)

    def __getstate__(self) -> dict:
        # Flat states are rebuilt from the per-parameter state, which is all that a copy needs.
        extra = {"max_grad_norm": self.max_grad_norm, "skipped_steps": self.skipped_steps}
        return {**super().__getstate__(), **extra}

    def __repr__(self) -> str:
        params = [(param, group["min_8bit_size"]) for group in self.param_groups for param in group["params"]]
        kept = [param.numel() for param, least in params if param.numel() < least]
        note = f"{len(kept)} of {len(params)} tensors ({sum(kept)} elements) keep 32-bit state"
        return f"{super().__repr__()}\n{note}" if kept else super().__repr__()


class AdamW8bit(_Flat8bit):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with block-wise 8-bit moments (Dettmers et al., 2110.02861).

    Decay first, update from the new moments before they are quantised, then quantise: first moment with a signed,
    second with an unsigned dynamic map, blocks of `block_size` elements (a power of two) with one fp32 scale each.
    Tensors with fewer than `min_8bit_size` elements keep fp32 moments. max_grad_norm clips by the norm over all groups.
    Raises ValueError naming a bad argument.
    """

    MOMENTS = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        min_8bit_size: int = 0,
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "block_size": block_size, "min_8bit_size": min_8bit_size}, max_grad_norm)

    def _rule(self, param: Tensor, grad: Tensor, moments: tuple, step: Tensor, group: dict) -> tuple[Tensor, tuple]:
        rates = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        return adamw_ref(param, grad, moments, step, **rates)


class Lion8bit(_Flat8bit):
    """Lion (Chen et al., arXiv 2302.06675) with a block-wise 8-bit moment; state, clipping and errors as AdamW8bit."""

    MOMENTS = {"exp_avg": True}

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        block_size: int = 256,
        min_8bit_size: int = 0,
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "block_size": block_size, "min_8bit_size": min_8bit_size}, max_grad_norm)

    def _rule(self, param: Tensor, grad: Tensor, moments: tuple, step: Tensor, group: dict) -> tuple[Tensor, tuple]:
        rates = {name: group[name] for name in ("lr", "betas", "weight_decay")}
        return lion_ref(param, grad, moments, step, **rates)


def _check_group(group: dict) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if name in group and not group[name] >= 0:
            raise ValueError(f"{name}={group[name]}: allowed is a number >= 0")
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas}: allowed are two numbers in [0, 1)")
    size = group["block_size"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size & (size - 1):
        raise ValueError(f"block_size={size!r}: allowed is a power of two")
    least = group["min_8bit_size"]
    if isinstance(least, bool) or not isinstance(least, int) or least < 0:
        raise ValueError(f"min_8bit_size={least!r}: allowed is an int >= 0")
    for param in group["params"]:
        if not param.is_floating_point():
            raise ValueError(f"params hold a tensor of {param.dtype}: allowed are floating tensors")


def _check_grads(grads: list[Tensor | None]) -> None:
    if any(grad is not None and grad.is_sparse for grad in grads):
        raise RuntimeError("a gradient is sparse: allowed are dense gradients")
