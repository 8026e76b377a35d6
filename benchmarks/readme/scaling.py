"""Table scaling: one evaluation of the bundled UNet on larger and larger canvases, stock attention and ours."""

from __future__ import annotations

from benchmarks import scaling

from . import _format as f

#: For the time of a whole picture, which is derived.
STEPS = 20


def render(results) -> str:
    parts = []
    for name, rows in results.devices.items():
        rows = scaling.recorded(rows)
        mine = scaling.ours(rows)
        if mine is not None:
            parts += ["\n".join(_findings(rows, mine)), _table(rows, mine), f.where(name, rows)]
    if not parts:
        return "No results are recorded yet: `python -m benchmarks.scaling --save`."
    parts.append(
        "Batch 2, as guidance needs it; medians. Tokens: at the first level with self-attention. Stock: diffusers' "
        "default, fused softmax attention (AttnProcessor2_0). Unfused: the plain softmax(QK^T)V (AttnProcessor), for "
        "its memory only, up to what fits. Memory: peak beyond weights and inputs. "
        f"{STEPS} steps: {STEPS} times the evaluation, computed and not measured; autoencoder and text encoder come on "
        "top. —: not measured, it takes too long or too much memory. Convolutions and the rest, the same for all, "
        "are in every figure."
    )
    return "\n\n".join(part for part in parts if part)


def _table(rows, mine: str) -> str:
    columns = ["canvas", "tokens", "stock", "**ours**", "times faster", "memory: stock", "**ours**", "unfused"]
    columns += [f"{STEPS} steps: stock", "ours"]
    stock, own = (scaling.curve(rows, provider, "time") for provider in (scaling.STOCK, mine))
    peaks = [scaling.curve(rows, provider, "peak_memory") for provider in (scaling.STOCK, mine, scaling.NAIVE)]
    canvases = {int(row["N"]): scaling.canvas(row) for row in rows}
    lines = []
    for tokens, canvas in sorted(canvases.items()):
        memory = [_size(peak.get(tokens)) for peak in peaks]
        line = [f"{canvas} x {canvas}", f"{tokens:,}", _time(stock.get(tokens)), _bold(_time(own.get(tokens)))]
        line += [_faster(rows, mine, tokens), memory[0], _bold(memory[1]), memory[2]]
        line += [_time(STEPS * series[tokens]) if tokens in series else "—" for series in (stock, own)]
        lines.append(line)
    return f.table(columns, lines)


def _faster(rows, mine: str, tokens: int) -> str:
    """The median of the rounds' ratios, as recorded."""
    found = [r["over_sdpa"] for r in rows if r["provider"] == mine and r["metric"] == "time" and int(r["N"]) == tokens]
    return f"{float(found[0]):.1f}x" if found and found[0] else "—"


def _findings(rows, mine: str) -> list[str]:
    """What the record says, whatever that is: how time and memory grow, and which is more."""
    stock, own = (scaling.curve(rows, provider, "time") for provider in (scaling.STOCK, mine))
    common = [n for n in own if n in stock]
    lines = []
    if len(common) > 1:
        powers = [scaling.exponent({n: series[n] for n in common}) for series in (stock, own)]
        lines.append(
            f"- Time, from {common[-2]:,} to {common[-1]:,} tokens: stock grows as N^{powers[0]:.1f}, ours as "
            f"N^{powers[1]:.1f}. {_verdict(stock, own, common)}"
        )
    peaks = {provider: scaling.curve(rows, provider, "peak_memory") for provider in (scaling.STOCK, mine)}
    common = [n for n in peaks[mine] if n in peaks[scaling.STOCK]]
    if len(common) > 1:
        powers = [scaling.exponent({n: series[n] for n in common}) for series in peaks.values()]
        last = common[-1]
        text = (
            f"- Memory, from {common[-2]:,} to {last:,} tokens: stock grows as N^{powers[0]:.1f}, ours as "
            f"N^{powers[1]:.1f}; at {last:,} ours takes {peaks[mine][last] / peaks[scaling.STOCK][last]:.2f} times "
            "what stock takes."
        )
        naive = scaling.curve(rows, scaling.NAIVE, "peak_memory")
        power = scaling.exponent(naive)
        if power is not None:
            largest = max(naive)
            text += f" Fused softmax attention never holds an N x N matrix; unfused, it grows as N^{power:.1f}"
            text += f" ({_size(naive[largest])} at {largest:,})."
        lines.append(text)
    return lines


def _verdict(stock: dict[int, float], own: dict[int, float], common: list[int]) -> str:
    """From where on ours is the quicker one."""
    slower = [n for n in common if own[n] > stock[n]]
    if not slower:
        return "Ours is the quicker one at every size measured."
    if slower[-1] == common[-1]:
        return f"Ours is the slower one up to {slower[-1]:,} tokens, the most at which both were measured."
    first = next(n for n in common if n > slower[-1])
    return f"Ours is the quicker one from {first:,} tokens on, and the slower one at {slower[-1]:,}."


def _bold(text: str) -> str:
    return text if text == "—" else f"**{text}**"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "—"
    if seconds < 0.9995:
        return f"{f.milliseconds(str(1e3 * seconds))} ms"
    return f"{seconds:.3g} s" if seconds < 99.5 else f"{seconds / 60:.3g} min"


def _size(count: float | None) -> str:
    if count is None:
        return "—"
    mib = count / 2**20
    return f"{mib:.3g} MiB" if mib < 999.5 else f"{mib / 1024:.3g} GiB"
