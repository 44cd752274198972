"""The stage of emoji-64's training that keeps renders and flat illustrations apart."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from palp_fast.zoo import build, contrast, diffusion, language, tokenizer
from palp_fast.zoo.captions import STYLE_TAGS, other_style
from palp_fast.zoo.coder import Captions
from palp_fast.zoo.render import training_scene
from palp_fast.zoo.training import device
from palp_fast.zoo.world import World


@pytest.fixture(scope="module")
def scenes():
    world = World.load()
    return [training_scene(world, index) for index in range(1000)]


@pytest.fixture(scope="module")
def words():
    return tokenizer.trained([], build.MODEL / "tokenizer")


@pytest.mark.parametrize("caption, others", [
    ("a flat illustration of an owl on grass", {"a photo of an owl on grass", "a glossy 3d render of an owl on grass"}),
    ("a photo of a cow", {"a flat illustration of a cow"}),
    ("a glossy 3d render of a cow", {"a flat illustration of a cow"}),
    ("a cow on blue, photo", {"a cow on blue, flat illustration"}),
    ("a line drawing of a cow", {None}), ("a cow on grass", {None}), ("", {None}),
])
def test_a_caption_in_the_other_style(caption, others):
    draw = random.Random(0)
    assert {other_style(caption, draw) for _ in range(20)} == others


def test_every_caption_that_names_one_of_the_two_styles_has_another(scenes):
    draw = random.Random(0)
    for scene in scenes:
        other = other_style(scene.caption, draw)
        said = [tag for tag in STYLE_TAGS[scene.style] if tag in scene.caption]
        assert (other is None) == (scene.style == "line" or not said)
        if other:
            new = next(tag for tag in STYLE_TAGS["flat" if scene.style == "render" else "render"] if tag in other)
            assert other.replace(new, said[0]) == scene.caption


def _reader(noisy, timestep, hidden):
    """A UNet that predicts the sum of its caption's hidden states, everywhere."""
    return SimpleNamespace(sample=noisy * 0 + hidden.sum((1, 2)).view(-1, 1, 1, 1))


def test_targets_move_away_from_the_other_style_more_so_late(monkeypatch):
    velocity = torch.randn(3, 8, 16, 16)
    batch = diffusion.Noised(torch.randn(3, 8, 16, 16), torch.tensor([contrast.LATE, 999, contrast.LATE + 1]), velocity)
    hidden, other = torch.full((3, 2, 2), 0.5), torch.full((2, 2, 2), 0.25)  # their sums: 2 and 1
    target = contrast.moved(_reader, batch, hidden, torch.tensor([0, 2]), other)
    moved = torch.tensor([contrast.LATE_WEIGHT, 0.0, contrast.WEIGHT]).view(-1, 1, 1, 1)
    torch.testing.assert_close(target - velocity, moved.expand_as(velocity), atol=1e-6, rtol=0)
    assert target is not velocity and torch.equal(target[1], velocity[1])
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(contrast.moved(_reader, batch, hidden, none, other[:0]), velocity)


def test_the_stage_starts_from_the_unet_and_a_finished_one_is_kept(scenes, words, tmp_path):
    captions = [scene.caption for scene in scenes[:60]]
    latents = np.random.default_rng(0).standard_normal((60, 8, 16, 16)).astype(np.float16)
    learned_from = contrast.pairs(Captions(tokenizer.ids_of(words, captions), latents), captions, words)
    encoder = language.build_text_encoder(words).eval().to(device())
    torch.manual_seed(0)
    unet = diffusion.build_unet().to(device()).requires_grad_(False)
    before = {name: value.clone() for name, value in unet.state_dict().items()}

    def trained():
        return contrast.train(
            tmp_path, encoder, unet, learned_from, 1.0, lambda step, **values: None, steps=2, batch=6).state_dict()

    first = trained()
    assert any(not value.equal(before[name]) for name, value in first.items())
    # two steps of the warm-up move no weight by more than their learning rates
    assert max((value - before[name]).abs().max() for name, value in first.items()) < contrast.PEAK_LR
    assert all(value.equal(before[name]) for name, value in unet.state_dict().items())
    again = trained()
    assert all(value.equal(again[name]) for name, value in first.items())
