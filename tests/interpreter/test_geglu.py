"""geglu's kernels against the reference."""

import pytest
import torch
from close import assert_close

from palp_fast import functional as PF

ROWS, COLUMNS = 4, 256  # of a tile


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, ROWS + 1])
@pytest.mark.parametrize("width", [1, 5, COLUMNS - 1, COLUMNS, COLUMNS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradient(rows, width, dtype):
    x = (3 * torch.randn(2, rows, 2 * width, dtype=dtype)).requires_grad_()
    grad = torch.randn(2, rows, width, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    wanted, found = PF.geglu(x, backend="reference"), PF.geglu(x, backend="triton")
    assert_close(found, wanted, tolerance)
    (wanted,), (found,) = torch.autograd.grad(wanted, x, grad), torch.autograd.grad(found, x, grad)
    assert_close(found, wanted, tolerance)


def test_strided_and_empty_input():
    x = torch.randn(6, 3, 10).transpose(0, 1)
    assert_close(PF.geglu(x, backend="triton"), PF.geglu(x, backend="reference"), 1e-6)
    assert PF.geglu(torch.empty(0, 8), backend="triton").shape == (0, 4)


def test_gradcheck():
    x = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: PF.geglu(x, backend="triton"), x)
