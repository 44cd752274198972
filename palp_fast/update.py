"""Step 5 of PALP.md: one optimizer step on LoRA factors and token rows, each a clip group of its own."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from palp_fast import optim
from palp_fast.errors import TrainingDiverged
from palp_fast.metrics import BEFORE_GRADIENTS, Metrics
from palp_fast.resolve import compute_dtype

_FP32_STATE = {"min_8bit_size": 2**62}
SKIPPED = 20  # steps in a row that are not finite: training has diverged


class Update:
    """Optimizer, learning rate schedule, fp16 loss scale and clipping of one run.

    lora, rows: {name: Parameter}, fp32; rows learn with cfg.token_lr, without weight decay, with fp32 optimizer state.
    """

    def __init__(self, cfg, lora: dict[str, nn.Parameter], rows: dict[str, nn.Parameter]):
        self.cfg, self.named = cfg, lora | rows
        self.rows, self.bad = list(rows.values()), []
        self._row_norms = [row.detach().norm(dim=1, keepdim=True) for row in self.rows]
        groups = [{"params": list(lora.values()), "lr": cfg.lr}] if lora else []
        if rows:
            groups.append({"params": self.rows, "lr": cfg.token_lr, "weight_decay": 0.0} | self._row_options())
        # Of palp_fast: these skip a gradient that is not finite, and the host need not know.
        kind = {"adamw": optim.AdamW, "adamw8bit": optim.AdamW8bit, "lion8bit": optim.Lion8bit}[cfg.optimizer]
        self.optimizer = kind(groups, capturable=True)
        self.schedule = get_scheduler(
            cfg.lr_schedule, self.optimizer, num_warmup_steps=0, num_training_steps=cfg.steps)
        self.scaler = self._new_scaler()

    def _row_options(self):
        return {} if self.cfg.optimizer == "adamw" else _FP32_STATE

    def _new_scaler(self) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler(self.device.type, enabled=compute_dtype(self.cfg) == "fp16")
        # Which makes its tensors: made in a captured step, they would be made anew by every replay.
        scaler.scale(torch.zeros((), device=self.device))
        return scaler

    def zero(self, *, keep: bool = False) -> None:
        """No gradients; keep: zeros instead, to which the next ones are added, where they are if there are any."""
        if not keep:
            self.optimizer.zero_grad(set_to_none=True)
            return
        for parameter in self.named.values():
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        torch._foreach_zero_([parameter.grad for parameter in self.named.values()])

    def places(self) -> list[int]:
        """Addresses of what is trained, and of the gradients that are kept."""
        tensors = [tensor for p in self.named.values() for tensor in (p, p.grad) if tensor is not None]
        return list(map(Tensor.data_ptr, tensors))

    def refresh(self) -> None:
        """Learning rates to the device, where a captured `step` reads them."""
        self.optimizer.refresh()

    def cut_off(self) -> None:
        """After a step that did not get to its end: the next one starts as if that had not been."""
        self.zero()
        state, self.scaler = self.scaler.state_dict(), self._new_scaler()
        if state:
            self.scaler.load_state_dict(state)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    @torch.no_grad()
    def clip(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Takes the loss scale off the gradients and clips each group -> norms before that: of all gradients, of each.

        As clip_grad_norm_ does; the norms of single gradients tell which of them is not finite.
        """
        self.scaler.unscale_(self.optimizer)
        names, norms, groups = {id(p): name for name, p in self.named.items()}, {}, []
        for group in self.optimizer.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            if present:
                own = torch._foreach_norm([p.grad for p in present])
                norms |= {names[id(p)]: norm for p, norm in zip(present, own)}
                groups.append(torch.stack(own).norm())
                nn.utils.clip_grads_with_norm_(present, self.cfg.max_grad_norm, groups[-1])
        return (torch.stack(groups).norm() if groups else torch.zeros((), device=self.device)), norms

    def step(self) -> None:
        """Steps the optimizer. Gradients that are not finite change nothing but an fp16 loss scale."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.cfg.token_norm == "initial":
            with torch.no_grad():
                for row, norm in zip(self.rows, self._row_norms):
                    row.mul_(norm / row.norm(dim=1, keepdim=True))

    def next_rates(self) -> None:
        """Steps the schedule, which is on the host."""
        self.schedule.step()

    def gradients(self) -> Tensor:
        """Makes .grad the true gradients - no loss scale, zeros instead of None, no clipping -> their norm."""
        for parameter in self.named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(self.scaler.get_scale())
        return nn.utils.get_total_norm([parameter.grad for parameter in self.named.values()])

    def check(self, metrics: Metrics) -> None:
        """Takes note of a step that was read. Raises TrainingDiverged when SKIPPED ones in a row were not finite.

        Their updates were skipped. fp16 gradients overflow while the loss scale settles, which takes fewer steps.
        """
        if metrics.diverged is None:
            self.bad = []
            return
        self.bad.append((metrics["step"], metrics.diverged))
        if len(self.bad) == SKIPPED:
            self.raise_diverged()

    def check_end(self) -> None:
        """Raises TrainingDiverged if the run's last steps were skipped, but for a loss scale that settles."""
        settles = self.scaler.is_enabled() and all(what not in BEFORE_GRADIENTS.values() for _, what in self.bad)
        if self.bad and not settles:
            self.raise_diverged()

    def raise_diverged(self) -> None:
        bad, self.bad = self.bad, []
        raise diverged(*bad[0], f", nor was it in the {len(bad) - 1} steps after it" if len(bad) > 1 else "")

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


def diverged(step: int, tensor: str, since: str = "") -> TrainingDiverged:
    return TrainingDiverged(f"step {step}: {tensor} is not finite{since}. The last checkpoint is safe; "
                            "lower lr or residual_weight, or use base_dtype 'fp32' or 'bf16'")
