"""Muon (Jordan et al., 2024) for convolution and linear weights, AdamW for everything else; used to train emoji-64."""

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by a Newton-Schulz iteration; weights [out, ...] count as [out, fan_in] matrices.

    The update has RMS 0.2 per element whatever the shape, so that one learning rate serves it and AdamW alike.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                blended = weight.grad.lerp(state["momentum"], group["momentum"])
                update = orthogonalise(blended.flatten(1)).view(weight.shape)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(update.flatten(1).shape) ** 0.5)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Nearly the orthogonal factor of `matrix`, same shape, fp32: quintic Newton-Schulz in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).float()


class Pair:
    """Muon for a model's matrices and convolutions, AdamW for the rest, behind one step and one state.

    excluded: words of parameter names that go to AdamW all the same (first and last layers, embeddings).
    """

    def __init__(self, model: torch.nn.Module, excluded: tuple[str, ...]):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
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
