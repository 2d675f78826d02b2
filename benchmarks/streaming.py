"""Time and memory of a problem eight times larger than an enforced limit, against no blocks.

Writes JSON. Memory is sampled by a thread of its own, beside what the fit says of itself.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from protocols import RESULTS, cases, machine

from bids_gacelle.engine import TV, fit

# More voxels than these are repeated: numpy draws them more slowly than they are fitted.
_DRAWN = 250_000
# Of ADMM: all take about as long.
_ITERATIONS = 5


def own_bytes():
    """Resident memory of this process that is no file's."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def measured(call):
    """Return a result, its seconds, and by how much the memory grew at most."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = most = own_bytes()
    over = threading.Event()

    def sample():
        nonlocal most
        while not over.wait(0.005):
            most = max(most, own_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    began = time.perf_counter()
    try:
        result = call()
    finally:
        seconds = time.perf_counter() - began
        over.set()
        thread.join()
    return result, seconds, most - before


def map_bytes(result):
    arrays = [*result.maps.values(), *result.std.values(), result.flags, result.nrmse]
    return sum(array.nbytes for array in arrays) + result.flags.size  # and which are finished


def identical(one, other):
    return all(
        np.array_equal(getattr(one, kind)[name], getattr(other, kind)[name], equal_nan=True)
        for kind in ("maps", "std")
        for name in one.maps
    ) and np.array_equal(one.flags, other.flags)


def largest_difference(one, other):
    """Return by how much maps differ at most, in shares of their largest value."""
    return max(
        float(np.nanmax(np.abs(one.maps[k] - other.maps[k])) / np.nanmax(np.abs(one.maps[k])))
        for k in one.maps
    )


def run_case(name, model, data, repeats, options, times_larger):
    n = data[0].size
    # Loads libraries; and what a limit asks of the C library comes before memory is in pieces.
    fit(model, data[:, :64], memory_limit=2**28, **options)
    whole = lambda: fit(model, data, block_size=n, **options)  # noqa: E731
    first = whole()  # compiles, where that pays
    limit = int(first.settings["memory_predicted"] / times_larger)
    parts = lambda: fit(model, data, memory_limit=limit, **options)  # noqa: E731
    times = {"whole": [], "parts": []}
    peaks = {"whole": [], "parts": []}
    for _ in range(repeats):
        for kind, call in (("whole", whole), ("parts", parts)):
            result, seconds, peak = measured(call)
            times[kind].append(seconds)
            peaks[kind].append(peak - map_bytes(result))
    return {
        "model": name,
        "voxels": n,
        "options": json.loads(json.dumps(options, default=str)),
        "compiled": result.settings["compiled"],
        "limit": limit,
        "blocks": result.settings["blocks"],
        "predicted": result.settings["memory_predicted"],
        "peak": max(peaks["parts"]),
        "peak_of_the_fit": result.settings["memory_peak"],
        "whole_predicted": first.settings["memory_predicted"],
        "whole_peak": max(peaks["whole"]),
        "seconds": min(times["parts"]),
        "whole_seconds": min(times["whole"]),
        "ratio": min(times["parts"]) / min(times["whole"]),
        "identical": identical(first, result),
        "largest_difference": largest_difference(first, result),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["r2star", "nexi"])
    parser.add_argument("--voxels", type=int, default=1_500_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--times", type=float, default=8, help="size over memory limit")
    parser.add_argument("--dictionary", type=int, default=512)
    parser.add_argument("--tv", action="store_true", help="with 3D total variation, on a cube")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    name = "streaming" + "_tv" * arguments.tv + "_gpu" * (arguments.device != "cpu")
    out = arguments.out or RESULTS / f"{name}.json"
    if sys.platform != "linux":
        parser.error("memory is read from /proc, which this system has not")
    torch.set_num_threads(1)
    options = {"starts": 1, "options": {"dictionary": arguments.dictionary}}
    rows = []
    for case in cases(min(arguments.voxels, _DRAWN), arguments.models):
        if case.snr > 50:
            continue
        drawn = case.data()[0].astype(np.float32)
        data = np.resize(drawn.T, (arguments.voxels, len(drawn))).T.copy()
        if arguments.tv:
            side = round(arguments.voxels ** (1 / 3))
            data = data[:, : side**3].reshape(-1, side, side, side)
            first = next(p.name for p in case.model.parameters if not p.amplitude)
            options |= {"regularise": TV([first], 1.0, mode="3d"), "sigma": 1 / case.snr}
            options["options"] |= {"spatial_iterations": _ITERATIONS}
        times, options["device"] = arguments.times, arguments.device
        rows.append(run_case(case.name, case.model, data, arguments.repeats, options, times))
        print(json.dumps(rows[-1]), flush=True)
    out.write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
