"""Prints a digest of what the CPU kernels compute at the level that PALP_FAST_CPU_LEVEL names; run by test_build."""

import hashlib
import itertools

import torch

from palp_fast import functional
from palp_fast.optim import AdamW, AdamW8bit, Lion8bit
from palp_fast.sampler import TimestepSampler

OPTIONS = {"backend": "cpu"}


def results() -> list[torch.Tensor]:
    """Outputs and gradients of every compiled operator, on sizes that fill no vector."""
    draw = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 4, 9, 37, generator=draw) for _ in range(6)]
    out = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pred, target, *others = (image.detach().to(dtype, copy=True) for image in images)
        pred.requires_grad_()
        loss, stats = functional.score_residual(pred, target, *others, alpha=7.5, beta=3.75, **OPTIONS)
        loss.backward()
        out += [loss.detach(), stats, pred.grad]
        out += combinations(pred.detach(), target, others)
        x = target.clone().requires_grad_()
        noised = functional.renoise(
            x, others[0], others[1], torch.tensor([0.1, 0.5, 0.9]), alpha_bar_new=torch.tensor([0.3, 0.4, 0.5]),
            copies=2, **OPTIONS)
        noised.float().square().sum().backward()
        out += [noised.detach(), x.grad]
    alphas, t = torch.linspace(0.9, 0.1, 50), torch.tensor([0, 25, 49])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = images[0].detach().to(dtype, copy=True).requires_grad_()
        noised = functional.add_noise(x, t, alphas, seed=1, step=2, **OPTIONS)
        noised[0].float().square().sum().backward()
        out += [*(tensor.detach() for tensor in noised), x.grad]
    sampler = TimestepSampler(alphas, "adaptive", bins=10, **OPTIONS)
    for step in range(4):
        drawn = sampler.sample(7, step)
        sampler.update(drawn[0], drawn[0].float() + 0.1)
        out += drawn
    return out + list(sampler.state_dict().values()) + updates() + layers()


def layers() -> list[torch.Tensor]:
    """The frozen layers, in both layouts."""
    out = []
    draw = torch.Generator().manual_seed(2)
    image, rows = torch.randn(2, 60, 9, 13, generator=draw), 4 * torch.randn(7, 2 * 333, generator=draw)
    weight, bias = torch.randn(2, 60, generator=draw)
    formats = torch.channels_last, torch.contiguous_format
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16, torch.float16), formats):
        x = image.to(dtype).contiguous(memory_format=layout).requires_grad_()
        y = functional.group_norm_silu(x, 6, weight, bias, **OPTIONS)
        out += [y.detach(), *torch.autograd.grad(y.float().square().sum(), x)]
        x = rows.to(dtype).requires_grad_()
        y = functional.geglu(x, **OPTIONS)
        out += [y.detach(), *torch.autograd.grad(y.float().square().sum(), x)]
    return out


def updates() -> list[torch.Tensor]:
    """Parameters and state after steps of each optimizer, on tensors that fill no block."""
    out = []
    for kind, dtype in itertools.product((AdamW8bit, Lion8bit, AdamW), (torch.float32, torch.bfloat16, torch.float16)):
        draw = torch.Generator().manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(size, generator=draw).to(dtype)) for size in (1, 300, 5000)]
        optimizer = kind(params, lr=1e-2, max_grad_norm=1.0, **OPTIONS)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=draw).to(dtype)
            optimizer.step()
        state = [value for param in params for value in optimizer.state[param].values() if torch.is_tensor(value)]
        out += [*(param.detach() for param in params), *state, optimizer.grad_norm]
    return out


def combinations(pred, target, others) -> list[torch.Tensor]:
    """Every number of terms, with weights, mask and strides."""
    out = []
    vector = torch.tensor([0.3, 1.7, 0.9])
    mask = target[:, :1].float().abs()
    terms = [*others, *(other.mT.contiguous().mT for other in others)]
    for count in range(len(terms) + 1):
        table = torch.linspace(-1, 1, count * 3).view(count, 3)
        leaf = pred.clone().requires_grad_()
        loss, stats = functional.score_combination(
            leaf, target, terms[:count], table, residual_weight=0.3, residual_scale=vector, mask=mask,
            sample_weight=vector.flip(0), **OPTIONS)
        out += [loss.detach(), stats, *torch.autograd.grad(loss, leaf)]
    return out


digest = hashlib.sha256()
for tensor in results():
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
