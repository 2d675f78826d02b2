"""The Rice distribution against scipy, and fits of magnitudes near the noise floor."""

import numpy as np
import pytest
import scipy.stats
import torch

from bids_gacelle.engine import DiffusionScheme, GradientEchoScheme, fit, get_model
from bids_gacelle.engine.physics import rician

from .helpers import read

SIGNAL = np.array([0.0, 1e-6, 0.01, 0.3, 1.0, 2.0, 5.0, 30.0, 300.0])
SIGMA = 0.7


def tensors(*arrays):
    return tuple(torch.as_tensor(a, dtype=torch.float64) for a in arrays)


def rice(signal):
    return scipy.stats.rice(signal / SIGMA, scale=SIGMA)


def test_mean_and_spread_are_those_of_scipy():
    signal, variance = tensors(SIGNAL, SIGMA**2)
    mean, slope = rician.mean(signal, variance)
    near = SIGNAL < 20  # beyond, scipy overflows
    expected = np.empty(len(SIGNAL))
    expected[near] = rice(SIGNAL[near]).mean()
    expected[~near] = SIGNAL[~near] + SIGMA**2 / (2 * SIGNAL[~near])
    np.testing.assert_allclose(mean, expected, rtol=1e-7)
    spread = rician.spread(signal, variance)
    exact = 2 * SIGMA**2 + SIGNAL**2 - expected**2
    np.testing.assert_allclose(spread[near], exact[near], rtol=1e-7)
    np.testing.assert_allclose(spread[~near], SIGMA**2, rtol=2e-3)
    step = 1e-5
    ahead, behind = (rice(SIGNAL[2:7] + s).mean() for s in (step, -step))
    np.testing.assert_allclose(slope[2:7], (ahead - behind) / (2 * step), rtol=1e-6)
    back = rician.invert_mean(mean, variance)
    np.testing.assert_allclose(back[3:], SIGNAL[3:], rtol=1e-6)
    assert float(back[:3].max()) < 0.05


def test_reference_means(shared):
    reference = read(shared, "rician_mean")
    sigma = np.array(reference["sigma"])
    mean, _ = rician.mean(*tensors(reference["nu"], sigma**2))
    np.testing.assert_allclose(mean, reference["exact_scaled_bessel"], rtol=1e-8)


def test_likelihood_differs_from_scipy_by_a_constant():
    data = np.array([0.05, 0.6, 1.4, 4.0, 9.0])[:, None]
    signal = SIGNAL[:-2]
    cost, slope, _ = rician.likelihood(*tensors(signal, data, SIGMA**2))
    exact = -(SIGMA**2) * scipy.stats.rice.logpdf(data, signal / SIGMA, scale=SIGMA)
    difference = cost.numpy() - exact
    np.testing.assert_allclose(difference, difference[:, :1] + 0 * signal, atol=1e-8)
    assert float(cost.min()) >= 0
    s, y, v = tensors(signal[2:], data, SIGMA**2)
    step = 1e-6
    numeric = (rician.likelihood(s + step, y, v).cost - rician.likelihood(s - step, y, v).cost) / (
        2 * step
    )
    np.testing.assert_allclose(slope[:, 2:], numeric, atol=1e-6)


def test_curvature_is_the_second_derivative_where_that_is_positive():
    s, y, v = tensors(np.array([0.4, 1.0, 3.0, 20.0]), np.array([[1.0], [3.0], [19.0]]), SIGMA**2)
    step = 1e-5
    numeric = (
        rician.likelihood(s + step, y, v).slope - rician.likelihood(s - step, y, v).slope
    ) / (2 * step)
    curvature = rician.likelihood(s, y, v).curvature
    np.testing.assert_allclose(curvature, numeric.clamp_min(0.1), atol=1e-5)


def test_single_precision_neither_overflows_nor_cancels():
    s, y = (torch.tensor(x, dtype=torch.float32) for x in ([0.0, 1.0, 1.0], [0.01, 1.0, 0.0]))
    terms = rician.likelihood(s, y, torch.tensor(1e-6))
    assert all(bool(t.isfinite().all()) for t in terms)
    assert all(bool(t.isfinite().all()) for t in rician.mean(s, torch.tensor(1e-6)))


def magnitudes(signal, sigma, rng, n=1):
    channels = rng.normal(size=(2, n, *signal.shape)) * sigma
    return np.hypot(signal + channels[0], channels[1]).mean(0)


@pytest.mark.parametrize("snr", [10, 20])
def test_r2star_is_not_biased_by_the_noise_floor(snr):
    model = get_model("r2star")(GradientEchoScheme(echo_time=(2.2 + 3.07 * np.arange(12)) * 1e-3))
    truth = np.full(4000, 60.0)
    params = {"S0": torch.ones(4000).double(), "R2star": torch.tensor(truth)}
    data = magnitudes(model.signal(params).numpy(), 1 / snr, np.random.default_rng(0))
    plain = fit(model, data, sigma=1 / snr)
    exact = fit(model, data, sigma=1 / snr, noise="rician")
    bias = [r.maps["R2star"].mean() - 60 for r in (plain, exact)]
    assert bias[0] < -1.5 / (snr / 10) ** 2
    assert abs(bias[1]) < 0.2 * abs(bias[0])
    error = exact.maps["R2star"] - truth
    coverage = (np.abs(error) < 1.96 * exact.std["R2star"]).mean()
    assert 0.92 < coverage < 0.975
    assert exact.settings["noise"] == "rician"


def test_averages_of_magnitudes_are_compared_with_their_mean():
    n = 32
    b = [0.5, 1.0, 2.0, 4.0, 6.0, 9.0]
    model = get_model("mcmicro")(DiffusionScheme(b=b, n_directions=n))
    voxels, sigma = 1500, 1 / 12
    params = {"fn": torch.full((voxels,), 0.5).double(), "d": torch.full((voxels,), 2.0).double()}
    data = magnitudes(model.signal(params).numpy(), sigma, np.random.default_rng(1), n)
    told = {"sigma": sigma / np.sqrt(n)}
    plain, corrected = (fit(model, data, noise=noise, **told) for noise in ("gaussian", "rician"))
    for name, value in (("fn", 0.5), ("d", 2.0)):
        biases = [abs(np.nanmedian(r.maps[name]) - value) for r in (plain, corrected)]
        assert biases[1] < 0.2 * biases[0]
        z = (corrected.maps[name] - value) / corrected.std[name]
        assert 0.92 < (np.abs(z) < 1.96).mean() < 0.975
    np.testing.assert_allclose(model.averages, n)


def test_single_precision_holds_far_above_the_noise():
    model = get_model("r2star")(GradientEchoScheme(echo_time=(2.2 + 3.07 * np.arange(12)) * 1e-3))
    params = {"S0": torch.ones(60).double(), "R2star": torch.linspace(10, 60, 60).double()}
    data = magnitudes(model.signal(params).numpy(), 0.02, np.random.default_rng(2))
    for sigma in (1e-2, 1e-3, 1e-4):  # far too small, and so far above
        plain, exact = (fit(model, data, sigma=sigma, noise=n) for n in ("gaussian", "rician"))
        np.testing.assert_allclose(exact.maps["R2star"], plain.maps["R2star"], rtol=2e-2)
