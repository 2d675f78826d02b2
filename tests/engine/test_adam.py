"""First-order solvers against torch.optim, scipy, plain loops and closed forms."""

import itertools
import shutil

import numpy as np
import pytest
import torch

from bids_gacelle.engine import EngineError, fit
from bids_gacelle.engine.kernels import COMPILE_VARIABLE, Kernel, Voxels
from bids_gacelle.engine.objective import Objective
from bids_gacelle.engine.solvers import Problem, get_solver
from bids_gacelle.engine.solvers.adam import (
    ASKADAM_1_0,
    AdamSettings,
    Criteria,
    RmspropSettings,
    SgdmSettings,
    State,
    Step,
    Transform,
    loss_unit,
    minimise,
    minimise_whole,
)

from .helpers import Line, draw, make_model, noisy
from .test_lm import scipy_fit, squares

CPU = torch.device("cpu")
# No criterion: all iterations are made.
ENDLESS = {"convergence_value": 0.0, "step_tolerance": 0.0, "gradient_tolerance": 0.0}
RULES = {
    "adam": (AdamSettings, lambda z, lr: torch.optim.Adam([z], lr)),
    "sgdm": (SgdmSettings, lambda z, lr: torch.optim.SGD([z], lr, momentum=0.9)),
    "rmsprop": (RmspropSettings, lambda z, lr: torch.optim.RMSprop([z], lr, alpha=0.9)),
}


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setenv(COMPILE_VARIABLE, "never")


def make_kernel(model, dtype=torch.float64, **objective):
    return Kernel(model, Objective(**objective), dtype, CPU)


def nexi_voxels(n=5, seed=1):
    model = make_model("nexi")
    kernel = make_kernel(model)
    voxels = Voxels(torch.tensor(noisy(model, draw(model, n, seed), 0.02, seed)))
    return kernel, voxels, kernel.coordinates(draw(model, n, seed + 1))


def run(kernel, voxels, start, settings, iterations):
    """States after each iteration of single voxels."""
    step = Step(kernel, settings)
    states = [step.load(step.transform.inverse(start), voxels)]
    for _ in range(iterations):
        states.append(State(*step(states[-1], voxels)))
    return states


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("transform", ["sigmoid", "linear"])
def test_positions_are_those_of_torch_optim(name, transform):
    kernel, voxels, start = nexi_voxels()
    settings_class, optimiser = RULES[name]
    rate = 0.003 if transform == "sigmoid" else 0.0003  # away from bounds
    settings = settings_class(transform=transform, learning_rate=rate, **ENDLESS)
    states = run(kernel, voxels, start, settings, 25)
    low, span = kernel.lower, kernel.upper - kernel.lower
    share = (start - low) / span
    with torch.enable_grad():
        z = (torch.logit(share) if transform == "sigmoid" else share).clone().requires_grad_()
        torch_rule = optimiser(z, rate)
        for state in states[1:]:
            u = torch.sigmoid(z) if transform == "sigmoid" else z.clamp(0, 1)
            residual = kernel.signal(low + span * u, {}) - voxels.data
            loss = (residual**2).sum(0) / (voxels.data**2).sum(0)
            torch.testing.assert_close(state.loss, loss.detach(), rtol=1e-6, atol=0)
            torch_rule.zero_grad()
            loss.sum().backward()
            torch_rule.step()
            torch.testing.assert_close(state.z, z.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_the_step_size_decays(name):
    kernel, _, start = nexi_voxels()
    settings_class, optimiser = RULES[name]
    settings = settings_class(learning_rate=0.01, decay_rate=0.05, **ENDLESS)
    assert settings.rate(torch.tensor(11.0)) == pytest.approx(0.01 / 1.5)
    z = torch.logit((start - kernel.lower) / (kernel.upper - kernel.lower))
    torch_z = z.clone().requires_grad_()
    torch_rule = optimiser(torch_z, 0.01)
    moments = (torch.zeros_like(z), torch.zeros_like(z))
    velocity = torch.zeros_like(z)
    for k in range(1, 20):
        gradient = torch.sin(z * k)
        if name == "sgdm":  # torch's momentum has no step size in it
            velocity = 0.9 * velocity - 0.01 / (1 + 0.05 * (k - 1)) * gradient
            expected = z + velocity
        else:
            torch_rule.param_groups[0]["lr"] = 0.01 / (1 + 0.05 * (k - 1))
            torch_z.grad = gradient
            torch_rule.step()
            expected = torch_z.detach()
        z, moments = settings.update(z, gradient, moments, torch.tensor(float(k)))
        torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", RULES)
def test_r2star_and_mcmicro_reach_the_optimum_of_scipy(solver):
    cases = (("r2star", 60, {}), ("mcmicro", 100, {"starts": 2}))
    for name, snr, options in cases[: 1 if solver == "rmsprop" else 2]:
        model = make_model(name)
        data = noisy(model, draw(model, 10, 3), 1 / snr, 4)
        settings = {"decay_rate": 0.05} if solver == "rmsprop" else {}
        result = fit(model, data, solver=solver, precision="float64", options=settings, **options)
        start = [np.mean(p.start) if p.start else 1.0 for p in model.parameters]
        cost = np.array([scipy_fit(model, y, start)[1] for y in data.T])
        gap = (squares(model, result.maps, data) - cost) * snr**2
        assert np.median(gap) < 1e-3
        assert gap.max() < 0.05
        assert (result.flags & 8 == 0).mean() > 0.9
        lm = fit(model, data)
        for key, sd in lm.std.items():
            fine = np.isfinite(sd) & (result.flags == 0) & (lm.flags == 0)
            distance = np.abs(result.maps[key] - lm.maps[key])[fine] / sd[fine]
            assert np.median(distance) < 0.05
            assert np.median(np.abs(result.std[key][fine] / sd[fine] - 1)) < 0.05


@pytest.mark.parametrize("options", [{}, {"robust": True}, {"convergence": "linear"}])
def test_a_voxel_knows_nothing_of_the_others(options):
    model = make_model("mcmicro")
    data = noisy(model, draw(model, 400, 5), 0.02, 6)
    options = {"randomness": 0.1, "iterations": 60, **options}

    def estimate(voxels, **more):
        result = fit(model, data[:, voxels], solver="adam", starts=2, options=options, **more)
        return result.maps["fn"], result.maps["d"], result.flags

    every = estimate(slice(None))
    few = estimate(slice(40, 45))
    for a, b in zip(every, few, strict=True):
        np.testing.assert_array_equal(a[40:45], b)
    for a, b in zip(every, estimate(slice(None), block_size=123), strict=True):
        np.testing.assert_array_equal(a, b)
    options["lanes"] = 512
    for a, b in zip(every, estimate(slice(None)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_finished_voxels_stay_where_they_are():
    kernel, voxels, start = nexi_voxels(40)
    settings = AdamSettings(convergence_value=1e-3, learning_rate=0.05, patience=2)
    states = run(kernel, voxels, start, settings, 150)
    done = ~states[-1].running
    assert done.any()
    for before, after in itertools.pairwise(states):
        idle = ~before.running
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[..., idle], b[..., idle])
    assert states[-1].converged.equal(done)
    assert (states[-1].iterations[done] > settings.convergence_window + settings.patience).all()


def plain_criteria(losses, steps, slopes, settings):
    """The iteration that ends one voxel, as in the text of the options; None: none."""
    average, counts = None, [0, 0, 0]
    window = settings.convergence_window
    for k, loss in enumerate(losses, start=1):
        if settings.convergence == "linear":
            last = losses[max(k - window, 0) : k]
            signal = abs(np.polyfit(range(len(last)), last, 1)[0]) if k > window else np.inf
        else:
            new = (
                loss if k == 1 else settings.ema_decay * average + (1 - settings.ema_decay) * loss
            )
            signal = np.inf if k == 1 else abs(new - average) / (abs(average) + 1e-8)
            average = new
        small = (
            k > window and signal < settings.convergence_value,
            k > 1 and steps[k - 2] < settings.step_tolerance,
            slopes[k - 1] < settings.gradient_tolerance,
        )
        counts = [c + 1 if s else 0 for c, s in zip(counts, small, strict=True)]
        if any(c > p for c, p in zip(counts, settings.patiences(), strict=True)):
            return k
        if loss < settings.tolerance:
            return k
    return None


@pytest.mark.parametrize(
    "options",
    [
        {"convergence": "ema", "convergence_value": 1e-3},
        {"convergence": "linear", "convergence_value": 1e-5, "convergence_window": 12},
        {"convergence_value": 0.0, "step_tolerance": 2e-3},
        {"convergence_value": 0.0, "gradient_tolerance": 2e-3, "gradient_patience": 2},
        {"convergence_value": 0.0, "tolerance": 1.2e-2},
    ],
)
def test_criteria_are_those_of_a_plain_loop(options):
    rng = np.random.default_rng(0)
    k = np.arange(300)[:, None]
    losses = 0.01 + np.exp(-k / rng.uniform(10, 40, 6)) + 1e-6 * rng.normal(size=(300, 6))
    losses[:, 5] = 1 + k[:, 0] * 0.01  # rises
    steps = 0.1 * np.exp(-k / 30) * rng.uniform(0.5, 1.5, (300, 6))
    slopes = 0.1 * np.exp(-k / 40) * rng.uniform(0.5, 1.5, (300, 6))
    settings = AdamSettings(**{"step_tolerance": 0.0, "gradient_tolerance": 0.0, **options})
    criteria = Criteria(settings, torch.empty(0, dtype=torch.float64))
    watch = criteria.start(torch.tensor(losses[0]))
    found = [None] * 6
    for i in range(300):
        count = torch.full((6,), i + 1.0, dtype=torch.float64)
        watch, met = criteria(watch, torch.tensor(losses[i]), torch.tensor(slopes[i]), count)
        found = [f or (i + 1 if m else None) for f, m in zip(found, met.tolist(), strict=True)]
        watch = watch._replace(moved=torch.tensor(steps[i]))
    plain = [plain_criteria(losses[:, v], steps[:, v], slopes[:, v], settings) for v in range(6)]
    assert found == plain
    assert any(found)
    if "convergence" in options:
        assert found[5] is None  # a rising loss has not converged


def test_transforms():
    model = make_model("r2star")
    kernel = make_kernel(model)
    positions = torch.tensor([[1.2, 0.0, 3.0], [0.0, 1000.0, 250.0]], dtype=torch.float64)
    linear, sigmoid = Transform(kernel, "linear"), Transform(kernel, "sigmoid")
    z = linear.inverse(positions)
    torch.testing.assert_close(z[1], torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64))
    torch.testing.assert_close(z[0], positions[0])  # an amplitude has one bound
    assert torch.equal(linear.end(z), positions)
    z = sigmoid.inverse(positions)
    edge = 1e-4 * 1000
    inside = torch.tensor([edge, 1000 - edge, 250.0], dtype=torch.float64)
    torch.testing.assert_close(sigmoid(z)[0][1], inside)
    for transform in (linear, sigmoid):
        z = transform.inverse(torch.tensor([[0.5], [300.0]], dtype=torch.float64))
        moved, slope = transform(z + 1e-6)[0] - transform(z - 1e-6)[0], transform(z)[1]
        torch.testing.assert_close(slope, moved / 2e-6, rtol=1e-6, atol=0)


def test_the_linear_state_stays_in_the_box_and_leaves_bounds_at_once():
    model = Line.of([1.0, 2.0, 3.0])
    kernel = make_kernel(model)
    low, high = kernel.lower, kernel.upper
    data = torch.tensor([[30.0], [30.0], [30.0]], dtype=torch.float64)  # beyond the bound of 10
    start = torch.tensor([[9.0], [0.0]], dtype=torch.float64)
    settings = AdamSettings(transform="linear", learning_rate=0.02, iterations=2000)
    states = run(kernel, Voxels(data), start, settings, 200)
    assert all((s.z >= 0).all() and (s.z <= 1).all() for s in states)
    assert float(states[-1].z[0]) == 1.0
    # The slope's optimum given an offset of 10; a closed form of the bounded problem.
    end = minimise(Problem(kernel, Voxels(data), kernel, Voxels(data), settings), start)
    assert float(end.position[0]) == 10.0
    assert float(end.position[1]) == pytest.approx(min(20 * 3 / 5, float(high[1])), rel=1e-4)
    assert bool(end.converged)
    back = Voxels(torch.full_like(data, 9.0))
    turned = State(*Step(kernel, settings)(states[-1]._replace(running=states[0].running), back))
    assert float(turned.z[0]) <= 1.0
    assert float(low[0]) == -10.0


def test_min_is_the_lowest_point_on_the_way_and_final_the_last():
    kernel, voxels, start = nexi_voxels(8)
    settings = {"iterations": 60, "learning_rate": 0.3, **ENDLESS}
    states = run(kernel, voxels, start, AdamSettings(**settings), 60)
    losses = torch.stack([s.loss for s in states[1:]])
    z = torch.stack([s.z for s in states[:-1]])
    least = losses.argmin(0)
    ends = {}
    for output in ("min", "final"):
        problem = Problem(kernel, voxels, kernel, voxels, AdamSettings(output=output, **settings))
        ends[output] = minimise(problem, start)
    unit = loss_unit(kernel, voxels)
    torch.testing.assert_close(ends["min"].cost, losses.min(0).values * unit)
    torch.testing.assert_close(ends["final"].cost, losses[-1] * unit)
    best = torch.stack([z[least[v], :, v] for v in range(8)], 1)
    transform = Transform(kernel, "sigmoid")
    torch.testing.assert_close(ends["min"].position, transform.end(best))
    torch.testing.assert_close(ends["final"].position, transform.end(states[-1].z))
    assert torch.equal(states[-1].z, z[-1])  # the last iteration does not move
    assert (least < 59).any()
    # Costs are those of the kernel where the estimate is.
    for end in ends.values():
        cost = kernel.normal_equations(end.position, voxels).cost
        torch.testing.assert_close(end.cost, cost)


def test_prior_and_weights_give_the_closed_form_of_a_straight_line():
    times = np.array([0.5, 1.0, 2.0, 3.0])
    model = Line.of(times)
    params = {"offset": torch.tensor([0.3, -0.5]), "factor": torch.tensor([1.5, 0.8])}
    data = noisy(model, params, 0.05, 7)
    weights = np.array([1.0, 2.0, 0.0, 0.5])
    sigma = 0.05
    design = np.stack([np.ones(4), times], 1)
    normal = design.T @ (weights[:, None] * design) / sigma**2 + np.diag([1 / 0.1**2, 0])
    right = design.T @ (weights[:, None] * data) / sigma**2 + np.array([[0.2 / 0.1**2], [0]])
    expected = np.linalg.solve(normal, right)
    result = fit(
        model, data, solver="adam", sigma=sigma, weights=weights, prior={"offset": (0.2, 0.1)},
        precision="float64", options={"transform": "linear"},
    )  # fmt: skip
    np.testing.assert_allclose(result.maps["offset"], expected[0], atol=2e-4)
    np.testing.assert_allclose(np.log(result.maps["factor"]), expected[1], atol=2e-4)


@pytest.mark.parametrize("loss", ["l1", "huber"])
def test_robust_losses_agree_with_lm(loss):
    model = make_model("r2star")
    data = noisy(model, draw(model, 60, 8), 0.02, 9)
    data[3, ::2] += 0.4
    lm = fit(model, data, loss=loss, sigma=0.02)
    adam = fit(model, data, loss=loss, sigma=0.02, solver="adam")
    distance = np.abs(adam.maps["R2star"] - lm.maps["R2star"]) / lm.std["R2star"]
    assert np.median(distance) < 0.02
    assert np.quantile(distance, 0.9) < 0.1


def test_rician_agrees_with_lm_also_without_a_noise_level():
    model = make_model("r2star")
    signal = model.signal(draw(model, 40, 10)).numpy()
    rng = np.random.default_rng(11)
    data = np.hypot(
        signal + 0.05 * rng.normal(size=signal.shape), 0.05 * rng.normal(size=signal.shape)
    )
    for sigma in (0.05, None):
        lm = fit(model, data, noise="rician", sigma=sigma)
        adam = fit(model, data, noise="rician", sigma=sigma, solver="adam")
        distance = np.abs(adam.maps["R2star"] - lm.maps["R2star"]) / lm.std["R2star"]
        assert np.nanmedian(distance) < 0.02


def test_down_weighting_mends_outliers_and_leaves_clean_voxels_alone():
    model = make_model("r2star")
    params = {"S0": torch.full((80,), 500.0), "R2star": torch.linspace(15, 40, 80)}
    clean = noisy(model, params, 3.0, 12)
    data = clean.copy()
    data[2, :40] += 150.0
    truth = params["R2star"].numpy()
    plain = fit(model, data, solver="adam")
    robust = fit(model, data, solver="adam", options={"robust": True})

    def error(result, voxels):
        return np.median(np.abs(result.maps["R2star"] - truth)[voxels])

    assert error(robust, slice(40)) < 0.35 * error(plain, slice(40))
    assert error(robust, slice(40, None)) < 1.5 * error(plain, slice(40, None))
    assert (robust.flags & 8 == 0).mean() > 0.9


def test_bad_voxels_are_flagged_and_few_iterations_do_not_converge():
    model = make_model("r2star")
    data = noisy(model, draw(model, 6, 13), 0.02, 14)
    data[2, 1], data[:, 2] = np.nan, 0
    result = fit(model, data, solver="adam", options={"iterations": 5})
    assert (result.flags & 4 > 0).tolist() == [False, True, True, False, False, False]
    assert (result.flags[[0, 3, 4, 5]] & 8).all()
    assert np.isnan(result.maps["R2star"][1])
    assert result.trace["mean_evaluations"] == 5


def test_a_corner_without_a_gradient_is_no_convergence():
    """Steps that are too long lead to where the signal is 0 whatever the parameters."""
    model = make_model("r2star")
    data = noisy(model, draw(model, 60, 1), 0.02, 2)
    best = fit(model, data).nrmse
    for output in ("min", "final"):
        result = fit(model, data, solver="sgdm", options={"transform": "linear", "output": output})
        told = result.flags & 8 > 0
        assert told.any()
        assert (result.nrmse[~told] < 1.02 * best[~told]).all()


def test_a_loss_that_is_not_finite_ends_the_voxel():
    kernel, voxels, start = nexi_voxels(3)
    start[0, 1] = torch.nan
    problem = Problem(kernel, voxels, kernel, voxels, AdamSettings(iterations=30))
    end = minimise(problem, start)
    assert end.evaluations.tolist() == [30, 1, 30]
    assert not end.converged.any()
    assert end.cost.isinf().tolist() == [False, True, False]


def test_the_unit_of_the_loss_follows_data_and_noise():
    model = Line.of([1.0, 2.0, 3.0])
    rng = np.random.default_rng(15)
    data, weight = torch.tensor(rng.normal(size=(3, 4))), torch.tensor(rng.uniform(0.5, 2, (3, 4)))
    variance = torch.full((4,), 0.04, dtype=torch.float64)
    zero = torch.zeros(2, 4, dtype=torch.float64)  # the signal is 0
    for loss in ("l2", "huber", "l1"):
        kernel = make_kernel(model, loss=loss)
        for scale in (1.0, 1000.0):
            voxels = Voxels(scale * data, weight, scale**2 * variance)
            found = kernel.normal_equations(zero, voxels).cost / loss_unit(kernel, voxels)
            if scale == 1:
                first = found
            torch.testing.assert_close(found, first)
        if loss == "l2":
            torch.testing.assert_close(first, torch.ones_like(first))
        if loss == "l1":
            size = (data.abs() * weight.sqrt()).mean(0)
            root = (data**2 * weight).mean(0).sqrt()
            torch.testing.assert_close(first, size / root, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("solver", "options", "words"),
    [
        ("adam", {"learning_rate": 0.0}, r"learning_rate must be a number in \(0, inf\), got 0.0"),
        ("adam", {"iterations": 10.5}, "iterations must be a whole number"),
        ("adam", {"convergence": "slope"}, "convergence must be 'ema' or 'linear'"),
        ("adam", {"robust": 1}, "robust must be True or False"),
        ("adam", {"step_patience": -1}, "step_patience must be a whole number .* or None"),
        ("adam", {"momentum": 0.5}, "no option 'momentum'"),
        ("sgdm", {"momentum": 1.0}, r"momentum must be a number in \[0, 1\)"),
        ("rmsprop", {"output": "best"}, "output must be 'min' or 'final'"),
        ("lm", {"ftol": "small"}, "ftol must be a number"),
        ("adam", {"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_wrong_options_are_refused_by_name(solver, options, words):
    model = make_model("r2star")
    with pytest.raises(EngineError, match=words):
        fit(model, np.ones((8, 1)), solver=solver, options=options)


def test_the_preset_of_the_paper_is_made_of_options():
    settings = get_solver("adam").settings(**ASKADAM_1_0)
    assert (settings.transform, settings.convergence) == ("linear", "linear")
    model = make_model("r2star")
    data = noisy(model, draw(model, 30, 16), 0.02, 17)
    result = fit(model, data, solver="adam", loss="l1", sigma=0.02, options=ASKADAM_1_0)
    lm = fit(model, data, loss="l1", sigma=0.02)
    distance = np.abs(result.maps["R2star"] - lm.maps["R2star"]) / lm.std["R2star"]
    assert np.median(distance) < 0.1


class Neighbours:
    """weight / 2 times the sum of squared differences of the first parameter's neighbours."""

    def __init__(self, weight):
        self.weight = weight

    def value(self, x):
        return 0.5 * self.weight * (x[0].diff() ** 2).sum()

    def gradient(self, x):
        out = torch.zeros_like(x)
        out[0, 1:] += self.weight * x[0].diff()
        out[0, :-1] -= self.weight * x[0].diff()
        return out


def line_problem(n):
    times = np.array([0.5, 1.0, 2.0, 3.0])
    model = Line.of(times)
    params = {"offset": torch.linspace(-1, 1, n), "factor": torch.linspace(0.7, 1.6, n)}
    data = noisy(model, params, 0.2, 18)
    return times, make_kernel(model), torch.tensor(data)


def test_a_coupled_objective_reaches_its_closed_form_in_blocks_of_any_size():
    n, weight = 30, 5.0
    times, kernel, data = line_problem(n)
    design = np.stack([np.ones(4), times], 1)
    laplace = np.diff(np.eye(n), axis=0)
    normal = np.kron(design.T @ design, np.eye(n)) / 0.04
    normal[:n, :n] += weight * laplace.T @ laplace
    right = (design.T @ data.numpy() / 0.04).ravel()
    expected = np.linalg.solve(normal, right).reshape(2, n)
    unit = torch.full((n,), 0.04, dtype=torch.float64)
    start = torch.zeros(2, n, dtype=torch.float64)
    # The step criterion would end it early: voxels at rest make the step small on average.
    settings = AdamSettings(
        transform="linear", learning_rate=1e-2, decay_rate=1e-2,
        convergence_value=0.0, step_tolerance=0.0, gradient_tolerance=1e-3,
    )  # fmt: skip
    term = Neighbours(weight)
    ends, shares = [], []
    for cuts in ([0, 30], [0, 7, 11, 30]):
        blocks = [(slice(a, b), Voxels(data[:, a:b])) for a, b in itertools.pairwise(cuts)]
        end = minimise_whole(kernel, blocks, start, unit, [term], settings, shares.append)
        np.testing.assert_allclose(end.lowest.numpy(), expected, atol=2e-3)
        np.testing.assert_allclose(end.final.numpy(), expected, atol=2e-3)
        cost = kernel.normal_equations(end.lowest, Voxels(data)).cost / unit
        assert min(end.trace) == pytest.approx(float(cost.sum() + term.value(end.lowest)))
        assert end.converged
        assert end.position("min") is end.lowest
        ends.append(end)
    assert len(ends[0].trace) == len(ends[1].trace)
    torch.testing.assert_close(ends[0].lowest, ends[1].lowest, rtol=1e-9, atol=1e-9)
    assert shares[-1] == 1.0


def test_without_terms_all_voxels_together_move_as_one_by_one():
    _, kernel, data = line_problem(12)
    start = torch.zeros(2, 12, dtype=torch.float64)
    settings = AdamSettings(iterations=40, **ENDLESS)
    unit = loss_unit(kernel, Voxels(data))
    whole = minimise_whole(kernel, [(slice(0, 12), Voxels(data))], start, unit, [], settings)
    states = run(kernel, Voxels(data), start, settings, 40)
    assert torch.equal(whole.final, Transform(kernel, "sigmoid").end(states[-1].z))
    assert whole.trace[-1] == pytest.approx(float(states[-1].loss.sum()))
    assert not whole.converged
    with pytest.raises(EngineError, match="robust"):
        minimise_whole(kernel, [], start, unit, [], AdamSettings(robust=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_equals_eager(monkeypatch):
    model = make_model("nexi")
    data = noisy(model, draw(model, 300, 19), 0.02, 20)
    data = data[:, data[0] > 0]
    options = {"iterations": 200, "learning_rate": 0.03}
    eager = fit(model, data, solver="adam", starts=1, options=options)
    monkeypatch.setenv(COMPILE_VARIABLE, "always")
    compiled = fit(model, data, solver="adam", starts=1, options=options)
    assert compiled.settings["compiled"]
    blocks = fit(model, data, solver="adam", starts=1, options=options, block_size=77)
    for name in model.parameter_names:
        distance = np.abs(compiled.maps[name] - eager.maps[name]) / eager.std[name]
        assert np.nanquantile(distance, 0.95) < 0.02
        np.testing.assert_array_equal(compiled.maps[name], blocks.maps[name])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_coupled_objective_equals_eager():
    _, kernel, data = line_problem(30)
    start = torch.zeros(2, 30, dtype=torch.float64)
    unit = torch.ones(30, dtype=torch.float64)
    blocks = [(slice(0, 20), Voxels(data[:, :20])), (slice(20, 30), Voxels(data[:, 20:]))]
    ends = [
        minimise_whole(
            kernel, blocks, start, unit, [Neighbours(1.0)],
            AdamSettings(iterations=30, compiled=compiled, lanes=8),
        )
        for compiled in (False, True)
    ]  # fmt: skip
    assert kernel.runs_compiled
    torch.testing.assert_close(ends[0].final, ends[1].final, rtol=1e-9, atol=1e-9)
