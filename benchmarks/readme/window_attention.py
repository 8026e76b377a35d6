"""Table window-attention: layers of FLUX with CLEAR's windows, every contender's time."""

from __future__ import annotations

from . import _format as f

NAMES = {"sdpa": "SDPA, dense", "flex": "flex, tile order", "flex-raster": "flex, raster order"}


def render(results) -> str:
    parts = []
    for name, rows in results.devices.items():
        mine = [r for r in f.ours(rows, "window_attention") if r["layout"] == "BNHD" and r["dtype"] != "float16"]
        if mine:
            parts += [_table(rows, mine), f.where(name, mine)]
    if not parts:
        return "No results are recorded yet: `python -m benchmarks.window_attention --save`."
    parts.append(
        "Milliseconds (median); a layer of FLUX (heads of 128, 512 text tokens), the grid in tokens of 16 pixels, "
        "radius r; f: tokens per side of a pooled patch. flex: compiled flex_attention with CLEAR's mask, its block "
        "mask made beforehand; tile order is its best one, raster order the one that CLEAR runs. SDPA sees all keys, "
        "another function: the one that is replaced. It has no backward in flex on a CPU. Of the floor: the exact "
        "number of pairs over the arithmetic peak measured in the same run."
    )
    return "\n\n".join(parts)


def _table(rows, mine) -> str:
    peers = [p for p in NAMES if any(r["provider"] == p and r["family"] == "window_attention" for r in f.times(rows))]
    over = [p for p in peers if p != "flex-raster"]
    columns = ["grid", "window", "heads", "dtype", *(NAMES[p] for p in peers), "**ours**"]
    columns += [f"over {NAMES[p]}" for p in over] + ["of the floor"]
    lines = []
    for row in sorted(mine, key=_order):
        case = f.same_case(row)
        found = {r["provider"]: r for r in f.times(rows) if case(r)}
        grid, radius, factor, *_ = row["case"].split()
        window = f"{radius[0]} = {radius[1:]}" + ("" if factor == "f1" else f", f = {factor[1:]}")
        window += "" if row["mode"] == "forward" else f", {row['mode'].replace('+', ' + ')}"
        line = [grid.replace("x", " x "), window, row["H"], row["dtype"]]
        line += [f.milliseconds(found[p]["p50"]) if p in found else "—" for p in peers]
        line += [f"**{f.milliseconds(row['p50'])}** ({row['provider'].removeprefix('linattn-')})"]
        line += [f.ratio(row[f"over_{p}"]) if row[f"over_{p}"] else "—" for p in over]
        line += [f"{float(row['fraction_of_floor']):.0%}" if row["fraction_of_floor"] else "—"]
        lines.append(line)
    return f.table(columns, lines)


def _order(row) -> tuple:
    grid, radius, factor, *_ = row["case"].split()
    side = int(grid.split("x")[0])
    return row["mode"], side, int(factor[1:]), int(radius[1:]), row["dtype"] == "bfloat16", row["provider"]
