"""The command line: palp-fast train, generate, evaluate, bench, doctor, presets.

Wrong settings and unreadable photos end with one line on stderr and exit code 2, training that diverges with code 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from palp_fast import __version__
from palp_fast.config import TrainConfig
from palp_fast.errors import ConfigError, DataError, TrainingDiverged
from palp_fast.rules import Rule, rule_of


class _Commands(click.Group):
    """Turns the library's own errors into one line; any other error is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigError, DataError, TrainingDiverged) as error:
            click.echo(f"palp-fast: {' '.join(str(error).split())}", err=True)
            ctx.exit(1 if isinstance(error, TrainingDiverged) else 2)


_SUBJECT_EXAMPLE = '{"images": "folder", "class_noun": "cat", "placeholder": "[V1]"}'
_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
    # --batch_size is --batch-size.
    "token_normalize_func": lambda name: name.replace("_", "-"),
}


@click.group(cls=_Commands, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="palp-fast")
def main() -> None:
    """PALP: teach a text-to-image model one subject, for one prompt."""
    # Read when these libraries are first imported, which is later: their remarks are not for users of this command.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def _parse(rule: Rule, given: str) -> Any:
    """An option's text as its field's type; what does not parse stays text, and the field's rule says what is wrong."""
    if rule.kind in ("int", "float"):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(given)
        return None if given == "none" else given
    named = {str(value).lower(): value for value in (*rule.choices, *rule.later)}
    return named.get(given, given)


def _parse_subjects(given: tuple[str, ...]) -> list[Any]:
    try:
        return [json.loads(text) for text in given]
    except ValueError as error:
        raise ConfigError(f"subjects: {given!r} is not JSON ({error}); allowed: {_SUBJECT_EXAMPLE}") from error


def _value(field: dataclasses.Field, given: Any) -> Any:
    rule = rule_of(field)
    if rule.kind == "bool":
        return given
    if rule.kind == "subjects":
        return _parse_subjects(given)
    if rule.kind == "images":
        return given[0] if len(given) == 1 else given
    return _parse(rule, given)


def _help(field: dataclasses.Field) -> str:
    rule = rule_of(field)
    allowed = {
        "int": f": {rule.allowed}",
        "float": f": {rule.allowed}",
        "images": ": a folder, or one option per file",
        "subjects": f": JSON, one option each: {_SUBJECT_EXAMPLE}",
    }
    default = "" if field.default in (dataclasses.MISSING, None) else f" [{field.default}]"
    return field.metadata["meaning"] + allowed.get(rule.kind, "") + default


def _option(field: dataclasses.Field) -> Callable:
    """--field-name; for a boolean also --no-field-name."""
    name, rule = field.name.replace("_", "-"), rule_of(field)
    if rule.kind == "bool":
        return click.option(field.name, f"--{name}/--no-{name}", default=None, help=_help(field))
    metavar = "|".join(map(str, rule.choices)).lower() or rule.kind.upper()
    several = rule.kind in ("images", "subjects")
    return click.option(field.name, f"--{name}", type=str, multiple=several, metavar=metavar, help=_help(field))


def _train_options(command: Callable) -> Callable:
    for field in reversed(dataclasses.fields(TrainConfig)):
        command = _option(field)(command)
    return command


@main.command()
@click.option("--config", "file", metavar="FILE", help="TOML file with fields; options override it")
@click.option("--dry-run", is_flag=True, help="check all and show what would be done; load no weights, write nothing")
@_train_options
def train(file: str | None, dry_run: bool, **options: Any) -> None:
    """Fine-tune for one prompt: LoRA and token files from photos."""
    from palp_fast.toml import read

    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    given = {name: _value(fields[name], value) for name, value in options.items() if value not in (None, ())}
    cfg = TrainConfig(**{**(read(file) if file else {}), **given})
    if dry_run:
        click.echo(_plan(cfg))
        return
    from palp_fast.train import train as run

    result = run(cfg)
    files = {"LoRA (kohya keys)": result.lora_kohya, "LoRA (PEFT keys)": result.lora, "metrics": result.metrics}
    files |= {f"token {token}": path for token, path in result.embedding.items()}
    for name, path in files.items():
        if path is not None:
            click.echo(f"{name}: {path}")


def _plan(cfg: TrainConfig) -> str:
    from palp_fast.methods import passes, split
    from palp_fast.prepare import prepare

    plan = prepare(cfg)
    cfg, extra = plan.config, len(passes(plan.config))
    guided = len(split(cfg)[1])
    by = f", {guided} of them by the teacher {cfg.teacher!r}{_kept(cfg)}" if guided else ""
    lines = [
        plan.describe_prompts(),
        f"photos: {', '.join(str(len(pictures)) for pictures in plan.pictures)} at {plan.resolution} px",
        f"UNet passes per step: {cfg.grad_accumulation} x {2 + extra} at batch {cfg.batch_size} "
        f"(1 forward, 1 backward, {extra} without gradient{by})",
        f"steps: {cfg.steps} of method {cfg.method}, on {cfg.device} in {cfg.base_dtype}",
        plan.estimate().describe(),
    ]
    return "\n".join(lines)


def _kept(cfg: TrainConfig) -> str:
    """How the teacher's weights are kept, where that is not as the model's."""
    from palp_fast import offload

    dtype = f" in {cfg.teacher_base_dtype}" if cfg.teacher_base_dtype != cfg.base_dtype else ""
    return dtype + (", whose UNet waits in the memory of the CPU" if offload.asked(cfg) else "")


@main.command()
@click.option("--model", required=True, help="built-in name, local diffusers folder, .safetensors file or hub id")
@click.option("--prompt", required=True, help="with the token word, not the placeholder")
@click.option("--output-dir", required=True, type=click.Path(file_okay=False, path_type=Path), help="for seed-<n>.png")
@click.option("--lora", help="LoRA file, PEFT or kohya keys")
@click.option("--embedding", multiple=True, help="token file; its name is the token word")
@click.option("-n", "n", type=int, default=4, show_default=True, help="pictures; picture i has seed + i")
@click.option("--steps", type=int, default=50, show_default=True)
@click.option("--guidance-scale", type=float, default=7.5, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--lora-strength", type=float, default=1.0, show_default=True)
@click.option("--negative-prompt", default="")
@click.option("--height", type=int, help="pixels [the model's own]")
@click.option("--width", type=int, help="pixels [the model's own]")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="[fp16 on CUDA, fp32 elsewhere]")
@click.option("--device", default="auto", show_default=True)
@click.option("--batch-size", type=int, default=1, show_default=True)
def generate(output_dir: Path, embedding: tuple[str, ...], dtype: str | None, **options: Any) -> None:
    """Draw pictures with a model and, if given, a LoRA and token files."""
    from palp_fast.resolve import check_output_dir

    check_output_dir(output_dir)
    from palp_fast.generate import generate as draw
    from palp_fast.reference.dtypes import BASE_DTYPES

    images = draw(embedding=list(embedding) or None, dtype=BASE_DTYPES.get(dtype), **options)
    output_dir.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        file = output_dir / f"seed-{options['seed'] + i}.png"
        image.save(file)
        click.echo(file)


@main.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--prompt", help="the clean target prompt")
@click.option("--references", multiple=True, help="photos of the subject: a folder, or one option per file")
@click.option("--encoder", help="CLIP folder or hub id")
@click.option("--device", default="auto", show_default=True)
def evaluate(images: tuple[str, ...], references: tuple[str, ...], encoder: str | None, **options: Any) -> None:
    """Score IMAGES (a folder or files) against a prompt and photos; prints JSON."""
    from palp_fast.evaluate import evaluate as score

    def one_or_all(paths: tuple[str, ...]) -> Any:
        return paths[0] if len(paths) == 1 else list(paths)

    if references:
        options["references"] = one_or_all(references)
    if encoder:
        options["encoder"] = encoder
    click.echo(json.dumps(score(one_or_all(images), **options), indent=2))


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Time every operator beside what else does its work (in a checkout of the repository; --help lists options)."""
    root = _checkout()
    if root is None:
        raise ConfigError("palp-fast bench runs in a checkout of the repository, where bench/ is: "
                          "git clone it and pip install -e . there")
    sys.path.insert(0, str(root))
    from bench.run import main as run

    try:
        run(arguments)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise ConfigError(stop.code) from None
        raise


def _checkout() -> Path | None:
    """The checkout that this package runs from, or the working directory if it is one."""
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (folder / "bench" / "run.py").is_file() and (folder / "palp_fast").is_dir():
            return folder
    return None


@main.command()
def doctor() -> None:
    """Versions, devices, the backend of every operator and why, optional packages."""
    from palp_fast.doctor import report

    click.echo(report())


@main.command()
def presets() -> None:
    """What each preset sets, which given fields override; of those for cards the estimated peak of memory.

    Sections can be pasted into a config file.
    """
    from palp_fast.memory.estimate import assumed, gib
    from palp_fast.presets import CARDS, FAMILIES, PAPER, estimate_of, measured

    _section("paper", PAPER)
    root = _checkout()
    results = sorted((root / "bench" / "results").glob("end_to_end-*.csv")) if root else []
    for card, families in CARDS.items():
        for family, fields in families.items():
            estimate = estimate_of(card, family)
            _section(f"{card}, {FAMILIES[family]}", fields)
            click.echo(f"  # estimated peak {gib(estimate.peak)}, {estimate.worst.name}; peak and seconds per step: "
                       f"{measured(card, family, results)}")
    click.echo(f"# {assumed()}")


def _section(title: str, fields: dict[str, Any]) -> None:
    click.echo("\n".join([title, *(f"  {field} = {json.dumps(value)}" for field, value in fields.items())]))
