"""Bidirectional linear attention in Triton, forward and backward, for 16-bit head dims up to 160.

    kv = sum_j phi(k_j)^T v_j     k_sum = sum_j phi(k_j)     out_i = phi(q_i) (scale kv) / (phi(q_i) . k_sum / M + eps)

Everything here is bound by memory: bfloat16 D = 64 moves 512 bytes per token and head for 16.6 kFLOP, a third of what
an H200 could multiply meanwhile. So each pass reads its rows exactly once, and the D x E matrix never leaves the SM:

  state           k, v -> kv, k_sum    one program per (head, split of the tokens); float32 state in registers, one
                                       partial of D*E + D floats per split
  reduce          partials -> state    sums the splits in their order: no atomics, the same bits every time
  apply           q, kv -> out         one program per (head, run of tokens); the state, rounded once, is the resident
                                       right operand of every product
  forward_short   q, k, v -> out       both in one launch where the keys of a head are so few that every program can sum
                                       them for itself; below about 1,000 tokens launches cost more than bytes
  apply_backward  dO, q -> dQ, dkv     one pass over dO and q up to D = 64; above, dQ and dkv in a pass each, because
                                       the accumulators of both do not fit into registers (formulas: the launcher)
  state_backward  k, v -> dK, dV       one pass over k and v up to D = 128, two (linear_attention_wide.py) above

A head dim is cut into at most two blocks of powers of two (common.head_tile): 40 -> 64, 80 -> 64 + 16, 160 -> 128 + 32.
What decides is the share of the issue slots that a loop needs while memory (4.3 TB/s, 19 bytes per clock and SM) brings
its rows; counted in sm_90 machine code, bfloat16, clocks per token and SM:
    D                 40    64    80   128   160
    memory, per pass   8.3  13.3  16.7  26.7  33.3
    state              5.7   5.6   7.4  11.3  17.4     (80 as 128: 11.3; 40 as 32 + 16: 5.1, twice the registers)
    apply              5.6   5.5   7.1   9.8  12.7
Lanes past the head dim are masked and cost no traffic. The number of splits is a function of the token count, the
number of heads, the head dims, the dtype and the device, never of the batch, so a sample alone and the same sample in a
batch give the same bits. Float32, head dims above 160 and what would spill here (`resident`) go through
linear_attention_wide.py.

Numbers: phi is evaluated in float32; the products take phi(k), v, phi(q) in the input dtype and accumulate in float32;
k_sum and z are sums of the same rounded phi that enters the products, so the two ends of the fraction share their
rounding. bfloat16 has the range to round kv itself; for float16 kv is first brought near 2**14 by a power of two
(common.fit_float16), so that neither a long sum nor a tiny gradient falls out of its range.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import linear_attention_wide as wide
from .common import (
    ELU1,
    RUNTIME_ARGUMENTS,
    fit_float16,
    head_tile,
    launched_on_tensor_device,
    load_matrix,
    load_rows,
    load_vector,
    multiprocessors,
    phi,
    phi_slope,
    reduce_partials,
    run_tokens,
    split_tokens,
    store_matrix,
    store_rows,
    stride_unit,
    strides,
    tensor_core,
    vector_operand,
)

# ---- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load(
    base, token, live, stride, UNIT: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, FILL: tl.constexpr = 0.0,
):  # fmt: skip
    return load_rows(base, token, live, stride, UNIT, FIRST, WIDTH, BLOCK, MASKED, WIDTH >= FIRST + BLOCK, FILL)


@triton.jit
def _store(
    base, value, token, live, stride, UNIT: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    store_rows(base, value, token, live, stride, UNIT, FIRST, WIDTH, BLOCK, MASKED, WIDTH >= FIRST + BLOCK)


@triton.jit
def _phi_rounded(
    base, token, live, stride, UNIT: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    FEATURE: tl.constexpr, MASKED: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """phi of a block of rows in the input dtype. ZERO: whatever lies outside becomes 0 (else phi(0))."""
    fill: tl.constexpr = float("-inf") if ZERO and FEATURE == ELU1 else 0.0
    x = _load(base, token, live, stride, UNIT, FIRST, WIDTH, BLOCK, MASKED, fill)
    return phi(x.to(tl.float32), FEATURE, False).to(base.dtype.element_ty)


@triton.jit
def _outer(a, b, acc, FLIP: tl.constexpr):
    """acc + a^T b, or its transpose."""
    if FLIP:
        return tl.dot(tl.trans(b), a, acc)
    else:
        return tl.dot(tl.trans(a), b, acc)


@triton.jit
def accumulate_state(
    K, V, KD, lo, hi, k_sn, v_sn, kd_sn,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """kv in up to four blocks and k_sum in up to two, summed over tokens lo .. hi of one head.

    k_sum is a product with ones, so it rounds and accumulates exactly as kv does. FLIP: at eight warps the blocks of
    the D1 rows are accumulated transposed, because wgmma wants 64 rows and mma.sync there costs too many registers.
    """
    FLIP: tl.constexpr = D0 > 64
    D2: tl.constexpr = D1 if D1 > 0 else 16
    E2: tl.constexpr = E1 if E1 > 0 else 16
    kv00 = tl.zeros([D0, E0], tl.float32)
    kv01 = tl.zeros([D0, E2], tl.float32)
    kv10 = tl.zeros([E0, D2] if FLIP else [D2, E0], tl.float32)
    kv11 = tl.zeros([E2, D2] if FLIP else [D2, E2], tl.float32)
    sum0 = tl.zeros([D0, 16], tl.float32)
    sum1 = tl.zeros([16, D2] if FLIP else [D2, 16], tl.float32)
    ones = tl.full([BLOCK_N, 16], 1.0, tl.float32).to(K.dtype.element_ty)
    token = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        at = tl.cast(start, tl.int64)
        live = start + token < hi
        K_at = K + at * k_sn * UNIT
        V_at = V + at * v_sn * UNIT
        p0 = _phi_rounded(K_at, token, live, k_sn, UNIT, 0, D, D0, FEATURE, True, True)
        v0 = _load(V_at, token, live, v_sn, UNIT, 0, E, E0, True)
        kv00 = _outer(p0, v0, kv00, False)
        if E1 > 0:
            v1 = _load(V_at, token, live, v_sn, UNIT, E0, E, E1, True)
            kv01 = _outer(p0, v1, kv01, False)
        if D1 > 0:
            p1 = _phi_rounded(K_at, token, live, k_sn, UNIT, D0, D, D1, FEATURE, True, True)
            kv10 = _outer(p1, v0, kv10, FLIP)
            if E1 > 0:
                kv11 = _outer(p1, v1, kv11, FLIP)
        if HAS_DENOM:
            KD_at = KD + at * kd_sn * UNIT
            p0 = _phi_rounded(KD_at, token, live, kd_sn, UNIT, 0, D, D0, FEATURE, True, True)
            if D1 > 0:
                p1 = _phi_rounded(KD_at, token, live, kd_sn, UNIT, D0, D, D1, FEATURE, True, True)
        sum0 = _outer(p0, ones, sum0, False)
        if D1 > 0:
            sum1 = _outer(p1, ones, sum1, FLIP)
    if FLIP:
        kv10 = tl.trans(kv10)
        kv11 = tl.trans(kv11)
        sum1 = tl.trans(sum1)
    first = tl.arange(0, 16)[None, :] == 0
    return kv00, kv01, kv10, kv11, tl.sum(tl.where(first, sum0, 0.0), 1), tl.sum(tl.where(first, sum1, 0.0), 1)


@triton.jit
def load_state(
    KV, D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr
):
    """The four blocks of a contiguous (D, E) matrix; blocks that do not exist repeat one that does."""
    d0 = tl.arange(0, D0)
    e0 = tl.arange(0, E0)
    kv00 = load_matrix(KV, d0, e0, D, E)
    kv01 = kv00
    kv10 = kv00
    kv11 = kv00
    if E1 > 0:
        e1 = E0 + tl.arange(0, E1)
        kv01 = load_matrix(KV, d0, e1, D, E)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        kv10 = load_matrix(KV, d1, e0, D, E)
        if E1 > 0:
            kv11 = load_matrix(KV, d1, e1, D, E)
    return kv00, kv01, kv10, kv11


@triton.jit
def store_state(
    KV, kv00, kv01, kv10, kv11,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
):  # fmt: skip
    d0 = tl.arange(0, D0)
    e0 = tl.arange(0, E0)
    store_matrix(KV, kv00, d0, e0, D, E)
    if E1 > 0:
        e1 = E0 + tl.arange(0, E1)
        store_matrix(KV, kv01, d0, e1, D, E)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        store_matrix(KV, kv10, d1, e0, D, E)
        if E1 > 0:
            store_matrix(KV, kv11, d1, e1, D, E)


@triton.jit
def store_sum(KSUM, sum0, sum1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    d0 = tl.arange(0, D0)
    tl.store(KSUM + d0, sum0, mask=d0 < D)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        tl.store(KSUM + d1, sum1, mask=d1 < D)


@triton.jit
def round_state(kv00, kv01, kv10, kv11, D1: tl.constexpr, E1: tl.constexpr, DTYPE: tl.constexpr):
    """The blocks in DTYPE, and the factor that undoes their scaling (1 for bfloat16)."""
    unscale = 1.0
    if DTYPE.is_fp16():
        peak = tl.max(tl.max(tl.abs(kv00), 1), 0)
        if E1 > 0:
            peak = tl.maximum(peak, tl.max(tl.max(tl.abs(kv01), 1), 0))
        if D1 > 0:
            peak = tl.maximum(peak, tl.max(tl.max(tl.abs(kv10), 1), 0))
            if E1 > 0:
                peak = tl.maximum(peak, tl.max(tl.max(tl.abs(kv11), 1), 0))
        fit = fit_float16(peak)
        unscale = 1.0 / fit
        kv00 = kv00 * fit
        kv01 = kv01 * fit
        kv10 = kv10 * fit
        kv11 = kv11 * fit
    return kv00.to(DTYPE), kv01.to(DTYPE), kv10.to(DTYPE), kv11.to(DTYPE), unscale


@triton.jit
def round_vector(vector0, vector1, D1: tl.constexpr, DTYPE: tl.constexpr):
    """Right operands for phi(x) . vector, and the factor that undoes their scaling (1 for bfloat16)."""
    fit = 1.0
    if DTYPE.is_fp16():
        peak = tl.max(tl.abs(vector0), 0)
        if D1 > 0:
            peak = tl.maximum(peak, tl.max(tl.abs(vector1), 0))
        fit = fit_float16(peak)
    return vector_operand(vector0, fit, DTYPE), vector_operand(vector1, fit, DTYPE), 1.0 / fit


@triton.jit
def _emit_step(
    start, hi, Q, QD, OUT, q_sn, qd_sn, o_sn, w00, w01, w10, w11, mean0, mean1, mean_unscale, scale, eps,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, NORMALIZE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    at = tl.cast(start, tl.int64)
    token = tl.arange(0, BLOCK_N)
    live = start + token < hi
    Q += at * q_sn * UNIT
    OUT += at * o_sn * UNIT
    p0 = _phi_rounded(Q, token, live, q_sn, UNIT, 0, D, D0, FEATURE, MASKED, False)
    out0 = tl.dot(p0, w00)
    if E1 > 0:
        out1 = tl.dot(p0, w01)
    if D1 > 0:
        p1 = _phi_rounded(Q, token, live, q_sn, UNIT, D0, D, D1, FEATURE, MASKED, False)
        out0 = tl.dot(p1, w10, out0)
        if E1 > 0:
            out1 = tl.dot(p1, w11, out1)
    factor = scale
    if NORMALIZE:
        if HAS_DENOM:
            QD += at * qd_sn * UNIT
            p0 = _phi_rounded(QD, token, live, qd_sn, UNIT, 0, D, D0, FEATURE, MASKED, False)
            if D1 > 0:
                p1 = _phi_rounded(QD, token, live, qd_sn, UNIT, D0, D, D1, FEATURE, MASKED, False)
        z = tl.dot(p0, mean0)
        if D1 > 0:
            z = tl.dot(p1, mean1, z)
        factor = (scale / (tl.sum(z, 1) * mean_unscale + eps))[:, None]
    _store(OUT, out0 * factor, token, live, o_sn, UNIT, 0, E, E0, MASKED)
    if E1 > 0:
        _store(OUT, out1 * factor, token, live, o_sn, UNIT, E0, E, E1, MASKED)


@triton.jit
def emit_output(
    Q, QD, OUT, lo, hi, q_sn, qd_sn, o_sn, w00, w01, w10, w11, mean0, mean1, scale, eps,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, NORMALIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
    PEEL: tl.constexpr,
):  # fmt: skip
    """out rows lo .. hi of one head from the rounded state. Lanes past D hold phi(0), and meet zeros in w and mean.

    PEEL: full blocks go without masks, which is faster but needs the code twice.
    """
    m0, m1, unscale = round_vector(mean0, mean1, D1, Q.dtype.element_ty)
    whole = hi
    if PEEL:
        whole = lo + (hi - lo) // BLOCK_N * BLOCK_N
    for start in range(lo, whole, BLOCK_N):
        _emit_step(
            start, hi, Q, QD, OUT, q_sn, qd_sn, o_sn, w00, w01, w10, w11, m0, m1, unscale, scale, eps,
            D, E, D0, D1, E0, E1, FEATURE, HAS_DENOM, NORMALIZE, UNIT, BLOCK_N, not PEEL,
        )  # fmt: skip
    if PEEL and whole < hi:
        _emit_step(
            whole, hi, Q, QD, OUT, q_sn, qd_sn, o_sn, w00, w01, w10, w11, m0, m1, unscale, scale, eps,
            D, E, D0, D1, E0, E1, FEATURE, HAS_DENOM, NORMALIZE, UNIT, BLOCK_N, True,
        )  # fmt: skip


# ---- kernels ---------------------------------------------------------------------------------------------------------
# Program ids: 0 = batch * heads + head (neighbouring heads of one token share memory pages), 1 = run of tokens.


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def state_kernel(
    K, V, KD, KV, KSUM, heads, tokens, chunk, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, kd_sb, kd_sh, kd_sn,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One partial state; KV is [splits, batch * heads, D, E] and KSUM [splits, batch * heads, D]."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    lo = split * chunk
    hi = tl.minimum(lo + chunk, tokens)
    kv00, kv01, kv10, kv11, sum0, sum1 = accumulate_state(
        K + b * k_sb * UNIT + h * k_sh * UNIT, V + b * v_sb * UNIT + h * v_sh * UNIT,
        KD + b * kd_sb * UNIT + h * kd_sh * UNIT, lo, hi, k_sn, v_sn, kd_sn,
        D, E, D0, D1, E0, E1, FEATURE, HAS_DENOM, UNIT, BLOCK_N,
    )  # fmt: skip
    slot = split.to(tl.int64) * tl.num_programs(0) + row
    store_state(KV + slot * (D * E), kv00, kv01, kv10, kv11, D, E, D0, D1, E0, E1)
    store_sum(KSUM + slot * D, sum0, sum1, D, D0, D1)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def apply_kernel(
    Q, QD, KV, KSUM, OUT, heads, tokens, chunk, q_sb, q_sh, q_sn, qd_sb, qd_sh, qd_sn, o_sb, o_sh, o_sn,
    scale, inv_count, eps,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, NORMALIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    lo = tl.program_id(1) * chunk
    hi = tl.minimum(lo + chunk, tokens)
    at = row.to(tl.int64)
    kv00, kv01, kv10, kv11 = load_state(KV + at * (D * E), D, E, D0, D1, E0, E1)
    w00, w01, w10, w11, unscale = round_state(kv00, kv01, kv10, kv11, D1, E1, Q.dtype.element_ty)
    mean0 = load_vector(KSUM + at * D, tl.arange(0, D0), D) * inv_count
    mean1 = mean0
    if D1 > 0:
        mean1 = load_vector(KSUM + at * D, D0 + tl.arange(0, D1), D) * inv_count
    emit_output(
        Q + b * q_sb * UNIT + h * q_sh * UNIT, QD + b * qd_sb * UNIT + h * qd_sh * UNIT,
        OUT + b * o_sb * UNIT + h * o_sh * UNIT, lo, hi, q_sn, qd_sn, o_sn,
        w00, w01, w10, w11, mean0, mean1, scale * unscale, eps,
        D, E, D0, D1, E0, E1, FEATURE, HAS_DENOM, NORMALIZE, UNIT, BLOCK_N, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def forward_short_kernel(
    Q, K, V, QD, KD, OUT, KV, KSUM, heads, tokens, keys, chunk,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, qd_sb, qd_sh, qd_sn, kd_sb, kd_sh, kd_sn, o_sb, o_sh, o_sn,
    scale, inv_count, eps,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, HAS_QD: tl.constexpr, HAS_KD: tl.constexpr, NORMALIZE: tl.constexpr, STATE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Every program sums all keys of its head, then writes its run of queries; run 0 also stores the state if asked."""
    row = tl.program_id(0)
    run = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    kv00, kv01, kv10, kv11, sum0, sum1 = accumulate_state(
        K + b * k_sb * UNIT + h * k_sh * UNIT, V + b * v_sb * UNIT + h * v_sh * UNIT,
        KD + b * kd_sb * UNIT + h * kd_sh * UNIT, run * 0, keys, k_sn, v_sn, kd_sn,
        D, E, D0, D1, E0, E1, FEATURE, HAS_KD, UNIT, BLOCK_N,
    )  # fmt: skip
    if STATE and run == 0:
        at = row.to(tl.int64)
        store_state(KV + at * (D * E), kv00, kv01, kv10, kv11, D, E, D0, D1, E0, E1)
        store_sum(KSUM + at * D, sum0, sum1, D, D0, D1)
    w00, w01, w10, w11, unscale = round_state(kv00, kv01, kv10, kv11, D1, E1, Q.dtype.element_ty)
    lo = run * chunk
    hi = tl.minimum(lo + chunk, tokens)
    emit_output(
        Q + b * q_sb * UNIT + h * q_sh * UNIT, QD + b * qd_sb * UNIT + h * qd_sh * UNIT,
        OUT + b * o_sb * UNIT + h * o_sh * UNIT, lo, hi, q_sn, qd_sn, o_sn,
        w00, w01, w10, w11, sum0 * inv_count, sum1 * inv_count, scale * unscale, eps,
        D, E, D0, D1, E0, E1, FEATURE, HAS_QD, NORMALIZE, UNIT, BLOCK_N, False,
    )  # fmt: skip


@triton.jit
def _apply_backward_step(
    start, hi, G, Q, QD, GQ, GQD, g_sn, q_sn, qd_sn, gq_sn, gqd_sn, w00, w01, w10, w11, unscale, mean0, mean1, eps,
    gkv00, gkv01, gkv10, gkv11, gsum0, gsum1,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = Q.dtype.element_ty
    at = tl.cast(start, tl.int64)
    token = tl.arange(0, BLOCK_N)
    live = start + token < hi
    G += at * g_sn * UNIT
    Q += at * q_sn * UNIT
    g0 = _load(G, token, live, g_sn, UNIT, 0, E, E0, MASKED)
    if E1 > 0:
        g1 = _load(G, token, live, g_sn, UNIT, E0, E, E1, MASKED)
    p0 = phi(_load(Q, token, live, q_sn, UNIT, 0, D, D0, MASKED).to(tl.float32), FEATURE, False)
    if D1 > 0:
        p1 = phi(_load(Q, token, live, q_sn, UNIT, D0, D, D1, MASKED).to(tl.float32), FEATURE, False)
    if ROWS:
        GQ += at * gq_sn * UNIT
        dp0 = tl.dot(g0, tl.trans(w00))
        if E1 > 0:
            dp0 = tl.dot(g1, tl.trans(w01), dp0)
        dp0 *= unscale
        if D1 > 0:
            dp1 = tl.dot(g0, tl.trans(w10))
            if E1 > 0:
                dp1 = tl.dot(g1, tl.trans(w11), dp1)
            dp1 *= unscale
    a0 = p0
    if D1 > 0:
        a1 = p1
    if NORMALIZE:
        r0 = p0
        if D1 > 0:
            r1 = p1
        if HAS_DENOM:
            QD += at * qd_sn * UNIT
            r0 = phi(_load(QD, token, live, qd_sn, UNIT, 0, D, D0, MASKED).to(tl.float32), FEATURE, False)
            if D1 > 0:
                r1 = phi(_load(QD, token, live, qd_sn, UNIT, D0, D, D1, MASKED).to(tl.float32), FEATURE, False)
        z = tl.sum(r0 * mean0[None, :], 1) + eps
        if D1 > 0:
            z += tl.sum(r1 * mean1[None, :], 1)
        inv_z = 1.0 / z
        if MASKED:
            inv_z = tl.where(live, inv_z, 0.0)  # z of a dead row may be 0
        a0 = p0 * inv_z[:, None]
        if D1 > 0:
            a1 = p1 * inv_z[:, None]
        if ROWS:
            dz_z = tl.sum(p0 * dp0, 1)
            if D1 > 0:
                dz_z += tl.sum(p1 * dp1, 1)
            dz_z = -dz_z * inv_z
            dz = dz_z * inv_z
            dp0 *= inv_z[:, None]
            if D1 > 0:
                dp1 *= inv_z[:, None]
            gsum0 += dz[:, None] * r0  # rows are added up after the last block
            if D1 > 0:
                gsum1 += dz[:, None] * r1
            if HAS_DENOM:
                GQD += at * gqd_sn * UNIT
                dr = dz[:, None] * mean0[None, :] * phi_slope(r0, FEATURE)
                _store(GQD, dr, token, live, gqd_sn, UNIT, 0, D, D0, MASKED)
                if D1 > 0:
                    dr = dz[:, None] * mean1[None, :] * phi_slope(r1, FEATURE)
                    _store(GQD, dr, token, live, gqd_sn, UNIT, D0, D, D1, MASKED)
            else:
                dp0 += dz[:, None] * mean0[None, :]
                if D1 > 0:
                    dp1 += dz[:, None] * mean1[None, :]
    if ROWS:
        _store(GQ, dp0 * phi_slope(p0, FEATURE), token, live, gq_sn, UNIT, 0, D, D0, MASKED)
        if D1 > 0:
            _store(GQ, dp1 * phi_slope(p1, FEATURE), token, live, gq_sn, UNIT, D0, D, D1, MASKED)
    if STATE:
        FLIP: tl.constexpr = D0 > 64  # as in accumulate_state
        gkv00 = _outer(a0.to(dtype), g0, gkv00, False)
        if E1 > 0:
            gkv01 = _outer(a0.to(dtype), g1, gkv01, False)
        if D1 > 0:
            gkv10 = _outer(a1.to(dtype), g0, gkv10, FLIP)
            if E1 > 0:
                gkv11 = _outer(a1.to(dtype), g1, gkv11, FLIP)
    return gkv00, gkv01, gkv10, gkv11, gsum0, gsum1


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def apply_backward_kernel(
    G, Q, QD, KV, KSUM, GQ, GQD, GKV, GKSUM, heads, tokens, chunk,
    g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, qd_sb, qd_sh, qd_sn, gq_sb, gq_sh, gq_sn, gqd_sb, gqd_sh, gqd_sn,
    scale, inv_count, eps,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """ROWS: grad_q of one run of tokens and its partial grad_k_sum. STATE: its partial grad_kv (as in state_kernel)."""
    dtype: tl.constexpr = Q.dtype.element_ty
    row = tl.program_id(0)
    split = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    at = row.to(tl.int64)
    lo = split * chunk
    hi = tl.minimum(lo + chunk, tokens)
    G += b * g_sb * UNIT + h * g_sh * UNIT
    Q += b * q_sb * UNIT + h * q_sh * UNIT
    QD += b * qd_sb * UNIT + h * qd_sh * UNIT
    GQ += b * gq_sb * UNIT + h * gq_sh * UNIT
    GQD += b * gqd_sb * UNIT + h * gqd_sh * UNIT

    kv00, kv01, kv10, kv11 = load_state(KV + at * (D * E), D, E, D0, D1, E0, E1)
    w00, w01, w10, w11, unscale = round_state(kv00, kv01, kv10, kv11, D1, E1, dtype)
    unscale *= scale
    mean0 = load_vector(KSUM + at * D, tl.arange(0, D0), D) * inv_count
    mean1 = mean0
    if D1 > 0:
        mean1 = load_vector(KSUM + at * D, D0 + tl.arange(0, D1), D) * inv_count

    FLIP: tl.constexpr = D0 > 64
    D2: tl.constexpr = D1 if D1 > 0 else 16
    E2: tl.constexpr = E1 if E1 > 0 else 16
    gkv00 = tl.zeros([D0, E0], tl.float32)
    gkv01 = tl.zeros([D0, E2], tl.float32)
    gkv10 = tl.zeros([E0, D2] if FLIP else [D2, E0], tl.float32)
    gkv11 = tl.zeros([E2, D2] if FLIP else [D2, E2], tl.float32)
    gsum0 = tl.zeros([BLOCK_N, D0], tl.float32)
    gsum1 = tl.zeros([BLOCK_N, D2], tl.float32)
    whole = lo + (hi - lo) // BLOCK_N * BLOCK_N
    for start in range(lo, whole, BLOCK_N):
        gkv00, gkv01, gkv10, gkv11, gsum0, gsum1 = _apply_backward_step(
            start, hi, G, Q, QD, GQ, GQD, g_sn, q_sn, qd_sn, gq_sn, gqd_sn, w00, w01, w10, w11, unscale, mean0, mean1,
            eps, gkv00, gkv01, gkv10, gkv11, gsum0, gsum1,
            D, E, D0, D1, E0, E1, FEATURE, HAS_DENOM, NORMALIZE, ROWS, STATE, UNIT, BLOCK_N, False,
        )  # fmt: skip
    if whole < hi:
        gkv00, gkv01, gkv10, gkv11, gsum0, gsum1 = _apply_backward_step(
            whole, hi, G, Q, QD, GQ, GQD, g_sn, q_sn, qd_sn, gq_sn, gqd_sn, w00, w01, w10, w11, unscale, mean0, mean1,
            eps, gkv00, gkv01, gkv10, gkv11, gsum0, gsum1,
            D, E, D0, D1, E0, E1, FEATURE, HAS_DENOM, NORMALIZE, ROWS, STATE, UNIT, BLOCK_N, True,
        )  # fmt: skip
    slot = split.to(tl.int64) * tl.num_programs(0) + row
    if STATE:
        if FLIP:
            gkv10 = tl.trans(gkv10)
            gkv11 = tl.trans(gkv11)
        GKV += slot * (D * E)
        store_state(GKV, gkv00 * scale, gkv01 * scale, gkv10 * scale, gkv11 * scale, D, E, D0, D1, E0, E1)
    if ROWS:
        store_sum(GKSUM + slot * D, tl.sum(gsum0, 0) * inv_count, tl.sum(gsum1, 0) * inv_count, D, D0, D1)


@triton.jit
def _state_backward_step(
    start, hi, K, V, KD, GK, GV, GKD, k_sn, v_sn, kd_sn, gk_sn, gv_sn, gkd_sn, w00, w01, w10, w11, unscale,
    gsum0, gsum1,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = K.dtype.element_ty
    at = tl.cast(start, tl.int64)
    token = tl.arange(0, BLOCK_N)
    live = start + token < hi
    K += at * k_sn * UNIT
    V += at * v_sn * UNIT
    GK += at * gk_sn * UNIT
    GV += at * gv_sn * UNIT
    p0 = phi(_load(K, token, live, k_sn, UNIT, 0, D, D0, MASKED).to(tl.float32), FEATURE, False)
    gv0 = tl.dot(p0.to(dtype), w00)
    if D1 > 0:
        p1 = phi(_load(K, token, live, k_sn, UNIT, D0, D, D1, MASKED).to(tl.float32), FEATURE, False)
        gv0 = tl.dot(p1.to(dtype), w10, gv0)
    _store(GV, gv0 * unscale, token, live, gv_sn, UNIT, 0, E, E0, MASKED)
    if E1 > 0:
        gv1 = tl.dot(p0.to(dtype), w01)
        if D1 > 0:
            gv1 = tl.dot(p1.to(dtype), w11, gv1)
        _store(GV, gv1 * unscale, token, live, gv_sn, UNIT, E0, E, E1, MASKED)

    v0 = _load(V, token, live, v_sn, UNIT, 0, E, E0, MASKED)
    dp0 = tl.dot(v0, tl.trans(w00))
    if E1 > 0:
        v1 = _load(V, token, live, v_sn, UNIT, E0, E, E1, MASKED)
        dp0 = tl.dot(v1, tl.trans(w01), dp0)
    dp0 *= unscale
    if not HAS_DENOM:
        dp0 += gsum0[None, :]
    _store(GK, dp0 * phi_slope(p0, FEATURE), token, live, gk_sn, UNIT, 0, D, D0, MASKED)
    if D1 > 0:
        dp1 = tl.dot(v0, tl.trans(w10))
        if E1 > 0:
            dp1 = tl.dot(v1, tl.trans(w11), dp1)
        dp1 *= unscale
        if not HAS_DENOM:
            dp1 += gsum1[None, :]
        _store(GK, dp1 * phi_slope(p1, FEATURE), token, live, gk_sn, UNIT, D0, D, D1, MASKED)

    if HAS_DENOM:
        KD += at * kd_sn * UNIT
        GKD += at * gkd_sn * UNIT
        r0 = phi(_load(KD, token, live, kd_sn, UNIT, 0, D, D0, MASKED).to(tl.float32), FEATURE, False)
        _store(GKD, phi_slope(r0, FEATURE) * gsum0[None, :], token, live, gkd_sn, UNIT, 0, D, D0, MASKED)
        if D1 > 0:
            r1 = phi(_load(KD, token, live, kd_sn, UNIT, D0, D, D1, MASKED).to(tl.float32), FEATURE, False)
            _store(GKD, phi_slope(r1, FEATURE) * gsum1[None, :], token, live, gkd_sn, UNIT, D0, D, D1, MASKED)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def state_backward_kernel(
    GKV, GKSUM, K, V, KD, GK, GV, GKD, heads, tokens, chunk,
    k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, kd_sb, kd_sh, kd_sn, gk_sb, gk_sh, gk_sn, gv_sb, gv_sh, gv_sn,
    gkd_sb, gkd_sh, gkd_sn,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v rows of one run of tokens; the rounded grad_kv is resident, as kv is in apply_kernel."""
    dtype: tl.constexpr = K.dtype.element_ty
    row = tl.program_id(0)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    at = row.to(tl.int64)
    lo = tl.program_id(1) * chunk
    hi = tl.minimum(lo + chunk, tokens)
    K += b * k_sb * UNIT + h * k_sh * UNIT
    V += b * v_sb * UNIT + h * v_sh * UNIT
    KD += b * kd_sb * UNIT + h * kd_sh * UNIT
    GK += b * gk_sb * UNIT + h * gk_sh * UNIT
    GV += b * gv_sb * UNIT + h * gv_sh * UNIT
    GKD += b * gkd_sb * UNIT + h * gkd_sh * UNIT

    w00, w01, w10, w11 = load_state(GKV + at * (D * E), D, E, D0, D1, E0, E1)
    w00, w01, w10, w11, unscale = round_state(w00, w01, w10, w11, D1, E1, dtype)
    gsum0 = load_vector(GKSUM + at * D, tl.arange(0, D0), D)
    gsum1 = gsum0
    if D1 > 0:
        gsum1 = load_vector(GKSUM + at * D, D0 + tl.arange(0, D1), D)
    whole = lo + (hi - lo) // BLOCK_N * BLOCK_N
    for start in range(lo, whole, BLOCK_N):
        _state_backward_step(
            start, hi, K, V, KD, GK, GV, GKD, k_sn, v_sn, kd_sn, gk_sn, gv_sn, gkd_sn, w00, w01, w10, w11, unscale,
            gsum0, gsum1, D, E, D0, D1, E0, E1, FEATURE, HAS_DENOM, UNIT, BLOCK_N, False,
        )  # fmt: skip
    if whole < hi:
        _state_backward_step(
            whole, hi, K, V, KD, GK, GV, GKD, k_sn, v_sn, kd_sn, gk_sn, gv_sn, gkd_sn, w00, w01, w10, w11, unscale,
            gsum0, gsum1, D, E, D0, D1, E0, E1, FEATURE, HAS_DENOM, UNIT, BLOCK_N, True,
        )  # fmt: skip


# ---- launchers -------------------------------------------------------------------------------------------------------


def resident(kernel: str, D: int, E: int, dtype: torch.dtype, core: str) -> bool:
    """Whether a kernel of this file takes these head dims without spilling; else linear_attention_wide.py does.

    core: common.tensor_core of the device.
    """
    if dtype == torch.float32:
        return False
    if core == "wgmma":
        limit = {"apply_backward_both": 64, "apply_backward_rows": 128, "state_backward": 128}.get(kernel, 160)
    elif core == "mma" and head_tile(D)[1] + head_tile(E)[1] == 0:
        limit = {"state": 128, "forward_short": 128, "apply": 64}.get(kernel, 0)
    else:
        limit = 0
    return max(D, E) <= limit


@lru_cache(None)
def blocks(kernel: str, D: int, E: int) -> dict:
    """Tiles, rows per step, warps and pipeline stages: one choice per kernel and head dims, from compiler reports."""
    padded = kernel == "apply_backward_rows"  # two column blocks there spill, and a padded one costs no traffic
    D0, D1 = (max(16, triton.next_power_of_2(D)), 0) if padded else head_tile(D)
    E0, E1 = (max(16, triton.next_power_of_2(E)), 0) if padded else head_tile(E)
    # apply holds no state in registers; elsewhere a tile above 64 x 64 takes eight warps.
    warps = 4 if kernel == "apply" or D0 * E0 <= 64 * 64 else 8
    if kernel == "forward_short" and D1 + E1 > 0:
        warps = 8
    stages = 2 if D1 + E1 > 0 and kernel not in ("apply", "state_backward") else 3
    return {"D0": D0, "D1": D1, "E0": E0, "E1": E1, "BLOCK_N": 64, "num_warps": warps, "num_stages": stages}


# Keys of one head that a program of forward_short_kernel reads by itself (about 4 us of one SM's bandwidth).
SHORT_BYTES = 384 * 1024


@launched_on_tensor_device
def forward(q, k, v, q_denom, k_denom, feature_map, normalize, scale, eps, out, kv, k_sum):
    """out = phi(q) (scale kv) / (phi(q_denom or q) . k_sum / M + eps); kv and k_sum are filled where given.

    q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), out (B, H, N, E); kv (B, H, D, E) and k_sum (B, H, D) float32.
    """
    B, H, N, D = q.shape
    M, E = v.shape[-2:]
    if B * H == 0 or (N == 0 and kv is None):
        return
    short = M * (D + E) * q.element_size() <= SHORT_BYTES
    if N == 0 or not short or not resident("forward_short", D, E, q.dtype, tensor_core(q.device)):
        if kv is None:
            kv = torch.empty(B, H, D, E, dtype=torch.float32, device=q.device)
            k_sum = torch.empty(B, H, D, dtype=torch.float32, device=q.device)
        state(k, v, k_denom, feature_map, kv, k_sum)
        apply(q, q_denom, kv, k_sum, feature_map, normalize, scale, 1.0 / M, eps, out)
        return
    qd = q if q_denom is None else q_denom
    kd = k if k_denom is None else k_denom
    unit = stride_unit(q, k, v, qd, kd, out)
    config = blocks("forward_short", D, E)
    # More runs than multiprocessors only repeat the state, unless the queries are many.
    device = multiprocessors(q.device)
    block = config["BLOCK_N"]
    runs = max(1, min(-(-device // (B * H)), -(-N // block)), min(-(-4 * device // (B * H)), N // 1024), -(-N // 65536))
    chunk = -(-N // (runs * block)) * block
    forward_short_kernel[(B * H, -(-N // chunk))](
        q, k, v, qd, kd, out, out if kv is None else kv, out if kv is None else k_sum, H, N, M, chunk,
        *strides(q, unit), *strides(k, unit), *strides(v, unit), *strides(qd, unit), *strides(kd, unit),
        *strides(out, unit), scale, 1.0 / M, eps,
        D=D, E=E, FEATURE=feature_map, HAS_QD=q_denom is not None, HAS_KD=k_denom is not None, NORMALIZE=normalize,
        STATE=kv is not None, UNIT=unit, **config,
    )  # fmt: skip


@launched_on_tensor_device
def state(k, v, k_denom, feature_map, kv, k_sum):
    """kv = sum_j phi(k_j)^T v_j and k_sum = sum_j phi(k_denom or k)_j."""
    B, H, M, D = k.shape
    E = v.shape[-1]
    if B * H == 0:
        return
    if not resident("state", D, E, k.dtype, tensor_core(k.device)):
        wide.state(k, v, k_denom, feature_map, kv, k_sum)
        return
    kd = k if k_denom is None else k_denom
    unit = stride_unit(k, v, kd)
    splits, chunk = split_tokens(M, H, E, 1, multiprocessors(k.device))
    part, kv_part, sum_part = _partials(splits, kv, k_sum)
    state_kernel[(B * H, splits)](
        k, v, kd, kv_part, sum_part, H, M, chunk, *strides(k, unit), *strides(v, unit), *strides(kd, unit),
        D=D, E=E, FEATURE=feature_map, HAS_DENOM=k_denom is not None, UNIT=unit, **blocks("state", D, E),
    )  # fmt: skip
    if splits > 1:
        reduce_partials(part, splits, kv, k_sum)


def _partials(splits: int, kv: torch.Tensor, k_sum: torch.Tensor):
    """One workspace for all partials, and its two parts; the outputs themselves where there is one split."""
    if splits == 1:
        return None, kv, k_sum
    part = torch.empty(splits * (kv.numel() + k_sum.numel()), dtype=torch.float32, device=kv.device)
    return part, part, part[splits * kv.numel() :]


@launched_on_tensor_device
def apply(q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps, out):
    """out = phi(q) (scale kv) / (phi(q_denom or q) . k_sum inv_count + eps); no division unless normalize."""
    B, H, N, D = q.shape
    E = out.shape[-1]
    if B * H * N == 0:
        return
    if not resident("apply", D, E, q.dtype, tensor_core(q.device)):
        wide.apply(q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps, out)
        return
    qd = q if q_denom is None else q_denom
    unit = stride_unit(q, qd, out)
    config = blocks("apply", D, E)
    runs, chunk = run_tokens(N, B * H, config["BLOCK_N"], multiprocessors(q.device))
    apply_kernel[(B * H, runs)](
        q, qd, kv, k_sum, out, H, N, chunk, *strides(q, unit), *strides(qd, unit), *strides(out, unit),
        scale, inv_count, eps,
        D=D, E=E, FEATURE=feature_map, HAS_DENOM=q_denom is not None, NORMALIZE=normalize, UNIT=unit, **config,
    )  # fmt: skip


@launched_on_tensor_device
def apply_backward(
    grad_out, q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps,
    grad_q, grad_q_denom, grad_kv, grad_k_sum,
):  # fmt: skip
    """Gradients of apply. With p = phi(q), z the denominators and dP = scale * dO kv^T:

    normalize: grad_kv = scale * sum_i (p_i / z_i)^T dO_i;  dz_i = -(p_i . dP_i) / z_i^2;
    grad_k_sum = inv_count * sum_i dz_i phi(q_denom or q)_i;  grad_q = (dP / z [+ dz m]) phi'(q);
    grad_q_denom = dz m phi'(q_denom), m = inv_count k_sum. Otherwise z = 1 and dz = 0.
    """
    B, H, N, D = q.shape
    E = grad_out.shape[-1]
    if B * H == 0:
        return
    if N == 0:
        grad_kv.zero_()
        grad_k_sum.zero_()
        return
    if grad_q_denom is not None and not normalize:
        grad_q_denom.zero_()
        q_denom = grad_q_denom = None
    core = tensor_core(q.device)
    if not resident("apply_backward_state", D, E, q.dtype, core):
        wide.apply_backward(
            grad_out, q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps,
            grad_q, grad_q_denom, grad_kv, grad_k_sum,
        )  # fmt: skip
        return
    qd, gqd = (q, grad_q) if q_denom is None else (q_denom, grad_q_denom)
    unit = stride_unit(grad_out, q, qd, grad_q, gqd)
    splits, chunk = split_tokens(N, H, E, 1, multiprocessors(q.device))
    part, kv_part, sum_part = _partials(splits, grad_kv, grad_k_sum)
    halves = ("both",) if resident("apply_backward_both", D, E, q.dtype, core) else ("rows", "state")
    if not resident("apply_backward_rows", D, E, q.dtype, core):
        halves = ("state",)
        wide.grad_q(
            grad_out, q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps, grad_q, grad_q_denom,
            sum_part, splits, chunk,
        )  # fmt: skip
    for half in halves:
        apply_backward_kernel[(B * H, splits)](
            grad_out, q, qd, kv, k_sum, grad_q, gqd, kv_part, sum_part, H, N, chunk,
            *strides(grad_out, unit), *strides(q, unit), *strides(qd, unit), *strides(grad_q, unit),
            *strides(gqd, unit), scale, inv_count, eps,
            D=D, E=E, FEATURE=feature_map, HAS_DENOM=q_denom is not None, NORMALIZE=normalize,
            ROWS=half != "state", STATE=half != "rows", UNIT=unit, **blocks(f"apply_backward_{half}", D, E),
        )  # fmt: skip
    if splits > 1:
        reduce_partials(part, splits, grad_kv, grad_k_sum)


@launched_on_tensor_device
def state_backward(grad_kv, grad_k_sum, k, v, k_denom, feature_map, grad_k, grad_v, grad_k_denom):
    """grad_v = phi(k) grad_kv;  grad_k = (v grad_kv^T [+ grad_k_sum]) phi'(k);

    grad_k_denom = grad_k_sum phi'(k_denom), and then grad_k goes without it.
    """
    B, H, M, D = k.shape
    E = v.shape[-1]
    if B * H == 0:
        return
    if not resident("state_backward", D, E, k.dtype, tensor_core(k.device)):
        wide.state_backward(grad_kv, grad_k_sum, k, v, k_denom, feature_map, grad_k, grad_v, grad_k_denom)
        return
    kd, gkd = (k, grad_k) if k_denom is None else (k_denom, grad_k_denom)
    unit = stride_unit(k, v, kd, grad_k, grad_v, gkd)
    config = blocks("state_backward", D, E)
    runs, chunk = run_tokens(M, B * H, config["BLOCK_N"], multiprocessors(k.device))
    state_backward_kernel[(B * H, runs)](
        grad_kv, grad_k_sum, k, v, kd, grad_k, grad_v, gkd, H, M, chunk,
        *strides(k, unit), *strides(v, unit), *strides(kd, unit), *strides(grad_k, unit), *strides(grad_v, unit),
        *strides(gkd, unit),
        D=D, E=E, FEATURE=feature_map, HAS_DENOM=k_denom is not None, UNIT=unit, **config,
    )  # fmt: skip
