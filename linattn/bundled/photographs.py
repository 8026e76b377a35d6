"""Real photographs for the bundled Inf-DiT: those inside scikit-image and scikit-learn, always split the same way.

Nothing is downloaded. Two are held out, an animal and a building, and no other photograph shows either of them.
Training (``examples/train_tiny_infdit.py``) and scores read them here, so that the split between them exists once. So
does how a photograph is made small (:func:`small`) and how what is made of that is scored (:class:`Score`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SCALE = 4
BORDER = 4  # pixels along the edges that are not scored: there, every method makes up what lies beyond
TILE = 64  # pixels along the side of the tiles that scores are resampled by (about: they fill the photograph)

HELD_OUT = ("chelsea", "china")
#: name -> how often its patches are drawn, per pixel; those without colour are fewer and show textures.
TRAINING = {
    "astronaut": 3,
    "coffee": 3,
    "rocket": 3,
    "motorcycle": 3,  # the left one of the stereo pair; the right one shows the same
    "flower": 3,
    "camera": 1,
    "brick": 1,
    "grass": 1,
    "gravel": 1,
    "coins": 1,
}
#: Who made them, as the packages say.
SOURCES = {
    "chelsea": "Stefan van der Walt, CC0 (scikit-image)",
    "china": "danielbuechele, CC BY 2.0 (scikit-learn)",
    "astronaut": "NASA, public domain (scikit-image)",
    "coffee": "Rachel Michetti, CC0 (scikit-image)",
    "rocket": "SpaceX, public domain (scikit-image)",
    "motorcycle": "Scharstein et al., Middlebury 2014 stereo data (scikit-image)",
    "flower": "vultilion, CC BY 2.0 (scikit-learn)",
    "camera": "Lav Varshney, CC0 (scikit-image)",
    "brick": "CC0Textures, CC0 (scikit-image)",
    "grass": "linolafett, CC0 (scikit-image)",
    "gravel": "CC0Textures, CC0 (scikit-image)",
    "coins": "Brooklyn Museum, no known restrictions (scikit-image)",
}


@functools.cache
def load(name: str) -> np.ndarray:
    """A photograph as (h, w, 3) uint8, read-only; one without colour has three equal channels.

    Args:
        name: one of HELD_OUT or TRAINING.

    Raises:
        ValueError: there is no such photograph.
        ImportError: scikit-image or scikit-learn is not installed; the message names the extra that brings them.
    """
    if name not in SOURCES:
        raise ValueError(f"no photograph is called {name!r}; there are {', '.join(SOURCES)}")
    try:
        from skimage import data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ImportError(
            f"the photographs come with scikit-image and scikit-learn; {error.name} is missing: "
            "pip install 'linattn[demo]'"
        ) from error
    if "scikit-learn" in SOURCES[name]:
        pixels = load_sample_image(f"{name}.jpg")
    else:
        pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else np.array(pixels)
    pixels.flags.writeable = False
    return pixels


def original(name: str) -> Image.Image:
    """A photograph, without the last rows and columns that are no multiple of SCALE."""
    from PIL import Image

    pixels = load(name)
    height, width = (side // SCALE * SCALE for side in pixels.shape[:2])
    return Image.fromarray(pixels[:height, :width])


def small(photograph: Image.Image) -> Image.Image:
    """SCALE times smaller: Pillow's bicubic filter, which is antialiased, and 8 bits. What methods are given."""
    from PIL import Image

    return photograph.resize(tuple(side // SCALE for side in photograph.size), Image.Resampling.BICUBIC)


def enlarged(picture: Image.Image, filter: str) -> Image.Image:
    """SCALE times larger by a filter of Pillow, "bicubic" or "lanczos": what a model has to beat."""
    from PIL import Image

    size = tuple(side * SCALE for side in picture.size)
    return picture.resize(size, {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}[filter])


# -------------------------------------------------------------------------------------------------------------- scores


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Score:
    r"""How close pictures come to one photograph: PSNR and SSIM over red, green and blue, with intervals.

    PSNR = 10 log10(255^2 / mean squared error) of the whole photograph without its BORDER. SSIM: Wang et al. 2004, with
    Gaussian windows of deviation 1.5 as there, mean over pixels and channels. Both are means over tiles of about
    TILE x TILE pixels; intervals are percentiles of RESAMPLES bootstrap samples of the tiles, the same for every
    picture, so that differences of pictures are paired. They say how much another part of such a scene may differ, not
    how much another photograph does.

    Args:
        photograph: the original.
        pictures: name -> what a method made of `small(photograph)`, of the original's size.
        seed: of the resampling.

    Raises:
        ValueError: sizes differ.
    """

    RESAMPLES = 2000

    def __init__(self, photograph: Image.Image, pictures: Mapping[str, Image.Image], seed: int = 0):
        truth = np.asarray(photograph)
        self._errors, self._similarities = {}, {}
        for name, picture in pictures.items():
            if picture.size != photograph.size:
                raise ValueError(f"{name} is {picture.size}, the photograph {photograph.size} (width, height)")
            errors, similarities = (_tiles(values) for values in _maps(truth, np.asarray(picture)))
            self._errors[name], self._similarities[name] = errors, similarities
        self.pixels = _tiles(np.ones((truth.shape[0] - 2 * BORDER, truth.shape[1] - 2 * BORDER)))
        self.tiles = len(self.pixels)
        drawn = np.random.default_rng(seed).integers(self.tiles, size=(self.RESAMPLES, self.tiles))
        self._drawn = np.concatenate([np.arange(self.tiles)[None], drawn])  # the first is the photograph itself

    def psnr(self, name: str, minus: str | None = None) -> Interval:
        """In dB; of one picture, or by how much it is above that of another."""
        return self._interval(self._psnr(name) - (0 if minus is None else self._psnr(minus)))

    def ssim(self, name: str, minus: str | None = None) -> Interval:
        """At most 1; of one picture, or by how much it is above that of another."""
        return self._interval(self._ssim(name) - (0 if minus is None else self._ssim(minus)))

    def to_json(self, against: str = "bicubic") -> dict:
        """Every figure: name -> psnr and ssim, and by how much they are above those of `against`."""
        return {
            name: {
                "psnr": self.psnr(name),
                "ssim": self.ssim(name),
                f"psnr above {against}": self.psnr(name, against),
                f"ssim above {against}": self.ssim(name, against),
            }
            for name in self._errors
        }

    def _mean(self, sums: np.ndarray) -> np.ndarray:
        return sums[self._drawn].sum(1) / self.pixels[self._drawn].sum(1)

    def _psnr(self, name: str) -> np.ndarray:
        return 10 * np.log10(255**2 / np.maximum(self._mean(self._errors[name]), 1e-10))

    def _ssim(self, name: str) -> np.ndarray:
        return self._mean(self._similarities[name])

    @staticmethod
    def _interval(values: np.ndarray) -> Interval:
        return Interval(*(round(float(x), 5) for x in (values[0], *np.percentile(values[1:], (2.5, 97.5)))))


def _maps(truth: np.ndarray, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors and similarities (h, w) of the pixels, without the border."""
    from skimage.metrics import structural_similarity

    errors = ((truth.astype(np.float64) - picture) ** 2).mean(2)
    _, similarities = structural_similarity(
        truth,
        picture,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    inner = slice(BORDER, -BORDER)
    return errors[inner, inner], similarities.mean(2)[inner, inner]


def _tiles(values: np.ndarray) -> np.ndarray:
    """Sums over tiles that fill values (h, w), none smaller than TILE unless values are."""
    rows, columns = (np.arange(n := max(1, side // TILE)) * side // n for side in values.shape)
    return np.add.reduceat(np.add.reduceat(values, rows, 0), columns, 1).ravel()
