"""Kaerger exchange while diffusion gradients are on.

Let y(t) hold, for each compartment, the mean signal of the spins that are in it at the time t of
the first pulse. From y(0) = (1, 1) on it follows dy/dt = -B(t) y with

    B(t) = [[D1 q^2 + r1, -r1], [-r2, D2 q^2 + r2]],

q growing linearly with t and r1, r2 being the exchange rates out of either compartment. Since as
many spins move one way as the other, the second pulse is the first one backwards, and the signal
is y^T exp(-B2 (Delta - delta)) P y with y after one pulse, P = diag(f, 1 - f) and B2 the B between
the pulses. Nothing is divided by f, so all of this holds for f = 0 and f = 1.

A spin that spends the share s of a pulse's attenuation in the first compartment loses
s a1 + (1 - s) a2, a1 and a2 being the exponents of the pulse in either compartment. So y is an
average of exp(-s a1 - (1 - s) a2) with a distribution of s that depends on f and on the rate of
exchange alone, and a rule with a few s serves as well as this distribution: how well is known, for
no average errs more than the worst s. Its weights are smooth functions of f and of the rate, kept
as Chebyshev series. They are the same for all shells with pulses of one length, for all
diffusivities and directions.

References
----------
Kaerger, Adv. Colloid Interface Sci. 23, 129 (1985); Olesen et al., NeuroImage 251, 118976 (2022).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from bids_gacelle.engine.physics.exchange import Exchange, _Roots, _roots, _slope_ratio
from bids_gacelle.engine.physics.quadrature import FloatArray

# Limits of the fit of weights that keep rounding errors small.
_LEAST_SINGULAR = 1e-9
_LARGEST_WEIGHTS = 16.0
_NEGLIGIBLE = 1e-18

Pair = tuple[Tensor, Tensor]


class PulseTable(NamedTuple):
    """Rule for the attenuation of one pulse.

    Attributes
    ----------
    shares
        Share s of the attenuation that spins of each term get in the first compartment.
    coefficients
        (3, 2, terms, n, m) Chebyshev coefficients, in 2 f - 1 and in 2 r / `limit` - 1, of the
        weights that the terms have for either compartment, and of their derivatives by f and by r.
    limit
        Largest r, the length of the pulse over the exchange time.
    """

    shares: tuple[float, ...]
    coefficients: FloatArray
    limit: float


class Pulse(NamedTuple):
    """Terms of a `PulseTable` for known f and r.

    Attributes
    ----------
    shares
        As of the table.
    weights
        (3, 2, terms, ...), without derivatives (1, 2, terms, ...).
    """

    shares: tuple[float, ...]
    weights: Tensor


class _Parts(NamedTuple):
    """Exponents of one pulse, and of the time between both, as `_roots` takes them."""

    pulse: tuple[Tensor, Tensor]
    between: tuple[Tensor, Tensor, Tensor]
    weight: Tensor
    rest: Tensor


class _Slopes(NamedTuple):
    """Derivatives of a bilinear form by f and by the three exponents of an exponential."""

    by_fraction: Tensor
    by_first: Tensor
    by_second: Tensor
    by_rate: Tensor


def pulse_table(exponent: float, rate: float, error: float) -> PulseTable:
    """Return the smallest rule that is good enough.

    Parameters
    ----------
    exponent
        Largest attenuation exponent of one pulse in either compartment, share / (3 - share) b D.
    rate
        Largest r, the length of a pulse over the exchange time.
    error
        Largest error of a signal that may be made.
    """
    contrast = exponent * _points(int(24 + 6 * exponent**0.5))
    # An error of y counts twice in the signal; a quarter of it is left for each of both series.
    shares, fit = _exponential_rule(contrast, error / 4)
    f = (1 + _points(len(shares) + 8)) / 2
    r = rate * (1 + _points(int(10 + 3 * rate**0.5))) / 2
    states = _states(f[:, None], contrast[:, None, None], r)
    for axis in (2, 3):
        states = _series(states, axis, error / 8)
    weights = np.moveaxis(np.tensordot(states, fit, axes=(1, 1)), -1, 1)
    slopes = [
        np.pad(
            chebyshev.chebder(weights, scl=scale, axis=axis),
            [(0, int(k == axis)) for k in range(4)],
        )
        for axis, scale in ((2, 2.0), (3, 2 / rate))
    ]
    return PulseTable(tuple(shares.tolist()), np.stack([weights, *slopes]), rate)


def _points(n: int) -> FloatArray:
    """Return the n Chebyshev points between -1 and 1."""
    return np.cos(np.pi * (np.arange(n) + 0.5) / n)


def _exponential_rule(contrast: FloatArray, error: float) -> tuple[FloatArray, FloatArray]:
    """Return shares s_i, and a matrix from y at all contrasts to weights of these shares.

    The contrast is a1 - a2, the smaller exponent being 0. Any exp(-s a1 - (1 - s) a2) is matched
    by the weighted sum of those of the shares within the error.
    """
    first, second = np.maximum(contrast, 0)[:, None], np.maximum(-contrast, 0)[:, None]

    def decays(s: FloatArray) -> FloatArray:
        return np.exp(-s * first - (1 - s) * second)

    wanted = decays(np.linspace(0, 1, 201))
    for n in range(2, len(contrast)):
        shares = (1 + _points(n)) / 2
        chosen = decays(shares)
        fit = np.linalg.pinv(chosen, rcond=_LEAST_SINGULAR).astype(np.float64)
        weights = fit @ wanted
        small = np.abs(weights).sum(0).max() < _LARGEST_WEIGHTS
        if small and np.abs(chosen @ weights - wanted).max() < error:
            break
    return shares, fit


def _states(f: FloatArray, contrast: FloatArray, rate: FloatArray) -> FloatArray:
    """Return y after a pulse, (2, ...), by its power series in time; f must not be 0 or 1.

    With half the trace of B taken out of the exponent, no partial sum is larger than the
    exponential of that half, by which the sum is divided: nothing cancels.
    """
    scale = np.exp(-(np.abs(contrast) + rate) / 2)
    lean, half = (0.5 - f) * rate, 1.5 * contrast
    out, back = (1 - f) * rate, f * rate
    nothing = np.zeros(np.broadcast_shapes(f.shape, contrast.shape, rate.shape))
    terms = [(nothing, nothing)] * 2 + [(nothing + scale, nothing + scale)]
    total = np.stack(terms[-1])
    k = 0
    while max(np.abs(term).max() for term in terms) > _NEGLIGIBLE:
        k += 1
        (early1, early2), _, (late1, late2) = terms
        new = (
            (out * late2 - lean * late1 - half * early1) / k,
            (back * late1 + lean * late2 + half * early2) / k,
        )
        terms = [*terms[1:], new]
        total += new
    return total


def _series(values: FloatArray, axis: int, error: float) -> FloatArray:
    """Return Chebyshev coefficients from values at the points along an axis.

    The last coefficients that add up to less than the error are left out.
    """
    n = values.shape[axis]
    basis = chebyshev.chebvander(_points(n), n - 1) * (2 / n)
    basis[:, 0] /= 2
    series = np.moveaxis(np.tensordot(values, basis, axes=(axis, 0)), -1, axis)
    tails = np.cumsum(np.abs(np.flip(series, axis)), axis)
    others = tuple(k for k in range(values.ndim) if k != axis)
    needed = int((tails.max(others) > error).sum())
    return np.take(series, np.arange(max(2, needed)), axis)


def pulse_weights(coefficients: Tensor, table: PulseTable, f: Tensor, rate: Tensor) -> Pulse:
    """Return the terms of a rule for some f and r = delta / exchange time.

    Parameters
    ----------
    coefficients
        Those of the table, or the first of them if no derivatives are wanted, as a tensor.
    table
        The rule.
    f
        (...) fraction of the first compartment.
    rate
        (lengths, ...) for pulses of some lengths.
    """
    n, m = coefficients.shape[-2:]
    by_f, by_rate = _polynomials(2 * f - 1, n), _polynomials(rate * (2 / table.limit) - 1, m)
    features = (by_f[:, None, None] * by_rate).flatten(0, 1)
    return Pulse(table.shares, torch.tensordot(coefficients.flatten(-2), features, dims=1))


def _polynomials(x: Tensor, n: int) -> Tensor:
    """Return the first n Chebyshev polynomials."""
    found = [torch.ones_like(x), x]
    while len(found) < n:
        found.append(2 * x * found[-1] - found[-2])
    return torch.stack(found)


def pulsed_karger(
    f: Tensor, d1: Tensor, d2: Tensor, rate: Tensor, share: Tensor, pulse: Pulse
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
    pulse
        `pulse_weights` at f and share * rate.

    Returns
    -------
    The signal, of the broadcast shape.
    """
    parts = _split(d1, d2, rate, share)
    y = _sums(_decays(parts, pulse.shares), pulse.weights[0])
    later = _propagate(_roots(f, *parts.between), y)
    return f * y[0] * later[0] + (1 - f) * y[1] * later[1]


def pulsed_karger_derivatives(
    f: Tensor, d1: Tensor, d2: Tensor, rate: Tensor, share: Tensor, pulse: Pulse
) -> Exchange:
    """Return `pulsed_karger` with its derivatives by f, d1, d2 and the log exchange time.

    E = exp(-B2 (Delta - delta)) is symmetric in the product <a, b> = a^T P b. So the derivative of
    <y, E y> is that of E alone plus 2 <E y, dy>.
    """
    parts = _split(d1, d2, rate, share)
    decays = _decays(parts, pulse.shares)
    y, by_fraction, by_rate = (_sums(decays, weights) for weights in pulse.weights)
    along = _sums(
        [s * decay for s, decay in zip(pulse.shares, decays, strict=True)], pulse.weights[0]
    )
    roots = _roots(f, *parts.between)
    later = _propagate(roots, y)
    slopes = _slopes(f, parts.between[2], roots, y, y)
    left = 2 * f * later[0], 2 * (1 - f) * later[1]

    def moved(change: Pair) -> Tensor:
        return left[0] * change[0] + left[1] * change[1]

    first, second = y[0] * later[0], y[1] * later[1]
    signal = f * first + (1 - f) * second
    by_first = moved(along)
    return Exchange(
        signal=signal,
        by_fraction=first - second + slopes.by_fraction + moved(by_fraction),
        by_first=parts.rest * slopes.by_first - parts.weight * by_first,
        by_second=parts.rest * slopes.by_second - parts.weight * (2 * signal - by_first),
        by_log_time=-rate * ((1 - share) * slopes.by_rate + share * moved(by_rate)),
    )


def _split(d1: Tensor, d2: Tensor, rate: Tensor, share: Tensor) -> _Parts:
    weight = share / (3 - share)
    rest = 1 - 2 * weight
    return _Parts(
        pulse=(d1 * weight, d2 * weight),
        between=(d1 * rest, d2 * rest, rate * (1 - share)),
        weight=weight,
        rest=rest,
    )


def _decays(parts: _Parts, shares: tuple[float, ...]) -> list[Tensor]:
    first, second = parts.pulse
    difference = first - second
    return [torch.exp(-(second + s * difference)) for s in shares]


def _sums(decays: list[Tensor], weights: Tensor) -> Pair:
    first, second = (row[0] * decays[0] for row in weights)
    for i, decay in enumerate(decays[1:], 1):
        first = torch.addcmul(first, weights[0, i], decay)
        second = torch.addcmul(second, weights[1, i], decay)
    return first, second


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
