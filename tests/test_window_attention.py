"""Family B, window_attention and pool_tokens, on every backend: who sees whom, values, gradients, layouts, torch's
subsystems, and everything that must be refused."""

import dataclasses
import functools
import math
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import tester
from helpers.tester import check
from test_linear_attention import NAME, ORDERS, arrange, assert_same_bits, is_dense, runs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import linattn
import linattn.flops
from linattn import backend as backends
from linattn import reference
from linattn.ops.window_attention import HEAD_DIMS

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
KERNEL_DTYPES = (F32, F16, BF16)
#: Backends that promise the same bits for any layout and batch; the reference leaves sums to torch's matmul.
KERNELS = ("cuda", "triton", "cpu")
LOW, HIGH = HEAD_DIMS.start, HEAD_DIMS.stop - 1
ops = torch.ops.linattn


def on_every_backend(op="window_attention", only=backends.BACKENDS):
    return tester.on_every_backend(op, only)


every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
both_orders = pytest.mark.parametrize("text_first", [True, False], ids=["text first", "image first"])

attention = functools.partial(linattn.window_attention, return_lse=True)


# ------------------------------------------------------------------------------------- the formula in low precision


@functools.cache
def pattern(
    height, width, radius, text_length=0, pooled=0, text_first=True, q_row=0, rows=None, q_text_length=None
) -> torch.Tensor:
    """Who sees whom, (queries, keys and pooled keys), said pair by pair. A text token is None."""

    def sequence(text, first_row, rows):
        image = [(y, x) for y in range(first_row, first_row + rows) for x in range(width)]
        return [None] * text + image if text_first else image + [None] * text

    def sees(query, key):
        if query is None or key is None:
            return True
        return math.dist(query, key) ** 2 < radius**2 - 0.5  # squares of distances are whole numbers

    rows = height - q_row if rows is None else rows
    queries = sequence(text_length if q_text_length is None else q_text_length, q_row, rows)
    keys = sequence(text_length, 0, height)
    return torch.tensor(
        [[sees(query, key) for key in keys] + [query is not None] * pooled for query in queries], dtype=torch.bool
    ).reshape(len(queries), len(keys) + pooled)


def plain_attention(q, k, v, height, width, radius, text_length=0, pooled_k=None, pooled_v=None, scale=None, **where):
    """The formula by torch operations in the dtype of q, with a mask: (out, lse)."""
    text = where.get("q_text_length")
    rows = (q.shape[2] - (text_length if text is None else text)) // width if width else 0
    pooled = 0 if pooled_k is None else pooled_k.shape[2]
    mask = pattern(height, width, radius, text_length, pooled, rows=rows, **where).to(q.device)
    if pooled_k is not None:
        k, v = torch.cat([k, pooled_k], 2), torch.cat([v, pooled_v], 2)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def plain_pool(x, weight, height, width):
    """pool_tokens as a product of the patches of a padded grid, in the dtype of x."""
    f = weight.shape[0]
    grid = x.unflatten(2, (height, width)).flatten(0, 1).permute(0, 3, 1, 2)
    if height * width == 0:
        return x[:, :, :0]
    grid = F.pad(grid, (0, -width % f, 0, -height % f), mode="replicate")
    # A product, as the kernels have it: torch.sum adds float32 in a tree, which no other order can be asked to match.
    pooled = grid.unfold(2, f, f).unfold(3, f, f).flatten(-2) @ weight.flatten().to(x.dtype)
    return pooled.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, x.shape[:2])


# ------------------------------------------------------------------------------------- inputs


@dataclasses.dataclass(frozen=True)
class Case:
    height: int = 7
    width: int = 6
    radius: int = 3
    text_length: int = 3
    pooled: int | None = None  # None: no pooled tensors; 0: empty ones
    q_row: int = 0
    rows: int | None = None  # None: all from q_row on
    q_text_length: int | None = None
    text_first: bool = True
    scale: float | None = None
    b: int = 1
    h: int = 1
    d: int = 16
    dtype: torch.dtype = F32
    layout: str = "bhnd"

    def __str__(self):
        words = [f"{self.height}x{self.width}r{self.radius}t{self.text_length}b{self.b}h{self.h}d{self.d}"]
        words += [f"p{self.pooled}"] if self.pooled is not None else []
        words += [f"from{self.q_row}+{self.rows}"] if self.q_row or self.rows is not None else []
        words += [f"qt{self.q_text_length}"] if self.q_text_length is not None else []
        words += [] if self.text_first else ["image_first"]
        words += [] if self.scale is None else [f"scale={self.scale}"]
        words += [NAME[self.dtype]] + ([self.layout] if self.layout != "bhnd" else [])
        return "-".join(words)

    @property
    def options(self):
        names = ("height", "width", "radius", "text_length", "q_row", "q_text_length", "text_first", "scale")
        return {name: getattr(self, name) for name in names}

    @property
    def keys(self):
        return self.text_length + self.height * self.width

    @property
    def queries(self):
        rows = self.height - self.q_row if self.rows is None else self.rows
        return (self.text_length if self.q_text_length is None else self.q_text_length) + rows * self.width

    @property
    def work(self):
        return self.b * self.h * (self.keys + self.queries + (self.pooled or 0)) * max(1, self.d // 32)

    def tensors(self, device="cpu"):
        def tensor(n):
            x = torch.randn(self.b, self.h, n, self.d).to(self.dtype)
            return arrange(x, self.layout).to(device)

        pooled = {} if self.pooled is None else {name: tensor(self.pooled) for name in ("pooled_k", "pooled_v")}
        return {"q": tensor(self.queries), "k": tensor(self.keys), "v": tensor(self.keys)} | pooled


def skip_if_slow(backend, device, case):
    """Triton's interpreter takes about a second for this much; test_triton_window_attention.py asks it for more."""
    if tester.interpreted(backend, device) and (case.work > 80 or case.dtype != BF16):
        pytest.skip("too slow in Triton's interpreter")


@pytest.fixture(autouse=True)
def one_dtype_in_the_interpreter(request):
    """Where a test is there once for each dtype, Triton's interpreter runs one of them."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if (
        parameters.get("backend") == "triton"
        and parameters["device"] == "cpu"
        and parameters.get("dtype", BF16) != BF16
    ):
        pytest.skip("too slow in Triton's interpreter")


CASES = [
    # every dtype: the whole pattern in both orders, in the layout of diffusers and with padded rows
    *(Case(dtype=dtype, pooled=4, h=2, layout="bnhd") for dtype in KERNEL_DTYPES),
    *(Case(dtype=dtype, pooled=4, text_first=False, b=2) for dtype in KERNEL_DTYPES),
    # radii: one token, squares, disks, beyond the grid, beyond 64 bits when squared
    *(Case(radius=radius, dtype=dtype) for radius in (1, 2, 5, 9, 100, 2**40) for dtype in (F32, BF16)),
    # grids: not square, odd, a line, a point, wider than a tile
    *(
        Case(height=height, width=width, radius=radius, dtype=dtype)
        for height, width, radius in ((1, 1, 2), (1, 19, 3), (19, 1, 3), (2, 37, 4), (13, 5, 6))
        for dtype in (F32, BF16)
    ),
    Case(height=17, width=23, radius=5, dtype=F16),
    # text: none, one, more than a tile; only text
    *(Case(text_length=text, dtype=dtype) for text in (0, 1, 70) for dtype in (F32, BF16)),
    *(Case(height=0, width=width, text_length=9, dtype=dtype) for width in (0, 4) for dtype in (F32, BF16)),
    Case(height=0, width=0, text_length=9, text_first=False, d=40),
    # pooled: empty, one, more than a tile
    *(Case(pooled=pooled, dtype=dtype) for pooled in (0, 1, 70) for dtype in (F32, BF16)),
    Case(pooled=5, text_length=0, dtype=F16),
    # strips: a part of the rows, no text or other text in them, no image at all
    *(Case(q_row=2, rows=3, q_text_length=0, dtype=dtype) for dtype in KERNEL_DTYPES),
    *(Case(q_row=5, pooled=2, h=3, text_first=text_first) for text_first in (True, False)),
    Case(rows=1, q_text_length=7, dtype=BF16),
    Case(rows=1, q_text_length=7, text_first=False, text_length=0),
    Case(q_row=3, rows=0, q_text_length=4, text_first=False),
    Case(q_row=7, rows=0),
    # head dims: smallest, largest, odd, those of the models
    *(Case(height=4, width=4, d=d, dtype=dtype) for d in (8, 9, 33, 64, 80, 128, 255, 256) for dtype in (F32, BF16)),
    Case(height=4, width=4, d=40, dtype=F16, layout="bhnd+3"),
    Case(height=4, width=4, d=128, dtype=F16, pooled=3),
    # scales
    *(Case(scale=scale, dtype=dtype) for scale in (1.0, 0.0, -0.4) for dtype in (F32, BF16)),
    # empty
    *(Case(b=0, dtype=dtype) for dtype in (F32, BF16)),
    Case(h=0),
    Case(rows=0, q_text_length=0, pooled=3),
    # memory
    *(
        Case(b=2, h=2, height=2, width=3, radius=2, pooled=2, dtype=dtype, layout=layout)
        for layout in ("nbhd", "hnbd", "bnhd+3", "bnhd/2", "bhdn")
        for dtype in (F32, BF16)
    ),
    # more than one tile in every direction
    *(Case(height=33, width=40, radius=8, text_length=77, d=64, dtype=dtype, layout="bnhd") for dtype in KERNEL_DTYPES),
    Case(height=20, width=21, radius=12, text_length=40, pooled=30, h=2, d=40, text_first=False),
    Case(height=48, width=9, radius=4, q_row=11, rows=30, text_length=5, d=32, dtype=BF16),
]


@on_every_backend()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_lse_and_gradients_keep_within_the_rule(case, backend, device):
    skip_if_slow(backend, device, case)
    results = check(attention, reference.window_attention, plain_attention, case.tensors(device), case.options, backend)
    assert results["output 0"].dtype == case.dtype
    assert results["output 1"].dtype == F32
    assert results["output 1"].is_contiguous()


# ------------------------------------------------------------------------------------- who sees whom

PATTERNS = [
    Case(pooled=4),
    Case(pooled=4, text_first=False),
    Case(height=1, width=40, radius=4),
    Case(height=9, width=4, radius=2, text_length=0),
    Case(height=6, width=7, radius=5, q_row=2, rows=3, q_text_length=2),
    Case(height=6, width=7, radius=100, pooled=1),
    Case(height=9, width=9, radius=1, text_length=1),
    Case(height=12, width=13, radius=5, text_length=9, pooled=12, d=256),
    Case(height=15, width=15, radius=7, text_length=0, d=256),
]


@on_every_backend()
@pytest.mark.parametrize("case", PATTERNS, ids=str)
def test_a_query_sees_exactly_the_keys_of_the_definition(case, backend, device):
    """Equal scores share the weight equally, and values that are unit vectors show who got it."""
    if tester.interpreted(backend, device) and case.d > 100:
        pytest.skip("too slow in Triton's interpreter")
    expected = pattern(
        *(case.height, case.width, case.radius, case.text_length, case.pooled or 0, case.text_first, case.q_row),
        *(case.rows, case.q_text_length),
    )
    count = expected.sum(1)
    case = dataclasses.replace(case, d=max(8, expected.shape[1]))
    tensors = {name: torch.zeros_like(x) for name, x in case.tensors(device).items()}
    units = torch.eye(case.d, device=device)[: expected.shape[1]]
    tensors["v"][:] = units[: case.keys]
    if case.pooled:
        tensors["pooled_v"][:] = units[case.keys :]
    with linattn.use_backend(backend):
        out, lse = attention(**tensors, **case.options)
    seen = out[0, 0, :, : expected.shape[1]].cpu() > 0
    assert torch.equal(seen, expected)
    assert torch.equal(lse[0, 0].exp().round().long().cpu(), count)


@on_every_backend()
@both_orders
@every_dtype
def test_a_window_that_covers_everything_is_dense_attention(dtype, text_first, backend, device):
    case = Case(height=5, width=8, radius=10, h=2, dtype=dtype, text_first=text_first)

    def dense(q, k, v, **_):
        return F.scaled_dot_product_attention(q, k, v)

    check(linattn.window_attention, dense, dense, case.tensors(device), case.options, backend)


@on_every_backend()
@every_dtype
def test_radius_1_without_text_returns_the_values(dtype, backend, device):
    case = Case(radius=1, text_length=0, h=2, dtype=dtype)
    tensors = case.tensors(device)
    with linattn.use_backend(backend):
        out, lse = attention(**tensors, **case.options)
    assert torch.equal(out, tensors["v"])
    own = (tensors["q"].double() * tensors["k"].double()).sum(-1) * case.d**-0.5
    torch.testing.assert_close(lse.double(), own, rtol=1e-5, atol=1e-5)


def on_grid(function, x, case):
    """function of the image tokens as a grid (B, H, height, width, D); the text stays as it is."""
    text, image = x[:, :, : case.text_length], x[:, :, case.text_length :]
    return torch.cat([text, function(image.unflatten(2, (case.height, case.width))).flatten(2, 3)], 2)


@on_every_backend()
@every_dtype
def test_shifting_the_canvas_shifts_the_interior(dtype, backend, device):
    case, shift = Case(height=10, width=9, radius=3, dtype=dtype, d=8), (2, 1)
    tensors = case.tensors(device)

    def interior(attention, tensors):
        out, _ = attention(**tensors, **case.options)
        return out[:, :, case.text_length :].unflatten(2, (case.height, case.width))[:, :, 2:-2, 2:-2]

    def shifted(attention, tensors):
        moved = {name: on_grid(lambda x: x.roll(shift, (2, 3)), x, case) for name, x in tensors.items()}
        return interior(attention, moved)

    wide = {name: x.double() for name, x in tensors.items()}
    with linattn.use_backend(backend):
        out = shifted(attention, tensors)
    # What had no border in sight before and has none now.
    truth, plain = interior(reference.window_attention, wide), interior(plain_attention, tensors)
    dy, dx = shift
    expected, rough = (x[:, :, :-dy, :-dx] for x in (truth, plain))
    tester.assert_within_rule("interior", out[:, :, dy:, dx:], expected, rough)
    assert not torch.allclose(out[:, :, dy:, dx:].double(), truth[:, :, dy:, dx:], atol=0.1)


@on_every_backend()
@every_dtype
def test_transposing_the_grid_transposes_the_result(dtype, backend, device):
    case = Case(height=6, width=9, radius=4, dtype=dtype, d=8)

    def transposed(q, k, v, height, width, **options):
        q, k, v = (on_grid(lambda x: x.transpose(2, 3), x, case) for x in (q, k, v))
        out, lse = attention(q, k, v, width, height, **options)
        turned = dataclasses.replace(case, height=width, width=height)
        lse = on_grid(lambda x: x.transpose(2, 3), lse.unsqueeze(-1), turned).squeeze(-1)
        return on_grid(lambda x: x.transpose(2, 3), out, turned), lse

    check(transposed, reference.window_attention, plain_attention, case.tensors(device), case.options, backend)


@on_every_backend()
@every_dtype
def test_image_first_is_the_same_attention_in_another_order(dtype, backend, device):
    case = Case(dtype=dtype, pooled=3)

    def reordered(q, k, v, text_first, **options):
        def image_first(x):
            return torch.cat([x[:, :, case.text_length :], x[:, :, : case.text_length]], 2)

        def text_first(x):
            image = x.shape[2] - case.text_length
            return torch.cat([x[:, :, image:], x[:, :, :image]], 2)

        results = attention(image_first(q), image_first(k), image_first(v), text_first=False, **options)
        return tuple(text_first(x) for x in results)

    check(reordered, reference.window_attention, plain_attention, case.tensors(device), case.options, backend)


@on_every_backend()
@pytest.mark.parametrize("with_halo", [False, True], ids=["all keys", "keys of the halo"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAME.get)
def test_strips_concatenate_to_the_whole(dtype, with_halo, backend, device):
    case = Case(height=8, width=5, radius=3, dtype=dtype, pooled=2)
    strips = [(0, 3), (3, 1), (4, 4)]

    def by_strips(function):
        def call(q, k, v, q_row, q_text_length, height, width, radius, text_length, **options):
            def rows(x, first, stop):
                return x[:, :, text_length + first * width : text_length + stop * width]

            def keys(x, first, stop):
                return torch.cat([x[:, :, :text_length], rows(x, first, stop)], 2)

            # The text queries see the whole picture: a strip without rows.
            parts = [function(q[:, :, :text_length], k, v, height, width, radius, text_length=text_length, **options)]
            for row, count in strips:
                first, stop = max(0, row - radius + 1), min(height, row + count + radius - 1)
                first, stop = (first, stop) if with_halo else (0, height)
                tensors = rows(q, row, row + count), keys(k, first, stop), keys(v, first, stop)
                where = {"text_length": text_length, "q_row": row - first, "q_text_length": 0}
                parts.append(function(*tensors, stop - first, width, radius, **where, **options))
            return tuple(torch.cat(x, 2) for x in zip(*parts, strict=True))

        return call

    tensors = case.tensors(device)
    check(by_strips(attention), reference.window_attention, by_strips(plain_attention), tensors, case.options, backend)


def merged(function, parts):
    """Attention over the union of disjoint sets of keys from the (out, lse) of each."""
    outs, lses = zip(*(function(*tensors, **options) for tensors, options in parts), strict=True)
    lses = torch.stack(lses)
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().unsqueeze(-1)
    return (weights * torch.stack(outs)).sum(0).to(outs[0].dtype), lse


@on_every_backend()
@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAME.get)
def test_text_and_image_keys_merge_by_lse_to_the_whole_forward_and_backward(dtype, backend, device):
    case = Case(dtype=dtype)

    def halves(function):
        def call(q, k, v, height, width, radius, text_length, **_):
            text, image = ((k[:, :, part], v[:, :, part]) for part in (slice(text_length), slice(text_length, None)))
            over_text = {"height": 0, "width": 0, "radius": 1, "text_length": text_length, "q_text_length": q.shape[2]}
            over_image = {"height": height, "width": width, "radius": radius, "q_text_length": text_length}
            return merged(function, [((q, *text), over_text), ((q, *image), over_image)])

        return call

    tensors = case.tensors(device)
    check(halves(attention), reference.window_attention, halves(plain_attention), tensors, case.options, backend)


@on_every_backend()
def test_text_queries_over_the_parts_of_a_picture_merge_by_lse_to_the_whole(backend, device):
    """What ranks that hold strips of the picture do: the text keys are counted by one of them."""
    case = Case(height=6, width=5, rows=0)

    def ranks(function):
        def call(q, k, v, height, width, radius, text_length, **_):
            parts = []
            for first, stop in ((0, text_length + 2 * width), (text_length + 2 * width, k.shape[2])):
                where = {"height": 2 if first == 0 else 4, "width": width, "radius": radius}
                where |= {"text_length": text_length if first == 0 else 0, "q_text_length": q.shape[2]}
                parts.append(((q, k[:, :, first:stop], v[:, :, first:stop]), where))
            return merged(function, parts)

        return call

    tensors = case.tensors(device)
    check(ranks(attention), reference.window_attention, ranks(plain_attention), tensors, case.options, backend)


@on_every_backend()
@every_dtype
def test_pooled_keys_are_more_keys_for_the_image_and_none_for_the_text(dtype, backend, device):
    case = Case(height=4, width=5, radius=10, pooled=6, dtype=dtype)

    def dense(q, k, v, pooled_k, pooled_v, text_length, **_):
        text = F.scaled_dot_product_attention(q[:, :, :text_length], k, v)
        k, v = torch.cat([k, pooled_k], 2), torch.cat([v, pooled_v], 2)
        return torch.cat([text, F.scaled_dot_product_attention(q[:, :, text_length:], k, v)], 2)

    check(linattn.window_attention, dense, dense, case.tensors(device), case.options, backend)


@on_every_backend()
def test_a_query_without_any_key_gives_zero_and_minus_infinity(backend, device):
    q, k = torch.randn(2, 1, 3, 16, device=device), torch.randn(2, 1, 0, 16, device=device)
    leaves = [x.requires_grad_() for x in (q, k, k.clone())]
    with linattn.use_backend(backend):
        out, lse = attention(*leaves, 0, 5, 2, q_text_length=3)
        out.sum().backward()
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    assert (leaves[0].grad == 0).all()
    assert leaves[1].grad.shape == leaves[2].grad.shape == k.shape


@on_every_backend()
def test_pooled_keys_of_a_grid_without_queries_get_gradient_zero(backend, device):
    case = Case(height=0, width=3, pooled=4)
    tensors = case.tensors(device)
    upstream = torch.randn_like(tensors["q"]), torch.randn_like(tensors["q"][..., 0])
    with linattn.use_backend(backend):
        results = tester.evaluate(attention, tensors, case.options, upstream)
    assert (results["gradient of pooled_k"] == 0).all()
    assert (results["gradient of pooled_v"] == 0).all()


# ------------------------------------------------------------------------------------- pooling


@dataclasses.dataclass(frozen=True)
class Pool:
    height: int
    width: int
    f: int
    b: int = 1
    h: int = 3
    d: int = 16
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype = F32
    layout: str = "bhnd"

    def __str__(self):
        words = [f"{self.height}x{self.width}f{self.f}b{self.b}h{self.h}d{self.d}", NAME[self.dtype]]
        return "-".join([*words, f"weight_{NAME[self.weight_dtype]}", self.layout])

    @property
    def grid(self):
        return {"height": self.height, "width": self.width}

    def tensors(self, device="cpu"):
        x = torch.randn(self.b, self.h, self.height * self.width, self.d).to(self.dtype)
        weight = torch.randn(self.f, self.f).to(device=device, dtype=self.weight_dtype)
        return {"x": arrange(x, self.layout).to(device), "weight": weight}


POOLS = [
    *(Pool(8, 4, 4, dtype=dtype, layout="bnhd") for dtype in KERNEL_DTYPES),
    *(Pool(7, 9, f, dtype=dtype) for f in (1, 2, 3, 4) for dtype in (F32, BF16)),
    *(Pool(height, width, 4) for height, width in ((1, 1), (1, 9), (9, 1), (3, 2), (0, 3), (0, 0))),
    *(Pool(5, 6, 2, d=d, dtype=dtype) for d in (8, 40, 80, 255, 256) for dtype in (F32, BF16)),
    *(Pool(4, 5, 2, dtype=BF16, weight_dtype=dtype) for dtype in (BF16, F64)),
    *(Pool(4, 5, 2, b=2, layout=layout) for layout in ("nbhd", "hnbd", "bhnd+3", "bnhd/2", "bhdn")),
    Pool(4, 5, 2, b=0),
    Pool(64, 65, 4, d=64, dtype=BF16),
    Pool(33, 40, 3, d=128),
]


@on_every_backend("pool_tokens")
@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pooling_keeps_within_the_rule(case, backend, device):
    if tester.interpreted(backend, device) and (case.height * case.width > 40 or case.dtype != BF16):
        pytest.skip("too slow in Triton's interpreter")
    tensors = case.tensors(device)
    options = case.grid | {"weight": tensors.pop("weight")}
    results = check(linattn.pool_tokens, reference.pool_tokens, plain_pool, tensors, options, backend)
    assert results["output 0"].dtype == case.dtype


@on_every_backend("pool_tokens")
@pytest.mark.parametrize("case", [case for case in POOLS if case.height * case.width < 200], ids=str)
def test_the_gradient_of_the_pooling_weight_keeps_within_the_rule(case, backend, device):
    """Of many weights at a time: maxima over the four numbers of a 2 x 2 weight would compare luck with luck."""
    if tester.interpreted(backend, device) and (case.dtype != BF16 or case.d != 16 or case.f > 3):
        pytest.skip("too slow in Triton's interpreter")
    count = 4 if tester.interpreted(backend, device) else 40
    tensors = case.tensors(device)
    tensors["weight"] = torch.randn(count, case.f, case.f).to(tensors["weight"])

    def with_each(pool):
        return lambda x, weight, **grid: torch.stack([pool(x, each, **grid) for each in weight])

    kinds = (with_each(pool) for pool in (linattn.pool_tokens, reference.pool_tokens, plain_pool))
    results = check(*kinds, tensors, case.grid, backend)
    assert results["gradient of weight"].dtype == case.weight_dtype


@on_every_backend("pool_tokens")
def test_equal_weights_are_average_pooling(backend, device):
    case = Pool(8, 12, 4)
    x = case.tensors(device)["x"]
    with linattn.use_backend(backend):
        out = linattn.pool_tokens(x, torch.full((4, 4), 1 / 16, device=device), **case.grid)
    grid = x[0].unflatten(1, (8, 12)).permute(0, 3, 1, 2)
    torch.testing.assert_close(out[0], F.avg_pool2d(grid, 4).flatten(2).mT)


@on_every_backend("pool_tokens")
def test_a_patch_beyond_the_edge_reads_the_nearest_token(backend, device):
    x = torch.arange(6.0, device=device).reshape(1, 1, 6, 1).repeat(1, 1, 1, 8)  # 2 x 3: [0 1 2 / 3 4 5]
    weight = torch.zeros(4, 4, device=device)
    weight[3, 3] = 1
    with linattn.use_backend(backend):
        assert (linattn.pool_tokens(x, weight, 2, 3) == 5).all()
        assert (linattn.pool_tokens(x, weight.roll(1, 0), 2, 3) == 2).all()
        assert (linattn.pool_tokens(x, weight.roll(1, 1), 2, 3) == 3).all()


@on_every_backend("pool_tokens")
def test_pooled_tokens_lie_densely_in_the_order_of_the_image(backend, device):
    for layout in ORDERS:
        x = Pool(5, 6, 2, b=2, h=3, layout=layout).tensors(device)["x"]
        with linattn.use_backend(backend):
            out = linattn.pool_tokens(x, torch.ones(2, 2, device=device), 5, 6)
        meta = linattn.pool_tokens(
            torch.empty_strided(x.shape, x.stride(), device="meta"), torch.ones(2, 2, device="meta"), 5, 6
        )
        assert out.shape == meta.shape == (2, 3, 9, 16)
        assert is_dense(out)
        assert out.stride() == meta.stride()
        assert sorted(range(3), key=lambda dim: -out.stride(dim)) == sorted(range(3), key=lambda dim: -x.stride(dim))


def attention_with_pooling(q, k, v, weight, height, width, radius, text_length, functions):
    attend, pool = functions
    pooled_k, pooled_v = (pool(x[:, :, text_length:], weight, height, width) for x in (k, v))
    return attend(q, k, v, height, width, radius, text_length=text_length, pooled_k=pooled_k, pooled_v=pooled_v)


@on_every_backend()
@every_dtype
def test_gradients_flow_through_pooled_keys_and_values_into_the_weight(dtype, backend, device):
    case = Case(height=5, width=6, dtype=dtype)
    tensors = case.tensors(device) | {"weight": torch.randn(2, 2, device=device) / 4}
    options = {name: case.options[name] for name in ("height", "width", "radius", "text_length")}
    kinds = [
        functools.partial(attention_with_pooling, functions=functions)
        for functions in (
            (attention, linattn.pool_tokens),
            (reference.window_attention, reference.pool_tokens),
            (plain_attention, plain_pool),
        )
    ]
    results = check(*kinds, tensors, options, backend)
    assert results["gradient of weight"].abs().max() > 0.01


# ------------------------------------------------------------------------------------- memory layout


@on_every_backend()
@pytest.mark.parametrize("layout", ORDERS)
def test_output_is_dense_in_the_order_of_q_with_the_head_dim_innermost(layout, backend, device):
    case = Case(b=2, h=3, height=2, width=2, layout=layout)
    tensors = case.tensors(device)
    with linattn.use_backend(backend):
        out, lse = attention(**tensors, **case.options)
        shadows = {name: torch.empty_strided(x.shape, x.stride(), device="meta") for name, x in tensors.items()}
        meta = attention(**shadows, **case.options)
    assert out.stride(3) == 1
    assert is_dense(out)
    slowest_first = sorted(range(3), key=lambda dim: -tensors["q"].stride(dim))
    assert sorted(range(3), key=lambda dim: -out.stride(dim)) == slowest_first
    for real, fake in zip((out, lse), meta, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@on_every_backend()
def test_flattening_the_heads_of_a_transposed_result_is_a_view(backend, device):
    b, n, h, d = 2, 12, 3, 16
    q, k, v = (torch.randn(b, n, h * d, device=device).unflatten(2, (h, d)).transpose(1, 2) for _ in range(3))
    with linattn.use_backend(backend):
        out = linattn.window_attention(q, k, v, 3, 4, 2)
    assert out.transpose(1, 2).view(b, n, h * d).data_ptr() == out.data_ptr()


@on_every_backend(only=("cpu", "cuda"))
def test_a_fused_projection_is_read_in_place(backend, device):
    buffer = torch.randn(2, 12, 3, 3, 16, dtype=BF16, device=device)
    q, k, v = (x.transpose(1, 2) for x in buffer.unbind(2))
    with linattn.use_backend(backend):
        seen = runs(lambda: linattn.window_attention(q, k, v, 3, 4, 2))
    assert f"linattn::_window_attention_{backend}" in seen
    assert not seen & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"}


@on_every_backend()
def test_broadcast_tensors_count_once_for_every_head(backend, device):
    case = Case(b=2, h=2, height=3, width=4)
    tensors = case.tensors(device)
    tensors |= {"k": torch.randn(2, 1, case.keys, 16, device=device).expand(2, 2, case.keys, 16)}
    tensors |= {"v": torch.randn(1, 1, case.keys, 16, device=device).expand(2, 2, case.keys, 16)}
    check(attention, reference.window_attention, plain_attention, tensors, case.options, backend)


@on_every_backend(only=KERNELS)
def test_element_offsets_beyond_2_to_the_31_reach_the_right_tokens(tmp_path, backend, device):
    h, d, case = 2, 40, Case(height=4, width=4, h=2, d=40, dtype=BF16)
    n, width = case.keys, 4 * h * d
    step, total = 2**27, (case.keys - 1) * 2**27 + width
    assert (n - 1) * step > 2**31
    if device == "cpu":
        flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=total, dtype=BF16)
    else:
        flat = torch.zeros(total, dtype=BF16, device=device)
    buffer = flat.as_strided((n, width), (step, 1))
    buffer.copy_(torch.randn(n, width))
    q, k, v, grad = (x.transpose(0, 1).unsqueeze(0) for x in buffer.unflatten(1, (4, h, d)).unbind(1))
    near = {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous()}
    lse = torch.randn(1, h, n, device=device)
    with linattn.use_backend(backend):
        far = tester.evaluate(attention, {"q": q, "k": k, "v": v}, case.options, (grad, lse))
        expected = tester.evaluate(attention, near, case.options, (grad.contiguous(), lse))
    (tmp_path / "sparse").unlink(missing_ok=True)
    assert_same_bits(far, expected)


# ------------------------------------------------------------------------------------- hard numbers


def by_lse(*args, **kwargs):
    """plain_attention with probabilities exp(score - lse): how every kernel gets them back on the way back.

    Where one score of hundreds takes all the weight, softmax gives 1 and this 1 + the rounding of that score.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", lambda x, dim: (x - x.logsumexp(dim, keepdim=True)).exp())
        return plain_attention(*args, **kwargs)


@on_every_backend()
@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAME.get)
def test_saturated_scores_keep_within_the_rule(dtype, backend, device):
    case = Case(height=6, width=7, pooled=2, dtype=dtype)
    tensors = {name: x if name.endswith("v") else 12 * x for name, x in case.tensors(device).items()}
    definition = reference.window_attention
    check(attention, definition, plain_attention, tensors, case.options, backend, gradients=False)
    check(attention, definition, by_lse if dtype == F32 else plain_attention, tensors, case.options, backend)


@on_every_backend()
@pytest.mark.parametrize("sign", [1, -1])
def test_float16_scores_beyond_its_range_do_not_overflow(sign, backend, device):
    case = Case(height=4, width=5, dtype=F16)
    tensors = case.tensors(device)
    tensors |= {"q": 200 + torch.rand_like(tensors["q"]), "k": sign * (200 + torch.rand_like(tensors["k"]))}
    upstream = torch.randn_like(tensors["q"]), torch.randn_like(tensors["q"][..., 0])
    with linattn.use_backend(backend):
        results = tester.evaluate(attention, tensors, case.options, upstream)
    for name, x in results.items():
        assert x.isfinite().all(), name
    assert results["output 1"].abs().min() > torch.finfo(F16).max


@on_every_backend()
@every_dtype
def test_nan_in_a_query_stays_in_its_row(dtype, backend, device):
    case = Case(h=2, dtype=dtype, pooled=2)
    tensors = case.tensors(device)
    with linattn.use_backend(backend):
        clean = attention(**tensors, **case.options)
        for token in (1, 20):  # a text query, an image query
            tensors["q"][0, 1, token, 3] = float("nan")
        found = attention(**tensors, **case.options)
    for x, y in zip(found, clean, strict=True):
        assert x[0, 1, [1, 20]].isnan().all()
        x[0, 1, [1, 20]] = y[0, 1, [1, 20]] = 0
        assert torch.equal(x, y)


@on_every_backend()
@every_dtype
@pytest.mark.parametrize("name", ["k", "v", "pooled_k", "pooled_v"])
def test_nan_in_a_key_or_value_reaches_every_query_that_sees_it_and_no_other_head(name, dtype, backend, device):
    case, token = Case(h=2, dtype=dtype, pooled=2), 20
    tensors = case.tensors(device)
    with linattn.use_backend(backend):
        clean = attention(**tensors, **case.options)
        token = token if len(name) == 1 else 1
        tensors[name][0, 1, token, 3] = float("nan")
        found = attention(**tensors, **case.options)
    sees = pattern(case.height, case.width, case.radius, case.text_length, 2)
    sees = sees[:, token if len(name) == 1 else case.keys + 1]
    assert 0 < sees.sum() < len(sees)
    reached = found[0][0, 1] if name.endswith("k") else found[0][0, 1, :, 3:4]
    assert reached[sees].isnan().all()
    if name.endswith("k"):
        assert found[1][0, 1][sees].isnan().all()
    else:
        assert torch.equal(found[1], clean[1])
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[0, 0], y[0, 0])


@on_every_backend()
@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAME.get)
def test_infinity_in_a_value_is_infinite_where_it_is_seen(dtype, backend, device):
    case = Case(dtype=dtype)
    tensors = case.tensors(device)
    tensors["v"][0, 0, 20, 3] = float("inf")
    with linattn.use_backend(backend):
        out = linattn.window_attention(**tensors, **case.options)
    sees = pattern(case.height, case.width, case.radius, case.text_length)[:, 20]
    assert (out[0, 0, sees, 3] == float("inf")).all()
    assert out[0, 0, sees][:, [0, 1, 2, *range(4, 16)]].isfinite().all()


# ------------------------------------------------------------------------------------- determinism


def everything(backend, tensors, options):
    """Results and gradients, for gradients from above that do not depend on the batch."""
    shape = tensors["q"].shape
    upstream = torch.linspace(-1, 1, shape[1:].numel()).reshape(1, *shape[1:]).expand(shape)
    upstream = upstream.to(tensors["q"]), upstream[..., 0].contiguous().to(tensors["q"].device)
    with linattn.use_backend(backend):
        return tester.evaluate(attention, tensors, options, upstream)


@on_every_backend()
@every_dtype
def test_two_runs_give_the_same_bits(dtype, backend, device):
    case = Case(pooled=3, dtype=dtype)
    if not tester.interpreted(backend, device):
        case = dataclasses.replace(case, height=30, width=29, radius=6, text_length=70, h=2, d=40)
    tensors = case.tensors(device)
    first, second = (everything(backend, tensors, case.options) for _ in range(2))
    assert_same_bits(first, second)


@on_every_backend(only=("cpu",))
@every_dtype
def test_any_number_of_threads_gives_the_same_bits(dtype, backend, device):
    case = Case(height=30, width=29, radius=6, text_length=70, pooled=9, b=1, h=3, d=40, dtype=dtype)
    tensors = case.tensors(device)
    pool = Pool(33, 40, 4, dtype=dtype).tensors(device)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found = everything(backend, tensors, case.options)
        upstream = (torch.linspace(-1, 1, 3 * 90 * 16).reshape(1, 3, 90, 16).to(dtype),)
        with linattn.use_backend(backend):
            pooled = tester.evaluate(linattn.pool_tokens, pool, {"height": 33, "width": 40}, upstream)
        results.append(found | {f"pool: {name}": x for name, x in pooled.items()})
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@on_every_backend(only=KERNELS)
@every_dtype
@pytest.mark.parametrize("large", [False, True])
def test_a_sample_gives_the_same_bits_alone_and_in_a_batch(large, dtype, backend, device):
    case = Case(b=3, height=3, width=4, dtype=dtype, pooled=2, layout="bnhd")
    if large:
        case = dataclasses.replace(case, height=20, width=30, radius=5, text_length=70, h=2, d=40)
    skip_if_slow(backend, device, case)
    tensors = case.tensors(device)
    together = everything(backend, tensors, case.options)
    for i in range(3):
        alone = everything(backend, {key: x[i : i + 1] for key, x in tensors.items()}, case.options)
        assert_same_bits(alone, {name: x[i : i + 1] for name, x in together.items()})


# ------------------------------------------------------------------------------------- hypothesis


@st.composite
def small_cases(draw, dtypes, layouts=("bhnd",)):
    height, width = draw(st.integers(0, 11)), draw(st.integers(0, 11))
    q_row = draw(st.integers(0, height))
    return Case(
        height=height,
        width=width,
        radius=draw(st.integers(1, 14)),
        # A query without any key has an lse that is not finite, which other tests ask for.
        text_length=draw(st.integers(0 if height * width else 1, 9)),
        pooled=draw(st.one_of(st.none(), st.integers(0, 9))),
        q_row=q_row,
        rows=draw(st.one_of(st.none(), st.integers(0, height - q_row))),
        q_text_length=draw(st.one_of(st.none(), st.integers(0, 9))),
        text_first=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3, -0.2])),
        b=draw(st.integers(1, 2)),
        h=draw(st.integers(1, 2)),
        d=draw(st.integers(8, 48)),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(layouts)),
    )


FUZZ = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


def query_by_query(case, q, k, v, pooled_k=None, pooled_v=None):
    """The definition once more: one query at a time, over the list of the keys that it sees."""
    where = case.text_first, case.q_row, case.rows, case.q_text_length
    sees = pattern(case.height, case.width, case.radius, case.text_length, case.pooled or 0, *where)
    if pooled_k is not None:
        k, v = torch.cat([k, pooled_k], 2), torch.cat([v, pooled_v], 2)
    scale = case.d**-0.5 if case.scale is None else case.scale
    outs, lses = [], []
    for i in range(q.shape[2]):
        scores = scale * (k[:, :, sees[i]] @ q[:, :, i, :, None]).squeeze(-1)
        lses.append(scores.logsumexp(-1))
        outs.append((scores.softmax(-1).unsqueeze(-1) * v[:, :, sees[i]]).sum(2))
    empty = q[:, :, :0]
    return torch.stack(outs, 2) if outs else empty, torch.stack(lses, 2) if lses else empty[..., 0]


@FUZZ
@hypothesis.given(case=small_cases([F64]), at_once=st.sampled_from([2**22, 3000, 1]), seed=st.integers(0, 2**16))
def test_the_definition_and_its_gradients_equal_a_loop_over_queries_for_any_chunk_of_them(case, at_once, seed):
    torch.manual_seed(seed)
    tensors = case.tensors()
    upstream = torch.randn_like(tensors["q"]), torch.randn_like(tensors["q"][..., 0])
    expected = tester.evaluate(functools.partial(query_by_query, case), tensors, {}, upstream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_SCORES_AT_ONCE", at_once)
        by_hand = tester.evaluate(attention, tensors, case.options, upstream)
        by_autograd = tester.evaluate(reference.window_attention, tensors, case.options, upstream)
    for what, x in expected.items():
        torch.testing.assert_close(
            by_hand[what], x, rtol=1e-11, atol=1e-11, msg=lambda text, what=what: f"{what}: {text}"
        )
        torch.testing.assert_close(by_autograd[what], x, rtol=1e-11, atol=1e-11)


LAYOUTS = ("bhnd", "bnhd", "nbhd", "hnbd", "bhdn", "bhnd+3", "bnhd+3", "bhnd/2")


@on_every_backend(only=("cpu", "cuda"))
@FUZZ
@hypothesis.given(case=small_cases(KERNEL_DTYPES, LAYOUTS), seed=st.integers(0, 2**16))
def test_any_small_case_keeps_within_the_rule(backend, device, case, seed):
    # The rule compares maxima of noise: over a handful of numbers (lse has one for each query) it compares luck, and so
    # it does where hardly any key is seen and float32 leaves nothing but the rounding of differences that are zero.
    numbers = case.b * case.h * case.queries
    case = dataclasses.replace(case, b=case.b * -(-64 // numbers) if numbers else case.b)
    tensors = case.tensors(device)
    if case.dtype != F32:
        check(attention, reference.window_attention, plain_attention, tensors, case.options, backend)
        return
    upstream = torch.randn_like(tensors["q"]), torch.randn_like(tensors["q"][..., 0])
    with linattn.use_backend(backend):
        found = tester.evaluate(attention, tensors, case.options, upstream)
    wide = {name: x.double() for name, x in tensors.items()}
    for what, truth in tester.evaluate(reference.window_attention, wide, case.options, upstream).items():
        # What the README of CLEAR's goldens gives float32: 5e-6 for results, 2e-5 for gradients.
        bound = 2e-5 if what.startswith("gradient") else 5e-6
        torch.testing.assert_close(found[what].double(), truth, rtol=bound, atol=bound)


# ------------------------------------------------------------------------------------- autograd

DOUBLE = Case(height=2, width=3, radius=2, text_length=2, d=8, dtype=F64)
DOUBLES = [
    DOUBLE,
    dataclasses.replace(DOUBLE, pooled=2, text_first=False),
    dataclasses.replace(DOUBLE, q_row=1, rows=1, q_text_length=1, scale=0.7),
    dataclasses.replace(DOUBLE, text_length=0, radius=100),
    dataclasses.replace(DOUBLE, height=0, width=0),
]


@pytest.mark.parametrize("case", DOUBLES, ids=str)
def test_gradients_of_output_and_lse_are_those_of_finite_differences(case):
    tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}

    def function(*leaves):
        return attention(**dict(zip(tensors, leaves, strict=True)), **case.options)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize(("height", "width", "f"), [(4, 4, 2), (3, 5, 2), (1, 2, 3), (3, 2, 1)])
def test_gradients_of_pooling_are_those_of_finite_differences(height, width, f):
    x, weight = (
        x.requires_grad_() for x in Pool(height, width, f, h=1, d=8, dtype=F64, weight_dtype=F64).tensors().values()
    )
    assert torch.autograd.gradcheck(lambda x, weight: linattn.pool_tokens(x, weight, height, width), (x, weight))


@on_every_backend()
@pytest.mark.parametrize("which", [0, 1], ids=["out", "lse"])
def test_one_result_alone_has_its_gradient(which, backend, device):
    case = Case(pooled=2)

    def only(function):
        return lambda **arguments: function(**arguments)[which]

    kinds = (only(function) for function in (attention, reference.window_attention, plain_attention))
    check(*kinds, case.tensors(device), case.options, backend)


@on_every_backend()
@pytest.mark.parametrize("wanted", ["q", "k", "v", "pooled_k", "pooled_v"])
def test_only_what_asks_for_a_gradient_gets_one_and_it_is_the_same(wanted, backend, device):
    case = Case(pooled=2, dtype=BF16, height=3, width=4)
    tensors = case.tensors(device)
    expected = everything(backend, tensors, case.options)
    leaves = {name: x.detach().requires_grad_(name == wanted) for name, x in tensors.items()}
    with linattn.use_backend(backend):
        out, lse = attention(**leaves, **case.options)
        upstream = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
        torch.autograd.backward((out, lse), (upstream.to(out), upstream[..., 0].to(lse)))
    for name, x in leaves.items():
        if name == wanted:
            assert torch.equal(x.grad, expected[f"gradient of {name}"])
        else:
            assert x.grad is None, name


@on_every_backend()
def test_the_gradient_of_a_sum_is_that_of_ones(backend, device):
    case = Case(height=3, width=4)
    leaves = {name: x.requires_grad_() for name, x in case.tensors(device).items()}
    with linattn.use_backend(backend):
        expanded = torch.autograd.grad(linattn.window_attention(**leaves, **case.options).sum(), list(leaves.values()))
        out = linattn.window_attention(**leaves, **case.options)
        written = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    for first, second in zip(expanded, written, strict=True):
        assert torch.equal(first, second)


def test_double_backward_raises():
    case = Case(height=2, width=2, d=8)
    leaves = {name: x.requires_grad_() for name, x in case.tensors().items()}
    weight = torch.rand(2, 2, requires_grad=True)
    for results, leaf in (
        (linattn.window_attention(**leaves, **case.options), leaves["q"]),
        (linattn.pool_tokens(leaves["k"][:, :, 3:], weight, 2, 2), weight),
    ):
        (grad,) = torch.autograd.grad(results.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(grad.sum(), leaf)


def test_without_a_gradient_nothing_is_kept():
    case, sizes = Case(), []
    tensors = case.tensors()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.shape) or x, lambda x: x):
        linattn.window_attention(**tensors, **case.options)
        with torch.no_grad():
            linattn.window_attention(tensors["q"].requires_grad_(), tensors["k"], tensors["v"], **case.options)
    assert not sizes


# ------------------------------------------------------------------------------------- torch's subsystems


def opcheck_arguments():
    """op name -> arguments of all registered ops of the family: grid 3 x 2, 2 text tokens, radius 2, patches of 2."""

    def x(*shape, grad=False):
        return torch.rand(1, 2, *shape).requires_grad_(grad)

    n, d, p = 8, 8, 2
    weight = torch.rand(2, 2)
    for grad in (True, False):
        q, k, v, pk, pv = (x(size, d, grad=grad) for size in (n, n, n, p, p))
        what = "gradients" if grad else "no gradients"
        yield "window_attention", (q, k, v, 3, 2, 2, 2), what
        yield "window_attention", (q, k, v, 3, 2, 2, 2, pk, pv, 0.3, False, 0, 2), f"pooled, {what}"
        yield "window_attention", (q[:, :, :5], k, v, 3, 2, 2, 2, None, None, None, True, 1, 1), f"strip, {what}"
        yield "pool_tokens", (x(6, d, grad=grad), torch.rand(2, 2, requires_grad=grad), 3, 2), what
    forward = x(n, d), x(n, d), x(n, d)
    results = x(n, d), x(n)
    options = (3, 2, 2, 2, None, True, 0, None)
    yield "_window_attention_backward", (x(n, d), x(n), *forward, x(p, d), x(p, d), *results, *options), "pooled"
    yield "_window_attention_backward", (x(n, d), None, *forward, None, None, *results, *options), ""
    yield "_pool_tokens_backward", (x(p, d), x(6, d), weight, 3, 2), ""
    for which in ("reference", "cpu", "triton"):
        where = (3, 2, 2, 2, True, 0, 2, 0.3)
        yield f"_window_attention_{which}", (*forward, x(p, d), x(p, d), *where, x(n, d), x(n)), "pooled"
        yield f"_window_attention_{which}", (*forward, None, None, *where, x(n, d), x(n)), ""
        inputs = (*forward, x(p, d), x(p, d), x(n, d), x(n), *where)
        yield (
            f"_window_attention_backward_{which}",
            (x(n, d), x(n), *inputs, x(n, d), x(n, d), x(n, d), x(p, d), x(p, d)),
            "pooled",
        )
        inputs = (*forward, None, None, x(n, d), x(n), *where)
        yield f"_window_attention_backward_{which}", (x(n, d), None, *inputs, x(n, d), x(n, d), x(n, d), None, None), ""
        yield f"_pool_tokens_{which}", (x(6, d), weight, 3, 2, x(p, d)), ""
        yield f"_pool_tokens_backward_{which}", (x(p, d), x(6, d), weight, 3, 2, x(6, d), torch.rand(2, 2)), ""


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
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "linattn::" in name
    }
    family = {name for name in registered if "window_attention" in name or "pool_tokens" in name}
    assert {row[0] for row in opcheck_arguments()} == {name for name in family if not name.endswith("_cuda")}


#: (height, width, radius, text_length): no two share a number.
FIVE_SIZES = [(6, 4, 3, 5), (9, 7, 2, 8), (5, 11, 7, 3), (12, 3, 4, 16), (8, 13, 20, 9)]


def model(q, k, v, weight, height, width, radius, text_length):
    return attention_with_pooling(
        q, k, v, weight, height, width, radius, text_length, functions=(attention, linattn.pool_tokens)
    )


def model_inputs(height, width, radius, text_length):
    n = text_length + height * width
    q, k, v = (torch.randn(2, 2, n, 16, requires_grad=True) for _ in range(3))
    return q, k, v, torch.rand(2, 2, requires_grad=True), height, width, radius, text_length


def run_compiled(compiled, function, sizes):
    """Run every size forward and backward, compiled and not, and compare."""
    for size in sizes:
        arguments = model_inputs(*size)
        leaves = arguments[:4]
        grads = []
        for call in (compiled, function):
            grads.append(torch.autograd.grad(sum(x.square().sum() for x in call(*arguments)), leaves))
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y)


def test_five_sizes_and_radii_cost_one_compilation():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    run_compiled(compiled, model, FIVE_SIZES[:1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        run_compiled(compiled, model, FIVE_SIZES[1:])
    assert counter.frame_count == 1


def test_without_a_hint_five_sizes_cost_at_most_two_compilations():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    run_compiled(compiled, model, FIVE_SIZES)
    assert counter.frame_count <= 2


def test_strips_of_any_number_of_rows_cost_one_compilation():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def strip(q, k, v, height, width, q_row):
        return linattn.window_attention(q, k, v, height, width, 3, q_row=q_row, q_text_length=0, text_length=2)

    compiled = torch.compile(strip, backend=counter, fullgraph=True, dynamic=True)
    for height, width, q_row, rows in ((7, 5, 2, 3), (9, 4, 3, 2), (12, 6, 4, 8)):
        q, k = torch.randn(2, 2, rows * width, 16), torch.randn(2, 2, 2 + height * width, 16)
        arguments = q, k, k.clone(), height, width, q_row
        torch.testing.assert_close(compiled(*arguments), strip(*arguments))
    assert counter.frame_count == 1


def test_inductor_compiles_a_block_around_the_op():
    torch._dynamo.reset()

    def block(x, weight, height, width):
        q, k, v = (x @ weight).unflatten(2, (3, 2, 16)).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = linattn.window_attention(q, k, v, height, width, 3, text_length=x.shape[1] - height * width)
        return out.transpose(1, 2).flatten(2)

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    weight = torch.rand(32, 96, requires_grad=True)
    for height, width, text in ((6, 5, 4), (3, 9, 7)):
        x = torch.rand(2, text + height * width, 32, requires_grad=True)
        pairs = [
            torch.autograd.grad(f(x, weight, height, width).square().sum(), (x, weight)) for f in (compiled, block)
        ]
        for first, second in zip(*pairs, strict=True):
            torch.testing.assert_close(first, second)


def test_exported_programs_keep_the_op_and_take_any_batch():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return linattn.window_attention(q, k, v, 4, 5, 3, text_length=2)

    def make(b):
        return tuple(torch.rand(b, 2, 22, 16) for _ in range(3))

    b = torch.export.Dim("b", min=2)
    program = torch.export.export(Attention(), make(2), dynamic_shapes=({0: b},) * 3)
    assert any("window_attention" in str(node.target) for node in program.graph.nodes)
    arguments = make(5)
    torch.testing.assert_close(program.module()(*arguments), Attention()(*arguments))


@pytest.mark.parametrize("amp_dtype", [BF16, F16], ids=NAME.get)
def test_autocast_casts_queries_keys_values_and_pooled_ones_as_it_does_for_sdpa(amp_dtype):
    case = Case(pooled=2)
    tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}
    mixed = tensors | {"k": tensors["k"].half(), "pooled_v": tensors["pooled_v"].bfloat16()}
    with torch.autocast("cpu", dtype=amp_dtype):
        out, lse = attention(**mixed, **case.options)
    assert (out.dtype, lse.dtype) == (amp_dtype, F32)
    assert torch.equal(out, linattn.window_attention(**{n: x.to(amp_dtype) for n, x in mixed.items()}, **case.options))
    out.sum().backward()
    assert all(x.grad.dtype == F32 for x in tensors.values())


def test_autocast_leaves_pooling_weights_and_float64_as_they_are():
    x, weight = Pool(4, 4, 2).tensors().values()
    case = dataclasses.replace(DOUBLE)
    plain = linattn.pool_tokens(x.bfloat16(), weight, 4, 4)
    assert not torch.equal(plain, linattn.pool_tokens(x.bfloat16(), weight.bfloat16(), 4, 4))
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(linattn.pool_tokens(x.bfloat16(), weight, 4, 4), plain)
        assert linattn.window_attention(**case.tensors(), **case.options).dtype == F64


def test_pooling_weights_are_not_rounded_to_the_type_of_the_tokens():
    x = torch.ones(1, 1, 1, 8, dtype=BF16)
    weight = torch.tensor([[1 + 2.0**-8 + 2.0**-10]])
    assert linattn.pool_tokens(x * 3, weight, 1, 1)[0, 0, 0, 0] == (3 * weight).bfloat16()
    assert (3 * weight).bfloat16() != 3 * weight.bfloat16()


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 0), (None, 0, 0), (4, 2, None), (-1, 0, 1)], ids=str)
@pytest.mark.parametrize("pooled", [False, True], ids=["", "pooled"])
def test_vmap_equals_a_loop_and_does_not_fall_back_to_one(pooled, in_dims):
    case = Case(height=2, width=3, b=2, h=2, d=8)
    n = case.keys
    tensors = [torch.rand((2, 2, n, 8) if dim is None else (3, 2, 2, n, 8)) for dim in in_dims]
    tensors = [x if dim is None else x.movedim(0, dim) for x, dim in zip(tensors, in_dims, strict=True)]

    def function(q, k, v):
        extra = {"pooled_k": k[:, :, 1:3], "pooled_v": v[:, :, 2:4]} if pooled else {}
        return attention(q, k, v, **extra, **case.options)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = torch.vmap(function, in_dims)(*tensors)
    for i in range(3):
        single = function(*(x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=True)))
        for x, y in zip(mapped, single, strict=True):
            torch.testing.assert_close(x[i], y, rtol=0, atol=0)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (2, 1), (0, 2)], ids=str)
def test_vmap_of_pooling_takes_weights_as_well(in_dims):
    x, weight = torch.rand(2, 2, 6, 8), torch.rand(2, 2)
    tensors = [
        x if dim is None else torch.stack([x, 2 * x, 3 * x]).movedim(0, dim)
        for x, dim in zip((x, weight), in_dims, strict=True)
    ]
    leaves = [x.requires_grad_() for x in tensors]

    def function(x, weight):
        return linattn.pool_tokens(x, weight, 2, 3)

    mapped = torch.vmap(function, in_dims)(*leaves)
    looped = torch.stack(
        [
            function(*(x if dim is None else x.select(dim, i) for x, dim in zip(leaves, in_dims, strict=True)))
            for i in range(3)
        ]
    )
    torch.testing.assert_close(mapped, looped)
    grads = [torch.autograd.grad(results.square().sum(), leaves) for results in (mapped, looped)]
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


def test_vmap_over_gradients_of_pooling_keeps_those_of_the_weight_apart():
    x, weight, grad = torch.rand(2, 2, 6, 8), torch.rand(2, 2), torch.rand(3, 2, 2, 2, 8)
    mapped = torch.vmap(lambda grad: ops._pool_tokens_backward(grad, x, weight, 2, 3))(grad)
    for i in range(3):
        for found, expected in zip(mapped, ops._pool_tokens_backward(grad[i], x, weight, 2, 3), strict=True):
            torch.testing.assert_close(found[i], expected)


def test_gradients_flow_through_vmap():
    case = Case(height=2, width=3, b=1, h=2, d=8)
    leaves = [torch.rand(3, 1, 2, case.keys, 8, requires_grad=True) for _ in range(3)]

    def function(q, k, v):
        return attention(q, k, v, **case.options)

    def total(results):
        return sum(x.square().sum() for x in results)

    mapped = torch.autograd.grad(total(torch.vmap(function)(*leaves)), leaves)
    looped = torch.autograd.grad(sum(total(function(*(x[i] for x in leaves))) for i in range(3)), leaves)
    for x, y in zip(mapped, looped, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "case", [Case(b=2, h=3), Case(pooled=4), Case(q_row=2, rows=3, q_text_length=1), Case(height=0, width=0)], ids=str
)
def test_flop_counter_counts_the_pairs_that_attend(case):
    tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}
    where = case.text_first, case.q_row, case.rows, case.q_text_length
    pairs = pattern(case.height, case.width, case.radius, case.text_length, case.pooled or 0, *where).sum().item()
    with FlopCounterMode(display=False) as forward:
        out = linattn.window_attention(**tensors, **case.options)
    assert forward.get_total_flops() == 4 * case.b * case.h * case.d * pairs
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 10 * case.b * case.h * case.d * pairs


def test_flop_counter_counts_pooling():
    x, weight = (x.requires_grad_() for x in Pool(5, 6, 2, b=2).tensors().values())
    with FlopCounterMode(display=False) as forward:
        out = linattn.pool_tokens(x, weight, 5, 6)
    assert forward.get_total_flops() == 2 * 2 * 3 * 16 * 9 * 4
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@on_every_backend()
def test_the_profiler_shows_which_kernel_ran(backend, device):
    arguments = model_inputs(2, 3, 2, 2)
    arguments = [x.to(device).detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    with linattn.use_backend(backend):
        seen = runs(lambda: model(*arguments)[0].sum().backward())
    assert {
        f"linattn::_{op}_{backend}"
        for op in ("window_attention", "window_attention_backward", "pool_tokens", "pool_tokens_backward")
    } <= seen


# ------------------------------------------------------------------------------------- bad input

t = torch.rand


def good(op):
    x = t(2, 3, 14, 16)
    return {
        "window_attention": {"q": x, "k": x, "v": x, "height": 3, "width": 4, "radius": 2, "text_length": 2},
        "pool_tokens": {"x": x[:, :, 2:], "weight": t(2, 2), "height": 3, "width": 4},
    }[op]


WINDOW, POOL = "window_attention", "pool_tokens"
BAD = [
    # op, change, exception, words that the message must contain
    (WINDOW, {"q": t(3, 14, 16)}, ValueError, ["q", "(B, H, Nq, D)", "(3, 14, 16)"]),
    (WINDOW, {"k": t(2, 3, 14)}, ValueError, ["k", "text_length + height * width", "(2, 3, 14)"]),
    (WINDOW, {"k": t(2, 4, 14, 16)}, ValueError, ["k", "(2, 3, 14, 16)", "(2, 4, 14, 16)"]),
    (WINDOW, {"k": t(1, 3, 14, 16)}, ValueError, ["k", "(2, 3, 14, 16)", "(1, 3, 14, 16)"]),
    (WINDOW, {"k": t(2, 3, 14, 24)}, ValueError, ["k", "(2, 3, 14, 16)", "(2, 3, 14, 24)"]),
    (WINDOW, {"k": t(2, 3, 13, 16)}, ValueError, ["k", "(2, 3, 14, 16)", "(2, 3, 13, 16)"]),
    (WINDOW, {"v": t(2, 3, 13, 16)}, ValueError, ["v", "(2, 3, 14, 16)", "(2, 3, 13, 16)"]),
    (WINDOW, {"v": t(2, 3, 14, 8)}, ValueError, ["v", "(2, 3, 14, 16)", "(2, 3, 14, 8)"]),
    (WINDOW, {"height": 4}, ValueError, ["k", "(2, 3, 18, 16)", "(2, 3, 14, 16)"]),
    (WINDOW, {"width": 5}, ValueError, ["k", "(2, 3, 17, 16)", "(2, 3, 14, 16)"]),
    (WINDOW, {"text_length": 3}, ValueError, ["k", "(2, 3, 15, 16)", "(2, 3, 14, 16)"]),
    (WINDOW, {"height": 0, "width": 0}, ValueError, ["k", "(2, 3, 2, 16)", "(2, 3, 14, 16)"]),
    (WINDOW, {"height": -3, "width": -4}, ValueError, ["height", ">= 0", "-3"]),
    (WINDOW, {"width": -1}, ValueError, ["width", ">= 0", "-1"]),
    (WINDOW, {"radius": 0}, ValueError, ["radius", ">= 1", "0"]),
    (WINDOW, {"radius": -2}, ValueError, ["radius", ">= 1", "-2"]),
    (WINDOW, {"text_length": -2}, ValueError, ["text_length", ">= 0", "-2"]),
    (WINDOW, {"q_text_length": -1}, ValueError, ["q_text_length", ">= 0", "-1"]),
    (WINDOW, {"q_text_length": 15}, ValueError, ["q_text_length = 15", "Nq = 14"]),
    (WINDOW, {"q_text_length": 3}, ValueError, ["q", "3 + rows * 4", "Nq = 14"]),
    (WINDOW, {"q": t(2, 3, 13, 16)}, ValueError, ["q", "2 + rows * 4", "Nq = 13"]),
    (WINDOW, {"q": t(2, 3, 18, 16)}, ValueError, ["q", "q_row + rows <= height", "height = 3", "Nq = 18"]),
    (WINDOW, {"q_row": 1}, ValueError, ["q", "q_row = 1", "height = 3", "Nq = 14"]),
    (WINDOW, {"q_row": -1}, ValueError, ["q_row", ">= 0", "-1"]),
    (WINDOW, {"q": t(2, 3, 2, 16), "q_row": 4}, ValueError, ["q_row = 4", "height = 3"]),
    (
        WINDOW,
        {"height": 0, "width": 0, "text_length": 14, "q": t(2, 3, 14, 16), "q_text_length": 2},
        ValueError,
        ["q", "2 + rows * 0", "Nq = 14"],
    ),
    (WINDOW, {"pooled_k": t(2, 3, 5, 16)}, ValueError, ["pooled_v", "pooled_k", "None"]),
    (WINDOW, {"pooled_v": t(2, 3, 5, 16)}, ValueError, ["pooled_k", "pooled_v", "None"]),
    *(
        (WINDOW, {"pooled_k": x, "pooled_v": x}, ValueError, ["pooled_k", "(2, 3, any, 16)", str(tuple(x.shape))])
        for x in (t(2, 3, 16), t(1, 3, 5, 16), t(2, 2, 5, 16), t(2, 3, 5, 8))
    ),
    (
        WINDOW,
        {"pooled_k": t(2, 3, 5, 16), "pooled_v": t(2, 3, 4, 16)},
        ValueError,
        ["pooled_v", "(2, 3, 5, 16)", "(2, 3, 4, 16)"],
    ),
    *(
        (WINDOW, dict.fromkeys("qkv", t(2, 3, 14, d)), ValueError, ["q", "head dim", f"{LOW}..{HIGH}", str(d)])
        for d in (0, LOW - 1, HIGH + 1)
    ),
    (WINDOW, {"q": t(2, 3, 14, 16).half()}, TypeError, ["k", "float16", "float32"]),
    (WINDOW, {"k": t(2, 3, 14, 16).bfloat16()}, TypeError, ["k", "float32", "bfloat16"]),
    (WINDOW, {"v": t(2, 3, 14, 16).double()}, TypeError, ["v", "float32", "float64"]),
    (
        WINDOW,
        {"pooled_k": t(2, 3, 5, 16).half(), "pooled_v": t(2, 3, 5, 16)},
        TypeError,
        ["pooled_k", "float32", "float16"],
    ),
    *(
        (WINDOW, dict.fromkeys("qkv", torch.ones(2, 3, 14, 16).to(dtype)), TypeError, ["q", str(dtype)[6:]])
        for dtype in (torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    (WINDOW, {"k": t(2, 3, 14, 16, device="meta")}, ValueError, ["k", "cpu", "meta"]),
    (
        WINDOW,
        dict.fromkeys(("pooled_k", "pooled_v"), t(2, 3, 5, 16, device="meta")),
        ValueError,
        ["pooled_k", "cpu", "meta"],
    ),
    (POOL, {"x": t(3, 12, 16)}, ValueError, ["x", "(B, H, height * width, D)", "(3, 12, 16)"]),
    (POOL, {"x": t(2, 3, 14, 16)}, ValueError, ["x", "(2, 3, 12, 16)", "(2, 3, 14, 16)"]),
    (POOL, {"height": 4}, ValueError, ["x", "(2, 3, 16, 16)", "(2, 3, 12, 16)"]),
    (POOL, {"height": -3, "width": -4}, ValueError, ["height", ">= 0", "-3"]),
    (POOL, {"width": -4}, ValueError, ["width", ">= 0", "-4"]),
    (POOL, {"weight": t(2, 3)}, ValueError, ["weight", "(f, f)", "(2, 3)"]),
    (POOL, {"weight": t(4)}, ValueError, ["weight", "(f, f)", "(4,)"]),
    (POOL, {"weight": t(1, 1, 1, 2, 1, 2, 1)}, ValueError, ["weight", "(f, f)", "(1, 1, 1, 2, 1, 2, 1)"]),
    (POOL, {"weight": t(0, 0)}, ValueError, ["weight", "f >= 1", "(0, 0)"]),
    (POOL, {"weight": torch.ones(2, 2, dtype=torch.int32)}, TypeError, ["weight", "int32"]),
    (POOL, {"weight": t(2, 2, device="meta")}, ValueError, ["weight", "cpu", "meta"]),
    (POOL, {"x": torch.ones(2, 3, 12, 16, dtype=torch.int64)}, TypeError, ["x", "int64"]),
    *(
        (POOL, {"x": t(2, 3, 12, d)}, ValueError, ["x", "head dim", f"{LOW}..{HIGH}", str(d)])
        for d in (LOW - 1, HIGH + 1)
    ),
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
    assert op in str(error.value)
    for word in words:
        assert word in str(error.value), word


BAD_GRADIENTS = [
    ({"grad_out": t(2, 3, 13, 16)}, ["grad_out", "(2, 3, 14, 16)", "(2, 3, 13, 16)"]),
    ({"grad_out": t(2, 3, 14, 16).half()}, ["grad_out", "float16"]),
    ({"grad_lse": t(2, 3, 13)}, ["grad_lse", "(2, 3, 14)", "(2, 3, 13)"]),
    ({"out": t(2, 3, 14, 8)}, ["out", "(2, 3, 14, 16)", "(2, 3, 14, 8)"]),
    ({"lse": t(2, 3)}, ["lse", "(2, 3, 14)", "(2, 3)"]),
    ({"lse": t(2, 3, 14, device="meta")}, ["lse", "cpu", "meta"]),
]


@pytest.mark.parametrize(("change", "words"), BAD_GRADIENTS, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_the_backward_op_checks_what_only_it_is_given(change, words):
    arguments = good(WINDOW) | {"grad_out": t(2, 3, 14, 16), "grad_lse": None, "out": t(2, 3, 14, 16)}
    arguments |= {"lse": t(2, 3, 14), "pooled_k": None, "pooled_v": None, "scale": None, "text_first": True}
    arguments |= {"q_row": 0, "q_text_length": None}
    ops._window_attention_backward(**arguments)
    with pytest.raises((ValueError, TypeError)) as error:
        ops._window_attention_backward(**(arguments | change))
    for word in words:
        assert word in str(error.value), word


@pytest.mark.parametrize("op", [WINDOW, POOL])
def test_good_input_of_the_table_is_accepted(op):
    getattr(linattn, op)(**good(op))


def test_bad_input_is_refused_while_compiling_as_well():
    torch._dynamo.reset()
    compiled = torch.compile(linattn.window_attention, backend="aot_eager", fullgraph=True)
    x = torch.rand(1, 2, 6, 16)
    with pytest.raises(Exception, match=r"k must have shape"):
        compiled(x, x, x, 2, 4, 2)


def test_options_are_keyword_only():
    x = torch.rand(1, 2, 6, 16)
    with pytest.raises(TypeError, match="positional"):
        linattn.window_attention(x, x, x, 2, 2, 2, 2)


def test_lse_is_returned_when_asked_for():
    x = torch.rand(1, 2, 6, 16)
    out = linattn.window_attention(x, x, x, 2, 3, 2)
    again, lse = linattn.window_attention(x, x, x, 2, 3, 2, return_lse=True)
    assert torch.equal(out, again)
    assert lse.shape == (1, 2, 6)
