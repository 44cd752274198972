"""lora_projections: every projection as lora_linear makes it, gradients, shadows of A, what it keeps, bad input."""

import pytest
import torch
from close import assert_as_good, assert_close
from torch.utils.flop_counter import FlopCounterMode

from palp_fast import functional as PF

D_IN, D_OUT, RANK = 24, 40, 3
GATE = torch.tensor([0.0, 1.0, 0.5, -2.0])


def make(count, dtype=torch.float32, lora_dtype=torch.float32):
    """x, the weights, the pairs, one upstream gradient per projection."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    pairs = [(normal(RANK, D_IN, dtype=lora_dtype), normal(D_OUT, RANK, dtype=lora_dtype)) for _ in range(count)]
    weights, upstream = ([normal(*shape) for _ in range(count)] for shape in ((D_OUT, D_IN), (4, 7, D_OUT)))
    return normal(4, 7, D_IN), weights, pairs, upstream


def plain(x, weights, pairs, scale):
    """The formula in the dtype of its inputs, for autograd."""
    if isinstance(scale, torch.Tensor):
        scale = scale.to(x.dtype).view(-1, 1, 1)
    return [x @ weight.T + scale * (x @ a.to(x.dtype).T @ b.to(x.dtype).T) for weight, (a, b) in zip(weights, pairs)]


def packed(x, weights, pairs, scale):
    return PF.lora_projections(x, PF.Projections.pack(weights, pairs), scale)


def with_gradients(function, x, weights, pairs, upstream, scale):
    """[outputs, gradients to x and to every factor]."""
    x = x.detach().requires_grad_()
    pairs = [tuple(factor.detach().requires_grad_() for factor in pair) for pair in pairs]
    out = function(x, weights, pairs, scale)
    return [*out, *torch.autograd.grad(out, [x, *sum(pairs, ())], [grad.to(y.dtype) for grad, y in zip(upstream, out)])]


@pytest.mark.parametrize("scale", [0.3, GATE], ids=["number", "per sample"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, count, scale):
    x, weights, pairs, upstream = make(count, dtype)
    mine = with_gradients(packed, x, weights, pairs, upstream, scale)
    peer = with_gradients(plain, x, weights, pairs, upstream, scale)
    wide = [w.double() for w in weights], [(a.double(), b.double()) for a, b in pairs]
    truth = with_gradients(plain, x.double(), *wide, upstream, scale)
    assert [value.dtype for value in mine] == [dtype] * (count + 1) + [torch.float32] * 2 * count
    for i, (found, its, true) in enumerate(zip(mine, peer, truth, strict=True)):
        assert_as_good(found, its, true, 1e-6, f"result {i}")


@pytest.mark.parametrize("count", [1, 3])
def test_gradcheck(count):
    x, weights, pairs, _ = make(count, torch.float64, torch.float64)
    leaves = [value.requires_grad_() for value in (x[:, :2].clone(), *sum(pairs, ()))]

    def run(x, *factors):
        return packed(x, weights, list(zip(factors[::2], factors[1::2])), GATE)

    assert torch.autograd.gradcheck(run, leaves)


def test_projections_without_a_gradient_count_as_zero():
    x, weights, pairs, upstream = make(3)
    leaf, a, b = (value.detach().requires_grad_() for value in (x, *pairs[1]))
    out = packed(leaf, weights, [pairs[0], (a, b), pairs[2]], 0.5)[1]
    wanted = with_gradients(plain, x, weights[1:2], pairs[1:2], upstream[1:2], 0.5)
    for found, truth in zip(torch.autograd.grad(out, (leaf, a, b), upstream[1]), wanted[1:]):
        assert_close(found, truth, 1e-6)


def test_shadows_stand_for_the_factors_in_the_dtype_of_x():
    x, weights, pairs, _ = make(3, torch.float16)
    packed = PF.Projections.pack(weights, pairs, shadows=True)
    assert packed.packed.shape == (3 * (D_OUT + RANK), D_IN)
    rounded = [(a.half().float(), b) for a, b in pairs]
    truth = plain(x.double(), [w.double() for w in weights], rounded, 1)
    for found, wanted in zip(PF.lora_projections(x, packed), truth):
        assert_close(found, wanted, 1e-3)
    for factor, shadow in packed.shadows().items():
        factor.mul_(2)
        assert not torch.equal(factor.half(), shadow)
    packed.refresh()
    assert all(torch.equal(factor.half(), shadow) for factor, shadow in packed.shadows().items())
    wide = PF.lora_projections(x.float(), packed)
    for found, wanted in zip(wide, plain(x.float(), [w.float() for w in weights], pairs, 1)):
        assert_close(found, wanted, 1e-6)


def test_shadows_as_an_optimizer_writes_them():
    from palp_fast.optim import AdamW8bit

    _, weights, pairs, _ = make(3, torch.bfloat16)
    pairs = [tuple(torch.nn.Parameter(factor) for factor in pair) for pair in pairs]
    packed = PF.Projections.pack(weights, pairs, shadows=True)
    optimizer = AdamW8bit(sum(pairs, ()), lr=0.1, shadows=packed.shadows())
    for factor in sum(pairs, ()):
        factor.grad = torch.ones_like(factor)
    optimizer.step()
    assert all(torch.equal(factor.bfloat16(), shadow) for factor, shadow in packed.shadows().items())


def test_keeps_x_alone():
    x, weights, pairs, _ = make(3)
    pairs = [tuple(factor.requires_grad_() for factor in pair) for pair in pairs]
    weights, kept = PF.Projections.pack(weights, pairs), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        PF.lora_projections(x, weights)
    held = {value.untyped_storage().data_ptr() for value in (weights.packed, *sum(pairs, ()))}
    assert [y.data_ptr() for y in kept if y.untyped_storage().data_ptr() not in held] == [x.data_ptr()]


def test_counted_work_is_that_of_every_lora_linear():
    x, weights, pairs, upstream = make(3)
    pairs = [tuple(factor.requires_grad_() for factor in pair) for pair in pairs]
    counts = []
    for run in (lambda: packed(x, weights, pairs, 1.0),
                lambda: [PF.lora_linear(x, weight, None, *pair) for weight, pair in zip(weights, pairs)]):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(run(), upstream)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_autocast_and_compilation():
    x, weights, pairs, _ = make(2)
    weights = PF.Projections.pack(weights, pairs)
    with torch.autocast("cpu", torch.bfloat16):
        out = PF.lora_projections(x, weights)
    assert all(torch.equal(y, wanted) for y, wanted in zip(out, PF.lora_projections(x.bfloat16(), weights)))
    compiled = torch.compile(lambda x: PF.lora_projections(x, weights, GATE), fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(x), PF.lora_projections(x, weights, GATE)):
        assert_close(found, wanted, 1e-6)


def test_bad_arguments_are_named():
    x, weights, pairs, _ = make(2)
    ready = PF.Projections.pack(weights, pairs)
    with pytest.raises(ValueError, match=r"x has shape \[4, 25\]: allowed is \[..., 24\], the width of weights"):
        PF.lora_projections(torch.zeros(4, 25), ready)
    with pytest.raises(ValueError, match=r"lora_scale has shape \[3\]"):
        PF.lora_projections(x, ready, torch.ones(3))
    with pytest.raises(ValueError, match="0 weights with 0 pairs: allowed are one to three"):
        PF.Projections.pack([], [])
    with pytest.raises(ValueError, match=r"weights\[1\] has shape \[41, 24\]: allowed is \[40, 24\]"):
        PF.Projections.pack([weights[0], torch.zeros(41, 24)], pairs)
    with pytest.raises(ValueError, match=r"pairs\[1\]\[0\] has shape \[2, 24\]: allowed is \[3, 24\]"):
        PF.Projections.pack(weights, [pairs[0], (torch.zeros(2, 24), torch.zeros(40, 2))])
    with pytest.raises(TypeError, match=r"pairs\[1\]\[1\] has dtype torch.float64: allowed is torch.float32"):
        PF.Projections.pack(weights, [pairs[0], (pairs[1][0], pairs[1][1].double())])
    with pytest.raises(RuntimeError, match="backend='cpu' cannot serve lora_projections"):
        PF.lora_projections(x, ready, backend="cpu")
