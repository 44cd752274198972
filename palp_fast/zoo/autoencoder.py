"""Stage 1 of emoji-64: an AutoencoderKL, 64 x 64 x 3 pixels to 16 x 16 x 8 latents."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from palp_fast.zoo.muon import Pair
from palp_fast.zoo.render import Scene, compose
from palp_fast.zoo.training import Log, device, learning_rate, load, mixed, save
from palp_fast.zoo.world import BACKGROUNDS, STYLES, World

STEPS, BATCH, PEAK_LR, KL_WEIGHT = 1500, 8, 3e-3, 1e-4


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


def train(cache: Path, world: World, sprites: np.ndarray, log: Log, steps: int = STEPS) -> AutoencoderKL:
    """Train, or go on from the last checkpoint in `cache`; returns the trained autoencoder (fp32)."""
    torch.manual_seed(0)
    model = build_model().to(device(), memory_format=torch.channels_last)
    optimizer = Pair(model, excluded=("conv_in", "decoder.conv_out"))
    start, path = 0, cache / "autoencoder.pt"
    if saved := load(path):
        model.load_state_dict(saved["model"])
        if "optimizer" in saved:
            optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    pictures = np.load(cache / "pictures.npy", mmap_mode="r")
    test = held_out_pictures(world, sprites).to(device())
    for step in range(start, steps):
        torch.manual_seed(step)
        chosen = np.sort(np.random.default_rng(step).choice(len(pictures), BATCH, replace=False))
        loss, error = _loss(model, to_pixels(pictures[chosen]).to(device()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(learning_rate(step, steps, PEAK_LR, warmup=50, decay_share=0.6))
        if (step + 1) % 100 == 0:
            log(step + 1, loss=loss.item(), squared_error=error.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            log(step + 1, held_out_squared_error=squared_error(model, test))
            save(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    return model.eval().requires_grad_(False)


def _loss(model: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with mixed():
        posterior = model.encode(pixels).latent_dist
        decoded = model.decode(posterior.sample()).sample
    difference = decoded.float() - pixels
    error = (difference ** 2).mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return error + 0.1 * difference.abs().mean() + KL_WEIGHT * kl, error.detach()
