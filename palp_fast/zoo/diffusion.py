"""Stage 2 of emoji-64: text encoder and UNet, trained together by v-prediction on cached latents."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from palp_fast.zoo.autoencoder import to_pixels
from palp_fast.zoo.muon import Pair
from palp_fast.zoo.training import Log, learning_rate, load, save

STEPS, BATCH, PEAK_LR, WARMUP, DECAY_SHARE, EMA = 5000, 32, 3e-3, 100, 0.5, 0.998
WIDTH = 192


def build_unet() -> UNet2DConditionModel:
    """UNet with random weights: 16 x 16 x 8 latents, self- and cross-attention on 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, block_out_channels=(64, 128, 192), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 3), cross_attention_dim=WIDTH, norm_num_groups=16)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP text transformer with random weights for this tokenizer's vocabulary."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4,
        num_attention_heads=3, max_position_embeddings=tokenizer.model_max_length, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's scaled-linear schedule; v-prediction, sampled from the last timestep on."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1)


def cache_latents(cache: Path, autoencoder: AutoencoderKL) -> None:
    """Write latents.npy, posterior means fp16 [pictures, 8, 16, 16], unscaled; a finished file is left alone."""
    path = cache / "latents.npy"
    if path.exists():
        return
    pictures = np.load(cache / "pictures.npy", mmap_mode="r")
    latents = np.empty((len(pictures), 8, 16, 16), np.float16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(pictures), 64):
            part = to_pixels(pictures[start:start + 64])
            latents[start:start + 64] = autoencoder.encode(part).latent_dist.mode().float().numpy()
    np.save(path, latents)


class Model(torch.nn.Module):
    """Text encoder and UNet as one module, for one optimizer and one moving average."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder, self.unet = build_text_encoder(tokenizer), build_unet()
        self.unet.set_attn_processor(AttnProcessor())  # explicit products: faster than fused attention at 64 tokens
        self.unet.to(memory_format=torch.channels_last)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predicted v, [B, 8, 16, 16], for noisy latents, timesteps [B] and token ids [B, tokens]."""
        return self.unet(latents, timestep, self.text_encoder(ids).last_hidden_state).sample


def train(cache: Path, tokenizer: CLIPTokenizer, scaling: float, log: Log, steps: int = STEPS) -> Model:
    """Train, or go on from the last checkpoint in `cache`; returns the moving average of the weights.

    scaling: factor that brings the cached latents to unit variance.
    """
    torch.manual_seed(0)
    model = Model(tokenizer)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = Pair(model, excluded=("conv_in", "conv_out", "embed"))
    start, path = 0, cache / "diffusion.pt"
    if saved := load(path):
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    model.compile()
    torch.set_flush_denormal(True)  # tiny gradients of rare tokens would slow every pass over them
    latents = np.load(cache / "latents.npy")
    ids = tokenize(tokenizer, json.loads((cache / "captions.json").read_text()))
    alphas = build_scheduler().alphas_cumprod
    losses = []
    for step in range(start, steps):
        draw = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(ids), (BATCH,), generator=draw)
        clean = torch.from_numpy(latents[chosen.numpy()]).float() * scaling
        loss = _loss(model, clean, ids[chosen], alphas, draw)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        lr = learning_rate(step, steps, PEAK_LR, WARMUP, DECAY_SHARE)
        optimizer.step(lr)
        with torch.no_grad():
            share = 1 - min(EMA, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            log(step + 1, loss=float(np.mean(losses[-100:])), grad_norm=float(norm), lr=lr)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(path, model=model.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict(),
                 step=step + 1)
    return average.eval()


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids int64 [captions, model_max_length], padded and cut as the pipeline does."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                     return_tensors="pt").input_ids


def _loss(model: Model, clean: torch.Tensor, ids: torch.Tensor, alphas: torch.Tensor,
          draw: torch.Generator) -> torch.Tensor:
    noise = torch.randn(clean.shape, generator=draw)
    timestep = torch.randint(len(alphas), (len(clean),), generator=draw)
    signal = alphas[timestep].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alphas[timestep]).sqrt().view(-1, 1, 1, 1)
    noisy = (signal * clean + sigma * noise).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(noisy, timestep, ids)
    return F.mse_loss(predicted.float(), signal * noise - sigma * clean)
