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

from palp_fast.zoo.coder import Mixture
from palp_fast.zoo.muon import Pair
from palp_fast.zoo.training import Log, device, learning_rate, load, mixed, save

STEPS, BATCH, PEAK_LR, WIDTH = 4000, 64, 2e-3, 192
CODED_SHARE = 0.7  # of a batch: captions that have a coded token in place of a name
CODER_STEPS = 400  # for a coder alone
ACROSS = 8  # the UNet reads its caption on an 8 x 8 grid
PARTS = ACROSS * ACROSS  # one token for each cell


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP text transformer with random weights for this tokenizer's vocabulary."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4,
        num_attention_heads=3, max_position_embeddings=tokenizer.model_max_length, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def trained(cache: Path, tokenizer: CLIPTokenizer, captions: Mixture, log: Log) -> CLIPTextModel:
    """The trained text encoder, frozen, and captions.coder with it; trained once and kept in `cache`.

    captions: with the portraits' latents. For a text encoder that is there without a coder, a coder alone is trained.
    """
    torch.manual_seed(0)
    encoder, path = build_text_encoder(tokenizer), cache / "language.pt"
    saved = load(path) or {}
    if "encoder" in saved:
        encoder.load_state_dict(saved["encoder"])
    if "coder" in saved:
        captions.coder.load_state_dict(saved["coder"])
    elif "encoder" in saved:
        train(encoder.requires_grad_(False), captions, log, CODER_STEPS)
    else:
        train(encoder, captions, log)
    save(path, encoder=encoder.state_dict(), coder=captions.coder.state_dict())
    captions.coder.to(device()).eval().requires_grad_(False)
    return encoder.to(device()).eval().requires_grad_(False)


def train(
    encoder: CLIPTextModel, captions: Mixture, log: Log, steps: int = STEPS, batch: int = BATCH
) -> None:
    """Train encoder and coder in place; the loss is the mean squared error of portraits, in parts and as wholes.

    Each of the last PARTS tokens, which are padding, predicts, linearly, one cell of the latents and that cell's place;
    every token before them the latents at half the size, of a caption that begins as it has read so far. The UNet's
    attention can then look up what belongs where it draws, instead of having to unfold a picture out of one vector.
    captions: with the portraits' latents.
    """
    torch.manual_seed(0)
    size = captions.named.latents[0].size
    readouts = [torch.nn.Linear(encoder.config.hidden_size, out) for out in (size // 4, size // PARTS + 2 * ACROSS)]
    module = torch.nn.ModuleList([encoder, *readouts, captions.coder]).to(device())
    optimizer = Pair(module, excluded=("embed", "1.weight", "2.weight", "3.layers.0.", "3.layers.10."))
    split, losses = captions.split(batch), []
    for step in range(steps):
        hidden, latents = captions.draw(encoder, batch, torch.Generator().manual_seed(step))
        with mixed():
            wholes, parts = readouts[0](hidden[:, :-PARTS]), readouts[1](hidden[:, -PARTS:])
        whole_loss = (wholes.float() - F.avg_pool2d(latents, 2).flatten(1)[:, None]).square().mean()
        part_losses = (parts.float() - _parts(latents)).square().mean((1, 2))
        optimizer.zero_grad()
        (whole_loss + part_losses.mean()).backward()
        optimizer.step(learning_rate(step, steps, PEAK_LR, warmup=50, decay_share=0.5))
        losses.append([whole_loss.item(), *(part.mean().item() for part in part_losses.detach().split(split))])
        if (step + 1) % 100 == 0:
            mean = np.mean(losses[-100:], axis=0)
            log(step + 1, whole_loss=float(mean[0]), part_loss=float(mean[1]), coded_part_loss=float(mean[2]))


def _parts(latents: Tensor) -> Tensor:
    """[n, channels, side, side] -> [n, PARTS, values of a cell, then its row and its column as one-hot vectors]."""
    n, channels, side = latents.shape[:3]
    cells = latents.view(n, channels, ACROSS, side // ACROSS, ACROSS, side // ACROSS)
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(n, PARTS, -1)
    line = torch.eye(ACROSS)
    places = torch.cat([line.repeat_interleave(ACROSS, 0), line.repeat(ACROSS, 1)], dim=1)
    return torch.cat([cells, places.to(cells.device).expand(n, PARTS, 2 * ACROSS)], dim=2)
