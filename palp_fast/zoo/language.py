"""Stage 2 of emoji-64: the text encoder learns what its captions look like, as a pretrained encoder knows.

Trained to carry words instead, it gave every name a direction of its own: to the UNet a rare name was noise that hid
style and background. Here names of things that look alike end close to each other.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from palp_fast.zoo.muon import Pair
from palp_fast.zoo.training import Log, learning_rate, load, save

STEPS, BATCH, PEAK_LR, WIDTH = 3000, 64, 2e-3, 192
PARTS = 16  # of a thumbnail, 4 x 4: as many as the UNet's coarsest grid has cells


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
    """Train in place; the loss is the mean squared error on [-1, 1], that of the parts plus that of the wholes.

    Every token predicts, linearly, the picture of a caption that begins as it has read so far; each of the last PARTS
    tokens, which are padding, one part of it and that part's place. The UNet's attention can then look up what belongs
    where it draws, instead of having to unfold a whole picture out of one vector.
    ids: int64 [captions, tokens]; thumbnails: uint8 [captions, side, side, 3].
    """
    torch.manual_seed(0)
    whole = thumbnails[0].numel()
    readouts = [torch.nn.Linear(encoder.config.hidden_size, size) for size in (whole, whole // PARTS + PARTS)]
    module = torch.nn.ModuleList([encoder, *readouts])
    optimizer, losses = Pair(module, excluded=("embed", "1.weight", "2.weight")), []
    for step in range(steps):
        chosen = torch.from_numpy(np.random.default_rng(step).choice(len(ids), batch, replace=False))
        pictures = thumbnails[chosen].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            hidden = encoder(ids[chosen]).last_hidden_state
            wholes, parts = readouts[0](hidden[:, :-PARTS]), readouts[1](hidden[:, -PARTS:])
        whole_loss = F.mse_loss(wholes.float(), pictures.flatten(1)[:, None].expand_as(wholes))
        part_loss = F.mse_loss(parts.float(), _parts(pictures))
        optimizer.zero_grad()
        (whole_loss + part_loss).backward()
        optimizer.step(learning_rate(step, steps, PEAK_LR, warmup=50, decay_share=0.5))
        losses.append((whole_loss.item(), part_loss.item()))
        if (step + 1) % 100 == 0:
            mean = np.mean(losses[-100:], axis=0)
            log(step + 1, whole_loss=float(mean[0]), part_loss=float(mean[1]))


def _parts(pictures: Tensor) -> Tensor:
    """[n, side, side, 3] -> [n, PARTS, values of a part, then its place as a one-hot vector], row by row."""
    n, side = pictures.shape[:2]
    across = math.isqrt(PARTS)
    cells = pictures.view(n, across, side // across, across, side // across, 3).transpose(2, 3).reshape(n, PARTS, -1)
    return torch.cat([cells, torch.eye(PARTS).expand(n, PARTS, PARTS)], dim=2)
