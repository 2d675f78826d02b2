"""Masks, B1 maps and segmentations that go with a series."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bids_gacelle.bids.discovery import ModelNeeds, Options, discover
from bids_gacelle.bids.series import VoxelMap, series_from_json, to_json
from bids_gacelle.errors import InputError


@pytest.fixture
def derived(tree, other_tree):
    """Discover with the second dataset as derivatives."""
    return lambda **options: tree.discover(derivatives={"x": other_tree.root}, **options)


def _names(paths: tuple[str, ...]) -> list[str]:
    return [Path(p).name for p in paths]


# ------------------------------------------------------------------------------ masks


def test_quick_mask_is_announced(tree, pick, messages) -> None:
    tree.megre()
    plan = tree.discover()
    assert pick(plan, "r2star").series.mask.origin == "quick"
    assert "sub-01 megre: no brain mask; a rough one is made" in messages(plan, "warning")


def test_mask_option_wins(tree, other_tree, derived, pick) -> None:
    tree.megre()
    other_tree.image("sub-01/anat/sub-01_desc-brain_mask.nii.gz")
    mask = pick(derived(mask=Path("/m.nii.gz")), "r2star").series.mask
    assert (mask.origin, mask.images) == ("option", ("/m.nii.gz",))


def test_mask_with_most_entities_in_common(tree, other_tree, derived, pick) -> None:
    for acq in ("a", "b", "c"):
        tree.dwi(f"sub-01/dwi/sub-01_acq-{acq}_dwi")
    for name in ("acq-a_desc-brain", "desc-brain", "acq-b_space-ACPC_desc-brain", "desc-slab"):
        other_tree.image(f"sub-01/dwi/sub-01_{name}_mask.nii.gz")
    other_tree.image("sub-01/anat/sub-01_acq-c_desc-brain_mask.nii.gz")
    jobs = pick(derived(), "mcmicro", only=False)
    assert [_names(j.series.mask.images) for j in jobs] == [
        ["sub-01_acq-a_desc-brain_mask.nii.gz"],
        ["sub-01_desc-brain_mask.nii.gz"],
        ["sub-01_desc-brain_mask.nii.gz"],
    ]
    joined = pick(derived(combine_dwi=True), "mcmicro").series.mask
    assert _names(joined.images) == [
        "sub-01_acq-a_desc-brain_mask.nii.gz",
        "sub-01_desc-brain_mask.nii.gz",
    ]


def test_mask_of_the_same_resolution(tree, other_tree, derived, pick) -> None:
    tree.dwi()
    for res in ("1mm", "2mm"):
        stem = f"sub-01/dwi/sub-01_space-ACPC_res-{res}_desc"
        other_tree.dwi(f"{stem}-preproc_dwi")
        other_tree.image(f"{stem}-brain_mask.nii.gz")
    jobs = pick(derived(), "mcmicro", only=False)
    assert [_names(j.series.mask.images) for j in jobs] == [
        ["sub-01_space-ACPC_res-1mm_desc-brain_mask.nii.gz"],
        ["sub-01_space-ACPC_res-2mm_desc-brain_mask.nii.gz"],
    ]


def test_mask_of_another_session_or_acquisition_is_not_taken(
    tree, other_tree, derived, pick
) -> None:
    tree.megre("sub-01/ses-a/anat/sub-01_ses-a")
    other_tree.image("sub-01/ses-b/anat/sub-01_ses-b_desc-brain_mask.nii.gz")
    other_tree.image("sub-01/ses-a/anat/sub-01_ses-a_acq-x_desc-brain_mask.nii.gz")
    (job,) = (j for j in pick(derived(), "r2star", only=False) if j.eligible)
    assert job.series.mask.origin == "quick"
    other_tree.image("sub-01/anat/sub-01_desc-brain_mask.nii.gz")
    (job,) = (j for j in pick(derived(), "r2star", only=False) if j.eligible)
    assert _names(job.series.mask.images) == ["sub-01_desc-brain_mask.nii.gz"]


def test_slab_mask_of_the_phantom(shared: Path, needs, pick) -> None:
    root = shared / "data/vfa_phantom_sepal"
    given = {"masks": root / "derivatives/masks"}
    plan = discover(root, needs, Options(derivatives=given))
    assert pick(plan, "despot1").series.mask.origin == "quick"
    asked = Options(derivatives=given, filters={"mask": {"desc": "slab"}})
    mask = pick(discover(root, needs, asked), "despot1").series.mask
    assert _names(mask.images) == ["sub-phantom_desc-slab_mask.nii.gz"]


# --------------------------------------------------------------------------------- B1


@pytest.mark.parametrize(
    ("unit", "factor"), [("percent", 0.01), ("%", 0.01), ("p.u.", 0.01), ("arbitrary", 1.0)]
)
def test_b1_units(tree, pick, messages, unit: str, factor: float) -> None:
    tree.vfa()
    tree.image("sub-01/fmap/sub-01_TB1map.nii.gz", Units=unit)
    plan = tree.discover()
    b1 = pick(plan, "despot1").series.b1_map
    assert (Path(b1.image).name, b1.factor) == ("sub-01_TB1map.nii.gz", factor)
    assert b1.source == f"sub-01/fmap/sub-01_TB1map.json: Units {unit}"
    assert "B1" not in messages(plan, "warning")


def test_b1_of_another_unit_is_refused_unless_ignored(tree, pick) -> None:
    tree.vfa()
    tree.image("sub-01/fmap/sub-01_TB1map.nii.gz", Units="Hz")
    reason = pick(tree.discover(), "despot1").reason
    assert "`Units` is 'Hz' in `sub-01/fmap/sub-01_TB1map.json`" in reason
    job = pick(tree.discover(ignore=("tb1",)), "despot1")
    assert job.eligible
    assert job.series.b1_map is None


def test_b1_of_derivatives_before_raw_and_of_the_same_run(
    tree, other_tree, derived, pick, messages
) -> None:
    tree.vfa("sub-01/anat/sub-01_run-1")
    tree.vfa("sub-01/anat/sub-01_run-2")
    tree.image("sub-01/fmap/sub-01_TB1map.nii.gz", Units="percent")
    other_tree.image("sub-01/fmap/sub-01_TB1map.nii.gz", Units="percent")
    other_tree.image("sub-01/fmap/sub-01_run-2_TB1map.nii.gz", Units="percent")
    other_tree.image("sub-01/fmap/sub-01_space-MNI_TB1map.nii.gz", Units="percent")
    plan = derived()
    first, second = (j.series.b1_map for j in pick(plan, "despot1", only=False))
    assert first.image == str(other_tree.root / "sub-01/fmap/sub-01_TB1map.nii.gz")
    assert second.image == str(other_tree.root / "sub-01/fmap/sub-01_run-2_TB1map.nii.gz")
    assert "`sub-01/fmap/sub-01_TB1map.nii.gz`" in messages(plan, "warning")


def test_b1_of_another_session_is_not_taken(tree, pick) -> None:
    tree.vfa("sub-01/ses-a/anat/sub-01_ses-a")
    tree.image("sub-01/ses-b/fmap/sub-01_ses-b_TB1map.nii.gz", Units="percent")
    (job,) = (j for j in pick(tree.discover(), "despot1", only=False) if j.eligible)
    assert job.series.b1_map is None


# ---------------------------------------------------------------------------- atlases


def test_segmentations_and_their_tables(tree, other_tree, derived, pick) -> None:
    tree.megre("sub-01/ses-a/anat/sub-01_ses-a")
    for name in (
        "ses-a/anat/sub-01_ses-a_dseg",
        "anat/sub-01_desc-aseg_dseg",
        "anat/sub-01_atlas-Schaefer2018_seg-7n_scale-100_dseg",
        "anat/sub-01_space-MNI152NLin2009cAsym_dseg",
        "ses-b/anat/sub-01_ses-b_dseg",
    ):
        other_tree.image(f"sub-01/{name}.nii.gz")
    root = other_tree.text("dseg.tsv", "")
    aseg = other_tree.text("desc-aseg_dseg.tsv", "")
    own = other_tree.text("sub-01/ses-a/anat/sub-01_ses-a_dseg.tsv", "")
    (job,) = (j for j in pick(derived(), "r2star", only=False) if j.eligible)
    assert {a.name: a.table for a in job.series.atlases} == {
        "x": str(own),
        "aseg": str(aseg),
        "Schaefer20187n100": str(root),
    }


def test_our_own_flag_maps_are_no_segmentations(tree, other_tree, derived, pick) -> None:
    tree.megre()
    for desc in ("r2starfitflag", "aseg", "oldfitflag"):
        other_tree.image(f"sub-01/anat/sub-01_desc-{desc}_dseg.nii.gz")
    assert [a.name for a in pick(derived(), "r2star").series.atlases] == ["aseg"]


def test_given_atlases_come_first_and_names_are_unique(tree, other_tree, derived, pick) -> None:
    tree.megre()
    found = other_tree.image("sub-01/anat/sub-01_desc-lobes_dseg.nii.gz")
    given = other_tree.image("my_lobes.nii.gz")
    table = other_tree.text("my_lobes.tsv", "index\tname\n")
    atlases = pick(derived(atlases={"lobes": given}), "r2star").series.atlases
    assert [(a.name, a.image, a.table) for a in atlases] == [
        ("lobes", str(given), str(table)),
        ("lobes2", str(found), ""),
    ]
    assert [a.origin for a in atlases] == ["option", "derivatives"]
    again = pick(derived(atlases={"own": found}), "r2star").series.atlases
    assert [a.name for a in again] == ["own"]


def test_filters_of_masks_and_segmentations(tree, other_tree, derived, pick) -> None:
    tree.megre()
    for name in ("desc-a_dseg", "desc-b_dseg", "label-wm_desc-brain_mask"):
        other_tree.image(f"sub-01/anat/sub-01_{name}.nii.gz")
    filters = {"dseg": {"desc": "b"}, "mask": {"label": None}}
    series = pick(derived(filters=filters), "r2star").series
    assert [a.name for a in series.atlases] == ["b"]
    assert series.mask.origin == "quick"


# -------------------------------------------------------- noise and gradient deviations

ACPC = "sub-01/dwi/sub-01_space-ACPC"


@pytest.fixture
def preproc(other_tree):
    """Preprocessed dwi in the second dataset."""
    other_tree.dwi(f"{ACPC}_desc-preproc_dwi")
    return other_tree


def test_noise_map_and_gradient_deviation_beside_the_image(
    tree, preproc, derived, pick, messages
) -> None:
    tree.dwi()
    preproc.image(f"{ACPC}_desc-noise_dwimap.nii.gz")
    preproc.image(f"{ACPC}_graddev.nii.gz")
    plan = derived()
    series = pick(plan, "mcmicro").series
    (run,) = series.dwi_runs
    assert run.noise_map == VoxelMap(str(preproc.root / f"{ACPC}_desc-noise_dwimap.nii.gz"))
    assert series.gradient_deviation == VoxelMap(str(preproc.root / f"{ACPC}_graddev.nii.gz"))
    info = messages(plan, "info")
    assert f"noise map `x:{ACPC}_desc-noise_dwimap.nii.gz` is used." in info
    assert f"map of gradient deviations `x:{ACPC}_graddev.nii.gz` is used." in info
    series = pick(derived(ignore=("noise", "graddev")), "mcmicro").series
    assert series.dwi_runs[0].noise_map is series.gradient_deviation is None


def test_noise_map_in_another_space_is_not_used(tree, preproc, derived, pick, messages) -> None:
    tree.dwi()
    tree.image("sub-01/dwi/sub-01_desc-noise_dwimap.nii.gz")
    plan = derived()
    assert pick(plan, "mcmicro").series.dwi_runs[0].noise_map is None
    sentence = "`sub-01/dwi/sub-01_desc-noise_dwimap.nii.gz` not used: not in the space of the"
    assert sentence in messages(plan, "info")


def test_noise_map_of_another_name_by_filter(tree, preproc, derived, pick) -> None:
    tree.dwi()
    preproc.image(f"{ACPC}_noisemap.nii.gz")
    assert pick(derived(), "mcmicro").series.dwi_runs[0].noise_map is None
    filters = {"noise": {"suffix": "noisemap", "desc": None}}
    (run,) = pick(derived(filters=filters), "mcmicro").series.dwi_runs
    assert run.noise_map.image.endswith("_noisemap.nii.gz")


def test_each_joined_run_has_its_own_noise_map(tree, pick) -> None:
    for name in "ab":
        tree.dwi(f"sub-01/dwi/sub-01_acq-{name}_dwi")
    tree.image("sub-01/dwi/sub-01_acq-b_desc-noise_dwimap.nii.gz")
    series = pick(tree.discover(combine_dwi=True), "mcmicro").series
    assert [bool(run.noise_map) for run in series.dwi_runs] == [False, True]
    given = {"noise_map": Path("/n.nii.gz"), "gradient_deviation": Path("/g.nii.gz")}
    series = pick(tree.discover(combine_dwi=True, **given), "mcmicro").series
    assert {run.noise_map for run in series.dwi_runs} == {VoxelMap("/n.nii.gz", "option")}
    assert series.gradient_deviation == VoxelMap("/g.nii.gz", "option")
    assert series_from_json(json.loads(json.dumps(to_json(series)))) == series


@pytest.mark.parametrize("option", ["noise_map", "gradient_deviation"])
def test_one_map_for_several_participants_is_refused(tree, pick, option: str) -> None:
    for subject in ("01", "02"):
        tree.dwi(f"sub-{subject}/dwi/sub-{subject}_dwi")
    flag = "--" + option.replace("_", "-")
    with pytest.raises(
        InputError, match=rf"{flag} /m.nii.gz is an image of one participant, but 2"
    ):
        tree.discover(**{option: Path("/m.nii.gz")})
    one = tree.discover(participant_labels=("02",), **{option: Path("/m.nii.gz")})
    assert pick(one, "mcmicro").eligible


def test_a_model_that_cannot_use_gradient_deviations_says_so(tree, messages) -> None:
    tree.dwi()
    needs = [
        ModelNeeds("mine", "dwi", takes_gradient_deviation=False),
        ModelNeeds("mcmicro", "dwi"),
    ]
    options = Options(gradient_deviation=Path("/g.nii.gz"))
    warning = messages(discover(tree.root, needs, options), "warning")
    assert "mine is fitted with nominal b-values" in warning
    assert "mcmicro is fitted" not in warning
