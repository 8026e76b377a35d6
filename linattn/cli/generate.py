"""Draw a picture from a text with linear, window or stock attention, offline with the bundled model by default.

Beside the picture FILE.png stands FILE.json with everything that made it: all options resolved, digests of the files of
model and weights, versions, device, scheduler, seeds, times. `--from FILE.json` draws the same picture again, bit for
bit on the same machine. The paths of what was written go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import inspect
import itertools
import math
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from linattn._quiet import quiet_diffusers
from linattn.cli import _attention, _record, _stages
from linattn.cli._machine import arithmetic, check_device, check_installed
from linattn.cli._models import (
    Layout,
    Problem,
    Source,
    check_file,
    check_safetensors,
    digests,
    fetch,
    fetch_pipeline,
    guidance_of,
    line,
    locate,
    raise_if_memory,
    read_layout,
)
from linattn.cli._record import Request

HELP = "draw a picture from a text, and a JSON beside it that draws it again"

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
DEFAULTS = {
    "steps": 25,
    "seed": 0,
    "count": 1,
    "lora_scale": 1.0,
    "strength": 0.8,
    "device": "auto",
    "dtype": "auto",
}
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
  linattn generate "a tiger in a forest" --model black-forest-labs/FLUX.1-dev --window-size 8 --down-factor 4 \\
      --size 1024x512 --steps 20 --high-resolution 4096x2048 --stage-guidance 7.5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # No defaults here: with --from it matters which options were given.
    parser.add_argument("prompt", nargs="?", help="what to draw")
    parser.add_argument(
        "--model",
        metavar="NAME|FOLDER",
        help="Stable Diffusion 1.x, 2.x, XL or 3, or FLUX: folder, hub name, or name of a bundled model (a folder that "
        "has the name of a bundled one: ./NAME) [the bundled one]",
    )
    parser.add_argument(
        "--attention",
        choices=("linfusion", "clear", "stock"),
        help="linfusion: linear, for Stable Diffusion 1.x, 2.x and XL; clear: over a window, for FLUX and Stable "
        "Diffusion 3; stock: the model's own [the one that fits]",
    )
    parser.add_argument(
        "--weights",
        metavar="NAME|FOLDER|FILE|base|published",
        help="weights of the attention: folder, hub name, or for clear one file; 'published': those published for the "
        "model; 'base': the model's own projections, undistilled [for a bundled model its bundled student, for others "
        "published]",
    )
    parser.add_argument(
        "--window-size",
        type=int,
        metavar="N",
        help="radius of clear's window in tokens (16 pixels of FLUX); chooses among weights [what the weights say]",
    )
    parser.add_argument(
        "--down-factor",
        type=int,
        metavar="N",
        help="clear attends to the rest of the picture pooled by N x N tokens, 1 for not at all [what the weights say]",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to draw; needs --guidance above 1 [none]")
    parser.add_argument("--steps", type=int, metavar="N", help=f"denoising steps [{DEFAULTS['steps']}]")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="how strongly to follow the prompt, 1 or less: no guidance [bundled models: that of their "
        "scores; Stable Diffusion 7.5, XL 5, 3 7; FLUX.1-dev 3.5, schnell none]",
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
        help="type of weights and arithmetic [auto: on cuda float16, bfloat16 for FLUX and Stable Diffusion 3; float32 "
        "on a cpu]",
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
    _stages.add_arguments(parser)
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
        print(f"linattn generate: {line(error)}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    # What costs nothing is checked first, then what needs torch, then what needs the hub, and only then is drawn.
    record = None if args.from_record is None else _record.read_record(args.from_record)
    request = _request_from(args) if record is None else _request_again(args, record)
    _check_values(request)
    files = _output_files(args.out or Path("generated.png"), request, args.from_record, record)
    for option, path in (("--lora", request.lora), ("--image", request.image)):
        check_file(option, path)
    _check_installed(request)
    image = None if request.image is None else _open(request.image)
    model = locate("--model", request.model)
    layout = None
    if model.path is not None:
        layout = read_layout(model)
        _settle(request, layout, model, image)
    check_device(request)

    revisions = {key: source["revision"] for key, source in (record or {"sources": {}})["sources"].items() if source}
    if layout is None:
        model.path = fetch(model, revisions.get("model"), ["*.json"])
        layout = read_layout(model)
        _settle(request, layout, model, image)
    _settle_dtype(request, layout)
    weights = _attention.find(request, model, layout, revisions.get("weights"))
    if model.kind == "hub":
        fetch_pipeline(model)
    check_safetensors(model, layout)
    sources = digests(model, layout, weights, lora=request.lora, image=request.image)
    for key, source in sources.items():
        if source is not None:
            setattr(request, key, source.name)
    files.record.parent.mkdir(parents=True, exist_ok=True)
    with arithmetic(request, record):
        facts = _record.facts(request)
        differences = [] if record is None else _record.compare(record, sources, facts)
        if differences:
            _say(f"warning: the last bits may differ from the recorded picture: {'; '.join(differences)}")
        pipe, attention = _load(request, layout, sources)
        _say(_summary(request, layout))
        done = {
            "format": _record.FORMAT,
            "request": dataclasses.asdict(request),
            "sources": {key: None if source is None else source.to_record() for key, source in sources.items()},
            **facts,
            "scheduler": {"class": type(pipe.scheduler).__name__, "config": dict(pipe.scheduler.config)},
            "pictures": [],
        }
        for picture in _draw(pipe, attention, request, image, files):
            done["pictures"].append(picture)
            # After every picture: what was drawn before Ctrl-C can be drawn again, too.
            _record.write(files.record, done)
            print(files.record.with_name(picture["file"]), flush=True)
    print(files.record, flush=True)
    if record is not None:
        _say(_record.verdict(record["pictures"], done["pictures"], differences))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------ the request


def _request_from(args: argparse.Namespace) -> Request:
    """The request as the options say it; what the model decides (guidance, size) is still None."""
    from linattn import bundled

    if args.prompt is None:
        raise Problem('which prompt? For example: linattn generate "a seven, a two and a four"')
    stages = _stages.read(args, DEFAULTS["steps"] if args.steps is None else args.steps)
    if stages is not None and args.image is not None:
        for option, why in (("strength", "--stage-strength"), ("size", "the sizes of --high-resolution")):
            if getattr(args, option) is not None:
                raise Problem(f"--{option}: with --image and --high-resolution only the stages are drawn: use {why}")
    for option, needs in (("strength", "image"), ("lora_scale", "lora")):
        if getattr(args, option) is not None and getattr(args, needs) is None:
            raise Problem(f"--{option.replace('_', '-')} goes with --{needs}, which is not given")
    values = {name: getattr(args, name) for name in _record.names() if hasattr(args, name)}
    values |= {name: default for name, default in DEFAULTS.items() if values[name] is None}
    values["stages"] = stages
    if args.image is None or stages is not None:
        values["strength"] = None
    if args.lora is None:
        values["lora_scale"] = None
    width, height = (None, None) if args.size is None else _parse_size(args.size)
    request = Request(**values | {"width": width, "height": height, "model": args.model or bundled.path().name})
    if request.attention == "stock" and request.weights is not None:
        raise Problem(f"--weights {request.weights} goes with --attention linfusion or clear, not with stock")
    return request


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*(?:[xX×]\s*(\d+)\s*)?", text)
    if match is None:
        raise Problem(f"--size: expected pixels as N or WIDTHxHEIGHT, for example 512 or 768x512, got {text!r}")
    width = int(match[1])
    return width, int(match[2] or width)


def _request_again(args: argparse.Namespace, record: dict) -> Request:
    fixed = [name for name in _record.names() if name not in MAY_CHANGE and getattr(args, name, None) is not None]
    fixed += ["size"] * (args.size is not None) + [name for name in _stages.given(args) if name not in fixed]
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
    if request.stages is not None:
        _stages.check_values(request.stages)


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
    if files.record.exists() and not _record.is_record(files.record):
        raise Problem(f"--out {out} would overwrite {files.record}, which is no record of linattn generate")
    return files


def _same(a, b) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


# ----------------------------------------------------------------------------------------------- model and weights


def _check_installed(request: Request) -> None:
    check_installed(*["peft"] * (request.lora is not None))
    if request.lora is not None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(request.lora, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise Problem(f"--lora: cannot read {request.lora}: {line(error)}") from error


def _settle(request: Request, layout: Layout, model: Source, image) -> None:
    """Fill in what the model decides (attention, size, stages), and raise for what it cannot draw."""
    _attention.settle(request, layout)
    if image is not None and request.stages is not None:
        before = image.size
    else:
        multiple = layout.multiple
        if request.width is None and image is not None:
            request.width, request.height = (max(multiple, round(side / multiple) * multiple) for side in image.size)
        elif request.width is None:
            request.width, request.height = layout.width, layout.height
        before = request.width, request.height
        _stages.check_size("--size", before, layout)
    if request.steps > layout.train_steps:
        raise Problem(f"--steps: expected at most the {layout.train_steps} of this model, got {request.steps}")
    if request.stages is not None:
        name = "--image" if image is not None else "the picture before the stages"
        _stages.settle(request.stages, layout, request.attention, before, name)
    if request.negative_prompt is not None and layout.class_name == "FluxPipeline":
        if layout.reads_guidance:
            raise Problem("--negative-prompt: this FLUX reads its guidance as a number and takes no negative prompt")
        if request.guidance is None and model.kind != "bundled":
            raise Problem("--negative-prompt needs --guidance above 1, and this FLUX is drawn without unless told")


def _open(path: str):
    """A picture in RGB, the right way up."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise Problem(f"--image: cannot read {path} as a picture: {line(error)}") from error


def _settle_dtype(request: Request, layout: Layout) -> None:
    import torch

    if request.dtype == "auto":
        # Transformers were trained in bfloat16, and some of their values are beyond float16.
        wide = not layout.has_unet and request.device == "cuda" and torch.cuda.is_bf16_supported()
        request.dtype = "float32" if request.device == "cpu" else "bfloat16" if wide else "float16"


# ---------------------------------------------------------------------------------------------------------- records


# ---------------------------------------------------------------------------------------------------------- drawing


def _load(request: Request, layout: Layout, sources: dict[str, Source | None]):
    """(the pipeline on its device, with its LoRA, the adapter that is mounted on it or None)."""
    import diffusers
    import torch
    import transformers

    from linattn.schedulers import PeRFlowScheduler  # noqa: F401 (pipelines saved with it: diffusers imports nothing)

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    first = layout.class_name if request.image is None or request.stages is not None else layout.kind.img2img
    kind, dtype = getattr(diffusers, first), getattr(torch, request.dtype)
    _settle_guidance(request, layout, sources["model"])
    try:
        with quiet_diffusers():
            # Local files only, whatever the model's configs name: all that is needed was fetched before.
            pipe = kind.from_pretrained(sources["model"].path, dtype=dtype, use_safetensors=True, local_files_only=True)
            pipe.to(request.device, dtype)  # dtype again: older diffusers do not know the argument above
    except Exception as error:  # what is wrong with the files of a folder comes out as any type
        raise_if_memory(error)
        raise Problem(f"--model: cannot load {request.model}: {type(error).__name__}: {line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    attention = _attention.mount(pipe, request, sources["weights"])
    if request.lora is not None:
        _load_lora(pipe, Path(request.lora), request.lora_scale)
    return pipe, attention


def _settle_guidance(request: Request, layout: Layout, model: Source) -> None:
    import diffusers

    if request.guidance is None:
        own = inspect.signature(getattr(diffusers, layout.class_name).__call__).parameters["guidance_scale"].default
        if layout.class_name == "FluxPipeline" and not layout.reads_guidance:
            own = 1.0  # distilled to do without, like FLUX.1-schnell
        request.guidance = guidance_of(model) if model.kind == "bundled" else own
    for stage in request.stages or ():
        if stage.guidance is None:
            stage.guidance = request.guidance


def _load_lora(pipe, path: Path, scale: float) -> None:
    try:
        with quiet_diffusers():
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora", local_files_only=True)
            found = {name for names in pipe.get_list_adapters().values() for name in names}
            if "lora" in found:
                pipe.set_adapters("lora", scale)
    except Exception as error:
        raise_if_memory(error)
        raise Problem(f"--lora: cannot use {path}: {type(error).__name__}: {line(error)}") from error
    if "lora" not in found:
        raise Problem(f"--lora: nothing in {path} belongs to a layer of this model")


def _summary(request: Request, layout: Layout) -> str:
    many = f"{request.count} pictures of " if request.count > 1 else ""
    size = f"{request.width}x{request.height} pixels" if request.width is not None else "--image"
    if request.stages is not None:
        sizes = ", ".join(f"{stage.width}x{stage.height}" for stage in request.stages)
        first = ", the first with stock attention" if request.base_attention == "stock" else ""
        size += f" and then {sizes}{first}"
    return (
        f"{layout.class_name} {request.model}, {_attention.name(request)}: {many}{size}, {request.steps} steps, "
        f"guidance {request.guidance:g}, {request.dtype} on {request.device}"
    )


def _draw(pipe, attention, request: Request, image, files: Files):
    """Draw and save one picture after the other; yields the part of the record that belongs to each."""
    import torch
    from tqdm.auto import tqdm

    draw = _drawing(pipe, attention, request, image)
    # Steps of each call that draws a picture; some schedulers need one more, and image to image does a part of them.
    plan = [request.steps] * (request.stages is None or image is None)
    plan += [math.ceil(stage.steps * stage.strength) for stage in request.stages or ()]

    def wait():
        if request.device == "cuda":
            torch.cuda.synchronize()

    with tqdm(total=request.count * sum(plan), unit="step", disable=None, file=sys.stderr) as bar:
        for number, path in enumerate(files.pictures):
            bar.set_description(f"drawing {number + 1}/{request.count}" if request.count > 1 else "drawing")
            ends, call = [], itertools.count()

            def after_step(pipe, step, timestep, tensors, ends=ends, call=call):
                wait()
                ends.append(time.perf_counter())
                if step == 0:
                    plan[next(call)] = pipe.num_timesteps
                    bar.total = request.count * sum(plan)
                bar.update()
                return tensors

            # One at a time and noise from the CPU: a picture depends neither on those beside it nor on the device.
            seed = request.seed + number
            wait()
            start = time.perf_counter()
            try:
                drawn = draw(torch.Generator().manual_seed(seed), after_step)
            except (RuntimeError, ValueError) as error:
                raise_if_memory(error)
                raise
            wait()
            seconds = time.perf_counter() - start
            picture, pixels = _to_picture(drawn, path)
            try:
                picture.save(path, **({"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}))
            except (OSError, KeyError) as error:  # KeyError: a Pillow that was built without this format
                raise Problem(f"cannot write {path}: {line(error)}") from error
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


def _drawing(pipe, attention, request: Request, image):
    """The call that draws one picture: (generator, callback after each step) -> what the pipeline returns."""
    from linattn.evaluate import call_arguments
    from linattn.pipelines import high_resolution

    def guided(scale: float) -> dict:
        options = call_arguments(pipe, 1, scale)
        if request.negative_prompt is not None:
            options["negative_prompt"] = request.negative_prompt
        return options

    options = guided(request.guidance) | {"num_inference_steps": request.steps}
    size = {"width": request.width, "height": request.height}
    if request.stages is not None:
        options |= {
            "stages": [_stages.for_helper(stage, **guided(stage.guidance)) for stage in request.stages],
            "attention": attention,
            "attention_in_base": request.base_attention == "same",
            **(size if image is None else {"image": image}),
        }
        pipe = functools.partial(high_resolution, pipe)
    elif image is None:
        options |= size
    else:
        if image.size != (request.width, request.height):
            image = image.resize((request.width, request.height))  # bicubic
        options |= {"image": image, "strength": request.strength}
        if "height" in inspect.signature(type(pipe).__call__).parameters:
            options |= size

    def draw(generator, after_step):
        return pipe(request.prompt, generator=generator, callback_on_step_end=after_step, output_type="np", **options)

    return draw


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
