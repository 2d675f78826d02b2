"""Gradient directions, and how the diffusion signal depends on them.

The diffusion models give rotational invariants of a shell: the powder average S_0 and, some,
S_2 (spec: S_l = sqrt(sum_m f_lm^2) / sqrt(4 pi (2l+1)) for the coefficients f_lm of orthonormal
spherical harmonics). The signal along a gradient g is here the axially symmetric Gaussian profile
about the fibre direction n,

    S(g) = A exp(-k (g.n)^2),

with A and k chosen voxel by voxel and shell by shell such that its S_0 and S_2 are exactly those
of the model; it is positive everywhere, and its higher orders fall off as those of a tensor do. A
signal cut at l = 2, which has the same invariants, would be negative along white-matter fibres.
A model that has no S_2 gives the same signal in all directions: completely dispersed fibres.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import least_squares
from scipy.special import factorial2

STRENGTH = 8
"""Averages over `spread_directions` are exact for even polynomials up to this degree."""

_MAX_CONCENTRATION = 60.0
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_COSINE = 0.5 * (_NODES + 1)
_P2 = 1.5 * _COSINE**2 - 0.5


@cache
def spread_directions(n: int) -> np.ndarray:
    """Return evenly spread axes that are also a spherical design.

    Starts from a spiral over the hemisphere and moves the points until the means of all monomials
    of degree `STRENGTH` are those of the sphere, so that the plain mean over directions is the
    powder average and a least-squares fit of low-order harmonics has no aliasing.

    Parameters
    ----------
    n
        Number of directions; below about 30 there may be no such arrangement.

    Returns
    -------
    np.ndarray
        Unit vectors (n, 3).

    Raises
    ------
    ValueError
        No such arrangement was found.
    """
    every = product(range(STRENGTH + 1), repeat=3)
    powers = np.array([p for p in every if sum(p) == STRENGTH])
    target = np.array([_monomial_mean(p) for p in powers])

    def vectors(angles: np.ndarray) -> np.ndarray:
        polar, azimuth = angles.reshape(2, n)
        sine = np.sin(polar)
        return np.stack([sine * np.cos(azimuth), sine * np.sin(azimuth), np.cos(polar)], axis=1)

    def residual(angles: np.ndarray) -> np.ndarray:
        return np.mean(np.prod(vectors(angles)[:, None] ** powers, axis=2), axis=0) - target

    height = 1 - (np.arange(n) + 0.5) / n
    spiral = np.concatenate([np.arccos(height), np.arange(n) * np.pi * (3 - np.sqrt(5))])
    solution = least_squares(residual, spiral, xtol=1e-15, ftol=1e-15, gtol=1e-15)
    if np.abs(solution.fun).max() > 1e-9:
        raise ValueError(f"{n} directions cannot be a spherical design of degree {STRENGTH}")
    return vectors(solution.x)


def _monomial_mean(powers: np.ndarray) -> float:
    """Return the mean of x^a y^b z^c over the unit sphere (Folland 2001, Am Math Mon 108:446)."""
    if np.any(powers % 2):
        return 0.0
    odd = np.maximum(powers - 1, 1)  # (-1)!! = 1!! = 1
    return float(np.prod(factorial2(odd)) / factorial2(np.sum(powers) + 1))


def directional_signal(s0: np.ndarray, s2: np.ndarray | None, cosine: np.ndarray) -> np.ndarray:
    """Return the signal of one shell along every gradient, with the given rotational invariants.

    Parameters
    ----------
    s0
        Powder average (voxels,).
    s2
        Second-order invariant (voxels,), at most about half of `s0`; None: no dependence on
        direction.
    cosine
        Between gradient and fibre, (directions, voxels).

    Returns
    -------
    np.ndarray
        (directions, voxels).

    Raises
    ------
    ValueError
        S_2 is larger than any axially symmetric Gaussian of this S_0 has.
    """
    if s2 is None:
        return np.broadcast_to(s0, cosine.shape).copy()
    k = concentration(s2 / s0)
    amplitude = s0 / (np.exp(-k[:, None] * _COSINE**2) @ _WEIGHTS * 0.5)
    return amplitude * np.exp(-k * cosine**2)


def concentration(ratio: np.ndarray) -> np.ndarray:
    """Return the k of exp(-k x^2) whose S_2 / S_0 is `ratio` (any shape), k from 0 to 60."""
    ratios, inverse = _inverse()
    if np.any((ratio < 0) | (ratio > ratios[-1])):
        raise ValueError(
            f"S_2 / S_0 must be within 0 and {ratios[-1]:.3f} for a directional signal; found "
            f"{np.min(ratio):.3g} to {np.max(ratio):.3g}"
        )
    return inverse(ratio)


@cache
def _inverse() -> tuple[np.ndarray, CubicSpline]:
    k = _MAX_CONCENTRATION * np.linspace(0, 1, 2001) ** 2
    profile = np.exp(-k[:, None] * _COSINE**2)
    ratios = -(profile @ (_WEIGHTS * _P2)) / (profile @ _WEIGHTS)
    ratios[0] = 0
    return ratios, CubicSpline(ratios, k)
