"""UNets of full size without memory, and what a pass of theirs keeps alive for the backward pass, exact.

Bytes are those of storages that are alive after the forward pass, whoever holds them: saved tensors, attributes of
graph nodes, arguments of checkpointed functions.
"""

import contextlib
import gc
from collections import Counter

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palp_fast import nn

RANK = 32
SHAPES = {
    "SD1.x 512": ({"sample_size": 64, "cross_attention_dim": 768}, 64, 768, None),
    "SDXL 1024": ({
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816}, 128, 2048, 1280),
}
KINDS = {
    "lora_projections": "attention", "attention": "attention", "lora_linear": "attention",
    "geglu": "GEGLU", "layer_norm": "LayerNorm, attention's input", "group_norm_silu": "GroupNorm, SiLU",
}


class FullSize:
    """A UNet of SHAPES in a FakeTensorMode, bf16, lean or not, and what to call it with."""

    def __init__(self, shape, memory=None):
        config, side, width, pooled = SHAPES[shape]
        self.mode = FakeTensorMode()
        with self.mode:
            with half():
                self.unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
            if memory is not None:
                nn.lean_unet(self.unet, rank=RANK, memory=memory, backend="reference")
        self.side, self.width, self.pooled = side, width, pooled

    def inputs(self, prompts=1, learned=True):
        """(sample, timestep, keywords); learned: prompts carry a gradient to a token."""
        half = {"dtype": torch.bfloat16}
        sample = torch.empty(1, 4, self.side, self.side, **half)
        keywords = {"encoder_hidden_states": torch.empty(prompts, 77, self.width, **half).requires_grad_(learned)}
        if self.pooled is not None:
            keywords["added_cond_kwargs"] = {
                "text_embeds": torch.empty(prompts, self.pooled, **half).requires_grad_(learned),
                "time_ids": torch.empty(1, 6, **half)}
        return sample, torch.empty(1, dtype=torch.int64), keywords


@contextlib.contextmanager
def half():
    """Within, parameters are made in bf16: fake ones cannot be moved."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class _Alive(TorchDispatchMode):
    """Remembers every storage that an operator makes, and which operator ran when it was first saved."""

    def __init__(self):
        super().__init__()
        self.made, self.kept_by, self.last = {}, {}, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        # Saving a tensor detaches it, and a fake one is asked for its device.
        if func.namespace in ("aten", "palp_fast") and func is not torch.ops.aten.detach.default:
            self.last = func._schema.name.partition("::")[2]
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.made or self.made[key][0].expired():
                    self.made[key] = StorageWeakRef(storage), storage.nbytes()
                    self.kept_by.pop(key, None)
        return results

    def keep(self, tensor):
        self.kept_by.setdefault(tensor.untyped_storage()._cdata, self.last)
        return tensor


def saved(shape, memory, learned=True):
    """{kind of operator: bytes that are alive after a forward pass of one sample}, without weights and inputs."""
    model = FullSize(shape, memory)
    with model.mode:
        sample, timestep, keywords = model.inputs(learned=learned)
        with _Alive() as alive, torch.autograd.graph.saved_tensors_hooks(alive.keep, lambda tensor: tensor):
            out = model.unet(sample, timestep, **keywords).sample
        gc.collect()
        known = (out, sample, *model.unet.parameters(), *model.unet.buffers())
        known, found = {tensor.untyped_storage()._cdata for tensor in known}, Counter()
        for key, (storage, nbytes) in alive.made.items():
            if not storage.expired() and key not in known:
                found[KINDS.get(alive.kept_by.get(key), "inputs of recomputed blocks, the rest")] += nbytes
    return found
