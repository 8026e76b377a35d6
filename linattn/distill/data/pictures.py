"""Image files to tensors: decoding whatever comes, then resize, flip and crop to the size that training asks for."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

Size = tuple[int, int]  # (height, width), as everywhere in linattn

_ORIENTATION = 0x0112  # the EXIF tag
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


def decode(file: BinaryIO | Path) -> Image.Image:
    """An image file as RGB: upright by its EXIF orientation, transparency over white, 16 bits rounded to 8."""
    with Image.open(file) as image:
        image.load()
        return to_rgb(image)


def decode_size(file: BinaryIO | Path) -> Size:
    """(height, width) of what :func:`decode` returns, from the header of the file alone."""
    with Image.open(file) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _SWAPS_SIDES else (height, width)


def decode_size_from(start: bytes, whole) -> Size:
    """The size from the first bytes of a file, or from `whole()` where they do not hold the header."""
    try:
        return decode_size(io.BytesIO(start))
    except Exception:  # which error a decoder raises at the end of its data is its own affair
        return decode_size(io.BytesIO(whole()))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image of PIL as RGB, see :func:`decode`."""
    turn = _TURN.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL would clip these to 255 instead of scaling them.
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        # Not image.getexif(): that of PNG files decodes all pixels in search of a chunk behind them.
        return Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # a malformed EXIF block says nothing about the orientation; the picture is still good
        return 1


class Placement(NamedTuple):
    """What a picture is resized to, and the upper left corner of the crop in that; all in pixels."""

    resized: Size
    crop: tuple[int, int]  # (top, left)


def place(size: Size, target: Size, *, resize: str, shift: tuple[float, float] = (0.5, 0.5)) -> Placement:
    """How a picture of `size` is brought to `target`.

    `squash` resizes to the target whatever the aspect ratio. The others cover the target (the side that is shorter by
    comparison fits exactly, the other one sticks out) and cut out a part.

    Args:
        shift: where the cut lies, down and right: from 0 for the first to just under 1 for the last of the places,
            which are equally likely for uniform numbers; 0.5 is the centre.
    """
    if resize == "squash":
        return Placement(target, (0, 0))
    (height, width), (wanted_height, wanted_width) = size, target
    if wanted_height * width >= wanted_width * height:  # the height needs the larger factor
        resized = wanted_height, round(width * wanted_height / height)
    else:
        resized = round(height * wanted_width / width), wanted_width
    spare = resized[0] - wanted_height, resized[1] - wanted_width
    return Placement(resized, (int(shift[0] * (spare[0] + 1)), int(shift[1] * (spare[1] + 1))))


def prepare_image(
    image: Image.Image,
    target: Size,
    *,
    resize: str,
    interpolation: str = "bicubic",
    rng: random.Random | None = None,
    random_crop: bool = False,
    random_flip: bool = False,
) -> tuple[torch.Tensor, tuple[int, int]]:
    """A picture as the network wants it.

    Args:
        image: RGB.
        target: (height, width) of the result; smaller pictures are enlarged.
        resize: `squash` (aspect ratio ignored), `crop` or `buckets` (cover the target, then cut).
        rng: source of the random crop and flip; needed for these alone. It always gives three numbers, so that what
            one option draws does not depend on another.
        random_flip: mirrored left to right with probability 1/2, before the crop.

    Returns:
        pixels (3, height, width) float32 in [-1, 1], and the crop's (top, left) in pixels of the resized (and mirrored)
        picture.

    Raises:
        ValueError: random_crop or random_flip without rng.
    """
    if rng is None and (random_crop or random_flip):
        raise ValueError(f"prepare_image needs rng for what is random; got {rng=}, {random_crop=}, {random_flip=}")
    flip, down, right = (rng.random() for _ in range(3)) if rng is not None else (1.0, 0.5, 0.5)
    if random_flip and flip < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    shift = (down, right) if random_crop else (0.5, 0.5)
    image, crop = cut(image, target, resize=resize, interpolation=interpolation, shift=shift)
    return to_tensor(np.array(image)), crop


def cut(
    image: Image.Image, target: Size, *, resize: str, interpolation: str, shift: tuple[float, float]
) -> tuple[Image.Image, tuple[int, int]]:
    """A picture resized and cropped to `target` as :func:`place` says, and the crop's (top, left)."""
    height, width = image.height, image.width
    (tall, wide), (top, left) = place((height, width), target, resize=resize, shift=shift)
    # Only the part that is kept is computed; the filter sees the pixels around it. A panorama does not fill the memory.
    box = (
        left * width / wide,
        top * height / tall,
        (left + target[1]) * width / wide,
        (top + target[0]) * height / tall,
    )
    box = (box[0], box[1], min(box[2], width), min(box[3], height))  # division may round over the edge
    return image.resize((target[1], target[0]), _FILTERS[interpolation], box=box), (top, left)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 as (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1).float().contiguous().div_(127.5).sub_(1)
