"""The handwriting of the bundled models: the 1797 scans of scikit-learn's ``load_digits``, always split the same way.

They are 8 x 8 blocks of 0..16 ink counts, the test part of the UCI "Optical Recognition of Handwritten Digits" set (E.
Alpaydin and C. Kaynak, 1998). Training (``examples/train_tiny_sd.py``) and evaluation (``linattn.evaluate``) both read
them here, so that the split between them exists once; :mod:`linattn.bundled.canvases` writes with them.
"""

import functools
from typing import NamedTuple

import numpy as np

HELD_OUT = 500  # scans that training never sees

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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
