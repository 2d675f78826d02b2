"""Diffusion runs: gradients, diffusion times, preprocessed and joined runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from bids_gacelle.bids.discovery import Options, discover
from bids_gacelle.bids.gradients import read_gradients, shells
from bids_gacelle.bids.metadata import MetadataError
from bids_gacelle.bids.options import ModelNeeds

FOUR_SHELLS = "0 0 1000 2000 3000 4000"
PREPROC = "sub-01/dwi/sub-01_space-ACPC_desc-preproc_dwi"


@pytest.fixture
def nexi(tree, pick):
    """The nexi job of the tree with some options."""
    return lambda **options: pick(tree.discover(**options), "nexi")


# ------------------------------------------------------------------------- real runs


def test_two_real_runs_apart(shared: Path, needs, pick, messages) -> None:
    root = shared / "data/dwi_brain_mdt"
    plan = discover(root, needs, Options(derivatives={"masks": root / "derivatives/masks"}))
    b2k, b6k = pick(plan, "nexi", only=False)
    assert b2k.reason.startswith("nexi needs at least 4 different shells")
    assert "has 2 (b 1000 s/mm^2, Delta 26.5 ms, delta 16.2 ms; b 2000" in b2k.reason
    assert "--combine-dwi" in b2k.reason
    assert b6k.eligible
    (run,) = b6k.series.dwi_runs
    assert (run.big_delta.values, run.small_delta.values) == ((42.0,), (31.7,))
    assert run.big_delta.sources == ("sub-01/dwi/sub-01_acq-b6k_dwi.json: LargeDelta",)
    assert run.echo_time.values == (0.091,)
    assert b6k.series.mask.origin == "derivatives"
    assert [Path(p).name for p in b6k.series.mask.images] == [
        "sub-01_acq-b6k_desc-brain_mask.nii.gz"
    ]
    assert all(j.eligible for j in pick(plan, "mcmicro", only=False))
    assert messages(plan, "warning").count("fitted without preprocessing") == 2
    assert "as ms" not in messages(plan, "warning")
    assert "mask" not in messages(plan, "warning")


def test_two_real_runs_joined(shared: Path, needs, pick) -> None:
    root = shared / "data/dwi_brain_mdt"
    options = Options(combine_dwi=True, derivatives={"masks": root / "derivatives/masks"})
    job = pick(discover(root, needs, options), "nexi")
    assert job.eligible
    assert job.series.entities == {}
    assert [r.big_delta.values[0] for r in job.series.dwi_runs] == [26.5, 42.0]
    assert list(job.series.images) == [r.image for r in job.series.dwi_runs]
    assert len(job.series.mask.images) == 2
    assert "RepetitionTime" not in job.series.metadata  # differs
    assert job.series.metadata["MagneticFieldStrength"] == 3


# -------------------------------------------------------------------------- gradients


def test_gradients_are_inherited(tree, pick) -> None:
    tree.image("sub-01/dwi/sub-01_dwi.nii.gz")
    tree.text("dwi.bval", "0 1000 2000")
    tree.text("dwi.bvec", "0 1 0\n0 0 1\n0 0 0\n")
    series = pick(tree.discover(), "mcmicro").series
    assert series.dwi_runs[0].bval == str(tree.root / "dwi.bval")
    tree.text("sub-01/dwi/sub-01_dwi.bval", "0 1000 1000")
    job = pick(tree.discover(), "mcmicro")
    assert "has 1 (b 1000 s/mm^2)" in job.reason


@pytest.mark.parametrize(
    ("bval", "bvec", "sentence"),
    [
        ("0 1000", "0 0\n0 1\n1 0", "ok"),
        ("0 1000 2000", "0 0\n0 1\n1 0", "has 2 directions, but `sub-01_dwi.bval` has 3"),
        ("0 1000", "0 0\n0 1", "must have 3 rows"),
        ("0 1000", "0 0\n0\n1 0", "must have 3 rows"),
        ("0 x", "0 0\n0 1\n1 0", "cannot be read as numbers"),
        ("", "", "one b-value from 0 up"),
        ("0 -5", "0 0\n0 1\n1 0", "one b-value from 0 up"),
        ("0 2.5 1 1 1 1", "0 0 0 0 0 0\n" * 3, "they look like ms/um^2"),
        ("0 5", "0 0\n0 1\n1 0", "no diffusion-weighted volume: the highest b-value is 5"),
        ("700 1000", "0 0\n0 1\n1 0", "no b=0 volume"),
    ],
)
def test_bad_gradients(tree, pick, bval: str, bvec: str, sentence: str) -> None:
    tree.image("sub-01/dwi/sub-01_dwi.nii.gz")
    tree.text("sub-01/dwi/sub-01_dwi.bval", bval)
    tree.text("sub-01/dwi/sub-01_dwi.bvec", bvec)
    reason = pick(tree.discover(), "mcmicro").reason
    assert ("has 1 (b 1000 s/mm^2)" if sentence == "ok" else sentence) in reason


@pytest.mark.parametrize("extension", [".bval", ".bvec"])
def test_gradients_that_are_no_text(tree, pick, extension: str) -> None:
    tree.dwi()
    path = tree.root / f"sub-01/dwi/sub-01_dwi{extension}"
    path.write_bytes(b"\xff\xfe0\x00")
    assert f"`{path.name}` cannot be read as numbers" in pick(tree.discover(), "mcmicro").reason
    path.unlink()
    path.mkdir()
    assert path.name in pick(tree.discover(), "mcmicro").reason


def test_b_values_at_the_threshold_are_b0(tree, pick) -> None:
    tree.dwi(bval="100 100 1000 1000 2000 2000")
    assert pick(tree.discover(b0_threshold=100.0), "mcmicro").eligible
    reason = pick(tree.discover(b0_threshold=2000.0), "mcmicro").reason
    assert "has no diffusion-weighted volume" in reason
    assert "has no b=0 volume" in pick(tree.discover(b0_threshold=99.9), "mcmicro").reason
    assert shells(np.array([0.0, 100, 1000]), [], 100) == [(1000.0,)]


def test_missing_gradient_file(tree, pick) -> None:
    tree.image("sub-01/dwi/sub-01_dwi.nii.gz")
    assert "No .bval file for `sub-01/dwi/sub-01_dwi.nii.gz`" in (
        pick(tree.discover(), "mcmicro").reason
    )


def test_directions_in_rows_or_columns(tree) -> None:
    bval = tree.text("a.bval", "0\n1000\n")
    rows = tree.text("a.bvec", "0 0 0\n0 1 0\n")
    columns = tree.text("b.bvec", "0 0\n0 1\n0 0\n")
    for bvec in (rows, columns):
        b, directions = read_gradients(bval, bvec)
        np.testing.assert_array_equal(b, [0, 1000])
        np.testing.assert_array_equal(directions, [[0, 0, 0], [0, 1, 0]])
    with pytest.raises(MetadataError, match="cannot be read"):
        read_gradients(tree.root / "none.bval", rows)


def test_shells_by_tolerance() -> None:
    b = np.array([0, 5, 995, 1000, 1010, 1995, 2005, 2700, 3050])
    assert [s[0] for s in shells(b, [None, None], 100)] == [
        pytest.approx(3005 / 3),
        2000,
        2700,
        3050,
    ]
    assert len(shells(b, [None, None], 1.0)) == 5
    delta = np.array([0, 0, 20, 20, 30, 20, 30, 20, 20])
    assert [s[:2] for s in shells(b, [delta, 5.0], 100)] == [
        (997.5, 20),
        (1995, 20),
        (2700, 20),
        (3050, 20),
        (1010, 30),
        (2005, 30),
    ]


def test_one_shell_and_no_times_is_said_at_once(tree, nexi) -> None:
    tree.dwi(bval="0 0 1000 1000 1000 1000")
    reason = nexi().reason
    assert reason.startswith("nexi needs at least 4 different shells")
    assert "Also, `SmallDelta` and `BigDelta` missing" in reason


def test_reversed_runs_of_b0_volumes_are_left_out(tree, other_tree, pick, messages) -> None:
    tree.dwi("sub-01/dwi/sub-01_dir-AP_dwi", FOUR_SHELLS, SmallDelta=0.01, BigDelta=0.02)
    tree.dwi("sub-01/dwi/sub-01_dir-PA_dwi", "0 0 0 0 0 0")
    for combine in (False, True):
        plan = tree.discover(combine_dwi=combine)
        job = pick(plan, "nexi")
        assert job.eligible
        assert job.series.entities == {"dir": "AP"}
        assert "`sub-01/dwi/sub-01_dir-PA_dwi.nii.gz` not used: b=0 volumes only" in (
            messages(plan, "info")
        )
    other_tree.dwi(PREPROC, bval=FOUR_SHELLS)
    job = pick(tree.discover(derivatives={"q": other_tree.root}), "nexi")
    assert job.series.dwi_runs[0].big_delta.values == (20.0,)


# -------------------------------------------------------------------- diffusion times


def test_seconds_from_the_sidecar(tree, nexi) -> None:
    tree.dwi(bval=FOUR_SHELLS, SmallDelta=0.0062, BigDelta=[0.02] * 6, EchoTime=[0.07] * 6)
    (run,) = nexi().series.dwi_runs
    assert run.small_delta.values == (6.2,)
    assert run.big_delta.values == (20.0,)
    assert run.big_delta.unit == "ms"
    assert run.echo_time.values == (0.07,)


def test_milliseconds_by_value_with_a_warning(tree, nexi, messages) -> None:
    tree.dwi(bval=FOUR_SHELLS, SmallDelta=14.2, LargeDelta=43.0)
    plan = tree.discover()
    (run,) = nexi().series.dwi_runs
    assert (run.small_delta.values, run.big_delta.values) == ((14.2,), (43.0,))
    warning = messages(plan, "warning")
    assert "`LargeDelta` in `sub-01/dwi/sub-01_dwi.json` is 43, which cannot be s" in warning
    assert "write 0.043 there." in warning
    assert ".." not in warning
    assumed = tree.discover(assume_ms=("SmallDelta", "LargeDelta"))
    assert "cannot be s" not in messages(assumed, "warning")


def test_times_per_volume_make_shells(tree, nexi) -> None:
    tree.dwi(
        bval="0 0 1000 1000 2000 2000", SmallDelta=0.01, BigDelta=[0, 0, 0.02, 0.03, 0.02, 0.03]
    )
    job = nexi()
    assert job.eligible
    assert job.series.dwi_runs[0].big_delta.values == (0, 0, 20, 30, 20, 30)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"SmallDelta": 0.01, "BigDelta": [0.02] * 5}, "`BigDelta` has 5 values in .* 6 volumes"),
        ({"SmallDelta": "0.01", "BigDelta": 0.02}, "`SmallDelta` in .* holds '0.01'"),
        ({"SmallDelta": True, "BigDelta": 0.02}, "holds True"),
        ({"SmallDelta": 0.01, "BigDelta": [0, 0, 0, 0.02, 0.02, 0.02]}, "is 0 to 0.02"),
        ({"SmallDelta": 0.01, "BigDelta": [0.02, 0.02, 20, 20, 20, 0.02]}, "is 0.02 to 20"),
        ({"SmallDelta": 0.01, "BigDelta": 21000}, "no diffusion time"),
        ({"SmallDelta": 0.03, "BigDelta": 0.02}, r"SmallDelta \(30 ms.* longer than BigDelta"),
        ({"SmallDelta": 0.01}, "`BigDelta` missing .* pass --big-delta 21ms"),
        ({"BigDelta": 0.02}, "`SmallDelta` missing .* pass --small-delta 6ms"),
    ],
)
def test_bad_times(tree, nexi, pick, fields: dict, sentence: str) -> None:
    tree.dwi(bval=FOUR_SHELLS, **fields)
    assert re.search(sentence, nexi().reason), nexi().reason
    assert pick(tree.discover(), "mcmicro").eligible


def test_order_of_sources(tree, nexi) -> None:
    """Command line, timing file, BigDelta, LargeDelta, text file: each hides the next."""
    tree.dwi(bval=FOUR_SHELLS)
    tree.text("dwi.smalldelta", "0.005\n")
    tree.text("sub-01/dwi/sub-01_dwi.bigdelta", "0 0 0.021 0.021 0.021 0.021")

    def times(**options: object) -> tuple:
        (run,) = nexi(**options).series.dwi_runs
        return run.small_delta.values, run.big_delta.values, run.big_delta.sources

    text = "sub-01/dwi/sub-01_dwi.bigdelta: BigDelta"
    assert times() == ((5.0,), (21.0,), (text,))
    tree.json("sub-01/dwi/sub-01_dwi.json", LargeDelta=0.022)
    assert times()[1:] == ((22.0,), ("sub-01/dwi/sub-01_dwi.json: LargeDelta",))
    tree.json("sub-01/dwi/sub-01_dwi.json", LargeDelta=0.022, BigDelta=0.023)
    assert times()[1:] == ((23.0,), ("sub-01/dwi/sub-01_dwi.json: BigDelta",))
    rows = "".join(f"{i}\tn/a\t{0.024 if i > 1 else 'n/a'}\n" for i in range(6))
    timing = tree.text("timing.tsv", "volume\tother\tBigDelta\n" + rows)
    assert times(timing_file=timing) == ((5.0,), (24.0,), ("timing.tsv: BigDelta",))
    given = times(timing_file=timing, big_delta_ms=25.0, small_delta_ms=4.0)
    assert given == ((4.0,), (25.0,), ("--big-delta",))


def test_timing_file_in_any_order(tree, nexi) -> None:
    tree.dwi(bval=FOUR_SHELLS)
    order = [6, 1, 2, 3, 4, 5]  # counted from 1
    rows = "".join(f"{i}\t0.004\t{0.02 + i / 1000}\t{0.06 + i / 1000}\n" for i in order)
    timing = tree.text("t.tsv", "volume\tSmallDelta\tBigDelta\tEchoTime\n" + rows)
    (run,) = nexi(timing_file=timing).series.dwi_runs
    assert run.big_delta.values == pytest.approx((21, 22, 23, 24, 25, 26))
    assert run.echo_time.values == pytest.approx((0.061, 0.062, 0.063, 0.064, 0.065, 0.066))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("volume\tBigDelta\n0\t0.02\n", "a row for each of the 6 volumes; it has 1 rows"),
        ("BigDelta\n" + "0.02\n" * 6, "must have the columns volume"),
        ("volume\tBigDelta\n" + "0\t0.02\n" * 6, "must count from 0"),
        ("", "it has 0 rows"),
    ],
)
def test_bad_timing_file(tree, nexi, content: str, sentence: str) -> None:
    tree.dwi(bval=FOUR_SHELLS, SmallDelta=0.01, BigDelta=0.02)
    assert sentence in nexi(timing_file=tree.text("t.tsv", content)).reason


def test_a_timing_file_that_is_no_text(tree, nexi) -> None:
    tree.dwi(bval=FOUR_SHELLS)
    path = tree.root / "t.tsv"
    path.write_bytes(b"volume\tBigDelta\n0\t\xff\n")
    assert f"Timing file {path} cannot be read" in nexi(timing_file=path).reason
    path.write_text("volume\tBigDelta\n0\t" + "1" * 200_000)
    assert f"Timing file {path} cannot be read" in nexi(timing_file=path).reason


def test_an_option_that_differs_from_the_files_is_said(tree, other_tree, messages, nexi) -> None:
    tree.dwi(bval=FOUR_SHELLS, SmallDelta=0.01, LargeDelta=[0, 0, 0.02, 0.02, 0.02, 0.06])
    plan = tree.discover(small_delta_ms=10.0, big_delta_ms=30.0)
    warning = messages(plan, "warning")
    assert (
        "`LargeDelta` is 20 to 60 ms in `sub-01/dwi/sub-01_dwi.json`; --big-delta 30 ms is used "
        "instead." in warning
    )
    assert "SmallDelta" not in warning
    run = nexi(small_delta_ms=10.0, big_delta_ms=30.0).series.dwi_runs[0]
    assert (run.big_delta.values, run.big_delta.sources) == ((30.0,), ("--big-delta",))
    tree.json("sub-01/dwi/sub-01_dwi.json", SmallDelta="long", BigDelta=0.06)
    plan = tree.discover(small_delta_ms=10.0, big_delta_ms=60.0)
    warning = messages(plan, "warning")
    assert "`SmallDelta` in `sub-01/dwi/sub-01_dwi.json` holds 'long'" in warning
    assert "--small-delta 10 ms is used instead" in warning
    assert "BigDelta" not in warning
    other_tree.dwi(PREPROC, bval=FOUR_SHELLS)  # the times of its raw run are looked at as well
    given = {"small_delta_ms": 10.0, "big_delta_ms": 30.0}
    plan = tree.discover(derivatives={"q": other_tree.root}, **given)
    assert "`BigDelta` is 60 ms in `sub-01/dwi/sub-01_dwi.json`" in messages(plan, "warning")


def test_one_option_cannot_replace_times_that_differ_between_joined_runs(tree, pick) -> None:
    for name, delta in (("1", 0.02), ("2", 0.06)):
        stem = f"sub-01/dwi/sub-01_run-{name}_dwi"
        tree.dwi(stem, bval=FOUR_SHELLS, SmallDelta=0.01, BigDelta=delta)
    given = {"small_delta_ms": 10.0, "big_delta_ms": 30.0, "combine_dwi": True}
    plan = tree.discover(**given)
    reason = pick(plan, "nexi").reason
    assert "--big-delta would replace times that differ between the runs" in reason
    assert "20 ms (sub-01/dwi/sub-01_run-1_dwi.json: BigDelta) and 60 ms (" in reason
    assert "nexi" in {f.model for f in plan.findings if f.severity == "error"}
    assert pick(plan, "mcmicro").eligible  # needs no times
    assert pick(tree.discover(small_delta_ms=12.0, combine_dwi=True), "nexi").eligible
    tree.json("sub-01/dwi/sub-01_run-2_dwi.json", SmallDelta=0.01, BigDelta=[0.02] * 6)
    assert pick(tree.discover(**given), "nexi").eligible  # the same time, written otherwise


def test_echo_time_in_ms_is_refused(tree, pick) -> None:
    tree.dwi(EchoTime=85)
    assert "`EchoTime` is 85" in pick(tree.discover(), "mcmicro").reason
    (run,) = pick(tree.discover(assume_ms=("EchoTime",)), "mcmicro").series.dwi_runs
    assert run.echo_time.values == (0.085,)


# ----------------------------------------------------------------------- preprocessed


def _qsiprep(listing: Path, other_tree) -> None:
    for line in listing.read_text().split():
        if "." in Path(line).name and not line.endswith((".bval", ".bvec")):
            other_tree.text(line, "{}" if line.endswith(".json") else "")
        elif line.endswith(".bval"):
            other_tree.text(line, FOUR_SHELLS)
        elif line.endswith(".bvec"):
            other_tree.text(line, "0 0 1 0 0 1\n0 0 0 1 0 0\n0 0 0 0 1 0\n")


def test_qsiprep_listing_with_raw_times(shared: Path, tree, other_tree, pick, messages) -> None:
    """A whole QSIPrep output: dwi in a session, anatomy at the level of the subject."""
    _qsiprep(
        shared / "data/derivative_listings/qsiprep_maternal_brain_project_outputs.txt", other_tree
    )
    stem = "sub-01/ses-01/dwi/sub-01_ses-01"
    for direction in ("AP", "PA"):
        tree.dwi(f"{stem}_dir-{direction}_dwi", FOUR_SHELLS, SmallDelta=0.01, BigDelta=0.03)
    plan = tree.discover(derivatives={"qsiprep": other_tree.root})
    job = pick(plan, "nexi")
    assert job.eligible
    series = job.series
    assert (series.entities, series.session, series.preprocessed) == (
        {"space": "ACPC"},
        "01",
        True,
    )
    assert series.images == (str(other_tree.root / f"{stem}_space-ACPC_desc-preproc_dwi.nii.gz"),)
    assert series.mask.images == (
        str(other_tree.root / f"{stem}_space-ACPC_desc-brain_mask.nii.gz"),
    )
    assert series.spatial_reference == (
        "bids:qsiprep:sub-01/anat/sub-01_space-ACPC_desc-preproc_T1w.nii.gz"
    )
    (run,) = series.dwi_runs
    assert run.big_delta.sources == (f"{stem}_dir-AP_dwi.json: BigDelta",)
    assert [(a.name, Path(a.image).name) for a in series.atlases] == [
        ("aseg", "sub-01_space-ACPC_desc-aseg_dseg.nii.gz"),
        ("qsiprep", "sub-01_space-ACPC_dseg.nii.gz"),
    ]
    assert "without preprocessing" not in messages(plan, "warning")
    info = messages(plan, "info")
    assert f"`{stem}_dir-PA_dwi.nii.gz` not used: the session has preprocessed dwi" in info


def test_qsiprep_output_as_the_dataset(shared: Path, other_tree, pick) -> None:
    _qsiprep(shared / "data/derivative_listings/qsiprep_dsdti_topup_outputs.txt", other_tree)
    job = pick(other_tree.discover(), "mcmicro")
    assert job.eligible
    assert job.series.preprocessed
    assert job.series.entities == {"acq": "realistic", "space": "ACPC"}
    assert job.series.mask.origin == "derivatives"
    reason = pick(other_tree.discover(), "nexi").reason
    assert "`SmallDelta` and `BigDelta` missing" in reason


def test_old_qsiprep_space(tree, other_tree, pick) -> None:
    tree.dwi()
    other_tree.dwi("sub-01/dwi/sub-01_space-T1w_desc-preproc_dwi")
    other_tree.dwi("sub-01/dwi/sub-01_space-MNI152NLin2009cAsym_desc-preproc_dwi")
    other_tree.image("sub-01/anat/sub-01_desc-preproc_T1w.nii.gz")
    series = pick(tree.discover(derivatives={"q": other_tree.root}), "mcmicro").series
    assert series.entities == {"space": "T1w"}
    assert series.spatial_reference == "bids:q:sub-01/anat/sub-01_desc-preproc_T1w.nii.gz"


def test_look_back_takes_the_run_of_the_same_entities(tree, other_tree, nexi) -> None:
    for acq, delta in (("a", 0.02), ("b", 0.03)):
        tree.dwi(f"sub-01/dwi/sub-01_acq-{acq}_dwi", SmallDelta=0.01, BigDelta=delta)
    other_tree.dwi("sub-01/dwi/sub-01_acq-b_space-ACPC_desc-preproc_dwi", bval=FOUR_SHELLS)
    (run,) = nexi(derivatives={"q": other_tree.root}).series.dwi_runs
    assert run.big_delta.values == (30.0,)


def test_missing_everywhere_names_the_raw_run(tree, other_tree, nexi) -> None:
    tree.dwi()
    other_tree.dwi(PREPROC, bval=FOUR_SHELLS)
    reason = nexi(derivatives={"q": other_tree.root}).reason
    assert "sub-01_dwi.json (no such file) of the raw run" in reason


def test_preprocessed_without_sessions_replaces_raw_runs_of_sessions(
    tree, other_tree, pick, messages
) -> None:
    for session in ("1", "2"):
        stem = f"sub-01/ses-{session}/dwi/sub-01_ses-{session}_dwi"
        tree.dwi(stem, bval=FOUR_SHELLS, SmallDelta=0.01, BigDelta=0.02)
    other_tree.dwi(PREPROC, bval=FOUR_SHELLS)
    plan = tree.discover(derivatives={"q": other_tree.root})
    jobs = {j.series.session: j for j in pick(plan, "nexi", only=False)}
    assert [s for s, j in jobs.items() if j.eligible] == [""]
    assert jobs[""].series.preprocessed
    assert jobs[""].series.dwi_runs[0].big_delta.values == (20.0,)  # from the raw runs
    for session in ("1", "2"):
        assert jobs[session].cause == "absent"
        assert (
            f"sub-01/ses-{session} model nexi skipped: the preprocessed dwi of the subject is "
            f"outside its sessions (`q:{PREPROC}.nii.gz`)" in messages(plan, "info")
        )
    one = tree.discover(derivatives={"q": other_tree.root}, session_labels=("1",))
    assert "without --session-label" in pick(one, "nexi").reason


def test_preprocessed_in_a_session_replaces_raw_runs_outside(
    tree, other_tree, pick, messages
) -> None:
    tree.dwi(bval=FOUR_SHELLS, SmallDelta=0.01, BigDelta=0.02)
    stem = "sub-01/ses-1/dwi/sub-01_ses-1_space-ACPC_desc-preproc_dwi"
    other_tree.dwi(stem, bval=FOUR_SHELLS)
    plan = tree.discover(derivatives={"q": other_tree.root})
    jobs = {j.series.session: j for j in pick(plan, "nexi", only=False)}
    assert [s for s, j in jobs.items() if j.eligible] == ["1"]
    assert jobs["1"].series.dwi_runs[0].big_delta.values == (20.0,)
    assert "the preprocessed dwi of the subject is in its sessions" in messages(plan, "info")


def test_raw_runs_of_a_session_that_was_not_preprocessed_stay(tree, other_tree, pick) -> None:
    for session in ("1", "2"):
        tree.dwi(f"sub-01/ses-{session}/dwi/sub-01_ses-{session}_dwi")
    other_tree.dwi("sub-01/ses-1/dwi/sub-01_ses-1_space-ACPC_desc-preproc_dwi")
    jobs = pick(tree.discover(derivatives={"q": other_tree.root}), "mcmicro", only=False)
    assert [(j.series.session, j.series.preprocessed) for j in jobs] == [("1", True), ("2", False)]


def test_two_preprocessed_datasets(tree, other_tree, pick, messages) -> None:
    tree.dwi(PREPROC)
    other_tree.dwi(PREPROC)
    plan = tree.discover(derivatives={"q": other_tree.root})
    assert pick(plan, "mcmicro").series.images[0].startswith(str(other_tree.root))
    assert f"`{PREPROC}.nii.gz` not used" in messages(plan, "info")


# ----------------------------------------------------------------------------- joined


def test_joined_runs_keep_common_entities_and_spaces_apart(tree, pick) -> None:
    for run, delta in (("1", 0.02), ("2", 0.03)):
        stem = f"sub-01/dwi/sub-01_acq-x_run-{run}"
        tree.dwi(f"{stem}_space-ACPC_desc-preproc_dwi", SmallDelta=0.01, BigDelta=delta)
    tree.dwi("sub-01/dwi/sub-01_acq-x_space-T1w_desc-preproc_dwi", SmallDelta=0.01, BigDelta=0.04)
    jobs = pick(tree.discover(combine_dwi=True), "nexi", only=False)
    assert [(j.series.entities, len(j.series.dwi_runs), j.eligible) for j in jobs] == [
        ({"acq": "x", "space": "ACPC"}, 2, True),
        ({"acq": "x", "space": "T1w"}, 1, False),
    ]


def test_joined_runs_with_the_same_shells_count_once(tree, pick) -> None:
    for run in "12":
        tree.dwi(f"sub-01/dwi/sub-01_run-{run}_dwi", SmallDelta=0.01, BigDelta=0.02)
    assert "and its like have 2 (b 1000" in pick(tree.discover(combine_dwi=True), "nexi").reason


def test_one_bad_run_stops_the_joined_series(tree, pick) -> None:
    tree.dwi("sub-01/dwi/sub-01_run-1_dwi")
    tree.dwi("sub-01/dwi/sub-01_run-2_dwi", bval="0 1000")
    apart = pick(tree.discover(), "mcmicro", only=False)
    assert [j.eligible for j in apart] == [True, False]
    assert "sub-01_run-2_dwi.bval" in pick(tree.discover(combine_dwi=True), "mcmicro").reason


def test_models_of_several_echo_times(tree, pick) -> None:
    need = ModelNeeds("axonalt2", "dwi", minimum_measurements=2, minimum_echo_times=2)

    def job(**options):
        return pick(discover(tree.root, (need,), Options(**options)), "axonalt2", only=False)

    tree.dwi("sub-01/dwi/sub-01_acq-a_dwi", EchoTime=0.07)
    assert "different echo times, but `sub-01/dwi/sub-01_acq-a_dwi.nii.gz` has 70.0 ms only" in (
        job()[0].reason
    )
    assert "--combine-dwi" in job()[0].reason
    tree.dwi("sub-01/dwi/sub-01_acq-b_dwi", EchoTime=0.09)
    assert not any(j.eligible for j in job())
    (joined,) = job(combine_dwi=True)
    assert joined.eligible


def test_an_unknown_echo_time_is_not_taken_for_several(tree, pick) -> None:
    tree.dwi()
    need = ModelNeeds("axonalt2", "dwi", minimum_measurements=2, minimum_echo_times=2)
    job = pick(discover(tree.root, (need,), Options()), "axonalt2")
    assert "has no EchoTime" in job.reason
