"""Small random UNets in the shapes of SD1.x, SD2, SDXL and others, and what they give without palp_fast.nn.lean."""

import copy

import torch
from diffusers import UNet2DConditionModel

from palp_fast.nn.lora import inject_lora

RANK = 4
_SMALL = {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
          "cross_attention_dim": 24}
_CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
_LATE = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
CONFIGS = {
    "sd1": _SMALL | _CROSS | {"attention_head_dim": 2, "layers_per_block": 2},
    "sd2": _SMALL | _CROSS | {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": _SMALL | _LATE | {
        "attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 20 + 6 * 4},
    "without attention": _SMALL | {
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None},
    "padding 0": _SMALL | _CROSS | {"attention_head_dim": 8, "downsample_padding": 0},
}


def make(kind, seed=0):
    """A UNet, its normalisations away from their start."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**CONFIGS[kind]).eval().requires_grad_(False)
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return unet


def scatter(layers):
    """Moves every factor away from its start."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_b.copy_(0.3 * torch.randn(layer.lora_b.shape, generator=draw))


def stock(unet, targets="attention", lora_alpha=None):
    """(a copy of unet with diffusers' own forward pass and LoRALinear, its layers)."""
    twin = copy.deepcopy(unet)
    layers = inject_lora(twin, targets, RANK, lora_alpha, torch.Generator().manual_seed(0))
    scatter(layers)
    return twin, layers


def inputs(kind, batch=2, prompts=None, side=8, dtype=torch.float32):
    """sample, timestep and the keywords of a call; pooled and hidden prompts are leaves with gradients."""
    draw = torch.Generator().manual_seed(2)
    prompts = prompts or batch
    sample = torch.randn(batch, 4, side, side, generator=draw).to(dtype)
    hidden = torch.randn(prompts, 5, 24, generator=draw).to(dtype).requires_grad_()
    keywords = {"encoder_hidden_states": hidden}
    if kind == "sdxl":
        pooled = torch.randn(prompts, 20, generator=draw).to(dtype).requires_grad_()
        keywords["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.arange(6.0).expand(batch, -1)}
    return sample, torch.tensor([40, 700, 333, 9])[:batch], keywords


def leaves(keywords, layers):
    """What gradients are taken to, by name."""
    found = {"prompts": keywords["encoder_hidden_states"]}
    if "added_cond_kwargs" in keywords:
        found["pooled"] = keywords["added_cond_kwargs"]["text_embeds"]
    for path, layer in layers.items():
        found |= {f"{path}.lora_a": layer.lora_a, f"{path}.lora_b": layer.lora_b}
    return found


def with_gradients(unet, layers, call, **options):
    """{"output": ..., name of leaf: its gradient} for a fixed upstream gradient."""
    sample, timestep, keywords = call
    out = unet(sample, timestep, **keywords, **options).sample
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    names = leaves(keywords, layers)
    grads = torch.autograd.grad(out, list(names.values()), upstream, allow_unused=True) if names else ()
    return {"output": out, **{name: grad for name, grad in zip(names, grads) if grad is not None}}
