"""EPG-X steady states with their derivatives, in a few times the time of the value.

With M_k = (X_k + Y_k)^-1 and T_k = X_k^-1 of `epgx`, a change of the line or of a pulse at order k
comes down to order 0 by congruences alone,

    d M_k = A_k (d T_k) A_k^T - M_k (d Y_k) M_k,    A_k = (1 + T_k Y_k)^-1,
    d T_k = e^{i(2k+1)D} E2 (d M_{k+1}) E2 + what the change of E2 does itself.

So one way down the orders gives the value, and one way up, with the product of what lies below,
gives its derivatives by the few numbers the recurrence is made of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.physics.epgx import (
    Symmetric,
    _in_pools,
    _inverse,
    _line,
    _pulse,
    _Train,
    _train,
    _turned,
    _unit,
)
from bids_gacelle.engine.physics.two_pools import ModeChange, Modes, exchange_mode_derivatives

Matrix = tuple[Tensor, Tensor, Tensor, Tensor]  # entries 11, 12, 21, 22


class SteadyState(NamedTuple):
    """Complex steady state of the free and the myelin pool and its derivatives, each (2, ...)."""

    signal: Tensor
    by_fraction: Tensor
    by_r1_free: Tensor
    by_r2_free: Tensor
    by_exchange: Tensor
    by_angle: Tensor


class _Change(NamedTuple):
    """Derivatives of what the recurrence is made of by one parameter; 0 where not given.

    `stored` and `lost` are the exponents of E1 and E2 of both modes, `between` and `across` the
    doubled angles of the longitudinal to the transverse modes and of these to the pools.
    """

    stored: tuple[Tensor, Tensor] | None = None
    lost: tuple[Tensor, Tensor] | None = None
    between: Tensor | None = None
    across: Tensor | None = None
    tangent: Tensor | None = None
    fraction: bool = False


class _Slopes(NamedTuple):
    """Derivatives of a symmetric matrix by the numbers `_Change` names."""

    stored: tuple[Symmetric, Symmetric]
    lost: tuple[Symmetric, Symmetric]
    between: Symmetric
    tangent: Symmetric


def spoiled_steady_state_derivatives(
    fraction: Tensor,
    r1_free: Tensor,
    r2_free: Tensor,
    r1_myelin: Tensor,
    r2_myelin: Tensor,
    exchange: Tensor,
    tr: Tensor,
    angle: Tensor,
    increment: float,
    orders: int,
) -> SteadyState:
    """Return `epgx.spoiled_steady_state`, of as many orders for all cases, with its derivatives.

    The derivatives are by fraction, rates of the free pool, exchange and flip angle. In single
    precision those by fraction and by exchange lose digits where the modes are about to meet: both
    pools with the same R1 and no exchange, or less than about 1e-6 of myelin and of exchange.
    """
    fraction, r1_free, r2_free, r1_myelin, r2_myelin, exchange, tr, angle = (
        torch.broadcast_tensors(
            fraction, r1_free, r2_free, r1_myelin, r2_myelin, exchange, tr, angle
        )
    )
    along, *along_by = exchange_mode_derivatives(fraction, r1_free, r1_myelin, exchange)
    across, *across_by = exchange_mode_derivatives(fraction, r2_free, r2_myelin, exchange)
    train = _train(along, across, tr, angle, increment)

    def rates(change: ModeChange) -> tuple[Tensor, Tensor]:
        return tr * change.slow, tr * change.fast

    by_fraction, _, by_exchange = (
        _Change(rates(l1), rates(l2), l1.angle - l2.angle, l2.angle)
        for l1, l2 in zip(along_by, across_by, strict=True)
    )
    l1, l2 = along_by[1], across_by[1]
    changes = (
        by_fraction._replace(fraction=True),
        _Change(stored=rates(l1), between=l1.angle),
        _Change(lost=rates(l2), between=-l2.angle, across=l2.angle),
        by_exchange,
        _Change(tangent=0.5 * (1 + train.tangent**2)),
    )
    signal, slopes = _signals(train, across, fraction, changes, orders)
    return SteadyState(signal, *slopes)


def _signals(
    train: _Train, across: Modes, fraction: Tensor, changes: tuple[_Change, ...], orders: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the signals of both pools, (2, ...), and how they change."""
    line, line_slopes = _line_with_slopes(train, orders)
    x = _inverse(line)
    pulse, pulse_slopes = _first_pulse(train)
    total = 2 * x[0].real - 1 + pulse[0], 2 * x[1].real + pulse[1], 2 * x[2].real - 1 + pulse[2]
    inverse = _inverse(total)
    response = _times(_full(x), inverse)
    t = train.tangent
    f = fraction.clamp_min(1e-8)
    mixed = torch.sqrt(f * (1 - f))
    free, crossed, myelin = _in_pools(response, across)

    def signals(matrix: tuple[Tensor, tuple[Tensor, Tensor], Tensor]) -> Tensor:
        first, (one, other), second = matrix
        return torch.stack(
            ((1 - fraction) * first + mixed * one, fraction * second + mixed * other)
        )

    unit = signals((free, crossed, myelin))
    slopes = []
    for change in changes:
        moved = _congruent(_full(x), _moved(line_slopes, change))
        turn = _moved(pulse_slopes, change)
        both = tuple(y - 2 * m.real for y, m in zip(turn, moved, strict=True))
        left = _times(response, (both[0], both[1], both[2]))
        first, second, third, fourth = (
            -(m + r) for m, r in zip((moved[0], moved[1], moved[1], moved[2]), left, strict=True)
        )
        turned = _in_pools(_times((first, second, third, fourth), inverse), across)
        slope = 2 * t * signals(turned)
        if change.across is not None:
            lean, cross = 0.5 * (free - myelin), 0.5 * (crossed[0] + crossed[1])
            slope = slope + 2 * t * change.across * signals((-cross, (lean, lean), cross))
        if change.tangent is not None:
            slope = slope + 2 * change.tangent * unit
        if change.fraction:
            skewed = (0.5 - f) / mixed
            shares = torch.stack((skewed * crossed[0] - free, skewed * crossed[1] + myelin))
            slope = slope + 2 * t * shares
        slopes.append(slope)
    return 2 * t * unit, slopes


def _line_with_slopes(train: _Train, orders: int) -> tuple[Symmetric, _Slopes]:
    """Return the inverse of X_0 and its derivatives."""
    # What is multiplied by complex numbers at every order is made complex once.
    one, cosine, sine, tan = (
        _complex(real)
        for real in (torch.ones_like(train.tangent), train.cosine, train.sine, train.tangent)
    )
    root = _complex(train.decay[0].sqrt()), _complex(train.decay[2].sqrt())
    decay = root[0] * root[0], root[0] * root[1], root[1] * root[1]
    train = train._replace(decay=decay, cosine=cosine, sine=sine)
    square, inverse = tan * tan, 1 / tan
    echo: Symmetric = one, torch.zeros_like(one), one
    kept = []
    for k in range(orders - 1, 0, -1):
        line = _line(train, k, echo)
        pulse = _pulse(train, k)
        # 1 + T Y and its inverse A; M = A T.
        through = _times(_full(line), _turned(train, *pulse))
        through = through[0] + 1, through[1], through[2], through[3] + 1
        scale = 1 / (through[0] * through[3] - through[1] * through[2])
        passed = (
            through[3] * scale,
            -through[1] * scale,
            -through[2] * scale,
            through[0] * scale,
        )
        m11, m12, _, m22 = _times(passed, line)
        echo = m11, m12, m22
        kept.append((line, pulse, passed, echo))
    first = _line(train, 0, echo)
    nothing = torch.zeros_like(one)
    w11, w12, w22 = first[0] - 1, first[1], first[2] - 1
    lost = [[-2 * w11, -w12, nothing], [nothing, -w12, -2 * w22]]
    rest = [[nothing] * 3 for _ in range(4)]
    below: Matrix = one, nothing, nothing, one
    for k, (line, pulse, passed, echo) in enumerate(reversed(kept), 1):
        turn = _unit((k - 0.5) * train.increment)
        slow, fast = turn * root[0], turn * root[1]
        below = below[0] * slow, below[1] * fast, below[2] * slow, below[3] * fast
        by_pulse = _of_pulse(train, square, inverse, pulse, _times(below, echo))
        for total, part in zip(rest, by_pulse, strict=True):
            total[:] = [a + b for a, b in zip(total, part, strict=True)]
        below = _product(below, passed)
        b11, b12, b21, b22 = below
        u11, u12, u21, u22 = _times(below, (line[0] - 1, line[1], line[2] - 1))
        for total, (b1, b2, u1, u2) in zip(
            lost, ((b11, b21, u11, u21), (b12, b22, u12, u22)), strict=True
        ):
            total[0] = total[0] - 2 * (b1 * u1)
            total[1] = total[1] - (b1 * u2 + b2 * u1)
            total[2] = total[2] - 2 * (b2 * u2)
    slow_rate, fast_rate, between, tangent, slow_loss, fast_loss = (
        (total[0], total[1], total[2]) for total in (*rest, *lost)
    )
    return first, _Slopes((slow_rate, fast_rate), (slow_loss, fast_loss), between, tangent)


def _complex(real: Tensor) -> Tensor:
    return torch.complex(real, torch.zeros_like(real))


def _of_pulse(
    train: _Train, square: Tensor, inverse: Tensor, pulse: tuple[Tensor, Tensor], f: Matrix
) -> tuple[Symmetric, Symmetric, Symmetric, Symmetric]:
    """Return -F (d Y) F^T for the rates of both modes, the angle between modes, and tan(a / 2).

    `square` and `inverse` are of tan(a / 2).
    """
    f11, f12, f21, f22 = f
    s11, s12, s21, s22 = f11 * f11, f12 * f12, f21 * f21, f22 * f22
    whole = s11 + s12, f11 * f21 + f12 * f22, s21 + s22
    along = s11 - s12, f11 * f21 - f12 * f22, s21 - s22
    aside = 2 * (f11 * f12), f11 * f22 + f12 * f21, 2 * (f21 * f22)
    c, s = train.cosine, train.sine
    lean = tuple(c * a + s * b for a, b in zip(along, aside, strict=True))
    cross = tuple(c * b - s * a for a, b in zip(along, aside, strict=True))
    first, second = (-0.5 * _by_rate(square, y) for y in pulse)
    middle, apart = -inverse * (pulse[0] + pulse[1]), -inverse * (pulse[0] - pulse[1])
    turn = 0.5 * (pulse[1] - pulse[0])
    pairs = list(zip(whole, lean, strict=True))
    by_slow = [first * (w + v) for w, v in pairs]
    by_fast = [second * (w - v) for w, v in pairs]
    by_turn = [turn * v for v in cross]
    by_tangent = [middle * w + apart * v for w, v in pairs]
    return (
        (by_slow[0], by_slow[1], by_slow[2]),
        (by_fast[0], by_fast[1], by_fast[2]),
        (by_turn[0], by_turn[1], by_turn[2]),
        (by_tangent[0], by_tangent[1], by_tangent[2]),
    )


def _by_rate(square: Tensor, y: Tensor) -> Tensor:
    """Return the derivative of t^2 (1 + e) / (1 - e) by -log e; `square` is t^2."""
    return 0.5 * (square - y * y / square)


def _first_pulse(train: _Train) -> tuple[Symmetric, _Slopes]:
    """Return Y_0, which is real, and its derivatives."""
    slow, fast = (y.real for y in _pulse(train, 0))
    nothing, square = torch.zeros_like(slow), train.tangent * train.tangent
    none = nothing, nothing, nothing
    half = 0.5 * (slow - fast)
    twice = 2 / train.tangent
    return _turned(train, slow, fast), _Slopes(
        (
            _turned(train, _by_rate(square, slow), nothing),
            _turned(train, nothing, _by_rate(square, fast)),
        ),
        (none, none),
        (-half * train.sine, half * train.cosine, half * train.sine),
        _turned(train, twice * slow, twice * fast),
    )


def _moved(slopes: _Slopes, change: _Change) -> Symmetric:
    """Return how a matrix changes."""
    parts: list[tuple[Symmetric, Tensor | None]] = [
        (slopes.between, change.between),
        (slopes.tangent, change.tangent),
    ]
    if change.stored is not None:
        parts += zip(slopes.stored, change.stored, strict=True)
    if change.lost is not None:
        parts += zip(slopes.lost, change.lost, strict=True)
    used = [(matrix, factor) for matrix, factor in parts if factor is not None]
    first, second, third = (sum(matrix[i] * factor for matrix, factor in used) for i in range(3))
    return first, second, third  # type: ignore[return-value]


def _full(matrix: Symmetric) -> Matrix:
    return matrix[0], matrix[1], matrix[1], matrix[2]


def _times(matrix: Matrix, symmetric: Symmetric) -> Matrix:
    return _product(matrix, _full(symmetric))


def _product(a: Matrix, b: Matrix) -> Matrix:
    return (
        a[0] * b[0] + a[1] * b[2],
        a[0] * b[1] + a[1] * b[3],
        a[2] * b[0] + a[3] * b[2],
        a[2] * b[1] + a[3] * b[3],
    )


def _congruent(a: Matrix, symmetric: Symmetric) -> Symmetric:
    """Return A S A^T."""
    b = _times(a, symmetric)
    return (
        b[0] * a[0] + b[1] * a[1],
        b[0] * a[2] + b[1] * a[3],
        b[2] * a[2] + b[3] * a[3],
    )
