"""Exported files: what stock diffusers draws from them, their keys, metadata and bytes."""

import hashlib
import json

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from palp_fast import Trainer, export
from palp_fast.generate import apply_files, load_token, sample
from palp_fast.nn.lora import inject_lora

RANK = 4
PROMPT = "a photo of zorp on red"


def random_lora(unet, lora_alpha):
    """LoRA with B far from zero: a picture drawn at another strength is another picture."""
    layers = inject_lora(unet, "attention", RANK, lora_alpha, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        layer.lora_a.data.normal_(0, 0.5, generator=generator)
        layer.lora_b.data.normal_(0, 0.5, generator=generator)
    return layers


def pairs(layers):
    return {name: (layer.lora_a, layer.lora_b) for name, layer in layers.items()}


def add_rows(tokenizer, text_encoder, words, rows):
    """The token as a hand-written extension of the embedding matrix."""
    tokenizer.add_tokens(words)
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    table.data[tokenizer.convert_tokens_to_ids(words)] = rows


def rows_like(text_encoder, vectors, seed=5):
    width = text_encoder.config.hidden_size
    return torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed)) * 0.5


def sample_metadata(lora_alpha=RANK, family="sd", width=768, **options):
    fields = {"name": "zorp", "family": family, "cross_attention_dim": width, "rank": RANK, "resolution": 64}
    return export.metadata(**fields, lora_alpha=lora_alpha, **options)


def save(kind, path, layers, lora_alpha, **options):
    writer = {"peft": export.save_peft, "kohya": export.save_kohya}[kind]
    return writer(path, layers, lora_alpha=lora_alpha, metadata=sample_metadata(lora_alpha), **options)


def draw(pipeline):
    return sample(pipeline, PROMPT, n=1, steps=4, seed=3)[0]


def difference(first, second):
    """The largest difference of two pictures, in steps of 255."""
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("lora_alpha", [RANK, 2.5])
@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_stock_diffusers_draws_our_picture(sd_folder, tmp_path, kind, lora_alpha, strength):
    ours = StableDiffusionPipeline.from_pretrained(sd_folder)
    rows = rows_like(ours.text_encoder, 1)
    plain = draw(ours)
    layers = random_lora(ours.unet, lora_alpha)
    lora = save(kind, tmp_path / "lora.safetensors", pairs(layers), lora_alpha)
    token = export.save_embedding(tmp_path / "zorp.safetensors", [rows])
    for layer in layers.values():
        layer.lora_b.data *= strength
    add_rows(ours.tokenizer, ours.text_encoder, ["zorp"], rows)

    stock = StableDiffusionPipeline.from_pretrained(sd_folder)
    stock.load_textual_inversion(str(token), token="zorp")
    stock.load_lora_weights(str(lora), adapter_name="subject")
    stock.set_adapters("subject", strength)
    expected = draw(ours)
    assert difference(draw(stock), expected) <= 2
    assert difference(plain, expected) > 20, "the LoRA and token hardly change the picture: nothing was tested"
    stock.set_adapters("subject", 1.3 * strength)
    assert difference(draw(stock), expected) > 2, "strength hardly matters: a wrong alpha would go unnoticed"


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("lora_alpha", [None, 10.0])
def test_stock_diffusers_draws_the_trainers_own_picture(sd_folder, tmp_path, lora_alpha, strength):
    # With a larger lr the attention saturates, and the picture no longer depends on the strength.
    fields = {"lora_alpha": lora_alpha, "lr": 0.01, "token_lr": 0.5, "token": "zorp", "token_vectors": 2, "steps": 6}
    trainer = Trainer(tiny.config(sd_folder, tmp_path / "run", residual_weight=0.1, optimizer="adamw", **fields))
    for _ in trainer:
        pass
    result = trainer.save()
    at_strength = trainer.unet.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "lora_scale": strength}), with_kwargs=True, prepend=True
    )
    expected = draw(trainer.components.pipeline())
    at_strength.remove()
    for lora in (result.lora, result.lora_kohya):
        stock = StableDiffusionPipeline.from_pretrained(sd_folder)
        plain = draw(stock)
        stock.load_textual_inversion(str(result.embedding["zorp"]), token="zorp")
        stock.load_lora_weights(str(lora), adapter_name="subject")
        stock.set_adapters("subject", strength)
        assert difference(draw(stock), expected) <= 2
        assert difference(plain, expected) > 20, "training hardly changed the picture: nothing was tested"
        stock.set_adapters("subject", 2 * strength)
        assert difference(draw(stock), expected) > 4, "strength hardly matters: a wrong alpha would go unnoticed"


def test_every_lora_key_is_used_by_diffusers(sd_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    layers = pairs(random_lora(pipeline.unet, 3.0))
    for kind in ("peft", "kohya"):
        lora = save(kind, tmp_path / f"{kind}.safetensors", layers, 3.0)
        stock = StableDiffusionPipeline.from_pretrained(sd_folder)
        stock.load_lora_weights(str(lora), adapter_name="subject")
        loaded = dict(stock.unet.named_modules())
        for name, (lora_a, lora_b) in layers.items():
            torch.testing.assert_close(loaded[name].lora_A["subject"].weight, lora_a, rtol=0, atol=0)
            torch.testing.assert_close(loaded[name].lora_B["subject"].weight, lora_b, rtol=0, atol=0)
            assert loaded[name].scaling["subject"] == 3.0 / RANK


def test_token_of_several_vectors(sd_folder, tmp_path):
    ours = StableDiffusionPipeline.from_pretrained(sd_folder)
    rows = rows_like(ours.text_encoder, 3)
    token = export.save_embedding(tmp_path / "zorp.safetensors", [rows])
    add_rows(ours.tokenizer, ours.text_encoder, ["zorp", "zorp_1", "zorp_2"], rows)
    stock = StableDiffusionPipeline.from_pretrained(sd_folder)
    apply_files(stock, embedding=token)
    assert difference(draw(stock), draw(ours)) <= 2
    ids = stock.tokenizer(stock.maybe_convert_prompt(PROMPT, stock.tokenizer)).input_ids
    assert sum(i >= len(stock.tokenizer) - 3 for i in ids) == 3


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_sdxl_draws_our_picture(sdxl_folder, tmp_path, kind):
    ours = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    rows = [rows_like(ours.text_encoder, 2), rows_like(ours.text_encoder_2, 2, seed=6)]
    layers = random_lora(ours.unet, 2.5)
    lora = save(kind, tmp_path / "lora.safetensors", pairs(layers), 2.5)
    token = export.save_embedding(tmp_path / "zorp.safetensors", rows)
    add_rows(ours.tokenizer, ours.text_encoder, ["zorp", "zorp_1"], rows[0])
    add_rows(ours.tokenizer_2, ours.text_encoder_2, ["zorp", "zorp_1"], rows[1])

    stock = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    stock.load_lora_weights(str(lora))
    load_token(stock, "zorp", token)
    assert difference(draw(stock), draw(ours)) <= 2


def test_file_keys(tmp_path):
    name = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
    layers = {name: (torch.ones(RANK, 6), torch.ones(5, RANK))}
    with safe_open(save("kohya", tmp_path / "k.safetensors", layers, 8.0), framework="pt") as file:
        key = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0"
        assert set(file.keys()) == {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"}
        assert file.get_tensor(f"{key}.lora_down.weight").shape == (RANK, 6)
        assert file.get_tensor(f"{key}.lora_up.weight").shape == (5, RANK)
        alpha = file.get_tensor(f"{key}.alpha")
        assert alpha.shape == () and alpha.item() == 8.0
        # diffusers refuses a file that states alpha twice.
        assert "lora_adapter_metadata" not in file.metadata()
    with safe_open(save("peft", tmp_path / "p.safetensors", layers, 8.0), framework="pt") as file:
        assert set(file.keys()) == {f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"}
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    assert adapter == {"unet.r": RANK, "unet.lora_alpha": 8, "unet.target_modules": [name]}


def test_token_file_keys(tmp_path):
    one, two = torch.ones(2, 8), torch.ones(2, 12)
    assert load_file(export.save_embedding(tmp_path / "a.safetensors", [one])).keys() == {"emb_params"}
    pair = load_file(export.save_embedding(tmp_path / "b.safetensors", [one, two]))
    assert {key: tuple(value.shape) for key, value in pair.items()} == {"clip_l": (2, 8), "clip_g": (2, 12)}
    with pytest.raises(ValueError, match="allowed: one"):
        export.save_embedding(tmp_path / "c.safetensors", [one[0]])


def test_metadata(tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    entries = sample_metadata(2.5, trigger="zorp")
    assert all(isinstance(value, str) for value in entries.values())
    assert "modelspec.date" not in entries
    expected = {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.5",
        "ss_resolution": "(64, 64)",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": "zorp",
        "modelspec.prediction_type": "epsilon",
    }
    assert expected.items() <= entries.items()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert sample_metadata()["modelspec.date"] == "1970-01-02T00:00:00"
    sdxl = sample_metadata(family="sdxl", width=2048)
    assert (sdxl["ss_base_model_version"], sdxl["modelspec.architecture"]) == (
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base/lora",
    )
    sd2 = sample_metadata(width=1024, prediction_type="v_prediction")
    assert (sd2["ss_v2"], sd2["modelspec.architecture"]) == ("True", "stable-diffusion-v2-768-v/lora")
    assert sd2["modelspec.prediction_type"] == "v"


def test_metadata_reaches_the_file_with_a_hash_of_the_data(tmp_path):
    layers = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(RANK, 6), torch.ones(5, RANK))}
    path = save("kohya", tmp_path / "k.safetensors", layers, 8.0)
    with safe_open(path, framework="pt") as file:
        entries = file.metadata()
    assert sample_metadata(8.0).items() <= entries.items()
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert entries["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_load_lora_reads_back(sd_folder, tmp_path, kind, dtype):
    layers = pairs(random_lora(StableDiffusionPipeline.from_pretrained(sd_folder).unet, 2.5))
    path = save(kind, tmp_path / "lora.safetensors", layers, 0.3, dtype=dtype)
    loaded, lora_alpha = export.load_lora(path)
    assert lora_alpha == pytest.approx(0.3, rel=1e-7)
    assert loaded.keys() == layers.keys()
    for name, (lora_a, lora_b) in layers.items():
        for got, stored in zip(loaded[name], (lora_a, lora_b)):
            assert got.dtype == torch.float32
            assert torch.equal(got, stored.to(dtype).float())


def test_load_lora_without_stated_alpha_takes_the_rank(tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": torch.ones(3, 6), f"{name}.lora_B.weight": torch.ones(5, 3)}, tmp_path / "x")
    assert export.load_lora(tmp_path / "x")[1] == 3.0


def test_load_lora_refuses_other_files(tmp_path):
    save_file({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(3, 6)}, tmp_path / "te")
    with pytest.raises(ValueError, match="not a UNet LoRA key"):
        export.load_lora(tmp_path / "te")
    save_file({"unet.mid_block.attentions.0.to_q.lora_A.weight": torch.ones(3, 6)}, tmp_path / "half")
    with pytest.raises(ValueError, match="one LoRA factor only"):
        export.load_lora(tmp_path / "half")


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_bytes_depend_on_content_alone(tmp_path, kind):
    names = [f"mid_block.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in range(3)]
    layers = {name: (torch.full((RANK, 6), float(i)), torch.ones(5, RANK)) for i, name in enumerate(names)}
    first = save(kind, tmp_path / "a.safetensors", layers, 8.0)
    second = save(kind, tmp_path / "b.safetensors", dict(reversed(layers.items())), 8.0)
    assert first.read_bytes() == second.read_bytes()
    header = first.read_bytes()[8:]
    assert header.index(b'"format"') < header.index(b'"modelspec.architecture"') < header.index(b'"ss_v2"')


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = export.write_atomic(tmp_path / "new" / "file", b"old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr(export.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        export.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_values_that_cannot_be_stored_are_refused(tmp_path):
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    good = (torch.ones(RANK, 6), torch.ones(5, RANK))
    cases = [
        ({}, {}, "layers is empty"),
        ({name: (good[0], good[1].T)}, {}, "allowed: \\[r, d_in\\]"),
        ({name: good, "other": (torch.ones(2, 6), torch.ones(5, 2))}, {}, "differ in rank"),
        ({name: (good[0] * 1e5, good[1])}, {"dtype": torch.float16}, "not finite"),
        ({name: good}, {"dtype": torch.bfloat16}, "allowed: torch.float32"),
    ]
    for layers, options, message in cases:
        with pytest.raises(ValueError, match=message):
            save("peft", tmp_path / "x.safetensors", layers, 4.0, **options)
    assert not list(tmp_path.iterdir())
