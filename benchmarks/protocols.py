"""Acquisitions, tissue and numpy models that the benchmarks share, and what machine they ran on.

NEXI and AxCaliber-SMT have the 15 and 16 shells of Table S1 of Chan et al. 2025; noise is added to
the averages themselves, so that SNR 400 stands for 50 in single images of 64 directions.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
import scipy.special
import torch

from bids_gacelle import __version__
from bids_gacelle.engine import DiffusionScheme, GradientEchoScheme, get_model
from bids_gacelle.engine.kernels import Kernel
from bids_gacelle.engine.objective import Objective
from bids_gacelle.engine.physics.quadrature import powder_rule
from bids_gacelle.engine.solvers import Settings
from bids_gacelle.engine.starts import build_dictionary, find_starts
from bids_gacelle.engine.study import Study

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ECHO_TIMES = np.array([2.2 + 3.07 * k for k in range(12)]) * 1e-3
SHELLS = [2.3, 3.5, 4.8, 6.5]
B = np.array([*SHELLS, *SHELLS, 11.3, *SHELLS, 11.3, 17.3])
DELTA = np.array([13.0] * 4 + [21.0] * 5 + [30.0] * 6)
AX_B = np.array(
    [0.05, 0.35, 0.8, 1.5, 2.4, 3.45, 4.75, 6, 0.2, 0.95, 2.3, 4.25, 6.75, 9.85, 13.5, 17.8]
)
AX_DELTA = np.array([13.0] * 8 + [30.0] * 8)
AX_SMALL = 6.0
NODES, WEIGHTS = powder_rule(60, 8)
ROOTS2 = scipy.special.jnp_zeros(1, 10) ** 2


class Case(NamedTuple):
    """A model with its protocol, true parameters and noise, and what scipy needs to fit it.

    `signal` is a numpy model of the solver's coordinates; `bounds` are in them.
    """

    name: str
    snr: float
    model: Any
    truth: dict[str, np.ndarray]
    signal: Any
    bounds: tuple[list[float], list[float]]

    def data(self, seed=1):
        """Return noisy signals (measurements, voxels); voxels without a first signal left out."""
        clean = self.model.signal({k: torch.tensor(v) for k, v in self.truth.items()}).numpy()
        noisy = clean + np.random.default_rng(seed).normal(size=clean.shape) / self.snr
        return noisy, noisy[0] > 0


def decay(x):
    return x[0] * np.exp(-ECHO_TIMES * x[1])


def kernel(f, dn, de, tex):
    """Narrow-pulse Kaerger signal at the nodes, (shells, nodes)."""
    rate = DELTA[:, None] / tex
    r1, r2 = rate * (1 - f), rate * f
    d1, d2 = B[:, None] * dn * NODES**2, B[:, None] * de
    gap = np.sqrt(np.maximum(((d1 + r1 - d2 - r2) / 2) ** 2 + r1 * r2, 1e-16))
    total = (d1 + d2 + r1 + r2) / 2
    slow = np.exp(-(d1 * d2 + d1 * r2 + d2 * r1) / (total + gap))
    quick = np.exp(-2 * gap)
    return slow * ((1 + quick) / 2 + (total - f * d1 - (1 - f) * d2) * (1 - quick) / (2 * gap))


def exchange(x):
    m = kernel(*x[:3], np.exp(x[3]))
    if len(x) == 4:
        return m @ WEIGHTS
    s2 = x[4] * np.abs(m @ (WEIGHTS * (1.5 * NODES**2 - 0.5)))
    return np.concatenate((m @ WEIGHTS, s2))


def stick(a):
    a = np.maximum(a, 1e-9)
    return np.sqrt(np.pi / (4 * a)) * scipy.special.erf(np.sqrt(a))


def axons(x, d0=1.7, dcsf=3.0):
    diameter, fn, fcsf, radial = x
    time = (diameter / 2) ** 2 / d0
    g2 = AX_B / (AX_SMALL**2 * (AX_DELTA - AX_SMALL / 3))
    s, d = (ROOTS2 * AX_SMALL / time), (ROOTS2 * AX_DELTA[:, None] / time)
    bracket = -2 + 2 * s + 2 * np.exp(-s) + 2 * np.exp(-d) - np.exp(-(d + s)) - np.exp(-(d - s))
    c = d0 * g2 * time**3 * (2 / (ROOTS2**3 * (ROOTS2 - 1)) * bracket).sum(1)
    inner = np.exp(-c) * stick(AX_B * d0 - c)
    outer = np.exp(-AX_B * radial) * stick(AX_B * (d0 - radial))
    return (1 - fcsf) * (fn * inner + (1 - fn) * outer) + fcsf * np.exp(-AX_B * dcsf)


def cases(n, names=("r2star", "nexi", "nexi2", "axcalibersmt"), seed=0):
    """Yield the cases asked for, each at its noise levels, with `n` voxels."""
    import diffusion_cases

    makers = {"r2star": _r2star, "nexi": _nexi, "nexi2": _nexi2, "axcalibersmt": _axcaliber}
    for name in names:
        if name not in makers:
            yield Case(name, *diffusion_cases.make(name, n, np.random.default_rng(seed)))
            continue
        for snr in {"r2star": (50,), "axcalibersmt": (30, 240)}.get(name, (50, 400)):
            yield Case(name, snr, *makers[name](n, np.random.default_rng(seed)))


def _r2star(n, rng):
    return (
        get_model("r2star")(GradientEchoScheme(echo_time=ECHO_TIMES)),
        {"S0": rng.uniform(0.7, 1.3, n), "R2star": rng.uniform(10, 60, n)},
        decay,
        ([0, 0], [np.inf, 1000]),
    )


def _nexi(n, rng):
    truth = {
        "fn": rng.uniform(0.1, 0.8, n),
        "dn": rng.uniform(1.5, 3, n),
        "de": rng.uniform(0.5, 1.5, n),
        "tex": rng.uniform(2, 50, n),
    }
    return (
        get_model("nexi")(DiffusionScheme(b=B, big_delta=DELTA)),
        truth,
        exchange,
        ([0, 0.1, 0.1, 0], [1, 3.5, 3.5, np.log(150)]),
    )


def _nexi2(n, rng):
    _, truth, signal, (low, high) = _nexi(n, rng)
    return (
        get_model("nexi")(DiffusionScheme(b=B, big_delta=DELTA), l_max=2),
        truth | {"p2": rng.uniform(0.05, 0.5, n)},
        signal,
        ([*low, 0], [*high, 1]),
    )


def _axcaliber(n, rng):
    scheme = DiffusionScheme(b=AX_B, big_delta=AX_DELTA, small_delta=AX_SMALL)
    truth = {
        "diameter": rng.uniform(0.5, 6, n),
        "fn": rng.uniform(0.3, 1, n),
        "fcsf": rng.uniform(0, 0.3, n),
        "deperp": rng.uniform(0.5, 1.5, n),
    }
    return (
        get_model("axcalibersmt")(scheme),
        truth,
        axons,
        ([0.1, 0, 0, 0.01], [20, 1, 1, 1.7]),
    )


def positions(model, maps, n):
    """Return estimates (parameters, n) in solver coordinates."""
    rows = []
    for parameter in model.parameters:
        row = np.array(maps[parameter.name][:n], float)
        rows.append(np.log(row) if parameter.coordinate == "log" else row)
    return np.array(rows)


def first_positions(case, data):
    """Return where `fit` begins with one start, (parameters, voxels) in solver coordinates."""
    model, cpu = case.model, torch.device("cpu")
    kernel = Kernel(model, Objective(), torch.float32, cpu)
    block = Study(model, data, sigma=1 / case.snr).block(0, data.shape[1], cpu)
    dictionary = build_dictionary(kernel, Settings.dictionary, 1, Settings.seed)
    with torch.no_grad():
        found = find_starts(kernel, block.voxels.map(torch.Tensor.float), dictionary)[0]
    start = found.double().numpy()
    if kernel.amplitude is not None:
        start[kernel.amplitude] *= block.scale.numpy()
    return np.clip(start.T, *case.bounds).T


def chi_square(signal, position, data, snr):
    """Return the sum of squares over the noise variance of each voxel."""
    pairs = zip(position.T, data.T, strict=True)
    return np.array([((signal(x) - y) ** 2).sum() * snr**2 for x, y in pairs])


def machine():
    """Return what the numbers depend on."""
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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "bids_gacelle": __version__,
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
