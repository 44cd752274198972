"""bench/quality.py: its plan, its rows, its verdicts, and one tiny run of all of it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import curves, quality, quality_report
from bench.quality_report import Results
from PIL import Image

from palp_fast import ConfigError
from palp_fast.prompts import clean_prompt
from palp_fast.zoo.judge import JUDGES, available
from palp_fast.zoo.world import World

BASE, DREAMBOOTH, PALP = ("base", 0), ("dreambooth", 500), ("palp", 500)
SUBJECTS = ("cow face", "skunk", "purse", "mate")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder with sprites of one held-out subject and of a guitar: a disc and a square. The rest is empty."""
    folder, world = tmp_path_factory.mktemp("cache"), World.load()
    shape = (len(world.subjects), 3, 96, 96, 4)
    sprites = np.lib.format.open_memmap(folder / "sprites.npy", "w+", np.uint8, shape)
    names, (y, x) = [subject.name for subject in world.subjects], np.mgrid[:96, :96]
    sprites[names.index(held(world))][:, (x - 48) ** 2 + (y - 48) ** 2 < 40**2] = (250, 120, 0, 255)
    sprites[names.index("guitar")][:, 20:70, 20:70] = (0, 0, 0, 255)
    sprites.flush()
    return folder


def held(world):
    return world.having("development")[0].name


def row(subject, cell, joint, target=0, seed=0, **more):
    values = {"style": 0.5, "background": 1.0, "second": 0.25, "identity": joint, "joint": joint, "diversity": 0.3,
              "text_alignment": 0.2, "image_alignment": 0.4}
    return {"subject": subject, "target": target, "method": cell[0], "seed": seed, "step": cell[1],
            "judges": dict.fromkeys(JUDGES, values)} | more


def rows(joints):
    """{cell: joint of each subject}."""
    return [row(subject, cell, joint) for cell, values in joints.items()
            for subject, joint in zip(SUBJECTS, values, strict=True)]


def test_methods_are_named_with_their_fields():
    found = quality.methods_named(["dreambooth", "palp:residual_weight=0.3,timesteps=uniform"])
    assert found["dreambooth"] == {"method": "dreambooth"}
    assert found["palp:residual_weight=0.3,timesteps=uniform"] == {
        "method": "palp", "residual_weight": 0.3, "timesteps": "uniform"}
    for wrong in ("lora", "palp:steps=3", "palp:lr", "palp:clean_prompt=a car"):
        with pytest.raises(ConfigError, match="allowed"):
            quality.methods_named([wrong])


@pytest.mark.parametrize("phrase, clean", [("", "a line drawing of a car on grass"),
                                           (":class_phrase=something", "a line drawing of something on grass")])
def test_class_phrase_stands_for_the_subject_in_the_clean_prompt(phrase, clean):
    plan = quality.Plan("emoji-64", ("bus",), (0,), (0,), quality.methods_named([f"palp{phrase}"]))
    config = plan.training(f"palp{phrase}", "a line drawing of [V] on grass", "photos", "car", output_dir=".")
    assert clean_prompt(config.prompt, config.subjects) == clean and config.subjects[0].class_noun == "car"


def test_only_dreambooth_is_measured_on_the_way_where_one_step_is_asked_for():
    methods = quality.methods_named(["dreambooth", "dreambooth:rank=2", "palp", "sds"])
    plan = quality.Plan("emoji-64", ("bus",), (0,), (0,), methods, steps=(1, 2, 3), only_step=2)
    assert [plan.steps_of(method) for method in ("base", *methods)] == [(0,), (1, 2, 3), (1, 2, 3), (2,), (2,)]
    assert replace(plan, only_step=None).steps_of("palp") == (1, 2, 3)


def test_the_ablation_is_cumulative():
    assert not quality.METHODS["palp different noise"]["rescale"] and not quality.METHODS["palp same noise"]["rescale"]
    assert not quality.METHODS["palp different noise"]["same_noise"]
    assert "same_noise" not in quality.METHODS["palp same noise"] and quality.METHODS["palp"] == {"method": "palp"}


@pytest.mark.parametrize("wrong", [
    ["--subject", "fox"], ["--target", "6"], ["--images", "1"], ["--steps", "0"], ["--steps", "100"],
    ["--set", "learning_rate=1"], ["--set", "lr=-1"], ["--method", "lora"], ["--jobs", "0"]])
def test_wrong_arguments_are_refused_before_any_work(wrong, tmp_path):
    with pytest.raises(ConfigError):
        quality.main(["--cache", str(tmp_path / "none"), "--output", str(tmp_path / "out"), *wrong])
    assert not (tmp_path / "out").exists()


def test_the_halves_are_apart():
    from argparse import Namespace

    world = World.load()
    lists = dict.fromkeys(("subject", "target", "seed", "method", "set"), [])
    options = {"model": "emoji-64", "quick": False, "steps": [500], "images": 16, "palp_step_only": False} | lists
    plans = [quality.plan_of(Namespace(acceptance=half, **options), world) for half in (False, True)]
    assert [len(plan.subjects) for plan in plans] == [20, 21]
    assert {world.named(name).role for name in plans[0].subjects} == {"development"}
    assert {world.named(name).role for name in plans[1].subjects} == {"acceptance"}


def test_means_are_of_subjects_that_have_every_row():
    data = rows({BASE: (0, 0, 0, 0), PALP: (1, 1, 0, 0)})
    data += [row("tractor", PALP, 1.0), row("skunk", PALP, 0.0, target=3)]
    results = Results(data, "emoji-64")
    assert results.subjects == sorted(SUBJECTS)
    assert dict(zip(results.subjects, results.by_subject(PALP, "joint"))) == {
        "cow face": 1, "skunk": 0.5, "purse": 0, "mate": 0}
    second = dict(zip(results.subjects, results.by_subject(PALP, "second")))
    assert second["skunk"] == 0.25 and np.isnan(second["purse"])


def test_bootstrap_intervals_are_over_subjects():
    results = Results(rows({PALP: (0.25, 0.25, 0.75, 0.75), BASE: (0.5,) * 4}), "emoji-64")
    low, high = results.interval(lambda means: means[:, 0], [PALP])
    assert low == 0.25 and high == 0.75
    assert results.interval(lambda means: means[:, 0], [BASE]) == (0.5, 0.5)


def test_verdicts_compare_palp_with_the_best_dreambooth():
    cells = {BASE: (0.1,) * 4, ("dreambooth", 100): (0.2,) * 4, DREAMBOOTH: (0.1,) * 4, PALP: (0.6, 0.7, 0.6, 0.7)}
    data = rows(cells)
    for entry in data:
        if (entry["method"], entry["step"]) == DREAMBOOTH:
            entry["photo"] = dict.fromkeys(JUDGES, 0.75)
    text = quality_report.verdicts([Results(data, name) for name in JUDGES], 500)
    assert "best dreambooth (step 100) >= 15 points | +45.0 points | yes |" in text
    assert ">= 80 % | 75.0% | no |" in text and "above 0 | +40.0 points to +50.0 points | yes |" in text
    assert "base >= 25 points | +55.0 points | yes |" in text and "under the base's | +0.0 points | no |" in text
    assert "not measured: there is one judge" in quality_report.verdicts([Results(data, "emoji-64")], 500)
    assert "not measured" in quality_report.verdicts([Results(rows({BASE: (0,) * 4}), "emoji-64")], 500)


def test_judges_that_rank_otherwise_are_seen():
    one, other = rows({BASE: (0.1,) * 4, PALP: (0.6,) * 4}), rows({BASE: (0.7,) * 4, PALP: (0.6,) * 4})
    both = [Results(one, "emoji-64"), Results(other, "emoji-64-second")]
    assert quality_report.order_agreement(both, [BASE, PALP]) == 0
    assert quality_report.order_agreement([both[0]] * 2, [BASE, PALP]) == 1


def test_charts_have_a_line_for_each_method():
    image = curves.chart({"text": {"palp": [(0, 0.1), (500, 0.4)], "dreambooth": [(0, 0.1), (500, 0.0)]}}, "steps")
    colours = {colour for _, colour in image.getcolors(1 << 16)}
    assert {(31, 119, 180), (214, 39, 40)} <= colours


def test_a_tiny_run_from_training_to_report(cache, tmp_path, capsys):
    world, output = World.load(), tmp_path / "out"
    arguments = ["--cache", str(cache), "--output", str(output), "--subject", held(world), "--target", "3", "--steps",
                 "1", "2", "--palp-step", "2", "--images", "2", "--method", "dreambooth", "--method", "palp",
                 "--set", "batch_size=1", "--set", "rank=2", "--jobs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "SAMPLING_STEPS", 2)
        quality.main(arguments)
        lines = [line for line in (output / "rows.jsonl").read_text().splitlines() if line]
        assert [(json.loads(line)["method"], json.loads(line)["step"]) for line in lines] == [
            ("base", 0), ("dreambooth", 1), ("dreambooth", 2), ("palp", 1), ("palp", 2)]
        assert all(0 <= json.loads(line)["judges"][name]["joint"] <= 1 for line in lines for name in available())
        # Cut short by a kill: the run of the last line is done again, the others are not.
        (output / "rows.jsonl").write_text("\n".join(lines)[:-40])
        capsys.readouterr()
        quality.main(arguments)
        assert "0 of 1 left" in capsys.readouterr().out
        again = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines() if line.endswith("}")]
        seconds = "train_seconds"
        assert {key: value for key, value in again[-1].items() if key != seconds} == {
            key: value for key, value in json.loads(lines[-1]).items() if key != seconds}
        # PALP to one step alone: DreamBooth's rows hold, PALP's is of its own training, shorter than DreamBooth's.
        quality.main([*arguments, "--palp-step", "1", "--palp-step-only"])
        assert "0 of 1 left" in capsys.readouterr().out
        last = json.loads((output / "rows.jsonl").read_text().splitlines()[-1])
        assert (last["method"], last["step"]) == ("palp", 1)
        assert "| palp | 1 |" in (output / "report.md").read_text() and "| palp | 2 |" not in (
            output / "report.md").read_text()
        quality.main(arguments)
        capsys.readouterr()
        # DreamBooth never sees the target: one training gives the rows of all, the same as one for each.
        quality.main(arguments[:-10] + ["--target", "0", "--method", "dreambooth", *arguments[-6:],
                                       "--output", str(tmp_path / "both")])
        assert capsys.readouterr().out.count("dreambooth, seed 0") == 1
        both = [json.loads(line) for line in (tmp_path / "both" / "rows.jsonl").read_text().splitlines() if line]
        joint, alone = ([{key: value for key, value in row.items() if key != seconds} for row in rows
                         if (row["method"], row["target"]) == ("dreambooth", 3)]
                        for rows in (both, [json.loads(line) for line in lines]))
        assert joint == alone and len(joint) == 2
    assert (output / "report.md").read_text().count("| palp | 2 |") == len(available())
    assert Image.open(output / "sheet-3.png").size == (64 * 8, 16 + 64)
    assert (output / "curves-emoji-64.png").exists()


def test_jobs_give_the_rows_of_one_process(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "SAMPLING_STEPS", 1)
    threads, found = torch.get_num_threads(), {}
    try:
        for jobs in ("1", "2"):
            torch.set_num_threads(int(jobs))  # one in each process
            quality.main(["--cache", str(cache), "--output", str(tmp_path / jobs), "--subject", held(World.load()),
                          "--target", "0", "--steps", "1", "--palp-step", "1", "--images", "2", "--method",
                          "dreambooth", "--method", "palp", "--set", "rank=2", "--jobs", jobs])
            lines = (tmp_path / jobs / "rows.jsonl").read_text().splitlines()
            found[jobs] = sorted(({key: value for key, value in json.loads(line).items() if key != "train_seconds"}
                                  for line in lines if line), key=lambda row: row["method"])
    finally:
        torch.set_num_threads(threads)
    assert found["1"] == found["2"] and len(found["1"]) == 3


POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from bench.quality_runs import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""


def test_workers_end_when_the_run_is_killed(tmp_path):
    """A file, not -c: spawned workers import the script that started them."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    paths = os.pathsep.join([str(Path(quality.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
                           env=os.environ | {"PYTHONPATH": paths})
    worker = int(run.stdout.readline())
    os.kill(worker, 0)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(worker)


def _alive(pid):
    """Whether it runs: a process that has ended may wait to be collected."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
