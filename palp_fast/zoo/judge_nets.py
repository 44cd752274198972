"""The judges' networks: two image encoders, a text encoder over words, and linear read-outs."""

import re
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palp_fast.zoo.world import BACKGROUNDS, STYLES

FEATURES, EMBEDDING, WORD_WIDTH, MAX_WORDS = 256, 128, 96, 24
PADDING, UNKNOWN = 0, 1  # word ids


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits, marks dropped."""
    return re.findall(r"[^\W_]+", text.lower())


class Words:
    """A tokenizer of whole words; words that no training caption had share one id."""

    def __init__(self, vocabulary: Sequence[str]):
        self.vocabulary = list(vocabulary)
        self._ids = {word: place + UNKNOWN + 1 for place, word in enumerate(self.vocabulary)}

    @staticmethod
    def of(texts: Iterable[str]) -> "Words":
        """The tokenizer that knows every word of these texts."""
        return Words(sorted({word for text in texts for word in words_of(text)}))

    def __len__(self) -> int:
        return len(self.vocabulary) + UNKNOWN + 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids int64 [texts, longest], cut at MAX_WORDS and padded; a text without words is one unknown word."""
        rows = [[self._ids.get(word, UNKNOWN) for word in words_of(text)[:MAX_WORDS]] or [UNKNOWN] for text in texts]
        longest = max(map(len, rows))
        return torch.tensor([row + [PADDING] * (longest - len(row)) for row in rows])


def halves(pixels: Tensor) -> Tensor:
    """The left and the right subject of scenes of two, each as large as one alone: [B, 3, 64, 64] -> [B, 2, 3, 64, 64].

    Squares of 36 pixels around the middles of the halves, where palp_fast.zoo.render puts them, enlarged.
    """
    wide = F.pad(pixels, (2, 2, 0, 0), mode="replicate")[:, :, 14:50]
    squares = torch.stack([wide[..., :36], wide[..., 32:]], dim=1).flatten(0, 1)
    large = F.interpolate(squares, pixels.shape[-2:], mode="bilinear", align_corners=False)
    return large.unflatten(0, (-1, 2)).clamp(-1, 1)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    padding = (kernel - 1) // 2
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = _convolution(channels, channels, 3), _convolution(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class Convolutions(nn.Sequential):
    """Residual network, 64 x 64 x 3 -> 16 x 16 x 64 -> 8 x 8 x 128 -> 4 x 4 x 160 -> [B, 256]."""

    def __init__(self):
        super().__init__(
            _convolution(3, 64, 4, 2), nn.ReLU(), _convolution(64, 64, 3, 2), nn.ReLU(), Residual(64),
            _convolution(64, 128, 3, 2), nn.ReLU(), Residual(128), _convolution(128, 160, 3, 2), nn.ReLU(),
            nn.Conv2d(160, 64, 1), nn.Flatten(), nn.Linear(64 * 4 * 4, FEATURES))


class _Compressed(nn.Module):
    """A rectifier that grows as a square root beyond small values: faint shading stays visible beside hard edges."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x * (x + 0.05).rsqrt()


class MixerLayer(nn.Module):
    """A layer of an MLP-Mixer (Tolstikhin et al., 2021): across places, then across channels; x [B, places, width]."""

    def __init__(self, places: int, width: int):
        super().__init__()
        self.place_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.places = nn.Sequential(nn.Linear(places, 2 * places), nn.GELU(), nn.Linear(2 * places, places))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.place_norm(x).mT).mT
        return x + self.channels(self.channel_norm(x))


class Mixer(nn.Sequential):
    """Convolutional stem, 64 x 64 x 3 -> 8 x 8 x 160, then four mixer layers over the 64 places -> [B, 256]."""

    def __init__(self, width: int = 160, layers: int = 4):
        super().__init__(
            _convolution(3, 64, 4, 2), _Compressed(), _convolution(64, 96, 3, 2), nn.ReLU(),
            _convolution(96, width, 3, 2),
            nn.Flatten(2), _Transpose(), *[MixerLayer(64, width) for _ in range(layers)], nn.LayerNorm(width),
            _Transpose(), nn.Unflatten(2, (8, 8)), nn.AvgPool2d(2), nn.Conv2d(width, 64, 1), nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES))


class _Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class TextEncoder(nn.Module):
    """Two transformer layers over words, their mean, and a linear map; ids [B, words] -> [B, EMBEDDING]."""

    def __init__(self, words: int, layers: int = 2):
        super().__init__()
        self.embed = nn.Embedding(words, WORD_WIDTH)
        self.embed_place = nn.Parameter(0.1 * torch.randn(MAX_WORDS, WORD_WIDTH))
        self.layers = nn.ModuleList([
            nn.TransformerEncoderLayer(WORD_WIDTH, 3, 2 * WORD_WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)])
        self.norm, self.out = nn.LayerNorm(WORD_WIDTH), nn.Linear(WORD_WIDTH, EMBEDDING)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, padding = self.embed(ids) + self.embed_place[:ids.shape[1]], ids == PADDING
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=padding)
        weight = (~padding).to(hidden.dtype)[..., None]
        return self.out((self.norm(hidden) * weight).sum(1) / weight.sum(1))


ENCODERS = {"convolutions": Convolutions, "mixer": Mixer}


class JudgeNet(nn.Module):
    """Image encoder, text encoder in the same space, and read-outs of style, background and subject."""

    def __init__(self, encoder: str, subjects: int, words: int):
        super().__init__()
        self.encoder, self.text = ENCODERS[encoder](), TextEncoder(words)
        self.read_style = nn.Linear(FEATURES, len(STYLES))
        self.read_background = nn.Linear(FEATURES, len(BACKGROUNDS))
        self.read_cell = nn.Linear(FEATURES, subjects * len(STYLES))
        self.read_embedding = nn.Linear(FEATURES, EMBEDDING)
        self.log_temperature = nn.Parameter(torch.tensor(2.5))
        self.encoder[0][0].requires_grad_(False)

    @torch.no_grad()
    def whiten(self, pixels: Tensor) -> None:
        """Set the first convolution to the principal components of 4 x 4 patches and their negatives; it stays so.

        The background's colour makes most of a picture's variance: the batch norm behind, which scales every component
        to the same, keeps it from hiding the subject. pixels [B, 3, 64, 64].
        """
        weight = self.encoder[0][0].weight
        patches = F.unfold(pixels, weight.shape[-1], stride=weight.shape[-1]).transpose(1, 2).flatten(0, 1)
        patches = patches - patches.mean(0)
        components = torch.linalg.eigh(patches.T @ patches).eigenvectors.flip(1)[:, :len(weight) // 2].T
        weight.copy_(torch.cat([components, -components]).view(weight.shape))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B, 3, 64, 64] in [-1, 1] -> logits "style", "background", "cell", and "embedding", unit vectors.

        A cell, [B, subjects, styles], is a subject in a style. Two subjects share its logits:
        `halves` shows each alone.
        """
        features = F.relu(self.encoder(pixels))
        return {"style": self.read_style(features), "background": self.read_background(features),
                "cell": self.read_cell(features).unflatten(1, (-1, len(STYLES))),
                "embedding": F.normalize(self.read_embedding(features).float(), dim=1)}

    def embed_text(self, ids: Tensor) -> Tensor:
        """Unit vectors [B, EMBEDDING] of texts, ids int64 [B, words]."""
        return F.normalize(self.text(ids).float(), dim=1)
