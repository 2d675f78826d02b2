"""Time the engine's Levenberg-Marquardt against scipy.optimize.least_squares in one process.

Both fit the same noisy voxels on one thread; times are those of the process' CPU, so that other
work on the machine does not count. scipy gets a numpy model and two-point derivatives, as a user
would write it. What is found is compared by chi-square. The result goes to benchmarks/results/.

    python benchmarks/engine.py [--voxels 50000] [--scipy-voxels 300] [--compile]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import scipy
import scipy.optimize
import torch

from bids_gacelle import __version__
from bids_gacelle.engine import DiffusionScheme, GradientEchoScheme, fit, get_model
from bids_gacelle.engine.physics.quadrature import powder_rule

HERE = Path(__file__).resolve().parent
ECHO_TIMES = np.array([2.2 + 3.07 * k for k in range(12)]) * 1e-3
SHELLS = [2.3, 3.5, 4.8, 6.5]
B = np.array([*SHELLS, *SHELLS, 11.3, *SHELLS, 11.3, 17.3])
DELTA = np.array([13.0] * 4 + [21.0] * 5 + [30.0] * 6)
NODES, WEIGHTS = powder_rule(60, 8)


def decay(x):
    return x[0] * np.exp(-ECHO_TIMES * x[1])


def exchange(x):
    f, dn, de, log_time = x
    rate = DELTA[:, None] * np.exp(-log_time)
    r1, r2 = rate * (1 - f), rate * f
    d1, d2 = B[:, None] * dn * NODES**2, B[:, None] * de
    gap = np.sqrt(np.maximum(((d1 + r1 - d2 - r2) / 2) ** 2 + r1 * r2, 1e-16))
    total = (d1 + d2 + r1 + r2) / 2
    slow = np.exp(-(d1 * d2 + d1 * r2 + d2 * r1) / (total + gap))
    quick = np.exp(-2 * gap)
    kernel = slow * ((1 + quick) / 2 + (total - f * d1 - (1 - f) * d2) * (1 - quick) / (2 * gap))
    return kernel @ WEIGHTS


def cases(n, rng):
    """Yield name, model, true parameters, noise level, numpy model, start and bounds for scipy."""
    s0, r2star = rng.uniform(0.7, 1.3, n), rng.uniform(10, 60, n)
    yield (
        "r2star",
        get_model("r2star")(GradientEchoScheme(echo_time=ECHO_TIMES)),
        {"S0": s0, "R2star": r2star},
        1 / 50,
        decay,
        [1.0, 30.0],
        ([0, 0], [np.inf, 1000]),
    )
    truth = {
        "fn": rng.uniform(0.1, 0.8, n),
        "dn": rng.uniform(1.5, 3, n),
        "de": rng.uniform(0.5, 1.5, n),
        "tex": rng.uniform(2, 50, n),
    }
    yield (
        "nexi",
        get_model("nexi")(DiffusionScheme(b=B, big_delta=DELTA)),
        truth,
        1 / 50,
        exchange,
        [0.5, 2.25, 1.0, np.log(14)],
        ([0, 0.1, 0.1, 0], [1, 3.5, 3.5, np.log(150)]),
    )


def time_scipy(function, data, start, bounds):
    began = time.process_time()
    ends = [
        scipy.optimize.least_squares(
            lambda x, y=y: function(x) - y, start, bounds=bounds, x_scale="jac"
        ).x
        for y in data.T
    ]
    return (time.process_time() - began) / data.shape[1], np.array(ends).T


def chi_square(function, position, data, sd):
    return np.array(
        [((function(x) - y) ** 2).sum() / sd**2 for x, y in zip(position.T, data.T, strict=True)]
    )


def run_case(case, n_scipy, starts):
    name, model, truth, sd, function, start, bounds = case
    signal = model.signal({k: torch.tensor(v) for k, v in truth.items()}).numpy()
    data = signal + np.random.default_rng(1).normal(size=signal.shape) * sd
    data = data[:, data[0] > 0]
    per_scipy, found = time_scipy(function, data[:, :n_scipy], start, bounds)
    theirs = chi_square(function, found, data[:, :n_scipy], sd)
    rows = []
    for n_starts in starts:
        fit(model, data[:, :3000], sigma=sd, starts=n_starts)  # first calls load libraries
        began = time.process_time()
        result = fit(model, data, sigma=sd, starts=n_starts)
        per_ours = (time.process_time() - began) / data.shape[1]
        position = np.array([result.maps[k][:n_scipy] for k in model.parameter_names], float)
        if name == "nexi":
            position[3] = np.log(position[3])
        gap = chi_square(function, position, data[:, :n_scipy], sd) - theirs
        rows.append(
            {
                "model": name,
                "starts": n_starts,
                "voxels": data.shape[1],
                "scipy_voxels": n_scipy,
                "compiled": result.settings["compiled"],
                "us_per_voxel": 1e6 * per_ours,
                "scipy_us_per_voxel": 1e6 * per_scipy,
                "ratio": per_scipy / per_ours,
                "mean_evaluations": result.trace["mean_evaluations"],
                "median_chi2_difference": float(np.median(gap)),
                "share_as_good_as_scipy": float((gap < 0.1).mean()),
                "share_where_scipy_is_as_good": float((gap > -0.1).mean()),
            }
        )
        print(json.dumps(rows[-1]))
    return rows


def machine():
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [li for li in cpuinfo.read_text().splitlines() if li.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "bids_gacelle": __version__,
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voxels", type=int, default=50_000)
    parser.add_argument("--scipy-voxels", type=int, default=300)
    parser.add_argument("--compile", action="store_true", help="compile the kernels")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "engine.json")
    arguments = parser.parse_args()
    os.environ["BIDS_GACELLE_COMPILE"] = "always" if arguments.compile else "never"
    torch.set_num_threads(1)
    rows = []
    for case in cases(arguments.voxels, np.random.default_rng(0)):
        starts = [1] if case[0] == "r2star" else [1, 4]
        rows += run_case(case, arguments.scipy_voxels, starts)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
