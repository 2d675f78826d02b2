"""The Rice distribution of magnitudes, in forms that neither overflow nor cancel.

A magnitude y of a complex signal with true magnitude S >= 0 and noise of standard deviation sigma
in each channel has the density y / sigma^2 exp(-(y^2 + S^2) / 2 sigma^2) I0(y S / sigma^2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Likelihood(NamedTuple):
    """Terms of the negative log-likelihood times sigma^2, up to a constant, by the signal.

    Attributes
    ----------
    cost
        Non-negative; half the squared residual where the signal is far above the noise.
    slope
        Derivative by the signal, S - y I1/I0(y S / sigma^2).
    curvature
        Second derivative, bounded from below by a tenth so that normal equations stay positive.
    """

    cost: Tensor
    slope: Tensor
    curvature: Tensor


def likelihood(signal: Tensor, data: Tensor, variance: Tensor) -> Likelihood:
    """Return the exact likelihood of single magnitudes; all tensors broadcast.

    Parameters
    ----------
    signal, data
        Noise-free signal (its absolute value is what counts) and measured magnitude.
    variance
        sigma^2 in the squared unit of the data.
    """
    sign = torch.where(signal < 0, -1.0, 1.0)
    size, magnitude = signal.abs(), data.abs()
    z = magnitude * size / variance
    i0 = torch.special.i0e(z)
    ratio = torch.special.i1e(z) / i0
    # exp-scaled Bessel functions: log I0(z) = z + log i0e(z), and z completes the square.
    cost = 0.5 * (size - magnitude) ** 2 - variance * torch.log(i0)
    # I1/I0 over z tends to 1/2 where both vanish; far out the difference cancels, and its
    # expansion 1 / 2 z^2 is exact to rounding.
    over_z = torch.where(z < 1e-4, 0.5, ratio / z.clamp_min(1e-4))
    tail = torch.where(z < 1e3, 1 - ratio**2 - over_z, 0.5 / z.clamp_min(1e3) ** 2)
    curvature = 1 - magnitude**2 / variance * tail
    return Likelihood(cost, sign * (size - magnitude * ratio), curvature.clamp_min(0.1))


def mean(signal: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expected magnitude and its derivative by the signal; tensors broadcast.

    sigma sqrt(pi/2) L(-S^2 / 2 sigma^2) with L(-t) = exp(-t/2) [(1 + t) I0(t/2) + t I1(t/2)].
    """
    half = signal**2 / (4 * variance)  # t / 2
    i0, i1 = torch.special.i0e(half), torch.special.i1e(half)
    root = math.sqrt(math.pi / 2) * torch.sqrt(variance)
    expected = root * ((1 + 2 * half) * i0 + 2 * half * i1)
    slope = 0.5 * root * (signal / variance) * (i0 + i1)
    return expected, slope


def spread(signal: Tensor, variance: Tensor) -> Tensor:
    """Return the variance of a magnitude, from (2 - pi/2) sigma^2 without signal to sigma^2."""
    expected, _ = mean(signal, variance)
    exact = 2 * variance + signal**2 - expected**2
    # Far above the noise the difference cancels; there the variance is sigma^2 (1 - 1 / 2 snr^2).
    snr2 = signal**2 / variance
    far = variance * (1 - 0.5 / snr2.clamp_min(1.0))
    return torch.where(snr2 > 400, far, exact)


def invert_mean(data: Tensor, variance: Tensor) -> Tensor:
    """Return the signal whose expected magnitude is the data, 0 where none is, by Newton steps."""
    data = data.abs()
    signal = (data**2 - variance).clamp_min(0.0).sqrt().maximum(0.1 * variance.sqrt())
    for _ in range(12):
        expected, slope = mean(signal, variance)
        signal = (signal - (expected - data) / slope.clamp_min(0.05)).clamp_min(0.0)
    floor = math.sqrt(math.pi / 2) * torch.sqrt(variance)
    return torch.where(data <= floor, 0.0, signal)
