"""The tables of README.md and docs/, generated: `python -m benchmarks.tables` writes them, `--check` tells stale ones.

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`. What stands there comes from the module of that
NAME in benchmarks/readme/ (underscores for hyphens), one file per table, found by looking: `render(results) -> str`.
Documents in docs/ may hold tables that others write, the tests for instance: names that are not known here are left
alone there, and are an error in README.md.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from . import readme
from .harness import record
from .harness.environment import ROOT
from .harness.runner import RESULTS

_OPENED = re.compile(r"<!-- table: ([a-z0-9-]+) -->")
_BLOCK = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)


@dataclass(frozen=True)
class Results:
    """Recorded rows per device folder of benchmarks/results, e.g. {"cpu-amd-epyc-avx512-bf16-2t": [row, ...]}."""

    devices: dict[str, list[dict[str, str]]]

    def of(self, kind: str) -> dict[str, list[dict[str, str]]]:
        """The devices of a kind, "cpu" or "cuda"."""
        return {name: rows for name, rows in self.devices.items() if name.split("-")[0] == kind}


def load(folder: Path = RESULTS) -> Results:
    """Every CSV in every device folder; files that are no benchmark record (tuning.csv) are left alone."""
    devices = {}
    for device in sorted(p for p in folder.glob("*") if p.is_dir()):
        rows = []
        for path in sorted(device.glob("*.csv")):
            if path.read_text().startswith(",".join(record.COLUMNS[:4])):
                rows += record.read(path)
        devices[device.name] = rows
    return Results(devices)


def generators() -> dict:
    """Table name -> module of benchmarks/readme/."""
    names = [info.name for info in pkgutil.iter_modules(readme.__path__) if not info.name.startswith("_")]
    return {name.replace("_", "-"): importlib.import_module(f"{readme.__name__}.{name}") for name in sorted(names)}


def filled(text: str, results: Results, *, root: str = "", foreign: bool = False) -> str:
    """`text` with every marked table generated anew.

    Args:
        root: the way from the document's folder to the checkout, e.g. "../"; links of the tables start with it.
        foreign: leave tables alone whose name no module has; otherwise they raise KeyError.
    """
    known = generators()
    names = _OPENED.findall(text)
    formed = [match[2] for match in _BLOCK.finditer(text)]
    if len(names) != len(formed):
        raise ValueError(f"{len(names)} tables are opened, {len(formed)} are well formed")

    def replacement(match: re.Match) -> str:
        if match[2] in known:
            made = known[match[2]].render(results).strip().replace("](benchmarks/", f"]({root}benchmarks/")
            return match[1] + made + "\n" + match[4]
        if foreign:
            return match[0]
        raise KeyError(f"there is no table {match[2]!r}; known: {', '.join(known)}")

    return _BLOCK.sub(replacement, text)


def documents(root: Path = ROOT) -> list[Path]:
    """README.md, and what of docs/ holds a table that is made here."""
    known = set(generators())
    docs = sorted((root / "docs").glob("*.md"))
    return [root / "README.md", *(path for path in docs if known & set(_OPENED.findall(path.read_text())))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    parser.add_argument("--file", type=Path, help="this document only (default: README.md and docs/)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    results, stale = load(args.results), 0
    for path in [args.file] if args.file else documents():
        text = path.read_text()
        in_docs = path.resolve().parent == ROOT / "docs"
        new = filled(text, results, root="../" if in_docs else "", foreign=in_docs)
        if new == text:
            print(f"{path.name}: its tables are up to date")
        elif args.check:
            print(f"{path.name} is stale: run python -m benchmarks.tables", file=sys.stderr)
            stale += 1
        else:
            path.write_text(new)
            print(f"{path.name}: tables written")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
