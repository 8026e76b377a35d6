"""Linear attention for what linear_attention.py leaves out: float32, head dims from 161 to 256, and what would spill.

Float32 multiplies exactly (input_precision="ieee", which means FMA units and no tensor core): exactness before speed.
With FMAs the products, not the bytes, set the time from D = 64 on, and a D x E operand of float32 does not fit into
registers or shared memory beside its accumulators; nor does a 16-bit one where mma.sync takes operands from registers
(sm_80, sm_89, sm_120). So these kernels are plain tiled products, with 12 to 65 KB of shared memory:

  wide_state      one program per (head, split of the tokens, tile of the state), keys or values being read again from
                  the L2 cache by the other tiles of the same rows; with WEIGHTED it sums (phi(q) / z)^T dO instead
  wide_apply      rows of tokens times the whole state, contraction in steps of BLOCK_K, state read from L2
  wide_grad_q     the same with the transposed state, and dz; partial sums for grad_k_sum
  wide_grad_k     the same for grad_k; grad_v is wide_apply without the division
"""

import torch
import triton
import triton.language as tl

from .common import (
    IDENTITY,
    RUNTIME_ARGUMENTS,
    fit_float16,
    head_tile,
    load_rows,
    load_vector,
    multiprocessors,
    phi,
    phi_slope,
    reduce_partials,
    split_tokens,
    store_matrix,
    store_rows,
    stride_unit,
    strides,
)


@triton.jit
def _fit(W, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """The factor that brings W into the range of DTYPE (1 unless float16)."""
    if DTYPE.is_fp16():
        peak = tl.zeros([1024], tl.float32)
        for first in range(0, SIZE, 1024):
            at = first + tl.arange(0, 1024)
            peak = tl.maximum(peak, tl.abs(tl.load(W + at, mask=at < SIZE, other=0.0)))
        return fit_float16(tl.max(peak, 0))
    else:
        return 1.0


@triton.jit
def _times_matrix(
    A, a_sn, token, live, W, w_row, w_column, fit, inner_size,
    INNER: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    FEATURE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """phi(A) W for one block of rows: columns 0 .. C0 and C0 .. C0 + C1. W [INNER, C] by its two strides.

    inner_size is INNER again, at run time: a loop over a constant is unrolled until registers run out.
    """
    dtype: tl.constexpr = A.dtype.element_ty
    c0 = tl.arange(0, C0)
    acc0 = tl.zeros([BLOCK_N, C0], tl.float32)
    acc1 = tl.zeros([BLOCK_N, C1 if C1 > 0 else 16], tl.float32)
    for first in range(0, inner_size, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        a = load_rows(A, token, live, a_sn, UNIT, first, INNER, BLOCK_K).to(tl.float32)
        a = phi(a, FEATURE, dtype == tl.float32).to(dtype)
        mask = (inner < INNER)[:, None] & (c0 < C)[None, :]
        w = tl.load(W + inner[:, None] * w_row + c0[None, :] * w_column, mask=mask, other=0.0)
        acc0 = tl.dot(a, (w * fit).to(dtype), acc0, input_precision="ieee")
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
            mask = (inner < INNER)[:, None] & (c1 < C)[None, :]
            w = tl.load(W + inner[:, None] * w_row + c1[None, :] * w_column, mask=mask, other=0.0)
            acc1 = tl.dot(a, (w * fit).to(dtype), acc1, input_precision="ieee")
    return acc0, acc1


@triton.jit
def _denominator(
    X, x_sn, token, live, KSUM, inv_count, eps,
    D: tl.constexpr, FEATURE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z = phi(x) . k_sum * inv_count + eps for a block of rows."""
    dtype: tl.constexpr = X.dtype.element_ty
    z = tl.zeros([BLOCK_N], tl.float32) + eps
    for first in range(0, D, 32):
        x = load_rows(X, token, live, x_sn, UNIT, first, D, 32).to(tl.float32)
        p = phi(x, FEATURE, dtype == tl.float32).to(dtype).to(tl.float32)
        z += tl.sum(p * (load_vector(KSUM, first + tl.arange(0, 32), D) * inv_count)[None, :], 1)
    return z


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def wide_state_kernel(
    K, V, KD, KV, KSUM, MEAN, heads, tokens, chunk, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, kd_sb, kd_sh, kd_sn,
    scale, inv_count, eps,
    D: tl.constexpr, E: tl.constexpr, TILE_D: tl.constexpr, TILE_E: tl.constexpr,
    FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, WEIGHTED: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of one partial state, times scale. WEIGHTED: K, KD, V are q, q_denom, dO, rows divided by z; no sum."""
    dtype: tl.constexpr = K.dtype.element_ty
    exact: tl.constexpr = dtype == tl.float32
    row = tl.program_id(0)
    split = tl.program_id(1)
    tile = tl.program_id(2)
    tiles_e: tl.constexpr = (E + TILE_E - 1) // TILE_E
    first_d = tile // tiles_e * TILE_D
    first_e = tile % tiles_e * TILE_E
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    at = row.to(tl.int64)
    lo = split * chunk
    hi = tl.minimum(lo + chunk, tokens)
    K += b * k_sb * UNIT + h * k_sh * UNIT
    V += b * v_sb * UNIT + h * v_sh * UNIT
    KD += b * kd_sb * UNIT + h * kd_sh * UNIT
    MEAN += at * D
    d = first_d + tl.arange(0, TILE_D)
    e = first_e + tl.arange(0, TILE_E)
    kv = tl.zeros([TILE_D, TILE_E], tl.float32)
    total = tl.zeros([TILE_D], tl.float32)
    token = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        n = tl.cast(start, tl.int64)
        live = start + token < hi
        v = load_rows(V + n * v_sn * UNIT, token, live, v_sn, UNIT, first_e, E, TILE_E)
        p = phi(
            load_rows(K + n * k_sn * UNIT, token, live, k_sn, UNIT, first_d, D, TILE_D).to(tl.float32), FEATURE, exact
        )
        if WEIGHTED:
            z = _denominator(KD + n * kd_sn * UNIT, kd_sn, token, live, MEAN, inv_count, eps, D, FEATURE, UNIT, BLOCK_N)
            p = p.to(dtype).to(tl.float32) * tl.where(live, 1.0 / z, 0.0)[:, None]  # z of a dead row may be 0
        p = tl.where(live[:, None], p, 0.0).to(dtype)
        kv = tl.dot(tl.trans(p), v, kv, input_precision="ieee")
        if not WEIGHTED:
            if HAS_DENOM:
                x = load_rows(KD + n * kd_sn * UNIT, token, live, kd_sn, UNIT, first_d, D, TILE_D).to(tl.float32)
                p = tl.where(live[:, None], phi(x, FEATURE, exact), 0.0).to(dtype)
            total += tl.sum(p.to(tl.float32), 0)
    slot = split.to(tl.int64) * tl.num_programs(0) + row
    store_matrix(KV + slot * (D * E), kv * scale, d, e, D, E)
    if not WEIGHTED and first_e == 0:
        tl.store(KSUM + slot * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def wide_apply_kernel(
    Q, QD, KV, KSUM, OUT, rows, heads, tokens, inner_size, q_sb, q_sh, q_sn, qd_sb, qd_sh, qd_sn, o_sb, o_sh, o_sn,
    scale, inv_count, eps,
    D: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, FEATURE: tl.constexpr,
    NORMALIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out for one block of rows; QD is q itself where there is no q_denom."""
    row = tl.program_id(0) % rows  # axis 0 alone: the others end at 65,535
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    at = row.to(tl.int64)
    start = tl.program_id(0) // rows * BLOCK_N
    token = tl.arange(0, BLOCK_N)
    live = start + token < tokens
    n = tl.cast(start, tl.int64)
    Q += b * q_sb * UNIT + h * q_sh * UNIT + n * q_sn * UNIT
    OUT += b * o_sb * UNIT + h * o_sh * UNIT + n * o_sn * UNIT
    KV += at * (D * E)
    fit = _fit(KV, D * E, Q.dtype.element_ty)
    out0, out1 = _times_matrix(
        Q, q_sn, token, live, KV, E, 1, fit, inner_size, D, E, E0, E1, FEATURE, UNIT, BLOCK_N, BLOCK_K
    )
    factor = scale / fit + tl.zeros([BLOCK_N], tl.float32)
    if NORMALIZE:
        QD += b * qd_sb * UNIT + h * qd_sh * UNIT + n * qd_sn * UNIT
        factor /= _denominator(QD, qd_sn, token, live, KSUM + at * D, inv_count, eps, D, FEATURE, UNIT, BLOCK_N)
    store_rows(OUT, out0 * factor[:, None], token, live, o_sn, UNIT, 0, E, E0)
    if E1 > 0:
        store_rows(OUT, out1 * factor[:, None], token, live, o_sn, UNIT, E0, E, E1)


@triton.jit
def _grad_q_columns(
    dp, dz, inv_z, Q, QD, KSUM, GQ, GQD, token, live, q_sn, qd_sn, gq_sn, gqd_sn, inv_count, first,
    D: tl.constexpr, C: tl.constexpr, FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Stores grad_q (and grad_q_denom) for columns first .. first + C; returns this block's share of grad_k_sum."""
    dtype: tl.constexpr = Q.dtype.element_ty
    exact: tl.constexpr = dtype == tl.float32
    x = load_rows(Q, token, live, q_sn, UNIT, first, D, C).to(tl.float32)
    p = phi(x, FEATURE, exact)
    gsum = tl.zeros([C], tl.float32)
    if NORMALIZE:
        mean = load_vector(KSUM, first + tl.arange(0, C), D) * inv_count
        y = x
        r = p
        if HAS_DENOM:
            y = load_rows(QD, token, live, qd_sn, UNIT, first, D, C).to(tl.float32)
            r = phi(y, FEATURE, exact)
        gsum += tl.sum(r * dz[:, None], 0)
        dp = dp * inv_z[:, None]
        dy = dz[:, None] * mean[None, :]
        if HAS_DENOM:
            store_rows(GQD, dy * phi_slope(r, FEATURE), token, live, gqd_sn, UNIT, first, D, C)
        else:
            dp += dy
    store_rows(GQ, dp * phi_slope(p, FEATURE), token, live, gq_sn, UNIT, first, D, C)
    return gsum


@triton.jit
def _row_dot(
    dp, Q, token, live, q_sn, first, D: tl.constexpr, C: tl.constexpr, FEATURE: tl.constexpr, UNIT: tl.constexpr
):
    """phi(q) . dp over columns first .. first + C."""
    dtype: tl.constexpr = Q.dtype.element_ty
    x = load_rows(Q, token, live, q_sn, UNIT, first, D, C).to(tl.float32)
    return tl.sum(phi(x, FEATURE, dtype == tl.float32).to(dtype).to(tl.float32) * dp, 1)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def wide_grad_q_kernel(
    G, Q, QD, KV, KSUM, GQ, GQD, GKSUM, heads, tokens, chunk, inner_size,
    g_sb, g_sh, g_sn, q_sb, q_sh, q_sn, qd_sb, qd_sh, qd_sn, gq_sb, gq_sh, gq_sn, gqd_sb, gqd_sh, gqd_sn,
    scale, inv_count, eps,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FEATURE: tl.constexpr,
    HAS_DENOM: tl.constexpr, NORMALIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_q of one run of tokens and its partial grad_k_sum."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    at = row.to(tl.int64)
    lo = split * chunk
    hi = tl.minimum(lo + chunk, tokens)
    KV += at * (D * E)
    KSUM += at * D
    fit = _fit(KV, D * E, Q.dtype.element_ty)
    gsum0 = tl.zeros([D0], tl.float32)
    gsum1 = tl.zeros([D1 if D1 > 0 else 16], tl.float32)
    token = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        n = tl.cast(start, tl.int64)
        live = start + token < hi
        G_at = G + (b * g_sb + h * g_sh + n * g_sn) * UNIT
        Q_at = Q + (b * q_sb + h * q_sh + n * q_sn) * UNIT
        QD_at = QD + (b * qd_sb + h * qd_sh + n * qd_sn) * UNIT
        GQ_at = GQ + (b * gq_sb + h * gq_sh + n * gq_sn) * UNIT
        GQD_at = GQD + (b * gqd_sb + h * gqd_sh + n * gqd_sn) * UNIT
        inv_z = tl.zeros([BLOCK_N], tl.float32)
        if NORMALIZE:
            z = _denominator(QD_at, qd_sn, token, live, KSUM, inv_count, eps, D, FEATURE, UNIT, BLOCK_N)
            inv_z = tl.where(live, 1.0 / z, 0.0)  # z of a dead row may be 0
        dp0, dp1 = _times_matrix(
            G_at, g_sn, token, live, KV, 1, E, fit, inner_size, E, D, D0, D1, IDENTITY, UNIT, BLOCK_N, BLOCK_K
        )
        dp0 *= scale / fit
        dp1 *= scale / fit
        dz = tl.zeros([BLOCK_N], tl.float32)
        if NORMALIZE:
            dz = _row_dot(dp0, Q_at, token, live, q_sn, 0, D, D0, FEATURE, UNIT)
            if D1 > 0:
                dz += _row_dot(dp1, Q_at, token, live, q_sn, D0, D, D1, FEATURE, UNIT)
            dz = -dz * inv_z * inv_z
        gsum0 += _grad_q_columns(
            dp0, dz, inv_z, Q_at, QD_at, KSUM, GQ_at, GQD_at, token, live, q_sn, qd_sn, gq_sn, gqd_sn, inv_count, 0,
            D, D0, FEATURE, HAS_DENOM, NORMALIZE, UNIT,
        )  # fmt: skip
        if D1 > 0:
            gsum1 += _grad_q_columns(
                dp1, dz, inv_z, Q_at, QD_at, KSUM, GQ_at, GQD_at, token, live, q_sn, qd_sn, gq_sn, gqd_sn, inv_count,
                D0, D, D1, FEATURE, HAS_DENOM, NORMALIZE, UNIT,
            )  # fmt: skip
    slot = split.to(tl.int64) * tl.num_programs(0) + row
    d0 = tl.arange(0, D0)
    tl.store(GKSUM + slot * D + d0, gsum0 * inv_count, mask=d0 < D)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        tl.store(GKSUM + slot * D + d1, gsum1 * inv_count, mask=d1 < D)


@triton.jit
def _grad_k_columns(
    dp, gsum, K, KD, GK, GKD, token, live, k_sn, kd_sn, gk_sn, gkd_sn, first,
    D: tl.constexpr, C: tl.constexpr, FEATURE: tl.constexpr, HAS_DENOM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Stores grad_k (and grad_k_denom) for columns first .. first + C."""
    exact: tl.constexpr = K.dtype.element_ty == tl.float32
    if HAS_DENOM:
        y = load_rows(KD, token, live, kd_sn, UNIT, first, D, C).to(tl.float32)
        slope = phi_slope(phi(y, FEATURE, exact), FEATURE)
        store_rows(GKD, slope * gsum[None, :], token, live, gkd_sn, UNIT, first, D, C)
    else:
        dp += gsum[None, :]
    x = load_rows(K, token, live, k_sn, UNIT, first, D, C).to(tl.float32)
    slope = phi_slope(phi(x, FEATURE, exact), FEATURE)
    store_rows(GK, dp * slope, token, live, gk_sn, UNIT, first, D, C)


@triton.jit(do_not_specialize=RUNTIME_ARGUMENTS)
def wide_grad_k_kernel(
    GKV, GKSUM, K, V, KD, GK, GKD, rows, heads, tokens, inner_size,
    k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, kd_sb, kd_sh, kd_sn, gk_sb, gk_sh, gk_sn, gkd_sb, gkd_sh, gkd_sn,
    D: tl.constexpr, E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FEATURE: tl.constexpr,
    HAS_DENOM: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_k (and grad_k_denom) for one block of rows."""
    row = tl.program_id(0) % rows  # axis 0 alone: the others end at 65,535
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    at = row.to(tl.int64)
    start = tl.program_id(0) // rows * BLOCK_N
    token = tl.arange(0, BLOCK_N)
    live = start + token < tokens
    n = tl.cast(start, tl.int64)
    K += (b * k_sb + h * k_sh + n * k_sn) * UNIT
    V += (b * v_sb + h * v_sh + n * v_sn) * UNIT
    KD += (b * kd_sb + h * kd_sh + n * kd_sn) * UNIT
    GK += (b * gk_sb + h * gk_sh + n * gk_sn) * UNIT
    GKD += (b * gkd_sb + h * gkd_sh + n * gkd_sn) * UNIT
    GKV += at * (D * E)
    fit = _fit(GKV, D * E, K.dtype.element_ty)
    dp0, dp1 = _times_matrix(
        V, v_sn, token, live, GKV, 1, E, fit, inner_size, E, D, D0, D1, IDENTITY, UNIT, BLOCK_N, BLOCK_K
    )
    gsum0 = load_vector(GKSUM + at * D, tl.arange(0, D0), D)
    _grad_k_columns(
        dp0 / fit, gsum0, K, KD, GK, GKD, token, live, k_sn, kd_sn, gk_sn, gkd_sn, 0, D, D0, FEATURE, HAS_DENOM, UNIT
    )
    if D1 > 0:
        gsum1 = load_vector(GKSUM + at * D, D0 + tl.arange(0, D1), D)
        _grad_k_columns(
            dp1 / fit, gsum1, K, KD, GK, GKD, token, live, k_sn, kd_sn, gk_sn, gkd_sn, D0, D, D1, FEATURE, HAS_DENOM,
            UNIT,
        )  # fmt: skip


# ---- launchers -------------------------------------------------------------------------------------------------------


def _tile(width: int, dtype: torch.dtype) -> int:
    return min(64 if dtype == torch.float32 else 128, triton.next_power_of_2(max(width, 16)))


def row_blocks(dtype: torch.dtype, holds_rows: bool = False) -> dict:
    """Rows per program, contraction step, warps and stages of the row kernels; holds_rows: of wide_grad_q."""
    if dtype == torch.float32:
        return {"BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1 if holds_rows else 2}


def state_blocks(D: int, E: int, dtype: torch.dtype) -> dict:
    exact = dtype == torch.float32
    return {
        "TILE_D": _tile(D, dtype),
        "TILE_E": _tile(E, dtype),
        "BLOCK_N": 32 if exact else 64,
        "num_warps": 4 if exact else 8,
        "num_stages": 2,
    }


def launch_state(k, v, k_denom, weights, feature_map, scale, inv_count, eps, kv, k_sum):
    """State of (k, v); with weights (= k_sum of the forward) the grad_kv of (q, dO), and k_sum is left alone."""
    B, H, M, D = k.shape
    E = v.shape[-1]
    kd = k if k_denom is None else k_denom
    unit = stride_unit(k, v, kd)
    blocks = state_blocks(D, E, k.dtype)
    tiles = triton.cdiv(D, blocks["TILE_D"]) * triton.cdiv(E, blocks["TILE_E"])
    splits, chunk = split_tokens(M, H, E, tiles, multiprocessors(k.device))
    kv_part, sum_part = kv, k_sum
    if splits > 1:
        part = torch.empty(splits * (kv.numel() + k_sum.numel()), dtype=torch.float32, device=k.device)
        kv_part, sum_part = part, part[splits * kv.numel() :]
    wide_state_kernel[(B * H, splits, tiles)](
        k, v, kd, kv_part, sum_part, kv if weights is None else weights, H, M, chunk,
        *strides(k, unit), *strides(v, unit), *strides(kd, unit), scale, inv_count, eps,
        D=D, E=E, FEATURE=feature_map, HAS_DENOM=k_denom is not None, WEIGHTED=weights is not None, UNIT=unit, **blocks,
    )  # fmt: skip
    if splits > 1:
        reduce_partials(part, splits, kv, None if weights is not None else k_sum)


def state(k, v, k_denom, feature_map, kv, k_sum):
    launch_state(k, v, k_denom, None, feature_map, 1.0, 1.0, 0.0, kv, k_sum)


def apply(q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps, out):
    B, H, N, D = q.shape
    E = out.shape[-1]
    qd = q if q_denom is None else q_denom
    unit = stride_unit(q, qd, out)
    blocks = row_blocks(q.dtype)
    E0, E1 = head_tile(E)
    wide_apply_kernel[(B * H * triton.cdiv(N, blocks["BLOCK_N"]),)](
        q, qd, kv, k_sum, out, B * H, H, N, D, *strides(q, unit), *strides(qd, unit), *strides(out, unit),
        scale, inv_count, eps,
        D=D, E=E, E0=E0, E1=E1, FEATURE=feature_map, NORMALIZE=normalize, UNIT=unit, **blocks,
    )  # fmt: skip


def grad_q(
    grad_out, q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps, grad_q, grad_q_denom,
    sum_partials, splits, chunk,
):  # fmt: skip
    """grad_q, grad_q_denom and the partials [splits, B, H, D] of grad_k_sum."""
    B, H, N, D = q.shape
    E = grad_out.shape[-1]
    qd, gqd = (q, grad_q) if q_denom is None else (q_denom, grad_q_denom)
    unit = stride_unit(grad_out, q, qd, grad_q, gqd)
    D0, D1 = head_tile(D)
    if q.dtype != torch.float32:
        D0, D1 = (128, 128) if D > 128 else (max(16, triton.next_power_of_2(D)), 0)  # others spill
    wide_grad_q_kernel[(B * H, splits)](
        grad_out, q, qd, kv, k_sum, grad_q, gqd, sum_partials, H, N, chunk, E, *strides(grad_out, unit),
        *strides(q, unit), *strides(qd, unit), *strides(grad_q, unit), *strides(gqd, unit), scale, inv_count, eps,
        D=D, E=E, D0=D0, D1=D1, FEATURE=feature_map, HAS_DENOM=q_denom is not None, NORMALIZE=normalize, UNIT=unit,
        **row_blocks(q.dtype, holds_rows=True),
    )  # fmt: skip


def apply_backward(
    grad_out, q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps,
    dq, dq_denom, grad_kv, grad_k_sum,
):  # fmt: skip
    H, N = q.shape[1:3]
    splits, chunk = split_tokens(N, H, grad_out.shape[-1], 1, multiprocessors(q.device))
    sums = grad_k_sum
    if splits > 1:
        sums = torch.empty(splits * grad_k_sum.numel(), dtype=torch.float32, device=q.device)
    grad_q(
        grad_out, q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps, dq, dq_denom, sums, splits,
        chunk,
    )  # fmt: skip
    if splits > 1:
        reduce_partials(sums, splits, grad_k_sum, None)
    weights = k_sum if normalize else None
    unused = torch.empty_like(grad_k_sum)  # without weights the state kernel sums phi(q) as well
    qd = q if q_denom is None else q_denom
    launch_state(q, grad_out, qd, weights, feature_map, scale, inv_count, eps, grad_kv, unused)


def state_backward(grad_kv, grad_k_sum, k, v, k_denom, feature_map, grad_k, grad_v, grad_k_denom):
    B, H, M, D = k.shape
    E = v.shape[-1]
    kd, gkd = (k, grad_k) if k_denom is None else (k_denom, grad_k_denom)
    apply(k, None, grad_kv, grad_k_sum, feature_map, False, 1.0, 1.0, 0.0, grad_v)
    unit = stride_unit(k, v, kd, grad_k, gkd)
    blocks = row_blocks(k.dtype)
    D0, D1 = head_tile(D)
    wide_grad_k_kernel[(B * H * triton.cdiv(M, blocks["BLOCK_N"]),)](
        grad_kv, grad_k_sum, k, v, kd, grad_k, gkd, B * H, H, M, E, *strides(k, unit), *strides(v, unit),
        *strides(kd, unit), *strides(grad_k, unit), *strides(gkd, unit),
        D=D, E=E, D0=D0, D1=D1, FEATURE=feature_map, HAS_DENOM=k_denom is not None, UNIT=unit, **blocks,
    )  # fmt: skip
