r"""The process a network was trained on, as two functions of time; and what its output says about a sample.

    x_t = alpha(t) x_0 + sigma(t) eps

Whatever a network predicts is a mixture p x_0 + q eps of the same two unknowns:

    epsilon        p = 0,       q = 1
    sample         p = 1,       q = 0
    v_prediction   p = -sigma,  q = alpha
    flow           p = -1,      q = 1

So a sample and a prediction are two equations, and with D = q alpha - p sigma

    x_0 = (q x_t - sigma prediction) / D,        eps = (alpha prediction - p x_t) / D

for every kind of prediction on every process. D is alpha, -sigma, alpha^2 + sigma^2 and alpha + sigma.

alpha and sigma come from the configuration of a scheduler and never from its `add_noise`: a multistep solver looks a
timestep up in the list that it was last set to, and takes its last entry for one that is not in it.

Sources: Ho et al. 2020, Denoising Diffusion Probabilistic Models, eq. 4; Salimans and Ho 2022, Progressive
Distillation, section 4 (v); Esser et al. 2024, Scaling Rectified Flow Transformers (arXiv 2403.03206), section 2 and
eq. 23 (flow).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedulers.piecewise import combine, shifted

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")

# What else diffusers calls them.
_ALIASES = {"flow_prediction": "flow"}
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


# --------------------------------------------------------------------------------------- what a prediction is, by level


def _mixture(alpha: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """p, q of prediction = p x_0 + q eps."""
    _expect_prediction(prediction_type)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    return {
        "epsilon": (zero, one),
        "v_prediction": (-sigma, alpha),
        "sample": (one, zero),
        "flow": (-one, one),
    }[prediction_type]


def prediction_of(clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """p x_0 + q eps: what a network should say. clean, noise (B, ...), alpha and sigma (B,) or ().

    Raises:
        ValueError: another prediction_type.
    """
    p, q = _mixture(alpha.double(), sigma.double(), prediction_type)
    return combine(p, clean, q, noise)


def clean_of(
    prediction: Tensor,
    noisy: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str,
    *,
    undefined: Tensor | None = None,
) -> Tensor:
    """x_0 = (q x_t - sigma prediction) / D, computed in float32 or wider, in the type of noisy.

    Args:
        prediction, noisy: (B, ...).
        alpha, sigma: (B,) or ().
        undefined: (B, ...), what to return for samples where alpha is 0: noise alone, predicted perfectly, does not say
            which picture it hides.

    Raises:
        ValueError: another prediction_type; epsilon where alpha is 0, without `undefined`.
    """
    alpha, sigma = alpha.double(), sigma.double()
    p, q = _mixture(alpha, sigma, prediction_type)
    if prediction_type == "sample":
        return combine(torch.zeros_like(alpha), noisy, torch.ones_like(alpha), prediction)  # at sigma = 0 too
    divisor = q * alpha - p * sigma
    nothing = divisor == 0
    if nothing.any():
        if undefined is None:
            raise ValueError(f"{prediction_type} does not give x_0 where alpha is 0, got alpha {alpha.tolist()}")
        divisor = divisor.masked_fill(nothing, 1)
    clean = combine(q / divisor, noisy, -sigma / divisor, prediction)
    if undefined is None:
        return clean
    return torch.where(nothing.to(noisy.device).view(-1, *[1] * (noisy.ndim - 1)), undefined.to(clean), clean)


def noise_of(prediction: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """eps = (alpha prediction - p x_t) / D; arguments and result as those of `clean_of`.

    Raises:
        ValueError: another prediction_type; sample where sigma is 0.
    """
    alpha, sigma = alpha.double(), sigma.double()
    p, q = _mixture(alpha, sigma, prediction_type)
    if prediction_type == "epsilon":
        return combine(torch.zeros_like(alpha), noisy, torch.ones_like(alpha), prediction)  # at alpha = 0 too
    divisor = q * alpha - p * sigma
    if (divisor == 0).any():
        raise ValueError(f"{prediction_type} does not give the noise where sigma is 0, got sigma {sigma.tolist()}")
    return combine(-p / divisor, noisy, alpha / divisor, prediction)


def _expect_prediction(prediction_type: str) -> None:
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {prediction_type!r}")


# ---------------------------------------------------------------------------------------------------------- the process


class Grid(NamedTuple):
    """The levels that a sampler of K steps visits, noisiest first.

    timesteps (K,): what the network is told; int64 for diffusion, float64 for flow matching. alphas, sigmas (K + 1,)
    float64: the levels at these timesteps, and the level at which the last step ends.
    """

    timesteps: Tensor
    alphas: Tensor
    sigmas: Tensor


class NoiseProcess:
    """alpha and sigma by timestep, and what networks of this process predict.

    Diffusion: timesteps are whole, t = 0 .. T - 1; alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t).
    Flow matching: timesteps are t = T sigma, in [0, T]; alpha = 1 - sigma.

    Args:
        alphas_cumprod: abar (T,) of diffusion; None for flow matching.
        prediction_type: one of `PREDICTIONS`; None: "epsilon", or "flow" for flow matching.
        num_timesteps: T of flow matching.
        shift: of flow matching: how its levels are spread (`timesteps_of`, `grid`), s u / (1 + (s - 1) u). 1: evenly.

    Raises:
        ValueError: another prediction_type; epsilon with a level that has no signal; abar that is not in [0, 1] or does
            not decrease; shift or num_timesteps that is not positive, or a shift for diffusion.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor | None = None,
        *,
        prediction_type: str | None = None,
        num_timesteps: int = 1000,
        shift: float = 1.0,
    ):
        self.is_flow = alphas_cumprod is None
        self.prediction_type = prediction_type or ("flow" if self.is_flow else "epsilon")
        _expect_prediction(self.prediction_type)
        if not shift > 0 or (shift != 1 and not self.is_flow):
            raise ValueError(f"shift must be above 0, and 1 for a process that is not flow matching, got {shift}")
        self.shift = shift
        if self.is_flow:
            if num_timesteps < 1:
                raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
            self.alphas_cumprod, self.num_timesteps = None, num_timesteps
            return
        abar = alphas_cumprod.detach().double().cpu()
        if abar.ndim != 1 or not len(abar) or not ((abar >= 0) & (abar <= 1)).all() or (abar.diff() > 0).any():
            raise ValueError(
                f"alphas_cumprod must be (T,), in [0, 1] and not increase, got {tuple(abar.shape)}: {abar}"
            )
        if self.prediction_type == "epsilon" and abar[-1] == 0:
            raise ValueError(
                f"alpha is 0 at timestep {len(abar) - 1} (zero terminal SNR), where a prediction of the noise does not "
                "give x_0: expected v_prediction or sample, got epsilon"
            )
        self.alphas_cumprod, self.num_timesteps = abar, len(abar)

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, *, prediction_type: str | None = None, shift: float | None = None
    ) -> NoiseProcess:
        """The process behind a scheduler of diffusers, whatever its solver.

        Args:
            scheduler: or its configuration, a mapping.
            prediction_type: None: that of the configuration.
            shift: of flow matching; None: that of the configuration. A scheduler that shifts by the size of the picture
                (use_dynamic_shifting) needs one, exp(mu).

        Raises:
            ValueError: neither betas nor a flow's shift in the configuration; dynamic shifting without `shift`.
        """
        config: Mapping = dict(getattr(scheduler, "config", scheduler))
        name = config.get("_class_name", type(scheduler).__name__)
        says = prediction_type or config.get("prediction_type")
        says = _ALIASES.get(says, says)
        has_betas = "beta_schedule" in config or config.get("trained_betas") is not None
        num_timesteps = config.get("num_train_timesteps", 1000)
        if config.get("use_flow_sigmas") or (not has_betas and "shift" in config):
            if shift is None and config.get("use_dynamic_shifting"):
                raise ValueError(
                    f"{name} shifts its levels by the size of the picture: expected shift=exp(mu), got None"
                )
            if shift is None:
                shift = config.get("shift") or config.get("flow_shift") or 1.0
            # The default of a multistep solver's configuration, which flow matching does not mean.
            says = "flow" if says == "epsilon" and prediction_type is None else says
            return cls(prediction_type=says, num_timesteps=num_timesteps, shift=shift)
        if not has_betas:
            raise ValueError(f"expected a scheduler with betas, or of flow matching, got a {name}")
        from diffusers import DDPMScheduler

        betas = {key: config[key] for key in _BETAS if key in config}
        table = DDPMScheduler(num_train_timesteps=num_timesteps, **betas).alphas_cumprod
        return cls(table, prediction_type=says, shift=1.0 if shift is None else shift)

    def with_prediction(self, prediction_type: str) -> NoiseProcess:
        """The same process, of networks that predict something else.

        Raises:
            ValueError: another prediction type, or one that this process does not allow.
        """
        if prediction_type == self.prediction_type:
            return self
        return NoiseProcess(
            self.alphas_cumprod, prediction_type=prediction_type, num_timesteps=self.num_timesteps, shift=self.shift
        )

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at the timesteps, float64, in their shape.

        Raises:
            ValueError: a timestep that the process does not have.
        """
        if self.is_flow:
            if not ((timesteps >= 0) & (timesteps <= self.num_timesteps)).all():
                raise ValueError(f"timesteps must be in [0, {self.num_timesteps}], got {timesteps.tolist()}")
            sigma = timesteps.double() / self.num_timesteps
            return 1 - sigma, sigma
        index = timesteps.long()
        if not ((index == timesteps) & (index >= 0) & (index < self.num_timesteps)).all():
            raise ValueError(f"timesteps must be whole, 0 .. {self.num_timesteps - 1}, got {timesteps.tolist()}")
        abar = self.alphas_cumprod.to(index.device)[index]
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha clean + sigma noise, in the type of clean. clean, noise (B, ...), timesteps (B,), (1,) or ()."""
        alpha, sigma = self.levels(timesteps)
        return combine(alpha, clean, sigma, noise)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network of this process should say, (B, ...)."""
        return prediction_of(clean, noise, *self.levels(timesteps), self.prediction_type)

    def clean(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 that the prediction says, in the type of noisy: `clean_of`."""
        return clean_of(prediction, noisy, *self.levels(timesteps), self.prediction_type)

    def noise(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """eps that the prediction says, in the type of noisy: `noise_of`."""
        return noise_of(prediction, noisy, *self.levels(timesteps), self.prediction_type)

    def timesteps_of(self, levels: Tensor) -> Tensor:
        """Timesteps of levels that are numbered evenly: t itself for diffusion, int64; shifted for flow matching,
        float64."""
        if not self.is_flow:
            return levels.long()
        return self.num_timesteps * shifted(levels.double() / self.num_timesteps, self.shift)

    def random_timesteps(self, uniform: Tensor) -> Tensor:
        """Timesteps from numbers that are uniform in [0, 1), each of T levels equally often; in their shape.

        The levels are 0 .. T - 1 for diffusion and 1 .. T, shifted, for flow matching.
        """
        numbers = (uniform.double() * self.num_timesteps).floor()
        return self.timesteps_of(self.num_timesteps - numbers if self.is_flow else numbers)

    def grid(self, steps: int, *, spacing: str = "trailing", end: str = "clean") -> Grid:
        """The levels of a sampler of K steps.

            trailing   u = (K - i) / K, i = 0 .. K - 1:  diffusion: t = round(T u) - 1;  flow matching: T u, shifted
            euler      flow matching: the levels of FlowMatchEulerDiscreteScheduler.set_timesteps(K), whose least noisy
                       level is shifted before the others are spread, and once more with them

        Args:
            steps: K, from 1 to T.
            end: "clean": no noise is left. "least_noisy": diffusion ends at its level 0 (DDIM with
                set_alpha_to_one=False).

        Raises:
            ValueError: steps out of range; a spacing or an end that the process does not have.
        """
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"steps must be from 1 to {self.num_timesteps}, got {steps}")
        spacings = ("trailing", "euler") if self.is_flow else ("trailing",)
        ends = ("clean",) if self.is_flow else ("clean", "least_noisy")
        if spacing not in spacings:
            raise ValueError(f"spacing must be {' or '.join(spacings)} for this process, got {spacing!r}")
        if end not in ends:
            raise ValueError(f"end must be {' or '.join(ends)} for this process, got {end!r}")
        index = torch.arange(steps, dtype=torch.float64)
        if not self.is_flow:
            timesteps = (self.num_timesteps - index * (self.num_timesteps / steps)).round().long() - 1
        elif spacing == "trailing":
            timesteps = self.num_timesteps * shifted(1 - index / steps, self.shift)
        else:
            lowest = shifted(torch.tensor(1 / self.num_timesteps, dtype=torch.float64), self.shift)
            evenly = torch.linspace(1, lowest, steps, dtype=torch.float64)
            timesteps = self.num_timesteps * shifted(evenly, self.shift)
        alphas, sigmas = self.levels(timesteps)
        if end == "clean":
            last = torch.tensor([1.0]), torch.tensor([0.0])
        else:
            last = self.levels(torch.tensor([0]))
        return Grid(timesteps, torch.cat([alphas, last[0].double()]), torch.cat([sigmas, last[1].double()]))
