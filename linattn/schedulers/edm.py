r"""The diffusion of EDM: noise levels, preconditioning, and samplers. Pure functions, torch only.

A sample at noise level sigma is x = clean + sigma * N(0, 1). The network F sees it scaled, and its output is turned
into an estimate of the clean data,

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise),

with coefficients that keep the network's input and target at variance one for data of deviation sigma_data:

    c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)        c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)
    c_in   = 1 / sqrt(sigma^2 + sigma_data^2)               c_noise = ln(sigma) / 4

Sampling follows dx / dsigma = (x - D) / sigma from sigma_max to 0. Whatever the sampler, a call of the network changes
the sample linearly, by numbers that are known before it starts:

    x <- a x + b D + c history + e N(0, 1)

where history is the x or the D of an earlier call, all of them elementwise. So a sampler is a list of `Call`s, and the
sample may be kept and updated in pieces. `linattn.schedulers.EDMScheduler` is a scheduler of diffusers on top of this.

Sources: Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models (arXiv 2206.00364), table
1, eq. 5, algorithms 1 and 2; Lu et al. 2022, DPM-Solver++ (arXiv 2211.01095), algorithm 2, in terms of sigma.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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

        sigma_i = (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,    0 <= i < steps

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
    levels[-1], levels[0] = sigma_min, sigma_max  # which the two powers round
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


class Call(NamedTuple):
    """One call of the network, and what it does: x <- sample x + denoised D + history h + noise N(0, 1).

    sigma: noise level of the x that the network gets.
    step: which step of the sampler it belongs to, from 0 (Heun's steps have two).
    keep: "sample" or "denoised": h of the next call is the x or the D of this one; None: h stays.
    """

    sigma: float
    step: int
    sample: float
    denoised: float
    history: float = 0.0
    noise: float = 0.0
    keep: str | None = None

    def update(self, sample: Tensor, denoised: Tensor, history: Tensor | None, noise: Tensor | None) -> Tensor:
        """The next x. Tensors of one shape; history and noise may be None where their coefficients are 0."""
        new = self.denoised * denoised
        for coefficient, tensor in ((self.sample, sample), (self.history, history), (self.noise, noise)):
            if coefficient:
                new = new.add_(tensor, alpha=coefficient)
        return new


def euler_calls(sigmas: Sequence[float], eta: float = 0.0) -> list[Call]:
    r"""Euler's method; with eta > 0 the stochastic steps of DDIM.

        d = (x - D) / sigma,      x <- x + (sigma' sqrt(1 - eta^2) - sigma) d + eta sigma' N(0, 1)

    Args:
        sigmas: falling noise levels, the last of which may be 0.
        eta: in [0, 1]; the share of the next level's noise that is drawn anew is eta^2.
    """
    calls = []
    for step, (sigma, after) in enumerate(_pairs(sigmas)):
        ratio = after * math.sqrt(1 - eta**2) / sigma
        calls.append(Call(sigma, step, sample=ratio, denoised=1 - ratio, noise=eta * after))
    return calls


def heun_calls(
    sigmas: Sequence[float], *, churn: float = 0.0, churn_min: float = 0.0, churn_max: float = math.inf, s_noise=1.0
) -> list[Call]:
    r"""Heun's method of second order: two calls a step, one for a step that ends at 0.

        d = (x - D) / sigma,    x_e = x + (sigma' - sigma) d,    d' = (x_e - D(x_e, sigma')) / sigma'
        x <- x + (sigma' - sigma) (d + d') / 2 = (x + x_e) / 2 + (sigma' - sigma) d' / 2

    The second form needs x, which is the history, and not d. With churn > 0 a step at a level within
    [churn_min, churn_max] first adds noise up to sigma_hat = (1 + min(churn / steps, sqrt(2) - 1)) sigma; here the call
    before adds it, and the first step starts at its sigma_hat.

    Args:
        sigmas: falling noise levels, the last of which may be 0.
        churn, churn_min, churn_max, s_noise: S_churn, S_tmin, S_tmax and S_noise of EDM's algorithm 2. Without churn
            it is algorithm 1.
    """
    pairs = _pairs(sigmas)
    gamma = min(churn / len(pairs), math.sqrt(2) - 1)
    churned = [sigma * (1 + gamma) if churn_min <= sigma <= churn_max else sigma for sigma, _ in pairs]
    added = [s_noise * math.sqrt(hat**2 - sigma**2) for hat, (sigma, _) in zip(churned, pairs, strict=True)]
    calls = []
    for step, (_, after) in enumerate(pairs):
        sigma, noise = churned[step], added[step + 1] if step + 1 < len(pairs) else 0.0
        ratio = after / sigma
        if after == 0:
            calls.append(Call(sigma, step, sample=ratio, denoised=1 - ratio, noise=noise))
            continue
        calls.append(Call(sigma, step, sample=ratio, denoised=1 - ratio, keep="sample"))
        half = (after - sigma) / (2 * after)
        calls.append(Call(after, step, sample=0.5 + half, denoised=-half, history=0.5, noise=noise))
    return calls


def multistep_calls(sigmas: Sequence[float]) -> list[Call]:
    r"""DPM-Solver++ (2M): second order from one call a step, with the D of the step before.

        h = ln(sigma / sigma'),   r = h_before / h,   D* = D + (D - D_before) / (2 r)
        x <- sigma' / sigma x + (1 - sigma' / sigma) D*

    The first step has no D_before, and the step to 0 has no finite h: there D* = D.

    Args:
        sigmas: falling noise levels, the last of which may be 0.
    """
    calls, before = [], None
    for step, (sigma, after) in enumerate(_pairs(sigmas)):
        ratio = after / sigma
        length = math.log(sigma / after) if after else math.inf
        ahead = 0.0 if before is None or not after else length / (2 * before)
        calls.append(
            Call(
                sigma,
                step,
                sample=ratio,
                denoised=(1 - ratio) * (1 + ahead),
                history=-(1 - ratio) * ahead,
                keep="denoised",
            )
        )
        before = length
    return calls


def _pairs(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """(level, next level) of every step."""
    levels = [float(sigma) for sigma in sigmas]
    falling = len(levels) > 1 and all(a > b for a, b in itertools.pairwise(levels))
    if not falling or not levels[0] < math.inf or levels[-1] < 0:
        raise ValueError(f"sigmas must be at least two falling numbers, none below 0, got {levels}")
    return list(itertools.pairwise(levels))
