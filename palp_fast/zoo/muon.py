"""Muon (Jordan et al., 2024) for convolution and linear weights, AdamW for everything else; used to train emoji-64."""

import torch
from torch import Tensor

from palp_fast.zoo.training import product_dtype


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by a Newton-Schulz iteration; weights [out, ...] count as [out, fan_in] matrices.

    The update has RMS 0.2 per element whatever the shape, so that one learning rate serves it and AdamW alike.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient; matrices of one shape go through it together."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            momenta = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            blended = torch._foreach_lerp(gradients, momenta, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for places in _by_shape(blended):
                update = orthogonalise(torch.stack([blended[place].flatten(1) for place in places]).to(product_dtype()))
                rate = -group["lr"] * 0.2 * max(update.shape[1:]) ** 0.5
                for place, part in zip(places, update.float().mul_(rate), strict=True):
                    weights[place].add_(part.view(weights[place].shape))


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearly the orthogonal factors of matrices [n, rows, columns], by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _by_shape(tensors: list[Tensor]) -> list[list[int]]:
    places: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.shape, []).append(place)
    return list(places.values())


class Pair:
    """Muon for a model's matrices and convolutions, AdamW for the rest, behind one step and one state.

    excluded: words of parameter names that go to AdamW all the same (first and last layers, embeddings).
    """

    def __init__(self, model: torch.nn.Module, excluded: tuple[str, ...]):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            is_matrix = parameter.ndim >= 2 and not any(word in name for word in excluded)
            (matrices if is_matrix else others).append(parameter)
        self.parts = Muon(matrices, 0.0), torch.optim.AdamW(others, 0.0, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, lr: float) -> None:
        """One update; AdamW takes half of Muon's learning rate."""
        for part, rate in zip(self.parts, (lr, lr / 2), strict=True):
            part.param_groups[0]["lr"] = rate
            part.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> list[dict]:
        """State of both parts."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        """Restore both parts."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)
