"""Where tokens lie and which of them see each other: the arithmetic of window and block-causal attention, in integers.

One place for reference math, checks, tests, pictures, adapters and parallel code. y is the row, x the column; token
(y, x) of a grid is number y * width + x of its image tokens. Nothing here imports torch: `in_disk`, `slots` and
`existing` also take tensors, because they are arithmetic only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# ------------------------------------------------------------------------------------------------- tokens in a sequence


def segments(text_length: int, image_length: int, text_first: bool) -> tuple[slice, slice]:
    """(text, image): the parts of a sequence that is [text | image], or [image | text] unless text_first."""
    if text_first:
        return slice(0, text_length), slice(text_length, text_length + image_length)
    return slice(image_length, image_length + text_length), slice(0, image_length)


def pooled_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """Rows and columns of patches of factor x factor tokens, those that run over the edge included."""
    return -(-height // factor), -(-width // factor)


# ------------------------------------------------------------------------------------------------- the disk


def in_disk(dy, dx, radius):
    """Whether a key lies in the window of a query that is dy rows and dx columns away: dy^2 + dx^2 < radius^2."""
    return dy * dy + dx * dx < radius * radius


def chord(dy: int, radius: int) -> int:
    """Largest dx with in_disk(dy, dx, radius), -1 where the disk does not reach row dy."""
    rest = radius * radius - dy * dy
    return math.isqrt(rest - 1) if rest > 0 else -1


def sufficient_radius(height: int, width: int, radius: int) -> int:
    """The smaller of radius and one that covers the whole grid: the same windows, and a square that is no giant."""
    return min(radius, max(1, height + width))


class Rows(NamedTuple):
    """Rows first, first + 1, ..., stop - 1."""

    first: int
    stop: int


def halo(row: int, rows: int, height: int, radius: int) -> Rows:
    """Rows of keys that the queries of rows row ... row + rows - 1 see: their own and radius - 1 on either side.

    A strip that holds these keys and no others passes `row - halo.first` as its q_row. The same for columns.
    """
    return Rows(max(0, row - radius + 1), min(height, row + rows + radius - 1))


class Box(NamedTuple):
    """Tokens of rows y ... y + height - 1 and columns x ... x + width - 1."""

    y: int
    x: int
    height: int
    width: int


def tile_kind(queries: Box, keys: Box, radius: int) -> str:
    """ "full" where every query of one box sees every key of the other, "empty" where none does, else "partial".

    Exact: along each axis the distances between two intervals take every value from the nearest to the farthest.
    """
    axes = [
        _distances(queries.y, queries.height, keys.y, keys.height),
        _distances(queries.x, queries.width, keys.x, keys.width),
    ]
    if not in_disk(*(nearest for nearest, _ in axes), radius):
        return "empty"
    return "full" if in_disk(*(farthest for _, farthest in axes), radius) else "partial"


def _distances(a: int, a_size: int, b: int, b_size: int) -> tuple[int, int]:
    """Smallest and largest |i - j| for i in a ... a + a_size - 1 and j in b ... b + b_size - 1."""
    after, before = b - (a + a_size - 1), a - (b + b_size - 1)
    return max(0, after, before), max(b + b_size - 1 - a, a + a_size - 1 - b)


# ------------------------------------------------------------------------------------------------- counting


def keys_in_window(y: int, x: int, height: int, width: int, radius: int) -> int:
    """How many image keys query (y, x) sees; fewer at a border, where the disk is cut, not shifted."""
    count, rows = 0, halo(y, 1, height, radius)
    for key_row in range(*rows):
        reach = chord(key_row - y, radius)
        count += min(width - 1, x + reach) - max(0, x - reach) + 1
    return count


def pairs(
    height: int,
    width: int,
    radius: int,
    text_length: int = 0,
    pooled: int = 0,
    q_row: int = 0,
    rows: int | None = None,
    q_text_length: int | None = None,
) -> int:
    """How many (query, key) pairs attend: the exact work of a call, in time that grows with the radius only.

    rows: rows of queries from q_row on, by default all to the end. pooled: number of pooled keys.
    """
    rows = height - q_row if rows is None else rows
    q_text_length = text_length if q_text_length is None else q_text_length
    image = 0
    for dy in range(-min(radius, height) + 1, min(radius, height)):
        # Queries whose row y has y + dy in the grid, times pairs of columns at most `reach` apart.
        live = min(q_row + rows, height - dy) - max(q_row, -dy)
        reach = min(chord(dy, radius), width - 1)
        if live > 0 and reach >= 0:
            image += live * ((2 * reach + 1) * width - reach * (reach + 1))
    return q_text_length * (text_length + height * width) + rows * width * (text_length + pooled) + image


# ------------------------------------------------------------------------------------------------- blocks

#: What a query sees in block-causal attention, in the order of slot_embed.
SLOTS = ("self", "top-left", "left", "top")


def slots(row, column):
    """The block (row, column) of each slot of a query block; a missing neighbour is replaced by the nearest block."""
    up, before = row - 1 * (row > 0), column - 1 * (column > 0)
    return (row, column), (up, before), (row, before), (up, column)


def existing(row, column):
    """Whether the neighbour of each slot exists: edge="drop" attends to those and no others."""
    above, before = row > 0, column > 0
    return row >= 0, above & before, before, above


def key_blocks(row: int, column: int, edge: str) -> dict[tuple[int, int], tuple[int, ...]]:
    """{block: the slots that it fills}: what a query block sees, each block once.

    Four blocks in the interior, two in the first row and the first column, one in the corner, whatever `edge` is;
    with "clamp" they fill four slots everywhere.
    """
    blocks: dict[tuple[int, int], tuple[int, ...]] = {}
    for slot, (block, exists) in enumerate(zip(slots(row, column), existing(row, column), strict=True)):
        if exists or edge == "clamp":
            blocks[block] = (*blocks.get(block, ()), slot)
    return blocks


def block_halo(row: int, rows: int, block: int) -> Rows:
    """Rows of keys that the queries of rows row ... row + rows - 1 see: their own and the row of blocks above.

    A strip that holds these keys and no others passes `row - block_halo.first` as its q_row.
    """
    return Rows(max(0, row - block), row + rows)


def block_pairs(height: int, width: int, block: int, q_row: int = 0, rows: int | None = None) -> int:
    """How many (query, key) pairs attend, a key that fills several slots counted once: the exact work of a call.

    rows: rows of queries from q_row on, by default all to the end.
    """
    rows = height - q_row if rows is None else rows
    # Rows of blocks and columns of blocks that are seen, summed over those of the queries: the first sees one, not two.
    across = 2 * (width // block) - 1 if width else 0
    down = 2 * (rows // block) - (1 if q_row == 0 else 0) if rows else 0
    return down * across * block**4
