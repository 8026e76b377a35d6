"""The machine's ceilings, measured, and from them the time below which no version of a case can go.

A case must move some bytes (every input read once, every output written once) and do some arithmetic. Bytes over the
bandwidth of a plain copy with the same working set, and operations over the peak of the unit that does them, are two
times; the larger one is the floor.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .measure import Contender, cpu_sampler, cuda_sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Machine:
    """Ceilings: bytes/s (read + written) of a copy by working set, FLOP/s by dtype, and torch.mm's FLOP/s by dtype."""

    bandwidth: dict[int, float]
    peak: dict[str, float]
    matmul: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def copy_rate(self, working_set: float) -> float:
        """Bytes/s of the fastest copy whose working set is at least this large; beyond all of them, the largest's."""
        rates = [rate for size, rate in self.bandwidth.items() if size >= working_set]
        return max(rates, default=self.bandwidth[max(self.bandwidth)])

    def floor(self, moved: float, flops: float, dtype: str) -> tuple[float, str]:
        """(seconds, "bytes" or "flops"): the least time and what sets it."""
        by_bytes = moved / self.copy_rate(moved)
        by_flops = flops / self.peak[dtype]
        return (by_bytes, "bytes") if by_bytes >= by_flops else (by_flops, "flops")

    def lines(self) -> list[str]:
        copies = ", ".join(f"{_size(size)} {rate / 1e9:.1f}" for size, rate in sorted(self.bandwidth.items()))
        peaks = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in self.peak.items())
        matmuls = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in self.matmul.items())
        lines = [f"copy, GB/s read + written by working set: {copies}", f"arithmetic peak, GFLOP/s: {peaks}"]
        return [*lines, f"torch.mm, GFLOP/s: {matmuls}", *self.notes]


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def _best(sampler, seconds: float) -> float:
    """The quickest sample within about `seconds`: a ceiling is what the machine can do when it is left alone."""
    deadline, best = time.perf_counter() + seconds, sampler()
    while time.perf_counter() < deadline:
        best = min(best, sampler())
    return best


def measure(device: torch.device, seconds: float = 6.0) -> Machine:
    """Measure this machine's ceilings in about `seconds`."""
    return _measure_cpu(seconds) if device.type == "cpu" else _measure_cuda(seconds)


def _measure_cpu(seconds: float) -> Machine:
    bandwidth, sets = {}, [1 << 19, 1 << 21, 1 << 23, 1 << 25, 1 << 27, 1 << 28]
    for size in sets:
        source = torch.ones(size // 2, dtype=torch.uint8)
        target = torch.zeros_like(source)  # zeros_like touches the pages
        copy = Contender(lambda target=target, source=source: target.copy_(source))
        bandwidth[size] = size / _best(cpu_sampler(copy), seconds / 2 / len(sets))
    matmul = {}
    for name, n in (("float32", 1024), ("bfloat16", 1024)):
        a = torch.randn(n, n).to(DTYPES[name])
        matmul[name] = 2 * n**3 / _best(cpu_sampler(Contender(lambda a=a: a @ a)), seconds / 8)
    peak, notes = _cpu_peak(seconds / 8)
    for name in ("float32", "bfloat16"):
        if matmul[name] > peak.get(name, 0):
            peak[name] = matmul[name]
            notes.append(f"the {name} peak is torch.mm's rate")
    peak["float16"] = peak["float32"]  # CPUs convert float16 and compute in float32
    return Machine(bandwidth, peak, matmul, notes)


def _cpu_peak(seconds: float) -> tuple[dict[str, float], list[str]]:
    """FLOP/s of all threads together by peak.cpp, or a note why it could not be built."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    source = Path(__file__).with_name("peak.cpp")
    if compiler is None or not source.exists():
        return {}, ["no C++ compiler: the arithmetic peaks are torch.mm's rates"]
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "peak.so")
        command = [
            compiler,
            "-O2",
            "-march=native",
            "-ffp-contract=fast",
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            library,
        ]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode != 0:
            return {}, [
                f"peak.cpp did not compile ({built.stderr.strip().splitlines()[-1][:100]}): peaks are torch.mm's"
            ]
        functions = ctypes.CDLL(library)
        rates = {}
        for dtype, symbol in (("float32", "linattn_peak_fp32"), ("bfloat16", "linattn_peak_bf16")):
            function = getattr(functions, symbol)
            function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
            rate = _threaded_rate(function, torch.get_num_threads(), seconds / 2)
            if rate > 0:
                rates[dtype] = rate
        return rates, []


def _threaded_rate(function, threads: int, seconds: float) -> float:
    def work(done: list[float], i: int) -> None:
        done[i] = function(1_000_000, ctypes.byref(ctypes.c_float()))  # ctypes releases the GIL

    deadline, best = time.perf_counter() + seconds, 0.0
    while best == 0 or time.perf_counter() < deadline:
        done = [0.0] * threads
        workers = [threading.Thread(target=work, args=(done, i)) for i in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if sum(done) == 0:
            return 0.0
        best = max(best, sum(done) / (time.perf_counter() - start))
    return best


def _measure_cuda(seconds: float) -> Machine:
    flush = l2_flush()
    size = 4 << 30
    source = torch.empty(size // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = Contender(lambda: target.copy_(source))
    bandwidth = {size: size / _best(cuda_sampler(copy, flush), seconds / 4)}
    matmul = {}
    for name, n in (("float32", 4096), ("bfloat16", 8192), ("float16", 8192)):
        a = torch.randn(n, n, device="cuda").to(DTYPES[name])
        product = Contender(lambda a=a: torch.mm(a, a))
        matmul[name] = 2 * n**3 / _best(cuda_sampler(product, flush), seconds / 4)
    notes = ["the arithmetic peaks are torch.mm's rates on random data; float32 without TF32"]
    return Machine(bandwidth, dict(matmul), matmul, notes)


@functools.cache
def l2_flush() -> torch.Tensor:
    """A buffer larger than any GPU's L2 cache."""
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")
