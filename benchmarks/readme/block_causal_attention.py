"""Table block-causal-attention: layers of Inf-DiT, every contender's time, and the memory of one call."""

from __future__ import annotations

from . import _format as f

FAMILY = "block_causal_attention"
NAMES = {"sdpa": "SDPA, keys 4x", "flex": "flex, block order"}


def render(results) -> str:
    parts = []
    for name, rows in results.devices.items():
        mine = [r for r in f.ours(rows, FAMILY) if r["layout"] == "BNHD" and r["dtype"] != "float16"]
        if mine:
            parts += [_times(rows, mine), _memory(rows), f.where(name, mine)]
    if not parts:
        return "No results are recorded yet: `python -m benchmarks.block_causal_attention --save`."
    parts.append(
        "Milliseconds (median); heads of 80, blocks of 32 x 32 tokens of 4 pixels, slot embeddings, clamped edges. "
        "SDPA, keys 4x: what Inf-DiT does, its copies timed. flex: compiled flex_attention with its block mask made "
        "beforehand and the embeddings in a score_mod, tokens in the order of blocks, the reordering not timed; it has "
        "no backward on a CPU. Of the floor: the exact number of pairs, each key of a block once, over the arithmetic "
        "peak measured in the same run. Memory: peak of one call beyond its inputs, output included."
    )
    return "\n\n".join(part for part in parts if part)


def _times(rows, mine) -> str:
    peers = [p for p in NAMES if any(r["provider"] == p and r["family"] == FAMILY for r in f.times(rows))]
    columns = ["grid", "heads", "dtype", "pass", *(NAMES[p] for p in peers), "**ours**"]
    columns += [*(f"over {NAMES[p]}" for p in peers), "of the floor"]
    lines = []
    for row in sorted(mine, key=_order):
        case = f.same_case(row)
        found = {r["provider"]: r for r in f.times(rows) if case(r)}
        line = [row["case"].split()[0].replace("x", " x "), row["H"], row["dtype"], row["mode"].replace("+", " + ")]
        line += [f.milliseconds(found[p]["p50"]) if p in found else "—" for p in peers]
        line += [f"**{f.milliseconds(row['p50'])}** ({row['provider'].removeprefix('linattn-')})"]
        line += [f.ratio(row[f"over_{p}"]) if row[f"over_{p}"] else "—" for p in peers]
        line += [f"{float(row['fraction_of_floor']):.0%}" if row["fraction_of_floor"] else "—"]
        lines.append(line)
    return f.table(columns, lines)


def _memory(rows) -> str:
    """One sentence per case: the memory of every contender."""
    measured = [r for r in rows if r["family"] == FAMILY and r["metric"] == "peak_memory" and r["p50"]]
    sentences = []
    for case, dtype, mode in dict.fromkeys((r["case"], r["dtype"], r["mode"]) for r in measured):
        same = [r for r in measured if (r["case"], r["dtype"], r["mode"]) == (case, dtype, mode)]
        words = [f"{_name(r['provider'])} {float(r['p50']):.0f} MiB" for r in same]
        grid = case.split()[0].replace("x", " x ")
        sentences.append(f"{grid}, {same[0]['H']} heads, {dtype}, {mode.replace('+', ' + ')}: {', '.join(words)}.")
    return "Memory. " + " ".join(sentences) if sentences else ""


def _name(provider: str) -> str:
    return NAMES.get(provider) or f"**ours ({provider.removeprefix('linattn-')})**"


def _order(row) -> tuple:
    return row["mode"], int(row["N"]), int(row["H"]), row["dtype"] == "bfloat16", row["provider"]
