"""Table cpu-targets: each performance goal for CPUs, what was measured, and whether it is met."""

from __future__ import annotations

import statistics

from . import _format as f

#: (what, which rows of ours, column, the least value that meets the goal, the goal in words)
TARGETS = [
    (
        "A, forward, bfloat16, N >= 16k",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16" and int(r["N"]) >= 16384,
        "over_compiled",
        3.0,
        ">= 3x over torch.compile'd eager",
    ),
    (
        "A, forward, float32, N >= 16k",
        lambda r: r["mode"] == "forward" and r["dtype"] == "float32" and int(r["N"]) >= 16384,
        "over_compiled",
        4.0,
        ">= 4x over torch.compile'd eager",
    ),
    (
        "A, forward, N = 64..4096, all dtypes",
        lambda r: r["mode"] == "forward" and int(r["N"]) <= 4096,
        "over_sdpa",
        1.0,
        "never slower than SDPA",
    ),
    (
        "A, forward + backward, N <= 4096",
        lambda r: r["mode"] == "forward+backward" and int(r["N"]) <= 4096,
        "over_sdpa",
        1.0,
        "never slower than SDPA",
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
        parts.append(f.where(name, [r for r in rows if r["family"] == "linear_attention"]))
    return "\n\n".join(part for part in parts if part)


def _matching(rows, target):
    _, accepts, column, _, _ = target
    return [r for r in f.ours(rows, "linear_attention") if accepts(r) and r[column]]


def _line(rows, target) -> list[str] | None:
    what, _, column, least, goal = target
    values = [r[column] for r in _matching(rows, target)]
    if not values:
        return [f"{what}: {goal}", "not measured", "", ""]
    met = sum(float(value) >= least for value in values)
    verdict = "yes" if met == len(values) else f"**missed** in {len(values) - met} of {len(values)} cases"
    middle = statistics.median(map(float, values))
    return [f"{what}: {goal}", f.span(values), f.ratio(str(middle)), verdict]


def _misses(rows, target) -> list[str]:
    _, _, column, least, _ = target
    return [
        f"{r['case']} N {r['N']} {r['H']}x{r['D']} {r['dtype']} {r['layout']} {r['mode']} ({float(r[column]):.2f}x)"
        for r in _matching(rows, target)
        if float(r[column]) < least
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
