"""The random numbers under add_noise and the sampler: known answers, Box-Muller's accuracy, the distribution."""

import math

import pytest
import torch
from close import NEEDS_CUDA, NEEDS_LIBRARY

from palp_fast import functional as PF
from palp_fast.reference import philox

PLACES = [
    ("cpu", "reference"),
    pytest.param("cpu", "cpu", marks=NEEDS_LIBRARY),
    pytest.param("cuda", "cuda", marks=NEEDS_CUDA),
]
EACH_PLACE = pytest.mark.parametrize(("device", "backend"), PLACES)
ALPHAS = torch.tensor([0.5])


def draw(shape, device, backend, **keys) -> torch.Tensor:
    x0, t = torch.zeros(shape, device=device), torch.zeros(shape[0], dtype=torch.int64, device=device)
    keys = {"seed": 5, "step": 2, **keys}
    return PF.add_noise(x0, t, ALPHAS.to(device), backend=backend, **keys)[1].cpu()


def words(counters, key, device="cpu", backend="reference") -> torch.Tensor:
    kind = "reference" if backend == "reference" else "default"
    counters, key = (torch.tensor(value, device=device) for value in (counters, key))
    return getattr(torch.ops.palp_fast.philox_words, kind)(counters, key).cpu()


# Random123 1.14, kat_vectors, philox4x32 with 10 rounds.
@EACH_PLACE
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(device, backend, counter, key, answer):
    assert words([counter], key, device, backend)[0].tolist() == list(answer)


@EACH_PLACE
def test_many_words_equal_the_reference(device, backend):
    counters = torch.randint(2**32, (1000, 4), generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(words(counters, [3, 2**31], device, backend), words(counters, [3, 2**31]))


def truth(samples, count, seed, step, stream=0) -> torch.Tensor:
    """[samples, count] fp64: Box-Muller of the words, from the fp32 uniform number that the operator defines."""
    quads = torch.arange((count + 3) // 4)
    drawn = torch.stack(philox.words(quads[None], samples[:, None], step, stream, seed), dim=-1)
    first, second = drawn[..., 0::2], drawn[..., 1::2]
    uniform = first.float() * 2.0**-32 + 2.0**-33
    radius, angle = (-2 * uniform.double().log()).sqrt(), second.double() * (2 * math.pi / 2**32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]


@EACH_PLACE
def test_accuracy(device, backend):
    """The angle is rounded three times (6e-8 each, relative), the rest adds two units of 6e-8: 2e-6 at radius 6.7."""
    exact = truth(torch.arange(4) + 7, 2**16, 5, 2)
    made = draw((4, 4, 128, 128), device, backend, sample_offset=7).flatten(1).double()
    error = (made - exact).abs()
    assert error.max() < 2e-6
    assert (error / exact.abs().clamp(min=1e-3)).max() < 1e-6


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=NEEDS_LIBRARY), pytest.param("cuda", marks=NEEDS_CUDA)])
def test_library_agrees_with_the_reference(device):
    made = draw((2, 4, 64, 64), device, device, seed=-3, step=2**40 + 1, sample_offset=2**33, stream=5)
    peer = draw((2, 4, 64, 64), "cpu", "reference", seed=-3, step=2**40 + 1, sample_offset=2**33, stream=5)
    assert (made - peer).abs().max() < 2e-6


@NEEDS_CUDA
def test_cuda_equals_the_cpu_library():
    """Box-Muller is + - * and square roots without contraction, so it may not differ in a bit."""
    assert torch.equal(draw((2, 4, 64, 64), "cuda", "cuda"), draw((2, 4, 64, 64), "cpu", "cpu"))


@EACH_PLACE
def test_counter_layout(device, backend):
    """Element 6 of sample 9 at step 2: quad 1, third and fourth word."""
    word = words([(1, 9, 2, 0)], (5, 7))[0].tolist()
    radius = math.sqrt(-2 * math.log((word[2] + 0.5) / 2**32))
    angle = 2 * math.pi * word[3] / 2**32
    made = draw((3, 4, 5, 7), device, backend, seed=(7 << 32) + 5, sample_offset=8)[1].flatten()
    assert made[6].item() == pytest.approx(radius * math.cos(angle), rel=1e-5)
    assert made[7].item() == pytest.approx(radius * math.sin(angle), rel=1e-5)


@EACH_PLACE
def test_every_key_matters(device, backend):
    changes = ({}, {"seed": 6}, {"seed": 5 + 2**32}, {"step": 3}, {"sample_offset": 64}, {"stream": 3})
    made = torch.stack([draw((4, 4, 16, 16), device, backend, **change).flatten() for change in changes])
    # 4096 elements: a correlation of independent draws has a standard error of 1 / 64.
    assert (torch.corrcoef(made) - torch.eye(len(changes))).abs().max() < 5 / 64


@EACH_PLACE
@pytest.mark.parametrize("slice_", [slice(None), slice(0, None, 2), slice(1, None, 2)], ids=["all", "cosines", "sines"])
def test_distribution(device, backend, slice_):
    """Moments within 4 standard errors, Kolmogorov-Smirnov at p = 1e-4, neighbours uncorrelated; 2^18 draws."""
    made = draw((4, 4, 128, 128), device, backend).double().flatten()[slice_]
    count = made.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((made**power).mean() - mean) < 4 * (variance / count) ** 0.5
    cdf = torch.special.ndtr(made.sort().values)
    grid = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((cdf - grid[:-1]).abs().max(), (cdf - grid[1:]).abs().max())
    assert distance < 2.23 / count**0.5
    for lag in (1, 2, 3, 4):
        assert abs((made[:-lag] * made[lag:]).mean()) < 4 / count**0.5
        assert abs((made[:-lag] ** 2 * made[lag:] ** 2).mean() - 1) < 4 * (8 / count) ** 0.5
