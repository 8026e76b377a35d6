"""Pictures for training: where they lie, how they become tensors, and in which order they come.

    sources.py     a folder of images, webdataset tars, a `datasets` folder: all random access, all the same samples
    pictures.py    any image file to RGB, resize, crop, flip
    pairs.py       pairs for upscaling; what becomes of the small one: degradation.py
    order.py       which samples make up micro batch k: a pure function, so that a run can stop and resume anywhere
    loader.py      micro batches as a torch DataLoader

Nothing here keeps state between samples. Sample number n of a run depends on the recipe and n alone: not on the number
of processes or workers, nor on where the run was interrupted.
"""

from .degradation import degrade
from .loader import captions, latent_key, loader, pair_loader
from .order import Draw, Order, bucket_of, buckets, pair_rng, sample_rng, targets
from .pairs import pair
from .pictures import prepare_image
from .sources import DataError, Filtered, LargeEnough, Source, open_source

__all__ = [
    "DataError",
    "Draw",
    "Filtered",
    "LargeEnough",
    "Order",
    "Source",
    "bucket_of",
    "buckets",
    "captions",
    "degrade",
    "latent_key",
    "loader",
    "open_source",
    "pair",
    "pair_loader",
    "pair_rng",
    "prepare_image",
    "sample_rng",
    "targets",
]
