"""Train a model as a recipe says: `linattn distill linfusion_sd15 --set data.path=pictures --set output.folder=run`.

A run that was stopped or killed goes on where its last checkpoint stands when the same command is given again. The
result is in <output.folder>/final. On several GPUs: `accelerate launch -m linattn distill ...`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

HELP = "train a student with cheaper attention or fewer steps, or Inf-DiT, from a recipe (YAML)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="YAML file, or the name of a shipped recipe (--list)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one key, e.g. --set training.steps=500; may be given again",
    )
    parser.add_argument("--list", action="store_true", help="the shipped recipes")
    parser.add_argument("--show", action="store_true", help="print the whole recipe with its defaults and stop")
    parser.add_argument(
        "--prepare", action="store_true", help="encode captions and pictures into the cache (data.cache), and stop"
    )
    parser.add_argument("--dry-run", action="store_true", help="load everything, say what would be done, and stop")


def run(args: argparse.Namespace) -> int:
    try:
        from linattn.distill import recipe as recipes
    except ImportError as error:
        return _fail(f"{error.name} is missing: pip install 'linattn[train]'")
    if args.list:
        for name, path in recipes.shipped().items():
            print(f"{name:18} {path.read_text().splitlines()[0].lstrip('# ')}")
        return 0
    if args.recipe is None:
        return _fail("which recipe? A YAML file, or one of " + ", ".join(recipes.shipped()))
    try:
        recipe = recipes.load(args.recipe, args.overrides)
        if args.show:
            print(recipe.to_yaml(), end="")
            return 0
        adapter_class = resolve(recipe.student.adapter) if recipe.student.adapter else None
        pipeline_class = resolve(recipe.model.pipeline, "model.pipeline") if recipe.model.pipeline else None
        paths = {
            "objective.perceptual": getattr(recipe.objective, "perceptual", None),
            "model.kind": recipe.model.kind,
        }
        named = {key: resolve(path, key) for key, path in paths.items() if path}
        # Before the models are imported: what they say about their own optional parts would bury what matters.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from linattn.distill.trainer import Interrupted, Trainer

        trainer = Trainer(
            recipe,
            adapter_class,
            pipeline_class=pipeline_class,
            named=named,
            say=lambda text: print(text, flush=True),
        )
        trainer.say(trainer.plan())
        if args.dry_run:
            return 0
        if args.prepare:
            trainer.say(f"prepared: {trainer.prepare()}")
            return 0
        try:
            final = trainer.run()
        except Interrupted as stop:
            print(f"stopped after step {stop.step}; the same command goes on from there", file=sys.stderr)
            return 128 + stop.signal
    except ImportError as error:
        return _fail(f"{error}")
    except (ValueError, OSError, FloatingPointError) as error:
        return _fail(str(error))
    trainer.say(f"done: {final}")
    return 0


def resolve(import_path: str, key: str = "student.adapter") -> type:
    """The class that "module:Class" names.

    Args:
        key: of the recipe, for messages.

    Raises:
        ValueError: there is no such module or class; the message says which of the two.
    """
    module_name, _, name = import_path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise  # the module exists, and needs something that does not
        raise ValueError(f"{key}: there is no module {module_name!r} (in {import_path!r})") from None
    found = getattr(module, name, None)
    if found is None:
        raise ValueError(f"{key}: {module_name} has no {name!r}")
    return found


def _fail(message: str) -> int:
    print(f"linattn distill: {message}", file=sys.stderr)
    return 1
