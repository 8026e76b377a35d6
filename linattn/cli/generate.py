"""Draw a picture from a text with linear (or stock) self-attention, offline with the bundled model by default.

Beside the picture FILE.png stands FILE.json with everything that made it: all options resolved, digests of the files of
model and weights, versions, device, scheduler, seeds, times. `--from FILE.json` draws the same picture again, bit for
bit on the same machine. The paths of what was written go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from linattn._quiet import quiet_diffusers
from linattn.paths import instead_of

HELP = "draw a picture from a text, and a JSON beside it that draws it again"

#: Names the layout of the JSON; another layout gets another number.
FORMAT = "linattn generate 1"
#: Class in `model_index.json` -> the class that starts from a picture.
PIPELINES = {
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
DEFAULTS = {
    "attention": "linfusion",
    "steps": 25,
    "seed": 0,
    "count": 1,
    "lora_scale": 1.0,
    "strength": 0.8,
    "device": "auto",
    "dtype": "auto",
}
BUNDLED_GUIDANCE = 2.5  # what the bundled models were scored with
# What may be given with --from. Files may have moved, and the digests say whether they are the same. Another device or
# dtype gives nearly the same picture; without them, one that was drawn on a GPU could be drawn nowhere else.
MAY_CHANGE = ("model", "weights", "lora", "image", "device", "dtype")

EXAMPLES = """\
examples:
  linattn generate "a seven, a two and a four"
  linattn generate "a three and a nine" --attention stock --seed 7 --count 4 --out digits.png
  linattn generate --from threes.json --out again.png
  linattn generate "an astronaut riding a horse on Mars" --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --size 1024 --steps 30 --guidance 7.5
  linattn generate "the same in oil" --model ./my_pipeline --weights ./my_student --image in.png --strength 0.6
"""


class Problem(Exception):
    """Something that the user can put right; its message is the one line they see."""


@dataclasses.dataclass
class Request:
    """What is to be drawn. The paths of a record are absolute, so that it can be used from anywhere."""

    prompt: str
    negative_prompt: str | None
    model: str
    attention: str
    weights: str | None
    steps: int
    guidance: float | int | None
    seed: int
    count: int
    width: int | None
    height: int | None
    lora: str | None
    lora_scale: float | int | None
    image: str | None
    strength: float | int | None
    device: str
    dtype: str


@dataclasses.dataclass
class Source:
    """Where a model comes from: a bundled name, a folder, a repository of the hub, or one file."""

    option: str
    name: str
    kind: str
    path: Path | None
    revision: str | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """One digest for all files, names included; one file has its own."""
        if self.kind == "file":
            return next(iter(self.files.values()))
        return hashlib.sha256("".join(f"{k} {v}\n" for k, v in sorted(self.files.items())).encode()).hexdigest()

    def to_record(self) -> dict:
        facts = {"kind": self.kind, "name": self.name, "revision": self.revision, "sha256": self.sha256}
        return facts | {"files": self.files}


@dataclasses.dataclass
class Layout:
    """What the configs of a pipeline say, before any weights are read."""

    class_name: str
    components: tuple[str, ...]
    unet: dict
    multiple: int  # of which width and height must be, pixels
    width: int  # of the pictures it was trained for, pixels
    height: int
    train_steps: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # No defaults here: with --from it matters which options were given.
    parser.add_argument("prompt", nargs="?", help="what to draw")
    parser.add_argument(
        "--model",
        metavar="NAME|FOLDER",
        help="Stable Diffusion 1.x, 2.x or XL: folder, hub name, or name of a bundled model (a folder that has the "
        "name of a bundled one: ./NAME) [the bundled one]",
    )
    parser.add_argument("--attention", choices=("linfusion", "stock"), help="self-attention of the UNet [linfusion]")
    parser.add_argument(
        "--weights",
        metavar="NAME|FOLDER|base|published",
        help="LinFusion weights: folder or hub name; 'published': those published for the model; 'base': the model's "
        "own projections, undistilled [for a bundled model its bundled student, else base; for others published]",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to draw; needs --guidance above 1 [none]")
    parser.add_argument("--steps", type=int, metavar="N", help=f"denoising steps [{DEFAULTS['steps']}]")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help=f"how strongly to follow the prompt, 1 or less: no guidance [bundled models {BUNDLED_GUIDANCE:g}, "
        "Stable Diffusion 7.5, XL 5]",
    )
    parser.add_argument("--seed", type=int, metavar="N", help=f"of the first picture [{DEFAULTS['seed']}]")
    parser.add_argument("--size", metavar="N|WxH", help="pixels, N for a square [what the model was trained for]")
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="pictures FILE-1.png to FILE-N.png with the seeds SEED to SEED+N-1, each the same as drawn alone [1]",
    )
    parser.add_argument("--lora", metavar="FILE", help="a LoRA as safetensors")
    parser.add_argument("--lora-scale", type=float, metavar="SCALE", help="strength of the LoRA [1]")
    parser.add_argument("--image", metavar="FILE", help="start from this picture; it gives the size unless --size does")
    parser.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help=f"how much of --image to redraw, above 0 to 1; this share of the steps is done [{DEFAULTS['strength']:g}]",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="where to draw [auto: cuda where there is one]"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="type of weights and arithmetic [auto: float16 on cuda, float32 on a cpu]",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"{', '.join(IMAGE_SUFFIXES)}; the JSON beside it [generated.png]"
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="from_record",
        metavar="FILE.json",
        help="draw what this JSON records. Other model files than recorded are an error, since the picture could not "
        "be the same; other versions or another machine a warning. Only --out goes with it, and for what has moved "
        f"{', '.join('--' + name for name in MAY_CHANGE)}",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except Problem as problem:
        print(f"linattn generate: {problem}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:  # a name that is too long, a disk that is gone
        print(f"linattn generate: {_line(error)}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    # What costs nothing is checked first, then what needs torch, then what needs the hub, and only then is drawn.
    record = None if args.from_record is None else _read_record(args.from_record)
    request = _request_from(args) if record is None else _request_again(args, record)
    _check_values(request)
    files = _output_files(args.out or Path("generated.png"), request, args.from_record, record)
    for option, path in (("--lora", request.lora), ("--image", request.image)):
        _check_file(option, path)
    _check_installed(request)
    image = None if request.image is None else _open(request.image)
    model = _locate("--model", request.model)
    layout = None
    if model.path is not None:
        layout = _layout(model)
        _check_size(request, layout, image)
    _check_device(request)

    revisions = {key: source["revision"] for key, source in (record or {"sources": {}})["sources"].items() if source}
    if layout is None:
        model.path = _fetch(model, revisions.get("model"), ["*.json"])
        layout = _layout(model)
        _check_size(request, layout, image)
    weights = _weights(request, model, layout, revisions.get("weights"))
    if model.kind == "hub":
        _fetch_pipeline(model)
    _check_safetensors(model, layout)
    sources = _sources(request, model, layout, weights)
    files.record.parent.mkdir(parents=True, exist_ok=True)
    with _arithmetic(request, record):
        facts = _facts(request)
        differences = [] if record is None else _compare(record, sources, facts)
        pipe = _load(request, layout, sources)
        _say(_summary(request, layout))
        done = {
            "format": FORMAT,
            "request": dataclasses.asdict(request),
            "sources": {key: None if source is None else source.to_record() for key, source in sources.items()},
            **facts,
            "scheduler": {"class": type(pipe.scheduler).__name__, "config": dict(pipe.scheduler.config)},
            "pictures": [],
        }
        for picture in _draw(pipe, request, image, files):
            done["pictures"].append(picture)
            # After every picture: what was drawn before Ctrl-C can be drawn again, too.
            _write(files.record, done)
            print(files.record.with_name(picture["file"]), flush=True)
    print(files.record, flush=True)
    if record is not None:
        _say(_verdict(record["pictures"], done["pictures"], differences))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------ the request


def _request_from(args: argparse.Namespace) -> Request:
    """The request as the options say it; what the model decides (guidance, size) is still None."""
    from linattn import bundled

    if args.prompt is None:
        raise Problem('which prompt? For example: linattn generate "a seven, a two and a four"')
    for option, needs in (("strength", "image"), ("lora_scale", "lora")):
        if getattr(args, option) is not None and getattr(args, needs) is None:
            raise Problem(f"--{option.replace('_', '-')} goes with --{needs}, which is not given")
    values = {name: getattr(args, name) for name in _names() if hasattr(args, name)}
    values |= {name: default for name, default in DEFAULTS.items() if values[name] is None}
    if args.image is None:
        values["strength"] = None
    if args.lora is None:
        values["lora_scale"] = None
    width, height = (None, None) if args.size is None else _parse_size(args.size)
    request = Request(**values | {"width": width, "height": height, "model": args.model or bundled.path().name})
    if request.attention == "stock" and request.weights is not None:
        raise Problem(f"--weights {request.weights} goes with --attention linfusion, not with stock")
    return request


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(Request)]


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*(?:[xX×]\s*(\d+)\s*)?", text)
    if match is None:
        raise Problem(f"--size: expected pixels as N or WIDTHxHEIGHT, for example 512 or 768x512, got {text!r}")
    width = int(match[1])
    return width, int(match[2] or width)


def _read_record(path: Path) -> dict:
    """The JSON that an earlier run wrote, checked for what will be read of it."""
    _check_file("--from", str(path))
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"--from: cannot read {path} as JSON: {_line(error)}") from error
    form = record.get("format") if isinstance(record, dict) else None
    if form != FORMAT:
        raise Problem(f"--from: {path} is no record of linattn generate: expected format {FORMAT!r}, got {form!r}")
    shape = {"request": dict, "sources": dict, "versions": dict, "machine": dict, "pictures": list}
    wrong = [key for key, kind in shape.items() if not isinstance(record.get(key), kind)]
    types = typing.get_type_hints(Request)
    if not wrong:
        wrong += [f"request.{name}" for name in set(types) ^ set(record["request"])]
        wrong += [f"request.{name}" for name, kind in types.items() if not _is_a(record["request"].get(name), kind)]
        wrong += [
            f"sources.{name}"
            for name in ("model", "weights", "lora", "image")
            if not _is_source(record["sources"].get(name), optional=name != "model")
        ]
        wrong += [
            f"pictures.{index}"
            for index, picture in enumerate(record["pictures"])
            if not (
                isinstance(picture, dict)
                and isinstance(picture.get("file"), str)
                and "seed" in picture
                and "pixels_sha256" in picture
            )
        ]
    if wrong:
        raise Problem(f"--from: {path} is damaged: {', '.join(sorted(set(wrong)))} missing or of the wrong type")
    return record


def _is_a(value, kind) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_source(source, optional: bool) -> bool:
    if source is None:
        return optional
    if not isinstance(source, dict) or "revision" not in source:
        return False
    return isinstance(source.get("sha256"), str) and isinstance(source.get("files"), dict)


def _request_again(args: argparse.Namespace, record: dict) -> Request:
    fixed = [name for name in _names() if name not in MAY_CHANGE and getattr(args, name, None) is not None]
    fixed += ["size"] * (args.size is not None)
    if fixed:
        given = ", ".join(name if name == "prompt" else f"--{name.replace('_', '-')}" for name in fixed)
        raise Problem(
            f"--from draws what was recorded, so {given} cannot be given with it (only --out and what has moved)"
        )
    moved = {name: getattr(args, name) for name in MAY_CHANGE if getattr(args, name) is not None}
    for name in ("weights", "lora", "image"):
        if name in moved and record["sources"][name] is None:
            raise Problem(f"--from: the recorded picture was drawn without --{name}, so it cannot be given")
    return Request(**record["request"] | moved)


def _check_values(request: Request) -> None:
    if not request.prompt.strip():
        raise Problem("the prompt is empty; say what to draw")
    for name, least in (("steps", 1), ("count", 1), ("seed", 0)):
        if getattr(request, name) < least:
            raise Problem(f"--{name}: expected {least} or more, got {getattr(request, name)}")
    if request.seed + request.count > 2**63:
        raise Problem(f"--seed: expected less than 2^63 for the last picture, got {request.seed}")
    for name in ("guidance", "lora_scale"):
        value = getattr(request, name)
        if value is not None and not math.isfinite(value):
            raise Problem(f"--{name.replace('_', '-')}: expected a finite number, got {value}")
    if request.guidance is not None and request.guidance < 0:
        raise Problem(f"--guidance: expected 0 or more, got {request.guidance:g}")
    if request.negative_prompt is not None and request.guidance is not None and request.guidance <= 1:
        raise Problem(f"--negative-prompt needs --guidance above 1, got {request.guidance:g}")
    if request.strength is not None:
        if not 0 < request.strength <= 1:
            raise Problem(f"--strength: expected above 0 and at most 1, got {request.strength:g}")
        if int(request.steps * request.strength) < 1:
            raise Problem(
                f"--strength {request.strength:g} of {request.steps} steps is less than one step: "
                f"use --steps {math.ceil(1 / request.strength)} or more"
            )


# ------------------------------------------------------------------------------------------------------------- files


@dataclasses.dataclass
class Files:
    pictures: list[Path]
    record: Path


def _output_files(out: Path, request: Request, source: Path | None, record: dict | None) -> Files:
    """Where the results go; raises unless they can be written there without harm."""
    if out.suffix.lower() not in IMAGE_SUFFIXES:
        got = f"{out.suffix!r}" if out.suffix else "none"
        raise Problem(
            f"--out {out}: expected an image file, one of {', '.join(IMAGE_SUFFIXES)}; its extension is {got}"
        )
    digits = len(str(request.count))
    numbers = [f"-{i + 1:0{digits}}" for i in range(request.count)] if request.count > 1 else [""]
    files = Files([out.with_name(f"{out.stem}{n}{out.suffix}") for n in numbers], out.with_suffix(".json"))

    existing = out.parent
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        # The permission bits do not say it (root, read-only mounts), a try does.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise Problem(f"--out {out}: cannot write into {existing}: {error.strerror or error}") from error
    for path in (*files.pictures, files.record):
        if path.is_dir():
            raise Problem(f"--out {out}: {path} is a folder")

    # Nothing that is needed to draw the picture again may be overwritten, and no JSON of somebody else.
    keep = {"--image": request.image, "--lora": request.lora, "--from": source}
    if record is not None:
        keep |= {f"the picture of --from, {p['file']}": source.parent / p["file"] for p in record["pictures"]}
    for what, path in keep.items():
        if path is not None and any(_same(path, mine) for mine in (*files.pictures, files.record)):
            raise Problem(f"--out {out} would overwrite {what}: choose another name")
    if files.record.exists() and not _is_record(files.record):
        raise Problem(f"--out {out} would overwrite {files.record}, which is no record of linattn generate")
    return files


def _same(a, b) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _is_record(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and str(found.get("format", "")).startswith("linattn generate")


def _check_file(option: str, path: str | None) -> None:
    """Raise unless this is a file of the kind the option takes."""
    if path is None:
        return
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else f"does not exist; {instead_of(path)}"
        raise Problem(f"{option}: expected a file, {path!r} {what}")
    if option == "--lora" and Path(path).suffix != ".safetensors":
        raise Problem(
            f"--lora: expected a .safetensors file (nothing else is read: a pickle can run code), got {path!r}"
        )


def _write(path: Path, record: dict) -> None:
    try:
        path.write_text(json.dumps(record, indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}") from error


def _line(error: BaseException) -> str:
    """An error of a library in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:500] + " ..."


# ----------------------------------------------------------------------------------------------- model and weights


def _check_installed(request: Request) -> None:
    needed = ["diffusers", "transformers", "accelerate", "PIL", "safetensors"] + ["peft"] * (request.lora is not None)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise Problem(f"{', '.join(missing)} missing: pip install 'linattn[diffusers]'")
    # Before they are imported: remarks about the libraries' own optional parts would bury what matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Bit for bit on CUDA needs it, and it must stand before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if request.lora is not None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(request.lora, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise Problem(f"--lora: cannot read {request.lora}: {_line(error)}") from error


def _locate(option: str, name: str) -> Source:
    """Say what a name means, without asking the hub: a source from there has no path yet."""
    from linattn import bundled

    if name in bundled.names():
        return Source(option, name, "bundled", bundled.path(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(option, str(path.absolute()), "folder", path.absolute())
    if path.exists():
        raise Problem(f"{option}: expected a folder or a hub name, {name!r} is a file")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return Source(option, name, "hub", None)
    raise Problem(f"{option}: the folder {name!r} does not exist; {instead_of(name)}")


def _fetch(source: Source, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the hub's cache with these files of a repository, fetched where they are missing."""
    from huggingface_hub import snapshot_download

    source.revision = revision
    with _hub_errors(source):
        path = Path(snapshot_download(source.name, revision=revision, allow_patterns=patterns))
    source.revision = path.name
    return path


def _fetch_pipeline(source: Source) -> None:
    from diffusers import DiffusionPipeline

    with _hub_errors(source), quiet_diffusers():
        source.path = Path(DiffusionPipeline.download(source.name, revision=source.revision, use_safetensors=True))


@contextlib.contextmanager
def _hub_errors(source: Source):
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{source.option}: {source.name!r} is no folder here"
    if Path(source.name).parent.is_dir():
        what += f" ({instead_of(source.name)})"
    try:
        yield
    except GatedRepoError as error:
        raise Problem(f"{what}, and on the hub its terms must be accepted first, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise Problem(f"{what}, and the hub has no such repository (or a private one: `hf auth login`)") from error
    except RevisionNotFoundError as error:
        raise Problem(f"{what}, and the hub no longer has its revision {source.revision}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, so the hub was not asked: unset it, or give a folder"
        else:
            why = "the hub could not be reached: check the network, or give a folder"
        raise Problem(f"{what} and not (completely) in the cache {constants.HF_HUB_CACHE}; {why}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise Problem(f"{what}, and the hub could not give it: {_line(error)}") from error


def _config(source: Source, name: str) -> dict:
    path = source.path / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{source.option}: {source.name} is incomplete, it has no {name}") from None
    except (OSError, ValueError) as error:
        raise Problem(f"{source.option}: cannot read {path}: {_line(error)}") from error
    if not isinstance(found, dict):
        raise Problem(f"{source.option}: {path} holds no JSON object")
    return found


def _layout(source: Source) -> Layout:
    """Read the configs of a pipeline; raises for what cannot be drawn with, before weights are touched."""
    where = f"{source.option}: {source.name}"
    if not (source.path / "model_index.json").is_file():
        hint = ""
        if (source.path / "config.json").is_file():
            hint = f"; it holds a single {_config(source, 'config.json').get('_class_name', 'model')}"
        raise Problem(f"{where} is no diffusers pipeline, it has no model_index.json{hint}")
    index = _config(source, "model_index.json")
    class_name = index.get("_class_name")
    components = tuple(
        name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1] is not None
    )
    if "unet" not in components:
        raise Problem(f"{where} is a {class_name}, which has no UNet; this draws with {' or '.join(PIPELINES)}")
    if class_name not in PIPELINES:
        raise Problem(f"{where} is a {class_name}; this draws with {' or '.join(PIPELINES)}")
    absent = [name for name in ("vae", "text_encoder", "tokenizer", "scheduler") if name not in components]
    absent += [name for name in components if not (source.path / name).is_dir()]
    if absent:
        raise Problem(f"{where} is incomplete, it has no {', '.join(absent)}")

    unet, vae = _config(source, "unet/config.json"), _config(source, "vae/config.json")
    channels = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels[0] != channels[1]:
        raise Problem(
            f"{where}: its UNet takes {channels[0]} channels and its VAE makes {channels[1]}: it is for inpainting or "
            "editing, not for drawing from a text alone"
        )
    factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    sample = unet.get("sample_size") or 64
    height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    return Layout(
        class_name=class_name,
        components=components,
        unet=unet,
        multiple=math.lcm(8, factor),  # the pipelines of diffusers insist on 8 even where the VAE's factor is less
        width=width * factor,
        height=height * factor,
        train_steps=_config(source, "scheduler/scheduler_config.json").get("num_train_timesteps", 1000),
    )


def _check_size(request: Request, layout: Layout, image) -> None:
    """Fill in the size, and raise where the model cannot draw it (or not in so many steps)."""
    multiple = layout.multiple
    if request.width is None and image is not None:
        request.width, request.height = (max(multiple, round(side / multiple) * multiple) for side in image.size)
    elif request.width is None:
        request.width, request.height = layout.width, layout.height
    near = [
        sorted({max(multiple, s // multiple * multiple), max(1, -(-s // multiple)) * multiple})
        for s in (request.width, request.height)
    ]
    if [request.width] != near[0] or [request.height] != near[1]:
        sizes = dict.fromkeys(f"{near[0][i]}x{near[1][i]}" for i in (0, -1))
        raise Problem(
            f"--size: width and height must be multiples of {multiple} pixels for this model, got "
            f"{request.width}x{request.height}; the nearest are {' and '.join(sizes)}"
        )
    if request.steps > layout.train_steps:
        raise Problem(f"--steps: expected at most the {layout.train_steps} of this model, got {request.steps}")


def _open(path: str):
    """A picture in RGB, the right way up."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise Problem(f"--image: cannot read {path} as a picture: {_line(error)}") from error


def _check_device(request: Request) -> None:
    import torch

    if request.device == "auto":
        request.device = "cuda" if torch.cuda.is_available() else "cpu"
    if request.device == "cuda" and not torch.cuda.is_available():
        raise Problem("--device cuda: torch finds no CUDA device here; use --device cpu")
    if request.dtype == "auto":
        request.dtype = "float16" if request.device == "cuda" else "float32"
    if request.device == "cpu" and request.dtype == "float16":
        raise Problem("--dtype float16 is for CUDA devices; on a CPU use float32 or bfloat16")
    if request.device == "cuda" and request.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise Problem(f"--dtype bfloat16: {torch.cuda.get_device_name()} has no bfloat16; use float16 or float32")


def _weights(request: Request, model: Source, layout: Layout, revision: str | None) -> Source | None:
    """Find the LinFusion weights and try them on a UNet without memory; None where there are none to load."""
    if request.attention == "stock":
        return None
    import torch
    from diffusers import UNet2DConditionModel

    from linattn.adapters import LinFusion

    if request.weights is None:
        if model.kind == "bundled":
            request.weights = _bundled_student(model.name) or "base"
        else:
            request.weights = "published"
    with torch.device("meta"), quiet_diffusers():
        try:
            unet = UNet2DConditionModel.from_config(layout.unet)
            if request.weights == "base":
                LinFusion.get_default_config(unet)  # raises where there is nothing to replace
                return None
        except (ValueError, TypeError, RuntimeError) as error:
            raise Problem(f"--model: the UNet of {model.name} cannot be built: {_line(error)}") from error
    if request.weights == "published":
        request.weights = _published(model, unet)
    source = _locate("--weights", request.weights)
    if source.kind == "hub":
        source.path = _fetch(source, revision, ["config.json", "*.safetensors"])
    request.weights = source.name
    if not (source.path / "config.json").is_file():
        raise Problem(f"--weights: {source.name} holds no LinFusion weights, it has no config.json")
    config = _config(source, "config.json")
    if not isinstance(config.get("modules_list"), list):
        raise Problem(
            f"--weights: {source.name} holds a {config.get('_class_name', 'model')} and no LinFusion weights "
            "(config.json has no modules_list)"
        )
    if not any(source.path.glob("*.safetensors")):
        raise Problem(f"--weights: {source.name} has no .safetensors file (pickled weights are not read)")
    try:
        with torch.device("meta"), quiet_diffusers():
            LinFusion.from_config(config).mount_to(unet)
    except (ValueError, TypeError, KeyError) as error:
        raise Problem(f"--weights: {source.name} does not go with {model.name}: {_line(error)}") from error
    return source


def _bundled_student(model: str) -> str | None:
    """The bundled LinFusion weights for a bundled model: their folder's name begins with the model's."""
    from linattn import bundled

    for name in bundled.names():
        config = bundled.path(name) / "config.json"
        if name.startswith(model) and config.is_file():
            found = _config(Source("--weights", name, "bundled", config.parent), config.name)
            if found.get("_class_name") == "LinFusion":
                return name
    return None


def _published(model: Source, unet) -> str:
    from linattn.adapters import LinFusion
    from linattn.adapters.linfusion import KNOWN_REPOSITORIES, PUBLISHED

    family = KNOWN_REPOSITORIES.get(model.name) or LinFusion.architecture(unet)
    if family is None:
        try:
            LinFusion.construct_for(unet=unet, pipe_name_path=model.name)
        except ValueError as error:
            raise Problem(f"{_line(error)}. Here: --weights NAME|FOLDER or --weights base") from error
    return PUBLISHED[family]


def _check_safetensors(source: Source, layout: Layout) -> None:
    """Raise where a component has weights in another form only: they are not read, whatever they are."""
    for name in layout.components:
        folder = source.path / name
        if (folder / "config.json").is_file() and not any(_is_weights(file) for file in folder.iterdir()):
            found = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".ckpt", ".pt", ".safetensors"))
            if not found and source.kind == "hub":
                found = [f"none in the cache {folder}: fetch them with a network"]
            raise Problem(
                f"{source.option}: {name} of {source.name} has no weights as safetensors (pickled ones are not read): "
                f"expected model.safetensors or diffusion_pytorch_model.safetensors, found {', '.join(found) or 'none'}"
            )


def _is_weights(file: Path) -> bool:
    # Files with a variant in their names (model.fp16.safetensors) are not what from_pretrained reads.
    return re.fullmatch(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors", file.name) is not None


def _sources(request: Request, model: Source, layout: Layout, weights: Source | None) -> dict[str, Source | None]:
    """Everything that is read from disk, with the digests of its files."""
    parts = [model.path / "model_index.json"]
    for name in layout.components:
        parts += [f for f in (model.path / name).iterdir() if f.suffix in (".json", ".txt", ".model") or _is_weights(f)]
    sources = {"model": model, "weights": weights, "lora": None, "image": None}
    request.model = model.name
    wanted = {"model": parts}
    if weights is not None:
        wanted["weights"] = [weights.path / "config.json", *weights.path.glob("*.safetensors")]
    for key in ("lora", "image"):
        if getattr(request, key) is not None:
            path = Path(getattr(request, key)).absolute()
            setattr(request, key, str(path))
            sources[key] = Source(f"--{key}", str(path), "file", path)
            wanted[key] = [path]
    try:
        with ThreadPoolExecutor(4) as pool:  # reading and hashing both let other threads run
            for key, files in wanted.items():
                source = sources[key]
                top = source.path.parent if source.kind == "file" else source.path
                names = sorted(file.relative_to(top).as_posix() for file in files)
                source.files = dict(zip(names, pool.map(_sha256, [top / name for name in names]), strict=True))
    except OSError as error:
        raise Problem(f"cannot read {error.filename}: {error.strerror}") from error
    return sources


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------------------- records


def _facts(request: Request) -> dict:
    """What besides the request and the files decides over the last bit."""
    import torch

    from linattn import backend
    from linattn.cli import doctor

    cpu = doctor.processor()
    name = torch.cuda.get_device_name() if request.device == "cuda" else cpu["name"]
    chosen = None
    if request.attention == "linfusion":
        try:
            chosen = backend.choose("linear_attention", torch.device(request.device), getattr(torch, request.dtype))
        except ValueError as error:  # one is forced that cannot run here
            raise Problem(_line(error)) from error
    return {
        "versions": doctor.versions(),
        "machine": {
            "device": request.device,
            "dtype": request.dtype,
            "name": name,
            "threads": cpu["threads"],
            "torch_cpu": cpu["torch"],
            "linattn_cpu": cpu["kernels"],
        },
        "backend": chosen,
    }


def _compare(record: dict, sources: dict[str, Source | None], facts: dict) -> list[str]:
    """What differs from the record. Other files are an error: with them the picture is another one for certain.

    Other versions or another machine are not: the picture will look the same though its bits may differ, and a record
    would be worthless after the next upgrade if it could not be drawn. Whether they differ is seen in the end.
    """
    for key, source in sources.items():
        before = record["sources"][key]
        if (before is None) != (source is None):
            had, has = ("none" if s is None else "some" for s in (before, source))
            raise Problem(f"--from: {key} recorded: {had}, here: {has}; the picture could not be the same")
        if source is not None and before["sha256"] != source.sha256:
            names = sorted(set(before["files"]) | set(source.files))
            changed = [name for name in names if before["files"].get(name) != source.files.get(name)]
            if source.kind == "file":
                changed = [source.name]
            raise Problem(
                f"--from: {key} is not what the picture was drawn with: {', '.join(changed[:3])}"
                f"{' ...' if len(changed) > 3 else ''} of {source.name} differ (sha256); where the recorded files have "
                f"moved to, say {source.option}, else draw anew without --from"
            )
    differences = []
    for title, before, now in (
        ("", {"backend": record.get("backend")}, {"backend": facts["backend"]}),
        ("", record["versions"], facts["versions"]),
        ("machine ", record["machine"], facts["machine"]),
    ):
        differences += [
            f"{title}{name} {before.get(name)} then, {now.get(name)} now"
            for name in sorted(set(before) | set(now))
            if before.get(name) != now.get(name) and name != "threads"
        ]
    if differences:
        _say(f"warning: the last bits may differ from the recorded picture: {'; '.join(differences)}")
    return differences


def _verdict(before: list[dict], now: list[dict], differences: list[str]) -> str:
    known = {picture["seed"]: picture["pixels_sha256"] for picture in before}
    other = [p["file"] for p in now if p["seed"] in known and p["pixels_sha256"] != known[p["seed"]]]
    if not other:
        return "the same pixels as recorded"
    why = "see the warning above" if differences else "no difference in files, versions or machine is known"
    return f"warning: not the same pixels as recorded: {', '.join(other)} ({why})"


# ---------------------------------------------------------------------------------------------------------- drawing


@contextlib.contextmanager
def _arithmetic(request: Request, record: dict | None):
    """The settings that the last bits depend on: the recorded number of threads, deterministic convolutions."""
    import torch

    threads = torch.get_num_threads()
    wanted = (record or {"machine": {}})["machine"].get("threads")
    with contextlib.ExitStack() as stack:
        if isinstance(wanted, int) and 0 < wanted != threads:
            torch.set_num_threads(wanted)
            stack.callback(torch.set_num_threads, threads)
        if request.device == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True))
        yield


def _load(request: Request, layout: Layout, sources: dict[str, Source | None]):
    """The pipeline on its device, with its attention and LoRA."""
    import diffusers
    import torch
    import transformers

    from linattn.adapters import LinFusion

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    name = layout.class_name if request.image is None else PIPELINES[layout.class_name]
    kind, dtype = getattr(diffusers, name), getattr(torch, request.dtype)
    if request.guidance is None:
        bundled = sources["model"].kind == "bundled"
        own = inspect.signature(getattr(diffusers, layout.class_name).__call__).parameters["guidance_scale"].default
        request.guidance = BUNDLED_GUIDANCE if bundled else own
    try:
        with quiet_diffusers():
            # Local files only, whatever the model's configs name: all that is needed was fetched before.
            pipe = kind.from_pretrained(sources["model"].path, dtype=dtype, use_safetensors=True, local_files_only=True)
            pipe.to(request.device, dtype)  # dtype again: older diffusers do not know the argument above
    except Exception as error:  # what is wrong with the files of a folder comes out as any type
        _raise_if_memory(error)
        raise Problem(f"--model: cannot load {request.model}: {type(error).__name__}: {_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    if request.attention == "linfusion":
        weights = sources["weights"]
        try:
            with quiet_diffusers():
                if weights is None:
                    LinFusion.construct_for(pipe, load_pretrained=False)
                else:
                    LinFusion.construct_for(pipe, pretrained_model_name_or_path=str(weights.path))
        except Exception as error:
            _raise_if_memory(error)
            raise Problem(f"--weights: cannot use {request.weights}: {type(error).__name__}: {_line(error)}") from error
    if request.lora is not None:
        _load_lora(pipe, Path(request.lora), request.lora_scale)
    return pipe


def _load_lora(pipe, path: Path, scale: float) -> None:
    try:
        with quiet_diffusers():
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora", local_files_only=True)
            found = {name for names in pipe.get_list_adapters().values() for name in names}
            if "lora" in found:
                pipe.set_adapters("lora", scale)
    except Exception as error:
        _raise_if_memory(error)
        raise Problem(f"--lora: cannot use {path}: {type(error).__name__}: {_line(error)}") from error
    if "lora" not in found:
        raise Problem(f"--lora: nothing in {path} belongs to a layer of this model")


def _raise_if_memory(error: Exception) -> None:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        raise Problem(f"out of memory; a smaller --size or 16-bit --dtype needs less: {_line(error)}") from error


def _summary(request: Request, layout: Layout) -> str:
    attention = request.attention
    if attention == "linfusion":
        undistilled = ", undistilled" if request.weights == "base" else ""
        attention = f"linfusion attention (weights: {request.weights}{undistilled})"
    else:
        attention = "stock attention"
    many = f"{request.count} pictures of " if request.count > 1 else ""
    return (
        f"{layout.class_name} {request.model}, {attention}: {many}{request.width}x{request.height} pixels, "
        f"{request.steps} steps, guidance {request.guidance:g}, {request.dtype} on {request.device}"
    )


def _draw(pipe, request: Request, image, files: Files):
    """Draw and save one picture after the other; yields the part of the record that belongs to each."""
    import torch
    from tqdm.auto import tqdm

    options = {"num_inference_steps": request.steps, "guidance_scale": request.guidance, "output_type": "np"}
    if image is None:
        options |= {"width": request.width, "height": request.height}
    else:
        if image.size != (request.width, request.height):
            image = image.resize((request.width, request.height))  # bicubic
        options |= {"image": image, "strength": request.strength}

    def wait():
        if request.device == "cuda":
            torch.cuda.synchronize()

    with tqdm(total=request.count * request.steps, unit="step", disable=None, file=sys.stderr) as bar:
        for number, path in enumerate(files.pictures):
            bar.set_description(f"drawing {number + 1}/{request.count}" if request.count > 1 else "drawing")
            ends = []

            def after_step(pipe, step, timestep, tensors, ends=ends):
                wait()
                ends.append(time.perf_counter())
                bar.total = request.count * pipe.num_timesteps  # some schedulers need a step more, img2img fewer
                bar.update()
                return tensors

            # One at a time and noise from the CPU: a picture depends neither on those beside it nor on the device.
            seed = request.seed + number
            wait()
            start = time.perf_counter()
            try:
                drawn = pipe(
                    request.prompt,
                    negative_prompt=request.negative_prompt,
                    generator=torch.Generator().manual_seed(seed),
                    callback_on_step_end=after_step,
                    **options,
                )
            except (RuntimeError, ValueError) as error:
                _raise_if_memory(error)
                raise
            wait()
            seconds = time.perf_counter() - start
            picture, pixels = _to_picture(drawn, path)
            try:
                picture.save(path, **({"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}))
            except (OSError, KeyError) as error:  # KeyError: a Pillow that was built without this format
                raise Problem(f"cannot write {path}: {_line(error)}") from error
            steps = [end - begin for begin, end in itertools.pairwise(ends)] or [ends[0] - start]
            yield {
                "file": path.name,
                "seed": seed,
                "width": picture.width,
                "height": picture.height,
                "seconds": round(seconds, 4),
                "seconds_per_step": round(statistics.median(steps), 5),
                "pixels_sha256": pixels,
            }


def _to_picture(drawn, path: Path):
    """PIL image and the digest of its pixels, from what the pipeline returned; says where they are worthless."""
    import numpy as np
    from PIL import Image

    values = drawn.images[0]
    if not np.isfinite(values).all():
        _say(f"warning: {path.name} has values that are not finite; --dtype float32 may help")
        values = np.nan_to_num(values)
    if any(getattr(drawn, "nsfw_content_detected", None) or ()):
        _say(f"warning: {path.name} is black: the model's own safety checker took it back; try another seed or prompt")
    image = Image.fromarray((values * 255).round().astype("uint8"))
    return image, hashlib.sha256(f"{image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()
