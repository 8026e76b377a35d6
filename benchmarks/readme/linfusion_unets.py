"""Table linfusion-unets: what LinFusion's modules make of one UNet evaluation; the layers are in docs/linfusion.md."""

from __future__ import annotations

from . import _format as f
from .linfusion_module import UNETS, family_of, modules, whole_unet


def render(results) -> str:
    parts = []
    for name, rows in results.devices.items():
        timed = [r for r in f.times(rows) if r["family"] == "linfusion_module"]
        lines = [line for unet in UNETS for dtype in ("bfloat16", "float32") if (line := _line(timed, unet, dtype))]
        if lines:
            columns = ["UNet", "dtype", "softmax", "**ours**", "times faster"]
            parts += [f.table(columns, lines), f.where(name, timed)]
    return "\n\n".join(parts) or "No results are recorded yet: `python -m benchmarks.linfusion_module --save`."


def _line(timed, unet: str, dtype: str) -> list[str] | None:
    rows = [r for r in timed if family_of(r["case"]) == unet and r["dtype"] == dtype]
    seconds = whole_unet(unet, rows, dtype, "forward")
    if seconds is None:
        return None
    softmax, ours = seconds
    what = f"{unet}, {modules(unet)} modules"
    return [what, dtype, f"{softmax:.3g} s", f"**{ours:.3g} s**", f"{softmax / ours:.1f}x"]
