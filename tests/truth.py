"""The PALP step's gradient by full autograd through x0_hat, in fp64, from stock parts: what every other one must equal.

Nothing of palp_fast is used. The student is a stock UNet called with merged weights W + (lora_alpha / r) B A, the token
rows are appended to the stock embedding matrix, and PALP.md step 4 is written as it stands: a term whose derivative is
w(t) r dx0_hat/dtheta with r held constant, beside |eps_hat - eps|^2.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoPipelineForText2Image
from torch.func import functional_call


@dataclass(frozen=True)
class Settings:
    """What decides the gradient, under TrainConfig's names; subject_prompts and the others hold token words."""

    subject_prompts: tuple = ("a photo of zorp",)
    clean_prompt: str = "a sketch of a cat"
    negative_prompt: str = "red"
    method: str = "palp"
    alpha: float = 15.0
    beta: float = 7.5
    residual_weight: float = 0.3
    rescale: bool = True
    loss_space: str = "model"
    lora_alpha: float = 4.0


class Truth:
    """A model folder in fp64 with LoRA {path: (A, B)} and one [words, width] tensor of token rows per text encoder.

    teacher: the folder of another model that is the teacher.
    """

    def __init__(self, folder, words, lora, rows, settings, teacher=None):
        self.pipeline = AutoPipelineForText2Image.from_pretrained(str(folder))
        self.sdxl = hasattr(self.pipeline, "text_encoder_2")
        suffixes = ("", "_2") if self.sdxl else ("",)
        self.tokenizers = [getattr(self.pipeline, f"tokenizer{suffix}") for suffix in suffixes]
        self.encoders = [getattr(self.pipeline, f"text_encoder{suffix}").double() for suffix in suffixes]
        self.unet = self.pipeline.unet.double()
        for module in (self.unet, *self.encoders):
            module.requires_grad_(False)
        for tokenizer in self.tokenizers:
            assert tokenizer.add_tokens(list(words)) == len(words)
        self.lora = {name: tuple(leaf(x) for x in pair) for name, pair in lora.items()}
        self.rows = [leaf(x) for x in rows or [torch.zeros(0, e.config.hidden_size) for e in self.encoders]]
        self.teacher = None if teacher is None else Truth(teacher, [], {}, [], settings)
        self.settings = settings
        scheduler = self.pipeline.scheduler
        self.alpha_bar = scheduler.alphas_cumprod.double()
        self.velocity = scheduler.config.prediction_type == "v_prediction"

    def gradients(self, latents, t, noise, *, subject=0, t_new=None, noise_new=None):
        """({path: (dA, dB)}, [d rows per text encoder]), fp64."""
        u, noise_new = t if t_new is None else t_new, noise if noise_new is None else noise_new
        prompt = self.settings.subject_prompts[subject]
        loss = self.loss(latents.double(), t, noise.double(), prompt, u, noise_new.double())
        leaves = [x for pair in self.lora.values() for x in pair] + self.rows
        grads = iter(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        return {name: (next(grads), next(grads)) for name in self.lora}, list(grads)

    def loss(self, latents, t, noise, subject_prompt, u, noise_new):
        """Per sample |eps_hat - eps|^2 + lambda w(t) r x0_hat; for a v model over a_t^2, unless loss_space is "eps"."""
        a_t, s_t = self.signal(t), self.sigma(t)
        x_t = a_t * latents + s_t * noise
        eps_hat = self.eps(x_t, t, self.encode(subject_prompt), student=True)
        x0_hat = (x_t - s_t * eps_hat) / a_t
        loss = (eps_hat - noise).square()
        if self.settings.method != "dreambooth":
            r = self.residual(x0_hat.detach(), u, noise_new, subject_prompt)
            w = a_t / s_t if self.settings.rescale else 1.0
            loss = loss + self.settings.residual_weight * w * r * x0_hat
        if self.velocity and self.settings.loss_space == "model":
            loss = loss / a_t.square()
        return loss.sum() / latents.numel()

    @torch.no_grad()
    def residual(self, x0_hat, u, noise, subject_prompt):
        """r in units of eps, [B, C, h, w]."""
        chosen = self.settings
        x_hat = self.signal(u) * x0_hat + self.sigma(u) * noise
        teacher, empty = self.teacher or self, self.encode_empty()
        position = u if self.teacher is None else self.position(u)

        def teach(condition):
            return teacher.eps(x_hat, position, condition, student=False)

        teacher_empty = teach(teacher.encode_empty())
        direction = teach(teacher.encode(chosen.clean_prompt)) - teacher_empty
        if chosen.method == "nfsd":
            negative = teach(teacher.encode(chosen.negative_prompt))
            early = (u < 200).view(-1, 1, 1, 1)
            return torch.where(early, teacher_empty, teacher_empty - negative) + chosen.alpha * direction
        guided = teacher_empty + chosen.alpha * direction
        if chosen.method == "sds":
            return guided - noise
        own = self.eps(x_hat, u, self.encode(subject_prompt), student=True)
        own_empty = self.eps(x_hat, u, empty, student=True)
        return guided - ((1 - chosen.beta) * own_empty + chosen.beta * own)

    def eps(self, x, t, condition, *, student):
        """The noise that teacher or student predicts at x."""
        hidden, pooled = condition
        kwargs = {"encoder_hidden_states": hidden.expand(len(x), -1, -1)}
        if self.sdxl:
            height, width = (side * self.pipeline.vae_scale_factor for side in x.shape[-2:])
            time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=x.dtype).expand(len(x), -1)
            kwargs["added_cond_kwargs"] = {"text_embeds": pooled.expand(len(x), -1), "time_ids": time_ids}
        pred = functional_call(self.unet, self.merged() if student else {}, (x, t), kwargs).sample
        return self.signal(t) * pred + self.sigma(t) * x if self.velocity else pred

    def position(self, u):
        """Where the teacher's schedule has as much noise as this one at u, between its timesteps."""
        own, theirs = (torch.log(table / (1 - table)).numpy() for table in (self.alpha_bar, self.teacher.alpha_bar))
        return torch.from_numpy(np.interp(-own[u], -theirs, np.arange(len(theirs))))

    def merged(self):
        weights = dict(self.unet.named_parameters())
        return {
            f"{name}.weight": weights[f"{name}.weight"] + self.settings.lora_alpha / len(a) * (b @ a)
            for name, (a, b) in self.lora.items()
        }

    def encode(self, prompt):
        """(hidden [1, L, d], pooled [1, p] or None)."""
        outputs = []
        for tokenizer, encoder, rows in zip(self.tokenizers, self.encoders, self.rows):
            ids = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
            name, table = next((n, p) for n, p in encoder.named_parameters() if n.endswith("token_embedding.weight"))
            call = ((ids.input_ids,), {"output_hidden_states": True})
            outputs.append(functional_call(encoder, {name: torch.cat([table, rows])}, *call))
        if not self.sdxl:
            return outputs[0].last_hidden_state, None
        return torch.cat([out.hidden_states[-2] for out in outputs], dim=-1), outputs[1].text_embeds

    def encode_empty(self):
        hidden, pooled = self.encode("")
        return (torch.zeros_like(hidden), torch.zeros_like(pooled)) if self.sdxl else (hidden, pooled)

    def signal(self, t):
        return self.level(t).sqrt().view(-1, 1, 1, 1)

    def sigma(self, t):
        return (1 - self.level(t)).sqrt().view(-1, 1, 1, 1)

    def level(self, t):
        """alpha_bar; between two timesteps the log of alpha_bar / (1 - alpha_bar) is linear."""
        if not t.is_floating_point():
            return self.alpha_bar[t]
        logit = torch.logit(self.alpha_bar)
        low = t.floor().long().clamp(max=len(logit) - 2)
        return torch.lerp(logit[low], logit[low + 1], t - low).sigmoid()


def leaf(x):
    return x.detach().double().requires_grad_(True)
