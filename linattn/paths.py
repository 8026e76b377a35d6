"""Paths as users write them on the command line and in recipes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path


def expand(path: str) -> str:
    """A path with `~` resolved."""
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


def instead_of(path: str | os.PathLike) -> str:
    """What there is in place of a path that does not exist, for the end of a message; "" if it does exist."""
    wanted = Path(expand(os.fspath(path)))
    for part in reversed([wanted, *wanted.parents]):
        if not part.exists():
            names = sorted(os.listdir(part.parent)) if part.parent.is_dir() else []
            close = difflib.get_close_matches(part.name, names, n=1)
            return f"did you mean {str(part.parent / close[0])!r}?" if close else f"{str(part)!r} does not exist"
    return ""
