"""A bundled model drawn in several ways from the same prompts and seeds: pictures, times, scores. Parts declare one."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from linattn.demos._layout import Column, sheet, table

# The first three are orders that training never saw (linattn.bundled.canvases.held_out).
PROMPTS = (
    "a six, a one, an eight and a three",
    "a two and a five",
    "a zero and a seven",
    "a seven, a two and a four",
    "a three and an eight",
)
SEEDS = (0, 1, 2)
SCORED = 24  # pictures of held-out orders per variant
ENLARGED = (1, 4, 8)  # sides, as multiples of the trained one, at which attention layers are timed


@dataclass(frozen=True)
class Comparison:
    """What a part shows.

    Attributes:
        name: of the files that are written.
        model: the bundled pipeline.
        variants: name -> function of the pipeline that gives a context, see `linattn.evaluate.evaluate_canvases`.
        titles: the same names -> words for the tables.
        columns: those that are drawn side by side -> headline.
        stock, ours: the two that are timed against each other.
        op: the op that ours runs.
        denoiser: name of the pipeline's component that holds the attention layers.
        layers: which names of its modules are attention layers.
        evaluate: one evaluation of it on a canvas of so many pixels a side: (pipe, side) -> function without arguments.
        steps, guidance_scale: of the sampler.
        headline, footer: of the picture.
        slower: what to say where ours is the slower one at the trained size.
        real_weights: code that does the same with weights from the hub.
    """

    name: str
    model: str
    variants: Mapping[str, Callable]
    titles: Mapping[str, str]
    columns: Mapping[str, str]
    stock: str
    ours: str
    op: str
    denoiser: str
    layers: Callable[[str], bool]
    evaluate: Callable[[object, int], Callable[[], object]]
    steps: int
    guidance_scale: float
    headline: str
    footer: str
    slower: str
    real_weights: str


def run(it: Comparison, out: Path, *, quick: bool, report) -> list[Path]:
    """Draw, score and time; see `linattn.demos` for the arguments.

    Writes NAME.png (the pictures side by side) and NAME.json (every figure).
    """
    import torch
    from tqdm.auto import tqdm

    from linattn import backend, bundled
    from linattn.bundled import canvases
    from linattn.cli.eval import load_pipeline, tables
    from linattn.evaluate import draw, evaluate_canvases

    prompts, seeds, steps, scored, enlarged = PROMPTS, SEEDS, it.steps, SCORED, ENLARGED
    if quick:
        prompts, seeds, steps, scored, enlarged = PROMPTS[:2], SEEDS[:1], 4, 2, ENLARGED[:1]
    settings = {"guidance_scale": it.guidance_scale, "side": canvases.RESOLUTION}
    runs_on = backend.choose(it.op, torch.device("cpu"), torch.float32)
    report(f"torch {torch.__version__}, threads: {torch.get_num_threads()}; {it.op} runs on backend {runs_on!r}")
    pipe = load_pipeline(bundled.path(it.model))

    report(f"drawing {len(prompts)} prompts with {len(seeds)} seeds, {len(it.columns)} ways ...")
    drawn = {}
    for name in it.columns:
        texts, numbers = zip(*((prompt, seed) for prompt in prompts for seed in seeds), strict=True)
        with it.variants[name](pipe):
            drawn[name] = draw(pipe, texts, seeds=numbers, steps=steps, **settings)

    with tqdm(desc="drawing pictures to score", unit="picture", leave=False, disable=None, file=sys.stderr) as bar:
        done = defaultdict(int)

        def progress(name: str, count: int, total: int) -> None:
            bar.total = total * len(it.variants)
            bar.update(count - done[name])
            done[name] = count

        result = evaluate_canvases(
            pipe,
            it.variants,
            n=scored,
            lengths=(3,),
            steps=steps,
            guidance_scale=it.guidance_scale,
            reference=it.stock,
            progress=progress,
        )

    report("timing pictures and attention layers ...")
    pipes = {it.stock: pipe, it.ours: load_pipeline(bundled.path(it.model))}
    with it.variants[it.ours](pipes[it.ours]):
        seconds = _picture_times(pipes, prompts[0], steps, settings, rounds=1 if quick else 5)
        layers = _layer_times(it, pipes, [canvases.RESOLUTION * factor for factor in enlarged])
    again = {name: draw(one, prompts[:1], seeds=[0], steps=2, **settings) for name, one in pipes.items()}
    restored = torch.equal(again[it.stock], again[it.ours])

    figures = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": runs_on,
        "steps": steps,
        "guidance_scale": it.guidance_scale,
        "seconds_per_picture": seconds,
        "layers": layers,
        "unmounting_restores_the_pictures": restored,
        "scores": result.to_json(),
    }
    picture, numbers = out / f"{it.name}.png", out / f"{it.name}.json"
    _picture(it, pipe, prompts, drawn, len(seeds), figures, result).save(picture)
    numbers.write_text(json.dumps(figures, indent=2) + "\n")

    report("\n" + tables(result, it.titles))
    report("\n" + _layer_table(it, layers))
    if layers[0][f"{it.ours}_seconds"] > layers[0][f"{it.stock}_seconds"]:
        report(f"At {layers[0]['tokens']} tokens {it.slower}")
    side = canvases.RESOLUTION
    report(
        f"\na picture of {side} x {side}: {_duration(seconds[it.stock])} with stock attention, "
        f"{_duration(seconds[it.ours])} with ours"
        f"\nafter unmount() the pictures are {'' if restored else 'NOT '}those of the stock model again"
        f"\nThe scores above are of {scored} pictures; those of the model are of more: linattn eval --model {it.model}"
        f"\n\nThe same with real weights (downloads them; wants a GPU):\n\n{it.real_weights}"
    )
    return [picture, numbers]


def _picture_times(pipes: dict, prompt: str, steps: int, settings: dict, rounds: int) -> dict[str, float]:
    """Median seconds of one picture. The sides take turns, so that a busy moment does not fall on one of them alone."""
    from linattn.evaluate import draw

    seconds = defaultdict(list)
    for r in range(rounds + 1):
        for side, pipe in pipes.items():
            start = time.perf_counter()
            draw(pipe, [prompt], seeds=[r], steps=steps, **settings)
            if r > 0:  # the first run of each pays for allocation
                seconds[side].append(time.perf_counter() - start)
    return {side: statistics.median(times) for side, times in seconds.items()}


class _LayerClock(contextlib.AbstractContextManager):
    """Times every call of attention layers, whole: projections, attention, output. tokens, text too -> seconds."""

    def __init__(self, layers: Sequence):
        self.seconds: dict[int, list[float]] = defaultdict(list)
        self.layers = layers

    def __enter__(self):
        self.handles = [layer.register_forward_pre_hook(self._start, with_kwargs=True) for layer in self.layers]
        self.handles += [layer.register_forward_hook(self._stop, with_kwargs=True) for layer in self.layers]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _start(self, layer, args, kwargs):
        self.begin = time.perf_counter()

    def _stop(self, layer, args, kwargs, output):
        passed = time.perf_counter() - self.begin
        hidden, text = args[0] if args else kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
        self.seconds[hidden.shape[1] + (0 if text is None else text.shape[1])].append(passed)


def _layer_times(it: Comparison, pipes: dict, sides: Sequence[int]) -> list[dict]:
    """Median seconds of one attention layer by canvas and number of tokens, with batch 2 as guidance needs it."""
    import torch

    rows = []
    for side in sides:
        models = {name: getattr(pipe, it.denoiser) for name, pipe in pipes.items()}
        calls = {name: it.evaluate(pipe, side) for name, pipe in pipes.items()}
        clocks = {
            name: _LayerClock([module for path, module in model.named_modules() if it.layers(path)])
            for name, model in models.items()
        }
        start = time.perf_counter()
        # The first pass warms up. At least two more, then as many as fit into some seconds.
        for passed in range(40):
            for name in pipes:
                with torch.no_grad(), clocks[name]:
                    calls[name]()
                if passed == 0:
                    clocks[name].seconds.clear()
            if passed >= 2 and time.perf_counter() - start > 4:
                break
        for tokens in sorted(clocks[it.stock].seconds, reverse=True):
            medians = {f"{name}_seconds": statistics.median(clocks[name].seconds[tokens]) for name in pipes}
            rows.append({"canvas": side, "tokens": tokens, **medians})
    return rows


def _layer_table(it: Comparison, layers: list[dict]) -> str:
    rows = [
        [
            f"{row['canvas']} x {row['canvas']}",
            f"{row['tokens']}",
            f"{1e3 * row[f'{it.stock}_seconds']:.2f}",
            f"{1e3 * row[f'{it.ours}_seconds']:.2f}",
            f"{row[f'{it.stock}_seconds'] / row[f'{it.ours}_seconds']:.2f}",
        ]
        for row in layers
    ]
    return table(["one attention layer, batch 2", "tokens", "stock ms", "linattn ms", "stock / linattn"], rows)


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.{2 if milliseconds < 1 else 1 if milliseconds < 10 else 0}f} ms"


def _picture(it: Comparison, pipe, prompts, drawn: dict, per_prompt: int, figures: dict, result):
    """The comparison as one labelled sheet."""
    images = {name: pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(x)) for name, x in drawn.items()}
    rows = [
        (f"“{prompt}”", [images[name][i * per_prompt : (i + 1) * per_prompt] for name in drawn])
        for i, prompt in enumerate(prompts)
    ]
    widest = {}  # per canvas, the level with the most tokens; it comes first
    for row in figures["layers"]:
        widest.setdefault(row["canvas"], row)
    columns = []
    for name, title in it.columns.items():
        exact = result.summary(name)["exact"]["3 digits"]
        notes = [
            f"{exact[0]:.0%} [{exact[1]:.0%}, {exact[2]:.0%}] of {result.settings['n']} unseen orders of three digits "
            "read as asked"
        ]
        if name in figures["seconds_per_picture"]:
            notes += [
                f"{_duration(figures['seconds_per_picture'][name])} per picture; attention layer: "
                + ", ".join(f"{_duration(row[f'{name}_seconds'])} at {row['tokens']:,}" for row in widest.values())
                + " tokens"
            ]
        columns.append(Column(title, notes))
    footer = (
        f"{it.footer}, {figures['steps']} steps, guidance {figures['guidance_scale']:g}, backend "
        f"{figures['backend']}. The prompt names the digits in reading order; which cells they stand in is the model's "
        "choice. The first three orders are not in its training data."
    )
    return sheet(it.headline, columns, rows, footer, zoom=1)
