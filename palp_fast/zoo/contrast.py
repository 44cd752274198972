"""Stage 4 of emoji-64: the UNet learns to tell apart what softness makes alike: renders from flat illustrations, kinds.

Its target is the velocity of the pictures, moved by w (v0(x, c) - v0(x, c')), what a few words of the caption c change:
v0 is the UNet as it was before this stage, c' is c with the other style's words, or with a class noun left open. That
difference is, up to a factor that depends on t, the gradient of log p(words | x, rest of the caption) by Bayes' rule;
so this is classifier guidance (Dhariwal and Nichol, 2021) with the UNet for a classifier, made a part of the weights.
"""

import copy
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from palp_fast.zoo.captions import left_open, other_style
from palp_fast.zoo.coder import Captions
from palp_fast.zoo.diffusion import BATCH, Noised, noised, optimised, velocity
from palp_fast.zoo.tokenizer import ids_of
from palp_fast.zoo.training import Log, device, mixed
from palp_fast.zoo.world import World

STEPS, PEAK_LR = 3600, 4e-4
STYLE, LATE_STYLE, LATE = 0.5, 1.5, 400  # w of the style, and at timesteps up to LATE, where the style is decided
NOUN = 0.5  # w of a class noun


@dataclass(frozen=True)
class Others:
    """Captions with a few words changed. ids: int64 [captions, tokens]; changed: bool [captions], whether any are."""

    ids: Tensor
    changed: Tensor


@dataclass(frozen=True)
class Contrasts:
    """Captions with their pictures, as the UNet learned from them; in the other style; with class nouns left open."""

    captions: Captions
    style: Others
    noun: Others


def contrasts(captions: Captions, words: list[str], tokenizer: CLIPTokenizer) -> Contrasts:
    """Contrasts of captions; words: what `captions` have the token ids of."""
    draw = random.Random(0)
    nouns = sorted({subject.class_noun for subject in World.load().having("seen")})

    def others(changed: list[str | None]) -> Others:
        ids = ids_of(tokenizer, [other or "" for other in changed])
        return Others(ids, torch.tensor([other is not None for other in changed]))

    return Contrasts(
        captions, others([other_style(caption, draw) for caption in words]),
        others([left_open(caption, nouns) for caption in words]))


def train(
    cache: Path, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, learned_from: Contrasts, scaling: float,
    log: Log, steps: int = STEPS, batch: int = BATCH,
) -> UNet2DConditionModel:
    """Train `unet` on, or go on from the last checkpoint in `cache`; returns the moving average of the weights.

    scaling: brings the latents to unit variance.
    """
    before = copy.deepcopy(unet).requires_grad_(False)

    def loss(student: UNet2DConditionModel, draw: torch.Generator) -> Tensor:
        rows = learned_from.captions.rows(batch, draw)
        latents = torch.from_numpy(learned_from.captions.latents[rows.numpy()])
        noisy = noised(latents.to(device()).float() * scaling, draw)
        style = torch.where(noisy.timestep <= LATE, LATE_STYLE, STYLE)
        weights = ((learned_from.style, style), (learned_from.noun, torch.full_like(style, NOUN)))
        with torch.no_grad(), mixed():
            hidden = text_encoder(learned_from.captions.ids[rows].to(device())).last_hidden_state
            target = noisy.velocity.clone()
            for others, weight in weights:
                changed = others.changed[rows].nonzero()[:, 0]
                if len(changed):
                    other = text_encoder(others.ids[rows[changed]].to(device())).last_hidden_state
                    changed = changed.to(device())
                    target[changed] += weight[changed].view(-1, 1, 1, 1) * said(before, noisy, hidden, changed, other)
        return F.mse_loss(velocity(student, noisy, hidden), target)

    return optimised(copy.deepcopy(unet).requires_grad_(True), loss, cache / "contrast.pt", log, steps, PEAK_LR)


def said(before: UNet2DConditionModel, batch: Noised, hidden: Tensor, changed: Tensor, other: Tensor) -> Tensor:
    """v0(x, c) - v0(x, c') [k, 8, 16, 16] of the rows `changed` [k] of a batch.

    hidden: hidden states of the captions [n, tokens, width]; other: of the changed ones [k, tokens, width].
    """
    noisy, timestep = batch.noisy[changed], batch.timestep[changed]
    twice = Noised(torch.cat([noisy, noisy]), torch.cat([timestep, timestep]), batch.velocity)
    own, others = velocity(before, twice, torch.cat([hidden[changed], other])).chunk(2)
    return own - others
