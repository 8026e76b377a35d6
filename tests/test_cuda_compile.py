"""What nvcc makes of the CUDA kernels: they compile for sm_80 and sm_90a, spill nothing, and fit a multiprocessor.

Two head dims stand for all. The whole matrix is compiled by `LINATTN_CUDA=check python setup.py build_ext`
(docs/building.md), whose report is build/cmake/ptxas.log.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = ["sm_80", "sm_90a"]
REGISTERS = 65536  # of a multiprocessor
SHARED = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}  # bytes that a block may have

# Kernel, its parameters, its threads, its bytes of shared memory without and with separate denominators.
KERNELS = []
for suffix, types, element, tile, width in [
    ("", "BFloat16, ", "uint16_t", "64, 64", 64),
    ("", "BFloat16, ", "uint16_t", "128, 128", 128),
    ("_float32", "", "float", "64, 64", 64),
    ("_float32", "", "float", "128, 64", 128),
]:
    kind = "Float32" if suffix else ""
    state, apply, rows = f"StateTile{kind}<{tile}>", f"ApplyTile{kind}<{tile}>", f"RowsTile{kind}<{width}>"
    for weighted in ("false", "true"):
        sizes = f"{state}::shared_bytes(false, {weighted}), {state}::shared_bytes(true, {weighted})"
        kernel = f"state_kernel{suffix}<{types}{tile}, {weighted}>"
        KERNELS.append((kernel, f"StateParams<{element}>", f"{state}::kThreads", sizes))
    sizes = f"{apply}::shared_bytes(false), {apply}::shared_bytes(true)"
    KERNELS.append((f"apply_kernel{suffix}<{types}{tile}>", f"ApplyParams<{element}>", f"{apply}::kThreads", sizes))
    for keys in ("false", "true"):
        kernel = f"rows_kernel{suffix}<{types}{width}, {keys}>"
        sizes = f"{rows}::kBytes, {rows}::kBytes"
        KERNELS.append((kernel, f"RowsParams<{element}>", f"{rows}::kThreads", sizes))
NAMES = [kernel for kernel, *_ in KERNELS]

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: CUDA kernels cannot be compiled here")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(ptxas' report by (kernel, architecture): stack, spill and registers; threads and shared bytes by kernel)."""
    folder = tmp_path_factory.mktemp("nvcc")
    instances = [f"template __global__ void {kernel}({params});" for kernel, params, *_ in KERNELS]
    prints = [f'std::printf("{kernel}: %d %d %d\\n", {threads}, {sizes});' for kernel, _, threads, sizes in KERNELS]
    source = folder / "kernels.cu"
    source.write_text(
        "\n".join(
            [
                '#include <cstdio>\n#include "linear_attention_backward_float32.cuh"',
                "namespace linattn::cuda {",
                *instances,
                "}\nusing namespace linattn::cuda;\nint main() {",
                *prints,
                "}\n",
            ]
        )
    )
    command = [NVCC, "-std=c++20", "-O3", "-Xptxas", "-v", f"-I{ROOT / 'csrc' / 'cuda'}", str(source)]
    for architecture in ARCHITECTURES:
        command += ["-gencode", f"arch={architecture.replace('sm', 'compute')},code={architecture}"]
    done = subprocess.run([*command, "-o", str(folder / "sizes")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    sizes = subprocess.run([str(folder / "sizes")], capture_output=True, text=True, check=True).stdout
    sizes = {line.rsplit(": ")[0]: [int(x) for x in line.rsplit(": ")[1].split()] for line in sizes.splitlines()}

    # The report has the kernels' linker names, which hold the plain name and the numbers of the tile in order.
    report = {}
    pattern = (
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for symbol, architecture, *numbers in re.findall(pattern, done.stdout + done.stderr, re.S):
        for kernel in NAMES:
            name, tile = kernel.split("<")
            digits = [f"Li{n}E" for n in re.findall(r"\d+", tile.replace("BFloat16", ""))]
            flags = [f"Lb{int(flag == 'true')}E" for flag in re.findall("true|false", tile)]
            if f"{len(name)}{name}I" in symbol and "".join(digits + flags) in symbol:
                report[kernel, architecture] = dict(
                    zip(("stack", "stores", "loads", "registers"), map(int, numbers), strict=True)
                )
    return report, sizes


def test_every_kernel_is_in_the_report(compiled):
    assert set(compiled[0]) == {(kernel, a) for kernel in NAMES for a in ARCHITECTURES}


def test_no_kernel_spills_registers(compiled):
    spilling = {k: v for k, v in compiled[0].items() if v["stack"] or v["stores"] or v["loads"]}
    assert not spilling


def test_two_blocks_of_the_usual_head_dim_fit_a_multiprocessor(compiled):
    report, sizes = compiled
    for (kernel, architecture), found in report.items():
        threads, shared, shared_with_denominators = sizes[kernel]
        assert found["registers"] * threads <= REGISTERS, (kernel, architecture)
        assert shared_with_denominators <= SHARED[architecture], (kernel, architecture)
        if "128" not in kernel:
            assert 2 * found["registers"] * threads <= REGISTERS, (kernel, architecture)
            assert 2 * (shared + 1024) <= SHARED[architecture] + 1024, (kernel, architecture)
