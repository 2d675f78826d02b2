"""Public example trees with empty images: what the command line says, and how it ends."""

from __future__ import annotations

import json
import re

import pytest

from bids_gacelle.cli.main import main

ELIGIBLE = {
    "qmri_megre": {("01", "", "r2star")},
    "qmri_vfa": {("01", "", "despot1")},
    "qmri_mpm": {("01", "", "r2star"), ("01", "", "despot1")},
    "qmri_qsm": set(),
    "qmri_tb1tfl": set(),
    "ds114": set(),
    "dwi_deriv": set(),
    "ds000001-fmriprep": set(),
}
EMPTY_IMAGE = {
    "qmri_megre": "sub-01_echo-01_MEGRE.nii.gz",
    "qmri_mpm": "sub-01_acq-PDw_echo-1_flip-1_mt-off_MPM.nii",
    "qmri_vfa": "sub-01_flip-1_VFA.nii.gz",
}
WHY_NOT = {
    "qmri_qsm": "no MEGRE images",
    "qmri_tb1tfl": "no VFA images",
    "ds114": "at least 2 different shells",
    "dwi_deriv": "at least 2 different shells",
    "ds000001-fmriprep": "no dwi images",
}


def call(shared, tree, out, *words):
    data = shared / "data/bids_examples" / tree
    return main([str(data), str(out), "participant", "--nprocs", "1", *words])


@pytest.mark.parametrize("tree", ELIGIBLE)
def test_dry_run_lists_what_is_eligible(shared, tree, tmp_path, capsys):
    code = call(shared, tree, tmp_path / "out", "--dry-run")
    text = capsys.readouterr().out
    row = re.compile(r"^sub-(\w+) +(?:ses-(\w+)|-) +.*? +(r2star|despot1|mcmicro|nexi) +yes", re.M)
    assert set(row.findall(text)) == ELIGIBLE[tree]
    assert code == (0 if ELIGIBLE[tree] else 3)
    assert WHY_NOT.get(tree, "no") in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tree", ELIGIBLE)
def test_real_run_ends_with_3_and_names_the_file(shared, tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(shared, tree, out) == 3
    error = capsys.readouterr().err
    assert "Traceback" not in error
    [path] = out.glob("logs/*/summary.json")
    jobs = json.loads(path.read_text())["jobs"]
    assert not any(job["status"] == "ok" for job in jobs)
    reasons = " ".join(job["reason"] for job in jobs)
    assert EMPTY_IMAGE.get(tree, WHY_NOT.get(tree)) in reasons
    assert not list(out.rglob("*.nii.gz"))


def test_milliseconds_and_strings_are_reported(shared, tmp_path, capsys):
    call(shared, "qmri_tb1tfl", tmp_path / "out", "--dry-run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "_TB1TFL.json" in line]
    [echo] = [line for line in lines if "EchoTime" in line and "acq-famp" in line]
    assert "1.97" in echo
    assert "probably ms" in echo
    [repetition] = [line for line in lines if "RepetitionTime" in line and "acq-famp" in line]
    assert '"6.8"' in repetition
    assert "string" in repetition
