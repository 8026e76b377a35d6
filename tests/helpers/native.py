"""Compiling the native tests: csrc/cpu and tests/native by the machine's own compiler, without CMake and torch."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cpu"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
X86 = platform.machine().lower() in ("x86_64", "amd64")

# The flags of cmake/cpu.cmake.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mprefer-vector-width=512"],
}
ISAS = list(FLAGS) if X86 else ["baseline"]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (install g++ or set CXX)")


def compile_all(folder, units, options, output, link=()):
    """Compile (source, flags) units two at a time and link them into `folder / output`."""
    common = [COMPILER, "-std=c++20", "-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{SOURCES}", *options]

    def one(numbered):
        index, (source, flags) = numbered
        target = folder / f"{index}.o"
        done = subprocess.run([*common, *flags, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(one, enumerate(units)))
    done = subprocess.run(
        [COMPILER, *options, "-pthread", *objects, "-o", str(folder / output), *link], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / output
