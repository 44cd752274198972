"""Tensors on disk by the content they were made from: latents of photos, conditions of prompts.

A key is the SHA-256 of all that decides a value: weights, input, versions. So nothing is ever out of date, and a folder
may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from palp_fast.export import write_atomic

VARIABLE = "PALP_FAST_CACHE"
_CHECK = "sha256"


def folder() -> Path | None:
    """Where caches are: $PALP_FAST_CACHE, else "palp_fast" in the user's cache directory.

    None where the variable is "off", or unset for a user without a home.
    """
    given = os.environ.get(VARIABLE, "")
    if given == "off":
        return None
    try:
        return Path(given).expanduser() if given else _users() / "palp_fast"
    except RuntimeError:
        return None


def _users() -> Path:
    homes = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("", "Library/Caches")}
    variable, path = homes.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    return Path(os.environ.get(variable) or Path("~", path).expanduser())


def key(*parts: str | Tensor | nn.Module | None) -> str:
    """SHA-256 (hex) of texts, of tensors with dtype and shape, and of modules: their parameters and buffers by name."""
    digest = hashlib.sha256(f"palp_fast 1, torch {torch.__version__}".encode())
    for part in parts:
        tensors = part.state_dict() if isinstance(part, nn.Module) else {"": part}
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                digest.update(f"\0{name} {value.dtype} {list(value.shape)}\0".encode())
                digest.update(_bytes(value))
            else:
                digest.update(f"\0{value!r}\0".encode())
    return digest.hexdigest()


def fetch(kind: str, name: Callable[[], str], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the key name(): from <folder>/<kind>/<name()>.safetensors, on the CPU, else of make(), and kept.

    A file that is not whole is made again, with a warning; one that cannot be written is a warning.
    """
    where = folder()
    if where is None:
        return make()
    file = where / kind / f"{name()}.safetensors"
    found = _read(file)
    if found is None:
        found = make()
        kept = {part: value.detach().to("cpu").contiguous() for part, value in found.items()}
        try:
            write_atomic(file, save(kept, {_CHECK: _checksum(kept)}))
        except OSError as error:
            warnings.warn(f"cache: {str(file)!r} cannot be written ({error.strerror}); {VARIABLE}=off switches it off",
                          stacklevel=2)
    return found


def _read(file: Path) -> dict[str, Tensor] | None:
    """What a file holds, None without one or where its content is not what was written."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as content:
            found = {part: content.get_tensor(part) for part in content.keys()}
            whole = (content.metadata() or {}).get(_CHECK) == _checksum(found)
    except (OSError, SafetensorError):
        whole = False
    if not whole:
        warnings.warn(f"cache: {str(file)!r} is damaged and made again", stacklevel=3)
        return None
    return found


def _checksum(tensors: dict[str, Tensor]) -> str:
    return key(*(part for name in sorted(tensors) for part in (name, tensors[name])))


def _bytes(value: Tensor) -> memoryview:
    return memoryview(value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
