"""Captions of the emoji-64 world."""

import random
import re

from palp_fast.zoo.world import COLOURS

STYLE_PHRASES = {
    "render": ("a glossy 3d render of {}", "a photo of {}"),
    "flat": ("a flat illustration of {}",),
    "line": ("a line drawing of {}",),
}
STYLE_TAGS = {"render": ("glossy 3d render", "photo"), "flat": ("flat illustration",), "line": ("line drawing",)}
COLOUR_PHRASES = ("on {article} {colour} background", "on {article} {colour} background", "on {colour}",
                  "against {article} {colour} background")
SCENE_PHRASES = {
    "day sky": ("in a day sky", "in a blue sky with clouds"),
    "night sky": ("in a night sky with stars", "in a night sky"),
    "grass": ("on grass",),
    "checkered floor": ("on a checkered floor",),
}
PLURAL_ENDINGS = ("ss", "us", "is")
ANYTHING = "something"  # what a caption calls a subject that it leaves open


def noun_phrase(name: str) -> str:
    """Name with its article: "an owl"; plurals ("grapes") and ANYTHING have none."""
    last = name.split()[-1]
    if name == ANYTHING or last.endswith("s") and not last.endswith(PLURAL_ENDINGS):
        return name
    return f"{article(name)} {name}"


def article(word: str) -> str:
    """"a" or "an" by the first letter."""
    return "an" if word[0].lower() in "aeiou" and not word.startswith(("uni", "one")) else "a"


def background_phrase(background: str, draw: random.Random) -> str:
    """Words for a background, in one of its wordings."""
    if background in COLOURS:
        return draw.choice(COLOUR_PHRASES).format(article=article(background), colour=background)
    return draw.choice(SCENE_PHRASES[background])


def caption(style: str, nouns: list[str], background: str, draw: random.Random) -> str:
    """A caption in varied wording; one in ten is empty, some omit the style or the background.

    nouns: one or two names or class nouns, or ANYTHING, left to right.
    """
    if draw.random() < 0.1:
        return ""
    things = " and ".join(noun_phrase(noun) for noun in nouns)
    place = background_phrase(background, draw) if draw.random() < 0.85 else ""
    form = draw.random()
    if form < 0.1:
        words = [things, place]
    elif form < 0.2:
        words = [things, place + "," if place else ",", draw.choice(STYLE_TAGS[style])]
    else:
        words = [draw.choice(STYLE_PHRASES[style]).format(things), place]
    return " ".join(word for word in words if word).replace(" ,", ",")


def other_style(words: str, draw: random.Random) -> str | None:
    """The caption of the same scene as a flat illustration, if it is a render's, and the other way round; else None."""
    for style, other in (("render", "flat"), ("flat", "render")):
        for tag in STYLE_TAGS[style]:
            found = re.search(rf"\b{tag}\b", words)
            if found:
                return words[:found.start()] + draw.choice(STYLE_TAGS[other]) + words[found.end():]
    return None


def left_open(words: str, nouns: list[str]) -> str | None:
    """The caption with ANYTHING in place of those of `nouns` that it names, and of their articles; None without any."""
    phrases = "|".join(re.escape(noun_phrase(noun)) for noun in sorted(nouns, key=len, reverse=True))
    opened = re.sub(rf"\b(?:{phrases})(?=$|,| (?:on|in|against|and)\b)", ANYTHING, words)
    return None if opened == words else opened
