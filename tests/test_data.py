"""Photos: finding them, and reading every usual kind of file as upright RGB over white."""

import numpy as np
import pytest
import torch
from PIL import Image

from palp_fast.data import image_digest, image_sources, load_image, pixels
from palp_fast.errors import ConfigError, DataError


def arrow():
    """3 x 2 pixels, all different, so that every rotation and mirroring shows."""
    values = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
    return Image.fromarray(values)


def test_folder_is_listed_by_name_without_hidden_and_other_files(tmp_path):
    for name in ("b.PNG", "a.png", ".hidden.png", "c.jpg"):
        arrow().save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in image_sources(tmp_path, "images")] == ["a.png", "b.PNG", "c.jpg"]
    assert image_sources(str(tmp_path / "a.png"), "images") == [tmp_path / "a.png"]


def test_lists_keep_their_order_and_take_pil_images(tmp_path):
    arrow().save(tmp_path / "a.png")
    image = arrow()
    assert image_sources([image, str(tmp_path / "a.png")], "images") == [image, tmp_path / "a.png"]
    assert image_sources(image, "images") == [image]


@pytest.mark.parametrize("images", [[], [3], 3, b"x", ["missing.png"], "missing"])
def test_wrong_selections_name_the_field(images):
    with pytest.raises(ConfigError, match="^subjects.0..images: "):
        image_sources(images, "subjects[0].images")


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="no image in folder"):
        image_sources(tmp_path, "images")
    with pytest.raises(ConfigError, match="is a folder inside a list"):
        image_sources([tmp_path], "images")


def upright(orientation, stored):
    """What a viewer shows for stored pixels [h, w, 3] with this EXIF orientation (TIFF 6.0, tag 274)."""
    turned = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}
    flipped = stored.transpose(1, 0, 2)
    turned |= {5: flipped, 6: flipped[:, ::-1], 7: flipped[::-1, ::-1], 8: flipped[::-1]}
    return turned[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    arrow().save(tmp_path / "a.png", exif=exif)
    shown = np.asarray(load_image(tmp_path / "a.png"))
    assert np.array_equal(shown, upright(orientation, np.asarray(arrow())))


def test_transparency_lies_over_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (200, 0, 0, alpha))
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB"
    colours = [loaded.getpixel((x, 0)) for x in range(3)]
    assert colours[0] == (255, 255, 255) and colours[2] == (200, 0, 0)
    assert np.abs(np.array(colours[1]) - (227, 127, 127)).max() <= 1


def palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (palette_with_transparency(), "png", [(255, 255, 255), (40, 50, 60)]),
        (palette_with_transparency(), "gif", [(255, 255, 255), (40, 50, 60)]),
        (Image.fromarray(np.array([[0, 200]], np.uint8)), "png", [(0, 0, 0), (200, 200, 200)]),
        (Image.fromarray(np.array([[0, 65535]], np.uint16)), "png", [(0, 0, 0), (255, 255, 255)]),
        (Image.fromarray(np.array([[257, 51400]], np.uint16)), "tif", [(1, 1, 1), (200, 200, 200)]),
        (Image.fromarray(np.array([[51400, 0]], np.int32)), "tif", [(200, 200, 200), (0, 0, 0)]),
        (Image.fromarray(np.array([[0.0, 1.0]], np.float32)), "tif", [(0, 0, 0), (255, 255, 255)]),
        (Image.fromarray(np.array([[False, True]])), "png", [(0, 0, 0), (255, 255, 255)]),
        (Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "tif", [(255, 0, 0), (255, 0, 0)]),
        (Image.new("LA", (2, 1), (100, 0)), "png", [(255, 255, 255), (255, 255, 255)]),
    ],
    ids=["palette", "gif", "grey", "grey16", "grey16 tiff", "int32", "float", "one bit", "cmyk", "grey alpha"],
)
def test_kinds_of_pixels(tmp_path, image, suffix, expected):
    file = tmp_path / f"a.{suffix}"
    image.save(file)
    loaded = load_image(file)
    assert loaded.mode == "RGB"
    assert [loaded.getpixel((x, 0)) for x in range(2)] == expected


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert load_image(tmp_path / f"a.{suffix}").getpixel((0, 0)) == (255, 0, 0)


def test_pil_images_are_read_alike_and_left_alone():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert load_image(image).getpixel((0, 0)) == (255, 255, 255)
    assert image.mode == "RGBA"


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_unreadable_files_are_named(tmp_path, content):
    if content == "truncated":
        Image.effect_noise((64, 64), 50).save(tmp_path / "full.png")
        content = (tmp_path / "full.png").read_bytes()[:1000]
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png") as caught:
        load_image(tmp_path / "broken.png")
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        image_digest(tmp_path / "gone.png")


def test_digest_follows_the_content(tmp_path):
    arrow().save(tmp_path / "a.png")
    arrow().save(tmp_path / "b.png")
    arrow().rotate(180).save(tmp_path / "c.png")
    a, b, c = (image_digest(tmp_path / f"{name}.png") for name in "abc")
    assert a == b != c
    assert image_digest(arrow()) == image_digest(arrow()) != image_digest(arrow().rotate(180))


def test_pixels_cover_then_crop_the_centre():
    values = np.zeros((4, 12, 3), np.uint8)
    values[:, 4:8] = 255
    cropped = pixels(Image.fromarray(values), 4, 4)
    assert cropped.shape == (3, 4, 4) and cropped.dtype == torch.float32
    assert torch.equal(cropped, torch.ones(3, 4, 4))


def test_pixels_scale_to_minus_one_and_one():
    black, white = (pixels(Image.new("RGB", (7, 5), colour), 8, 16) for colour in ("black", "white"))
    assert torch.equal(black, -torch.ones(3, 8, 16)) and torch.equal(white, torch.ones(3, 8, 16))
    grey = pixels(Image.new("RGB", (40, 40), (255, 127, 0)), 4, 4)
    assert torch.allclose(grey[:, 0, 0], torch.tensor([1.0, 127 / 127.5 - 1, -1.0]))
