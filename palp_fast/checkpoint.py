"""Checkpoints that are whole or not there: written aside, synced, renamed; the newest complete one is kept.

<folder>/step-00000100/{state.pt, manifest.json}; the manifest, written last, holds size and SHA-256 of the state.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import torch

_STATE, _MANIFEST = "state.pt", "manifest.json"


def save(folder: str | os.PathLike, state: dict) -> Path:
    """Writes `state` (tensors, numbers, strings, nested dicts and lists; "step" and "fingerprint" among them).

    Returns the checkpoint's own folder, <folder>/step-<step>, with a suffix where another state of that step is on disk
    already. Older ones go only once the new one is safe there; the same state is not written twice.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{state['step']:08d}"
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    with open(temporary / _STATE, "wb") as file:
        torch.save(state, file)
        _sync(file)
    manifest = {"step": state["step"], "fingerprint": state["fingerprint"], **_identity(temporary / _STATE)}
    with open(temporary / _MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        _sync(file)
    _sync_folder(temporary)
    newest = find(folder)
    if newest and newest[1] == manifest:
        final = newest[0]
    else:
        final = _free(folder / name)
        os.replace(temporary, final)
    _sync_folder(folder)
    for other in folder.iterdir():
        if other != final and other.name.lstrip(".").startswith("step-"):
            shutil.rmtree(other, ignore_errors=True)
    return final


def _free(path: Path) -> Path:
    """path, or path.1, path.2, ...: nothing is ever moved out of the way, so that one checkpoint is always there."""
    names = itertools.chain([path.name], (f"{path.name}.{number}" for number in itertools.count(1)))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def find(folder: str | os.PathLike) -> tuple[Path, dict] | None:
    """(path, manifest) of the newest complete checkpoint in `folder`, or None. A torn one is passed over."""
    folder = Path(folder)
    candidates = sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []
    for path in candidates:
        try:
            manifest = json.loads((path / _MANIFEST).read_text())
            if _identity(path / _STATE).items() <= manifest.items():
                return path, manifest
        except (OSError, ValueError, AttributeError):
            continue
    return None


def clear(folder: str | os.PathLike) -> None:
    """Removes every checkpoint: a run from the start must not be continued from an earlier one's."""
    for path in Path(folder).glob("*step-*"):
        shutil.rmtree(path)


def load(folder: str | os.PathLike) -> dict | None:
    """The state of the newest complete checkpoint in `folder`, its tensors on the CPU, or None if there is none."""
    found = find(folder)
    return None if found is None else torch.load(found[0] / _STATE, map_location="cpu", weights_only=True)


def _identity(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _sync(file):
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder):
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
