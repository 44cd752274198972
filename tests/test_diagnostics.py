"""What a training shows of itself and its warning: on Gaussians whose every prediction is known, and in the trainer."""

import json
import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
from palp_fast import Trainer, functional, train
from palp_fast.diagnostics import BINS, Diagnostics
from palp_fast.metrics import Recorder
from safetensors.torch import load_file

STEPS, BATCH = 320, 16
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


class Step(dict):
    """A step's metrics as read, with samples [N, 5]."""

    def __init__(self, step, samples):
        super().__init__(step=step)
        self.details = {"samples": samples, "row_norms": torch.ones(1)}


def diagnostics(residual_weight=0.1, steps=STEPS, batch=BATCH):
    cfg = SimpleNamespace(
        residual_weight=residual_weight, batch_size=batch, grad_accumulation=1, steps=steps, learn_token=False)
    return Diagnostics(cfg, 1000, [], [])


@pytest.fixture(autouse=True)
def unheard():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gaussian_training(residual_weight):
    """PALP.md's toy: data of width 0.5 around (0, 2), a target prompt's around (2, 0), an unconditional around 0.

    Each number stands for 32 elements; the student is a mean that starts at 0 -> (diagnostics, the mean in the end).
    """
    generator = torch.Generator().manual_seed(0)
    subject, target = (torch.tensor(mean).double().repeat_interleave(32).view(1, 8, 8) for mean in ((0, 2), (2, 0)))
    nothing = torch.zeros_like(subject)
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer, found = torch.optim.Adam([mean], lr=0.05), diagnostics(residual_weight)
    for step in range(1, STEPS + 1):
        t = (torch.rand(BATCH, generator=generator) * 1000).long()
        a, s = (value[t].sqrt().view(-1, 1, 1, 1) for value in (ALPHA_BAR, 1 - ALPHA_BAR))
        noise, spread = torch.randn(2, BATCH, 1, 8, 8, generator=generator, dtype=torch.float64)

        def predict(x, around, a=a, s=s):
            return s * (x - a * around) / (a**2 * 0.25 + s**2)

        x_t, own = a * (subject + 0.5 * spread) + s * noise, mean.repeat_interleave(32).view(1, 8, 8)
        pred = predict(x_t, own)
        x_hat = x_t + s * (noise - pred.detach())
        loss, stats = functional.score_residual(
            pred, noise, predict(x_hat, target), predict(x_hat, nothing), predict(x_hat, own.detach()),
            predict(x_hat, nothing), alpha=15.0, beta=7.5, residual_weight=residual_weight, backend="reference")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.add(Step(step, torch.cat([t[:, None], stats, residual_weight * stats[:, 1:2]], dim=1)))
    return found, mean.detach()


@pytest.mark.parametrize("residual_weight", [1.0, 0.1, 0.01])
def test_gaussians_that_lose_their_subject_are_warned_of(residual_weight):
    found, mean = gaussian_training(residual_weight)
    lost = (mean - torch.tensor([0.0, 2.0])).norm().item() > 2.0
    assert lost == (residual_weight == 1.0), f"the toy rests at {mean.tolist()}"
    assert (found.warning is not None) == lost, found.warning
    if lost:
        assert "style rises while identity falls" in found.warning and "residual_weight (now 1)" in found.warning
        assert found.warning in found.table()
        balance = [own["balance"] for own in found.bins(found.sums[-5:].sum(0))]
        assert all(abs(value - 1) < 0.25 for value in balance), f"at rest, but the balance is {balance}"


def noisy_samples(generator, t, error=1.0, residual=1.0):
    """Samples of which all that is random is chance; the error falls with t by far more than it spreads."""
    spread = torch.exp(0.4 * torch.randn(len(t), 2, generator=generator, dtype=torch.float64))
    e, r = error * (1.1 - t / 1000) * spread[:, 0], residual * spread[:, 1]
    return torch.stack([t, e, r, (4 * e + 0.01 * r**2).sqrt(), 0.1 * r], dim=1)


def alone(seed, drift=0.0, rise=0.0, fall=0.3):
    """The warning of a made-up training: timesteps that drift, an error that rises, a residual that falls."""
    generator, found, steps = torch.Generator().manual_seed(seed), diagnostics(steps=32, batch=64), 32
    for step in range(1, steps + 1):
        done = step / steps
        t = (1000 * torch.rand(64, generator=generator, dtype=torch.float64) ** (1 + drift * done)).floor()
        found.add(Step(step, noisy_samples(generator, t, 1 + rise * done, 1 - fall * done)))
    return found.warning


def test_neither_chance_nor_another_draw_of_timesteps_is_a_rise():
    assert sum(alone(seed) is not None for seed in range(4)) == 0
    assert sum(alone(seed, drift=0.5) is not None for seed in range(4)) == 0, "smaller t, larger error: no rise"
    assert all(alone(seed, rise=0.6) for seed in range(2)), "a rise of 60 % was not seen"
    assert not any(alone(seed, rise=0.6, fall=-0.3) for seed in range(2)), "the residual rises: no style was gained"


def test_there_is_one_warning():
    found, generator, heard = diagnostics(steps=32, batch=64), torch.Generator().manual_seed(0), []
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for step in range(1, 33):
            t = torch.arange(64.0, dtype=torch.float64) * 15
            line = found.add(Step(step, noisy_samples(generator, t, 1 + step / 16, 1 - step / 64)))
            heard.append(line["diagnostics"]["warning"])
    assert len(shown) == 1 and [text for text in heard if text] == [found.warning]


def test_bins_are_what_their_names_say():
    """Ratios of two samples in the last bin, from the tensors themselves; one that is not finite is left out."""
    generator = torch.Generator().manual_seed(0)
    pred, target, prediction = (torch.randn(2, 4, 8, 8, generator=generator).double() for _ in range(3))
    scale = torch.tensor([0.5, 2.0]).double()
    _, stats = functional.score_combination(
        pred, target, [prediction], torch.ones(1, 2).double(), residual_weight=0.3, residual_scale=scale)
    samples = torch.cat([torch.tensor([[875.0], [999.0]]), stats, (0.3 * scale * stats[:, 1])[:, None]], dim=1)
    found = diagnostics()
    found.add(Step(1, torch.cat([samples, torch.tensor([[3.0, float("nan"), 1, 1, 1]])])))
    (own,) = found.bins()
    error, pull = pred - target, 0.3 * scale[:, None, None, None] * prediction
    assert own["t"] == [875, 999] and own["samples"] == 2
    assert own["rms_error"] == pytest.approx(error.square().mean().sqrt().item())
    assert own["rms_residual"] == pytest.approx(prediction.square().mean().sqrt().item())
    assert own["ratio"] == pytest.approx((prediction.square().mean() / error.square().mean()).sqrt().item())
    assert own["update"] == pytest.approx((pull.square().mean() / error.square().mean() / 4).sqrt().item())
    assert own["balance"] == pytest.approx(((2 * error * pull).mean() / pull.square().mean()).item())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("sdxl"), "sdxl")


def lines(path):
    return [json.loads(line) | {"seconds": 0} for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_trainers_lines_and_a_resumed_run(model, tmp_path, capsys):
    """The checkpoint is in the midst of a window; values that are read later are the same."""
    config = tiny.config(model, tmp_path / "whole", batch_size=16, steps=8, checkpoint_every=2, token_vectors=2)
    result = train(config)
    assert "rms(error)" in capsys.readouterr().out
    whole = lines(tmp_path / "whole")
    assert [line["step"] for line in whole if "diagnostics" in line] == [4, 8]
    found = whole[-1]["diagnostics"]
    assert found["steps"] == [5, 8] and len(found["bins"]) == BINS and found["warning"] is None
    assert sum(own["samples"] for own in found["bins"]) == 64
    error = sum(own["samples"] * own["rms_error"] ** 2 for own in found["bins"]) / 64
    assert error == pytest.approx(sum(line["rec_loss"] for line in whole[4:]) / 4, rel=1e-5)

    trainer = Trainer(config.replace(output_dir=str(tmp_path / "cut")))
    trainer.recorder = Recorder("cpu", 3)
    for metrics in trainer:
        if metrics["step"] == 7:
            break
    resumed = Trainer(config.replace(output_dir=str(tmp_path / "cut"), resume="must"))
    assert resumed.step == 6
    list(resumed)
    assert lines(tmp_path / "cut") == whole

    rows, norms = load_file(result.embedding["my_cat"]), found["token_norm"]
    assert sum(map(sum, norms.values())) / 4 == pytest.approx(whole[-1]["token_norm"], rel=1e-6)
    after = resumed.diagnostics.by_word(resumed._row_norms())
    for number, name in enumerate(("clip_l", "clip_g")):
        saved = rows[name].float().norm(dim=1).tolist()
        assert [after[word][number] for word in ("my_cat", "my_cat_1")] == pytest.approx(saved, rel=1e-3)
        assert [norms[word][number] for word in ("my_cat", "my_cat_1")] == pytest.approx(saved, rel=0.2)
    tables = [encoder.get_input_embeddings().weight for encoder in resumed.components.text_encoders]
    assert found["vocabulary_norm"] == pytest.approx([table.norm(dim=1).median().item() for table in tables])


def test_dreambooth_has_token_norms_alone(model, tmp_path, capsys):
    train(tiny.config(model, tmp_path / "run", batch_size=32, steps=2, method="dreambooth"))
    (found,) = [line["diagnostics"] for line in lines(tmp_path / "run") if "diagnostics" in line]
    assert found.keys() == {"steps", "token_norm", "vocabulary_norm"}
    assert "rms(error)" not in capsys.readouterr().out
