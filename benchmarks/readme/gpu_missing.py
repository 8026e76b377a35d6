"""Table gpu-missing: the goals for an H200, with the measured figures, or the plain statement that there are none."""

from __future__ import annotations

from . import _format as f

#: (what, providers, rows, column, least, goal in words)
TARGETS = [
    (
        "A, forward, bfloat16, N >= 16k",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16" and int(r["N"]) >= 16384,
        "fraction_of_floor",
        0.85,
        ">= 85 % of the measured copy bandwidth",
    ),
    (
        "A, forward, bfloat16, N >= 16k",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16" and int(r["N"]) >= 16384,
        "over_fbi_la",
        2.0,
        ">= 2x over FBi-LA's Triton",
    ),
    (
        "A, backward, bfloat16, N >= 16k",
        lambda r: r["mode"] == "backward" and r["dtype"] == "bfloat16" and int(r["N"]) >= 16384,
        "fraction_of_floor",
        0.70,
        ">= 70 % of the measured copy bandwidth",
    ),
    (
        "A, forward, N = 256..4096",
        lambda r: r["mode"] == "forward" and 256 <= int(r["N"]) <= 4096,
        "over_sdpa",
        1.0,
        "never slower than SDPA",
    ),
]


def render(results) -> str:
    rows = [row for device in results.of("cuda").values() for row in f.ours(device, "linear_attention")]
    lines = []
    for what, accepts, column, least, goal in TARGETS:
        values = [float(row[column]) for row in rows if accepts(row) and row[column]]
        if not values:
            lines.append([f"{what}: {goal}", "**not measured**", ""])
            continue
        shown = (lambda x: f"{x:.0%}") if column == "fraction_of_floor" else (lambda x: f"{x:.1f}x")
        met = sum(value >= least for value in values)
        verdict = "yes" if met == len(values) else f"**missed** in {len(values) - met} of {len(values)} cases"
        lines.append([f"{what}: {goal}", f"{shown(min(values))} .. {shown(max(values))}", verdict])
    table = f.table(["goal on an H200", "measured", "met"], lines)
    if rows:
        return table
    lead = (
        "No GPU was at hand so far: the Triton kernels have run in the interpreter and compiled ahead of time, no more."
    )
    return f"{lead} These figures are missing; `make gpu OUT=dir` on a CUDA machine measures them.\n\n{table}"
