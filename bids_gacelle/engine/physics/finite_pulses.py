"""Kaerger exchange while diffusion gradients are on.

Let y(t) hold, for each compartment, the mean signal of the spins that are in it at the time t of
the first pulse. From y(0) = (1, 1) on it follows dy/dt = -B(t) y with

    B(t) = [[D1 q^2 + r1, -r1], [-r2, D2 q^2 + r2]],

q growing linearly with t and r1, r2 being the exchange rates out of either compartment. Since as
many spins move one way as the other, the second pulse is the first one backwards, and the signal
is y^T exp(-B2 (Delta - delta)) P y with y after one pulse, P = diag(f, 1 - f) and B2 the B between
the pulses. Nothing is divided by f, so all of this holds for f = 0 and f = 1.

One pulse is integrated by the commutator-free Magnus scheme of fourth order, a product of
exponentials that are each those of a constant gradient: no step, however long, makes signal grow
or negative.

References
----------
Kaerger, Adv. Colloid Interface Sci. 23, 129 (1985); Olesen et al., NeuroImage 251, 118976 (2022);
Blanes and Moan, Appl. Numer. Math. 56, 1519 (2006), the scheme.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.physics.exchange import Exchange, _Roots, _roots, _slope_ratio
from bids_gacelle.engine.physics.quadrature import FloatArray

Rule = list[tuple[float, float]]
"""Time and attenuation of the exponentials of one pulse, as shares of those of the pulse."""

# Late steps, with the gradient's effect at its largest, are shorter: ends of steps at (i/n)^this.
_GRADING = 0.85

Pair = tuple[Tensor, Tensor]


class _Parts(NamedTuple):
    """Exponents of one pulse, and of the time between both, as `_roots` takes them."""

    pulse: tuple[Tensor, Tensor, Tensor]
    between: tuple[Tensor, Tensor, Tensor]
    weight: Tensor
    rest: Tensor


class _Slopes(NamedTuple):
    """Derivatives of a bilinear form by f and by the three exponents of an exponential."""

    by_fraction: Tensor
    by_first: Tensor
    by_second: Tensor
    by_rate: Tensor


def pulse_rule(n: int) -> Rule:
    """Return the 2 n - 1 exponentials of n steps, from the beginning of the pulse on.

    With B0, B1 the integrals of B and of (t - middle) / h B over a step of length h, a step is
    exp(-B0 / 2 - 2 B1) exp(-B0 / 2 + 2 B1). The very first exponential has no attenuation, for
    q ~ t; without it (1, 1) stays as it is, so it is left out.
    """
    ends = (np.arange(n + 1) / n) ** _GRADING
    rule = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        h, middle = end - begin, (begin + end) / 2
        half, shift = (end**3 - begin**3) / 2, middle * h**2
        rule += [(h / 2, half - shift), (h / 2, half + shift)]
    return rule[1:]


def pulse_steps(exponent: FloatArray, rate: FloatArray, share: FloatArray, error: float) -> int:
    """Return how many steps a pulse needs.

    Parameters
    ----------
    exponent
        (shells,) largest attenuation exponent b D of each shell.
    rate
        (shells,) largest ratio of pulse separation to exchange time.
    share
        (shells,) delta / Delta.
    error
        Largest error of a powder average that may be made.

    Notes
    -----
    With n steps no fraction, no smaller diffusivity and no longer exchange time was found to err
    by more than 1.6e-3 s a (1 + r / 3) / n^4, where s is the share, a the exponent of one pulse
    and r the rate during it.
    """
    pulse = exponent * share / (3 - share)
    bound = 1.6e-3 * share * pulse * (1 + rate * share / 3)
    return max(2, int(np.ceil((bound.max() / error) ** 0.25)))


def pulsed_karger(
    f: Tensor, d1: Tensor, d2: Tensor, rate: Tensor, share: Tensor, rule: Rule
) -> Tensor:
    """Signal of two exchanging compartments after two rectangular pulses.

    Parameters
    ----------
    f, d1, d2
        As for `exchange.karger`; b = g^2 delta^2 (Delta - delta / 3).
    rate
        Pulse separation Delta over exchange time.
    share
        delta / Delta, 0 to 1; at 0 the signal is `exchange.karger`.
    rule
        A `pulse_rule`.

    Returns
    -------
    The signal, of the broadcast shape.
    """
    parts = _split(d1, d2, rate, share)
    y = _after_pulse(rule, f, parts.pulse)
    later = _propagate(_roots(f, *parts.between), y)
    return f * y[0] * later[0] + (1 - f) * y[1] * later[1]


def pulsed_karger_derivatives(
    f: Tensor, d1: Tensor, d2: Tensor, rate: Tensor, share: Tensor, rule: Rule
) -> Exchange:
    """Return `pulsed_karger` with its derivatives by f, d1, d2 and the log exchange time.

    Every exponential T is symmetric in the product <a, b> = a^T P b. So the derivative of
    <y, E y>, y = T_n ... T_1 (1, 1), is that of E alone plus 2 <l_j, dT_j y_(j-1)> with
    l_n = E y and l_(j-1) = T_j l_j: one pass forwards and one backwards.
    """
    parts = _split(d1, d2, rate, share)
    steps, states = [], [(torch.ones_like(f), torch.ones_like(f))]
    for time, attenuation in rule:
        exponents = _scaled(parts.pulse, time, attenuation)
        steps.append((_roots(f, *exponents), exponents[2], time, attenuation))
        states.append(_propagate(steps[-1][0], states[-1]))
    y = states.pop()
    between = _roots(f, *parts.between)
    other = _propagate(between, y)
    first, second = y[0] * other[0], y[1] * other[1]
    slopes = _slopes(f, parts.between[2], between, y, y)
    total = [
        first - second + slopes.by_fraction,
        parts.rest * slopes.by_first,
        parts.rest * slopes.by_second,
        (1 - share) * slopes.by_rate,
    ]
    for roots, step_rate, time, attenuation in reversed(steps):
        slopes = _slopes(f, step_rate, roots, other, states.pop())
        weight = 2 * attenuation * parts.weight
        total[0] = total[0] + 2 * slopes.by_fraction
        total[1] = total[1] + weight * slopes.by_first
        total[2] = total[2] + weight * slopes.by_second
        total[3] = total[3] + 2 * time * share * slopes.by_rate
        other = _propagate(roots, other)
    by_fraction, by_first, by_second, by_rate = total
    signal = f * first + (1 - f) * second
    return Exchange(signal, by_fraction, by_first, by_second, -rate * by_rate)


def _split(d1: Tensor, d2: Tensor, rate: Tensor, share: Tensor) -> _Parts:
    weight = share / (3 - share)
    rest = 1 - 2 * weight
    return _Parts(
        pulse=(d1 * weight, d2 * weight, rate * share),
        between=(d1 * rest, d2 * rest, rate * (1 - share)),
        weight=weight,
        rest=rest,
    )


def _scaled(
    exponents: tuple[Tensor, Tensor, Tensor], time: float, attenuation: float
) -> tuple[Tensor, Tensor, Tensor]:
    d1, d2, rate = exponents
    return d1 * attenuation, d2 * attenuation, rate * time


def _after_pulse(rule: Rule, f: Tensor, exponents: tuple[Tensor, Tensor, Tensor]) -> Pair:
    y = torch.ones_like(f), torch.ones_like(f)
    for time, attenuation in rule:
        y = _propagate(_roots(f, *_scaled(exponents, time, attenuation)), y)
    return y


def _propagate(roots: _Roots, y: Pair) -> Pair:
    """Return exp(-B) y."""
    u, c, s = roots.half_difference, roots.cosh, roots.sinhc
    first, second = y
    return (
        c * first + s * (roots.out * second - u * first),
        c * second + s * (roots.back * first + u * second),
    )


def _slopes(f: Tensor, rate: Tensor, roots: _Roots, left: Pair, right: Pair) -> _Slopes:
    """Return the derivatives of <left, exp(-B) right> = c (a1 + a2) - s Q, P being constant.

    Here a1 = f left1 right1, a2 = (1 - f) left2 right2 and
    Q = u (a1 - a2) - rate f (1 - f) (left1 right2 + left2 right1).
    """
    u, c, s = roots.half_difference, roots.cosh, roots.sinhc
    g = 1 - f
    weighted = f * left[0], g * left[1]
    first, second = weighted[0] * right[0], weighted[1] * right[1]
    both, difference = first + second, first - second
    crossed = f * g * (left[0] * right[1] + left[1] * right[0])
    q = u * difference - rate * crossed
    by_gap2 = 0.5 * (s * both - _slope_ratio(roots) * q)
    half = 0.5 * (s * q - c * both)
    leaning = 0.5 * s * difference - u * by_gap2
    skew = 1 - 2 * f
    moved = s * (right[0] - right[1]) * (weighted[0] + weighted[1])
    return _Slopes(
        by_fraction=rate * (moved + by_gap2 * (rate * skew - 2 * u)),
        by_first=half - leaning,
        by_second=half + leaning,
        by_rate=half - skew * leaning + s * crossed + by_gap2 * (2 * rate * f * g),
    )
