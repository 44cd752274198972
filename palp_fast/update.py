"""Step 5 of PALP.md: one optimizer step on LoRA factors and token rows, each a clip group of its own."""

from __future__ import annotations

import math

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from palp_fast import optim
from palp_fast.errors import TrainingDiverged
from palp_fast.resolve import compute_dtype

_FP32_STATE = {"min_8bit_size": 2**62}


class Update:
    """Optimizer, learning rate schedule, fp16 loss scale and clipping of one run.

    lora, rows: {name: Parameter}, fp32; rows learn with cfg.token_lr, without weight decay, with fp32 optimizer state.
    """

    def __init__(self, cfg, lora: dict[str, nn.Parameter], rows: dict[str, nn.Parameter]):
        self.cfg, self.named = cfg, lora | rows
        self.rows = list(rows.values())
        self._row_norms = [row.detach().norm(dim=1, keepdim=True) for row in self.rows]
        groups = [{"params": list(lora.values()), "lr": cfg.lr}] if lora else []
        if rows:
            groups.append({"params": self.rows, "lr": cfg.token_lr, "weight_decay": 0.0} | self._row_options())
        kind = {"adamw": torch.optim.AdamW, "adamw8bit": optim.AdamW8bit, "lion8bit": optim.Lion8bit}[cfg.optimizer]
        self.optimizer = kind(groups)
        self.schedule = get_scheduler(
            cfg.lr_schedule, self.optimizer, num_warmup_steps=0, num_training_steps=cfg.steps)
        self.scaler = torch.amp.GradScaler(torch.device(cfg.device).type, enabled=compute_dtype(cfg) == "fp16")

    def _row_options(self):
        return {} if self.cfg.optimizer == "adamw" else _FP32_STATE

    def zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip(self) -> Tensor:
        """Takes the loss scale off the gradients and clips each group -> norm of all gradients before clipping."""
        self.scaler.unscale_(self.optimizer)
        norms = [nn.utils.clip_grad_norm_(g["params"], self.cfg.max_grad_norm) for g in self.optimizer.param_groups]
        return torch.stack([norm.to(self.device) for norm in norms]).norm()

    def step(self) -> None:
        """Steps optimizer and schedule, unless fp16 gradients overflowed: then only the loss scale changes."""
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            return
        self.schedule.step()
        if self.cfg.token_norm == "initial":
            with torch.no_grad():
                for row, norm in zip(self.rows, self._row_norms):
                    row.mul_(norm / row.norm(dim=1, keepdim=True))

    def gradients(self) -> Tensor:
        """Makes .grad the true gradients - no loss scale, zeros instead of None, no clipping -> their norm."""
        for parameter in self.named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(self.scaler.get_scale())
        return nn.utils.get_total_norm([parameter.grad for parameter in self.named.values()])

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raises TrainingDiverged if something is not finite; fp16 gradients may overflow while their scale settles."""
        tensors = {"rec_loss": "the student's prediction", "residual_norm": "the residual", "loss": "the loss"}
        for name, tensor in tensors.items():
            if not math.isfinite(metrics[name]):
                raise diverged(step, tensor)
        if not math.isfinite(metrics["grad_norm"]) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            bad = [n for n, p in self.named.items() if p.grad is not None and not p.grad.isfinite().all()]
            raise diverged(step, f"the gradient of {bad[0]}" if bad else "the gradient norm")

    def check_parameters(self, step: int) -> None:
        """Raises TrainingDiverged if a trained tensor is not finite: it must reach no file."""
        for name, parameter in self.named.items():
            if not parameter.isfinite().all():
                raise diverged(step, name)

    @property
    def lr(self) -> float:
        """Of the LoRA factors, or of the token rows where these alone learn."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def device(self) -> torch.device:
        return next(iter(self.named.values())).device

    def state_dict(self) -> dict:
        parts = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        tensors = {name: parameter.detach().cpu() for name, parameter in self.named.items()}
        return {"parameters": tensors} | {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


def diverged(step: int, tensor: str) -> TrainingDiverged:
    return TrainingDiverged(f"step {step}: {tensor} is not finite. The last checkpoint is safe; "
                            "lower lr or residual_weight, or use base_dtype 'fp32' or 'bf16'")
