"""Masks: the quick one on real scans and made-up objects, and reading given ones."""

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.errors import InputError
from bids_gacelle.spatial import load_mask, quick_mask
from bids_gacelle.spatial.masks import _otsu


def ball(shape=(40, 44, 36), radius=14.0):
    grid = np.indices(shape) - (np.array(shape)[:, None, None, None] - 1) / 2
    return np.linalg.norm(grid, axis=0) < radius


def in_air(objects, level=100.0, noise=2.0, seed=0):
    """A magnitude image: Rician noise around and on the object."""
    rng = np.random.default_rng(seed)
    noisy = level * objects + noise * rng.normal(size=objects.shape)
    return np.hypot(noisy, noise * rng.normal(size=objects.shape))


def dice(a, b):
    return 2 * np.sum(a & b) / (a.sum() + b.sum())


def test_otsu_by_brute_force():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(0, 1, 3000), rng.normal(6, 1.5, 1000)])
    candidates = np.linspace(-2, 9, 500)
    within = [
        values[values <= t].var() * np.mean(values <= t)
        + values[values > t].var() * np.mean(values > t)
        for t in candidates
    ]
    threshold, difference = _otsu(values)
    assert abs(threshold - candidates[np.argmin(within)]) < 0.1
    assert abs(difference - 6) < 0.2


def test_object_in_air():
    truth = ball()
    bias = 1 + 0.8 * np.linspace(-1, 1, 40)[:, None, None]
    assert dice(quick_mask(in_air(truth * bias)), truth) > 0.98


def test_dark_lesion_and_ventricles_are_filled():
    truth = ball()
    assert dice(quick_mask(in_air(truth & ~ball(radius=5))), truth) > 0.98


def test_debris_is_removed_and_vials_are_kept():
    truth = ball(radius=10)
    vial = np.zeros_like(truth)
    vial[1:7, 1:7, 10:20] = True
    debris = np.zeros_like(truth)
    debris[36:38, 40:42, 2:4] = True
    mask = quick_mask(in_air(truth | vial | debris))
    assert mask[vial].mean() > 0.75
    assert not mask[debris].any()


def test_two_slices_and_zero_background():
    truth = ball()[:, :, 17:19]
    assert dice(quick_mask(in_air(truth)), truth) > 0.98
    stripped = ball() * np.random.default_rng(0).uniform(50, 150, (40, 44, 36))
    np.testing.assert_array_equal(quick_mask(stripped), ball())


def test_unusable_voxels_stay_out():
    volume = in_air(ball())
    volume[20, 20, 20] = np.nan
    volume[20, 20, 21] = -5
    mask = quick_mask(volume)
    assert not mask[20, 20, 20:22].any()
    assert mask[20, 20, 18]
    with pytest.raises(InputError, match="--mask"):
        quick_mask(np.zeros((5, 5, 5)))


def _data(path):
    return nib.load(path).get_fdata(dtype=np.float32)


def test_crop_inside_a_head_is_kept_whole(shared):
    folder = shared / "data" / "megre_brain_romeo" / "sub-01" / "anat"
    for path in folder.glob("*part-mag_MEGRE.nii.gz"):
        assert quick_mask(_data(path)).mean() > 0.99


def test_phantom(shared):
    folder = shared / "data" / "vfa_phantom_sepal" / "sub-phantom" / "anat"
    dim, bright = (quick_mask(_data(folder / f"sub-phantom_flip-{i}_VFA.nii.gz")) for i in (1, 2))
    # 3.5 litres of liquid and vials, the same at both flip angles; looked at: vials included
    assert 0.12 < bright.mean() < 0.2
    assert dice(dim, bright) > 0.96


def test_head_contains_the_brain(shared):
    root = shared / "data" / "dwi_brain_mdt"
    for run in ("b2k", "b6k"):
        stem = root / "sub-01" / "dwi" / f"sub-01_acq-{run}_dwi"
        b0 = _data(f"{stem}.nii.gz")[..., np.loadtxt(f"{stem}.bval") < 100].mean(axis=-1)
        name = f"derivatives/masks/sub-01/dwi/sub-01_acq-{run}_desc-brain_mask.nii.gz"
        brain = _data(root / name) > 0
        mask = quick_mask(b0)
        assert mask[brain].mean() > 0.995
        assert mask.sum() < 1.5 * brain.sum()


@pytest.fixture
def reference():
    return nib.Nifti1Image(np.ones((6, 7, 8, 3), np.float32), np.diag([2, 2, 2, 1]))


def _save(path, data, affine):
    nib.save(nib.Nifti1Image(np.asarray(data, np.float32), affine), path)
    return str(path)


def test_load_mask(tmp_path, reference):
    data = np.zeros((6, 7, 8))
    data[2:4, 3, 3] = 1
    mask = load_mask(_save(tmp_path / "m.nii.gz", data[..., None], reference.affine), reference)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, data > 0)


def test_mask_with_a_rounded_affine(tmp_path):
    turned = nib.affines.from_matvec(
        1.2 * np.eye(3) + [[0, -0.0753, 0], [0.0753, 0, 0], [0, 0, 0]]
    )
    reference = nib.Nifti1Image(np.ones((60, 60, 60), np.float32), turned)
    path = _save(tmp_path / "m.nii.gz", np.ones((60, 60, 60)), turned.round(2))
    assert load_mask(path, reference).all()


@pytest.mark.parametrize(
    ("data", "shift", "words"),
    [
        (np.zeros((6, 7, 8)), 0, r"m\.nii\.gz is empty"),
        (np.ones((6, 7, 9)), 0, r"m\.nii\.gz is not on the grid .*6 x 7 x 9.*6 x 7 x 8.*resample"),
        (np.ones((6, 7, 8)), 1, r"not on the grid .*affine \[2 0 0 1\].*affine \[2 0 0 0\]"),
        (np.ones((6, 7, 8, 2)), 0, r"m\.nii\.gz has the shape \(6, 7, 8, 2\)"),
    ],
)
def test_unusable_mask_is_named(tmp_path, reference, data, shift, words):
    affine = reference.affine.copy()
    affine[0, 3] = shift
    with pytest.raises(InputError, match=words):
        load_mask(_save(tmp_path / "m.nii.gz", data, affine), reference)
