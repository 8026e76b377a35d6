"""What `linattn upscale` is asked for: from the command line, or from the JSON beside an earlier result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import typing
from pathlib import Path

from linattn.cli import _record
from linattn.cli._models import Problem, check_file, line

#: Names the layout of the JSON; another layout gets another number.
FORMAT = "linattn upscale 1"

MODEL = "tiny_infdit"
SCALE = 4.0
DEFAULTS = {
    "start": "lr",
    "seed": 0,
    "max_memory": "auto",
    "schedule": "auto",
    "device": "auto",
    "dtype": "auto",
    "format": "png",
}
SAMPLERS = ("heun", "ddim", "dpmsolver++", "lcm")
SCHEDULES = ("full", "layer_major", "streaming")
# What decides over the pixels, besides the files: two results that agree in it are the same picture. Device, schedule
# and memory are not in it, they change no more than the last bits.
DECISIVE = ("scale", "width", "height", "steps", "sampler", "start", "seed", "dtype")
# What may be given with --from: what has moved, and what changes no more than the last bits.
MAY_CHANGE = ("model", "device", "dtype", "max_memory", "schedule")


class Usage(Problem):
    """A mistake on the command line, found before anything was done: exit status 2."""


@dataclasses.dataclass
class Request:
    """What is to be made of one picture, as it stands in the record; its path is absolute there."""

    image: str | None
    model: str
    scale: float | int | None
    width: int | None
    height: int | None
    steps: int | None
    sampler: str | None
    start: str
    seed: int
    max_memory: str
    schedule: str
    format: str
    device: str
    dtype: str

    def name(self) -> str:
        """What a result has in its name by default."""
        if self.scale is not None:
            return f"_x{self.scale:g}"
        return "_" + "x".join(f"{size or 'auto'}" for size in (self.width, self.height))


def dashed(name: str) -> str:
    return name.replace("_", "-")


# ------------------------------------------------------------------------------------------------------ the request


def from_arguments(args: argparse.Namespace) -> Request:
    """The request as the options say it; what the model decides (sampler, steps) is still None."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Request)}
    values |= {name: default for name, default in DEFAULTS.items() if values[name] is None}
    if args.size is not None:
        match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", args.size)
        if match is None:
            raise Usage(f"--size: expected pixels as WIDTHxHEIGHT, for example 4096x3072, got {args.size!r}")
        if args.width is not None or args.height is not None:
            raise Usage("--size says width and height; give it without --width and --height")
        values |= {"width": int(match[1]), "height": int(match[2])}
    if values["width"] is None and values["height"] is None:
        values["scale"] = SCALE if args.scale is None else args.scale
    elif args.scale is not None:
        raise Usage("--scale and the size of the result (--size, --width, --height) were given: one of them says it")
    if args.suffix is not None and (os.sep in args.suffix or "/" in args.suffix or "\0" in args.suffix):
        raise Usage(f"--suffix: expected a part of a file name, got {args.suffix!r}")
    return Request(**values | {"model": args.model or MODEL})


def again(args: argparse.Namespace, record: dict) -> Request:
    names = [field.name for field in dataclasses.fields(Request) if field.name not in ("image", *MAY_CHANGE)]
    fixed = [n for n in (*names, "size", "list", "recursive", "relative_to", "suffix") if getattr(args, n) is not None]
    if fixed:
        given = ", ".join(f"--{dashed(name)}" for name in fixed)
        raise Usage(f"--from makes what was recorded, so {given} cannot be given with it (--help says what can)")
    if len(args.images) > 1:
        raise Usage(f"--from makes one picture again, so at most one IMAGE goes with it, got {len(args.images)}")
    moved = {name: getattr(args, name) for name in MAY_CHANGE if getattr(args, name) is not None}
    request = Request(**record["request"] | moved | ({"image": args.images[0]} if args.images else {}))
    if not Path(request.image).is_file():
        raise Usage(f"--from: the picture {request.image!r} does not exist; if it has moved, give it as IMAGE")
    request.image = os.path.abspath(request.image)
    return request


def check_values(request: Request) -> None:
    if request.scale is not None and not 1 <= request.scale < math.inf:
        raise Usage(f"--scale: expected a number from 1, got {request.scale:g}")
    for name in ("steps", "width", "height"):
        if getattr(request, name) is not None and getattr(request, name) < 1:
            raise Usage(f"--{name}: expected 1 or more, got {getattr(request, name)}")
    if not 0 <= request.seed < 2**63:
        raise Usage(f"--seed: expected 0 to 2^63 - 1, got {request.seed}")
    if request.max_memory != "auto" and not re.fullmatch(r"(?i)\d+(\.\d+)?\s*[KMGT](i?B)?", request.max_memory):
        raise Usage(
            f"--max-memory: expected auto or a size with its unit, for example 12GiB, got {request.max_memory!r}"
        )


def read_record(path: Path) -> dict:
    """The JSON of a result, checked for what will be read of it."""
    try:
        check_file("--from", str(path))
    except Problem as problem:
        raise Usage(str(problem)) from problem
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Usage(f"--from: cannot read {path} as JSON: {line(error)}") from error
    form = record.get("format") if isinstance(record, dict) else None
    if form != FORMAT:
        raise Usage(f"--from: {path} is no record of linattn upscale: expected format {FORMAT!r}, got {form!r}")
    wrong = [key for key in ("request", "sources", "versions", "machine") if not isinstance(record.get(key), dict)]
    if not wrong:
        kinds = typing.get_type_hints(Request)
        wrong += [f"request.{name}" for name in set(kinds) ^ set(record["request"])]
        wrong += [
            f"request.{name}" for name, kind in kinds.items() if not _record.is_a(record["request"].get(name), kind)
        ]
        wrong += [f"sources.{n}" for n in ("model", "image") if not _record.is_source(record["sources"].get(n), False)]
        wrong += ["request.image"] * (record["request"].get("image") is None)
    try:
        picture = record["pictures"][0]
        if os.path.basename(picture["file"]) != picture["file"] or not {"seed", "pixels_sha256"} <= set(picture):
            wrong.append("pictures.0")
    except (KeyError, TypeError, IndexError):
        wrong.append("pictures.0")
    if wrong:
        raise Usage(f"--from: {path} is damaged: {', '.join(sorted(set(wrong)))} missing or of the wrong type")
    return record
