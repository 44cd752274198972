"""Triton kernels on the CPU by Triton's interpreter, which must be switched on before Triton is imported.

Hence a process of its own: TRITON_INTERPRET=1 pytest tests/interpreter. It is silently wrong for bf16: fp32, fp64 only.
"""

import os

import pytest

ON = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if ON else ["test_*.py"]

if ON:
    pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(autouse=True)
def memory_full_of_nan(monkeypatch):
    """What a kernel forgets to write is then seen."""
    import torch

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
