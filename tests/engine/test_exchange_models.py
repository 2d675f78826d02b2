"""NEXI and its relatives: invariants up to l = 4, still water, finite pulses, somas."""

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch

from bids_gacelle.engine import DiffusionScheme, EngineError, fit, get_model
from bids_gacelle.engine.physics.finite_pulses import (
    pulse_table,
    pulse_weights,
    pulsed_karger,
    pulsed_karger_derivatives,
)
from bids_gacelle.engine.physics.quadrature import (
    OPTIMISED_LIMIT,
    gauss_legendre,
    legendre2,
    legendre4,
    powder_rule,
)
from bids_gacelle.engine.physics.restricted import sphere_roots

from .helpers import NEXI_B, NEXI_DELTA, NEXI_PULSES, everywhere, make_model, read
from .test_physics import restricted_series

LEGENDRE = {0: np.ones_like, 2: lambda x: -legendre2(x), 4: legendre4}
EXCHANGE = [
    ("nexi", {}),
    ("nexi", {"l_max": 2}),
    ("nexi", {"l_max": 4}),
    ("nexidot", {}),
    ("nexidot", {"l_max": 2}),
    ("smex", {}),
    ("smex", {"l_max": 2}),
    ("smex", {"l_max": 4}),
    ("sandix", {}),
    ("sandix", {"l_max": 2}),
]
MODELS = pytest.mark.parametrize(("name", "options"), EXCHANGE)
SINGLE = {"nexi": 3e-6, "nexidot": 3e-6, "smex": 5e-6, "sandix": 3e-6}


# --- quadrature --------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [5.0, OPTIMISED_LIMIT, 75.0, 400.0])
def test_rules_with_eight_nodes_serve_the_fourth_polynomial(largest):
    a = np.linspace(0, largest, 400)[:, None]
    dense, dense_weights = gauss_legendre(300)
    nodes, weights = powder_rule(largest, 8)

    def integral(x, w):
        return (w * np.exp(-a * x**2) * legendre4(x)).sum(1)

    exact = integral(dense, dense_weights)
    np.testing.assert_allclose(integral(nodes, weights), exact, atol=6e-8)
    assert (exact[1:] > 0).all()  # so that the absolute value is a sign


def test_legendre4():
    x = np.linspace(-1, 1, 9)
    np.testing.assert_allclose(
        legendre4(x), np.polynomial.legendre.legval(x, [0, 0, 0, 0, 1]), atol=1e-15
    )


# --- NEXI --------------------------------------------------------------------------------------


def dense_nexi(params, share="fn", l_max=4, b=NEXI_B, big_delta=NEXI_DELTA):
    """S_l without coherence by a dense rule and matrix exponentials: {l: (shells, voxels)}."""
    x, w = gauss_legendre(60)
    f, dn, de, tex = (params[k].numpy()[:, None] for k in (share, "dn", "de", "tex"))
    found = {order: [] for order in range(0, l_max + 1, 2)}
    for each, time in zip(b, big_delta, strict=True):
        out, back = time * (1 - f) / tex, time * f / tex
        generator = np.zeros((len(f), len(x), 2, 2))
        generator[..., 0, 0] = -(each * dn * x**2 + out)
        generator[..., 0, 1], generator[..., 1, 0] = back, out
        generator[..., 1, 1] = -(each * de + back)
        start = np.stack([f, 1 - f], -1)[..., None]
        kernel = (torch.linalg.matrix_exp(torch.tensor(generator)).numpy() @ start).sum((-1, -2))
        for order, rows in found.items():
            rows.append(np.abs(kernel @ (w * LEGENDRE[order](x))))
    return {order: np.array(rows) for order, rows in found.items()}


def test_nexi_to_order_four_equals_a_dense_integral():
    model = make_model("nexi", l_max=4)
    params = everywhere(model, 60, 1)
    s = dense_nexi(params)
    p2, p4 = params["p2"].numpy(), params["p4"].numpy()
    exact = np.concatenate((s[0], p2 * s[2], p4 * s[4]))
    np.testing.assert_allclose(model.signal(params), exact, atol=5e-8)
    single = model.signal({k: v.float() for k, v in params.items()})
    np.testing.assert_allclose(single, exact, atol=1e-6)
    assert model.n_measurements == 45
    np.testing.assert_array_equal(model.averages, [1] * 15 + [0] * 30)


def test_lower_orders_are_the_first_rows():
    params = everywhere(make_model("nexi", l_max=4), 40, 2)
    four, two, none = (make_model("nexi", l_max=k).signal(params) for k in (4, 2, 0))
    torch.testing.assert_close(four[:30], two, rtol=0, atol=1e-14)
    torch.testing.assert_close(two[:15], none, rtol=0, atol=1e-14)


def test_mixtures_of_order_four_reach_all_of_the_square_and_nothing_else():
    model = make_model("nexi", l_max=4)
    rng = np.random.default_rng(3)
    inside = model.unmix(torch.tensor(rng.dirichlet([0.5] * 4, 2000).T))
    assert all(float(v.min()) >= 0 and float(v.max()) <= 1 for v in inside.values())
    corners = model.unmix(torch.eye(4, dtype=torch.float64))
    found = set(zip(corners["p2"].tolist(), corners["p4"].tolist(), strict=True))
    assert found == {(0, 0), (0, 1), (1, 0), (1, 1)}


@MODELS
def test_a_mixture_is_the_signal(name, options):
    model = make_model(name, **options)
    searched = everywhere(model, 80, 4)
    for linear in model.linear:
        del searched[linear]
    if not model.linear:
        return
    mixture = model.mixture(searched)
    weights = torch.tensor(np.random.default_rng(5).dirichlet([0.7] * len(mixture), 80).T)
    weights[:, : len(mixture)] = torch.eye(len(mixture), dtype=torch.float64)
    linear = model.unmix(weights)
    assert set(linear) == set(model.linear)
    assert all(bool(((v >= 0) & (v <= 1)).all()) for v in linear.values())
    expected = model.signal(searched | linear)
    torch.testing.assert_close((weights[:, None] * mixture).sum(0), expected, rtol=0, atol=1e-13)


# --- all of them -------------------------------------------------------------------------------


@MODELS
def test_single_precision_is_enough(name, options):
    model = make_model(name, **options)
    params = everywhere(model, 1000, 8)
    single = model.jacobian({k: v.float() for k, v in params.items()})
    double = model.jacobian(params)
    assert float((single[0] - double[0]).abs().max()) < SINGLE[name]
    for a, b in zip(single[1], double[1], strict=True):
        assert bool(a.isfinite().all())
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


@MODELS
@pytest.mark.parametrize("scale", [0.8, 1.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bscale_multiplies_b_at_equal_timing(name, options, scale, dtype):
    """Beyond the nominal b-values, too, nodes and steps are enough."""
    model = make_model(name, **options)
    params = everywhere(model, 50, 9)
    inputs = {"bscale": torch.full((50,), scale, dtype=dtype)}
    scaled = model.signal({k: v.to(dtype) for k, v in params.items()}, inputs)
    scheme = model.scheme
    other = DiffusionScheme(scale * scheme.b, scheme.big_delta, scheme.small_delta)
    expected = get_model(name)(other, **options).signal(params)
    error = 1e-6 if dtype == torch.float64 else SINGLE[name]
    torch.testing.assert_close(scaled.double(), expected, rtol=0, atol=error)


@MODELS
def test_fits_without_noise_find_the_truth(name, options):
    model = make_model(name, **options)
    truth = plausible(model, 200, 10)
    result = fit(model, model.signal(truth), starts=8, device="cpu")
    good = np.ones(200, dtype=bool)
    for parameter in model.parameters:
        wanted = truth[parameter.name].numpy()
        tolerance = 0.02 * (parameter.start[1] - parameter.start[0]) + 0.02 * wanted
        good &= np.abs(result.maps[parameter.name] - wanted) < tolerance
    assert good.mean() >= 0.95


def plausible(model, n, seed):
    """Draw tissue of which every parameter leaves a trace in the signal."""
    rng = np.random.default_rng(seed)
    boxes = {
        "fn": (0.2, 0.8), "fin": (0.2, 0.8), "dn": (1.6, 2.9), "de": (0.5, 1.3), "tex": (3, 50),
        "p2": (0.1, 0.9), "p4": (0.1, 0.9), "fdot": (0.02, 0.25), "fs": (0.1, 0.5), "rs": (4, 10),
    }  # fmt: skip
    return {name: torch.tensor(rng.uniform(*boxes[name], n)) for name in model.parameter_names}


@MODELS
def test_fractions_add_up_to_one(name, options):
    model = make_model(name, **options)
    params = everywhere(model, 30, 11)
    derived = model.derive(params)
    fractions = {
        "nexi": ("fn", "fe"),
        "smex": ("fn", "fe"),
        "nexidot": ("fdot", "fntotal", "fetotal"),
        "sandix": ("fs", "fn", "fe"),
    }[name]
    values = {**params, **derived}
    total = sum(values[fraction] for fraction in fractions)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert set(derived) == set(model.derived_names)
    share = params["fin" if name == "sandix" else "fn"]
    torch.testing.assert_close(derived["rn"], (1 - share) / params["tex"])


@pytest.mark.parametrize("name", ["nexi", "nexidot", "smex", "sandix"])
def test_no_exchange_leaves_sticks_and_their_surroundings(name):
    model = make_model(name)
    one = torch.ones(1, dtype=torch.float64)
    params = {"dn": 2.1 * one, "de": 0.7 * one, "tex": 1e9 * one, model.share: 0.4 * one}
    params |= {extra: 0 * one for extra in ("fdot", "fs") if extra in model.parameter_names}
    params["rs"] = 5 * one
    b = np.array(NEXI_B)
    x, w = gauss_legendre(80)
    stick = (w * np.exp(-2.1 * b[:, None] * x**2)).sum(1)
    expected = 0.4 * stick + 0.6 * np.exp(-0.7 * b)
    np.testing.assert_allclose(model.signal(params)[:, 0], expected, atol=1e-7)


# --- still water -------------------------------------------------------------------------------


def test_nexidot_reference_within_its_quadrature_error(shared):
    ref = read(shared, "nexi")
    fa, da, de, ra, p2 = torch.tensor(ref["params"], dtype=torch.float64).T
    scheme = DiffusionScheme(b=ref["protocol"]["b"], big_delta=ref["protocol"]["Delta"])
    fdot = torch.linspace(0, 1, len(fa), dtype=torch.float64)
    params = {"fn": fa, "dn": da, "de": de, "tex": (1 - fa) / ra, "fdot": fdot, "p2": p2}
    moving = torch.tensor(ref["signals"], dtype=torch.float64).T
    still = torch.tensor([1.0] * 15 + [0.0] * 15, dtype=torch.float64)[:, None]
    signal = get_model("nexidot")(scheme, l_max=2).signal(params)
    error = (signal - ((1 - fdot) * moving + fdot * still)).abs()
    assert float(error[:15].max()) < 3.4e-4
    assert float(error[15:].max()) < 1.1e-3


def test_nexidot_equals_a_dense_integral_and_without_dot_nexi():
    model = make_model("nexidot", l_max=2)
    params = everywhere(model, 40, 12)
    s, fdot = dense_nexi(params, l_max=2), params["fdot"].numpy()
    exact = np.concatenate(((1 - fdot) * s[0] + fdot, (1 - fdot) * params["p2"].numpy() * s[2]))
    np.testing.assert_allclose(model.signal(params), exact, atol=1e-8)
    nothing = model.signal(params | {"fdot": torch.zeros(40, dtype=torch.float64)})
    expected = make_model("nexi", l_max=2).signal(params)
    torch.testing.assert_close(nothing, expected, rtol=0, atol=1e-15)


# --- somas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ds", [3.0, 2.2])
def test_sandix_equals_dense_nexi_and_the_published_sphere(ds):
    model = make_model("sandix", ds=ds)
    params = everywhere(model, 40, 13)
    s0 = dense_nexi(params, share="fin", l_max=0)[0]
    fs, roots = params["fs"].numpy(), sphere_roots()
    sphere = np.zeros_like(s0)
    for m, (b, big, small) in enumerate(zip(NEXI_B, NEXI_DELTA, NEXI_PULSES, strict=True)):
        g2 = b / (small**2 * (big - small / 3))
        for v, radius in enumerate(params["rs"].tolist()):
            sphere[m, v] = np.exp(-g2 * restricted_series(radius, roots, 2, ds, small, big))
    exact = fs * sphere + (1 - fs) * s0
    np.testing.assert_allclose(model.signal(params), exact, atol=1e-7)


def test_sandix_without_somas_is_nexi():
    model = make_model("sandix", l_max=2)
    params = everywhere(model, 40, 14)
    params["fs"] = torch.zeros_like(params["fs"])
    expected = make_model("nexi", l_max=2).signal(params | {"fn": params["fin"]})
    torch.testing.assert_close(model.signal(params), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_model("sandix", ds=0.0), "ds must be a positive number"),
        (lambda: make_model("nexidot", l_max=4), "l_max of nexidot is 0 or 2, got 4"),
        (lambda: get_model("nexidot")(DiffusionScheme([1.0, 2, 3, 4], 20.0)), "at least 5"),
        (lambda: get_model("smex")(DiffusionScheme([1.0, 2, 3, 4], 20.0)), "smex needs small_del"),
        (lambda: get_model("sandix")(DiffusionScheme([1.0] * 6, 20.0)), "sandix needs small_del"),
        (lambda: get_model("sandix")(DiffusionScheme([1.0] * 5, 20.0, 5.0)), "at least 6"),
    ],
)
def test_impossible_models_are_refused(make, message):
    with pytest.raises(EngineError, match=message):
        make()


# --- finite pulses -----------------------------------------------------------------------------


def ordinary(f, dn, de, tex, b, big, small, x):
    """Signal by a solver of ordinary differential equations, gradients as a function of time."""
    g2 = b / (small**2 * (big - small / 3))
    exchange = np.array([[-(1 - f), f], [1 - f, -f]]) / tex

    def slope(time, state):
        q2 = g2 * min(time, small, max(big + small - time, 0)) ** 2
        return exchange @ state - q2 * np.array([dn * x**2, de]) * state

    state = np.array([f, 1 - f])
    for begin, end in ((0, small), (small, big), (big, big + small)):
        if end > begin:
            found = scipy.integrate.solve_ivp(
                slope, (begin, end), state, method="DOP853", rtol=1e-12, atol=1e-15
            )
            state = found.y[:, -1]
    return state.sum()


def table_and_weights(f, rate, exponent, fastest, error):
    """Return the terms of one pulse at f and rate, by a table for some largest values."""
    table = pulse_table(exponent, fastest, error)
    weights = pulse_weights(torch.tensor(table.coefficients), table, f, rate[None])
    return weights._replace(weights=weights.weights[:, :, :, 0])


def many_steps(f, dn, de, tex, b, big, small, x):
    """Signal as the product of matrix exponentials of 2000 short pieces of each pulse."""
    n = 2000
    edges = np.linspace(0, 1, n + 1)
    exponents = b * np.array([dn * x**2, de])
    total = big - small / 3
    exchange = np.array([[-(1 - f), f], [1 - f, -f]]) / tex
    squares = np.diff(edges**3) * small / 3 / total  # b of each piece, as a share
    pieces = exchange * small / n - squares[:, None, None] * np.diag(exponents)
    steps = torch.linalg.matrix_exp(torch.tensor(pieces)).numpy()
    state = np.array([f, 1 - f])
    for step in steps:
        state = step @ state
    middle = exchange * (big - small) - (big - small) / total * np.diag(exponents)
    state = scipy.linalg.expm(middle) @ state
    for step in steps[::-1]:
        state = step @ state
    return state.sum()


TIMINGS = [(20.0, 30.0, 30.0), (20.0, 40.0, 20.0), (20.0, 25.0, 4.5), (6.0, 15.0, 8.0)]


def fast_and_slow(n, seed):
    """Draw (f, dn, de, tex) within the bounds, half of them with fast exchange."""
    rng = np.random.default_rng(seed)
    f = np.clip(1.2 * rng.random(n) - 0.1, 0, 1)
    dn, de = np.clip(rng.uniform(-0.3, 4, (2, n)), 0.1, 3.5)
    tex = np.exp(rng.uniform(0, np.log(150), n))
    tex[: n // 2] = np.exp(np.clip(rng.uniform(-0.5, 1.5, n // 2), 0, None))
    return f, dn, de, tex


@pytest.mark.parametrize(("b", "big", "small"), TIMINGS)
def test_the_pulse_integrates_the_equations(b, big, small):
    """Pointwise in x: the equations are the right ones."""
    x = np.random.default_rng(15).random(8)
    f, dn, de, tex = fast_and_slow(8, 16)
    exact = [ordinary(*p, b, big, small, at) for *p, at in zip(f, dn, de, tex, x, strict=True)]
    product = [many_steps(*p, b, big, small, at) for *p, at in zip(f, dn, de, tex, x, strict=True)]
    np.testing.assert_allclose(product, exact, atol=3e-6)
    share = torch.tensor(small / big, dtype=torch.float64)
    values = [torch.tensor(v) for v in (f, b * dn * x**2, b * de, big / tex)]
    strongest = 3.5 * b * float(share / (3 - share))
    pulse = table_and_weights(values[0], share * values[3], strongest, small, 2e-8)
    np.testing.assert_allclose(pulsed_karger(*values, share, pulse), exact, atol=2e-8)


@pytest.mark.parametrize("l_max", [0, 4])
def test_smex_equals_brute_force(l_max):
    b, big, small = np.transpose(TIMINGS)
    model = get_model("smex")(DiffusionScheme(b, big, small), l_max=l_max)
    f, dn, de, tex = fast_and_slow(6, 17)
    x, w = gauss_legendre(24)
    exact = np.zeros((l_max // 2 + 1, 4, 6))
    for m, timing in enumerate(TIMINGS):
        for v in range(6):
            kernel = np.array([ordinary(f[v], dn[v], de[v], tex[v], *timing, at) for at in x])
            for i in range(len(exact)):
                exact[i, m, v] = np.abs((kernel * w * LEGENDRE[2 * i](x)).sum())
    params = dict(zip(("fn", "dn", "de", "tex"), map(torch.tensor, (f, dn, de, tex)), strict=True))
    params |= {"p2": torch.ones_like(params["fn"]), "p4": torch.ones_like(params["fn"])}
    exact = exact.reshape(-1, 6)
    np.testing.assert_allclose(model.signal(params), exact, atol=1e-6)
    single = model.signal({k: v.float() for k, v in params.items()})
    np.testing.assert_allclose(single, exact, atol=5e-6)


def pulse_in_pieces(f, a1, a2, rate, n=600):
    """Mean signals of the spins in either compartment after n pieces of a pulse, exponentials.

    Pieces of constant gradient err by the square of their length; those of half the number tell
    how much.
    """

    def after(n):
        squares, state = np.diff(np.linspace(0, 1, n + 1) ** 3), torch.ones(2, len(f)).double()
        out, back = rate * (1 - f) / n, rate * f / n
        for square in squares:
            rows = [-(a1 * square + out), out, back, -(a2 * square + back)]
            step = torch.linalg.matrix_exp(torch.stack(rows, -1).reshape(-1, 2, 2))
            state = (step @ state.T[..., None])[..., 0].T
        return state

    return (4 * after(n) - after(n // 2)) / 3


@pytest.mark.parametrize("error", [2e-6, 1e-7])
@pytest.mark.parametrize(("exponent", "fastest"), [(0.01, 0.05), (1, 10), (5, 6), (35, 30)])
def test_a_pulse_keeps_the_promised_error(exponent, fastest, error):
    """Over a grid of all that a table is for, its edges included."""
    axes = ([0, 0.02, 0.3, 0.5, 0.9, 1], [0, 0.2, 1], [0, 0.05, 0.5, 1], [0, 0.1, 0.5, 1])
    f, a1, a2, rate = torch.tensor(np.stack(np.meshgrid(*axes)).reshape(4, -1))
    a1, a2, rate = a1 * exponent, a2 * exponent, rate * fastest
    exact = pulse_in_pieces(f, a1, a2, rate)
    pulse = table_and_weights(f, rate, exponent, fastest, error)
    decays = [torch.exp(-s * a1 - (1 - s) * a2) for s in pulse.shares]
    found = (pulse.weights[0] * torch.stack(decays)).sum(1)
    assert float((found - exact).abs().max()) < error / 2


@pytest.mark.parametrize("b", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("big", [10.0, 30.0, 80.0])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.6, 1.0])
def test_signals_keep_the_promised_error(b, big, share):
    """Over a grid of the bounds; pulses of 30 ms at most."""
    small = min(share * big, 30.0)
    scheme = DiffusionScheme([b] * 4, big, small)
    model = get_model("smex")(scheme)
    axes = ([0.02, 0.1, 0.3, 0.5, 0.7, 0.9], [0.1, 0.5, 1.5, 3.5], [0.1, 0.3, 0.8, 1.5, 3.5])
    grid = np.stack(np.meshgrid(*axes, [1, 2, 4, 10, 40])).reshape(4, -1)
    params = dict(zip(("fn", "dn", "de", "tex"), map(torch.tensor, grid), strict=True))
    exact = by_pieces(model, params, b, big, small)
    for dtype, error in ((torch.float64, 1e-7), (torch.float32, 4e-6)):
        found = model.signal({k: v.to(dtype) for k, v in params.items()})[0]
        assert float((found.double() - exact).abs().max()) < error


def by_pieces(model, params, b, big, small):
    """Signal by `pulse_in_pieces` and a matrix exponential between the pulses."""
    f, dn, de, tex = (params[k] for k in ("fn", "dn", "de", "tex"))
    share = small / big
    weight = share / (3 - share)
    rate, total = big / tex, torch.zeros_like(f)
    for x2, w in zip(
        *model._rules[torch.float64][:1], model._rules[torch.float64][1][0], strict=True
    ):
        a1, a2 = b * dn * x2, b * de
        y = pulse_in_pieces(f, weight * a1, weight * a2, share * rate)
        between, out = 1 - 2 * weight, (1 - share) * rate
        rows = [-(between * a1 + out * (1 - f)), out * (1 - f), out * f, -(between * a2 + out * f)]
        step = torch.linalg.matrix_exp(torch.stack(rows, -1).reshape(-1, 2, 2))
        later = (step @ y.T[..., None])[..., 0].T
        total += w * (f * y[0] * later[0] + (1 - f) * y[1] * later[1])
    return total


def test_more_terms_for_stronger_pulses_and_longer_series_for_faster_exchange():
    def sizes(exponent, rate):
        return pulse_table(exponent, rate, 1e-7).coefficients.shape[2:]

    terms, _, powers = sizes(5, 6)
    assert sizes(1, 6)[0] < terms < sizes(35, 6)[0] < 24
    assert sizes(5, 1)[2] < powers < sizes(5, 30)[2] < 28


@pytest.mark.parametrize("l_max", [0, 4])
def test_short_pulses_are_nexi_of_the_same_b_and_separation(l_max):
    nexi = get_model("nexi")(DiffusionScheme(NEXI_B, NEXI_DELTA), l_max=l_max)
    params = everywhere(nexi, 100, 18)
    expected = nexi.signal(params)
    gaps = []
    for small in (1e-1, 1e-2, 1e-6):
        scheme = DiffusionScheme(NEXI_B, NEXI_DELTA, small)
        signal = get_model("smex")(scheme, l_max=l_max).signal(params)
        gaps.append(float((signal - expected).abs().max()))
    assert gaps[2] < 1e-7
    # First order in delta.
    assert gaps[1] < 0.15 * gaps[0]


def test_pulses_do_not_matter_without_exchange():
    params = everywhere(make_model("smex"), 100, 19)
    params["tex"] = torch.full_like(params["tex"], 1e9)
    torch.testing.assert_close(
        make_model("smex").signal(params), make_model("nexi").signal(params), rtol=0, atol=1e-7
    )


def test_pulsed_derivatives_agree_with_automatic_ones():
    rng = np.random.default_rng(20)
    f = torch.tensor(rng.choice([0.0, 1e-6, 0.3, 0.8, 1 - 1e-9, 1.0], 300))
    d1, d2 = (torch.tensor(rng.exponential(8, 300) * rng.choice([0, 1], 300)) for _ in range(2))
    d2[:50] = d1[:50]
    log_time = torch.tensor(rng.uniform(-3, 3, 300))
    share = torch.tensor(rng.choice([1e-2, 0.2, 1.0], 300))
    values = [v.detach().requires_grad_() for v in (f, d1, d2, log_time)]
    signal = pulsed(*values, share)
    expected = torch.autograd.grad(signal.sum(), values)
    with torch.no_grad():
        found = pulsed(*values, share, function=pulsed_karger_derivatives)
    torch.testing.assert_close(found[0], signal.detach(), rtol=0, atol=1e-14)
    for a, b in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=2e-9)


def pulsed(f, d1, d2, log_time, share, function=pulsed_karger):
    rate = torch.exp(-log_time)
    pulse = table_and_weights(f, share * rate, 25.0, 21.0, 1e-6)
    return function(f, d1, d2, rate, share, pulse)


def test_nodes_as_an_axis_give_the_same_integrals():
    model = make_model("smex", l_max=4)
    params = everywhere(model, 20, 21)
    expected = model.jacobian(params)
    model._integrals = lambda f, like, inputs: model._joint_integrals(
        f, *model._node_tables(like, inputs)
    )
    for a, b in zip(model.jacobian(params), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
