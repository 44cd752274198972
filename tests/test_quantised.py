"""Quantised weights: errors within the formats' bounds, bitsandbytes' bytes and values, packing, layouts, bad input."""

import pytest
import torch
from close import relative

from palp_fast import functional as PF
from palp_fast.reference.quantised import NF4_LEVELS

FORMS = pytest.mark.parametrize("form", ["int8", "nf4"])
SHAPES = pytest.mark.parametrize("shape", [(40, 128), (5, 70), (1, 1), (6, 8, 3, 3), (320, 4, 3, 3)])
WIDEST = max(high - low for low, high in zip(NF4_LEVELS, NF4_LEVELS[1:])) / 2  # half the widest gap


def bound(weight, form):
    """The greatest error a number may have: half a step of its row, half the widest gap of its block."""
    rows = weight.flatten(1).double()
    if form == "int8":
        return (rows.abs().amax(1, keepdim=True) / 254).expand_as(rows).view(weight.shape)
    blocks = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 64)).view(len(rows), -1, 64)
    scale = blocks.abs().amax(2, keepdim=True).expand_as(blocks)
    return WIDEST * scale.reshape(len(rows), -1)[:, :rows.shape[1]].view(weight.shape)


@FORMS
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_error_is_within_the_bound(form, shape, dtype):
    sizes = 10 ** torch.linspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight = (torch.randn(shape) * sizes).to(dtype)
    quantised = PF.quantise(weight, form)
    made = quantised.dequantise(torch.float64)
    assert made.shape == weight.shape == torch.Size(quantised.shape) and quantised.dtype == dtype
    assert ((made - weight.double()).abs() <= bound(weight, form) * (1 + 1e-5)).all()
    assert quantised.dequantise().dtype == dtype
    assert torch.equal(quantised.dequantise(), quantised.dequantise(torch.float32).to(dtype))


@FORMS
def test_error_of_normal_numbers(form):
    """The bound alone would pass a worse rounding: relative L2 of 128 normal numbers a row, or of blocks of 64."""
    weight = torch.randn(2000, 128)
    error = relative(PF.quantise(weight, form).dequantise(), weight)
    print(form, error)
    assert error < {"int8": 0.0075, "nf4": 0.095}[form]


@FORMS
def test_rows_and_blocks_of_zeros(form):
    weight = torch.randn(3, 192)
    weight[0], weight[1, 64:128] = 0, 0
    quantised = PF.quantise(weight, form)
    made = quantised.dequantise()
    assert not made[0].any() and not made[1, 64:128].any() and made[2].any()
    assert not quantised.scale[0].any() and quantised.scale[2].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 128), (5, 70), (6, 8, 3, 3), (320, 4, 3, 3)])
def test_nf4_has_the_bytes_and_values_of_bitsandbytes(shape, dtype):
    """Of the matrix whose rows are padded with zeros to blocks, which is the matrix itself where blocks fill a row."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    weight = torch.randn(shape).to(dtype)
    weight[1] = 0
    rows = weight.flatten(1)
    width, padded = rows.shape[1], torch.nn.functional.pad(rows, (0, -rows.shape[1] % 64)).contiguous()
    codes, state = bitsandbytes.quantize_4bit(padded, blocksize=64, quant_type="nf4")
    quantised = PF.quantise(weight, "nf4")
    assert torch.equal(quantised.codes.flatten(), codes.flatten())
    assert torch.equal(quantised.scale.flatten(), state.absmax)
    wanted = bitsandbytes.dequantize_4bit(codes, state)[:, :width].reshape(shape)
    assert torch.equal(quantised.dequantise(), wanted)


def test_what_calls_bitsandbytes_gives_the_same_bits():
    """As on a CUDA device, here with bitsandbytes' operator for the CPU."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from palp_fast.ops import bitsandbytes_nf4

    weight = PF.quantise(torch.randn(6, 70), "nf4")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = bitsandbytes_nf4.dequantise(weight.codes, weight.scale, 70, dtype)
        assert found.is_contiguous() and torch.equal(found, weight.dequantise(dtype))
    assert bitsandbytes_nf4.obstacle(torch.device("cpu")) is None
    assert not bitsandbytes_nf4.serves(weight.codes, torch.float16)  # the CPU is the reference's


@FORMS
@pytest.mark.parametrize("width", [128, 70])
def test_packed_rows_are_those_of_the_parts(form, width):
    parts = [torch.randn(10, width) for _ in range(3)]
    quantised = [PF.quantise(part, form) for part in parts]
    together, whole = PF.QuantisedWeight.cat(quantised), PF.quantise(torch.cat(parts), form)
    assert torch.equal(together.codes, whole.codes) and torch.equal(together.scale, whole.scale)
    assert together.shape == whole.shape == (30, width)


@FORMS
def test_channels_last_stays(form):
    weight = torch.randn(6, 8, 3, 3)
    last = PF.quantise(weight.to(memory_format=torch.channels_last), form)
    made = last.dequantise()
    assert made.is_contiguous(memory_format=torch.channels_last) and last.channels_last
    assert PF.quantise(weight, form).dequantise().is_contiguous()
    assert (made - weight).abs().max() < 0.6
    if form == "int8":
        assert torch.equal(made, PF.quantise(weight, form).dequantise())


def test_bytes():
    assert PF.quantise(torch.randn(320, 1280), "int8").nbytes == 320 * 1280 + 4 * 320
    assert PF.quantise(torch.randn(320, 1280), "nf4").nbytes == 320 * 1280 // 2 + 320 * 20 * 4
    assert PF.quantise(torch.randn(320, 4, 3, 3), "nf4").nbytes == 320 * (32 + 4)  # 36 numbers fill a block of 64


@FORMS
def test_made_again_from_its_tensors(form, tmp_path):
    weight = PF.quantise(torch.randn(6, 70).half(), form)
    torch.save({"codes": weight.codes, "scale": weight.scale}, tmp_path / "weight.pt")
    again = PF.QuantisedWeight(**torch.load(tmp_path / "weight.pt"), shape=weight.shape, dtype=weight.dtype)
    assert torch.equal(again.dequantise(), weight.dequantise()) and again.form == form
    moved = weight.to("meta")
    assert moved.device.type == "meta" and moved.dequantise().shape == (6, 70) and moved.nbytes == weight.nbytes


@FORMS
def test_not_finite_is_named(form):
    for bad in (float("nan"), float("inf")):
        weight = torch.randn(6, 70)
        weight[2, 69] = bad
        with pytest.raises(ValueError, match="down.0.to_q has values that are not finite"):
            PF.quantise(weight, form, name="down.0.to_q")
    with pytest.raises(ValueError, match="not finite in fp32"):
        PF.quantise(torch.full((2, 3), 1e300, dtype=torch.float64), form)


@pytest.mark.parametrize(("arguments", "kind", "message"), [
    ((torch.randn(4, 4), "fp4"), ValueError, "form='fp4': allowed are 'int8', 'nf4'"),
    ((torch.tensor(1.0), "int8"), ValueError, r"weight has shape \[\]: allowed is \[d_out, d_in\] or"),
    ((torch.randn(4), "nf4"), ValueError, r"weight has shape \[4\]"),
    ((torch.randn(4, 0), "nf4"), ValueError, r"weight has shape \[4, 0\]"),
    ((torch.ones(4, 4, dtype=torch.int64), "int8"), TypeError, "weight has dtype torch.int64"),
    (([1.0], "int8"), TypeError, "weight=.*: allowed is a floating tensor"),
])
def test_bad_weights_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        PF.quantise(*arguments)


@pytest.mark.parametrize(("change", "kind", "message"), [
    ({"codes": torch.zeros(6, 8)}, TypeError, "codes has dtype torch.float32: allowed are torch.int8 and torch.uint8"),
    ({"scale": torch.zeros(6).half()}, TypeError, "scale has dtype torch.float16: allowed is torch.float32"),
    ({"codes": torch.zeros(6, 9, dtype=torch.int8)}, ValueError, r"codes has shape \[6, 9\]: allowed is \[6, 8\]"),
    ({"scale": torch.zeros(7)}, ValueError, r"scale has shape \[7\]: allowed is \[6\]"),
    ({"codes": torch.zeros(6, 4, dtype=torch.uint8)}, ValueError, r"codes has shape \[6, 4\]: allowed is \[6, 32\]"),
    ({"shape": (6,)}, ValueError, r"shape=\[6\]: allowed is \[d_out, d_in, ...\]"),
    ({"channels_last": True}, ValueError, r"shape=\[6, 8\]: allowed is \[d_out, d_in, h, w\]"),
])
def test_parts_that_do_not_fit_are_named(change, kind, message):
    parts = {"codes": torch.zeros(6, 8, dtype=torch.int8), "scale": torch.zeros(6), "shape": (6, 8)}
    with pytest.raises(kind, match=message):
        PF.QuantisedWeight(**{**parts, **change})


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(RuntimeError, match="backend='cpu' cannot serve dequantise on cpu: no C.. version"):
        PF.quantise(torch.randn(2, 3), "int8").dequantise(backend="cpu")
