"""Line charts as PNG: one panel for each measure, one line for each method, a legend below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
WIDTH, HEIGHT, MARGIN, LEFT, LINE = 420, 300, 24, 56, 16  # of a panel, in pixels

Curves = Mapping[str, Sequence[tuple[float, float]]]  # name -> points (x, y)


def chart(panels: Mapping[str, Curves], x_label: str) -> Image.Image:
    """Panels side by side, each with its own y range; a name has one colour in all of them."""
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    image = Image.new("RGB", (WIDTH * len(panels), HEIGHT + LINE * (len(names) + 1)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default_imagefont()
    for number, (title, curves) in enumerate(panels.items()):
        _panel(draw, font, number * WIDTH, title, x_label, curves, names)
    for row, name in enumerate(names):
        y = HEIGHT + row * LINE + LINE // 2
        draw.line([(LEFT, y), (LEFT + 30, y)], fill=_colour(names, name), width=3)
        draw.text((LEFT + 40, y - 5), name, fill="black", font=font)
    return image


def _colour(names: Sequence[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _panel(draw, font, left: int, title: str, x_label: str, curves: Curves, names: Sequence[str]) -> None:
    box = (left + LEFT, MARGIN, left + WIDTH - MARGIN, HEIGHT - 2 * MARGIN)
    points = [point for curve in curves.values() for point in curve]
    (x_low, x_high), (y_low, y_high) = (_range([point[axis] for point in points]) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        return (box[0] + (x - x_low) / (x_high - x_low) * (box[2] - box[0]),
                box[3] - (y - y_low) / (y_high - y_low) * (box[3] - box[1]))

    draw.rectangle(box, outline="#888888")
    draw.text((box[0], 6), title, fill="black", font=font)
    draw.text((box[0], box[3] + MARGIN), f"{x_label}: {x_low:g} to {x_high:g}", fill="black", font=font)
    for value in (y_low, (y_low + y_high) / 2, y_high):
        draw.text((left + 4, place(x_low, value)[1] - 5), f"{value:.3f}", fill="black", font=font)
    for name, curve in curves.items():
        line = [place(*point) for point in curve]
        draw.line(line, fill=_colour(names, name), width=2)
        for x, y in line:
            draw.ellipse([(x - 3, y - 3), (x + 3, y + 3)], fill=_colour(names, name))


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value; one value alone gets room on both sides."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
