"""Errors of NEXI from the truth, with graymatter_swissknife beside it on voxels of the same data.

The acquisition is Table S1 of Chan et al. 2025: 15 shells of 64 directions, with Rician noise of
1/50 in every image. The truth is uniform: fn .1 to .8, dn 1.5 to 3, de .5 to 1.5 um^2/ms, tex 2 to
50 ms. ML has no prior, MAP the weak one, which the report states with the bounds of the fit.

graymatter_swissknife 1.4.3 (with xgboost-cpu, from PyPI) fits the first voxels, if installed, by
its default route: least squares of the expected Rician magnitude from a grid search. It takes
about a second for each voxel.

    python benchmarks/nexi_accuracy.py [--voxels 5000] [--peer-voxels 100]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time

import numpy as np
import torch
from protocols import DELTA, RESULTS, B, machine

from bids_gacelle.engine import DiffusionScheme, fit, get_model

DIRECTIONS, SNR = 64, 50
RANGES = {"tex": (2.0, 50.0), "dn": (1.5, 3.0), "de": (0.5, 1.5), "fn": (0.1, 0.8)}
PEER = "graymatter_swissknife"
PEER_NAMES = {"tex": 0, "dn": 1, "de": 2, "fn": 3}


def simulate(n):
    """Return the model, true parameters and averages of magnitudes (shells, voxels)."""
    rng = np.random.default_rng(11)
    truth = {name: rng.uniform(*box, n) for name, box in RANGES.items()}
    model = get_model("nexi")(DiffusionScheme(b=B, big_delta=DELTA, n_directions=DIRECTIONS))
    clean = model.signal({k: torch.tensor(v) for k, v in truth.items()}).numpy()
    total = np.zeros_like(clean)
    for _ in range(DIRECTIONS):
        real, imaginary = rng.normal(scale=1 / SNR, size=(2, *clean.shape))
        total += np.hypot(clean + real, imaginary)
    return model, truth, total / DIRECTIONS


def score(model, maps, truth, n):
    """Return errors of the first `n` voxels by parameter, and the share of them at a bound."""
    rows, at_bound = {}, np.zeros(n, bool)
    for parameter in model.parameters:
        found, true = maps[parameter.name][:n].astype(float), truth[parameter.name][:n]
        low, high = parameter.bounds
        limit = np.isclose(found, low, rtol=0, atol=1e-4 * (high - low))
        at_bound |= limit | np.isclose(found, high, rtol=0, atol=1e-4 * (high - low))
        rows[parameter.name] = {
            "rmse": float(np.sqrt(np.mean((found - true) ** 2))),
            "mean_bias": float(np.mean(found - true)),
            "median_absolute_error": float(np.median(np.abs(found - true))),
        }
    return rows | {"voxels": n, "share_at_a_bound": float(at_bound.mean())}


def peer_maps(data):
    """Return the maps of graymatter_swissknife, and seconds per voxel of this process' CPU."""
    from graymatter_swissknife.models.find_model import find_model
    from graymatter_swissknife.models.parameters.acq_parameters import AcquisitionParameters
    from graymatter_swissknife.nls.gridsearch import find_nls_initialization
    from graymatter_swissknife.nls.nls import nls_parallel

    model = find_model("NexiRiceMean")
    acquisition = AcquisitionParameters(B, DELTA, small_delta=None)
    n = data.shape[1]
    sigma = np.full(n, 1 / SNR)
    np.random.seed(123)  # noqa: NPY002, its grid search draws from there
    start = find_nls_initialization(
        data.T, sigma, n, acquisition, model, model.param_lim, model.grid_search_nb_points
    )
    began = time.process_time()
    found, _ = nls_parallel(
        data.T,
        n,
        model,
        acquisition,
        nls_param_lim=model.param_lim,
        max_nls_verif=1,
        initial_gt=start,
        n_cores=1,
    )
    seconds = (time.process_time() - began) / n
    return {name: found[:, i] for name, i in PEER_NAMES.items()}, seconds


def ours(model, data, prior):
    """Fit all voxels; the noise of an average of 64 directions is an eighth of that of one."""
    return fit(model, data, sigma=1 / SNR / np.sqrt(DIRECTIONS), noise="rician", prior=prior)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voxels", type=int, default=5_000)
    parser.add_argument("--peer-voxels", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, truth, data = simulate(arguments.voxels)
    results = {"ml": ours(model, data, None), "map": ours(model, data, "weak")}
    maps = {way: result.maps for way, result in results.items()}
    report = {
        "machine": machine(),
        "directions": DIRECTIONS,
        "rician_sigma_of_an_image": 1 / SNR,
        "truth": RANGES,
        "bounds": {p.name: p.bounds for p in model.parameters},
        "map_prior": results["map"].settings["prior"],
        "starts": results["ml"].settings["starts"],
        "all_voxels": {w: score(model, m, truth, arguments.voxels) for w, m in maps.items()},
    }
    try:
        version = importlib.metadata.version(PEER)
    except importlib.metadata.PackageNotFoundError:
        print(f"{PEER} is not installed: its voxels are left out")
    else:
        n = min(arguments.peer_voxels, arguments.voxels)
        maps["peer"], seconds = peer_maps(data[:, :n])
        report["peer"] = {"name": PEER, "version": version, "cpu_seconds_per_voxel": seconds}
        report["peer_voxels"] = {w: score(model, m, truth, n) for w, m in maps.items()}
        for way in ("ml", "map"):
            report["peer_voxels"][way]["rmse_ratio_to_peer"] = {
                name: report["peer_voxels"][way][name]["rmse"]
                / report["peer_voxels"]["peer"][name]["rmse"]
                for name in PEER_NAMES
            }
    print(json.dumps(report, indent=2))
    (RESULTS / "nexi_accuracy.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
