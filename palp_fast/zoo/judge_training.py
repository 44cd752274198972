"""How the judges learn: pictures spoiled in several ways, cross-entropies and contrast."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from palp_fast.zoo.autoencoder import to_pixels
from palp_fast.zoo.judge import JUDGES, save
from palp_fast.zoo.judge_nets import JudgeNet, halves
from palp_fast.zoo.judge_pool import Pool
from palp_fast.zoo.judge_scenes import Scenes
from palp_fast.zoo.muon import Pair
from palp_fast.zoo.render import Scene, compose
from palp_fast.zoo.training import Log, device, learning_rate, load, mixed
from palp_fast.zoo.training import save as save_checkpoint
from palp_fast.zoo.world import World

STEPS, BATCH, PEAK_LR = 6800, 64, 3e-3
HARD, HARD_EVERY = 5600, 600  # step from which on styles hard to read are drawn more often; steps between readings
HALF = 0.6  # share of scenes of two that show only one half
WEIGHTS = {"style": 6.0}  # of the losses, where not 1: a flat drawing and a render can be hard to tell apart
NOISE, BLUR = 0.15, (0.3, 1.0)  # most noise on [-1, 1], standard deviation of the blur in pixels
POOL_STRIDE = 2  # one picture of so many in a batch has been through the autoencoder
EVERY = 50  # steps between checkpoints


def spoil(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Warp, blur and noise on overlapping halves of a batch [B, 3, 64, 64], so that every combination occurs."""
    eighth = len(pixels) // 8
    out = pixels.clone()
    out[:4 * eighth] = _warp(out[:4 * eighth], generator)
    out[2 * eighth:6 * eighth] = _blur(out[2 * eighth:6 * eighth], generator)
    noisy = out[3 * eighth:7 * eighth]
    strength = NOISE * torch.rand(len(noisy), 1, 1, 1, generator=generator)
    noisy += strength * torch.randn(noisy.shape, generator=generator)
    return out.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def _warp(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Move every pixel by a smooth field of at most about 2 pixels."""
    count, _, height, width = pixels.shape
    field = (torch.rand(count, 2, 5, 5, generator=generator) * 2 - 1) * 4 / width
    field = F.interpolate(field, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    steps = (torch.arange(width) * 2 + 1) / width - 1
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij")[::-1], dim=-1) + field
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _blur(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur, each picture with a standard deviation of its own."""
    sigma = BLUR[0] + (BLUR[1] - BLUR[0]) * torch.rand(len(pixels), 1, generator=generator)
    kernel = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    flat = F.pad(pixels, (3, 3, 3, 3), mode="replicate").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernel[:, :, None], groups=len(kernel))
    return F.conv2d(flat, kernel[..., None], groups=len(kernel)).view(pixels.shape)


def losses(net: JudgeNet, pixels: Tensor, labels: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Cross-entropies of the read-outs, and the symmetric contrastive loss between pictures and captions."""
    with mixed():
        seen, told = net(pixels), net.embed_text(ids)
    found = {name: F.cross_entropy(seen[name].float().flatten(1), label) for name, label in labels.items()}
    similar = seen["embedding"] @ told.T * net.log_temperature.clamp(max=4.6).exp()
    same = (ids[:, None] == ids[None]).all(2).float()
    same /= same.sum(1, keepdim=True)
    found["contrast"] = (F.cross_entropy(similar, same) + F.cross_entropy(similar.T, same)) / 2
    return found


def train(
    name: str, cache: Path, scenes: Scenes, sprites: np.ndarray, log: Log, steps: int = STEPS, stop: int | None = None
) -> JudgeNet:
    """Train, or go on from the last checkpoint in `cache`; returns the trained network (fp32).

    stop: step at which to stop early, with the schedule of `steps`.
    """
    encoder, seed = JUDGES[name]
    torch.manual_seed(seed)
    words = scenes.words()
    net = JudgeNet(encoder, len(scenes.places), len(words)).to(device(), memory_format=torch.channels_last)
    optimizer = Pair(net, excluded=("embed", "read_"))
    start, path = 0, cache / f"judge-{name}.pt"
    if saved := load(path):
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    else:
        first = [scenes.draw(f"{seed}/whitening/{row}") for row in range(2 * BATCH)]
        net.whiten(to_pixels(np.stack([compose(sprites, scene) for scene in first])).to(device()))
    pool = Pool(cache, scenes, sprites)
    if saved:
        pool.chances = saved["chances"]
    means: dict[str, float] = {}
    for step in range(start, stop or steps):
        if step >= HARD and (step - HARD) % HARD_EVERY == 0:
            pool.weigh(net)
        generator = torch.Generator().manual_seed(seed * steps + step)
        shown = [scenes.draw(f"{seed}/{step}/{row}") for row in range(BATCH)]
        pictures = np.stack([compose(sprites, scene) for scene in shown])
        for row in range(0, BATCH, POOL_STRIDE):
            shown[row], pictures[row] = pool.draw(generator)
        pixels, shown = _some_halves(scenes, spoil(to_pixels(pictures), generator), shown, generator)
        labels = {kind: label.to(device()) for kind, label in scenes.labels(shown).items()}
        parts = losses(net, pixels.to(device()), labels, words([scene.caption for scene in shown]).to(device()))
        optimizer.zero_grad()
        sum(WEIGHTS.get(part, 1.0) * value for part, value in parts.items()).backward()
        optimizer.step(learning_rate(step, steps, PEAK_LR, warmup=50, decay_share=0.6))
        for part, value in parts.items():
            means[part] = means.get(part, 0.0) + value.item() / EVERY
        if (step + 1) % EVERY == 0:
            log(step + 1, **means)
            means = {}
            save_checkpoint(path, net=net.state_dict(), optimizer=optimizer.state_dict(), chances=pool.chances,
                            step=step + 1)
    return net.cpu().eval().requires_grad_(False)


def _some_halves(
    scenes: Scenes, pixels: Tensor, shown: list[Scene], generator: torch.Generator
) -> tuple[Tensor, list[Scene]]:
    """Pictures and scenes with some scenes of two replaced by one of their halves."""
    rows = [row for row, scene in enumerate(shown) if len(scene.subjects) == 2]
    rows = [row for row, draw in zip(rows, torch.rand(len(rows), generator=generator), strict=True) if draw < HALF]
    if rows:
        sides = torch.randint(2, (len(rows),), generator=generator)
        pixels[rows] = halves(pixels[rows])[torch.arange(len(rows)), sides]
        for row, side in zip(rows, sides.tolist(), strict=True):
            shown[row] = scenes.half(shown[row], side)
    return pixels, shown


def build(name: str, cache: Path, output: Path, steps: int = STEPS) -> None:
    """Train one judge, write it to `output`, measure its ceilings from there, and write those too."""
    from palp_fast.zoo import sources
    from palp_fast.zoo.build import load_sprites
    from palp_fast.zoo.ceilings import measure
    from palp_fast.zoo.judge import load as load_judge

    if not (cache / "sprites.npy").exists():
        sources.fetch(cache)
    world, sprites, log = World.load(), load_sprites(cache), Log(output / "log.jsonl", name)
    scenes, (encoder, seed) = Scenes(world), JUDGES[name]
    output.mkdir(parents=True, exist_ok=True)
    net = train(name, cache, scenes, sprites, log, steps)
    written = name, encoder, net, scenes.words(), scenes.names, output
    save(*written, seed=seed, steps=steps)
    ceilings = measure(load_judge(name, output), scenes, sprites, cache)
    save(*written, seed=seed, steps=steps, ceilings=ceilings)
    log(steps, **{f"{test} {mark}": share for test, row in ceilings.items() for mark, share in row.items()})
