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
from palp_fast.zoo.training import Log, learning_rate, load, mixed, save

STEPS, BATCH, PEAK_LR, WIDTH = 4000, 64, 2e-3, 192
ACROSS = 8  # the UNet reads its caption on an 8 x 8 grid
PARTS = ACROSS * ACROSS  # one token for each cell


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP text transformer with random weights for this tokenizer's vocabulary."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4,
        num_attention_heads=3, max_position_embeddings=tokenizer.model_max_length, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def trained(cache: Path, tokenizer: CLIPTokenizer, ids: Tensor, scaling: float, log: Log) -> CLIPTextModel:
    """The trained text encoder, frozen; trained once, on the portraits' latents in `cache`, and kept there."""
    torch.manual_seed(0)
    encoder, path = build_text_encoder(tokenizer), cache / "language.pt"
    if saved := load(path):
        encoder.load_state_dict(saved["encoder"])
    else:
        portraits = np.load(cache / "portraits.npy")
        train(encoder, ids[:len(portraits)], torch.from_numpy(portraits) * scaling, log)
        save(path, encoder=encoder.state_dict())
    return encoder.eval().requires_grad_(False)


def train(
    encoder: CLIPTextModel, ids: Tensor, portraits: Tensor, log: Log, steps: int = STEPS, batch: int = BATCH
) -> None:
    """Train in place; the loss is the mean squared error of the portraits' latents, in parts and as wholes.

    Each of the last PARTS tokens, which are padding, predicts, linearly, one cell of the latents and that cell's place;
    every token before them the latents at half the size, of a caption that begins as it has read so far. The UNet's
    attention can then look up what belongs where it draws, instead of having to unfold a picture out of one vector.
    ids: int64 [captions, tokens]; portraits: latents of unit variance [captions, channels, side, side].
    """
    torch.manual_seed(0)
    whole, part = portraits[0].numel() // 4, portraits[0].numel() // PARTS
    readouts = [torch.nn.Linear(encoder.config.hidden_size, size) for size in (whole, part + 2 * ACROSS)]
    module = torch.nn.ModuleList([encoder, *readouts])
    optimizer, losses = Pair(module, excluded=("embed", "1.weight", "2.weight")), []
    for step in range(steps):
        chosen = torch.from_numpy(np.random.default_rng(step).choice(len(ids), batch, replace=False))
        latents = portraits[chosen].float()
        with mixed():
            hidden = encoder(ids[chosen]).last_hidden_state
            wholes, parts = readouts[0](hidden[:, :-PARTS]), readouts[1](hidden[:, -PARTS:])
        whole_loss = (wholes.float() - F.avg_pool2d(latents, 2).flatten(1)[:, None]).square().mean()
        part_loss = F.mse_loss(parts.float(), _parts(latents))
        optimizer.zero_grad()
        (whole_loss + part_loss).backward()
        optimizer.step(learning_rate(step, steps, PEAK_LR, warmup=50, decay_share=0.5))
        losses.append((whole_loss.item(), part_loss.item()))
        if (step + 1) % 100 == 0:
            mean = np.mean(losses[-100:], axis=0)
            log(step + 1, whole_loss=float(mean[0]), part_loss=float(mean[1]))


def _parts(latents: Tensor) -> Tensor:
    """[n, channels, side, side] -> [n, PARTS, values of a cell, then its row and its column as one-hot vectors]."""
    n, channels, side = latents.shape[:3]
    cells = latents.view(n, channels, ACROSS, side // ACROSS, ACROSS, side // ACROSS)
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(n, PARTS, -1)
    line = torch.eye(ACROSS)
    places = torch.cat([line.repeat_interleave(ACROSS, 0), line.repeat(ACROSS, 1)], dim=1)
    return torch.cat([cells, places.expand(n, PARTS, 2 * ACROSS)], dim=2)
