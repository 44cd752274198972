"""Stage 2 of emoji-64: the text encoder learns to carry its caption's words to the tokens after the end.

Cross-attention then finds every word in every padding token from its first step on, as with a pretrained encoder.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from palp_fast.zoo.muon import Pair
from palp_fast.zoo.training import Log, learning_rate, load, save

STEPS, BATCH, PEAK_LR, WIDTH = 500, 64, 2e-3, 192


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP text transformer with random weights for this tokenizer's vocabulary."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4,
        num_attention_heads=3, max_position_embeddings=tokenizer.model_max_length, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def trained(cache: Path, tokenizer: CLIPTokenizer, ids: Tensor, log: Log) -> CLIPTextModel:
    """The trained text encoder, frozen; trained once and kept in `cache`."""
    torch.manual_seed(0)
    encoder, path = build_text_encoder(tokenizer), cache / "language.pt"
    if saved := load(path):
        encoder.load_state_dict(saved["encoder"])
    else:
        train(encoder, ids, log)
        save(path, encoder=encoder.state_dict())
    return encoder.eval().requires_grad_(False)


def train(encoder: CLIPTextModel, ids: Tensor, log: Log, steps: int = STEPS) -> None:
    """Train in place: each token from the end on predicts which tokens its caption holds; ids int64 [captions, tokens].

    Loss: binary cross-entropy of a linear read-out over the vocabulary, summed over the vocabulary.
    """
    torch.manual_seed(0)
    readout = torch.nn.Linear(encoder.config.hidden_size, encoder.config.vocab_size)
    readout.bias.data.fill_(-5.0)
    module = torch.nn.ModuleList([encoder, readout])
    optimizer, losses = Pair(module, excluded=("embed", "1.weight")), []
    end = encoder.config.eos_token_id
    for step in range(steps):
        chosen = ids[torch.from_numpy(np.random.default_rng(step).choice(len(ids), BATCH, replace=False))]
        said = torch.zeros(BATCH, encoder.config.vocab_size).scatter_(1, chosen, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = encoder(chosen).last_hidden_state
            logits = readout(hidden[:, -1] if step % 2 else _first_end(hidden, chosen, end))
        loss = F.binary_cross_entropy_with_logits(logits.float(), said) * said.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(learning_rate(step, steps, PEAK_LR, warmup=50, decay_share=0.5))
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            log(step + 1, loss=float(np.mean(losses[-100:])))


def _first_end(hidden: Tensor, ids: Tensor, end: int) -> Tensor:
    """Hidden state [B, width] of each caption's first end token."""
    return hidden[torch.arange(len(ids)), (ids == end).int().argmax(1)]
