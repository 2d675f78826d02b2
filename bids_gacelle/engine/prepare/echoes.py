"""What the magnitudes of gradient echoes say before a fit: weights, plausibility, noise."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.prepare.gre import Demodulated
from bids_gacelle.engine.scheme import GradientEchoScheme

_Float = npt.NDArray[np.floating]
_Bool = npt.NDArray[np.bool_]

LONGEST_T1 = 3.1
"""s; beyond, a voxel is fluid or noise."""

SLOWEST_R2STAR = 2.0
"""1/s; below, a voxel is fluid or noise."""

RULES = {
    "first-echo": "a first echo that is not positive",
    "r2star": f"R2* below {SLOWEST_R2STAR:g} 1/s",
    "t1": f"no T1 (DESPOT1) between 0 and {LONGEST_T1:g} s",
}
"""Rules of plausibility, and what breaks them."""

_TINY = np.finfo(np.float32).tiny
_FEWEST = 500  # values that tell a noise level
_FEWEST_ECHOES = 3
# Quartiles of a Rayleigh distribution over sigma, and how far their ratio may be off.
_MEDIAN, _QUARTILES, _TOLERANCE = np.sqrt(2 * np.log(2)), np.sqrt(np.log(4) / np.log(4 / 3)), 0.1


def first_echo_weights(
    magnitudes: _Float, scheme: GradientEchoScheme, power: float
) -> npt.NDArray[np.float32]:
    """Return (|S_TE| / |S_TE1|)^power of each image, with TE1 the first echo of its excitation.

    Early echoes, where the signals of short components still are, then count for more.

    Parameters
    ----------
    magnitudes
        (images, voxels)
    power
        At least 0; 0 weighs all echoes alike.

    Returns
    -------
    (images, voxels), from 0 to 1; 1 for all images of an excitation without a first echo.
    """
    if not power >= 0:
        raise EngineError(f"The power of the weights is {power}; give a number of at least 0.")
    weights = np.ones(magnitudes.shape, np.float32)
    for rows in _trains(scheme):
        first = np.nan_to_num(np.abs(magnitudes[rows[0]]))
        ratio = np.abs(magnitudes[rows]) / np.maximum(first, _TINY)
        weights[rows] = np.where(first > 0, np.clip(np.nan_to_num(ratio), 0, 1) ** power, 1.0)
    return weights


def implausible(
    magnitudes: _Float,
    scheme: GradientEchoScheme,
    rules: tuple[str, ...],
    b1: _Float | None = None,
) -> dict[str, _Bool]:
    """Return the voxels that break each rule, from closed forms.

    R2* is (S_1 - S_n) over the integral of the echoes (trapezoids), numerator and denominator
    summed over excitations; T1 is the linear DESPOT1 estimate (Deoni et al. 2003) from the echoes
    extrapolated to TE = 0 with it, at the mean repetition time where several differ.

    Parameters
    ----------
    magnitudes
        (images, voxels)
    rules
        Some of `RULES`.
    b1
        (voxels,) relative transmit field; voxels where it is NaN break no rule of T1.

    Returns
    -------
    (voxels,) by rule, but for rules that the acquisition cannot tell of.
    """
    trains = _trains(scheme)
    first = magnitudes[[rows[0] for rows in trains]].astype(np.float64)
    found: dict[str, _Bool] = {}
    if "first-echo" in rules:
        found["first-echo"] = np.logical_or.reduce(~(first > 0))
    several = [rows for rows in trains if len(rows) > 1]
    rate = np.zeros(magnitudes.shape[1])
    if several and scheme.echo_time is not None:
        fall, area = np.zeros_like(rate), np.zeros_like(rate)
        for rows in several:
            train, time = magnitudes[rows].astype(np.float64), scheme.echo_time[rows]
            fall += train[0] - train[-1]
            area += ((train[1:] + train[:-1]) / 2 * np.diff(time)[:, None]).sum(axis=0)
        rate = fall / np.maximum(area, _TINY)
        if "r2star" in rules:
            found["r2star"] = ~(rate >= SLOWEST_R2STAR)
    angles = None if scheme.flip_angle is None else scheme.flip_angle[[r[0] for r in trains]]
    if "t1" in rules and angles is not None and len(set(angles)) > 1:
        if scheme.echo_time is not None:
            start = scheme.echo_time[[rows[0] for rows in trains]]
            first = first * np.exp(np.clip(rate * start[:, None], -10, 10))
        t1 = _despot1(first, scheme, [rows[0] for rows in trains], b1)
        broken = ~((t1 > 0) & (t1 <= LONGEST_T1))
        found["t1"] = broken if b1 is None else broken & np.isfinite(b1)
    return found


def background_sigma(air: _Float) -> float | None:
    """Return the noise of one channel from magnitudes without signal; None if they are not that.

    The median of a Rayleigh distribution is sigma sqrt(2 ln 2). Magnitudes of several coils, or
    of a background that was masked or filtered, have another ratio of their quartiles and tell
    nothing.

    Parameters
    ----------
    air
        Magnitudes of any shape.
    """
    values = air[np.isfinite(air) & (air > 0)]
    if values.size < max(_FEWEST, 0.9 * air.size):
        return None
    low, middle, high = np.quantile(values.astype(np.float64), (0.25, 0.5, 0.75))
    if not low > 0 or abs(high / low / _QUARTILES - 1) > _TOLERANCE:
        return None
    return float(middle / _MEDIAN)


def scatter_sigma(demodulated: Demodulated, scheme: GradientEchoScheme) -> float | None:
    """Return the noise of one channel from the imaginary parts of demodulated echoes.

    Small errors of field and phase put |S_j| (a + b TE_j) there, several pools of water what is
    smooth over the echoes too. Regressions on |S_j| times polynomials, of up to the third degree
    where there are enough echoes, leave noise. The median over voxels of the mean square, over
    that of chi-square; None where there are too few.
    """
    n, squares, degrees = len(scheme), np.zeros(demodulated.signals.shape[1]), 0
    for rows in _trains(scheme):
        if len(rows) < _FEWEST_ECHOES or scheme.echo_time is None:
            continue
        imaginary = demodulated.signals[n + rows].astype(np.float64)
        level = np.hypot(demodulated.signals[rows], imaginary)
        time = scheme.echo_time[rows][:, None] / scheme.echo_time[rows].max()
        order = min(3, len(rows) // 3)
        regressors: list[_Float] = []
        for power in range(order + 1):  # each made orthogonal to those before
            new = level * time**power
            for other in regressors:
                new = new - other * _share(new, other)
            regressors.append(new)
            imaginary = imaginary - new * _share(imaginary, new)
        squares += (imaginary**2).sum(axis=0)
        degrees += len(rows) - order - 1
    known = squares[np.isfinite(squares) & (squares > 0)]
    if not degrees or known.size * degrees < _FEWEST:
        return None
    # median of chi-square (Wilson and Hilferty 1931)
    return float(np.sqrt(np.median(known) / (degrees * (1 - 2 / (9 * degrees)) ** 3)))


def _share(values: _Float, regressor: _Float) -> _Float:
    """Return the coefficient (voxels,) of a regression through the origin, over the first axis."""
    return np.asarray(
        (values * regressor).sum(axis=0) / np.maximum((regressor**2).sum(axis=0), _TINY)
    )


def _trains(scheme: GradientEchoScheme) -> list[npt.NDArray[np.intp]]:
    """Return the images of each excitation, by echo time."""
    numbers, values = scheme.excitations()
    time = np.zeros(len(scheme)) if scheme.echo_time is None else scheme.echo_time
    order = np.argsort(time, kind="stable")
    return [order[numbers[order] == g] for g in range(len(values))]


def _despot1(
    signals: _Float, scheme: GradientEchoScheme, rows: list[np.intp], b1: _Float | None
) -> _Float:
    """Return T1 (voxels,) in s from a signal for each flip angle; NaN where there is none."""
    if scheme.flip_angle is None or scheme.repetition_time is None:
        raise EngineError("T1 needs flip angles and repetition times.")
    angle = np.deg2rad(scheme.flip_angle[rows])[:, None] * (1.0 if b1 is None else b1)
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = signals / np.tan(angle), signals / np.sin(angle)
        dx = x - x.mean(axis=0)
        slope = (dx * y).sum(axis=0) / (dx * dx).sum(axis=0)
        magnetisation = y.mean(axis=0) - slope * x.mean(axis=0)
        good = (slope > 0) & (slope < 1) & (magnetisation >= 0)
        t1 = -float(scheme.repetition_time[rows].mean()) / np.log(np.where(good, slope, np.nan))
    return np.asarray(t1)
