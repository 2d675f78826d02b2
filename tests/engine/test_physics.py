"""Signal physics against matrix exponentials, dense quadrature and known limits."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch

from bids_gacelle.engine.derivatives import directional
from bids_gacelle.engine.physics.exchange import karger, karger_derivatives
from bids_gacelle.engine.physics.powder import (
    axial_average,
    axial_average_slope,
    dawson,
    stick_average,
    stick_average_slope,
)
from bids_gacelle.engine.physics.quadrature import (
    OPTIMISED_LIMIT,
    gauss_legendre,
    legendre2,
    legendre4,
    powder_rule,
)
from bids_gacelle.engine.physics.restricted import (
    CYLINDER,
    SPHERE,
    RestrictedTable,
    cylinder_roots,
    scaled_attenuation,
    sphere_roots,
)
from bids_gacelle.engine.physics.steady_state import spgr

LEGENDRE = {0: np.ones_like, 2: legendre2, 4: legendre4}


@pytest.mark.parametrize(
    ("n", "orders", "error"),
    [(6, (0, 2), 2e-6), (7, (0, 2, 4), 1.3e-7), (8, (0, 2), 6e-9), (8, (4,), 7e-8)],
)
def test_optimised_rule_integrates_every_allowed_kernel(n, orders, error):
    a = np.linspace(0, OPTIMISED_LIMIT, 300)[:, None]
    dense, dense_weights = gauss_legendre(200)
    nodes, weights = powder_rule(OPTIMISED_LIMIT, n)

    def integral(x, w, order):
        return (w * np.exp(-a * x**2) * LEGENDRE[order](x)).sum(1)

    for order in orders:
        exact = integral(dense, dense_weights, order)
        np.testing.assert_allclose(integral(nodes, weights, order), exact, atol=error)


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
    with pytest.raises(ValueError, match="No powder rule with 9"):
        powder_rule(1.0, 9)


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


def gaps():
    """Gaps of the eigenvalues from 1e-4 to 10, so that both branches are met."""
    rng = np.random.default_rng(2)
    size = 10 ** rng.uniform(-4, 1, 400)
    return rng.random(400), size * rng.random(400), size * rng.random(400), size


def no_gap():
    """Eigenvalues that are the same or nearly so, for f = 1 and f = 0."""
    apart = np.array([0, 1e-9, -1e-8, 1e-6, -1e-4, 1e-2])
    rate, rest = np.repeat([1 / 16, 1.0, 4.0], 6), np.tile([0.0, 0.5], 9)
    f = np.repeat([1.0, 0.0], 18)
    more, less = np.tile(rest + rate + np.tile(apart, 3), 2), np.tile(rest, 2)
    return f, np.where(f == 1, more, less), np.where(f == 1, less, more), np.tile(rate, 2)


@pytest.mark.parametrize("values", [gaps(), no_gap()])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 3e-6)])
def test_exchange_derivatives_agree_with_forward_mode(values, dtype, error):
    f, d1, d2, rate = (torch.tensor(v, dtype=dtype) for v in values)
    parts = karger_derivatives(f, d1, d2, rate)
    torch.testing.assert_close(parts.signal, karger(f, d1, d2, rate), rtol=0, atol=0)
    one, zero = torch.ones_like(f), torch.zeros_like(f)
    log_time = torch.zeros_like(f)

    def of_values(f, d1, d2, log_time):
        return karger(f, d1, d2, rate * torch.exp(-log_time))

    for i, found in enumerate(parts[1:]):
        tangents = tuple(one if i == j else zero for j in range(4))
        exact = directional(of_values, (f, d1, d2, log_time), tangents)[1]
        torch.testing.assert_close(found, exact, rtol=error, atol=error)


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


def test_dawson_agrees_with_scipy():
    x = np.concatenate([np.logspace(-2, 3, 2000), np.arange(1, 40) * 0.3])
    np.testing.assert_allclose(dawson(torch.tensor(x)), scipy.special.dawsn(x), rtol=1e-11)


EXPONENTS = torch.tensor([0.0, 1e-9, 1e-3, 0.29, 0.3, 0.31, 1.0, 7.0, 30.0, 91.0, 400.0]).double()


def test_axial_average_is_the_integral_and_its_slope_the_derivative():
    radial, axial = EXPONENTS[:, None], EXPONENTS
    # The integrand may be steep at either end; panels of many nodes resolve both.
    nodes, weights = gauss_legendre(200)
    edges = np.array([0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0])
    x = torch.tensor((edges[:-1, None] + np.diff(edges)[:, None] * nodes).ravel())
    w = torch.tensor((np.diff(edges)[:, None] * weights).ravel())
    kernel = torch.exp(-radial[..., None] * (1 - x**2) - axial[..., None] * x**2)
    average = axial_average(radial, axial)
    torch.testing.assert_close(average, (w * kernel).sum(-1), rtol=1e-11, atol=1e-13)
    slope = axial_average_slope(radial, axial, average)
    torch.testing.assert_close(slope, -(w * (1 - x**2) * kernel).sum(-1), rtol=0, atol=1e-12)
    upper = radial <= axial
    prolate = axial_average(radial, axial, oblate=False)
    torch.testing.assert_close(prolate[upper], average[upper], rtol=1e-14, atol=0)
    single = axial_average(radial.float(), axial.float())
    assert bool(single.isfinite().all())
    torch.testing.assert_close(single.double(), average, rtol=0, atol=3e-7)


def test_roots_of_the_eigenvalue_equations():
    np.testing.assert_allclose(cylinder_roots(), scipy.special.jnp_zeros(1, 100), rtol=4e-16)
    # Those of the sphere are extrema of the spherical Bessel function j1.
    roots = sphere_roots()
    slope = scipy.special.spherical_jn(1, roots, derivative=True)
    np.testing.assert_allclose(roots * slope, 0, atol=1e-13)
    assert roots[0] == pytest.approx(2.0815759778181, abs=1e-12)
    assert (np.abs(np.diff(roots) - np.pi) < 0.8).all()  # none is missing


def restricted_series(radius, roots, shift, diffusivity, small, big):
    """h(r) as published, with as many roots as given."""
    time = radius**2 / diffusivity
    squares, d, delta = roots**2, small / time, big / time
    bracket = (
        -2 + 2 * squares * d + 2 * np.exp(-squares * d) + 2 * np.exp(-squares * delta)
        - np.exp(-squares * (delta + d)) - np.exp(-squares * (delta - d))
    )  # fmt: skip
    return diffusivity * time**3 * (2 / (squares**3 * (squares - shift)) * bracket).sum()


TIMES = pytest.mark.parametrize(("small", "big"), [(6, 13), (6, 30), (1, 5), (15, 40), (6, 6)])
SHAPES = pytest.mark.parametrize(
    ("geometry", "roots"),
    [(CYLINDER, scipy.special.jnp_zeros(1, 400)), (SPHERE, sphere_roots())],
    ids=["cylinder", "sphere"],
)


@SHAPES
@TIMES
def test_restricted_diffusion_equals_the_published_series(geometry, roots, small, big):
    r = np.linspace(0.05, 10, 120)
    h = np.array([restricted_series(x, roots, geometry.shift, 1.7, small, big) for x in r])
    q, slope = scaled_attenuation(r, geometry, 1.7, small, big)
    np.testing.assert_allclose(q * r**4, h, rtol=1e-10)
    up, down = (scaled_attenuation(r + e, geometry, 1.7, small, big)[0] for e in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, (up - down) / 2e-5, atol=1e-8 * np.abs(slope).max())

    table = RestrictedTable(geometry, 1.7, *np.array([[20.0], [small], [big]]), 10.0)
    exact = np.exp(-table.gradient2[0] * h)
    for dtype, error in ((torch.float64, 1e-10), (torch.float32, 3e-7)):
        exponent, by_radius = table(torch.tensor(r, dtype=dtype))
        np.testing.assert_allclose(torch.exp(-exponent[0]), exact, atol=error)
        expected = table.gradient2[0] * r**3 * (4 * q + r * slope)
        np.testing.assert_allclose(by_radius[0], expected, rtol=3e-6, atol=error)


@SHAPES
def test_restricted_diffusion_has_the_known_limits(geometry, roots):
    # A pore far smaller than the diffusion length: Neuman's law; r = 0 is no special case.
    q, slope = scaled_attenuation(np.array([0.0, 0.02]), geometry, 1.7, 6.0, 30.0)
    known = {1: 7 / 48, 2: 16 / 175}[geometry.shift] * 6.0 / 1.7
    np.testing.assert_allclose(q, known, rtol=1e-4)
    assert slope[0] == 0
    # A pore far larger: free diffusion, C = b D0.
    q, _ = scaled_attenuation(np.array([300.0]), geometry, 1.7, 10.0, 12.0)
    assert q[0] * 300.0**4 == pytest.approx(10**2 * (12 - 10 / 3) * 1.7, rel=0.05)


def test_shells_of_one_timing_share_a_row_of_the_table_in_any_order():
    b, small, big = np.array([[1.0, 5, 2, 9], [6, 6, 10, 6], [13, 30, 40, 13]])
    table = RestrictedTable(CYLINDER, 1.7, b, small, big, 10.0)
    radius = torch.tensor([[0.0, 0.3, 2.0], [4.0, 9.99, 10.0]], dtype=torch.float64)
    exponent, slope = table(radius)
    assert exponent.shape == slope.shape == (4, 2, 3)
    for m in range(4):
        one = RestrictedTable(CYLINDER, 1.7, b[m : m + 1], small[m : m + 1], big[m : m + 1], 10.0)
        torch.testing.assert_close(one(radius)[0][0], exponent[m], rtol=1e-15, atol=0)
    wide = RestrictedTable(CYLINDER, 1.7, b, small, big, 10.0, wide=True)(radius)[0]
    expected = 7 / 48 * wide.new_tensor(table.gradient2 * small / 1.7)[:, None, None] * radius**4
    torch.testing.assert_close(wide, expected, rtol=1e-13, atol=0)


def test_spoiled_signal_peaks_at_the_ernst_angle():
    r1, tr = torch.tensor([0.9, 0.03], dtype=torch.float64)
    angle = torch.linspace(0.01, 1.5, 20001, dtype=torch.float64)
    signal, _ = spgr(angle, tr, r1)
    ernst = math.acos(math.exp(-0.03 * 0.9))
    assert float(angle[signal.argmax()]) == pytest.approx(ernst, abs=1e-4)
    e = math.exp(-0.03 * 0.9)
    expected = torch.sin(angle) * (1 - e) / (1 - e * torch.cos(angle))
    torch.testing.assert_close(signal, expected, rtol=1e-12, atol=0)
