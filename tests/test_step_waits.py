"""A training step waits for no device: no value is read, nothing is copied from the host, nothing stays behind.

On a CPU all of this is free, so it is watched by name: operators that bring a value to the host or depend on one, the
ways of a tensor to become a Python value, and tensors made of Python values, which a CUDA device would wait for.
"""

import contextlib
import traceback

import pytest
import tiny
import torch
import traced
from palp_fast import Subject, Trainer, checks
from palp_fast.metrics import Recorder
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# What the device must finish first, what makes a tensor of host memory, what has a size that values decide.
WAITING = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.item}
FROM_HOST = {aten.lift_fresh, aten.lift_fresh_copy, aten.lift}
DATA_DEPENDENT = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.repeat_interleave.Tensor}
MASKING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
READING = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")


class Watch(TorchDispatchMode):
    """Collects the lines of this project that wait; `pause` for what is computed on the host by design."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.paused = [], False
        for name in READING:
            def spy(tensor, *args, right=getattr(torch.Tensor, name), name=name, **kwargs):
                self.note(name)
                return right(tensor, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, spy)

        def getitem(tensor, index, right=torch.Tensor.__getitem__):
            if any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,))):
                self.note("a list as index")
            return right(tensor, index)

        monkeypatch.setattr(torch.Tensor, "__getitem__", getitem)

    def note(self, what):
        if not self.paused:
            frames = [frame for frame in traceback.extract_stack() if "/palp_fast/" in frame.filename]
            lines = [f"{frame.filename.rpartition('/palp_fast/')[2]}:{frame.lineno}" for frame in frames]
            self.found.append(f"{what} at {' < '.join(reversed(lines[-3:]))}")

    @contextlib.contextmanager
    def pause(self):
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def host(self, function):
        def paused(*args, **kwargs):
            with self.pause():
                return function(*args, **kwargs)

        return paused

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packets = (func, func.overloadpacket)
        if any(op in group for group in (WAITING, FROM_HOST, DATA_DEPENDENT) for op in packets):
            self.note(str(func))
        if func.overloadpacket in MASKING and any(one is not None and one.dtype == torch.bool for one in args[1]):
            self.note(f"{func} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny.model_folder(tmp_path_factory.mktemp(kind), kind) for kind in tiny.KINDS}


def two_subjects():
    return {"prompt": "[V1] and [V2]", "subjects": [
        Subject(tiny.photos(2, seed=i), noun, f"[V{i}]", token=f"my{noun}") for i, noun in ((1, "cat"), (2, "dog"))]}


@pytest.mark.parametrize(("kind", "options"), [
    ("sd", {}), ("sd", {"optimizer": "adamw", "grad_accumulation": 2, "token_norm": "initial"}),
    ("sd_v", {"base_dtype": "fp16", "optimizer": "lion8bit", "same_timestep": False, "lr_schedule": "constant"}),
    ("sdxl", {"method": "nfsd", "timesteps": "adaptive"}), ("sd", two_subjects()),
    ("sd", {"memory": "low", "base_dtype": "nf4", "learn_token": False}),
    ("sd", {"teacher": "sd_v", "same_noise": False}),
], ids=["palp", "adamw", "v fp16", "sdxl nfsd", "two subjects", "low nf4", "teacher"])
def test_a_step_waits_for_nothing(folders, tmp_path, monkeypatch, kind, options):
    if "teacher" in options:
        options = options | {"teacher": str(folders[options["teacher"]])}
    trainer = Trainer(tiny.config(folders[kind], tmp_path / "run", steps=100, **options))
    trainer.recorder = Recorder("cpu", 100)
    for _ in range(2):
        trainer._train_step()
    trainer.step -= 1  # what a combination of subjects needs is made once, so the same step is watched again
    with monkeypatch.context() as patch:
        watch = Watch(patch)
        # Which photos and subjects a step has is computed on the host, from its number alone.
        patch.setattr(trainer.draws, "chosen", watch.host(trainer.draws.chosen))
        # Values of arguments are checked on a CPU only.
        patch.setattr(checks, "_can_read", lambda value: False)
        with watch:
            trainer._train_step()
    assert not watch.found, "\n".join(dict.fromkeys(watch.found))


def test_the_watch_sees(monkeypatch):
    """So that the test above can fail."""
    x = torch.ones(3)
    cases = [
        lambda: x.sum().item(), lambda: x.tolist(), lambda: bool(x.all()), lambda: float(x[0]), lambda: int(x[0]),
        lambda: x.cpu(), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.index_put_((x > 0,), torch.zeros(())),
        lambda: x[[0, 1]], lambda: torch.tensor([1.0]),
    ]
    for number, case in enumerate(cases):
        with monkeypatch.context() as patch:
            watch = Watch(patch)
            with watch:
                case()
        assert watch.found, number


@pytest.mark.parametrize("options", [{}, {"grad_accumulation": 2, "optimizer": "adamw"}], ids=["palp", "adamw"])
def test_a_step_leaves_nothing_behind(folders, tmp_path, options):
    """As many bytes alive after each step, gradients included, and every persistent buffer where it was."""
    trainer = Trainer(tiny.config(folders["sd"], tmp_path / "run", steps=100, **options))
    trainer.recorder = Recorder("cpu", 100)
    for _ in range(2):
        trainer._train_step()

    def places():
        tensors = [*trainer.update.named.values(), *trainer.unet.buffers(), trainer.recorder._ring,
                   *(value for state in trainer.update.optimizer.state.values() for value in state.values())]
        return [tensor.data_ptr() for tensor in tensors]

    before, alive = places(), traced.alive()
    for _ in range(2):
        trainer._train_step()
    assert places() == before and traced.alive() == alive
