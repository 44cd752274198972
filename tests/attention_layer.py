"""Random inputs, weights and LoRA factors of an attention layer, and its formula to compare lora_attention with."""

import torch

from palp_fast import functional as PF

HEADS, WIDTH, CONTEXT, RANK = 2, 16, 12, 3
GATE, SHARED = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1, 0, 1])
FORMS = ["self", "cross", "shared", "kv"]


class Layer:
    """Random inputs, weights and factors of one form of the operator, and both ways to compute it."""

    def __init__(self, form, dtype=torch.float32, factor_dtype=torch.float32, length=5):
        draw = torch.Generator().manual_seed(0)

        def normal(*shape, dtype=dtype, size=1.0):
            return (size * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)

        self.form, width = form, WIDTH if form == "self" else CONTEXT
        inputs = {"q": WIDTH, "k": width, "v": width, "out": WIDTH}
        self.weights = {name: normal(WIDTH, d_in, size=d_in**-0.5) for name, d_in in inputs.items()}
        self.lora = {name: (normal(RANK, d_in, dtype=factor_dtype, size=d_in**-0.5),
                            normal(WIDTH, RANK, dtype=factor_dtype)) for name, d_in in inputs.items()}
        self.bias, self.upstream = normal(WIDTH), normal(3, length, WIDTH)
        self.inputs = {"x": normal(3, length, WIDTH), "residual": normal(3, length, WIDTH)}
        if form == "kv":
            self.inputs |= {"k": normal(2, 4, WIDTH), "v": normal(2, 4, WIDTH)}
        elif form != "self":
            self.inputs["context"] = normal(2 if form == "shared" else 3, 4, CONTEXT)
        self.index = SHARED if form in ("shared", "kv") else None

    def names(self):
        """Of what has a gradient: inputs, then the factors."""
        used = ("q", "out") if self.form == "kv" else ("q", "k", "v", "out")
        return [*self.inputs, *((name, i) for name in used for i in (0, 1))]

    def leaves(self, dtype=None):
        values = [*self.inputs.values(), *(self.lora[name][i] for name, i in self.names()[len(self.inputs):])]
        return [value.detach().to(dtype or value.dtype).requires_grad_() for value in values]

    def fused(self, *leaves, weights=None, **options):
        values = dict(zip(self.names(), leaves))
        lora = self.lora | {name: (values[name, 0], values[name, 1]) for name, i in self.names()[len(self.inputs)::2]}
        names = ("q", "out") if self.form == "kv" else ("q", "k", "v", "out")
        dtype = leaves[0].dtype
        packed = PF.AttentionWeights.pack(
            {name: self.weights[name].to(dtype) for name in names}, lora, self.bias.to(dtype),
            cross=self.form in ("cross", "shared"),
        )
        kv = (values["k"], values["v"]) if self.form == "kv" else None
        return PF.lora_attention(values["x"], values.get("context"), packed, HEADS, kv=kv, kv_index=self.index,
                                 residual=values["residual"], **options)

    def plain(self, *leaves, lora_scale=1.0, **_):
        """The formula in the dtype of its inputs, with torch's attention."""
        values, dtype = dict(zip(self.names(), leaves)), leaves[0].dtype

        def project(x, name, scale):
            lora_a, lora_b = (values[name, i].to(dtype) for i in (0, 1))
            scale = scale.to(dtype).view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale
            return x @ self.weights[name].to(dtype).T + scale * (x @ lora_a.T @ lora_b.T)

        x = values["x"]
        source = values.get("context", x)
        source = source if self.index is None or self.form == "kv" else source[self.index]
        if self.form == "kv":
            k, v = values["k"][self.index], values["v"][self.index]
        else:
            k, v = project(source, "k", lora_scale), project(source, "v", lora_scale)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (project(x, "q", lora_scale), k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return project(out, "out", lora_scale) + self.bias.to(dtype) + values["residual"]


def with_gradients(run, leaves, upstream, **options):
    out = run(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]
