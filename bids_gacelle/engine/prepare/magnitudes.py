"""Averages of magnitudes whose signal differs between directions, near the noise floor."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from bids_gacelle.engine.physics import rician
from bids_gacelle.engine.prepare.directions import Estimator

_Float = npt.NDArray[np.floating]

# In units of the noise: beyond, the first term of the expansion is exact to 1e-5.
_FAR = 40.0
_TINY = 1e-30
# Of expected magnitudes by signals; what is as flat as that tells next to nothing.
_LEAST_SLOPE = 0.25
# Directions for each SH coefficient at which a fit needs no penalty.
_SPARE = 1.5


@functools.cache
def _table() -> tuple[_Float, _Float]:
    """Signals and their expected magnitudes, in units of the noise."""
    signal = np.linspace(0, _FAR, 8001)
    mean, _ = rician.mean(torch.from_numpy(signal), torch.ones(1, dtype=torch.float64))
    return signal, mean.numpy()


def expected(signal: _Float, sigma: _Float) -> _Float:
    """Mean of the Rice distribution of signals >= 0 with noise of SD sigma."""
    x, mean = _table()
    sigma = np.maximum(sigma, _TINY)
    z = signal / sigma
    far = signal + sigma**2 / (2 * np.maximum(signal, sigma))
    return np.where(z < _FAR, sigma * np.interp(z, x, mean), far)


def slope(signal: _Float, sigma: _Float) -> _Float:
    """Derivative of `expected` by the signal, from 0 without signal to 1."""
    x, mean = _table()
    z = np.minimum(signal / np.maximum(sigma, _TINY), _FAR)
    return np.interp(z, x, np.gradient(mean, x))


def invert(magnitude: _Float, sigma: _Float) -> _Float:
    """Signal whose expected magnitude is given; 0 at the noise floor and below."""
    x, mean = _table()
    sigma = np.maximum(sigma, _TINY)
    far = magnitude - sigma**2 / (2 * np.maximum(magnitude, sigma))
    return np.where(
        magnitude / sigma < mean[-1], sigma * np.interp(magnitude / sigma, mean, x), far
    )


def spread(signal: _Float, sigma: _Float) -> _Float:
    """Variance of a magnitude relative to sigma^2, from 2 - pi/2 without signal to 1."""
    z = np.minimum(signal / np.maximum(sigma, _TINY), _FAR)
    return 2 + z**2 - expected(z, np.ones(1)) ** 2


class NoiseFloor(NamedTuple):
    """What noise does to the magnitudes of a shell.

    Attributes
    ----------
    excess
        (voxels,) how far the mean magnitude is above the expected magnitude of the mean signal.
    rise
        (n, voxels) how far the expected magnitude of each direction is above its signal.
    slope
        (voxels,) share of the contrast between directions that magnitudes keep.
    """

    excess: _Float
    rise: _Float
    slope: _Float


def noise_floor(estimator: Estimator, magnitudes: _Float, sigma: _Float) -> NoiseFloor:
    """Estimate what noise does to the magnitudes of a shell.

    The excess is sum_i w_i M(S_i) - M(sum_i w_i S_i), with M the Rician mean: M is convex, so that
    directions near the noise floor raise the average, as where fibres are coherent. What is left
    after it was subtracted has the expectation that a model of the average alone predicts. The
    rise is M(S_i) - S_i, the slope sum_i w_i M'(S_i).

    The signals S_i come from an SH fit to the magnitudes, the part of each degree shrunk by the
    share of noise in its power (James and Stein), and the inverse of M. A fit that is shrunk
    already would put the weakest directions of coherent fibres too low.

    Parameters
    ----------
    magnitudes : (n, voxels)
    sigma : (voxels,) noise of one channel.

    Returns
    -------
    In units of the magnitudes; excess and rise are 0 where the directions determine no fit.
    """
    if not len(estimator.fit):
        none = np.zeros_like(magnitudes)
        return NoiseFloor(none.sum(axis=0), none, np.ones_like(sigma))
    level = invert(estimator.mean @ magnitudes, sigma)
    variance = sigma**2 * spread(level, sigma)
    fit = _unshrunk(estimator)
    smooth = fit @ magnitudes
    for degree in range(2, int(estimator.degree[-1]) + 1, 2):
        of_degree = estimator.degree == degree
        power = np.sum(smooth[of_degree] ** 2, axis=0)
        noise = np.sum(fit[of_degree] ** 2) * variance
        smooth[of_degree] *= np.maximum(1 - noise / np.maximum(power, _TINY), 0)
    signal = invert(np.maximum(estimator.basis @ smooth, 0), sigma)
    raised = expected(signal, sigma)
    mean = np.maximum(estimator.mean @ signal, 0)
    return NoiseFloor(
        excess=estimator.mean @ raised - expected(mean, sigma),
        rise=raised - signal,
        slope=np.maximum(estimator.mean @ slope(signal, sigma), _LEAST_SLOPE),
    )


def _unshrunk(estimator: Estimator) -> _Float:
    """Return the SH fit without penalty where there are directions enough for it, (k, n)."""
    n, k = estimator.basis.shape
    return np.linalg.pinv(estimator.basis) if n >= _SPARE * k else estimator.fit
