"""Family A, the three ops of bidirectional linear attention, on every backend: values, gradients, layouts, torch's
subsystems, and everything that must be refused."""

import dataclasses
import itertools
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers import tester
from helpers.tester import check, on_every_backend, skip_if_slow
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import linattn
import linattn.flops
from linattn import backend as backends
from linattn import reference
from linattn.ops import checks

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
NAME = {F32: "float32", F16: "float16", BF16: "bfloat16", F64: "float64"}
KERNEL_DTYPES = (F32, F16, BF16)
#: Backends that promise the same bits for any layout and batch; the reference leaves sums to torch's matmul.
KERNELS = ("cuda", "triton", "cpu")
LOW, HIGH = checks.HEAD_DIMS.start, checks.HEAD_DIMS.stop - 1
ops = torch.ops.linattn


# ------------------------------------------------------------------------------------- the formula in low precision


def plain_attention(q, k, v, feature_map="elu1", normalize=True, scale=None, eps=1e-4, q_denom=None, k_denom=None):
    """The formula by torch operations in the dtype of q; v is scaled first, as LinFusion does, for float16's range."""
    phi_q, phi_k = reference.feature(q, feature_map), reference.feature(k, feature_map)
    out = phi_q @ (phi_k.mT @ (v * (1 / k.shape[2] if scale is None else scale)))
    if normalize:
        phi_qd = phi_q if q_denom is None else reference.feature(q_denom, feature_map)
        phi_kd = phi_k if k_denom is None else reference.feature(k_denom, feature_map)
        out = out / (phi_qd @ phi_kd.mean(-2).unsqueeze(-1) + eps)
    return out


def plain_state(k, v, feature_map="elu1", k_denom=None):
    phi_k = reference.feature(k, feature_map)
    phi_kd = phi_k if k_denom is None else reference.feature(k_denom, feature_map)
    # Both halves as products: torch.sum adds float32 in a tree, which no blocked product can be asked to match.
    return phi_k.mT @ v, (torch.ones_like(phi_kd[..., :1]).mT @ phi_kd).squeeze(-2)


def plain_apply(q, kv, k_sum, count, feature_map="elu1", normalize=True, scale=None, eps=1e-4, q_denom=None):
    phi_q = reference.feature(q, feature_map)
    out = phi_q @ (kv * (1 / count if scale is None else scale)).to(q.dtype)
    if normalize:
        phi_qd = phi_q if q_denom is None else reference.feature(q_denom, feature_map)
        out = out / (phi_qd @ (k_sum / count).to(q.dtype).unsqueeze(-1) + eps)
    return out


# ------------------------------------------------------------------------------------- inputs

#: Order of the memory, from the slowest dimension to the fastest, of B, H, N, D.
ORDERS = {"bhnd": (0, 1, 2, 3), "bnhd": (0, 2, 1, 3), "nbhd": (2, 0, 1, 3), "hnbd": (1, 2, 0, 3), "bhdn": (0, 1, 3, 2)}


def arrange(x, layout):
    """x in another memory layout, lying in a buffer of NaN: whoever reads beyond the tensor shows it.

    "+3" pads each row by three elements and shifts it by one, so that no alignment is left; "/2" takes every other
    element, so that the head dim has stride 2.
    """
    order = ORDERS[layout[:4]]
    sizes = [x.shape[dim] + 1 for dim in order]
    place = [slice(0, x.shape[dim]) for dim in order]
    if layout.endswith("+3"):
        sizes[3] += 2
        place[3] = slice(1, 1 + x.shape[order[3]])
    elif layout.endswith("/2"):
        sizes[3] *= 2
        place[3] = slice(0, 2 * x.shape[order[3]], 2)
    buffer = torch.full(sizes, float("nan"), dtype=x.dtype, device=x.device)[tuple(place)]
    result = buffer.permute([order.index(dim) for dim in range(4)])
    return result.copy_(x)


@dataclasses.dataclass(frozen=True)
class Case:
    b: int = 1
    h: int = 2
    n: int = 64
    m: int | None = None  # None: as n
    d: int = 40
    e: int | None = None  # None: as d
    dtype: torch.dtype = F32
    layout: str = "bhnd"
    options: tuple = ()  # ((name, value), ...)
    denoms: str = ""  # which of "q" and "k" have a tensor of their own in the denominator

    def __str__(self):
        m, e = "" if self.m is None else f"m{self.m}", "" if self.e is None else f"e{self.e}"
        words = [f"b{self.b}h{self.h}n{self.n}{m}d{self.d}{e}", NAME[self.dtype]]
        words += [self.layout] if self.layout != "bhnd" else []
        words += [f"{name}={value}" for name, value in self.options]
        words += [f"{letter}_denom" for letter in self.denoms]
        return "-".join(words)

    @property
    def tokens(self):
        return self.b * self.h * (self.n + self.keys)

    @property
    def keys(self):
        return self.n if self.m is None else self.m

    def tensors(self, device="cpu"):
        mapped = dict(self.options).get("feature_map") == "identity"
        shapes = {
            "q": (self.n, self.d),
            "k": (self.keys, self.d),
            "v": (self.keys, self.d if self.e is None else self.e),
        }
        shapes["q_denom"] = shapes["q"] if "q" in self.denoms else None
        shapes["k_denom"] = shapes["k"] if "k" in self.denoms else None

        def tensor(name, shape):
            # Mapped tensors are positive: with phi the identity a random sign would bring denominators near zero.
            full = (self.b, self.h, *shape)
            x = torch.rand(full) + 0.05 if mapped and name != "v" else torch.randn(full)
            return arrange(x.to(self.dtype), self.layout).to(device)

        return {name: None if shape is None else tensor(name, shape) for name, shape in shapes.items()}


def fused(b, n, h, d, dtype, device="cpu"):
    """q, k and v as (B, H, N, D) views of one (B, N, 3, H, D) buffer, as a fused projection gives them."""
    buffer = torch.randn(b, n, 3, h, d, dtype=dtype, device=device)
    return dict(zip("qkv", (x.transpose(1, 2) for x in buffer.unbind(2)), strict=True))


HALF = {"dtype": BF16}
CASES = [
    # Stable Diffusion's head dims at reduced sizes, every dtype
    *(
        Case(b=b, h=h, n=n, d=d, dtype=dtype, layout="bnhd")
        for (b, h, n, d), dtype in itertools.product(
            [(2, 8, 64, 40), (1, 2, 40, 40), (1, 5, 100, 64), (1, 1, 40, 64), (1, 2, 70, 80), (1, 1, 33, 160)],
            KERNEL_DTYPES,
        )
    ),
    # more tokens than one chunk, tile or split
    Case(n=700, d=40),
    Case(n=700, d=64, dtype=BF16),
    Case(h=1, n=1300, d=80, dtype=F16, layout="bnhd"),
    # head dims: smallest, largest, odd, and D unlike E
    *(Case(h=1, n=24, d=d, dtype=dtype) for d in (8, 9, 33, 128, 255, 256) for dtype in (F32, BF16)),
    Case(h=1, n=24, d=9, dtype=F16),
    Case(h=1, n=24, d=33, dtype=F16, layout="bhnd+3"),
    *(Case(n=19, d=d, e=e, dtype=dtype) for d, e in ((40, 64), (160, 8), (17, 39)) for dtype in (F32, BF16)),
    # numbers of tokens
    *(Case(n=n, m=m, d=16, dtype=dtype) for n, m in ((0, 5), (1, 1), (1, 30), (30, 1)) for dtype in (F32, BF16)),
    Case(n=65, m=31, d=24),
    Case(n=31, m=130, d=24, dtype=F16),
    Case(n=60, m=7, d=64),  # M < D: (phi(q) phi(k)^T) v is cheaper
    Case(n=40, m=9, d=64, dtype=BF16),
    Case(n=300, m=77, d=160, dtype=F16),
    Case(n=1, m=1, d=8, h=1, dtype=F16),
    Case(b=1, h=1, n=37, d=40),
    Case(b=1, h=1, n=37, d=40, dtype=F16),
    Case(b=0, h=2, n=8, d=16),
    Case(b=0, h=2, n=8, d=16, dtype=BF16),
    Case(b=2, h=0, n=8, d=16),
    Case(b=3, h=3, n=17, d=40, dtype=BF16),
    # options
    *(
        Case(n=20, d=24, dtype=dtype, options=(("feature_map", feature_map), ("normalize", normalize)))
        for feature_map, normalize, dtype in itertools.product(
            ("elu1", "relu", "identity"), (True, False), KERNEL_DTYPES
        )
    ),
    Case(n=20, d=24, options=(("scale", 0.3),)),
    Case(n=20, d=24, dtype=BF16, options=(("scale", -0.01),)),
    Case(n=20, d=24, options=(("eps", 0.5),)),
    Case(n=20, d=24, dtype=F16, options=(("eps", 0.0),)),
    # denominators of their own, together and alone
    *(Case(n=20, m=14, d=24, dtype=dtype, denoms=denoms) for denoms in ("q", "k", "qk") for dtype in KERNEL_DTYPES),
    Case(n=20, d=16, denoms="qk", layout="bnhd", options=(("feature_map", "identity"), ("eps", 1e-6))),
    Case(n=20, d=16, dtype=BF16, denoms="qk", options=(("feature_map", "relu"),)),
    Case(n=20, d=16, denoms="qk", options=(("normalize", False),)),
    Case(n=60, m=7, d=64, denoms="k"),
    # memory
    *(
        Case(b=2, h=2, n=18, d=24, dtype=dtype, layout=layout)
        for layout in ("nbhd", "hnbd", "bhnd+3", "bnhd+3", "bnhd/2", "bhdn")
        for dtype in (F32, BF16)
    ),
]


@on_every_backend()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_keep_within_twice_the_error_of_the_plain_formula(case, backend, device):
    skip_if_slow(backend, device, case.tokens * max(1, case.d // 64), case.dtype)
    definition = reference.linear_attention
    tensors, options = case.tensors(device), dict(case.options)
    check(linattn.linear_attention, definition, plain_attention, tensors, options, backend)


STATE_CASES = [
    Case(n=65, d=40),
    Case(n=65, d=40, dtype=BF16, layout="bnhd"),
    Case(n=20, d=33, e=16, dtype=F16, layout="bhnd+3"),
    Case(n=1, d=8, dtype=BF16),
    Case(n=20, d=16, denoms="k"),
    Case(n=20, d=16, denoms="k", dtype=BF16),
    Case(n=20, d=16, options=(("feature_map", "relu"),)),
    Case(n=20, d=16, dtype=F16, options=(("feature_map", "identity"),)),
    Case(b=0, n=8, d=16),
    Case(n=900, d=80, dtype=BF16),
]


@on_every_backend("linear_attention_state")
@pytest.mark.parametrize("case", STATE_CASES, ids=str)
def test_state_and_its_gradients_keep_within_the_rule(case, backend, device):
    skip_if_slow(backend, device, case.tokens, case.dtype)
    tensors = {name: x for name, x in case.tensors(device).items() if not name.startswith("q")}
    definition, options = reference.linear_attention_state, dict(case.options)
    results = check(linattn.linear_attention_state, definition, plain_state, tensors, options, backend)
    for i in (0, 1):
        assert results[f"output {i}"].dtype == F32
        assert results[f"output {i}"].is_contiguous()


@on_every_backend("linear_attention_apply")
@pytest.mark.parametrize("case", [case for case in CASES if case.n <= 40 and case.denoms != "k"], ids=str)
def test_apply_and_its_gradients_keep_within_the_rule(case, backend, device):
    skip_if_slow(backend, device, case.tokens * max(1, case.d // 64), case.dtype)
    tensors, options = case.tensors(device), dict(case.options)
    wide = {name: None if x is None else x.float() for name, x in tensors.items()}
    state = reference.linear_attention_state(wide["k"], wide["v"], options.get("feature_map", "elu1"), wide["k_denom"])
    tensors = {"q": tensors["q"], "kv": state[0], "k_sum": state[1], "q_denom": tensors["q_denom"]}
    options["count"] = case.keys
    check(linattn.linear_attention_apply, reference.linear_attention_apply, plain_apply, tensors, options, backend)


# ------------------------------------------------------------------------------------- memory layout


def runs(function):
    """Names of the ops that ran inside function()."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


def is_dense(x):
    """Whether x fills its memory without gaps or overlaps, in some order of its dimensions."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride != step:
            return False
        step *= size
    return True


@on_every_backend()
@pytest.mark.parametrize("e", [16, 24])
@pytest.mark.parametrize("layout", ORDERS)
def test_output_is_dense_in_the_order_of_q_with_the_head_dim_innermost(layout, e, backend, device):
    tensors = Case(b=2, h=3, n=4, m=5, d=16, e=e, layout=layout).tensors(device)
    with linattn.use_backend(backend):
        out = linattn.linear_attention(**tensors)
        shadows = {
            name: None if x is None else torch.empty_strided(x.shape, x.stride(), device="meta")
            for name, x in tensors.items()
        }
        meta = linattn.linear_attention(**shadows)
    assert out.stride(3) == 1
    assert is_dense(out)
    q = tensors["q"]
    slowest_first = sorted(range(3), key=lambda dim: -q.stride(dim))
    assert sorted(range(3), key=lambda dim: -out.stride(dim)) == slowest_first
    assert (meta.shape, meta.stride()) == (out.shape, out.stride())


@on_every_backend()
def test_flattening_the_heads_of_a_transposed_result_is_a_view(backend, device):
    b, n, h, d = 2, 9, 3, 16
    q, k, v = (torch.randn(b, n, h * d, device=device).unflatten(2, (h, d)).transpose(1, 2) for _ in range(3))
    with linattn.use_backend(backend):
        out = linattn.linear_attention(q, k, v)
    assert out.transpose(1, 2).view(b, n, h * d).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("backend", [name for name in ("cpu", "cuda") if linattn._library.loaded(name)])
def test_a_fused_projection_is_read_in_place(backend):
    tensors = fused(2, 9, 3, 16, BF16, device=backend)
    with linattn.use_backend(backend):
        seen = runs(lambda: linattn.linear_attention(**tensors))
    assert f"linattn::_linear_attention_{backend}" in seen
    assert not seen & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"}


@on_every_backend()
def test_the_stride_of_a_head_dim_of_one_does_not_matter(backend, device):
    spread = [torch.randn(2, 3, 9, 4, device=device)[..., ::2][..., :1] for _ in range(3)]
    dense = [x.clone(memory_format=torch.contiguous_format).as_strided(x.shape, (27, 9, 1, 1)) for x in spread]
    assert spread[0].stride(-1) == 2
    with linattn.use_backend(backend):
        assert torch.equal(linattn.linear_attention(*spread), linattn.linear_attention(*dense))


@on_every_backend(only=KERNELS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
def test_views_of_a_fused_buffer_give_the_values_and_gradients_of_separate_tensors(dtype, backend, device):
    b, n, h, d = 1, 12, 2, 24
    views = fused(b, n, h, d, dtype, device)
    separate = {name: x.contiguous() for name, x in views.items()}
    with linattn.use_backend(backend):
        upstream = (torch.randn(b, h, n, d, dtype=dtype, device=device),)
        first = tester.evaluate(linattn.linear_attention, views, {}, upstream)
        second = tester.evaluate(linattn.linear_attention, separate, {}, upstream)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.fixture
def distant_rows(tmp_path):
    """rows(n, width, device): n bfloat16 rows of an interleaved buffer, 2^27 elements apart; only their pages exist."""

    def rows(n, width, device):
        step, total = 2**27, (n - 1) * 2**27 + width
        if device == "cpu":
            flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=total, dtype=BF16)
        else:
            flat = torch.zeros(total, dtype=BF16, device=device)
        return flat.as_strided((n, width), (step, 1))

    yield rows
    (tmp_path / "sparse").unlink(missing_ok=True)


@on_every_backend(only=KERNELS)
def test_element_offsets_beyond_2_to_the_31_reach_the_right_rows(distant_rows, backend, device):
    n, h, d = 19, 2, 40
    buffer = distant_rows(n, 4 * h * d, device)
    assert (n - 1) * buffer.stride(0) > 2**31
    buffer.copy_(torch.randn(n, 4 * h * d))
    q, k, v, grad = (x.transpose(0, 1).unsqueeze(0) for x in buffer.unflatten(1, (4, h, d)).unbind(1))
    assert q.shape == (1, h, n, d)
    near = {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous()}
    with linattn.use_backend(backend):
        far = tester.evaluate(linattn.linear_attention, {"q": q, "k": k, "v": v}, {}, (grad,))
        expected = tester.evaluate(linattn.linear_attention, near, {}, (grad.contiguous(),))
    for name, x in far.items():
        assert torch.equal(x, expected[name]), name


@on_every_backend()
def test_broadcast_tensors_count_once_for_every_head(backend, device):
    q = torch.randn(2, 3, 6, 16, device=device)
    k, v = torch.randn(2, 1, 6, 16, device=device), torch.randn(1, 1, 6, 16, device=device)
    tensors = {"q": q, "k": k.expand(2, 3, 6, 16), "v": v.expand(2, 3, 6, 16)}
    check(linattn.linear_attention, reference.linear_attention, plain_attention, tensors, {}, backend)
    leaf = k.clone().requires_grad_()
    with linattn.use_backend(backend):
        linattn.linear_attention(q, leaf.expand(2, 3, 6, 16), tensors["v"]).sum().backward()
    assert leaf.grad.shape == k.shape


# ------------------------------------------------------------------------------------- hard numbers


@on_every_backend()
@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAME.get)
@pytest.mark.parametrize("kind", ["saturated", "tiny denominators"])
def test_saturated_features_and_tiny_denominators_keep_within_the_rule(kind, dtype, backend, device):
    tensors = {name: torch.randn(1, 2, 24, 16, device=device) for name in "qkv"}
    if kind == "saturated":
        tensors = {name: 40 * x for name, x in tensors.items()}
    else:  # phi(k) about 1e-4, so that eps is a good part of the denominator
        tensors["k"] = -8 - 4 * tensors["k"].abs()
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    check(linattn.linear_attention, reference.linear_attention, plain_attention, tensors, {}, backend)


@on_every_backend()
def test_float16_sums_beyond_its_range_do_not_overflow(backend, device):
    m = 128
    tensors = {
        "q": torch.randn(1, 1, 16, 16),
        "k": 60 + torch.rand(1, 1, m, 16),
        "v": 20 + torch.rand(1, 1, m, 16),
    }
    tensors = {name: x.to(device=device, dtype=F16) for name, x in tensors.items()}
    kv, _ = reference.linear_attention_state(tensors["k"], tensors["v"])
    assert kv.max() > torch.finfo(F16).max
    # float16 gradients of a plain formula overflow here; those of the op must still be finite
    check(linattn.linear_attention, reference.linear_attention, plain_attention, tensors, {}, backend, gradients=False)
    upstream = (torch.randn(1, 1, 16, 16, device=device, dtype=F16),)
    with linattn.use_backend(backend):
        results = tester.evaluate(linattn.linear_attention, tensors, {}, upstream)
    for name, x in results.items():
        assert x.isfinite().all(), name


def nan_case(dtype, device):
    return {name: torch.randn(2, 2, 20, 16, device=device).to(dtype) for name in "qkv"}


@on_every_backend()
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
@pytest.mark.parametrize("feature_map", ["elu1", "relu", "identity"])
def test_nan_in_a_query_stays_in_its_row(feature_map, dtype, backend, device):
    tensors = nan_case(dtype, device)
    with linattn.use_backend(backend):
        clean = linattn.linear_attention(**tensors, feature_map=feature_map)
        tensors["q"][1, 0, 7, 3] = float("nan")
        out = linattn.linear_attention(**tensors, feature_map=feature_map)
    assert out[1, 0, 7].isnan().all()
    out[1, 0, 7] = clean[1, 0, 7] = 0
    assert torch.equal(out, clean)


@on_every_backend()
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
@pytest.mark.parametrize("m", [20, 5], ids=["M>D", "M<D"])
@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_in_a_key_or_value_reaches_every_query_of_its_head_and_no_other_head(name, m, dtype, backend, device):
    tensors = nan_case(dtype, device)
    tensors = {key: x if key == "q" else x[:, :, :m].clone() for key, x in tensors.items()}
    with linattn.use_backend(backend):
        clean = linattn.linear_attention(**tensors)
        tensors[name][0, 1, 4, 2] = float("nan")
        out = linattn.linear_attention(**tensors)
    reached = out[0, 1] if name == "k" else out[0, 1, :, 2]
    assert reached.isnan().all()
    out[0, 1] = clean[0, 1] = 0
    assert torch.equal(out, clean)


@on_every_backend()
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
def test_minus_infinity_is_a_token_without_weight(dtype, backend, device):
    tensors = nan_case(dtype, device)
    minus = float("-inf")
    tensors["q"][0, 0, 5] = minus
    tensors["k"][0, 0, 6] = minus  # phi = 0: as if v_6 were not there, though it still counts in M
    check(linattn.linear_attention, reference.linear_attention, plain_attention, tensors, {}, backend, gradients=False)
    with linattn.use_backend(backend):
        assert (linattn.linear_attention(**tensors)[0, 0, 5] == 0).all()


@on_every_backend()
@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAME.get)
def test_infinity_in_a_value_is_infinite_in_its_column_only(dtype, backend, device):
    tensors = nan_case(dtype, device)
    with linattn.use_backend(backend):
        clean = linattn.linear_attention(**tensors)
        tensors["v"][0, 0, 6, 2] = float("inf")
        out = linattn.linear_attention(**tensors)
    assert (out[0, 0, :, 2] == float("inf")).all()
    out[0, 0, :, 2] = clean[0, 0, :, 2] = 0
    assert torch.equal(out, clean)


# ------------------------------------------------------------------------------------- determinism and algebra


def gradients_of_sum(backend, tensors, **options):
    shape = (*tensors["q"].shape[:3], tensors["v"].shape[3])
    upstream = torch.linspace(-1, 1, shape[1] * shape[2] * shape[3]).to(tensors["q"]).reshape(1, *shape[1:])
    with linattn.use_backend(backend):
        upstream = upstream.expand(shape)
        return tester.evaluate(linattn.linear_attention, tensors, options, (upstream,))


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@on_every_backend()
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
def test_two_runs_give_the_same_bits(dtype, backend, device):
    case = Case(b=1, h=1, n=20, d=40, dtype=dtype) if tester.interpreted(backend, device) else Case(n=3000, dtype=dtype)
    tensors = case.tensors(device)
    assert_same_bits(gradients_of_sum(backend, tensors), gradients_of_sum(backend, tensors))


@on_every_backend(only=("cpu",))
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
@pytest.mark.parametrize(
    "case",
    [Case(b=2, h=3, n=2900, d=40, layout="bnhd"), Case(b=1, h=1, n=5000, d=64), Case(n=700, m=30, d=160)],
    ids=str,
)
def test_any_number_of_threads_gives_the_same_bits(case, dtype, backend, device):
    tensors = dataclasses.replace(case, dtype=dtype).tensors(device)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(gradients_of_sum(backend, tensors))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@on_every_backend(only=KERNELS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
@pytest.mark.parametrize("n", [20, 1100])
def test_a_sample_gives_the_same_bits_alone_and_in_a_batch(n, dtype, backend, device):
    skip_if_slow(backend, device, 6 * n, BF16 if n == 20 else dtype)
    tensors = Case(b=3, h=1, n=n, d=40, dtype=dtype, layout="bnhd").tensors(device)
    together = gradients_of_sum(backend, tensors)
    for i in range(3):
        alone = gradients_of_sum(backend, {key: x[i : i + 1] for key, x in tensors.items() if x is not None})
        for name, x in alone.items():
            assert torch.equal(x, together[name][i : i + 1]), (i, name)


def truth_and_plain(tensors, **options):
    wide = {name: x.double() for name, x in tensors.items()}
    return reference.linear_attention(**wide, **options), plain_attention(**tensors, **options)


@on_every_backend()
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
def test_the_order_of_keys_does_not_matter(dtype, backend, device):
    tensors = {name: x for name, x in Case(h=1, n=24, d=24, dtype=dtype).tensors(device).items() if x is not None}
    order = torch.randperm(24)
    with linattn.use_backend(backend):
        out = linattn.linear_attention(tensors["q"], tensors["k"][:, :, order], tensors["v"][:, :, order])
    tester.assert_within_rule("output", out, *truth_and_plain(tensors))


@on_every_backend()
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
@pytest.mark.parametrize("normalize", [True, False])
def test_states_of_shards_add_up_and_apply_to_the_attention_of_the_whole(normalize, dtype, backend, device):
    tensors = {name: x for name, x in Case(h=1, n=24, d=24, dtype=dtype).tensors(device).items() if x is not None}
    q, k, v = tensors.values()
    with linattn.use_backend(backend):
        shards = [linattn.linear_attention_state(*parts) for parts in zip(k.split(10, 2), v.split(10, 2), strict=True)]
        kv, k_sum = (torch.stack(parts).sum(0) for parts in zip(*shards, strict=True))
        out = linattn.linear_attention_apply(q, kv, k_sum, 24, normalize=normalize)
    for what, x, truth, plain in zip(
        ("kv", "k_sum"),
        (kv, k_sum),
        reference.linear_attention_state(k.double(), v.double()),
        plain_state(k, v),
        strict=True,
    ):
        tester.assert_within_rule(what, x, truth, plain)
    tester.assert_within_rule("output", out, *truth_and_plain(tensors, normalize=normalize))


@on_every_backend("linear_attention_apply")
@pytest.mark.parametrize("state_dtype", [F32, F16, BF16, F64], ids=NAME.get)
def test_the_state_may_have_any_floating_dtype_and_its_gradient_has_the_same(state_dtype, backend, device):
    tensors = Case(h=1, n=12, d=16, dtype=BF16).tensors(device)
    kv, k_sum = reference.linear_attention_state(tensors["k"], tensors["v"])
    state = {"q": tensors["q"], "kv": kv.to(state_dtype), "k_sum": k_sum.to(state_dtype)}
    results = check(
        linattn.linear_attention_apply, reference.linear_attention_apply, plain_apply, state, {"count": 12}, backend
    )
    assert results["gradient of kv"].dtype == results["gradient of k_sum"].dtype == state_dtype


# ------------------------------------------------------------------------------------- hypothesis


@st.composite
def small_cases(draw):
    n = draw(st.integers(0, 70))
    m = draw(st.one_of(st.none(), st.integers(1, 70))) if n else draw(st.integers(1, 70))
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "feature_map": st.sampled_from(["elu1", "relu", "identity"]),
                "normalize": st.booleans(),
                "scale": st.sampled_from([0.01, 0.5, -0.2]),
                "eps": st.sampled_from([1e-6, 1e-2, 1.0]),
            },
        )
    )
    return Case(
        b=draw(st.integers(0, 3)),
        h=draw(st.integers(1, 3)),
        n=n,
        m=m,
        d=draw(st.integers(8, 96)),
        e=draw(st.one_of(st.none(), st.integers(8, 96))),
        dtype=draw(st.sampled_from(KERNEL_DTYPES)),
        layout=draw(st.sampled_from(["bhnd", "bnhd", "nbhd", "hnbd", "bhdn", "bhnd+3", "bnhd+3", "bhnd/2"])),
        denoms=draw(st.sampled_from(["", "q", "k", "qk"])),
        options=tuple(sorted(options.items())),
    )


@pytest.mark.skipif(not linattn._library.loaded("cpu"), reason=f"backend cpu: {linattn._library.reason('cpu')}")
@hypothesis.settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(case=small_cases(), seed=st.integers(0, 2**16))
def test_any_small_case_keeps_within_the_rule_on_the_cpu(case, seed):
    torch.manual_seed(seed)
    options = dict(case.options)
    check(linattn.linear_attention, reference.linear_attention, plain_attention, case.tensors(), options, "cpu")


# ------------------------------------------------------------------------------------- autograd

DOUBLE = Case(b=1, h=2, n=3, m=4, d=8, e=9, dtype=F64)
OPTIONS = [
    {},
    {"feature_map": "relu"},
    {"feature_map": "identity", "eps": 1e-6},
    {"normalize": False},
    {"scale": 0.7},
    {"eps": 0.3},
]


def double_tensors(names, denoms="", **options):
    tensors = dataclasses.replace(DOUBLE, denoms=denoms, options=tuple(options.items())).tensors()
    return [None if tensors[name] is None else tensors[name].clone().requires_grad_() for name in names]


@pytest.mark.parametrize("denoms", ["", "q", "k", "qk"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_the_op_are_those_of_finite_differences(options, denoms):
    q, k, v, q_denom, k_denom = double_tensors(("q", "k", "v", "q_denom", "k_denom"), denoms, **options)

    def function(q, k, v, q_denom, k_denom):
        return linattn.linear_attention(q, k, v, q_denom=q_denom, k_denom=k_denom, **options)

    assert torch.autograd.gradcheck(function, (q, k, v, q_denom, k_denom))


@pytest.mark.parametrize("denoms", ["", "k"])
@pytest.mark.parametrize("feature_map", ["elu1", "relu", "identity"])
def test_gradients_of_the_state_are_those_of_finite_differences(feature_map, denoms):
    k, v, k_denom = double_tensors(("k", "v", "k_denom"), denoms)

    def function(k, v, k_denom):
        return linattn.linear_attention_state(k, v, feature_map=feature_map, k_denom=k_denom)

    assert torch.autograd.gradcheck(function, (k, v, k_denom))


@pytest.mark.parametrize("denoms", ["", "q"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_apply_are_those_of_finite_differences(options, denoms):
    q, q_denom = double_tensors(("q", "q_denom"), denoms, **options)
    kv = torch.randn(1, 2, 8, 9, dtype=F64, requires_grad=True)
    k_sum = (torch.rand(1, 2, 8, dtype=F64) + 1).requires_grad_()

    def function(q, kv, k_sum, q_denom):
        return linattn.linear_attention_apply(q, kv, k_sum, 4, q_denom=q_denom, **options)

    assert torch.autograd.gradcheck(function, (q, kv, k_sum, q_denom))


@on_every_backend()
def test_the_gradient_of_a_sum_is_that_of_ones(backend, device):
    tensors = Case(h=1, n=12, d=16).tensors(device)
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    with linattn.use_backend(backend):
        expanded = torch.autograd.grad(linattn.linear_attention(*leaves).sum(), leaves)
        out = linattn.linear_attention(*leaves)
        written = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for first, second in zip(expanded, written, strict=True):
        assert torch.equal(first, second)


@on_every_backend()
@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv", "qv"])
def test_only_what_asks_for_a_gradient_gets_one_and_it_is_the_same(wanted, backend, device):
    tensors = Case(h=1, n=12, d=16, dtype=BF16).tensors(device)
    everything = gradients_of_sum(backend, tensors)
    leaves = {name: tensors[name].detach().requires_grad_(name in wanted) for name in "qkv"}
    with linattn.use_backend(backend):
        out = linattn.linear_attention(**leaves)
        out.backward(torch.linspace(-1, 1, out.numel()).to(out).reshape(out.shape))
    for name, x in leaves.items():
        if name in wanted:
            assert torch.equal(x.grad, everything[f"gradient of {name}"]), name
        else:
            assert x.grad is None, name


@on_every_backend("linear_attention_state")
@pytest.mark.parametrize("which", [0, 1], ids=["kv", "k_sum"])
def test_one_half_of_the_state_alone_has_its_gradient(which, backend, device):
    case = Case(h=1, n=12, d=16)
    k, v = (case.tensors(device)[name].requires_grad_() for name in "kv")
    wide = [x.detach().double().requires_grad_() for x in (k, v)]
    with linattn.use_backend(backend):
        linattn.linear_attention_state(k, v)[which].square().sum().backward()
    expected = torch.autograd.grad(
        reference.linear_attention_state(*wide)[which].square().sum(), wide, allow_unused=True
    )
    rough = [x.detach().clone().requires_grad_() for x in (k, v)]
    plain = torch.autograd.grad(plain_state(*rough)[which].square().sum(), rough, allow_unused=True)
    for name, x, truth, low in zip("kv", (k, v), expected, plain, strict=True):
        if truth is None:
            assert x.grad is None or not x.grad.any(), name
        else:
            tester.assert_within_rule(f"gradient of {name}", x.grad, truth, low, tester.GRADIENT)


def three_calls(q, k, v):
    """name -> a function of q, k, v that calls that op, for what is asked of all three."""
    kv, k_sum = reference.linear_attention_state(k.detach(), v.detach())
    return {
        "linear_attention": lambda: linattn.linear_attention(q, k, v),
        "linear_attention_state": lambda: linattn.linear_attention_state(k, v)[0],
        "linear_attention_apply": lambda: linattn.linear_attention_apply(q, kv, k_sum, k.shape[2]),
    }


THREE = ("linear_attention", "linear_attention_state", "linear_attention_apply")


@pytest.mark.parametrize("op", THREE)
def test_double_backward_raises(op):
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    leaf = q if op == "linear_attention_apply" else k
    (grad,) = torch.autograd.grad(three_calls(q, k, v)[op]().square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), leaf)


def test_without_a_gradient_no_state_is_kept(monkeypatch):
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.shape) or x, lambda x: x):
        linattn.linear_attention(q, k, v)
        with torch.no_grad():
            linattn.linear_attention(q.requires_grad_(), k, v)
    assert not sizes
    assert [x.numel() for x in ops._linear_attention(q.detach(), k, v)[1:]] == [0, 0]


# ------------------------------------------------------------------------------------- torch's subsystems


def opcheck_arguments():
    """op name -> arguments of all registered ops of the family."""
    d, e, n, m = 8, 9, 5, 4

    def x(*shape, grad=False):
        return torch.rand(1, 2, *shape).requires_grad_(grad)

    def public(grad):
        q, k, v = x(n, d, grad=grad), x(m, d, grad=grad), x(m, e, grad=grad)
        qd, kd = x(n, d, grad=grad), x(m, d, grad=grad)
        kv, k_sum = x(d, e, grad=grad), x(d, grad=grad)
        return {
            "linear_attention": (q, k, v, "elu1", True, None, 1e-4, qd, kd),
            "linear_attention_state": (k, v, "relu", kd),
            "linear_attention_apply": (q, kv, k_sum, m, "elu1", True, 0.3, 1e-4, qd),
            "_linear_attention": (q, k, v, "elu1", True, None, 1e-4, None, None, grad),
        }

    for name, arguments in public(True).items():
        yield name, arguments, "gradients"
    for name, arguments in public(False).items():
        yield name, arguments, "no gradients"
    backward = (x(n, e), x(n, d), x(d, e), x(d), m, "elu1", True, None, 1e-4)
    yield "_linear_attention_apply_backward", (*backward, None), ""
    yield "_linear_attention_apply_backward", (*backward, x(n, d)), "q_denom"
    yield "_linear_attention_state_backward", (x(d, e), x(d), x(m, d), x(m, e), "elu1", None), ""
    yield "_linear_attention_state_backward", (x(d, e), x(d), x(m, d), x(m, e), "elu1", x(m, d)), "k_denom"
    for which in ("reference", "cpu", "triton"):
        tensors = x(n, d), x(m, d), x(m, e), x(n, d), x(m, d)
        tail = (True, 0.25, 1e-4)
        yield f"_linear_attention_{which}", (*tensors, 2, *tail, x(n, e), x(d, e), x(d)), ""
        yield f"_linear_attention_{which}", (*tensors[:3], None, None, 2, *tail, x(n, e), None, None), "no state"
        yield f"_linear_attention_state_{which}", (*tensors[1:3], None, 1, x(d, e), x(d)), ""
        yield f"_linear_attention_apply_{which}", (x(n, d), None, x(d, e), x(d), 2, True, 0.2, 0.2, 1e-4, x(n, e)), ""
        yield (
            f"_linear_attention_apply_backward_{which}",
            (x(n, e), x(n, d), None, x(d, e), x(d), 2, True, 0.2, 0.2, 1e-4, x(n, d), None, x(d, e), x(d)),
            "",
        )
        yield (
            f"_linear_attention_state_backward_{which}",
            (x(d, e), x(d), x(m, d), x(m, e), None, 2, x(m, d), x(m, e), None),
            "",
        )


@pytest.mark.parametrize(
    ("name", "index"),
    [pytest.param(row[0], i, id=f"{row[0]} {row[2]}".strip()) for i, row in enumerate(opcheck_arguments())],
)
def test_opcheck_finds_nothing(name, index):
    _, backend = name.rsplit("_", 1)
    if backend in backends.BACKENDS:
        reason = backends.why_not(name.removesuffix("_" + backend), backend, torch.device("cpu"), F32)
        if reason is not None:
            pytest.skip(f"backend {backend}: {reason}")
    _, arguments, _ = list(opcheck_arguments())[index]
    torch.library.opcheck(getattr(ops, name).default, arguments)


def test_opcheck_sees_every_op_of_the_family():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "linattn::" in name}
    expected = {name for name in registered if "linear_attention" in name and not name.endswith("_cuda")}
    assert {row[0] for row in opcheck_arguments()} == expected


FIVE_SIZES = [(48, 20), (33, 77), (100, 64), (7, 9), (260, 130)]


def compiled_calls(op):
    """(function, make): the op as a function of tensors, and make(n, m) for fresh ones that ask for gradients."""

    def x(*shape):
        return torch.rand(2, 2, *shape, requires_grad=True)

    return {
        "linear_attention": (linattn.linear_attention, lambda n, m: (x(n, 16), x(m, 16), x(m, 24))),
        "linear_attention_state": (linattn.linear_attention_state, lambda n, m: (x(m, 16), x(m, 24))),
        "linear_attention_apply": (linattn.linear_attention_apply, lambda n, m: (x(n, 16), x(16, 24), x(16), m)),
    }[op]


def loss(outputs):
    return sum(x.square().sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))


def run_compiled(compiled, function, make, sizes):
    """Run every size forward and backward, compiled and not, and compare bits."""
    for n, m in sizes:
        arguments = make(n, m)
        leaves = [x for x in arguments if isinstance(x, torch.Tensor)]
        expected = torch.autograd.grad(loss(function(*arguments)), leaves)
        for name, x, y in zip("0123", torch.autograd.grad(loss(compiled(*arguments)), leaves), expected, strict=False):
            torch.testing.assert_close(x, y, msg=lambda text, name=name: f"gradient {name}: {text}")


def assert_one_compilation(compiled, function, make, counter):
    run_compiled(compiled, function, make, FIVE_SIZES[:1])
    # Dynamo may hand over its one graph twice: where eps is a default it tries it as a symbol first, and starts again.
    first = counter.frame_count
    assert first <= 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        run_compiled(compiled, function, make, FIVE_SIZES[1:])
    assert counter.frame_count == first


@pytest.mark.parametrize("op", THREE)
def test_five_sizes_cost_one_compilation(op):
    torch._dynamo.reset()
    function, make = compiled_calls(op)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    assert_one_compilation(compiled, function, make, counter)


@pytest.mark.parametrize("op", THREE)
def test_without_a_hint_five_sizes_cost_at_most_two_compilations(op):
    torch._dynamo.reset()
    function, make = compiled_calls(op)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    run_compiled(compiled, function, make, FIVE_SIZES)
    assert counter.frame_count <= 2


def test_inductor_compiles_a_block_around_the_op_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def block(x, weight):
        q, k, v = (x @ weight).unflatten(2, (3, 2, 16)).unbind(2)
        out = linattn.linear_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).flatten(2)

    def make(n, m):
        return torch.rand(2, n, 32, requires_grad=True), torch.rand(32, 96, requires_grad=True)

    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    assert_one_compilation(compiled, block, make, counter)


def test_exported_programs_keep_the_op_and_take_any_size():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return linattn.linear_attention(q, k, v)

    def make(n, m):
        return torch.rand(1, 2, n, 16), torch.rand(1, 2, m, 16), torch.rand(1, 2, m, 24)

    n, m = torch.export.Dim("n"), torch.export.Dim("m")
    program = torch.export.export(Attention(), make(20, 30), dynamic_shapes=({2: n}, {2: m}, {2: m}))
    assert any("linear_attention" in str(node.target) for node in program.graph.nodes)
    arguments = make(70, 5)
    torch.testing.assert_close(program.module()(*arguments), Attention()(*arguments))


@pytest.mark.parametrize("amp_dtype", [BF16, F16], ids=NAME.get)
def test_autocast_casts_queries_keys_and_values_as_it_does_for_sdpa(amp_dtype):
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    denoms = {"q_denom": torch.randn(1, 2, 8, 16), "k_denom": torch.randn(1, 2, 8, 16).to(BF16)}
    with torch.autocast("cpu", dtype=amp_dtype):
        out = linattn.linear_attention(q, k.half(), v.bfloat16(), **denoms)
        kv, k_sum = linattn.linear_attention_state(k, v)
    assert out.dtype == amp_dtype
    assert kv.dtype == k_sum.dtype == F32
    low = [x.to(amp_dtype) for x in (q, k.half(), v.bfloat16(), *denoms.values())]
    assert torch.equal(out, linattn.linear_attention(*low[:3], q_denom=low[3], k_denom=low[4]))
    out.sum().backward()
    assert all(x.grad.dtype == F32 for x in (q, k, v))


def test_autocast_leaves_the_state_and_float64_as_they_are():
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    kv, k_sum = linattn.linear_attention_state(k, v)
    wide = q.double(), k.double(), v.double()
    with torch.autocast("cpu", dtype=BF16):
        out = linattn.linear_attention_apply(q, kv, k_sum, 8)
        assert linattn.linear_attention(*wide).dtype == F64
    assert torch.equal(out, linattn.linear_attention_apply(q.bfloat16(), kv, k_sum, 8))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 0), (None, 0, 0), (4, 2, None), (-1, 0, 1)], ids=str)
@pytest.mark.parametrize("which", ["linear_attention", "linear_attention_state", "linear_attention_apply", "denoms"])
def test_vmap_equals_a_loop_and_does_not_fall_back_to_one(which, in_dims):
    shapes = [(2, 2, 5, 8)] * 3
    if which == "linear_attention_apply":
        shapes = [(2, 2, 5, 8), (2, 2, 8, 8), (2, 2, 8)]
        in_dims = tuple(None if dim is None else min(dim, len(s)) for dim, s in zip(in_dims, shapes, strict=True))
    tensors = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        x = torch.rand(shape if dim is None else (3, *shape))
        tensors.append(x if dim is None else x.movedim(0, dim))

    def function(a, b, c):
        if which == "linear_attention_state":
            return linattn.linear_attention_state(b, c)
        if which == "linear_attention_apply":
            return linattn.linear_attention_apply(a, b, c, 5)
        if which == "denoms":
            return linattn.linear_attention(a, b, c, q_denom=b, k_denom=a)
        return linattn.linear_attention(a, b, c)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = torch.vmap(function, in_dims)(*tensors)
    slices = [
        [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=True)] for i in range(3)
    ]
    single = [function(*arguments) for arguments in slices]
    if which == "linear_attention_state":
        for i in (0, 1):
            torch.testing.assert_close(mapped[i], torch.stack([x[i] for x in single]), rtol=0, atol=0)
    else:
        torch.testing.assert_close(mapped, torch.stack(single), rtol=0, atol=0)


def test_gradients_flow_through_vmap():
    q, k, v = (torch.rand(3, 1, 2, 5, 8, requires_grad=True) for _ in range(3))
    mapped = torch.autograd.grad(torch.vmap(linattn.linear_attention)(q, k, v).square().sum(), (q, k, v))
    looped = sum(linattn.linear_attention(q[i], k[i], v[i]).square().sum() for i in range(3))
    for x, y in zip(mapped, torch.autograd.grad(looped, (q, k, v)), strict=True):
        assert torch.equal(x, y)


def test_flop_counter_counts_two_per_multiply_add():
    b, h, n, m, d, e = 2, 3, 10, 14, 16, 24
    q, k, v = torch.rand(b, h, n, d), torch.rand(b, h, m, d), torch.rand(b, h, m, e)
    with FlopCounterMode(display=False) as forward:
        linattn.linear_attention(q, k, v)
    assert forward.get_total_flops() == 2 * b * h * (n + m) * d * e
    with FlopCounterMode(display=False) as halves:
        linattn.linear_attention_apply(q, *linattn.linear_attention_state(k, v), m)
    assert halves.get_total_flops() == forward.get_total_flops()
    for x in (q, k, v):
        x.requires_grad_()
    with FlopCounterMode(display=False) as both:
        linattn.linear_attention(q, k, v).sum().backward()
    assert both.get_total_flops() == 3 * forward.get_total_flops()


@on_every_backend()
def test_the_profiler_shows_which_kernel_ran(backend, device):
    q, k, v = (torch.rand(1, 1, 6, 8, device=device, requires_grad=True) for _ in range(3))
    with linattn.use_backend(backend):
        seen = runs(lambda: linattn.linear_attention(q, k, v).sum().backward())
    assert {
        f"linattn::_linear_attention_{backend}",
        f"linattn::_linear_attention_apply_backward_{backend}",
        f"linattn::_linear_attention_state_backward_{backend}",
    } <= seen


# ------------------------------------------------------------------------------------- bad input


def good(op):
    x = torch.rand(2, 3, 6, 16)
    return {
        "linear_attention": {"q": x, "k": x, "v": x},
        "linear_attention_state": {"k": x, "v": x},
        "linear_attention_apply": {"q": x, "kv": torch.rand(2, 3, 16, 16), "k_sum": torch.rand(2, 3, 16), "count": 6},
    }[op]


ATTENTION, STATE, APPLY = THREE
t = torch.rand
BAD = [
    # op, change, exception, words that the message must contain
    (ATTENTION, {"q": t(3, 6, 16)}, ValueError, ["q", "(B, H, N, D)", "(3, 6, 16)"]),
    (ATTENTION, {"k": t(2, 3, 6)}, ValueError, ["k", "(B, H, M, D)", "(2, 3, 6)"]),
    (ATTENTION, {"k": t(2, 4, 6, 16)}, ValueError, ["k", "(2, 3, any, 16)", "(2, 4, 6, 16)"]),
    (ATTENTION, {"k": t(1, 3, 6, 16)}, ValueError, ["k", "(1, 3, 6, 16)"]),
    (ATTENTION, {"k": t(2, 3, 6, 24)}, ValueError, ["k", "(2, 3, 6, 24)"]),
    (ATTENTION, {"v": t(2, 3, 7, 16)}, ValueError, ["v", "(2, 3, 6, any)", "(2, 3, 7, 16)"]),
    (ATTENTION, {"v": t(2, 3, 6, 1, 16)}, ValueError, ["v", "(B, H, M, E)"]),
    (ATTENTION, {"k": t(2, 3, 0, 16), "v": t(2, 3, 0, 16)}, ValueError, ["k", "M >= 1", "(2, 3, 0, 16)"]),
    (ATTENTION, {"v": t(2, 3, 6, HIGH + 1)}, ValueError, ["v", "head dim", f"{LOW}..{HIGH}", str(HIGH + 1)]),
    (ATTENTION, {"v": t(2, 3, 6, LOW - 1)}, ValueError, ["v", "head dim", f"{LOW}..{HIGH}", str(LOW - 1)]),
    *(
        (ATTENTION, dict.fromkeys("qkv", t(2, 3, 6, d)), ValueError, ["q", "head dim", f"{LOW}..{HIGH}", str(d)])
        for d in (LOW - 1, HIGH + 1)
    ),
    (ATTENTION, {"q_denom": t(2, 3, 5, 16)}, ValueError, ["q_denom", "(2, 3, 6, 16)", "(2, 3, 5, 16)"]),
    (ATTENTION, {"k_denom": t(2, 3, 6, 8)}, ValueError, ["k_denom", "(2, 3, 6, 16)", "(2, 3, 6, 8)"]),
    (ATTENTION, {"feature_map": "softmax"}, ValueError, ["feature_map", "elu1", "relu", "identity", "'softmax'"]),
    (ATTENTION, {"q": t(2, 3, 6, 16).half()}, TypeError, ["k", "float16", "float32"]),
    (ATTENTION, {"k": t(2, 3, 6, 16).bfloat16()}, TypeError, ["k", "float32", "bfloat16"]),
    (ATTENTION, {"v": t(2, 3, 6, 16).double()}, TypeError, ["v", "float32", "float64"]),
    (ATTENTION, {"k_denom": t(2, 3, 6, 16).half()}, TypeError, ["k_denom", "float32", "float16"]),
    *(
        (ATTENTION, dict.fromkeys("qkv", torch.ones(2, 3, 6, 16).to(dtype)), TypeError, ["q", str(dtype)[6:]])
        for dtype in (torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    (ATTENTION, {"k": t(2, 3, 6, 16, device="meta")}, ValueError, ["k", "cpu", "meta"]),
    (ATTENTION, {"q_denom": t(2, 3, 6, 16, device="meta")}, ValueError, ["q_denom", "cpu", "meta"]),
    (STATE, {"k": t(6, 16)}, ValueError, ["k", "(B, H, M, D)", "(6, 16)"]),
    (STATE, {"v": t(2, 2, 6, 16)}, ValueError, ["v", "(2, 3, 6, any)", "(2, 2, 6, 16)"]),
    (STATE, {"v": t(2, 3, 6, 16).half()}, TypeError, ["v", "float32", "float16"]),
    (STATE, {"k_denom": t(2, 3, 5, 16)}, ValueError, ["k_denom", "(2, 3, 6, 16)", "(2, 3, 5, 16)"]),
    (STATE, {"feature_map": ""}, ValueError, ["feature_map", "elu1", "''"]),
    (STATE, {"v": t(2, 3, 6, 16, device="meta")}, ValueError, ["v", "cpu", "meta"]),
    (APPLY, {"count": 0}, ValueError, ["count", ">= 1", "0"]),
    (APPLY, {"count": -3}, ValueError, ["count", ">= 1", "-3"]),
    (APPLY, {"kv": t(2, 3, 17, 16)}, ValueError, ["kv", "(2, 3, 16, any)", "(2, 3, 17, 16)"]),
    (APPLY, {"kv": t(2, 3, 16, HIGH + 1)}, ValueError, ["kv", "head dim", str(HIGH + 1)]),
    (APPLY, {"k_sum": t(2, 3, 1, 16)}, ValueError, ["k_sum", "(2, 3, 16)", "(2, 3, 1, 16)"]),
    (APPLY, {"k_sum": torch.ones(2, 3, 16, dtype=torch.int32)}, TypeError, ["k_sum", "int32"]),
    (APPLY, {"kv": torch.ones(2, 3, 16, 16, dtype=torch.complex64)}, TypeError, ["kv", "complex64"]),
    (APPLY, {"q": torch.ones(2, 3, 6, 16, dtype=torch.int64)}, TypeError, ["q", "int64"]),
    (APPLY, {"kv": t(2, 3, 16, 16, device="meta")}, ValueError, ["kv", "cpu", "meta"]),
    (APPLY, {"feature_map": "exp"}, ValueError, ["feature_map", "relu", "'exp'"]),
]


def bad_id(row):
    def describe(value):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{value.device}" if isinstance(value, torch.Tensor) else value

    return f"{row[0]}-" + "-".join(f"{name}={describe(value)}" for name, value in row[1].items())


@pytest.mark.parametrize("raw", [False, True], ids=["linattn", "torch.ops"])
@pytest.mark.parametrize("row", BAD, ids=bad_id)
def test_bad_input_is_refused_before_any_kernel_runs_by_naming_argument_expectation_and_value(row, raw, monkeypatch):
    op, change, exception, words = row
    monkeypatch.setattr(backends, "choose", lambda *_: pytest.fail("a kernel was about to be chosen"))
    function = getattr(ops if raw else linattn, op)
    with pytest.raises((exception, RuntimeError) if raw else exception) as error:
        function(**(good(op) | change))
    assert "linear_attention" in str(error.value)
    for word in words:
        assert word in str(error.value), word


@pytest.mark.parametrize("op", THREE)
def test_good_input_of_the_table_is_accepted(op):
    getattr(linattn, op)(**good(op))


def test_bad_input_is_refused_while_compiling_as_well():
    torch._dynamo.reset()
    compiled = torch.compile(linattn.linear_attention, backend="aot_eager", fullgraph=True)
    x = torch.rand(1, 2, 6, 16)
    with pytest.raises(Exception, match=r"v must have shape"):
        compiled(x, x, x[:, :, :5])


@pytest.mark.parametrize("op", THREE)
def test_options_are_keyword_only(op):
    arguments = good(op)
    with pytest.raises(TypeError, match="positional"):
        getattr(linattn, op)(*arguments.values(), "elu1")
