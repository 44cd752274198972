"""One PALP step of a Trainer beside the same step of tests/truth.py: fixed inputs, a state to start from, a check."""

import tiny
import torch
from close import assert_close
from truth import Settings, Truth

from palp_fast import Subject, Trainer

RANK = 4
WORDS = {"zorp": "cat", "quux": "dog"}
# fp32 against fp64. Guidance of 15 multiplies the rounding of predictions, a v model's weight 1 / a_t^2 that of late
# timesteps: a correct step sits at 1e-6 to 5e-6, a wrong sign, factor or prompt above 2e-2 (test_the_cases_differ).
TOLERANCE, MODULE_TOLERANCE = 1e-5, 1e-4


def batch(size=3):
    """Latents, noise and second noise [B, 4, 8, 8]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 8, 8, generator=generator)[:size] for _ in range(3)]


def timesteps(size=3):
    """An early, a middle and a late one: NFSD treats the early one differently."""
    return torch.tensor([480, 37, 860][:size])


def call_options(other, noise_new):
    """other: which of "noise" and "timestep" are not the first ones."""
    options = {"t_new": torch.tensor([150, 610, 333][: len(noise_new)])} if "timestep" in other else {}
    return options | ({"noise_new": noise_new} if "noise" in other else {})


def settings_for(chosen, subjects=1):
    prompts = tuple(f"a photo of {word}" for word in list(WORDS)[:subjects])
    clean = "a sketch of a cat" if subjects == 1 else "a sketch of a cat and a dog"
    return Settings(**{"subject_prompts": prompts, "clean_prompt": clean} | chosen)


def make_trainer(folder, output_dir, settings, *, lean=None, **overrides):
    """A Trainer whose prompts are `settings`' own, made by the library from placeholders and class nouns."""
    shared = ("method", "alpha", "beta", "negative_prompt", "residual_weight", "rescale", "loss_space", "lora_alpha")
    fields = {name: getattr(settings, name) for name in shared} | {"rank": RANK} | overrides
    if len(settings.subject_prompts) == 1:
        fields |= {"token": "zorp"}
    else:
        fields["prompt"] = "a sketch of [V1] and [V2]"
        fields["subjects"] = [
            Subject(tiny.photos(), noun, f"[V{i}]", f"a photo of [V{i}]", token=word)
            for i, (word, noun) in enumerate(WORDS.items(), 1)
        ]
    return Trainer(tiny.config(folder, output_dir, **fields), lean=lean)


@torch.no_grad()
def scatter(pairs, rows):
    """Moves LoRA factors and token rows away from their start: B is not zero, so the student is not the teacher."""
    generator = torch.Generator().manual_seed(0)
    for name in sorted(pairs):
        for factor in pairs[name]:
            factor.copy_(0.3 * torch.randn(factor.shape, generator=generator))
    for row in rows:
        row += 0.3 * torch.randn(row.shape, generator=generator)


def lora_pairs(trainer):
    return {path: (a, b) for path, a, b in trainer.named_lora()}


def by_encoder(trainer, value):
    """One tensor [all words, width] per text encoder; value(row) of each trained row Parameter."""
    rows = list(trainer.token_rows())
    widths = dict.fromkeys(row.shape[1] for row in rows)
    return [torch.cat([value(row) for row in rows if row.shape[1] == width]) for width in widths]


def truth_of(folder, trainer, settings, words):
    rows = by_encoder(trainer, torch.Tensor.detach)
    return Truth(folder, words, lora_pairs(trainer), rows, settings, trainer.config.teacher)


def check_trainer(folder, output_dir, settings, *, subject=0, other="", size=3, **overrides):
    """Asserts that Trainer.gradients equals the truth's; returns the former as ({path: (dA, dB)}, [d rows])."""
    trainer = make_trainer(folder, output_dir, settings, **overrides)
    scatter(lora_pairs(trainer), trainer.token_rows())
    latents, noise, noise_new = batch(size)
    arguments, options = (latents, timesteps(size), noise), call_options(other, noise_new)
    words, written = list(WORDS)[: len(settings.subject_prompts)], settings
    if vectors := overrides.get("token_vectors"):
        words = ["zorp", *(f"zorp_{i}" for i in range(1, vectors))]
        written = settings_for({"subject_prompts": (f"a photo of {' '.join(words)}",)})
    expected = truth_of(folder, trainer, written, words).gradients(*arguments, subject=subject, **options)
    trainer.gradients(*arguments, subject=subject, **options)
    lora = {name: (a.grad, b.grad) for name, (a, b) in lora_pairs(trainer).items()}
    found = lora, by_encoder(trainer, lambda row: row.grad)
    assert_equal_gradients(found, expected)
    return found


def assert_equal_gradients(found, expected):
    """found, expected: ({path: (dA, dB)}, [d rows]). Errors relative to the norm of all modules, and of each."""
    (found_lora, found_rows), (lora, rows) = found, expected
    assert found_lora.keys() == lora.keys()
    for i, pair in enumerate(zip(found_rows, rows, strict=True)):
        assert pair[1].norm() > 0, "no gradient to compare"
        assert_close(*pair, TOLERANCE, f"token rows {i}")
    for i, factor in enumerate(("lora_a", "lora_b")):
        for name in lora:
            assert_close(found_lora[name][i], lora[name][i], MODULE_TOLERANCE, f"{name} {factor}")
        if lora:
            together = (torch.cat([grads[name][i].flatten() for name in sorted(lora)]) for grads in (found_lora, lora))
            assert_close(*together, TOLERANCE, f"every {factor}")
