"""The JSON beside a generated picture: what was asked for, the files that were read, and what else decides the bits."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

from linattn.cli._models import Problem, Source, check_file, line
from linattn.cli._stages import StageRequest

#: Names the layout of the JSON; another layout gets another number.
FORMAT = "linattn generate 2"


@dataclasses.dataclass
class Request:
    """What is to be drawn. The paths of a record are absolute, so that it can be used from anywhere."""

    prompt: str
    negative_prompt: str | None
    model: str
    attention: str
    weights: str | None
    window_size: int | None
    down_factor: int | None
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
    stages: list | None
    base_attention: str | None
    device: str
    dtype: str


def names() -> list[str]:
    return [field.name for field in dataclasses.fields(Request)]


def read_record(path: Path) -> dict:
    """The JSON that an earlier run wrote, checked for what will be read of it."""
    check_file("--from", str(path))
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"--from: cannot read {path} as JSON: {line(error)}") from error
    form = record.get("format") if isinstance(record, dict) else None
    if form != FORMAT:
        raise Problem(f"--from: {path} is no record of linattn generate: expected format {FORMAT!r}, got {form!r}")
    shape = {"request": dict, "sources": dict, "versions": dict, "machine": dict, "pictures": list}
    wrong = [key for key, kind in shape.items() if not isinstance(record.get(key), kind)]
    types = typing.get_type_hints(Request)
    if not wrong:
        wrong += [f"request.{name}" for name in set(types) ^ set(record["request"])]
        wrong += [f"request.{name}" for name, kind in types.items() if not is_a(record["request"].get(name), kind)]
        if isinstance(stages := record["request"].get("stages"), list):
            types = typing.get_type_hints(StageRequest)
            good = [_is_an(stage, types) for stage in stages]
            wrong += [f"request.stages.{index}" for index, fine in enumerate(good) if not fine]
            if all(good):
                record["request"]["stages"] = [StageRequest(**stage) for stage in stages]
        wrong += [
            f"sources.{name}"
            for name in ("model", "weights", "lora", "image")
            if not is_source(record["sources"].get(name), optional=name != "model")
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


def is_a(value, kind) -> bool:
    return isinstance(value, kind) and (not isinstance(value, bool) or bool in typing.get_args(kind))


def _is_an(entry, types: dict) -> bool:
    """Whether this is an object with exactly these entries."""
    return isinstance(entry, dict) and set(entry) == set(types) and all(is_a(entry[k], t) for k, t in types.items())


def is_source(source, optional: bool) -> bool:
    if source is None:
        return optional
    if not isinstance(source, dict) or "revision" not in source:
        return False
    return isinstance(source.get("sha256"), str) and isinstance(source.get("files"), dict)


def is_record(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and str(found.get("format", "")).startswith("linattn generate")


def write(path: Path, record: dict) -> None:
    try:
        path.write_text(json.dumps(record, indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}") from error


def facts(request: Request) -> dict:
    """What besides the request and the files decides over the last bit."""
    import torch

    from linattn import backend
    from linattn.cli import doctor

    cpu = doctor.processor()
    name = torch.cuda.get_device_name() if request.device == "cuda" else cpu["name"]
    chosen = None
    op = {"linfusion": "linear_attention", "clear": "window_attention"}.get(request.attention)
    if op is not None:
        try:
            chosen = backend.choose(op, torch.device(request.device), getattr(torch, request.dtype))
        except ValueError as error:  # one is forced that cannot run here
            raise Problem(line(error)) from error
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


def compare(record: dict, sources: dict[str, Source | None], facts: dict) -> list[str]:
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
    return differences


def verdict(before: list[dict], now: list[dict], differences: list[str]) -> str:
    known = {picture["seed"]: picture["pixels_sha256"] for picture in before}
    other = [p["file"] for p in now if p["seed"] in known and p["pixels_sha256"] != known[p["seed"]]]
    if not other:
        return "the same pixels as recorded"
    why = "see the warning above" if differences else "no difference in files, versions or machine is known"
    return f"warning: not the same pixels as recorded: {', '.join(other)} ({why})"
