"""Where pictures and captions come from. Every kind gives the same samples for the same pictures.

All are random access, tars too: their members are looked up once, then read by position. That is what makes the data
position of a resumed run exact, and nothing is unpacked to disk or unpickled.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from PIL import Image

from ...paths import tar_paths
from . import pictures
from .pictures import Size

if TYPE_CHECKING:
    from ..filters import Filters
    from ..recipe import Data

IMAGES = ("png", "jpg", "jpeg", "webp")
METADATA = "metadata.jsonl"
PROMPT = "prompt"  # the key of a caption in a JSON file beside its picture
_HEADER = 1 << 16  # bytes that hold the size of nearly every picture
_log = logging.getLogger(__name__)


class DataError(ValueError):
    """Something is wrong with the data of a recipe; the message names the file or sample and what was expected."""


class Source(Protocol):
    """Pictures, numbered from 0, with captions if it was opened for such.

    Picklable; opens its files when it reads, in whichever process.
    """

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name of the sample, for messages and the cache; stays the same when the data set moves."""

    def stamp(self, index: int) -> str:
        """Changes when the file of the picture does, so that nothing stale is taken from a cache."""

    def size(self, index: int) -> Size:
        """(height, width) of the picture, upright; reads no more than the header of the file."""

    def image(self, index: int) -> Image.Image:
        """The picture, upright, in RGB."""

    def caption(self, index: int) -> str:
        """The text that belongs to the picture; "" where captions are not looked for."""

    def values(self, keys: Sequence[str]) -> Iterator[dict[str, object]]:
        """What stands under these keys beside each picture, in their order; a key that is lacking is not in it.

        Raises:
            DataError: what holds them cannot be read.
        """


def open_source(data: Data, *, captions: bool = True) -> Source:
    """The source that the `data` section of a recipe names.

    `images`: every png, jpg, jpeg and webp below the folder, in the order of their paths. Captions stand in
    `metadata.jsonl` (one object a line: `data.image_key`, by default "file_name", relative to the file, and
    `data.caption_key`, by default "text"), in the folder or in those below; else in a file beside the picture: text
    (`a/b.png`, `a/b.txt`), or JSON (`a/b.json`) under `data.caption_key`, by default "prompt", which goes before text
    where that key is given. Names that begin with a dot are passed over.

    `webdataset`: members of a tar with the same name up to the first dot are one sample. `data.image_key` is the rest
    of the name of the picture's member ("jpg", "left.png"), by default the only one that is an image. The caption is
    the member "txt", else the key "caption" of the member "json"; `data.caption_key` names another text member
    ("blip.txt") or another key of "json". Samples without an image are passed over, with a warning that counts them.

    `datasets`: what `Dataset.save_to_disk` wrote; `data.split` if it holds several. `data.image_key` is the column of
    pictures, by default "image"; `data.caption_key` that of captions, by default "text" or "caption".

    Of these, the samples that `data.filters` leaves.

    Args:
        captions: whether the run needs any. If not, nothing that would hold one is read or missed: every picture below
            the folder, in the tars or in the column is a sample, `metadata.jsonl` or not.

    Raises:
        DataError: nothing there, a picture without a caption, an ambiguity that a key of the recipe would settle.
    """
    makers: dict[str, Callable[[Data], Source]] = {
        "images": lambda data: ImageFolder(data.path, data.image_key, data.caption_key, captions),
        "webdataset": lambda data: TarShards(data.path, data.image_key, data.caption_key, captions),
        "datasets": lambda data: ArrowFolder(data.path, data.split, data.image_key, data.caption_key, captions),
    }
    source = makers[data.kind](data)
    return Filtered(source, data.filters) if data.filters.keys else source


class _Some:
    """Samples of a source, in their order."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, index: int) -> str:
        return self._source.key(self._indices[index])

    def stamp(self, index: int) -> str:
        return self._source.stamp(self._indices[index])

    def size(self, index: int) -> Size:
        return self._source.size(self._indices[index])

    def image(self, index: int) -> Image.Image:
        return self._source.image(self._indices[index])

    def caption(self, index: int) -> str:
        return self._source.caption(self._indices[index])

    def values(self, keys: Sequence[str]) -> Iterator[dict[str, object]]:
        wanted = set(self._indices)
        return (values for index, values in enumerate(self._source.values(keys)) if index in wanted)


class LargeEnough(_Some):
    """The pictures of a source neither of whose sides is shorter than `side` pixels, in their order.

    Reads the header of every picture once, when it is made. The others are passed over, with a warning that counts
    them.

    Raises:
        DataError: none is large enough.
    """

    def __init__(self, source: Source, side: int):
        super().__init__(source, [index for index in range(len(source)) if min(source.size(index)) >= side])
        small = len(source) - len(self._indices)
        if not self._indices:
            raise DataError(
                f"data.path: expected pictures of at least {side} x {side} pixels (data.resolution), and all {small} "
                "are smaller"
            )
        if small:
            _log.warning(
                "data.path: %d of %d pictures have a side below %d pixels (data.resolution) and are passed over",
                small,
                len(source),
                side,
            )


class Filtered(_Some):
    """The samples of a source that the filters leave, in their order.

    Reads what stands beside every picture once, when it is made. The others are passed over, with a warning that counts
    them.

    Raises:
        DataError: nothing is left; a value that cannot be compared; a sample without a key that it should have
            (`missing: error`), or a key that no sample has.
    """

    def __init__(self, source: Source, filters: Filters):
        indices, reasons, seen = [], Counter(), set()
        for index, values in enumerate(source.values(filters.keys)):
            values = {key: value for key, value in values.items() if value is not None and value == value}  # not NaN
            seen |= values.keys()
            reason = _reason(values, filters, lambda index=index: source.key(index))
            if reason is None:
                indices.append(index)
            else:
                reasons[reason] += 1
        super().__init__(source, indices)
        summary = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        absent = [key for key in filters.keys if key not in seen]
        if absent:
            raise DataError(
                f"data.filters: expected {', '.join(map(repr, absent))} beside the pictures, and none of the "
                f"{len(source)} samples has {'it' if len(absent) == 1 else 'them'}"
            )
        if not indices:
            raise DataError(
                f"data.filters: expected to leave samples, and all {len(source)} are passed over: {summary}"
            )
        if reasons:
            _log.warning("data.filters: %d of %d samples are passed over: %s", reasons.total(), len(source), summary)


def _reason(values: dict[str, object], filters: Filters, name: Callable[[], str]) -> str | None:
    """Why a sample is passed over; None: it is not.

    Args:
        name: of the sample, for messages.
    """
    for key in filters.require:
        if key not in values:
            return f"without {key!r}"
    for option, bounds in (("at_least", filters.at_least), ("at_most", filters.at_most), ("one_of", filters.one_of)):
        for key, bound in bounds.items():
            if key not in values:
                if filters.missing == "error":
                    raise DataError(
                        f"{name()}: expected {key!r} beside the picture (data.filters.{option}), found none; "
                        "data.filters.missing: keep or drop says what becomes of such samples"
                    )
                if filters.missing == "drop":
                    return f"without {key!r}"
                continue
            value = values[key]
            if option == "one_of":
                # True is no 1.
                if not any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in bound):
                    return f"with another {key!r}"
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise DataError(f"{name()}: expected a number under {key!r} (data.filters.{option}), got {value!r}")
            elif (value < bound) if option == "at_least" else (value > bound):
                return f"with {key!r} {'below' if option == 'at_least' else 'above'} {bound:g}"
    return None


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in IMAGES


def _decoded(decode: Callable, name: str):
    """Call decode, and name the picture in whatever goes wrong."""
    try:
        return decode()
    except DataError:
        raise
    except Exception as error:  # every decoder has errors of its own
        raise DataError(f"{name}: expected a readable image, got {type(error).__name__}: {error}") from error


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: expected text in UTF-8, got {error}") from None


def _json(content: str | bytes, name: str) -> dict:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise DataError(f"{name}: expected JSON, got {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected a JSON object, got {type(value).__name__}")
    return value


def _entry(entry: dict, key: str, name: str, option: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise DataError(f"{name}: expected text under {key!r} ({option}), got {value!r}; keys: {', '.join(entry)}")
    return value


class ImageFolder:
    """A folder of image files, see :func:`open_source`."""

    def __init__(self, path: str, image_key: str | None = None, caption_key: str | None = None, captions: bool = True):
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            raise DataError(f"data.path: expected a folder of images, got {path!r}")
        names = sorted(self._walk())
        known = set(names)
        self._listed: dict[str, str] = {}
        self._captions = captions
        self._tables = [name for name in names if name.rpartition("/")[2] == METADATA]
        self._image_key = image_key or "file_name"
        tables = self._tables if captions else []
        for table in tables:
            self._read_table(table, image_key or "file_name", caption_key or "text")
        if not tables and image_key:
            raise DataError(
                f"data.image_key: names a key of {METADATA}; expected such a file below {path!r}, found none"
            )
        self._names = sorted({name for name in names if _is_image(name)} | set(self._listed))
        if not self._names:
            raise DataError(f"data.path: expected images ({', '.join(IMAGES)}) below {path!r}, found none")
        if not captions:
            return
        self._caption_key = caption_key or PROMPT
        kinds = ("json", "txt") if caption_key and not tables else ("txt", "json")
        self._beside = {
            name: next((file for file in (_beside(name, kind) for kind in kinds) if file in known), None)
            for name in self._names
            if name not in self._listed
        }
        bare = [name for name, file in self._beside.items() if file is None]
        if bare:
            raise DataError(
                f"{self.root / bare[0]}: expected a caption in {_beside(bare[0], 'txt')!r}, "
                f"{_beside(bare[0], 'json')!r} or {METADATA}, found none "
                f"({len(bare)} of {len(self._names)} images have none)"
            )
        if caption_key and not tables and not any(file.endswith(".json") for file in self._beside.values()):
            raise DataError(
                f"data.caption_key: names a key of {METADATA}, or of JSON files beside the images; expected such below "
                f"{path!r}, found none"
            )

    def _walk(self) -> Iterable[str]:
        seen = set()
        for folder, children, files in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            children[:] = sorted(child for child in children if not child.startswith(".") and real not in seen)
            if real not in seen:  # a link may lead to a folder above itself
                seen.add(real)
                relative = Path(folder).relative_to(self.root).as_posix()
                prefix = "" if relative == "." else f"{relative}/"
                yield from (prefix + name for name in files if not name.startswith("."))

    def _lines(self, table: str, image_key: str) -> Iterator[tuple[str, dict, str, str]]:
        """Of each line of a table: the name of its picture, what it says, where it stands, the name as written."""
        path = self.root / table
        for number, line in enumerate(_text(path.read_bytes(), str(path)).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            entry = _json(line, where)
            file = _entry(entry, image_key, where, "data.image_key")
            yield Path(os.path.normpath(Path(table).parent / file)).as_posix(), entry, where, file

    def _read_table(self, table: str, image_key: str, caption_key: str) -> None:
        for name, entry, where, file in self._lines(table, image_key):
            if not (self.root / name).is_file():
                raise DataError(f"{where}: expected an image file, and {str(self.root / name)!r} does not exist")
            if name in self._listed:
                raise DataError(f"{where}: expected every image once, got {file!r} again")
            self._listed[name] = _entry(entry, caption_key, where, "data.caption_key").strip()

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def stamp(self, index: int) -> str:
        return _file_stamp(self.root / self._names[index])

    def size(self, index: int) -> Size:
        path = self.root / self._names[index]
        return _decoded(lambda: pictures.decode_size(path), str(path))

    def image(self, index: int) -> Image.Image:
        path = self.root / self._names[index]
        return _decoded(lambda: pictures.decode(path), str(path))

    def caption(self, index: int) -> str:
        if not self._captions:
            return ""
        name = self._names[index]
        if name in self._listed:
            return self._listed[name]
        path = self.root / self._beside[name]
        content = _text(path.read_bytes(), str(path))
        if path.suffix == ".json":
            content = _entry(_json(content, str(path)), self._caption_key, str(path), "data.caption_key")
        return content.strip()

    def values(self, keys: Sequence[str]) -> Iterator[dict[str, object]]:
        listed = {
            name: _among(entry, keys)
            for table in self._tables
            for name, entry, _, _ in self._lines(table, self._image_key)
        }
        for name in self._names:
            path = self.root / _beside(name, "json")
            if name in listed:
                yield listed[name]
            elif path.is_file():
                yield _among(_json(_text(path.read_bytes(), str(path)), str(path)), keys)
            else:
                yield {}


def _among(entry: dict, keys: Sequence[str]) -> dict[str, object]:
    return {key: entry[key] for key in keys if key in entry}


def _beside(name: str, kind: str) -> str:
    return f"{name.rpartition('.')[0]}.{kind}"


def _file_stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


class _Member(NamedTuple):
    """Where the bytes of a tar member lie in its file."""

    offset: int
    size: int


class _Sample(NamedTuple):
    shard: int
    name: str
    image: _Member
    caption: _Member | None  # None: not looked for
    caption_key: str | None  # None: the member is the text; else JSON that holds it under this key
    record: _Member | None  # the JSON, if there is one


class TarShards:
    """Local tars in the layout of webdataset, see :func:`open_source`."""

    def __init__(
        self,
        path: str | Iterable[str],
        image_key: str | None = None,
        caption_key: str | None = None,
        captions: bool = True,
    ):
        self._image_key, self._caption_key, self._captions = image_key, caption_key, captions
        self._shards = _find_shards(path)
        self._samples: list[_Sample] = []
        passed_over: Counter[str] = Counter()
        for number, shard in enumerate(self._shards):
            for name, members in _group(shard).items():
                sample = self._sample(number, name, members)
                if sample is not None:
                    self._samples.append(sample)
                else:
                    passed_over[", ".join(sorted(members))] += 1
        summary = "; ".join(f"{count} of {kind}" for kind, count in passed_over.most_common(3))
        if not self._samples:
            raise DataError(
                f"data.path: expected samples with an image ({', '.join(IMAGES)}) in {path!r}, found none"
                + (f" (only {summary})" if summary else "")
            )
        if passed_over:
            _log.warning("data.path: %d samples have no image and are passed over: %s", passed_over.total(), summary)

    def _sample(self, shard: int, name: str, members: dict[str, _Member]) -> _Sample | None:
        where = f"{self._shards[shard]}, sample {name!r}"
        found = ", ".join(sorted(members))
        images = [kind for kind in members if kind in IMAGES] or [kind for kind in members if _is_image(kind)]
        if not images:
            return None
        if self._image_key is not None:
            images = [self._image_key.lower()]
            if images[0] not in members:
                raise DataError(f"{where}: expected a member {images[0]!r} (data.image_key), found {found}")
        if len(images) > 1:
            raise DataError(f"{where}: expected one image, found {', '.join(images)}; data.image_key chooses")
        if not self._captions:
            return _Sample(shard, name, members[images[0]], None, None, members.get("json"))
        caption, key = self._caption_key or "txt", None
        if caption not in members and not f".{self._caption_key}".endswith(".txt"):
            caption, key = "json", self._caption_key or "caption"
        if caption not in members:
            raise DataError(
                f"{where}: expected a caption in a member 'txt' or 'json' (data.caption_key), found {found}"
            )
        return _Sample(shard, name, members[images[0]], members[caption], key, members.get("json"))

    def _read(self, sample: _Sample, member: _Member, most: int | None = None) -> bytes:
        # Opened anew each time: an open file shared with forked workers would share its position too.
        with open(self._shards[sample.shard], "rb") as file:
            return self._read_from(file, sample, member, most)

    def _read_from(self, file: BinaryIO, sample: _Sample, member: _Member, most: int | None = None) -> bytes:
        file.seek(member.offset)
        wanted = member.size if most is None else min(most, member.size)
        content = file.read(wanted)
        if len(content) < wanted:
            raise DataError(f"{self._name(sample)}: expected {wanted} bytes, and the tar ends after {len(content)}")
        return content

    def _name(self, sample: _Sample) -> str:
        return f"{self._shards[sample.shard]}, sample {sample.name!r}"

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        sample = self._samples[index]
        return f"{self._shards[sample.shard].name}/{sample.name}"

    def stamp(self, index: int) -> str:
        sample = self._samples[index]
        return f"{_file_stamp(self._shards[sample.shard])}-{sample.image.offset}"

    def size(self, index: int) -> Size:
        sample = self._samples[index]
        start = self._read(sample, sample.image, _HEADER)
        whole = lambda: self._read(sample, sample.image)  # noqa: E731
        return _decoded(lambda: pictures.decode_size_from(start, whole), self._name(sample))

    def image(self, index: int) -> Image.Image:
        sample = self._samples[index]
        content = self._read(sample, sample.image)
        return _decoded(lambda: pictures.decode(io.BytesIO(content)), self._name(sample))

    def caption(self, index: int) -> str:
        sample = self._samples[index]
        if sample.caption is None:
            return ""
        content, name = self._read(sample, sample.caption), self._name(sample)
        if sample.caption_key is None:
            return _text(content, name).strip()
        return _entry(_json(_text(content, name), name), sample.caption_key, name, "data.caption_key").strip()

    def values(self, keys: Sequence[str]) -> Iterator[dict[str, object]]:
        for shard, samples in itertools.groupby(self._samples, key=lambda sample: sample.shard):
            with open(self._shards[shard], "rb") as file:
                for sample in samples:
                    if sample.record is None:
                        yield {}
                        continue
                    name = self._name(sample)
                    content = self._read_from(file, sample, sample.record)
                    yield _among(_json(_text(content, name), name), keys)


def _find_shards(path: str | Iterable[str]) -> list[Path]:
    found: dict[Path, None] = {}
    for one in tar_paths([path] if isinstance(path, str) else list(path)):
        place = Path(one).expanduser()
        if place.is_dir():
            shards = sorted(shard for shard in place.rglob("*.tar") if not shard.name.startswith("."))
        elif place.is_file():
            shards = [place]
        else:
            shards = [Path(match) for match in sorted(glob.glob(str(place), recursive=True)) if Path(match).is_file()]
        if not shards:
            raise DataError(
                f"data.path: expected a tar, a folder of .tar files, a glob or a range of them, found none at {one!r}"
            )
        found.update(dict.fromkeys(shards))
    return list(found)


def _group(shard: Path) -> dict[str, dict[str, _Member]]:
    """Sample name -> rest of the member's name in lower case -> where it lies, in the order of the tar."""
    samples: dict[str, dict[str, _Member]] = {}
    length = shard.stat().st_size
    if length % tarfile.BLOCKSIZE:
        raise DataError(
            f"{shard}: expected a whole, uncompressed tar (a multiple of {tarfile.BLOCKSIZE} bytes), got {length} bytes"
        )
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.removeprefix("./").rpartition("/")
                stem, dot, kind = file.partition(".")
                if not (member.isreg() and stem and dot) or member.sparse is not None:
                    continue  # folders, links, hidden files, files without a kind
                name, kind = f"{folder}/{stem}" if folder else stem, kind.lower()
                if kind in samples.setdefault(name, {}):
                    raise DataError(f"{shard}: expected every member once, got {member.name!r} again")
                samples[name][kind] = _Member(member.offset_data, member.size)
    except tarfile.TarError as error:
        raise DataError(f"{shard}: expected an uncompressed tar that is whole, got {error}") from None
    return samples


class ArrowFolder:
    """What `datasets.Dataset.save_to_disk` wrote, see :func:`open_source`."""

    def __init__(
        self,
        path: str,
        split: str | None = None,
        image_key: str | None = None,
        caption_key: str | None = None,
        captions: bool = True,
    ):
        try:
            import datasets
        except ImportError as error:
            raise DataError("data.kind: 'datasets' needs the package of that name: pip install datasets") from error
        root = Path(path).expanduser()
        if not root.is_dir():
            raise DataError(f"data.path: expected a folder written by Dataset.save_to_disk, got {path!r}")
        try:
            table = datasets.load_from_disk(str(root))
        except Exception as error:  # one without rows fails in the depths of datasets
            raise DataError(
                f"data.path: expected samples written by Dataset.save_to_disk, got {path!r}: {error}"
            ) from error
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise DataError(f"data.split: expected one of {', '.join(table)}, got {split!r}")
            table = table[split]
        elif split is not None:
            raise DataError(
                f"data.split: expected null, since {path!r} holds one data set without splits; got {split!r}"
            )
        if not len(table):
            raise DataError(f"data.path: expected samples in {path!r}, found none")
        self.image_key = _column(table, "data.image_key", image_key, ["image"])
        self.caption_key = None
        if captions:
            self.caption_key = _column(table, "data.caption_key", caption_key, ["text", "caption"])
        self._fingerprint = getattr(table, "_fingerprint", "")
        table = table.with_format(None)
        self._table = table
        images = table.select_columns([self.image_key])
        if isinstance(images.features[self.image_key], datasets.Image):
            images = images.cast_column(self.image_key, datasets.Image(decode=False))  # the file, not its pixels
        self._root, self._images = root, images
        self._captions = table.select_columns([self.caption_key]) if captions else None

    def _file(self, index: int) -> io.BytesIO | Path:
        """The encoded image."""
        value = self._images[index][self.image_key]
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, str):
            return self._root / value  # an absolute path stays what it is
        if isinstance(value, (bytes, bytearray)):
            return io.BytesIO(value)
        raise DataError(
            f"{self._name(index)}: expected an image in column {self.image_key!r}, got {type(value).__name__}"
        )

    def _name(self, index: int) -> str:
        return f"{self._root}, row {index}"

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        return f"row {index}"

    def stamp(self, index: int) -> str:
        return self._fingerprint

    def size(self, index: int) -> Size:
        return _decoded(lambda: pictures.decode_size(self._file(index)), self._name(index))

    def image(self, index: int) -> Image.Image:
        return _decoded(lambda: pictures.decode(self._file(index)), self._name(index))

    def caption(self, index: int) -> str:
        if self._captions is None:
            return ""
        value = self._captions[index][self.caption_key]
        if not isinstance(value, str):
            raise DataError(f"{self._name(index)}: expected text in column {self.caption_key!r}, got {value!r}")
        return value.strip()

    def values(self, keys: Sequence[str]) -> Iterator[dict[str, object]]:
        present = [key for key in keys if key in self._table.column_names]
        if not present:
            return iter({} for _ in range(len(self)))
        return iter(self._table.select_columns(present))


def _column(table, option: str, wanted: str | None, usual: list[str]) -> str:
    present = [name for name in ([wanted] if wanted else usual) if name in table.column_names]
    if len(present) != 1:
        expected = repr(wanted) if wanted else " or ".join(map(repr, usual))
        raise DataError(f"{option}: expected the column {expected}; the data set has {', '.join(table.column_names)}")
    return present[0]
