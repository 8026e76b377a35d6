"""Family A: bidirectional linear attention, as one op and as its two halves.

    kv    = sum_j phi(k_j)^T v_j                                 linear_attention_state
    k_sum = sum_j phi((k_denom or k)_j)
    out_i = phi(q_i) (scale kv) / (phi((q_denom or q)_i) . k_sum / count + eps)      linear_attention_apply

`linear_attention` is the composite: it calls `_linear_attention`, which runs both halves in one kernel launch and
keeps the state for the backward pass only where something will be differentiated. The backward of the whole is the
backward of the halves, one after the other; the formulas are derived in docs/linear_attention.md.
"""

from __future__ import annotations

import torch

from .. import reference
from . import checks, registration
from .registration import empty_like_heads, overload, readable, state_dtype, superfluous

Tensor = torch.Tensor

#: Feature maps; the position is the code that kernels know them by.
FEATURE_MAPS = ("identity", "relu", "elu1")

__all__ = ["linear_attention", "linear_attention_apply", "linear_attention_state"]


# ------------------------------------------------------------------------------------------------- checks


def _check_keys(op: str, k: Tensor, v: Tensor, feature_map: str, k_denom: Tensor | None) -> None:
    checks.choice(op, "feature_map", feature_map, FEATURE_MAPS)
    checks.rank(op, "k", k, "B, H, M, D")
    checks.shape(op, "v", v, (*k.shape[:3], None), "B, H, M, E")
    checks.head_dim(op, "k", k)
    checks.head_dim(op, "v", v)
    if k.shape[2] < 1:
        raise ValueError(f"{op}: k must hold at least one token (M >= 1), got shape {tuple(k.shape)}")
    if k_denom is not None:
        checks.shape(op, "k_denom", k_denom, k.shape, "B, H, M, D")


def _check_queries(op: str, q: Tensor, q_denom: Tensor | None) -> None:
    checks.rank(op, "q", q, "B, H, N, D")
    checks.head_dim(op, "q", q)
    if q_denom is not None:
        checks.shape(op, "q_denom", q_denom, q.shape, "B, H, N, D")


def _check_forward(q, k, v, feature_map, normalize, scale, eps, q_denom, k_denom, keep_state) -> None:
    op = "linear_attention"
    _check_queries(op, q, q_denom)
    b, h, _, d = q.shape
    checks.shape(op, "k", k, (b, h, None, d), "B, H, M, D")
    _check_keys(op, k, v, feature_map, k_denom)
    checks.same_kind(op, {"q": q, "k": k, "v": v, "q_denom": q_denom, "k_denom": k_denom}, like="q")


def _check_state(k, v, feature_map, k_denom) -> None:
    op = "linear_attention_state"
    _check_keys(op, k, v, feature_map, k_denom)
    checks.same_kind(op, {"k": k, "v": v, "k_denom": k_denom}, like="k")


def _check_apply(q, kv, k_sum, count, feature_map, normalize, scale, eps, q_denom) -> None:
    op = "linear_attention_apply"
    checks.choice(op, "feature_map", feature_map, FEATURE_MAPS)
    _check_queries(op, q, q_denom)
    b, h, _, d = q.shape
    checks.shape(op, "kv", kv, (b, h, d, None), "B, H, D, E")
    checks.head_dim(op, "kv", kv)
    checks.shape(op, "k_sum", k_sum, (b, h, d), "B, H, D")
    checks.same_kind(op, {"q": q, "q_denom": q_denom}, like="q")
    for name, x in (("kv", kv), ("k_sum", k_sum)):
        checks.floating(op, name, x)
        checks.same_device(op, name, x, "q", q)
    if count < 1:
        raise ValueError(f"{op}: count, the number of keys behind kv, must be >= 1, got {count}")


def _check_apply_backward(grad_out, q, kv, k_sum, count, feature_map, normalize, scale, eps, q_denom) -> None:
    _check_apply(q, kv, k_sum, count, feature_map, normalize, scale, eps, q_denom)
    checks.shape("linear_attention_apply_backward", "grad_out", grad_out, (*q.shape[:3], kv.shape[-1]), "B, H, N, E")
    checks.same_kind("linear_attention_apply_backward", {"grad_out": grad_out, "q": q}, like="q")


def _check_state_backward(grad_kv, grad_k_sum, k, v, feature_map, k_denom) -> None:
    _check_state(k, v, feature_map, k_denom)
    b, h, _, d = k.shape
    checks.shape("linear_attention_state_backward", "grad_kv", grad_kv, (b, h, d, v.shape[-1]), "B, H, D, E")
    checks.shape("linear_attention_state_backward", "grad_k_sum", grad_k_sum, (b, h, d), "B, H, D")


# ------------------------------------------------------------------------------------------------- kernel ops


def _reference_forward(q, k, v, q_denom, k_denom, feature_map, normalize, scale, eps, out, kv, k_sum) -> None:
    name, count = FEATURE_MAPS[feature_map], k.shape[2]
    state = reference.linear_attention_state(k, v, name, k_denom)
    out.copy_(reference.linear_attention_apply(q, *state, count, name, normalize, scale, eps, q_denom))
    if kv is not None:
        kv.copy_(state[0])
        k_sum.copy_(state[1])


def _reference_state(k, v, k_denom, feature_map, kv, k_sum) -> None:
    for output, x in zip(
        (kv, k_sum), reference.linear_attention_state(k, v, FEATURE_MAPS[feature_map], k_denom), strict=True
    ):
        output.copy_(x)


def _reference_apply(q, q_denom, kv, k_sum, feature_map, normalize, scale, inv_count, eps, out) -> None:
    name = FEATURE_MAPS[feature_map]
    mean = k_sum * inv_count
    out.copy_(reference.linear_attention_apply(q, kv, mean, 1, name, normalize, scale, eps, q_denom))


def _reference_apply_backward(
    grad_out,
    q,
    q_denom,
    kv,
    k_sum,
    feature_map,
    normalize,
    scale,
    inv_count,
    eps,
    grad_q,
    grad_q_denom,
    grad_kv,
    grad_sum,
) -> None:
    results = reference.linear_attention_apply_backward(
        grad_out, q, kv, k_sum * inv_count, 1, FEATURE_MAPS[feature_map], normalize, scale, eps, q_denom
    )
    grad_q.copy_(results[0])
    if grad_q_denom is not None:
        grad_q_denom.copy_(results[1])
    grad_kv.copy_(results[2])
    grad_sum.copy_(results[3] * inv_count)


def _reference_state_backward(grad_kv, grad_k_sum, k, v, k_denom, feature_map, grad_k, grad_v, grad_k_denom) -> None:
    results = reference.linear_attention_state_backward(grad_kv, grad_k_sum, k, v, FEATURE_MAPS[feature_map], k_denom)
    for output, x in zip((grad_k, grad_v, grad_k_denom), results, strict=True):
        if output is not None:
            output.copy_(x)


_TRITON = "triton_kernels.linear_attention"

_forward_kernel = registration.define_kernels(
    "linear_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? q_denom, Tensor? k_denom, int feature_map, bool normalize, float scale, "
    "float eps, Tensor(a!) out, Tensor(b!)? kv, Tensor(c!)? k_sum",
    _reference_forward,
    registration.lazy(_TRITON, "forward"),
)
_state_kernel = registration.define_kernels(
    "linear_attention_state",
    "Tensor k, Tensor v, Tensor? k_denom, int feature_map, Tensor(a!) kv, Tensor(b!) k_sum",
    _reference_state,
    registration.lazy(_TRITON, "state"),
)
_apply_kernel = registration.define_kernels(
    "linear_attention_apply",
    "Tensor q, Tensor? q_denom, Tensor kv, Tensor k_sum, int feature_map, bool normalize, float scale, "
    "float inv_count, float eps, Tensor(a!) out",
    _reference_apply,
    registration.lazy(_TRITON, "apply"),
)
_apply_backward_kernel = registration.define_kernels(
    "linear_attention_apply_backward",
    "Tensor grad_out, Tensor q, Tensor? q_denom, Tensor kv, Tensor k_sum, int feature_map, bool normalize, "
    "float scale, float inv_count, float eps, Tensor(a!) grad_q, Tensor(b!)? grad_q_denom, Tensor(c!) grad_kv, "
    "Tensor(d!) grad_k_sum",
    _reference_apply_backward,
    registration.lazy(_TRITON, "apply_backward"),
)
_state_backward_kernel = registration.define_kernels(
    "linear_attention_state_backward",
    "Tensor grad_kv, Tensor grad_k_sum, Tensor k, Tensor v, Tensor? k_denom, int feature_map, Tensor(a!) grad_k, "
    "Tensor(b!) grad_v, Tensor(c!)? grad_k_denom",
    _reference_state_backward,
    registration.lazy(_TRITON, "state_backward"),
)


# ------------------------------------------------------------------------------------------------- dispatched ops


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else readable(x)


def _as_state(x: Tensor, like: Tensor) -> Tensor:
    return x.to(state_dtype(like)).contiguous()


def _empty_state(k: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    b, h, _, d = k.shape
    return k.new_empty((b, h, d, value_dim), dtype=state_dtype(k)), k.new_empty((b, h, d), dtype=state_dtype(k))


def _allocate_forward(q, k, v, keep_state, **_) -> tuple[Tensor, Tensor, Tensor]:
    state = _empty_state(k, v.shape[-1]) if keep_state else (superfluous(k), superfluous(k))
    return empty_like_heads(q, v.shape[-1]), *state


def _launch_forward(kernel, outputs, q, k, v, feature_map, normalize, scale, eps, q_denom, k_denom, keep_state) -> None:
    out, kv, k_sum = outputs
    scale = 1 / k.shape[2] if scale is None else scale
    state = (kv, k_sum) if keep_state else (None, None)
    tensors = readable(q), readable(k), readable(v), _optional(q_denom), _optional(k_denom)
    kernel(*tensors, FEATURE_MAPS.index(feature_map), normalize, scale, eps, out, *state)


def _save_forward(ctx, inputs, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = {name: inputs[name] for name in ("feature_map", "normalize", "scale", "eps", "keep_state")}
    ctx.save_for_backward(*(inputs[name] for name in ("q", "k", "v", "q_denom", "k_denom")), *outputs[1:])


def _backward_forward(ctx, grad_out, grad_kv, grad_k_sum):
    q, k, v, q_denom, k_denom, kv, k_sum = ctx.saved_tensors
    feature_map, normalize, scale, eps, kept = ctx.options.values()
    grad_q = grad_qd = grad_k = grad_v = grad_kd = None
    if grad_out is not None:
        if not kept:
            kv, k_sum = overload("linear_attention_state")(k, v, feature_map, k_denom)
        grad_q, grad_qd, from_kv, from_k_sum = overload("_linear_attention_apply_backward")(
            grad_out, q, kv, k_sum, k.shape[2], feature_map, normalize, scale, eps, q_denom
        )
        grad_kv = from_kv if grad_kv is None or not kept else grad_kv + from_kv
        grad_k_sum = from_k_sum if grad_k_sum is None or not kept else grad_k_sum + from_k_sum
    if grad_kv is not None or grad_k_sum is not None:
        grad_k, grad_v, grad_kd = _state_gradients(grad_kv, grad_k_sum, k, v, feature_map, k_denom)
    return grad_q, grad_k, grad_v, None, None, None, None, grad_qd if q_denom is not None else None, grad_kd, None


def _allocate_state(k, v, **_) -> tuple[Tensor, Tensor]:
    return _empty_state(k, v.shape[-1])


def _launch_state(kernel, outputs, k, v, feature_map, k_denom) -> None:
    kernel(readable(k), readable(v), _optional(k_denom), FEATURE_MAPS.index(feature_map), *outputs)


def _save_state(ctx, inputs, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.feature_map = inputs["feature_map"]
    ctx.save_for_backward(inputs["k"], inputs["v"], inputs["k_denom"])


def _state_gradients(grad_kv, grad_k_sum, k, v, feature_map, k_denom):
    """(grad_k, grad_v, grad_k_denom); a gradient of the state that is absent counts as zero."""
    b, h, _, d = k.shape
    grad_kv = k.new_zeros((b, h, d, v.shape[-1]), dtype=state_dtype(k)) if grad_kv is None else grad_kv
    grad_k_sum = k.new_zeros((b, h, d), dtype=state_dtype(k)) if grad_k_sum is None else grad_k_sum
    grad_k, grad_v, grad_kd = overload("_linear_attention_state_backward")(
        grad_kv, grad_k_sum, k, v, feature_map, k_denom
    )
    return grad_k, grad_v, grad_kd if k_denom is not None else None


def _backward_state(ctx, grad_kv, grad_k_sum):
    k, v, k_denom = ctx.saved_tensors
    if grad_kv is None and grad_k_sum is None:
        return None, None, None, None
    grad_k, grad_v, grad_kd = _state_gradients(grad_kv, grad_k_sum, k, v, ctx.feature_map, k_denom)
    return grad_k, grad_v, None, grad_kd


def _allocate_apply(q, kv, **_) -> Tensor:
    return empty_like_heads(q, kv.shape[-1])


def _launch_apply(kernel, out, q, kv, k_sum, count, feature_map, normalize, scale, eps, q_denom) -> None:
    inv_count = 1 / count
    scale = inv_count if scale is None else scale
    state = _as_state(kv, q), _as_state(k_sum, q)
    code = FEATURE_MAPS.index(feature_map)
    kernel(readable(q), _optional(q_denom), *state, code, normalize, scale, inv_count, eps, out)


def _save_apply(ctx, inputs, out) -> None:
    ctx.options = tuple(inputs[name] for name in ("count", "feature_map", "normalize", "scale", "eps"))
    ctx.save_for_backward(*(inputs[name] for name in ("q", "kv", "k_sum", "q_denom")))


def _backward_apply(ctx, grad_out):
    q, kv, k_sum, q_denom = ctx.saved_tensors
    grad_q, grad_qd, grad_kv, grad_k_sum = overload("_linear_attention_apply_backward")(
        grad_out, q, kv, k_sum, *ctx.options, q_denom
    )
    grads = grad_q, grad_kv.to(kv.dtype), grad_k_sum.to(k_sum.dtype)
    return *grads, None, None, None, None, None, grad_qd if q_denom is not None else None


def _allocate_apply_backward(q, kv, q_denom, **_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_qd = superfluous(q) if q_denom is None else empty_like_heads(q_denom, q.shape[-1])
    return empty_like_heads(q, q.shape[-1]), grad_qd, *_empty_state(q, kv.shape[-1])


def _launch_apply_backward(
    kernel, outputs, grad_out, q, kv, k_sum, count, feature_map, normalize, scale, eps, q_denom
) -> None:
    grad_q, grad_qd, grad_kv, grad_k_sum = outputs
    inv_count = 1 / count
    scale = inv_count if scale is None else scale
    inputs = readable(grad_out), readable(q), _optional(q_denom), _as_state(kv, q), _as_state(k_sum, q)
    code = FEATURE_MAPS.index(feature_map)
    grad_qd = None if q_denom is None else grad_qd
    kernel(*inputs, code, normalize, scale, inv_count, eps, grad_q, grad_qd, grad_kv, grad_k_sum)


def _allocate_state_backward(k, v, k_denom, **_) -> tuple[Tensor, Tensor, Tensor]:
    grad_kd = superfluous(k) if k_denom is None else empty_like_heads(k_denom, k.shape[-1])
    return empty_like_heads(k, k.shape[-1]), empty_like_heads(v, v.shape[-1]), grad_kd


def _launch_state_backward(kernel, outputs, grad_kv, grad_k_sum, k, v, feature_map, k_denom) -> None:
    grad_k, grad_v, grad_kd = outputs
    inputs = _as_state(grad_kv, k), _as_state(grad_k_sum, k), readable(k), readable(v), _optional(k_denom)
    kernel(*inputs, FEATURE_MAPS.index(feature_map), grad_k, grad_v, None if k_denom is None else grad_kd)


# FLOPs: see linattn.flops.


def _flops_forward(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    b, h, n, d = q_shape
    return 2 * b * h * (n + k_shape[2]) * d * v_shape[-1]


def _flops_state(k_shape, v_shape, *args, **kwargs) -> int:
    b, h, m, d = k_shape
    return 2 * b * h * m * d * v_shape[-1]


def _flops_apply(q_shape, kv_shape, *args, **kwargs) -> int:
    b, h, n, d = q_shape
    return 2 * b * h * n * d * kv_shape[-1]


def _flops_apply_backward(grad_shape, q_shape, kv_shape, *args, **kwargs) -> int:
    return 2 * _flops_apply(q_shape, kv_shape)


def _flops_state_backward(grad_kv_shape, grad_k_sum_shape, k_shape, v_shape, *args, **kwargs) -> int:
    return 2 * _flops_state(k_shape, v_shape)


_OPTIONS = 'str feature_map="elu1", bool normalize=True, float? scale=None, float eps=1e-4, Tensor? q_denom=None'

registration.register(
    registration.Op(
        schema="linear_attention_state(Tensor k, Tensor v, str feature_map='elu1', Tensor? k_denom=None)"
        " -> (Tensor kv, Tensor k_sum)",
        check=_check_state,
        allocate=_allocate_state,
        launch=_launch_state,
        kernel=_state_kernel,
        selector="k",
        save=_save_state,
        backward=_backward_state,
        cast=("k", "v", "k_denom"),
        flops=_flops_state,
    )
)
registration.register(
    registration.Op(
        schema=f"linear_attention_apply(Tensor q, Tensor kv, Tensor k_sum, SymInt count, {_OPTIONS}) -> Tensor",
        check=_check_apply,
        allocate=_allocate_apply,
        launch=_launch_apply,
        kernel=_apply_kernel,
        selector="q",
        save=_save_apply,
        backward=_backward_apply,
        cast=("q", "q_denom"),
        flops=_flops_apply,
    )
)
registration.register(
    registration.Op(
        schema=f"_linear_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}, Tensor? k_denom=None, "
        "bool keep_state=False) -> (Tensor out, Tensor kv, Tensor k_sum)",
        check=_check_forward,
        allocate=_allocate_forward,
        launch=_launch_forward,
        kernel=_forward_kernel,
        selector="q",
        save=_save_forward,
        backward=_backward_forward,
        flops=_flops_forward,
    )
)
registration.register(
    registration.Op(
        schema="_linear_attention_apply_backward(Tensor grad_out, Tensor q, Tensor kv, Tensor k_sum, SymInt count, "
        "str feature_map, bool normalize, float? scale, float eps, Tensor? q_denom) "
        "-> (Tensor grad_q, Tensor grad_q_denom, Tensor grad_kv, Tensor grad_k_sum)",
        check=_check_apply_backward,
        allocate=_allocate_apply_backward,
        launch=_launch_apply_backward,
        kernel=_apply_backward_kernel,
        selector="q",
        flops=_flops_apply_backward,
    )
)
registration.register(
    registration.Op(
        schema="_linear_attention_state_backward(Tensor grad_kv, Tensor grad_k_sum, Tensor k, Tensor v, "
        "str feature_map, Tensor? k_denom) -> (Tensor grad_k, Tensor grad_v, Tensor grad_k_denom)",
        check=_check_state_backward,
        allocate=_allocate_state_backward,
        launch=_launch_state_backward,
        kernel=_state_backward_kernel,
        selector="k",
        flops=_flops_state_backward,
    )
)


def _composite(q, k, v, feature_map="elu1", normalize=True, scale=None, eps=1e-4, q_denom=None, k_denom=None):
    # Keeping the state saves the backward pass a reading of k and v; without a backward it would only cost.
    tensors = (q, k, v, q_denom, k_denom)
    keep_state = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    arguments = (q, k, v, feature_map, normalize, scale, eps, q_denom, k_denom, keep_state)
    return overload("_linear_attention")(*arguments)[0]


registration.register_composite(
    registration.Composite(
        schema=f"linear_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}, Tensor? k_denom=None) -> Tensor",
        body=_composite,
        cast=("q", "k", "v", "q_denom", "k_denom"),
    )
)


# ------------------------------------------------------------------------------------------------- Python front


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu1",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-4,
    q_denom: Tensor | None = None,
    k_denom: Tensor | None = None,
) -> Tensor:
    r"""Bidirectional linear attention.

    .. math::
        out_i = \frac{\phi(q_i)\,\bigl(s \sum_j \phi(k_j)^T v_j\bigr)}
                     {\phi(q_i) \cdot \frac1M \sum_j \phi(k_j) + \epsilon}

    with :math:`s` = `scale`. There is no softmax and no :math:`1/\sqrt D`; `scale` multiplies the numerator only.
    The cost is linear in N and M: no N x M matrix exists at any time.

    Args:
        q: queries (B, H, N, D), N >= 0. Any strides; a head dim of stride 1 is read in place, so the (B, N, H, D)
            tensors of diffusers come in as `x.transpose(1, 2)` at no cost.
        k: keys (B, H, M, D), M >= 1.
        v: values (B, H, M, E).
        feature_map: phi, "elu1" (t + 1 if t > 0 else exp t), "relu" or "identity"; evaluated in float32.
        normalize: False leaves out the division.
        scale: factor of the numerator; 1 / M unless it is given.
        eps: added to the mean form of the denominator, as LinFusion does. A model that adds it to the sum form
            passes eps / M.
        q_denom: (B, H, N, D), takes the place of q in the denominator; phi is applied to it as well. Models that
            rotate in the numerator only pass mapped tensors with feature_map="identity": rotated as q and k,
            unrotated as q_denom and k_denom.
        k_denom: (B, H, M, D), likewise for k.

    D and E are in 1..256. q, k, v and the `*_denom` share one dtype of float32, float16, bfloat16 (float64 runs as
    reference math); under autocast they are cast to its type. Sums are accumulated in float32.

    Returns:
        (B, H, N, E) in the dtype of q, dense in q's stride order with the head dim innermost, so that flattening it
        back to (B, N, H * E) is a view wherever q came from such a tensor.

    Raises:
        ValueError: a wrong rank or size, mixed devices, a head dim out of range, an unknown feature map, or a forced
            backend that cannot run; TypeError: an unsupported dtype or mixed dtypes.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, section 3.2 (phi = elu + 1); Liu et al.,
    "LinFusion", 2024, section 3.3 (normalisation, eps).
    """
    return overload("linear_attention")(q, k, v, feature_map, normalize, scale, eps, q_denom, k_denom)


def linear_attention_state(
    k: Tensor, v: Tensor, *, feature_map: str = "elu1", k_denom: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""The keys' half of :func:`linear_attention`: all that queries need to know of k and v.

    .. math:: kv = \sum_j \phi(k_j)^T v_j, \qquad k\_sum = \sum_j \phi(k^{denom}_j)

    States of disjoint sets of keys add up: sum the states of shards, strips or ranks (and their counts), then call
    :func:`linear_attention_apply`.

    Args:
        k: keys (B, H, M, D), M >= 1.
        v: values (B, H, M, E).
        feature_map, k_denom: as in :func:`linear_attention`.

    Returns:
        kv (B, H, D, E) and k_sum (B, H, D), float32 (float64 for float64 inputs), contiguous. Both are differentiable.

    Raises: as :func:`linear_attention`.
    """
    return overload("linear_attention_state")(k, v, feature_map, k_denom)


def linear_attention_apply(
    q: Tensor,
    kv: Tensor,
    k_sum: Tensor,
    count: int,
    *,
    feature_map: str = "elu1",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-4,
    q_denom: Tensor | None = None,
) -> Tensor:
    r"""The queries' half of :func:`linear_attention`.

    .. math:: out_i = \frac{\phi(q_i)\,(s\,kv)}{\phi(q_i) \cdot k\_sum / count + \epsilon}

    Args:
        q: queries (B, H, N, D), N >= 0.
        kv: (B, H, D, E), any floating dtype; computed with in float32 and never cast by autocast.
        k_sum: (B, H, D), likewise.
        count: number of keys that went into kv and k_sum, over all shards, >= 1.
        scale: factor of the numerator; 1 / count unless it is given.
        feature_map, normalize, eps, q_denom: as in :func:`linear_attention`.

    Returns: (B, H, N, E) as :func:`linear_attention`.

    Raises: as :func:`linear_attention`, and ValueError for count < 1.
    """
    return overload("linear_attention_apply")(q, kv, k_sum, count, feature_map, normalize, scale, eps, q_denom)
