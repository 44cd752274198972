"""Every operator of torch.ops.palp_fast: importing this package registers them and loads the compiled libraries."""

from palp_fast import backend
from palp_fast.ops import add_noise, frozen_conv2d, frozen_linear, geglu, group_norm, layer_norm  # noqa: F401
from palp_fast.ops import lora_linear, optim, renoise, sampler, score_combination  # noqa: F401
from palp_fast import flops  # noqa: F401, I001  (its formulas need the operators above)

backend.load_libraries()
