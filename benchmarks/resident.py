"""250,000 voxels whose data are on the GPU already: starts, Levenberg-Marquardt, and why so long.

Times are wall times between synchronisations, warm, compiled, one start; `fit` is the whole call
from an array of the host to maps, with standard deviations in double precision. The profile counts
the kernels of one run; the share of the time in which none runs is what launches and the host's
decisions cost. The arithmetic of a step is counted by its compiled kernel's time alone.

    python benchmarks/resident.py [--voxels 250000] [--models nexi nexi2 axcalibersmt r2star]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from protocols import RESULTS, cases, machine

from bids_gacelle.engine import fit
from bids_gacelle.engine.kernels import Kernel, Voxels
from bids_gacelle.engine.objective import Objective
from bids_gacelle.engine.solvers import Problem
from bids_gacelle.engine.solvers.lm import LmSettings, minimise, solve
from bids_gacelle.engine.starts import build_dictionary, find_starts


def seconds(call, repeats=10):
    call()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)


def profile(call):
    """Return how many kernels a call runs, their time in all, and the longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    rows = [
        (event.key[:80], event.count, event.device_time_total / 1e6)
        for event in found.key_averages()
        if event.device_time_total
    ]
    rows.sort(key=lambda row: -row[2])
    return {
        "kernels": sum(count for _, count, _ in rows),
        "kernel_seconds": sum(time for *_, time in rows),
        "longest": rows[:8],
    }


def run_case(case, sizes):
    device = torch.device("cuda")
    data, usable = case.data()
    host = data[:, usable].astype(np.float32)
    kernel = Kernel(case.model, Objective(), torch.float32, device)
    exact = Kernel(case.model, Objective(), torch.float64, device)
    scale = 1 if kernel.amplitude is None else np.abs(host).max(0)  # as in `fit`
    voxels = Voxels(torch.tensor(host / scale, device=device))
    row = {"model": case.name, "snr": case.snr, "voxels": host.shape[1]}
    with torch.no_grad():
        for lanes in sizes:
            settings = LmSettings(starts=1, compiled=True, compiled_fully=True, lanes=lanes)
            problem = Problem(kernel, voxels, exact, voxels, settings)
            dictionary = build_dictionary(kernel, settings.dictionary, 1, 0)
            starts = find_starts(kernel, voxels, dictionary, compiled=True)[0]
            row[f"lanes_{lanes}"] = {
                "solve_seconds": seconds(lambda p=problem: solve(p)),
                "starts_seconds": seconds(
                    lambda d=dictionary: find_starts(kernel, voxels, d, compiled=True)
                ),
                "minimise_seconds": seconds(lambda p=problem, s=starts: minimise(p, s)),
                "mean_evaluations": float(solve(problem).evaluations.float().mean()),
                "profile": profile(lambda p=problem: solve(p)),
            }
            kernel.compiled.clear()
            case.model.kept.clear()
    options = {"sigma": 1 / case.snr, "starts": 1, "device": "cuda"}
    row["fit_seconds"] = seconds(lambda: fit(case.model, host, **options), 5)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voxels", type=int, default=250_000)
    parser.add_argument("--models", nargs="+", default=["nexi", "nexi2", "axcalibersmt", "r2star"])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1 << 15])
    arguments = parser.parse_args()
    rows = []
    for case in cases(arguments.voxels, arguments.models):
        if case.snr in (400, 240):
            continue
        rows.append(run_case(case, arguments.lanes))
        print(json.dumps(rows[-1]), flush=True)
        text = json.dumps({"machine": machine(), "results": rows}, indent=2)
        (RESULTS / "resident.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
