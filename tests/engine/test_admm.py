"""Fits with spatial terms: limits with a closed form, scipy, and independence of the blocks."""

import json
import logging
import shutil

import numpy as np
import pytest
import scipy.optimize
import torch

from bids_gacelle.engine import (
    TGV2,
    TV,
    Custom,
    EngineError,
    FitInterrupted,
    MapPrior,
    MeshTV,
    fit,
    spatial_fit,
)
from bids_gacelle.engine.kernels import COMPILE_VARIABLE
from bids_gacelle.engine.result import FLAG_NOT_CONVERGED, FLAG_UNUSABLE

from .helpers import Line, draw, make_model, noisy

TIMES = np.array([0.5, 1.0, 2.0, 3.0])
LINE = Line.of(TIMES)
DESIGN = np.stack([np.ones(4), TIMES], 1)
WIDTHS = np.array([2.0, np.log(4.0)])  # of the start boxes, the second in log coordinates


def line_data(grid, seed, sd=0.3):
    """Noisy lines whose parameters jump in the middle of the first axis; sigma by voxel."""
    rng = np.random.default_rng(seed)
    half = (np.arange(grid[0]) >= grid[0] // 2).reshape(-1, *[1] * (len(grid) - 1))
    offset = np.broadcast_to(0.3 + 0.5 * half, grid)
    slope = np.broadcast_to(np.log(1.5) + 0.2 * half, grid)
    sigma = sd * rng.uniform(0.7, 1.4, grid)
    clean = offset + TIMES.reshape(-1, *[1] * len(grid)) * slope
    return clean + sigma * rng.normal(size=(4, *grid)), sigma


def decay_data(grid, seed, sd=5.0):
    model = make_model("r2star")
    rng = np.random.default_rng(seed)
    half = (np.arange(grid[0]) >= grid[0] // 2).reshape(-1, *[1] * (len(grid) - 1))
    truth = {
        "S0": torch.tensor(np.broadcast_to(500.0 + 200 * half, grid).copy()),
        "R2star": torch.tensor(np.broadcast_to(20.0 + 15 * half, grid).copy()),
    }
    signal = model.signal(truth).numpy()
    return model, signal + sd * rng.normal(size=signal.shape), truth


@pytest.mark.parametrize("solver", ["lm", "adam"])
@pytest.mark.parametrize("size", [1e22, 1e25, 3e38])
def test_a_voxel_that_is_no_signal_is_left_out(solver, size):
    model, data, _ = decay_data((6, 5), 1)
    options = {"iterations": 50} if solver == "adam" else {}
    arguments = {"solver": solver, "options": options, "regularise": TV(["R2star"], 1.0)}
    data[:, 2, 2] = np.nan
    missing = fit(model, data, sigma=5.0, **arguments)
    for where in (slice(None), 3):
        data[:, 2, 2] = 100.0
        data[where, 2, 2] = size
        huge = fit(model, data, sigma=5.0, **arguments)
        assert huge.flags[2, 2] == FLAG_UNUSABLE
        np.testing.assert_allclose(huge.maps["R2star"], missing.maps["R2star"], rtol=1e-5)


def test_a_corner_without_a_gradient_is_no_convergence_of_all_voxels_either():
    model, data, _ = decay_data((6, 5), 1)
    result = fit(
        model,
        data,
        sigma=5.0,
        solver="sgdm",
        regularise=TV(["R2star"], 1.0),
        options={"transform": "linear", "learning_rate": 10.0},
    )
    last = result.trace["objective"][-1]
    assert last > 2 * min(result.trace["objective"])
    assert (result.flags & FLAG_NOT_CONVERGED > 0).all()


def test_without_weight_it_is_the_voxelwise_fit():
    model, data, _ = decay_data((6, 5), 1)
    alone = fit(model, data, sigma=5.0)
    options = {"spatial_iterations": 7}
    none = fit(model, data, sigma=5.0, regularise=[TV(["R2star"], 0.0)], options=options)
    np.testing.assert_array_equal(none.maps["R2star"], alone.maps["R2star"])
    assert none.settings["regularise"] is None
    little = fit(model, data, sigma=5.0, regularise=[TV(["S0", "R2star"], 1e-6)])
    for name in ("S0", "R2star"):
        distance = (little.maps[name] - alone.maps[name]) / alone.std[name]
        assert np.abs(distance).max() < 0.01
        np.testing.assert_allclose(little.std[name], alone.std[name], rtol=0.01)


def test_with_a_huge_weight_islands_are_constant_at_the_pooled_optimum():
    data, sigma = line_data((8, 5), 2)
    mask = np.ones((8, 5), bool)
    mask[4] = False
    result = fit(
        LINE,
        data,
        sigma=sigma,
        mask=mask,
        precision="float64",
        regularise=[TV(["offset", "factor"], 1e4)],
        options={"spatial_iterations": 1000, "spatial_tolerance": 1e-6},
    )
    assert result.settings["regularise"]["converged"]
    for part in (slice(0, 4), slice(5, 8)):
        weight = 1 / sigma[part].ravel() ** 2
        pooled = (data[:, part].reshape(4, -1) * weight).sum(1) / weight.sum()
        offset, slope = np.linalg.lstsq(DESIGN, pooled, rcond=None)[0]
        np.testing.assert_allclose(result.maps["offset"][part], offset, atol=2e-4)
        np.testing.assert_allclose(np.log(result.maps["factor"][part]), slope, atol=2e-4)


def objective(x, data, sigma, weight, corner):
    """Negative log-likelihood plus Huber-TV 2D, and its gradient; x is (2, *grid)."""
    residual = (np.einsum("mp,p...->m...", DESIGN, x) - data) / sigma
    gradient = np.einsum("mp,m...->p...", DESIGN, residual) / sigma
    total = 0.5 * (residual**2).sum()
    for i in range(2):
        u = x[i] / WIDTHS[i]
        d = np.zeros((2, *u.shape))
        d[0, :-1], d[1, :, :-1] = np.diff(u, axis=0), np.diff(u, axis=1)
        norm = np.sqrt((d**2).sum(0))
        total += weight * np.where(norm < corner, norm**2 / (2 * corner), norm - corner / 2).sum()
        p = weight * d / np.maximum(norm, corner) / WIDTHS[i]
        gradient[i] -= p.sum(0)
        gradient[i, 1:] += p[0, :-1]
        gradient[i, :, 1:] += p[1, :, :-1]
    return total, gradient


def test_objective_is_as_low_as_scipy_gets_on_a_smooth_problem():
    data, sigma = line_data((5, 4), 3)
    result = fit(
        LINE,
        data,
        sigma=sigma,
        precision="float64",
        regularise=[TV(["offset", "factor"], 4.0, huber=0.05)],
        options={"spatial_tolerance": 1e-6, "spatial_iterations": 500},
    )
    theirs = scipy.optimize.minimize(
        lambda v: tuple(
            np.ravel(part) if k else part
            for k, part in enumerate(objective(v.reshape(2, 5, 4), data, sigma, 4.0, 0.05))
        ),
        np.zeros(40),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 10000},
    )
    ours = np.stack([result.maps["offset"], np.log(result.maps["factor"])]).astype(float)
    at_ours = objective(ours, data, sigma, 4.0, 0.05)[0]
    assert result.trace["objective"][-1] == pytest.approx(at_ours, rel=1e-6)
    assert at_ours <= theirs.fun * (1 + 1e-6)
    np.testing.assert_allclose(ours, theirs.x.reshape(2, 5, 4), atol=1e-3)


def test_objective_does_not_rise_after_a_few_iterations():
    model, data, _ = decay_data((10, 8, 3), 4, sd=25.0)
    result = fit(model, data, sigma=25.0, regularise=[TV(["R2star", "S0"], 2.0, "3d")])
    trace = np.array(result.trace["objective"])
    assert (np.diff(trace[4:]) < 1e-4 * trace[4:-1]).all()
    assert trace[-1] < trace[0]


def test_errors_shrink_where_the_truth_is_piecewise_constant():
    model, data, truth = decay_data((10, 8, 3), 4, sd=25.0)
    result = fit(model, data, sigma=25.0, regularise=[TV(["R2star", "S0"], 15.0, "3d")])
    alone = fit(model, data, sigma=25.0)
    for name in ("R2star", "S0"):
        error, before = (
            np.sqrt(((r.maps[name] - truth[name].numpy()) ** 2).mean()) for r in (result, alone)
        )
        assert error < 0.6 * before


@pytest.mark.parametrize("known", [True, False])
def test_maps_do_not_depend_on_blocks_nor_on_what_is_kept(known, monkeypatch):
    model, data, _ = decay_data((8, 6, 4), 5, sd=25.0)
    data[3, 2, 2, 2] = np.nan
    arguments = {
        "sigma": 25.0 if known else None,
        "regularise": [TV(["R2star"], 3.0, "3d"), TGV2(["S0"], 3.0, "3d")],
        "voxel_size": (1, 1, 2),
        "options": {"spatial_iterations": 15},
    }
    whole = fit(model, data, **arguments)
    assert whole.flags[2, 2, 2] == 4
    monkeypatch.setattr(spatial_fit, "KEEP_BYTES", 2000)
    for size in (24, 100):
        parts = fit(model, data, block_size=size, **arguments)
        for name in ("S0", "R2star"):
            np.testing.assert_array_equal(parts.maps[name], whole.maps[name])
            np.testing.assert_array_equal(parts.std[name], whole.std[name])
        np.testing.assert_allclose(parts.trace["objective"], whole.trace["objective"], rtol=1e-6)


def test_a_last_block_of_few_voxels():
    """The sample that sets the stiffness passes over it."""
    model = make_model("r2star")
    data = noisy(model, draw(model, 10_001, 21), 0.01, 22).reshape(-1, 10_001, 1, 1)
    options = {"spatial_iterations": 3}
    terms = [TV(["R2star"], 0.1)]
    whole, blocks = (
        fit(model, data, sigma=0.01, regularise=terms, options=options, block_size=size)
        for size in (None, 5000)
    )
    assert blocks.settings["blocks"] == 3
    np.testing.assert_allclose(blocks.maps["R2star"], whole.maps["R2star"], rtol=1e-5)


def test_maps_do_not_depend_on_how_the_data_lie_in_memory():
    model, data, _ = decay_data((6, 5, 4), 16, sd=25.0)
    mask = np.random.default_rng(17).random((6, 5, 4)) < 0.8
    terms = [TV(["R2star"], 3.0, "3d"), TGV2(["S0"], 3.0, "3d")]
    arguments = {"sigma": 25.0, "mask": mask, "regularise": terms}
    one = fit(model, data, **arguments)
    other = fit(model, np.asfortranarray(data), block_size=30, **arguments)
    for name in ("S0", "R2star"):
        np.testing.assert_allclose(other.maps[name], one.maps[name], rtol=1e-5)


@pytest.mark.slow
def test_eight_times_the_memory_limit_gives_the_same_maps(monkeypatch):
    monkeypatch.setenv(COMPILE_VARIABLE, "never")
    line = Line.of(np.linspace(0.5, 3.0, 48))
    grid = (56, 56, 56)
    rng = np.random.default_rng(18)
    offset = np.broadcast_to(0.3 + 0.5 * (np.arange(56) > 25), grid)
    data = np.empty((48, *grid), np.float32)
    for row, time in zip(data, line.scheme.echo_time, strict=True):
        row[:] = offset + 0.4 * time + rng.normal(size=grid)
    arguments = {
        "sigma": 1.0,
        "regularise": [TV(["offset", "factor"], 3.0, "3d")],
        "options": {"dictionary": 16, "spatial_iterations": 5},
    }
    whole = fit(line, data, block_size=offset.size, **arguments)
    limit = whole.settings["memory_predicted"] // 8
    parts = fit(line, data, memory_limit=limit, **arguments)
    assert parts.settings["blocks"] > 8
    assert parts.settings["memory_predicted"] <= parts.settings["memory_limit"] == limit
    for name in ("offset", "factor"):
        np.testing.assert_allclose(parts.maps[name], whole.maps[name], rtol=1e-5, atol=1e-6)


def test_an_interrupted_fit_has_nothing_finished_before_the_volume_is():
    data, sigma = line_data((6, 5), 19)
    data[:, 0] = 0  # the first block

    def stop(progress):
        if progress.done > 15:  # while the volume is fitted
            raise KeyboardInterrupt

    with pytest.raises(FitInterrupted, match="after 0 of 30 voxels") as caught:
        fit(
            LINE,
            data,
            sigma=sigma,
            block_size=5,
            progress=stop,
            regularise=[TV(["offset"], 2.0)],
            options={"spatial_tolerance": 0.0},
        )
    part = caught.value.result
    assert np.isnan(part.maps["offset"]).all()
    assert (part.flags == 8).all()
    assert part.settings["interrupted"]
    assert part.settings["regularise"]["terms"]


def test_of_several_devices_the_first_is_used(caplog):
    data, sigma = line_data((6, 5), 20)
    terms = [TV(["offset"], 2.0)]
    with caplog.at_level(logging.INFO, "bids_gacelle.engine"):
        result = fit(LINE, data, sigma=sigma, device=["cpu", "cpu"], regularise=terms)
    assert "Spatial terms need all voxels on one device: using cpu." in caplog.messages
    assert result.settings["device"] == "cpu"


@pytest.mark.parametrize("size", [None, 11])
def test_adam_reaches_the_objective_of_admm_on_a_convex_problem(size, caplog):
    data, sigma = line_data((6, 5), 16)
    arguments = {
        "sigma": sigma,
        "precision": "float64",
        "regularise": [TV(["offset", "factor"], 4.0, huber=0.05)],
    }
    admm = fit(LINE, data, **arguments)
    adam = fit(LINE, data, solver="adam", block_size=size, **arguments)
    assert min(adam.trace["objective"]) == pytest.approx(admm.trace["objective"][-1], rel=1e-4)
    assert adam.settings["regularise"]["converged"]
    assert ("hold all data" in caplog.text) is (size is not None)
    for name in ("offset", "factor"):
        distance = np.abs(adam.maps[name] - admm.maps[name]) / admm.std[name]
        assert distance.max() < 0.02
        np.testing.assert_allclose(adam.std[name], admm.std[name], rtol=1e-3)


def test_adam_takes_what_has_no_proximal_step():
    data, sigma = line_data((6, 5), 21)

    def rough(maps, mask):
        return (maps["offset"].diff(dim=0) ** 2).sum()

    terms = [Custom(rough, 50.0)]
    result = fit(LINE, data, sigma=sigma, solver="adam", regularise=terms)
    alone = fit(LINE, data, sigma=sigma)
    assert (np.diff(result.maps["offset"], axis=0) ** 2).sum() < 0.2 * (
        np.diff(alone.maps["offset"], axis=0) ** 2
    ).sum()


def test_units_of_the_data_do_not_matter():
    model, data, _ = decay_data((6, 5), 6, sd=25.0)
    terms = [TV(["S0", "R2star"], 2.0)]
    one = fit(model, data, sigma=25.0, regularise=terms)
    other = fit(model, 1e-3 * data, sigma=25e-3, regularise=terms)
    np.testing.assert_allclose(other.maps["S0"], 1e-3 * one.maps["S0"], rtol=1e-4)
    np.testing.assert_allclose(other.maps["R2star"], one.maps["R2star"], rtol=1e-4)


def test_several_terms_on_one_parameter():
    data, sigma = line_data((6, 4), 7)
    mean = np.full((6, 4), 0.9)
    mean[0] = np.nan
    result = fit(
        LINE,
        data,
        sigma=sigma,
        regularise=[TV(["offset"], 0.5), MapPrior("offset", mean, 0.01, 10.0)],
    )
    np.testing.assert_allclose(result.maps["offset"][1:], 0.9, atol=2e-3)
    assert np.abs(result.maps["offset"][0] - 0.9).max() > 0.05


def test_a_mesh_is_fitted_like_the_grid_it_is():
    data, sigma = line_data((6, 5), 8)
    flat = np.arange(30).reshape(6, 5)
    pairs = np.concatenate(
        [
            np.stack([flat[:-1].ravel(), flat[1:].ravel()], 1),
            np.stack([flat[:, :-1].ravel(), flat[:, 1:].ravel()], 1),
        ]
    )
    grid = fit(LINE, data, sigma=sigma, regularise=[TV(["offset"], 2.0, isotropic=False)])
    mesh = fit(
        LINE,
        data.reshape(4, 30),
        sigma=sigma.ravel(),
        regularise=[MeshTV(["offset"], 2.0, edges=pairs)],
    )
    np.testing.assert_allclose(
        mesh.maps["offset"], grid.maps["offset"].ravel(), atol=1e-3 * WIDTHS[0]
    )


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_gacelle_convention_minimises_gacelles_objective(loss):
    data, sigma = line_data((6, 5), 9)
    weight, size = 0.02, (2.0, 1.5)
    result = fit(
        LINE,
        data,
        sigma=sigma,
        loss=loss,
        precision="float64",
        voxel_size=size,
        regularise=[TV(["offset"], weight, convention="gacelle")],
        options={"spatial_tolerance": 1e-6, "spatial_iterations": 500},
    )
    x = np.stack([result.maps["offset"], np.log(result.maps["factor"])]).astype(float)

    def theirs(x):
        residual = np.einsum("mp,p...->m...", DESIGN, x) - data
        fidelity = (residual**2 if loss == "l2" else np.abs(residual)).mean()
        steps = sum(np.abs(np.diff(x[0], axis=a)).sum() / size[a] for a in (0, 1))
        return fidelity + weight * steps / 30

    rounded = 0.0 if loss == "l2" else 0.03 * sigma.mean()  # L1 is rounded off near 0
    assert -1e-6 < theirs(x) - result.trace["objective"][-1] < rounded + 1e-6
    rng = np.random.default_rng(10)
    slack = 1e-9 if loss == "l2" else 2e-4
    for scale in (1e-3, 1e-2, 1e-1):
        assert theirs(x) <= theirs(x + scale * rng.normal(size=x.shape)) + slack
        assert theirs(x) <= theirs(x + scale * rng.normal(size=(2, 1, 1))) + slack


def test_weak_prior_keeps_parameters_without_a_term_from_their_bounds():
    model = make_model("nexi")
    params = draw(model, 1, 11)
    grid = (6, 6, 2)
    truth = {name: value.expand(grid).clone() for name, value in params.items()}
    data = noisy(model, truth, 0.02, 12)
    results = {
        prior: fit(
            model,
            data,
            sigma=0.02,
            prior=prior,
            regularise=[TV(["fn"], 1.0, "3d")],
            options={"spatial_iterations": 40},
        )
        for prior in (None, "weak")
    }
    for name in ("dn", "de", "tex"):
        bound = {p: r.settings["at_bound"][name] for p, r in results.items()}
        assert bound["weak"] <= bound[None]
    assert results["weak"].settings["at_bound"]["tex"] < 0.05
    assert results["weak"].settings["regularise"]["converged"]


def test_settings_are_plain_data_and_progress_goes_to_the_end():
    data, sigma = line_data((5, 4), 13)
    calls = []
    result = fit(
        LINE,
        data,
        sigma=sigma,
        voxel_size=(1, 2),
        regularise=[TV(["offset"], 2.0, huber=0.1), MapPrior("factor", 0.3, np.ones((5, 4)), 0.1)],
        progress=calls.append,
    )
    assert json.loads(json.dumps([result.settings, result.trace])) == [
        result.settings,
        result.trace,
    ]
    told = result.settings["regularise"]
    assert [t["term"] for t in told["terms"]] == ["TV", "MapPrior"]
    assert told["iterations"] == len(result.trace["objective"]) - 1
    assert len(told["rho"]) == 2
    done = [call.done for call in calls]
    assert done[-1] == 20
    assert done == sorted(set(done))
    assert {call.total for call in calls} == {20}
    assert calls[-1].converged == 1


def test_no_usable_voxel_is_no_error():
    result = fit(LINE, np.full((4, 3, 3), np.nan), regularise=[TV(["offset"], 1.0)])
    assert (result.flags == 4).all()


def test_what_is_refused():
    data, sigma = line_data((5, 4), 14)
    for arguments, message in (
        (
            {"regularise": [Custom(lambda maps, mask: maps["offset"].sum())]},
            "with Custom.*Use solver 'adam'",
        ),
        (
            {"regularise": [TV(["factor"], 1.0, convention="gacelle")], "voxel_size": (1, 1)},
            "log scale",
        ),
        ({"regularise": [TV(["offset"], 1.0)], "voxel_size": (1, 1, 1)}, "voxel_size"),
        ({"regularise": [TV(["fn"], 1.0)]}, "does not fit"),
    ):
        with pytest.raises(EngineError, match=message):
            fit(LINE, data, sigma=sigma, **arguments)
    two = Line.of([1.0, 2.0])
    with pytest.raises(EngineError, match="give sigma"):
        fit(two, data[:2], regularise=[TV(["offset"], 1.0)])
    linear = make_model("despot1")
    with pytest.raises(EngineError, match="closed form"):
        fit(linear, np.ones((5, 2, 2)), solver="linear", regularise=[TV(["R1"], 1.0)])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_equals_eager(monkeypatch):
    model, data, _ = decay_data((8, 6, 4), 15, sd=25.0)
    arguments = {"sigma": 25.0, "regularise": [TV(["R2star", "S0"], 2.0, "3d")]}
    monkeypatch.setenv("BIDS_GACELLE_COMPILE", "never")
    eager = fit(model, data, **arguments)
    monkeypatch.setenv("BIDS_GACELLE_COMPILE", "always")
    compiled = fit(model, data, **arguments)
    assert compiled.settings["compiled"]
    for name in ("S0", "R2star"):
        distance = np.abs(compiled.maps[name] - eager.maps[name]) / eager.std[name]
        assert distance.max() < 0.02


@pytest.mark.parametrize(
    ("solver", "option"), [("lm", "spatial_iterations"), ("adam", "iterations")]
)
def test_all_voxels_are_flagged_when_the_volume_has_not_converged(solver, option, caplog):
    data, sigma = line_data((5, 4), 15)
    data[:, 0, 0] = np.nan
    arguments = {"sigma": sigma, "solver": solver, "regularise": [TV(["offset"], 2.0, huber=0.1)]}
    early = fit(LINE, data, options={option: 2}, **arguments)
    assert not early.settings["regularise"]["converged"]
    assert early.flags[0, 0] == FLAG_UNUSABLE
    assert (early.flags.ravel()[1:] & FLAG_NOT_CONVERGED).all()
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert repr(option) in record.getMessage()
    caplog.clear()
    ended = fit(LINE, data, **arguments)
    assert ended.settings["regularise"]["converged"]
    assert not (ended.flags & FLAG_NOT_CONVERGED).any()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda maps, mask: (maps["offset"] * torch.nan).sum(), r"Custom\(.*became nan"),
        (lambda maps, mask: maps["offset"].exp().sum() * torch.inf, r"Custom\(.*became inf"),
        (lambda maps, mask: (0 * maps["offset"]).square().sum().sqrt(), "gradient of Custom"),
        (lambda maps, mask: torch.ones(()), "does not depend on the maps"),
        (lambda maps, mask: maps["offset"].detach().sum(), "does not depend on the maps"),
        (lambda maps, mask: maps["fn"].sum(), "map 'fn'; there are offset, factor"),
        (lambda maps, mask: maps["offset"], "0-d tensor"),
    ],
)
def test_functions_that_are_refused(function, message):
    data, sigma = line_data((5, 4), 15)
    with pytest.raises(EngineError, match=message):
        fit(LINE, data, sigma=sigma, solver="adam", regularise=[Custom(function)])
