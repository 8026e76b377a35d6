"""A small data set to train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def captioned_noise(folder: Path, count: int, size: tuple[int, int] = (36, 40)) -> Path:
    """A folder with `count` pictures of (height, width), and with metadata.jsonl, whose captions are all different."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as captions:
        for i in range(count):
            pixels = numbers.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            captions.write(json.dumps({"file_name": f"{i}.png", "text": f"a handwritten {i}"}) + "\n")
    return folder
