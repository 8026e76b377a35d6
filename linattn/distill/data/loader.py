"""Micro batches as a torch DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from .order import Draw, Order, pair_rng, sample_rng
from .pairs import pair
from .pictures import Size, place, prepare_image, to_tensor
from .sources import DataError, Source

if TYPE_CHECKING:
    from ..cache import Cache
    from ..recipe import Data


def latent_key(source: Source, index: int, target: Size, data: Data) -> str:
    """The key under which the latent of a picture at a size is cached.

    The entry holds the tensors "mean" and "std", (channels, height, width) each.
    """
    height, width = target
    return f"{source.key(index)}|{source.stamp(index)}|{height}x{width}|{data.resize}|{data.interpolation}"


def captions(source: Source, data: Data) -> Iterator[str]:
    """Every caption that a run can ask a text cache for, once: those of the source, and "" where some are dropped."""
    seen = set()
    if data.caption_drop > 0:
        seen.add("")
        yield ""
    for index in range(len(source)):
        caption = source.caption(index)
        if caption not in seen:
            seen.add(caption)
            yield caption


def loader(
    source: Source,
    order: Order,
    data: Data,
    *,
    first: int,
    count: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    text_cache: Cache | None = None,
    latent_cache: Cache | None = None,
) -> DataLoader:
    """The micro batches that one process takes from the run.

    Do not hand it to `Accelerator.prepare`, which would share it among the processes once more.

    Args:
        first, count: local micro steps first..first + count - 1; local step m of process `rank` is micro batch
            m * world + rank of the run.
        seed: of what is random in a sample: dropped captions, crops, flips.
        text_cache: holds an entry for every one of :func:`captions`, under the caption itself.
        latent_cache: holds an entry for each of :func:`latent_key`; then no picture is read.

    Returns:
        An iterable of dictionaries. B is the batch size; pairs are (height, width) or (top, left).
            number          (B,) int64, running number of the sample in the whole run
            pixels          (B, 3, H, W) float32 in [-1, 1]; without latent_cache
            latent_mean, latent_std   (B, c, h, w); with latent_cache
            caption         list of B texts, after dropping
            condition       what text_cache holds for them: name -> (B, ...); with text_cache
            original_size, crop, target_size   (B, 2) int64

    Raises:
        ValueError: rank outside 0..world - 1; negative first or count; latent_cache with random_crop or random_flip.
        DataError: while iterating, with the key of the sample.
    """
    if latent_cache is not None and (data.random_crop or data.random_flip):
        raise ValueError("loader: latent_cache needs data.random_crop and data.random_flip to be false")
    batches = _CaptionedBatches(source, order, data, seed, text_cache, latent_cache)
    return _load(batches, first=first, count=count, rank=rank, world=world)


def pair_loader(
    source: Source,
    order: Order,
    data: Data,
    *,
    first: int,
    count: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
) -> DataLoader:
    """Like :func:`loader`, but pairs for upscaling (see :func:`linattn.distill.data.pair`), without captions.

    Returns:
        An iterable of dictionaries.
            number   (B,) int64, running number of the sample in the whole run
            image    (B, 3, H, W) float32 in [-1, 1]
            lr_image (B, 3, H / 4, W / 4) float32 in [-1, 1]

    Raises:
        ValueError: rank outside 0..world - 1; negative first or count.
        DataError: while iterating, with the key of the sample.
    """
    return _load(_PairBatches(source, order, data, seed), first=first, count=count, rank=rank, world=world)


def _load(batches: _MicroBatches, *, first: int, count: int, rank: int, world: int) -> DataLoader:
    if not 0 <= rank < world or first < 0 or count < 0:
        raise ValueError(
            f"loader needs 0 <= rank < world, first >= 0 and count >= 0; got {rank=}, {world=}, {first=}, {count=}"
        )
    return DataLoader(
        batches,
        sampler=range(first * world + rank, (first + count) * world + rank, world),
        batch_size=None,  # an item is a micro batch
        collate_fn=_unchanged,
        num_workers=batches.data.workers,
        persistent_workers=batches.data.workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader draws a number at its start; not from the global state of the run
    )


def _unchanged(batch: dict) -> dict:
    return batch


class _MicroBatches(Dataset):
    """Micro batch k of the whole run under index k."""

    def __init__(self, source: Source, order: Order, data: Data, seed: int):
        self.source, self.order, self.data, self.seed = source, order, data, seed

    def __getitem__(self, k: int) -> dict:
        samples = []
        for draw in self.order.micro_batch(k):
            try:
                samples.append(self._sample(draw))
            except Exception as error:
                raise DataError(f"sample {self.source.key(draw.index)!r}: {error}") from error
        return self._collate(samples)

    def _sample(self, draw: Draw) -> dict:
        raise NotImplementedError

    def _collate(self, samples: list[dict]) -> dict:
        return {name: _stack(name, samples) for name in samples[0]}


class _PairBatches(_MicroBatches):
    def _sample(self, draw: Draw) -> dict:
        made = pair(self.source.image(draw.index), draw.target, pair_rng(self.seed, draw.number), self.data.upscaling)
        image, lr_image = (to_tensor(part) for part in made)
        return {"number": torch.tensor(draw.number), "image": image, "lr_image": lr_image}


class _CaptionedBatches(_MicroBatches):
    def __init__(
        self,
        source: Source,
        order: Order,
        data: Data,
        seed: int,
        text_cache: Cache | None,
        latent_cache: Cache | None,
    ):
        super().__init__(source, order, data, seed)
        self.text_cache, self.latent_cache = text_cache, latent_cache

    def _collate(self, samples: list[dict]) -> dict:
        batch: dict = {name: _stack(name, samples) for name in samples[0] if name not in ("caption", "condition")}
        batch["caption"] = [sample["caption"] for sample in samples]
        if self.text_cache is not None:
            names = samples[0]["condition"]
            batch["condition"] = {name: _stack(name, [sample["condition"] for sample in samples]) for name in names}
        return batch

    def _sample(self, draw: Draw) -> dict:
        data, source = self.data, self.source
        rng = sample_rng(self.seed, draw.number)
        # Drawn whether it can be dropped or not: the crop of a sample does not depend on it.
        dropped = rng.random() < data.caption_drop
        sample: dict = {"number": torch.tensor(draw.number)}
        if self.latent_cache is None:
            image = source.image(draw.index)
            size = (image.height, image.width)
            sample["pixels"], crop = prepare_image(
                image,
                draw.target,
                resize=data.resize,
                interpolation=data.interpolation,
                rng=rng,
                random_crop=data.random_crop,
                random_flip=data.random_flip,
            )
        else:
            size = source.size(draw.index)
            crop = place(size, draw.target, resize=data.resize).crop
            entry = _cached(self.latent_cache, latent_key(source, draw.index, draw.target, data), "latent")
            sample |= {f"latent_{name}": tensor for name, tensor in entry.items()}
        sample["original_size"] = torch.tensor(size)
        sample["crop"] = torch.tensor(crop)
        sample["target_size"] = torch.tensor(draw.target)
        sample["caption"] = "" if dropped else source.caption(draw.index)
        if self.text_cache is not None:
            sample["condition"] = _cached(self.text_cache, sample["caption"], "text")
        return sample


def _cached(cache: Cache, key: str, what: str) -> dict[str, torch.Tensor]:
    entry = cache.get(key)
    if entry is None:
        raise DataError(f"expected an entry {key!r} in the {what} cache {str(cache.folder)!r}, found none")
    return entry


def _stack(name: str, samples: list[dict]) -> torch.Tensor:
    shapes = {tuple(sample[name].shape) for sample in samples}
    if len(shapes) > 1:
        raise DataError(f"expected {name!r} of one shape in a micro batch, got {sorted(shapes)}")
    return torch.stack([sample[name] for sample in samples])
