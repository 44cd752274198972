"""Bytes of all storages alive while a training step runs, and the most there were: exact, of fake tensors too."""

import math
from types import SimpleNamespace

import ledger
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from palp_fast import methods, predict
from palp_fast.conditioning import Condition
from palp_fast.memory import stock
from palp_fast.nn import frozen, lean


class Alive(stock.Alive):
    """Inside an operator it sees the dequantised weight alone, as the kernels of a card have it."""

    def __init__(self, known=()):
        super().__init__(known, _dequantised)


def _dequantised(func, args):
    """Bytes of the weight that an operator dequantises for itself."""
    if func.namespace != "palp_fast":
        return 0
    given = dict(zip((argument.name for argument in func._schema.arguments), args))
    if given.get("weight_scale") is None:
        return 0
    like = given.get("x", given.get("grad"))
    return math.prod(given["weight_shape"]) * like.dtype.itemsize


class FakeStep:
    """A whole training step of a lean UNet of ledger.SHAPES, without memory."""

    def __init__(self, shape, cfg, form=None, mode=None):
        config, self.side, self.width, self.pooled = ledger.SHAPES[shape]
        self.cfg, self.mode = cfg, mode or FakeTensorMode()
        with self.mode:
            with ledger.half():
                unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
            if form is not None:
                frozen.quantise_layers(unet, form, lean.QUANTISED, skip=lean.NOT_QUANTISED)
            self.parts = SimpleNamespace(
                unet=unet, device=torch.device("cpu"), dtype=torch.bfloat16, vae_scale=8,
                family="sd" if self.pooled is None else "sdxl")
            self.predictions = predict.LeanPredictions(self.parts, cfg, None)
            self.passes = methods.passes(cfg)
            fixed = {"clean": self.condition(), "empty": self.condition()}
            self.predictions.fix(fixed, self.passes)

    def condition(self, prompts=1):
        hidden = torch.empty(prompts, 77, self.width, dtype=torch.bfloat16)
        pooled = None if self.pooled is None else torch.empty(prompts, self.pooled, dtype=torch.bfloat16)
        return Condition(hidden, pooled)

    def weights(self):
        """Bytes of the UNet's frozen weights, each storage once."""
        frozen_ = [p for p in (*self.parts.unet.parameters(), *self.parts.unet.buffers()) if not p.requires_grad]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in frozen_}.values())

    def known(self):
        """Tensors that are there before the step."""
        unet, kv = self.parts.unet, self.predictions.prompt_kv
        return [*unet.parameters(), *unet.buffers(), *(t for pair in (kv.values.values() if kv else ()) for t in pair)]

    def peaks(self, teacher=None):
        """{"saved", "forward", "without_grad", "backward": bytes} beside weights and LoRA.

        teacher: another FakeStep, whose predictions guide.
        """
        batch, found = self.cfg.batch_size, {}
        known = self.known() + (teacher.known() if teacher else [])
        guided = [one for one in self.passes if teacher and one.lora_scale == methods.TEACHER]
        own = [one for one in self.passes if one not in guided]
        with self.mode, Alive(known) as alive:
            x = torch.empty(batch, 4, self.side, self.side)
            t = torch.empty(batch, dtype=torch.int64)
            leaf = self.condition()
            for tensor in (leaf.hidden, leaf.pooled):
                if tensor is not None:
                    tensor.requires_grad_()
            pred = self.predictions.with_graph(x, t, leaf, [0] * batch)
            found["saved"], found["forward"] = alive.alive, alive.peak
            if self.passes:
                alive.mark()
                with torch.no_grad():
                    self.predictions.without_graph(x, t, leaf.detach(), [0] * batch, own)
                    if teacher:
                        teacher.predictions.without_graph(x, t, None, [0] * batch, guided)
                found["without_grad"] = alive.peak
            alive.mark()
            pred.backward(torch.empty_like(pred))
            found["backward"] = alive.peak
        return found
