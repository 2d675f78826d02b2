"""Masks, B1 maps and segmentations that go with a series."""

from __future__ import annotations

from pathlib import Path

import pytest

from bids_gacelle.bids.discovery import Options, discover


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
