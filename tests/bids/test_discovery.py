"""Series, sessions, participants, filters: what is found and what is said about the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bids_gacelle.bids.discovery import ModelNeeds, Options, discover
from bids_gacelle.bids.queries import load_filter_file
from bids_gacelle.bids.series import series_from_json, to_json
from bids_gacelle.errors import InputError

# model: "" (eligible) or the start of the reason, for every unit of the tree
SINGLE_SHELL = {
    "mcmicro": "mcmicro needs at least 2 different shells",
    "nexi": "nexi needs at least 4 different shells",
}


def _nothing(place: str, **other: str) -> dict[str, str]:
    return {
        "r2star": f"no MEGRE images in {place}/anat",
        "despot1": f"no VFA images in {place}/anat",
        "mcmicro": f"no dwi images in {place}/dwi",
        "nexi": f"no dwi images in {place}/dwi",
    } | other


EXAMPLES = {
    "ds000001-fmriprep": {(s, ""): _nothing(f"sub-{s}") for s in ("10", "11", "13", "16")},
    "ds114": {
        (f"{s:02d}", ses): _nothing(f"sub-{s:02d}/ses-{ses}", **SINGLE_SHELL)
        for s in range(1, 11)
        for ses in ("retest", "test")
    },
    "dwi_deriv": {("01", ""): _nothing("sub-01", **SINGLE_SHELL)},
    "qmri_megre": {("01", ""): _nothing("sub-01", r2star="")},
    "qmri_mpm": {("01", ""): _nothing("sub-01", r2star="", despot1="")},
    "qmri_qsm": {("01", ""): _nothing("sub-01")},
    "qmri_tb1tfl": {("01", ""): _nothing("sub-01")},
    "qmri_vfa": {("01", ""): _nothing("sub-01", despot1="")},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_public_example(shared: Path, needs, name: str) -> None:
    plan = discover(shared / "data/bids_examples" / name, needs, Options())
    expected = EXAMPLES[name]
    found = {(j.series.subject, j.series.session, j.model): j.reason for j in plan.jobs}
    contrasts = 2 if name == "qmri_mpm" else 0  # beyond the first, each a job of r2star
    assert len(found) == len(plan.jobs) - contrasts == sum(map(len, expected.values()))
    for (subject, session), models in expected.items():
        for model, reason in models.items():
            got = found[subject, session, model]
            assert got.startswith(reason) if reason else got == "", (subject, session, model, got)
            if reason.startswith("no "):
                assert got == reason


def test_example_values(shared: Path, needs, pick) -> None:
    examples = shared / "data/bids_examples"
    megre = pick(discover(examples / "qmri_megre", needs, Options()), "r2star").series
    assert megre.echo_time.values == tuple(round(0.02 * i, 2) for i in range(1, 9))
    assert [Path(p).name[7:14] for p in megre.images] == [f"echo-0{i}" for i in range(1, 9)]
    assert megre.metadata["MagneticFieldStrength"] == 3
    vfa = pick(discover(examples / "qmri_vfa", needs, Options()), "despot1").series
    assert vfa.flip_angle.values == (3, 20)
    assert vfa.repetition_time.values == (0.015, 0.015)
    assert vfa.metadata["PulseSequenceType"] == "SPGR"  # only in VFA.json at the root


def test_example_messages(shared: Path, needs, messages) -> None:
    examples = shared / "data/bids_examples"
    plan = discover(examples / "qmri_vfa", needs, Options())
    assert "no B1 map" in messages(plan, "warning")
    assert "TB1AFI images are there but not used" in messages(plan, "info")
    assert "derivatives/qMRLab in the dataset not used" in messages(plan, "info")
    assert f"-d qMRLab={examples / 'qmri_vfa/derivatives/qMRLab'}" in messages(plan, "info")
    derived = {"qMRLab": examples / "qmri_vfa/derivatives/qMRLab"}
    plan = discover(examples / "qmri_vfa", needs, Options(derivatives=derived))
    assert "B1" not in messages(plan, "info")
    assert 'no "Units" in a sidecar of `qMRLab:sub-01/fmap/sub-01_TB1map.nii.gz`' in messages(
        plan, "warning"
    )


def test_poison_of_tb1tfl(shared: Path, needs) -> None:
    plan = discover(shared / "data/bids_examples/qmri_tb1tfl", needs, Options())
    errors = [f for f in plan.findings if f.severity == "error"]
    assert {(Path(f.file).name, f.field) for f in errors} == {
        (f"sub-01_acq-{acq}_TB1TFL.json", field)
        for acq in ("anat", "famp")
        for field in ("EchoTime", "RepetitionTimeExcitation")
    }
    for finding in errors:
        value = "1.97" if finding.field == "EchoTime" else '"6.8"'
        assert f"`{finding.field}` is {value} in `sub-01/fmap/" in finding.message
        assert "probably ms" in finding.message
        assert ("a string" in finding.message) == (finding.field != "EchoTime")
    fixed = Options(assume_ms=("EchoTime", "RepetitionTimeExcitation"))
    plan = discover(shared / "data/bids_examples/qmri_tb1tfl", needs, fixed)
    assert not [f for f in plan.findings if f.severity == "error"]


# ---------------------------------------------------------------------- gradient echo


def test_echoes_are_sorted_by_echo_time(tree, pick) -> None:
    tree.megre(times=(0.012, 0.004, 0.008))
    series = pick(tree.discover(), "r2star").series
    assert series.echo_time.values == (0.004, 0.008, 0.012)
    assert [Path(p).name for p in series.images] == [
        f"sub-01_echo-{i}_MEGRE.nii.gz" for i in (2, 3, 1)
    ]
    assert series.echo_time.sources == tuple(
        f"sub-01/anat/sub-01_echo-{i}_MEGRE.json" for i in (2, 3, 1)
    )


def test_phase_alone_is_explained(tree, pick) -> None:
    tree.image("sub-01/anat/sub-01_echo-1_part-phase_MEGRE.nii", EchoTime=0.01)
    assert "only part-phase images are there" in pick(tree.discover(), "r2star").reason


def test_runs_and_acquisitions_are_series(tree, pick) -> None:
    for name in ("acq-hi_run-01", "acq-hi_run-02", "acq-lo"):
        tree.megre(f"sub-01/anat/sub-01_{name}")
    jobs = pick(tree.discover(), "r2star", only=False)
    assert [j.series.entities for j in jobs] == [
        {"acq": "hi", "run": "01"},
        {"acq": "hi", "run": "02"},
        {"acq": "lo"},
    ]
    assert all(len(j.series.images) == 3 and j.eligible for j in jobs)


def test_one_echo_is_too_few(tree, pick) -> None:
    tree.megre(times=(0.004,))
    assert "r2star needs at least 2 different echoes" in pick(tree.discover(), "r2star").reason


def test_equal_echo_times_are_refused(tree, pick) -> None:
    tree.json("MEGRE.json", EchoTime=0.004)
    for echo in (1, 2):
        tree.image(f"sub-01/anat/sub-01_echo-{echo}_MEGRE.nii")
    reason = pick(tree.discover(), "r2star").reason
    assert "same EchoTime 0.004 s (from MEGRE.json and MEGRE.json)" in reason


def test_missing_echo_time_says_where_it_looked(tree) -> None:
    tree.json("MEGRE.json", MagneticFieldStrength=3)
    tree.image("sub-01/anat/sub-01_echo-1_MEGRE.nii.gz")
    tree.image("sub-01/anat/sub-01_echo-2_MEGRE.nii.gz", EchoTime=0.01)
    plan = tree.discover()
    (finding,) = (f for f in plan.findings if f.severity == "error")
    assert finding.message == (
        "sub-01 megre model r2star skipped: `EchoTime` missing for "
        "`sub-01/anat/sub-01_echo-1_MEGRE.nii.gz`. Looked in: sub-01_echo-1_MEGRE.json (no such "
        'file), MEGRE.json (root). Add e.g. "EchoTime": 0.004 (s) to sub-01_echo-1_MEGRE.json.'
    )
    assert (finding.subject, finding.model, finding.field) == ("01", "r2star", "EchoTime")
    assert finding.file == str(tree.root / "sub-01/anat/sub-01_echo-1_MEGRE.nii.gz")


def test_broken_sidecar_stops_only_its_series(tree, pick) -> None:
    tree.megre()
    tree.text("sub-01/anat/sub-01_echo-2_MEGRE.json", '{"EchoTime": 0.008')
    tree.vfa()
    plan = tree.discover()
    assert "`sub-01/anat/sub-01_echo-2_MEGRE.json` cannot be read as JSON" in (
        pick(plan, "r2star").reason
    )
    assert pick(plan, "despot1").eligible


@pytest.mark.parametrize(
    "content",
    [
        '{"EchoTime": 0.008, "Manufacturer": "M\xe4"}'.encode("latin-1"),
        b"[" * 100_000,
        b'{"EchoTime": 1' + b"0" * 400 + b"}",
    ],
)
def test_odd_sidecars_are_named(tree, pick, content: bytes) -> None:
    tree.megre()
    (tree.root / "sub-01/anat/sub-01_echo-2_MEGRE.json").write_bytes(content)
    assert "`sub-01/anat/sub-01_echo-2_MEGRE.json`" in pick(tree.discover(), "r2star").reason


@pytest.mark.parametrize("name", ["dataset_description.json", "participants.tsv"])
def test_odd_files_of_the_dataset_do_no_harm(tree, pick, name: str) -> None:
    tree.megre()
    (tree.root / name).write_bytes(b'{"Name": "\xff"}')
    assert pick(tree.discover(), "r2star").eligible


def test_vfa_with_inherited_repetition_time(tree, pick) -> None:
    tree.json("VFA.json", RepetitionTimeExcitation=0.02, PulseSequenceType="SPGR")
    tree.json("sub-01/sub-01_VFA.json", RepetitionTimeExcitation=0.01)
    tree.image("sub-01/anat/sub-01_flip-1_VFA.nii", FlipAngle=20, RepetitionTimeExcitation=0.03)
    tree.image("sub-01/anat/sub-01_flip-2_VFA.nii", FlipAngle=3)
    series = pick(tree.discover(), "despot1").series
    assert series.flip_angle.values == (3, 20)
    assert series.repetition_time.values == (0.01, 0.03)
    assert series.repetition_time.sources == (
        "sub-01/sub-01_VFA.json",
        "sub-01/anat/sub-01_flip-1_VFA.json",
    )
    assert series.images[0].endswith("flip-2_VFA.nii")


def test_balanced_ssfp_is_refused(tree, pick) -> None:
    tree.json("VFA.json", PulseSequenceType="SSFP")
    tree.vfa()
    reason = pick(tree.discover(), "despot1").reason
    assert "`PulseSequenceType` is 'SSFP' in `VFA.json`" in reason
    assert "DESPOT2" in reason


def test_repetition_time_is_not_guessed(tree, pick) -> None:
    for flip in (1, 2):
        tree.image(
            f"sub-01/anat/sub-01_flip-{flip}_VFA.nii", FlipAngle=9 * flip, RepetitionTime=0.02
        )
    reason = pick(tree.discover(), "despot1").reason
    assert "`RepetitionTimeExcitation` missing" in reason
    assert '"RepetitionTime": 0.02' in reason


def test_mpm_contrast_by_filter(tree, pick) -> None:
    for acq, flip in (("PDw", 1), ("T1w", 2)):
        for echo in (1, 2):
            tree.image(
                f"sub-01/anat/sub-01_acq-{acq}_echo-{echo}_flip-{flip}_mt-off_MPM.nii",
                EchoTime=echo / 100,
            )
    reason = pick(tree.discover(), "r2star").reason
    assert "MPM images acq-PDw have 2 echoes only" in reason
    jobs = pick(tree.discover(filters={"megre": {"suffix": "MPM"}}), "r2star", only=False)
    assert [(j.series.entities, j.reason) for j in jobs] == [
        ({"acq": "PDw"}, ""),
        ({"acq": "T1w"}, ""),
    ]


def test_entities_that_maps_cannot_keep(tree, pick) -> None:
    tree.megre("sub-01/anat/sub-01_stain-x")
    assert "outputs cannot keep stain" in pick(tree.discover(), "r2star").reason


# ----------------------------------------------------- participants, sessions, datasets


def test_sessions_are_units(tree) -> None:
    tree.megre("sub-01/ses-a/anat/sub-01_ses-a")
    tree.vfa("sub-01/ses-b/anat/sub-01_ses-b")
    tree.megre("sub-02/anat/sub-02")
    plan = tree.discover()
    eligible = [(j.series.subject, j.series.session, j.model) for j in plan.jobs if j.eligible]
    assert eligible == [("01", "a", "r2star"), ("01", "b", "despot1"), ("02", "", "r2star")]
    assert len(plan.jobs) == 3 * 4
    one = tree.discover(session_labels=("ses-b",), participant_labels=("sub-01",))
    assert {(j.series.subject, j.series.session) for j in one.jobs} == {("01", "b")}


def test_a_participant_without_the_session_is_listed(tree, messages) -> None:
    tree.megre("sub-01/ses-1/anat/sub-01_ses-1")
    tree.megre("sub-03/ses-2/anat/sub-03_ses-2")
    tree.megre("sub-04/anat/sub-04")
    plan = tree.discover(session_labels=("1",))
    found = {(j.series.subject, j.model): (j.reason, j.cause) for j in plan.jobs}
    assert found["01", "r2star"] == ("", "")
    for subject in ("03", "04"):
        for model in ("r2star", "despot1", "mcmicro", "nexi"):
            assert found[subject, model] == ("no session ses-1", "absent")
    assert "sub-03/ses-1 model r2star skipped: no session ses-1." in messages(plan, "info")
    assert not messages(plan, "error")
    both = tree.discover(session_labels=("1", "2"), participant_labels=("03",))
    eligible = [j.series.session for j in both.jobs if j.eligible]
    assert eligible == ["2"]
    assert {j.reason for j in both.jobs if j.series.session == "1"} == {"no session ses-1"}


def test_only_asked_participants_are_indexed(tree) -> None:
    for subject in ("01", "011", "02"):
        tree.megre(f"sub-{subject}/anat/sub-{subject}")
    plan = tree.discover(participant_labels=("01",))
    assert {j.series.subject for j in plan.jobs} == {"01"}


@pytest.mark.parametrize("label", ["sub-04", "04"])
def test_unknown_participant(tree, label: str) -> None:
    tree.megre()
    with pytest.raises(InputError, match=r"No participant '04' in .*; it has 1: 01\.$"):
        tree.discover(participant_labels=(label,))


def test_unknown_session(tree) -> None:
    tree.megre("sub-01/ses-a/anat/sub-01_ses-a")
    with pytest.raises(InputError, match=r"No session 'x' in .*; it has 1: a\."):
        tree.discover(session_labels=("x",))


def test_no_dataset(tree) -> None:
    with pytest.raises(InputError, match="does not exist"):
        tree.discover()
    tree.text("README", "")
    with pytest.raises(InputError, match="no folder sub-<label>"):
        tree.discover()
    with pytest.raises(InputError, match="is a file"):
        discover(tree.root / "README", (), Options())


def test_database_serves_other_participants_later(tree, tmp_path: Path) -> None:
    for subject in ("01", "02"):
        tree.megre(f"sub-{subject}/anat/sub-{subject}")
    database = tmp_path / "db"
    first = tree.discover(database_dir=database, participant_labels=("01",))
    assert (database / "raw").is_dir()
    second = tree.discover(database_dir=database, participant_labels=("02",))
    for plan, subject in ((first, "01"), (second, "02")):
        assert [j.series.subject for j in plan.jobs if j.eligible] == [subject]


def test_database_is_renewed_when_it_is_too_old_or_of_another_dataset(
    tree, other_tree, tmp_path: Path
) -> None:
    options = {"database_dir": tmp_path / "db"}
    tree.megre()
    tree.discover(**options)
    tree.vfa("sub-02/anat/sub-02")
    assert [j.model for j in tree.discover(**options).jobs if j.eligible] == ["r2star", "despot1"]
    other_tree.vfa()
    assert [j.model for j in other_tree.discover(**options).jobs if j.eligible] == ["despot1"]


def test_database_sees_what_changed_since(tree, pick, tmp_path: Path) -> None:
    options = {"database_dir": tmp_path / "db"}
    tree.megre("sub-01/ses-a/anat/sub-01_ses-a")
    tree.discover(**options)
    tree.megre("sub-01/ses-b/anat/sub-01_ses-b")  # a session
    plan = tree.discover(**options)
    assert [j.series.session for j in plan.jobs if j.eligible] == ["a", "b"]
    tree.vfa("sub-01/ses-a/anat/sub-01_ses-a")  # images in a folder that was there
    tree.json("sub-01/ses-b/anat/sub-01_ses-b_echo-2_MEGRE.json", EchoTime=0.009)  # content
    plan = tree.discover(**options)
    assert [j.series.session for j in plan.jobs if j.model == "despot1" and j.eligible] == ["a"]
    second = pick(plan, "r2star", only=False)[1]
    assert second.series.echo_time.values == (0.004, 0.009, 0.012)
    (tree.root / "sub-01/ses-b/anat/sub-01_ses-b_echo-3_MEGRE.nii.gz").unlink()
    second = pick(tree.discover(**options), "r2star", only=False)[1]
    assert second.series.echo_time.values == (0.004, 0.009)


def test_database_is_kept_while_nothing_changes(tree, tmp_path: Path) -> None:
    tree.megre()
    tree.discover(database_dir=tmp_path / "db")
    index = tmp_path / "db/raw/layout_index.sqlite"
    before = index.stat().st_ino, index.stat().st_mtime_ns
    tree.discover(database_dir=tmp_path / "db")
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == before


@pytest.mark.parametrize("keep", [True, False])
def test_description_that_cannot_be_read(tree, pick, tmp_path: Path, keep: bool) -> None:
    tree.megre()
    (tree.root / "dataset_description.json").mkdir()
    for _ in range(2):
        plan = tree.discover(database_dir=tmp_path / "db" if keep else None)
        assert pick(plan, "r2star").eligible


def test_database_that_cannot_be_kept(tree, tmp_path: Path) -> None:
    tree.megre()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--bids-database-dir: .* give another folder"):
        tree.discover(database_dir=tmp_path / "file/db")
    tree.discover(database_dir=tmp_path / "db")
    (tmp_path / "db/raw/layout_index.sqlite").write_text("no database" * 100)
    with pytest.raises(InputError, match="file is not a database"):
        tree.discover(database_dir=tmp_path / "db")


def test_relative_paths(tree, other_tree, pick, monkeypatch) -> None:
    tree.megre()
    other_tree.image("sub-01/anat/sub-01_desc-brain_mask.nii.gz")
    monkeypatch.chdir(tree.root.parent)
    given = Options(derivatives={"x": Path(other_tree.root.name)})
    series = pick(
        discover(Path(tree.root.name), (ModelNeeds("r2star", "megre"),), given), "r2star"
    ).series
    assert Path(series.images[0]).is_absolute()
    assert series.mask.images == (
        str(other_tree.root / "sub-01/anat/sub-01_desc-brain_mask.nii.gz"),
    )


def test_derivatives_without_the_participants(tree, other_tree, messages) -> None:
    tree.megre()
    other_tree.image("qsiprep/sub-01/dwi/sub-01_space-ACPC_desc-preproc_dwi.nii.gz")
    plan = tree.discover(derivatives={"x": other_tree.root})
    assert f"-d x={other_tree.root} has no image of the participants" in messages(plan, "warning")


@pytest.mark.parametrize(
    "description",
    [
        None,
        "not JSON",
        '{"DatasetType": "derivative"}',
        '{"DatasetType": "derivative", "GeneratedBy": {"Name": "x"}}',
        '{"PipelineDescription": {"Name": "x"}, "DatasetType": "derivative"}',
        "[]",
    ],
)
def test_odd_dataset_descriptions(tree, other_tree, pick, description: str | None) -> None:
    tree.megre()
    other_tree.image("sub-01/anat/sub-01_desc-brain_mask.nii.gz")
    if description:
        tree.text("dataset_description.json", description)
        other_tree.text("dataset_description.json", description)
    plan = tree.discover(derivatives={"x": other_tree.root})
    assert pick(plan, "r2star").series.mask.origin == "derivatives"
    assert plan.datasets == {"raw": str(tree.root), "x": str(other_tree.root)}


def test_series_survive_json(tree, pick) -> None:
    tree.vfa()
    tree.dwi(SmallDelta=0.01, BigDelta=[0.02] * 6, EchoTime=0.08)
    for job in tree.discover().jobs:
        assert series_from_json(json.loads(json.dumps(to_json(job.series)))) == job.series


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_b0_threshold_that_makes_no_sense(tree, threshold: float) -> None:
    tree.dwi()
    with pytest.raises(InputError, match=r"--b0-threshold .*0 or more"):
        tree.discover(b0_threshold=threshold)


def test_unknown_assumption_and_reserved_name(tree) -> None:
    tree.megre()
    with pytest.raises(InputError, match="--assume-ms Echotime"):
        tree.discover(assume_ms=("Echotime",))
    with pytest.raises(InputError, match="raw stands for the dataset itself"):
        tree.discover(derivatives={"raw": tree.root})
    with pytest.raises(InputError, match="there is no such folder"):
        tree.discover(derivatives={"x": tree.root / "x"})


# -------------------------------------------------------------------------- filters


def test_filters(tree, pick) -> None:
    tree.megre("sub-01/anat/sub-01_acq-hi_run-01")
    tree.megre("sub-01/anat/sub-01_acq-lo")
    tree.megre("sub-01/anat/sub-01")

    def found(**query: object) -> list[dict[str, str]]:
        jobs = pick(tree.discover(filters={"megre": query}), "r2star", only=False)
        return [j.series.entities for j in jobs if j.eligible]

    assert found(acquisition="lo") == [{"acq": "lo"}]
    assert found(acq=None) == [{}]
    assert found(acq="*") == [{"acq": "hi", "run": "01"}, {"acq": "lo"}]
    assert found(acq=[None, "lo"]) == [{}, {"acq": "lo"}]
    assert found(run=1) == [{"acq": "hi", "run": "01"}]
    assert found(acq="none") == []


def test_filter_that_leaves_nothing_is_named(tree, pick) -> None:
    tree.megre()
    reason = pick(tree.discover(filters={"megre": {"acq": "x"}}), "r2star").reason
    assert reason.startswith("no MEGRE images in sub-01/anat that match the filter file")
    assert "sub-01_echo-1_MEGRE.nii.gz" in reason
    assert '"acq": "x"' in reason


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        (
            {"bold": {}},
            "unknown query 'bold'; valid are megre, vfa, mpm, mts, tb1, dwi, mask, dseg",
        ),
        ({"dwi": {"acqu": "x"}}, "unknown entity 'acqu' in query 'dwi'; valid are .*acq, .*run"),
        ({"dwi": {"acq": 1.5}}, "dwi.acq is 1.5"),
        ({"dwi": "b2k"}, "'dwi' must be an object"),
    ],
)
def test_unknown_filters_are_refused(tree, filters: dict, sentence: str) -> None:
    tree.megre()
    with pytest.raises(InputError, match=sentence):
        tree.discover(filters=filters)


def test_filter_file(tmp_path: Path) -> None:
    path = tmp_path / "filter.json"
    path.write_text('{"dwi": {"acq": null}}')
    assert load_filter_file(path) == {"dwi": {"acq": None}}
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_filter_file(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="one JSON object"):
        load_filter_file(path)
    for content in (b'{"dwi": "\xff"}', b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as JSON"):
            load_filter_file(path)


def test_closed_folder_is_no_absence(tree, monkeypatch) -> None:
    """A folder that may not be listed makes its subject fail, and no other."""
    tree.megre()
    tree.megre("sub-02/anat/sub-02")
    walk = os.walk

    def closed(top, onerror=None, **options):
        if str(top).endswith("sub-02"):
            onerror(PermissionError(13, "Permission denied", f"{top}/anat"))
        return walk(top, onerror=onerror, **options)

    monkeypatch.setattr("bids_gacelle.bids.discovery.os.walk", closed)
    jobs = {j.series.subject: j for j in tree.discover().jobs if j.model == "r2star"}
    assert jobs["01"].eligible
    assert jobs["02"].cause == "broken"
    assert "permission denied" in jobs["02"].reason
