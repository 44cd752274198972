"""The same providers under pytest-benchmark: pytest bench --benchmark-only [-k "geglu and eager"].

A group for each layer, whose table has every provider's ratio to the fastest; PALP_FAST_BENCH=full for all layers. The
quick form: --benchmark-max-time 0.05 --benchmark-min-rounds 2 -k "not torch.compile".
"""

import os
from functools import lru_cache

import pytest
import torch

from bench import operators, run
from bench.core import Gate
from bench.machine import short

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    (operator, shape, operators.dtypes(operator, DEVICE)[0], provider)
    for operator in operators.load().values()
    for shape in list(operator.shapes)[: None if os.environ.get("PALP_FAST_BENCH") == "full" else 1]
    for provider in operator.providers()
]


@lru_cache(maxsize=1)
def gate(name, shape, dtype):
    """One for all providers of a layer, which come one after the other."""
    operator = operators.load()[name]
    return Gate(operator, operator.problem(shape, dtype, DEVICE), dtype)


@pytest.mark.parametrize(
    ("operator", "shape", "dtype", "provider"), CASES,
    ids=[f"{operator.name}-{shape}-{short(dtype)}-{provider}" for operator, shape, dtype, provider in CASES])
def test_provider(benchmark, operator, shape, dtype, provider):
    benchmark.group = f"{operator.name}: {shape}, {short(dtype)}"
    problem = operator.problem(shape, dtype, DEVICE)
    calls, problems = run.right(operator, problem, dtype, [provider], gate(operator.name, shape, dtype))
    if provider not in calls:
        status, note = problems[provider]
        (pytest.fail if status == "wrong" else pytest.skip)(note)

    def call():
        calls[provider]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
