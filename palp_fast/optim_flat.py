"""What the optimizers of palp_fast.optim share: flat state, one step for all tensors, safety, saving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor

from palp_fast import backend as backends
from palp_fast import ops  # noqa: F401  (registers the operators)
from palp_fast.optim_state import FlatState
from palp_fast.optim_table import StepTable, serves
from palp_fast.ops.optim import RULES


class FlatOptimizer(torch.optim.Optimizer):
    """An optimizer whose step is one operator, and which a gradient that is not finite leaves unchanged.

    `grad_norm` (before clipping) and `skipped_steps` are 0-d tensors on the device of the first parameter's state, None
    and 0 before there is state.
    """

    RULE = ""
    MOMENTS: dict[str, bool] = {}  # name -> signed
    SHAPED = False  # 32-bit state only, in the shape of the parameter
    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf instead of unscaling

    def __init__(
        self,
        params: Iterable,
        defaults: dict,
        max_grad_norm: float | None,
        capturable: bool,
        shadows: Mapping[Tensor, Tensor] | None,
        backend: str,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: allowed is a number > 0, or None")
        if backend not in backends.BACKENDS:
            raise ValueError(f"backend={backend!r}: allowed are {', '.join(map(repr, backends.BACKENDS))}")
        self.max_grad_norm, self.capturable, self.backend = max_grad_norm, capturable, backend
        self.shadows = dict(shadows or {})
        self.grad_norm: Tensor | None = None
        self.skipped_steps: Tensor | int = 0
        self._forget()
        super().__init__(params, defaults)
        _check_shadows(self.shadows, self._parameters())
        if capturable or self.shadows:
            self.refresh()

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _forget(self) -> None:
        """Drop what is made from parameters, groups and state when it is needed."""
        self._flat: dict[int, list[FlatState]] = {}
        self._table: StepTable | None = None
        self._kept: list[tuple] = []
        self._rates: dict[torch.device, Tensor] = {}
        self._sent_rates: list[float] | None = None

    def _drop_table(self) -> None:
        """Forget the table; what a captured graph points to stays alive."""
        if self._table is not None and self._table.captured:
            self._kept.append((self._table, self._rates, dict(self._flat)))
        self._table = None

    def add_param_group(self, param_group: dict) -> None:
        """As torch.optim; the group's hyperparameters are checked."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self._drop_table()
        self._rates, self._sent_rates = {}, None

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring to the device what Python code may have changed: hyperparameters, and shadows of parameters.

        step() does so for hyperparameters, but not inside a captured graph: call this before the first replay after
        group["lr"] changed (a tensor lr on the device of the parameters is read by the graph itself), and after
        parameters that have shadows were set by anything but step().
        """
        states = self._states()
        self._send_rates(states)
        if states:
            self._table_for(states)
        for param, shadow in self.shadows.items():
            shadow.copy_(param)

    @torch._disable_dynamo
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
        capturing = backends.is_capturing()
        if capturing:
            self._check_capture()
        states = self._states()
        grads = [[param.grad for param in state.params] for _, state in states]
        present = [grad for grad in chain.from_iterable(grads) if grad is not None]
        if not present:
            return loss
        if any(map(attrgetter("is_sparse"), present)):
            raise RuntimeError("a gradient is sparse: allowed are dense gradients")
        self._send_rates(states, capturing)
        scaler = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scaler = tuple(_scalar_on(value, states[0][1].device) for value in scaler)
        max_norm = float("inf") if self.max_grad_norm is None else float(self.max_grad_norm)
        table = self._table_for(states)
        if table is not None:
            self.grad_norm = table.step(
                RULES.index(self.RULE), list(chain.from_iterable(grads)), self._rates[table.device],
                self.skipped_steps, scaler, max_norm, capturing)
        else:
            self._step_by_reference(states, grads, present, scaler, max_norm)
        return loss

    def _check_capture(self) -> None:
        if not self.capturable:
            raise RuntimeError("step() in a CUDA graph: allowed with capturable=True")
        if self._table is None or not self._table.fits():
            raise RuntimeError("step() in a CUDA graph: call refresh() before capture, with parameters in their place")

    def _step_by_reference(self, states: list, grads: list, present: list, scaler: tuple, max_norm: float) -> None:
        present = [grad.to(states[0][1].device) for grad in present]
        self.grad_norm, verdict = torch.ops.palp_fast.grad_norm.reference(present, *scaler, max_norm)
        self.skipped_steps += (verdict[1] == 0).to(torch.int64)
        rule = getattr(torch.ops.palp_fast, self.RULE).reference
        for (group, state), some in zip(states, grads):
            nothing = torch.empty(0, device=state.device)
            some = [nothing if grad is None else grad for grad in some]
            shadows = [self.shadows.get(param, nothing) for param in state.params]
            rates = self._rates[state.device][group]
            moments = state.moments.values()
            rule(state.params, some, shadows, state.steps, *moments, verdict.to(state.device), rates, state.size)

    def _table_for(self, states: list[tuple[int, FlatState]]) -> StepTable | None:
        """The tables of the compiled step, None where the reference must serve. `_states` drops what does not fit."""
        if self._table is None:
            device = states[0][1].device
            flat = [state for _, state in states]
            compiled = backends.select(self.RULE, device, self.backend) != "reference"
            together = all(state.device == device for state in flat)
            compiled = compiled and together and serves([*self._parameters(), *self.shadows.values()])
            if compiled:
                _check_shadows(self.shadows, self._parameters())
            self._table = StepTable(flat, [group for group, _ in states], self.shadows) if compiled else None
        return self._table

    def _send_rates(self, states: list[tuple[int, FlatState]], capturing: bool = False) -> None:
        """Hyperparameters to fp64 [groups, 5] on each device of the state; in a graph only lr that is there already."""
        devices = {state.device for _, state in states}
        if devices < set(self._rates):
            self._rates = {device: self._rates[device] for device in devices}
        for device in devices - set(self._rates):
            self._rates[device] = torch.zeros(len(self.param_groups), 5, dtype=torch.float64, device=device)
            self._sent_rates = None
        tensors, values = {}, []
        for index, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                tensors[index], lr = lr, 0.0
            values += [float(lr), *map(float, group["betas"]), group.get("eps", 0.0), group["weight_decay"]]
        if values != self._sent_rates and not capturing:
            # As words, which reach the device as kernel arguments: a copy from host memory may wait for the stream.
            words = torch.tensor(values, dtype=torch.float64).view(torch.int64).tolist()
            for rates in self._rates.values():
                torch.ops.palp_fast.write_words(rates.view(-1).view(torch.int64), words)
            self._sent_rates = values
        for index, lr in tensors.items():
            for rates in self._rates.values():
                rates[index, 0].copy_(lr.reshape(()))

    def _states(self) -> list[tuple[int, FlatState]]:
        """(group index, state): of each group its 8-bit tensors and, if the caller set min_8bit_size, 32-bit ones."""
        if self._table is None or not self._table.fits():
            self._drop_table()
            for index, group in enumerate(self.param_groups):
                states = self._flat.get(index)
                if states is None or any(p.device != state.device for state in states for p in state.params):
                    self._flat[index] = self._new_states(group)
                for state in self._flat[index]:
                    state.check_sizes()
        found = [(index, state) for index in range(len(self.param_groups)) for state in self._flat[index]]
        if found and not isinstance(self.skipped_steps, Tensor):
            self.skipped_steps = torch.full((), self.skipped_steps, dtype=torch.int64)
        if found:
            self.skipped_steps = self.skipped_steps.to(found[0][1].device)
        return found

    def _new_states(self, group: dict) -> list[FlatState]:
        states = []
        for params, quantised in self._parts(group):
            if any(param.device != params[0].device for param in params):
                devices = sorted({str(param.device) for param in params})
                raise ValueError(f"a param group lies on {' and '.join(devices)}: allowed is one device")
            state = FlatState(params, group["block_size"], self.MOMENTS, quantised, self.SHAPED)
            for index, param in enumerate(params):
                if self.state.get(param):
                    state.adopt(index, self.state[param])
                self.state[param] = state.states[index]
            states.append(state)
        return states

    def _parts(self, group: dict) -> list[tuple[list[Tensor], bool]]:
        """(parameters, whether their state is quantised) for each flat state of a group."""
        params = [param for param in group["params"] if param.numel() > 0]
        large = [param for param in params if param.numel() >= group["min_8bit_size"]]
        small = [param for param in params if param.numel() < group["min_8bit_size"]]
        return [(part, quantised) for part, quantised in ((large, not self.SHAPED), (small, False)) if part]

    def state_dict(self) -> dict:
        """As torch.optim, plus "skipped_steps": per parameter plain tensors that load on any device."""
        return {**super().state_dict(), "skipped_steps": int(self.skipped_steps)}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch.optim, in place where the layout is the same; codes and scales are taken as they are.

        Raises ValueError for another layout.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        saved = dict(zip(keys, self._parameters()))
        given = {param: state_dict["state"][key] for key, param in saved.items() if key in state_dict["state"]}
        for index, group in enumerate(self.param_groups):
            self._load_group(index, group, given)
        skipped = int(state_dict.get("skipped_steps", 0))
        self._states()
        if isinstance(self.skipped_steps, Tensor):
            self.skipped_steps.fill_(skipped)
        else:
            self.skipped_steps = skipped
        self._sent_rates = None

    def _load_group(self, index: int, group: dict, given: dict[Tensor, dict]) -> None:
        layout = [(state.params, len(state.moments["exp_avg"]) == 2, state.size) for state in self._flat.get(index, ())]
        wanted = [(params, quantised, group["block_size"]) for params, quantised in self._parts(group)]
        if not _same_layout(layout, wanted):
            self._drop_table()
            self._flat.pop(index, None)
            self.state.update({param: dict(given[param]) for param in group["params"] if param in given})
            return
        for state in self._flat[index]:
            for number, param in enumerate(state.params):
                self.state[param] = state.states[number]
                if param in given:
                    state.adopt(number, given[param])
                else:
                    state.clear(number)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for name, value in (("max_grad_norm", None), ("capturable", False), ("backend", "auto"), ("shadows", {})):
            self.__dict__.setdefault(name, value)
        for name, value in (("grad_norm", None), ("skipped_steps", 0)):
            self.__dict__.setdefault(name, value)
        if "_flat" not in self.__dict__:
            self._forget()

    def __getstate__(self) -> dict:
        # Flat states are made again from the per-parameter state, which is all that a copy needs.
        names = ("max_grad_norm", "capturable", "backend", "shadows", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __repr__(self) -> str:
        if self.SHAPED:
            return super().__repr__()
        note = self.kept_in_32_bits()
        return f"{super().__repr__()}\n{note}" if note else super().__repr__()

    def kept_in_32_bits(self) -> str:
        """How many tensors `min_8bit_size` keeps from 8 bits, in words; "" if none."""
        if self.SHAPED:
            return f"all {len(self._parameters())} tensors have 32-bit state"
        params = [(param, group["min_8bit_size"]) for group in self.param_groups for param in group["params"]]
        kept = [param.numel() for param, least in params if param.numel() < least]
        return f"{len(kept)} of {len(params)} tensors ({sum(kept)} elements) keep 32-bit state" if kept else ""


def _same_layout(left: list[tuple], right: list[tuple]) -> bool:
    def key(layout):
        return [([id(param) for param in params], quantised, size) for params, quantised, size in layout]

    return key(left) == key(right)


def _scalar_on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, torch.float32).reshape(())


def _check_group(group: dict) -> None:
    for name in ("lr", "eps", "weight_decay"):
        value = group.get(name, 0.0)
        # The value of a tensor on another device is not read.
        if not (isinstance(value, Tensor) and value.device.type != "cpu") and not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value}: allowed is a finite number >= 0")
    betas = group["betas"]
    if not isinstance(betas, (list, tuple)) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
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


def _check_shadows(shadows: Mapping[Tensor, Tensor], params: list[Tensor]) -> None:
    known = {id(param) for param in params}
    for param, shadow in shadows.items():
        if id(param) not in known:
            raise ValueError(f"shadows name a tensor of shape {list(param.shape)}: allowed are parameters of params")
        if param.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"shadows name a parameter of {param.dtype}: allowed are float32 and float64")
        if shadow.dtype not in (torch.float16, torch.bfloat16) or not shadow.is_contiguous():
            raise ValueError(f"shadows hold a tensor of {shadow.dtype}: allowed are contiguous float16 and bfloat16")
        if shadow.shape != param.shape or shadow.device != param.device:
            given = f"{list(shadow.shape)} on {shadow.device}"
            raise ValueError(f"shadows hold {given}: allowed is the parameter's {list(param.shape)} on {param.device}")
