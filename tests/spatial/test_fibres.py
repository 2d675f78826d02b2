"""Angles of fibres to the main field."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bids_gacelle.spatial.fibres import fibre_angles, folded

RANDOM = np.random.default_rng(0)
FIBRES = RANDOM.normal(size=(50, 3))
TRUE = np.arctan2(np.hypot(FIBRES[:, 0], FIBRES[:, 1]), np.abs(FIBRES[:, 2]))


def test_vectors_along_the_axes_of_the_scanner() -> None:
    np.testing.assert_allclose(fibre_angles(FIBRES, np.diag([2, 2, 3, 1]), "xyz"), TRUE)


@pytest.mark.parametrize("mirrored", [False, True])
def test_vectors_along_the_voxels_of_an_oblique_image(mirrored) -> None:
    """Those of voxels and of FSL, made from a fibre in the scanner by the axes of the image."""
    axes = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()
    if mirrored:
        axes[:, 0] *= -1
    affine = np.eye(4)
    affine[:3, :3] = axes * [1.0, 1.5, 4.0]
    vectors = FIBRES @ axes  # components along the axes of the voxels
    np.testing.assert_allclose(fibre_angles(vectors, affine, "ijk"), TRUE, atol=1e-12)
    if not mirrored:
        vectors[:, 0] *= -1
    np.testing.assert_allclose(fibre_angles(vectors, affine, "bvec"), TRUE, atol=1e-12)


def test_no_fibre_has_no_angle() -> None:
    assert np.isnan(fibre_angles(np.zeros((1, 3)), np.eye(4), "xyz")).all()


def test_angles_are_folded() -> None:
    given = np.array([0.1, np.pi - 0.1, np.pi + 0.1, -0.1, np.pi / 2])
    np.testing.assert_allclose(folded(given), [0.1, 0.1, 0.1, 0.1, np.pi / 2])
