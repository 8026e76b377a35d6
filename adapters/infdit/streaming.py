"""How Inf-DiT walks over an image: which schedule fits into how much memory.

A block needs itself and its neighbours to the top left, left and top, of the same layer. So any order that goes down
is exact, and three are worth having:

    full         one strip, the whole picture
    layer_major  layer by layer; each layer walks down the strips and changes the hidden state in place. Holds the
                 hidden state of the picture, and keys and values of one row of blocks.
    streaming    strip by strip, each through all layers. Holds keys and values of one row of blocks for every layer,
                 and of the picture nothing.

With L layers of width C and blocks of b x b tokens, streaming holds 2 L b C elements per column of tokens, layer_major
C elements per token: layer_major holds less below 2 L rows of blocks (L = 28, blocks of 128 pixels: 7168 pixels).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

SCHEDULES = ("full", "layer_major", "streaming")
#: Names of the authors' sampler. Both mean its exact form: their "ar" as it is misses keys and mixes up embeddings.
ALIASES = {"ar": "streaming", "ar2": "streaming"}


@dataclass(frozen=True)
class Plan:
    """A way through an image.

    Attributes:
        schedule: "full", "layer_major" or "streaming".
        rows: rows of blocks to a strip; None: all.
        keep_lr: whether keys and values of the low resolution are held (`LRContext`), or projected again.
        peak_bytes: what one call of the network allocates at most, weights not counted; 0 where nobody asked.
    """

    schedule: str
    rows: int | None = None
    keep_lr: bool = True
    peak_bytes: int = 0


def resolve(schedule: str | Plan) -> Plan:
    """A plan from a name; one row of blocks to a strip.

    Raises:
        ValueError: a name that is none.
    """
    if isinstance(schedule, Plan):
        if schedule.schedule not in SCHEDULES or (schedule.rows is not None and schedule.rows < 1):
            raise ValueError(f"expected a Plan with a schedule of {SCHEDULES} and rows None or >= 1, got {schedule}")
        return schedule
    name = ALIASES.get(schedule, schedule)
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a Plan, got {schedule!r}")
    return Plan(name, None if name == "full" else 1)
