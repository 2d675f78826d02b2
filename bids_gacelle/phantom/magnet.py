"""The static magnetic field in the head and the phase that images start from."""

from __future__ import annotations

import numpy as np

from bids_gacelle.phantom.anatomy import Anatomy
from bids_gacelle.phantom.fields import smooth_field, stream

GYROMAGNETIC_RATIO = 42.57747892
"""Of hydrogen nuclei, in MHz/T."""

# Air that shimming leaves the field of: centre in MNI mm, radius in mm.
_CAVITIES = (((0, 52, -44), 14.0), ((-58, -22, -46), 9.0), ((58, -22, -46), 9.0))
_SUSCEPTIBILITY_PPM = 9.4  # of air less that of tissue
_RIPPLE_PPM = 0.07
_DRIFT_PPM = 0.006
_LARGEST_PPM = 0.9


def static_field(anatomy: Anatomy, *, subject: int, session: int, seed: int) -> np.ndarray:
    """Return how much the static field differs from its nominal value.

    The field of three spheres of air, nasal sinus and both ear canals (the dipoles outside of a
    sphere, with the static field along the z axis of the scanner), on what shimming leaves of
    smooth variation: some tens of Hz at 3 T, up to about 100 Hz near the sinus.

    Returns
    -------
    np.ndarray
        float64 (x, y, z) in ppm.
    """
    ripple = smooth_field(anatomy.mni, stream(seed, subject, session, "B0"), (120.0, 260.0))
    field = _RIPPLE_PPM * ripple
    for centre, radius in _CAVITIES:
        away = anatomy.mni - centre
        distance = np.maximum(np.linalg.norm(away, axis=-1), radius)
        cosine = away[..., 2] / distance
        dipole = (radius / distance) ** 3 * (3 * cosine**2 - 1)
        field += _SUSCEPTIBILITY_PPM / 3 * dipole
    return _LARGEST_PPM * np.tanh(field / _LARGEST_PPM)


def drift(images: int, *, subject: int, session: int, seed: int) -> np.ndarray:
    """Return the change of the field from scan to scan in ppm, float64 (images,), the first 0."""
    steps = stream(seed, subject, session, "drift").normal(0, _DRIFT_PPM, images)
    steps[0] = 0
    return np.cumsum(steps)


def initial_phase(anatomy: Anatomy, *, subject: int, session: int, seed: int) -> np.ndarray:
    """Return the phase at an echo time of 0 (of receive and transmit coils) in radian.

    Returns
    -------
    np.ndarray
        float64 (x, y, z), smooth, within -2.4 and 2.4.
    """
    rng = stream(seed, subject, session, "initial phase")
    return 1.2 * smooth_field(anatomy.mni, rng, (150.0, 400.0))
