"""What a result depends on besides the code: machine, versions, commit, and how memory is handed out."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

#: glibc gives large blocks back to the kernel as soon as they are freed, and the first touch of fresh pages then costs
#: more than the arithmetic that is to be measured. These settings let every contender reuse its memory instead.
ALLOCATION = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_ARENA_MAX": "1"}


def apply_allocation_policy() -> None:
    """Start this Python process again under `ALLOCATION`; does nothing where that is already so, or without glibc."""
    if platform.libc_ver()[0] != "glibc" or all(os.environ.get(name) == value for name, value in ALLOCATION.items()):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATION})


def allocation_policy() -> str:
    settings = {name: os.environ.get(name) for name in ALLOCATION}
    if settings == ALLOCATION:
        return (
            "freed memory is kept for reuse, for all contenders ("
            + " ".join(f"{k}={v}" for k, v in ALLOCATION.items())
            + ")"
        )
    return "the C library's default"


def commit() -> str:
    """The checkout's commit, with "+" where sources differ from it; "unknown" outside git."""
    sources = ["csrc", "triton_kernels", "linattn", "benchmarks", "setup.py", "cmake", "CMakeLists.txt"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def collect(device: torch.device) -> dict[str, str]:
    """Flat facts, every value a string; no host or user name among them."""
    from linattn.cli import doctor

    cpu = doctor.processor()
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": str(cpu["name"]),
        "isa": str(cpu["kernels"] or "no compiled kernels"),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "linattn": _version("linattn"),
        "python": platform.python_version(),
        "torch_isa": str(cpu["torch"]),
        "allocation": allocation_policy(),
        "cuda": torch.version.cuda or "",
        "driver": "",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["isa"] = f"sm_{properties.major}{properties.minor}"
        facts["driver"] = _driver()
        facts["allocation"] = "torch's caching allocator"
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def short_name(device: torch.device, facts: dict[str, str]) -> str:
    """Folder name of this machine's results, e.g. cpu-amd-epyc-avx512-bf16-2t or cuda-nvidia-h200."""
    parts = [device.type, facts["device"]] + ([facts["isa"], f"{facts['threads']}t"] if device.type == "cpu" else [])
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def header(facts: dict[str, str]) -> list[str]:
    return [f"{name:<11}{value}" for name, value in facts.items() if value]
