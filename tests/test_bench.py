"""The benchmarks: every provider right on small layers, the gate, the counters' limits, rows, the command line."""

import dataclasses
import importlib
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from bench import base, guard, operators, rows, run
from bench.bench_optimizers import ADAMW, stepping
from bench.core import Operator
from bench.machine import ROOT, Roofline
from bench.timing import interleaved
from click.testing import CliRunner

from palp_fast import cli, functional, optim

CPU, FLOAT = torch.device("cpu"), torch.float32
SMALL = {
    "AdamW8bit": ({16: 2}, 12), "Lion8bit": ({16: 2}, 12), "add_noise": (4, 32), "attention": (6, 5, 16, 2),
    "dequantise": (3, 128, "nf4"), "frozen_conv2d": (8, 6, 5), "frozen_linear": (5, 8, 6), "geglu": (5, 4),
    "group_norm_silu": (64, 4), "layer_norm": (5, 8), "lora_attention": (6, 16, 2, 12), "lora_linear": (5, 16),
    "lora_projections": (5, 16), "quantise": (3, 128, "nf4"), "renoise": (2, 8, 2, True), "sampler": ("adaptive", 4),
    "score_combination": (2, 8), "score_residual": (2, 8),
}


def small(name: str, **changes) -> Operator:
    return dataclasses.replace(operators.load()[name], shapes={"small": SMALL[name]}, **changes)


def test_every_public_operator_has_a_benchmark():
    public = {name for name in functional.__all__ if name[0].islower()}
    public -= {"inexact_products"}  # a mode of other operators
    assert public < set(operators.load()) == set(SMALL)
    assert set(optim.__all__) - {"AdamW"} < set(SMALL) and "palp_fast AdamW" in small("AdamW8bit").providers()


@pytest.mark.parametrize("file", sorted(Path(operators.__file__).parent.glob("bench_*.py")), ids=lambda file: file.stem)
def test_every_file_has_layers_providers_and_formulas(file):
    module = importlib.import_module(f"bench.{file.stem}")
    layers = {name for operator in module.OPERATORS for name in operator.shapes}
    assert module.SHAPES and module.PROVIDERS is not None and "ytes" in module.__doc__
    assert all(operator.shapes is module.SHAPES for operator in module.OPERATORS)
    if file.stem != "bench_sampler":  # it has no layers
        assert {"SD1.x", "SDXL"} <= {re.split("[ ,]", name)[0] for name in layers}


@pytest.mark.parametrize("name", SMALL)
def test_providers_are_right(name):
    """All that are installed, but what torch.compile makes: that takes seconds each."""
    operator = small(name)
    wanted = [provider for provider in operator.providers() if provider != "torch.compile"]
    calls, problems = run.right(operator, operator.problem("small", FLOAT, CPU), FLOAT, wanted)
    assert {"palp_fast reference", operator.home(CPU)} <= set(calls)
    assert all(status == "unavailable" and "Error" not in note for status, note in problems.values()), problems


# Off by a part in ten thousand or more: in the result, in the gradient alone, in a setting.
WRONG = {
    "geglu": lambda problem: lambda x: 1.0001 * functional.geglu(x),
    "layer_norm": lambda problem: lambda x: functional.layer_norm(x, **problem.others, eps=1e-3),
    "frozen_linear": lambda problem: lambda x: functional.frozen_linear(
        1.001 * x - 0.001 * x.detach(), **problem.others),
    "AdamW8bit": lambda problem: stepping(problem, optim.AdamW8bit, **{**ADAMW, "lr": 1.1e-3}),
    "quantise": lambda problem: lambda weight: (lambda codes, scale: (codes, 1.0001 * scale))(
        *operators.load()["quantise"].formula(problem)(weight)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_provider_is_shown_and_not_timed(name):
    operator = small(name, peers={"wrong": WRONG[name]})
    made = bench().measure(operator, "small", FLOAT, ["wrong", "eager"])
    by_provider = {row.provider: row for row in made}
    assert by_provider["eager"].status == "ok" and float(by_provider["eager"].median_us) > 0
    assert by_provider["wrong"].status == "wrong" and "relative error" in by_provider["wrong"].note
    assert by_provider["wrong"].median_us == by_provider["wrong"].fraction == ""
    assert "wrong: relative error" in run.table(operator, made, CPU)


def test_results_that_were_kept_are_wrong():
    """A provider that computes once and then answers from memory."""

    def kept(problem):
        copy = problem.leaves[0].clone().requires_grad_()
        out = functional.geglu(copy)
        (gradient,) = torch.autograd.grad(out, copy, problem.upstream)

        class Kept(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return out.detach().clone()

            @staticmethod
            def backward(ctx, upstream):
                return gradient.clone()

        return Kept.apply

    operator = small("geglu", peers={"kept": kept})
    _, problems = run.right(operator, operator.problem("small", FLOAT, CPU), FLOAT, ["kept"])
    assert problems["kept"] == ("wrong", "the same results for other inputs")


def test_a_provider_that_cannot_serve_is_listed_with_the_reason():
    rows_of = {row.provider: row for row in bench().measure(small("attention"), "small", FLOAT, ["sdpa", "cpu"])}
    assert rows_of["sdpa flash"].note == "it serves cuda tensors"
    assert rows_of["palp_fast cpu"].status == "unavailable" and "C++" in rows_of["palp_fast cpu"].note


def bench() -> run.Bench:
    return run.Bench(CPU, True, 0.01, Roofline(1e9, {"fp32": 1e9}))


def test_limit_and_fraction():
    """4 bytes a nanosecond, 2 FLOP a nanosecond."""
    roofline = Roofline(4e9, {"fp32": 2e9})
    assert roofline.seconds(8_000_000_000, 2_000_000_000, FLOAT) == 2.0
    assert roofline.seconds(4_000_000_000, 6_000_000_000, FLOAT) == 3.0


def test_providers_take_turns():
    seen = []
    found = interleaved({name: partial(seen.append, name) for name in "ab"}, CPU, 0.0, least=4)
    assert "".join(seen) == "ab" * 5 and {row.rounds for row in found.values()} == {4}


def test_counters_are_within_their_limits():
    found = dict(guard.counted(everything=False))
    assert {"geglu", "lora_attention", "score_residual"} <= {case.partition(",")[0] for _, case in found}
    assert guard.over(found, guard.read_limits()) == []


@pytest.mark.parametrize("name", guard.COMPILED)
def test_kernels_are_within_their_limits(name):
    pytest.importorskip("triton", reason="triton is not installed")
    operator = operators.load()[name]
    found = guard.resources(operator, next(iter(operator.shapes)))
    assert found and guard.over(found, guard.read_limits()) == []


def extra_product(problem, backend):
    weight = problem.others["weight"]
    return lambda x, a, b: functional.lora_linear(x, weight, None, a, b, backend=backend) + 0 * (x @ weight.T)


# A cheat: what it does, and the counters that it exceeds.
CHEATS = {
    "lora_linear": (extra_product, {"flops", "declared flops", "leaf operators"}),
    "geglu": (lambda problem, backend: operators.load()["geglu"].formula(problem), {"saved bytes"}),
    "layer_norm": (lambda problem, backend: lambda x: functional.layer_norm(
        functional.layer_norm(x, backend=backend), **problem.others, backend=backend),
        {"saved bytes", "leaf operators", "launches"}),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheating_operator_exceeds_a_limit(name):
    ours, counters = CHEATS[name]
    counters = counters - (set() if importlib.util.find_spec("triton") else {"launches"})
    operator = operators.load()[name]
    shape = next(iter(operator.shapes))
    found = guard.count(dataclasses.replace(operator, ours=ours), shape)
    problems = guard.over(found, guard.read_limits())
    assert counters <= {problem.partition(",")[0] for problem in problems}, problems


def test_a_slowed_optimizer_exceeds_its_limit(monkeypatch):
    """One step per tensor in place of one for all."""
    def one_by_one(problem, kind, **options):
        steps = [stepping(guard._Given([param]), kind, **options) for param in problem.others["params"]]
        return lambda: [step() for step in steps]

    monkeypatch.setattr(guard, "stepping", one_by_one)
    problems = guard.over(guard.optimizer_calls(), guard.read_limits())
    assert len(problems) == 2 or not guard.optimizer_calls(), problems


def test_a_counter_without_a_limit_is_a_problem():
    assert guard.over({("flops", "new"): 1}, {}) == ["flops, new: 1, and bench/limits.csv has no limit"]


def test_rows_are_appended_and_the_last_run_counts(tmp_path):
    """Whole: what an earlier run has of another provider is not compared with it."""
    first = bench().measure(small("layer_norm"), "small", FLOAT, ["reference", "eager"])
    other = dataclasses.replace(first[0], median_us="7.00", device="Other, 2 (R)")
    newest = dataclasses.replace(first[0], median_us="9.00", started="2030-01-01T00:00:00Z")
    paths = rows.append("layer_norm", [*first, other], tmp_path) + rows.append("layer_norm", [newest], tmp_path)
    assert {path.name for path in paths} >= {"layer_norm-other-2-r.csv"}
    assert len(first) == 2 and len(paths[0].read_text().splitlines()) == 4
    found = [(row.device, row.provider, row.median_us) for row in rows.read(rows.OperatorRow, folder=tmp_path)]
    assert found == [(newest.device, "palp_fast reference", "9.00"), ("Other, 2 (R)", "palp_fast reference", "7.00")]
    assert rows.read(rows.StepRow, folder=tmp_path) == []


def test_missing_cases_are_those_without_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(rows.read, "__defaults__", ("", tmp_path))
    operator = small("layer_norm")
    cases = [(operator, "small", FLOAT), (operator, "small", torch.bfloat16)]
    assert run.missing(cases, CPU) == cases
    rows.append("layer_norm", bench().measure(operator, "small", FLOAT, ["eager"]), tmp_path)
    assert run.missing(cases, CPU) == cases[1:]


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure_roofline", lambda *_: Roofline(1e9, {"fp32": 1e9, "bf16": 1e9}))
    file, some = tmp_path / "rows.json", ["--provider", "reference", "--provider", "eager", "--device", "cpu"]
    result = CliRunner().invoke(cli.main, [
        "bench", "--op", "layer_norm", "--shape", "SD1.x 16x16", "--quick", "--seconds", "0.01", "--json", str(file),
        *some])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert [row["provider"] for row in found if "provider" in row] == ["palp_fast reference", "eager"]
    assert "palp_fast at" in capsys.readouterr().out + result.output


@pytest.mark.parametrize(("arguments", "message"), [
    (["--op", "nothing"], "--op 'nothing': allowed are parts of add_noise, "),
    (["--shape", "nothing"], "--shape ['nothing']: no layer"),
    (["--base", "no-such-revision"], "--base 'no-such-revision': git knows no such commit"),
])
def test_command_line_refuses(arguments, message):
    result = CliRunner().invoke(cli.main, ["bench", *arguments])
    assert result.exit_code == 2 and message in result.output, result.output


class Timed:
    """A side of a comparison whose calls take so many microseconds, or that says why not."""

    def __init__(self, microseconds=None):
        self.answer = {"error": "ValueError: no such operator"} if microseconds is None else {
            "median": microseconds * 1e-6}

    def time(self, *case):
        return self.answer


def test_a_slowed_operator_is_seen_beside_its_base():
    case = "geglu", "SD1.x 32x32", "float32", 0.1
    line = base.compared({"here": Timed(20), "base": Timed(10)}, *case)
    assert line == "geglu, SD1.x 32x32, float32: 20.0 us, base 10.0 us: 0.50x the base's speed"
    line = base.compared({"here": Timed(20), "base": Timed()}, *case)
    assert line == "geglu, SD1.x 32x32, float32: base ValueError: no such operator"


def test_a_slowed_package_is_seen_beside_this_one(tmp_path):
    """Two processes, each with its own palp_fast; the other's waits 20 ms in every call of layer_norm."""
    package = tmp_path / "palp_fast"
    shutil.copytree(ROOT / "palp_fast", package, copy_function=os.symlink)
    public = package / "functional" / "__init__.py"
    text = public.read_text()
    public.unlink()  # the link
    public.write_text(text + "\n\nimport time\nfast = layer_norm\nlayer_norm = lambda *args, **options: ("
                             "time.sleep(0.02), fast(*args, **options))[1]\n")
    sides = {"here": base.Side(None, "cpu", 1), "base": base.Side(tmp_path, "cpu", 1)}
    line = base.compared(sides, "layer_norm", "SD1.x 16x16", "float32", 0.02)
    for side in sides.values():
        side.close()
    here, there = map(float, re.findall(r"([\d.]+) us", line))
    assert there > 20_000 > 3 * here, line


def test_files_of_a_commit_are_kept(tmp_path, monkeypatch):
    """In a checkout of its own, whose last commit changes the package; its csrc/ is that of the first."""
    for folder in ("palp_fast/lib", "kernels/palp", "csrc"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in (("palp_fast/__init__.py", "then"), ("kernels/palp/k.py", ""), ("csrc/a.cpp", "")):
        (tmp_path / name).write_text(text)
    (tmp_path / ".gitignore").write_text("lib/\nruns/\n")
    monkeypatch.setattr(base, "ROOT", tmp_path)
    monkeypatch.setattr(base, "BASES", tmp_path / "runs" / "base")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a"]
    base._git("init", "-q", check=True)
    base._git("add", ".", check=True)
    base._git(*who, check=True)
    (tmp_path / "palp_fast" / "__init__.py").write_text("now")
    base._git(*who, "-a", check=True)
    (tmp_path / "palp_fast" / "lib" / "library.so").write_text("compiled")
    package = base.package_of("HEAD~1")
    assert (package / "palp_fast" / "__init__.py").read_text() == "then"
    assert (package / "palp_fast" / "lib" / "library.so").exists() and (package / "palp_fast" / "kernels").is_dir()
    assert [path.name for path in package.parent.iterdir()] == ["package"] and base.package_of("HEAD~1") == package


def test_bench_outside_of_a_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "palp_fast" / "cli.py"))
    result = CliRunner().invoke(cli.main, ["bench"])
    assert result.exit_code == 2 and "palp-fast bench runs in a checkout of the repository" in result.output
