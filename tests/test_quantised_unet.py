"""The embedded UNet with quantised weights and with inexact products: errors of its prediction, of r and of g.

    r = G^15(x_hat, y_c) - G^7.5(x_hat, y_P),   g = 2 (eps_hat - eps) - 0.1 r

The figures of docs/quantised.md: pytest -s tests/test_quantised_unet.py prints them.
"""

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from close import relative

import numpy as np
from PIL import Image
from torch import nn

import palp_fast
from palp_fast import functional as PF
from palp_fast.data import image_sources
from palp_fast.models import load_components

ALPHA, BETA, WEIGHT = 15.0, 7.5, 0.1
PROMPTS = ["", "a line drawing of an owl", "a photo of an owl"]  # 0, y_c, y_P
TIMES = torch.tensor([100, 300, 500, 800])


class Frozen(nn.Module):
    """A linear layer or convolution on another weight; in_half: a linear layer takes x in fp16."""

    def __init__(self, layer, weight, in_half=False):
        super().__init__()
        self.weight, self.bias, self.in_half = weight, layer.bias, in_half
        if isinstance(layer, nn.Conv2d):
            self.options = layer.stride, layer.padding, layer.dilation, layer.groups

    def forward(self, x, *_):
        if hasattr(self, "options"):
            return PF.frozen_conv2d(x, self.weight, self.bias, *self.options)
        return PF.frozen_linear(x.half() if self.in_half else x, self.weight, self.bias).to(x.dtype)


def converted(unet, form, in_half=False):
    """A copy whose linear layers and convolutions have weights in `form`, None: as they are; bytes before and after."""
    unet, before, after = copy.deepcopy(unet), 0, 0
    for path, module in list(unet.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight if form is None else PF.quantise(module.weight, form, name=path)
            before, after = before + module.weight.nbytes, after + weight.nbytes
            unet.set_submodule(path, Frozen(module, weight, in_half))
    return unet, before, after


@pytest.fixture(scope="module")
def scene():
    """unet, x_t, noise and text of photos of the demonstration, each at one of TIMES."""
    folder = Path(palp_fast.__file__).parent / "zoo"
    parts = load_components(folder / "emoji-64", dtype=torch.float32, device="cpu")
    photos = [Image.open(path).convert("RGB") for path in image_sources(folder / "demo_subject" / "photos")]
    pixels = [torch.from_numpy(np.array(photo.resize((64, 64)))).movedim(-1, 0) / 127.5 - 1 for photo in photos]
    pixels = torch.stack(pixels)
    latents = parts.to_latents(pixels)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    alpha_bar = parts.alphas_cumprod[TIMES].view(-1, 1, 1, 1)
    ids = parts.tokenizers[0](PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        text = parts.text_encoders[0](ids).last_hidden_state
    return parts.unet, alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise, noise, text


@torch.no_grad()
def figures(unet, scene, mode=contextlib.nullcontext):
    """eps_hat, r and g: eps_hat by the UNet as it is, as with a gradient; r within `mode`. x_hat = x_t."""
    _, x_t, noise, text = scene
    eps_hat = unet(x_t, TIMES, text[2].expand(4, -1, -1)).sample
    with mode():
        predictions = unet(x_t.repeat(3, 1, 1, 1), TIMES.repeat(3), text.repeat_interleave(4, 0)).sample.chunk(3)
    empty, clean, subject = predictions
    r = (empty + ALPHA * (clean - empty)) - (empty + BETA * (subject - empty))
    return {"eps": subject, "r": r, "g": 2 * (eps_hat - noise) - WEIGHT * r}


def errors(found, wanted):
    return {name: relative(found[name], wanted[name]) for name in wanted}


# Bounds are twice what was seen when they were written down.
@pytest.mark.parametrize(("form", "bounds"), [
    ("int8", {"eps": 0.03, "r": 0.03, "g": 0.025}), ("nf4", {"eps": 0.29, "r": 0.27, "g": 0.24})])
def test_errors_of_quantised_weights(form, bounds, scene):
    unet, before, after = converted(scene[0], form)
    made = errors(figures(unet, scene), figures(scene[0], scene))
    print(f"\n{form}: bytes {after / before:.4f} of fp32;", {key: f"{value:.2e}" for key, value in made.items()})
    assert all(0 < made[name] <= bounds[name] for name in bounds)


@pytest.mark.parametrize(("kind", "bounds"), [
    ("int8", {"eps": 0.032, "r": 0.03, "g": 0.0055}), ("fp16", {"eps": 6e-4, "r": 1.1e-3, "g": 3.5e-4})])
def test_errors_of_inexact_products(kind, bounds, scene):
    """Against the same weights, exact: int8 ones, or those of the model, whose linear layers then take x in fp16."""
    unet = converted(scene[0], "int8" if kind == "int8" else None, in_half=kind == "fp16")[0]
    exact = figures(unet if kind == "int8" else scene[0], scene)
    made = errors(figures(unet, scene, lambda: PF.inexact_products(kind)), exact)
    print(f"\ninexact {kind}:", {key: f"{value:.2e}" for key, value in made.items()})
    assert all(0 < made[name] <= bounds[name] for name in bounds)
