"""Bar charts as PNG whose bytes depend on the figures alone: four colours, a bitmap font, nothing compressed."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, OURS, OTHER = range(4)
PALETTE = bytes([255, 255, 255, 40, 40, 40, 31, 119, 180, 190, 190, 190])
LABEL, BARS, FIGURE, LINE, EDGE = 330, 330, 150, 14, 8  # pixels: columns, height of a line, margin


def bars(title: str, groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> Image.Image:
    """Groups of (name, [(label, length, figure)]); lengths relative to the longest of a group; ours are coloured."""
    lines = 2 + sum(2 + len(entries) for _, entries in groups)
    image = Image.new("P", (4 * ((LABEL + BARS + FIGURE) // 4), 2 * EDGE + lines * LINE), PAPER)
    draw, font, y = ImageDraw.Draw(image), ImageFont.load_default_imagefont(), EDGE
    draw.fontmode = "1"
    draw.text((EDGE, y), title, fill=INK, font=font)
    for name, entries in groups:
        y += 2 * LINE
        draw.text((EDGE, y), name, fill=INK, font=font)
        longest = max(length for _, length, _ in entries)
        for label, length, figure in entries:
            y += LINE
            draw.text((3 * EDGE, y), label, fill=INK, font=font)
            end = LABEL + max(1, round(BARS * length / longest))
            draw.rectangle((LABEL, y + 2, end, y + LINE - 4), fill=OURS if label.startswith("palp_fast") else OTHER)
            draw.text((end + EDGE, y), figure, fill=INK, font=font)
    return image


def encode(image: Image.Image) -> bytes:
    """A PNG of 2 bits per pixel; stored, because compressors differ between versions of zlib."""
    width, height = image.size
    pixels, lines = image.tobytes(), []
    for start in range(0, width * height, width):
        line = pixels[start : start + width]
        packed = (line[i] << 6 | line[i + 1] << 4 | line[i + 2] << 2 | line[i + 3] for i in range(0, width, 4))
        lines.append(b"\0" + bytes(packed))
    header = struct.pack(">IIBBBBB", width, height, 2, 3, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", PALETTE), (b"IDAT", _stored(b"".join(lines))), (b"IEND", b"")]
    parts = ((len(data), name + data) for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", length) + part + struct.pack(">I", zlib.crc32(part)) for length, part in parts)


def _stored(data: bytes) -> bytes:
    """A zlib stream of stored blocks (RFC 1950, 1951)."""
    parts = [data[i : i + 65535] for i in range(0, len(data), 65535)]
    blocks = b"".join(
        struct.pack("<BHH", i == len(parts) - 1, len(part), len(part) ^ 0xFFFF) + part for i, part in enumerate(parts))
    return b"\x78\x01" + blocks + struct.pack(">I", zlib.adler32(data))
