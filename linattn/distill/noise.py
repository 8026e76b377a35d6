"""Noise schedules as training needs them, and random numbers that belong to samples rather than to processes.

Every draw for a sample is a function of (seed, running number of the sample in the whole run). So a run that was killed
and resumed, or that is spread over other processes, sees the same noise and the same timesteps for the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64


class NoiseSchedule(Protocol):
    """How noise is added, and what a model that was trained with this schedule predicts.

    Timesteps say how noisy a sample is, from 0 to num_timesteps; whole numbers or not. `Denoiser`s take these.
    """

    num_timesteps: int

    def timestep(self, stream: np.random.Generator) -> Tensor:
        """One random timestep, (), by the random numbers of its sample."""

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def loss_weights(self, timesteps: Tensor) -> Tensor | None:
        """Weight of each sample's squared errors, (B,); None: 1 for all."""


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

    def timestep(self, stream: np.random.Generator) -> Tensor:
        return torch.tensor(int(stream.integers(self.num_timesteps)))

    def loss_weights(self, timesteps: Tensor) -> None:
        return None

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self._scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        return self._scheduler.get_velocity(clean, noise, timesteps)


#: How flow matching draws its timesteps (logit_normal, mode) or weights its errors (sigma_sqrt, cosmap).
WEIGHTINGS = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")


class FlowSchedule:
    r"""Flow matching on straight lines (rectified flow), as FLUX and Stable Diffusion 3 are trained with it.

        x = (1 - sigma) x_0 + sigma eps,      sigma = t / num_timesteps,      target: eps - x_0

    sigma is one of u = 1/n, 2/n, ... 1 (n: num_timesteps), shifted to s u / (1 + (s - 1) u). With shift s = 1 these are
    the values of a diffusers scheduler before it shifts them for its resolution.

    Args:
        scheduler: a flow matching scheduler of diffusers; only its number of training timesteps matters.
        weighting: none: u uniform, all errors count alike. logit_normal, mode: u by another density. sigma_sqrt: errors
            weighted by sigma^-2. cosmap: by 2 / (pi (1 - 2 sigma + 2 sigma^2)).
        logit_mean, logit_std: logit_normal: u = 1 - sigmoid(z), z normal. So a positive mean draws less noise, as in
            diffusers' own training scripts.
        mode_scale: mode: larger ones draw more from the middle.
        shift: see above.

    Source: Esser et al. 2024, Scaling Rectified Flow Transformers (arXiv 2403.03206), section 3.1. Densities and
    weights are those of diffusers.training_utils.

    Raises:
        ValueError: a scheduler of another kind, another weighting, a shift that is not positive.
    """

    def __init__(
        self,
        scheduler,
        *,
        weighting: str = "none",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        shift: float = 1.0,
    ):
        # PeRFlowScheduler is for both kinds, and its config says for which.
        if not (hasattr(scheduler, "scale_noise") and scheduler.config.get("use_flow_sigmas", True)):
            raise ValueError(f"expected a flow matching scheduler, got a {type(scheduler).__name__}")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.num_timesteps = scheduler.config.num_train_timesteps
        self.weighting, self.shift = weighting, shift
        self._density = {"logit_mean": logit_mean, "logit_std": logit_std, "mode_scale": mode_scale}

    def timestep(self, stream: np.random.Generator) -> Tensor:
        from diffusers.training_utils import compute_density_for_timestep_sampling

        generator = torch.Generator().manual_seed(int(stream.integers(2**63)))
        drawn = compute_density_for_timestep_sampling(self.weighting, 1, **self._density, generator=generator)
        n = self.num_timesteps
        steps = n - min(int(drawn.item() * n), n - 1)  # the tables of diffusers begin with the noisiest; `mode` draws 1
        return torch.tensor(n * self.shift * steps / (n + (self.shift - 1) * steps), dtype=torch.float32)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self._sigma(timesteps).view(-1, *[1] * (clean.ndim - 1))
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - clean

    def loss_weights(self, timesteps: Tensor) -> Tensor | None:
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        if self.weighting not in ("sigma_sqrt", "cosmap"):
            return None
        return compute_loss_weighting_for_sd3(self.weighting, self._sigma(timesteps))

    def _sigma(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.num_timesteps


class EDMSchedule:
    r"""Noise that is added to the picture as it is, and a model that estimates the clean picture D.

        x = x_0 + sigma eps,     target: x_0,     weight of |D - x_0|^2: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2

    Timesteps are the noise levels sigma themselves: ln sigma is normal, and sigma at least sigma_min. The weight makes
    the error of the network inside D (`linattn.schedulers.edm`) count alike at every noise level.

    Args:
        sigma_data: standard deviation of the data.
        log_mean, log_std: of ln sigma.
        sigma_min: lower levels are raised to this one.

    Source: Karras et al. 2022 (arXiv 2206.00364), section 5 and table 1; the defaults are those of Inf-DiT.

    Raises:
        ValueError: sigma_data, log_std or sigma_min is not above 0.
    """

    num_timesteps = math.inf

    def __init__(
        self, *, sigma_data: float = 0.5, log_mean: float = -1.0, log_std: float = 1.4, sigma_min: float = 0.001
    ):
        for name, value in (("sigma_data", sigma_data), ("log_std", log_std), ("sigma_min", sigma_min)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.sigma_data, self.log_mean, self.log_std, self.sigma_min = sigma_data, log_mean, log_std, sigma_min

    def timestep(self, stream: np.random.Generator) -> Tensor:
        drawn = math.exp(self.log_mean + self.log_std * stream.standard_normal())
        return torch.tensor(max(drawn, self.sigma_min), dtype=torch.float32)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return clean + timesteps.view(-1, *[1] * (clean.ndim - 1)) * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return clean

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        return (timesteps**2 + self.sigma_data**2) / (timesteps * self.sigma_data) ** 2


class Draws(NamedTuple):
    """Everything random about one step of a batch: posterior (B, C, h, w) and noise (B, C, h, w) standard normal,
    float32; timesteps (B,), as the schedule draws them."""

    posterior: Tensor
    noise: Tensor
    timesteps: Tensor


def draw(numbers: Sequence[int], shape: Sequence[int], *, seed: int, schedule: NoiseSchedule) -> Draws:
    """Random numbers of the samples with these running numbers, on the CPU.

    Args:
        numbers: running numbers of the samples, each >= 0.
        shape: (C, h, w) of one sample.
        seed: of the run.
    """
    rows = []
    for number in numbers:
        stream = _stream(seed, number)
        timestep = schedule.timestep(stream)
        noise, posterior = (torch.from_numpy(stream.standard_normal(tuple(shape), np.float32)) for _ in range(2))
        rows.append((posterior, noise, timestep))
    return Draws(*(torch.stack(part) for part in zip(*rows, strict=True)))


class PairDraws(NamedTuple):
    """Everything random about one step of a batch of pairs for upscaling, apart from the pairs.

    timesteps (B,), noise (B, C, H, W), dropped (B,) bool; lr_noise (B, C, H / 4, W / 4) and lr_up_noise (B, C, H, W)
    take the place of what is dropped: normal, clamped to [-1, 1], and zero where nothing is. offset: (row, column), one
    for the batch.
    """

    timesteps: Tensor
    noise: Tensor
    dropped: Tensor
    lr_noise: Tensor
    lr_up_noise: Tensor
    offset: tuple[int, int]


def draw_pairs(
    numbers: Sequence[int],
    shape: Sequence[int],
    *,
    seed: int,
    schedule: NoiseSchedule,
    dropout: float,
    max_offset: int,
    factor: int = 4,
) -> PairDraws:
    """Random numbers of the samples with these running numbers, on the CPU.

    Args:
        numbers: running numbers of the samples, each >= 0. The offset belongs to the first, which no other batch holds.
        shape: (C, H, W) of one sample.
        seed: of the run.
        dropout: chance that the low resolution of a sample is dropped.
        max_offset: rows and columns are uniform in 0 .. max_offset.
        factor: of the sides, between high and low resolution.
    """
    channels, height, width = shape
    low = channels, height // factor, width // factor
    rows = []
    for number in numbers:
        stream = _stream(seed, number)
        timestep = schedule.timestep(stream)
        dropped = bool(stream.random() < dropout)
        noise = torch.from_numpy(stream.standard_normal(tuple(shape), np.float32))
        instead = [
            torch.from_numpy(stream.standard_normal(size, np.float32)).clamp_(-1, 1) if dropped else torch.zeros(size)
            for size in (low, tuple(shape))
        ]
        rows.append((timestep, noise, torch.tensor(dropped), *instead))
    # Another part of the first sample's sequence, which its own numbers never reach.
    offset = _stream(seed, numbers[0], part=1).integers(0, max_offset, size=2, endpoint=True)
    return PairDraws(*(torch.stack(part) for part in zip(*rows, strict=True)), tuple(offset.tolist()))


class FlashDraws(NamedTuple):
    """Everything random about one step of Flash Diffusion: normal (B, C, h, w), float32; uniform in [0, 1), float64.

    start, guidance, renoise_guidance: uniform, (1,) for the whole batch or (B,), one a sample. renoise and its level
    (B,) are for distribution matching, fake_noise and its level for the fake score, adversarial_noise and its level for
    the discriminator. dropout (B,): uniform. posterior: for the VAE.
    """

    posterior: Tensor
    noise: Tensor
    start: Tensor
    guidance: Tensor
    dropout: Tensor
    renoise: Tensor
    renoise_level: Tensor
    renoise_guidance: Tensor
    adversarial_noise: Tensor
    adversarial_level: Tensor
    fake_noise: Tensor
    fake_level: Tensor

    def to(self, device: torch.device) -> FlashDraws:
        return FlashDraws(*(part.to(device) for part in self))


def draw_flash(numbers: Sequence[int], shape: Sequence[int], *, seed: int, per_sample: bool = False) -> FlashDraws:
    """Random numbers of the samples with these running numbers, on the CPU.

    Args:
        numbers: running numbers of the samples, each >= 0. What a batch has in common belongs to the first, which no
            other batch holds.
        shape: (C, h, w) of one sample.
        seed: of the run.
        per_sample: each sample has a start and guidances of its own.
    """
    normal = ("posterior", "noise", "renoise", "adversarial_noise", "fake_noise")
    uniform = ("dropout", "renoise_level", "adversarial_level", "fake_level")
    rows: dict[str, list[Tensor]] = {name: [] for name in FlashDraws._fields}
    for number in numbers:
        stream = _stream(seed, number)
        for name in normal:
            rows[name].append(torch.from_numpy(stream.standard_normal(tuple(shape), np.float32)))
        for name in uniform:
            rows[name].append(torch.tensor(stream.random(), dtype=torch.float64))
    for number in numbers if per_sample else numbers[:1]:
        # Another part of the sample's sequence, which its own numbers never reach.
        stream = _stream(seed, number, part=1)
        for name in ("start", "guidance", "renoise_guidance"):
            rows[name].append(torch.tensor(stream.random(), dtype=torch.float64))
    return FlashDraws(**{name: torch.stack(values) for name, values in rows.items()})


def chosen(numbers: Sequence[int], probability: float, *, seed: int) -> Tensor:
    """Which of the samples with these running numbers something happens to that happens with a probability: (B,) bool.

    Beside what `draw` draws for them, and independent of it.
    """
    return torch.tensor([_stream(seed, number, part=2).random() < probability for number in numbers])


def _stream(seed: int, number: int, part: int = 0) -> np.random.Generator:
    """The random numbers of a sample: of a counter-based generator, whose key is all there is to set up.

    Different keys are independent streams; `part` is the highest word of the counter.
    """
    return np.random.Generator(np.random.Philox(key=[seed % _WORD, int(number)], counter=[0, 0, 0, part]))
