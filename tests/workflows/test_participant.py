"""A whole run on a tiny dataset: what is written, what is said, and what happens when it fails."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.bids.names import FLAGS
from bids_gacelle.cli.main import main
from bids_gacelle.workflows import run as workflow_run
from tests.datasets import (
    R2STAR,
    SHAPE,
    add_dwi,
    add_megre,
    add_segmentation,
    new_dataset,
    write_image,
    write_json,
)

LINEAR = ("--nprocs", "1")


def run(dataset, out, *words, level="participant"):
    return main([str(dataset), str(out), level, *LINEAR, *map(str, words)])


def summary(out):
    newest = max(out.glob("logs/*/summary.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(newest.read_text())


def status(out):
    return {(j["subject"], j["model"]): j for j in summary(out)["jobs"]}


def table(path):
    with path.open() as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def half_written(out):
    return [p for p in out.rglob("*") if p.name.endswith(".tmp")]


@pytest.fixture
def no_pages(monkeypatch):
    """Leave out the drawing of pages, which takes longer than all the rest on a tiny dataset."""
    monkeypatch.setattr(workflow_run, "write_report", lambda out, subject: out / "page")


@pytest.fixture
def dataset(tmp_path):
    root = new_dataset(tmp_path / "data")
    add_megre(root)
    return root


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """One subject with everything, run once."""
    base = tmp_path_factory.mktemp("full")
    root = new_dataset(base / "data")
    add_megre(root)
    add_dwi(root)
    atlas, _ = add_segmentation(base)
    out = base / "out"
    models = "r2star,mcmicro"
    assert run(root, out, "--models", models, "--atlas", f"tiny={atlas}") == 0
    return root, out


def test_maps_are_right(full):
    _, out = full
    rate = nib.load(out / "sub-01/anat/sub-01_R2starmap.nii.gz").get_fdata()
    flags = nib.load(out / "sub-01/anat/sub-01_desc-r2starfitflag_dseg.nii.gz").get_fdata()
    truth = R2STAR * (1 + 0.2 * np.linspace(-1, 1, SHAPE[0]))[:, None, None] * np.ones(SHAPE)
    inside = flags == 0
    assert inside.sum() >= 0.8 * (SHAPE[0] - 2) * (SHAPE[1] - 2) * SHAPE[2]
    std = nib.load(out / "sub-01/anat/sub-01_desc-std_R2starmap.nii.gz").get_fdata()
    assert abs(np.median(rate[inside] / truth[inside]) - 1) < 0.01
    assert 0.5 < np.std((rate - truth)[inside]) / np.sqrt(np.mean(std[inside] ** 2)) < 1.5


def test_sidecar_and_provenance(full):
    _, out = full
    sidecar = json.loads((out / "sub-01/anat/sub-01_R2starmap.json").read_text())
    assert sidecar["Units"] == "1/s"
    assert sidecar["EchoTime"] == [0.003, 0.008, 0.015, 0.024]
    assert sidecar["Sources"][0] == "bids:raw:sub-01/anat/sub-01_echo-1_MEGRE.nii.gz"
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", sidecar["FitHash"])


def test_roi_table(full):
    _, out = full
    path = out / "sub-01/anat/sub-01_atlas-tiny_desc-r2star_scalarstats.tsv"
    rows = table(path)
    of_rate = {r["name"]: r for r in rows if r["param"] == "R2star"}
    assert {r["unit"] for r in of_rate.values()} == {"1/s"}
    assert float(of_rate["Left-Front"]["at_bound"]) == 0
    assert of_rate["Left-Front"]["hemi"] == "L"
    assert of_rate["Nowhere"]["mean"] == "n/a"
    assert int(of_rate["Nowhere"]["n_voxels"]) == 0
    values = nib.load(out / "sub-01/anat/sub-01_R2starmap.nii.gz").get_fdata()
    flags = nib.load(out / "sub-01/anat/sub-01_desc-r2starfitflag_dseg.nii.gz").get_fdata()
    here = np.zeros(SHAPE, bool)
    here[1:3, 1:-1] = True
    here &= np.isin(flags, (0, 2))
    assert float(of_rate["Left-Front"]["mean"]) == pytest.approx(values[here].mean(), rel=1e-5)


def test_flags_outside_the_mask(full):
    _, out = full
    flags = nib.load(out / "sub-01/anat/sub-01_desc-r2starfitflag_dseg.nii.gz").get_fdata()
    mask = nib.load(out / "sub-01/anat/sub-01_desc-r2star_mask.nii.gz").get_fdata() > 0
    assert (flags[~mask] == 1).all()
    assert not (flags[mask].astype(int) & 1).any()
    assert FLAGS[1] == "outside the mask"


def test_output_is_valid_bids(full, bids_errors):
    assert bids_errors(full[1]) == []


def test_unpreprocessed_dwi_is_said_everywhere(full):
    _, out = full
    sidecar = out / "sub-01/dwi/sub-01_model-mcmicro_param-fn_dwimap.json"
    assert json.loads(sidecar.read_text())["Preprocessed"] is False
    assert "Not preprocessed" in (out / "sub-01.html").read_text()
    [log] = out.glob("logs/*/bids_gacelle.log")
    assert "without preprocessing" in log.read_text()


def test_everything_promised_is_there(full):
    _, out = full
    for job in summary(out)["jobs"]:
        assert job["status"] == "ok"
        assert all((out / name).stat().st_size > 0 for name in job["outputs"])
    assert half_written(out) == []


def test_no_crash_files_and_no_work_left(full):
    _, out = full
    assert not list(out.rglob("crash-*"))
    config = next(out.glob("logs/*/bids_gacelle.toml")).read_text()
    assert "models = [" in config


def test_group_and_reports_only(full, capsys):
    root, out = full
    assert run(root, out, level="group") == 0
    rows = table(out / "group_r2star.tsv")
    assert {r["subject"] for r in rows} == {"sub-01"}
    page = out / "sub-01.html"
    before = page.read_bytes()
    page.unlink()
    assert run(root, out, "--reports-only") == 0
    assert page.read_bytes() == before
    assert "sub-01.html" in capsys.readouterr().out


def test_group_without_tables_is_nothing(dataset, tmp_path):
    assert run(dataset, tmp_path / "out", level="group") == 3


def test_dry_run_writes_nothing(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path / "out", "--dry-run") == 0
    text = capsys.readouterr().out
    assert re.search(r"sub-01 +- +megre +r2star +yes", text)
    assert re.search(r"nexi +no: no dwi images", text)
    assert not (tmp_path / "out").exists()


def test_second_run_gives_the_same_bytes_and_resume_skips(dataset, tmp_path, no_pages):
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star") == 0
    path = out / "sub-01/anat/sub-01_R2starmap.nii.gz"
    first, when = path.read_bytes(), path.stat().st_mtime_ns
    assert run(dataset, out, "--models", "r2star", "--resume") == 0
    assert status(out)["01", "r2star"]["reason"] == "unchanged since an earlier run"
    assert path.stat().st_mtime_ns == when
    assert run(dataset, out, "--models", "r2star") == 0
    assert path.stat().st_mtime_ns != when
    assert path.read_bytes() == first


def test_resume_notices_changed_data(dataset, tmp_path, no_pages):
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star") == 0
    add_megre(dataset, seed=5)
    assert run(dataset, out, "--models", "r2star", "--resume") == 0
    assert status(out)["01", "r2star"]["reason"] == ""


def test_sessions_are_fitted_apart_and_share_a_page(tmp_path):
    root = new_dataset(tmp_path / "data")
    for i, session in enumerate(("a", "b")):
        add_megre(root, session=session, seed=i)
    out = tmp_path / "out"
    assert run(root, out, "--models", "r2star") == 0
    assert run(root, out, "--models", "r2star", "--session-label", "b") == 0
    for session in ("a", "b"):
        assert (out / f"sub-01/ses-{session}/anat/sub-01_ses-{session}_R2starmap.nii.gz").exists()
        assert f"ses-{session}" in (out / "sub-01.html").read_text()


def test_config_file_repeats_a_run(dataset, tmp_path, no_pages):
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star", "--random-seed", "3") == 0
    config = next(out.glob("logs/*/bids_gacelle.toml"))
    assert main([str(dataset), str(out), "participant", "--config-file", str(config)]) == 0
    manifest = json.loads((out / "sub-01/figures/sub-01_desc-r2star_manifest.json").read_text())
    assert manifest["fit"]["seed"] == 3


# ------------------------------------------------------------------------- bad input


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_truncated_image_fails_its_subject_only(dataset, tmp_path, capfd, no_pages):
    truncate(add_megre(dataset, "02", seed=1)[2])
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star") == 1
    assert status(out)["01", "r2star"]["status"] == "ok"
    assert status(out)["02", "r2star"]["status"] == "failed"
    assert "sub-02_echo-3_MEGRE.nii.gz" in status(out)["02", "r2star"]["reason"]
    assert not list(out.rglob("sub-02*R2starmap*"))
    assert "Traceback" not in capfd.readouterr().err


def test_nan_zero_and_negative_voxels_are_flagged(dataset, tmp_path, no_pages):
    for i in range(1, 5):
        path = dataset / f"sub-01/anat/sub-01_echo-{i}_MEGRE.nii.gz"
        data = nib.load(path).get_fdata()
        data[2, 2, 2], data[3, 3, 2], data[4, 2, 2] = np.nan, 0, -5
        write_image(path, data)
    mask = write_image(tmp_path / "mask.nii.gz", np.ones(SHAPE))
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star", "--mask", mask) == 0
    flags = nib.load(out / "sub-01/anat/sub-01_desc-r2starfitflag_dseg.nii.gz").get_fdata()
    values = nib.load(out / "sub-01/anat/sub-01_R2starmap.nii.gz").get_fdata()
    for voxel in ((2, 2, 2), (3, 3, 2), (4, 2, 2)):
        assert int(flags[voxel]) & (1 | 4)
        assert values[voxel] == 0
    assert np.isfinite(values).all()


def test_empty_mask(dataset, tmp_path, no_pages):
    mask = write_image(tmp_path / "mask.nii.gz", np.zeros(SHAPE))
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star", "--mask", mask) == 1
    assert "mask.nii.gz" in status(out)["01", "r2star"]["reason"]
    assert "empty" in status(out)["01", "r2star"]["reason"]


def test_mask_on_another_grid(dataset, tmp_path):
    mask = write_image(tmp_path / "mask.nii.gz", np.ones(SHAPE), np.diag([4.0, 4, 4, 1]))
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star", "--mask", mask) == 3
    assert "mask.nii.gz" in status(out)["01", "r2star"]["reason"]


def test_4d_where_3d_is_needed(dataset, tmp_path):
    path = dataset / "sub-01/anat/sub-01_echo-2_MEGRE.nii.gz"
    write_image(path, np.ones((*SHAPE, 3)))
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star") == 3
    assert "echo-2" in status(out)["01", "r2star"]["reason"]


def test_3d_dwi(tmp_path):
    root = new_dataset(tmp_path / "data")
    write_image(add_dwi(root), np.ones(SHAPE))
    out = tmp_path / "out"
    assert run(root, out, "--models", "mcmicro") == 3
    assert "sub-01_dwi.nii.gz" in status(out)["01", "mcmicro"]["reason"]


@pytest.mark.parametrize("kind", ["bval", "bvec"])
def test_gradients_of_the_wrong_length(tmp_path, kind):
    root = new_dataset(tmp_path / "data")
    path = add_dwi(root).with_suffix("").with_suffix(f".{kind}")
    lines = [" ".join(line.split()[:-1]) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    assert run(root, out, "--models", "mcmicro") == 3
    reason = status(out)["01", "mcmicro"]["reason"]
    assert f"dwi.{kind}" in reason
    assert "61" in reason
    assert "62" in reason


def test_missing_field_and_wrong_unit(dataset, tmp_path):
    sidecar = dataset / "sub-01/anat/sub-01_echo-2_MEGRE.json"
    write_json(sidecar, {})
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star") == 3
    assert "EchoTime" in status(out)["01", "r2star"]["reason"]
    write_json(sidecar, {"EchoTime": 8.0})
    assert run(dataset, out, "--models", "r2star") == 3
    reason = status(out)["01", "r2star"]["reason"]
    assert "ms" in reason
    assert "8" in reason


def test_missing_diffusion_times_name_the_way_out(tmp_path, no_pages):
    root = new_dataset(tmp_path / "data")
    add_dwi(root, timing=False)
    out = tmp_path / "out"
    assert run(root, out, "--models", "nexi,mcmicro") == 1
    reason = status(out)["01", "nexi"]["reason"]
    assert "SmallDelta" in reason or "BigDelta" in reason
    assert "--small-delta" in reason or "--big-delta" in reason
    assert status(out)["01", "mcmicro"]["status"] == "ok"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--participant-label", "07"], "07"),
        (["--session-label", "x"], "session 'x'"),
        (["--models", "nexy"], "Did you mean nexi"),
        (["--models", "r2star", "--set", "r2star.l_max=2"], "such an option"),
        (["--device", "cuda:7"], "cuda:7"),
    ],
)
def test_wrong_requests_exit_with_2(dataset, tmp_path, capsys, words, sentence):
    assert run(dataset, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_wrong_places_exit_with_2(dataset, tmp_path, capsys, no_pages):
    assert run(tmp_path / "absent", tmp_path / "out") == 2
    assert run(dataset, dataset) == 2
    assert run(dataset, dataset / "sub-01") == 2
    assert "derivatives" in capsys.readouterr().err
    assert run(dataset, dataset / "derivatives/bids_gacelle", "--models", "r2star") == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_output_as_a_user(dataset, tmp_path):
    tmp_path.joinpath("locked").mkdir(mode=0o500)
    assert run(dataset, tmp_path / "locked/out", "--models", "r2star") == 2


def test_output_that_cannot_be_a_folder(dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(dataset, tmp_path / "file/out", "--models", "r2star") == 2
    assert "file/out" in capsys.readouterr().err


CHILD = """
import resource, sys
from bids_gacelle.cli.main import main
from bids_gacelle.workflows import run as workflow_run
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(main(sys.argv[1:]))
"""


def test_disk_full_while_writing(dataset, tmp_path, no_pages):
    """A file-size limit stands in for a full disk: both make the write of a map fail."""
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star") == 0
    before = (out / "sub-01/anat/sub-01_R2starmap.nii.gz").read_bytes()
    big = np.ones((60, 60, 40)) * np.random.default_rng(0).uniform(0.9, 1, (60, 60, 40))
    for i, te in enumerate((0.003, 0.008, 0.015, 0.024), 1):
        path = dataset / f"sub-01/anat/sub-01_echo-{i}_MEGRE.nii.gz"
        write_image(path, 1000 * big * np.exp(-te * 25 * big))
    words = [str(dataset), str(out), "participant", *LINEAR, "--models", "r2star"]
    work = ["-w", str(tmp_path / "work")]
    # the inputs and intermediate files are 2.3 MB at most, a compressed map is about 0.5 MB
    child = CHILD.format(limit=450_000)
    ran = subprocess.run(
        [sys.executable, "-c", child, *words, *work], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert half_written(out) == []
    assert (out / "sub-01/anat/sub-01_R2starmap.nii.gz").read_bytes() == before
