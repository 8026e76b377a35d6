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

# Kernel, its parameters, its tile.
KERNELS = [
    (f"{half}_kernel{kind}", f"{half.capitalize()}Params<{element}>", f"{half.capitalize()}Tile{tile}")
    for kind, element, tile in [
        ("<BFloat16, 64, 64>", "uint16_t", "<64, 64>"),
        ("<BFloat16, 128, 128>", "uint16_t", "<128, 128>"),
        ("_float32<64, 64>", "float", "Float32<64, 64>"),
        ("_float32<128, 64>", "float", "Float32<128, 64>"),
    ]
    for half in ("state", "apply")
]

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: CUDA kernels cannot be compiled here")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(ptxas' report by (kernel, architecture): stack, spill and registers; threads and shared bytes by kernel)."""
    folder = tmp_path_factory.mktemp("nvcc")
    instances = [f"template __global__ void {kernel}({params});" for kernel, params, _ in KERNELS]
    prints = [
        f'std::printf("{kernel}: %d %d %d\\n", {tile}::kThreads, '
        f"{tile}::shared_bytes(false), {tile}::shared_bytes(true));"
        for kernel, _, tile in KERNELS
    ]
    source = folder / "kernels.cu"
    source.write_text(
        "\n".join(
            [
                '#include <cstdio>\n#include "linear_attention.cuh"\n#include "linear_attention_float32.cuh"',
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
        for kernel, _, _ in KERNELS:
            name, tile = kernel.split("<")
            digits = re.findall(r"\d+", tile.replace("BFloat16", ""))
            if f"{len(name)}{name}I" in symbol and "".join(f"Li{n}E" for n in digits) in symbol:
                report[kernel, architecture] = dict(
                    zip(("stack", "stores", "loads", "registers"), map(int, numbers), strict=True)
                )
    return report, sizes


def test_every_kernel_is_in_the_report(compiled):
    assert set(compiled[0]) == {(kernel, a) for kernel, _, _ in KERNELS for a in ARCHITECTURES}


def test_no_kernel_spills_registers(compiled):
    spilling = {k: v for k, v in compiled[0].items() if v["stack"] or v["stores"] or v["loads"]}
    assert not spilling


def test_two_blocks_of_the_usual_head_dim_fit_a_multiprocessor(compiled):
    report, sizes = compiled
    for (kernel, architecture), found in report.items():
        threads, shared, shared_with_denominators = sizes[kernel]
        assert found["registers"] * threads <= REGISTERS, (kernel, architecture)
        assert shared_with_denominators <= SHARED[architecture], (kernel, architecture)
        if "64, 64" in kernel:
            assert 2 * found["registers"] * threads <= REGISTERS, (kernel, architecture)
            assert 2 * (shared + 1024) <= SHARED[architecture] + 1024, (kernel, architecture)
