"""The settings of a training run: TrainConfig and Subject, checked before anything is loaded or written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from palp_fast import presets, rules
from palp_fast.errors import ConfigError
from palp_fast.rules import Settings, boolean, choice, integer, number, optional, path, ruled, text

# Katzir et al., Noise-Free Score Distillation, arXiv 2310.17590.
NFSD_NEGATIVE_PROMPT = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"
)

SUBJECT_PROMPT = "a photo of [V]"
# Lower case, since CLIP's tokenizer lowers its prompts.
_WORD = text(pattern=r"[a-z][a-z0-9_-]*", allowed="one plain word of a-z, 0-9, _ and -, starting with a letter")
_TOKEN = optional(_WORD, "made from class_noun")
_BRACKETED = text(pattern=r"\[[A-Za-z]\w*\]", allowed="a word in square brackets such as [V1]")


_PHRASE = optional(text(), "class_noun by the article rule")


def _images(value: Any) -> Any:
    if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
        return value
    return tuple(value)


_IMAGES = rules.Rule("images", "a folder, an image file, a PIL image, or a list of image files and PIL images", _images)


@dataclasses.dataclass(frozen=True)
class Subject(Settings):
    """One thing to learn: its photos, class noun, placeholder, own prompt y_P, token word, and class phrase for y_c."""

    images: Any = ruled(_IMAGES, "photos")
    class_noun: str = ruled(text(), "what the subject is")
    placeholder: str = ruled(_BRACKETED, "its slot in prompts", default="[V1]")
    prompt: str = ruled(text(), "y_P, describes the photos", default="a photo of [V1]")
    token: str | None = ruled(_TOKEN, "names the subject in files and when drawing", default=None)
    class_phrase: str | None = ruled(_PHRASE, "stands for the subject in y_c", default=None)

    def _label(self, field: str) -> str:
        return f"Subject.{field}"


def _subjects(value: Any) -> tuple[Subject, ...]:
    if isinstance(value, Subject | Mapping | str) or not isinstance(value, Iterable):
        raise TypeError
    subjects = tuple(Subject(**item) if isinstance(item, Mapping) else item for item in value)
    if not subjects or not all(isinstance(item, Subject) for item in subjects):
        raise TypeError
    return subjects


_MODEL = path("a built-in name, a local diffusers folder, a .safetensors file or a hub id")
_TEACHER = optional(_MODEL, "the frozen base itself")
_SUBJECTS = optional(
    rules.Rule("subjects", "a list of Subject (or of their fields as dicts), at least one", _subjects),
    "one subject, by images and class_noun",
)
_CLEAN = optional(text(), "made from prompt and the class nouns")
_RESOLUTION = optional(integer(8, multiple=8), "the model's own")
_DTYPE = choice("auto", "fp32", "bf16", "fp16", "int8", "nf4")
_TEACHER_DTYPE = choice(None, "fp32", "bf16", "fp16", "int8", "nf4")
_DEVICE = text(pattern=r"auto|cpu|cuda(:\d+)?", allowed="'auto', 'cpu', 'cuda' or 'cuda:N'")
_CUDA_GRAPH = choice("auto", True, False)
_PRESET = choice(None, *presets.NAMES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Everything that decides a training run. Wrong names and values raise ConfigError here, at construction.

    Checks that look at several fields or at the disk (photos, prompts, output folder) are in `resolved`.
    """

    model: str = ruled(_MODEL, "the base model")
    teacher: str | None = ruled(_TEACHER, "another model that guides, in the same latent space", default=None)
    images: Any = ruled(optional(_IMAGES, "with subjects"), "photos of the one subject", default=None)
    class_noun: str | None = ruled(optional(text(), "with subjects"), "what the subject is: cat", default=None)
    subject_prompt: str = ruled(text(), "y_P, describes the photos", default=SUBJECT_PROMPT)
    subjects: tuple[Subject, ...] | None = ruled(_SUBJECTS, "several subjects, each with its photos", default=None)
    token: str | None = ruled(_TOKEN, "names the subject in files and when drawing", default=None)
    prompt: str = ruled(text(), "y, the target prompt with placeholders: a sketch of [V]")
    clean_prompt: str | None = ruled(_CLEAN, "y_c, the target prompt without placeholders", default=None)
    output_dir: str = ruled(path("a folder"), "where everything is written; created")
    method: str = ruled(choice("palp", "dreambooth", "sds", "nfsd"), "what gives the gradient", default="palp")
    alpha: float = ruled(number(above=0), "guidance scale of the teacher (nfsd: 7.5)", default=15.0)
    beta: float = ruled(number(least=0), "guidance scale of the student, palp only", default=7.5)
    negative_prompt: str = ruled(text(empty=True), "for nfsd", default=NFSD_NEGATIVE_PROMPT)
    residual_weight: float = ruled(number(least=0), "lambda, the weight of prompt alignment", default=0.1)
    rescale: bool = ruled(boolean(), "alignment uniform over timesteps (nfsd: False)", default=True)
    same_noise: bool = ruled(boolean(), "re-noise with the noise of the first pass", default=True)
    same_timestep: bool = ruled(boolean(), "re-noise to the timestep of the first pass", default=True)
    loss_space: str = ruled(choice("model", "eps"), "where v-prediction models are compared", default="model")
    rank: int = ruled(integer(1), "of the LoRA", default=32)
    lora_alpha: float | None = ruled(optional(number(above=0), "= rank"), "LoRA's scale is this / rank", default=None)
    lora_targets: str = ruled(choice("attention", "cross_kv", "none"), "what LoRA sits on", default="attention")
    learn_token: bool = ruled(boolean(), "train the embedding of the token", default=True)
    token_vectors: int = ruled(integer(1), "embedding rows per token", default=1)
    token_norm: str = ruled(choice("free", "initial"), "initial keeps the rows' starting norm", default="free")
    steps: int = ruled(integer(1), "optimizer steps", default=500)
    batch_size: int = ruled(integer(1), "samples of one pass", default=1)
    grad_accumulation: int = ruled(integer(1), "passes per optimizer step", default=4)
    lr: float = ruled(number(above=0), "learning rate of the LoRA", default=1e-4)
    token_lr: float = ruled(number(above=0), "learning rate of the token rows", default=5e-4)
    lr_schedule: str = ruled(choice("constant", "linear", "cosine"), "of both rates", default="constant")
    optimizer: str = ruled(choice("adamw8bit", "adamw", "lion8bit"), "of the LoRA", default="adamw8bit")
    max_grad_norm: float = ruled(number(above=0), "gradients are clipped to this norm", default=1.0)
    timesteps: str = ruled(choice("uniform", "stratified", "adaptive"), "how they are drawn", default="stratified")
    subject_sampling: str = ruled(choice("image", "subject"), "what is drawn first", default="image")
    resolution: int | None = ruled(_RESOLUTION, "side of the training pictures in pixels", default=None)
    memory: str = ruled(choice("auto", "fast", "balanced", "low"), "how much is recomputed, not kept", default="auto")
    base_dtype: str = ruled(_DTYPE, "of the frozen weights", default="auto")
    teacher_base_dtype: str | None = ruled(_TEACHER_DTYPE, "of the teacher's; none: as base_dtype", default=None)
    teacher_offload: bool = ruled(boolean(), "the teacher's UNet waits in the CPU's memory", default=False)
    seed: int = ruled(integer(0), "decides everything random", default=0)
    device: str = ruled(_DEVICE, "where to train", default="auto")
    cuda_graph: str | bool = ruled(_CUDA_GRAPH, "whole steps as one CUDA graph", default="auto")
    checkpoint_every: int = ruled(integer(0), "steps; 0: only at the end", default=100)
    sample_every: int = ruled(integer(0), "steps between sample pictures; 0: none", default=0)
    resume: str = ruled(choice("auto", "never", "must"), "auto: a run of the same config goes on", default="auto")
    preset: str | None = ruled(_PRESET, "defaults, which given fields override", default=None)
    backend: str = ruled(choice("auto", "reference", "cpu", later=("triton", "cuda")), "of operators", default="auto")

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

        memory and cuda_graph stay "auto" on a CUDA device: the model decides, in the Trainer. Reads no model, for a
        preset of a card its configuration files, and writes nothing. Idempotent. Raises ConfigError for what only
        several fields together, the photo folders or the output folder show to be wrong.
        """
        from palp_fast.resolve import resolve

        return resolve(self)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the result: the resolved fields and the photos, not where files go.

        Raises ConfigError as `resolved`, and DataError for a photo that cannot be read.
        """
        from palp_fast.resolve import fingerprint

        return fingerprint(self)
