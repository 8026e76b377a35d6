"""LinFusion's attention module, projections and branches included, against the softmax module whose place it takes.

Contenders, all in one run:
  sdpa                    diffusers' Attention with AttnProcessor2_0: the module that LinFusion takes out of the UNet
  sdpa-compiled           the same under torch.compile, compiled for the exact sizes
  eager                   LinFusion's module as the original computes it: the same layers, the attention in PyTorch
  linattn-*               linattn.adapters.LinearAttention on each backend that runs here, as LinFusion mounts it
  linattn-*-compiled      the same under torch.compile

Sizes: every self-attention layer of SD 1.5 (512 pixels), SD 2.1 (768) and SDXL (1024), and the same layers at two and
four times that image size; batch 2 as classifier-free guidance has it. A shape that several sizes share (16 x 16 tokens
of SD 1.5's inner layers) stands once. Softmax attention takes 4 N C multiply-adds per token and the branches 4 C r more
than it for every N, so which module is quicker is a question of N; that is what is measured here. The op alone, without
projections, is the family linear_attention.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import linattn

from . import linear_attention
from .harness import figures, runner
from .harness.family import Case, Family
from .harness.measure import Contender, Skip
from .harness.roofline import Machine

# ---- cases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNet:
    """Self-attentions at the image size the model was trained for: (heads, tokens, head dim, how many)."""

    image: int
    divisor: int  # the branches of the published weights have width channels // divisor
    layers: tuple[tuple[int, int, int, int], ...]


UNETS = {
    "SD1.5": UNet(512, 1, ((8, 4096, 40, 5), (8, 1024, 80, 5), (8, 256, 160, 5), (8, 64, 160, 1))),
    "SD2.1": UNet(768, 1, ((5, 9216, 64, 5), (10, 2304, 64, 5), (20, 576, 64, 5), (20, 144, 64, 1))),
    "SDXL": UNet(1024, 16, ((10, 4096, 64, 10), (20, 1024, 64, 60))),
}
#: Larger images are listed where one forward pass of softmax attention stays below so many FLOPs.
MOST_FLOPS = {("cpu", "default"): 1.8e11, ("cpu", "full"): 2e12, ("cuda", "default"): 2e13, ("cuda", "full"): 4e14}


def _case(unet: str, heads: int, tokens: int, dim: int, dtype: str, image: int, **options: str) -> Case:
    return Case(f"{unet} {image}", 2, heads, tokens, tokens, dim, dim, dtype, **options)


def _layers(times: int, dtype: str, **options: str) -> list[Case]:
    """Each family's layers at `times` its image size."""
    return [
        _case(name, heads, tokens * times**2, dim, dtype, unet.image * times, **options)
        for name, unet in UNETS.items()
        for heads, tokens, dim, _ in unet.layers
    ]


def _softmax_flops(case: Case) -> float:
    return 4.0 * case.B * case.H * case.N * case.M * case.D


def cases(device: torch.device, level: str) -> list[Case]:
    if level == "smoke":
        return [
            _case("SD1.5", 2, 128, 40, dtype, 0, mode=mode)
            for dtype in ("float32", "bfloat16")
            for mode in ("forward", "forward+backward")
        ]
    if level == "quick":
        return [_case("SD1.5", *layer[:3], "bfloat16", 512) for layer in UNETS["SD1.5"].layers]
    dtypes = ("bfloat16", "float32")
    listed = [case for dtype in dtypes for case in _layers(1, dtype)]
    if device.type == "cuda":
        listed += _layers(1, "bfloat16", timing="graph")
    most = MOST_FLOPS[device.type, level]
    larger = [case for times in (2, 4) for dtype in dtypes for case in _layers(times, dtype)]
    known = {_shape(case) for case in listed}
    for case in larger:
        if _softmax_flops(case) <= most and _shape(case) not in known:
            known.add(_shape(case))
            listed.append(case)
    training = [case for dtype in dtypes for case in _layers(1, dtype, mode="forward+backward")]
    return listed + [case for case in training if level == "full" or 3.5 * _softmax_flops(case) <= 2 * most]


def _shape(case: Case) -> tuple:
    return (case.name.split()[0], case.H, case.N, case.D, case.dtype)


def family_of(case_name: str) -> str:
    """ "SD1.5" of "SD1.5 1024": which UNet a case, or a recorded row, belongs to."""
    return case_name.split()[0]


def branch_width(case: Case) -> int:
    return case.H * case.D // UNETS[family_of(case.name)].divisor


# ---- contenders -------------------------------------------------------------------------------------------------


def providers(device: torch.device) -> list[str]:
    ours = [f"linattn-{name}" for name in linear_attention.our_backends(device)]
    return ["sdpa", "sdpa-compiled", "eager", *ours, *(f"{name}-compiled" for name in ours)]


def left_out(provider: str, case: Case, device: torch.device, level: str) -> str | None:
    """Compilation takes longer than all the rest, and what it wins per token does not depend on N."""
    if not provider.endswith("-compiled") or level in ("smoke", "full"):
        return None
    if device.type == "cuda":
        return "compiled contenders: with --full"
    if case.mode != "forward" or case.name.split()[1] != str(UNETS[family_of(case.name)].image):
        return "compiled contenders: forward at the model's own image size; everywhere with --full"
    if provider == "sdpa-compiled" and _softmax_flops(case) > 1e11:
        return "SDPA's kernel is nearly all of it, and takes seconds: with --full"
    return None


def original(attention: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The module's formula as the original computes it, in PyTorch, with the layers of `attention`."""
    q = attention.to_q(x + attention.to_q_(x))
    k = attention.to_k(x + attention.to_k_(x))
    v = attention.to_v(x)
    q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attention.to_out[0](linear_attention.eager(q, k, v).transpose(1, 2).flatten(2))


def _module(provider: str, case: Case, device: torch.device) -> torch.nn.Module:
    """The attention module, weights random but the same for everyone who has them."""
    try:
        from diffusers.models.attention_processor import Attention, AttnProcessor2_0

        from linattn.adapters import LinearAttention
    except ImportError as error:
        raise Skip(f"the modules are diffusers': {error}") from None
    torch.manual_seed(0)
    channels = case.H * case.D
    if provider.startswith("sdpa"):
        module = Attention(channels, heads=case.H, dim_head=case.D, processor=AttnProcessor2_0())
    else:
        module = LinearAttention(channels, case.H, branch_width(case))
    return module.to(device, case.torch_dtype)


def prepare(provider: str, case: Case, device: torch.device, machine: Machine | None, limit: float) -> Contender:
    """`provider`'s way to do `case` once, ready to be timed; raises Skip where it would take longer than `limit`."""
    name = provider.removesuffix("-compiled")
    if name == "sdpa" and machine is not None:
        expected = linear_attention.sdpa_seconds(case, device, machine)
        if expected > limit:
            raise Skip(f"quadratic: one call would take {expected:.0f} s or more, the limit is {limit:g} s")
    module = _module(name, case, device)
    function: Callable = (lambda x: original(module, x)) if name == "eager" else module
    if provider.endswith("-compiled"):
        function = torch.compile(module, fullgraph=True, dynamic=False)
    backward = case.mode == "forward+backward"
    generator = torch.Generator(device).manual_seed(0)
    size = (case.B, case.N, case.H * case.D)
    x = torch.randn(size, dtype=case.torch_dtype, device=device, generator=generator).requires_grad_(backward)
    forced = contextlib.nullcontext
    if name.startswith("linattn-"):

        def forced():
            return linattn.use_backend(name.removeprefix("linattn-"))

    if backward:
        grad = torch.randn(size, dtype=case.torch_dtype, device=device, generator=generator)
        leaves = (x, *module.parameters())
        return Contender(lambda: torch.autograd.grad(function(x), leaves, grad), forced)

    @contextlib.contextmanager
    def scope():
        with forced(), torch.no_grad():
            yield

    return Contender(lambda: function(x), scope)


def work(case: Case) -> tuple[float, float]:
    """(bytes, FLOPs) of LinFusion's module: what every contender's time is held against, softmax included.

    Forward, per token: 8 C^2 of the four projections, 8 C r of the two branches, 4 C D of the attention. Reads x and
    the weights, writes y. The backward pass does twice the FLOPs; it reads x, the output's gradient and the weights
    and writes a gradient for x and the weights.
    """
    tokens, channels, width = case.B * case.N, case.H * case.D, branch_width(case)
    weights = 4 * channels**2 + 4 * channels * width
    forward = 2.0 * tokens * channels + weights, tokens * (2.0 * weights + 4.0 * channels * case.D)
    backward = 3.0 * tokens * channels + 2 * weights, 2 * forward[1]
    parts = [forward, backward] if case.mode == "forward+backward" else [forward]
    size = torch.finfo(case.torch_dtype).bits // 8
    return size * sum(part[0] for part in parts), sum(part[1] for part in parts)


def memory_cases(device: torch.device) -> list[tuple[str, Case]]:
    """A training step of the layer with the most tokens: what is kept for the backward pass."""
    case = _case("SD1.5", *UNETS["SD1.5"].layers[0][:3], "bfloat16", 512, mode="forward+backward")
    names = ["sdpa", "eager", *(f"linattn-{name}" for name in linear_attention.our_backends(device))]
    return [(name, case) for name in names]


# ---- figure -----------------------------------------------------------------------------------------------------


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Speed-up over the softmax module against the number of tokens, one panel per UNet; forward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["provider"].startswith("linattn-") and r["p50"] and r["over_sdpa"]]
    rows = [r for r in rows if r["mode"] == "forward" and not r["provider"].endswith("-compiled")]
    rows = [r for r in rows if r["timing"] != "graph"]
    if not rows:
        raise LookupError("there is nothing to draw")
    names = [name for name in UNETS if any(family_of(r["case"]) == name for r in rows)]
    panels, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 4.2), sharey=True, squeeze=False)
    colours = {"bfloat16": "#b3446c", "float32": "#33658a"}
    for axis, name in zip(axes[0], names, strict=True):
        mine = [r for r in rows if family_of(r["case"]) == name]
        widths = sorted({int(r["H"]) * int(r["D"]) for r in mine})
        for dtype, colour in colours.items():
            for width, marker in zip(widths, "os^", strict=False):
                points = [r for r in mine if r["dtype"] == dtype and int(r["H"]) * int(r["D"]) == width]
                points = sorted((int(r["N"]), float(r["over_sdpa"])) for r in points)
                if points:
                    label = f"{dtype}, {width} channels"
                    axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=0.9, label=label)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        divisor = UNETS[name].divisor
        title = f"{name}, branches as wide as " + ("the channels" if divisor == 1 else f"a {divisor}th of the channels")
        axis.set(yscale="log", xlabel="tokens N", title=title)
        axis.set_xscale("log", base=2)
        axis.grid(True, which="major", linewidth=0.3)
        axis.legend(fontsize=7, loc="best")
    axes[0][0].set_ylabel("times faster than the softmax module, forward")
    figures.write(panels, path, "LinFusion's attention module, ", rows[0])


FAMILY = Family(
    name="linfusion_module",
    title="LinFusion's attention module, branches included, against the softmax module it replaces",
    cases=cases,
    providers=providers,
    prepare=prepare,
    work=work,
    figure=figure,
    memory_cases=memory_cases,
    left_out=left_out,
    sampling=0.5,  # many cases of few tens of milliseconds
)

if __name__ == "__main__":
    sys.exit(runner.main(FAMILY))
