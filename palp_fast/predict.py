"""The UNet as a training step calls it: one prediction with a graph, then the no-grad predictions in one pass.

Two ways with the same results: the lean UNet, and diffusers' own modules with LoRA layers inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast.backend import is_capturing
from palp_fast.conditioning import Condition, unet_kwargs
from palp_fast.errors import ConfigError
from palp_fast.methods import TEACHER, Pass
from palp_fast.nn.expand import Rows
from palp_fast.nn.lean import MEMORY, UnsupportedUNet, lean_unet, lora_layers, set_memory
from palp_fast.nn.lora import enable_gradient_checkpointing, inject_lora


_DENSE = "'auto', 'fp32', 'bf16', 'fp16'"


def adapted(
    components, cfg, generator: torch.Generator | None, lean: bool | None, at_once: int | None = None
) -> LeanPredictions | StockPredictions:
    """Puts LoRA into the model's UNet, by the way that `lean` says.

    None: lean if the UNet can be converted, with a line that says why if not. True raises UnsupportedUNet instead.
    at_once: of LeanPredictions.
    """
    if lean is not False:
        try:
            return LeanPredictions(components, cfg, generator, at_once)
        except UnsupportedUNet as error:
            if lean:
                raise
            print(f"training by diffusers' own modules, slower and with more memory: {error}", flush=True)
    return StockPredictions(components, cfg, generator)


def check_stock(cfg) -> None:
    """Raises ConfigError for what diffusers' own modules cannot do."""
    for name, value, allowed in (
            ("memory", "balanced", "'fast', 'low'"), ("base_dtype", "int8", _DENSE), ("base_dtype", "nf4", _DENSE),
            ("cuda_graph", True, "'auto', False")):
        if getattr(cfg, name) == value:
            raise ConfigError(f"{name}: {value!r} needs the lean UNet, which this model has not or lean=False rules "
                              f"out; allowed: {allowed}")


class LeanPredictions:
    """By the lean UNet. layers: {module path: LoRALinear}.

    at_once: how many no-grad predictions of the samples are one pass; None: all of them. The estimate may ask for fewer
    (memory.choose), memory mode "low" makes one at a time, and a device that runs out of memory halves it for the rest
    of the run. graph_obstacle: why a CUDA graph cannot hold its passes, None if it can.
    """

    graph_obstacle = None

    def __init__(self, components, cfg, generator: torch.Generator | None, at_once: int | None = None):
        self.components, self.prompt_kv = components, None
        lean_unet(
            components.unet, rank=cfg.rank, lora_alpha=cfg.lora_alpha, memory=cfg.memory, generator=generator,
            lora_targets=cfg.lora_targets, backend=cfg.backend)
        self.layers = lora_layers(components.unet)
        self.memory, self.at_once = cfg.memory, 1 if cfg.memory == "low" else at_once
        self._rows = {}

    @property
    def mode(self) -> tuple:
        """What may change in a run: passes of the same samples are the same operators in the same mode."""
        return self.memory, self.at_once

    @property
    def steps_down(self) -> bool:
        """Whether there is a memory mode that needs less."""
        return self.memory != MEMORY[-1]

    def step_down(self) -> None:
        """Goes on in the next memory mode."""
        before, self.memory = self.memory, MEMORY[MEMORY.index(self.memory) + 1]
        set_memory(self.components.unet, self.memory)
        if self.memory == "low":
            self.at_once = 1
        if self.components.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"out of memory in mode {before!r}: going on in {self.memory!r}", flush=True)

    def fix(self, fixed: dict[str, Condition], passes: list[Pass]) -> None:
        """Takes the conditions that never change; the teacher's keys and values of them are made here."""
        self.names = list(fixed)
        self.fixed = Condition.cat(list(fixed.values()))
        if any(entry.lora_scale == TEACHER for entry in passes):
            self.prompt_kv = self.components.unet.prompt_kv(self.fixed.hidden.to(self.components.dtype))

    def with_graph(self, x_t: Tensor, t: Tensor, prompts: Condition, index: list[int]) -> Tensor:
        """The student's prediction; sample b has prompt index[b] of `prompts`."""
        rows = self._rows_of(len(x_t), index, 1.0)
        return self._call(x_t, t, prompts, rows=rows)

    def without_graph(
        self, x_hat: Tensor, t: Tensor, prompts: Condition | None, index: list[int], passes: list[Pass]
    ) -> dict[str, Tensor]:
        """The predictions of `passes` at x_hat, by argument of score_residual; "subject" means prompts and index.

        prompts: None where no pass is of the subject.
        """
        done = {}
        while len(done) < len(passes):
            left = passes[len(done):]
            part = left if self.at_once is None else left[: self.at_once]
            try:
                done |= self._one_pass(x_hat, t, prompts, index, part)
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1 or is_capturing():
                    raise
            # Outside of the handler, whose traceback holds the tensors of the pass that failed.
            self.at_once = len(part) // 2
            print(f"out of memory in the no-grad pass: {self.at_once} of {len(passes)} predictions at once from now on")
        return done

    def _one_pass(self, x_hat, t, prompts, index, passes) -> dict[str, Tensor]:
        batch, first = len(x_hat), len(self.names)
        own = [first + i for i in index]
        named = {"subject": own} | {name: [i] * batch for i, name in enumerate(self.names)}
        row_prompt = [i for entry in passes for i in named[entry.prompt]]
        lora_scale = [entry.lora_scale for entry in passes for _ in range(batch)]
        rows = self._rows_of(batch, row_prompt, lora_scale, 0 if self.prompt_kv is None else self.prompt_kv.count)
        together = self.fixed if prompts is None else Condition.cat([self.fixed, prompts])
        predicted = self._call(x_hat, t, together, rows=rows, prompt_kv=self.prompt_kv)
        return {entry.argument: view for entry, view in zip(passes, predicted.chunk(len(passes)))}

    def _rows_of(self, batch, row_prompt, lora_scale, fixed=0) -> Rows:
        """Made once for each combination of subjects that a batch may have."""
        key = batch, tuple(row_prompt), str(lora_scale)
        if key not in self._rows:
            self._rows[key] = Rows(batch, row_prompt, lora_scale, fixed=fixed, device=self.components.device)
        return self._rows[key]

    def _call(self, x: Tensor, t: Tensor, prompts: Condition, **options) -> Tensor:
        kwargs = unet_kwargs(self.components, prompts, x)
        return self.components.unet(x, t, **kwargs, **options, return_dict=False)[0]


class StockPredictions:
    """By diffusers' modules, each no-grad prediction a part of one batch. Methods as of LeanPredictions."""

    steps_down, mode = False, ()
    graph_obstacle = "diffusers' own modules train, whose passes copy from the host"

    def __init__(self, components, cfg, generator: torch.Generator | None):
        check_stock(cfg)
        self.components = components
        self.layers = inject_lora(
            components.unet, cfg.lora_targets, cfg.rank, cfg.lora_alpha, generator, cfg.backend)
        if cfg.memory == "low":
            enable_gradient_checkpointing(components.unet)

    def fix(self, fixed: dict[str, Condition], passes: list[Pass]) -> None:
        self.fixed = fixed

    def with_graph(self, x_t: Tensor, t: Tensor, prompts: Condition, index: list[int]) -> Tensor:
        return self._call(x_t, t, prompts.rows(index), 1.0)

    def without_graph(
        self, x_hat: Tensor, t: Tensor, prompts: Condition | None, index: list[int], passes: list[Pass]
    ) -> dict[str, Tensor]:
        if not passes:
            return {}
        named = {name: condition.rows(index) for name, condition in self.fixed.items()}
        if prompts is not None:
            named["subject"] = prompts.rows(index)
        strengths = [entry.lora_scale for entry in passes]
        lora_scale = strengths[0]
        if len(set(strengths)) > 1:
            lora_scale = torch.tensor(strengths, device=t.device).repeat_interleave(len(t))
        together = Condition.cat([named[entry.prompt] for entry in passes])
        copies = len(passes)
        predicted = self._call(x_hat.repeat(copies, 1, 1, 1), t.repeat(copies), together, lora_scale)
        return {entry.argument: view for entry, view in zip(passes, predicted.chunk(copies))}

    def _call(self, x: Tensor, t: Tensor, condition: Condition, lora_scale: float | Tensor) -> Tensor:
        kwargs = unet_kwargs(self.components, condition, x)
        return self.components.unet(x, t, **kwargs, lora_scale=lora_scale, return_dict=False)[0]
