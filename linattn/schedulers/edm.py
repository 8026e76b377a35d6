r"""The diffusion of EDM: noise levels, preconditioning, and what each call of the network does to the sample.

A sample at noise level sigma is x = clean + sigma * N(0, 1). The network F sees it scaled, and its output is turned into
an estimate of the clean data,

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise),

with coefficients that keep the network's input and target at variance one for data of deviation sigma_data:

    c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)        c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)
    c_in   = 1 / sqrt(sigma^2 + sigma_data^2)               c_noise = ln(sigma) / 4

Pure functions, torch only; `linattn.schedulers.EDMScheduler` makes a scheduler of diffusers from them.

Source: Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models (arXiv 2206.00364),
table 1 and eq. 5.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def karras_sigmas(
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 40.0,
    rho: float = 7.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Noise levels (steps + 1,): from sigma_max to sigma_min, evenly spaced in sigma^(1 / rho), then 0.

        sigma_i = (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,    i = 0 ... steps - 1

    Args:
        steps: at least 1; a single one starts at sigma_max.
        sigma_min, sigma_max: 0 < sigma_min < sigma_max. The defaults are those of Inf-DiT.
        rho: above 0; the larger, the more of the levels are small.
        dtype: of the result, which is computed in float64.

    Raises:
        ValueError: an argument outside these bounds.

    Source: EDM, eq. 5.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min=}, {sigma_max=}")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be above 0, got {rho}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (first + ramp * (last - first)) ** rho
    return torch.cat([levels, levels.new_zeros(1)]).to(dtype)


class Preconditioning(NamedTuple):
    """Coefficients of D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), each in the shape of sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def preconditioning(sigma: Tensor | float, sigma_data: float = 0.5) -> Preconditioning:
    """The four coefficients at these noise levels (see the head of this file).

    Args:
        sigma: any shape, above 0. Computed in float32, or in float64 if it is that; a number gives tensors ().
        sigma_data: standard deviation of the data, above 0.

    Raises:
        ValueError: sigma_data is not above 0.

    Source: EDM, table 1.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be above 0, got {sigma_data}")
    sigma = torch.as_tensor(sigma)
    sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32))
    variance = sigma**2 + sigma_data**2
    deviation = variance.sqrt()
    return Preconditioning(
        c_skip=sigma_data**2 / variance,
        c_out=sigma * sigma_data / deviation,
        c_in=1 / deviation,
        c_noise=sigma.log() / 4,
    )
