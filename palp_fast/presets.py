"""Named defaults, which given fields override: "paper", and one for each size of card and family of models."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Batch x accumulation is 32 in the paper; a given batch_size or grad_accumulation sets the other one.
PAPER_BATCH = 32
PAPER: dict[str, Any] = {
    "alpha": 15.0,
    "beta": 7.5,
    "residual_weight": 1.0,
    "rank": 32,
    "steps": 500,
    "batch_size": 1,
    "grad_accumulation": PAPER_BATCH,
    "lr": 5e-5,
    "token_lr": 5e-5,
    "timesteps": "uniform",
    "optimizer": "adamw",
}
# By GiB of the card and family (models.facts): the estimate and a tenth of it, CUDA's context and the libraries'
# workspaces (memory.ASSUMED) fit (tests/test_presets.py). Batch x accumulation is 4 everywhere, as without a preset.
CARDS: dict[str, dict[str, dict[str, Any]]] = {
    "4gb": {
        "sd": {"memory": "balanced", "batch_size": 1, "grad_accumulation": 4},
        "sdxl": {"base_dtype": "nf4", "memory": "low", "batch_size": 1, "grad_accumulation": 4},
    },
    "6gb": {
        "sd": {"memory": "fast", "batch_size": 1, "grad_accumulation": 4},
        "sdxl": {"base_dtype": "int8", "memory": "low", "batch_size": 1, "grad_accumulation": 4},
    },
    "8gb": {
        "sd": {"memory": "fast", "batch_size": 2, "grad_accumulation": 2},
        "sdxl": {"base_dtype": "int8", "memory": "balanced", "batch_size": 1, "grad_accumulation": 4},
    },
    "12gb": {
        "sd": {"memory": "fast", "batch_size": 4, "grad_accumulation": 1},
        "sdxl": {"memory": "balanced", "batch_size": 1, "grad_accumulation": 4},
    },
}
FAMILIES = {"sd": "SD1.x", "sdxl": "SDXL"}
_BENCH_MODELS = {"sd": ("sd15", "4x64x64"), "sdxl": ("sdxl", "4x128x128")}
NAMES = ("paper", *CARDS)


def fields_of(cfg) -> dict[str, Any]:
    """What the preset of a TrainConfig sets; reads the model's configuration for those of cards."""
    if cfg.preset in CARDS:
        from palp_fast.models import facts

        return dict(CARDS[cfg.preset][facts(cfg.model).family])
    preset = dict(PAPER) if cfg.preset == "paper" else {}
    if cfg.preset == "paper":
        for one, other in (("batch_size", "grad_accumulation"), ("grad_accumulation", "batch_size")):
            if one in cfg.given:
                preset[other] = max(1, PAPER_BATCH // cfg.given[one])
    return preset


def estimate_of(card: str, family: str):
    """memory.Estimate of a card's preset: default settings, one subject of five photos, on a CUDA device in 16 bits."""
    from palp_fast.config import Subject, TrainConfig
    from palp_fast.memory import estimates
    from palp_fast.memory.models import FAMILIES as SHAPES

    subjects = [Subject(images="photos", class_noun="cat", placeholder="[V]")]
    cfg = TrainConfig(model=FAMILIES[family], prompt="a [V]", output_dir="run", subjects=subjects, device="cuda",
                      **({"base_dtype": "fp16"} | CARDS[card][family]))
    configs = SHAPES[FAMILIES[family]]
    return estimates(configs, cfg, configs.resolution, 5, [cfg.memory])[0]


def measured(card: str, family: str, results: Iterable[Path]) -> str:
    """Peak and seconds per step of end-to-end benchmark rows of a CUDA device with these settings."""
    fields, (model, latents) = CARDS[card][family], _BENCH_MODELS[family]
    if fields["batch_size"] == 1:  # the rows are of one sample
        wanted = {"kind": "cuda", "model": model, "latents": latents, "status": "ok",
                  "provider": f"palp_fast {fields['memory']}", "dtype": fields.get("base_dtype", "fp16")}
        for file in results:
            with open(file, newline="", encoding="utf-8") as lines:
                for row in csv.DictReader(lines):
                    if all(row.get(name) == value for name, value in wanted.items()):
                        peak, seconds = int(row["peak_bytes"]) / 2**30, float(row["step_s"])
                        return f"{peak:.2f} GiB, {seconds:.3f} s ({row['device']})"
    return "not measured"
