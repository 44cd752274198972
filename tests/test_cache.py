"""Latents and prompts on disk: by content, whole or made again, the same run with and without."""

import json
import warnings

import pytest
import tiny
import torch
from palp_fast import Trainer, cache, cached, conditioning, models, train
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The cache's folder, a new one."""
    monkeypatch.setenv("PALP_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch):
    """What was computed: "latents" for each photo, "prompts" for each pass of the text encoders."""
    calls = []
    for owner, name, told in ((models.Components, "to_latents", "latents"), (conditioning, "encode_all", "prompts")):
        def spy(*args, right=getattr(owner, name), told=told):
            calls.append(told)
            return right(*args)

        monkeypatch.setattr(owner, name, spy)
    return calls


def files(store):
    return sorted(path.relative_to(store).parts[0] for path in store.rglob("*.safetensors"))


def run(folder, tmp_path, name, **options):
    return train(tiny.config(folder, tmp_path / name, learn_token=False, steps=1, **options))


def test_a_second_run_computes_nothing_and_is_the_same(folder, tmp_path, monkeypatch, store, made):
    results = [run(folder, tmp_path, name) for name in ("first", "second")]
    assert made == ["latents"] * 3 + ["prompts"] and files(store) == ["latents"] * 3 + ["prompts"]
    monkeypatch.setenv("PALP_FAST_CACHE", "off")
    results.append(run(folder, tmp_path, "third"))
    assert len({result.lora.read_bytes() for result in results}) == 1
    assert len(made) == 8 and len(files(store)) == 4


def test_only_what_changed_is_made_again(folder, tmp_path, store, made):
    run(folder, tmp_path, "first")
    made.clear()
    photos = tiny.photos()
    photos[1].putpixel((9, 9), (255, 0, 255))
    run(folder, tmp_path, "photo", images=photos)
    assert made == ["latents"]
    made.clear()
    run(folder, tmp_path, "prompt", prompt="a line drawing of [V]")
    assert made == ["prompts"]
    made.clear()
    run(folder, tmp_path, "size", resolution=24)
    assert made == ["latents"] * 3
    made.clear()
    run(folder, tmp_path, "rows", token_vectors=2)
    assert made == ["prompts"]


@pytest.mark.parametrize(("file", "layer", "again"), [
    ("vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.weight", ["latents"] * 3),
    ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight", []),
    ("text_encoder/model.safetensors", "final_layer_norm.bias", ["prompts"]),
], ids=["encoder", "decoder", "text encoder"])
def test_another_model_is_another_key(tmp_path, store, made, file, layer, again):
    folder = tiny.model_folder(tmp_path / "model")
    run(folder, tmp_path, "first")
    made.clear()
    weights = load_file(folder / file)
    next(weights[name] for name in weights if name.endswith(layer)).flatten()[0] += 1e-3
    save_file(weights, folder / file, {"format": "pt"})
    models.facts.cache_clear()
    run(folder, tmp_path, "second")
    assert made == again


def test_settings_of_the_vae_are_in_the_key(tmp_path, store, made):
    folder = tiny.model_folder(tmp_path / "model")
    run(folder, tmp_path, "first")
    made.clear()
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.25}))
    models.facts.cache_clear()
    run(folder, tmp_path, "second")
    assert made == ["latents"] * 3


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "checksum"])
def test_a_damaged_file_is_made_again_with_a_warning(tmp_path, store, damage):
    value = {"x": torch.arange(8.0)}
    cache.fetch("kind", lambda: "name", lambda: value)
    (file,) = store.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        del content[-3:]
    elif damage == "flip":
        content[-2] ^= 1
    elif damage == "empty":
        content.clear()
    else:
        save_file(value, file)
        content = bytearray(file.read_bytes())
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged and made again"):
        found = cache.fetch("kind", lambda: "name", lambda: value)
    assert torch.equal(found["x"], value["x"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cache.fetch("kind", lambda: "name", lambda: pytest.fail("made again"))
    assert torch.equal(found["x"], value["x"])


def test_a_write_that_fails_leaves_nothing_and_is_told(tmp_path, store, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.warns(UserWarning, match="cannot be written .No space left"):
        found = cache.fetch("kind", lambda: "name", lambda: {"x": torch.ones(2)})
    assert found["x"].sum() == 2 and not [path for path in store.rglob("*") if path.is_file()]


def test_keys_tell_dtype_shape_and_order_apart():
    x = torch.arange(4)
    parts = [(x,), (x.to(torch.int32),), (x.view(2, 2),), (x, x), ("0 1 2 3",), (x.flip(0),), (None, x), ("a", "b"),
             ("ab",), ("b", "a"), (x.to(torch.bfloat16),), (torch.nn.Linear(2, 2),)]
    assert len({cache.key(*each) for each in parts}) == len(parts)
    assert cache.key(x.view(2, 2).t().contiguous().t()) == cache.key(x.view(2, 2))


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.delenv("PALP_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache.folder() == tmp_path / "palp_fast"
    monkeypatch.setenv("PALP_FAST_CACHE", "off")
    assert cache.folder() is None


def test_a_learned_token_keeps_the_text_encoders_and_a_teacher_reads_its_prompts_once(folder, tmp_path, store, made):
    config = tiny.config(folder, tmp_path / "run", teacher=str(folder))
    conditions = [Trainer(config).teacher.predictions.fixed for _ in range(2)]
    assert made == ["latents"] * 3 + ["prompts"] * 3, "the student's twice, the teacher's once"
    assert torch.equal(conditions[0].hidden, conditions[1].hidden)


def test_text_encoders_and_vae_are_not_moved_where_all_is_there(folder, tmp_path, store, monkeypatch):
    """The functions that put them on the device are called on a miss alone."""
    config = tiny.config(folder, tmp_path / "run", learn_token=False).resolved().replace(memory="fast")
    places = []
    for _ in range(2):
        parts = models.load_components(folder, dtype=torch.float32, device="cpu")
        pictures = [torch.zeros(1, 3, 16, 16)]
        (latents,) = cached.latents(parts, lambda: places.append("VAE"), pictures, "cpu")
        found = cached.conditions(parts, {"clean": "a cat", "negative": None}, config, lambda: places.append("text"))
        assert latents.shape == (1, 4, 8, 8) and list(found) == ["clean", "empty"]
    assert places == ["VAE", "text"]
