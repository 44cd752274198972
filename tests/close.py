"""The one comparison helper: relative L2 error against a truth, with figures that say how two tensors differ."""

import os
import shutil

import pytest
import torch
from torch import Tensor

from palp_fast import backend, ops  # noqa: F401  (ops loads the library)

_compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
_reasons = (backend.obstacle(op, torch.device("cpu"), "cpu") for op in backend.COMPILED["cpu"])
_obstacle = next(filter(None, _reasons), None)
# Where a compiler is found, these tests run all the same and fail with the reason: there the library must serve.
NEEDS_LIBRARY = pytest.mark.skipif(_obstacle is not None and _compiler is None, reason=f"no C++ compiler: {_obstacle}")
BACKENDS = ["reference", pytest.param("cpu", marks=NEEDS_LIBRARY)]
# With PALP_FAST_NEED_GPU=1 (make gpu) a missing device is a failure, not a reason to skip.
_without_gpu = not torch.cuda.is_available() and os.environ.get("PALP_FAST_NEED_GPU") != "1"
NEEDS_CUDA = pytest.mark.skipif(_without_gpu, reason="no CUDA device")
_cuda_note = backend.LIBRARY_FOLDER / "build_cuda.txt"
_cuda_note = _cuda_note.read_text() if _cuda_note.exists() else ""
# A build that was told to do without, or had no nvcc, is no failure; one that failed is.
NEEDS_CUDA_LIBRARY = pytest.mark.skipif(
    "PALP_FAST_CUDA=0" in _cuda_note or "nvcc was not found" in _cuda_note, reason=f"not built: {_cuda_note.strip()}")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


def library_on(device: str) -> str:
    """The backend whose compiled library serves a device; the test is skipped where it cannot be built."""
    if device == "cpu" and _obstacle is not None and _compiler is None:
        pytest.skip(f"no C++ compiler: {_obstacle}")
    return device


def relative(actual: Tensor, truth: Tensor) -> float:
    """|actual - truth| / |truth|, in fp64; |actual| itself where the truth is 0."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    return ((actual - truth).norm() / (truth.norm() or 1.0)).item()


def describe(actual: Tensor, truth: Tensor) -> str:
    """Relative L2, cosine, bias and greatest difference, for a failure message."""
    actual, truth = actual.detach().double().cpu().flatten(), truth.detach().double().cpu().flatten()
    cosine = torch.nn.functional.cosine_similarity(actual, truth, dim=0).item()
    difference = actual - truth
    return (
        f"relative L2 {relative(actual, truth):.3e}, cosine {cosine:.9f}, bias {difference.mean():.3e}, "
        f"greatest difference {difference.abs().max():.3e}"
    )


def assert_close(actual: Tensor, truth: Tensor, tolerance: float, name: str = "result") -> None:
    """Fail unless shapes agree, `actual` is finite and its relative L2 error is within the tolerance."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert actual.isfinite().all(), f"{name}: not finite"
    assert relative(actual, truth) <= tolerance, f"{name}: {describe(actual, truth)}, allowed {tolerance:.1e}"


def assert_as_good(actual: Tensor, peer: Tensor, truth: Tensor, floor: float, name: str = "result") -> None:
    """Fail if the error against the fp64 truth exceeds twice that of a PyTorch version of equal dtype, plus a floor."""
    assert_close(actual, truth, 2 * relative(peer, truth) + floor, name)


def cancellation(terms: Tensor, left: Tensor) -> float:
    """|terms| / |left|, at least 1: how much less exact a sum of `terms`, of which `left` is left, is than they."""
    return max(1.0, (terms.double().norm() / left.double().norm()).item())
