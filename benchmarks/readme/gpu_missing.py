"""Table gpu-missing: the goals for an H200, with the measured figures, or the plain statement that there are none."""

from __future__ import annotations

from . import _format as f

#: (family, what, rows, column, least, goal in words)
TARGETS = [
    (
        "linear_attention",
        "A, forward, bfloat16, N >= 16k",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16" and int(r["N"]) >= 16384,
        "fraction_of_floor",
        0.85,
        ">= 85 % of the measured copy bandwidth",
    ),
    (
        "linear_attention",
        "A, forward, bfloat16, N >= 16k",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16" and int(r["N"]) >= 16384,
        "over_fbi_la",
        2.0,
        ">= 2x over FBi-LA's Triton",
    ),
    (
        "linear_attention",
        "A, backward, bfloat16, N >= 16k",
        lambda r: r["mode"] == "backward" and r["dtype"] == "bfloat16" and int(r["N"]) >= 16384,
        "fraction_of_floor",
        0.70,
        ">= 70 % of the measured copy bandwidth",
    ),
    (
        "linear_attention",
        "A, forward, N = 256..4096",
        lambda r: r["mode"] == "forward" and 256 <= int(r["N"]) <= 4096,
        "over_sdpa",
        1.0,
        "never slower than SDPA",
    ),
    (
        "window_attention",
        "B, forward, bfloat16, 8K (512 x 512 tokens), r = 8..32",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16" and r["case"].startswith("512x512"),
        "over_flex",
        3.0,
        ">= 3x over flex_attention with CLEAR's own mask",
    ),
    (
        "window_attention",
        "B, forward, bfloat16, 2K (128 x 128 tokens), r = 8..32",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16" and r["case"].startswith("128x128"),
        "over_flex",
        1.5,
        ">= 1.5x over flex_attention with CLEAR's own mask",
    ),
    (
        "block_causal_attention",
        "C, forward, bfloat16, 128 x 128 tokens and more",
        lambda r: r["mode"] == "forward" and r["dtype"] == "bfloat16",
        "over_sdpa",
        1.0,
        "never slower than SDPA on keys concatenated four times",
    ),
]


def render(results) -> str:
    measured = [row for device in results.of("cuda").values() for row in device]
    lines = []
    for family, what, accepts, column, least, goal in TARGETS:
        rows = f.ours(measured, family)
        values = [float(row[column]) for row in rows if accepts(row) and row[column]]
        if not values:
            lines.append([f"{what}: {goal}", "**not measured**", ""])
            continue
        shown = (lambda x: f"{x:.0%}") if column == "fraction_of_floor" else (lambda x: f"{x:.1f}x")
        met = sum(value >= least for value in values)
        verdict = "yes" if met == len(values) else f"**missed** in {len(values) - met} of {len(values)} cases"
        lines.append([f"{what}: {goal}", f"{shown(min(values))} .. {shown(max(values))}", verdict])
    table = f.table(["goal on an H200", "measured", "met"], lines)
    if any(f.ours(measured, family) for family, *_ in TARGETS):
        return table
    lead = (
        "No GPU was at hand so far: the Triton kernels have run in the interpreter and compiled ahead of time, no more."
    )
    return f"{lead} These figures are missing; `make gpu OUT=dir` on a CUDA machine measures them.\n\n{table}"
