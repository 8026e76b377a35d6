"""Files of `linattn upscale`: which pictures are meant, what their results are called, how those are written."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from linattn.cli._models import Problem, line
from linattn.cli._upscale_request import Usage
from linattn.paths import expand, instead_of

#: What counts as a picture in a folder. A file that is named itself is opened whatever its name is.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
#: Of files that are being written. They have their names for moments only, unless a machine goes down.
PART = ".linattn-upscale-"
STALE = 3600.0  # seconds; a part of that age belongs to no process that still writes it


@dataclasses.dataclass(frozen=True)
class Input:
    """A picture that was asked for.

    Attributes:
        path: as it was given or found.
        folder: where its result goes below --out: the path inside the folder that was given.
    """

    path: Path
    folder: Path = Path()


# ------------------------------------------------------------------------------------------------------------ inputs


def find(arguments: Sequence[str], lists: Sequence[str], recursive: bool) -> list[Input]:
    """All pictures that are meant, each once, in the order given and sorted inside a folder.

    Args:
        arguments: files, folders, globs, and lists as @FILE.
        lists: text files with one of these a line; "-" is stdin.
        recursive: whether to go into the folders of a folder.

    Raises:
        Usage: something does not exist, or there is nothing at all. A file of a list may be missing: that is one bad
            file among many, and shows when its turn comes.
    """
    found: dict[str, Input] = {}
    given = [(argument, False) for argument in arguments if not argument.startswith("@")]
    for name in [*(argument[1:] for argument in arguments if argument.startswith("@")), *lists]:
        given += [(entry, True) for entry in _read_list(name)]
    for name, listed in given:
        for picture in _meant(name, listed, recursive):
            found.setdefault(os.path.abspath(picture.path), picture)
    if not found:
        raise Usage(_nothing([name for name, _ in given], recursive))
    return list(found.values())


def _read_list(name: str) -> list[str]:
    try:
        # A name may hold any bytes; they come back as they were when it is opened.
        text = sys.stdin.read() if name == "-" else Path(expand(name)).read_text("utf-8-sig", "surrogateescape")
    except OSError as error:
        hint = f"; {instead_of(name)}" if isinstance(error, FileNotFoundError) else ""
        raise Usage(f"--list: cannot read {name!r}: {error.strerror or error}{hint}") from error
    if "\0" in text:
        raise Usage(f"--list: {name!r} is no text file; expected one path per line")
    entries = (entry.strip() for entry in text.splitlines())
    return [expand(entry) for entry in entries if entry and not entry.startswith("#")]


def _meant(name: str, listed: bool, recursive: bool) -> Iterator[Input]:
    path = Path(name)
    if not name.strip():
        raise Usage("expected names of pictures, got an empty one")
    if os.path.isdir(name):
        yield from _inside(path, recursive)
    elif os.path.lexists(path):
        yield Input(path)
    elif glob.has_magic(name):
        yield from _matching(name, recursive)
    elif listed:
        yield Input(path)
    else:
        raise Usage(f"{name!r} does not exist: {instead_of(name)}")


def _matching(pattern: str, recursive: bool) -> Iterator[Input]:
    """What a shell would have put in place of the pattern, but no files that are no pictures by their names."""
    names = sorted(glob.glob(pattern, recursive=True))
    if not names:
        raise Usage(f"no file matches {pattern!r}")
    for path in map(Path, names):
        if os.path.isdir(path):
            # "**" has brought what is in it already.
            if "**" not in pattern:
                yield from _inside(path, recursive)
        elif path.suffix.lower() in SUFFIXES:
            yield Input(path)


def _inside(folder: Path, recursive: bool) -> Iterator[Input]:
    """The pictures of a folder, hidden ones (and the "._" files of other systems) left out."""

    def refuse(error: OSError):
        raise Usage(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for top, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Input(Path(top, name), Path(top).relative_to(folder))


def _nothing(given: Sequence[str], recursive: bool) -> str:
    if not given:
        return "which pictures? For example: linattn upscale photo.jpg --scale 4 --out large"
    below = not recursive and any(next(_inside(Path(n), True), None) for n in given if os.path.isdir(n))
    hint = "; there are some in folders inside: --recursive" if below else ""
    return f"no pictures ({', '.join(SUFFIXES)}) in {', '.join(map(repr, given))}{hint}"


def without_results(inputs: Sequence[Input], out: Path) -> tuple[list[Input], int]:
    """Leave out what earlier runs wrote into `out`, so that it may lie inside a folder of inputs; and say how many.

    Otherwise the second run of `linattn upscale photos/* --out photos` would enlarge the results of the first.
    """
    root = os.path.realpath(out)
    kept = []
    for one in inputs:
        real = os.path.realpath(one.path)
        if not (real.startswith(os.path.join(root, "")) and is_record(record_of(Path(real)))):
            kept.append(one)
    return kept, len(inputs) - len(kept)


# ------------------------------------------------------------------------------------------------------------- names


def name_outputs(
    inputs: Sequence[Input], out: Path, suffix: str, extension: str, relative_to: str | None
) -> list[Path]:
    """Where the result of each input goes: out/(folders inside what was given)/(stem)(suffix)(extension).

    A name does not depend on what else is in the list, so that a longer list finds the results of a shorter one; but
    two pictures of one folder that differ in their extensions only, cat.jpg and cat.png, become cat_jpg and cat_png.

    Raises:
        Usage: two inputs would get the same name, or a result would be written over an input.
    """
    folders = [one.folder for one in inputs]
    if relative_to is not None:
        top = os.path.abspath(relative_to)
        folders = [Path(os.path.relpath(os.path.abspath(one.path.parent), top)) for one in inputs]
        for one, folder in zip(inputs, folders, strict=True):
            if ".." in folder.parts:
                raise Usage(f"--relative-to {relative_to}: {str(one.path)!r} is not inside that folder")
    stems = [(os.path.abspath(one.path.parent), one.path.stem) for one in inputs]
    often = Counter(stems)
    outputs = []
    for one, folder, stem in zip(inputs, folders, stems, strict=True):
        own = f"_{one.path.suffix[1:].lower()}" if often[stem] > 1 else ""
        outputs.append(out / folder / f"{one.path.stem}{own}{suffix}{extension}")

    taken = defaultdict(list)
    for one, output in zip(inputs, outputs, strict=True):
        taken[os.path.normcase(os.path.abspath(output))].append(one.path)
    for name, paths in taken.items():
        if len(paths) > 1:
            raise Usage(
                f"{str(paths[0])!r} and {str(paths[1])!r} would both become {name!r}: keep their folders apart with "
                "--relative-to FOLDER, or give them in two runs with another --out or --suffix"
            )
    mine = {os.path.realpath(one.path) for one in inputs}
    for one, output in zip(inputs, outputs, strict=True):
        if os.path.realpath(output) in mine:
            raise Usage(f"the result of {str(one.path)!r} would be written over {str(output)!r}, which is an input")
    return outputs


# ----------------------------------------------------------------------------------------------------------- records


def record_of(picture: Path) -> Path:
    """The JSON of a result. Its whole name is in it: cat.png and cat.jpg may lie side by side, and a dataset's own
    cat.json beside them."""
    return picture.with_name(picture.name + ".json")


def read(path: Path) -> dict | None:
    """A record of this command; None where there is none, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and str(found.get("format", "")).startswith("linattn upscale") else None


def is_record(path: Path) -> bool:
    return read(path) is not None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_pair(picture: Path, data: bytes, record: dict) -> None:
    """Write a picture and its record, whole or not at all, over what is there.

    Both are complete on the disk under other names before either gets its own. The record comes first: without its
    picture it counts for nothing and the next run writes over it, so that there is no moment at which a kill leaves a
    picture that is unfinished, without a record, or beside the record of another.
    """
    picture.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, default=str, ensure_ascii=False) + "\n"
    # Names that are no UTF-8 have stray surrogates in Python; a backslash and their number is JSON for the same.
    encoded = text.encode("utf-8", "backslashreplace")
    parts: list[Path] = []
    try:
        for content in (encoded, data):
            name = picture.with_name(f"{PART}{secrets.token_hex(8)}.part")
            with open(name, "xb") as stream:
                parts.append(name)
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        if os.path.lexists(picture):
            os.unlink(picture)
        os.replace(parts[0], record_of(picture))
        os.replace(parts[1], picture)
    finally:
        for name in parts:
            with contextlib.suppress(OSError):
                os.unlink(name)


def clean(folders: Iterable[Path]) -> None:
    """Remove what a machine that went down while it wrote has left in these folders."""
    for folder in folders:
        for part in folder.glob(f"{PART}*.part"):
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > STALE:
                    part.unlink()


def check_writable(out: Path) -> None:
    existing = out
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise Usage(f"--out {out}: expected a folder, {str(existing)!r} is a file")
    try:
        # The permission bits do not say it (root, read-only mounts), a try does.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise Problem(f"--out {out}: cannot write into {existing}: {line(error)}") from error


# ----------------------------------------------------------------------------------------------------------- signals


class Stop:
    """Ctrl-C and SIGTERM as KeyboardInterrupt, except inside `held()`, after which it comes."""

    def __init__(self):
        self._holding = False
        self._asked = False
        self._before: dict = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        self._asked = True
        if not self._holding:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._asked:
            raise KeyboardInterrupt
