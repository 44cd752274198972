"""How an operator gets its schema, shape function, gradient and versions; one file per operator stands beside this one.

Every operator has the overload `default`, which the dispatcher sends to the library compiled for the device if there is
one, and `reference`, which always runs the plain PyTorch version; one with a Triton version also has `triton`.
Backward passes are operators too.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from palp_fast import backend
from palp_fast.ops.scratch import ARGUMENTS, Scratch, with_scratch

LIBRARY = torch.library.Library("palp_fast", "DEF")
_NODES: dict[Callable, type[torch.autograd.Function]] = {}  # by overload
_PUBLIC = {"default": "", "reference": ".reference", "triton": ".triton"}


def register(
    name: str,
    schema: str,
    reference: Callable,
    fake: Callable,
    triton: str | None = None,
    *,
    default: Callable | None = None,
    scratch: Scratch | None = None,
) -> None:
    """All overloads of an operator: its schema, its reference, its shape function.

    triton: "file.function" in palp_fast.kernels, with the reference's arguments; imported at the first call. default:
    what the overload of this name runs where no library serves, the reference if None. scratch: for an operator whose
    weight may be quantised, where it is; the schema gets ARGUMENTS, the versions do not.
    """
    versions = {"default": default or reference, "reference": reference}
    if triton is not None:
        versions["triton"] = _first_call_imports(triton)
    if scratch is not None:
        schema = schema.replace(") ->", f", {ARGUMENTS}) ->", 1)
        count = len(inspect.signature(reference).parameters)
        versions = {kind: with_scratch(version, scratch, count, kind) for kind, version in versions.items()}
        fake = with_scratch(fake, scratch, count, "default")
    for kind, version in versions.items():
        qualified = name + _PUBLIC[kind]
        LIBRARY.define(qualified + schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(qualified, version, "CompositeExplicitAutograd")
        torch.library.register_fake(f"palp_fast::{qualified}", fake, lib=LIBRARY)


def _first_call_imports(path: str) -> Callable:
    """Triton is optional, and slow to import."""
    module, _, function = path.partition(".")

    def call(*args):
        return getattr(importlib.import_module(f"palp_fast.kernels.{module}"), function)(*args)

    return call


def overload(name: str, device: torch.device, requested: str) -> Callable:
    """The overload of an operator that the requested backend stands for. Raises as backend.select."""
    return getattr(getattr(torch.ops.palp_fast, name), kind(name, device, requested))


def kind(name: str, device: torch.device, requested: str) -> str:
    """The name of that overload, which its backward operator has, too."""
    chosen = backend.select(name, device, requested)
    return chosen if chosen in ("reference", "triton") else "default"


def call(op: Callable, *args, tracked: tuple[int, ...] = ()):
    """op(*args) without the dispatcher's way through Python, a third of a short call.

    tracked: as `differentiable` has it.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return op(*args)
    if torch.is_grad_enabled():
        for i in tracked:
            if args[i].requires_grad:
                return _NODES[op].apply(None, args, *(args[j] for j in tracked))
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def compiled_on_cpu(name: str, requested: str, *args, tracked: tuple[int, ...]):
    """`call` of the operator compiled for the CPU, or None where it does not serve or refuses its arguments.

    It checks them itself, in less time than Python, but does not say what is allowed: whoever gets None checks again.
    """
    if requested not in ("auto", "cpu") or type(args[0]) not in (Tensor, Parameter) or not _all_on_cpu(args):
        return None
    if torch.compiler.is_compiling() or not backend.has_compiled(name, "cpu"):
        return None
    try:
        return call(getattr(torch.ops.palp_fast, name).default, *args, tracked=tracked)
    except (AttributeError, RuntimeError, TypeError):
        return None


def _all_on_cpu(args) -> bool:
    """Whether no tensor is elsewhere, where it would take the dispatcher; lists of tensors included."""
    for arg in args:
        if isinstance(arg, Tensor):
            if not arg.is_cpu:
                return False
        elif isinstance(arg, (list, tuple)) and not _all_on_cpu(arg):
            return False
    return True


def _first_order(bwd: Callable) -> Callable:
    """A backward operator as `call` calls it: only second derivatives ask for its gradient, which has none."""

    def run(*args):
        if torch.is_grad_enabled():
            return bwd(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return bwd(*args)

    return run


def differentiable(
    name: str, setup_context: Callable, backward: Callable[[object, str], Callable], tracked: tuple[int, ...]
) -> None:
    """Gradients for the arguments at the positions `tracked`; `ctx.needs_input_grad[-len(tracked):]` tells which.

    `backward` is told which overload of the backward operator belongs to the forward one, and gives those gradients.
    """
    for kind in getattr(torch.ops.palp_fast, name).overloads():
        op = getattr(getattr(torch.ops.palp_fast, name), kind)
        bwd = getattr(getattr(torch.ops.palp_fast, name + "_bwd"), kind)
        _autograd(op, setup_context, backward(_first_order(bwd)), tracked)
        types = [str(argument.type) for argument in bwd._schema.arguments]
        tensors = [i for i, type_name in enumerate(types) if type_name in ("Tensor", "Optional[Tensor]")]
        _autograd(bwd, lambda ctx, inputs, output: None, _no_second_derivative(name), tuple(tensors))


def _autograd(op, setup_context: Callable, backward: Callable, tracked: tuple[int, ...]) -> None:
    """As torch.library.register_autograd, in a third of its time: no walk over nested arguments, no copies."""

    def run(keyset, args):
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:  # from `call`
                return op(*args)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx, keyset, args, *_):
        result = run(keyset, args)
        ctx.set_materialize_grads(False)  # else zeros would be made for results that have no gradient
        ctx.is_ours = keyset is None  # nobody but us has those results that the function does not return
        setup_context(ctx, args, result)
        return result

    def node_backward(ctx, *grads):
        for grad in grads:
            if grad is not None:
                break
        else:
            return (None,) * (2 + len(tracked))
        # Not below autograd: reading what was saved may run a checkpointed forward pass again.
        return None, None, *backward(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(node_backward)}
    node = _NODES[op] = type(op._schema.name.replace("::", "_"), (torch.autograd.Function,), members)

    def kernel(keyset, *args):
        tensors = [args[i] for i in tracked if i < len(args)]  # defaults at the end are left out
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return node.apply(keyset, args, *tensors)
        return run(keyset, args)

    LIBRARY.impl(op._name.removeprefix("palp_fast::"), kernel, "Autograd", with_keyset=True)


def is_last_use() -> bool:
    """Within a backward pass: whether what was saved is freed behind it, so that it may be overwritten."""
    if torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    # Neither for several gradients at a time, nor where a mode looks at operators.
    return not (torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


def _no_second_derivative(name: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(f"palp_fast {name}: second derivatives are not available")

    return backward


def empty(like: Tensor, shape, dtype: torch.dtype) -> Tensor:
    """For shape functions."""
    return torch.empty(shape, dtype=dtype, device=like.device)
