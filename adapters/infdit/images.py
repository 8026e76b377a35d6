"""Pictures for Inf-DiT: whatever a user has to tensors in [-1, 1], the network's two views of it, and back.

For an output of H x W pixels the network sees two views, whatever the scale: the picture resized to the output (lr_up,
clamped) and to a quarter of it (lr). Resizing is bicubic with antialiasing, as the authors' code does it with a current
torchvision. Both are then extended to whole blocks, on the right and below, and the result is cropped again.

What is added mirrors the picture, its last row and column included: so the two views stay views of one picture, and the
network is shown what photographs are made of, where a repeated last row would be streaks. Blocks see only what is above
them and to their left, so the added part changes nothing but the blocks at the edge that it is in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

#: Mean and deviation of CLIP's training pixels in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_LEVELS = {"uint8": 255, "uint16": 65535}


@dataclass
class Picture:
    """One picture.

    pixels: (3, h, w) float32 in [-1, 1].
    alpha: (1, h, w) float32 in [0, 1], or None.
    grey: whether it came as shades of grey.
    profile: the ICC profile that says which colours the numbers mean, or None.
    """

    pixels: Tensor
    alpha: Tensor | None = None
    grey: bool = False
    profile: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return tuple(self.pixels.shape[1:])


# ------------------------------------------------------------------------------------------------------------- reading


def read(image) -> list[Picture]:
    """The pictures that a user gives.

    PIL: any mode but "F". Turned upright by its EXIF orientation; 16-bit grey is scaled, not clipped; palettes are
    resolved; of an animation, the first frame. numpy: (h, w), (h, w, c) or (n, h, w, c) with c = 1, 2, 3 or 4 for grey,
    grey and alpha, RGB, RGBA; uint8, uint16, or floats in [0, 1]. Tensors: (3, h, w) or (n, 3, h, w), floats in [-1, 1]
    or uint8. Or a list of these.

    Raises:
        TypeError, ValueError: anything else; the message says what was expected.
    """
    if isinstance(image, list | tuple):
        if not image:
            raise ValueError("image is an empty list")
        return [picture for one in image for picture in read(one)]
    if isinstance(image, Image.Image):
        return [_from_pil(image)]
    if isinstance(image, np.ndarray):
        return _from_numpy(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    raise TypeError(
        f"image must be a PIL image, a numpy array, a tensor or a list of these, got {type(image).__name__}"
    )


def _from_pil(image: Image.Image) -> Picture:
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a malformed EXIF block says nothing about the orientation; the picture is still good
        image.load()
    if not all(image.size):
        raise ValueError(f"image is empty: {image.width} x {image.height} pixels")
    mode, profile = image.mode, image.info.get("icc_profile")
    if mode == "F":
        raise ValueError('image has mode "F", whose range is not known: pass a numpy array in [0, 1] instead')
    if mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)  # PIL itself would clip at 255
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"image has mode {mode!r} and must hold 16 bits, 0 to 65535, got {values.min()} to {values.max()}"
            )
        pixels, alpha = _scaled(values[..., None], 65535), None
    elif mode in _WITH_ALPHA or "transparency" in image.info:
        values = np.asarray(image.convert("RGBA"))
        pixels, alpha = _scaled(values[..., :3], 255), _scaled(values[..., 3:], 255)
    else:
        pixels, alpha = _scaled(np.asarray(image.convert("RGB")), 255), None
    # A profile of inks or other colours does not describe the RGB that PIL made of them.
    keeps = mode in _GREY or mode.startswith(("RGB", "P"))
    return Picture(_signed(pixels), alpha, mode in _GREY, profile if keeps else None)


def _from_numpy(values: np.ndarray) -> list[Picture]:
    shape, dtype = values.shape, values.dtype
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim == 3:
        values = values[None]
    if values.ndim != 4 or values.shape[-1] not in (1, 2, 3, 4) or not values.size:
        raise ValueError(f"image must be (h, w), (h, w, c) or (n, h, w, c) with c of 1 to 4 channels, got {shape}")
    if dtype.name in _LEVELS:
        levels = _LEVELS[dtype.name]
    elif dtype.kind == "f":
        levels = 1
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"image of floats must be in [0, 1], got {values.min()} to {values.max()}")
    else:
        raise TypeError(f"image must be uint8, uint16 or floats, got {dtype}")
    pictures = []
    for one in values:
        colours = (one.shape[2] - 1) // 2 * 2 + 1
        alpha = _scaled(one[..., colours:], levels) if colours < one.shape[2] else None
        pictures.append(Picture(_signed(_scaled(one[..., :colours], levels)), alpha, colours == 1))
    return pictures


def _from_tensor(values: Tensor) -> list[Picture]:
    shape = tuple(values.shape)
    if values.ndim == 3:
        values = values[None]
    if values.ndim != 4 or values.shape[1] != 3 or not values.numel():
        raise ValueError(f"image must be (3, h, w) or (n, 3, h, w) as a tensor, got {shape}")
    values = values.detach().cpu()
    if values.dtype == torch.uint8:
        values = values.float() / 255 * 2 - 1
    elif not values.is_floating_point():
        raise TypeError(f"image must be floats or uint8 as a tensor, got {values.dtype}")
    elif not (values.min() >= -1 and values.max() <= 1):
        raise ValueError(f"image must be in [-1, 1] as a tensor, got {values.min().item()} to {values.max().item()}")
    return [Picture(one.float()) for one in values]


def _scaled(values: np.ndarray, levels: int) -> Tensor:
    """(h, w, c) of 0 ... levels to (c, h, w) in [0, 1]."""
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1) / levels


def _signed(pixels: Tensor) -> Tensor:
    """(1 or 3, h, w) in [0, 1] to (3, h, w) in [-1, 1]."""
    return (pixels * 2 - 1).expand(3, -1, -1).contiguous()


# --------------------------------------------------------------------------------------------------------------- sizes


def output_size(size: tuple[int, int], scale: float, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) of the output for an input of `size`.

    Args:
        scale: at least 1; the sides are rounded to whole pixels. Not used where height or width is given.
        height, width: at least those of the input; where one is missing it follows from the other.

    Raises:
        TypeError, ValueError: other values.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {scale!r}")
    if not 1 <= scale < math.inf:
        raise ValueError(f"scale must be at least 1, got {scale}: this makes pictures larger")
    for name, wanted, given in (("height", height, size[0]), ("width", width, size[1])):
        if wanted is None:
            continue
        if isinstance(wanted, bool) or not isinstance(wanted, int):
            raise TypeError(f"{name} must be a whole number of pixels, got {wanted!r}")
        if wanted < given:
            raise ValueError(f"{name} must be at least that of the image, {given}, got {wanted}: this makes it larger")
    if height is None and width is None:
        return round(size[0] * scale), round(size[1] * scale)
    if height is None:
        height = round(size[0] * width / size[1])
    if width is None:
        width = round(size[1] * height / size[0])
    return height, width


def padded(size: tuple[int, int], block: int) -> tuple[int, int]:
    """The sides rounded up to whole blocks."""
    return tuple(-(-side // block) * block for side in size)


# ------------------------------------------------------------------------------------------------------ the two views


class Views(NamedTuple):
    """What the network sees of one picture.

    lr: (1, 3, H / sr_scale, W / sr_scale), H and W in whole blocks.
    lr_up: (1, 3, H, W), in [-1, 1].
    lr_picture: the part of lr that shows the picture.
    """

    lr: Tensor
    lr_up: Tensor
    lr_picture: Tensor


def views(pixels: Tensor, size: tuple[int, int], block: int, sr_scale: int = 4) -> Views:
    """Both views of pixels (3, h, w) for an output of `size` = (height, width).

    Args:
        block: side of a block of the output in pixels, a multiple of sr_scale.
        sr_scale: output pixels to a pixel of lr, along a side.
    """
    pixels = pixels[None].float()
    height, width = padded(size, block)
    lr = reduced(pixels, size, sr_scale)
    lr_up = resize(pixels, size).clamp(-1, 1)
    return Views(mirrored(lr, height // sr_scale, width // sr_scale), mirrored(lr_up, height, width), lr)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing, x (n, c, h, w) to size. Not clamped: bicubic overshoots."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bicubic", antialias=True)


def reduced(x: Tensor, size: tuple[int, int], sr_scale: int) -> Tensor:
    """x (n, c, h, w), resized to size / sr_scale, rounded up.

    Each pixel lies exactly over the sr_scale x sr_scale pixels of the output that it stands for, also where the size is
    no multiple of sr_scale. The last row then reaches beyond the picture, which goes on there with its last row.
    """
    wanted = padded(size, sr_scale)
    target = tuple(side // sr_scale for side in wanted)
    if wanted == tuple(size):
        return resize(x, target)
    factors = [side / sr_scale / given for side, given in zip(size, x.shape[2:], strict=True)]
    # The filter reaches two pixels of the coarser of both grids to either side.
    beyond = [
        math.ceil(n / f + 2 * max(1, 1 / f)) + 1 - given
        for n, f, given in zip(target, factors, x.shape[2:], strict=True)
    ]
    x = F.pad(x, (0, max(0, beyond[1]), 0, max(0, beyond[0])), mode="replicate")
    x = F.interpolate(x, scale_factor=factors, mode="bicubic", antialias=True)
    return x[:, :, : target[0], : target[1]]


def mirrored(x: Tensor, height: int, width: int) -> Tensor:
    """x (n, c, h, w) extended below and to the right to height x width by its mirror image, as often as it takes."""
    for dim, side in ((2, height), (3, width)):
        given = x.shape[dim]
        if side > given:
            place = torch.arange(side, device=x.device) % (2 * given)
            x = x.index_select(dim, torch.where(place < given, place, 2 * given - 1 - place))
    return x


def clip_pixels(lr: Tensor, side: int = 224) -> Tensor:
    """lr (n, 3, h, w) in [-1, 1] as CLIP's image tower wants it, (n, 3, side, side).

    The shorter side is resized to `side`, the middle is cut out (of a panorama the ends are not seen), and the channels
    get CLIP's mean and deviation.
    """
    height, width = lr.shape[2:]
    short = min(height, width)
    resized = resize((lr.float() + 1) / 2, (side * height // short, side * width // short))
    top, left = (round((n - side) / 2) for n in resized.shape[2:])
    cut = resized[:, :, top : top + side, left : left + side]
    mean, std = (torch.tensor(x, device=lr.device).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (cut - mean) / std


# ------------------------------------------------------------------------------------------------------------- writing


def enlarged_alpha(picture: Picture, size: tuple[int, int]) -> Tensor | None:
    """The picture's alpha at the size of the output: resized like lr_up, since the network knows colours only."""
    return None if picture.alpha is None else resize(picture.alpha[None], size)[0].clamp(0, 1)


def to_bytes(pixels: Tensor, rounding: str = "nearest") -> np.ndarray:
    """(c, h, w) in [-1, 1] to (h, w, c) uint8; values outside are clipped.

    Args:
        rounding: "nearest"; "truncate" is what the authors' code does, and half a level darker on average.
    """
    out = np.empty((*pixels.shape[1:], len(pixels)), np.uint8)
    for rows in _slices(pixels.shape[1]):
        levels = ((pixels[:, rows].double() + 1) * 127.5).clamp(0, 255)
        levels = levels.round() if rounding == "nearest" else levels.floor()
        out[rows] = levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return out


def to_pil(pixels: Tensor, alpha: Tensor | None, picture: Picture, rounding: str = "nearest") -> Image.Image:
    """An image of the kind that the picture came as: L, LA, RGB or RGBA, 8 bits, with the same colour profile."""
    image = Image.fromarray(to_bytes(pixels, rounding))
    if picture.grey:
        image = image.convert("L")
    if alpha is not None:
        image.putalpha(Image.fromarray(to_bytes(alpha * 2 - 1)[..., 0]))
    if picture.profile is not None:
        image.info["icc_profile"] = picture.profile
    return image


def to_numpy(pixels: Tensor, alpha: Tensor | None) -> np.ndarray:
    """(h, w, 3) or, with alpha, (h, w, 4), float32 in [0, 1]."""
    values = pixels.float().add(1).div_(2).clamp_(0, 1).cpu()
    return torch.cat([values] if alpha is None else [values, alpha]).permute(1, 2, 0).contiguous().numpy()


def stacked(arrays: Sequence):
    """One array or tensor where all have the same shape, else a list."""
    if len({tuple(one.shape) for one in arrays}) > 1:
        return list(arrays)
    return torch.stack(list(arrays)) if isinstance(arrays[0], Tensor) else np.stack(arrays)


def _slices(rows: int, step: int = 256) -> Iterable[slice]:
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
