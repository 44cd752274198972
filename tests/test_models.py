"""Base models: references, what their configuration says, 16-bit loading, and clear errors for broken ones."""

import shutil

import pytest
import tiny
import torch
from palp_fast import ConfigError, models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny.model_folder(root / kind, kind) for kind in tiny.KINDS}


def test_references(folders, tmp_path):
    assert models.resolve(str(folders["sd"])) == folders["sd"]
    assert models.resolve("owner/name-1.5") == "owner/name-1.5"
    for wrong, words in [
            ("emoji_64", "did you mean 'emoji-64'"), ("nowhere", "emoji-64"), (str(tmp_path), "model_index"),
            ("./no/such/folder", "unknown"), ("no/such.safetensors", "unknown")]:
        with pytest.raises(ConfigError, match=f"model:.*{words}"):
            models.resolve(wrong)


def test_facts_need_no_weights(folders):
    found = {kind: models.facts(folder) for kind, folder in folders.items()}
    assert {kind: f.family for kind, f in found.items()} == {"sd": "sd", "sd_v": "sd", "sdxl": "sdxl"}
    assert {kind: f.prediction_type == "v_prediction" for kind, f in found.items()} == {
        "sd": False, "sd_v": True, "sdxl": False}
    assert all(f.resolution == 16 and f.vae_scale == 2 for f in found.values())
    assert [found[kind].zero_empty for kind in tiny.KINDS] == [False, False, True]
    assert [len(models.load_tokenizers(folders[kind])) for kind in tiny.KINDS] == [1, 1, 2]


@pytest.mark.parametrize(("broken", "words"), [
    ("unet", "config.json"), ("scheduler", "scheduler_config.json"), ("tokenizer", "vocabulary"),
    ("index", "JSON"), ("kind", "FluxPipeline"), ("prediction", "predicts 'sample'"),
])
def test_broken_models_are_found_before_loading(folders, tmp_path, broken, words):
    folder = tmp_path / "model"
    shutil.copytree(folders["sd"], folder)
    if broken in ("unet", "scheduler", "tokenizer"):
        shutil.rmtree(folder / broken)
    elif broken == "prediction":
        path = folder / "scheduler/scheduler_config.json"
        path.write_text(path.read_text().replace("epsilon", "sample"))
    else:
        (folder / "model_index.json").write_text({"index": "{", "kind": '{"_class_name": "FluxPipeline"}'}[broken])
    with pytest.raises(ConfigError, match=f"model:.*{words}"):
        models.load_tokenizers(folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_broken_weights_are_one_clear_error(folders, tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(folders["sd"], folder)
    next((folder / part).glob("*.safetensors")).write_bytes(b"no weights at all")
    with pytest.raises(ConfigError, match="model:.*cannot be read"):
        models.load_components(folder, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_stock_pipelines_run_on_the_parts(folders, kind, dtype):
    components = models.load_components(folders[kind], dtype=dtype, device="cpu")
    assert components.dtype == dtype == components.text_encoders[0].dtype and components.vae.dtype == torch.float32
    assert components.unet.conv_out.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in components.unet.parameters())
    pipeline = components.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    image, = pipeline("a photo of a cat", num_inference_steps=2, height=16, width=16).images
    assert image.size == (16, 16)


def test_latents_are_the_posterior_mean_and_come_back(folders):
    components = models.load_components(folders["sd"], dtype=torch.float32, device="cpu")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = components.to_latents(pixels)
    assert latents.shape == (2, 4, 8, 8) and torch.equal(latents, components.to_latents(pixels))
    torch.testing.assert_close(latents / 0.5, components.vae.encode(pixels).latent_dist.mean)
    torch.testing.assert_close(components.to_pixels(latents), components.vae.decode(latents / 0.5).sample.clamp(-1, 1))
