"""Another model as the teacher: its schedule and prediction type in the student's terms, gradients, refusals, a run."""

import json
import weakref
from types import SimpleNamespace

import alive
import pytest
import tiny
import torch
from close import assert_close
from diffusers import UNet2DConditionModel
from palp_fast import ConfigError, TrainConfig, Trainer, functional, memory, models, offload, predict, teacher, train
from palp_fast.cli import main
from palp_fast.memory.models import FAMILIES
from palp_fast.memory.step import Other, Sizes, step
from palp_fast.methods import Pass
from palp_fast.nn.lean import NOT_QUANTISED, QUANTISED, set_memory
from palp_fast.prepare import prepare
from palp_fast.space import PredictionSpace
from step import (
    assert_equal_gradients,
    batch,
    by_encoder,
    check_trainer,
    lora_pairs,
    make_trainer,
    scatter,
    settings_for,
    timesteps,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextModel

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
# (student, teacher, the teacher's own schedule, settings, what differs)
CASES = {
    "other weights": ("sd", "sd", {}, {}, ""),
    "a v teacher": ("sd", "sd_v", LINEAR, {}, "noise timestep"),
    "a v student": ("sd_v", "sd", LINEAR, {}, "noise timestep"),
    "v both, eps loss": ("sd_v", "sd_v", LINEAR, {"loss_space": "eps"}, ""),
    "SDXL teaches SD": ("sd", "sdxl", LINEAR | {"num_train_timesteps": 700}, {"beta": 1.0}, ""),
    "SD teaches SDXL": ("sdxl", "sd_v", {}, {"rescale": False}, ""),
    "sds": ("sd_v", "sd", {}, {"method": "sds"}, ""),
    "nfsd": ("sd", "sd_v", LINEAR, {"method": "nfsd", "alpha": 7.5}, ""),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny.model_folder(tmp_path_factory.mktemp(kind), kind) for kind in tiny.KINDS}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_autograd(folders, tmp_path, name):
    student, kind, schedule, chosen, other = CASES[name]
    folder = tiny.teacher_folder(tmp_path / "teacher", folders[student], kind, **schedule)
    check_trainer(folders[student], tmp_path / "run", settings_for(chosen), other=other, teacher=str(folder))


def gradients(trainer):
    scatter(lora_pairs(trainer), trainer.token_rows())
    latents, noise, _ = batch()
    trainer.gradients(latents, timesteps(), noise)
    lora = {name: (a.grad, b.grad) for name, (a, b) in lora_pairs(trainer).items()}
    return lora, by_encoder(trainer, lambda row: row.grad)


@pytest.mark.parametrize(("kind", "lean"), [("sd", None), ("sd", False), ("sd_v", None), ("sdxl", None)])
def test_the_model_itself_as_teacher_changes_nothing(folders, tmp_path, kind, lean):
    """Relative error at most 1e-5; equal schedules give the very timesteps."""
    settings = settings_for({})
    trainers = [make_trainer(folders[kind], tmp_path / "run", settings, lean=lean, teacher=other)
                for other in (None, str(folders[kind]))]
    assert trainers[0].teacher is None
    assert torch.equal(trainers[1].teacher.timesteps, torch.arange(1000.0))
    assert_equal_gradients(*map(gradients, reversed(trainers)))


def by_hand(folder, form):
    """Writes int8 or NF4 numbers, dense, in place of the weights of a folder's UNet and text encoder."""
    for kind, name in ((UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder")):
        module = kind.from_pretrained(folder, subfolder=name)
        for path, layer in module.named_modules():
            if type(layer) in QUANTISED and path not in NOT_QUANTISED:
                weight = layer.weight.detach()
                if weight.dim() == 4:  # rows in the order h, w, d_in
                    weight = weight.contiguous(memory_format=torch.channels_last)
                layer.weight.data = functional.quantise(weight, form).dequantise().contiguous()
        module.save_pretrained(folder / name)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_quantised_teacher_beside_a_student_that_is_not(folders, tmp_path, form):
    """The gradients of a dense teacher of the same numbers, to 1e-5, and not those of the weights as they were."""
    folder, settings = tiny.teacher_folder(tmp_path / "teacher", folders["sd"], "sd_v"), settings_for({})
    quantised = make_trainer(folders["sd"], tmp_path / "run", settings, teacher=str(folder), teacher_base_dtype=form)
    assert not any(name.endswith("weight_codes") for name, _ in quantised.unet.named_buffers())
    found = gradients(quantised)
    dense = gradients(make_trainer(folders["sd"], tmp_path / "run", settings, teacher=str(folder)))
    with pytest.raises(AssertionError):
        assert_equal_gradients(found, dense)
    by_hand(folder, form)
    again = make_trainer(folders["sd"], tmp_path / "run", settings, teacher=str(folder), teacher_base_dtype="fp32")
    assert_equal_gradients(found, gradients(again))


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_the_teachers_weights_are_in_its_own_dtype(folders, tmp_path, dtype, size):
    student = "fp32" if size == 2 else "bf16"
    trainer = make_trainer(folders["sd"], tmp_path / "run", settings_for({}), teacher=str(folders["sd"]),
                           base_dtype=student, teacher_base_dtype=dtype)
    parts = trainer.teacher.components
    assert parts.dtype.itemsize == size and trainer.components.dtype.itemsize == 6 - size
    assert parts.unet.conv_out.weight.dtype == torch.float32
    latents, _, _ = batch()
    made = trainer.teacher.predict(latents, timesteps())
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in made.values())


def tables(unet):
    return [table for part in unet.modules() for table in (part._parameters, part._buffers)]


@pytest.mark.parametrize(("form", "lean"), [("fp32", None), ("fp32", False), ("int8", None), ("nf4", None)])
def test_weights_that_wait_give_the_same_bits(folders, tmp_path, monkeypatch, form, lean):
    """Real copies, from one place in the memory of a CPU to another, gone when the predictions are there."""
    options = {"teacher": str(folders["sd_v"]), "teacher_base_dtype": form, "teacher_offload": True}
    settings = settings_for({"method": "nfsd", "alpha": 7.5})
    plain = make_trainer(folders["sd_v"], tmp_path / "run", settings, lean=lean, **options)
    assert not plain.teacher.offloaded, "there is nowhere to go from a CPU"
    monkeypatch.setattr(offload, "asked", lambda cfg: True)
    monkeypatch.setattr(offload, "LEAST", 0)
    moving = make_trainer(folders["sd_v"], tmp_path / "run", settings, lean=lean, **options)
    assert moving.teacher.offloaded and "move between steps" in moving.teacher.predictions.graph_obstacle
    unet, read, right = moving.teacher.components.unet, [], offload._Waiting.__getitem__
    assert not any(table.away for table in tables(moving.unet) if hasattr(table, "away"))
    assert memory.models.nbytes(unet) == memory.models.nbytes(plain.teacher.components.unet), "shared memory is shared"

    def spy(self, name):
        value = right(self, name)
        if name in self.away:
            assert value.data_ptr() != dict.__getitem__(self, name).data_ptr()
            read.append(weakref.ref(value))
        return value

    monkeypatch.setattr(offload._Waiting, "__getitem__", spy)
    for one, other in zip(*(_flat(gradients(trainer)) for trainer in (plain, moving))):
        assert torch.equal(one, other)
    assert len(read) > 50 and all(value() is None for value in read)


def _flat(found):
    lora, rows = found
    return [grad for pair in lora.values() for grad in pair] + rows


class _OnMeta(TorchDispatchMode):
    """No operator but a copy meets a tensor of numbers elsewhere than on the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default):
            assert all(value.is_meta for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["fp32", "int8"])
@pytest.mark.parametrize("lean", [True, False])
def test_weights_wait_on_one_device_and_are_read_on_another(folders, form, lean):
    """The meta device in the place of a card: between predictions the CPU holds all weights but the small ones."""
    if form == "int8" and not lean:
        return
    device, unet = torch.device("meta"), models.load_components(
        folders["sd"], dtype=torch.float32, device="cpu", form=form if form == "int8" else None).unet
    if lean:
        predict.lean_unet(unet, rank=4, lora_targets="none", backend="reference")
    small = 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "LEAST", small)
        offload.send_away(unet, device)
    assert unet.device == device

    def devices():
        return {(value.is_meta, value.nbytes < small) for table in tables(unet) for value in table.values()
                if value is not None and value is not next(unet.parameters())}

    assert devices() == {(True, True), (False, False)}
    x, t = torch.empty(2, 4, 8, 8, device=device), torch.empty(2, dtype=torch.int64, device=device)
    with torch.no_grad(), _OnMeta():
        made = unet(x, t, encoder_hidden_states=torch.empty(2, 16, 16, device=device), return_dict=False)[0]
    assert made.is_meta and made.shape == x.shape and devices() == {(True, True), (False, False)}


def schedule(beta_end, steps, start=8.5e-4):
    return torch.cumprod(1 - torch.linspace(start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2, 0)


class Toy:
    """The exact prediction for data that are normal with the prompt's mean and variance 1/4, at any real timestep."""

    def __init__(self, alpha_bar, velocity):
        self.logit, self.velocity = torch.logit(alpha_bar), velocity

    def __call__(self, x, tau, mean):
        low = tau.floor().long().clamp(max=len(self.logit) - 2)
        level = torch.lerp(self.logit[low], self.logit[low + 1], tau.double() - low).sigmoid()[:, None, None, None]
        a, s, x = level.sqrt(), (1 - level).sqrt(), x.double()
        x0 = mean + a / 4 / (level / 4 + s * s) * (x - a * mean)
        eps = (x - a * x0) / s
        return a * eps - s * x0 if self.velocity else eps

    def without_graph(self, x, tau, prompts, index, passes):
        return {entry.argument: self(x, tau, {"clean": 2.0, "empty": 0.0}[entry.prompt]) for entry in passes}


PASSES = [Pass("teacher_cond", "clean", 0.0), Pass("teacher_uncond", "empty", 0.0)]


def toy_teacher(student, velocity, alpha_bar, theirs):
    parts = SimpleNamespace(alphas_cumprod=alpha_bar.float(), device=torch.device("cpu"),
                            prediction_type="v_prediction" if theirs else "epsilon")
    toy = Toy(parts.alphas_cumprod.double(), theirs)
    return teacher.Teacher(parts, toy, PredictionSpace(student, velocity), PASSES)


@pytest.mark.parametrize("velocity", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_the_guided_prediction_of_a_toy_is_the_analytical_one(velocity, theirs):
    """By a teacher of another prediction type and schedule, at every timestep of the student."""
    student = schedule(0.012, 1000).float()
    made = toy_teacher(student, velocity, schedule(0.03, 600, 4e-4), theirs)
    t = torch.arange(1000)
    x = torch.randn(1000, 1, 2, 2)
    right = Toy(student.double(), velocity)
    for name, mean in (("teacher_cond", 2.0), ("teacher_uncond", 0.0)):
        assert_close(made.predict(x, t)[name], right(x, t, mean), 1e-5, name)


def test_timesteps_are_matched_by_signal_to_noise_ratio():
    student, other = schedule(0.012, 1000), schedule(0.03, 600)
    tau, level = teacher.matched(student, other)
    assert torch.allclose(level, student, rtol=1e-12)
    assert (tau.diff() > 0).all() and tau[0] == 0 and 0 < tau[-1] < 599
    inside = tau[500]
    logit = torch.logit(other)
    between = torch.lerp(logit[int(inside)], logit[int(inside) + 1], inside % 1)
    assert between == pytest.approx(float(torch.logit(student)[500]), rel=1e-9)
    # A schedule that ends before: its last timestep, with its own level.
    tau, level = teacher.matched(student, other[:200])
    assert tau[-1] == 199 and level[-1] == pytest.approx(float(other[199])) and level[-1] > student[-1]
    tau, _ = teacher.matched(student, other[50:])
    assert tau[0] == 0 and tau[1] == 0


def test_what_the_teacher_reads(folders, tmp_path, monkeypatch, capsys):
    """Class nouns in place of tokens, by its own tokenizer; its text encoders and autoencoder are not kept."""
    seen, right = [], teacher.conditioning.encode

    def spy(components, texts):
        seen.append((components.reference, texts, [len(t) for t in components.tokenizers]))
        return right(components, texts)

    monkeypatch.setattr(teacher.conditioning, "encode", spy)
    folder = str(tiny.teacher_folder(tmp_path / "teacher", folders["sd"], "sd_v"))
    trainer = make_trainer(folders["sd"], tmp_path / "run", settings_for({}), teacher=folder)
    vocabulary = len(models.load_tokenizers(folder)[0])
    assert [entry for entry in seen if entry[0] == folder] == [
        (folder, text, [vocabulary]) for text in ("a sketch of a cat", "")]
    assert trainer.teacher.components.text_encoders == [] and trainer.teacher.components.vae is None
    assert "teacher's y_c  'a sketch of a cat'" in capsys.readouterr().out
    assert not any(parameter.requires_grad for parameter in trainer.teacher.components.unet.parameters())


@pytest.mark.parametrize("options", [
    {"base_dtype": "int8"}, {"base_dtype": "nf4", "learn_token": False}, {"base_dtype": "bf16", "memory": "low"},
    {"method": "dreambooth"},
], ids=lambda options: options.get("base_dtype", "dreambooth"))
def test_a_run_repeats_and_goes_on(folders, tmp_path, options):
    folder = tiny.teacher_folder(tmp_path / "teacher", folders["sd"], "sd_v", **LINEAR)
    config = tiny.config(folders["sd"], tmp_path / "whole", teacher=str(folder), checkpoint_every=2, **options)
    whole = train(config)
    cut = Trainer(config.replace(output_dir=str(tmp_path / "cut")))
    if options.get("base_dtype") in ("int8", "nf4"):
        unet = cut.teacher.components.unet
        assert any(name.endswith("weight_codes") for name, _ in unet.named_buffers())
    for metrics in cut:
        if metrics["step"] == 2:
            break
    resumed = train(config.replace(output_dir=str(tmp_path / "cut"), resume="must"))
    assert resumed.lora.read_bytes() == whole.lora.read_bytes()
    lines = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert len(lines) == 3 and all((line["residual_norm"] > 0) == ("method" not in options) for line in lines)


def test_another_teacher_is_another_run(folders, tmp_path):
    config = tiny.config(folders["sd"], tmp_path / "run")
    other = config.replace(teacher=str(folders["sd"]))
    assert config.fingerprint() != other.fingerprint() and other.resolved().teacher == str(folders["sd"])


def refuse(folders, tmp_path, words, **options):
    with pytest.raises(ConfigError, match=words) as caught:
        prepare(tiny.config(folders["sd"], tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
    return str(caught.value)


def test_what_cannot_be_a_teacher_is_refused_before_any_work(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("palp_fast.models.load_components", lambda *a, **k: pytest.fail("weights were loaded"))
    refuse(folders, tmp_path, "^teacher: unknown model 'emoji-65'", teacher="emoji-65")
    refuse(folders, tmp_path, "^teacher: .*neither a diffusers folder", teacher=str(tmp_path))
    apart = tiny.model_folder(tmp_path / "apart", seed=1)
    told = refuse(folders, tmp_path, "^teacher: .*the weights of their autoencoders differ", teacher=str(apart))
    assert str(folders["sd"]) in told and "same autoencoder" in told
    folder = tiny.teacher_folder(tmp_path / "scaled", folders["sd"])
    change(folder / "vae" / "config.json", scaling_factor=0.13)
    refuse(folders, tmp_path, r"^teacher: .*its autoencoder's scaling_factor is 0.13, not 0.5", teacher=str(folder))
    folder = tiny.teacher_folder(tmp_path / "wide", folders["sd"])
    change(folder / "unet" / "config.json", in_channels=9)
    refuse(folders, tmp_path, r"^teacher: .*its UNet's in_channels is 9, not 4", teacher=str(folder))
    folder = tiny.teacher_folder(tmp_path / "short", folders["sd"])
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=4)
    refuse(folders, tmp_path, "^clean_prompt: .*the teacher reads at most 4", teacher=str(folder))
    refuse(folders, tmp_path, "^teacher_offload: True without a teacher", teacher_offload=True)
    with pytest.raises(ConfigError, match="^teacher_base_dtype: 'nf4' needs the lean UNet"):
        Trainer(tiny.config(folders["sd"], tmp_path / "run", teacher=str(folders["sd"]), teacher_base_dtype="nf4"),
                lean=False)


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_dry_run_tells_of_the_teacher(folders, tmp_path):
    from click.testing import CliRunner

    (tmp_path / "photos").mkdir()
    tiny.photos(1)[0].save(tmp_path / "photos" / "1.png")
    folder = str(tiny.teacher_folder(tmp_path / "teacher", folders["sd"], "sdxl"))
    options = {"model": folders["sd"], "teacher": folder, "images": tmp_path / "photos", "class-noun": "cat",
               "prompt": "a sketch of [V]", "output-dir": tmp_path / "run", "device": "cpu"}
    result = CliRunner().invoke(main, ["train", "--dry-run", *(f"--{name}={value}" for name, value in options.items())])
    assert result.exit_code == 0, result.output
    assert f"4 without gradient, 2 of them by the teacher '{folder}')" in result.output
    assert "teacher's y_c" in result.output and "the teacher's UNet" in result.output
    assert "loading the teacher" in result.output
    options |= {"teacher-base-dtype": "int8"}
    given = ["--teacher-offload", *(f"--{name}={value}" for name, value in options.items())]
    smaller = CliRunner().invoke(main, ["train", "--dry-run", *given])
    assert f"2 of them by the teacher '{folder}' in int8)" in smaller.output, smaller.output
    sizes = [float(line.split()[0]) for shown in (result, smaller) for line in shown.output.splitlines()
             if "MiB  the teacher's UNet" in line]
    assert len(sizes) == 2 and sizes[0] > 0


def test_the_estimate_counts_the_teacher():
    """SDXL beside SD1.x: its weights all the time, its pass on top of what the student keeps."""
    from palp_fast import Subject

    cfg = TrainConfig(model="m", prompt="a [V]", output_dir="o", device="cuda", base_dtype="fp16", memory="fast",
                      subjects=[Subject("photos", "cat", "[V]")], backend="reference")
    alone, = memory.estimates(FAMILIES["SD1.x"], cfg, 512, 5, ["fast"])
    guided = cfg.replace(teacher="t")
    both, = memory.estimates(FAMILIES["SD1.x"], guided, 512, 5, ["fast"], FAMILIES["SDXL"])
    phases = {phase.name: phase for phase in both.phases}
    assert phases["in the step"].parts["the teacher's UNet"] == pytest.approx(4.78 * 2**30, rel=0.02)
    assert both.peak > alone.peak + 4.7 * 2**30
    assert phases["loading the teacher"].total < phases["in the step"].total
    in_int8, = memory.estimates(FAMILIES["SD1.x"], guided.replace(teacher_base_dtype="int8"), 512, 5, ["fast"],
                                FAMILIES["SDXL"])
    other = {phase.name: phase for phase in in_int8.phases}
    assert other["in the step"].parts["the teacher's UNet"] == pytest.approx(2.4 * 2**30, rel=0.03)
    assert other["in the step"].parts["UNet"] == phases["in the step"].parts["UNet"]
    assert other["loading the teacher"].parts["a layer, quantised"] > 0
    unused = guided.replace(method="dreambooth")
    none, = memory.estimates(FAMILIES["SD1.x"], unused, 512, 5, ["fast"], FAMILIES["SDXL"])
    assert none.peak < alone.peak


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_the_estimate_of_a_teacher_that_waits(dtype):
    """Of its weights no more than a layer's counts, and that in its predictions alone."""
    from palp_fast import Subject

    cfg = TrainConfig(model="m", prompt="a [V]", output_dir="o", device="cuda", base_dtype="fp16", memory="fast",
                      subjects=[Subject("photos", "cat", "[V]")], backend="reference", teacher="t",
                      teacher_base_dtype=dtype)

    def phases(**changes):
        made, = memory.estimates(FAMILIES["SD1.x"], cfg.replace(**changes), 512, 5, ["fast"], FAMILIES["SDXL"])
        return {phase.name: phase for phase in made.phases}

    there, away = phases(), phases(teacher_offload=True)
    weights, stay = (one["in the update"].parts[name] for one, name in (
        (there, "the teacher's UNet"), (away, "what stays of the teacher's UNet")))
    assert 0 < stay < 2**25 and weights > 2 * 2**30
    assert away["in the update"].total == there["in the update"].total - weights + stay
    assert away["in the step"].total < there["in the step"].total - weights + stay + 2**28
    # Its UNet is loaded on the CPU; its text encoders are on the device meanwhile.
    assert away["loading the teacher"].total < there["loading the teacher"].total - 2**30
    assert phases(teacher_offload=True, device="cpu")["in the step"].parts["the teacher's UNet"] > 0


@pytest.mark.parametrize("form", [None, "int8"])
def test_the_step_with_a_teacher_that_waits_at_full_size(monkeypatch, form):
    """Bytes alive in the step itself, on tensors without memory: SD1.x guides SD1.x. Within 2 %."""
    from palp_fast import Subject

    cfg = TrainConfig(model="m", prompt="a [V]", output_dir="o", device="cpu", base_dtype="bf16", memory="balanced",
                      subjects=[Subject("photos", "cat", "[V]")], backend="reference", beta=1.0)
    student = alive.FakeStep("SD1.x 512", cfg)
    guide = alive.FakeStep("SD1.x 512", cfg.replace(lora_targets="none"), form, mode=student.mode)
    with student.mode:
        offload.send_away(guide.parts.unet, torch.device("cpu"))
    found = student.peaks(guide)
    theirs = memory.models.parts_of(FAMILIES["SD1.x"], cfg.replace(base_dtype=form or "bf16"), teacher=True).unet
    own = memory.models.parts_of(FAMILIES["SD1.x"], cfg).unet
    for unet in (own, theirs):
        set_memory(unet, "balanced")
    sizes, guided = Sizes(1, 64, 77, 1, 2), cfg.replace(teacher="t")
    made, resident = (step(own, guided, sizes, 0, 0, True, Other(theirs, 77, 2, waits)) for waits in (True, False))
    for name in ("saved", "forward", "without_grad", "backward"):
        print(f"teacher {form} {name}: alive {found[name] / 2**20:.1f} MiB, estimate {getattr(made, name) / 2**20:.1f}")
        assert getattr(made, name) == pytest.approx(found[name], rel=0.02), name
    assert made.split[1] > resident.split[1]
