"""Two-dimensional sliding-window attention with text and pooled keys in Triton, forward and backward.

    out_i = sum_j p_ij v_j     p_ij = exp(scale q_i . k_j - lse_i)     lse_i = log sum_j exp(scale q_i . k_j)

An image query (y, x) sees all text keys, the image keys with (y - y')^2 + (x - x')^2 < radius^2, and all pooled keys; a
text query sees all text and image keys. Queries and keys are taken as 2-D tiles straight from raster order: a tile is
QUERY_Y (KEY_Y) pieces of QUERY_X (KEY_X) neighbouring rows of memory, so nothing is permuted or copied. In raster order
a block of 128 keys has 3 % live pairs at radius 8; a tile of 8 x 8 against 8 x 16 queries has 26 % (42 % at radius 16,
59 % at 32). Which tiles are within reach depends on their distance alone and is computed per row of tiles with one
integer square root (_reach); a tile whose pairs are all live goes without a mask, the others compare (x - x')^2 with
radius^2 - (y - y')^2, both of which exist once per pair of columns and of rows: one comparison and one selection per
score, no division. Sizes are run-time values: one binary serves every grid and radius.

  image_forward       one program per (head, query tile): text keys, partial tiles, whole tiles, pooled keys
  text_forward        text queries see every key, so one program per (head, block of queries, split of the keys)
  text_merge          the splits' results by log-sum-exp, in their order
  image_grad_query    grad_q by query tiles, as image_forward; leaves lse and delta for the keys
  text_grad_query     grad_q of the text queries, split over the keys; partial sums
  image_grad_key      grad_k and grad_v by key tiles: text queries, then the query tiles within reach
  dense_grad_key      grad_k and grad_v of text keys and of pooled keys, split over the queries; partial sums
  sum_partials        partial sums in their order: no atomics, the same bits every time

Numbers: products take the input dtype (float32 multiplies exactly, on the FMA units: input_precision="ieee") and
accumulate in float32; p and ds are rounded to the input dtype for their products. The softmax runs in base 2 on raw
scores with the scale in the exponent's FMA, which wants scale > 0 (positive_scale). Data flow at head dim 128, 16 bit:
a program of image_forward holds 32 KB of q and reads 32 KB of k and v per tile for 4.2 MFLOP, 128 FLOP per byte of L2.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .common import (
    launched_on_tensor_device,
    load_rows,
    multiprocessors,
    positive_scale,
    store_rows,
    stride_unit,
    strides,
    tensor_core,
)

# Every run-time integer and float of the kernels below: none is specialised on (a radius of 1 would be a constant).
_TENSORS = ("q", "k", "v", "pk", "pv", "o", "g", "gq", "gk", "gv", "x", "w")
SIZES = ["heads", "queries", "height", "width", "radius", "text", "k_text", "k_image", "pooled", "q_row", "q_rows"]
SIZES += ["q_text", "q_image", "q_texts", "keys", "first", "count", "chunk", "splits", "factor", "patches_x", "patches"]
SIZES += ["programs", "scale", "head_dim"]
SIZES += [f"{tensor}_s{axis}" for tensor in _TENSORS for axis in "bhn"]

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Squares of distances are int32 in the kernels, and a tile may reach 64 tokens beyond the radius.
LARGEST_RADIUS = 46_000

# ---- geometry --------------------------------------------------------------------------------------------------------


@triton.jit
def _root(n):
    """The largest integer whose square is at most n (0 <= n < 2**31)."""
    root = tl.sqrt(n.to(tl.float32)).to(tl.int32)  # at most one off
    root = tl.where(root * root > n, root - 1, root)
    return tl.where((root + 1) * (root + 1) <= n, root + 1, root)


@triton.jit
def _floor_div(n, STEP: tl.constexpr):
    """n // STEP as Python has it; Triton's truncates."""
    return tl.where(n >= 0, n // STEP, -((STEP - 1 - n) // STEP))


@triton.jit
def _within(index, size):
    """0 <= index < size in one comparison (size >= 0)."""
    return index.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _rows_in_reach(y0, rows, radius, OWN_Y: tl.constexpr, Y: tl.constexpr):
    """Rows lo .. hi of tiles that the own tile, at row y0, may reach. Tile row j begins at row y0 + j * Y."""
    lo = -tl.minimum((radius + Y - 2) // Y, _floor_div(y0 + Y - 1, Y))
    hi = tl.minimum((radius + OWN_Y - 2) // Y, _floor_div(rows - 1 - y0, Y)) + 1
    return lo, hi


@triton.jit
def _reach(j, y0, x0, rows, width, radius, OWN_Y: tl.constexpr, OWN_X: tl.constexpr, Y: tl.constexpr, X: tl.constexpr):
    """Tiles c of tile row j that hold a live pair: [lo, hi); those that hold nothing else: [whole_lo, whole_hi).

    Tile (j, c) begins at (y0 + j * Y, x0 + c * X) of a grid of rows x width; the own tile, OWN_Y x OWN_X, at (y0, x0),
    which may lie above or below that grid (strips). A tile is touched if its nearest pair is live, whole if its
    farthest is and it lies inside the grid. A row of whole tiles only gives one of them away, so that every row has a
    partial tile to step over. Rows nearer to the own tile reach further, so the rows with whole tiles are neighbours.
    """
    oy = j * Y
    inside = radius * radius - 1
    near = tl.maximum(tl.maximum(oy - (OWN_Y - 1), -(oy + Y - 1)), 0)
    touch = _root(tl.maximum(inside - near * near, 0))
    lo = -tl.minimum((touch + X - 1) // X, (x0 + X - 1) // X)
    hi = tl.minimum((touch + OWN_X - 1) // X, (width - 1 - x0) // X) + 1
    far = tl.maximum(oy + Y - 1, OWN_Y - 1 - oy)
    left = inside - far * far
    cover = _root(tl.maximum(left, 0))
    whole_lo = -tl.minimum(tl.maximum(cover - (OWN_X - 1), 0) // X, x0 // X)
    whole_hi = tl.minimum(tl.maximum(cover - (X - 1), 0) // X + 1, (width - x0) // X)
    some = (left >= 0) & (cover >= OWN_X - 1) & (cover >= X - 1) & (y0 + oy >= 0) & (y0 + oy + Y <= rows)
    whole_hi = tl.where((whole_lo == lo) & (whole_hi == hi), whole_hi - 1, whole_hi)
    some = some & (whole_lo < whole_hi)
    return lo, tl.where(some, whole_lo, hi), tl.where(some, whole_hi, hi), hi


@triton.jit
def _partial_row(
    j, y0, x0, rows, width, radius, OWN_Y: tl.constexpr, OWN_X: tl.constexpr, Y: tl.constexpr, X: tl.constexpr
):
    """(first partial tile, whole_lo, whole_hi, hi) of tile row j."""
    lo, whole_lo, whole_hi, hi = _reach(j, y0, x0, rows, width, radius, OWN_Y, OWN_X, Y, X)
    return tl.where(lo == whole_lo, whole_hi, lo), whole_lo, whole_hi, hi


@triton.jit
def _count_tiles(
    y0, x0, rows, width, radius, OWN_Y: tl.constexpr, OWN_X: tl.constexpr, Y: tl.constexpr, X: tl.constexpr
):
    """(first tile row, partial tiles, first tile row with a whole tile, whole tiles)"""
    row_lo, row_hi = _rows_in_reach(y0, rows, radius, OWN_Y, Y)
    partial = 0
    whole = 0
    whole_row = row_lo
    for j in range(row_lo, row_hi):
        lo, whole_lo, whole_hi, hi = _reach(j, y0, x0, rows, width, radius, OWN_Y, OWN_X, Y, X)
        whole_row = tl.where((whole == 0) & (whole_lo < whole_hi), j, whole_row)
        whole += whole_hi - whole_lo
        partial += hi - lo - (whole_hi - whole_lo)
    return row_lo, partial, whole_row, whole


@triton.jit
def _live(
    score, dead, oy, ox, y0, x0, rows, width, radius,
    OWN_Y: tl.constexpr, OWN_X: tl.constexpr, Y: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """score [OWN_Y * OWN_X, Y * X] where the pair is live, dead elsewhere; the other tile begins oy, ox away."""
    y = oy + tl.arange(0, Y)
    x = ox + tl.arange(0, X)
    dy = y[None, :] - tl.arange(0, OWN_Y)[:, None]
    dx = x[None, :] - tl.arange(0, OWN_X)[:, None]
    room = tl.where(_within(y0 + y, rows)[None, :], radius * radius - dy * dy, 0)  # nothing is closer than 0
    square = tl.where(_within(x0 + x, width)[None, :], dx * dx, 2147483647)
    pairs = tl.reshape(score, [OWN_Y, OWN_X, Y, X])
    pairs = tl.where(square[None, :, None, :] < room[:, None, :, None], pairs, dead)
    return tl.reshape(pairs, [OWN_Y * OWN_X, Y * X])


@triton.jit
def _tile_live(y, x, rows, width, Y: tl.constexpr, X: tl.constexpr):
    """Which tokens of the tile that begins at (y, x) exist."""
    n = tl.arange(0, Y * X)
    return _within(y + n // X, rows) & _within(x + n % X, width)


@triton.jit
def _head(program, heads):
    return (program // heads).to(tl.int64), (program % heads).to(tl.int64)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _product(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load(rows, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr = True):
    """A block of rows from where it lies: (pointer, tokens, which of them are live, stride)."""
    X, token, live, x_sn = rows
    return load_rows(X, token, live, x_sn, UNIT, 0, D, BLOCK_D, MASKED, D == BLOCK_D)


@triton.jit
def _scores(a, a_rows, b, b_rows, head_dim, D: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr):
    """a b^T of two blocks of rows. With CHUNK their columns are read again from memory, CHUNK at a time.

    (Then nobody else may need a or b whole. head_dim is D again, at run time: a loop over a constant is unrolled until
    registers run out.)
    """
    if CHUNK == 0:
        return _product(a, tl.trans(b))
    else:
        A, a_token, a_live, a_sn = a_rows
        B, b_token, b_live, b_sn = b_rows
        total = tl.zeros([a_token.shape[0], b_token.shape[0]], tl.float32)
        for first in range(0, head_dim, CHUNK):
            x = load_rows(A, a_token, a_live, a_sn, UNIT, first, D, CHUNK)
            y = load_rows(B, b_token, b_live, b_sn, UNIT, first, D, CHUNK)
            total = _product(x, tl.trans(y), total)
        return total


@triton.jit
def _attend(score, v, acc, m, l, sc):
    """One step of the online softmax. m is the largest raw score so far, sc = scale * log2(e) > 0."""
    m_new = tl.maximum(m, tl.max(score, 1))
    top = m_new * sc
    p = tl.exp2(score * sc - top[:, None])
    alpha = tl.exp2(m * sc - top)
    l = l * alpha + tl.sum(p, 1)
    acc = _product(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_new, l


@triton.jit
def _attend_dense(
    q, q_at, K, V, count, k_sn, v_sn, acc, m, l, sc, head_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All keys 0 .. count: whole blocks without a mask, then the rest with one."""
    n = tl.arange(0, BLOCK_K)
    whole = count // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        at = tl.cast(start, tl.int64)
        k_at = (K + at * k_sn * UNIT, n, n < BLOCK_K, k_sn)
        k = _load(k_at, D, BLOCK_D, UNIT, False)
        v = _load((V + at * v_sn * UNIT, n, n < BLOCK_K, v_sn), D, BLOCK_D, UNIT, False)
        acc, m, l = _attend(_scores(q, q_at, k, k_at, head_dim, D, UNIT, CHUNK), v, acc, m, l, sc)
    if whole < count:
        at = tl.cast(whole, tl.int64)
        live = n < count - whole
        k_at = (K + at * k_sn * UNIT, n, live, k_sn)
        k = _load(k_at, D, BLOCK_D, UNIT)
        v = _load((V + at * v_sn * UNIT, n, live, v_sn), D, BLOCK_D, UNIT)
        score = tl.where(live[None, :], _scores(q, q_at, k, k_at, head_dim, D, UNIT, CHUNK), float("-inf"))
        acc, m, l = _attend(score, v, acc, m, l, sc)
    return acc, m, l


@triton.jit
def _softmax_start(sc, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """acc, m, l before the first key. m is finite, also times sc: a row without a live key yet stays 0, not NaN."""
    m = tl.full([ROWS], -1e38, tl.float32) / tl.maximum(sc, 1.0)
    return tl.zeros([ROWS, BLOCK_D], tl.float32), m, tl.zeros([ROWS], tl.float32)


@triton.jit(do_not_specialize=SIZES)
def image_forward_kernel(
    Q, K, V, PK, PV, O, LSE,
    heads, queries, height, width, radius, text, k_text, k_image, pooled, q_row, q_rows, q_image,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, pk_sb, pk_sh, pk_sn, pv_sb, pv_sh, pv_sn, o_sb, o_sh, o_sn,
    scale, head_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERY_Y: tl.constexpr, QUERY_X: tl.constexpr, KEY_Y: tl.constexpr,
    KEY_X: tl.constexpr, BLOCK_K: tl.constexpr, HAS_POOLED: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of image queries; k_text, k_image, q_image: where text and image begin in k and q."""
    FITS: tl.constexpr = D == BLOCK_D
    tiles_x = tl.cdiv(width, QUERY_X)
    tiles = tiles_x * tl.cdiv(q_rows, QUERY_Y)
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    b, h = _head(row, heads)
    strip_y = tile // tiles_x * QUERY_Y
    x0 = tile % tiles_x * QUERY_X
    y0 = q_row + strip_y
    sc = scale * _LOG2E

    n = tl.arange(0, QUERY_Y * QUERY_X)
    token = n // QUERY_X * width + n % QUERY_X
    live = _tile_live(strip_y, x0, q_rows, width, QUERY_Y, QUERY_X)
    first = q_image + strip_y.to(tl.int64) * width + x0
    q_at = (Q + b * q_sb * UNIT + h * q_sh * UNIT + first * q_sn * UNIT, token, live, q_sn)
    q = _load(q_at, D, BLOCK_D, UNIT)
    K += b * k_sb * UNIT + h * k_sh * UNIT
    V += b * v_sb * UNIT + h * v_sh * UNIT
    acc, m, l = _softmax_start(sc, QUERY_Y * QUERY_X, BLOCK_D)

    start = tl.cast(k_text, tl.int64)
    acc, m, l = _attend_dense(
        q, q_at, K + start * k_sn * UNIT, V + start * v_sn * UNIT, text, k_sn, v_sn, acc, m, l, sc, head_dim,
        D, BLOCK_D, UNIT, BLOCK_K, CHUNK,
    )  # fmt: skip

    start = k_image + y0.to(tl.int64) * width + x0  # the key of the tile's first query
    KI = K + start * k_sn * UNIT
    VI = V + start * v_sn * UNIT
    n = tl.arange(0, KEY_Y * KEY_X)
    key = n // KEY_X * width + n % KEY_X
    j, partial, whole_row, whole = _count_tiles(y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)
    c, whole_lo, whole_hi, hi = _partial_row(j, y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)
    for _ in range(partial):
        oy = j * KEY_Y
        ox = c * KEY_X
        at = oy.to(tl.int64) * width + ox
        inside = _tile_live(y0 + oy, x0 + ox, height, width, KEY_Y, KEY_X)
        k_at = (KI + at * k_sn * UNIT, key, inside, k_sn)
        v_at = (VI + at * v_sn * UNIT, key, inside, v_sn)
        k = _load(k_at, D, BLOCK_D, UNIT)
        v = _load(v_at, D, BLOCK_D, UNIT)
        score = _scores(q, q_at, k, k_at, head_dim, D, UNIT, CHUNK)
        score = _live(score, float("-inf"), oy, ox, y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)
        acc, m, l = _attend(score, v, acc, m, l, sc)
        c += 1
        c = tl.where(c == whole_lo, whole_hi, c)
        if c >= hi:
            j += 1
            c, whole_lo, whole_hi, hi = _partial_row(j, y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)

    j = whole_row
    _lo, c, whole_hi, _hi = _reach(j, y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)
    for _ in range(whole):
        at = (j * KEY_Y).to(tl.int64) * width + c * KEY_X
        k_at = (KI + at * k_sn * UNIT, key, key >= 0, k_sn)
        v_at = (VI + at * v_sn * UNIT, key, key >= 0, v_sn)
        k = _load(k_at, D, BLOCK_D, UNIT, False)
        v = _load(v_at, D, BLOCK_D, UNIT, False)
        acc, m, l = _attend(_scores(q, q_at, k, k_at, head_dim, D, UNIT, CHUNK), v, acc, m, l, sc)
        c += 1
        if c >= whole_hi:
            j += 1
            _lo, c, whole_hi, _hi = _reach(j, y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)

    if HAS_POOLED:
        PK += b * pk_sb * UNIT + h * pk_sh * UNIT
        PV += b * pv_sb * UNIT + h * pv_sh * UNIT
        acc, m, l = _attend_dense(
            q, q_at, PK, PV, pooled, pk_sn, pv_sn, acc, m, l, sc, head_dim, D, BLOCK_D, UNIT, BLOCK_K, CHUNK
        )

    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    store_rows(O + b * o_sb * UNIT + h * o_sh * UNIT + first * o_sn * UNIT, out, token, live, o_sn, UNIT, 0, D, BLOCK_D,
               True, FITS)  # fmt: skip
    tl.store(LSE + row.to(tl.int64) * queries + first + token, m * scale + tl.log(l), mask=live)


@triton.jit(do_not_specialize=SIZES)
def text_forward_kernel(
    Q, K, V, PART, PART_LSE, heads, q_text, q_texts, keys, chunk, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn,
    scale, head_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """out and lse of a block of text queries over one chunk of the keys; they begin at q_text in q."""
    blocks = tl.cdiv(q_texts, BLOCK_Q)
    row = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_Q
    split = tl.program_id(1)
    b, h = _head(row, heads)
    sc = scale * _LOG2E
    n = tl.arange(0, BLOCK_Q)
    live = first + n < q_texts
    at = tl.cast(q_text, tl.int64) + first
    q_at = (Q + b * q_sb * UNIT + h * q_sh * UNIT + at * q_sn * UNIT, n, live, q_sn)
    q = _load(q_at, D, BLOCK_D, UNIT)
    start = tl.cast(split, tl.int64) * chunk
    K += b * k_sb * UNIT + h * k_sh * UNIT + start * k_sn * UNIT
    V += b * v_sb * UNIT + h * v_sh * UNIT + start * v_sn * UNIT
    acc, m, l = _softmax_start(sc, BLOCK_Q, BLOCK_D)
    count = tl.minimum(keys - split * chunk, chunk)
    acc, m, l = _attend_dense(
        q, q_at, K, V, count, k_sn, v_sn, acc, m, l, sc, head_dim, D, BLOCK_D, UNIT, BLOCK_K, CHUNK
    )
    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    at = (tl.cast(split, tl.int64) * (tl.num_programs(0) // blocks) + row) * q_texts + first
    store_rows(PART + at * D, out, n, live, D, 1, 0, D, BLOCK_D, True, D == BLOCK_D)
    tl.store(PART_LSE + at + n, m * scale + tl.log(l), mask=live)


@triton.jit(do_not_specialize=SIZES)
def text_merge_kernel(
    PART, PART_LSE, O, LSE, heads, queries, q_text, q_texts, splits, o_sb, o_sh, o_sn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out = sum of the splits' out weighted by exp(their lse - lse), lse = log sum exp(their lse)."""
    blocks = tl.cdiv(q_texts, BLOCK_Q)
    row = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_Q
    step = tl.cast(tl.num_programs(0) // blocks, tl.int64) * q_texts
    b, h = _head(row, heads)
    n = tl.arange(0, BLOCK_Q)
    live = first + n < q_texts
    at = row.to(tl.int64) * q_texts + first
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(PART_LSE + at + split * step + n, mask=live, other=0.0))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for split in range(splits):
        part = at + split * step
        weight = tl.exp2((tl.load(PART_LSE + part + n, mask=live, other=0.0) - top) * _LOG2E)
        out = load_rows(PART + part * D, n, live, D, 1, 0, D, BLOCK_D, True, D == BLOCK_D)
        acc += weight[:, None] * out
        total += weight
    at = tl.cast(q_text, tl.int64) + first
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    store_rows(O + b * o_sb * UNIT + h * o_sh * UNIT + at * o_sn * UNIT, out, n, live, o_sn, UNIT, 0, D, BLOCK_D, True,
               D == BLOCK_D)  # fmt: skip
    tl.store(LSE + row.to(tl.int64) * queries + at + n, top + tl.log(total), mask=live)


# ---- backward: gradient of the queries -------------------------------------------------------------------------------


@triton.jit
def _p_and_ds(score, dp, lse, delta, sc):
    """p and ds from raw scores and dp = grad_out v^T; lse (base 2) and delta of the queries broadcast."""
    p = tl.exp2(score * sc - lse)
    return p, p * (dp - delta)


@triton.jit
def _grad_query_dense(
    q, q_at, g, g_at, K, V, count, k_sn, v_sn, gq, lse, delta, sc, head_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """gq + ds k over the keys 0 .. count."""
    n = tl.arange(0, BLOCK_K)
    whole = count // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        at = tl.cast(start, tl.int64)
        k_at = (K + at * k_sn * UNIT, n, n < BLOCK_K, k_sn)
        v_at = (V + at * v_sn * UNIT, n, n < BLOCK_K, v_sn)
        k = _load(k_at, D, BLOCK_D, UNIT, False)
        v = _load(v_at, D, BLOCK_D, UNIT, False)
        score = _scores(q, q_at, k, k_at, head_dim, D, UNIT, CHUNK)
        dp = _scores(g, g_at, v, v_at, head_dim, D, UNIT, CHUNK)
        _p, ds = _p_and_ds(score, dp, lse[:, None], delta[:, None], sc)
        gq = _product(ds.to(k.dtype), k, gq)
    if whole < count:
        at = tl.cast(whole, tl.int64)
        live = n < count - whole
        k_at = (K + at * k_sn * UNIT, n, live, k_sn)
        v_at = (V + at * v_sn * UNIT, n, live, v_sn)
        k = _load(k_at, D, BLOCK_D, UNIT)
        v = _load(v_at, D, BLOCK_D, UNIT)
        score = _scores(q, q_at, k, k_at, head_dim, D, UNIT, CHUNK)
        dp = _scores(g, g_at, v, v_at, head_dim, D, UNIT, CHUNK)
        _p, ds = _p_and_ds(score, dp, lse[:, None], delta[:, None], sc)
        ds = tl.where(live[None, :], ds, 0.0)  # exp2(-lse) of a padded key may be inf, and inf * 0 is not 0
        gq = _product(ds.to(k.dtype), k, gq)
    return gq


@triton.jit
def _store_statistics(STATS, at, lse, delta, live):
    """What the key kernels need of a query, side by side: lse in base 2, and delta."""
    tl.store(STATS + 2 * at, lse, mask=live)
    tl.store(STATS + 2 * at + 1, delta, mask=live)


@triton.jit
def _delta(g, O, GLSE, o_sn, token, live, HAS_GRAD_LSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
           UNIT: tl.constexpr):  # fmt: skip
    """delta_i = grad_out_i . out_i - grad_lse_i"""
    out = load_rows(O, token, live, o_sn, UNIT, 0, D, BLOCK_D, True, D == BLOCK_D)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(GLSE + token, mask=live, other=0.0)
    return delta


@triton.jit(do_not_specialize=SIZES)
def image_grad_query_kernel(
    G, GLSE, Q, K, V, PK, PV, O, LSE, STATS, GQ,
    heads, queries, height, width, radius, text, k_text, k_image, pooled, q_row, q_rows, q_image,
    g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, pk_sb, pk_sh, pk_sn, pv_sb, pv_sh, pv_sn,
    o_sb, o_sh, o_sn, gq_sb, gq_sh, gq_sn, scale, head_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERY_Y: tl.constexpr, QUERY_X: tl.constexpr, KEY_Y: tl.constexpr,
    KEY_X: tl.constexpr, BLOCK_K: tl.constexpr, HAS_POOLED: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grad_q, and lse and delta for the key kernels, of one tile of image queries; keys as in image_forward_kernel."""
    FITS: tl.constexpr = D == BLOCK_D
    tiles_x = tl.cdiv(width, QUERY_X)
    tiles = tiles_x * tl.cdiv(q_rows, QUERY_Y)
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    b, h = _head(row, heads)
    strip_y = tile // tiles_x * QUERY_Y
    x0 = tile % tiles_x * QUERY_X
    y0 = q_row + strip_y
    sc = scale * _LOG2E

    n = tl.arange(0, QUERY_Y * QUERY_X)
    token = n // QUERY_X * width + n % QUERY_X
    live = _tile_live(strip_y, x0, q_rows, width, QUERY_Y, QUERY_X)
    first = q_image + strip_y.to(tl.int64) * width + x0
    at = row.to(tl.int64) * queries + first
    g_at = (G + b * g_sb * UNIT + h * g_sh * UNIT + first * g_sn * UNIT, token, live, g_sn)
    g = _load(g_at, D, BLOCK_D, UNIT)
    delta = _delta(g, O + b * o_sb * UNIT + h * o_sh * UNIT + first * o_sn * UNIT, GLSE + at, o_sn, token, live,
                   HAS_GRAD_LSE, D, BLOCK_D, UNIT)  # fmt: skip
    lse = tl.load(LSE + at + token, mask=live, other=0.0) * _LOG2E
    _store_statistics(STATS, at + token, lse, delta, live)
    q_at = (Q + b * q_sb * UNIT + h * q_sh * UNIT + first * q_sn * UNIT, token, live, q_sn)
    q = _load(q_at, D, BLOCK_D, UNIT)
    K += b * k_sb * UNIT + h * k_sh * UNIT
    V += b * v_sb * UNIT + h * v_sh * UNIT
    gq = tl.zeros([QUERY_Y * QUERY_X, BLOCK_D], tl.float32)

    start = tl.cast(k_text, tl.int64)
    gq = _grad_query_dense(
        q, q_at, g, g_at, K + start * k_sn * UNIT, V + start * v_sn * UNIT, text, k_sn, v_sn, gq, lse, delta, sc,
        head_dim, D, BLOCK_D, UNIT, BLOCK_K, CHUNK,
    )  # fmt: skip

    start = k_image + y0.to(tl.int64) * width + x0
    KI = K + start * k_sn * UNIT
    VI = V + start * v_sn * UNIT
    n = tl.arange(0, KEY_Y * KEY_X)
    key = n // KEY_X * width + n % KEY_X
    j, partial, whole_row, whole = _count_tiles(y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)
    c, whole_lo, whole_hi, hi = _partial_row(j, y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)
    for _ in range(partial):
        oy = j * KEY_Y
        ox = c * KEY_X
        at = oy.to(tl.int64) * width + ox
        inside = _tile_live(y0 + oy, x0 + ox, height, width, KEY_Y, KEY_X)
        k_at = (KI + at * k_sn * UNIT, key, inside, k_sn)
        v_at = (VI + at * v_sn * UNIT, key, inside, v_sn)
        k = _load(k_at, D, BLOCK_D, UNIT)
        v = _load(v_at, D, BLOCK_D, UNIT)
        score = _scores(q, q_at, k, k_at, head_dim, D, UNIT, CHUNK)
        dp = _scores(g, g_at, v, v_at, head_dim, D, UNIT, CHUNK)
        _p, ds = _p_and_ds(score, dp, lse[:, None], delta[:, None], sc)
        ds = _live(ds, 0.0, oy, ox, y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)
        gq = _product(ds.to(k.dtype), k, gq)
        c += 1
        c = tl.where(c == whole_lo, whole_hi, c)
        if c >= hi:
            j += 1
            c, whole_lo, whole_hi, hi = _partial_row(j, y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)

    j = whole_row
    _lo, c, whole_hi, _hi = _reach(j, y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)
    for _ in range(whole):
        at = (j * KEY_Y).to(tl.int64) * width + c * KEY_X
        k_at = (KI + at * k_sn * UNIT, key, key >= 0, k_sn)
        v_at = (VI + at * v_sn * UNIT, key, key >= 0, v_sn)
        k = _load(k_at, D, BLOCK_D, UNIT, False)
        v = _load(v_at, D, BLOCK_D, UNIT, False)
        score = _scores(q, q_at, k, k_at, head_dim, D, UNIT, CHUNK)
        dp = _scores(g, g_at, v, v_at, head_dim, D, UNIT, CHUNK)
        _p, ds = _p_and_ds(score, dp, lse[:, None], delta[:, None], sc)
        gq = _product(ds.to(k.dtype), k, gq)
        c += 1
        if c >= whole_hi:
            j += 1
            _lo, c, whole_hi, _hi = _reach(j, y0, x0, height, width, radius, QUERY_Y, QUERY_X, KEY_Y, KEY_X)

    if HAS_POOLED:
        PK += b * pk_sb * UNIT + h * pk_sh * UNIT
        PV += b * pv_sb * UNIT + h * pv_sh * UNIT
        gq = _grad_query_dense(
            q,
            q_at,
            g,
            g_at,
            PK,
            PV,
            pooled,
            pk_sn,
            pv_sn,
            gq,
            lse,
            delta,
            sc,
            head_dim,
            D,
            BLOCK_D,
            UNIT,
            BLOCK_K,
            CHUNK,
        )

    store_rows(GQ + b * gq_sb * UNIT + h * gq_sh * UNIT + first * gq_sn * UNIT, gq * scale, token, live, gq_sn, UNIT, 0,
               D, BLOCK_D, True, FITS)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def text_grad_query_kernel(
    G, GLSE, Q, K, V, O, LSE, STATS, PART, heads, queries, q_text, q_texts, keys, chunk,
    g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, o_sb, o_sh, o_sn, scale, head_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Partial grad_q of a block of text queries over one chunk of the keys, and their lse and delta."""
    blocks = tl.cdiv(q_texts, BLOCK_Q)
    row = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_Q
    split = tl.program_id(1)
    b, h = _head(row, heads)
    sc = scale * _LOG2E
    n = tl.arange(0, BLOCK_Q)
    live = first + n < q_texts
    query = tl.cast(q_text, tl.int64) + first
    at = row.to(tl.int64) * queries + query
    g_at = (G + b * g_sb * UNIT + h * g_sh * UNIT + query * g_sn * UNIT, n, live, g_sn)
    g = _load(g_at, D, BLOCK_D, UNIT)
    delta = _delta(g, O + b * o_sb * UNIT + h * o_sh * UNIT + query * o_sn * UNIT, GLSE + at, o_sn, n, live,
                   HAS_GRAD_LSE, D, BLOCK_D, UNIT)  # fmt: skip
    lse = tl.load(LSE + at + n, mask=live, other=0.0) * _LOG2E
    if split == 0:
        _store_statistics(STATS, at + n, lse, delta, live)
    q_at = (Q + b * q_sb * UNIT + h * q_sh * UNIT + query * q_sn * UNIT, n, live, q_sn)
    q = _load(q_at, D, BLOCK_D, UNIT)
    start = tl.cast(split, tl.int64) * chunk
    K += b * k_sb * UNIT + h * k_sh * UNIT + start * k_sn * UNIT
    V += b * v_sb * UNIT + h * v_sh * UNIT + start * v_sn * UNIT
    gq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    count = tl.minimum(keys - split * chunk, chunk)
    gq = _grad_query_dense(
        q, q_at, g, g_at, K, V, count, k_sn, v_sn, gq, lse, delta, sc, head_dim, D, BLOCK_D, UNIT, BLOCK_K, CHUNK
    )
    at = (tl.cast(split, tl.int64) * (tl.num_programs(0) // blocks) + row) * q_texts + first
    store_rows(PART + at * D, gq * scale, n, live, D, 1, 0, D, BLOCK_D, True, D == BLOCK_D)


# ---- backward: gradients of the keys and values ----------------------------------------------------------------------


@triton.jit
def _grad_key_dense(
    k, k_at, v, v_at, Q, G, STATS, count, q_sn, g_sn, gk, gv, sc, head_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """gk + ds^T q and gv + p^T g over the queries 0 .. count; scores are held transposed, [keys, queries]."""
    n = tl.arange(0, BLOCK_Q)
    whole = count // BLOCK_Q * BLOCK_Q
    for start in range(0, whole, BLOCK_Q):
        at = tl.cast(start, tl.int64)
        q_at = (Q + at * q_sn * UNIT, n, n < BLOCK_Q, q_sn)
        g_at = (G + at * g_sn * UNIT, n, n < BLOCK_Q, g_sn)
        q = _load(q_at, D, BLOCK_D, UNIT, False)
        g = _load(g_at, D, BLOCK_D, UNIT, False)
        lse = tl.load(STATS + 2 * (at + n))
        delta = tl.load(STATS + 2 * (at + n) + 1)
        score = _scores(k, k_at, q, q_at, head_dim, D, UNIT, CHUNK)
        dp = _scores(v, v_at, g, g_at, head_dim, D, UNIT, CHUNK)
        p, ds = _p_and_ds(score, dp, lse[None, :], delta[None, :], sc)
        gv = _product(p.to(g.dtype), g, gv)
        gk = _product(ds.to(q.dtype), q, gk)
    if whole < count:
        at = tl.cast(whole, tl.int64)
        live = n < count - whole
        q_at = (Q + at * q_sn * UNIT, n, live, q_sn)
        g_at = (G + at * g_sn * UNIT, n, live, g_sn)
        q = _load(q_at, D, BLOCK_D, UNIT)
        g = _load(g_at, D, BLOCK_D, UNIT)
        lse = tl.load(STATS + 2 * (at + n), mask=live, other=float("inf"))  # p = 0
        delta = tl.load(STATS + 2 * (at + n) + 1, mask=live, other=0.0)
        score = _scores(k, k_at, q, q_at, head_dim, D, UNIT, CHUNK)
        dp = _scores(v, v_at, g, g_at, head_dim, D, UNIT, CHUNK)
        p, ds = _p_and_ds(score, dp, lse[None, :], delta[None, :], sc)
        gv = _product(p.to(g.dtype), g, gv)
        gk = _product(ds.to(q.dtype), q, gk)
    return gk, gv


@triton.jit(do_not_specialize=SIZES)
def image_grad_key_kernel(
    G, Q, K, V, STATS, GK, GV,
    heads, queries, height, width, radius, k_image, q_row, q_rows, q_image, q_text, q_texts,
    g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, gk_sb, gk_sh, gk_sn, gv_sb, gv_sh, gv_sn,
    scale, head_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERY_Y: tl.constexpr, QUERY_X: tl.constexpr, KEY_Y: tl.constexpr,
    KEY_X: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one tile of image keys: text queries, then the query tiles of the strip within reach."""
    FITS: tl.constexpr = D == BLOCK_D
    tiles_x = tl.cdiv(width, KEY_X)
    tiles = tiles_x * tl.cdiv(height, KEY_Y)
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    b, h = _head(row, heads)
    y0 = tile // tiles_x * KEY_Y
    x0 = tile % tiles_x * KEY_X
    sc = scale * _LOG2E

    n = tl.arange(0, KEY_Y * KEY_X)
    token = n // KEY_X * width + n % KEY_X
    live = _tile_live(y0, x0, height, width, KEY_Y, KEY_X)
    first = k_image + y0.to(tl.int64) * width + x0
    k_at = (K + b * k_sb * UNIT + h * k_sh * UNIT + first * k_sn * UNIT, token, live, k_sn)
    v_at = (V + b * v_sb * UNIT + h * v_sh * UNIT + first * v_sn * UNIT, token, live, v_sn)
    k = _load(k_at, D, BLOCK_D, UNIT)
    v = _load(v_at, D, BLOCK_D, UNIT)
    Q += b * q_sb * UNIT + h * q_sh * UNIT
    G += b * g_sb * UNIT + h * g_sh * UNIT
    STATS += 2 * row.to(tl.int64) * queries
    gk = tl.zeros([KEY_Y * KEY_X, BLOCK_D], tl.float32)
    gv = tl.zeros([KEY_Y * KEY_X, BLOCK_D], tl.float32)

    at = tl.cast(q_text, tl.int64)
    gk, gv = _grad_key_dense(
        k, k_at, v, v_at, Q + at * q_sn * UNIT, G + at * g_sn * UNIT, STATS + 2 * at, q_texts, q_sn, g_sn, gk, gv,
        sc, head_dim, D, BLOCK_D, UNIT, QUERY_Y * QUERY_X, CHUNK,
    )  # fmt: skip

    # From here on rows count from the strip's first. The tile's first place may lie outside: nothing is read there.
    y0 -= q_row
    start = q_image + y0.to(tl.int64) * width + x0
    Q += start * q_sn * UNIT
    G += start * g_sn * UNIT
    STATS += 2 * start
    n = tl.arange(0, QUERY_Y * QUERY_X)
    query = n // QUERY_X * width + n % QUERY_X
    j, partial, whole_row, whole = _count_tiles(y0, x0, q_rows, width, radius, KEY_Y, KEY_X, QUERY_Y, QUERY_X)
    c, whole_lo, whole_hi, hi = _partial_row(j, y0, x0, q_rows, width, radius, KEY_Y, KEY_X, QUERY_Y, QUERY_X)
    for _ in range(partial):
        oy = j * QUERY_Y
        ox = c * QUERY_X
        at = oy.to(tl.int64) * width + ox
        inside = _tile_live(y0 + oy, x0 + ox, q_rows, width, QUERY_Y, QUERY_X)
        q_at = (Q + at * q_sn * UNIT, query, inside, q_sn)
        g_at = (G + at * g_sn * UNIT, query, inside, g_sn)
        q = _load(q_at, D, BLOCK_D, UNIT)
        g = _load(g_at, D, BLOCK_D, UNIT)
        lse = tl.load(STATS + 2 * (at + query), mask=inside, other=0.0)
        delta = tl.load(STATS + 2 * (at + query) + 1, mask=inside, other=0.0)
        score = _scores(k, k_at, q, q_at, head_dim, D, UNIT, CHUNK)
        dp = _scores(v, v_at, g, g_at, head_dim, D, UNIT, CHUNK)
        p = tl.exp2(score * sc - lse[None, :])
        p = _live(p, 0.0, oy, ox, y0, x0, q_rows, width, radius, KEY_Y, KEY_X, QUERY_Y, QUERY_X)
        ds = p * (dp - delta[None, :])
        gv = _product(p.to(g.dtype), g, gv)
        gk = _product(ds.to(q.dtype), q, gk)
        c += 1
        c = tl.where(c == whole_lo, whole_hi, c)
        if c >= hi:
            j += 1
            c, whole_lo, whole_hi, hi = _partial_row(j, y0, x0, q_rows, width, radius, KEY_Y, KEY_X, QUERY_Y, QUERY_X)

    j = whole_row
    _lo, c, whole_hi, _hi = _reach(j, y0, x0, q_rows, width, radius, KEY_Y, KEY_X, QUERY_Y, QUERY_X)
    for _ in range(whole):
        at = (j * QUERY_Y).to(tl.int64) * width + c * QUERY_X
        q_at = (Q + at * q_sn * UNIT, query, query >= 0, q_sn)
        g_at = (G + at * g_sn * UNIT, query, query >= 0, g_sn)
        q = _load(q_at, D, BLOCK_D, UNIT, False)
        g = _load(g_at, D, BLOCK_D, UNIT, False)
        lse = tl.load(STATS + 2 * (at + query))
        delta = tl.load(STATS + 2 * (at + query) + 1)
        score = _scores(k, k_at, q, q_at, head_dim, D, UNIT, CHUNK)
        dp = _scores(v, v_at, g, g_at, head_dim, D, UNIT, CHUNK)
        p, ds = _p_and_ds(score, dp, lse[None, :], delta[None, :], sc)
        gv = _product(p.to(g.dtype), g, gv)
        gk = _product(ds.to(q.dtype), q, gk)
        c += 1
        if c >= whole_hi:
            j += 1
            _lo, c, whole_hi, _hi = _reach(j, y0, x0, q_rows, width, radius, KEY_Y, KEY_X, QUERY_Y, QUERY_X)

    store_rows(GK + b * gk_sb * UNIT + h * gk_sh * UNIT + first * gk_sn * UNIT, gk * scale, token, live, gk_sn, UNIT, 0,
               D, BLOCK_D, True, FITS)  # fmt: skip
    store_rows(GV + b * gv_sb * UNIT + h * gv_sh * UNIT + first * gv_sn * UNIT, gv, token, live, gv_sn, UNIT, 0, D,
               BLOCK_D, True, FITS)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def dense_grad_key_kernel(
    G, Q, K, V, STATS, PART_K, PART_V, heads, queries, first, count, chunk, keys,
    g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, scale, head_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Partial grad_k and grad_v of a block of the `keys` keys at K, V, all of which every query of a chunk sees.

    The queries are first .. first + count of q, in chunks.
    """
    blocks = tl.cdiv(keys, BLOCK_K)
    row = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_K
    split = tl.program_id(1)
    b, h = _head(row, heads)
    sc = scale * _LOG2E
    n = tl.arange(0, BLOCK_K)
    live = start + n < keys
    at = start.to(tl.int64)
    k_at = (K + b * k_sb * UNIT + h * k_sh * UNIT + at * k_sn * UNIT, n, live, k_sn)
    v_at = (V + b * v_sb * UNIT + h * v_sh * UNIT + at * v_sn * UNIT, n, live, v_sn)
    k = _load(k_at, D, BLOCK_D, UNIT)
    v = _load(v_at, D, BLOCK_D, UNIT)
    query = first + tl.cast(split, tl.int64) * chunk
    Q += b * q_sb * UNIT + h * q_sh * UNIT + query * q_sn * UNIT
    G += b * g_sb * UNIT + h * g_sh * UNIT + query * g_sn * UNIT
    STATS += 2 * (row.to(tl.int64) * queries + query)
    gk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    gv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    gk, gv = _grad_key_dense(
        k, k_at, v, v_at, Q, G, STATS, tl.minimum(count - split * chunk, chunk), q_sn, g_sn, gk, gv, sc, head_dim,
        D, BLOCK_D, UNIT, BLOCK_Q, CHUNK,
    )  # fmt: skip
    at = (tl.cast(split, tl.int64) * (tl.num_programs(0) // blocks) + row) * keys + start
    store_rows(PART_K + at * D, gk * scale, n, live, D, 1, 0, D, BLOCK_D, True, D == BLOCK_D)
    store_rows(PART_V + at * D, gv, n, live, D, 1, 0, D, BLOCK_D, True, D == BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def sum_partials_kernel(
    PART, OUT, heads, count, splits, o_sb, o_sh, o_sn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows 0 .. count of OUT = the sum over the splits, in their order, of PART [splits, B * H, count, D]."""
    blocks = tl.cdiv(count, BLOCK)
    row = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    step = tl.cast(tl.num_programs(0) // blocks, tl.int64) * count * D
    b, h = _head(row, heads)
    n = tl.arange(0, BLOCK)
    live = first + n < count
    PART += (row.to(tl.int64) * count + first) * D
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for split in range(splits):
        total += load_rows(PART + split * step, n, live, D, 1, 0, D, BLOCK_D, True, D == BLOCK_D)
    OUT += b * o_sb * UNIT + h * o_sh * UNIT + first.to(tl.int64) * o_sn * UNIT
    store_rows(OUT, total, n, live, o_sn, UNIT, 0, D, BLOCK_D, True, D == BLOCK_D)


# ---- pooling ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    X, W, O, heads, height, width, factor, patches_x, patches, x_sb, x_sh, x_sn, o_sb, o_sh, o_sn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A block of patches of one head: the weighted sum of their tokens, coordinates clamped to the grid."""
    blocks = tl.cdiv(patches, BLOCK)
    row = tl.program_id(0) // blocks
    patch = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b, h = _head(row, heads)
    live = patch < patches
    y0 = patch // patches_x * factor
    x0 = patch % patches_x * factor
    X += b * x_sb * UNIT + h * x_sh * UNIT
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for i in range(factor * factor):
        token = tl.minimum(y0 + i // factor, height - 1) * width + tl.minimum(x0 + i % factor, width - 1)
        x = load_rows(X, token, live, x_sn, UNIT, 0, D, BLOCK_D, True, D == BLOCK_D)
        total += tl.load(W + i) * x.to(tl.float32)
    store_rows(O + b * o_sb * UNIT + h * o_sh * UNIT, total, patch, live, o_sn, UNIT, 0, D, BLOCK_D, True, D == BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def pool_grad_x_kernel(
    G, W, GX, heads, height, width, factor, patches_x, g_sb, g_sh, g_sn, x_sb, x_sh, x_sn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """grad_x of a block of tokens: each lies in one patch, a token of the edge under several of its weights."""
    tokens = height * width
    blocks = tl.cdiv(tokens, BLOCK)
    row = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b, h = _head(row, heads)
    live = token < tokens
    y = token // width
    x = token % width
    patch_y = y // factor
    patch_x = x // factor
    weight = tl.zeros([BLOCK], tl.float32)
    for i in range(factor * factor):
        read_y = tl.minimum(patch_y * factor + i // factor, height - 1)
        read_x = tl.minimum(patch_x * factor + i % factor, width - 1)
        weight += tl.where((read_y == y) & (read_x == x), tl.load(W + i), 0.0)
    g = load_rows(G + b * g_sb * UNIT + h * g_sh * UNIT, patch_y * patches_x + patch_x, live, g_sn, UNIT, 0, D, BLOCK_D,
                  True, D == BLOCK_D)  # fmt: skip
    store_rows(GX + b * x_sb * UNIT + h * x_sh * UNIT, weight[:, None] * g.to(tl.float32), token, live, x_sn, UNIT, 0,
               D, BLOCK_D, True, D == BLOCK_D)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def pool_grad_weight_kernel(
    G, X, PART, heads, height, width, factor, patches_x, patches, chunk, g_sb, g_sh, g_sn, x_sb, x_sh, x_sn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Partial grad_weight of one chunk of the patches of one head: PART [factor * factor, programs]."""
    chunks = tl.cdiv(patches, chunk)
    row = tl.program_id(0) // chunks
    lo = tl.program_id(0) % chunks * chunk
    hi = tl.minimum(lo + chunk, patches)
    b, h = _head(row, heads)
    G += b * g_sb * UNIT + h * g_sh * UNIT
    X += b * x_sb * UNIT + h * x_sh * UNIT
    for i in range(factor * factor):
        total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for start in range(lo, hi, BLOCK):
            patch = start + tl.arange(0, BLOCK)
            live = patch < hi
            y = tl.minimum(patch // patches_x * factor + i // factor, height - 1)
            x = tl.minimum(patch % patches_x * factor + i % factor, width - 1)
            g = load_rows(G, patch, live, g_sn, UNIT, 0, D, BLOCK_D, True, D == BLOCK_D)
            token = load_rows(X, y * width + x, live, x_sn, UNIT, 0, D, BLOCK_D, True, D == BLOCK_D)
            total += g.to(tl.float32) * token.to(tl.float32)
        at = PART + tl.cast(i, tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(at, tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=SIZES)
def pool_sum_kernel(PART, OUT, programs, BLOCK: tl.constexpr):
    """OUT[i] = sum of row i of PART [*, programs]."""
    PART += tl.program_id(0).to(tl.int64) * programs
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(PART + at, mask=at < programs, other=0.0)
    tl.store(OUT + tl.program_id(0), tl.sum(total, 0))


# ---- launchers -------------------------------------------------------------------------------------------------------


# Tiles (QUERY_Y, QUERY_X, KEY_Y, KEY_X) and CHUNK by kernel, tensor core and padded head dim, eight warps each: the
# largest that the compiler keeps in registers (tests/test_triton_window_attention.py). wgmma takes its operands from
# shared memory; mma.sync from registers, where 64 keys of 128 columns would fill half of them. CHUNK: a block of rows
# whole is one operand too many, so scores are summed over columns that are read again from L1.
_WGMMA = {
    "forward": {64: (8, 16, 8, 8, 0), 128: (8, 16, 8, 8, 0), 256: (8, 8, 8, 8, 0)},
    "grad_query": {64: (8, 16, 8, 8, 0), 128: (8, 16, 8, 8, 0), 256: (8, 8, 8, 8, 64)},
    "grad_key": {64: (4, 8, 8, 16, 0), 128: (4, 8, 8, 16, 0), 256: (4, 8, 8, 8, 64)},
}
_MMA = {
    "forward": {64: (8, 16, 8, 8, 0), 128: (8, 16, 4, 8, 0), 256: (8, 8, 4, 8, 64)},
    "grad_query": {64: (8, 16, 4, 8, 0), 128: (8, 16, 4, 8, 64), 256: (8, 8, 4, 8, 64)},
    "grad_key": {64: (2, 8, 8, 16, 0), 128: (4, 8, 8, 8, 64), 256: (4, 8, 4, 8, 64)},
}
_FLOAT32 = {"forward": (4, 8, 2, 8, 32), "grad_query": (4, 8, 2, 8, 32), "grad_key": (2, 8, 4, 8, 32)}


@lru_cache(None)
def blocks(kernel: str, D: int, dtype: torch.dtype, core: str) -> dict:
    """Tile shapes, warps and pipeline stages: one choice per kernel, head dim, type and tensor core."""
    padded = max(16, triton.next_power_of_2(D))
    name = kernel.removeprefix("image_").removeprefix("text_").removeprefix("dense_")
    if dtype == torch.float32:
        query_y, query_x, key_y, key_x, chunk = _FLOAT32[name]
        chunk = min(chunk, padded)
    else:
        query_y, query_x, key_y, key_x, chunk = (_MMA if core == "mma" else _WGMMA)[name][max(64, padded)]
    choice = {"D": D, "BLOCK_D": padded, "CHUNK": chunk}
    queries, keys = query_y * query_x, key_y * key_x
    if kernel == "text_forward" and keys == 64 and padded <= 128:
        keys = 128  # no addresses of tiles to keep: half as many rescalings of the accumulator
    if kernel.startswith("image_"):
        choice |= {"QUERY_Y": query_y, "QUERY_X": query_x, "KEY_Y": key_y, "KEY_X": key_x}
        if name != "grad_key":
            choice["BLOCK_K"] = keys
    else:
        choice |= {"BLOCK_Q": queries, "BLOCK_K": keys}
    # Float32 waits for its FMA units, not for memory.
    return choice | {"num_warps": 8, "num_stages": 1 if dtype == torch.float32 else 2}


def row_blocks(D: int) -> dict:
    """Blocks of 32 to 64 rows for the kernels that only move and add rows."""
    padded = max(16, triton.next_power_of_2(D))
    return {"D": D, "BLOCK_D": padded, "BLOCK": max(16, min(64, 4096 // padded)), "num_warps": 4}


def split_dense(count: int, rows: int, programs: int, floats: int, block: int, device: torch.device):
    """(splits, chunk) of `count` tokens that each of `rows` tokens per head sees, for partial results of `floats`
    float32 numbers per row and head dim.

    Enough splits to fill the device four times with `programs` programs of one sample (never a function of the batch:
    the split decides the order of the sums, and a sample must give the same bits in any batch), chunks of 512 to 16,384
    tokens (long float32 sums lose bits), but above 32k tokens a workspace below 4 % of q, k, v and out of 16 bits.
    """
    if count == 0:
        return 1, block
    fill = min(-(-4 * multiprocessors(device) // programs), count // 512)
    exact = -(-count // 16384)
    affordable = 2 * count // (25 * floats * rows) if count > 32768 else fill
    splits = max(1, min(max(fill, exact), affordable))
    chunk = -(-count // splits)
    chunk = -(-chunk // block) * block
    return -(-count // chunk), chunk


class _Geometry:
    """Where text and image lie in q and k, and the radius as the kernels take it."""

    def __init__(self, q, k, height, width, radius, text_length, text_first, q_row, q_text_length):
        self.height, self.width, self.text, self.q_row, self.q_texts = height, width, text_length, q_row, q_text_length
        # Beyond the diagonal nothing changes.
        self.radius = min(radius, math.isqrt(max(height - 1, 0) ** 2 + max(width - 1, 0) ** 2) + 1)
        if self.radius > LARGEST_RADIUS:
            raise ValueError(f"window_attention: the Triton kernels take a radius up to {LARGEST_RADIUS}, got {radius}")
        self.queries, self.keys = q.shape[2], k.shape[2]
        images = self.queries - q_text_length
        self.q_rows = images // width if width else 0
        self.k_text, self.k_image = (0, text_length) if text_first else (height * width, 0)
        self.q_text, self.q_image = (0, q_text_length) if text_first else (images, 0)
        self.images = images


@launched_on_tensor_device
def forward(
    q, k, v, pooled_k, pooled_v, height, width, radius, text_length, text_first, q_row, q_text_length, scale, out, lse
):
    """out and lse of windowed attention (the head of this file); arguments as in the op, lse float32, contiguous.

    q (B, H, q_text_length + rows * width, D), k and v (B, H, text_length + height * width, D), pooled (B, H, P, D).
    """
    B, H, N, D = q.shape
    if B * H * N == 0:
        return
    at = _Geometry(q, k, height, width, radius, text_length, text_first, q_row, q_text_length)
    q, scale = positive_scale(q, scale)
    core = tensor_core(q.device)
    if at.images:
        has_pooled = pooled_k is not None and pooled_k.shape[2] > 0
        pk, pv = (pooled_k, pooled_v) if has_pooled else (k, v)
        unit = stride_unit(q, k, v, pk, pv, out)
        config = blocks("image_forward", D, q.dtype, core)
        tiles = -(-at.q_rows // config["QUERY_Y"]) * -(-width // config["QUERY_X"])
        image_forward_kernel[(tiles * B * H,)](
            q, k, v, pk, pv, out, lse, H, N, height, width, at.radius, at.text, at.k_text, at.k_image, pk.shape[2],
            q_row, at.q_rows, at.q_image, *strides(q, unit), *strides(k, unit), *strides(v, unit),
            *strides(pk, unit), *strides(pv, unit), *strides(out, unit), scale, D,
            HAS_POOLED=has_pooled, UNIT=unit, **config,
        )  # fmt: skip
    if at.q_texts and at.keys == 0:
        rows = slice(at.q_text, at.q_text + at.q_texts)
        out[:, :, rows] = 0.0
        lse[:, :, rows] = float("-inf")
    elif at.q_texts:
        config = blocks("text_forward", D, q.dtype, core)
        groups = -(-at.q_texts // config["BLOCK_Q"])
        splits, chunk = split_dense(at.keys, at.q_texts, groups * H, 1, config["BLOCK_K"], q.device)
        part = torch.empty(splits, B * H, at.q_texts, D, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, B * H, at.q_texts, dtype=torch.float32, device=q.device)
        unit = stride_unit(q, k, v)
        text_forward_kernel[(groups * B * H, splits)](
            q, k, v, part, part_lse, H, at.q_text, at.q_texts, at.keys, chunk, *strides(q, unit), *strides(k, unit),
            *strides(v, unit), scale, D, UNIT=unit, **config,
        )  # fmt: skip
        config = row_blocks(D)
        config["BLOCK_Q"] = config.pop("BLOCK")
        unit = stride_unit(out)
        text_merge_kernel[(-(-at.q_texts // config["BLOCK_Q"]) * B * H,)](
            part, part_lse, out, lse, H, N, at.q_text, at.q_texts, splits, *strides(out, unit), UNIT=unit, **config
        )


def _sum_partials(part: torch.Tensor, out: torch.Tensor) -> None:
    """out (B, H, n, D) = part [splits, B * H, n, D] summed over the splits."""
    config = row_blocks(out.shape[-1])
    unit = stride_unit(out)
    B, H, count, _ = out.shape
    sum_partials_kernel[(-(-count // config["BLOCK"]) * B * H,)](
        part, out, H, count, part.shape[0], *strides(out, unit), UNIT=unit, **config
    )


@launched_on_tensor_device
def backward(
    grad_out, grad_lse, q, k, v, pooled_k, pooled_v, out, lse, height, width, radius, text_length, text_first, q_row,
    q_text_length, scale, grad_q, grad_k, grad_v, grad_pooled_k, grad_pooled_v,
):  # fmt: skip
    """Gradients of forward. With p_ij = exp(scale q_i . k_j - lse_i) and delta_i = dO_i . out_i - dlse_i:

    grad_v_j = sum_i p_ij dO_i;  ds_ij = p_ij (dO_i . v_j - delta_i);  grad_q_i = scale sum_j ds_ij k_j;
    grad_k_j = scale sum_i ds_ij q_i, and the same for pooled keys. grad_lse and the pooled tensors may be None.
    """
    B, H, N, D = q.shape
    gradients = [x for x in (grad_q, grad_k, grad_v, grad_pooled_k, grad_pooled_v) if x is not None]
    if B * H == 0:
        return
    if N == 0 or k.shape[2] == 0:  # (without keys there are no image queries: nothing sees pooled keys)
        for gradient in gradients:
            gradient.zero_()
        return
    at = _Geometry(q, k, height, width, radius, text_length, text_first, q_row, q_text_length)
    core = tensor_core(q.device)
    has_lse = grad_lse is not None
    glse = grad_lse.contiguous() if has_lse else lse
    stats = torch.empty(B, H, N, 2, dtype=torch.float32, device=q.device)  # lse in base 2 and delta
    has_pooled = pooled_k is not None and pooled_k.shape[2] > 0
    if at.images:
        pk, pv = (pooled_k, pooled_v) if has_pooled else (k, v)
        unit = stride_unit(grad_out, q, k, v, pk, pv, out, grad_q)
        config = blocks("image_grad_query", D, q.dtype, core)
        tiles = -(-at.q_rows // config["QUERY_Y"]) * -(-width // config["QUERY_X"])
        image_grad_query_kernel[(tiles * B * H,)](
            grad_out, glse, q, k, v, pk, pv, out, lse, stats, grad_q, H, N, height, width, at.radius, at.text,
            at.k_text, at.k_image, pk.shape[2], q_row, at.q_rows, at.q_image, *strides(grad_out, unit),
            *strides(q, unit), *strides(k, unit), *strides(v, unit), *strides(pk, unit), *strides(pv, unit),
            *strides(out, unit), *strides(grad_q, unit), scale, D,
            HAS_POOLED=has_pooled, HAS_GRAD_LSE=has_lse, UNIT=unit, **config,
        )  # fmt: skip
    if at.q_texts:
        unit = stride_unit(grad_out, q, k, v, out)
        config = blocks("text_grad_query", D, q.dtype, core)
        groups = -(-at.q_texts // config["BLOCK_Q"])
        splits, chunk = split_dense(at.keys, at.q_texts, groups * H, 1, config["BLOCK_K"], q.device)
        part = torch.empty(splits, B * H, at.q_texts, D, dtype=torch.float32, device=q.device)
        text_grad_query_kernel[(groups * B * H, splits)](
            grad_out, glse, q, k, v, out, lse, stats, part, H, N, at.q_text, at.q_texts, at.keys, chunk,
            *strides(grad_out, unit), *strides(q, unit), *strides(k, unit), *strides(v, unit), *strides(out, unit),
            scale, D, HAS_GRAD_LSE=has_lse, UNIT=unit, **config,
        )  # fmt: skip
        _sum_partials(part, grad_q[:, :, at.q_text : at.q_text + at.q_texts])
    if height * width:
        unit = stride_unit(grad_out, q, k, v, grad_k, grad_v)
        config = blocks("image_grad_key", D, q.dtype, core)
        tiles = -(-height // config["KEY_Y"]) * -(-width // config["KEY_X"])
        image_grad_key_kernel[(tiles * B * H,)](
            grad_out, q, k, v, stats, grad_k, grad_v, H, N, height, width, at.radius, at.k_image, q_row, at.q_rows,
            at.q_image, at.q_text, at.q_texts, *strides(grad_out, unit), *strides(q, unit), *strides(k, unit),
            *strides(v, unit), *strides(grad_k, unit), *strides(grad_v, unit), scale, D, UNIT=unit, **config,
        )  # fmt: skip
    if at.text:
        rows = slice(at.k_text, at.k_text + at.text)
        _grad_key_dense_launch(
            grad_out, q, k[:, :, rows], v[:, :, rows], stats, 0, N, scale, grad_k[:, :, rows], grad_v[:, :, rows]
        )
    if has_pooled:
        _grad_key_dense_launch(
            grad_out, q, pooled_k, pooled_v, stats, at.q_image, at.images, scale, grad_pooled_k, grad_pooled_v
        )


def _grad_key_dense_launch(grad_out, q, k, v, stats, first, count, scale, grad_k, grad_v):
    """grad_k and grad_v of keys that all the queries first .. first + count see."""
    B, H, keys, D = k.shape
    unit = stride_unit(grad_out, q, k, v)
    config = blocks("dense_grad_key", D, q.dtype, tensor_core(q.device))
    groups = -(-keys // config["BLOCK_K"])
    splits, chunk = split_dense(count, keys, groups * H, 2, config["BLOCK_Q"], q.device)
    part = torch.empty(2, splits, B * H, keys, D, dtype=torch.float32, device=q.device)
    dense_grad_key_kernel[(groups * B * H, splits)](
        grad_out, q, k, v, stats, part[0], part[1], H, q.shape[2], first, count, chunk, keys,
        *strides(grad_out, unit), *strides(q, unit), *strides(k, unit), *strides(v, unit), scale, D, UNIT=unit,
        **config,
    )  # fmt: skip
    _sum_partials(part[0], grad_k)
    _sum_partials(part[1], grad_v)


# A program of the pooling's weight gradient sums up this many patches of one head.
POOL_CHUNK = 1024


@launched_on_tensor_device
def pool(x, weight, height, width, out):
    """out (B, H, P, D): weighted sums of the factor x factor patches of x (B, H, height * width, D).

    weight (factor, factor); a patch that runs over the edge reads the nearest token.
    """
    B, H, patches, D = out.shape
    if out.numel() == 0:
        return
    factor = weight.shape[0]
    unit = stride_unit(x, out)
    config = row_blocks(D)
    pool_kernel[(-(-patches // config["BLOCK"]) * B * H,)](
        x, weight.float().contiguous(), out, H, height, width, factor, -(-width // factor), patches,
        *strides(x, unit), *strides(out, unit), UNIT=unit, **config,
    )  # fmt: skip


@launched_on_tensor_device
def pool_backward(grad_out, x, weight, height, width, grad_x, grad_weight):
    """grad_x: every token gets its patch's gradient times the sum of the weights it was read with;

    grad_weight (float32) = sum over samples, heads, patches and columns of grad_out times the token read.
    """
    B, H, patches, D = grad_out.shape
    if grad_out.numel() == 0:
        grad_weight.zero_()
        return
    factor = weight.shape[0]
    columns = -(-width // factor)
    config = row_blocks(D)
    unit = stride_unit(grad_out, grad_x)
    pool_grad_x_kernel[(-(-height * width // config["BLOCK"]) * B * H,)](
        grad_out, weight.float().contiguous(), grad_x, H, height, width, factor, columns, *strides(grad_out, unit),
        *strides(grad_x, unit), UNIT=unit, **config,
    )  # fmt: skip
    unit = stride_unit(grad_out, x)
    programs = -(-patches // POOL_CHUNK) * B * H
    part = torch.empty(factor * factor, programs, dtype=torch.float32, device=x.device)
    pool_grad_weight_kernel[(programs,)](
        grad_out, x, part, H, height, width, factor, columns, patches, POOL_CHUNK, *strides(grad_out, unit),
        *strides(x, unit), UNIT=unit, **config,
    )  # fmt: skip
    sums = torch.empty(factor, factor, dtype=torch.float32, device=x.device)
    pool_sum_kernel[(factor * factor,)](part, sums, programs, BLOCK=1024, num_warps=4)
    grad_weight.copy_(sums)
