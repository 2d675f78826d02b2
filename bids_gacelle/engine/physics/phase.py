"""Phases of gradient echoes: what a frequency in ppm of the field makes of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GYROMAGNETIC_RATIO = 42.57747892
"""Of protons over 2 pi, in MHz/T: a frequency of 1 ppm is this many Hz in a field of 1 T."""


def radians_per_ppm(
    echo_time: NDArray[np.float64], field_strength: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return 2 pi gamma B0 TE: the phase that 1 ppm has grown to at an echo time.

    Parameters
    ----------
    echo_time, field_strength
        In s and T.
    """
    return 2 * math.pi * GYROMAGNETIC_RATIO * field_strength * echo_time


def times_i(z: Tensor) -> Tensor:
    """Return i z for complex numbers kept as real and imaginary part on the first axis."""
    return torch.stack((-z[1], z[0]))


def phase_between(first: Tensor, second: Tensor) -> Tensor:
    """Return the phase of sum_m conj(first) second in rad, real and imaginary parts on axis 0.

    Parameters
    ----------
    first, second
        (2, measurements, ...).

    Returns
    -------
    (...)
    """
    real = (first[0] * second[0] + first[1] * second[1]).sum(0)
    imaginary = (first[0] * second[1] - first[1] * second[0]).sum(0)
    return torch.atan2(imaginary, real)


def slope_of_phase(z: Tensor, steps: Tensor) -> Tensor:
    """Return by how much the phase grows per unit, from one echo to the next without unwrapping.

    Growths between neighbours are weighted by their variance: products of magnitudes, and squared
    steps.

    Parameters
    ----------
    z
        (2, echoes, ...) real and imaginary parts in the order of the echoes.
    steps
        (echoes - 1, 1...) units from one echo to the next.

    Returns
    -------
    (...)
    """
    before, after = z[:, :-1], z[:, 1:]
    real = (before * after).sum(0)
    imaginary = before[0] * after[1] - before[1] * after[0]
    size = torch.hypot(real, imaginary)
    growth = torch.atan2(imaginary, real)
    weight = size * steps
    return (weight * growth).sum(0) / (weight * steps).sum(0)
