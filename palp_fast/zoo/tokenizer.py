"""The tokenizer of emoji-64: CLIP's byte-pair scheme with a vocabulary learned from the training captions."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer

from palp_fast.zoo.language import PARTS

MERGES, MAX_TOKENS = 1500, 96  # captions take 25 at most; what the padding is for: palp_fast/zoo/language.py
PROMPT_TOKENS = MAX_TOKENS - PARTS  # palp_fast.conditioning warns of longer prompts
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
START, END = "<|startoftext|>", "<|endoftext|>"


def trained(captions: list[str], folder: Path) -> CLIPTokenizer:
    """The tokenizer in `folder`, learned there from the captions if it is not yet."""
    if not (folder / "vocab.json").exists():
        return learn(captions, folder)
    return CLIPTokenizer.from_pretrained(folder, prompt_tokens=PROMPT_TOKENS)


def learn(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Learn the merges, write the tokenizer folder, and load it back as stock transformers does."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True), ByteLevel(add_prefix_space=False)])
    alphabet = sorted(ByteLevel.alphabet())
    learner.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=len(alphabet) * 2 + MERGES, end_of_word_suffix="</w>", initial_alphabet=alphabet,
        show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = alphabet + [char + "</w>" for char in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(
        folder, model_max_length=MAX_TOKENS, prompt_tokens=PROMPT_TOKENS, bos_token=START, eos_token=END, unk_token=END,
        pad_token=END)
    tokenizer.save_pretrained(folder)
    return tokenizer


def ids_of(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids int64 [captions, model_max_length], padded and cut as the pipeline does."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                     return_tensors="pt").input_ids
