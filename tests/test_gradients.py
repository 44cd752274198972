"""LoRA and token gradients of one PALP step equal full autograd through x0_hat (tests/truth.py), method by method.

Both the library's Trainer and the plain diffusers + peft baseline are held to it.
"""

import dataclasses
import itertools

import pytest
import tiny
import torch
from bench.baselines import plain, tuned
from step import (
    RANK,
    WORDS,
    assert_equal_gradients,
    batch,
    by_encoder,
    call_options,
    check_trainer,
    lora_pairs,
    make_trainer,
    scatter,
    settings_for,
    timesteps,
    truth_of,
)
from truth import Truth

# name: (kind of model, settings, which of the second timestep and noise differ)
CASES = {
    "palp": ("sd", {}, ""),
    "palp, other noise": ("sd", {}, "noise"),
    "palp, other timestep": ("sd", {}, "timestep"),
    "palp, other noise and timestep": ("sd", {}, "noise timestep"),
    "palp, not rescaled": ("sd", {"rescale": False}, ""),
    "palp, not rescaled, all other": ("sd", {"rescale": False}, "noise timestep"),
    "palp, beta 1": ("sd", {"alpha": 7.5, "beta": 1.0}, ""),
    "palp, beta 0": ("sd", {"beta": 0.0}, ""),
    "palp, alpha 1": ("sd", {"alpha": 1.0}, ""),
    "palp, alpha and beta 1": ("sd", {"alpha": 1.0, "beta": 1.0}, "noise"),
    "palp, lora_alpha != rank": ("sd", {"lora_alpha": 1.5}, ""),
    "dreambooth": ("sd", {"method": "dreambooth"}, ""),
    "sds": ("sd", {"method": "sds"}, ""),
    "sds, all other": ("sd", {"method": "sds", "rescale": False}, "noise timestep"),
    "nfsd": ("sd", {"method": "nfsd", "alpha": 7.5, "rescale": False}, ""),
    "nfsd, rescaled, all other": ("sd", {"method": "nfsd", "alpha": 7.5, "rescale": True}, "noise timestep"),
    "v, palp": ("sd_v", {}, ""),
    "v, palp, all other": ("sd_v", {}, "noise timestep"),
    "v, palp, not rescaled, all other": ("sd_v", {"rescale": False}, "noise timestep"),
    "v, palp, eps": ("sd_v", {"loss_space": "eps"}, ""),
    "v, palp, eps, all other": ("sd_v", {"loss_space": "eps"}, "noise timestep"),
    "v, palp, eps, not rescaled": ("sd_v", {"loss_space": "eps", "rescale": False}, "timestep"),
    "v, dreambooth": ("sd_v", {"method": "dreambooth"}, ""),
    "v, dreambooth, eps": ("sd_v", {"method": "dreambooth", "loss_space": "eps"}, ""),
    "v, sds, all other": ("sd_v", {"method": "sds"}, "noise timestep"),
    "v, nfsd, all other": ("sd_v", {"method": "nfsd", "alpha": 7.5, "rescale": False}, "noise timestep"),
    "v, nfsd, eps": ("sd_v", {"method": "nfsd", "alpha": 7.5, "rescale": False, "loss_space": "eps"}, ""),
    "sdxl, palp, all other": ("sdxl", {}, "noise timestep"),
    "sdxl, nfsd": ("sdxl", {"method": "nfsd", "alpha": 7.5, "rescale": False}, ""),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny.model_folder(tmp_path_factory.mktemp(kind), kind) for kind in tiny.KINDS}


@pytest.mark.parametrize("name", CASES)
def test_trainer_equals_autograd(folders, tmp_path, name):
    kind, chosen, other = CASES[name]
    check_trainer(folders[kind], tmp_path / "run", settings_for(chosen), other=other)


@pytest.mark.parametrize("name", ["palp", "v, palp, all other", "sdxl, nfsd"])
def test_diffusers_own_modules_equal_autograd(folders, tmp_path, name):
    kind, chosen, other = CASES[name]
    check_trainer(folders[kind], tmp_path / "run", settings_for(chosen), other=other, lean=False)


@pytest.mark.parametrize("kind, subject", [("sd", 0), ("sd", 1), ("sd_v", 1)])
def test_two_subjects(folders, tmp_path, kind, subject):
    _, rows = check_trainer(folders[kind], tmp_path / "run", settings_for({}, subjects=2), subject=subject)
    assert rows[0][1 - subject].norm() == 0, "the other subject's row has a gradient"


@pytest.mark.parametrize("kind, lean", [("sd", None), ("sd", False), ("sdxl", None)])
def test_a_drawn_batch(folders, tmp_path, kind, lean):
    """As training draws it: subjects mixed, each with its own prompt, samples weighed, other noise and timesteps."""
    settings = settings_for({"rescale": False}, subjects=2)
    other = {"same_noise": False, "same_timestep": False, "timesteps": "uniform"}
    trainer = make_trainer(folders[kind], tmp_path / "run", settings, lean=lean, batch_size=3, **other)
    scatter(lora_pairs(trainer), trainer.token_rows())
    draws = (trainer.draws.batch(step, 0) for step in itertools.count())
    drawn = next(each for each in draws if set(each.subjects) == {0, 1} and each.t.max() < 800)
    weights = [0.5, 2.0, 1.25]
    drawn = dataclasses.replace(drawn, sample_weight=torch.tensor(weights))
    trainer.update.zero()
    trainer.update.backward(trainer._loss(drawn)[0])
    found = {name: (a.grad, b.grad) for name, (a, b) in lora_pairs(trainer).items()}
    truth, sums = truth_of(folders[kind], trainer, settings, list(WORDS)), None
    for i, (subject, weight) in enumerate(zip(drawn.subjects, weights)):
        latents, t, noise, t_new, noise_new = (
            getattr(drawn, name)[i : i + 1] for name in ("latents", "t", "noise", "t_new", "noise_new"))
        lora, rows = truth.gradients(latents, t, noise, subject=subject, t_new=t_new, noise_new=noise_new)
        own = [weight / 3 * grad for grad in (*(grad for pair in lora.values() for grad in pair), *rows)]
        sums = own if sums is None else [a + b for a, b in zip(sums, own)]
    wanted = {name: (sums[2 * i], sums[2 * i + 1]) for i, name in enumerate(lora)}
    assert_equal_gradients((found, by_encoder(trainer, lambda row: row.grad)), (wanted, sums[2 * len(wanted) :]))


@pytest.mark.parametrize(
    "overrides", [{"lora_targets": "cross_kv"}, {"lora_targets": "none"}, {"memory": "low"}, {"memory": "balanced"},
                  {"token_vectors": 3}]
)
def test_trainer_options(folders, tmp_path, overrides):
    check_trainer(folders["sd"], tmp_path / "run", settings_for({}), size=1, **overrides)


def test_the_cases_differ(folders):
    """Every case has a gradient of its own, by far more than the tolerance: mixing up two options would be seen."""
    flat, started = {}, {}
    latents, noise, noise_new = batch()
    for kind, folder in folders.items():
        model, pairs = plain_model(folder, settings_for({}), 1)
        tables = [table.detach()[-1:] for table in model.token_tables]
        scatter(pairs, tables)
        started[kind] = pairs, tables
    for name, (kind, chosen, other) in CASES.items():
        (pairs, tables), settings = started[kind], settings_for(chosen)
        truth = Truth(folders[kind], ["zorp"], pairs, tables, settings)
        lora, _ = truth.gradients(latents, timesteps(), noise, **call_options(other, noise_new))
        flat[name] = torch.cat([grad.flatten() for pair in lora.values() for grad in pair])
    for one, other in itertools.combinations(CASES, 2):
        if CASES[one][0] == CASES[other][0]:
            assert (flat[one] - flat[other]).norm() > 0.02 * flat[one].norm(), f"{one!r} and {other!r} are alike"


def plain_model(folder, settings, subjects):
    model = plain.load(
        folder,
        tokens=dict(list(WORDS.items())[:subjects]),
        subject_prompts=settings.subject_prompts,
        clean_prompt=settings.clean_prompt,
        negative_prompt=settings.negative_prompt,
        rank=RANK,
        lora_alpha=settings.lora_alpha,
    )
    return model, model.lora_pairs()


def plain_options(settings):
    names = [field.name for field in dataclasses.fields(plain.Options)]
    return plain.Options(**{name: getattr(settings, name) for name in names})


@pytest.mark.parametrize("name", CASES)
def test_plain_baseline_equals_autograd(folders, name):
    kind, chosen, other = CASES[name]
    check_plain(folders[kind], settings_for(chosen), other)


@pytest.mark.parametrize("name", ["palp", "palp, beta 1", "nfsd, rescaled, all other", "v, palp, all other",
                                  "sdxl, palp, all other"])
def test_tuned_baseline_equals_autograd(folders, name):
    """Both predictions of a pair in one batch, channels-last; what torch.compile makes of it is not tried here."""
    kind, chosen, other = CASES[name]
    check_plain(folders[kind], settings_for(chosen), other, mode="eager")


def test_plain_baseline_with_two_subjects(folders):
    check_plain(folders["sd"], settings_for({}, subjects=2), "", subjects=2, subject=1)


def check_plain(folder, settings, other, subjects=1, subject=0, mode=None):
    model, pairs = plain_model(folder, settings, subjects)
    if mode is not None:
        tuned.tune(model, mode)
    tables = [table.detach()[-subjects:] for table in model.token_tables]
    scatter(pairs, tables)
    latents, noise, noise_new = batch()
    arguments, options = (latents, timesteps(), noise), call_options(other, noise_new)
    truth = Truth(folder, list(WORDS)[:subjects], pairs, tables, settings)
    expected = truth.gradients(*arguments, subject=subject, **options)
    plain.plain_gradients(model, *arguments, plain_options(settings), subject=subject, **options)
    lora = {path: (a.grad, b.grad) for path, (a, b) in pairs.items()}
    for table in model.token_tables:
        assert table.grad[:-subjects].abs().max() == 0, "the mask let a gradient through to the model's own words"
    assert_equal_gradients((lora, [table.grad[-subjects:] for table in model.token_tables]), expected)


def test_plain_step_trains_the_adapter_and_the_new_row_alone(folders):
    model, pairs = plain_model(folders["sd"], settings_for({}), 1)
    before = [p.detach().clone() for p in model.pipeline.text_encoder.parameters()]
    lora_before = [b.detach().clone() for _, b in pairs.values()]
    optimizer = plain.make_optimizer(model)
    torch.manual_seed(0)
    for _ in range(2):
        plain.plain_step(model, optimizer, batch()[0], plain.Options())
    for old, new in zip(before, model.pipeline.text_encoder.parameters()):
        if new is model.token_tables[0]:
            assert torch.equal(old[:-1], new[:-1]) and not torch.equal(old[-1], new[-1])
        else:
            assert torch.equal(old, new)
    assert all(not torch.equal(old, b) for old, (_, b) in zip(lora_before, pairs.values()))
