"""Pairs of pictures for upscaling: what the network is to make, and what it is to make it from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .degradation import degrade
from .pictures import Size, cut

if TYPE_CHECKING:
    from ..upscaling import Upscaling


def pair(
    image: Image.Image, target: Size, rng: np.random.Generator, settings: Upscaling
) -> tuple[np.ndarray, np.ndarray]:
    """A random cut of a picture, and its degradation.

    With probability `settings.full_resolution` a part of the picture as it is, mirrored with probability
    `settings.flip`; else the picture is reduced until it covers the target and cut where it sticks out.

    Args:
        image: RGB, at least as large as the target.
        target: (height, width) of the cut.
        rng: gives four numbers for the cut, whatever they are used for, then those of the degradation.

    Returns:
        (H, W, 3) and (ceil(H / 4), ceil(W / 4), 3), uint8.

    Raises:
        ValueError: the picture is smaller than the target.

    Source: the training script of Inf-DiT.
    """
    height, width = target
    if image.height < height or image.width < width:
        raise ValueError(f"image must be at least {height} x {width} pixels, got {image.height} x {image.width}")
    full, flip, down, right = rng.random(4)
    if full < settings.full_resolution:
        if flip < settings.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        top, left = int(down * (image.height - height + 1)), int(right * (image.width - width + 1))
        image = image.crop((left, top, left + width, top + height))
    else:
        image, _ = cut(image, target, resize="crop", interpolation="bicubic", shift=(down, right))
    pixels = np.array(image)
    return pixels, degrade(pixels, rng, settings.degradation)
