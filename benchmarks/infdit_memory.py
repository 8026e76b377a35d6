"""Peak memory of one call of Inf-DiT's network by schedule: measured, as the plan bounds it, and of the original.

    python -m benchmarks.infdit_memory                        # the points that take seconds, printed
    python -m benchmarks.infdit_memory --only 4096 --save     # points whose description contains a text; into results/

Each point is a fresh process with random weights in bfloat16, batch 1. On a CPU its peak is the growth of the process's
resident size (Linux), so whatever kernels allocate inside counts; on CUDA the allocator's. Weights, the picture and
the low resolution are there before and do not count. With fewer layers than the 28 of the published model the peak of
layer_major and full is that of all 28, since they hold one layer at a time; that of streaming grows with the layers, by
5 MiB each for a block of the width.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .harness import environment, record, runner
from .harness.memory import _CLEAR, _resident

NAME = "infdit_memory"
OFFICIAL = {"hidden_size": 1280, "num_attention_heads": 16}
SMALL = {"hidden_size": 64, "num_attention_heads": 4}


@dataclasses.dataclass(frozen=True)
class Point:
    """A picture, a model and a schedule; rows of blocks to a strip (None: all)."""

    height: int
    width: int
    layers: int
    schedule: str
    rows: int | None = 1
    width_of_model: int = 1280

    def __str__(self) -> str:
        strips = "" if self.rows is None else f", {self.rows} rows of blocks a strip"
        return f"{self.height} x {self.width}, {self.layers} layers of {self.width_of_model}, {self.schedule}{strips}"

    @property
    def sizes(self) -> dict[str, int]:
        known = {sizes["hidden_size"]: sizes for sizes in (OFFICIAL, SMALL)}
        return known[self.width_of_model] | {"num_layers": self.layers, "vector_dim": 0}


#: The quick ones first; on two cores the last ones take minutes each.
POINTS = [
    Point(1024, 1024, 2, "full", None),
    Point(1024, 1024, 2, "layer_major"),
    Point(1024, 1024, 2, "streaming"),
    Point(2048, 2048, 2, "full", None),
    Point(2048, 2048, 2, "layer_major"),
    Point(2048, 2048, 2, "streaming"),
    Point(8192, 8192, 2, "streaming", width_of_model=64),
    Point(1024, 1024, 28, "streaming"),
    Point(1024, 1024, 28, "layer_major"),
    Point(4096, 4096, 2, "layer_major"),
]


def _plan(point: Point):
    from linattn.adapters.infdit.streaming import Plan

    return Plan(point.schedule, point.rows, keep_lr=point.schedule == "full")


def _model(point: Point, device):
    from linattn.adapters import InfDiTTransformer2DModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return InfDiTTransformer2DModel(**point.sizes).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def planned(point: Point) -> int:
    """The bound that the plan has for this point, in bytes."""
    from linattn.adapters.infdit.streaming import peak_bytes

    return peak_bytes(_model(point, "meta"), 1, point.height, point.width, _plan(point))


def measured(point: Point, device: torch.device) -> int:
    """Bytes, measured in this process."""
    model = _model(point, device)

    def call(height: int, width: int, plan) -> None:
        picture = torch.randn(1, 6, height, width, device=device, dtype=torch.bfloat16)
        context = torch.randn(1, 3, height // 4, width // 4, device=device, dtype=torch.bfloat16)
        begin = start()
        context = model.prepare_lr(context, keep=plan.keep_lr)
        strips = model.strips(lambda a, b: picture[:, :, a:b], height, width, 0.5, lr_context=context, schedule=plan)
        for _ in strips:
            pass
        return peak() - begin

    def start() -> int:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        _CLEAR.write_text("5")  # sets the peak to the present size
        return _resident("VmRSS")

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")

    with torch.no_grad():
        call(model.block_pixels, model.block_pixels, _plan(point))  # loads code, creates threads
        return call(point.height, point.width, _plan(point))


def original(point: Point) -> int:
    """Bytes that the authors' "full" holds at once in one layer, at least.

    Keys, values, and keys with their embeddings, four times each, and the hidden state.
    """
    tokens = (point.height // 4) * (point.width // 4)
    return (12 + 1) * tokens * point.width_of_model * 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="points whose description contains this text; without it the quickest three")
    parser.add_argument("--save", action="store_true", help="add to benchmarks/results/<this machine>")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if args.point:
        print(measured(Point(**json.loads(args.point)), device))
        return 0
    facts = environment.collect(device)
    folder = Path(tempfile.mkdtemp(prefix="linattn-benchmarks-"))
    if args.save:
        folder = runner.RESULTS / environment.short_name(device, facts)
    recorder = record.Recorder(folder / f"{NAME}.csv", append=True)
    for point in [p for p in POINTS if args.only in str(p)] if args.only else POINTS[:3]:
        own = {name: value for name, value in os.environ.items() if name not in environment.ALLOCATION}
        command = [sys.executable, "-m", f"benchmarks.{NAME}", "--device", args.device]
        command += ["--point", json.dumps(dataclasses.asdict(point))]
        done = subprocess.run(command, capture_output=True, text=True, env=own)
        if done.returncode:
            print(f"{point}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        found, bound = int(done.stdout.splitlines()[-1]), planned(point)
        print(f"{point}: {found / 2**20:,.0f} MiB, planned at most {bound / 2**20:,.0f}", flush=True)
        tokens = (point.height // 4) * (point.width // 4)
        columns = {name: facts[name] for name in record.COLUMNS[-8:]}
        columns |= {"family": NAME, "case": str(point), "metric": "peak_memory", "unit": "MiB", "mode": "forward"}
        columns |= {"B": 1, "N": tokens, "dtype": "bfloat16"}
        recorder.add(provider="linattn", p50=found / 2**20, floor=bound / 2**20, **columns)
    recorder.close()
    print(f"written: {recorder.path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
