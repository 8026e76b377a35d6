"""Checkpoints that are whole or absent: written aside, flushed, then renamed.

    <folder>/checkpoint-00001000/     Accelerate's state (optimizer, scaler, random numbers; sharded models), and
        trainable.safetensors         what is trained, by its name in the student
        ema.safetensors               its moving average, if one is kept
        adapter/                      the same weights as users load them
        state.json                    steps done, samples seen, versions; written last

A killed run leaves at most a folder whose name ends in `.partial`, which nobody reads and the next run removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL = ".partial"


def path(folder: Path, step: int) -> Path:
    return Path(folder) / f"checkpoint-{step:08d}"


def found(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    names = [p for p in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(names, key=lambda p: int(_NAME.fullmatch(p.name)[1]))


def latest(folder: Path) -> Path | None:
    return next(reversed(found(folder)), None)


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def write_state(checkpoint: Path, state: dict) -> None:
    """Written last: it makes a checkpoint one. JSON's floats are the shortest text that reads back to the same bits."""
    write_text(checkpoint / "state.json", json.dumps(state, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """A file that is whole or as it was before."""
    partial = file.with_name(file.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    _flush_entry(partial)
    os.replace(partial, file)


@contextlib.contextmanager
def whole(target: Path, *, is_main: bool = True, barrier=lambda: None) -> Iterator[Path]:
    """A folder to write `target`'s content into; it becomes `target` when the block ends without an exception.

    Args:
        is_main: whether this process makes and renames the folder; all of them may write into it.
        barrier: waits for all processes.
    """
    partial = target.with_name(target.name + PARTIAL)
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    yield partial
    barrier()  # nobody walks through the folder while another still writes and renames in it
    _flush(partial)
    barrier()
    if is_main:
        # An older folder of this name (the same step, done again) makes way by a rename as well.
        old = target.with_name(f"{target.name}.old{PARTIAL}")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
        _flush_entry(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


def remove_partial(folder: Path) -> None:
    """Remove what killed runs left behind."""
    for leftover in Path(folder).glob(f"*{PARTIAL}"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def keep_newest(folder: Path, count: int | None) -> None:
    """Remove all complete checkpoints but the newest `count`; None keeps all."""
    for checkpoint in found(folder)[: -count if count else 0]:
        # Renamed first: a checkpoint that is half removed must not be taken for one.
        doomed = checkpoint.with_name(checkpoint.name + PARTIAL)
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            _flush_entry(file)


def _flush_entry(entry: Path) -> None:
    if os.name == "nt" and entry.is_dir():
        return
    handle = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
