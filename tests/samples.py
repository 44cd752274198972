"""Arguments of every operator of the library, and small helpers to walk over them."""

import torch

from palp_fast import functional
from palp_fast.reference.blockwise import quantise

FLOAT = torch.float32
SHAPE = (3, 4, 6, 7)
SIZES = (300, 256, 5)
RATES = torch.tensor([1e-2, 0.9, 0.99, 1e-8, 0.1], dtype=torch.float64)  # lr, betas, eps, weight decay
# Called with tables of addresses by the optimizers alone, outside of traced code; tests/test_optim.py is its test.
BY_ADDRESS = {"optimizer_step"}


def images(count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=draw) for _ in range(count)]


def vector() -> torch.Tensor:
    return torch.tensor([0.2, 0.5, 0.9])


def number(value: int) -> torch.Tensor:
    return torch.tensor(value)


def update(rule: str, quantised: bool) -> tuple:
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=draw) for size in SIZES]
    grads = [torch.randn(size, generator=draw) for size in SIZES]
    shadows = [torch.empty(SIZES[0], dtype=torch.bfloat16), *[torch.empty(0)] * 2]
    rows = sum(-(-size // 256) for size in SIZES)
    moments = []
    for signed in (True, False)[:2 if rule == "adamw" else 1]:
        values = torch.randn(rows, 256, generator=draw) if signed else torch.rand(rows, 256, generator=draw)
        moments.append(list(quantise(values, signed)) if quantised else [values])
    return params, grads, shadows, torch.zeros(len(SIZES)), *moments, torch.tensor([0.5, 1.0]), RATES, 256


def lora() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (3, 5, 8), "weight": (6, 8), "bias": (6,), "lora_a": (2, 8), "lora_b": (6, 2)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def lora_backward() -> tuple:
    some = lora()
    return torch.ones(3, 5, 6), some["x"], some["weight"], some["lora_a"], some["lora_b"], 0.5, None, True


def projections() -> tuple:
    some = lora()
    pair, weight = (some["lora_a"], some["lora_b"]), some["weight"]
    return some["x"], torch.cat([weight, -weight]), None, *pair, *pair, None, None, 0.5, vector()


def quantised(*shape: int, form: str) -> list:
    """[codes, scale, shape]."""
    draw = torch.Generator().manual_seed(0)
    made = functional.quantise(torch.randn(shape, generator=draw), form)
    return [made.codes, made.scale, list(shape)]


def dequantise(form: str) -> tuple:
    codes, scale, _ = quantised(6, 70, form=form)
    return codes, scale, 70, torch.bfloat16


def lora_quantised(form: str) -> tuple:
    some, (codes, *rest) = lora(), quantised(6, 8, form=form)
    return some["x"], codes, some["bias"], some["lora_a"], some["lora_b"], None, 0.5, None, *rest


def lora_quantised_backward(form: str) -> tuple:
    codes, *rest = quantised(6, 8, form=form)
    grad, x, _, *more = lora_backward()
    return grad, x, codes, *more, *rest


def projections_quantised() -> tuple:
    codes, *rest = quantised(12, 8, form="int8")
    x, _, *more = projections()
    return x, codes, *more, *rest


def convolution_quantised(form: str) -> tuple:
    (codes, *rest), options = quantised(6, 2, 3, 3, form=form), ([2, 1], [0, 1], [1, 2], 2)
    return codes, options, (*rest, True)


def int8_product() -> tuple:
    some, (codes, scale, _) = lora(), quantised(15, 8, form="int8")
    weight, weight_scale, _ = quantised(6, 8, form="int8")
    return codes, scale, weight, weight_scale, some["bias"], torch.ones(15, 2), some["lora_b"], torch.bfloat16


def fp16_rows() -> torch.Tensor:
    return lora()["x"].view(15, 8).half()


def attention() -> tuple:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=draw) for shape in ((3, 5, 12), (2, 4, 12), (2, 4, 12)))
    return q, k, v, 2, 0.4, number([1, 0, 1])


def attention_backward() -> tuple:
    q, k, v, *rest = attention()
    out, lse = torch.ops.palp_fast.attention.reference(q, k, v, *rest)
    return torch.ones(3, 5, 12), q, k, v, out, lse, *rest



def channel_parameters() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([1.0, -0.5, 2.0, 0.7]), torch.tensor([0.1, 0.0, -0.3, 0.2])


def group_statistics() -> tuple[torch.Tensor, torch.Tensor]:
    _, mean, rstd = torch.ops.palp_fast.group_norm_silu(images(2)[1], 2, None, None, 1e-5, False)
    return mean, rstd


def rows() -> torch.Tensor:
    return images(1)[0].movedim(1, -1)


def channels_last() -> torch.Tensor:
    return images(1)[0].to(memory_format=torch.channels_last)


def convolution() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(6, 2, 3, 3, generator=draw), torch.randn(6, generator=draw)


SAMPLES = {
    "score_combination": lambda: (*images(2), images(4)[2:], [1.0, -1.0], None, 0.5, vector(), None, None),
    "score_combination_bwd": lambda: (torch.tensor(2.0), *images(1), torch.bfloat16),
    "renoise": lambda: (*images(3), vector(), vector().flip(0), 2, None),
    "renoise_bwd": lambda: (torch.ones(6, *SHAPE[1:]), vector(), None, 2, FLOAT, FLOAT, torch.bfloat16, FLOAT),
    "add_noise": lambda: (*images(1), number([0, 1, 2]), vector(), number(1), number(2), number(3), 0),
    "add_noise_bwd": lambda: (*images(1), number([0, 1, 2]), vector()),
    "timestep_sample": lambda: (torch.ones(50), torch.ones(10).double(), torch.ones(10).double(), number(1), number(0),
                                7, 3, 3, 2, 0.1),
    "timestep_update": lambda: (torch.zeros(10).double(), torch.zeros(10).double(), number([1, 30, 49]), vector(), 50,
                                0.999),
    "philox_words": lambda: (torch.arange(8).view(2, 4), number([1, 2])),
    "lora_linear": lambda: (*lora().values(), torch.ones(3, 5, 6, dtype=torch.float64), 0.5, None),
    "lora_linear_bwd": lora_backward,
    "lora_projections": projections,
    "lora_projections_bwd": lambda: (torch.ones(3, 5, 6), None, None, *projections(), True),
    **{f"{name}, {form}": (lambda make=make, form=form: make(form)) for form in ("int8", "nf4") for name, make in (
        ("dequantise", dequantise), ("lora_linear", lora_quantised), ("lora_linear_bwd", lora_quantised_backward))},
    "lora_projections, int8": projections_quantised,
    "lora_projections_bwd, int8": lambda: (torch.ones(3, 5, 6), None, None, *projections_quantised()[:11], True,
                                           *projections_quantised()[11:]),
    "frozen_linear, nf4": lambda: (rows(), (some := quantised(6, 4, form="nf4"))[0], None, *some[1:]),
    "frozen_linear_bwd, nf4": lambda: (torch.ones(3, 5, 6), *quantised(6, 8, form="nf4")),
    "frozen_conv2d, nf4": lambda: (images(1)[0], (some := convolution_quantised("nf4"))[0], None, *some[1], *some[2]),
    "frozen_conv2d_bwd, int8": lambda: (torch.ones(3, 6, 2, 5), (some := convolution_quantised("int8"))[0], [6, 7],
                                        *some[1], *some[2]),
    "quantise_rows": lambda: (lora()["x"].view(15, 8),),
    "int8_linear": int8_product,
    "fp16_linear": lambda: (fp16_rows(), lora()["weight"], None, torch.ones(15, 2), lora()["lora_b"]),
    "fp16_linear, nf4": lambda: (fp16_rows(), (some := quantised(6, 8, form="nf4"))[0], None, None, None, *some[1:]),
    "geglu": lambda: (images(1)[0][..., :6],),
    "geglu_bwd": lambda: (images(1)[0][..., :3], images(1)[0][..., :6]),
    "attention": attention,
    "attention_bwd": attention_backward,
    "group_norm_silu": lambda: (images(1)[0], 2, *channel_parameters(), 1e-5, True),
    "group_norm_silu_bwd": lambda: (*images(2), *group_statistics(), *channel_parameters(), True),
    "layer_norm": lambda: (rows(), *channel_parameters(), 1e-5, False),
    "layer_norm, from its output": lambda: (rows(), *channel_parameters(), 1e-5, True),
    "layer_norm_bwd": lambda: (rows(), rows(), rows()[..., 0], rows()[..., 1].exp(), *channel_parameters()),
    "layer_norm_bwd, from the output": lambda: (rows(), rows(), None, rows()[..., 1].exp(), *channel_parameters()),
    "frozen_conv2d": lambda: (images(1)[0], *convolution(), [2, 1], [0, 1], [1, 2], 2),
    "frozen_conv2d, channels-last": lambda: (channels_last(), *convolution(), [1, 1], [1, 1], [1, 1], 2),
    "frozen_conv2d_bwd": lambda: (torch.ones(3, 6, 4, 6), convolution()[0], [7, 6], [2, 1], [1, 1], [1, 1], 2),
    "frozen_linear": lambda: (rows(), lora()["weight"][:, :4], lora()["bias"]),
    "frozen_linear_bwd": lambda: (torch.ones(3, 5, 6), lora()["weight"]),
    "grad_norm": lambda: (update("adamw", True)[1], torch.tensor(8.0), torch.tensor(0.0), 1.0),
    "adamw": lambda: update("adamw", True),
    "adamw, 32 bits": lambda: update("adamw", False),
    "lion": lambda: update("lion", True),
    "write_words": lambda: (torch.zeros(3, dtype=torch.int64), [1, 2, 3]),
}


def tensors(value) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


def registered() -> set[str]:
    parts = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.partition(".")[0] for library, _, name in parts if library == "palp_fast"}
