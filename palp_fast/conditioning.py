"""Prompts to text conditions, and the trainable embedding rows of new tokens."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from palp_fast.batches import pick
from palp_fast.config import NFSD_NEGATIVE_PROMPT
from palp_fast.errors import ConfigError
from palp_fast.prompts import fill, placeholders, token_words


@dataclass(frozen=True)
class Condition:
    """What the UNet is conditioned on: hidden [P, tokens, width], pooled [P, width] (SDXL) or None; P prompts."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    def rows(self, index) -> Condition:
        """The prompts `index` (list or int64 tensor [B]), one per sample; a lone prompt is expanded without a copy."""
        def rows(x):
            if len(x) == 1:
                return x.expand(len(index), *x.shape[1:])
            return x[index] if isinstance(index, torch.Tensor) else pick(x, index)

        return self._each(rows)

    def detach(self) -> Condition:
        return self._each(torch.Tensor.detach)

    def _each(self, function):
        return Condition(function(self.hidden), None if self.pooled is None else function(self.pooled))

    @staticmethod
    def cat(conditions: list[Condition]) -> Condition:
        pooled = [c.pooled for c in conditions]
        return Condition(torch.cat([c.hidden for c in conditions]), None if pooled[0] is None else torch.cat(pooled))


class TokenEmbedding(nn.Module):
    """A frozen token embedding followed by trainable fp32 rows: ids [P, L] -> [P, L, width] in the base's dtype.

    rows: one Parameter [n, width] per subject; the first of them has id `first_id`, the others follow in order.
    """

    def __init__(self, base: nn.Embedding, rows: list[nn.Parameter], first_id: int):
        super().__init__()
        self.base, self.rows, self.first_id = base, nn.ParameterList(rows), first_id

    @property
    def weight(self) -> torch.Tensor:
        """The frozen table [vocabulary, width]."""
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        new = torch.cat(list(self.rows)).to(self.base.weight.dtype)
        is_new = ids >= self.first_id
        known = self.base(ids.masked_fill(is_new, 0))
        added = nn.functional.embedding((ids - self.first_id).clamp(min=0), new)
        return torch.where(is_new.unsqueeze(-1), added, known)


def words_of(cfg) -> dict[str, str]:
    """{placeholder: its token words} of a resolved TrainConfig: "[V]" -> "tok tok_1"."""
    return {s.placeholder: " ".join(token_words(s.token, cfg.token_vectors)) for s in cfg.subjects}


def subject_names(cfg) -> list[str]:
    """What the subjects' own prompts are called: y_P, or y_P1, y_P2, ..."""
    return ["y_P"] if len(cfg.subjects) == 1 else [f"y_P{i + 1}" for i in range(len(cfg.subjects))]


def prompts_of(cfg) -> dict[str, str]:
    """Every prompt of a run, as the tokenizer gets it, by its name in PALP.md: each subject's y_P, y, y_c, negative."""
    words = words_of(cfg)
    prompts = {name: fill(subject.prompt, words) for name, subject in zip(subject_names(cfg), cfg.subjects)}
    prompts |= {"y": fill(cfg.prompt, words), "y_c": cfg.clean_prompt}
    return prompts | ({"negative": cfg.negative_prompt} if cfg.method == "nfsd" else {})


def add_tokens(tokenizers: list, cfg) -> None:
    """Adds every subject's token words to the tokenizers, in order. Raises ConfigError if a word is taken."""
    words = [word for subject in cfg.subjects for word in token_words(subject.token, cfg.token_vectors)]
    for tokenizer in tokenizers:
        taken = tokenizer.get_vocab()
        for word in words:
            if {word, word.lower(), f"{word.lower()}</w>"} & taken.keys():
                raise ConfigError(f"token: {word!r} is a word of the model's vocabulary; "
                                  "choose a word that the model does not know")
        tokenizer.add_tokens(words)


def check_prompts(tokenizers: list, cfg) -> dict[str, list[list[int]]]:
    """Token ids (one list per tokenizer) of every prompt by name; `tokenizers` hold the new tokens (add_tokens).

    Raises ConfigError for a prompt longer than the tokenizer's limit, and where new tokens are not found exactly in the
    places of the placeholders (a token that is also part of another word). Warns of one longer than the model draws
    well from. Only NFSD's own negative prompt, which nobody typed, is cut to what fits.
    """
    checked = {}
    for name, text in prompts_of(cfg).items():
        field = {"y": "prompt", "y_c": "clean_prompt", "negative": "negative_prompt"}.get(name, "subject_prompt")
        expected = _new_words(name, cfg)
        checked[name] = [_ids(tokenizer, text) for tokenizer in tokenizers]
        for tokenizer, ids in zip(tokenizers, checked[name]):
            if len(ids) > tokenizer.model_max_length:
                raise ConfigError(f"{field}: {text!r} has {len(ids)} tokens with start and end; "
                                  f"the model reads at most {tokenizer.model_max_length}")
            warn_of_length(field, text, ids, tokenizer)
            first_id = tokenizer.convert_tokens_to_ids(cfg.subjects[0].token)
            if [i for i in ids if i >= first_id] != tokenizer.convert_tokens_to_ids(expected):
                raise ConfigError(f"token: a new token is also part of another word in {field} {text!r}; "
                                  "choose a token that occurs nowhere else")
    return checked


def warn_of_length(field: str, text: str, ids: list[int], tokenizer) -> None:
    """Warns if a prompt's token ids are more than its model draws well from, `prompt_tokens` of the tokenizer."""
    if len(ids) > (most := _most_tokens(tokenizer)):
        warnings.warn(f"{field}: {text!r} has {len(ids)} tokens with start and end; this model draws well from at most "
                      f"{most}", stacklevel=3)


def _most_tokens(tokenizer) -> int:
    """How many tokens of a prompt leave alone the padding in which a text encoder may hold a picture's parts.

    tokenizer_config.json says so as `prompt_tokens` (emoji-64: palp_fast/zoo/language.py); else all that fit.
    """
    return tokenizer.init_kwargs.get("prompt_tokens", tokenizer.model_max_length)


def _ids(tokenizer, text: str) -> list[int]:
    """Token ids of a prompt; NFSD's own negative prompt cut to what fits."""
    if text == NFSD_NEGATIVE_PROMPT:
        return tokenizer(text, truncation=True, max_length=_most_tokens(tokenizer)).input_ids
    return tokenizer(text, verbose=False).input_ids


def _new_words(name, cfg):
    """The new token words, in order, that the prompt of this name must hold."""
    written = {"y": cfg.prompt, "y_c": "", "negative": ""}
    written |= {own: subject.prompt for own, subject in zip(subject_names(cfg), cfg.subjects)}
    words = words_of(cfg)
    return [word for slot in placeholders(written[name]) for word in words[slot].split()]


def add_rows(components, cfg, generator: torch.Generator) -> list[list[nn.Parameter]]:
    """Gives the live model the subjects' tokens -> rows[subject][text encoder], fp32 Parameters [vectors, width].

    The first vector starts as the mean of the class noun's rows; later ones with noise of a tenth of the table's
    standard deviation added. cfg.learn_token False: the rows stay there.
    """
    rows = [[] for _ in cfg.subjects]
    first_ids = [len(tokenizer) for tokenizer in components.tokenizers]
    nouns = [[t(s.class_noun, add_special_tokens=False).input_ids for s in cfg.subjects] for t in components.tokenizers]
    add_tokens(components.tokenizers, cfg)
    for encoder, first_id, ids in zip(components.text_encoders, first_ids, nouns):
        base = encoder.get_input_embeddings()
        for own, noun in zip(rows, ids):
            start = _starting_rows(base.weight, noun, cfg.token_vectors, generator)
            own.append(nn.Parameter(start, requires_grad=cfg.learn_token))
        encoder.set_input_embeddings(TokenEmbedding(base, [own[-1] for own in rows], first_id))
    return rows


def row_words(cfg, encoders: int) -> list[str]:
    """The token word of every row in add_rows' rows, those of each subject, text encoder and vector in turn."""
    of_subjects = [token_words(subject.token, cfg.token_vectors) for subject in cfg.subjects]
    return [word for words in of_subjects for _ in range(encoders) for word in words]


def vocabulary_norms(components) -> list[float]:
    """The median norm of a row in each text encoder's own table: what a new token's norm compares with."""
    tables = [encoder.get_input_embeddings().weight for encoder in components.text_encoders]
    return [torch.linalg.vector_norm(table, dim=1, dtype=torch.float32).median().item() for table in tables]


def _starting_rows(table, noun, vectors, generator):
    mean = table[torch.tensor(noun, device=table.device)].float().mean(0)
    noise = torch.randn(vectors, table.shape[1], generator=generator).to(table.device)
    noise[0] = 0
    return mean + 0.1 * table.float().std() * noise


def tokenize(tokenizers: list, texts: list[str]) -> list[torch.Tensor]:
    """Token ids [P, L] of P prompts for each text encoder, padded as diffusers' pipelines pad them."""
    return [torch.tensor([_padded(tokenizer, text) for text in texts]) for tokenizer in tokenizers]


def _padded(tokenizer, text: str) -> list[int]:
    most = tokenizer.model_max_length
    if text == NFSD_NEGATIVE_PROMPT:
        ids = _ids(tokenizer, text)
        return ids + [tokenizer.pad_token_id] * (most - len(ids))
    return tokenizer(text, padding="max_length", max_length=most, truncation=True).input_ids


def encode(components, texts: str | list[str]) -> Condition:
    """The condition of one prompt or several, as the stock pipelines compute it; with the graph to the token rows."""
    return encode_ids(components, tokenize(components.tokenizers, [texts] if isinstance(texts, str) else texts))


def encode_ids(components, ids: list[torch.Tensor]) -> Condition:
    """encode() for prompts that are token ids already, one tensor [P, L] per text encoder."""
    encoders = components.text_encoders
    if components.family == "sd":
        return Condition(encoders[0](ids[0].to(encoders[0].device))[0])
    outputs = [e(i.to(e.device), output_hidden_states=True) for e, i in zip(encoders, ids)]
    return Condition(torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[-1][0])


@torch.no_grad()
def encode_empty(components) -> Condition:
    """The model's own unconditional: the empty prompt, or zeros where the model is made for zeros (SDXL base)."""
    condition = encode(components, "")
    if not components.zero_empty:
        return condition
    return Condition(torch.zeros_like(condition.hidden), torch.zeros_like(condition.pooled))


@torch.no_grad()
def encode_all(components, texts: dict[str, str | list[str] | None]) -> dict[str, Condition]:
    """The conditions of prompts by name, those that are None left out, and "empty", the model's unconditional."""
    made = {name: encode(components, text) for name, text in texts.items() if text is not None}
    return made | {"empty": encode_empty(components)}


def unet_kwargs(components, condition: Condition, latents: torch.Tensor) -> dict:
    """The keyword arguments that condition a UNet call on `condition` [B], for latents [B, C, h, w]."""
    kwargs = {"encoder_hidden_states": condition.hidden.to(components.dtype)}
    if components.family == "sdxl":
        height, width = (side * components.vae_scale for side in latents.shape[-2:])
        # [height, width, 0, 0, height, width], made on the device: a copy of host memory would wait for it.
        time_ids = torch.zeros(1, 6, device=latents.device, dtype=components.dtype)
        time_ids[:, 0::4].fill_(height)
        time_ids[:, 1::4].fill_(width)
        kwargs["added_cond_kwargs"] = {
            "text_embeds": condition.pooled.to(components.dtype), "time_ids": time_ids.expand(len(latents), -1)}
    return kwargs
