"""Family B: softmax attention over a two-dimensional window, with text and pooled keys.

    out_i = sum_j exp(scale q_i . k_j - lse_i) v_j,      lse_i = log sum_j exp(scale q_i . k_j),      j over what i sees

Who sees whom is arithmetic on rows and columns (linattn.geometry), never a mask. Both results are differentiable, and
attention over disjoint sets of keys is merged by lse. `pool_tokens` makes the pooled keys and values. The formulas of
the backward pass are derived in docs/window_attention.md.
"""

from __future__ import annotations

import torch

from .. import geometry, reference
from . import checks, registration
from .registration import empty_like_heads, overload, readable, state_dtype, superfluous

Tensor = torch.Tensor

HEAD_DIMS = range(8, 257)

__all__ = ["pool_tokens", "window_attention"]


# ------------------------------------------------------------------------------------------------- checks


def _check_grid(op: str, height: int, width: int) -> None:
    checks.at_least(op, "height", height, 0)
    checks.at_least(op, "width", width, 0)


def _check_forward(
    q, k, v, height, width, radius, text_length, pooled_k, pooled_v, scale, text_first, q_row, q_text_length
) -> None:
    op = "window_attention"
    checks.rank(op, "q", q, "B, H, Nq, D")
    checks.head_dim(op, "q", q, HEAD_DIMS)
    _check_grid(op, height, width)
    checks.at_least(op, "radius", radius, 1)
    checks.at_least(op, "text_length", text_length, 0)
    checks.at_least(op, "q_row", q_row, 0)
    b, h, n, d = q.shape
    checks.shape(op, "k", k, (b, h, text_length + height * width, d), "B, H, text_length + height * width, D")
    checks.shape(op, "v", v, k.shape, "B, H, text_length + height * width, D")
    _check_queries(op, n, height, width, q_row, text_length if q_text_length is None else q_text_length)
    if (pooled_k is None) != (pooled_v is None):
        given, missing = ("pooled_v", "pooled_k") if pooled_k is None else ("pooled_k", "pooled_v")
        raise ValueError(f"{op}: {missing} must be given with {given}, got {missing}=None")
    if pooled_k is not None:
        checks.shape(op, "pooled_k", pooled_k, (b, h, None, d), "B, H, P, D")
        checks.shape(op, "pooled_v", pooled_v, pooled_k.shape, "B, H, P, D")
    checks.same_kind(op, {"q": q, "k": k, "v": v, "pooled_k": pooled_k, "pooled_v": pooled_v}, like="q")


def _check_queries(op: str, n: int, height: int, width: int, q_row: int, q_text_length: int) -> None:
    checks.at_least(op, "q_text_length", q_text_length, 0)
    if n < q_text_length:
        raise ValueError(f"{op}: q must hold at least its q_text_length = {q_text_length} text queries, got Nq = {n}")
    image = n - q_text_length
    rows = image // width if width > 0 else 0
    if image != rows * width or q_row + rows > height:
        raise ValueError(
            f"{op}: q must hold Nq = q_text_length + rows * width = {q_text_length} + rows * {width} queries with "
            f"q_row + rows <= height, q_row = {q_row}, height = {height}; got Nq = {n}"
        )


def _check_backward(grad_out, grad_lse, out, lse, **arguments) -> None:
    op, q = "window_attention_backward", arguments["q"]
    _check_forward(**arguments)
    checks.shape(op, "grad_out", grad_out, q.shape, "B, H, Nq, D")
    checks.shape(op, "out", out, q.shape, "B, H, Nq, D")
    checks.shape(op, "lse", lse, q.shape[:3], "B, H, Nq")
    if grad_lse is not None:
        checks.shape(op, "grad_lse", grad_lse, q.shape[:3], "B, H, Nq")
        checks.same_device(op, "grad_lse", grad_lse, "q", q)
    checks.same_device(op, "lse", lse, "q", q)
    checks.same_kind(op, {"grad_out": grad_out, "out": out, "q": q}, like="q")


def _check_pool(x, weight, height, width) -> None:
    op = "pool_tokens"
    checks.rank(op, "x", x, "B, H, height * width, D")
    checks.head_dim(op, "x", x, HEAD_DIMS)
    _check_grid(op, height, width)
    b, h, _, d = x.shape
    checks.shape(op, "x", x, (b, h, height * width, d), "B, H, height * width, D")
    checks.rank(op, "weight", weight, "f, f")
    checks.shape(op, "weight", weight, (weight.shape[0], weight.shape[0]), "f, f")
    if weight.shape[0] < 1:
        raise ValueError(f"{op}: weight must have shape (f, f) with f >= 1, got {tuple(weight.shape)}")
    checks.same_kind(op, {"x": x}, like="x")
    checks.floating(op, "weight", weight)
    checks.same_device(op, "weight", weight, "x", x)


def _check_pool_backward(grad_out, x, weight, height, width) -> None:
    _check_pool(x, weight, height, width)
    b, h, _, d = x.shape
    rows, columns = geometry.pooled_size(height, width, weight.shape[0])
    checks.shape("pool_tokens_backward", "grad_out", grad_out, (b, h, rows * columns, d), "B, H, P, D")
    checks.same_kind("pool_tokens_backward", {"grad_out": grad_out, "x": x}, like="x")


# ------------------------------------------------------------------------------------------------- kernel ops


def _reference_forward(
    q, k, v, pooled_k, pooled_v, height, width, radius, text_length, text_first, q_row, q_text_length, scale, out, lse
) -> None:
    results = reference.window_attention(
        q, k, v, height, width, radius, text_length, pooled_k, pooled_v, scale, text_first, q_row, q_text_length
    )
    for output, x in zip((out, lse), results, strict=True):
        output.copy_(x)


def _reference_backward(*arguments) -> None:
    inputs, outputs = arguments[:-5], arguments[-5:]
    for output, x in zip(outputs, reference.window_attention_backward(*inputs), strict=True):
        if output is not None:
            output.copy_(x)


def _reference_pool(x, weight, height, width, out) -> None:
    out.copy_(reference.pool_tokens(x, weight, height, width))


def _reference_pool_backward(grad_out, x, weight, height, width, grad_x, grad_weight) -> None:
    results = reference.pool_tokens_backward(grad_out, x, weight, height, width)
    for output, x in zip((grad_x, grad_weight), results, strict=True):
        output.copy_(x)


_TRITON = "triton_kernels.window_attention"
_GEOMETRY = (
    "int height, int width, int radius, int text_length, bool text_first, int q_row, int q_text_length, float scale"
)

_forward_kernel = registration.define_kernels(
    "window_attention",
    f"Tensor q, Tensor k, Tensor v, Tensor? pooled_k, Tensor? pooled_v, {_GEOMETRY}, Tensor(a!) out, Tensor(b!) lse",
    _reference_forward,
    registration.lazy(_TRITON, "forward"),
)
_backward_kernel = registration.define_kernels(
    "window_attention_backward",
    "Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? pooled_k, Tensor? pooled_v, Tensor out, "
    f"Tensor lse, {_GEOMETRY}, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, Tensor(d!)? grad_pooled_k, "
    "Tensor(e!)? grad_pooled_v",
    _reference_backward,
    registration.lazy(_TRITON, "backward"),
)
_pool_kernel = registration.define_kernels(
    "pool_tokens",
    "Tensor x, Tensor weight, int height, int width, Tensor(a!) out",
    _reference_pool,
    registration.lazy(_TRITON, "pool"),
)
_pool_backward_kernel = registration.define_kernels(
    "pool_tokens_backward",
    "Tensor grad_out, Tensor x, Tensor weight, int height, int width, Tensor(a!) grad_x, Tensor(b!) grad_weight",
    _reference_pool_backward,
    registration.lazy(_TRITON, "pool_backward"),
)


# ------------------------------------------------------------------------------------------------- dispatched ops


def _present(x: Tensor | None) -> bool:
    """Pooled keys of which there are none are no pooled keys: kernels need not know that case."""
    return x is not None and x.shape[2] > 0


def _kernel_geometry(q, height, width, radius, text_length, scale, text_first, q_row, q_text_length) -> tuple:
    """The arguments that describe the pattern, in the order of the kernels and with their defaults filled in.

    A radius beyond the grid becomes one that just covers it, so that its square fits 64 bits in every kernel.
    """
    radius = geometry.sufficient_radius(height, width, radius)
    q_text_length = text_length if q_text_length is None else q_text_length
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return height, width, radius, text_length, text_first, q_row, q_text_length, scale


def _allocate_forward(q, **_) -> tuple[Tensor, Tensor]:
    return empty_like_heads(q, q.shape[-1]), q.new_empty(q.shape[:3], dtype=state_dtype(q))


def _launch_forward(kernel, outputs, q, k, v, pooled_k, pooled_v, **options) -> None:
    pooled = (readable(pooled_k), readable(pooled_v)) if _present(pooled_k) else (None, None)
    kernel(readable(q), readable(k), readable(v), *pooled, *_kernel_geometry(q, **options), *outputs)


_OPTIONS = ("height", "width", "radius", "text_length", "scale", "text_first", "q_row", "q_text_length")


def _save_forward(ctx, inputs, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = tuple(inputs[name] for name in _OPTIONS)
    ctx.save_for_backward(*(inputs[name] for name in ("q", "k", "v", "pooled_k", "pooled_v")), *outputs)


def _backward_forward(ctx, grad_out, grad_lse):
    q, k, v, pooled_k, pooled_v, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 13
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_q, grad_k, grad_v, grad_pk, grad_pv = overload("_window_attention_backward")(
        grad_out, grad_lse, q, k, v, pooled_k, pooled_v, out, lse, *ctx.options
    )
    if pooled_k is None:
        grad_pk = grad_pv = None
    return grad_q, grad_k, grad_v, None, None, None, None, grad_pk, grad_pv, None, None, None, None


def _allocate_backward(q, k, v, pooled_k, pooled_v, **_) -> tuple[Tensor, ...]:
    return tuple(
        superfluous(q) if x is None else empty_like_heads(x, x.shape[-1]) for x in (q, k, v, pooled_k, pooled_v)
    )


def _launch_backward(kernel, outputs, grad_out, grad_lse, q, k, v, pooled_k, pooled_v, out, lse, **options) -> None:
    grad_q, grad_k, grad_v, *grad_pooled = outputs
    pooled = (readable(pooled_k), readable(pooled_v)) if _present(pooled_k) else (None, None)
    grad_pooled = grad_pooled if _present(pooled_k) else (None, None)
    grad_lse = None if grad_lse is None else grad_lse.to(lse.dtype).contiguous()
    inputs = readable(grad_out), grad_lse, readable(q), readable(k), readable(v), *pooled, readable(out)
    geometric = _kernel_geometry(q, **options)
    kernel(*inputs, lse.contiguous(), *geometric, grad_q, grad_k, grad_v, *grad_pooled)


def _allocate_pool(x, weight, height, width) -> Tensor:
    rows, columns = geometry.pooled_size(height, width, weight.shape[0])
    return empty_like_heads(x, x.shape[-1], rows * columns)


def _launch_pool(kernel, out, x, weight, height, width) -> None:
    kernel(readable(x), _as_weight(weight, x), height, width, out)


def _as_weight(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(state_dtype(x)).contiguous()


def _save_pool(ctx, inputs, out) -> None:
    ctx.grid = inputs["height"], inputs["width"]
    ctx.save_for_backward(inputs["x"], inputs["weight"])


def _backward_pool(ctx, grad_out):
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = overload("_pool_tokens_backward")(grad_out, x, weight, *ctx.grid)
    return grad_x, grad_weight.to(weight.dtype), None, None


def _allocate_pool_backward(x, weight, **_) -> tuple[Tensor, Tensor]:
    return empty_like_heads(x, x.shape[-1]), weight.new_empty(weight.shape, dtype=state_dtype(x))


def _launch_pool_backward(kernel, outputs, grad_out, x, weight, height, width) -> None:
    kernel(readable(grad_out), readable(x), _as_weight(weight, x), height, width, *outputs)


# FLOPs: see linattn.flops. Two products per pair that attends, five on the way back; what tiles waste is not counted.


def _flops_forward(
    q_shape,
    k_shape,
    v_shape,
    height,
    width,
    radius,
    text_length=0,
    pooled_k_shape=None,
    pooled_v_shape=None,
    scale=None,
    text_first=True,
    q_row=0,
    q_text_length=None,
    **_,
) -> int:
    b, h, n, d = q_shape
    q_text_length = text_length if q_text_length is None else q_text_length
    rows = (n - q_text_length) // width if width else 0
    pooled = 0 if pooled_k_shape is None else pooled_k_shape[2]
    pairs = geometry.pairs(height, width, radius, text_length, pooled, q_row, rows, q_text_length)
    return 4 * b * h * d * pairs


def _flops_backward(
    grad_out_shape, grad_lse_shape, q_shape, k_shape, v_shape, pooled_k_shape, pooled_v_shape, out, lse, *options, **_
) -> int:
    shapes = {"q_shape": q_shape, "k_shape": k_shape, "v_shape": v_shape, "pooled_k_shape": pooled_k_shape}
    return _flops_forward(**shapes, **dict(zip(_OPTIONS, options, strict=True))) // 2 * 5


def _flops_pool(x_shape, weight_shape, height, width, **_) -> int:
    b, h, _, d = x_shape
    rows, columns = geometry.pooled_size(height, width, weight_shape[0])
    return 2 * b * h * d * rows * columns * weight_shape[0] ** 2


def _flops_pool_backward(grad_out_shape, x_shape, weight_shape, height, width, **_) -> int:
    return 2 * _flops_pool(x_shape, weight_shape, height, width)


registration.register(
    registration.Op(
        schema="window_attention(Tensor q, Tensor k, Tensor v, SymInt height, SymInt width, SymInt radius, "
        "SymInt text_length=0, Tensor? pooled_k=None, Tensor? pooled_v=None, float? scale=None, bool text_first=True, "
        "SymInt q_row=0, SymInt? q_text_length=None) -> (Tensor out, Tensor lse)",
        check=_check_forward,
        allocate=_allocate_forward,
        launch=_launch_forward,
        kernel=_forward_kernel,
        selector="q",
        save=_save_forward,
        backward=_backward_forward,
        cast=("q", "k", "v", "pooled_k", "pooled_v"),
        flops=_flops_forward,
    )
)
registration.register(
    registration.Op(
        schema="_window_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
        "Tensor? pooled_k, Tensor? pooled_v, Tensor out, Tensor lse, SymInt height, SymInt width, SymInt radius, "
        "SymInt text_length, float? scale, bool text_first, SymInt q_row, SymInt? q_text_length) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_pooled_k, Tensor grad_pooled_v)",
        check=_check_backward,
        allocate=_allocate_backward,
        launch=_launch_backward,
        kernel=_backward_kernel,
        selector="q",
        flops=_flops_backward,
    )
)
registration.register(
    registration.Op(
        schema="pool_tokens(Tensor x, Tensor weight, SymInt height, SymInt width) -> Tensor",
        check=_check_pool,
        allocate=_allocate_pool,
        launch=_launch_pool,
        kernel=_pool_kernel,
        selector="x",
        save=_save_pool,
        backward=_backward_pool,
        flops=_flops_pool,
        unbatched=("weight",),
    )
)
registration.register(
    registration.Op(
        schema="_pool_tokens_backward(Tensor grad_out, Tensor x, Tensor weight, SymInt height, SymInt width) "
        "-> (Tensor grad_x, Tensor grad_weight)",
        check=_check_pool_backward,
        allocate=_allocate_pool_backward,
        launch=_launch_pool_backward,
        kernel=_pool_backward_kernel,
        selector="x",
        flops=_flops_pool_backward,
        unbatched=("weight", "grad_weight"),
    )
)


# ------------------------------------------------------------------------------------------------- Python front


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height: int,
    width: int,
    radius: int,
    *,
    text_length: int = 0,
    pooled_k: Tensor | None = None,
    pooled_v: Tensor | None = None,
    scale: float | None = None,
    text_first: bool = True,
    q_row: int = 0,
    q_text_length: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention over a two-dimensional window, with text and pooled keys.

    .. math::
        out_i = \sum_{j \in S(i)} e^{\,s\, q_i \cdot k_j - lse_i}\, v_j, \qquad
        lse_i = \log \sum_{j \in S(i)} e^{\,s\, q_i \cdot k_j}

    with :math:`s` = `scale`, and S(i) the keys that query i sees:

    * an image query at row y, column x: all text keys; the image keys (y', x') with
      :math:`(y-y')^2 + (x-x')^2 < radius^2`; all pooled keys. At a border the disk is cut, not shifted.
    * a text query: all text keys and all image keys, no pooled ones.

    The pattern is arithmetic on these arguments: no mask exists, and a new size, radius or text length costs nothing.

    Args:
        q: queries (B, H, Nq, D), Nq = q_text_length + rows * width: text queries and the image queries of `rows` rows
            of the grid, in raster order, ordered as the keys are. Any strides; a head dim of stride 1 is read in place.
        k: keys (B, H, text_length + height * width, D): [text | image in raster order].
        v: values, shaped as k.
        height, width: the grid of image keys, in tokens; any numbers, 0 included (then only text is attended).
        radius: of the window, in tokens, >= 1. The inequality is strict: 1 is the token itself and nothing else.
        text_length: how many of the keys are text.
        pooled_k, pooled_v: (B, H, P, D), any P >= 0, both or neither: see :func:`pool_tokens`.
        scale: factor of the scores; D ** -0.5 unless it is given.
        text_first: False if the order of q, k and v is [image | text], as SD3 has it.
        q_row: the grid row of the first image query. Together with the number of queries this says which strip of the
            image q holds; a strip sees what the same rows see in the whole image, as far as k holds it.
        q_text_length: how many of the queries are text; text_length unless it is given.
        return_lse: return (out, lse) instead of out.

    q, k, v and the pooled ones share one dtype of float32, float16, bfloat16 (float64 runs as reference math); under
    autocast they are cast to its type. D is in 8..256. Scores and sums are float32.

    Returns:
        out (B, H, Nq, D) in the dtype of q, dense in q's stride order with the head dim innermost, and, if asked for,
        lse (B, H, Nq), float32 (float64 for float64), the natural logarithm of the sum. Both are differentiable:
        results over disjoint sets of keys merge as softmax(lse)-weighted sums. A query that sees no key has out 0 and
        lse -inf.

    Raises:
        ValueError: a wrong rank or size, numbers of tokens that do not fit the grid, a size out of range, one pooled
            tensor without the other, mixed devices, or a forced backend that cannot run; TypeError: an unsupported
            dtype or mixed dtypes.

    Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", 2024, section 3.2.
    """
    out, lse = overload("window_attention")(
        q, k, v, height, width, radius, text_length, pooled_k, pooled_v, scale, text_first, q_row, q_text_length
    )
    return (out, lse) if return_lse else out


def pool_tokens(x: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    r"""Pooled tokens of a grid: the weighted sum of each patch of f x f tokens.

    .. math:: out_{y,x} = \sum_{i,j < f} weight_{ij}\; x_{\min(fy+i,\,height-1),\ \min(fx+j,\,width-1)}

    A patch that runs over the edge reads the nearest token again, so height and width need not be multiples of f.
    With weight = 1 / f^2 this is the mean.

    Args:
        x: tokens (B, H, height * width, D) of an image in raster order, without text; D in 8..256.
        weight: (f, f), f >= 1, one for all heads; any floating dtype, computed with in float32, and never cast by
            autocast. Its gradient has its dtype.
        height, width: of the grid.

    Returns:
        (B, H, ceil(height / f) * ceil(width / f), D) in the dtype of x, in raster order, dense in x's stride order.

    Raises:
        ValueError: a wrong rank or size, mixed devices; TypeError: an unsupported dtype.

    Source: Liu et al., "CLEAR", 2024, section 3.2 (there for grids that f divides).
    """
    return overload("pool_tokens")(x, weight, height, width)
