"""The dynamic 8-bit map of the optimizers' state."""

import pytest
import torch

from palp_fast.reference.blockwise import dequantise, dynamic_levels, quantise


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_the_dynamic_map(signed):
    levels = dynamic_levels(signed)
    assert levels.unique().numel() == 256 and levels[-1] == 1 and (levels == 0).sum() == 1
    # Decade by decade from below: 1, 2, 4, ... cells of each sign, twice as many without sign.
    top = ((levels > 0.1) & (levels < 1)).sum()
    assert top == (64 if signed else 128)
    assert levels.min() == (-levels[-2] if signed else 0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_quantise_takes_the_nearest_level(signed, scale):
    generator = torch.Generator().manual_seed(0)
    # Magnitudes over eight decades, so that almost every level is met.
    values = scale * 10 ** (-8 * torch.rand(512, 256, generator=generator))
    values = values * torch.randn(512, 256, generator=generator).sign() if signed else values
    values[3] = 0
    codes, scales = quantise(values, signed)
    distance = (dynamic_levels(signed).double() * scales[:, None, None].double() - values[..., None].double()).abs()
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    assert (chosen <= distance.amin(-1) * (1 + 1e-5) + 1e-7 * scales[:, None]).all()
    assert scales[3] == 0 and torch.equal(dequantise(codes, scales, signed)[3], torch.zeros(256))
    assert len(codes.unique()) > 250
