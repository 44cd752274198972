"""Quantised base weights, in the lean UNet and in the Trainer: gradients are those of the weights they stand for."""

import copy

import lean_models
import pytest
import tiny
import torch
from close import assert_close, relative
from palp_fast import ConfigError, Trainer, loading, models, nn
from palp_fast.functional import quantise
from palp_fast.nn.frozen import is_quantised, kept
from palp_fast.nn.lean import NOT_QUANTISED
from palp_fast.quantised import QuantisedWeight
from safetensors.torch import load_file, save_file
from step import batch, lora_pairs, scatter, timesteps

FORMS = ("int8", "nf4")
TOLERANCE = 1e-5


def dequantised(module, form):
    """A module's weights, as the trainer quantises them, replaced by what the codes stand for."""
    for path, layer in module.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and path not in NOT_QUANTISED:
            weight = layer.weight.detach()
            if weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            weight = quantise(weight, form).dequantise().contiguous()
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def lean(unet, **options):
    twin = nn.lean_unet(unet, rank=lean_models.RANK, generator=torch.Generator().manual_seed(0), **options)
    layers = nn.lora_layers(twin)
    lean_models.scatter(layers)
    return twin, layers


def truth(kind, form):
    twin, layers = lean_models.stock(dequantised(lean_models.make(kind), form).double())
    return lean_models.with_gradients(twin.double(), layers, lean_models.inputs(kind, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_gradients_are_those_of_the_dequantised_weights(kind, form):
    expected = truth(kind, form)
    for memory in ("fast", "balanced", "low"):
        twin, layers = lean(lean_models.make(kind), memory=memory, base_dtype=form)
        found = lean_models.with_gradients(twin, layers, lean_models.inputs(kind))
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name], TOLERANCE, f"{kind}, {form}, {memory}: {name}")


def test_quantising_is_seen():
    """The gradients of the weights as they were are other ones, by far more than the tolerance."""
    twin, layers = lean_models.stock(lean_models.make("sd1"))
    exact = lean_models.with_gradients(twin, layers, lean_models.inputs("sd1"))
    for form in FORMS:
        assert relative(truth("sd1", form)["output"], exact["output"]) > 100 * TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_every_frozen_layer_but_first_and_last_is_quantised(form):
    unet = lean_models.make("sd1")
    dense = sum(layer.weight.nbytes for path, layer in unet.named_modules()
                if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and path not in NOT_QUANTISED)
    twin, _ = lean(unet, base_dtype=form)
    weights = {path: layer.weight for path, layer in twin.named_modules()
               if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))}
    assert {path for path, weight in weights.items() if not isinstance(weight, QuantisedWeight)} == set(NOT_QUANTISED)
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
                for weight in weights.values() if isinstance(weight, QuantisedWeight)
                for part in (weight.codes, weight.scale)}
    assert sum(storages.values()) < dense * {"int8": 0.35, "nf4": 0.35}[form]
    attention = twin.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    assert attention.to_k.weight.codes.data_ptr() != attention.to_q.weight.codes.data_ptr()
    assert attention.to_q.weight.codes.data_ptr() == attention.packed.codes.data_ptr(), "views of the packed weight"


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_prompt_kv_and_copies(form):
    twin, _ = lean(lean_models.make("sd1"), base_dtype=form)
    plain, _ = lean(dequantised(lean_models.make("sd1"), form))
    sample, timestep, keywords = lean_models.inputs("sd1", prompts=3)
    prompts = keywords["encoder_hidden_states"].detach()
    rows = nn.Rows(2, [0, 0, 2, 2, 1, 2], [0.0] * 2 + [1.0] * 4, fixed=2)
    with torch.no_grad():
        expected, found, copied = (
            unet(sample, timestep, prompts, rows=rows, prompt_kv=unet.prompt_kv(prompts[:2])).sample
            for unet in (plain, twin, copy.deepcopy(twin)))
    assert_close(found, expected, TOLERANCE)
    assert torch.equal(found, copied)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny.model_folder(tmp_path_factory.mktemp(kind), kind) for kind in ("sd", "sdxl")}


def gradients(trainer):
    latents, noise, _ = batch()
    scatter(lora_pairs(trainer), trainer.token_rows())
    trainer.gradients(latents, timesteps(), noise)
    found = {f"{path} {side}": factor.grad
             for path, pair in lora_pairs(trainer).items() for side, factor in zip("AB", pair)}
    return found | {f"token {i}": row.grad for i, row in enumerate(trainer.token_rows())}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_trainers_gradients(folders, tmp_path, monkeypatch, kind, form):
    """LoRA and token rows, against a model whose UNet and text encoders have the dequantised weights."""
    found = gradients(trainer := Trainer(tiny.config(folders[kind], tmp_path / "run", base_dtype=form)))
    assert all(is_quantised(part) for part in (trainer.unet, *trainer.components.text_encoders))
    right = models.load_components

    def load(reference, **options):
        components = right(reference, **options)
        for part in (components.unet, *components.text_encoders):
            dequantised(part, form)
        return components

    monkeypatch.setattr(models, "load_components", load)
    expected = gradients(Trainer(tiny.config(folders[kind], tmp_path / "other", base_dtype="fp32")))
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], 1e-4, name)  # guidance multiplies rounding
    for side in ("A", "B", "token"):
        names = [name for name in expected if side in name.split()]
        pair = (torch.cat([grads[name].flatten() for name in names]) for grads in (found, expected))
        assert_close(*pair, TOLERANCE, side)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_and_quantised_layer_by_layer(folders, monkeypatch, form):
    """Of a local folder: no dense weight is alive when the next one is read."""
    alive, dense = [], []
    right = loading._filling

    def filling(weights):
        fill = right(weights)

        def counted(layer, path):
            dense[:] = [p for p in dense if p.weight_is_dense()]
            alive.append(len(dense))
            fill(layer, path)
            if type(layer) in loading.QUANTISED and path not in NOT_QUANTISED:
                dense.append(_Layer(layer))

        return counted

    monkeypatch.setattr(loading, "_filling", filling)
    unet = loading.unet_of_folder(folders["sd"], torch.bfloat16, form, "cpu")
    assert max(alive) == 0 and len(alive) > 50
    assert not any(p.is_meta for p in (*unet.parameters(), *unet.buffers()))
    whole = loading.placed(models.load_components(folders["sd"], dtype=torch.float32, device="cpu").unet,
                           torch.bfloat16, form, "cpu")
    state = whole.state_dict()
    assert state.keys() == unet.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())


class _Layer:
    def __init__(self, layer):
        self.layer = layer

    def weight_is_dense(self):
        return kept(self.layer, "weight") is None


def test_weights_that_are_not_finite_are_named(folders, tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["mid_block.resnets.0.conv1.weight"][0, 0] = float("nan")
    save_file(state, file)
    with pytest.raises(ConfigError, match=r"mid_block\.resnets\.0\.conv1\.weight has values that are not finite"):
        models.load_components(folder, dtype=torch.float32, device="cpu", form="int8")


@pytest.mark.parametrize("form", FORMS)
def test_refused_without_the_lean_unet(folders, tmp_path, monkeypatch, form):
    monkeypatch.setattr(models, "load_components", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=f"base_dtype: '{form}' needs the lean UNet.*allowed: 'auto', 'fp32'"):
        Trainer(tiny.config(folders["sd"], tmp_path / "run", base_dtype=form), lean=False)


@pytest.mark.parametrize("form", FORMS)
def test_16_bit_parts_with_quantised_weights_draw_and_train(folders, form):
    """What a card loads: bf16 beside codes; the stock pipeline runs on it, and the lean UNet has gradients."""
    components = models.load_components(folders["sd"], dtype=torch.bfloat16, device="cpu", form=form)
    assert components.dtype == torch.bfloat16 and is_quantised(components.unet)
    pipeline = components.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    image, = pipeline("a photo of a cat", num_inference_steps=2, height=16, width=16).images
    assert image.size == (16, 16)
    twin, layers = lean(components.unet)
    prompts = torch.randn(1, 16, 16, dtype=torch.bfloat16)
    twin(torch.randn(1, 4, 8, 8), torch.tensor([300]), prompts).sample.float().square().sum().backward()
    assert all(layer.lora_a.grad.isfinite().all() and layer.lora_a.grad.any() for layer in layers.values())
