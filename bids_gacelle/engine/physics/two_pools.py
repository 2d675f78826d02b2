"""Two pools of water, free and myelin, that exchange magnetisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Fraction of the myelin pool and difference of the modes in 1/s that stand for none at all.
_NO_FRACTION = 1e-8
_NO_SPREAD = 1e-5


class Modes(NamedTuple):
    """Eigenmodes of relaxation with exchange, each of the broadcast shape of the inputs.

    The matrix of rates, [[rf + k, -c], [-c, rm + k (1 - f) / f]] with c = k sqrt((1 - f) / f), is
    written for magnetisations over the square root of their equilibrium, in which it is symmetric.

    Attributes
    ----------
    slow
        Smaller rate in 1/s.
    spread
        Larger minus smaller rate in 1/s.
    cosine, sine
        Of twice the angle that the slow mode has with the free pool.
    """

    slow: Tensor
    spread: Tensor
    cosine: Tensor
    sine: Tensor


def exchange_modes(fraction: Tensor, r_free: Tensor, r_myelin: Tensor, exchange: Tensor) -> Modes:
    """Diagonalise relaxation with exchange; all is finite and accurate for f and k down to 0.

    Parameters
    ----------
    fraction
        f, share of the myelin pool, 0 to 1.
    r_free, r_myelin
        Relaxation rates in 1/s, either longitudinal or transverse.
    exchange
        k, rate from the free to the myelin pool in 1/s; back it is k (1 - f) / f.
    """
    return _diagonalise(fraction, r_free, r_myelin, exchange)[0]


class ModeChange(NamedTuple):
    """Derivatives of both rates, and of the doubled angle in radian, by one parameter."""

    slow: Tensor
    fast: Tensor
    angle: Tensor


def exchange_mode_derivatives(
    fraction: Tensor, r_free: Tensor, r_myelin: Tensor, exchange: Tensor
) -> tuple[Modes, ModeChange, ModeChange, ModeChange]:
    """Return `exchange_modes` and how they change by f, by the free pool's rate, and by k."""
    modes, total, gap = _diagonalise(fraction, r_free, r_myelin, exchange)
    f = fraction.clamp_min(_NO_FRACTION)
    root = torch.sqrt(f * (1 - f))

    def change(det: Tensor, whole: Tensor | float, lean: Tensor, couple: Tensor | float,
               fraction_too: float = 0) -> ModeChange:  # fmt: skip
        """Derivatives from those of what `_diagonalise` calls so."""
        apart = modes.cosine * lean + modes.sine * couple
        slow = (2 * det - modes.slow * (whole + apart)) / (total + gap)
        spread = (apart - fraction_too * modes.spread) / f
        return ModeChange(slow, slow + spread, (modes.cosine * couple - modes.sine * lean) / gap)

    return (
        modes,
        change(
            r_free * r_myelin + exchange * (r_myelin - r_free),
            r_free + r_myelin,
            r_myelin - r_free - 2 * exchange,
            exchange * (1 - 2 * f) / root,
            1,
        ),
        change(f * r_myelin + exchange * (1 - f), f, -f, 0),
        change((1 - f) * r_free + f * r_myelin, 1, 1 - 2 * f, 2 * root),
    )


def _diagonalise(
    fraction: Tensor, r_free: Tensor, r_myelin: Tensor, exchange: Tensor
) -> tuple[Modes, Tensor, Tensor]:
    """Return the modes, and sum and difference of their rates times f."""
    f = fraction.clamp_min(_NO_FRACTION)
    # All rates are multiplied by f, which takes the pole of the rate back out of them.
    total = f * (r_free + r_myelin) + exchange
    lean = f * (r_myelin - r_free) + exchange * (1 - 2 * f)
    couple = 2 * exchange * torch.sqrt(f * (1 - f))
    gap = torch.sqrt(lean**2 + couple**2 + (_NO_SPREAD * f) ** 2)
    det = f * r_free * r_myelin + exchange * ((1 - f) * r_free + f * r_myelin)
    # The slow rate as det over the fast one instead of a difference, which would cancel.
    return Modes(2 * det / (total + gap), gap / f, lean / gap, couple / gap), total, gap


def bloch_mcconnell(
    fraction: Tensor,
    r1_free: Tensor,
    r1_myelin: Tensor,
    exchange: Tensor,
    tr: Tensor,
    angle: Tensor,
) -> tuple[Tensor, Tensor]:
    """Ideally spoiled steady state of two exchanging pools.

    That is sin a (I - E cos a)^-1 (I - E) M0 with M0 = (1 - f, f), E = exp(A TR) and
    A = [[-R1f - k, k (1 - f) / f], [k, -R1m - k (1 - f) / f]]. It is h(-A) M0, h being the signal
    of one pool as a function of its rate, and so h(l) M0 - h[l, l'] (A + l) M0 with both
    eigenvalues l, l' of -A and the divided difference of h. Exchange cancels in A M0.

    Parameters
    ----------
    fraction
        f, share of the myelin pool, 0 to 1.
    r1_free, r1_myelin
        Longitudinal relaxation rates in 1/s.
    exchange
        k, rate from the free to the myelin pool in 1/s.
    tr
        Repetition time in s.
    angle
        Actual flip angle in radian.

    Returns
    -------
    free, myelin
        Transverse magnetisation right after the pulse, of the broadcast shape.

    References
    ----------
    McConnell, J. Chem. Phys. 28, 430 (1958); Spencer and Fishbein, J. Magn. Reson. 142, 120
    (2000).
    """
    free, myelin = pool_signals(fraction, r1_free, r1_myelin, exchange, tr, angle)
    return (1 - fraction) * free, fraction * myelin


def pool_signals(
    fraction: Tensor,
    r1_free: Tensor,
    r1_myelin: Tensor,
    exchange: Tensor,
    tr: Tensor,
    angle: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return `bloch_mcconnell` with each pool over its own equilibrium, so that f may be 0."""
    modes = exchange_modes(fraction, r1_free, r1_myelin, exchange)
    versine = 2 * torch.sin(0.5 * angle) ** 2  # 1 - cos a without cancellation
    e, recovered = torch.exp(-tr * modes.slow), -torch.expm1(-tr * modes.slow)
    parted = -torch.expm1(-tr * modes.spread)
    lost = e * parted  # exp(-l TR) - exp(-l' TR)
    slow = recovered + e * versine
    fast = recovered + lost + (e - lost) * versine
    both = torch.sin(angle) * recovered / slow
    change = torch.sin(angle) * versine * lost / (modes.spread * slow * fast)
    free, myelin = (both + change * (r1 - modes.slow) for r1 in (r1_free, r1_myelin))
    return free, myelin
