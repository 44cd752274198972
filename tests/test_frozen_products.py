"""frozen_conv2d and frozen_linear: torch's own values and gradients, in every dtype and layout; what they keep."""

import pytest
import torch
import torch.nn.functional as F
from close import assert_as_good, assert_close
from saved import saved_bytes
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from palp_fast import backend
from palp_fast import functional as PF
from palp_fast.reference.frozen_conv2d import frozen_conv2d_bwd_ref, frozen_conv2d_ref

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
CONVOLUTIONS = {  # weight, stride, padding, dilation, groups
    "3 x 3": ((6, 8, 3, 3), 1, 1, 1, 1),
    "1 x 1": ((6, 8, 1, 1), 1, 0, 1, 1),
    "downsampling": ((6, 8, 3, 3), 2, 1, 1, 1),
    "uneven": ((6, 4, 3, 2), (2, 1), (0, 2), (1, 2), 2),
    "a channel each": ((8, 1, 3, 3), 3, 1, 1, 8),
}
EACH = pytest.mark.parametrize("name", [*CONVOLUTIONS, "linear"])


def layer(name, dtype=torch.float32):
    """(our layer, torch's, weight, bias, x) of one x, weight and bias."""
    draw = torch.Generator().manual_seed(0)
    linear = name == "linear"
    shape, *options = ((6, 8),) if linear else CONVOLUTIONS[name]
    mine, peer = (PF.frozen_linear, F.linear) if linear else (PF.frozen_conv2d, F.conv2d)
    weight, bias = (torch.randn(size, generator=draw).to(dtype) for size in (shape, shape[:1]))
    x = torch.randn((2, 5, 8) if linear else (2, 8, 9, 10), generator=draw).to(dtype)

    def bind(function):
        return lambda x, weight=weight, bias=bias: function(x, weight, bias, *options)

    return bind(mine), bind(peer), weight, bias, x


def with_gradient(function, x, grad, **parameters):
    leaf = x.detach().requires_grad_()
    out = function(leaf, **parameters)
    return out, *torch.autograd.grad(out, leaf, grad.to(out.dtype))


@EACH
@DTYPES
def test_values_and_gradient(name, dtype):
    mine, peer, weight, bias, x = layer(name, dtype)
    grad = torch.randn_like(peer(x))
    wide = {"weight": weight.double(), "bias": bias.double()}
    found, its = with_gradient(mine, x, grad), with_gradient(peer, x, grad)
    for what, *values in zip(("output", "x"), found, its, with_gradient(peer, x.double(), grad, **wide)):
        assert values[0].dtype == dtype
        assert_as_good(*values, 1e-6 if dtype != torch.float64 else 1e-13, what)


@pytest.mark.parametrize("name", ["3 x 3", "downsampling"])
def test_few_pixels_are_one_product_and_many_torchs_convolution(monkeypatch, name):
    mine, peer, _, _, x = layer(name)
    x = x.contiguous(memory_format=torch.channels_last)
    grad, made = torch.randn_like(peer(x)), []
    monkeypatch.setattr(f"{frozen_conv2d_ref.__module__}.LARGE", 0)
    for few in (0, 10**6):
        monkeypatch.setattr(f"{frozen_conv2d_ref.__module__}.FEW", few)
        with Convolutions() as seen:
            made.append(with_gradient(mine, x, grad))
        assert seen.count == (0 if few else 2)
    for one, other in zip(*made):
        assert_close(one, other, 1e-6)
        assert one.stride() == other.stride()


class Convolutions(TorchDispatchMode):
    """Counts torch's own, inside operators too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "palp_fast":
            with self:
                return {"frozen_conv2d": frozen_conv2d_ref, "frozen_conv2d_bwd": frozen_conv2d_bwd_ref}[
                    func._schema.name.partition("::")[2]](*args)
        self.count += func._schema.name == "aten::convolution"
        return func(*args, **(kwargs or {}))


@EACH
def test_gradcheck(name):
    mine, _, _, _, x = layer(name, torch.float64)
    x = x[:1].requires_grad_()
    assert torch.autograd.gradcheck(mine, x)
    assert torch.autograd.gradcheck(lambda x: mine(x, bias=None), x)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("last", [False, True])
def test_keeps_the_layout_as_torch_does(name, last):
    mine, peer, _, _, x = layer(name)
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    grad = torch.randn_like(peer(x))
    for found, its in zip(with_gradient(mine, x, grad), with_gradient(peer, x, grad)):
        assert found.stride() == its.stride()
        assert_close(found, its, 1e-6)
    sliced = torch.cat([x, x], 1)[:, :8]
    assert_close(mine(sliced), peer(x), 1e-6)


@EACH
def test_weights_of_another_dtype(name):
    """A 16-bit x runs in 16 bits, whatever the weights are kept in."""
    mine, _, weight, bias, x = layer(name)
    y = mine(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, mine(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


@EACH
def test_autocast_runs_in_its_dtype_forward_and_backward(name):
    mine, peer, _, _, x = layer(name)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mine(x)
        grad = torch.randn_like(y)
        inside = torch.autograd.grad(y, x, grad, retain_graph=True)[0]
        its = torch.autograd.grad(peer(x), x, grad)[0]
        assert mine(x.double()).dtype == torch.float64
    outside = torch.autograd.grad(y, x, grad)[0]
    assert y.dtype == torch.bfloat16 and inside.dtype == torch.float32
    assert_close(inside, outside, 0.0)
    assert_close(inside, its, 1e-2)


def test_backward_alone_under_autocast_keeps_fp32():
    for name in ("3 x 3", "linear"):
        mine, _, _, _, x = layer(name)
        y = mine(x.requires_grad_())
        wanted = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        total = y.sum()
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(torch.autograd.grad(total, x)[0], wanted, 0.0)


@EACH
def test_empty_and_meta(name):
    mine, peer, weight, bias, x = layer(name)
    empty = x[:0].requires_grad_()
    y = mine(empty)
    y.sum().backward()
    assert y.shape == peer(empty).shape and empty.grad.shape == empty.shape
    meta = x.to("meta").requires_grad_()
    y = mine(meta, weight.to("meta"), bias.to("meta"))
    y.sum().backward()
    assert y.shape == peer(x).shape and meta.grad.shape == x.shape


def test_cudnn_is_held_to_repeatable_algorithms(monkeypatch):
    flags = torch.backends.cudnn
    monkeypatch.setattr(flags, "benchmark", True)
    seen = []
    for allowed, kind in ((True, "cuda"), (False, "cuda"), (True, "cpu")):
        monkeypatch.setattr(backend, "_deterministic", allowed)
        with backend.repeatable_cudnn(torch.device(kind)):
            seen.append((flags.deterministic, flags.benchmark))
        assert (flags.deterministic, flags.benchmark) == (False, True)
    assert seen == [(True, False), (False, True), (False, True)]


@EACH
def test_frozen_parameters_get_no_gradient(name):
    mine, _, weight, bias, x = layer(name)
    mine(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()).sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None


@pytest.mark.parametrize("name", ["downsampling", "linear"])
def test_compiles_in_one_graph_of_any_size(name):
    mine, _, _, _, x = layer(name)
    compiled = torch.compile(lambda x: 2 * mine(x), fullgraph=True, backend="aot_eager", dynamic=True)
    for given in (x, x[:, :, 1:] if name == "downsampling" else x[:, 1:]):
        leaf = given.detach().requires_grad_()
        y, wanted = compiled(leaf), 2 * mine(leaf)
        assert_close(y, wanted, 1e-6)
        assert_close(torch.autograd.grad(y.sum(), leaf)[0], torch.autograd.grad(wanted.sum(), leaf)[0], 1e-6)


def test_compiles_under_autocast():
    mine, _, _, _, x = layer("linear")

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return mine(x)

    assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x), 0.0)


@EACH
def test_counted_work_is_torchs_own(name):
    mine, peer, _, _, x = layer(name)
    counts = []
    for function in (mine, peer):
        leaf = x.detach().requires_grad_()
        with FlopCounterMode(display=False) as forward:
            out = function(leaf)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1] and counts[0][0] > 0


@pytest.mark.parametrize("amp", [False, True], ids=["fp16", "autocast"])
@pytest.mark.parametrize(("channels", "size"), [(320, 64), (640, 32), (1280, 16)])
def test_keeps_nothing_of_x(channels, size, amp):
    dtype = torch.float32 if amp else torch.float16
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        x = torch.empty(2, channels, size, size, dtype=dtype, requires_grad=True)
        rows = torch.empty(2, size * size, channels, dtype=dtype, requires_grad=True)
        bias = torch.empty(channels, dtype=dtype)
        weight = torch.empty(channels, channels, 3, 3, dtype=dtype)
        matrix = torch.empty(channels, channels, dtype=dtype)
        frozen = (weight, matrix, bias)
        assert saved_bytes(lambda: PF.frozen_conv2d(x, weight, bias, padding=1), *frozen) == 0
        assert saved_bytes(lambda: PF.frozen_linear(rows, matrix, bias), *frozen) == 0
        assert saved_bytes(lambda: F.conv2d(x, weight, bias, padding=1), *frozen) >= 2 * x.numel()


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(8, 9, 10)}, r"x has shape \[8, 9, 10\]: allowed is \[B, C, H, W\]"),
    ({"weight": torch.zeros(6, 7, 3, 3)}, r"weight has shape \[6, 7, 3, 3\]: allowed is \[d_out, 8 / groups, h, w\]"),
    ({"weight": torch.zeros(6, 8)}, "weight has shape"),
    ({"weight": torch.zeros(6, 8, 3, 3, device="meta")}, "weight is on meta"),
    ({"weight": torch.zeros(6, 8, 3, 12)}, "does not fit"),
    ({"weight": torch.zeros(5, 4, 3, 3), "groups": 2}, "d_out a multiple of groups=2"),
    ({"bias": torch.zeros(8)}, "bias has shape"),
    ({"stride": 0}, "stride=0: allowed is an int >= 1"),
    ({"stride": (1, 2, 3)}, "stride=.1, 2, 3.: allowed is an int, or two"),
    ({"padding": "same"}, "padding='same'"),
    ({"padding": (0, -1)}, "padding=-1"),
    ({"dilation": 1.5}, "dilation=1.5"),
    ({"groups": 0}, "groups=0"),
])
def test_bad_arguments_of_convolutions_are_named(change, message):
    given = {"x": torch.zeros(2, 8, 9, 10), "weight": torch.zeros(6, 8, 3, 3), "bias": torch.zeros(6)}
    with pytest.raises((ValueError, TypeError), match=message):
        PF.frozen_conv2d(**{**given, **change})


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(())}, "x has shape"),
    ({"x": torch.zeros(2, 7)}, r"x has shape \[2, 7\]: allowed is \[..., 8\], the width of weight"),
    ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "x has dtype"),
    ({"weight": torch.zeros(6)}, "weight has shape"),
    ({"bias": torch.zeros(8)}, "bias has shape"),
    ({"backend": "cpu"}, "no C.. version of frozen_linear"),
    ({"backend": "triton"}, "no Triton version of frozen_linear"),
])
def test_bad_arguments_of_linear_layers_are_named(change, message):
    given = {"x": torch.zeros(2, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        PF.frozen_linear(**{**given, **change})
