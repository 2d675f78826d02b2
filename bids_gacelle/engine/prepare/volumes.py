"""Diffusion-weighted volumes as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class DwiVolumes:
    """One dwi run as arrays.

    Parameters
    ----------
    signal : (volumes, voxels), any unit.
    bval : (volumes,) in s/mm^2.
    bvec : (volumes, 3); the frame does not matter (with gradient deviations: theirs), the length
        is normalised.
    big_delta, small_delta : (volumes,) in ms, or None when unknown.
    echo_time : (volumes,) in s, or None when unknown (then taken as constant).
    """

    signal: npt.NDArray[np.float32]
    bval: npt.NDArray[np.floating]
    bvec: npt.NDArray[np.floating]
    big_delta: npt.NDArray[np.floating] | None = None
    small_delta: npt.NDArray[np.floating] | None = None
    echo_time: npt.NDArray[np.floating] | None = None
