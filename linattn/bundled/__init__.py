"""Small trained models that ship with the package, so that everything runs without a network.

Each model is one folder beside this file. ``path("tiny_sd")`` is a folder that
``StableDiffusionPipeline.from_pretrained`` reads exactly as it reads a downloaded one. To replace a model, train it
(``examples/train_tiny_sd.py``) and put the folder in place of the old one; nothing else names its files.
"""

import pathlib
from importlib import resources


def _root() -> pathlib.Path:
    # Diffusers needs real files, and a wheel is always unpacked on installation; zipped imports are not supported.
    return pathlib.Path(str(resources.files(__name__)))


def names() -> list[str]:
    """The models that can be given to :func:`path`: every folder here that holds a ``card.json``."""
    return sorted(card.parent.name for card in _root().glob("*/card.json"))


def path(name: str = "tiny_sd") -> pathlib.Path:
    """The folder of a bundled model.

    Args:
        name: one of :func:`names`.

    Raises:
        ValueError: there is no such model; the message lists those that exist.
    """
    if name not in names():
        raise ValueError(f"no bundled model is called {name!r}; available: {', '.join(names()) or 'none'}")
    return _root() / name


def resolve(name_or_path: str) -> str:
    """The folder of a bundled model if this is the name of one, else what came: ./NAME is a folder of that name."""
    return str(path(name_or_path)) if name_or_path in names() else name_or_path
