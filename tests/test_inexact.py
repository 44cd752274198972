"""inexact_products: exact where promised, errors as documented, refused with a gradient, off by default."""

import pytest
import torch
from close import assert_close, relative

from palp_fast import functional as PF

D_IN, D_OUT, RANK = 320, 64, 4
GATE = torch.tensor([0.0, 1.0, -0.5])


def layer(dtype=torch.float32):
    """x, weight, bias, pair."""
    x, weight = torch.randn(3, 50, D_IN).to(dtype), torch.randn(D_OUT, D_IN) * D_IN**-0.5
    return x, weight, torch.randn(D_OUT), (torch.randn(RANK, D_IN) * D_IN**-0.5, torch.randn(D_OUT, RANK))


def formula(x, weight, bias, pair, gate=GATE):
    low = gate.double().view(-1, 1, 1) * (x.double() @ pair[0].double().T @ pair[1].double().T)
    return x.double() @ weight.double().T + bias.double() + low


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_is_the_exact_product_of_the_rounded_numbers(dtype):
    x, weight, bias, pair = layer(dtype)
    weight = PF.quantise(weight, "int8")
    rounded = PF.quantise(x.flatten(0, 1), "int8").dequantise(torch.float64).view(x.shape)
    low = formula(x, weight.dequantise(torch.float64), bias, pair) - x.double() @ weight.dequantise(torch.float64).T
    truth = rounded @ weight.dequantise(torch.float64).T + low
    with torch.no_grad(), PF.inexact_products("int8"):
        found = PF.lora_linear(x, weight, bias, *pair, GATE)
    assert found.dtype == dtype
    assert_close(found, truth, {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype])


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("fp16", 1e-3)])
def test_error_of_a_layer(kind, error):
    """Of normal numbers, against the exact product with the same weight; there is one, so it is another product."""
    x, weight, bias, pair = layer(torch.float16)
    weight = PF.quantise(weight, "int8") if kind == "int8" else weight.half()
    plain = weight.dequantise(torch.float64) if kind == "int8" else weight
    with torch.no_grad(), PF.inexact_products(kind):
        found = PF.lora_linear(x, weight, bias, *pair, GATE)
    made = relative(found, formula(x, plain, bias, pair))
    print(kind, made)
    assert 1e-4 < made < error


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_low_rank_term_is_exact(kind):
    """A weight of zeros: what is left is the update, small as after one step."""
    x, weight, bias, (lora_a, lora_b) = layer(torch.float16)
    zeros, pair = PF.quantise(0 * weight, "int8"), (lora_a, 1e-3 * lora_b)
    with torch.no_grad(), PF.inexact_products(kind):
        found = PF.lora_linear(x, zeros, None, *pair, GATE)
    assert_close(found, formula(x, 0 * weight, 0 * bias, pair), 2e-3)


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_projections_and_linear_layers_agree(kind):
    x, weight, bias, pair = layer(torch.float16)
    weights = [PF.quantise(weight * size, "int8") for size in (1.0, 0.5, -2.0)]
    with torch.no_grad(), PF.inexact_products(kind):
        found = PF.lora_projections(x, PF.Projections.pack(weights, [pair] * 3, shadows=True), GATE)
        for y, weight in zip(found, weights):
            assert torch.equal(y, PF.lora_linear(x, weight, None, *pair, GATE))
            assert_close(PF.frozen_linear(x, weight), PF.lora_linear(x, weight, None, *pair, 0.0), 1e-3)


def test_plain_weights_packed_in_fp16():
    x, weight, _, pair = layer(torch.float16)
    packed = PF.Projections.pack([weight.half(), -weight.half()], [pair] * 2, shadows=True)
    exact = PF.lora_projections(x, packed, GATE)
    with torch.no_grad(), PF.inexact_products("fp16"):
        for found, wanted in zip(PF.lora_projections(x, packed, GATE), exact, strict=True):
            assert 0 < relative(found, wanted) < 2e-3


def test_attention_obeys_and_adds_its_residual():
    weights = {name: PF.quantise(torch.randn(64, 64) / 8, "int8") for name in ("q", "k", "v", "out")}
    pairs = {name: (torch.randn(2, 64) / 8, torch.randn(64, 2)) for name in weights}
    packed, x = PF.AttentionWeights.pack(weights, pairs), torch.randn(2, 9, 64)
    exact = PF.lora_attention(x, None, packed, 4, residual=x)
    with torch.no_grad(), PF.inexact_products("int8"):
        found = PF.lora_attention(x, None, packed, 4, residual=x, recompute=True)
    assert 1e-4 < relative(found, exact) < 0.02


def test_off_by_default_and_after_an_error():
    x, weight, bias, _ = layer()
    weight = PF.quantise(weight, "int8")
    exact = PF.frozen_linear(x, weight, bias)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), PF.inexact_products("int8"):
        with PF.inexact_products("fp16"):
            assert torch.equal(PF.frozen_linear(x, weight, bias), exact)  # x is not in fp16
        assert not torch.equal(PF.frozen_linear(x, weight, bias), exact)
        1 / 0
    assert torch.equal(PF.frozen_linear(x, weight, bias), exact)


def test_other_weights_and_convolutions_stay_exact():
    x, weight, bias, pair = layer()
    image, kernel = torch.randn(1, 4, 5, 5), PF.quantise(torch.randn(6, 4, 3, 3), "int8")
    four = PF.quantise(weight, "nf4")
    runs = [lambda: PF.frozen_linear(x, weight, bias), lambda: PF.lora_linear(x, four, bias, *pair),
            lambda: PF.frozen_conv2d(image, kernel)]
    with torch.no_grad(), PF.inexact_products("int8"):
        found = [run() for run in runs]
    assert all(torch.equal(made, run()) for made, run in zip(found, runs))


def test_refused_where_a_gradient_is_needed():
    x, weight, bias, pair = layer()
    weight = PF.quantise(weight, "int8")
    message = "inexact_products.'int8'. has no gradient: allowed is torch.no_grad"
    packed = PF.Projections.pack([weight], [tuple(factor.requires_grad_() for factor in pair)])
    with PF.inexact_products("int8"):
        for run in (lambda: PF.frozen_linear(x.clone().requires_grad_(), weight),
                    lambda: PF.lora_linear(x, weight, bias, *pair), lambda: PF.lora_projections(x, packed)):
            with pytest.raises(RuntimeError, match=message):
                run()
            with torch.no_grad():
                run()
        assert not PF.frozen_linear(x, weight).requires_grad  # nothing asks for one


def test_autocast_and_compilation():
    x, weight, bias, pair = layer()
    weight = PF.quantise(weight, "int8")
    torch.compiler.reset()
    run = lambda x: PF.lora_linear(x, weight, bias, *pair, GATE)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        exact = compiled(x)
        with PF.inexact_products("int8"):
            wanted = run(x)
            assert torch.equal(compiled(x), wanted) and not torch.equal(exact, wanted)
            with torch.autocast("cpu", torch.bfloat16):
                half = run(x)
    assert half.dtype == torch.bfloat16
    assert_close(half, wanted, 2e-2)


def test_bad_kinds_are_named():
    with pytest.raises(ValueError, match="kind='int4': allowed are 'int8', 'fp16'"):
        with PF.inexact_products("int4"):
            pass
