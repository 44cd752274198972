"""Settings of every test: nothing is fetched from the hub, nothing is cached in the user's folders, and forked helpers do not warn about tokenizer threads.

Each test draws its own random numbers, whatever ran before it; PALP_FAST_SEED=1, 2, ... draws others.
"""

import os
import zlib

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PALP_FAST_CACHE"] = "off"
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Before torch is imported: threads of one process that wait for each other at a core are slower than none.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.fixture(autouse=True)
def own_random_numbers(request):
    import torch

    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("PALP_FAST_SEED", "0")))


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    """Environment of builds, which compile each source once in all."""
    from building import compiling

    mine = tmp_path_factory.getbasetemp()
    folder = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "objects"
    folder.mkdir(exist_ok=True)
    return compiling(folder)
