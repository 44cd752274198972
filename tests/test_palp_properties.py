"""What a PALP step must do, however it was derived - and proof that these checks see the mistakes one could make.

A mutant is the library with one small function replaced by a wrong one; a check that it passes would be worthless.
"""

import contextlib
import dataclasses
import sys

import pytest
import tiny
import torch
from step import batch, check_trainer, lora_pairs, make_trainer, scatter, settings_for, timesteps, truth_of

from palp_fast import functional, methods, train

# So large a residual weight leaves nothing of the reconstruction loss: its share of the gradient is below 1e-6.
ALIGNMENT_ONLY = {"alpha": 7.5, "beta": 7.5, "residual_weight": 1e7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("sd"))


def check_alignment(folder, output_dir):
    """After 50 steps on one batch, reconstruction off, eps_hat has moved along r_0: <eps_hat - eps_hat_0, r_0> > 0.

    Both are measured by the stock parts of tests/truth.py. alpha = beta, so that swapped prompts give -r_0.
    """
    settings = settings_for(ALIGNMENT_ONLY)
    trainer = make_trainer(folder, output_dir, settings)
    latents, noise, _ = batch()
    t = timesteps()

    def measure():
        truth = truth_of(folder, trainer, settings, ["zorp"])
        with torch.no_grad():
            x_t = truth.signal(t) * latents.double() + truth.sigma(t) * noise.double()
            eps_hat = truth.eps(x_t, t, truth.encode("a photo of zorp"), student=True)
            x0_hat = (x_t - truth.sigma(t) * eps_hat) / truth.signal(t)
            return eps_hat, truth.residual(x0_hat, t, noise.double(), "a photo of zorp")

    eps_hat_0, r_0 = measure()
    parameters = [factor for pair in lora_pairs(trainer).values() for factor in pair] + list(trainer.token_rows())
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    for _ in range(50):
        trainer.gradients(latents, t, noise)
        optimizer.step()
    moved = measure()[0] - eps_hat_0
    cosine = torch.nn.functional.cosine_similarity(moved.flatten(), r_0.flatten(), dim=0).item()
    assert moved.norm() > 0
    assert cosine > 0, f"the prediction moved against the residual: cosine {cosine:.3f}"
    return cosine


def check_zero_residual(folder, output_dir):
    """r = 0 when y_c = y_P, alpha = beta and LoRA zero; and with LoRA not zero it is not: the student has the LoRA.

    An untrained token row is its class noun's, so that "a photo of zorp" is "a photo of cat" to the model.
    """
    settings = settings_for({"alpha": 7.5, "beta": 7.5, "clean_prompt": "a photo of cat"})
    trainer = make_trainer(folder, output_dir, settings, clean_prompt="a photo of cat")
    latents, noise, _ = batch()
    metrics = trainer.gradients(latents, timesteps(), noise)
    assert metrics["residual_norm"] < 1e-6, f"residual_norm {metrics['residual_norm']:.2e}"
    scatter(lora_pairs(trainer), [])
    metrics = trainer.gradients(latents, timesteps(), noise)
    assert metrics["residual_norm"] > 1e-2, "the LoRA does not reach the student's predictions"


def check_gradient(folder, output_dir):
    check_trainer(folder, output_dir, settings_for({}))


def test_alignment(folder, tmp_path):
    cosine = check_alignment(folder, tmp_path / "run")
    print(f"cosine of the movement and r_0: {cosine:.3f}")
    assert cosine > 0.3


def test_zero_residual(folder, tmp_path):
    check_zero_residual(folder, tmp_path / "run")


@pytest.mark.parametrize("change", [{"alpha": 8.5}, {"clean_prompt": "a sketch of cat"}])
def test_residual_is_not_zero_otherwise(folder, tmp_path, change):
    fields = {"alpha": 7.5, "beta": 7.5, "clean_prompt": "a photo of cat"} | change
    trainer = make_trainer(folder, tmp_path / "run", settings_for(fields), clean_prompt=fields["clean_prompt"])
    latents, noise, _ = batch()
    assert trainer.gradients(latents, timesteps(), noise)["residual_norm"] > 1e-3


def test_residual_weight_zero_is_dreambooth_bit_for_bit(folder, tmp_path):
    fields = {"token": "zorp", "steps": 4, "grad_accumulation": 2}
    palp = train(tiny.config(folder, tmp_path / "palp", method="palp", residual_weight=0.0, **fields))
    plain = train(tiny.config(folder, tmp_path / "dreambooth", method="dreambooth", **fields))
    other = train(tiny.config(folder, tmp_path / "other", method="palp", residual_weight=0.1, **fields))
    for name in ("lora", "lora_kohya"):
        assert getattr(palp, name).read_bytes() == getattr(plain, name).read_bytes()
        assert getattr(palp, name).read_bytes() != getattr(other, name).read_bytes()
    assert palp.embedding["zorp"].read_bytes() == plain.embedding["zorp"].read_bytes()


def flip_residual(monkeypatch):
    right = functional.score_residual

    def wrong(*args, residual_weight, **rest):
        return right(*args, residual_weight=-residual_weight, **rest)

    monkeypatch.setattr(functional, "score_residual", wrong)


def replace_passes(monkeypatch, change):
    right = methods.passes
    monkeypatch.setattr(methods, "passes", lambda cfg: [change(entry) for entry in right(cfg)])


def swap_prompts(monkeypatch):
    other = {"clean": "subject", "subject": "clean", "empty": "empty"}
    replace_passes(monkeypatch, lambda entry: dataclasses.replace(entry, prompt=other[entry.prompt]))


def student_without_lora(monkeypatch):
    replace_passes(monkeypatch, lambda entry: dataclasses.replace(entry, lora_scale=0.0))


class TorchWithoutNoGrad:
    """The torch module, in which no_grad does nothing."""

    def __getattr__(self, name):
        return contextlib.nullcontext if name == "no_grad" else getattr(torch, name)


def score_residual_by_autograd(constant):
    """score_residual as a formula, with r a constant or not."""

    def score_residual(
        pred, target, teacher_cond, teacher_uncond, student_cond, student_uncond, *, alpha, beta, residual_weight, **_
    ):
        teacher = teacher_uncond + alpha * (teacher_cond - teacher_uncond)
        r = teacher - student_uncond - beta * (student_cond - student_uncond)
        r = r.detach() if constant else r
        return ((pred - target).square() - residual_weight * r * pred).mean(), torch.ones(len(pred), 3)

    return score_residual


def gradient_into_step_3(monkeypatch):
    monkeypatch.setattr(functional, "score_residual", score_residual_by_autograd(constant=False))
    monkeypatch.setattr(sys.modules["palp_fast.train"], "torch", TorchWithoutNoGrad())


MUTANTS = [
    (check_gradient, flip_residual, "relative L2"),
    (check_gradient, swap_prompts, "relative L2"),
    (check_gradient, gradient_into_step_3, "relative L2"),
    (check_gradient, student_without_lora, "relative L2"),
    (check_alignment, flip_residual, "moved against the residual"),
    (check_alignment, swap_prompts, "moved against the residual"),
    (check_zero_residual, student_without_lora, "does not reach the student"),
]


@pytest.mark.parametrize("check, mutate, reason", MUTANTS)
def test_mutants_are_caught(folder, tmp_path, monkeypatch, check, mutate, reason):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=reason):
        check(folder, tmp_path / "run")


def test_the_mutant_of_step_3_is_wrong_in_its_gradient_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(functional, "score_residual", score_residual_by_autograd(constant=True))
    monkeypatch.setattr(sys.modules["palp_fast.train"], "torch", TorchWithoutNoGrad())
    check_gradient(folder, tmp_path / "run")
