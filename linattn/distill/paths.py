"""Paths as recipes write them."""

from __future__ import annotations

import os
from collections.abc import Sequence


def expand(path: str) -> str:
    """A path of a recipe with `~` resolved."""
    return os.path.expanduser(path)


def tar_paths(paths: Sequence[str]) -> list[str]:
    """The paths of a webdataset with their ranges written out: "{08..10}.tar" is 08.tar, 09.tar, 10.tar.

    A path that exists as it is written is left alone, whatever braces it has.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    written_out: list[str] = []
    for path in paths:
        try:
            written_out += [path] if os.path.exists(expand(path)) else braceexpand(path)
        except UnbalancedBracesError:
            written_out.append(path)
    return written_out
