"""Table linfusion-module: LinFusion's attention module beside the softmax module, and where it overtakes that."""

from __future__ import annotations

import math

from benchmarks.linfusion_module import UNETS, family_of

from . import _format as f

FAMILY = "linfusion_module"
WORDS = {"sdpa": "softmax", "sdpa-compiled": "softmax, compiled", "eager": "original"}


def render(results) -> str:
    parts = []
    for name, rows in results.devices.items():
        rows = [r for r in rows if r["family"] == FAMILY and r["timing"] != "graph"]
        if any(_is_ours(r) for r in f.times(rows)):
            parts += [_sentences(rows), _table(rows), f.where(name, rows)]
    if not parts:
        return "No results are recorded yet: `python -m benchmarks.linfusion_module --save`."
    parts.append(
        "Milliseconds (median), batch 2. softmax: diffusers' Attention with AttnProcessor2_0; original: LinFusion's "
        "module with its attention in PyTorch; compiled: under torch.compile (measured at the model's own image size). "
        "r: width of the branches. A larger image's layer that has the shape of one above it is not repeated."
    )
    return "\n\n".join(part for part in parts if part)


def _is_ours(row) -> bool:
    return row["provider"].startswith("linattn-") and not row["provider"].endswith("-compiled")


def _channels(row) -> int:
    return int(row["H"]) * int(row["D"])


def _image(row) -> int:
    return int(row["case"].split()[1])


def _own_size(row) -> bool:
    return _image(row) == UNETS[family_of(row["case"])].image


# ---- the table --------------------------------------------------------------------------------------------------


def _table(rows) -> str:
    columns = ["layer", "N", "heads x D", "r", "dtype", *WORDS.values(), "**ours**", "ours, compiled"]
    columns += ["over softmax", "over original"]
    lines = []
    for row in sorted((r for r in f.times(rows) if _is_ours(r)), key=_order):
        same = f.same_case(row)
        found = {r["provider"]: f.milliseconds(r["p50"]) for r in f.times(rows) if same(r)}
        unet = UNETS[family_of(row["case"])]
        layer = row["case"] + ("" if row["mode"] == "forward" else f", {row['mode'].replace('+', ' + ')}")
        line = [
            layer,
            f"{int(row['N']):,}",
            f"{row['H']} x {row['D']}",
            str(_channels(row) // unet.divisor),
            row["dtype"],
        ]
        line += [found.get(provider, "—") for provider in WORDS]
        line += [f"**{found[row['provider']]}** ({row['provider'].removeprefix('linattn-')})"]
        line += [found.get(f"{row['provider']}-compiled", "—")]
        line += [f"{float(row[c]):.2f}x" if row[c] else "—" for c in ("over_sdpa", "over_eager")]
        lines.append(line)
    return f.table(columns, lines)


def _order(row) -> tuple:
    unet = list(UNETS).index(family_of(row["case"]))
    return (row["mode"], unet, _image(row), -int(row["N"]), row["dtype"], row["provider"])


# ---- what it says -----------------------------------------------------------------------------------------------


def _sentences(rows) -> str:
    timed = f.times(rows)
    lines = []
    for name in UNETS:
        mine = [r for r in timed if family_of(r["case"]) == name]
        for dtype in ("bfloat16", "float32"):
            text = [crossover([r for r in mine if r["dtype"] == dtype]), _in_words(name, mine, dtype, "forward")]
            text.append(_in_words(name, mine, dtype, "forward+backward"))
            if text[0]:
                lines.append(f"- {name}, {dtype}: " + "; ".join(part for part in text if part) + ".")
    return "\n".join(lines + _memory(rows))


def crossover(rows) -> str:
    """Per width the N from which our module is the quicker one, between the measured sizes by interpolation."""
    points: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        if _is_ours(row) and row["mode"] == "forward" and row["over_sdpa"]:
            points.setdefault(_channels(row), []).append((int(row["N"]), float(row["over_sdpa"])))
    always, never, crossing = [], [], []
    for channels, found in sorted(points.items()):
        found.sort()
        smallest, largest = found[0], found[-1]
        if smallest[1] >= 1:
            always.append(f"{channels} channels (N = {smallest[0]:,} and up)")
        elif largest[1] < 1:
            never.append(f"{channels} channels (up to N = {largest[0]:,})")
        else:
            crossing.append(f"N = {_where_one(found):,} with {channels} channels")
    parts = [f"overtakes softmax at about {' and '.join(crossing)}"] if crossing else []
    parts += [f"is faster at every size measured with {' and '.join(always)}"] if always else []
    parts += [f"is slower at every size measured with {' and '.join(never)}"] if never else []
    return ", ".join(parts)


def _where_one(points: list[tuple[int, float]]) -> int:
    """N at which the ratio passes one for the last time, linear in the logarithms; two significant digits."""
    below = max(i for i, (_, ratio) in enumerate(points[:-1]) if ratio < 1 <= points[i + 1][1])
    (n0, r0), (n1, r1) = points[below], points[below + 1]
    n = n0 * (n1 / n0) ** (math.log(1 / r0) / math.log(r1 / r0))
    digits = 10 ** max(0, math.floor(math.log10(n)) - 1)
    return int(round(n / digits) * digits)


def whole_unet(name: str, rows, dtype: str, mode: str) -> tuple[float, float] | None:
    """Seconds (softmax, ours) of all self-attention modules in one evaluation of a UNet at its own image size.

    None where a layer was not measured.
    """
    rows = [r for r in rows if r["dtype"] == dtype and r["mode"] == mode and _own_size(r)]
    softmax = mine = 0.0
    for heads, tokens, dim, count in UNETS[name].layers:
        layer = [r for r in rows if (r["H"], r["N"], r["D"]) == (str(heads), str(tokens), str(dim))]
        stock = [r for r in layer if r["provider"] == "sdpa"]
        ours = [r for r in layer if _is_ours(r)]
        if not stock or not ours:
            return None
        softmax += count * float(stock[0]["p50"]) / 1e3
        mine += count * min(float(r["p50"]) for r in ours) / 1e3
    return softmax, mine


def modules(name: str) -> int:
    """Self-attention modules of a UNet."""
    return sum(count for *_, count in UNETS[name].layers)


def _in_words(name: str, rows, dtype: str, mode: str) -> str:
    seconds = whole_unet(name, rows, dtype, mode)
    if seconds is None:
        return ""
    what = f"all {modules(name)} self-attention modules" if mode == "forward" else "forward + backward"
    return f"{what}: {seconds[0]:.3g} s -> {seconds[1]:.3g} s, {seconds[0] / seconds[1]:.1f}x"


def _memory(rows) -> list[str]:
    """The peak of a training step."""
    found = {r["provider"]: r for r in rows if r["metric"] == "peak_memory" and r["p50"]}
    ours = [p for p in found if p.startswith("linattn-")]
    if not ours:
        return []
    row = found[ours[0]]
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[row["dtype"]]
    one = int(row["B"]) * int(row["N"]) * _channels(row) * size / 2**20
    parts = [f"{WORDS.get(p, 'ours')} {float(r['p50']):.0f}" for p, r in found.items()]
    text = f"- Peak memory of forward + backward, {row['case']}, N = {int(row['N']):,}, {row['dtype']}, in MiB: "
    return [text + ", ".join(parts) + f" (one (B, N, C) tensor: {one:.0f})."]
