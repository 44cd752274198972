"""The tables by which a compiled optimizer step finds its tensors (csrc/include/palp_fast/optimizer.h)."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor

from palp_fast.optim_state import FlatState

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_CHUNK = 4096
_DTYPE = attrgetter("dtype")


def serves(tensors: list[Tensor]) -> bool:
    """Whether the compiled step knows the type of every tensor."""
    return all(tensor.dtype in _TYPES for tensor in tensors)


class StepTable:
    """Addresses of all parameters, shadows and state on one device, and the workspace of their steps.

    Written once; `fits` says whether the addresses still hold. Those of gradients are written again when they change.
    """

    def __init__(self, states: list[FlatState], groups: list[int], shadows: dict[Tensor, Tensor]) -> None:
        """groups: the param group of each state."""
        self.device = states[0].device
        self.params = [param for state in states for param in state.params]
        self.shadows = [shadows.get(param) for param in self.params]
        self._written = [tensor for tensor in self.shadows if tensor is not None]
        self._layout = self._seen()
        # A parameter that is not contiguous is updated as a contiguous copy.
        self._copies = {i: p.detach().contiguous() for i, p in enumerate(self.params) if not p.is_contiguous()}
        rows, chunks = self._rows(states, groups)
        counts = torch.tensor(chunks, dtype=torch.int64)
        self.tensors = torch.tensor(rows, dtype=torch.int64).to(self.device)
        self.owner = torch.repeat_interleave(torch.arange(len(chunks), dtype=torch.int32), counts).to(self.device)
        # Verdict, ticket, 4 words of constants per tensor, a partial sum per chunk.
        self._work = torch.zeros(2 + 4 * len(rows) + sum(chunks), dtype=torch.int64, device=self.device)
        self._gradients = torch.zeros(2 * len(rows), dtype=torch.int64, device=self.device)
        self._words: list[int] | None = None
        self._captured: list[Tensor] = []

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds its addresses."""
        return bool(self._captured)

    def fits(self) -> bool:
        """Whether parameters and shadows still lie where the table says."""
        return self._layout == self._seen()

    def _seen(self) -> list:
        """Address, size, layout and type of what the table points to."""
        tensors = [*self.params, *self._written]
        return [list(map(ask, tensors)) for ask in (Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous, _DTYPE)]

    def _rows(self, states: list[FlatState], groups: list[int]) -> tuple[list[list[int]], list[int]]:
        """(twelve words per tensor, chunks per tensor)."""
        rows, chunks = [], []
        for state, group in zip(states, groups):
            size = max(_CHUNK, state.size)
            for index, param in enumerate(state.params):
                target, shadow = self._copies.get(len(rows), param), self.shadows[len(rows)]
                types = _TYPES[param.dtype] + (0 if shadow is None else 256 * _TYPES[shadow.dtype])
                values, scales = _moment_addresses(state, index)
                row = [target.data_ptr(), 0 if shadow is None else shadow.data_ptr(), *values, *scales]
                row += [state.steps.data_ptr() + 4 * index, param.numel(), state.size, group, sum(chunks), types]
                rows.append(row)
                chunks.append(-(-param.numel() // size))
        return rows, chunks

    def step(
        self,
        rule: int,
        grads: list[Tensor | None],
        groups: Tensor,
        skipped: Tensor,
        scaler: tuple[Tensor | None, Tensor | None],
        max_norm: float,
        capturing: bool,
    ) -> Tensor:
        """One step -> the gradients' norm. scaler: GradScaler's (grad_scale, found_inf)."""
        # Copies of gradients live until the launch; what runs on the stream afterwards may have their memory.
        grads = _readable(grads)
        gradients = self._write(_words(grads), capturing)
        for index, copy in self._copies.items():
            copy.copy_(self.params[index])
        norm = torch.ops.palp_fast.optimizer_step(
            rule, self.tensors, gradients, groups, self.owner, self._work, skipped, *scaler, max_norm)
        for index, copy in self._copies.items():
            self.params[index].copy_(copy)
        torch.autograd.graph.increment_version([*self.params, *self._written])
        return norm

    def _write(self, words: list[int], capturing: bool) -> Tensor:
        """The gradients' addresses on the device. A captured graph writes and keeps a table of its own."""
        if capturing:
            self._captured.append(torch.empty_like(self._gradients))
            torch.ops.palp_fast.write_words(self._captured[-1], words)
            return self._captured[-1]
        if words != self._words:
            torch.ops.palp_fast.write_words(self._gradients, words)
            self._words = words
        return self._gradients


# Hundreds of tensors are asked at every step, hence by functions that need no Python frame for each.
def _readable(grads: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients, or copies that are contiguous and of a type that the compiled step knows."""
    present = [grad for grad in grads if grad is not None]
    if all(map(Tensor.is_contiguous, present)) and _TYPES.keys() >= set(map(_DTYPE, present)):
        return grads
    return [grad if grad is None else _copied(grad) for grad in grads]


def _copied(grad: Tensor) -> Tensor:
    return grad.contiguous() if grad.dtype in _TYPES else grad.to(torch.float32).contiguous()


def _words(grads: list[Tensor | None]) -> list[int]:
    """Address and type of each; 0 and 0 for none."""
    present = [index for index, grad in enumerate(grads) if grad is not None]
    known = grads if len(present) == len(grads) else [grads[index] for index in present]
    pairs = zip(map(Tensor.data_ptr, known), map(_TYPES.__getitem__, map(_DTYPE, known)))
    if known is grads:
        return list(chain.from_iterable(pairs))
    words = [0] * (2 * len(grads))
    for index, pair in zip(present, pairs):
        words[2 * index : 2 * index + 2] = pair
    return words


def _moment_addresses(state: FlatState, index: int) -> tuple[list[int], list[int]]:
    """(addresses of values or codes, addresses of scales) of the first and second moment; 0 for what there is not."""
    values, scales = [], []
    for moment in state.moments.values():
        start = state.starts[index]
        values.append(moment[0].data_ptr() + start * state.size * moment[0].element_size())
        scales.append(moment[1].data_ptr() + start * 4 if len(moment) == 2 else 0)
    missing = [0] * (2 - len(values))
    return values + missing, scales + missing
