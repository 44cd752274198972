"""Every operator of the library, one sample each: torch's checks of schema and shapes, compilation, what it costs."""

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from close import BACKENDS
from palp_fast import flops
from samples import BY_ADDRESS, SAMPLES, SIZES, registered, tensors, update


def overload(sample: str, backend: str):
    packet = getattr(torch.ops.palp_fast, sample.partition(",")[0])
    return packet.reference if backend == "reference" else packet.default


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
