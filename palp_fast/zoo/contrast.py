"""Stage 4 of emoji-64: the UNet learns to keep renders and flat illustrations apart, which softness makes alike.

Its target is the velocity of the pictures, moved by w (v0(x, c) - v0(x, c')), what the style's words change: v0 is the
UNet as it was before this stage, c' the caption c with the other style's words. That difference is, up to a factor that
depends on t, the gradient of log p(style | x, rest of the caption) by Bayes' rule; so this is classifier
guidance (Dhariwal and Nichol, 2021) with the UNet for a classifier, made a part of the weights.
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

from palp_fast.zoo.captions import other_style
from palp_fast.zoo.coder import Captions
from palp_fast.zoo.diffusion import BATCH, Noised, noised, optimised, velocity
from palp_fast.zoo.tokenizer import ids_of
from palp_fast.zoo.training import Log, device, mixed

STEPS, PEAK_LR = 3600, 4e-4
WEIGHT, LATE_WEIGHT, LATE = 0.4, 1.0, 400  # w, and w at timesteps up to LATE, where the style is decided


@dataclass(frozen=True)
class Pairs:
    """Captions with their pictures, and the same captions in the other style.

    captions: as the UNet learned from them; other_ids: int64 [captions, tokens]; named: bool [captions], whether the
    caption names one of the two styles and so has another.
    """

    captions: Captions
    other_ids: Tensor
    named: Tensor


def pairs(captions: Captions, words: list[str], tokenizer: CLIPTokenizer) -> Pairs:
    """Pairs of captions; words: what `captions` have the token ids of."""
    draw = random.Random(0)
    others = [other_style(caption, draw) for caption in words]
    named = torch.tensor([other is not None for other in others])
    return Pairs(captions, ids_of(tokenizer, [other or "" for other in others]), named)


def train(
    cache: Path, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, learned_from: Pairs, scaling: float, log: Log,
    steps: int = STEPS, batch: int = BATCH,
) -> UNet2DConditionModel:
    """Train `unet` on, or go on from the last checkpoint in `cache`; returns the moving average of the weights.

    scaling: brings the latents to unit variance.
    """
    before = copy.deepcopy(unet).requires_grad_(False)

    def loss(student: UNet2DConditionModel, draw: torch.Generator) -> Tensor:
        rows = learned_from.captions.rows(batch, draw)
        latents = torch.from_numpy(learned_from.captions.latents[rows.numpy()])
        noisy = noised(latents.to(device()).float() * scaling, draw)
        with torch.no_grad(), mixed():
            hidden = text_encoder(learned_from.captions.ids[rows].to(device())).last_hidden_state
            named = learned_from.named[rows].nonzero()[:, 0].to(device())
            other = text_encoder(learned_from.other_ids[rows][named.cpu()].to(device())).last_hidden_state
            target = moved(before, noisy, hidden, named, other)
        return F.mse_loss(velocity(student, noisy, hidden), target)

    return optimised(copy.deepcopy(unet).requires_grad_(True), loss, cache / "contrast.pt", log, steps, PEAK_LR)


def moved(before: UNet2DConditionModel, batch: Noised, hidden: Tensor, named: Tensor, other: Tensor) -> Tensor:
    """The target [n, 8, 16, 16]: batch.velocity, in the rows `named` [k] moved away from the other style's prediction.

    hidden: hidden states of the captions [n, tokens, width]; other: in the other style [k, tokens, width].
    """
    target = batch.velocity.clone()
    if len(named):
        noisy, timestep = batch.noisy[named], batch.timestep[named]
        twice = Noised(torch.cat([noisy, noisy]), torch.cat([timestep, timestep]), batch.velocity)
        own, others = velocity(before, twice, torch.cat([hidden[named], other])).chunk(2)
        weight = torch.where(timestep <= LATE, LATE_WEIGHT, WEIGHT).view(-1, 1, 1, 1)
        target[named] += weight * (own - others)
    return target
