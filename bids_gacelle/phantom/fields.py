"""Seeded random numbers and smooth random fields."""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, *labels: object) -> np.random.Generator:
    """Return a generator that depends on the seed and on what it is for, and on nothing else.

    So one more contrast, subject or session leaves the numbers of the others as they were.
    """
    purpose = "/".join(str(label) for label in labels)
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def smooth_field(
    points: np.ndarray, rng: np.random.Generator, wavelength: tuple[float, float] = (60.0, 160.0)
) -> np.ndarray:
    """Return a low-frequency random field: zero mean, about unit variance, within +-2.

    A sum of eight plane waves (random Fourier features), squeezed by tanh so that a parameter
    built on it has known bounds.

    Parameters
    ----------
    points
        (..., 3), mm.
    rng
        Decides directions, phases and wavelengths of the waves.
    wavelength
        Range of wavelengths, mm.

    Returns
    -------
    np.ndarray
        float64 (...).
    """
    waves = 8
    direction = rng.normal(size=(waves, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    k = 2 * np.pi / rng.uniform(*wavelength, size=(waves, 1)) * direction
    phase = rng.uniform(0, 2 * np.pi, waves)
    field = np.zeros(points.shape[:-1])
    for number, offset in zip(k, phase, strict=True):
        field += np.cos(points @ number + offset)
    return 2 * np.tanh(field * np.sqrt(2 / waves) / 2)
