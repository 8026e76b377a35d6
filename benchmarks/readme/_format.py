"""Small things that several tables need."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows that hold a measured time."""
    return [row for row in rows if row["metric"] == "time" and row["p50"]]


def ours(rows: list[dict[str, str]], family: str) -> list[dict[str, str]]:
    """Measured times of our own kernels in one family."""
    return [row for row in times(rows) if row["family"] == family and row["provider"].startswith("linattn-")]


def same_case(row: dict[str, str]) -> Callable[[dict[str, str]], bool]:
    """Whether another row belongs to the same case, of any provider."""
    keys = ("family", "case", "B", "H", "N", "M", "D", "E", "dtype", "layout", "mode", "timing")
    return lambda other: all(row[key] == other[key] for key in keys)


def milliseconds(text: str) -> str:
    """Three significant digits, no exponent."""
    value = float(text)
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}" if value >= 0.0995 else f"{value:.3f}"


def ratio(text: str) -> str:
    return f"{float(text):.1f}x" if float(text) < 99.5 else f"{float(text):.0f}x"


def span(texts: list[str]) -> str:
    """ "a .. b" of ratios, or the one."""
    values = sorted(texts, key=float)
    low, high = ratio(values[0]), ratio(values[-1])
    return low if low == high else f"{low} .. {high}"


def _threads(row: dict[str, str]) -> str:
    return "1 thread" if row["threads"] == "1" else f"{row['threads']} threads"


def where(name: str, rows: list[dict[str, str]]) -> str:
    """One line that says on what and from what a table comes."""
    row = rows[0]
    commits = ", ".join(sorted({r["commit"] for r in rows}))
    dates = ", ".join(sorted({r["date"] for r in rows}))
    machine = row["device"] + (f", {_threads(row)}, {row['isa']}" if name.startswith("cpu") else "")
    if any(r["timing"] == "cpu-time" for r in rows):
        machine += ", CPU time of one thread (the machine was busy)"
    return f"{machine}; torch {row['torch']}; commit {commits}; {dates} ([all numbers](benchmarks/results/{name}/))"
