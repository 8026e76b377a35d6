"""Block-causal attention in Triton, forward and backward.

    out_i = sum_b sum_{j in b} p_ij v_j     p_ij = exp(scale q_i . k_j + A_ib - lse_i)     over the key blocks b of i

A query of block (i, j) sees its own block, the one to the left, the one above and the one between those. Each distinct
block is read once, from raster order: a block that fills several slots at an edge enters with the logarithm of a sum
over them, A_ib = log sum_s exp(scale q_i . e_s), one number per query and block (derived in the docs). In softmax it
rides on the maximum that is subtracted anyway, so it costs a row a few instructions per tile, and a score none. Tiles
are QUERY_Y x QUERY_X queries and KEY_Y x KEY_X keys of one block, their shape chosen by the block (tile_sides): no pair
is masked unless the block is no multiple of the tile, and where a block lies is a scalar that is added to addresses
computed once. Sizes, the block among them, are run-time values: one binary serves every grid.

  forward     one program per (head, query tile), over the tiles of one, two or four key blocks in one loop
  statistics  five numbers for every query: A_ib - lse_i of its blocks and delta_i = dO_i . out_i - dlse_i
  grad_key    grad_k and grad_v by key tiles, over the query tiles of the one to four blocks that see the key's
  grad_query  grad_q by query tiles; leaves G_is = sum over the keys in slot s of ds in place of A_ib - lse_i
  grad_embed  grad_e_s = scale sum_i G_is q_i: partial sums, which common.reduce_kernel adds in their order

Numbers: products take the input dtype (float32 multiplies exactly, on the FMA units: input_precision="ieee") and
accumulate in float32; p and ds are rounded to the input dtype for their products. A head dim is cut into two powers of
two (common.head_tile): 80 = 64 + 16 costs 80 columns of products, not 128.

Data flow at head dim 80, 16 bit, on Hopper: a program of forward holds 20 KB of q and reads 40 KB of k and v per tile
of 128 keys for 5.2 MFLOP, 128 FLOP per byte of L2; from memory the op moves one byte for some 1,800 FLOP. The floor is
arithmetic: the 320 FLOP of a score take 0.08 clocks of an SM, and the inner loop issues 9.0 instructions per score
(11.0 at head dim 64, where two programs share an SM; 13.1 at 128), 0.07 clocks more where nothing overlaps. Counted in
sm_90 machine code; no GPU has run this yet.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .common import (
    head_tile,
    launched_on_tensor_device,
    load_rows,
    multiprocessors,
    positive_scale,
    reduce_partials,
    store_rows,
    stride_unit,
    strides,
    tensor_core,
)

# Every run-time integer and float of the kernels below: none is specialised on (one row of blocks would be a constant).
SIZES = [
    "heads",
    "rows",
    "columns",
    "block",
    "q_row",
    "k_rows",
    "slots",
    "queries",
    "chunk",
    "chunks",
    "scale",
    "head_dim",
]
SIZES += [f"{tensor}_s{axis}" for tensor in ("q", "k", "v", "o", "g", "gq", "gk", "gv") for axis in "bhn"]

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# ---- geometry --------------------------------------------------------------------------------------------------------


@triton.jit
def _own_tile(rows, columns, block, heads, Y: tl.constexpr, X: tl.constexpr):
    """(b, h, head in all, block row, block column, y, x inside the block) of a program's tile of Y x X tokens."""
    tiles_x = tl.cdiv(block, X)
    tiles = tiles_x * tl.cdiv(block, Y)
    tile = tl.program_id(0) % tiles
    place = tl.program_id(0) // tiles
    head = place // (rows * columns)
    place = place % (rows * columns)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    return b, h, head.to(tl.int64), place // columns, place % columns, tile // tiles_x * Y, tile % tiles_x * X


@triton.jit
def _token(row, column, y, x, block, width):
    """The token at (y, x) of block (row, column)."""
    return (row * block + y).to(tl.int64) * width + column * block + x


@triton.jit
def _inside(y, x, block, Y: tl.constexpr, X: tl.constexpr):
    """Which tokens of the tile that begins at (y, x) of a block belong to it."""
    n = tl.arange(0, Y * X)
    return (y + n // X < block) & (x + n % X < block)


@triton.jit
def _step(visit, y, x, block, Y: tl.constexpr, X: tl.constexpr):
    """The next tile of a block, or the first of the next one."""
    x += X
    y = tl.where(x >= block, y + Y, y)
    x = tl.where(x >= block, 0, x)
    visit = tl.where(y >= block, visit + 1, visit)
    y = tl.where(y >= block, 0, y)
    return visit, y, x


@triton.jit
def _tiles(block, Y: tl.constexpr, X: tl.constexpr):
    return tl.cdiv(block, Y) * tl.cdiv(block, X)


# ---- slots -----------------------------------------------------------------------------------------------------------

# Four numbers per query, by the slots [self, top-left, left, top] or by where a block lies relative to the query's.


@triton.jit
def _vector(E, D: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    column = FIRST + tl.arange(0, BLOCK)
    return tl.load(E + column, mask=column < D, other=0.0)[None, :]


@triton.jit
def _slot_scores(q, E, h, heads, slots, scale, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """scale q . e_s of the four slots. slots: 4, or 0 without embeddings, of which all are 0 then.

    (At run time: a loop over a constant is unrolled, and all embeddings of a row are in registers at once.)
    """
    q0, q1 = q
    E += h * D
    own = tl.zeros([ROWS], tl.float32)
    corner, left, top = own, own, own
    for s in range(slots):
        a = tl.sum(q0.to(tl.float32) * _vector(E, D, 0, D0), 1)
        if D1 > 0:
            a += tl.sum(q1.to(tl.float32) * _vector(E, D, D0, D1), 1)
        a *= scale
        own = tl.where(s == 0, a, own)
        corner = tl.where(s == 1, a, corner)
        left = tl.where(s == 2, a, left)
        top = tl.where(s == 3, a, top)
        E += tl.cast(heads, tl.int64) * D
    return own, corner, left, top


@triton.jit
def _log_sum(a, b):
    top = tl.maximum(a, b)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def _shifts(slots, has_up, has_left, CLAMP: tl.constexpr):
    """A of the blocks (self, top-left, left, top) of a query; those that do not exist give theirs to another's sum."""
    own, corner, left, top = slots
    if CLAMP:
        own = tl.where(has_up == 0, _log_sum(own, top), own)
        left = tl.where(has_up == 0, _log_sum(left, corner), left)
        own = tl.where(has_left == 0, _log_sum(own, left), own)
        top = tl.where(has_left == 0, _log_sum(top, corner), top)
    return own, corner, left, top


@triton.jit
def _of_block(four, up, left):
    """The number that belongs to the block `up` rows above and `left` columns before the query's."""
    own, corner, beside, top = four
    return tl.where(up == 0, tl.where(left == 0, own, beside), tl.where(left == 0, top, corner))


# ---- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _product(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load(at, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr = True):
    """Rows from where they lie, (pointer, tokens, which of them are live, stride), in two blocks of columns."""
    X, token, live, x_sn = at
    x0 = load_rows(X, token, live, x_sn, UNIT, 0, D, D0, MASKED, D0 <= D)
    x1 = x0
    if D1 > 0:
        x1 = load_rows(X, token, live, x_sn, UNIT, D0, D, D1, MASKED, D0 + D1 <= D)
    return x0, x1


@triton.jit
def _store(at, x, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr):
    X, token, live, x_sn = at
    x0, x1 = x
    store_rows(X, x0, token, live, x_sn, UNIT, 0, D, D0, True, D0 <= D)
    if D1 > 0:
        store_rows(X, x1, token, live, x_sn, UNIT, D0, D, D1, True, D0 + D1 <= D)


@triton.jit
def _zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    return tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1 if D1 > 0 else 1], tl.float32)


@triton.jit
def _scores(a, a_at, b, b_at, head_dim, D: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr):
    """a b^T of two blocks of rows. With CHUNK their columns are read again from memory, CHUNK at a time.

    (Then nobody else may need a or b whole. head_dim is D again, at run time: a loop over a constant is unrolled until
    registers run out.)
    """
    if CHUNK == 0:
        a0, a1 = a
        b0, b1 = b
        total = _product(a0, tl.trans(b0))
        if D1 > 0:
            total = _product(a1, tl.trans(b1), total)
        return total
    else:
        A, a_token, a_live, a_sn = a_at
        B, b_token, b_live, b_sn = b_at
        total = tl.zeros([a_token.shape[0], b_token.shape[0]], tl.float32)
        for first in range(0, head_dim, CHUNK):
            x = load_rows(A, a_token, a_live, a_sn, UNIT, first, D, CHUNK)
            y = load_rows(B, b_token, b_live, b_sn, UNIT, first, D, CHUNK)
            total = _product(x, tl.trans(y), total)
        return total


@triton.jit
def _add_product(acc, weight, rows, D1: tl.constexpr):
    """acc + weight rows"""
    acc0, acc1 = acc
    x0, x1 = rows
    weight = weight.to(x0.dtype)
    acc0 = _product(weight, x0, acc0)
    if D1 > 0:
        acc1 = _product(weight, x1, acc1)
    return acc0, acc1


@triton.jit
def _times(acc, factor, D1: tl.constexpr):
    acc0, acc1 = acc
    acc0 = acc0 * factor
    if D1 > 0:
        acc1 = acc1 * factor
    return acc0, acc1


@triton.jit
def _exp(score, scale, shift, top, EXACT: tl.constexpr):
    """exp(scale * score + shift - top). EXACT: rounded once where all three are large, as the plain formula is.

    (Two instructions per score more than one multiplication and addition to base 2, whose factors are rounded: an error
    of |scale * score| ulp that shows in float32 only.)
    """
    if EXACT:
        return tl.exp2((score * scale + shift - top) * _LOG2E)
    else:
        return tl.exp2(score * (scale * _LOG2E) + (shift - top) * _LOG2E)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    Q, K, V, E, O, LSE, heads, rows, columns, block, q_row, slots,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, o_sb, o_sh, o_sn, scale, head_dim,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, QUERY_Y: tl.constexpr, QUERY_X: tl.constexpr,
    KEY_Y: tl.constexpr, KEY_X: tl.constexpr, RAGGED: tl.constexpr, CLAMP: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries. rows, q_row: rows of blocks in q and above it; RAGGED: key tiles overhang."""
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    QUERIES: tl.constexpr = QUERY_Y * QUERY_X
    width = columns * block
    b, h, head, i, j, y, x = _own_tile(rows, columns, block, heads, QUERY_Y, QUERY_X)
    has_up = tl.minimum(i + q_row, 1)
    has_left = tl.minimum(j, 1)
    n = tl.arange(0, QUERIES)
    token = n // QUERY_X * width + n % QUERY_X
    live = _inside(y, x, block, QUERY_Y, QUERY_X)
    first = _token(i, j, y, x, block, width)
    q_at = (Q + b * q_sb * UNIT + h * q_sh * UNIT + first * q_sn * UNIT, token, live, q_sn)
    q = _load(q_at, D, D0, D1, UNIT)
    shifts = _shifts(_slot_scores(q, E, h, heads, slots, scale, QUERIES, D, D0, D1), has_up, has_left, CLAMP)

    own = _token(i + q_row, j, 0, 0, block, width)
    K += b * k_sb * UNIT + h * k_sh * UNIT + own * k_sn * UNIT
    V += b * v_sb * UNIT + h * v_sh * UNIT + own * v_sn * UNIT
    acc = _zeros(QUERIES, D0, D1)
    m = tl.full([QUERIES], -1e38, tl.float32)  # finite, so that keys that are all -inf change nothing
    l = tl.zeros([QUERIES], tl.float32)
    n = tl.arange(0, KEY_Y * KEY_X)
    key = n // KEY_X * width + n % KEY_X
    visit, key_y, key_x = 0, 0, 0
    for _ in range((has_up + 1) * (has_left + 1) * _tiles(block, KEY_Y, KEY_X)):
        up = visit >> has_left
        left = visit & has_left
        at = (key_y - up * block).to(tl.int64) * width + key_x - left * block
        inside = _inside(key_y, key_x, block, KEY_Y, KEY_X)
        k_at = (K + at * k_sn * UNIT, key, inside, k_sn)
        k = _load(k_at, D, D0, D1, UNIT, RAGGED)
        v = _load((V + at * v_sn * UNIT, key, inside, v_sn), D, D0, D1, UNIT, RAGGED)
        score = _scores(q, q_at, k, k_at, head_dim, D, D1, UNIT, CHUNK)
        if RAGGED:
            score = tl.where(inside[None, :], score, float("-inf"))
        # One step of the online softmax; the shift is that of the whole row.
        shift = _of_block(shifts, up, left)
        top = tl.maximum(m, tl.max(score, 1) * scale + shift)
        p = _exp(score, scale, shift[:, None], top[:, None], EXACT)
        alpha = tl.exp2((m - top) * _LOG2E)
        l = l * alpha + tl.sum(p, 1)
        acc = _add_product(_times(acc, alpha[:, None], D1), p, v, D1)
        m = top
        visit, key_y, key_x = _step(visit, key_y, key_x, block, KEY_Y, KEY_X)

    o_at = (O + b * o_sb * UNIT + h * o_sh * UNIT + first * o_sn * UNIT, token, live, o_sn)
    _store(o_at, _times(acc, (1.0 / l)[:, None], D1), D, D0, D1, UNIT)
    tl.store(LSE + head * rows * width * block + first + token, m + tl.log(l), mask=live)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    G, GLSE, Q, E, O, LSE, STATS, heads, rows, columns, block, q_row, slots, queries,
    g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, o_sb, o_sh, o_sn, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, QUERY_Y: tl.constexpr, QUERY_X: tl.constexpr,
    CLAMP: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """What the other kernels need of a tile of queries: STATS [5, queries of all heads].

    A - lse (EXACT: A, see _exp) of the blocks self, left, top, top-left (2 up + left), then delta.
    """
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    QUERIES: tl.constexpr = QUERY_Y * QUERY_X
    width = columns * block
    b, h, head, i, j, y, x = _own_tile(rows, columns, block, heads, QUERY_Y, QUERY_X)
    n = tl.arange(0, QUERIES)
    token = n // QUERY_X * width + n % QUERY_X
    live = _inside(y, x, block, QUERY_Y, QUERY_X)
    first = _token(i, j, y, x, block, width)
    g0, g1 = _load((G + b * g_sb * UNIT + h * g_sh * UNIT + first * g_sn * UNIT, token, live, g_sn), D, D0, D1, UNIT)
    o0, o1 = _load((O + b * o_sb * UNIT + h * o_sh * UNIT + first * o_sn * UNIT, token, live, o_sn), D, D0, D1, UNIT)
    delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    at = head * rows * width * block + first + token
    if HAS_GRAD_LSE:
        delta -= tl.load(GLSE + at, mask=live, other=0.0)
    q = _load((Q + b * q_sb * UNIT + h * q_sh * UNIT + first * q_sn * UNIT, token, live, q_sn), D, D0, D1, UNIT)
    slots = _slot_scores(q, E, h, heads, slots, scale, QUERIES, D, D0, D1)
    own, corner, left, top = _shifts(slots, tl.minimum(i + q_row, 1), tl.minimum(j, 1), CLAMP)
    lse = 0.0 if EXACT else tl.load(LSE + at, mask=live, other=0.0)
    plane = tl.cast(queries, tl.int64)
    tl.store(STATS + at, own - lse, mask=live)
    tl.store(STATS + plane + at, left - lse, mask=live)
    tl.store(STATS + 2 * plane + at, top - lse, mask=live)
    tl.store(STATS + 3 * plane + at, corner - lse, mask=live)
    tl.store(STATS + 4 * plane + at, delta, mask=live)


@triton.jit
def _load_vector(at, live, OTHER: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=live, other=OTHER)
    else:
        return tl.load(at)


@triton.jit(do_not_specialize=SIZES)
def grad_key_kernel(
    G, Q, K, V, LSE, STATS, GK, GV, heads, rows, columns, block, q_row, k_rows, queries,
    g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, gk_sb, gk_sh, gk_sn, gv_sb, gv_sh, gv_sn,
    scale, head_dim,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, QUERY_Y: tl.constexpr, QUERY_X: tl.constexpr,
    KEY_Y: tl.constexpr, KEY_X: tl.constexpr, RAGGED: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one tile of keys, over the blocks of the strip that see it: self, right, below, between.

    Scores are held transposed, [keys, queries]. RAGGED: query tiles overhang.
    """
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    KEYS: tl.constexpr = KEY_Y * KEY_X
    width = columns * block
    b, h, head, i, j, y, x = _own_tile(k_rows, columns, block, heads, KEY_Y, KEY_X)
    n = tl.arange(0, KEYS)
    token = n // KEY_X * width + n % KEY_X
    live = _inside(y, x, block, KEY_Y, KEY_X)
    first = _token(i, j, y, x, block, width)
    k_at = (K + b * k_sb * UNIT + h * k_sh * UNIT + first * k_sn * UNIT, token, live, k_sn)
    v_at = (V + b * v_sb * UNIT + h * v_sh * UNIT + first * v_sn * UNIT, token, live, v_sn)
    k = _load(k_at, D, D0, D1, UNIT)
    v = _load(v_at, D, D0, D1, UNIT)
    gk = _zeros(KEYS, D0, D1)
    gv = _zeros(KEYS, D0, D1)

    # Queries lie up to one row of blocks below this one, as far as the strip goes, and one column to the right.
    up0 = tl.maximum(q_row - i, 0)
    ups = tl.maximum(tl.minimum(q_row + rows - i, 2) - up0, 0)
    has_right = tl.minimum(columns - 1 - j, 1)
    own = _token(i - q_row, j, 0, 0, block, width)  # may lie outside the strip: then nothing is read there
    Q += b * q_sb * UNIT + h * q_sh * UNIT + own * q_sn * UNIT
    G += b * g_sb * UNIT + h * g_sh * UNIT + own * g_sn * UNIT
    plane = tl.cast(queries, tl.int64)
    STATS += head * rows * width * block + own
    LSE += head * rows * width * block + own
    n = tl.arange(0, QUERY_Y * QUERY_X)
    query = n // QUERY_X * width + n % QUERY_X
    visit, query_y, query_x = 0, 0, 0
    for _ in range(ups * (has_right + 1) * _tiles(block, QUERY_Y, QUERY_X)):
        up = up0 + (visit >> has_right)
        left = visit & has_right
        at = (query_y + up * block).to(tl.int64) * width + query_x + left * block
        inside = _inside(query_y, query_x, block, QUERY_Y, QUERY_X)
        q_at = (Q + at * q_sn * UNIT, query, inside, q_sn)
        g_at = (G + at * g_sn * UNIT, query, inside, g_sn)
        q = _load(q_at, D, D0, D1, UNIT, RAGGED)
        g = _load(g_at, D, D0, D1, UNIT, RAGGED)
        shift_at = STATS + (2 * up + left) * plane + at + query
        shift = _load_vector(shift_at, inside, float("-inf"), RAGGED)  # p = 0
        delta = _load_vector(STATS + 4 * plane + at + query, inside, 0.0, RAGGED)
        lse = 0.0
        if EXACT:
            lse = _load_vector(LSE + at + query, inside, 0.0, RAGGED)[None, :]
        score = _scores(k, k_at, q, q_at, head_dim, D, D1, UNIT, CHUNK)
        dp = _scores(v, v_at, g, g_at, head_dim, D, D1, UNIT, CHUNK)
        p = _exp(score, scale, shift[None, :], lse, EXACT)
        gv = _add_product(gv, p, g, D1)
        gk = _add_product(gk, p * (dp - delta[None, :]), q, D1)
        visit, query_y, query_x = _step(visit, query_y, query_x, block, QUERY_Y, QUERY_X)

    gk_at = (GK + b * gk_sb * UNIT + h * gk_sh * UNIT + first * gk_sn * UNIT, token, live, gk_sn)
    _store(gk_at, _times(gk, scale, D1), D, D0, D1, UNIT)
    _store((GV + b * gv_sb * UNIT + h * gv_sh * UNIT + first * gv_sn * UNIT, token, live, gv_sn), gv, D, D0, D1, UNIT)


@triton.jit
def _add_to_block(sums, row, up, left):
    own, corner, beside, top = sums
    own += tl.where((up == 0) & (left == 0), row, 0.0)
    corner += tl.where((up == 1) & (left == 1), row, 0.0)
    beside += tl.where((up == 0) & (left == 1), row, 0.0)
    top += tl.where((up == 1) & (left == 0), row, 0.0)
    return own, corner, beside, top


@triton.jit
def _share(slot, shift, sums, exists):
    """G_s: what slot s has of the sum over its block's keys, exp(a_s - A) of it; nothing where it is empty."""
    return tl.where(exists, tl.exp(slot - shift) * sums, 0.0)


@triton.jit
def _add_embeds(gq, sums, E, h, heads, slots, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """gq + sum_s G_s e_s"""
    gq0, gq1 = gq
    own, corner, left, top = sums
    E += h * D
    for s in range(slots):
        G = tl.where(s < 2, tl.where(s == 0, own, corner), tl.where(s == 2, left, top))[:, None]
        gq0 += G * _vector(E, D, 0, D0)
        if D1 > 0:
            gq1 += G * _vector(E, D, D0, D1)
        E += tl.cast(heads, tl.int64) * D
    return gq0, gq1


@triton.jit(do_not_specialize=SIZES)
def grad_query_kernel(
    G, Q, K, V, E, LSE, STATS, GQ, heads, rows, columns, block, q_row, slots, queries,
    g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, gq_sb, gq_sh, gq_sn, scale, head_dim,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, QUERY_Y: tl.constexpr, QUERY_X: tl.constexpr,
    KEY_Y: tl.constexpr, KEY_X: tl.constexpr, RAGGED: tl.constexpr, CLAMP: tl.constexpr, HAS_EMBED: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grad_q of one tile of queries; with embeddings STATS becomes [G of the four slots, delta]. Keys as in forward."""
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    QUERIES: tl.constexpr = QUERY_Y * QUERY_X
    width = columns * block
    b, h, head, i, j, y, x = _own_tile(rows, columns, block, heads, QUERY_Y, QUERY_X)
    has_up = tl.minimum(i + q_row, 1)
    has_left = tl.minimum(j, 1)
    n = tl.arange(0, QUERIES)
    token = n // QUERY_X * width + n % QUERY_X
    live = _inside(y, x, block, QUERY_Y, QUERY_X)
    first = _token(i, j, y, x, block, width)
    q_at = (Q + b * q_sb * UNIT + h * q_sh * UNIT + first * q_sn * UNIT, token, live, q_sn)
    g_at = (G + b * g_sb * UNIT + h * g_sh * UNIT + first * g_sn * UNIT, token, live, g_sn)
    q = _load(q_at, D, D0, D1, UNIT)
    g = _load(g_at, D, D0, D1, UNIT)
    plane = tl.cast(queries, tl.int64)
    at = head * rows * width * block + first + token
    own = tl.load(STATS + at, mask=live, other=0.0)
    beside = tl.load(STATS + plane + at, mask=live, other=0.0)
    top = tl.load(STATS + 2 * plane + at, mask=live, other=0.0)
    corner = tl.load(STATS + 3 * plane + at, mask=live, other=0.0)
    delta = tl.load(STATS + 4 * plane + at, mask=live, other=0.0)
    lse = tl.load(LSE + at, mask=live, other=0.0)[:, None] if EXACT else 0.0
    shifts = (own, corner, beside, top)

    start = _token(i + q_row, j, 0, 0, block, width)
    K += b * k_sb * UNIT + h * k_sh * UNIT + start * k_sn * UNIT
    V += b * v_sb * UNIT + h * v_sh * UNIT + start * v_sn * UNIT
    gq = _zeros(QUERIES, D0, D1)
    none = tl.zeros([QUERIES], tl.float32)
    sums = (none, none, none, none)
    n = tl.arange(0, KEY_Y * KEY_X)
    key = n // KEY_X * width + n % KEY_X
    visit, key_y, key_x = 0, 0, 0
    for _ in range((has_up + 1) * (has_left + 1) * _tiles(block, KEY_Y, KEY_X)):
        up = visit >> has_left
        left = visit & has_left
        place = (key_y - up * block).to(tl.int64) * width + key_x - left * block
        inside = _inside(key_y, key_x, block, KEY_Y, KEY_X)
        k_at = (K + place * k_sn * UNIT, key, inside, k_sn)
        v_at = (V + place * v_sn * UNIT, key, inside, v_sn)
        k = _load(k_at, D, D0, D1, UNIT, RAGGED)
        v = _load(v_at, D, D0, D1, UNIT, RAGGED)
        score = _scores(q, q_at, k, k_at, head_dim, D, D1, UNIT, CHUNK)
        dp = _scores(g, g_at, v, v_at, head_dim, D, D1, UNIT, CHUNK)
        p = _exp(score, scale, _of_block(shifts, up, left)[:, None], lse, EXACT)
        ds = p * (dp - delta[:, None])
        if RAGGED:
            ds = tl.where(inside[None, :], ds, 0.0)  # p of a padded key may be inf, and inf * 0 is not 0
        gq = _add_product(gq, ds, k, D1)
        if HAS_EMBED:
            sums = _add_to_block(sums, tl.sum(ds, 1), up, left)
        visit, key_y, key_x = _step(visit, key_y, key_x, block, KEY_Y, KEY_X)

    if HAS_EMBED:
        # Which block a slot is filled with: clamped, or its own and nothing where there is none.
        scored = _slot_scores(_load(q_at, D, D0, D1, UNIT), E, h, heads, slots, scale, QUERIES, D, D0, D1)
        shifts = _shifts(scored, has_up, has_left, CLAMP)
        own, corner, beside, top = scored
        up_there = (has_up == 1) | CLAMP
        left_there = (has_left == 1) | CLAMP
        own = _share(own, _of_block(shifts, 0, 0), _of_block(sums, 0, 0), True)
        corner = _share(
            corner, _of_block(shifts, has_up, has_left), _of_block(sums, has_up, has_left), up_there & left_there
        )
        beside = _share(beside, _of_block(shifts, 0, has_left), _of_block(sums, 0, has_left), left_there)
        top = _share(top, _of_block(shifts, has_up, 0), _of_block(sums, has_up, 0), up_there)
        tl.store(STATS + at, own, mask=live)
        tl.store(STATS + plane + at, corner, mask=live)
        tl.store(STATS + 2 * plane + at, beside, mask=live)
        tl.store(STATS + 3 * plane + at, top, mask=live)
        gq = _add_embeds(gq, (own, corner, beside, top), E, h, heads, slots, D, D0, D1)
    gq_at = (GQ + b * gq_sb * UNIT + h * gq_sh * UNIT + first * gq_sn * UNIT, token, live, gq_sn)
    _store(gq_at, _times(gq, scale, D1), D, D0, D1, UNIT)


@triton.jit(do_not_specialize=SIZES)
def grad_embed_kernel(
    Q, STATS, PART, heads, queries, chunk, chunks, q_sb, q_sh, q_sn, scale,
    D: tl.constexpr, D0: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """PART [samples and chunks, 4, heads, D]: scale sum over a chunk of a sample's queries of G_s q."""
    split = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    tokens = queries // (tl.num_programs(0) // chunks)
    b = (split // chunks).to(tl.int64)
    lo = split % chunks * chunk
    hi = tl.minimum(lo + chunk, tokens)
    plane = tl.cast(queries, tl.int64)
    STATS += (b * heads + h) * tokens
    Q += b * q_sb * UNIT + h.to(tl.int64) * q_sh * UNIT
    own = tl.zeros([ROWS, D0], tl.float32)
    corner = tl.zeros([ROWS, D0], tl.float32)
    beside = tl.zeros([ROWS, D0], tl.float32)
    top = tl.zeros([ROWS, D0], tl.float32)
    for start in range(lo, hi, ROWS):
        token = start + tl.arange(0, ROWS)
        live = token < hi
        q = load_rows(Q, token, live, q_sn, UNIT, 0, D, D0, True, D0 <= D).to(tl.float32)
        own += tl.load(STATS + token, mask=live, other=0.0)[:, None] * q
        corner += tl.load(STATS + plane + token, mask=live, other=0.0)[:, None] * q
        beside += tl.load(STATS + 2 * plane + token, mask=live, other=0.0)[:, None] * q
        top += tl.load(STATS + 3 * plane + token, mask=live, other=0.0)[:, None] * q
    column = tl.arange(0, D0)
    step = tl.cast(heads, tl.int64) * D
    PART += (tl.cast(split, tl.int64) * 4 * heads + h) * D + column
    tl.store(PART, tl.sum(own, 0) * scale, mask=column < D)
    tl.store(PART + step, tl.sum(corner, 0) * scale, mask=column < D)
    tl.store(PART + 2 * step, tl.sum(beside, 0) * scale, mask=column < D)
    tl.store(PART + 3 * step, tl.sum(top, 0) * scale, mask=column < D)


# ---- launchers -------------------------------------------------------------------------------------------------------


# Queries and keys of a tile and CHUNK by kernel, tensor core and most columns, eight warps each: the largest that the
# compiler keeps in registers (tests/test_triton_block_causal_attention.py); forward up to 64 columns leaves room for a
# second program on the SM. CHUNK: a block of rows whole is one operand too many, so scores are summed over columns that
# are read again from L1.
_WGMMA = {
    "forward": {64: (128, 64, 0), 96: (128, 128, 0), 128: (128, 64, 0), 192: (64, 64, 0), 256: (64, 32, 0)},
    "grad_query": {128: (128, 64, 0), 256: (64, 64, 64)},
    "grad_key": {64: (64, 128, 0), 80: (32, 128, 0), 96: (32, 64, 0), 128: (32, 128, 0), 256: (32, 64, 64)},
}
_MMA = {
    "forward": {80: (128, 64, 0), 128: (128, 32, 0), 160: (64, 32, 0), 256: (64, 32, 64)},
    "grad_query": {96: (128, 32, 0), 128: (128, 32, 64), 192: (64, 16, 64), 256: (64, 32, 64)},
    "grad_key": {64: (16, 128, 0), 96: (32, 64, 0), 128: (32, 64, 64), 256: (32, 32, 64)},
}
_OTHER = _WGMMA | {"grad_key": _WGMMA["grad_key"] | {64: (32, 128, 0)}}  # sm_100 spills with 64 queries
_FLOAT32 = {"forward": (32, 16, 32), "grad_query": (32, 16, 32), "grad_key": (16, 32, 32)}


@lru_cache(None)
def tile_sides(block: int, most: int) -> tuple[int, int]:
    """(Y, X) of tiles of 16 to `most` tokens, powers of two, for blocks of block x block.

    What a block costs grows with the tokens of its tiles, those that overhang included, and is dearer by small tiles.
    """

    def cost(shape: tuple[int, int]) -> tuple[float, ...]:
        y, x = shape
        tokens = -(-block // y) * y * -(-block // x) * x
        return tokens * (1 + 64 / (y * x)), tokens, abs(x - 2 * y)

    powers = [2**i for i in range(8)]
    return min([(y, x) for y in powers for x in powers if 16 <= y * x <= most], key=cost)


@lru_cache(None)
def blocks(kernel: str, D: int, dtype: torch.dtype, core: str, block: int) -> dict:
    """Tile shapes, warps and pipeline stages: one choice per kernel, head dim, type, tensor core and block."""
    D0, D1 = head_tile(D)
    choice = {"D": D, "D0": D0, "D1": D1}
    if kernel == "statistics":  # the tile of forward, so that q . e_s is the number that lse holds, to the last bit
        same = blocks("forward", D, dtype, core, block)
        return choice | {name: same[name] for name in ("QUERY_Y", "QUERY_X", "num_warps")}
    if dtype == torch.float32:
        queries, keys, chunk = _FLOAT32[kernel]
    else:
        table = {"mma": _MMA, "wgmma": _WGMMA}.get(core, _OTHER)[kernel]
        queries, keys, chunk = table[min(most for most in table if most >= D0 + D1)]
    inner = tile_sides(block, queries if kernel == "grad_key" else keys)
    ragged = block % inner[0] != 0 or block % inner[1] != 0
    if ragged and kernel == "grad_key" and D0 + D1 > 96 and dtype != torch.float32:
        queries //= 2  # masks take registers
    (query_y, query_x), (key_y, key_x) = tile_sides(block, queries), tile_sides(block, keys)
    choice |= {"QUERY_Y": query_y, "QUERY_X": query_x, "KEY_Y": key_y, "KEY_X": key_x, "CHUNK": min(chunk, D0)}
    # Float32 waits for its FMA units, not for memory.
    return choice | {"RAGGED": ragged, "num_warps": 8, "num_stages": 1 if dtype == torch.float32 else 2}


def _programs(config: dict, side: str, block: int, rows: int, columns: int, heads: int) -> int:
    """Tiles of queries ("QUERY") or keys ("KEY") of all heads."""
    return -(-block // config[f"{side}_Y"]) * -(-block // config[f"{side}_X"]) * rows * columns * heads


@launched_on_tensor_device
def forward(q, k, v, slot_embed, height, width, block, clamp, q_row, scale, out, lse):
    """out and lse of block-causal attention (the head of this file).

    Arguments as in the op; slot_embed (4, H, D), contiguous float32 or None; lse float32, contiguous.
    """
    B, H, N, D = q.shape
    if B * H * N == 0:
        return
    q, scale = positive_scale(q, scale)
    rows, columns = N // width // block, width // block
    unit = stride_unit(q, k, v, out)
    slots = 0 if slot_embed is None else 4
    config = blocks("forward", D, q.dtype, tensor_core(q.device), block)
    forward_kernel[(_programs(config, "QUERY", block, rows, columns, B * H),)](
        q, k, v, lse if slot_embed is None else slot_embed, out, lse, H, rows, columns, block, q_row // block, slots,
        *strides(q, unit), *strides(k, unit), *strides(v, unit), *strides(out, unit), scale, D,
        CLAMP=clamp, UNIT=unit, **config,
    )  # fmt: skip


@launched_on_tensor_device
def backward(
    grad_out, grad_lse, q, k, v, slot_embed, out, lse, height, width, block, clamp, q_row, scale,
    grad_q, grad_k, grad_v, grad_slot_embed,
):  # fmt: skip
    """Gradients of forward. With p_ij = exp(scale q_i . k_j + A_ib - lse_i) and delta_i = dO_i . out_i - dlse_i:

    grad_v_j = sum_i p_ij dO_i;  ds_ij = p_ij (dO_i . v_j - delta_i);  grad_k_j = scale sum_i ds_ij q_i;
    G_is = exp(a_is - A_ib) sum_{j in b} ds_ij for the block b that fills slot s;
    grad_q_i = scale (sum_j ds_ij k_j + sum_s G_is e_s);  grad_e_s = scale sum_i G_is q_i.
    grad_lse may be None, and so may slot_embed with its gradient.
    """
    B, H, N, D = q.shape
    if B * H * N == 0:
        for gradient in (grad_q, grad_k, grad_v, grad_slot_embed):
            if gradient is not None:
                gradient.zero_()
        return
    core, has_embed = tensor_core(q.device), slot_embed is not None
    rows, columns = N // width // block, width // block
    embed = slot_embed if has_embed else lse
    stats = torch.empty(5, B * H * N, dtype=torch.float32, device=q.device)
    sizes, slots = (H, rows, columns, block, q_row // block), 4 if has_embed else 0

    unit = stride_unit(grad_out, q, out)
    config = blocks("statistics", D, q.dtype, core, block)
    statistics_kernel[(_programs(config, "QUERY", block, rows, columns, B * H),)](
        grad_out, lse if grad_lse is None else grad_lse, q, embed, out, lse, stats, *sizes, slots, B * H * N,
        *strides(grad_out, unit), *strides(q, unit), *strides(out, unit), scale,
        CLAMP=clamp, HAS_GRAD_LSE=grad_lse is not None, UNIT=unit, **config,
    )  # fmt: skip
    unit = stride_unit(grad_out, q, k, v, grad_k, grad_v)
    config = blocks("grad_key", D, q.dtype, core, block)
    k_rows = height // block
    grad_key_kernel[(_programs(config, "KEY", block, k_rows, columns, B * H),)](
        grad_out, q, k, v, lse, stats, grad_k, grad_v, *sizes, k_rows, B * H * N, *strides(grad_out, unit),
        *strides(q, unit), *strides(k, unit), *strides(v, unit), *strides(grad_k, unit),
        *strides(grad_v, unit), scale, D, UNIT=unit, **config,
    )  # fmt: skip
    unit = stride_unit(grad_out, q, k, v, grad_q)
    config = blocks("grad_query", D, q.dtype, core, block)
    grad_query_kernel[(_programs(config, "QUERY", block, rows, columns, B * H),)](
        grad_out, q, k, v, embed, lse, stats, grad_q, *sizes, slots, B * H * N, *strides(grad_out, unit),
        *strides(q, unit), *strides(k, unit), *strides(v, unit), *strides(grad_q, unit),
        scale, D, CLAMP=clamp, HAS_EMBED=has_embed, UNIT=unit, **config,
    )  # fmt: skip
    if has_embed:
        _grad_embed(q, stats, scale, grad_slot_embed)


def embed_blocks(D: int) -> dict:
    """Rows at a time of grad_embed_kernel, which holds four sums of them in registers."""
    padded = max(16, triton.next_power_of_2(D))
    return {"D": D, "D0": padded, "ROWS": max(4, 2048 // padded), "num_warps": 4}


def split_queries(tokens: int, heads: int, device: torch.device) -> tuple[int, int]:
    """(chunks, tokens per chunk) of a sample's queries: four programs per multiprocessor, and no more than 512 terms
    or so to a partial sum of D numbers, whose workspace is then below 1 % of q."""
    chunks = max(1, min(-(-4 * multiprocessors(device) // heads), tokens // 512))
    chunk = -(-tokens // chunks)
    return -(-tokens // chunk), chunk


def _grad_embed(q: torch.Tensor, stats: torch.Tensor, scale: float, grad_slot_embed: torch.Tensor) -> None:
    B, H, N, D = q.shape
    chunks, chunk = split_queries(N, B * H, q.device)
    part = torch.empty(B * chunks * 4 * H * D, dtype=torch.float32, device=q.device)
    unit = stride_unit(q)
    grad_embed_kernel[(B * chunks * H,)](
        q, stats, part, H, B * H * N, chunk, chunks, *strides(q, unit), scale, UNIT=unit, **embed_blocks(D)
    )
    reduce_partials(part, B * chunks, grad_slot_embed, None)
