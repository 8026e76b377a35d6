"""Two-dimensional window attention against what it replaces, at the layer sizes of CLEAR on FLUX.

Contenders, all in one run:
  sdpa          softmax attention over everything by torch's scaled_dot_product_attention: what CLEAR takes out
  flex          compiled flex_attention with CLEAR's mask, tokens in the order of 8 x 8 tiles, its best order; the
                reordering of q, k, v and the result is not timed
  flex-raster   the same in raster order, which is how CLEAR runs it
  linattn-*     torch.ops.linattn.window_attention on each backend that runs here, tokens in raster order

Block masks are made beforehand and not timed; flex_attention is compiled for the exact sizes. On a CPU it has no
backward. Sizes: square grids of 1K to 8K images (16 pixels per token), 512 text tokens, the radii 8, 16, 32 of the
published weights, f = 4 with pooled keys (given, not pooled here); 24 heads of 128 on a GPU, 4 of them on a CPU.
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

TILE = 8  # of the tokens' order for flex

# ---- cases ------------------------------------------------------------------------------------------------------


class Pattern(NamedTuple):
    """What a case's name says: the grid, the radius, tokens per side of a pooled patch (1: none), text tokens."""

    height: int
    width: int
    radius: int
    factor: int
    text: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width} r{self.radius} f{self.factor} text {self.text}"

    @property
    def pooled(self) -> int:
        rows, columns = geometry.pooled_size(self.height, self.width, self.factor)
        return rows * columns if self.factor > 1 else 0

    @property
    def queries(self) -> int:
        return self.text + self.height * self.width


def pattern_of(case: Case) -> Pattern:
    """The pattern in the case's name; one of case.N image tokens where the sizes were replaced by small ones."""
    pattern = Pattern(*map(int, re.fullmatch(r"(\d+)x(\d+) r(\d+) f(\d+) text (\d+)", case.name).groups()))
    small = Pattern(TILE, case.N // TILE, pattern.radius, 1, 0)
    return pattern if pattern.queries == case.N else small


def _case(side: int, radius: int, dtype: str, heads: int, factor: int = 1, **options: str) -> Case:
    pattern = Pattern(side, side, radius, factor, 512)
    keys = pattern.queries + pattern.pooled
    return Case(str(pattern), 1, heads, pattern.queries, keys, 128, 128, dtype, **options)


def cases(device: torch.device, level: str) -> list[Case]:
    if level == "smoke":
        tiny = [Pattern(8, 16, 3, factor, 5) for factor in (1, 2)]
        return [
            Case(str(p), 1, 2, p.queries, p.queries + p.pooled, 16, 16, dtype, mode=mode)
            for p, dtype, mode in zip(tiny, ("float32", "bfloat16"), ("forward", "forward+backward"), strict=True)
        ]
    return _cuda_cases(level) if device.type == "cuda" else _cpu_cases(level)


def _cpu_cases(level: str) -> list[Case]:
    both = ("float32", "bfloat16")
    if level == "quick":
        return [_case(64, 8, dtype, 4) for dtype in both]
    listed = [_case(64, radius, dtype, 4) for radius in (8, 16, 32) for dtype in both]
    listed += [_case(64, 8, dtype, 4, factor=4) for dtype in both]
    listed += [_case(128, radius, dtype, 4) for radius in (8, 32) for dtype in both]
    listed += [_case(64, 8, dtype, 4, mode="forward+backward") for dtype in both]
    if level == "full":
        listed += [_case(128, 16, dtype, 4) for dtype in both]
        listed += [_case(64, radius, dtype, 4, mode="forward+backward") for radius in (16, 32) for dtype in both]
        listed += [_case(64, 8, "float16", 4)]
        listed += [_case(64, 8, dtype, 4, layout="BHND") for dtype in both]
    return listed


def _cuda_cases(level: str) -> list[Case]:
    def case(side, radius, factor=1, dtype="bfloat16", **options):
        return _case(side, radius, dtype, 24, factor, **options)

    if level == "quick":
        return [case(128, 8), case(64, 16)]
    listed = [case(side, 8) for side in (128, 512, 64, 256)]
    listed += [case(side, radius) for side in (128, 512, 64, 256) for radius in (16, 32)]
    listed += [case(128, 8, mode="forward+backward")]
    listed += [case(side, radius, 4) for radius in (8, 16) for side in (64, 128, 256)]
    listed += [case(512, 8, 4)]
    listed += [case(side, 16, mode="forward+backward") for side in (64, 128, 256)]
    if level == "full":
        listed += [case(512, 16, 4)]
        listed += [case(128, 8, dtype=dtype) for dtype in ("float16", "float32")]
        listed += [case(side, radius, mode="forward+backward") for side, radius in ((512, 8), (128, 32), (512, 32))]
    return listed


# ---- contenders -------------------------------------------------------------------------------------------------


def providers(device: torch.device) -> list[str]:
    return ["sdpa", "flex", "flex-raster"] + [f"linattn-{name}" for name in our_backends(device)]


def our_backends(device: torch.device) -> list[str]:
    """Our backends that run on this device as users run it: not the reference, not Triton's interpreter."""
    names = [name for name in ("cuda", "triton", "cpu") if not (name == "triton" and device.type == "cpu")]
    return [name for name in names if backend.why_not("_window_attention", name, device, torch.float32) is None]


def left_out(provider: str, case: Case, device: torch.device, level: str) -> str | None:
    if provider.startswith("flex"):
        if device.type == "cpu" and case.mode != "forward":
            return "flex_attention has no backward on a CPU"
        if level == "smoke":
            return "it compiles for longer than everything else takes"
    return None


def _inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    """q, k, v, pooled k and v, the output's gradient, as (B, H, N, D) with the strides of the case's layout."""
    pattern, tensors = pattern_of(case), []
    keys = pattern.queries
    for i, tokens in enumerate((keys, keys, keys, pattern.pooled, pattern.pooled, keys)):
        generator = torch.Generator(device).manual_seed(i)
        sizes = (case.B, case.H, tokens, case.D) if case.layout == "BHND" else (case.B, tokens, case.H, case.D)
        x = torch.randn(sizes, dtype=case.torch_dtype, device=device, generator=generator)
        x = x if case.layout == "BHND" else x.transpose(1, 2)
        tensors.append(x.requires_grad_(case.mode != "forward" and i < 5))
    return tensors


def flex_mask(pattern: Pattern, tiles: bool) -> Callable:
    """mask_mod of flex_attention; image tokens in raster order, or in the order of TILE x TILE tiles."""
    _, width, radius, _, text = pattern
    image = pattern.queries

    def place(i):
        i = i - text
        if not tiles:
            return i // width, i % width
        tile, inside = i // TILE**2, i % TILE**2
        return tile // (width // TILE) * TILE + inside // TILE, tile % (width // TILE) * TILE + inside % TILE

    def mask(b, h, q, k):
        (qy, qx), (ky, kx) = place(q), place(k)
        near = (qy - ky) * (qy - ky) + (qx - kx) * (qx - kx) < radius * radius
        return ((q < text) & (k < image)) | ((q >= text) & ((k < text) | (k >= image) | near))

    return mask


def _flex(case: Case, tiles: bool, device: torch.device) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pattern = pattern_of(case)
    if tiles and (pattern.height % TILE or pattern.width % TILE):
        raise Skip(f"the grid is not a multiple of {TILE} x {TILE}")
    cuda = device.type == "cuda"
    block_mask = create_block_mask(
        *(flex_mask(pattern, tiles), None, None, pattern.queries, pattern.queries + pattern.pooled),
        device=device,
        BLOCK_SIZE=128 if cuda else 64,
        _compile=cuda,
    )
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def dense_seconds(case: Case, device: torch.device, machine: Machine) -> float:
    """A rough lower estimate of a call of dense attention: torch.mm's rate, a backward takes 2.5 times the forward."""
    passes = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}[case.mode]
    rate = machine.matmul["float32" if device.type == "cpu" else case.dtype]
    return passes * 4 * case.B * case.H * case.N * case.M * case.D / rate


def prepare(provider: str, case: Case, device: torch.device, machine: Machine | None, limit: float) -> Contender:
    """`provider`'s way to do `case` once, ready to be timed; raises Skip where it would take longer than `limit`."""
    pattern = pattern_of(case)
    if provider == "sdpa" and machine and (expected := dense_seconds(case, device, machine)) > limit:
        raise Skip(f"quadratic: one call would take {expected:.0f} s or more, the limit is {limit:g} s")
    q, k, v, pooled_k, pooled_v, grad = _inputs(case, device)
    leaves, forced = [q, k, v], contextlib.nullcontext
    if provider.startswith("linattn-"):
        pooled = {"pooled_k": pooled_k, "pooled_v": pooled_v} if pattern.pooled else {}
        leaves += pooled.values()

        def forced():
            return linattn.use_backend(provider.removeprefix("linattn-"))

        def function():
            geometric = {"height": pattern.height, "width": pattern.width, "radius": pattern.radius}
            return linattn.window_attention(q, k, v, **geometric, text_length=pattern.text, **pooled)
    else:
        # Keys and values with the pooled ones behind them: joined beforehand, not timed.
        keys, values = (torch.cat([x, p], 2).detach().requires_grad_(x.requires_grad)
                        for x, p in ((k, pooled_k), (v, pooled_v)))  # fmt: skip
        leaves = [q, keys, values]
        dense = provider == "sdpa"
        attend = F.scaled_dot_product_attention if dense else _flex(case, provider == "flex", device)

        def function():
            return attend(q, keys, values)

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
    """(bytes, FLOPs) of the pattern: what every contender's time is held against, dense attention included.

    Forward: reads q, k, v and the pooled keys, writes out; two products per pair that attends. Backward: reads those
    and the output's gradient, writes the gradients; five products.
    """
    pattern = pattern_of(case)
    pairs = geometry.pairs(pattern.height, pattern.width, pattern.radius, pattern.text, pattern.pooled)
    rows = case.B * case.H * case.D
    keys = pattern.queries + pattern.pooled
    forward = rows * (2.0 * pattern.queries + 2 * keys), 4.0 * rows * pairs
    backward = rows * (4.0 * pattern.queries + 4 * keys), 2.5 * forward[1]
    parts = [forward] if case.mode == "forward" else [forward, backward]
    size = torch.finfo(case.torch_dtype).bits // 8
    return float(size * sum(part[0] for part in parts)), sum(part[1] for part in parts)


def memory_cases(device: torch.device) -> list[tuple[str, Case]]:
    """One layer of a 2K image."""
    case = _case(128, 8, "bfloat16", 24 if device.type == "cuda" else 4)
    ours = [f"linattn-{name}" for name in our_backends(device)]
    names = [*ours, *(["flex", "sdpa"] if device.type == "cuda" else [])]
    return [(n, case) for n in names] + [(n, dataclasses.replace(case, mode="forward+backward")) for n in ours]


# ---- figure -----------------------------------------------------------------------------------------------------


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Speed-up over flex_attention and dense attention against the number of tokens; forward, one panel per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["provider"].startswith("linattn-") and r["mode"] == "forward" and r["p50"]]
    rows = [r for r in rows if r["over_sdpa"] or r["over_flex"]]
    dtypes = [d for d in ("float32", "bfloat16", "float16") if any(r["dtype"] == d for r in rows)]
    if not dtypes:
        raise LookupError("there is nothing to draw")
    panels, axes = plt.subplots(1, len(dtypes), figsize=(4.6 * len(dtypes), 4.2), sharey=True, squeeze=False)
    colours = {"over_sdpa": "#b3446c", "over_flex": "#33658a"}
    words = {"over_sdpa": "over dense SDPA", "over_flex": "over flex_attention in tile order"}
    markers = {"r8": "o", "r16": "s", "r32": "^"}
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for column, colour in colours.items():
            for radius, marker in markers.items():
                points = [r for r in rows if r["dtype"] == dtype and r[column] and f" {radius} " in f" {r['case']} "]
                if points:
                    label = f"radius {radius[1:]}, {words[column]}"
                    x, y = [int(r["N"]) for r in points], [float(r[column]) for r in points]
                    axis.scatter(x, y, color=colour, marker=marker, s=34, alpha=0.85, label=label)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="tokens N", title=dtype)
        axis.set_xscale("log", base=2)
        axis.grid(True, which="major", linewidth=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="best")
    axes[0][0].set_ylabel("times faster, forward")
    figures.write(panels, path, "", rows[0])


FAMILY = Family(
    name="window_attention",
    title="two-dimensional window attention against dense SDPA and compiled flex_attention",
    cases=cases,
    providers=providers,
    prepare=prepare,
    work=work,
    figure=figure,
    memory_cases=memory_cases,
    left_out=left_out,
    weight=2.0,
)

if __name__ == "__main__":
    sys.exit(runner.main(FAMILY))
