"""How the judges learn: scenes of every subject, pictures spoiled in several ways, cross-entropies and contrast."""

import random
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from palp_fast.zoo.captions import caption
from palp_fast.zoo.judge import JUDGES, save
from palp_fast.zoo.judge_nets import JudgeNet, Words, halves
from palp_fast.zoo.muon import Pair
from palp_fast.zoo.render import Scene, compose
from palp_fast.zoo.training import Log, device, learning_rate, load, mixed
from palp_fast.zoo.training import save as save_checkpoint
from palp_fast.zoo.world import BACKGROUNDS, STYLES, TARGETS, World, grounds

STEPS, BATCH, PEAK_LR = 3200, 64, 3e-3
PAIRS, HALF = 0.2, 0.6  # share of scenes with two subjects, and of those the share that shows only one half
WEIGHTS = {"style": 6.0}  # of the losses, where not 1: a flat drawing and a render can be hard to tell apart
NOISE, BLUR = 0.15, (0.3, 1.0)  # most noise on [-1, 1], standard deviation of the blur in pixels
POOL, POOL_STRIDE = 8192, 2  # autoencoder round trips, and every how manieth picture of a batch is one of them
EVERY = 50  # steps between checkpoints
ROLES = ("seen", "development", "acceptance")
_TARGET_CELLS = {(style, background) for _, style, background, _ in TARGETS}


class Scenes:
    """Draws scenes of all subjects that have one drawing in three styles, held-out ones too, and their labels."""

    def __init__(self, world: World):
        self.world = world
        self.places = [place for place, subject in enumerate(world.subjects) if subject.role in ROLES]
        self.names = [world.subjects[place].name for place in self.places]
        self.held_out = [place for place in self.places if world.subjects[place].role != "seen"]
        self._label = {place: label for label, place in enumerate(self.places)}

    def reserved(self, places: Sequence[int], style: str, background: str) -> bool:
        """Whether this composition is kept from training, for the ceilings.

        One background for each subject (or two) and style, and every held-out subject in the cell of a target.
        """
        if (style, background) in _TARGET_CELLS and any(place in self.held_out for place in places):
            return True
        possible = grounds(style)
        return background == possible[zlib.crc32(f"{sorted(places)} {style}".encode()) % len(possible)]

    def draw(
        self, key: str, *, places: tuple[int, ...] | None = None, style: str | None = None, reserved: bool = False
    ) -> Scene:
        """The scene of that key: one or two subjects (unless given), a style, a background, a caption never empty."""
        draw = random.Random(key)
        chosen = places
        while True:
            if places is None:
                chosen = tuple(draw.sample(self.places, 2 if draw.random() < PAIRS else 1))
            shown = style or draw.choice(STYLES)
            background = draw.choice(grounds(shown))
            if self.reserved(chosen, shown, background) == reserved:
                break
        subjects = [self.world.subjects[place] for place in chosen]
        nouns = [subject.class_noun if draw.random() < 0.3 else subject.name for subject in subjects]
        return Scene(chosen, shown, background, _caption(shown, nouns, background, draw), draw.getrandbits(32))

    def half(self, scene: Scene, side: int) -> Scene:
        """What the left (0) or right (1) half of a scene of two shows: one subject, with a caption of its own."""
        subject, draw = self.world.subjects[scene.subjects[side]], random.Random(scene.seed)
        words = _caption(scene.style, [subject.name], scene.background, draw)
        return Scene((scene.subjects[side],), scene.style, scene.background, words, scene.seed)

    def labels(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """style, background: class indices int64 [n]; cell: shares fp32 [n, subjects x styles] that add up to 1."""
        cell = torch.zeros(len(scenes), len(self.places), len(STYLES))
        for row, scene in enumerate(scenes):
            labels = [self._label[place] for place in scene.subjects]
            cell[row, labels, STYLES.index(scene.style)] = 1 / len(labels)
        return {"style": torch.tensor([STYLES.index(scene.style) for scene in scenes]),
                "background": torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes]),
                "cell": cell.flatten(1)}

    def words(self) -> Words:
        """A tokenizer that knows every word that captions can have."""
        nouns = self.names + [subject.class_noun for subject in self.world.subjects]
        draw = random.Random(0)
        return Words.of(nouns + [caption(style, ["and"], background, draw)
                                 for style in STYLES for background in BACKGROUNDS for _ in range(50)])


def _caption(style: str, nouns: list[str], background: str, draw: random.Random) -> str:
    """A caption that is not empty."""
    while not (words := caption(style, nouns, background, draw)):
        pass
    return words


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [B, 64, 64, 3] -> fp32 [B, 3, 64, 64] in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


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
    pool_scenes = [scenes.draw(f"pool/{index}") for index in range(POOL)]
    pool = round_trips(cache / "judge-pool.npy", sprites, pool_scenes, noise=0.5)
    means: dict[str, float] = {}
    for step in range(start, stop or steps):
        generator = torch.Generator().manual_seed(seed * steps + step)
        shown = [scenes.draw(f"{seed}/{step}/{row}") for row in range(BATCH)]
        pictures = np.stack([compose(sprites, scene) for scene in shown])
        for row in range(0, BATCH, POOL_STRIDE):
            index = int(torch.randint(POOL, (1,), generator=generator))
            shown[row], pictures[row] = pool_scenes[index], pool[index]
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
            save_checkpoint(path, net=net.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
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
