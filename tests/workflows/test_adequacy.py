"""Data that cannot determine a model: refused with a reason, fitted when that is asked for."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.cli.main import main
from bids_gacelle.workflows import run as workflow_run
from tests.datasets import add_dwi, add_megre, new_dataset


@pytest.fixture(autouse=True)
def no_pages(monkeypatch):
    monkeypatch.setattr(workflow_run, "write_report", lambda out, subject: out / "page")


@pytest.fixture
def single_shell(tmp_path):
    root = new_dataset(tmp_path / "data")
    add_megre(root)
    add_dwi(root, shells=(1000,))
    return root


@pytest.fixture
def one_b_twice(tmp_path):
    """Two runs of one b-value at two diffusion times, which mcmicro does not know of."""
    root = new_dataset(tmp_path / "data")
    add_megre(root)
    for run, big_delta in ((1, 0.02), (2, 0.04)):
        add_dwi(root, shells=(2000,), run=run, big_delta=big_delta)
    return root


def run(dataset, out, *words):
    return main([str(dataset), str(out), "participant", "--nprocs", "1", *map(str, words)])


def newest(out):
    path = max(out.glob("logs/*/summary.json"), key=lambda p: p.stat().st_mtime_ns)
    return {j["model"]: j for j in json.loads(path.read_text())["jobs"]}


def log(out):
    return "".join(path.read_text() for path in out.glob("logs/*/bids_gacelle.log"))


def test_a_single_shell_is_skipped_or_fails_if_the_model_was_named(single_shell, tmp_path):
    out = tmp_path / "all"
    assert run(single_shell, out) == 0
    found = newest(out)
    assert found["r2star"]["status"] == "ok"
    for model in ("nexi", "mcmicro"):
        assert found[model]["status"] == "skipped"
        assert "different shells" in found[model]["reason"]
        assert "--fit-undetermined" in found[model]["reason"]
    out = tmp_path / "asked"
    assert run(single_shell, out, "--models", "nexi,mcmicro,r2star") == 1
    assert newest(out)["nexi"]["status"] == newest(out)["mcmicro"]["status"] == "failed"
    assert newest(out)["r2star"]["status"] == "ok"


def test_measurements_that_are_alike_are_refused(one_b_twice, tmp_path, capsys):
    words = ("--combine-dwi", "--models", "mcmicro")
    assert run(one_b_twice, tmp_path / "dry", *words, "--dry-run") == 3
    told = "mcmicro: fn, d: not determined by this protocol, which gives 1 independent measurement"
    assert told in capsys.readouterr().out
    assert run(one_b_twice, tmp_path / "all", "--combine-dwi") == 0
    assert newest(tmp_path / "all")["mcmicro"]["status"] == "skipped"
    out = tmp_path / "asked"
    assert run(one_b_twice, out, "--combine-dwi", "--models", "mcmicro,r2star") == 1
    job = newest(out)["mcmicro"]
    assert job["status"] == "failed"
    assert job["reason"].startswith(told)
    assert "--fit-undetermined" in job["reason"]
    assert told in log(out)


def test_a_reason_is_told_once_for_each_series(one_b_twice, tmp_path, capfd):
    """The table of a dry run holds it; nothing says it again."""
    run(one_b_twice, tmp_path / "out", "--models", "nexi,axonalt2", "--dry-run")
    told = "".join(capfd.readouterr())
    for path in ("sub-01_run-1_dwi", "sub-01_run-2_dwi"):  # for each of the two models
        assert told.count(f"but `sub-01/dwi/{path}.nii.gz` has 1 (b 2000") == 2
    assert "--combine-dwi" in told


def test_joined_runs_are_not_told_to_be_joined(one_b_twice, tmp_path, capfd):
    words = ("--combine-dwi", "--models", "nexi,axonalt2", "--dry-run")
    run(one_b_twice, tmp_path / "out", *words)
    told = "".join(capfd.readouterr())
    assert "and its like have 2 (b 2000" in told
    assert "and its like have 70.0 ms only" in told
    assert "--combine-dwi" not in told


def test_a_broken_image_is_told_once(single_shell, tmp_path, capfd):
    bval = single_shell / "sub-01/dwi/sub-01_dwi.bval"
    bval.write_text(f"{bval.read_text().strip()} 1000")
    bvec = bval.with_suffix(".bvec")
    bvec.write_text("".join(f"{line} 0.577\n" for line in bvec.read_text().splitlines()))
    assert run(single_shell, tmp_path / "out", "--models", "mcmicro", "--force") == 3
    told = "".join(capfd.readouterr())
    assert "mcmicro failed: " in told
    assert told.count("one of the two is not complete") == 2  # in the table, and as the failure


@pytest.mark.parametrize("flag", ["--fit-undetermined", "--force"])
def test_what_is_undetermined_is_fitted_on_demand_and_says_so(single_shell, tmp_path, flag):
    out = tmp_path / "out"
    models = ["mcmicro"] if flag == "--force" else ["nexi", "mcmicro", "axcalibersmt"]
    assert run(single_shell, out, flag, "--models", ",".join(models)) == 0
    for model in models:
        job = newest(out)[model]
        assert job["status"] == "ok"
        [sentence] = job["adequacy"]["sentences"]
        assert "not determined by this protocol, which gives 1 independent" in sentence
        assert sentence in log(out)
        [manifest] = out.glob(f"sub-01/figures/*{model}*_manifest.json")
        content = json.loads(manifest.read_text())
        assert any("not determined" in w and "as --fit" in w for w in content["warnings"])
        assert {row["sd"] for row in content["fit"]["adequacy"]["expected"]} == {None}


def test_expected_deviations_reach_log_summary_sidecar_and_manifest(tmp_path):
    root = new_dataset(tmp_path / "data")
    add_dwi(root, shells=(500, 1000, 2000, 3000))
    out = tmp_path / "out"
    assert run(root, out, "--models", "mcmicro,nexi") == 0
    found = newest(out)
    said = found["nexi"]["adequacy"]["sentences"]
    assert any(s.startswith("nexi: tex: expected SD") for s in said)
    assert all(s in log(out) for s in said)
    assert "not estimable voxel by voxel; use a prior" in " ".join(said)
    assert found["mcmicro"]["adequacy"]["assumed"] is True  # two b=0 volumes, uneven directions
    assert found["mcmicro"]["adequacy"]["snr"] == 50
    side = json.loads((out / "sub-01/dwi/sub-01_model-nexi_param-tex_dwimap.json").read_text())
    bound = side["CramerRaoBound"]
    assert set(bound["StandardDeviation"]) == {"grey matter", "white matter"}
    assert bound["Units"] == "ms"
    assert bound["Verdict"]["grey matter"] == "not estimable voxel by voxel"
    std = "sub-01/dwi/sub-01_model-nexi_param-tex_desc-std_dwimap"
    assert "CramerRaoBound" not in json.loads((out / f"{std}.json").read_text())
    [path] = out.glob("sub-01/figures/*mcmicro*_manifest.json")
    manifest = json.loads(path.read_text())
    assert [len(shell["directions"]) for shell in manifest["gradients"]] == [20] * 4
    assert [shell["b"] for shell in manifest["gradients"]] == [0.5, 1, 2, 3]
    [everything] = manifest["decay"]["tissues"]
    assert (everything["name"], manifest["decay"]["segmentation"]) == ("all voxels", "")
    assert everything["median"] == pytest.approx(np.exp(-0.7 * np.array([0.5, 1, 2, 3])), rel=0.02)
    image = nib.load(out / "sub-01/dwi/sub-01_model-mcmicro_param-d_desc-std_dwimap.nii.gz")
    spread = image.get_fdata()[np.isfinite(image.get_fdata())]
    median, share = manifest["obtained_sd"]["all voxels"]["d"]
    assert median == pytest.approx(np.median(spread), rel=1e-5)
    assert share <= 1
