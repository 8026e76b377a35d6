"""The task of the bundled model: several handwritten digits on one canvas, in the order that the caption names.

A canvas is a grid of ``SIDE`` x ``SIDE`` cells. Its caption names one to ``LONGEST`` digits in reading order ("a seven,
a two and a four"), and does not say which cells they stand in nor which pen wrote them. So a cell cannot be drawn by
itself: whether it shows a digit, and which one, depends on how many cells before it are used. One pen (slant, size,
stroke weight, strength of the ink) writes a whole canvas. That is what makes self-attention matter; with one digit per
picture a model draws well without any (docs/linfusion.md).

A fifth of all orders of two and more digits is held out, chosen by a hash, so that scores are of orders that no model
has seen. Scans come from :mod:`linattn.bundled.digits`, which keeps its own held-out part.

Pictures are float tensors (n, 3, height, width) in 0..1, as diffusers pipelines return them for ``output_type="pt"``.
An order is a tuple of digits.
"""

import hashlib
import itertools
import json
import math
import pathlib
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import digits

Order = tuple[int, ...]

SIDE = 3  # cells along one side of a canvas
CELLS = SIDE * SIDE
CELL = 48  # pixels along one side of a cell
RESOLUTION = SIDE * CELL
LONGEST = 4  # digits on one canvas
HELD_OUT_SHARE = 0.2
CONTRAST = 7.0  # slope of the sigmoid that turns block averages into pen strokes
PALEST = 0.45  # strength of the palest ink; the darkest has 1

# Which cells n digits can stand in, in reading order.
LAYOUTS = {n: tuple(itertools.combinations(range(CELLS), n)) for n in range(1, LONGEST + 1)}


def held_out(order: Order) -> bool:
    """Whether training leaves this order out. Single digits are never left out: they are how words are learnt."""
    if len(order) < 2:
        return False
    word = hashlib.sha256(" ".join(map(str, order)).encode()).digest()
    return int.from_bytes(word[:4], "big") % 1000 < 1000 * HELD_OUT_SHARE


def draw_order(rng: random.Random, length: int, *, unseen: bool = False) -> Order:
    """A random order of ``length`` digits that training may see, or with ``unseen`` one that it may not.

    Raises:
        ValueError: ``length`` is not 1..LONGEST, or a single digit was asked to be unseen.
    """
    if not 1 <= length <= LONGEST:
        raise ValueError(f"length: expected 1 to {LONGEST} digits, got {length}")
    if unseen and length == 1:
        raise ValueError("length: every single digit is trained on, so none is unseen; expected 2 or more, got 1")
    while True:
        order = tuple(rng.randrange(10) for _ in range(length))
        if held_out(order) == unseen:
            return order


def caption(order: Order) -> str:
    """What a prompt says, for example "a seven, a two and an eight"."""
    named = [("an " if digit == 8 else "a ") + digits.WORDS[digit] for digit in order]
    return named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]


class Pens(NamedTuple):
    """What the digits of one canvas share, one entry per pen."""

    slant: torch.Tensor  # radians, to the right
    size: torch.Tensor  # share of the cell
    weight: torch.Tensor  # threshold of ink in a scan: the smaller, the bolder
    strength: torch.Tensor  # 1 is black


def make_pens(n: int, rng: torch.Generator) -> Pens:
    """``n`` different pens; their strengths are spread evenly, however few they are."""

    def uniform() -> torch.Tensor:
        return torch.rand(n, generator=rng)

    slant = (uniform() * 2 - 1) * math.radians(22)
    size, weight = 0.82 + 0.16 * uniform(), 0.38 + 0.2 * uniform()
    spread = ((torch.arange(n) + uniform()) / n)[torch.randperm(n, generator=rng)]
    return Pens(slant, size, weight, PALEST + (1 - PALEST) * spread)


def draw_cells(scans: np.ndarray, pens: Pens, which: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Write scans, each with its pen and a hand that is never quite steady.

    Args:
        scans: (n, 8, 8) ink in 0..1.
        pens: the pens.
        which: (n,) index of the pen of each scan.
        rng: for small turns, shifts and sizes of each digit.

    Returns:
        (n, 3, CELL, CELL) in 0..1, white paper.
    """
    n = len(scans)
    ink = torch.as_tensor(scans, dtype=torch.float32)[:, None]
    ink = F.interpolate(ink, size=(CELL, CELL), mode="bicubic", align_corners=False).clamp(0, 1)

    def wobble() -> torch.Tensor:
        return torch.rand(n, generator=rng) * 2 - 1

    angle, zoom = wobble() * math.radians(4), pens.size[which] * (1 + 0.03 * wobble())
    shear = torch.tan(pens.slant[which])
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    right, down = 0.05 * wobble(), 0.05 * wobble()
    rows = torch.stack([cos, shear * cos - sin, right, sin, cos + shear * sin, down], 1).view(-1, 2, 3)
    where = F.affine_grid(rows, [n, 1, CELL, CELL], align_corners=False)
    ink = F.grid_sample(ink, where, mode="bilinear", padding_mode="zeros", align_corners=False)
    # A sigmoid in the place of the blur that enlarging leaves, scaled so that no ink stays exactly white.
    weight = pens.weight[which].view(-1, 1, 1, 1)
    low, high = torch.sigmoid(-CONTRAST * weight), torch.sigmoid(CONTRAST * (1 - weight))
    ink = ((torch.sigmoid(CONTRAST * (ink - weight)) - low) / (high - low)).clamp(0, 1)
    return 1 - (ink * pens.strength[which].view(-1, 1, 1, 1)).repeat(1, 3, 1, 1)


def join(cells: torch.Tensor) -> torch.Tensor:
    """Cells in reading order to canvases: (n, CELLS, C, h, w) -> (n, C, SIDE h, SIDE w). Latents as well as pixels."""
    n, _, channels, height, width = cells.shape
    grid = cells.reshape(n, SIDE, SIDE, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(n, channels, SIDE * height, SIDE * width)


def cut(canvases: torch.Tensor) -> torch.Tensor:
    """The way back: (n, C, H, W) -> (n, CELLS, C, H // SIDE, W // SIDE); H and W are multiples of SIDE."""
    n, channels, height, width = canvases.shape
    grid = canvases.reshape(n, channels, SIDE, height // SIDE, SIDE, width // SIDE).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(n, CELLS, channels, height // SIDE, width // SIDE)


def draw(
    orders: Sequence[Order],
    scans: np.ndarray,
    labels: np.ndarray,
    pens: Pens,
    *,
    rng: torch.Generator,
    words: random.Random,
) -> torch.Tensor:
    """Canvases with these orders, written with random scans, in random cells, each with a random pen.

    Args:
        orders: the digits of each canvas.
        scans, labels: real digits to choose from, for example ``digits.load().train`` and its labels.
        pens: pens to choose from.
        rng, words: the random choices of tensors and of everything else.

    Returns:
        (len(orders), 3, RESOLUTION, RESOLUTION) in 0..1.

    Raises:
        ValueError: no scan shows a digit of the orders.
    """
    by_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
    if absent := {digit for order in orders for digit in order if not len(by_digit[digit])}:
        raise ValueError(f"scans: expected every digit of the orders among them, got none of {sorted(absent)}")
    cells = torch.ones(len(orders), CELLS, 3, CELL, CELL)
    canvas, cell, scan = [], [], []
    for i, order in enumerate(orders):
        for digit, place in zip(order, words.choice(LAYOUTS[len(order)]), strict=True):
            canvas.append(i)
            cell.append(place)
            scan.append(words.choice(by_digit[digit]))
    pen = torch.randint(len(pens.size), (len(orders),), generator=rng)
    if canvas:
        cells[canvas, cell] = draw_cells(scans[scan], pens, pen[canvas], rng)
    return join(cells)


def write_folder(folder: pathlib.Path, count: int, *, seed: int = 0, train_scans: int | None = None) -> None:
    """Write ``count`` canvases of training scans and orders as a folder of captioned pictures.

    That is what `linattn distill` reads: 0000.png, 0001.png, ... and metadata.jsonl.

    Args:
        folder: made if it does not exist.
        count: how many.
        seed: the same seed writes the same pictures.
        train_scans: take only so many scans [all].
    """
    from PIL import Image

    rng, words = torch.Generator().manual_seed(seed), random.Random(seed)
    split, pens = digits.load(), make_pens(64, rng)
    scans, labels = split.train[:train_scans], split.train_labels[:train_scans]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as captions:
        for number in range(count):
            order = draw_order(words, words.randint(1, LONGEST))
            canvas = draw([order], scans, labels, pens, rng=rng, words=words)[0]
            name = f"{number:04}.png"
            Image.fromarray((canvas * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / name)
            captions.write(json.dumps({"file_name": name, "text": caption(order)}) + "\n")
