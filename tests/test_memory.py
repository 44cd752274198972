"""Estimates of peak memory: against what is alive, byte by byte, at full size and on a CPU; the choice of a mode."""

import contextlib
import dataclasses
import io
import sys

import alive
import ledger
import pytest
import tiny
import torch
import traced
from diffusers import AutoencoderKL
from palp_fast import ConfigError, Subject, TrainConfig, Trainer, doctor, memory, models
from palp_fast.conditioning import TokenEmbedding
from palp_fast.memory import parts
from palp_fast.memory.choose import MARGIN, fitting
from palp_fast.memory.estimate import ASSUMED
from palp_fast.memory.models import FAMILIES, configs_of, nbytes, parts_of
from palp_fast.memory.step import Sizes, step
from palp_fast.nn.lean import MEMORY, set_memory
from palp_fast.prepare import prepare
from palp_fast.result import cap_memory
from step import lora_pairs, scatter
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

FAST_BF16 = pytest.mark.skipif(
    not doctor.fast_on_cpu("bf16"), reason="torch multiplies bf16 in fp32 copies here, which no estimate counts")
GIB = 2**30


def config(**changes):
    """Of a model that is not there, on a card that is not there either."""
    fields = {"model": "m", "prompt": "a [V]", "output_dir": "o", "device": "cuda", "base_dtype": "bf16",
              "memory": "fast", "backend": "reference", "subjects": [Subject("photos", "cat", "[V]")]}
    return TrainConfig(**(fields | changes))


@pytest.mark.parametrize(("shape", "mode", "options"), [
    ("SD1.x 512", "fast", {"base_dtype": "nf4"}), ("SD1.x 512", "balanced", {"batch_size": 2, "beta": 1.0}),
    ("SDXL 1024", "low", {"base_dtype": "int8"}),
], ids=str)
def test_a_step_at_full_size(shape, mode, options):
    """The estimate of each part of a step within 2 % of the bytes alive in that step itself."""
    cfg = config(memory=mode, **options)
    form = cfg.base_dtype if cfg.base_dtype != "bf16" else None
    real, family = alive.FakeStep(shape, cfg, form), FAMILIES[shape.partition(" ")[0]]
    found = real.peaks()
    unet = parts_of(family, cfg.replace(base_dtype=form or "fp16")).unet
    set_memory(unet, mode)
    assert nbytes(unet) == pytest.approx(real.weights(), rel=1e-3)
    made = step(unet, cfg, Sizes(cfg.batch_size, family.resolution // 8, 77, 1, 2), 0, 0, True)
    for name, size in found.items():
        estimate = getattr(made, name)
        print(f"{shape} {mode} {options} {name}: alive {size / 2**20:.1f} MiB, estimate {estimate / 2**20:.1f}")
        assert estimate == pytest.approx(size, rel=0.02), name


@pytest.mark.parametrize("way", ["encode", "decode", "decode in tiles"])
def test_vae_at_full_size(way):
    """A picture of 512 x 512 through the VAE, without memory: within 5 %."""
    tiles = "tiles" in way
    with FakeTensorMode(), torch.no_grad():
        vae = AutoencoderKL.from_config(FAMILIES["SD1.x"].vae).eval()
        known = [*vae.parameters(), *vae.buffers()]
        components = models.Components([], [], vae, None, None, "sd", "m", 8)
        with alive.Alive(known) as counted, components.decoding_in_tiles(512) if tiles else contextlib.nullcontext():
            if way == "encode":
                vae.encode(torch.empty(1, 3, 512, 512)).latent_dist.mean
            else:
                vae.decode(torch.empty(1, 4, 64, 64)).sample.clamp(-1, 1)
    made = parts.vae_encode(vae, 512) if way == "encode" else parts.vae_decode(vae, 512, tiles)
    print(f"{way}: alive {counted.peak / 2**20:.1f} MiB, estimate {made / 2**20:.1f}")
    assert made == pytest.approx(counted.peak, rel=0.05)


@pytest.mark.parametrize(("kind", "number"), [(CLIPTextModel, 0), (CLIPTextModelWithProjection, 1)])
def test_text_encoders_at_full_size(kind, number):
    """What they keep of two prompts for a gradient to token rows: within 5 %."""
    text = FAMILIES["SDXL"].text[number]
    with FakeTensorMode():
        with ledger.half():
            encoder = kind(CLIPTextConfig(**text)).eval().requires_grad_(False)
        rows = torch.nn.Parameter(torch.empty(1, text["hidden_size"]))
        encoder.set_input_embeddings(TokenEmbedding(encoder.get_input_embeddings(), [rows], 49408))
        ids = torch.zeros(2, 77, dtype=torch.int64)
        with alive.Alive([*encoder.parameters(), *encoder.buffers(), ids]) as counted:
            outputs = encoder(ids, output_hidden_states=True)
            found = counted.alive
    assert outputs.hidden_states[-2].requires_grad
    made = parts.text_saved(encoder, 2, 77, 2)
    print(f"{kind.__name__}: alive {found / 2**20:.2f} MiB, estimate {made / 2**20:.2f}")
    assert made == pytest.approx(found, rel=0.05)


# The figures, GiB, CUDA's context apart; rank 32, a learned token, gradients kept over 4 batches.
@pytest.mark.parametrize(("family", "base_dtype", "mode", "limit"), [
    ("SD1.x", "fp16", "fast", 2.9), ("SD1.x", "int8", "low", 1.6), ("SDXL", "int8", "low", 5.0),
    ("SDXL", "nf4", "low", 3.3)])
def test_targets(family, base_dtype, mode, limit):
    (found,) = memory.estimates(FAMILIES[family], config(base_dtype=base_dtype), FAMILIES[family].resolution, 5, [mode])
    print(found.describe())
    assert found.peak <= limit * GIB


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny.model_folder(tmp_path_factory.mktemp(kind), kind) for kind in ("sd", "sdxl")}


def quiet(cfg, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        return Trainer(cfg, **options)


@pytest.mark.parametrize(("name", "options"), [
    ("emoji-64", {}), ("emoji-64", {"batch_size": 4}),
    ("emoji-64", {"batch_size": 4, "memory": "low", "base_dtype": "int8", "grad_accumulation": 2}),
    pytest.param("emoji-64", {"batch_size": 4, "memory": "balanced", "base_dtype": "bf16"}, marks=FAST_BF16),
    ("sd", {"memory": "balanced"}), ("sdxl", {"learn_token": False, "optimizer": "adamw"}),
], ids=str)
def test_a_step_on_a_cpu(folders, tmp_path, name, options):
    """Allocations of a whole step, the second one, as the profiler of torch records them: within 10 %."""
    others = traced.alive()  # of tests before this one
    trainer = quiet(tiny.config(folders.get(name, name), tmp_path / "run", **({"rank": 32, "batch_size": 1} | options)))
    trainer._train_step()
    found, cfg = traced.peak(trainer._train_step) - others, trainer.config
    (made,) = memory.estimates(configs_of(models.facts(cfg.model)), cfg, trainer.resolution, 3, [cfg.memory])
    expected = max(phase.total for phase in made.phases if phase.name in ("in the step", "in the update"))
    print(f"{name} {options}: traced {found / 2**20:.2f} MiB, estimate {expected / 2**20:.2f}\n{made.describe()}")
    assert expected == pytest.approx(found, rel=0.1)


def test_latents_are_cached_before_the_unet_is_loaded(folders, tmp_path, monkeypatch):
    seen, right = [], models.Components.to_latents

    def spy(self, pixels):
        seen.append(self.unet)
        return right(self, pixels)

    monkeypatch.setattr(models.Components, "to_latents", spy)
    quiet(tiny.config(folders["sd"], tmp_path / "run"))
    assert seen == [None] * 3


def test_phases_add_up_and_sampling_counts_where_it_is_asked_for():
    configs = FAMILIES["SD1.x"]
    plain, sampled = (memory.estimates(configs, config(sample_every=n), 512, 5, ["fast"])[0] for n in (0, 10))
    assert plain.peak == max(phase.total for phase in plain.phases)
    assert [phase.name for phase in sampled.phases] == [*(phase.name for phase in plain.phases), "sampling"]
    decoder = sampled.phases[-1].parts["a picture in the decoder"]
    assert decoder >= 6 * 128 * 512 * 512 * 4 and not sampled.tiles
    larger = memory.estimates(configs, config(rank=128, batch_size=2), 640, 5, ["fast"])[0]
    assert larger.peak > plain.peak


def test_tiles_fit_together():
    """By diffusers' rounding: what of a tile is kept is where the next one begins, whatever the side."""
    for latents in range(8, 200):
        tile = models.tile_side(latents)
        step, kept = int(tile * 0.75), tile * 8 - int(tile * 8 * 0.25)
        assert step * 8 == kept and latents <= 2 * tile < latents + 8


def test_previews_are_decoded_in_tiles_where_whole_pictures_do_not_fit():
    configs = FAMILIES["SDXL"]
    whole, low = memory.estimates(configs, config(base_dtype="int8", sample_every=10), 1024, 5, ["balanced", "low"])
    assert whole.worst.name == "sampling" and not whole.tiles
    tiled = whole.split[0]
    assert (tiled.tiles, tiled.at_once, tiled.memory) == (True, None, "balanced")
    assert tiled.phases[-1].total < whole.phases[-1].total - 2 * GIB
    assert low.tiles and not any(one.peak >= low.peak for one in low.split) and "previews in tiles" in low.describe()
    for one in (whole, tiled):
        need = int(MARGIN * one.peak) + ASSUMED["libraries' workspaces"] + 1
        choice = fitting([whole], need, asked=True)
        assert choice.tiles == one.tiles and choice.at_once is None


def test_the_first_mode_that_fits_is_chosen():
    found = memory.estimates(FAMILIES["SD1.x"], config(), 512, 5)
    assert [one.memory for one in found] == list(MEMORY)
    assert found[0].peak > found[1].peak > found[2].peak
    tried = [each for one in found for each in (one, *one.split)]
    assert found[0].split and not found[2].split, "one at a time in mode 'low' already"
    for one in found:
        assert [each.at_once for each in one.split] == [2, 1][: len(one.split)]
        assert sorted({one.peak, *(each.peak for each in one.split)}, reverse=True) == [
            one.peak, *(each.peak for each in one.split)]
    for i, one in enumerate(tried):
        need = int(MARGIN * one.peak) + ASSUMED["libraries' workspaces"] + 1
        choice = fitting(found, need, asked=False)
        first = next(each for each in tried if each.peak <= one.peak)
        assert (choice.memory, choice.at_once) == (first.memory, first.at_once)
        assert choice.reason.count("needs") == tried.index(first) + 1
    small = fitting(found, GIB, asked=False)
    assert small.memory == "low" and "does not fit: lower base_dtype" in small.reason
    assert "assumed and not measured" in small.describe() and "1.00 GiB free" in small.describe()


def test_auto_on_a_card(folders, tmp_path, monkeypatch):
    """The device is asked once; the mode is told, and is no part of the fingerprint."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 4 * GIB))
    monkeypatch.setattr("palp_fast.prepare._check_backend", lambda cfg: None)
    plan = prepare(tiny.config(folders["sd"], tmp_path / "run", device="cuda"))
    assert plan.config.memory == "fast" and "1.00 GiB free, fast needs" in plan.choice.describe()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4 * GIB))
    other = prepare(tiny.config(folders["sd"], tmp_path / "run", device="cuda"))
    assert other.config.memory == "low" and "does not fit" in other.choice.reason
    assert other.config.fingerprint() == plan.config.fingerprint()
    asked = prepare(tiny.config(folders["sd"], tmp_path / "run", device="cuda", memory="balanced"))
    assert asked.config.memory == "balanced" and "as asked for" in asked.choice.reason


def test_the_trainer_splits_as_the_estimate_says(folders, tmp_path, monkeypatch):
    """What fits with fewer no-grad predictions at once is not moved to a mode that recomputes."""
    (whole,) = memory.estimates(FAMILIES["SD1.x"], config(), 512, 5, ["fast"])
    need = int(MARGIN * whole.split[0].peak) + ASSUMED["libraries' workspaces"] + 1
    choice = fitting([whole], need, asked=True)
    assert choice.at_once == 2 and "fast, 2 no-grad predictions at once needs" in choice.reason
    cfg = tiny.config(folders["sd"], tmp_path / "run", teacher=str(folders["sd"]))
    monkeypatch.setattr(sys.modules["palp_fast.train"], "prepare",
                        lambda cfg, lean: dataclasses.replace(prepare(cfg, lean=lean), choice=choice))
    trainer = quiet(cfg)
    assert trainer.predictions.at_once == trainer.teacher.predictions.at_once == 2


@pytest.mark.parametrize(("name", "options"), [
    ("emoji-64", {}), ("emoji-64", {"batch_size": 4}), ("emoji-64", {"memory": "low", "batch_size": 4}),
    ("emoji-64", {"batch_size": 4, "method": "dreambooth", "grad_accumulation": 2}),
    ("sd", {"optimizer": "adamw"}), ("sdxl", {"learn_token": False, "optimizer": "adamw"}),
], ids=str)
def test_a_step_of_diffusers_own_modules_on_a_cpu(folders, tmp_path, name, options):
    """As test_a_step_on_a_cpu: within 10 % of the traced allocations."""
    others = traced.alive()
    cfg = tiny.config(folders.get(name, name), tmp_path / "run", **({"rank": 32, "batch_size": 1} | options))
    trainer = quiet(cfg, lean=False)
    trainer._train_step()
    found, cfg = traced.peak(trainer._train_step) - others, trainer.config
    configs = configs_of(models.facts(cfg.model))
    (made,) = memory.estimates(configs, cfg, trainer.resolution, 3, [cfg.memory], lean=False)
    expected = max(phase.total for phase in made.phases if phase.name in ("in the step", "in the update"))
    print(f"stock {name} {options}: traced {found / 2**20:.2f} MiB, estimate {expected / 2**20:.2f}\n{made.describe()}")
    assert expected == pytest.approx(found, rel=0.1)


def test_the_estimate_of_diffusers_own_modules_at_full_size():
    """A step keeps for the backward pass what diffusers + peft keep (docs/lean.md): 770 MiB, 142 with checkpointing."""
    fast, low = memory.estimates(FAMILIES["SD1.x"], config(learn_token=False), 512, 5, lean=False)
    print(f"{fast.describe()}\n{low.describe()}")
    assert (fast.memory, low.memory) == ("fast", "low") and not fast.split
    for one, mib in ((fast, 770), (low, 142)):
        step = next(phase for phase in one.phases if phase.name == "in the step")
        assert step.parts["kept for the backward pass"] / 2**20 == pytest.approx(mib, rel=0.03)
    (lean,) = memory.estimates(FAMILIES["SD1.x"], config(learn_token=False), 512, 5, ["fast"])
    assert lean.peak < fast.peak and not lean.why and "lean=False" in fast.why


def test_auto_of_diffusers_own_modules(folders, tmp_path, monkeypatch):
    cfg = tiny.config(folders["sd"], tmp_path / "run")
    plan = prepare(cfg, lean=False)
    assert plan.config.memory == "fast" and "lean=False" in plan.estimate().describe()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("palp_fast.prepare._check_backend", lambda cfg: None)
    for free, expected in ((GIB, "fast"), (1000, "low")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 4 * GIB))
        plan = prepare(cfg.replace(device="cuda"), lean=False)
        assert plan.config.memory == expected and "lean=False" in plan.choice.describe()
    with pytest.raises(ConfigError, match="^memory: 'balanced' needs the lean UNet"):
        prepare(cfg.replace(device="cuda", memory="balanced"), lean=False)


def test_the_allocator_is_capped_at_what_is_free(monkeypatch):
    capped = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 4 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: GIB // 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: capped.append(given))
    cap_memory("cuda")
    cap_memory("cuda:1")
    cap_memory("cpu")
    assert capped == [(0.875, 0), (0.875, 1)]


def test_out_of_memory_is_a_step_down(folders, tmp_path, monkeypatch, capsys):
    """Under memory "auto": the step runs again in the next mode, with the same draws and the same result."""
    metrics = []
    for fails in (0, 2):
        trainer = Trainer(tiny.config(folders["sd"], tmp_path / f"run{fails}", grad_accumulation=2))
        scatter(lora_pairs(trainer), trainer.token_rows())
        right, left = trainer.update.backward, [fails]

        def backward(loss, right=right, left=left):
            right(loss)
            if left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("a small card")

        monkeypatch.setattr(trainer.update, "backward", backward)
        metrics.append(trainer._train_step())
    assert trainer.predictions.memory == "low" and trainer.predictions.at_once == 1
    shown = capsys.readouterr().out
    assert "in mode 'fast': going on in 'balanced'" in shown and "in mode 'balanced': going on in 'low'" in shown
    first, second = ({name: value for name, value in one.items() if name != "seconds"} for one in metrics)
    assert second == pytest.approx(first, rel=1e-4)


def test_a_mode_that_was_asked_for_is_kept(folders, tmp_path, monkeypatch):
    trainer = quiet(tiny.config(folders["sd"], tmp_path / "run", memory="fast"))

    def fail(loss):
        raise torch.OutOfMemoryError("a small card")

    monkeypatch.setattr(trainer.update, "backward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        trainer._train_step()
    assert trainer.predictions.memory == "fast"


def test_the_estimate_of_an_unknown_architecture_is_of_diffusers_own_modules(monkeypatch):
    configs = FAMILIES["SD1.x"]
    other = memory.models.Configs({**configs.unet, "act_fn": "mish"}, configs.text, configs.vae, 512)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 4 * GIB))
    choice = memory.choose(other, config(memory="auto"), 512, 5)
    assert choice.memory == "low" and "Mish" in choice.reason and "fast needs" in choice.reason
    with pytest.raises(ConfigError, match="base_dtype: 'int8' needs the lean UNet"):
        memory.choose(other, config(base_dtype="int8"), 512, 5)
