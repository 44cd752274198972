"""LoRA and token files that stock diffusers, ComfyUI and A1111/Forge load.

Two LoRA files with the same numbers: PEFT keys (diffusers) and kohya keys (everything else). Tokens go into a file of
their own. A file depends on its content alone (no clock, no machine, keys in a fixed order) and appears whole or not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import safe_open

Layers = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16"}
_KOHYA_PREFIX = "lora_unet_"
# Module names with an underscore of their own: kohya keys turn every dot into one, so reading back needs this list.
_UNDERSCORED = ("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v", "to_out")


def save_peft(path, layers: Layers, *, lora_alpha: float, metadata: Mapping[str, str], dtype=torch.float32) -> Path:
    """Write `layers` under PEFT keys, `unet.<path>.lora_A.weight` [r, d_in] and `.lora_B.weight` [d_out, r].

    PEFT keys have no place for alpha: diffusers takes it from the entry `lora_adapter_metadata`, and without that entry
    it assumes alpha = rank. delta-W = (lora_alpha / r) B A. `dtype` is torch.float32 or torch.float16.
    Raises ValueError for no layers, shapes that do not fit together, or values that `dtype` cannot hold.
    """
    rank = _common_rank(layers)
    tensors = {}
    for name, (lora_a, lora_b) in layers.items():
        tensors[f"unet.{name}.lora_A.weight"] = _stored(lora_a, dtype, name)
        tensors[f"unet.{name}.lora_B.weight"] = _stored(lora_b, dtype, name)
    adapter = {"unet.r": rank, "unet.lora_alpha": _number(lora_alpha), "unet.target_modules": sorted(layers)}
    adapter_entry = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}
    return _write_safetensors(path, tensors, {**metadata, **adapter_entry})


def save_kohya(path, layers: Layers, *, lora_alpha: float, metadata: Mapping[str, str], dtype=torch.float32) -> Path:
    """Write `layers` under kohya keys, `lora_unet_<path with _>.{lora_down.weight, lora_up.weight, alpha}`.

    alpha is one fp32 scalar per module, whatever `dtype` is: readers apply delta-W = (alpha / r) up down.
    Raises ValueError as save_peft.
    """
    _common_rank(layers)
    tensors = {}
    for name, (lora_a, lora_b) in layers.items():
        key = _KOHYA_PREFIX + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = _stored(lora_a, dtype, name)
        tensors[f"{key}.lora_up.weight"] = _stored(lora_b, dtype, name)
        tensors[f"{key}.alpha"] = torch.tensor(float(lora_alpha))
    return _write_safetensors(path, tensors, {**metadata, "format": "pt"})


def save_embedding(path, rows: Sequence[torch.Tensor], *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write one token's rows [n, width], fp32: one tensor for SD (`emb_params`), two for SDXL (`clip_l`, `clip_g`).

    Readers refuse or misread a file with further keys. The file's stem is the word that A1111 and ComfyUI listen for.
    """
    names = {1: ("emb_params",), 2: ("clip_l", "clip_g")}.get(len(rows))
    if names is None or any(row.ndim != 2 for row in rows):
        shapes = [list(row.shape) for row in rows]
        raise ValueError(f"rows: {shapes}; allowed: one (SD) or two (SDXL) tensors [vectors, width]")
    tensors = {name: _stored(row, torch.float32, name) for name, row in zip(names, rows)}
    return _write_safetensors(path, tensors, {**(metadata or {}), "format": "pt"})


def metadata(
    *,
    name: str,
    family: str,
    cross_attention_dim: int,
    rank: int,
    lora_alpha: float,
    resolution: int,
    prediction_type: str = "epsilon",
    trigger: str = "",
    kind: str = "lora",
) -> dict[str, str]:
    """The strings that A1111, Forge and ComfyUI read to tell what a file is for.

    name: file stem. family: "sd" or "sdxl". resolution: training side in pixels. prediction_type: as in the scheduler.
    trigger: the words to put into a prompt. kind: "lora" or "textual-inversion". The date comes from SOURCE_DATE_EPOCH
    when it is set and is left out otherwise, so that equal runs give equal files.
    """
    version, architecture = _base_model(family, cross_attention_dim, prediction_type)
    entries = {
        "ss_v2": str(version == "sd_v2"),
        "ss_base_model_version": version,
        "ss_output_name": name,
        "ss_resolution": f"({resolution}, {resolution})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
    }
    if kind == "lora":
        entries["ss_network_module"] = "networks.lora"
        entries["ss_network_dim"] = str(rank)
        entries["ss_network_alpha"] = str(_number(lora_alpha))
        entries["ss_network_args"] = "{}"
    if trigger:
        entries["modelspec.trigger_phrase"] = trigger
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        date = datetime.fromtimestamp(int(epoch), timezone.utc)
        entries["modelspec.date"] = date.strftime("%Y-%m-%dT%H:%M:%S")
    return entries


def load_lora(path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """Read a UNet LoRA file, PEFT or kohya keys: ({module path: (lora_a [r, d_in], lora_b [d_out, r])}, alpha), fp32.

    A file that states no alpha has alpha = rank, as diffusers takes it. Raises ValueError naming the file when a key is
    of another kind, or when modules differ in alpha or rank.
    """
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        adapter = json.loads((file.metadata() or {}).get("lora_adapter_metadata") or "{}")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = _parse_key(key, path)
        parts.setdefault(name, {})[part] = tensor
    layers, alphas = {}, set()
    for name, found in sorted(parts.items()):
        if not {"a", "b"} <= found.keys():
            raise ValueError(f"{path}: module {name} has one LoRA factor only")
        layers[name] = (found["a"].float(), found["b"].float())
        if "alpha" in found:
            alphas.add(float(found["alpha"]))
    rank = _common_rank(layers)
    if len(alphas) > 1:
        raise ValueError(f"{path}: modules differ in alpha ({sorted(alphas)}); allowed: one value for all")
    return layers, alphas.pop() if alphas else float(adapter.get("unet.lora_alpha", rank))


def _parse_key(key: str, path) -> tuple[str, str]:
    """Tensor name -> (diffusers module path, "a", "b" or "alpha")."""
    peft = {".lora_A.weight": "a", ".lora_B.weight": "b"}
    kohya = {".lora_down.weight": "a", ".lora_up.weight": "b", ".alpha": "alpha"}
    for prefix, suffixes in (("unet.", peft), (_KOHYA_PREFIX, kohya)):
        for suffix, part in suffixes.items():
            if key.startswith(prefix) and key.endswith(suffix):
                name = key[len(prefix) : -len(suffix)]
                return (name if prefix == "unet." else _module_path(name)), part
    raise ValueError(f"{path}: key {key!r} is not a UNet LoRA key; allowed: unet.*.lora_A/lora_B or {_KOHYA_PREFIX}*")


def _module_path(kohya_name: str) -> str:
    for word in _UNDERSCORED:
        kohya_name = kohya_name.replace(word, word.replace("_", "\0"))
    return kohya_name.replace("_", ".").replace("\0", "_")


def _base_model(family: str, cross_attention_dim: int, prediction_type: str) -> tuple[str, str]:
    """(ss_base_model_version, modelspec architecture); SD2 is SD1's shape with a wider text encoder."""
    if family == "sdxl":
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    if cross_attention_dim == 1024:
        return "sd_v2", "stable-diffusion-v2-768-v" if prediction_type == "v_prediction" else "stable-diffusion-v2-512"
    return "sd_v1", "stable-diffusion-v1"


def _common_rank(layers: Layers) -> int:
    if not layers:
        raise ValueError("layers is empty: there is no LoRA to store")
    ranks = set()
    for name, (lora_a, lora_b) in layers.items():
        if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1]:
            shapes = f"lora_a {list(lora_a.shape)}, lora_b {list(lora_b.shape)}"
            raise ValueError(f"{name}: {shapes}; allowed: [r, d_in], [d_out, r]")
        ranks.add(lora_a.shape[0])
    if len(ranks) > 1:
        raise ValueError(f"modules differ in rank ({sorted(ranks)}); allowed: one rank for all")
    return ranks.pop()


def _number(value: float) -> int | float:
    """16.0 -> 16: peft and kohya write whole alphas as integers."""
    return int(value) if float(value).is_integer() else float(value)


def _stored(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"dtype {dtype}; allowed: {', '.join(map(str, _DTYPE_NAMES))}")
    stored = tensor.detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(stored).all():
        raise ValueError(f"{name}: a value is not finite as {dtype}")
    return stored


def _write_safetensors(path, tensors: Mapping[str, torch.Tensor], entries: Mapping[str, str]) -> Path:
    """safetensors' format: header length (u64), JSON header, data. Its own writer does not fix the metadata's order."""
    # Larger elements first keep every tensor aligned to its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict = {}
    chunks, offset = [], 0
    for name, tensor in ordered:
        chunks.append(tensor.numpy().tobytes())
        end = offset + len(chunks[-1])
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    data = b"".join(chunks)
    digest = {"modelspec.hash_sha256": "0x" + hashlib.sha256(data).hexdigest()} if "modelspec.title" in entries else {}
    header = {"__metadata__": dict(sorted({**entries, **digest}.items())), **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return write_atomic(path, len(text).to_bytes(8, "little") + text + data)


def write_atomic(path, content: bytes) -> Path:
    """Write a file so that a reader, or a crash, sees the old one or the whole new one; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
