"""evaluate: CLIP scores against a computation by hand on a tiny random CLIP model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.image_utils import PILImageResampling

from palp_fast import ConfigError, DataError, evaluate
from palp_fast.evaluate import Encoder, preprocess

SIDE = 24
PREPROCESSING = {
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "image_processor_type": "CLIPImageProcessor",
}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=20).save_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {**layers, **ends, "vocab_size": len(words), "max_position_embeddings": 20}
    vision = {**layers, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


def picture(seed, size=(40, 30)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def by_hand(folder, pictures, prompt):
    """Image and text vectors through CLIPModel's own forward pass, one picture at a time."""
    model = CLIPModel.from_pretrained(folder).eval()
    ids = CLIPTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    vectors = []
    for image in pictures:
        scaled = image.resize((SIDE * image.width // image.height, SIDE), Image.Resampling.BICUBIC)
        left = (scaled.width - SIDE) // 2
        array = np.asarray(scaled, dtype=np.float64)[:, left : left + SIDE] / 255
        array = (array - PREPROCESSING["image_mean"]) / PREPROCESSING["image_std"]
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=torch.tensor(array.transpose(2, 0, 1)[None]).float())
        vectors.append(out.image_embeds[0])
    return torch.stack(vectors).double(), out.text_embeds[0].double()


def test_scores_equal_a_computation_by_hand(encoder_folder):
    images, photos = [picture(i) for i in range(3)], [picture(i) for i in range(10, 12)]
    scores = evaluate(images, prompt="a sketch of an owl", references=photos, encoder=encoder_folder, batch_size=2)
    image_vectors, text_vector = by_hand(encoder_folder, images, "a sketch of an owl")
    photo_vectors, _ = by_hand(encoder_folder, photos, "a")
    text = image_vectors @ text_vector
    alike = (image_vectors @ photo_vectors.T).mean(dim=1)
    assert scores["text_alignment_per_image"] == pytest.approx(text.tolist(), abs=1e-5)
    assert scores["image_alignment_per_image"] == pytest.approx(alike.tolist(), abs=1e-5)
    assert scores["text_alignment"] == pytest.approx(text.mean().item(), abs=1e-5)
    assert scores["image_alignment"] == pytest.approx(alike.mean().item(), abs=1e-5)
    assert text.std() > 1e-3 and alike.std() > 1e-4, "all pictures score alike: nothing was tested"


def test_only_what_was_asked_for(encoder_folder):
    encoder = Encoder(encoder_folder)
    scores = evaluate([picture(0)], references=[picture(0)], encoder=encoder)
    assert scores.keys() == {"image_alignment", "image_alignment_per_image"}
    assert scores["image_alignment"] == pytest.approx(1.0, abs=1e-6)
    assert evaluate([picture(0)], "an owl", encoder=encoder).keys() == {"text_alignment", "text_alignment_per_image"}
    with pytest.raises(ConfigError, match="prompt and references"):
        evaluate([picture(0)], encoder=encoder)


def test_folders_paths_and_pictures_score_alike(encoder_folder, tmp_path):
    images = [picture(0), picture(1)]
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for image, file in zip(images, files):
        image.save(file)
    encoder = Encoder(encoder_folder)
    expected = evaluate(images, "an owl", references=images, encoder=encoder)
    assert evaluate(tmp_path, "an owl", references=files, encoder=encoder) == expected
    (tmp_path / "2.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="2.png"):
        evaluate(tmp_path, "an owl", encoder=encoder)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (24, 24), (97, 25)])
def test_preprocessing_is_that_of_transformers(size):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    options = {key: value for key, value in PREPROCESSING.items() if key != "image_processor_type"}
    processor = clip.CLIPImageProcessorPil(**{**options, "resample": PILImageResampling.BICUBIC})
    expected = torch.as_tensor(np.asarray(processor(picture(3, size))["pixel_values"][0]))
    torch.testing.assert_close(preprocess(picture(3, size), PREPROCESSING), expected.float(), rtol=0, atol=1e-5)


def test_preprocessing_reads_old_configs(encoder_folder):
    old = {**PREPROCESSING, "size": SIDE, "crop_size": SIDE}
    assert torch.equal(preprocess(picture(3), old), preprocess(picture(3), PREPROCESSING))
    assert Encoder(encoder_folder).preprocessing["image_mean"] == PREPROCESSING["image_mean"]


def test_prompts_longer_than_the_encoder_are_cut(encoder_folder):
    encoder = Encoder(encoder_folder)
    vectors = encoder.text(["a very very very very long prompt", "owl"])
    assert vectors.shape == (2, 12)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
