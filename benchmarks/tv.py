"""Time total variation: ADMM around Levenberg-Marquardt against Adam, in one process.

A phantom of 48 x 48 x 24 voxels, NEXI, SNR 50, GACELLE's objective: mean |residual| plus 0.001 x
mean |gradient of fn|. Adam starts from the best dictionary entry of each voxel, as GACELLE does,
and makes 2,000 iterations of its default step size. ADMM is stopped at the first iteration whose
objective is no higher: the time to the objective includes the voxel-wise fit it starts from, that
to the maps also the last fit and standard deviations. Times are those of the process' CPU on one
thread, without compilation; of ADMM the least of three. The result goes to benchmarks/results/.

    python benchmarks/tv.py [--iterations 2000] [--eager-iterations 200]
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from protocols import DELTA, RESULTS, B, machine

from bids_gacelle.engine import TV, DiffusionScheme, get_model
from bids_gacelle.engine.objective import make_objective
from bids_gacelle.engine.regularise import Geometry
from bids_gacelle.engine.result import Maps
from bids_gacelle.engine.solvers import get_solver
from bids_gacelle.engine.solvers.admm import AdmmSettings
from bids_gacelle.engine.spatial_fit import plan_spatial
from bids_gacelle.engine.starts import build_dictionary, find_starts
from bids_gacelle.engine.study import Study

GRID = (48, 48, 24)
SD = 1 / 50
WEIGHT = 1e-3
CPU = torch.device("cpu")


def phantom():
    """Return true maps of a ball, a slab and their surroundings."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in GRID), indexing="ij")
    ball, slab = x**2 + y**2 + z**2 < 0.5, z > 0.3
    return {
        "fn": np.where(ball, 0.65, 0.4) + np.where(slab, 0.1, 0.0),
        "dn": np.where(ball, 2.4, 2.0),
        "de": np.where(slab, 0.8, 1.1),
        "tex": np.where(ball, 25.0, 12.0),
    }


class Case:
    """One problem with its solvers, compiled or eager."""

    def __init__(self, model, data, compiled):
        objective = make_objective(model, "gaussian", "l1", None, GRID)
        lm = get_solver("lm")
        terms = [TV(["fn"], WEIGHT, "3d", convention="gacelle")]
        self.plan = plan_spatial(terms, (1.0, 1.0, 1.0), model, GRID, lm)
        self.study = Study(model, data, sigma=SD)
        settings = AdmmSettings(starts=1, compiled=compiled, compiled_fully=compiled)
        fitting = importlib.import_module("bids_gacelle.engine.fit")
        self.fitter = fitting._Fitter(model, objective, lm, torch.float32, CPU, settings)
        self.blocks = self.fitter.plan(self.study, None, self.study.n, 1, pulled=True)
        self.fitter.follow(self.blocks)
        self.model, self.compiled = model, compiled

    def admm(self, iterations):
        """Return CPU seconds (in all, after each iteration), objectives and the map of fn."""
        self.fitter.settings = replace(self.fitter.settings, spatial_iterations=iterations)
        maps = Maps(self.model, self.study.n)
        began, steps = time.process_time(), []
        trace = self.plan.fit(
            self.fitter,
            self.study,
            maps,
            self.blocks,
            lambda share: steps.append(time.process_time() - began),
        )
        seconds = time.process_time() - began
        return (seconds, steps), trace["objective"], maps.result(self.study, {}).maps["fn"]

    def adam(self, iterations, rate):
        """Return CPU seconds, objectives and the map of fn after so many iterations."""
        solver = get_solver("adam")
        module = importlib.import_module("bids_gacelle.engine.solvers.adam")
        kernel = self.fitter.kernel
        block = self.study.block(0, self.study.n, CPU)
        voxels = self.fitter.problem(kernel, self.fitter.with_noise(block)).voxels
        geometry = Geometry(GRID, self.study.index, self.plan.voxel_size)
        terms = [t for r in self.plan.regularisers for t in r.bind(kernel, geometry)]
        start = find_starts(kernel, voxels, build_dictionary(kernel, 512, 1, 0))[0]
        unit = torch.full_like(start[0], SD * voxels.data.numel())
        settings = solver.settings(
            iterations=iterations,
            learning_rate=rate,
            convergence_value=0.0,
            step_tolerance=0.0,
            gradient_tolerance=0.0,
            compiled=self.compiled,
        )
        began = time.process_time()
        whole = module.minimise_whole(
            kernel, [(slice(0, self.study.n), voxels)], start, unit, terms, settings
        )
        seconds = time.process_time() - began
        return seconds, whole.trace, whole.lowest[0].reshape(GRID).numpy()


def error(found, truth):
    return float(np.sqrt(((found - truth) ** 2).mean()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--eager-iterations", type=int, default=200, help="extrapolated from")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=RESULTS / "tv.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = get_model("nexi")(DiffusionScheme(b=B, big_delta=DELTA))
    truth = phantom()
    signal = model.signal({k: torch.tensor(v) for k, v in truth.items()}).numpy()
    data = signal + np.random.default_rng(1).normal(size=signal.shape) * SD
    rate = arguments.learning_rate
    with torch.no_grad():
        quick, slow = (Case(model, data, compiled) for compiled in (True, False))
        quick.adam(3, rate)  # compiles
        adam_seconds, adam_trace, adam_fn = quick.adam(arguments.iterations, rate)
        eager_seconds, eager_trace, _ = slow.adam(arguments.eager_iterations, rate)
        eager_seconds *= arguments.iterations / len(eager_trace)
        goal = min(adam_trace)
        quick.admm(2)
        (full_seconds, _), full_trace, full_fn = quick.admm(100)
        needed = next((k for k, j in enumerate(full_trace) if j <= goal), None)
        result = {
            "weight": WEIGHT,
            "voxels": int(np.prod(GRID)),
            "adam_iterations": len(adam_trace),
            "adam_objective": goal,
            "adam_seconds_compiled": adam_seconds,
            "adam_seconds_eager": eager_seconds,
            "adam_rmse_fn": error(adam_fn, truth["fn"]),
            "voxelwise_objective": full_trace[0],
            "admm_iterations": len(full_trace) - 1,
            "admm_objective": full_trace[-1],
            "admm_seconds_to_end": full_seconds,
            "admm_rmse_fn": error(full_fn, truth["fn"]),
            "admm_iterations_to_goal": needed,
        }
        if needed is not None:
            # Runs to exactly there; the first step is the voxel-wise fit.
            runs = [quick.admm(max(needed, 1)) for _ in range(3)]
            fn = runs[0][2]
            to_objective = min(steps[needed] for (_, steps), _, _ in runs)
            to_maps = min(seconds for (seconds, _), _, _ in runs)
            result |= {
                "admm_seconds_to_objective": to_objective,
                "admm_seconds_to_maps": to_maps,
                "ratio_to_objective": adam_seconds / to_objective,
                "ratio_to_maps": adam_seconds / to_maps,
                "ratio_to_objective_eager_adam": eager_seconds / to_objective,
                "rmse_fn_at_goal": error(fn, truth["fn"]),
            }
    print(json.dumps(result, indent=2))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        json.dumps({"machine": machine(), "results": [result]}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
