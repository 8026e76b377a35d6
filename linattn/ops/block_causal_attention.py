"""Family C: softmax attention of an image block over itself and its neighbours to the left and above.

    out_i = sum_{s, j} exp(scale q_i . (k_j + e_s) - lse_i) v_j,  over the four slots s and the keys j of slot s's block

The blocks are arithmetic on rows and columns (linattn.geometry): keys are read where they lie, never concatenated, and
an embedding enters the scores as one number per query and slot. Both results are differentiable. The formulas of the
backward pass, and the identity by which a block that fills several slots is attended once, are derived in
docs/block_causal_attention.md.
"""

from __future__ import annotations

import torch

from .. import geometry, reference
from . import checks, registration
from .registration import empty_like_heads, overload, readable, state_dtype, superfluous

Tensor = torch.Tensor

HEAD_DIMS = range(8, 257)
EDGES = ("clamp", "drop")

__all__ = ["block_causal_attention"]


# ------------------------------------------------------------------------------------------------- checks


def _check_forward(q, k, v, height, width, block, slot_embed, scale, edge, q_row) -> None:
    op = "block_causal_attention"
    checks.rank(op, "q", q, "B, H, Nq, D")
    checks.head_dim(op, "q", q, HEAD_DIMS)
    checks.choice(op, "edge", edge, EDGES)
    checks.at_least(op, "block", block, 1)
    for name, size in (("height", height), ("width", width), ("q_row", q_row)):
        checks.at_least(op, name, size, 0)
        if size % block != 0:
            raise ValueError(f"{op}: {name} must be a multiple of block = {block}, got {size}")
    b, h, n, d = q.shape
    checks.shape(op, "k", k, (b, h, height * width, d), "B, H, height * width, D")
    checks.shape(op, "v", v, k.shape, "B, H, height * width, D")
    rows = n // width if width > 0 else 0
    if n != rows * width or rows % block != 0 or q_row + rows > height:
        raise ValueError(
            f"{op}: q must hold Nq = rows * width = rows * {width} queries with rows a multiple of block = {block} and "
            f"q_row + rows <= height, q_row = {q_row}, height = {height}; got Nq = {n}"
        )
    checks.same_kind(op, {"q": q, "k": k, "v": v}, like="q")
    if slot_embed is not None:
        checks.shape(op, "slot_embed", slot_embed, (len(geometry.SLOTS), h, d), "4, H, D")
        checks.floating(op, "slot_embed", slot_embed)
        checks.same_device(op, "slot_embed", slot_embed, "q", q)


def _check_backward(grad_out, grad_lse, out, lse, **arguments) -> None:
    op, q = "block_causal_attention_backward", arguments["q"]
    _check_forward(**arguments)
    checks.shape(op, "grad_out", grad_out, q.shape, "B, H, Nq, D")
    checks.shape(op, "out", out, q.shape, "B, H, Nq, D")
    checks.shape(op, "lse", lse, q.shape[:3], "B, H, Nq")
    if grad_lse is not None:
        checks.shape(op, "grad_lse", grad_lse, q.shape[:3], "B, H, Nq")
        checks.same_device(op, "grad_lse", grad_lse, "q", q)
    checks.same_device(op, "lse", lse, "q", q)
    checks.same_kind(op, {"grad_out": grad_out, "out": out, "q": q}, like="q")


# ------------------------------------------------------------------------------------------------- kernel ops

# clamp: edge == "clamp". slot_embed and its gradient (4, H, D) are contiguous float32 (float64 for float64), lse
# (B, H, Nq) as well; the gradient of slot_embed is a sum over the batch.


def _edge(clamp: bool) -> str:
    return EDGES[0] if clamp else EDGES[1]


def _reference_forward(q, k, v, slot_embed, height, width, block, clamp, q_row, scale, out, lse) -> None:
    results = reference.block_causal_attention(q, k, v, height, width, block, slot_embed, scale, _edge(clamp), q_row)
    for output, x in zip((out, lse), results, strict=True):
        output.copy_(x)


def _reference_backward(*arguments) -> None:
    *inputs, clamp, q_row, scale = arguments[:-4]
    results = reference.block_causal_attention_backward(*inputs, _edge(clamp), q_row, scale)
    for output, x in zip(arguments[-4:], results, strict=True):
        if output is not None:
            output.copy_(x)


_TRITON = "triton_kernels.block_causal_attention"
_GEOMETRY = "int height, int width, int block, bool clamp, int q_row, float scale"

_forward_kernel = registration.define_kernels(
    "block_causal_attention",
    f"Tensor q, Tensor k, Tensor v, Tensor? slot_embed, {_GEOMETRY}, Tensor(a!) out, Tensor(b!) lse",
    _reference_forward,
    registration.lazy(_TRITON, "forward"),
)
_backward_kernel = registration.define_kernels(
    "block_causal_attention_backward",
    "Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? slot_embed, Tensor out, Tensor lse, "
    f"{_GEOMETRY}, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, Tensor(d!)? grad_slot_embed",
    _reference_backward,
    registration.lazy(_TRITON, "backward"),
)


# ------------------------------------------------------------------------------------------------- dispatched ops


def _kernel_geometry(q, height, width, block, scale, edge, q_row) -> tuple:
    """The arguments that describe the pattern, in the order of the kernels and with their defaults filled in."""
    return height, width, block, edge == "clamp", q_row, q.shape[-1] ** -0.5 if scale is None else scale


def _kernel_embed(slot_embed: Tensor | None, q: Tensor) -> Tensor | None:
    return None if slot_embed is None else slot_embed.to(state_dtype(q)).contiguous()


def _allocate_forward(q, **_) -> tuple[Tensor, Tensor]:
    return empty_like_heads(q, q.shape[-1]), q.new_empty(q.shape[:3], dtype=state_dtype(q))


def _launch_forward(kernel, outputs, q, k, v, slot_embed, **options) -> None:
    embed = _kernel_embed(slot_embed, q)
    kernel(readable(q), readable(k), readable(v), embed, *_kernel_geometry(q, **options), *outputs)


_OPTIONS = ("height", "width", "block", "scale", "edge", "q_row")


def _save_forward(ctx, inputs, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = tuple(inputs[name] for name in _OPTIONS)
    ctx.save_for_backward(*(inputs[name] for name in ("q", "k", "v", "slot_embed")), *outputs)


def _backward_forward(ctx, grad_out, grad_lse):
    q, k, v, slot_embed, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_q, grad_k, grad_v, grad_embed = overload("_block_causal_attention_backward")(
        grad_out, grad_lse, q, k, v, slot_embed, out, lse, *ctx.options
    )
    grad_embed = None if slot_embed is None else grad_embed.to(slot_embed.dtype)
    return grad_q, grad_k, grad_v, None, None, None, grad_embed, None, None, None


def _allocate_backward(q, k, v, slot_embed, **_) -> tuple[Tensor, ...]:
    grads = (empty_like_heads(x, x.shape[-1]) for x in (q, k, v))
    if slot_embed is None:
        return *grads, superfluous(q)
    return *grads, slot_embed.new_empty(slot_embed.shape, dtype=state_dtype(q))


def _launch_backward(kernel, outputs, grad_out, grad_lse, q, k, v, slot_embed, out, lse, **options) -> None:
    *grads, grad_embed = outputs
    grad_embed = None if slot_embed is None else grad_embed
    grad_lse = None if grad_lse is None else grad_lse.to(lse.dtype).contiguous()
    inputs = readable(grad_out), grad_lse, readable(q), readable(k), readable(v), _kernel_embed(slot_embed, q)
    kernel(*inputs, readable(out), lse.contiguous(), *_kernel_geometry(q, **options), *grads, grad_embed)


# FLOPs: see linattn.flops. Two products per pair that attends, five on the way back; a block that fills several slots
# counts once, the products of queries and embeddings (2 / block^2 of the rest) do not count.


def _flops_forward(
    q_shape, k_shape, v_shape, height, width, block, slot_embed_shape=None, scale=None, edge="clamp", q_row=0, **_
) -> int:
    b, h, n, d = q_shape
    return 4 * b * h * d * geometry.block_pairs(height, width, block, q_row, n // width if width else 0)


def _flops_backward(
    grad_out_shape, grad_lse_shape, q_shape, k_shape, v_shape, slot_embed_shape, out, lse, *options, **_
) -> int:
    shapes = {"q_shape": q_shape, "k_shape": k_shape, "v_shape": v_shape}
    return _flops_forward(**shapes, **dict(zip(_OPTIONS, options, strict=True))) // 2 * 5


registration.register(
    registration.Op(
        schema="block_causal_attention(Tensor q, Tensor k, Tensor v, SymInt height, SymInt width, SymInt block, "
        'Tensor? slot_embed=None, float? scale=None, str edge="clamp", SymInt q_row=0) -> (Tensor out, Tensor lse)',
        check=_check_forward,
        allocate=_allocate_forward,
        launch=_launch_forward,
        kernel=_forward_kernel,
        selector="q",
        save=_save_forward,
        backward=_backward_forward,
        cast=("q", "k", "v"),
        flops=_flops_forward,
        unbatched=("slot_embed",),
    )
)
registration.register(
    registration.Op(
        schema="_block_causal_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
        "Tensor? slot_embed, Tensor out, Tensor lse, SymInt height, SymInt width, SymInt block, float? scale, "
        "str edge, SymInt q_row) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_slot_embed)",
        check=_check_backward,
        allocate=_allocate_backward,
        launch=_launch_backward,
        kernel=_backward_kernel,
        selector="q",
        flops=_flops_backward,
        unbatched=("slot_embed", "grad_slot_embed"),
    )
)


# ------------------------------------------------------------------------------------------------- Python front


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height: int,
    width: int,
    block: int,
    *,
    slot_embed: Tensor | None = None,
    scale: float | None = None,
    edge: str = "clamp",
    q_row: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of each block of an image over itself and the blocks to the top left, left and top.

    The grid of height x width tokens is cut into squares of block x block. A query of block (i, j) sees four slots,

    ====  ========  ==================
    slot  name      block
    ====  ========  ==================
    0     self      (i, j)
    1     top-left  (i - 1, j - 1)
    2     left      (i, j - 1)
    3     top       (i - 1, j)
    ====  ========  ==================

    and attends to all tokens of each, whose keys carry the embedding of the slot:

    .. math::
        out_i = \sum_{s} \sum_{j \in N_s(i)} e^{\,c\, q_i \cdot (k_j + e_s) - lse_i}\, v_j, \qquad
        lse_i = \log \sum_{s} \sum_{j \in N_s(i)} e^{\,c\, q_i \cdot (k_j + e_s)}

    with :math:`c` = `scale` and :math:`e_s` = slot_embed[s] of the head (0 without slot_embed). Information flows from
    the top left to the bottom right only, one block per layer, so that an image can be made strip by strip.

    Args:
        q: queries (B, H, Nq, D), Nq = rows * width: the tokens of `rows` rows of the grid, in raster order; rows is a
            multiple of block. Any strides; a head dim of stride 1 is read in place.
        k: keys (B, H, height * width, D) in raster order.
        v: values, shaped as k.
        height, width: the grid of keys, in tokens; multiples of block, 0 included.
        block: tokens along one side of a block, >= 1.
        slot_embed: (4, H, D), in the order of the table, or None; any floating dtype, computed with in float32, and
            never cast by autocast. Its gradient has its dtype.
        scale: factor of the scores; D ** -0.5 unless it is given.
        edge: what fills a slot whose block lies outside the grid. "clamp": the nearest block, so that row or column -1
            becomes 0; its keys are then attended again with the embedding of that slot, and lse counts them again.
            "drop": nothing. The edge is that of the grid of keys that is passed in.
        q_row: the grid row of the first query, a multiple of block. A strip sees what the same rows see in the whole
            image if k and v hold its own rows and the row of blocks above.
        return_lse: return (out, lse) instead of out.

    q, k and v share one dtype of float32, float16, bfloat16 (float64 runs as reference math); under autocast they are
    cast to its type. D is in 8..256. Scores and sums are float32.

    Returns:
        out (B, H, Nq, D) in the dtype of q, dense in q's stride order with the head dim innermost, and, if asked for,
        lse (B, H, Nq), float32 (float64 for float64), the natural logarithm of the sum. Both are differentiable:
        results over disjoint sets of keys merge as softmax(lse)-weighted sums.

    Raises:
        ValueError: a wrong rank or size, sizes that are no multiples of block, queries that do not lie in the grid, an
            unknown edge, mixed devices, or a forced backend that cannot run; TypeError: an unsupported dtype or mixed
            dtypes.

    Source: Yang et al., "Inf-DiT: Upsampling Any-Resolution Image with Memory-Efficient Diffusion Transformer", 2024,
    section "Unidirectional Block Attention".
    """
    out, lse = overload("block_causal_attention")(q, k, v, height, width, block, slot_embed, scale, edge, q_row)
    return (out, lse) if return_lse else out
