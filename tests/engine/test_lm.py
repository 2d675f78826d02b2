"""Levenberg-Marquardt against scipy, closed forms and the conditions of an optimum."""

import numpy as np
import pytest
import scipy.optimize
import torch

from bids_gacelle.engine import fit
from bids_gacelle.engine.kernels import Kernel, Voxels, unpack
from bids_gacelle.engine.objective import Objective
from bids_gacelle.engine.solvers import Problem
from bids_gacelle.engine.solvers.lm import LmSettings, minimise

from .helpers import Line, Square, draw, draw_inputs, make_model, noisy

TIGHT = {"ftol": 1e-10, "xtol": 1e-8, "max_evaluations": 300}


def scipy_fit(model, data, start, scale=None):
    """Fit one voxel by scipy's trust-region solver with two-point derivatives."""
    low, high = (np.array([p.bounds[k] for p in model.parameters]) for k in (0, 1))

    def residual(x):
        params = {n: torch.tensor([v]) for n, v in zip(model.parameter_names, x, strict=True)}
        return model.signal(params).numpy()[:, 0] - data

    found = scipy.optimize.least_squares(
        residual, np.clip(start, low, high), bounds=(low, high), x_scale=scale or "jac",
        ftol=1e-12, xtol=1e-12, gtol=1e-12, max_nfev=400,
    )  # fmt: skip
    return found.x, 2 * found.cost


def squares(model, maps, data):
    params = {k: torch.tensor(maps[k].astype(np.float64)) for k in model.parameter_names}
    return ((model.signal(params).numpy() - data) ** 2).sum(0)


def test_r2star_agrees_with_scipy():
    model = make_model("r2star")
    params = draw(model, 60, 1)
    params = {"S0": 1000 * params["S0"], "R2star": 10 + 0.2 * params["R2star"]}
    data = noisy(model, params, params["S0"].numpy() / 60, 2)
    result = fit(model, data)
    reference = [scipy_fit(model, y, [y.max(), 25.0]) for y in data.T]
    r2star = np.array([x[1] for x, _ in reference])
    assert np.median(np.abs(result.maps["R2star"] / r2star - 1)) < 1e-4
    cost = np.array([c for _, c in reference])
    assert (squares(model, result.maps, data) < cost * (1 + 1e-4)).all()


@pytest.mark.parametrize(("name", "snr"), [("mcmicro", 100), ("nexi", 50)])
def test_cost_is_that_of_scipy_or_lower(name, snr):
    model = make_model(name)
    params = draw(model, 40, 3)
    data = noisy(model, params, 1 / snr, 4)
    data = data[:, data[0] > 0]
    result = fit(model, data)
    start = [np.mean(p.start) for p in model.parameters]
    cost = np.array([scipy_fit(model, y, start)[1] for y in data.T])
    gap = (squares(model, result.maps, data) - cost) * snr**2
    assert np.median(gap) < 1e-3
    assert (gap < 0.1).mean() > 0.95


def test_optimum_satisfies_the_conditions_at_bounds():
    model = make_model("nexi", l_max=2)
    data = noisy(model, draw(model, 400, 5), 1 / 50, 6)
    data = data[:, data[0] > 0]
    result = fit(model, data, precision="float64", starts=2, options=TIGHT)
    kernel = Kernel(model, Objective(), torch.float64, torch.device("cpu"))
    params = {k: torch.tensor(result.maps[k].astype(np.float64)) for k in model.parameter_names}
    position = kernel.coordinates(params)
    equations = kernel.normal_equations(position, Voxels(torch.tensor(data)))
    # The decrease a parameter could still bring on its own, as a share of the cost.
    slope = equations.gradient
    curvature = torch.diagonal(unpack(equations.hessian)).T.clamp_min(1e-12)
    gain = slope**2 / (2 * curvature * equations.cost)
    at_low, at_high = position <= kernel.lower + 1e-6, position >= kernel.upper - 1e-6
    pushed_out = (at_low & (slope > 0)) | (at_high & (slope < 0))
    converged = torch.tensor((result.flags & 8) == 0)
    assert float(converged.double().mean()) > 0.98
    assert float(((at_low | at_high).any(0)).double().mean()) > 0.3  # bounds are really met
    # Maps are stored in single precision, which limits the slope that can be read off them.
    assert float(torch.where(pushed_out, 0.0, gain)[:, converged].max()) < 1e-8


@pytest.mark.parametrize("name", ["r2star", "nexi"])
def test_restart_at_the_optimum_stays_there(name):
    model = make_model(name)
    data = torch.tensor(noisy(model, draw(model, 300, 7), 0.01, 8))
    kernel = Kernel(model, Objective(), torch.float64, torch.device("cpu"))
    voxels = Voxels(data)
    problem = Problem(kernel, voxels, kernel, voxels, LmSettings(**TIGHT))
    boxes = [sum(box) / 2 if box[1] == box[1] else 1.0 for box in kernel.box]
    start = torch.tensor(boxes, dtype=torch.float64)[:, None].repeat(1, 300)
    first = minimise(problem, start)
    again = minimise(problem, first.position)
    stays = (again.position - first.position).abs() / kernel.width.nan_to_num(1.0)
    assert float(stays.amax(0)[first.converged].quantile(0.99)) < 1e-3
    assert float(again.evaluations.double().mean()) < 3.5
    before, after = (kernel.normal_equations(e.position, voxels).cost for e in (first, again))
    assert bool((after <= before * (1 + 1e-12)).all())


def test_cost_never_increases():
    model = make_model("nexi")
    data = torch.tensor(noisy(model, draw(model, 200, 9), 0.02, 10))
    kernel = Kernel(model, Objective(), torch.float64, torch.device("cpu"))
    voxels = Voxels(data)
    start = torch.tensor([(a + b) / 2 for a, b in kernel.box])[:, None].double().repeat(1, 200)
    before = kernel.normal_equations(start, voxels).cost
    for evaluations in range(1, 12):
        settings = LmSettings(max_evaluations=evaluations)
        end = minimise(Problem(kernel, voxels, kernel, voxels, settings), start)
        cost = kernel.normal_equations(end.position, voxels).cost
        # Only a last step, which is not evaluated, may miss the millionth that it promises.
        rounding = torch.where(end.converged, 1e-6, 1e-12)
        assert bool((cost <= before * (1 + rounding)).all())
        before = cost


def line_truth(times, sigma):
    rng = np.random.default_rng(11)
    offset, slope = rng.normal(0, 1, 200), rng.normal(0, 0.7, 200)
    data = offset + slope * times[:, None] + rng.normal(size=(len(times), 200)) * sigma
    return data, np.stack([np.ones_like(times), times], 1)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("prior", [None, "weak", {"factor": (0.3, 0.2)}])
def test_linear_model_gives_the_textbook_estimate_and_covariance(prior, precision):
    times = np.linspace(0.2, 3.0, 9)
    sigma = np.linspace(0.05, 0.2, 9)[:, None] * np.ones(200)
    data, design = line_truth(times, sigma)
    model = Line.of(times)
    result = fit(model, data, sigma=sigma, prior=prior, precision=precision)
    mean, precision_matrix = np.zeros(2), np.zeros((2, 2))
    for i, parameter in enumerate(model.parameters):
        normal = parameter.prior if prior == "weak" else (prior or {}).get(parameter.name)
        if normal is not None:
            mean[i], precision_matrix[i, i] = normal[0], normal[1] ** -2
    weights = sigma[:, 0] ** -2
    information = design.T @ (weights[:, None] * design) + precision_matrix
    rhs = design.T @ (weights[:, None] * data) + (precision_matrix @ mean)[:, None]
    estimate = np.linalg.solve(information, rhs)
    covariance = np.linalg.inv(information)
    sd = np.sqrt(np.diag(covariance))
    factor = np.exp(estimate[1])
    np.testing.assert_allclose(result.maps["offset"], estimate[0], atol=1e-2 * sd[0])
    np.testing.assert_allclose(np.log(result.maps["factor"]), estimate[1], atol=1e-2 * sd[1])
    np.testing.assert_allclose(result.std["offset"], sd[0], rtol=1e-5)
    np.testing.assert_allclose(result.std["factor"], factor * sd[1], rtol=5e-3)
    gradient = np.stack([factor, estimate[0] * factor])
    product = np.sqrt(np.einsum("iv,ij,jv->v", gradient, covariance, gradient))
    np.testing.assert_allclose(result.std["product"], product, rtol=5e-3)


def test_residual_noise_level_is_the_sum_of_squares_over_its_degrees_of_freedom():
    times = np.linspace(0.2, 3.0, 7)
    data, design = line_truth(times, 0.1)
    result = fit(Line.of(times), data)
    estimate, residual, *_ = np.linalg.lstsq(design, data, rcond=None)
    sd = np.sqrt(residual / 5 * np.linalg.inv(design.T @ design)[0, 0])
    np.testing.assert_allclose(result.maps["offset"], estimate[0], atol=1e-3)
    np.testing.assert_allclose(result.std["offset"], sd, rtol=1e-3)
    assert result.settings["degrees_of_freedom"] == 5
    expected = np.sqrt(residual / 7) / np.sqrt((data**2).mean(0))
    np.testing.assert_allclose(result.nrmse, expected, rtol=1e-3)


def test_an_infinite_sigma_excludes_a_measurement():
    times = np.linspace(0.2, 3.0, 7)
    data, design = line_truth(times, 0.1)
    spoilt = data.copy()
    spoilt[3] = 50
    sigma = np.full(data.shape, 0.1)
    sigma[3] = np.inf
    rest = np.arange(7) != 3
    estimate = np.linalg.lstsq(design[rest], data[rest], rcond=None)[0]
    result = fit(Line.of(times), spoilt, sigma=sigma)
    np.testing.assert_allclose(result.maps["offset"], estimate[0], atol=1e-3)


def test_equal_minima_are_flagged_and_a_single_one_is_not():
    rng = np.random.default_rng(12)
    times = np.array([0.1, 0.2, 0.3, 0.4])
    data = rng.uniform(0.5, 3, 100) + times[:, None] + rng.normal(size=(4, 100)) * 0.01
    model = Square.of(times)
    assert ((fit(model, data, sigma=0.01).flags & 16) > 0).all()
    assert ((fit(model, data, sigma=0.01, starts=1).flags & 16) == 0).all()
    data, _ = line_truth(times, 0.05)
    assert ((fit(Line.of(times), data, sigma=0.05, starts=4).flags & 16) == 0).all()


@pytest.mark.parametrize(("name", "options"), [("r2star", {}), ("despot1", {}), ("nexi", {})])
def test_a_voxel_does_not_depend_on_its_neighbours(name, options):
    model = make_model(name, **options)
    n = 300
    params, inputs = draw(model, n, 13), draw_inputs(model, n, 14)
    data = noisy(model, params, 0.02, 15, inputs).astype(np.float32)
    inputs = {k: v.numpy() for k, v in inputs.items()}
    whole = fit(model, data, inputs=inputs)
    order = np.random.default_rng(16).permutation(n)
    shuffled = fit(model, data[:, order], inputs={k: v[order] for k, v in inputs.items()})
    some = slice(100, 131)
    part = fit(model, data[:, some], inputs={k: v[some] for k, v in inputs.items()})
    others = [
        (shuffled, order),
        (part, np.arange(n)[some]),
        (fit(model, data, inputs=inputs, block_size=37), np.arange(n)),
        (fit(model, data, inputs=inputs, block_size=211), np.arange(n)),
        (fit(model, data, inputs=inputs), np.arange(n)),
    ]
    for other, index in others:
        np.testing.assert_array_equal(other.flags, whole.flags[index])
        for key in whole.maps:
            np.testing.assert_array_equal(other.maps[key], whole.maps[key][index])
            np.testing.assert_allclose(other.std[key], whole.std[key][index], rtol=1e-6)


def test_scale_of_the_data_only_scales_the_amplitude():
    model = make_model("r2star")
    data = noisy(model, draw(model, 50, 17), 0.01, 18)
    one, large = fit(model, data), fit(model, data * 2.0**40)
    np.testing.assert_array_equal(one.maps["R2star"], large.maps["R2star"])
    np.testing.assert_array_equal(one.maps["S0"] * 2.0**40, large.maps["S0"])
    np.testing.assert_array_equal(one.std["S0"] * 2.0**40, large.std["S0"])


def test_single_and_double_precision_find_the_same_optimum():
    model = make_model("nexi")
    data = noisy(model, draw(model, 200, 19), 1 / 300, 20)
    single = squares(model, fit(model, data).maps, data) * 300**2
    double = squares(model, fit(model, data, precision="float64").maps, data) * 300**2
    assert (np.abs(single - double) < 0.05).mean() > 0.97
