"""Photos in: find them, read them as upright RGB over white, turn them into tensors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from palp_fast.errors import ConfigError, DataError

# What phones write; Pillow reads it with the optional package pillow-heif.
_HEIC = (".heic", ".heif")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", *_HEIC)

Source = Path | Image.Image


def image_sources(images: object, field: str = "images") -> list[Source]:
    """The photos behind `images`: a folder, a file, a PIL image, or a list of files and PIL images.

    A folder is listed by name (not its subfolders); hidden files and other kinds of file are passed over. Nothing is
    opened. Raises ConfigError, naming `field`, for a missing folder or file and for an empty selection.
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, str | os.PathLike):
        path = Path(images)
        return _folder_images(path, field) if path.is_dir() else [_existing_file(path, field)]
    if not isinstance(images, Iterable) or isinstance(images, bytes):
        raise ConfigError(f"{field}: {images!r} is not a folder, an image file, a PIL image or a list of these files")
    sources = [_one_source(item, field) for item in images]
    if not sources:
        raise ConfigError(f"{field}: the list is empty; at least one image is needed")
    return sources


def _one_source(item: object, field: str) -> Source:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, str | os.PathLike):
        return _existing_file(Path(item), field)
    raise ConfigError(f"{field}: {item!r} in the list is neither an image file nor a PIL image")


def _existing_file(path: Path, field: str) -> Path:
    if path.is_file():
        return path
    what = "is a folder inside a list; list files, or give one folder" if path.is_dir() else "does not exist"
    raise ConfigError(f"{field}: {str(path)!r} {what}")


def _folder_images(folder: Path, field: str) -> list[Source]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"{field}: folder {str(folder)!r} cannot be listed ({error.strerror})") from error
    names = [name for name in names if not name.startswith(".") and name.lower().endswith(EXTENSIONS)]
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise ConfigError(f"{field}: no image in folder {str(folder)!r}; looked for {', '.join(EXTENSIONS)}")
    return list(files)


def load_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """A photo as an upright 8-bit RGB PIL image: EXIF orientation applied, transparency over white, first frame.

    Palette, grey, 16-bit, float and CMYK pictures are converted. Raises DataError naming the file.
    """
    if isinstance(source, Image.Image):
        return _guarded(lambda: _to_rgb(source), _name(source))
    return _guarded(lambda: _open_rgb(source), _name(source))


def image_digest(source: str | os.PathLike | Image.Image) -> str:
    """SHA-256 (hex) of a file's bytes, or of a PIL image's mode, size and upright pixels. Raises DataError."""
    if isinstance(source, Image.Image):
        image = _guarded(lambda: ImageOps.exif_transpose(source), _name(source))
        content = f"{image.mode} {image.size} {image.getpalette()} ".encode() + image.tobytes()
    else:
        content = _guarded(Path(source).read_bytes, _name(source))
    return hashlib.sha256(content).hexdigest()


def pixels(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """[3, height, width] fp32 in [-1, 1]: scaled (Lanczos) to cover the size, then cropped at the centre."""
    fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    array = np.asarray(fitted, dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _name(source: object) -> str:
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"PIL image of {source.width} x {source.height}"
    return str(source)


def _guarded(read, name: str):
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and errors of their own.
    try:
        return read()
    except Exception as error:
        hint = " (HEIC needs the package pillow-heif)" if name.lower().endswith(_HEIC) else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"image {name!r} cannot be read: {reason}{hint}") from error


def _open_rgb(path: str | os.PathLike) -> Image.Image:
    if str(path).lower().endswith(_HEIC):
        with contextlib.suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
    with Image.open(path) as image:
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _eight_bit(image)
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "PA"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 or 32 bits (Pillow would clip them at 255) and of floats in [0, 1]."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        full = 1.0 if values.max() <= 1.0 else 255.0
    else:
        full = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
    return Image.fromarray(np.clip(values * (255.0 / full), 0, 255).round().astype(np.uint8))
