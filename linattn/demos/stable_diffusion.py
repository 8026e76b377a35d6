"""The bundled Stable Diffusion, with its own self-attention and with ours mounted: pictures, times, scores.

The weights are the same on both sides: ours takes over the projections of the model, and nothing is distilled. What
differs in the pictures is therefore the attention function itself.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

from linattn.demos._layout import Column, sheet, table

NAME = "stable_diffusion"
SUMMARY = "a small Stable Diffusion with stock attention and with linear attention, same prompts and seeds"
REQUIRES = ("diffusers", "transformers", "sklearn", "PIL")

PROMPTS = (
    "a handwritten three",
    "the number eight",
    "a drawing of the number two",
    "please show me a nice seven in ink",
    "my cat wrote the number four yesterday",
    "5",
)
SEEDS = (0, 1, 2, 3)
STEPS, GUIDANCE = 20, 3.0
ROUNDS = 10  # batches of the ten digits that are scored and timed
CANVASES = (64, 512, 1024)  # sides in pixels at which the layers are timed; the model was trained for the first
STOCK, OURS = "stock", "linattn"

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

    from linattn import backend
    from linattn.adapters import LinFusion

    prompts, seeds = (PROMPTS[:2], SEEDS[:2]) if quick else (PROMPTS, SEEDS)
    runs_on = backend.choose("linear_attention", torch.device("cpu"), torch.float32)
    report(
        f"torch {torch.__version__}, threads: {torch.get_num_threads()}; linear attention runs on backend {runs_on!r}"
    )

    pipes = {STOCK: _load(), OURS: _load()}
    linfusion = LinFusion.construct_for(pipes[OURS], load_pretrained=False)
    report(f"linear attention took the place of {len(linfusion.modules_dict)} self-attention layers")
    report(f"drawing {len(prompts)} prompts with {len(seeds)} seeds, both ways ...")
    drawn = {side: _draw(pipe, prompts, seeds) for side, pipe in pipes.items()}
    rounds = 1 if quick else ROUNDS
    report(f"drawing {10 * rounds} digits to score, both ways ...")
    scores = _score(pipes, rounds)
    report("timing the attention layers ...")
    layers = _layer_times(pipes, CANVASES[:1] if quick else CANVASES)
    linfusion.unmount()
    restored = torch.equal(_draw(pipes[OURS], prompts[:1], seeds), _draw(pipes[STOCK], prompts[:1], seeds))

    figures = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": runs_on,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "scored": 10 * rounds,
        **scores,
        "layers": layers,
        "unmounting_restores_the_pictures": restored,
    }
    picture, numbers = out / f"{NAME}.png", out / f"{NAME}.json"
    _picture(pipes[STOCK], prompts, drawn, len(seeds), figures).save(picture)
    numbers.write_text(json.dumps(figures, indent=2) + "\n")

    report("\n" + _score_table(figures))
    report("\n" + _layer_table(layers))
    if layers[0]["linattn_seconds"] > layers[0]["stock_seconds"]:
        report(
            f"At {layers[0]['tokens']} tokens the branches that LinFusion adds to a layer cost more than its "
            "attention saves; linear attention is for many tokens."
        )
    report(
        f"\nsame-seed difference between the two sides (MSE, pixels in 0..1): {scores['same_seed_mse']:.5f}"
        f"\nafter unmount() the pictures are {'' if restored else 'NOT '}those of the stock model again"
        "\nSingle digits are an easy task: accuracies near 1 show that both work, not that they are equally good."
        f"\n\nThe same with real weights (downloads them; wants a GPU):\n\n{REAL_WEIGHTS}"
    )
    return [picture, numbers]


def _load():
    """The bundled pipeline, through the path that real weights take."""
    import diffusers.utils.logging
    import transformers.utils.logging
    from diffusers import StableDiffusionPipeline

    from linattn import bundled

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(bundled.path("tiny_sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe, prompts, seeds):
    """Every prompt with every seed, (prompts * seeds, 3, height, width), the seeds of one prompt together."""
    from linattn import evaluate

    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    texts, numbers = zip(*pairs, strict=True)
    return evaluate.draw(pipe, texts, seeds=numbers, steps=STEPS, guidance_scale=GUIDANCE)


def _score(pipes: dict, rounds: int) -> dict:
    """Accuracy, Frechet distance and time per picture of both sides, and how far apart their pictures are.

    The sides take turns, batch by batch, so that a busy moment of the machine does not fall on one of them alone.
    """
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    from linattn import evaluate
    from linattn.bundled import digits

    prompts = [digits.prompt(digit) for digit in range(10)]
    made, seconds = defaultdict(list), defaultdict(list)
    for pipe in pipes.values():  # the first run of each pays for allocation
        evaluate.draw(pipe, prompts, seeds=range(10), steps=1, guidance_scale=GUIDANCE)
    for r in tqdm(range(rounds), desc="batches of ten", leave=False, disable=None):
        for side in list(pipes)[:: 1 if r % 2 == 0 else -1]:
            start = time.perf_counter()
            seeds = range(1000 + 10 * r, 1010 + 10 * r)
            made[side].append(evaluate.draw(pipes[side], prompts, seeds=seeds, steps=STEPS, guidance_scale=GUIDANCE))
            seconds[side].append(time.perf_counter() - start)
    labels = list(range(10)) * rounds
    pictures = {side: torch.cat(parts) for side, parts in made.items()}
    split = digits.load()
    real = evaluate.pixel_features(digits.render(split.test))
    others = np.random.default_rng(0).permutation(split.train)[: len(labels)]  # what as many real digits would score
    return {
        "real_accuracy": evaluate.digit_classifier().held_out_accuracy,
        "real_frechet_distance": evaluate.frechet_distance(evaluate.pixel_features(digits.render(others)), real),
        "same_seed_mse": evaluate.image_mse(pictures[STOCK], pictures[OURS]),
    } | {
        side: {
            "accuracy": evaluate.accuracy(pictures[side], labels),
            "frechet_distance": evaluate.frechet_distance(evaluate.pixel_features(pictures[side]), real),
            "seconds_per_image": statistics.median(seconds[side]) / 10,
        }
        for side in pipes
    }


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


def _score_table(figures: dict) -> str:
    rows = [
        [
            name,
            f"{figures[side]['accuracy']:.2f}",
            f"{figures[side]['frechet_distance']:.3f}",
            f"{figures[side]['seconds_per_image']:.3f}",
        ]
        for name, side in (("stock attention", STOCK), ("linear attention", OURS))
    ]
    header = [f"{figures['scored']} digits, {figures['steps']} steps", "accuracy", "Frechet distance", "s per image"]
    real = ["real digits", f"{figures['real_accuracy']:.2f}", f"{figures['real_frechet_distance']:.3f}", ""]
    return table(header, [*rows, real])


def _layer_table(layers: list[dict]) -> str:
    rows = [
        [
            f"{row['canvas']} x {row['canvas']}",
            f"{row['tokens']}",
            f"{1e3 * row['stock_seconds']:.2f}",
            f"{1e3 * row['linattn_seconds']:.2f}",
            f"{row['stock_seconds'] / row['linattn_seconds']:.2f}",
        ]
        for row in layers
    ]
    return table(["one self-attention layer, batch 2", "tokens", "stock ms", "linattn ms", "stock / linattn"], rows)


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.{2 if milliseconds < 1 else 1 if milliseconds < 10 else 0}f} ms"


def _picture(pipe, prompts, drawn: dict, per_prompt: int, figures: dict):
    """The comparison as one labelled sheet."""
    images = {side: pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(x)) for side, x in drawn.items()}
    rows = [
        (f"“{prompt}”", [images[side][i * per_prompt : (i + 1) * per_prompt] for side in (STOCK, OURS)])
        for i, prompt in enumerate(prompts)
    ]
    widest = {}  # per canvas, the level with the most tokens; it comes first
    for row in figures["layers"]:
        widest.setdefault(row["canvas"], row)
    columns = [
        Column(
            title,
            [
                f"{figures[side]['accuracy']:.0%} of {figures['scored']} digits read as asked, "
                f"{_duration(figures[side]['seconds_per_image'])} per picture",
                "attention layer: "
                + ", ".join(f"{_duration(row[f'{side}_seconds'])} at {row['tokens']:,}" for row in widest.values())
                + " tokens",
            ],
        )
        for title, side in (
            ("Stock attention (softmax)", STOCK),
            (f"linattn: linear attention (backend {figures['backend']})", OURS),
        )
    ]
    return sheet(
        "Bundled Stable Diffusion: same weights, prompts and seeds",
        columns,
        rows,
        f"DDIM, {figures['steps']} steps, guidance {figures['guidance_scale']:g}. Nothing is distilled: the "
        f"projections are copied, only the attention function differs (same-seed MSE {figures['same_seed_mse']:.4f}).",
    )
