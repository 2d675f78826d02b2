"""Levenberg-Marquardt against Adam of 4,000 iterations: time, loss, and errors from the truth.

Adam is set up as GACELLE 1.0: dictionary start, parameters scaled to [0, 1], steps of 1e-3; no
criterion ends it early. Both solvers are compiled; times are those of the process' CPU on one
thread, the least of three; of Levenberg-Marquardt for 250,000 voxels, in which the last steps of
part-filled lanes weigh little. Errors are root mean squares of fn, dn, de and ln tex at SNR 50,
for a truth inside the box that the weak prior is twice as wide as, and for one mostly outside.

    python benchmarks/accuracy.py [--voxels 2000]
"""

from __future__ import annotations

import argparse
import json
import os
import time

import numpy as np
import torch
from protocols import RESULTS, cases, machine, positions

from bids_gacelle.engine import fit
from bids_gacelle.engine.solvers.adam import ASKADAM_1_0

ITERATIONS = 4000
ENDLESS = {"convergence_value": 0.0, "step_tolerance": 0.0, "gradient_tolerance": 0.0}
OUTSIDE = {"dn": (0.8, 2.0), "de": (1.2, 2.2)}


def adam(case, data, loss):
    options = ASKADAM_1_0 | ENDLESS | {"iterations": ITERATIONS}
    return fit(
        case.model, data, sigma=1 / case.snr, solver="adam", loss=loss, starts=1, options=options
    )


def timed(call):
    result, seconds = call(), []  # compiles
    for _ in range(3):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return result, min(seconds)


def losses(case, result, data, loss):
    params = {k: torch.tensor(result.maps[k]).double() for k in case.model.parameter_names}
    residual = np.abs(case.model.signal(params).numpy() - data)
    return residual.mean(0) if loss == "l1" else (residual**2).mean(0)


def compare_speed(case, n):
    data, usable = case.data()
    data = data[:, usable]
    rows = []
    for loss in ("l2", "l1"):
        part = data[:, :n]
        slow, slow_seconds = timed(lambda d=part, o=loss: adam(case, d, o))
        _, fast_seconds = timed(
            lambda o=loss: fit(case.model, data, sigma=1 / case.snr, loss=o, starts=1)
        )
        fast = fit(case.model, part, sigma=1 / case.snr, loss=loss, starts=1)
        ratio = losses(case, fast, part, loss) / losses(case, slow, part, loss)
        rows.append(
            {
                "model": case.name,
                "snr": case.snr,
                "loss": loss,
                "adam_us_per_voxel": 1e6 * slow_seconds / part.shape[1],
                "lm_us_per_voxel": 1e6 * fast_seconds / data.shape[1],
                "ratio": (slow_seconds / part.shape[1]) / (fast_seconds / data.shape[1]),
                "mean_loss_ratio": float(ratio.mean()),
                "median_loss_ratio": float(np.median(ratio)),
                "share_no_higher": float((ratio < 1 + 1e-3).mean()),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def errors(case, n, where):
    """Return root mean square errors of each way to estimate, and ratios to Adam's."""
    if where == "outside":
        rng = np.random.default_rng(7)
        moved = {k: rng.uniform(*box, len(case.truth["fn"])) for k, box in OUTSIDE.items()}
        case = case._replace(truth=case.truth | moved)
    data, usable = case.data()
    data, n = data[:, usable][:, :n], min(n, int(usable.sum()))
    truth = positions(case.model, {k: v[usable] for k, v in case.truth.items()}, n)
    sigma = 1 / case.snr
    ways = {
        "adam": adam(case, data, "l1"),
        "ml": fit(case.model, data, sigma=sigma),
        "map": fit(case.model, data, sigma=sigma, prior="weak"),
    }
    out = {
        way: np.sqrt(((positions(case.model, r.maps, n) - truth) ** 2).mean(1)).tolist()
        for way, r in ways.items()
    }
    ratios = {w: (np.array(out[w]) / out["adam"]).tolist() for w in ("ml", "map")}
    row = {"model": case.name, "snr": case.snr, "truth": where, "voxels": n}
    row |= {"parameters": ["fn", "dn", "de", "ln tex"], "rmse": out, "ratio_to_adam": ratios}
    row["map_prior"] = ways["map"].settings["prior"]
    print(json.dumps(row), flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voxels", type=int, default=2_000)
    arguments = parser.parse_args()
    os.environ["BIDS_GACELLE_COMPILE"] = "always"
    torch.set_num_threads(1)
    case = next(cases(250_000, ["nexi"]))
    report = {"machine": machine(), "speed": compare_speed(case, arguments.voxels)}
    report["errors"] = [errors(case, arguments.voxels, where) for where in ("inside", "outside")]
    (RESULTS / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
