"""Placeholders, the article rule of y_c, token words."""

import pytest

from palp_fast.article import indefinite_article, takes_article
from palp_fast.config import Subject, TrainConfig
from palp_fast.errors import ConfigError
from palp_fast.prompts import check, clean_prompt, fill, placeholders, token_words


def subject(class_noun, class_phrase=None, placeholder="[V]"):
    return Subject("photos", class_noun, placeholder, class_phrase=class_phrase)


@pytest.mark.parametrize(
    ("prompt", "noun", "expected"),
    [
        # Bare: an article that fits.
        ("[V]", "owl", "an owl"),
        ("[V] in Paris", "cat", "a cat in Paris"),
        ("a sketch of [V]", "owl", "a sketch of an owl"),
        ("A sketch of [V] in Paris", "cat", "A sketch of a cat in Paris"),
        ("sketch, [V], blue sky", "owl", "sketch, an owl, blue sky"),
        ("a portrait ([V])", "owl", "a portrait (an owl)"),
        ('a sign that says "[V]"', "owl", 'a sign that says "an owl"'),
        ("a sketch of\n[V]", "owl", "a sketch of\nan owl"),
        ("photo - [V]", "owl", "photo - an owl"),
        ("a girl holding [V]", "owl", "a girl holding an owl"),
        ("this is [V]", "owl", "this is an owl"),
        ("two dogs and [V]", "owl", "two dogs and an owl"),
        ("a sketch of [V]'s hat", "owl", "a sketch of an owl's hat"),
        ("[V]-shaped cake", "owl", "an owl-shaped cake"),
        ("an oil painting inspired by [V] painting", "castle", "an oil painting inspired by a castle painting"),
        # After a or an: the article corrected, as it was written.
        ("a [V]", "owl", "an owl"),
        ("an [V]", "cat", "a cat"),
        ("a [V]", "cat", "a cat"),
        ("A [V] on grass", "owl", "An owl on grass"),
        ("An [V] on grass", "cat", "A cat on grass"),
        ("a photo of a  [V]", "owl", "a photo of an  owl"),
        ("a [V]-shaped cake", "owl", "an owl-shaped cake"),
        ("Banana [V]", "owl", "Banana owl"),
        ("vitamin-a [V]", "owl", "vitamin-a owl"),
        # After a determiner, a number, a possessive or an adjective: the bare noun.
        ("the [V]", "owl", "the owl"),
        ("The [V]", "owl", "The owl"),
        ("my [V] in Paris", "owl", "my owl in Paris"),
        ("a photo of his [V]", "owl", "a photo of his owl"),
        ("this [V]", "owl", "this owl"),
        ("every [V]", "owl", "every owl"),
        ("another [V]", "owl", "another owl"),
        ("one [V]", "owl", "one owl"),
        ("two [V]s", "owl", "two owls"),
        ("Anna's [V]", "owl", "Anna's owl"),
        ("Anna’s [V]", "owl", "Anna’s owl"),
        ("the dogs' [V]", "owl", "the dogs' owl"),
        ("a fluffy [V]", "owl", "a fluffy owl"),
        ("an angry [V]", "cat", "an angry cat"),
        ("a photo of fluffy [V]", "owl", "a photo of fluffy owl"),
        ("a sleeping [V]", "owl", "a sleeping owl"),
        ("a baby-[V]", "owl", "a baby-owl"),
        # Nouns that take no article when bare; the user's own article stays.
        ("a sketch of [V]", "glasses", "a sketch of glasses"),
        ("a sketch of [V]", "clothing", "a sketch of clothing"),
        ("a sketch of a [V]", "glasses", "a sketch of a glasses"),
        ("a sketch of [V]", "bus", "a sketch of a bus"),
        # By sound, not by letter.
        ("a sketch of [V]", "hourglass", "a sketch of an hourglass"),
        ("a sketch of an [V]", "university", "a sketch of a university"),
        ("no slot at all", "cat", "no slot at all"),
    ],
)
def test_article_rule(prompt, noun, expected):
    assert clean_prompt(prompt, [subject(noun)]) == expected


@pytest.mark.parametrize(
    ("prompt", "phrase", "expected"),
    [
        ("a sketch of [V]", "an orange cat", "a sketch of an orange cat"),
        ("a sketch of [V]", "orange fur", "a sketch of orange fur"),
        ("a [V]", "orange cat", "an orange cat"),
        ("a [V]", "an orange cat", "an orange cat"),
        ("a [V]", "the orange cat", "the orange cat"),
        ("my [V]", "orange cat", "my orange cat"),
    ],
)
def test_class_phrase_overrides(prompt, phrase, expected):
    assert clean_prompt(prompt, [subject("cat", phrase)]) == expected


def test_several_subjects():
    subjects = [subject("owl", placeholder="[V1]"), subject("cat", placeholder="[V2]")]
    prompt = "a 19th century portrait of [V2] and a [V1]"
    assert clean_prompt(prompt, subjects) == "a 19th century portrait of a cat and an owl"
    assert placeholders(prompt) == ["[V2]", "[V1]"]
    assert fill(prompt, {"[V1]": ["my_owl", "my_owl_1"], "[V2]": "my_cat"}) == (
        "a 19th century portrait of my_cat and a my_owl my_owl_1"
    )


def test_token_words():
    assert token_words("my_cat", 1) == ["my_cat"]
    assert token_words("my_cat", 3) == ["my_cat", "my_cat_1", "my_cat_2"]


def test_article_by_sound():
    vowels = "owl apple umbrella umami uncle udon hour hourglass heirloom honest X-ray SUV 8-ball 11-piece FBI éclair"
    consonants = "cat university unicorn uniform ukulele utensil European euro ewe one-eyed once UFO user 1 180 yak"
    assert [w for w in vowels.split() if indefinite_article(w) != "an"] == []
    assert [w for w in consonants.split() if indefinite_article(w) != "a"] == []
    assert indefinite_article("unidentified object") == indefinite_article("onerous task") == "an"


def test_nouns_without_article():
    with_article = "cat bus glass iris canvas lens octopus compass rhinoceros house fruit vegetable tool"
    without = "glasses scissors grapes blueberries clothing furniture children pandas"
    assert [w for w in with_article.split() if not takes_article(w)] == []
    assert [w for w in without.split() if takes_article(w)] == []
    assert takes_article("wooden horse") and not takes_article("musical notes")


ONE = [Subject("photos", "cat", "[V]", "a photo of [V]")]
TWO = [Subject("photos", "cat"), Subject("photos", "dog", "[V2]", "a photo of [V2]")]


def config(prompt, subjects=ONE, **kwargs):
    return TrainConfig(model="emoji-64", subjects=subjects, prompt=prompt, output_dir="out", **kwargs)


def test_check_accepts_prompts_that_name_every_subject_once():
    check(config("a sketch of [V]"))
    check(config("[V2] beside [V1]", TWO))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (config("a sketch of a cat"), r"prompt: no placeholder \[V\] in 'a sketch of a cat'"),
        (config("a sketch of [W]"), r"prompt: unknown placeholder \[W\].*did you mean \[V\]"),
        (config("a sketch of [v]"), r"prompt: unknown placeholder \[v\]"),
        (config("[V] and [V]"), r"prompt: placeholder \[V\] is repeated"),
        (config("[V1] alone", TWO), r"prompt: no placeholder \[V2\]"),
        (config("[V] [[blurry"), "prompt: stray square bracket"),
        (config("[V] [2]"), "prompt: stray square bracket"),
        (config("[V]", clean_prompt="a sketch of [V]"), r"clean_prompt: unknown placeholder \[V\].*no placeholder"),
        (config("[V]", negative_prompt="[V]"), "negative_prompt: unknown placeholder"),
        (config("[V]", [ONE[0].replace(prompt="a photo")]), "subject_prompt: no placeholder"),
        (config("[V]", [ONE[0].replace(class_noun="[V]")]), "class_noun: unknown placeholder"),
        (config("[V]", [ONE[0].replace(class_phrase="a [V]")]), "class_phrase: unknown placeholder"),
        (config("[V1] [V2]", [TWO[0], TWO[1].replace(prompt="[V1]")]), r"subjects\[1\].prompt: unknown .* \[V1\]"),
        (config("[V1]", [TWO[0], TWO[0]]), r"placeholder '\[V1\]' is defined repeatedly"),
    ],
)
def test_check_refuses(cfg, message):
    with pytest.raises(ConfigError, match=message):
        check(cfg)
