"""linattn.evaluate and linattn.bundled.digits: scores against cases worked out by hand."""

import random
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from linattn import evaluate
from linattn.bundled import digits


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


class TestAccuracy:
    def test_real_digits_are_read_right_and_wrong_labels_are_wrong(self):
        split = digits.load()
        pictures = digits.render(split.test[:200])
        assert evaluate.accuracy(pictures, split.test_labels[:200]) >= 0.97
        assert evaluate.accuracy(pictures, (split.test_labels[:200] + 1) % 10) <= 0.03

    def test_counts_the_share(self):
        split = digits.load()
        read = evaluate.digit_classifier().predict(digits.render(split.test[:4]))
        labels = read.copy()
        labels[0] = (labels[0] + 1) % 10
        assert evaluate.accuracy(digits.render(split.test[:4]), labels) == 0.75

    def test_reads_larger_pictures_too(self):
        split = digits.load()
        assert evaluate.accuracy(digits.render(split.test[:100], resolution=128), split.test_labels[:100]) >= 0.97

    @pytest.mark.parametrize("pictures, labels", [(2, 3), (0, 0)])
    def test_refuses_unequal_numbers_and_none(self, pictures, labels):
        with pytest.raises(ValueError, match="one label per picture"):
            evaluate.accuracy(torch.zeros(pictures, 3, 64, 64), [0] * labels)


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

    def test_refuses_unequal_numbers(self):
        with pytest.raises(ValueError, match="one seed per prompt"):
            evaluate.draw(Painter(), ["a", "b"], seeds=[1])


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

    def test_rendering_is_dark_ink_on_white_paper(self):
        grids = np.zeros((2, 8, 8), dtype=np.float32)
        grids[1] = 1
        pictures = digits.render(grids)
        assert pictures.shape == (2, 3, 64, 64)
        assert pictures[0].min() == 1 and pictures[1].max() == 0

    def test_shrinking_undoes_rendering_as_far_as_contrast_allows(self):
        grids = digits.load().test[:100]
        back = digits.to_grid(digits.render(grids))
        assert back.shape == grids.shape and back.min() >= 0 and back.max() <= 1
        assert np.corrcoef(back.ravel(), grids.ravel())[0, 1] > 0.98

    def test_free_captions_always_name_the_digit_and_nothing_that_contradicts(self):
        rng, names = random.Random(0), set()
        for _ in range(500):
            digit = rng.randrange(10)
            words = digits.free_caption(digit, rng).rstrip(".!").split()
            said = [word for word in words if word in digits.WORDS or word.isdigit()]
            assert said in ([digits.WORDS[digit]], [str(digit)])
            assert len(words) <= 9
            names.add(said[0])
        assert len(names) == 20  # both ways of saying all ten

    def test_names_the_extra_where_scikit_learn_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"linattn\[demo\]"):
            digits.load.__wrapped__()
