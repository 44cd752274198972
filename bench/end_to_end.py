"""Seconds of a PALP step, peak memory, time to the saved LoRA, ours beside what else one would run.

    python -m bench.end_to_end [--model emoji-64|sd15|sdxl] [--side N] [--dtype fp32|bf16|fp16] [--provider TEXT]
        [--rounds N] [--lora-steps N] [--sequential] [--start-limit S] [--device cpu|cuda] [--record]

One optimizer step of one sample, rank 32; of ours, "palp_fast fast graph" alone by CUDA graphs. Time to the LoRA is
from the start of a process. Every provider has a process of its own: its peak memory is its own, and the processes take
turns. One whose gradient is not that of the plain baseline (bench/step_gate.py) is not timed. Real sizes have random
weights (bench/random_model.py). --side: of the latents; a small one stands for the model on a CPU, and its rows say so.
--sequential: one process at a time, where memory does not hold all. --start-limit: who takes longer to load, compile
and step once is given up. Stopped by SIGTERM or Ctrl-C, it still gives the rows of what it has.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.multiprocessing as mp

from bench import rows, step_gate
from bench.core import Unavailable
from bench.machine import describe, version
from bench.rows import StepRow
from bench.step_gate import Step
from palp_fast import ConfigError, TrainConfig, Trainer, __version__, train
from palp_fast.graph import WARM_UP
from palp_fast.reference.dtypes import BASE_DTYPES
from palp_fast.result import peak_memory_bytes, watch_memory
from palp_fast.zoo.captions import noun_phrase
from palp_fast.zoo.demo import CLASS_NOUN, SUBJECT, TARGET, TOKEN

SIDES = {"emoji-64": 16, "sd15": 64, "sdxl": 128}  # of the latents at the model's own resolution
CHANNELS = {"emoji-64": 8, "sd15": 4, "sdxl": 4}
RANK = 32


@dataclass(frozen=True)
class Case:
    """What is trained: folder of the model (or a built-in name), side of the latents, dtype of the frozen weights."""

    model: str
    folder: str
    side: int
    dtype: str
    device: str
    threads: int

    @property
    def latents(self) -> str:
        """Channels, height and width, 4x64x64."""
        return f"{CHANNELS[self.model]}x{self.side}x{self.side}"


def ours(memory: str, graph: bool, case: Case) -> tuple[Callable, Callable]:
    """(make, lora): make() -> a Step; lora(steps) trains and saves."""

    def config(steps: int) -> TrainConfig:
        resolution = None if case.model == "emoji-64" else 8 * case.side
        return TrainConfig(
            model=case.folder, images=str(SUBJECT / "photos"), class_noun=CLASS_NOUN, token=TOKEN,
            prompt=TARGET.format("[V]"), output_dir=tempfile.mkdtemp(), rank=RANK, steps=steps, batch_size=1,
            grad_accumulation=1, memory=memory, base_dtype=case.dtype, device=case.device, resolution=resolution,
            checkpoint_every=0, cuda_graph=graph)

    def make() -> Step:
        trainer = Trainer(config(2**31))
        steps = iter(trainer)
        pairs = {path: (lora_a, lora_b) for path, lora_a, lora_b in trainer.named_lora()}
        return Step(lambda: next(steps), trainer.gradients, pairs, lambda: [row.grad for row in trainer.token_rows()],
                    warm_up=WARM_UP + 2 if graph else 1)

    return make, lambda steps: train(config(steps))


def baseline(method: str, mode: str | None, case: Case) -> tuple[Callable, Callable]:
    """The same for bench/baselines; mode: None for plain, else one of tuned.MODES."""
    from bench.baselines import plain, tuned

    def load() -> tuple[plain.PlainModel, Step]:
        if mode == "reduce-overhead" and case.device == "cpu":
            raise Unavailable("it captures CUDA graphs: a CUDA device is needed")
        model = plain.load(
            _local(case.folder), tokens={TOKEN: CLASS_NOUN}, subject_prompts=[f"a photo of {TOKEN}"],
            clean_prompt=TARGET.format(noun_phrase(CLASS_NOUN)), rank=RANK, dtype=BASE_DTYPES[case.dtype],
            device=case.device)
        if mode is not None:
            tuned.tune(model, mode)
        optimizer, options = plain.make_optimizer(model, fused=mode is not None), plain.Options(method=method)
        latents = torch.randn(1, CHANNELS[case.model], case.side, case.side, device=case.device)
        return model, Step(
            lambda: plain.plain_step(model, optimizer, latents, options),
            lambda *inputs: plain.plain_gradients(model, *inputs, options),
            model.lora_pairs(), lambda: [table.grad[-model.new_rows :] for table in model.token_tables])

    def lora(steps: int) -> None:
        model, step = load()
        for _ in range(steps):
            step.run()
        save_lora(model, tempfile.mkdtemp())

    return lambda: load()[1], lora


def save_lora(model, folder: str) -> None:
    """As diffusers' scripts save it."""
    from peft.utils import get_peft_model_state_dict

    type(model.pipeline).save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(model.unet))


PROVIDERS: dict[str, Callable[[Case], tuple[Callable, Callable]]] = {
    **{f"palp_fast {memory}": partial(ours, memory, False) for memory in ("fast", "balanced", "low")},
    "palp_fast fast graph": partial(ours, "fast", True),
    "plain": partial(baseline, "palp", None),
    **{f"tuned {mode}": partial(baseline, "palp", mode) for mode in ("eager", "blocks", "whole", "reduce-overhead")},
    "dreambooth": partial(baseline, "dreambooth", None),
}


def _local(folder: str) -> Path:
    from palp_fast.models import resolve

    return Path(resolve(folder))


def work(pipe, provider: str, case: Case, lora_steps: int, begun: float) -> None:
    """A worker: sends ("ready", (some gradients, seconds from `begun` to the saved LoRA or None)), `begun` being the
    start of the process, then for every True it gets ("step", (seconds, peak bytes)); ("error", reason) if it fails."""
    try:
        torch.set_num_threads(case.threads)
        watch_memory(case.device)
        make, lora = PROVIDERS[provider](case)
        lora_seconds = None
        if lora_steps:
            lora(lora_steps)
            lora_seconds = time.time() - begun
        step = make()
        gradients = step.gradients(CHANNELS[case.model], case.side, case.device)
        for _ in range(step.warm_up):
            step.run()
        pipe.send(("ready", (gradients, lora_seconds)))
        while pipe.recv():
            pipe.send(("step", (_seconds(step.run, case.device), peak_memory_bytes(case.device))))
    except (ConfigError, Unavailable) as error:
        pipe.send(("error", str(error)))
    except Exception as error:
        traceback.print_exc()
        pipe.send(("error", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))


def _seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Stopped(BaseException):
    """This process is asked to end."""


class Worker:
    """A provider in its own process. problem: (status, why) of one that is not timed, else None; gradients: a few."""

    def __init__(self, provider: str, case: Case, lora_steps: int, start_limit: float):
        self.provider, self.dtype, self.samples, self.problem, self.peak = provider, case.dtype, [], None, 0
        self.gradients = self.lora_seconds = None
        self.start_limit = start_limit
        self.pipe, theirs = mp.Pipe()
        given = theirs, provider, case, lora_steps, time.time()
        self.process = mp.get_context("spawn").Process(target=work, args=given, daemon=True)
        self.process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it is ready to step, or has a problem."""
        if self.gradients is None and self.problem is None:
            self.gradients, self.lora_seconds = self._receive(self.start_limit) or (None, None)

    def judge(self, truth: step_gate.Gradients | None) -> None:
        """Finds the provider wrong if its gradient is not `truth`, the plain baseline's; dreambooth's is another."""
        if self.problem or self.provider in ("plain", "dreambooth"):
            return
        if truth is None:
            self.problem = "unavailable", "the plain baseline gave no gradient to compare with"
            return
        error, limit = step_gate.error(self.gradients, truth), step_gate.LIMITS[self.dtype]
        if not error <= limit:
            self.problem = "wrong", f"relative error of the gradient {error:.1e}, allowed {limit:.1e}"

    def step(self) -> None:
        self.pipe.send(True)
        if (value := self._receive()) is not None:
            seconds, self.peak = value
            self.samples.append(seconds)

    def finish(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()

    def _receive(self, limit: float | None = None):
        try:
            kind, value = self.pipe.recv() if self.pipe.poll(limit) else ("error", f"not ready after {limit:.0f} s")
        except EOFError:
            self.process.join()
            if self.process.exitcode == -signal.SIGTERM:  # as this process: `timeout` ends a whole group
                raise Stopped from None
            kind, value = "error", f"the process ended with code {self.process.exitcode}"
        if kind == "error":
            self.problem = "unavailable", value
            return None
        return value


def measure(
    names: Iterable[str], case: Case, rounds: int, lora_steps: int, sequential: bool, start_limit: float
) -> Iterator[StepRow]:
    """One row for each provider, plain first: its gradient is what the others are compared with."""
    names = sorted(names, key=lambda name: name != "plain")
    truth = None
    if names[0] not in ("plain", "dreambooth"):
        plain = Worker("plain", case, 0, start_limit)
        plain.wait()
        truth = plain.gradients
        plain.finish()
    for group in [[name] for name in names] if sequential else [names]:
        workers, stopped = [], False
        try:
            for name in group:
                workers.append(Worker(name, case, lora_steps, start_limit))
                if lora_steps or case.device == "cpu":  # where the start is timed, or would take turns by the thread
                    workers[-1].wait()
            for worker in workers:
                worker.wait()
                truth = worker.gradients if worker.provider == "plain" else truth
                worker.judge(truth)
            for worker in itertools.chain.from_iterable(itertools.repeat(workers, rounds)):
                if not worker.problem:
                    worker.step()
        except Stopped:
            stopped = True
        for worker in workers:
            worker.finish()
            if worker.samples or worker.problem:  # none where it was stopped before
                yield _row(worker, case, lora_steps)
        if stopped:
            return


def _row(worker: Worker, case: Case, lora_steps: int) -> StepRow:
    machine = describe(torch.device(case.device))
    ok, lora = not worker.problem, worker.lora_seconds
    status, note = worker.problem or ("ok", "")
    median, p20, p80 = (f"{value:.4f}" for value in _spread(worker.samples)) if ok else ("", "", "")
    return StepRow(
        started=machine.started, device=machine.device, kind=machine.kind, driver=machine.driver, threads=case.threads,
        torch=machine.torch, provider_version=version(
            "palp_fast" if worker.provider.startswith("palp_fast") else "diffusers"),
        palp_fast=__version__, commit=machine.commit, mode="deterministic" if machine.deterministic else "any",
        model=case.model, latents=case.latents, dtype=case.dtype, provider=worker.provider,
        status=status, note=note, step_s=median, p20_s=p20, p80_s=p80,
        rounds=str(len(worker.samples)) if ok else "", peak_bytes=str(worker.peak) if ok else "",
        lora_s=f"{lora:.2f}" if ok and lora else "", lora_steps=str(lora_steps) if ok and lora else "")


def _spread(samples: list[float]) -> tuple[float, float, float]:
    values = torch.tensor(samples, dtype=torch.float64)
    return tuple(values.quantile(q).item() for q in (0.5, 0.2, 0.8))


def show(row: StepRow) -> str:
    if row.status != "ok":
        return f"  {row.provider:22} {row.status}: {row.note}"
    lora = f", LoRA of {row.lora_steps} steps in {row.lora_s} s" if row.lora_s else ""
    return (f"  {row.provider:22} {float(row.step_s):8.3f} s ({float(row.p20_s):.3f}, {float(row.p80_s):.3f}), "
            f"peak {int(row.peak_bytes) / 2**30:.2f} GiB{lora}")


def _stop(number: int, frame) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Stopped


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-64", choices=SIDES)
    parser.add_argument("--side", type=int, help="of the latents [the model's own]")
    parser.add_argument("--dtype", choices=BASE_DTYPES, help="of the frozen weights [fp16 on a GPU, else fp32]")
    parser.add_argument("--provider", action="append", default=[], help="providers whose name holds this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lora-steps", type=int, default=0, help="also train and save with so many steps")
    parser.add_argument("--sequential", action="store_true", help="one provider at a time")
    parser.add_argument("--start-limit", type=float, default=600, metavar="S", help="seconds until the first step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", action="store_true", help="append the rows to bench/results/")
    args = parser.parse_args(arguments)
    side = args.side or SIDES[args.model]
    if args.model == "emoji-64" and side != SIDES["emoji-64"]:
        raise SystemExit(f"--side {side}: allowed is {SIDES['emoji-64']} for emoji-64")
    dtype = args.dtype or ("fp32" if args.device == "cpu" else "fp16")
    names = [name for name in PROVIDERS if not args.provider or any(part in name for part in args.provider)]
    if not names:
        raise SystemExit(f"--provider {args.provider}: allowed are parts of {', '.join(PROVIDERS)}")
    folder = args.model
    if args.model != "emoji-64":
        from bench.random_model import folder as folder_of

        folder = str(folder_of(args.model))
    case = Case(args.model, folder, side, dtype, args.device, args.threads)
    print(describe(torch.device(args.device)).header())
    print(f"{args.model}, latents {case.latents}, {dtype}: seconds of one step, median (20th, 80th percentile)")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        for row in measure(names, case, args.rounds, args.lora_steps, args.sequential, args.start_limit):
            print(show(row), flush=True)
            if args.record:
                rows.append("end_to_end", [row])
    except Stopped:
        raise SystemExit("stopped before the first step") from None


if __name__ == "__main__":
    main()
