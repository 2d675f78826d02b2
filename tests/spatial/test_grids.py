"""Reading images and comparing grids."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from bids_gacelle.errors import InputError
from bids_gacelle.spatial import load_volumes, resample_to, same_grid

AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -120], [0, 0, 3, -70], [0, 0, 0, 1]])


def image(data, affine=AFFINE):
    return nib.Nifti1Image(np.asarray(data, dtype=np.float32), affine)


def rotated(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rotation = np.eye(4)
    rotation[:2, :2] = [[c, -s], [s, c]]
    return rotation @ AFFINE


def test_load_volumes_scales_and_keeps_order(tmp_path):
    stored = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), AFFINE)
    stored.header.set_slope_inter(0.5, 10)
    nib.save(stored, tmp_path / "b.nii.gz")
    nib.save(image(np.ones((2, 3, 4))), tmp_path / "a.nii")
    (first, scaled), (_, ones) = load_volumes([tmp_path / "b.nii.gz", str(tmp_path / "a.nii")])
    assert scaled.dtype == ones.dtype == np.float32
    np.testing.assert_allclose(scaled.ravel(), 10 + 0.5 * np.arange(24))
    np.testing.assert_array_equal(ones, 1)
    np.testing.assert_array_equal(first.affine, AFFINE)


def _truncated_gzip(path):
    path.write_bytes(path.read_bytes()[:-2000])


def _corrupt_gzip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    path.write_bytes(content)


def _truncated_header(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:200]))


def _no_gzip(path):
    path.write_bytes(b"this is text" * 100)


def _empty(path):
    path.write_bytes(b"")


def _bad_dimensions(path):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[40:44] = b"\xff\x7f\xff\x7f"
    path.write_bytes(gzip.compress(bytes(content)))


@pytest.mark.parametrize(
    "damage",
    [_truncated_gzip, _corrupt_gzip, _truncated_header, _no_gzip, _empty, _bad_dimensions],
)
def test_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "sub-01_echo-1_MEGRE.nii.gz"
    nib.save(image(np.random.default_rng(0).normal(size=(20, 20, 20))), path)
    damage(path)
    with pytest.raises(InputError, match=r"sub-01_echo-1_MEGRE\.nii\.gz .*truncated, corrupt"):
        load_volumes([path])


def test_truncated_uncompressed_file_is_named(tmp_path):
    path = tmp_path / "a.nii"
    nib.save(image(np.zeros((20, 20, 20))), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"a\.nii .*truncated"):
        load_volumes([path])


def test_missing_complex_and_surface_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.nii does not exist"):
        load_volumes([tmp_path / "none.nii"])
    nib.save(nib.Nifti1Image(np.ones((2, 2, 2), np.complex64), AFFINE), tmp_path / "c.nii")
    with pytest.raises(InputError, match=r"c\.nii holds values of type complex64"):
        load_volumes([tmp_path / "c.nii"])
    nib.save(nib.gifti.GiftiImage(), tmp_path / "s.gii")
    with pytest.raises(InputError, match=r"s\.gii is no volume image"):
        load_volumes([tmp_path / "s.gii"])


def test_same_grid_is_judged_at_the_corners():
    data = np.zeros((100, 100, 20))
    a = image(data)
    rounded = AFFINE + np.array([[1e-4, 0, 0, 0.05]] + [[0] * 4] * 3)
    assert same_grid(a, image(data, rounded))
    assert same_grid(a, image(data[..., None]))
    assert not same_grid(a, image(data[:, :, :-1]))
    # the same rotation is harmless in a small volume and not in a large one
    small = np.zeros((10, 10, 3))
    about_origin = AFFINE.copy()
    about_origin[:3, 3] = 0
    turned = rotated(0.2)
    turned[:3, 3] = 0
    assert same_grid(image(small, about_origin), image(small, turned))
    assert not same_grid(image(data, about_origin), image(data, turned))


def test_resample_linear_field_and_labels():
    """A field linear in mm is reproduced wherever the source reaches; labels stay labels."""
    shape = (30, 28, 20)
    world = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    world = world @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    source = image(world @ [0.3, -0.2, 0.5])
    target = rotated(15) @ np.diag([0.8, 0.9, 0.5, 1])
    target[:3, 3] = np.array([60.0, -95.0, -50.0])
    reference = image(np.zeros((12, 12, 12, 3)), target)
    result = resample_to(source, reference, order=1)
    assert result.shape == (12, 12, 12)
    np.testing.assert_allclose(result.affine, target)
    voxels = np.stack(np.meshgrid(*[np.arange(12)] * 3, indexing="ij"), -1)
    points = voxels @ target[:3, :3].T + target[:3, 3]
    inside = np.linalg.inv(AFFINE)[:3, :3] @ (points - AFFINE[:3, 3]).reshape(-1, 3).T
    last = np.array(shape) - 1
    assert ((inside > 0) & (inside < last[:, None])).all()
    np.testing.assert_allclose(result.get_fdata(), points @ [0.3, -0.2, 0.5], atol=1e-3)

    labels = np.random.default_rng(1).integers(0, 5, shape)
    nearest = resample_to(image(labels), reference, order=0).get_fdata()
    expected = map_coordinates(labels, inside, order=0).reshape(12, 12, 12)
    np.testing.assert_array_equal(nearest, expected)


def test_resample_needs_overlap():
    a = image(np.zeros((10, 10, 10)))
    far = AFFINE.copy()
    far[0, 3] += 500
    with pytest.raises(InputError, match="does not overlap"):
        resample_to(a, image(np.zeros((10, 10, 10)), far), order=1)
