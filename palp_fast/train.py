"""PALP training (Arar et al., arXiv 2401.06105): the step beside its five parts in PALP.md, and the loop around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from palp_fast import cached, conditioning, doctor, functional, methods, models, predict, previews, teacher
from palp_fast.batches import Batch, Draws, Sums, pick
from palp_fast.conditioning import Condition
from palp_fast.config import TrainConfig
from palp_fast.diagnostics import Diagnostics
from palp_fast.errors import DataError
from palp_fast.graph import CaptureFailed, graphs_of
from palp_fast.metrics import EVERY, Metrics, Recorder, Row
from palp_fast.prepare import prepare
from palp_fast.reference.dtypes import BASE_DTYPES
from palp_fast.reference.quantised import FORMATS
from palp_fast.resolve import compute_dtype
from palp_fast.result import TrainResult, cap_memory, peak_memory_bytes, watch_memory, write_files
from palp_fast.space import PredictionSpace
from palp_fast.update import Update


def train(config: TrainConfig | None = None, /, **overrides) -> TrainResult:
    """Trains a LoRA and token rows for one prompt, with a progress bar, and writes their files to output_dir.

    config: a TrainConfig; overrides: its fields as keywords, alone or over `config`. Raises ConfigError or DataError
    before any work, TrainingDiverged if training becomes non-finite.
    """
    from tqdm import tqdm

    trainer = Trainer(TrainConfig(**overrides) if config is None else config.replace(**overrides))
    with tqdm(total=trainer.config.steps, initial=trainer.step, unit="step") as bar:
        for metrics in trainer:
            if getattr(metrics, "is_read", True):
                shown = {"rec": f"{metrics['rec_loss']:.4f}", "residual": f"{metrics['residual_norm']:.3f}"}
                bar.set_postfix(shown, refresh=False)
            bar.update()
    if table := trainer.diagnostics.table():
        print(table, flush=True)
    return trainer.save()


@dataclass(frozen=True)
class Conditioning:
    """The conditions of one subject's training: y_P, y_c, the empty prompt, and NFSD's negative prompt or None."""

    subject: Condition
    clean: Condition
    empty: Condition
    negative: Condition | None = None


class Trainer:
    """One training run: `for metrics in trainer:` trains step by step, `save()` writes the files.

    Construction checks everything, prints the prompts, loads the model and goes on from a checkpoint if there is one;
    nothing is written before the first step or save. Raises ConfigError or DataError.
    config: the resolved TrainConfig; step: optimizer steps done; unet: the student, or its frozen base, the teacher
    where there is no other, with lora_scale=0; teacher: another model as the teacher (teacher.Teacher) or None;
    tiles: whether previews are decoded in tiles (docs/memory.md);
    diagnostics: alignment and reconstruction by timesteps, token norms, as read so far (diagnostics.Diagnostics).
    lean: None converts the UNet to the lean one where that can be (predict.adapted), False trains diffusers' own.
    """

    def __init__(self, config: TrainConfig, *, lean: bool | None = None):
        plan = prepare(config, lean=lean)
        print(plan.describe_prompts(), flush=True)
        if plan.choice is not None:
            print(plan.choice.describe(), flush=True)
        cfg = self.config = plan.config
        if slow := doctor.warning(cfg):
            print(slow, flush=True)
        self._given, self.folder, self.resolution = config, plan.folder, plan.resolution
        if lean is False:
            predict.check_stock(cfg)
        self.tiles = cfg.memory == "low" or bool(plan.choice and plan.choice.tiles)
        watch_memory(cfg.device)
        cap_memory(cfg.device)
        latents = []
        parts = self.components = models.load_components(
            cfg.model, dtype=BASE_DTYPES[compute_dtype(cfg)], device=cfg.device,
            form=cfg.base_dtype if cfg.base_dtype in FORMATS else None,
            first=lambda parts, place: latents.extend(self._latents(parts, place, plan.pictures)),
            backend=cfg.backend, text_stays=cfg.learn_token)
        self.unet = parts.unet
        self.space = PredictionSpace(parts.alphas_cumprod, parts.prediction_type == "v_prediction", cfg.loss_space)
        self.draws = Draws(cfg, latents, parts.alphas_cumprod)
        generator = torch.Generator().manual_seed(cfg.seed)
        at_once = plan.choice and plan.choice.at_once
        self.predictions = predict.adapted(parts, cfg, generator, lean, at_once)
        self.rows = conditioning.add_rows(parts, cfg, generator)
        self._fixed_row_norm = self._row_norms().mean().item()  # rows that do not learn are on the CPU later
        self.diagnostics = Diagnostics(
            cfg, len(parts.alphas_cumprod), conditioning.row_words(cfg, len(parts.text_encoders)),
            conditioning.vocabulary_norms(parts))
        self._encode_prompts(plan.prompts)
        self.passes = methods.passes(cfg)
        self._own_passes, guided = methods.split(cfg)
        fixed = {name: condition for name, condition in self._fixed.items() if name != "subject"}
        self.predictions.fix(fixed, self._own_passes)
        self.teacher = teacher.load(cfg, self.space, guided, lean, at_once) if guided else None
        self.update = Update(cfg, *self._named_parameters())
        self.sums = Sums(cfg.batch_size * cfg.grad_accumulation, parts.device)
        self.recorder = Recorder(parts.device, EVERY[parts.device.type])
        self._models = [self.predictions, *([self.teacher.predictions] if self.teacher else [])]
        self.graphs = graphs_of(config.cuda_graph, cfg.device, self._models)
        self.step, self._seconds, self._is_open, self._metrics_bytes = 0, 0.0, False, None
        if plan.state is not None:
            self._load_state(plan.state)

    def _latents(self, parts: models.Components, place: Callable, pictures: list[Tensor]) -> Iterator[Tensor]:
        """Of each subject's photos, those that are not in the cache by the VAE, which `place` puts on the device."""
        for latents in cached.latents(parts, place, pictures, self.config.device):
            if not latents.isfinite().all():
                raise DataError(f"model: the autoencoder of {self.config.model!r} gives latents that are not finite")
            yield latents

    def _encode_prompts(self, prompts: dict[str, str]) -> None:
        """Conditions that never change, computed once: y_c, empty and negative prompt; y_P too if no token learns.

        Then the text encoders wait on the CPU until previews take them back.
        """
        parts, cfg = self.components, self.config
        own = [prompts[name] for name in conditioning.subject_names(cfg)]
        ids = conditioning.tokenize(parts.tokenizers, own)
        self._subject_ids = [per_encoder.to(parts.device) for per_encoder in ids]
        texts = {"clean": prompts["y_c"], "negative": prompts.get("negative")}
        if cfg.learn_token:
            self._fixed = conditioning.encode_all(parts, texts)
        else:
            there = parts.on_device(*parts.text_encoders)
            with contextlib.ExitStack() as stack:
                self._fixed = cached.conditions(
                    parts, texts | {"subject": own}, cfg, lambda: stack.enter_context(there))

    def _subject_conditions(self, subjects: Sequence[int]) -> tuple[Condition, list[int]]:
        """(y_P of each distinct subject, with its graph to the token rows; which of them each sample has)."""
        distinct = sorted(set(subjects))
        if "subject" in self._fixed:
            condition = self._fixed["subject"].rows(distinct)
        else:
            condition = conditioning.encode_ids(self.components, [pick(ids, distinct) for ids in self._subject_ids])
        return condition, [distinct.index(subject) for subject in subjects]

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Steps 1 to 4 of PALP.md -> (the scalar whose gradient to eps_hat is g, stats of score_residual).

        stats: [B, 3]; with a residual [B, 4], the last the RMS of its part in the gradient, lambda c r.
        """
        cfg, space, t = self.config, self.space, batch.t
        t_new = t if batch.t_new is None else batch.t_new
        noise_new = batch.noise if batch.noise_new is None else batch.noise_new
        weights = {"sample_weight": product(batch.sample_weight, space.loss_weight(t)), "backend": cfg.backend}

        # 1. The student's prediction at x_t, with its graph to LoRA and token rows.
        subject, which = self._subject_conditions(batch.subjects)
        pred = self.predictions.with_graph(batch.x_t, t, subject, which)
        target = space.of(batch.latents, batch.noise, t)
        if not self.passes:
            none = torch.zeros(0, len(t), device=t.device)
            return functional.score_combination(pred, target, [], none, residual_weight=0.0, **weights)

        with torch.no_grad():
            # 2. Its x0_hat, noised again.
            alpha_bar = self.components.alphas_cumprod
            x_hat = functional.renoise(
                batch.x_t, space.eps(pred, batch.x_t, t), batch.noise, alpha_bar[t],
                alpha_bar_new=None if batch.t_new is None else alpha_bar[t_new], noise_new=batch.noise_new,
                backend=cfg.backend)
            # 3. Teacher and student at x_hat, in one pass; nothing is back-propagated through it.
            predicted = self.predictions.without_graph(x_hat, t_new, subject.detach(), which, self._own_passes)
            if self.teacher is not None:
                predicted |= self.teacher.predict(x_hat, t_new)
            arguments = methods.complete(
                cfg.method, predicted, space,
                x0_hat=space.x0(pred, batch.x_t, t), x_hat=x_hat, noise_new=noise_new, t_new=t_new)
        # 4. The residual is an extra upstream gradient on the prediction of step 1.
        scale = product(batch.residual_scale, space.residual_factor(t, batch.t_new))
        loss, stats = functional.score_residual(
            pred, target, **arguments, alpha=cfg.alpha, beta=cfg.beta, residual_weight=cfg.residual_weight,
            residual_scale=scale, **weights)
        return loss, torch.cat([stats, (stats[:, 1] * scale * cfg.residual_weight)[:, None]], dim=1)

    def predict(self, x: Tensor, t: Tensor, condition: Condition, lora_scale: float | Tensor = 1.0) -> Tensor:
        """What the UNet predicts at x [B, C, h, w], t [B]: by the student, or by the teacher where lora_scale is 0."""
        kwargs = conditioning.unet_kwargs(self.components, condition, x)
        return self.unet(x, t, **kwargs, lora_scale=lora_scale, return_dict=False)[0]

    def _train_step(self) -> Metrics:
        """One optimizer step over grad_accumulation batches. Nothing in it waits for the device."""
        self.recorder.start()
        lr, row = self.update.lr, self._run_step()
        self.update.next_rates()
        self.step += 1
        return self.recorder.record(self.step, lr, row)

    def _run_step(self) -> Row:
        """The step's parts, from their start again where memory runs out or no graph can be made of them.

        A device that runs out of memory first loses its graphs; then, with memory "auto", the run goes on in the next
        mode. The draws are those of the step, so the step is the same.
        """
        while True:
            try:
                return self._parts()
            except CaptureFailed as error:
                steps_down = error.out_of_memory and self._steps_down
                way_on = self.predictions.step_down if steps_down else partial(self.graphs.stop, str(error))
            except torch.OutOfMemoryError:
                if not (self.graphs.held or self._steps_down):
                    raise
                way_on = None if self.graphs.held else self.predictions.step_down
            # Outside of the handler, whose traceback holds the tensors of the step that failed.
            self.update.cut_off()
            self.graphs.drop()
            if way_on is not None:
                way_on()

    @property
    def _steps_down(self) -> bool:
        return self._given.memory == "auto" and self.predictions.steps_down

    def _drop_graphs(self) -> None:
        """And gradients: for what else needs memory, or moves a model."""
        self.update.zero()
        self.graphs.drop()

    def _parts(self) -> Row:
        """A whole step as one part for `graphs`; of several batches each one, and the end, as parts of their own.

        A part depends on what lies in memory that stays in place, and on its key.
        """
        cfg, graphs = self.config, self.graphs
        self.update.zero(keep=cfg.grad_accumulation > 1)
        self.sums.start()
        if graphs.are_on:
            self.update.refresh()
            graphs.begin(self.update.places())
        if cfg.grad_accumulation == 1:
            subjects = self.draws.choose(self.step, 0)
            return graphs.run((subjects, self._modes), partial(self._whole, subjects))
        for i in range(cfg.grad_accumulation):
            subjects = self.draws.choose(self.step, i * cfg.batch_size)
            graphs.run((subjects, self._modes), partial(self._accumulate, subjects))
        return graphs.run("end", self._finish)

    @property
    def _modes(self) -> tuple:
        return tuple(model.mode for model in self._models)

    def _whole(self, subjects: tuple[int, ...]) -> Row:
        self._accumulate(subjects)
        return self._finish()

    def _accumulate(self, subjects: tuple[int, ...]) -> None:
        """Adds the gradients of the batch that was chosen, which has these subjects."""
        batch = self.draws.drawn(subjects)
        loss, stats = self._loss(batch)
        loss = loss / self.config.grad_accumulation
        # 5. One backward pass from g, and one step on LoRA factors and token rows.
        self.update.backward(loss)
        self.sums.add(self.draws.sample_offset, loss.detach(), batch.t, stats)

    def _finish(self) -> Row:
        """The end of step 5: all that follows the last gradient."""
        loss, t, stats = self.sums.loss, self.sums.t, self.sums.stats
        try:
            norm, norms = self.update.clip()
            rows = self._learning_row_norms(loss)
            details = {"row_norms": rows}
            if self.passes:
                details["samples"] = torch.cat([t[:, None], stats], dim=1)
            row = Row.of(self._values(loss, stats, t, norm, rows), norms, details)
            self.update.step()
            self.draws.sampler.update(t, product(stats[:, 2], self.space.loss_weight(t)))
        except torch.OutOfMemoryError as error:
            # What is trained may have changed: the step must not run again.
            raise RuntimeError(f"out of memory in the optimizer's step: {error}") from error
        return row

    def _values(
        self, loss: Tensor, stats: Tensor, t: Tensor, grad_norm: Tensor, row_norms: Tensor
    ) -> dict[str, Tensor]:
        """Means over the samples; token_norm over all rows. 0-d, on the device."""
        return {"loss": loss, "rec_loss": stats[:, 0].mean(), "residual_norm": stats[:, 1].mean(),
                "timestep": t.float().mean(), "grad_norm": grad_norm, "token_norm": row_norms.mean()}

    def _row_norms(self) -> Tensor:
        """Of every row of every new token, in the order of conditioning.row_words."""
        return torch.cat([row.detach().norm(dim=1) for own in self.rows for row in own])

    def _learning_row_norms(self, like: Tensor) -> Tensor:
        return self._row_norms() if self.config.learn_token else like.new_full((1,), self._fixed_row_norm)

    def __iter__(self) -> Iterator[Mapping]:
        """A mapping of metrics for each step; on a CUDA device values are read every few steps, or when asked for."""
        cfg = self.config
        self._open()
        try:
            while self.step < cfg.steps:
                metrics = self._train_step()
                drawn, kept = (every and self.step % every == 0 for every in (cfg.sample_every, cfg.checkpoint_every))
                self._note_steps(read=drawn or kept or self.step == cfg.steps)
                if drawn:
                    self._drop_graphs()
                    self.update.check_parameters(self.step)
                    previews.draw(self, self.folder.samples / f"step-{self.step:08d}")
                if kept:
                    self._save_checkpoint()
                yield dict(metrics) if metrics.is_read else metrics
        finally:
            self._write_metrics(read=True)
        self.update.check_end()

    def _note_steps(self, read: bool) -> None:
        """Writes the metrics of steps that were read; `read`: of all. Raises TrainingDiverged."""
        for metrics in self._write_metrics(read):
            self.update.check(metrics)

    def _write_metrics(self, read: bool) -> list[Metrics]:
        if read:
            self.recorder.read()
        done = self.recorder.take()
        for metrics in done:
            self.folder.write_metrics(dict(metrics) | self.diagnostics.add(metrics))
            self._seconds += metrics["seconds"]
        return done

    def gradients(
        self, latents: Tensor, t: Tensor, noise: Tensor, *, subject: int = 0, t_new: Tensor | None = None,
        noise_new: Tensor | None = None
    ) -> dict[str, float]:
        """Zeroes, then fills, the gradients of one PALP step of this batch -> its metrics. Neither steps nor clips.

        latents, noise, noise_new: [B, C, h, w] as the UNet sees them; t, t_new: [B]. noise_new and t_new default to the
        first ones. Samples weigh the same; the residual is rescaled or not as the config says.
        """
        device = self.components.device
        latents, noise, t = latents.to(device), noise.to(device), t.to(device)
        ones = torch.ones(len(t), device=device)
        batch = Batch(
            latents, self.space.noised(latents, noise, t), noise, t, [subject] * len(t), ones,
            ones if self.config.rescale else self.space.unscaled(t),
            None if t_new is None else t_new.to(device), None if noise_new is None else noise_new.to(device))
        self._drop_graphs()
        loss, stats = self._loss(batch)
        self.update.backward(loss)
        values = self._values(loss.detach(), stats, t, self.update.gradients(), self._learning_row_norms(loss))
        return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist()))

    def named_lora(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """(diffusers module path inside the UNet, lora_a [r, d_in], lora_b [d_out, r]) of every adapted projection."""
        for path, layer in self.predictions.layers.items():
            yield path, layer.lora_a, layer.lora_b

    def token_rows(self) -> list[nn.Parameter]:
        """The trained rows [vectors, width]: for each subject one Parameter per text encoder; [] if no token learns."""
        return [row for own in self.rows for row in own if row.requires_grad]

    def _named_parameters(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        lora = {}
        for path, lora_a, lora_b in self.named_lora():
            lora |= {f"{path}.lora_a": lora_a, f"{path}.lora_b": lora_b}
        rows = {
            f"token {subject.token}, text encoder {i + 1}": row
            for subject, own in zip(self.config.subjects, self.rows) for i, row in enumerate(own) if row.requires_grad
        }
        return lora, rows

    def conditioning(self, subject: int = 0) -> Conditioning:
        """The conditions as the next step sees them; .subject (y_P) with its graph to the token rows."""
        return Conditioning(**{"subject": self._subject_conditions([subject])[0]} | {
            name: condition for name, condition in self._fixed.items() if name != "subject"})

    def save(self) -> TrainResult:
        """Writes the checkpoint and the LoRA and token files as they are now."""
        self._open()
        saved = self._save_checkpoint()
        lora, kohya, embedding = write_files(self.folder.path, self)
        return TrainResult(
            lora, kohya, embedding, self.folder.metrics, sorted(self.folder.samples.glob("*/*.png")), saved, self.step,
            self._seconds, peak_memory_bytes(self.config.device), self.config)

    def _open(self) -> None:
        if not self._is_open:
            self.folder.open(self._given, self._metrics_bytes)
            self._is_open = True

    def _save_checkpoint(self) -> Path:
        self._write_metrics(read=True)
        self.update.check_parameters(self.step)
        state = {"step": self.step, "sampler": self.draws.sampler.state_dict(),
                 "diagnostics": self.diagnostics.state_dict(), **self.update.state_dict()}
        return self.folder.save_checkpoint(state)

    def _load_state(self, state: dict) -> None:
        self.step, self._metrics_bytes = state["step"], state["metrics_bytes"]
        self.draws.sampler.load_state_dict(state["sampler"])
        self.diagnostics.load_state_dict(state["diagnostics"])
        self.update.load_state_dict(state)
        print(f"going on from the checkpoint of step {self.step}", flush=True)


def product(value: Tensor, factor: Tensor | None) -> Tensor:
    """value [B] times factor [B] or None (= 1)."""
    return value if factor is None else value * factor
