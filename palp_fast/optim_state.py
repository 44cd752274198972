"""Optimizer state of many tensors as a few flat ones, in rows ("blocks") of equal size that never cross tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast.reference.blockwise import zero_code


class FlatState:
    """Moments and step counts of some parameters of one device, each parameter padded to whole blocks.

    `moments[name]` is [codes uint8 [blocks, size], scales fp32 [blocks]], or [values fp32 [blocks, size]]. `states`
    holds one dict of views per parameter, for Optimizer.state: of its blocks, or with `shaped` (32-bit state only) of
    its own shape, as torch.optim has it.
    """

    def __init__(
        self, params: list[Tensor], size: int, moments: dict[str, bool], quantised: bool, shaped: bool = False
    ) -> None:
        """moments: name -> signed."""
        self.params, self.size, self.device, self.shaped = params, size, params[0].device, shaped
        self.sizes = [param.numel() for param in params]
        self.rows = [-(-count // size) for count in self.sizes]
        self.starts = [sum(self.rows[:index]) for index in range(len(params))]
        self.signs = moments
        self.moments = {name: self._new_moment(signed, quantised) for name, signed in moments.items()}
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=self.device)
        self.states = [self._views(index) for index in range(len(params))]

    def _new_moment(self, signed: bool, quantised: bool) -> list[Tensor]:
        blocks = sum(self.rows)
        if not quantised:
            return [torch.zeros(blocks, self.size, device=self.device)]
        codes = torch.full((blocks, self.size), zero_code(signed), dtype=torch.uint8, device=self.device)
        return [codes, torch.zeros(blocks, device=self.device)]

    def _views(self, index: int) -> dict[str, Tensor]:
        views = {"step": self.steps[index]}
        for name, tensors in self.moments.items():
            names = (f"{name}_codes", f"{name}_scales") if len(tensors) == 2 else (name,)
            views |= {key: self._view(tensor, index) for key, tensor in zip(names, tensors)}
        return views

    def _view(self, tensor: Tensor, index: int) -> Tensor:
        param = self.params[index]
        rows = tensor[self.starts[index] : self.starts[index] + self.rows[index]]
        return rows.view(-1)[: param.numel()].view(param.shape) if self.shaped else rows

    def check_sizes(self) -> None:
        """Raises ValueError if a parameter has another number of elements than when this state was made."""
        for index, (param, count) in enumerate(zip(self.params, self.sizes)):
            if param.numel() != count:
                given = f"parameter {index} has {param.numel()} elements"
                raise ValueError(f"{given}: allowed are {count}, as in its state")

    def adopt(self, index: int, state: dict[str, Tensor]) -> None:
        """Copy saved state of one parameter. Raises ValueError if it is of another layout."""
        views = self.states[index]
        given = {name: list(torch.as_tensor(value).shape) for name, value in state.items()}
        wanted = {name: list(value.shape) for name, value in views.items()}
        if given != wanted:
            raise ValueError(f"optimizer state of parameter {index} has {given}: allowed is {wanted}")
        for name, view in views.items():
            view.copy_(torch.as_tensor(state[name]))

    def clear(self, index: int) -> None:
        """Make the state of one parameter that of a new one."""
        for name, view in self.states[index].items():
            signed = self.signs.get(name.removesuffix("_codes"), False)
            view.fill_(zero_code(signed) if name.endswith("_codes") else 0)
