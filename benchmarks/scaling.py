"""Time against the number of voxels, on one and two threads.

All fits are compiled, unless BIDS_GACELLE_COMPILE says otherwise: left to choose, large ones alone
would be. Writes JSON and a plot with the slope in log-log coordinates.
"""

import argparse
import json
import os
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from protocols import RESULTS, cases, machine

from bids_gacelle.engine import fit
from bids_gacelle.engine.kernels import COMPILE_VARIABLE

mpl.use("Agg")
import matplotlib.pyplot as plt

SLOPE_FROM = 10_000
"""Below, what a fit costs once is a part of its time."""


def time_fits(name, model, data, sizes, threads, repeats):
    rows = []
    for n_threads in threads:
        torch.set_num_threads(n_threads)
        for n in sizes:
            part = data[:, :n]
            fit(model, part, starts=1)  # compiles
            seconds = []
            for _ in range(repeats if n < 300_000 else 1):
                began = time.perf_counter()
                result = fit(model, part, starts=1)
                seconds.append(time.perf_counter() - began)
            rows.append(
                {
                    "model": name,
                    "threads": n_threads,
                    "voxels": n,
                    "seconds": min(seconds),
                    "blocks": result.settings["blocks"],
                    "compiled": result.settings["compiled"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def slope(rows):
    """Return the exponent of the voxels in the time of the large fits."""
    large = [r for r in rows if r["voxels"] >= SLOPE_FROM]
    if len(large) < 2:
        return None
    logs = np.log([[r["voxels"], r["seconds"]] for r in large])
    return float(np.polyfit(*logs.T, 1)[0])


def lines(rows):
    keys = sorted({(r["model"], r["threads"]) for r in rows}, reverse=True)
    return {k: [r for r in rows if (r["model"], r["threads"]) == k] for k in keys}


def plot(rows, path):
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, threads), line in lines(rows).items():
        exponent = slope(line)
        text = "" if exponent is None else f", slope {exponent:.2f}"
        axes.loglog(
            [r["voxels"] for r in line],
            [r["seconds"] for r in line],
            "o-",
            label=f"{name}, {threads} thread{'' if threads == 1 else 's'}{text}",
        )
    axes.set(xlabel="voxels", ylabel="seconds")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--nexi-most", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    arguments = parser.parse_args()
    os.environ.setdefault(COMPILE_VARIABLE, "always")
    rows = []
    for case in cases(arguments.most, ["r2star", "nexi"]):
        if case.snr > 50:
            continue
        name = case.name
        most = min(arguments.most, arguments.nexi_most) if name == "nexi" else arguments.most
        sizes = [n for n in (10**k * f for k in range(2, 7) for f in (1, 3)) if n <= most]
        data = case.data()[0][:, :most].astype(np.float32)
        rows += time_fits(name, case.model, data, sizes, arguments.threads, arguments.repeats)
    slopes = {f"{name}, {t} threads": slope(line) for (name, t), line in lines(rows).items()}
    report = {"machine": machine(), "slopes": slopes, "results": rows}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
