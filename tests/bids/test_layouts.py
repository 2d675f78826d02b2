"""Trees of the Human Connectome Project and of UK Biobank, found as if they were BIDS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bids_gacelle.errors import InputError
from tests.bids.conftest import DIRECTIONS, Tree

FOUR_SHELLS = "5 5 1000 2000 3000 4000"
HCP = "100307/T1w/Diffusion"
UKB = "1234567_20250_2_0/dMRI/dMRI"


def fill(tree: Tree, folder: str, *images: str) -> None:
    for image in images:
        tree.image(f"{folder}/{image}.nii.gz")
    tree.text(f"{folder}/bvals", FOUR_SHELLS)
    tree.text(f"{folder}/bvecs", DIRECTIONS)


@pytest.fixture
def hcp(tree):
    fill(tree, HCP, "data", "nodif_brain_mask", "grad_dev")
    tree.image("100307/T1w/T1w_acpc_dc_restore.nii.gz")
    tree.text("notes.txt", "")
    tree.text("release-notes/readme.txt", "")
    return tree


def test_hcp(hcp, pick, messages) -> None:
    plan = hcp.discover(input_type="hcpya")
    job = pick(plan, "mcmicro")
    assert job.eligible
    series = job.series
    assert (series.subject, series.session) == ("100307", "")
    assert series.entities == {"space": "ACPC"}
    assert series.preprocessed
    assert series.images == (str(hcp.root / HCP / "data.nii.gz"),)
    (run,) = series.dwi_runs
    assert (run.bval, run.bvec) == tuple(str(hcp.root / HCP / n) for n in ("bvals", "bvecs"))
    assert series.mask.origin == "derivatives"
    assert series.mask.images == (str(hcp.root / HCP / "nodif_brain_mask.nii.gz"),)
    assert series.gradient_deviation.image == str(hcp.root / HCP / "grad_dev.nii.gz")
    assert series.spatial_reference == "bids:raw:100307/T1w/T1w_acpc_dc_restore.nii.gz"
    assert messages(plan, "warning") == ""
    assert pick(hcp.discover(input_type="hcpya", ignore=("graddev",)), "mcmicro").eligible
    left = pick(hcp.discover(input_type="hcpya", ignore=("graddev",)), "mcmicro").series
    assert left.gradient_deviation is None


def test_hcp_times_must_be_given_and_the_sentence_says_which(hcp, pick) -> None:
    reason = pick(hcp.discover(input_type="hcpya"), "nexi").reason
    assert "`SmallDelta` and `BigDelta` missing for `100307/T1w/Diffusion/data.nii.gz`" in reason
    assert "to data.json" in reason
    assert "--small-delta 10.6ms --big-delta 43.1ms" in reason
    given = {"small_delta_ms": 10.6, "big_delta_ms": 43.1}
    assert pick(hcp.discover(input_type="hcpya", **given), "nexi").eligible
    hcp.json("dwi.json", SmallDelta=0.0106, BigDelta=0.0431)  # for all participants
    (run,) = pick(hcp.discover(input_type="hcpya"), "nexi").series.dwi_runs
    assert run.big_delta.values == (43.1,)
    assert run.big_delta.sources == ("dwi.json: BigDelta",)
    hcp.json(f"{HCP}/data.json", BigDelta=0.05)
    (run,) = pick(hcp.discover(input_type="hcpya"), "nexi").series.dwi_runs
    assert (run.small_delta.values, run.big_delta.values) == ((10.6,), (50,))


def test_participants_of_a_layout(hcp, pick) -> None:
    fill(hcp, "100408/T1w/Diffusion", "data")
    hcp.text("HCA6002236_V1_MR/T1w/readme", "")
    jobs = pick(hcp.discover(input_type="hcpya"), "mcmicro", only=False)
    assert [(j.series.subject, j.eligible) for j in jobs] == [
        ("100307", True),
        ("100408", True),
        ("HCA6002236V1MR", False),
    ]
    assert jobs[2].reason == "no T1w/Diffusion/data.nii.gz in HCA6002236_V1_MR"
    assert jobs[2].cause == "absent"
    chosen = hcp.discover(input_type="hcpya", participant_labels=("sub-100408",))
    assert pick(chosen, "mcmicro").series.subject == "100408"
    with pytest.raises(InputError, match=r"No participant '1' in .*it has 3: 100307"):
        hcp.discover(input_type="hcpya", participant_labels=("1",))
    assert pick(hcp.discover(input_type="hcpya"), "r2star", only=False)[0].cause == "absent"


def test_missing_files_of_a_layout(hcp, pick) -> None:
    (hcp.root / HCP / "bvecs").unlink()
    job = pick(hcp.discover(input_type="hcpya"), "mcmicro")
    assert "No .bvec file for `100307/T1w/Diffusion/data.nii.gz`" in job.reason
    assert job.cause == "broken"


def test_ukb(tree, pick) -> None:
    names = ("data", "data_ud", "nodif_brain_mask", "nodif_brain_mask_ud")
    fill(tree, UKB, *names)
    fill(tree, "1234567_20250_3_0/dMRI/dMRI", "data", "nodif_brain_mask")
    fill(tree, "7654321_2_0/DTI/dMRI/dMRI", "data_ud")
    fill(tree, "42/dMRI/dMRI", "data")
    jobs = pick(tree.discover(input_type="ukb"), "mcmicro", only=False)
    assert all(j.eligible for j in jobs)
    found = {(j.series.subject, j.series.session): Path(j.series.images[0]).name for j in jobs}
    assert found == {
        ("1234567", "0200"): "data_ud.nii.gz",
        ("1234567", "0300"): "data.nii.gz",
        ("42", ""): "data.nii.gz",
        ("7654321", "0200"): "data_ud.nii.gz",
    }
    masks = [[Path(p).name for p in j.series.mask.images] for j in jobs]
    assert masks[:2] == [["nodif_brain_mask_ud.nii.gz"], ["nodif_brain_mask.nii.gz"]]
    assert jobs[0].series.entities == {}
    one = {"session_labels": ("0300",), "participant_labels": ("1234567",)}
    assert pick(tree.discover(input_type="ukb", **one), "mcmicro").series.session == "0300"
    with pytest.raises(InputError, match=r"No session '9' in .*it has 2: 0200, 0300"):
        tree.discover(input_type="ukb", session_labels=("9",))


def test_the_same_visit_twice(tree) -> None:
    for folder in ("1_2_0", "1_20250_2_0"):
        fill(tree, f"{folder}/dMRI/dMRI", "data")
    with pytest.raises(InputError, match=r"same visit of participant 1; leave one of them"):
        tree.discover(input_type="ukb")


def test_wrong_input_type(hcp, tree) -> None:
    with pytest.raises(InputError, match=r"no folder sub-<label>; it looks like --input-type hcp"):
        hcp.discover()
    other = Tree(tree.root.parent / "other")
    other.dwi()
    with pytest.raises(InputError, match=r"as --input-type ukb has them, with dMRI/dMRI/data_ud"):
        other.discover(input_type="ukb")
    with pytest.raises(InputError, match="does not exist"):
        Tree(tree.root.parent / "none").discover(input_type="ukb")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(hcp, pick) -> None:
    (hcp.root / "100307").chmod(0)
    try:
        job = pick(hcp.discover(input_type="hcpya"), "mcmicro")
    finally:
        (hcp.root / "100307").chmod(0o755)
    assert "cannot be read: permission denied" in job.reason
