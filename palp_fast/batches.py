"""The random draws of training: which photo, which noise, which timestep - functions of (seed, step, sample) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palp_fast import functional
from palp_fast.reference import philox
from palp_fast.sampler import TimestepSampler

# Streams 0 to 2 are the noise and the timestep sampler.
_STREAM_NEW_NOISE, _STREAM_PHOTO = 3, 4
# The second timestep has a sampler, and so a seed, of its own.
_NEW_TIMESTEP_SEED = 0x5DEECE66D


@dataclass(frozen=True)
class Batch:
    """One PALP batch: x_t, target noise and t; t_new and noise_new are None where they are the first ones.

    latents, x_t, noise, noise_new: [B, C, h, w]; t, t_new: [B] int64; sample_weight, residual_scale: [B].
    subjects: the subject's number for each sample, known on the host.
    """

    latents: Tensor
    x_t: Tensor
    noise: Tensor
    t: Tensor
    subjects: Sequence[int]
    sample_weight: Tensor
    residual_scale: Tensor
    t_new: Tensor | None = None
    noise_new: Tensor | None = None


class Draws:
    """Draws the batches of a run from the latents of each subject's photos, latents[subject] [photos, C, h, w].

    What differs between two batches of the same subjects is on the device, in memory that stays in place: step,
    sample_offset (0-d int64) and the numbers of the photos.
    """

    def __init__(self, cfg, latents: list[Tensor], alphas_cumprod: Tensor):
        self.cfg, self.alphas_cumprod = cfg, alphas_cumprod
        self.latents = torch.cat(latents)
        self.counts = torch.tensor([len(photos) for photos in latents])
        options = {"seed": cfg.seed, "backend": cfg.backend}
        self.sampler = TimestepSampler(alphas_cumprod, cfg.timesteps, rescale=cfg.rescale, **options)
        options["seed"] = (cfg.seed + _NEW_TIMESTEP_SEED) % 2**63
        self.new_sampler = TimestepSampler(alphas_cumprod, "uniform", **options)
        self._numbers = torch.zeros(2 + cfg.batch_size, dtype=torch.int64, device=self.latents.device)
        self.step, self.sample_offset, self._photos = self._numbers[0], self._numbers[1], self._numbers[2:]

    def batch(self, step: int, sample_offset: int) -> Batch:
        """Samples sample_offset .. sample_offset + batch_size of optimizer step `step`."""
        return self.drawn(self.choose(step, sample_offset))

    def choose(self, step: int, sample_offset: int) -> tuple[int, ...]:
        """Tells the device which samples `drawn` draws -> their subjects."""
        photos, subjects = self.chosen(step, sample_offset)
        torch.ops.palp_fast.write_words(self._numbers, [step, sample_offset, *photos])
        return tuple(subjects)

    def drawn(self, subjects: tuple[int, ...]) -> Batch:
        """The batch that was chosen, which has these subjects; may be captured in a CUDA graph."""
        cfg, size = self.cfg, self.cfg.batch_size
        latents = self.latents.index_select(0, self._photos)
        numbers, whole = (self.step, self.sample_offset), {"global_batch": size * cfg.grad_accumulation}
        t, sample_weight, residual_scale = self.sampler.sample(size, *numbers, **whole)
        counter = {"seed": cfg.seed, "step": self.step, "sample_offset": self.sample_offset, "backend": cfg.backend}
        x_t, noise = functional.add_noise(latents, t, self.alphas_cumprod, **counter)
        t_new = noise_new = None
        if not cfg.same_timestep:
            t_new, _, _ = self.new_sampler.sample(size, *numbers, **whole)
        if not cfg.same_noise:
            _, noise_new = functional.add_noise(latents, t, self.alphas_cumprod, **counter, stream=_STREAM_NEW_NOISE)
        return Batch(latents, x_t, noise, t, subjects, sample_weight, residual_scale, t_new, noise_new)

    def first_photo(self, subject: int) -> int:
        """The number, in the union of all photos, of a subject's first one."""
        return int(self.counts[:subject].sum())

    def chosen(self, step: int, sample_offset: int) -> tuple[list[int], list[int]]:
        """`photos` as lists."""
        photos, subjects = self.photos(step, sample_offset)
        return photos.tolist(), subjects.tolist()

    def photos(self, step: int, sample_offset: int) -> tuple[Tensor, Tensor]:
        """(number in the union of all photos, subject number) of each sample, int64 [B] on the CPU.

        subject_sampling "image": every photo equally often; "subject": every subject equally often.
        """
        samples = torch.arange(self.cfg.batch_size) + sample_offset
        words = philox.words(torch.zeros_like(samples), samples, step, _STREAM_PHOTO, self.cfg.seed)
        ends = self.counts.cumsum(0)
        if self.cfg.subject_sampling == "image":
            photos = _below(words[0], ends[-1])
            return photos, torch.bucketize(photos, ends, right=True)
        subjects = _below(words[0], torch.tensor(len(self.counts)))
        return ends[subjects] - self.counts[subjects] + _below(words[1], self.counts[subjects]), subjects


class Sums:
    """What the batches of one optimizer step leave for its end, in memory that stays in place.

    samples: in the whole step. loss: 0-d, the sum over batches; t [samples] int64 and stats [samples, k], each sample's
    in its place; loss and stats are None before the first batch.
    """

    def __init__(self, samples: int, device: torch.device):
        self.t = torch.zeros(samples, dtype=torch.int64, device=device)
        self.loss = self.stats = None

    def start(self) -> None:
        """A step begins."""
        if self.loss is not None:
            self.loss.zero_()

    def add(self, sample_offset: Tensor, loss: Tensor, t: Tensor, stats: Tensor) -> None:
        """Of one batch; sample_offset: 0-d int64, the number of its first sample."""
        if self.loss is None:
            self.loss, self.stats = torch.zeros_like(loss), stats.new_zeros(len(self.t), stats.shape[1])
        places = torch.arange(len(t), device=t.device) + sample_offset
        self.loss.add_(loss)
        self.t.index_copy_(0, places, t)
        self.stats.index_copy_(0, places, stats)


def pick(x: Tensor, rows: list[int]) -> Tensor:
    """The rows of a tensor that have these numbers; an index in a tensor would be copied to the device, which waits."""
    return x if rows == list(range(len(x))) else torch.stack([x[row] for row in rows])


def _below(words: Tensor, count: Tensor) -> Tensor:
    """Words in [0, 2^32) to integers in [0, count)."""
    return (words * count) >> 32
