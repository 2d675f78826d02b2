"""Weights, plausibility and noise from the magnitudes of echoes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bids_gacelle.engine import EngineError, GradientEchoScheme, fit, get_model
from bids_gacelle.engine.prepare import demodulate
from bids_gacelle.engine.prepare.echoes import (
    background_sigma,
    first_echo_weights,
    implausible,
    scatter_sigma,
)
from tests.datasets import water

TIMES = 0.002 + 0.003 * np.arange(10)
ANGLES = (4.0, 20.0)


def scheme(repetition_time=0.03) -> GradientEchoScheme:
    return GradientEchoScheme(
        echo_time=np.tile(TIMES, 2),
        flip_angle=np.repeat(ANGLES, len(TIMES)),
        repetition_time=repetition_time,
    )


def echoes(t1, rate, b1=1.0):
    """Ernst's equation and exponential decay; (images, voxels)."""
    t1, rate, b1 = np.broadcast_arrays(t1, rate, b1)
    trains = []
    for degrees in ANGLES:
        angle, e1 = np.deg2rad(degrees) * b1, np.exp(-0.03 / t1)
        level = np.sin(angle) * (1 - e1) / (1 - e1 * np.cos(angle))
        trains.append(level * np.exp(-TIMES[:, None] * rate))
    return np.concatenate(trains)


def test_weights_are_those_of_the_first_echo_of_each_flip_angle():
    signals = echoes([1.0, 1.5], [20.0, 50.0])
    weights = first_echo_weights(signals, scheme(), 2.0)
    expected = np.exp(-2 * (TIMES - TIMES[0])[:, None] * [20.0, 50.0])
    np.testing.assert_allclose(weights, np.tile(expected, (2, 1)), rtol=1e-5)
    assert (first_echo_weights(signals, scheme(), 0.0) == 1).all()
    dark = np.vstack([np.zeros((1, 2)), signals[1:]])
    assert np.isfinite(first_echo_weights(dark, scheme(), 1.0)).all()
    with pytest.raises(EngineError, match="at least 0"):
        first_echo_weights(signals, scheme(), -1.0)


def test_rules_know_fluid_and_noise_from_tissue():
    signals = echoes([1.0, 4.0, 1.0, 1.0], [20.0, 20.0, 1.0, 20.0])
    signals[len(TIMES), 3] = 0  # the first echo of the second flip angle
    broken = implausible(signals, scheme(), ("first-echo", "r2star", "t1"))
    assert broken["first-echo"].tolist() == [False, False, False, True]
    assert broken["r2star"].tolist()[:3] == [False, False, True]
    assert broken["t1"].tolist()[:3] == [False, True, False]


def test_t1_is_judged_with_the_transmit_field():
    signals = echoes(2.9, 20.0, b1=[1.0, 1.2, 1.2])
    b1 = np.array([1.0, 1.2, np.nan])
    broken = implausible(signals, scheme(), ("t1",), b1)["t1"]
    assert broken.tolist() == [False, False, False]
    # without it, T1 looks longer by b1^2
    assert implausible(signals, scheme(), ("t1",))["t1"].tolist() == [False, True, True]


def test_rules_that_an_acquisition_cannot_tell_of_are_not_judged():
    one = GradientEchoScheme(echo_time=TIMES)
    signals = np.exp(-TIMES[:, None] * [20.0])
    assert list(implausible(signals, one, ("first-echo", "t1"))) == ["first-echo"]
    single = GradientEchoScheme(flip_angle=ANGLES, repetition_time=0.03)
    signals = echoes([1.0, 4.0], 0.0)[[0, 10]]
    assert implausible(signals, single, ("r2star",)) == {}
    assert implausible(signals, single, ("t1",))["t1"].tolist() == [False, True]


def test_noise_of_the_background():
    air = stats.rice.rvs(0, scale=7.0, size=20_000, random_state=1)
    assert background_sigma(air) == pytest.approx(7.0, rel=0.02)
    assert background_sigma(air[:100]) is None
    assert background_sigma(np.where(np.arange(20_000) % 2, air, 0)) is None
    coils = np.sqrt(stats.chi2.rvs(16, size=20_000, random_state=1))
    assert background_sigma(coils) is None


def test_noise_of_the_imaginary_parts():
    random = np.random.default_rng(2)
    phase = np.exp(1j * (2 * np.pi * 40 * np.tile(TIMES, 2)[:, None] + 1))
    signals = 1000 * echoes(np.full(3000, 1.0), 20.0) * phase
    noise = random.normal(0, 0.8, (2, *signals.shape))
    found = demodulate(signals + noise[0] + 1j * noise[1], scheme())
    assert scatter_sigma(found, scheme()) == pytest.approx(0.8, rel=0.03)


def test_several_pools_are_no_noise():
    random = np.random.default_rng(5)
    te = 0.002 + 0.003 * np.arange(12)
    clean = water(te, 0.15)[:, None] * np.exp(0.3j) * np.ones(2000)
    noise = random.normal(0, 1 / 150, (2, *clean.shape))
    acquired = GradientEchoScheme(echo_time=te)
    found = demodulate(clean + noise[0] + 1j * noise[1], acquired)
    assert scatter_sigma(found, acquired) == pytest.approx(1 / 150, rel=0.03)


@pytest.mark.parametrize("known", ["given", "background", "imaginary"])
def test_rician_likelihood_removes_the_bias_of_the_noise_floor(known):
    """R2* of magnitudes whose first echo has an SNR of 10: at least 80 % of the bias goes."""
    random = np.random.default_rng(4)
    te = 0.004 * np.arange(1, 13)
    rate, sigma, n = 40.0, 0.1, 6000
    clean = np.exp(-(te - te[0]) * rate)[:, None] * np.ones(n)
    noise = random.normal(0, sigma, (2, *clean.shape))
    volumes = clean * np.exp(2j * np.pi * 30 * te[:, None]) + noise[0] + 1j * noise[1]
    acquired = GradientEchoScheme(echo_time=te)
    level = {
        "given": sigma,
        "background": background_sigma(np.hypot(*random.normal(0, sigma, (2, 20_000)))),
        "imaginary": scatter_sigma(demodulate(volumes, acquired), acquired),
    }[known]
    model = get_model("r2star")(acquired)
    bias = {}
    for likelihood in ("gaussian", "rician"):
        result = fit(model, np.abs(volumes), sigma=level, noise=likelihood, device="cpu")
        bias[likelihood] = float(np.nanmedian(result.maps["R2star"])) - rate
    assert bias["gaussian"] < -0.05 * rate
    assert abs(bias["rician"]) < 0.2 * abs(bias["gaussian"])
