"""The CPU kernels below the public ops: every instruction set of this machine, memory safety, determinism, exp and phi.

The meaning of the ops is tested for all backends alike elsewhere; here is what only this backend has: a run-time choice
of instruction set, hand-written exponentials and conversions, scratch memory and threads.
"""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.native import COMPILER, FLAGS, ISAS, ROOT, SOURCES, compile_all, needs_compiler

import linattn  # noqa: F401  (defines the private ops)
from linattn import _library

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDENTITY, RELU, ELU1 = 0, 1, 2

needs_library = pytest.mark.skipif(not _library.loaded("cpu"), reason=f"no CPU library: {_library.reason('cpu')}")


# -------------------------------------------------------------------------------------- exp, phi and conversions


def cpu_supports(isa):
    if isa == "baseline":
        return True
    if not _library.loaded("cpu"):
        return False
    library = ctypes.CDLL(_library.path("cpu"))
    library.linattn_cpu_isa.restype = ctypes.c_char_p
    current = library.linattn_cpu_isa()
    supported = library.linattn_cpu_set_isa(isa.encode()) == 0
    library.linattn_cpu_set_isa(current)
    return supported


@pytest.fixture(scope="module")
def simd(tmp_path_factory):
    """simd(isa): tests/native/simd_harness.cpp compiled for that instruction set."""
    loaded = {}

    def get(isa):
        if COMPILER is None:
            pytest.skip("no C++ compiler (install g++ or set CXX)")
        if not cpu_supports(isa):
            pytest.skip(f"this machine has no {isa} (or the CPU library that knows is not built)")
        if isa not in loaded:
            unit = (ROOT / "tests/native/simd_harness.cpp", [*FLAGS[isa], f"-DLINATTN_ISA={isa}"])
            options = ["-O2", "-fPIC", "-shared"]
            loaded[isa] = ctypes.CDLL(str(compile_all(tmp_path_factory.mktemp(isa), [unit], options, "harness.so")))
        return loaded[isa]

    return get


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def phi(harness, x, degree, map_code=ELU1):
    y, grad = np.empty_like(x), np.empty_like(x)
    harness.simd_phi(map_code, degree, pointer(x), pointer(y), pointer(grad), ctypes.c_int64(len(x)))
    return y, grad


def negative_floats():
    """Every 1013th float32 from -0 to -inf, the last ones before 0, and all of the range where exp is denormal."""
    bits = np.arange(0x80000000, 0xFF800001, 1013, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate([bits.view(np.float32), np.linspace(-104.5, -86.5, 200_001, dtype=np.float32)])
    return np.concatenate([x, np.array([-0.0, -1e-45, -1e-38, -1e-8, -np.inf], np.float32)])


@pytest.mark.parametrize("isa", ISAS)
def test_exp_of_phi_is_within_two_units_in_the_last_place_in_float32(simd, isa):
    x = negative_floats()
    y, grad = phi(simd(isa), x, 6)
    exact = np.exp(x.astype(np.float64))
    ulp = np.maximum(np.spacing(exact.astype(np.float32)).astype(np.float64), 2.0**-149)
    error = np.abs(y.astype(np.float64) - exact) / ulp
    assert error.max() <= 2, f"{error.max():.2f} units at x = {x[error.argmax()]!r}"
    assert np.array_equal(grad, np.minimum(y, 1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("degree, bound", [(4, 2.7e-6), (3, 7.6e-5)], ids=["float16", "bfloat16"])
def test_short_exponentials_keep_their_bound(simd, isa, degree, bound):
    x = negative_floats()
    x = x[x > -87]  # normal results
    y, _ = phi(simd(isa), x, degree)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(y.astype(np.float64) / exact - 1)
    # x log2(e) is rounded (2^-24 |x|), and so is log2(e) (less than half of that); the polynomial rounds a few times.
    allowed = bound + 2.0**-24 * (4 + 1.5 * np.abs(x.astype(np.float64)))
    assert (error <= allowed).all(), f"{(error - allowed).max():.1e} too much at {x[(error - allowed).argmax()]!r}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("degree", [6, 4, 3])
def test_phi_at_the_edges(simd, isa, degree):
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    x = np.array([0.0, -0.0, 1e-30, 1.0, 3e38, inf, -inf, -200.0, -3e38, nan, -nan], np.float32)
    y, grad = phi(simd(isa), x, degree)
    plain = np.where(x > 0, x + 1, 0).astype(np.float32)
    assert np.array_equal(y[2:6], plain[2:6])
    assert np.allclose(y[:2], 1, rtol=1e-4)
    assert np.array_equal(y[6:9], [0, 0, 0]) and np.isnan(y[9:]).all() and np.isnan(grad[9:]).all()
    assert np.array_equal(grad[2:9], [1, 1, 1, 1, 0, 0, 0])
    y, grad = phi(simd(isa), x, 6, RELU)
    assert np.array_equal(y[:9], np.maximum(x[:9], 0)) and np.isnan(y[9:]).all()
    assert np.array_equal(grad[:9], (x[:9] > 0).astype(np.float32))
    y, grad = phi(simd(isa), x, 6, IDENTITY)
    assert np.array_equal(y, x, equal_nan=True) and (grad == 1).all()


@pytest.mark.parametrize("isa", ISAS)
def test_conversions_round_to_nearest_even_and_keep_nan(simd, isa):
    harness = simd(isa)
    bits = np.arange(0, 2**32, 4093, dtype=np.uint64).astype(np.uint32)
    halfway = (np.arange(65536, dtype=np.uint32) << 16) | 0x8000  # ties of bfloat16
    half_ties = np.arange(0x38000000, 0x47800000, 0x1000, dtype=np.uint64).astype(np.uint32)  # and of float16
    x = np.concatenate([bits, halfway, halfway - 1, halfway + 1, half_ties]).view(np.float32)
    n = ctypes.c_int64(len(x))
    got = np.empty(len(x), np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = x.astype(np.float16)
    harness.simd_to_f16(pointer(x), pointer(got), n)
    assert np.array_equal(got.view(np.float16), wanted, equal_nan=True)

    harness.simd_to_bf16(pointer(x), pointer(got), n)
    wanted = torch.from_numpy(x).bfloat16()
    got_bf16 = torch.from_numpy(got.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got_bf16.isnan(), wanted.isnan())
    # The bfloat16 instruction flushes denormals to zero by definition.
    usable = ~wanted.isnan() & (torch.from_numpy(np.abs(x)) >= 2.0**-126)
    assert torch.equal(got_bf16[usable], wanted[usable])

    every = np.arange(65536, dtype=np.uint16)
    back = np.empty(65536, np.float32)
    harness.simd_from_f16(pointer(every), pointer(back), ctypes.c_int64(65536))
    assert np.array_equal(back, every.view(np.float16).astype(np.float32), equal_nan=True)
    harness.simd_from_bf16(pointer(every), pointer(back), ctypes.c_int64(65536))
    assert np.array_equal(back.view(np.uint32), every.astype(np.uint32) << 16)


# ------------------------------------------------------------------------------------------------ through torch


@pytest.fixture
def library():
    """The loaded CPU library; the instruction set is put back afterwards."""
    if not _library.loaded("cpu"):
        pytest.skip(f"no CPU library: {_library.reason('cpu')}")
    handle = ctypes.CDLL(_library.path("cpu"))
    handle.linattn_cpu_isa.restype = handle.linattn_cpu_isas.restype = ctypes.c_char_p
    before = handle.linattn_cpu_isa()
    yield handle
    handle.linattn_cpu_set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def use(library, isa):
    if library.linattn_cpu_set_isa(isa.encode()):
        pytest.skip(f"this machine has no {isa}")


def random_inputs(dtype, batch=2, heads=3, n=1500, m=1300, dim=40, value_dim=40, seed=0):
    """q, k, v, grad_out as (B, H, N, D) views of (B, N, H, D) memory."""
    generator = torch.Generator().manual_seed(seed)

    def make(tokens, width):
        return torch.randn(batch, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2)

    return make(n, dim), make(m, dim), make(m, value_dim), make(n, value_dim)


def run_all(q, k, v, grad_out, feature_map=ELU1, eps=1e-4):
    """Everything the five ops write, as a dict; every output starts as NaN."""
    ops = torch.ops.linattn
    (batch, heads, _, dim), value_dim, count = q.shape, v.shape[-1], k.shape[2]

    def like(x):
        return torch.full_like(x, float("nan"))

    def state():
        return torch.full((batch, heads, dim, value_dim), float("nan")), torch.full((batch, heads, dim), float("nan"))

    alone, out, again = like(grad_out), like(grad_out), like(grad_out)
    (kv, k_sum), (kv_again, k_sum_again), (grad_kv, grad_k_sum) = state(), state(), state()
    ops._linear_attention_cpu(q, k, v, None, None, feature_map, True, 1 / count, eps, alone, None, None)
    ops._linear_attention_cpu(q, k, v, None, None, feature_map, True, 1 / count, eps, out, kv, k_sum)
    ops._linear_attention_state_cpu(k, v, None, feature_map, kv_again, k_sum_again)
    ops._linear_attention_apply_cpu(q, None, kv, k_sum, feature_map, True, 1 / count, 1 / count, eps, again)
    assert torch.equal(kv, kv_again) and torch.equal(k_sum, k_sum_again) and torch.equal(out, again)
    grad_q, grad_k, grad_v = like(q), like(k), like(v)
    ops._linear_attention_apply_backward_cpu(
        grad_out, q, None, kv, k_sum, feature_map, True, 1 / count, 1 / count, eps, grad_q, None, grad_kv, grad_k_sum
    )
    ops._linear_attention_state_backward_cpu(grad_kv, grad_k_sum, k, v, None, feature_map, grad_k, grad_v, None)
    names = ["alone", "out", "kv", "k_sum", "grad_q", "grad_kv", "grad_k_sum", "grad_k", "grad_v"]
    values = (alone, out, kv, k_sum, grad_q, grad_kv, grad_k_sum, grad_k, grad_v)
    return dict(zip(names, values, strict=True))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(library, threads, isa, dtype):
    use(library, isa)
    inputs = random_inputs(DTYPES[dtype])
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run_all(*inputs))
    for name, first in results[0].items():
        assert not first.isnan().any(), name
        for other in results[1:]:
            assert torch.equal(first, other[name]), name


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [30, 1300], ids=["few keys", "many keys"])
def test_same_bits_for_a_sample_alone_and_in_a_batch(library, isa, dtype, m):
    use(library, isa)
    inputs = random_inputs(DTYPES[dtype], batch=3, n=700, m=m)
    batch = run_all(*inputs)
    for sample in range(3):
        alone = run_all(*(x[sample : sample + 1] for x in inputs))
        for name, value in alone.items():
            assert torch.equal(value, batch[name][sample : sample + 1]), name


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_memory_order(dtype):
    inputs = random_inputs(DTYPES[dtype], n=300, m=600)
    other = run_all(*(x.contiguous() for x in inputs))
    for name, value in run_all(*inputs).items():
        assert torch.equal(value, other[name]), name


def plain(q, k, v, grad_out, dtype, eps=1e-4):
    """The formulas in `dtype`, every step rounded, phi as its exact branches in float32 (or float64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v, grad_out = (x.to(dtype) for x in (q, k, v, grad_out))
    count = k.shape[2]

    def mapped(x):
        y = x.to(wide)
        f = torch.where(y > 0, y + 1, torch.exp(y.clamp(max=0)))
        return f.to(dtype), f.clamp(max=1).to(dtype)

    (fq, dq), (fk, dk) = mapped(q), mapped(k)
    kv, m = fk.mT @ (v / count), fk.mean(2, keepdim=True)  # divided first: float16 would overflow
    z = (fq * m).sum(-1, keepdim=True) + eps
    w, g = grad_out @ kv.mT, grad_out / z
    dz = -(fq * w).sum(-1, keepdim=True) / z**2
    grad_kv, grad_m = fq.mT @ g / count, (dz * fq).sum(2, keepdim=True) / count
    grads = (w / z + dz * m) * dq, (v @ grad_kv.mT + grad_m) * dk, fk @ grad_kv
    return dict(zip(("out", "grad_q", "grad_k", "grad_v"), (fq @ kv / z, *grads), strict=True))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [40, 64, 51])
def test_error_is_at_most_twice_that_of_the_plain_formula(library, isa, dtype, dim):
    use(library, isa)
    inputs = random_inputs(DTYPES[dtype], n=900, m=1100, dim=dim, value_dim=dim)
    exact, rounded = plain(*inputs, torch.float64), plain(*inputs, DTYPES[dtype])
    got = run_all(*inputs)
    got["few"] = got.pop("alone")
    for name, reference in exact.items():
        allowed = 2 * (rounded[name].double() - reference).norm()
        error = (got[name].double() - reference).norm()
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_keys_and_queries_behave_as_the_formula(library, isa, dtype):
    use(library, isa)
    q, k, v, grad_out = random_inputs(DTYPES[dtype], batch=1, heads=1, n=70, m=300)
    others = [j for j in range(300) if j != 9]
    expected = run_all(q, k[:, :, others], v[:, :, others], grad_out)["out"]
    k[:, :, 9] = float("-inf")  # phi = 0: a key that only counts, and the count cancels but for eps
    q[:, :, 5] = float("-inf")  # phi = 0: the row is 0 / eps
    got = run_all(q, k, v, grad_out)["out"]
    assert (got[:, :, 5] == 0).all()
    rows = [i for i in range(70) if i != 5]
    difference = (got - expected)[:, :, rows].abs().max()
    assert difference <= 4 * torch.finfo(DTYPES[dtype]).eps * expected.abs().max() + 1e-4 / 300


@needs_library
def test_instruction_set_can_be_asked_and_lowered(library):
    levels = library.linattn_cpu_isas().decode().split(",")
    assert levels == ISAS
    assert library.linattn_cpu_set_isa(b"baseline") == 0 and library.linattn_cpu_isa() == b"baseline"
    assert library.linattn_cpu_set_isa(b"mmx") == 1 and library.linattn_cpu_isa() == b"baseline"


@needs_compiler
def test_environment_lowers_the_instruction_set_and_never_raises_it(tmp_path):
    library = compile_all(tmp_path, [(SOURCES / "isa.cpp", [])], ["-O1", "-fPIC", "-shared"], "isa.so")
    code = (
        "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); "
        "lib.linattn_cpu_isa.restype = ctypes.c_char_p; print(lib.linattn_cpu_isa().decode())"
    )

    def level(wanted):
        environment = {**os.environ, "LINATTN_CPU_ISA": wanted}
        command = [sys.executable, "-c", code, str(library)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip(), done.stderr

    best, quiet = level("")
    assert best in ISAS and not quiet
    for wanted in ISAS:
        assert level(wanted)[0] == min(wanted, best, key=ISAS.index)
    name, complaint = level("nonsense")
    assert name == best and "nonsense" in complaint


@needs_library
def test_bindings_refuse_what_memory_safety_depends_on():
    q, k, v, out = random_inputs(torch.float32, n=20, m=20)
    call = torch.ops.linattn._linear_attention_cpu
    rest = (None, None, ELU1, True, 1.0, 1e-4)
    with pytest.raises(RuntimeError, match="k must be"):
        call(q, k[..., :32], v, *rest, out, None, None)
    with pytest.raises(RuntimeError, match="out must be"):
        call(q, k, v, *rest, out[:, :, :19], None, None)
    with pytest.raises(RuntimeError, match="another dtype"):
        call(q, k, v.half(), *rest, out, None, None)
    with pytest.raises(RuntimeError, match="stride 1"):
        call(q.mT.contiguous().mT, k, v, *rest, out, None, None)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        call(q.double(), k.double(), v.double(), *rest, out.double(), None, None)
    with pytest.raises(RuntimeError, match="at least one key"):
        call(q, k[:, :, :0], v[:, :, :0], *rest, out, None, None)
