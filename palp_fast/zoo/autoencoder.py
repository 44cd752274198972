"""Stage 1 of emoji-64: an AutoencoderKL, 64 x 64 x 3 pixels to 16 x 16 x 8 latents."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from palp_fast.zoo.muon import Pair
from palp_fast.zoo.render import Scene, compose
from palp_fast.zoo.training import Log, device, learning_rate, load, mixed, save
from palp_fast.zoo.world import BACKGROUNDS, STYLES, World

STEPS, BATCH, PEAK_LR, KL_WEIGHT = 1500, 8, 3e-3, 1e-4
DECODER_STEPS, DECODER_BATCH, DECODER_LR = 1400, 16, 2e-3  # then, of the decoder alone


def build_model() -> AutoencoderKL:
    """The autoencoder with random weights."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(32, 64, 128), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False, norm_num_groups=8, sample_size=64)


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, 64, 64, 3] -> fp32 [B, 3, 64, 64] in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def held_out_pictures(world: World, sprites: np.ndarray, count: int = 256) -> torch.Tensor:
    """Pictures of held-out subjects in every style and background: [count, 3, 64, 64] in [-1, 1]."""
    held = [place for place, subject in enumerate(world.subjects) if subject.role in ("development", "acceptance")]
    draw, pictures = np.random.default_rng(64), []
    while len(pictures) < count:
        style, background = str(draw.choice(STYLES)), str(draw.choice(BACKGROUNDS))
        if world.allows(style, background):
            scene = Scene((int(draw.choice(held)),), style, background, "", len(pictures))
            pictures.append(compose(sprites, scene))
    return to_pixels(np.stack(pictures))


@torch.no_grad()
def squared_error(model: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Mean squared error of the round trip through the posterior mean, on [-1, 1]."""
    errors = [((model.decode(model.encode(part).latent_dist.mode()).sample.clamp(-1, 1) - part) ** 2).mean()
              for part in pixels.split(32)]
    return float(torch.stack(errors).mean())


def train(
    cache: Path, world: World, sprites: np.ndarray, log: Log, steps: int = STEPS, decoder_steps: int = DECODER_STEPS
) -> AutoencoderKL:
    """Train both halves, then the decoder alone, or go on from the last checkpoint in `cache`; returns the fp32 model.

    The decoder profits from more steps and larger batches long after latents that still move would help no one.
    """
    torch.manual_seed(0)
    model = build_model().to(device(), memory_format=torch.channels_last)
    saved = load(cache / "autoencoder.pt") or {"step": 0}
    if "model" in saved:
        model.load_state_dict(saved["model"])
    test = held_out_pictures(world, sprites).to(device())
    whole = Phase(0, steps, BATCH, PEAK_LR, _loss)
    alone = Phase(steps, steps + decoder_steps, DECODER_BATCH, DECODER_LR, _decoder_loss)
    _run(model, whole, saved, cache, test, log)
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(False)
    _run(model, alone, saved, cache, test, log)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Phase:
    """Steps first .. last - 1, with a learning rate and an optimizer of their own; loss(model, pixels): loss, error."""

    first: int
    last: int
    batch: int
    peak_lr: float
    loss: Callable[[AutoencoderKL, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _run(model: AutoencoderKL, phase: Phase, saved: dict, cache: Path, test: torch.Tensor, log: Log) -> None:
    """What is left of a phase after the checkpoint `saved`, in place."""
    optimizer = Pair(model, excluded=("conv_in", "decoder.conv_out"))
    if "optimizer" in saved and phase.first < saved["step"] <= phase.last:
        optimizer.load_state_dict(saved["optimizer"])
    pictures = np.load(cache / "pictures.npy", mmap_mode="r")
    for step in range(max(phase.first, saved["step"]), phase.last):
        torch.manual_seed(step)
        chosen = np.sort(np.random.default_rng(step).choice(len(pictures), phase.batch, replace=False))
        loss, error = phase.loss(model, to_pixels(pictures[chosen]).to(device()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.requires_grad], 1.0)
        own, whole = step - phase.first, phase.last - phase.first
        optimizer.step(learning_rate(own, whole, phase.peak_lr, warmup=50, decay_share=0.6))
        if (step + 1) % 100 == 0:
            log(step + 1, loss=loss.item(), squared_error=error.item())
        if (step + 1) % 500 == 0 or step + 1 == phase.last:
            log(step + 1, held_out_squared_error=squared_error(model, test))
            save(cache / "autoencoder.pt", model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)


def _loss(model: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with mixed():
        posterior = model.encode(pixels).latent_dist
        decoded = model.decode(posterior.sample()).sample
    loss, error = _distance(decoded, pixels, 0.1)
    return loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel(), error


def _decoder_loss(model: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with mixed():
        with torch.no_grad():
            latents = model.encode(pixels).latent_dist.mode()
        decoded = model.decode(latents).sample
    return _distance(decoded, pixels, 0.3)


def _distance(decoded: torch.Tensor, pixels: torch.Tensor, absolute: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean squared error + absolute x mean absolute error, mean squared error without its graph)."""
    difference = decoded.float() - pixels
    error = (difference ** 2).mean()
    return error + absolute * difference.abs().mean(), error.detach()
