"""add_noise: Philox known answers, a function of (seed, step, sample, element) alone, N(0, 1)."""

import math

import pytest
import torch
from close import assert_close

from palp_fast import functional as PF
from palp_fast.reference.philox import philox

ALPHAS = torch.linspace(0.99, 0.01, 50)
T = torch.tensor([3, 49, 0])
SHAPE = (3, 4, 5, 7)  # 140 elements: a whole number of Philox calls; the odd case is below


def latents(dtype=torch.float32, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def noise(x0=None, t=T, **keys):
    return PF.add_noise(latents() if x0 is None else x0, t, ALPHAS, **{"seed": 5, "step": 2, **keys})[1]


# The known answers of Random123 1.14 for philox4x32 with 10 rounds.
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
def test_philox_known_answers(counter, key, answer):
    words = philox(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(word) for word in words) == answer


def test_counter_layout():
    """Element 6 of sample 9 at step 2: quad 1, third and fourth word."""
    seed = (7 << 32) + 5
    words = [int(w) for w in philox(tuple(torch.tensor(c) for c in (1, 9, 2, 0)), (5, 7))]
    radius = math.sqrt(-2 * math.log((words[2] + 0.5) / 2**32))
    angle = 2 * math.pi * words[3] / 2**32
    made = noise(seed=seed, sample_offset=8)[1].flatten()
    assert made[6].item() == pytest.approx(radius * math.cos(angle), rel=1e-5)
    assert made[7].item() == pytest.approx(radius * math.sin(angle), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_x_t_uses_the_noise_as_returned(dtype):
    x0 = latents(dtype)
    x_t, made = PF.add_noise(x0, T, ALPHAS, seed=1, step=2)
    alpha_bar = ALPHAS.double()[T].view(-1, 1, 1, 1)
    truth = alpha_bar.sqrt() * x0.double() + (1 - alpha_bar).sqrt() * made.double()
    assert x_t.dtype == made.dtype == dtype
    assert_close(x_t, truth, {torch.bfloat16: 3e-3, torch.float16: 4e-4}.get(dtype, 1e-6))


def test_split_and_order_do_not_matter():
    whole = noise()
    for index in range(3):
        assert torch.equal(noise(latents()[index : index + 1], T[:1], sample_offset=index)[0], whole[index])


def test_strides_and_dtype_do_not_matter():
    assert torch.equal(noise(latents().to(memory_format=torch.channels_last)), noise())
    assert torch.equal(noise(latents(torch.bfloat16)), noise().to(torch.bfloat16))
    assert torch.equal(noise(latents(torch.float64)), noise().double())


def test_odd_sizes_are_prefixes():
    assert torch.equal(noise(latents()[:, :1, :1]).flatten(1), noise().flatten(1)[:, :7])


def test_ints_and_device_scalars_agree():
    keys = {"seed": -3, "step": 2**31 + 1, "sample_offset": 11}
    assert torch.equal(noise(**keys), noise(**{name: torch.tensor(value) for name, value in keys.items()}))


def test_every_key_matters():
    base = noise()
    changes = ({"seed": 6}, {"seed": 5 + 2**32}, {"step": 3}, {"sample_offset": 1}, {"stream": 3})
    made = [base, *(noise(**change) for change in changes)]
    for index, left in enumerate(made):
        for right in made[index + 1 :]:
            assert abs(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]) < 0.25


def test_distribution():
    """Moments and the Kolmogorov-Smirnov distance of 2^18 draws; the bounds are 4 standard errors, and p = 1e-4."""
    count = 2**18
    made = noise(torch.empty(4, 4, 128, 128), torch.zeros(4, dtype=torch.int64)).double().flatten()
    assert made.numel() == count
    assert abs(made.mean()) < 4 / count**0.5
    assert abs(made.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((made**3).mean()) < 4 * (15 / count) ** 0.5
    assert abs((made**4).mean() - 3) < 4 * (96 / count) ** 0.5
    cdf = torch.special.ndtr(made.sort().values)
    grid = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((cdf - grid[:-1]).abs().max(), (cdf - grid[1:]).abs().max())
    assert distance < 2.23 / count**0.5
    assert abs((made[:-1] * made[1:]).mean()) < 4 / count**0.5


def test_gradient():
    x0 = latents(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x0: PF.add_noise(x0, T, ALPHAS, seed=1, step=2), (x0,))


def test_opcheck():
    scalars = [torch.tensor(value) for value in (1, 2, 3)]
    for overload in ("default", "reference"):
        op = getattr(torch.ops.palp_fast.add_noise, overload)
        torch.library.opcheck(op, (latents().requires_grad_(), T, ALPHAS, *scalars, 0))


def test_compiles_in_one_graph():
    def function(x0, step):
        return PF.add_noise(x0, T, ALPHAS, seed=1, step=step)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for step in (0, 1, torch.tensor(2)):
        for mine, its in zip(compiled(latents(), step), function(latents(), step)):
            assert torch.equal(mine, its)


def test_empty_batch():
    x_t, made = PF.add_noise(latents()[:0], T[:0], ALPHAS, seed=1, step=2)
    assert x_t.shape == made.shape == (0, 4, 5, 7)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x0": torch.ones(3, 4, 5)}, "x0 has shape"),
        ({"t": torch.tensor([1, 2])}, "t has shape"),
        ({"t": torch.tensor([1.0, 2.0, 3.0])}, "t"),
        ({"alphas_cumprod": torch.ones(2, 2)}, "alphas_cumprod"),
        ({"seed": 0.5}, "seed"),
        ({"step": 2**63}, "step"),
        ({"step": torch.tensor([1])}, "step"),
        ({"sample_offset": torch.tensor(1.0)}, "sample_offset"),
        ({"stream": -1}, "stream"),
    ],
)
def test_bad_arguments_are_named(change, name):
    arguments = {"x0": latents(), "t": T, "alphas_cumprod": ALPHAS, "seed": 1, "step": 2}
    with pytest.raises((ValueError, TypeError), match=name):
        PF.add_noise(**{**arguments, **change})
