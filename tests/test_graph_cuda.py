"""Steps as CUDA graphs on a card: the bits of eager steps, no synchronisation, what is done where a capture fails."""

import pytest
import tiny
import torch
from close import NEEDS_CUDA, NEEDS_CUDA_LIBRARY
from graph_cases import EACH_CASE, assert_same, config_of, trainer_of
from palp_fast import Trainer, previews, train
from palp_fast.metrics import Recorder

pytestmark = [NEEDS_CUDA, NEEDS_CUDA_LIBRARY]
ON = {"device": "cuda", "cuda_graph": True}
OFF = {"device": "cuda", "cuda_graph": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny.model_folder(tmp_path_factory.mktemp(kind), kind) for kind in tiny.KINDS}


@EACH_CASE
def test_replays_are_the_eager_steps(folders, tmp_path, name):
    eager, replayed = (trainer_of(folders, tmp_path / kind, name, **field) for kind, field in (("e", OFF), ("g", ON)))
    list(eager)
    list(replayed)
    assert replayed.graphs.held, "no graph was captured"
    assert_same(eager, replayed)


@EACH_CASE
def test_a_replayed_step_synchronises_nothing(folders, tmp_path, name):
    trainer = trainer_of(folders, tmp_path / "run", name, **ON, steps=100)
    trainer.recorder = Recorder("cuda", 100)
    for _ in range(12):
        trainer._train_step()
    assert trainer.graphs.held
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_resumed_run_ends_in_the_same_bytes(folders, tmp_path):
    """Cut between replays; without graphs until then, and with them from there on."""
    config = config_of(folders, tmp_path / "whole", "accumulation", steps=10, checkpoint_every=4, **ON)
    whole = train(config)
    for metrics in Trainer(config.replace(output_dir=str(tmp_path / "cut"), cuda_graph=False)):
        if metrics["step"] == 6:
            break
    resumed = Trainer(config.replace(output_dir=str(tmp_path / "cut"), resume="must"))
    assert resumed.step == 4
    list(resumed)
    assert resumed.graphs.held
    assert resumed.save().lora.read_bytes() == whole.lora.read_bytes()


@pytest.mark.parametrize("name", ["palp", "accumulation"])
def test_pictures_and_gradients_beside_graphs(folders, tmp_path, monkeypatch, name):
    monkeypatch.setattr(previews, "_STEPS", 2)
    eager = trainer_of(folders, tmp_path / "eager", name, steps=9, **OFF)
    list(eager)
    trainer = trainer_of(folders, tmp_path / "graph", name, steps=9, sample_every=5, **ON)
    for metrics in trainer:
        if metrics["step"] == 7:
            assert trainer.graphs.held
            latents, noise = torch.randn(2, 2, 4, 8, 8)
            trainer.gradients(latents, torch.tensor([20, 400]), noise)
            assert not trainer.graphs.held
    assert trainer.graphs.held
    assert_same(eager, trainer)


@pytest.mark.parametrize("name", ["fp16", "accumulation"])
def test_a_capture_that_fails_leaves_eager_steps(folders, tmp_path, monkeypatch, capsys, name):
    """By a value that is read in the step, which a capture does not allow."""
    eager = trainer_of(folders, tmp_path / "eager", name, **OFF)
    list(eager)
    trainer = trainer_of(folders, tmp_path / "graph", name, **ON)
    right = trainer._loss

    def loss(batch):
        found = right(batch)
        found[0].item()
        return found

    monkeypatch.setattr(trainer, "_loss", loss)
    list(trainer)
    assert "going on without CUDA graphs" in capsys.readouterr().out and not trainer.graphs.are_on
    assert_same(eager, trainer)
