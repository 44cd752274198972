"""Another model as the teacher: its guided predictions in the student's terms, and what it must share with the student.

Both read the same latents; text encoders, prediction type and schedule are the teacher's own. Its timestep is the one
of the same signal-to-noise ratio (`matched`): with alpha_bar of the student and alpha_bar' of the teacher,

    log(alpha_bar'_tau / (1 - alpha_bar'_tau)) = log(alpha_bar_u / (1 - alpha_bar_u)),

tau real, the left side linear between the teacher's own timesteps. Both schedules preserve the variance, a^2 + s^2 = 1,
so a'_tau = a_u and s'_tau = s_u: x_hat = a_u x0_hat + s_u eps' enters the teacher as it is, and its prediction is

    eps = a' v + s' x_hat        for a student that predicts noise, by a teacher that predicts v,
    v = (eps - s' x_hat) / a'    for a student that predicts v, by a teacher that predicts noise.

Where the student's schedule goes beyond the teacher's, tau is the teacher's first or last timestep, a' and s' are those
of that timestep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from palp_fast import cached, conditioning, models, offload, predict
from palp_fast.errors import ConfigError
from palp_fast.methods import Pass
from palp_fast.reference.dtypes import BASE_DTYPES
from palp_fast.reference.quantised import FORMATS
from palp_fast.resolve import base_dtype, compute_dtype
from palp_fast.space import PredictionSpace

# Its prompts by the names of methods.Pass, and what conditioning.prompts_of calls them.
_PROMPTS = {"clean": "y_c", "negative": "negative"}
# The last layer of an encoder: of models trained apart it differs by more than its norm, in 16 bits by 1e-3 of it.
_VAE_FILE, _VAE_LAYER, _APART = Path("vae", "diffusion_pytorch_model.safetensors"), "encoder.conv_out.weight", 0.5


class Teacher:
    """Predictions of another model at the student's x_hat.

    components: of the teacher; predictions: of its UNet (predict.adapted), which knows its prompts; student: the
    student's space; passes: those that are the teacher's. timesteps: [T] fp32, tau for each timestep of the student.
    offloaded: whether the UNet's weights wait in the memory of the CPU, each on the device while it is read.
    """

    def __init__(
        self, components, predictions, student: PredictionSpace, passes: list[Pass], offloaded: bool = False
    ):
        self.components, self.predictions, self.student, self.passes = components, predictions, student, passes
        self.offloaded = offloaded
        tau, alpha_bar = matched(student.alphas_cumprod, components.alphas_cumprod)
        self.timesteps, alpha_bar = (x.to(components.device, torch.float32) for x in (tau, alpha_bar))
        self.space = PredictionSpace(alpha_bar, components.prediction_type == "v_prediction")

    @torch.no_grad()
    def predict(self, x_hat: Tensor, u: Tensor) -> dict[str, Tensor]:
        """By argument of score_residual, in what the student predicts: x_hat [B, C, h, w], u [B] of the student."""
        made = self.predictions.without_graph(x_hat, self.timesteps[u], None, [0] * len(x_hat), self.passes)
        return {name: self.space.seen_as(self.student.velocity, pred, x_hat, u) for name, pred in made.items()}


def matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(tau [T], alpha_bar' at it [T]), fp64 on the CPU, for each timestep of the student.

    student, teacher: alpha_bar [T], [T'], falling, in (0, 1). A tau next to a whole number is that number, so that
    equal schedules have equal timesteps.
    """
    own, theirs = (_log_snr(table) for table in (student, teacher))
    wanted, rising = own.clamp(theirs[-1], theirs[0]), theirs.flip(0)
    upper = torch.searchsorted(rising, wanted).clamp(1, len(rising) - 1)
    share = (wanted - rising[upper - 1]) / (rising[upper] - rising[upper - 1])
    tau = len(rising) - upper - share
    whole = tau.round()
    return torch.where((tau - whole).abs() < 1e-6, whole, tau), wanted.sigmoid()


def _log_snr(alpha_bar: Tensor) -> Tensor:
    return torch.special.logit(alpha_bar.detach().to("cpu", torch.float64))


def load(
    cfg, student: PredictionSpace, passes: list[Pass], lean: bool | None, at_once: int | None = None
) -> Teacher:
    """The teacher of a resolved config: its prompts encoded, its text encoders dropped, its UNet without LoRA.

    Weights are in its own base_dtype. lean: as of the Trainer; at_once: of predict.LeanPredictions.
    """
    fixed, form, offloaded = {}, base_dtype(cfg, teacher=True), offload.asked(cfg)
    with _named():
        components = models.load_components(
            cfg.teacher, dtype=BASE_DTYPES[compute_dtype(cfg, teacher=True)], device=cfg.device,
            form=form if form in FORMATS else None, backend=cfg.backend, unet_device="cpu" if offloaded else None,
            teacher=lambda parts, place: fixed.update(_conditions(cfg, parts, place)))
    with _named("base_dtype", "teacher_base_dtype"):
        predictions = predict.adapted(components, _settings(cfg), None, lean, at_once)
    if offloaded:
        offload.send_away(components.unet, torch.device(cfg.device))
        predictions.graph_obstacle = "the teacher's weights move between steps"
    predictions.fix(fixed, passes)
    return Teacher(components, predictions, student, passes, offloaded)


def _settings(cfg):
    """A config as that of a model without LoRA in the teacher's base_dtype."""
    return cfg.replace(lora_targets="none", base_dtype=base_dtype(cfg, teacher=True))


def _conditions(cfg, components, place) -> dict[str, conditioning.Condition]:
    """Of the teacher's prompts; none of them names a token that the teacher does not know."""
    texts = conditioning.prompts_of(cfg)
    own = {name: texts.get(known) for name, known in _PROMPTS.items()}
    return cached.conditions(components, own, cfg, place, teacher=True)


def check(cfg, lean: bool | None = None) -> dict[str, list[list[int]]]:
    """Token ids (one list per tokenizer) of the teacher's prompts by name; loads no weights. lean: as of the Trainer.

    Raises ConfigError for a teacher that cannot be read, whose latent space is another one, whose tokenizers cut a
    prompt, or whose base_dtype diffusers' own modules cannot have.
    """
    if lean is False:
        with _named("base_dtype", "teacher_base_dtype"):
            predict.check_stock(_settings(cfg))
    with _named():
        theirs, tokenizers = models.facts(cfg.teacher), models.load_tokenizers(cfg.teacher)
    _check_latents(cfg, models.facts(cfg.model), theirs)
    texts = conditioning.prompts_of(cfg)
    return {name: [_ids(name, texts[name], tokenizer) for tokenizer in tokenizers]
            for name in _PROMPTS.values() if name in texts}


def _check_latents(cfg, own: models.ModelFacts, theirs: models.ModelFacts) -> None:
    refused = f"teacher: {cfg.teacher!r} has another latent space than the model {cfg.model!r}"
    allowed = "allowed: a model with the same autoencoder"
    for name, value in own.latents.items():
        if theirs.latents[name] != value:
            raise ConfigError(f"{refused}: its {name} is {theirs.latents[name]!r}, not {value!r}; {allowed}")
    layers = [_encoder_layer(facts.source) for facts in (own, theirs)]
    if None not in layers:
        one, other = layers
        if one.shape != other.shape or (one - other).norm() > _APART * one.norm():
            raise ConfigError(f"{refused}: the weights of their autoencoders differ; {allowed}")


def _encoder_layer(source: Path | str) -> Tensor | None:
    """A layer of the autoencoder of a local folder, fp32; None where there is no such file."""
    file = Path(source) / _VAE_FILE
    if not file.is_file():
        return None
    with contextlib.suppress(SafetensorError), safe_open(file, "pt") as weights:
        return weights.get_tensor(_VAE_LAYER).float()
    return None


def _ids(name: str, text: str, tokenizer) -> list[int]:
    cut = text == conditioning.NFSD_NEGATIVE_PROMPT
    ids = tokenizer(text, truncation=cut, verbose=False).input_ids
    if len(ids) > tokenizer.model_max_length:
        field = {"y_c": "clean_prompt", "negative": "negative_prompt"}[name]
        raise ConfigError(f"{field}: {text!r} has {len(ids)} tokens with start and end; "
                          f"the teacher reads at most {tokenizer.model_max_length}")
    return ids


@contextlib.contextmanager
def _named(field: str = "model", here: str = "teacher") -> Iterator[None]:
    """Errors that name a field of the model, as those of models.py, name the teacher's here."""
    try:
        yield
    except ConfigError as error:
        if not str(error).startswith(f"{field}:"):
            raise
        raise ConfigError(here + str(error).removeprefix(field)) from error
