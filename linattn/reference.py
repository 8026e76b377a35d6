"""The definitions: each op in a few lines of plain PyTorch, on any device.

Every kernel is tested against these functions, and they run where no kernel does. Forward definitions are ordinary
differentiable PyTorch. Beside them stand the backward formulas, written out by hand: float64 inputs go through them
inside the registered ops, so `torch.autograd.gradcheck` checks the very formulas that the kernels implement.

Half precision is computed in float32 and rounded once at the end; float32 and float64 are computed as they are.
"""

from __future__ import annotations

import torch

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
