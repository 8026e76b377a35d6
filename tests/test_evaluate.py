"""linattn.evaluate and linattn.bundled.digits: scores against cases worked out by hand."""

import contextlib
import itertools
import json
import random
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from linattn import evaluate
from linattn.bundled import canvases, digits

pytestmark = pytest.mark.usefixtures("one_thread_in_module")


class TestFrechetDistance:
    def test_one_dimension_by_hand(self):
        # means 1 and 3, sample variances 2 and 8: (1 - 3)^2 + 2 + 8 - 2 sqrt(2 * 8) = 6
        assert evaluate.frechet_distance([[0.0], [2.0]], [[1.0], [5.0]]) == pytest.approx(6.0, abs=1e-12)

    def test_equal_sets_are_at_distance_zero(self):
        a = np.random.default_rng(0).normal(size=(50, 7))
        assert evaluate.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)

    def test_a_shift_counts_by_its_square(self):
        a = np.random.default_rng(1).normal(size=(50, 3))
        assert evaluate.frechet_distance(a, a + np.array([3.0, 0.0, 4.0])) == pytest.approx(25.0, abs=1e-10)

    def test_agrees_with_the_matrix_root_of_the_formula(self):
        sqrtm = pytest.importorskip("scipy.linalg").sqrtm
        rng = np.random.default_rng(2)
        a, b = rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(60, 5)) + 1
        cov_a, cov_b = np.cov(a.T), np.cov(b.T)
        root = np.real(sqrtm(cov_a @ cov_b))
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
        assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)

    def test_constant_features_do_not_break_the_root(self):
        a = np.random.default_rng(3).normal(size=(20, 4)) * [1, 0, 1, 0]
        assert evaluate.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)

    @pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5,), (5,))], ids=str)
    def test_refuses_what_has_no_covariance_or_does_not_match(self, shapes):
        with pytest.raises(ValueError, match=r"\(n, d\) and \(m, d\)"):
            evaluate.frechet_distance(*(np.zeros(shape) for shape in shapes))


class TestImageMse:
    def test_by_hand(self):
        a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
        b[0] = 0.5
        assert evaluate.image_mse(a, b) == 0.125

    def test_does_not_broadcast(self):
        with pytest.raises(ValueError, match="equal shapes"):
            evaluate.image_mse(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


class Painter:
    """Stands for a pipeline: noise by the given generators, one picture per prompt, and a note of every call."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, *, generator, **options):
        self.calls.append((prompts, options))
        images = torch.stack([torch.rand(3, 8, 8, generator=g) for g in generator])
        return type("Result", (), {"images": images})


class TestDraw:
    def test_a_picture_depends_on_its_seed_alone(self):
        prompts, seeds = ["a", "b", "c", "d", "e"], [5, 4, 3, 2, 5]
        at_once = evaluate.draw(Painter(), prompts, seeds=seeds)
        in_pairs = evaluate.draw(Painter(), prompts, seeds=seeds, batch=2)
        assert torch.equal(at_once, in_pairs)
        assert torch.equal(at_once[0], at_once[4]) and not torch.equal(at_once[0], at_once[1])

    def test_hands_on_prompts_in_order_and_the_settings(self):
        painter = Painter()
        evaluate.draw(painter, ["a", "b", "c"], seeds=range(3), steps=7, guidance_scale=2.0, batch=2)
        assert [prompts for prompts, _ in painter.calls] == [["a", "b"], ["c"]]
        assert painter.calls[0][1] == {"num_inference_steps": 7, "guidance_scale": 2.0, "output_type": "pt"}

    def test_progress_is_told_the_size_of_every_batch(self):
        told = []
        evaluate.draw(Painter(), ["a", "b", "c"], seeds=range(3), batch=2, progress=told.append)
        assert told == [2, 1]

    def test_refuses_unequal_numbers(self):
        with pytest.raises(ValueError, match="one seed per prompt"):
            evaluate.draw(Painter(), ["a", "b"], seeds=[1])


class TestCallArguments:
    @pytest.mark.parametrize(
        ("family", "expected"),
        [
            ("sd15", {"guidance_scale": 2.5}),
            ("flux", {"guidance_scale": 2.5, "max_sequence_length": 24}),
            ("flux-schnell", {"true_cfg_scale": 2.5, "negative_prompt": ["", ""], "max_sequence_length": 24}),
            ("sd3", {"guidance_scale": 2.5, "max_sequence_length": 24}),
        ],
    )
    def test_every_kind_of_pipeline_is_guided_and_reads_as_many_tokens_as_its_tokenizer_says(self, family, expected):
        pytest.importorskip("diffusers")
        from helpers.tiny_pipelines import tiny_pipeline

        pipe = tiny_pipeline(family)
        for name in ("tokenizer_2", "tokenizer_3"):
            if getattr(pipe, name, None) is not None:
                getattr(pipe, name).model_max_length = 24
        assert evaluate.call_arguments(pipe, 2, 2.5) == expected

    def test_a_flux_that_reads_no_guidance_is_guided_all_the_same(self):
        pytest.importorskip("diffusers")
        from helpers.tiny_pipelines import tiny_pipeline

        pipe = tiny_pipeline("flux-schnell")
        pipe.set_progress_bar_config(disable=True)
        pictures = [evaluate.draw(pipe, ["a cat"], seeds=[0], steps=1, guidance_scale=g) for g in (1.0, 3.0)]
        assert torch.isfinite(pictures[0]).all() and not torch.equal(*pictures)


class TestDigits:
    def test_the_split_is_disjoint_stratified_and_always_the_same(self):
        split = digits.load()
        assert split.train.shape == (1297, 8, 8) and split.test.shape == (500, 8, 8)
        assert split.train.min() == 0 and split.train.max() == 1
        assert all(45 <= (split.test_labels == d).sum() <= 55 for d in range(10))
        seen = {grid.tobytes() for grid in split.train}
        assert not any(grid.tobytes() in seen for grid in split.test)
        again = digits.load.__wrapped__()
        assert np.array_equal(split.test, again.test)

    def test_names_the_extra_where_scikit_learn_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"linattn\[demo\]"):
            digits.load.__wrapped__()


# -------------------------------------------------------------------------------------------------------- canvases


def real_canvases(orders, seed=0, part="test"):
    """Canvases that the program draws, by default from scans that the judge has not learnt from."""
    split = digits.load()
    scans, labels = (split.test, split.test_labels) if part == "test" else (split.train, split.train_labels)
    rng = torch.Generator().manual_seed(seed)
    pens = canvases.make_pens(32, rng)
    return canvases.draw(orders, scans, labels, pens, rng=rng, words=random.Random(seed))


def random_orders(n, seed=0, lengths=(1, 2, 3, 4)):
    rng = random.Random(seed)
    return [tuple(rng.randrange(10) for _ in range(lengths[i % len(lengths)])) for i in range(n)]


ORDERS = random_orders(120)


@pytest.fixture(scope="module")
def real():
    return real_canvases(ORDERS)


class TestReadingCanvases:
    def test_real_canvases_are_read_as_they_were_drawn(self, real):
        scores = evaluate.score_canvases(real, ORDERS)
        assert scores.exact.mean() >= 0.9
        assert scores.count.mean() == 1
        assert evaluate.canvas_judge().held_out_accuracy >= 0.98

    def test_wrong_orders_are_wrong(self, real):
        changed = [(*order[:-1], (order[-1] + 1) % 10) for order in ORDERS]
        scores = evaluate.score_canvases(real, changed)
        assert scores.exact.mean() <= 0.05
        assert scores.count.mean() == 1

    def test_digits_are_read_row_by_row(self):
        split = digits.load()
        scans = [split.train[np.flatnonzero(split.train_labels == digit)[0]] for digit in (1, 2, 3)]
        rng = torch.Generator().manual_seed(0)
        drawn = canvases.draw_cells(np.stack(scans), canvases.make_pens(1, rng), torch.zeros(3, dtype=int), rng)
        cells = torch.ones(1, canvases.CELLS, *drawn.shape[1:])
        last_of_first_row, first_of_second_row, last = canvases.SIDE - 1, canvases.SIDE, canvases.CELLS - 1
        cells[0, [last, last_of_first_row, first_of_second_row]] = drawn
        assert evaluate.read_canvases(canvases.join(cells)) == [(2, 3, 1)]

    def test_how_pale_the_ink_is_does_not_matter(self, real):
        pale = 1 - 0.35 * (1 - real)  # the palest pen is left with a sixth of black
        assert evaluate.read_canvases(pale) == evaluate.read_canvases(real)

    @pytest.mark.parametrize("paper", [1.0, 0.95, 0.0], ids=["white", "grey", "black"])
    def test_a_canvas_of_one_tone_reads_as_nothing_or_as_every_cell(self, paper):
        read = evaluate.read_canvases(torch.full((2, 3, 30, 30), paper))
        assert [len(order) for order in read] == [canvases.CELLS if paper == 0 else 0] * 2

    def test_a_shadow_beside_a_digit_is_no_digit_and_a_second_digit_is(self, real):
        lone = [i for i, order in enumerate(ORDERS) if len(order) == 1]
        cells = canvases.cut(real[lone])
        for share, seen in ((0.3, 1), (0.8, 2)):
            ghosts = cells.clone()
            for canvas in ghosts:
                ink = 1 - canvas
                used = int(ink.flatten(1).sum(1).argmax())
                canvas[(used + 1) % canvases.CELLS] = 1 - share * ink[used]
            assert [len(order) for order in evaluate.read_canvases(canvases.join(ghosts))] == [seen] * len(lone)

    def test_larger_and_smaller_canvases_read_the_same(self, real):
        read = evaluate.read_canvases(real)
        for size in (2 * canvases.RESOLUTION, 8 * canvases.SIDE):
            other = torch.nn.functional.interpolate(real, size=(size, size), mode="area")
            assert evaluate.read_canvases(other) == read

    def test_ink_of_blocks_by_hand(self):
        picture = torch.ones(1, 3, evaluate.BLOCKS * canvases.SIDE, evaluate.BLOCKS * canvases.SIDE)
        picture[0, :, 0, 1] = 0.25  # second block of the first cell
        picture[0, 0, evaluate.BLOCKS, 0] = 0.4  # first block of the cell below; one channel of three
        ink = evaluate.cell_ink(picture)
        assert ink.shape == (1, canvases.CELLS, evaluate.BLOCKS**2)
        assert ink[0, 0, 1] == 0.75 and ink[0, canvases.SIDE, 0] == pytest.approx(0.2)
        assert ink.sum() == pytest.approx(0.95)

    def test_refuses_what_is_no_picture(self):
        with pytest.raises(ValueError, match=r"\(n, 3, height, width\)"):
            evaluate.cell_ink(torch.zeros(3, 30, 30))


class TestScoringOrders:
    def test_by_hand(self):
        asked = [(7, 2, 4), (7, 2, 4), (7, 2, 4), (7, 2, 4), (5,), (1, 2)]
        seen = [(7, 2, 4), (7, 4, 2), (2, 4), (7, 2, 4, 4), (), (1, 3)]
        exact, count, place = evaluate.score_orders(seen, asked)
        assert exact.tolist() == [1, 0, 0, 0, 0, 0]
        assert count.tolist() == [1, 1, 0, 0, 0, 1]
        assert place.tolist() == pytest.approx([1, 1 / 3, 0, 1, 0, 1 / 2])

    @pytest.mark.parametrize("asked", [[], [(1,)], [(1,), ()]], ids=str)
    def test_refuses_unequal_numbers_and_empty_orders(self, asked):
        with pytest.raises(ValueError, match="one order of at least one digit"):
            evaluate.score_orders([(1,), (2,)] if asked else [], asked)


class TestFeatures:
    def test_digit_features_are_the_darkest_cells_as_many_as_were_asked_for(self):
        ink = np.zeros((2, canvases.CELLS, 64), dtype=np.float32)
        ink[0, 1, 5], ink[0, 3, 6], ink[0, 2, 7] = 0.9, 0.5, 0.7
        features = evaluate.digit_features(ink, [(1, 2), (3,)])
        assert features.shape == (3, 64)
        assert features[0].argmax() == 5 and features[1].argmax() == 7 and features[2].max() == 0

    def test_canvas_features_keep_place_and_mean_ink(self):
        ink = np.zeros((1, canvases.CELLS, 64), dtype=np.float32)
        ink[0, 1, 8 * 2 + 6] = 0.8  # row 2, column 6: the upper right quarter of the second cell
        features = evaluate.canvas_features(ink)
        assert features.shape == (1, 4 * canvases.CELLS)
        assert np.flatnonzero(features).tolist() == [4 + 1]
        assert features.max() == pytest.approx(0.8 / 16)

    def test_real_canvases_are_near_real_ones_and_white_or_smeared_ones_far(self):
        orders = random_orders(200, lengths=(2, 3))
        reference, drawn = real_canvases(orders, seed=1), real_canvases(orders, seed=2, part="train")
        coarse = torch.nn.functional.adaptive_avg_pool2d(drawn, 2 * canvases.SIDE)
        smeared = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")
        ink = [evaluate.cell_ink(x) for x in (reference, real_canvases(orders, seed=3), drawn, smeared)]
        ink.append(np.zeros_like(ink[0]))

        def distances(features):
            reference, *others = map(features, ink)
            return [evaluate.frechet_distance(other, reference) for other in others]

        real, near, smear, white = distances(lambda x: evaluate.digit_features(x, orders))
        assert near < 2 * real and min(smear, white) > 10 * near
        real, near, smear, white = distances(evaluate.canvas_features)
        assert near < 2 * real and smear > near and white > 10 * near

    def test_digits_that_always_stand_in_the_same_cells_are_far_as_canvases_and_near_as_digits(self):
        orders = random_orders(200, lengths=(2, 3))
        reference = evaluate.cell_ink(real_canvases(orders, seed=1))
        ink = evaluate.cell_ink(real_canvases(orders, seed=2))
        moved = np.zeros_like(ink)
        for a, b, order in zip(ink, moved, orders, strict=True):
            b[: len(order)] = a[np.sort(np.argsort(-a.max(1))[: len(order)])]

        def both(x):
            return (
                evaluate.frechet_distance(evaluate.canvas_features(x), evaluate.canvas_features(reference)),
                evaluate.frechet_distance(
                    evaluate.digit_features(x, orders), evaluate.digit_features(reference, orders)
                ),
            )

        (canvas, digit), (moved_canvas, moved_digit) = both(ink), both(moved)
        assert moved_canvas > 10 * canvas
        assert moved_digit == pytest.approx(digit)


class TestDiversity:
    def test_distance_of_two_canvases_by_hand(self):
        a, b = np.zeros((2, canvases.CELLS, 64)), np.zeros((2, canvases.CELLS, 64))
        b[1, 0, :32] = 0.5
        assert evaluate.canvas_distances(a, b).tolist() == pytest.approx([0, 0.125 / canvases.CELLS])

    def test_identical_pictures_have_none(self, real):
        ink = evaluate.cell_ink(real[:20])
        assert evaluate.canvas_distances(ink, ink).tolist() == [0] * 20
        writing = evaluate.writing_distances(ink, ink, ORDERS[:20])
        assert np.nanmax(writing) == 0 and np.isnan(writing).sum() <= 3

    def test_handwriting_is_compared_wherever_the_digits_stand(self, real):
        two = [i for i, order in enumerate(ORDERS) if len(order) == 2]
        ink = evaluate.cell_ink(real[two])
        moved = np.zeros_like(ink)
        for a, b in zip(ink, moved, strict=True):
            b[[2, 5]] = 0.5 * a[np.sort(np.argsort(-a.max(1))[:2])]  # other cells, paler
        writing = evaluate.writing_distances(ink, moved, [ORDERS[i] for i in two])
        assert np.nanmax(writing) == pytest.approx(0, abs=1e-12)
        assert evaluate.canvas_distances(ink, moved).min() > 0
        other = evaluate.cell_ink(real_canvases([ORDERS[i] for i in two], seed=9))
        assert np.nanmin(evaluate.writing_distances(ink, other, [ORDERS[i] for i in two])) > 0

    def test_handwriting_counts_only_where_both_read_as_asked(self, real):
        ink = evaluate.cell_ink(real[:8])
        wrong = [(*order, 0) for order in ORDERS[:8]]
        assert np.isnan(evaluate.writing_distances(ink, ink, wrong)).all()


class TestIntervals:
    def test_the_mean_of_many_normal_values_has_the_textbook_interval(self):
        values = np.random.default_rng(0).normal(3, 2, 400)
        value, low, high = evaluate.interval(values)
        margin = 1.96 * values.std(ddof=1) / 20
        assert value == values.mean()
        # 2000 resamples place the ends within some hundredths of the margin
        assert (value - low, high - value) == pytest.approx((margin, margin), rel=0.12)

    def test_covers_the_truth_about_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        covered = 0
        for _ in range(200):
            _, low, high = evaluate.interval(rng.random(60) < 0.8)
            covered += low <= 0.8 <= high
        assert 0.88 <= covered / 200 <= 0.99  # 95 % less what 60 values cost; 200 trials scatter by 1.5 %

    def test_is_the_same_every_time_and_another_with_another_seed(self):
        values = np.random.default_rng(0).normal(size=50)
        assert evaluate.interval(values) == evaluate.interval(values)
        assert evaluate.interval(values) != evaluate.interval(values, seed=1)

    def test_pairs_show_a_difference_that_single_intervals_hide(self):
        rng = np.random.default_rng(0)
        hard = rng.normal(0, 1, 100)
        a, b = hard + 0.1 + rng.normal(0, 0.1, 100), hard
        one, other, paired = evaluate.interval(a), evaluate.interval(b), evaluate.paired_interval(a, b)
        assert one.low < other.high  # they overlap
        assert paired.value == pytest.approx((a - b).mean()) and paired.low > 0
        reverse = evaluate.paired_interval(b, a)
        assert reverse.value == -paired.value and reverse.high < 0

    def test_ratio_by_hand_and_its_interval(self):
        a = np.array([1.0, 2.0, 3.0, 4.0])
        assert evaluate.ratio_interval(a, 2 * a) == (0.5, 0.5, 0.5)  # drawn together, so always the same
        value, low, high = evaluate.ratio_interval(a, np.array([4.0, 3.0, 2.0, 1.0]))
        assert value == 1 and 1 / 4 <= low < 0.6 and 1.7 < high <= 4

    @pytest.mark.parametrize(("right", "ends"), [(1, (0.9637833, 1)), (0, (0, 0.0362167))])
    def test_a_hundred_of_a_hundred_does_not_prove_all(self, right, ends):
        # Clopper and Pearson: 0.025^(1/100) and its complement
        interval = evaluate.share_interval(np.full(100, right))
        assert interval.value == right and interval[1:] == pytest.approx(ends, abs=1e-7)

    def test_shares_in_between_have_the_bootstrap_interval(self):
        values = np.arange(50) < 40
        assert evaluate.share_interval(values) == evaluate.interval(values)

    @pytest.mark.parametrize(
        "call",
        [
            lambda: evaluate.interval([1.0]),
            lambda: evaluate.interval(np.zeros((3, 2))),
            lambda: evaluate.share_interval([0.0, 1.5]),
            lambda: evaluate.paired_interval([1.0, 2.0], [1.0, 2.0, 3.0]),
            lambda: evaluate.ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0]),
        ],
        ids=["one", "matrix", "no-share", "unpaired", "unpaired-ratio"],
    )
    def test_refuses_what_has_none(self, call):
        with pytest.raises(ValueError, match=r"n >= 2|0 to 1|paired"):
            call()


class TestFrechetEstimate:
    def test_its_spread_is_that_of_new_samples(self):
        rng = np.random.default_rng(0)
        reference = rng.normal(size=(2000, 3))

        def sample():
            return rng.normal(0.5, 1, size=(150, 3))

        anew = np.std([evaluate.frechet_distance(sample(), reference) for _ in range(300)])
        x = sample()
        estimate = evaluate.frechet_estimate(lambda which: x[which], len(x), reference)
        assert estimate.value == pytest.approx(evaluate.frechet_distance(x, reference))
        assert estimate.resampled.std() == pytest.approx(anew, rel=0.3)
        value, low, high = estimate.interval()
        assert (value - low) == pytest.approx(high - value) and high - value == pytest.approx(1.96 * anew, rel=0.3)

    def test_resamples_within_the_strata(self):
        # Two canvases of a kind only: every resampled set has two of each.
        x = np.array([[0.0], [1.0], [10.0], [11.0]])
        seen = []

        def features(which):
            seen.append(sorted(which >= 2))
            return x[which]

        evaluate.frechet_estimate(features, 4, x, strata=["a", "a", "b", "b"])
        assert all(kinds == [False, False, True, True] for kinds in seen)

    def test_the_difference_of_variants_that_differ_by_little_is_sharper_than_their_intervals(self):
        rng = np.random.default_rng(0)
        reference, x = rng.normal(size=(1000, 3)), rng.normal(0.3, 1, size=(100, 3))
        y = x + 0.05
        one, other = (evaluate.frechet_estimate(lambda which, x=x: x[which], 100, reference) for x in (x, y))
        difference = other.minus(one)
        assert difference.value == pytest.approx(other.value - one.value)
        assert difference.low > 0
        assert difference.high - difference.low < 0.5 * (one.interval().high - one.interval().low)


class TestImageErrors:
    def test_by_hand_and_their_mean_is_the_mse(self):
        a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
        b[0] = 0.5
        assert evaluate.image_errors(a, b).tolist() == [0.25, 0]
        assert evaluate.image_errors(a, b).mean() == evaluate.image_mse(a, b)


class TestCanvasSets:
    def test_are_what_they_say(self):
        sets = evaluate.canvas_sets(12, (2, 3))
        assert [one.name for one in sets] == ["2 digits", "3 digits", "seen"]
        for one, length in zip(sets, (2, 3), strict=False):
            assert one.unseen and all(len(order) == length and canvases.held_out(order) for order in one.orders)
            assert len(one.orders) == len(one.seeds) == 12 and len(one.again) == 4
        seen = sets[-1]
        assert not seen.unseen and not any(map(canvases.held_out, seen.orders)) and not seen.again
        assert [len(order) for order in seen.orders] == [2, 3] * 6

    def test_no_seed_is_used_twice(self):
        seeds = [s for base in (0, 1) for one in evaluate.canvas_sets(40, seed=base) for s in (*one.seeds, *one.again)]
        assert len(set(seeds)) == len(seeds)
        assert all(0 <= s < 2**63 for s in seeds)

    def test_a_smaller_run_draws_a_part_of_a_larger_one(self):
        small, large = evaluate.canvas_sets(8, seed=3), evaluate.canvas_sets(20, seed=3)
        for a, b in zip(small, large, strict=True):
            assert a.orders == b.orders[:8] and a.seeds == b.seeds[:8] and a.again == b.again[: len(a.again)]
        assert evaluate.canvas_sets(8, seed=4)[0].orders != small[0].orders

    def test_single_digits_are_never_held_out(self):
        (one, seen) = evaluate.canvas_sets(4, (1,))
        assert one.name == "1 digit" and not one.unseen and not seen.unseen

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [((1,), "n: "), ((5, ()), "digits"), ((5, (2, 2)), "digits"), ((5, (0, 2)), "digits"), ((5, (5,)), "digits")],
        ids=str,
    )
    def test_refuses(self, arguments, named):
        with pytest.raises(ValueError, match=named):
            evaluate.canvas_sets(*arguments)
        with pytest.raises(ValueError, match="seed"):
            evaluate.canvas_sets(5, seed=-1)


class Scribe:
    """Stands for a pipeline that draws what is asked: real canvases, a function of the generator's seed.

    `spoil` is applied to the pictures; `same` makes one picture per prompt.
    """

    def __init__(self):
        self.spoil, self.same = (lambda pictures: pictures), False
        self.orders = {
            canvases.caption(order): order
            for length in (1, 2, 3)
            for order in itertools.product(range(10), repeat=length)
        }

    def __call__(self, prompts, *, generator, **options):
        seeds = [0 if self.same else g.initial_seed() for g in generator]
        pictures = [real_canvases([self.orders[prompt]], seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return type("Result", (), {"images": self.spoil(torch.cat(pictures))})


@contextlib.contextmanager
def changed(pipe, **attributes):
    before = {name: getattr(pipe, name) for name in attributes}
    vars(pipe).update(attributes)
    yield
    vars(pipe).update(before)


def white_every_second(pictures):
    pictures = pictures.clone()
    pictures[::2] = 1
    return pictures


PER_SET = 12


class Run(NamedTuple):
    """An evaluation, and what its callbacks were told."""

    result: evaluate.Evaluation
    progress: list
    kept: dict


@pytest.fixture(scope="module")
def run():
    progress, kept = [], {}
    result = evaluate.evaluate_canvases(
        Scribe(),
        {
            "half": lambda pipe: changed(pipe, spoil=white_every_second),
            "teacher": lambda pipe: contextlib.nullcontext(),
            "same": lambda pipe: changed(pipe, same=True),
        },
        n=PER_SET,
        lengths=(2, 3),
        batch=6,
        progress=lambda *step: progress.append(step),
        keep=lambda name, one, pictures: kept.setdefault((name, one.name), pictures),
    )
    return Run(result, progress, kept)


@pytest.fixture(scope="module")
def result(run):
    return run.result


class TestEvaluateCanvases:
    def test_a_model_that_draws_real_digits_scores_as_real_digits(self, result):
        teacher, real = result.summary("teacher"), result.summary(None)
        for group in ("2 digits", "3 digits", "seen", "held out"):
            assert teacher["exact"][group].value >= 0.75 and real["exact"][group].value >= 0.75
            assert teacher["count"][group].value == 1
        assert teacher["digits_distance"].value < 2 * real["digits_distance"].value
        assert teacher["canvas_distance"].value < 2 * real["canvas_distance"].value
        assert 0.5 < teacher["canvas_diversity"].value < 1.5 and 0.5 < real["canvas_diversity"].value < 1.5
        assert 0.5 < teacher["writing_diversity"].value < 1.5 and 0.5 < real["writing_diversity"].value < 1.5
        assert teacher["error"] is None and real["error"] is None

    def test_a_model_that_leaves_half_of_the_canvases_white_loses_their_half(self, result):
        half, teacher = result.summary("half"), result.summary("teacher")
        for group in ("2 digits", "3 digits", "seen"):
            assert half["count"][group].value == 0.5
            right = result.variants["teacher"].scores[group].exact[1::2].mean()
            assert half["exact"][group].value == right / 2
        assert half["digits_distance"].value > 2 * teacher["digits_distance"].value
        assert half["error"].value > 0

    def test_a_model_that_draws_one_picture_per_prompt_has_no_diversity_and_all_accuracy(self, result):
        same = result.summary("same")
        assert same["canvas_diversity"].value == 0
        assert same["writing_diversity"].value == 0
        assert same["exact"]["held out"].value >= 0.75

    def test_errors_are_against_the_teacher_seed_by_seed(self, result, run):
        for name in ("half", "same"):
            for one in result.sets:
                expected = evaluate.image_errors(run.kept[name, one.name], run.kept["teacher", one.name])
                assert np.array_equal(result.variants[name].errors[one.name], expected)

    def test_differences_are_paired(self, result):
        difference = result.difference("half", "teacher")["exact"]["held out"]
        a, b = (
            np.concatenate([result.variants[v].scores[g].exact for g in ("2 digits", "3 digits")])
            for v in ("half", "teacher")
        )
        assert difference == evaluate.paired_interval(a, b)
        assert result.comparisons() == [("teacher", "half"), ("same", "half"), ("same", "teacher")]

    def test_held_out_is_all_held_out_sets_and_nothing_seen(self, result):
        assert result.groups["held out"] == ("2 digits", "3 digits")
        single = evaluate.CanvasSet("1 digit", ((1,),), (0,), (), False)
        other = evaluate.Evaluation({}, [single], 1.0, None, {}, None, None)
        assert other.groups == {"1 digit": ("1 digit",)}

    def test_progress_counts_to_the_end_for_every_variant(self, run):
        total = 3 * PER_SET + 2 * 4
        for name in ("half", "teacher", "same"):
            steps = [step for step in run.progress if step[0] == name]
            assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})
            assert steps[-1] == (name, total, total)

    def test_the_json_has_what_every_figure_follows_from(self, result):
        data = json.loads(json.dumps(result.to_json(), allow_nan=False))
        orders = [[int(digit) for digit in order] for order in data["sets"][1]["orders"]]
        seen = [[int(digit) for digit in order] for order in data["variants"]["half"]["pictures"]["3 digits"]["seen"]]
        figures = evaluate.share_interval(evaluate.score_orders(seen, orders).exact)
        assert data["variants"]["half"]["summary"]["exact"]["3 digits"] == pytest.approx(figures, rel=1e-5)
        errors = [e for s in data["sets"] for e in data["variants"]["half"]["pictures"][s["name"]]["error"]]
        assert data["variants"]["half"]["summary"]["error"] == pytest.approx(evaluate.interval(errors), rel=1e-4)
        pairs, reference = data["variants"]["teacher"]["pairs"]["canvas"], data["real"]["pairs"]["canvas_reference"]
        expected = evaluate.ratio_interval(pairs, reference)
        assert data["variants"]["teacher"]["summary"]["canvas_diversity"] == pytest.approx(expected, rel=1e-4)

    def test_without_the_teacher_there_are_no_errors_and_without_variants_nothing(self):
        result = evaluate.evaluate_canvases(
            Scribe(), {"any": lambda pipe: contextlib.nullcontext()}, n=2, lengths=(2,), batch=4
        )
        assert result.summary("any")["error"] is None and result.settings["reference"] is None
        assert result.comparisons() == []
        with pytest.raises(ValueError, match="variants"):
            evaluate.evaluate_canvases(Scribe(), {}, n=2)

    def test_pictures_that_are_not_finite_are_no_picture(self):
        pipe = Scribe()
        pipe.spoil = lambda pictures: pictures * float("nan")
        with pytest.raises(FloatingPointError, match=r"'broken'.*2 digits"):
            evaluate.evaluate_canvases(pipe, {"broken": lambda pipe: contextlib.nullcontext()}, n=2, lengths=(2,))


class TestZeroedAttention:
    def test_switches_off_self_attention_alone_and_only_inside(self):
        pytest.importorskip("diffusers")
        from helpers.tiny_pipelines import tiny_pipeline

        pipe = tiny_pipeline("sd15")
        layers = {name: m for name, m in pipe.unet.named_modules() if name.endswith((".attn1", ".attn2"))}
        x = {name: torch.randn(1, 4, layer.query_dim) for name, layer in layers.items()}
        text = torch.randn(1, 4, pipe.unet.config.cross_attention_dim)

        def outputs():
            with torch.no_grad():
                return {
                    name: layer(x[name], text if name.endswith("attn2") else None) for name, layer in layers.items()
                }

        before = outputs()
        with evaluate.zeroed_attention(pipe):
            inside = outputs()
        after = outputs()
        assert len(layers) >= 4
        for name in layers:
            assert torch.equal(before[name], after[name])
            expected = torch.zeros_like(before[name]) if name.endswith("attn1") else before[name]
            assert torch.equal(inside[name], expected)

    def test_refuses_a_model_without_self_attention(self):
        pipe = type("Pipe", (), {"unet": torch.nn.Linear(2, 2)})
        with pytest.raises(ValueError, match="attn1"), evaluate.zeroed_attention(pipe):
            pass
