"""Images that cannot be fitted are found before the fit, and named."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.bids.discovery import Options, discover
from bids_gacelle.bids.images import check_images, review_images
from bids_gacelle.bids.series import Atlas, Finding, Job, Mask

SHIFTED = np.diag([1.0, 1.0, 1.0, 1.0]) + np.array([[0, 0, 0, 0.5]] + [[0] * 4] * 3)
MEGRE = "sub-01/anat/sub-01_echo-{}_MEGRE.nii.gz"


@pytest.fixture
def megre(tree, pick):
    """A job on two sound echoes."""
    tree.megre(times=(0.004, 0.008))
    for echo in (1, 2):
        tree.nifti(MEGRE.format(echo))
    return pick(tree.discover(), "r2star")


@pytest.fixture
def dwi(tree, pick):
    """A job on a sound run of six volumes."""
    tree.dwi()
    tree.nifti("sub-01/dwi/sub-01_dwi.nii.gz", (4, 5, 6, 6))
    return pick(tree.discover(), "mcmicro")


@pytest.fixture
def vfa(tree, pick):
    """A job on two flip angles with a B1 map, by unit and value of the map."""

    def job(unit: str, value: float) -> Job:
        tree.vfa()
        for flip in (1, 2):
            tree.nifti(f"sub-01/anat/sub-01_flip-{flip}_VFA.nii.gz")
        tree.image("sub-01/fmap/sub-01_TB1map.nii.gz", Units=unit)
        tree.nifti("sub-01/fmap/sub-01_TB1map.nii.gz", (2, 2, 2), value=value)
        return pick(tree.discover(), "despot1")

    return job


def _refused(job: Job, path: Path | str) -> str:
    """The one error, which must name the file and make the job ineligible."""
    reviewed, findings = review_images(job)
    (finding,) = findings
    assert isinstance(finding, Finding)
    assert finding.severity == "error"
    assert finding.file == str(path)
    assert str(path) in finding.message
    assert finding.model == job.model
    assert not reviewed.eligible
    assert reviewed.reason in finding.message
    return finding.message


def test_sound_images_pass(megre, dwi) -> None:
    for job in (megre, dwi):
        assert check_images(job) == []
        assert review_images(job)[0] == job


def test_ineligible_jobs_are_left_alone(megre) -> None:
    job = replace(megre, reason="because")
    assert review_images(job) == (job, [])


@pytest.mark.parametrize("name", ["ds114", "qmri_megre", "qmri_vfa"])
def test_empty_images_of_the_examples(shared: Path, needs, name: str) -> None:
    two_shells = [replace(n, minimum_measurements=1) for n in needs]
    plan = discover(shared / "data/bids_examples" / name, two_shells, Options())
    jobs = [j for j in plan.jobs if j.eligible]
    assert jobs
    for job in jobs[:3]:
        message = _refused(job, job.series.images[0])
        assert "is empty (0 bytes)" in message


@pytest.mark.parametrize("name", ["megre_brain_romeo", "dwi_brain_mdt"])
def test_real_images_pass(shared: Path, needs, name: str) -> None:
    root = shared / "data" / name
    masks = root / "derivatives/masks"
    options = Options(combine_dwi=True, derivatives={"m": masks} if masks.exists() else {})
    jobs = [j for j in discover(root, needs, options).jobs if j.eligible]
    assert jobs
    assert [check_images(j) for j in jobs] == [[]] * len(jobs)


# -------------------------------------------------------------------- unreadable files


def test_not_compressed(tree, megre) -> None:
    path = tree.root / MEGRE.format(2)
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert "cannot be read as an image" in _refused(megre, path)


def test_not_an_image(tree, megre) -> None:
    path = tree.root / MEGRE.format(2)
    path.write_bytes(gzip.compress(b"text" * 200))
    _refused(megre, path)


@pytest.mark.parametrize("left", [30, 200, -8, -1])
def test_truncated_gzip(tree, megre, left: int) -> None:
    path = tree.root / MEGRE.format(2)
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((4, 5, 6)), np.eye(4)), path)
    path.write_bytes(path.read_bytes()[:left])
    _refused(megre, path)


def test_truncated_header_and_data(tree, pick) -> None:
    for echo in (1, 2):
        tree.image(f"sub-01/anat/sub-01_echo-{echo}_MEGRE.nii", EchoTime=echo / 100)
        path = tree.nifti(f"sub-01/anat/sub-01_echo-{echo}_MEGRE.nii")
    job = pick(tree.discover(), "r2star")
    assert check_images(job) == []
    whole = path.read_bytes()
    for left in (100, 400, len(whole) - 1):
        path.write_bytes(whole[:left])
        _refused(job, path)


def test_several_gzip_members_are_sound(tree, megre) -> None:
    path = tree.root / MEGRE.format(2)
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:500]) + gzip.compress(whole[500:]))
    assert check_images(megre) == []


def test_missing_file_and_dangling_link(tree, megre) -> None:
    path = tree.root / MEGRE.format(2)
    path.unlink()
    assert "does not exist" in _refused(megre, path)
    path.symlink_to(tree.root / "annex")
    assert "link to a file that is not there" in _refused(megre, path)


def test_complex_values(tree, megre) -> None:
    path = tree.root / MEGRE.format(1)
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.complex64), np.eye(4)), path)
    assert "complex64, not real numbers" in _refused(megre, path)


# ------------------------------------------------------------------------ wrong shapes


def test_four_dimensions_where_three_belong(tree, megre) -> None:
    path = tree.nifti(MEGRE.format(1), (4, 5, 6, 2))
    assert "has the shape 4 x 5 x 6 x 2; one 3D volume is needed" in _refused(megre, path)
    tree.nifti(MEGRE.format(1), (4, 5, 6, 1))
    assert check_images(megre) == []


def test_three_dimensions_where_four_belong(tree, dwi) -> None:
    path = tree.nifti("sub-01/dwi/sub-01_dwi.nii.gz", (4, 5, 6))
    assert "a dwi must be 4D, with the 6 volumes that sub-01_dwi.bval" in _refused(dwi, path)


def test_number_of_volumes(tree, dwi) -> None:
    path = tree.nifti("sub-01/dwi/sub-01_dwi.nii.gz", (4, 5, 6, 5))
    assert "has 5 volumes, but sub-01_dwi.bval has 6 b-values" in _refused(dwi, path)


def test_echoes_on_different_grids(tree, megre) -> None:
    path = tree.nifti(MEGRE.format(2), (4, 5, 7))
    assert "its shape is 4 x 5 x 7, not 4 x 5 x 6" in _refused(megre, path)
    tree.nifti(MEGRE.format(2), affine=SHIFTED)
    assert "put a corner of the volume 0.5 mm apart" in _refused(megre, path)
    tree.nifti(MEGRE.format(2), affine=np.eye(4) + (SHIFTED - np.eye(4)) * 0.1)
    assert check_images(megre) == []


def test_joined_runs_on_different_grids(tree, pick) -> None:
    for run in "12":
        tree.dwi(f"sub-01/dwi/sub-01_run-{run}_dwi")
        path = tree.nifti(f"sub-01/dwi/sub-01_run-{run}_dwi.nii.gz", (4, 5, int(run), 6))
    _refused(pick(tree.discover(combine_dwi=True), "mcmicro"), path)


# -------------------------------------------------------------------------- companions


@pytest.mark.parametrize("origin", ["option", "derivatives"])
def test_misaligned_mask(tree, megre, origin: str) -> None:
    """``--mask`` must fit; a mask that was found is left out with a warning."""
    mask = tree.nifti("mask.nii.gz", affine=SHIFTED)
    job = replace(megre, series=replace(megre.series, mask=Mask(origin, (str(mask),))))
    if origin == "option":
        assert "is not on the grid of `sub-01_echo-1_MEGRE.nii.gz`" in _refused(job, mask)
        return
    reviewed, (finding,) = review_images(job)
    assert reviewed.eligible
    assert reviewed.series.mask == Mask("quick")
    assert finding.severity == "warning"
    assert finding.file == str(mask)


def test_mask_with_a_rounded_affine_is_taken_with_a_warning(tree, megre) -> None:
    mask = tree.nifti("mask.nii.gz", affine=np.eye(4) + 0.005)
    job = replace(megre, series=replace(megre.series, mask=Mask("option", (str(mask),))))
    reviewed, (finding,) = review_images(job)
    assert reviewed.series.mask.images == (str(mask),)
    assert finding.severity == "warning"
    assert "rounding" in finding.message


def test_misaligned_and_broken_atlases_are_left_out(tree, megre) -> None:
    paths = {
        "good": tree.nifti("good.nii.gz"),
        "off": tree.nifti("off.nii.gz", (4, 5, 7)),
        "broken": tree.image("broken.nii.gz"),
    }
    atlases = tuple(Atlas(name, str(path)) for name, path in paths.items())
    reviewed, findings = review_images(
        replace(megre, series=replace(megre.series, atlases=atlases))
    )
    assert reviewed.eligible
    assert [a.name for a in reviewed.series.atlases] == ["good"]
    assert [(f.severity, f.file) for f in findings] == [
        ("warning", str(paths["off"])),
        ("warning", str(paths["broken"])),
    ]
    assert "No ROI table is made for the atlas 'off'" in findings[0].message


@pytest.mark.parametrize(
    ("unit", "value", "sentence"),
    [
        ("relative", 1.05, ""),
        ("percent", 96.0, ""),
        ("percent", 1.05, "is 1.05, which cannot be percent (100 = nominal); probably they are "
                          "relative: correct Units"),
        ("relative", 96.0, "cannot be relative (1 = nominal); probably they are percent"),
        ("relative", 800.0, "correct it, or pass --ignore tb1"),
        ("relative", 0.0, "has no positive value"),
    ],
)  # fmt: skip
def test_b1_values_against_their_unit(tree, vfa, unit: str, value: float, sentence: str) -> None:
    job = vfa(unit, value)
    if sentence:
        assert sentence in _refused(job, tree.root / "sub-01/fmap/sub-01_TB1map.nii.gz")
    else:
        assert check_images(job) == []  # another grid is no fault


def test_broken_b1_map(tree, vfa) -> None:
    job = vfa("relative", 1.0)
    path = tree.image("sub-01/fmap/sub-01_TB1map.nii.gz")
    assert "is empty" in _refused(job, path)
