"""Memory of the CPU library's results: used again when a result is gone, never while it lives."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from close import NEEDS_LIBRARY, library_on

from palp_fast import functional

SHAPE = (4, 4, 32, 32)  # 64 KiB: the least that is kept
pytestmark = NEEDS_LIBRARY


def result(value: float) -> torch.Tensor:
    """Full of `value`: nothing is left of noise and prediction at alpha_bar = 1."""
    images = [torch.full(SHAPE, value), torch.ones(SHAPE), torch.ones(SHAPE)]
    return functional.renoise(*images, torch.ones(SHAPE[0]), copies=2, backend=library_on("cpu"))


def test_memory_of_a_result_that_is_gone_is_used_again():
    # Before 2.11 torch cannot tell that a tensor is gone.
    if sys.platform != "linux" or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("needs Linux and torch 2.11")
    first = result(1.0)
    address = first.data_ptr()
    del first
    assert result(2.0).data_ptr() == address


def test_a_view_keeps_the_memory():
    first = result(1.0)
    view = first[0, 0]
    del first
    others = [result(value) for value in (2.0, 3.0)]
    assert (view == 1).all() and all((other == value).all() for other, value in zip(others, (2.0, 3.0)))


def test_results_that_live_share_nothing():
    results = [result(float(value)) for value in range(8)]
    assert len({each.data_ptr() for each in results}) == 8
    assert all((each == value).all() for value, each in enumerate(results))


def test_threads_get_memory_of_their_own():
    def right(value: int) -> bool:
        return all((result(float(value)) == value).all().item() for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(8)))


def test_gradients_are_not_written_over():
    pred = torch.randn(SHAPE, requires_grad=True)
    rest = [torch.randn(SHAPE) for _ in range(5)]

    def gradient() -> torch.Tensor:
        loss, _ = functional.score_residual(pred, *rest, alpha=15.0, beta=7.5, backend=library_on("cpu"))
        return torch.autograd.grad(loss, pred)[0]

    first = gradient()
    kept = first.clone()
    others = [gradient() for _ in range(4)]
    assert all(torch.equal(each, kept) for each in (first, *others))
