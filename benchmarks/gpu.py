"""Everything on a CUDA machine within nine minutes: `python -m benchmarks.gpu --out DIR`, behind `make gpu OUT=DIR`.

Needs torch, Triton and nvcc there, and no network. Stages, each a process of its own with its own slice of the time, so
that one crash or hang loses one stage: environment, build, correctness against float64, the GPU tests, the benchmark
families, and the Triton tuning sweep with what is left. Every stage flushes as it goes. Left under DIR, eight files at
most: summary.md, results.json, correctness.json, benchmarks.csv, tuning.csv, log.txt, and one figure per family while
there is room.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import families
from .harness import environment, record
from .readme import gpu_missing, linear_attention
from .tables import Results

MOST_FILES = 8
ALWAYS = ("summary.md", "results.json", "correctness.json", "benchmarks.csv", "tuning.csv", "log.txt")
LOG_BYTES = 12 << 20


@dataclass(frozen=True)
class Stage:
    """One process: its command, the seconds it gets at most, and why it is left out, if it is."""

    name: str
    command: list[str]
    seconds: float
    skip: str | None = None


def plan(out: Path, device: str, quick: bool, minutes: float) -> list[Stage]:
    """The stages in their order, each with its slice of the time."""
    total = minutes * 60
    module = [sys.executable, "-m"]
    extra = ["--quick"] if quick else []
    correctness = min(150.0, 0.28 * total)
    sweep = [*module, "benchmarks.harness.correctness", "--device", device, "--out", str(out / "correctness.json")]
    stages = [
        Stage("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 0.18 * total, why_no_build(device)),
        Stage("correctness", [*sweep, "--budget", f"{correctness:.0f}", *extra], correctness + 30),
        Stage(
            "tests",
            [*module, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"],
            0.12 * total,
            why_no_tests(device),
        ),
        Stage(
            "cuda",  # in a process of its own: the variable decides when the library is loaded
            [
                "env",
                "LINATTN_BACKEND=cuda",
                *module,
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "tests/test_cuda_on_gpu.py",
            ],
            0.05 * total,
            why_no_tests(device),
        ),
    ]
    known = families()
    for name, family in known.items():
        slice_ = 0.40 * total * family.weight / sum(f.weight for f in known.values())
        # A smoke run ends by itself, but importing torch and diffusers may take as long as its share of a minute.
        slice_ = max(slice_, 60.0) if quick else slice_
        command = [*module, f"benchmarks.{name}", "--device", device, "--out", str(out)]
        command += ["--csv", str(out / "benchmarks.csv"), "--budget", f"{0.85 * slice_:.0f}"]
        # Under --quick the compiled contender stays out: its compile time is most of a smoke run.
        command += ["--smoke", "--providers", "eager", "sdpa", "linattn-cpu", "linattn-triton"] if quick else []
        command += [] if quick else ["--seconds", "0.4", "--limit", "0.3"] if device == "cuda" else []
        stages.append(Stage(name, command, slice_))
    tuning = [*module, "benchmarks.harness.tuning", "--out", str(out / "tuning.csv"), "--budget", f"{0.15 * total:.0f}"]
    stages.append(Stage("tuning", tuning, 0.15 * total + 20, "Triton runs on a GPU only" if device == "cpu" else None))
    return stages


def why_no_build(device: str) -> str | None:
    """Why nothing has to be compiled here, or None."""
    from linattn import _library

    has_cuda_kernels = any((environment.ROOT / "csrc" / "cuda").glob("*.cu"))
    missing = [] if _library.loaded("cpu") else ["cpu"]
    missing += ["cuda"] if device == "cuda" and has_cuda_kernels and not _library.loaded("cuda") else []
    return None if missing else "the libraries are there"


def why_no_tests(device: str) -> str | None:
    if device == "cpu":
        return "the GPU tests need a GPU"
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed: the correctness stage has to do"
    return None


def run(stage: Stage, out: Path, deadline: float) -> dict[str, object]:
    """Run a stage to its end or until its time is up; its output goes to log.txt. Returns what happened."""
    if stage.skip:
        return {"stage": stage.name, "status": "left out", "seconds": 0.0, "note": stage.skip}
    seconds = min(stage.seconds, deadline - time.perf_counter())
    if seconds < 5:
        return {"stage": stage.name, "status": "left out", "seconds": 0.0, "note": "no time was left"}
    began = time.perf_counter()
    log = out / "log.txt"
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(environment.ROOT)}
    variables.pop("TRITON_INTERPRET", None)  # kernels are measured as they are, never interpreted
    with log.open("ab") as file:
        file.write(f"\n==== {stage.name}: {' '.join(stage.command)} (at most {seconds:.0f} s)\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            stage.command, cwd=environment.ROOT, env=variables, stdout=file, stderr=file, start_new_session=True
        )
        status, note = "", ""
        try:
            code = process.wait(timeout=seconds)
            status = (
                "ok" if code == 0 else "no tests" if stage.name == "tests" and code == 5 else f"failed, status {code}"
            )
        except subprocess.TimeoutExpired:
            status, note = "stopped", f"its {seconds:.0f} s were up; what it had written is kept"
            _stop(process)
    lines = [line for line in _tail(log, start).splitlines() if line.strip()]
    note = note or (lines[-1].strip()[:200] if lines else "")
    return {"stage": stage.name, "status": status, "seconds": round(time.perf_counter() - began, 1), "note": note}


def _stop(process: subprocess.Popen) -> None:
    """End a stage and what it started: first kindly, so that files are closed, then not."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        try:
            process.wait(timeout=5)
            return
        except subprocess.TimeoutExpired:
            continue


def _tail(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 4000))
        return file.read().decode(errors="replace")


def summary(out: Path, facts: dict[str, str], device: str, done: list[dict]) -> str:
    """summary.md as far as the run has come."""
    lines = ["# linattn on " + facts["device"], ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += ["", "| stage | result | seconds | last line |", "|---|---|---|---|"]
    lines += [f"| {d['stage']} | {d['status']} | {d['seconds']} | {str(d['note']).replace('|', '/')} |" for d in done]
    with contextlib.suppress(OSError, ValueError):
        sweep = json.loads((out / "correctness.json").read_text())
        lines += ["", "## Correctness", ""]
        lines += [f"{sweep['checks']} checks, {sweep['compared']} tensors, {len(sweep['failures'])} failures."]
        lines += [f"- FAILED {json.dumps(failure)}" for failure in sweep["failures"][:30]]
    with contextlib.suppress(OSError, ValueError):
        rows = record.read(out / "benchmarks.csv")
        results = Results({environment.short_name(torch.device(device), facts): rows})
        lines += ["", "## Speed", "", linear_attention.render(results), "", gpu_missing.render(results)]
        reasons = sorted({f"- {r['provider']}: {r['skipped']}" for r in rows if r["skipped"]})
        lines += ["", "Contenders that were left out somewhere, and why:", "", *reasons] if reasons else []
    return "\n".join(lines) + "\n"


def trim(out: Path) -> None:
    """At most eight files: figures go first where there are too many; a log that is too long keeps its end."""
    log = out / "log.txt"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.write_text("(the beginning was cut)\n" + _tail_bytes(log, LOG_BYTES))
    figures = sorted(p for p in out.iterdir() if p.is_file() and p.name not in ALWAYS)
    room = MOST_FILES - sum((out / name).exists() for name in ALWAYS)
    for path in figures[max(room, 0) :]:
        path.unlink()


def _tail_bytes(path: Path, count: int) -> str:
    with path.open("rb") as file:
        file.seek(-count, os.SEEK_END)
        return file.read().decode(errors="replace")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results (emptied of this command's files)"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the same stages without a GPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    parser.add_argument("--quick", action="store_true", help="a smoke run of every stage: tiny sizes, a minute at most")
    parser.add_argument("--dry-run", action="store_true", help="list the stages and run none")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    out = args.out.resolve()
    stages = plan(out, args.device, args.quick, min(args.minutes, 1.0) if args.quick else args.minutes)
    if args.dry_run:
        for stage in stages:
            left_out = f"left out: {stage.skip}" if stage.skip else " ".join(["python", *stage.command[1:]])
            print(f"{stage.name:<20}{stage.seconds:6.0f} s  {left_out}")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible to torch; --device cpu runs the stages on this processor", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for name in ALWAYS:
        (out / name).unlink(missing_ok=True)
    facts = environment.collect(torch.device(args.device))
    facts["nvcc"] = "yes" if shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists() else "no"
    deadline = began + args.minutes * 60
    done: list[dict] = []
    for stage in stages:
        print(f"{stage.name} ...", flush=True)
        done.append(run(stage, out, deadline))
        print(f"  {done[-1]['status']}, {done[-1]['seconds']} s: {done[-1]['note']}", flush=True)
        (out / "results.json").write_text(json.dumps({"environment": facts, "stages": done}, indent=1))
        (out / "summary.md").write_text(summary(out, facts, args.device, done))
    trim(out)
    print((out / "summary.md").read_text())
    return 1 if any(str(d["status"]).startswith(("failed", "stopped")) for d in done) else 0


if __name__ == "__main__":
    sys.exit(main())
