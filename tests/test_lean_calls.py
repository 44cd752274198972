"""Leaf kernels and aten calls of a whole training step, inside operators too, beside the plain diffusers + peft step.

SD1.x's blocks at small width: the counts are those of the full size. Kernels are counted, not run (tests of Triton's
wrappers do the same), so that no number computed here means anything.
"""

import importlib
from collections import Counter

import pytest
import tiny
import torch
from bench.baselines import plain
from diffusers import UNet2DConditionModel
from launching import NO_LAUNCH, TRITON
from palp_fast import Trainer, backend
from palp_fast.nn.lean_attention import LeanAttention
from torch.utils._python_dispatch import TorchDispatchMode


class Leaves(TorchDispatchMode):
    """Names of all that would launch a kernel: not views, not allocations; a compiled operator is one."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if func.namespace == "palp_fast" and name.startswith("frozen_"):
            with self:
                return getattr(importlib.import_module(f"palp_fast.reference.{name.removesuffix('_bwd')}"),
                               f"{name}_ref")(*args)
        if func.namespace == "palp_fast" and name in TRITON:
            module, function = TRITON[name].split(".")
            with self:
                return getattr(importlib.import_module(f"palp_fast.kernels.{module}"), function)(*args)
        if not func.is_view and name not in NO_LAUNCH:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "_unet", lambda sdxl: UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64, 64, 64), norm_num_groups=8, cross_attention_dim=16,
            attention_head_dim=2))
        return tiny.model_folder(tmp_path_factory.mktemp("sd1"))


def plain_leaves(folder):
    model = plain.load(folder, tokens={"zorp": "cat"}, subject_prompts=["a photo of zorp"], dtype=torch.bfloat16,
                       clean_prompt="a sketch of a cat")
    optimizer = plain.make_optimizer(model)
    for group in optimizer.param_groups:
        group["foreach"] = True  # as on a GPU
    with Leaves() as leaves:
        plain.plain_step(model, optimizer, torch.randn(1, 4, 16, 16), plain.Options())
    return leaves.names


def lean_leaves(folder, output_dir, monkeypatch):
    from palp_fast.kernels.launch import watched

    config = tiny.config(folder, output_dir, base_dtype="bf16", batch_size=1, rank=32, resolution=32)
    trainer, right = Trainer(config, lean=True), backend.select
    monkeypatch.setattr(backend, "select", lambda op, *args: "triton" if op in TRITON else right(op, *args))
    monkeypatch.setattr("palp_fast.reference.frozen_conv2d.FEW", 0)  # what follows is as on a GPU
    monkeypatch.setattr(LeanAttention, "_plan", lambda self, x: ("auto", self.recompute))
    trainer.update.zero()
    with Leaves() as leaves, watched(lambda kernel, *_: leaves.names.update([kernel.__name__]), "consumer"):
        loss, _ = trainer._loss(trainer.draws.batch(0, 0))
        trainer.update.backward(loss)
        trainer.update.clip()
        trainer.update.step()
    return leaves.names


def test_a_lean_step_has_a_third_of_the_calls(folder, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    peer, mine = plain_leaves(folder), lean_leaves(folder, tmp_path / "run", monkeypatch)
    assert mine["attention_fwd_kernel"] > 0, "the kernels were not counted"
    for name, found in (("plain", peer), ("lean", mine)):
        print(name, sum(found.values()), found.most_common(20))
    assert sum(mine.values()) <= 0.35 * sum(peer.values())
