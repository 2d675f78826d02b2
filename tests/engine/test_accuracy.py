"""How often the best minimum is found, and how far estimates lie from the truth."""

import numpy as np
import pytest
import torch

from bids_gacelle.engine import fit
from bids_gacelle.engine.kernels import Kernel, Voxels
from bids_gacelle.engine.objective import Objective
from bids_gacelle.engine.solvers import Problem
from bids_gacelle.engine.solvers.lm import LmSettings, minimise

from .helpers import make_model, noisy

N = 150
RANDOM = 36


def tissue(l_max, seed):
    rng = np.random.default_rng(seed)
    boxes = {"fn": (0.1, 0.8), "dn": (1.5, 3), "de": (0.5, 1.5), "tex": (2, 50), "p2": (0.05, 0.5)}
    names = list(boxes)[: 5 if l_max else 4]
    return {name: torch.tensor(rng.uniform(*boxes[name], N)) for name in names}


@pytest.mark.parametrize(
    ("l_max", "snr", "least"), [(0, 50, 0.83), (2, 50, 0.94), (0, 400, 0.97), (2, 400, 0.97)]
)
def test_four_starts_find_the_best_of_many_random_ones(l_max, snr, least):
    model = make_model("nexi", l_max=l_max)
    data = torch.tensor(noisy(model, tissue(l_max, 1), 1 / snr, 2))
    kernel = Kernel(model, Objective(), torch.float64, torch.device("cpu"))
    low, high = torch.tensor(kernel.box).T[..., None]
    unit = torch.tensor(np.random.default_rng(3).random((len(low), RANDOM * N)))
    voxels = Voxels(data)
    problem = Problem(kernel, voxels, kernel, voxels, LmSettings())
    random = minimise(problem, low + (high - low) * unit).cost.reshape(RANDOM, N).amin(0)
    maps = fit(model, data, sigma=1 / snr, starts=4).maps
    position = kernel.coordinates(
        {k: torch.tensor(maps[k]).double() for k in model.parameter_names}
    )
    found = kernel.normal_equations(position, voxels).cost
    gap = 2 * (found - torch.minimum(found, random)) * snr**2
    assert float((gap < 0.1).double().mean()) >= least


def test_a_weak_prior_brings_estimates_nearer_to_the_truth():
    model = make_model("nexi")
    truth = tissue(0, 4)
    data = noisy(model, truth, 1 / 50, 5)
    likely, drawn = (fit(model, data, sigma=1 / 50, prior=prior) for prior in (None, "weak"))

    def error(result, name):
        change = np.log if name == "tex" else np.asarray
        return np.sqrt(np.mean((change(result.maps[name]) - change(truth[name].numpy())) ** 2))

    for name in model.parameter_names:
        assert error(drawn, name) < 0.7 * error(likely, name)
