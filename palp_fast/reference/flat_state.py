"""Optimizer state of many tensors as a few flat ones, in rows ("blocks") of equal size that never cross tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast.reference.blockwise import dequantise, quantise, zero_code


class QuantisedMoment:
    """One moment as uint8 codes [blocks, size] and fp32 scales [blocks]."""

    def __init__(self, name: str, blocks: int, size: int, signed: bool, device: torch.device) -> None:
        self.signed = signed
        self.codes = torch.full((blocks, size), zero_code(signed), dtype=torch.uint8, device=device)
        self.scales = torch.zeros(blocks, dtype=torch.float32, device=device)
        self.tensors = {f"{name}_codes": self.codes, f"{name}_scales": self.scales}

    def read(self) -> Tensor:
        """The moment, fp32 [blocks, size]."""
        return dequantise(self.codes, self.scales, self.signed)

    def write(self, value: Tensor, keep: Tensor) -> None:
        """Store `value` in the rows where keep [blocks, 1] is False."""
        codes, scales = quantise(value, self.signed)
        torch.where(keep, self.codes, codes, out=self.codes)
        torch.where(keep[:, 0], self.scales, scales, out=self.scales)


class PlainMoment:
    """One moment in fp32, for tensors below the caller's min_8bit_size."""

    def __init__(self, name: str, blocks: int, size: int, device: torch.device) -> None:
        self.values = torch.zeros(blocks, size, device=device)
        self.tensors = {name: self.values}

    def read(self) -> Tensor:
        """The moment, fp32 [blocks, size]."""
        return self.values

    def write(self, value: Tensor, keep: Tensor) -> None:
        """Store `value` in the rows where keep [blocks, 1] is False."""
        torch.where(keep, self.values, value, out=self.values)


class FlatState:
    """Moments and step counts of some parameters of one device, each parameter padded to whole rows."""

    def __init__(self, params: list[Tensor], size: int, moments: dict[str, bool], quantised: bool) -> None:
        """moments: name -> signed. `states` holds one dict of views per parameter, for Optimizer.state."""
        self.params, self.size, self.device = params, size, params[0].device
        rows = [-(-param.numel() // size) for param in params]
        self.starts = [sum(rows[:index]) for index in range(len(rows))]
        self.blocks = sum(rows)
        if quantised:
            self.moments = [QuantisedMoment(n, self.blocks, size, s, self.device) for n, s in moments.items()]
        else:
            self.moments = [PlainMoment(name, self.blocks, size, self.device) for name in moments]
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=self.device)
        self.owner = torch.repeat_interleave(torch.arange(len(params)), torch.tensor(rows)).to(self.device)
        self.states = [self._views(index, rows[index]) for index in range(len(params))]

    def _views(self, index: int, rows: int) -> dict[str, Tensor]:
        views = {"step": self.steps[index]}
        for moment in self.moments:
            for name, tensor in moment.tensors.items():
                views[name] = tensor[self.starts[index] : self.starts[index] + rows]
        return views

    def adopt(self, index: int, state: dict[str, Tensor]) -> None:
        """Take over saved state of one parameter. Raises ValueError if it is of another layout."""
        views = self.states[index]
        given = {name: list(value.shape) for name, value in state.items()}
        wanted = {name: list(value.shape) for name, value in views.items()}
        if given != wanted:
            raise ValueError(f"optimizer state of parameter {index} has {given}: allowed is {wanted}")
        for name, view in views.items():
            view.copy_(state[name])

    def gather(self, tensors: list[Tensor | None]) -> Tensor:
        """The tensors as fp32 rows [blocks, size]; padding and missing ones are 0."""
        flat = torch.zeros(self.blocks * self.size, device=self.device)
        pairs = [(self._part(flat, i), tensor) for i, tensor in enumerate(tensors) if tensor is not None]
        torch._foreach_copy_([part for part, _ in pairs], [tensor for _, tensor in pairs])
        return flat.view(self.blocks, self.size)

    def scatter(self, rows: Tensor) -> None:
        """Write rows [blocks, size] back to the parameters."""
        flat = rows.reshape(-1)
        torch._foreach_copy_(self.params, [self._part(flat, index) for index in range(len(self.params))])

    def _part(self, flat: Tensor, index: int) -> Tensor:
        param, start = self.params[index], self.starts[index] * self.size
        return flat[start : start + param.numel()].view(param.shape)
