"""Random masks for inpainting: which part of a picture is to be painted."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from .pictures import Size

#: Share of masks that cover the picture: the published inpainting models were trained with so many.
WHOLE = 0.25


def random_mask(size: Size, stream: np.random.Generator, *, whole: float = WHOLE) -> np.ndarray:
    """One to three rectangles, or one to four strokes of a broad brush; or all of the picture.

    Args:
        size: (height, width).
        whole: chance of a mask that covers the picture; rectangles and strokes share the rest equally.

    Returns:
        (1, H, W) float32, 1 where something is to be painted, never empty.
    """
    height, width = size
    kind = stream.random()
    if kind < whole:
        return np.ones((1, height, width), np.float32)
    picture = Image.new("L", (width, height))
    brush = ImageDraw.Draw(picture)
    if kind < (1 + whole) / 2:
        for _ in range(stream.integers(1, 4)):
            _rectangle(brush, size, stream)
    else:
        for _ in range(stream.integers(1, 5)):
            _stroke(brush, size, stream)
    return np.asarray(picture, np.float32)[None] / 255


def _rectangle(brush: ImageDraw.ImageDraw, size: Size, stream: np.random.Generator) -> None:
    """Sides of 15 to 60 percent of the picture's, all of it inside."""
    sides = [max(1, round(side * stream.uniform(0.15, 0.6))) for side in size]
    top, left = (int(stream.integers(0, side - own, endpoint=True)) for side, own in zip(size, sides, strict=True))
    brush.rectangle((left, top, left + sides[1] - 1, top + sides[0] - 1), fill=255)


def _stroke(brush: ImageDraw.ImageDraw, size: Size, stream: np.random.Generator) -> None:
    """Two to eight straight pieces with round ends and joints, that begin inside and turn by up to 90 degrees each."""
    shorter = min(size)
    radius = max(1.0, shorter * stream.uniform(0.025, 0.08))
    y, x = (side * stream.random() for side in size)
    direction = stream.uniform(0, 2 * math.pi)
    for _ in range(stream.integers(2, 9)):
        direction += stream.uniform(-math.pi / 2, math.pi / 2)
        length = shorter * stream.uniform(0.05, 0.25)
        to_y, to_x = y + length * math.sin(direction), x + length * math.cos(direction)
        brush.line((x, y, to_x, to_y), fill=255, width=round(2 * radius))
        for cy, cx in ((y, x), (to_y, to_x)):
            brush.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=255)
        y, x = to_y, to_x


def ellipse_mask(size: Size, stream: np.random.Generator) -> np.ndarray:
    """An ellipse about the middle, as a face lies in a portrait: axes of 40 to 70 percent of the sides.

    Returns:
        (1, H, W) float32, 1 inside.
    """
    (height, width), (tall, wide) = size, stream.uniform(0.2, 0.35, 2)
    down, right = stream.uniform(0.42, 0.58, 2)
    rows, columns = np.ogrid[:height, :width]
    distance = ((rows + 0.5) / height - down) ** 2 / tall**2 + ((columns + 0.5) / width - right) ** 2 / wide**2
    return (distance <= 1).astype(np.float32)[None]
