"""Every operator that csrc/ has, once, and steps of the optimizers, on a device: what compute-sanitizer watches."""

import sys

import torch
from torch.utils._pytree import tree_map_only

from palp_fast import backend, ops, optim  # noqa: F401  (ops loads the libraries)
from samples import SAMPLES, SIZES


def operators(device: str) -> None:
    compiled = {name for op in backend.COMPILED[device] for name in (op, f"{op}_bwd")} | {"philox_words", "write_words"}
    for name, sample in SAMPLES.items():
        if name.partition(",")[0] in compiled:
            args = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), sample())
            getattr(torch.ops.palp_fast, name.partition(",")[0]).default(*args)


def optimizers(device: str) -> None:
    for kind in (optim.AdamW8bit, optim.Lion8bit, optim.AdamW):
        params = [torch.nn.Parameter(torch.randn(size, device=device)) for size in (*SIZES, 70_000)]
        shadows = {params[0]: torch.empty_like(params[0], dtype=torch.bfloat16)}
        optimizer = kind(params, max_grad_norm=1.0, shadows=shadows, backend=device)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()


if __name__ == "__main__":
    operators(sys.argv[1])
    optimizers(sys.argv[1])
    if sys.argv[1] == "cuda":
        torch.cuda.synchronize()
