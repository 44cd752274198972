"""CUDA graphs without a card: a capture records operators and their arguments, a replay runs these, on the same memory.

As on a card, a capture leaves nothing trained, Python runs in it alone, and what a graph makes for itself is anyone's
between two replays. So a value of the host that a step depends on is frozen here, too.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palp_fast import backend, checks


def tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def storage(tensor):
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Every operator within, in order; it keeps all their tensors."""

    def __init__(self):
        super().__init__()
        self.calls, self.made = [], {}  # made: {storage: number} of those that a call here made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {storage(tensor) for tensor in tensors((args, kwargs))}
        out = func(*args, **kwargs)
        if func.namespace == "profiler":
            return out
        new = [tensor for tensor in tensors(out) if storage(tensor) not in given]
        for tensor in new:
            self.made.setdefault(storage(tensor), len(self.made))
        self.calls.append((func, args, kwargs, out, new))
        return out

    @torch.no_grad()
    def replay(self):
        for *_, new in self.calls:
            for tensor in new:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
        for func, args, kwargs, out, new in self.calls:
            again = tensors(func(*args, **kwargs))
            for tensor, value in zip(tensors(out), again, strict=True):
                if any(tensor is one for one in new):
                    tensor.copy_(value)

    def described(self):
        """What a capture freezes, a line per call: operator, numbers, addresses of all tensors not made within."""
        addresses = {tensor.data_ptr(): f"made {self.made[storage(tensor)]}+{tensor.storage_offset()}"
                     for *_, new in self.calls for tensor in new}

        def show(leaf):
            if isinstance(leaf, torch.Tensor):
                number = self.made.get(storage(leaf))
                place = f"at {leaf.data_ptr()}" if number is None else f"made {number}+{leaf.storage_offset()}"
                return f"{leaf.dtype} {list(leaf.shape)} {list(leaf.stride())} {place}"
            return repr(addresses.get(leaf, leaf) if type(leaf) is int else leaf)

        return [" ".join([str(func), *map(show, tree_leaves((args, kwargs)))]) for func, args, kwargs, *_ in self.calls]


class OnCpu:
    """Stands for graph.Cuda."""

    def __init__(self, trainer, patch):
        self.trainer, self.patch, self.tapes, self.replays = trainer, patch, [], 0

    def eager(self, part):
        return part()

    def capture(self, part):
        kept = trained(self.trainer)
        if self.trainer.config.grad_accumulation > 1:
            kept += [parameter.grad for parameter in self.trainer.update.named.values()]
        before = [tensor.detach().clone() for tensor in kept]
        tape, result = taped(part, self.patch)
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
        self.tapes.append(tape)

        def replay():
            self.replays += 1
            tape.replay()

        return replay, result

    def synchronize(self):
        pass

    def free(self):
        pass


def taped(part, monkeypatch):
    """(Tape of a part, its result), as if it were captured."""
    with monkeypatch.context() as patch, Tape() as tape:
        patch.setattr(backend, "is_capturing", lambda: True)
        patch.setattr(checks, "_can_read", lambda value: False)  # values of arguments are checked on a CPU only
        result = part()
    return tape, result


def trained(trainer):
    """What steps leave behind, but for gradients: parameters, states of optimizer, sampler and loss scale, sums."""
    update, sampler, sums = trainer.update, trainer.draws.sampler, trainer.sums
    found = list(update.named.values())
    for states in update.optimizer._flat.values():
        for state in states:
            found += [state.steps, *(tensor for moment in state.moments.values() for tensor in moment)]
    found += [update.optimizer.skipped_steps, sampler._counts, sampler._squares, sums.loss, sums.t, sums.stats]
    if update.scaler.is_enabled():
        found += [update.scaler._scale, update.scaler._growth_tracker]
    return found
