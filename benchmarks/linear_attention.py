"""Bidirectional linear attention against what it replaces, at the layer sizes of Stable Diffusion.

Contenders, all in one run:
  eager         LinFusion's formula in PyTorch: elu + 1, mean, two scaled products, division
  compiled      the same under torch.compile, compiled for the exact sizes
  sdpa          softmax attention by torch's scaled_dot_product_attention: what LinFusion takes out of the model
  fbi_la        flash-bidirectional-linear-attention's Triton op, where it is installed (phi outside, by torch)
  fbi_la-op     its op alone, on inputs that are mapped already: less work than ours, its most favourable figure
  linattn-*     torch.ops.linattn.linear_attention on each backend that runs here

Sizes: the self-attention layers of SD 1.5 and SDXL from 512 pixels to 16K x 8K, batch 2 as classifier-free guidance has
it, in the (B, N, H, D) strides in which models hand them over; and (B, H, N, D) for comparison.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import linattn
from linattn import backend

from .harness import figures, runner
from .harness.family import Case, Family
from .harness.measure import Contender, Skip
from .harness.roofline import Machine

EPS = 1e-4


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """LinFusion's arithmetic: phi by elu + 1, both factors of the state scaled by N^-1/2, eps on the mean form."""
    root = k.shape[-2] ** -0.5
    q, k = F.elu(q) + 1, F.elu(k) + 1
    z = q @ k.mean(-2, keepdim=True).transpose(-1, -2) + EPS
    kv = (k.transpose(-1, -2) * root) @ (v * root)
    return q @ kv / z


# ---- cases ------------------------------------------------------------------------------------------------------

#: (name, heads, tokens, head dim) of self-attention layers; `512` is the image's side in pixels.
SMALL = [
    ("SD1.5 512", 8, 4096, 40),
    ("SD1.5 512", 8, 1024, 80),
    ("SD1.5 512", 8, 256, 160),
    ("SD1.5 512", 8, 64, 160),
    ("SDXL 1024", 10, 4096, 64),
    ("SDXL 1024", 20, 1024, 64),
]
LARGE = [
    ("SD1.5 1024", 8, 16384, 40),
    ("SDXL 2048", 10, 16384, 64),
    ("SD1.5 2048", 8, 65536, 40),
    ("SDXL 4096", 10, 65536, 64),
]
HUGE = [
    ("SD1.5 4096", 8, 262144, 40),
    ("SDXL 16Kx8K", 20, 131072, 64),
    ("SDXL 16Kx8K", 10, 524288, 64),
    ("SD1.5 8192", 8, 1048576, 40),
    ("SD1.5 16Kx8K", 8, 2097152, 40),
]
#: The sizes that design notes and peers quote: one layer of 16,384 tokens.
ANCHORS = [("anchor", 8, 16384, 64), ("anchor", 8, 16384, 40)]


def _case(size: tuple, dtype: str, batch: int = 2, **options: str) -> Case:
    name, heads, tokens, dim = size
    return Case(name, batch, heads, tokens, tokens, dim, dim, dtype, **options)


def cases(device: torch.device, level: str) -> list[Case]:
    if level == "smoke":
        tiny = ("tiny", 2, 128, 40)
        return [_case(tiny, dtype, mode=mode) for dtype in ("float32", "bfloat16") for mode in ("forward", "backward")]
    if device.type == "cuda":
        return _cuda_cases(level)
    if level == "quick":
        return [_case(size, "bfloat16") for size in (SMALL[1], SMALL[0], ANCHORS[0])] + [_case(ANCHORS[0], "float32")]
    both = ("float32", "bfloat16")
    listed = [_case(size, dtype) for size in (*ANCHORS, *SMALL) for dtype in both]
    listed += [_case(SMALL[0], dtype, mode="forward+backward") for dtype in both]
    listed += [_case(ANCHORS[0], dtype, layout="BHND") for dtype in both]
    listed += [_case(ANCHORS[0], dtype, mode="forward+backward") for dtype in both]
    listed += [_case(size, "float16") for size in (SMALL[2], SMALL[1], SMALL[0], ANCHORS[0])]
    listed += [_case(size, dtype) for size in LARGE[2:] for dtype in both]
    if level == "full":
        listed += [_case(ANCHORS[1], dtype, layout="BHND") for dtype in both]
        listed += [_case(size, dtype) for size in (LARGE[1], HUGE[0], HUGE[1]) for dtype in both]
        listed += [_case(size, dtype, mode="forward+backward") for size in SMALL[1:] for dtype in both]
        listed += [_case(size, "float16", mode="forward+backward") for size in (SMALL[0], ANCHORS[0])]
    return listed


def _cuda_cases(level: str) -> list[Case]:
    if level == "quick":
        return [_case(size, "bfloat16") for size in (SMALL[1], SMALL[0], ANCHORS[0], LARGE[3])]
    listed = [_case(size, "bfloat16") for size in (*ANCHORS, *SMALL)]
    listed += [_case(size, "bfloat16", timing="graph") for size in SMALL]
    listed += [_case(("peer's anchor", 16, 16384, 64), "bfloat16", batch=8, layout="BHND")]
    listed += [_case(LARGE[3], "bfloat16", mode=mode) for mode in ("forward", "backward", "forward+backward")]
    listed += [_case(ANCHORS[0], "bfloat16", mode=mode) for mode in ("backward", "forward+backward")]
    listed += [_case(HUGE[-1], "bfloat16"), _case(ANCHORS[0], "bfloat16", layout="BHND")]
    listed += [_case(("head dim 128", 8, 65536, 128), "bfloat16"), _case(("head dim 80", 8, 65536, 80), "bfloat16")]
    listed += [_case(size, "bfloat16") for size in (*LARGE[:3], *HUGE[:-1])]
    listed += [_case(size, dtype) for dtype in ("float16", "float32") for size in (ANCHORS[0], SMALL[0], LARGE[3])]
    listed += [_case(("peer's anchor", 16, 16384, 64), "bfloat16", batch=8, layout="BHND", mode="forward+backward")]
    listed += [_case(HUGE[-1], "bfloat16", mode="forward+backward")]
    listed += [_case(LARGE[3], dtype, mode="backward") for dtype in ("float16", "float32")]
    if level == "full":
        listed += [_case(size, dtype) for dtype in ("float16", "float32") for size in (*SMALL[1:], *LARGE[:3], *HUGE)]
        listed += [_case(size, "bfloat16", mode="forward+backward") for size in (*SMALL, *LARGE[:3], *HUGE[:-1])]
    return listed


# ---- contenders -------------------------------------------------------------------------------------------------


def _peer() -> Callable | None:
    try:
        from fbi_la.ops.linear_attn import linear_attention
    except ImportError:
        return None
    return linear_attention


def providers(device: torch.device) -> list[str]:
    names = ["eager", "compiled", "sdpa"]
    if device.type == "cuda" and _peer() is not None:
        names += ["fbi_la", "fbi_la-op"]
    return names + [f"linattn-{name}" for name in our_backends(device)]


def our_backends(device: torch.device) -> list[str]:
    """Our backends that run on this device as users run it: not the reference, not Triton's interpreter."""
    names = [name for name in ("cuda", "triton", "cpu") if not (name == "triton" and device.type == "cpu")]
    return [name for name in names if backend.why_not("_linear_attention", name, device, torch.float32) is None]


def _inputs(case: Case, device: torch.device, gradients: bool) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, as (B, H, N, D) with the strides of the case's layout; on random data."""
    tensors = []
    for i, (tokens, dim) in enumerate(((case.N, case.D), (case.M, case.D), (case.M, case.E), (case.N, case.E))):
        generator = torch.Generator(device).manual_seed(i)
        sizes = (case.B, case.H, tokens, dim) if case.layout == "BHND" else (case.B, tokens, case.H, dim)
        x = torch.randn(sizes, dtype=case.torch_dtype, device=device, generator=generator)
        x = x if case.layout == "BHND" else x.transpose(1, 2)
        tensors.append(x.requires_grad_(gradients and i < 3))
        if case.mode == "forward" and i == 2:
            break
    return tensors


def sdpa_seconds(case: Case, device: torch.device, machine: Machine) -> float:
    """A rough lower estimate of one call: two matrix products at torch.mm's rate; a backward takes 2.5 times that.

    torch's CPU kernel is no faster in 16 bits than in float32.
    """
    passes = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}[case.mode]
    rate = machine.matmul["float32" if device.type == "cpu" else case.dtype]
    return passes * 4 * case.B * case.H * case.N * case.M * case.D / rate


def _function(provider: str, case: Case, device: torch.device, machine: Machine | None, limit: float) -> Callable:
    if provider == "eager":
        return eager
    if provider == "compiled":
        return torch.compile(eager, fullgraph=True, dynamic=False)
    if provider == "sdpa":
        expected = sdpa_seconds(case, device, machine) if machine else 0.0
        if expected > limit:
            raise Skip(f"quadratic: one call would take {expected:.0f} s or more, the limit is {limit:g} s")
        return F.scaled_dot_product_attention
    if provider == "fbi_la":
        peer = _peer()
        return lambda q, k, v: peer(F.elu(q) + 1, F.elu(k) + 1, v, eps=EPS)
    if provider == "fbi_la-op":
        peer = _peer()
        return lambda q, k, v: peer(q, k, v, eps=EPS)
    return linattn.linear_attention


def prepare(provider: str, case: Case, device: torch.device, machine: Machine | None, limit: float) -> Contender:
    """`provider`'s way to do `case` once, ready to be timed; raises Skip where it would take longer than `limit`."""
    function = _function(provider, case, device, machine, limit)
    q, k, v, *grad = _inputs(case, device, gradients=case.mode != "forward")
    if provider == "fbi_la-op":
        q, k = ((F.elu(x.detach()) + 1).requires_grad_(x.requires_grad) for x in (q, k))
    forced = contextlib.nullcontext
    if provider.startswith("linattn-"):
        name = provider.removeprefix("linattn-")

        def forced():
            return linattn.use_backend(name)

    if case.mode == "forward":

        @contextlib.contextmanager
        def scope():
            with forced(), torch.no_grad():
                yield

        return Contender(lambda: function(q, k, v), scope)
    if case.mode == "forward+backward":
        return Contender(lambda: torch.autograd.grad(function(q, k, v), (q, k, v), grad), forced)
    # The backward alone runs repeatedly over one graph, which compiled code must not take apart to reuse its memory.
    import torch._functorch.config as functorch

    with forced(), functorch.patch(donated_buffer=False):
        out = function(q, k, v)
        torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    return Contender(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), forced)


def work(case: Case) -> tuple[float, float]:
    """(bytes, FLOPs) of linear attention: what every contender's time is held against, softmax included.

    Forward: reads q, k, v, writes out; the two products with the D x E state. Backward: reads the output's gradient,
    q, k, v, writes three gradients; four products. The state itself and the denominators are left out.
    """
    rows_q, rows_k = case.B * case.H * case.N, case.B * case.H * case.M
    tokens = rows_q + rows_k
    forward = tokens * (case.D + case.E), 2.0 * tokens * case.D * case.E
    backward = rows_q * (case.E + 2 * case.D) + rows_k * 2 * (case.D + case.E), 2 * forward[1]
    parts = {"forward": [forward], "backward": [backward], "forward+backward": [forward, backward]}[case.mode]
    size = torch.finfo(case.torch_dtype).bits // 8
    return float(size * sum(part[0] for part in parts)), sum(part[1] for part in parts)


def memory_cases(device: torch.device) -> list[tuple[str, Case]]:
    """One layer of 16,384 tokens by everyone who can do it in reasonable time."""
    case = _case(ANCHORS[0], "bfloat16")
    names = ["eager", *(f"linattn-{name}" for name in our_backends(device))]
    names += ["sdpa"] if device.type == "cuda" else []
    both = [(name, case) for name in names]
    return both + [(n, dataclasses.replace(case, mode="forward+backward")) for n in names if n != "sdpa"]


# ---- figure -----------------------------------------------------------------------------------------------------


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Speed-up over SDPA and over compiled eager against the number of tokens, one panel per dtype; forward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["provider"].startswith("linattn-") and r["mode"] == "forward" and r["p50"]]
    rows = [r for r in rows if r["layout"] == "BNHD" and r["timing"] != "graph"]
    rows = [r for r in rows if r["over_sdpa"] or r["over_compiled"]]
    dtypes = [d for d in ("float32", "bfloat16", "float16") if any(r["dtype"] == d for r in rows)]
    if not dtypes:
        raise LookupError("there is nothing to draw")
    panels, axes = plt.subplots(1, len(dtypes), figsize=(4.6 * len(dtypes), 4.2), sharey=True, squeeze=False)
    colours = {"over_sdpa": "#b3446c", "over_compiled": "#33658a"}
    words = {"over_sdpa": "over SDPA (softmax)", "over_compiled": "over torch.compile'd eager"}
    markers = {"cpu": "o", "triton": "s", "cuda": "^"}
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        mine = [r for r in rows if r["dtype"] == dtype]
        for column, colour in colours.items():
            for name, marker in markers.items():
                points = [r for r in mine if r[column] and r["provider"] == f"linattn-{name}"]
                if not points:
                    continue
                axis.scatter(
                    [int(r["N"]) for r in points], [float(r[column]) for r in points],
                    color=colour, marker=marker, s=34, alpha=0.85,
                    label=f"{name}, {words[column]}",
                )  # fmt: skip
                tokens = sorted({int(r["N"]) for r in points})
                middle = [[float(r[column]) for r in points if int(r["N"]) == n] for n in tokens]
                axis.plot(tokens, [sum(m) / len(m) for m in middle], color=colour, linewidth=0.9, alpha=0.5)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="tokens N", title=dtype)
        axis.set_xscale("log", base=2)
        axis.grid(True, which="major", linewidth=0.3)
        axis.legend(fontsize=7, loc="best")
    axes[0][0].set_ylabel("times faster, forward")
    figures.write(panels, path, "", rows[0])


FAMILY = Family(
    name="linear_attention",
    title="bidirectional linear attention against eager, torch.compile, SDPA and its peers",
    cases=cases,
    providers=providers,
    prepare=prepare,
    work=work,
    figure=figure,
    memory_cases=memory_cases,
    weight=2.0,
)

if __name__ == "__main__":
    sys.exit(runner.main(FAMILY))
