"""What a model predicts - noise or velocity - and the conversions between the two (PALP.md, v-prediction).

a_t = sqrt(alpha_bar_t), s_t = sqrt(1 - alpha_bar_t); x_t = a_t x + s_t eps; v = a_t eps - s_t x.
Hence eps = a_t v + s_t x_t and x0_hat = a_t x_t - s_t v_hat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PredictionSpace:
    """Conversions for one model: timesteps t [B] int64, images [B, C, H, W], results of the same shape.

    loss_space "model": loss and residual are in what the model predicts. "eps": the eps loss, pulled back through v.
    """

    alphas_cumprod: Tensor
    velocity: bool
    loss_space: str = "model"

    def a(self, t: Tensor) -> Tensor:
        return self.alphas_cumprod[t].sqrt()[:, None, None, None]

    def s(self, t: Tensor) -> Tensor:
        return (1 - self.alphas_cumprod[t]).sqrt()[:, None, None, None]

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        return self.a(t) * x0 + self.s(t) * noise

    def of(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should predict at a_t x0 + s_t noise: the noise, or v."""
        return self.a(t) * noise - self.s(t) * x0 if self.velocity else noise

    def eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction at x_t means."""
        return self.a(t) * pred + self.s(t) * x_t if self.velocity else pred

    def x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean image that a prediction at x_t means (eq. 2)."""
        if self.velocity:
            return self.a(t) * x_t - self.s(t) * pred
        return (x_t - self.s(t) * pred) / self.a(t)

    def seen_as(self, velocity: bool, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """A prediction at x_t as noise or, with `velocity`, as v = (eps - s x_t) / a."""
        if velocity == self.velocity:
            return pred
        return self.eps(pred, x_t, t) if self.velocity else (pred - self.s(t) * x_t) / self.a(t)

    def zero_eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction at x_t that means no noise: NFSD's residual is no difference of two scores at small t."""
        return -self.s(t) / self.a(t) * x_t if self.velocity else torch.zeros_like(x_t)

    def residual_factor(self, t: Tensor, t_new: Tensor | None) -> Tensor | None:
        """[B] or None (= 1): a_u / a_t for v. r_eps = a_u r_v, and a_t takes eps at x_t to v."""
        if not self.velocity or t_new is None:
            return None
        return (self.alphas_cumprod[t_new] / self.alphas_cumprod[t]).sqrt()

    def loss_weight(self, t: Tensor) -> Tensor | None:
        """[B] or None (= 1): a_t^2 for the eps loss of a v model, in both of its terms."""
        return self.alphas_cumprod[t] if self.velocity and self.loss_space == "eps" else None

    def unscaled(self, t: Tensor) -> Tensor:
        """[B] s_t / a_t: the weight of the residual without the paper's rescale (eq. 7)."""
        return (1 / self.alphas_cumprod[t] - 1).sqrt()
