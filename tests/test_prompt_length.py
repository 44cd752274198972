"""Prompts longer than a model draws well from: emoji-64 keeps a picture's parts in the last tokens of its padding."""

import json
import warnings

import pytest
import tiny
import torch
from transformers import CLIPTokenizer

from palp_fast.conditioning import tokenize
from palp_fast.config import NFSD_NEGATIVE_PROMPT
from palp_fast.generate import generate
from palp_fast.models import MODELS, load_tokenizers
from palp_fast.prepare import prepare
from palp_fast.zoo.language import PARTS

LONG = "a [V]" + " and a cat" * 14  # of emoji-64's tokens 4 and 3 times 14, the placeholder's own among them
MOST = 8


@pytest.fixture
def model(tmp_path):
    """A tiny model whose tokenizer says that it draws well from 8 of its 16 tokens."""
    folder = tiny.model_folder(tmp_path / "model")
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt_tokens": MOST}))
    return folder


def warned(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        run()
    return [str(warning.message) for warning in caught if "draws well" in str(warning.message)]


def test_emoji_64_says_how_many_tokens_it_draws_well_from(tmp_path):
    (tokenizer,) = load_tokenizers("emoji-64")
    assert tokenizer.init_kwargs["prompt_tokens"] == tokenizer.model_max_length - PARTS == 32
    tokenizer.save_pretrained(tmp_path)
    kept = CLIPTokenizer.from_pretrained(tmp_path)
    assert kept.init_kwargs["prompt_tokens"] == 32 and kept("a cat") == tokenizer("a cat")


def test_training_warns_once_of_each_long_prompt(tmp_path):
    fields = {"prompt": LONG, "clean_prompt": "a sketch of a cat", "memory": "fast"}
    config = tiny.config(MODELS["emoji-64"], tmp_path / "run", **fields)
    (message,) = warned(lambda: [prepare(config) for _ in range(2)])
    assert message.startswith("prompt: 'a ") and message.endswith("tokens with start and end; this model draws well "
                                                                  "from at most 32")
    assert f" {len(load_tokenizers('emoji-64')[0](LONG.replace('[V]', 'cat')).input_ids)} tokens" in message
    assert not warned(lambda: prepare(config.replace(prompt="a sketch of [V]")))


def test_other_models_read_all_that_fits(tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    config = tiny.config(folder, tmp_path / "run", prompt="a [V]" + " and a cat" * 2, memory="fast")
    assert not warned(lambda: prepare(config))


def test_drawing_warns_too(model):
    draw = {"n": 1, "steps": 1, "device": "cpu"}
    assert not warned(lambda: generate(model, "a photo of a cat", **draw))
    (message,) = warned(lambda: generate(model, "a photo of a cat on a blue background", **draw))
    assert message.startswith("prompt: 'a photo of a cat on a blue background' has 11 tokens")
    (message,) = warned(lambda: generate(model, "a cat", negative_prompt="red " * 9, **draw))
    assert message.startswith("negative_prompt: ")


def test_the_negative_prompt_that_nobody_typed_is_cut(model, tmp_path):
    config = tiny.config(model, tmp_path / "run", method="nfsd", memory="fast")
    shown = []
    assert not warned(lambda: shown.extend(prepare(config).token_ids["negative"]))
    tokenizer = load_tokenizers(model)[0]
    (padded,) = tokenize([tokenizer], [NFSD_NEGATIVE_PROMPT])
    assert padded.shape == (1, 16) and padded.dtype == torch.int64
    assert padded[0, :MOST].tolist() == shown[0] and shown[0][-1] == tokenizer.eos_token_id
    assert set(padded[0, MOST:].tolist()) == {tokenizer.pad_token_id}
