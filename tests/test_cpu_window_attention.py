"""The CPU kernels of window attention below the public ops: every instruction set, tile edges, threads, workspace.

What the ops mean is tested for all backends alike in test_window_attention.py; memory safety and poisoned workspace by
the native driver in test_cpu_sanitizers.py.
"""

import math
import subprocess
import sys

import pytest
import torch
from helpers.native import ISAS
from test_cpu_kernels import DTYPES, library, needs_library, threads, use  # noqa: F401  (fixtures)

import linattn  # noqa: F401  (defines the private ops)

pytestmark = needs_library

every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


class Case:
    """A call: grid, text, pooled keys, the strip of queries; heads adjacent in memory, as models have them."""

    def __init__(
        self, height, width, radius, text=0, pooled=None, strip=None, text_first=True, dim=40, batch=1, heads=2
    ):
        self.height, self.width, self.radius, self.text, self.pooled = height, width, radius, text, pooled
        self.q_row, self.q_rows, self.q_text = strip or (0, height, text)
        self.text_first, self.dim, self.batch, self.heads = text_first, dim, batch, heads
        self.queries, self.keys = self.q_text + self.q_rows * width, text + height * width

    def __str__(self):
        return f"{self.height}x{self.width} r{self.radius} text {self.text} pooled {self.pooled} dim {self.dim}"

    def tensors(self, dtype, seed=0):
        """q, k, v, pooled_k, pooled_v, grad_out, grad_lse."""
        generator = torch.Generator().manual_seed(seed)

        def make(tokens):
            x = torch.randn(self.batch, tokens, self.heads, self.dim, generator=generator)
            return x.to(dtype).transpose(1, 2)

        pooled = (None, None) if self.pooled is None else (make(self.pooled), make(self.pooled))
        grad_lse = torch.randn(self.batch, self.heads, self.queries, generator=generator)
        return make(self.queries), make(self.keys), make(self.keys), *pooled, make(self.queries), grad_lse

    @property
    def geometry(self):
        numbers = self.height, self.width, self.radius, self.text, self.text_first, self.q_row, self.q_text
        return *numbers, self.dim**-0.5

    def mask(self):
        """(queries, keys and pooled keys), from coordinates."""
        token = torch.arange(self.height * self.width)
        y, x = token // self.width, token % self.width
        mine = slice(self.q_row * self.width, (self.q_row + self.q_rows) * self.width)
        image = (y[mine, None] - y) ** 2 + (x[mine, None] - x) ** 2 < self.radius**2
        sees_text = torch.ones(image.shape[0], self.text, dtype=torch.bool)
        parts = (sees_text, image) if self.text_first else (image, sees_text)
        image = torch.cat([*parts, torch.ones(image.shape[0], self.pooled or 0, dtype=torch.bool)], 1)
        text = torch.ones(self.q_text, self.keys + (self.pooled or 0), dtype=torch.bool)
        text[:, self.keys :] = False
        return torch.cat([text, image] if self.text_first else [image, text])


def run(case, q, k, v, pooled_k, pooled_v, grad_out, grad_lse):
    """Everything that the two kernels write, as a dict; every output starts as NaN."""

    def like(x):
        return None if x is None else torch.full_like(x, float("nan"))

    out, lse = like(q), torch.full(q.shape[:3], float("nan"))
    torch.ops.linattn._window_attention_cpu(q, k, v, pooled_k, pooled_v, *case.geometry, out, lse)
    grads = {"q": like(q), "k": like(k), "v": like(v), "pooled_k": like(pooled_k), "pooled_v": like(pooled_v)}
    torch.ops.linattn._window_attention_backward_cpu(
        grad_out, grad_lse, q, k, v, pooled_k, pooled_v, out, lse, *case.geometry, *grads.values()
    )
    return {"out": out, "lse": lse} | {f"grad_{name}": x for name, x in grads.items() if x is not None}


def plain(case, tensors, dtype):
    """The formulas in `dtype`, gradients written out, every step rounded."""
    q, k, v, pooled_k, pooled_v, grad_out, grad_lse = (None if x is None else x.to(dtype) for x in tensors)
    if pooled_k is not None:
        k, v = torch.cat([k, pooled_k], 2), torch.cat([v, pooled_v], 2)
    scale = case.dim**-0.5
    scores = (q @ k.mT * scale).masked_fill(~case.mask(), float("-inf"))
    p, lse = scores.softmax(-1), scores.logsumexp(-1)
    out = p @ v
    ds = p * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True) + grad_lse[..., None])
    results = {"out": out, "lse": lse, "grad_q": ds @ k * scale}
    for name, x in (("k", ds.mT @ q * scale), ("v", p.mT @ grad_out)):
        results[f"grad_{name}"] = x[:, :, : case.keys]
        if pooled_k is not None:
            results[f"grad_pooled_{name}"] = x[:, :, case.keys :]
    return results


# Tiles are 4 x 8 (radius up to 20) or 8 x 8 tokens, or 32 or 64 text tokens; chunks 64 rows.
EDGES = [
    Case(8, 16, 4, text=32, dim=64),
    Case(9, 17, 5, text=33, pooled=65, dim=128, heads=1),
    Case(7, 15, 3, text=31, pooled=3, dim=51),
    Case(21, 13, 21, text=70, pooled=64, strip=(5, 9, 65), text_first=False),
    Case(3, 70, 12, text=5, strip=(1, 2, 0)),
    Case(24, 1, 6, pooled=1),
    Case(16, 24, 40, text=1),
    Case(96, 90, 2, text=3, strip=(40, 1, 3), dim=8, heads=1),  # text queries over more than 8192 keys: several splits
]


@every_isa
@every_dtype
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_error_is_at_most_twice_that_of_the_plain_formula(library, isa, dtype, case):  # noqa: F811
    use(library, isa)
    tensors = case.tensors(DTYPES[dtype])
    exact, rounded = plain(case, tensors, torch.float64), plain(case, tensors, DTYPES[dtype])
    got = run(case, *tensors)
    assert got.keys() == exact.keys()
    for name, reference in exact.items():
        error, allowed = (got[name].double() - reference).norm(), 2 * (rounded[name].double() - reference).norm()
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


LONG = Case(96, 90, 2, text=3, pooled=2, dim=8, heads=1, batch=2)  # text meets more than 8192 tokens: several splits
SHORT = Case(13, 20, 5, text=40, pooled=9, batch=3)


def assert_same(results, others):
    for name, value in results.items():
        assert not value.isnan().any(), name
        assert torch.equal(value, others[name]), name


@every_isa
@every_dtype
@pytest.mark.parametrize("case", [SHORT, LONG], ids=str)
def test_same_bits_for_any_number_of_threads(library, threads, isa, dtype, case):  # noqa: F811
    use(library, isa)
    tensors = case.tensors(DTYPES[dtype])
    threads(1)
    one = run(case, *tensors)
    threads(3)
    assert_same(one, run(case, *tensors))


@every_isa
@every_dtype
@pytest.mark.parametrize("case", [SHORT, LONG], ids=str)
def test_same_bits_for_a_sample_alone_and_in_a_batch(library, isa, dtype, case):  # noqa: F811
    use(library, isa)
    tensors = case.tensors(DTYPES[dtype])
    batch = run(case, *tensors)
    alone = run(case, *(x[1:2] for x in tensors))
    assert_same(alone, {name: x[1:2] for name, x in batch.items()})


@every_isa
@every_dtype
def test_infinite_values_reach_the_queries_that_see_them_and_no_others(library, isa, dtype):  # noqa: F811
    use(library, isa)
    case = Case(12, 20, 5, text=3, dim=16, heads=1)
    for row in (0, 3 + 5 * 20 + 11):  # a text key, an image key
        tensors = case.tensors(DTYPES[dtype])
        tensors[2][:, :, row, 5] = float("inf")
        out = run(case, *tensors)["out"]
        seen = case.mask()[:, row]
        assert (out[0, 0, seen, 5] == float("inf")).all()
        assert out[0, 0, ~seen].isfinite().all() and out[..., :5].isfinite().all()


@every_isa
def test_scores_of_any_size_are_exponentiated_safely(library, isa):  # noqa: F811
    use(library, isa)
    case = Case(6, 9, 3, text=2, dim=8, heads=1)
    tensors = case.tensors(torch.float32)
    huge = 1e18
    tensors[0].mul_(huge), tensors[1].mul_(huge)  # scores near 1e36: one key takes all
    out, exact = run(case, *tensors)["out"], plain(case, tensors, torch.float64)["out"]
    assert torch.equal(out.double(), exact)


@every_isa
def test_grad_lse_may_have_any_strides(library, isa):  # noqa: F811
    use(library, isa)
    case = Case(9, 11, 4, text=5)
    *tensors, grad_lse = case.tensors(torch.float32)
    ones = torch.ones(()).expand(grad_lse.shape)
    assert_same(run(case, *tensors, ones.contiguous()), run(case, *tensors, ones))


# ---------------------------------------------------------------------------------------------------------- pooling


@every_isa
@every_dtype
@pytest.mark.parametrize(("height", "width", "f"), [(8, 12, 4), (7, 9, 3), (2, 3, 5)])
def test_pooling_keeps_within_the_rule(library, isa, dtype, height, width, f):  # noqa: F811
    use(library, isa)
    generator = torch.Generator().manual_seed(1)
    rows, columns = math.ceil(height / f), math.ceil(width / f)
    x = torch.randn(2, height * width, 3, 37, generator=generator).to(DTYPES[dtype]).transpose(1, 2)
    grad = torch.randn(2, rows * columns, 3, 37, generator=generator).to(DTYPES[dtype]).transpose(1, 2)
    weight = torch.randn(f, f, generator=generator)
    y = (torch.arange(rows * f)).clamp(max=height - 1).view(rows, 1, f, 1)
    token = y * width + torch.arange(columns * f).clamp(max=width - 1).view(1, columns, 1, f)
    token = token.reshape(rows * columns, f * f)

    def formula(dtype):
        patches, w, g = x.to(dtype)[:, :, token], weight.to(dtype).flatten(), grad.to(dtype)
        spread = (g[:, :, :, None] * w[:, None]).flatten(2, 3)
        grad_x = torch.zeros_like(x, dtype=dtype).index_add(2, token.flatten(), spread)
        return w @ patches, grad_x, torch.einsum("bhpkd,bhpd->k", patches, g).view(f, f)

    out, grad_x, grad_weight = (
        torch.full_like(grad, math.nan),
        torch.full_like(x, math.nan),
        torch.full((f, f), math.nan),
    )
    torch.ops.linattn._pool_tokens_cpu(x, weight, height, width, out)
    torch.ops.linattn._pool_tokens_backward_cpu(grad, x, weight, height, width, grad_x, grad_weight)
    results = zip((out, grad_x, grad_weight), formula(torch.float64), formula(DTYPES[dtype]), strict=True)
    for got, exact, rounded in results:
        error, allowed = (got.double() - exact).norm(), 2 * (rounded.double() - exact).norm()
        assert error <= allowed, f"{error:.2e} > {allowed:.2e}"


# -------------------------------------------------------------------------------------------- workspace, bad input


PEAK = """
import resource, sys, torch, linattn
torch.set_num_threads(1)
backward = sys.argv[1] == "backward"
q, k, v, out, grad, gq, gk, gv = (torch.zeros(1, 4096 + 64, 8, 128).transpose(1, 2) for _ in range(8))
lse = torch.zeros(1, 8, 4096 + 64)
geometry = 64, 64, 8, 64, True, 0, 64, 128**-0.5
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if backward:
    torch.ops.linattn._window_attention_backward_cpu(
        grad, None, q, k, v, None, None, out, lse, *geometry, gq, gk, gv, None, None)
else:
    torch.ops.linattn._window_attention_cpu(q, k, v, None, None, *geometry, out, lse)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * q.nbytes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_workspace_is_below_5_percent_of_the_tensors(direction):
    done = subprocess.run([sys.executable, "-c", PEAK, direction], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.05


def test_bindings_refuse_what_memory_safety_depends_on():
    case = Case(6, 7, 3, text=2, pooled=4)
    q, k, v, pooled_k, pooled_v, _, _ = case.tensors(torch.float32)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])

    def call(q=q, k=k, v=v, pooled_k=pooled_k, pooled_v=pooled_v, geometry=case.geometry, out=out, lse=lse):
        torch.ops.linattn._window_attention_cpu(q, k, v, pooled_k, pooled_v, *geometry, out, lse)

    call()
    with pytest.raises(RuntimeError, match="k must be"):
        call(k=k[:, :, :-1])
    with pytest.raises(RuntimeError, match="v must be"):
        call(v=v[..., :32])
    with pytest.raises(RuntimeError, match="pooled_v must be"):
        call(pooled_v=pooled_v[:, :, :3])
    with pytest.raises(RuntimeError, match="go together"):
        call(pooled_v=None)
    with pytest.raises(RuntimeError, match="out must be"):
        call(out=out[:, :1])
    with pytest.raises(RuntimeError, match="lse must be"):
        call(lse=lse[:, :, 1:])
    with pytest.raises(RuntimeError, match="lse must be contiguous"):
        call(lse=lse.mT.contiguous().mT)
    with pytest.raises(RuntimeError, match="rows of q from q_row"):
        call(geometry=(*case.geometry[:5], 1, *case.geometry[6:]))
    with pytest.raises(RuntimeError, match="radius"):
        call(geometry=(6, 7, 0, *case.geometry[3:]))
    with pytest.raises(RuntimeError, match="another dtype"):
        call(k=k.half())
    with pytest.raises(RuntimeError, match="stride 1"):
        call(q=q.mT.contiguous().mT)
