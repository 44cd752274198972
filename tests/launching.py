"""What launches a kernel: the Triton versions of operators by name, and the aten calls that launch none."""

TRITON = {
    "lora_linear": "lora.lora_linear_fwd", "lora_linear_bwd": "lora.lora_linear_bwd",
    "lora_projections": "lora.lora_projections_fwd", "lora_projections_bwd": "lora.lora_projections_bwd",
    "attention": "attention.attention_fwd", "attention_bwd": "attention_bwd.attention_bwd",
    "group_norm_silu": "group_norm.group_norm_silu_fwd", "group_norm_silu_bwd": "group_norm_bwd.group_norm_silu_bwd",
    "layer_norm": "layer_norm.layer_norm_fwd", "layer_norm_bwd": "layer_norm.layer_norm_bwd",
    "geglu": "geglu.geglu_fwd", "geglu_bwd": "geglu.geglu_bwd",
}
NO_LAUNCH = (
    "promote_types", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view",
)
