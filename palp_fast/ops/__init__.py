"""Every operator of torch.ops.palp_fast: importing this package registers them and loads the compiled libraries."""

from palp_fast import backend
from palp_fast.ops import add_noise, attention, dequantise, frozen_conv2d, frozen_linear, geglu  # noqa: F401
from palp_fast.ops import group_norm, inexact  # noqa: F401
from palp_fast.ops import layer_norm, lora_linear, lora_projections, optim, renoise, sampler  # noqa: F401
from palp_fast.ops import score_combination  # noqa: F401
from palp_fast import flops  # noqa: F401, I001  (its formulas need the operators above)

backend.load_libraries()
