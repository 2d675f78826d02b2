"""Models of gradient echoes against numbers of another program, and against code of their own."""

import shutil

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from bids_gacelle.engine import EngineError, GradientEchoScheme, fit, get_model
from bids_gacelle.engine.derivatives import directional
from bids_gacelle.engine.kernels import Compiled
from bids_gacelle.engine.models import mcrmwi
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.physics import hollow_cylinder
from bids_gacelle.engine.physics.epgx import spoiled_steady_state
from bids_gacelle.engine.physics.steady_state import rational_fit, spgr

from .helpers import DIFFUSION, MCR_FLIPS, draw, draw_inputs, flip_angles, make_model, noisy, read

GAMMA = 42.57747892


def columns(table):
    return torch.tensor(table, dtype=torch.float64).T


def named(ref):
    names = [n.replace("dfreqBKG_fa", "dfreqBKG") for n in ref["param_names"]]
    return dict(zip(names, columns(ref["params"]), strict=True))


def scheme_of(ref):
    protocol = ref["protocol"]
    return flip_angles(
        protocol["te_s"],
        protocol["fa_deg"],
        repetition_time=protocol["tr_s"],
        field_strength=protocol.get("B0", 3),
    )


def assert_near(signal, expected, most):
    torch.testing.assert_close(signal, expected, rtol=0, atol=most)


# --- one pool ----------------------------------------------------------------------------------


def test_r1r2star_reference(shared):
    ref = read(shared, "jointr1r2star")
    params = named(ref)
    signal = get_model("r1r2star")(scheme_of(ref)).signal(params, {"b1": params["b1"]})
    assert_near(signal, columns(ref["signals"]), 1e-10)


def test_complex_r2star_is_a_complex_exponential():
    times = np.arange(1, 7) * 3e-3
    model = get_model("r2star")(
        GradientEchoScheme(echo_time=times, field_strength=7), signal="complex"
    )
    assert model.n_measurements == 12
    assert model.signed
    params = draw(model, 20, 1)
    s0, rate, shift, phase = (params[n].numpy() for n in model.parameter_names)
    frequency = 2 * np.pi * GAMMA * 7 * shift
    expected = s0 * np.exp((-rate + 1j * frequency) * times[:, None] + 1j * phase)
    signal = model.signal(params).numpy()
    np.testing.assert_allclose(signal[:6] + 1j * signal[6:], expected, atol=1e-13)
    found = fit(model, signal.reshape(12, 4, 5))
    for name in model.parameter_names:
        np.testing.assert_allclose(found.maps[name].ravel(), params[name], rtol=2e-4, atol=2e-5)


def test_phase_is_found_without_unwrapping():
    """A start from echoes whose phase has turned many times since the excitation."""
    times = 2e-3 + 2e-3 * np.arange(10)
    model = get_model("r2star")(
        GradientEchoScheme(echo_time=times, field_strength=3), signal="complex"
    )
    shift = torch.linspace(-0.39, 0.39, 9, dtype=torch.float64)  # up to one turn per echo time
    one = torch.ones_like(shift)
    params = {"S0": one, "R2star": 25 * one, "dfreqBKG": shift, "dpini": 2 * one}
    start = model.guess(model.signal(params))
    for name, value in start.items():
        torch.testing.assert_close(value, params[name], rtol=1e-6, atol=1e-6)


def test_r1r2star_of_unequal_protocols_is_found():
    """Three contrasts with their own flip angle, repetition time and number of echoes."""
    model = make_model("r1r2star")
    params = draw(model, 200, 3)
    params["R1"] = params["R1"].clamp_max(2.0)
    b1 = draw_inputs(model, 200, 4)
    start = model.guess(model.signal(params, b1), b1)
    torch.testing.assert_close(start["R1"], params["R1"], rtol=1e-3, atol=0)
    torch.testing.assert_close(start["R2star"], params["R2star"], rtol=1e-6, atol=0)
    found = fit(model, model.signal(params, b1).numpy(), inputs=b1)
    for name in model.parameter_names:
        np.testing.assert_allclose(found.maps[name], params[name], rtol=1e-4)
    np.testing.assert_allclose(found.maps["T1"], 1 / params["R1"], rtol=1e-4)


def test_a_rational_line_replaces_the_ernst_equation():
    angle = torch.deg2rad(torch.tensor([4.0, 20, 60, 80], dtype=torch.float64))[:, None]
    time = torch.tensor([0.02, 0.03, 0.04, 0.02], dtype=torch.float64)[:, None]
    r1 = torch.linspace(0.2, 3, 15, dtype=torch.float64)
    found = rational_fit(spgr(angle, time, r1)[0], angle, time)
    # rho differs from TR R1 by (TR R1)^3 / 12
    assert float((found / r1 - 1).abs().max()) < (0.04 * 3) ** 2 / 12


def test_despot1_with_unequal_repetition_times():
    scheme = GradientEchoScheme(flip_angle=[4, 25, 12], repetition_time=[0.03, 0.02, 0.025])
    model = get_model("despot1")(scheme)
    params = {"M0": torch.full((50,), 300.0), "R1": torch.linspace(0.3, 3, 50)}
    params = {k: v.double() for k, v in params.items()}
    found = fit(model, model.signal(params).numpy())
    np.testing.assert_allclose(found.maps["R1"], params["R1"], rtol=1e-4)
    with pytest.raises(EngineError, match="one repetition time for all flip angles"):
        model.closed_form(model.signal(params))


def test_despot1_takes_the_first_echoes():
    scheme = GradientEchoScheme(
        echo_time=[0.005, 0.002, 0.008, 0.004, 0.002],
        flip_angle=[5, 5, 5, 20, 20],
        repetition_time=0.02,
    )
    despot1 = get_model("despot1")
    wanted = despot1.wanted(scheme, {})
    np.testing.assert_array_equal(wanted, [False, True, False, False, True])
    assert despot1.wanted(scheme.take(wanted), {}) is None
    # two repetition times of one flip angle are two measurements
    both = GradientEchoScheme([0.002, 0.002, 0.004], [20, 20, 20], [0.02, 0.04, 0.02])
    np.testing.assert_array_equal(despot1.wanted(both, {}), [True, True, False])
    assert despot1.wanted(GradientEchoScheme(flip_angle=[5, 20]), {}) is None


# --- hollow cylinders --------------------------------------------------------------------------


def test_hollow_cylinder_reference(shared):
    ref = read(shared, "hcfm")
    g, theta, volume = (torch.tensor(ref[k], dtype=torch.float64) for k in ("g", "theta", "fvf"))
    share, sin2, field = 1 - g**2, torch.sin(theta) ** 2, GAMMA * ref["constants"]["B0"]
    myelin, axon = hollow_cylinder.frequencies(share, sin2)
    np.testing.assert_allclose(myelin * field, ref["freq_myelin_Hz"], atol=1e-12)
    np.testing.assert_allclose(axon * field, ref["freq_axon_Hz"], atol=1e-12)
    rate = hollow_cylinder.dephasing_rate(share, sin2)
    time = torch.tensor(ref["te_s"], dtype=torch.float64)[:, None]
    exponent, _ = hollow_cylinder.dephasing(volume, 2 * np.pi * field * rate * time)
    np.testing.assert_allclose(exponent.T, ref["dephasing_extra"], atol=1e-12)
    turn = 4 / (2 * np.pi * field * rate)
    np.testing.assert_allclose(turn, ref["alpha_s"], rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hollow_cylinder_has_limits(dtype):
    """No myelin, no axon, no volume, fibres along the field: values and derivatives."""
    share = torch.tensor([0, 1e-12, 1e-6, 0.0999, 0.1, 0.1001, 0.5, 0.999999], dtype=dtype)
    for angle in (0.0, 1e-4, 1.0):
        sin2 = torch.full_like(share, np.sin(angle) ** 2)

        def all_of(share, sin2=sin2):
            rate = hollow_cylinder.dephasing_rate(share, sin2)
            exponent, _ = hollow_cylinder.dephasing(share, 300 * rate)
            return torch.stack((*hollow_cylinder.frequencies(share, sin2), rate, exponent))

        value, slope = directional(all_of, (share,), (torch.ones_like(share),))
        assert bool(value.isfinite().all())
        assert bool(slope.isfinite().all())
    myelin, axon = hollow_cylinder.frequencies(share[:1], torch.ones(1, dtype=dtype))
    # g = 1: c = -5/4, ln(1/g) = 0
    assert float(myelin) == pytest.approx(-0.05 * (2 / 3 - 1) - 0.05 * (-1.25 - 1 / 3) + 0.02)
    assert float(axon) == 0
    zero = torch.zeros(1, dtype=dtype)
    assert float(hollow_cylinder.myelin_share(zero, zero)) == 0


def test_the_series_of_thin_myelin_meets_the_closed_form():
    share = torch.linspace(0.02, 0.2, 50, dtype=torch.float64)
    one = torch.ones_like(share)
    function = lambda s: hollow_cylinder.frequencies(s, one)[0]  # noqa: E731
    value, slope = directional(function, (share,), (one,))
    q = share.numpy()
    c = 0.25 + 1.5 * (1 - q) / q * np.log(1 - q)
    np.testing.assert_allclose(value, -0.05 * (2 / 3 - 1) - 0.05 * (c - 1 / 3) + 0.02, rtol=1e-13)
    steep = 1.5 * (-np.log(1 - q) / q**2 - 1 / q)
    np.testing.assert_allclose(slope, -0.05 * steep, rtol=1e-10)


# --- three pools, one flip angle ---------------------------------------------------------------


def gremwi_scheme(ref):
    return GradientEchoScheme(echo_time=ref["protocol"]["te_s"], field_strength=3)


@pytest.mark.parametrize(
    ("kind", "key"), [("complex", "signals"), ("magnitude", "signals_magnitude")]
)
def test_gremwi_reference(shared, kind, key):
    ref = read(shared, "gremwi")
    model = get_model("gremwi")(gremwi_scheme(ref), signal=kind)
    left_out = set(ref["param_names"]) - set(model.parameter_names)
    assert left_out == ({"dfreqBKG", "dpini"} if kind == "magnitude" else set())
    assert_near(model.signal(named(ref)), columns(ref[key]), 1e-12)


@pytest.mark.parametrize("name", ["gredimwi", "gredimwi_2fibre"])
def test_diffusion_informed_gremwi_reference(shared, monkeypatch, name):
    """The other program's volume fraction is wrong; with it put in place of ours, all agrees."""
    ref = read(shared, name)
    params = named(ref)
    model = get_model("gremwi")(gremwi_scheme(ref), fibres=1 + ("ff2" in params), **DIFFUSION)
    assert set(model.parameter_names) == {"S0", "MWF", "R2sMW", "R2sIW", "dfreqBKG", "dpini"}
    # Parameters of both files were drawn alike; this one does not repeat IWF.
    inputs = {"iwf": named(read(shared, "gremwi"))["IWF"]}
    inputs |= {"theta1": params.get("theta", params.get("theta1"))}
    inputs |= {n: params[n] for n in ("theta2", "ff1", "ff2") if n in params}
    ours = model.signal(params, inputs)
    expected = columns(ref["signals"])
    assert 1e-3 < float((ours - expected).abs().max()) < 6e-3
    right = model._cylinders

    def wrong_volume(values, inputs):
        found = right(values, inputs).clone()
        mwf, iwf = values["MWF"], inputs["iwf"]
        axon = params["S0"] * (1 - mwf) * iwf
        rest, myelin = params["S0"] * (1 - mwf) * (1 - iwf), params["S0"] * mwf / model.rho
        share = axon / (axon + rest + myelin)
        found[:, 3] = share + myelin / (share + rest + myelin)
        return found

    monkeypatch.setattr(model, "_cylinders", wrong_volume)
    assert_near(model.signal(params, inputs), expected, 1e-12)


def test_volume_fraction_of_fibres():
    """Against the definition: volumes of axon, myelin and the rest."""
    model = make_model("gremwi", **DIFFUSION)
    mwf, iwf = torch.tensor(0.15), torch.tensor(0.7)
    axon, rest, myelin = 0.85 * 0.7, 0.85 * 0.3, 0.15 / (0.36 / 0.86)
    found = model._cylinders({"MWF": mwf}, {"iwf": iwf, "theta1": torch.tensor(1.0)})
    assert float(found[0, 3]) == pytest.approx((axon + myelin) / (axon + rest + myelin))


def test_every_diffusion_switch_acts_alone():
    plain = make_model("gremwi")
    params = draw(plain, 10, 5)
    for option, name in (
        ("fit_iwf", "IWF"),
        ("fit_freq_mw", "freqMW"),
        ("fit_freq_iw", "freqIW"),
        ("fit_r2s_ew", "R2sEW"),
    ):
        model = make_model("gremwi", **{option: False})
        assert set(plain.parameter_names) - set(model.parameter_names) == {name}
        needed = "iwf" if name == "IWF" else "theta1"
        assert model.needed_inputs(model.chosen) == (needed,) == model.voxel_inputs
        own = dict(params)
        inputs = {"theta1": torch.full((10,), 1.2, dtype=torch.float64)}
        share = hollow_cylinder.myelin_share((1 - own["MWF"]) * own["IWF"], own["MWF"] / model.rho)
        myelin, axon = hollow_cylinder.frequencies(share, torch.sin(inputs["theta1"]) ** 2)
        # what the switch derives, written into the model that fits it
        own |= {"freqMW": {"freqMW": myelin}, "freqIW": {"freqIW": axon}}.get(name, {})
        if name == "IWF":
            inputs = {"iwf": own["IWF"]}
        if name == "R2sEW":  # along the field nothing dephases
            inputs, own = {"theta1": torch.zeros(10)}, own | {"R2sEW": own["R2sIW"]}
        assert_near(model.signal(own, inputs), plain.signal(own), 1e-14)


def test_two_equal_fibres_are_one_and_shares_need_not_add_up():
    one, two = make_model("gremwi", **DIFFUSION), make_model("gremwi", fibres=2, **DIFFUSION)
    params = draw(one, 6, 6)
    zero = torch.zeros(6, dtype=torch.float64)
    theta, iwf = zero + 0.8, zero + 0.6
    alone = one.signal(params, {"theta1": theta, "iwf": iwf})
    for first, second in ((zero + 0.2, zero + 0.4), (zero + 0.3, zero), (zero, zero)):
        inputs = {"theta1": theta, "theta2": theta, "ff1": first, "ff2": second, "iwf": iwf}
        assert_near(two.signal(params, inputs), alone, 1e-14)
    apart = {"theta1": theta, "theta2": zero, "ff1": zero + 3, "ff2": zero, "iwf": iwf}
    assert_near(two.signal(params, apart), alone, 1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fibres": 2}, "also set one of fit_freq_mw, fit_freq_iw, fit_r2s_ew to False"),
        ({"fibres": 0}, "fibres must be a number from 1 to 9, got 0"),
        ({"rho": 0.0}, "rho must be a number from 0.01 to 1, got 0"),
        ({"signal": "real"}, "signal of gremwi is 'complex' or 'magnitude', got 'real'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(EngineError, match=message):
        make_model("gremwi", **options)


def test_maps_from_diffusion_are_asked_for():
    model = make_model("gremwi", fit_iwf=False, fit_r2s_ew=False)
    data = model.signal(draw(model, 4, 7)).numpy()
    iwf, theta = np.array([0.6, 0.0, 1.1, 0.6]), np.array([0.0, 0.5, 0.5, np.nan])
    with pytest.raises(EngineError, match="without the voxel inputs iwf, theta1: give a map"):
        fit(model, data)
    with pytest.raises(EngineError, match="without the voxel input theta1: give a map"):
        fit(model, data, inputs={"iwf": iwf})
    flags = fit(model, data, inputs={"iwf": iwf, "theta1": theta}).flags
    np.testing.assert_array_equal(flags & 4, [0, 0, 4, 4])


def test_rician_noise_is_for_magnitudes():
    model = make_model("gremwi")
    with pytest.raises(EngineError, match="Rician noise is that of magnitudes"):
        fit(model, np.ones((model.n_measurements, 2)), noise="rician", sigma=0.1)
    with pytest.raises(EngineError, match="needs field_strength"):
        get_model("r2star")(GradientEchoScheme(echo_time=[0.002, 0.004]), signal="complex")


# --- three pools, several flip angles ----------------------------------------------------------


def test_mcrmwi_reference_with_ideal_spoiling(shared):
    ref = read(shared, "mcrmwi")
    params = named(ref)
    model = get_model("mcrmwi")(scheme_of(ref), steady_state="ideal")
    assert set(params) - set(model.parameter_names) == {"b1"}
    signal = model.signal(params, {"b1": params["b1"]})
    assert_near(signal, columns(ref["signals_bm"]), 1e-10)


def test_mcrmwi_reference_without_exchange(shared):
    ref = read(shared, "mcrmwi")
    params = named(ref)
    options = {"steady_state": "ideal", "exchange": False}
    model = get_model("mcrmwi")(scheme_of(ref), signal="magnitude", **options)
    assert "kIEWM" not in model.parameter_names
    signal = model.signal(params, {"b1": params["b1"]})
    assert_near(signal, columns(ref["signals_bloch_noexchange_magnitude"]), 1e-10)
    # The complex branch, which is broken there, has the magnitude of the other one.
    both = get_model("mcrmwi")(scheme_of(ref), **options).signal(params, {"b1": params["b1"]})
    assert both.shape == (120, 50)
    assert_near(torch.hypot(both[:60], both[60:]), signal, 1e-12)


def test_mcrmwi_without_exchange_is_a_sum_of_ernst_signals():
    model = make_model("mcrmwi", steady_state="ideal", exchange=False)
    params, inputs = draw(model, 30, 8), draw_inputs(model, 30, 9)
    p = {k: v.numpy() for k, v in params.items()}
    scheme, expected = model.scheme, np.zeros((60, 30), complex)
    for m, (te, flip, tr) in enumerate(
        zip(scheme.echo_time, scheme.flip_angle, scheme.repetition_time, strict=True)
    ):
        angle = np.deg2rad(flip) * inputs["b1"].numpy()

        def ernst(r1, angle=angle, tr=tr):
            return np.sin(angle) * (1 - np.exp(-tr * r1)) / (1 - np.exp(-tr * r1) * np.cos(angle))

        def pool(rate, shift, te=te):
            return np.exp(-te * rate + 2j * np.pi * GAMMA * 3 * te * shift)

        water = p["IWF"] * pool(p["R2sIW"], p["freqIW"]) + (1 - p["IWF"]) * pool(p["R2sEW"], 0)
        both = p["MWF"] * ernst(1 / 0.234) * pool(p["R2sMW"], p["freqMW"])
        both = both + (1 - p["MWF"]) * ernst(p["R1IEW"]) * water
        background = p[f"dfreqBKG{1 + MCR_FLIPS.index(flip)}"]
        expected[m] = p["S0"] * both * pool(0, background) * np.exp(1j * p["dpini"])
    signal = model.signal(params, inputs).numpy()
    np.testing.assert_allclose(signal[:60] + 1j * signal[60:], expected, atol=1e-13)


def test_mcrmwi_equals_matrix_exponentials():
    """Two exchanging pools with ideal spoiling: relax, tip, until nothing changes."""
    model = make_model("mcrmwi", steady_state="ideal")
    params, inputs = draw(model, 8, 10), draw_inputs(model, 8, 11)
    state = model.magnetisation(params, inputs)[:, 0].numpy()
    for v in range(8):
        mwf, k = float(params["MWF"][v]), float(params["kIEWM"][v])
        volume = 1 - mwf + mwf / model.rho
        f = mwf / model.rho / volume
        r1 = float(params["R1IEW"][v])
        back = k * (1 - f) / f
        rates = np.array([[-r1 - k, back], [k, -1 / 0.234 - back]])
        relax, rest = scipy.linalg.expm(rates * 0.038), np.array([1 - f, f])
        for e, flip in enumerate(MCR_FLIPS):
            angle = np.deg2rad(flip) * float(inputs["b1"][v])
            along = rest
            for _ in range(3000):
                along = rest + relax @ (np.cos(angle) * along - rest)
            free, myelin = volume * np.sin(angle) * along
            np.testing.assert_allclose(state[:, e, v], [model.rho * myelin, free], atol=1e-12)


@pytest.mark.parametrize("name", ["mcrmwi", "mcrdimwi"])
def test_mcrmwi_reference_with_spoiling(shared, monkeypatch, name):
    """Networks of the other program, which leave out the phase of myelin water."""
    ref = read(shared, name)
    params = named(ref)

    def without_phase(**arguments):
        free, myelin = spoiled_steady_state(**arguments)
        return free, torch.complex(myelin.abs(), torch.zeros_like(myelin.abs()))

    options, inputs, key = {}, {"b1": params["b1"]}, "signals_bm_plus_ann"
    if name == "mcrdimwi":
        options, key = DIFFUSION | {"fit_iwf": True}, "signals"
        inputs["theta1"] = params["theta"]
    model = get_model("mcrmwi")(scheme_of(ref), steady_state="epgx", **options)
    expected = columns(ref[key])
    whole = model.signal(params, inputs)
    assert float((whole - expected).norm() / expected.norm()) < 1e-3
    monkeypatch.setattr(mcrmwi, "spoiled_steady_state", without_phase)
    signal = model.signal(params, inputs)
    assert float((signal - expected).abs().max()) < 5e-4
    assert float((signal - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "options"), [("gremwi", DIFFUSION), ("mcrmwi", {"steady_state": "ideal"})]
)
def test_compiled_jacobians_are_the_eager_ones(name, options):
    model = make_model(name, **options)
    params = {k: v.float() for k, v in draw(model, 64, 30).items()}
    inputs = {k: v.float() for k, v in draw_inputs(model, 64, 31).items()}
    with torch.no_grad():
        model.signal(params, inputs)  # fills the tables
        eager = model.jacobian(params, inputs)
        compiled = Compiled(model.jacobian)
        found_all = compiled(params, inputs)
    assert compiled.works
    for found, expected in zip(found_all, eager, strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < 2e-6


@pytest.mark.parametrize("steady_state", ["epgx", "surrogate"])
def test_derivatives_of_steady_states_with_spoiling(steady_state):
    model = make_model("mcrmwi", steady_state=steady_state)
    params, inputs = draw(model, 12, 12), draw_inputs(model, 12, 13)
    signal, jacobian = model.jacobian(params, inputs)
    forward_signal, forward = SignalModel.jacobian(model, params, inputs)
    torch.testing.assert_close(signal, forward_signal, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(jacobian, forward, rtol=1e-9, atol=1e-11)


def test_mcrmwi_names_a_background_for_each_excitation():
    scheme = GradientEchoScheme(
        echo_time=np.tile([0.003, 0.006, 0.009], 3),
        flip_angle=np.repeat([20, 5, 20], 3),
        repetition_time=np.repeat([0.05, 0.03, 0.03], 3),
        field_strength=3,
    )
    model = get_model("mcrmwi")(scheme, steady_state="ideal")
    backgrounds = [p for p in model.parameters if p.name.startswith("dfreqBKG")]
    assert [p.name for p in backgrounds] == ["dfreqBKG1", "dfreqBKG2", "dfreqBKG3"]
    assert [p.description.split(", ", 1)[1] for p in backgrounds] == [
        "flip angle 5 deg, TR 0.03 s",
        "flip angle 20 deg, TR 0.03 s",
        "flip angle 20 deg, TR 0.05 s",
    ]
    params = draw(model, 3, 14)
    moved = model.signal(params | {"dfreqBKG3": params["dfreqBKG3"] + 0.1})
    changed = ((moved - model.signal(params)).abs() > 1e-9).any(1)
    assert changed.tolist() == [True] * 3 + [False] * 6 + [True] * 3 + [False] * 6
    shared = get_model("mcrmwi")(scheme, steady_state="ideal", share_background=True)
    assert [n for n in shared.parameter_names if "BKG" in n] == ["dfreqBKG"]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"flip_angle": 20}, {}, "two different flip angles .* gremwi fits a single one"),
        ({}, {"t1_myelin": 0.0}, "t1_myelin must be a number from 0.01 to 5, got 0.0"),
        ({}, {"t1_myelin": 234.0}, "t1_myelin must be a number from 0.01 to 5, got 234.0"),
        (
            {"spoiling_increment": [50] * 8 + [117] * 8},
            {},
            "one increment of the RF phase for all images, got 50 to 117 degrees",
        ),
        ({"field_strength": None}, {}, "mcrmwi needs field_strength"),
    ],
)
def test_impossible_mcrmwi_is_refused(columns, options, message):
    given = {
        "echo_time": np.tile(0.002 * np.arange(1, 9), 2),
        "flip_angle": [5] * 8 + [20] * 8,
        "repetition_time": 0.03,
        "field_strength": 3,
    }
    scheme = GradientEchoScheme(**given | columns)
    with pytest.raises(EngineError, match=message):
        get_model("mcrmwi")(scheme, steady_state="ideal", **options)


def test_the_increment_of_the_acquisition_comes_first():
    scheme = make_model("mcrmwi", steady_state="epgx").scheme
    plain = get_model("mcrmwi")(scheme, steady_state="epgx")
    assert plain.increment == 50
    assert (
        get_model("mcrmwi")(scheme, steady_state="epgx", spoiling_increment=117.0).increment == 117
    )
    own = {k: v for k, v in scheme.columns().items() if v is not None}
    known = get_model("mcrmwi")(
        GradientEchoScheme(**own, spoiling_increment=117), steady_state="epgx"
    )
    assert known.increment == 117
    params = draw(plain, 5, 15)
    assert float((known.signal(params) - plain.signal(params)).abs().max()) > 1e-3


def test_the_surrogate_stands_in_for_the_simulation():
    exact, near = make_model("mcrmwi"), make_model("mcrmwi", steady_state="surrogate")
    assert exact.steady_state == "epgx"
    params, inputs = draw(exact, 300, 16), draw_inputs(exact, 300, 17)
    expected = exact.signal(params, inputs)
    error = near.signal(params, inputs) - expected
    assert float(error.norm() / expected.norm()) < 5e-4
    assert float(error.abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"repetition_time": 0.012}, {}, "a TR of 25 to 85 ms, not 12"),
        ({"flip_angle": [0.5] * 8 + [20] * 8}, {}, "flip angles of 1 to 110 degrees, not 0.5"),
        ({"spoiling_increment": 84}, {}, "increments of 50, 117, 150 degrees .* not 84"),
        ({}, {"t1_myelin": 0.7}, "a myelin T1 of 150 to 600 ms, not 700"),
        ({}, {"rho": 0.2}, "myelin fills up to 0.833 of the volume, but .* up to 0.72"),
    ],
)
def test_protocols_the_surrogate_does_not_know_are_refused(columns, options, message):
    given = {
        "echo_time": np.tile(0.002 * np.arange(1, 9), 2),
        "flip_angle": [5] * 8 + [20] * 8,
        "repetition_time": 0.03,
        "field_strength": 3,
    }
    scheme = GradientEchoScheme(**given | columns)
    with pytest.raises(EngineError, match=message + ".* Set steady_state='epgx'"):
        get_model("mcrmwi")(scheme, steady_state="surrogate", **options)
    get_model("mcrmwi")(scheme, **options)  # simulated as it is


def test_flip_angles_beyond_the_surrogate_make_a_voxel_unusable():
    model = make_model("mcrmwi", steady_state="surrogate")
    data = model.signal(draw(model, 3, 18)).numpy()
    flags = fit(model, data, inputs={"b1": np.array([0.1, 1.0, 1.6])}).flags  # 0.5, 112 degrees
    np.testing.assert_array_equal(flags & 4, [4, 0, 4])


# --- what a fit finds --------------------------------------------------------------------------


def tissue(model, n, seed):
    """White matter of a digital brain."""
    rng = np.random.default_rng(seed)
    boxes = {
        "S0": (0.8, 1.2),
        "MWF": (0.05, 0.2),
        "IWF": (0.5, 0.8),
        "R1IEW": (0.7, 1.1),
        "kIEWM": (1.0, 3.0),
        "R2sMW": (70, 120),
        "R2sIW": (11, 17),
        "R2sEW": (17, 25),
        "freqMW": (0, 0.1),
        "freqIW": (-0.025, 0),
        "dpini": (-0.1, 0.1),
    }
    return {
        name: torch.tensor(rng.uniform(*boxes.get(name, (-0.03, 0.03)), n))
        for name in model.parameter_names
    }


@pytest.mark.parametrize("options", [{}, {"signal": "magnitude"}, DIFFUSION])
def test_mcrmwi_without_noise_is_found_from_one_start(options):
    model = make_model("mcrmwi", **options)
    params, inputs = tissue(model, 60, 19), draw_inputs(model, 60, 20)
    data = model.signal(params, inputs).numpy()
    found = fit(
        model,
        data,
        inputs=inputs,
        precision="float64",
        options={"ftol": 0, "max_evaluations": 200},
    )
    # The share of voxels, as pools that differ by little are hardly told apart even without noise.
    right = np.abs(found.maps["MWF"] - params["MWF"].numpy()) < 1e-3
    assert right.mean() > 0.95
    assert np.median(np.abs(found.maps["MWF"] - params["MWF"].numpy())) < 1e-5


@pytest.mark.parametrize("prior", [None, "weak"])
def test_mcrmwi_at_snr_150(prior):
    """Bias of MWF, and standard deviations that are what they say."""
    model = make_model("mcrmwi")
    n = 200
    params, inputs = tissue(model, n, 21), draw_inputs(model, n, 22)
    first = np.hypot(*model.signal(params, inputs).numpy()[[0, 60]])
    data = noisy(model, params, first / 150, 23, inputs)
    found = fit(model, data, inputs=inputs, sigma=first / 150, prior=prior)
    error = found.maps["MWF"] - params["MWF"].numpy()
    assert abs(error.mean()) < 0.002
    assert np.sqrt((error**2).mean()) < 0.009
    assert 0.8 < np.nanmedian(np.abs(error / found.std["MWF"])) / 0.674 < 1.25
    assert np.median(found.chi2) == pytest.approx(1, abs=0.05)
    if prior:
        assert (found.flags & 8 > 0).mean() < 0.02


def test_mcrmwi_fits_no_worse_than_scipy():
    model = make_model("mcrmwi")
    n = 20
    params, inputs = tissue(model, n, 24), draw_inputs(model, n, 25)
    first = np.hypot(*model.signal(params, inputs).numpy()[[0, 60]])
    data = noisy(model, params, first / 150, 26, inputs)
    found = fit(model, data, inputs=inputs, options={"max_evaluations": 200, "ftol": 1e-8})
    low, high = np.array([p.bounds for p in model.parameters]).T
    scale = np.array([1.0 if p.amplitude else p.start[1] - p.start[0] for p in model.parameters])
    for v in range(n):
        b1 = {"b1": inputs["b1"][v : v + 1]}

        def residual(x, v=v, b1=b1):
            values = torch.tensor(x * scale)[:, None]
            named = dict(zip(model.parameter_names, values, strict=True))
            return model.signal(named, b1)[:, 0].numpy() - data[:, v]

        def slopes(x, b1=b1):
            values = torch.tensor(x * scale)[:, None]
            named = dict(zip(model.parameter_names, values, strict=True))
            return model.jacobian(named, b1)[1][:, :, 0].numpy().T * scale

        start = {
            k: float(x[0]) for k, x in model.guess(torch.tensor(data[:, v : v + 1]), b1).items()
        }
        begin = np.array([start.get(name, 1.0) for name in model.parameter_names])
        begin = np.clip(begin, low + 1e-6, np.minimum(high, 1e6) - 1e-6)
        theirs = scipy.optimize.least_squares(
            residual, begin / scale, slopes, bounds=(low / scale, high / scale), max_nfev=200
        )
        ours = np.array([found.maps[name][v] for name in model.parameter_names])
        excess = (residual(ours / scale) ** 2).sum() - 2 * theirs.cost
        assert excess * (150 / float(first[v])) ** 2 < 0.05  # of chi^2: no step left to take


def test_gremwi_at_snr_150_with_a_prior():
    """One flip angle alone tells little of a voxel, so that a prior is needed."""
    model = make_model("gremwi", **DIFFUSION)
    n = 300
    params, inputs = tissue(model, n, 27), draw_inputs(model, n, 28)
    sd = params["S0"].numpy() / 150
    found = fit(model, noisy(model, params, sd, 29, inputs), inputs=inputs, sigma=sd, prior="weak")
    error = found.maps["MWF"] - params["MWF"].numpy()
    assert abs(error.mean()) < 0.01
    assert np.sqrt((error**2).mean()) < 0.03
    assert (found.flags & 8 > 0).mean() < 0.02
