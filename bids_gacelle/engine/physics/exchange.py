"""Kaerger exchange between two compartments in a form that is stable in single precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Exchange(NamedTuple):
    """Two-compartment signal and its derivatives, each of the broadcast shape of the inputs."""

    signal: Tensor
    by_fraction: Tensor
    by_first: Tensor
    by_second: Tensor
    by_log_time: Tensor


class _Roots(NamedTuple):
    """Quantities of the 2x2 matrix exponential that the signal and its derivatives share."""

    out: Tensor  # r1, exchange out of the first compartment
    back: Tensor  # r2, exchange into it
    half_difference: Tensor  # u
    half_gap2: Tensor  # w = u^2 + r1 r2, the squared half distance l2 of the eigenvalues
    middle: Tensor  # exp(-l1), l1 the mean of the eigenvalues; where w is small, else unused
    cosh: Tensor  # c = exp(-l1) cosh l2
    sinhc: Tensor  # s = exp(-l1) sinh(l2) / l2


# Below this w the closed forms of sinh(l2) / l2 and of the difference c - s cancel, and the root
# has no derivative where both eigenvalues are the same; series in w are exact to rounding there.
_SMALL_GAP2 = 0.09


def _roots(f: Tensor, d1: Tensor, d2: Tensor, rate: Tensor) -> _Roots:
    """Diagonalise; `rate` is the diffusion time over the exchange time."""
    r1, r2 = rate * (1 - f), rate * f
    u = (d1 + (r1 - r2 - d2)) * 0.5
    w = u * u + r1 * r2
    small = w < _SMALL_GAP2
    gap = torch.sqrt(w.clamp_min(_SMALL_GAP2))  # used where w is not small
    mean = (d1 + (d2 + rate)) * 0.5
    # The smaller eigenvalue as det / (l1 + l2) instead of l1 - l2: no cancellation.
    det = d1 * (d2 + r2) + d2 * r1
    decay = torch.exp(-torch.where(small, mean, det / (mean + gap)))
    square = torch.exp(-2 * gap)
    even = 1 + w * (1 / 2 + w * (1 / 24 + w * (1 / 720 + w * (1 / 40320 + w / 3628800))))
    odd = 1 + w * (1 / 6 + w * (1 / 120 + w * (1 / 5040 + w * (1 / 362880))))
    return _Roots(
        out=r1,
        back=r2,
        half_difference=u,
        half_gap2=w,
        middle=decay,
        cosh=decay * torch.where(small, even, 0.5 + 0.5 * square),
        sinhc=decay * torch.where(small, odd, (1 - square) * (0.5 / gap)),
    )


def _excess(f: Tensor, d1: Tensor, d2: Tensor, rate: Tensor) -> Tensor:
    """Return q in the signal c + q s."""
    return (0.5 - f) * (d1 - d2) + 0.5 * rate


def _slope_ratio(roots: _Roots) -> Tensor:
    """Return (c - s) / w, which is twice the derivative of s by w."""
    w, c, s = roots.half_gap2, roots.cosh, roots.sinhc
    series = roots.middle * (1 / 3 + w * (1 / 30 + w * (1 / 840 + w * (1 / 45360))))
    return torch.where(w < _SMALL_GAP2, series, (c - s) / w.clamp_min(_SMALL_GAP2))


def karger(f: Tensor, d1: Tensor, d2: Tensor, rate: Tensor) -> Tensor:
    """Signal of two exchanging compartments, (1, 1) exp(-[D + R]) (f, 1 - f)^T.

    Parameters
    ----------
    f
        Fraction of the first compartment, 0 to 1.
    d1, d2
        Attenuation exponents b D of both compartments, >= 0.
    rate
        Diffusion time over exchange time (dimensionless, > 0).

    Returns
    -------
    The signal, of the broadcast shape.

    References
    ----------
    Kaerger, Adv. Colloid Interface Sci. 23, 129 (1985); Jelescu et al., NeuroImage 256, 119277
    (2022), with the eigenvalue difference written so that nothing cancels or overflows.
    """
    roots = _roots(f, d1, d2, rate)
    return roots.cosh + _excess(f, d1, d2, rate) * roots.sinhc


def karger_derivatives(f: Tensor, d1: Tensor, d2: Tensor, rate: Tensor) -> Exchange:
    """Return `karger` with its derivatives by f, by d1, by d2 and by the log exchange time."""
    r = _roots(f, d1, d2, rate)
    u, c, s = r.half_difference, r.cosh, r.sinhc
    excess = _excess(f, d1, d2, rate)
    t = 0.5 * (s + excess * _slope_ratio(r))
    signal = c + excess * s
    half = 0.5 * (s - signal)
    tu = t * u
    skew = rate * (1 - 2 * f)
    return Exchange(
        signal=signal,
        by_fraction=t * (rate * skew) - s * (d1 - d2) - (2 * rate) * tu,
        by_first=half - s * f + tu,
        by_second=half - s * (1 - f) - tu,
        by_log_time=-(half * rate + tu * skew + t * (2 * f * (1 - f) * rate * rate)),
    )
