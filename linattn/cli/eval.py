"""Scores of pictures: of a folder or of captions against real pictures, or of a model that draws handwritten digits.

With --folder (pictures that are there) or --captions (a text file: line i is drawn with seed i, as linattn generate
draws it): FID, precision, recall, density and coverage --against a folder of real pictures or a file of their
statistics, and CLIP score with --clip, all with 95 % intervals. A run that was stopped goes on with what is in --cache.
Several GPUs: accelerate launch -m linattn eval ... What the figures are: docs/evaluation.md.

Without either: stock attention, controls, and linear attention of a model that draws canvases of digits.
Every variant draws the same held-out orders of digits with the same seeds. A judge trained on real digits reads them;
the tables give exact-sequence accuracy, Frechet distances to real canvases, the difference to the teacher seed by seed,
and diversity, all with 95 % intervals, beside what real digits score in the same way. The JSON has every figure, what
was read in every picture, and the command that gives the same figures again.
What the scores are, exactly, stands in linattn/evaluate.py.

variants:
  teacher   the model as it is
  zeroed    of a UNet: every self-attention gives zeros, what is possible without any
  alone     of a transformer (FLUX, SD3): image tokens see themselves and the text, but no other image token
  before    linear attention (LinFusion), or the windows of the student (CLEAR), with the model's own weights
  after     the same with the weights of --student
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from linattn._quiet import quiet_diffusers
from linattn.cli import _eval_pictures, _variants
from linattn.cli._attention import bundled_student
from linattn.cli._eval_files import check_out, check_writable, say, threads, write
from linattn.cli._models import (
    USUAL_GUIDANCE,
    Problem,
    Source,
    check_safetensors,
    digests,
    fetch,
    fetch_pipeline,
    guidance_of,
    line,
    locate,
    raise_if_memory,
    read_config,
    read_layout,
)

if TYPE_CHECKING:
    from linattn.evaluate import Evaluation

HELP = "scores of pictures: FID, CLIP score, precision, recall; accuracy of a model that draws digits"

#: Names the layout of the JSON; another layout gets another number.
FORMAT = "linattn eval 1"
DEFAULTS = {"n": 100, "digits": [2, 3, 4], "steps": 15}
QUICK = {"n": 8, "digits": [3], "steps": 8}
LARGEST_SEED = 2**63 - 1
LINE = 2  # pixels between the pictures of a sheet

EXAMPLES = """\
examples:
  linattn eval --quick
  linattn eval --out scores.json --pictures drawn
  linattn eval --model ./my_pipeline --student ./my_student --digits 3 --n 300 --variants teacher after
  linattn eval --folder drawn --against coco_val2014 --resolution 256 --save-statistics drawn.safetensors
  linattn eval --captions captions.txt --model ./my_pipeline --steps 4 --against coco.safetensors --resolution 256 \\
      --clip openai/clip-vit-large-patch14
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME|FOLDER", help="bundled name, folder or hub name of a pipeline [the bundled one]"
    )
    parser.add_argument(
        "--student",
        metavar="NAME|FOLDER",
        help="LinFusion or CLEAR weights: bundled name, folder or hub name [for a bundled model its bundled student]",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(_variants.TITLES),
        metavar="VARIANT",
        help=f"of {', '.join(_variants.TITLES)} [all]",
    )
    parser.add_argument(
        "--n",
        type=int,
        help=f"pictures per number of digits, and of seen orders; captions [{DEFAULTS['n']}; quick {QUICK['n']}; all]",
    )
    parser.add_argument(
        "--digits",
        type=int,
        nargs="+",
        metavar="K",
        help=f"numbers of digits on a canvas [{_words(DEFAULTS['digits'])}; quick {_words(QUICK['digits'])}]",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of orders, noise and real canvases; of the first caption [0]"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=f"denoising steps [{DEFAULTS['steps']}; quick {QUICK['steps']}; captions: as generate]",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help=f"how strongly to follow the prompt [that of the model's recorded scores, else {USUAL_GUIDANCE:g}]",
    )
    parser.add_argument("--out", type=Path, default=Path("eval.json"), metavar="FILE", help="the JSON [eval.json]")
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="write all pictures there, one sheet per variant and set; of captions 000000.png and so on [in --cache]",
    )
    parser.add_argument("--quick", action="store_true", help="few pictures and steps: to see that it runs")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch [as it chooses]")
    _eval_pictures.add_arguments(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except Problem as problem:
        print(f"linattn eval: {problem}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"linattn eval: {line(error)}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    if _eval_pictures.wanted(args):
        return _eval_pictures.run(args)
    # What costs nothing is checked first, then what needs torch, then what needs the hub, and only then is drawn.
    for name, value in (QUICK if args.quick else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    _check_values(args)
    _eval_pictures.check_absent(args)
    check_out(args.out)
    if args.pictures is not None:
        check_writable("--pictures", args.pictures, args.pictures)
    _check_installed()

    from linattn import bundled

    model = locate("--model", args.model or bundled.path().name)
    if model.path is None:
        model.path = fetch(model, None, ["*.json"])
    layout = read_layout(model)
    if args.guidance is None:
        args.guidance = guidance_of(model)
    if args.steps > layout.train_steps:
        raise Problem(f"--steps: expected at most the {layout.train_steps} of this model, got {args.steps}")
    student, chosen = _student(args, model, layout)
    if model.kind == "hub":
        fetch_pipeline(model)
    check_safetensors(model, layout)
    sources = digests(model, layout, student)

    with threads(args.threads):
        pipe = load_pipeline(model.path)
        result = _evaluate(
            args,
            pipe,
            _variants.variants(None if student is None else student.path, chosen, is_unet=layout.has_unet),
        )
        record = {
            "format": FORMAT,
            "command": _command(args, model, student, chosen),
            "sources": {key: source and source.to_record() for key, source in sources.items() if key in _SOURCES},
            **_facts(pipe),
            **result.to_json(),
        }
    write(args.out, record)
    print(tables(result))
    say(f"\nevery figure, and what was read in every picture: {args.out}")
    return 0


_SOURCES = ("model", "weights")


def _words(values) -> str:
    return " ".join(map(str, values))


# ----------------------------------------------------------------------------------------- for the demo and training


def load_pipeline(path):
    """A pipeline from a folder, float32 on the CPU, without progress bars of its own.

    Raises:
        Problem: it cannot be loaded; the message says why.
    """
    import diffusers
    import torch
    import transformers

    from linattn.schedulers import PeRFlowScheduler  # noqa: F401 (pipelines saved with it: diffusers imports nothing)

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet_diffusers():
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
            pipe.to("cpu", torch.float32)  # dtype again: older diffusers do not know the argument above
    except Exception as error:  # what is wrong with the files of a folder comes out as any type
        raise Problem(f"--model: cannot load {path}: {type(error).__name__}: {line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tables(result: Evaluation, titles: Mapping[str, str] = _variants.TITLES) -> str:
    """An evaluation as tables in text: accuracies, distances, diversity, and paired differences."""
    from linattn.demos._layout import table

    groups, settings = list(result.groups), result.settings
    rows = {titles.get(name, name): result.summary(name) for name in result.variants}
    rows["real digits"] = result.summary(None)
    overall = _overall(groups)
    accuracy = table(
        ["exact sequence", *groups],
        [[title, *(_number(figures["exact"][group], 2) for group in groups)] for title, figures in rows.items()],
    )
    details = table(
        [overall, "number of digits", "digit in its place", "FD digits", "FD canvas"],
        [
            [
                title,
                _number(figures["count"][overall], 2),
                _number(figures["place"][overall], 2),
                _number(figures["digits_distance"], 3),
                _number(figures["canvas_distance"], 4),
            ]
            for title, figures in rows.items()
        ],
    )
    pictures = table(
        ["same prompts", "MSE to teacher, same seed", "diversity, other seed", "of handwriting"],
        [
            [
                title,
                _number(figures["error"], 5),
                _number(figures["canvas_diversity"], 2),
                _number(figures["writing_diversity"], 2),
            ]
            for title, figures in rows.items()
        ],
    )
    parts = [
        f"{settings['n']} pictures per set of orders, {settings['steps']} steps, guidance "
        f"{settings['guidance_scale']:g}, seed {settings['seed']}; in brackets {settings['level']:.0%} intervals",
        accuracy,
        f"The judge reads {result.judge_accuracy:.1%} of single held-out digits; the row of real digits is the most "
        "that it can give.",
        details,
        "FD: Frechet distance of the ink to canvases of held-out real digits, of single digits and of whole canvases, "
        "over\nall sets. It falls with the number of pictures: compare it with the real digits of this table only.",
        pictures,
        "Diversity: distance of two pictures of one prompt relative to that of real ones; 0 is one picture per prompt.",
    ]
    if result.comparisons():
        differences = {f"{a} − {b}": result.difference(a, b) for a, b in result.comparisons()}
        parts.append(
            table(
                ["exact sequence, paired", *groups],
                [
                    [title, *(_number(figures["exact"][group], 2, "+") for group in groups)]
                    for title, figures in differences.items()
                ],
            )
        )
    return "\n\n".join(parts)


def _overall(groups: list[str]) -> str:
    return "held out" if "held out" in groups else groups[0]


def _number(figure, places: int, sign: str = "") -> str:
    if figure is None:
        return "–"
    value, low, high = (f"{round(x, places) + 0.0:{sign}.{places}f}" for x in figure)  # no -0.00
    return f"{value} [{low}, {high}]"


# ---------------------------------------------------------------------------------------------------------- checks


def _check_values(args: argparse.Namespace) -> None:
    from linattn.bundled.canvases import LONGEST

    for name, least in (("n", 2), ("steps", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise Problem(f"--{name}: expected {least} or more, got {value}")
    if not 0 <= args.seed <= LARGEST_SEED:
        raise Problem(f"--seed: expected 0 to 2^63 - 1, got {args.seed}")
    if args.guidance is not None and (not math.isfinite(args.guidance) or args.guidance < 0):
        raise Problem(f"--guidance: expected 0 or more, got {args.guidance:g}")
    if len(set(args.digits)) < len(args.digits) or not all(1 <= k <= LONGEST for k in args.digits):
        raise Problem(f"--digits: expected different numbers from 1 to {LONGEST}, got {_words(args.digits)}")
    if args.variants is not None and len(set(args.variants)) < len(args.variants):
        raise Problem(f"--variants: expected each once, got {_words(args.variants)}")


def _check_installed() -> None:
    needed = {"diffusers": "diffusers", "transformers": "transformers", "accelerate": "accelerate", "PIL": "pillow"}
    needed |= {"sklearn": "scikit-learn"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise Problem(f"{', '.join(missing)} missing: pip install 'linattn[demo]'")
    # Before they are imported: remarks about the libraries' own optional parts would bury what matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _student(args: argparse.Namespace, model, layout) -> tuple[Source | None, list[str]]:
    """Where the student's weights are (tried on a model without memory), and the variants that can be drawn."""
    existing = _variants.OF_UNETS if layout.has_unet else _variants.OF_TRANSFORMERS
    chosen = args.variants or list(existing)
    for name in chosen:
        if name not in existing:
            raise Problem(f"--variants {name}: a {layout.class_name} has {', '.join(existing)}")
    # Of linear attention all is said without a student; how large a window is, it has to say.
    needing = [name for name in chosen if name == "after" or (name == "before" and not layout.has_unet)]
    if not needing:
        if args.student is not None:
            raise Problem(f"--student {args.student} is drawn by the variant 'after', which --variants leaves out")
        _try_on(layout, model, None)
        return None, chosen
    kind = "LinFusion" if layout.has_unet else "CLEAR"
    name = args.student or (bundled_student(model.name, kind) if model.kind == "bundled" else None)
    if name is None:
        why = f"there is no student for {model.name}; --student NAME|FOLDER gives one"
        if args.variants is not None:
            raise Problem(f"--variants {needing[0]}: {why}")
        listed = " and ".join(f"{name!r}" for name in needing)
        say(f"{why}. Without it {'the variant' if len(needing) == 1 else 'variants'} {listed} cannot be drawn.")
        _try_on(layout, model, None)
        return None, [one for one in chosen if one not in needing]
    source = locate("--student", name)
    if source.kind == "hub":
        source.path = fetch(source, None, ["config.json", "*.safetensors"])
    config = read_config(source, "config.json")
    if not isinstance(config.get("modules_list"), list) or (config.get("_class_name") == "CLEAR") != (kind == "CLEAR"):
        what = "config.json has no modules_list" if "modules_list" not in config else f"a {config.get('_class_name')}"
        raise Problem(f"--student: {source.name} holds no {kind} weights ({what})")
    if not any(source.path.glob("*.safetensors")):
        raise Problem(f"--student: {source.name} has no .safetensors file (pickled weights are not read)")
    _try_on(layout, model, source, config)
    return source, chosen


def _try_on(layout, model, source, config: dict | None = None) -> None:
    """Raise where the network cannot be built or has no attention to replace, or the student does not fit it."""
    import diffusers
    import torch

    from linattn.adapters import CLEAR, LinFusion

    with torch.device("meta"), quiet_diffusers():
        try:
            network = getattr(diffusers, layout.kind.model).from_config(layout.denoiser)
            if layout.has_unet:
                LinFusion.get_default_config(network)
            else:
                CLEAR.construct_for(network, window_size=1, load_pretrained=False).unmount()
        except (ValueError, TypeError, RuntimeError) as error:
            what = "UNet" if layout.has_unet else "transformer"
            raise Problem(f"--model: the {what} of {model.name} cannot be used: {line(error)}") from error
        if config is not None:
            try:
                (LinFusion if layout.has_unet else CLEAR).from_config(config).mount_to(network)
            except (ValueError, TypeError, KeyError) as error:
                raise Problem(f"--student: {source.name} does not go with {model.name}: {line(error)}") from error


# --------------------------------------------------------------------------------------------------------- the work


def _evaluate(args: argparse.Namespace, pipe, wanted: dict) -> Evaluation:
    from tqdm.auto import tqdm

    from linattn.evaluate import canvas_sets, evaluate_canvases

    total = sum(len(one.orders) + len(one.again) for one in canvas_sets(args.n, args.digits, seed=args.seed))
    drawn = dict.fromkeys(wanted, 0)
    with tqdm(total=total * len(wanted), unit="picture", disable=None, file=sys.stderr) as bar:

        def progress(name: str, done: int, of: int) -> None:
            bar.set_description(f"drawing: {name}")
            bar.update(done - drawn[name])
            drawn[name] = done

        try:
            return evaluate_canvases(
                pipe,
                wanted,
                n=args.n,
                lengths=args.digits,
                seed=args.seed,
                steps=args.steps,
                guidance_scale=args.guidance,
                progress=progress,
                keep=None if args.pictures is None else functools.partial(_save_sheet, args.pictures),
            )
        except FloatingPointError as error:
            raise Problem(str(error)) from error
        except (RuntimeError, ValueError) as error:
            raise_if_memory(error)
            raise


def _save_sheet(folder: Path, name: str, one, pictures) -> None:
    """All pictures of a variant and set as one picture, in rows, in the order of the JSON, with lines between them."""
    import torch
    from PIL import Image

    pictures = torch.nn.functional.pad(pictures, (0, LINE, 0, LINE), value=0.7)
    columns = math.ceil(math.sqrt(len(pictures)))
    missing = -len(pictures) % columns
    sheet = torch.cat([pictures, torch.ones(missing, *pictures.shape[1:])])
    sheet = torch.cat([torch.cat(list(row), 2) for row in sheet.split(columns)], 1)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = (sheet.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(folder / f"{name}_{one.name.replace(' ', '_')}.png")


def _command(args: argparse.Namespace, model, student, chosen: list[str]) -> str:
    """The command line that gives the same figures, every choice written out."""
    import torch

    words = ["linattn", "eval", "--model", model.name]
    if student is not None:
        words += ["--student", student.name]
    words += ["--variants", *chosen, "--n", args.n, "--digits", *args.digits, "--seed", args.seed]
    words += ["--steps", args.steps, "--guidance", f"{args.guidance:g}"]
    words += ["--threads", torch.get_num_threads(), "--out", args.out]
    return shlex.join(map(str, words))


def _facts(pipe) -> dict:
    """What besides the command decides over the last digits."""
    import torch

    from linattn import backend
    from linattn.cli import doctor

    extra = {name: importlib.metadata.version(name) for name in ("scikit-learn", "scipy")}
    return {
        "versions": doctor.versions() | extra,
        "machine": doctor.processor(),
        "backend": backend.choose("linear_attention", torch.device("cpu"), torch.float32),
        "scheduler": {"class": type(pipe.scheduler).__name__, "config": dict(pipe.scheduler.config)},
    }
