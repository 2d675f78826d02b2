"""MPM and MTS, from the command line to the maps."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.cli.main import main
from bids_gacelle.workflows import run as workflow_run
from tests.datasets import R2STAR, SHAPE, add_contrasts, new_dataset, write_image


@pytest.fixture(autouse=True)
def _no_pages(monkeypatch):
    monkeypatch.setattr(workflow_run, "write_report", lambda out, subject: out / "page")


@pytest.fixture
def fitted(tmp_path):
    """Maps by name, of a model fitted to contrasts."""

    def fit(model, suffix, echoes):
        root = new_dataset(tmp_path / "data")
        add_contrasts(root, suffix, echoes=echoes)
        mask = np.zeros(SHAPE)
        mask[2:4, 2:4, 2] = 1
        words = ("--mask", str(write_image(tmp_path / "mask.nii.gz", mask)), "--nprocs", "1")
        out = tmp_path / "out"
        assert main([str(root), str(out), "participant", "--models", model, *words]) == 0
        inside = mask > 0
        return {
            path.name.removesuffix(".nii.gz"): np.asarray(nib.load(path).dataobj)[inside]
            for path in (out / "sub-01/anat").glob("*.nii.gz")
        }

    return fit


def test_each_contrast_has_its_decay(fitted):
    maps = fitted("r2star", "MPM", (3, 5, 4))
    names = {name for name in maps if name.endswith("_R2starmap") and "desc" not in name}
    assert names == {f"sub-01_acq-{acq}_R2starmap" for acq in ("MTw", "PDw", "T1w")}
    for name in names:
        np.testing.assert_allclose(maps[name], R2STAR, rtol=1e-4)


@pytest.mark.parametrize("suffix", ["MPM", "MTS"])
def test_t1_of_contrasts_without_mt_pulse(fitted, suffix):
    maps = fitted("despot1", suffix, (1, 1, 1))
    np.testing.assert_allclose(maps["sub-01_T1map"], 1.0, rtol=1e-4)
    assert not any("acq-" in name or "mt-" in name for name in maps)
