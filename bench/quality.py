"""The fair test of the emoji-64 world: does PALP keep the prompt and the subject where DreamBooth loses one of them?

    python -m bench.quality --cache DIR [--output runs/quality] [--model emoji-64] [--quick] [--acceptance] [--report]
        [--method NAME[:field=value,...]] [--subject NAME] [--target N] [--seed N] [--set field=value] [--jobs N]

Subjects x targets x seeds x methods; each training is measured at every 100 steps, by every judge, on 16 pictures of
the target prompt, and at its end on 16 of "a photo of [V]". DIR holds the sprites, as for palp_fast.zoo.build. Every
training's results are one block of JSON lines in the output folder; what is there is not run again. Development
subjects are the default. --jobs trainings run at once, each on its share of the threads: on a CPU small trainings make
better use of a core each. --acceptance runs the other half, which no setting may be chosen on. --report writes tables,
curves and sheets from the rows alone, and is done at the end of every run as well.
"""

from __future__ import annotations

import argparse
import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from palp_fast import ConfigError, Subject, TrainConfig
from palp_fast.config import SUBJECT_PROMPT
from palp_fast.zoo.demo import SETTINGS as DEMO
from palp_fast.zoo.world import TARGETS, World

STEPS = (100, 200, 300, 400, 500)
PALP_STEP = 500  # where PALP is compared, fixed beforehand; DreamBooth is compared at its best
IMAGES, SAMPLING_STEPS, GUIDANCE = 16, 25, 4.0
BASE, TOKEN = "base", "mysubject"
METHODS: dict[str, dict[str, Any]] = {
    "dreambooth": {"method": "dreambooth"},
    "sds": {"method": "sds"},
    "nfsd": {"method": "nfsd", "alpha": 7.5, "rescale": False},
    "palp different noise": {"method": "palp", "same_noise": False, "rescale": False},
    "palp same noise": {"method": "palp", "rescale": False},
    "palp": {"method": "palp"},
}
QUICK = {"methods": ("dreambooth", "palp"), "targets": (0, 1, 3), "images": 8, "subjects": 4}
_ONLY_HERE = ("model", "images", "class_noun", "subject_prompt", "subjects", "token", "prompt", "clean_prompt",
              "method", "steps", "output_dir", "seed")


@dataclass(frozen=True)
class Plan:
    """What is compared. methods: name -> fields of TrainConfig, or class_phrase, that differ from `settings`."""

    model: str
    subjects: tuple[str, ...]
    targets: tuple[int, ...]
    seeds: tuple[int, ...]
    methods: dict[str, dict[str, Any]]
    steps: tuple[int, ...] = STEPS
    images: int = IMAGES
    sampling_steps: int = SAMPLING_STEPS
    settings: dict[str, Any] = field(default_factory=dict)
    only_step: int | None = None  # where methods other than DreamBooth end and are measured, if not at all of `steps`

    def steps_of(self, method: str) -> tuple[int, ...]:
        """Where a method is measured; its training ends at the last of them. The base has step 0 alone."""
        if method == BASE:
            return (0,)
        return self.steps if self.only_step is None or self.sees_no_target(method) else (self.only_step,)

    def sees_no_target(self, method: str) -> bool:
        """Whether one training of the method serves every target."""
        return self.methods[method]["method"] == "dreambooth"

    def training(self, method: str, prompt: str, images: Any, class_noun: str, **own: Any) -> TrainConfig:
        """The config of one training; a class_phrase among the fields stands for [V] in y_c, not the class noun."""
        fields = self.settings | self.methods[method]
        subject = Subject(images=images, class_noun=class_noun, placeholder="[V]", prompt=SUBJECT_PROMPT, token=TOKEN,
                          class_phrase=fields.pop("class_phrase", None))
        return TrainConfig(model=self.model, prompt=prompt, subjects=[subject], **fields, **own)


def common_settings() -> dict[str, Any]:
    """The demo's settings without its subject: the same rank, rates and batch for every method."""
    return {name: value for name, value in DEMO.items() if name not in _ONLY_HERE}


def methods_named(names: list[str]) -> dict[str, dict[str, Any]]:
    """"palp:residual_weight=0.3,timesteps=uniform" -> {that: fields}. Raises ConfigError for an unknown name."""
    found = {}
    for name in names:
        kind, _, changes = name.partition(":")
        if kind not in METHODS:
            raise ConfigError(f"--method: {kind!r} is unknown; allowed: {', '.join(METHODS)}")
        found[name] = METHODS[kind] | assignments(changes.split(",") if changes else [])
    return found


def assignments(texts: list[str]) -> dict[str, Any]:
    """["lr=1e-3", "timesteps=uniform"] -> {"lr": 0.001, "timesteps": "uniform"}."""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or name in _ONLY_HERE:
            raise ConfigError(f"{text!r}: allowed is field=value, a field of TrainConfig but {', '.join(_ONLY_HERE)}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def plan_of(args: argparse.Namespace, world: World) -> Plan:
    """The plan of the command line. Raises ConfigError for what does not exist, before anything is loaded."""
    half = "acceptance" if args.acceptance else "development"
    held = [subject.name for subject in world.having(half)]
    if wrong := [name for name in args.subject if name not in held]:
        raise ConfigError(f"--subject: {wrong[0]!r} is not in the {half} half; allowed: {', '.join(held)}")
    if wrong := [number for number in args.target if not 0 <= number < len(TARGETS)]:
        raise ConfigError(f"--target: {wrong[0]}; allowed: 0 to {len(TARGETS) - 1}")
    if wrong := [step for step in args.steps if step < 1]:
        raise ConfigError(f"--steps: {wrong[0]}; allowed: 1 or more")
    if args.images < 2:
        raise ConfigError(f"--images: {args.images}; allowed: 2 or more, diversity is of pairs")
    every = held[::len(held) // QUICK["subjects"]][:QUICK["subjects"]] if args.quick else held
    plan = Plan(
        args.model, tuple(args.subject or every),
        tuple(args.target or (QUICK["targets"] if args.quick else range(len(TARGETS)))), tuple(args.seed or (0,)),
        methods_named(args.method or list(QUICK["methods"] if args.quick else METHODS)),
        tuple(sorted(set(args.steps))), QUICK["images"] if args.quick else args.images, SAMPLING_STEPS,
        common_settings() | assignments(args.set), args.palp_step if args.palp_step_only else None)
    for method in plan.methods:
        plan.training(method, TARGETS[0][0], "photos", "noun", output_dir=".")
    return plan


def default_jobs() -> int:
    """One training a thread of the CPU, at most 4 for memory's sake; one on a CUDA card."""
    return 1 if torch.cuda.is_available() else min(4, torch.get_num_threads())


def main(arguments: list[str] | None = None) -> None:
    from bench.quality_report import write
    from bench.quality_runs import Runs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder with the sprites, as of palp_fast.zoo.build")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"), help="folder of rows, pictures, report")
    parser.add_argument("--model", default="emoji-64")
    parser.add_argument("--quick", action="store_true", help="4 subjects, 3 targets, 2 methods, 8 pictures")
    parser.add_argument("--acceptance", action="store_true", help="the half on which no setting is ever chosen")
    parser.add_argument("--report", action="store_true", help="only write the report of the rows that are there")
    parser.add_argument("--method", action="append", default=[], help="NAME or NAME:field=value,...; repeatable")
    parser.add_argument("--subject", action="append", default=[], help="repeatable")
    parser.add_argument("--target", action="append", type=int, default=[], help="its number; repeatable")
    parser.add_argument("--seed", action="append", type=int, default=[], help="of the training; repeatable")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="where a training is measured")
    parser.add_argument("--palp-step", type=int, default=PALP_STEP, help="the step at which PALP is compared")
    parser.add_argument("--palp-step-only", action="store_true",
                        help="end all methods but DreamBooth at --palp-step, and measure them there alone")
    parser.add_argument("--images", type=int, default=IMAGES, help="for each subject, prompt and step")
    parser.add_argument("--jobs", type=int, help="trainings at once (default: one a thread, up to 4; on a CUDA card 1)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="for every method")
    args = parser.parse_args(arguments)
    if args.palp_step not in args.steps:
        raise ConfigError(f"--palp-step: {args.palp_step} is not among --steps {args.steps}")
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError(f"--jobs: {args.jobs}; allowed: 1 or more")
    world = World.load()
    runs = Runs(plan_of(args, world), world, args.cache, args.output)
    if not args.report:
        runs.run(args.jobs or default_jobs())
    print(write(runs, args.palp_step), flush=True)


if __name__ == "__main__":
    main()
