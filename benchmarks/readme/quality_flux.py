"""Table quality-flux: the bundled FLUX: stock attention, none between image tokens, and CLEAR windows."""

from __future__ import annotations

from . import _quality

ROWS = {
    "teacher": "stock attention (the teacher)",
    "alone": "no attention between image tokens",
    "before": "windows, not distilled",
    "after": "**windows, distilled**",
    "before, pooled": "windows and pooled keys, not distilled",
    "after, pooled": "**windows and pooled keys, distilled**",
    "real digits": "real digits, drawn by a program",
}


def render(results) -> str:
    return _quality.render("tiny_flux", ROWS, "Euler (flow matching)")
