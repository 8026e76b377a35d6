r"""What happens to a picture before somebody wants it larger: blur, resizing, noise and JPEG, twice, at random.

    first     blur, resize by a random factor, noise, JPEG
    second    blur (or not), resize by a random factor, noise
    last      [resize to a quarter of the original's sides, sinc] and JPEG, in one order or the other

Every kernel k(u), u = (row, column) from its centre, is symmetric about the centre and sums to one. With the squared
distance m = u^T S^-1 u in units of the widths sigma (S = R diag(sigma_1^2, sigma_2^2) R^T, R a rotation):

    gaussian       exp(-m / 2)
    generalized    exp(-m^beta / 2)
    plateau        1 / (1 + m^beta)
    sinc           w J_1(w |u|) / (2 pi |u|)        the ideal low-pass with cut-off w in radians per pixel

Random numbers come from the caller's generator alone, so a sample is a function of its seed. Which probabilities and
ranges they are drawn by is said by the settings (`linattn.distill.upscaling`).

Source: Wang et al. 2021, Real-ESRGAN (arXiv 2107.10833), sections 3.2 to 3.4.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .pictures import Size

if TYPE_CHECKING:
    from ..upscaling import Blur, Degradation, Noise, Resize, Stage

#: The low resolution picture has 1 / FACTOR of the sides.
FACTOR = 4
#: How a picture is resized in between; without anti-aliasing, whose absence is part of the damage.
RESIZES = ("area", "bilinear", "bicubic")
#: A sinc of fewer taps than this cannot hold a low cut-off.
SHORT = 13
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601, as JPEG has it


def degrade(image: np.ndarray, rng: np.random.Generator, settings: Degradation) -> np.ndarray:
    """The low resolution version of a picture.

    Args:
        image: (H, W, 3) uint8.
        rng: the only source of randomness; not used by the method "bicubic".

    Returns:
        (ceil(H / 4), ceil(W / 4), 3) uint8.

    Raises:
        ValueError: image is of another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image must be (H, W, 3) uint8 with at least one pixel, got {image.shape} {image.dtype}")
    size = -(-image.shape[0] // FACTOR), -(-image.shape[1] // FACTOR)
    pixels = image.astype(np.float32) / 255
    if settings.method == "bicubic":
        return to_bytes(resized(pixels, size, "bicubic", antialias=True))
    first, second = settings.first, settings.second
    pixels = jpeg(_stage(pixels, image.shape[:2], rng, first), draw_quality(rng, first.jpeg))
    pixels = _stage(pixels, size, rng, second)
    quality, jpeg_last = draw_quality(rng, second.jpeg), rng.random() < 0.5
    if not jpeg_last:
        pixels = jpeg(pixels, quality)
    pixels = resized(pixels, size, draw_resize(rng))
    if rng.random() < settings.final_sinc:
        pixels = filtered(pixels, draw_sinc(rng, draw_size(rng, second.blur.sizes), lowest=math.pi / 3).values)
    if jpeg_last:
        pixels = jpeg(pixels, quality)
    return to_bytes(pixels)


def _stage(pixels: np.ndarray, size: Size, rng: np.random.Generator, settings: Stage) -> np.ndarray:
    """Blur, resize to a random multiple of `size`, noise; in [0, 1]."""
    if rng.random() < settings.blur.probability:
        pixels = filtered(pixels, draw_kernel(rng, settings.blur).values)
    scale = draw_scale(rng, settings.resize)
    target = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    pixels = resized(pixels, target, draw_resize(rng))
    return noisy(pixels, rng, settings.noise)


# --- kernels ---------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A filter: its kind ("sinc", or a field of `Shapes`), and (n, n) float64 that sum to one, n odd."""

    kind: str
    values: np.ndarray


def draw_size(rng: np.random.Generator, sizes: tuple[int, int]) -> int:
    """An odd number from sizes[0] to sizes[1], each equally often."""
    return int(rng.integers(sizes[0] // 2, sizes[1] // 2 + 1)) * 2 + 1


def draw_kernel(rng: np.random.Generator, settings: Blur) -> Kernel:
    """A blur: a sinc by its probability, else one of the shapes by theirs."""
    n = draw_size(rng, settings.sizes)
    if rng.random() < settings.sinc:
        return draw_sinc(rng, n)
    names = settings.shapes.shared()
    shares = np.array([getattr(settings.shapes, name) for name in names])
    kind = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    sigma = rng.uniform(*settings.sigma, size=2)
    angle = rng.uniform(-math.pi, math.pi)
    if not kind.endswith("_oblong"):
        sigma, angle = sigma[[0, 0]], 0.0
    family, beta = kind.removesuffix("_oblong"), 1.0
    if family != "gaussian":
        beta = draw_beta(rng, getattr(settings, f"{family}_beta"))
    return Kernel(kind, bell(n, tuple(sigma), angle, beta=beta, plateau=family == "plateau"))


def draw_beta(rng: np.random.Generator, between: tuple[float, float]) -> float:
    """Half of the draws from the part below 1, half from the part above: as many sharper as flatter than a Gaussian."""
    low, high = between
    middle = min(max(1.0, low), high)
    return rng.uniform(low, middle) if rng.random() < 0.5 else rng.uniform(middle, high)


def draw_sinc(rng: np.random.Generator, n: int, lowest: float | None = None) -> Kernel:
    """A sinc of n x n taps with a cut-off from `lowest` (None: pi / 5, of short ones pi / 3) to pi."""
    if lowest is None:
        lowest = math.pi / 3 if n < SHORT else math.pi / 5
    return Kernel("sinc", sinc(n, rng.uniform(lowest, math.pi)))


def bell(n: int, sigma: tuple[float, float], angle: float = 0.0, *, beta: float = 1.0, plateau: bool = False):
    """(n, n): exp(-m^beta / 2), or 1 / (1 + m^beta) (see the head of this file), over its sum.

    Args:
        sigma: widths along the two axes, in pixels; the first is the row's at angle 0.
        angle: in radians, from the rows to the columns.
    """
    rows, columns = _offsets(n)
    along = (rows * math.cos(angle) + columns * math.sin(angle)) / sigma[0]
    across = (columns * math.cos(angle) - rows * math.sin(angle)) / sigma[1]
    power = (along**2 + across**2) ** beta
    values = 1 / (1 + power) if plateau else np.exp(-power / 2)
    return values / values.sum()


def sinc(n: int, cutoff: float) -> np.ndarray:
    """(n, n): the two-dimensional ideal low-pass, cut off at `cutoff` radians per pixel, over its sum."""
    from scipy.special import j1

    radius = np.hypot(*_offsets(n))
    at_centre = radius == 0
    radius[at_centre] = 1.0
    values = cutoff * j1(cutoff * radius) / (2 * math.pi * radius)
    values[at_centre] = cutoff**2 / (4 * math.pi)  # J_1(x) ~ x / 2
    return values / values.sum()


def _offsets(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each tap, counted from the centre."""
    axis = np.arange(n, dtype=np.float64) - n // 2
    rows, columns = np.meshgrid(axis, axis, indexing="ij")
    return rows, columns


# --- what is done with them ------------------------------------------------------------------------------------------


def filtered(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """(H, W, C) filtered by (n, n), n odd; beyond the edge the picture is mirrored."""
    from scipy.signal import fftconvolve

    edge = kernel.shape[0] // 2
    padded = np.pad(pixels, ((edge, edge), (edge, edge), (0, 0)), mode="reflect")
    # A convolution is the correlation that is meant: every kernel here is symmetric about its centre.
    return fftconvolve(padded, kernel[:, :, None].astype(pixels.dtype), mode="valid", axes=(0, 1))


def draw_scale(rng: np.random.Generator, settings: Resize) -> float:
    """A factor above 1, below 1, or 1."""
    which, (low, high) = rng.random(), settings.scale
    if which < settings.enlarge:
        return rng.uniform(1.0, high)
    if which < settings.enlarge + settings.reduce:
        return rng.uniform(low, 1.0)
    return 1.0


def draw_resize(rng: np.random.Generator) -> str:
    return RESIZES[int(rng.integers(len(RESIZES)))]


def resized(pixels: np.ndarray, size: Size, mode: str, antialias: bool = False) -> np.ndarray:
    """(H, W, C) float32 to (height, width, C), by one of `RESIZES`; bicubic may leave [0, 1]."""
    options = {} if mode == "area" else {"align_corners": False, "antialias": antialias}
    channels_first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    return F.interpolate(channels_first, size, mode=mode, **options)[0].numpy().transpose(1, 2, 0)


def noisy(pixels: np.ndarray, rng: np.random.Generator, settings: Noise) -> np.ndarray:
    """Gaussian or Poisson noise, in colour or grey; the result is clamped to [0, 1]."""
    gaussian, grey = rng.random() < settings.gaussian, rng.random() < settings.grey
    if gaussian:
        noise = gaussian_noise(pixels, rng, rng.uniform(*settings.sigma) / 255, grey)
    else:
        noise = rng.uniform(*settings.poisson_scale) * poisson_noise(pixels, rng, grey)
    return np.clip(pixels + noise, 0, 1, dtype=np.float32)


def gaussian_noise(pixels: np.ndarray, rng: np.random.Generator, sigma: float, grey: bool) -> np.ndarray:
    """(H, W, C), or (H, W, 1) that is for all channels."""
    shape = (*pixels.shape[:2], 1 if grey else pixels.shape[2])
    return np.float32(sigma) * rng.standard_normal(shape, np.float32)


def poisson_noise(pixels: np.ndarray, rng: np.random.Generator, grey: bool) -> np.ndarray:
    """Shot noise: what a camera that counts v photons in white adds, Poisson(v x) / v - x.

    v is the number of levels in the picture, up to a power of two. Grey: of the picture's luminance, (H, W, 1).
    """
    levels = to_bytes(pixels @ _LUMA[:, None] if grey else pixels)
    photons = 2.0 ** math.ceil(math.log2(np.count_nonzero(np.bincount(levels.ravel(), minlength=256))))
    clean = levels / 255
    return (rng.poisson(clean * photons) / photons - clean).astype(np.float32)


def draw_quality(rng: np.random.Generator, between: tuple[int, int]) -> int:
    return int(rng.integers(between[0], between[1] + 1))


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """(H, W, 3), written as JPEG (colours at half the resolution) and read again; float32 in [0, 1]."""
    file = io.BytesIO()
    Image.fromarray(to_bytes(pixels)).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(file) as image:
        return np.asarray(image, dtype=np.float32) / 255


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8, rounded; what lies outside is clamped."""
    return (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
