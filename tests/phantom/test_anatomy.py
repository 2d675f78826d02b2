import importlib.util

import numpy as np
import pytest
from scipy import ndimage

from bids_gacelle.errors import InputError
from bids_gacelle.phantom import anatomy
from bids_gacelle.phantom.anatomy import Label, make_anatomy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="needs nilearn (extra `phantom`)"
)

# Volumes of healthy adults in ml, generous: Ge et al. 2002 (cortex, white matter), Kruggel 2006.
VOLUMES = {
    Label.CSF: (60, 350),
    Label.CORTEX: (450, 900),
    Label.WHITE_MATTER: (350, 650),
    Label.CEREBELLUM: (70, 170),
    Label.THALAMUS: (6, 18),
    Label.CAUDATE: (4, 12),
    Label.PUTAMEN: (4, 14),
    Label.PALLIDUM: (1.5, 5),
}


@pytest.fixture(scope="module")
def head() -> anatomy.Anatomy:
    return make_anatomy(resolution=4.0)


def centres(head: anatomy.Anatomy, label: Label) -> list[np.ndarray]:
    """MNI centre of the left and of the right part of a label."""
    points = head.mni[head.labels == label]
    return [points[points[:, 0] < 0].mean(axis=0), points[points[:, 0] > 0].mean(axis=0)]


@pytest.mark.parametrize("label", VOLUMES)
def test_every_tissue_has_the_volume_of_an_adult_brain(head, label):
    volume = np.sum(head.labels == label) * 4.0**3 / 1000
    low, high = VOLUMES[label]
    assert low < volume < high


def test_deep_nuclei_lie_where_atlases_have_them(head):
    """Centres of the Harvard-Oxford subcortical structures, right side, mm."""
    atlas = {
        Label.THALAMUS: (11, -19, 7),
        Label.CAUDATE: (13, 10, 10),
        Label.PUTAMEN: (26, 2, 0),
        Label.PALLIDUM: (19, -4, -1),
    }
    for label, (x, y, z) in atlas.items():
        left, right = centres(head, label)
        assert np.linalg.norm(right - (x, y, z)) < 7
        assert np.linalg.norm(left - (-x, y, z)) < 7


def test_brain_is_one_piece_inside_a_skull_that_scalp_surrounds(head):
    assert ndimage.label(head.brain)[1] == 1
    scalp = head.labels == Label.SCALP
    assert not np.any(ndimage.binary_dilation(head.brain) & scalp)
    faces = [head.labels.take(i, axis) for axis in range(3) for i in (0, -1)]
    assert not any(face.any() for face in faces)
    # From the middle of the brain, up, forward and to both sides: brain, skull, scalp, air.
    i, j, k = np.unravel_index(np.argmin(np.linalg.norm(head.mni, axis=-1)), scalp.shape)
    for ray in (scalp[i, j, k:], scalp[i, j:, k], scalp[i:, j, k], scalp[:i, j, k]):
        assert ray.any()


def test_grid_is_stored_as_scanners_do(head):
    assert np.linalg.det(head.affine[:3, :3]) < 0
    np.testing.assert_allclose(np.abs(head.affine[:3, :3]), 4 * np.eye(3))
    oblique = make_anatomy(2, resolution=8.0).affine[:3, :3]
    np.testing.assert_allclose(np.linalg.norm(oblique, axis=0), 8)
    assert np.abs(oblique - np.diag(np.diag(oblique))).max() > 1


def test_mni_right_is_scanner_right(head):
    """The head is turned by a few degrees only: world axes are those of MNI."""
    index = np.moveaxis(np.indices(head.labels.shape), 0, -1).reshape(-1, 3)
    world = index @ head.affine[:3, :3].T + head.affine[:3, 3]
    for axis in range(3):
        assert np.corrcoef(world[:, axis], head.mni[..., axis].ravel())[0, 1] > 0.98


def test_subjects_differ_in_size_and_sessions_only_in_position():
    def volume(subject, session):
        head = make_anatomy(subject, session, resolution=8.0)
        # The transform is affine: the volume of a voxel in MNI space tells the size of the head.
        edges = [np.diff(head.mni[:2, :2, :2], axis=axis)[0, 0, 0] for axis in range(3)]
        return abs(np.linalg.det(edges)), head

    (first, one), (again, two), (other, _) = volume(1, 1), volume(1, 2), volume(3, 1)
    assert first == pytest.approx(again, rel=1e-9)
    assert abs(first / other - 1) > 0.005
    assert one.labels.shape != two.labels.shape or not np.array_equal(one.labels, two.labels)


def test_a_missing_nilearn_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    anatomy.load_template.cache_clear()
    with pytest.raises(InputError, match=r"pip install bids-gacelle\[phantom\]"):
        anatomy.load_template()
