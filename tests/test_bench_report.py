"""Tables, plots and predictions: made from the rows alone, the same bytes everywhere; the script for a CUDA machine."""

import dataclasses
import io
import os
import subprocess
import sys

import pytest
from bench import model, operators, plot, report, rows
from bench.machine import ROOT
from PIL import Image

FACTS = dict(started="2026-01-01T00:00:00Z", device="Card", kind="cuda", driver="580.1", threads=4, torch="2.13",
             provider_version="1", palp_fast="0", commit="abc", mode="deterministic quick")
OURS = rows.OperatorRow(
    **FACTS, operator="geglu", shape="SD1.x", dtype="fp16", provider="palp_fast triton", status="ok", note="",
    median_us="10.00", p20_us="9.00", p80_us="12.00", rounds="5", nbytes=1, flops=0, limit_us="5.00", fraction="0.500")
EAGER = dataclasses.replace(OURS, provider="eager", median_us="25.00")
WRONG = dataclasses.replace(OURS, provider="other", status="wrong", note="relative error 1", median_us="", fraction="")
ABSENT = dataclasses.replace(WRONG, provider="xformers", status="unavailable", note="xformers is not installed")
STEP = rows.StepRow(
    **FACTS, model="sd15", latents="4x64x64", dtype="fp16", provider="palp_fast fast", status="ok", note="",
    step_s="0.5", p20_s="0.4", p80_s="0.6", rounds="5", peak_bytes=str(2**30), lora_s="30.00", lora_steps="50")


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Rows of one card and nothing else."""
    monkeypatch.setattr(rows.read, "__defaults__", ("", tmp_path))
    rows.append("geglu", [OURS, EAGER, WRONG, ABSENT], tmp_path)
    rows.append("end_to_end", [STEP, dataclasses.replace(STEP, provider="plain", step_s="1.25")], tmp_path)
    return tmp_path


def test_documents_are_as_the_rows_give_them():
    assert report.outdated() == [], "run python -m bench.report"


def test_tables(measured):
    assert "| geglu | SD1.x | fp16 | 10.0 (9.0, 12.0), triton | 50% | eager 2.50, other wrong (relative error 1) |" in \
        report.operators_table("cuda")
    assert report.absent_table("cuda") == "- other: relative error 1\n- xformers: xformers is not installed"
    assert "| plain | 1.250 (0.400, 0.600) | 2.50 | 1.00 | 30.00 (N = 50) |" in report.steps_table("cuda")
    assert "| sd15, latents 4x64x64, fp16, Card | 2.50 | not measured | not measured |" in report.readme_table()
    assert "eager takes 2.50 times as long" in report.summary("cuda")


def test_without_rows_nothing_is_claimed(measured):
    for name in ("operators on cpu", "steps on cpu", "absent on cpu", "predictions beside measurements"):
        assert report.TABLES[name]() == "not measured"
    text = report.filled("before\n<!-- rows: operators on cpu -->\nold\n<!-- end -->\nafter\n")
    assert text == "before\n<!-- rows: operators on cpu -->\nnot measured\n<!-- end -->\nafter\n"
    with pytest.raises(ValueError, match="table 'nothing'"):
        report.filled("<!-- rows: nothing -->\n<!-- end -->")


def test_layers_without_a_row_are_listed(measured):
    """One row in fp16 of one operator, which is measured in fp16 and bf16."""
    layer, *others = operators.load()["geglu"].shapes
    rows.append("geglu", [dataclasses.replace(OURS, shape=layer)], measured)
    lines = report.missing_table("cuda").splitlines()
    assert f"- geglu: {layer} in bf16; {'; '.join(others)}" in lines and len(lines) == len(operators.load())
    assert report.missing_table("cpu") == "not measured"


def test_an_edited_table_is_found(measured, monkeypatch):
    document = measured / "page.md"
    document.write_text(report.filled("<!-- rows: summary -->\n<!-- end -->\n"))
    monkeypatch.setattr(report, "DOCUMENTS", (document,))
    monkeypatch.setattr(report, "PLOTS", {})
    assert report.outdated() == []
    document.write_text(document.read_text().replace("2.50", "3.50"))
    assert report.outdated() == ["page.md"]


def test_plots_are_pictures_and_repeat(measured):
    made = report.drawn("operators")
    assert made == report.drawn("operators") != report.drawn("steps")
    picture = Image.open(io.BytesIO(made)).convert("RGB")
    drawn = plot.bars("a", [("b", [("palp_fast", 1.0, "1"), ("eager", 2.5, "2.5")])])
    back = Image.open(io.BytesIO(plot.encode(drawn)))
    assert back.size == drawn.size and back.tobytes() == drawn.tobytes()
    assert {picture.getpixel((plot.LABEL + 2, y)) for y in range(picture.height)} >= {(31, 119, 180), (190, 190, 190)}


def test_predictions_are_the_longer_of_their_limits():
    card = model.Card("card", bandwidth=1e9, rate=1e12, source="")
    leaf = model.Leaf("product", flops=2 * 10**9, nbytes=10**6)  # 2 ms of products, 1 ms of traffic
    assert card.seconds([leaf] * 3) == (pytest.approx(6e-3), "products and memory")
    assert card.seconds([model.Leaf("small", 0, 0)] * 1000) == (pytest.approx(1000 * model.LAUNCH), "launches")


def test_flops_of_a_plain_lora_step():
    """Of SD1.x at 512 pixels: forward 0.686 and backward 0.68 TFLOP, and attention's products of 0.117 3.5 times."""
    leaves = model.step("sd15", 64, model.torch.float16, "dreambooth")
    assert sum(leaf.flops for leaf in leaves) == pytest.approx(1.366e12 + 3.5 * 0.117e12, rel=0.02)


def test_script_without_a_cuda_device(tmp_path):
    run = subprocess.run([ROOT / "bench" / "gpu_all.sh", tmp_path], capture_output=True, text=True, timeout=120,
                         env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""})
    assert run.returncode == 0 and "no CUDA device" in run.stdout, run.stdout + run.stderr
