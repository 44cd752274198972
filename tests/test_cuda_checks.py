"""Bad arguments of the CUDA library, without a GPU: its kernels, asked for by dispatch key, get tensors elsewhere."""

import pytest
import torch

from close import NEEDS_CUDA_LIBRARY
from palp_fast import ops  # noqa: F401  (loads the library)

pytestmark = NEEDS_CUDA_LIBRARY

SHAPE = (3, 4, 6, 7)
X = torch.ones(SHAPE)
VECTOR = torch.full((3,), 0.5)
FLOAT = torch.float32

CALLS = {
    "renoise": ((X, X, X, VECTOR, None, 2, None), "x_t"),
    "renoise_bwd": ((X, VECTOR, VECTOR, 1, FLOAT, FLOAT, FLOAT, FLOAT), "grad"),
    "score_combination": ((X, X, [X, X], [1.0, -1.0], None, 0.5, VECTOR, None, X[:, :1]), "pred"),
    "score_combination_bwd": ((torch.tensor(1.0), X, FLOAT), "gradient"),
}


def on_cuda(name: str, arguments: tuple):
    """The CUDA kernel of this operator, whatever the tensors' device."""
    op = getattr(torch.ops.palp_fast, name).default
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


def moved(value, device: str, dtype: torch.dtype | None = None):
    if torch.is_tensor(value):
        return value.to(device, dtype)
    return [moved(item, device, dtype) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_elsewhere_are_refused(name, dtype):
    arguments, first = CALLS[name]
    with pytest.raises(RuntimeError, match=f"{first} is not on a cuda device"):
        on_cuda(name, tuple(moved(value, "cpu", dtype) for value in arguments))


@pytest.mark.parametrize("name", CALLS)
def test_meta_and_empty_tensors_are_refused(name):
    arguments, first = CALLS[name]
    for device in ("cpu", "meta"):
        nothing = tuple(value[:0] if torch.is_tensor(value) and value.dim() else value for value in arguments)
        with pytest.raises(RuntimeError, match=f"{first} is not on a cuda device"):
            on_cuda(name, tuple(moved(value, device) for value in nothing))
