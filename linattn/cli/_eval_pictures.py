"""`linattn eval --folder` and `--captions`: figures of pictures against real ones, and against their captions.

The work is cut into chunks of CHUNK pictures, of which process r of w does those with number = r modulo w. What was
computed of a chunk is a file of its own, and the figures are computed from these files alone: so a run that was killed,
one in several processes and one from beginning to end give the same figures, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from linattn.cli._eval_drawing import OPTIONS, Drawing
from linattn.cli._eval_files import check_out, check_writable, file_digests, say, threads, write
from linattn.cli._machine import check_device, check_installed
from linattn.cli._models import Problem, fetch, line, locate
from linattn.paths import instead_of

#: Names the layout of the JSON; another layout gets another number.
FORMAT = "linattn eval pictures 1"
CHUNK = 16  # pictures
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # as clean-fid reads
TITLES = {
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "clip_score": "CLIP score",
}
#: Options that only pictures of a folder or of captions have, with what stands where they are not given.
ONLY_HERE = {
    "against": None,
    "features": None,
    "clip": None,
    "clip_prefix": None,
    "resolution": None,
    "save_statistics": None,
    "cache": None,
    **dict.fromkeys(name for name in OPTIONS if name not in ("model", "steps", "guidance")),
}
NOT_HERE = {"student": None, "variants": None, "digits": None, "quick": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures of a folder, or drawn from captions")
    group.add_argument("--folder", type=Path, help="score the pictures in this folder and below it")
    group.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="one caption a line: with --folder of its pictures in the order of their names; without, line i (from 0) "
        "is drawn with seed SEED + i, of the first N lines where --n is given",
    )
    group.add_argument(
        "--against", type=Path, metavar="FOLDER|FILE", help="real pictures, or what --save-statistics made of them"
    )
    group.add_argument(
        "--features",
        metavar="inception|digits|MODULE:CALLABLE",
        help="the network that compares: clean-fid's Inception, the judge of digits (offline), or a function of "
        "pictures (n, 3, h, w) in 0..1 that gives features (n, d) [inception]",
    )
    group.add_argument(
        "--clip", metavar="NAME|FOLDER", help="CLIP of the CLIP score: folder or hub name; needs --captions"
    )
    group.add_argument("--clip-prefix", metavar="TEXT", help="what CLIP reads before each caption [nothing]")
    group.add_argument(
        "--resolution",
        type=int,
        metavar="N",
        help="cut all pictures to the square in the middle and resize them to N pixels first (Lanczos) [as they are]",
    )
    group.add_argument(
        "--save-statistics", type=Path, metavar="FILE.safetensors", help="mean, covariance and features of the pictures"
    )
    group.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="what was computed and drawn so far [beside --out, FILE.cache]"
    )
    group.add_argument(
        "--attention", choices=("linfusion", "clear", "stock"), help="this and all below: as of generate"
    )
    group.add_argument("--weights", metavar="NAME|FOLDER|FILE|base|published")
    group.add_argument("--window-size", type=int, metavar="N")
    group.add_argument("--down-factor", type=int, metavar="N")
    group.add_argument("--negative-prompt", metavar="TEXT")
    group.add_argument("--size", metavar="N|WxH")
    group.add_argument("--lora", metavar="FILE")
    group.add_argument("--lora-scale", type=float, metavar="SCALE")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"))
    group.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"))


def wanted(args: argparse.Namespace) -> bool:
    """Whether a folder or captions are scored, and not a model that draws digits."""
    return args.folder is not None or args.captions is not None


def check_absent(args: argparse.Namespace) -> None:
    """Raise where a model that draws digits is scored and options for pictures are given."""
    given = [name for name, default in ONLY_HERE.items() if getattr(args, name) != default]
    if given:
        raise Problem(f"{_option(given[0])} goes with --folder or --captions, neither of which is given")


def run(args: argparse.Namespace) -> int:
    _check_values(args)
    check_out(args.out)
    cache = args.cache or args.out.with_suffix(".cache")
    check_writable("--cache", cache, cache)
    captions = None if args.captions is None else _read_captions(args)
    paths = None if args.folder is None else pictures_of("--folder", args.folder)
    if paths is not None and captions is not None and len(paths) != len(captions):
        raise Problem(f"--captions: {len(captions)} of them, and {len(paths)} pictures in {args.folder}")
    check_installed()
    _check_packages(args)
    reference = None if args.against is None else _Reference.of(args.against)

    with _processes(args) as group, threads(args.threads):
        drawing = None
        if paths is None:
            drawing = Drawing.prepare(args, captions[0])
            folder = args.pictures or cache / "pictures"
            check_writable("--pictures", folder, folder)
            folder.mkdir(parents=True, exist_ok=True)
            paths = [folder / f"{number:06d}.png" for number in range(len(captions))]
        networks = _Networks.load(args, group)
        if reference is not None:
            reference.check(networks, args.resolution)
        scored = _Set(cache / "scored", paths, args.resolution, networks, captions)
        if networks.clip is not None:
            scored.measures["clip"] = scored.clip_scores
        _work(group, "pictures", scored, drawing)
        if reference is not None and reference.paths is not None:
            reference.set = _Set(cache / "against", reference.paths, args.resolution, networks)
            _work(group, "real pictures", reference.set)
        group.wait()
        if group.rank == 0:
            figures, remarks = _figures(args, scored, reference)
            record = {
                "format": FORMAT,
                "command": _command(args),
                "settings": _settings(args, networks, len(paths)),
                "pictures": {"folder": str(args.folder), **scored.to_record()}
                if drawing is None
                else scored.to_record(),
                "captions": None if captions is None else _of_captions(args, captions),
                "against": None if reference is None else reference.to_record(),
                **_facts(drawing, networks),
                "figures": {name: figure._asdict() for name, figure in figures.items()},
            }
            if args.save_statistics is not None:
                _save_statistics(args, scored, networks)
            write(args.out, record)
            print(table(args, figures, remarks))
            say(f"\nthe same as JSON: {args.out}")
        group.wait()
    return 0


# ---------------------------------------------------------------------------------------------------------- checks


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_values(args: argparse.Namespace) -> None:
    other = [name for name, default in NOT_HERE.items() if getattr(args, name) != default]
    if other:
        raise Problem(f"{_option(other[0])} is for models that draw digits, without --folder and --captions")
    if args.folder is not None:
        of_drawing = ("model", "steps", "guidance", "n", "pictures", *OPTIONS)
        given = [name for name in of_drawing if getattr(args, name) is not None and name != "device"]
        if given:
            raise Problem(f"{_option(given[0])} is for drawing from --captions; the pictures of --folder are there")
    if args.clip is not None and args.captions is None:
        raise Problem("--clip compares pictures with their captions: --captions is not given")
    if args.clip_prefix is not None and args.clip is None:
        raise Problem("--clip-prefix goes with --clip, which is not given")
    if args.against is None and args.clip is None and args.save_statistics is None:
        raise Problem("nothing to compute: give --against, --clip or --save-statistics")
    if args.features is not None and args.against is None and args.save_statistics is None:
        raise Problem("--features goes with --against or --save-statistics")
    for name, least in (("n", 2), ("threads", 1), ("resolution", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise Problem(f"{_option(name)}: expected {least} or more, got {value}")
    if args.save_statistics is not None:
        if args.save_statistics.suffix != ".safetensors":
            raise Problem(f"--save-statistics: expected a .safetensors file, got {str(args.save_statistics)!r}")
        check_writable("--save-statistics", args.save_statistics, args.save_statistics.parent)
    if args.against is not None or args.save_statistics is not None:
        args.features = args.features or "inception"


def _check_packages(args: argparse.Namespace) -> None:
    import importlib.util

    needed = {"torchmetrics": "torchmetrics", "scipy": "scipy"} if args.against or args.clip else {}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise Problem(f"{', '.join(missing)} missing: pip install 'linattn[eval]'")


def _read_captions(args: argparse.Namespace) -> list[str]:
    try:
        captions = args.captions.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise Problem(f"--captions: cannot read {args.captions}: {line(error)}") from error
    captions = [caption.strip() for caption in captions]
    while captions and not captions[-1]:
        captions.pop()
    if args.n is not None and args.n > len(captions):
        raise Problem(f"--n: {args.captions} has {len(captions)} captions, got {args.n}")
    captions = captions[: args.n]
    if len(captions) < 2:
        raise Problem(f"--captions: expected 2 or more captions, one a line, {args.captions} has {len(captions)}")
    if args.seed + len(captions) > 2**63:
        raise Problem(f"--seed: expected less than 2^63 for the last picture, got {args.seed}")
    if "" in captions:
        # Left out, it would shift the seeds of all that follow.
        raise Problem(f"--captions: line {captions.index('') + 1} of {args.captions} is empty")
    return captions


def pictures_of(option: str, folder: Path) -> list[Path]:
    """All pictures in a folder and below it, in the order of their names.

    Raises:
        Problem: there is no such folder, or fewer than two pictures in it.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else f"does not exist; {instead_of(folder)}"
        raise Problem(f"{option}: expected a folder of pictures, {str(folder)!r} {what}")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if len(found) < 2:
        raise Problem(f"{option}: expected 2 or more pictures ({', '.join(SUFFIXES)}) in {folder}, found {len(found)}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


@dataclasses.dataclass
class _Reference:
    """What is compared with: pictures of a folder, or statistics from a file."""

    path: Path
    paths: list[Path] | None = None
    statistics: object = None
    set: _Set | None = None

    @classmethod
    def of(cls, path: Path) -> _Reference:
        if path.is_dir() or not path.exists():
            return cls(path, pictures_of("--against", path))
        from linattn.metrics import load_statistics

        try:
            return cls(path, statistics=load_statistics(path))
        except ValueError as error:
            raise Problem(f"--against: {line(error)}") from error

    def check(self, networks: _Networks, resolution: int | None) -> None:
        """Raise where statistics are not of this network and resolution."""
        if self.statistics is None:
            return
        for name, now in networks.about(resolution).items():
            then = self.statistics.about.get(name)
            if then not in (None, now):
                raise Problem(f"--against {self.path}: its statistics have {name} {then}, this run {now}")

    def read(self):
        from linattn.metrics import statistics

        return self.statistics if self.set is None else statistics(self.set.read("features"))

    def to_record(self) -> dict:
        if self.set is not None:
            return {"folder": str(self.path), **self.set.to_record()}
        (digest,) = file_digests([self.path]).values()
        return {"statistics": str(self.path), "n": self.statistics.n, "sha256": digest}


# ------------------------------------------------------------------------------------------------------- processes


@dataclasses.dataclass
class _Group:
    rank: int = 0
    world: int = 1
    first_here: bool = True  # of the processes of this machine
    device: str = "cpu"
    wait: Callable[[], None] = lambda: None


@contextlib.contextmanager
def _processes(args: argparse.Namespace) -> Iterator[_Group]:
    """The processes that `accelerate launch` started; without it, one."""
    machine = argparse.Namespace(device=args.device or "auto", dtype="auto")
    check_device(machine)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield _Group(device=machine.device)
        return
    from accelerate import PartialState

    # One that is done waits for the others; hours, where a killed run had got further on one of them.
    state = PartialState(cpu=machine.device == "cpu", timeout=datetime.timedelta(days=30))
    try:
        yield _Group(
            state.process_index,
            state.num_processes,
            state.is_local_main_process,
            str(state.device),
            state.wait_for_everyone,
        )
    finally:
        state.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- the work


@dataclasses.dataclass
class _Networks:
    """What looks at the pictures; each None where no figure needs it."""

    features: object
    clip: object
    clip_source: object
    clip_prefix: str

    @classmethod
    def load(cls, args: argparse.Namespace, group: _Group) -> _Networks:
        import transformers

        from linattn import feature_networks
        from linattn.metrics import Clip

        transformers.utils.logging.disable_progress_bar()
        features = clip = source = None
        if args.clip is not None:
            source = locate("--clip", args.clip)
            if source.path is None:
                source.path = fetch(source, None, ["*.json", "*.txt", "*.safetensors"])
            if not any(source.path.glob("*.safetensors")):
                raise Problem(f"--clip: {source.name} has no weights as safetensors (pickled ones are not read)")
            try:
                clip = Clip.from_pretrained(source.path, group.device)
            except Exception as error:  # what is wrong with the files of a folder comes out as any type
                raise Problem(f"--clip: cannot load {args.clip}: {type(error).__name__}: {line(error)}") from error
            source.files = file_digests(f for f in source.path.iterdir() if f.is_file())
        if args.against is not None or args.save_statistics is not None:
            try:
                if group.first_here:
                    features = feature_networks.load(args.features, group.device)
                group.wait()  # what is fetched is fetched once
                features = features or feature_networks.load(args.features, group.device, download=False)
            except feature_networks.Unavailable as error:
                raise Problem(f"--features: {error}") from error
        return cls(features, clip, source, args.clip_prefix or "")

    def about(self, resolution: int | None) -> dict[str, str]:
        """What two sets of features have to have in common."""
        return {
            "features": self.features.name,
            "weights": str(self.features.sha256),
            "size": str(self.features.size),
            "resolution": str(resolution),
        }


class _Set:
    """Pictures, and what is measured of each: chunk by chunk into safetensors files."""

    def __init__(
        self,
        folder: Path,
        paths: Sequence[Path],
        resolution: int | None,
        networks: _Networks,
        captions: list[str] | None = None,
    ):
        self.folder, self.paths, self.resolution = folder, paths, resolution
        self.networks, self.captions = networks, captions
        self.measures: dict[str, Callable] = {"sha256": self.digests}
        if networks.features is not None:
            self.measures["features"] = self.features

    def digests(self, pictures, part):
        """Of the pixels, as in the JSON of `linattn generate`."""
        import torch

        found = [hashlib.sha256(f"{p.shape[1]}x{p.shape[0]} ".encode() + p.tobytes()).digest() for p in pictures]
        return torch.tensor([list(digest) for digest in found], dtype=torch.uint8)

    def features(self, pictures, part):
        try:
            return self.networks.features(pictures)
        except ValueError as error:
            raise Problem(f"--features: {error} (pictures from {self.paths[part.start]} on)") from error

    def clip_scores(self, pictures, part):
        import torch

        from linattn.metrics import clip_scores

        captions = [self.networks.clip_prefix + caption for caption in self.captions[part]]
        return clip_scores([torch.from_numpy(p).permute(2, 0, 1) for p in pictures], captions, self.networks.clip)

    def _about(self, measure: str, part: slice) -> str:
        """A digest of everything that decides over the numbers of a chunk, so that files may change between runs."""
        about: list = [(str(path), (found := path.stat()).st_size, found.st_mtime_ns) for path in self.paths[part]]
        if measure != "sha256":
            about.append(self.resolution)
        if measure == "features":
            about.append(self.networks.about(self.resolution))
        if measure == "clip":
            about += [self.networks.clip_source.sha256, self.networks.clip_prefix, self.captions[part]]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def _file(self, measure: str, part: slice) -> Path:
        return self.folder / measure / f"{part.start:06d}.safetensors"

    def chunks(self, group: _Group | None = None) -> list[slice]:
        """All, or those of one process: all are shared out and not those that are missing, which changes meanwhile."""
        starts = range(0, len(self.paths), CHUNK)
        if group is not None:
            starts = starts[group.rank :: group.world]
        return [slice(start, min(start + CHUNK, len(self.paths))) for start in starts]

    def missing(self, part: slice) -> list[str]:
        from safetensors import SafetensorError, safe_open

        found = []
        for measure in self.measures:
            try:
                with safe_open(self._file(measure, part), framework="pt") as file:
                    there = (file.metadata() or {}).get("of") == self._about(measure, part)
            except (OSError, SafetensorError):
                there = False
            if not there:
                found.append(measure)
        return found

    def measure(self, part: slice) -> None:
        """Compute what is missing of a chunk."""
        from safetensors.torch import save_file

        from linattn.feature_networks import square

        if not (missing := self.missing(part)):
            return
        as_they_are = self._pictures(part)
        ready = as_they_are
        if self.resolution is not None and missing != ["sha256"]:
            ready = [square(picture, self.resolution) for picture in as_they_are]
        for measure in missing:
            about = self._about(measure, part)
            tensor = self.measures[measure](as_they_are if measure == "sha256" else ready, part)
            path = self._file(measure, part)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{path.name}.part")
            try:
                save_file({"values": tensor.contiguous()}, unfinished, metadata={"of": about})
                os.replace(unfinished, path)
            except OSError as error:
                raise Problem(f"cannot write {path}: {line(error)}") from error
            finally:
                unfinished.unlink(missing_ok=True)

    def _pictures(self, part: slice) -> list:
        from PIL import Image, UnidentifiedImageError

        from linattn.feature_networks import read_picture

        pictures = []
        for path in self.paths[part]:
            try:
                pictures.append(read_picture(path))
            except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
                raise Problem(f"cannot read {path} as a picture: {line(error)}") from error
        return pictures

    def read(self, measure: str):
        """What was measured of all pictures, in their order."""
        import torch
        from safetensors.torch import load_file

        parts = [load_file(self._file(measure, part))["values"] for part in self.chunks()]
        if len({part.shape[1:] for part in parts}) > 1:
            raise Problem(f"--features: {self.networks.features.name} gives different numbers of features")
        return torch.cat(parts)

    def to_record(self) -> dict:
        return {"n": len(self.paths), "sha256": hashlib.sha256(self.read("sha256").numpy().tobytes()).hexdigest()}


def _work(group: _Group, title: str, pictures: _Set, drawing: Drawing | None = None) -> None:
    """Draw and measure the chunks of this process, as far as that is not done."""
    from tqdm.auto import tqdm

    mine = pictures.chunks(group)
    numbers = [number for part in mine for number in range(part.start, part.stop)]
    undrawn: set[int] = set()
    if drawing is not None:  # all before any: what is in the way is said before hours are spent
        undrawn = {i for i in numbers if not drawing.is_drawn(pictures.paths[i], i, pictures.captions[i])}
    with contextlib.ExitStack() as stack:
        bar = tqdm(total=len(numbers), unit="picture", desc=title, disable=True if group.rank else None)
        stack.enter_context(bar)
        if undrawn:
            say(f"{len(undrawn)} pictures to draw" + (f" in process {group.rank}" if group.world > 1 else ""))
            stack.enter_context(drawing.loaded())
        for part in mine:
            for number in range(part.start, part.stop):
                if number in undrawn:
                    drawing.draw(pictures.paths[number], number, pictures.captions[number])
                    bar.update()
            pictures.measure(part)
            bar.update(sum(number not in undrawn for number in range(part.start, part.stop)))


# ------------------------------------------------------------------------------------------------------ the results


def _figures(args: argparse.Namespace, scored: _Set, reference: _Reference | None) -> tuple[dict, list[str]]:
    """The figures by name, and what has to be said of them."""
    from linattn import metrics

    figures, remarks = {}, []
    if reference is not None:
        features, real = scored.read("features"), reference.read()
        try:
            figures["frechet_distance"] = metrics.frechet_distance(features, real)
            if real.features is None:
                remarks.append(f"{args.against} has no features: no precision, recall, density and coverage.")
            elif min(len(features), len(real.features)) <= metrics.DENSITY_NEIGHBOURS:
                remarks.append(
                    f"Precision, recall, density and coverage need more than {metrics.DENSITY_NEIGHBOURS} pictures of "
                    "each kind."
                )
            else:
                figures |= metrics.precision_recall(features, real.features)
        except ValueError as error:
            raise Problem(line(error)) from error
        n, d = features.shape
        if n <= d or real.n <= d:
            remarks.append(
                f"{min(n, real.n)} pictures for {d} features: the Frechet distance says more about their number than "
                "about them."
            )
    if "clip" in scored.measures:
        figures["clip_score"] = metrics.mean_figure(scored.read("clip"))
    return figures, remarks


def table(args: argparse.Namespace, figures: dict, remarks: list[str]) -> str:
    """The figures as text."""
    from linattn.demos._layout import table
    from linattn.metrics import LEVEL

    distance = "FID" if args.features == "inception" else f"Frechet distance, {args.features}"
    titles = {"frechet_distance": distance, **TITLES}
    rows = []
    for name, figure in figures.items():
        places = 2 if titles[name] in ("FID", TITLES["clip_score"]) else 3
        ends = "–" if figure.low is None else f"[{figure.low:.{places}f}, {figure.high:.{places}f}]"
        rows.append([titles[name], f"{figure.value:.{places}f}", ends, str(figure.n)])
    lines = [table(["figure", "value", f"{LEVEL:.0%} interval", "n"], rows)] if rows else []
    return "\n\n".join([*lines, *remarks])


def _save_statistics(args: argparse.Namespace, scored: _Set, networks: _Networks) -> None:
    from linattn.metrics import save_statistics, statistics

    args.save_statistics.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_statistics(args.save_statistics, statistics(scored.read("features"), networks.about(args.resolution)))
    except OSError as error:
        raise Problem(f"cannot write {args.save_statistics}: {line(error)}") from error
    say(f"statistics: {args.save_statistics}")


def _settings(args: argparse.Namespace, networks: _Networks, n: int) -> dict:
    from linattn import metrics

    found = {"n": n, "resolution": args.resolution, "level": metrics.LEVEL}
    if networks.features is not None:
        found["features"] = {key: getattr(networks.features, key) for key in ("name", "size", "sha256")}
    if args.against is not None:
        found |= {"neighbours": metrics.NEIGHBOURS, "density_neighbours": metrics.DENSITY_NEIGHBOURS}
    if networks.clip is not None:
        found["clip_prefix"] = networks.clip_prefix
    return found


def _of_captions(args: argparse.Namespace, captions: list[str]) -> dict:
    text = "".join(f"{caption}\n" for caption in captions)
    return {"file": str(args.captions), "n": len(captions), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _facts(drawing: Drawing | None, networks: _Networks) -> dict:
    """What was read, and what besides decides over the last digits."""
    import importlib.metadata

    from linattn.cli import _record, doctor

    sources: dict = {} if networks.clip_source is None else {"clip": networks.clip_source.to_record()}
    facts = {"versions": doctor.versions(), "machine": doctor.processor()}
    if drawing is not None:
        request = {key: value for key, value in dataclasses.asdict(drawing.request).items() if key != "prompt"}
        sources |= {key: source.to_record() for key, source in drawing.sources.items() if source is not None}
        facts = {"request": request, **_record.facts(drawing.request)}
    for name in ("torchmetrics", "scipy", "scikit-learn", "clean-fid"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts["versions"][name] = importlib.metadata.version(name)
    return {"sources": sources, **facts}


def _command(args: argparse.Namespace) -> str:
    """The command line that gives the same figures."""
    import torch

    words = ["linattn", "eval"]
    given = ("folder", "captions", "n", "against", "features", "resolution", "clip", "clip_prefix", "save_statistics")
    for name in dict.fromkeys((*given, *OPTIONS, "pictures", "cache")):
        if (value := getattr(args, name)) is not None:
            words += [_option(name), value]
    words += ["--seed", args.seed] * (args.folder is None)
    return shlex.join(map(str, [*words, "--threads", torch.get_num_threads(), "--out", args.out]))
