"""LoRA layers inside stock diffusers UNets."""

from palp_fast.nn.lora import LoRALinear, inject_lora

__all__ = ["LoRALinear", "inject_lora"]
