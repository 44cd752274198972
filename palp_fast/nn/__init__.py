"""LoRA layers inside stock diffusers UNets, and the lean UNet."""

from palp_fast.nn.expand import PromptKV, Rows
from palp_fast.nn.lean import UnsupportedUNet, lean_unet, lora_layers
from palp_fast.nn.lora import LoRALinear, inject_lora

__all__ = ["LoRALinear", "PromptKV", "Rows", "UnsupportedUNet", "inject_lora", "lean_unet", "lora_layers"]
