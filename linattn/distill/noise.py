"""Noise schedules as training needs them, and random numbers that belong to samples rather than to processes.

Every draw for a sample is a function of (seed, running number of the sample in the whole run). So a run that was killed
and resumed, or that is spread over other processes, sees the same noise and the same timesteps for the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64


class NoiseSchedule(Protocol):
    """How noise is added, and what a model that was trained with this schedule predicts."""

    num_timesteps: int

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...


class DiscreteSchedule:
    r"""The variance-preserving schedule of Stable Diffusion, read from a diffusers scheduler.

        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,      t = 0 .. num_timesteps - 1
        target: eps  (prediction_type "epsilon")   or   sqrt(abar_t) eps - sqrt(1 - abar_t) x_0  ("v_prediction")

    Source: Ho et al. 2020, Denoising Diffusion Probabilistic Models, eq. 4; Salimans and Ho 2022, Progressive
    Distillation, section 4 (v). The arithmetic is that of diffusers' DDPMScheduler.

    Raises:
        ValueError: another prediction type, or a scheduler without betas.
    """

    def __init__(self, scheduler):
        from diffusers import DDPMScheduler

        config = dict(scheduler.config)
        if "beta_schedule" not in config and "trained_betas" not in config:
            raise ValueError(f"expected a scheduler with betas, got a {type(scheduler).__name__}")
        self.prediction_type = config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type must be epsilon or v_prediction, got {self.prediction_type!r}")
        self._scheduler = DDPMScheduler.from_config(config)
        self.num_timesteps = self._scheduler.config.num_train_timesteps

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self._scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        return self._scheduler.get_velocity(clean, noise, timesteps)


class Draws(NamedTuple):
    """Everything random about one step of a batch: posterior (B, C, h, w) and noise (B, C, h, w) standard normal,
    float32; timesteps (B,) int64, uniform."""

    posterior: Tensor
    noise: Tensor
    timesteps: Tensor


def draw(numbers: Sequence[int], shape: Sequence[int], *, seed: int, num_timesteps: int) -> Draws:
    """Random numbers of the samples with these running numbers, on the CPU.

    Args:
        numbers: running numbers of the samples, each >= 0.
        shape: (C, h, w) of one sample.
        seed: of the run.
    """
    rows = []
    for number in numbers:
        # A counter-based generator: its key is all there is to set up, and different keys are independent streams.
        stream = np.random.Generator(np.random.Philox(key=[seed % _WORD, int(number)]))
        timestep = int(stream.integers(num_timesteps))
        noise, posterior = (torch.from_numpy(stream.standard_normal(tuple(shape), np.float32)) for _ in range(2))
        rows.append((posterior, noise, torch.tensor(timestep)))
    return Draws(*(torch.stack(part) for part in zip(*rows, strict=True)))
