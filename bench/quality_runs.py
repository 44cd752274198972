"""The trainings of bench/quality.py: train, draw and judge at every wanted step, keep rows and pictures."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.quality import BASE, GUIDANCE, TOKEN, Plan
from palp_fast import Subject, Trainer, evaluate
from palp_fast.config import SUBJECT_PROMPT
from palp_fast.generate import sample
from palp_fast.models import load_components, resolve
from palp_fast.prompts import clean_prompt, fill
from palp_fast.zoo.build import load_sprites
from palp_fast.zoo.judge import Judge, available, load
from palp_fast.zoo.render import Scene, compose
from palp_fast.zoo.scores import MARKS, Wanted, diversity, marks
from palp_fast.zoo.world import PERSONAL_BACKGROUNDS, TARGETS, World

KEPT = 4  # pictures kept of each prompt and step
PERSONAL_SEED, TRUTH_SEED = 1000, 1100  # of the scenes; the demo's too


@dataclass(frozen=True)
class Run:
    """One training, or the untrained base: what its rows have in common."""

    subject: str
    target: int
    method: str
    seed: int

    @property
    def name(self) -> str:
        """A name for files."""
        text = f"{self.subject}-{self.target}-{self.method}-{self.seed}"
        return "".join(char if char.isalnum() or char in "-=." else "_" for char in text)


class Runs:
    """A plan with its world, sprites, judges and folder. Rows of one run are written together or not at all."""

    def __init__(self, plan: Plan, world: World, cache: Path, folder: Path):
        self.plan, self.world, self.cache, self.folder = plan, world, cache, folder
        self.sprites = load_sprites(cache)
        self.judges: dict[str, Judge] = {name: load(name) for name in available()}
        self.rows_path = folder / "rows.jsonl"
        self._model_digest = weights_digest(plan.model)

    def wanted(self) -> Iterator[Run]:
        """Every run of the plan; the base is one run for each subject, target and seed."""
        for subject in self.plan.subjects:
            for target in self.plan.targets:
                for seed in self.plan.seeds:
                    for method in (BASE, *self.plan.methods):
                        yield Run(subject, target, method, seed)

    def rows(self) -> list[dict]:
        """The rows of this plan that are there, in the order of the plan."""
        return [row for rows in self._done().values() for row in rows]

    def run(self, jobs: int = 1) -> None:
        """Do what is not there yet, `jobs` trainings at once."""
        done = self._done()
        wanted = [run for run in self.wanted() if run not in done]
        self.folder.mkdir(parents=True, exist_ok=True)
        left = len(wanted)
        for runs, rows in self._results(self._trainings(wanted), jobs):
            with self.rows_path.open("a") as file:  # after a blank line, lest a line that a kill cut short spoil it
                file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))
            left -= len(runs)
            print(f"{left} of {len(wanted)} left", flush=True)

    def _results(self, trainings: Iterator[list[Run]], jobs: int) -> Iterator[tuple[list[Run], list[dict]]]:
        """Runs and their rows as they come, from `jobs` processes if more than one."""
        if jobs == 1:
            yield from ((runs, self.rows_of(runs)) for runs in trainings)
            return
        threads = max(1, torch.get_num_threads() // jobs)
        made = (self.plan, self.world, self.cache, self.folder, threads)
        pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_start, initargs=made)
        try:
            futures = {pool.submit(_work, runs): runs for runs in trainings}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _trainings(self, wanted: list[Run]) -> Iterator[list[Run]]:
        """Runs that share one training: DreamBooth never sees the target, so that one serves all of a subject's."""
        while wanted:
            first, runs = wanted[0], wanted[:1]
            if first.method != BASE and self.plan.sees_no_target(first.method):
                runs = [run for run in wanted if replace(run, target=first.target) == first]
            yield runs
            wanted = [run for run in wanted if run not in runs]

    def rows_of(self, runs: list[Run]) -> list[dict]:
        """The base's pictures judged, or those of one training for each of `runs`, which differ in their targets."""
        prompts = ", ".join(repr(TARGETS[run.target][0]) for run in runs)
        print(f"{runs[0].subject}, {prompts}, {runs[0].method}, seed {runs[0].seed}", flush=True)
        return self._base_rows(runs[0]) if runs[0].method == BASE else self._training_rows(runs)

    def digest(self, run: Run) -> str:
        """Of all that decides a run's rows: model weights, settings, sampling, judges."""
        plan = self.plan
        own = [] if run.method == BASE else [plan.settings | plan.methods[run.method], plan.steps_of(run.method)]
        judged = {name: judge.digest for name, judge in self.judges.items()}
        facts = [self._model_digest, judged, run.subject, TARGETS[run.target], run.method, run.seed, plan.images,
                 plan.sampling_steps, GUIDANCE, own]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def photos(self, subject: str) -> list[Image.Image]:
        """The personal set: four 3d renders on plain backgrounds, at varied place and size."""
        return [self.scene(subject, "render", background, PERSONAL_SEED + number)
                for number, background in enumerate(PERSONAL_BACKGROUNDS)]

    def truth(self, subject: str, target: int) -> Image.Image:
        """The picture that the target prompt asks for."""
        _, style, background, second = TARGETS[target]
        return self.scene(subject, style, background, TRUTH_SEED, second)

    def scene(self, subject: str, style: str, background: str, seed: int, second: str | None = None) -> Image.Image:
        names = [own.name for own in self.world.subjects]
        places = tuple(names.index(name) for name in (subject, second) if name)
        return Image.fromarray(compose(self.sprites, Scene(places, style, background, "", seed)))

    def clean_prompt(self, run: Run) -> str:
        """y_c: the target prompt with the class noun."""
        noun = self.world.named(run.subject).class_noun
        return clean_prompt(TARGETS[run.target][0], [Subject(images="unused", class_noun=noun, placeholder="[V]")])

    def pictures_path(self, run: Run, step: int) -> Path:
        """The strip with the first pictures of a run at a step."""
        return self.folder / "pictures" / self.digest(run) / f"{run.name}-{step}.png"

    def _base_rows(self, run: Run) -> list[dict]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = load_components(self.plan.model, dtype=torch.float32, device=device).pipeline()
        return [self._row(run, 0, self._draw(pipeline, self.clean_prompt(run), run.seed))]

    def _training_rows(self, runs: list[Run]) -> list[dict]:
        """Rows of one training, for every run in `runs`; they differ in their targets alone."""
        plan, rows, first = self.plan, {run: [] for run in runs}, runs[0]
        steps = plan.steps_of(first.method)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(plan.training(
                first.method, TARGETS[first.target][0], self.photos(first.subject),
                self.world.named(first.subject).class_noun, steps=max(steps), seed=first.seed,
                output_dir=folder, checkpoint_every=0))
            pipeline, seconds = trainer.components.pipeline(), 0.0
            for metrics in trainer:
                seconds += metrics["seconds"]
                for run in runs if trainer.step in steps else ():
                    prompt = fill(TARGETS[run.target][0], {"[V]": TOKEN})
                    row = self._row(run, trainer.step, self._draw(pipeline, prompt, run.seed))
                    rows[run].append(row | {"train_seconds": round(seconds, 2), "token_norm": metrics["token_norm"]})
            photo = self._photo_identity(first, pipeline)
        for run in runs:
            rows[run][-1]["photo"] = photo
        return [row for run in runs for row in rows[run]]

    def _draw(self, pipeline, prompt: str, seed: int) -> list[Image.Image]:
        """The same noise for every method, subject and step."""
        return sample(pipeline, prompt, n=self.plan.images, steps=self.plan.sampling_steps, guidance_scale=GUIDANCE,
                      seed=10_000 * (seed + 1), batch_size=self.plan.images)

    def _row(self, run: Run, step: int, pictures: list[Image.Image]) -> dict:
        """Shares right, alignments and diversity by each judge."""
        _, style, background, second = TARGETS[run.target]
        wanted = [Wanted(run.subject, style, background, second)] * len(pictures)
        row = {"digest": self.digest(run), "subject": run.subject, "target": run.target, "method": run.method,
               "seed": run.seed, "step": step, "images": len(pictures), "judges": {}}
        for name, judge in self.judges.items():
            reading = judge.read(pictures)
            shares = {mark: float(values.mean()) for mark, values in
                      marks(judge, self.world, reading, wanted).items() if mark in MARKS}
            scores = evaluate(pictures, self.clean_prompt(run), self.photos(run.subject), encoder=judge)
            alignments = {mark: scores[mark] for mark in ("text_alignment", "image_alignment")}
            row["judges"][name] = shares | alignments | {"diversity": diversity(reading.embedding)}
        self._keep(run, step, pictures[:KEPT])
        return row

    def _photo_identity(self, run: Run, pipeline) -> dict[str, float]:
        """Identity in pictures of y_P, by each judge: whether the subject was learned at all."""
        pictures = self._draw(pipeline, fill(SUBJECT_PROMPT, {"[V]": TOKEN}), run.seed)
        wanted = [Wanted(run.subject, "render", "white")] * len(pictures)
        return {name: float(marks(judge, self.world, judge.read(pictures), wanted)["identity"].mean())
                for name, judge in self.judges.items()}

    def _keep(self, run: Run, step: int, pictures: list[Image.Image]) -> None:
        path = self.pictures_path(run, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([np.asarray(picture.convert("RGB")) for picture in pictures], 1)).save(path)

    def _done(self) -> dict[Run, list[dict]]:
        """Run -> its rows, of the runs that are complete; lines cut short by a kill are passed over."""
        found: dict[str, dict[int, dict]] = {}
        for line in self.rows_path.read_text().splitlines() if self.rows_path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found.setdefault(row["digest"], {})[row["step"]] = row
        stored = {run: found.get(self.digest(run), {}) for run in self.wanted()}
        return {run: list(rows.values()) for run, rows in stored.items()
                if rows.keys() == set(self.plan.steps_of(run.method))}


_own: Runs | None = None  # of a worker process


def _start(plan: Plan, world: World, cache: Path, folder: Path, threads: int) -> None:
    """Set up a worker process."""
    global _own
    end_with_parent()
    torch.set_num_threads(threads)
    _own = Runs(plan, world, cache, folder)


def end_with_parent() -> None:
    """End this worker process when the one that started it is gone, however it was killed."""
    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(runs: list[Run]) -> list[dict]:
    return _own.rows_of(runs)


def weights_digest(model: str) -> str:
    """Of the UNet's weights in a model folder, or of the file's; the reference itself for a hub id."""
    source = resolve(model)
    if isinstance(source, str):
        return source
    files = [source] if source.is_file() else sorted(source.glob("*/*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
