"""What every kind of evaluation does beside scoring: files that are written whole, threads, words to the user."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from linattn.cli._models import Problem, _sha256


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_writable(option: str, path: Path, folder: Path) -> None:
    """Raise unless files can be made in a folder, or where it will be made."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        # The permission bits do not say it (root, read-only mounts), a try does.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise Problem(f"{option} {path}: cannot write into {existing}: {error.strerror or error}") from error


def check_out(path: Path) -> None:
    """Raise unless the JSON can be written there without harm."""
    check_writable("--out", path, path.parent)
    if path.is_dir():
        raise Problem(f"--out {path}: expected a file, it is a folder")
    if path.exists() and not _is_ours(path):
        raise Problem(f"--out {path} exists and is no JSON of linattn eval: choose another name")


def _is_ours(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and str(found.get("format", "")).startswith("linattn eval")


def write(path: Path, record: dict) -> None:
    """Write the JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, default=str, ensure_ascii=False, allow_nan=False) + "\n"
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def file_digests(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by their names."""
    return {path.name: _sha256(path) for path in sorted(paths)}


@contextlib.contextmanager
def threads(wanted: int | None):
    """A number of threads of torch while the context lasts; None: as it is."""
    import torch

    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
