"""Gradient echoes: complex images, contrasts, field strength, spoiling, and every sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bids_gacelle.bids.discovery import ModelNeeds, Options, discover
from bids_gacelle.bids.names import map_path
from bids_gacelle.bids.series import VoxelMap, series_from_json, to_json
from bids_gacelle.errors import InputError

NEEDS = (
    ModelNeeds("r2star", "megre", columns=("echo_time",)),
    ModelNeeds("gremwi", "megre", columns=("echo_time", "field_strength")),
    ModelNeeds("despot1", "vfa", columns=("flip_angle", "repetition_time"), voxel_inputs=("b1",)),
    ModelNeeds(
        "r1r2star", "vfa", minimum_measurements=3, minimum_echo_times=2, voxel_inputs=("b1",)
    ),
    ModelNeeds(
        "mcrmwi",
        "vfa",
        minimum_measurements=8,
        minimum_flip_angles=3,
        minimum_echo_times=3,
        columns=("echo_time", "field_strength"),
        default_spoiling=50.0,
        voxel_inputs=("b1", "theta1", "ff1", "theta2", "ff2"),
    ),
)
ANAT = "sub-01/anat/sub-01"


@pytest.fixture
def found(tree):
    """Discover with the needs of the models of gradient echoes."""
    return lambda **options: discover(tree.root, NEEDS, Options(**options))


def _parts(tree, parts=("mag", "phase"), echoes=(1, 2, 3), suffix="MEGRE", **fields) -> None:
    for echo in echoes:
        for part in parts:
            units = {"Units": "rad"} if part == "phase" else {}
            tree.image(
                f"{ANAT}_echo-{echo}_part-{part}_{suffix}.nii.gz",
                **{"EchoTime": echo / 200, "MagneticFieldStrength": 3, **units, **fields},
            )


def _vfa(tree, flips=(5, 10, 20), times=(0.002, 0.005, 0.008), repetition=0.05, **fields) -> None:
    for i, flip in enumerate(flips, 1):
        for echo, time in enumerate(times, 1):
            tree.image(
                f"{ANAT}_echo-{echo}_flip-{i}_VFA.nii.gz",
                EchoTime=time,
                FlipAngle=flip,
                RepetitionTimeExcitation=repetition,
                **{"MagneticFieldStrength": 3, "SpoilingRFPhaseIncrement": 50, **fields},
            )


def _mpm(tree, contrasts, prefix=ANAT, suffix="MPM", **fields) -> None:
    """Contrasts: acq, label and degrees of the flip angle, mt, number of echoes."""
    for acq, flip, degrees, mt, echoes in contrasts:
        for echo in range(1, echoes + 1):
            stem = f"{prefix}_acq-{acq}" if acq else prefix
            tree.image(
                f"{stem}_echo-{echo}_flip-{flip}_mt-{mt}_{suffix}.nii",
                EchoTime=0.0023 * echo,
                FlipAngle=degrees,
                RepetitionTimeExcitation=0.025,
                MTState=mt == "on",
                **{"MagneticFieldStrength": 3, **fields},
            )


MPM = (("MTw", 1, 6, "on", 6), ("PDw", 1, 6, "off", 8), ("T1w", 2, 21, "off", 7))


def _names(paths) -> list[str]:
    return [Path(p).name for p in paths]


# ------------------------------------------------------------------------------ complex images


def test_magnitude_and_phase_are_paired_in_the_order_of_echo_times(tree, found, pick) -> None:
    _parts(tree)
    tree.json(f"{ANAT}_echo-1_part-mag_MEGRE.json", EchoTime=0.02)
    tree.json(f"{ANAT}_echo-1_part-phase_MEGRE.json", EchoTime=0.02, Units="rad")
    series = pick(found(), "r2star").series
    order = (2, 3, 1)
    assert _names(series.images) == [f"sub-01_echo-{i}_part-mag_MEGRE.nii.gz" for i in order]
    assert _names(series.second.images) == [
        f"sub-01_echo-{i}_part-phase_MEGRE.nii.gz" for i in order
    ]
    assert (series.second.part, series.second.units) == ("phase", "rad")
    assert series_from_json(json.loads(json.dumps(to_json(series)))) == series


def test_magnitude_without_part_has_a_phase(tree, found, pick) -> None:
    tree.megre(ANAT, times=(0.005, 0.01))
    _parts(tree, ("phase",), (1, 2))
    series = pick(found(), "r2star").series
    assert _names(series.images)[0] == "sub-01_echo-1_MEGRE.nii.gz"
    assert _names(series.second.images)[0] == "sub-01_echo-1_part-phase_MEGRE.nii.gz"


def test_real_and_imaginary_parts(tree, found, pick) -> None:
    _parts(tree, ("real", "imag"))
    series = pick(found(), "r2star").series
    assert _names(series.images)[2] == "sub-01_echo-3_part-real_MEGRE.nii.gz"
    assert (series.second.part, series.second.units) == ("imag", "")
    assert _names(series.second.images)[2] == "sub-01_echo-3_part-imag_MEGRE.nii.gz"


def test_complex_vfa(tree, found, pick) -> None:
    _vfa(tree)
    for path in list((tree.root / "sub-01/anat").iterdir()):
        fields = json.loads(path.read_text()) if path.suffix == ".json" else None
        if fields:
            stem = path.name.removesuffix("_VFA.json")
            path.unlink()
            path.with_name(f"{stem}_VFA.nii.gz").unlink()
            for part in ("mag", "phase"):
                units = {"Units": "arbitrary"} if part == "phase" else {}
                tree.image(f"sub-01/anat/{stem}_part-{part}_VFA.nii.gz", **fields, **units)
    series = pick(found(), "mcrmwi").series
    assert [n.replace("part-mag", "part-phase") for n in _names(series.images)] == _names(
        series.second.images
    )
    assert series.second.units == "arbitrary"


def test_a_missing_phase_leaves_the_magnitudes_and_is_named(tree, found, pick, messages) -> None:
    _parts(tree)
    (tree.root / f"{ANAT}_echo-2_part-phase_MEGRE.nii.gz").unlink()
    plan = found()
    series = pick(plan, "r2star").series
    assert series.second is None
    assert len(series.images) == 3
    assert (
        "the magnitudes alone are used: of the phase images "
        "`sub-01_echo-2_part-phase_MEGRE.nii.gz` is missing." in messages(plan, "warning")
    )


@pytest.mark.parametrize(
    ("parts", "extra", "sentence"),
    [
        (("phase",), (), "only part-phase images are there; magnitude images are needed"),
        (("real",), (), "needs a part-imag image beside it, `sub-01_echo-1_part-imag_MEGRE"),
        (("imag",), (), "needs a part-real image beside it, `sub-01_echo-1_part-real_MEGRE"),
        (("mag", "phase"), ("phase",), "has no magnitude: `sub-01_echo-4_part-mag_MEGRE.nii.gz`"),
        (("real", "imag"), ("imag",), "needs a part-real image beside it, `sub-01_echo-4_"),
    ],
)
def test_halves_of_complex_images(tree, found, pick, parts, extra, sentence: str) -> None:
    _parts(tree, parts)
    _parts(tree, extra, echoes=(4,))
    job = pick(found(), "r2star")
    assert sentence in job.reason
    assert job.cause == "broken"


@pytest.mark.parametrize(
    ("units", "read"),
    [
        ("rad", "rad"),
        ("Radians", "rad"),
        ("degrees", "deg"),
        ("deg", "deg"),
        ("a.u.", "arbitrary"),
    ],
)
def test_units_of_a_phase(tree, found, pick, units: str, read: str) -> None:
    _parts(tree, ("mag",))
    _parts(tree, ("phase",), Units=units)
    assert pick(found(), "r2star").series.second.units == read


def test_phase_of_an_unknown_unit_is_not_used(tree, found, pick, messages) -> None:
    _parts(tree, ("mag",))
    _parts(tree, ("phase",), Units="Hz")
    plan = found()
    assert pick(plan, "r2star").series.second is None
    text = messages(plan, "warning")
    assert "`Units` is 'Hz' in `sub-01/anat/sub-01_echo-1_part-phase_MEGRE.json`" in text
    assert 'those of a phase are "rad", "deg" or "arbitrary"' in text
    assert "correct it. The magnitudes alone are used." in text


def test_phase_units_that_differ_or_are_missing(tree, found, pick, messages) -> None:
    _parts(tree)
    tree.json(f"{ANAT}_echo-3_part-phase_MEGRE.json", EchoTime=0.015, Units="deg")
    assert 'differ in `Units`: "rad" in' in messages(found(), "warning")
    for echo in (1, 2, 3):
        tree.json(f"{ANAT}_echo-{echo}_part-phase_MEGRE.json", EchoTime=echo / 200)
    plan = found()
    assert pick(plan, "r2star").series.second.units == ""
    assert 'no "Units" in a sidecar of `sub-01/anat/sub-01_echo-1_part-phase' in messages(
        plan, "info"
    )


def test_parts_whose_sidecars_disagree(tree, found, pick) -> None:
    _parts(tree)
    tree.json(f"{ANAT}_echo-2_part-phase_MEGRE.json", EchoTime=0.011, Units="rad")
    reason = pick(found(), "r2star").reason
    assert "`EchoTime` is 0.01 in `sub-01/anat/sub-01_echo-2_part-mag_MEGRE.json`, but" in reason
    assert "0.011 in `sub-01/anat/sub-01_echo-2_part-phase_MEGRE.json`" in reason
    job = pick(found(ignore=("phase",)), "r2star")
    assert job.eligible
    assert job.series.second is None


# --------------------------------------------------------------------- flip angles and echoes


def test_vfa_with_echoes_is_sorted_by_flip_angle_repetition_and_echo_time(
    tree, found, pick, messages
) -> None:
    _vfa(tree, flips=(20, 5), times=(0.005, 0.002))
    plan = found()
    series = pick(plan, "r1r2star").series
    assert series.flip_angle.values == (5, 5, 20, 20)
    assert series.echo_time.values == (0.002, 0.005, 0.002, 0.005)
    assert _names(series.images)[0] == "sub-01_echo-2_flip-2_VFA.nii.gz"
    assert pick(plan, "despot1").eligible
    assert "vfa: despot1 uses the first echo of each flip angle." in messages(plan, "info")
    assert "r1r2star uses the first echo" not in messages(plan, "info")


def test_repetition_times_may_differ_between_flip_angles(tree, found, pick) -> None:
    _vfa(tree, flips=(5, 10))
    _vfa(tree, flips=(5,), repetition=0.03)
    series = pick(found(), "r1r2star").series
    assert series.repetition_time.values == (0.03,) * 3 + (0.05,) * 3
    assert series.flip_angle.values == (5,) * 3 + (10,) * 3


def test_counts_of_flip_angles_and_echo_times(tree, found, pick) -> None:
    _vfa(tree, flips=(5, 20), times=(0.002, 0.005))
    reason = pick(found(), "mcrmwi").reason
    assert "mcrmwi needs at least 3 different flip angles" in reason
    _vfa(tree, flips=(5, 20, 30), times=(0.002, 0.005))
    reason = pick(found(), "mcrmwi").reason
    assert "mcrmwi needs at least 3 different echo times of a flip angle" in reason
    assert "and its like have 2.0, 5.0 ms only" in reason
    _vfa(tree)
    plan = found()
    assert pick(plan, "mcrmwi").eligible


def test_count_of_images(tree, found, pick) -> None:
    tree.vfa(flips=(3, 20))
    needs = [ModelNeeds("mine", "vfa", minimum_measurements=3, columns=("echo_time",))]
    for flip in (1, 2):
        tree.json(
            f"{ANAT}_flip-{flip}_VFA.json",
            EchoTime=0.002,
            FlipAngle=10 * flip,
            RepetitionTimeExcitation=0.02,
        )
    reason = pick(discover(tree.root, needs, Options()), "mine").reason
    assert "mine needs at least 3 images of different flip angle or echo time, but" in reason
    assert "and its like are 2. --fit-undetermined" in reason


def test_single_echoes_need_no_echo_time_for_t1(tree, found, pick) -> None:
    tree.vfa(flips=(3, 12, 20))
    plan = found()
    assert pick(plan, "despot1").eligible
    for model in ("r1r2star", "mcrmwi"):
        job = pick(plan, model)
        assert "`EchoTime` missing for `sub-01/anat/sub-01_flip-1_VFA.nii.gz`" in job.reason
        assert job.cause == "unsuited"


def test_several_echoes_need_their_echo_time(tree, found, pick) -> None:
    _vfa(tree)
    tree.json(f"{ANAT}_echo-2_flip-2_VFA.json", FlipAngle=10, RepetitionTimeExcitation=0.05)
    job = pick(found(), "despot1")
    assert "`EchoTime` missing for `sub-01/anat/sub-01_echo-2_flip-2_VFA.nii.gz`" in job.reason
    assert job.cause == "broken"


def test_one_echo_time_for_each_flip_angle_says_nothing_about_the_decay(tree, found, pick) -> None:
    for i, (flip, time) in enumerate(((3, 0.0022), (20, 0.0023)), 1):
        tree.image(
            f"{ANAT}_flip-{i}_VFA.nii",
            FlipAngle=flip,
            RepetitionTimeExcitation=0.02,
            EchoTime=time,
        )
    plan = found()
    assert pick(plan, "despot1").eligible
    assert "r1r2star needs at least 2 different echo times of a flip angle" in (
        pick(plan, "r1r2star").reason
    )


def test_images_of_the_same_setting(tree, found, pick) -> None:
    _vfa(tree, flips=(5, 5))
    reason = pick(found(), "despot1").reason
    assert "`sub-01/anat/sub-01_echo-1_flip-1_VFA.nii.gz` and" in reason
    assert (
        "have the same FlipAngle 5 degrees, RepetitionTimeExcitation 0.05 s, EchoTime 0.002 s"
        in (reason)
    )


def test_echoes_of_one_flip_angle_that_differ(tree, found, pick) -> None:
    _vfa(tree)
    tree.json(
        f"{ANAT}_echo-2_flip-1_VFA.json",
        FlipAngle=5,
        RepetitionTimeExcitation=0.02,
        EchoTime=0.005,
    )
    reason = pick(found(), "mcrmwi").reason
    assert "`RepetitionTimeExcitation` differs between the echoes of flip-1: it is 0.05" in reason


@pytest.mark.parametrize("field", ["FlipAngle", "RepetitionTimeExcitation", "RepetitionTime"])
def test_megre_of_several_settings(tree, found, pick, field: str) -> None:
    _parts(tree, ("mag",), **{field: 0.5})
    tree.json(f"{ANAT}_echo-3_part-mag_MEGRE.json", EchoTime=0.015, **{field: 0.6})
    reason = pick(found(), "r2star").reason
    assert f"`{field}` differs between the images of one series: it is 0.5 in" in reason
    assert "images of several flip angles are called VFA" in reason


@pytest.mark.parametrize(
    ("build", "field", "value"),
    [
        (_parts, "EchoTime", 4.6),
        (_vfa, "EchoTime", 4.6),
        (_vfa, "RepetitionTimeExcitation", 50),
        (_mpm, "EchoTime", 4.6),
        (_mpm, "RepetitionTimeExcitation", 25),
    ],
)
def test_times_in_ms(tree, found, pick, build, field: str, value: float) -> None:
    build(tree, *([MPM] if build is _mpm else []))
    for path in (tree.root / "sub-01/anat").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    reason = pick(found(), "r2star" if build is _parts else "r1r2star").reason
    assert f"`{field}` is {value} in `sub-01/anat/sub-01_" in reason
    assert f"probably ms; write {value / 1000:g}, or pass --assume-ms {field}" in reason


def test_repeated_runs_are_series(tree, found, pick) -> None:
    for run in (1, 2):
        _mpm(tree, MPM, f"{ANAT}_run-{run}")
        tree.vfa(f"{ANAT}_acq-low_run-{run}")
    found_entities = [j.series.entities for j in pick(found(), "despot1", only=False)]
    assert found_entities == [
        {"acq": "low", "run": "1"},
        {"acq": "low", "run": "2"},
        {"run": "1"},
        {"run": "2"},
    ]


# ------------------------------------------------------------------------------- MPM and MTS


def test_contrasts_make_one_series_without_their_acq(tree, found, pick, messages) -> None:
    _mpm(tree, MPM)
    plan = found()
    series = pick(plan, "r1r2star").series
    assert series.entities == {}
    assert series.flip_angle.values == (6,) * 8 + (21,) * 7
    assert not any("mt-on" in image for image in series.images)
    path = map_path(series, model="r1r2star", suffix="R1map", datatype="anat")
    assert path.name == "sub-01_desc-r1r2star_R1map.nii.gz"
    assert "6 images with an MT pulse (mt-on) (acq-MTw) not used." in messages(plan, "info")


def test_each_contrast_has_a_decay(tree, found, pick, messages) -> None:
    _mpm(tree, (*MPM, ("B1w", 3, 40, "off", 1)))
    plan = found()
    jobs = pick(plan, "r2star", only=False)
    assert [(j.series.entities["acq"], len(j.series.images)) for j in jobs] == [
        ("MTw", 6),
        ("PDw", 8),
        ("T1w", 7),
    ]
    names = {
        map_path(j.series, model="r2star", suffix="R2starmap", bare=True, datatype="anat").name
        for j in jobs
    }
    assert names == {f"sub-01_acq-{c}_R2starmap.nii.gz" for c in ("MTw", "PDw", "T1w")}
    info = messages(plan, "info")
    assert "megre acq-MTw: acquired with an MT pulse" in info
    assert "megre acq-PDw: acquired with an MT pulse" not in info
    assert "MPM images acq-B1w have 1 echo only, too few for a decay of their own" in info


def test_contrasts_without_acq_have_no_decay_of_their_own(tree, found, pick) -> None:
    _mpm(tree, [("", *c[1:]) for c in MPM])
    plan = found()
    assert "MPM images are no series of echoes: they differ in flip- or mt-" in (
        pick(plan, "r2star").reason
    )
    assert pick(plan, "r1r2star").eligible


def test_protocols_of_their_own_acq_stay_apart(tree, found, pick) -> None:
    for acq in ("hi", "lo"):
        _mpm(tree, [(acq, *c[1:]) for c in MPM])
    jobs = pick(found(), "r1r2star", only=False)
    assert [j.series.entities for j in jobs] == [{"acq": "hi"}, {"acq": "lo"}]


@pytest.mark.parametrize("suffix", ["MPM", "MTS"])
def test_one_contrast_without_mt_pulse_is_unsuited(tree, found, pick, suffix: str) -> None:
    _mpm(tree, MPM[:2], suffix=suffix)
    job = pick(found(), "despot1")
    assert "despot1 needs at least 2 different flip angles" in job.reason
    assert "(flip angle 6 degrees)" in job.reason
    assert "Images with an MT pulse are not among them." in job.reason
    assert job.cause == "unsuited"


def test_only_mt_pulses(tree, found, pick) -> None:
    _mpm(tree, MPM[:1], suffix="MTS")
    job = pick(found(), "despot1")
    assert job.reason == "no VFA images in sub-01/anat (all MTS images have an MT pulse (mt-on))"
    assert job.cause == "absent"


def test_mts_with_one_echo(tree, found, pick, messages) -> None:
    for name, flip, state in (
        ("flip-1_mt-off", 6, False),
        ("flip-1_mt-on", 6, True),
        ("flip-2_mt-off", 20, False),
    ):
        tree.image(
            f"{ANAT}_{name}_MTS.nii.gz",
            FlipAngle=flip,
            RepetitionTimeExcitation=0.03,
            MTState=state,
        )
    plan = found()
    series = pick(plan, "despot1").series
    assert _names(series.images) == [f"sub-01_flip-{i}_mt-off_MTS.nii.gz" for i in (1, 2)]
    assert "1 image with an MT pulse (mt-on) not used." in messages(plan, "info")


def test_mt_state_of_the_sidecar(tree, found, pick) -> None:
    _mpm(tree, MPM)
    tree.json(f"{ANAT}_acq-PDw_echo-1_flip-1_mt-off_MPM.json", MTState=True)
    reason = pick(found(), "despot1").reason
    assert "`MTState` is true in `sub-01/anat/sub-01_acq-PDw_echo-1_flip-1_mt-off_MPM.json`" in (
        reason
    )
    assert "the name of the image says mt-off" in reason


def test_mt_pulse_that_only_the_sidecar_tells(tree, found, pick) -> None:
    tree.vfa(flips=(3, 20))
    tree.image(
        f"{ANAT}_flip-3_VFA.nii.gz", FlipAngle=12, RepetitionTimeExcitation=0.015, MTState=True
    )
    assert pick(found(), "despot1").series.flip_angle.values == (3, 20)


def test_maps_of_the_same_name_are_not_made_twice(tree, found, pick, messages) -> None:
    tree.vfa()
    _mpm(tree, MPM)
    plan = found()
    assert _names(pick(plan, "despot1").series.images)[0].endswith("_VFA.nii.gz")
    assert (
        "`sub-01/anat/sub-01_acq-PDw_echo-1_flip-1_mt-off_MPM.nii` and its like not used: their "
        "maps would have the same names. To fit them instead, give a filter file with "
        '{"vfa": {"suffix": "MPM"}}.' in messages(plan, "info")
    )
    plan = found(filters={"vfa": {"suffix": "MPM"}})
    assert pick(plan, "despot1").series.images[0].endswith("_MPM.nii")


def test_broken_images_do_not_hide_others_of_their_name(tree, found, pick) -> None:
    tree.vfa()
    tree.json("VFA.json", PulseSequenceType="SSFP")
    _mpm(tree, MPM)
    broken, sound = pick(found(), "despot1", only=False)
    assert "DESPOT2" in broken.reason
    assert sound.eligible
    assert sound.series.images[0].endswith("_MPM.nii")


def test_filters_of_contrasts(tree, found, pick) -> None:
    _mpm(tree, (*MPM, ("old", 3, 30, "off", 3)))
    series = pick(found(filters={"mpm": {"acq": ["PDw", "T1w"]}}), "despot1").series
    assert set(series.flip_angle.values) == {6, 21}
    assert pick(found(filters={"mpm": {"acq": "none"}}), "despot1").cause == "absent"


# ------------------------------------------------------------------- field strength, spoiling


def test_field_strength_of_the_sidecars(tree, found, pick) -> None:
    _parts(tree)
    given = pick(found(), "gremwi").series.field_strength
    assert given.values == (3,)
    assert given.sources == ("sub-01/anat/sub-01_echo-1_part-mag_MEGRE.json",)
    assert given.unit == "T"


def test_field_strength_of_the_imaging_frequency(tree, found, pick) -> None:
    tree.megre(ANAT)
    tree.json("MEGRE.json", ImagingFrequency=123.258)
    given = pick(found(), "gremwi").series.field_strength
    assert given.values[0] == pytest.approx(2.8949, abs=1e-4)
    assert given.sources == ("MEGRE.json: ImagingFrequency",)
    tree.json("MEGRE.json", ImagingFrequency=123258000)
    reason = pick(found(), "gremwi").reason
    assert "not plausible in MHz (BIDS), probably Hz; write 123.258" in reason


def test_missing_field_strength_skips_what_needs_it(tree, found, pick) -> None:
    tree.megre(ANAT)
    plan = found()
    assert pick(plan, "r2star").series.field_strength is None
    job = pick(plan, "gremwi")
    assert "`MagneticFieldStrength` missing for `sub-01/anat/sub-01_echo-1_MEGRE" in job.reason
    assert "or pass --field-strength 3." in job.reason
    assert job.cause == "unsuited"
    given = pick(found(field_strength=7.0), "gremwi").series.field_strength
    assert (given.values, given.sources) == ((7.0,), ("--field-strength",))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "nor in any other usual unit"),
        ("3", "a string, not a number; write 3 (in T) without quotes"),
        ("3T", 'a number in T is needed, e.g. "MagneticFieldStrength": 3'),
        (25, "not plausible in T"),
        (30000, "probably gauss; write 3"),
        (15000, "probably gauss; write 1.5"),
        (1500, "probably mT; write 1.5"),
        (None, "a number in T is needed"),
    ],
)
def test_field_strengths_that_cannot_be(tree, found, pick, value, words: str) -> None:
    _parts(tree, MagneticFieldStrength=value)
    plan = found()
    assert pick(plan, "r2star").eligible
    reason = pick(plan, "gremwi").reason
    assert "`MagneticFieldStrength` is " in reason
    assert words in reason
    assert "pass --field-strength" in reason


def test_field_strengths_that_differ(tree, found, pick, messages) -> None:
    _parts(tree)
    tree.json(f"{ANAT}_echo-2_part-mag_MEGRE.json", EchoTime=0.01, MagneticFieldStrength=1.5)
    assert (
        "`MagneticFieldStrength` is 3 in `sub-01/anat/sub-01_echo-1_part-mag_MEGRE.json`, but 1.5"
        in (pick(found(), "gremwi").reason)
    )
    plan = found(field_strength=3.0)
    assert pick(plan, "gremwi").eligible
    assert "--field-strength 3 is used instead" in messages(plan, "warning")


def test_spoiling_increment(tree, found, pick, messages) -> None:
    _vfa(tree, SpoilingRFPhaseIncrement=117)
    plan = found()
    given = pick(plan, "mcrmwi").series.spoiling_increment
    assert (given.values, given.unit) == ((117,), "degrees")
    assert "SpoilingRFPhaseIncrement" not in messages(plan, "warning")
    plan = found(spoiling_increment=150.0)
    assert pick(plan, "mcrmwi").series.spoiling_increment.values == (150,)
    assert "is 117 in" in messages(plan, "warning")
    assert "--spoiling-increment 150 is used instead" in messages(plan, "warning")


def test_missing_spoiling_increment_is_announced_to_whom_it_concerns(
    tree, found, pick, messages
) -> None:
    tree.json("VFA.json", EchoTime=0.002)
    _vfa(tree)
    for path in (tree.root / "sub-01/anat").glob("*.json"):
        fields = json.loads(path.read_text())
        fields.pop("SpoilingRFPhaseIncrement")
        path.write_text(json.dumps(fields))
    plan = found()
    assert pick(plan, "mcrmwi").series.spoiling_increment is None
    text = messages(plan, "warning")
    assert (
        "mcrmwi takes 50 degrees. Add that of the sequence, or pass --spoiling-increment." in text
    )
    assert "r1r2star takes" not in text


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("field_strength", 30000.0, "--field-strength 30000: a number from 0.02 to 20 T"),
        ("spoiling_increment", 0.87, "--spoiling-increment 0.87: a number from 4 to 360 degrees"),
    ],
)
def test_options_that_cannot_be(tree, found, option: str, value: float, sentence: str) -> None:
    _vfa(tree)
    with pytest.raises(InputError, match=sentence):
        found(**{option: value})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.873, "probably radians; write 50.0"),
        (2.042, "probably radians; write 116.998"),
        ("50", "write 50 (in degrees) without quotes"),
        (0, "not plausible in degrees"),
    ],
)
def test_spoiling_increments_that_cannot_be(tree, found, pick, value, words: str) -> None:
    _vfa(tree, SpoilingRFPhaseIncrement=value)
    plan = found()
    assert pick(plan, "r1r2star").eligible
    assert words in pick(plan, "mcrmwi").reason
    assert "or pass --spoiling-increment" in pick(plan, "mcrmwi").reason


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"SpoilingState": False}, "`SpoilingState` is false in"),
        ({"SpoilingType": "GRADIENT"}, "`SpoilingType` is 'GRADIENT' in"),
    ],
)
def test_images_without_rf_spoiling(tree, found, pick, messages, fields, said: str) -> None:
    _vfa(tree, **fields)
    plan = found()
    assert pick(plan, "despot1").eligible
    assert said in messages(plan, "warning")
    assert "T1 will be biased" in messages(plan, "warning")


def test_images_with_rf_spoiling(tree, found, messages) -> None:
    _vfa(tree, SpoilingState=True, SpoilingType="COMBINED")
    assert "spoiling" not in messages(found(), "warning")


# -------------------------------------------------------------------------------------- maps


def test_b1_in_degrees(tree, found, pick) -> None:
    tree.vfa()
    tree.image("sub-01/fmap/sub-01_TB1map.nii.gz", Units="degrees", FlipAngle=60)
    b1 = pick(found(), "despot1").series.b1_map
    assert b1.factor == pytest.approx(1 / 60)
    assert b1.source == "sub-01/fmap/sub-01_TB1map.json: Units degrees, of FlipAngle 60"


def test_b1_in_degrees_of_an_unknown_flip_angle(tree, found, pick) -> None:
    tree.vfa()
    tree.image("sub-01/fmap/sub-01_TB1map.nii.gz", Units="degrees")
    reason = pick(found(), "despot1").reason
    assert "of a B1 map in degrees the nominal flip angle must be known" in reason
    assert '"FlipAngle": 60' in reason


@pytest.mark.parametrize(
    ("fields", "factor"), [({"Units": "percent"}, 0.01), (None, 1.0), ({"Units": "rad"}, None)]
)
def test_b1_map_of_an_option(tree, other_tree, found, pick, messages, fields, factor) -> None:
    tree.vfa()
    tree.image("sub-01/fmap/sub-01_TB1map.nii.gz", Units="Hz")
    path = other_tree.image("b1_01.nii.gz", **(fields or {}))
    plan = found(voxel_maps={"b1": str(other_tree.root / "b1_{subject}.nii.gz")})
    job = pick(plan, "despot1")
    if factor is None:
        assert "`Units` is 'rad' in `b1_01.json`" in job.reason
        return
    assert (job.series.b1_map.image, job.series.b1_map.factor) == (str(path), factor)
    assert job.series.voxel_maps == {}
    assert ('no "Units" in a sidecar of `b1_01.nii.gz`' in messages(plan, "warning")) == (
        fields is None
    )


def test_voxel_maps_of_options(tree, other_tree, found, pick, messages) -> None:
    for session in ("a", "b"):
        for subject in ("01", "02"):
            tree.megre(f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}")
    for name in ("01_a", "01_b", "02_a"):
        other_tree.image(f"{name}.nii.gz")
    needs = [
        ModelNeeds("mine", "megre", voxel_inputs=("angle",)),
        ModelNeeds("r2star", "megre"),
    ]
    template = str(other_tree.root / "{subject}_{session}.nii.gz")
    plan = discover(tree.root, needs, Options(voxel_maps={"angle": template}))
    reasons = {(j.series.subject, j.series.session, j.model): j for j in plan.jobs}
    expected = {"angle": VoxelMap(str(other_tree.root / "01_b.nii.gz"), "option")}
    assert reasons["01", "b", "mine"].series.voxel_maps == expected
    missing = reasons["02", "b", "mine"]
    assert missing.reason == f"--voxel-map angle: `{other_tree.root}/02_b.nii.gz` does not exist."
    assert reasons["02", "b", "r2star"].eligible
    assert f"mine uses `{other_tree.root}/01_a.nii.gz` as its map angle" in messages(plan, "info")


def test_voxel_maps_that_cannot_be(tree, found) -> None:
    tree.megre(ANAT)
    with pytest.raises(
        InputError, match=r"--voxel-map iw: no model asked for has .* are b1, theta1"
    ):
        found(voxel_maps={"iw": "/x.nii"})
    with pytest.raises(InputError, match=r"\{acq\} stands for nothing"):
        found(voxel_maps={"theta": "/{acq}.nii"})
    tree.megre("sub-02/anat/sub-02")
    with pytest.raises(InputError, match=r"image of one participant, but 2 .* write \{subject\}"):
        found(voxel_maps={"theta": "/x.nii"})


def test_fibre_maps_of_no_use_are_named(tree, other_tree, messages) -> None:
    tree.megre(ANAT)
    theta = other_tree.image("theta.nii.gz")
    needs = [ModelNeeds("r2star", "megre")]
    plan = discover(tree.root, needs, Options(voxel_maps={"theta": str(theta)}))
    assert f"--voxel-map theta={theta} is not used: no model asked for takes such a map" in (
        messages(plan, "warning")
    )


def test_maps_that_a_model_cannot_do_without(tree, other_tree, pick) -> None:
    tree.megre(ANAT)
    needs = [ModelNeeds("mine", "megre", needed_inputs=("theta1", "theta2", "iwf"))]
    job = pick(discover(tree.root, needs, Options()), "mine")
    assert job.cause == "unsuited"
    assert "mine needs maps of theta1, theta2, iwf with the options it has" in job.reason
    assert "--voxel-map theta=PATH iwf=PATH, or give a derivative dataset" in job.reason
    paths = {n: str(other_tree.image(f"{n}.nii.gz")) for n in ("fo", "iwf", "theta1")}
    for names, missing in ((("theta1", "iwf"), "of theta2 with"), (("fo", "iwf"), "")):
        given = Options(voxel_maps={n: paths[n] for n in names})
        job = pick(discover(tree.root, needs, given), "mine")
        assert missing in job.reason
        assert job.eligible == (not missing)


def test_fibre_maps_of_derivatives(tree, other_tree, found, pick, messages) -> None:
    _vfa(tree)
    stem = "sub-01/dwi/sub-01"
    theta = other_tree.image(f"{stem}_model-csd_param-theta_dwimap.nii.gz")
    other_tree.image(f"{stem}_model-ball_param-theta_dwimap.nii.gz")
    ff = other_tree.image(f"{stem}_model-csd_param-ff_dwimap.nii.gz")
    other_tree.image(f"{stem}_model-csd_param-ff_desc-std_dwimap.nii.gz")
    other_tree.image(f"{stem}_space-T1w_model-csd_param-fo_dwimap.nii.gz")
    tree.image(f"{stem}_model-csd_param-iwf_dwimap.nii.gz")
    plan = found(derivatives={"x": other_tree.root})
    maps = pick(plan, "mcrmwi").series.voxel_maps
    assert set(maps) == {"theta", "ff"}
    assert maps["ff"] == VoxelMap(str(ff))
    assert "would fit as well. --voxel-map theta=PATH chooses one" in messages(plan, "warning")
    assert f"mcrmwi uses `{ff}` as its map ff" in messages(plan, "info")
    assert "r1r2star uses" not in messages(plan, "info")
    chosen = found(derivatives={"x": other_tree.root}, voxel_maps={"theta": str(theta)})
    assert pick(chosen, "mcrmwi").series.voxel_maps["theta"] == VoxelMap(str(theta), "option")


# ------------------------------------------------------------------------------- real data


def test_real_complex_echoes(shared: Path, pick) -> None:
    plan = discover(shared / "data/megre_brain_romeo", NEEDS, Options())
    series = pick(plan, "gremwi").series
    assert (series.second.part, series.second.units) == ("phase", "rad")
    assert series.field_strength.values == (3,)
    assert series.echo_time.values == (0.004, 0.008, 0.012)


def test_real_contrasts(shared: Path, pick, messages) -> None:
    plan = discover(shared / "data/bids_examples/qmri_mpm", NEEDS, Options())
    series = pick(plan, "r1r2star").series
    assert series.flip_angle.values == (6,) * 8 + (21,) * 8
    assert series.echo_time.values[:2] == (0.0023, 0.0046)
    assert [len(j.series.images) for j in pick(plan, "r2star", only=False)] == [6, 8, 8]
    assert "TB1EPI images are there but not used" in messages(plan, "info")
    assert "mcrmwi needs at least 3 different flip angles" in pick(plan, "mcrmwi").reason
