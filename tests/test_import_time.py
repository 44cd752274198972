"""`import palp_fast` stays light: diffusers and transformers load on first use, and so does torch."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "peft", "safetensors")


def python(code):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout


def seconds(code):
    start = time.perf_counter()
    python(code)
    return time.perf_counter() - start


def test_import_loads_nothing_heavy():
    assert python(f"import sys, palp_fast; print([m for m in {HEAVY} if m in sys.modules])").strip() == "[]"


def test_config_loads_nothing_heavy():
    code = f"import sys, palp_fast; palp_fast.TrainConfig; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_import_takes_at_most_half_as_long_again_as_torch():
    python("import torch, palp_fast")
    torch, ours = (min(seconds(f"import {name}") for _ in range(2)) for name in ("torch", "palp_fast"))
    assert ours <= 1.5 * torch, f"import torch {torch:.2f} s, import palp_fast {ours:.2f} s"


def test_operators_do_not_import_diffusers():
    python("import sys; from palp_fast import functional, optim, sampler; assert 'diffusers' not in sys.modules")


def test_public_names_are_there_and_not_hidden_by_submodules():
    python("""
import palp_fast.generate
from palp_fast.evaluate import evaluate as from_submodule
from palp_fast import *
import palp_fast
assert callable(palp_fast.generate) and callable(palp_fast.train)
assert palp_fast.evaluate is evaluate is from_submodule
assert set(palp_fast.__all__) <= set(dir(palp_fast))
""")


def test_unknown_names_are_refused():
    assert "no attribute 'trian'" in python(
        "import palp_fast\ntry: palp_fast.trian\nexcept AttributeError as error: print(error)"
    )
