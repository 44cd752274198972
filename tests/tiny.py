"""Tiny models with random weights in diffusers' folder layout, made on the spot: SD epsilon, SD v-prediction, SDXL."""

import functools
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

KINDS = ("sd", "sd_v", "sdxl")
SENTENCES = [
    f"{article} {style} of {article} {noun} on {article} {colour} background"
    for article, style, noun, colour in itertools.product(
        ("a", "the"), ("photo", "sketch", "line drawing"), ("cat", "dog", "owl", "fruit"), ("blue", "red"))
]


def model_folder(path, kind="sd", seed=0):
    """Writes a model of `kind` to `path` and returns it. Pictures 16 x 16, latents 4 x 8 x 8, prompts of 16 tokens."""
    torch.manual_seed(seed)
    sdxl = kind == "sdxl"
    vocabulary, merges = _bpe()
    tokenizers = [CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16) for _ in range(2 if sdxl else 1)]
    parts = {
        "vae": _vae(),
        "unet": _unet(sdxl),
        "scheduler": DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
            prediction_type="v_prediction" if kind == "sd_v" else "epsilon"),
        "tokenizer": tokenizers[0],
        "text_encoder": CLIPTextModel(_text_config(vocabulary, 16)),
    }
    if sdxl:
        second = CLIPTextModelWithProjection(_text_config(vocabulary, 24, projection_dim=24))
        pipeline = StableDiffusionXLPipeline(
            **parts, tokenizer_2=tokenizers[1], text_encoder_2=second, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(str(path))
    return Path(path)


def teacher_folder(path, student, kind="sd", seed=1, **schedule):
    """A model of `kind` with weights of its own and the autoencoder of the folder `student`; schedule: its changes."""
    model_folder(path, kind, seed)
    shutil.copytree(Path(student) / "vae", Path(path) / "vae", dirs_exist_ok=True)
    file = Path(path) / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | schedule))
    return Path(path)


def photos(n=3, size=20, seed=0):
    """n PIL pictures of noise-free colour gradients, all different."""
    ramp = np.linspace(0, 255, size)
    rng = np.random.default_rng(seed)
    arrays = [np.tile(ramp[:, None] * rng.uniform(0.2, 1, 3), (size, 1, 1)) for _ in range(n)]
    return [Image.fromarray(array.astype("uint8")) for array in arrays]


def config(folder, output_dir, **overrides):
    """A TrainConfig for a tiny model in `folder`: few steps, CPU, everything else as the library's defaults."""
    from palp_fast import TrainConfig

    fields = {"model": str(folder), "prompt": "a sketch of [V]", "output_dir": str(output_dir), "steps": 3, "rank": 4,
              "batch_size": 2, "grad_accumulation": 1, "device": "cpu", "lr": 1e-3, "token_lr": 5e-3}
    if "subjects" not in overrides:
        fields |= {"images": photos(), "class_noun": "cat"}
    return TrainConfig(**(fields | overrides))


@functools.cache
def _bpe():
    """(vocabulary, merges) of a byte-level BPE with CLIP's conventions: any text, words of SENTENCES as one token.

    Not learned: the trainer of `tokenizers` breaks ties differently in every process, and every model was another one.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in sorted(set(" ".join(SENTENCES).split())):
        letters = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(m) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(dict.fromkeys(words))}, merges


def _text_config(vocabulary, width, **more):
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    return CLIPTextConfig(
        vocab_size=len(vocabulary), bos_token_id=start, eos_token_id=end, pad_token_id=end, max_position_embeddings=16,
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2, **more)


def _vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1, scaling_factor=0.5)


def _unet(sdxl):
    extra = {}
    if sdxl:
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                 "projection_class_embeddings_input_dim": 24 + 6 * 4, "use_linear_projection": True}
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        cross_attention_dim=40 if sdxl else 16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **extra)
