"""renoise: compiled against the PyTorch reference. python -m bench.bench_renoise

Bytes, with s = bytes per stored element: x_t, eps and noise are read (3 s), each copy is written (s).
"""

import torch

from bench.elementwise import Case, grid, images, options, report
from palp_fast import functional

SHAPES = [(batch, 4, side, side) for side in (64, 128) for batch in (4, 8, 16, 32)]
DTYPES = (torch.float32, torch.bfloat16)
VARIANTS = [(1, False), (4, False), (4, True)]  # copies, another timestep
TOLERANCE = 1e-4  # a 16-bit result may be rounded the other way


def case(shape: tuple, dtype: torch.dtype, variant: tuple[int, bool], device: str) -> Case:
    values = images(3, shape, dtype, device)
    copies, other = variant
    old, new = torch.rand(2, shape[0]).to(device)

    def call(backend: str):
        fresh = new if other else None
        return (functional.renoise(*values, old, alpha_bar_new=fresh, copies=copies, backend=backend),)

    name = f"{list(shape)} {dtype} x{copies}{' u' if other else ''}"
    return Case(name, call, values[0].numel() * dtype.itemsize * (3 + copies))


if __name__ == "__main__":
    chosen = options(__doc__)
    cases = (case(shape, dtype, variant, chosen.device) for shape, dtype, variant in grid(SHAPES, DTYPES, VARIANTS))
    report("renoise", cases, chosen, TOLERANCE)
