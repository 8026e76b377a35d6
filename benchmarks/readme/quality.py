"""Table quality: the bundled Stable Diffusion with stock attention, without, and with linear attention."""

from __future__ import annotations

from . import _quality

ROWS = {
    "teacher": "stock attention (the teacher)",
    "zeroed": "no self-attention (outputs zeroed)",
    "before": "linear attention, not distilled",
    "after": "**linear attention, distilled**",
    "real digits": "real digits, drawn by a program",
}


def render(results) -> str:
    return _quality.render("tiny_sd", ROWS, "DDIM")
