"""Peak memory of a training run, before weights are loaded: the most of its phases, each a sum of named parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from palp_fast import methods, offload
from palp_fast.memory import parts as inside
from palp_fast.memory.inner import plain
from palp_fast.memory.models import Configs, Parts, nbytes, parts_of
from palp_fast.memory.step import Other, Sizes, fixed_prompts, step
from palp_fast.memory.tape import Ledger, Tape
from palp_fast.memory.unet import Pass
from palp_fast.nn.lean import MEMORY, lora_layers, set_memory
from palp_fast.nn.lean_attention import LeanAttention
from palp_fast.quantised import QuantisedWeight
from palp_fast.reference.dtypes import BASE_DTYPES
from palp_fast.resolve import compute_dtype

GIB = 2**30
# Beside tensors, and not measured by this project: what CUDA keeps for a process, what cuBLAS and cuDNN take to work.
ASSUMED = {"CUDA context": GIB // 2, "libraries' workspaces": GIB // 16}
_STATE = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "lion8bit": 1 + 4 / 256}  # bytes of optimizer state per number
_FP32 = 4


@dataclass(frozen=True)
class Phase:
    """A part of the run: {what: bytes} at the moment when most is alive."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """Of one config in one memory mode: its phases in their order.

    at_once: how many no-grad predictions are one pass, None: all of a model's; tiles: whether previews are decoded in
    tiles; split: the same in tiles and with fewer predictions at once, each where that takes less; why: the reason for
    diffusers' own modules, where these run.
    """

    memory: str
    phases: tuple[Phase, ...]
    at_once: int | None = None
    tiles: bool = False
    split: tuple[Estimate, ...] = ()
    why: str = ""

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of tensors; what ASSUMED names comes beside it on a CUDA device."""
        return self.worst.total

    @property
    def label(self) -> str:
        """The mode, how far the no-grad pass is split, and whether previews are."""
        split = "" if self.at_once is None else f", {self.at_once} no-grad predictions at once"
        return self.memory + split + (", previews in tiles" if self.tiles else "")

    def describe(self) -> str:
        """Lines for people."""
        worst = self.worst
        lines = [f"memory estimate ({self.label}): {gib(self.peak)} at the peak, {worst.name}"]
        lines += [f"  {size / 2**20:8.0f} MiB  {name}" for name, size in worst.parts.items() if size]
        others = ", ".join(f"{phase.name} {gib(phase.total)}" for phase in self.phases if phase is not worst)
        return "\n".join([*lines, f"  other phases: {others}"])


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def assumed() -> str:
    """The line beside every estimate for a card."""
    return "beside it, assumed and not measured: " + ", ".join(f"{name} {gib(size)}" for name, size in ASSUMED.items())


def estimates(
    configs: Configs, cfg, resolution: int, photos: int, modes: Iterable[str] = MEMORY, teacher: Configs | None = None,
    lean: bool | None = None,
) -> list[Estimate]:
    """One for each memory mode of a resolved config that its modules have. Raises ConfigError where they have none.

    photos: how many are cached; teacher: of another model that is the teacher; lean: as of the Trainer.
    """
    found, both = [], []
    if methods.split(cfg)[1] == []:
        teacher = None
    for mode in modes:
        own, stock = cfg.replace(memory=mode), any(parts and parts.stock for parts in both)
        if found and stock and mode == "balanced":
            continue
        if stock or not both:  # diffusers' own modules are made for their mode
            both = [parts_of(configs, own, lean=lean), teacher and parts_of(teacher, own, teacher=True, lean=lean)]
        found.append(_Run(both[0], own, resolution, photos, both[1]).estimate())
    return found


class _Run:
    """The sizes that the phases of a run share."""

    def __init__(self, parts: Parts, cfg, resolution: int, photos: int, teacher: Parts | None):
        for one in (parts, teacher):
            if one is not None and one.stock is None:
                set_memory(one.unet, cfg.memory)
        self.parts, self.cfg, self.resolution, self.teacher = parts, cfg, resolution, teacher
        self.on_card = cfg.device != "cpu"
        item, self.their_item = (BASE_DTYPES[compute_dtype(cfg, which)].itemsize for which in (False, True))
        scale = 2 ** (len(parts.vae.config.block_out_channels) - 1)
        subjects = min(cfg.batch_size, len(cfg.subjects))
        self.sizes = Sizes(cfg.batch_size, resolution // scale, _tokens(parts), subjects, item, plain(cfg))
        latents = photos * (resolution // scale) ** 2 * parts.vae.config.latent_channels * _FP32
        self.unet, self.vae = nbytes(parts.unet), nbytes(parts.vae)
        self.text = sum(map(nbytes, parts.encoders))
        trained = list(_factors(parts.unet))
        self.lora = sum(trained)
        widths = [encoder.config.hidden_size for encoder in parts.encoders] if cfg.learn_token else []
        self.rows = len(cfg.subjects) * cfg.token_vectors * sum(widths) * _FP32
        self.state = int(self.lora / _FP32 * _STATE[cfg.optimizer] + self.rows / _FP32 * 8)
        self.caches = latents + self._prompt_kv()
        self.waits = offload.asked(cfg)
        others = {} if teacher is None else {"the teacher's UNet": nbytes(teacher.unet)}
        if teacher is not None and self.waits:
            others = {"what stays of the teacher's UNet": nbytes(teacher.unet, lambda value: not offload.waits(value))}
        self.resident = {"UNet": self.unet} | ({} if self.on_card else {"VAE": self.vae})
        if cfg.learn_token or not self.on_card:
            self.resident |= {"text encoders": self.text}
        self.resident |= others
        self.trained = {"LoRA and token rows": self.lora + self.rows, "optimizer state": self.state}

    def _prompt_kv(self) -> int:
        """Keys and values of the fixed prompts, made once."""
        if all(one.lora_scale != methods.TEACHER for one in methods.passes(self.cfg)):
            return 0
        parts, item = (self.parts, self.sizes.itemsize) if self.teacher is None else (self.teacher, self.their_item)
        widths = sum(m.to_k.out_features for m in parts.unet.modules()
                     if isinstance(m, LeanAttention) and m.is_cross_attention)
        return fixed_prompts(self.cfg) * _tokens(parts) * 2 * widths * item

    def estimate(self) -> Estimate:
        first = [self.caching(), self.loading()]
        if self.teacher is not None:
            first.append(self.loading_teacher())
        previews = [(False, ())]
        if self.cfg.sample_every:
            ways = (True,) if self.cfg.memory == "low" else (False, True)
            previews = [(tiles, (self.sampling(tiles),)) for tiles in ways]
        found, all_at_once = [], True
        for at_once, step in self.steps():
            for tiles, drawn in previews:
                phases = (*first, step, self.update(), *drawn)
                one = Estimate(self.cfg.memory, phases, None if all_at_once else at_once, tiles)
                if not found or one.peak < found[-1].peak:
                    found.append(one)
            all_at_once = False
        return replace(found[0], split=tuple(found[1:]), why=self.parts.why)

    def caching(self) -> Phase:
        """A photo through the VAE; the UNet is not loaded yet."""
        parts = {"VAE": self.vae, "a photo in the encoder": inside.vae_encode(self.parts.vae, self.resolution)}
        return Phase("caching latents", parts if self.on_card else parts | {"text encoders": self.text})

    def loading(self) -> Phase:
        """The largest layer beside all others: as it was, and the fp32 numbers of quantising it."""
        weights = {"UNet": self.unet, "text encoders": self.text}
        largest = _quantised_layer([self.parts.unet, *self.parts.encoders], self.sizes.itemsize)
        made = {"a layer, quantised": largest}
        return Phase("loading", weights | ({} if self.on_card else {"VAE": self.vae}) | made)

    def loading_teacher(self) -> Phase:
        """Its text encoders, which are dropped before its UNet comes; the trained model is there."""
        own = {name: size for name, size in self.resident.items() if "teacher" not in name}
        encoders, unet = self.teacher.encoders, [] if self.waits else [self.teacher.unet]
        most = max(sum(map(nbytes, encoders)), sum(map(nbytes, unet)))
        own |= {"LoRA and token rows": self.lora + self.rows, "the teacher's text encoders or UNet": most}
        made = {"a layer, quantised": _quantised_layer([*encoders, *unet], self.their_item)}
        return Phase("loading the teacher", own | made)

    def steps(self) -> list[tuple[int | None, Phase]]:
        """The step with no-grad predictions all at once, then with fewer of them: (how many, the step)."""
        cfg, sizes = self.cfg, self.sizes
        text = (sizes.subjects, sizes.tokens, sizes.itemsize)
        saved = sum(inside.text_saved(e, *text) for e in self.parts.encoders) if cfg.learn_token else 0
        back = max(inside.text_backward(e, *text) for e in self.parts.encoders) if cfg.learn_token else 0
        grown = cfg.grad_accumulation == 1
        unet, other = self.parts.stock or self.parts.unet, self.teacher and self._other()
        found = step(unet, cfg, sizes, saved, back, grown, other)
        parts = self.resident | self.trained | {"gradients": 0 if grown else self.lora + self.rows,
                                                "caches of photos and prompts": self.caches}
        phases = []
        for at_once, without_grad in (found.split or {0: 0}).items():
            most = max(("the pass with a graph", found.forward), ("no-grad predictions", without_grad),
                       ("the backward pass", found.backward), key=lambda pair: pair[1])
            work = {"kept for the backward pass": found.saved, f"at work in {most[0]}": most[1] - found.saved}
            phases.append((at_once, Phase("in the step", parts | work)))
        return phases

    def _other(self) -> Other:
        return Other(self.teacher.stock or self.teacher.unet, _tokens(self.teacher), self.their_item, self.waits)

    def update(self) -> Phase:
        """The optimizer's step, which makes nothing large."""
        parts = self.resident | self.trained | {"gradients": self.lora + self.rows}
        return Phase("in the update", parts | {"caches of photos and prompts": self.caches})

    def _guided(self) -> int:
        """The most in the UNet's pass for a picture, with and without the prompt."""
        ledger, sizes = Ledger(), self.sizes
        if self.parts.stock is not None:
            two = [methods.Pass(name, name, methods.STUDENT) for name in ("clean", "empty")]
            return self.parts.stock.without_grad(replace(sizes, batch=1), two)
        tape = Tape(ledger, sizes.itemsize, False, sizes.plain)
        Pass(tape, self.parts.unet, 2, sizes.side, sizes.tokens, adapted=2, count=2, computed=2).run()
        return ledger.peak

    def sampling(self, tiles: bool) -> Phase:
        """A picture with guidance: both predictions in one pass, then the decoder, perhaps in tiles."""
        work = max(self._guided(), inside.vae_decode(self.parts.vae, self.resolution, tiles))
        parts = self.resident | {"text encoders": self.text, "VAE": self.vae} | self.trained
        parts |= {"caches of photos and prompts": self.caches, "a picture in the decoder": work}
        return Phase("sampling", parts)


def _quantised_layer(modules: list[nn.Module], itemsize: int) -> int:
    sizes = [m.weight.shape[0] * m.weight.width for whole in modules for m in whole.modules()
             if isinstance(getattr(m, "weight", None), QuantisedWeight)]
    return max(sizes, default=0) * (itemsize + 3 * _FP32)


def _tokens(parts: Parts) -> int:
    """Of a prompt."""
    return parts.encoders[0].config.max_position_embeddings


def _factors(unet: nn.Module) -> Iterable[int]:
    for layer in lora_layers(unet).values():
        yield layer.lora_a.nbytes + layer.lora_b.nbytes
