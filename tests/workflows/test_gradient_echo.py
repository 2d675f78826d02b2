"""Complex gradient echoes and those of several flip angles, from the command line to the maps."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.cli.main import main
from bids_gacelle.workflows import run as workflow_run
from tests.datasets import (
    AFFINE,
    SHAPE,
    add_b1_map,
    add_complex,
    add_dwi,
    add_megre,
    add_segmentation,
    new_dataset,
    water,
    write_image,
    write_json,
)

INSIDE = np.zeros(SHAPE, bool)
INSIDE[1:-1, 1:-1, :] = True
RATE, TIMES = 25.0, (0.004, 0.008, 0.012, 0.016, 0.020, 0.024)
ECHOES = {(0.0, te): np.exp(-te * RATE) for te in TIMES}


@pytest.fixture(autouse=True)
def no_pages(request, monkeypatch):
    """Leave out the drawing of pages, which takes longer than all the rest on a tiny dataset."""
    if "page" not in request.keywords:
        monkeypatch.setattr(workflow_run, "write_report", lambda out, subject: out / "page")


@pytest.fixture
def root(tmp_path):
    write_image(tmp_path / "mask.nii.gz", INSIDE)
    return new_dataset(tmp_path / "data")


def run(root, *words, code=0):
    out = root.parent / "out"
    mask = ["--mask", str(root.parent / "mask.nii.gz")]
    command = [str(root), str(out), "participant", "--nprocs", "1", *mask, *map(str, words)]
    assert main(command) == code
    return out


def values(out, name):
    return np.asarray(nib.load(out / f"sub-01/anat/sub-01_{name}.nii.gz").dataobj)


def about(out, name):
    return json.loads((out / f"sub-01/anat/sub-01_{name}.json").read_text())


def log_of(out):
    [path] = out.glob("logs/*/bids_gacelle.log")
    return path.read_text()


def rescale(root, change, units):
    """Store the phases in another way."""
    for path in root.glob("sub-01/anat/*part-phase*.nii.gz"):
        image = nib.load(path)
        write_image(path, change(image.get_fdata()))
        sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
        told = json.loads(sidecar.read_text())
        told.pop("Units")
        write_json(sidecar, told | ({"Units": units} if units else {}))


STORED = {
    "rad": (lambda p: p, "rad", "radians"),
    "degrees": (np.rad2deg, "deg", "degrees"),
    "integers": (lambda p: np.round(p / np.pi * 2047) * 2, "arbitrary", "-4096 to 4095"),
    "no unit": (lambda p: np.round(1000 * p), "", "thousandths of a radian"),
}


@pytest.mark.parametrize("stored", STORED)
def test_complex_signals_from_phases_of_any_scale(root, stored):
    field = add_complex(root, "MEGRE", ECHOES)
    change, units, words = STORED[stored]
    rescale(root, change, units)
    out = run(root, "--models", "r2star", "--set", "r2star.signal=complex")
    rate = values(out, "R2starmap")[INSIDE]
    assert abs(np.median(rate) / RATE - 1) < 0.005
    found = values(out, "model-r2star_param-freqbkg_anatmap")
    assert np.abs(found - field)[INSIDE].max() < 0.5
    assert np.abs(values(out, "model-r2star_param-pini_anatmap")[INSIDE] - 0.7).max() < 0.02
    told = about(out, "R2starmap")
    assert told["SignalFitted"] == "complex"
    assert words in told["PhaseScaling"]
    assert words in log_of(out)


def test_real_and_imaginary_parts_and_the_other_sign(root):
    field = add_complex(root, "MEGRE", ECHOES, phase="real")
    words = ("--set", "r2star.signal=complex", "--phase-sign", "negative")
    out = run(root, "--models", "r2star", *words)
    assert abs(np.median(values(out, "R2starmap")[INSIDE]) / RATE - 1) < 0.005
    found = values(out, "model-r2star_param-freqbkg_anatmap")
    assert np.abs(found + field)[INSIDE].max() < 0.5
    assert np.abs(values(out, "model-r2star_param-pini_anatmap")[INSIDE] + 0.7).max() < 0.02
    assert about(out, "model-r2star_param-freqbkg_anatmap")["Units"] == "Hz"


@pytest.mark.parametrize("signal", ["magnitude", "complex"])
def test_units_that_cannot_be_leave_the_magnitudes(root, signal):
    add_complex(root, "MEGRE", ECHOES)
    rescale(root, lambda p: p, "deg")
    code = 1 if signal == "complex" else 0
    out = run(root, "--models", "r2star", "--set", f"r2star.signal={signal}", code=code)
    assert "as radians do; correct Units in the sidecars" in log_of(out)
    said = "r2star: signal=complex was asked for, but the phase images" in log_of(out)
    assert said is (signal == "complex")


def test_phases_of_single_echoes_are_of_no_use_and_do_no_harm(root):
    add_complex(root, "VFA", flip_angles(mwf=0.0, n=1))
    out = run(root, "--models", "despot1")
    assert abs(np.median(values(out, "R1map")[INSIDE]) - 1) < 0.02


def test_a_missing_phase_leaves_the_magnitudes_and_is_said(root):
    add_complex(root, "MEGRE", ECHOES)
    next(root.glob("sub-01/anat/*echo-2_part-phase*.nii.gz")).unlink()
    out = run(root, "--models", "r2star")
    assert abs(np.median(values(out, "R2starmap")[INSIDE]) / RATE - 1) < 0.005
    assert "echo-2_part-phase_MEGRE.nii.gz` is missing" in log_of(out)
    assert about(out, "R2starmap")["SignalFitted"] == "magnitude"


@pytest.mark.parametrize("ignored", [False, True])
def test_complex_signals_that_are_not_there_cannot_be_fitted(root, ignored):
    add_complex(root, "MEGRE", ECHOES, phase="phase" if ignored else "")
    words = ["--ignore", "phase"] if ignored else []
    out = run(root, "--models", "r2star", "--set", "r2star.signal=complex", *words, code=3)
    why = "the phase is left out" if ignored else "there is no phase of every image"
    assert f"r2star: signal=complex was asked for, but {why}" in log_of(out)


def test_voxels_of_a_given_mask_without_signal_are_unusable(root):
    """They were given to be fitted: outside of the mask they are not."""
    paths = add_megre(root)
    for path in paths:
        data = nib.load(path).get_fdata()
        data[3, 3, 2] = 0
        write_image(path, data)
    flags = values(run(root, "--models", "r2star"), "desc-r2starfitflag_dseg")
    assert flags[3, 3, 2] == 4
    assert (flags[~INSIDE] == 1).all()
    assert (flags[INSIDE] == 0).sum() == INSIDE.sum() - 1


def test_voxels_of_a_given_mask_without_a_b0_signal_are_unusable(root):
    path = add_dwi(root)
    data = nib.load(path).get_fdata()
    data[3, 3, 2, :2] = 0
    write_image(path, data)
    out = run(root, "--models", "mcmicro")
    image = nib.load(out / "sub-01/dwi/sub-01_desc-mcmicrofitflag_dseg.nii.gz")
    flags = np.asarray(image.dataobj)
    assert flags[3, 3, 2] == 4
    assert (flags[INSIDE] & 5 == 0).sum() == INSIDE.sum() - 1


def test_implausible_voxels_are_flagged_and_keep_their_estimates(root):
    slow = np.where(np.arange(SHAPE[0]) < 3, 1.0, RATE)[:, None, None]
    add_complex(root, "MEGRE", {(0.0, te): np.exp(-te * slow) for te in TIMES})
    out = run(root, "--models", "r2star", "--set", "r2star.plausibility=true")
    flags = values(out, "desc-r2starfitflag_dseg")[INSIDE]
    rate = values(out, "R2starmap")[INSIDE]
    slow = np.broadcast_to(slow, SHAPE)[INSIDE] < 2
    assert (flags[slow] == 32).all()
    assert (flags[~slow] == 0).all()
    assert np.abs(rate[slow] - 1).max() < 1
    assert about(out, "R2starmap")["ImplausibleVoxels"]["R2* below 2 1/s"] == 0.4


def test_weights_are_said_and_change_the_estimate_of_two_pools(root):
    add_complex(root, "MEGRE", {(0.0, te): water(np.array(te), 0.2) for te in TIMES})
    words = ("--set", "r2star.weighting=first-echo", "r2star.weighting_power=3")
    rates = []
    for more in ((), words):
        out = run(root, "--models", "r2star", *more)
        rates.append(np.median(values(out, "R2starmap")[INSIDE]))
    assert rates[1] > rates[0] + 0.5  # myelin water decays fast, and counts in early echoes
    assert about(out, "R2starmap")["EchoWeights"] == "(S(TE) / S(TE1))^3 of each flip angle"
    run(root, "--models", "r2star", "--set", "r2star.weighting=late", code=2)


def test_rician_noise_of_magnitudes_at_low_signal(root):
    """The noise is told by the imaginary parts; at least 80 % of the bias of R2* goes."""
    times = 0.004 * np.arange(1, 25)
    signals = {(0.0, te): 0.6 * np.exp(-te * 40) for te in times}
    bias = {}
    add_complex(root, "MEGRE", signals, snr=20)
    for noise in ("gaussian", "rician"):
        out = run(root, "--models", "r2star", "--noise", noise)
        bias[noise] = np.nanmedian(values(out, "R2starmap")[INSIDE]) - 40
    assert bias["gaussian"] < -3
    assert abs(bias["rician"]) < 0.2 * abs(bias["gaussian"])


def ernst(r1, angle):
    decay = np.exp(-0.05 * r1)
    return np.sin(angle) * (1 - decay) / (1 - decay * np.cos(angle))


def flip_angles(b1=1.0, angles=(5.0, 20.0, 40.0, 70.0), mwf=0.12, n=12):
    """Two pools of water that do not exchange, T1 0.234 s and 1 s, at several flip angles."""
    signals = {}
    for degrees in angles:
        angle = np.deg2rad(degrees) * b1
        level = [ernst(1 / 0.234, angle), ernst(1.0, angle)]
        for te in 0.002 + 0.003 * np.arange(n):
            myelin, other = level
            ppm = 2j * np.pi * 42.57747892 * 3 * te
            signals[degrees, te] = myelin * mwf * np.exp(-te * 100 + ppm * 0.06) + other * (
                1 - mwf
            ) * np.exp(-te * 19)
    return signals


def test_myelin_water_in_the_units_of_bids(root, bids_errors):
    field = add_complex(
        root, "VFA", flip_angles(), sidecar={"SpoilingRFPhaseIncrement": 117}, snr=2000
    )
    atlas, _ = add_segmentation(root.parent)
    words = ("mcrmwi.exchange=false", "mcrmwi.steady_state=ideal")
    out = run(root, "--models", "mcrmwi", "--set", *words, "--atlas", f"tiny={atlas}")
    mwf = values(out, "desc-mcrmwi_MWFmap")[INSIDE]
    assert abs(np.median(mwf) - 12) < 1
    spread = values(out, "desc-mcrmwistd_MWFmap")[INSIDE]
    assert 0.2 < np.nanmedian(spread) / np.std(mwf) < 5
    assert abs(np.median(values(out, "desc-mcrmwiIEW_T1map")[INSIDE]) - 1) < 0.05
    assert abs(np.median(values(out, "desc-mcrmwiMW_R2starmap")[INSIDE]) - 100) < 10
    assert np.isfinite(values(out, "desc-mcrmwiMWstd_R2starmap")[INSIDE]).mean() > 0.8
    shift = values(out, "model-mcrmwi_param-freqmw_anatmap")[INSIDE]
    assert abs(np.median(shift) - 0.06 * 42.57747892 * 3) < 2
    found = values(out, "model-mcrmwi_param-freqbkg_anatmap")
    assert np.median(np.abs(found - field)[INSIDE]) < 3
    told = about(out, "desc-mcrmwi_MWFmap")
    assert told["Units"] == "percent"
    assert told["SpoilingRFPhaseIncrement"] == 117
    assert told["Model"]["Parameters"]["Bounds"]["MWF"][1] == 50
    assert about(out, "model-mcrmwi_param-dfreqbkg3_anatmap")["Units"] == "Hz"
    table = (out / "sub-01/anat/sub-01_atlas-tiny_desc-mcrmwi_scalarstats.tsv").read_text()
    [row] = [r.split("\t") for r in table.splitlines() if "\tMWF\t" in r and "Left-Front" in r]
    assert row[5] == "percent"
    assert abs(float(row[6]) - 12) < 1.5
    assert bids_errors(out) == []


def test_the_picture_of_several_flip_angles_is_the_first_echo_of_the_largest(root):
    signals = flip_angles(mwf=0.0, n=6)
    add_complex(root, "VFA", signals, phase="")
    out = run(root, "--models", "r1r2star")
    [path] = out.glob("sub-01/figures/*_desc-vfareference_image.nii.gz")
    shown = np.asarray(nib.load(path).dataobj)[INSIDE]
    assert np.median(shown) / 1000 == pytest.approx(abs(signals[70.0, 0.002]), rel=0.01)


def test_magnitudes_of_flip_angles_with_a_b1_map_on_another_grid(root):
    """R1 with the map is that of all flip angles; without it, it is off by b1^2."""
    signals = flip_angles(b1=0.85, mwf=0.0, n=4)
    add_complex(root, "VFA", signals, phase="", sidecar={"SpoilingRFPhaseIncrement": 50})
    words = ("--models", "r1r2star,despot1", "--set", "r1r2star.plausibility=true")
    without = np.median(values(run(root, *words), "desc-r1r2star_R1map")[INSIDE])
    coarse = np.diag([4.0, 4.0, 4.0, 1.0])
    coarse[:3, 3] = -3
    add_b1_map(root, np.full(SHAPE, 0.85))
    write_image(root / "sub-01/fmap/sub-01_TB1map.nii.gz", np.full((6, 6, 6), 0.85), coarse)
    out = run(root, *words)
    for name in ("desc-r1r2star_R1map", "R1map"):
        assert abs(np.median(values(out, name)[INSIDE]) - 1) < 0.02
    assert without > 1.3
    assert abs(np.median(values(out, "desc-r1r2star_R2starmap")[INSIDE]) / 19 - 1) < 0.02
    assert about(out, "desc-r1r2star_R1map")["B1Map"].endswith("_TB1map.nii.gz")
    assert not np.allclose(AFFINE, coarse)


def test_myelin_water_informed_by_diffusion(root):
    times = 0.002 + 0.002 * np.arange(16)
    add_complex(root, "MEGRE", {(0.0, te): water(np.array(te), 0.12) for te in times}, snr=2000)
    vectors = np.zeros((*SHAPE, 6))
    vectors[..., 0], vectors[..., 5] = 1, -1  # across the main field, and along it
    write_image(root.parent / "fo.nii.gz", vectors)
    write_image(root.parent / "ff.nii.gz", np.stack([np.full(SHAPE, s) for s in (0.7, 0.3)], -1))
    options = [f"gremwi.{k}=false" for k in ("fit_freq_mw", "fit_freq_iw", "fit_r2s_ew")]
    options += ["gremwi.fibres=2"]
    words = ("--models", "gremwi", "--set", *options)
    out = run(root, *words, code=3)
    assert "gremwi needs maps of theta1" in log_of(out)
    maps = [f"{name}={root.parent / name}.nii.gz" for name in ("fo", "ff")]
    for log in out.glob("logs/*"):
        log.rename(root.parent / log.name)
    out = run(root, *words, "--voxel-map", *maps)
    flags = values(out, "desc-gremwifitflag_dseg").astype(int)[INSIDE]
    assert ((flags & 5) == 0).all()
    assert np.isfinite(values(out, "desc-gremwi_MWFmap")[INSIDE]).all()
    assert not (out / "sub-01/anat/sub-01_model-gremwi_param-freqmw_anatmap.nii.gz").exists()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"SpoilingRFPhaseIncrement": 120}, "120"),
        ({"SpoilingRFPhaseIncrement": 50, "RepetitionTimeExcitation": 2.0}, "2"),
    ],
)
def test_a_protocol_out_of_the_range_of_the_surrogate_is_refused(root, told, words):
    add_complex(root, "VFA", flip_angles(n=6), sidecar=told)
    out = run(root, "--models", "mcrmwi", "--set", "mcrmwi.steady_state=surrogate", code=3)
    [line] = [r for r in log_of(out).splitlines() if r.startswith("sub-01") and " mcrmwi " in r]
    assert words in line
    assert "Set steady_state='epgx', which computes the steady states of any protocol" in line


def test_an_unknown_spoiling_increment_is_assumed_and_said(root):
    add_complex(root, "VFA", flip_angles(angles=(10.0, 30.0, 60.0), n=8), snr=300)
    out = run(root, "--models", "mcrmwi")
    assert "no `SpoilingRFPhaseIncrement`" in log_of(out)
    assert "mcrmwi takes 50 degrees" in log_of(out)
    told = about(out, "desc-mcrmwi_MWFmap")
    assert told["SpoilingRFPhaseIncrement"] == 50
    assert told["SpoilingRFPhaseIncrementSource"] == "assumed (option of the model)"
    flags = values(out, "desc-mcrmwifitflag_dseg").astype(int)[INSIDE]
    assert (flags & 4 == 0).all()


def test_magnitudes_stand_in_for_complex_signals_with_a_warning(root):
    times = 0.002 + 0.003 * np.arange(12)
    add_complex(root, "MEGRE", {(0.0, te): water(np.array(te), 0.12) for te in times}, phase="")
    out = run(root, "--models", "gremwi")
    said = "gremwi is fitted to the magnitudes, which tell less of it: there is no phase"
    assert said in log_of(out)
    manifest = json.loads((out / "sub-01/figures/sub-01_desc-gremwi_manifest.json").read_text())
    assert any(said in warning for warning in manifest["warnings"])
    assert not list(out.glob("sub-01/anat/*freqbkg*"))
    assert np.isfinite(values(out, "desc-gremwi_MWFmap")[INSIDE]).all()
