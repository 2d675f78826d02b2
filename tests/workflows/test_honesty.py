"""What a run says of itself is what it did: exit codes, records, resume, and gaps in the input."""

from __future__ import annotations

import json
import re

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.bids.series import Job, Plan, Series
from bids_gacelle.cli.main import main
from bids_gacelle.interfaces.rois import hemisphere
from bids_gacelle.interfaces.write import WriteManifest
from bids_gacelle.settings import Settings
from bids_gacelle.workflows import run as workflow_run
from bids_gacelle.workflows.outcome import NOT_STARTED, OUT_OF_MEMORY, outcomes
from bids_gacelle.workflows.plugin import KILLED
from tests.datasets import (
    SHAPE,
    add_b1_map,
    add_dwi,
    add_megre,
    add_segmentation,
    add_vfa,
    new_dataset,
    write_image,
    write_json,
)


@pytest.fixture(autouse=True)
def no_pages(monkeypatch):
    monkeypatch.setattr(workflow_run, "write_report", lambda out, subject: out / "page")


@pytest.fixture
def dataset(tmp_path):
    root = new_dataset(tmp_path / "data")
    add_megre(root)
    return root


def run(dataset, out, *words):
    return main([str(dataset), str(out), "participant", "--nprocs", "1", *map(str, words)])


def newest(out):
    path = max(out.glob("logs/*/summary.json"), key=lambda p: p.stat().st_mtime_ns)
    return {(j["subject"], j["model"]): j for j in json.loads(path.read_text())["jobs"]}


def test_broken_subject_fails_also_when_no_model_was_named(dataset, tmp_path):
    add_megre(dataset, "02")
    write_json(dataset / "sub-02/anat/sub-02_echo-2_MEGRE.json", {})
    path = add_megre(dataset, "03")[1]
    path.write_bytes(path.read_bytes()[:200])
    out = tmp_path / "out"
    assert run(dataset, out) == 1
    found = newest(out)
    assert found["01", "r2star"]["status"] == "ok"
    assert found["01", "despot1"]["status"] == "skipped"
    assert found["02", "r2star"]["status"] == found["03", "r2star"]["status"] == "failed"


def test_model_that_the_data_do_not_suit_fails_only_when_asked_for(tmp_path):
    root = new_dataset(tmp_path / "data")
    add_dwi(root, timing=False)
    assert run(root, tmp_path / "all") == 0
    assert run(root, tmp_path / "asked", "--models", "nexi,mcmicro") == 1


def test_masked_b1_map_does_not_bend_t1(tmp_path):
    """Zeros around a masked B1 map must not leak into its rim; voxels without B1 are flagged."""
    root = new_dataset(tmp_path / "data")
    b1 = np.broadcast_to(np.linspace(1.15, 0.85, SHAPE[0])[:, None, None], SHAPE).copy()
    add_vfa(root, t1=1.0, b1=b1)
    mask = np.zeros(SHAPE, bool)
    mask[1:6, 1:5, :] = True
    add_b1_map(root, np.where(mask, b1, 0))
    everything = write_image(tmp_path / "mask.nii.gz", np.ones(SHAPE))
    # the map lies half a voxel off: every voxel at the rim is interpolated with the outside
    path = root / "sub-01/fmap/sub-01_TB1map.nii.gz"
    image = nib.load(path)
    data, affine = image.get_fdata(), image.affine.copy()
    affine[:3, 3] += [0, 0.4, 0]
    write_image(path, data[..., None], affine)
    out = tmp_path / "out"
    assert run(root, out, "--models", "despot1", "--mask", everything) == 0
    t1 = nib.load(out / "sub-01/anat/sub-01_T1map.nii.gz").get_fdata()
    flags = nib.load(out / "sub-01/anat/sub-01_desc-despot1fitflag_dseg.nii.gz").get_fdata()
    fitted = (flags.astype(int) & 4) == 0
    assert fitted.sum() >= mask.sum()
    np.testing.assert_allclose(t1[fitted], 1.0, rtol=1e-3)
    assert not fitted[0, 0, 0]
    manifest = json.loads((out / "sub-01/figures/sub-01_desc-despot1_manifest.json").read_text())
    assert any("B1 map" in w and "% of the mask" in w for w in manifest["warnings"])


def test_resume_does_not_take_maps_of_another_run(dataset, tmp_path, monkeypatch):
    out = tmp_path / "out"
    half = np.ones(SHAPE)
    half[:3] = 0
    mask = write_image(tmp_path / "mask.nii.gz", half)
    assert run(dataset, out, "--models", "r2star") == 0
    good = (out / "sub-01/anat/sub-01_R2starmap.nii.gz").read_bytes()

    def fails(self, settings, cwd):
        raise RuntimeError("stopped in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(WriteManifest, "work", fails)
        assert run(dataset, out, "--models", "r2star", "--mask", mask) == 1
    assert (out / "sub-01/anat/sub-01_R2starmap.nii.gz").read_bytes() != good
    assert run(dataset, out, "--models", "r2star", "--resume") == 0
    assert (out / "sub-01/anat/sub-01_R2starmap.nii.gz").read_bytes() == good


def test_resume_notices_atlases_and_lost_files(dataset, tmp_path):
    out = tmp_path / "out"
    atlas, table = add_segmentation(tmp_path)
    words = ["--models", "r2star", "--resume"]
    assert run(dataset, out, *words) == 0
    assert run(dataset, out, *words, "--atlas", f"tiny={atlas}") == 0
    written = out / "sub-01/anat/sub-01_atlas-tiny_desc-r2star_scalarstats.tsv"
    assert "Left-Front" in written.read_text()
    table.write_text(table.read_text().replace("Left-Front", "Renamed"))
    assert run(dataset, out, *words, "--atlas", f"tiny={atlas}") == 0
    assert "Renamed" in written.read_text()
    (out / "sub-01/anat/sub-01_R2starmap.json").unlink()
    assert run(dataset, out, *words, "--atlas", f"tiny={atlas}") == 0
    assert (out / "sub-01/anat/sub-01_R2starmap.json").exists()


def test_tables_of_an_earlier_run_do_not_outlive_their_maps(dataset, tmp_path):
    out = tmp_path / "out"
    atlas, _ = add_segmentation(tmp_path)
    assert run(dataset, out, "--models", "r2star", "--atlas", f"tiny={atlas}") == 0
    assert list(out.rglob("*atlas-tiny*"))
    assert run(dataset, out, "--models", "r2star") == 0
    assert not list(out.rglob("*atlas-tiny*"))


def test_bad_segmentation_costs_its_table_but_not_the_maps(dataset, tmp_path):
    blurred = write_image(tmp_path / "blurred.nii.gz", np.full(SHAPE, 1.5))
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star", "--atlas", f"b={blurred}") == 1
    assert (out / "sub-01/anat/sub-01_R2starmap.nii.gz").exists()
    assert "blurred.nii.gz" in newest(out)["01", "r2star"]["reason"]


def test_foreign_manifest_disturbs_nobody(dataset, tmp_path):
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star") == 0
    write_json(out / "sub-02/figures/sub-02_desc-r2star_manifest.json", {})
    assert run(dataset, out, "--models", "r2star") == 0
    manifest = out / "sub-01/figures/sub-01_desc-r2star_manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    assert run(dataset, out, "--models", "r2star", "--resume") == 0
    assert newest(out)["01", "r2star"]["reason"] == ""


def test_failed_report_is_in_the_summary(dataset, tmp_path, monkeypatch):
    def fails(out, subject):
        raise RuntimeError("no ink")

    monkeypatch.setattr(workflow_run, "write_report", fails)
    out = tmp_path / "out"
    assert run(dataset, out, "--models", "r2star") == 1
    [path] = out.glob("logs/*/summary.json")
    assert "no ink" in path.read_text()


@pytest.mark.parametrize(
    "option",
    [
        "nexi.l_max=two",
        "nexi.l_max=3",
        "nexi.starts=abc",
        "nexi.starts=0",
        "nexi.ftol=small",
        "nexi.iterations=100",
    ],
)
def test_wrong_option_values_exit_with_2(dataset, tmp_path, capsys, option):
    assert run(dataset, tmp_path / "out", "--set", option) == 2
    assert "nexi" in capsys.readouterr().err


def test_wrong_config_values_exit_with_2(dataset, tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text('solver = "magic"\n')
    assert run(dataset, tmp_path / "out", "--config-file", config) == 2
    assert "magic" in capsys.readouterr().err
    config.write_bytes(b"\xff\xfe models")
    assert run(dataset, tmp_path / "out", "--config-file", config) == 2


def test_linear_solver_is_refused_before_the_run(dataset, tmp_path, capsys):
    assert run(dataset, tmp_path / "out", "--solver", "linear", "--models", "r2star") == 2
    assert "despot1" in capsys.readouterr().err
    assert run(dataset, tmp_path / "out2", "--solver", "linear", "--dry-run") == 3


def test_work_folder_in_the_dataset_is_refused(dataset, tmp_path):
    out = dataset / "derivatives/bids_gacelle"
    words = ["--models", "r2star", "-w", dataset / "sub-01/work"]
    assert run(dataset, out, *words) == 2
    assert not (dataset / "sub-01/work").exists()
    assert not out.exists()


def test_two_echoes_have_no_deviation_and_the_record_says_so(tmp_path):
    root = new_dataset(tmp_path / "data")
    for path in add_megre(root)[2:]:
        path.unlink()
        path.with_suffix("").with_suffix(".json").unlink()
    out = tmp_path / "out"
    assert run(root, out, "--models", "r2star") == 0
    manifest = json.loads((out / "sub-01/figures/sub-01_desc-r2star_manifest.json").read_text())
    assert any("standard deviation" in w.lower() for w in manifest["warnings"])
    assert "Gauss-Newton" not in manifest["methods"]


def test_few_directions_cost_the_invariants_only(tmp_path):
    """A shell without enough directions for S_2 gives S_0, and the other shells give S_2."""
    root = new_dataset(tmp_path / "data")
    path = add_dwi(root)
    data = nib.load(path).get_fdata()
    base = path.with_suffix("").with_suffix("")
    kept = [*range(2), *range(2, 5), *range(22, 62)]  # three directions at b 1000
    for kind in ("bval", "bvec"):
        values = np.loadtxt(base.with_suffix(f".{kind}"), ndmin=2)[:, kept]
        np.savetxt(base.with_suffix(f".{kind}"), values, fmt="%.6f")
    extra = np.array([[500] * 20])  # a fourth shell, so that nexi is eligible
    bval = np.hstack([np.loadtxt(base.with_suffix(".bval"), ndmin=2), extra])
    bvec = np.hstack(
        [np.loadtxt(base.with_suffix(".bvec")), np.loadtxt(base.with_suffix(".bvec"))[:, -20:]]
    )
    np.savetxt(base.with_suffix(".bval"), bval, fmt="%d")
    np.savetxt(base.with_suffix(".bvec"), bvec, fmt="%.6f")
    write_image(path, np.concatenate([data[..., kept], data[..., -20:] * 2], axis=3))
    out = tmp_path / "out"
    assert run(root, out, "--models", "mcmicro,nexi", "--set", "nexi.l_max=2") == 0
    assert newest(out)["01", "mcmicro"]["status"] == "ok"
    assert newest(out)["01", "nexi"]["status"] == "ok"
    [log] = out.glob("logs/*/bids_gacelle.log")
    assert re.search("S_2 is left out.*b = 1000 ", log.read_text())


def silent_status(tmp_path, **settings):
    folder = tmp_path / "log/sub-01"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("failures", "done"):
        (tmp_path / name).mkdir(exist_ok=True)
    run = {"failures": [str(tmp_path / "failures")], "done": str(tmp_path / "done")}
    run["log_dir"] = str(tmp_path / "log")
    series = Series("megre", "01", "", {}, ("a.nii.gz",))
    plan = Plan((Job(series, "r2star"),), (), {})
    asked = Settings(tmp_path, tmp_path, **settings)
    [status] = outcomes(asked, plan, run, [], RuntimeError("odd plugin"))
    assert status["status"] == "failed"
    return folder, status["reason"]


def test_a_job_without_a_word_is_not_blamed_on_memory_without_proof(tmp_path):
    folder, reason = silent_status(tmp_path)
    assert "odd plugin" in reason
    assert silent_status(tmp_path, stop_on_first_crash=True)[1] == NOT_STARTED
    crash = f"Node: bids_gacelle.sub_01_wf.megre_wf.fit_r2star\n{KILLED}\n"
    (folder / "crash-x.txt").write_text(crash)
    assert silent_status(tmp_path)[1] == OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("name", "side"),
    [("Thalamus L", "L"), ("Left-Caudate", "L"), ("ctx-rh-insula", "R"), ("Brain stem", "")],
)
def test_hemisphere(name, side):
    assert hemisphere(name) == side
