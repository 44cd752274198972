"""One training step in bytes: the prediction with a graph, the no-grad predictions on top of it, the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from palp_fast import methods
from palp_fast.memory.tape import Buffer, Ledger, Tape
from palp_fast.memory.unet import Pass


@dataclass(frozen=True)
class Step:
    """Bytes beside weights, gradients and optimizer state.

    saved: alive between the prediction with a graph and the backward pass, the text encoders' part included; forward,
    without_grad, backward: the most in each of these.
    """

    saved: int
    forward: int
    without_grad: int
    backward: int


@dataclass(frozen=True)
class Sizes:
    """Of a step: samples, latents' side, prompt tokens, subjects in a batch, bytes of a number; on a card or a CPU."""

    batch: int
    side: int
    tokens: int
    subjects: int
    itemsize: int
    on_card: bool = True


def step(unet: nn.Module, cfg, sizes: Sizes, text_saved: int, text_backward: int, grown: bool) -> Step:
    """Of a lean UNet in its memory mode; grown: LoRA gradients grow during the backward pass, else they are there."""
    ledger = Ledger()
    text = Buffer(ledger, text_saved)
    tape = Tape(ledger, sizes.itemsize, True, sizes.on_card)
    prediction = Pass(
        tape, unet, sizes.batch, sizes.side, sizes.tokens, adapted=sizes.batch, count=sizes.batch,
        computed=sizes.subjects, prompt_grad=cfg.learn_token).run()
    forward, saved = ledger.peak, ledger.alive
    without_grad = max((_without_grad(ledger, unet, cfg, sizes, group) for group in _groups(cfg)), default=0)
    ledger.mark()
    if not grown:
        tape.leaf_gradients = _Dropped()
    tape.backward(prediction)
    backward = ledger.peak
    ledger.mark()
    Buffer(ledger, text_backward)
    backward = max(backward, ledger.peak)
    del text
    return Step(saved, forward, without_grad, backward)


class _Dropped:
    """Gradients that are added to those that are there."""

    def append(self, gradient: Buffer) -> None:
        pass


def _groups(cfg) -> list[list[methods.Pass]]:
    """No-grad predictions that are one pass, as predict.LeanPredictions makes them."""
    passes = methods.passes(cfg)
    return [[one] for one in passes] if cfg.memory == "low" else [passes] if passes else []


def _without_grad(ledger: Ledger, unet: nn.Module, cfg, sizes: Sizes, group: list[methods.Pass]) -> int:
    """The most bytes alive in one no-grad pass."""
    ledger.mark()
    fixed = fixed_prompts(cfg) if any(one.lora_scale == methods.TEACHER for one in methods.passes(cfg)) else 0
    factors = {one.lora_scale for one in group}
    others = {(one.prompt, one.lora_scale) for one in group if one.lora_scale != methods.TEACHER}
    computed = sum(sizes.subjects if prompt == "subject" else 1 for prompt, _ in others)
    Pass(
        Tape(ledger, sizes.itemsize, False, sizes.on_card), unet, sizes.batch, sizes.side, sizes.tokens,
        adapted=sizes.batch * len(factors), count=sizes.batch * len(group), computed=computed, fixed=fixed,
        lora=factors != {methods.TEACHER}).run()
    return ledger.peak


def fixed_prompts(cfg) -> int:
    """Prompts that never change: clean, empty and, of nfsd, negative."""
    return 3 if cfg.method == "nfsd" else 2
