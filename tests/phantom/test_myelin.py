"""Complex gradient echoes with myelin water, against spins that are simulated one by one."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import expm

from bids_gacelle.phantom.anatomy import Label, make_anatomy
from bids_gacelle.phantom.cli import Teller, main
from bids_gacelle.phantom.parcels import PARCELS, parcel_labels

needs_template = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="needs nilearn (extra `phantom`)"
)

FLIPS = (5, 10, 20, 50, 70)
ECHOES = 2.2e-3 + 3.07e-3 * np.arange(12)
TR, RHO, PPM_HZ = 0.038, 0.36 / 0.86, 42.57747892 * 3
STEM = "sub-01/anat/sub-01_acq-mwi"
FIELDS = [f"freqBKG{n}" for n in range(1, 6)]
MAPS = {
    "S0": "desc-mcrmwi_S0map",
    "MWF": "desc-mcrmwi_MWFmap",
    "R1IEW": "desc-mcrmwiIEW_R1map",
    "R2sMW": "desc-mcrmwiMW_R2starmap",
    "R2sIW": "desc-mcrmwiIW_R2starmap",
    "R2sEW": "desc-mcrmwiEW_R2starmap",
    **{
        name: f"model-mcrmwi_param-{name.lower()}_anatmap"
        for name in ("IWF", "kIEWM", "freqMW", "freqIW", "freqBKG", "pini", *FIELDS)
    },
}


def complex_images(dataset):
    """All images, complex (flip angles, echoes, x, y, z)."""

    def image(flip, echo):
        stem = f"{STEM}_echo-{echo}_flip-{flip}_part-"
        magnitude, phase = (dataset.image(f"{stem}{p}_VFA.nii.gz") for p in ("mag", "phase"))
        return magnitude * np.exp(1j * phase.astype(float))

    return np.array([[image(flip, echo) for echo in range(1, 13)] for flip in range(1, 6)])


@pytest.fixture(scope="module")
def clean(myelin):
    return complex_images(myelin)


@pytest.fixture(scope="module")
def truth(myelin):
    return {k: myelin.truth(f"{STEM}_{v}.nii.gz").astype(float) for k, v in MAPS.items()}


def spins(f, r1, r2, k, angle, increment=50.0, count=192, pulses=700):
    """Steady state of two exchanging pools, pulse after pulse, on spins across a voxel.

    Longitudinal and transverse magnetisation both exchange; the myelin pool has T1 234 ms and T2
    15 ms. Returns the free and the myelin signal for unit equilibrium, without the RF phase.
    """
    back = k * (1 - f) / f if f > 0 else 0.0
    exchange = np.array([[-k, back], [k, -back]])
    keep2 = expm((np.diag([-r2, -1 / 0.015]) + exchange) * TR)
    keep1 = expm((np.diag([-r1, -1 / 0.234]) + exchange) * TR)
    rest = np.array([[1 - f], [f]])
    gradient = np.exp(2j * np.pi * np.arange(count) / count)
    across, along = np.zeros((2, count), complex), np.tile(rest, (1, count))
    for n in range(pulses):
        phase = np.exp(1j * np.deg2rad(increment) * n * (n + 1) / 2)
        turned = across / phase  # the pulse is about the x axis of this frame
        y = turned.imag * np.cos(angle) - along * np.sin(angle)
        along = turned.imag * np.sin(angle) + along * np.cos(angle)
        turned = turned.real + 1j * y
        signal = turned.mean(axis=1) / -1j
        across = (keep2 @ turned) * phase * gradient
        along = rest + keep1 @ (along - rest)
    return signal


@pytest.mark.parametrize("label", [Label.CORTEX, Label.WHITE_MATTER, Label.PUTAMEN])
def test_signals_are_those_of_spins_with_the_true_parameters(myelin, clean, truth, label):
    b1 = myelin.image("sub-01/fmap/sub-01_TB1map.nii.gz").astype(float) / 100
    where = np.argwhere(myelin.labels() == label)
    for voxel in map(tuple, where[[len(where) // 3, 2 * len(where) // 3]]):
        p = {name: volume[voxel] for name, volume in truth.items()}
        myelin_volume = p["MWF"] / 100 / RHO
        whole = 1 - p["MWF"] / 100 + myelin_volume
        iw = p["IWF"] * np.exp(ECHOES * (2j * np.pi * p["freqIW"] - p["R2sIW"]))
        ew = (1 - p["IWF"]) * np.exp(-ECHOES * p["R2sEW"])
        mw = np.exp(ECHOES * (2j * np.pi * p["freqMW"] - p["R2sMW"]))
        for i, flip in enumerate(FLIPS):
            angle = np.deg2rad(flip) * b1[voxel]
            f = myelin_volume / whole
            free, bound = spins(f, p["R1IEW"], p["R2sIW"], p["kIEWM"], angle)
            turn = np.exp(1j * (2 * np.pi * p[FIELDS[i]] * ECHOES + p["pini"]))
            expected = p["S0"] * whole * (free * (iw + ew) + RHO * bound * mw) * turn
            np.testing.assert_allclose(clean[i][:, *voxel], expected, atol=1e-5 * p["S0"])


def test_fluid_is_one_pool(myelin, clean, truth):
    fluid = myelin.labels() == Label.CSF
    assert np.all(truth["MWF"][fluid] == 0)
    for name in ("R2sMW", "freqMW", "freqIW", "kIEWM", "R2sIW"):
        assert np.isnan(truth[name][fluid]).all()
    b1 = myelin.image("sub-01/fmap/sub-01_TB1map.nii.gz").astype(float) / 100
    voxel = tuple(np.argwhere(fluid)[0])
    p = {name: volume[voxel] for name, volume in truth.items()}
    for i, flip in enumerate(FLIPS):
        angle = np.deg2rad(flip) * b1[voxel]
        state = spins(0.0, p["R1IEW"], p["R2sEW"], 0.0, angle, count=512, pulses=2000)[0]
        turn = np.exp(1j * (2 * np.pi * p[FIELDS[i]] * ECHOES + p["pini"]))
        expected = p["S0"] * state * np.exp(-ECHOES * p["R2sEW"]) * turn
        np.testing.assert_allclose(clean[i][:, *voxel], expected, rtol=1e-4)


def test_frequencies_are_those_of_hollow_cylinders_at_the_angle_that_is_written(myelin, truth):
    """Wharton and Bowtell 2012 with chi_i = chi_a = -0.1 ppm and E = 0.02 ppm."""
    theta = myelin.truth("sub-01/dwi/sub-01_model-fibres_param-theta_dwimap.nii.gz")
    white = myelin.labels() == Label.WHITE_MATTER
    mwf, iwf, sine2 = truth["MWF"][white] / 100, truth["IWF"][white], np.sin(theta[white]) ** 2
    axon = (1 - mwf) * iwf
    g2 = axon / (axon + mwf / RHO)
    c1 = 0.25 - 1.5 * g2 / (1 - g2) * np.log(1 / g2)
    myelin_ppm = -0.05 * (2 / 3 - sine2) - 0.05 * (c1 * sine2 - 1 / 3) + 0.02
    axon_ppm = -0.075 * sine2 * np.log(1 / np.sqrt(g2))
    np.testing.assert_allclose(truth["freqMW"][white], PPM_HZ * myelin_ppm, atol=1e-4)
    np.testing.assert_allclose(truth["freqIW"][white], PPM_HZ * axon_ppm, atol=1e-4)
    share = myelin.truth("sub-01/dwi/sub-01_model-fibres_param-ff_dwimap.nii.gz")
    assert np.all(share[white] == 1)
    assert 0 <= np.nanmin(theta) <= np.nanmax(theta) <= np.pi / 2
    assert np.std(theta[white]) > 0.2


@needs_template
def test_white_matter_has_parcels_that_differ_in_myelin(myelin, truth):
    labels, parcels = myelin.labels(), myelin.truth("sub-01/anat/sub-01_seg-parcels_dseg.nii.gz")
    white = labels == Label.WHITE_MATTER
    np.testing.assert_array_equal(parcels > 0, white)
    table = (myelin.root / "derivatives/truth/sub-01/anat/sub-01_seg-parcels_dseg.tsv").read_text()
    rows = [line.split("\t") for line in table.splitlines()]
    assert rows[0] == ["index", "name", "abbreviation", "color"]
    assert {int(row[0]) for row in rows[1:]} == set(np.unique(parcels)) - {0}
    for column in range(4):
        assert len({row[column] for row in rows[1:]}) == len(rows) - 1 >= 20
    medians = [np.median(truth["MWF"][parcels == int(row[0])]) for row in rows[1:]]
    assert min(medians) < 7
    assert max(medians) > 16
    assert 5 <= truth["MWF"][white].min() <= truth["MWF"][white].max() <= 20
    grey = (labels > 0) & ~white & (labels != Label.CSF)
    assert 2 <= truth["MWF"][grey].min() <= truth["MWF"][grey].max() <= 4


@needs_template
def test_parcels_are_large_enough_for_a_median_and_lie_where_they_are_called():
    head = make_anatomy(resolution=4.0)
    labels = parcel_labels(head)
    for parcel in PARCELS:
        points = head.mni[labels == parcel.index]
        assert len(points) > 60
        assert np.linalg.norm(points.mean(axis=0) - parcel.seed) < 20
        side = {"L": -1, "R": 1}.get(parcel.name[0] if " " in parcel.name else "", 0)
        if parcel.name.startswith(("Left", "Right")):
            assert np.mean(np.sign(points[:, 0]) == side) > 0.9


def test_field_is_smooth_tens_of_hertz_and_strongest_near_the_sinus(myelin, truth):
    inside = myelin.labels() > 0
    field = truth["freqBKG1"]
    assert 5 < np.std(field[inside]) < 40
    assert 60 < np.abs(field[inside]).max() < 130
    assert np.percentile(np.abs(field[inside]), 95) < 60
    steps = np.abs(np.diff(field, axis=0))
    assert np.nanmedian(steps) < 4  # over 8 mm
    mni = make_anatomy(resolution=8.0).mni[inside]
    # Low and at the front.
    strongest = mni[np.abs(field[inside]) > np.percentile(np.abs(field[inside]), 99)]
    assert strongest[:, 2].mean() < -15
    drift = [np.unique(np.round((truth[name] - field)[inside], 2)) for name in FIELDS]
    assert all(np.ptp(values) < 0.02 for values in drift)
    assert 0 < max(abs(values[0]) for values in drift) < 5
    mean = np.mean([truth[name] for name in FIELDS], axis=0)
    np.testing.assert_allclose(truth["freqBKG"][inside], mean[inside], atol=1e-3)


def test_noise_is_complex_gaussian_and_the_same_in_both_parts(myelin, clean, myelin_noisy):
    noise = complex_images(myelin_noisy) - clean
    white = myelin.labels() == Label.WHITE_MATTER
    sigma = np.abs(clean[:, :, white]).mean(axis=2).max() / 150
    assert np.std(noise.real) == pytest.approx(sigma, rel=0.01)
    assert np.std(noise.imag) == pytest.approx(sigma, rel=0.01)
    assert abs(np.mean(noise.real * noise.imag)) < 0.01 * sigma**2
    flat = noise.reshape(60, -1)
    other = np.abs(np.corrcoef(np.concatenate((flat.real, flat.imag)))[~np.eye(120, dtype=bool)])
    assert other.max() < 0.05
    first = f"{STEM}_echo-1_flip-1_part-"
    assert myelin_noisy.image(f"{first}mag_VFA.nii.gz").dtype == np.int16
    phase = myelin_noisy.image(f"{first}phase_VFA.nii.gz")
    assert phase.dtype == np.float32
    assert np.abs(phase).max() <= np.float32(np.pi)


def test_sidecars_say_how_it_was_measured(myelin):
    for part, unit in (("mag", None), ("phase", "rad")):
        name = f"{STEM}_echo-3_flip-4_part-{part}_VFA.json"
        about = json.loads((myelin.root / name).read_text())
        assert about["EchoTime"] == pytest.approx(ECHOES[2])
        assert (about["FlipAngle"], about["RepetitionTimeExcitation"]) == (50, TR)
        assert about["MagneticFieldStrength"] == 3
        assert about["SpoilingRFPhaseIncrement"] == 50
        assert about["PulseSequenceType"] == "SPGR"
        assert about.get("Units") == unit


@pytest.mark.parametrize("part", ["", "derivatives/truth"])
def test_the_validator_finds_no_error(myelin_noisy, part):
    beside = Path(sys.executable).parent / "bids-validator-deno"
    validator = str(beside) if beside.exists() else shutil.which("bids-validator-deno")
    if validator is None:
        pytest.skip("needs bids-validator-deno")
    command = [validator, str(myelin_noisy.root / part), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in found if issue["severity"] == "error"] == []


@needs_template
def test_multi_echo_gradient_echoes_have_a_phase_on_request(exact, tmp_path):
    import nibabel as nib

    out = tmp_path / "brain"
    words = ["--contrasts", "megre", "--subjects", "1", "--resolution", "8", "--snr", "inf"]
    assert main([str(out), *words, "--phase"]) == 0
    stem = out / "sub-01/anat/sub-01_echo-"

    def image(echo, part):
        return np.asanyarray(nib.load(f"{stem}{echo}_part-{part}_MEGRE.nii.gz").dataobj)

    for echo in (1, 7):
        magnitude = exact.image(f"sub-01/anat/sub-01_echo-{echo}_MEGRE.nii.gz")
        np.testing.assert_allclose(image(echo, "mag"), magnitude, rtol=1e-6)
    truth = out / "derivatives/truth/sub-01/anat/sub-01_model-r2star_param-freqbkg_anatmap.nii.gz"
    field = np.asanyarray(nib.load(truth).dataobj).astype(float)
    brain = exact.labels() > 0
    turned = np.exp(1j * (image(2, "phase") - image(1, "phase").astype(float)))[brain]
    expected = np.exp(2j * np.pi * (ECHOES[1] - ECHOES[0]) * field[brain])
    np.testing.assert_allclose(turned, expected, atol=1e-5)


def test_a_long_run_tells_now_and_then_what_it_does(monkeypatch, capsys):
    now = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr("bids_gacelle.phantom.cli.time.monotonic", lambda: next(now))
    teller = Teller()
    for what in ("one", "two", "three", "four"):
        teller(what)
    assert capsys.readouterr().err.splitlines() == ["two", "four"]


def test_signals_can_be_simulated_where_nothing_reads_images():
    """The benchmark runs on machines with torch, numpy and scipy only."""
    code = (
        "import sys\n"
        "for name in ('nibabel', 'nilearn', 'nipype', 'pandas'): sys.modules[name] = None\n"
        "import bids_gacelle.phantom.myelin, bids_gacelle.phantom.head"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
