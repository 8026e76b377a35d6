"""The table of docs/linfusion.md that says what works with LinFusion, written from the tests that show it.

    python -m tests.helpers.plugin_matrix            runs tests/test_linfusion_plugins.py and writes the table
    python -m tests.helpers.plugin_matrix --check    writes nothing; exit status 1 where the table says something else

A test of the matrix calls `note(request, plugin, family, column, cell)`. The cell is what the table says if that test
passes. The table stands between `<!-- table: linfusion-plugins -->` and `<!-- end table -->`; one of the tests compares
it with what the tests declare, so that neither can change without the other.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "linfusion.md"
TESTS = ROOT / "tests" / "test_linfusion_plugins.py"

# Heading of each column, by the name of the property that a test checks.
COLUMNS = {
    "effect": "the picture",
    "order": "loaded before or after mounting",
    "stays": "after unmounting",
    "gone": "after unmounting and unloading",
}
FAMILIES = {"sd15": "SD 1.5", "sd21": "SD 2.1", "sdxl": "SDXL"}

_PROPERTY = "linfusion plugin"
_BLOCK = re.compile(r"(<!-- table: linfusion-plugins -->\n)(.*?)(<!-- end table -->)", re.DOTALL)


def note(request, plugin: str, family: str, column: str, cell: str) -> None:
    """Say in a test which cell of the table it stands for. Properties travel with the report, under xdist as well."""
    request.node.user_properties.append((_PROPERTY, (plugin, family, column, cell)))


def render(cells: list[tuple[str, str, str, str]]) -> str:
    """The table of (plugin, family, column, cell), rows in the order in which plugins first appear.

    Families that say the same share a cell; where they differ, each is named.
    """
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for plugin, family, column, cell in cells:
        rows.setdefault(plugin, {}).setdefault(column, {})[family] = cell
    lines = ["| with LinFusion | " + " | ".join(COLUMNS.values()) + " | shown for |", "|---" * (len(COLUMNS) + 2) + "|"]
    for plugin, columns in rows.items():
        families = [name for name in FAMILIES if any(name in by_family for by_family in columns.values())]
        words = [_cell(columns.get(column, {})) for column in COLUMNS]
        lines.append(f"| {plugin} | {' | '.join(words)} | {', '.join(FAMILIES[name] for name in families)} |")
    return "\n".join(lines) + "\n"


def _cell(by_family: dict[str, str]) -> str:
    said = {cell: [FAMILIES[f] for f in FAMILIES if by_family.get(f) == cell] for cell in by_family.values()}
    if len(said) == 1:
        return next(iter(said))
    return "; ".join(f"{', '.join(names)}: {cell}" for cell, names in said.items())


def committed() -> str:
    """The table as it stands in the document."""
    found = _BLOCK.findall(DOCUMENT.read_text())
    if len(found) != 1:
        raise ValueError(f"{DOCUMENT} must hold one table linfusion-plugins, found {len(found)}")
    return found[0][1]


class _Results:
    """A pytest plugin that keeps the cells of the tests that ran."""

    def __init__(self):
        self.cells: list[tuple[str, str, str, str]] = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            word = {"passed": None, "failed": "FAILS", "skipped": "not run"}[report.outcome]
            for key, value in report.user_properties:
                if key == _PROPERTY:
                    plugin, family, column, cell = value
                    self.cells.append((plugin, family, column, word or cell))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.plugin_matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the table is stale")
    args = parser.parse_args(argv)
    results = _Results()
    # The test of the table itself is left out: it cannot pass before the table is written.
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not table", str(TESTS)], plugins=[results])
    table = render(results.cells)
    stale = committed() != table
    if stale and not args.check:
        DOCUMENT.write_text(_BLOCK.sub(lambda match: match[1] + table + match[3], DOCUMENT.read_text()))
    print(f"{DOCUMENT.name}: " + ("up to date" if not stale else "stale" if args.check else "table written"))
    return int(status) or int(stale and args.check)


if __name__ == "__main__":
    sys.exit(main())
