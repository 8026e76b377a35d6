r"""Training of a denoiser in the parametrisation of EDM: on clean pictures, where nobody teaches it; and to do in a
few steps what a frozen one does in many (`EDMStepDistillation`).

    L = mean_b w(sigma_b) mean |D(x_b; sigma_b) - x_0b|^2,      x = x_0 + sigma eps,      ln sigma normal

    w(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2

D is preconditioned (`linattn.schedulers.edm`): with c_out the factor of the network in it, w = 1 / c_out^2, so the
network's own error counts alike at every noise level.

The low resolution picture that D depends on is sometimes replaced by noise (`with_dropped`), so that the model learns
to do with the rest of its condition; and the positions it is told start anywhere, so that it learns all of them.

The steps are those of `flash`, with alpha = 1: a teacher that says D walks from one of the levels of its sampler to the
end of its path, and the student learns to say there where that is.

Sources: Karras et al. 2022 (arXiv 2206.00364), eq. 2, 5, 8 and section 5; Inf-DiT (arXiv 2405.04312), section 4.1;
Chadebec et al. 2025, Flash Diffusion (arXiv 2406.02347), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...schedulers.edm import karras_sigmas
from ...schedulers.piecewise import combine
from ..denoiser import Denoiser
from ..noise import NoiseSchedule
from ..noise_process import Grid
from . import flash

#: What sampling starts from, and so training at the noisiest level: noise around the enlarged picture, or noise alone.
STARTS = ("lr", "noise")


def edm_losses(denoised: Tensor, clean: Tensor, weights: Tensor) -> Tensor:
    """w_b mean |D_b - x_0b|^2 of each sample, (B,).

    Args:
        denoised, clean: (B, ...); computed in float32, or float64 if denoised is that.
        weights: (B,).
    """
    wide = torch.float64 if denoised.dtype == torch.float64 else torch.float32
    errors = (denoised.to(wide) - clean.to(wide)) ** 2
    return weights.to(errors) * errors.flatten(1).mean(1)


def with_dropped(image: Tensor, noise: Tensor, dropped: Tensor) -> Tensor:
    """The image (B, ...), with the rows where `dropped` (B,) is True replaced by those of `noise` (B, ...)."""
    return torch.where(dropped.view(-1, *[1] * (image.ndim - 1)), noise.to(image), image)


class EDMTraining(nn.Module):
    """One step of training on an encoded batch.

    Args:
        student: `Denoiser` (a Module) that is trained, predicts the clean sample, and takes `position_offset`.
        schedule: `EDMSchedule`, or another whose target the student predicts.
    """

    def __init__(self, student: nn.Module, schedule: NoiseSchedule):
        super().__init__()
        self.student = student
        self.schedule = schedule

    def forward(
        self,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        condition: Mapping[str, Tensor],
        position_offset: tuple[int, int] = (0, 0),
    ) -> dict[str, Tensor]:
        """Losses of a batch: {"loss": L, "error": mean |D - x_0|^2, unweighted}.

        Args:
            clean, noise: (B, C, H, W) float32.
            timesteps: (B,), noise levels.
            condition: of the student, entries (B, ...).
            position_offset: of the whole batch.
        """
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        target = self.schedule.target(clean, noise, timesteps)
        weights = self.schedule.loss_weights(timesteps)
        denoised = self.student(noisy, timesteps, condition, position_offset=position_offset)
        losses = edm_losses(denoised, target, weights)
        return {"loss": losses.mean(), "error": (losses / weights).mean().detach()}


class Starts:
    r"""The levels that the teacher's sampler visits, and at which of them training starts: what a `NoiseSchedule` draws
    is an index of the grid, 0 the noisiest.

        index j with probability proportional to sum_m w_m exp(-(j - m (K // n))^2 / variance),   m = 0 .. n - 1

    Its modes are the levels that a student of n steps is sampled at (`EDMScheduler`, grid_steps = K).

    Args:
        steps: K.
        weights, variance: w and the variance of `flash.start_distribution`.
        sigma_min, sigma_max, rho: of `karras_sigmas`, as the sampler has them.

    Attributes:
        grid: for `flash.rollout`; its timesteps are the noise levels themselves, float32.

    Raises:
        ValueError: an argument that one of the two does not take.
    """

    def __init__(
        self,
        steps: int = 20,
        *,
        weights: Sequence[float] = (0.25,) * 4,
        variance: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 40.0,
        rho: float = 7.0,
    ):
        sigmas = karras_sigmas(steps, sigma_min, sigma_max, rho, dtype=torch.float64)
        self.grid = Grid(sigmas[:-1].float(), torch.ones_like(sigmas), sigmas)
        self.probabilities = flash.start_distribution(steps, "mixture", weights, variance)

    def timestep(self, stream: np.random.Generator) -> Tensor:
        return flash.start_index(torch.tensor(stream.random(), dtype=torch.float64), self.probabilities)


class EDMStepDistillation(nn.Module):
    """One step in which a student learns to say at once where its teacher's path ends.

        L = d(D_student(x; sigma_j), end of the teacher's path from x at level j)

        x = x_0 + sigma_j eps,     at j = 0 what sampling starts from: lr_up + sigma_0 eps, or sigma_0 eps

    Args:
        student: `Denoiser` (a Module) that is trained, predicts the clean sample, and takes `position_offset`.
        teacher: another that is not; not registered here, so that it is neither trained nor synchronised nor saved.
        grid: levels of the teacher's sampler (`Starts.grid`).
        start: "lr" or "noise".
        order: of the teacher's steps: 1 Euler, 2 DPM-Solver++ (`flash.solver`).
        distance, huber_c: of `flash.distillation_loss`: "l2", "l1" or "huber".

    Raises:
        ValueError: another start, order or distance.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Denoiser,
        grid: Grid,
        *,
        start: str = "lr",
        order: int = 2,
        distance: str = "l2",
        huber_c: float = 1e-3,
    ):
        super().__init__()
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
        if distance not in ("l2", "l1", "huber"):
            raise ValueError(f"distance must be l2, l1 or huber, got {distance!r}")
        flash.solver(grid, order)  # checks it
        self.student = student
        self._frozen = (teacher,)
        self.grid, self.start, self.order = grid, start, order
        self._distance = {"kind": distance, "huber_c": huber_c}

    def noisy(self, clean: Tensor, noise: Tensor, index: Tensor, lr_up: Tensor) -> Tensor:
        """x at levels of the grid. clean, noise, lr_up (B, ...), index (B,) or (1,)."""
        index = index.to(clean.device).expand(len(clean))
        first = (index == 0).view(-1, *[1] * (clean.ndim - 1))
        begun = lr_up.to(clean) if self.start == "lr" else torch.zeros_like(clean)
        sigmas = self.grid.sigmas.to(clean.device)[index]
        return combine(torch.ones_like(sigmas), torch.where(first, begun, clean), sigmas, noise)

    def forward(
        self,
        clean: Tensor,
        noise: Tensor,
        index: Tensor,
        condition: Mapping[str, Tensor],
        position_offset: tuple[int, int] = (0, 0),
    ) -> dict[str, Tensor]:
        """Losses of a batch: {"loss": L, "error": mean |D - x_0|^2 of the student, for comparison with training}.

        Args:
            clean, noise: (B, C, H, W) float32.
            index: into the grid, (B,) or, for all, (1,).
            condition: of both, entries (B, ...); "lr_up" (B, C, H, W) is what sampling starts around.
            position_offset: of the whole batch, for both.
        """
        (denoiser,) = self._frozen

        def teacher(sample: Tensor, sigmas: Tensor) -> Tensor:
            return denoiser(sample, sigmas, condition, position_offset=position_offset)

        noisy = self.noisy(clean, noise, index, condition["lr_up"])
        target = flash.rollout(teacher, noisy, index, self.grid, prediction_type="sample", order=self.order)
        sigmas = self.grid.timesteps.to(clean.device)[index.to(clean.device)].expand(len(clean))
        denoised = self.student(noisy, sigmas, condition, position_offset=position_offset)
        loss = flash.distillation_loss(denoised, target, **self._distance)
        return {"loss": loss, "error": (denoised.detach().to(clean) - clean).square().mean()}
