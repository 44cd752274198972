"""Predicts a PALP step on cards that are not at hand: python -m bench.model [--record].

Counted: every leaf call of the UNet's three passes (gradient forward, backward, four predictions without gradient) at
real size, on the meta device, with its matrix FLOPs and bytes. Predicted: the sum over calls of the longer of
FLOPs / tensor rate and bytes / bandwidth, or the number of calls times the cost of a launch if that is longer. This is
a floor: no kernel reaches its card's figures. Where a machine has measured rows, its own prediction is put beside them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.overrides import TorchFunctionMode

from bench import rows
from bench.counters import Counter, Leaf
from bench.layers import RANK
from bench.random_model import UNETS, unet
from bench.rows import PredictionRow, RooflineRow, StepRow
from palp_fast import ops  # noqa: F401  (registers the operators)
from palp_fast.reference.dtypes import BASE_DTYPES

SAMPLES = 4  # predictions without gradient
LAUNCH = 5e-6  # seconds of an eager PyTorch call that launches a kernel: assumed, its order of magnitude
SPECIFICATIONS = "NVIDIA's product page: cores, boost clock, memory; 4 FLOP per core and clock (Ada whitepaper)"


@dataclass(frozen=True)
class Card:
    """bandwidth: bytes per second; rate: FLOP per second of dense fp16 products summed in fp32."""

    name: str
    bandwidth: float
    rate: float
    source: str

    def seconds(self, leaves: list[Leaf]) -> tuple[float, str]:
        """(predicted seconds, what binds)."""
        device = sum(max(leaf.flops / self.rate, leaf.nbytes / self.bandwidth) for leaf in leaves)
        host = len(leaves) * LAUNCH
        return (device, "products and memory") if device >= host else (host, "launches")


def geforce(name: str, bandwidth: float, cores: int, boost: float) -> Card:
    """bandwidth in GB/s, boost in GHz."""
    return Card(name, bandwidth * 1e9, 4 * cores * boost * 1e9, SPECIFICATIONS)


CARDS = [
    geforce("RTX 3060 12 GB", 360, 3584, 1.777), geforce("RTX 4060 8 GB", 272, 3072, 2.46),
    geforce("RTX 4070", 504, 5888, 2.475), geforce("RTX 4090", 1008, 16384, 2.52),
    geforce("RTX 5090", 1792, 21760, 2.407),
]
SIDES = {"sd15": 64, "sdxl": 128}
PROVIDERS = ("plain", "palp_fast fast", "dreambooth")


class FusedAttention(TorchFunctionMode):
    """torch's attention as one leaf, as its fused kernels are on a GPU; on the meta device it would fall apart."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (value.transpose(1, 2).flatten(2) for value in args[:3])
        heads = args[0].shape[1]
        out, _ = torch.ops.palp_fast.attention.reference(q, k, v, heads, args[0].shape[-1] ** -0.5, None)
        return out.unflatten(-1, (heads, -1)).transpose(1, 2)


def step(size: str, side: int, dtype: torch.dtype, provider: str) -> list[Leaf]:
    """Every leaf call of one step of one sample. provider: one of PROVIDERS."""
    ours = provider == "palp_fast fast"
    with_grad, without, elements = passes(size, side, dtype, ours)
    # Gradient read, parameter read and written, two moments read and written: 8 bits of ours, fp32 of torch's AdamW.
    update = Leaf("optimizer", 0, elements * (16 if ours else 28))
    return [*with_grad, *without * {"plain": SAMPLES // 2, "palp_fast fast": 1, "dreambooth": 0}[provider], update]


@lru_cache
def passes(size: str, side: int, dtype: torch.dtype, ours: bool) -> tuple[list[Leaf], list[Leaf], int]:
    """(forward and backward of one sample, passes without gradient, number of LoRA parameters).

    Those without gradient are ours of all samples with a strength each, or peft's of one student and one teacher.
    """
    model = unet(size, "meta").to(dtype).requires_grad_(False)
    parameters = _ours(model) if ours else _peft(model)
    with FusedAttention(), Counter() as counter:
        out = _call(model, 1, side)
        torch.autograd.grad(out, parameters, torch.empty_like(out))
        with_grad = list(counter.leaves)
        counter.leaves.clear()
        with torch.no_grad():
            if ours:
                _call(model, SAMPLES, side, lora_scale=torch.ones(SAMPLES, device="meta"))
            else:
                _call(model, 1, side)
                model.disable_adapters()
                _call(model, 1, side)
    return with_grad, counter.leaves, sum(parameter.numel() for parameter in parameters)


def _ours(model) -> list[torch.nn.Parameter]:
    from palp_fast.nn.lora import inject_lora

    layers = inject_lora(model, "attention", RANK, None, torch.Generator())
    return [factor for layer in layers.values() for factor in (layer.lora_a, layer.lora_b)]


def _peft(model) -> list[torch.nn.Parameter]:
    from peft import LoraConfig

    from bench.baselines.plain import TARGETS

    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS["attention"]))
    model.to("meta")
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _call(model, samples: int, side: int, **kwargs) -> torch.Tensor:
    """The prediction [samples, 4, side, side] for prompts of 77 tokens."""
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(samples, *shape, dtype=model.dtype, device="meta")

    t = torch.empty(samples, dtype=torch.int64, device="meta")
    if model.config.addition_embed_type:
        kwargs["added_cond_kwargs"] = {"text_embeds": empty(1280), "time_ids": empty(6)}
    hidden = empty(77, model.config.cross_attention_dim)
    return model(empty(4, side, side), t, encoder_hidden_states=hidden, return_dict=False, **kwargs)[0]


def predict(
    card: Card, size: str, side: int, dtype: str, provider: str, measured: float | None = None
) -> PredictionRow:
    """One row; `measured`: seconds of the same step on this very card."""
    leaves = step(size, side, BASE_DTYPES[dtype], provider)
    seconds, bound = card.seconds(leaves)
    return PredictionRow(
        model=size, latents=f"4x{side}x{side}", dtype=dtype, provider=provider, card=card.name,
        bandwidth=f"{card.bandwidth:.4g}", rate=f"{card.rate:.4g}", source=card.source, launches=len(leaves),
        flops=sum(leaf.flops for leaf in leaves), nbytes=sum(leaf.nbytes for leaf in leaves),
        predicted_s=f"{seconds:.4f}", bound=bound, measured_s="" if measured is None else f"{measured:.4f}",
        error="" if measured is None else f"{seconds / measured - 1:+.3f}")


def all_rows(show: Callable[[PredictionRow], None] = lambda row: None) -> list[PredictionRow]:
    """Cards not at hand at full size, then every measured machine at the size that was measured there."""
    found = []
    for size, provider in itertools.product(UNETS, PROVIDERS):
        found += [predict(card, size, SIDES[size], "fp16", provider) for card in CARDS]
    limits = {(row.device, row.quantity): float(row.value) for row in rows.read(RooflineRow)}
    for row in rows.read(StepRow):
        known = (row.device, "copy"), (row.device, f"matmul {row.dtype}")
        if row.status == "ok" and row.model in UNETS and row.provider in PROVIDERS and set(known) <= set(limits):
            card = Card(row.device, *(limits[key] for key in known), "measured there: copy and matmul")
            side = int(row.latents.rpartition("x")[2])
            found.append(predict(card, row.model, side, row.dtype, row.provider, float(row.step_s)))
    for row in found:
        show(row)
    return found


def show(row: PredictionRow) -> None:
    measured = f", measured {row.measured_s} s: error {float(row.error):+.0%}" if row.measured_s else ""
    print(f"{row.model} {row.latents} {row.dtype}, {row.provider:16} on {row.card:16}: predicted {row.predicted_s} s "
          f"({row.bound}; {row.flops / 1e12:.2f} TFLOP, {row.nbytes / 1e9:.1f} GB, {row.launches} launches){measured}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write bench/results/predictions.csv")
    args = parser.parse_args()
    found = all_rows(show)
    if args.record:
        (rows.FOLDER / "predictions.csv").unlink(missing_ok=True)
        rows.write("predictions.csv", found)


if __name__ == "__main__":
    main()
