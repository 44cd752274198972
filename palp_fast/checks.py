"""Argument checks of the operators: shapes and types, and values on the CPU alone.

Errors name the argument, what was given and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from palp_fast.quantised import QuantisedWeight, Weight

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATING_NAMES = "torch.float16, torch.bfloat16, torch.float32, torch.float64"


def floating(name: str, value: Tensor) -> None:
    """A tensor of a floating dtype and at least one dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}={value!r}: allowed is a floating tensor")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {value.dtype}: allowed are {FLOATING_NAMES}")


def frozen(name: str, value: Weight) -> None:
    """A floating tensor or a quantised weight."""
    if not isinstance(value, QuantisedWeight):
        floating(name, value)


def frozen_like(name: str, value: Weight, like: Weight) -> None:
    """A weight of the kind, shape and device of `like`."""
    frozen(name, value)
    kinds = [weight.form if isinstance(weight, QuantisedWeight) else "floating" for weight in (value, like)]
    if kinds[0] != kinds[1]:
        raise TypeError(f"{name} is {kinds[0]}: allowed is {kinds[1]}, as the first of them is")
    _shape(name, value, like.shape)
    _device(name, value, like)


def image(name: str, value: Tensor) -> None:
    """A floating [B, C, H, W] tensor."""
    floating(name, value)
    if value.dim() != 4:
        raise ValueError(f"{name} has shape {list(value.shape)}: allowed is [B, C, H, W]")


def image_like(name: str, value: Tensor, like: Tensor) -> None:
    """A floating tensor of the shape and on the device of `like`."""
    table(name, value, like.shape, like)


def table(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A floating tensor of the given shape on the device of `like`."""
    fits = isinstance(value, Tensor) and value.dtype in FLOATING and value.shape == shape
    if fits and value.device == like.device:
        return
    floating(name, value)
    _shape(name, value, shape)
    _device(name, value, like)


def optional_table(name: str, value: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """As `table`, or None."""
    if value is not None:
        table(name, value, shape, like)


def per_sample(name: str, value: Tensor | None, like: Tensor, required: bool = False) -> None:
    """[B] floating on the device of `like`, or None unless required."""
    if value is not None or required:
        table(name, value, (like.shape[0],), like)


def mask(name: str, value: Tensor | None, like: Tensor) -> Tensor | None:
    """[B, 1, H, W] floating or bool, or None; returned as floating."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        value = value.to(torch.float32)
    if value is not None:
        table(name, value, (like.shape[0], 1, *like.shape[2:]), like)
    return value


def indices(name: str, value: Tensor, like: Tensor) -> None:
    """[B] int64 on the device of `like`."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        given = value.dtype if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name}: {given} given, allowed is an int64 tensor [B]")
    _shape(name, value, (like.shape[0],))
    _device(name, value, like)


def schedule(name: str, value: Tensor, like: Tensor) -> None:
    """[T] floating, T >= 1, on the device of `like`."""
    floating(name, value)
    if value.dim() != 1 or value.shape[0] == 0:
        raise ValueError(f"{name} has shape {list(value.shape)}: allowed is [T] with T >= 1")
    _device(name, value, like)


def vector(name: str, value: Tensor, like: Tensor) -> None:
    """[N] floating on the device of `like`."""
    floating(name, value)
    if value.dim() != 1:
        raise ValueError(f"{name} has shape {list(value.shape)}: allowed is [N]")
    _device(name, value, like)


def fractions(name: str, value: Tensor) -> None:
    """As `alphas`, in the fastest way for a handful of values."""
    if _can_read(value) and not all(0 < number <= 1 for number in value.tolist()):
        alphas(name, value)


def alphas(name: str, value: Tensor) -> None:
    """Values in (0, 1], where they can be read."""
    if _can_read(value):
        low, high = (bound.item() for bound in value.aminmax())
        if not (low > 0 and high <= 1):
            raise ValueError(f"{name} has values from {low} to {high}: allowed are values in (0, 1]")


def below(name: str, value: Tensor, count: int) -> None:
    """Indices in [0, count), where they can be read."""
    if _can_read(value):
        low, high = (bound.item() for bound in value.aminmax())
        if not (low >= 0 and high < count):
            raise ValueError(f"{name} has values from {low} to {high}: allowed are 0 to {count - 1}")


def is_one(value: Tensor) -> bool:
    """Whether a scalar is 1, where it can be read."""
    return _can_read(value) and value.item() == 1


def no_zero(name: str, value: Tensor) -> None:
    """No value is 0, where they can be read."""
    if _can_read(value) and not value.all():
        raise ValueError(f"{name} has a 0: allowed are other values alone")


def one_for_each(name: str, value: Tensor, chosen: Tensor, what: str, index: Tensor) -> None:
    """value [B] is chosen[index], where that can be read: one value for each `what`, of which index [B] says which."""
    if _can_read(value) and _can_read(index) and not torch.equal(chosen[index], value):
        raise ValueError(f"{name} has several values for one {what}: allowed is one for each")


def has_values(value: Tensor) -> bool:
    """Whether there are values, on any device: none while a graph is traced."""
    traced = torch.compiler.is_compiling() or type(value) is not Tensor
    return not value.is_meta and value.numel() > 0 and not traced


def _can_read(value: Tensor) -> bool:
    """Whether there are values, on the CPU."""
    return value.is_cpu and has_values(value)


def number(name: str, value: float) -> None:
    """A finite Python number."""
    # SymFloat and SymInt stand for Python numbers while torch.compile traces.
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}={value!r}: allowed is a finite number")
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{name}={value!r}: allowed is a finite number")


def positive(name: str, value: float) -> None:
    """A finite Python number above 0."""
    number(name, value)
    if not value > 0:
        raise ValueError(f"{name}={value!r}: allowed is a finite number > 0")


def integer(name: str, value: int, minimum: int, maximum: int | None = None) -> None:
    """A Python int of at least `minimum` and, if given, at most `maximum`."""
    allowed = f"an int >= {minimum}" if maximum is None else f"an int from {minimum} to {maximum}"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}={value!r}: allowed is {allowed}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name}={value}: allowed is {allowed}")


def seed(name: str, value: int) -> None:
    """A Python int of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: allowed is an int")
    _int64(name, value)


def counter(name: str, value: int | Tensor, like: Tensor) -> Tensor:
    """An int, or a 0-d int64 tensor on the CPU or the device of `like`; returned as a tensor."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.dim() != 0:
            given = f"{value.dtype} of shape {list(value.shape)}"
            raise TypeError(f"{name} is {given}: allowed is an int or a 0-d int64 tensor")
        if value.device.type != "cpu":
            _device(name, value, like)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}={value!r}: allowed is an int or a 0-d int64 tensor")
    _int64(name, value)
    return torch.full((), value, dtype=torch.int64)


def _int64(name: str, value: int) -> None:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={value}: allowed is a 64-bit int")


def gate(name: str, value: Tensor, x: Tensor) -> Tensor | None:
    """A per-sample factor [B] for x [B, ..., d]."""
    if x.dim() < 2:
        raise ValueError(f"{name} is a tensor but x has shape {list(x.shape)}: allowed is x [B, ..., d_in], or a float")
    table(name, value, (x.shape[0],), x)
    return value


def lora(x: Tensor, weight: Weight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    """Shapes [d_out, d_in], [d_out], [r, d_in], [d_out, r] that fit each other and x [..., d_in]."""
    frozen_matrix("weight", weight, x)
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        matrix(name, value, x)
    d_out, d_in = weight.shape
    width("x", x, weight)
    _shape("lora_a", lora_a, (lora_b.shape[1], d_in))
    _shape("lora_b", lora_b, (d_out, lora_a.shape[0]))
    if bias is not None:
        table("bias", bias, (d_out,), x)


def projected(x: Tensor, weight: Weight) -> None:
    """x [..., d_in] for a packed weight [n d_out, d_in]."""
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)}: allowed is [..., {weight.shape[1]}], the width of weights")
    _device("weights", weight, x)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_index: Tensor | None) -> None:
    """q [B, N, heads D], k and v [P, M, heads D], kv_index [B] int64 below P, or None where P = B."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        floating(name, value)
        if value.dim() != 3:
            raise ValueError(f"{name} has shape {list(value.shape)}: allowed is [batch, length, heads D]")
        _device(name, value, q)
    integer("heads", heads, minimum=1)
    rows, _, width = q.shape
    if width == 0 or width % heads:
        raise ValueError(f"q has shape {list(q.shape)}: allowed is a last dimension of heads={heads} times D >= 1")
    if k.shape[1] == 0 or k.shape[2] != width:
        raise ValueError(f"k has shape {list(k.shape)}: allowed is [P, M, {width}] with M >= 1, as wide as q")
    _shape("v", v, k.shape)
    if kv_index is not None:
        indices("kv_index", kv_index, q)
        below("kv_index", kv_index, k.shape[0])
    elif k.shape[0] != rows:
        raise ValueError(f"k has {k.shape[0]} prompts for {rows} rows of q: allowed is one for each, or a kv_index")


def matrix(name: str, value: Tensor, like: Tensor) -> None:
    """A floating matrix on the device of `like`."""
    floating(name, value)
    frozen_matrix(name, value, like)


def frozen_matrix(name: str, value: Weight, like: Tensor) -> None:
    """As `matrix`, or quantised."""
    frozen(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} has shape {list(value.shape)}: allowed is a matrix")
    _device(name, value, like)


def width(name: str, value: Tensor, weight: Weight) -> None:
    """[..., d_in] for a weight [d_out, d_in]."""
    if value.dim() == 0 or value.shape[-1] != weight.shape[1]:
        allowed = f"[..., {weight.shape[1]}], the width of weight"
        raise ValueError(f"{name} has shape {list(value.shape)}: allowed is {allowed}")


def pair(name: str, value: int | Sequence[int], minimum: int) -> list[int]:
    """An int of at least `minimum`, or two of them; returned as two."""
    if not isinstance(value, (list, tuple)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name}={value!r}: allowed is an int, or two")
    for each in value:
        integer(name, each, minimum)
    return list(value)


def kernel(name: str, value: Weight, x: Tensor, padding: list[int], dilation: list[int], groups: int) -> None:
    """A frozen [d_out, C / groups, h, w] on the device of x [B, C, H, W], no larger than the padded x."""
    frozen(name, value)
    _device(name, value, x)
    channels = value.shape[1] * groups if value.dim() == 4 else None
    if channels != x.shape[1] or value.shape[0] % groups:
        allowed = f"[d_out, {x.shape[1]} / groups, h, w], d_out a multiple of groups={groups}"
        raise ValueError(f"{name} has shape {list(value.shape)}: allowed is {allowed}")
    for side, taps, pad, apart in zip(x.shape[2:], value.shape[2:], padding, dilation):
        if apart * (taps - 1) >= side + 2 * pad:
            sizes = f"{name} of shape {list(value.shape)}, dilated by {dilation}, does not fit"
            raise ValueError(f"{sizes}: allowed is at most x of shape {list(x.shape)} padded by {padding}")


def _shape(name: str, value: Weight, shape) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}: allowed is {list(shape)}")


def _device(name: str, value: Weight, like: Weight) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}: allowed is {like.device}, where the first argument is")
