"""Latents of the training set and of the portraits that the text encoder learns from, made once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from palp_fast.zoo.autoencoder import to_pixels
from palp_fast.zoo.invented import coded_scene
from palp_fast.zoo.render import Portraits, compose, training_scene
from palp_fast.zoo.training import mixed
from palp_fast.zoo.world import World

PORTRAITS = 50_000  # of the first captions
CODED = 24_000  # scenes with a coded token: as many pictures, and portraits


def cache_pictures(cache: Path, autoencoder: AutoencoderKL) -> None:
    """Write latents.npy, of pictures.npy; a finished file is left alone."""
    pictures = np.load(cache / "pictures.npy", mmap_mode="r")
    _cache(cache / "latents.npy", autoencoder, len(pictures), pictures.__getitem__)


def cache_portraits(cache: Path, world: World, sprites: np.ndarray, autoencoder: AutoencoderKL) -> None:
    """Write portraits.npy, of the first PORTRAITS scenes; a finished file is left alone."""
    portraits = Portraits(sprites)

    def draw(part: slice) -> np.ndarray:
        return np.stack([portraits.draw(training_scene(world, index)) for index in range(*part.indices(PORTRAITS))])

    _cache(cache / "portraits.npy", autoencoder, PORTRAITS, draw)


def cache_coded(cache: Path, world: World, sprites: np.ndarray, autoencoder: AutoencoderKL) -> None:
    """Write coded_portraits.npy and coded_latents.npy, of CODED scenes; a finished file is left alone.

    sprites: the world's and the invented ones, as of `invented.sprites_of`.
    """
    portraits = Portraits(sprites)
    kinds = {"coded_portraits.npy": portraits.draw, "coded_latents.npy": lambda scene: compose(sprites, scene)}
    for name, picture in kinds.items():
        def draw(part: slice, picture=picture) -> np.ndarray:
            return np.stack([picture(coded_scene(world, index)[0]) for index in range(*part.indices(CODED))])

        _cache(cache / name, autoencoder, CODED, draw)


@torch.no_grad()
def _cache(path: Path, autoencoder: AutoencoderKL, count: int, pictures: Callable[[slice], np.ndarray]) -> None:
    """Posterior means fp16 [count, 8, 16, 16], unscaled, of uint8 pictures [n, 64, 64, 3] taken 64 at a time."""
    if path.exists():
        return
    latents = np.empty((count, 8, 16, 16), np.float16)
    for start in range(0, count, 64):
        pixels = to_pixels(pictures(slice(start, start + 64))).to(autoencoder.device)
        with mixed():
            posterior = autoencoder.encode(pixels).latent_dist
        latents[start:start + 64] = posterior.mode().float().cpu().numpy()
    np.save(path, latents)
