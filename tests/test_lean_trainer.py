"""The Trainer on the lean UNet: what it asks of it, what it falls back to, and g in 16 bits."""

import sys

import pytest
import tiny
import torch
from close import relative
from diffusers import UNet2DConditionModel
from palp_fast import ConfigError, Trainer, functional, models, predict
from palp_fast.nn import UnsupportedUNet
from palp_fast.nn.lean_attention import LeanAttention
from palp_fast.nn.lean_model import LeanUNet
from step import batch, lora_pairs, make_trainer, scatter, settings_for, timesteps

DRAWS = 4  # one draw's rounding errors are luck


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny.model_folder(tmp_path_factory.mktemp(kind), kind) for kind in tiny.KINDS}


def one_step(trainer):
    latents, noise, _ = batch()
    return trainer.gradients(latents, timesteps(), noise)


@pytest.mark.parametrize(("options", "factors"), [
    ({}, [0.0, 0.0, 1.0, 1.0]), ({"beta": 1.0}, [0.0, 0.0, 1.0]), ({"alpha": 1.0}, [0.0, 1.0, 1.0]),
    ({"alpha": 1.0, "beta": 1.0}, [0.0, 1.0]), ({"method": "sds"}, [0.0] * 2), ({"method": "nfsd"}, [0.0] * 3),
    ({"method": "dreambooth"}, None), ({"residual_weight": 0.0}, None),
])
def test_the_no_grad_predictions_are_one_pass_over_the_samples(folders, tmp_path, options, factors):
    trainer = Trainer(tiny.config(folders["sd"], tmp_path / "run", **options))
    calls, forward = [], trainer.unet.forward

    def spy(sample, *args, rows, **kwargs):
        calls.append((torch.is_grad_enabled(), len(sample), rows))
        return forward(sample, *args, rows=rows, **kwargs)

    trainer.unet.forward = spy
    one_step(trainer)
    assert calls[0][:2] == (True, 3) and calls[0][2].scale(3) == 1.0
    if factors is None:
        assert len(calls) == 1
        return
    (with_grad, size, rows), = calls[1:]
    assert (with_grad, size, rows.count) == (False, 3, 3 * len(factors))
    scale = rows.scale(rows.count)
    found = [scale] * rows.count if isinstance(scale, float) else scale.tolist()
    assert found == [factor for factor in factors for _ in range(3)]


def test_keys_and_values_of_the_teacher_are_made_once(folders, tmp_path, monkeypatch):
    made, right = [], LeanAttention.keys_values

    def spy(self, context, lora_scale):
        made.append((len(context), lora_scale))
        return right(self, context, lora_scale)

    monkeypatch.setattr(LeanAttention, "keys_values", spy)
    trainer = Trainer(tiny.config(folders["sd"], tmp_path / "run"))
    layers = sum(isinstance(m, LeanAttention) and m.is_cross_attention for m in trainer.unet.modules())
    assert made == [(2, 0.0)] * layers
    for _ in range(2):
        made.clear()
        one_step(trainer)
        assert made == [(2, 1.0)] * layers, "the student's empty and subject prompts alone"


def gradients_of(trainer):
    """Of one step, all trained parameters as one vector."""
    one_step(trainer)
    return torch.cat([parameter.grad.flatten() for parameter in trainer.update.named.values()])


@pytest.mark.parametrize("at_once", [2, 1])
@pytest.mark.parametrize("own", [True, False])
def test_the_no_grad_pass_is_split_by_the_estimate(folders, tmp_path, monkeypatch, at_once, own):
    """The step of all at once, for a model that is its own teacher and for one with another."""
    options = {} if own else {"teacher": str(folders["sd_v"])}
    trainers = [Trainer(tiny.config(folders["sd"], tmp_path / "run", **options))]
    right = predict.adapted
    monkeypatch.setattr(predict, "adapted", lambda *given: right(*given[:4], at_once))
    trainers.append(Trainer(tiny.config(folders["sd"], tmp_path / "run", **options)))
    for trainer in trainers:
        scatter(lora_pairs(trainer), trainer.token_rows())
    calls = []
    trainers[1].unet.register_forward_pre_hook(lambda *given: calls.append(given), with_kwargs=True)
    assert relative(*map(gradients_of, reversed(trainers))) < 1e-5
    assert len(calls) == 1 + (4 if own else 2) // at_once


def test_the_no_grad_pass_is_split_where_memory_runs_out(folders, tmp_path, capsys):
    trainer = Trainer(tiny.config(folders["sdxl"], tmp_path / "run"))
    scatter(lora_pairs(trainer), trainer.token_rows())
    together, forward, sizes = gradients_of(trainer), trainer.unet.forward, []

    def small_card(*args, rows, **kwargs):
        sizes.append(rows.count)
        if rows.count > 3:
            raise torch.OutOfMemoryError("a small card")
        return forward(*args, rows=rows, **kwargs)

    trainer.unet.forward = small_card
    for expected in ([3, 12, 6, 3, 3, 3, 3], [3, 3, 3, 3, 3]):
        sizes.clear()
        assert relative(gradients_of(trainer), together) < 1e-5
        assert sizes == expected
    assert "1 of 4 predictions at once" in capsys.readouterr().out
    assert Trainer(tiny.config(folders["sd"], tmp_path / "low", memory="low")).predictions.at_once == 1


def test_an_unknown_architecture_trains_by_diffusers_own_modules(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "_unet", lambda sdxl: UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), act_fn="mish"))
    folder = tiny.model_folder(tmp_path / "model")
    trainer = Trainer(tiny.config(folder, tmp_path / "run", steps=1))
    shown = capsys.readouterr().out
    assert "slower" in shown and "it is a Mish" in shown and not isinstance(trainer.unet, LeanUNet)
    assert len(list(trainer)) == 1
    with pytest.raises(UnsupportedUNet, match="it is a Mish"):
        Trainer(tiny.config(folder, tmp_path / "other"), lean=True)
    with pytest.raises(ConfigError, match="memory: 'balanced' needs the lean UNet"):
        Trainer(tiny.config(folder, tmp_path / "other", memory="balanced"))


def test_lean_or_not_is_asked_for(folders, tmp_path):
    """Same factors to start with, same names."""
    trainers = [Trainer(tiny.config(folders["sd"], tmp_path / "run"), lean=lean) for lean in (None, False)]
    assert [isinstance(trainer.unet, LeanUNet) for trainer in trainers] == [True, False]
    pairs = [lora_pairs(trainer) for trainer in trainers]
    assert list(pairs[0]) == list(pairs[1])
    assert all(torch.equal(a, pairs[1][name][0]) and not b.any() for name, (a, b) in pairs[0].items())


def residual_gradients(trainer, monkeypatch):
    """g and gradients of DRAWS steps, each with other latents and noise, with the factors of `scatter`."""
    found, right = {"g": [], "LoRA": [], "token": []}, functional.score_residual

    def spy(pred, *args, **kwargs):
        loss, stats = right(pred, *args, **kwargs)
        found["g"].append(torch.autograd.grad(loss, pred, retain_graph=True)[0])
        return loss, stats

    scatter(lora_pairs(trainer), trainer.token_rows())
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["palp_fast.train"].functional, "score_residual", spy)
            trainer.gradients(latents, timesteps(), noise)
        found["LoRA"] += [factor.grad.flatten().clone() for pair in lora_pairs(trainer).values() for factor in pair]
        found["token"] += [row.grad.flatten().clone() for row in trainer.token_rows()]
    return {name: torch.cat(parts) for name, parts in found.items()}


def round_weights(monkeypatch, dtype):
    """Models loaded in fp32 hold weights that `dtype` can hold, as the 16-bit models beside them do."""
    right = models.load_components

    def load(reference, **options):
        components = right(reference, **options)
        for module in (components.unet, *components.text_encoders):
            for name, parameter in module.named_parameters():
                if not name.startswith("conv_out."):
                    parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        return components

    monkeypatch.setattr(models, "load_components", load)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["sd", "sd_v", "sdxl"])
def test_the_residual_gradient_in_16_bits_is_as_good_as_diffusers(folders, tmp_path, monkeypatch, kind, dtype):
    round_weights(monkeypatch, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    found = {}
    for name, lean, base in (("truth", False, "fp32"), ("peer", False, dtype), ("lean", True, dtype)):
        trainer = make_trainer(folders[kind], tmp_path / name, settings_for({}), lean=lean, base_dtype=base)
        found[name] = residual_gradients(trainer, monkeypatch)
    for name, expected in found["truth"].items():
        errors = {side: relative(found[side][name], expected) for side in ("peer", "lean")}
        assert errors["lean"] <= 2 * errors["peer"] + 1e-3, f"{name}: {errors}"
