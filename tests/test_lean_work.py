"""Products of a whole PALP step at full SD1.x size, those inside operators too: a regression limit, exact anywhere."""

import functools
import importlib

import ledger
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from palp_fast import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import CLIPTextConfig, CLIPTextModel

FILES = {"group_norm_silu": "group_norm"}  # of palp_fast.reference, where not named as the operator
# Six passes with what LoRA, the text encoder and attention's backward pass add, without what rows share and what
# upsampling by summed weights saves.
FORWARDS = 5.9


class Work(TorchDispatchMode):
    """FLOPs of all products, those within operators by running their reference, and by the operators' formulas.

    attention: those of q k^T and of the products with v, forward and backward, alone.
    """

    def __init__(self):
        super().__init__()
        self.flops, self.by_formula, self.inside, self.attention = 0, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        packet = func._overloadpacket
        if func.namespace == "palp_fast":
            formula = flop_registry[packet](*args, **kwargs, out_val=func(*args, **kwargs))
            self.by_formula += formula
            self.attention += formula if name in ("attention", "attention_bwd") else 0
            before = self.flops
            with self:
                results = reference(name)(*args, **kwargs)
            self.inside += self.flops - before
            return results
        if func.namespace == "aten":
            with self:
                results = func.decompose(*args, **kwargs)  # linear and matmul into the products that are counted
            if results is not NotImplemented:
                return results
        results = func(*args, **kwargs)
        if func.namespace == "aten":
            packet = getattr(torch.ops.aten, name.removesuffix("_"), packet)  # addmm_ counts as addmm
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=results)
        return results


def reference(name):
    """The plain PyTorch version of an operator, by its name."""
    file = name.removesuffix("_bwd")
    module = importlib.import_module(f"palp_fast.reference.{FILES.get(file, file)}")
    return getattr(module, f"{name}_ref")


@functools.cache
def one_forward():
    """FLOPs of diffusers' UNet, one sample."""
    model = ledger.FullSize("SD1.x 512")
    model.unet.set_attn_processor(AttnProcessor())  # in products that are counted
    with model.mode, torch.no_grad(), Work() as work:
        sample, timestep, keywords = model.inputs(learned=False)
        model.unet(sample, timestep, **keywords)
    return work.flops


def work_of_a_step(memory="fast"):
    """Work of one PALP step at batch 1: text encoder and UNet with gradients, four predictions in one pass."""
    model = ledger.FullSize("SD1.x 512", memory)
    with model.mode:
        config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                                attn_implementation="eager")
        with ledger.half():
            encoder = CLIPTextModel(config).requires_grad_(False)
        row = torch.empty(1, 77, 768, dtype=torch.bfloat16).requires_grad_()
        sample, timestep, keywords = model.inputs(prompts=2, learned=False)
        cache = model.unet.prompt_kv(keywords["encoder_hidden_states"])
        rows = nn.Rows(1, [0, 1, 2, 1], [0.0, 0.0, 1.0, 1.0], fixed=2)
        with Work() as work:
            hidden = encoded(encoder, row)
            pred = model.unet(sample, timestep, hidden, lora_scale=1.0).sample
            with torch.no_grad():
                prompts = torch.cat([keywords["encoder_hidden_states"], hidden])
                model.unet(sample, timestep, prompts, rows=rows, prompt_kv=cache)
            pred.backward(torch.empty_like(pred))
        assert row.grad is not None
    return work


def encoded(encoder, embeddings):
    """The text encoder on token embeddings."""
    return encoder.get_submodule("encoder" if hasattr(encoder, "encoder") else "text_model.encoder")(
        inputs_embeds=embeddings).last_hidden_state


def check_work(work):
    forwards = work.flops / one_forward()
    print(f"one step: {forwards:.3f} forwards of {one_forward() / 1e12:.3f} TFLOP; {work.flops / 1e12:.3f} TFLOP, "
          f"of attention's products {work.attention / 1e12:.3f}, within operators {work.inside / 1e12:.3f}")
    assert forwards <= FORWARDS, f"{forwards:.2f} forwards"
    assert work.inside == work.by_formula, "an operator computes other products than its formula says"


def test_work_of_a_step():
    check_work(work_of_a_step())


def test_an_extra_product_in_an_operator_is_seen(monkeypatch):
    right = reference("frozen_linear")

    def wrong(x, weight, bias):
        right(x, weight, bias)
        return right(x, weight, bias)

    monkeypatch.setattr("palp_fast.reference.frozen_linear.frozen_linear_ref", wrong)
    with pytest.raises(AssertionError, match="forwards|formula"):
        check_work(work_of_a_step())
