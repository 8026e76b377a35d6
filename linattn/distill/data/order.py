"""Which samples make up a micro batch, and at what size: pure functions of the recipe and the position in the run.

Every random number of the data derives from (seed, epoch) for the order, and (seed, number of the sample) for what is
done to a sample. A run that is resumed, or spread over another number of processes, sees the same samples.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .pictures import Size
from .sources import DataError, Source

if TYPE_CHECKING:
    from ..recipe import Data

_EPOCHS_KEPT = 2  # a micro batch may reach from one epoch into the next


def buckets(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """The sizes that pictures of different aspect ratios are trained at.

    Multiples of `step`, with about resolution^2 pixels (never more than that plus one row or column of `step` pixels),
    neither side more than `max_aspect` times the other; the square is always among them. Every size comes with its
    transpose.

    Returns:
        (height, width), ascending.
    """
    square = step * max(1, round(resolution / step))
    found = {(square, square)}
    for side in range(step, int(resolution * max_aspect) + step, step):
        other = step * round(resolution**2 / side / step)
        if max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found)


def bucket_of(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest on a logarithmic scale; of equals the first in height."""
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - aspect), s))


def targets(source: Source, data: Data) -> Iterator[tuple[int, Size]]:
    """Every (index, target size) that a run draws from the source; each index once."""
    if data.resize != "buckets":
        yield from ((index, (data.resolution, data.resolution)) for index in range(len(source)))
        return
    sizes = buckets(data.resolution, data.bucket_step, data.max_aspect)
    yield from ((index, bucket_of(source.size(index), sizes)) for index in range(len(source)))


def sample_rng(seed: int, number: int) -> random.Random:
    """The random numbers of sample `number` of a run, whoever loads it."""
    return random.Random(_key(f"sample {seed} {number}"))


def pair_rng(seed: int, number: int) -> np.random.Generator:
    """The same as a generator of arrays: for what is done to a picture to make a pair for upscaling of it."""
    return np.random.Generator(np.random.Philox(key=_key(f"pair {seed} {number}")))


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def _permutation(length: int, *entropy: int) -> np.ndarray:
    # Not Generator.permutation: how it draws may change with numpy's version, the bits of PCG64 do not.
    return np.argsort(np.random.Generator(np.random.PCG64(list(entropy))).random(length), kind="stable")


class Draw(NamedTuple):
    """One sample of a run."""

    number: int  # running number in the whole run
    index: int  # in the source
    target: Size


class Order:
    """The samples of a run, in order.

    Without buckets, draw n is sample n mod N of epoch n // N, each epoch a permutation of all N samples: none is
    dropped where an epoch ends within a micro batch. With buckets all draws of a micro batch share one size: in each
    epoch every bucket is permuted and cut into micro batches, the last of which is filled up from the bucket's own
    beginning, and the micro batches of all buckets are permuted.

    Args:
        source_sizes: (height, width) of every picture; without buckets only their number matters.
        data: the `data` section of a recipe.
        batch_size: of a micro batch in one process.
    """

    def __init__(self, source_sizes: Sequence[Size], data: Data, batch_size: int, seed: int):
        if not len(source_sizes):
            raise DataError("Order needs at least one sample, got none")
        if batch_size < 1 or seed < 0:
            raise DataError(f"Order needs batch_size >= 1 and seed >= 0, got {batch_size=}, {seed=}")
        self.length, self.batch_size, self.seed = len(source_sizes), batch_size, seed
        self._epochs: OrderedDict[int, list | np.ndarray] = OrderedDict()
        self._square = (data.resolution, data.resolution)
        self._members: dict[Size, np.ndarray] | None = None
        if data.resize == "buckets":
            sizes = buckets(data.resolution, data.bucket_step, data.max_aspect)
            members: dict[Size, list[int]] = {}
            nearest: dict[Size, Size] = {}
            for index, size in enumerate(source_sizes):
                if size not in nearest:
                    nearest[size] = bucket_of(size, sizes)
                members.setdefault(nearest[size], []).append(index)
            self._members = {size: np.array(members[size]) for size in sorted(members)}

    @classmethod
    def of(cls, source: Source, data: Data, batch_size: int, seed: int) -> Order:
        """The order of a source; reads the sizes of the pictures only where buckets need them."""
        length = len(source)
        sizes = [source.size(index) for index in range(length)] if data.resize == "buckets" else range(length)
        return cls(sizes, data, batch_size, seed)

    @property
    def batches_per_epoch(self) -> float:
        """Micro batches of all processes in one epoch; not whole without buckets, where batches reach across epochs."""
        if self._members is None:
            return self.length / self.batch_size
        return sum(-(-len(indices) // self.batch_size) for indices in self._members.values())

    def micro_batch(self, k: int) -> list[Draw]:
        """The samples of micro batch k of the run, counted over all processes: process r of W takes k = m * W + r."""
        if k < 0:
            raise ValueError(f"micro_batch needs k >= 0, got {k=}")
        first = k * self.batch_size
        if self._members is None:
            numbers = range(first, first + self.batch_size)
            return [Draw(n, int(self._epoch(n // self.length)[n % self.length]), self._square) for n in numbers]
        epoch, place = divmod(k, self.batches_per_epoch)
        target, indices = self._epoch(epoch)[place]
        return [Draw(first + j, int(index), target) for j, index in enumerate(indices)]

    def _epoch(self, epoch: int) -> list | np.ndarray:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._shuffle(epoch)
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _shuffle(self, epoch: int) -> list | np.ndarray:
        """Indices of one epoch, or its (target, indices of a micro batch) in order."""
        if self._members is None:
            return _permutation(self.length, self.seed, epoch)
        batches = []
        for target, indices in self._members.items():
            shuffled = indices[_permutation(len(indices), self.seed, epoch, *target)]
            filled = np.resize(
                shuffled, -(-len(shuffled) // self.batch_size) * self.batch_size
            )  # repeats the beginning
            batches += [(target, batch) for batch in filled.reshape(-1, self.batch_size)]
        return [batches[place] for place in _permutation(len(batches), self.seed, epoch)]
