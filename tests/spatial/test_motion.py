"""Displacement between images of one fit: real scans as they are and shifted by three voxels."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_gacelle.spatial import displacement


def _data(path):
    return nib.load(path).get_fdata(dtype=np.float32)


def _mean_b0(stem):
    return _data(f"{stem}.nii.gz")[..., np.loadtxt(f"{stem}.bval") < 100].mean(axis=-1)


@pytest.fixture(scope="module", params=["megre", "vfa", "dwi"])
def scans(request, shared):
    """Images of one fit (three echoes, three flip angles, b=0 of two runs) and voxel sizes."""
    root = shared / "data"
    if request.param == "dwi":
        folder = root / "dwi_brain_mdt" / "sub-01" / "dwi"
        return [_mean_b0(folder / f"sub-01_acq-{a}_dwi") for a in ("b2k", "b6k")], (2, 2, 2)
    if request.param == "vfa":
        paths = sorted((root / "vfa_phantom_sepal" / "sub-phantom" / "anat").glob("*VFA.nii.gz"))
        return [_data(p) for p in paths], (1.2, 1.2, 1.2)
    paths = (root / "megre_brain_romeo" / "sub-01" / "anat").glob("*part-mag_MEGRE.nii.gz")
    return [_data(p) for p in sorted(paths)], (0.469, 0.469, 1.0)


def test_real_scans_do_not_warn(scans):
    volumes, sizes = scans
    found = displacement(volumes, sizes)
    assert [d.index for d in found] == list(range(1, len(volumes)))
    for d in found:
        assert d.warning == ""
        assert d.distance < 0.6 * max(sizes)


def test_shifted_real_scans_warn(scans):
    volumes, sizes = scans
    for axis, size in enumerate(volumes[0].shape):
        if size < 5:
            continue
        by = [3 if a == axis else 0 for a in range(3)]
        moved = ndimage.shift(volumes[-1], by, order=0, mode="nearest")
        (d,) = displacement([volumes[0], moved], sizes)
        assert abs(d.shift[axis] - 3) < 0.8
        assert abs(d.distance - 3 * sizes[axis]) < 0.8 * sizes[axis]
        assert "shifted by" in d.warning
        assert "voxels" in d.warning


def blobs(shape=(40, 36, 30), seed=0):
    rng = np.random.default_rng(seed)
    return 100 * (ndimage.gaussian_filter(rng.normal(size=shape), 2.5) > 0.01) + 20.0


def test_contrast_reversal_is_no_motion_and_a_mask_focuses():
    image = blobs()
    rng = np.random.default_rng(1)
    other = 1e4 / image + 20 * rng.normal(size=image.shape)
    (d,) = displacement([image, other], (1, 1, 1))
    assert d.warning == ""
    assert d.correlation > 0.2
    # only the right part of the object moved: seen in the box around it
    moved = other.copy()
    moved[20:] = np.roll(other, 2, axis=1)[20:]
    mask = np.zeros(image.shape, bool)
    mask[26:36, 8:28, 8:22] = True
    (d,) = displacement([image, moved], (1, 1, 1), mask)
    np.testing.assert_allclose(d.shift, [0, 2, 0], atol=0.3)


def test_other_anatomy_or_noise_warns():
    (d,) = displacement([blobs(seed=0), blobs(seed=5)], (1, 1, 1))
    assert "hardly any structure" in d.warning
    noise = np.abs(np.random.default_rng(0).normal(size=(40, 36, 30)))
    assert "hardly any structure" in displacement([blobs(), noise], (1, 1, 1))[0].warning
    assert "hardly any structure" in displacement([blobs(), 0 * noise], (1, 1, 1))[0].warning


def test_nan_and_thin_images():
    image = blobs()
    holed = image.copy()
    holed[3, 3, 3] = np.nan
    assert displacement([image, holed], (1, 1, 1))[0].warning == ""
    thin = image[:, :, :2]
    (d,) = displacement([thin, np.roll(thin, 3, axis=0)], (2, 1, 1))
    np.testing.assert_allclose(d.shift, [3, 0, 0], atol=0.3)
    assert abs(d.distance - 6) < 0.6
    assert displacement([image[:3, :3, :3]] * 2, (1, 1, 1)) == []
    assert displacement([image], (1, 1, 1)) == []


def test_large_images_are_averaged():
    image = np.kron(blobs((70, 20, 20)), np.ones((2, 1, 1)))
    (d,) = displacement([image, np.roll(image, 4, axis=0)], (0.5, 1, 1))
    np.testing.assert_allclose(d.shift, [4, 0, 0], atol=0.5)
    assert abs(d.distance - 2) < 0.25
