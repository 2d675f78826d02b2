"""Time the engine's Levenberg-Marquardt against scipy.optimize.least_squares in one process.

Both fit the same noisy voxels on one thread; times are those of the process' CPU, so that other
work on the machine does not count. scipy gets a numpy model and two-point derivatives, as a user
would write it, and begins where a fit with one start does; finding that place is in our time, not
in its. Both take turns, as others on a machine change its speed within minutes; the ratio is that
of their fastest rounds, `ratios` are those of each round. What is found is compared by chi-square.

Until 26 November 2026 scipy began at the centre of the start box, from which it takes longer.

    python benchmarks/engine.py [--voxels 50000] [--scipy-voxels 300] [--eager]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import scipy.optimize
import torch
from protocols import RESULTS, cases, chi_square, first_positions, machine, positions

from bids_gacelle.engine import fit

ROUNDS = 5


def seconds(call):
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def fit_scipy(case, data, starts):
    return np.array(
        [
            scipy.optimize.least_squares(
                lambda x, y=y: case.signal(x) - y, start, bounds=case.bounds, x_scale="jac"
            ).x
            for start, y in zip(starts.T, data.T, strict=True)
        ]
    ).T


def run_case(case, n_scipy, starts):
    data, usable = case.data()
    data = data[:, usable]
    theirs, ours, ends = [], {n: [] for n in starts}, []
    for n_starts in starts:
        fit(case.model, data[:, :3000], sigma=1 / case.snr, starts=n_starts)  # compiles
    for part in np.array_split(data[:, :n_scipy], ROUNDS, axis=1):
        first = first_positions(case, part)
        taken, found = seconds(lambda part=part, first=first: fit_scipy(case, part, first))
        theirs.append(taken / part.shape[1])
        ends.append(found)
        for n_starts in starts:
            taken, result = seconds(
                lambda n=n_starts: fit(case.model, data, sigma=1 / case.snr, starts=n)
            )
            ours[n_starts].append((taken / data.shape[1], result))
    theirs = np.array(theirs)
    reference = chi_square(case.signal, np.hstack(ends), data[:, :n_scipy], case.snr)
    rows = []
    for n_starts, fits in ours.items():
        taken, result = np.array([t for t, _ in fits]), fits[-1][1]
        position = positions(case.model, result.maps, n_scipy)
        gap = chi_square(case.signal, position, data[:, :n_scipy], case.snr) - reference
        rows.append(
            {
                "model": case.name,
                "snr": case.snr,
                "starts": n_starts,
                "voxels": data.shape[1],
                "scipy_voxels": n_scipy,
                "compiled": result.settings["compiled"],
                "us_per_voxel": 1e6 * taken.min(),
                "scipy_us_per_voxel": 1e6 * theirs.min(),
                "ratio": theirs.min() / taken.min(),
                "ratios": sorted((theirs / taken).round().tolist()),
                "mean_evaluations": result.trace["mean_evaluations"],
                "median_chi2_difference": float(np.median(gap)),
                "share_as_good_as_scipy": float((gap < 0.1).mean()),
                "share_where_scipy_is_as_good": float((gap > -0.1).mean()),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voxels", type=int, default=50_000)
    parser.add_argument("--scipy-voxels", type=int, default=300)
    parser.add_argument("--models", nargs="+", default=["r2star", "nexi", "nexi2", "axcalibersmt"])
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ["BIDS_GACELLE_COMPILE"] = "never" if arguments.eager else "always"
    torch.set_num_threads(1)
    rows = []
    for case in cases(arguments.voxels, arguments.models):
        starts = {1, case.model.starts}
        rows += run_case(case, arguments.scipy_voxels, sorted(starts))
    name = "engine.json" if arguments.eager else "engine_compiled.json"
    out = arguments.out or RESULTS / name
    out.write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
