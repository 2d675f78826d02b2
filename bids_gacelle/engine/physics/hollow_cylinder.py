"""The field of myelinated axons, hollow cylinders of anisotropic susceptibility.

References
----------
Wharton and Bowtell, Proc. Natl. Acad. Sci. USA 109, 18559 (2012).
"""

from __future__ import annotations

import torch
from torch import Tensor

SUSCEPTIBILITY = -0.1
"""Isotropic susceptibility of myelin relative to its surroundings, in ppm."""

ANISOTROPY = -0.1
"""Anisotropic susceptibility of myelin in ppm."""

EXCHANGE_SHIFT = 0.02
"""Shift of myelin water by chemical exchange in ppm."""

# Below this share of myelin in a fibre, series in it replace quotients of small numbers.
_THIN = 0.1
_TERMS = 12
# Share of the axon in a fibre below which its frequency is that of this share: it diverges.
_LEAST_AXON = 1e-6


def myelin_share(axon: Tensor, myelin: Tensor) -> Tensor:
    """Return 1 - g^2, the share of myelin in the volume of the fibre; g is the g-ratio.

    Parameters
    ----------
    axon, myelin
        Volumes in any common unit.
    """
    fibre = (axon + myelin).clamp_min(torch.finfo(axon.dtype).tiny)
    return (myelin / fibre).clamp_max(1 - _LEAST_AXON)


def frequencies(share: Tensor, sin2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean frequencies in myelin and axon in ppm of the field.

    f_M = chi_i / 2 (2/3 - sin^2) + chi_a / 2 (c sin^2 - 1/3) + E,
    c = 1/4 - 3/2 g^2 / (1 - g^2) ln(1 / g^2), and f_A = 3/4 chi_a sin^2 ln(1 / g).

    Parameters
    ----------
    share
        1 - g^2.
    sin2
        Squared sine of the angle between fibre and field.
    """
    c = 0.25 - 1.5 * _log_quotient(share)
    myelin = (
        0.5 * SUSCEPTIBILITY * (2 / 3 - sin2) + 0.5 * ANISOTROPY * (c * sin2 - 1 / 3)
    ) + EXCHANGE_SHIFT
    axon = -0.375 * ANISOTROPY * sin2 * torch.log1p(-share)
    return myelin, axon


def dephasing_rate(share: Tensor, sin2: Tensor) -> Tensor:
    """Return |chi_i + chi_a / 4| (1 - g^2) sin^2 in ppm: how fast the water outside dephases."""
    return abs(SUSCEPTIBILITY + ANISOTROPY / 4) * share * sin2


def dephasing(fraction: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exponent D by which the water outside the fibres has dephased, and dD / dphase.

    With the volume fraction f of the fibres D = f / 16 phase^2 up to a phase of 4, and
    f / 2 (phase - 2) from there on.

    Parameters
    ----------
    fraction
        f.
    phase
        Dephasing rate times time in rad, at least 0.
    """
    early = phase.clamp_max(4.0)
    return fraction * (early**2 / 16 + 0.5 * (phase - early)), fraction * early / 8


def _log_quotient(share: Tensor) -> Tensor:
    """Return g^2 / (1 - g^2) ln(1 / g^2), which is 1 where there is no myelin."""
    series = torch.zeros_like(share)
    for k in range(_TERMS, 0, -1):
        series = share * (series + 1 / (k * (k + 1)))
    thick = share.clamp_min(_THIN)
    quotient = -(1 - thick) * torch.log1p(-thick) / thick
    return torch.where(share < _THIN, 1 - series, quotient)
