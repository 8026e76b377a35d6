"""The tables of README.md, generated: `python -m benchmarks.tables` writes them, `--check` fails where they are stale.

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`. What stands there comes from the module of that
NAME in benchmarks/readme/ (underscores for hyphens), one file per table, found by looking: `render(results) -> str`.
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


def filled(text: str, results: Results) -> str:
    """`text` with every marked table generated anew. Raises KeyError for a name that no module has."""
    known = generators()
    opened = text.count("<!-- table: ")
    if opened != len(_BLOCK.findall(text)):
        raise ValueError(f"{opened} tables are opened, {len(_BLOCK.findall(text))} are well formed")

    def replacement(match: re.Match) -> str:
        if match[2] not in known:
            raise KeyError(f"there is no table {match[2]!r}; known: {', '.join(known)}")
        return match[1] + known[match[2]].render(results).strip() + "\n" + match[4]

    return _BLOCK.sub(replacement, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is stale")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    text = args.file.read_text()
    new = filled(text, load(args.results))
    if new == text:
        print(f"{args.file.name}: its tables are up to date")
        return 0
    if args.check:
        print(f"{args.file.name} is stale: run python -m benchmarks.tables", file=sys.stderr)
        return 1
    args.file.write_text(new)
    print(f"{args.file.name}: tables written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
