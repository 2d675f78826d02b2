"""Maps of voxel inputs come to the grid of the images, whatever their own."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.bids.series import B1Map, Series, VoxelMap
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.voxel_maps import voxel_inputs, without_value
from tests.datasets import AFFINE, SHAPE, write_image, write_json

REFERENCE = nib.Nifti1Image(np.zeros(SHAPE, np.float32), AFFINE)
PLACE = np.indices(SHAPE).transpose(1, 2, 3, 0) @ AFFINE[:3, :3].T + AFFINE[:3, 3]


def read(folder, data, affine=AFFINE, name="iwf"):
    path = write_image(folder / f"{name}.nii.gz", data, affine)
    series = Series("megre", "01", "", {}, ("a.nii",), voxel_maps={name: VoxelMap(str(path))})
    return voxel_inputs(series, REFERENCE)


def test_a_linear_map_on_another_grid_is_interpolated(tmp_path):
    affine = np.diag([1.5, 3.0, 2.0, 1.0])
    affine[:3, 3] = [-3, -4, -2]
    place = np.indices((14, 9, 12)).transpose(1, 2, 3, 0) @ affine[:3, :3].T + affine[:3, 3]
    field = lambda at: 0.5 + at @ [0.01, 0.02, -0.01]  # noqa: E731
    found = read(tmp_path, field(place), affine)
    np.testing.assert_allclose(found["iwf"], field(PLACE), atol=1e-5)


def test_a_b1_map_has_no_value_where_it_is_0_or_ends(tmp_path):
    data = np.full(SHAPE, 90.0)
    data[0] = 0
    path = write_image(tmp_path / "TB1map.nii.gz", data[:, :4])
    series = Series("vfa", "01", "", {}, ("a.nii",), b1_map=B1Map(str(path), 0.01, "x.json"))
    b1 = voxel_inputs(series, REFERENCE)["b1"]
    np.testing.assert_allclose(b1[1:, :4], 0.9, rtol=1e-6)
    assert np.isnan(b1[0]).all()
    assert np.isnan(b1[:, 4:]).all()
    [said] = without_value(series, {"b1": b1[1:3, 3:5].ravel()})
    assert "TB1map.nii.gz has no value in 50.0 % of the mask" in said


def test_volumes_of_fibres_are_numbered(tmp_path):
    angles = np.stack([np.full(SHAPE, 0.3), np.full(SHAPE, 3.0)], axis=-1)
    found = read(tmp_path, angles, name="theta")
    assert list(found) == ["theta1", "theta2"]
    np.testing.assert_allclose(found["theta2"], np.pi - 3.0, rtol=1e-5)
    shares = read(tmp_path, np.full((*SHAPE, 3), 0.2), name="ff")
    assert list(shares) == ["ff1", "ff2", "ff3"]


@pytest.mark.parametrize("axes", ["", "xyz", "ijk"])
def test_orientations_become_angles(tmp_path, axes):
    affine = np.array([[0.0, 0, 2, 0], [0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1]])  # x along z
    vectors = np.zeros((*SHAPE, 6))
    vectors[..., 0] = 1
    vectors[..., 4:] = np.sin(0.4), np.cos(0.4)
    if axes:
        write_json(tmp_path / "fo.json", {"OrientationEncoding": {"Reference": axes}})
    path = write_image(tmp_path / "fo.nii.gz", vectors, affine)
    series = Series("megre", "01", "", {}, ("a.nii",), voxel_maps={"fo": VoxelMap(str(path))})
    reference = nib.Nifti1Image(np.zeros(SHAPE, np.float32), affine)
    found = voxel_inputs(series, reference)
    expected = (np.pi / 2, 0.4) if axes == "xyz" else (0.0, np.pi / 2)
    for name, angle in zip(("theta1", "theta2"), expected, strict=True):
        np.testing.assert_allclose(found[name], angle, atol=1e-3)


def test_unknown_axes_of_orientations_are_refused(tmp_path):
    write_json(tmp_path / "fo.json", {"OrientationEncoding": {"Reference": "ras"}})
    with pytest.raises(
        InputError, match=r"fo\.json: the Reference .* 'ras'; it must be one of xyz"
    ):
        read(tmp_path, np.ones((*SHAPE, 3)), name="fo")


@pytest.mark.parametrize(
    ("name", "shape", "value", "words"),
    [
        ("theta", SHAPE, 45.0, "if they are degrees"),
        ("iwf", (*SHAPE, 2), 0.5, "has 2 volumes"),
        ("fo", (*SHAPE, 4), 0.5, "three volumes"),
        ("fo", SHAPE, 0.5, "three volumes"),
    ],
)
def test_maps_that_are_not_what_their_name_says(tmp_path, name, shape, value, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, np.full(shape, value), name=name)


def test_a_map_elsewhere_is_named(tmp_path):
    affine = AFFINE.copy()
    affine[:3, 3] += 500
    with pytest.raises(InputError, match=r"iwf\.nii\.gz does not overlap"):
        read(tmp_path, np.full(SHAPE, 0.5), affine)
