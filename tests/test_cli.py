"""The command line: every field as an option, errors in one line, and each command once for real."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from PIL import Image

import palp_fast
from palp_fast import DataError, Subject, TrainConfig, TrainingDiverged
from palp_fast.cli import main


def module(name):
    """The submodule, whose name in the package is its function's."""
    __import__(f"palp_fast.{name}")
    return sys.modules[f"palp_fast.{name}"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, photo in enumerate(tiny.photos(2)):
        photo.save(folder / f"{i}.png")
    return folder


@pytest.fixture
def required(model, photos, tmp_path):
    fields = {"model": model, "images": photos, "class-noun": "owl", "prompt": "a sketch of [V]"}
    return [f"--{key}={value}" for key, value in {**fields, "output-dir": tmp_path / "out"}.items()]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def trained(monkeypatch):
    """The configs that `train` was called with, in place of training."""
    configs = []

    def record(cfg):
        configs.append(cfg)
        raise DataError("stop here")

    monkeypatch.setattr(module("train"), "train", record)
    return configs


# A value of every field that is not its default, as an option's text and as the field's value.
EVERY_FIELD = {
    "model": ("m", "m"), "teacher": ("t", "t"), "images": ("photos", "photos"), "class_noun": ("owl", "owl"),
    "subject_prompt": ("my [V]", "my [V]"), "token": ("none", "none"), "prompt": ("a [V]", "a [V]"),
    "subjects": ('{"images": "x", "class_noun": "cat"}', (Subject("x", "cat"),)), "clean_prompt": ("a 1", "a 1"),
    "output_dir": ("7", "7"), "method": ("nfsd", "nfsd"), "alpha": ("3", 3.0), "beta": ("1e-1", 0.1),
    "negative_prompt": ("", ""), "residual_weight": ("0", 0.0), "rescale": (None, False), "same_noise": (None, False),
    "same_timestep": (None, False), "loss_space": ("eps", "eps"), "rank": ("4", 4), "lora_alpha": ("8", 8.0),
    "lora_targets": ("none", "none"), "learn_token": (None, False), "token_vectors": ("2", 2),
    "token_norm": ("initial", "initial"), "steps": ("3", 3), "batch_size": ("2", 2), "grad_accumulation": ("1", 1),
    "lr": ("1e-3", 1e-3), "token_lr": (".1", 0.1), "lr_schedule": ("linear", "linear"), "optimizer": ("adamw", "adamw"),
    "max_grad_norm": ("2", 2.0), "timesteps": ("adaptive", "adaptive"), "subject_sampling": ("subject", "subject"),
    "resolution": ("64", 64), "memory": ("low", "low"), "base_dtype": ("fp16", "fp16"), "seed": ("5", 5),
    "teacher_base_dtype": ("int8", "int8"), "teacher_offload": (None, True),
    "device": ("cpu", "cpu"), "cuda_graph": ("false", False), "checkpoint_every": ("0", 0), "sample_every": ("9", 9),
    "resume": ("must", "must"), "preset": ("paper", "paper"), "backend": ("reference", "reference"),
}  # fmt: skip


@pytest.mark.parametrize("dash", ["-", "_"])
def test_every_field_is_an_option(trained, dash):
    assert EVERY_FIELD.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    options = []
    for name, (text, value) in EVERY_FIELD.items():
        option = name.replace("_", dash)
        options += [f"--{'' if value else 'no-'}{option}"] if text is None else [f"--{option}", text]
    assert run("train", *options).exit_code == 2
    expected = {name: value for name, (_, value) in EVERY_FIELD.items()}
    assert trained == [TrainConfig(**expected)]
    assert trained[0].given.keys() == expected.keys()


def test_options_that_are_not_given_stay_open_to_presets(trained, required):
    run("train", *required, "--preset=paper")
    assert trained[0].resolved().lr == 5e-5


def test_options_override_the_config_file(trained, required, tmp_path):
    (tmp_path / "c.toml").write_text('rank = 4\nsteps = 7\nimages = "elsewhere"\n')
    run("train", "--config", tmp_path / "c.toml", *required, "--steps", 9)
    cfg = trained[0]
    assert (cfg.rank, cfg.steps, cfg.images) == (4, 9, str(tmp_path / "photos"))


def test_several_images_and_subjects(trained, required):
    run("train", *required[:1], *required[2:], "--images", "a.png", "--images", "b.png")
    assert trained[0].images == ("a.png", "b.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "rank: 0 is not allowed; allowed: an integer >= 1"),
        (["--rank", "many"], "rank: 'many' is not allowed; allowed: an integer >= 1"),
        (["--alpha", "nan"], "alpha: nan is not allowed"),
        (["--backend", "cuda"], "backend: 'cuda' is not available in this version"),
        (["--subjects", "{"], "subjects: ('{',) is not JSON"),
        (["--prompt", "a sketch"], "prompt: no placeholder [V]"),
        (["--images", "nowhere"], "images: "),
        (["--config", "nowhere.toml"], "config file 'nowhere.toml' cannot be read"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_wrong_settings_give_one_line_and_code_2(required, tmp_path, options, message, dry):
    result = run("train", *required, *options, *dry)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"palp-fast: {message}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unknown_options_get_a_suggestion():
    result = run("train", "--lerning-rate", "1", "--rnk", "3")
    assert result.exit_code == 2 and "No such option" in result.stderr


def test_other_errors(monkeypatch, required):
    def raising(error):
        def train(cfg):
            raise error

        monkeypatch.setattr(module("train"), "train", train)
        return run("train", *required)

    diverged = raising(TrainingDiverged("step 3: loss is nan\nlower lr"))
    assert (diverged.exit_code, diverged.stderr) == (1, "palp-fast: step 3: loss is nan lower lr\n")
    unreadable = raising(DataError("image 'a.png' cannot be read"))
    assert (unreadable.exit_code, unreadable.stderr) == (2, "palp-fast: image 'a.png' cannot be read\n")
    bug = raising(KeyError("bug"))
    assert isinstance(bug.exception, KeyError)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ([], "4 x 6 at batch 1 (1 forward, 1 backward, 4 without gradient)"),
        (["--beta=1"], "4 x 5 at batch 1 (1 forward, 1 backward, 3 without gradient)"),
        (["--method=dreambooth", "--batch-size=2"], "4 x 2 at batch 2 (1 forward, 1 backward, 0 without gradient)"),
        (["--method=nfsd", "--grad-accumulation=1"], "1 x 5 at batch 1 (1 forward, 1 backward, 3 without gradient)"),
    ],
)
def test_dry_run_shows_prompts_tokens_and_passes(model, required, tmp_path, options, passes):
    before = sorted(tmp_path.rglob("*"))
    result = run("train", *required, "--dry-run", *options)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for text in ("a photo of my_owl", "a sketch of my_owl", "a sketch of an owl"):
        assert any(repr(text) in line for line in lines)
    tokenizer = module("models").load_tokenizers(model)[0]
    clean = next(line for line in lines if line.startswith("y_c"))
    assert str(tokenizer("a sketch of an owl").input_ids) in clean
    assert f"UNet passes per step: {passes}" in lines
    assert any(line.startswith("memory estimate (fast): ") for line in lines)
    assert "  memory = 'fast': as set; on a CPU 'auto' is 'fast'" in lines
    assert sorted(tmp_path.rglob("*")) == before


def test_train_then_generate(model, required, tmp_path):
    result = run("train", *required, "--steps=1", "--rank=2", "--grad-accumulation=1")
    assert result.exit_code == 0, result.output
    files = dict(line.split(": ", 1) for line in result.stdout.splitlines() if line.startswith(("LoRA", "token")))
    assert all(Path(path).is_file() for path in files.values()) and len(files) == 3
    drawn = run("generate", "--model", model, "--prompt", "a sketch of my_owl", "--lora", files["LoRA (kohya keys)"],
                "--embedding", files["token my_owl"], "-n", 2, "--steps", 2, "--seed", 5,
                "--output-dir", tmp_path / "pictures")  # fmt: skip
    assert drawn.exit_code == 0, drawn.output
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["seed-5.png", "seed-6.png"]
    assert Image.open(pictures[0]).size == (16, 16)
    assert drawn.stdout.split() == [str(path) for path in pictures]


def test_generate_refuses_before_any_work(model, tmp_path):
    (tmp_path / "file").write_text("x")
    result = run("generate", "--model", model, "--prompt", "x", "--output-dir", tmp_path / "file" / "out")
    assert result.exit_code == 2 and result.stderr.startswith("palp-fast: output_dir: ")
    result = run("generate", "--model", model, "--prompt", "a [V]", "--output-dir", tmp_path / "out")
    assert result.exit_code == 2 and "placeholder" in result.stderr and not (tmp_path / "out").exists()


def test_evaluate_passes_on_what_is_given(monkeypatch):
    calls = []

    def score(*args, **kwargs):
        calls.append((args, kwargs))
        return {"text_alignment": 0.25}

    monkeypatch.setattr(module("evaluate"), "evaluate", score)
    result = run("evaluate", "a.png", "b.png", "--prompt", "a cat", "--references", "photos", "--encoder", "clip")
    assert json.loads(result.stdout) == {"text_alignment": 0.25}
    given = {"prompt": "a cat", "references": "photos", "encoder": "clip", "device": "auto"}
    assert calls == [((["a.png", "b.png"],), given)]


def test_evaluate_needs_something_to_compare_with(photos):
    result = run("evaluate", photos)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_doctor_names_versions_devices_and_every_operator_with_its_reason():
    from palp_fast import backend

    result = run("doctor")
    assert result.exit_code == 0, result.output
    text = result.stdout
    for expected in (f"palp-fast {palp_fast.__version__}", "torch 2", "cpu: ", "cuda", "bitsandbytes"):
        assert expected in text
    rows = backend.report()
    assert {row.operator for row in rows} >= set(backend.OPERATORS)
    for row in rows:
        assert any(row.operator in line and row.reason in line for line in text.splitlines())


def test_products_that_are_slow_on_the_cpu_are_told(model, photos, tmp_path, monkeypatch):
    """By the doctor, and once before a training that would compute so."""
    from palp_fast import doctor

    right = doctor.fast_on_cpu
    assert right("fp32") and not right("an unknown dtype")
    for fast in (("fp32",), ("fp32", "bf16"), ("fp32", "bf16", "fp16")):
        monkeypatch.setattr(doctor, "fast_on_cpu", fast.__contains__)
        slow = " and ".join(dtype for dtype in ("bf16", "fp16") if dtype not in fast)
        lines = [line for line in doctor.report().splitlines() if "no fast products" in line]
        assert len(lines) == bool(slow) and all(f"in {slow} for this CPU" in line for line in lines)
        for dtype, teacher in (("bf16", {}), ("fp32", {}), ("int8", {}),
                               ("fp32", {"teacher": str(model), "teacher_base_dtype": "bf16"})):
            cfg = tiny.config(model, tmp_path / "out", base_dtype=dtype, **teacher).resolved()
            assert (doctor.warning(cfg) is not None) == ("bf16" in (dtype, *teacher.values()) and "bf16" not in fast)
            assert doctor.warning(cfg.replace(device="cuda")) is None
    monkeypatch.setattr(doctor, "fast_on_cpu", ("fp32",).__contains__)
    result = run("train", f"--model={model}", f"--images={photos}", "--class-noun=owl", "--prompt=a sketch of [V]",
                 f"--output-dir={tmp_path / 'out'}", "--steps=1", "--rank=2", "--grad-accumulation=1",
                 "--base-dtype=fp16")
    assert result.exit_code == 0, result.output
    told = [line for line in result.output.splitlines() if line.startswith("warning: torch has no fast products")]
    assert len(told) == 1 and "in fp16 for" in told[0]


def test_presets_can_be_pasted_into_a_config_file(required, tmp_path, trained):
    sections, found = {}, run("presets")
    assert found.exit_code == 0, found.output
    for line in found.stdout.splitlines():
        if line.startswith("  "):
            sections[name].append(line.strip())
        else:
            sections[name := line] = []
    cards = ["4gb", "6gb", "8gb", "12gb"]
    assert [name for name in sections if not name.startswith("#")] == [
        "paper", *(f"{card}, {family}" for card in cards for family in ("SD1.x", "SDXL"))]
    for name in ("paper", "4gb, SD1.x", "12gb, SD1.x"):
        trained.clear()
        preset = name.partition(",")[0]
        (tmp_path / "c.toml").write_text("\n".join(sections[name]))
        run("train", "--config", tmp_path / "c.toml", *required)
        run("train", "--preset", preset, *required)
        by_file, by_preset = (cfg.resolved() for cfg in trained)
        assert by_file.replace(preset=preset) == by_preset
    estimates = [line for lines in sections.values() for line in lines if line.startswith("# estimated peak")]
    assert len(estimates) == 8 and all(line.endswith("not measured") for line in estimates)


def test_module_is_the_same_program():
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "palp_fast"]
    version = subprocess.run([*command, "--version"], env=env, capture_output=True, text=True)
    assert version.stdout.strip() == f"palp-fast, version {palp_fast.__version__}"
    wrong = subprocess.run([*command, "train", "--model=m"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("palp-fast: prompt: missing") and not wrong.stdout
