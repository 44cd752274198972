"""generate: one seed per picture, the folder's scheduler, LoRA and token files through stock loaders."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny import model_folder

from palp_fast import ConfigError, export, generate
from palp_fast.generate import sample, sampling_scheduler, token_files
from palp_fast.models import load_components
from palp_fast.nn.lora import attach_lora, inject_lora

PROMPT = "a photo of an owl"
FAST = {"steps": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def files(sd_folder, tmp_path_factory):
    """A LoRA file and the file of the token "zorp", with numbers large enough to be seen."""
    folder = tmp_path_factory.mktemp("files")
    unet = load_components(sd_folder, dtype=torch.float32, device="cpu").unet
    layers = inject_lora(unet, "attention", 2, 2.0, torch.Generator().manual_seed(0))
    pairs = {name: (layer.lora_a, torch.ones_like(layer.lora_b)) for name, layer in layers.items()}
    lora = export.save_kohya(folder / "lora.safetensors", pairs, lora_alpha=2.0, metadata={})
    width = unet.config.cross_attention_dim
    return lora, export.save_embedding(folder / "zorp.safetensors", [torch.linspace(-1, 1, width)[None]])


def same(first, second):
    return np.array_equal(np.asarray(first), np.asarray(second))


def test_a_picture_depends_on_its_seed_alone(sd_folder):
    three = generate(sd_folder, PROMPT, n=3, seed=7, **FAST)
    assert [same(a, b) for a, b in zip(three, generate(sd_folder, PROMPT, n=3, seed=7, **FAST))] == [True] * 3
    assert same(generate(sd_folder, PROMPT, n=1, seed=9, **FAST)[0], three[2])
    assert not same(three[0], three[1])
    batched = generate(sd_folder, PROMPT, n=3, seed=7, batch_size=2, **FAST)
    for one, other in zip(three, batched):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_files_are_applied(sd_folder, files):
    lora, token = files
    prompt = "a photo of zorp"
    stock = StableDiffusionPipeline.from_pretrained(sd_folder)
    stock.load_textual_inversion(str(token), token="zorp")
    with_token = sample(stock, prompt, n=1, steps=3)[0]
    assert same(generate(sd_folder, prompt, embedding=token, n=1, **FAST)[0], with_token)
    assert same(generate(sd_folder, prompt, lora, {"zorp": token}, n=1, lora_strength=0.0, **FAST)[0], with_token)
    stock.load_lora_weights(str(lora))
    with_both = sample(stock, prompt, n=1, steps=3)[0]
    assert same(generate(sd_folder, prompt, lora, [token], n=1, **FAST)[0], with_both)
    assert not same(with_token, with_both)
    assert not same(with_token, generate(sd_folder, prompt, n=1, **FAST)[0])


def test_without_peft_our_layers_draw_what_peft_draws(sd_folder, files, monkeypatch):
    lora, token = files
    draw = [sd_folder, "a photo of zorp", lora, token]
    by_peft = [generate(*draw, n=1, lora_strength=strength, **FAST)[0] for strength in (1.0, 0.5)]
    monkeypatch.setattr(sys.modules["palp_fast.generate"], "is_peft_available", lambda: False)
    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", None)
    ours = [generate(*draw, n=1, lora_strength=strength, **FAST)[0] for strength in (1.0, 0.5)]
    for one, other in zip(by_peft, ours):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 2
    assert not same(*ours)


def test_a_lora_of_another_model_is_refused(sd_folder, files):
    unet = load_components(sd_folder, dtype=torch.float32, device="cpu").unet
    layers, lora_alpha = export.load_lora(files[0])
    with pytest.raises(ValueError, match="no module 'elsewhere.to_q'"):
        attach_lora(unet, {"elsewhere.to_q": next(iter(layers.values()))}, lora_alpha)
    attach_lora(unet, layers, lora_alpha)
    with pytest.raises(ValueError, match="not a plain linear layer"):
        attach_lora(unet, layers, lora_alpha)


def test_options_reach_the_pipeline(sd_folder):
    one = generate(sd_folder, PROMPT, n=1, **FAST)[0]
    assert not same(one, generate(sd_folder, PROMPT, n=1, negative_prompt="a fox", **FAST)[0])
    assert not same(one, generate(sd_folder, PROMPT, n=1, guidance_scale=3.0, **FAST)[0])
    assert generate(sd_folder, PROMPT, n=1, height=32, width=48, **FAST)[0].size == (48, 32)


def test_sdxl_uses_zero_embeddings_for_the_empty_prompt(tmp_path):
    folder = model_folder(tmp_path, "sdxl")
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    assert stock.config.force_zeros_for_empty_prompt
    options = {"guidance_scale": 7.5, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    expected = stock(PROMPT, **options).images[0]
    assert same(generate(folder, PROMPT, n=1, **FAST)[0], expected)
    assert not same(generate(folder, PROMPT, n=1, negative_prompt="a fox", **FAST)[0], expected)


@pytest.mark.parametrize("kind, expected", [(DDPMScheduler, DDIMScheduler), (PNDMScheduler, PNDMScheduler)])
def test_the_folder_decides_the_scheduler(sd_folder, kind, expected):
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    scheduler = sampling_scheduler(pipeline.scheduler)
    assert type(scheduler) is expected
    assert scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod, rtol=0, atol=0)

    before = pipeline.scheduler
    state = str(vars(before))
    first = sample(pipeline, PROMPT, n=1, steps=5)[0]
    assert pipeline.scheduler is before and str(vars(before)) == state
    assert same(sample(pipeline, PROMPT, n=1, steps=5)[0], first)


def test_a_folder_without_safety_checker_draws(sd_folder):
    index = json.loads((sd_folder / "model_index.json").read_text())
    assert not (sd_folder / "safety_checker").exists()
    assert index.get("safety_checker", [None, None]) == [None, None]
    assert len(generate(sd_folder, PROMPT, n=1, **FAST)) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": 0}, "n: 0"),
        ({"steps": 0}, "steps: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"lora": "missing.safetensors"}, "lora: 'missing.safetensors' is not a file"),
        ({"embedding": {"zorp": "missing.safetensors"}}, "'zorp'.*is not a file"),
        ({"prompt": "a sketch of [V]"}, r"placeholder \[V\]"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate("not/loaded", **{"prompt": PROMPT, **arguments})


def test_token_files():
    assert token_files(None) == {}
    assert token_files("x/zorp.safetensors") == {"zorp": Path("x/zorp.safetensors")}
    assert list(token_files(["x/a.safetensors", "y/b.pt"])) == ["a", "b"]
