"""Presets of cards: each fits its card by the estimate, and gives way to given fields."""

import csv

import pytest
import tiny
from palp_fast import TrainConfig, presets
from palp_fast.memory.choose import MARGIN
from palp_fast.memory.estimate import ASSUMED, GIB


@pytest.mark.parametrize("family", presets.FAMILIES)
@pytest.mark.parametrize("card", presets.CARDS)
def test_the_estimate_fits_the_card(card, family):
    estimate = presets.estimate_of(card, family)
    needed = MARGIN * estimate.peak + sum(ASSUMED.values())
    size = int(card.removesuffix("gb")) * GIB
    print(f"{card} {family}: estimate {estimate.peak / GIB:.2f} GiB, needed {needed / GIB:.2f}")
    assert needed <= size


def test_the_family_decides_and_given_fields_win(tmp_path):
    for kind, base in (("sd", "fp32"), ("sdxl", "nf4")):
        folder = tiny.model_folder(tmp_path / kind, kind)
        given = tiny.config(folder, tmp_path / "run").given
        for name in ("batch_size", "grad_accumulation"):
            del given[name]
        cfg = TrainConfig(**given, preset="4gb")
        assert (cfg.resolved().base_dtype, cfg.resolved().batch_size) == (base, 1)
        assert cfg.resolved().resolved() == cfg.resolved()
        assert cfg.replace(base_dtype="int8", memory="fast").resolved().base_dtype == "int8"


def test_measured_figures_come_from_result_rows_alone(tmp_path):
    row = {"kind": "cuda", "model": "sd15", "latents": "4x64x64", "status": "ok", "provider": "palp_fast fast",
           "dtype": "fp16", "peak_bytes": str(3 * 2**29), "step_s": "0.5", "device": "a card"}
    file = tmp_path / "end_to_end-card.csv"
    for changes, expected in (({}, "1.50 GiB, 0.500 s (a card)"), ({"kind": "cpu"}, "not measured"),
                              ({"provider": "palp_fast low"}, "not measured"), ({"status": "failed"}, "not measured")):
        with open(file, "w", newline="") as lines:
            writer = csv.DictWriter(lines, row)
            writer.writeheader()
            writer.writerow(row | changes)
        assert presets.measured("6gb", "sd", [file]) == expected
    assert presets.measured("8gb", "sd", [file]) == "not measured", "the rows are of batch 1"
