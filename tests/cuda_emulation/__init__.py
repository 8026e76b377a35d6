"""Runs the CUDA kernels of csrc/cuda on a CPU and reports what hardware would not forgive (docs/cuda.md).

    device = Device(library("linear_attention"))
    out = device.output(torch.empty(2, 64), "out")
    findings = device.run("entry_point", arguments..., seed=3, copies="late")

A library is compiled on first use from `<name>.cpp` beside this file, which includes the kernels, and kept in
build/cuda_emulation by the hash of everything that went into it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
KERNELS = ROOT / "csrc" / "cuda"
COPIES = ("late", "eager", "mixed")
GUARD = 4096  # bytes on both sides of a tensor that belong to nobody

COMPILER = shutil.which("g++")
# The kernels reinterpret bytes, as CUDA code does. Registers that nothing was written to hold a pattern, not 0.
FLAGS = [
    "-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{KERNELS}",
]  # fmt: skip
INSTRUMENT = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-ftrivial-auto-var-init=pattern"]


def why_not() -> str | None:
    """The reason for which the emulator cannot be built here, or None."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not sys.platform.startswith("linux"):
        return f"the emulator of CUDA kernels is for x86-64 Linux, this is {platform.machine()} {sys.platform}"
    if COMPILER is None:
        return "the emulator of CUDA kernels needs g++"
    version = subprocess.run([COMPILER, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True).stdout
    if not version.strip() or int(version.split(".")[0]) < 12:
        return f"the emulator of CUDA kernels needs g++ 12 or newer, this is {version.strip() or 'another compiler'}"
    return None


needs_emulator = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def _cache() -> Path:
    folder = ROOT / "build" / "cuda_emulation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="cuda_emulation_"))


def _compile(source: Path, flags: list[str], target: Path) -> None:
    done = subprocess.run([COMPILER, *flags, str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} does not compile for the emulator:\n{done.stderr[-4000:]}"


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
    return digest.hexdigest()[:16]


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The emulator with the kernels that `<name>.cpp` includes."""
    folder = _cache()
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout
    emulator = [HERE / "emulator.h", HERE / "emulator.cpp"]
    headers = [HERE / "fragments.h", *sorted(KERNELS.glob("*")), *sorted((ROOT / "csrc" / "cpu").glob("tensor.h"))]
    found = folder / f"{name}-{_digest(version, FLAGS, INSTRUMENT, *emulator, *headers, HERE / f'{name}.cpp')}.so"
    engine = folder / f"emulator-{_digest(version, FLAGS, *emulator)}.o"
    # Made under a name of this process's own and moved: several test processes may come here at once.
    mine = f".{os.getpid()}"
    if not engine.exists():
        _compile(HERE / "emulator.cpp", [*FLAGS, "-O2", "-c"], engine.with_suffix(mine))
        engine.with_suffix(mine).rename(engine)
    if not found.exists():
        part = found.with_suffix(f"{mine}.o")
        _compile(HERE / f"{name}.cpp", [*FLAGS, *INSTRUMENT, "-c"], part)
        # -Bsymbolic: the functions that the compiler inserted are the emulator's, whatever else the process has loaded.
        link = [COMPILER, "-shared", "-Wl,-Bsymbolic", str(part), str(engine), "-o", str(found.with_suffix(mine))]
        done = subprocess.run(link, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        part.unlink()
        found.with_suffix(mine).rename(found)
        for old in (*folder.glob(f"{name}-*.so"), *folder.glob("emulator-*.o")):
            if old not in (found, engine) and time.time() - old.stat().st_mtime > 24 * 3600:
                old.unlink(missing_ok=True)
    loaded = ctypes.CDLL(str(found))
    loaded.emulation_findings.restype = ctypes.c_char_p
    loaded.emulation_counter.restype = ctypes.c_int64
    loaded.emulation_to_float.restype = ctypes.c_float
    loaded.emulation_from_float.restype = ctypes.c_uint16
    return loaded


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a kernel, once for each pair of places in its source."""

    kind: str
    text: str
    count: int
    at: str  # source lines, innermost first
    other: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text} [{self.count} times]\n    at {self.at}\n    and {self.other}"


def _source_lines(file: str, offset: int) -> str:
    """Lines behind a return address, without those of the vocabulary."""
    if offset == 0 or shutil.which("addr2line") is None:
        return ""
    done = subprocess.run(["addr2line", "-i", "-e", file, hex(offset - 1)], capture_output=True, text=True).stdout
    lines = [line.split(" ")[0].rsplit("/", 1)[-1] for line in done.splitlines()]
    return " <- ".join(line for line in lines if not re.match(r"(warp\.h|emulator\.\w+|\?\?)", line))


class Device:
    """The memory that kernels may touch, and launches into it."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self._storage: list[torch.Tensor] = []
        self._gaps: dict[
            str, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # bytes, and which of them lie between rows of an output
        library.emulation_clear_regions()

    def input(self, x: torch.Tensor, name: str, writable: bool = False) -> torch.Tensor:
        """A copy of x, of the same strides, that kernels may read."""
        return self._place(x, name, True, writable)

    def output(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Memory shaped and strided as x that kernels may write, and then read. It holds NaN."""
        return self._place(x, name, False, True)

    def _place(self, x: torch.Tensor, name: str, initialised: bool, writable: bool) -> torch.Tensor:
        size, strides = x.element_size(), x.stride()
        extent = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1 if x.numel() else 0
        storage = torch.full((GUARD + extent * size + GUARD + 256,), 255, dtype=torch.uint8)
        # CUDA's allocator hands out multiples of 256; a view into a tensor keeps its offset.
        start = (-storage.data_ptr()) % 256 + GUARD + x.storage_offset() * size % 256
        memory = storage[start : start + extent * size].view(x.dtype)
        placed = memory.as_strided(x.shape, strides, memory.storage_offset())
        if initialised:
            placed.copy_(x)
        elif extent > x.numel():
            gap = torch.ones(extent, dtype=torch.bool)
            gap.as_strided(x.shape, strides, 0).fill_(False)
            self._gaps[name] = memory.view(torch.uint8).view(extent, size), gap
        self._storage.append(storage)
        self.library.emulation_add_region(
            ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(extent * size), initialised, writable, name.encode()
        )
        return placed

    def run(self, entry: str, *arguments, seed: int = 0, copies: str = "late", check: bool = True, fault: str = ""):
        """Calls an entry point of the library; returns the findings.

        seed: 0 runs blocks, warps and lanes in order, another number in an order of its own. copies: when asynchronous
        copies land: as late as allowed, at once, or either. check: look for races (slower). fault: a planted fault
        to switch on, by its name in the kernel; it must be reached.
        """
        self.library.emulation_configure(ctypes.c_uint64(seed), COPIES.index(copies), check, fault.encode())
        function = getattr(self.library, entry)
        function.restype = ctypes.c_char_p
        refused = function(*arguments)
        if refused is not None:
            raise RuntimeError(refused.decode())
        assert not fault or self.library.emulation_fault_reached(), f"the kernel has no fault {fault!r}"
        findings = [
            Finding(
                "out of bounds", f"{name}: bytes between its rows were written", int((bytes_[gap] != 255).sum()), "", ""
            )
            for name, (bytes_, gap) in self._gaps.items()
            if (bytes_[gap] != 255).any()
        ]
        for line in self.library.emulation_findings().decode().splitlines():
            kind, at, other, count, text = line.split("\t")
            lines = [_source_lines(self.library._name, int(offset)) for offset in (at, other)]
            findings.append(Finding(kind, text, int(count), *lines))
        return findings

    def counter(self, name: str) -> int:
        """How often something happened in the last run: blocks, barriers, copies, multiply_add, checked, launches."""
        return self.library.emulation_counter(name.encode())


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor, as an argument of an entry point."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())
