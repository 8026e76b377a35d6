"""Triton kernels of block-causal attention: against float64, tile by tile, and what the compiler makes of them.

On a machine without a CUDA device they run in Triton's interpreter, which must be chosen before the kernels are
imported (conftest.py); with one, the same tests run on it. The ahead-of-time tests compile a sample of kernels in
processes of their own; LINATTN_AOT_FULL=1 compiles everything for sm_80, sm_90 and sm_100 (some minutes).
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from helpers.triton_aot import SHARED_LIMIT
from helpers.triton_interpreter import install, interpreting

install()
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from test_block_causal_attention import by_lse, plain_attention  # noqa: E402
from test_triton_window_attention import (  # noqa: E402, F401 (fixtures)
    BF16,
    DEVICE,
    DTYPES,
    F16,
    F32,
    F64,
    FULL,
    ROOT,
    assert_close,
    needs_kernels,
    poison,
    poisoned_workspaces,
    quick_calls,
    strided,
)

from linattn import reference  # noqa: E402
from linattn.triton_kernels import block_causal_attention as kernels  # noqa: E402


@pytest.mark.skipif(interpreting(), reason="this is the interpreter")
def test_under_the_interpreter():
    """All tests below that run kernels, in a process of their own with TRITON_INTERPRET=1."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not compiler", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-8000:] + run.stderr[-2000:]


# ---- cases -----------------------------------------------------------------------------------------------------------

# In 16 bits tiles have up to 128 queries and 64 or 128 keys, in float32 32 and 16; small blocks have smaller ones.
DEFAULT = {
    "B": 1, "H": 1, "height": 8, "width": 8, "block": 4, "edge": "clamp", "embed": True, "q_row": 0, "rows": None,
    "scale": None, "D": 16, "dtype": BF16,
}  # fmt: skip
CASES = {
    "whole-tiles-bf16": {},
    "whole-tiles-fp16-drop": {"dtype": F16, "edge": "drop"},
    "whole-tiles-fp32": {"dtype": F32},
    "ragged-tiles-bf16": {"height": 10, "width": 10, "block": 5},
    "ragged-tiles-fp32-drop": {"height": 6, "width": 6, "block": 3, "dtype": F32, "edge": "drop"},
    "several-tiles-bf16": {"height": 32, "width": 16, "block": 16},
    "several-ragged-tiles-bf16": {"height": 9, "width": 18, "block": 9},
    "several-tiles-fp32": {"height": 16, "width": 8, "block": 8, "dtype": F32},
    "several-ragged-tiles-fp32": {"height": 12, "width": 6, "block": 6, "dtype": F32},
    "one-token-blocks": {"height": 3, "width": 3, "block": 1},
    "one-block": {"height": 6, "width": 6, "block": 6, "dtype": F32},
    "one-row": {"height": 4, "width": 12},
    "one-column-drop": {"height": 12, "width": 4, "edge": "drop"},
    "strip": {"height": 12, "q_row": 4, "rows": 4},
    "strip-at-the-end-drop": {"height": 12, "q_row": 8, "edge": "drop", "dtype": F32},
    "strip-with-unseen-keys": {"height": 16, "width": 4, "q_row": 8, "rows": 4},
    "strip-of-nothing": {"q_row": 4, "rows": 0},
    "without-embedding": {"embed": False, "height": 10, "width": 10, "block": 5},
    "without-embedding-drop": {"embed": False, "edge": "drop", "dtype": F32},
    "batch-and-heads": {"B": 2, "H": 2, "height": 2, "width": 4, "block": 2},
    "head-dim-8": {"height": 2, "width": 4, "block": 2, "D": 8, "dtype": F32},
    "head-dim-33": {"height": 2, "width": 4, "block": 2, "D": 33, "dtype": F16},
    "head-dim-80": {"D": 80},
    "head-dim-80-fp32": {"height": 4, "width": 4, "block": 2, "D": 80, "dtype": F32},
    "head-dim-96": {"height": 4, "width": 4, "block": 2, "D": 96},
    "head-dim-128": {"height": 4, "width": 4, "block": 2, "D": 128, "dtype": F16},
    "head-dim-160": {"height": 4, "width": 4, "block": 2, "D": 160, "edge": "drop"},
    "head-dim-256": {"height": 4, "width": 4, "block": 2, "D": 256},
    "head-dim-200-fp32": {"height": 4, "width": 4, "block": 2, "D": 200, "dtype": F32},
    "negative-scale": {"scale": -0.3, "height": 4, "width": 4, "block": 2},
    "scale-0": {"scale": 0.0, "height": 4, "width": 4, "block": 2},
}
NAMES = ("q", "k", "v", "slot_embed")


@functools.lru_cache(None)
def problem(name):
    """(case, inputs)"""
    case = {**DEFAULT, **CASES[name]}
    case["rows"] = case["height"] - case["q_row"] if case["rows"] is None else case["rows"]
    case["scale"] = case["D"] ** -0.5 if case["scale"] is None else case["scale"]
    torch.manual_seed(0)

    def randn(tokens):
        return torch.randn(case["B"], case["H"], tokens, case["D"]).to(case["dtype"]).to(DEVICE)

    queries, keys = case["rows"] * case["width"], case["height"] * case["width"]
    embed = torch.randn(4, case["H"], case["D"]).to(DEVICE) if case["embed"] else None
    inputs = {"q": randn(queries), "k": randn(keys), "v": randn(keys), "slot_embed": embed, "grad_out": randn(queries)}
    return case, inputs | {"grad_lse": torch.randn(case["B"], case["H"], queries).to(DEVICE)}


def results_of(function, case, inputs, dtype):
    """Outputs and, by autograd, gradients of a definition, computed in a type."""
    leaves = {n: x if (x := inputs[n]) is None else x.to(dtype, copy=True).requires_grad_() for n in NAMES}
    options = {n: case[n] for n in ("height", "width", "block", "scale", "edge", "q_row")}
    outputs = function(**leaves, **options)
    upstream = [inputs["grad_out"].to(dtype), inputs["grad_lse"]]
    pairs = [(x, g.to(x.dtype)) for x, g in zip(outputs, upstream, strict=True) if g is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    results = {"out": outputs[0].detach(), "lse": outputs[1].detach()}
    # (Without queries nothing of k is used, and autograd says None.)
    gradients = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items() if x is not None}
    return results | {f"grad_{n}": x for n, x in gradients.items()}


def run_forward(case, inputs):
    out, lse = poison(inputs["q"].shape, inputs["q"].dtype), poison(inputs["q"].shape[:3], F32)
    kernels.forward(*(inputs[n] for n in NAMES), *where_of(case), out, lse)
    return out, lse


def where_of(case):
    where = (case[n] for n in ("height", "width", "block"))
    return *where, case["edge"] == "clamp", case["q_row"], case["scale"]


def run(case, inputs):
    """Everything that the launchers write, by name."""
    out, lse = run_forward(case, inputs)
    gradients = {f"grad_{n}": x if (x := inputs[n]) is None else poison(x.shape, x.dtype) for n in NAMES}
    tensors = (inputs[n] for n in ("grad_out", "grad_lse", *NAMES))
    kernels.backward(*tensors, out, lse, *where_of(case), *gradients.values())
    return {"out": out, "lse": lse, **{n: x for n, x in gradients.items() if x is not None}}


def check(case, inputs):
    """Every result against float64: at most a few times the error of the plain formula in the same type."""
    exact = results_of(reference.block_causal_attention, case, inputs, F64)
    plain = results_of(by_lse(plain_attention), case, inputs, case["dtype"])
    # Numbers that are float32 for 16-bit inputs too.
    plain["lse"] = results_of(plain_attention, case, inputs, F32)["lse"]
    actual = run(case, inputs)
    assert actual.keys() == exact.keys()
    for what, result in actual.items():
        if result.numel():
            assert_close(what, result, exact[what], plain[what])


# ---- accuracy --------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_as_accurate_as_the_plain_formula(name):
    check(*problem(name))


@needs_kernels
@pytest.mark.parametrize("name", ["ragged-tiles-bf16", "head-dim-160", "head-dim-80"])
def test_tiles_of_gpus_without_wgmma_are_as_accurate(name, monkeypatch):
    monkeypatch.setattr(kernels, "tensor_core", lambda device: "mma")
    check(*problem(name))


@needs_kernels
@pytest.mark.parametrize("name", ["whole-tiles-bf16", "batch-and-heads"])
def test_gradients_of_the_embeddings_from_many_partial_sums_are_as_accurate(name, monkeypatch):
    monkeypatch.setattr(kernels, "split_queries", lambda tokens, heads, device: (-(-tokens // 5), 5))
    check(*problem(name))


@needs_kernels
def test_without_grad_lse_the_gradients_are_those_of_the_output_alone():
    case, inputs = problem("ragged-tiles-bf16")
    check(case, {**inputs, "grad_lse": None})


@needs_kernels
def test_scores_far_apart_neither_overflow_nor_vanish():
    """Scores of thousands: exp overflows without the running maximum, and smaller ones seen first must be forgotten."""
    case, inputs = problem("ragged-tiles-fp32-drop")
    inputs = inputs | {n: inputs[n] * 30 for n in ("q", "k", "slot_embed")}
    exact, plain = (
        results_of(function, case, inputs, dtype)
        for function, dtype in ((reference.block_causal_attention, F64), (plain_attention, F32))
    )
    for what, result in zip(("out", "lse"), run_forward(case, inputs), strict=True):
        assert_close(what, result, exact[what], plain[what])


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["block", "count"])
def walk_kernel(TILES, block, count, Y: tl.constexpr, X: tl.constexpr):
    """The (visit, y, x) of `count` tiles, in the order of the kernels."""
    visit, y, x = 0, 0, 0
    for t in range(count):
        tl.store(TILES + 3 * t, visit)
        tl.store(TILES + 3 * t + 1, y)
        tl.store(TILES + 3 * t + 2, x)
        visit, y, x = kernels._step(visit, y, x, block, Y, X)


@needs_kernels
@pytest.mark.parametrize(("block", "y", "x"), [(8, 4, 4), (5, 2, 8), (7, 4, 4), (1, 2, 8), (3, 1, 16)])
def test_all_tiles_of_a_block_are_visited_before_those_of_the_next(block, y, x):
    per_block = [(i, j) for i in range(0, block, y) for j in range(0, block, x)]
    tiles = torch.full((3 * len(per_block), 3), -1, dtype=torch.int32, device=DEVICE)
    walk_kernel[(1,)](tiles, block, len(tiles), y, x)
    assert [tuple(t) for t in tiles.tolist()] == [(visit, *at) for visit in range(3) for at in per_block]


def test_tiles_fit_the_block_and_waste_less_than_half_of_what_they_compute():
    assert kernels.tile_sides(32, 128) == (8, 16)
    for most in (16, 32, 64, 128):
        for block in range(1, 130):
            y, x = kernels.tile_sides(block, most)
            assert 16 <= y * x <= most
            assert (y & -y, x & -x) == (y, x), "powers of two"
            computed = -(-block // y) * y * -(-block // x) * x
            assert computed <= max(16, 2.6 * block**2), (most, block, y, x)
            if block % 16 == 0 and most >= 32:
                assert computed == block**2 and y * x == most


@pytest.mark.parametrize("kernel", ["forward", "statistics", "grad_key", "grad_query", "grad_embed"])
def test_no_size_is_specialised_on(kernel):
    """Every argument that is neither a tensor nor a choice of tiles is a run-time number of any value."""
    function = getattr(kernels, f"{kernel}_kernel")
    numbers = [name for name in function.arg_names if name.islower()]  # tensors and choices are in capitals
    assert numbers
    assert set(numbers) <= set(kernels.SIZES)


# ---- memory ----------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(("name", "layout"), [("batch-and-heads", "fused"), ("head-dim-80-fp32", "odd")])
def test_strides_change_no_bit_and_nothing_is_written_outside(name, layout):
    case, inputs = problem(name)
    expected = run(case, inputs)
    views = {n: strided(x, layout)[1] if n in ("q", "k", "v", "grad_out") else x for n, x in inputs.items()}
    outputs = {n: strided(poison(inputs[n].shape, case["dtype"]), layout) for n in ("q", "k", "v", "grad_out")}
    out, lse = outputs["grad_out"][1], poison(inputs["q"].shape[:3], F32)
    tensors = [views[n] for n in NAMES]
    kernels.forward(*tensors, *where_of(case), out, lse)
    gradients = [*(outputs[n][1] for n in ("q", "k", "v")), poison(inputs["slot_embed"].shape, F32)]
    kernels.backward(views["grad_out"], views["grad_lse"], *tensors, out, lse, *where_of(case), *gradients)
    assert torch.equal(lse, expected["lse"])
    assert torch.equal(gradients[3], expected["grad_slot_embed"])
    for n, (buffer, view) in outputs.items():
        assert torch.equal(view, expected["out" if n == "grad_out" else f"grad_{n}"]), n
        assert int(torch.isfinite(buffer).sum()) == view.numel(), f"{n}: written outside"


@needs_kernels
@pytest.mark.skipif(DEVICE != "cpu", reason="needs a sparse file as memory")
def test_row_offsets_beyond_two_to_the_31(tmp_path):
    """Four rows, 2**30 elements + 8 apart, in a sparse file: in two rows and columns of blocks, and in one block."""
    step, D, dtype = 2**30 + 8, 16, BF16
    storage = torch.UntypedStorage.from_file(
        str(tmp_path / "sparse"), shared=True, nbytes=(3 * step + D) * dtype.itemsize
    )
    far = torch.empty(0, dtype=dtype).set_(storage, 0, (1, 1, 4, D), (0, 0, step, 1))
    torch.manual_seed(0)
    near = torch.randn(1, 1, 4, D).to(dtype)
    far.copy_(near)
    embed = torch.randn(4, 1, D)
    for block in (1, 2):
        case = {"height": 2, "width": 2, "block": block, "edge": "clamp", "q_row": 0, "scale": 0.25}
        fixed = {"slot_embed": embed, "grad_lse": None}
        expected, actual = (run(case, {**dict.fromkeys(("q", "k", "v", "grad_out"), x), **fixed}) for x in (near, far))
        for n, result in actual.items():
            assert torch.equal(result, expected[n]), (n, block)


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 2, 16), (2, 0, 16), (1, 1, 0)], ids=["no-batch", "no-heads", "no-tokens"])
def test_empty_problems_write_what_there_is(shape):
    B, H, tokens = shape
    side = 4 if tokens else 0
    case = {"height": side, "width": side, "block": 2, "edge": "clamp", "q_row": 0, "scale": 1.0}
    inputs = {n: torch.ones(B, H, tokens, 16, dtype=BF16, device=DEVICE) for n in ("q", "k", "v", "grad_out")}
    inputs |= {"slot_embed": torch.ones(4, H, 16, device=DEVICE), "grad_lse": None}
    for n, result in run(case, inputs).items():
        assert torch.equal(result, torch.zeros_like(result)), n


# ---- determinism -----------------------------------------------------------------------------------------------------


@needs_kernels
def test_two_runs_give_the_same_bits():
    case, inputs = problem("ragged-tiles-bf16")
    first, second = run(case, inputs), run(case, inputs)
    assert all(torch.equal(first[n], second[n]) for n in first)


@needs_kernels
def test_a_sample_alone_gives_the_bits_it_gives_in_a_batch():
    case, inputs = problem("batch-and-heads")
    batch = run(case, inputs)
    alone = run(case, {n: x if n == "slot_embed" else x[1:] for n, x in inputs.items()})
    for n, result in batch.items():
        if n != "grad_slot_embed":  # a sum over the batch
            assert torch.equal(result[1:], alone[n]), n


def test_partial_sums_of_embeddings_cover_the_queries_and_take_little_memory():
    cpu = torch.device("cpu")
    for tokens in (1, 63, 500, 4096, 32769, 2**20):
        for heads in (1, 16, 1000):
            chunks, chunk = kernels.split_queries(tokens, heads, cpu)
            assert chunks * chunk >= tokens and (chunks - 1) * chunk < tokens
            assert chunks == 1 or 4 * chunks <= 0.01 * tokens, "4 rows of sums per chunk"


# ---- the compiler ----------------------------------------------------------------------------------------------------

ATTENTION = ("forward", "grad_query", "grad_key")


def compiled_cases():
    """Kernel, head dim, dtype, architecture, block."""
    if FULL:
        widths = {"bf16": (8, 40, 64, 80, 96, 128, 160, 192, 256), "fp16": (64, 80), "fp32": (40, 80, 128, 256)}
        for arch in (80, 90, 100):
            for dtype, head_dims in widths.items():
                for D in head_dims:
                    for kernel in ATTENTION:
                        for block in (32, 20):
                            yield kernel, D, dtype, arch, block
        return
    for arch in (80, 90):
        for D in (64, 80, 128):
            for kernel in ATTENTION:
                yield kernel, D, "bf16", arch, 32
    yield "forward", 80, "fp16", 90, 20
    yield "grad_query", 80, "fp32", 80, 32
    for kernel in ("statistics", "grad_embed"):
        yield kernel, 80, "bf16", 90, 32


COMPILED = list(compiled_cases())


def case_id(case):
    kernel, D, dtype, arch, block = case
    return f"{kernel}-{D}-{dtype}-sm{arch}-by{block}"


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports by case id; two processes share the work, each with a cache of its own."""
    jobs = []
    for part in range(2):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        command = [sys.executable, __file__, json.dumps(COMPILED[part::2])]
        jobs.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    results = {}
    for job in jobs:
        output, errors = job.communicate()
        assert job.returncode == 0, errors[-4000:]
        for line in output.splitlines():
            case, result = json.loads(line)
            results[case_id(case)] = result
    return results


@pytest.mark.parametrize("case", COMPILED, ids=case_id)
def test_the_compiler_agrees(case, reports):
    kernel, D, dtype, arch, _ = case
    result = reports[case_id(case)]
    assert "error" not in result, result["error"]
    assert result["shared"] <= (99 * 1024 if arch == 80 else SHARED_LIMIT[arch])  # sm_86, sm_89 and sm_120 have 99 KB
    assert result["stack"] == 0 and result["local"] == 0 and result["spills"] == 0, result
    if kernel in ATTENTION and dtype != "fp32":  # float32 multiplies exactly, on the FMA units
        assert result["tensor_core"] == "wgmma" if arch == 90 else result["tensor_core"], "no tensor core instruction"
    if kernel == "forward" and dtype == "bf16" and D == 64 and arch == 90:
        assert result["reg"] <= 128, "two programs of 256 threads on one multiprocessor"
    accesses = result["global"]
    assert sum(n for op, n in accesses.items() if ".128" in op) > 0
    assert not any(".U16" in op or ".U8" in op for op in accesses), accesses


def compile_all():
    """Runs in a process without TRITON_INTERPRET: one JSON line per entry of the first argument on stdout."""
    from helpers import triton_aot

    def configuration(kernel, D, dtype, arch, block):
        function = getattr(kernels, f"{kernel}_kernel")
        if kernel == "grad_embed":
            choice = kernels.embed_blocks(D)
        else:
            choice = dict(kernels.blocks(kernel, D, DTYPES[dtype], {80: "mma", 90: "wgmma"}.get(arch, ""), block))
        choice |= {"CLAMP": True, "HAS_EMBED": True, "HAS_GRAD_LSE": True, "UNIT": 4 if dtype == "fp32" else 8}
        return function, choice, choice.pop("num_warps"), choice.pop("num_stages", 3)

    triton_aot.FLOAT32_POINTERS |= {"E", "LSE", "GLSE", "STATS", "PART"}
    for entry in json.loads(sys.argv[1]):
        kernel, D, dtype, arch, _ = entry
        triton_aot.configuration = lambda *_, entry=entry: configuration(*entry)
        try:
            result = triton_aot.report(kernel, D, D, dtype, arch, {})
        except Exception as error:  # what the compiler raises is its own affair; the test shows it
            result = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        print(json.dumps([entry, result]), flush=True)


if __name__ == "__main__":
    compile_all()
