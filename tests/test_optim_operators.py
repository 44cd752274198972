"""The optimizers' operators: torch's own checks of schema and shapes, and torch.compile over a function that uses each."""

import pytest
import torch

from close import BACKENDS
from palp_fast import ops  # noqa: F401  (registers them)
from palp_fast.reference.blockwise import quantise

SIZES = (300, 256, 5)
RATES = torch.tensor([1e-2, 0.9, 0.99, 1e-8, 0.1], dtype=torch.float64)  # lr, betas, eps, weight decay


def overload(name: str, backend: str):
    packet = getattr(torch.ops.palp_fast, name)
    return packet.reference if backend == "reference" else packet.default


def arguments(rule: str, quantised: bool) -> tuple:
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=draw) for size in SIZES]
    grads = [torch.randn(size, generator=draw) for size in SIZES]
    shadows = [torch.empty(SIZES[0], dtype=torch.bfloat16), *[torch.empty(0)] * 2]
    rows = sum(-(-size // 256) for size in SIZES)
    moments = []
    for signed in (True, False)[:2 if rule == "adamw" else 1]:
        values = torch.randn(rows, 256, generator=draw) if signed else torch.rand(rows, 256, generator=draw)
        moments.append(list(quantise(values, signed)) if quantised else [values])
    verdict = torch.tensor([0.5, 1.0])
    return params, grads, shadows, torch.zeros(len(SIZES)), *moments, verdict, RATES, 256


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_opcheck_of_the_rules(rule, quantised, backend):
    torch.library.opcheck(overload(rule, backend), arguments(rule, quantised))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [True, False])
def test_opcheck_of_the_norm(scaled, backend):
    scaler = (torch.tensor(8.0), torch.tensor(0.0)) if scaled else (None, None)
    torch.library.opcheck(overload("grad_norm", backend), (arguments("adamw", True)[1], *scaler, 1.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_compiled_function_changes_what_the_eager_one_does(rule, backend):
    def step(*args):
        _, verdict = overload("grad_norm", backend)(args[1], None, None, 1.0)
        overload(rule, backend)(*args[:-3], verdict, *args[-2:])
        return verdict

    eager, compiled = arguments(rule, True), arguments(rule, True)
    verdict = step(*eager)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled), verdict)
    for left, right in zip(eager[:-3], compiled[:-3]):
        torch.testing.assert_close(left, right)
    assert eager[3].tolist() == [1.0] * len(SIZES) and verdict[0] < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_verdict_forbids(backend):
    before, after = arguments("adamw", True), arguments("adamw", True)
    after[-3][1] = 0.0
    overload("adamw", backend)(*after)
    for left, right in zip(before[:2] + before[3:6], after[:2] + after[3:6]):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
