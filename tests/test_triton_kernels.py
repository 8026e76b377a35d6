"""Triton kernels of linear attention against float64, op by op.

On a machine without a CUDA device they run in Triton's interpreter, which must be chosen before the kernels are
imported: in a process without TRITON_INTERPRET=1 this module starts one that has it (test_under_the_interpreter).
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from helpers.triton_interpreter import install, interpreting

install()
import torch  # noqa: E402

ROOT = Path(__file__).parents[1]
DEVICE = "cpu" if interpreting() else "cuda"
RUNS_HERE = interpreting() or torch.cuda.is_available()

try:
    from linattn.triton_kernels import common
    from linattn.triton_kernels import linear_attention as kernels
except ModuleNotFoundError:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))
    from triton_kernels import common
    from triton_kernels import linear_attention as kernels

needs_kernels = pytest.mark.skipif(not RUNS_HERE, reason="runs inside test_under_the_interpreter")

IDENTITY, RELU, ELU1 = 0, 1, 2
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EPS = 1e-4


@pytest.mark.skipif(interpreting(), reason="this is the interpreter")
def test_under_the_interpreter():
    """All tests below, in a process of their own with TRITON_INTERPRET=1."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-8000:] + run.stderr[-2000:]


# ---- the definition --------------------------------------------------------------------------------------------------


def phi(t, feature):
    if feature == ELU1:
        return torch.where(t > 0, t + 1, t.clamp(max=0).exp())
    return t.relu() if feature == RELU else t


def state_of(k, v, k_denom, feature):
    return phi(k, feature).mT @ v, phi(k if k_denom is None else k_denom, feature).sum(-2)


def output_of(q, q_denom, kv, k_sum, feature, normalize, scale, inv_count, eps):
    out = phi(q, feature) @ (scale * kv)
    if not normalize:
        return out
    z = (phi(q if q_denom is None else q_denom, feature) * (inv_count * k_sum)[..., None, :]).sum(-1, keepdim=True)
    return out / (z + eps)


def assert_close(name, result, exact, plain):
    """The error against float64 is at most twice that of the plain formula in the same type, plus two roundings."""
    exact = exact.double()
    assert result.shape == exact.shape
    assert torch.isfinite(result).all(), (
        f"{name}: {int((~torch.isfinite(result)).sum())} elements not written or not finite"
    )
    stored = exact.to(plain.dtype)
    rounding = 2 * ((stored + 0.3 - 0.3) - stored).abs().max().double()
    error = (result.double() - exact).abs().max()
    bound = 2 * (plain.double() - exact).abs().max() + rounding
    assert error <= bound, f"{name}: error {error:.3e} against float64, plain {plain.dtype} allows {bound:.3e}"


# B, H, N, M, D, E, dtype, feature map, normalize, denominators of their own
CASES = {
    "sd-40-bf16": (1, 2, 70, 130, 40, 40, BF16, ELU1, True, False),
    "sd-40-fp16": (1, 1, 64, 100, 40, 40, F16, ELU1, True, False),
    "sd-40-fp32": (1, 2, 33, 70, 40, 40, F32, ELU1, True, False),
    "sd-80-bf16": (1, 1, 65, 129, 80, 80, BF16, ELU1, True, False),
    "sd-80-fp32": (1, 1, 31, 40, 80, 80, F32, ELU1, True, False),
    "sd-160-bf16": (1, 1, 40, 64, 160, 160, BF16, ELU1, True, False),
    "sdxl-64-bf16": (2, 1, 128, 64, 64, 64, BF16, ELU1, True, False),
    "sdxl-64-fp16": (1, 1, 63, 65, 64, 64, F16, ELU1, True, False),
    "128-fp16": (1, 1, 40, 70, 128, 128, F16, RELU, True, False),
    "8-bf16": (2, 2, 17, 33, 8, 8, BF16, ELU1, True, False),
    "24x48-denominators-bf16": (1, 2, 65, 64, 24, 48, BF16, IDENTITY, True, True),
    "72x136-denominators-fp16": (1, 1, 50, 50, 72, 136, F16, ELU1, True, True),
    "20x12-denominators-fp32": (1, 1, 20, 18, 20, 12, F32, ELU1, True, True),
    "256-bf16": (1, 1, 20, 35, 256, 256, BF16, ELU1, True, False),
    "200x176-denominators-fp16": (1, 1, 17, 20, 200, 176, F16, ELU1, True, True),
    "176-fp32": (1, 1, 9, 20, 176, 16, F32, RELU, True, False),
    "unnormalized-bf16": (1, 1, 70, 65, 48, 16, BF16, ELU1, False, False),
    "unnormalized-denominators-fp16": (1, 1, 33, 20, 16, 16, F16, IDENTITY, False, True),
    "unnormalized-fp32": (1, 1, 33, 20, 16, 32, F32, RELU, False, False),
    "one-key-one-query-bf16": (2, 1, 1, 1, 16, 16, BF16, ELU1, True, False),
    "one-key-fp32": (1, 1, 5, 1, 16, 16, F32, ELU1, True, False),
    "four-splits-bf16": (1, 1, 1030, 1030, 16, 16, BF16, ELU1, True, False),
    "two-splits-fp32": (1, 1, 530, 530, 16, 16, F32, ELU1, True, False),
}


def poison(shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@functools.lru_cache(None)
def problem(case):
    """Inputs, and outputs and gradients of the definition in float64 and in the case's own type."""
    B, H, N, M, D, E, dtype, feature, normalize, denominators = CASES[case]
    torch.manual_seed(0)
    # Identity features need a mean away from 0, or the denominators cross it.
    shift = 1.0 if feature == IDENTITY and normalize else 0.0
    shapes = {"q": (N, D), "k": (M, D), "v": (M, E), "q_denom": (N, D), "k_denom": (M, D), "grad_out": (N, E)}
    inputs = {}
    for name, (tokens, width) in shapes.items():
        tensor = torch.randn(B, H, tokens, width) + (shift if name not in ("v", "grad_out") else 0.0)
        if shift and name.endswith("denom"):
            tensor = tensor.abs()
        inputs[name] = tensor.to(dtype).to(DEVICE)
    if not denominators:
        inputs["q_denom"] = inputs["k_denom"] = None

    def evaluate(kind):
        leaf = {n: None if t is None else t.to(kind).requires_grad_() for n, t in inputs.items() if n != "grad_out"}
        kv, k_sum = state_of(leaf["k"], leaf["v"], leaf["k_denom"], feature)
        kv.retain_grad()
        k_sum.retain_grad()
        out = output_of(leaf["q"], leaf["q_denom"], kv, k_sum, feature, normalize, 1 / M, 1 / M, EPS)
        out.backward(inputs["grad_out"].to(kind))
        results = {"out": out.detach(), "kv": kv.detach(), "k_sum": k_sum.detach(), "grad_kv": kv.grad}
        results["grad_k_sum"] = torch.zeros_like(k_sum) if k_sum.grad is None else k_sum.grad
        for name, tensor in leaf.items():
            if tensor is not None:
                results[f"grad_{name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        return results

    return inputs, evaluate(torch.float64), evaluate(dtype)


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch):
    """Whatever a launcher allocates holds NaN until a kernel writes it."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def run_state(inputs, feature):
    k, v = inputs["k"], inputs["v"]
    kv = poison((*k.shape[:2], k.shape[-1], v.shape[-1]), torch.float32)
    k_sum = poison((*k.shape[:2], k.shape[-1]), torch.float32)
    kernels.state(k, v, inputs["k_denom"], feature, kv, k_sum)
    return kv, k_sum


def run_forward(inputs, feature, normalize, with_state):
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    out = poison((*q.shape[:3], v.shape[-1]), q.dtype)
    kv = poison((*k.shape[:2], k.shape[-1], v.shape[-1]), torch.float32) if with_state else None
    k_sum = poison((*k.shape[:2], k.shape[-1]), torch.float32) if with_state else None
    count = k.shape[-2]
    kernels.forward(q, k, v, inputs["q_denom"], inputs["k_denom"], feature, normalize, 1 / count, EPS, out, kv, k_sum)
    return out, kv, k_sum


def run_apply(inputs, kv, k_sum, feature, normalize):
    out = poison((*inputs["q"].shape[:3], kv.shape[-1]), inputs["q"].dtype)
    inv = 1 / inputs["k"].shape[-2]
    kernels.apply(inputs["q"], inputs["q_denom"], kv, k_sum, feature, normalize, inv, inv, EPS, out)
    return out


def run_backward(inputs, kv, k_sum, feature, normalize):
    """Gradients by name, grad_kv and grad_k_sum of the first half feeding the second."""
    grads = {
        f"grad_{name}": None if inputs[name] is None else poison(inputs[name].shape, inputs[name].dtype)
        for name in ("q", "k", "v", "q_denom", "k_denom")
    }
    grads["grad_kv"], grads["grad_k_sum"] = poison(kv.shape, torch.float32), poison(k_sum.shape, torch.float32)
    inv = 1 / inputs["k"].shape[-2]
    kernels.apply_backward(
        inputs["grad_out"], inputs["q"], inputs["q_denom"], kv, k_sum, feature, normalize, inv, inv, EPS,
        grads["grad_q"], grads["grad_q_denom"], grads["grad_kv"], grads["grad_k_sum"],
    )  # fmt: skip
    kernels.state_backward(
        grads["grad_kv"], grads["grad_k_sum"], inputs["k"], inputs["v"], inputs["k_denom"], feature,
        grads["grad_k"], grads["grad_v"], grads["grad_k_denom"],
    )  # fmt: skip
    return {name: grad for name, grad in grads.items() if grad is not None}


# ---- accuracy --------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_state_and_apply_are_as_accurate_as_the_plain_formula(case):
    inputs, exact, plain = problem(case)
    feature, normalize = CASES[case][7:9]
    kv, k_sum = run_state(inputs, feature)
    assert_close("kv", kv, exact["kv"], plain["kv"])
    assert_close("k_sum", k_sum, exact["k_sum"], plain["k_sum"])
    assert_close("out", run_apply(inputs, kv, k_sum, feature, normalize), exact["out"], plain["out"])


@needs_kernels
@pytest.mark.parametrize("with_state", [False, True], ids=["out-only", "with-state"])
@pytest.mark.parametrize("case", CASES)
def test_forward_is_as_accurate_as_the_plain_formula(case, with_state):
    inputs, exact, plain = problem(case)
    out, kv, k_sum = run_forward(inputs, *CASES[case][7:9], with_state)
    assert_close("out", out, exact["out"], plain["out"])
    if with_state:
        assert_close("kv", kv, exact["kv"], plain["kv"])
        assert_close("k_sum", k_sum, exact["k_sum"], plain["k_sum"])


@needs_kernels
def test_forward_in_separate_launches_is_as_accurate(monkeypatch):
    monkeypatch.setattr(kernels, "SHORT_BYTES", 0)
    inputs, exact, plain = problem("sd-40-bf16")
    out, _, _ = run_forward(inputs, ELU1, True, False)
    assert_close("out", out, exact["out"], plain["out"])


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_backward_is_as_accurate_as_the_plain_formula(case):
    inputs, exact, plain = problem(case)
    grads = run_backward(inputs, exact["kv"].float(), exact["k_sum"].float(), *CASES[case][7:9])
    for name, grad in grads.items():
        assert_close(name, grad, exact[name], plain[name])


@needs_kernels
@pytest.mark.parametrize("unit", ["mma", ""], ids=["mma", "unknown"])
@pytest.mark.parametrize("case", ["sd-40-fp16", "sd-80-bf16", "24x48-denominators-bf16"])
def test_kernels_for_gpus_without_wgmma_are_as_accurate(case, unit, monkeypatch):
    monkeypatch.setattr(kernels, "tensor_core", lambda device: unit)
    inputs, exact, plain = problem(case)
    feature, normalize = CASES[case][7:9]
    kv, k_sum = run_state(inputs, feature)
    assert_close("kv", kv, exact["kv"], plain["kv"])
    assert_close("k_sum", k_sum, exact["k_sum"], plain["k_sum"])
    assert_close("out", run_apply(inputs, kv, k_sum, feature, normalize), exact["out"], plain["out"])
    for name, grad in run_backward(inputs, exact["kv"].float(), exact["k_sum"].float(), feature, normalize).items():
        assert_close(name, grad, exact[name], plain[name])


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_state_is_the_float32_sum_of_the_rounded_features(dtype):
    """relu of a 16-bit number is that number, so nothing is rounded: only float32 sums separate us from float64."""
    torch.manual_seed(0)
    k, v = (torch.randn(1, 2, 300, 40).to(dtype).to(DEVICE) for _ in range(2))
    kv, k_sum = run_state({"k": k, "v": v, "k_denom": None}, RELU)
    exact = state_of(k.double(), v.double(), None, RELU)
    plain = state_of(k.float(), v.float(), None, RELU)
    assert_close("kv", kv, exact[0], plain[0])
    assert_close("k_sum", k_sum, exact[1], plain[1])


@needs_kernels
def test_float16_sums_beyond_its_range_do_not_overflow():
    torch.manual_seed(0)
    inputs = {n: (torch.rand(1, 1, 300, 16) * 60).to(F16).to(DEVICE) for n in ("q", "k", "v")}
    inputs["q_denom"] = inputs["k_denom"] = None
    exact = output_of(inputs["q"].double(), None, *state_of(inputs["k"].double(), inputs["v"].double(), None, ELU1),
                      ELU1, True, 1 / 300, 1 / 300, EPS)  # fmt: skip
    kv, k_sum = run_state(inputs, ELU1)
    assert kv.max() > 65504
    for out in (run_apply(inputs, kv, k_sum, ELU1, True), run_forward(inputs, ELU1, True, False)[0]):
        assert_close("out", out, exact, exact.to(F16))


@needs_kernels
def test_float16_gradients_of_a_tiny_state_gradient_do_not_vanish():
    """grad_kv is a mean over the keys: 1e-7 is usual, and nothing in float16. grad_v = phi(k) grad_kv is not lost."""
    torch.manual_seed(0)
    k, v = ((torch.rand(1, 1, 40, 16) * 1000).to(F16).to(DEVICE) for _ in range(2))
    grad_kv = torch.randn(1, 1, 16, 16, device=DEVICE) * 1e-7
    grad_k_sum = torch.zeros(1, 1, 16, device=DEVICE)
    grad_k, grad_v = poison(k.shape, F16), poison(v.shape, F16)
    kernels.state_backward(grad_kv, grad_k_sum, k, v, None, RELU, grad_k, grad_v, None)
    exact = k.double() @ grad_kv.double()
    assert_close("grad_v", grad_v, exact, exact.to(F16))
    assert (grad_v != 0).float().mean() > 0.9


# ---- memory ----------------------------------------------------------------------------------------------------------


def strided(tensor, layout):
    """The same values behind other strides."""
    B, H, N, D = tensor.shape
    if layout == "fused":  # (B, N, 3, H, D): one of q, k, v of a projection
        buffer = torch.full((B, N, 3, H, D), float("nan"), dtype=tensor.dtype, device=DEVICE)
        view = buffer[:, :, 1].transpose(1, 2)
    elif layout == "odd":  # nothing aligned beyond the element
        buffer = torch.full((B, N, H, D + 3), float("nan"), dtype=tensor.dtype, device=DEVICE)
        view = buffer[..., 1 : D + 1].transpose(1, 2)
    elif layout == "half":  # strides of multiples of four elements
        buffer = torch.full((B, H, N, D + 4), float("nan"), dtype=tensor.dtype, device=DEVICE)
        view = buffer[..., :D]
    view.copy_(tensor)
    return buffer, view


@needs_kernels
@pytest.mark.parametrize("layout", ["fused", "odd", "half"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_strides_do_not_change_a_bit(layout, dtype):
    torch.manual_seed(0)
    tokens = 70 if dtype == BF16 else 35  # a full block and a part
    plain = {n: torch.randn(1, 2, tokens, 40).to(dtype).to(DEVICE) for n in ("q", "k", "v", "grad_out")}
    plain["q_denom"] = plain["k_denom"] = None
    views = {n: t if t is None else strided(t, layout)[1] for n, t in plain.items()}
    kv, k_sum = run_state(plain, ELU1)
    out = run_apply(plain, kv, k_sum, ELU1, True)
    assert torch.equal(run_state(views, ELU1)[0], kv)
    assert torch.equal(run_apply(views, kv, k_sum, ELU1, True), out)
    assert torch.equal(run_forward(views, ELU1, True, False)[0], run_forward(plain, ELU1, True, False)[0])
    expected = run_backward(plain, kv, k_sum, ELU1, True)
    for name, grad in run_backward(views, kv, k_sum, ELU1, True).items():
        assert torch.equal(grad, expected[name]), name


@needs_kernels
@pytest.mark.parametrize("layout", ["fused", "odd", "half"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_nothing_is_written_outside_the_outputs(layout, dtype):
    torch.manual_seed(0)
    tokens = 70 if dtype == BF16 else 35
    inputs = {n: torch.randn(1, 2, tokens, 40).to(dtype).to(DEVICE) for n in ("q", "k", "v", "grad_out")}
    kv, k_sum = run_state({**inputs, "k_denom": None}, ELU1)
    inv = 1 / tokens
    nan = poison((1, 2, tokens, 40), dtype)
    outputs = {name: strided(nan, layout) for name in ("out", "short", "grad_q", "grad_k", "grad_v")}
    view = {name: pair[1] for name, pair in outputs.items()}
    grad_kv, grad_k_sum = torch.empty_like(kv), torch.empty_like(k_sum)
    kernels.apply(inputs["q"], None, kv, k_sum, ELU1, True, inv, inv, EPS, view["out"])
    kernels.forward(inputs["q"], inputs["k"], inputs["v"], None, None, ELU1, True, inv, EPS, view["short"], None, None)
    kernels.apply_backward(
        inputs["grad_out"], inputs["q"], None, kv, k_sum, ELU1, True, inv, inv, EPS, view["grad_q"], None, grad_kv,
        grad_k_sum,
    )  # fmt: skip
    kernels.state_backward(
        grad_kv, grad_k_sum, inputs["k"], inputs["v"], None, ELU1, view["grad_k"], view["grad_v"], None
    )
    for name, (buffer, written) in outputs.items():
        assert torch.isfinite(written).all(), name
        assert int(torch.isfinite(buffer).sum()) == written.numel(), name


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_an_expanded_gradient_is_read_as_it_is(dtype):
    """The gradient of out.sum() has strides 0; a kernel that assumes the strides of `out` reads elsewhere."""
    torch.manual_seed(0)
    inputs = {n: torch.randn(1, 1, 40, 24).to(dtype).to(DEVICE) for n in ("q", "k", "v")}
    inputs["q_denom"] = inputs["k_denom"] = None
    kv, k_sum = run_state(inputs, ELU1)
    row = torch.ones(1, 1, 1, 24, dtype=dtype, device=DEVICE)
    dense = run_backward({**inputs, "grad_out": row.expand(1, 1, 40, 24).contiguous()}, kv, k_sum, ELU1, True)
    for name, grad in run_backward({**inputs, "grad_out": row.expand(1, 1, 40, 24)}, kv, k_sum, ELU1, True).items():
        assert torch.equal(grad, dense[name]), name


@needs_kernels
@pytest.mark.skipif(DEVICE != "cpu", reason="needs a sparse file as memory")
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_row_offsets_beyond_two_to_the_31(dtype, tmp_path):
    """Three rows, 2**30 elements + 8 apart, in a sparse file: offsets up to 2**31 + 16."""
    step, rows, D = 2**30 + 8, 3, 16
    size = (rows - 1) * step + D
    storage = torch.UntypedStorage.from_file(str(tmp_path / "sparse"), shared=True, nbytes=size * dtype.itemsize)
    far = torch.empty(0, dtype=dtype).set_(storage, 0, (1, 1, rows, D), (0, 0, step, 1))
    torch.manual_seed(0)
    near = torch.randn(1, 1, rows, D).to(dtype)
    far.copy_(near)
    inputs = {"q": near, "k": near, "v": near, "q_denom": None, "k_denom": None, "grad_out": near}
    distant = {n: None if t is None else far for n, t in inputs.items()}
    kv, k_sum = run_state(inputs, ELU1)
    assert torch.equal(run_state(distant, ELU1)[0], kv)
    assert torch.equal(run_forward(distant, ELU1, True, False)[0], run_forward(inputs, ELU1, True, False)[0])
    assert torch.equal(run_apply(distant, kv, k_sum, ELU1, True), run_apply(inputs, kv, k_sum, ELU1, True))
    expected = run_backward(inputs, kv, k_sum, ELU1, True)
    for name, grad in run_backward(distant, kv, k_sum, ELU1, True).items():
        assert torch.equal(grad, expected[name]), name


@needs_kernels
@pytest.mark.parametrize(
    "shape", [(0, 2, 4, 4), (2, 0, 4, 4), (1, 1, 0, 4)], ids=["no-batch", "no-heads", "no-queries"]
)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_empty_problems_write_what_there_is(shape, dtype):
    B, H, N, M = shape
    inputs = {n: torch.ones(B, H, t, 16, dtype=dtype, device=DEVICE) for n, t in
              (("q", N), ("k", M), ("v", M), ("grad_out", N))}  # fmt: skip
    inputs["q_denom"] = inputs["k_denom"] = None
    out, kv, k_sum = run_forward(inputs, ELU1, True, True)
    assert out.shape == (B, H, N, 16) and torch.equal(kv, torch.full_like(kv, 2.0 * M))
    grads = run_backward(inputs, kv, k_sum, ELU1, True)
    if N == 0:
        for grad in grads.values():
            assert torch.equal(grad, torch.zeros_like(grad))


# ---- determinism and NaN ---------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("dtype,D", [(BF16, 40), (F16, 80), (F32, 16), (BF16, 176)], ids=str)
def test_a_sample_alone_gives_the_bits_it_gives_in_a_batch(dtype, D):
    torch.manual_seed(0)
    tokens = {40: 530, 80: 300, 16: 90, 176: 40}[D]  # 530: two splits
    batch = {n: torch.randn(2, 1, tokens, D).to(dtype).to(DEVICE) for n in ("q", "k", "v", "grad_out")}
    batch["q_denom"] = batch["k_denom"] = None
    single = {n: t if t is None else t[1:2] for n, t in batch.items()}

    def everything(inputs):
        kv, k_sum = run_state(inputs, ELU1)
        forward = run_forward(inputs, ELU1, True, False)[0]
        return [kv, k_sum, forward, run_apply(inputs, kv, k_sum, ELU1, True),
                *run_backward(inputs, kv, k_sum, ELU1, True).values()]  # fmt: skip

    for in_batch, alone in zip(everything(batch), everything(single), strict=True):
        assert torch.equal(in_batch[1:2], alone)


def test_splits_do_not_depend_on_the_batch_and_keep_the_workspace_small():
    for tokens in (1, 64, 255, 256, 4096, 65536, 524288, 2097152):
        for heads in (1, 2, 8, 20):
            for width in (40, 64, 80, 128, 160):
                splits, chunk = common.split_tokens(tokens, heads, width, 1, 132)
                assert (splits - 1) * chunk < tokens <= splits * chunk
                assert chunk <= 16384 and (splits == 1 or chunk % 128 == 0)
                if tokens >= 32768:
                    # floats of workspace over 16-bit elements of q, k, v, out
                    assert splits * width * (width + 1) * 4 < 0.05 * 8 * width * tokens
    assert 2 * common.split_tokens(131072, 2, 64, 1, 132)[0] >= 132, "two heads must fill the device"
    for tokens in (2**21, 2**27):  # both are grid axes that end at 65,535
        assert common.split_tokens(tokens, 1, 8, 1, 132)[0] < 65536
        assert common.run_tokens(tokens, 1, 64, 132)[0] < 65536


@needs_kernels
@pytest.mark.parametrize("dtype,D", [(BF16, 40), (F32, 16), (F16, 176)], ids=str)
@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
def test_nan_in_q_stays_in_its_row_and_nan_in_k_or_v_reaches_every_row(dtype, D, short, monkeypatch):
    if not short:
        monkeypatch.setattr(kernels, "SHORT_BYTES", 0)
    torch.manual_seed(0)
    tokens = 70 if D == 40 else 20
    clean = {n: torch.randn(1, 2, tokens, D).to(dtype).to(DEVICE) for n in ("q", "k", "v")}
    clean["q_denom"] = clean["k_denom"] = None
    expected = run_forward(clean, ELU1, True, False)[0]
    for name in ("q", "k", "v"):
        for feature in (ELU1, RELU):
            dirty = {**clean, name: clean[name].clone()}
            dirty[name][0, 1, tokens - 4, 3] = float("nan")
            out = run_forward(dirty, feature, True, False)[0]
            bad = torch.isnan(out).any(-1)
            assert not bad[0, 0].any()
            if name == "q":
                assert bad[0, 1].nonzero().tolist() == [[tokens - 4]]
                if feature == ELU1:
                    keep = [i for i in range(tokens) if i != tokens - 4]
                    assert torch.equal(out[0, 1, keep], expected[0, 1, keep])
            else:
                assert bad[0, 1].all()


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_no_nan_from_padding_when_eps_is_zero(dtype):
    """relu of a padded row is 0, so its z is 0: 0 / 0 must not leak into the sums over the tokens."""
    torch.manual_seed(0)
    inputs = {n: torch.rand(1, 1, 5, 16).to(dtype).to(DEVICE) + 0.1 for n in ("q", "k", "v", "grad_out")}
    kv, k_sum = run_state({**inputs, "k_denom": None}, RELU)
    grad_q, grad_kv, grad_k_sum = poison((1, 1, 5, 16), dtype), torch.empty_like(kv), torch.empty_like(k_sum)
    kernels.apply_backward(
        inputs["grad_out"], inputs["q"], None, kv, k_sum, RELU, True, 0.2, 0.2, 0.0, grad_q, None, grad_kv, grad_k_sum
    )
    for grad in (grad_q, grad_kv, grad_k_sum):
        assert torch.isfinite(grad).all()
