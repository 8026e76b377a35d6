"""Family C, block_causal_attention, on every backend: who sees whom and how often, values, gradients, layouts, torch's
subsystems, and everything that must be refused."""

import dataclasses
import functools
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import tester
from test_linear_attention import NAME, ORDERS, arrange, assert_same_bits, is_dense, runs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import linattn
import linattn.flops
from linattn import backend as backends
from linattn import geometry, reference
from linattn.ops.block_causal_attention import EDGES, HEAD_DIMS

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
KERNEL_DTYPES = (F32, F16, BF16)
#: Backends that promise the same bits for any layout and batch; the reference leaves sums to torch's matmul.
KERNELS = ("cuda", "triton", "cpu")
LOW, HIGH = HEAD_DIMS.start, HEAD_DIMS.stop - 1
ops = torch.ops.linattn


def on_every_backend(only=backends.BACKENDS):
    return tester.on_every_backend("block_causal_attention", only)


every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAME.get)
two_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=NAME.get)
both_edges = pytest.mark.parametrize("edge", EDGES)

attention = functools.partial(linattn.block_causal_attention, return_lse=True)


# ------------------------------------------------------------------------------------- the formula in low precision

#: Rows and columns of blocks from a query's own to the block of each slot: self, top-left, left, top.
SLOTS = ((0, 0), (-1, -1), (0, -1), (-1, 0))


@functools.cache
def pattern(height, width, block, edge="clamp", q_row=0, rows=None) -> torch.Tensor:
    """Which slots of a query a key stands in, (queries, keys, 4), from the blocks that tokens lie in."""
    token = torch.arange(height * width)
    row, column = token // max(1, width) // block, token % max(1, width) // block
    rows = height - q_row if rows is None else rows
    mine = slice(q_row * width, (q_row + rows) * width)
    stands = []
    for down, right in SLOTS:
        wanted = row[mine] + down, column[mine] + right
        if edge == "clamp":
            wanted = [x.clamp(min=0) for x in wanted]
        stands.append((row == wanted[0][:, None]) & (column == wanted[1][:, None]))
    return torch.stack(stands, -1)


def plain_attention(q, k, v, height, width, block, slot_embed=None, scale=None, edge="clamp", q_row=0):
    """The formula by torch operations in the dtype of q, four times as many keys and a mask: (out, lse)."""
    rows = q.shape[2] // width if width else 0
    sees = pattern(height, width, block, edge, q_row, rows).to(q.device)
    embed = torch.zeros(4, 1, 1) if slot_embed is None else slot_embed
    keys = torch.cat([k + e.to(q).unsqueeze(-2) for e in embed], 2)
    scores = (q @ keys.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~sees.movedim(-1, 1).flatten(1), float("-inf"))
    return scores.softmax(-1) @ torch.cat([v] * 4, 2), scores.logsumexp(-1)


def by_lse(plain):
    """plain with probabilities exp(score - lse): how every kernel gets them back on the way back.

    In float32 that costs a gradient the rounding of the scores, which softmax, done at one go, does not have.
    """

    def call(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "softmax", lambda x, dim: (x - x.logsumexp(dim, keepdim=True)).exp())
            return plain(*args, **kwargs)

    return call


def check(op, definition, plain, tensors, options, backend, gradients=True):
    """The error-ratio rule: results against softmax, gradients in float32 against probabilities from lse."""
    of_float32 = gradients and tensors["q"].dtype == F32
    arguments = tensors, options, backend
    results = tester.check(op, definition, plain, *arguments, gradients=gradients and not of_float32)
    return tester.check(op, definition, by_lse(plain), *arguments) if of_float32 else results


def merged_attention(q, k, v, height, width, block, slot_embed, scale=None, edge="clamp"):
    """Each block once: s_ij = c q_i . k_j + log sum over the slots that j stands in of exp(c q_i . e_s)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grid = [x.unflatten(2, (height // block, block, width // block, block)).transpose(3, 4) for x in (q, k, v)]
    out, lse = torch.empty_like(grid[0]), torch.empty_like(grid[0][..., 0])
    for row in range(height // block):
        for column in range(width // block):
            mine = grid[0][:, :, row, column].flatten(2, 3)
            shift = scale * mine @ slot_embed.transpose(0, 1).mT
            scores, values = [], []
            for (i, j), slots in geometry.key_blocks(row, column, edge).items():
                keys, value = (x[:, :, i, j].flatten(2, 3) for x in grid[1:])
                scores.append(scale * mine @ keys.mT + shift[..., list(slots)].logsumexp(-1, keepdim=True))
                values.append(value)
            scores = torch.cat(scores, -1)
            out[:, :, row, column] = (scores.softmax(-1) @ torch.cat(values, 2)).unflatten(2, (block, block))
            lse[:, :, row, column] = scores.logsumexp(-1).unflatten(2, (block, block))
    return out.transpose(3, 4).flatten(2, 5), lse.transpose(3, 4).flatten(2, 5)


# ------------------------------------------------------------------------------------- inputs


@dataclasses.dataclass(frozen=True)
class Case:
    height: int = 6
    width: int = 9
    block: int = 3
    edge: str = "clamp"
    embed: torch.dtype | None = F32  # dtype of slot_embed; None: there is none
    q_row: int = 0
    rows: int | None = None  # None: all from q_row on
    scale: float | None = None
    b: int = 1
    h: int = 1
    d: int = 16
    dtype: torch.dtype = F32
    layout: str = "bhnd"

    def __str__(self):
        words = [f"{self.height}x{self.width}by{self.block}b{self.b}h{self.h}d{self.d}", self.edge]
        words += ["no_embed"] if self.embed is None else [f"embed_{NAME[self.embed]}"] if self.embed != F32 else []
        words += [f"from{self.q_row}+{self.rows}"] if self.q_row or self.rows is not None else []
        words += [] if self.scale is None else [f"scale={self.scale}"]
        words += [NAME[self.dtype]] + ([self.layout] if self.layout != "bhnd" else [])
        return "-".join(words)

    @property
    def options(self):
        return {name: getattr(self, name) for name in ("height", "width", "block", "edge", "q_row", "scale")}

    @property
    def keys(self):
        return self.height * self.width

    @property
    def queries(self):
        return (self.height - self.q_row if self.rows is None else self.rows) * self.width

    @property
    def sees(self):
        return pattern(self.height, self.width, self.block, self.edge, self.q_row, self.rows)

    @property
    def work(self):
        return self.b * self.h * (self.keys + self.queries) * max(1, self.d // 32)

    def tensors(self, device="cpu"):
        def tensor(n):
            x = torch.randn(self.b, self.h, n, self.d).to(self.dtype)
            return arrange(x, self.layout).to(device)

        tensors = {"q": tensor(self.queries), "k": tensor(self.keys), "v": tensor(self.keys)}
        if self.embed is not None:
            tensors["slot_embed"] = torch.randn(4, self.h, self.d).to(device=device, dtype=self.embed)
        return tensors


def skip_if_slow(backend, device, case):
    """Triton's interpreter takes about a second for this much; a test file of its own asks it for more."""
    if tester.interpreted(backend, device) and (case.work > 60 or case.dtype != BF16):
        pytest.skip("too slow in Triton's interpreter")


LEFT_TO_ITS_OWN_FILE = (
    "test_element_offsets_beyond_2_to_the_31_reach_the_right_tokens",
    "test_a_sample_gives_the_same_bits_alone_and_in_a_batch",
    "test_one_result_alone_has_its_gradient",
    "test_only_what_asks_for_a_gradient_gets_one_and_it_is_the_same",
    "test_two_runs_give_the_same_bits",
)


@pytest.fixture(autouse=True)
def less_in_the_interpreter(request, monkeypatch):
    """Where a test is there once for each dtype and edge, Triton's interpreter runs one of them, and of some none: it
    has a test file of its own. It patches triton.language anew at every call of a device function; once will do.
    """
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if (parameters.get("backend"), parameters.get("device")) != ("triton", "cpu"):
        return
    twice = parameters.get("dtype", BF16) != BF16 or parameters.get("edge", "clamp") != "clamp"
    if twice or request.node.originalname in LEFT_TO_ITS_OWN_FILE:
        pytest.skip("too slow in Triton's interpreter")
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


CASES = [
    # every dtype: both edges, with and without embedding, in the layout of diffusers
    *(
        Case(dtype=dtype, edge=edge, embed=embed, h=2, layout="bnhd")
        for dtype in KERNEL_DTYPES
        for edge in EDGES
        for embed in (F32, None)
    ),
    # blocks: one token, even, odd, larger than a tile, the whole image
    *(
        Case(height=2 * block, width=3 * block, block=block, dtype=dtype)
        for block in (1, 2, 5, 9)
        for dtype in (F32, BF16)
    ),
    *(Case(height=34, width=17, block=17, edge=edge, dtype=dtype) for edge in EDGES for dtype in KERNEL_DTYPES),
    *(Case(height=5, width=5, block=5, edge=edge, dtype=dtype) for edge in EDGES for dtype in (F32, BF16)),
    # grids: a row and a column of blocks
    *(
        Case(height=height, width=width, block=4, edge=edge, dtype=dtype)
        for height, width in ((4, 16), (16, 4))
        for edge in EDGES
        for dtype in (F32, BF16)
    ),
    # strips: with the row of blocks above, without it, one in the middle, nothing
    *(Case(q_row=3, edge=edge, dtype=dtype) for edge in EDGES for dtype in KERNEL_DTYPES),
    *(Case(height=12, q_row=3, rows=6, dtype=dtype) for dtype in (F32, BF16)),
    *(Case(height=12, q_row=0, rows=3, edge=edge, b=2) for edge in EDGES),
    *(Case(q_row=q_row, rows=0) for q_row in (0, 3, 6)),
    # embeddings of other types
    *(Case(embed=embed, dtype=dtype) for embed in (BF16, F16, F64) for dtype in (F32, BF16)),
    # head dims: smallest, largest, odd, those of the models
    *(
        Case(height=4, width=4, block=2, d=d, dtype=dtype, h=2)
        for d in (8, 9, 33, 64, 80, 128, 255, 256)
        for dtype in (F32, BF16)
    ),
    Case(height=4, width=4, block=2, d=80, dtype=F16, layout="bhnd+3"),
    # scales
    *(Case(scale=scale, dtype=dtype) for scale in (1.0, 0.0, -0.4) for dtype in (F32, BF16)),
    # empty
    *(Case(b=0, dtype=dtype) for dtype in (F32, BF16)),
    Case(h=0),
    *(Case(height=height, width=width) for height, width in ((0, 6), (6, 0), (0, 0))),
    # memory
    *(
        Case(b=2, h=2, height=4, width=6, block=2, dtype=dtype, layout=layout)
        for layout in ("nbhd", "hnbd", "bnhd+3", "bnhd/2", "bhdn")
        for dtype in (F32, BF16)
    ),
    # more than one tile in every direction; the geometry of the model, fewer heads
    *(Case(height=24, width=36, block=12, d=40, dtype=dtype, layout="bnhd") for dtype in KERNEL_DTYPES),
    Case(height=32, width=64, block=32, d=80, dtype=BF16, layout="bnhd"),
    Case(height=30, width=20, block=10, q_row=10, rows=20, h=2, d=64, edge="drop"),
]


@on_every_backend()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_lse_and_gradients_keep_within_the_rule(case, backend, device):
    skip_if_slow(backend, device, case)
    tensors = case.tensors(device)
    results = check(attention, reference.block_causal_attention, plain_attention, tensors, case.options, backend)
    assert results["output 0"].dtype == case.dtype
    assert results["output 1"].dtype == F32
    assert results["output 1"].is_contiguous()
    if case.embed is not None:
        assert results["gradient of slot_embed"].dtype == case.embed


# ------------------------------------------------------------------------------------- who sees whom, and how often

PATTERNS = [
    *(Case(edge=edge) for edge in EDGES),
    *(Case(height=8, width=8, block=2, edge=edge) for edge in EDGES),
    Case(height=4, width=5, block=1),
    Case(height=5, width=15, block=5, edge="drop"),
    Case(height=15, width=5, block=5),
    Case(height=12, width=9, q_row=6, rows=3),
    Case(height=12, width=9, q_row=0, rows=6, edge="drop"),
    Case(height=14, width=14, block=7),
]


@on_every_backend()
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 3, 9, 27)], ids=["equal slots", "slots told apart"])
@pytest.mark.parametrize("case", PATTERNS, ids=str)
def test_a_query_sees_exactly_the_keys_of_the_definition_once_for_every_slot(case, weights, backend, device):
    """Keys are zero, so a key's weight is that of the slots it stands in, and values that are unit vectors show it."""
    if tester.interpreted(backend, device) and case.keys > 80:
        pytest.skip("too slow in Triton's interpreter")
    expected = (case.sees * torch.tensor(weights)).sum(-1).double()
    case = dataclasses.replace(case, d=max(8, case.keys), scale=1.0)
    tensors = {name: torch.zeros_like(x) for name, x in case.tensors(device).items()}
    tensors["q"][..., 0] = 1
    tensors["v"][:] = torch.eye(case.d, device=device)[: case.keys]
    tensors["slot_embed"][..., 0] = torch.tensor(weights).log()[:, None]
    with linattn.use_backend(backend):
        out, lse = attention(**tensors, **case.options)
    total = expected.sum(1)
    found = out[0, 0, :, : case.keys].double().cpu() * total[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(lse[0, 0].double().cpu(), total.log(), rtol=1e-6, atol=0)


@on_every_backend()
@both_edges
@every_dtype
def test_a_block_that_is_the_whole_image_is_dense_attention(dtype, edge, backend, device):
    """Under "clamp" four times over: the embeddings then scale a query's sum and leave its output alone."""
    case = Case(height=7, width=7, block=7, h=2, dtype=dtype, edge=edge)

    def dense(q, k, v, slot_embed, **_):
        scale, embed = q.shape[-1] ** -0.5, slot_embed if edge == "clamp" else slot_embed[:1]
        lse = (scale * q @ k.mT).logsumexp(-1) + (scale * q @ embed.to(q).transpose(0, 1).mT).logsumexp(-1)
        return F.scaled_dot_product_attention(q, k, v), lse

    check(attention, dense, dense, case.tensors(device), case.options, backend, gradients=False)
    only_out = functools.partial(dense, slot_embed=torch.zeros(4, 2, 16))
    tensors = case.tensors(device)
    del tensors["slot_embed"]
    out = [lambda *a, function=f, **o: function(*a, **o)[0] for f in (attention, only_out, only_out)]
    check(*out, tensors, case.options, backend)


@on_every_backend()
@both_edges
@two_dtypes
def test_a_block_that_fills_several_slots_is_merged_by_the_identity_of_the_docs(dtype, edge, backend, device):
    case = Case(height=9, width=6, h=2, edge=edge, dtype=dtype)

    def merged(q_row, **arguments):
        return merged_attention(**arguments)

    # Only where keys and embeddings are not rounded to one number is it the same function.
    wide = {name: x.double() for name, x in case.tensors(device).items()}
    for x, y in zip(
        merged(**wide, **case.options), reference.block_causal_attention(**wide, **case.options), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    check(attention, merged, plain_attention, case.tensors(device), case.options, backend)


def blocks(x, case):
    """(B, H, tokens, ...) -> (B, H, rows of blocks, columns of blocks, block, block, ...)."""
    x = x.unflatten(2, (-1, case.block, case.width // case.block, case.block))
    return x.transpose(3, 4)


@on_every_backend()
@every_dtype
def test_the_two_edges_differ_in_the_first_row_and_column_and_nowhere_else(dtype, backend, device):
    case = Case(height=9, width=9, h=2, dtype=dtype)
    tensors = case.tensors(device)
    with linattn.use_backend(backend):
        clamp, drop = (attention(**tensors, **(case.options | {"edge": edge})) for edge in EDGES)
    for x, y in zip(clamp, drop, strict=True):
        x, y = blocks(x, case), blocks(y, case)
        torch.testing.assert_close(x[:, :, 1:, 1:], y[:, :, 1:, 1:])
    # An edge attends to more, and the sum shows it; the output of the corner is that of its one block all the same.
    more = blocks(clamp[1] - drop[1], case)
    assert (more[:, :, 0].abs() > 1e-3).all()
    assert (more[:, :, :, 0].abs() > 1e-3).all()
    corner = [blocks(x[0], case)[:, :, 0, 0] for x in (clamp, drop)]
    torch.testing.assert_close(*corner)


@on_every_backend()
@every_dtype
def test_embeddings_of_zero_are_none(dtype, backend, device):
    case = Case(dtype=dtype, h=2)
    tensors = case.tensors(device)
    tensors["slot_embed"].zero_()
    without = {name: x for name, x in tensors.items() if name != "slot_embed"}
    with linattn.use_backend(backend):
        zeros, none = (attention(**x, **case.options) for x in (tensors, without))
    assert_same_bits(dict(enumerate(zeros)), dict(enumerate(none)))


@on_every_backend()
@both_edges
def test_a_vector_added_to_all_embeddings_moves_lse_and_nothing_else(edge, backend, device):
    case = Case(h=2, edge=edge)
    tensors = case.tensors(device)
    step = torch.randn(1, 2, 16, device=device)
    with linattn.use_backend(backend):
        out, lse = attention(**tensors, **case.options)
        moved = attention(**(tensors | {"slot_embed": tensors["slot_embed"] + step}), **case.options)
    torch.testing.assert_close(moved[0], out)
    by = (tensors["q"] @ step.transpose(0, 1).mT).squeeze(-1) * case.d**-0.5
    torch.testing.assert_close(moved[1], lse + by)


@on_every_backend()
@both_edges
def test_gradients_of_the_embeddings_sum_to_zero_over_the_slots(edge, backend, device):
    case = Case(b=2, h=2, edge=edge)
    tensors = {name: x.requires_grad_() for name, x in case.tensors(device).items()}
    with linattn.use_backend(backend):
        out = linattn.block_causal_attention(**tensors, **case.options)
        (grad,) = torch.autograd.grad(out, tensors["slot_embed"], torch.randn_like(out))
    assert grad.abs().max() > 0.01
    torch.testing.assert_close(grad.sum(0), torch.zeros_like(grad[0]), rtol=0, atol=1e-5 * grad.abs().max().item())


@on_every_backend()
@both_edges
@every_dtype
def test_transposing_the_grid_exchanges_left_and_top(dtype, edge, backend, device):
    case = Case(height=6, width=9, edge=edge, dtype=dtype, d=8, h=2)

    def turned(x, height, width):
        return x.unflatten(2, (height, width)).transpose(2, 3).flatten(2, 3)

    def transposed(q, k, v, slot_embed, height, width, block, **options):
        q, k, v = (turned(x, height, width) for x in (q, k, v))
        results = attention(q, k, v, width, height, block, slot_embed=slot_embed[[0, 1, 3, 2]], **options)
        return tuple(turned(x, width, height) for x in results)

    tensors = case.tensors(device)
    check(transposed, reference.block_causal_attention, plain_attention, tensors, case.options, backend)


@on_every_backend()
@both_edges
@pytest.mark.parametrize("needed", [False, True], ids=["all keys", "keys of the row above"])
@two_dtypes
def test_strips_concatenate_to_the_whole(dtype, needed, edge, backend, device):
    case = Case(height=15, width=6, dtype=dtype, edge=edge)
    strips = [(0, 3), (3, 6), (9, 6)]

    def by_strips(function):
        def call(q, k, v, slot_embed, q_row, height, width, block, **options):
            def rows(x, first, stop):
                return x[:, :, first * width : stop * width]

            parts = []
            for row, count in strips:
                first, stop = (max(0, row - block), row + count) if needed else (0, height)
                tensors = rows(q, row, row + count), rows(k, first, stop), rows(v, first, stop)
                where = {"slot_embed": slot_embed, "q_row": row - first, **options}
                parts.append(function(*tensors, stop - first, width, block, **where))
            return tuple(torch.cat(x, 2) for x in zip(*parts, strict=True))

        return call

    tensors = case.tensors(device)
    kinds = by_strips(attention), reference.block_causal_attention, by_strips(plain_attention)
    check(*kinds, tensors, case.options, backend)


@on_every_backend()
@two_dtypes
def test_a_strip_without_the_row_above_has_an_edge_of_its_own(dtype, backend, device):
    """The edge is that of the keys that are passed in: who cuts an image keeps the row of blocks above."""
    case = Case(height=6, dtype=dtype)
    tensors = case.tensors(device)
    below = {name: x if name == "slot_embed" else x[:, :, case.keys // 2 :] for name, x in tensors.items()}
    with linattn.use_backend(backend):
        whole = linattn.block_causal_attention(**tensors, **case.options)[:, :, case.keys // 2 :]
        cut = linattn.block_causal_attention(**below, **(case.options | {"height": 3}))
    assert (whole - cut).abs().max() > 0.01


# ------------------------------------------------------------------------------------- memory layout


@on_every_backend()
@pytest.mark.parametrize("layout", ORDERS)
def test_output_is_dense_in_the_order_of_q_with_the_head_dim_innermost(layout, backend, device):
    case = Case(b=2, h=3, height=4, width=2, block=2, layout=layout)
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
    b, n, h, d = 2, 16, 3, 16
    q, k, v = (torch.randn(b, n, h * d, device=device).unflatten(2, (h, d)).transpose(1, 2) for _ in range(3))
    with linattn.use_backend(backend):
        out = linattn.block_causal_attention(q, k, v, 4, 4, 2)
    assert out.transpose(1, 2).view(b, n, h * d).data_ptr() == out.data_ptr()


@on_every_backend(only=("cpu", "cuda"))
def test_a_fused_projection_is_read_in_place(backend, device):
    buffer = torch.randn(2, 16, 3, 3, 16, dtype=BF16, device=device)
    q, k, v = (x.transpose(1, 2) for x in buffer.unbind(2))
    embed = torch.randn(4, 3, 16, device=device)
    with linattn.use_backend(backend):
        seen = runs(lambda: linattn.block_causal_attention(q, k, v, 4, 4, 2, slot_embed=embed))
    assert f"linattn::_block_causal_attention_{backend}" in seen
    assert not seen & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::cat"}


@on_every_backend()
def test_broadcast_tensors_count_once_for_every_head(backend, device):
    case = Case(b=2, h=2, height=4, width=4, block=2)
    tensors = case.tensors(device)
    tensors |= {"k": torch.randn(2, 1, case.keys, 16, device=device).expand(2, 2, case.keys, 16)}
    tensors |= {"v": torch.randn(1, 1, case.keys, 16, device=device).expand(2, 2, case.keys, 16)}
    check(attention, reference.block_causal_attention, plain_attention, tensors, case.options, backend)


@on_every_backend()
def test_an_embedding_of_any_strides_is_read_as_it_is(backend, device):
    case = Case(h=2)
    tensors = case.tensors(device)
    wide = torch.full((16, 5, 2, 2), float("nan"), device=device)
    strided = wide[:, :4, :, 0].movedim(0, 2)
    strided.copy_(tensors["slot_embed"])
    with linattn.use_backend(backend):
        expected, found = (
            attention(**(tensors | {"slot_embed": e}), **case.options) for e in (tensors["slot_embed"], strided)
        )
    assert_same_bits(dict(enumerate(found)), dict(enumerate(expected)))


@on_every_backend(only=KERNELS)
def test_element_offsets_beyond_2_to_the_31_reach_the_right_tokens(tmp_path, backend, device):
    h, d, case = 2, 40, Case(height=6, width=4, block=2, h=2, d=40, dtype=BF16)
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


@pytest.mark.parametrize("block", [1, 4, 12])
def test_the_definition_holds_a_bounded_number_of_scores_and_of_gathered_keys_at_a_time(block, monkeypatch):
    case, scores, keys, score = Case(height=24, width=24, block=block, h=2), [], [], reference._slot_scores

    def watched(q, k, slot_embed, visit):
        result = score(q, k, slot_embed, visit)
        scores.append(result.numel())
        keys.append(visit.keys.numel() * case.h * case.d)
        return result

    monkeypatch.setattr(reference, "_slot_scores", watched)
    at_least = 4 * block**2 * case.h  # what one query and the keys of one block take
    for at_once in (2**16, 5000, 2000):
        monkeypatch.setattr(reference, "_SCORES_AT_ONCE", at_once)
        scores.clear(), keys.clear()
        reference.block_causal_attention(**case.tensors(), **case.options)
        assert max(scores) <= max(at_once, at_least)
        assert max(keys) <= max(at_once, at_least * case.d)
        # No less than it may be: small parts take time.
        assert max(max(scores), max(keys)) > 0.2 * at_once


# ------------------------------------------------------------------------------------- hard numbers


@on_every_backend()
@two_dtypes
def test_saturated_scores_keep_within_the_rule(dtype, backend, device):
    case = Case(dtype=dtype)
    tensors = {name: x if name == "v" else 12 * x for name, x in case.tensors(device).items()}
    check(attention, reference.block_causal_attention, plain_attention, tensors, case.options, backend)


@on_every_backend()
@pytest.mark.parametrize("sign", [1, -1])
def test_float16_scores_beyond_its_range_do_not_overflow(sign, backend, device):
    case = Case(dtype=F16)
    tensors = case.tensors(device)
    tensors |= {"q": 200 + torch.rand_like(tensors["q"]), "k": sign * (200 + torch.rand_like(tensors["k"]))}
    tensors["slot_embed"] = tensors["slot_embed"] * 100
    upstream = torch.randn_like(tensors["q"]), torch.randn_like(tensors["q"][..., 0])
    with linattn.use_backend(backend):
        results = tester.evaluate(attention, tensors, case.options, upstream)
    for name, x in results.items():
        assert x.isfinite().all(), name
    assert results["output 1"].abs().min() > torch.finfo(F16).max


@on_every_backend()
@both_edges
@every_dtype
def test_nan_in_a_query_stays_in_its_row(dtype, edge, backend, device):
    case = Case(h=2, dtype=dtype, edge=edge)
    tensors, hit = case.tensors(device), [1, 40]  # in the corner, in the interior
    with linattn.use_backend(backend):
        clean = attention(**tensors, **case.options)
        tensors["q"][0, 1, hit, 3] = float("nan")
        found = attention(**tensors, **case.options)
    for x, y in zip(found, clean, strict=True):
        assert x[0, 1, hit].isnan().all()
        x[0, 1, hit] = y[0, 1, hit] = 0
        assert torch.equal(x, y)


@on_every_backend()
@both_edges
@every_dtype
@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_in_a_key_or_value_reaches_every_query_that_sees_it_and_no_other(name, dtype, edge, backend, device):
    case = Case(height=9, h=2, dtype=dtype, edge=edge)
    tensors = case.tensors(device)
    with linattn.use_backend(backend):
        clean = attention(**tensors, **case.options)
        for token in (0, 30):  # in the corner, in the interior
            found = {x: y.clone() for x, y in tensors.items()}
            found[name][0, 1, token, 3] = float("nan")
            found = attention(**found, **case.options)
            sees = case.sees[:, token].any(-1)
            assert 0 < sees.sum() < len(sees)
            reached = found[0][0, 1] if name == "k" else found[0][0, 1, :, 3:4]
            assert reached[sees].isnan().all()
            if name == "k":
                assert found[1][0, 1][sees].isnan().all()
            else:
                assert torch.equal(found[1], clean[1])
            for x, y in zip(found, clean, strict=True):
                assert torch.equal(x[0, 0], y[0, 0])
                assert torch.equal(x[0, 1][~sees], y[0, 1][~sees])


@on_every_backend()
@both_edges
def test_nan_in_an_embedding_reaches_the_queries_whose_slot_is_filled_in_its_head(edge, backend, device):
    case = Case(h=2, edge=edge)
    tensors = case.tensors(device)
    with linattn.use_backend(backend):
        clean = attention(**tensors, **case.options)
        tensors["slot_embed"][1, 1, 3] = float("nan")  # top-left
        found = attention(**tensors, **case.options)
    filled = case.sees[..., 1].any(1)
    assert filled.all() if edge == "clamp" else 0 < filled.sum() < len(filled)
    for x, y in zip(found, clean, strict=True):
        assert x[0, 1][filled].isnan().all()
        assert torch.equal(x[0, 1][~filled], y[0, 1][~filled])
        assert torch.equal(x[0, 0], y[0, 0])


@on_every_backend()
@two_dtypes
def test_infinity_in_a_value_is_infinite_where_it_is_seen(dtype, backend, device):
    case = Case(dtype=dtype)
    tensors = case.tensors(device)
    tensors["v"][0, 0, 20, 3] = float("inf")
    with linattn.use_backend(backend):
        out = linattn.block_causal_attention(**tensors, **case.options)
    sees = case.sees[:, 20].any(-1)
    assert (out[0, 0, sees, 3] == float("inf")).all()
    assert out[0, 0, sees][:, [0, 1, 2, *range(4, 16)]].isfinite().all()
    assert out[0, 0, ~sees].isfinite().all()


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
    case = Case(dtype=dtype)
    if not tester.interpreted(backend, device):
        case = dataclasses.replace(case, height=27, width=18, block=9, h=2, d=40)
    tensors = case.tensors(device)
    first, second = (everything(backend, tensors, case.options) for _ in range(2))
    assert_same_bits(first, second)


@on_every_backend(only=("cpu",))
@every_dtype
def test_any_number_of_threads_gives_the_same_bits(dtype, backend, device):
    case = Case(height=27, width=18, block=9, b=2, h=3, d=40, dtype=dtype)
    tensors = case.tensors(device)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(everything(backend, tensors, case.options))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@on_every_backend(only=KERNELS)
@every_dtype
@pytest.mark.parametrize("large", [False, True])
def test_a_sample_gives_the_same_bits_alone_and_in_a_batch(large, dtype, backend, device):
    case = Case(b=3, height=4, width=4, block=2, dtype=dtype, layout="bnhd")
    if large:
        case = dataclasses.replace(case, height=20, width=30, block=10, h=2, d=40)
    skip_if_slow(backend, device, case)
    tensors = case.tensors(device)
    together = everything(backend, tensors, case.options)
    together.pop("gradient of slot_embed")  # a sum over the batch
    for i in range(3):
        sample = {key: x if key == "slot_embed" else x[i : i + 1] for key, x in tensors.items()}
        alone = everything(backend, sample, case.options)
        alone.pop("gradient of slot_embed")
        assert_same_bits(alone, {name: x[i : i + 1] for name, x in together.items()})


# ------------------------------------------------------------------------------------- hypothesis


@st.composite
def small_cases(draw, dtypes, layouts=("bhnd",)):
    block = draw(st.integers(1, 5))
    height, width = (block * draw(st.integers(0, 4 if block < 4 else 2)) for _ in range(2))
    q_row = block * draw(st.integers(0, height // block))
    return Case(
        height=height,
        width=width,
        block=block,
        edge=draw(st.sampled_from(EDGES)),
        embed=draw(st.sampled_from([None, F64 if dtypes == [F64] else F32])),
        q_row=q_row,
        rows=draw(st.one_of(st.none(), st.integers(0, (height - q_row) // block).map(lambda rows: rows * block))),
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


@FUZZ
@hypothesis.given(case=small_cases([F64]), at_once=st.sampled_from([2**22, 3000, 1]), seed=st.integers(0, 2**16))
def test_the_definition_and_its_gradients_equal_the_masked_formula_for_any_chunk_of_blocks(case, at_once, seed):
    torch.manual_seed(seed)
    tensors = case.tensors()
    upstream = torch.randn_like(tensors["q"]), torch.randn_like(tensors["q"][..., 0])
    expected = tester.evaluate(plain_attention, tensors, case.options, upstream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_SCORES_AT_ONCE", at_once)
        by_hand = tester.evaluate(attention, tensors, case.options, upstream)
        by_autograd = tester.evaluate(reference.block_causal_attention, tensors, case.options, upstream)
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
        check(attention, reference.block_causal_attention, plain_attention, tensors, case.options, backend)
        return
    upstream = torch.randn_like(tensors["q"]), torch.randn_like(tensors["q"][..., 0])
    with linattn.use_backend(backend):
        found = tester.evaluate(attention, tensors, case.options, upstream)
    wide = {name: x.double() for name, x in tensors.items()}
    for what, truth in tester.evaluate(reference.block_causal_attention, wide, case.options, upstream).items():
        # As for window attention: 5e-6 for results, 2e-5 for gradients (of an embedding: of the largest of them).
        bound = 2e-5 if what.startswith("gradient") else 5e-6
        floor = bound * max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
        torch.testing.assert_close(found[what].double(), truth, rtol=bound, atol=floor)


# ------------------------------------------------------------------------------------- autograd

DOUBLE = Case(height=4, width=4, block=2, d=8, dtype=F64, embed=F64)
DOUBLES = [
    DOUBLE,
    dataclasses.replace(DOUBLE, edge="drop", h=2, height=2),
    dataclasses.replace(DOUBLE, q_row=2, scale=0.7, b=2, width=2),
    dataclasses.replace(DOUBLE, embed=None, height=3, width=2, block=1),
    dataclasses.replace(DOUBLE, height=3, width=3, block=3, rows=0),
]


@pytest.mark.parametrize("case", DOUBLES, ids=str)
def test_gradients_of_output_and_lse_are_those_of_finite_differences(case):
    tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}

    def function(*leaves):
        return attention(**dict(zip(tensors, leaves, strict=True)), **case.options)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@on_every_backend()
@pytest.mark.parametrize("which", [0, 1], ids=["out", "lse"])
def test_one_result_alone_has_its_gradient(which, backend, device):
    case = Case(h=2)

    def only(function):
        return lambda **arguments: function(**arguments)[which]

    kinds = (only(function) for function in (attention, reference.block_causal_attention, plain_attention))
    check(*kinds, case.tensors(device), case.options, backend)


@on_every_backend()
@pytest.mark.parametrize("wanted", ["q", "k", "v", "slot_embed"])
def test_only_what_asks_for_a_gradient_gets_one_and_it_is_the_same(wanted, backend, device):
    case = Case(dtype=BF16, height=4, width=4, block=2)
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
    case = Case(height=4, width=4, block=2)
    leaves = {name: x.requires_grad_() for name, x in case.tensors(device).items()}
    with linattn.use_backend(backend):
        out = linattn.block_causal_attention(**leaves, **case.options)
        expanded = torch.autograd.grad(out.sum(), list(leaves.values()))
        out = linattn.block_causal_attention(**leaves, **case.options)
        written = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    for first, second in zip(expanded, written, strict=True):
        assert torch.equal(first, second)


@on_every_backend()
def test_keys_that_no_query_of_a_strip_sees_get_gradient_zero(backend, device):
    case = Case(height=12, width=3, q_row=6, rows=3)
    tensors = case.tensors(device)
    results = everything(backend, tensors, case.options)
    seen = case.sees.any(-1).any(0)
    assert 0 < seen.sum() < len(seen)
    for name in ("gradient of k", "gradient of v"):
        assert (results[name][0, 0, ~seen] == 0).all()
        assert (results[name][0, 0, seen] != 0).any(-1).all()


def test_double_backward_raises():
    case = Case(height=2, width=2, block=1, d=8)
    leaves = {name: x.requires_grad_() for name, x in case.tensors().items()}
    out = linattn.block_causal_attention(**leaves, **case.options)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), leaves["q"])


def test_without_a_gradient_nothing_is_kept():
    case, sizes = Case(), []
    tensors = case.tensors()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.shape) or x, lambda x: x):
        linattn.block_causal_attention(**tensors, **case.options)
        with torch.no_grad():
            tensors["q"].requires_grad_()
            linattn.block_causal_attention(**tensors, **case.options)
    assert not sizes


# ------------------------------------------------------------------------------------- torch's subsystems


def opcheck_arguments():
    """op name -> arguments of all registered ops of the family: grid 4 x 2, blocks of 2."""

    def x(*shape, grad=False):
        return torch.rand(*shape).requires_grad_(grad)

    n, d = 8, 8

    def tokens(n=n, grad=False):
        return x(1, 2, n, d, grad=grad)

    for grad in (True, False):
        q, k, v, embed = tokens(grad=grad), tokens(grad=grad), tokens(grad=grad), x(4, 2, d, grad=grad)
        what = "gradients" if grad else "no gradients"
        yield "block_causal_attention", (q, k, v, 4, 2, 2), what
        yield "block_causal_attention", (q, k, v, 4, 2, 2, embed, 0.3, "drop"), f"embed, {what}"
        yield "block_causal_attention", (q[:, :, :4], k, v, 4, 2, 2, embed, None, "clamp", 2), f"strip, {what}"
    forward, results, lse = (tokens(), tokens(), tokens()), (tokens(), x(1, 2, n)), x(1, 2, n)
    for embed in (x(4, 2, d), None):
        what = "" if embed is None else "embed"
        options = (4, 2, 2, None, "clamp", 0)
        yield "_block_causal_attention_backward", (tokens(), lse, *forward, embed, *results, *options), what
        for which in ("reference", "cpu", "triton"):
            where = (4, 2, 2, embed is None, 0, 0.3)
            yield f"_block_causal_attention_{which}", (*forward, embed, *where, *results), what
            grads = tokens(), tokens(), tokens(), None if embed is None else x(4, 2, d)
            inputs = (tokens(), None if embed is None else lse, *forward, embed, *results, *where, *grads)
            yield f"_block_causal_attention_backward_{which}", inputs, what


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
    family = {name for name in registered if "block_causal" in name}
    assert {row[0] for row in opcheck_arguments()} == {name for name in family if not name.endswith("_cuda")}


#: (height, width, block): no two share a number.
FIVE_SIZES = [(6, 4, 2), (9, 12, 3), (8, 20, 4), (15, 10, 5), (14, 7, 7)]


def model(q, k, v, embed, height, width, block):
    return attention(q, k, v, height, width, block, slot_embed=embed)


def model_inputs(height, width, block):
    q, k, v = (torch.randn(2, 2, height * width, 16, requires_grad=True) for _ in range(3))
    return q, k, v, torch.rand(4, 2, 16, requires_grad=True), height, width, block


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


def test_five_sizes_and_blocks_cost_one_compilation():
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
        return linattn.block_causal_attention(q, k, v, height, width, 2, q_row=q_row)

    compiled = torch.compile(strip, backend=counter, fullgraph=True, dynamic=True)
    for height, width, q_row, rows in ((8, 6, 2, 4), (12, 4, 4, 6), (10, 8, 6, 4)):
        q, k = torch.randn(2, 2, rows * width, 16), torch.randn(2, 2, height * width, 16)
        arguments = q, k, k.clone(), height, width, q_row
        torch.testing.assert_close(compiled(*arguments), strip(*arguments))
    assert counter.frame_count == 1


def test_inductor_compiles_a_layer_around_the_op():
    torch._dynamo.reset()

    def layer(x, weight, embed, height, width):
        q, k, v = (x @ weight).unflatten(2, (3, 2, 16)).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = linattn.block_causal_attention(q, k, v, height, width, 2, slot_embed=embed)
        return out.transpose(1, 2).flatten(2)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    weight, embed = torch.rand(32, 96, requires_grad=True), torch.rand(4, 2, 16, requires_grad=True)
    for height, width in ((6, 4), (4, 10)):
        x = torch.rand(2, height * width, 32, requires_grad=True)
        pairs = [
            torch.autograd.grad(f(x, weight, embed, height, width).square().sum(), (x, weight, embed))
            for f in (compiled, layer)
        ]
        for first, second in zip(*pairs, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_exported_programs_keep_the_op_and_take_any_batch():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return linattn.block_causal_attention(q, k, v, 4, 6, 2)

    def make(b):
        return tuple(torch.rand(b, 2, 24, 16) for _ in range(3))

    b = torch.export.Dim("b", min=2)
    program = torch.export.export(Attention(), make(2), dynamic_shapes=({0: b},) * 3)
    assert any("block_causal_attention" in str(node.target) for node in program.graph.nodes)
    arguments = make(5)
    torch.testing.assert_close(program.module()(*arguments), Attention()(*arguments))


@pytest.mark.parametrize("amp_dtype", [BF16, F16], ids=NAME.get)
def test_autocast_casts_queries_keys_and_values_and_leaves_embeddings_as_they_are(amp_dtype):
    case = Case(h=2)
    tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}
    mixed = tensors | {"k": tensors["k"].half()}
    with torch.autocast("cpu", dtype=amp_dtype):
        out, lse = attention(**mixed, **case.options)
    assert (out.dtype, lse.dtype) == (amp_dtype, F32)
    embed = mixed.pop("slot_embed")
    cast = {name: x.to(amp_dtype) for name, x in mixed.items()}
    assert torch.equal(lse, attention(**cast, slot_embed=embed, **case.options)[1])
    assert not torch.equal(lse, attention(**cast, slot_embed=embed.to(amp_dtype), **case.options)[1])
    out.sum().backward()
    assert all(x.grad.dtype == F32 for x in tensors.values())


def test_autocast_leaves_float64_as_it_is():
    with torch.autocast("cpu", dtype=BF16):
        assert linattn.block_causal_attention(**DOUBLE.tensors(), **DOUBLE.options).dtype == F64


@on_every_backend()
def test_embeddings_are_not_rounded_to_the_type_of_the_tokens(backend, device):
    q = torch.ones(1, 1, 1, 8, dtype=BF16, device=device)
    k = torch.zeros_like(q)
    fine = 1 + 2.0**-8 + 2.0**-10
    embed = torch.zeros(4, 1, 8, device=device)
    embed[:, :, 0] = fine
    with linattn.use_backend(backend):
        _, lse = attention(q, k, k, 1, 1, 1, slot_embed=embed, scale=1.0, edge="drop")
    assert abs(lse.item() - fine) < 1e-6
    assert abs(torch.tensor(fine).bfloat16().item() - fine) > 1e-3


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 0), (None, 0, 0), (4, 2, None), (-1, 0, 1)], ids=str)
@pytest.mark.parametrize("embedded", [False, True], ids=["", "embed"])
def test_vmap_equals_a_loop_and_does_not_fall_back_to_one(embedded, in_dims):
    case = Case(height=2, width=4, block=2, b=2, h=2, d=8)
    n = case.keys
    tensors = [torch.rand((2, 2, n, 8) if dim is None else (3, 2, 2, n, 8)) for dim in in_dims]
    tensors = [x if dim is None else x.movedim(0, dim) for x, dim in zip(tensors, in_dims, strict=True)]
    embed = torch.rand(4, 2, 8) if embedded else None

    def function(q, k, v):
        return attention(q, k, v, slot_embed=embed, **case.options)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = torch.vmap(function, in_dims)(*tensors)
    for i in range(3):
        single = function(*(x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=True)))
        for x, y in zip(mapped, single, strict=True):
            torch.testing.assert_close(x[i], y, rtol=0, atol=0)


@pytest.mark.parametrize("in_dims", [(None, 0), (0, 2)], ids=str)
def test_vmap_takes_embeddings_as_well(in_dims):
    case = Case(height=2, width=4, block=2, b=2, h=2, d=8)
    tensors = case.tensors()
    q, embed = (
        x if dim is None else torch.stack([x, 2 * x, 3 * x]).movedim(0, dim)
        for x, dim in zip((tensors["q"], tensors["slot_embed"]), in_dims, strict=True)
    )
    leaves = [x.requires_grad_() for x in (q, embed)]

    def function(q, embed):
        return linattn.block_causal_attention(q, tensors["k"], tensors["v"], slot_embed=embed, **case.options)

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


@pytest.mark.parametrize("embedded", [False, True], ids=["", "embed"])
def test_vmap_over_gradients_keeps_those_of_the_embedding_apart(embedded):
    case = Case(height=2, width=4, block=2, b=2, h=2, d=8)
    q, k, v, embed = case.tensors().values()
    embed = embed if embedded else None
    out, lse = attention(q, k, v, slot_embed=embed, **case.options)
    options, grad = (2, 4, 2, None, "clamp", 0), torch.rand(3, *q.shape)

    def function(grad):
        return ops._block_causal_attention_backward(grad, None, q, k, v, embed, out, lse, *options)

    mapped = torch.vmap(function)(grad)
    for i in range(3):
        for found, expected in zip(mapped, function(grad[i]), strict=True):
            torch.testing.assert_close(found[i], expected)


def test_gradients_flow_through_vmap():
    case = Case(height=2, width=4, block=2, h=2, d=8)
    leaves = [torch.rand(3, 1, 2, case.keys, 8, requires_grad=True) for _ in range(3)]
    leaves.append(torch.rand(4, 2, 8, requires_grad=True))

    def function(q, k, v, embed):
        return attention(q, k, v, slot_embed=embed, **case.options)

    def total(results):
        return sum(x.square().sum() for x in results)

    mapped = torch.autograd.grad(total(torch.vmap(function, (0, 0, 0, None))(*leaves)), leaves)
    looped = torch.autograd.grad(sum(total(function(*(x[i] for x in leaves[:3]), leaves[3])) for i in range(3)), leaves)
    for x, y in zip(mapped, looped, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "case",
    [Case(b=2, h=3), Case(edge="drop"), Case(height=12, q_row=3, rows=6), Case(rows=3), Case(height=0, width=0)],
    ids=str,
)
def test_flop_counter_counts_the_pairs_that_attend_each_once(case):
    tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}
    pairs = case.sees.any(-1).sum().item()
    with FlopCounterMode(display=False) as forward:
        out = linattn.block_causal_attention(**tensors, **case.options)
    assert forward.get_total_flops() == 4 * case.b * case.h * case.d * pairs
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 10 * case.b * case.h * case.d * pairs


@on_every_backend()
def test_the_profiler_shows_which_kernel_ran(backend, device):
    arguments = model_inputs(4, 2, 2)
    arguments = [x.to(device).detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    with linattn.use_backend(backend):
        seen = runs(lambda: model(*arguments)[0].sum().backward())
    assert {f"linattn::_{op}_{backend}" for op in ("block_causal_attention", "block_causal_attention_backward")} <= seen


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_a_forced_backend_runs_or_raises_with_its_reason(backend):
    case = Case(height=2, width=2, block=1, d=8)
    reason = backends.why_not("block_causal_attention", backend, torch.device("cpu"), F32)
    with linattn.use_backend(backend):
        if reason is None:
            linattn.block_causal_attention(**case.tensors(), **case.options)
        else:
            with pytest.raises(ValueError, match=f"block_causal_attention: backend '{backend}'") as error:
                linattn.block_causal_attention(**case.tensors(), **case.options)
            assert reason in str(error.value)


# ------------------------------------------------------------------------------------- bad input

t = torch.rand


def good():
    x = t(2, 3, 24, 16)
    return {"q": x, "k": x, "v": x, "height": 4, "width": 6, "block": 2, "slot_embed": t(4, 3, 16)}


BAD = [
    # change, exception, words that the message must contain
    ({"q": t(3, 24, 16)}, ValueError, ["q", "(B, H, Nq, D)", "(3, 24, 16)"]),
    ({"k": t(2, 3, 24)}, ValueError, ["k", "height * width", "(2, 3, 24)"]),
    ({"k": t(2, 4, 24, 16)}, ValueError, ["k", "(2, 3, 24, 16)", "(2, 4, 24, 16)"]),
    ({"k": t(1, 3, 24, 16)}, ValueError, ["k", "(2, 3, 24, 16)", "(1, 3, 24, 16)"]),
    ({"k": t(2, 3, 24, 24)}, ValueError, ["k", "(2, 3, 24, 16)", "(2, 3, 24, 24)"]),
    ({"k": t(2, 3, 23, 16)}, ValueError, ["k", "(2, 3, 24, 16)", "(2, 3, 23, 16)"]),
    ({"v": t(2, 3, 23, 16)}, ValueError, ["v", "(2, 3, 24, 16)", "(2, 3, 23, 16)"]),
    ({"v": t(2, 3, 24, 8)}, ValueError, ["v", "(2, 3, 24, 16)", "(2, 3, 24, 8)"]),
    ({"height": 6}, ValueError, ["k", "(2, 3, 36, 16)", "(2, 3, 24, 16)"]),
    ({"height": 3, "width": 8}, ValueError, ["height", "multiple of block = 2", "3"]),
    ({"height": 8, "width": 3}, ValueError, ["width", "multiple of block = 2", "3"]),
    ({"block": 4}, ValueError, ["width", "multiple of block = 4", "6"]),
    ({"block": 0}, ValueError, ["block", ">= 1", "0"]),
    ({"block": -2}, ValueError, ["block", ">= 1", "-2"]),
    ({"height": -4, "width": -6}, ValueError, ["height", ">= 0", "-4"]),
    ({"width": -6}, ValueError, ["width", ">= 0", "-6"]),
    ({"q_row": -2}, ValueError, ["q_row", ">= 0", "-2"]),
    ({"q": t(2, 3, 12, 16), "q_row": 1}, ValueError, ["q_row", "multiple of block = 2", "1"]),
    ({"q_row": 2}, ValueError, ["q", "q_row = 2", "height = 4", "Nq = 24"]),
    ({"q": t(2, 3, 36, 16)}, ValueError, ["q", "q_row + rows <= height", "height = 4", "Nq = 36"]),
    ({"q": t(2, 3, 13, 16)}, ValueError, ["q", "rows * 6", "Nq = 13"]),
    ({"q": t(2, 3, 18, 16)}, ValueError, ["q", "rows a multiple of block = 2", "Nq = 18"]),
    ({"q": t(2, 3, 0, 16), "q_row": 6}, ValueError, ["q_row = 6", "height = 4"]),
    ({"height": 0, "width": 0}, ValueError, ["k", "(2, 3, 0, 16)", "(2, 3, 24, 16)"]),
    (
        {"height": 4, "width": 0, "k": t(2, 3, 0, 16), "v": t(2, 3, 0, 16)},
        ValueError,
        ["q", "rows * 0", "Nq = 24"],
    ),
    *(
        ({"slot_embed": x}, ValueError, ["slot_embed", "(4, H, D)", "(4, 3, 16)", str(tuple(x.shape))])
        for x in (t(3, 16), t(3, 3, 16), t(4, 1, 16), t(4, 3, 8), t(2, 4, 3, 16))
    ),
    ({"slot_embed": torch.ones(4, 3, 16, dtype=torch.int32)}, TypeError, ["slot_embed", "int32"]),
    ({"slot_embed": t(4, 3, 16, device="meta")}, ValueError, ["slot_embed", "cpu", "meta"]),
    *(({"edge": edge}, ValueError, ["edge", "clamp", "drop", repr(edge)]) for edge in ("", "wrap", "Clamp")),
    *(
        (dict.fromkeys("qkv", t(2, 3, 24, d)), ValueError, ["q", "head dim", f"{LOW}..{HIGH}", str(d)])
        for d in (0, LOW - 1, HIGH + 1)
    ),
    ({"q": t(2, 3, 24, 16).half()}, TypeError, ["k", "float16", "float32"]),
    ({"k": t(2, 3, 24, 16).bfloat16()}, TypeError, ["k", "float32", "bfloat16"]),
    ({"v": t(2, 3, 24, 16).double()}, TypeError, ["v", "float32", "float64"]),
    *(
        (dict.fromkeys("qkv", torch.ones(2, 3, 24, 16).to(dtype)), TypeError, ["q", str(dtype)[6:]])
        for dtype in (torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    ({"k": t(2, 3, 24, 16, device="meta")}, ValueError, ["k", "cpu", "meta"]),
]


def bad_id(row):
    def describe(value):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{value.device}" if isinstance(value, torch.Tensor) else value

    return "-".join(f"{name}={describe(value)}" for name, value in row[0].items())


@pytest.mark.parametrize("raw", [False, True], ids=["linattn", "torch.ops"])
@pytest.mark.parametrize("row", BAD, ids=bad_id)
def test_bad_input_is_refused_before_any_kernel_runs_by_naming_argument_expectation_and_value(row, raw, monkeypatch):
    change, exception, words = row
    monkeypatch.setattr(backends, "choose", lambda *_: pytest.fail("a kernel was about to be chosen"))
    function = (ops if raw else linattn).block_causal_attention
    with pytest.raises((exception, RuntimeError) if raw else exception) as error:
        function(**(good() | change))
    assert "block_causal_attention" in str(error.value)
    for word in words:
        assert word in str(error.value), word


BAD_GRADIENTS = [
    ({"grad_out": t(2, 3, 23, 16)}, ["grad_out", "(2, 3, 24, 16)", "(2, 3, 23, 16)"]),
    ({"grad_out": t(2, 3, 24, 16).half()}, ["grad_out", "float16"]),
    ({"grad_lse": t(2, 3, 23)}, ["grad_lse", "(2, 3, 24)", "(2, 3, 23)"]),
    ({"out": t(2, 3, 24, 8)}, ["out", "(2, 3, 24, 16)", "(2, 3, 24, 8)"]),
    ({"lse": t(2, 3)}, ["lse", "(2, 3, 24)", "(2, 3)"]),
    ({"lse": t(2, 3, 24, device="meta")}, ["lse", "cpu", "meta"]),
]


@pytest.mark.parametrize(("change", "words"), BAD_GRADIENTS, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_the_backward_op_checks_what_only_it_is_given(change, words):
    arguments = good() | {"grad_out": t(2, 3, 24, 16), "grad_lse": None, "out": t(2, 3, 24, 16)}
    arguments |= {"lse": t(2, 3, 24), "scale": None, "edge": "clamp", "q_row": 0}
    ops._block_causal_attention_backward(**arguments)
    with pytest.raises((ValueError, TypeError)) as error:
        ops._block_causal_attention_backward(**(arguments | change))
    for word in words:
        assert word in str(error.value), word


def test_good_input_of_the_table_is_accepted():
    linattn.block_causal_attention(**good())


def test_bad_input_is_refused_while_compiling_as_well():
    torch._dynamo.reset()
    compiled = torch.compile(linattn.block_causal_attention, backend="aot_eager", fullgraph=True)
    x = torch.rand(1, 2, 6, 16)
    with pytest.raises(Exception, match=r"height must be a multiple of block"):
        compiled(x, x, x, 3, 2, 2)


def test_options_are_keyword_only():
    x = torch.rand(1, 2, 4, 16)
    with pytest.raises(TypeError, match="positional"):
        linattn.block_causal_attention(x, x, x, 2, 2, 2, torch.rand(4, 2, 16))


def test_lse_is_returned_when_asked_for():
    x = torch.rand(1, 2, 4, 16)
    out = linattn.block_causal_attention(x, x, x, 2, 2, 1)
    again, lse = linattn.block_causal_attention(x, x, x, 2, 2, 1, return_lse=True)
    assert torch.equal(out, again)
    assert lse.shape == (1, 2, 4)
