"""lora_attention by its kernels against the reference."""

import pytest
import torch
from attention_layer import FORMS, GATE, Layer, with_gradients
from close import assert_close


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_values_and_gradients(form, recompute, dtype, tolerance):
    layer = Layer(form, dtype, dtype)
    options = {"lora_scale": GATE, "recompute": recompute}
    found, wanted = (with_gradients(layer.fused, layer.leaves(), layer.upstream, backend=backend, **options)
                     for backend in ("triton", "reference"))
    for name, mine, true in zip(["out", *layer.names()], found, wanted, strict=True):
        assert_close(mine, true, tolerance, name)
