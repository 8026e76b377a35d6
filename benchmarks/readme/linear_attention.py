"""Table linear-attention: the layers of Stable Diffusion, every contender's time, and how near the machine's floor."""

from __future__ import annotations

from . import _format as f


def render(results) -> str:
    parts = []
    for name, rows in results.devices.items():
        mine = [r for r in f.ours(rows, "linear_attention") if _shown(r)]
        if mine:
            parts += [_table(rows, mine), f.where(name, mine)]
    if not parts:
        return "No results are recorded yet: `python -m benchmarks.linear_attention --save`."
    parts.append(
        "Milliseconds (median), batch 2, (B, N, H, D) strides as models have them; anchor: the sizes that peers quote. "
        "Floor: bytes that must move over the bandwidth of a copy, or FLOPs over the arithmetic peak, whichever takes "
        "longer, both measured in the same run. SDPA is softmax attention, another function: the one that is replaced. "
        "—: one call takes too long. float16, other layouts and spreads are in the CSV."
    )
    return "\n\n".join(parts)


def _shown(row) -> bool:
    """What the README has room for; the rest is in the CSV."""
    return row["timing"] != "graph" and row["layout"] == "BNHD" and row["dtype"] != "float16"


def _table(rows, mine) -> str:
    peers = [p for p in ("eager", "compiled", "sdpa", "fbi_la") if any(r["provider"] == p for r in f.times(rows))]
    names = {"compiled": "torch.compile", "sdpa": "SDPA", "fbi_la": "FBi-LA"}
    columns = ["layer", "N", "heads x D", "dtype", *(names.get(p, p) for p in peers), "**ours**"]
    columns += [f"over {names[p]}" for p in peers if p in names] + ["GB/s", "of the floor"]
    lines = []
    for row in sorted(mine, key=_order):
        case = f.same_case(row)
        found = {r["provider"]: r for r in f.times(rows) if case(r)}
        layer = row["case"]
        layer += "" if row["mode"] == "forward" else f", {row['mode'].replace('+', ' + ')}"
        backend = row["provider"].removeprefix("linattn-")
        line = [layer, f"{int(row['N']):,}", f"{row['H']} x {row['D']}", row["dtype"]]
        line += [f.milliseconds(found[p]["p50"]) if p in found else "—" for p in peers]
        line += [f"**{f.milliseconds(row['p50'])}** ({backend})"]
        line += [f.ratio(row[f"over_{p}"]) if row[f"over_{p}"] else "—" for p in peers if p in names]
        line += [f"{float(row['GB_per_s']):.0f}", f"{float(row['fraction_of_floor']):.0%}"]
        lines.append(line)
    return f.table(columns, lines)


def _order(row) -> tuple:
    return (row["mode"], int(row["N"]), row["case"], int(row["D"]), row["layout"], row["dtype"], row["provider"])
