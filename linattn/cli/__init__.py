"""The command line: `linattn <command>` or `python -m linattn <command>`; without a command, the doctor's report.

Every module in this folder is one command; there is no list to add to. A module has

    NAME = "demo"                                 # optional; the module's own name by default
    HELP = "one line for `linattn --help`"
    def add_arguments(parser): ...                # an argparse.ArgumentParser
    def run(args) -> int: ...                     # the exit status

and imports what is slow or optional inside `run`, so that `linattn --help` is quick and works without extras. Its
docstring is shown by `linattn <command> --help`. Modules whose names start with an underscore are not commands.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from types import ModuleType

from linattn._version import __version__


def commands() -> dict[str, ModuleType]:
    """Every command of this folder: name -> module, sorted by name."""
    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        missing = [part for part in ("HELP", "add_arguments", "run") if not hasattr(module, part)]
        if missing:
            raise TypeError(f"{module.__name__}: a command needs {', '.join(missing)} (see linattn/cli/__init__.py)")
        found[getattr(module, "NAME", info.name)] = module
    return dict(sorted(found.items()))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="linattn",
        description="Linear-time attention for high-resolution image generation. Without a command: what is "
        "installed, and which backend each op would run on (the command doctor).",
    )
    parser.add_argument("--version", action="version", version=f"linattn {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name, module in commands().items():
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__ or module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status (130 after Ctrl-C, 1 where an optional package is missing)."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv or ["doctor"])
    if args.command is None:
        build_parser().print_help()
        return 0
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `linattn ... | head`
        sys.stderr.close()
        return 1
