"""lora_linear: gradients, half-precision bases, per-sample scale, and an update that rounding must not swallow."""

import pytest
import torch
from close import assert_as_good, assert_close, relative
from torch.utils.flop_counter import FlopCounterMode

from palp_fast import functional as PF

D_IN, D_OUT, RANK = 24, 40, 3


def make(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(x_dtype, lora_dtype=torch.float32, rows=(4, 7)):
    x, weight, bias = (make(s, x_dtype, i) for i, s in enumerate([(*rows, D_IN), (D_OUT, D_IN), (D_OUT,)]))
    return x, weight, bias, make((RANK, D_IN), lora_dtype, 4), make((D_OUT, RANK), lora_dtype, 5)


def formula(x, weight, bias, lora_a, lora_b, scale, dtype=torch.float64):
    """The definition as it stands, all in one dtype, for autograd."""
    x, weight, bias, lora_a, lora_b = (value.to(dtype) for value in (x, weight, bias, lora_a, lora_b))
    if isinstance(scale, torch.Tensor):
        scale = scale.to(dtype).view(-1, *([1] * (x.dim() - 1)))
    return x @ weight.T + bias + scale * (x @ lora_a.T @ lora_b.T)


def with_gradients(function, values, upstream):
    """[output, gradient to x, to lora_a, to lora_b]."""
    x, weight, bias, lora_a, lora_b = values
    leaves = [value.detach().requires_grad_() for value in (x, lora_a, lora_b)]
    out = function(leaves[0], weight, bias, *leaves[1:])
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


SCALES = [1.0, 0.3, torch.tensor([0.0, 1.0, 0.5, -2.0])]


@pytest.mark.parametrize("scale", SCALES, ids=["one", "number", "per sample"])
@pytest.mark.parametrize("rows", [(4,), (4, 7), (4, 2, 3), (4, 0)])
def test_gradcheck(scale, rows):
    x, weight, bias, lora_a, lora_b = inputs(torch.float64, torch.float64, rows)
    leaves = [value.requires_grad_() for value in (x, lora_a, lora_b)]
    assert torch.autograd.gradcheck(lambda x, a, b: PF.lora_linear(x, weight, bias, a, b, scale), leaves)
    assert torch.autograd.gradcheck(lambda x, a, b: PF.lora_linear(x, weight, None, a, b, scale), leaves)


@pytest.mark.parametrize("scale", SCALES, ids=["one", "number", "per sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, scale):
    values, upstream = inputs(dtype), make((4, 7, D_OUT), dtype, 6)
    made = with_gradients(lambda *v: PF.lora_linear(*v, scale), values, upstream)
    peer = with_gradients(lambda *v: formula(*v, scale, dtype), values, upstream)
    truth = with_gradients(lambda *v: formula(*v, scale), [v.double() for v in values], upstream)
    assert [value.dtype for value in made] == [dtype, dtype, torch.float32, torch.float32]
    for name, mine, its, true in zip(("output", "x", "lora_a", "lora_b"), made, peer, truth):
        assert_as_good(mine, its, true, 1e-6, name)
    # The low-rank gradients are fp32 sums of exact products: no 16-bit rounding in them.
    assert_close(made[3], truth[3], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_update_is_not_rounded_away(dtype):
    """Merging B A into a 16-bit weight loses much of it, as measured below. The product here must keep it."""
    x, weight, _, lora_a, lora_b = inputs(dtype)
    weight, lora_b = weight * 0, 1e-4 * lora_b
    x = x.requires_grad_()
    update = formula(x, weight, torch.zeros(D_OUT), lora_a, lora_b, 1.0)
    assert_close(PF.lora_linear(x, weight, None, lora_a, lora_b), update, 4e-3)
    base = make((D_OUT, D_IN), dtype, 9)
    merged = (base.double() + lora_b.double() @ lora_a.double()).to(dtype).double() - base.double()
    assert relative(merged, lora_b.double() @ lora_a.double()) > 0.1
    out = PF.lora_linear(x, base, None, lora_a, lora_b)
    (d_x,) = torch.autograd.grad(out.float().sum(), x)
    assert d_x.dtype == dtype


def test_scale_zero_is_the_frozen_projection_exactly():
    x, weight, bias, lora_a, lora_b = inputs(torch.float32)
    base = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(PF.lora_linear(x, weight, bias, lora_a, lora_b, 0.0), base)
    mixed = PF.lora_linear(x, weight, bias, lora_a, lora_b, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert torch.equal(mixed[0], base[0]) and torch.equal(mixed[2], base[2]) and not torch.equal(mixed[1], base[1])


def test_frozen_parameters_get_no_gradient_and_unwanted_ones_none():
    x, weight, bias, lora_a, lora_b = inputs(torch.float32)
    weight.requires_grad_(), bias.requires_grad_(), lora_b.requires_grad_()
    PF.lora_linear(x, weight, bias, lora_a, lora_b).sum().backward()
    assert weight.grad is None and bias.grad is None and x.grad is None and lora_a.grad is None
    assert lora_b.grad is not None


def test_strided_input():
    x, weight, bias, lora_a, lora_b = inputs(torch.float32)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    out = PF.lora_linear(strided, weight, bias, lora_a, lora_b)
    assert_close(out, PF.lora_linear(x, weight, bias, lora_a, lora_b), 1e-6)
    assert out.is_contiguous()


def test_autocast_runs_in_its_dtype():
    x, weight, bias, lora_a, lora_b = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = PF.lora_linear(x, weight, bias, lora_a, lora_b)
    assert out.dtype == torch.bfloat16
    assert_close(out, formula(x, weight, bias, lora_a, lora_b, 1.0), 1e-2)


@pytest.mark.parametrize("gate", [None, SCALES[2]])
def test_opcheck(gate):
    x, weight, bias, lora_a, lora_b = inputs(torch.float32)
    leaves = (x.requires_grad_(), weight, bias, lora_a.requires_grad_(), lora_b.requires_grad_())
    for overload in ("default", "reference"):
        torch.library.opcheck(getattr(torch.ops.palp_fast.lora_linear, overload), (*leaves, None, 0.5, gate))


def test_compiles_in_one_graph():
    x, weight, bias, lora_a, lora_b = inputs(torch.float32)

    def twice(x, scale):
        return 2 * PF.lora_linear(x, weight, bias, lora_a, lora_b, scale)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for scale in (0.5, SCALES[2]):
        assert_close(compiled(x, scale), twice(x, scale), 1e-6)


@pytest.mark.parametrize("need_x", [False, True])
def test_counted_work_is_that_of_the_plain_products_and_one_more(need_x):
    x, weight, _, lora_a, lora_b = inputs(torch.float32)
    x.requires_grad_(need_x), lora_a.requires_grad_(), lora_b.requires_grad_()

    def plain():
        return x @ weight.T + x @ lora_a.T @ lora_b.T

    counts = []
    for function in (plain, lambda: PF.lora_linear(x, weight, None, lora_a, lora_b)):
        with FlopCounterMode(display=False) as forward:
            out = function()
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    again = 2 * x.numel() * RANK  # x A^T, which is not kept
    assert counts[1] == (counts[0][0], counts[0][1] + again) and again > 0


def test_keeps_x_alone():
    x, weight, bias, lora_a, lora_b = inputs(torch.float16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        PF.lora_linear(x, weight, bias, lora_a.requires_grad_(), lora_b.requires_grad_())
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in (x, weight, lora_a, lora_b)]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": torch.ones(4, 7, D_IN + 1)}, "x has shape"),
        ({"x": torch.ones(4, 7, D_IN, dtype=torch.int64)}, "x has dtype"),
        ({"weight": torch.ones(D_OUT, D_IN, dtype=torch.int8)}, "weight has dtype"),
        ({"weight": torch.ones(D_OUT)}, "weight has shape"),
        ({"bias": torch.ones(D_IN)}, "bias has shape"),
        ({"lora_a": torch.ones(RANK + 1, D_IN)}, "lora_a has shape"),
        ({"lora_b": torch.ones(D_IN, RANK)}, "lora_b has shape"),
        ({"lora_scale": torch.ones(3)}, "lora_scale has shape"),
        ({"lora_scale": float("nan")}, "lora_scale"),
        ({"lora_scale": "1"}, "lora_scale"),
        ({"lora_a": torch.ones(RANK, D_IN, device="meta")}, "lora_a is on meta"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_arguments_are_named(change, name):
    arguments = dict(zip(("x", "weight", "bias", "lora_a", "lora_b"), inputs(torch.float32)))
    with pytest.raises((ValueError, TypeError), match=name):
        PF.lora_linear(**{**arguments, **change})


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(RuntimeError, match="no C.. version of lora_linear"):
        PF.lora_linear(*inputs(torch.float32), backend="cpu")
