"""Time and memory against tokens: one evaluation of the bundled Stable Diffusion's UNet on ever larger canvases.

Contenders, all in one run and on the same weights, batch 2 as classifier-free guidance has it:
  sdpa        stock attention as diffusers runs it by default: AttnProcessor2_0, torch's fused softmax attention
  linattn-*   LinFusion mounted on the UNet, on each backend that runs here
  math        memory only: AttnProcessor, the plain softmax(q k^T) v that holds every N x N matrix; what stock attention
              was before torch 2.0, and is where no fused kernel runs

Canvases are multiples of the side that the model was trained for, read off its configuration. N is the number of tokens
at the first level that has self-attention; the text is as long as the text encoder's context. The whole UNet is
measured: convolutions and cross-attention, equal on all sides and linear in N, are in every figure; the autoencoder and
the text encoder, which run once per picture and not once per step, are not. Memory is the peak beyond weights and
inputs, in a fresh process for each point.

`--plot` draws docs/images/scaling.png from the recorded results and measures nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import linattn
from linattn import bundled
from linattn._quiet import quiet_diffusers

from . import linear_attention
from .harness import environment, figures, record, runner
from .harness.family import Case, Family
from .harness.measure import Contender, Skip
from .harness.roofline import Machine

MODEL, STUDENT = "tiny_sd", "tiny_sd_linfusion"
NAME = "scaling"
STOCK, NAIVE = "sdpa", "math"
IMAGE = environment.ROOT / "docs" / "images" / f"{NAME}.png"

# ---- the model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """What of the model's configuration decides about sizes. `latent` is the side it was trained for.

    The first self-attention sees the latents `downsampled` times smaller, with `heads` heads of `head_dim`.
    """

    latent: int
    pixels: int  # per latent, along a side
    downsampled: int
    heads: int
    head_dim: int
    text: int
    text_width: int
    channels: int

    def side(self, times: float) -> int:
        """Side of the latents of a canvas so many times larger; the first level with attention divides it evenly."""
        return math.ceil(times * self.latent / self.downsampled) * self.downsampled

    def tokens(self, side: int) -> int:
        """Tokens at the first level with self-attention."""
        return (side // self.downsampled) ** 2

    def side_of(self, tokens: int) -> int:
        """The inverse of `tokens`."""
        return math.isqrt(tokens) * self.downsampled


def geometry(folder: Path) -> Geometry:
    """Read off a Stable Diffusion folder's configuration files; diffusers is not needed.

    Raises:
        ValueError: the UNet has no self-attention, or was not trained for one square size.
    """
    unet, vae, text = (json.loads((folder / p / "config.json").read_text()) for p in ("unet", "vae", "text_encoder"))
    side = unet["sample_size"]
    if not isinstance(side, int):
        raise ValueError(f"{folder}: sample_size of the UNet must be one number, the side of a square, got {side!r}")
    levels = [i for i, kind in enumerate(unet["down_block_types"]) if "Attn" in kind]
    if not levels:
        raise ValueError(f"{folder}: none of the UNet's blocks {unet['down_block_types']} has self-attention")
    first = levels[0]
    # diffusers' own reading: attention_head_dim is the number of heads unless num_attention_heads says it.
    heads = unet.get("num_attention_heads") or unet["attention_head_dim"]
    heads = heads if isinstance(heads, int) else heads[first]
    return Geometry(
        latent=side,
        pixels=2 ** (len(vae["block_out_channels"]) - 1),
        downsampled=2**first,
        heads=heads,
        head_dim=unet["block_out_channels"][first] // heads,
        text=text["max_position_embeddings"],
        text_width=unet["cross_attention_dim"],
        channels=unet["in_channels"],
    )


def _geometry() -> Geometry:
    return geometry(bundled.path(MODEL))


def load_unet(provider: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The bundled UNet with the self-attention that `provider` stands for; raises Skip without diffusers."""
    try:
        from diffusers import UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        from linattn.adapters import LinFusion
    except ImportError as error:
        raise Skip(f"the model is diffusers': {error}") from None
    with quiet_diffusers():
        unet = UNet2DConditionModel.from_pretrained(bundled.path(MODEL), subfolder="unet", torch_dtype=dtype)
    unet.set_attn_processor(AttnProcessor() if provider == NAIVE else AttnProcessor2_0())
    if provider.startswith("linattn-"):
        # Undistilled modules do the same work as distilled ones; the student decides how wide their branches are.
        student = bundled.path(STUDENT) if STUDENT in bundled.names() else None
        LinFusion.construct_for(unet=unet, pretrained_model_name_or_path=student, load_pretrained=student is not None)
    return unet.eval().to(device)


def inputs(tokens: int, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Latents, time step and text of one evaluation."""
    sizes = _geometry()
    side = sizes.side_of(tokens)
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, sizes.channels, side, side, generator=rng)
    text = torch.randn(batch, sizes.text, sizes.text_width, generator=rng)
    return latents.to(device, dtype), torch.tensor(500, device=device), text.to(device, dtype)


# ---- cases ------------------------------------------------------------------------------------------------------

#: How many times larger than trained a canvas is, along a side.
TIMES = {
    ("cpu", "smoke"): (1,),
    ("cpu", "quick"): (1, 2, 4),
    ("cpu", "default"): (1, 2, 4, 6, 10, 16),
    ("cpu", "full"): (1, 2, 4, 6, 10, 16, 24, 32),
    ("cuda", "smoke"): (1, 2),
    ("cuda", "quick"): (1, 4, 16),
    ("cuda", "default"): (1, 2, 4, 6, 10, 16, 24, 32),
    ("cuda", "full"): (1, 2, 4, 6, 10, 16, 24, 32, 48, 64),
}
#: Stock attention sits out where one of its layers at the first level takes more FLOPs; ours goes on.
MOST_FLOPS = {"cpu": {"default": 4e11, "full": 2e12}, "cuda": {"default": 1e14, "full": 5e14}}
#: The seconds that one evaluation may take, where the command line does not say.
LIMIT = 60.0
#: The share of the memory that is free which the naive contender may need.
NAIVE_SHARE = 0.6


def cases(device: torch.device, level: str) -> list[Case]:
    sizes = _geometry()
    dtype = "float32" if device.type == "cpu" else "float16"
    sides = sorted({sizes.side(times) for times in TIMES[device.type, level]})
    return [_case(sizes, side, dtype) for side in sides]


def _case(sizes: Geometry, side: int, dtype: str) -> Case:
    tokens = sizes.tokens(side)
    name = f"{MODEL} {side * sizes.pixels}"
    return Case(name, 2, sizes.heads, tokens, tokens, sizes.head_dim, sizes.head_dim, dtype)


def providers(device: torch.device) -> list[str]:
    return [STOCK, *(f"linattn-{name}" for name in linear_attention.our_backends(device))]


def left_out(provider: str, case: Case, device: torch.device, level: str) -> str | None:
    flops = 4.0 * case.B * case.H * case.N**2 * case.D
    if provider == STOCK and flops > MOST_FLOPS[device.type].get(level, math.inf):
        return "quadratic: takes too long at this size" + ("" if level == "full" else "; a larger one with --full")
    return None


def naive_bytes(case: Case) -> int:
    """What the naive contender needs at least: the scores of one layer and their softmax."""
    return 2 * case.B * case.H * case.N * case.M * (torch.finfo(case.torch_dtype).bits // 8)


def _free_memory(device: torch.device) -> float:
    """Bytes that a process can still have; infinite where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else math.inf
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return math.inf


def memory_cases(device: torch.device) -> Iterator[tuple[str, Case]]:
    """Every canvas; the largest first, since they say most and a budget may not hold all."""
    free = _free_memory(device)
    for case in reversed(cases(device, "default")):
        names = [name for name in providers(device) if left_out(name, case, device, "default") is None]
        names += [NAIVE] if naive_bytes(case) <= NAIVE_SHARE * free else []
        yield from ((name, case) for name in names)


# ---- contenders -------------------------------------------------------------------------------------------------


def prepare(provider: str, case: Case, device: torch.device, machine: Machine | None, limit: float) -> Contender:
    """One evaluation of the UNet by `provider`; raises Skip where it would take longer than `limit`."""
    if provider == STOCK and machine is not None:
        expected = linear_attention.sdpa_seconds(case, device, machine)  # of one layer: a low estimate
        if expected > limit:
            raise Skip(f"quadratic: one call would take {expected:.0f} s or more, the limit is {limit:g} s")
    unet = load_unet(provider, case.torch_dtype, device)
    latents, step, text = inputs(case.N, case.B, case.torch_dtype, device)

    @contextlib.contextmanager
    def scope():
        forced = contextlib.nullcontext()
        if provider.startswith("linattn-"):
            forced = linattn.use_backend(provider.removeprefix("linattn-"))
        with forced, torch.no_grad():
            yield

    return Contender(lambda: unet(latents, step, text, return_dict=False)[0], scope)


def work(case: Case) -> tuple[float, float]:
    """(bytes, FLOPs) of the UNet with LinFusion: its weights, inputs and output once, and all its matrix products."""
    return _work(replace(case, name="", dtype="float32"), bundled.path(MODEL), torch.finfo(case.torch_dtype).bits // 8)


@functools.cache
def _work(case: Case, folder: Path, size: int) -> tuple[float, float]:
    from torch.utils.flop_counter import FlopCounterMode

    import linattn.flops  # noqa: F401

    meta = torch.device("meta")
    unet = load_unet("linattn-reference", torch.float32, meta)
    latents, step, text = inputs(case.N, case.B, torch.float32, meta)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(latents, step, text)
    numbers = sum(p.numel() for p in unet.parameters()) + 2 * latents.numel() + text.numel()
    return float(size * numbers), float(counter.get_total_flops())


# ---- what was recorded ------------------------------------------------------------------------------------------


def canvas(row: dict[str, str]) -> int:
    """Side in pixels of a recorded row's canvas."""
    return int(row["case"].split()[1])


def recorded(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of this family that hold a figure."""
    return [row for row in rows if row["family"] == NAME and row["p50"]]


def ours(rows: list[dict[str, str]]) -> str | None:
    """Our provider, the quickest at the largest canvas if there are several; None if there is none."""
    found = [r for r in recorded(rows) if r["metric"] == "time" and r["provider"].startswith("linattn-")]
    return min(found, key=lambda r: (-int(r["N"]), float(r["p50"])))["provider"] if found else None


def curve(rows: list[dict[str, str]], provider: str, metric: str) -> dict[int, float]:
    """Tokens -> seconds or bytes of one contender, in ascending order."""
    unit = {"time": 1e-3, "peak_memory": 2.0**20}[metric]
    found = [r for r in recorded(rows) if r["provider"] == provider and r["metric"] == metric]
    return dict(sorted((int(r["N"]), unit * float(r["p50"])) for r in found))


def exponent(points: dict[int, float]) -> float | None:
    """p of N^p through the two largest sizes; None with fewer than two."""
    if len(points) < 2:
        return None
    (n0, y0), (n1, y1) = list(points.items())[-2:]
    return math.log(y1 / y0) / math.log(n1 / n0)


def default_record(results: Path = runner.RESULTS) -> Path:
    """The recorded run that is drawn where none is named: the only one, or else that of a CPU.

    Raises:
        ValueError: there is none, or it is not clear which.
    """
    found = sorted(results.glob(f"*/{NAME}.csv"))
    chosen = found if len(found) < 2 else [path for path in found if path.parent.name.startswith("cpu")]
    if len(chosen) == 1:
        return chosen[0]
    if not found:
        raise ValueError(f"nothing is recorded under {results} yet: python -m benchmarks.{NAME} --save")
    raise ValueError("several runs are recorded, name one: " + ", ".join(map(str, found)))


# ---- figure -----------------------------------------------------------------------------------------------------

COLOURS = {"stock": "#b3446c", "ours": "#33658a", "naive": "#8a6d3b"}
GUIDE = "#9a9a9a"
TIME_TICKS = {1e-4: "0.1 ms", 1e-3: "1 ms", 1e-2: "10 ms", 0.1: "0.1 s", 1.0: "1 s", 10.0: "10 s", 100.0: "100 s"}
MEMORY_TICKS = {2.0 ** (20 + i): f"{2**i} MiB" if i < 10 else f"{2 ** (i - 10)} GiB" for i in range(0, 18, 2)}


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Two panels, time and memory against the tokens at the first level with self-attention, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, mine = recorded(rows), ours(rows)
    if mine is None:
        raise LookupError("there is nothing to draw")
    own = {"stock": (STOCK, "stock attention\n(softmax, fused)"), "ours": (mine, "linear attention\n(LinFusion)")}
    naive = own | {"naive": (NAIVE, "softmax unfused\n(memory only)")}
    panels, axes = plt.subplots(1, 2, figsize=(10, 4.7), facecolor="white")
    sizes = dict(sorted({int(r["N"]): canvas(r) for r in rows}.items()))
    _panel(axes[0], rows, own, "time", "Time of one evaluation", sizes)
    _panel(axes[1], rows, naive, "peak_memory", "Peak memory, beyond weights and inputs", sizes)
    row = next(r for r in rows if r["provider"] == mine)
    title = f"UNet of the bundled Stable Diffusion on larger canvases, batch {row['B']}, {row['dtype']}; "
    figures.write(panels, path, title, row)


def _panel(axis, rows, contenders: dict[str, tuple[str, str]], metric: str, title: str, sizes: dict[int, int]) -> None:
    curves = {}
    for key, (provider, _) in contenders.items():
        curves[key] = {n: y for n, y in curve(rows, provider, metric).items() if y > 0}
    axis.set(xscale="log", yscale="log")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("tokens at the first attention level\n(canvas side in pixels)", fontsize=10)
    smallest, largest = min(sizes), max(sizes)
    # Room on the right for the names of the curves.
    axis.set_xlim(smallest / 1.4, largest * (largest / smallest) ** 0.5 * 1.4)
    shown = _apart(list(sizes), 0.085 * math.log(largest / smallest))
    axis.set_xticks(shown, [f"{_short(n)}\n({sizes[n]})" for n in shown], fontsize=9)
    axis.minorticks_off()
    axis.grid(True, which="major", linewidth=0.3)
    if not any(curves.values()):
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=GUIDE)
        return
    for key, points in curves.items():
        if points:
            axis.plot(*zip(*points.items(), strict=True), color=COLOURS[key], marker="o", markersize=4.5, linewidth=1.8)
    low, high = (pick(y for points in curves.values() for y in points.values()) for pick in (min, max))
    axis.set_ylim(low / 2, high * 2.5)
    ticks = {"time": TIME_TICKS, "peak_memory": MEMORY_TICKS}[metric]
    shown = {y: text for y, text in ticks.items() if low / 2 <= y <= high * 2.5}
    axis.set_yticks(list(shown), list(shown.values()), fontsize=10)
    axis.minorticks_off()
    _name_curves(axis, {key: (points, contenders[key][1]) for key, points in curves.items() if points})
    for power, key in ((1, "ours"), (2, "naive" if curves.get("naive") else "stock")):
        _guide(axis, curves[key], power)


def _name_curves(axis, named: dict[str, tuple[dict[int, float], str]]) -> None:
    """Each name right of the curve's last point; away from another curve that goes on close by."""
    low, high = (math.log(y) for y in axis.get_ylim())
    step = 0.13 * (high - low)
    for key, (points, text) in named.items():
        end, height = list(points.items())[-1]
        others = [other for other, _ in named.values() if other is not points and max(other) > end and end in other]
        close = [gap for other in others if abs(gap := math.log(other[end] / height)) < step]
        away = 0 if not close else -1 if close[0] >= 0 else 1
        axis.annotate(
            text, (end * 1.12, height * math.exp(0.3 * away * step)), color=COLOURS[key],
            fontsize=10, fontweight="bold", va={-1: "top", 0: "center", 1: "bottom"}[away],
        )  # fmt: skip


def _guide(axis, points: dict[int, float], power: int) -> None:
    """A dashed line beside a curve: of slope N^2 above its upper end, of slope N below its middle."""
    if len(points) < 2:
        return
    tokens = list(points)
    start, end = tokens[-2:] if power == 2 or len(tokens) < 4 else (tokens[-4], tokens[-2])
    factor, beside, align = (1.9, 0.9, "right") if power == 2 else (0.45, 1.1, "left")
    heights = [factor * points[end] * (n / end) ** power for n in (start, math.sqrt(start * end), end)]
    axis.plot((start, end), (heights[0], heights[2]), color=GUIDE, linestyle="--", linewidth=1.0, zorder=1)
    where = (math.sqrt(start * end) * beside, heights[1] * (1.1 if power == 2 else 0.9))
    axis.annotate(
        "slope N" if power == 1 else "slope N²", where,
        color="#6a6a6a", fontsize=9, ha=align, va="bottom" if power == 2 else "top",
    )  # fmt: skip


def _short(tokens: int) -> str:
    return f"{tokens:,}" if tokens < 1000 else f"{tokens / 1000:.3g}k" if tokens < 1e6 else f"{tokens / 1e6:.3g}M"


def _apart(tokens: list[int], least: float) -> list[int]:
    """Those of the sizes whose tick labels do not touch: from the largest down, `least` apart in logarithms."""
    kept: list[int] = []
    for n in sorted(tokens, reverse=True):
        if not kept or math.log(kept[-1] / n) >= least:
            kept.append(n)
    return kept[::-1]


# ---- command line -----------------------------------------------------------------------------------------------

FAMILY = Family(
    name=NAME,
    title="time and memory of a Stable Diffusion UNet against tokens, stock attention and LinFusion",
    cases=cases,
    providers=providers,
    prepare=prepare,
    work=work,
    figure=figure,
    memory_cases=memory_cases,
    left_out=left_out,
)


def plot(source: Path | None, path: Path) -> Path:
    """Draw a recorded run into `path`.

    Raises:
        ValueError: there is no such record, or it holds nothing of this family, or matplotlib is missing.
    """
    source = default_record() if source is None else source
    if not source.is_file():
        raise ValueError(f"--plot: expected a record (CSV) of python -m benchmarks.{NAME}, found no file {source}")
    rows = record.read(source)
    if ours(rows) is None:
        raise ValueError(f"--plot: {source} holds no times of the family {NAME}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure(rows, path)
    except ImportError as error:
        raise ValueError(f"drawing needs matplotlib (pip install 'linattn[test]'): {error}") from None
    return path


def main(argv: list[str] | None = None) -> int:
    parser = runner.parser(FAMILY)
    help_ = f"measure nothing: draw this record (default: the one under benchmarks/results/) into {IMAGE.name}; "
    help_ += "--out: its folder (default: docs/images)"
    parser.add_argument("--plot", nargs="?", const="", metavar="CSV", help=help_)
    args = parser.parse_args(argv)
    if args.plot is not None:
        try:
            path = plot(Path(args.plot) if args.plot else None, (args.out or IMAGE.parent) / IMAGE.name)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        print(f"written: {path}")
        return 0
    if argv is None:
        environment.apply_allocation_policy()
    given = sys.argv[1:] if argv is None else list(argv)
    return runner.main(FAMILY, given if args.limit else [*given, "--limit", str(LIMIT)])


if __name__ == "__main__":
    sys.exit(main())
