"""The entry point: flags, noise levels, coverage, blocks and what it refuses."""

import json

import numpy as np
import pytest
import scipy.stats
import torch

from bids_gacelle.bids.names import FLAGS
from bids_gacelle.engine import (
    FLAG_NAMES,
    TV,
    DiffusionScheme,
    EngineError,
    GradientEchoScheme,
    fit,
    get_model,
)
from bids_gacelle.engine.device import resolve_device
from bids_gacelle.engine.kernels import packed
from bids_gacelle.engine.uncertainty import _inverse

from .helpers import ALL_MODELS, Line, draw, draw_inputs, make_model, noisy


def tissue(n, seed):
    rng = np.random.default_rng(seed)
    return {
        "S0": torch.tensor(rng.uniform(300, 900, n)),
        "R2star": torch.tensor(rng.uniform(12, 50, n)),
    }


def test_result_is_on_the_grid_with_flags_outside_the_mask():
    model = make_model("r2star")
    data = noisy(model, tissue(24, 1), 3.0, 2).reshape(8, 2, 3, 4)
    mask = np.zeros((2, 3, 4), bool)
    mask[0, 1:, :] = True
    result = fit(model, data, mask=mask)
    whole = fit(model, torch.tensor(data))
    for name in ("S0", "R2star", "T2star"):
        assert result.maps[name].shape == result.std[name].shape == (2, 3, 4)
        assert result.maps[name].dtype == result.std[name].dtype == np.float32
        assert np.isnan(result.maps[name][~mask]).all()
        np.testing.assert_array_equal(result.maps[name][mask], whole.maps[name][mask])
    np.testing.assert_array_equal(result.flags, np.where(mask, 0, 1))
    assert result.flags.dtype == np.uint8
    assert np.isnan(result.nrmse[~mask]).all()
    assert (result.nrmse[mask] < 0.05).all()
    np.testing.assert_allclose(
        1 / result.maps["T2star"][mask], result.maps["R2star"][mask], rtol=1e-6
    )
    assert result.settings["n_voxels"] == 8


def test_one_voxel_without_a_grid():
    model = make_model("r2star")
    data = model.signal({"S0": torch.tensor(500.0), "R2star": torch.tensor(20.0)})
    result = fit(model, data)
    assert result.maps["R2star"].shape == ()
    assert float(result.maps["R2star"]) == pytest.approx(20, rel=1e-5)


def test_settings_and_trace_are_plain_data():
    model = make_model("nexi")
    data = noisy(model, draw(model, 20, 3), 0.01, 4)
    result = fit(model, data, sigma=0.01, prior="weak")
    again = json.loads(json.dumps([result.settings, result.trace]))
    assert again == [result.settings, result.trace]
    settings = result.settings
    assert settings["solver"] == "lm"
    assert settings["device"] in ("cpu", "cuda:0")
    assert settings["sigma"] == "given"
    assert settings["starts"] == 4
    assert settings["degrees_of_freedom"] == 11
    assert set(settings["at_bound"]) == set(model.parameter_names)
    assert settings["prior"]["tex"]["coordinate"] == "log"
    assert settings["prior"]["tex"]["mean"] == pytest.approx(np.log(200) / 2)
    assert sum(result.trace["evaluations"]) == 20
    assert sum(result.trace["winning_start"]) == 20


def test_bad_voxels_are_flagged_and_leave_the_others_alone():
    model = make_model("r2star")
    data = noisy(model, tissue(12, 5), 3.0, 6)
    clean = fit(model, data)
    bad = data.copy()
    bad[2, 0] = np.nan
    bad[7, 1] = np.inf
    bad[:, 2] = 0
    bad[:, 3] *= -1
    bad[0, 4] = 0
    sigma = np.full(12, 3.0)
    sigma[5], sigma[6] = 0, np.nan
    result = fit(model, bad)
    assert (result.flags[:5] == 4).all()
    assert np.isnan(result.maps["R2star"][:5]).all()
    assert np.isnan(result.std["S0"][:5]).all()
    np.testing.assert_array_equal(result.maps["R2star"][5:], clean.maps["R2star"][5:])
    assert (fit(model, data, sigma=sigma).flags == [0, 0, 0, 0, 0, 4, 4, 0, 0, 0, 0, 0]).all()


def test_weights_too_small_for_single_precision_are_none():
    model = make_model("r2star")
    data = noisy(model, draw(model, 20, 1), 0.02, 2)
    weights = np.ones(data.shape)
    weights[2] = 0
    without = fit(model, data, weights=weights)
    weights[2] = 1e-30
    np.testing.assert_array_equal(fit(model, data, weights=weights).maps["S0"], without.maps["S0"])
    assert (fit(model, data, weights=1e-30 * weights).flags == 4).all()


def test_what_a_masked_array_hides_is_not_fitted():
    model = make_model("r2star")
    data = noisy(model, draw(model, 4, 1), 0.02, 2)
    hidden = np.zeros(data.shape, bool)
    hidden[3, 1] = hidden[:, 2] = True
    plain = fit(model, data)
    for kind in (float, "f4", int):
        scaled = (1000 * data).astype(kind)
        scaled[hidden] = -9999
        result = fit(model, np.ma.masked_array(scaled, hidden))
        assert (result.flags & 4 > 0).tolist() == [False, True, True, False]
        np.testing.assert_allclose(
            result.maps["R2star"][[0, 3]], plain.maps["R2star"][[0, 3]], rtol=0.02
        )


def test_arrays_of_other_kinds():
    model = make_model("r2star")
    data = noisy(model, draw(model, 4, 1), 0.02, 2)
    mask = np.array([True, True, False, True])
    plain = fit(model, data, mask=mask).maps["R2star"]
    weights = np.ma.masked_array(np.ones(data.shape), np.broadcast_to(~mask, data.shape))
    for arguments in (
        {"data": data.astype(object), "mask": mask.astype(object)},
        {"weights": weights},
        {"mask": np.ma.masked_array(np.ones(4, bool), ~mask)},
        {"seed": np.array(0), "device": np.array(["cpu"])},
    ):
        result = fit(model, **{"data": data, "mask": mask} | arguments)
        np.testing.assert_array_equal(result.maps["R2star"], plain)
    with pytest.raises(EngineError, match="fits real data"):
        fit(model, np.ma.masked_array(data * 1j))


def test_a_negative_sample_is_noise_not_a_bad_voxel():
    model = get_model("mcmicro")(DiffusionScheme(b=[0.5, 1, 2, 4, 8]))
    truth = {"fn": torch.tensor([0.2]), "d": torch.tensor([2.5])}
    data = model.signal(truth).double().numpy()
    data[-1] = -0.01
    result = fit(model, data, sigma=0.02)
    assert int(result.flags[0]) & 4 == 0
    assert float(result.maps["fn"][0]) == pytest.approx(0.2, abs=0.1)


def test_all_voxels_bad_is_no_error():
    model = make_model("r2star")
    calls = []
    result = fit(model, np.full((8, 5), np.nan), progress=calls.append)
    assert (result.flags == 4).all()
    assert (calls[-1].done, calls[-1].total) == (5, 5)
    assert result.settings["at_bound"] == {"S0": 0.0, "R2star": 0.0}


def test_bad_voxel_inputs_are_flagged():
    model = make_model("despot1")
    params = draw(model, 4, 7)
    inputs = {"b1": torch.tensor([1.0, 0.0, np.nan, 0.9]).double()}
    data = noisy(model, params, 0.0, 8, {"b1": torch.tensor([1.0, 1, 1, 0.9]).double()})
    result = fit(model, data, inputs=inputs, sigma=0.001)
    np.testing.assert_array_equal(result.flags, [0, 4, 4, 0])
    np.testing.assert_allclose(result.maps["R1"][[0, 3]], params["R1"][[0, 3]], rtol=1e-4)


def test_at_a_bound_there_is_no_interval_and_the_rest_is_conditional():
    model = make_model("mcmicro")
    # More signal at the highest b than any stick can leave pushes fn to 1.
    ones = torch.ones(30).double()
    data = noisy(model, {"fn": ones, "d": 1.2 * ones}, 0.002, 9)
    data[-1] += 0.05
    result = fit(model, data, sigma=0.002)
    assert (result.flags & 2 > 0).all()
    assert (result.maps["fn"] == 1).all()
    assert np.isnan(result.std["fn"]).all()
    assert result.settings["at_bound"] == {"fn": 1.0, "d": 0.0}
    d = torch.tensor(result.maps["d"]).double()
    slope = model.jacobian({"fn": ones, "d": d})[1][1]
    np.testing.assert_allclose(result.std["d"], 0.002 / (slope**2).sum(0).sqrt(), rtol=1e-4)


def test_derived_quantities_of_a_parameter_at_its_bound_have_no_deviation():
    """A rate that follows from a time at its bound is not known better than that time."""
    model = make_model("nexi")
    data = noisy(model, draw(model, 200, 10), 1 / 50, 11)
    result = fit(model, data, sigma=0.02)
    at_bound, free = np.isnan(result.std["tex"]), np.isfinite(result.std["fn"])
    assert (at_bound & free).sum() > 5
    assert np.isnan(result.std["rn"][at_bound]).all()
    assert np.isfinite(result.std["rn"][~at_bound & free]).all()


def test_what_the_signal_does_not_determine_leaves_the_other_deviations():
    """Without neurites their diffusivity is anything, and the soma is known as well as before."""
    model = make_model("sandi")
    data = noisy(model, draw(model, 300, 14) | {"fin": torch.zeros(300).double()}, 0.005, 15)
    result = fit(model, data, sigma=0.005)
    inside = (result.maps["fin"] == 0) & (result.maps["fs"] > 0.1) & (result.maps["fs"] < 0.9)
    assert inside.sum() > 50
    assert np.isnan(result.std["dn"][inside]).all()
    assert np.isfinite(result.std["fs"][inside]).mean() > 0.95


def test_inverse_of_what_is_partly_determined():
    rng = np.random.default_rng(16)
    slopes = rng.normal(size=(100, 9, 6)) * [1, 1e3, 1e-3, 1, 1, 1]
    slopes[..., 3] = slopes[..., 1] - 2e5 * slopes[..., 2]  # can make up for these two
    slopes[:50, :, 4] = 0  # has no influence
    free = torch.ones(6, 100, dtype=torch.float64)
    free[5, 20:80] = 0
    full = torch.tensor(slopes.transpose(0, 2, 1) @ slopes).permute(1, 2, 0)
    inverse, undetermined = _inverse([full[i, j] for i, j in packed(6)], list(free))
    expected = [[False, True, True, True, no_influence, False] for no_influence in (True, False)]
    np.testing.assert_array_equal(undetermined.T, np.repeat(expected, 50, axis=0))
    for v in range(100):
        alone = [0, 1, 2, *([4] if v >= 50 else []), *([] if 20 <= v < 80 else [5])]
        wanted = np.linalg.inv(full[alone][:, alone][..., v].numpy())
        kept = [i for i in alone if i not in (1, 2)]
        places = [alone.index(i) for i in kept]
        got = inverse[kept][:, kept][..., v]
        np.testing.assert_allclose(got, wanted[places][:, places], rtol=1e-6, atol=1e-9)


def test_as_many_parameters_as_measurements_leave_no_interval():
    model = get_model("r2star")(GradientEchoScheme(echo_time=[0.004, 0.012]))
    data = noisy(model, tissue(10, 12), 2.0, 13)
    result = fit(model, data)
    assert np.isnan(result.std["R2star"]).all()
    assert "no more measurements than parameters" in result.settings["note"]
    np.testing.assert_allclose(result.maps["R2star"], np.log(data[0] / data[1]) / 0.008, rtol=1e-3)
    given = fit(model, data, sigma=2.0)
    assert np.isfinite(given.std["R2star"]).all()
    assert "note" not in given.settings
    with pytest.raises(EngineError, match="give sigma"):
        fit(model, data, prior="weak")


@pytest.mark.parametrize("degrees", [1, 2, 3, 4])
def test_few_degrees_of_freedom_are_told_with_their_interval(degrees):
    model = Line.of(np.arange(1, 3 + degrees) / 10)
    data = np.random.default_rng(0).normal(size=(2 + degrees, 3))
    note = fit(model, data).settings.get("note", "")
    assert (f"minus {scipy.stats.t.ppf(0.975, degrees):.2f} (not 1.96)" in note) == (degrees < 4)
    assert "note" not in fit(model, data, sigma=1.0).settings


def test_flags_are_named_as_in_the_files():
    assert {bit: name for bit, name in FLAGS.items() if bit} == FLAG_NAMES


def test_maps_are_empty_where_a_derived_quantity_does_not_exist():
    model = make_model("r2star")
    data = np.linspace(1, 1.3, 8)[:, None] * np.ones(3)  # grows: R2* at its bound of 0
    result = fit(model, data)
    assert (result.maps["R2star"] == 0).all()
    assert (result.flags & 2 > 0).all()
    assert np.isnan(result.maps["T2star"]).all()


@pytest.mark.parametrize("name", ["r2star", "despot1"])
@pytest.mark.parametrize("given", [True, False])
def test_95_percent_intervals_cover_95_percent(name, given):
    model = make_model(name)
    n = 12_000
    rng = np.random.default_rng(14)
    if name == "r2star":
        params = tissue(n, 15)
        sd = params["S0"].numpy() / 50
    else:
        m0 = rng.uniform(500, 1500, n)
        params = {"M0": torch.tensor(m0), "R1": torch.tensor(rng.uniform(0.4, 2.0, n))}
        sd = 0.05 * m0 / 50
    inputs = draw_inputs(model, n, 16)
    data = noisy(model, params, sd, 17, inputs)
    maps = {k: v.numpy() for k, v in inputs.items()}
    result = fit(model, data, sigma=sd if given else None, inputs=maps)
    freedom = np.inf if given else result.settings["degrees_of_freedom"]
    width = scipy.stats.t.ppf(0.975, freedom)
    derived = model.derive(params)
    for key, truth in (params | derived).items():
        free = np.isfinite(result.std[key])
        assert free.mean() > 0.99
        inside = np.abs(result.maps[key] - truth.numpy()) < width * result.std[key]
        assert 0.93 < inside[free].mean() < 0.97, key


def test_linear_despot1_is_the_regression_and_covers():
    model = make_model("despot1")
    n = 6000
    rng = np.random.default_rng(18)
    params = {"M0": torch.full((n,), 800.0).double(), "R1": torch.tensor(rng.uniform(0.5, 1.5, n))}
    inputs = draw_inputs(model, n, 19)
    data = noisy(model, params, 0.2, 20, inputs)
    b1 = inputs["b1"].numpy()
    result = fit(model, data, inputs={"b1": b1}, solver="linear", sigma=0.2)
    angle = np.deg2rad(model.scheme.flip_angle)[:, None] * b1
    for i in range(0, n, 1000):
        slope, intercept = np.polyfit(
            data[:, i] / np.tan(angle[:, i]), data[:, i] / np.sin(angle[:, i]), 1
        )
        assert result.maps["T1"][i] == pytest.approx(-0.02 / np.log(slope), rel=1e-6)
        assert result.maps["M0"][i] == pytest.approx(intercept / (1 - slope), rel=1e-6)
    inside = np.abs(result.maps["R1"] - params["R1"].numpy()) < 1.96 * result.std["R1"]
    assert 0.93 < inside.mean() < 0.97
    assert result.settings["solver"] == "linear"


def test_linear_despot1_without_a_solution_is_flagged():
    model = make_model("despot1")
    data = noisy(model, draw(model, 3, 21), 0.0, 22)
    data[:, 1] = data[0, 1] * np.arange(1, 6) ** 2  # no T1 gives this
    result = fit(model, data, solver="linear")
    assert result.flags[1] & 8
    assert np.isnan(result.maps["T1"][1])
    assert (result.flags[[0, 2]] == 0).all()


def test_nonlinear_despot1_of_exact_data_equals_the_linear_one():
    model = make_model("despot1")
    params = draw(model, 100, 23)
    data = noisy(model, params, 0.0, 24)
    both = [fit(model, data, solver=s, precision="float64") for s in ("lm", "linear")]
    np.testing.assert_allclose(both[0].maps["T1"], both[1].maps["T1"], rtol=1e-5)
    np.testing.assert_allclose(both[1].maps["R1"], params["R1"], rtol=1e-6)


def test_prior_draws_estimates_in_and_lowers_their_error():
    model = make_model("nexi")
    params = draw(model, 300, 25)
    data = noisy(model, params, 1 / 50, 26)
    free, drawn = fit(model, data, sigma=0.02), fit(model, data, sigma=0.02, prior="weak")
    for name in ("fn", "dn", "de"):
        error = [
            np.sqrt(np.nanmean((r.maps[name] - params[name].numpy()) ** 2)) for r in (free, drawn)
        ]
        assert error[1] < 0.7 * error[0]
    assert sum(drawn.settings["at_bound"].values()) < sum(free.settings["at_bound"].values()) / 3
    # Without sigma each voxel's own residuals set the weight of the prior.
    residual = fit(model, data, prior="weak")
    difference = np.abs(residual.maps["fn"] - drawn.maps["fn"])
    assert np.nanmedian(difference) < 0.02
    assert residual.settings["sigma"] == "residual"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "simplex"}, "no solver 'simplex'; known are lm, adam"),
        ({"solver": "linear"}, "line has no closed-form estimate"),
        ({"noise": "poisson"}, "'poisson' is unknown; there are gaussian, rician"),
        ({"loss": "l3"}, "'l3' is unknown; there are l2, l1, huber"),
        ({"prior": "strong"}, "'strong' is unknown"),
        ({"prior": {"slope": (0, 1)}}, "names 'slope', which line does not fit"),
        ({"prior": {"offset": (0, 0)}}, "sd positive"),
        ({"precision": "half"}, "'half' is unknown"),
        ({"device": "tpu"}, "'tpu' is unknown"),
        ({"device": "cuda:99"}, "asked for but .*use 'auto' or 'cpu'"),
        ({"mask": np.ones(5)}, r"mask has shape \(5,\).*grid \(4,\)"),
        ({"sigma": -1.0}, "must be a positive number"),
        ({"sigma": np.ones(3)}, r"sigma has shape \(3,\)"),
        ({"weights": np.ones(3)}, r"weights have shape \(3,\)"),
        ({"weights": [1, 1, -1, 1, 1]}, "negative"),
        ({"prior": {"offset": (np.zeros(3), 1.0)}}, r"shape \(3,\).*grid \(4,\)"),
        ({"inputs": {"b1": np.ones(4)}}, "no voxel input 'b1'; it has none"),
        ({"prior": {"offset": 3}}, r"it must be \(mean, sd\)"),
        ({"starts": 0}, "at least 1"),
        ({"starts": "many"}, "whole number and at least 1, got 'many'"),
        ({"starts": 1.5}, "whole number and at least 1, got 1.5"),
        ({"starts": True}, "whole number and at least 1, got True"),
        ({"scale_sigma": np.ones((1, 4))}, "needed together"),
        ({"scale_group": [0] * 5}, "needed together"),
        ({"scale_sigma": np.ones((1, 3)), "scale_group": [0] * 5}, r"has shape \(1, 3\)"),
        ({"scale_sigma": np.ones((1, 4)), "scale_group": [0] * 4}, "must be 5 whole numbers"),
        ({"scale_sigma": np.ones((1, 4)), "scale_group": [0.5] * 5}, "must be 5 whole numbers"),
        ({"scale_sigma": np.ones((1, 4)), "scale_group": [0, 0, 0, 0, 1]}, "the groups 0 to 0"),
        ({"block_size": 0}, "block_size must be positive"),
        ({"memory_limit": 0}, "memory_limit must be positive"),
        ({"memory_limit": 1000}, r"memory_limit is 0 MB, .* needs at least \d+ MB"),
        ({"device": []}, "list of devices is empty"),
        ({"options": {"tolerance": 1}}, "no option 'tolerance'; known are .*ftol"),
        ({"options": {"dictionary": 4}, "starts": 5}, "4 entries cannot give 5 starts"),
        ({"data": np.ones((3, 4))}, "expects 5 measurements"),
        ({"data": np.ones((5, 4), complex)}, "fits real data"),
        ({"data": np.full((5, 4), "a")}, "fits real data"),
        ({"data": [[1, 2], [3]]}, "cannot be read as an array of numbers"),
        ({"data": torch.ones(5, 4).to_sparse()}, "cannot be read as an array of numbers"),
        ({"mask": [[True], [True, False]]}, "cannot be read as an array of numbers"),
        ({"mask": ["a"] * 4}, "mask must hold real numbers, got <U1"),
        ({"weights": np.ones(5) * 1j}, "weights must hold real numbers, got complex128"),
        ({"inputs": [1]}, r"inputs is \[1\]; give"),
        ({"solver": ["lm"]}, r"no solver \['lm'\]"),
        ({"precision": []}, r"Precision \[\] is unknown"),
        ({"device": None}, "device is None; give a name"),
        ({"seed": "a"}, "seed must be a whole number of at most 63 bits, got 'a'"),
        ({"seed": 2**70}, "seed must be a whole number"),
        ({"progress": True}, "progress must be a function"),
        ({"options": {1: 2, "a": 1}}, "no option 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    model = Line.of([0.1, 0.2, 0.3, 0.4, 0.5])
    data = arguments.pop("data", np.ones((5, 4)))
    with pytest.raises(EngineError, match=message):
        fit(model, data, **arguments)


def test_other_refusals():
    with pytest.raises(EngineError, match="S0 is an amplitude and takes no prior"):
        fit(make_model("r2star"), np.ones((8, 2)), prior={"S0": (1, 1)})
    with pytest.raises(EngineError, match="takes no prior"):
        fit(make_model("despot1"), np.ones((5, 2)), solver="linear", prior="weak")
    with pytest.raises(EngineError, match="Voxel input b1 has shape"):
        fit(make_model("despot1"), np.ones((5, 2)), inputs={"b1": np.ones(3)})
    scheme = GradientEchoScheme(flip_angle=[5, 15, 25], repetition_time=[0.02, 0.02, 0.03])
    with pytest.raises(EngineError, match=r"one repetition time .*0\.02 to 0\.03 s"):
        fit(get_model("despot1")(scheme), np.ones((3, 2)), solver="linear")


def test_device_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "chosen"), ALL_MODELS)
def test_gpu_and_cpu_differ_no_more_than_rounding_does(name, chosen):
    """Where many optima are as good, 1e-14 of the data decides on one processor, too."""
    model, n = make_model(name, **chosen), 1000
    params, inputs = draw(model, n, 29), draw_inputs(model, n, 30)
    data = noisy(model, params, 0.005, 31, inputs)
    rounded = data * (1 + 1e-14 * np.random.default_rng(1).normal(size=data.shape))
    inputs = {k: v.numpy() for k, v in inputs.items()}
    options = {"ftol": 1e-10, "xtol": 1e-8, "max_evaluations": 200}
    cpu, again, gpu, small = (
        fit(
            model,
            values,
            inputs=inputs,
            scale_sigma=np.full((1, n), 0.01),
            scale_group=np.zeros(model.n_measurements, int),
            device=d,
            precision="float64",
            options=options,
            block_size=b,
        )
        for values, d, b in (
            (data, "cpu", None),
            (rounded, "cpu", None),
            (data, "cuda", None),
            (data, "cuda", 300),
        )
    )
    worse, by_rounding = (x.nrmse > 1.001 * cpu.nrmse + 1e-9 for x in (gpu, again))
    assert worse.mean() < by_rounding.mean() + 0.05
    for key in model.parameter_names:
        np.testing.assert_array_equal(gpu.maps[key], small.maps[key])
        limit = 1e-4 * np.nanquantile(np.abs(cpu.maps[key]), 0.9)
        close, rounding = (np.abs(x.maps[key] - cpu.maps[key]) < limit for x in (gpu, again))
        assert close.mean() > (0.98 if rounding.mean() > 0.98 else rounding.mean() - 0.05)
        known = close & np.isfinite(cpu.std[key])
        if known.any():
            ratio = gpu.std[key][known] / cpu.std[key][known]
            assert np.isfinite(ratio).mean() > 0.98
            assert np.nanmedian(ratio) == pytest.approx(1, abs=0.02)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", ["lm", "adam"])
def test_total_variation_is_the_same_on_a_gpu(solver):
    model, grid = make_model("mcmicro"), (12, 10, 4)
    data = noisy(model, draw(model, 480, 33), 0.01, 34).reshape(-1, *grid)
    told = {"sigma": 0.01, "solver": solver, "precision": "float64", "seed": 1}
    told["regularise"] = TV(["fn"], weight=0.05, mode="3d")
    cpu, gpu = (fit(model, data, device=d, **told).maps["fn"] for d in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu, cpu, atol=1e-3)


def test_reduced_chi_square_tells_whether_the_noise_level_describes_the_residuals():
    model = make_model("mcmicro")
    params = draw(model, 4000, 31)
    data = noisy(model, params, 0.01, 32)
    right = fit(model, data, sigma=0.01).chi2
    assert right.mean() == pytest.approx(1, abs=0.05)
    # A sum of squares of four normal numbers over four: its variance is 2 / 4.
    assert right.var() == pytest.approx(0.5, rel=0.15)
    rows = np.full(data.shape, 0.02)
    np.testing.assert_allclose(fit(model, data, sigma=rows).chi2, right / 4, rtol=1e-3)
    assert fit(model, data).chi2 is None


@pytest.mark.parametrize("route", ["sigma", "weights"])
def test_a_measurement_left_out_counts_nowhere(route):
    """Against the fit of an acquisition without it: maps, noise level, NRMSE, chi-square."""
    time, left = np.arange(1, 9) * 0.2, np.array([2, 5])
    data = (0.7 + np.log(1.8) * time)[:, None] + 0.05 * np.random.default_rng(1).normal(
        size=(8, 30)
    )
    kept = np.delete(np.arange(8), left)
    told = {"precision": "float64", "prior": {"offset": (0.5, 1.0)}}
    spoilt, weights, sigma = data.copy(), np.ones(8), np.full(data.shape, 0.05)
    spoilt[left], weights[left], sigma[left] = 40.0, 0, np.inf
    if route == "sigma":
        result = fit(Line.of(time), spoilt, sigma=sigma, **told)
        expected = fit(Line.of(time[kept]), data[kept], sigma=0.05, **told)
        np.testing.assert_allclose(result.chi2, expected.chi2, rtol=1e-5)
    else:
        result = fit(Line.of(time), spoilt, weights=weights, **told)
        expected = fit(Line.of(time[kept]), data[kept], **told)
    for name in expected.maps:
        np.testing.assert_allclose(result.maps[name], expected.maps[name], rtol=1e-5)
        np.testing.assert_allclose(result.std[name], expected.std[name], rtol=1e-5)
    np.testing.assert_allclose(result.nrmse, expected.nrmse, rtol=1e-5)
