"""Bad arguments of the CUDA library, without a GPU: its kernels, asked for by dispatch key, get tensors elsewhere."""

import pytest
import torch

from close import NEEDS_CUDA_LIBRARY
from samples import BY_ADDRESS, SAMPLES, registered, tensors

pytestmark = NEEDS_CUDA_LIBRARY

# The argument whose device decides.
FIRST = {
    "score_combination": "pred", "score_combination_bwd": "gradient", "renoise": "x_t", "renoise_bwd": "grad",
    "add_noise": "x0", "add_noise_bwd": "grad", "timestep_sample": "residual_scale", "timestep_update": "counts",
    "philox_words": "counters", "grad_norm": "grads", "adamw": "steps", "lion": "steps", "write_words": "out",
}


def on_cuda(name: str, arguments: tuple):
    """The CUDA kernel of this operator, whatever the tensors' device."""
    op = getattr(torch.ops.palp_fast, name).default
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


def changed(value, change):
    if torch.is_tensor(value):
        return change(value)
    return [changed(item, change) for item in value] if isinstance(value, list) else value


def test_every_cuda_kernel_is_listed():
    kernels = {name for name in registered()
               if torch._C._dispatch_has_kernel_for_dispatch_key(f"palp_fast::{name}", "CUDA")}
    assert kernels == FIRST.keys() | BY_ADDRESS


CHANGES = {
    "as they are": lambda tensor: tensor,
    "fp64": lambda tensor: tensor.double() if tensor.is_floating_point() else tensor,
    "meta": lambda tensor: tensor.to("meta"),
    "empty": lambda tensor: tensor[:0] if tensor.dim() else tensor,
    "empty on meta": lambda tensor: (tensor[:0] if tensor.dim() else tensor).to("meta"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FIRST)
def test_tensors_elsewhere_are_refused(name, change):
    arguments = SAMPLES[name]()
    assert tensors(arguments)
    with pytest.raises(RuntimeError, match=f"{FIRST[name]} is not on a cuda device"):
        on_cuda(name, tuple(changed(value, CHANGES[change]) for value in arguments))


def test_step_by_address_is_refused_elsewhere():
    words = torch.zeros(12, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="tensors is not on a cuda device"):
        rates = torch.zeros(1, 5).double()
        on_cuda("optimizer_step", (0, words, words, rates, words.int(), words, words[0], None, None, 1.0))
