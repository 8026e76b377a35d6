r"""Piecewise reflow (PeRFlow): a student learns that the teacher's path is straight inside each window of time.

For data x_0, noise eps and a random time t in (0, 1], which lies in the window from s down to e:

    z_s = a(s) x_0 + c(s) eps                   the teacher's process at the window's start
    z_e = ODE(teacher, z_s, s -> e)             a few steps of DDIM, or of Euler for flow matching
    z_t = z_s + (t - s) / (e - s) (z_e - z_s)   what the student sees, told T t
    L   = d(student(z_t, T t), target(z_s, z_e))

The target is the same for every t of a window. What it is (velocity, or one of two noises) and what a sampler makes of
the student's output is in `linattn.schedulers.piecewise`, which `PeRFlowScheduler` uses as well: so an output equal to
the target takes the scheduler from any t of the window to z_e.

Everything here is a pure function of its arguments: random numbers, and which conditions are dropped, are the caller's.

Source: Yan et al. 2024, PeRFlow (arXiv 2405.07510), section 3 and algorithm 1; losses and defaults as in its code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...schedulers.piecewise import (
    Marginal,
    combine,
    shifted,
    target_coefficients,
    velocity_coefficients,
    windows_of,
)
from ..denoiser import Denoiser

#: A teacher with its condition: (noisy (B, ...), timesteps (B,)) -> prediction (B, ...).
Teacher = Callable[[Tensor, Tensor], Tensor]

TEACHER_PREDICTIONS = ("epsilon", "v_prediction", "flow")
DISTANCES = ("l2", "huber")
REWEIGHTINGS = (None, "reciprocal")


# ----------------------------------------------------------------------------------------------- times and conditions


def times(uniform: Tensor, levels: int = 1000) -> Tensor:
    """Times in {1 / levels, 2 / levels, ..., 1} from numbers that are uniform in [0, 1), each level equally often."""
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    return (levels - (uniform * levels).floor()) / levels


class Times:
    """`times` of samples, for `linattn.distill.noise.draw`: the t themselves, float64.

    Args:
        shift: of windows and times: then all windows are still drawn equally often.
    """

    num_timesteps = 1

    def __init__(self, levels: int = 1000, shift: float = 1.0):
        self.levels, self.shift = levels, shift

    def timestep(self, stream: np.random.Generator) -> Tensor:
        u = times(torch.tensor(stream.random(), dtype=torch.float64), self.levels)
        return u if self.shift == 1 else shifted(u, self.shift)


def with_dropped(
    condition: Mapping[str, Tensor], unconditional: Mapping[str, Tensor], dropped: Tensor
) -> dict[str, Tensor]:
    """The condition, with the rows where `dropped` (B,) is True replaced by the unconditional ones.

    Args:
        condition: entries (B, ...).
        unconditional: the same entries, (B, ...) or (1, ...).

    Raises:
        ValueError: the two have different entries.
    """
    _expect_same_entries(condition, unconditional)
    rows = {name: dropped.to(value.device).view(-1, *[1] * (value.ndim - 1)) for name, value in condition.items()}
    return {name: torch.where(rows[name], unconditional[name], value) for name, value in condition.items()}


def teacher_of(
    denoiser: Denoiser,
    condition: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None = None,
    guidance: float | Tensor | None = None,
) -> Teacher:
    """The denoiser under its condition, with classifier-free guidance: u + g (c - u), in one batch of 2 B.

    The two modes of PeRFlow are two ways to call it. "cfg-sync": without guidance, on the condition that the student
    gets (with rows dropped), so that the student can be guided as the teacher can. Fixed guidance: on the whole
    condition with g, so that the student has the guidance in it.

    Args:
        unconditional: entries as those of condition, (B, ...) or (1, ...).
        guidance: g >= 1, one number or (B,). None: no guidance, as 1.

    Raises:
        ValueError: g < 1; guidance without the unconditional entries, or with other ones.
    """
    scale = torch.as_tensor(1.0 if guidance is None else guidance)
    if (scale < 1).any():
        raise ValueError(f"guidance must be at least 1, got {guidance}")
    if (scale == 1).all():
        return lambda noisy, timesteps: denoiser(noisy, timesteps, condition)
    if unconditional is None:
        raise ValueError(f"guidance {guidance} needs the unconditional condition")
    _expect_same_entries(condition, unconditional)
    both = {name: torch.cat([unconditional[name].expand_as(value), value]) for name, value in condition.items()}

    def guided(noisy: Tensor, timesteps: Tensor) -> Tensor:
        without, towards = denoiser(torch.cat([noisy] * 2), torch.cat([timesteps] * 2), both).chunk(2)
        g = scale.to(without).view(-1, *[1] * (without.ndim - 1))
        return without + g * (towards - without)

    return guided


def _expect_same_entries(condition, unconditional) -> None:
    if condition.keys() != unconditional.keys():
        got = f"{sorted(condition)} and {sorted(unconditional)}"
        raise ValueError(f"condition and unconditional must have the same entries, got {got}")


# --------------------------------------------------------------------------------------------------- the teacher's ODE


@torch.no_grad()
def solve(
    teacher: Teacher,
    sample: Tensor,
    start: Tensor,
    end: Tensor,
    marginal: Marginal,
    *,
    steps: int,
    prediction_type: str = "epsilon",
    num_timesteps: int = 1000,
    legacy_grid: bool = False,
) -> Tensor:
    """The teacher's ODE from `start` to `end`: steps of DDIM; of Euler for flow matching.

    Args:
        teacher: told what it was trained with: the index of the noise level, 0 to T - 1 (int64); T t for flow matching.
        sample: (B, ...) at start.
        start, end: (B,) in [0, 1], start > end.
        marginal: of the teacher's process.
        steps: n >= 1 of equal length in t, but that diffusion rounds them to its levels; the last one ends at the level
            of `end`.
        prediction_type: what the teacher says: "epsilon" or "v_prediction" of diffusion, "flow" (noise - data).
        num_timesteps: T, for flow matching.
        legacy_grid: diffusion: steps as the original makes them, T // (W n) levels from each point of the grid, whether
            or not the next one is there (with W = 4 and n = 8 it is not).

    Returns:
        (B, ...) at end, in the type of sample, computed in float32 or wider.

    Raises:
        ValueError: steps < 1; start <= end; a prediction that does not belong to the process.
    """
    is_flow = marginal.alphas_cumprod is None
    if prediction_type not in TEACHER_PREDICTIONS or (prediction_type == "flow") != is_flow:
        wanted = "flow" if is_flow else "epsilon or v_prediction"
        raise ValueError(f"prediction_type must be {wanted} for this process, got {prediction_type!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    start, end = (t.to(sample.device, torch.float64) for t in (start, end))
    if not (start > end).all():
        raise ValueError(f"start must be above end, got {start.tolist()} and {end.tolist()}")
    z = sample.to(torch.promote_types(sample.dtype, torch.float32))
    if is_flow:
        for i in range(steps):
            t = start + (end - start) * (i / steps)
            said = teacher(z, (t * num_timesteps).to(torch.float32))
            z = combine(torch.ones_like(t), z, (end - start) / steps, said)
    else:
        levels = marginal.alphas_cumprod.to(start.device)
        for here, after in _grid(start, end, marginal, steps, legacy_grid):
            p, q = _ddim(levels[here], levels[after], prediction_type)
            z = combine(p, z, q, teacher(z, here))
    return z.to(sample.dtype)


def _grid(start: Tensor, end: Tensor, marginal: Marginal, steps: int, legacy: bool) -> list[tuple[Tensor, Tensor]]:
    """Indices of noise levels (B,): where each step begins and ends."""
    count = len(marginal.alphas_cumprod)
    points = [start + (end - start) * (i / steps) for i in range(steps)]
    if legacy:
        # In float32 and in this order, which decides where halves are rounded to.
        points = [(((t.float() - 1) + (1 - 1 / count)) * count).round().long() for t in points]
        # 1e-4: floor of what is meant to be an integer quotient, and of float32 windows.
        stride = ((start - end) * count / steps + 1e-4).floor().long()
        return [(here, (here - stride).clamp(min=0)) for here in points]
    inner = [(t * count - 1).round().long() for t in points[1:]]
    points = [marginal.index(start), *inner, marginal.index(end)]
    return list(itertools.pairwise(points))


def _ddim(here: Tensor, after: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """p, q of z_after = p z + q prediction, for abar at the two (Song et al. 2021, DDIM, eq. 12 with sigma = 0)."""
    a, c = here.sqrt(), (1 - here).sqrt()
    a_next, c_next = after.sqrt(), (1 - after).sqrt()
    if prediction_type == "epsilon":
        return a_next / a, c_next - a_next * c / a
    return a_next * a + c_next * c, c_next * a - a_next * c


# -------------------------------------------------------------------------------------------------- inputs and targets


class Segment(NamedTuple):
    """What the student learns from, for a batch: times (B,) float64, samples (B, ...)."""

    start: Tensor
    end: Tensor
    z_start: Tensor
    z_end: Tensor
    z_t: Tensor
    target: Tensor


def on_chord(z_start: Tensor, z_end: Tensor, start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """z_s + (t - s) / (e - s) (z_e - z_s): (B, ...), times (B,)."""
    fraction = (t.double() - start) / (end - start)
    return combine(1 - fraction, z_start, fraction, z_end)


@torch.no_grad()
def segment(
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    teacher: Teacher,
    marginal: Marginal,
    bounds: Tensor,
    *,
    prediction_type: str,
    steps: int,
    teacher_prediction_type: str = "epsilon",
    num_timesteps: int = 1000,
    begin_at_noise: bool = False,
    legacy_grid: bool = False,
) -> Segment:
    """The teacher's chord over the window of each t, the student's input on it, and its target.

    Args:
        clean, noise: x_0 and eps, (B, ...), float32 or wider.
        t: (B,) in (0, 1].
        bounds: `linattn.schedulers.piecewise.window_bounds`.
        prediction_type: the student's: "ddim_eps", "diff_eps" or "velocity" (the only one for flow matching).
        steps, teacher_prediction_type, num_timesteps, legacy_grid: of `solve`.
        begin_at_noise: the first window starts at the noise itself, as sampling does, and not at the noisiest level
            that the teacher knows (which still has some signal).

    Raises:
        ValueError: t out of range, and as `solve`.
    """
    if not ((t > 0) & (t <= 1)).all():
        raise ValueError(f"t must be above 0 and at most 1, got {t.tolist()}")
    if marginal.alphas_cumprod is None and prediction_type != "velocity":
        raise ValueError(f'flow matching needs prediction_type="velocity", got {prediction_type!r}')
    t = t.to(clean.device)
    start, end = windows_of(t, bounds)
    p, q = target_coefficients(start, end, marginal, prediction_type)
    z_start = marginal.noised(clean, noise, start)
    if begin_at_noise:
        first = (start == bounds[0].to(start)).view(-1, *[1] * (clean.ndim - 1))
        z_start = torch.where(first, noise, z_start)
    z_end = solve(
        teacher,
        z_start,
        start,
        end,
        marginal,
        steps=steps,
        prediction_type=teacher_prediction_type,
        num_timesteps=num_timesteps,
        legacy_grid=legacy_grid,
    )
    z_t = on_chord(z_start, z_end, start, end, t)
    return Segment(start, end, z_start, z_end, z_t, combine(p, z_start, q, z_end))


# --------------------------------------------------------------------------------------------------------------- losses


def perflow_loss(
    prediction: Tensor,
    target: Tensor,
    t: Tensor | None = None,
    *,
    distance: str = "l2",
    huber_c: float = 1e-3,
    reweighting: str | None = None,
) -> Tensor:
    """Mean over all elements, in float32 or wider, of w(t) d(prediction - target).

        l2      d(x) = x^2
        huber   d(x) = sqrt(x^2 + huber_c^2) - huber_c
        w = 1, or with reweighting="reciprocal" 1 / (2.3 max(1 - t, 0.1)): more weight to noisy samples

    Args:
        prediction, target: (B, ...).
        t: (B,), for reweighting.

    Raises:
        ValueError: another distance or reweighting; reweighting without t; shapes that differ.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    if reweighting not in REWEIGHTINGS:
        raise ValueError(f"reweighting must be None or reciprocal, got {reweighting!r}")
    if reweighting and t is None:
        raise ValueError("reweighting needs t")
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have the same shape, got {tuple(prediction.shape)}, {tuple(target.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    difference = prediction.to(wide) - target.detach().to(wide)
    if distance == "l2":
        values = difference.square()
    else:
        values = (difference.square() + huber_c**2).sqrt() - huber_c
    values = values.flatten(1).mean(1)
    if reweighting:
        values = values / (2.3 * (1 - t.to(values)).clamp(min=0.1))
    return values.mean()


# ------------------------------------------------------------------------------------------------------------ one step


class PeRFlowTraining(nn.Module):
    """One step of piecewise reflow on an encoded batch.

    Args:
        student: `Denoiser` (a Module) that is trained.
        teacher: `Denoiser` that is not; not registered here, so that it is neither trained nor synchronised nor saved.
        marginal: of the teacher's process.
        bounds: `linattn.schedulers.piecewise.window_bounds`.
        prediction_type, steps, teacher_prediction_type, num_timesteps, begin_at_noise, legacy_grid: see `segment`.
        guidance: g of the teacher, on the whole condition. None ("cfg-sync"): it is not guided, and gets the condition
            with dropped rows, as the student does.
        distance, huber_c, reweighting: see `perflow_loss`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Denoiser,
        marginal: Marginal,
        bounds: Tensor,
        *,
        prediction_type: str,
        steps: int,
        teacher_prediction_type: str = "epsilon",
        num_timesteps: int = 1000,
        guidance: float | None = None,
        begin_at_noise: bool = False,
        legacy_grid: bool = False,
        distance: str = "l2",
        huber_c: float = 1e-3,
        reweighting: str | None = None,
    ):
        super().__init__()
        self.student = student
        self._frozen = (teacher, marginal, bounds)
        self.num_timesteps, self.guidance = num_timesteps, guidance
        self._segment = {
            "prediction_type": prediction_type,
            "steps": steps,
            "teacher_prediction_type": teacher_prediction_type,
            "num_timesteps": num_timesteps,
            "begin_at_noise": begin_at_noise,
            "legacy_grid": legacy_grid,
        }
        self._loss = {"distance": distance, "huber_c": huber_c, "reweighting": reweighting}

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        condition: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor] | None = None,
        dropped: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch: {"loss": L, "end": mean squared error of the window's end that the student points to}.

        L means another thing for each prediction type, "end" the same for all.

        Args:
            latents, noise: (B, C, h, w) float32.
            timesteps: t in (0, 1], (B,).
            condition: entries (B, ...).
            unconditional: the same entries, (B, ...) or (1, ...), where the teacher is guided or rows are dropped.
            dropped: (B,) bool: rows that the student gets the unconditional entries of; None: none.
        """
        denoiser, marginal, bounds = self._frozen
        seen = condition if dropped is None else with_dropped(condition, unconditional, dropped)
        with torch.no_grad():
            if self.guidance is None:
                teacher = teacher_of(denoiser, seen)
            else:
                teacher = teacher_of(denoiser, condition, unconditional, self.guidance)
            made = segment(latents, noise, timesteps, teacher, marginal, bounds, **self._segment)
        t = timesteps.double()
        output = self.student(made.z_t, (t * self.num_timesteps).float(), seen)
        loss = perflow_loss(output, made.target, t, **self._loss)
        with torch.no_grad():
            p, q = velocity_coefficients(t, made.start, made.end, marginal, self._segment["prediction_type"])
            end = combine(1 + (made.end - t) * p, made.z_t, (made.end - t) * q, output.detach())
            error = perflow_loss(end, made.z_end)
        return {"loss": loss, "end": error}
