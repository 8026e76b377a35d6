"""One CSV for everything: one row per family, case, provider, mode and metric (columns: benchmarks/README.md)."""

from __future__ import annotations

import csv
from pathlib import Path

#: Contenders that others are compared with; a row's column over_<baseline> says how many times faster it was.
BASELINES = ("eager", "compiled", "sdpa", "sdpa-compiled", "flex", "fbi_la")

COLUMNS = (
    *("family", "case", "provider", "mode", "timing", "metric", "unit"),
    *("B", "H", "N", "M", "D", "E", "dtype", "layout"),
    *("p20", "p50", "p80", "best", "rounds", "dropped"),
    *(f"over_{name}" for name in BASELINES),
    *("floor", "bound", "fraction_of_floor", "GB_per_s", "TFLOP_per_s", "copy_GB_per_s", "peak_TFLOP_per_s"),
    "skipped",
    *("device", "isa", "threads", "torch", "triton", "linattn", "commit", "date"),
)


def number(value: float | None) -> str:
    """Four significant digits: more is noise."""
    return "" if value is None else f"{value:.4g}"


class Recorder:
    """Appends rows to a CSV file and to `rows`, each flushed at once: a run that is stopped keeps what it measured."""

    def __init__(self, path: Path, append: bool = False):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        fresh = not (append and path.exists())
        self._file = path.open("w" if fresh else "a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self.rows: list[dict[str, str]] = []
        if fresh:
            self._writer.writeheader()

    def add(self, **values: object) -> dict[str, str]:
        unknown = set(values) - set(COLUMNS)
        if unknown:
            raise KeyError(f"no such columns: {sorted(unknown)}")
        row = {c: number(v) if isinstance(v := values.get(c), float) else "" if v is None else str(v) for c in COLUMNS}
        self.rows.append(row)
        self._writer.writerow(row)
        self._file.flush()
        return row

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV written by `Recorder`."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {"family", "provider", "metric", "p50"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} is no benchmark record: it lacks {sorted(missing)}")
        return list(reader)
