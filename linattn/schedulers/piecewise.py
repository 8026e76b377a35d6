r"""Piecewise rectified flow: windows, chords, and what a network's output says about them. Pure functions on tensors.

Time t runs from 1 (noise) to 0 (data) and is cut into W windows; window i runs from its start s to its end e < s. At
s and e the sample has the marginal of the teacher's process; between them the path is the straight chord

    z_t = z_s + (t - s) / (e - s) (z_e - z_s),          velocity v = (z_e - z_s) / (e - s) = dz / dt

(dt is negative when sampling). The network says v in one of three ways. With a, c the signal and noise level of the
marginal (z = a x_0 + c eps) at s and e:

    velocity   output = v
    ddim_eps   z_e = lambda z_s + eta output,   lambda = a_e / a_s,   eta = c_e - lambda c_s             (a DDIM step)
    diff_eps   the same form,                   lambda = a_e / a_s,   eta = -sqrt(lambda^2 - 1)
               output is the noise that diffusion adds from z_e to z_s = z_e / lambda + sqrt(1 - 1 / lambda^2) output

Putting z_s on the chord through z_t into that form gives, at every t of the window,

    v = ((lambda - 1) z_t + eta output) / D,      D = lambda (t - s) + (e - t) < 0

Everything is linear in (sample, output), so the functions return coefficients, in float64 whatever the samples are.

Source: Yan et al. 2024, PeRFlow: Piecewise Rectified Flow as Universal Plug-and-Play Accelerator (arXiv 2405.07510),
section 3 (velocity; diff_eps is its eq. for "epsilon-prediction") and the project's code (ddim_eps).
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTIONS = ("ddim_eps", "diff_eps", "velocity")

# A window contains its start and not its end. Times that are meant to be equal to a start differ from it by rounding,
# or by the truncation of timesteps to integers: a tenth of one of a thousand timesteps is between the two.
TOLERANCE = 1e-4


def window_bounds(num_windows: int, shift: float = 1.0) -> Tensor:
    """Start of each window, then the end of the last: (num_windows + 1,) float64, from 1 to 0.

    Args:
        num_windows: W >= 1, of equal length in u = (W - i) / W.
        shift: where t = shift u / (1 + (shift - 1) u), as flow-matching models shift their noise levels; 1: t = u.

    Raises:
        ValueError: num_windows < 1 or shift <= 0.
    """
    if num_windows < 1 or shift <= 0:
        raise ValueError(f"expected num_windows >= 1 and shift > 0, got {num_windows=}, {shift=}")
    # (W - i) / W and not 1 - i / W: the two round differently, and timesteps are truncated.
    u = torch.arange(num_windows, -1, -1, dtype=torch.float64) / num_windows
    return shifted(u, shift)


def shifted(u: Tensor, shift: float) -> Tensor:
    """shift u / (1 + (shift - 1) u): Esser et al. 2024 (Stable Diffusion 3), eq. 23."""
    return shift * u / (1 + (shift - 1) * u)


def windows_of(t: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end of the windows that hold these times, float64, in the shape of t.

    Args:
        t: in (0, 1].
        bounds: as `window_bounds` returns them.
    """
    bounds = bounds.to(t.device)
    # The first start needs no looking at; of the others, those at or above t have been passed.
    index = (t.double().unsqueeze(-1) <= bounds[1:-1] + TOLERANCE).sum(-1)
    return bounds[index], bounds[index + 1]


class Marginal:
    """Signal and noise level of the process at t: z_t = a(t) x_0 + c(t) eps.

    Diffusion: a = sqrt(abar), c = sqrt(1 - abar), with abar looked up at index floor(T t) - 1 and at index 0 for t = 0
    (so the last window ends at the least noisy level the teacher knows, not at no noise). Flow matching:
    a = 1 - t, c = t.

    Args:
        alphas_cumprod: abar (T,); None for flow matching.
    """

    def __init__(self, alphas_cumprod: Tensor | None = None):
        self.alphas_cumprod = None if alphas_cumprod is None else alphas_cumprod.double()

    def index(self, t: Tensor) -> Tensor:
        """Index into alphas_cumprod of the level at t."""
        steps = len(self.alphas_cumprod)
        # The addend undoes rounding where T t is meant to be an integer; where it is not, it is farther from one.
        return (t.double() * steps + 1e-3).floor().long().sub(1).clamp(0, steps - 1)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and c at t in [0, 1], float64, in the shape of t."""
        if self.alphas_cumprod is None:
            return 1 - t.double(), t.double()
        abar = self.alphas_cumprod.to(t.device)[self.index(t)]
        return abar.sqrt(), (1 - abar).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """a(t) clean + c(t) noise. clean, noise (B, ...), t (B,), (1,) or ()."""
        signal, level = self.levels(t)
        return combine(signal, clean, level, noise)


def window_map(start: Tensor, end: Tensor, marginal: Marginal, prediction_type: str) -> tuple[Tensor, Tensor]:
    """lambda, eta of z_e = lambda z_s + eta output for the two noise predictions (see the head of this file).

    Raises:
        ValueError: prediction_type is not one of the two.
    """
    (a_s, c_s), (a_e, c_e) = marginal.levels(start), marginal.levels(end)
    scale = a_e / a_s
    if prediction_type == "ddim_eps":
        return scale, c_e - scale * c_s
    if prediction_type == "diff_eps":
        return scale, -(scale**2 - 1).sqrt()
    raise ValueError(f"prediction_type must be ddim_eps or diff_eps, got {prediction_type!r}")


def velocity_coefficients(
    t: Tensor, start: Tensor, end: Tensor, marginal: Marginal, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """p, q of v = p z_t + q output."""
    if prediction_type == "velocity":
        zero = torch.zeros_like(t, dtype=torch.float64)
        return zero, zero + 1
    scale, offset = window_map(start, end, marginal, prediction_type)
    divisor = scale * (t.double() - start) + (end - t.double())
    return (scale - 1) / divisor, offset / divisor


def target_coefficients(start: Tensor, end: Tensor, marginal: Marginal, prediction_type: str) -> tuple[Tensor, Tensor]:
    """p, q of output = p z_s + q z_e: what the network should say anywhere on the chord from z_s to z_e."""
    if prediction_type == "velocity":
        rate = 1 / (end.double() - start.double())
        return -rate, rate
    scale, offset = window_map(start, end, marginal, prediction_type)
    return -scale / offset, 1 / offset


def data_coefficients(start: Tensor, end: Tensor, marginal: Marginal) -> tuple[Tensor, Tensor]:
    """p, q of x_0 = p z_s + q z_e: the data of which both ends of the chord are noisy versions with one noise.

    With ddim_eps that is DDIM's x_0; with flow matching z_t - t v.
    """
    (a_s, c_s), (a_e, c_e) = marginal.levels(start), marginal.levels(end)
    divisor = c_s * a_e - c_e * a_s
    return -c_e / divisor, c_s / divisor


def combine(p: Tensor, x: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """p x + q y, with coefficients () or (B,) in float64, computed in float32 or wider, in the type of x."""
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    p, q = (_broadcast(c, x).to(x.device, wide) for c in (p, q))
    return (p * x.to(wide) + q * y.to(wide)).to(x.dtype)


def _broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1)) if coefficient.ndim else coefficient
