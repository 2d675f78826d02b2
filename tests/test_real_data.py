"""The real scans beside the checkout, from the command line to maps, tables and report."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.optimize import least_squares

from bids_gacelle.cli.main import main

pytestmark = pytest.mark.slow


def run(dataset, out, *words):
    code = main([str(dataset), str(out), "participant", "--nprocs", "1", *map(str, words)])
    assert code == 0
    return out


def values(path):
    return np.asarray(nib.load(path).dataobj, dtype=np.float64)


def summary_of(out):
    [path] = out.glob("logs/*/summary.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def megre(shared, tmp_path_factory):
    out = tmp_path_factory.mktemp("megre")
    return run(shared / "data/megre_brain_romeo", out, "--models", "r2star")


def test_r2star_agrees_with_scipy(megre, shared):
    source = shared / "data/megre_brain_romeo/sub-01/anat"
    data = np.stack([values(source / f"sub-01_echo-{i}_part-mag_MEGRE.nii.gz") for i in (1, 2, 3)])
    ours = values(megre / "sub-01/anat/sub-01_R2starmap.nii.gz")
    flags = values(megre / "sub-01/anat/sub-01_desc-r2starfitflag_dseg.nii.gz")
    te = np.array([0.004, 0.008, 0.012])
    voxels = np.argwhere(flags == 0)
    voxels = voxels[np.random.default_rng(1).choice(len(voxels), 300, replace=False)]
    apart = []
    for voxel in map(tuple, voxels):
        y = data[(slice(None), *voxel)]
        scale = y.max()
        fit = least_squares(
            lambda p, y=y / scale: p[0] * np.exp(-te * p[1]) - y,
            [1.0, 30.0],
            bounds=([0, 0], [np.inf, 1000]),
            x_scale=[1, 30],
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
        )
        apart.append(abs(ours[voxel] - fit.x[1]) / fit.x[1])
    assert np.median(apart) < 1e-3
    assert np.quantile(apart, 0.95) < 1e-2


def test_complex_r2star_is_that_of_the_magnitudes_where_the_signal_is_high(
    megre, shared, tmp_path
):
    """Phases of a real scan, in rad; the field is that of the phase difference of two echoes."""
    words = ("--models", "r2star", "--set", "r2star.signal=complex")
    out = run(shared / "data/megre_brain_romeo", tmp_path / "out", *words)
    both = [values(folder / "sub-01/anat/sub-01_R2starmap.nii.gz") for folder in (megre, out)]
    source = shared / "data/megre_brain_romeo/sub-01/anat"
    first = values(source / "sub-01_echo-1_part-mag_MEGRE.nii.gz")
    strong = np.isfinite(both).all(axis=0) & (first > np.quantile(first, 0.5))
    assert 20 < np.median(both[1][strong]) < 45  # the scan decays fast, see its README
    assert np.corrcoef(both[0][strong], both[1][strong])[0, 1] > 0.999
    assert np.median(np.abs(both[0] - both[1])[strong]) < 0.1
    field = values(out / "sub-01/anat/sub-01_model-r2star_param-freqbkg_anatmap.nii.gz")
    phases = [values(source / f"sub-01_echo-{i}_part-phase_MEGRE.nii.gz") for i in (1, 2)]
    turn = np.exp(1j * (phases[1] - phases[0] - 2 * np.pi * 0.004 * field))
    assert np.median(np.abs(np.angle(turn[strong]))) < 0.05


def test_megre_report_and_record(megre):
    page = (megre / "sub-01.html").read_text()
    assert "R2star" in page
    [job] = [j for j in summary_of(megre)["jobs"] if j["model"] == "r2star"]
    assert job["status"] == "ok"
    assert job["n_voxels"] > 100_000


def vfa(shared, out, *words):
    data = shared / "data/vfa_phantom_sepal"
    mask = data / "derivatives/masks/sub-phantom/anat/sub-phantom_desc-slab_mask.nii.gz"
    return run(data, out, "--models", "despot1", "--mask", mask, *words)


def closed_form_t1(shared):
    """Linear DESPOT1 in float64: S/sin(a) against S/tan(a) has the slope exp(-TR/T1)."""
    anat = shared / "data/vfa_phantom_sepal/sub-phantom/anat"
    data = np.stack([values(anat / f"sub-phantom_flip-{i}_VFA.nii.gz") for i in (1, 2, 3)])
    angle = np.deg2rad([2.0, 5.0, 12.0])[:, None, None, None]
    y, x = data / np.sin(angle), data / np.tan(angle)
    dx, dy = x - x.mean(0), y - y.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (dx * dy).sum(0) / (dx * dx).sum(0)
        return data, -0.0054 / np.log(slope)


def test_linear_despot1_is_the_closed_form(shared, tmp_path):
    out = vfa(shared, tmp_path, "--solver", "linear")
    ours = values(out / "sub-phantom/anat/sub-phantom_T1map.nii.gz")
    flags = values(out / "sub-phantom/anat/sub-phantom_desc-despot1fitflag_dseg.nii.gz")
    _, exact = closed_form_t1(shared)
    usable = flags == 0
    assert usable.sum() > 20_000
    np.testing.assert_allclose(ours[usable], exact[usable], rtol=1e-6)


def test_nonlinear_despot1_is_close_to_it(shared, tmp_path):
    out = vfa(shared, tmp_path)
    ours = values(out / "sub-phantom/anat/sub-phantom_T1map.nii.gz")
    flags = values(out / "sub-phantom/anat/sub-phantom_desc-despot1fitflag_dseg.nii.gz")
    data, exact = closed_form_t1(shared)
    vials = (flags == 0) & (data[1] > 50)
    assert abs(np.median(ours[vials]) / np.median(exact[vials]) - 1) < 0.015
    assert np.median(np.abs(ours[vials] / exact[vials] - 1)) < 0.015


def test_despot1_with_a_b1_map(shared, tmp_path):
    """R1 is that of the closed form at the flip angles that the map says."""
    source = tmp_path / "data"
    shutil.copytree(shared / "data/vfa_phantom_sepal", source)
    image = nib.load(source / "sub-phantom/anat/sub-phantom_flip-1_VFA.nii.gz")
    shape = [n // 4 for n in image.shape]
    b1 = 100 * np.linspace(0.8, 1.2, shape[0])[:, None, None] * np.ones(shape)
    coarse = image.affine @ np.diag([*np.array(image.shape) / shape, 1])
    fmap = source / "sub-phantom/fmap"
    fmap.mkdir()
    nib.save(nib.Nifti1Image(b1.astype(np.float32), coarse), fmap / "sub-phantom_TB1map.nii.gz")
    (fmap / "sub-phantom_TB1map.json").write_text(json.dumps({"Units": "percent"}))
    mask = source / "derivatives/masks/sub-phantom/anat/sub-phantom_desc-slab_mask.nii.gz"
    out = run(
        source, tmp_path / "out", "--models", "despot1", "--mask", mask, "--solver", "linear"
    )
    ours = values(out / "sub-phantom/anat/sub-phantom_T1map.nii.gz")
    flags = values(out / "sub-phantom/anat/sub-phantom_desc-despot1fitflag_dseg.nii.gz")
    _, plain = closed_form_t1(shared)
    # small angles: T1 is that without the map over b1^2
    column = np.arange(ours.shape[0]) / (ours.shape[0] / shape[0])
    known = np.interp(column, np.arange(shape[0]), b1[:, 0, 0] / 100)[:, None, None]
    ratio = ours * known**2 / plain
    usable = flags == 0
    assert usable.sum() > 20_000
    assert abs(np.median(ratio[usable]) - 1) < 0.02
    assert np.median(np.abs(ratio[usable] - 1)) < 0.03


def dwi(shared, out, *words):
    data = shared / "data/dwi_brain_mdt"
    return run(data, out, "-d", f"masks={data / 'derivatives/masks'}", *words)


def test_mcmicro_on_one_run(shared, tmp_path):
    filters = tmp_path / "filters.json"
    filters.write_text(json.dumps({"dwi": {"acquisition": "b2k"}}))
    out = dwi(shared, tmp_path / "out", "--models", "mcmicro", "--bids-filter-file", filters)
    fn = values(out / "sub-01/dwi/sub-01_acq-b2k_model-mcmicro_param-fn_dwimap.nii.gz")
    mask = values(out / "sub-01/dwi/sub-01_acq-b2k_desc-mcmicro_mask.nii.gz") > 0
    assert mask.sum() > 8000
    assert 0.2 < np.median(fn[mask]) < 0.8
    assert "acq-b6k" not in (out / "sub-01.html").read_text()
    sidecar = out / "sub-01/dwi/sub-01_acq-b2k_model-mcmicro_param-fn_dwimap.json"
    assert json.loads(sidecar.read_text())["Preprocessed"] is False


def test_nexi_with_both_runs(shared, tmp_path):
    out = dwi(shared, tmp_path, "--models", "nexi", "--combine-dwi")
    dwi_dir = out / "sub-01/dwi"
    sidecar = json.loads((dwi_dir / "sub-01_model-nexi_param-tex_dwimap.json").read_text())
    assert sorted(set(sidecar["BigDelta"])) == [0.0265, 0.042]
    assert sorted(set(sidecar["SmallDelta"])) == [0.0162, 0.0317]
    assert len(sidecar["BValues"]) == 10
    manifest = json.loads((out / "sub-01/figures/sub-01_desc-nexi_manifest.json").read_text())
    sources = {a["name"]: " ".join(a["sources"]) for a in manifest["acquisition"]}
    assert "LargeDelta" in sources["Delta"]
    flags = values(dwi_dir / "sub-01_desc-nexifitflag_dseg.nii.gz").astype(int)
    mask = values(dwi_dir / "sub-01_desc-nexi_mask.nii.gz") > 0
    unusable = ((flags & 4) > 0) & mask
    assert unusable.sum() <= 0.01 * mask.sum()


@pytest.fixture(scope="module")
def tissues(shared):
    """White and grey matter by the diffusion tensor of the run that the maps are not judged by.

    Least squares of the logarithm; voxels well inside the brain.
    """
    folder = shared / "data/dwi_brain_mdt"
    base = folder / "sub-01/dwi/sub-01_acq-b2k_dwi"
    b = np.loadtxt(base.with_suffix(".bval")).ravel() / 1000
    g = np.loadtxt(base.with_suffix(".bvec"))
    data = values(base.with_suffix(".nii.gz"))[..., b < 1.5]
    g, b = g.T[b < 1.5] if len(g) == 3 else g[b < 1.5], b[b < 1.5]
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    design = [np.ones(len(b)), *(-b * g[:, i] * g[:, j] * (1 + (i != j)) for i, j in pairs)]
    signal = np.log(np.maximum(data, 1e-3)).reshape(-1, len(b))
    found = np.linalg.lstsq(np.transpose(design), signal.T, rcond=None)[0][1:]
    tensor = np.zeros((3, 3, found.shape[1]))
    for (i, j), row in zip(pairs, found, strict=True):
        tensor[i, j] = tensor[j, i] = row
    eigen = np.linalg.eigvalsh(tensor.transpose(2, 0, 1)).reshape(*data.shape[:3], 3)
    md = eigen.mean(-1)
    spread, size = ((eigen - md[..., None]) ** 2).sum(-1), (eigen**2).sum(-1)
    fa = np.sqrt(1.5 * spread / np.maximum(size, 1e-12))
    mask = folder / "derivatives/masks/sub-01/dwi/sub-01_acq-b6k_desc-brain_mask.nii.gz"
    inner = ndimage.binary_erosion(values(mask) > 0, np.ones((3, 3, 1)), iterations=4)
    white = inner & (fa > 0.45) & (md < 1)
    grey = inner & (fa < 0.2) & (md > 0.6) & (md < 1)
    assert white.sum() > 1000
    assert grey.sum() > 1000
    return {"white": white, "grey": grey}


def contrast(folder, name, tissues):
    """Return the medians of a map in white and in grey matter."""
    maps = values(folder / f"sub-01_{name}_dwimap.nii.gz")
    return [float(np.median(maps[tissues[t]])) for t in ("white", "grey")]


def share_unusable(folder, prefix, model):
    flags = values(folder / f"sub-01_{prefix}desc-{model}fitflag_dseg.nii.gz").astype(int)
    return ((flags & 4) > 0).sum() / ((flags & 1) == 0).sum()


def test_models_of_both_runs_tell_white_from_grey_matter(shared, tmp_path, tissues):
    models = ("mcmicro", "axcalibersmt", "nexi")
    words = ("--models", ",".join(models), "--set", "nexi.l_max=2")
    folder = dwi(shared, tmp_path, "--combine-dwi", *words) / "sub-01/dwi"
    for model in models:
        white, grey = contrast(folder, f"model-{model}_param-fn", tissues)
        assert white > grey + 0.2, model
        assert share_unusable(folder, "", model) <= 0.01
    white, grey = contrast(folder, "model-nexi_param-p2", tissues)
    assert white > grey + 0.1
    page = (tmp_path / "sub-01.html").read_text()
    assert "S_2 is left out of the fit" in page  # three directions at b = 750
    assert "not estimable voxel by voxel" in page


def test_sandi_of_one_run_tells_white_from_grey_matter(shared, tmp_path, tissues):
    filters = tmp_path / "filters.json"
    filters.write_text(json.dumps({"dwi": {"acquisition": "b6k"}}))
    words = ("--models", "sandi", "--prior", "weak", "--bids-filter-file", filters)
    folder = dwi(shared, tmp_path / "out", *words) / "sub-01/dwi"
    white, grey = contrast(folder, "acq-b6k_model-sandi_param-fn", tissues)
    assert white > grey + 0.1
    white, grey = contrast(folder, "acq-b6k_model-sandi_param-fs", tissues)
    assert grey > white
    assert share_unusable(folder, "acq-b6k_", "sandi") <= 0.01


def test_every_output_is_valid_bids(megre, shared, tmp_path, bids_errors):
    outputs = [
        megre,
        vfa(shared, tmp_path / "vfa"),
        dwi(shared, tmp_path / "dwi", "--models", "mcmicro"),
        dwi(shared, tmp_path / "dwi2", "--models", "nexi,sandi", "--combine-dwi"),
    ]
    for out in outputs:
        assert bids_errors(out) == []
