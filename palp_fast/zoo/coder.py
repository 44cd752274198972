"""A network that turns a subject's render into the embedding of one token; used to train emoji-64, not shipped."""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from palp_fast.zoo.invented import MARK
from palp_fast.zoo.training import device, mixed

SIDE = 32  # pixels of the renders it reads
SCALE = 0.1  # RMS of its embeddings; that of the class nouns' is 0.08 in the shipped text encoder
LENGTHS = 0.3  # standard deviation of the logarithm of their length in training
NOISE = 0.2  # most noise on an embedding, relative to SCALE: embeddings close to each other must mean similar pictures


class Coder(torch.nn.Module):
    """Renders [n, 4, 32, 32] (colours times alpha, alpha; in [0, 1]) -> token embeddings [n, width] of RMS SCALE."""

    def __init__(self, width: int):
        super().__init__()
        layers, channels = [], 4
        for out in (32, 64, 128):
            layers += [torch.nn.Conv2d(channels, out, 3, stride=2, padding=1), torch.nn.GroupNorm(8, out),
                       torch.nn.SiLU()]
            channels = out
        self.layers = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(128 * 16, width))

    def forward(self, renders: Tensor, draw: torch.Generator | None = None) -> Tensor:
        """Embeddings; with `draw`, of varied length and with noise."""
        codes = torch.nn.functional.layer_norm(self.layers(renders), (self.layers[-1].out_features,))
        if draw is not None:
            noise = NOISE * torch.rand(len(codes), 1, generator=draw) * torch.randn(codes.shape, generator=draw)
            length = (LENGTHS * torch.randn(len(codes), 1, generator=draw)).exp()
            codes = (codes + noise.to(codes.device)) * length.to(codes.device)
        return SCALE * codes


def small_renders(sprites: np.ndarray) -> Tensor:
    """The coder's input of every subject, uint8 [subjects, 4, 32, 32], from sprites uint8 [subjects, 3, 96, 96, 4]."""
    side, factor = SIDE, sprites.shape[2] // SIDE
    small = np.empty((len(sprites), 4, side, side), np.uint8)
    for place, sprite in enumerate(sprites):
        render = sprite[0].astype(np.float32) / 255
        render[..., :3] *= render[..., 3:]
        mean = render.reshape(side, factor, side, factor, 4).mean((1, 3))
        small[place] = (mean.transpose(2, 0, 1) * 255).round()
    return torch.from_numpy(small)


def mark_ids(tokenizer: CLIPTokenizer) -> Tensor:
    """The ids of MARK, at the end of a word and within one."""
    vocabulary = tokenizer.get_vocab()
    return torch.tensor([vocabulary[MARK], vocabulary[MARK + "</w>"]])


@dataclass(frozen=True)
class Captions:
    """Captions and what they show.

    ids: int64 [captions, tokens]; latents: fp16 [captions, channels, side, side], unscaled; renders: uint8
    [captions, 4, 32, 32], the subjects of the coded tokens in captions that have one, as `Coder` reads them; chances:
    fp32 [captions], how often one is drawn, relative to the others; None: all alike.
    """

    ids: Tensor
    latents: np.ndarray
    renders: Tensor | None = None
    chances: Tensor | None = None

    def rows(self, count: int, generator: torch.Generator) -> Tensor:
        """The captions of a batch, int64 [count]."""
        if self.chances is None:
            return torch.randint(len(self.ids), (count,), generator=generator)
        return torch.multinomial(self.chances, count, replacement=True, generator=generator)


@dataclass(frozen=True)
class Mixture:
    """Batches of captions that name their subjects and, the last of each batch, captions with a coded token.

    They are drawn from the CPU's memory and handed out on training.device(), where the coder and the encoder must be.
    """

    named: Captions
    invented: Captions
    marks: Tensor
    coder: Coder
    scaling: float  # brings latents to unit variance
    coded_share: float

    def split(self, size: int) -> tuple[int, int]:
        """How many captions of a batch name their subjects, and how many have a coded token."""
        coded = round(size * self.coded_share)
        return size - coded, coded

    def draw(self, encoder: CLIPTextModel, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Hidden states [size, tokens, width], scaled latents fp32 [size, channels, side, side] of a random batch."""
        named, coded = self.split(size)
        rows, coded_rows = self.named.rows(named, generator), self.invented.rows(coded, generator)
        latents = [self.named.latents[rows.numpy()], self.invented.latents[coded_rows.numpy()]]
        coded_ids = self.invented.ids[coded_rows]
        marked = torch.isin(coded_ids, self.marks)
        renders = self.invented.renders[coded_rows][marked.any(1)].to(device())
        ids = torch.cat([self.named.ids[rows], coded_ids]).to(device())
        with mixed(), _replaced(encoder, marked.to(device()), self.coder(renders.float() / 255, generator)):
            hidden = encoder(ids).last_hidden_state
        return hidden, torch.from_numpy(np.concatenate(latents)).to(device()).float() * self.scaling


@contextmanager
def _replaced(encoder: CLIPTextModel, marked: Tensor, codes: Tensor):
    """Inside, a batch's last rows have `codes` [k, width] in place of the k token embeddings `marked` [n, tokens]."""
    def replace(module, inputs, embeddings):
        own, last = embeddings.split((len(embeddings) - len(marked), len(marked)))
        return torch.cat([own, last.masked_scatter(marked[..., None], codes.to(last.dtype))])

    hook = encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
