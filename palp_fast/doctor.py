"""What this installation has and lacks: versions, devices, the backend of every operator with the reason, extras."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys

REQUIRED = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "click", "tqdm")
# Import name: what it gives. Training needs none of them.
OPTIONAL = {
    "peft": "loading LoRA files by diffusers' own loader; without it, our layers draw the same",
    "pillow_heif": "reading HEIC photos from phones (pip install pillow-heif)",
    "accelerate": "faster loading of models with less memory",
    "triton": "kernels for the layers of the UNet on NVIDIA cards; without it, PyTorch's own operators",
    "bitsandbytes": "its kernel for NF4 weights on NVIDIA cards; without it, ours; 8-bit optimizers are built in",
    "xformers": "nothing; attention runs on PyTorch's own",
}


def report(optimizer=None) -> str:
    """The doctor's text: sections of indented lines. optimizer: one of palp_fast.optim, whose state is told too."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "operators": _operators(),
        "optional packages": _optional(),
    }
    if optimizer is not None:
        sections["optimizer state"] = [optimizer.kept_in_32_bits() or "8 bits for every tensor"]
    return "\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _versions() -> list[str]:
    from palp_fast import __version__

    lines = [f"palp-fast {__version__}", f"Python {platform.python_version()}, {platform.platform()}"]
    return lines + [f"{package} {_version(package)}" for package in REQUIRED]


def _devices() -> list[str]:
    import torch

    lines = [f"cpu: {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]
    if slow := [dtype for dtype in ("bf16", "fp16") if not fast_on_cpu(dtype)]:
        lines.append(f"cpu: {_slow(slow)}")
    if torch.version.cuda is None:
        return [*lines, "cuda: none; this build of torch has no CUDA"]
    if not torch.cuda.is_available():
        return [*lines, f"cuda: none; torch was built for CUDA {torch.version.cuda} but finds no usable card or driver"]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if card.major >= 8 else "fp16 only"
        lines.append(f"cuda:{i}: {card.name}, {card.total_memory / 2**30:.1f} GiB, sm_{card.major}{card.minor}, {bf16}")
    return lines


def fast_on_cpu(dtype: str) -> bool:
    """Whether torch has fast products in "bf16" or "fp16" for this processor; those in fp32 are."""
    import torch

    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", None)
    return dtype == "fp32" or (supported is not None and bool(supported()))


def warning(cfg) -> str | None:
    """A line for a resolved config that computes in a dtype that is slow on its device."""
    from palp_fast.resolve import compute_dtype

    computed = dict.fromkeys(compute_dtype(cfg, teacher) for teacher in (False, cfg.teacher is not None))
    slow = [dtype for dtype in computed if cfg.device == "cpu" and not fast_on_cpu(dtype)]
    return f"warning: {_slow(slow)}" if slow else None


def _slow(dtypes: list[str]) -> str:
    named = " and ".join(dtypes)
    return f"torch has no fast products in {named} for this CPU; those in fp32 take a small part of the time"


def cpu_name() -> str:
    """Name of the processor, as the system tells it, and its instruction set: hosts give very different ones one name."""
    import torch

    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _processor() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _operators() -> list[str]:
    from palp_fast import backend, ops  # noqa: F401 - loading the operators loads their C++ library

    rows = backend.report()
    width = max(len(row.operator) for row in rows)
    return [f"{row.operator:<{width}} on {row.device:<4}: {row.backend} ({row.reason})" for row in rows]


def _optional() -> list[str]:
    lines = []
    for name, gives in OPTIONAL.items():
        found = importlib.util.find_spec(name) is not None
        lines.append(f"{name} {_version(name) if found else 'missing'}: {gives}")
    return lines
