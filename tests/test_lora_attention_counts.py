"""lora_attention at sizes of SD1.x, beside peft with torch's attention: bytes kept for the backward pass, launches."""

import contextlib
import importlib

import pytest
import torch
from launching import NO_LAUNCH, TRITON
from peft import LoraConfig, inject_adapter_in_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from palp_fast import functional as PF

HEADS, RANK, CONTEXT = 8, 32, 768
HALF = torch.float16
SIZES = [(4096, 320), (1024, 640), (256, 1280)]


def fused(width, cross, mode, **options):
    """(a function of x and context, the LoRA factors, all weights), made in a mode."""
    d_in = CONTEXT if cross else width
    inputs = {"q": width, "k": d_in, "v": d_in, "out": width}
    with mode:
        weights = {name: torch.empty(width, d_in, dtype=HALF) for name, d_in in inputs.items()}
        lora = {name: (torch.empty(RANK, d_in).requires_grad_(), torch.empty(width, RANK).requires_grad_())
                for name, d_in in inputs.items()}
        packed = PF.AttentionWeights.pack(weights, lora, torch.empty(width, dtype=HALF), cross=cross, shadows=True)
    factors = list(sum(lora.values(), ()))
    weights = [*(projections.packed for projections in packed.inputs), packed.out, packed.out_bias, *factors]
    return lambda x, context: PF.lora_attention(x, context, packed, HEADS, **options), factors, weights


class Plain(torch.nn.Module):
    """An attention layer as diffusers writes it."""

    def __init__(self, width, cross):
        super().__init__()
        d_in = CONTEXT if cross else width
        self.to_q = torch.nn.Linear(width, width, bias=False, dtype=HALF)
        self.to_k, self.to_v = (torch.nn.Linear(d_in, width, bias=False, dtype=HALF) for _ in range(2))
        self.to_out = torch.nn.Linear(width, width, dtype=HALF)

    def forward(self, x, context):
        context = x if context is None else context
        heads = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                 for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out = torch.nn.functional.scaled_dot_product_attention(*heads)
        return self.to_out(out.transpose(1, 2).flatten(-2))


def peft(width, cross, mode):
    """As `fused`, by peft's layers. These are moved as they are made, which no fake module can be: made outside."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out"])
    module = inject_adapter_in_model(config, Plain(width, cross))
    weights = dict(module.named_parameters())
    if isinstance(mode, FakeTensorMode):
        weights = {name: mode.from_tensor(weight) for name, weight in weights.items()}
    trained = [weight for name, weight in weights.items() if "lora_" in name]
    return lambda *args: torch.func.functional_call(module, weights, args), trained, list(weights.values())


def inputs(rows, width, cross):
    context = torch.empty(1, 77, CONTEXT, dtype=HALF).requires_grad_() if cross else None
    return torch.empty(1, rows, width, dtype=HALF).requires_grad_(), context


def kept(make, rows, width, cross):
    """Bytes that are kept and are no weights."""
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    mode = FakeTensorMode()
    layer, _, weights = make(width, cross, mode)
    with mode:
        x, context = inputs(rows, width, cross)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = layer(x, context)
        for weight in weights:
            held.pop(weight.untyped_storage()._cdata, None)
        assert out.shape == x.shape
    return sum(held.values())


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_bytes_kept(rows, width):
    element = 2 * rows * width
    bytes_of_low = 2 * RANK * (2 * rows + 2 * 77)  # S = x A^T of q, out, k, v
    peers = {cross: kept(peft, rows, width, cross) for cross in (False, True)}
    mine = {(cross, again): kept(lambda *size: fused(*size, recompute=again), rows, width, cross)
            for cross in (False, True) for again in (False, True)}
    print({key: round(value / element, 3) for key, value in {**peers, **mine}.items()}, "times rows x width")
    assert mine[False, False] <= 5.06 * element
    assert mine[True, False] <= peers[True] - bytes_of_low
    assert mine[False, True] <= 0.40 * peers[False]
    assert mine[True, True] <= 0.65 * peers[True]


class Launches(TorchDispatchMode):
    """Names of all that would launch a kernel: aten calls other than views and allocations, within operators, too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "palp_fast":
            module, function = TRITON[func._schema.name.partition("::")[2]].split(".")
            with self:
                return getattr(importlib.import_module(f"palp_fast.kernels.{module}"), function)(*args)
        if not func.is_view and func._schema.name.partition("::")[2] not in NO_LAUNCH:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(monkeypatch, family):
    """The names of launches within, in order; no kernel runs, memory stays as allocated."""
    from palp_fast.kernels.launch import watched

    monkeypatch.setattr("palp_fast.backend.select", lambda *_: "triton")
    with Launches() as mode, watched(lambda kernel, *_: mode.names.append(kernel.__name__), family):
        yield mode.names


def forward_and_backward(layer, factors, x, names):
    """(names forward, names backward) of self-attention."""
    out = layer(x, None)
    forward, grad = list(names), torch.empty_like(out)
    names.clear()
    torch.autograd.grad(out, [x, *factors], grad)
    print(len(forward), forward, len(names), names)
    return forward, names


@pytest.mark.parametrize("family", ["generic", "consumer", "a100", "hopper"])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_launches_of_self_attention(rows, width, family, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    x, _ = inputs(rows, width, False)
    layer, factors, _ = fused(width, False, contextlib.nullcontext(), residual=torch.empty_like(x))
    with counted(monkeypatch, family) as names:
        forward, backward = forward_and_backward(layer, factors, x, names)
    assert "attention_fwd_kernel" in forward and "lora_bwd_kernel" in backward  # they were counted
    assert len(forward) <= 6 and len(backward) <= 9


def test_launches_of_peft():
    """What the same layer takes there without the residual, at least a launch for each aten call."""
    layer, factors, _ = peft(320, False, contextlib.nullcontext())
    x, _ = inputs(64, 320, False)
    with Launches() as mode:
        forward, backward = forward_and_backward(layer, factors, x, mode.names)
    assert len(forward) == 21 and len(backward) == 31
