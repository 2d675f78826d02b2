"""250,000 voxels whose data are on the GPU already: starts, Levenberg-Marquardt, and why so long.

Times are wall times between synchronisations, warm, compiled, one start; `fit` is the whole call
from an array of the host to maps, with standard deviations in double precision.

The share of the roofline is that of the peak of single-precision arithmetic, as the few numbers
of a voxel hardly need memory: the operations of a step that is not compiled (a few more than of
one that is), counted one by one, exponentials and divisions as one each, times the evaluations
that the voxels needed. What keeps it from more is told apart: how long no kernel runs (launches,
the host's looks at how many lanes have finished), how many lanes are at work on average, and how
fast the kernels are, which is the rest.

Until 26 November 2026 data of models without an amplitude were divided by their maximum, as `fit`
does not: voxels of `nexi` then took 23 evaluations, not 10.

    python benchmarks/resident.py [--voxels 250000] [--models nexi nexi2 axcalibersmt r2star]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time

import numpy as np
import torch
from protocols import RESULTS, cases, machine
from torch.utils._python_dispatch import TorchDispatchMode

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
        "steps": max(count for name, count, _ in rows if name.startswith("triton_per")),
        "longest": rows[:8],
    }


class Operations(TorchDispatchMode):
    """Counts elementwise operations and the terms of sums."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.Tag.pointwise in func.tags:
            self.n += out.numel()
        elif func.overloadpacket is torch.ops.aten.sum:
            self.n += args[0].numel()
        return out


def operations_of_a_step(case, lanes=256):
    """Return how many operations an evaluation and the step after it take for one voxel."""
    kernel = Kernel(case.model, Objective(), torch.float32, torch.device("cpu"))
    settings = LmSettings(starts=1, lanes=lanes, max_evaluations=1)
    data = torch.tensor(case.data()[0][:, :lanes], dtype=torch.float32)
    problem = Problem(kernel, Voxels(data), kernel, Voxels(data), settings)
    starts = find_starts(kernel, problem.voxels, build_dictionary(kernel, 64, 1, 0))[0]
    minimise(problem, starts)  # fills caches of constants
    with Operations() as operations:
        minimise(problem, starts)
    return operations.n / lanes


def peak():
    """Return the single-precision operations per second of a Hopper GPU, two for an FMA."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    megahertz = float(subprocess.run(query, capture_output=True, check=True).stdout.split()[0])
    return torch.cuda.get_device_properties(0).multi_processor_count * 128 * 2 * megahertz * 1e6


def run_case(case, sizes):
    device = torch.device("cuda")
    data, usable = case.data()
    host = data[:, usable].astype(np.float32)
    kernel = Kernel(case.model, Objective(), torch.float32, device)
    exact = Kernel(case.model, Objective(), torch.float64, device)
    scale = 1 if kernel.amplitude is None else np.abs(host).max(0)  # as in `fit`
    voxels = Voxels(torch.tensor(host / scale, device=device))
    operations = operations_of_a_step(case)
    row = {"model": case.name, "snr": case.snr, "voxels": host.shape[1]}
    row["operations_of_a_step"] = operations
    with torch.no_grad():
        for lanes in sizes:
            settings = LmSettings(starts=1, compiled=True, compiled_fully=True, lanes=lanes)
            problem = Problem(kernel, voxels, exact, voxels, settings)
            dictionary = build_dictionary(kernel, settings.dictionary, 1, 0)
            starts = find_starts(kernel, voxels, dictionary, compiled=True)[0]
            solving = seconds(lambda p=problem: solve(p))
            minimising = seconds(lambda p=problem, s=starts: minimise(p, s))
            evaluations = float(solve(problem).evaluations.float().mean())
            found = profile(lambda p=problem, s=starts: minimise(p, s))
            needed = operations * evaluations * host.shape[1]
            row[f"lanes_{lanes}"] = {
                "solve_seconds": solving,
                "starts_seconds": seconds(
                    lambda d=dictionary: find_starts(kernel, voxels, d, compiled=True)
                ),
                "minimise_seconds": minimising,
                "mean_evaluations": evaluations,
                "share_of_roofline": needed / minimising[0] / peak(),
                "share_in_kernels": found["kernel_seconds"] / minimising[0],
                "share_of_lanes_at_work": evaluations * host.shape[1] / (found["steps"] * lanes),
                "profile": found,
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
