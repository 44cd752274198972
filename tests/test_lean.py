"""The lean UNet gives what diffusers' modules give: outputs, gradients, in every memory mode, for rows that share."""

import copy

import lean_models
import pytest
import torch
from close import assert_as_good, assert_close, relative
from diffusers.models.attention_processor import AttnProcessor2_0
from palp_fast import nn
from palp_fast.nn.lean import set_memory
from palp_fast.nn.lean_attention import LeanAttention
from torch.utils.flop_counter import FlopCounterMode

TOLERANCE = 1e-5
MODES = ("fast", "balanced", "low")


def lean(unet, memory="fast", **options):
    """(a lean copy of unet with the factors of lean_models.stock, its layers)."""
    options = {"rank": lean_models.RANK, "generator": torch.Generator().manual_seed(0)} | options
    twin = nn.lean_unet(copy.deepcopy(unet), memory=memory, **options)
    layers = nn.lora_layers(twin)
    lean_models.scatter(layers)
    return twin, layers


def truth(unet, kind, **options):
    """lean_models.with_gradients of diffusers' modules in fp64."""
    side = options.pop("side", 8)
    twin, layers = lean_models.stock(unet.double(), **options)
    return lean_models.with_gradients(twin.double(), layers, lean_models.inputs(kind, side=side, dtype=torch.float64))


def check_equal(kind, memory, side=8, **options):
    unet = lean_models.make(kind)
    twin, layers = lean(unet, memory, **options)
    found = lean_models.with_gradients(twin, layers, lean_models.inputs(kind, side=side))
    targets, alpha = options.get("lora_targets", "attention"), options.get("lora_alpha")
    expected = truth(unet, kind, side=side, targets=targets, lora_alpha=alpha)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], TOLERANCE, f"{kind}, {memory}: {name}")


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_outputs_and_gradients(kind, memory):
    check_equal(kind, memory)


@pytest.mark.parametrize("options", [
    {"kind": "padding 0"}, {"side": 9}, {"lora_alpha": 2.0}, {"lora_targets": "cross_kv", "memory": "balanced"},
    {"lora_targets": "none"}, {"lora_targets": "cross_kv", "memory": "low"}], ids=str)
def test_options(options):
    check_equal(**({"kind": "sd1", "memory": "fast"} | options))


def test_a_unet_without_attention():
    unet = lean_models.make("without attention")
    sample, timestep, keywords = lean_models.inputs("without attention")
    expected = copy.deepcopy(unet).double()(sample.double(), timestep, keywords["encoder_hidden_states"]).sample
    twin, layers = lean(unet)
    assert not layers
    assert_close(twin(sample, timestep, **keywords).sample, expected, TOLERANCE)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_bf16_is_as_good_as_diffusers(kind, memory):
    unet = lean_models.make(kind).bfloat16()
    stock, layers = lean_models.stock(unet)
    call = lean_models.inputs(kind, batch=4, dtype=torch.bfloat16)
    peer = lean_models.with_gradients(stock, layers, call)
    twin, layers = lean(unet, memory)
    found = lean_models.with_gradients(twin, layers, call)
    stock, layers = lean_models.stock(unet.double())
    exact = lean_models.inputs(kind, batch=4, dtype=torch.bfloat16)
    exact = exact[0].double(), exact[1], {"encoder_hidden_states": exact[2]["encoder_hidden_states"].double()} | (
        {"added_cond_kwargs": {n: v.double() for n, v in exact[2]["added_cond_kwargs"].items()}}
        if kind == "sdxl" else {})
    expected = lean_models.with_gradients(stock.double(), layers, exact)
    for group in ("output", "prompts", "pooled", "lora_a", "lora_b"):
        if names := [name for name in expected if name.endswith(group)]:
            joined = [torch.cat([values[n].double().flatten() for n in names]) for values in (found, peer, expected)]
            assert relative(joined[0], joined[2]) <= 2 * relative(joined[1], joined[2]) + 1e-3, group


def test_lora_scale():
    unet = lean_models.make("sd1")
    sample, timestep, keywords = lean_models.inputs("sd1")
    twin, _ = lean(unet)
    with torch.no_grad():
        base = unet(sample, timestep, **keywords).sample
        student = twin(sample, timestep, **keywords).sample
        assert_close(twin(sample, timestep, **keywords, lora_scale=0.0).sample, base, TOLERANCE)
        mixed = twin(sample, timestep, **keywords, lora_scale=torch.tensor([1.0, 0.0])).sample
    assert relative(student, base) > 0.05
    assert_close(mixed, torch.stack([student[0], base[1]]), TOLERANCE)


@pytest.mark.parametrize("memory", MODES)
def test_recomputation_keeps_the_lora_scale_of_its_pass(memory):
    twin, layers = lean(lean_models.make("sd1"))
    found = []
    for mode in ("fast", memory):
        set_memory(twin, mode)
        sample, timestep, keywords = lean_models.inputs("sd1")
        out = twin(sample, timestep, **keywords, lora_scale=torch.tensor([0.0, 0.5])).sample
        twin(sample, timestep, **keywords, lora_scale=2.0)
        found.append(torch.autograd.grad(out.square().sum(), [layer.lora_b for layer in layers.values()]))
    for one, other in zip(*found):
        assert_close(one, other, TOLERANCE)


# (prompts, LoRA factors) of the rows of two samples; three prompts, of which the first two are fixed.
ROWS = {
    "palp": ([0, 0, 1, 1, 2, 2, 1, 1], [0.0] * 4 + [1.0] * 4),
    "teacher alone": ([0, 0, 1, 1], 0.0),
    "student alone": ([1, 2, 2, 0], 1.0),
    "one copy": ([2, 2], 1.0),
    "nothing shared": ([0, 1, 2, 0], [0.0, 1.0, 0.5, 0.0]),
    "one prompt, several factors": ([2, 2, 2, 2, 0, 0, 0, 0], [1.0, 0.5, 0.0, 1.0, 0.0, 0.5, 1.0, 0.0]),
}


def plain_batch(call, row_prompt, lora_scale):
    """The same rows as samples of their own."""
    sample, timestep, keywords = call
    copies = len(row_prompt) // len(sample)
    keywords = {"encoder_hidden_states": keywords["encoder_hidden_states"][row_prompt]} | (
        {"added_cond_kwargs": {"text_embeds": keywords["added_cond_kwargs"]["text_embeds"][row_prompt],
                               "time_ids": keywords["added_cond_kwargs"]["time_ids"].repeat(copies, 1)}}
        if "added_cond_kwargs" in keywords else {})
    if isinstance(lora_scale, list):
        lora_scale = torch.tensor(lora_scale)
    return (sample.repeat(copies, 1, 1, 1), timestep.repeat(copies)), keywords | {"lora_scale": lora_scale}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_rows_equal_the_plain_batch(kind, name):
    unet = lean_models.make(kind)
    stock, _ = lean_models.stock(unet)
    twin, _ = lean(unet)
    call = lean_models.inputs(kind, prompts=3)
    args, keywords = plain_batch(call, *ROWS[name])
    sample, timestep, given = call
    with torch.no_grad():
        expected = stock(*args, **keywords).sample
        for fixed in (0, 2):
            kv = twin.prompt_kv(given["encoder_hidden_states"][:fixed]) if fixed else None
            rows = nn.Rows(2, *ROWS[name], fixed=fixed)
            found = twin(sample, timestep, **given, rows=rows, prompt_kv=kv).sample
            assert_close(found, expected, TOLERANCE, f"{fixed} fixed prompts")


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(
    "targets, name", [("attention", "palp"), ("cross_kv", "palp"), ("attention", "one prompt, several factors")])
def test_gradients_of_rows(targets, name, memory):
    unet = lean_models.make("sdxl")
    stock, stock_layers = lean_models.stock(unet, targets)
    twin, layers = lean(unet, memory, lora_targets=targets)
    results = []
    for each, own in ((stock, stock_layers), (twin, layers)):
        call = lean_models.inputs("sdxl", prompts=3)
        names = lean_models.leaves(call[2], own)
        if each is stock:
            args, keywords = plain_batch(call, *ROWS[name])
            out = stock(*args, **keywords).sample
        else:
            out = twin(*call[:2], **call[2], rows=nn.Rows(2, *ROWS[name])).sample
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        results.append(dict(zip(names, torch.autograd.grad(out, list(names.values()), upstream))))
    for leaf in results[0]:
        assert_close(results[1][leaf], results[0][leaf], 2 * TOLERANCE, leaf)


def test_what_rows_share_is_computed_once():
    twin, _ = lean(lean_models.make("sd1"))
    block = twin.down_blocks[0].attentions[0].transformer_blocks[0]
    last = twin.up_blocks[-1].resnets[-1]
    watched = {"conv_in": twin.conv_in, "norm1": block.norm1, "norm2": block.norm2, "conv_out": twin.conv_out,
               "conv1": last.conv1, "conv_shortcut": last.conv_shortcut}
    seen = {}
    for name, module in watched.items():
        module.register_forward_hook(
            lambda module, args, out, name=name: seen.setdefault(name, []).append(len(args[0])))
    call = lean_models.inputs("sd1", prompts=3)
    rows = nn.Rows(2, *ROWS["palp"], fixed=2)
    kv = twin.prompt_kv(call[2]["encoder_hidden_states"][:2])
    made, keys_values = [], LeanAttention.keys_values
    for module in twin.modules():
        if isinstance(module, LeanAttention):
            module.keys_values = lambda context, scale, self=module: made.append(len(context)) or keys_values(
                self, context, scale)
    with torch.no_grad():
        twin(*call[:2], **call[2], rows=rows, prompt_kv=kv)
    assert seen == {"conv_in": [2], "norm1": [4], "norm2": [8], "conv_out": [8],
                    "conv1": [2, 8], "conv_shortcut": [2, 8]}, "the skip from conv_in is one of the samples"
    assert set(made) == {2}, "only the student's two prompts have keys and values to compute"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_upsampling_by_summed_weights(dtype):
    """As good as the convolution of the doubled picture, with four ninths of its products; sums follow the weight."""
    twin, _ = lean(lean_models.make("sd1").to(dtype))
    conv = twin.up_blocks[0].upsamplers[0].conv
    with torch.no_grad():
        twin.load_state_dict({name: value + 0.25 for name, value in twin.state_dict().items()})
    x = torch.randn(2, 32, 5, 6, generator=torch.Generator().manual_seed(4)).to(dtype)

    def results(function, x):
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        return out, *torch.autograd.grad(out, leaf, (torch.arange(out.numel()) % 7).view(out.shape).to(out.dtype))

    def plain(x):
        doubled = torch.nn.functional.interpolate(x, scale_factor=2.0)
        return torch.nn.functional.conv2d(doubled, conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=1)

    for mine, its, true in zip(results(conv.doubled, x), results(plain, x), results(plain, x.double())):
        assert mine.is_contiguous(memory_format=torch.channels_last)
        assert_as_good(mine, its, true, 1e-13 if dtype == torch.float64 else 1e-3)
    counts = []
    for function in (conv.doubled, plain):
        with FlopCounterMode(display=False) as counter:
            results(function, x)
        counts.append(counter.get_total_flops())
    assert counts[0] * 9 == counts[1] * 4
    set_memory(twin, "balanced")
    assert conv.sums is None and conv.doubled(x).shape == (2, 32, 10, 12)


def test_cross_attention_keeps_its_query_on_the_cpu_in_fast():
    twin, _ = lean(lean_models.make("sd1"))
    attention = twin.mid_block.attentions[0].transformer_blocks[0].attn2
    x = torch.zeros(1, 4, 32)
    assert attention._plan(x) == ("sdpa", False) and attention._plan(x.to("meta")) == ("auto", True)
    set_memory(twin, "balanced")
    assert attention._plan(x) == ("auto", True)


def test_predictions_without_grad_are_fp32():
    twin, _ = lean(lean_models.make("sd1"), base_dtype="bf16")
    sample, timestep, keywords = lean_models.inputs("sd1", dtype=torch.bfloat16)
    with torch.no_grad():
        assert twin(sample, timestep, **keywords, lora_scale=1.0).sample.dtype == torch.float32
        assert twin(sample, timestep, **keywords).sample.dtype == torch.bfloat16
    assert twin(sample, timestep, **keywords, lora_scale=1.0).sample.dtype == torch.bfloat16


def test_names_and_moves():
    """State and module paths are diffusers' own; the packed weights follow moves, copies and loaded values."""
    unet = lean_models.make("sd2")
    stock, stock_layers = lean_models.stock(unet)
    twin, layers = lean(unet)
    state = twin.state_dict()
    assert list(layers) == list(stock_layers) and state.keys() == stock.state_dict().keys()
    for name, value in stock.state_dict().items():
        assert torch.equal(state[name], value), name
    assert {p for p in twin.parameters() if p.requires_grad} == {
        f for layer in layers.values() for f in (layer.lora_a, layer.lora_b)}
    call = lean_models.inputs("sd2")
    with torch.no_grad():
        expected = twin(*call[:2], **call[2]).sample
        for moved in (copy.deepcopy(twin), twin.double()):
            sample = call[0].to(moved.dtype)
            assert_close(moved(sample, call[1], **call[2]).sample, expected, TOLERANCE)
        twin.load_state_dict({name: torch.zeros_like(value) for name, value in twin.state_dict().items()})
    assert all(not m.packed.any() for m in twin.modules() if isinstance(m, LeanAttention))


def spoil(unet, how):
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    if how == "processor":
        class OtherProcessor(AttnProcessor2_0):
            pass

        block.attn2.set_processor(OtherProcessor())
    elif how == "activation":
        unet.mid_block.resnets[0].nonlinearity = torch.nn.Mish()
    elif how == "scale":
        unet.mid_block.resnets[0].output_scale_factor = 2.0
    elif how == "dropout":
        block.ff.net[1].p = 0.1
        unet.train()
    elif how == "linear":
        block.attn1.to_q = nn.LoRALinear(block.attn1.to_q, 2)
    else:
        unet.register_to_config(**{how: "other"})
    return unet


@pytest.mark.parametrize(("how", "named"), [
    ("processor", r"down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn2: its attention processor is OtherProc"),
    ("activation", r"mid_block\.resnets\.0\.nonlinearity: it is a Mish"),
    ("scale", r"mid_block\.resnets\.0: its output_scale_factor is 2\.0"),
    ("dropout", "dropout and is in training mode"),
    ("linear", r"attn1\.to_q: it is a LoRALinear"),
    ("class_embed_type", "the UNet's class_embed_type is 'other'"),
    ("addition_embed_type", "the UNet's addition_embed_type is 'other'"),
])
def test_what_cannot_be_converted_is_named_and_left_alone(how, named):
    unet = spoil(lean_models.make("sd1"), how)
    before = [type(module) for module in unet.modules()]
    with pytest.raises(nn.UnsupportedUNet, match=named + r".*lean=False"):
        nn.lean_unet(unet, rank=4)
    assert [type(module) for module in unet.modules()] == before


@pytest.mark.parametrize(("options", "message"), [
    ({"rank": 0}, "rank=0"), ({"memory": "low memory"}, "memory='low memory': allowed are 'fast'"),
    ({"base_dtype": "fp8"}, "base_dtype='fp8': allowed are .* 'int8', 'nf4'"),
    ({"lora_targets": "all"}, "lora_targets='all'"), ({"lora_alpha": 0}, "lora_alpha=0"),
])
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        nn.lean_unet(lean_models.make("sd1"), **({"rank": 4} | options))


def test_wrong_calls():
    twin, _ = lean(lean_models.make("sd1"))
    sample, timestep, keywords = lean_models.inputs("sd1", prompts=3)
    kv = twin.prompt_kv(keywords["encoder_hidden_states"])
    for options, message in (
        ({"attention_mask": sample}, "attention_mask"), ({}, "3 prompts for 2 samples"),
        ({"rows": nn.Rows(2, [0, 3])}, "prompt 3 of 3"), ({"rows": nn.Rows(1, [0])}, "rows are of 1 samples"),
        ({"rows": nn.Rows(2, [0, 1]), "prompt_kv": kv}, "rows.fixed is 0"),
        ({"rows": nn.Rows(2, [0, 1]), "lora_scale": 1.0}, "lora_scale beside rows"),
    ):
        with pytest.raises(ValueError, match=message):
            twin(sample, timestep, **keywords, **options)
    with pytest.raises(ValueError, match="no attention processors"):
        twin.set_attn_processor(AttnProcessor2_0())
    for arguments, message in (((2, [0]), "a multiple of batch=2"), ((1, [-1]), "-1"), ((1, [0, 0], [1.0]), "1 fac")):
        with pytest.raises(ValueError, match=message):
            nn.Rows(*arguments)
