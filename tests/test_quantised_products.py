"""Layers on quantised weights: as with the dequantised weight, to the bit; gradients; what they keep; compilation."""

import pytest
import torch
from attention_layer import GATE, HEADS, Layer
from close import assert_as_good, assert_close
from saved import saved, saved_bytes
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from palp_fast import functional as PF

FORMS = pytest.mark.parametrize("form", ["int8", "nf4"])
OPERATORS = ["linear", "lora_linear", "lora_projections", "conv2d", "conv2d, channels-last"]
EACH = pytest.mark.parametrize("name", OPERATORS)
D_IN, D_OUT, RANK = 72, 40, 3  # 72: a block of NF4 and an incomplete one
STRENGTH = torch.tensor([0.0, 1.0, -0.5])


def layer(name, dtype=torch.float32, factor_dtype=torch.float32):
    """(function of a weight and the leaves, its weights, its leaves)."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype, size=1.0):
        return (size * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)

    bias = normal(D_OUT)
    if name.startswith("conv2d"):
        weight, x = normal(D_OUT, 8, 3, 3, size=72**-0.5), normal(2, 8, 5, 6)
        if name.endswith("channels-last"):
            weight, x = (value.to(memory_format=torch.channels_last) for value in (weight, x))
        return lambda weights, x: PF.frozen_conv2d(x, weights[0], bias, 2, 1), [weight], [x]
    x, weights = normal(3, 4, D_IN), [normal(D_OUT, D_IN, size=D_IN**-0.5) for _ in range(3)]
    shapes = [(RANK, D_IN), (D_OUT, RANK)] * 3
    factors = [normal(*shape, dtype=factor_dtype, size=0.3) for shape in shapes]
    if name == "linear":
        return lambda weights, x: PF.frozen_linear(x, weights[0], bias), weights[:1], [x]
    if name == "lora_linear":
        run = lambda weights, x, *pair: PF.lora_linear(x, weights[0], bias, *pair, STRENGTH)  # noqa: E731
        return run, weights[:1], [x, *factors[:2]]

    def projections(weights, x, *factors):
        packed = PF.Projections.pack(weights, list(zip(factors[::2], factors[1::2])))
        return torch.cat(PF.lora_projections(x, packed, STRENGTH), dim=-1)

    return projections, weights, [x, *factors]


def results(function, leaves, upstream=None):
    """[output, gradients to the leaves]."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    upstream = torch.ones_like(out) if upstream is None else upstream.to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def prepared(name, form, *dtypes):
    """(function of the leaves on quantised weights, the same on dequantised ones, the leaves)."""
    run, weights, leaves = layer(name, *dtypes)
    quantised = [PF.quantise(weight, form) for weight in weights]
    plain = [weight.dequantise() for weight in quantised]
    return (lambda *leaves: run(quantised, *leaves)), (lambda *leaves: run(plain, *leaves)), leaves


@FORMS
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_on_the_dequantised_weight(name, form, dtype):
    ours, plain, leaves = prepared(name, form, dtype)
    found, wanted = results(ours, leaves), results(plain, leaves)
    assert found[0].dtype == dtype and found[0].stride() == wanted[0].stride()
    for mine, its in zip(found, wanted, strict=True):
        assert torch.equal(mine, its)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lora_linear_against_its_formula(form, dtype):
    """On the weight that the codes stand for, in fp64; the low-rank term is that of the factors."""
    _, (weight,), leaves = layer("lora_linear", dtype)
    weight = PF.quantise(weight, form)

    def plain(x, a, b):
        gate = STRENGTH.to(x.dtype).view(-1, 1, 1)
        return x @ weight.dequantise(x.dtype).T + gate * (x @ a.to(x.dtype).T @ b.to(x.dtype).T)

    upstream = torch.randn(3, 4, D_OUT)
    found = results(lambda *leaves: PF.lora_linear(leaves[0], weight, None, *leaves[1:], STRENGTH), leaves, upstream)
    peer, truth = results(plain, leaves, upstream), results(plain, [leaf.double() for leaf in leaves], upstream)
    # In 16 bits the truth has the weight unrounded, ours and PyTorch's have it rounded.
    for i, values in enumerate(zip(found, peer, truth, strict=True)):
        assert_as_good(*values, 1e-6, f"result {i}")


@FORMS
@EACH
def test_gradcheck(name, form):
    ours, _, leaves = prepared(name, form, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(ours, [leaf.requires_grad_() for leaf in leaves], fast_mode=True)


@FORMS
@EACH
def test_keeps_codes_and_scales_and_no_dequantised_weight(name, form):
    run, weights, leaves = layer(name)
    quantised = [PF.quantise(weight, form) for weight in weights]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    kept = saved(lambda: run(quantised, *leaves), *leaves)
    assert sum(tensor.nbytes for tensor in kept if tensor.dtype in (torch.int8, torch.uint8)) == sum(
        weight.codes.nbytes for weight in quantised)
    # Of numbers the scales alone, and the strength of each sample.
    floats = sum(tensor.nbytes for tensor in kept if tensor.dtype not in (torch.int8, torch.uint8))
    assert floats == sum(weight.scale.nbytes for weight in quantised) + STRENGTH.nbytes * name.startswith("lora")


@FORMS
@pytest.mark.parametrize(("rows", "width"), [(4096, 320), (256, 1280)])
def test_bytes_kept_at_sizes_of_sd(form, rows, width):
    with FakeTensorMode():
        weights = [PF.quantise(torch.empty(width, width, dtype=torch.float16), form) for _ in range(4)]
        pairs = [(torch.empty(32, width).requires_grad_(), torch.empty(width, 32).requires_grad_()) for _ in range(4)]
        names = ("q", "k", "v", "out")
        packed = PF.AttentionWeights.pack(dict(zip(names, weights)), dict(zip(names, pairs)))
        x = torch.empty(1, rows, width, dtype=torch.float16, requires_grad=True)
        held = [*sum(pairs, ())]
        for weight in (packed.inputs[0].packed, packed.out):
            held += [weight.codes, weight.scale]
        assert saved_bytes(lambda: PF.lora_attention(x, None, packed, 8), *held) <= 5.06 * 2 * rows * width


@FORMS
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form_of_layer", ["self", "shared", "kv"])
def test_lora_attention(form_of_layer, recompute, form):
    made = Layer(form_of_layer)
    quantised = {name: PF.quantise(weight, form) for name, weight in made.weights.items()}
    names = made.names()[len(made.inputs)::2]

    def run(weights, *leaves):
        values = dict(zip(made.names(), leaves))
        lora = {name: (values[name, 0], values[name, 1]) for name, _ in names}
        packed = PF.AttentionWeights.pack({name: weights[name] for name, _ in names}, lora, made.bias,
                                          cross=form_of_layer == "shared")
        kv = (values["k"], values["v"]) if form_of_layer == "kv" else None
        return PF.lora_attention(values["x"], values.get("context"), packed, HEADS, kv=kv, kv_index=made.index,
                                 residual=values["residual"], lora_scale=GATE, recompute=recompute)

    plain = {name: weight.dequantise() for name, weight in quantised.items()}
    found, wanted = (results(lambda *leaves: run(weights, *leaves), made.leaves(), made.upstream)
                     for weights in (quantised, plain))
    for mine, its in zip(found, wanted, strict=True):
        assert torch.equal(mine, its)


@FORMS
def test_shadows_beside_quantised_weights(form):
    _, weights, (x, *factors) = layer("lora_projections", torch.float16)
    pairs = list(zip(factors[::2], factors[1::2]))
    packed = PF.Projections.pack([PF.quantise(weight, form) for weight in weights], pairs, shadows=True)
    assert packed.shadow.dtype == torch.float16 and packed.shadow.shape == (3 * RANK, D_IN)
    rounded = [(a.half().float(), b) for a, b in pairs]
    wanted = PF.lora_projections(x, PF.Projections.pack([PF.quantise(weight, form) for weight in weights], rounded))
    assert all(map(torch.equal, PF.lora_projections(x, packed), wanted))
    for factor, shadow in packed.shadows().items():
        factor.mul_(2)
        assert not torch.equal(factor.half(), shadow)
    packed.refresh()
    assert all(torch.equal(factor.half(), shadow) for factor, shadow in packed.shadows().items())


@FORMS
@EACH
def test_autocast_and_checkpointing(name, form):
    ours, _, leaves = prepared(name, form)
    half, _, half_leaves = prepared(name, form, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(*leaves)
    assert found.dtype == torch.bfloat16
    assert_close(found, half(*half_leaves), 2e-2)
    wanted = results(ours, leaves)
    again = results(lambda *leaves: checkpoint(ours, *leaves, use_reentrant=False), leaves)
    assert all(map(torch.equal, again, wanted))


@FORMS
@EACH
def test_compiles_in_one_graph(name, form):
    ours, _, leaves = prepared(name, form)
    torch.compiler.reset()
    twice = lambda *leaves: 2 * ours(*leaves)  # noqa: E731
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(results(compiled, leaves), results(twice, leaves), strict=True):
        assert_close(found, wanted, 1e-6)


def test_compiles_with_the_weight_made_inside():
    """As a module does that holds codes and scale as buffers."""
    _, (weight,), (x,) = layer("linear")
    made = PF.quantise(weight, "nf4")

    def run(x, codes, scale):
        return PF.frozen_linear(x, PF.QuantisedWeight(codes, scale, (D_OUT, D_IN)))

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, made.codes, made.scale), run(x, made.codes, made.scale))


@FORMS
@EACH
def test_counted_work_is_that_on_plain_weights(name, form):
    counts = []
    for run in prepared(name, form)[:2]:
        leaves = [leaf.requires_grad_() for leaf in layer(name)[2]]
        with FlopCounterMode(display=False) as counter:
            run(*leaves).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_weights_that_do_not_fit_are_named():
    weight, pair = PF.quantise(torch.randn(6, 8), "int8"), (torch.randn(2, 8), torch.randn(6, 2))
    with pytest.raises(ValueError, match=r"x has shape \[3, 7\]: allowed is \[..., 8\], the width of weight"):
        PF.frozen_linear(torch.zeros(3, 7), weight)
    with pytest.raises(ValueError, match="weight is on meta"):
        PF.frozen_linear(torch.zeros(3, 8), weight.to("meta"))
    with pytest.raises(ValueError, match=r"weight has shape \[6, 8\]: allowed is \[d_out, 8 / groups, h, w\]"):
        PF.frozen_conv2d(torch.zeros(1, 8, 5, 5), weight)
    with pytest.raises(ValueError, match=r"weight has shape \[6, 2, 3, 3\]: allowed is a matrix"):
        PF.lora_linear(torch.zeros(3, 8), PF.quantise(torch.randn(6, 2, 3, 3), "nf4"), None, *pair)
    with pytest.raises(TypeError, match=r"lora_a=QuantisedWeight\(int8, shape=\[6, 8\]\): allowed is a floating"):
        PF.lora_linear(torch.zeros(3, 8), weight, None, weight, pair[1])
    with pytest.raises(TypeError, match=r"weights\[1\] is nf4: allowed is int8"):
        PF.Projections.pack([weight, PF.quantise(torch.randn(6, 8), "nf4")], [pair, pair])
    with pytest.raises(TypeError, match=r"weights\[1\] is floating: allowed is int8"):
        PF.Projections.pack([weight, torch.randn(6, 8)], [pair, pair])
