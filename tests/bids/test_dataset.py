"""The output folder is a valid BIDS dataset, and nobody else's."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from bids_gacelle.bids import names, sidecar
from bids_gacelle.bids.dataset import bids_uri, check_output_dir, init_dataset
from bids_gacelle.bids.output import write_image, write_json, write_text, write_tsv
from bids_gacelle.bids.series import Kind, Mask, Series, Sourced
from bids_gacelle.errors import InputError
from bids_gacelle.group import merge_tables
from bids_gacelle.spatial.rois import read_lookup, roi_statistics

ROOT_FILES = [
    ".bidsignore",
    "CHANGES",
    "CITATION.cff",
    "README.md",
    "dataset_description.json",
    "descriptions.tsv",
]
TITLES = {"r2star": "R2* mapping", "despot1": "DESPOT1", "nexi": "Neurite exchange imaging"}


def make_raw(root, **fields):
    about = {"Name": "Digital brain", "BIDSVersion": "1.11.1", **fields}
    write_json(root / "dataset_description.json", about)
    return root


def description(root):
    return json.loads((root / "dataset_description.json").read_text())


def contents(root):
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def raw(tmp_path):
    return make_raw(tmp_path / "raw")


def test_root_files_are_made_once_and_left_alone(tmp_path, raw):
    out = tmp_path / "out"
    init_dataset(out, {"raw": raw}, "0.1.0", models=TITLES)
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == ROOT_FILES
    about = description(out)
    assert about["DatasetType"] == "derivative"
    assert about["Name"] == "bids_gacelle: quantitative maps of Digital brain"
    assert about["GeneratedBy"][0] | {"CodeURL": ""} == {
        "Name": "bids_gacelle",
        "Version": "0.1.0",
        "CodeURL": "",
    }
    assert about["DatasetLinks"] == {"raw": "../raw"}
    before = contents(out)
    times = [p.stat().st_mtime_ns for p in before]
    init_dataset(out, {"raw": raw}, "0.1.0", models=TITLES)
    assert contents(out) == before
    assert [p.stat().st_mtime_ns for p in before] == times


def test_later_runs_add_and_take_nothing_away(tmp_path, raw):
    out, masks = tmp_path / "out", make_raw(tmp_path / "masks", DatasetDOI="10.1/x")
    init_dataset(out, {"raw": raw}, "0.1.0", models={"nexi": "Neurite exchange imaging"})
    write_text(out / "README.md", "mine")
    write_text(out / ".bidsignore", "my_*\n" + (out / ".bidsignore").read_text())
    edited = (out / "descriptions.tsv").read_text().replace("Neurite exchange imaging\n", "mine\n")
    write_text(out / "descriptions.tsv", edited)
    about = description(out)
    about["GeneratedBy"].append({"Name": "Manual"})
    write_json(out / "dataset_description.json", about | {"License": "CC0"})

    init_dataset(out, {"masks": masks}, "0.2.0", models={"r2star": "R2* mapping"})
    about = description(out)
    assert about["DatasetLinks"] == {"raw": "../raw", "masks": "../masks"}
    assert about["SourceDatasets"] == [{"DOI": "10.1/x"}]
    assert about["License"] == "CC0"
    assert [(m["Name"], m.get("Version")) for m in about["GeneratedBy"]] == [
        ("bids_gacelle", "0.2.0"),
        ("Manual", None),
    ]
    assert (out / "README.md").read_text() == "mine"
    assert (out / ".bidsignore").read_text().startswith("my_*\n")
    assert [line.split()[0] for line in (out / "CHANGES").read_text().splitlines() if line] == [
        "0.2.0",
        "-",
        "0.1.0",
        "-",
    ]
    table = dict(line.split("\t") for line in (out / "descriptions.tsv").read_text().splitlines())
    assert table["desc-nexi"] == "mine"
    assert table["desc-r2starfitflag"].startswith("R2* mapping")


@pytest.mark.parametrize("where", ["nested", "apart", "doi", "option"])
def test_links_lead_to_the_data(tmp_path, where, monkeypatch):
    raw = make_raw(tmp_path / "raw", **({"DatasetDOI": "10.1/x"} if where == "doi" else {}))
    out = raw / "derivatives" / "bids_gacelle" if where == "nested" else tmp_path / "out"
    if where in ("apart", "doi"):
        # as where the two are mounted at the root of a container: no common folder
        monkeypatch.setattr(Path, "is_relative_to", lambda *_: False)
    options = {"raw": "doi:10.2/y"} if where == "option" else None
    init_dataset(out, {"raw": raw}, "0.1.0", options)
    about = description(out)
    link = about["DatasetLinks"]["raw"]
    expected = {
        "nested": "../..",
        "apart": raw.resolve().as_uri(),
        "doi": "doi:10.1/x",
        "option": "doi:10.2/y",
    }
    assert link == expected[where]
    if where == "nested":
        assert (out / link).resolve() == raw.resolve()
        assert "SourceDatasets" not in about
    else:
        assert about["SourceDatasets"][0]["URL"] == link


def test_the_container_is_named(tmp_path, raw, monkeypatch):
    monkeypatch.setenv("BIDS_GACELLE_CONTAINER", "docker")
    monkeypatch.setenv("BIDS_GACELLE_CONTAINER_TAG", "x:0.1.0")
    init_dataset(tmp_path / "a", {"raw": raw}, "0.1.0")
    container = description(tmp_path / "a")["GeneratedBy"][0]["Container"]
    assert container == {"Type": "docker", "Tag": "x:0.1.0"}
    monkeypatch.setenv("APPTAINER_CONTAINER", "/x.sif")
    init_dataset(tmp_path / "b", {"raw": raw}, "0.1.0")
    assert description(tmp_path / "b")["GeneratedBy"][0]["Container"]["Type"] == "apptainer"


JOB = """
import sys
from bids_gacelle.bids.dataset import init_dataset
out, raw, name = sys.argv[1:]
for step in range(20):
    key = f"{name}{step}"
    init_dataset(out, {key: raw}, "0.1.0", models={key + "x": key})
"""


def test_jobs_at_the_same_time_lose_nothing_of_each_other(tmp_path, raw):
    out = tmp_path / "out"
    jobs = [
        subprocess.Popen([sys.executable, "-c", JOB, str(out), str(raw), name]) for name in "abc"
    ]
    assert [job.wait(120) for job in jobs] == [0, 0, 0]
    every = {f"{name}{step}" for name, step in product("abc", range(20))}
    assert set(description(out)["DatasetLinks"]) == every
    assert all(f"desc-{key}x\t" in (out / "descriptions.tsv").read_text() for key in every)
    assert sorted(p.name for p in out.iterdir()) == sorted([*ROOT_FILES, "logs"])


def test_threads_at_the_same_time_lose_nothing_of_each_other(tmp_path, raw):
    names_ = [f"set{i}" for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: init_dataset(tmp_path / "out", {n: raw}, "0.1.0"), names_))
    assert set(description(tmp_path / "out")["DatasetLinks"]) == set(names_)


@pytest.mark.parametrize(
    ("about", "complaint"),
    [
        ({"DatasetType": "raw"}, "DatasetType 'raw'"),
        ({}, "DatasetType 'raw'"),
        ({"DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep"}]}, "fMRIPrep"),
        ({"DatasetType": "derivative", "GeneratedBy": "me"}, "nobody"),
        ([], "cannot be read as JSON"),
        (None, "no dataset_description.json"),
    ],
)
def test_a_dataset_of_somebody_else_is_not_touched(tmp_path, raw, about, complaint):
    out = tmp_path / "out"
    (out / "sub-01").mkdir(parents=True)
    if about is not None:
        write_text(out / "dataset_description.json", json.dumps(about))
    before = contents(out)
    for attempt in (
        lambda: init_dataset(out, {"raw": raw}, "0.1.0"),
        lambda: check_output_dir(raw, out),
    ):
        with pytest.raises(InputError, match="choose another output folder") as caught:
            attempt()
        assert complaint in str(caught.value)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        (".", False),
        ("sub-01", False),
        ("derivatives", False),
        ("derivatives/mine", True),
        ("derivatives/../elsewhere", False),
        ("../out", True),
        ("../link/derivatives/mine", True),
        ("../link/code", False),
    ],
)
def test_the_output_may_not_lie_in_the_input(raw, where, allowed):
    (raw.parent / "link").symlink_to(raw)
    if allowed:
        check_output_dir(raw, raw / where)
    else:
        with pytest.raises(InputError, match=r"use for example .*derivatives/bids_gacelle"):
            check_output_dir(raw, raw / where)
    assert contents(raw).keys() == {raw / "dataset_description.json"}


def test_our_own_output_is_welcome_again(tmp_path, raw):
    init_dataset(tmp_path / "out", {"raw": raw}, "0.1.0")
    check_output_dir(raw, tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, raw):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match=r"Cannot write in the output folder .*out: "):
        init_dataset(tmp_path / "out", {"raw": raw}, "0.1.0")


def test_bids_uris(tmp_path, raw):
    nested = raw / "derivatives" / "masks"
    store = tmp_path / "annex" / "key.nii.gz"
    store.parent.mkdir()
    store.touch()
    image = raw / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    image.parent.mkdir(parents=True)
    image.symlink_to(store)
    (tmp_path / "link").symlink_to(raw)
    datasets = {"raw": raw, "masks": nested, "": tmp_path / "out"}
    relative = "sub-01/anat/sub-01_T1w.nii.gz"
    assert bids_uri(image, datasets) == f"bids:raw:{relative}"
    assert bids_uri(tmp_path / "link" / relative, datasets) == f"bids:raw:{relative}"
    assert bids_uri(image, {"raw": tmp_path / "link"}) == f"bids:raw:{relative}"
    assert bids_uri(nested / "sub-01_acq-a+b.json", datasets) == "bids:masks:sub-01_acq-a+b.json"
    assert bids_uri(tmp_path / "out" / "sub-01.html", datasets) == "bids::sub-01.html"
    assert (
        bids_uri(tmp_path / "my mask.nii", datasets)
        == (tmp_path.resolve() / "my mask.nii").as_uri()
    )


# --- the whole tree, judged by the validator ---------------------------------------------------

PARAMETERS = {
    "r2star": [("S0", "S0map", "arbitrary"), ("R2star", "R2starmap", "1/s")],
    "despot1": [("M0", "M0map", "arbitrary"), ("R1", "R1map", "1/s"), ("T1", "T1map", "s")],
    "r1r2star": [("R1", "R1map", "1/s"), ("k", "", "1/s")],
    "nexi": [("fn", "", "1"), ("tex", "", "ms")],
}
MODELS = {"megre": ["r2star"], "vfa": ["despot1", "r1r2star"], "dwi": ["nexi"]}


def make_series(kind, session, entities, raw):
    timing = {
        "megre": {"echo_time": Sourced((0.004, 0.008), "s", ("a.json", "b.json"))},
        "vfa": {
            "flip_angle": Sourced((3.0, 20.0), "degree", ("a.json", "b.json")),
            "repetition_time": Sourced((0.0067, 0.0068), "s", ("a.json", "b.json")),
        },
        "dwi": {},
    }
    return Series(
        kind,
        "01",
        session,
        entities,
        (str(raw / "sub-01" / "x.nii.gz"),),
        mask=Mask("quick"),
        metadata={"MagneticFieldStrength": 3, "Manufacturer": "Siemens"},
        **timing[kind],
    )


def record_of(series, model, datasets):
    shells = {
        "b": np.array([1.0, 2.5]),
        "big_delta": np.array([21.0, 30.0]),
        "small_delta": np.array([6.0, 6.0]),
        "echo_time": None,
    }
    return sidecar.FitRecord(
        series,
        model,
        TITLES.get(model, model),
        "0.1.0",
        "sha256:0",
        [bids_uri(image, datasets) for image in series.images],
        {"solver": "lm", "n_voxels": 60, "at_bound": {"fn": 0.1}, "prior": None, "starts": 2},
        bounds={name: (0, 1) for name, _, _ in PARAMETERS[model]},
        reference="10.1016/j.neuroimage.2022.119277",
        shells=shells if series.kind == "dwi" else None,
    )


def write_pair(out, path, array, about, **options):
    write_image(out / path, array, np.diag([2.0, 2, 2, 1]), **options)
    write_json(out / str(path).replace(".nii.gz", ".json"), about)


def write_model(out, series, model, datasets):
    """Every kind of file that one model on one series leaves."""
    record = record_of(series, model, datasets)
    array = np.random.default_rng(0).random((3, 4, 5))
    labels = np.arange(60).reshape(3, 4, 5) % 3
    rows = []
    for (name, suffix, unit), statistic in product(PARAMETERS[model], ["", "std"]):
        path = names.map_path(
            series,
            model=model,
            parameter=name,
            statistic=statistic,
            suffix=suffix,
            bare=model in ("r2star", "despot1"),
            datatype=names.datatype_of(series),
        )
        about = sidecar.map_sidecar(
            record, parameter=name, description=name, unit=unit, statistic=statistic
        )
        write_pair(out, path, array, about, keep_nan=bool(statistic))
        statistics = roi_statistics(array, labels, read_lookup(None, labels))
        about = {"model": model, "param": name, "unit": unit, "hemi": ""}
        rows += [{**row, **about} for row in statistics]
    quality = sidecar.map_sidecar(record, parameter="nrmse", description="NRMSE", unit="1")
    write_pair(out, names.quality_path(series, "nrmse", model=model), array, quality)
    mask = sidecar.mask_sidecar(record, origin="quick")
    write_pair(out, names.mask_path(series, model=model), array > 0.5, mask, dtype=np.uint8)
    flags = sidecar.flag_sidecar(record)
    write_pair(out, names.flag_path(series, model=model), labels, flags, dtype=np.uint8)
    codes = out / names.flag_path(series, model=model, extension=".tsv")
    write_tsv(codes, names.flag_rows(), ("index", "name"))
    table = names.table_path(series, model=model, atlas="aseg")
    write_tsv(out / table, rows, tuple(sidecar.TABLE_COLUMNS))
    units = {name: unit for name, _, unit in PARAMETERS[model]}
    about = sidecar.table_sidecar(record, segmentation="bids:raw:dseg.nii.gz", units=units)
    write_json(out / table.with_suffix(".json"), about)
    manifest = {"schema": 1, "tables": [str(table)]}
    write_json(out / names.manifest_path(series, model=model), manifest)
    write_image(out / names.reference_path(series), array, np.diag([2.0, 2, 2, 1]))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    raw, out = make_raw(root / "raw"), root / "out"
    datasets = {"raw": raw}
    init_dataset(out, datasets, "0.1.0", models=dict.fromkeys(PARAMETERS, "A model"))
    entities = {
        "anat": [{}, {"acq": "gre", "run": "1"}, {"task": "rest", "ce": "gd", "space": "T1w"}],
        "dwi": [{"acq": "b2k", "dir": "AP", "rec": "x"}, {"space": "ACPC", "res": "2"}],
    }
    for kind, session in product(get_args(Kind), ["", "pre"]):
        for keep in entities["dwi" if kind == "dwi" else "anat"]:
            for model in MODELS[kind]:
                write_model(out, make_series(kind, session, keep, raw), model, datasets)
    write_text(out / names.report_path("01"), "<!doctype html>")
    write_text(out / "sub-01" / "figures" / "sub-01_desc-r2star_map.png", "x")
    for name in ("run1/summary.json", "run1/bids_gacelle.log", "run1/sub-01/crash-x.txt"):
        write_text(out / "logs" / name, "{}")
    merge_tables(out)
    return out


def test_the_validator_finds_no_error(tree):
    validator = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    if validator is None:
        pytest.skip("needs bids-validator-deno")
    done = subprocess.run(
        [validator, str(tree), "--format", "json"], capture_output=True, text=True, check=False
    )
    report = json.loads(done.stdout)
    found = [issue for issue in report["issues"]["issues"] if issue.get("severity") == "error"]
    assert not found
    assert done.returncode == 0
    # it looked at our files, and would have seen a bad one
    assert report["summary"]["totalFiles"] > 100
    (tree / "sub-01" / "anat" / "sub-01_part-mag_R2starmap.json").write_text("{}")
    again = subprocess.run([validator, str(tree)], capture_output=True, text=True, check=False)
    (tree / "sub-01" / "anat" / "sub-01_part-mag_R2starmap.json").unlink()
    assert again.returncode != 0


def test_every_desc_label_is_described(tree):
    lines = (tree / "descriptions.tsv").read_text().splitlines()
    described = {line.split("\t")[0] for line in lines}
    used = {names.parse_name(path.name)[0].get("desc") for path in tree.rglob("sub-*_*")}
    assert {f"desc-{label}" for label in used if label} <= described


# --- sidecars ------------------------------------------------------------------------------------


def sidecar_of(kind, raw, parameter="fn", **entities):
    series = make_series(kind, "", entities, raw)
    record = record_of(series, MODELS[kind][0], {"raw": raw})
    return sidecar.map_sidecar(record, parameter=parameter, description="X", unit="1")


def test_a_diffusion_sidecar_states_what_was_fitted(raw):
    about = sidecar_of("dwi", raw, space="ACPC", res="2")
    assert about["BValues"] == [1.0, 2.5]
    assert about["BValueUnits"] == "ms/um^2"
    assert about["SmallDelta"] == [0.006, 0.006]
    assert about["BigDelta"] == [0.021, 0.03]
    assert about["Preprocessed"] is False
    assert "not corrected" in about["PreprocessingNote"]
    assert about["SpatialReference"] == about["Sources"][0] == "bids:raw:sub-01/x.nii.gz"
    assert about["Resolution"]
    assert about["VoxelsAtBound"] == 6
    assert about["SkullStripped"] is True
    assert about["EstimationReference"] == "doi:10.1016/j.neuroimage.2022.119277"
    assert about["Model"]["Parameters"]["Bounds"] == {"fn": [0, 1], "tex": [0, 1]}
    assert about["Model"]["Parameters"]["Prior"] is None
    assert about["MagneticFieldStrength"] == 3


def test_varying_acquisition_becomes_arrays_and_constant_stays_a_number(raw):
    assert sidecar_of("megre", raw)["EchoTime"] == [0.004, 0.008]
    vfa = sidecar_of("vfa", raw, parameter="T1")
    assert vfa["FlipAngle"] == [3.0, 20.0]
    # BIDS allows RepetitionTimeExcitation a single number only
    assert vfa["RepetitionTimeExcitationPerImage"] == [0.0067, 0.0068]
    assert "RepetitionTimeExcitation" not in vfa
    assert "VoxelsAtBound" not in vfa
    assert "SpatialReference" not in vfa
    assert "Preprocessed" not in vfa


def test_field_strength_and_spoiling_are_those_used(raw):
    series = replace(
        make_series("vfa", "", {}, raw),
        field_strength=Sourced((7.0,), "T", ("--field-strength",)),
        spoiling_increment=Sourced((117.0,), "degrees", ("VFA.json",)),
    )
    record = record_of(series, MODELS["vfa"][0], {"raw": raw})
    about = sidecar.map_sidecar(record, parameter="T1", description="X", unit="s")
    assert about["MagneticFieldStrength"] == 7  # not that of the sidecars
    assert about["SpoilingRFPhaseIncrement"] == 117
    plain = sidecar_of("vfa", raw, parameter="T1")
    assert plain["MagneticFieldStrength"] == 3
    assert "SpoilingRFPhaseIncrement" not in plain


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"solver": "lm", "noise": "gaussian", "loss": "l2", "prior": None, "starts": 4},
            "Levenberg-Marquardt, maximum likelihood, Gaussian noise, 4 starts",
        ),
        (
            {"solver": "lm", "noise": "rician", "loss": "huber", "prior": "weak", "starts": None},
            "Levenberg-Marquardt, maximum a posteriori, Rician noise, huber loss, weak prior",
        ),
        (
            {"solver": "lm", "prior": {"fn": [0.5, 0.1]}},
            "Levenberg-Marquardt, maximum a posteriori, Gaussian noise, prior as given in Model",
        ),
        ({"solver": "adam", "starts": 1}, "Adam, maximum likelihood, Gaussian noise, 1 start"),
        ({"solver": "linear", "noise": "gaussian", "loss": "l2"}, "linear least squares"),
    ],
)
def test_the_estimation_is_told_in_words(settings, text):
    assert sidecar.estimation_text(settings) == text


def test_the_table_sidecar_describes_every_column(raw):
    series = make_series("dwi", "", {}, raw)
    record = record_of(series, "nexi", {"raw": raw})
    about = sidecar.table_sidecar(record, segmentation="bids:x:y", units={"fn": "1"})
    assert all(about[column]["Description"] for column in sidecar.TABLE_COLUMNS)
    statistics = roi_statistics(np.zeros((1, 1, 1)), np.ones((1, 1, 1), int), [(1, "a")])
    added = {"hemi", "model", "param", "unit", "at_bound"}
    assert set(statistics[0]) | added == set(sidecar.TABLE_COLUMNS)
