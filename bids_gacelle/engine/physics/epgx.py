"""Steady states of gradient- and RF-spoiled pulse trains in two exchanging pools.

A pulse train whose phase grows quadratically, by n times the increment D from pulse n - 1 to pulse
n, has a steady state in which the phase that gradients add between two pulses, u, and the number
of the pulse come in as u - n D only. Its Fourier series in u, whose terms are the configurations,
then obeys a recurrence that joins neighbouring orders k alone: a configuration of order k finds
its own past turned by k D. This is solved here from a high order down, by a continued fraction of
2x2 matrices (one row per pool). With E1 and E2 the decays with exchange within TR, t = tan(a / 2),

    Y_k = t^2 (1 + E1 e^{ikD}) (1 - E1 e^{ikD})^-1,
    X_k = [1 - e^{i(2k+1)D} E2 (1 - (X_{k+1} + Y_{k+1})^-1) E2]^-1,
    S   = 2 t X_0 (X_0 + X_0^* - 1 + Y_0)^-1 M0.

The pulse is a lumped element in a line on which states of order k run to k + 1 and, in the
complex conjugate, back: Y_k is its impedance, and 1 - (X_k + Y_k)^-1 the echo that the line sends
back from order k on. It fades by E2 on either way, so that leaving out the orders from K on
changes the result by less than about exp(-2 K TR R2). With no echo at all, X = 1 and S is the
ideally spoiled steady state.

All matrices are symmetric for magnetisations over the square root of their equilibrium.

References
----------
Ganter, Magn. Reson. Med. 55, 98 (2006), for one pool; Malik et al., Magn. Reson. Med. 80, 767
(2018), for the configurations of exchanging pools.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.physics.two_pools import Modes, exchange_modes

Symmetric = tuple[Tensor, Tensor, Tensor]  # entries 11, 12, 22


class _Train(NamedTuple):
    """What the recurrence needs of each case, in the eigenmodes of the transverse relaxation."""

    decay: Symmetric  # products of E2 of both modes
    stored: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # E1 and 1 - E1 of both modes
    cosine: Tensor  # of twice the angle between the longitudinal and the transverse modes
    sine: Tensor
    tangent: Tensor  # tan(a / 2)
    increment: float  # in radian


def spoiled_steady_state(
    fraction: Tensor,
    r1_free: Tensor,
    r2_free: Tensor,
    r1_myelin: Tensor,
    r2_myelin: Tensor,
    exchange: Tensor,
    tr: Tensor,
    angle: Tensor,
    increment: float,
    tolerance: float = 1e-6,
    orders: int | None = None,
    block: int = 8192,
) -> tuple[Tensor, Tensor]:
    """Steady state of two exchanging pools with RF and gradient spoiling (EPG-X).

    Parameters
    ----------
    fraction
        f, share of the myelin pool, 0 to 1.
    r1_free, r2_free, r1_myelin, r2_myelin
        Relaxation rates in 1/s.
    exchange
        k, rate from the free to the myelin pool in 1/s, of longitudinal and transverse states.
    tr
        Repetition time in s. Gradients between two pulses dephase by whole turns over a voxel.
    angle
        Actual flip angle in radian, below pi.
    increment
        Increment of the RF phase in degrees.
    tolerance
        Error due to the orders left out, of unit equilibrium magnetisation. It sets their number
        case by case.
    orders
        This many orders for all cases instead. No value is looked at then, as `torch.func.vmap`
        asks for; `truncation_order` says how many it takes.
    block
        Cases that are worked on at once.

    Returns
    -------
    free, myelin
        Complex transverse magnetisation right after the pulse, of the broadcast shape, for unit
        equilibrium (1 - f, f). The phase is that to the axis on which ideal spoiling would leave
        all magnetisation, with the RF phase taken off.
    """
    cases = torch.broadcast_tensors(
        fraction, r1_free, r2_free, r1_myelin, r2_myelin, exchange, tr, angle
    )
    shape = cases[0].shape
    flat = torch.stack([case.reshape(-1) for case in cases])
    if orders is not None:
        free, myelin = _steady_state(flat, increment, orders)
        return free.reshape(shape), myelin.reshape(shape)
    # Cases are put together by their number of orders, so that none depends on its neighbours.
    f, _, r2_f, _, r2_m, k, time, _ = flat.detach()
    needed = truncation_order(f, r2_f, r2_m, k, time, tolerance)
    order = torch.argsort(needed)
    parts = [
        _steady_state(flat[:, index], increment, int(needed[index[0]]))
        for same in order.split(needed.unique(return_counts=True)[1].tolist())
        for index in same.split(block)
    ]
    back = torch.argsort(order)
    free, myelin = (torch.cat(pool)[back].reshape(shape) for pool in zip(*parts, strict=True))
    return free, myelin


def truncation_order(
    fraction: Tensor,
    r2_free: Tensor,
    r2_myelin: Tensor,
    exchange: Tensor,
    tr: Tensor,
    tolerance: float = 1e-6,
) -> Tensor:
    """Return how many orders each case needs, rounded up to about a power of 2^(1/4).

    Echoes of higher orders than that are below the tolerance. As pulses weaken them too, what is
    really lost is usually ten times less or better.
    """
    slow = exchange_modes(fraction, r2_free, r2_myelin, exchange).slow
    bound = (-math.log(tolerance) / (2 * tr * slow)).clamp_min(1)
    return torch.ceil(2 ** (torch.ceil(4 * torch.log2(bound)) / 4)).long()


def _steady_state(flat: Tensor, increment: float, orders: int) -> tuple[Tensor, Tensor]:
    fraction, r1_free, r2_free, r1_myelin, r2_myelin, exchange, tr, angle = flat
    along = exchange_modes(fraction, r1_free, r1_myelin, exchange)
    across = exchange_modes(fraction, r2_free, r2_myelin, exchange)
    train = _train(along, across, tr, angle, increment)
    x11, x12, x22 = _inverse(_line(train, 0, _last(train, orders)))
    y11, y12, y22 = (y.real for y in _turned(train, *_pulse(train, 0)))
    v11, v12, v22 = _inverse((2 * x11.real - 1 + y11, 2 * x12.real + y12, 2 * x22.real - 1 + y22))
    response = (
        x11 * v11 + x12 * v12,
        x11 * v12 + x12 * v22,
        x12 * v11 + x22 * v12,
        x12 * v12 + x22 * v22,
    )
    free, crossed, myelin = _in_pools(response, across)
    mixed = torch.sqrt(fraction * (1 - fraction))
    twice = 2 * train.tangent
    return (
        twice * ((1 - fraction) * free + mixed * crossed[0]),
        twice * (fraction * myelin + mixed * crossed[1]),
    )


def _train(along: Modes, across: Modes, tr: Tensor, angle: Tensor, increment: float) -> _Train:
    slow, fast = tr * across.slow, tr * (across.slow + across.spread)
    stored = tr * along.slow, tr * (along.slow + along.spread)
    first, second = ((torch.exp(-rate), -torch.expm1(-rate)) for rate in stored)
    return _Train(
        decay=(torch.exp(-2 * slow), torch.exp(-slow - fast), torch.exp(-2 * fast)),
        stored=(first, second),
        cosine=along.cosine * across.cosine + along.sine * across.sine,
        sine=along.sine * across.cosine - along.cosine * across.sine,
        tangent=torch.tan(0.5 * angle),
        increment=math.radians(increment),
    )


def _last(train: _Train, orders: int) -> Symmetric:
    """Return (X_1 + Y_1)^-1, with no echo from `orders` on."""
    one = torch.ones_like(train.tangent)
    echo = one, torch.zeros_like(one), one
    for k in range(orders - 1, 0, -1):
        t11, t12, t22 = line = _line(train, k, echo)
        y11, y12, y22 = _turned(train, *_pulse(train, k))
        # (T^-1 + Y)^-1 of 2x2 matrices, with one division.
        det = _det(line)
        scale = 1 / (1 + t11 * y11 + 2 * t12 * y12 + t22 * y22 + det * _det((y11, y12, y22)))
        echo = (t11 + det * y22) * scale, (t12 - det * y12) * scale, (t22 + det * y11) * scale
    return echo


def _line(train: _Train, k: int, echo: Symmetric) -> Symmetric:
    """Return the inverse of X_k from (X_{k+1} + Y_{k+1})^-1."""
    turn = _unit((2 * k + 1) * train.increment)
    slow, both, fast = train.decay
    return (
        1 - (turn * slow) * (1 - echo[0]),
        (turn * both) * echo[1],
        1 - (turn * fast) * (1 - echo[2]),
    )


def _unit(phase: float) -> complex:
    return complex(math.cos(phase), math.sin(phase))


def _pulse(train: _Train, k: int) -> tuple[Tensor, Tensor]:
    """Return Y_k of both longitudinal modes."""
    sine, half = math.sin(k * train.increment), math.sin(0.5 * k * train.increment)
    square = train.tangent * train.tangent
    values = []
    for e, recovered in train.stored:
        scale = square / (recovered * recovered + (4 * half**2) * e)
        values.append(torch.complex(scale * (recovered * (1 + e)), scale * ((2 * sine) * e)))
    return values[0], values[1]


def _turned(train: _Train, slow: Tensor, fast: Tensor) -> Symmetric:
    """Turn a matrix that is diagonal in the longitudinal modes to the transverse ones."""
    middle, apart = 0.5 * (slow + fast), 0.5 * (slow - fast)
    lean = apart * train.cosine
    return middle + lean, apart * train.sine, middle - lean


def _det(matrix: Symmetric) -> Tensor:
    return matrix[0] * matrix[2] - matrix[1] * matrix[1]


def _inverse(matrix: Symmetric) -> Symmetric:
    scale = 1 / _det(matrix)
    return matrix[2] * scale, -matrix[1] * scale, matrix[0] * scale


def _in_pools(
    matrix: tuple[Tensor, Tensor, Tensor, Tensor], modes: Modes
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Turn a matrix from the modes to the pools; sqrt-free, as only twice the angle comes in."""
    m11, m12, m21, m22 = matrix
    middle, skew = 0.5 * (m11 + m22), 0.5 * (m12 - m21)
    lean, cross = 0.5 * (m11 - m22), 0.5 * (m12 + m21)
    lean, cross = (
        lean * modes.cosine - cross * modes.sine,
        lean * modes.sine + cross * modes.cosine,
    )
    return middle + lean, (cross + skew, cross - skew), middle - lean
