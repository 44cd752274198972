"""Trainings that are run with and without CUDA graphs, and the comparison of two of them."""

import json

import pytest
import tiny
import torch
from palp_fast import Subject, Trainer
from palp_fast.metrics import Recorder
from replayed import trained

STEPS = 6


def two_subjects():
    return {"prompt": "[V1] and [V2]", "batch_size": 1, "subject_sampling": "subject", "seed": 3, "subjects": [
        Subject(tiny.photos(2, seed=i), noun, f"[V{i}]", token=f"my{noun}") for i, noun in ((1, "cat"), (2, "dog"))]}


CASES = {
    "palp": ("sd", {}),
    "accumulation": ("sd", {"grad_accumulation": 2, "optimizer": "adamw", "token_norm": "initial"}),
    "two subjects": ("sd", two_subjects()),
    "two subjects, accumulation": ("sd", two_subjects() | {"grad_accumulation": 3, "optimizer": "lion8bit"}),
    "v, adaptive": ("sd_v", {"timesteps": "adaptive", "loss_space": "eps", "lr_schedule": "linear"}),
    "all drawn anew": ("sd_v", {"same_timestep": False, "same_noise": False, "rescale": False,
                                "timesteps": "uniform", "lr_schedule": "cosine"}),
    "sdxl nfsd": ("sdxl", {"method": "nfsd", "optimizer": "lion8bit", "learn_token": False}),
    "fp16": ("sd", {"base_dtype": "fp16", "lr_schedule": "linear"}),
    "nf4 low": ("sd", {"memory": "low", "base_dtype": "nf4", "learn_token": False}),
    "teacher": ("sd", {"teacher": "sd_v", "method": "sds", "memory": "balanced"}),
    "dreambooth": ("sd", {"method": "dreambooth", "token_vectors": 2, "lora_targets": "cross_kv"}),
}
EACH_CASE = pytest.mark.parametrize("name", CASES)


def config_of(folders, output_dir, name, **more):
    """folders: {kind: folder of a tiny model}; more: fields beside those of the case."""
    kind, options = CASES[name]
    options = {"steps": STEPS, "lr": 1e-2} | options | more
    if "teacher" in options:
        options["teacher"] = str(folders[options["teacher"]])
    return tiny.config(folders[kind], output_dir, **options)


def trainer_of(folders, output_dir, name, **more):
    """Its metrics are read every four steps."""
    trainer = Trainer(config_of(folders, output_dir, name, **more))
    trainer.recorder = Recorder(trainer.components.device, 4)
    return trainer


def lines(trainer):
    written = (trainer.folder.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0} for line in written]


def assert_same(one, other):
    """Metrics and all that was trained, bit for bit."""
    assert lines(one) == lines(other)
    for number, pair in enumerate(zip(trained(one), trained(other), strict=True)):
        assert torch.equal(*pair), number
