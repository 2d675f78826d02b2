"""Signal physics against matrix exponentials, dense quadrature and known limits."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch

from bids_gacelle.engine.physics.exchange import karger, karger_derivatives
from bids_gacelle.engine.physics.powder import stick_average, stick_average_slope
from bids_gacelle.engine.physics.quadrature import (
    OPTIMISED_LIMIT,
    gauss_legendre,
    legendre2,
    powder_rule,
)
from bids_gacelle.engine.physics.steady_state import spgr


@pytest.mark.parametrize(("n", "error"), [(6, 2e-6), (8, 6e-9)])
@pytest.mark.parametrize("order", [0, 2])
def test_optimised_rule_integrates_every_allowed_kernel(n, error, order):
    a = np.linspace(0, OPTIMISED_LIMIT, 300)[:, None]
    dense, dense_weights = gauss_legendre(200)
    nodes, weights = powder_rule(OPTIMISED_LIMIT, n)

    def integral(x, w):
        return (w * np.exp(-a * x**2) * (legendre2(x) if order else 1)).sum(1)

    np.testing.assert_allclose(
        integral(nodes, weights), integral(dense, dense_weights), atol=error
    )


@pytest.mark.parametrize("largest", [70.0, 300.0, 2000.0])
@pytest.mark.parametrize(("n", "error"), [(6, 1e-6), (8, 1e-9)])
def test_sharper_kernels_get_a_rule_with_more_nodes(largest, n, error):
    nodes, weights = powder_rule(largest, n)
    a = np.linspace(0, largest, 200)
    estimate = (weights * np.exp(-a[:, None] * nodes**2)).sum(1)
    root = np.sqrt(np.maximum(a, 1e-300))
    exact = np.where(a > 0, 0.5 * np.sqrt(np.pi) * scipy.special.erf(root) / root, 1.0)
    np.testing.assert_allclose(estimate, exact, atol=error)


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="No powder rule with 7"):
        powder_rule(1.0, 7)


def test_exchange_equals_the_matrix_exponential():
    rng = np.random.default_rng(1)
    f = rng.choice([0.0, 1e-6, 0.3, 0.7, 1 - 1e-9, 1.0], 300)
    d1, d2 = rng.exponential(5, (2, 300)) * rng.choice([0, 1], (2, 300))
    rate = rng.choice([0.01, 0.3, 1.0, 30.0], 300)
    signal = karger(*(torch.tensor(v) for v in (f, d1, d2, rate))).numpy()
    for i in range(300):
        r1, r2 = rate[i] * (1 - f[i]), rate[i] * f[i]
        generator = -np.array([[d1[i] + r1, -r2], [-r1, d2[i] + r2]])
        exact = (scipy.linalg.expm(generator) @ [f[i], 1 - f[i]]).sum()
        assert signal[i] == pytest.approx(exact, abs=1e-10)


def test_exchange_derivatives_agree_with_forward_mode_across_the_series_switch():
    rng = np.random.default_rng(2)
    # Gaps of the eigenvalues from 1e-4 to 10, so that both branches are met.
    size = 10 ** rng.uniform(-4, 1, 400)
    values = [rng.random(400), size * rng.random(400), size * rng.random(400), size]
    f, d1, d2, rate = (torch.tensor(v) for v in values)
    parts = karger_derivatives(f, d1, d2, rate)
    torch.testing.assert_close(parts.signal, karger(f, d1, d2, rate), rtol=0, atol=0)
    one, zero = torch.ones_like(f), torch.zeros_like(f)
    log_time = torch.zeros_like(f)

    def of_values(f, d1, d2, log_time):
        return karger(f, d1, d2, rate * torch.exp(-log_time))

    for i, found in enumerate(parts[1:]):
        tangents = tuple(one if i == j else zero for j in range(4))
        exact = torch.func.jvp(of_values, (f, d1, d2, log_time), tangents)[1]
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)


def test_exchange_in_single_precision_keeps_six_digits():
    rng = np.random.default_rng(3)
    values = [rng.random(5000), rng.exponential(5, 5000), rng.exponential(3, 5000),
              10 ** rng.uniform(-2, 1.5, 5000)]  # fmt: skip
    double = karger_derivatives(*(torch.tensor(v) for v in values))
    single = karger_derivatives(*(torch.tensor(v, dtype=torch.float32) for v in values))
    for a, b in zip(double, single, strict=True):
        assert float((a - b).abs().max()) < 3e-6 * max(1.0, float(a.abs().max()))


def test_stick_average_is_the_integral_and_its_slope_the_derivative():
    a = torch.tensor([0.0, 1e-9, 1e-3, 0.1, 0.2999999, 0.3, 0.3000001, 1.0, 7.0, 60.0])
    a = a.double()
    x, w = (torch.tensor(v) for v in gauss_legendre(120))
    kernel = torch.exp(-a[:, None] * x**2)
    average = stick_average(a)
    torch.testing.assert_close(average, (w * kernel).sum(1), rtol=0, atol=1e-13)
    slope = stick_average_slope(a, average)
    torch.testing.assert_close(slope, -(w * x**2 * kernel).sum(1), rtol=0, atol=1e-13)


def test_spoiled_signal_peaks_at_the_ernst_angle():
    r1, tr = torch.tensor([0.9, 0.03], dtype=torch.float64)
    angle = torch.linspace(0.01, 1.5, 20001, dtype=torch.float64)
    signal, _ = spgr(angle, tr, r1)
    ernst = math.acos(math.exp(-0.03 * 0.9))
    assert float(angle[signal.argmax()]) == pytest.approx(ernst, abs=1e-4)
    e = math.exp(-0.03 * 0.9)
    expected = torch.sin(angle) * (1 - e) / (1 - e * torch.cos(angle))
    torch.testing.assert_close(signal, expected, rtol=1e-12, atol=0)
