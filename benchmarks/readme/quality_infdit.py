"""Table quality-infdit: the bundled Inf-DiT on held-out photographs, beside bicubic and Lanczos filters."""

from __future__ import annotations

import json

from linattn import bundled
from linattn.bundled import photographs

from . import _format as f

MODEL = "tiny_infdit"
FILTERS = {"bicubic": "bicubic", "lanczos": "Lanczos"}


def render(results) -> str:
    card = json.loads((bundled.path(MODEL) / "card.json").read_text())
    scores = card["scores"]
    ways = FILTERS | {f"{steps} steps": f"**Inf-DiT, {steps} steps**" for steps in scores["steps"]}
    columns = ["photograph", "", "PSNR (dB)", "above bicubic", "SSIM", "above bicubic"]
    lines = [
        [name if way == "bicubic" else "", title, *_figures(scores[name][way], way == "bicubic")]
        for name in photographs.HELD_OUT
        for way, title in ways.items()
    ]
    tiles = " and ".join(str(scores[name]["tiles"]) for name in photographs.HELD_OUT)
    return "\n\n".join(
        [
            f.table(columns, lines),
            f"`{card['command']}` gives these figures. Made four times smaller by Pillow's bicubic filter, then four "
            "times larger; 8 bits throughout. PSNR and SSIM (Gaussian windows) over red, green and blue of the whole "
            f"photograph but {scores['border']} pixels along its edges; in brackets 95 % bootstrap intervals over "
            f"{tiles} tiles, paired. Heun's method, 2 n - 1 calls of the network for n steps; seed "
            f"{card['recipe']['seed']}; torch {card['versions']['torch']}; {card['date']}.",
        ]
    )


def _figures(found: dict, reference: bool) -> list[str]:
    cells = []
    for metric, places in (("psnr", 2), ("ssim", 4)):
        difference = "{:+.{p}f} [{:+.{p}f}, {:+.{p}f}]".format(*found[f"{metric} above bicubic"], p=places)
        cells += [f"{found[metric][0]:.{places}f}", "—" if reference else difference]
    return cells
