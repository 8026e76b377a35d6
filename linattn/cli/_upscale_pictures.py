"""Pictures of `linattn upscale`: read, measured against what is asked for, and turned into files."""

from __future__ import annotations

import io
import math
from pathlib import Path

from linattn.cli._models import Problem, line
from linattn.cli._upscale_request import Request
from linattn.paths import instead_of

# The largest side that a format can hold, and how it is written. Few differences to the pixels: that is the point.
FORMATS = {
    "png": (2**31 - 1, {}),
    "jpg": (65500, {"quality": 95, "subsampling": 0}),
    "webp": (16383, {"quality": 95}),
}


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) from the head of a file; raises where it holds no picture."""
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        raise Problem(f"does not exist: {instead_of(path)}")
    if path.is_dir():
        raise Problem("is a folder")
    try:
        with Image.open(path) as picture:
            return picture.size
    except UnidentifiedImageError:
        raise Problem("is no picture that Pillow can read") from None


def open_picture(data: bytes):
    """A picture the right way up, from the bytes of its file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(data))
        # The further frames of an MPO are depth maps and the like: most cameras' JPEGs are one today.
        if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
            raise Problem(f"has {picture.n_frames} frames or pages: expected a single picture")
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise Problem(f"cannot be read: {line(error)}") from error
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a malformed EXIF block says nothing about the orientation; the picture is still good
        return picture


def target(request: Request, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the result of a picture of this size, about; the pipeline rounds what a scale gives."""
    if request.scale is not None:
        return round(size[0] * request.scale), round(size[1] * request.scale)
    width = request.width or round(size[0] * request.height / size[1])
    height = request.height or round(size[1] * request.width / size[0])
    return max(width, 1), max(height, 1)


def check_target(request: Request, size: tuple[int, int]) -> tuple[int, int]:
    width, height = target(request, size)
    if width < size[0] or height < size[1]:
        raise Problem(f"is larger ({size[0]}x{size[1]}) than the result would be ({width}x{height}): this enlarges")
    # More than rounding: a pixel of the small picture, or one in a hundred for shapes like 1366x768.
    stretch = (width / size[0]) / (height / size[1])
    if abs(math.log(stretch)) > max(0.01, 1 / min(size)):
        raise Problem(
            f"has another shape ({size[0]}x{size[1]}) than --size {width}x{height}, and would be distorted: --width or "
            "--height alone keeps the shape"
        )
    largest, _ = FORMATS[request.format]
    if max(width, height) > largest:
        raise Problem(f"a {request.format} has at most {largest} pixels a side, {width}x{height} is more: --format png")
    return width, height


def encode(picture, kind: str) -> bytes:
    """The file of a result, with its colour profile."""
    if kind == "jpg" and picture.mode not in ("RGB", "L"):
        raise Problem("has transparency, which a jpg cannot hold: --format png or webp")
    _, options = FORMATS[kind]
    stream = io.BytesIO()
    try:
        picture.save(stream, {"jpg": "jpeg"}.get(kind, kind), **options, icc_profile=picture.info.get("icc_profile"))
    except KeyError as error:
        raise Problem(f"cannot be written: Pillow was built without {error}") from error
    return stream.getvalue()
