"""Images that cannot be fitted are found before the fit, and named."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.bids.discovery import Options, discover
from bids_gacelle.bids.images import review_series
from bids_gacelle.bids.series import Atlas, Finding, Job, Mask, Series, VoxelMap
from bids_gacelle.spatial.rois import read_lookup
from bids_gacelle.workflows.plan import check_plan

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


def _review(series: Series) -> tuple[Series, list[Finding], str]:
    return review_series(series, lambda path: read_lookup(path, np.empty(0, dtype=int)))


def _passes(job: Job) -> bool:
    return _review(job.series) == (job.series, [], "")


def _refused(job: Job, path: Path | str) -> str:
    """The one error, which must name the file and give the reason for all models at once."""
    _, findings, reason = _review(job.series)
    (finding,) = findings
    assert isinstance(finding, Finding)
    assert finding.severity == "error"
    assert finding.file == str(path)
    assert str(path) in finding.message
    assert finding.model == ""
    assert job.model not in finding.message
    assert reason
    assert reason in finding.message
    return finding.message


def test_sound_images_pass(megre, dwi) -> None:
    for job in (megre, dwi):
        assert _passes(job)


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
    assert all(_passes(j) for j in jobs)


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
    assert _passes(job)
    whole = path.read_bytes()
    for left in (100, 400, len(whole) - 1):
        path.write_bytes(whole[:left])
        _refused(job, path)


def test_several_gzip_members_are_sound(tree, megre) -> None:
    path = tree.root / MEGRE.format(2)
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:500]) + gzip.compress(whole[500:]))
    assert _passes(megre)


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
    assert _passes(megre)


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
    assert _passes(megre)


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
    reviewed, (finding,), reason = _review(job.series)
    assert not reason
    assert reviewed.mask == Mask("quick")
    assert finding.severity == "warning"
    assert finding.file == str(mask)


def test_mask_with_a_rounded_affine_is_taken_with_a_warning(tree, megre) -> None:
    mask = tree.nifti("mask.nii.gz", affine=np.eye(4) + 0.005)
    job = replace(megre, series=replace(megre.series, mask=Mask("option", (str(mask),))))
    reviewed, (finding,), _ = _review(job.series)
    assert reviewed.mask.images == (str(mask),)
    assert finding.severity == "warning"
    assert "rounding" in finding.message


@pytest.fixture
def atlases(tree) -> dict[str, Atlas]:
    """One atlas that can be used and one for each way in which it cannot."""
    good = tree.nifti("good.nii.gz")
    table = tree.text("good.tsv", "index\tname\n1\tNAc\n")
    latin = tree.root / "latin.tsv"
    latin.write_bytes("index\tname\n1\tN\xe4he\n".encode("latin-1"))
    return {
        "good": Atlas("good", str(good), str(table)),
        "off": Atlas("off", str(tree.nifti("off.nii.gz", (4, 5, 7)))),
        "broken": Atlas("broken", str(tree.image("broken.nii.gz"))),
        "nameless": Atlas("nameless", str(good), str(tree.text("x.tsv", "index\tcolour\n"))),
        "latin": Atlas("latin", str(good), str(latin)),
    }


def test_bad_atlases_of_derivatives_are_left_out(megre, atlases) -> None:
    given = replace(megre.series, atlases=tuple(atlases.values()))
    reviewed, findings, reason = _review(given)
    assert not reason
    assert [a.name for a in reviewed.atlases] == ["good"]
    assert [(f.severity, f.file) for f in findings] == [
        ("warning", atlases["off"].image),
        ("warning", atlases["broken"].image),
        ("warning", atlases["nameless"].table),
        ("warning", atlases["latin"].table),
    ]
    assert "No ROI table is made for the atlas 'off'" in findings[0].message
    assert "needs tab-separated columns 'index' and 'name'" in findings[2].message


@pytest.mark.parametrize("name", ["off", "broken", "nameless", "latin"])
def test_a_bad_atlas_that_was_asked_for_stops_the_series(megre, atlases, name: str) -> None:
    atlas = replace(atlases[name], origin="option")
    job = replace(megre, series=replace(megre.series, atlases=(atlas, atlases["good"])))
    file = atlas.table or atlas.image
    assert f"It was asked for with --atlas {name}." in _refused(job, file)


def test_one_review_serves_all_models_of_a_series(tree, pick, needs) -> None:
    """What is found is said once, by whichever model the series is read for."""
    tree.dwi(bval="0 0 1000 2000 3000 4000", SmallDelta=0.01, BigDelta=0.02)
    tree.nifti("sub-01/dwi/sub-01_dwi.nii.gz", (4, 5, 6, 6))
    mask = tree.nifti("mask.nii.gz", affine=np.eye(4) + 0.005)
    checked = check_plan(tree.discover(mask=mask))
    assert all(pick(checked, m).eligible for m in ("mcmicro", "nexi"))
    (finding,) = (f for f in checked.findings if "rounding" in f.message)
    assert finding.model == ""
    tree.image("sub-01/dwi/sub-01_dwi.nii.gz")
    checked = check_plan(tree.discover())
    (finding,) = (f for f in checked.findings if f.severity == "error")
    for model in ("mcmicro", "nexi"):
        job = pick(checked, model)
        assert (job.cause, job.reason in finding.message) == ("broken", True)
    assert pick(checked, "r2star").cause == "absent"


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
        assert _passes(job)  # another grid is no fault


def test_b1_values_in_degrees(tree, vfa, pick) -> None:
    vfa("relative", 1.0)
    path = tree.nifti("sub-01/fmap/sub-01_TB1map.nii.gz", (2, 2, 2), value=57.0)
    tree.json("sub-01/fmap/sub-01_TB1map.json", Units="degrees", FlipAngle=60)
    assert _passes(pick(tree.discover(), "despot1"))
    tree.json("sub-01/fmap/sub-01_TB1map.json", Units="degrees", FlipAngle=10)
    sentence = "is 57, which cannot be degrees of a nominal flip angle of 10; probably they are"
    assert sentence in _refused(pick(tree.discover(), "despot1"), path)


def test_phases_of_a_series(tree, megre, pick) -> None:
    phases = [MEGRE.format(e).replace("_MEGRE", "_part-phase_MEGRE") for e in (1, 2)]
    for path in phases:
        tree.nifti(path)
    job = pick(tree.discover(), "r2star")
    assert len(job.series.second.images) == 2
    assert _passes(job)
    path = tree.nifti(phases[1], (4, 5, 7))
    assert "is not on the grid of" in _refused(job, path)
    path = tree.text(phases[1], "")
    assert "is empty" in _refused(job, path)


@pytest.mark.parametrize("origin", ["option", "derivatives"])
def test_maps_of_voxel_inputs(tree, megre, origin: str) -> None:
    given = {"theta": VoxelMap(str(tree.nifti("theta.nii.gz", (2, 2, 2, 3))), origin)}
    assert _passes(replace(megre, series=replace(megre.series, voxel_maps=given)))
    path = tree.text("theta.nii.gz", "no image")
    series, findings, reason = _review(replace(megre.series, voxel_maps=given))
    (finding,) = findings
    assert f"`{path}` cannot be read as an image" in finding.message
    if origin == "option":
        assert "It was asked for with --voxel-map theta." in reason
    else:
        assert reason == ""
        assert "No map theta is used." in finding.message
        assert series.voxel_maps == {}


def test_b1_map_with_a_fourth_axis_of_one(tree, vfa) -> None:
    job = vfa("relative", 1.0)
    tree.nifti("sub-01/fmap/sub-01_TB1map.nii.gz", (2, 2, 2, 1))
    assert _passes(job)
    path = tree.nifti("sub-01/fmap/sub-01_TB1map.nii.gz", (2, 2, 2, 2))
    assert "one 3D volume is needed" in _refused(job, path)


def test_broken_b1_map(tree, vfa) -> None:
    job = vfa("relative", 1.0)
    path = tree.image("sub-01/fmap/sub-01_TB1map.nii.gz")
    assert "is empty" in _refused(job, path)


# ------------------------------------------------------------- noise and gradient deviations

MAPS = {"noise_map": (4, 5, 6), "gradient_deviation": (4, 5, 6, 9)}


def _with_map(job: Job, kind: str, given: VoxelMap) -> Series:
    if kind == "gradient_deviation":
        return replace(job.series, gradient_deviation=given)
    (run,) = job.series.dwi_runs
    return replace(job.series, dwi_runs=(replace(run, noise_map=given),))


def _map_of(series: Series, kind: str) -> VoxelMap | None:
    return series.gradient_deviation or series.dwi_runs[0].noise_map


@pytest.mark.parametrize("kind", list(MAPS))
def test_maps_of_the_voxels_on_the_grid(dwi, tree, kind: str) -> None:
    given = VoxelMap(str(tree.nifti("m.nii.gz", MAPS[kind])), "option")
    series = _with_map(dwi, kind, given)
    assert _review(series) == (series, [], "")


@pytest.mark.parametrize(
    ("kind", "shape", "affine", "sentence"),
    [
        ("noise_map", (4, 5, 6, 2), None, "4 x 5 x 6 x 2; one 3D volume is needed."),
        ("noise_map", (4, 5, 7), None, "its shape is 4 x 5 x 7, not 4 x 5 x 6."),
        ("noise_map", (4, 5, 6), SHIFTED, "0.5 mm apart."),
        ("gradient_deviation", (4, 5, 6), None, "has 9 volumes, the entries of a 3 x 3 matrix."),
        ("gradient_deviation", (4, 5, 6, 3), None, "the shape 4 x 5 x 6 x 3; a map of gradient"),
        ("gradient_deviation", (3, 5, 6, 9), None, "its shape is 3 x 5 x 6, not 4 x 5 x 6."),
    ],
)
def test_maps_of_the_voxels_that_do_not_fit(dwi, tree, kind, shape, affine, sentence) -> None:
    path = tree.nifti("m.nii.gz", shape, affine)
    series, (finding,), reason = _review(_with_map(dwi, kind, VoxelMap(str(path))))
    assert (finding.severity, finding.file, reason) == ("warning", str(path), "")
    assert sentence in finding.message
    assert _map_of(series, kind) is None
    series, (finding,), reason = _review(_with_map(dwi, kind, VoxelMap(str(path), "option")))
    assert (finding.severity, finding.file) == ("error", str(path))
    assert sentence in reason
    assert f"It was asked for with --{kind.replace('_', '-')}." in reason


@pytest.mark.parametrize("kind", list(MAPS))
def test_a_map_that_is_not_there(dwi, tree, kind: str) -> None:
    given = VoxelMap(str(tree.root / "none.nii.gz"), "option")
    _, _, reason = _review(_with_map(dwi, kind, given))
    assert "does not exist" in reason
