"""What a bundled model and its controls score, from the card.json that their training wrote."""

from __future__ import annotations

import json

from linattn import bundled

from . import _format as f


def render(model: str, titles: dict[str, str], sampler: str) -> str:
    """The table of one bundled model.

    Args:
        titles: name of a variant in the card -> what the row is called, in the order of the rows.
        sampler: its name.
    """
    card = json.loads((bundled.path(model) / "card.json").read_text())
    scores, settings = card["scores"], card["scores"]["settings"]
    lengths = [f"{count} digits" for count in settings["digits"]]
    columns = ["", *lengths, "Frechet distance", "difference to the teacher", "diversity"]
    lines = [[title, *_line(scores[name], lengths)] for name, title in titles.items()]
    return "\n\n".join(
        [
            f.table(columns, lines),
            f"`linattn eval --model {model}` gives these figures. Per number of digits: the share of pictures on which "
            f"a classifier trained on real digits (it reads {scores['judge_accuracy']:.1%} of held-out ones) reads "
            "exactly the digits that the prompt names, in order; orders that were never trained on, n = "
            f"{settings['n']} each; in brackets 95 % bootstrap intervals. Frechet distance: of the ink of whole "
            "canvases, to canvases of held-out scans. Difference: mean squared, same prompt and seed, pixels in 0..1. "
            f"Diversity: of pictures of one prompt, relative to real ones. {sampler}, {settings['steps']} steps, "
            f"guidance {settings['guidance_scale']:g}, seed {settings['seed']}; torch {card['versions']['torch']}; "
            f"{card['date']}.",
        ]
    )


def _line(figures: dict, lengths: list[str]) -> list[str]:
    return [
        *(_interval(figures["exact"][length], 2) for length in lengths),
        _interval(figures["canvas_distance"], 3),
        _interval(figures["error"], 4),
        _interval(figures["canvas_diversity"], 2),
    ]


def _interval(figure, places: int) -> str:
    if figure is None:
        return "—"
    value, low, high = (f"{x:.{places}f}" for x in figure)
    return value if low == high == value else f"{value} [{low}, {high}]"
