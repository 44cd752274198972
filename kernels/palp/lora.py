"""LoRA projections: lora_linear and lora_projections, forward and backward. Reference: palp_fast/reference/lora_*.py.

Forward: one launch that makes x A^T beside x W^T from the same tiles of x. Every tile of columns makes x A^T anew;
where that work exceeds what a launch costs (wide outputs, high ranks, slow cards), a launch of its own makes x A^T
first. For q, k and v of 4096 rows, d = 320 and rank 32 in 16 bits, one launch moves 11.1 MB; a cuBLAS product with
[W; A] and a launch that adds S B^T would move 28.5 MB, and pay where rows and widths are both far above those of Stable
Diffusion. In 32 and 64 bits, and on Turing, Triton has no fast product: there the reference runs, on cuBLAS.

Backward, three launches: low and d_low, whose rows need all columns; then dx beside partial sums of dA and dB over
fixed ranges of rows; then their sum in order. The second reading of x and dy is cheaper than to keep low and d_low on
chip: a block would have to see whole rows, and so write r (d_in + d_out) partial sums for each tile of rows, 2 r /
BLOCK_M times the bytes of x and dy, and read them again; and 256 rows would be work for 4 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels.launch import compute_type, launch, settings
from palp_fast.kernels.lora_kernels import lora_bwd_kernel, lora_fwd_kernel, lora_low_kernel, lora_sum_kernel
from palp_fast.reference.lora_linear import lora_linear_bwd_ref, lora_linear_ref
from palp_fast.reference.lora_projections import factors, lora_projections_bwd_ref, lora_projections_ref, used


@dataclass(frozen=True)
class Launch:
    """Tile of a product, warps and stages of its block, and what decides between structures.

    FEW_M: rows of a tile where tiles of BLOCK_M rows would be fewer than `blocks`, what keeps the card busy. LOW_M:
    rows of a tile of low and d_low. again: FLOPs of making x A^T anew that cost as much as a launch.
    """

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    BLOCK_K: int = 32
    FEW_M: int = 32
    LOW_M: int = 32
    num_warps: int = 4
    num_stages: int = 2
    blocks: int = 80
    again: float = 0.1e9


# `again` is 4 us, of a launch and a short kernel, at the rate of products of this size; not measured yet.
LAUNCHES: dict[str, Launch | None] = {
    "generic": Launch(),
    "turing": None,  # Triton has no tensor-core product for it
    "consumer": Launch(BLOCK_M=128, FEW_M=64, num_stages=4, blocks=100, again=0.25e9),
    "a100": Launch(BLOCK_M=128, FEW_M=64, num_stages=4, blocks=108, again=0.6e9),
    "hopper": Launch(BLOCK_M=128, BLOCK_K=64, FEW_M=64, num_warps=8, num_stages=3, blocks=132, again=1.2e9),
}
_HIGHEST_RANK = 64  # of a tile: higher ranks take several
_SUM = 1024  # elements of a block that adds partial sums


@dataclass(frozen=True)
class _Problem:
    """Rows and factors of a call, the same forward and backward."""

    x: Tensor  # [rows, d_in]
    weight: Tensor  # [count d_out, d_in]
    lora_a: list[Tensor]  # count of [rank, d_in], in the dtype of x or of the factors
    lora_b: list[Tensor]  # count of [d_out, rank]
    gate: Tensor | None
    scale: float
    samples: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """rows, d_in, d_out, rank."""
        return *self.x.shape, *self.lora_b[0].shape

    @property
    def count(self) -> int:
        return len(self.lora_a)

    @property
    def per_sample(self) -> int:
        """Rows that share a factor."""
        return max(1, self.x.shape[0] // max(1, self.samples))

    @property
    def compute(self) -> tl.dtype:
        return compute_type(self.x, self.lora_a[0])

    @property
    def precision(self) -> str:
        return "tf32" if self.x.element_size() == 2 and self.compute == tl.float32 else "ieee"

    @property
    def block_r(self) -> int:
        return min(_HIGHEST_RANK, max(16, triton.next_power_of_2(self.sizes[3])))


def lora_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, residual: Tensor | None,
    scale: float, gate: Tensor | None,
) -> Tensor:
    """y [..., d_out]."""
    if _left_to_cublas(x):
        return lora_linear_ref(x, weight, bias, lora_a, lora_b, residual, scale, gate)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    _forward(_problem(x, weight, [lora_a], [lora_b], scale, gate), bias, residual, [y])
    return y


def lora_linear_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, gate: Tensor | None,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, empty unless need_x; d_lora_a; d_lora_b)."""
    if _left_to_cublas(x):
        return lora_linear_bwd_ref(grad, x, weight, lora_a, lora_b, scale, gate, need_x)
    problem = _problem(x, weight, [lora_a], [lora_b], scale, gate)
    d_x = x.new_empty(x.shape if need_x else 0)
    d_a, d_b = (factor.new_empty(factor.shape) for factor in (lora_a, lora_b))
    _backward(problem, [grad], d_x if need_x else None, [d_a], [d_b])
    return d_x, d_a, d_b


def lora_projections_fwd(
    x: Tensor, weight: Tensor, shadow: Tensor | None, *pairs_scale_and_gate
) -> tuple[Tensor, Tensor, Tensor]:
    """Three of [..., d_out], empty beyond the last projection."""
    if _left_to_cublas(x):
        return lora_projections_ref(x, weight, shadow, *pairs_scale_and_gate)
    *pairs, scale, gate = pairs_scale_and_gate
    lora_a, lora_b = factors(*pairs)
    made = [x.new_empty((*x.shape[:-1], b.shape[0])) for b in lora_b]
    _forward(_problem(x, weight, used(lora_a, shadow), lora_b, scale, gate), None, None, made)
    return *made, *(x.new_empty(0) for _ in range(3 - len(made)))


def lora_projections_bwd(
    grad_1: Tensor | None, grad_2: Tensor | None, grad_3: Tensor | None, x: Tensor, weight: Tensor,
    shadow: Tensor | None, *pairs_scale_gate_and_need_x,
) -> tuple[Tensor, ...]:
    """(d_x, d_a_1, d_b_1, d_a_2, ...), what is absent or not wanted empty."""
    grads = (grad_1, grad_2, grad_3)
    if _left_to_cublas(x):
        return lora_projections_bwd_ref(*grads, x, weight, shadow, *pairs_scale_gate_and_need_x)
    *pairs, scale, gate, need_x = pairs_scale_gate_and_need_x
    lora_a, lora_b = factors(*pairs)
    problem = _problem(x, weight, used(lora_a, shadow), lora_b, scale, gate)
    d_x = x.new_empty(x.shape if need_x else 0)
    d_a, d_b = ([factor.new_empty(factor.shape) for factor in side] for side in (lora_a, lora_b))
    there = [x.new_zeros((*x.shape[:-1], len(b))) if grad is None else grad for grad, b in zip(grads, lora_b)]
    _backward(problem, there, d_x if need_x else None, d_a, d_b)
    made = [gradient for pair in zip(d_a, d_b) for gradient in pair]
    return d_x, *made, *(x.new_empty(0) for _ in range(6 - len(made)))


def _left_to_cublas(x: Tensor) -> bool:
    return settings(LAUNCHES, x.device) is None or (x.device.type == "cuda" and x.element_size() > 2)


def _problem(
    x: Tensor, weight: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], scale: float, gate: Tensor | None
) -> _Problem:
    samples = x.shape[0] if x.dim() > 1 else 1
    if gate is None:
        samples = 1
    if compute_type(x, lora_a[0]) == tl.float64:  # a number reaches a kernel in 32 bits
        gate = scale * (x.new_ones(samples, dtype=torch.float64) if gate is None else gate.double())
        scale = 1.0
    contiguous = [[factor.contiguous() for factor in side] for side in (lora_a, lora_b)]
    return _Problem(_matrix(x), weight.contiguous(), *contiguous, gate, scale, samples)


def _matrix(value: Tensor) -> Tensor:
    """[rows, width], its rows without gaps; a copy only of what no stride describes."""
    rows = value.reshape(value.shape[:-1].numel(), value.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _three(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The pointers of a kernel; one that stands for none is never read."""
    return *tensors, *[tensors[0]] * (3 - len(tensors))


def _forward(problem: _Problem, bias: Tensor | None, residual: Tensor | None, made: list[Tensor]) -> None:
    x, chosen = problem.x, settings(LAUNCHES, problem.x.device)
    rows, d_in, d_out, rank = problem.sizes
    tiles = triton.cdiv(d_out, chosen.BLOCK_N)
    block_m = _block_m(chosen, rows, problem.count * tiles)
    again = 2 * rows * d_in * rank * problem.count * (tiles - 1)
    low = None if again <= chosen.again and rank <= _HIGHEST_RANK else _low(problem, chosen)[0]
    residual = None if residual is None else _matrix(residual)
    launch(
        lora_fwd_kernel, (triton.cdiv(rows, block_m) * problem.count * tiles,), x,
        x, problem.weight, *_three(problem.lora_a), *_three(problem.lora_b), bias, residual, problem.gate, low,
        *_three(made), rows, problem.per_sample, d_in, d_out, rank, problem.scale, x.stride(0),
        0 if residual is None else residual.stride(0),
        problem.count, block_m, chosen.BLOCK_N, chosen.BLOCK_K, _low_block(problem, low), problem.compute,
        problem.precision, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )


def _low_block(problem: _Problem, low: Tensor | None) -> int:
    """Columns of low at a time: all of them where they are made, few where they are read."""
    return problem.block_r if low is None else min(32, problem.block_r)


def _block_m(chosen: Launch, rows: int, columns: int) -> int:
    return chosen.BLOCK_M if triton.cdiv(rows, chosen.BLOCK_M) * columns >= chosen.blocks else chosen.FEW_M


def _low(problem: _Problem, chosen: Launch, grads: list[Tensor] | None = None) -> list[Tensor]:
    """[low], and d_low if there are gradients: [rows, count rank]."""
    x, sides = problem.x, 1 if grads is None else 2
    rows, d_in, d_out, rank = problem.sizes
    dtype = torch.float64 if problem.compute == tl.float64 else torch.float32
    made = [x.new_empty((rows, problem.count * rank), dtype=dtype) for _ in range(sides)]
    low, d_low = made if grads is not None else (*made, None)
    grid = triton.cdiv(rows, chosen.LOW_M) * sides * problem.count * triton.cdiv(rank, problem.block_r)
    launch(
        lora_low_kernel, (grid,), x,
        x, *_three(grads or [x]), *_three(problem.lora_a), *_three(problem.lora_b), problem.gate, low, d_low,
        rows, problem.per_sample, d_in, d_out, rank, problem.scale, x.stride(0),
        problem.count, chosen.LOW_M, chosen.BLOCK_K, problem.block_r, problem.compute, problem.precision,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )
    return made


def _backward(
    problem: _Problem, grads: list[Tensor], d_x: Tensor | None, d_a: list[Tensor], d_b: list[Tensor]
) -> None:
    x, chosen = problem.x, settings(LAUNCHES, problem.x.device)
    rows, d_in, d_out, rank = problem.sizes
    grads = [grad.to(x.dtype).contiguous() for grad in grads]
    low, d_low = _low(problem, chosen, grads)
    columns = triton.cdiv(d_in, chosen.BLOCK_N)
    block_m, block_r = _block_m(chosen, rows, columns), min(32, problem.block_r)
    dx_tiles = 0 if d_x is None else triton.cdiv(rows, block_m) * columns
    factor_tiles = problem.count * triton.cdiv(rank, block_r) * (columns + triton.cdiv(d_out, chosen.BLOCK_N))
    splits, split_rows = _splits(rows, chosen.BLOCK_K, triton.cdiv(2 * chosen.blocks, max(1, factor_tiles)))
    partial = low.new_empty((splits, problem.count, rank, d_in + d_out))
    launch(
        lora_bwd_kernel, (dx_tiles + factor_tiles * splits,), x,
        x, *_three(grads), problem.weight, *_three(problem.lora_a), low, d_low, d_x, partial,
        rows, d_in, d_out, rank, x.stride(0), split_rows, dx_tiles,
        problem.count, block_m, chosen.BLOCK_N, chosen.BLOCK_K, block_r, problem.compute, problem.precision,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )
    launch(
        lora_sum_kernel, (triton.cdiv(rank * (d_in + d_out), _SUM), problem.count), x,
        partial, *_three(d_a), *_three(d_b), splits, d_in, d_out, rank, problem.count, _SUM, problem.compute,
    )


def _splits(rows: int, block: int, wanted: int) -> tuple[int, int]:
    """(ranges of rows, rows of each, whole tiles): about as many as wanted, at least one."""
    split_rows = max(1, triton.cdiv(triton.cdiv(rows, wanted), block)) * block
    return max(1, triton.cdiv(rows, split_rows)), split_rows
