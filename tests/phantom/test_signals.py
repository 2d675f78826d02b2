"""What is written, against formulas coded here once more."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy.linalg import expm
from scipy.special import erf

from bids_gacelle.engine import prepare_dwi
from bids_gacelle.engine.prepare import DwiVolumes
from bids_gacelle.phantom.anatomy import Label, make_anatomy
from bids_gacelle.phantom.tissue import TISSUES, fibre_direction

RUNS = (13, 21, 30)


def sidecar(dataset, path):
    return json.loads((dataset.root / path).read_text())


def gradients(dataset, stem):
    return np.loadtxt(f"{dataset.root / stem}.bval"), np.loadtxt(f"{dataset.root / stem}.bvec").T


def karger(b, big_delta, fn, dn, de, tex):
    """S_0 and |int M P2| of NEXI by Gauss-Legendre over matrix exponentials of the rate equations.

    d/dt (n, e) with exchange rates (1-fn)/tex out of and fn/tex into the neurites, and diffusion
    dn x^2 and de; the time scale is the diffusion time.
    """
    nodes, weights = np.polynomial.legendre.leggauss(40)
    x, weights = (nodes + 1) / 2, weights / 2
    out, back = (1 - fn) / tex, fn / tex
    kernel = []
    for cosine in x:
        q2 = b / big_delta
        rates = [[-out - q2 * dn * cosine**2, back], [out, -back - q2 * de]]
        kernel.append(np.sum(expm(np.array(rates) * big_delta) @ [fn, 1 - fn]))
    return weights @ kernel, abs(weights @ (kernel * (1.5 * x**2 - 0.5)))


def test_echoes_decay_from_the_true_s0_at_the_true_rate(exact):
    stem = "sub-02/anat/sub-02"
    s0, rate = exact.truth(f"{stem}_S0map.nii.gz"), exact.truth(f"{stem}_R2starmap.nii.gz")
    brain = exact.labels("02") > 0
    for echo in range(1, 13):
        time = sidecar(exact, f"{stem}_echo-{echo}_MEGRE.json")["EchoTime"]
        assert time == pytest.approx(0.0022 + 0.00307 * (echo - 1))
        image = exact.image(f"{stem}_echo-{echo}_MEGRE.nii.gz")
        expected = s0 * np.exp(-time * rate)
        np.testing.assert_allclose(image[brain], expected[brain], rtol=1e-5)


def test_flip_angles_follow_the_ernst_equation_with_the_b1_that_is_written(exact):
    stem = "sub-01/anat/sub-01"
    m0, t1 = exact.truth(f"{stem}_M0map.nii.gz"), exact.truth(f"{stem}_T1map.nii.gz")
    b1 = exact.image("sub-01/fmap/sub-01_TB1map.nii.gz")
    assert sidecar(exact, "sub-01/fmap/sub-01_TB1map.json")["Units"] == "%"
    brain = exact.labels() > 0
    for flip in range(1, 5):
        about = sidecar(exact, f"{stem}_flip-{flip}_VFA.json")
        angle = np.radians(about["FlipAngle"] * b1 / 100)
        e1 = np.exp(-about["RepetitionTimeExcitation"] / t1)
        expected = m0 * np.sin(angle) * (1 - e1) / (1 - np.cos(angle) * e1)
        image = exact.image(f"{stem}_flip-{flip}_VFA.nii.gz")
        np.testing.assert_allclose(image[brain], expected[brain], rtol=1e-5)


def test_steady_state_of_the_echoes_is_that_of_the_same_tissue(exact):
    stem = "sub-01/anat/sub-01"
    angle = np.radians(20 * exact.image("sub-01/fmap/sub-01_TB1map.nii.gz") / 100)
    e1 = np.exp(-0.038 * exact.truth(f"{stem}_R1map.nii.gz"))
    steady = exact.truth(f"{stem}_M0map.nii.gz") * np.sin(angle)
    steady *= (1 - e1) / (1 - np.cos(angle) * e1)
    brain = exact.labels() > 0
    s0 = exact.truth(f"{stem}_S0map.nii.gz")
    np.testing.assert_allclose(s0[brain], steady[brain], rtol=1e-5)


def prepared(dataset, l_max, subject="01"):
    brain = dataset.labels(subject) > 0
    runs = []
    for delta in RUNS:
        stem = f"sub-{subject}/dwi/sub-{subject}_acq-D{delta}_dwi"
        about = sidecar(dataset, stem + ".json")
        assert about["BigDelta"] == pytest.approx(delta / 1000)
        bvals, bvecs = gradients(dataset, stem)
        signal = dataset.image(stem + ".nii.gz")[brain].T.astype(np.float32)
        timing = [np.full(len(bvals), 1000 * about[key]) for key in ("BigDelta", "SmallDelta")]
        runs.append(DwiVolumes(signal, bvals, bvecs, *timing))
    return prepare_dwi(runs, l_max=l_max), brain


@pytest.mark.parametrize("subject", ["01", "02"])
def test_invariants_of_the_written_volumes_are_those_of_nexi(exact, subject):
    """Powder averages and S_2, as the fit will see them, to 1e-3 of the signal at b=0."""
    data, brain = prepared(exact, 2, subject)
    stem = f"sub-{subject}/dwi/sub-{subject}_model-nexi_param-"
    truth = {n: exact.truth(f"{stem}{n}_dwimap.nii.gz") for n in ("fn", "dn", "de", "tex", "p2")}
    labels, shells = exact.labels(subject)[brain], len(data.scheme)
    assert shells == 10
    for label in (Label.CORTEX, Label.WHITE_MATTER, Label.THALAMUS, Label.PUTAMEN):
        for voxel in np.flatnonzero(labels == label)[:2]:
            fn, dn, de, tex, p2 = (float(truth[n][brain][voxel]) for n in truth)
            for i, (b, delta) in enumerate(zip(data.scheme.b, data.scheme.big_delta, strict=True)):
                s0, anisotropic = karger(b, delta, fn, dn, de, tex)
                assert data.signals[i, voxel] == pytest.approx(s0, abs=1e-3)
                assert data.signals[shells + i, voxel] == pytest.approx(p2 * anisotropic, abs=1e-3)


def test_cerebrospinal_fluid_diffuses_freely(exact):
    data, brain = prepared(exact, 2)
    stem = "sub-01/dwi/sub-01_model-nexi_param-"
    fluid = exact.labels()[brain] == Label.CSF
    de = exact.truth(f"{stem}de_dwimap.nii.gz")[brain][fluid]
    expected = np.exp(-np.outer(data.scheme.b, de))
    np.testing.assert_allclose(data.signals[:10, fluid], expected, atol=1e-6)
    assert not exact.truth(f"{stem}fn_dwimap.nii.gz")[brain][fluid].any()
    for name in ("dn", "tex", "p2", "rn"):
        assert np.isnan(exact.truth(f"{stem}{name}_dwimap.nii.gz")[brain][fluid]).all()


def test_mcmicro_brain_has_the_spherical_means_of_mcmicro(mcmicro):
    data, brain = prepared(mcmicro, 0)
    stem = "sub-01/dwi/sub-01_model-mcmicro_param-"
    f, d = (mcmicro.truth(f"{stem}{n}_dwimap.nii.gz")[brain] for n in ("fn", "d"))
    solid = mcmicro.labels()[brain] != Label.CSF
    for b, signal in zip(data.scheme.b, data.signals, strict=True):
        stick, extra = b * d, b * f * d
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = f * np.sqrt(np.pi / (4 * stick)) * erf(np.sqrt(stick))
            outer = np.exp(-b * (1 - f) * d) * np.sqrt(np.pi / (4 * extra)) * erf(np.sqrt(extra))
            mean += (1 - f) * outer
        np.testing.assert_allclose(signal[solid], mean[solid], atol=2e-6)
        np.testing.assert_allclose(signal[~solid], np.exp(-b * d[~solid]), atol=2e-6)


@pytest.mark.parametrize("subject", [1, 2])
def test_signal_is_lowest_along_the_fibres_in_scanner_coordinates(exact, subject):
    """A log-linear tensor from the files, turned by the affine: nothing of ours but the truth."""
    name = f"sub-{subject:02d}"
    stem = f"{name}/dwi/{name}_acq-D13_dwi"
    bvals, bvecs = gradients(exact, stem)
    image = nib.load(exact.root / f"{stem}.nii.gz")
    head = make_anatomy(subject, resolution=8.0)
    white = head.labels == Label.WHITE_MATTER
    low = bvals <= 1000
    x, y, z = bvecs[low].T
    weight = bvals[low][:, None] / 1000
    design = np.c_[np.ones(low.sum()), -weight * np.c_[x * x, y * y, z * z, x * y, x * z, y * z]]
    logs = np.log(np.asanyarray(image.dataobj)[white][:, low].T)
    _, xx, yy, zz, xy, xz, yz = np.linalg.lstsq(design, logs, rcond=None)[0]
    tensor = np.array([[xx, xy / 2, xz / 2], [xy / 2, yy, yz / 2], [xz / 2, yz / 2, zz]])
    main = np.linalg.eigh(np.moveaxis(tensor, -1, 0))[1][..., -1]
    # FSL: along the voxel axes when these are left-handed, as here.
    rotation = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    assert np.linalg.det(rotation) < 0
    fibres = fibre_direction(head, subject=subject, seed=0)[white]
    angle = np.degrees(np.arccos(np.abs(np.sum(main @ rotation.T * fibres, axis=1)).clip(0, 1)))
    assert np.max(angle) < 2


ECHO = tuple(f"sub-01/anat/sub-01_echo-{i}_MEGRE.nii.gz" for i in (1, 2))
FLIP = tuple(f"sub-01/anat/sub-01_flip-{i}_VFA.nii.gz" for i in (1, 2, 3, 4))
DIFFUSION = ("sub-01/dwi/sub-01_acq-D13_dwi.nii.gz",)


def volumes(dataset, paths):
    """All volumes of some images, (x, y, z, volume)."""
    images = [dataset.image(path).astype(float) for path in paths]
    return np.concatenate([image.reshape(*image.shape[:3], -1) for image in images], axis=3)


@pytest.mark.parametrize("paths", [ECHO, FLIP, DIFFUSION])
def test_noise_has_the_level_asked_for_and_is_rician(exact, noisy, paths):
    """SNR 40 of white matter in the brightest image; Rayleigh noise in air."""
    clean, measured = volumes(exact, paths), volumes(noisy, paths)
    white = exact.labels() == Label.WHITE_MATTER
    sigma = clean[white].mean(axis=0).max() / 40
    # Where the signal is far above it the noise is Gaussian.
    strong = white[..., None] & (clean > 8 * sigma)
    assert np.std((measured - clean)[strong]) == pytest.approx(sigma, rel=0.05)
    assert np.mean(measured[clean == 0]) == pytest.approx(sigma * np.sqrt(np.pi / 2), rel=0.03)


def test_images_with_noise_are_whole_numbers_and_without_it_exact(exact, noisy):
    assert noisy.image(ECHO[0]).dtype == np.int16
    assert exact.image(ECHO[0]).dtype == np.float32


@pytest.mark.parametrize("subject", ["01", "02"])
def test_truth_is_within_what_is_plausible_at_3_tesla(exact, subject):
    """Bounds per tissue: fluid, cortex, white matter, deep nuclei."""
    labels = exact.labels(subject)
    anat, dwi = f"sub-{subject}/anat/sub-{subject}", f"sub-{subject}/dwi/sub-{subject}_model-nexi"
    fluid, cortex, white = (labels == k for k in (Label.CSF, Label.CORTEX, Label.WHITE_MATTER))
    deep = labels >= Label.THALAMUS
    for path, ranges in {
        f"{anat}_R2starmap": ((1.5, 4), (12, 24), (15, 28), (20, 55)),
        f"{anat}_T1map": ((3.5, 4.5), (1.1, 1.7), (0.7, 1.05), (0.85, 1.45)),
        f"{dwi}_param-fn_dwimap": ((0, 0), (0.25, 0.5), (0.45, 0.75), (0.3, 0.65)),
        f"{dwi}_param-de_dwimap": ((2.7, 3.1), (0.7, 1.2), (0.6, 1), (0.65, 1.2)),
    }.items():
        values = exact.truth(path + ".nii.gz")
        for where, (low, high) in zip((fluid, cortex, white, deep), ranges, strict=True):
            assert low <= values[where].min() <= values[where].max() <= high
        assert np.isnan(values[labels == 0]).all()
    for name, low, high in (("dn", 1.7, 3), ("tex", 12, 85), ("p2", 0, 0.8)):
        values = exact.truth(f"{dwi}_param-{name}_dwimap.nii.gz")[cortex | white | deep]
        assert low <= values.min() < values.max() <= high
    b1 = exact.image(f"sub-{subject}/fmap/sub-{subject}_TB1map.nii.gz")[labels > 0]
    assert 75 <= b1.min() < 95 < 105 < b1.max() <= 125


def test_parameters_vary_smoothly_within_a_tissue_and_differ_between_subjects(exact):
    maps = [exact.truth(f"sub-{s}/anat/sub-{s}_R2starmap.nii.gz") for s in ("01", "02")]
    white = [exact.labels(s) == Label.WHITE_MATTER for s in ("01", "02")]
    first = np.where(white[0], maps[0], np.nan)
    spread = np.nanstd(first)
    assert 0.03 < spread / np.nanmean(first) < 0.12
    # Neighbours, 8 mm apart, are much more alike than two voxels of the tissue.
    assert np.nanstd(np.diff(first, axis=0)) < 0.6 * spread
    assert maps[0][white[0]].mean() != pytest.approx(maps[1][white[1]].mean(), rel=1e-3)


def test_every_label_has_a_name(exact):
    lines = (exact.root / "derivatives/truth/sub-01/anat/sub-01_desc-tissues_dseg.tsv").read_text()
    rows = [line.split("\t") for line in lines.splitlines()]
    assert rows[0][:2] == ["index", "name"]
    assert {int(row[0]) for row in rows[1:]} == set(np.unique(exact.labels())) - {0}
    assert {row[1] for row in rows[1:]} == {tissue.name for tissue in TISSUES}
