"""The Trainer: its options, its files, its draws, and what it refuses."""

import json
import logging

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from palp_fast import ConfigError, DataError, Subject, Trainer, TrainingDiverged, checkpoint, train
from palp_fast.export import load_lora
from palp_fast.metrics import Recorder
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny.model_folder(root / kind, kind) for kind in tiny.KINDS}


def gradients_of(trainer, **kwargs):
    """Gradients of one fixed batch -> {name: gradient}, metrics."""
    generator = torch.Generator().manual_seed(5)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    metrics = trainer.gradients(latents, torch.tensor([20, 400, 950]), noise, **kwargs)
    return {name: p.grad.clone() for name, p in trainer.update.named.items()}, metrics


def randomise(trainer, scale=0.05):
    """Puts random values into every lora_b, so that student and teacher differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, _, lora_b in trainer.named_lora():
            lora_b.copy_(scale * torch.randn(lora_b.shape, generator=generator))


def two_subjects(**kwargs):
    return {
        "subjects": [
            Subject(tiny.photos(3, seed=1), "cat", "[V1]", token="mycat", **kwargs),
            Subject(tiny.photos(1, seed=2), "dog", "[V2]", token="mydog", **kwargs),
        ],
        "prompt": "[V1] and [V2]",
    }


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("method", ["palp", "sds", "nfsd", "dreambooth"])
def test_every_method_trains_and_writes_its_files(models, tmp_path, kind, method, capsys):
    result = train(tiny.config(models[kind], tmp_path / "run", method=method, steps=2))
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] == list(range(1, result.steps + 1))
    expected = {"step", "loss", "rec_loss", "residual_norm", "timestep", "lr", "grad_norm", "token_norm", "seconds"}
    assert all(set(line) == expected for line in lines)
    assert all((line["residual_norm"] > 0) == (method != "dreambooth") for line in lines)
    layers, alpha = load_lora(result.lora)
    kohya, kohya_alpha = load_lora(result.lora_kohya)
    assert alpha == kohya_alpha == 4 and kohya.keys() == layers.keys()
    assert all(lora_b.abs().max() > 0 for _, lora_b in layers.values())
    assert list(result.embedding) == ["my_cat"] and result.embedding["my_cat"].stem == "my_cat"
    assert len(load_file(result.embedding["my_cat"])) == (2 if kind == "sdxl" else 1)
    assert result.checkpoint.is_dir() and result.seconds > 0 and result.peak_memory_bytes > 1e7
    shown = capsys.readouterr().out
    assert "'a photo of my_cat'" in shown and "'a sketch of my_cat'" in shown and "'a sketch of a cat'" in shown
    assert ("negative" in shown) == (method == "nfsd")


@pytest.mark.parametrize("options", [
    {"alpha": 1.0}, {"beta": 1.0}, {"same_noise": False}, {"same_timestep": False}, {"rescale": False},
    {"timesteps": "uniform"}, {"timesteps": "adaptive"}, {"lora_targets": "cross_kv"}, {"lora_targets": "none"},
    {"learn_token": False}, {"token_vectors": 2}, {"token_norm": "initial"}, {"optimizer": "adamw"},
    {"optimizer": "lion8bit"}, {"lr_schedule": "cosine"}, {"grad_accumulation": 2}, {"memory": "low"},
    {"memory": "balanced"}, {"base_dtype": "bf16"}, {"base_dtype": "fp16"}, {"base_dtype": "int8"},
    {"base_dtype": "nf4", "sample_every": 1, "learn_token": False}, {"loss_space": "eps"},
    {"preset": "paper", "batch_size": 16},
    two_subjects(), {**two_subjects(), "subject_sampling": "subject"},
], ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items() if k in ("alpha", "beta") or len(str(v)) < 12))
def test_options_run(models, tmp_path, options):
    result = train(tiny.config(models["sd_v"], tmp_path / "run", steps=2, **options))
    assert (result.lora is None) == (options.get("lora_targets") == "none")
    assert len(result.metrics.read_text().splitlines()) == 2


def test_zero_residual_weight_is_dreambooth_bit_for_bit(models, tmp_path):
    files = []
    for name, options in (("a", {"method": "dreambooth"}), ("b", {"method": "palp", "residual_weight": 0.0})):
        result = train(tiny.config(models["sd"], tmp_path / name, **options))
        files.append([path.read_bytes() for path in (result.lora, result.lora_kohya, result.embedding["my_cat"])])
    assert files[0] == files[1]


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [0.0, 0.0, 1.0, 1.0]), ({"beta": 1.0}, [0.0, 0.0, 1.0]), ({"alpha": 1.0}, [0.0, 1.0, 1.0]),
    ({"alpha": 1.0, "beta": 1.0}, [0.0, 1.0]), ({"method": "sds"}, 0.0), ({"method": "nfsd"}, 0.0),
    ({"method": "dreambooth"}, None), ({"residual_weight": 0.0}, None),
])
def test_the_no_grad_predictions_are_one_batch_without_those_of_factor_zero(models, tmp_path, options, expected):
    """Of diffusers' own modules; tests/test_lean_trainer.py has the lean UNet's."""
    trainer = Trainer(tiny.config(models["sd"], tmp_path / "run", **options), lean=False)
    calls, forward = [], trainer.unet.forward
    scale = trainer.unet.palp_lora_scale

    def spy(sample, *args, **kwargs):
        calls.append((len(sample), torch.is_grad_enabled(), scale.value))
        return forward(sample, *args, **kwargs)

    trainer.unet.forward = spy
    gradients_of(trainer)
    assert calls[0] == (3, True, 1.0)
    if expected is None:
        assert len(calls) == 1
        return
    (size, with_grad, lora_scale), = calls[1:]
    assert not with_grad
    if isinstance(expected, float):
        assert lora_scale == expected and size == 3 * (3 if options["method"] == "nfsd" else 2)
    else:
        assert lora_scale.tolist() == [s for s in expected for _ in range(3)] and size == 3 * len(expected)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_lora_scale_per_sample_is_teacher_and_student(models, tmp_path, kind, lean):
    trainer = Trainer(tiny.config(models[kind], tmp_path / "run"), lean=lean)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([30, 700])
    condition = trainer.conditioning().clean.rows([0, 0])
    with torch.no_grad():
        base = trainer.predict(x, t, condition)
        randomise(trainer, 0.3)
        student = trainer.predict(x, t, condition)
        mixed = trainer.predict(x, t, condition, torch.tensor([0.0, 1.0]))
        teacher = trainer.predict(x, t, condition, 0.0)
    torch.testing.assert_close(teacher, base)
    torch.testing.assert_close(mixed, torch.stack([base[0], student[1]]))
    assert (student - base).abs().max() > 1e-2
    assert lean or trainer.unet.palp_lora_scale.value == 1.0


@pytest.mark.parametrize("lean", [True, False])
def test_recomputed_activations_give_the_same_gradients(models, tmp_path, lean):
    results = []
    for memory in ("fast", "low"):
        trainer = Trainer(tiny.config(models["sd"], tmp_path / memory, memory=memory), lean=lean)
        randomise(trainer)
        results.append(gradients_of(trainer)[0])
    assert trainer.unet.is_gradient_checkpointing
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lean", [True, False])
def test_recomputation_keeps_the_lora_scale_of_its_pass(models, tmp_path, lean):
    trainer = Trainer(tiny.config(models["sd"], tmp_path / "run", memory="low"), lean=lean)
    randomise(trainer, 0.3)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([30, 700])
    condition, found = trainer.conditioning().clean.rows([0, 0]), []
    for checkpointing in (True, False):
        if not checkpointing:
            trainer.unet.disable_gradient_checkpointing()
        trainer.update.zero()
        out = trainer.predict(x, t, condition, torch.tensor([0.0, 0.5]))
        trainer.predict(x, t, condition)
        out.square().mean().backward()
        found.append([lora_b.grad for _, _, lora_b in trainer.named_lora()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_gradients_start_from_zero_and_step_nothing(models, tmp_path):
    trainer = Trainer(tiny.config(models["sd"], tmp_path / "run", **two_subjects()))
    randomise(trainer)
    before = {name: p.detach().clone() for name, p in trainer.update.named.items()}
    first, metrics = gradients_of(trainer, subject=1)
    second, again = gradients_of(trainer, subject=1)
    assert metrics == again and all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(p, before[name]) for name, p in trainer.update.named.items())
    mycat, mydog = trainer.token_rows()
    assert mycat.grad.abs().max() == 0 and mydog.grad.abs().max() > 0
    assert not (tmp_path / "run").exists()


def test_fp16_gradients_carry_no_loss_scale(models, tmp_path):
    norms = {}
    for dtype in ("fp32", "fp16"):
        trainer = Trainer(tiny.config(models["sd"], tmp_path / dtype, base_dtype=dtype))
        norms[dtype] = gradients_of(trainer)[1]["grad_norm"]
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in trainer.update.named.values())
    assert trainer.unet.conv_out.weight.dtype == torch.float32 and trainer.components.dtype == torch.float16


def test_photos_are_drawn_by_image_or_by_subject(models, tmp_path):
    for sampling, share in (("image", 0.25), ("subject", 0.5)):
        options = two_subjects() | {"subject_sampling": sampling, "batch_size": 100}
        draws = Trainer(tiny.config(models["sd"], tmp_path / sampling, **options)).draws
        photos, subjects = (torch.cat(values) for values in zip(*(draws.photos(step, 0) for step in range(20))))
        assert ((photos == 3) == (subjects == 1)).all() and set(photos.tolist()) == {0, 1, 2, 3}
        assert (subjects == 1).float().mean() == pytest.approx(share, abs=0.04)
        assert torch.equal(draws.photos(7, 50)[0][:50], draws.photos(7, 0)[0][50:])


def test_draws_do_not_depend_on_how_samples_are_split(models, tmp_path):
    options = {"timesteps": "uniform", "same_noise": False, "same_timestep": False}
    config = tiny.config(models["sd"], tmp_path / "a", batch_size=4, **options)
    whole = Trainer(config).draws.batch(3, 0)
    draws = Trainer(config.replace(batch_size=2, grad_accumulation=2, output_dir=str(tmp_path / "b"))).draws
    for name in ("latents", "x_t", "noise", "t", "noise_new", "t_new"):
        parts = torch.cat([getattr(draws.batch(3, offset), name) for offset in (0, 2)])
        assert torch.equal(parts, getattr(whole, name)), name
    assert not torch.equal(whole.noise, whole.noise_new) and not torch.equal(whole.t, whole.t_new)


def test_accumulation_is_the_mean_gradient(models, tmp_path):
    config = tiny.config(models["sd"], tmp_path / "a", batch_size=4, timesteps="uniform", optimizer="adamw", steps=1)
    results = [
        train(config), train(config.replace(batch_size=1, grad_accumulation=4, output_dir=str(tmp_path / "b")))]
    metrics = [json.loads(result.metrics.read_text()) for result in results]
    for name in ("loss", "rec_loss", "residual_norm", "grad_norm", "timestep"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4), name


def test_token_rows_start_at_the_class_noun_and_keep_their_norm_when_asked(models, tmp_path):
    trainer = Trainer(tiny.config(models["sdxl"], tmp_path / "run", token_vectors=2, token_norm="initial"))
    table = trainer.components.text_encoders[1].get_input_embeddings().weight
    noun = trainer.components.tokenizers[1]("cat", add_special_tokens=False).input_ids
    row = trainer.token_rows()[1]
    torch.testing.assert_close(row[0], table[noun].mean(0))
    assert 0 < (row[1] - row[0]).std() < 0.3 * table.std()
    start = [row.detach().clone() for row in trainer.token_rows()]
    list(trainer)
    for old, new in zip(start, trainer.token_rows()):
        assert not torch.equal(old, new)
        torch.testing.assert_close(old.norm(dim=1), new.norm(dim=1))


def test_sdxl_is_conditioned_as_its_stock_pipeline(models, tmp_path):
    trainer = Trainer(tiny.config(models["sdxl"], tmp_path / "run"))
    pipeline = trainer.components.pipeline()
    with torch.no_grad():
        hidden, empty, pooled, empty_pooled = pipeline.encode_prompt("a photo of my_cat", device="cpu")
        own = trainer.conditioning()
    torch.testing.assert_close(own.subject.hidden, hidden)
    torch.testing.assert_close(own.subject.pooled, pooled)
    assert torch.equal(own.empty.hidden, empty) and torch.equal(own.empty.pooled, empty_pooled) and not empty.any()
    kwargs = {}
    trainer.unet.register_forward_pre_hook(lambda _, args, given: kwargs.update(given), with_kwargs=True, prepend=True)
    gradients_of(trainer)
    assert kwargs["added_cond_kwargs"]["time_ids"].tolist()[0] == [16, 16, 0, 0, 16, 16]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_samples_are_drawn_from_fixed_seeds_and_leave_training_alone(models, tmp_path, kind):
    results = [train(tiny.config(models[kind], tmp_path / str(every), sample_every=every, steps=2, token_vectors=2))
               for every in (0, 1)]
    assert results[0].samples == [] and results[0].lora.read_bytes() == results[1].lora.read_bytes()
    names = ["y-0.png", "y-1.png", "y_P-0.png", "y_P-1.png", "y_P-x0.png"]
    assert [path.name for path in results[1].samples] == sorted(names) * 2
    assert (results[1].samples[0].parent / "my_cat.safetensors").is_file()


def test_previews_in_tiles(models, tmp_path, monkeypatch):
    """In mode "low": nearly the same pictures, the same training, and latents that were never tiled."""
    decoded, right = [], AutoencoderKL.tiled_decode

    def spy(self, z, **options):
        decoded.append(tuple(z.shape))
        return right(self, z, **options)

    monkeypatch.setattr(AutoencoderKL, "tiled_decode", spy)
    monkeypatch.setattr(AutoencoderKL, "_tiled_encode", lambda *_: pytest.fail("latents in tiles"))
    results = [train(tiny.config(models["sd"], tmp_path / name, sample_every=2, steps=2, memory=memory))
               for name, memory in (("a", "fast"), ("b", "low"))]
    assert decoded == [(1, 4, 8, 8)] * (4 + 3)
    for one, other in zip(*(result.samples for result in results)):
        one, other = (np.asarray(Image.open(file), dtype=float) for file in (one, other))
        assert one.shape == other.shape and 0 < np.abs(one - other).mean() < 40
    trainer = Trainer(tiny.config(models["sd"], tmp_path / "c", memory="low"))
    assert trainer.tiles and not trainer.components.vae.use_tiling


def test_apply_to_gives_the_trainers_own_prediction(models, tmp_path):
    from diffusers import StableDiffusionPipeline

    trainer = Trainer(tiny.config(models["sd"], tmp_path / "run", lora_alpha=2.0, lr=1e-2))
    list(trainer)
    pipeline = StableDiffusionPipeline.from_pretrained(models["sd"])
    trainer.save().apply_to(pipeline)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        own = trainer.conditioning().subject
        hidden, _ = pipeline.encode_prompt("a photo of my_cat", "cpu", 1, False)
        torch.testing.assert_close(hidden, own.hidden)
        torch.testing.assert_close(pipeline.unet(x, t, hidden).sample, trainer.predict(x, t, own), rtol=1e-4, atol=1e-5)


def test_divergence_names_step_and_tensor_and_leaves_the_checkpoint(models, tmp_path):
    trainer = Trainer(tiny.config(models["sd"], tmp_path / "run", steps=30, checkpoint_every=2))
    steps = iter(trainer)
    next(steps)
    next(steps)
    good = {name: parameter.detach().clone() for name, parameter in trainer.update.named.items()}
    path, lora_a, _ = next(trainer.named_lora())
    lora_a.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingDiverged, match=f"step 3: the gradient of {path}.lora_a .*nor .* the 19 steps after it"):
        list(steps)
    assert trainer.step == 22 and all(torch.equal(p, good[name]) for name, p in trainer.update.named.items())
    with pytest.raises(TrainingDiverged, match=f"step 23: the gradient of {path}.lora_a"):
        list(trainer)
    assert trainer.step == 30
    kept = checkpoint.load(tmp_path / "run/checkpoint")
    assert all(torch.equal(value, good[name]) for name, value in kept["parameters"].items())
    with torch.no_grad():
        lora_a.fill_(float("inf"))
    with pytest.raises(TrainingDiverged, match=f"{path}.lora_a is not finite. The"):
        trainer.save()
    assert checkpoint.load(tmp_path / "run/checkpoint")["step"] == 30
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] is None for line in lines] == [False] * 2 + [True] * 28


def test_metrics_that_are_read_later_are_the_same(models, tmp_path):
    """As on a CUDA device; a loop that is left, and a checkpoint, lose none."""
    lines = []
    for every in (1, 3):
        trainer = Trainer(tiny.config(models["sd"], tmp_path / str(every), steps=8, checkpoint_every=4))
        trainer.recorder = Recorder("cpu", every)
        for metrics in trainer:
            if metrics["step"] == 5:
                break
        assert len((tmp_path / str(every) / "metrics.jsonl").read_text().splitlines()) == 5
        for metrics in trainer:
            pass
        assert metrics["step"] == 8 and metrics["loss"] is not None
        written = (tmp_path / str(every) / "metrics.jsonl").read_text().splitlines()
        lines.append([json.loads(line) | {"seconds": 0} for line in written])
    assert len(lines[0]) == 8 and lines[0] == lines[1]


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"images": "/nowhere/photos"}, ConfigError, "images"),
    ({"prompt": "a sketch"}, ConfigError, r"prompt.*\[V\]"),
    ({"prompt": "a sketch of [V] and [W]"}, ConfigError, r"\[W\]"),
    ({"prompt": "a sketch of [V] " + "on a red background " * 4}, ConfigError, "prompt.*at most 16"),
    ({"clean_prompt": "a sketch of a cat " + "on a red background " * 4}, ConfigError, "clean_prompt.*at most 16"),
    ({"subject_prompt": "a photo of [V] " + "on a red background " * 4}, ConfigError, "subject_prompt.*at most 16"),
    ({"token": "photo"}, ConfigError, "token.*vocabulary"),
    ({"token": "ew", "prompt": "a skewed sketch of [V]"}, ConfigError, "token.*part of another word"),
    ({"alpha": 0.0}, ConfigError, "alpha"), ({"rank": 0}, ConfigError, "rank"),
    ({"model": "emoji-65"}, ConfigError, "emoji-64"), ({"model": "/nowhere/model"}, ConfigError, "model"),
    ({"output_dir": "/proc/palp"}, ConfigError, "output_dir"), ({"resume": "must"}, ConfigError, "resume"),
    ({"backend": "cuda"}, ConfigError, "backend"),
])
def test_bad_input_is_refused_before_any_work(models, tmp_path, monkeypatch, options, error, words):
    monkeypatch.setattr("palp_fast.models.load_components", lambda *a, **k: pytest.fail("weights were loaded"))
    fields = {"model": models["sd"], "images": tiny.photos(), "class_noun": "cat", "prompt": "a sketch of [V]",
              "output_dir": str(tmp_path / "run"), "device": "cpu"}
    with pytest.raises(error, match=words):
        train(**(fields | options))
    assert not (tmp_path / "run").exists()


def test_unreadable_photo_is_named(models, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="cat.png"):
        train(tiny.config(models["sd"], tmp_path / "run", images=str(tmp_path / "photos")))
    assert not (tmp_path / "run").exists()
