"""The settings of a training run: TrainConfig and Subject, checked before anything is loaded or written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from palp_fast import rules
from palp_fast.errors import ConfigError
from palp_fast.rules import Settings, boolean, choice, integer, number, optional, path, ruled, text

# Katzir et al., Noise-Free Score Distillation, arXiv 2310.17590.
NFSD_NEGATIVE_PROMPT = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"
)

_TOKEN = text(
    pattern=r"[A-Za-z][A-Za-z0-9_-]*",
    allowed="one plain word of ASCII letters, digits, _ and -, starting with a letter",
)


def _images(value: Any) -> Any:
    if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
        return value
    return tuple(value)


_IMAGES = rules.Rule("images", "a folder, an image file, a PIL image, or a list of image files and PIL images", _images)


@dataclasses.dataclass(frozen=True)
class Subject(Settings):
    """One thing to learn: its photos, class noun, placeholder, own prompt y_P, token word, and class phrase for y_c."""

    images: Any = ruled(_IMAGES)
    class_noun: str = ruled(text())
    placeholder: str = ruled(text(pattern=r"\[[A-Za-z]\w*\]", allowed="a word in brackets such as [V1]"), default="[V1]")
    prompt: str = ruled(text(), default="a photo of [V1]")
    token: str | None = ruled(optional(_TOKEN, "made from class_noun"), default=None)
    class_phrase: str | None = ruled(optional(text(), "class_noun by the article rule"), default=None)

    def _label(self, field: str) -> str:
        return f"Subject.{field}"


def _subjects(value: Any) -> tuple[Subject, ...]:
    if isinstance(value, Subject | Mapping | str) or not isinstance(value, Iterable):
        raise TypeError
    subjects = tuple(Subject(**item) if isinstance(item, Mapping) else item for item in value)
    if not subjects or not all(isinstance(item, Subject) for item in subjects):
        raise TypeError
    return subjects


_SUBJECTS = rules.Rule("subjects", "a list of Subject (or of their fields as dicts), at least one", _subjects)
_NOUN = optional(text(), "with `subjects`")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Everything that decides a training run. Wrong names and values raise ConfigError here, at construction.

    Checks that look at several fields or at the disk (photos, prompts, output folder) are in `resolved`.
    """

    model: str = ruled(path("a built-in name, a local diffusers folder, a .safetensors file or a hub id"))
    teacher: str | None = ruled(
        rules.Rule("choice", "None (the frozen base model; another teacher is not available in this version)",
                   choice(None).convert), default=None)  # fmt: skip
    images: Any = ruled(optional(_IMAGES, "with `subjects`"), default=None)
    class_noun: str | None = ruled(_NOUN, default=None)
    subject_prompt: str = ruled(text(), default="a photo of [V]")
    subjects: tuple[Subject, ...] | None = ruled(optional(_SUBJECTS, "one subject: images, class_noun"), default=None)
    token: str | None = ruled(optional(_TOKEN, "made from class_noun"), default=None)
    prompt: str = ruled(text())
    clean_prompt: str | None = ruled(optional(text(), "from `prompt` and the class nouns"), default=None)
    output_dir: str = ruled(path("a folder, which is created"))
    method: str = ruled(choice("palp", "dreambooth", "sds", "nfsd"), default="palp")
    alpha: float = ruled(number(above=0), default=15.0)
    beta: float = ruled(number(least=0), default=7.5)
    negative_prompt: str = ruled(text(empty=True), default=NFSD_NEGATIVE_PROMPT)
    residual_weight: float = ruled(number(least=0), default=0.1)
    rescale: bool = ruled(boolean(), default=True)
    same_noise: bool = ruled(boolean(), default=True)
    same_timestep: bool = ruled(boolean(), default=True)
    loss_space: str = ruled(choice("model", "eps"), default="model")
    rank: int = ruled(integer(1), default=32)
    lora_alpha: float | None = ruled(optional(number(above=0), "= rank"), default=None)
    lora_targets: str = ruled(choice("attention", "cross_kv", "none"), default="attention")
    learn_token: bool = ruled(boolean(), default=True)
    token_vectors: int = ruled(integer(1), default=1)
    token_norm: str = ruled(choice("free", "initial"), default="free")
    steps: int = ruled(integer(1), default=500)
    batch_size: int = ruled(integer(1), default=1)
    grad_accumulation: int = ruled(integer(1), default=4)
    lr: float = ruled(number(above=0), default=1e-4)
    token_lr: float = ruled(number(above=0), default=5e-4)
    lr_schedule: str = ruled(choice("constant", "linear", "cosine"), default="constant")
    optimizer: str = ruled(choice("adamw8bit", "adamw", "lion8bit"), default="adamw8bit")
    max_grad_norm: float = ruled(number(above=0), default=1.0)
    timesteps: str = ruled(choice("uniform", "stratified", "adaptive"), default="stratified")
    subject_sampling: str = ruled(choice("image", "subject"), default="image")
    resolution: int | None = ruled(optional(integer(8, multiple=8), "the model's own"), default=None)
    memory: str = ruled(choice("auto", "fast", "low", later=("balanced",)), default="auto")
    base_dtype: str = ruled(choice("auto", "fp32", "bf16", "fp16", later=("int8", "nf4")), default="auto")
    seed: int = ruled(integer(0), default=0)
    device: str = ruled(text(pattern=r"auto|cpu|cuda(:\d+)?", allowed="'auto', 'cpu', 'cuda', 'cuda:N'"), default="auto")
    cuda_graph: str | bool = ruled(
        rules.Rule("choice", "'auto', False (True is not available in this version)",
                   choice("auto", False).convert, ("auto", False)), default="auto")  # fmt: skip
    checkpoint_every: int = ruled(integer(0), default=100)
    sample_every: int = ruled(integer(0), default=0)
    resume: str = ruled(choice("auto", "never", "must"), default="auto")
    preset: str | None = ruled(choice(None, "paper", later=("4gb", "6gb", "8gb", "12gb")), default=None)
    backend: str = ruled(choice("auto", "reference", "cpu", "triton", "cuda"), default="auto")

    @classmethod
    def from_toml(cls, file: str | os.PathLike) -> TrainConfig:
        """The config in a TOML file: field names as keys, several subjects as [[subjects]] tables.

        Relative paths are relative to the working directory. Raises ConfigError naming the file or the field.
        """
        from palp_fast.toml import read

        return cls(**read(file))

    def to_toml(self, file: str | os.PathLike) -> None:
        """Writes the fields that were given; `from_toml` gives back an equal config. PIL images raise ConfigError."""
        from palp_fast.toml import write

        write(self.given, file)

    def resolved(self) -> TrainConfig:
        """Every field as it will be used: preset and method defaults applied, one subject folded into `subjects`.

        Reads no model and writes nothing. Idempotent. Raises ConfigError for what only several fields together, the
        photo folders or the output folder show to be wrong.
        """
        from palp_fast.resolve import resolve

        return resolve(self)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the result: the resolved fields and the photos, not where files go.

        Raises ConfigError as `resolved`, and DataError for a photo that cannot be read.
        """
        from palp_fast.resolve import fingerprint

        return fingerprint(self)
