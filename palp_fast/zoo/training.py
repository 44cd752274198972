"""What both training stages of emoji-64 share: schedule, resumable checkpoints, the log."""

import json
import os
import time
from pathlib import Path

import torch

from palp_fast.doctor import fast_on_cpu


def device() -> torch.device:
    """Where the networks of this world are trained: on the CUDA card if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_dtype() -> torch.dtype:
    """bf16, but fp32 on a CPU for which torch has no fast products in bf16: it takes hundreds of times as long."""
    return torch.bfloat16 if device().type == "cuda" or fast_on_cpu("bf16") else torch.float32


def mixed() -> torch.autocast:
    """Products in product_dtype()."""
    return torch.autocast(device().type, torch.bfloat16, enabled=product_dtype() == torch.bfloat16)


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay_share: float) -> float:
    """Linear warm-up to `peak`, a plateau, and a linear decay to zero over the last `decay_share` of the steps."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / max(1, round(steps * decay_share)))


def save(path: Path, **state) -> None:
    """Write a checkpoint in one piece: a temporary file, then a rename."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load(path: Path) -> dict | None:
    """The checkpoint, or None when there is none yet."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


class Log:
    """JSON lines: stage, step, seconds since the stage (re)started, and whatever is measured."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage, self.start = path, stage, time.time()

    def __call__(self, step: int, **values: float) -> None:
        row = {"stage": self.stage, "step": step, "seconds": round(time.time() - self.start, 1)}
        row.update({key: float(f"{value:.5g}") for key, value in values.items()})
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
