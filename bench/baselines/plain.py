"""The PALP step as a careful user writes it with diffusers and peft: what palp_fast is measured against.

One adapter from peft, switched off for the teacher; one UNet pass per prediction, none whose factor is 0; no_grad where
no gradient is wanted; fixed prompts encoded once; one backward pass. It gives the gradient of palp_fast.Trainer without
using any of its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoPipelineForText2Image, DDPMScheduler
from peft import LoraConfig

LOSS_SCALE = 2.0**16  # of fp16, torch.amp.GradScaler's first one: gradients of a mean over latents are too small
TARGETS = {"attention": ["to_q", "to_k", "to_v", "to_out.0"], "cross_kv": ["attn2.to_k", "attn2.to_v"]}


@dataclass(frozen=True)
class Options:
    """method: "palp", "dreambooth", "sds" or "nfsd"; the rest as palp_fast.TrainConfig names it."""

    method: str = "palp"
    alpha: float = 15.0
    beta: float = 7.5
    residual_weight: float = 0.1
    rescale: bool = True
    loss_space: str = "model"


@dataclass
class PlainModel:
    """A pipeline with a LoRA adapter and token rows; conditions are (hidden [1, L, d],), for SDXL with pooled [1, p].

    token_tables: the text encoders' whole embedding matrices [vocabulary, width]; the last `new_rows` rows are trained.
    guide: how two predictions are made and combined.
    """

    pipeline: object
    subject_prompts: list[str]
    clean: tuple
    empty: tuple
    negative: tuple
    token_tables: list[torch.nn.Parameter]
    new_rows: int
    alphas_cumprod: torch.Tensor
    v_prediction: bool
    dtype: torch.dtype
    guide: Callable

    @property
    def unet(self):
        return self.pipeline.unet

    def lora_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.unet.parameters() if p.requires_grad]

    def lora_pairs(self) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        """{path inside the UNet: (lora_a [r, d_in], lora_b [d_out, r])}."""
        return {
            name: (module.lora_A["default"].weight, module.lora_B["default"].weight)
            for name, module in self.unet.named_modules() if hasattr(module, "lora_A")
        }


def load(
    folder,
    *,
    tokens: dict[str, str],
    subject_prompts: list[str],
    clean_prompt: str,
    negative_prompt: str = "",
    rank: int = 32,
    lora_alpha: float | None = None,
    lora_targets: str = "attention",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> PlainModel:
    """Load a diffusers folder, add an adapter, and one row for each of `tokens` {token word: class noun}.

    Prompts hold the token words. The UNet is stored in `dtype` and runs under autocast when that is 16-bit; LoRA, text
    encoders and VAE are fp32.
    """
    dtypes = {"unet": dtype, "default": torch.float32}
    pipeline = AutoPipelineForText2Image.from_pretrained(str(folder), torch_dtype=dtypes).to(device)
    for part in (pipeline.unet, pipeline.vae, *_text_encoders(pipeline)):
        part.requires_grad_(False).eval()
    lora_alpha = rank if lora_alpha is None else lora_alpha
    pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=TARGETS[lora_targets]))
    for parameter in pipeline.unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    tables = _add_tokens(pipeline, tokens)
    with torch.no_grad():
        clean, empty, negative = (_encode(pipeline, prompt) for prompt in (clean_prompt, "", negative_prompt))
    if getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
        empty = tuple(map(torch.zeros_like, empty))
    return PlainModel(
        pipeline=pipeline,
        subject_prompts=list(subject_prompts),
        clean=clean,
        empty=empty,
        negative=negative,
        token_tables=tables,
        new_rows=len(tokens),
        alphas_cumprod=DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod.to(device),
        v_prediction=pipeline.scheduler.config.prediction_type == "v_prediction",
        dtype=dtype,
        guide=guided_apart,
    )


def plain_gradients(model: PlainModel, latents, t, noise, options: Options, *, subject=0, t_new=None, noise_new=None):
    """Zero, then fill, the gradients of one PALP step: latents, noise [B, C, h, w] fp32, t [B] int64.

    The second timestep and noise default to the first. Returns the reconstruction loss and r [B, C, h, w] or None.
    """
    t_new, noise_new = t if t_new is None else t_new, noise if noise_new is None else noise_new
    for parameter in (*model.lora_parameters(), *model.token_tables):
        parameter.grad = None
    a_t, s_t = _signal_and_noise(model, t)
    x_t = a_t * latents + s_t * noise

    subject_condition = _encode(model.pipeline, model.subject_prompts[subject])
    pred = _predict(model, x_t, t, subject_condition)
    target = a_t * noise - s_t * latents if model.v_prediction else noise
    upstream = 2 * (pred.detach() - target)
    residual = None
    if options.method != "dreambooth":
        eps_pred = a_t * pred.detach() + s_t * x_t if model.v_prediction else pred.detach()
        x0_pred = (x_t - s_t * eps_pred) / a_t
        residual = _residual(model, x0_pred, t_new, noise_new, subject_condition, options)
        scale = 1.0 if options.rescale else s_t / a_t
        in_model_space = 1 / a_t if model.v_prediction else 1.0
        upstream = upstream - options.residual_weight * scale * residual * in_model_space
    if model.v_prediction and options.loss_space == "eps":
        upstream = upstream * a_t**2
    loss_scale = LOSS_SCALE if model.dtype == torch.float16 else 1.0
    (loss_scale / upstream.numel() * upstream * pred).sum().backward()
    if loss_scale != 1:
        torch._foreach_div_([p.grad for p in (*model.lora_parameters(), *model.token_tables)], loss_scale)
    return (pred.detach() - target).square().mean(), residual


def plain_step(model: PlainModel, optimizer, latents, options: Options, *, max_grad_norm=1.0, subject=0):
    """One training step on latents [B, C, h, w]: draw timesteps and noise, fill gradients, clip, step -> the loss."""
    t = torch.randint(len(model.alphas_cumprod), (len(latents),), device=latents.device)
    loss, _ = plain_gradients(model, latents, t, torch.randn_like(latents), options, subject=subject)
    torch.nn.utils.clip_grad_norm_(model.lora_parameters(), max_grad_norm)
    torch.nn.utils.clip_grad_norm_(model.token_tables, max_grad_norm)
    optimizer.step()
    return loss


def make_optimizer(
    model: PlainModel, lr: float = 1e-4, token_lr: float = 5e-4, fused: bool | None = None
) -> torch.optim.Optimizer:
    """AdamW; without decay on the tables, where a masked gradient must leave the old rows alone."""
    tokens = {"params": model.token_tables, "lr": token_lr, "weight_decay": 0.0}
    return torch.optim.AdamW([{"params": model.lora_parameters(), "lr": lr}, tokens], fused=fused)


@torch.no_grad()
def _residual(model, x0_pred, u, noise, subject_condition, options):
    """r of eq. 6 (or of SDS, NFSD) in units of eps: guided teacher minus guided student at the re-noised prediction."""
    a_u, s_u = _signal_and_noise(model, u)
    x_hat = a_u * x0_pred + s_u * noise

    def eps(condition, copies=1):
        """[copies B, C, h, w]; each part of a condition is [copies, 1, ...], or [1, ...] for one copy."""
        if copies > 1:
            condition = [part.expand(-1, len(x_hat), *part.shape[2:]).flatten(0, 1) for part in condition]
        x = x_hat.repeat(copies, 1, 1, 1)
        pred = _predict(model, x, u.repeat(copies), condition)
        return a_u.repeat(copies, 1, 1, 1) * pred + s_u.repeat(copies, 1, 1, 1) * x if model.v_prediction else pred

    model.unet.disable_adapters()
    teacher = model.guide(eps, model.clean, model.empty, options.alpha)
    if options.method == "nfsd":
        student = torch.where(u.view(-1, 1, 1, 1) < 200, 0.0, eps(model.negative))
    model.unet.enable_adapters()
    if options.method == "sds":
        student = noise
    if options.method == "palp":
        student = model.guide(eps, tuple(part.detach() for part in subject_condition), model.empty, options.beta)
    return teacher - student


def guided_apart(eps, condition, empty, scale):
    """Classifier-free guidance, eq. 5, without the pass whose weight is 0."""
    if scale == 0:
        return eps(empty)
    conditional = eps(condition)
    if scale == 1:
        return conditional
    unconditional = eps(empty)
    return unconditional + scale * (conditional - unconditional)


def _signal_and_noise(model, t):
    """a_t, s_t [B, 1, 1, 1]."""
    alpha_bar = model.alphas_cumprod[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _predict(model, x, t, condition):
    hidden, *pooled = (part.expand(len(x), *part.shape[1:]) for part in condition)
    added = None
    if pooled:
        height, width = (side * model.pipeline.vae_scale_factor for side in x.shape[-2:])
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=x.device).expand(len(x), -1)
        added = {"text_embeds": pooled[0], "time_ids": time_ids}
    with torch.autocast(x.device.type, model.dtype, enabled=model.dtype != torch.float32):
        sample = model.unet(x.to(model.dtype), t, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
    return sample.float()


def _encode(pipeline, prompt):
    """(hidden,) for SD, (hidden, pooled) for SDXL, with the graph to the token tables unless under no_grad."""
    device = pipeline.unet.device
    encoded = pipeline.encode_prompt(prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return encoded[:1] if len(encoded) == 2 else (encoded[0], encoded[2])


def _text_encoders(pipeline):
    return [getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)]


def _add_tokens(pipeline, tokens):
    """New rows at the end of each token table, from the mean of the class noun's; a gradient mask spares the others."""
    tables = []
    tokenizers = [getattr(pipeline, name) for name in ("tokenizer", "tokenizer_2") if hasattr(pipeline, name)]
    for tokenizer, text_encoder in zip(tokenizers, _text_encoders(pipeline)):
        nouns = [tokenizer(noun, add_special_tokens=False).input_ids for noun in tokens.values()]
        tokenizer.add_tokens(list(tokens))
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = text_encoder.get_input_embeddings().weight
        table.data[-len(tokens) :] = torch.stack([table.data[noun].mean(0) for noun in nouns])
        is_new = (torch.arange(len(table), device=table.device) >= len(table) - len(tokens)).unsqueeze(1)
        table.requires_grad_(True).register_hook(lambda grad, is_new=is_new: grad * is_new)
        tables.append(table)
    return tables
