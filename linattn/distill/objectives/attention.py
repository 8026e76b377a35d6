"""Attention distillation: a model whose attention was replaced learns to do what it did before.

    L = w_noise mse(s, target) + w_prediction mse(s, t) + w_feature mean_l mse(s_l, t_l)

s, t: predictions of student and teacher on the same noisy sample; s_l, t_l: outputs of the replaced attention modules
number l (after their output projection, before the residual), the teacher's on its own path. All means over all
elements, in float32. LinFusion and CLEAR train with weights 1, 0.5, 0.5.

What differs between models is told by others: the noise schedule knows the target (noise, velocity, or noise - x_0) and
may weight the samples of the first two losses; the kind of pipeline knows which modules are compared.

Source: LinFusion (arXiv 2409.02097), section 3.3; CLEAR (arXiv 2412.16112).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoiser import Denoiser, recorded_outputs
from ..noise import NoiseSchedule

WEIGHTS = {"noise": 1.0, "prediction": 0.5, "feature": 0.5}


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """mean over layers of mse(student's output, teacher's output).

    Raises:
        ValueError: the two do not have the same layers.
    """
    if student.keys() != teacher.keys() or not student:
        different = sorted(student.keys() ^ teacher.keys())
        raise ValueError(f"student and teacher must record the same layers (at least one), differ in: {different[:3]}")
    return torch.stack([_mse(student[name], teacher[name]) for name in student]).mean()


def attention_losses(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    student_features: Mapping[str, Tensor] | None = None,
    teacher_features: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, float] = WEIGHTS,
    sample_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses of this page: {"loss": their weighted sum, "noise": ..., "prediction": ..., "feature": ...}.

    Args:
        student, teacher, target: (B, ...) predictions and what the noise schedule asks for.
        student_features, teacher_features: outputs by layer name; None leaves the feature loss out.
        weights: of noise, prediction and feature; a loss of weight 0 is reported but not part of the sum.
        sample_weights: (B,), on the squared errors of the predictions, not of the features; None: 1.
    """
    losses = {
        "noise": _mse(student, target, sample_weights),
        "prediction": _mse(student, teacher, sample_weights),
    }
    if student_features is not None:
        losses["feature"] = feature_loss(student_features, teacher_features)
    total = sum(weights[name] * value for name, value in losses.items() if weights[name])
    return {"loss": total, **{name: value.detach() for name, value in losses.items()}}


def _mse(a: Tensor, b: Tensor, sample_weights: Tensor | None = None) -> Tensor:
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(wide), b.detach().to(wide)
    if sample_weights is None:
        return F.mse_loss(a, b)
    return (sample_weights.to(a).view(-1, *[1] * (a.ndim - 1)) * (a - b) ** 2).mean()


class AttentionDistillation(nn.Module):
    """One step of attention distillation on an encoded batch.

    Args:
        student: `Denoiser` (a Module) that is trained.
        teacher: `Denoiser` that is not; not registered here, so that it is neither trained nor synchronised nor saved.
        features: names of the modules whose outputs are matched, or last parts of names.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Denoiser,
        schedule: NoiseSchedule,
        *,
        weights: Mapping[str, float] = WEIGHTS,
        features: tuple[str, ...] = ("attn1",),
    ):
        super().__init__()
        self.student = student
        self._frozen = (teacher, schedule)
        self.weights = dict(weights)
        self.features = tuple(features) if self.weights["feature"] else ()

    def forward(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Losses of a batch: latents, noise (B, C, h, w) float32, timesteps (B,), condition: entries (B, ...)."""
        teacher, schedule = self._frozen
        noisy = schedule.add_noise(latents, noise, timesteps)
        target = schedule.target(latents, noise, timesteps)
        weighting = schedule.loss_weights(timesteps)
        inputs = (noisy, timesteps, condition)
        with torch.no_grad():
            predicted_by_teacher, wanted = self._run(teacher, inputs)
        predicted, made = self._run(self.student, inputs)
        return attention_losses(predicted, predicted_by_teacher, target, made, wanted, self.weights, weighting)

    def _run(self, denoiser, inputs):
        if not self.features:
            return denoiser(*inputs), None
        with recorded_outputs(denoiser.model, self.features) as outputs:
            return denoiser(*inputs), outputs
