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

import math
import os
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


#: Of the memory that is free, what "auto" takes: other processes and the allocator want some too.
SHARE = 0.8
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def plan(
    model,
    batch: int,
    height: int,
    width: int,
    max_memory: int | str | None = "auto",
    *,
    schedule: str | None = None,
) -> Plan:
    """The schedule with the longest strips that keeps one call of the network within `max_memory`.

    Longer strips cost nothing but memory, so of the schedules that fit the one with the longest is taken: "full", else
    "layer_major", else "streaming"; and keys and values of the low resolution are held where they still fit.

    Args:
        model: `InfDiTTransformer2DModel`; its dtype and device count.
        height, width: pixels of the output, multiples of `model.block_pixels`.
        max_memory: bytes, or text such as "4GiB" or "500 MB" (MB and MiB are both 2^20 bytes); "auto": four fifths of
            what is free on the device of the model; None: no limit. Weights are not counted, and neither is what the
            caller holds.
        schedule: take this one, with the longest strips that fit.

    Raises:
        ValueError: nothing fits; the message says what the smallest needs. A size or limit that is none.
    """
    budget = memory_limit(max_memory, model.device)
    names = SCHEDULES if schedule is None else (resolve(schedule).schedule,)
    blocks = height // model.block_pixels
    smallest = None
    for name in names:
        for rows in [None] if name == "full" else _lengths(blocks):
            for keep in (True, False):
                need = peak_bytes(model, batch, height, width, Plan(name, rows, keep))
                if budget is None or need <= budget:
                    return Plan(name, rows, keep, need)
                smallest = need if smallest is None else min(smallest, need)
    raise ValueError(
        f"max_memory: expected at least {_mib(smallest)} for {batch} x {height} x {width} pixels"
        f"{'' if schedule is None else f' with schedule {schedule!r}'}, got {_mib(budget)}"
    )


def _mib(count: int) -> str:
    mib = count / 2**20
    return f"{mib:,.0f} MiB" if mib >= 100 else f"{mib:.3g} MiB"


def _lengths(blocks: int) -> list[int]:
    """Strips of all blocks, half of them, ... one: finer steps gain nothing."""
    lengths = [blocks]
    while lengths[-1] > 1:
        lengths.append(-(-lengths[-1] // 2))
    return lengths


def peak_bytes(model, batch: int, height: int, width: int, plan: Plan) -> int:
    """What one call allocates at most, by counting the tensors that are alive at the widest places.

    An upper bound that the tests hold against the allocations of real calls. Not in it: weights, the caller's
    pictures, and what matrix products and attention kernels allocate inside.
    """
    from .model import PIECE

    config, cross = model.config, model.transformer_blocks[0].cross_attn
    size = model.dtype.itemsize
    heads, block = config.num_attention_heads, config.block_size
    token = batch * config.hidden_size * size  # bytes of a vector of one token
    columns, down, right = width // config.patch_size, height // model.block_pixels, width // model.block_pixels
    row = block * columns  # tokens of a row of blocks
    rows = down if plan.rows is None else min(down, plan.rows)
    strip = rows * row
    piece = min(strip, max(1, PIECE * block**2 // columns) * columns)
    above = row if rows < down else 0
    lr_side = cross.lr_side
    lr_row = (right + 2) * lr_side * 3 * lr_side

    # Keys and values of the low resolution: held for all tokens, and made (tokens, padded, each raw and normed).
    lr_all = (down + 2) * (right + 2) * lr_side**2
    held = 2 * lr_all * token if plan.keep_lr else 0
    if plan.schedule == "layer_major":
        held += down * row * token + 2 * above * token
    else:
        held += strip * token
        held += 2 * above * token * (len(model.transformer_blocks) if plan.schedule == "streaming" else 1)
    # Queries, keys, values: keys and values with the row above; then a piece on its way there, half of it in float32.
    qkv = (3 * strip + 2 * above) * token
    project = qkv + piece * (6 * token + 8 * batch * config.hidden_size)
    attend = qkv + strip * token + batch * strip * heads * 4
    windows = min(PIECE, right) * (3 * lr_side) ** 2
    blocks = min(PIECE, right) * block**2
    cross_attention = 2 * windows * token + 5 * blocks * token + batch * blocks * heads * 4
    if not plan.keep_lr:
        cross_attention = max(6 * lr_row * token, 2 * lr_row * token + cross_attention)
    feed_forward = piece * token * (2 * 4 + 3)
    out = row * (4 * token + 2 * batch * config.patch_size**2 * config.out_channels * size)
    inside = max(project, attend, 2 * above * token + max(cross_attention, feed_forward), out)
    start = 5 * lr_all * token if plan.keep_lr else 0  # while the context is made, nothing else is there
    pixels = batch * (config.in_channels + config.out_channels) * width * rows * model.block_pixels * size
    return max(held + inside + pixels, start)


def memory_limit(limit: int | str | None, device: torch.device | str) -> int | None:
    """Bytes from what people write: see `max_memory` of :func:`plan`; None stays None.

    Raises:
        ValueError: anything else.
    """
    if limit is None:
        return None
    if isinstance(limit, str) and limit != "auto":
        match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(?:i?B)?\s*", limit, re.IGNORECASE)
        try:
            limit = float(match[1]) * _UNITS[match[2].upper()]
        except (TypeError, ValueError):
            raise ValueError(f'max_memory must be bytes, text such as "4GiB", "auto" or None, got {limit!r}') from None
    elif limit == "auto":
        return int(SHARE * free_bytes(device))
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
        raise ValueError(f'max_memory must be bytes > 0, text such as "4GiB", "auto" or None, got {limit!r}')
    return int(limit)


def free_bytes(device: torch.device | str) -> int:
    """Memory that is free on a device; of the machine for a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        # What the allocator holds and does not use is free for us.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as file:
            available = re.search(r"MemAvailable:\s*(\d+) kB", file.read())
        return int(available[1]) * 1024
    except (OSError, TypeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 * 2**30
