"""linattn.bundled.canvases: the task of the bundled model, its held-out orders, and the pictures that show them."""

import itertools
import json
import random

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from linattn import bundled
from linattn.bundled import canvases, digits

ALL_ORDERS = [o for n in range(1, canvases.LONGEST + 1) for o in itertools.product(range(10), repeat=n)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed), random.Random(seed)


def ink(picture):
    """Ink per cell in reading order."""
    return (1 - canvases.cut(picture[None])[0]).mean((1, 2, 3))


class TestOrders:
    def test_a_fifth_of_the_orders_is_held_out_and_no_single_digit(self):
        several = [order for order in ALL_ORDERS if len(order) > 1]
        share = sum(map(canvases.held_out, several)) / len(several)
        assert abs(share - canvases.HELD_OUT_SHARE) < 0.01
        assert not any(canvases.held_out((digit,)) for digit in range(10))

    def test_which_orders_are_held_out_never_changes(self):
        # Scores of a trained model mean nothing if what it was trained on moves into the held-out part.
        assert [o for o in itertools.product(range(10), repeat=2) if canvases.held_out(o)][:6] == [
            (0, 3),
            (0, 7),
            (1, 0),
            (1, 9),
            (2, 1),
            (2, 5),
        ]

    @pytest.mark.parametrize("unseen", [False, True])
    @pytest.mark.parametrize("length", range(2, canvases.LONGEST + 1))
    def test_drawn_orders_have_the_length_and_are_of_the_part_that_was_asked_for(self, length, unseen):
        words = random.Random(1)
        drawn = {canvases.draw_order(words, length, unseen=unseen) for _ in range(100)}
        assert {len(order) for order in drawn} == {length} and {canvases.held_out(order) for order in drawn} == {unseen}
        assert len(drawn) > 10

    @pytest.mark.parametrize(
        ("length", "unseen", "said"),
        [(0, False, "got 0"), (canvases.LONGEST + 1, False, "expected 1 to"), (1, True, "2 or more")],
    )
    def test_impossible_orders_are_refused(self, length, unseen, said):
        with pytest.raises(ValueError, match=said):
            canvases.draw_order(random.Random(0), length, unseen=unseen)


class TestCaptions:
    @pytest.mark.parametrize(
        ("order", "text"),
        [((7,), "a seven"), ((8, 3), "an eight and a three"), ((7, 2, 8, 0), "a seven, a two, an eight and a zero")],
    )
    def test_the_plain_one_names_the_digits_in_order(self, order, text):
        assert canvases.caption(order) == text


class TestPictures:
    def test_cut_undoes_join_and_cells_are_in_reading_order(self):
        cells = torch.arange(2 * canvases.CELLS * 3 * 2 * 4.0).view(2, canvases.CELLS, 3, 2, 4)
        whole = canvases.join(cells)
        assert whole.shape == (2, 3, 2 * canvases.SIDE, 4 * canvases.SIDE)
        assert torch.equal(canvases.cut(whole), cells)
        assert torch.equal(whole[0, :, :2, 4:8], cells[0, 1])  # the second cell is right of the first
        assert torch.equal(whole[0, :, 2:4, :4], cells[0, canvases.SIDE])  # the first of the next row below it

    def test_digits_stand_in_reading_order_in_any_cells(self):
        # A scan of the digit d is a square that grows with d: ink tells the digits apart.
        scans = np.zeros((10, 8, 8), dtype=np.float32)
        for digit in range(10):
            side = 1 + digit // 2
            scans[digit, 4 - side // 2 : 4 - side // 2 + side, 4 - side // 2 : 4 - side // 2 + side] = 0.6 + 0.4 * (
                digit % 2
            )
        rng, words = seeded()
        pens = canvases.make_pens(4, rng)
        orders = [(1, 5, 9)] * 40 + [(9, 5, 1)] * 40
        drawn = canvases.draw(orders, scans, np.arange(10), pens, rng=rng, words=words)
        layouts = set()
        for picture, order in zip(drawn, orders, strict=True):
            amounts = ink(picture)
            used = torch.where(amounts > 1e-4)[0]
            layouts.add(tuple(used.tolist()))
            assert len(used) == len(order)
            assert (amounts[used].diff() > 0).all() if order[0] < order[-1] else (amounts[used].diff() < 0).all()
        assert len(layouts) > 20 and layouts <= set(canvases.LAYOUTS[3])

    def test_one_pen_writes_a_whole_canvas(self):
        split = digits.load()
        rng, words = seeded(3)
        pens = canvases.Pens(*(torch.tensor([value, value]) for value in (0.0, 0.9, 0.45)), torch.tensor([0.45, 1.0]))
        order = (5,) * canvases.LONGEST
        drawn = canvases.draw([order] * 30, split.train, split.train_labels, pens, rng=rng, words=words)
        darkest = [
            sorted(1 - cell.min().item() for cell in canvases.cut(picture[None])[0] if cell.min() < 0.9)
            for picture in drawn
        ]
        assert all(len(cells) == canvases.LONGEST for cells in darkest)
        assert {cells[-1] > 0.6 for cells in darkest} == {True, False}
        for cells in darkest:
            assert cells[-1] - cells[0] < 0.1

    def test_pens_cover_all_strengths_however_few_they_are(self):
        strengths = canvases.make_pens(4, seeded()[0]).strength.sort().values
        quarters = canvases.PALEST + (1 - canvases.PALEST) * torch.arange(5) / 4
        assert ((strengths >= quarters[:-1]) & (strengths <= quarters[1:])).all()

    def test_the_same_seed_draws_the_same_pictures(self):
        split = digits.load()

        def once(seed):
            rng, words = seeded(seed)
            pens = canvases.make_pens(4, rng)
            return canvases.draw([(1, 2)] * 3, split.train, split.train_labels, pens, rng=rng, words=words)

        assert torch.equal(once(0), once(0)) and not torch.equal(once(0), once(1))


def test_a_folder_of_captioned_pictures_is_written(tmp_path):
    from PIL import Image

    canvases.write_folder(tmp_path / "a", 8, seed=2)
    canvases.write_folder(tmp_path / "b", 8, seed=2)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"{i:04}.png" for i in range(8)]
    known = {canvases.caption(order) for order in ALL_ORDERS if not canvases.held_out(order)}
    assert {row["text"] for row in rows} <= known
    for row in rows:
        picture = Image.open(tmp_path / "a" / row["file_name"])
        assert picture.size == (canvases.RESOLUTION, canvases.RESOLUTION)
        assert picture.tobytes() == Image.open(tmp_path / "b" / row["file_name"]).tobytes()


def test_a_bundled_model_is_known_by_its_name_and_other_names_are_left_alone():
    assert bundled.resolve("tiny_sd") == str(bundled.path("tiny_sd"))
    assert bundled.resolve("./tiny_sd") == "./tiny_sd" and bundled.resolve("owner/name") == "owner/name"
