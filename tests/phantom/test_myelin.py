"""Complex gradient echoes with myelin water, against spins that are simulated one by one."""

import json

import numpy as np
import pytest
from scipy.linalg import expm

from bids_gacelle.phantom.anatomy import Label, make_anatomy
from bids_gacelle.phantom.parcels import PARCELS, parcel_labels

STEM = "sub-01/anat/sub-01_acq-mwi"
FLIPS = (5, 10, 20, 50, 70)
ECHOES = 2.2e-3 + 3.07e-3 * np.arange(12)
TR, RHO, PPM = 0.038, 0.36 / 0.86, 42.57747892 * 3


def sidecar(dataset, path):
    return json.loads((dataset.root / path).read_text())


def complex_images(dataset):
    """All images, complex (flip angle, echo, x, y, z)."""

    def image(flip, echo):
        name = f"{STEM}_echo-{echo}_flip-{flip}_part-"
        mag, phase = (dataset.image(f"{name}{p}_VFA.nii.gz") for p in ("mag", "phase"))
        return mag * np.exp(1j * phase.astype(float))

    return np.array([[image(flip, echo) for echo in range(1, 13)] for flip in range(1, 6)])


def spins(f, r1, r2, k, angle, increment=50.0, count=192, pulses=600):
    """Steady state of two exchanging pools by pulse after pulse on spins across a voxel.

    Longitudinal and transverse magnetisation both exchange; the myelin pool has T1 234 ms and T2
    15 ms. Returns the free and the myelin signal over unit equilibrium, with the RF phase off.
    """
    back = k * (1 - f) / f if f > 0 else 0.0
    exchange = np.array([[-k, back], [k, -back]])
    keep2 = expm((np.diag([-r2, -1 / 0.015]) + exchange) * TR)
    keep1 = expm((np.diag([-r1, -1 / 0.234]) + exchange) * TR)
    rest = np.array([1 - f, f])
    gradient = np.exp(2j * np.pi * np.arange(count) / count)
    across, along = np.zeros((2, count), complex), np.tile(rest[:, None], (1, count))
    for n in range(pulses):
        phase = np.exp(1j * np.deg2rad(increment) * n * (n + 1) / 2)
        turned = across / phase  # the pulse is about the x axis of this frame
        y, z = turned.imag, along
        y, z = y * np.cos(angle) - z * np.sin(angle), y * np.sin(angle) + z * np.cos(angle)
        turned, along = turned.real + 1j * y, z
        signal = turned.mean(axis=1) / -1j
        across = keep2 @ (turned * phase) * gradient
        along = rest[:, None] + keep1 @ (along - rest[:, None])
    return signal


@pytest.mark.parametrize("label", [Label.CSF, Label.CORTEX, Label.WHITE_MATTER, Label.PUTAMEN])
def test_signals_are_those_of_spins_with_the_true_parameters(myelin, label):
    images = complex_images(myelin)
    b1 = myelin.image("sub-01/fmap/sub-01_TB1map.nii.gz") / 100
    truth = {
        name: myelin.truth(f"{STEM}_{path}.nii.gz").astype(float)
        for name, path in TRUTH_MAPS.items()
    }
    where = np.argwhere(myelin.labels() == label)
    for voxel in map(tuple, where[[len(where) // 3, 2 * len(where) // 3]]):
        p = {name: np.nan_to_num(volume[voxel]) for name, volume in truth.items()}
        myelin_volume = p["MWF"] / RHO
        volume = p["S0"] * (1 - p["MWF"] + myelin_volume)
        f = p["S0"] * myelin_volume / volume
        for i, flip in enumerate(FLIPS):
            free, mw = spins(f, p["R1IEW"], p["R2sIW"] or p["R2sEW"], p["kIEWM"], 
                             np.deg2rad(flip) * b1[voxel])
            slow = p["IWF"] * np.exp(ECHOES * (2j * np.pi * p["freqIW"] - p["R2sIW"]))
            slow = slow + (1 - p["IWF"]) * np.exp(-ECHOES * p["R2sEW"])
            fast = RHO * mw * np.exp(ECHOES * (2j * np.pi * p["freqMW"] - p["R2sMW"]))
            signal = volume * (free * slow + fast)
            signal = signal * np.exp(1j * (2 * np.pi * p[f"field{i + 1}"] * ECHOES + p["phase"]))
            np.testing.assert_allclose(images[i][:, *voxel], signal, atol=2e-5 * p["S0"])
