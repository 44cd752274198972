"""What the benchmark of an operator is made of: problems, providers, a truth, and the gate before any timing.

Every bench_<op>.py names its layers, its providers and its formulas in one Operator; the rest is here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from palp_fast import backend

Results = Sequence[Tensor]
Call = Callable[[], Results]


class Unavailable(Exception):
    """Why a provider cannot serve here."""


@dataclass(frozen=True)
class Problem:
    """One call of an operator on random data.

    leaves: tensors that get a gradient (or plain inputs, where upstream is None); others: everything else by name;
    upstream: gradient of each result, None for a forward pass alone; nbytes, flops: of an ideal implementation, both
    passes together: every tensor read or written once, matrix products only.
    """

    leaves: tuple[Tensor, ...]
    others: dict
    nbytes: int
    flops: int = 0
    upstream: tuple[Tensor, ...] | None = None

    def double(self) -> Problem:
        """The same in fp64."""
        widen = partial(tree_map_only, Tensor, lambda x: x.detach().double() if x.is_floating_point() else x)
        return replace(self, leaves=widen(self.leaves), others=widen(self.others), upstream=widen(self.upstream))


@dataclass(frozen=True)
class Operator:
    """The benchmark of one operator.

    shapes: {layer: sizes}, the first is the one of --quick; make(*sizes, dtype, device) -> Problem. formula(problem) is
    plain PyTorch and returns a function of the leaves: provider "eager", compiled the provider "torch.compile", in fp64
    the truth. ours(problem, backend) and each of `peers`, PROVIDERS of a file, likewise; a peer may return (function,
    its own leaves). registered: names in torch.ops.palp_fast that decide which of our backends serve, none for an
    operator in plain PyTorch. judge(results, problem) -> tensors to
    compare, where results themselves are not comparable. yardstick: whose error, times slack, is the limit, and `room`
    besides where that is more than rounding. calls: how often a stateful function runs before the gate looks. refused:
    {provider: why it is not timed}.
    """

    name: str
    shapes: Mapping[str, tuple]
    make: Callable[..., Problem]
    formula: Callable[[Problem], Callable]
    ours: Callable[[Problem, str], Callable]
    peers: Mapping[str, Callable] = field(default_factory=dict)
    registered: tuple[str, ...] = ()
    judge: Callable[[Results, Problem], Results] = lambda results, problem: results
    yardstick: str = "eager"
    slack: float = 2.0
    room: float = 0.0
    calls: int = 1
    refused: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] | None = None

    def providers(self) -> dict[str, Callable[[Problem], Callable]]:
        """{name: prepare}, prepare(problem) raising Unavailable with the reason; ours first."""
        own = {f"palp_fast {name}": partial(self._own, name) for name in ("cpu", "triton", "cuda", "reference")}
        found = own | {"eager": self.formula, "torch.compile": partial(_compiled, self.formula)} | dict(self.peers)
        return {name: _refuse(self.refused[name]) if name in self.refused else make for name, make in found.items()}

    def home(self, device: torch.device) -> str:
        """The provider that a call without `backend` uses here."""
        chosen = {backend.select(name, device) for name in self.registered}
        return f"palp_fast {next(iter(chosen - {'reference'}), 'reference')}"

    def problem(self, shape: str, dtype: torch.dtype, device: torch.device) -> Problem:
        """Random data for a layer, the same at every call."""
        torch.manual_seed(0)
        return self.make(*self.shapes[shape], dtype, device)

    def _own(self, name: str, problem: Problem) -> Callable:
        if name != "reference" and not self.registered:
            raise Unavailable(f"{self.name} has one version, in plain PyTorch")
        device = problem_device(problem)
        reasons = [backend.obstacle(op, device, name) for op in self.registered] if name != "reference" else []
        if reasons and all(reasons):
            raise Unavailable(reasons[0])
        return self.ours(problem, name)


def problem_device(problem: Problem) -> torch.device:
    tensors = [*problem.leaves, *(value for value in problem.others.values() if isinstance(value, Tensor))]
    return tensors[0].device


def bind(prepare: Callable[[Problem], Callable], problem: Problem) -> Call:
    """A call without arguments: results, then the gradients to the leaves if the problem has an upstream gradient."""
    made = prepare(problem)
    function, leaves = made if isinstance(made, tuple) else (made, None)
    if problem.upstream is None:
        return lambda: _listed(function(*problem.leaves))
    if leaves is None:
        leaves = [leaf.detach().requires_grad_() for leaf in problem.leaves]

    def run() -> Results:
        out = _listed(function(*leaves))
        upstream = [grad.to(y.dtype) for grad, y in zip(problem.upstream, out, strict=True)]
        return [*(y.detach() for y in out), *torch.autograd.grad(out, leaves, upstream)]

    return run


def error(results: Results, truth: Results) -> float:
    """The greatest relative L2 error of any result; infinity for one that is not finite."""
    errors = []
    for mine, true in zip(results, truth, strict=True):
        mine, true = mine.detach().double(), true.detach().double()
        if mine.shape != true.shape or not mine.isfinite().all():
            return float("inf")
        errors.append(((mine - true).norm() / (true.norm() or 1.0)).item())
    return max(errors)


def floor(dtype: torch.dtype) -> float:
    """What two right ways to round may differ by."""
    return max(4e-6, torch.finfo(dtype).eps / 2)


class Gate:
    """Which results are right: error at most `slack` times that of the yardstick, in the same dtype, plus a floor."""

    def __init__(self, operator: Operator, problem: Problem, dtype: torch.dtype):
        self.operator, self.problem = operator, problem
        self.truth = self._judged(operator.formula, problem.double())
        yardstick = operator.providers()[operator.yardstick]
        self.limit = operator.slack * error(self._judged(yardstick, problem), self.truth)
        self.limit += max(operator.room, floor(dtype))

    def error(self, call: Call) -> float:
        """Of a call that `bind` made, not run before."""
        return error(self._after_calls(call), self.truth)

    def is_stale(self, call: Call, problem: Problem) -> bool:
        """Whether a call gives the same results when what it is given changes in place: kept ones, not computed."""
        if not problem.leaves:
            return False
        first, before = problem.leaves[0], [result.clone() for result in call()]
        first.neg_()
        after = call()
        first.neg_()
        return all(torch.equal(mine, other) for mine, other in zip(before, after))

    def _judged(self, prepare: Callable, problem: Problem) -> Results:
        return self._after_calls(bind(prepare, problem))

    def _after_calls(self, call: Call) -> Results:
        torch.manual_seed(1)
        for _ in range(self.operator.calls):
            results = call()
        return self.operator.judge(results, self.problem)


def need(package: str) -> None:
    """Raises Unavailable where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def normal(device: torch.device, dtype: torch.dtype, *shape: int, size: float = 1.0) -> Tensor:
    return (size * torch.randn(shape, device=device)).to(dtype)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _listed(value: Tensor | Results) -> Results:
    return [value] if isinstance(value, Tensor) else value if isinstance(value, list) else list(value)


def _compiled(formula: Callable, problem: Problem) -> Callable:
    torch._dynamo.reset()
    return torch.compile(formula(problem), dynamic=False)


def _refuse(reason: str) -> Callable:
    def prepare(problem: Problem) -> Callable:
        raise Unavailable(reason)

    return prepare
