"""Stage 3 of emoji-64: the UNet, trained by v-prediction on cached latents; the text encoder stays as it is."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel

from palp_fast.zoo.coder import Mixture
from palp_fast.zoo.training import Log, device, learning_rate, load, mixed, save

STEPS, BATCH, PEAK_LR, WARMUP, DECAY_SHARE, EMA = 31700, 32, 6e-4, 200, 0.5, 0.998
EARLIER_SHARE = 0.5  # of a batch: timesteps from the first half, where style is lost
CODED_SHARE = 0.25  # of a batch: captions that have a coded token in place of a name
PAIRS = 5.0  # times as often as scenes of one subject, scenes of two are drawn: the UNet learns them last


def build_unet() -> UNet2DConditionModel:
    """UNet with random weights: 16 x 16 x 8 latents, self- and cross-attention on 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, block_out_channels=(64, 128, 192), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 3), cross_attention_dim=192, norm_num_groups=16)


def build_scheduler() -> DDIMScheduler:
    """Scaled-linear, v-prediction, sampled from the last timestep on.

    beta_end is 0.02 where Stable Diffusion has 0.012: with so few latents the mean colour could still be read from x_t
    at that schedule's last timestep, and samples took the colour of their noise instead of their caption's.
    """
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1)


def train(
    cache: Path, text_encoder: CLIPTextModel, captions: Mixture, log: Log, steps: int = STEPS, batch: int = BATCH
) -> UNet2DConditionModel:
    """Train, or go on from the last checkpoint in `cache`; returns the moving average of the weights.

    captions: with the pictures' latents; batch: pictures of a step.
    """
    def loss(unet: UNet2DConditionModel, draw: torch.Generator) -> Tensor:
        with torch.no_grad():
            hidden, clean = captions.draw(text_encoder, batch, draw)
        batch_of = noised(clean, draw)
        return F.mse_loss(velocity(unet, batch_of, hidden), batch_of.velocity)

    torch.manual_seed(0)
    return optimised(build_unet(), loss, cache / "diffusion.pt", log, steps, PEAK_LR)


def optimised(
    unet: UNet2DConditionModel, loss: Callable[[UNet2DConditionModel, torch.Generator], Tensor], path: Path, log: Log,
    steps: int, peak_lr: float,
) -> UNet2DConditionModel:
    """Minimise loss(unet, generator of the step) from the checkpoint `path` on; returns the weights' moving average."""
    unet = unet.to(device(), memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # explicit products: faster than fused attention at 64 tokens
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), peak_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start, losses = 0, []
    if saved := load(path):
        unet.load_state_dict(saved["unet"])
        average.load_state_dict(saved["average"])
        if "optimizer" in saved:
            optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in range(start, steps):
        found = loss(unet, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        found.backward()
        if step == start:
            _demand_gradients(unet)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_lr, WARMUP, DECAY_SHARE)
        optimizer.step()
        with torch.no_grad():
            share = 1 - min(EMA, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), share)
        losses.append(found.item())
        if (step + 1) % 100 == 0:
            log(step + 1, loss=float(np.mean(losses[-100:])), lr=lr)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(path, unet=unet.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict(),
                 step=step + 1)
    return average.eval()


def _demand_gradients(unet: UNet2DConditionModel) -> None:
    """Raise unless every parameter has a gradient: compiled on a CPU by torch 2.13, 280 had zeros, unnoticed."""
    without = [name for name, weight in unet.named_parameters() if weight.grad is None or not weight.grad.any()]
    if without:
        raise RuntimeError(f"{len(without)} parameters of the UNet get no gradient, the first of them {without[0]}")


@dataclass(frozen=True)
class Noised:
    """Latents at timesteps: noisy, velocity fp32 [n, 8, 16, 16], timestep int64 [n]; velocity is what is predicted."""

    noisy: Tensor
    timestep: Tensor
    velocity: Tensor


def noised(clean: Tensor, draw: torch.Generator) -> Noised:
    """Scaled latents fp32 [n, 8, 16, 16] with noise, on their device; the timesteps as EARLIER_SHARE says."""
    alphas = build_scheduler().alphas_cumprod
    noise = torch.randn(clean.shape, generator=draw).to(clean.device)
    timestep = torch.randint(len(alphas), (len(clean),), generator=draw)
    earlier = torch.rand(len(clean), generator=draw) < EARLIER_SHARE
    timestep = torch.where(earlier, timestep // 2, timestep)
    signal = alphas[timestep].sqrt().view(-1, 1, 1, 1).to(clean.device)
    sigma = (1 - alphas[timestep]).sqrt().view(-1, 1, 1, 1).to(clean.device)
    return Noised(signal * clean + sigma * noise, timestep.to(clean.device), signal * noise - sigma * clean)


def velocity(unet: UNet2DConditionModel, batch: Noised, hidden: Tensor) -> Tensor:
    """The UNet's prediction of batch.velocity, fp32, for hidden states [n, tokens, width]."""
    noisy = batch.noisy.contiguous(memory_format=torch.channels_last)
    with mixed():
        return unet(noisy, batch.timestep, hidden).sample.float()
