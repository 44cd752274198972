"""Every operator of the library, one sample each: torch's checks of schema and shapes, compilation, what it costs."""

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from close import BACKENDS
from palp_fast import flops, ops  # noqa: F401  (ops registers the operators)
from palp_fast.reference.blockwise import quantise

FLOAT = torch.float32
SHAPE = (3, 4, 6, 7)
SIZES = (300, 256, 5)
RATES = torch.tensor([1e-2, 0.9, 0.99, 1e-8, 0.1], dtype=torch.float64)  # lr, betas, eps, weight decay
# Called with tables of addresses by the optimizers alone, outside of traced code; tests/test_optim.py is its test.
BY_ADDRESS = {"optimizer_step"}


def images(count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=draw) for _ in range(count)]


def vector() -> torch.Tensor:
    return torch.tensor([0.2, 0.5, 0.9])


def number(value: int) -> torch.Tensor:
    return torch.tensor(value)


def update(rule: str, quantised: bool) -> tuple:
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=draw) for size in SIZES]
    grads = [torch.randn(size, generator=draw) for size in SIZES]
    shadows = [torch.empty(SIZES[0], dtype=torch.bfloat16), *[torch.empty(0)] * 2]
    rows = sum(-(-size // 256) for size in SIZES)
    moments = []
    for signed in (True, False)[:2 if rule == "adamw" else 1]:
        values = torch.randn(rows, 256, generator=draw) if signed else torch.rand(rows, 256, generator=draw)
        moments.append(list(quantise(values, signed)) if quantised else [values])
    return params, grads, shadows, torch.zeros(len(SIZES)), *moments, torch.tensor([0.5, 1.0]), RATES, 256


def lora() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (3, 5, 8), "weight": (6, 8), "bias": (6,), "lora_a": (2, 8), "lora_b": (6, 2)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def lora_backward() -> tuple:
    some = lora()
    low = some["x"] @ some["lora_a"].T
    return torch.ones(3, 5, 6), some["x"], low, some["weight"], some["lora_a"], some["lora_b"], 0.5, None, True


SAMPLES = {
    "score_combination": lambda: (*images(2), images(4)[2:], [1.0, -1.0], None, 0.5, vector(), None, None),
    "score_combination_bwd": lambda: (torch.tensor(2.0), *images(1), torch.bfloat16),
    "renoise": lambda: (*images(3), vector(), vector().flip(0), 2, None),
    "renoise_bwd": lambda: (torch.ones(6, *SHAPE[1:]), vector(), None, 2, FLOAT, FLOAT, torch.bfloat16, FLOAT),
    "add_noise": lambda: (*images(1), number([0, 1, 2]), vector(), number(1), number(2), number(3), 0),
    "add_noise_bwd": lambda: (*images(1), number([0, 1, 2]), vector()),
    "timestep_sample": lambda: (torch.ones(50), torch.ones(10).double(), torch.ones(10).double(), number(1), number(0),
                                7, 3, 3, 2, 0.1),
    "timestep_update": lambda: (torch.zeros(10).double(), torch.zeros(10).double(), number([1, 30, 49]), vector(), 50,
                                0.999),
    "philox_words": lambda: (torch.arange(8).view(2, 4), number([1, 2])),
    "lora_linear": lambda: (*lora().values(), 0.5, None),
    "lora_linear_bwd": lora_backward,
    "grad_norm": lambda: (update("adamw", True)[1], torch.tensor(8.0), torch.tensor(0.0), 1.0),
    "adamw": lambda: update("adamw", True),
    "adamw, 32 bits": lambda: update("adamw", False),
    "lion": lambda: update("lion", True),
    "write_words": lambda: (torch.zeros(3, dtype=torch.int64), [1, 2, 3]),
}


def registered() -> set[str]:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("palp_fast::")}
    return {name.partition(".")[0] for name in names}


def overload(sample: str, backend: str):
    packet = getattr(torch.ops.palp_fast, sample.partition(",")[0])
    return packet.reference if backend == "reference" else packet.default


def tensors(value) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


def test_every_operator_has_a_sample():
    assert registered() == {name.partition(",")[0] for name in SAMPLES} | BY_ADDRESS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, backend):
    torch.library.opcheck(overload(name, backend), SAMPLES[name]())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAMPLES)
def test_compiled_whole_it_does_what_it_does_eagerly(name, backend):
    torch.compiler.reset()  # every sample is another compilation of the same function
    op, eager, compiled = overload(name, backend), SAMPLES[name](), SAMPLES[name]()
    wanted = op(*eager)
    found = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")(*compiled)
    for left, right in zip(tensors([found, compiled]), tensors([wanted, eager]), strict=True):
        torch.testing.assert_close(left, right, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_verdict_forbids_an_update(rule, backend):
    before, after = update(rule, True), update(rule, True)
    after[-3][1] = 0.0
    overload(rule, backend)(*after)
    for left, right in zip(tensors(before[:2] + before[3:-3]), tensors(after[:2] + after[3:-3]), strict=True):
        assert torch.equal(left, right)


def test_every_operator_has_a_flop_formula():
    assert all(getattr(torch.ops.palp_fast, name) in flop_registry for name in registered())


def test_bytes_moved_are_those_counted_by_hand():
    image, count = 4 * 4 * 6 * 7 * 3, len(SIZES)
    for name, by_hand in (
        ("score_combination", 4 * image + 12 + image + 4 + 36),  # two images, two predictions, weights; three results
        ("renoise", 3 * image + 24 + 2 * image),
        ("renoise_bwd", 2 * image + 12 + 2 * image + image // 2),
        ("write_words", 48),
    ):
        op, args = overload(name, "reference"), SAMPLES[name]()
        assert flops.bytes_moved(op, args, op(*args)) == by_hand, name
    args = update("lion", True)
    blocks, elements = 4, sum(SIZES)
    state = blocks * (256 + 4)
    by_hand = 2 * 4 * elements + 4 * elements + 2 * 2 * 300 + 2 * 4 * count + 2 * state + 8 + 40
    assert flops.bytes_moved(overload("lion", "reference"), args, None) == by_hand
