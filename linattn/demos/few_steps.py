"""The bundled Stable Diffusion in 25 steps and in a few: by DDIM, and by students that were trained to take few.

All pictures are drawn from the same prompts and seeds; the students have the teacher's guidance in them, so that a step
of theirs is one call of the network and not two.
"""

from __future__ import annotations

import json
from pathlib import Path

from linattn.demos._comparison import PROMPTS, _duration
from linattn.demos._layout import Column, sheet, table

NAME = "few_steps"
SUMMARY = "25 steps and few: DDIM, and PeRFlow and Flash students, same prompts and seeds"
REQUIRES = ("diffusers", "transformers", "sklearn", "PIL")

STEPS = 25  # of the teacher
STUDENTS = {"tiny_sd_perflow": "PeRFlow", "tiny_sd_flash": "Flash"}
SEEDS = (0, 1)
SCORED = 20  # pictures of held-out orders per column

REAL_WEIGHTS = """\
from diffusers import StableDiffusionPipeline
from linattn import delta_weights
from linattn.schedulers import PeRFlowScheduler

pipe = StableDiffusionPipeline.from_pretrained("Lykon/dreamshaper-8")
delta_weights.merge(pipe.unet, delta_weights.load("hansyan/perflow-sd15-delta-weights", variant="v0-1"))
pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="diff_eps", num_time_windows=4)
pipe("a lighthouse in the fog", num_inference_steps=8, guidance_scale=7.5).images[0].save("lighthouse.png")"""


def run(out: Path, *, quick: bool, report) -> list[Path]:
    """Draw, score and time; see `linattn.demos` for the arguments.

    Writes few_steps.png (the pictures side by side) and few_steps.json (every figure).
    """
    import torch

    from linattn import bundled, few_steps
    from linattn.evaluate import draw

    prompts, seeds, scored = (PROMPTS[:2], SEEDS[:1], 2) if quick else (PROMPTS, SEEDS, SCORED)
    report(f"torch {torch.__version__}, threads: {torch.get_num_threads()}")
    cards = {name: json.loads((bundled.path(name) / "card.json").read_text()) for name in STUDENTS}
    fewest = min(card["steps"] for card in cards.values())
    ways = {
        "teacher": few_steps.teacher(steps=8 if quick else STEPS),
        "ddim": few_steps.teacher(steps=fewest, spacing="trailing"),
        **{name: few_steps.student(name, steps=card["steps"]) for name, card in cards.items()},
    }
    titles = {"teacher": "Teacher, DDIM", "ddim": "Teacher, DDIM", **STUDENTS}

    report(f"drawing {len(prompts)} prompts with {len(seeds)} seeds, {len(ways)} ways ...")
    texts, numbers = zip(*((prompt, seed) for prompt in prompts for seed in seeds), strict=True)
    drawn, records = {}, {}
    for name, way in ways.items():
        drawn[name] = draw(way, texts, seeds=numbers, steps=way.steps, guidance_scale=way.guidance)
        report(f"scoring {titles[name]}, {way.steps} steps ...")
        records[name] = few_steps.score(way, n=scored, lengths=(3,))

    figures = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "scores": records,
        "gain": {name: few_steps.gain(records[name], records["ddim"]) for name in STUDENTS},
    }
    picture, file = out / f"{NAME}.png", out / f"{NAME}.json"
    _picture(ways, titles, prompts, drawn, figures).save(picture)
    file.write_text(json.dumps(figures, indent=2) + "\n")

    rows = [
        [
            f"{titles[name]}, {way.steps} steps",
            str(way.network_calls),
            "{:.2f} [{:.2f}, {:.2f}]".format(*records[name]["summary"]["exact"][few_steps.HELD_OUT]),
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*figures["gain"][name]) if name in STUDENTS else "–",
            "{:.3f}".format(records[name]["summary"]["canvas_distance"][0]),
            _duration(records[name]["cpu_seconds"][0]),
        ]
        for name, way in ways.items()
    ]
    header = [
        "",
        "network calls",
        "exact sequence",
        f"above DDIM, {fewest} steps",
        "Frechet distance",
        "CPU time a picture",
    ]
    report("\n" + table(header, rows))
    report(
        f"\nOf {scored} unseen orders of three digits; brackets: 95 % bootstrap intervals, differences paired. Scores "
        "of more pictures,\nand of several students: docs/bundled_models.md. `linattn distill perflow_tiny_sd` and "
        "`flash_tiny_sd` train such students.\n\nThe same with real weights (downloads them; wants a GPU):\n\n"
        f"{REAL_WEIGHTS}"
    )
    return [picture, file]


def _picture(ways: dict, titles: dict, prompts, drawn: dict, figures: dict):
    """The comparison as one labelled sheet."""
    processor = ways["teacher"].pipe.image_processor
    images = {name: processor.numpy_to_pil(processor.pt_to_numpy(x)) for name, x in drawn.items()}
    per_prompt = len(images["teacher"]) // len(prompts)
    rows = [
        (f"“{prompt}”", [images[name][i * per_prompt : (i + 1) * per_prompt] for name in ways])
        for i, prompt in enumerate(prompts)
    ]
    columns = []
    for name, way in ways.items():
        record = figures["scores"][name]
        value, low, high = record["summary"]["exact"]["held out"]
        notes = [
            f"{way.network_calls} calls of the network, {_duration(record['cpu_seconds'][0])} of CPU a picture",
            f"{value:.0%} [{low:.0%}, {high:.0%}] of {record['settings']['n']} unseen orders of three digits read as "
            "asked",
        ]
        columns.append(Column(f"{titles[name]}: {way.steps} steps", notes))
    footer = (
        f"DDIM is guided by {ways['teacher'].guidance:g}, two calls of the network a step; the students have that in "
        "them. The prompt names the digits in reading order; which cells they stand in is the model's choice. The "
        "first three orders are not in the training data."
    )
    return sheet("Bundled Stable Diffusion in a few steps: same prompts, same seeds", columns, rows, footer, zoom=1)
