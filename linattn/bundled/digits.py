"""The data of the bundled model: real handwritten digits as small pictures with captions.

The digits are the 1797 scans of scikit-learn's ``load_digits`` (8 x 8 blocks of 0..16 ink counts, the test part of the
UCI "Optical Recognition of Handwritten Digits" set, E. Alpaydin and C. Kaynak, 1998). Training
(``examples/train_tiny_sd.py``) and evaluation (``linattn.evaluate``) both read them here, so that the split between
them exists once.

Pictures are float tensors (n, 3, height, width) in 0..1, which is what a diffusers pipeline returns for
``output_type="pt"``; a grid is an array (n, 8, 8) of ink in 0..1.
"""

import functools
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

GRID = 8  # blocks along one side of a scan
RESOLUTION = 64  # pixels along one side of a rendered picture
HELD_OUT = 500  # scans that training never sees
CONTRAST = 7.0  # slope of the sigmoid that turns block averages into pen strokes

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}",
    "a handwritten digit {}",
    "handwritten {}",
    "the digit {}",
    "the number {}",
    "a drawing of the number {}",
    "{}",
)
# Words that may stand around the digit in a free caption. Without them the text encoder only knows the templates, and
# an unusual prompt draws an arbitrary digit.
_FILLERS = (
    "please show me an image of picture photo nice simple black ink on white paper written by hand in with pen "
    "digit number the a my big small sketch style draw beautiful and high quality"
)
FILLERS = tuple(_FILLERS.split())


class Split(NamedTuple):
    """Scans and their labels: ``train`` is what models may learn from, ``test`` is held out (500, stratified)."""

    train: np.ndarray  # (1297, 8, 8)
    test: np.ndarray  # (500, 8, 8)
    train_labels: np.ndarray
    test_labels: np.ndarray


@functools.cache
def load() -> Split:
    """The scans as ink in 0..1, always split in the same way.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra that brings it.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn, which is missing: pip install 'linattn[demo]'") from error

    data = load_digits()
    grids = data.images.astype(np.float32) / 16
    return Split(*train_test_split(grids, data.target, test_size=HELD_OUT, random_state=0, stratify=data.target))


def render(grids: np.ndarray, resolution: int = RESOLUTION) -> torch.Tensor:
    """Draw scans as dark ink on white paper: (n, 8, 8) -> (n, 3, resolution, resolution) in 0..1.

    Bicubic enlargement, then a sigmoid in the place of the blur that enlarging leaves, scaled so that no ink is
    exactly white and full ink exactly black.
    """
    ink = torch.as_tensor(grids, dtype=torch.float32)[:, None]
    ink = F.interpolate(ink, size=(resolution, resolution), mode="bicubic", align_corners=False).clamp(0, 1)
    low, high = torch.sigmoid(torch.tensor([-0.5, 0.5]) * CONTRAST)
    ink = (torch.sigmoid(CONTRAST * (ink - 0.5)) - low) / (high - low)
    return (1 - ink).clamp(0, 1).repeat(1, 3, 1, 1)


def to_grid(pictures: torch.Tensor) -> np.ndarray:
    """The way back, at the resolution of the scans: (n, 3, height, width) in 0..1 -> (n, 8, 8) ink in 0..1."""
    ink = 1 - pictures.float().clamp(0, 1).mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(ink, GRID)[:, 0].numpy()


def prompt(digit: int, template: str = TEMPLATES[0]) -> str:
    """The plain caption of a digit, for example "a handwritten three"."""
    return template.format(WORDS[digit])


def free_caption(digit: int, rng: random.Random) -> str:
    """A caption as someone might type it: the digit in words (80 %) or as a numeral, among up to eight other words."""

    def other() -> str:
        if rng.random() < 0.7:
            return rng.choice(FILLERS)
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 6)))

    name = WORDS[digit] if rng.random() < 0.8 else str(digit)
    before, after = ([other() for _ in range(rng.randint(0, 4))] for _ in range(2))
    return " ".join([*before, name, *after]) + rng.choice(["", ".", "!"])
