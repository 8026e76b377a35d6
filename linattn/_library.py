"""Find and load the compiled libraries, and remember why one is absent.

The libraries hold kernels only: they implement the private per-backend ops whose schemas `linattn.ops` defines from
Python. They contain no CPython symbols, so one build serves every Python and, through torch's stable ABI, every
torch from 2.11 on. A missing library is not an error: the ops then run on another backend, and
`python -m linattn` prints the reason kept here.
"""

from __future__ import annotations

import pathlib

import torch

NAMES = ("cpu", "cuda")
_SUFFIXES = (".so", ".dylib", ".dll")

_paths: dict[str, pathlib.Path] = {}
_reasons: dict[str, str] = {}


def _load(name: str) -> None:
    folder = pathlib.Path(__file__).resolve().parent
    candidates = [folder / f"_C_{name}{suffix}" for suffix in _SUFFIXES]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        _reasons[name] = f"_C_{name} was not built (see docs/building.md)"
    elif name == "cuda" and torch.version.cuda is None:
        _reasons[name] = f"{found.name} needs a CUDA build of torch; this is torch {torch.__version__}"
    else:
        try:
            torch.ops.load_library(str(found))
            _paths[name] = found
        except OSError as error:  # a library for another platform, or one that misses a symbol
            _reasons[name] = f"{found.name} could not be loaded: {error}"


for _name in NAMES:
    _load(_name)


def loaded(name: str) -> bool:
    """Whether the compiled library `_C_<name>` is in this process."""
    return name in _paths


def path(name: str) -> str | None:
    """File of the compiled library `_C_<name>`, or None where it is not loaded."""
    return str(_paths[name]) if name in _paths else None


def reason(name: str) -> str | None:
    """Why the compiled library `_C_<name>` is not loaded, or None where it is."""
    return _reasons.get(name)
