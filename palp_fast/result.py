"""What a run leaves behind: LoRA in two formats, token files, and where everything is."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from palp_fast import export


@dataclass(frozen=True)
class TrainResult:
    """The files of a run. lora and lora_kohya are None when nothing but the token was trained.

    lora: PEFT keys; embedding: {token word: file}; metrics: JSON lines, one object per step; samples: pictures in
    order; checkpoint: its folder; steps: optimizer steps done; seconds: of training in this process; peak_memory_bytes:
    of tensors on the device (CUDA) or of the process (CPU); config: as resolved.
    """

    lora: Path | None
    lora_kohya: Path | None
    embedding: dict[str, Path]
    metrics: Path
    samples: list[Path]
    checkpoint: Path
    steps: int
    seconds: float
    peak_memory_bytes: int
    config: object

    def apply_to(self, pipeline) -> None:
        """Loads the LoRA and the tokens into a diffusers pipeline of the same model, by the pipeline's own loaders."""
        from palp_fast.generate import apply_files

        apply_files(pipeline, self.lora, self.embedding)


def write_files(folder: Path, trainer) -> tuple[Path | None, Path | None, dict[str, Path]]:
    """Writes <name>.peft.safetensors, <name>.safetensors (kohya keys) and embeddings/<token>.safetensors.

    name is the token word; of several subjects, all of them joined by "+". Returns (PEFT, kohya, {token: file}).
    """
    cfg, components = trainer.config, trainer.components
    tokens = [subject.token for subject in cfg.subjects]
    name, lora, kohya = "+".join(tokens), None, None
    facts = {
        "family": components.family,
        "cross_attention_dim": components.unet.config.cross_attention_dim,
        "rank": cfg.rank,
        "lora_alpha": cfg.lora_alpha,
        "resolution": trainer.resolution,
        "prediction_type": components.prediction_type,
    }
    layers = {path: (a, b) for path, a, b in trainer.named_lora()}
    if layers:
        entries = export.metadata(name=name, trigger=", ".join(tokens), **facts)
        settings = {"lora_alpha": cfg.lora_alpha, "metadata": entries}
        lora = export.save_peft(folder / f"{name}.peft.safetensors", layers, **settings)
        kohya = export.save_kohya(folder / f"{name}.safetensors", layers, **settings)
    embedding = {}
    for token, rows in zip(tokens, trainer.rows):
        entries = export.metadata(name=token, trigger=token, kind="textual-inversion", **facts)
        embedding[token] = export.save_embedding(folder / "embeddings" / f"{token}.safetensors", rows, metadata=entries)
    return lora, kohya, embedding


def cap_memory(device: str) -> None:
    """Holds this process to what its CUDA device has free: beyond it comes an error, not a spill to system memory."""
    if device != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
        torch.cuda.set_per_process_memory_fraction(min(1.0, (free + torch.cuda.memory_reserved(index)) / total), index)


def watch_memory(device: str) -> None:
    """Starts peak_memory_bytes anew where that can be done (CUDA)."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: str) -> int:
    """The most memory that tensors took on a CUDA device, or that the process took on a CPU (0 where unknown)."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
