"""The judges of the emoji-64 world: what they are trained on, what the shipped ones see, how pictures are scored."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from palp_fast import evaluate
from palp_fast.zoo import ceilings, check, gates, judge, judge_pool, judge_training, scores
from palp_fast.zoo.judge import FOLDER, JUDGES, Judge, Reading
from palp_fast.zoo.judge_nets import ENCODERS, MAX_WORDS, UNKNOWN, JudgeNet, Words, halves
from palp_fast.zoo.judge_scenes import Scenes
from palp_fast.zoo.scores import Wanted
from palp_fast.zoo.world import DARK, STYLES, TARGETS, World, grounds

SUBJECT, COW = "cow face", Path(__file__).parent / "cow_face"  # held out from the generator
PHOTOS = sorted(COW.glob("photo_*.png"))  # renders on white, red, green, yellow
TRUTH = COW / "truth.png"  # line drawing on blue


@pytest.fixture(scope="module")
def world():
    return World.load()


@pytest.fixture(scope="module")
def scenes(world):
    return Scenes(world)


@pytest.fixture(scope="module", params=JUDGES)
def shipped(request):
    if request.param not in judge.available():
        pytest.skip(f"judge {request.param} is not trained yet")
    return judge.load(request.param)


def test_words_have_ids_of_their_own_and_unknown_ones_share_one():
    words = Words.of(["A fox, on grass", "an owl"])
    assert words.vocabulary == ["a", "an", "fox", "grass", "on", "owl"]
    ids = words(["an OWL.", "a zebra on grass", ""])
    assert ids.tolist() == [[3, 7, 0, 0], [2, UNKNOWN, 6, 5], [UNKNOWN, 0, 0, 0]]
    assert words(["fox " * 50]).shape == (1, MAX_WORDS)


def test_training_draws_every_subject_and_no_reserved_composition(world, scenes):
    drawn = [scenes.draw(f"0/0/{row}") for row in range(6000)]
    counts = Counter(place for scene in drawn for place in scene.subjects)
    assert counts.keys() == set(scenes.places)
    assert {world.subjects[place].role for place in scenes.held_out} == {"development", "acceptance"}
    targets = {(style, background) for _, style, background, _ in TARGETS}
    for scene in drawn:
        assert scene.caption and not (scene.style == "line" and scene.background in DARK)
        assert not scenes.reserved(scene.subjects, scene.style, scene.background)
        held_out = any(place in scenes.held_out for place in scene.subjects)
        assert not (held_out and (scene.style, scene.background) in targets)
    assert 0.15 < np.mean([len(scene.subjects) == 2 for scene in drawn]) < 0.25


def test_each_subject_and_style_has_one_reserved_background(scenes):
    seen = [place for place in scenes.places if place not in scenes.held_out]
    for place in seen[:60]:
        for style in STYLES:
            assert sum(scenes.reserved((place,), style, ground) for ground in grounds(style)) == 1


def test_ceilings_ask_for_what_training_never_showed(scenes):
    tests = ceilings.tests(scenes)
    assert {test: len(shown) for test, shown in tests.items()} == {
        "render": 709, "flat": 709, "line": 709, "held out": 123, "targets": 246}
    for shown in tests.values():
        assert all(scenes.reserved(scene.subjects, scene.style, scene.background) for scene in shown)
    assert all(len({scene.subjects for scene in tests[style]}) == 709 for style in STYLES)


def test_labels_share_a_scene_between_its_subjects(scenes):
    two = scenes.draw("two", places=(scenes.places[3], scenes.places[8]), style="flat")
    labels = scenes.labels([two])
    cells = [label * len(STYLES) + STYLES.index("flat") for label in (3, 8)]
    assert labels["cell"][0].nonzero().flatten().tolist() == cells and labels["cell"].sum() == 1
    assert labels["style"].item() == STYLES.index("flat")


def test_every_word_of_a_caption_is_known(scenes):
    words = scenes.words()
    ids = words([scenes.draw(f"1/0/{row}").caption for row in range(500)])
    assert not (ids == UNKNOWN).any()


def test_spoiling_leaves_the_last_pictures_alone_and_moves_the_others():
    pixels = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spoilt = judge_training.spoil(pixels, torch.Generator().manual_seed(1))
    changed = (spoilt - pixels).abs().mean((1, 2, 3))
    assert (changed[56:] == 0).all() and (changed[:56] > 0).all() and spoilt.abs().max() <= 1
    assert (changed[:56] > 0.01).float().mean() > 0.9


def test_blur_and_warp_keep_plain_pictures_plain():
    plain = torch.full((8, 3, 64, 64), 0.3)
    for change in (judge_training._blur, judge_training._warp):
        torch.testing.assert_close(change(plain, torch.Generator().manual_seed(0)), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_of_a_judge_learns(encoder, scenes):
    torch.manual_seed(0)
    words, drawn = scenes.words(), [scenes.draw(f"0/1/{row}") for row in range(8)]
    net = JudgeNet(encoder, len(scenes.places), len(words))
    parts = judge_training.losses(
        net, torch.randn(8, 3, 64, 64), scenes.labels(drawn), words([scene.caption for scene in drawn]))
    assert parts.keys() == {"style", "background", "cell", "contrast"}
    sum(parts.values()).backward()
    without = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == ["encoder.0.0.weight"]  # the fixed one


def test_training_goes_on_from_its_checkpoint(tmp_path, scenes, monkeypatch):
    sprites = np.random.default_rng(0).integers(0, 256, (1, 1, 96, 96, 4), np.uint8)
    sprites = np.broadcast_to(sprites, (len(scenes.world.subjects), 3, 96, 96, 4))
    monkeypatch.setattr(judge_training, "BATCH", 8)
    monkeypatch.setattr(judge_training, "HARD", 1)
    monkeypatch.setattr(judge_pool, "KINDS", {"noisy": (3, 0.4, 1.0), "clean": (2, 0.0, 3.0)})
    monkeypatch.setattr(judge_training, "EVERY", 2)
    nets = []
    for folder, stops in (("whole", (4,)), ("stopped", (2, 4))):
        (tmp_path / folder).mkdir()
        for stop in stops:
            net = judge_training.train(
                "emoji-64-second", tmp_path / folder, scenes, sprites, lambda *_, **__: None, steps=4, stop=stop)
        nets.append(net)
    one, other = (net.state_dict() for net in nets)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_read_badly_is_drawn_more_often(tmp_path, scenes, monkeypatch):
    monkeypatch.setattr(judge_pool, "KINDS", {"noisy": (9, 0.4, 1.0), "clean": (3, 0.0, 3.0)})
    np.save(tmp_path / "judge-noisy.npy", np.zeros((9, 64, 64, 3), np.uint8))
    np.save(tmp_path / "judge-clean.npy", np.zeros((3, 64, 64, 3), np.uint8))
    pool = judge_pool.Pool(tmp_path, scenes, None)
    assert pool.chances[:9].sum() == pytest.approx(0.5) and pool.chances.sum() == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    assert sum(pool.draw(generator)[0] in pool.scenes[:9] for _ in range(400)) in range(160, 240)

    class Lines(torch.nn.Module):  # takes everything for a line drawing
        def forward(self, pixels):
            return {"style": torch.tensor([[0.0, 0.0, 9.0]]).expand(len(pixels), -1)}

    pool.weigh(Lines())
    own = pool.chances / torch.tensor([1.0] * 9 + [3.0] * 3)
    lines = torch.tensor([scene.style == "line" for scene in pool.scenes])
    assert 0 < lines.sum() < 12 and own[lines].max() < 0.8 * own[~lines].min()


def test_distractors_are_seen_and_of_the_class_noun_first(world):
    seconds = {second for *_, second in TARGETS if second}
    for subject in world.having("development", "acceptance"):
        names = scores.distractors(world, subject.name)
        others = [world.named(name) for name in names]
        assert len(set(names)) == 19 and not seconds & set(names)
        assert all(other.role == "seen" for other in others)
        alike = [other.class_noun == subject.class_noun for other in others]
        assert alike == sorted(alike, reverse=True)
        possible = [other for other in world.having("seen") if other.class_noun == subject.class_noun]
        assert sum(alike) == min(19, len([other for other in possible if other.name not in seconds]))


@pytest.fixture()
def fake(world):
    """A judge of which only the names of its subjects are asked."""
    names = [subject.name for subject in world.having("seen", "development", "acceptance")]
    return Judge(torch.nn.Identity(), Words([]), names, {})


def logits(fake, ranked):
    values = torch.zeros(len(fake.subjects))
    for place, name in enumerate(ranked):
        values[fake.subjects.index(name)] = 10.0 - place
    return values


def reading(fake, ranked, style="line", background="blue", left=(), right=()):
    """One picture, its likeliest subjects, and those of its halves."""
    halved = torch.stack([logits(fake, left), logits(fake, right)])
    return Reading([style], [background], logits(fake, ranked)[None], halved[None], torch.ones(1, 1))


def test_marks_of_one_subject(fake, world):
    wanted = [Wanted("cow face", "line", "blue")]
    strangers = [name for name in ("guitar", "rocket", "teapot") if name in fake.subjects]
    right = scores.marks(fake, world, reading(fake, ["cow face"]), wanted)
    assert all(right[mark].tolist() == [True] for mark in scores.MARKS)
    # A subject that is no distractor may be likelier: that is top5, not top1, and identity all the same.
    right = scores.marks(fake, world, reading(fake, [*strangers, "cow face"]), wanted)
    assert [bool(right[mark][0]) for mark in scores.MARKS] == [True, True, False, True, True, True, True]
    rival = scores.distractors(world, "cow face")[0]
    right = scores.marks(fake, world, reading(fake, [rival, "cow face"], style="flat"), wanted)
    assert [bool(right[mark][0]) for mark in scores.MARKS] == [False, True, False, True, False, True, False]


@pytest.mark.parametrize("swapped", [False, True])
def test_marks_of_two_subjects(fake, world, swapped):
    wanted = [Wanted("cow face", "line", "grass", "guitar")]

    def marked(own, other):
        left, right = (other, own) if swapped else (own, other)
        return scores.marks(fake, world, reading(fake, [], background="grass", left=left, right=right), wanted)

    assert all(right.tolist() == [True] for right in marked(["cow face"], ["guitar"]).values())
    right = marked(["cow face"], ["rocket", "guitar"])
    assert not right["second"][0] and right["top1"][0] and right["identity"][0] and not right["joint"][0]
    right = marked([scores.distractors(world, "cow face")[0], "cow face"], ["guitar"])
    assert right["second"][0] and right["top5"][0] and not right["identity"][0] and not right["joint"][0]
    # One subject drawn twice is not the other one as well.
    assert not marked(["cow face"], ["cow face"])["second"][0] and not marked(["guitar"], ["guitar"])["identity"][0]


def test_halves_show_each_subject_as_large_as_one_alone():
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 17:47, 1:31], picture[..., 17:47, 33:63] = 1, -1
    left, right = halves(picture)[0]
    for half, value in ((left, 1), (right, -1)):
        inside = (half[0] == value).nonzero()
        sides = inside.amax(0) - inside.amin(0)
        assert (48 <= sides).all() and (sides <= 56).all()
        assert (half[:, 32, 32] == value).all()


def test_diversity_is_the_mean_distance_of_pairs():
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert scores.diversity(vectors) == pytest.approx(2 / 3)
    assert scores.diversity(vectors[:2]) == pytest.approx(0)


def test_shipped_judges_are_small_and_licensed():
    assert "MIT License" in (FOLDER / "LICENSE").read_text()
    assert "emoji-64" in judge.available()
    assert all((FOLDER / f"{name}.safetensors").stat().st_size < 6e6 for name in judge.available())
    assert len({encoder for encoder, _ in JUDGES.values()}) == len({seed for _, seed in JUDGES.values()}) == len(JUDGES)


def test_shipped_judges_reach_the_ceilings(shipped):
    """All but the style of renders, of which docs/quality.md says that it falls short."""
    short = ceilings.short_of(shipped.ceilings)
    assert all(what.startswith("style of render") for what in short)
    assert shipped.ceilings["render"]["style"] > 0.975
    assert shipped.ceilings["held out"]["identity"] >= 0.9 and shipped.ceilings["targets"]["second"] >= 0.9


def test_shipped_judges_read_a_held_out_subject(shipped):
    seen = shipped.read([Image.open(path) for path in [*PHOTOS, TRUTH]])
    assert seen.style == ["render"] * 4 + ["line"]
    assert seen.background == ["white", "red", "green", "yellow", "blue"]
    assert [shipped.subjects[place] for place in seen.subject.argmax(1)] == [SUBJECT] * 5


def test_evaluate_tells_prompts_and_subjects_apart(shipped):
    name = next(name for name in judge.available() if judge.load(name).digest == shipped.digest)

    def text(prompt):
        return evaluate(TRUTH, prompt, encoder=name)["text_alignment"]

    true = text("a line drawing of a cow face on a blue background")
    wrong = ("a flat illustration of a cow face on a blue background", "a line drawing of a cow face on grass",
             "a line drawing of a teapot on a blue background", "a photo of a rocket in a night sky with stars")
    assert all(true > text(prompt) + 0.1 for prompt in wrong)
    noun = text("a line drawing of an animal on a blue background")
    assert noun > text("a line drawing of a car on a blue background")
    alike = evaluate(PHOTOS[0], references=PHOTOS[1:], encoder=name)["image_alignment"]
    assert alike > evaluate(TRUTH, references=PHOTOS[1:], encoder=name)["image_alignment"]


def test_pictures_of_other_sizes_and_arrays_are_read_alike(shipped):
    image = Image.open(TRUTH).convert("RGB")
    array = shipped.images(np.asarray(image)[None])
    torch.testing.assert_close(array, shipped.images([image]))
    large = shipped.images([image.resize((256, 256), Image.Resampling.BICUBIC)])
    assert (large @ array.T).item() > 0.95


def test_a_judge_that_is_not_there_is_named(tmp_path):
    assert judge.available(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="palp_fast.zoo.judge trains it"):
        judge.load("emoji-64", tmp_path)


def test_gates_ask_for_withheld_cells_class_nouns_and_held_out_names(world):
    nouns, withheld, held = gates.class_noun_cases(world), gates.withheld_cases(world), gates.held_out_cases(world)
    assert len(held) == 123 and len(withheld) == 2 * gates.WITHHELD and len(nouns) == 3 * len({
        subject.class_noun for subject in world.having("seen")})
    for case in withheld:
        lacks_style = world.named(case.subject).withheld_style == case.style
        assert lacks_style != ((case.style, case.background) in world.withheld_pairs)
    for case in nouns + held:
        assert world.allows(case.style, case.background)
        assert case.subject in case.caption


def test_gates_score_captions_by_style(world):
    reader = judge.load()
    cases = [check.Case("", "cow face", "render", "white"), check.Case("", "cow face", "render", "blue"),
             check.Case("", "cow face", "line", "blue"), check.Case("", "teapot", "flat", "blue")]
    pictures = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in (PHOTOS[0], PHOTOS[1], TRUTH, TRUTH)])
    found = gates.captions(reader, world, cases, pictures)
    assert found["render_background"] == 0.5 and found["render_style"] == found["line_top1"] == 1
    assert found["flat_style"] == found["flat_top1"] == 0 and found["flat_background"] == 1


def test_report_says_what_holds_and_what_was_not_measured():
    row = dict.fromkeys(scores.MARKS, 0.95) | {"pictures": 240}
    text = gates.report("emoji-64", dict.fromkeys(STYLES, row), {
        "background": 0.9, "line_style": 0.985, "flat_top1": 0.39, "held_out_top1": 0.02})
    assert "below its limit: style of line: 95.0% < 99%" in text
    assert "| line_style | >= 98% | 98.5% | ok |" in text and "| flat_top1 | >= 40% | 39.0% | not reached |" in text
    assert "| held_out_top1 | <= 3% | 2.0% | ok |" in text and "| background (pixels) |" in text
    assert "class_noun" in text.split("not measured: ")[1]
