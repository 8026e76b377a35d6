"""Few-step students of the bundled Stable Diffusion: train one, score it, and hold it against DDIM at as many steps.

    python examples/few_steps.py --list                              the rows of the table in docs/bundled_models.md
    python examples/few_steps.py perflow --seed 0 --out build        trains this student and scores it
    python examples/few_steps.py ddim_4 --out build                  the teacher itself: scored alone
    python examples/few_steps.py --student run/final --steps 4       any student of `linattn distill`
    python examples/few_steps.py perflow --out build --bundle DIR    writes it as one of linattn/bundled, in float16

A row is drawn on held-out orders of digits and scored by linattn.evaluate; every row draws the same orders from the
same seeds, so that differences are paired. A student's row is trained first, by `linattn distill` as printed, unless
OUT holds it already. The scores of a row go into OUT/ROW.json (ROW-SEED.json of a student); the line that is printed
compares with the row of the teacher that is named, if OUT or --records holds it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import resource
import shlex
import shutil
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here or made here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch

from linattn import bundled, delta_weights, few_steps
from linattn.bundled import canvases
from linattn.cli import doctor

CANVASES = 2000  # that students are trained on
LINEAR = "linattn.adapters:LinFusion"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: what it is called there.
        steps, guidance: how it is drawn.
        recipe: of `linattn distill`; None: the teacher itself, by DDIM.
        changes: of the recipe.
        linear: the student has linear attention, which starts as the bundled LinFusion weights.
        beside: the row of the teacher that it is compared with: DDIM at as many steps.
        spacing: of DDIM's noise levels.
    """

    title: str
    steps: int
    guidance: float = 1.0
    recipe: str | None = None
    changes: tuple[str, ...] = ()
    linear: bool = False
    beside: str | None = None
    spacing: str | None = None

    @property
    def made_by(self) -> tuple:
        """What decides over the student."""
        return self.recipe, self.changes, self.linear


ROWS = {
    "ddim_25": Row("teacher, DDIM", 25, few_steps.GUIDANCE),
    "ddim_4": Row("teacher, DDIM", 4, few_steps.GUIDANCE, spacing="trailing"),
    "ddim_2": Row("teacher, DDIM", 2, few_steps.GUIDANCE, spacing="trailing"),
    "ddim_4_unguided": Row("teacher, DDIM, not guided", 4, spacing="trailing"),
    "perflow": Row("PeRFlow", 4, recipe="perflow_tiny_sd", beside="ddim_4"),
    "perflow_2": Row("PeRFlow", 2, recipe="perflow_tiny_sd", changes=("objective.windows=2",), beside="ddim_2"),
    "flash": Row("Flash", 4, recipe="flash_tiny_sd", beside="ddim_4"),
    "flash_2": Row("Flash", 2, recipe="flash_tiny_sd", beside="ddim_2"),
    "linfusion_perflow": Row(
        "LinFusion + PeRFlow",
        4,
        recipe="perflow_tiny_sd",
        changes=("training.steps=400",),
        linear=True,
        beside="ddim_4",
    ),
    "linfusion_flash": Row(
        "LinFusion + Flash",
        4,
        recipe="flash_tiny_sd",
        changes=("training.steps=250", "objective.phases.steps=[60, 190]"),
        linear=True,
        beside="ddim_4",
    ),
}


def command_of(row: Row, seed: int, out: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """`linattn distill` for a student of a row."""
    changes = [f"data.path={out / 'canvases'}", f"data.cache.folder={out / 'cache'}", f"output.folder={folder}"]
    changes += [f"training.seed={seed}", *row.changes]
    if row.linear:
        weights = bundled.path("tiny_sd_linfusion")
        changes += [f"student.adapter={LINEAR}", f"student.pretrained={weights}"]
    command = ["linattn", "distill", row.recipe]
    for change in changes:
        command += ["--set", change]
    return command


def train(row: Row, seed: int, out: pathlib.Path, folder: pathlib.Path, threads: int) -> dict:
    """Train a student of a row unless it is there; what its training took."""
    report = folder / "training.json"
    if report.is_file():
        return json.loads(report.read_text())
    if not (out / "canvases").is_dir():
        canvases.write_folder(out / "canvases", CANVASES, seed=0)
    command = command_of(row, seed, out, folder)
    print(shlex.join(command), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    # Pictures and captions are encoded once for all students; what that takes is no student's.
    prepared = _cpu_seconds([sys.executable, "-m", *command, "--prepare"], environment)
    seconds = _cpu_seconds([sys.executable, "-m", *command], environment)
    found = {"cpu_seconds": round(seconds), "prepare_cpu_seconds": round(prepared), "seed": seed, "threads": threads}
    report.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _cpu_seconds(command: list[str], environment: dict) -> float:
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    subprocess.run(command, env=environment, check=True)
    return spent() - before


def bundle(row: Row, final: pathlib.Path, folder: pathlib.Path, record: dict) -> None:
    """Write a student as it ships, for few_steps.student: its delta in float16, its scheduler, and a card."""
    folder.mkdir(parents=True, exist_ok=True)
    delta = delta_weights.load(final / delta_weights.FILE_NAME)
    delta_weights.save({key: value.half() for key, value in delta.items()}, folder)
    shutil.copytree(final / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    card = {
        "what": f"{row.title} for {few_steps.MODEL}: {row.steps} steps, not guided; the difference to its UNet",
        "command": f"{record['command']} --bundle DIR",
        "recipe": row.recipe,
        **{key: record[key] for key in ("date", "steps", "guidance", "training", "settings", "versions")},
        "scores": record["summary"],
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def facts() -> dict:
    cpu = doctor.processor()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": str(cpu["name"]),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def find(name: str, folders: list[pathlib.Path]) -> dict | None:
    for folder in folders:
        if (folder / f"{name}.json").is_file():
            return json.loads((folder / f"{name}.json").read_text())
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", choices=list(ROWS), metavar="ROW", help="see --list")
    parser.add_argument("--list", action="store_true", help="the rows")
    parser.add_argument("--student", metavar="FOLDER|NAME", help="in the place of a row: a student that is there")
    parser.add_argument("--steps", type=int, help="with --student")
    parser.add_argument("--guidance", type=float, default=1.0, help="with --student [1: not guided]")
    parser.add_argument(
        "--beside", choices=[k for k, r in ROWS.items() if r.recipe is None], help="row to compare with"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training [0]")
    parser.add_argument("--n", type=int, default=200, help="pictures per number of digits [200]")
    parser.add_argument("--digits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--draw-seed", type=int, default=8, help="of orders and noise, the same for every row [8]")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/few_steps"))
    parser.add_argument("--records", type=pathlib.Path, help="where the JSON goes [OUT]")
    parser.add_argument("--bundle", type=pathlib.Path, metavar="DIR", help="write the row's student there as it ships")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)

    if args.list:
        for name, row in ROWS.items():
            print(f"{name:20} {row.title}, {row.steps} steps" + (f" ({row.recipe})" if row.recipe else ""))
        return 0
    if (args.row is None) == (args.student is None) or (args.student is not None and args.steps is None):
        parser.error("expected a row, or --student and --steps")
    if args.bundle and (args.row is None or ROWS[args.row].recipe is None or ROWS[args.row].linear):
        parser.error("--bundle: expected the row of a student with the model's own attention")
    torch.set_num_threads(args.threads)
    out, records = args.out, args.records or args.out
    for folder in (out, records):
        folder.mkdir(parents=True, exist_ok=True)

    training = None
    if args.student is not None:
        name, row = pathlib.Path(args.student).name, Row(args.student, args.steps, args.guidance, beside=args.beside)
        way = few_steps.student(args.student, steps=row.steps, guidance=row.guidance)
    elif (row := ROWS[args.row]).recipe is None:
        name, way = args.row, few_steps.teacher(steps=row.steps, guidance=row.guidance, spacing=row.spacing)
    else:
        name = f"{args.row}-{args.seed}"
        # Rows that differ only in how they are drawn share a student.
        same = [key for key, other in ROWS.items() if other.made_by == row.made_by]
        folder_of = f"{same[0]}-{args.seed}"
        training = train(row, args.seed, out, out / folder_of, args.threads)
        way = few_steps.student(out / folder_of / "final", steps=row.steps, guidance=row.guidance)

    record = few_steps.score(way, n=args.n, lengths=args.digits, seed=args.draw_seed)
    words = ["python", "examples/few_steps.py", *([args.row] if args.row else ["--student", name])]
    words += ["--steps", row.steps, "--guidance", f"{row.guidance:g}"] if args.student else []
    words += ["--seed", args.seed] if training else []
    words += ["--n", args.n, "--digits", *args.digits, "--draw-seed", args.draw_seed, "--threads", args.threads]
    record = {"row": args.row, "title": row.title, "beside": row.beside, "training": training, **record, **facts()}
    record["command"] = shlex.join(map(str, words))
    (records / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")

    if args.bundle:
        bundle(row, out / folder_of / "final", args.bundle, record)
    print(f"{name}: {row.steps} steps, {way.network_calls} calls of the network, {record['sampler']}")
    figures = record["summary"]
    for group, figure in figures["exact"].items():
        print("  exact, {:9} {:.3f} [{:.3f}, {:.3f}]".format(group, *figure))
    print("  Frechet distance {:.4f} [{:.4f}, {:.4f}]".format(*figures["canvas_distance"]))
    print("  diversity {:.2f} [{:.2f}, {:.2f}]".format(*figures["canvas_diversity"]))
    print("  CPU seconds a picture {:.3f} [{:.3f}, {:.3f}]".format(*record["cpu_seconds"]))
    plain = find(row.beside, [records, out]) if row.beside else None
    if plain is not None:
        print("  exact above {}: {:+.3f} [{:+.3f}, {:+.3f}]".format(row.beside, *few_steps.gain(record, plain)))
    if plain is not None and plain["settings"] == record["settings"]:
        closer = few_steps.distance_gain(record, plain)
        print("  Frechet distance below {}'s by {:+.4f} [{:+.4f}, {:+.4f}]".format(row.beside, *closer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
