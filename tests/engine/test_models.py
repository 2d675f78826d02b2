"""Signals, Jacobians and declarations of all models."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import torch

from bids_gacelle.engine import (
    DiffusionScheme,
    EngineError,
    GradientEchoScheme,
    Parameter,
    SignalModel,
    get_model,
    list_models,
)
from bids_gacelle.engine.physics.quadrature import gauss_legendre, legendre2

from .helpers import (
    ALL_MODELS,
    AXCALIBER_B,
    AXCALIBER_DELTA,
    NEXI_B,
    NEXI_DELTA,
    Line,
    differences,
    draw,
    draw_inputs,
    everywhere,
    make_model,
    read,
)
from .test_physics import restricted_series

MODELS = pytest.mark.parametrize(("name", "options"), ALL_MODELS)


def columns(table):
    return torch.tensor(table, dtype=torch.float64).T


# --- against numbers made by another program ---------------------------------------------------


def test_r2star_reference(shared):
    ref = read(shared, "r2star")
    s0, r2star = columns(ref["params"])
    model = get_model("r2star")(GradientEchoScheme(echo_time=ref["protocol"]["te_s"]))
    signal = model.signal({"S0": s0, "R2star": r2star})
    torch.testing.assert_close(signal, columns(ref["signals"]), rtol=1e-10, atol=1e-10)


def test_despot1_is_the_r1_part_of_the_joint_reference(shared):
    ref = read(shared, "jointr1r2star")
    m0, r1, r2star, b1 = columns(ref["params"])
    protocol = ref["protocol"]
    scheme = GradientEchoScheme(flip_angle=protocol["fa_deg"], repetition_time=protocol["tr_s"])
    signal = get_model("despot1")(scheme).signal({"M0": m0, "R1": r1}, {"b1": b1})
    te = torch.tensor(protocol["te_s"], dtype=torch.float64)
    # Columns run over echo times fastest; dividing the decay out leaves echo time zero.
    both = columns(ref["signals"]).reshape(len(protocol["fa_deg"]), len(te), -1)
    expected = both * torch.exp(te[:, None] * r2star)
    torch.testing.assert_close(signal[:, None].expand_as(expected), expected, rtol=1e-10, atol=0)


def test_linear_despot1_reference(shared):
    ref = read(shared, "despot1")
    scheme = GradientEchoScheme(flip_angle=ref["fa_deg"], repetition_time=ref["tr_s"])
    b1 = torch.tensor(ref["b1"], dtype=torch.float64)
    estimate = get_model("despot1")(scheme).closed_form(columns(ref["S"]), {"b1": b1})
    np.testing.assert_allclose(1 / estimate["R1"], ref["T1_est"], rtol=1e-10)
    np.testing.assert_allclose(estimate["M0"], ref["M0_est"], rtol=1e-10)


def test_mcmicro_reference(shared):
    ref = read(shared, "mcmicro")
    f, d = columns(ref["params"])
    signal = get_model("mcmicro")(DiffusionScheme(b=ref["protocol"]["b"])).signal(
        {"fn": f, "d": d}
    )
    torch.testing.assert_close(signal, columns(ref["signals"]), rtol=0, atol=1e-10)


def test_nexi_reference_within_its_own_quadrature_error(shared):
    ref = read(shared, "nexi")
    fa, da, de, ra, p2 = columns(ref["params"])
    protocol = ref["protocol"]
    scheme = DiffusionScheme(b=protocol["b"], big_delta=protocol["Delta"])
    params = {"fn": fa, "dn": da, "de": de, "tex": (1 - fa) / ra, "p2": p2}
    signal = get_model("nexi")(scheme, l_max=2).signal(params)
    error = (signal - columns(ref["signals"])).abs()
    assert float(error[:15].max()) < 3.4e-4
    assert float(error[15:].max()) < 1.1e-3
    # The same 14-point trapezoid on our kernel gives their numbers, so nothing else differs.
    np.testing.assert_allclose(
        _trapezoid_nexi(params, protocol), np.transpose(ref["signals"]), atol=1e-9
    )


def _trapezoid_nexi(params, protocol):
    from bids_gacelle.engine.physics.exchange import karger

    x = torch.linspace(0, 1, 14, dtype=torch.float64)[:, None]
    w = torch.full((14, 1), 1 / 13, dtype=torch.float64)
    w[0] = w[-1] = 0.5 / 13
    s0, s2 = [], []
    for b, delta in zip(protocol["b"], protocol["Delta"], strict=True):
        kernel = w * karger(
            params["fn"], b * params["dn"] * x**2, b * params["de"], delta / params["tex"]
        )
        s0.append(kernel.sum(0))
        s2.append(params["p2"] * (kernel * (3 * x**2 - 1) / 2).sum(0).abs())
    return torch.stack(s0 + s2).numpy()


@pytest.mark.parametrize(
    # The other program truncates the series at ten roots of four decimals.
    ("name", "limit", "error"),
    [("axcalibersmt", "vangelderen", 1e-5), ("axcalibersmt_neuman", "neuman", 1e-12)],
)
def test_axcalibersmt_reference(shared, name, limit, error):
    ref = read(shared, name)
    protocol = ref["protocol"]
    scheme = DiffusionScheme(protocol["b"], protocol["Delta"], protocol["delta"])
    model = get_model("axcalibersmt")(scheme, limit=limit)
    params = dict(zip(model.parameter_names, columns(ref["params"]), strict=True))
    torch.testing.assert_close(model.signal(params), columns(ref["signals"]), rtol=0, atol=error)


# --- against closed forms and brute force ------------------------------------------------------


def test_nexi_equals_a_dense_integral_of_matrix_exponentials():
    model = make_model("nexi", l_max=2)
    params = draw(model, 40, 5, within="bounds")
    x, w = gauss_legendre(60)
    f, dn, de, tex, p2 = (params[k].numpy() for k in model.parameter_names)
    exact = np.zeros((30, 40))
    for m, (b, delta) in enumerate(zip(NEXI_B, NEXI_DELTA, strict=True)):
        generator = np.zeros((40, 60, 2, 2))
        out, back = (delta * (1 - f) / tex)[:, None], (delta * f / tex)[:, None]
        generator[..., 0, 0] = -(b * dn[:, None] * x**2 + out)
        generator[..., 0, 1] = back
        generator[..., 1, 0] = out
        generator[..., 1, 1] = -((b * de)[:, None] + back)
        start = np.stack([f, 1 - f], -1)[:, None, :, None]
        kernel = torch.linalg.matrix_exp(torch.tensor(generator)).numpy() @ start
        kernel = kernel.sum((-1, -2))
        exact[m] = kernel @ w
        exact[15 + m] = p2 * np.abs(kernel @ (w * legendre2(x)))
    double = model.signal(params).numpy()
    np.testing.assert_allclose(double, exact, atol=1e-8)
    single = model.signal({k: v.float() for k, v in params.items()}).numpy()
    np.testing.assert_allclose(single, exact, atol=2e-6)


def test_nexi_tends_to_separate_compartments_for_slow_exchange():
    model = make_model("nexi")
    one = torch.ones(1, dtype=torch.float64)
    params = {"fn": 0.4 * one, "dn": 2.0 * one, "de": 0.8 * one, "tex": 1e9 * one}
    b = np.array(NEXI_B)
    x, w = gauss_legendre(80)
    stick = (w * np.exp(-2.0 * b[:, None] * x**2)).sum(1)
    expected = 0.4 * stick + 0.6 * np.exp(-0.8 * b)
    np.testing.assert_allclose(model.signal(params)[:, 0], expected, atol=1e-7)


def test_nexi_with_very_high_b_values_stays_exact():
    model = get_model("nexi")(DiffusionScheme(b=[5, 20, 50, 100], big_delta=30.0))
    params = draw(model, 50, 6, within="bounds")
    one = {k: v[:, None] for k, v in params.items()}
    from bids_gacelle.engine.physics.exchange import karger

    x, w = (torch.tensor(v) for v in gauss_legendre(200))
    for b, signal in zip([5, 20, 50, 100], model.signal(params), strict=True):
        exact = karger(one["fn"], b * one["dn"] * x**2, b * one["de"], 30 / one["tex"])
        exact = (exact * w).sum(1)
        torch.testing.assert_close(signal, exact, rtol=0, atol=1e-8)


def test_mcmicro_equals_the_average_over_directions():
    model = make_model("mcmicro")
    params = draw(model, 60, 7, within="bounds")
    x, w = gauss_legendre(100)
    f, d = (params[k].numpy()[:, None] for k in ("fn", "d"))
    for b, signal in zip(model.scheme.b, model.signal(params).numpy(), strict=True):
        radial = (1 - f) * d
        stick = np.exp(-b * d * x**2)
        extra = np.exp(-b * (radial + (d - radial) * x**2))
        np.testing.assert_allclose(signal, ((f * stick + (1 - f) * extra) * w).sum(1), atol=1e-12)


@pytest.mark.parametrize("limit", ["vangelderen", "neuman"])
@pytest.mark.parametrize("constants", [{}, {"d0": 2.1, "dn": 1.2, "depar": 1.5, "dcsf": 2.8}])
def test_axcalibersmt_equals_the_average_over_directions(limit, constants):
    model = make_model("axcalibersmt", limit=limit, **constants)
    params = draw(model, 25, 13, within="bounds")
    known = {"d0": 1.7, "dn": 1.7, "depar": 1.7, "dcsf": 3.0} | constants
    roots = scipy.special.jnp_zeros(1, 400)
    signal = model.signal(params).numpy()
    single = model.signal({k: v.float() for k, v in params.items()}).numpy()
    np.testing.assert_allclose(single, signal, atol=1e-6)
    for v in range(25):
        r, f, fcsf, across = (float(params[k][v]) for k in model.parameter_names)
        r = r / 2
        h = {t: restricted_series(r, roots, 1, known["d0"], 6.0, t) for t in set(AXCALIBER_DELTA)}
        for m, (b, big) in enumerate(zip(AXCALIBER_B, AXCALIBER_DELTA, strict=True)):
            g2 = b / (6**2 * (big - 6 / 3))
            c = g2 * (h[big] if limit == "vangelderen" else 7 / 48 * 6 * r**4 / known["d0"])
            cylinder = _over_directions(c, b * known["dn"])
            extra = _over_directions(b * across, b * known["depar"])
            tissue = f * cylinder + (1 - f) * extra
            exact = (1 - fcsf) * tissue + fcsf * np.exp(-b * known["dcsf"])
            assert signal[m, v] == pytest.approx(exact, abs=1e-9)


def _over_directions(radial, axial):
    def kernel(x):
        return np.exp(-radial * (1 - x**2) - axial * x**2)

    return scipy.integrate.quad(kernel, 0, 1, epsabs=1e-12, epsrel=1e-12, limit=200)[0]


def test_axcalibersmt_keeps_its_slope_where_the_outer_space_becomes_isotropic():
    model = make_model("axcalibersmt")
    one = torch.ones(1, dtype=torch.float64)
    params = {"diameter": 3 * one, "fn": 0 * one, "fcsf": 0 * one, "deperp": 1.7 * one}
    signal, jacobian = model.jacobian(params)
    b = np.array(AXCALIBER_B)
    np.testing.assert_allclose(signal[:, 0], np.exp(-1.7 * b), rtol=1e-14)
    np.testing.assert_allclose(jacobian[3, :, 0], -2 / 3 * b * np.exp(-1.7 * b), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"), [("axcalibersmt", {}), ("sandi", {}), ("nexi", {"l_max": 2})]
)
def test_a_mixture_is_the_signal(name, options):
    model = make_model(name, **options)
    searched = draw(model, 60, 14, within="bounds")
    for linear in model.linear:
        del searched[linear]
    mixture = model.mixture(searched)
    weights = torch.tensor(np.random.default_rng(15).dirichlet([0.7] * len(mixture), 60).T)
    weights[:, : len(mixture)] = torch.eye(len(mixture), dtype=torch.float64)
    linear = model.unmix(weights)
    assert set(linear) == set(model.linear)
    assert all(bool(((v >= 0) & (v <= 1)).all()) for v in linear.values())
    signal = model.signal(searched | linear)
    torch.testing.assert_close((weights[:, None] * mixture).sum(0), signal, rtol=0, atol=1e-14)


@MODELS
def test_jacobian_equals_forward_mode_and_central_differences(name, options):
    model = make_model(name, **options)
    params, inputs = everywhere(model, 1000, 8), draw_inputs(model, 1000, 10)
    signal, jacobian = model.jacobian(params, inputs)
    forward_signal, forward = SignalModel.jacobian(model, params, inputs)
    torch.testing.assert_close(signal, model.signal(params, inputs), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(signal, forward_signal, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(jacobian, forward, rtol=1e-9, atol=1e-11)
    for parameter, column in zip(model.parameters, jacobian, strict=True):
        difference, step = differences(model, params, inputs, parameter.name)
        # What remains where nothing depends on the parameter: of the difference, and of rounding.
        limit = 1e-6 * column.norm(dim=0) + 1e-10 + 1e-14 / step
        assert bool(((column - difference).norm(dim=0) <= limit).all()), parameter.name


@MODELS
def test_shapes_follow_the_parameters(name, options):
    model = make_model(name, **options)
    params = {k: v.reshape(2, 3, 2) for k, v in draw(model, 12, 11).items()}
    flat = {k: v.reshape(12) for k, v in params.items()}
    signal, jacobian = model.jacobian(params)
    assert signal.shape == (model.n_measurements, 2, 3, 2)
    assert jacobian.shape == (len(model.parameters), model.n_measurements, 2, 3, 2)
    torch.testing.assert_close(signal.reshape(-1, 12), model.signal(flat), rtol=1e-14, atol=0)
    assert set(model.derive(params)) == set(model.derived_names)


# --- declarations ------------------------------------------------------------------------------


@MODELS
def test_declarations_are_complete(name, options):
    model = make_model(name, **options)
    assert model.name == name
    assert model.title
    assert len(model.description) > 60
    assert all(ref.doi.startswith("10.") and ref.text for ref in model.references)
    assert model.references
    units = ["1", "s", "ms", "1/s", "1/ms", "um", "um/s", "um^2/ms", "ppm", "rad", "arbitrary"]
    for parameter in (*model.parameters, *model.derived):
        assert parameter.description
        assert parameter.unit in units
    for parameter in model.parameters:
        if not parameter.amplitude:
            assert parameter.bounds[0] <= parameter.start[0] < parameter.start[1]
            assert parameter.start[1] <= parameter.bounds[1]
    assert set(model.input_defaults) == set(model.voxel_inputs)


def test_weak_prior_is_a_uniform_box_of_twice_the_start_width():
    linear = Parameter("x", "1", "x", start=(1.0, 3.0))
    log = Parameter("t", "ms", "t", start=(1.0, np.e**2), coordinate="log")
    samples = np.linspace(0, 4, 200001)
    assert linear.prior == pytest.approx((samples.mean(), samples.std()), rel=1e-4)
    assert log.prior == pytest.approx((1.0, 4 / np.sqrt(12)))
    assert Parameter("a", "1", "a", start=(0.5, 2.0), amplitude=True).prior is None


def test_derived_quantities():
    nexi = make_model("nexi")
    params = draw(nexi, 3, 12)
    expected = (1 - params["fn"]) / params["tex"]
    torch.testing.assert_close(nexi.derive(params)["rn"], expected)
    half = {"R2star": torch.tensor(20.0), "S0": torch.tensor(1.0)}
    assert float(make_model("r2star").derive(half)["T2star"]) == pytest.approx(0.05)
    half = {"R1": torch.tensor(0.8), "M0": torch.tensor(1.0)}
    assert float(make_model("despot1").derive(half)["T1"]) == pytest.approx(1.25)


@MODELS
def test_a_model_can_be_made_again_from_what_it_says(name, options):
    model = make_model(name, **options)
    assert model.chosen == type(model).options | options
    again = type(model)(model.scheme, **model.chosen)
    params = draw(model, 5, 13)
    assert torch.equal(again.signal(params), model.signal(params))


# --- registry and constructor ------------------------------------------------------------------


def test_registry():
    assert {name for name, _ in ALL_MODELS} == set(list_models())
    assert all(get_model(name).name == name for name in list_models())
    own = get_model("nexi")
    assert get_model(own) is own
    with pytest.raises(EngineError, match=r"known are r2star, .*Did you mean 'nexi'\?"):
        get_model("nexy")
    with pytest.raises(EngineError, match="known are r2star"):
        get_model("zzz")


def test_installed_packages_can_announce_models(tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(
        "from bids_gacelle.engine.models.r2star import R2Star\n"
        "class Theirs(R2Star):\n    name = 'theirs'\n"
    )
    info = tmp_path / "their_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[bids_gacelle.models]\ntheirs = their_models:Theirs\nnexi = their_models:Theirs\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "theirs" in list_models()
    assert get_model("theirs").name == "theirs"
    assert get_model("nexi").__module__.startswith("bids_gacelle")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get_model("nexi")(DiffusionScheme(b=[1.0, 2, 3, 4])), "nexi needs big_delta"),
        (lambda: get_model("nexi")(DiffusionScheme(b=[1.0], big_delta=[20.0])), "at least 4"),
        (
            lambda: get_model("axcalibersmt")(DiffusionScheme([1.0, 2, 3, 4], 20.0)),
            "axcalibersmt needs small_delta",
        ),
        (lambda: make_model("axcalibersmt", dn=-1.0), "dn must be a positive number"),
        (lambda: make_model("axcalibersmt", limit="none"), "is 'vangelderen' or 'neuman'"),
        (lambda: make_model("nexi", lmax=2), "no option 'lmax'; it has l_max"),
        (lambda: make_model("r1r2star", l_max=2), "no option 'l_max'; it has none"),
        (lambda: make_model("r2star", l_max=2), "no option 'l_max'; it has signal"),
        (lambda: get_model("r2star")(DiffusionScheme(b=[1.0])), "needs a GradientEchoScheme"),
        (
            lambda: get_model("despot1")(GradientEchoScheme(flip_angle=[5, 10])),
            "needs repetition_time",
        ),
    ],
)
def test_impossible_models_are_refused(make, message):
    with pytest.raises(EngineError, match=message):
        make()


@pytest.mark.parametrize("value", [3, True, 2.0, "2", None])
def test_option_values_are_checked_without_data(value):
    nexi = get_model("nexi")
    for make in (nexi.check_options, lambda options: make_model("nexi", **options)):
        with pytest.raises(EngineError, match=f"l_max of nexi is 0 or 2 or 4, got {value!r}"):
            make({"l_max": value})
    nexi.check_options({"l_max": 2})
    nexi.check_options({"l_max": np.int64(2)})


def test_option_types_are_those_of_the_defaults():
    class Theirs(Line):
        options = {"order": 2, "width": 0.5, "fast": False, "rule": "even"}  # noqa: RUF012

    Theirs.check_options({"order": 7, "width": 1, "fast": True, "rule": "odd"})
    for options in ({"order": 2.5}, {"width": "wide"}, {"width": True}, {"fast": 1}, {"rule": 0}):
        with pytest.raises(EngineError, match=f"option {next(iter(options))} of line is of type"):
            Theirs.check_options(options)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("sandi", {"ds": -1.0}, "ds must be a positive number, got -1.0"),
        ("sandix", {"ds": 0}, "ds must be a positive number, got 0"),
        ("axcalibersmt", {"depar": float("inf")}, "depar must be a positive number, got inf"),
        ("meaxcalibersmt", {"k2a": float("nan")}, "k2a must be a positive number, got nan"),
        ("meaxcalibersmt", {"r2csf": -1}, "r2csf must be a number of at least 0, got -1"),
        ("axonalt2", {"b_min": -4.0}, "b_min must be a number of at least 0, got -4.0"),
    ],
)
def test_limits_of_options_are_checked_without_data(name, options, sentence):
    with pytest.raises(EngineError, match=sentence):
        get_model(name).check_options(options)


def test_limits_of_options_are_of_options_that_are_there():
    for name in list_models():
        model = get_model(name)
        model.check_options(model.options)
        assert set(model.option_limits) <= set(model.options)


def test_closed_forms_are_announced():
    closed = {name for name in list_models() if get_model(name).has_closed_form}
    assert closed == {"despot1"}


def test_engine_needs_torch_and_numpy_only():
    code = (
        "import sys, bids_gacelle.engine as e; [e.get_model(n) for n in e.list_models()];"
        "bad = {'nibabel', 'nipype', 'scipy', 'pandas', 'bids'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
