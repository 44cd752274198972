"""What the judges also learn from: pictures that have been through emoji-64's autoencoder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from palp_fast.zoo.autoencoder import to_pixels
from palp_fast.zoo.judge_nets import JudgeNet
from palp_fast.zoo.judge_scenes import Scenes
from palp_fast.zoo.render import Scene, compose
from palp_fast.zoo.training import device, mixed
from palp_fast.zoo.world import STYLES

# name -> (round trips, most noise on their latents in standard deviations, how often one is drawn beside the others)
KINDS = {"noisy": (24_576, 0.4, 1.0), "clean": (8_192, 0.0, 3.0)}


class Pool:
    """Pictures after the round trip, with noise on the latents and without, half of the draws each.

    chances: fp32 [pictures], how likely each is drawn.
    """

    def __init__(self, cache: Path, scenes: Scenes, sprites: np.ndarray):
        self.scenes, pictures, chances = [], [], []
        for kind, (count, noise, weight) in KINDS.items():
            shown = [scenes.draw(f"{kind}/{index}") for index in range(count)]
            pictures.append(round_trips(cache / f"judge-{kind}.npy", sprites, shown, noise))
            self.scenes += shown
            chances += [weight] * count
        self.pictures, self._weight = np.concatenate(pictures), torch.tensor(chances)
        self.chances = self._weight / self._weight.sum()

    def draw(self, generator: torch.Generator) -> tuple[Scene, np.ndarray]:
        """A scene and its picture."""
        index = int(torch.multinomial(self.chances, 1, generator=generator))
        return self.scenes[index], self.pictures[index]

    @torch.no_grad()
    def weigh(self, net: JudgeNet) -> None:
        """From here on, draw half of the pictures by how badly `net` reads their style, as the root of its loss."""
        net.eval()
        losses = [F.cross_entropy(net(to_pixels(self.pictures[start:start + 256]).to(device()))["style"].float().cpu(),
                                  torch.tensor([STYLES.index(scene.style) for scene in self.scenes[start:start + 256]]),
                                  reduction="none") for start in range(0, len(self.scenes), 256)]
        net.train()
        hard = torch.cat(losses).clamp(max=2).sqrt()
        self.chances = self._weight * (1 + hard / hard.mean().clamp(min=1e-6))
        self.chances /= self.chances.sum()


@torch.no_grad()
def round_trips(path: Path, sprites: np.ndarray, scenes: Sequence[Scene], noise: float = 0.0) -> np.ndarray:
    """Pictures of the scenes after emoji-64's autoencoder, uint8 [n, 64, 64, 3]; made once and kept at `path`.

    noise: most noise added to latents, in their standard deviations; each picture draws its own share of it.
    """
    if path.exists():
        return np.load(path)
    from diffusers import AutoencoderKL

    from palp_fast.models import MODELS

    vae = AutoencoderKL.from_pretrained(MODELS["emoji-64"], subfolder="vae", torch_dtype=torch.float32)
    vae.to(device(), memory_format=torch.channels_last)
    deviation, made = noise / vae.config.scaling_factor, []
    for start in range(0, len(scenes), 16):
        pictures = to_pixels(np.stack([compose(sprites, scene) for scene in scenes[start:start + 16]]))
        generator = torch.Generator().manual_seed(start)
        with mixed():
            latents = vae.encode(pictures.to(device())).latent_dist.mode().float().cpu()
            share = deviation * torch.rand(len(latents), 1, 1, 1, generator=generator)
            noisy = latents + share * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(noisy.to(device())).sample.cpu()
        made.append(((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    np.save(path, np.concatenate(made))
    return np.load(path)
