"""PeRFlowScheduler: sampling from models distilled to piecewise rectified flow, in any diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from torch import Tensor

from . import piecewise

_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_FEWER_STEPS = ("raise", "clamp")


@dataclass
class PeRFlowSchedulerOutput(BaseOutput):
    """What `step` returns, all in the shape and type of the sample.

    prev_sample: the sample at the next timestep.
    pred_original_sample: the data that the velocity points to (see `piecewise.data_coefficients`).
    pred_window_end: where the chord ends, at the end of the window.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
    pred_window_end: Tensor | None = None


class PeRFlowScheduler(SchedulerMixin, ConfigMixin):
    r"""Euler's method on a flow that is straight in each of a few windows of time.

        z_next = z_t + (t_next - t) v,      v from the network's output as `linattn.schedulers.piecewise` says

    One step per window follows a perfectly trained student exactly; more steps subdivide the windows.

        pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="ddim_eps")
        pipe(prompt, num_inference_steps=4, guidance_scale=2.0)

    Keys of other schedulers' configs are kept and have no effect (timestep_spacing, steps_offset, ...).

    Args:
        num_train_timesteps: T; timesteps run from T down to 1, t is timestep / T.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the teacher's process, as diffusers'
            DDPMScheduler has them. Schedules: linear, scaled_linear, squaredcos_cap_v2.
        prediction_type: how the student was trained: "ddim_eps" (published SDXL weights), "diff_eps" (SD 1.5) or
            "velocity" (SD 2.1, flow matching).
        t_noise, t_clean: in published configs; only 1 and 0 exist.
        num_time_windows: W, that of the training.
        use_flow_sigmas: the teacher is a flow-matching model (SD3, FLUX); prediction_type must be "velocity". The betas
            are not used, and timesteps are not rounded to integers.
        window_shift: the shift of the windows that a flow-matching student was trained with.
        fewer_steps: what fewer steps than windows are: "raise" (an error) or "clamp" (W steps are done, as the original
            does).

    Raises:
        ValueError: a setting that is none of these, or windows so short that the two ends of one have the same noise.

    Source: PeRFlow (arXiv 2405.07510). Timesteps are bit-equal to the original's. docs/perflow.md.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012 (diffusers' convention)
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "ddim_eps",
        t_noise: float = 1,
        t_clean: float = 0,
        num_time_windows: int = 4,
        use_flow_sigmas: bool = False,
        window_shift: float = 1.0,
        fewer_steps: str = "raise",
    ):
        _expect_one_of("fewer_steps", fewer_steps, _FEWER_STEPS)
        if prediction_type not in piecewise.PREDICTIONS:
            raise ValueError(
                f"prediction_type must be one of {', '.join(piecewise.PREDICTIONS)}, got {prediction_type!r}: pass "
                "what the student was trained with (a config made for another scheduler does not say)"
            )
        if (t_noise, t_clean) != (1, 0):
            raise ValueError(f"expected t_noise=1 and t_clean=0, got {t_noise=}, {t_clean=}")
        if not 1 <= num_time_windows <= num_train_timesteps:
            raise ValueError(f"num_time_windows must be between 1 and {num_train_timesteps}, got {num_time_windows}")
        if use_flow_sigmas and prediction_type != "velocity":
            raise ValueError(f'use_flow_sigmas needs prediction_type="velocity", got {prediction_type!r}')
        if window_shift != 1 and not use_flow_sigmas:
            raise ValueError(f"window_shift is for flow matching (use_flow_sigmas=True), got {window_shift}")
        self._bounds = piecewise.window_bounds(num_time_windows, window_shift)
        if use_flow_sigmas:
            self.alphas_cumprod = None
        else:
            _expect_one_of("beta_schedule", beta_schedule, _BETA_SCHEDULES)
            if trained_betas is not None and len(trained_betas) != num_train_timesteps:
                raise ValueError(f"trained_betas must be {num_train_timesteps} numbers, got {len(trained_betas)}")
            process = DDPMScheduler(
                num_train_timesteps=num_train_timesteps,
                beta_start=beta_start,
                beta_end=beta_end,
                beta_schedule=beta_schedule,
                trained_betas=trained_betas,
                rescale_betas_zero_snr=rescale_betas_zero_snr,
            )
            self.betas, self.alphas_cumprod = process.betas, process.alphas_cumprod
        self._marginal = piecewise.Marginal(self.alphas_cumprod)
        signal, _ = self._marginal.levels(self._bounds)
        if not (signal[1:] > signal[:-1]).all() or (prediction_type != "velocity" and signal[0] <= 0):
            raise ValueError(
                f"the teacher's signal level must be positive and rise in every window, got {signal.tolist()} at the "
                f"bounds of {num_time_windows} windows ({rescale_betas_zero_snr=}, {prediction_type=})"
            )
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.begin_index: int | None = None
        self._place(self._grid(1.0, num_time_windows), None)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------------------------------------------ timesteps

    @property
    def window_starts(self) -> list[float]:
        """Timesteps at which the windows start, as they stand in `timesteps`."""
        return self._timesteps(self._bounds[:-1].numpy()).tolist()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the timesteps of the next run.

        Args:
            num_inference_steps: N >= W, spread over the windows as evenly as possible; the noisiest get one more.
            device: of `self.timesteps`.
            timesteps: instead of N, these: falling, in (0, T], integers but for flow matching. They may begin anywhere,
                and must contain each later start of a window (`window_starts`), because no step may cross one.
            sigmas: the same as timesteps / T, for flow matching. What FLUX pipelines pass of themselves, N equal steps
                from 1 to 1 / N, means N.
            mu: a shift that FLUX pipelines choose by the image's size. Without effect: the windows are the student's.

        Raises:
            ValueError: none or two of N, timesteps and sigmas; N < W or a start of a window left out, unless
                fewer_steps="clamp", which adds what is missing; N so large that timesteps coincide; out of range.
        """
        given = [x is not None for x in (num_inference_steps, timesteps, sigmas)]
        if sum(given) != 1:
            raise ValueError(
                f"expected one of num_inference_steps, timesteps and sigmas, got {num_inference_steps=}, {timesteps=}, "
                f"{sigmas=}"
            )
        if sigmas is not None:
            if not self.config.use_flow_sigmas:
                raise ValueError("sigmas are for flow matching (use_flow_sigmas=True); pass timesteps")
            sigmas = np.asarray(sigmas, dtype=np.float64)
            if sigmas.ndim == 1 and len(sigmas) and np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas))):
                num_inference_steps = len(sigmas)
            else:
                timesteps = sigmas * self.config.num_train_timesteps
        if timesteps is not None:
            points = self._completed(timesteps)
        else:
            points = self._grid(1.0, self._at_least_windows(num_inference_steps))
        self.num_inference_steps = len(points)
        self.begin_index = None
        self._place(points, device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at `timesteps[begin_index]`, as img2img and inpainting do for strength < 1, or at a window beside it.

        The noise that is added to a picture lies on the student's path at the starts of windows only. So the timesteps
        from begin_index on are laid out anew from the nearest start of a window (of two, the less noisy); their number
        stays. Pipelines take a slice of `timesteps` before they call this: the new ones are written in place, into that
        slice. A pipeline that made a copy gets an error from `step`.
        """
        if not 0 <= begin_index <= len(self._points):
            raise ValueError(f"begin_index must be between 0 and {len(self._points)}, got {begin_index}")
        self.begin_index = begin_index
        rest = self._points[begin_index:]
        # At 0 nothing was left out: the first timestep is what the caller asked for.
        if begin_index == 0 or not rest or rest[0] in self.window_starts:
            return
        # Either start beside rest[0] will do: the starts that follow it are among the rest, so each window gets a step.
        starts = self._bounds[:-1].tolist()
        wanted = rest[0] / self.config.num_train_timesteps
        start = min(starts, key=lambda bound: (round(abs(bound - wanted), 6), bound))
        snapped = torch.from_numpy(self._grid(start, len(rest)))
        self.timesteps[begin_index:] = snapped.to(self.timesteps)
        self._points = self.timesteps.tolist()

    def _at_least_windows(self, steps: int) -> int:
        windows = self.config.num_time_windows
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        if steps < windows and self.config.fewer_steps == "raise":
            raise ValueError(
                f"num_inference_steps must be at least the number of windows, {windows}, got {steps}: a step cannot "
                f'cross windows (fewer_steps="clamp" does {windows} steps instead)'
            )
        return max(steps, windows)

    def _grid(self, start: float, steps: int) -> np.ndarray:
        """Timesteps from the window that begins at `start` to the last."""
        windows, shift = self.config.num_time_windows, self.config.window_shift
        first = int(torch.argmin((self._bounds[:-1] - start).abs()))
        count, extra = divmod(steps, windows - first)
        parts = [
            # numpy's linspace and nothing else: the original truncates its values, rounding errors included.
            np.linspace(
                (windows - i) / windows, (windows - i - 1) / windows, count + (i - first < extra), endpoint=False
            )
            for i in range(first, windows)
        ]
        u = torch.from_numpy(np.concatenate(parts))
        points = self._timesteps((u if shift == 1 else piecewise.shifted(u, shift)).numpy())
        if (np.diff(points) >= 0).any():
            raise ValueError(f"num_inference_steps={steps} is too many: some timesteps would be the same")
        return points

    def _timesteps(self, t: np.ndarray) -> np.ndarray:
        """t in [0, 1] as the network is told it."""
        points = t * self.config.num_train_timesteps
        return points.astype(np.float32) if self.config.use_flow_sigmas else points.astype(np.int64)

    def _completed(self, timesteps: Sequence[float] | Tensor) -> np.ndarray:
        """Timesteps that a user chose, checked."""
        total = self.config.num_train_timesteps
        given = np.asarray(timesteps.cpu() if isinstance(timesteps, Tensor) else timesteps, dtype=np.float64)
        whole = self.config.use_flow_sigmas or bool((given == np.trunc(given)).all())
        if given.ndim != 1 or not len(given) or not whole or not (np.diff(given) < 0).all():
            kind = "numbers" if self.config.use_flow_sigmas else "integers"
            raise ValueError(f"timesteps must be falling {kind}, at least one, got {timesteps}")
        if not (given[0] <= total and given[-1] > 0):
            raise ValueError(f"timesteps must be above 0 and at most {total}, got {given[0]} to {given[-1]}")
        points = self._timesteps(given / total) if self.config.use_flow_sigmas else given.astype(np.int64)
        missing = [start for start in self.window_starts if start < points[0] and start not in points]
        if missing and self.config.fewer_steps == "raise":
            raise ValueError(
                f"timesteps must contain {missing}, where windows start: a step cannot cross windows "
                f'(fewer_steps="clamp" adds them), got {points.tolist()}'
            )
        return np.sort(np.append(points, np.array(missing, points.dtype)))[::-1].copy()

    def _place(self, points: np.ndarray, device) -> None:
        self.timesteps = torch.from_numpy(points).to(device)
        # On the CPU, so that looking a timestep up asks nothing of an accelerator but its value.
        self._points: list[float] = points.tolist()

    # ------------------------------------------------------------------------------------------------------- sampling

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> PeRFlowSchedulerOutput | tuple[Tensor, Tensor]:
        """One Euler step, from `timestep` to the one that follows it in `timesteps`, or to 0.

        Nothing is remembered between calls, so steps may be repeated or left out.

        Args:
            model_output, sample: (B, ...). Computed in float32, returned in the sample's type.
            timestep: a number, a tensor of one, or (B,), one for each sample; each of them in `timesteps`.
            return_dict: False returns (prev_sample, pred_original_sample).

        Raises:
            ValueError: shapes that differ, `set_timesteps` was not called, or a timestep that is not in `timesteps`.
        """
        if self.num_inference_steps is None:
            raise ValueError("no timesteps: call set_timesteps first")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output and sample must have the same shape, got {tuple(model_output.shape)} and "
                f"{tuple(sample.shape)}"
            )
        t, t_next = self._here_and_next(timestep, len(sample))
        start, end = piecewise.windows_of(t, self._bounds)
        p, q = piecewise.velocity_coefficients(t, start, end, self._marginal, self.config.prediction_type)

        def along(until: Tensor) -> Tensor:
            return piecewise.combine(1 + (until - t) * p, sample, (until - t) * q, model_output)

        x, y = piecewise.data_coefficients(start, end, self._marginal)
        # x z_s + y z_e with z_s = z + (s - t) v and z_e = z + (e - t) v.
        reach = x * (start - t) + y * (end - t)
        original = piecewise.combine(x + y + reach * p, sample, reach * q, model_output)
        if not return_dict:
            return along(t_next), original
        return PeRFlowSchedulerOutput(along(t_next), original, along(end))

    def _here_and_next(self, timestep: float | Tensor, batch: int) -> tuple[Tensor, Tensor]:
        values = timestep.tolist() if isinstance(timestep, Tensor) else timestep
        several = isinstance(values, list)
        if several and (len(values) not in (1, batch) or any(isinstance(value, list) for value in values)):
            raise ValueError(f"timestep must be one number or {batch}, got {values}")
        rows = []
        for value in values if several else [values]:
            if value not in self._points:
                raise ValueError(f"timestep must be one of {self._points}, got {value}")
            row = self._points.index(value)
            rows.append((value, self._points[row + 1] if row + 1 < len(self._points) else 0))
        if not several:
            rows = rows[0]
        here = torch.tensor(rows, dtype=torch.float64) / self.config.num_train_timesteps
        return here[..., 0], here[..., 1]

    # ---------------------------------------------------------------------------------------------------------- noise

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The teacher's process at these timesteps: sqrt(abar) x + sqrt(1 - abar) n, for flow matching (1 - t) x + t n.

        On the student's path at the starts of windows; elsewhere that path is the chord between two of these.

        Args:
            original_samples, noise: (B, ...).
            timesteps: (B,), (1,) or (), in (0, T]; integers but for flow matching.

        Raises:
            ValueError: timesteps out of range, 0 included (no noise level belongs to it).
        """
        total = self.config.num_train_timesteps
        timesteps = torch.as_tensor(timesteps)
        if not ((timesteps > 0) & (timesteps <= total)).all():
            raise ValueError(f"timesteps must be above 0 and at most {total}, got {timesteps.tolist()}")
        if timesteps.is_floating_point() and not self.config.use_flow_sigmas and (timesteps % 1 != 0).any():
            raise ValueError(f"timesteps must be integers, got {timesteps.tolist()}")
        return self._marginal.noised(original_samples, noise, timesteps.double() / total)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name, and in the order, by which pipelines of flow-matching models call it."""
        return self.add_noise(sample, noise, timestep)


def _expect_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
