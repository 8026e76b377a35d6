"""The CUDA kernels on a GPU, for the day on which there is one:

    LINATTN_BACKEND=cuda python -m pytest tests/test_cuda_on_gpu.py

The same calls as in the emulator, held against the same definition; what only a GPU can show: equal bits from run to
run, sizes that fill the chip, offsets beyond 2^31; and the fragments' layouts, dumped by the hardware and compared with
the emulator's. Without a GPU the calls run on the CPU library, so that this file is known to work before it is needed.
"""

import shutil
import subprocess

import pytest
import torch
from cuda_emulation import HERE, KERNELS, Device, library, pointer
from cuda_emulation import linear_attention_backward as backward
from cuda_emulation import why_not as no_emulator
from cuda_emulation.linear_attention import CASES, DTYPES, MAPS, Case, assert_right, lay_out, tensors

import linattn  # noqa: F401  (defines the private ops)
from linattn import _library, backend

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def why_not():
    """The reason for which the kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not _library.loaded("cuda"):
        return _library.reason("cuda")
    if not backend.has_kernel("linear_attention", "cuda", "cuda"):
        return "the CUDA kernels are not registered: start with LINATTN_BACKEND=cuda"
    return None


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
on_cpu = pytest.mark.skipif(not _library.loaded("cpu"), reason=f"no CPU library: {_library.reason('cpu')}")
TARGETS = [pytest.param("cuda", marks=on_gpu), pytest.param("cpu", marks=on_cpu)]


def run(case, device):
    """(out, kv, k_sum) by the private op of the device's backend."""
    given = {name: None if x is None else lay_out(x.to(device), case.layout) for name, x in tensors(case).items()}
    not_a_number = torch.full((case.B, case.H, case.N, case.E), float("nan"), dtype=case.dtype, device=device)
    results = [lay_out(not_a_number, case.layout)]
    results += [torch.full((case.B, case.H, case.D, *rest), float("nan"), device=device) for rest in ((case.E,), ())]
    op = getattr(torch.ops.linattn, f"_linear_attention_{device}")
    op(*(given[n] for n in ("q", "k", "v", "q_denom", "k_denom")), MAPS.index(case.feature_map), case.normalize,
       1 / case.M, 1e-4, *results)  # fmt: skip
    return results


def run_backward(case, names, device):
    """The results of one of the two backward passes, by name."""
    given = {}
    for name, x in backward.inputs(case).items():
        x = None if x is None else x.to(device)
        given[name] = lay_out(x, case.layout) if x is not None and x.dim() == 4 and "kv" not in name else x
    results = backward.outputs(case, device)
    written, feature_map = [results[name] for name in names], MAPS.index(case.feature_map)
    if names == backward.APPLY:
        read = [given[name] for name in ("grad_out", "q", "q_denom", "kv", "k_sum")]
        op = getattr(torch.ops.linattn, f"_linear_attention_apply_backward_{device}")
        op(*read, feature_map, case.normalize, 1 / case.M, 1 / case.M, backward.EPS, *written)
    else:
        read = [given[name] for name in ("grad_kv", "grad_k_sum", "k", "v", "k_denom")]
        getattr(torch.ops.linattn, f"_linear_attention_state_backward_{device}")(*read, feature_map, *written)
    return {name: results[name] for name in names}


LARGE = [Case(N=20000, M=20000, D=d, E=d, H=2, dtype=t) for d in (40, 64, 80, 128, 160) for t in DTYPES]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_calls_are_right(case, target):
    assert_right(case, [x.cpu() for x in run(case, target)])


@pytest.mark.parametrize("target", TARGETS[:1])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_calls_that_fill_the_chip_are_right_and_give_the_same_bits_every_time(case, target):
    first = run(case, target)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(case, target), strict=True))
    assert_right(case, [x.cpu() for x in first])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("names", [backward.APPLY, backward.STATE], ids=["apply", "state"])
@pytest.mark.parametrize("case", backward.CASES, ids=str)
def test_gradients_of_small_calls_are_right(case, names, target):
    results = run_backward(case, names, target)
    backward.assert_right(case, {n: None if x is None else x.cpu() for n, x in results.items()}, names)


@pytest.mark.parametrize("target", TARGETS[:1])
@pytest.mark.parametrize("names", [backward.APPLY, backward.STATE], ids=["apply", "state"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_gradients_of_calls_that_fill_the_chip_are_right_and_give_the_same_bits_every_time(case, names, target):
    first = run_backward(case, names, target)
    for _ in range(5):
        again = run_backward(case, names, target)
        assert all(x is None or torch.equal(x, again[name]) for name, x in first.items())
    backward.assert_right(case, {n: None if x is None else x.cpu() for n, x in first.items()}, names)


@pytest.mark.parametrize("target", TARGETS[:1])
def test_offsets_beyond_two_to_the_31_are_right(target):
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    case = Case(N=4096, M=4096, D=40, E=40)
    near = {name: x.to(target) for name, x in tensors(case).items() if x is not None}
    far = {}
    for name, x in near.items():
        far[name] = torch.empty(1 << 32, dtype=x.dtype, device=target).as_strided(x.shape, (1, 1, 1 << 20, 1)).copy_(x)
    out, kv, k_sum = run(case, target)
    again = [torch.full_like(x, float("nan")) for x in (out, kv, k_sum)]
    options = MAPS.index(case.feature_map), case.normalize, 1 / case.M, 1e-4
    torch.ops.linattn._linear_attention_cuda(far["q"], far["k"], far["v"], None, None, *options, *again)
    assert all(torch.equal(a, b) for a, b in zip((out, kv, k_sum), again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.skipif(no_emulator() is not None, reason=no_emulator() or "")
def test_fragments_of_the_hardware_lie_as_those_of_the_emulator(tmp_path):
    program = tmp_path / "dump"
    command = [NVCC, "-std=c++20", "-arch=native", f"-I{KERNELS}", str(HERE / "dump_fragments.cu"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dumped = {}
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        dtype, what, value = line.split()
        dumped.setdefault((dtype, what), []).append(float(value) if what == "d" else int(value))
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        device = Device(library("self_test"))
        inputs = [
            device.input((torch.arange(256) - 128).to(dtype), "left"),
            device.input((torch.arange(128) - 64).to(dtype), "right"),
            device.input(torch.arange(128) * 0.5, "sum"),
        ]
        registers = [device.output(torch.empty(128, dtype=torch.int32), n) for n in ("a", "transposed", "b")]
        d = device.output(torch.empty(128), "d")
        device.run("self_test_fragments", int(name == "bfloat16"), *(pointer(x) for x in (*inputs, *registers, d)))
        for what, x in zip(("a", "transposed", "b"), registers, strict=True):
            assert [value & 0xFFFFFFFF for value in x.tolist()] == dumped[name, what], f"{name}: {what}"
        assert d.tolist() == dumped[name, "d"], f"{name}: d"
