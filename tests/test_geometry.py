"""The arithmetic of windows and blocks against counting by hand, on every grid that a test can think of."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers import goldens

from linattn import geometry

SEARCH = hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
sizes = st.integers(1, 9)
radii = st.integers(1, 12)


def window(y, x, height, width, radius):
    """Image keys that (y, x) sees, one by one."""
    return {(j, i) for j in range(height) for i in range(width) if (y - j) ** 2 + (x - i) ** 2 < radius**2}


def area(radius):
    """Lattice points of the open disk."""
    return sum(1 for y in range(-radius, radius + 1) for x in range(-radius, radius + 1) if y * y + x * x < radius**2)


@pytest.mark.parametrize(("radius", "count"), [(1, 1), (2, 9), (8, 193), (16, 793), (32, 3205)])
def test_an_interior_query_sees_the_lattice_points_strictly_inside_the_circle(radius, count):
    # The three last counts are those of CLEAR's models; with <= they would be larger by the points on the circle.
    grid = 2 * radius + 1
    assert geometry.keys_in_window(radius, radius, grid, grid, radius) == count == area(radius)


@SEARCH
@hypothesis.given(height=sizes, width=sizes, radius=radii, data=st.data())
def test_keys_in_a_window_are_counted_exactly_at_borders_too(height, width, radius, data):
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    assert geometry.keys_in_window(y, x, height, width, radius) == len(window(y, x, height, width, radius))


@SEARCH
@hypothesis.given(height=st.integers(0, 8), width=sizes, radius=radii, data=st.data())
def test_pairs_are_the_sum_over_all_queries(height, width, radius, data):
    q_row = data.draw(st.integers(0, height))
    rows = data.draw(st.integers(0, height - q_row))
    text, q_text, pooled = (data.draw(st.integers(0, 5)) for _ in range(3))
    expected = q_text * (text + height * width) + rows * width * (text + pooled)
    expected += sum(len(window(q_row + y, x, height, width, radius)) for y in range(rows) for x in range(width))
    assert geometry.pairs(height, width, radius, text, pooled, q_row, rows, q_text) == expected


def test_pairs_of_a_whole_grid_need_no_description_of_queries():
    assert geometry.pairs(0, 0, 1, text_length=3) == 9
    assert geometry.pairs(5, 4, 3, 2, 6) == geometry.pairs(5, 4, 3, 2, 6, q_row=0, rows=5, q_text_length=2)
    assert geometry.pairs(5, 4, 3, q_row=2) == geometry.pairs(5, 4, 3, q_row=2, rows=3)


def test_pairs_of_the_largest_images_take_no_time():
    # The published totals of CLEAR at 8192 x 8192 pixels, in TFLOP of a layer of 24 heads x 128 channels.
    flops = [4 * 3072 * geometry.pairs(512, 512, radius, 512) / 1e12 for radius in (8, 16, 32)]
    assert [round(x, 3) for x in flops] == [3.915, 5.789, 13.085]
    # Radius 3 is a square of 5 x 5 tokens: 2^2 + 2^2 < 3^2.
    assert geometry.pairs(2**20, 2**20, 3) == (5 * 2**20 - 6) ** 2


@SEARCH
@hypothesis.given(height=sizes, row=st.integers(0, 8), rows=st.integers(1, 9), radius=radii)
def test_the_halo_is_every_row_that_is_seen_and_no_other(height, row, rows, radius):
    hypothesis.assume(row + rows <= height)
    seen = {y for query in range(row, row + rows) for y, _ in window(query, 0, height, 1, radius)}
    assert set(range(*geometry.halo(row, rows, height, radius))) == seen


boxes = st.builds(geometry.Box, st.integers(0, 9), st.integers(0, 9), st.integers(1, 5), st.integers(1, 5))


@SEARCH
@hypothesis.given(queries=boxes, keys=boxes, radius=radii)
def test_a_tile_is_full_partial_or_empty_as_its_pairs_are(queries, keys, radius):
    def tokens(box):
        return [(box.y + i, box.x + j) for i in range(box.height) for j in range(box.width)]

    live = {(y - j) ** 2 + (x - i) ** 2 < radius**2 for y, x in tokens(queries) for j, i in tokens(keys)}
    expected = {frozenset({True}): "full", frozenset({False}): "empty"}.get(frozenset(live), "partial")
    assert geometry.tile_kind(queries, keys, radius) == expected


@SEARCH
@hypothesis.given(radius=radii, dy=st.integers(-14, 14))
def test_a_chord_is_the_widest_pair_of_its_row(radius, dy):
    inside = [dx for dx in range(20) if dy * dy + dx * dx < radius**2]
    assert geometry.chord(dy, radius) == max(inside, default=-1)


@SEARCH
@hypothesis.given(height=sizes, width=sizes, radius=st.integers(1, 2**40), y=st.integers(0, 8), x=st.integers(0, 8))
def test_a_sufficient_radius_has_the_same_windows_and_is_no_larger_than_the_grid(height, width, radius, y, x):
    hypothesis.assume(y < height and x < width)
    enough = geometry.sufficient_radius(height, width, radius)
    assert 1 <= enough <= min(radius, height + width)
    assert window(y, x, height, width, enough) == window(y, x, height, width, radius)


@pytest.mark.parametrize(("text_first", "expected"), [(True, ((0, 3), (3, 8))), (False, ((5, 8), (0, 5)))])
def test_segments_are_text_and_image_in_either_order(text_first, expected):
    found = geometry.segments(3, 5, text_first)
    assert tuple((part.start, part.stop) for part in found) == expected


@pytest.mark.parametrize(("size", "expected"), [((8, 8, 4), (2, 2)), ((9, 7, 4), (3, 2)), ((1, 1, 4), (1, 1))])
def test_patches_cover_the_grid(size, expected):
    assert geometry.pooled_size(*size) == expected


@goldens.needs_goldens
def test_counts_are_those_of_the_original_masks():
    file, _ = goldens.load("clear", "blockmask_64x64")
    cases = {key.removesuffix(".keys_per_query") for key in file if key.endswith("keys_per_query")}
    assert len(cases) == 5
    for case in cases:
        height, width, text, radius, factor = _parse(case)
        pooled = height * width // factor**2 if factor > 1 else 0
        counts = [text + height * width] * text
        counts += [
            text + pooled + geometry.keys_in_window(y, x, height, width, radius)
            for y in range(height)
            for x in range(width)
        ]
        assert file[f"{case}.keys_per_query"].tolist() == counts
        assert geometry.pairs(height, width, radius, text, pooled) == sum(counts)


def _parse(case):
    """h64w64t512r8d4 -> (64, 64, 512, 8, 4)."""
    for letter in "hwtrd":
        case = case.replace(letter, " ")
    return map(int, case.split())


# ------------------------------------------------------------------------------------------------- blocks


def neighbours(row, column):
    """Self, top-left, left, top; outside the grid as well."""
    return [(row, column), (row - 1, column - 1), (row, column - 1), (row - 1, column)]


blocks = {"row": st.integers(0, 3), "column": st.integers(0, 3)}


@SEARCH
@hypothesis.given(**blocks)
def test_a_slot_whose_block_is_missing_is_filled_by_the_nearest_block(row, column):
    grid = [(i, j) for i in range(5) for j in range(5)]
    for slot, (i, j) in enumerate(neighbours(row, column)):
        nearest = min(grid, key=lambda block, i=i, j=j: (block[0] - i) ** 2 + (block[1] - j) ** 2)
        assert geometry.slots(row, column)[slot] == nearest
        assert geometry.existing(row, column)[slot] == ((i, j) in grid)


@SEARCH
@hypothesis.given(**blocks, edge=st.sampled_from(["clamp", "drop"]))
def test_key_blocks_hold_every_slot_that_is_filled_once(row, column, edge):
    held = [(slot, block) for block, slots in geometry.key_blocks(row, column, edge).items() for slot in slots]
    filled = [
        (slot, block)
        for slot, block in enumerate(geometry.slots(row, column))
        if edge == "clamp" or block == neighbours(row, column)[slot]
    ]
    assert sorted(held) == filled
    assert next(iter(geometry.key_blocks(row, column, edge))) == (row, column)


def test_the_corner_sees_one_block_the_first_row_and_column_two_and_the_interior_four():
    assert geometry.key_blocks(0, 0, "clamp") == {(0, 0): (0, 1, 2, 3)}
    assert geometry.key_blocks(0, 5, "clamp") == {(0, 5): (0, 3), (0, 4): (1, 2)}
    assert geometry.key_blocks(5, 0, "clamp") == {(5, 0): (0, 2), (4, 0): (1, 3)}
    assert geometry.key_blocks(0, 5, "drop") == {(0, 5): (0,), (0, 4): (2,)}
    for edge in ("clamp", "drop"):
        assert geometry.key_blocks(5, 7, edge) == {(5, 7): (0,), (4, 6): (1,), (5, 6): (2,), (4, 7): (3,)}


def test_slots_of_tensors_are_those_of_their_elements():
    row, column = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    for function in (geometry.slots, geometry.existing):
        found = function(row, column)
        for i, j in ((0, 0), (0, 2), (2, 0), (1, 3)):
            for slot, expected in enumerate(function(i, j)):
                pick = tuple(x[i, j].item() for x in found[slot]) if isinstance(expected, tuple) else found[slot][i, j]
                assert pick == expected


@SEARCH
@hypothesis.given(rows=st.integers(0, 4), columns=st.integers(0, 4), block=st.integers(1, 3), data=st.data())
def test_block_pairs_are_the_sum_over_all_queries(rows, columns, block, data):
    first = data.draw(st.integers(0, rows))
    count = data.draw(st.integers(0, rows - first))
    seen = sum(len(geometry.key_blocks(i, j, "drop")) for i in range(first, first + count) for j in range(columns))
    sizes = rows * block, columns * block, block
    assert geometry.block_pairs(*sizes, first * block, count * block) == seen * block**4
    if count == rows - first:
        assert geometry.block_pairs(*sizes, first * block) == seen * block**4


@SEARCH
@hypothesis.given(row=st.integers(0, 5), rows=st.integers(1, 3), block=st.integers(1, 3))
def test_the_block_halo_is_every_row_that_is_seen_and_no_other(row, rows, block):
    seen = {i for query in range(row, row + rows) for i, _ in geometry.key_blocks(query, 0, "drop")}
    halo = geometry.block_halo(row * block, rows * block, block)
    assert halo == (min(seen) * block, (max(seen) + 1) * block)
