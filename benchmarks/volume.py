"""A whole brain: 250,000 voxels, warm and cold, and how many reach the best known minimum.

Wall times of the fit alone (no files), with all cores: meant for a machine that does nothing else.
"Cold" is a new process with an empty kernel cache, imports and all. The best known minimum is the
lowest of 36 random starts and of the fit itself.

    python benchmarks/volume.py [--voxels 250000] [--threads 2] [--device cpu] [--part times rates]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from protocols import RESULTS, cases, machine

from bids_gacelle.engine import fit
from bids_gacelle.engine.kernels import Kernel, Voxels
from bids_gacelle.engine.objective import Objective
from bids_gacelle.engine.solvers import Problem
from bids_gacelle.engine.solvers.lm import LmSettings, minimise

RANDOM_STARTS = 36
MODELS = ("nexi", "nexi2", "axcalibersmt", "r2star", "sandi")
# Models that are timed with one start; the others with as many as they have by default.
ONE_START = ("nexi", "nexi2", "axcalibersmt", "r2star")
NO_RATES = ("r2star", "sandi")


def time_warm(case, device, repeats=5):
    data, usable = case.data()
    data = data[:, usable].astype(np.float32)
    starts = 1 if case.name in ONE_START else case.model.starts
    options = {"sigma": 1 / case.snr, "starts": starts, "device": device}
    fit(case.model, data, **options)  # compiles
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = fit(case.model, data, **options)
        seconds.append(time.perf_counter() - began)
    return {
        "model": case.name,
        "snr": case.snr,
        "voxels": data.shape[1],
        "starts": starts,
        "device": result.settings["device"],
        "compiled": result.settings["compiled"],
        "seconds": sorted(seconds),
        "memory_peak": result.settings["memory_peak"],
    }


def time_cold(voxels, threads, model):
    """Time a process that makes the data and fits them, with an empty cache."""
    code = (
        "import numpy as np, torch; from protocols import cases; "
        "from bids_gacelle.engine import fit; "
        f"torch.set_num_threads({threads}); case = next(cases({voxels}, [{model!r}])); "
        "data, usable = case.data(); "
        "result = fit(case.model, data[:, usable], sigma=1 / case.snr, starts=1); "
        "print(result.settings['compiled'])"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        environment.pop("BIDS_GACELLE_COMPILE", None)
        began = time.perf_counter()
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - began
    return {"model": model, "voxels": voxels, "cold_seconds": seconds, "compiled": ran.stdout}


def success(case):
    """Return the shares of voxels within 0.1 in chi-square of the best known minimum."""
    data, usable = case.data(seed=2)
    data = torch.tensor(data[:, usable], dtype=torch.float32)
    model, n = case.model, data.shape[1]
    kernel = Kernel(model, Objective(), torch.float32, torch.device("cpu"))
    box = torch.tensor(kernel.box, dtype=torch.float32)
    unit = torch.tensor(np.random.default_rng(3).random((len(box), RANDOM_STARTS * n)))
    random = (box[:, :1] + (box[:, 1:] - box[:, :1]) * unit).float()
    voxels = Voxels(data)
    with torch.no_grad():
        ends = minimise(Problem(kernel, voxels, kernel, voxels, LmSettings()), random)
    best = ends.cost.reshape(RANDOM_STARTS, n).amin(0)
    costs = {}
    for starts in (1, 2, 4):
        maps = fit(model, data, sigma=1 / case.snr, starts=starts).maps
        position = kernel.coordinates({k: torch.tensor(maps[k]) for k in model.parameter_names})
        costs[starts] = kernel.normal_equations(position, voxels).cost
        best = torch.minimum(best, costs[starts])
    reached = {
        starts: float((2 * (cost - best) * case.snr**2 < 0.1).float().mean())
        for starts, cost in costs.items()
    }
    return {"model": case.name, "snr": case.snr, "voxels": n, "reached_by_starts": reached}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voxels", type=int, default=250_000)
    parser.add_argument("--rate-voxels", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", nargs="+", default=["times", "cold", "rates"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = {"machine": machine()}
    if "rates" in arguments.part:
        named = [m for m in arguments.models if m not in NO_RATES]
        report["rates"] = [success(case) for case in cases(arguments.rate_voxels, named)]
        print(json.dumps(report["rates"], indent=1), flush=True)
    if "cold" in arguments.part:
        report["cold"] = time_cold(arguments.voxels, arguments.threads, "nexi2")
        print(json.dumps(report["cold"]), flush=True)
    if "times" in arguments.part:
        os.environ["BIDS_GACELLE_COMPILE"] = "always"
        report["warm"] = []
        for case in cases(arguments.voxels, arguments.models):
            report["warm"].append(time_warm(case, arguments.device))
            print(json.dumps(report["warm"][-1]), flush=True)
    out = RESULTS / ("volume.json" if arguments.device == "cpu" else "volume_gpu.json")
    before = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(before | report, indent=2) + "\n")


if __name__ == "__main__":
    main()
