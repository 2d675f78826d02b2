"""Powder averages of axially symmetric Gaussian compartments in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Below this exponent the closed form subtracts nearly equal numbers; the series takes over.
_SMALL = 0.3
_TERMS = 10


def _series(a: Tensor, coefficients: list[float]) -> Tensor:
    """Evaluate a polynomial in a (Horner), lowest coefficient first."""
    out = torch.full_like(a, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        out = out * a + coefficient
    return out


_VALUE = [(-1) ** k / (math.factorial(k) * (2 * k + 1)) for k in range(_TERMS)]
_SLOPE = [(-1) ** (k + 1) / (math.factorial(k) * (2 * k + 3)) for k in range(_TERMS)]


def stick_average(a: Tensor) -> Tensor:
    """Return G(a) = int_0^1 exp(-a x^2) dx = sqrt(pi / 4a) erf(sqrt a) for a >= 0."""
    large = a.clamp_min(_SMALL)
    root = torch.sqrt(large)
    closed = (0.5 * math.sqrt(math.pi)) * torch.erf(root) / root
    return torch.where(a < _SMALL, _series(a.clamp_max(_SMALL), _VALUE), closed)


def stick_average_slope(a: Tensor, average: Tensor) -> Tensor:
    """Return G'(a) = (exp(-a) - G) / 2a, given G = `stick_average(a)`."""
    large = a.clamp_min(_SMALL)
    closed = (torch.exp(-large) - average) / (2 * large)
    return torch.where(a < _SMALL, _series(a.clamp_max(_SMALL), _SLOPE), closed)
