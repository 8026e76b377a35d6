"""Block-causal attention against what it replaces, at the layer sizes of Inf-DiT.

Contenders, all in one run:
  sdpa        what Inf-DiT does: tokens are sorted into blocks, the keys of the four slots put side by side, embeddings
              added, torch's scaled_dot_product_attention run on four times as many keys, and the result put back in
              raster order. All of it is timed: there is no model without it
  flex        compiled flex_attention, tokens in the order of blocks, its best one (reordering is not timed), each key
              once; a score_mod adds one number per query and slot, which another compiled function computes (timed)
  linattn-*   torch.ops.linattn.block_causal_attention on each backend that runs here, tokens in raster order

All have slot embeddings and clamped edges, as the model has. Block masks are made beforehand and not timed;
flex_attention is compiled for the exact sizes, and has no backward on a CPU. Sizes: blocks of 32 x 32 tokens, square
grids (a token is 4 pixels: 128 x 128 tokens are a 512 x 512 image), heads of 80, 16 of them on a GPU and 4 on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import linattn
from linattn import backend, geometry

from .harness import figures, runner
from .harness.family import Case, Family
from .harness.measure import Contender, Skip
from .harness.roofline import Machine

BLOCK = 32
HEAD_DIM = 80
#: Tokens of one tile of flex_attention's mask.
TILE = {"cpu": 64, "cuda": 128}

# ---- cases ------------------------------------------------------------------------------------------------------


class Pattern(NamedTuple):
    """What a case's name says: the grid and the side of a block, in tokens."""

    height: int
    width: int
    block: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width} b{self.block}"

    @property
    def rows(self) -> int:
        """Rows of blocks."""
        return self.height // self.block

    @property
    def columns(self) -> int:
        return self.width // self.block


def pattern_of(case: Case) -> Pattern:
    """The pattern in the case's name; one of case.N tokens where the sizes were replaced by small ones."""
    pattern = Pattern(*map(int, re.fullmatch(r"(\d+)x(\d+) b(\d+)", case.name).groups()))
    return pattern if pattern.height * pattern.width == case.N else Pattern(8, case.N // 8, 8)


def _case(side: int, dtype: str, heads: int, **options: str) -> Case:
    return Case(str(Pattern(side, side, BLOCK)), 1, heads, side**2, side**2, HEAD_DIM, HEAD_DIM, dtype, **options)


def cases(device: torch.device, level: str) -> list[Case]:
    if level == "smoke":
        return [
            Case("8x12 b4", 1, 2, 96, 96, 16, 16, dtype, mode=mode)
            for dtype, mode in zip(("float32", "bfloat16"), ("forward", "forward+backward"), strict=True)
        ]
    return _cuda_cases(level) if device.type == "cuda" else _cpu_cases(level)


def _cpu_cases(level: str) -> list[Case]:
    both = ("float32", "bfloat16")
    if level == "quick":
        return [_case(64, dtype, 4) for dtype in both]
    listed = [_case(side, dtype, 4) for side in (128, 64, 256) for dtype in both]
    listed += [_case(side, dtype, 4, mode="forward+backward") for side in (64, 128) for dtype in both]
    if level == "full":
        listed += [_case(256, dtype, 4, mode="forward+backward") for dtype in both]
        listed += [_case(128, "float16", 4)]
        listed += [_case(128, dtype, 4, layout="BHND") for dtype in both]
    return listed


def _cuda_cases(level: str) -> list[Case]:
    def case(side, dtype="bfloat16", **options):
        return _case(side, dtype, 16, **options)

    if level == "quick":
        return [case(256), case(128)]
    listed = [case(side) for side in (256, 512, 128)]
    listed += [case(side, mode="forward+backward") for side in (256, 512, 128)]
    if level == "full":
        listed += [case(128, dtype, mode=mode) for dtype in ("float32", "float16") for mode in
                   ("forward", "forward+backward")]  # fmt: skip
    return listed


# ---- contenders -------------------------------------------------------------------------------------------------


def providers(device: torch.device) -> list[str]:
    return ["sdpa", "flex"] + [f"linattn-{name}" for name in our_backends(device)]


def our_backends(device: torch.device) -> list[str]:
    """Our backends that run on this device as users run it: not the reference, not Triton's interpreter."""
    names = [name for name in ("cuda", "triton", "cpu") if not (name == "triton" and device.type == "cpu")]
    return [name for name in names if backend.why_not("_block_causal_attention", name, device, torch.float32) is None]


def left_out(provider: str, case: Case, device: torch.device, level: str) -> str | None:
    if provider == "flex":
        if device.type == "cpu" and case.mode != "forward":
            return "flex_attention has no backward on a CPU"
        if level == "smoke":
            return "it compiles for longer than everything else takes"
    return None


def _inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, as (B, H, N, D) with the strides of the case's layout; slot_embed."""
    tensors = []
    for i in range(4):
        generator = torch.Generator(device).manual_seed(i)
        sizes = (case.B, case.H, case.N, case.D) if case.layout == "BHND" else (case.B, case.N, case.H, case.D)
        x = torch.randn(sizes, dtype=case.torch_dtype, device=device, generator=generator)
        tensors.append(x if case.layout == "BHND" else x.transpose(1, 2))
    generator = torch.Generator(device).manual_seed(4)
    tensors.append(torch.randn(len(geometry.SLOTS), case.H, case.D, device=device, generator=generator))
    return tensors


def by_blocks(x: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """(B, H, N, D) in raster order -> (B, rows of blocks, columns of blocks, H, block^2, D), copied at most once."""
    grid = x.unflatten(2, (pattern.rows, pattern.block, pattern.columns, pattern.block))
    return grid.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5)


def in_raster_order(x: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The way back, with the strides of (B, N, H, D)."""
    grid = x.unflatten(4, (pattern.block, pattern.block))
    return grid.permute(0, 1, 4, 2, 5, 3, 6).flatten(1, 4).transpose(1, 2)


def concatenated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_embed: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """SDPA of each block on the keys of its four slots, which are copied side by side."""

    def side_by_side(x):
        up = torch.cat([x[:, :1], x[:, :-1]], 1)
        left, corner = (torch.cat([y[:, :, :1], y[:, :, :-1]], 2) for y in (x, up))
        return torch.stack([x, corner, left, up], 4)  # (B, rows, columns, H, slot, block^2, D)

    q, k, v = (by_blocks(x, pattern) for x in (q, k, v))
    keys = side_by_side(k) + slot_embed.to(k.dtype).transpose(0, 1).unsqueeze(2)
    q, keys, values = (x.flatten(0, 2) for x in (q, keys.flatten(4, 5), side_by_side(v).flatten(4, 5)))
    out = F.scaled_dot_product_attention(q, keys, values)
    return in_raster_order(out.unflatten(0, (-1, pattern.rows, pattern.columns)), pattern)


def _flex(pattern: Pattern, device: torch.device) -> Callable:
    """flex_attention of tokens in the order of blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    columns, size = pattern.columns, pattern.block**2

    def slot_of(query, key):
        """The slot by where the key's block lies (0..3 for any, flex asks), and whether the query sees it."""
        query, key = query // size, key // size
        up, left = query // columns - key // columns, query % columns - key % columns
        slot = torch.where(up == 0, torch.where(left == 0, 0, 2), torch.where(left == 0, 3, 1))
        return slot, (up >= 0) & (up <= 1) & (left >= 0) & (left <= 1)

    def mask(b, h, query, key):
        return slot_of(query, key)[1]

    # What each block of queries sees, in tiles (none of them partial; create_block_mask would look at all pairs of
    # tokens), and which slots each block fills: their shifts enter by one number.
    tile = TILE[device.type] if size % TILE[device.type] == 0 else 64
    if size % tile:
        raise Skip(f"a block is not a multiple of {tile} tokens")
    tiles = torch.zeros(pattern.rows * columns, pattern.rows * columns, dtype=torch.bool)
    fills = torch.zeros(pattern.rows, columns, 4, 4, dtype=torch.bool)
    for row in range(pattern.rows):
        for column in range(columns):
            for (i, j), slots in geometry.key_blocks(row, column, "clamp").items():
                place = geometry.slots(1, 1).index((i - row + 1, j - column + 1))
                fills[row, column, place, list(slots)] = True
                tiles[row * columns + column, i * columns + j] = True
    fills = fills.flatten(0, 1).to(device)
    tiles = tiles.repeat_interleave(size // tile, 0).repeat_interleave(size // tile, 1)[None, None]
    number, order = tiles.sum(-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    block_mask = BlockMask.from_kv_blocks(
        torch.zeros_like(number), torch.zeros_like(order), number, order, BLOCK_SIZE=tile, mask_mod=mask
    ).to(device)

    def shifts(q, slot_embed):
        shift = torch.einsum("bhnd,shd->bhns", q.float(), slot_embed) * q.shape[-1] ** -0.5
        shift = shift.unflatten(2, (-1, size)).unsqueeze(-2)
        return shift.masked_fill(~fills[:, None], float("-inf")).logsumexp(-1).flatten(2, 3)

    def attend(q, k, v, shift):
        def score(x, b, h, query, key):
            return x + shift[b, h, query, slot_of(query, key)[0]]

        return flex_attention(q, k, v, score_mod=score, block_mask=block_mask)

    # Two functions: on a CPU a score_mod takes no number that is computed in its own.
    shifts, attend = (torch.compile(f, fullgraph=True, dynamic=False) for f in (shifts, attend))
    return lambda q, k, v, slot_embed: attend(q, k, v, shifts(q, slot_embed))


def prepare(provider: str, case: Case, device: torch.device, machine: Machine | None, limit: float) -> Contender:
    """`provider`'s way to do `case` once, ready to be timed."""
    pattern, forced = pattern_of(case), contextlib.nullcontext
    q, k, v, grad, slot_embed = _inputs(case, device)
    if provider == "flex":
        q, k, v, grad = (by_blocks(x, pattern).permute(0, 3, 1, 2, 4, 5).flatten(2, 4) for x in (q, k, v, grad))
    leaves = [x.detach().requires_grad_(case.mode != "forward") for x in (q, k, v, slot_embed)]
    if provider.startswith("linattn-"):

        def forced():
            return linattn.use_backend(provider.removeprefix("linattn-"))

        def function():
            return linattn.block_causal_attention(*leaves[:3], *pattern, slot_embed=leaves[3])
    elif provider == "sdpa":

        def function():
            return concatenated(*leaves, pattern)
    else:
        attend = _flex(pattern, device)

        def function():
            return attend(*leaves)

    if case.mode == "forward":

        @contextlib.contextmanager
        def scope():
            with forced(), torch.no_grad():
                yield

        return Contender(function, scope)
    if case.mode == "forward+backward":
        return Contender(lambda: torch.autograd.grad(function(), leaves, grad), forced)
    raise Skip(f"mode {case.mode} is not measured")


def work(case: Case) -> tuple[float, float]:
    """(bytes, FLOPs) of the pattern, each key of a block once: what every contender's time is held against.

    Forward: reads q, k, v, writes out; two products per pair that attends. Backward: reads those and the output's
    gradient, writes the gradients; five products. The embeddings are 4 tokens' worth of memory.
    """
    pattern = pattern_of(case)
    rows = case.B * case.H * case.D
    forward = 4.0 * rows * case.N, 4.0 * rows * geometry.block_pairs(*pattern)
    parts = [forward] if case.mode == "forward" else [forward, (2 * forward[0], 2.5 * forward[1])]
    size = torch.finfo(case.torch_dtype).bits // 8
    return float(size * sum(part[0] for part in parts)), sum(part[1] for part in parts)


def memory_cases(device: torch.device) -> list[tuple[str, Case]]:
    """One layer of a 1024 x 1024 image (512 x 512 on a CPU, on which four heads are the rule)."""
    case = _case(256, "bfloat16", 16) if device.type == "cuda" else _case(128, "bfloat16", 4)
    names = ["sdpa", *(["flex"] if device.type == "cuda" else []), *(f"linattn-{n}" for n in our_backends(device))]
    return [(n, dataclasses.replace(case, mode=mode)) for mode in ("forward", "forward+backward") for n in names]


# ---- figure -----------------------------------------------------------------------------------------------------


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Speed-up over SDPA on concatenated keys and over flex_attention against the number of tokens; one panel per
    dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["provider"].startswith("linattn-") and r["layout"] == "BNHD" and r["p50"]]
    rows = [r for r in rows if r["over_sdpa"] or r["over_flex"]]
    dtypes = [d for d in ("float32", "bfloat16", "float16") if any(r["dtype"] == d for r in rows)]
    if not dtypes:
        raise LookupError("there is nothing to draw")
    panels, axes = plt.subplots(1, len(dtypes), figsize=(4.6 * len(dtypes), 4.2), sharey=True, squeeze=False)
    colours = {"over_sdpa": "#b3446c", "over_flex": "#33658a"}
    words = {"over_sdpa": "over SDPA on concatenated keys", "over_flex": "over flex_attention"}
    markers = {"forward": "o", "forward+backward": "^"}
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for column, colour in colours.items():
            for mode, marker in markers.items():
                points = [r for r in rows if r["dtype"] == dtype and r["mode"] == mode and r[column]]
                if points:
                    x, y = [int(r["N"]) for r in points], [float(r[column]) for r in points]
                    label = f"{words[column]}, {mode}"
                    axis.scatter(x, y, color=colour, marker=marker, s=34, alpha=0.85, label=label)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="tokens N", title=dtype)
        axis.set_xscale("log", base=2)
        axis.grid(True, which="major", linewidth=0.3)
        axis.legend(fontsize=7, loc="best")
    axes[0][0].set(ylabel="times faster", ylim=(0, None))
    figures.write(panels, path, "", rows[0])


FAMILY = Family(
    name="block_causal_attention",
    title="block-causal attention against SDPA on concatenated keys and compiled flex_attention",
    cases=cases,
    providers=providers,
    prepare=prepare,
    work=work,
    figure=figure,
    memory_cases=memory_cases,
    left_out=left_out,
)

if __name__ == "__main__":
    sys.exit(runner.main(FAMILY))
