"""How good are generated digits? Scores for the bundled models, against real handwriting that training never saw.

Pictures are float tensors (n, 3, height, width) in 0..1, as a diffusers pipeline returns them for
``output_type="pt"``. scikit-learn (extra ``demo``) is imported when a score that needs it is asked for.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from linattn.bundled import digits


def draw(pipe, prompts, *, seeds, steps: int = 25, guidance_scale: float = 3.0, batch: int = 50) -> torch.Tensor:
    """One picture per prompt from a diffusers pipeline, (n, 3, height, width) in 0..1 on the CPU.

    Every picture has a generator of its own, so that it depends on neither its place nor the size of its batch.

    Args:
        prompts, seeds: sequences of equal length.

    Raises:
        ValueError: different lengths, or nothing to draw.
    """
    prompts, seeds = list(prompts), list(seeds)
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"draw needs one seed per prompt, at least one; got {len(prompts)=}, {len(seeds)=}")
    made = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        result = pipe(
            prompts[part],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        )
        made.append(result.images.float().cpu())
    return torch.cat(made)


def pixel_features(pictures: torch.Tensor) -> np.ndarray:
    """The features that the scores look at: mean ink of each of the 8 x 8 blocks, (n, 64)."""
    return digits.to_grid(pictures).reshape(len(pictures), -1)


class DigitClassifier(NamedTuple):
    """A support vector machine on :func:`pixel_features` of real digits, and its accuracy on held-out real digits."""

    svc: object
    held_out_accuracy: float

    def predict(self, pictures: torch.Tensor) -> np.ndarray:
        """The digit seen in each picture, (n,) integers."""
        return self.svc.predict(pixel_features(pictures))


@functools.cache
def digit_classifier() -> DigitClassifier:
    """Train the judge (a fraction of a second, always the same).

    It learns from scans that went through the same drawing and shrinking as generated pictures do, so that the way a
    picture is made is not what it judges.
    """
    split = digits.load()  # first: it says what to install where scikit-learn is missing
    from sklearn.svm import SVC

    svc = SVC(C=10, gamma="scale").fit(pixel_features(digits.render(split.train)), split.train_labels)
    score = svc.score(pixel_features(digits.render(split.test)), split.test_labels)
    return DigitClassifier(svc, float(score))


def accuracy(pictures: torch.Tensor, labels) -> float:
    """The share of pictures that a classifier trained on real digits reads as the digit that was asked for.

    Args:
        pictures: (n, 3, height, width) in 0..1.
        labels: (n,) digits 0..9.

    Raises:
        ValueError: another number of labels than pictures, or none.
    """
    labels = np.asarray(labels)
    if len(labels) != len(pictures) or len(labels) == 0:
        raise ValueError(f"accuracy needs one label per picture, at least one; got {len(labels)=}, {len(pictures)=}")
    return float((digit_classifier().predict(pictures) == labels).mean())


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean(a) - mean(b)|^2 + trace(A + B - 2 (A B)^(1/2)) with A, B the covariances: 0 for equal distributions.

    The estimate falls with the number of samples; compare only figures of equal sample numbers.

    Args:
        a, b: features (n, d) and (m, d), for example of :func:`pixel_features`; n, m >= 2.

    Raises:
        ValueError: other shapes.

    Source: Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"frechet_distance needs (n, d) and (m, d) with n, m >= 2; got {a.shape=}, {b.shape=}")
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # trace((A B)^(1/2)) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: no matrix
    # root of a nearly singular product, no complex rounding residue.
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def image_mse(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean squared difference of two sets of pictures made from the same prompts and seeds, pixel values in 0..1.

    Raises:
        ValueError: different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"image_mse compares pictures of equal shapes; got {tuple(a.shape)=}, {tuple(b.shape)=}")
    return float(((a.double() - b.double()) ** 2).mean())
