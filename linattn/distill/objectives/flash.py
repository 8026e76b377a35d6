r"""Flash Diffusion: a student learns to say in one step where the teacher's path ends, and to look real on the way.

From a sample x_t that is noised to one of the K levels of the teacher's sampler, the teacher walks the rest of its
path, guided; the student makes one step. Three terms, weighted by the phase that training is in:

    distillation   d(student, teacher), between the two estimates of the clean sample
    DMD            a gradient along what a guided teacher would change in the student's sample, renoised
    adversarial    a discriminator on features of the frozen teacher, of noised samples of the student and of data

The levels to start from are drawn from a mixture with its modes at the timesteps that a sampler with few steps uses.
The phases move its weight from little noise to pure noise.

All terms are pure functions of their arguments: random numbers, and which conditions are dropped, are the caller's. A
teacher with its condition and guidance is `linattn.distill.objectives.perflow.teacher_of`. `FlashTraining` puts them
together to one step of training.

Sources: Chadebec et al. 2025, Flash Diffusion (arXiv 2406.02347), sections 3 and 4; distribution matching: Yin et al.
2024, DMD (arXiv 2311.18828), section 3, and DMD2 (arXiv 2405.14867: a fake score that is trained).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...schedulers.piecewise import combine
from ..denoiser import Denoiser
from ..discriminator import Discriminator, features_of
from ..noise import FlashDraws
from ..noise_process import Grid, NoiseProcess, clean_of
from .perflow import Teacher, perflow_loss, teacher_of

#: A distance of two batches of clean samples, () or (B,): pluggable in `distillation_loss`.
Distance = Callable[[Tensor, Tensor], Tensor]

DISTRIBUTIONS = ("uniform", "gaussian", "mixture")
DISTANCES = ("l2", "l1", "huber", "perceptual")
ADVERSARIAL = ("hinge", "lsgan", "non-saturating", "vanilla", "wgan")

#: Levels, of a thousand, at which the discriminator compares.
ADVERSARIAL_LEVELS = (10, 250, 500, 750)


# -------------------------------------------------------------------------------------------------- where a path begins


def modes(steps: int, count: int) -> Tensor:
    """Indices m (K // n), m = 0 .. n - 1, of a grid of K steps: where a sampler of n steps goes. (n,) int64.

    Raises:
        ValueError: count < 1 or more than steps.
    """
    if not 1 <= count <= steps:
        raise ValueError(f"expected from 1 to {steps} modes on a grid of {steps} steps, got {count}")
    return torch.arange(count) * (steps // count)


def start_distribution(
    steps: int, distribution: str = "mixture", weights: Sequence[float] = (0.25,) * 4, variance: float = 0.5
) -> Tensor:
    """Probability that training starts at index j of a grid of K steps, 0 the noisiest: (K,) float64.

        uniform    1 / K
        gaussian   proportional to exp(-(j - K / 2)^2 / K)
        mixture    proportional to sum_m w_m exp(-(j - c_m)^2 / variance),  c_m the `modes`

    Args:
        steps: K >= 1.
        weights: w (n,), not negative, not all 0.
        variance: above 0. The exponents have no factor 1 / 2: a mode's variance is half of this.

    Raises:
        ValueError: another distribution; an argument outside these bounds.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    index = torch.arange(steps, dtype=torch.float64)
    if distribution == "uniform":
        density = torch.ones_like(index)
    elif distribution == "gaussian":
        density = torch.exp(-((index - steps / 2) ** 2) / steps)
    else:
        if not variance > 0:
            raise ValueError(f"variance must be above 0, got {variance}")
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
            raise ValueError(f"weights must not be negative, nor all 0, got {list(weights)}")
        distance = index[:, None] - modes(steps, len(weights))
        density = torch.exp(-(distance**2) / variance) @ torch.tensor(list(weights), dtype=torch.float64)
    return density / density.sum()


def start_index(uniform: Tensor, probabilities: Tensor) -> Tensor:
    """Indices by these probabilities (K,), from numbers that are uniform in [0, 1); int64, in the shape of uniform."""
    cumulative = probabilities.double().cumsum(0)
    cumulative = (cumulative / cumulative[-1]).to(uniform.device)  # ends at 1 exactly, which no number reaches
    return torch.searchsorted(cumulative, uniform.double(), right=True)


def noised_start(clean: Tensor, noise: Tensor, index: Tensor, grid: Grid) -> Tensor:
    """x_t at levels of the grid; at index 0 the noise itself, as sampling begins. clean, noise (B, ...), index (B,) or
    (1,)."""
    index = index.expand(len(clean))
    noisy = combine(grid.alphas.to(index.device)[index], clean, grid.sigmas.to(index.device)[index], noise)
    return torch.where(_rows(index == 0, clean), noise.to(clean), noisy)


def sampling_timesteps(grid: Grid, count: int) -> Tensor:
    """The timesteps that training puts most weight on, for a sampler of so many steps: to be passed to it explicitly.

    diffusers' LCMScheduler does not choose them by itself (999, 759, 499, 259 and not 999, 749, 499, 249).
    """
    return grid.timesteps[modes(len(grid.timesteps), count)]


# ------------------------------------------------------------------------------------------------- phases of a training


@dataclasses.dataclass(frozen=True)
class Phase:
    """What holds for a number of optimizer steps of the student.

    Args:
        steps: how many, at least 1.
        grid_steps: K of the teacher's sampler.
        guidance: (lowest, highest) of the teacher, at least 1.
        distribution, weights, variance: of `start_distribution`.
        distillation, dmd, adversarial: factors of the three terms, at least 0.

    Raises:
        ValueError: an argument outside these bounds.
    """

    steps: int
    grid_steps: int = 32
    guidance: tuple[float, float] = (3.0, 13.0)
    distribution: str = "mixture"
    weights: tuple[float, ...] = (0.25,) * 4
    variance: float = 0.5
    distillation: float = 1.0
    dmd: float = 0.0
    adversarial: float = 0.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if len(self.guidance) != 2 or not 1 <= self.guidance[0] <= self.guidance[1] < math.inf:
            raise ValueError(f"guidance must be (lowest, highest), 1 <= lowest <= highest, got {self.guidance}")
        for name in ("distillation", "dmd", "adversarial"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        self.probabilities()

    def probabilities(self) -> Tensor:
        """`start_distribution` of this phase, (K,)."""
        return start_distribution(self.grid_steps, self.distribution, self.weights, self.variance)

    def guidance_of(self, uniform: Tensor) -> Tensor:
        """Guidance from numbers that are uniform in [0, 1), in their shape."""
        lowest, highest = self.guidance
        return lowest + (highest - lowest) * uniform

    def total(
        self, distillation: Tensor | float = 0.0, dmd: Tensor | float = 0.0, adversarial: Tensor | float = 0.0
    ) -> Tensor:
        """The sum of the student's terms. Those with factor 0 are left out, whatever they are."""
        terms = ((self.distillation, distillation), (self.dmd, dmd), (self.adversarial, adversarial))
        return sum((factor * term for factor, term in terms if factor), torch.zeros(()))


class Phases:
    """The phases of a training, one after the other; the last one goes on.

    Args:
        phases: at least one.

    Raises:
        ValueError: no phase.
    """

    def __init__(self, phases: Sequence[Phase]):
        if not phases:
            raise ValueError("expected at least one phase, got none")
        self.phases = tuple(phases)
        self._ends = tuple(itertools.accumulate(phase.steps for phase in self.phases))

    @classmethod
    def of(cls, **lists: Any) -> Phases:
        """Phases from lists, as a recipe has them: each argument of `Phase`, one value for all or a list, one a phase.

            Phases.of(steps=[5000] * 4, guidance=(3, 13), dmd=[0, 0.3, 0.5, 0.7])

        `guidance` and `weights` are lists themselves; one for each phase is a list of lists.

        Raises:
            ValueError: lists of different lengths; an argument that `Phase` has not.
        """
        names = [field.name for field in dataclasses.fields(Phase)]
        if unknown := sorted(set(lists) - set(names)):
            raise ValueError(f"expected arguments among {', '.join(names)}, got {', '.join(unknown)}")

        def by_phase(name: str, value: Any) -> bool:
            nested = name in ("guidance", "weights")
            return _is_list(value) and (not nested or any(_is_list(part) for part in value))

        lengths = {name: len(value) for name, value in lists.items() if by_phase(name, value)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"lists must have one entry for each phase, got {lengths}")
        count = next(iter(lengths.values()), 1)

        def value(name: str, i: int) -> Any:
            found = lists[name][i] if name in lengths else lists[name]
            return tuple(found) if _is_list(found) else found

        return cls([Phase(**{name: value(name, i) for name in lists}) for i in range(count)])

    def index(self, step: int) -> int:
        """Number of the phase that optimizer step `step` is in; steps and phases count from 0."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        passed = sum(step >= end for end in self._ends)
        return min(passed, len(self.phases) - 1)

    def at(self, step: int) -> Phase:
        """The phase that optimizer step `step` is in."""
        return self.phases[self.index(step)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


# -------------------------------------------------------------------------------------------------- the teacher's path


class Solver(NamedTuple):
    """A sampler's steps, as numbers: x <- keep x + gain D + history D', with D and D' the clean estimates of this call
    and of the one before. Each (K,) float64, by where on the grid the step begins; `first_gain` for a first call."""

    keep: Tensor
    first_gain: Tensor
    gain: Tensor
    history: Tensor


def solver(grid: Grid, order: int = 1) -> Solver:
    r"""The steps of a sampler between the levels of a grid.

        order 1   x <- sigma' / sigma x + (alpha' - alpha sigma' / sigma) D

    which is DDIM for diffusion and Euler's method for flow matching, and

        order 2   the same with D + h' / (2 h) (D - D') in the place of D,

    h' and h the lengths of this step and of the one before in log(alpha / sigma): DPM-Solver++ (2M). Its last step, to
    no noise, is of order 1.

    Sources: Song et al. 2021, DDIM, eq. 12 with sigma = 0; Lu et al. 2022, DPM-Solver++ (2211.01095), algorithm 2.

    Raises:
        ValueError: another order.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    alphas, sigmas = grid.alphas, grid.sigmas
    keep = sigmas[1:] / sigmas[:-1]
    first_gain = alphas[1:] - alphas[:-1] * keep
    extra = torch.zeros_like(keep)
    if order == 2:
        lengths = (alphas / sigmas).log().diff()
        # A step to no noise is infinitely long; so is one from no signal, and then the next has nothing to extrapolate.
        extra[1:] = torch.where(lengths[1:].isfinite(), lengths[1:] / (2 * lengths[:-1]), 0)
    return Solver(keep, first_gain, first_gain * (1 + extra), -first_gain * extra)


@torch.no_grad()
def rollout(
    teacher: Teacher,
    sample: Tensor,
    start: Tensor,
    grid: Grid,
    *,
    prediction_type: str = "epsilon",
    order: int = 1,
) -> Tensor:
    """Where the teacher's path from `sample` ends: K - start steps. To be computed once per batch.

    Args:
        teacher: (noisy (B, ...), timesteps (B,)) -> prediction (B, ...).
        sample: (B, ...), at the levels of `start`.
        start: (B,) or (1,), indices into the grid. Samples may start apart: all start with the first call, and those
            that arrive wait for the others.
        grid: `NoiseProcess.grid`.
        prediction_type: what the teacher predicts, one of `linattn.distill.noise_process.PREDICTIONS`.
        order: of the `solver`.

    Returns:
        (B, ...), in the type of sample, computed in float32 or wider.

    Raises:
        ValueError: start is not on the grid, and as `solver` and `clean_of`.
    """
    count = len(grid.timesteps)
    if not ((start >= 0) & (start < count)).all():
        raise ValueError(f"start must be from 0 to {count - 1}, got {start.tolist()}")
    start = start.to(sample.device).long().expand(len(sample))
    timesteps, alphas, sigmas = (part.to(sample.device) for part in grid)
    keep, first_gain, gain, history = (part.to(sample.device) for part in solver(grid, order))
    z = sample.to(torch.promote_types(sample.dtype, torch.float32))
    before = None
    for i in range(count - int(start.min())):
        running = start + i < count
        at = (start + i).clamp(max=count - 1)
        said = teacher(z, timesteps[at])
        clean = clean_of(said, z, alphas[at], sigmas[at], prediction_type)
        after = combine(keep[at], z, (gain if i else first_gain)[at], clean)
        if i and order > 1:
            after = combine(torch.ones_like(keep[at]), after, history[at], before)
        z = torch.where(_rows(running, z), after, z)
        before = clean
    return z.to(sample.dtype)


def boundary(timesteps: Tensor, *, scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip, c_out of student = c_skip x_t + c_out x_0, float64, in the shape of timesteps.

        c_skip = s^2 / ((scaling t)^2 + s^2),     c_out = scaling t / sqrt((scaling t)^2 + s^2)

    The sample itself at t = 0; x_0 from t = 30 on, the lowest of a grid of 32 steps, within 3e-6. LCMScheduler, which
    samples the student, does the same.

    Source: Luo et al. 2023, Latent Consistency Models (arXiv 2310.04378), and diffusers' LCMScheduler.
    """
    scaled = scaling * timesteps.double()
    radius = scaled**2 + sigma_data**2
    return sigma_data**2 / radius, scaled / radius.sqrt()


def at_boundary(clean: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """c_skip noisy + c_out clean by `boundary`, in the type of noisy. clean, noisy (B, ...), timesteps (B,) or ()."""
    c_skip, c_out = boundary(timesteps)
    return combine(c_skip, noisy, c_out, clean)


# ---------------------------------------------------------------------------------------------------- distillation term


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    kind: str = "l2",
    *,
    huber_c: float = 1e-3,
    perceptual: Distance | None = None,
) -> Tensor:
    """d(student, teacher), mean over all elements, in float32 or wider; no gradient reaches the teacher.

        l2      (s - t)^2
        l1      |s - t|
        huber   sqrt((s - t)^2 + huber_c^2) - huber_c
        perceptual   what `perceptual` returns, meant over samples

    Args:
        student, teacher: (B, ...), clean samples.
        perceptual: a distance, as `decoded_distance` makes them.

    Raises:
        ValueError: another kind; perceptual without its distance; shapes that differ.
    """
    if kind not in DISTANCES:
        raise ValueError(f"kind must be one of {', '.join(DISTANCES)}, got {kind!r}")
    _expect_same_shape("student and teacher", student, teacher)
    if kind in ("l2", "huber"):
        return perflow_loss(student, teacher, distance=kind, huber_c=huber_c)
    if kind == "l1":
        return (_wide(student) - _wide(teacher.detach())).abs().mean()
    if perceptual is None:
        raise ValueError('kind="perceptual" needs a distance, got perceptual=None')
    return perceptual(student, teacher.detach()).mean()


def decoded_distance(decode: Callable[[Tensor], Tensor], distance: Distance, *, crop: int | None = 64) -> Distance:
    """A distance of pictures, for latents: of the centres of both, decoded and clamped to [-1, 1].

    Args:
        decode: latents (B, c, h, w) to pictures (B, 3, H, W); with gradients.
        distance: of pictures, such as LPIPS.
        crop: rows and columns of latents that are decoded, at most; None: all.

    Raises:
        ValueError: crop < 1.
    """
    if crop is not None and crop < 1:
        raise ValueError(f"crop must be at least 1, got {crop}")

    def of(student: Tensor, teacher: Tensor) -> Tensor:
        pictures = (decode(_centre(latents, crop)).clamp(-1, 1) for latents in (student, teacher))
        return distance(*pictures)

    return of


def _centre(x: Tensor, size: int | None) -> Tensor:
    if size is None:
        return x
    height, width = (min(size, side) for side in x.shape[-2:])
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


# ------------------------------------------------------------------------------------------------ distribution matching


def dmd_loss(student: Tensor, real: Tensor, fake: Tensor, *, floor: float = 1e-5) -> Tensor:
    """A loss whose gradient with respect to the student's sample is 2 w (fake - real) / (number of elements).

        w_b = 1 / (mean |student_b - real_b| + floor),        L = mean (w (fake - real))^2

    Descending it moves the student's sample from where the fake score would take it to where the real one would.

    Args:
        student: clean samples (B, ...), of which there are gradients.
        real, fake: (B, ...), clean estimates of renoised samples of the student, by the guided teacher and by a model
            of the student's own distribution.

    Raises:
        ValueError: shapes that differ.

    Source: DMD, eq. 7 and 8.
    """
    _expect_same_shape("student and real", student, real)
    _expect_same_shape("student and fake", student, fake)
    student, real, fake = _wide(student), _wide(real.detach()), _wide(fake.detach())
    distance = (student.detach() - real).abs().flatten(1).mean(1)
    step = (fake - real) / _rows(distance + floor, real)
    return F.mse_loss(student, (student - step).detach())


def distribution_matching(
    student: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    real: Teacher,
    fake: Teacher,
    process: NoiseProcess,
    *,
    fake_process: NoiseProcess | None = None,
) -> Tensor:
    """`dmd_loss` of the student's samples, renoised to `timesteps`.

    Args:
        student, noise: (B, ...).
        timesteps: (B,), `NoiseProcess.random_timesteps`.
        real: the teacher, guided.
        fake: Flash: the student itself, as it is, on its condition. DMD2: a network that is trained on the student's
            samples (`fake_score_loss`).
        process: of the teacher.
        fake_process: of `fake`, where it predicts another thing than the teacher.
    """
    with torch.no_grad():
        noisy = process.add_noise(student, noise, timesteps)
        real_clean = process.clean(real(noisy, timesteps), noisy, timesteps)
        fake_clean = (fake_process or process).clean(fake(noisy, timesteps), noisy, timesteps)
    return dmd_loss(student, real_clean, fake_clean)


def fake_score_loss(fake: Teacher, student: Tensor, noise: Tensor, timesteps: Tensor, process: NoiseProcess) -> Tensor:
    """What a fake score is trained with (DMD2): to denoise samples of the student. No gradient reaches the student.

    Args:
        fake: (noisy, timesteps) -> prediction, with gradients.
        student, noise: (B, ...).
        timesteps: (B,).
    """
    student = student.detach()
    said = fake(process.add_noise(student, noise, timesteps), timesteps)
    return F.mse_loss(_wide(said), _wide(process.target(student, noise, timesteps)))


# ----------------------------------------------------------------------------------------------------- adversarial term


def adversarial_timesteps(uniform: Tensor, process: NoiseProcess, levels: Sequence[int] = ADVERSARIAL_LEVELS) -> Tensor:
    """Timesteps at which the discriminator compares, each level equally often, from numbers uniform in [0, 1)."""
    chosen = torch.tensor(list(levels), device=uniform.device)
    return process.timesteps_of(chosen[(uniform.double() * len(chosen)).long()])


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    r"""The student's adversarial term; f the discriminator's logits of its samples, s the logistic function.

        hinge, wgan                 -mean f
        lsgan                       mean (s(f) - 1)^2
        vanilla, non-saturating     -mean log s(f)

    Args:
        kind: one of `ADVERSARIAL`.
        fake: (B, ...) logits.

    Raises:
        ValueError: another kind.

    Sources: Lim and Ye 2017 (arXiv 1705.02894), hinge; Mao et al. 2017, LSGAN (1611.04076); Goodfellow et al. 2014
        (1406.2661); Arjovsky et al. 2017, WGAN (1701.07875). LSGAN has no logistic function; Flash Diffusion has.
    """
    _expect_adversarial(kind)
    fake = _wide(fake)
    if kind in ("hinge", "wgan"):
        return -fake.mean()
    if kind == "lsgan":
        return (fake.sigmoid() - 1).square().mean()
    return -F.logsigmoid(fake).mean()


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    r"""The discriminator's loss; r, f its logits of data and of the student's samples.

        hinge                       mean max(0, 1 - r) + mean max(0, 1 + f)
        lsgan                       (mean (s(r) - 1)^2 + mean s(f)^2) / 2
        vanilla, non-saturating     -mean log s(r) - mean log(1 - s(f))
        wgan                        mean f - mean r,  with `clamp_weights` before each use

    Args, raises and sources: as `generator_loss`.
    """
    _expect_adversarial(kind)
    real, fake = _wide(real), _wide(fake)
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "lsgan":
        return 0.5 * ((real.sigmoid() - 1).square().mean() + fake.sigmoid().square().mean())
    if kind == "wgan":
        return fake.mean() - real.mean()
    return -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()


@torch.no_grad()
def clamp_weights(discriminator: nn.Module, bound: float = 0.01) -> None:
    """Brings all parameters into [-bound, bound], in place: wgan's way to a discriminator that is not too steep."""
    for parameter in discriminator.parameters():
        parameter.clamp_(-bound, bound)


def _expect_adversarial(kind: str) -> None:
    if kind not in ADVERSARIAL:
        raise ValueError(f"kind must be one of {', '.join(ADVERSARIAL)}, got {kind!r}")


# ---------------------------------------------------------------------------------------------------------- conditions


def unconditional(condition: Mapping[str, Tensor], policies: Mapping[str, str | Tensor]) -> dict[str, Tensor]:
    """What takes the place of each entry where there is no condition.

    Args:
        condition: entries (B, ...).
        policies: for every entry of the condition, "zero", "keep" (the entry itself), or the tensor to take: an encoded
            empty or negative prompt, (B, ...) or (1, ...).

    Raises:
        ValueError: an entry without policy, a policy without entry, another policy, a tensor of another shape.
    """
    if policies.keys() != condition.keys():
        raise ValueError(f"every condition needs a policy: expected {sorted(condition)}, got {sorted(policies)}")
    return {name: _without(name, value, policies[name]) for name, value in condition.items()}


def _without(name: str, value: Tensor, policy: str | Tensor) -> Tensor:
    if isinstance(policy, Tensor):
        if policy.shape[1:] != value.shape[1:] or len(policy) not in (1, len(value)):
            raise ValueError(
                f"what replaces {name} must have its shape {tuple(value.shape)}, or 1 first, got {tuple(policy.shape)}"
            )
        return policy.to(value).expand_as(value)
    if policy == "zero":
        return torch.zeros_like(value)
    if policy == "keep":
        return value
    raise ValueError(f'the policy of {name} must be "zero", "keep" or a tensor, got {policy!r}')


def with_dropped(
    condition: Mapping[str, Tensor],
    absent: Mapping[str, Tensor],
    rates: Mapping[str, float],
    uniform: Tensor | Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The condition with entries dropped at random, each sample and each entry for itself.

    Args:
        condition: entries (B, ...).
        absent: what takes their place, `unconditional`.
        rates: chance of an entry to be dropped, in [0, 1]; entries without one stay.
        uniform: (B,) in [0, 1), one for all entries (which are then dropped together, as far as their rates agree) or
            one for each entry with a rate.

    Raises:
        ValueError: a rate for no entry, or not in [0, 1]; entries of `absent` or `uniform` that are missing.
    """
    kept = dict(condition)
    for name, rate in rates.items():
        if name not in condition or name not in absent:
            raise ValueError(f"rates must be of conditions {sorted(condition.keys() & absent.keys())}, got {name!r}")
        if not 0 <= rate <= 1:
            raise ValueError(f"the rate of {name} must be in [0, 1], got {rate}")
        if not isinstance(uniform, Tensor) and name not in uniform:
            raise ValueError(f"uniform must have an entry for each rate, got {sorted(uniform)} and not {name}")
        numbers = uniform if isinstance(uniform, Tensor) else uniform[name]
        dropped = (numbers < rate).to(condition[name].device)
        kept[name] = torch.where(_rows(dropped, condition[name]), absent[name], condition[name])
    return kept


# ------------------------------------------------------------------------------------------------------------ one step


class FlashTraining(nn.Module):
    """One step of Flash Diffusion on an encoded batch: the student's loss, and those of who judges it.

    Student, discriminator and fake score have one loss, the sum of theirs; none's part has a gradient with respect to
    another's weights. So one backward pass serves all, and one optimizer, with a learning rate for each of them
    (`auxiliary`). The teacher's path is walked once for all terms.

    Args:
        student: `Denoiser` (a Module) that is trained.
        teacher: `Denoiser` that is not; not registered here, so that it is neither trained nor synchronised nor saved.
        process: the teacher's, with what the teacher predicts.
        student_prediction: what the student predicts, one of `linattn.distill.noise_process.PREDICTIONS`; None: as the
            teacher.
        order: of the teacher's `solver`.
        distance, huber_c, perceptual: of `distillation_loss`.
        discriminator: `linattn.distill.discriminator.Discriminator`; None: no adversarial term.
        features: names of modules of the teacher that it sees; (): the teacher's prediction.
        adversarial: its kind, one of `ADVERSARIAL`.
        real: what it takes for real: "data", or where the "teacher"'s path ends.
        levels: of `adversarial_timesteps`.
        fake_score: `Denoiser` (a Module) that learns to denoise the student's samples (DMD2), with the process of the
            teacher; None: the student itself takes its place (Flash).
        drop: of each entry of the condition, the chance that the student does not see it.

    Raises:
        ValueError: another distance, kind or source of what is real.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Denoiser,
        process: NoiseProcess,
        *,
        student_prediction: str | None = None,
        order: int = 1,
        distance: str = "l2",
        huber_c: float = 1e-3,
        perceptual: Distance | None = None,
        discriminator: Discriminator | None = None,
        features: Sequence[str] = (),
        adversarial: str = "lsgan",
        real: str = "data",
        levels: Sequence[int] = ADVERSARIAL_LEVELS,
        fake_score: nn.Module | None = None,
        drop: Mapping[str, float] | None = None,
    ):
        super().__init__()
        _expect_adversarial(adversarial)
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
        if real not in ("data", "teacher"):
            raise ValueError(f"real must be 'data' or 'teacher', got {real!r}")
        self.student, self.discriminator, self.fake_score = student, discriminator, fake_score
        self._frozen = (teacher,)
        self.process, self.order = process, order
        self.student_process = process.with_prediction(student_prediction or process.prediction_type)
        self.features, self.adversarial, self.real = tuple(features), adversarial, real
        self.levels, self.drop = tuple(levels), dict(drop or {})
        self._distance = {"kind": distance, "huber_c": huber_c, "perceptual": perceptual}
        self._grids: dict[int, Grid] = {}

    @property
    def auxiliary(self) -> dict[str, nn.Module]:
        """What is trained beside the student, by name."""
        parts = {"discriminator": self.discriminator, "fake_score": self.fake_score}
        return {name: module for name, module in parts.items() if module is not None}

    def grid(self, steps: int) -> Grid:
        if steps not in self._grids:
            self._grids[steps] = self.process.grid(steps)
        return self._grids[steps]

    def estimate(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The clean sample (B, ...) that the student says, as its sampler reads it: with gradients."""
        clean = self.student_process.clean(self.student(noisy, timesteps, condition), noisy, timesteps)
        # The boundary of LCMScheduler, which has none for flow matching.
        return clean if self.process.alphas_cumprod is None else at_boundary(clean, noisy, timesteps)

    def forward(
        self,
        latents: Tensor,
        draws: FlashDraws,
        condition: Mapping[str, Tensor],
        absent: Mapping[str, Tensor],
        phase: Phase,
    ) -> dict[str, Tensor]:
        """Losses of a batch: "loss", the sum that is trained with; and its terms, without factors and gradients.

        Args:
            latents: (B, ...) float32, of data.
            draws: everything random about the step.
            condition: entries (B, ...).
            absent: the same entries, `unconditional`: what the guided teacher is compared with, and what the student
                sees of an entry that is dropped.
            phase: that training is in.
        """
        if self.discriminator is not None and self.adversarial == "wgan":
            clamp_weights(self.discriminator)
        (denoiser,), process, count = self._frozen, self.process, len(latents)
        grid = self.grid(phase.grid_steps)
        seen = with_dropped(condition, absent, self.drop, draws.dropout) if self.drop else dict(condition)
        index = start_index(draws.start.to(latents.device), phase.probabilities())
        guidance = phase.guidance_of(draws.guidance.to(latents.device))
        noisy = noised_start(latents, draws.noise, index, grid)
        timesteps = grid.timesteps.to(index.device)[index].expand(count)
        with torch.no_grad():
            target = rollout(
                teacher_of(denoiser, condition, absent, guidance),
                noisy,
                index,
                grid,
                prediction_type=process.prediction_type,
                order=self.order,
            )
        student = self.estimate(noisy, timesteps, seen)
        terms = {"distillation": distillation_loss(student, target, **self._distance)}
        if phase.dmd:
            terms["dmd"] = distribution_matching(
                student,
                draws.renoise,
                process.random_timesteps(draws.renoise_level.to(latents.device)),
                teacher_of(denoiser, condition, absent, phase.guidance_of(draws.renoise_guidance.to(latents.device))),
                teacher_of(self.student if self.fake_score is None else self.fake_score, seen),
                process,
                fake_process=self.student_process if self.fake_score is None else None,
            )
        others: dict[str, Tensor] = {}
        if self.discriminator is not None:
            real = latents if self.real == "data" else target
            judged, others["discriminator"] = self._judged(student, real, draws, condition, phase)
            if phase.adversarial:
                terms["adversarial"] = judged
        if self.fake_score is not None:
            level = process.random_timesteps(draws.fake_level.to(latents.device))
            others["fake_score"] = fake_score_loss(
                teacher_of(self.fake_score, seen), student, draws.fake_noise, level, process
            )
        total = phase.total(**terms).to(latents.device) + sum(others.values())
        return {"loss": total} | {name: value.detach() for name, value in (terms | others).items()}

    def _judged(
        self, student: Tensor, real: Tensor, draws: FlashDraws, condition: Mapping[str, Tensor], phase: Phase
    ) -> tuple[Tensor | None, Tensor]:
        """The student's adversarial term, if this phase has one, and the discriminator's loss."""
        (denoiser,), process = self._frozen, self.process
        level = adversarial_timesteps(draws.adversarial_level.to(student.device), process, self.levels)

        def features(sample: Tensor) -> dict[str, Tensor]:
            # The same noise for both: what is left to tell them apart by is the sample.
            noisy = process.add_noise(sample, draws.adversarial_noise, level)
            return features_of(denoiser, self.features, noisy, level, condition)

        with torch.set_grad_enabled(bool(phase.adversarial) and torch.is_grad_enabled()):
            of_student = features(student)
            term = generator_loss(self.adversarial, self.discriminator.judge(of_student)) if phase.adversarial else None
        with torch.no_grad():
            of_real = features(real)
        fixed = {name: value.detach() for name, value in of_student.items()}
        loss = discriminator_loss(self.adversarial, self.discriminator(of_real), self.discriminator(fixed))
        return term, loss


# -------------------------------------------------------------------------------------------------------------- helpers


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), on the device of like."""
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expect_same_shape(names: str, x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{names} must have the same shape, got {tuple(x.shape)}, {tuple(y.shape)}")
