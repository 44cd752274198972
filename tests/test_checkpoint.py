"""Checkpoints: atomic, complete, and enough to go on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from palp_fast import ConfigError, Trainer, checkpoint, train

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "sd")


def state(step, **more):
    return {"step": step, "fingerprint": "f", "weights": torch.full((3,), float(step)), **more}


def outputs(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.safetensors")}


def without_seconds(path):
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_the_newest_complete_checkpoint_is_kept_and_loaded(tmp_path):
    assert checkpoint.load(tmp_path / "none") is None
    for step in (5, 10, 10):
        path = checkpoint.save(tmp_path, state(step))
        assert path == tmp_path / f"step-{step:08d}" and [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = checkpoint.load(tmp_path)
    assert loaded["step"] == 10 and torch.equal(loaded["weights"], torch.full((3,), 10.0))
    checkpoint.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tear", ["cut", "flip", "no state", "no manifest", "empty manifest"])
def test_a_torn_checkpoint_is_never_read(tmp_path, tear):
    good = checkpoint.save(tmp_path / "a", state(5))
    torn = checkpoint.save(tmp_path / "b", state(10))
    content = (torn / "state.pt").read_bytes()
    if tear == "cut":
        (torn / "state.pt").write_bytes(content[:-1])
    elif tear == "flip":
        (torn / "state.pt").write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    elif tear == "empty manifest":
        (torn / "manifest.json").write_text("")
    else:
        (torn / {"no state": "state.pt", "no manifest": "manifest.json"}[tear]).unlink()
    os.replace(torn, tmp_path / "a" / torn.name)
    path, manifest = checkpoint.find(tmp_path / "a")
    assert path == good and manifest["step"] == 5 and checkpoint.load(tmp_path / "a")["step"] == 5


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(5))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, state(10))
    assert checkpoint.load(tmp_path)["step"] == 5


@pytest.mark.parametrize("options", [
    {"optimizer": "adamw8bit", "timesteps": "adaptive", "lr_schedule": "cosine"},
    {"optimizer": "lion8bit", "token_norm": "initial", "grad_accumulation": 2},
    {"optimizer": "adamw", "base_dtype": "fp16", "same_timestep": False},
], ids=lambda options: options["optimizer"])
def test_a_resumed_run_ends_in_the_same_bytes(model, tmp_path, options):
    config = tiny.config(model, tmp_path / "whole", steps=5, checkpoint_every=2, **options)
    whole = train(config)
    interrupted = Trainer(config.replace(output_dir=str(tmp_path / "cut")))
    for metrics in interrupted:
        if metrics["step"] == 3:
            break
    assert len((tmp_path / "cut/metrics.jsonl").read_text().splitlines()) == 3
    resumed = Trainer(config.replace(output_dir=str(tmp_path / "cut"), resume="must"))
    assert resumed.step == 2
    assert [metrics["step"] for metrics in resumed] == [3, 4, 5]
    result = resumed.save()
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole") and len(outputs(tmp_path / "cut")) == 3
    assert without_seconds(result.metrics) == without_seconds(whole.metrics)


def test_a_finished_run_is_not_trained_again(model, tmp_path):
    config = tiny.config(model, tmp_path / "run")
    first = outputs(train(config).lora.parent)
    again = train(config)
    assert again.steps == 3 and outputs(again.lora.parent) == first and len(without_seconds(again.metrics)) == 3


def test_resume_never_starts_anew(model, tmp_path):
    config = tiny.config(model, tmp_path / "run", steps=4, checkpoint_every=1)
    first = outputs(train(config).lora.parent)
    trainer = Trainer(config.replace(resume="never"))
    assert trainer.step == 0
    next(iter(trainer))
    assert [path.name for path in (tmp_path / "run/checkpoint").iterdir()] == ["step-00000001"]
    assert len(without_seconds(tmp_path / "run/metrics.jsonl")) == 1
    assert outputs(train(config).lora.parent) == first


def test_the_folder_of_another_config_is_refused(model, tmp_path, monkeypatch):
    config = tiny.config(model, tmp_path / "run", steps=1)
    train(config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr("palp_fast.models.load_components", lambda *a, **k: pytest.fail("weights were loaded"))
    for resume in ("auto", "never", "must"):
        with pytest.raises(ConfigError, match="output_dir.*another config"):
            train(config.replace(lr=2e-3, resume=resume))
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(ConfigError, match="output_dir.*another config"):
        train(config.replace(lr=2e-3))
    with pytest.raises(ConfigError, match="resume.*must"):
        train(config.replace(output_dir=str(tmp_path / "other"), resume="must"))
    assert not (tmp_path / "other").exists()
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == {path: content for path, content in before.items() if path.name != "run.json"}


def test_where_files_go_and_how_often_is_no_other_config(model, tmp_path):
    config = tiny.config(model, tmp_path / "run", steps=4, checkpoint_every=1)
    next(iter(Trainer(config)))
    assert Trainer(config.replace(checkpoint_every=3, resume="must")).step == 1


def test_a_killed_run_ends_in_the_same_bytes(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, photo in enumerate(tiny.photos()):
        photo.save(photos / f"{i}.png")
    config = tiny.config(model, tmp_path / "killed", images=str(photos), steps=2000, checkpoint_every=3)
    config.to_toml(tmp_path / "config.toml")
    program = "import sys; from palp_fast import TrainConfig, train; train(TrainConfig.from_toml(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "config.toml")], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints, deadline = tmp_path / "killed/checkpoint", time.monotonic() + 120
    while checkpoint.find(checkpoints) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = checkpoint.find(checkpoints)[1]["step"]
    assert 3 <= reached < 2000 and not outputs(tmp_path / "killed")

    def trained(output_dir):
        trainer = Trainer(config.replace(output_dir=str(output_dir)))
        start = trainer.step
        for metrics in trainer:
            if metrics["step"] == reached + 4:
                break
        trainer.save()
        return start, outputs(output_dir)

    assert trained(tmp_path / "killed") == (reached, trained(tmp_path / "whole")[1])


def test_there_is_a_complete_checkpoint_at_every_moment_of_saving(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(5))
    seen, replace, remove = [], os.replace, checkpoint.shutil.rmtree

    def look(function):
        def wrapper(*args, **kwargs):
            seen.append(checkpoint.load(tmp_path)["step"])
            function(*args, **kwargs)
            seen.append(checkpoint.load(tmp_path)["step"])

        return wrapper

    monkeypatch.setattr(os, "replace", look(replace))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", look(remove))
    again = checkpoint.save(tmp_path, state(5, more=1))
    assert set(seen) == {5} and checkpoint.load(tmp_path)["more"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [again.name]


def test_a_run_started_anew_leaves_no_pictures_of_the_earlier_one(model, tmp_path):
    settings = {"steps": 2, "sample_every": 1, "output_dir": str(tmp_path / "out")}
    train(tiny.config(model, **settings))
    (tmp_path / "out" / ".half.safetensors.1.tmp").write_bytes(b"torn")
    result = train(tiny.config(model, **(settings | {"resume": "never", "sample_every": 2})))
    assert {path.parent.name for path in result.samples} == {"step-00000002"}
    assert not list((tmp_path / "out").glob(".*.tmp"))
