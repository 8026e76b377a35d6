"""The bundled Stable Diffusion with its own self-attention and with ours, distilled and not: pictures, times, scores.

The model draws several digits in the order of the prompt, in cells of its own choice, so that the cells must agree:
what self-attention is for (linattn.bundled.canvases). All pictures are drawn from the same prompts and seeds.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from linattn.demos._layout import Column, sheet, table

NAME = "stable_diffusion"
SUMMARY = "a small Stable Diffusion with stock attention and with linear attention, same prompts and seeds"
REQUIRES = ("diffusers", "transformers", "sklearn", "PIL")

MODEL, STUDENT = "tiny_sd", "tiny_sd_linfusion"
# The first three are orders that training never saw (linattn.bundled.canvases.held_out).
PROMPTS = (
    "a six, a one, an eight and a three",
    "a two and a five",
    "a zero and a seven",
    "a seven, a two and a four",
    "a three and an eight",
)
SEEDS = (0, 1, 2)
STEPS, GUIDANCE = 15, 2.5
SCORED = 24  # pictures of held-out orders per variant
ENLARGED = (1, 4, 8)  # sides, as multiples of the trained one, at which attention layers are timed
STOCK, BEFORE, OURS = "teacher", "before", "after"

REAL_WEIGHTS = """\
from diffusers import StableDiffusionPipeline
from linattn.adapters import LinFusion

pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
LinFusion.construct_for(pipe)  # fetches the published weights that belong to this model
pipe("an astronaut riding a horse on Mars").images[0].save("astronaut.png")"""


def run(out: Path, *, quick: bool, report) -> list[Path]:
    """Draw, score and time; see `linattn.demos` for the arguments.

    Writes `stable_diffusion.png` (the pictures side by side) and `stable_diffusion.json` (every figure).
    """
    import torch
    from tqdm.auto import tqdm

    from linattn import backend, bundled
    from linattn.adapters import LinFusion
    from linattn.cli.eval import load_pipeline, tables, variants
    from linattn.evaluate import draw, evaluate_canvases

    prompts, seeds, steps, scored, enlarged = PROMPTS, SEEDS, STEPS, SCORED, ENLARGED
    if quick:
        prompts, seeds, steps, scored, enlarged = PROMPTS[:2], SEEDS[:1], 4, 2, ENLARGED[:1]
    runs_on = backend.choose("linear_attention", torch.device("cpu"), torch.float32)
    report(
        f"torch {torch.__version__}, threads: {torch.get_num_threads()}; linear attention runs on backend {runs_on!r}"
    )
    pipe, student = load_pipeline(bundled.path(MODEL)), bundled.path(STUDENT)
    ways = variants(student)

    report(f"drawing {len(prompts)} prompts with {len(seeds)} seeds, three ways ...")
    drawn = {}
    for name in (STOCK, BEFORE, OURS):
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        texts, numbers = zip(*pairs, strict=True)
        with ways[name](pipe):
            drawn[name] = draw(pipe, texts, seeds=numbers, steps=steps, guidance_scale=GUIDANCE)

    with tqdm(desc="drawing pictures to score", unit="picture", leave=False, disable=None, file=sys.stderr) as bar:
        done = defaultdict(int)

        def progress(name: str, count: int, total: int) -> None:
            bar.total = total * len(ways)
            bar.update(count - done[name])
            done[name] = count

        result = evaluate_canvases(
            pipe, ways, n=scored, lengths=(3,), steps=steps, guidance_scale=GUIDANCE, progress=progress
        )

    report("timing pictures and attention layers ...")
    pipes = {STOCK: pipe, OURS: load_pipeline(bundled.path(MODEL))}
    linfusion = LinFusion.construct_for(pipes[OURS], pretrained_model_name_or_path=str(student))
    seconds = _picture_times(pipes, prompts[0], steps, rounds=1 if quick else 5)
    trained = pipe.unet.config.sample_size * pipe.vae_scale_factor
    layers = _layer_times(pipes, [trained * factor for factor in enlarged])
    linfusion.unmount()
    again = {name: draw(one, prompts[:1], seeds=[0], steps=2) for name, one in pipes.items()}
    restored = torch.equal(again[STOCK], again[OURS])

    figures = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": runs_on,
        "steps": steps,
        "guidance_scale": GUIDANCE,
        "seconds_per_picture": seconds,
        "layers": layers,
        "unmounting_restores_the_pictures": restored,
        "scores": result.to_json(),
    }
    picture, numbers = out / f"{NAME}.png", out / f"{NAME}.json"
    _picture(pipe, prompts, drawn, len(seeds), figures, result).save(picture)
    numbers.write_text(json.dumps(figures, indent=2) + "\n")

    report("\n" + tables(result))
    report("\n" + _layer_table(layers))
    if layers[0][f"{OURS}_seconds"] > layers[0][f"{STOCK}_seconds"]:
        report(
            f"At {layers[0]['tokens']} tokens the branches that LinFusion adds to a layer cost more than its "
            "attention saves; linear attention is for many tokens."
        )
    report(
        f"\na picture of {trained} x {trained}: {_duration(seconds[STOCK])} with stock attention, "
        f"{_duration(seconds[OURS])} with ours"
        f"\nafter unmount() the pictures are {'' if restored else 'NOT '}those of the stock model again"
        f"\nThe scores above are of {scored} pictures; those of the model are of more: linattn eval"
        f"\n\nThe same with real weights (downloads them; wants a GPU):\n\n{REAL_WEIGHTS}"
    )
    return [picture, numbers]


def _picture_times(pipes: dict, prompt: str, steps: int, rounds: int) -> dict[str, float]:
    """Median seconds of one picture. The sides take turns, so that a busy moment does not fall on one of them alone."""
    from linattn.evaluate import draw

    seconds = defaultdict(list)
    for r in range(rounds + 1):
        for side, pipe in pipes.items():
            start = time.perf_counter()
            draw(pipe, [prompt], seeds=[r], steps=steps, guidance_scale=GUIDANCE)
            if r > 0:  # the first run of each pays for allocation
                seconds[side].append(time.perf_counter() - start)
    return {side: statistics.median(times) for side, times in seconds.items()}


class _LayerClock(contextlib.AbstractContextManager):
    """Times every call of every `attn1` of a UNet, whole: projections, attention, output. tokens -> seconds."""

    def __init__(self, unet):
        self.seconds: dict[int, list[float]] = defaultdict(list)
        self.layers = [module for name, module in unet.named_modules() if name.endswith(".attn1")]

    def __enter__(self):
        self.handles = [layer.register_forward_pre_hook(self._start) for layer in self.layers]
        self.handles += [layer.register_forward_hook(self._stop) for layer in self.layers]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _start(self, layer, inputs):
        self.begin = time.perf_counter()

    def _stop(self, layer, inputs, output):
        self.seconds[inputs[0].shape[1]].append(time.perf_counter() - self.begin)


def _layer_times(pipes: dict, canvases) -> list[dict]:
    """Median seconds of one self-attention layer by canvas and number of tokens, with batch 2 as guidance needs it."""
    import torch

    rows = []
    for canvas in canvases:
        unet = pipes[STOCK].unet
        side_length = canvas // pipes[STOCK].vae_scale_factor
        rng = torch.Generator().manual_seed(0)
        latents = torch.randn(2, unet.config.in_channels, side_length, side_length, generator=rng)
        text = torch.randn(2, 8, unet.config.cross_attention_dim, generator=rng)
        clocks = {side: _LayerClock(pipe.unet) for side, pipe in pipes.items()}
        start = time.perf_counter()
        # The first pass warms up. At least two more, then as many as fit into some seconds.
        for passed in range(40):
            for side, pipe in pipes.items():
                with torch.no_grad(), clocks[side]:
                    pipe.unet(latents, 500, text)
                if passed == 0:
                    clocks[side].seconds.clear()
            if passed >= 2 and time.perf_counter() - start > 4:
                break
        for tokens in sorted(clocks[STOCK].seconds, reverse=True):
            rows.append(
                {
                    "canvas": canvas,
                    "tokens": tokens,
                    **{f"{side}_seconds": statistics.median(clocks[side].seconds[tokens]) for side in pipes},
                }
            )
    return rows


def _layer_table(layers: list[dict]) -> str:
    rows = [
        [
            f"{row['canvas']} x {row['canvas']}",
            f"{row['tokens']}",
            f"{1e3 * row[f'{STOCK}_seconds']:.2f}",
            f"{1e3 * row[f'{OURS}_seconds']:.2f}",
            f"{row[f'{STOCK}_seconds'] / row[f'{OURS}_seconds']:.2f}",
        ]
        for row in layers
    ]
    return table(["one self-attention layer, batch 2", "tokens", "stock ms", "linattn ms", "stock / linattn"], rows)


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.{2 if milliseconds < 1 else 1 if milliseconds < 10 else 0}f} ms"


def _picture(pipe, prompts, drawn: dict, per_prompt: int, figures: dict, result):
    """The comparison as one labelled sheet."""
    images = {side: pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(x)) for side, x in drawn.items()}
    rows = [
        (f"“{prompt}”", [images[side][i * per_prompt : (i + 1) * per_prompt] for side in drawn])
        for i, prompt in enumerate(prompts)
    ]
    widest = {}  # per canvas, the level with the most tokens; it comes first
    for row in figures["layers"]:
        widest.setdefault(row["canvas"], row)
    titles = {
        STOCK: "Stock attention (softmax)",
        BEFORE: "Linear attention, not distilled",
        OURS: "Linear attention, distilled (linattn)",
    }
    columns = []
    for side, title in titles.items():
        exact = result.summary(side)["exact"]["3 digits"]
        notes = [
            f"{exact[0]:.0%} [{exact[1]:.0%}, {exact[2]:.0%}] of {result.settings['n']} unseen orders of three digits "
            "read as asked"
        ]
        if side in figures["seconds_per_picture"]:
            notes += [
                f"{_duration(figures['seconds_per_picture'][side])} per picture; attention layer: "
                + ", ".join(f"{_duration(row[f'{side}_seconds'])} at {row['tokens']:,}" for row in widest.values())
                + " tokens"
            ]
        columns.append(Column(title, notes))
    return sheet(
        "Bundled Stable Diffusion: same prompts, same seeds",
        columns,
        rows,
        f"DDIM, {figures['steps']} steps, guidance {figures['guidance_scale']:g}, backend {figures['backend']}. The "
        "prompt names the digits in reading order; which cells they stand in is the model's choice. The first three "
        "orders are not in its training data.",
        zoom=1,
    )
