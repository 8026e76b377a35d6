r"""Training of a denoiser on clean pictures, in the parametrisation of EDM. Nobody teaches it.

    L = mean_b w(sigma_b) mean |D(x_b; sigma_b) - x_0b|^2,      x = x_0 + sigma eps,      ln sigma normal

    w(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2

D is preconditioned (`linattn.schedulers.edm`): with c_out the factor of the network in it, w = 1 / c_out^2, so the
network's own error counts alike at every noise level.

The low resolution picture that D depends on is sometimes replaced by noise (`with_dropped`), so that the model learns
to do with the rest of its condition; and the positions it is told start anywhere, so that it learns all of them.

Source: Karras et al. 2022 (arXiv 2206.00364), eq. 2, 8 and section 5; Inf-DiT (arXiv 2405.04312), section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..noise import NoiseSchedule


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
