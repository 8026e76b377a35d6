"""How good are the pictures of the bundled models? Scores against real handwriting that training never saw.

Three layers, each usable alone:

- pictures: :func:`draw`, and :func:`zeroed_attention` as a control;
- scores of pictures: :func:`read_canvases` and :func:`score_canvases` (are the digits those that were asked for, in
  order?), :func:`frechet_distance` (are the pictures distributed as real ones?), :func:`image_errors` (how far from
  the teacher's, seed by seed?), distances between pictures of one prompt (is there more than one?), and
  :func:`interval` (how sure is any of it?);
- :func:`evaluate_canvases`, the experiment that puts them together for several variants of one pipeline. It is what
  `linattn eval` runs.

Pictures are float tensors (n, 3, height, width) in 0..1, as a diffusers pipeline returns them for
``output_type="pt"``. scikit-learn and the scipy it brings (extra ``demo``) are imported when a score needs them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from linattn.bundled import canvases, digits
from linattn.bundled.canvases import Order

BLOCKS = 8  # blocks along one side of a cell at which it is read; real scans have as many
FAINTEST = 0.1  # ink of the darkest block of a canvas below which the canvas is empty paper
FAINT = 0.5  # share of the canvas's darkest block that the darkest block of a cell must have to count as written on
LEVEL = 0.95  # of every interval
RESAMPLES = 2000
FRECHET_RESAMPLES = 400  # only their spread is used
REFERENCE_COPIES = 4  # real canvases per order that Frechet distances compare with


# --------------------------------------------------------------------------------------------------------- drawing


def draw(
    pipe,
    prompts,
    *,
    seeds,
    steps: int = 25,
    guidance_scale: float = 3.0,
    side: int | None = None,
    batch: int = 50,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """One picture per prompt from a diffusers pipeline, (n, 3, height, width) in 0..1 on the CPU.

    Every picture has a generator of its own, so that it depends on neither its place nor the size of its batch.

    Args:
        prompts, seeds: sequences of equal length.
        side: height and width in pixels; the pipeline's own choice where it is not given.
        progress: called after every batch with the number of pictures in it.

    Raises:
        ValueError: different lengths, or nothing to draw.
    """
    prompts, seeds = list(prompts), list(seeds)
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"draw needs one seed per prompt, at least one; got {len(prompts)=}, {len(seeds)=}")
    size = {} if side is None else {"height": side, "width": side}
    made = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        result = pipe(
            prompts[part],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            num_inference_steps=steps,
            output_type="pt",
            **size,
            **call_arguments(pipe, len(prompts[part]), guidance_scale),
        )
        made.append(result.images.float().cpu())
        if progress is not None:
            progress(len(made[-1]))
    return torch.cat(made)


def call_arguments(pipe, count: int, guidance_scale: float) -> dict:
    """What a text-to-image pipeline must be told so that it guides by ``guidance_scale`` and reads its prompts whole.

    Most pipelines guide by ``guidance_scale``: two evaluations per step, with the prompt and with an empty one. Those
    of FLUX take it for a number that the model was trained to read; a FLUX that reads none (schnell) is guided by
    ``true_cfg_scale`` beside an empty negative prompt. Where prompts are padded to ``max_sequence_length`` tokens, it
    is the length that the model's own tokenizer names, if that is less than the pipeline's.

    Args:
        count: number of prompts of the call.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    reads_guidance = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "guidance_embeds", True)
    if "true_cfg_scale" in parameters and not reads_guidance:
        arguments = {"true_cfg_scale": guidance_scale, "negative_prompt": [""] * count}
    else:
        arguments = {"guidance_scale": guidance_scale}
    if "max_sequence_length" in parameters:
        tokenizer = getattr(pipe, "tokenizer_3", None) or getattr(pipe, "tokenizer_2", None)
        longest = parameters["max_sequence_length"].default
        arguments["max_sequence_length"] = min(longest, getattr(tokenizer, "model_max_length", longest))
    return arguments


@contextlib.contextmanager
def zeroed_attention(pipe) -> Iterator[None]:
    """The control "no self-attention": inside, every ``attn1`` of the pipeline's UNet gives zeros.

    Raises:
        ValueError: the UNet has no ``attn1``, so nothing would be switched off.
    """
    layers = [module for name, module in pipe.unet.named_modules() if name.rpartition(".")[2] == "attn1"]
    if not layers:
        raise ValueError(f"{type(pipe.unet).__name__} has no self-attention called attn1 to switch off")
    hooks = [layer.register_forward_hook(lambda layer, inputs, output: torch.zeros_like(output)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------ reading canvases


def cell_ink(pictures: torch.Tensor) -> np.ndarray:
    """What all scores of canvases look at: mean ink of BLOCKS x BLOCKS blocks of every cell.

    Args:
        pictures: (n, 3, height, width) in 0..1, any height and width; a canvas of another size is read as well.

    Returns:
        (n, CELLS, BLOCKS * BLOCKS) ink in 0..1, cells in reading order.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"canvases are (n, 3, height, width), got {tuple(pictures.shape)}")
    ink = 1 - pictures.float().clamp(0, 1).mean(1, keepdim=True)
    return canvases.cut(F.adaptive_avg_pool2d(ink, BLOCKS * canvases.SIDE)).flatten(2).numpy()


def used_cells(ink: np.ndarray) -> np.ndarray:
    """Which cells are written on: (n, CELLS, d) of :func:`cell_ink` -> (n, CELLS) of bool.

    A canvas is by one pen, so a cell counts if its darkest block has at least FAINT of the ink of the canvas's darkest:
    that holds for pale and for black ink alike (of real canvases no used cell has less than 0.7, no empty one any).
    A canvas whose darkest block has less than FAINTEST is empty.
    """
    darkest = ink.max(2)
    of_canvas = darkest.max(1, keepdims=True)
    return (darkest >= FAINT * of_canvas) & (of_canvas >= FAINTEST)


def _relative(ink: np.ndarray) -> np.ndarray:
    """Cells (..., d) as shares of their darkest block, so that how pale the ink is cannot matter."""
    return ink / np.maximum(ink.max(-1, keepdims=True), 1e-6)


class CanvasJudge(NamedTuple):
    """Reads canvases: which cells are used (:func:`used_cells`), and which digit each is (a support vector machine)."""

    svc: object
    held_out_accuracy: float  # of single cells with scans and pens that it did not learn from

    def read(self, ink: np.ndarray) -> list[Order]:
        """Orders from :func:`cell_ink`."""
        used = used_cells(ink)
        seen = np.full(used.shape, -1)
        if used.any():
            seen[used] = self.svc.predict(_relative(ink[used]))
        return [tuple(int(digit) for digit in row[mask]) for row, mask in zip(seen, used, strict=True)]

    def scores(self, ink: np.ndarray) -> np.ndarray:
        """What it decides by, as features of canvases, (n, 10 + CELLS): which digits, and where.

        For each digit how much the written cells look like it, summed: a cell has one duel for each pair of digits, and
        gives a digit what it wins beyond eight of its nine, so a clear one gives 1.3 to itself and 0.3 to the next.
        Then 1 for each cell that is written on. So few on purpose, as are those of :func:`canvas_features`: a Frechet
        distance needs several canvases per dimension.
        """
        used = used_cells(ink)
        scores = np.zeros((*used.shape, len(self.svc.classes_)))
        if used.any():
            wins = self.svc.decision_function(_relative(ink[used]))  # up to 9 of each, and up to a third for how clear
            scores[used] = np.maximum(wins - (len(self.svc.classes_) - 2), 0)
        return np.concatenate([scores.sum(1), used], axis=1)


@functools.cache
def canvas_judge() -> CanvasJudge:
    """Train the judge of canvases (a second or two, always the same).

    It learns the training scans, each as eight random pens write it, and is tried on the held-out scans written by
    other pens: so neither a writer's slant nor the way in which scans are enlarged is what it judges by.

    Raises:
        ImportError: scikit-learn is missing.
    """
    split = digits.load()  # first: it says what to install where scikit-learn is missing
    from sklearn.svm import SVC

    def written(scans: np.ndarray, times: int, seed: int) -> np.ndarray:
        rng = torch.Generator().manual_seed(seed)
        pens = canvases.make_pens(64, rng)
        cells = []
        for _ in range(times):
            pictures = canvases.draw_cells(scans, pens, torch.randint(64, (len(scans),), generator=rng), rng)
            cells.append(F.adaptive_avg_pool2d(1 - pictures[:, :1], BLOCKS).flatten(1).numpy())
        return _relative(np.concatenate(cells))

    svc = SVC(C=10, gamma="scale").fit(written(split.train, 8, seed=7), np.tile(split.train_labels, 8))
    return CanvasJudge(svc, float(svc.score(written(split.test, 4, seed=8), np.tile(split.test_labels, 4))))


def read_canvases(pictures: torch.Tensor) -> list[Order]:
    """What stands on each canvas, in reading order, as :func:`canvas_judge` reads it: a tuple of digits per picture.

    How pale the ink is does not matter; a canvas without ink is ``()``.

    Args:
        pictures: (n, 3, height, width) in 0..1.
    """
    return canvas_judge().read(cell_ink(pictures))


class CanvasScores(NamedTuple):
    """Per picture, so that intervals and paired differences can be computed; each (n,) float64."""

    exact: np.ndarray  # 1 where the canvas shows the digits that were asked for, in order, and nothing else
    count: np.ndarray  # 1 where it shows as many digits
    place: np.ndarray  # share of the positions asked for where the right digit stands: the k-th seen against the k-th


def score_orders(seen: Sequence[Order], orders: Sequence[Order]) -> CanvasScores:
    """Compare what was read with what was asked for.

    Raises:
        ValueError: different numbers of them, none, or an empty order.
    """
    seen, orders = [tuple(order) for order in seen], [tuple(order) for order in orders]
    if len(seen) != len(orders) or not orders or not all(orders):
        raise ValueError(f"one order of at least one digit per canvas is needed; got {len(seen)=}, {len(orders)=}")
    pairs = list(zip(seen, orders, strict=True))
    return CanvasScores(
        exact=np.array([float(got == order) for got, order in pairs]),
        count=np.array([float(len(got) == len(order)) for got, order in pairs]),
        place=np.array([sum(map(int.__eq__, got, order)) / len(order) for got, order in pairs]),
    )


def score_canvases(pictures: torch.Tensor, orders: Sequence[Order]) -> CanvasScores:
    """:func:`score_orders` of what :func:`read_canvases` reads."""
    return score_orders(read_canvases(pictures), orders)


# -------------------------------------------------------------------------------------------------------- distances


def digit_features(ink: np.ndarray, orders: Sequence[Order]) -> np.ndarray:
    """Features for the Frechet distance of handwriting: the cells of all canvases, pooled.

    Of every canvas its len(order) darkest cells count, whatever was read in them. So n is the same for every model that
    was asked for the same orders, and a cell left empty counts as one.

    Args:
        ink: (n, CELLS, d) of :func:`cell_ink`.
        orders: the n orders that were asked for.

    Returns:
        (sum of the orders' lengths, d): at 64 dimensions and about three digits a canvas, 100 canvases give five
        samples per dimension. Whole canvases at this resolution (576 dimensions) would need thousands.
    """
    ranked = np.argsort(-ink.max(2), axis=1, kind="stable")
    return np.concatenate([ink[i, ranked[i, : len(order)]] for i, order in enumerate(orders)])


def canvas_features(ink: np.ndarray) -> np.ndarray:
    """Features for the Frechet distance of whole canvases: mean ink of 2 x 2 blocks per cell, (n, 4 CELLS).

    They see what single digits cannot: which cells are used. Coarse on purpose: the estimate needs several canvases per
    dimension. (That one pen writes all digits of a canvas is beyond a few hundred canvases: tried.)
    """
    n, cells, _ = ink.shape
    half = BLOCKS // 2
    return ink.reshape(n, cells, 2, half, 2, half).mean((3, 5)).reshape(n, -1)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean(a) - mean(b)|^2 + trace(A + B - 2 (A B)^(1/2)) with A, B the covariances: 0 for equal distributions.

    The estimate falls with the number of samples; compare only figures of equal sample numbers.

    Args:
        a, b: features (n, d) and (m, d), for example of :func:`canvas_features`; n, m >= 2.

    Raises:
        ValueError: other shapes.

    Source: Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"frechet_distance needs (n, d) and (m, d) with n, m >= 2; got {a.shape=}, {b.shape=}")
    return _Gaussian(a).distance(b)


class _Gaussian:
    """Mean and covariance of samples (n, d), and the Frechet distance from them to others."""

    def __init__(self, samples: np.ndarray):
        self.mean, self.cov = samples.mean(0), np.atleast_2d(np.cov(samples, rowvar=False))
        values, vectors = np.linalg.eigh(self.cov)
        self.root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T

    def distance(self, samples: np.ndarray) -> float:
        cov = np.atleast_2d(np.cov(samples, rowvar=False))
        # trace((A B)^(1/2)) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: no
        # matrix root of a nearly singular product, no complex rounding residue.
        cross = np.sqrt(np.linalg.eigvalsh(self.root @ cov @ self.root).clip(min=0)).sum()
        means = ((self.mean - samples.mean(0)) ** 2).sum()
        return float(means + np.trace(self.cov) + np.trace(cov) - 2 * cross)


def image_mse(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean squared difference of two sets of pictures made from the same prompts and seeds, pixel values in 0..1.

    Raises:
        ValueError: different shapes.
    """
    return float(image_errors(a, b).mean())


def image_errors(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """:func:`image_mse` picture by picture: two of (n, ...) -> (n,) float64.

    Raises:
        ValueError: different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures of equal shapes are compared; got {tuple(a.shape)=}, {tuple(b.shape)=}")
    return ((a.double() - b.double()) ** 2).flatten(1).mean(1).numpy()


def canvas_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How different are two canvases of one prompt? Mean squared difference of their ink, cell by cell.

    Its mean over pairs with independent seeds is twice the variance of the canvases of a prompt: which cells are used,
    pen, and handwriting, the cells most of all. It is 0 for a model that draws one picture per prompt.

    Args:
        a, b: (n, CELLS, d) of :func:`cell_ink`; row i of both from the same prompt.

    Returns:
        (n,) float64.
    """
    return ((a.astype(np.float64) - b) ** 2).mean((1, 2))


def writing_distances(a: np.ndarray, b: np.ndarray, orders: Sequence[Order]) -> np.ndarray:
    """How differently are the same digits written? As :func:`canvas_distances`, the k-th digit against the k-th.

    It sees what changing cells would hide: a model that writes every seven alike, wherever it puts it. How pale the ink
    is does not count.

    Returns:
        (n,) float64; nan where one of the two canvases does not read as asked, since other digits differ anyway.
    """
    judge, result = canvas_judge(), np.full(len(orders), np.nan)
    for i, (seen_a, seen_b, order) in enumerate(zip(judge.read(a), judge.read(b), orders, strict=True)):
        if seen_a == seen_b == tuple(order):
            first, second = (_relative(x[i, used_cells(x[i : i + 1])[0]].astype(np.float64)) for x in (a, b))
            result[i] = ((first - second) ** 2).mean()
    return result


# -------------------------------------------------------------------------------------------------------- intervals


class Interval(NamedTuple):
    """An estimate with the ends of its interval (LEVEL)."""

    value: float
    low: float
    high: float


def interval(values, *, seed: int = 0) -> Interval:
    """Mean of independent values with its percentile bootstrap interval.

    Args:
        values: (n,), n >= 2.
        seed: of the resampling.

    Raises:
        ValueError: fewer than two values.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    return _bootstrap((_samples(values),), np.mean, seed)


def share_interval(values, *, seed: int = 0) -> Interval:
    """:func:`interval` of values in 0..1, such as right answers.

    Where all are 0, or all are 1, resampling shows no spread, though n right answers do not prove that all would be
    right. The interval is then that of Clopper and Pearson for a share: for 100 of 100 from 0.96 to 1.

    Raises:
        ValueError: fewer than two values, or values outside 0..1.
    """
    values = _samples(values)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"shares are from 0 to 1, got {values.min()} to {values.max()}")
    if values.min() == values.max() and values[0] in (0, 1):
        from scipy.stats import binomtest

        ends = binomtest(round(values.sum()), len(values)).proportion_ci(LEVEL, method="exact")
        return Interval(float(values[0]), float(ends.low), float(ends.high))
    return _bootstrap((values,), np.mean, seed)


def paired_interval(a, b, *, seed: int = 0) -> Interval:
    """Mean of a - b with its interval, where a[i] and b[i] belong together (the same prompt and seed).

    What is hard for both cancels, so this is a sharper statement of "a is better than b" than two intervals that do or
    do not overlap.

    Raises:
        ValueError: different numbers of values, or fewer than two.
    """
    a, b = _samples(a), _samples(b)
    if len(a) != len(b):
        raise ValueError(f"paired values are needed, got {len(a)} and {len(b)}")
    return _bootstrap((a - b,), np.mean, seed)


def ratio_interval(a, b, *, seed: int = 0) -> Interval:
    """mean(a) / mean(b) with its interval, where a[i] and b[i] belong together and are drawn together.

    Raises:
        ValueError: different numbers of values, or fewer than two.
    """
    a, b = _samples(a), _samples(b)
    if len(a) != len(b):
        raise ValueError(f"paired values are needed, got {len(a)} and {len(b)}")
    return _bootstrap((a, b), lambda a, b, axis: a.mean(axis) / b.mean(axis), seed, paired=True)


def _samples(values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs (n,) values, n >= 2; got shape {values.shape}")
    return values


def _bootstrap(samples: tuple, statistic, seed: int, **options) -> Interval:
    from scipy.stats import bootstrap

    ends = bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        random_state=np.random.default_rng(seed),
        **options,
    ).confidence_interval
    return Interval(float(statistic(*samples, axis=-1)), float(ends.low), float(ends.high))


class FrechetEstimate(NamedTuple):
    """A Frechet distance and how it scatters when the canvases are drawn anew."""

    value: float
    resampled: np.ndarray  # (FRECHET_RESAMPLES,)

    def interval(self) -> Interval:
        """The value, and 1.96 standard deviations of `resampled` to either side.

        Not percentiles: a resampled set repeats canvases, so its covariance is further off and all its distances are
        too large; only their spread means something. So the interval says how far another draw of as many canvases may
        differ, and not where the distance of infinitely many would be.
        """
        return _around(self.value, self.resampled)

    def minus(self, other: FrechetEstimate) -> Interval:
        """The difference of two estimates of :func:`frechet_estimate` that resampled the same prompts together."""
        return _around(self.value - other.value, self.resampled - other.resampled)


def _around(value: float, resampled: np.ndarray) -> Interval:
    margin = 1.96 * float(resampled.std(ddof=1))
    return Interval(value, value - margin, value + margin)


def frechet_estimate(features, n: int, reference: np.ndarray, *, strata=None, seed: int = 0) -> FrechetEstimate:
    """Frechet distance between canvases and a reference, with bootstrap resampling of the canvases.

    Args:
        features: function of an array of indices of canvases (repeats allowed) that gives their features (m, d).
        n: number of canvases.
        reference: features (m, d) of real canvases; it is not resampled.
        strata: (n,) labels; canvases are resampled among those of the same label. With the orders' lengths as labels,
            every resampled set has as many digits.
        seed: of the resampling; equal seeds, n and strata draw equal indices.
    """
    from scipy.stats import bootstrap

    strata = np.zeros(n) if strata is None else np.asarray(strata)
    groups = tuple(np.flatnonzero(strata == label) for label in np.unique(strata))
    gaussian = _Gaussian(np.asarray(reference, dtype=np.float64))

    def distance(*indices) -> float:
        which = np.concatenate(indices).astype(int)  # scipy makes them floats
        return gaussian.distance(np.asarray(features(which), dtype=np.float64))

    resampled = bootstrap(
        groups,
        distance,
        n_resamples=FRECHET_RESAMPLES,
        method="percentile",
        vectorized=False,
        random_state=np.random.default_rng(seed),
    ).bootstrap_distribution
    return FrechetEstimate(distance(*groups), resampled)


# --------------------------------------------------------------------------------------------------- the experiment


class CanvasSet(NamedTuple):
    """Orders that are drawn and scored together."""

    name: str
    orders: tuple[Order, ...]
    seeds: tuple[int, ...]  # one per order
    again: tuple[int, ...]  # seeds of a second picture for the first of the orders, for diversity; may be empty
    unseen: bool  # whether training leaves all of them out


def canvas_sets(n: int, lengths: Sequence[int] = (2, 3, 4), *, seed: int = 0) -> list[CanvasSet]:
    """What is drawn: for every length n held-out orders, and n orders of these lengths in turn that training may see.

    Single digits are never held out, so a set of length 1 is of seen ones. An order of two digits occurs several times,
    since only about twenty are held out. A third of each set but the last is drawn twice, with another seed.

    Every order and seed is a function of `seed`, the set and its number in it: a smaller run draws a part of what a
    larger one draws.

    Raises:
        ValueError: n < 2, no lengths, a length twice or out of range, or a seed that is negative.
    """
    lengths = tuple(lengths)
    if n < 2:
        raise ValueError(f"n: expected 2 or more orders per set (one has no interval), got {n}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    if not lengths or len(set(lengths)) < len(lengths) or not all(1 <= k <= canvases.LONGEST for k in lengths):
        raise ValueError(f"digits: expected different numbers from 1 to {canvases.LONGEST}, got {list(lengths)}")

    def make(name: str, kinds: Sequence[int], unseen: bool, twice: int) -> CanvasSet:
        rng = random.Random(f"{seed} {name}")
        return CanvasSet(
            name,
            tuple(canvases.draw_order(rng, k, unseen=unseen) for k in itertools.islice(itertools.cycle(kinds), n)),
            tuple(_seed(seed, name, i) for i in range(n)),
            tuple(_seed(seed, name, i, "again") for i in range(twice)),
            unseen,
        )

    sets = [make(f"{k} digits" if k > 1 else "1 digit", (k,), k > 1, max(2, n // 3)) for k in lengths]
    return [*sets, make("seen", lengths, False, 0)]


def _seed(*words) -> int:
    """A seed for torch that is the same for the same words, and unrelated for others."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, words)).encode()).digest()[:7], "big")


@dataclass
class Drawn:
    """What one variant drew, and everything that was measured on it. Dictionaries are by set."""

    seen: dict[str, list[Order]]
    scores: dict[str, CanvasScores]
    digits_distance: FrechetEstimate  # of digit_features
    canvas_distance: FrechetEstimate  # of canvas_features
    distances: np.ndarray  # canvas_distances of the pairs of all sets, one after the other
    writing: np.ndarray  # writing_distances
    errors: dict[str, np.ndarray] | None = None  # image_errors against the reference variant
    seconds: float | None = None  # per picture, all its steps; wall time


@dataclass
class Evaluation:
    """The result of :func:`evaluate_canvases`.

    `real` is what real digits score: orders, Frechet distances and diversity of canvases that the program draws. They
    are read with held-out scans, which neither judge nor models learnt from; Frechet distance and diversity are those
    of canvases with training scans against the held-out ones that everything is compared with.
    """

    settings: dict
    sets: list[CanvasSet]
    judge_accuracy: float
    real: Drawn
    variants: dict[str, Drawn]
    real_distances: np.ndarray  # canvas_distances of real canvases, mean over pairs of one order
    real_writing: np.ndarray

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """What scores are given for: every set, and all held-out ones together."""
        unseen = tuple(one.name for one in self.sets if one.unseen)
        return {one.name: (one.name,) for one in self.sets} | ({"held out": unseen} if unseen else {})

    def _scores(self, drawn: Drawn, measure: str, group: str) -> np.ndarray:
        return np.concatenate([getattr(drawn.scores[name], measure) for name in self.groups[group]])

    def summary(self, name: str | None) -> dict[str, Interval | dict[str, Interval] | float | None]:
        """Every figure of a variant, or with None of the real canvases, as :class:`Interval`.

        exact, count, place: by group, see :class:`CanvasScores`.
        digits_distance, canvas_distance: Frechet distances; compare with those of real canvases in the same run only.
        error: same-seed mean squared difference to the reference variant; None for that one, and
            where it was not drawn.
        canvas_diversity, writing_diversity: mean of :func:`canvas_distances` and :func:`writing_distances` over that of
            real canvases of the same orders: 0 for a model with one picture per prompt, 1 for one that varies as much
            as real canvases do. Above 1 it varies more, which is no merit: noise does. None where fewer than two pairs
            read as asked.
        seconds: per picture.
        """
        drawn = self.real if name is None else self.variants[name]
        result = {
            measure: {group: share_interval(self._scores(drawn, measure, group)) for group in self.groups}
            for measure in CanvasScores._fields
        }
        return result | {
            "digits_distance": drawn.digits_distance.interval(),
            "canvas_distance": drawn.canvas_distance.interval(),
            "error": None if drawn.errors is None else interval(np.concatenate(list(drawn.errors.values()))),
            "canvas_diversity": _diversity(drawn.distances, self.real_distances),
            "writing_diversity": _diversity(drawn.writing, self.real_writing),
            "seconds": drawn.seconds,
        }

    def difference(self, a: str, b: str) -> dict[str, Interval | dict[str, Interval]]:
        """Paired differences, variant a minus variant b, of what they drew from the same prompts and seeds."""
        one, other = self.variants[a], self.variants[b]
        result = {
            measure: {
                group: paired_interval(self._scores(one, measure, group), self._scores(other, measure, group))
                for group in self.groups
            }
            for measure in CanvasScores._fields
        }
        return result | {
            "digits_distance": one.digits_distance.minus(other.digits_distance),
            "canvas_distance": one.canvas_distance.minus(other.canvas_distance),
        }

    def comparisons(self) -> list[tuple[str, str]]:
        """The pairs of variants worth a difference: each with the first, and with the one before it."""
        names = list(self.variants)
        return [
            (name, other) for i, name in enumerate(names[1:], 1) for other in dict.fromkeys((names[0], names[i - 1]))
        ]

    def to_json(self) -> dict:
        """All figures, and per picture what was read and its error, from which they can be computed anew."""
        return {
            "settings": self.settings,
            "judge_accuracy": self.judge_accuracy,
            "sets": [
                {
                    "name": one.name,
                    "held_out": one.unseen,
                    "orders": [_text(order) for order in one.orders],
                    "seeds": list(one.seeds),
                    "again": list(one.again),
                }
                for one in self.sets
            ],
            "real": self._to_json(None),
            "variants": {name: self._to_json(name) for name in self.variants},
            "differences": [{"of": a, "minus": b, **_plain(self.difference(a, b))} for a, b in self.comparisons()],
        }

    def _to_json(self, name: str | None) -> dict:
        drawn = self.real if name is None else self.variants[name]
        pictures = {}
        for one in self.sets:
            pictures[one.name] = {"seen": [_text(order) for order in drawn.seen[one.name]]}
            if drawn.errors is not None:
                pictures[one.name]["error"] = [float(f"{x:.6g}") for x in drawn.errors[one.name]]
        pairs = {"canvas": drawn.distances, "writing": drawn.writing}
        if name is None:
            pairs |= {"canvas_reference": self.real_distances, "writing_reference": self.real_writing}
        return {
            "summary": _plain(self.summary(name)),
            "pictures": pictures,
            "pairs": {key: [None if np.isnan(x) else float(f"{x:.6g}") for x in v] for key, v in pairs.items()},
        }


def _diversity(drawn: np.ndarray, real: np.ndarray) -> Interval | None:
    both = ~np.isnan(drawn) & ~np.isnan(real)
    return ratio_interval(drawn[both], real[both]) if both.sum() >= 2 else None


def _text(order: Order) -> str:
    return "".join(map(str, order))


def _plain(value):
    """Intervals as lists of rounded numbers, for JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, Interval):
        return [float(f"{x:.6g}") for x in value]
    return value


#: Puts a pipeline into the state that is to be scored, and back: a function of the pipeline that gives a context.
Variant = Callable[[object], contextlib.AbstractContextManager]


def evaluate_canvases(
    pipe,
    variants: Mapping[str, Variant],
    *,
    n: int = 100,
    lengths: Sequence[int] = (2, 3, 4),
    seed: int = 0,
    steps: int = 15,
    guidance_scale: float = 2.5,
    batch: int = 20,
    reference: str | None = "teacher",
    progress: Callable[[str, int, int], None] | None = None,
    keep: Callable[[str, CanvasSet, torch.Tensor], None] | None = None,
) -> Evaluation:
    """Draw the same orders with the same seeds by every variant of a pipeline, and score what they drew.

        evaluate_canvases(pipe, {"teacher": lambda pipe: nullcontext(), "zeroed": zeroed_attention}, n=20)

    Args:
        pipe: a text-to-image pipeline that draws canvases (:mod:`linattn.bundled.canvases`).
        variants: name -> function of the pipeline that gives a context; inside it the pipeline draws as this variant.
        n, lengths, seed: what is drawn, see :func:`canvas_sets`: n pictures per length and n of seen orders, and
            for diversity a third more per length.
        steps, guidance_scale, batch: how; the batch decides over time and memory, and over the last bits at most.
        reference: the variant that same-seed errors are measured against; no errors where it is None or not drawn.
        progress: called after every batch with (variant, pictures drawn by it, pictures it will draw).
        keep: called with (variant, set, its pictures in the order of the set), for example to save them.

    Raises:
        ValueError: see :func:`canvas_sets`, or no variants.
        ImportError: scikit-learn is missing.
        FloatingPointError: a variant draws pictures with infinite or undefined values.
    """
    sets = canvas_sets(n, lengths, seed=seed)
    if not variants:
        raise ValueError("variants: expected at least one")
    split = digits.load()
    judge = canvas_judge()
    orders = [order for one in sets for order in one.orders]
    strata = [len(order) for order in orders]
    total = sum(len(one.orders) + len(one.again) for one in sets)

    test = [_real_ink(orders, split.test, split.test_labels, _seed(seed, "real", i)) for i in range(REFERENCE_COPIES)]
    train = [_real_ink(orders, split.train, split.train_labels, _seed(seed, "train", i)) for i in range(2)]
    digits_reference = np.concatenate([digit_features(ink, orders) for ink in test])
    canvas_reference = canvas_features(np.concatenate(test))
    # The pairs of one order, and where they stand among all orders.
    starts = np.cumsum([0, *(len(one.orders) for one in sets)])
    paired = np.concatenate([start + np.arange(len(one.again)) for start, one in zip(starts, sets, strict=False)])
    paired_orders = [orders[i] for i in paired]

    def measure(first: np.ndarray, second: np.ndarray, read: np.ndarray | None = None) -> Drawn:
        seen = judge.read(first if read is None else read)
        by_set = {one.name: seen[start : start + n] for start, one in zip(starts, sets, strict=False)}
        of_digits = [digit_features(first[i : i + 1], orders[i : i + 1]) for i in range(len(orders))]
        of_canvas = canvas_features(first)
        return Drawn(
            seen=by_set,
            scores={one.name: score_orders(by_set[one.name], one.orders) for one in sets},
            digits_distance=frechet_estimate(
                lambda which: np.concatenate([of_digits[i] for i in which]),
                len(orders),
                digits_reference,
                strata=strata,
            ),
            canvas_distance=frechet_estimate(
                lambda which: of_canvas[which], len(orders), canvas_reference, strata=strata
            ),
            distances=canvas_distances(first[paired], second),
            writing=writing_distances(first[paired], second, paired_orders),
        )

    real = measure(train[0], train[1][paired], read=test[0])
    pairs = list(itertools.combinations([ink[paired] for ink in test], 2))
    with np.errstate(invalid="ignore"):
        writing = np.array([writing_distances(a, b, paired_orders) for a, b in pairs])
    counted = ~np.isnan(writing)
    real_writing = np.where(counted.any(0), np.nansum(writing, 0) / np.maximum(counted.sum(0), 1), np.nan)

    made: dict[str, Drawn] = {}
    references: dict[str, torch.Tensor] = {}
    first_of_all = sorted(variants, key=lambda name: name != reference)  # the reference first, else as given
    for name in first_of_all:
        done = 0

        def advance(count: int, name=name) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(name, done, total)

        first, second, errors, seconds = [], [], {}, 0.0
        with variants[name](pipe):
            for one in sets:
                prompts = [canvases.caption(order) for order in one.orders]
                begin = time.perf_counter()
                pictures = draw(
                    pipe,
                    [*prompts, *prompts[: len(one.again)]],
                    seeds=[*one.seeds, *one.again],
                    steps=steps,
                    guidance_scale=guidance_scale,
                    side=canvases.RESOLUTION,  # FLUX's pipelines have a size of their own
                    batch=batch,
                    progress=advance,
                )
                seconds += time.perf_counter() - begin
                if not torch.isfinite(pictures).all():
                    raise FloatingPointError(f"variant {name!r}: some pictures of set {one.name!r} are not finite")
                ink = cell_ink(pictures)
                first.append(ink[:n])
                second.append(ink[n:])
                pictures = pictures[:n]
                if name == reference:
                    references[one.name] = pictures
                elif references:
                    errors[one.name] = image_errors(pictures, references[one.name])
                if keep is not None:
                    keep(name, one, pictures)
        made[name] = measure(np.concatenate(first), np.concatenate(second))
        made[name].errors, made[name].seconds = errors or None, seconds / total

    settings = {
        "n": n,
        "digits": list(lengths),
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "batch": batch,
        "reference": reference if references else None,
        "level": LEVEL,
    }
    return Evaluation(
        settings=settings,
        sets=sets,
        judge_accuracy=judge.held_out_accuracy,
        real=real,
        variants={name: made[name] for name in variants},
        real_distances=np.mean([canvas_distances(a, b) for a, b in pairs], 0),
        real_writing=real_writing,
    )


def _real_ink(orders: Sequence[Order], scans: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """:func:`cell_ink` of canvases that the program draws from scans with these orders."""
    rng, words = torch.Generator().manual_seed(seed), random.Random(seed)
    pens = canvases.make_pens(64, rng)
    parts = [orders[i : i + 100] for i in range(0, len(orders), 100)]  # whole, the pictures would fill the memory
    return np.concatenate([cell_ink(canvases.draw(part, scans, labels, pens, rng=rng, words=words)) for part in parts])
