"""What `data.cache` asks for: captions and pictures encoded once, before the first step, instead of in every one."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ..paths import expand
from .cache import Cache
from .data import Source, captions, latent_key, prepare_image, targets
from .pipelines import StableDiffusion
from .recipe import Recipe


def fill_caches(
    recipe: Recipe, models: StableDiffusion, source: Source, output: Path, accelerator
) -> tuple[Cache | None, Cache | None]:
    """The caches of text embeddings and of latents, complete; None for what the recipe does not ask for.

    Entries that exist are kept, also those of other runs in the same folder: they are found again only under the same
    weights (and size, and way of resizing). Each process encodes its share of what is missing.
    """
    data, wanted, pipeline = recipe.data, recipe.data.cache, models.pipeline
    folder = Path(expand(wanted.folder)) if wanted.folder else output / "cache"
    text = latents = None
    if wanted.text:
        encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
        length = {} if models.text_length is None else {"length": models.text_length}
        text = Cache(folder / "text", {"weights": digest(encoders), **length})
        for caption in _share(text, captions(source, data), "encoding captions", accelerator):
            encoded = models.encode_text([caption])
            text.put(caption, {name: value[0].cpu() for name, value in encoded.items()})
    if wanted.latents:
        latents = Cache(folder / "latents", {"weights": digest([pipeline.vae])})
        places = {latent_key(source, index, target, data): (index, target) for index, target in targets(source, data)}
        for key in _share(latents, places, "encoding pictures", accelerator):
            index, target = places[key]
            image = source.image(index)
            pixels, _ = prepare_image(image, target, resize=data.resize, interpolation=data.interpolation)
            mean, std = models.encode_image(pixels[None])
            latents.put(key, {"mean": mean[0].cpu(), "std": std[0].cpu()})
    accelerator.wait_for_everyone()
    return text, latents


def digest(modules: Sequence[nn.Module]) -> str:
    """A fingerprint of weights, names and types included."""
    state = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, value in module.state_dict().items():
            state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _share(cache: Cache, keys: Iterable[str], what: str, accelerator) -> Iterator[str]:
    """What this process has to encode: its share of all keys, less what is there.

    The keys are shared out, not what is missing: another process may have written entries before this one looks, and
    then the two would cut different lists, with keys in nobody's share.
    """
    from tqdm.auto import tqdm

    own = cache.missing(list(dict.fromkeys(keys))[accelerator.process_index :: accelerator.num_processes])
    return iter(tqdm(own, desc=what, disable=not (accelerator.is_main_process and own), file=sys.stderr))
