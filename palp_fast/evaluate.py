"""CLIP scores of pictures: how well they show the prompt, how like the subject's photos they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.image_processing_base import ImageProcessingMixin

from .data import image_sources, load_image
from .errors import ConfigError

# SD1's and SDXL's first text encoder is ViT-L/14, SD2's ViT-H/14: the encoder that judges is none of them.
DEFAULT_ENCODER = "openai/clip-vit-base-patch32"

_CLIP_PREPROCESSING = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": Image.Resampling.BICUBIC,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def evaluate(
    images,
    prompt: str | None = None,
    references=None,
    encoder=DEFAULT_ENCODER,
    *,
    device: str = "auto",
    batch_size: int = 16,
) -> dict[str, float | list[float]]:
    """Score pictures by cosine similarities in an image-text encoder's space.

    images, references: a folder, paths or PIL images. prompt: the clean target prompt (class noun, no placeholder).
    encoder: a CLIP folder or hub id, an object as Encoder, or a judge of the emoji-64 world, "emoji-64" or
    "emoji-64-second" (palp_fast/zoo/judge.py), which knows no other pictures. Returns, for a prompt, "text_alignment"
    (mean over images of cos(image, prompt)) and "text_alignment_per_image"; for references, "image_alignment" (each
    image's mean cos to all references, then the mean over images) and "image_alignment_per_image".
    Raises ConfigError when neither is given, DataError for unreadable images.
    """
    if prompt is None and references is None:
        raise ConfigError("evaluate: prompt and references are both None; allowed: either or both")
    pictures = [load_image(source) for source in image_sources(images, "images")]
    photos = None if references is None else [load_image(source) for source in image_sources(references, "references")]
    if not (hasattr(encoder, "text") and hasattr(encoder, "images")):
        encoder = _encoder(encoder, device, batch_size)
    features = encoder.images(pictures)
    scores: dict[str, float | list[float]] = {}
    if prompt is not None:
        _add(scores, "text_alignment", features @ encoder.text([prompt])[0])
    if photos is not None:
        _add(scores, "image_alignment", (features @ encoder.images(photos).T).mean(dim=1))
    return scores


class Encoder:
    """A transformers CLIP model: .text(prompts) and .images(pictures) -> unit vectors [n, width], fp32 on the CPU."""

    def __init__(self, reference=DEFAULT_ENCODER, *, device: str = "auto", batch_size: int = 16):
        self.device, self.batch_size = _device(device), batch_size
        self.model = CLIPModel.from_pretrained(str(reference)).eval().requires_grad_(False).to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(str(reference))
        self.preprocessing = _preprocessing(reference)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> torch.Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).to(self.device)
        pooled = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return _unit(self.model.text_projection(pooled))

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        parts = []
        for start in range(0, len(pictures), self.batch_size):
            batch = [preprocess(picture, self.preprocessing) for picture in pictures[start : start + self.batch_size]]
            pooled = self.model.vision_model(torch.stack(batch).to(self.device)).pooler_output
            parts.append(_unit(self.model.visual_projection(pooled)))
        return torch.cat(parts)


def _encoder(reference, device: str, batch_size: int):
    from .zoo import judge

    if reference in judge.JUDGES:
        return judge.load(reference, device=_device(device), batch=batch_size)
    return Encoder(reference, device=device, batch_size=batch_size)


def _device(device: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def preprocess(picture: Image.Image, config: Mapping) -> torch.Tensor:
    """CLIP's own preprocessing -> [3, H, W] fp32: resize the shortest side, crop the centre, normalise.

    transformers' processor needs torchvision or not, by version; this needs neither and is the same everywhere.
    """
    picture = picture.convert("RGB")
    picture = picture.resize(_resized(picture.size, config["size"]), Image.Resampling(config["resample"]))
    height, width = _sides(config["crop_size"])
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    values = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    values = (values - torch.tensor(config["image_mean"])) / torch.tensor(config["image_std"])
    return values.permute(2, 0, 1).contiguous()


def _preprocessing(reference) -> dict:
    try:
        stored, _ = ImageProcessingMixin.get_image_processor_dict(str(reference))
    except OSError:
        stored = {}
    return {key: default if stored.get(key) is None else stored[key] for key, default in _CLIP_PREPROCESSING.items()}


def _resized(size: tuple[int, int], rule) -> tuple[int, int]:
    """(width, height) after resizing: old configs give the shortest side as a bare number."""
    if isinstance(rule, Mapping) and "shortest_edge" not in rule:
        height, width = _sides(rule)
        return width, height
    shortest = rule["shortest_edge"] if isinstance(rule, Mapping) else rule
    width, height = size
    longest = shortest * max(width, height) // min(width, height)
    return (shortest, longest) if width <= height else (longest, shortest)


def _sides(rule) -> tuple[int, int]:
    return (rule["height"], rule["width"]) if isinstance(rule, Mapping) else (rule, rule)


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def _add(scores: dict, name: str, values: torch.Tensor) -> None:
    scores[name] = float(values.mean())
    scores[f"{name}_per_image"] = values.tolist()
