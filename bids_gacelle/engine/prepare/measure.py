"""Powder averages and rotational invariants of all voxels, with their noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bids_gacelle.engine.prepare.magnitudes import invert, noise_floor
from bids_gacelle.engine.prepare.noise import Run, describe_noise, noise_of
from bids_gacelle.engine.prepare.prepared import B0Groups, PreparedDwi
from bids_gacelle.engine.prepare.shells import shell_scheme

_Float = npt.NDArray[np.floating]
_Index = npt.NDArray[np.intp]

_SMALLEST_SIGMA = 1e-6  # of S_0 = 1: the rounding of float32 sums; keeps weights finite
_BLOCK_ELEMENTS = 1 << 22


def measure(
    runs: Sequence[Run],
    l_max: int,
    sigma_known: bool,
    bscale: npt.NDArray[np.float32] | None,
    warnings: list[str],
) -> PreparedDwi:
    """Signals and their noise for all voxels, in blocks of bounded memory."""
    voxels = runs[0].signal.shape[1]
    estimators = [estimator for run in runs for estimator in run.estimators]
    orders = range(0, l_max + 1, 2)
    precision = np.array([[e.precision(degree) for e in estimators] for degree in orders]).ravel()
    signals = np.empty((len(precision), voxels), np.float32)
    sigma = np.empty_like(signals)
    group = _groups(runs)
    scale_sigma, b0, b0_mean = np.empty((3, group.max() + 1, voxels), np.float32)
    usable = np.empty(voxels, bool)
    step = max(1, _BLOCK_ELEMENTS // max(run.signal.shape[0] for run in runs))
    for start in range(0, voxels, step):
        block = slice(start, start + step)
        measured = [_measure_run(run, block, l_max, sigma_known) for run in runs]
        values, deviations = (
            np.concatenate([getattr(m, key) for m in measured], axis=1).reshape(len(signals), -1)
            for key in ("values", "deviations")
        )
        references = np.concatenate([m.b0 for m in measured])
        relative = np.concatenate([m.b0_deviations for m in measured])
        good = np.isfinite(values).all(axis=0) & (references > 0).all(axis=0)
        signals[:, block] = np.where(good, values, np.nan)
        sigma[:, block] = np.where(good, np.maximum(deviations, _SMALLEST_SIGMA), np.nan)
        scale_sigma[:, block] = np.where(good, relative, np.nan)
        b0[:, block], usable[block] = references, good
        b0_mean[:, block] = np.concatenate([m.b0_mean for m in measured])
    sigma[precision == 0] = np.inf
    return PreparedDwi(
        signals=signals,
        scheme=shell_scheme(
            [shell for run in runs for shell in run.shells],
            [estimator.effective_number for estimator in estimators],
        ),
        sigma=sigma if sigma_known else None,
        weights=(precision > 0).astype(float) if sigma_known else precision / precision.max(),
        scale_sigma=scale_sigma if sigma_known else None,
        scale_group=np.tile(group, len(orders)),
        b0_groups=B0Groups(b0, b0_mean, *_b0_volumes(runs)),
        usable=usable,
        directions=[shell.directions for run in runs for shell in run.shells],
        bscale=bscale,
        noise_source=describe_noise(runs) if sigma_known else "unknown",
        warnings=warnings,
    )


def _groups(runs: Sequence[Run]) -> _Index:
    """Number of the b=0 group of each shell, counted through all runs."""
    numbers: list[int] = []
    before = 0
    for run in runs:
        numbers += [before + number for number in run.b0_group]
        before += len(run.b0_groups)
    return np.array(numbers, np.intp)


def _b0_volumes(runs: Sequence[Run]) -> tuple[_Index, _Float | None]:
    """Number of volumes and echo time of each b=0 group."""
    count = np.array([len(group) for run in runs for group in run.b0_groups])
    times = [
        next(s.echo_time for s, g in zip(run.shells, run.b0_group, strict=True) if g == number)
        for run in runs
        for number in range(len(run.b0_groups))
    ]
    known = [time for time in times if time is not None]
    return count, np.array(known) if len(known) == len(times) else None


class _Measured(NamedTuple):
    """A block: (orders, shells, voxels), and (groups, voxels) of the b=0 means, relative SDs."""

    values: _Float
    deviations: _Float
    b0: _Float
    b0_mean: _Float
    b0_deviations: _Float


def _measure_run(run: Run, block: slice, l_max: int, sigma_known: bool) -> _Measured:
    y = run.signal[:, block].astype(np.float64)
    values = np.zeros((l_max // 2 + 1, len(run.shells), y.shape[1]))
    deviations = np.zeros_like(values)
    number = np.array([len(group) for group in run.b0_groups])[:, None]
    floor = run.magnitudes and sigma_known
    # Infinities and zeros in the background are expected; they end as "not usable".
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        noise = noise_of(run, y, block) if sigma_known else np.zeros(y.shape[1])
        means = np.stack([y[group].mean(axis=0) for group in run.b0_groups])
        references = invert(means, noise) if floor else means
        b0 = references[run.b0_group]
        for i, (shell, estimator) in enumerate(zip(run.shells, run.estimators, strict=True)):
            x = y[shell.volumes] / b0[i]
            sd = noise / b0[i]
            values[0, i] = estimator.mean @ x
            deviations[0, i] = sd * np.sqrt(np.sum(estimator.mean**2))
            for degree in range(2, estimator.top + 1, 2):
                measured = _invariant(estimator.coefficients(degree), x, degree, sd)
                values[degree // 2, i], deviations[degree // 2, i] = measured
            if floor:
                excess, rise, slope = noise_floor(estimator, x, sd)
                values[0, i] -= excess
                if estimator.top >= 2:  # S_4, of finer detail, does not gain by it
                    s2, deviation = _invariant(estimator.coefficients(2), x - rise, 2, sd)
                    values[1, i], deviations[1, i] = s2, deviation / slope
        relative = noise / references / np.sqrt(number)
        return _Measured(values, deviations, references, means, relative)


def _invariant(matrix: _Float, x: _Float, degree: int, sd: _Float) -> tuple[_Float, _Float]:
    """S_l of each voxel without the power of noise, and its standard deviation.

    f = matrix x has the noise covariance C sd^2 with C = matrix matrix^T. Noise adds tr(C) sd^2 to
    the power |f|^2, of which the root, being concave, takes back u^T C u sd^2 with u = f/|f|. So
    the difference of both is subtracted, and S_l is unbiased to second order. Below 0 the root
    keeps the sign: that alone makes averages over shells right where there is no anisotropy.

    The power varies by var P = 4 sd^2 f^T C f + 2 sd^4 tr(C^2) with the noise-free f; the standard
    deviation is half the difference of the roots of P + sd(P) and P - sd(P), which also holds
    where P is near 0.
    """
    f = matrix @ x
    scale = 4 * np.pi * (2 * degree + 1)
    covariance = matrix @ matrix.T
    power = np.sum(f**2, axis=0)
    along = np.sum(f * (covariance @ f), axis=0)
    kept = np.where(power > 0, along / np.where(power > 0, power, 1.0), 0.0)
    power = power - (np.trace(covariance) - kept) * sd**2
    least = 2 * sd**4 * np.sum(covariance**2)
    spread = np.sqrt(np.maximum(4 * sd**2 * along - least, least))
    deviation = (_signed_root(power + spread) - _signed_root(power - spread)) / 2
    return _signed_root(power) / np.sqrt(scale), deviation / np.sqrt(scale)


def _signed_root(values: _Float) -> _Float:
    return np.copysign(np.sqrt(np.abs(values)), values)
