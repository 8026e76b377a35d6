"""Table cpu-targets: each performance goal for CPUs, what was measured, and whether it is met."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

from . import _format as f


class Target(NamedTuple):
    """A goal: which of our rows it is about, and the least value in a column that meets it."""

    family: str
    what: str
    accepts: Callable[[dict[str, str]], bool]
    column: str
    least: float
    goal: str


TARGETS = [
    Target(
        "linear_attention",
        "A, forward, bfloat16, N >= 16k",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16" and int(r["N"]) >= 16384,
        "over_compiled",
        3.0,
        ">= 3x over torch.compile'd eager",
    ),
    Target(
        "linear_attention",
        "A, forward, float32, N >= 16k",
        lambda r: r["mode"] == "forward" and r["dtype"] == "float32" and int(r["N"]) >= 16384,
        "over_compiled",
        4.0,
        ">= 4x over torch.compile'd eager",
    ),
    Target(
        "linear_attention",
        "A, forward, N = 64..4096, all dtypes",
        lambda r: r["mode"] == "forward" and int(r["N"]) <= 4096,
        "over_sdpa",
        1.0,
        "never slower than SDPA",
    ),
    Target(
        "linear_attention",
        "A, forward + backward, N <= 4096",
        lambda r: r["mode"] == "forward+backward" and int(r["N"]) <= 4096,
        "over_sdpa",
        1.0,
        "never slower than SDPA",
    ),
    Target(
        "window_attention",
        "B, forward, bfloat16, r = 8..32",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16",
        "over_flex",
        5.0,
        ">= 5x over compiled flex_attention in its best token order",
    ),
    Target(
        "window_attention",
        "B, forward, float32, r = 8..32",
        lambda r: r["mode"] == "forward" and r["dtype"] == "float32",
        "over_flex",
        2.0,
        ">= 2x over compiled flex_attention in its best token order",
    ),
    Target(
        "block_causal_attention",
        "C, forward, bfloat16",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16",
        "over_sdpa",
        4.0,
        ">= 4x over SDPA on keys concatenated four times",
    ),
    Target(
        "block_causal_attention",
        "C, forward, float32",
        lambda r: r["mode"] == "forward" and r["dtype"] == "float32",
        "over_sdpa",
        2.2,
        ">= 2.2x over SDPA on keys concatenated four times",
    ),
]
#: Memory beyond q, k, v and the output, as a share of these four.
WORKSPACE = 0.05


def render(results) -> str:
    if not results.of("cpu"):
        return "No CPU results are recorded yet: `python -m benchmarks.linear_attention --device cpu --save`."
    parts = []
    for name, rows in results.of("cpu").items():
        lines = [line for target in TARGETS if (line := _line(rows, target))]
        lines += _memory_lines(rows)
        misses = [miss for target in TARGETS for miss in _misses(rows, target)]
        parts.append(f.table(["goal", "measured", "median of cases", "met"], lines))
        parts.append("Missed at: " + "; ".join(misses) + "." if misses else "")
        for family in dict.fromkeys(target.family for target in TARGETS):
            mine = [r for r in rows if r["family"] == family]
            parts.append(f"{family}: {f.where(name, mine)}" if mine else "")
    return "\n\n".join(part for part in parts if part)


def _matching(rows, target: Target):
    return [r for r in f.ours(rows, target.family) if target.accepts(r) and r[target.column]]


def _line(rows, target: Target) -> list[str] | None:
    what, goal = target.what, target.goal
    values = [r[target.column] for r in _matching(rows, target)]
    if not values:
        return [f"{what}: {goal}", "not measured", "", ""]
    met = sum(float(value) >= target.least for value in values)
    verdict = "yes" if met == len(values) else f"**missed** in {len(values) - met} of {len(values)} cases"
    middle = statistics.median(map(float, values))
    return [f"{what}: {goal}", f.span(values), f.ratio(str(middle)), verdict]


def _misses(rows, target: Target) -> list[str]:
    return [
        f"{r['case']} N {r['N']} {r['H']}x{r['D']} {r['dtype']} {r['layout']} {r['mode']} "
        f"({float(r[target.column]):.2f}x)"
        for r in _matching(rows, target)
        if float(r[target.column]) < target.least
    ]


def _memory_lines(rows) -> list[list[str]]:
    lines = []
    for row in rows:
        measured = row["metric"] == "peak_memory" and row["p50"] and row["provider"].startswith("linattn-")
        if not measured or row["mode"] != "forward" or row["family"] != "linear_attention":
            continue
        size = {"float32": 4, "bfloat16": 2, "float16": 2}[row["dtype"]]
        b, h, n, m, d, e = (int(row[key]) for key in "BHNMDE")
        out = b * h * n * e * size / 2**20
        tensors = b * h * (n * d + m * d + m * e) * size / 2**20 + out
        share = max(0.0, float(row["p50"]) - out) / tensors
        what = f"A, forward, N = {n}, {h}x{d} {row['dtype']}: workspace below {WORKSPACE:.0%} of q + k + v + out"
        lines.append([what, f"{share:.1%}", "", "yes" if share < WORKSPACE else "**missed**"])
    return lines
