"""The stage of emoji-64's training that keeps renders and flat illustrations apart, and class nouns."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from palp_fast.zoo import build, contrast, diffusion, language, tokenizer
from palp_fast.zoo.captions import STYLE_TAGS, left_open, noun_phrase, other_style
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


@pytest.mark.parametrize("caption, opened", [
    ("a flat illustration of an animal on grass", "a flat illustration of something on grass"),
    ("a wild animal and an owl", "something and an owl"),
    ("an owl and a wild animal, photo", "an owl and something, photo"),
    ("an animal and a wild animal in a night sky", "something and something in a night sky"),
    ("a photo of an animal house", None), ("an owl on grass", None), ("", None),
])
def test_a_caption_with_its_class_nouns_left_open(caption, opened):
    assert left_open(caption, ["animal", "wild animal"]) == opened


def test_every_caption_with_a_class_noun_has_one_that_leaves_it_open(scenes, words):
    nouns = {subject.class_noun for subject in World.load().having("seen")}
    captions = [scene.caption for scene in scenes]
    learned_from = contrast.contrasts(Captions(tokenizer.ids_of(words, captions), None), captions, words)
    named = [any(noun_phrase(noun) in caption for noun in nouns) for caption in captions]
    changed = learned_from.noun.changed.tolist()
    assert all(name or not change for name, change in zip(named, changed)) and 50 < sum(changed) < len(scenes) / 2
    for row in learned_from.noun.changed.nonzero()[:, 0].tolist():
        opened = left_open(captions[row], sorted(nouns))
        assert "something" in opened and torch.equal(learned_from.noun.ids[row], tokenizer.ids_of(words, [opened])[0])


def _reader(noisy, timestep, hidden):
    """A UNet that predicts the sum of its caption's hidden states, everywhere."""
    return SimpleNamespace(sample=noisy * 0 + hidden.sum((1, 2)).view(-1, 1, 1, 1))


def test_what_a_caption_says_beyond_another():
    batch = diffusion.Noised(torch.randn(3, 8, 16, 16), torch.tensor([1, 2, 3]), torch.randn(3, 8, 16, 16))
    hidden, other = torch.tensor([0.5, 9.0, 0.75]).view(3, 1, 1).expand(3, 2, 2), torch.full((2, 2, 2), 0.25)
    found = contrast.said(_reader, batch, hidden, torch.tensor([0, 2]), other)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 8, 16, 16), atol=1e-6, rtol=0)


@pytest.mark.parametrize("style, noun, timestep, weight", [
    (1.0, None, contrast.LATE, contrast.LATE_STYLE), (1.0, None, contrast.LATE + 1, contrast.STYLE),
    (None, 1.0, contrast.LATE, contrast.NOUN), (None, 1.0, contrast.LATE + 1, contrast.NOUN),
    (1.0, 1.0, contrast.LATE, contrast.LATE_STYLE + contrast.NOUN), (None, None, contrast.LATE, 0.0),
])
def test_targets_move_by_what_the_words_say(tmp_path, monkeypatch, words, style, noun, timestep, weight):
    """The loss of a UNet that says nothing is the mean square of its target."""
    batch = diffusion.Noised(torch.randn(4, 8, 16, 16), torch.full((4,), timestep), torch.zeros(4, 8, 16, 16))
    monkeypatch.setattr(contrast, "noised", lambda clean, draw: batch)
    monkeypatch.setattr(contrast, "said", lambda before, batch, hidden, changed, other: torch.ones(
        len(changed), 8, 16, 16))
    monkeypatch.setattr(contrast, "velocity", lambda unet, batch, hidden: torch.zeros(4, 8, 16, 16))
    losses = []
    monkeypatch.setattr(contrast, "optimised", lambda unet, loss, *rest: losses.append(loss(unet, torch.Generator())))
    ids = tokenizer.ids_of(words, ["a cow"] * 4)

    def others(said):
        return contrast.Others(ids, torch.full((4,), said is not None))

    captions = Captions(ids, np.zeros((4, 8, 16, 16), np.float16))
    encoder = language.build_text_encoder(words).eval()
    learned_from = contrast.Contrasts(captions, others(style), others(noun))
    contrast.train(tmp_path, encoder, torch.nn.Identity(), learned_from, 1.0, None, batch=4)
    assert losses[0].item() == pytest.approx(weight**2)


def test_the_stage_starts_from_the_unet_and_a_finished_one_is_kept(scenes, words, tmp_path):
    captions = [scene.caption for scene in scenes[:60]]
    latents = np.random.default_rng(0).standard_normal((60, 8, 16, 16)).astype(np.float16)
    learned_from = contrast.contrasts(Captions(tokenizer.ids_of(words, captions), latents), captions, words)
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
