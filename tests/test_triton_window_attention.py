"""Triton kernels of window attention: against float64, tile by tile, and what the compiler makes of them.

On a machine without a CUDA device they run in Triton's interpreter, which must be chosen before the kernels are
imported (conftest.py); with one, the same tests run on it. The ahead-of-time tests compile a sample of kernels in
processes of their own; LINATTN_AOT_FULL=1 compiles everything for sm_80, sm_90 and sm_100 (about ten minutes).
"""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from helpers.tester import FORWARD, GRADIENT
from helpers.triton_aot import SHARED_LIMIT
from helpers.triton_interpreter import install, interpreting

install()
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

ROOT = Path(__file__).parents[1]
DEVICE = "cpu" if interpreting() else "cuda"
RUNS_HERE = interpreting() or torch.cuda.is_available()
FULL = os.environ.get("LINATTN_AOT_FULL", "0") != "0"

try:
    from linattn.triton_kernels import window_attention as kernels
except ModuleNotFoundError:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))
    from triton_kernels import window_attention as kernels

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def needs_kernels(test):
    test = pytest.mark.skipif(not RUNS_HERE, reason="runs inside test_under_the_interpreter")(test)
    return pytest.mark.gpu(test) if DEVICE == "cuda" else test


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


# ---- the definition --------------------------------------------------------------------------------------------------


def pattern(height, width, radius, text, pooled, text_first, q_row, rows, q_text):
    """Who sees whom, [queries, keys and pooled keys]."""

    def tokens(first, count):
        return torch.arange(first, first + count).repeat_interleave(width), torch.arange(width).repeat(count)

    def sequence(text_part, image_part, dim):
        return torch.cat([text_part, image_part] if text_first else [image_part, text_part], dim)

    (qy, qx), (ky, kx) = tokens(q_row, rows), tokens(0, height)
    disk = (qy[:, None] - ky) ** 2 + (qx[:, None] - kx) ** 2 < radius**2
    image = sequence(torch.ones(len(qy), text, dtype=torch.bool), disk, 1)
    image = torch.cat([image, torch.ones(len(qy), pooled, dtype=torch.bool)], 1)
    words = torch.ones(q_text, text + height * width + pooled, dtype=torch.bool)
    words[:, text + height * width :] = False
    return sequence(words, image, 0)


def plain_attention(q, k, v, pooled_k, pooled_v, mask, scale):
    if pooled_k is not None:
        k, v = torch.cat([k, pooled_k], 2), torch.cat([v, pooled_v], 2)
    scores = (scale * (q @ k.mT)).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def plain_gradients(grad_out, grad_lse, q, k, v, pooled_k, pooled_v, mask, scale):
    """The formula of the backward pass (autograd's, which knows p, cancels better where there is one key)."""
    keys = k.shape[2]
    out, lse = plain_attention(q, k, v, pooled_k, pooled_v, mask, scale)
    if pooled_k is not None:
        k, v = torch.cat([k, pooled_k], 2), torch.cat([v, pooled_v], 2)
    p = (scale * (q @ k.mT) - lse[..., None]).exp().masked_fill(~mask, 0.0)
    ds = scale * p * (grad_out @ v.mT - ((grad_out * out).sum(-1) - grad_lse)[..., None])
    grad_k, grad_v = ds.mT @ q, p.mT @ grad_out
    pooled = (None, None) if pooled_k is None else (grad_k[:, :, keys:], grad_v[:, :, keys:])
    return out, lse, ds @ k, grad_k[:, :, :keys], grad_v[:, :, :keys], *pooled


# Geometry and shapes; tiles are 8 x 16 queries with 8 x 8 keys in 16 bits, 4 x 8 with 2 x 8 in float32, and dense keys
# come in blocks of 64 (128 for text queries) and 16.
DEFAULT = {
    "B": 1, "H": 1, "height": 9, "width": 17, "radius": 4, "text": 3, "D": 64, "dtype": BF16, "pooled": 0,
    "text_first": True, "q_row": 0, "rows": None, "q_text": None, "scale": None,
}  # fmt: skip
CASES = {
    "partial-tiles-bf16": {"text": 2},
    "partial-tiles-fp16": {"dtype": F16, "D": 40, "height": 5, "radius": 6},
    "partial-tiles-fp32": {"dtype": F32, "D": 16, "height": 5, "width": 9, "radius": 3},
    "whole-tiles-bf16": {"height": 8, "width": 32, "radius": 20, "text": 0},
    "whole-tiles-fp32": {"dtype": F32, "D": 8, "height": 4, "width": 16, "radius": 8, "text": 0},
    "everything-in-reach": {"height": 9, "width": 10, "radius": 100, "D": 16},
    "radius-1-without-text": {"height": 3, "radius": 1, "text": 0, "D": 16},
    "text-last": {"height": 3, "text_first": False, "text": 5, "q_text": 2, "D": 32},
    "long-text": {"text": 70, "height": 3, "width": 5, "D": 16},
    "long-text-fp32": {"text": 19, "height": 1, "width": 5, "D": 8, "dtype": F32},
    "text-only": {"text": 70, "height": 0, "width": 0, "D": 16},
    "text-queries-only": {"text": 4, "q_text": 6, "rows": 0, "height": 8, "width": 8, "D": 16},
    "pooled": {"pooled": 70, "height": 4, "width": 16, "D": 16},
    "pooled-text-last-fp32": {"pooled": 19, "height": 2, "width": 8, "D": 16, "dtype": F32, "text_first": False},
    "strip": {"height": 24, "width": 8, "q_row": 11, "rows": 5, "radius": 6, "q_text": 2, "D": 16},
    "strip-text-last": {"height": 12, "width": 8, "q_row": 3, "rows": 4, "text_first": False, "D": 16},
    "strip-fp32": {"height": 7, "width": 6, "q_row": 4, "rows": 2, "q_text": 0, "D": 8, "dtype": F32},
    "batch-and-heads": {"B": 2, "H": 2, "height": 2, "width": 3, "radius": 2, "D": 16},
    "one-token": {"B": 4, "height": 1, "width": 1, "radius": 1, "text": 0, "D": 8, "dtype": F32},
    "one-column": {"height": 20, "width": 1, "radius": 9, "D": 16},
    "one-row": {"height": 1, "width": 40, "radius": 9, "D": 16},
    "head-dim-80": {"height": 2, "width": 9, "D": 80, "dtype": F16},
    "head-dim-128": {"height": 2, "width": 9, "D": 128},
    "head-dim-160": {"height": 2, "width": 9, "D": 160, "pooled": 3},
    "head-dim-256": {"height": 2, "width": 9, "D": 256, "dtype": F16, "text_first": False},
    "head-dim-160-fp32": {"height": 2, "width": 5, "radius": 2, "D": 160, "dtype": F32},
    "negative-scale": {"scale": -0.3, "D": 16, "height": 3, "width": 9},
    "scale-0": {"scale": 0.0, "D": 16, "height": 3, "width": 9},
}


def poison(shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@functools.lru_cache(None)
def problem(name):
    """(options, inputs, mask) of a case."""
    case = {**DEFAULT, **CASES[name]}
    case["rows"] = case["height"] - case["q_row"] if case["rows"] is None else case["rows"]
    case["q_text"] = case["text"] if case["q_text"] is None else case["q_text"]
    case["scale"] = case["D"] ** -0.5 if case["scale"] is None else case["scale"]
    torch.manual_seed(0)

    def randn(tokens):
        return torch.randn(case["B"], case["H"], tokens, case["D"]).to(case["dtype"]).to(DEVICE)

    queries = case["q_text"] + case["rows"] * case["width"]
    keys = case["text"] + case["height"] * case["width"]
    inputs = {"q": randn(queries), "k": randn(keys), "v": randn(keys), "pooled_k": None, "pooled_v": None}
    if case["pooled"]:
        inputs |= {"pooled_k": randn(case["pooled"]), "pooled_v": randn(case["pooled"])}
    inputs["grad_out"] = randn(queries)
    inputs["grad_lse"] = torch.randn(case["B"], case["H"], queries).to(DEVICE)
    where = ("height", "width", "radius", "text", "pooled", "text_first", "q_row", "rows", "q_text")
    return case, inputs, pattern(*(case[key] for key in where)).to(DEVICE)


RESULTS = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_pooled_k", "grad_pooled_v")


def exact_results(case, inputs, mask):
    """Outputs and, by autograd, gradients in float64."""
    names = ("q", "k", "v", "pooled_k", "pooled_v")
    leaves = [t if (t := inputs[n]) is None else t.to(F64).requires_grad_() for n in names]
    outputs = plain_attention(*leaves, mask, case["scale"])
    upstream = [inputs["grad_out"].double(), None if inputs["grad_lse"] is None else inputs["grad_lse"].double()]
    torch.autograd.backward([o for o, g in zip(outputs, upstream, strict=True) if g is not None],
                            [g for g in upstream if g is not None])  # fmt: skip
    results = [*(o.detach() for o in outputs), *(t if t is None else t.grad for t in leaves)]
    return {n: t for n, t in zip(RESULTS, results, strict=True) if t is not None}


def plain_results(case, inputs, mask, dtype):
    """The same by the plain formulas in a type."""
    names = ("grad_out", "grad_lse", "q", "k", "v", "pooled_k", "pooled_v")
    tensors = [t if (t := inputs[n]) is None else t.to(dtype) for n in names]
    tensors[1] = 0.0 if tensors[1] is None else tensors[1]
    results = plain_gradients(*tensors, mask, case["scale"])
    return {n: t for n, t in zip(RESULTS, results, strict=True) if t is not None}


def where_of(case):
    return tuple(case[n] for n in ("height", "width", "radius", "text", "text_first", "q_row", "q_text", "scale"))


def run_forward(case, inputs):
    out, lse = poison(inputs["q"].shape, inputs["q"].dtype), poison(inputs["q"].shape[:3], F32)
    tensors = (inputs[n] for n in ("q", "k", "v", "pooled_k", "pooled_v"))
    kernels.forward(*tensors, *where_of(case), out, lse)
    return out, lse


def run(case, inputs):
    """Everything that the launchers write, by name."""
    out, lse = run_forward(case, inputs)
    names = ("q", "k", "v", "pooled_k", "pooled_v")
    gradients = {n: t if (t := inputs[n]) is None else poison(t.shape, t.dtype) for n in names}
    tensors = (inputs[n] for n in names)
    kernels.backward(inputs["grad_out"], inputs["grad_lse"], *tensors, out, lse, *where_of(case), *gradients.values())
    return {"out": out, "lse": lse, **{f"grad_{n}": t for n, t in gradients.items() if t is not None}}


def assert_close(name, result, exact, plain):
    """The error against float64 is at most FORWARD (gradients: GRADIENT) times the plain formula's in the same type,
    plus two roundings."""
    assert result.shape == exact.shape
    assert torch.isfinite(result).all(), (
        f"{name}: {int((~torch.isfinite(result)).sum())} elements not written or not finite"
    )
    stored = exact.to(result.dtype)
    rounding = 2 * ((stored + 0.3 - 0.3) - stored).abs().max().double()
    error = (result.double() - exact).abs().max()
    factor = GRADIENT if name.startswith("grad") else FORWARD
    bound = factor * (plain.double() - exact).abs().max() + rounding
    assert error <= bound, f"{name}: error {error:.3e} against float64, plain {plain.dtype} allows {bound:.3e}"


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch):
    """Whatever a launcher allocates holds NaN until a kernel writes it."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.fixture(autouse=True)
def quick_calls(monkeypatch):
    """The interpreter patches triton.language anew at every call of a device function, 1 ms each; once is enough."""
    if not interpreting():
        return
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


# ---- accuracy --------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_as_accurate_as_the_plain_formula(name):
    case, inputs, mask = problem(name)
    exact, plain = exact_results(case, inputs, mask), plain_results(case, inputs, mask, case["dtype"])
    plain["lse"] = plain_results(case, inputs, mask, F32)["lse"]  # it is a float32 number for 16-bit inputs too
    results = run(case, inputs)
    assert results.keys() == exact.keys()
    for what, result in results.items():
        assert_close(what, result, exact[what], plain[what])


@needs_kernels
@pytest.mark.parametrize("name", ["long-text", "pooled"])
def test_partial_results_of_many_splits_are_as_accurate(name, monkeypatch):
    def one_block_each(count, rows, programs, floats, block, device):
        return max(1, -(-count // block)), block

    monkeypatch.setattr(kernels, "split_dense", one_block_each)
    case, inputs, mask = problem(name)
    exact, plain = exact_results(case, inputs, mask), plain_results(case, inputs, mask, case["dtype"])
    for what, result in run(case, inputs).items():
        assert_close(what, result, exact[what], plain[what])


@needs_kernels
@pytest.mark.parametrize("name", ["partial-tiles-fp16", "head-dim-160", "head-dim-80"])
def test_tiles_of_gpus_without_wgmma_are_as_accurate(name, monkeypatch):
    monkeypatch.setattr(kernels, "tensor_core", lambda device: "mma")
    case, inputs, mask = problem(name)
    exact, plain = exact_results(case, inputs, mask), plain_results(case, inputs, mask, case["dtype"])
    for what, result in run(case, inputs).items():
        assert_close(what, result, exact[what], plain[what])


@needs_kernels
def test_without_grad_lse_the_gradients_are_those_of_the_output_alone():
    case, inputs, mask = problem("text-last")
    inputs = {**inputs, "grad_lse": None}
    exact, plain = exact_results(case, inputs, mask), plain_results(case, inputs, mask, case["dtype"])
    for what, result in run(case, inputs).items():
        assert_close(what, result, exact[what], plain[what])


@needs_kernels
def test_scores_far_apart_neither_overflow_nor_vanish():
    """Scores of thousands: exp overflows without the running maximum, and smaller ones seen first must be forgotten."""
    torch.manual_seed(0)
    case, inputs, mask = problem("partial-tiles-fp32")
    inputs = {**inputs, "q": inputs["q"] * 30, "k": inputs["k"] * 30}
    out, lse = run_forward(case, inputs)
    tensors = [inputs[n] for n in ("q", "k", "v", "pooled_k", "pooled_v")]
    exact = plain_attention(*(t if t is None else t.double() for t in tensors), mask, case["scale"])
    plain = plain_attention(*tensors, mask, case["scale"])
    assert_close("out", out, exact[0], plain[0])
    assert_close("lse", lse, exact[1], plain[1])


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["y0", "x0", "rows", "width", "radius"])
def walk_kernel(PARTIAL, WHOLE, COUNTS, y0, x0, rows, width, radius, OY: tl.constexpr, OX: tl.constexpr,
                Y: tl.constexpr, X: tl.constexpr):  # fmt: skip
    """The (j, c) of all tiles that a program of the kernels would visit, in its order."""
    j, partial, whole_row, whole = kernels._count_tiles(y0, x0, rows, width, radius, OY, OX, Y, X)
    tl.store(COUNTS, partial)
    tl.store(COUNTS + 1, whole)
    c, whole_lo, whole_hi, hi = kernels._partial_row(j, y0, x0, rows, width, radius, OY, OX, Y, X)
    for t in range(partial):
        tl.store(PARTIAL + 2 * t, j)
        tl.store(PARTIAL + 2 * t + 1, c)
        c += 1
        c = tl.where(c == whole_lo, whole_hi, c)
        if c >= hi:
            j += 1
            c, whole_lo, whole_hi, hi = kernels._partial_row(j, y0, x0, rows, width, radius, OY, OX, Y, X)
    j = whole_row
    _lo, c, whole_hi, _hi = kernels._reach(j, y0, x0, rows, width, radius, OY, OX, Y, X)
    for t in range(whole):
        tl.store(WHOLE + 2 * t, j)
        tl.store(WHOLE + 2 * t + 1, c)
        c += 1
        if c >= whole_hi:
            j += 1
            _lo, c, whole_hi, _hi = kernels._reach(j, y0, x0, rows, width, radius, OY, OX, Y, X)


# y0, x0, rows, width, radius and the tiles: own rows, own columns, rows, columns
WALKS = {
    "interior": (40, 32, 90, 80, 16, 8, 16, 8, 8),
    "corner": (0, 0, 90, 80, 16, 8, 16, 8, 8),
    "far-corner": (88, 64, 91, 79, 16, 8, 16, 8, 8),
    "all-in-reach": (8, 0, 21, 30, 60, 8, 16, 8, 8),
    "one-column-of-tiles": (8, 0, 50, 7, 30, 8, 16, 8, 8),
    "whole-columns": (8, 0, 48, 8, 30, 8, 8, 8, 8),
    "radius-1": (8, 16, 30, 40, 1, 8, 16, 8, 8),
    "radius-2": (8, 16, 30, 40, 2, 8, 16, 8, 8),
    "keys": (16, 16, 40, 60, 8, 8, 16, 4, 8),
    "above-the-strip": (-5, 16, 6, 40, 9, 8, 16, 4, 8),
    "below-the-strip": (9, 16, 6, 40, 9, 8, 16, 4, 8),
    "out-of-the-strip's-reach": (60, 16, 6, 40, 9, 8, 16, 4, 8),
    "empty-strip": (0, 16, 0, 40, 9, 8, 16, 4, 8),
    "float32": (20, 24, 41, 51, 11, 4, 8, 2, 8),
    "large-radius": (600, 0, 8, 24, 607, 8, 16, 8, 8),
}


@needs_kernels
@pytest.mark.parametrize("name", WALKS)
def test_every_tile_with_a_live_pair_is_visited_once_and_whole_tiles_are_all_live(name):
    y0, x0, rows, width, radius, own_y, own_x, size_y, size_x = WALKS[name]
    partial, whole = (torch.zeros(2000, 2, dtype=torch.int32, device=DEVICE) for _ in range(2))
    counts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    walk_kernel[(1,)](partial, whole, counts, *WALKS[name])
    tiles = {kind: [tuple(t) for t in walked[:n].tolist()] for kind, walked, n in
             (("partial", partial, counts[0]), ("whole", whole, counts[1]))}  # fmt: skip
    visited = tiles["partial"] + tiles["whole"]
    assert len(set(visited)) == len(visited)

    oy, ox = torch.arange(own_y)[:, None, None, None], torch.arange(own_x)[None, :, None, None]
    for j in range(-(radius + own_y + size_y) // size_y, (radius + own_y) // size_y + 2):
        for c in range(-(x0 // size_x) - 2, (width - x0) // size_x + 2):
            y = j * size_y + torch.arange(size_y)[None, None, :, None]
            x = c * size_x + torch.arange(size_x)[None, None, None, :]
            inside = (y0 + y >= 0) & (y0 + y < rows) & (x0 + x >= 0) & (x0 + x < width)
            live = ((oy - y) ** 2 + (ox - x) ** 2 < radius**2) & inside
            assert not live.any() or (j, c) in visited, f"tile {(j, c)} is missed"
            assert inside.any() or (j, c) not in visited, f"tile {(j, c)} lies outside the grid"
            assert live.all() or (j, c) not in tiles["whole"], f"tile {(j, c)} is not whole"
            if live.all() and (j, c) not in tiles["whole"]:  # the tile that its row gives away
                assert all(t in tiles["whole"] for t in visited if t[0] == j and t[1] != c), f"tile {(j, c)} is whole"


# ---- memory ----------------------------------------------------------------------------------------------------------


def strided(tensor, layout):
    """The same values behind other strides, and the memory around them."""
    B, H, N, D = tensor.shape
    if layout == "fused":  # (B, N, 3, H, D): one of q, k, v of a projection
        buffer = torch.full((B, N, 3, H, D), float("nan"), dtype=tensor.dtype, device=DEVICE)
        view = buffer[:, :, 1].transpose(1, 2)
    else:  # nothing aligned beyond the element
        buffer = torch.full((B, N, H, D + 3), float("nan"), dtype=tensor.dtype, device=DEVICE)
        view = buffer[..., 1 : D + 1].transpose(1, 2)
    view.copy_(tensor)
    return buffer, view


@needs_kernels
@pytest.mark.parametrize("layout", ["fused", "odd"])
@pytest.mark.parametrize("name", ["pooled", "strip-fp32"])
def test_strides_change_no_bit_and_nothing_is_written_outside(name, layout):
    case, inputs, _ = problem(name)
    expected = run(case, inputs)
    views = {n: strided(t, layout)[1] if t is not None and t.dim() == 4 else t for n, t in inputs.items()}
    names = [n for n in ("q", "k", "v", "pooled_k", "pooled_v") if inputs[n] is not None]
    outputs = {n: strided(poison(inputs[n].shape, case["dtype"]), layout) for n in names}
    outputs["out"] = strided(poison(inputs["q"].shape, case["dtype"]), layout)
    lse = poison(inputs["q"].shape[:3], F32)
    tensors = [views[n] for n in ("q", "k", "v", "pooled_k", "pooled_v")]
    kernels.forward(*tensors, *where_of(case), outputs["out"][1], lse)
    gradients = [outputs[n][1] if n in outputs else None for n in ("q", "k", "v", "pooled_k", "pooled_v")]
    kernels.backward(
        views["grad_out"], views["grad_lse"], *tensors, outputs["out"][1], lse, *where_of(case), *gradients
    )
    assert torch.equal(lse, expected["lse"])
    for n, (buffer, view) in outputs.items():
        assert torch.equal(view, expected["out" if n == "out" else f"grad_{n}"]), n
        assert int(torch.isfinite(buffer).sum()) == view.numel(), f"{n}: written outside"


@needs_kernels
@pytest.mark.skipif(DEVICE != "cpu", reason="needs a sparse file as memory")
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_row_offsets_beyond_two_to_the_31(dtype, tmp_path):
    """Three rows, 2**30 elements + 8 apart, in a sparse file: offsets up to 2**31 + 16."""
    step, D = 2**30 + 8, 16
    storage = torch.UntypedStorage.from_file(
        str(tmp_path / "sparse"), shared=True, nbytes=(2 * step + D) * dtype.itemsize
    )
    far = torch.empty(0, dtype=dtype).set_(storage, 0, (1, 1, 3, D), (0, 0, step, 1))
    torch.manual_seed(0)
    near = torch.randn(1, 1, 3, D).to(dtype)
    far.copy_(near)
    case = {"height": 1, "width": 2, "radius": 5, "text": 1, "text_first": True, "q_row": 0, "q_text": 1, "scale": 0.25}
    names = ("q", "k", "v", "grad_out")
    expected = run(case, {**dict.fromkeys(names, near), "pooled_k": None, "pooled_v": None, "grad_lse": None})
    actual = run(case, {**dict.fromkeys(names, far), "pooled_k": None, "pooled_v": None, "grad_lse": None})
    for n, result in actual.items():
        assert torch.equal(result, expected[n]), n
    # As pooled keys, and a token's offset as the sum of a tile's and a token's: two rows of one column.
    case = {**case, "height": 3, "width": 1, "text": 0, "q_text": 0}
    for pooled in (near, far):
        out = run(case, {**dict.fromkeys(names, far), "pooled_k": pooled, "pooled_v": pooled, "grad_lse": None})
        near_out = run(case, {**dict.fromkeys(names, near), "pooled_k": near, "pooled_v": near, "grad_lse": None})
        assert all(torch.equal(out[n], near_out[n]) for n in out)


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4), (1, 1, 0)], ids=["no-batch", "no-heads", "no-queries"])
def test_empty_problems_write_what_there_is(shape):
    B, H, queries = shape
    case = {"height": 2, "width": 2, "radius": 2, "text": 0, "text_first": True, "q_row": 0, "q_text": 0, "scale": 1.0}
    tokens = {"q": queries, "k": 4, "v": 4, "pooled_k": 3, "pooled_v": 3, "grad_out": queries}
    inputs = {n: torch.ones(B, H, t, 16, dtype=BF16, device=DEVICE) for n, t in tokens.items()}
    results = run(case, {**inputs, "grad_lse": None})
    for n, result in results.items():
        assert torch.equal(result, torch.zeros_like(result)), n


@needs_kernels
@pytest.mark.parametrize("pooled", [False, True])
def test_a_query_that_sees_no_key_gives_zero_and_minus_infinity(pooled):
    case = {"height": 0, "width": 4, "radius": 2, "text": 0, "text_first": True, "q_row": 0, "q_text": 3, "scale": 1.0}
    tokens = {"q": 3, "k": 0, "v": 0, "grad_out": 3}
    inputs = {n: torch.ones(1, 1, t, 16, dtype=BF16, device=DEVICE) for n, t in tokens.items()}
    inputs["pooled_k"] = inputs["pooled_v"] = inputs["q"] if pooled else None
    results = run(case, {**inputs, "grad_lse": None})
    assert (results.pop("lse") == float("-inf")).all()
    assert all(torch.equal(t, torch.zeros_like(t)) for t in results.values())


# ---- determinism and limits ------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("name", ["batch-and-heads"])
def test_a_sample_alone_gives_the_bits_it_gives_in_a_batch(name):
    case, inputs, _ = problem(name)
    batch = run(case, inputs)
    alone = run(case, {n: t if t is None else t[1:] for n, t in inputs.items()})
    for n, result in batch.items():
        assert torch.equal(result[1:], alone[n]), n


def test_splits_are_a_matter_of_the_sample_and_keep_the_workspace_small():
    cpu = torch.device("cpu")
    for count in (0, 1, 500, 4096, 32769, 262656, 2**21):
        for rows in (1, 77, 512, 1024):
            for heads in (1, 24):
                for floats in (1, 2):
                    splits, chunk = kernels.split_dense(count, rows, heads, floats, 64, cpu)
                    assert chunk % 64 == 0 and splits * chunk >= count and (splits == 1 or (splits - 1) * chunk < count)
                    if count > 32768:  # float32 partials over 16-bit q, k, v and out
                        assert splits == 1 or splits * floats * rows * 4 <= 0.04 * 8 * count


@needs_kernels
def test_a_radius_whose_square_would_overflow_is_refused_unless_it_covers_the_grid():
    case, inputs, _ = problem("one-row")
    out, _ = run_forward({**case, "radius": 10**9}, inputs)
    assert torch.equal(out, run_forward({**case, "radius": 41}, inputs)[0])
    wide = torch.ones(1, 1, 1, 16, dtype=BF16, device=DEVICE).expand(1, 1, 100_000, 16)
    with pytest.raises(ValueError, match="radius up to 46000, got 50000"):
        kernels.forward(wide, wide, wide, None, None, 1, 100_000, 50_000, 0, True, 0, 0, 1.0, wide, wide[..., 0])


# ---- pooling ---------------------------------------------------------------------------------------------------------


def plain_pool(x, weight, height, width):
    factor = weight.shape[0]
    rows, columns = (torch.arange(-(-n // factor) * factor).clamp(max=n - 1) for n in (height, width))
    patches = x.unflatten(2, (height, width))[:, :, rows.to(x.device)][:, :, :, columns.to(x.device)]
    patches = patches.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
    return torch.einsum("bhyixjd,ij->bhyxd", patches, weight).flatten(2, 3)


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "factor"),
    [((1, 2, 8, 12), 4), ((2, 1, 7, 9), 4), ((1, 1, 5, 3), 2), ((1, 1, 3, 3), 1), ((1, 1, 2, 3), 5)],
    ids=["whole", "ragged", "ragged-2", "factor-1", "larger-than-the-grid"],
)
@pytest.mark.parametrize(("dtype", "D"), [(BF16, 40), (F16, 64), (F32, 16)], ids=str)
def test_pooling_and_its_gradients_are_as_accurate_as_the_plain_formula(shape, factor, dtype, D, monkeypatch):
    monkeypatch.setattr(kernels, "POOL_CHUNK", 4)  # several partial sums of the weight's gradient
    torch.manual_seed(0)
    B, H, height, width = shape
    x = torch.randn(B, H, height * width, D).to(dtype).to(DEVICE)
    weight = torch.randn(factor, factor).to(DEVICE)
    patches = math.ceil(height / factor) * math.ceil(width / factor)
    g = torch.randn(B, H, patches, D).to(dtype).to(DEVICE)
    truth = {}
    for kind in (F64, dtype):
        leaves = x.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        out = plain_pool(*leaves, height, width)
        out.backward(g.to(kind))
        truth[kind] = {"out": out.detach(), "grad_x": leaves[0].grad, "grad_weight": leaves[1].grad}
    results = {
        "out": poison(g.shape, dtype),
        "grad_x": poison(x.shape, dtype),
        "grad_weight": poison(weight.shape, F32),
    }
    kernels.pool(x, weight, height, width, results["out"])
    kernels.pool_backward(g, x, weight, height, width, results["grad_x"], results["grad_weight"])
    for n, result in results.items():
        assert_close(n, result, truth[F64][n], truth[dtype][n])


@needs_kernels
def test_pooling_nothing_gives_nothing():
    x, weight = torch.ones(1, 1, 0, 16, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    grad_weight = poison((2, 2), F32)
    kernels.pool(x, weight, 0, 5, x)
    kernels.pool_backward(x, x, weight, 0, 5, x.clone(), grad_weight)
    assert torch.equal(grad_weight, torch.zeros_like(grad_weight))


# ---- the compiler ----------------------------------------------------------------------------------------------------

ATTENTION = ("image_forward", "text_forward", "image_grad_query", "text_grad_query", "image_grad_key", "dense_grad_key")
MOVING = ("text_merge", "sum_partials", "pool", "pool_grad_x", "pool_grad_weight", "pool_sum")
DTYPES = {"bf16": BF16, "fp16": F16, "fp32": F32}


def compiled_cases():
    """Kernel, head dim, dtype, architecture, constants other than the usual."""
    if FULL:
        widths = {"bf16": (8, 40, 64, 80, 128, 160, 256), "fp16": (64, 128), "fp32": (40, 128, 256)}
        for arch in (80, 90, 100):
            for dtype, head_dims in widths.items():
                for D in head_dims:
                    for kernel in ATTENTION:
                        yield kernel, D, dtype, arch, {"HAS_POOLED": True, "HAS_GRAD_LSE": True}
            for kernel in MOVING:
                yield kernel, 80, "bf16", arch, {}
        return
    for kernel in ("image_forward", "text_forward", "image_grad_query", "image_grad_key"):
        yield kernel, 128, "bf16", 90, {}
    yield "image_forward", 64, "bf16", 80, {"HAS_POOLED": True}
    yield "dense_grad_key", 64, "bf16", 80, {}
    yield "text_grad_query", 40, "fp32", 80, {"HAS_GRAD_LSE": True}
    for kernel in MOVING:
        yield kernel, 64, "bf16", 90, {}


COMPILED = list(compiled_cases())


def case_id(case):
    kernel, D, dtype, arch, constants = case
    return "-".join([kernel, str(D), dtype, f"sm{arch}", *map(str.lower, constants)])


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports by case id; two processes share the work, each with a cache of its own."""
    jobs = []
    for part in range(2):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        entries = [(kernel, D, D, *rest) for kernel, D, *rest in COMPILED[part::2]]
        command = [sys.executable, __file__, json.dumps(entries)]
        jobs.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    results = {}
    for job in jobs:
        output, errors = job.communicate()
        assert job.returncode == 0, errors[-4000:]
        for line in output.splitlines():
            (kernel, D, _, *rest), result = json.loads(line)
            results[case_id((kernel, D, *rest))] = result
    return results


@pytest.mark.parametrize("case", COMPILED, ids=case_id)
def test_the_compiler_agrees(case, reports):
    kernel, _, dtype, arch, _ = case
    result = reports[case_id(case)]
    assert "error" not in result, result["error"]
    assert result["shared"] <= (99 * 1024 if arch == 80 else SHARED_LIMIT[arch])  # sm_86, sm_89 and sm_120 have 99 KB
    assert result["stack"] == 0 and result["local"] == 0 and result["spills"] == 0, result
    if kernel == "pool_sum":
        return
    if kernel in ATTENTION and dtype != "fp32":  # float32 multiplies exactly, on the FMA units
        assert result["tensor_core"] == "wgmma" if arch == 90 else result["tensor_core"], "no tensor core instruction"
    accesses = result["global"]
    assert sum(n for op, n in accesses.items() if ".128" in op) > 0
    assert not any(".U16" in op or ".U8" in op for op in accesses), accesses
    # What is left are single numbers of 4 bytes: lse, delta, weights. (Tiles smaller than 16 bytes a thread, too.)
    if kernel in ("image_forward", "text_forward") and dtype != "fp32":
        assert sum(n for op, n in accesses.items() if ".128" not in op) <= 2, accesses


def compile_all():
    """Runs in a process without TRITON_INTERPRET: one JSON line per entry of the first argument on stdout."""
    from helpers import triton_aot

    def configuration(kernel, D, _, dtype, arch):
        function = getattr(kernels, f"{kernel}_kernel")
        if kernel in ATTENTION:
            choice = dict(kernels.blocks(kernel, D, DTYPES[dtype], {80: "mma", 90: "wgmma"}.get(arch, "")))
        else:
            choice = kernels.row_blocks(D)
            choice["BLOCK_Q"] = choice["BLOCK"]
            if kernel == "pool_sum":
                choice["BLOCK"] = 1024
        choice |= {"HAS_POOLED": False, "HAS_GRAD_LSE": False, "UNIT": 4 if dtype == "fp32" else 8}
        return function, choice, choice.pop("num_warps"), choice.pop("num_stages", 3)

    triton_aot.FLOAT32_POINTERS |= {"LSE", "GLSE", "STATS", "PART", "PART_LSE", "PART_K", "PART_V", "W"}
    for entry in json.loads(sys.argv[1]):
        arch = entry[4]
        triton_aot.FLOAT32_POINTERS.discard("OUT")
        if entry[0] == "pool_sum":
            triton_aot.FLOAT32_POINTERS.add("OUT")
        triton_aot.configuration = lambda *shape, arch=arch: configuration(*shape, arch)
        try:
            result = triton_aot.report(*entry)
        except Exception as error:  # what the compiler raises is its own affair; the test shows it
            result = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        print(json.dumps([entry, result]), flush=True)


if __name__ == "__main__":
    compile_all()
