"""Base models: what a reference means, what can be known before its weights are loaded, and its loaded parts."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from palp_fast.errors import ConfigError

MODELS = {"emoji-64": Path(__file__).parent / "zoo" / "emoji-64"}

_FAMILIES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(reference: str | os.PathLike) -> Path | str:
    """A local folder or .safetensors file as a Path, or a hub id as a str. Raises ConfigError for anything else."""
    name = os.fspath(reference)
    path = MODELS.get(name, Path(name).expanduser())
    if (path / "model_index.json").is_file() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if name in MODELS:
        raise ConfigError(f"model: the built-in model {name!r} is not in this installation ({path} is missing)")
    if path.exists():
        raise ConfigError(f"model: {name!r} is neither a diffusers folder (it has no model_index.json) "
                          "nor a .safetensors file")
    if _HUB_ID.fullmatch(name) and path.suffix != ".safetensors":
        return name
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(MODELS)}, a diffusers folder, "\
        "a .safetensors file, or a hub id (owner/name)"
    raise ConfigError(f"model: unknown model {name!r}{hint}")


@dataclass(frozen=True)
class ModelFacts:
    """What the configuration files of a model say; reading them loads no weights.

    latents: what makes its latent space; models whose entries differ cannot read each other's latents.
    """

    source: Path | str
    family: str
    prediction_type: str
    vae_scale: int
    sample_size: int
    index: dict = field(repr=False)
    latents: dict = field(default_factory=dict, repr=False)

    @property
    def resolution(self) -> int:
        """The model's own picture size in pixels."""
        return self.sample_size * self.vae_scale

    @property
    def zero_empty(self) -> bool:
        """Whether the unconditional is zeros (SDXL base) rather than the encoded empty prompt."""
        return self.family == "sdxl" and bool(self.index.get("force_zeros_for_empty_prompt", True))


@functools.lru_cache(maxsize=8)
def facts(reference: str | os.PathLike) -> ModelFacts:
    """The configuration of a model, without its weights. Raises ConfigError for a kind of model not supported."""
    from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

    source = _config_source(resolve(reference))
    with _readable(reference):
        index = dict(DiffusionPipeline.load_config(source))
    pipeline = index.get("_class_name")
    if pipeline not in _FAMILIES:
        raise ConfigError(f"model: {reference!r} is made for {pipeline}; allowed: {', '.join(_FAMILIES)}")
    with _readable(reference):
        unet = UNet2DConditionModel.load_config(source, subfolder="unet")
        vae = AutoencoderKL.load_config(source, subfolder="vae")
        schedule = DDPMScheduler.load_config(source, subfolder="scheduler")
    prediction_type = schedule.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(f"model: {reference!r} predicts {prediction_type!r}; allowed: epsilon, v_prediction")
    vae_scale = 2 ** (len(vae["block_out_channels"]) - 1)
    return ModelFacts(source, _FAMILIES[pipeline], prediction_type, vae_scale, unet["sample_size"], index,
                      _latent_space(vae_scale, vae, unet))


def _latent_space(vae_scale: int, vae: dict, unet: dict) -> dict:
    """Entries that older files leave out have the defaults of diffusers' AutoencoderKL."""
    defaults = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None,
                "latents_std": None}
    own = {f"autoencoder's {name}": vae.get(name, default) for name, default in defaults.items()}
    channels = {f"UNet's {name}": unet.get(name, 4) for name in ("in_channels", "out_channels")}
    return {"autoencoder's pixels per latent": vae_scale, **own, **channels}


def _config_source(source):
    """The folder or hub id with the configuration of `source`: a single file has none of its own."""
    if not (isinstance(source, Path) and source.is_file()):
        return source
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    with _readable(source):
        return fetch_diffusers_config(load_single_file_checkpoint(str(source)))["pretrained_model_name_or_path"]


class _readable:
    """Turns the many ways in which a model cannot be read into one ConfigError that names it."""

    def __init__(self, reference):
        self.reference = reference

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        unreadable = (OSError, ValueError, KeyError, SafetensorError)
        if isinstance(error, unreadable) and not isinstance(error, ConfigError):
            reason = (str(error).splitlines() or [kind.__name__])[0]
            raise ConfigError(f"model: {os.fspath(self.reference)!r} cannot be read: {reason}") from error


def load_tokenizers(reference: str | os.PathLike) -> list:
    """One CLIPTokenizer (SD) or two (SDXL), fresh objects on each call; no weights are loaded."""
    from transformers import CLIPTokenizer

    known = facts(reference)
    names = ["tokenizer", "tokenizer_2"] if known.family == "sdxl" else ["tokenizer"]
    with _readable(reference):
        tokenizers = [CLIPTokenizer.from_pretrained(known.source, subfolder=name) for name in names]
    for name, tokenizer in zip(names, tokenizers):
        if len(tokenizer) < 256:
            # Without its files transformers makes one that knows three special tokens and not a single letter.
            raise ConfigError(f"model: {os.fspath(reference)!r} cannot be read: its {name} has no vocabulary")
    return tokenizers


@dataclass
class Components:
    """The live parts of a text-to-image model; all weights frozen, in eval mode. The VAE is always fp32.

    The VAE and the text encoders may wait in the memory of the CPU until they are used (`on_device`).
    """

    tokenizers: list
    text_encoders: list
    vae: torch.nn.Module | None  # None of a teacher
    unet: torch.nn.Module | None  # None while it is not loaded yet
    scheduler: object
    family: str
    reference: str
    vae_scale: int  # pixels per latent, along each side
    zero_empty: bool = False

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen UNet."""
        # Its own .dtype goes through every module, 2 ms a call.
        return next(parameter.dtype for parameter in self.unet.parameters() if parameter.is_floating_point())

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    @functools.cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """alpha_bar [T], fp32, on the model's device."""
        from diffusers import DDPMScheduler

        # A zero terminal SNR is kept off zero, by the amount of diffusers' Euler schedulers.
        table = DDPMScheduler.from_config(self.scheduler.config).alphas_cumprod.clamp(min=2**-24)
        return table.to(self.device, torch.float32)

    @contextlib.contextmanager
    def on_device(self, *modules: torch.nn.Module) -> Iterator[None]:
        """Within, these modules are where the UNet is; afterwards each is back where it was."""
        homes = [next(module.parameters()).device for module in modules]
        try:
            for module in modules:
                torch.nn.Module.to(module, self.device)
            yield
        finally:
            for module, home in zip(modules, homes):
                torch.nn.Module.to(module, home)

    @contextlib.contextmanager
    def decoding_in_tiles(self, side: int) -> Iterator[None]:
        """Within, pictures of side x side pixels are decoded in overlapping tiles (diffusers' own), encoded as ever.

        A third of a whole picture's memory or less; tiles are normalised by themselves, so pixels differ a little.
        """
        vae, latents = self.vae, tile_side(side // self.vae_scale)
        before = vae.tile_sample_min_size, vae.tile_latent_min_size, vae.use_tiling
        vae.tile_sample_min_size, vae.tile_latent_min_size = latents * self.vae_scale, latents
        vae.use_tiling = True
        try:
            yield
        finally:
            vae.tile_sample_min_size, vae.tile_latent_min_size, vae.use_tiling = before

    @torch.no_grad()
    def to_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w], fp32: the posterior's mean, scaled for the UNet."""
        pixels = pixels.to(self.vae.device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def to_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] -> pictures [B, 3, H, W], clamped to [-1, 1]."""
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents).sample.clamp(-1, 1)

    def pipeline(self):
        """The stock diffusers pipeline around these very parts: it draws with whatever they have learned."""
        import diffusers

        parts = {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler,
                 "tokenizer": self.tokenizers[0], "text_encoder": self.text_encoders[0]}
        if self.family == "sdxl":
            parts |= {"tokenizer_2": self.tokenizers[1], "text_encoder_2": self.text_encoders[1]}
            return diffusers.StableDiffusionXLPipeline(
                **parts, force_zeros_for_empty_prompt=self.zero_empty, add_watermarker=False)
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def tile_side(latents: int) -> int:
    """Latents along a tile's side, of a picture's: half of them, in fours, so that a quarter overlaps in whole ones."""
    return -(-latents // 8) * 4


def load_components(
    reference: str | os.PathLike, *, dtype: torch.dtype, device: str | torch.device, form: str | None = None,
    first: Callable[[Components, Callable], None] | None = None, backend: str = "auto",
    teacher: Callable[[Components, Callable], None] | None = None, text_stays: bool = True,
    unet_device: str | torch.device | None = None,
) -> Components:
    """Loads a model: UNet and text encoders in `dtype`, the VAE in fp32 (SDXL's overflows in fp16).

    The UNet's last convolution stays in fp32 and so its output is fp32: guidance multiplies rounding. form: "int8" or
    "nf4" for the linear layers and convolutions of UNet and text encoders (loading.placed); backend: of the latter's
    products. text_stays: whether text encoders are left on the device, else on the CPU. unet_device: where the UNet
    goes; None: where the others go.

    first: called with the components while nothing is on the device yet, unet None, and with a function that puts the
    VAE there; then the VAE goes back to the CPU. teacher: the same with the text encoders, which are dropped then;
    there is no VAE.
    """
    from palp_fast import loading

    known, source = facts(reference), resolve(reference)
    with _readable(reference):
        from_file = isinstance(source, Path) and source.is_file()
        parts = _parts_of_file(source, known) if from_file else _parts_of_folder(source, known)
    unet = parts.pop("unet", None)
    components = Components(
        unet=None, family=known.family, reference=os.fspath(reference), vae_scale=known.vae_scale,
        zero_empty=known.zero_empty, **parts)
    if teacher is not None:
        components.vae = None
        teacher(components, lambda: _place_text(components, dtype, form, device, backend))
        components.text_encoders = []
    else:
        loading.placed(components.vae, torch.float32, None, device if first is None else "cpu")
    if first is not None:
        first(components, lambda: torch.nn.Module.to(components.vae, device))
        torch.nn.Module.to(components.vae, "cpu")
    with _readable(reference):
        _place_text(components, dtype, form, device, backend)
    if not text_stays:
        for encoder in components.text_encoders:
            torch.nn.Module.to(encoder, "cpu")
    with _readable(reference):
        place = dtype, form, unet_device or device
        components.unet = loading.unet_of_folder(source, *place) if unet is None else loading.placed(unet, *place)
    if dtype != torch.float32:
        join_precisions(components)
    return components


def _place_text(components, dtype, form, device, backend) -> None:
    from palp_fast import loading

    for encoder in components.text_encoders:
        loading.placed(encoder, dtype, form, device, backend=backend)


def _parts_of_folder(source, known):
    """All but the UNet."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    encoders = [("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)]
    scheduler = getattr(diffusers, known.index["scheduler"][1])
    return {
        "tokenizers": load_tokenizers(source),
        "text_encoders": [kind.from_pretrained(source, subfolder=name)
                          for name, kind in encoders[:2 if known.family == "sdxl" else 1]],
        "vae": diffusers.AutoencoderKL.from_pretrained(source, subfolder="vae"),
        "scheduler": scheduler.from_pretrained(source, subfolder="scheduler"),
    }


def _parts_of_file(source, known):
    import diffusers

    kind = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[known.family]
    pipeline = kind.from_single_file(str(source))
    suffixes = ("", "_2") if known.family == "sdxl" else ("",)
    return {
        "tokenizers": [getattr(pipeline, f"tokenizer{suffix}") for suffix in suffixes],
        "text_encoders": [getattr(pipeline, f"text_encoder{suffix}") for suffix in suffixes],
        "vae": pipeline.vae, "unet": pipeline.unet, "scheduler": pipeline.scheduler,
    }


def join_precisions(components):
    """Casts at the four places where 16-bit and fp32 parts meet, so that a stock pipeline runs on them unchanged."""

    def cast_input(module, args):
        weight = next(module.parameters())
        return (args[0].to(weight.dtype), *args[1:])

    def cast_sample(module, args, kwargs):
        if args:
            return (args[0].to(components.dtype), *args[1:]), kwargs
        return args, kwargs | {"sample": kwargs["sample"].to(components.dtype)}

    components.unet.conv_out.float().register_forward_pre_hook(cast_input)
    components.unet.register_forward_pre_hook(cast_sample, with_kwargs=True)
    vae = components.vae
    for module in () if vae is None else (vae.post_quant_conv, vae.decoder):
        if module is not None:
            module.register_forward_pre_hook(cast_input)
