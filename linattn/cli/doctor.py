"""What is installed, what the compiled libraries are, and which backend each op would run on, with reasons.

Read it from the top: the first thing that looks wrong usually is the cause. The exit status is 0 unless an op cannot
run at all (a backend that was forced by LINATTN_BACKEND and cannot run it).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

HELP = "versions, compiled libraries, and per op the backend that would run and why not the others"

PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same facts as JSON, for bug reports and scripts")


def versions() -> dict[str, str | None]:
    """Installed version per package, None where it is absent; nothing is imported."""
    found = {"linattn": _version("linattn"), "python": platform.python_version()}
    return found | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def build_info() -> dict[str, str]:
    """What the build wrote beside the libraries (compiler, architectures); empty for a pure Python install."""
    path = Path(__file__).resolve().parents[1] / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def libraries() -> dict[str, str]:
    """Compiled library -> its path, or the reason why it is not loaded."""
    from linattn import _library

    return {f"_C_{name}": _library.path(name) or _library.reason(name) or "?" for name in _library.NAMES}


def processor() -> dict[str, object]:
    """The CPU: the instruction set that our kernels and torch's chose, and how many threads torch uses."""
    import torch

    return {
        "name": _cpu_name(),
        "kernels": _kernel_isa(),
        "torch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _kernel_isa() -> str | None:
    """The level that csrc/cpu/isa.cpp chose for this process (LINATTN_CPU_ISA can lower it)."""
    from linattn import _library

    if not _library.loaded("cpu"):
        return None
    isa = ctypes.CDLL(_library.path("cpu")).linattn_cpu_isa
    isa.restype = ctypes.c_char_p
    return isa().decode()


def gpus() -> list[dict[str, object]]:
    """Every CUDA device torch sees: its name, architecture and memory."""
    import torch

    rows = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        arch = f"sm_{facts.major}{facts.minor}"
        rows.append({"device": f"cuda:{index}", "name": facts.name, "arch": arch, "GiB": facts.total_memory >> 30})
    return rows


def collect() -> dict[str, object]:
    """Everything the report prints, as plain data."""
    import torch

    import linattn
    from linattn import backend

    settings = {key: os.environ[key] for key in sorted(os.environ) if key.startswith(("LINATTN_", "TRITON_INTERPRET"))}
    return {
        "versions": versions(),
        "location": linattn.__path__[0],
        "torch_cuda": torch.version.cuda,
        "build": build_info(),
        "libraries": libraries(),
        "cpu": processor(),
        "gpus": gpus(),
        "settings": settings,
        "ops": backend.report(),
    }


def run(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        json.dump(facts, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(render(facts)))
    return int(any(row.get("error") for row in facts["ops"]))


def render(facts: dict) -> list[str]:
    lines = ["versions"]
    for name, version in facts["versions"].items():
        note = {"linattn": f"   ({facts['location']})", "torch": f"   (CUDA: {facts['torch_cuda'] or 'no'})"}.get(
            name, ""
        )
        lines.append(f"  {name:<14}{version or 'not installed'}{note}")
    lines += ["", "libraries"]
    for name, state in facts["libraries"].items():
        lines.append(f"  {name:<14}{state}")
    for name, value in facts["build"].items():
        lines.append(f"    {'built: ' + name:<22}{value}")
    lines += ["", "machine"]
    cpu = facts["cpu"]
    lines.append(f"  {'cpu':<14}{cpu['name']}, {cpu['threads']} threads")
    lines.append(f"  {'':<14}kernels use {cpu['kernels'] or 'nothing: not loaded'}, torch uses {cpu['torch']}")
    for gpu in facts["gpus"] or [None]:
        text = f"{gpu['device']}: {gpu['name']}, {gpu['arch']}, {gpu['GiB']} GiB" if gpu else "no CUDA device"
        lines.append(f"  {'gpu':<14}{text}")
    lines += ["", "settings"]
    lines += [f"  {key}={value}" for key, value in facts["settings"].items()] or [
        "  no LINATTN_* variable is set (LINATTN_BACKEND=reference|cpu|triton|cuda forces one backend)"
    ]
    lines += ["", "ops (device, dtypes: backend that runs; the others, and why they do not)"]
    lines += render_ops(facts["ops"])
    return lines


def render_ops(rows: list[dict]) -> list[str]:
    """Rows of one op and device that agree are one line, whatever their dtype."""
    groups: dict[tuple, list[str]] = {}
    for row in rows:
        key = (row["op"], row["device"], row["backend"], row.get("error"), tuple(row["why_not"].items()))
        groups.setdefault(key, []).append(row["dtype"])
    lines, last_op = [], None
    for (op, device, answer, error, reasons), dtypes in groups.items():
        if op != last_op:
            lines.append(f"  {op}")
            last_op = op
        lines.append(f"    {device}, {'/'.join(dtypes)}: {answer or 'ERROR: ' + error}")
        lines += [f"      not {name}: {reason}" for name, reason in reasons]
    return lines
