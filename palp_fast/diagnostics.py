"""What a training shows of itself: alignment against reconstruction by timesteps, token norms, and a warning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

BINS = 8  # equal ranges of timesteps
WINDOW_SAMPLES, MOST_WINDOWS = 64, 32
# Sums over the samples of a bin. error: mean squared error; residual: RMS of r; pull: RMS of lambda c r; lean: mean of
# error times lambda c r. The squares are for standard errors.
SUMS = ("samples", "error", "error_squared", "residual", "residual_squared", "pull_squared", "lean")
RISE, ERROR_SIGMAS, RESIDUAL_SIGMAS = 0.1, 4.0, 2.0


class Diagnostics:
    """Sums over windows of steps and bins of timesteps, on the host, of statistics that every step records anyway.

    A window is at least 64 samples and a 32nd of the training long; at its end the step's line of the metrics gets
    "diagnostics" (see `add`). Methods without a residual (dreambooth, residual_weight 0) have token norms alone.

    **The warning: style rises while identity falls.** The training sees neither; it sees how well "a photo of [V]"
    predicts the photos (the error) and how far that prediction is from the target prompt's (the residual). The mean of
    the last quarter's windows, two at least, is compared with each window before: bin by bin, relative to the bin's
    mean, then the mean over bins, so that no draw of timesteps looks like a change. It warns, once in a training, where
    the error rose by over 10 % and 4 standard errors while the residual fell by over 2: then the prediction left the
    photos for the target prompt. 4, since the best of up to 30 windows is about 2 too low by chance.

    Its limits: it compares a training with its own past. A subject that the alignment never let the model learn, or
    lost within the first window, shows no rise; nor does one whose place another subject of equal error took; at least
    three windows are needed. The error is dominated by noise: a slow loss of a few percent stays unseen. Silence is
    no proof of identity; pictures (sample_every) are. Standard errors take samples for independent.
    """

    def __init__(self, cfg, timesteps: int, words: list[str], vocabulary_norms: list[float]):
        """cfg: resolved TrainConfig; timesteps: of the schedule; words: of each row; a median norm per text encoder."""
        self.residual_weight, self._timesteps = cfg.residual_weight, timesteps
        self._words, self.vocabulary_norms = words, vocabulary_norms
        samples = -(-WINDOW_SAMPLES // (cfg.batch_size * cfg.grad_accumulation))
        self.window = max(samples, -(-cfg.steps // MOST_WINDOWS))
        self._learns_token = cfg.learn_token
        self.sums = torch.zeros(-(-cfg.steps // self.window), BINS, len(SUMS), dtype=torch.float64)
        self.warning: str | None = None

    def add(self, metrics) -> dict:
        """Takes in a step that was read -> what its line of the metrics holds besides.

        details["samples"]: [N, 5], t and the stats of Trainer._loss; details["row_norms"]: [rows]. At the end of a
        window: {"diagnostics": {"steps": [first, last], "bins": see `bins`, "token_norm": {word: [norm by text
        encoder]}, "vocabulary_norm": [median by text encoder], "warning": text or None}}; else {}. As all of a step's
        metrics, token norms are those before its update.
        """
        step, details = metrics["step"], metrics.details
        window = (step - 1) // self.window
        if "samples" in details:
            self._add_samples(self.sums[window], details["samples"])
        if step % self.window:
            return {}
        found = {"steps": [step - self.window + 1, step]}
        if "samples" in details:
            found["bins"] = self.bins(self.sums[window])
            found["warning"] = self._warn(window + 1)
        if self._learns_token:
            found |= {"token_norm": self.by_word(details["row_norms"]), "vocabulary_norm": self.vocabulary_norms}
        return {"diagnostics": found}

    def _add_samples(self, sums: Tensor, samples: Tensor) -> None:
        t, error, residual, gradient, pull = samples[samples.isfinite().all(1)].unbind(1)
        # gradient^2 = mean (2 e - p)^2 with p = lambda c r
        lean = (4 * error + pull**2 - gradient**2) / 4
        values = [torch.ones_like(t), error, error**2, residual, residual**2, pull**2, lean]
        sums.index_add_(0, (t.long() * BINS).div(self._timesteps, rounding_mode="floor"), torch.stack(values, dim=1))

    def bins(self, sums: Tensor | None = None) -> list[dict]:
        """Of each range of timesteps that has samples; sums [BINS, len(SUMS)], None: of the whole training.

        t: [first, last]; rms_error: of the prediction of "a photo of [V]"; rms_residual: of r, and their ratio;
        update: RMS of lambda c r over that of 2 error, the two parts of the gradient (c: 1 with rescale, else
        s_t / a_t); balance: mean of 2 error times lambda c r, over that of (lambda c r)^2: the share of the alignment's
        pull that the photos' pull undoes. 1: it moves the prediction no more.
        """
        sums, found = self.sums.sum(0) if sums is None else sums, []
        for number, row in enumerate(sums.tolist()):
            total = dict(zip(SUMS, row))
            if not (count := total["samples"]):
                continue
            first, end = (-(-edge * self._timesteps // BINS) for edge in (number, number + 1))
            error, residual, pull = (
                math.sqrt(total[name] / count) for name in ("error", "residual_squared", "pull_squared"))
            found.append({
                "t": [first, end - 1], "samples": int(count), "rms_error": error, "rms_residual": residual,
                "ratio": _over(residual, error), "update": _over(pull, 2 * error),
                "balance": _over(2 * total["lean"], total["pull_squared"])})
        return found

    def change(self, early: slice, late: slice) -> dict[str, tuple[float, float]]:
        """(relative change, its standard error) of "error" and "residual" from some windows to others, mean of bins."""
        whole, before, after = self.sums.sum(0), self.sums[early].sum(0), self.sums[late].sum(0)
        both = (before[:, 0] > 0) & (after[:, 0] > 0)
        if not both.any():
            return dict.fromkeys(("error", "residual"), (0.0, math.inf))
        whole, before, after, found = whole[both], before[both], after[both], {}
        for name in ("error", "residual"):
            value, square = SUMS.index(name), SUMS.index(f"{name}_squared")
            mean = (whole[:, value] / whole[:, 0]).clamp(min=torch.finfo(torch.float64).tiny)
            variance = (whole[:, square] / whole[:, 0] - mean**2) / mean**2 * (1 / before[:, 0] + 1 / after[:, 0])
            changes = (after[:, value] / after[:, 0] - before[:, value] / before[:, 0]) / mean
            found[name] = changes.mean().item(), variance.clamp(min=0).sum().sqrt().item() / len(mean)
        return found

    def _warn(self, done: int) -> str | None:
        """The warning, if the window before `done` is the first at which it holds."""
        last = max(2, done // 4)
        if self.warning is not None or done <= last:
            return None
        late = slice(done - last, done)
        worst = max(range(done - last), key=lambda early: _sigmas(*self.change(slice(early, early + 1), late)["error"]))
        change = self.change(slice(worst, worst + 1), late)
        error, residual = change["error"], change["residual"]
        if error[0] < RISE or _sigmas(*error) < ERROR_SIGMAS or _sigmas(*residual) > -RESIDUAL_SIGMAS:
            return None
        updates = [own["update"] for own in self.bins(self.sums[late].sum(0))]
        self.warning = (
            f"step {done * self.window}: style rises while identity falls. The error on the photos is "
            f"{error[0]:.0%} (+- {error[1]:.0%}) above that of steps {worst * self.window + 1} to "
            f"{(worst + 1) * self.window}, and the alignment's residual is {-residual[0]:.0%} smaller; the alignment "
            f"pulls with {sum(updates) / len(updates):.2f} of the photos' strength. Lower residual_weight "
            f"(now {self.residual_weight:g}) or train for fewer steps")
        warnings.warn(self.warning, stacklevel=2)
        return self.warning

    def by_word(self, norms: Tensor) -> dict[str, list[float]]:
        """{token word: [norm by text encoder]} of all rows' norms [rows]."""
        found: dict[str, list[float]] = {}
        for word, norm in zip(self._words, norms.tolist()):
            found.setdefault(word, []).append(norm)
        return found

    def table(self) -> str:
        """`bins` of the whole training as text, and the warning; "" for a method without a residual."""
        lines = [
            f"{own['t'][0]:>4} - {own['t'][1]:<4} {own['samples']:>7} {own['rms_error']:>10.3f} "
            f"{own['rms_residual']:>7.3f} {own['ratio']:>11.2f} {own['update']:>7.2f} {own['balance']:>8.2f}"
            for own in self.bins()
        ]
        if not lines:
            return ""
        head = "timesteps   samples rms(error)  rms(r) r to error  update  balance"
        return "\n".join([head, *lines, *([self.warning] if self.warning else [])])

    def state_dict(self) -> dict:
        return {"sums": self.sums.clone(), "warning": self.warning}

    def load_state_dict(self, state: Mapping) -> None:
        self.sums.copy_(state["sums"])
        self.warning = state["warning"]


def _over(value: float, by: float) -> float:
    return value / by if by else 0.0


def _sigmas(change: float, error: float) -> float:
    return change / error if error else math.copysign(math.inf, change) if change else 0.0
