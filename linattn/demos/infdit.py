"""The bundled Inf-DiT: a photograph that it never saw, four times larger, beside bicubic and Lanczos and the original.

The photograph is made small first, so that there is something to hold the results against.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from linattn.demos._comparison import _duration
from linattn.demos._layout import Column, sheet, table

NAME = "infdit"
SUMMARY = "a photograph enlarged by a small Inf-DiT, by bicubic and by Lanczos filters, beside the original"
REQUIRES = ("diffusers", "skimage", "sklearn", "PIL")

MODEL, PHOTOGRAPH, STEPS, SEED = "tiny_infdit", "chelsea", 2, 0
QUICK = (136, 80, 328, 208)  # the part of the photograph that --quick looks at: left, top, right, bottom
CROPS = {"an eye": (152, 90), "the forehead": (180, 4)}  # left and top ends of what is shown enlarged
ENLARGED = 4  # how many times

TITLES = {
    "small": "Given: a quarter of the pixels a side",
    "bicubic": "Bicubic",
    "linattn": "Inf-DiT (linattn)",
    "original": "Original",
}

REAL_WEIGHTS = """\
# The authors' checkpoint (github.com/zai-org/Inf-DiT), converted once:
import torch
from linattn.adapters import InfDiTUpscalePipeline, convert_infdit_checkpoint

convert_infdit_checkpoint("mp_rank_00_model_states.pt", "inf-dit")
pipe = InfDiTUpscalePipeline.from_pretrained("inf-dit", torch_dtype=torch.bfloat16).to("cuda")
pipe("small.png", scale=4, max_memory="8GiB").images[0].save("large.png")

The bundled model by the command line: linattn upscale small.png --scale 4 --out enlarged"""


def run(out: Path, *, quick: bool, report) -> list[Path]:
    """Enlarge, score and time; see `linattn.demos` for the arguments.

    Writes infdit.png (the pictures side by side) and infdit.json (every figure).
    """
    import torch

    from linattn import backend
    from linattn.bundled import photographs

    runs_on = backend.choose("block_causal_attention", torch.device("cpu"), torch.float32)
    report(
        f"torch {torch.__version__}, threads: {torch.get_num_threads()}; "
        f"block_causal_attention runs on backend {runs_on!r}"
    )
    pipe, photograph = _pipeline(), _photograph(quick)
    small = photographs.small(photograph)
    report(f"enlarging {small.width} x {small.height} to {photograph.width} x {photograph.height} pixels ...")

    ways = {name: lambda name=name: photographs.enlarged(small, name) for name in ("bicubic", "lanczos")}
    ways["linattn"] = lambda: _enlarged(pipe, small)
    peak = _peak_bytes(quick)
    pictures = {name: way() for name, way in ways.items()}  # which warms up, too
    seconds = {name: _median_seconds(way, rounds=1 if quick else 3) for name, way in ways.items()}
    score = photographs.Score(photograph, pictures)
    figures = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": runs_on,
        "photograph": PHOTOGRAPH,
        "size": photograph.size,
        "steps": STEPS,
        "calls": len(pipe.scheduler.calls),
        "seed": SEED,
        "seconds": seconds,
        "peak_bytes": peak,
        "tiles": score.tiles,
        "scores": score.to_json(),
    }
    drawn, numbers = out / f"{NAME}.png", out / f"{NAME}.json"
    _picture(photograph, small, pictures, figures).save(drawn)
    numbers.write_text(json.dumps(figures, indent=2) + "\n")

    rows = [
        [
            name,
            f"{score.psnr(name).value:.2f}",
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*score.psnr(name, "bicubic")),
            f"{score.ssim(name).value:.4f}",
            "{:+.4f} [{:+.4f}, {:+.4f}]".format(*score.ssim(name, "bicubic")),
            _duration(seconds[name]),
        ]
        for name in pictures
    ]
    report("\n" + table(["", "PSNR dB", "above bicubic", "SSIM", "above bicubic", "time"], rows))
    report(
        f"\nBrackets: 95 % bootstrap intervals over {score.tiles} tiles of this photograph, which is not among those "
        "that the model was trained on."
    )
    if peak is not None:
        report(f"peak memory of the model beside its weights: {peak / 2**20:.0f} MiB")
    report(f"\nThe same with real weights (wants a GPU):\n\n{REAL_WEIGHTS}")
    return [drawn, numbers]


def _median_seconds(way: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _pipeline():
    from diffusers.utils import logging

    from linattn import bundled
    from linattn._quiet import quiet_diffusers
    from linattn.adapters import InfDiTUpscalePipeline

    logging.disable_progress_bar()
    with quiet_diffusers():
        pipe = InfDiTUpscalePipeline.from_pretrained(bundled.path(MODEL), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _photograph(quick: bool):
    from linattn.bundled import photographs

    photograph = photographs.original(PHOTOGRAPH)
    return photograph.crop(QUICK) if quick else photograph


def _enlarged(pipe, small):
    import torch

    return pipe(small, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(SEED)).images[0]


def _peak_bytes(quick: bool) -> int | None:
    """Growth of resident memory while the model enlarges, in a process of its own: this one may keep what it once had.

    None where the system does not tell.
    """
    command = [sys.executable, "-c", f"from {__name__} import _growth; print(_growth({quick}))"]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def _growth(quick: bool) -> int:
    from linattn.bundled import photographs

    process = Path("/proc/self")

    def resident(field: str) -> int:
        lines = (process / "status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    pipe, small = _pipeline(), photographs.small(_photograph(quick))
    (process / "clear_refs").write_text("5")  # resets the highest
    before = resident("VmRSS")
    _enlarged(pipe, small)
    return resident("VmHWM") - before


def _picture(photograph, small, pictures: dict, figures: dict):
    """The comparison as one labelled sheet."""
    from PIL import Image

    from linattn.bundled import photographs

    shown = {
        "small": small.resize(photograph.size, Image.Resampling.NEAREST),
        "bicubic": pictures["bicubic"],
        "linattn": pictures["linattn"],
        "original": photograph,
    }
    width, height = (side // ENLARGED for side in photograph.size)
    rows = [("the whole, held out of training", [[picture] for picture in shown.values()])]
    corner = (0, 0) if photograph.size == photographs.original(PHOTOGRAPH).size else QUICK[:2]
    for label, (left, top) in CROPS.items():
        left, top = left - corner[0], top - corner[1]
        if min(left, top) < 0:  # not on the part that --quick looks at
            continue
        box = (left, top, left + width, top + height)
        crops = [[picture.crop(box).resize(photograph.size, Image.Resampling.NEAREST)] for picture in shown.values()]
        rows.append((f"{label}, {ENLARGED} times enlarged", crops))

    def notes(name: str) -> list[str]:
        found = figures["scores"][name]
        psnr, ssim = found["psnr"], found["ssim"]
        lines = [f"PSNR {psnr.value:.2f} dB, SSIM {ssim.value:.4f}"]
        if name != "bicubic":
            lines.append("{:+.2f} dB [{:+.2f}, {:+.2f}] above bicubic".format(*found["psnr above bicubic"]))
        line = _duration(figures["seconds"][name])
        if name == "linattn" and figures["peak_bytes"] is not None:
            line += f", {figures['peak_bytes'] / 2**20:.0f} MiB beside the weights"
        return [*lines, line]

    columns = [
        Column(TITLES["small"], [f"{small.width} x {small.height} pixels"]),
        Column(TITLES["bicubic"], notes("bicubic")),
        Column(TITLES["linattn"], notes("linattn")),
        Column(TITLES["original"], [f"{photograph.width} x {photograph.height} pixels"]),
    ]
    lanczos = figures["scores"]["lanczos"]
    footer = (
        f"{figures['steps']} steps of Heun's method ({figures['calls']} calls of the network), seed {figures['seed']}, "
        f"backend {figures['backend']}, threads: {figures['threads']}. PSNR and SSIM over red, green and blue; 95 % "
        f"bootstrap intervals over {figures['tiles']} tiles. Lanczos: PSNR {lanczos['psnr'].value:.2f} dB, SSIM "
        f"{lanczos['ssim'].value:.4f}. Photograph: Stefan van der Walt, CC0, from scikit-image."
    )
    return sheet("Bundled Inf-DiT: four times larger", columns, rows, footer, zoom=2 if photograph.width < 300 else 1)
