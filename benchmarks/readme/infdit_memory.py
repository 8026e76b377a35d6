"""Table infdit-memory: the peak of one call of Inf-DiT's network, measured and as its plan bounds it."""

from __future__ import annotations

import re

from benchmarks import infdit_memory

from . import _format as f

_CASE = re.compile(r"(\d+) x (\d+), (\d+) layers of (\d+), (\w+)(?:, (\d+) rows of blocks a strip)?")


def render(results) -> str:
    parts = []
    for name, rows in results.devices.items():
        newest = {row["case"]: row for row in rows if row["family"] == infdit_memory.NAME and row["p50"]}
        if newest:
            parts += [_table(newest), f.where(name, list(newest.values()))]
    if not parts:
        return "No results are recorded yet: `python -m benchmarks.infdit_memory --save`."
    parts.append(
        "Peak of one call beyond weights and pictures, bfloat16, batch 1, strips of one row of blocks; measured: "
        "growth of the process's resident memory, so with what libraries allocate inside; plan: the bound that "
        "schedules are chosen by, without that. Original: keys, values, and keys with embeddings, four times each, and "
        "the hidden state, by arithmetic. The peak of `full` and `layer_major` is the same for any number of layers."
    )
    return "\n\n".join(parts)


def _table(newest: dict[str, dict[str, str]]) -> str:
    order = {str(point): i for i, point in enumerate(infdit_memory.POINTS)}
    originals = {str(point): infdit_memory.original(point) for point in infdit_memory.POINTS}
    lines = []
    for case, row in sorted(newest.items(), key=lambda item: order.get(item[0], len(order))):
        height, width, layers, model, schedule, _ = _CASE.fullmatch(case).groups()
        line = [f"{height} x {width}", f"{layers} x {model}", f"`{schedule}`"]
        line += [_size(float(row["p50"])), _size(float(row["floor"]))]
        lines.append([*line, _size(originals[case] / 2**20) if case in originals else "—"])
    return f.table(["output", "layers x width", "schedule", "measured", "plan", "original, full"], lines)


def _size(mib: float) -> str:
    return f"{mib:.0f} MiB" if mib < 999.5 else f"{mib / 1024:.3g} GiB"
