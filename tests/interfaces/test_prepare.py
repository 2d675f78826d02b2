"""Maps that say something about each voxel, read for the preparation of dwi."""

from __future__ import annotations

import numpy as np
import pytest

from bids_gacelle.engine import DwiVolumes
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.prepare import _spread, gradient_tensor
from tests.datasets import SHAPE, write_image

MASK = np.zeros(SHAPE, bool)
MASK[1:3, 2:4, 1:5] = True


@pytest.fixture
def deviations(tmp_path):
    """Matrices L of every voxel, and a function that writes them in the order of HCP."""
    matrices = np.random.default_rng(0).normal(0, 0.05, (*SHAPE, 3, 3))

    def write(values):
        # Matlab's reshape(squeeze(grad_dev(i, j, k, :)), 3, 3) must give the matrix back
        volumes = np.stack([values[..., i, j] for j in range(3) for i in range(3)], axis=-1)
        return str(write_image(tmp_path / "grad_dev.nii.gz", volumes))

    return matrices, write


def test_gradient_deviations_in_the_order_of_hcp(deviations) -> None:
    matrices, write = deviations
    found = gradient_tensor(write(matrices), MASK)
    assert found.shape == (MASK.sum(), 3, 3)
    np.testing.assert_allclose(found, matrices[MASK], atol=1e-6)


def test_gradient_deviations_of_a_known_coil(tmp_path) -> None:
    """The field of the x gradient has a y component: what x drives also points along y."""
    volumes = np.zeros((*SHAPE, 9))
    volumes[..., 0], volumes[..., 1] = 0.02, 0.1  # x gradient: 2 % more along x, 10 % along y
    path = str(write_image(tmp_path / "grad_dev.nii.gz", volumes))
    actual = (np.eye(3) + gradient_tensor(path, MASK)) @ np.array([1, 0, 0])
    np.testing.assert_allclose(actual, np.tile([1.02, 0.1, 0], (MASK.sum(), 1)), atol=1e-6)


def test_gradient_deviations_with_the_identity(deviations) -> None:
    matrices, write = deviations
    whole = matrices + np.eye(3)
    found = gradient_tensor(write(whole.swapaxes(-1, -2)), MASK)  # row by row, as of QSIPrep
    np.testing.assert_allclose(found, matrices[MASK], atol=1e-6)


def test_gradient_deviations_in_percent_are_refused(deviations) -> None:
    matrices, write = deviations
    with pytest.raises(InputError, match=r"If they are percent, divide them by 100"):
        gradient_tensor(write(100 * matrices), MASK)


def test_spread_of_the_b0_images_of_one_echo_time() -> None:
    signal = np.random.default_rng(0).normal(100, 4, (300, 50)).astype(np.float32)
    signal[150:] += 1000
    b = np.zeros(300)
    b[10:20] = 1000
    signal[10:20] = 0
    run = DwiVolumes(signal, b, np.zeros((300, 3)), echo_time=np.repeat([0.07, 0.09], 150))
    assert np.median(_spread(run, 100.0)) == pytest.approx(4, rel=0.05)
    few = DwiVolumes(signal[:3], b[:3], np.zeros((3, 3)))
    assert np.isnan(_spread(few, 100.0)).all()
