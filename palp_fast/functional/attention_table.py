"""Which provider of attention was fastest, by measurement on a GPU. Needs no Triton.

Empty until the benchmark has run: palp_fast/functional/attention_providers.py has the rule for what is not here.
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """What was measured: family of cards (FAMILIES of launch.py), dtype ("float16", "bfloat16", "float32"), width of a
    head, numbers of queries and keys, and "forward" alone or "both" passes in deterministic mode."""

    family: str
    dtype: str
    width: int
    queries: int
    keys: int
    direction: str


TABLE: dict[Case, str] = {}  # the provider: "triton", "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "xformers"
