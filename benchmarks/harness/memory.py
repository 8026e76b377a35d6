"""Peak memory of one call beyond its inputs, output included.

On a CPU this is the growth of the process's peak resident size (Linux only), so each contender has a process of its
own; memory that a kernel takes outside torch's allocator counts as well. On CUDA it is the allocator's peak.

Run by runner.py as `python -m benchmarks.harness.memory FAMILY PROVIDER CASE DEVICE`; CASE is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from . import environment
from .family import Case, Family
from .measure import Skip

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise Skip(f"{_STATUS} has no {field}")


def peak_of(family: Family, provider: str, case: Case, device: torch.device) -> int:
    """Bytes, measured in this process."""
    # A first call of a tiny case loads code, creates threads and compiles kernels: not the memory of a call.
    tiny = dataclasses.replace(case, N=64, M=64)
    warm = family.prepare(provider, tiny, device, None, float("inf"))
    with warm.scope():
        warm.call()
    contender = family.prepare(provider, case, device, None, float("inf"))
    with contender.scope():
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        if not _CLEAR.exists():
            raise Skip("peak memory of a process is measured on Linux only")
        _CLEAR.write_text("5")  # sets the peak to the present size
        before = _resident("VmRSS")
        kept = contender.call()
        peak = _resident("VmHWM") - before
        del kept
        return peak


def peak_in_subprocess(family: str, provider: str, case: Case, device: torch.device, timeout: float) -> int:
    """Bytes, measured in a fresh process.

    It has the C library's own allocation: the policy that is fair to times keeps every freed block, and the peak would
    be that of the holes between them (of two equal matrices that take turns it makes four).
    """
    own = {name: value for name, value in os.environ.items() if name not in environment.ALLOCATION}
    arguments = [family, provider, json.dumps(dataclasses.asdict(case)), device.type]
    command = [sys.executable, "-m", "benchmarks.harness.memory", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=own)
    except subprocess.TimeoutExpired:
        raise Skip(f"the memory measurement took longer than {timeout:.0f} s") from None
    if done.returncode != 0:
        raise Skip(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}")
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    from benchmarks import families

    family_name, provider_name, fields, device_type = sys.argv[1:]
    chosen = Case(**json.loads(fields))
    print(peak_of(families()[family_name], provider_name, chosen, torch.device(device_type)))
