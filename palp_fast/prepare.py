"""Everything that can be wrong with a run is found here, before weights are loaded and before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from palp_fast import backend, models, teacher
from palp_fast.conditioning import add_tokens, check_prompts, prompts_of
from palp_fast.data import load_image, pixels
from palp_fast.errors import ConfigError
from palp_fast.memory import Choice, choose
from palp_fast.memory.models import configs_of
from palp_fast.memory.step import sizes_of_split
from palp_fast.run_folder import RunFolder


@dataclass(frozen=True)
class Plan:
    """A checked run: resolved config, picture side in pixels, pictures[subject] [photos, 3, H, W], prompts with ids,
    the output folder, the checkpoint state to go on from, if any, and why a memory mode was chosen, if it was.

    lean: as of the Trainer.
    """

    config: object
    resolution: int
    pictures: list[torch.Tensor]
    prompts: dict[str, str]
    token_ids: dict[str, list[list[int]]]
    folder: RunFolder
    state: dict | None
    choice: Choice | None
    lean: bool | None = None

    def describe_prompts(self) -> str:
        """One line per prompt: its name in PALP.md, its text, and its token ids (one list per text encoder)."""
        width = max(map(len, self.prompts))
        ids = {name: " ".join(map(str, per_encoder)) for name, per_encoder in self.token_ids.items()}
        return "\n".join(f"{name:<{width}}  {text!r}  {ids[name]}" for name, text in self.prompts.items())

    def estimate(self) -> Choice:
        """Memory mode and estimate, also of a mode that was asked for."""
        return self.choice or _choice(self.config, self.resolution, self.lean)


def prepare(config, *, lean: bool | None = None) -> Plan:
    """Checks a TrainConfig and reads its photos and checkpoint. Raises ConfigError or DataError; writes nothing.

    lean: as of the Trainer. On a CUDA device an estimate chooses the memory mode, how far the no-grad pass is split and
    whether previews are decoded in tiles.
    """
    cfg = config.resolved()
    facts = models.facts(cfg.model)
    resolution = _resolution(cfg, facts)
    tokenizers = models.load_tokenizers(cfg.model)
    add_tokens(tokenizers, cfg)
    token_ids, texts = check_prompts(tokenizers, cfg), prompts_of(cfg)
    if cfg.teacher is not None:
        theirs = teacher.check(cfg, lean)
        texts |= {f"teacher's {name}": texts[name] for name in theirs}
        token_ids |= {f"teacher's {name}": ids for name, ids in theirs.items()}
    _check_backend(cfg)
    pictures = [
        torch.stack([pixels(load_image(source), resolution, resolution) for source in subject.images])
        for subject in cfg.subjects
    ]
    folder = RunFolder(cfg.output_dir, cfg.fingerprint())
    folder.check_writable()
    state, choice = folder.earlier_state(cfg.resume), None
    if cfg.device != "cpu" and (cfg.memory == "auto" or cfg.sample_every or len(sizes_of_split(cfg)) > 1):
        choice = _choice(cfg, resolution, lean)
    if choice is not None:
        cfg = cfg.replace(memory=choice.memory)
    return Plan(cfg, resolution, pictures, texts, token_ids, folder, state, choice, lean)


def _choice(cfg, resolution: int, lean: bool | None) -> Choice:
    photos = sum(len(subject.images) for subject in cfg.subjects)
    other = configs_of(models.facts(cfg.teacher)) if cfg.teacher is not None else None
    return choose(configs_of(models.facts(cfg.model)), cfg, resolution, photos, other, lean)


def _resolution(cfg, facts):
    resolution = cfg.resolution or facts.resolution
    if resolution % facts.vae_scale:
        raise ConfigError(f"resolution: {resolution} does not fit {cfg.model!r}; "
                          f"allowed: multiples of {facts.vae_scale}")
    return resolution


def _check_backend(cfg):
    try:
        for operator in backend.OPERATORS:
            backend.select(operator, torch.device(cfg.device), cfg.backend)
    except RuntimeError as error:
        raise ConfigError(f"backend: {error}; 'auto' and 'reference' always work") from error
