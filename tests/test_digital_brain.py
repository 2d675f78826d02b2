"""The digital brain from end to end: are the maps right, and are their uncertainties honest?"""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import stats

from bids_gacelle.cli.main import main
from bids_gacelle.phantom.write import write_phantom

pytest.importorskip("nilearn")
pytestmark = pytest.mark.slow

RELAXOMETRY = {"r2star": ["S0", "R2star"], "despot1": ["M0", "R1"]}
DIFFUSION = {"mcmicro": ["fn", "d"], "nexi": ["fn", "dn", "de", "tex"]}


def fit(base, models, **phantom):
    data, out = base / "data", base / "out"
    write_phantom(data, subjects=1, resolution=5.0, seed=1, **phantom)
    truth = data / "derivatives/truth"
    words = [str(data), str(out), "participant", "--models", models, "--nprocs", "1"]
    assert main([*words, "--combine-dwi", "-d", f"truth={truth}"]) == 0
    return truth / "sub-01", out / "sub-01"


def coverage_table(truth, out, model, parameters):
    """Rows (tissue, parameter, bias, coverage of the 95 % interval, voxels, share at a bound)."""
    [manifest] = out.glob(f"figures/sub-01_*desc-{model}_manifest.json")
    manifest = json.loads(manifest.read_text())
    [flags] = out.glob(f"*/sub-01_*desc-{model}fitflag_dseg.nii.gz")
    folder = flags.parent
    flags = nib.load(flags).get_fdata().astype(int)
    labels = nib.load(truth / "anat/sub-01_desc-tissues_dseg.nii.gz").get_fdata()
    names = (truth / "anat/sub-01_desc-tissues_dseg.tsv").read_text().splitlines()[1:]
    done = manifest["fit"]
    degrees = np.inf if done["sigma"] == "given" else done["degrees_of_freedom"]
    width = stats.t.ppf(0.975, degrees)
    rows = []
    maps = {m["name"]: m for m in manifest["maps"]}
    for parameter in parameters:
        path = out.parent / maps[parameter]["file"]
        value = nib.load(path).get_fdata()
        std = nib.load(out.parent / maps[parameter]["std"]).get_fdata()
        true = nib.load(truth / folder.name / path.name).get_fdata()
        for line in names:
            index, name = line.split("\t")[:2]
            here = (labels == int(index)) & ((flags & (1 | 4)) == 0)
            known = here & np.isfinite(std) & np.isfinite(true)
            error = (value - true)[known]
            inside = np.abs(error) <= width * std[known]
            if not known.any():  # no truth, as of neurites in CSF
                continue
            bound = 1 - (np.isfinite(std) & here).sum() / here.sum()
            rows.append((name, parameter, error.mean(), inside.mean(), known.sum(), bound))
    return rows


def show(model, rows):
    print(
        f"\n{model}: tissue, parameter, bias, coverage of the 95 % interval, voxels, no interval"
    )
    for name, parameter, bias, covered, n, bound in rows:
        print(f"  {name:22} {parameter:7} {bias:+10.4f} {covered:7.1%} {n:7d} {bound:7.1%}")


def overall(rows, parameter):
    kept = [(covered, n) for _, p, _, covered, n, _ in rows if p == parameter and n]
    return np.average([c for c, _ in kept], weights=[n for _, n in kept])


def test_relaxometry_intervals_cover_the_truth(tmp_path, capsys, bids_errors):
    truth, out = fit(tmp_path, "r2star,despot1", contrasts=["megre", "vfa"], snr=50)
    tables = {m: coverage_table(truth, out, m, p) for m, p in RELAXOMETRY.items()}
    with capsys.disabled():
        for model, rows in tables.items():
            show(model, rows)
    assert bids_errors(out.parent) == []
    for model, rows in tables.items():
        for parameter in RELAXOMETRY[model]:
            assert 0.93 <= overall(rows, parameter) <= 0.97, (model, parameter)


@pytest.mark.parametrize("model", list(DIFFUSION))
def test_diffusion_bias_and_coverage_are_known(tmp_path, capsys, bids_errors, model):
    truth, out = fit(tmp_path, model, contrasts=["dwi"], snr=50, dwi_model=model)
    rows = coverage_table(truth, out, model, DIFFUSION[model])
    with capsys.disabled():
        show(model, rows)
    assert bids_errors(out.parent) == []
    by = {(name, parameter): (bias, covered) for name, parameter, bias, covered, _, _ in rows}
    assert abs(by["White matter", "fn"][0]) < 0.06
    assert abs(by["Cerebral cortex", "fn"][0]) < 0.06
    assert by["White matter", "fn"][1] > 0.75


def test_myelin_water_of_parcels_is_right(tmp_path, capsys, bids_errors):
    """Steady states by direct simulation, complex echoes, field and B1 as in a head."""
    truth, out = fit(tmp_path, "mcrmwi", contrasts=["mwi"], snr=150)
    rows = coverage_table(truth, out, "mcrmwi", ["MWF", "R1IEW", "kIEWM"])
    with capsys.disabled():
        show("mcrmwi", rows)
    assert bids_errors(out.parent) == []
    covered = {(name, p): share for name, p, _, share, _, _ in rows}
    assert covered["White matter", "MWF"] > 0.85
    name = "sub-01_acq-mwi_desc-mcrmwi_MWFmap.nii.gz"
    found, true = (nib.load(base / "anat" / name).get_fdata() for base in (out, truth))
    parcels = nib.load(truth / "anat/sub-01_seg-parcels_dseg.nii.gz").get_fdata()
    assert len(np.unique(parcels)) > 20
    medians = [
        [np.median(values[(parcels == index) & (found > 0)]) for index in np.unique(parcels)[1:]]
        for values in (found, true)
    ]
    assert abs(np.mean(np.subtract(*medians))) < 0.5  # percent of water
    assert np.corrcoef(medians)[0, 1] > 0.98
