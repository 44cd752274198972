"""Variance of emoji-64's PALP gradient by timestep mode: the trace of its covariance over the LoRA parameters.

    python -m bench.sampler_variance [--train 40] [--runs 6] [--batch 4] [--steps 8]

The demo's subject and settings. A training with adaptive timesteps gives parameters and statistics; then both stay as
they are, and every mode draws `runs` independent runs of consecutive steps, with the same photos and noise for all
modes. Two figures: of one step's gradient, and of the mean over consecutive steps times their number, which is the same
for independent steps and smaller where steps share strata. The squared norm of the mean should not depend on the mode.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable

import torch

from palp_fast import TrainConfig, Trainer, functional
from palp_fast.reference.timestep import STRATA
from palp_fast.sampler import MODES, TimestepSampler
from palp_fast.zoo.demo import SETTINGS

FIRST_SEED = 1000  # of the runs; training has seed 0


def trained(steps: int, batch: int, folder: str) -> Trainer:
    """A trainer after some steps of the demo with adaptive timesteps."""
    fields = {**SETTINGS, "batch_size": batch, "timesteps": "adaptive", "steps": max(steps, 1)}
    trainer = Trainer(TrainConfig(**fields, output_dir=folder))
    for _ in itertools.islice(trainer, steps):
        pass
    return trainer


def sampler_of(trainer: Trainer, mode: str, seed: int) -> TimestepSampler:
    sampler = TimestepSampler(trainer.components.alphas_cumprod, mode, rescale=trainer.config.rescale, seed=seed)
    sampler.load_state_dict(trainer.draws.sampler.state_dict())
    return sampler


def step_gradient(trainer: Trainer, sampler: TimestepSampler, run: int, step: int) -> torch.Tensor:
    """LoRA gradient of one step, flat: the weighted mean over its samples."""
    batch = trainer.config.batch_size
    t, weight, _ = sampler.sample(batch, step)
    # Sample numbers of its own give each run its own photos and noise.
    photos, subjects = trainer.draws.photos(step, run * batch)
    latents = trainer.draws.latents[photos]
    keys = {"seed": FIRST_SEED, "step": step, "sample_offset": run * batch}
    _, noise = functional.add_noise(latents, t, trainer.components.alphas_cumprod, **keys)
    total = 0
    for i in range(batch):
        one = slice(i, i + 1)
        trainer.gradients(latents[one], t[one], noise[one], subject=subjects[i].item())
        total = total + weight[i] * torch.cat([p.grad.flatten() for _, *pair in trainer.named_lora() for p in pair])
    return total / batch


def run_gradients(trainer: Trainer, mode: str, run: int, steps: int) -> torch.Tensor:
    """[steps, parameters] of one run."""
    sampler = sampler_of(trainer, mode, FIRST_SEED + run)
    return torch.stack([step_gradient(trainer, sampler, run, step) for step in range(steps)])


def estimates(runs: torch.Tensor) -> dict[str, tuple[float, float]]:
    """(estimate, its standard error by the jackknife over runs) from gradients [runs, steps, parameters]."""
    steps, mean = runs.shape[1], runs.mean(1)
    each = torch.stack([runs[:, step] @ runs[:, step].T for step in range(steps)]).mean(0)
    return {
        "one step": jackknife(trace, each),
        f"mean of {steps} steps x {steps}": jackknife(trace, steps * (mean @ mean.T)),
        "squared norm of the mean": jackknife(squared_mean, mean @ mean.T),
    }


def trace(products: torch.Tensor) -> torch.Tensor:
    """Trace of the covariance, unbiased, from the inner products [runs, runs] of independent gradients."""
    count = len(products)
    return (products.trace() - products.sum() / count) / (count - 1)


def squared_mean(products: torch.Tensor) -> torch.Tensor:
    """Squared norm of the expected gradient, unbiased, from the same."""
    count = len(products)
    return (products.sum() - products.trace()) / (count * (count - 1))


def jackknife(estimate: Callable, products: torch.Tensor) -> tuple[float, float]:
    count = len(products)
    kept = [[j for j in range(count) if j != i] for i in range(count)]
    parts = torch.stack([estimate(products[rows][:, rows]) for rows in kept])
    error = ((count - 1) / count * (parts - parts.mean()).square().sum()).sqrt()
    return estimate(products).item(), error.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=40, help="steps of training before")
    parser.add_argument("--runs", type=int, default=6, help="independent runs for each mode")
    parser.add_argument("--batch", type=int, default=4, help="samples in a step")
    parser.add_argument("--steps", type=int, help="consecutive steps of a run; a cycle of strata if not given")
    args = parser.parse_args()
    if args.runs < 3:
        raise SystemExit(f"--runs {args.runs}: allowed is an int >= 3")
    steps = args.steps or -(-STRATA // args.batch)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(args.train, args.batch, folder)
        uniform = None
        for mode in MODES:
            rows = estimates(torch.stack([run_gradients(trainer, mode, run, steps) for run in range(args.runs)]))
            uniform = uniform or rows
            print(mode, flush=True)
            for name, (value, error) in rows.items():
                times = value / uniform[name][0]
                print(f"  {name:24} {value:.4e} (+- {error:.1e})  {times:.3f} of uniform", flush=True)


if __name__ == "__main__":
    main()
