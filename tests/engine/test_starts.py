"""Starts of models whose linear parameters are projected: against scipy and brute force."""

from itertools import product

import numpy as np
import pytest
import scipy.optimize
import torch

from bids_gacelle.engine import EngineError, Parameter, fit
from bids_gacelle.engine.kernels import Kernel, Voxels
from bids_gacelle.engine.objective import Objective
from bids_gacelle.engine.simplex import Mixing, best_weights, lowest_cost
from bids_gacelle.engine.starts import build_dictionary, find_starts

from .helpers import Line, draw, make_model, noisy

CPU = torch.device("cpu")


def mixing(signals, data):
    """The problem of signals (K, M, N) and data (M, N)."""
    others = signals[:-1] - signals[-1]
    offset = data - signals[-1]
    gram = [[(a * b).sum(0) for b in others] for a in others]
    return Mixing(gram, [(a * offset).sum(0) for a in others])


def by_scipy(signals, data):
    """Best weights of one problem, (K, M) and (M,), by non-negative least squares.

    A heavy last row holds their sum at 1.
    """
    heavy = 1e5
    matrix = np.vstack([signals.T, np.full(len(signals), heavy)])
    return scipy.optimize.nnls(matrix, np.append(data, heavy))[0]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_weights_on_the_simplex_agree_with_scipy(k):
    rng = np.random.default_rng(k)
    signals = rng.random((k, 9, 300))
    # Data near the simplex and far from it, so that faces of all sizes hold a minimum.
    weights = rng.normal(1 / k, 0.5, (k, 300))
    data = (weights * signals.transpose(1, 0, 2)).sum(1) + rng.normal(0, 0.1, (9, 300))
    problem = mixing(torch.tensor(signals), torch.tensor(data))
    found = best_weights(problem).numpy()
    expected = np.stack([by_scipy(signals[..., n], data[:, n]) for n in range(300)], 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    sizes = (found > 1e-9).sum(0)
    assert set(sizes) == set(range(1, k + 1))
    residual = ((found[:, None] * signals).sum(0) - data) ** 2
    cost = residual.sum(0) - ((data - signals[-1]) ** 2).sum(0)
    np.testing.assert_allclose(lowest_cost(problem), cost, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_signals_still_have_a_best_mixture(k, dtype):
    rng = np.random.default_rng(k)
    signals = np.repeat(rng.random((1, 9, 50)), k, axis=0)
    signals[0, :, ::2] += 0.3  # every other problem has one that differs
    data = signals[0] + rng.normal(0, 0.01, (9, 50))
    problem = mixing(torch.tensor(signals, dtype=dtype), torch.tensor(data, dtype=dtype))
    weights = best_weights(problem).numpy()
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-6)
    misfit = (((weights[:, None] * signals).sum(0) - data) ** 2).sum(0)
    expected = [
        ((by_scipy(signals[..., n], data[:, n]) @ signals[..., n] - data[:, n]) ** 2).sum()
        for n in range(50)
    ]
    np.testing.assert_allclose(misfit, expected, atol=1e-6)


def problem(name, n, weighted, dtype=torch.float64, **options):
    model = make_model(name, **options)
    data = torch.tensor(noisy(model, draw(model, n, 21), 0.02, 22), dtype=dtype)
    weight = None
    if weighted:
        weight = torch.tensor(np.random.default_rng(23).uniform(0.2, 2, data.shape), dtype=dtype)
        weight[2] = 0
    kernel = Kernel(model, Objective(), dtype, CPU)
    return kernel, Voxels(data, weight, inputs={})


CASES = pytest.mark.parametrize(
    ("name", "options"), [("axcalibersmt", {}), ("sandi", {}), ("nexi", {"l_max": 2})]
)


@CASES
@pytest.mark.parametrize("weighted", [False, True])
def test_starts_are_the_best_of_each_region_over_all_linear_parameters(name, options, weighted):
    kernel, voxels = problem(name, 40, weighted, **options)
    dictionary = build_dictionary(kernel, 64, 2, 0)
    starts = find_starts(kernel, voxels, dictionary)
    weight = np.ones(voxels.data.shape) if voxels.weight is None else voxels.weight.numpy()
    mixtures = dictionary.signal.numpy().swapaxes(0, 1)
    for start, region in zip(starts, dictionary.regions, strict=True):
        found = kernel.signal(start, {}).numpy() - voxels.data.numpy()
        found = (weight * found**2).sum(0)
        for v in range(40):
            root = np.sqrt(weight[:, v])
            y = root * voxels.data[:, v].numpy()
            costs = []
            for e in region.tolist():
                signals = root * mixtures[:, e]
                costs.append(((by_scipy(signals, y) @ signals - y) ** 2).sum())
            assert found[v] == pytest.approx(min(costs), abs=1e-8)


@CASES
def test_starts_do_not_depend_on_precision_or_neighbours(name, options):
    kernel, voxels = problem(name, 3000, True, dtype=torch.float32, **options)
    dictionary = build_dictionary(kernel, 512, 3, 0)
    together = find_starts(kernel, voxels, dictionary)
    alone = find_starts(kernel, voxels.take(slice(100, 107)), dictionary)
    assert torch.equal(together[..., 100:107], alone)
    double, exact = problem(name, 3000, True, **options)
    expected = find_starts(double, exact, build_dictionary(double, 512, 3, 0))
    same = (together - expected).abs().amax((0, 1)) < 1e-3
    assert float(same.double().mean()) > 0.95  # others have two entries that are as good
    power = (exact.weight * exact.data**2).sum(0)
    worse = torch.stack(
        [
            (double.sums(one.double(), exact)[0] - double.sums(other, exact)[0]) / power
            for one, other in zip(together, expected, strict=True)
        ]
    )
    assert float(worse.max()) < 1e-4
    assert float((worse < 1e-6).double().mean()) > 0.99
    assert bool(((together >= kernel.lower) & (together <= kernel.upper)).all())


def test_few_searched_parameters_are_searched_within_their_bounds():
    kernel, _ = problem("axcalibersmt", 4, False)
    dictionary = build_dictionary(kernel, 512, 2, 0)
    diameter, deperp = dictionary.position[0], dictionary.position[3]
    assert float(diameter.min()) < 0.5
    assert float(diameter.max()) > 19.5
    assert float(deperp.min()) < 0.05
    small, large = (diameter[region] for region in dictionary.regions)
    assert len(small) == len(large)
    assert float(small.max()) <= float(large.min())


def test_axcalibersmt_finds_the_optimum_that_many_random_starts_find():
    model = make_model("axcalibersmt")
    snr = 100
    params = draw(model, 24, 24)
    data = noisy(model, params, 1 / snr, 25)
    result = fit(model, data, precision="float64")
    maps = {k: torch.tensor(result.maps[k], dtype=torch.float64) for k in model.parameter_names}
    cost = ((model.signal(maps).numpy() - data) ** 2).sum(0)
    low, high = (np.array([p.bounds[i] for p in model.parameters]) for i in (0, 1))
    rng = np.random.default_rng(26)

    def residual(x, y):
        params = {k: torch.tensor([v]) for k, v in zip(model.parameter_names, x, strict=True)}
        return model.signal(params).numpy()[:, 0] - y

    best = np.array([
        min(
            2 * scipy.optimize.least_squares(
                residual, rng.uniform(low, high), bounds=(low, high), args=(y,)
            ).cost
            for _ in range(6)
        )
        for y in data.T
    ])  # fmt: skip
    assert (snr**2 * (cost - best) < 0.1).mean() > 0.9


class Guessing(Line):
    """Line through two levels at its ends, whose mixture is the offset, with a useless guess."""

    name = "guessing"
    linear = ("offset",)
    parameters = (
        Parameter("offset", "1", "Offset", bounds=(0.0, 1.0), start=(0.4, 0.6)),
        Parameter("factor", "1", "Factor", bounds=(0.1, 10.0), coordinate="log"),
    )

    def mixture(self, params, inputs=None):
        zero = torch.zeros_like(params["factor"])
        return torch.stack([self.signal({**params, "offset": zero + v}) for v in (0, 1)])

    def unmix(self, weights):
        return {"offset": weights[1]}

    def guess(self, data, inputs=None):
        missing = torch.full_like(data[0], torch.nan)
        return {"offset": missing, "factor": missing}


class Loud(Guessing):
    parameters = (*Guessing.parameters, Parameter("a", "1", "Scale", amplitude=True))


@pytest.mark.parametrize("starts", [1, 2])
def test_projected_starts_take_the_place_of_a_missing_guess(starts):
    model = Guessing.of([1.0, 2.0, 3.0])
    kernel = Kernel(model, Objective(), torch.float64, CPU)
    truth = [{"offset": o, "factor": f} for o, f in product((0.0, 0.3, 1.0), (0.2, 1.0, 5.0))]
    params = {k: torch.tensor([t[k] for t in truth]).double() for k in ("offset", "factor")}
    data = model.signal(params)
    found = find_starts(
        kernel, Voxels(data, None, inputs={}), build_dictionary(kernel, 64, starts, 0)
    )
    misfit = (kernel.signal(found[0], {}) - data).abs().amax(0)
    assert float(misfit.max()) < 0.15  # the slope is off by 1/64 of its range or less


class Unbounded(Guessing):
    parameters = (Guessing.parameters[0], Parameter("factor", "1", "Factor", start=(0.5, 2.0)))


def test_without_bounds_the_start_box_is_searched():
    kernel = Kernel(Unbounded.of([1.0, 2.0]), Objective(), torch.float64, CPU)
    factor = build_dictionary(kernel, 64, 1, 0).position[1]
    assert 0.5 <= float(factor.min()) < 0.6
    assert 1.9 < float(factor.max()) <= 2.0


def test_amplitudes_cannot_be_mixed():
    kernel = Kernel(Loud.of([1.0, 2.0]), Objective(), torch.float64, CPU)
    with pytest.raises(EngineError, match=r"guessing mixes 2 signals; .* no amplitude"):
        build_dictionary(kernel, 64, 1, 0)
