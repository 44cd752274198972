"""Prompts with placeholders: y and y_P as the user wrote them, y_c by PALP's article rule, words for the tokenizer.

A placeholder such as [V] is a slot in a prompt: it is filled before tokenising and never reaches a model or a file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from palp_fast.article import indefinite_article, takes_article
from palp_fast.errors import ConfigError

if TYPE_CHECKING:
    from palp_fast.config import Subject, TrainConfig

PLACEHOLDER = re.compile(r"\[[A-Za-z]\w*\]")

# The word right before a placeholder, and the article at the end of a text.
_LAST_WORD = re.compile(r"(?P<word>[^\W_](?:[\w'’-]*[\w'’])?)(?P<gap>\s+)\Z")
_LAST_ARTICLE = re.compile(r"(?<![\w'’-])an?(?=\s+\Z)", re.IGNORECASE)
_OWN_DETERMINER = re.compile(r"(?:an?|the|my|your|his|her|its|our|their|one|some|this|that)\s", re.IGNORECASE)

# After these words a noun phrase starts, so a bare placeholder needs its article; any other word is taken as part of
# the noun phrase: a determiner ("the", "my", "two", "dog's") or an adjective ("fluffy").
_NOUN_PHRASE_STARTS_AFTER = frozenset(
    """
    about above across after against along alongside amid among and around as at atop before behind below beneath beside
    besides between beyond but by containing depicting despite down during except featuring for from in including inside
    into like minus near next nor of off on onto opposite or out outside over past per plus resembling riding round
    showing since than then through throughout to toward towards under underneath unlike until up upon versus via vs
    with within without yet
    am are be been being became become becomes is was were has have had having do does did
    carries carry carrying chases chase chasing contains contain depicts depict draw draws drawing drawn eats eat eating
    feed feeding feeds features feature followed follows following has hold holding holds hug hugging hugs include
    includes inspired kiss kissing kisses look looks looking made make makes making meet meets meeting paint
    paints play plays playing pull pulling pulls push pushing pushes read reading reads resemble resembles ride rides
    see sees seeing show shows shown use uses using watch watches watching wear wearing wears
    """.split()
)


def placeholders(prompt: str) -> list[str]:
    """The placeholders of a prompt, in order and with repeats: "a [V1] and a [V2]" gives ["[V1]", "[V2]"]."""
    return PLACEHOLDER.findall(prompt)


def token_words(token: str, vectors: int) -> list[str]:
    """The words of a token with several vectors, by the convention of diffusers: name, name_1, name_2, ..."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def fill(prompt: str, words: Mapping[str, str | Sequence[str]]) -> str:
    """The prompt with each placeholder replaced by its word, or by its words separated by spaces."""

    def word(match: re.Match) -> str:
        value = words[match.group()]
        return value if isinstance(value, str) else " ".join(value)

    return PLACEHOLDER.sub(word, prompt)


def clean_prompt(prompt: str, subjects: Sequence[Subject]) -> str:
    """y_c: every placeholder replaced by its subject's class noun, with the article English wants there.

    A bare "[V]" becomes "an owl"; after a/an it becomes the noun, and the article is corrected ("a [V]" to "an owl");
    after the, my, a number, a possessive or an adjective it becomes the bare noun. Class nouns that take no article
    ("glasses", "clothing") get none. A subject's class_phrase is put in as it stands; an article before it is
    corrected, or dropped when the phrase brings its own.
    """
    by_placeholder = {subject.placeholder: subject for subject in subjects}
    text, end = "", 0
    for match in PLACEHOLDER.finditer(prompt):
        text = _insert(text + prompt[end : match.start()], by_placeholder[match.group()])
        end = match.end()
    return text + prompt[end:]


def _insert(before: str, subject: Subject) -> str:
    phrase = subject.class_phrase or subject.class_noun
    article = _LAST_ARTICLE.search(before)
    if article:
        if subject.class_phrase and _OWN_DETERMINER.match(phrase):
            return before[: article.start()] + phrase
        right = _like(indefinite_article(phrase), article.group())
        return before[: article.start()] + right + before[article.end() :] + phrase
    if subject.class_phrase or not _is_bare(before) or not takes_article(phrase):
        return before + phrase
    return f"{before}{indefinite_article(phrase)} {phrase}"


def _like(article: str, written: str) -> str:
    return article.capitalize() if written[0].isupper() else article


def _is_bare(before: str) -> bool:
    if before.endswith("-"):
        return before.endswith(("--", " -"))
    last = _LAST_WORD.search(before)
    if last:
        return last["word"].lower() in _NOUN_PHRASE_STARTS_AFTER
    # "the dogs' [V]": an apostrophe that closes a possessive.
    return not re.search(r"\w['’]\s+\Z", before)


def check(cfg: TrainConfig) -> None:
    """Whether the prompts of a resolved config name its subjects, and nothing else. Raises ConfigError.

    Placeholders of subjects are distinct; `prompt` names each of them once; a subject's own prompt names that subject
    once; `clean_prompt`, class phrases and the negative prompt name none.
    """
    known = [subject.placeholder for subject in cfg.subjects]
    for name in known:
        if known.count(name) > 1:
            raise ConfigError(f"subjects: placeholder {name!r} is defined repeatedly; allowed: one subject each")
    _check_names("prompt", cfg.prompt, known)
    for i, subject in enumerate(cfg.subjects):
        where = "subject_prompt" if known == ["[V]"] else f"subjects[{i}].prompt"
        _check_names(where, subject.prompt, [subject.placeholder])
        _check_names(f"subjects[{i}].class_phrase", subject.class_phrase or "", [])
        _check_names(f"subjects[{i}].class_noun", subject.class_noun, [])
    _check_names("clean_prompt", cfg.clean_prompt or "", [])
    _check_names("negative_prompt", cfg.negative_prompt, [])


def _check_names(field: str, text: str, wanted: Sequence[str]) -> None:
    found = placeholders(text)
    allowed = f"it must name {', '.join(wanted)}, once each" if wanted else "no placeholder is allowed here"
    for name in found:
        if name not in wanted:
            near = difflib.get_close_matches(name, wanted, n=1, cutoff=0.0)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{field}: unknown placeholder {name} in {text!r}{hint}; {allowed}")
        if found.count(name) > 1:
            raise ConfigError(f"{field}: placeholder {name} is repeated in {text!r}; {allowed}")
    for name in wanted:
        if name not in found:
            raise ConfigError(f"{field}: no placeholder {name} in {text!r}; {allowed}")
    if set("[]") & set(PLACEHOLDER.sub("", text)):
        raise ConfigError(f"{field}: stray square bracket in {text!r}; brackets are for placeholders such as [V] only")
