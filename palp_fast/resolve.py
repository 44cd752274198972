"""From the settings a user gave to those a run uses: presets, method defaults, subjects, checks across fields."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from palp_fast import presets, prompts
from palp_fast.config import SUBJECT_PROMPT, Subject, TrainConfig
from palp_fast.data import image_digest, image_sources
from palp_fast.errors import ConfigError

# What a method needs differently; sds and nfsd have no student guidance, so their beta is 1.
_METHOD_DEFAULTS: dict[str, dict[str, Any]] = {"nfsd": {"alpha": 7.5, "rescale": False}}
_WITHOUT_STUDENT_GUIDANCE = ("sds", "nfsd")
# They decide where files go and how often, not what is learned; the one-subject fields are inside `subjects` by then.
# memory changes rounding alone, and "auto" depends on what else runs on the card; graphs and teacher_offload change
# nothing.
_NOT_IN_FINGERPRINT = ("output_dir", "resume", "sample_every", "checkpoint_every", "preset", "images", "class_noun",
                       "subject_prompt", "token", "memory", "cuda_graph", "teacher_offload")  # fmt: skip
_QUANTISED = ("int8", "nf4")


def resolve(cfg: TrainConfig) -> TrainConfig:
    """See TrainConfig.resolved."""
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    values |= {**presets.fields_of(cfg), **_METHOD_DEFAULTS.get(cfg.method, {}), **cfg.given}
    if cfg.method in _WITHOUT_STUDENT_GUIDANCE:
        values["beta"] = 1.0
    values["subjects"] = _with_tokens(_folded(cfg), cfg.token_vectors)
    values |= {"images": None, "class_noun": None, "token": None, "subject_prompt": SUBJECT_PROMPT}
    values["lora_alpha"] = values["lora_alpha"] or float(values["rank"])
    values["device"] = _device(cfg.device)
    values["cuda_graph"] = _cuda_graph(cfg.cuda_graph, values["device"])
    if values["memory"] == "auto" and values["device"] == "cpu":
        values["memory"] = "fast"
    values["base_dtype"] = _base_dtype(values["base_dtype"], values["device"])
    _check_teacher(cfg)
    if cfg.teacher is not None:
        values["teacher_base_dtype"] = values["teacher_base_dtype"] or values["base_dtype"]
    if cfg.lora_targets == "none" and not cfg.learn_token:
        raise ConfigError("lora_targets: 'none' with learn_token False trains nothing; allowed: one of the two")
    prompts.check(TrainConfig(**values))
    if values["clean_prompt"] is None:
        values["clean_prompt"] = prompts.clean_prompt(cfg.prompt, values["subjects"])
    check_output_dir(cfg.output_dir)
    return TrainConfig(**values)


def _folded(cfg: TrainConfig) -> tuple[Subject, ...]:
    """The subjects with their photos listed; one subject given by images and class_noun has the placeholder [V]."""
    if cfg.subjects is None:
        for name in ("images", "class_noun"):
            if getattr(cfg, name) is None:
                raise ConfigError(f"{name}: missing; allowed: images and class_noun for one subject, or subjects")
        subjects = (Subject(cfg.images, cfg.class_noun, "[V]", cfg.subject_prompt, cfg.token),)
        fields = ["images"]
    else:
        subjects, fields = cfg.subjects, [f"subjects[{i}].images" for i in range(len(cfg.subjects))]
        for name in ("images", "class_noun", "token"):
            if getattr(cfg, name) is not None:
                raise ConfigError(f"{name}: {getattr(cfg, name)!r} beside subjects; put it into a Subject")
        if cfg.subject_prompt != SUBJECT_PROMPT:
            raise ConfigError(f"subject_prompt: {cfg.subject_prompt!r} beside subjects; use Subject.prompt")
    return tuple(
        subject.replace(
            images=tuple(image_sources(subject.images, field)),
            class_noun=re.sub(r"^\s*(an?|the)\s+(?=\S)", "", subject.class_noun, flags=re.IGNORECASE).strip(),
            prompt=_own_prompt(subject),
        )
        for subject, field in zip(subjects, fields, strict=True)
    )


def _own_prompt(subject: Subject) -> str:
    """The default prompt speaks of the subject's own placeholder, whatever its name."""
    return subject.prompt if "prompt" in subject.given else f"a photo of {subject.placeholder}"


def _with_tokens(subjects: tuple[Subject, ...], vectors: int) -> tuple[Subject, ...]:
    """Token words for subjects that have none: "my_" and the class noun, numbered where a word is taken."""
    taken: set[str] = set()
    for subject in subjects:
        if subject.token is not None:
            _take(subject.token, vectors, taken)
    named = []
    for subject in subjects:
        token = subject.token
        if token is None:
            token = _free_word(subject.class_noun, vectors, taken)
            _take(token, vectors, taken)
        named.append(subject.replace(token=token))
    return tuple(named)


def _take(token: str, vectors: int, taken: set[str]) -> None:
    words = {word.lower() for word in prompts.token_words(token, vectors)}
    if words & taken:
        raise ConfigError(f"token: {token!r} names two subjects; each needs words of its own, {sorted(words)}")
    taken |= words


def _free_word(class_noun: str, vectors: int, taken: set[str]) -> str:
    slug = "_".join(re.findall(r"[a-z0-9]+", class_noun.lower())) or "subject"
    names = (f"my_{slug}" if i == 1 else f"my_{slug}{i}" for i in range(1, len(taken) + 2))
    return next(name for name in names if taken.isdisjoint(prompts.token_words(name, vectors)))


def _check_teacher(cfg: TrainConfig) -> None:
    for name in ("teacher_base_dtype", "teacher_offload"):
        if cfg.teacher is None and getattr(cfg, name):
            raise ConfigError(f"{name}: {getattr(cfg, name)!r} without a teacher; "
                              f"allowed beside teacher=, alone: {TrainConfig.__dataclass_fields__[name].default!r}")


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(device.partition(":")[2] or 0) >= count:
            raise ConfigError(f"device: {device!r} is not allowed; torch sees {count} CUDA devices here; 'cpu' works")
    return device


def _cuda_graph(asked: str | bool, device: str) -> str | bool:
    """As asked where a device can have graphs, else False."""
    from palp_fast.graph import obstacle

    if asked is False or (reason := obstacle(device)) is None:
        return asked
    if asked is True:
        raise ConfigError(f"cuda_graph: True is not allowed here: {reason}; allowed: 'auto', False")
    return False


def base_dtype(cfg: TrainConfig, teacher: bool = False) -> str:
    """What a resolved config stores frozen weights in: the model's, or those of another teacher."""
    return cfg.teacher_base_dtype or cfg.base_dtype if teacher else cfg.base_dtype


def compute_dtype(cfg: TrainConfig, teacher: bool = False) -> str:
    """The dtype that a resolved config computes in: "fp32", "bf16" or "fp16", whatever the weights are stored in.

    teacher: of another teacher: its weights' own, where these are quantised the model's.
    """
    stored = next((dtype for dtype in (base_dtype(cfg, teacher), cfg.base_dtype) if dtype not in _QUANTISED), "auto")
    return _base_dtype(stored, cfg.device)


def _base_dtype(dtype: str, device: str) -> str:
    """fp32 on CPU; on CUDA bf16 where the card computes in it, otherwise fp16."""
    import torch

    if dtype != "auto":
        return dtype
    if device == "cpu":
        return "fp32"
    if not torch.cuda.is_available():
        return "fp16"  # a card that is not here, whose memory is estimated
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"


def check_output_dir(output_dir: str | os.PathLike) -> None:
    """Whether the folder exists or can be created, without creating it."""
    folder = Path(os.path.abspath(output_dir))
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"output_dir: {output_dir!r} is not allowed; {str(existing)!r} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir: {output_dir!r} is not allowed; no permission to write in {str(existing)!r}")


def fingerprint(cfg: TrainConfig) -> str:
    """See TrainConfig.fingerprint."""
    cfg = resolve(cfg)
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in _NOT_IN_FINGERPRINT}
    values["subjects"] = [
        {f.name: getattr(subject, f.name) for f in dataclasses.fields(subject)}
        | {"images": [image_digest(source) for source in subject.images]}
        for subject in cfg.subjects
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
