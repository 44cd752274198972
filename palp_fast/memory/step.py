"""One training step in bytes: the prediction with a graph, the no-grad predictions on top of it, the backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from palp_fast import methods
from palp_fast.memory.stock import StockUNet
from palp_fast.memory.tape import Buffer, Ledger, Tape
from palp_fast.memory.unet import Pass


@dataclass(frozen=True)
class Step:
    """Bytes beside weights, gradients and optimizer state.

    saved: alive between the prediction with a graph and the backward pass, the text encoders' part included; forward,
    backward: the most in each of these; split: the most in the no-grad predictions, by how many of them are one pass,
    the most that the memory mode allows first.
    """

    saved: int
    forward: int
    split: dict[int, int]
    backward: int

    @property
    def without_grad(self) -> int:
        """The most in the no-grad predictions, as many at once as may be."""
        return next(iter(self.split.values()), 0)


@dataclass(frozen=True)
class Sizes:
    """Of a step: samples, latents' side, prompt tokens, subjects in a batch, bytes of a number.

    plain: the kinds of operators that plain PyTorch computes (memory/inner.py).
    """

    batch: int
    side: int
    tokens: int
    subjects: int
    itemsize: int
    plain: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Other:
    """Another model as the teacher: its UNet, tokens of its prompts, bytes of a number; waits: it is offloaded."""

    unet: nn.Module | StockUNet
    tokens: int
    itemsize: int
    waits: bool = False


def step(
    unet: nn.Module | StockUNet, cfg, sizes: Sizes, text_saved: int, text_backward: int, grown: bool,
    teacher: Other | None = None,
) -> Step:
    """Of a UNet in its memory mode; grown: LoRA gradients grow during the backward pass, else they are there."""
    ledger = Ledger()
    text = Buffer(ledger, text_saved)
    graph = (_Counted if isinstance(unet, StockUNet) else _Taped)(ledger, unet, cfg, sizes, grown)
    forward, saved = ledger.peak, ledger.alive
    own, other = methods.split(cfg)
    models = [(unet, sizes, own, False)]
    if teacher is not None:
        theirs = replace(sizes, tokens=teacher.tokens, itemsize=teacher.itemsize)
        models.append((teacher.unet, theirs, other, teacher.waits))
    split = {}
    for at_once in sizes_of_split(cfg):
        split[at_once] = max(
            _without_grad(ledger, cfg, unet, sizes, passes, group, waits)
            for unet, sizes, passes, waits in models for group in _groups(passes, at_once))
    ledger.mark()
    graph.backward()
    backward = ledger.peak
    ledger.mark()
    Buffer(ledger, text_backward)
    backward = max(backward, ledger.peak)
    del text
    return Step(saved, forward, split, backward)


class _Taped:
    """The prediction of a lean UNet with its graph, in the ledger; `backward` frees what it keeps."""

    def __init__(self, ledger: Ledger, unet: nn.Module, cfg, sizes: Sizes, grown: bool):
        self.tape = Tape(ledger, sizes.itemsize, True, sizes.plain)
        self.prediction = Pass(
            self.tape, unet, sizes.batch, sizes.side, sizes.tokens, adapted=sizes.batch, count=sizes.batch,
            computed=sizes.subjects, prompt_grad=cfg.learn_token).run()
        if not grown:
            self.tape.leaf_gradients = _Dropped()

    def backward(self) -> None:
        prediction, self.prediction = self.prediction, None
        self.tape.backward(prediction)


class _Counted:
    """The same of diffusers' own modules."""

    def __init__(self, ledger: Ledger, unet: StockUNet, cfg, sizes: Sizes, grown: bool):
        forward, saved, self.most = unet.graph(sizes, cfg.learn_token, grown)
        Buffer(ledger, forward)
        self.ledger, self.saved = ledger, Buffer(ledger, saved)

    def backward(self) -> None:
        Buffer(self.ledger, self.most - self.saved.nbytes)
        self.saved = None


class _Dropped:
    """Gradients that are added to those that are there."""

    def append(self, gradient: Buffer) -> None:
        pass


def sizes_of_split(cfg) -> list[int]:
    """How many no-grad predictions may be one pass: all of a model's, halves, ..., one; in mode "low" one alone."""
    most = max(map(len, methods.split(cfg)))
    if cfg.memory == "low":
        most = min(most, 1)
    return [most >> halved for halved in range(most.bit_length())]


def _groups(passes: list[methods.Pass], at_once: int) -> list[list[methods.Pass]]:
    """No-grad predictions that are one pass, as predict.LeanPredictions makes them."""
    return [passes[first : first + at_once] for first in range(0, len(passes), at_once)]


def _without_grad(
    ledger: Ledger, cfg, unet: nn.Module | StockUNet, sizes: Sizes, passes: list[methods.Pass],
    group: list[methods.Pass], waits: bool,
) -> int:
    """The most bytes alive in one no-grad pass, the `group` of a model's `passes`."""
    if isinstance(unet, StockUNet):
        return ledger.alive + unet.without_grad(sizes, passes)
    ledger.mark()
    fixed = fixed_prompts(cfg) if any(one.lora_scale == methods.TEACHER for one in passes) else 0
    factors = {one.lora_scale for one in group}
    others = {(one.prompt, one.lora_scale) for one in group if one.lora_scale != methods.TEACHER}
    computed = sum(sizes.subjects if prompt == "subject" else 1 for prompt, _ in others)
    Pass(
        Tape(ledger, sizes.itemsize, False, sizes.plain), unet, sizes.batch, sizes.side, sizes.tokens,
        adapted=sizes.batch * len(factors), count=sizes.batch * len(group), computed=computed, fixed=fixed,
        lora=factors != {methods.TEACHER}, waits=waits).run()
    return ledger.peak


def fixed_prompts(cfg) -> int:
    """Prompts that never change: clean, empty and, of nfsd, negative."""
    return 3 if cfg.method == "nfsd" else 2
