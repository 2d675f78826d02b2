"""Inputs beside plain BIDS, from the command line to the maps."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.bids.schemes import read_scheme
from bids_gacelle.cli.main import main
from bids_gacelle.workflows import run as workflow_run
from tests.datasets import SHAPE, add_dwi, new_dataset, write_image, write_json

INSIDE = np.zeros(SHAPE, bool)
INSIDE[2:5, 2:5, 1:3] = True
SIGMA = 5.0  # of the noise that add_dwi adds
MAP = "sub-{0}/dwi/sub-{0}{1}_model-mcmicro_param-d{2}_dwimap"


@pytest.fixture(autouse=True)
def _no_pages(monkeypatch):
    monkeypatch.setattr(workflow_run, "write_report", lambda out, subject: out / "page")


@pytest.fixture
def study(tmp_path):
    """A dataset with one dwi, and a mask of 18 of its voxels."""
    root = new_dataset(tmp_path / "data")
    add_dwi(root)
    write_image(tmp_path / "mask.nii.gz", INSIDE)
    return root


def run(study, out, *words):
    return main([
        str(study), str(out), "participant", "--nprocs", "1", "--models", "mcmicro",
        *map(str, words),
    ])  # fmt: skip


def masked(study):
    return ("--mask", study.parent / "mask.nii.gz")


def load(out, name):
    return np.asarray(nib.load(out / f"{name}.nii.gz").dataobj)[INSIDE]


def manifest(out):
    (path,) = out.glob("sub-*/**/*_manifest.json")
    return json.loads(path.read_text())


def hcp_tree(study, folder):
    """The same dwi as a participant of another layout."""
    target = study.parent / "tree" / folder
    target.mkdir(parents=True)
    source = study / "sub-01/dwi/sub-01_dwi"
    shutil.copy(f"{source}.nii.gz", target / "data.nii.gz")
    shutil.copy(f"{source}.bval", target / "bvals")
    shutil.copy(f"{source}.bvec", target / "bvecs")
    write_image(target / "nodif_brain_mask.nii.gz", INSIDE)
    return target


# ------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    ("kind", "folder", "subject", "entities"),
    [
        ("hcpya", "100307/T1w/Diffusion", "100307", "_space-ACPC"),
        ("ukb", "42/dMRI/dMRI", "42", ""),
    ],
)
def test_a_layout_gives_the_maps_of_the_same_data_in_bids(
    study, tmp_path, bids_errors, kind, folder, subject, entities
):
    hcp_tree(study, folder)
    assert run(study, tmp_path / "bids", *masked(study)) == 0
    out = tmp_path / "out"
    assert run(tmp_path / "tree", out, "--input-type", kind) == 0
    for statistic in ("", "_desc-std"):
        expected = load(tmp_path / "bids", MAP.format("01", "", statistic))
        found = load(out, MAP.format(subject, entities, statistic))
        assert np.array_equal(found, expected)
        assert (expected > 0).all()
    sidecar = json.loads((out / (MAP.format(subject, entities, "") + ".json")).read_text())
    assert sidecar["Preprocessed"] is True
    assert sidecar["Sources"] == [
        f"bids:raw:{folder}/{name}.nii.gz" for name in ("data", "nodif_brain_mask")
    ]
    assert bids_errors(out) == []


def test_times_of_hcp_are_asked_for(study, tmp_path, capsys):
    hcp_tree(study, "100307/T1w/Diffusion")
    words = ("--input-type", "hcpya", "--models", "nexi", "--dry-run")
    assert run(tmp_path / "tree", tmp_path / "out", *words) == 0  # mcmicro is possible
    assert "--small-delta 10.6ms --big-delta 43.1ms" in capsys.readouterr().out
    assert run(tmp_path / "tree", tmp_path / "out", "--input-type", "ukb", "--dry-run") == 3


def test_a_layout_that_is_not_there(study, tmp_path, capsys):
    assert run(study, tmp_path / "out", "--input-type", "ukb") == 2
    assert "has no folder of a participant as --input-type ukb" in capsys.readouterr().err


# -------------------------------------------------------------------------------- noise


def test_noise_map_decides_the_standard_deviation(study, tmp_path):
    stds = []
    for factor in (1.0, 3.0):
        noise = write_image(tmp_path / f"noise{factor:g}.nii.gz", np.full(SHAPE, factor * SIGMA))
        out = tmp_path / f"out{factor:g}"
        assert run(study, out, *masked(study), "--noise-map", noise) == 0
        stds.append(load(out, MAP.format("01", "", "_desc-std")))
    np.testing.assert_allclose(stds[1], 3 * stds[0], rtol=0.02)
    record = manifest(out)
    assert [i["role"] for i in record["inputs"] if "noise" in i["role"]] == ["dwi run noise map"]
    assert "and the noise map" in record["methods"]
    assert not [w for w in record["warnings"] if "another unit" in w]


def test_noise_map_in_another_unit(study, tmp_path):
    noise = write_image(tmp_path / "noise.nii.gz", np.full(SHAPE, 1e-3 * SIGMA))
    out = tmp_path / "out"
    write_json(study / "dwi.json", {})
    bval = study / "sub-01/dwi/sub-01_dwi.bval"
    bval.write_text(bval.read_text().replace("1000 1000 1000", "0 0 0", 1))  # five b=0 images
    assert run(study, out, *masked(study), "--noise-map", noise) == 0
    (warning,) = [w for w in manifest(out)["warnings"] if "noise map" in w]
    assert "times the spread of the b=0 images (median)" in warning


def test_noise_map_on_another_grid(study, tmp_path, capfd):
    noise = write_image(tmp_path / "noise.nii.gz", np.ones((4, 4, 4)))
    assert run(study, tmp_path / "out", "--noise-map", noise) == 3
    error = capfd.readouterr().err
    assert "its shape is 4 x 4 x 4, not 7 x 6 x 5. It was asked for with --noise-map." in error


def test_noise_map_without_a_value(study, tmp_path, capfd):
    noise = write_image(tmp_path / "noise.nii.gz", np.zeros(SHAPE))
    assert run(study, tmp_path / "out", "--noise-map", noise) == 1
    told = capfd.readouterr().err
    assert f"{noise} has no positive value in any voxel" in told
    assert "--ignore noise" in told


def test_resume_notices_another_noise_map(study, tmp_path):
    out, noise = tmp_path / "out", tmp_path / "noise.nii.gz"
    words = (*masked(study), "--resume")
    hashes = []
    assert run(study, out, *words) == 0
    hashes.append(manifest(out)["fit_hash"])
    for level in (5.0, 5.0, 6.0):
        write_image(noise, np.full(SHAPE, level))
        assert run(study, out, *words, "--noise-map", noise) == 0
        hashes.append(manifest(out)["fit_hash"])
    assert len(set(hashes)) == 3
    assert hashes[1] == hashes[2]


# ---------------------------------------------------------------------------- gradients


def test_gradient_deviations_scale_the_b_values_of_each_voxel(study, tmp_path):
    """The signal depends on b times diffusivity: the more b, the lower the diffusivity."""
    strength = 1 + np.linspace(-0.1, 0.1, SHAPE[0])[:, None, None] * np.ones(SHAPE)
    deviation = np.zeros((*SHAPE, 9))
    deviation[..., [0, 4, 8]] = (strength - 1)[..., None]
    target = hcp_tree(study, "100307/T1w/Diffusion")
    assert run(tmp_path / "tree", tmp_path / "plain", "--input-type", "hcpya") == 0
    write_image(target / "grad_dev.nii.gz", deviation)
    out = tmp_path / "out"
    assert run(tmp_path / "tree", out, "--input-type", "hcpya") == 0
    name = MAP.format("100307", "_space-ACPC", "")
    nominal, corrected = load(tmp_path / "plain", name), load(out, name)
    np.testing.assert_allclose(corrected * strength[INSIDE] ** 2, nominal, rtol=2e-3)
    record = manifest(out)
    assert "corrected for gradient nonlinearity" in record["methods"]
    assert "gradient deviations" in [i["role"] for i in record["inputs"]]
    # the same as an option on BIDS data
    path, given = target / "grad_dev.nii.gz", tmp_path / "given"
    assert run(study, given, *masked(study), "--gradient-deviation", path) == 0
    np.testing.assert_array_equal(load(given, MAP.format("01", "", "")), corrected)
    assert run(tmp_path / "tree", out, "--input-type", "hcpya", "--ignore", "graddev") == 0
    np.testing.assert_array_equal(load(out, name), nominal)


def test_gradient_deviations_in_percent(study, tmp_path, capfd):
    path = write_image(tmp_path / "grad_dev.nii.gz", np.full((*SHAPE, 9), 3.0))
    assert run(study, tmp_path / "out", "--gradient-deviation", path) == 1
    assert "If they are percent, divide them by 100" in capfd.readouterr().err


# ------------------------------------------------------------------------------ schemes


def test_scheme_there_and_back(study, tmp_path, bids_errors):
    """What --write-scheme writes gives the same maps to images without bval, bvec and times."""
    out, scheme = tmp_path / "out", tmp_path / "out/sub-01/dwi/sub-01_dwi.scheme"
    assert run(study, out, *masked(study)) == 0
    assert not scheme.exists()
    assert run(study, out, *masked(study), "--write-scheme", "--resume") == 0
    assert bids_errors(out) == []
    assert str(scheme.relative_to(out)) in manifest(out)["outputs"]
    table = read_scheme(scheme)
    assert table.b == pytest.approx(np.r_[0, 0, np.repeat([1000, 2000, 3000], 20)])
    assert set(table.big_delta) == {0.03}
    assert set(table.echo_time) == {0.07}
    expected = load(out, MAP.format("01", "", ""))
    for extension in (".bval", ".bvec", ".json"):
        (study / f"sub-01/dwi/sub-01_dwi{extension}").unlink()
    again = tmp_path / "again"
    assert run(study, again, *masked(study), "--scheme-file", scheme) == 0
    np.testing.assert_allclose(load(again, MAP.format("01", "", "")), expected, rtol=1e-4)
    roles = [i["role"] for i in manifest(again)["inputs"]]
    assert roles == ["dwi run image", "dwi run scheme", "mask"]


def test_scheme_of_unknown_times_is_not_written(study, tmp_path):
    (study / "sub-01/dwi/sub-01_dwi.json").unlink()
    out = tmp_path / "out"
    assert run(study, out, *masked(study), "--write-scheme") == 0
    assert not list(out.rglob("*.scheme"))
    assert any("no scheme file" in w for w in manifest(out)["warnings"])
