"""The definitions: each op in a few lines of plain PyTorch, on any device.

Every kernel is tested against these functions, and they run where no kernel does. Forward definitions are ordinary
differentiable PyTorch. Beside them stand the backward formulas, written out by hand: float64 inputs go through them
inside the registered ops, so `torch.autograd.gradcheck` checks the very formulas that the kernels implement.

Half precision is computed in float32 and rounded once at the end; float32 and float64 are computed as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import geometry

Tensor = torch.Tensor


def _wide(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


# ---------------------------------------------------------------------------- family A: bidirectional linear attention


def feature(t: Tensor, feature_map: str) -> Tensor:
    """phi(t): "elu1" is t + 1 where t > 0 and exp(t) elsewhere, "relu" is max(t, 0), "identity" is t.

    exp(t) is taken by its own branch. elu(t) + 1, which is the same function on paper, cancels: in bfloat16 it is
    exactly 0 from t = -6 on, and a token with such a query loses its denominator.
    """
    if feature_map == "elu1":
        return torch.where(t > 0, t + 1, torch.exp(t.clamp(max=0)))
    return torch.relu(t) if feature_map == "relu" else t


def feature_slope(t: Tensor, feature_map: str) -> Tensor:
    """phi'(t); at the kink of elu1 both sides agree on 1, relu takes 0 there."""
    if feature_map == "elu1":
        return torch.where(t > 0, torch.ones_like(t), torch.exp(t.clamp(max=0)))
    return (t > 0).to(t.dtype) if feature_map == "relu" else torch.ones_like(t)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str = "elu1",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-4,
    q_denom: Tensor | None = None,
    k_denom: Tensor | None = None,
) -> Tensor:
    """Bidirectional linear attention: the two halves below, one after the other."""
    kv, k_sum = linear_attention_state(k, v, feature_map, k_denom)
    return linear_attention_apply(q, kv, k_sum, k.shape[2], feature_map, normalize, scale, eps, q_denom)


def linear_attention_state(
    k: Tensor, v: Tensor, feature_map: str = "elu1", k_denom: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """kv = sum_j phi(k_j)^T v_j (B, H, D, E) and k_sum = sum_j phi((k_denom or k)_j) (B, H, D)."""
    k, v, k_denom = _wide(k), _wide(v), _wide(k_denom)
    phi_k = feature(k, feature_map)
    phi_kd = phi_k if k_denom is None else feature(k_denom, feature_map)
    return phi_k.transpose(-1, -2) @ v, phi_kd.sum(-2)


def linear_attention_apply(
    q: Tensor,
    kv: Tensor,
    k_sum: Tensor,
    count: int,
    feature_map: str = "elu1",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-4,
    q_denom: Tensor | None = None,
) -> Tensor:
    """out = phi(q) (scale kv) / (phi(q_denom or q) . k_sum / count + eps), scale = 1 / count unless it is given."""
    dtype, q, q_denom = q.dtype, _wide(q), _wide(q_denom)
    kv, k_sum = kv.to(q.dtype), k_sum.to(q.dtype)
    phi_q = feature(q, feature_map)
    out = phi_q @ (kv * (1 / count if scale is None else scale))
    if normalize:
        phi_qd = phi_q if q_denom is None else feature(q_denom, feature_map)
        out = out / ((phi_qd * (k_sum / count).unsqueeze(-2)).sum(-1, keepdim=True) + eps)
    return out.to(dtype)


def linear_attention_apply_backward(
    grad_out: Tensor,
    q: Tensor,
    kv: Tensor,
    k_sum: Tensor,
    count: int,
    feature_map: str,
    normalize: bool,
    scale: float | None,
    eps: float,
    q_denom: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of `linear_attention_apply`: (grad_q, grad_q_denom, grad_kv, grad_k_sum).

    Derivation in docs/linear_attention.md. The output is not needed: out_i . grad_i = phi(q_i) . w_i / z_i with
    w_i = scale kv grad_i, which the query's gradient needs in any case.
    """
    dtype, denom_dtype = q.dtype, None if q_denom is None else q_denom.dtype
    q, q_denom, grad = _wide(q), _wide(q_denom), _wide(grad_out)
    kv, k_sum = kv.to(q.dtype), k_sum.to(q.dtype)
    c = 1 / count if scale is None else scale
    phi_q = feature(q, feature_map)
    w = grad @ (c * kv).transpose(-1, -2)
    if not normalize:
        grad_q = w * feature_slope(q, feature_map)
        grad_qd = None if q_denom is None else torch.zeros_like(q_denom)
        return grad_q.to(dtype), grad_qd, c * phi_q.transpose(-1, -2) @ grad, torch.zeros_like(k_sum)
    m = (k_sum / count).unsqueeze(-2)
    phi_qd = phi_q if q_denom is None else feature(q_denom, feature_map)
    z = (phi_qd * m).sum(-1, keepdim=True) + eps
    dz = -(phi_q * w).sum(-1, keepdim=True) / z**2
    grad_kv = c * (phi_q / z).transpose(-1, -2) @ grad
    grad_k_sum = (dz * phi_qd).sum(-2) / count
    if q_denom is None:
        return ((w / z + dz * m) * feature_slope(q, feature_map)).to(dtype), None, grad_kv, grad_k_sum
    grad_q = w / z * feature_slope(q, feature_map)
    grad_qd = dz * m * feature_slope(q_denom, feature_map)
    return grad_q.to(dtype), grad_qd.to(denom_dtype), grad_kv, grad_k_sum


def linear_attention_state_backward(
    grad_kv: Tensor, grad_k_sum: Tensor, k: Tensor, v: Tensor, feature_map: str, k_denom: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `linear_attention_state`: (grad_k, grad_v, grad_k_denom)."""
    dtype = k.dtype
    k, v, k_denom = _wide(k), _wide(v), _wide(k_denom)
    grad_kv, grad_k_sum = grad_kv.to(k.dtype), grad_k_sum.to(k.dtype).unsqueeze(-2)
    grad_v = feature(k, feature_map) @ grad_kv
    grad_phi = v @ grad_kv.transpose(-1, -2)
    if k_denom is None:
        return ((grad_phi + grad_k_sum) * feature_slope(k, feature_map)).to(dtype), grad_v.to(dtype), None
    grad_kd = grad_k_sum * feature_slope(k_denom, feature_map)
    return (grad_phi * feature_slope(k, feature_map)).to(dtype), grad_v.to(dtype), grad_kd.to(dtype)


# ------------------------------------------------------------------- family B: two-dimensional sliding-window attention

#: Scores that exist at one time, over all heads: what bounds the memory of the definition at any number of tokens.
_SCORES_AT_ONCE = 2**22


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height: int,
    width: int,
    radius: int,
    text_length: int = 0,
    pooled_k: Tensor | None = None,
    pooled_v: Tensor | None = None,
    scale: float | None = None,
    text_first: bool = True,
    q_row: int = 0,
    q_text_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys that it sees: (out (B, H, Nq, D), lse (B, H, Nq)).

    A text query sees all text and image keys; an image query sees all text keys, the image keys within the disk
    around it, and all pooled keys. lse is the natural logarithm of the sum of exp(scale q.k) over those keys.
    """
    dtype = q.dtype
    q, k, v, pooled_k, pooled_v = (_wide(x) for x in (q, k, v, pooled_k, pooled_v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [q[:, :, :0]], [q[:, :, :0, 0]]
    pooled = 0 if pooled_k is None else pooled_k.shape[2]
    q_text_length = text_length if q_text_length is None else q_text_length
    for visit in _visits(q, height, width, radius, text_length, pooled, text_first, q_row, q_text_length):
        scores = _scores(scale * q[:, :, visit.queries], k, pooled_k, visit)
        outs.append(torch.softmax(scores, -1) @ _gather(v, pooled_v, visit))
        lses.append(torch.logsumexp(scores, -1))
    return torch.cat(outs, 2).to(dtype), torch.cat(lses, 2)


def window_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    height: int,
    width: int,
    radius: int,
    text_length: int,
    text_first: bool,
    q_row: int,
    q_text_length: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `window_attention`: (grad_q, grad_k, grad_v, grad_pooled_k, grad_pooled_v).

    Derivation in docs/window_attention.md. Probabilities are computed again from lse, and one number per query holds
    both what normalisation and what the gradient of lse add: delta_i = grad_out_i . out_i - grad_lse_i.
    """
    dtype = q.dtype
    q, k, v, pooled_k, pooled_v, grad_out, out = (_wide(x) for x in (q, k, v, pooled_k, pooled_v, grad_out, out))
    delta = (grad_out * out).sum(-1) if grad_lse is None else (grad_out * out).sum(-1) - grad_lse
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    grad_pk, grad_pv = (None if x is None else torch.zeros_like(x) for x in (pooled_k, pooled_v))
    pooled = 0 if pooled_k is None else pooled_k.shape[2]
    for visit in _visits(q, height, width, radius, text_length, pooled, text_first, q_row, q_text_length):
        queries = visit.queries
        grad = grad_out[:, :, queries]
        p = torch.exp(_scores(scale * q[:, :, queries], k, pooled_k, visit) - lse[:, :, queries, None])
        ds = p * (grad @ _gather(v, pooled_v, visit).mT - delta[:, :, queries, None])
        grad_q[:, :, queries] = scale * (ds @ _gather(k, pooled_k, visit))
        _scatter(scale * (ds.mT @ q[:, :, queries]), grad_k, grad_pk, visit)
        _scatter(p.mT @ grad, grad_v, grad_pv, visit)
    return tuple(None if x is None else x.to(dtype) for x in (grad_q, grad_k, grad_v, grad_pk, grad_pv))


class _Visit(NamedTuple):
    """Some queries, and the keys that at least one of them sees: slices of k, and the pooled ones or not."""

    queries: slice
    keys: tuple[slice, ...]
    with_pooled: bool
    mask: Tensor | None  # None: each of the queries sees each of the keys


def _visits(q, height, width, radius, text_length, pooled, text_first, q_row, q_text_length) -> Iterator[_Visit]:
    """Chunks of queries, in the order of q: of text over all keys, of the image over the rows that the disk reaches."""
    radius = geometry.sufficient_radius(height, width, radius)
    text, image = geometry.segments(text_length, height * width, text_first)
    q_text, q_image = geometry.segments(q_text_length, q.shape[2] - q_text_length, text_first)
    budget = _SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1])

    def chunks(part: slice, keys: int) -> Iterator[slice]:
        # The square root, because a chunk of more than one row reaches more rows of keys as well.
        step = max(1, min(budget // max(1, keys), math.isqrt(budget)))
        for first in range(part.start, part.stop, step):
            yield slice(first, min(first + step, part.stop))

    def of_text() -> Iterator[_Visit]:
        for queries in chunks(q_text, text_length + height * width):
            yield _Visit(queries, (slice(0, text_length + height * width),), False, None)

    def of_image() -> Iterator[_Visit]:
        for queries in chunks(q_image, text_length + min(height, 2 * radius) * width + pooled):
            token = torch.arange(queries.start - q_image.start, queries.stop - q_image.start, device=q.device)
            y, x = (q_row + token // width)[:, None], (token % width)[:, None]
            rows = geometry.halo(int(y[0]), int(y[-1] - y[0]) + 1, height, radius)
            key = torch.arange(rows.first * width, rows.stop * width, device=q.device)
            mask = geometry.in_disk(y - key // width, x - key % width, radius)
            mask = torch.cat([mask.new_ones(len(token), text_length), mask, mask.new_ones(len(token), pooled)], 1)
            window = slice(image.start + rows.first * width, image.start + rows.stop * width)
            yield _Visit(queries, (text, window), pooled > 0, mask)

    for part in (of_text, of_image) if text_first else (of_image, of_text):
        yield from part()


def _gather(x: Tensor, pooled: Tensor | None, visit: _Visit) -> Tensor:
    return torch.cat([*(x[:, :, part] for part in visit.keys), *([pooled] if visit.with_pooled else [])], 2)


def _scatter(grad: Tensor, grad_x: Tensor, grad_pooled: Tensor | None, visit: _Visit) -> None:
    """Add a gradient of what `_gather` gave to the gradients of what it was given."""
    targets = [*(grad_x[:, :, part] for part in visit.keys), *([grad_pooled] if visit.with_pooled else [])]
    for target, part in zip(targets, grad.split([x.shape[2] for x in targets], 2), strict=True):
        target += part


def _scores(q: Tensor, k: Tensor, pooled_k: Tensor | None, visit: _Visit) -> Tensor:
    scores = q @ _gather(k, pooled_k, visit).mT
    return scores if visit.mask is None else scores.masked_fill(~visit.mask, float("-inf"))


def pool_tokens(x: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """Weighted sum of each f x f patch of the grid; a patch that runs over the edge reads the nearest token."""
    dtype = x.dtype
    x = _wide(x)
    pooled = _patches(x, weight, height, width) @ weight.to(x.dtype).flatten()
    return pooled.flatten(2, 3).to(dtype)


def pool_tokens_backward(grad_out: Tensor, x: Tensor, weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Gradients of `pool_tokens`: (grad_x, grad_weight), grad_weight float32 (float64 for float64)."""
    dtype = x.dtype
    x, grad_out = _wide(x), _wide(grad_out)
    weight = weight.to(x.dtype)
    rows, columns = _clamped(weight.shape[0], height, width, x.device)
    grad = grad_out.unflatten(2, geometry.pooled_size(height, width, weight.shape[0]))
    grad_weight = grad.flatten() @ _patches(x, weight, height, width).flatten(0, -2)
    spread = (grad[:, :, :, None, :, None] * weight[:, None, :, None]).flatten(4, 5).flatten(2, 3)
    grad_x = x.new_zeros(*x.shape[:2], height, columns.numel(), x.shape[3]).index_add_(2, rows, spread)
    grad_x = x.new_zeros(*x.shape[:2], height, width, x.shape[3]).index_add_(3, columns, grad_x)
    return grad_x.flatten(2, 3).to(dtype), grad_weight.reshape(weight.shape)


def _clamped(factor: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The row and the column that each row and column of the patches reads."""
    sizes = zip(geometry.pooled_size(height, width, factor), (height, width), strict=True)
    return tuple(torch.arange(n * factor, device=device).clamp(max=size - 1) for n, size in sizes)


def _patches(x: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """(B, H, height * width, D) -> (B, H, rows of patches, columns of patches, D, f * f)."""
    factor = weight.shape[0]
    rows, columns = _clamped(factor, height, width, x.device)
    x = x.unflatten(2, (height, width)).index_select(2, rows).index_select(3, columns)
    n, m = geometry.pooled_size(height, width, factor)
    return x.unflatten(3, (m, factor)).unflatten(2, (n, factor)).permute(0, 1, 2, 4, 6, 3, 5).flatten(-2)


# ------------------------------------------------------------------------------------- family C: block-causal attention


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height: int,
    width: int,
    block: int,
    slot_embed: Tensor | None = None,
    scale: float | None = None,
    edge: str = "clamp",
    q_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the blocks of its four slots: (out (B, H, Nq, D), lse (B, H, Nq)).

    slot_embed is added to the keys of each slot. At an edge, "clamp" fills the slot of a missing neighbour with the
    nearest block, which is then attended again, and "drop" leaves it empty.
    """
    dtype = q.dtype
    q, k, v = _wide(q), _wide(k), _wide(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses, order = [q[:, :, :0]], [q[:, :, :0, 0]], []
    for visit in _block_visits(q, height, width, block, edge, q_row):
        scores = _slot_scores(scale * q[:, :, visit.queries], k, slot_embed, visit)
        outs.append((torch.softmax(scores, -1) @ v[:, :, visit.keys]).flatten(2, 3))
        lses.append(torch.logsumexp(scores, -1).flatten(2, 3))
        order.append(visit.queries.flatten())
    if not order:
        return outs[0].to(dtype), lses[0]
    raster = torch.cat(order).argsort()
    return torch.cat(outs, 2)[:, :, raster].to(dtype), torch.cat(lses, 2)[:, :, raster]


def block_causal_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_embed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    height: int,
    width: int,
    block: int,
    edge: str,
    q_row: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `block_causal_attention`: (grad_q, grad_k, grad_v, grad_slot_embed).

    Derivation in docs/block_causal_attention.md; probabilities and delta as in `window_attention_backward`.
    """
    dtype = q.dtype
    q, k, v, grad_out, out = (_wide(x) for x in (q, k, v, grad_out, out))
    delta = (grad_out * out).sum(-1) if grad_lse is None else (grad_out * out).sum(-1) - grad_lse
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    grad_embed = None if slot_embed is None else torch.zeros_like(slot_embed, dtype=q.dtype)
    for visit in _block_visits(q, height, width, block, edge, q_row):
        queries, keys = visit.queries, visit.keys
        x, grad = q[:, :, queries], grad_out[:, :, queries]
        p = torch.exp(_slot_scores(scale * x, k, slot_embed, visit) - lse[:, :, queries, None])
        ds = scale * p * (grad @ v[:, :, keys].mT - delta[:, :, queries, None])
        grad_x = ds @ k[:, :, keys]
        if slot_embed is not None:
            ds_slot = ds.unflatten(-1, (len(geometry.SLOTS), -1)).sum(-1)
            grad_x = grad_x + ds_slot @ _by_head(slot_embed, x)
            grad_embed += torch.einsum("bhnqs,bhnqd->shd", ds_slot, x)
        grad_q[:, :, queries.flatten()] = grad_x.flatten(2, 3)
        grad_k.index_add_(2, keys.flatten(), (ds.mT @ x).flatten(2, 3))
        grad_v.index_add_(2, keys.flatten(), (p.mT @ grad).flatten(2, 3))
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), grad_embed


class _BlockVisit(NamedTuple):
    """Some query blocks, or some queries of one, and the keys of their slots, as numbers of tokens."""

    queries: Tensor  # (blocks, queries)
    keys: Tensor  # (blocks, slots * block^2), slot by slot
    empty: Tensor | None  # (blocks, 1, slots * block^2): what is not attended; None: nothing


def _block_visits(q: Tensor, height: int, width: int, block: int, edge: str, q_row: int) -> Iterator[_BlockVisit]:
    """Query blocks in raster order, as many at a time as the budget allows, and of a large one a part."""
    rows = q.shape[2] // width if width else 0
    columns, in_block = width // block, block * block
    token = torch.arange(block, device=q.device)
    token = (token[:, None] * width + token).flatten()  # of the block in the corner

    def tokens(row, column, first_row=0):
        return (row * block - first_row) * width + column * block + token

    budget = _SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1])
    seen = len(geometry.SLOTS) * in_block
    at_once = max(1, min(budget // (seen * in_block), budget // (seen * q.shape[3])))
    step = max(1, min(in_block, budget // seen))
    count = rows // block * columns
    for first in range(0, count, at_once):
        number = torch.arange(first, min(first + at_once, count), device=q.device)[:, None]
        row, column = q_row // block + number // columns, number % columns
        keys = torch.cat([tokens(*where) for where in geometry.slots(row, column)], 1)
        empty = None
        if edge == "drop":
            empty = ~torch.cat(geometry.existing(row, column), 1).repeat_interleave(in_block, 1)[:, None]
        queries = tokens(row, column, q_row)
        for part in range(0, in_block, step):
            yield _BlockVisit(queries[:, part : part + step], keys, empty)


def _by_head(slot_embed: Tensor, like: Tensor) -> Tensor:
    """(slots, H, D) -> (H, 1, slots, D), to stand beside (B, H, blocks, queries, D)."""
    return slot_embed.to(like.dtype).transpose(0, 1).unsqueeze(1)


def _slot_scores(q: Tensor, k: Tensor, slot_embed: Tensor | None, visit: _BlockVisit) -> Tensor:
    """q . (k + slot_embed), the second product once per slot: (B, H, blocks, queries, slots * block^2)."""
    scores = q @ k[:, :, visit.keys].mT
    if slot_embed is not None:
        shift = q @ _by_head(slot_embed, q).mT
        scores = scores + shift.repeat_interleave(visit.keys.shape[1] // shift.shape[-1], -1)
    return scores if visit.empty is None else scores.masked_fill(visit.empty, float("-inf"))
