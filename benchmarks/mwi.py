"""Myelin water imaging of a whole brain: time, memory, bias, repeatability, and scipy beside it.

A digital brain in memory, its signals from direct EPG-X and never from what the models use in its
place: 12 echoes at 5 flip angles for mcrmwi, its echoes at 20 degrees for r2star, 15 echoes at 20
degrees for gremwi. The noise is that of a signal-to-noise ratio of 150 in white matter at the
first echo of the brightest flip angle; two draws of it are demodulated and fitted. On a sample of
white-matter voxels scipy.optimize.least_squares fits the same data with a numpy model of the same
physics, from typical values.

Needs torch, numpy and scipy only. Wall times are those of the fit alone, the first with, the
second without compilation.

    python benchmarks/mwi.py [--voxels 250000] [--device cpu] [--threads 2] [--models mcrmwi]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import torch
from protocols import RESULTS, machine

from bids_gacelle.engine import fit, get_model
from bids_gacelle.engine.models.threepools import MYELIN_WATER_DENSITY
from bids_gacelle.engine.prepare import demodulate
from bids_gacelle.phantom.anatomy import BRAINSTEM, CEREBELLUM, NUCLEI, Anatomy, Label
from bids_gacelle.phantom.head import Head
from bids_gacelle.phantom.myelin import (
    MWI,
    MYELIN_T1_S,
    MYELIN_T2_S,
    Protocol,
    echo,
    steady_states,
    water_pools,
)
from bids_gacelle.phantom.parcels import PARCELS, parcel_labels

SNR = 150.0
GRE = Protocol(
    echo_times=tuple(float(t) for t in np.round(0.0022 + 0.00307 * np.arange(15), 5)),
    flip_angles=(20.0,),
    repetition_time=0.05,
)
CENTRE, RADII = np.array([0.0, -18.0, 8.0]), np.array([66.0, 84.0, 60.0])  # MNI mm
CORTEX, SURFACE = 0.80, 0.96  # of the radius
VENTRICLE = ((12.0, -20.0, 20.0), (7.0, 25.0, 9.0))


class Case(NamedTuple):
    """A model, its options, the protocol of its data, and the images it uses of them."""

    name: str
    options: dict[str, Any]
    protocol: Protocol
    flips: tuple[int, ...]
    prior: str | None

    @property
    def label(self):
        words = [self.name, *(str(value) for value in self.options.values())]
        return " ".join([*words, "map" if self.prior else "ml"])


CASES = (
    Case("r2star", {}, MWI, (2,), None),
    Case("r2star", {"signal": "complex"}, MWI, (2,), None),
    Case("gremwi", {}, GRE, (0,), None),
    Case("gremwi", {}, GRE, (0,), "weak"),
    Case("mcrmwi", {}, MWI, (0, 1, 2, 3, 4), None),
    Case("mcrmwi", {}, MWI, (0, 1, 2, 3, 4), "weak"),
)


def brain(voxels, seed=0):
    """Return the head of so many voxels, without skull: layers of an ellipsoid, and nuclei."""
    spacing = (4 / 3 * np.pi * RADII.prod() / voxels) ** (1 / 3) * 0.99
    axes = [np.arange(-r, r + spacing, spacing) for r in RADII]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    radius = np.linalg.norm(points / RADII, axis=1)
    kept = np.flatnonzero(radius <= 1)
    kept = kept[np.linspace(0, len(kept) - 1, voxels).round().astype(int)]
    mni, radius = points[kept] + CENTRE, radius[kept]
    labels = np.select(
        [radius > SURFACE, radius > CORTEX], [Label.CSF, Label.CORTEX], Label.WHITE_MATTER
    )
    labels[CEREBELLUM.contains(mni) & (labels == Label.CORTEX)] = Label.CEREBELLUM
    labels[BRAINSTEM.contains(mni) & (labels != Label.CSF)] = Label.WHITE_MATTER
    mirrored = mni * np.where(mni[:, :1] < 0, [-1, 1, 1], 1)
    inside = np.sum(((mirrored - VENTRICLE[0]) / VENTRICLE[1]) ** 2, axis=1) <= 1
    labels[inside] = Label.CSF
    for nucleus in NUCLEI:
        labels[nucleus.contains(mni)] = nucleus.label
    shape = (voxels, 1, 1)
    anatomy = Anatomy(labels.reshape(shape).astype(np.uint8), mni.reshape(*shape, 3), np.eye(4))
    return Head(anatomy, 1, 1, seed)


class Scan:
    """The images of one protocol without noise, complex64 (flip angles, echoes, voxels)."""

    def __init__(self, head, protocol):
        began = time.perf_counter()
        self.pools, self.protocol = water_pools(head), protocol
        self.b1 = head.transmit()[head.inside]
        self.parcels = parcel_labels(head.anatomy)[head.inside]
        self.white = self.parcels > 0
        steady = steady_states(self.pools, self.b1, protocol)
        self.simulated = time.perf_counter() - began
        field, start = head.field(len(protocol.flip_angles)), head.initial_phase()
        shape = len(protocol.flip_angles), len(protocol.echo_times), len(self.b1)
        self.images = np.empty(shape, np.complex64)
        for flip in range(shape[0]):
            states = steady[0][flip], steady[1][flip]
            for number, at in enumerate(protocol.echo_times):
                phase = start + 2 * np.pi * protocol.hertz_per_ppm * field[flip] * at
                self.images[flip, number] = echo(self.pools, states, at, phase, protocol)
        iew, mw = (np.abs(pool[0]) for pool in steady)
        self.apparent = mw / (iew + mw)  # share of myelin water in the signal of one flip angle
        first = np.abs(self.images[:, 0, self.white]).mean(1)
        self.sigma = float(first.max()) / SNR

    def measure(self, flips, seed):
        """Return the images of some flip angles with noise, complex64 (images, voxels)."""
        images = self.images[list(flips)]
        images = images.reshape(-1, images.shape[-1])
        noise = np.random.default_rng(seed).standard_normal((2, *images.shape), dtype=np.float32)
        return images + self.sigma * (noise[0] + 1j * noise[1])


def run_case(case, scan, options):
    """Fit both draws of one case, and describe what came out."""
    scheme = case.protocol.scheme([case.protocol.flip_angles[flip] for flip in case.flips])
    model = get_model(case.name)(scheme, **case.options)
    complex_data = model.n_measurements == 2 * len(scheme)
    inputs = {"b1": scan.b1.astype(np.float32)} if "b1" in model.voxel_inputs else None
    results, demodulation, data = [], [], None
    for seed in range(1, options.draws + 1):
        images = scan.measure(case.flips, seed)
        began = time.perf_counter()
        data = demodulate(images, scheme).signals if complex_data else np.abs(images)
        demodulation.append(time.perf_counter() - began)
        arguments = {"sigma": scan.sigma, "prior": case.prior, "inputs": inputs}
        arguments |= {"device": options.device, "starts": options.starts}
        results.append(fit(model, data, **arguments))
    settings = [result.settings for result in results]
    row = {
        "case": f"{case.label} {options.starts} starts" if options.starts else case.label,
        "voxels": data.shape[1],
        "measurements": data.shape[0],
        "parameters": len(model.parameter_names),
        "starts": options.starts or model.starts,
        "device": settings[-1]["device"],
        "compiled": settings[-1]["compiled"],
        "seconds": [setting["seconds"] for setting in settings],
        "voxels_per_second": settings[-1]["voxels_per_second"],
        "demodulation_seconds": demodulation if complex_data else None,
        "memory_peak": max(setting["memory_peak"] or 0 for setting in settings) or None,
        "mean_evaluations": results[-1].trace.get("mean_evaluations"),
        "not_converged": float(np.mean(results[-1].flags & 8 > 0)),
        "at_bound": settings[-1]["at_bound"],
        "at_bound_in_white_matter": float(np.mean(results[-1].flags[scan.white] & 2 > 0)),
    }
    if "MWF" in model.parameter_names and options.draws > 1:
        maps = [result.maps["MWF"] for result in results]
        row["mwf"] = accuracy(maps, scan.pools["MWF"], scan)
        if len(case.flips) == 1:
            row["mwf_of_signal"] = accuracy(maps, scan.apparent, scan)
    if case.name == "r2star":
        return row
    if options.scipy_voxels and case.prior is None:
        row["scipy"] = beside_scipy(model, data, results[-1], scan, case, options.scipy_voxels)
    return row


def accuracy(maps, true, scan):
    """Return errors of the myelin water fraction in white matter, in percentage points."""
    good = scan.white & np.isfinite(maps[0]) & np.isfinite(maps[1])
    error = 100 * (maps[0] - true)[good]
    rows = np.array(
        [
            [np.median(values[good & (scan.parcels == parcel.index)]) for parcel in PARCELS]
            for values in (true, *maps)
        ]
    )
    bias = 100 * (rows[1:].mean(0) - rows[0])
    return {
        "bias": float(error.mean()),
        "median_bias": float(np.median(error)),
        "rmse": float(np.sqrt((error**2).mean())),
        "parcel_bias_mean": float(bias.mean()),
        "parcel_bias_worst": float(bias[np.abs(bias).argmax()]),
        "parcel_bias": dict(
            zip([p.abbreviation for p in PARCELS], bias.round(3).tolist(), strict=True)
        ),
        "test_retest_correlation": float(np.corrcoef(rows[1], rows[2])[0, 1]),
        "test_retest_parcel_sd": float(100 * np.std(rows[1] - rows[2]) / np.sqrt(2)),
        "correlation_with_truth": float(np.corrcoef(rows[0], rows[1:].mean(0))[0, 1]),
        "unusable": int((scan.white & ~good).sum()),
    }


def beside_scipy(model, data, result, scan, case, count):
    """Fit a sample of white matter with scipy, and compare residuals and times."""
    sample = np.flatnonzero(scan.white)
    sample = sample[np.linspace(0, len(sample) - 1, min(count, len(sample))).astype(int)]
    names, bounds = model.parameter_names, np.array([p.bounds for p in model.parameters]).T
    pairs, seconds = [], 0.0
    for voxel in sample:
        y = data[:, voxel].astype(float)
        predict = NumpyModel(names, case.protocol, scan.b1[voxel])
        size = np.abs(y).max()
        start = predict.start(size)
        low, high = np.clip(bounds, -1e6 * size, 1e6 * size)
        began = time.process_time()
        found = scipy.optimize.least_squares(
            lambda x, f=predict, y=y, size=size: (f(x) - y) / size,
            np.clip(start, low + 1e-6, high - 1e-6),
            bounds=(low, high),
            x_scale="jac",
            max_nfev=200,
        )
        seconds += time.process_time() - began
        ours = np.array([result.maps[name][voxel] for name in names], float)
        chi2 = [np.sum((predict(x) - y) ** 2) / scan.sigma**2 for x in (ours, found.x)]
        pairs.append((*chi2, ours[names.index("MWF")], found.x[names.index("MWF")]))
    mine, theirs, mwf, other = np.array(pairs).T
    per_voxel = seconds / len(sample)
    return {
        "voxels": len(sample),
        "seconds_per_voxel": per_voxel,
        "time_ratio": per_voxel * result.settings["voxels_per_second"],
        "mean_chi2": [float(mine.mean()), float(theirs.mean())],
        "median_chi2": [float(np.median(mine)), float(np.median(theirs))],
        "median_chi2_difference": float(np.median(mine - theirs)),
        "share_as_good_as_scipy": float((mine - theirs < 0.1).mean()),
        "share_where_scipy_is_as_good": float((theirs - mine < 0.1).mean()),
        "rms_mwf_difference": float(100 * np.sqrt(np.mean((mwf - other) ** 2))),
    }


class NumpyModel:
    """Complex signals of one voxel as a function of the parameters of a model.

    Images are in the order of flip angles, then echoes; real parts come first.
    """

    TYPICAL = {  # noqa: RUF012
        "MWF": 0.1,
        "IWF": 0.6,
        "R1IEW": 1.0,
        "kIEWM": 2.0,
        "R2sMW": 100.0,
        "R2sIW": 15.0,
        "R2sEW": 21.0,
        "freqMW": 0.04,
    }

    def __init__(self, names, protocol, b1):
        self.names, self.protocol = names, protocol
        self.times = np.array(protocol.echo_times)
        self.angles = b1 * np.radians(protocol.flip_angles)

    def start(self, size):
        """Return typical values, with the S0 that gives the largest signal the size it has."""
        x = np.array([1.0 if n == "S0" else self.TYPICAL.get(n, 0.0) for n in self.names])
        x[self.names.index("S0")] = size / np.abs(self(x)).max()
        return x

    def __call__(self, x):
        p = dict(zip(self.names, x, strict=True))
        to_radian = 2j * np.pi * self.protocol.hertz_per_ppm
        iew, mw = self.steady_states(p) if "kIEWM" in p else (1 - p["MWF"], p["MWF"])
        slow = p["IWF"] * np.exp(self.times * (to_radian * p["freqIW"] - p["R2sIW"]))
        slow = slow + (1 - p["IWF"]) * np.exp(-self.times * p["R2sEW"])
        fast = np.exp(self.times * (to_radian * p["freqMW"] - p["R2sMW"]))
        signal = np.multiply.outer(iew, slow) + np.multiply.outer(mw, fast)
        offsets = [p[name] for name in self.names if name.startswith("dfreqBKG")]
        turn = np.exp(to_radian * np.multiply.outer(np.array(offsets), self.times))
        signal = p["S0"] * (signal * turn).ravel() * np.exp(1j * p["dpini"])
        return np.concatenate((signal.real, signal.imag))

    def steady_states(self, p):
        """Return IEW and MW at every flip angle: EPG-X by recurrence over the orders."""
        volume = 1 - p["MWF"] + p["MWF"] / MYELIN_WATER_DENSITY
        f = p["MWF"] / MYELIN_WATER_DENSITY / volume
        tr, step = self.protocol.repetition_time, np.radians(self.protocol.spoiling_increment)
        k, back = p["kIEWM"], p["kIEWM"] * (1 - f) / f
        exchange = np.array([[-k, back], [k, -back]])
        keep1 = scipy.linalg.expm((np.diag([-p["R1IEW"], -1 / MYELIN_T1_S]) + exchange) * tr)
        keep2 = scipy.linalg.expm((np.diag([-p["R2sIW"], -1 / MYELIN_T2_S]) + exchange) * tr)
        one = np.eye(2)
        tangent2 = (np.tan(self.angles / 2) ** 2)[:, None, None]
        orders = int(np.ceil(np.log(1e6) / (2 * tr * p["R2sIW"])))

        def pulse(n):
            turned = np.exp(1j * n * step) * keep1
            return tangent2 * ((one + turned) @ np.linalg.inv(one - turned))

        def line(n, echo):
            turn = np.exp(1j * (2 * n + 1) * step)
            return np.linalg.inv(one - turn * keep2 @ (one - echo) @ keep2)

        echo = np.broadcast_to(one, (len(self.angles), 2, 2))
        for n in range(orders - 1, 0, -1):
            echo = np.linalg.inv(line(n, echo) + pulse(n))
        x = line(0, echo)
        response = x @ np.linalg.inv(x + x.conj() - one + pulse(0).real)
        states = 2 * np.tan(self.angles / 2)[:, None] * (response @ np.array([1 - f, f]))
        return states[:, 0] * volume, states[:, 1] * volume * MYELIN_WATER_DENSITY


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voxels", type=int, default=250_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["r2star", "gremwi", "mcrmwi"],
        help='or single cases, such as "mcrmwi map"',
    )
    parser.add_argument("--steady-state", help="of mcrmwi, if not its default")
    parser.add_argument("--starts", type=int, help="of all models, if not their defaults")
    parser.add_argument("--scipy-voxels", type=int, default=50)
    parser.add_argument("--draws", type=int, choices=(1, 2), default=2, help="1: times only")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    head, scans, rows = brain(arguments.voxels), {}, []
    for case in CASES:
        if not {case.name, case.label} & set(arguments.models):
            continue
        if case.name == "mcrmwi" and arguments.steady_state:
            case = case._replace(options={"steady_state": arguments.steady_state})
        if case.protocol not in scans:
            scans[case.protocol] = Scan(head, case.protocol)
        scan = scans[case.protocol]
        rows.append(run_case(case, scan, arguments))
        rows[-1]["epgx_seconds"] = scan.simulated
        print(json.dumps(rows[-1]), flush=True)
    out = arguments.out or RESULTS / ("mwi.json" if arguments.device == "cpu" else "mwi_gpu.json")
    before = json.loads(out.read_text())["results"] if out.exists() else []
    kept = [row for row in before if row["case"] not in {new["case"] for new in rows}]
    report = {"machine": machine(), "snr": SNR, "results": kept + rows}
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
