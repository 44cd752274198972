"""Stage 2 of emoji-64: the text encoder learns what its captions look like, as a pretrained encoder knows.

Trained to carry words instead, it gave every name a direction of its own: to the UNet a rare name was noise that hid
style and background. Here names of things that look alike end close to each other.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from palp_fast.zoo.muon import Pair
from palp_fast.zoo.training import Log, learning_rate, load, save

STEPS, BATCH, PEAK_LR, WIDTH = 3000, 64, 2e-3, 192


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP text transformer with random weights for this tokenizer's vocabulary."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4,
        num_attention_heads=3, max_position_embeddings=tokenizer.model_max_length, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def trained(cache: Path, tokenizer: CLIPTokenizer, ids: Tensor, log: Log) -> CLIPTextModel:
    """The trained text encoder, frozen; trained once, on the thumbnails in `cache`, and kept there."""
    torch.manual_seed(0)
    encoder, path = build_text_encoder(tokenizer), cache / "language.pt"
    if saved := load(path):
        encoder.load_state_dict(saved["encoder"])
    else:
        train(encoder, ids, torch.from_numpy(np.load(cache / "thumbnails.npy")), log)
        save(path, encoder=encoder.state_dict())
    return encoder.eval().requires_grad_(False)


def train(
    encoder: CLIPTextModel, ids: Tensor, thumbnails: Tensor, log: Log, steps: int = STEPS, batch: int = BATCH
) -> None:
    """Train in place: every token predicts, linearly, the picture of a caption that begins as it has read so far.

    ids: int64 [captions, tokens]; thumbnails: uint8 [captions, side, side, 3]. Loss: mean squared error on [-1, 1].
    """
    torch.manual_seed(0)
    readout = torch.nn.Linear(encoder.config.hidden_size, thumbnails[0].numel())
    module = torch.nn.ModuleList([encoder, readout])
    optimizer, losses = Pair(module, excluded=("embed", "1.weight")), []
    for step in range(steps):
        chosen = torch.from_numpy(np.random.default_rng(step).choice(len(ids), batch, replace=False))
        wanted = thumbnails[chosen].flatten(1).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            drawn = readout(encoder(ids[chosen]).last_hidden_state)
        loss = F.mse_loss(drawn.float(), wanted[:, None].expand_as(drawn))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(learning_rate(step, steps, PEAK_LR, warmup=50, decay_share=0.5))
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            log(step + 1, loss=float(np.mean(losses[-100:])))
