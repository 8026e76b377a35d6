"""Enlarge pictures with Inf-DiT in bounded memory, offline with the bundled model by default.

IMAGE is a picture, a folder of pictures (of png, jpg, jpeg, webp, bmp, tif and tiff), a pattern like 'photos/*.jpg', or
@LIST, a text file with one of these a line (# for comments). DIR gets the results: of photos/cat.jpg it is
DIR/cat_x4.png, and what lies in folders inside a folder that was given keeps them, DIR/a/cat_x4.png. The orientation of
a camera is applied, a colour profile is kept; other metadata is not carried over, and results have 8 bits a channel.

Beside each result stands a JSON with everything that made it: all options resolved, digests of the picture and of the
model's files, versions, device, scheduler, times. Where it says that a result was made by the same settings from the
same picture, that one is done: a list that was stopped goes on with the same command. A result of other settings, or a
file of somebody else, is never written over without --overwrite. Each result is written whole or not at all.
`--from FILE.json` makes the same result again, bit for bit on the same machine by the same schedule.

The paths of what was written go to stdout, everything else to stderr. The exit status is 0 when every result is there,
1 when one is not (the others are; the reasons stand at the end), 2 for a mistake on the command line, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import math
import os
import sys
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path

from linattn._quiet import quiet_diffusers
from linattn.cli import _record, _upscale_files, _upscale_pictures, _upscale_request
from linattn.cli._machine import arithmetic, check_device, check_installed
from linattn.cli._models import (
    USUAL_STEPS,
    Problem,
    Source,
    check_safetensors,
    digests,
    fetch,
    line,
    locate,
    raise_if_memory,
    read_config,
    steps_of,
)
from linattn.cli._upscale_files import Stop
from linattn.cli._upscale_pictures import FORMATS
from linattn.cli._upscale_request import (
    DECISIVE,
    DEFAULTS,
    FORMAT,
    MAY_CHANGE,
    MODEL,
    SAMPLERS,
    SCALE,
    SCHEDULES,
    Request,
    Usage,
    dashed,
)

HELP = "enlarge pictures, any number and size, in bounded memory"

PIPELINE = "InfDiTUpscalePipeline"
# Every other picture would fail, too, each after all its work.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

EXAMPLES = """\
examples:
  linattn upscale photo.jpg
  linattn upscale photos --recursive --scale 2 --out large
  linattn upscale 'scans/*.tif' @more.txt --width 8192 --max-memory 12GiB --out large
  linattn upscale photo.jpg --model ./infdit --steps 15 --dtype bfloat16 --format webp
  linattn upscale --from large/photo_x2.png.json --out again
"""


@dataclasses.dataclass
class Job:
    """One picture on its way; `area` of its result is in pixels."""

    input: Path
    output: Path
    area: int = 0

    @property
    def record(self) -> Path:
        return _upscale_files.record_of(self.output)


@dataclasses.dataclass
class Task:
    """What is the same for all pictures."""

    request: Request  # without its picture
    model: Source
    overwrite: bool
    again: bool  # as recorded, so that a result that is there says nothing
    facts: dict = dataclasses.field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # No defaults here: with --from it matters which options were given.
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures, folders, patterns, @LIST")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results [upscaled]")
    parser.add_argument("--scale", type=float, metavar="S", help=f"how many times as wide and high, from 1 [{SCALE:g}]")
    parser.add_argument(
        "--size",
        metavar="WxH",
        help="instead of --scale, the pixels of the result; a picture of another shape is refused, not distorted",
    )
    parser.add_argument("--width", type=int, metavar="N", help="instead of --scale; the height follows")
    parser.add_argument("--height", type=int, metavar="N", help="instead of --scale; the width follows")
    parser.add_argument(
        "--list",
        action="append",
        metavar="FILE",
        help="as @FILE: one picture, folder or pattern a line, - for stdin; may be given again",
    )
    parser.add_argument("--recursive", action="store_true", default=None, help="go into folders inside folders, too")
    parser.add_argument(
        "--relative-to",
        metavar="FOLDER",
        help="results keep the folders in which their pictures lie below this one, where many have the same name",
    )
    parser.add_argument(
        "--model",
        metavar="NAME|FOLDER",
        help="an Inf-DiT pipeline: folder, hub name, or name of a bundled model (a folder that has the name of a "
        f"bundled one: ./NAME) [{MODEL}]",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="denoising steps; heun calls the network 2 N - 1 times, the others N times [those that the model's card "
        f"was scored with, else {USUAL_STEPS}]",
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="[the model's own; heun for Inf-DiT]")
    parser.add_argument(
        "--start",
        choices=("lr", "noise"),
        help="from the enlarged picture with noise, which keeps its colours, or from noise alone [lr]",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the noise, the same for every picture, so that none depends on the others [0]",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="for the work beside the weights, like 12GiB; the schedule follows from it [auto: most of what is free]",
    )
    parser.add_argument(
        "--schedule",
        choices=("auto", *SCHEDULES),
        help="the network at once, layer by layer in strips, or strip by strip: the same picture in less memory [auto: "
        "the fastest that --max-memory allows]",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="where to work [auto: cuda where there is one]"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="type of weights and arithmetic [auto: bfloat16 on cuda, float32 on a cpu]",
    )
    parser.add_argument("--format", choices=tuple(FORMATS), help=f"of the results [{DEFAULTS['format']}]")
    parser.add_argument("--suffix", metavar="TEXT", help="after the names of the results [_x4 for --scale 4]")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        default=None,
        help="write over files in the way; results of the same settings stay, they are done",
    )
    parser.add_argument("--quiet", action="store_true", help="of stderr only what went wrong")
    parser.add_argument(
        "--from",
        type=Path,
        dest="from_record",
        metavar="FILE.json",
        help="make what this JSON records. Another picture or other model files than recorded are an error, since the "
        "result could not be the same; other versions or another machine a warning. Only --out, --overwrite and "
        f"--quiet go with it, IMAGE where it has moved, and {', '.join('--' + dashed(name) for name in MAY_CHANGE)}",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    try:
        with Stop() as stop:
            return _run(args, stop)
    except Problem as problem:
        print(f"linattn upscale: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, Usage) else 1
    except BrokenPipeError:
        raise
    except OSError as error:  # a name that is too long, a disk that is gone
        print(f"linattn upscale: {line(error)}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, stop: Stop) -> int:
    # What costs nothing is checked first, then what needs torch, then what needs the hub, and only then is worked.
    say = (lambda text: None) if args.quiet else _say
    out = args.out or Path("upscaled")
    record = None if args.from_record is None else _upscale_request.read_record(args.from_record)
    request = _upscale_request.from_arguments(args) if record is None else _upscale_request.again(args, record)
    _upscale_request.check_values(request)
    jobs = _jobs(args, request, out, say) if record is None else _job_again(request, out, record)
    _upscale_files.check_writable(out)
    check_installed()
    model = _locate(request.model)
    check_device(request)
    revision = None if record is None else record["sources"]["model"]["revision"]
    parts = _parts(model, revision)
    _settle(request, model)
    request.model = model.name
    sources = digests(model, parts, None, image=request.image)
    del sources["weights"]

    task = Task(request, model, overwrite=bool(args.overwrite), again=record is not None)
    report = Report(len(jobs))
    todo = _todo(task, jobs, report)
    if not todo:
        return report.end(say)
    _upscale_files.clean({job.output.parent for job in todo})
    with arithmetic(request, record):
        task.facts = _facts(request)
        differences = []
        if record is not None:
            sources["image"].option = "IMAGE"
            differences = _record.compare(record, sources, task.facts)
        if differences:
            _say(f"warning: the last bits may differ from the recorded picture: {'; '.join(differences)}")
        pipe = _load(request, model)
        say(_summary(request, len(todo)))
        task.facts["scheduler"] = {"class": type(pipe.scheduler).__name__, "config": dict(pipe.scheduler.config)}
        try:
            made = _work(pipe, task, todo, report, stop, quiet=args.quiet)
        except KeyboardInterrupt:
            report.end(say)
            say(f"stopped with {report.left} to do; the same command goes on from there")
            return 130
    if record is not None and made:
        verdict = _record.verdict(record["pictures"], made, differences)
        (_say if verdict.startswith("warning") else say)(verdict)
    return report.end(say)


def _say(text: str) -> None:
    from linattn.cli._upscale_progress import readable

    print(readable(text), file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- the pictures


def _jobs(args: argparse.Namespace, request: Request, out: Path, say: Callable) -> list[Job]:
    inputs = _upscale_files.find(args.images, args.list or (), bool(args.recursive))
    inputs, results = _upscale_files.without_results(inputs, out)
    if results:
        say(f"{results} of the pictures in {out} were made by this command: left out (another --out enlarges them)")
    if not inputs:
        raise Usage(f"all pictures that were given lie in --out {out} and are results of this command; use another one")
    suffix = request.name() if args.suffix is None else args.suffix
    outputs = _upscale_files.name_outputs(inputs, out, suffix, f".{request.format}", args.relative_to)
    return [Job(one.path, output) for one, output in zip(inputs, outputs, strict=True)]


def _job_again(request: Request, out: Path, record: dict) -> list[Job]:
    output = out / record["pictures"][0]["file"]
    if os.path.realpath(output) == os.path.realpath(request.image):
        raise Usage(f"--out {out} would overwrite the picture that is to be enlarged: choose another folder")
    return [Job(Path(request.image), output)]


def _todo(task: Task, jobs: list[Job], report: Report) -> list[Job]:
    """What is left to do. What cannot be read, or would be written over, is found before any work."""
    todo = []
    for job in jobs:
        try:
            if _is_done(task, job):
                report.done += 1
                continue
            job.area = math.prod(_upscale_pictures.target(task.request, _upscale_pictures.read_size(job.input)))
            todo.append(job)
        except Exception as error:
            report.failed(job, error)
    return todo


def _is_done(task: Task, job: Job) -> bool:
    """Whether the result is there already.

    Raises:
        Problem: what is there is something else, and must not be written over.
    """
    for path in (job.output, job.record):
        if path.is_dir():
            raise Problem(f"{path} is a folder")
    before = _upscale_files.read(job.record)
    if os.path.lexists(job.record) and before is None:
        raise Problem(f"{job.record} exists and is no record of linattn upscale; use another --suffix or --out")
    if not os.path.lexists(job.output):
        return False  # a record alone is what a kill may leave
    if task.again:
        why = ""
    elif before is None:
        why = " and nothing says how it was made"
    else:
        try:
            why = _difference(task, job, before)
        except (KeyError, TypeError, IndexError):
            why = ", and its record is damaged"
    if why is None:
        return True
    if task.overwrite:
        return False
    raise Problem(f"{job.output} exists{why}; --overwrite replaces it, another --suffix or --out keeps it")


def _difference(task: Task, job: Job, before: dict) -> str | None:
    """What keeps the result from being the one that is asked for, for the end of a message."""
    if before["format"] != FORMAT:
        return f", in another format of records ({before['format']})"
    then, now = before["request"], dataclasses.asdict(task.request)
    settings = [name for name in DECISIVE if then[name] != now[name]]
    if settings:
        words = (f"--{dashed(name)} {_value(then[name])} then, {_value(now[name])} now" for name in settings)
        return f", made with other settings ({', '.join(words)})"
    if before["sources"]["model"]["sha256"] != task.model.sha256:
        return f", made with other model files ({before['sources']['model']['name']})"
    state, file = job.input.stat(), before["file"]
    seen = (then["image"], file["bytes"], file["mtime_ns"]) == (
        os.path.abspath(job.input),
        state.st_size,
        state.st_mtime_ns,
    )
    if not seen and before["sources"]["image"]["sha256"] != _upscale_files.sha256(job.input.read_bytes()):
        return f", made from another picture ({then['image']})"
    if job.output.stat().st_size != before["pictures"][0]["bytes"]:
        return ", and was changed since it was made"
    return None


def _value(value) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# -------------------------------------------------------------------------------------------------------- the model


class Parts(typing.NamedTuple):
    components: tuple[str, ...]


def _locate(name: str) -> Source:
    if os.path.isfile(name):
        raise Usage(
            f"--model: expected a folder or a hub name, {name!r} is a file. A checkpoint of Inf-DiT becomes a folder "
            "once by linattn.adapters.convert_infdit_checkpoint(FILE, FOLDER)"
        )
    try:
        return locate("--model", name)
    except Problem as problem:
        raise Usage(str(problem)) from problem


def _parts(model: Source, revision: str | None) -> Parts:
    """What the pipeline in this folder consists of, fetched if it is on the hub; raises for another kind."""
    if model.kind == "hub":
        model.path = fetch(model, revision, ["model_index.json"])
    if not (model.path / "model_index.json").is_file():
        raise Problem(f"--model: {model.name} is no diffusers pipeline, it has no model_index.json")
    index = read_config(model, "model_index.json")
    if index.get("_class_name") != PIPELINE:
        raise Problem(f"--model: {model.name} is a {index.get('_class_name')}; this enlarges with an {PIPELINE}")
    found = tuple(name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1])
    if model.kind == "hub":
        wanted = [f"{name}/*.{ending}" for name in found for ending in ("json", "safetensors")]
        model.path = fetch(model, model.revision, ["model_index.json", *wanted])
    absent = [name for name in ("transformer", "scheduler") if name not in found]
    absent += [name for name in found if not (model.path / name).is_dir()]
    if absent:
        raise Problem(f"--model: {model.name} is incomplete, it has no {', '.join(absent)}")
    check_safetensors(model, Parts(found))
    return Parts(found)


def _settle(request: Request, model: Source) -> None:
    """Fill in what model and device decide."""
    if request.steps is None:
        request.steps = steps_of(model)
    if request.sampler is None:
        request.sampler = read_config(model, "scheduler/scheduler_config.json").get("sampler", SAMPLERS[0])
    if request.dtype == "auto":
        import torch

        wide = request.device == "cuda" and torch.cuda.is_bf16_supported()
        request.dtype = "float32" if request.device == "cpu" else "bfloat16" if wide else "float16"


def _load(request: Request, model: Source):
    """The pipeline on its device, with the sampler that is asked for."""
    import diffusers
    import torch
    import transformers

    from linattn.adapters import InfDiTUpscalePipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, request.dtype)
    try:
        with quiet_diffusers():
            # Local files only, whatever the model's configs name: all that is needed was fetched before.
            pipe = InfDiTUpscalePipeline.from_pretrained(
                model.path, dtype=dtype, use_safetensors=True, local_files_only=True
            )
            pipe.to(request.device, dtype)  # dtype again: older diffusers do not know the argument above
            if pipe.scheduler.config.get("sampler") != request.sampler:
                pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, sampler=request.sampler)
    except Exception as error:  # what is wrong with the files of a folder comes out as any type
        raise_if_memory(error)
        raise Problem(f"--model: cannot load {request.model}: {type(error).__name__}: {line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --------------------------------------------------------------------------------------------------------- the work


def _work(pipe, task: Task, todo: list[Job], report: Report, stop: Stop, *, quiet: bool) -> list[dict]:
    """Enlarge one picture after the other; returns what the records say of the results."""
    from linattn.cli._upscale_progress import Progress

    made = []
    with Progress([job.area for job in todo], quiet) as progress:
        for job in todo:
            progress.start(job.input.name)
            try:
                if _is_done(task, job):
                    report.done += 1
                    progress.skip("done by another process")
                    continue
                record, data = _enlarge(pipe, task, job, progress)
                # Hours may have gone by.
                if os.path.lexists(job.output) and not task.overwrite:
                    raise Problem(f"{job.output} has appeared meanwhile and was left as it is")
                with stop.held():
                    _upscale_files.write_pair(job.output, data, record)
                    report.written += 1
                    made += record["pictures"]
                    progress.finish(str(job.output), "{width}x{height} in {seconds:.3g} s".format(**made[-1]))
            except BrokenPipeError:
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise Problem(f"cannot write {job.output}: {line(error)}; {report.counts()} before that") from error
                report.failed(job, error)
                progress.skip(report.reasons[-1][1])
    return made


def _enlarge(pipe, task: Task, job: Job, progress) -> tuple[dict, bytes]:
    """The record of a result and the bytes of its file."""
    import torch

    request = task.request
    state, content = job.input.stat(), job.input.read_bytes()
    picture = _upscale_pictures.open_picture(content)
    width, height = _upscale_pictures.check_target(request, picture.size)
    size = {"scale": request.scale} if request.scale is not None else {"width": width, "height": height}
    calls, finite = 0, True

    def after_call(pipe, index, timestep, tensors):
        nonlocal calls, finite
        calls = index + 1
        if calls == len(pipe.scheduler.timesteps):
            finite = bool(tensors["sample"].sum(dtype=torch.float64).isfinite())
        return tensors

    start = time.perf_counter()
    drawn = pipe(
        picture,
        **size,
        num_inference_steps=request.steps,
        start=request.start,
        # One at a time and noise from the CPU: a picture depends neither on those beside it nor on the device.
        generator=torch.Generator().manual_seed(request.seed),
        max_memory=request.max_memory,
        schedule=None if request.schedule == "auto" else request.schedule,
        output_type="pil",
        callback_on_step_end=after_call,
        progress=progress.advance,
    ).images[0]
    seconds = time.perf_counter() - start
    if not finite:
        raise Problem(f"came out with values that are not finite in {request.dtype}; --dtype float32 may help")
    if picture.info.get("icc_profile") and not drawn.info.get("icc_profile"):
        progress.note("warning: its colour profile was left out, it is for other colours than those of the result")
    data = _upscale_pictures.encode(drawn, request.format)
    path = os.path.abspath(job.input)
    source = Source("IMAGE", path, "file", job.input, files={job.input.name: _upscale_files.sha256(content)})
    record = {
        "format": FORMAT,
        "request": dataclasses.asdict(dataclasses.replace(request, image=path)),
        "sources": {"model": task.model.to_record(), "image": source.to_record()},
        "file": {"bytes": len(content), "mtime_ns": state.st_mtime_ns, "size": picture.size, "mode": picture.mode},
        **task.facts,
        "pictures": [
            {
                "file": job.output.name,
                "seed": request.seed,
                "width": drawn.width,
                "height": drawn.height,
                "calls": calls,
                "seconds": round(seconds, 4),
                "bytes": len(data),
                "pixels_sha256": _upscale_files.sha256(f"{drawn.width}x{drawn.height} ".encode() + drawn.tobytes()),
            }
        ],
    }
    return record, data


# --------------------------------------------------------------------------------------------------------- records


def _facts(request: Request) -> dict:
    """What besides the request and the files decides over the last bit."""
    import torch

    from linattn import backend

    facts = _record.facts(types.SimpleNamespace(device=request.device, dtype=request.dtype, attention=None))
    device, dtype = torch.device(request.device), getattr(torch, request.dtype)
    try:
        return facts | {"backend": backend.choose("block_causal_attention", device, dtype)}
    except ValueError as error:  # one is forced that cannot run here
        raise Problem(line(error)) from error


# ------------------------------------------------------------------------------------------------- what is reported


def _summary(request: Request, count: int) -> str:
    if request.scale is not None:
        size = f"{request.scale:g} times as large"
    else:
        size = f"to {request.name()[1:]} pixels"
    return (
        f"{PIPELINE} {request.model}: {count} picture{'s' * (count != 1)} {size}, {request.steps} steps of "
        f"{request.sampler}, {request.dtype} on {request.device}"
    )


class Report:
    """What became of the pictures."""

    def __init__(self, total: int):
        self.total = total
        self.written = 0
        self.done = 0
        self.reasons: list[tuple[Path, str]] = []

    @property
    def left(self) -> int:
        return self.total - self.written - self.done - len(self.reasons)

    def failed(self, job: Job, error: Exception) -> None:
        self.reasons.append((job.input, _reason(error)))

    def counts(self) -> str:
        words = [f"{self.written} written"]
        words += [f"{self.done} done before"] * (self.done > 0)
        words += [f"{len(self.reasons)} failed"] * bool(self.reasons)
        return ", ".join(words)

    def end(self, say: Callable) -> int:
        """Say how it went, with the reason for every picture that failed; returns the exit status."""
        say(self.counts())
        for path, reason in self.reasons:
            _say(f"linattn upscale: {path}: {reason}")
        return int(bool(self.reasons))


def _reason(error: Exception) -> str:
    try:
        raise_if_memory(error)
    except Problem:
        return f"out of memory; --max-memory, --schedule streaming or a 16-bit --dtype need less: {line(error)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return line(error) if isinstance(error, (Problem, ValueError)) else f"{type(error).__name__}: {line(error)}"
