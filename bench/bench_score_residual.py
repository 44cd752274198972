"""score_residual, forward and backward: compiled against the PyTorch reference. python -m bench.bench_score_residual

Bytes, with s = bytes per stored element: forward reads pred, target and four predictions (6 s) and writes the fp32
gradient (4); backward reads it (4) and writes the gradient to pred (s).
"""

import torch

from bench.elementwise import Case, grid, images, options, report
from palp_fast import functional

SHAPES = [(batch, 4, side, side) for side in (64, 128) for batch in (4, 8, 16, 32)]
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = 1e-4  # the loss is a small difference of large sums


def case(shape: tuple, dtype: torch.dtype, device: str) -> Case:
    pred, *others = images(6, shape, dtype, device)
    pred = pred.clone().requires_grad_()
    scale = torch.rand(shape[0], device=device)

    def call(backend: str):
        loss, stats = functional.score_residual(
            pred, *others, alpha=15.0, beta=7.5, residual_weight=0.1, residual_scale=scale, backend=backend)
        (grad,) = torch.autograd.grad(loss, pred)
        return loss.detach(), stats, grad

    return Case(f"{list(shape)} {dtype}", call, pred.numel() * (7 * dtype.itemsize + 8))


if __name__ == "__main__":
    chosen = options(__doc__)
    cases = (case(shape, dtype, chosen.device) for shape, dtype in grid(SHAPES, DTYPES))
    report("score_residual", cases, chosen, TOLERANCE)
