"""Operator schemas, shape functions and gradients (torch.library), one block per operator.

Each operator has two overloads: `default`, which the dispatcher sends to the library compiled for the device if
there is one, and `reference`, which always runs the plain PyTorch version. Backward passes are operators too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from palp_fast import backend
from palp_fast.reference.add_noise import add_noise_bwd_ref, add_noise_ref
from palp_fast.reference.dtypes import compute_dtype
from palp_fast.reference.lora_linear import lora_linear_bwd_ref, lora_linear_ref
from palp_fast.reference.renoise import renoise_bwd_ref, renoise_ref
from palp_fast.reference.score_combination import score_combination_bwd_ref, score_combination_ref

_library = torch.library.Library("palp_fast", "DEF")
OVERLOADS = ("default", "reference")


def register(name: str, schema: str, reference: Callable, fake: Callable) -> None:
    """Both overloads of an operator: its schema, its reference and its shape function."""
    for kind in OVERLOADS:
        qualified = name if kind == "default" else f"{name}.{kind}"
        _library.define(qualified + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(qualified, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"palp_fast::{qualified}", fake, lib=_library)


def overload(name: str, device: torch.device, requested: str) -> Callable:
    """The overload of an operator that the requested backend stands for. Raises as backend.select."""
    packet = getattr(torch.ops.palp_fast, name)
    return packet.reference if backend.select(name, device, requested) == "reference" else packet.default


def _differentiable(
    name: str, setup_context: Callable, backward: Callable[[object, str], Callable], tracked: tuple[int, ...]
) -> None:
    """Gradients for the arguments at the positions `tracked`; `ctx.needs_input_grad[-len(tracked):]` tells which.

    `backward` is told which overload of the backward operator belongs to the forward one, and gives those gradients.
    """
    for kind in OVERLOADS:
        op = getattr(getattr(torch.ops.palp_fast, name), kind)
        bwd = getattr(getattr(torch.ops.palp_fast, name + "_bwd"), kind)
        _autograd(op, setup_context, backward(bwd), tracked)
        types = [str(argument.type) for argument in bwd._schema.arguments]
        tensors = [i for i, type_name in enumerate(types) if type_name in ("Tensor", "Optional[Tensor]")]
        _autograd(bwd, lambda ctx, inputs, output: None, _no_second_derivative(name), tuple(tensors))


def _autograd(op, setup_context: Callable, backward: Callable, tracked: tuple[int, ...]) -> None:
    """As torch.library.register_autograd, in a third of its time: no walk over nested arguments, no copies."""

    def run(keyset, args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx, keyset, args, *_):
        result = run(keyset, args)
        ctx.set_materialize_grads(False)  # else zeros would be made for results that have no gradient
        setup_context(ctx, args, result)
        return result

    def node_backward(ctx, *grads):
        if all(grad is None for grad in grads):
            return (None,) * (2 + len(tracked))
        if torch.is_grad_enabled():  # create_graph
            return None, None, *backward(ctx, *grads)
        with torch._C._AutoDispatchBelowAutograd():
            return None, None, *backward(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(node_backward)}
    node = type(op._schema.name.replace("::", "_"), (torch.autograd.Function,), members)

    def kernel(keyset, *args):
        tensors = [args[i] for i in tracked]
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return node.apply(keyset, args, *tensors)
        return run(keyset, args)

    _library.impl(op._name.removeprefix("palp_fast::"), kernel, "Autograd", with_keyset=True)


def _no_second_derivative(name: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(f"palp_fast {name}: second derivatives are not available")

    return backward


def _empty(like: Tensor, shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


# score_combination


def _score_fake(pred, target, predictions, *_):
    dtype = compute_dtype([pred, target, *predictions])
    return _empty(pred, (), dtype), _empty(pred, (pred.shape[0], 3), dtype), _empty(pred, pred.shape, dtype)


def _score_setup(ctx, inputs, output):
    _, stats, gradient = output
    ctx.mark_non_differentiable(stats, gradient)
    ctx.save_for_backward(gradient)
    ctx.dtype = inputs[0].dtype


def _score_backward(bwd: Callable) -> Callable:
    def backward(ctx, d_loss, d_stats, d_gradient):
        (gradient,) = ctx.saved_tensors
        return (bwd(d_loss, gradient, ctx.dtype),)

    return backward


register(
    "score_combination",
    "(Tensor pred, Tensor target, Tensor[] predictions, float[] factors, Tensor? coefficients, float residual_weight, "
    "Tensor? residual_scale, Tensor? sample_weight, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    score_combination_ref,
    _score_fake,
)
register(
    "score_combination_bwd",
    "(Tensor grad_output, Tensor gradient, ScalarType dtype) -> Tensor",
    score_combination_bwd_ref,
    lambda grad_output, gradient, dtype: _empty(gradient, gradient.shape, dtype),
)
_differentiable("score_combination", _score_setup, _score_backward, tracked=(0,))


# renoise


def _renoise_fake(x_t, eps_pred, noise, alpha_bar, alpha_bar_new, copies, dtype):
    return _empty(x_t, (copies * x_t.shape[0], *x_t.shape[1:]), dtype or x_t.dtype)


def _renoise_setup(ctx, inputs, output):
    x_t, eps_pred, noise, alpha_bar, alpha_bar_new, copies, _ = inputs
    ctx.save_for_backward(alpha_bar, alpha_bar_new)
    ctx.copies = copies
    ctx.dtypes = (compute_dtype([x_t, eps_pred, noise]), x_t.dtype, eps_pred.dtype, noise.dtype)


def _renoise_backward(bwd: Callable) -> Callable:
    def backward(ctx, grad):
        alpha_bar, alpha_bar_new = ctx.saved_tensors
        return bwd(grad, alpha_bar, alpha_bar_new, ctx.copies, *ctx.dtypes)

    return backward


def _renoise_bwd_fake(grad, alpha_bar, alpha_bar_new, copies, compute, x_dtype, eps_dtype, noise_dtype):
    shape = (alpha_bar.shape[0], *grad.shape[1:])
    return tuple(_empty(grad, shape, dtype) for dtype in (x_dtype, eps_dtype, noise_dtype))


register(
    "renoise",
    "(Tensor x_t, Tensor eps_pred, Tensor noise, Tensor alpha_bar, Tensor? alpha_bar_new, SymInt copies, "
    "ScalarType? dtype) -> Tensor",
    renoise_ref,
    _renoise_fake,
)
register(
    "renoise_bwd",
    "(Tensor grad, Tensor alpha_bar, Tensor? alpha_bar_new, SymInt copies, ScalarType compute, ScalarType x_dtype, "
    "ScalarType eps_dtype, ScalarType noise_dtype) -> (Tensor, Tensor, Tensor)",
    renoise_bwd_ref,
    _renoise_bwd_fake,
)
_differentiable("renoise", _renoise_setup, _renoise_backward, tracked=(0, 1, 2))


# add_noise


def _add_noise_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[1], inputs[2])


def _add_noise_backward(bwd: Callable) -> Callable:
    def backward(ctx, d_x_t, d_noise):
        t, alphas_cumprod = ctx.saved_tensors
        return (bwd(d_x_t, t, alphas_cumprod),)

    return backward


register(
    "add_noise",
    "(Tensor x0, Tensor t, Tensor alphas_cumprod, Tensor seed, Tensor step, Tensor sample_offset, int stream) "
    "-> (Tensor, Tensor)",
    add_noise_ref,
    lambda x0, *_: (_empty(x0, x0.shape, x0.dtype), _empty(x0, x0.shape, x0.dtype)),
)
register(
    "add_noise_bwd",
    "(Tensor grad, Tensor t, Tensor alphas_cumprod) -> Tensor",
    add_noise_bwd_ref,
    lambda grad, t, alphas_cumprod: _empty(grad, grad.shape, grad.dtype),
)
_differentiable("add_noise", _add_noise_setup, _add_noise_backward, tracked=(0,))


# lora_linear


def _lora_fake(x, weight, bias, lora_a, lora_b, scale, gate):
    rows = x.shape[:-1]
    low_dtype = compute_dtype([x, lora_a])
    return _empty(x, (*rows, weight.shape[0]), x.dtype), _empty(x, (*rows, lora_a.shape[0]), low_dtype)


def _lora_setup(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, scale, gate = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, lora_a, lora_b, gate)
    ctx.scale = scale


def _lora_backward(bwd: Callable) -> Callable:
    def backward(ctx, d_y, d_low):
        need_x, need_a, need_b = ctx.needs_input_grad[-3:]
        # Read once: under gradient checkpointing a second read of saved_tensors is an error.
        *tensors, gate = ctx.saved_tensors
        d_x, d_a, d_b = bwd(d_y, *tensors, ctx.scale, gate, need_x)
        return d_x if need_x else None, d_a if need_a else None, d_b if need_b else None

    return backward


def _lora_bwd_fake(grad, x, low, weight, lora_a, lora_b, scale, gate, need_x):
    return _empty(x, x.shape if need_x else (0,), x.dtype), torch.empty_like(lora_a), torch.empty_like(lora_b)


register(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale, Tensor? gate) "
    "-> (Tensor, Tensor)",
    lora_linear_ref,
    _lora_fake,
)
register(
    "lora_linear_bwd",
    "(Tensor grad, Tensor x, Tensor low, Tensor weight, Tensor lora_a, Tensor lora_b, float scale, Tensor? gate, "
    "bool need_x) -> (Tensor, Tensor, Tensor)",
    lora_linear_bwd_ref,
    _lora_bwd_fake,
)
_differentiable("lora_linear", _lora_setup, _lora_backward, tracked=(0, 3, 4))

from palp_fast import ops_optim, ops_sampler  # noqa: E402, F401  (they register with the library above)
from palp_fast import flops  # noqa: E402, F401, I001  (its formulas need the operators above)

backend.load_libraries()
