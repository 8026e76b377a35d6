"""Figures of a set of pictures against another, from features: Frechet distance, precision and recall; CLIP score.

    reference = statistics(features_of_real)                       # or load_statistics("coco.safetensors")
    fid = frechet_distance(features, reference)                    # Figure(value, low, high, n)
    manifold = precision_recall(features, reference.features)      # {"precision": Figure, "recall": Figure, ...}
    clip = mean_figure(clip_scores(pictures, captions, Clip.from_pretrained("openai/clip-vit-base-patch32")))

Features are float tensors (n, d) from a network of :mod:`linattn.feature_networks` or any other. Frechet distance and
CLIP score are torchmetrics' (extra ``eval``, imported when they are asked for), each with an interval beside it; the
nearest-neighbour figures, which no maintained library has for features that were computed before, are here.
What each figure is, and what may be compared with what: docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

LEVEL = 0.95  # of every interval
NEIGHBOURS = 3  # of precision and recall: Kynkaanniemi et al.
DENSITY_NEIGHBOURS = 5  # of density and coverage: Naeem et al.
CONTEXT = 77  # tokens that CLIP reads

#: Names the layout of a file of statistics.
FORMAT = "linattn statistics 1"


class Figure(NamedTuple):
    """An estimate with the ends of its interval (LEVEL), and the number of pictures that it says something about."""

    value: float
    low: float | None  # None where no interval can be given
    high: float | None
    n: int


# ------------------------------------------------------------------------------------------------------- statistics


@dataclasses.dataclass
class Statistics:
    """What a Frechet distance needs of a set of pictures, and the features themselves where they are kept.

    `about` says where they come from: above all the network and how pictures were made ready for it.
    """

    mean: torch.Tensor  # (d,) float64
    covariance: torch.Tensor  # (d, d) float64, divided by n - 1
    n: int
    features: torch.Tensor | None = None  # (n, d)
    about: dict[str, str] = dataclasses.field(default_factory=dict)


def statistics(features: torch.Tensor, about: Mapping[str, str] | None = None) -> Statistics:
    """Mean and covariance, in float64.

    Args:
        features: (n, d), n >= 2.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    features = _checked("features", features)
    x = features.double()
    return Statistics(x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]), len(x), features, dict(about or {}))


def save_statistics(path: str | os.PathLike, of: Statistics) -> None:
    """Write them as safetensors, whole or not at all: mean, covariance, features, and `about` as metadata."""
    from safetensors.torch import save_file

    tensors = {"mean": of.mean, "covariance": of.covariance}
    if of.features is not None:
        tensors["features"] = of.features
    part = Path(f"{path}.part")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            part,
            metadata={**of.about, "format": FORMAT, "n": str(of.n)},
        )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Read what :func:`save_statistics` wrote. A file without features gives Frechet distances only.

    Raises:
        ValueError: it is no such file, or its parts do not fit each other; the message says what is wrong.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    mean, covariance = tensors.get("mean"), tensors.get("covariance")
    if about.pop("format", None) != FORMAT or mean is None or covariance is None or not about.get("n", "").isdigit():
        raise ValueError(f"{path} holds no statistics: expected mean, covariance and the metadata {FORMAT!r} and n")
    n, features = int(about.pop("n")), tensors.get("features")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: expected mean (d,) and covariance (d, d), got {mean.shape}, {covariance.shape}")
    if features is not None and features.shape != (n, len(mean)):
        raise ValueError(f"{path}: expected features ({n}, {len(mean)}), got {tuple(features.shape)}")
    return Statistics(mean.double(), covariance.double(), n, features, about)


def _checked(name: str, features: torch.Tensor, least: int = 2) -> torch.Tensor:
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"{name}: expected (n, d) with n >= {least}, got {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: expected finite values; some are not")
    return features.detach().cpu()


# ------------------------------------------------------------------------------------------------- Frechet distance


def frechet_distance(features: torch.Tensor, reference: Statistics) -> Figure:
    """|m - m_r|^2 + trace(S + S_r - 2 (S S_r)^(1/2)): the FID, where the features are Inception's.

    Means m and covariances S are taken in float64. The value is torchmetrics'; the interval is of the first order, as
    :func:`frechet_influence` has it, with the reference held fixed: it says how far another draw of as many pictures
    may differ, not where the distance of infinitely many would be (the estimate falls with n, by about a constant / n).

    Args:
        features: (n, d); no interval is given for n <= d, where their covariance is singular by accident.
        reference: of the same network.

    Raises:
        ValueError: other shapes, or values that are not finite.
        ImportError: torchmetrics is missing.

    Source: Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017;
    the interval is an infinitesimal jackknife: Efron, "The jackknife, the bootstrap and other resampling plans", 1982.
    """
    features = _checked("features", features)
    n, d = features.shape
    if d != len(reference.mean):
        raise ValueError(f"features have {d} dimensions, those of the reference {len(reference.mean)}")
    from torchmetrics.image.fid import FrechetInceptionDistance

    # No gathering over processes: each that asks has all features.
    metric = FrechetInceptionDistance(feature=_Computed(d), sync_on_compute=False)
    metric.update(features.double(), real=False)
    # Its sums, from which it takes mean and covariance again: a reference may have been saved without its features.
    mean, count = reference.mean, reference.n
    metric.real_features_sum = mean * count
    metric.real_features_cov_sum = reference.covariance * (count - 1) + count * torch.outer(mean, mean)
    metric.real_features_num_samples = torch.tensor(count)
    value = float(metric.compute())
    if n <= d:
        return Figure(value, None, None, n)
    margin = _normal() * float(frechet_influence(features, reference).std()) / math.sqrt(n)
    return Figure(value, value - margin, value + margin, n)


class _Computed(torch.nn.Module):
    """In the place of a feature network: what comes in are the features."""

    def __init__(self, d: int):
        super().__init__()
        self.num_features = d

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_influence(features: torch.Tensor, reference: Statistics) -> torch.Tensor:
    """How the Frechet distance changes with the weight of each picture; mean 0, and variance / n is the distance's own.

        psi(x) = 2 (m - m_r) . (x - m) + (x - m)^T (I - T) (x - m) - trace((I - T) S)
        T = S_r^(1/2) (S_r^(1/2) S S_r^(1/2))^(-1/2) S_r^(1/2)

    since the derivative of trace((S S_r)^(1/2)) by S is T / 2, T the linear map that carries N(0, S) to N(0, S_r).

    Args:
        features: (n, d), n > d.

    Returns:
        (n,) float64.
    """
    x = features.double()
    x = x - (mean := x.mean(0))
    root = _function(reference.covariance, lambda values: values.clamp(min=0).sqrt())
    covariance = x.T @ x / len(x)
    transport = root @ _function(root @ covariance @ root, _inverse_root) @ root
    quadratic = ((x - x @ transport) * x).sum(1)
    return 2 * x @ (mean - reference.mean) + quadratic - quadratic.mean()


def _function(symmetric: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * of(values)) @ vectors.T


def _inverse_root(values: torch.Tensor) -> torch.Tensor:
    # Directions in which one of the sets does not vary have no part in the trace, and none in its change.
    counted = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    return torch.where(counted, values, 1).rsqrt() * counted


def _normal() -> float:
    from scipy.stats import norm

    return float(norm.ppf((1 + LEVEL) / 2))


# --------------------------------------------------------------------------------------------- precision and recall


def precision_recall(
    features: torch.Tensor,
    reference: torch.Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    density_neighbours: int = DENSITY_NEIGHBOURS,
    rows: int = 512,
) -> dict[str, Figure]:
    """How many pictures could be real ones, and how many real ones could be drawn; by balls around nearest neighbours.

    r_k(x) is the distance from x to its k-th nearest neighbour in its own set (x itself does not count). Over pictures
    f and real pictures r:

        precision  share of f with |f - r| <= r_k(r) for some r
        recall     share of r with |f - r| <= r_k(f) for some f
        density    mean over f of the number of r with |f - r| <= r_k(r), divided by k; 1 for equal distributions
        coverage   share of r with |f - r| <= r_k(r) for some f

    Euclidean distances in float64, n (n + 2 m) + m^2 of them, `rows` rows at a time. Intervals are of the pictures that
    a figure is a mean of (its n), with the balls held fixed.

    Args:
        features, reference: (n, d) and (m, d).
        neighbours: k of precision and recall; density_neighbours: of density and coverage.

    Raises:
        ValueError: other shapes, values that are not finite, or no more pictures than neighbours.

    Source: Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models", 2019, section
    3; Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020, section 3.
    """
    wanted = (neighbours, density_neighbours)
    if min(wanted) < 1:
        raise ValueError(f"neighbours: expected 1 or more, got {neighbours=}, {density_neighbours=}")
    drawn = _checked("features", features, neighbours + 1).double()
    real = _checked("reference", reference, max(wanted) + 1).double()
    if drawn.shape[1] != real.shape[1]:
        raise ValueError(f"features have {drawn.shape[1]} dimensions, those of the reference {real.shape[1]}")
    real_radius, density_radius = _squared_radii(real, wanted, rows)
    (drawn_radius,) = _squared_radii(drawn, (neighbours,), rows)

    precise, dense = [], []
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool) for _ in range(2))
    for start in range(0, len(drawn), rows):
        part = slice(start, start + rows)
        distances = _squared_distances(drawn[part], real)
        within = distances <= density_radius
        precise.append((distances <= real_radius).any(1))
        dense.append(within.sum(1).double() / density_neighbours)
        covered |= within.any(0)
        recalled |= (distances <= drawn_radius[part, None]).any(0)
    return {
        "precision": share_figure(torch.cat(precise)),
        "recall": share_figure(recalled),
        "density": mean_figure(torch.cat(dense)),
        "coverage": share_figure(covered),
    }


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm((a * a).sum(1)[:, None] + (b * b).sum(1), a, b.T, alpha=-2).clamp_(min=0)


def _squared_radii(points: torch.Tensor, neighbours: Sequence[int], rows: int) -> list[torch.Tensor]:
    """For each k the squared distance of every point to its k-th nearest neighbour."""
    found = []
    for start in range(0, len(points), rows):
        distances = _squared_distances(points[start : start + rows], points)
        here = torch.arange(len(distances))
        distances[here, start + here] = math.inf
        found.append(distances.topk(max(neighbours), largest=False).values)
    nearest = torch.cat(found)
    return [nearest[:, k - 1] for k in neighbours]


# ------------------------------------------------------------------------------------------------------- CLIP score


class Clip:
    """A CLIP in the form that torchmetrics calls: model and processor in one, whatever the version of transformers.

    Texts are cut to what the model reads with their end token kept, which is the one that it looks at.

    Args:
        model, processor: transformers' CLIPModel and CLIPProcessor.
    """

    def __init__(self, model, processor):
        self.model, self.processor, self.config = model, processor, model.config

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, device: str = "cpu") -> Clip:
        """From a folder or the hub's cache, float32; safetensors only."""
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32, local_files_only=True)
        # Mapped from a file, weights lie at any address, in several processes of one run at others than in one alone,
        # and the last bits of a convolution depend on that.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return cls(model.to(device).eval(), CLIPProcessor.from_pretrained(path, local_files_only=True))

    def to(self, device) -> Clip:
        return self  # it stays where it is; what comes in is moved there

    def __call__(self, text=None, images=None, **options):
        if text is not None:
            longest = getattr(self.config.text_config, "max_position_embeddings", CONTEXT)
            options |= {"truncation": True, "max_length": longest}
        return self.processor(text=text, images=images, **options)

    def get_image_features(self, pixel_values):
        return _embedding(self.model.get_image_features(pixel_values=pixel_values.to(self.model.device)))

    def get_text_features(self, input_ids, attention_mask):
        device = self.model.device
        return _embedding(
            self.model.get_text_features(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
        )


def _embedding(output) -> torch.Tensor:
    # Since transformers 5 the whole output comes back, whose pooler_output is what came before.
    return (output if isinstance(output, torch.Tensor) else output.pooler_output).cpu()


@torch.no_grad()
def clip_scores(pictures: Iterable[torch.Tensor], captions: Iterable[str], clip: Clip) -> torch.Tensor:
    """max(100 cos(E(picture), E(caption)), 0) for each pair, as torchmetrics has it.

    One pair at a time: so a score depends neither on the others nor on how many there are.

    Args:
        pictures: uint8 (3, height, width), of any size: the model's own processor makes them ready.
        captions: as many.

    Returns:
        (n,) float32.

    Raises:
        ImportError: torchmetrics is missing.

    Source: Hessel et al., "CLIPScore: a reference-free evaluation metric for image captioning", 2021 (there with 2.5
    in place of 100, and "A photo depicts " before each caption).
    """
    from torchmetrics.functional.multimodal import clip_score

    scores = [
        clip_score(picture, caption, lambda: (clip, clip)).reshape(())
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    return torch.stack(scores).float() if scores else torch.zeros(0)


# -------------------------------------------------------------------------------------------------------- intervals


def mean_figure(values: torch.Tensor) -> Figure:
    """Mean of independent values with Student's interval: mean -+ t sd / sqrt(n)."""
    values, n = values.double(), len(values)
    if n < 2:
        raise ValueError(f"values: expected 2 or more, got {n}")
    from scipy.stats import t

    margin = float(t.ppf((1 + LEVEL) / 2, n - 1)) * float(values.std()) / math.sqrt(n)
    return Figure(mean := float(values.mean()), mean - margin, mean + margin, n)


def share_figure(hits: torch.Tensor) -> Figure:
    """Share of true values with the interval of Clopper and Pearson."""
    from scipy.stats import binomtest

    ends = binomtest(int(hits.sum()), len(hits)).proportion_ci(LEVEL, method="exact")
    return Figure(int(hits.sum()) / len(hits), float(ends.low), float(ends.high), len(hits))
