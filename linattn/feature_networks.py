"""Networks whose features :mod:`linattn.metrics` compares, and how pictures are made ready for them.

    network = load("digits")            # offline; or "inception", or "module:callable" for one of your own
    pictures = [read_picture(path) for path in paths]
    features = network(pictures)        # (n, d)

Pictures are uint8 arrays (height, width, 3). The conventions are clean-fid's: files as RGB with no heed of EXIF,
resized by Pillow's bicubic filter channel by channel in floating point, clipped to 0..255 and not rounded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

INCEPTION = "inception-2015-12-05.pt"
NAMES = ("inception", "digits")


class Unavailable(Exception):
    """A network cannot be had here; the message says what is missing and how to get it."""


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network, and what pictures have to be for it."""

    name: str
    #: Float32 pictures (n, 3, height, width) in 0..255 -> features (n, d).
    function: Callable[[torch.Tensor], torch.Tensor]
    size: int | None = None  # pixels of a side that pictures are resized to; None: they come as they are
    sha256: str | None = None  # of the file with the weights, where there is one

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """Features (n, d), float32, on the CPU.

        Pictures go through the network together where all have the same size, else one by one.

        Raises:
            ValueError: the network returns another shape, or values that are not finite.
        """
        ready = [_to_tensor(p) if self.size is None else resize(p, self.size) for p in pictures]
        together = len({tensor.shape for tensor in ready}) == 1
        batches = [torch.stack(ready)] if together else [tensor[None] for tensor in ready]
        found = [self.function(batch) for batch in batches]
        for features, batch in zip(found, batches, strict=True):
            shape = tuple(getattr(features, "shape", ()))
            if len(shape) != 2 or shape[0] != len(batch):
                raise ValueError(f"{self.name}: expected features ({len(batch)}, d), got {shape or type(features)}")
        if len({features.shape[1] for features in found}) > 1:
            raise ValueError(f"{self.name}: the number of features depends on the size of the picture")
        features = torch.cat(found).float().cpu()
        if not torch.isfinite(features).all():
            raise ValueError(f"{self.name}: some features are not finite")
        return features


def load(name: str, device: str = "cpu", *, download: bool = True) -> FeatureNetwork:
    """A network by name.

    Args:
        name: "inception": the Inception of FID as clean-fid has it, 2048 features (extra ``eval``; a file of 95 MB is
            fetched once); "digits": what the judge of :mod:`linattn.evaluate` sees in canvases of digits, 19 features,
            offline; "module:callable": a function or torch module of float32 pictures (n, 3, height, width) in 0..1
            that gives features (n, d). If it has an attribute ``size``, pictures are resized to that first.
        download: whether to fetch what is missing.

    Raises:
        Unavailable: it cannot be had.
    """
    if name == "inception":
        return _inception(device, download)
    if name == "digits":
        return _digits()
    if ":" in name:
        return _own(name, device)
    raise Unavailable(f"expected {', '.join(NAMES)} or MODULE:CALLABLE, got {name!r}")


def read_picture(path: str | os.PathLike) -> np.ndarray:
    """A file as (height, width, 3) uint8."""
    from PIL import Image

    with Image.open(path) as file:
        return np.array(file.convert("RGB"))


def square(picture: np.ndarray, resolution: int) -> np.ndarray:
    """The square in the middle of a picture, resized by Pillow's Lanczos filter in 8 bits."""
    from PIL import Image

    height, width, _ = picture.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = Image.fromarray(picture[top : top + side, left : left + side])
    return np.array(middle.resize((resolution, resolution), Image.Resampling.LANCZOS))


def resize(picture: np.ndarray, size: int) -> torch.Tensor:
    """clean-fid's resize: (height, width, 3) uint8 -> (3, size, size) float32 in 0..255, antialiased and not rounded.

    Source: Parmar et al., "On aliased resizing and surprising subtleties in GAN evaluation", 2022.
    """
    from PIL import Image

    channels = [
        np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC))
        for channel in np.moveaxis(picture.astype(np.float32), 2, 0)
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


def _to_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)


# --------------------------------------------------------------------------------------------------------- networks


def inception_path() -> Path:
    """Where the weights of "inception" are, or will be."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION


def _inception(device: str, download: bool) -> FeatureNetwork:
    try:
        from cleanfid.downloads_helper import inception_url
        from cleanfid.inception_torchscript import InceptionV3W
    except ImportError as error:
        raise Unavailable(
            f"inception needs clean-fid ({error.name} is missing): pip install 'linattn[eval]'"
        ) from error
    path = inception_path()
    if not path.is_file():
        what = f"inception needs its weights, {INCEPTION} (95 MB, TorchScript), which are not in {path.parent}"
        if not download:
            raise Unavailable(what)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(inception_url, str(path), progress=sys.stderr.isatty())
        except OSError as error:
            raise Unavailable(
                f"{what}, and {inception_url} could not be fetched ({error}): check the network, or put the file there"
                "; digits and MODULE:CALLABLE need no network"
            ) from error
    network = InceptionV3W(str(path.parent), download=False, resize_inside=False).to(device).eval()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return FeatureNetwork("inception", lambda pictures: network(pictures.to(device)), 299, digest)


def _digits() -> FeatureNetwork:
    try:
        from linattn.evaluate import canvas_judge, cell_ink

        judge = canvas_judge()
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return FeatureNetwork("digits", lambda pictures: torch.from_numpy(judge.scores(cell_ink(pictures / 255))))


def _own(name: str, device: str) -> FeatureNetwork:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # a file beside the pictures; the console script does not look there
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise Unavailable(f"there is no module {error.name!r} (for {name!r})") from error
    except AttributeError:
        raise Unavailable(f"module {module_name} has no {attribute!r}") from None
    if not callable(function):
        raise Unavailable(f"{name}: expected a callable, got {type(function).__name__}")
    size = getattr(function, "size", None)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise Unavailable(f"{name}: its size has to be a number of pixels, got {size!r}")
    if isinstance(function, torch.nn.Module):
        function = function.to(device).eval()
    return FeatureNetwork(name, lambda pictures: function(pictures.to(device) / 255), size)
