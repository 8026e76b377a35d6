"""What the scripts that train the bundled models share: stages that survive being killed, and what they deliver.

Each stage of a script ends in one folder under --work that appears at once (written aside, then renamed): a run that
was killed starts again with the stage that it did not finish, and the long ones inside it where their last checkpoint
stands. Numbers of steps are fixed, not times, so that the same command trains the same model on a slow machine; the
last bits still depend on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import diffusers
import safetensors.torch
import tokenizers
import torch
import transformers

from linattn.bundled import digits

CHECKPOINT_EVERY = 200


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def generators(seed: int) -> tuple[torch.Generator, random.Random]:
    """The two sources of chance of a stage: tensors, and everything else."""
    torch.manual_seed(seed)  # of the weights
    return torch.Generator().manual_seed(seed), random.Random(seed)


class Progress:
    """Prints the mean loss and the time that is left, about twenty times per stage."""

    def __init__(self, name: str, steps: int, done: int = 0):
        self.name, self.steps, self.every, self.before = (name, steps, max(1, steps // 20), done)
        self.start, self.losses = time.perf_counter(), []

    def step(self, done: int, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())
        if done % self.every == 0 or done == self.steps:
            passed = time.perf_counter() - self.start
            mean, left = (torch.stack(self.losses).mean(), passed / (done - self.before) * (self.steps - done))
            say(f"{self.name}: step {done}/{self.steps}  loss {mean:.4f}  {passed:.0f} s, {left:.0f} s left")
            self.losses.clear()


def save_checkpoint(
    path: pathlib.Path, recipe, kept: dict, rng: torch.Generator, words: random.Random, step: int
) -> None:
    """Everything that the next step depends on, in one file that is whole or absent."""
    state = {name: thing.state_dict() for name, thing in kept.items()}
    state |= {"recipe": repr(recipe), "step": step, "rng": rng.get_state(), "words": words.getstate()}
    fresh = path.with_name(path.name + ".fresh")
    torch.save(state, fresh)
    os.replace(fresh, path)


def load_checkpoint(path: pathlib.Path, recipe, kept: dict, rng: torch.Generator, words: random.Random) -> int:
    """Go on where a run of the same recipe was stopped; the number of steps that it had done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != repr(recipe):
        return 0
    for name, thing in kept.items():
        thing.load_state_dict(state[name])
    rng.set_state(state["rng"])
    words.setstate(state["words"])
    say(f"going on after step {state['step']}")
    return state["step"]


def use_everywhere(folder: pathlib.Path, text_encoders: Sequence[str]) -> None:
    """Make a pipeline that was saved in float16 load as float32 unless a torch_dtype is asked for, and everywhere."""
    for name in text_encoders:
        # transformers 5 takes the precision of the weights from this entry; diffusers' parts are float32 by default.
        # Half a pipeline in each would not run.
        edit_json(folder / name / "config.json", lambda settings: settings | {"dtype": "float32"})
    # transformers 5 drops the prefix that every published CLIP text encoder has, and reads both; older versions insist
    # on it (without it they draw from random weights, with a warning).
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    clean_configs(folder)


def edit_json(path: pathlib.Path, change: Callable[[dict], dict]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2) + "\n")


def clean_configs(folder: pathlib.Path) -> None:
    """How and from where this process had loaded the parts says nothing to a user."""
    for config in [*folder.glob("model_index.json"), *folder.rglob("*config.json")]:
        settings = json.loads(config.read_text())
        kept = {k: v for k, v in settings.items() if k not in ("_name_or_path", "is_local", "local_files_only")}
        if kept != settings:
            config.write_text(json.dumps(kept, indent=2) + "\n")


class Stages:
    """The stages of a script, in order.

    Args:
        fields: name of a stage -> the fields of the recipe that it depends on, besides all of the stages before it.
    """

    def __init__(self, fields: Mapping[str, Sequence[str]]):
        self.fields = fields

    def part_of(self, recipe, stage: str) -> dict:
        """What decides the outcome of a stage, as JSON knows it."""
        names = list(self.fields)
        relevant = [field for name in names[: names.index(stage) + 1] for field in self.fields[name]]
        return json.loads(json.dumps({field: getattr(recipe, field) for field in relevant}))

    def finished(self, folder: pathlib.Path, recipe) -> dict | None:
        """What the stage in this folder reported, if it was finished with the same recipe."""
        try:
            stage = json.loads((folder / "stage.json").read_text())
        except FileNotFoundError:
            return None
        return stage["report"] if stage["recipe"] == self.part_of(recipe, folder.name) else None

    def run(self, name: str, recipe, work: pathlib.Path, train: Callable[..., dict], *inputs: pathlib.Path) -> dict:
        """The report of a stage, after running it if it has not been: `train(recipe, folder, *inputs)`."""
        folder = work / name
        report = self.finished(folder, recipe)
        if report is not None:
            say(f"{name}: done already ({folder})")
            return report
        fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}-", dir=work))
        start = time.perf_counter()
        report = train(recipe, fresh, *inputs)
        report = {"seconds": round(time.perf_counter() - start, 1), **report}
        stage = {"recipe": self.part_of(recipe, name), "report": report}
        (fresh / "stage.json").write_text(json.dumps(stage, indent=2) + "\n")
        publish(fresh, folder)
        say(f"{name}: done in {report['seconds']:.0f} s")
        return report


def publish(fresh: pathlib.Path, final: pathlib.Path) -> None:
    """Put a complete folder in the place of an older one."""
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        fresh.rename(final)
        shutil.rmtree(old)
    else:
        fresh.rename(final)


def deliver(stage: pathlib.Path, out: pathlib.Path, card: dict) -> None:
    """A finished stage as a folder to use: its files and a card, and nothing of this machine."""
    fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    shutil.copytree(stage, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stage.json"))
    (fresh / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    for path in (fresh, *fresh.rglob("*")):  # mkdtemp's folders and the writers of weights are private
        path.chmod(0o755 if path.is_dir() else 0o644)
    publish(fresh, out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    say(f"wrote {out}: {size / 1e6:.2f} MB")


@dataclasses.dataclass
class Delivery:
    """One folder that a script writes: a finished stage with a card.

    Attributes:
        stage: the stage whose files it has.
        made_by: the stages whose reports and seconds stand in its card.
        what: one sentence.
    """

    stage: str
    made_by: Sequence[str]
    what: str


def run_script(
    script: str,
    description: str,
    recipes: tuple,
    stages: Stages,
    plan: Mapping[str, tuple],
    deliveries: Mapping[str, Delivery],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command line of a script.

    Args:
        script: its file name, for the command in the cards.
        recipes: the default one, and the one of --smoke.
        plan: name of a stage -> (function, names of the stages that it reads). A stage called "scores" reports what
            goes into every card as such.
        deliveries: name of a folder -> what is in it.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the folders are written (replaced)")
    parser.add_argument("--work", type=pathlib.Path, help="where stages are kept (default: OUT.stages beside it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of Recipe, in JSON"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--until", choices=list(stages.fields), help="stop after this stage")
    parser.add_argument("--note", default="", help="words for card.json, for example that the machine was busy")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two steps per stage: shows that it runs")
    args = parser.parse_args(arguments)

    if int(transformers.__version__.split(".")[0]) < 5:
        parser.error(
            f"training needs transformers 5 or newer, this is {transformers.__version__} (the result does not)"
        )
    default, smoke = recipes
    known = {field.name for field in dataclasses.fields(default)}
    changed = {}
    for setting in args.set:
        name, _, value = setting.partition("=")
        if name not in known:
            parser.error(f"--set {setting}: there is no {name!r}; fields: {', '.join(sorted(known))}")
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            parser.error(f"--set {setting}: expected a value in JSON, got {value!r}")
        changed[name] = tuple(value) if isinstance(value, list) else value
    recipe = dataclasses.replace(smoke if args.smoke else default, seed=args.seed, **changed)
    out = args.out.resolve()
    work = (args.work or out.with_name(out.name + ".stages")).resolve()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    for unfinished in [*work.glob(".*-*"), *out.glob(".*-*")]:
        shutil.rmtree(unfinished)  # of a run that was killed
    torch.set_num_threads(args.threads)

    reports = {}
    for name, (train, *inputs) in plan.items():
        reports[name] = stages.run(name, recipe, work, train, *(work / folder for folder in inputs))
        (work / f"{name}.checkpoint").unlink(missing_ok=True)
        if name == args.until:
            return 0

    # Everything that matters to the models, and no folder of this machine.
    words = [f"python examples/{script} --out DIR --seed {args.seed} --threads {args.threads}"]
    words += [f"--set {name}={json.dumps(value)}" for name, value in changed.items()]
    common = {
        "data": "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998, "
        f"CC BY 4.0): {len(digits.load().train)} scans for training, {digits.HELD_OUT} held out",
        "command": " ".join(words + ["--smoke"] * args.smoke),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "recipe": dataclasses.asdict(recipe),
        "threads": args.threads,
        "note": args.note,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    scores = {name: value for name, value in reports.get("scores", {}).items() if name != "seconds"}
    for name, delivery in deliveries.items():
        made_by = {stage: reports[stage] for stage in delivery.made_by}
        seconds = round(sum(report["seconds"] for report in made_by.values()), 1)
        card = {"what": delivery.what, **common, "stages": made_by, "seconds": seconds}
        if scores:
            card["scores"] = scores
        deliver(work / delivery.stage, out / name, card)
    return 0
