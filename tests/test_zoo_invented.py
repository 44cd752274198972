"""Invented subjects, their scenes, and the coder that gives them tokens. The sprites are drawn here, not fetched."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from palp_fast.zoo import build, coder, diffusion, invented, language, tokenizer
from palp_fast.zoo.autoencoder import to_pixels
from palp_fast.zoo.coder import Captions, Coder, Mixture
from palp_fast.zoo.render import Portraits, training_scene
from palp_fast.zoo.training import device, save
from palp_fast.zoo.world import World

SCENES, INVENTED = 1000, 40


@pytest.fixture(scope="module")
def world():
    return World.load()


@pytest.fixture(scope="module")
def words():
    return tokenizer.trained([], build.MODEL / "tokenizer")


@pytest.fixture(scope="module")
def drawings(world):
    """A square for every subject, its colour and size by its place; hollow in the line drawings."""
    made = np.zeros((len(world.subjects), 3, 96, 96, 4), np.uint8)
    for place, sprite in enumerate(made):
        low, high = 20 + place % 12, 76 - place // 12 % 12
        sprite[:, low:high, low:high] = (250, place % 200, 0, 255)
        sprite[2, ..., :3] = 0
        sprite[2, low + 6:high - 6, low + 6:high - 6] = 0
    return made


@pytest.fixture(scope="module")
def mixture(world, words, drawings, tmp_path_factory):
    """60 captions of each kind; the latents are pictures at a quarter of their size."""
    sprites = invented.sprites_of(world, drawings, tmp_path_factory.mktemp("cache"), INVENTED)
    portraits, renders = Portraits(sprites), coder.small_renders(sprites)

    def captions(scenes, places=None):
        pictures = to_pixels(np.stack([portraits.draw(scene) for scene in scenes]))
        ids = tokenizer.ids_of(words, [scene.caption for scene in scenes])
        shown = torch.nn.functional.avg_pool2d(pictures, 4).numpy()
        return Captions(ids, shown, None if places is None else renders[torch.tensor(places)])

    scenes = [invented.coded_scene(world, index, INVENTED) for index in range(60)]
    torch.manual_seed(0)
    return Mixture(captions([training_scene(world, index) for index in range(60)]),
                   captions([scene for scene, _ in scenes], [place for _, place in scenes]),
                   coder.mark_ids(words), Coder(language.WIDTH).to(device()), scaling=1.0, coded_share=0.375)


def test_scenes_of_invented_subjects_show_no_held_out_subject_and_no_withheld_cell(world):
    kinds = set()
    for index in range(SCENES):
        scene, place = invented.coded_scene(world, index)
        assert place in scene.subjects and len(scene.subjects) <= 2
        others = [other for other in scene.subjects if other != place]
        number = place - len(world.subjects)
        shown = [*others, *([place] if number < 0 else invented._parents(world, number))]
        assert {world.subjects[each].role for each in shown} == {"seen"}
        assert scene.style not in {world.subjects[each].withheld_style for each in shown}
        assert world.allows(scene.style, scene.background)
        kinds.add((number < 0, bool(others)))
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}


def test_captions_of_invented_subjects_have_one_coded_token(world, words):
    for index in range(SCENES):
        caption = invented.coded_scene(world, index)[0].caption
        ids = torch.tensor(words(caption).input_ids)
        assert torch.isin(ids, coder.mark_ids(words)).sum() == bool(caption), caption
        assert "a ~" not in caption


def test_an_invented_subject_is_the_same_drawing_in_every_style(drawings):
    solid = drawings.copy()
    solid[:, 2] = solid[:, 1] * np.array([0, 0, 0, 1], np.uint8)
    for index in range(30):
        parents = [index, 100 + index][:1 + index % 2]
        made = invented.invent(solid, parents, random.Random(index))
        assert made.shape == (3, 96, 96, 4) and made.dtype == np.uint8
        assert (made[0] == made[1]).all() and (made[2, ..., 3] == made[1, ..., 3]).all()
        assert (made[2, ..., :3] == 0).all() and made[0, ..., 3].mean() > 20
        assert (made == invented.invent(solid, parents, random.Random(index))).all()


def test_what_stands_in_front_hides_the_lines_behind(drawings):
    behind = np.ones((3, 96, 96, 4), np.float32)
    covered = invented._cover(behind, drawings[0], random.Random(0))
    hollow = covered[2, ..., 3] < 0.01
    assert 50 < hollow.sum() < 96 * 96 / 2  # the inside of the hollow square in front
    assert (covered[1, ..., 3] > 0.99).all()


def test_colours_of_an_invented_subject_turn_and_lines_stay_black(drawings):
    layers = np.ascontiguousarray(drawings[50], np.float32) / 255
    turned = invented._recoloured(layers, random.Random(1))
    assert np.abs(turned[:2] - layers[:2]).max() > 0.2 and (turned[2] == layers[2]).all()
    assert (turned[..., 3] == layers[..., 3]).all() and (turned[..., :3] <= turned[..., 3:]).all()


def test_coder_gives_embeddings_of_one_length_and_noise_only_when_asked():
    torch.manual_seed(0)
    network, renders = Coder(192), torch.rand(4, 4, 32, 32)
    codes = network(renders)
    assert codes.shape == (4, 192) and (codes == network(renders)).all()
    assert codes.square().mean(1).sqrt().allclose(torch.full((4,), coder.SCALE), rtol=1e-3)
    noisy = network(renders, torch.Generator().manual_seed(0))
    assert ((noisy - codes).norm(dim=1) > 0.02 * codes.norm(dim=1)).all()


def test_coded_tokens_take_the_coders_embeddings(mixture, words):
    encoder = language.build_text_encoder(words).eval().to(device())
    hidden, shown = mixture.draw(encoder, 8, torch.Generator().manual_seed(0))
    assert hidden.shape == (8, 96, 192) and shown.shape == (8, 3, 16, 16)
    with torch.no_grad():
        for weight in mixture.coder.parameters():
            weight.mul_(1.5).add_(0.1)
        changed = mixture.draw(encoder, 8, torch.Generator().manual_seed(0))[0]
    moved = (changed - hidden).abs().amax((1, 2)) > 1e-4
    draw = torch.Generator().manual_seed(0)
    torch.randint(60, (5,), generator=draw)
    marked = torch.isin(mixture.invented.ids[torch.randint(60, (3,), generator=draw)], mixture.marks).any(1)
    assert moved.cpu().tolist() == [False] * 5 + marked.tolist() and marked.any()


def test_scenes_of_two_are_drawn_as_often_as_said(world):
    chances = build.picture_chances(world, 400)
    pairs = torch.tensor([len(training_scene(world, index).subjects) == 2 for index in range(400)])
    assert 0.08 < pairs.float().mean() < 0.22 and (chances == torch.where(pairs, diffusion.PAIRS, 1.0)).all()
    captions = Captions(torch.zeros(400, 96, dtype=torch.int64), np.zeros((400, 3, 16, 16)), chances=chances)
    drawn = pairs[captions.rows(20_000, torch.Generator().manual_seed(0))].float().mean()
    assert abs(drawn - chances[pairs].sum() / chances.sum()) < 0.02


def test_text_encoder_and_coder_learn_what_captions_look_like(mixture, words):
    encoder, losses = language.build_text_encoder(words), []
    language.train(encoder, mixture, lambda step, **loss: losses.append(loss), steps=200, batch=6)
    for name in ("whole_loss", "part_loss", "coded_part_loss"):
        assert losses[-1][name] < 0.7 * losses[0][name]


def test_a_text_encoder_without_a_coder_stays_as_it_is_and_gets_one(mixture, words, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "CODER_STEPS", 2)
    monkeypatch.setattr(language, "BATCH", 6)
    encoder = language.build_text_encoder(words)
    save(tmp_path / "language.pt", encoder=encoder.state_dict())
    before = [weight.clone() for weight in mixture.coder.parameters()]
    found = language.trained(tmp_path, words, mixture, lambda step, **loss: None)
    kept = torch.load(tmp_path / "language.pt", map_location="cpu")
    assert all((kept["encoder"][name] == value).all() for name, value in encoder.state_dict().items())
    assert not any(weight.requires_grad for weight in found.parameters())
    moved = [not weight.equal(old) for weight, old in zip(mixture.coder.parameters(), before, strict=True)]
    assert all(moved) and kept["coder"].keys() == mixture.coder.state_dict().keys()


def test_unet_trains_and_a_finished_training_is_kept(mixture, words, tmp_path):
    encoder = language.build_text_encoder(words).eval().to(device())
    latents = np.random.default_rng(0).standard_normal((60, 8, 16, 16)).astype(np.float16)
    captions = dataclasses.replace(
        mixture, named=dataclasses.replace(mixture.named, latents=latents),
        invented=dataclasses.replace(mixture.invented, latents=latents))
    trained = diffusion.train(tmp_path, encoder, captions, lambda step, **values: None, steps=2, batch=4)
    torch.manual_seed(0)
    start = diffusion.build_unet().state_dict()
    assert any(not value.cpu().equal(start[name]) for name, value in trained.state_dict().items())
    again = diffusion.train(tmp_path, encoder, captions, lambda step, **values: None, steps=2, batch=4)
    assert all(value.equal(again.state_dict()[name]) for name, value in trained.state_dict().items())
