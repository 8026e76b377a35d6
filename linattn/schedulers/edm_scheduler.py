"""EDMScheduler: the samplers of `linattn.schedulers.edm` as a scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import edm

SAMPLERS = ("heun", "ddim", "dpmsolver++", "lcm")


@dataclass
class EDMSchedulerOutput(BaseOutput):
    """What `step` returns, both in the shape of the sample, in float32 or wider.

    prev_sample: what the network gets next, or the result.
    pred_original_sample: the estimate D of the clean data.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class EDMScheduler(SchedulerMixin, ConfigMixin):
    r"""Samplers for a network with EDM's preconditioning, D = c_skip x + c_out F(c_in x, ln(sigma) / 4).

        scheduler.set_timesteps(20)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            F = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(F, t, x).prev_sample

    There is one timestep, and one `step`, for each call of the network:

        sampler         calls for n steps   error
        "heun"          2 n - 1             O(1/n^2)   what Inf-DiT is sampled with: 20 steps, 39 calls
        "dpmsolver++"   n                   O(1/n^2)   the estimate of the step before takes the place of a second call
        "ddim"          n                   O(1/n)     stochastic for eta > 0, Euler's method for eta = 0
        "lcm"           n                   -          for students of few steps: x <- D + sigma' N(0, 1)

    Timesteps are c_noise = ln(sigma) / 4, which is what the network is told. Coefficients are computed in float64, and
    samples are kept in float32 whatever the network computes in.

    Args:
        sigma_min, sigma_max, rho: of the noise levels, see `edm.karras_sigmas`.
        sigma_data: standard deviation of the data, as in training.
        sampler: one of the four.
        eta: of "ddim", in [0, 1].
        s_churn, s_tmin, s_tmax, s_noise: noise that "heun" adds before its steps (EDM, algorithm 2); s_churn=0: none,
            s_tmax=None: no upper bound.
        grid_steps: of "lcm": K, of whose noise levels n steps visit every (K // n)-th, from sigma_max on: those that a
            student was trained at. None: the n levels of any other sampler.

    Raises:
        ValueError: a setting outside these bounds, or one of a sampler that is not chosen.

    Sources: EDM (arXiv 2206.00364), DPM-Solver++ (arXiv 2211.01095), multistep consistency sampling (Song et al. 2023,
    arXiv 2303.01469, algorithm 1: "lcm"); `linattn.schedulers.edm` has the formulas.
    """

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 40.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        sampler: str = "heun",
        eta: float = 0.1,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
        grid_steps: int | None = None,
    ):
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {eta}")
        if not s_churn >= 0 or not s_noise > 0 or not s_tmin >= 0 or not (s_tmax is None or s_tmax >= s_tmin):
            raise ValueError(
                f"expected s_churn >= 0, s_noise > 0 and 0 <= s_tmin <= s_tmax, got {s_churn=}, {s_noise=}, {s_tmin=}, "
                f"{s_tmax=}"
            )
        if s_churn and sampler != "heun":
            raise ValueError(f'only sampler="heun" has churn, got {s_churn=} with {sampler=}')
        edm.preconditioning(1.0, sigma_data)  # checks it
        if grid_steps is not None and (
            isinstance(grid_steps, bool) or not isinstance(grid_steps, int) or grid_steps < 1
        ):
            raise ValueError(f"grid_steps must be None or a whole number of at least 1, got {grid_steps!r}")
        self.num_inference_steps: int | None = None
        self._place(edm.karras_sigmas(1, sigma_min, sigma_max, rho, dtype=torch.float64).tolist(), None)

    # ------------------------------------------------------------------------------------------------------ timesteps

    @property
    def order(self) -> int:
        """Calls of the network for one step, as pipelines count them."""
        return 2 if self.config.sampler == "heun" else 1

    @property
    def init_noise_sigma(self) -> float:
        """Noise level of the sample that the first call gets."""
        return self.calls[0].sigma

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Which of `timesteps` the next `step` is for; None before the first."""
        return self._step_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Choose the noise levels of the next run.

        Args:
            num_inference_steps: n, of `edm.karras_sigmas`; with grid_steps at most that.
            device: of `self.timesteps`.
            sigmas: instead of n, these: falling, above 0; a last one of 0 may be left out.

        Raises:
            ValueError: none or both of n and sigmas, n < 1 or above grid_steps, or sigmas that do not fall.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError(f"expected one of num_inference_steps and sigmas, got {num_inference_steps=}, {sigmas=}")
        if sigmas is None:
            levels = self._chosen(num_inference_steps)
        else:
            levels = [float(sigma) for sigma in sigmas]
            if levels and levels[-1] != 0:
                levels.append(0.0)
        self._place(levels, device)
        self.num_inference_steps = len(levels) - 1

    def _chosen(self, steps: int) -> list[float]:
        """The levels of so many steps, with the 0 at their end."""
        c = self.config
        grid = steps if c.sampler != "lcm" or c.grid_steps is None else c.grid_steps
        levels = edm.karras_sigmas(grid, c.sigma_min, c.sigma_max, c.rho, dtype=torch.float64).tolist()
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= grid:
            raise ValueError(f"num_inference_steps must be from 1 to grid_steps ({grid}), got {steps!r}")
        return [levels[m * (grid // steps)] for m in range(steps)] + [0.0]

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at `timesteps[begin_index]`, which must be where a step begins: with "heun", an even index."""
        if not 0 <= begin_index < len(self.calls):
            raise ValueError(f"begin_index must be between 0 and {len(self.calls) - 1}, got {begin_index}")
        step = self.calls[begin_index].step
        if begin_index and self.calls[begin_index - 1].step == step:
            raise ValueError(f"begin_index={begin_index} is within step {step}, which begins at {begin_index - 1}")
        # Laid out anew, because the first step of a run has no earlier call to look back to.
        rest = self._sampler(self._levels[step:])
        self.calls = self.calls[:begin_index] + [call._replace(step=call.step + step) for call in rest]
        self._begin_index = self._step_index = begin_index
        self._history = None

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Where in `timesteps` a step begins at this one."""
        starts = [i for i, call in enumerate(self.calls) if i == 0 or self.calls[i - 1].step != call.step]
        return self._find(timestep, starts)

    def _place(self, levels: list[float], device) -> None:
        self.calls = self._sampler(levels)
        self._levels = levels
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        told = torch.tensor([call.sigma for call in self.calls], dtype=torch.float64).log() / 4
        # On the CPU as well, so that looking a timestep up asks nothing of an accelerator but its value.
        self._told = told.float().tolist()
        self.timesteps = told.float().to(device)
        self._begin_index = self._step_index = self._history = None

    def _sampler(self, levels: list[float]) -> list[edm.Call]:
        c = self.config
        if c.sampler in ("ddim", "lcm"):
            return edm.euler_calls(levels, 1.0 if c.sampler == "lcm" else c.eta)  # at eta = 1 all noise is drawn anew
        if c.sampler == "dpmsolver++":
            return edm.multistep_calls(levels)
        upper = float("inf") if c.s_tmax is None else c.s_tmax
        return edm.heun_calls(levels, churn=c.s_churn, churn_min=c.s_tmin, churn_max=upper, s_noise=c.s_noise)

    def _find(self, timestep: float | Tensor, among: Sequence[int]) -> int:
        value = float(timestep)
        index = min(among, key=lambda i: abs(self._told[i] - value))
        # Half floats may have carried it; neighbours of a schedule are much farther apart.
        if not abs(self._told[index] - value) <= 2**-8 * max(1.0, abs(value)):
            raise ValueError(f"timestep must be one of {[self._told[i] for i in among]}, got {value}")
        return index

    # ------------------------------------------------------------------------------------------------------- sampling

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """c_in sample, in the sample's type. Inf-DiT's network wants the enlarged image scaled as well: pass both."""
        sigma = self.calls[self._find(timestep, range(len(self.calls)))].sigma
        return (sample.to(_wide(sample)) * self._coefficients(sigma).c_in).to(sample.dtype)

    def denoised(self, model_output: Tensor, sample: Tensor, sigma: float) -> Tensor:
        """D = c_skip sample + c_out model_output, in float32 or wider."""
        c = self._coefficients(sigma)
        return (sample.to(_wide(sample)) * c.c_skip).add_(model_output, alpha=c.c_out)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        noise: Tensor | None = None,
    ) -> EDMSchedulerOutput | tuple[Tensor, Tensor]:
        """What one call of the network does to the sample. Steps follow one another in the order of `timesteps`.

        Args:
            model_output: F, the network's raw output, of any floating type.
            timestep: that of the call; of the first one, where in the schedule to start.
            sample: x, as the last `step` returned it (not scaled by c_in), same shape.
            generator: for the fresh noise of "ddim", of "lcm" and of churn.
            noise: N(0, 1) in the shape of sample, instead of drawing it.
            return_dict: False returns (prev_sample, pred_original_sample).

        Raises:
            ValueError: shapes that differ, `set_timesteps` was not called, or a timestep whose turn it is not.
        """
        if self.num_inference_steps is None:
            raise ValueError("no timesteps: call set_timesteps first")
        if model_output.shape != sample.shape or (noise is not None and noise.shape != sample.shape):
            raise ValueError(
                f"model_output, sample and noise must have the same shape, got {tuple(model_output.shape)}, "
                f"{tuple(sample.shape)} and {None if noise is None else tuple(noise.shape)}"
            )
        if self._step_index is None:
            self.set_begin_index(self.index_for_timestep(timestep))
        if self._step_index >= len(self.calls):
            raise ValueError(f"all {len(self.calls)} steps were done: call set_timesteps for the next run")
        self._find(timestep, [self._step_index])
        call = self.calls[self._step_index]
        x = sample.to(_wide(sample))
        denoised = self.denoised(model_output, x, call.sigma)
        if call.noise and noise is None:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        after = call.update(x, denoised, self._history, noise)
        if call.keep:
            self._history = x if call.keep == "sample" else denoised
        self._step_index += 1
        if self._step_index == len(self.calls):
            self._history = None  # frees it
        return EDMSchedulerOutput(after, denoised) if return_dict else (after, denoised)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """original + sigma noise. timesteps: one, or one for each sample, of `self.timesteps`."""
        everywhere = range(len(self.calls))
        sigma = torch.tensor([self.calls[self._find(t, everywhere)].sigma for t in timesteps.reshape(-1)])
        sigma = sigma.to(original_samples).reshape(-1, *[1] * (original_samples.ndim - 1))
        return original_samples + sigma * noise

    def _coefficients(self, sigma: float) -> edm.Preconditioning:
        """As numbers, so that they join no computation with a type or device of their own."""
        sigma = torch.tensor(sigma, dtype=torch.float64)
        return edm.Preconditioning(*(c.item() for c in edm.preconditioning(sigma, self.config.sigma_data)))


def _wide(sample: Tensor) -> torch.dtype:
    return torch.promote_types(sample.dtype, torch.float32)
