"""Angles between fibres and the main magnetic field."""

from __future__ import annotations

from typing import Literal, get_args

import nibabel as nib
import numpy as np
import numpy.typing as npt

_Float = npt.NDArray[np.floating]

Axes = Literal["xyz", "ijk", "bvec"]
"""What components of vectors are along, by the names that BIDS has for it: the axes of the scanner
(x to the right, y to the front), those of the voxels, or those with the first one mirrored where
the affine is right-handed, as FSL has them."""

AXES: tuple[Axes, ...] = get_args(Axes)


def fibre_angles(vectors: _Float, affine: _Float, along: Axes) -> _Float:
    """Angles in rad of fibres to the main field along z of the scanner, from 0 to pi/2.

    Parameters
    ----------
    vectors : (..., 3) of any length and either sign.
    affine : of their image.
    along : what their components are along.

    Returns
    -------
    (...), NaN for vectors of no length.
    """
    field = np.array([0.0, 0.0, 1.0])
    if along != "xyz":
        axes = affine[:3, :3] / nib.affines.voxel_sizes(affine)
        mirrored = along == "bvec" and np.linalg.det(axes) > 0
        field = axes[2] * np.array([-1.0 if mirrored else 1.0, 1.0, 1.0])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.abs(vectors @ field) / np.linalg.norm(vectors, axis=-1)
    return np.asarray(np.arccos(np.clip(cosine, 0, 1)))


def folded(angles: _Float) -> _Float:
    """Angles in rad brought to 0 to pi/2: the two ends of a fibre are alike."""
    turned = np.mod(angles, np.pi)
    return np.asarray(np.minimum(turned, np.pi - turned))
