"""Averages of magnitudes whose signal differs between directions, near the noise floor."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch

from bids_gacelle.engine.physics import rician
from bids_gacelle.engine.prepare.directions import Estimator

_Float = npt.NDArray[np.floating]

# In units of the noise: beyond, the first term of the expansion is exact to 1e-5.
_FAR = 40.0
_TINY = 1e-30


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


def anisotropic_excess(estimator: Estimator, magnitudes: _Float, sigma: _Float) -> _Float:
    """How far the mean magnitude of a shell is above the expected magnitude of its mean signal.

    sum_i w_i M(S_i) - M(sum_i w_i S_i), with M the Rician mean: M is convex, so that directions
    near the noise floor raise the average, as where fibres are coherent. What is left after it was
    subtracted has the expectation that a model of the average alone predicts.

    The signals S_i come from an SH fit to the magnitudes, the part of each degree shrunk by the
    share of noise in its power (James and Stein), and the inverse of M.

    Parameters
    ----------
    magnitudes : (n, voxels)
    sigma : (voxels,) noise of one channel.

    Returns
    -------
    (voxels,) in units of the magnitudes; 0 where the directions determine no fit.
    """
    if not len(estimator.fit):
        return np.zeros(magnitudes.shape[1])
    level = invert(estimator.mean @ magnitudes, sigma)
    variance = sigma**2 * spread(level, sigma)
    smooth = estimator.fit @ magnitudes
    for degree in range(2, int(estimator.degree[-1]) + 1, 2):
        of_degree = estimator.degree == degree
        power = np.sum(smooth[of_degree] ** 2, axis=0)
        noise = np.sum(estimator.fit[of_degree] ** 2) * variance
        smooth[of_degree] *= np.maximum(1 - noise / np.maximum(power, _TINY), 0)
    signal = invert(np.maximum(estimator.basis @ smooth, 0), sigma)
    mean = np.maximum(estimator.mean @ signal, 0)
    return estimator.mean @ expected(signal, sigma) - expected(mean, sigma)
