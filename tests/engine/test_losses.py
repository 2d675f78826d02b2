"""Robust losses, weights and prior maps against scipy, closed forms and each other."""

import json

import numpy as np
import pytest
import scipy.optimize
import torch

from bids_gacelle.engine import EngineError, fit, sigma_from_repeats
from bids_gacelle.engine.objective import HUBER_CORNER, L1_CORNERS, Objective

from .helpers import Line, draw, make_model, noisy

TIMES = np.linspace(0.1, 1.2, 12)
TIGHT = {"ftol": 1e-10, "xtol": 1e-8, "max_evaluations": 400}


def lines(n, sd, seed, outliers=0):
    rng = np.random.default_rng(seed)
    offset, slope = rng.uniform(-1, 1, n), rng.uniform(-0.6, 0.6, n)
    data = offset + slope * TIMES[:, None] + rng.normal(size=(12, n)) * sd
    data[:outliers] += 30 * sd
    return offset, slope, data


@pytest.mark.parametrize("loss", ["huber", "l1"])
def test_optimum_is_that_of_scipy(loss):
    sd = 0.05
    _, _, data = lines(25, sd, 1, outliers=2)
    result = fit(Line.of(TIMES), data, sigma=sd, loss=loss, precision="float64", options=TIGHT)

    def rho(r):
        if loss == "huber":
            corner, size = HUBER_CORNER * sd, np.abs(r)
            return np.where(size < corner, 0.5 * r**2, corner * (size - corner / 2))
        return sd * np.sqrt(r**2 + (L1_CORNERS[-1] * sd) ** 2)

    for voxel, y in enumerate(data.T):
        start = [result.maps["offset"][voxel], np.log(result.maps["factor"][voxel])]
        cost = lambda x, y=y: rho(x[0] + x[1] * TIMES - y).sum()  # noqa: E731
        found = scipy.optimize.minimize(
            cost, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}
        )
        assert cost(start) <= found.fun * (1 + 1e-6)
        if loss == "huber":  # the other has a ridge that the simplex walks along slowly
            np.testing.assert_allclose(start, found.x, atol=2e-4)


def test_outliers_move_robust_fits_little():
    sd = 0.05
    offset, _, data = lines(400, sd, 2, outliers=2)
    error = {
        loss: np.abs(fit(Line.of(TIMES), data, sigma=sd, loss=loss).maps["offset"] - offset)
        for loss in ("l2", "huber", "l1")
    }
    medians = {loss: np.median(value) for loss, value in error.items()}
    assert medians["huber"] < 0.25 * medians["l2"]
    assert medians["l1"] < 0.25 * medians["l2"]
    # Without a given noise level the scale comes from the median residual.
    unknown = fit(Line.of(TIMES), data, loss="huber").maps["offset"]
    assert np.median(np.abs(unknown - offset)) < 0.3 * medians["l2"]


@pytest.mark.parametrize("loss", ["huber", "l1"])
def test_standard_deviations_of_robust_fits_cover(loss):
    sd = 0.05
    offset, _, data = lines(4000, sd, 3)
    result = fit(Line.of(TIMES), data, sigma=sd, loss=loss)
    z = (result.maps["offset"] - offset) / result.std["offset"]
    assert 0.93 < (np.abs(z) < 1.96).mean() < 0.97


def test_losses_and_their_derivatives():
    residual = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    sd = torch.tensor([[0.5]], dtype=torch.float64)
    for loss in ("l2", "huber", "l1"):
        objective = Objective(loss=loss)
        step = 1e-6
        ahead, behind = (objective.misfit(residual + s, sd).cost for s in (step, -step))
        slope = objective.misfit(residual, sd).slope
        torch.testing.assert_close(slope, (ahead - behind) / (2 * step), atol=1e-6, rtol=0)
        assert float(objective.misfit(residual, sd).cost.min()) >= 0


def test_weights_leave_out_and_emphasise_measurements():
    sd = 0.05
    _, _, data = lines(60, sd, 4, outliers=2)
    model = Line.of(TIMES)
    out = fit(model, data, sigma=sd, weights=[0, 0] + [1] * 10)
    cut = fit(Line.of(TIMES[2:]), data[2:], sigma=sd)
    for name in ("offset", "factor"):
        np.testing.assert_allclose(out.maps[name], cut.maps[name], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(out.std[name], cut.std[name], rtol=2e-3)
    # The closed form of weighted least squares and its sandwich covariance.
    weights = np.random.default_rng(5).uniform(0.2, 3, (12, 60))
    result = fit(model, data, sigma=sd, weights=weights, precision="float64", options=TIGHT)
    design = np.stack([np.ones(12), TIMES], 1)
    for v in range(0, 60, 7):
        inverse = np.linalg.inv(design.T @ (weights[:, v, None] * design))
        best = inverse @ (design.T @ (weights[:, v] * data[:, v]))
        middle = design.T @ (weights[:, v, None] ** 2 * design) * sd**2
        covariance = inverse @ middle @ inverse
        np.testing.assert_allclose(result.maps["offset"][v], best[0], atol=1e-6)
        np.testing.assert_allclose(result.std["offset"][v], covariance[0, 0] ** 0.5, rtol=1e-4)


def test_equal_weights_change_nothing():
    model = make_model("nexi")
    data = noisy(model, draw(model, 200, 6), 0.02, 7)
    plain = fit(model, data, sigma=0.02)
    weighted = fit(model, data, sigma=0.02, weights=np.full(data.shape[1:], 3.0))
    close = np.abs(plain.maps["fn"] - weighted.maps["fn"]) < 0.05 * plain.std["fn"] + 1e-6
    assert (close | np.isnan(plain.std["fn"])).mean() > 0.97
    ratio = weighted.std["fn"] / plain.std["fn"]
    assert abs(np.nanmedian(ratio) - 1) < 1e-3


def test_a_prior_map_is_the_closed_form_in_every_voxel():
    sd, n = 0.1, 50
    _, _, data = lines(n, sd, 8)
    rng = np.random.default_rng(9)
    mean, spread = rng.uniform(-1, 1, n), rng.uniform(0.02, 0.5, n)
    spread[:5] = np.inf  # no prior there
    mean[5] = np.nan
    result = fit(
        Line.of(TIMES), data, sigma=sd, prior={"offset": (mean, spread)}, precision="float64",
        options=TIGHT,
    )  # fmt: skip
    design = np.stack([np.ones(12), TIMES], 1)
    for v in range(n):
        precision = 0.0 if v < 6 else spread[v] ** -2
        normal = design.T @ design / sd**2 + np.diag([precision, 0])
        centre = 0.0 if v < 6 else mean[v]
        best = np.linalg.solve(normal, design.T @ data[:, v] / sd**2 + [precision * centre, 0])
        np.testing.assert_allclose(result.maps["offset"][v], best[0], atol=1e-6)
    assert result.settings["prior"]["offset"] == {
        "mean": "map",
        "sd": "map",
        "coordinate": "linear",
    }


def test_noise_from_repeats_is_the_pooled_deviation():
    rng = np.random.default_rng(10)
    group = np.repeat([0, 1, 2, 3], [6, 6, 6, 1])
    data = group[:, None, None] + 0.3 * rng.normal(size=(19, 40, 50))
    sigma = sigma_from_repeats(data, group)
    assert sigma.shape == (40, 50)
    assert abs(np.sqrt((sigma**2).mean()) / 0.3 - 1) < 0.02
    assert abs((sigma / 0.3).std() - 1 / np.sqrt(2 * 15)) < 0.02  # 15 degrees of freedom
    data[0, 3, 4] = np.nan
    assert np.isnan(sigma_from_repeats(torch.tensor(data), group)[3, 4])
    with pytest.raises(EngineError, match="nothing to tell the noise from"):
        sigma_from_repeats(data, np.arange(19))
    with pytest.raises(EngineError, match="19 measurements"):
        sigma_from_repeats(data, [0, 0])


def test_a_common_factor_of_the_weights_changes_nothing():
    model = make_model("nexi")
    data = noisy(model, draw(model, 60, 11), 0.02, 12)
    plain = fit(model, data, sigma=0.02, starts=1)
    for factor in (1e-12, 1e-6, 1e6):
        scaled = fit(model, data, sigma=0.02, starts=1, weights=np.full(15, factor))
        moved = np.abs(plain.maps["fn"] - scaled.maps["fn"])
        assert (moved < 0.02).mean() > 0.95, factor


def test_voxels_with_fewer_measurements_than_parameters_are_unusable():
    _, _, data = lines(6, 0.05, 13)
    sigma = np.full((12, 6), 0.05)
    sigma[1:, 2] = np.inf
    weights = np.ones((12, 6))
    weights[2:, 4] = 0
    weights[1:, 5] = 0
    result = fit(Line.of(TIMES), data, sigma=sigma, weights=weights)
    assert (result.flags == [0, 0, 4, 0, 0, 4]).all()
    told = fit(Line.of(TIMES), data, sigma=sigma, weights=weights, prior={"offset": (0, 1)})
    assert (told.flags & 4 == 0).all()


def test_settings_are_json_whatever_numbers_are_given():
    _, _, data = lines(6, 0.05, 14)
    result = fit(
        Line.of(TIMES), data, seed=np.int64(3), block_size=np.int64(4), device=torch.device("cpu"),
        options={"ftol": np.float64(1e-6)},
    )  # fmt: skip
    assert json.loads(json.dumps(result.settings))["seed"] == 3


def test_masks_with_nan_leave_out():
    _, _, data = lines(4, 0.05, 15)
    masked = np.ma.array(np.ones(4), mask=[0, 0, 0, 1])
    assert (fit(Line.of(TIMES), data, mask=[1, np.nan, 0, 1]).flags == [0, 1, 1, 0]).all()
    assert (fit(Line.of(TIMES), data, mask=masked).flags == [0, 0, 0, 1]).all()
