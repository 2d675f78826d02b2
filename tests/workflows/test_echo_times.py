"""Dwi runs of several echo times, from the command line to the maps."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.cli.main import main
from tests.datasets import SHAPE, add_dwi, new_dataset, write_image, write_json

INSIDE = np.zeros(SHAPE, bool)
INSIDE[2:5, 2:5, 1:3] = True
RATE = 12.5  # 1/s
TIMES = (0.07, 0.1)


@pytest.fixture
def study(tmp_path):
    """Two runs; the second has decayed with one rate between their echo times."""
    root = new_dataset(tmp_path / "data")
    for number, time in enumerate(TIMES, start=1):
        path = add_dwi(root, run=number)
        decayed = nib.load(path).get_fdata() * np.exp(-RATE * (time - TIMES[0]))
        write_image(path, decayed)
        about = path.with_name(path.name.replace(".nii.gz", ".json"))
        write_json(about, {**json.loads(about.read_text()), "EchoTime": time})
    write_image(tmp_path / "mask.nii.gz", INSIDE)
    return root


def run(study, out, *words):
    mask = str(study.parent / "mask.nii.gz")
    return main([
        str(study), str(out), "participant", "--nprocs", "1", "--models", "mcmicro",
        "--mask", mask, "--set", "mcmicro.relaxation=true", *words,
    ])  # fmt: skip


def test_relaxation_is_that_of_the_runs(study, tmp_path):
    out = tmp_path / "out"
    assert run(study, out, "--combine-dwi") == 0
    [path] = out.glob("sub-01/dwi/*model-mcmicro_param-r2e_dwimap.nii.gz")
    rate = np.asarray(nib.load(path).dataobj)[INSIDE]
    assert abs(np.nanmedian(rate) - RATE) < 0.5
    told = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    assert told["BValues"] == [1, 2, 3, 0, 1, 2, 3]
    assert told["EchoTime"] == [0.07] * 3 + [0.1] * 4


def test_runs_apart_have_no_relaxation(study, tmp_path):
    assert run(study, tmp_path / "out") != 0
    [log] = (tmp_path / "out").glob("logs/*/bids_gacelle.log")
    assert "echo time" in log.read_text()


@pytest.mark.parametrize("forced", [[], ["--fit-undetermined"]])
def test_echo_times_without_the_b_values_of_axons_suit_no_model_of_axons(
    study, tmp_path, capsys, forced
):
    """It is said before anything is computed, and no option can help."""
    words = [str(study), str(tmp_path / "out"), "participant", "--nprocs", "1", "--combine-dwi"]
    main([*words, "--models", "axonalt2", "--dry-run", *forced])
    shown = capsys.readouterr().out
    assert "no: axonalt2" in shown
    assert "b >= 4 ms/um^2" in shown
    assert "--fit-undetermined" not in shown
