"""Numpy models, written as a user of scipy would, and cases of the other diffusion models.

SANDI has b = .5, 1.2, 2.4, 4 and 6 ms/um^2, 32 directions at SNR 50; models of echo time have the
shells of AxCaliber-SMT's first diffusion time at 51 and 92 ms, axonalt2 b = 6 at four echo times;
the rest have NEXI's 15 shells.
"""

from __future__ import annotations

import itertools

import numpy as np
import scipy.special
from protocols import DELTA, NODES, WEIGHTS, B, kernel, stick

from bids_gacelle.engine import DiffusionScheme, get_model

SMALL = 6.0
SANDI_B, SANDI_DELTA, SANDI_SMALL = np.array([0.5, 1.2, 2.4, 4.0, 6.0]), 19.6, 7.0
DS, D0, DCSF, R2CSF = 3.0, 1.7, 3.0, 0.5
R2A, K2A = 1 / 0.12697, 2.32
ECHO_B = np.array([0.8, 1.5, 2.4, 3.45, 4.75, 6.0])
ECHO_TIMES = np.array([0.051, 0.092])
TE_B = np.concatenate((ECHO_B, [0.0], ECHO_B))  # b=0 of the first echo time is 1 by definition
TE = np.repeat(ECHO_TIMES, (6, 7))
TE_DELTA = 30.0
TE4 = np.array([0.051, 0.065, 0.079, 0.092])
STEPS = 8


def _roots(shift):
    """First roots of J1'(x) (shift 1) or of (x^2 - 2) sin x + 2 x cos x (shift 2)."""
    if shift == 1:
        return scipy.special.jnp_zeros(1, 10)
    x = np.pi * np.arange(1, 11) - 2 / (np.pi * np.arange(1, 11))
    for _ in range(8):
        slope = x**2 * np.cos(x)
        x = x - ((x**2 - 2) * np.sin(x) + 2 * x * np.cos(x)) / slope
    return x


_SQUARES = {shift: _roots(shift) ** 2 for shift in (1, 2)}


def restricted(radius, shift, diffusivity, b, small, big):
    """Attenuation exponents of a cylinder (shift 1) or sphere (shift 2), (shells,)."""
    square, time = _SQUARES[shift], radius**2 / diffusivity
    g2 = b / (small**2 * (big - small / 3))
    s, d = square * small / time, square * np.reshape(big / time, (-1, 1))
    bracket = -2 + 2 * s + 2 * np.exp(-s) + 2 * np.exp(-d) - np.exp(-(d + s)) - np.exp(-(d - s))
    return diffusivity * g2 * time**3 * (2 / (square**3 * (square - shift)) * bracket).sum(1)


def nexi4(x):
    f, dn, de, log_time, p2, p4 = x
    m = kernel(f, dn, de, np.exp(log_time))
    second, fourth = 1.5 * NODES**2 - 0.5, (35 * NODES**4 - 30 * NODES**2 + 3) / 8
    s2, s4 = (np.abs(m @ (WEIGHTS * p)) for p in (second, fourth))
    return np.concatenate((m @ WEIGHTS, p2 * s2, p4 * s4))


def nexidot(x):
    return (1 - x[4]) * (kernel(*x[:3], np.exp(x[3])) @ WEIGHTS) + x[4]


def sandix(x):
    radius, fs, fin, dn, de, log_time = x
    soma = np.exp(-restricted(radius, 2, DS, B, SMALL, DELTA))
    return fs * soma + (1 - fs) * (kernel(fin, dn, de, np.exp(log_time)) @ WEIGHTS)


def smex(x):
    """Finite pulses: exchange and attenuation split symmetrically in short steps of each pulse."""
    f, dn, de, log_time = x
    out, back = (1 - f) / np.exp(log_time), f / np.exp(log_time)
    q2 = (B / (DELTA - SMALL / 3))[:, None]
    first, second = np.full((len(B), len(NODES)), f), np.full((len(B), len(NODES)), 1 - f)
    edges = np.linspace(0, 1, 4 * STEPS + 1)
    plateau = [(DELTA[:, None] - SMALL, 1.0)]
    ramp = [
        (SMALL / (4 * STEPS), (b**3 - a**3) / 3 / (b - a)) for a, b in itertools.pairwise(edges)
    ]
    for time, part in (*ramp, *plateau, *ramp[::-1]):
        a, d = q2 * part * dn * NODES**2 + out, q2 * part * de + back
        mean, half = (a + d) / 2 * time, (a - d) / 2 * time
        gap = np.sqrt(half**2 + out * back * time**2) + 1e-12
        slow, quick = np.exp(gap - mean) / 2, np.exp(-gap - mean) / 2
        cosh, sinh = slow + quick, (slow - quick) / gap
        first, second = (
            (cosh - half * sinh) * first + back * time * sinh * second,
            out * time * sinh * first + (cosh + half * sinh) * second,
        )
    return (first + second) @ WEIGHTS


def sandi(x):
    radius, fs, fin, dn, de = x
    soma = np.exp(-restricted(radius, 2, DS, SANDI_B, SANDI_SMALL, SANDI_DELTA))
    return fs * soma + (1 - fs) * (fin * stick(SANDI_B * dn) + (1 - fin) * np.exp(-SANDI_B * de))


def mcmicro(x):
    f, d = x
    return f * stick(B * d) + (1 - f) * np.exp(-B * (1 - f) * d) * stick(B * f * d)


def mcmicro_te(x):
    f, d, axon, extra = x
    a, e = f * np.exp(-TE * axon), (1 - f) * np.exp(-TE * extra)
    signal = a * stick(TE_B * d) + e * np.exp(-TE_B * (1 - f) * d) * stick(TE_B * f * d)
    return signal / (f * np.exp(-TE[0] * axon) + (1 - f) * np.exp(-TE[0] * extra))


def meaxcalibersmt(x):
    fn, fcsf, radial, diameter, extra = x
    c = restricted(diameter / 2, 1, D0, TE_B, SMALL, TE_DELTA)
    inner = np.exp(-c) * stick(np.maximum(TE_B * D0 - c, 0))
    outer = np.exp(-TE_B * radial) * stick(TE_B * (D0 - radial))
    axon = np.exp(-TE * (R2A + K2A / (diameter / 2)))
    shares = (1 - fcsf) * fn * axon, (1 - fcsf) * (1 - fn) * np.exp(-TE * extra)
    csf = fcsf * np.exp(-TE * R2CSF)
    signal = shares[0] * inner + shares[1] * outer + csf * np.exp(-TE_B * DCSF)
    return signal / (shares[0][0] + shares[1][0] + csf[0])


def axonalt2(x):
    diameter, s0 = x
    return s0 * np.exp(-TE4 * (R2A + K2A / (diameter / 2)))


_TEX = 0, np.log(150)
_EXCHANGE = {"fn": (0.1, 0.8), "dn": (1.5, 3), "de": (0.5, 1.5), "tex": (2, 50)}
_SOMA = {"rs": (2, 12), "fs": (0.05, 0.6), "fin": (0.05, 0.9)}
_NEXI = DiffusionScheme(b=B, big_delta=DELTA, small_delta=SMALL)
_SANDI = DiffusionScheme(b=SANDI_B, big_delta=SANDI_DELTA, small_delta=SANDI_SMALL)
_ECHO = DiffusionScheme(b=TE_B, big_delta=TE_DELTA, small_delta=SMALL, echo_time=TE)

# name: model, options, scheme, signal, truth, bounds in the solver's coordinate, SNR
CASES = {
    "mcmicro": (
        "mcmicro", {}, _NEXI, mcmicro, {"fn": (0.2, 0.8), "d": (1, 3)},
        ([0, 0.1], [1, 3.5]), 400,
    ),
    "mcmicro_te": (
        "mcmicro", {"relaxation": True}, _ECHO, mcmicro_te,
        {"fn": (0.2, 0.8), "d": (1, 3), "r2a": (8, 20), "r2e": (15, 40)},
        ([0, 0.1, 1, 1], [1, 3.5, 50, 75]), 400,
    ),
    "nexi4": (
        "nexi", {"l_max": 4}, _NEXI, nexi4, _EXCHANGE | {"p2": (0.05, 0.5), "p4": (0.05, 0.4)},
        ([0, 0.1, 0.1, _TEX[0], 0, 0], [1, 3.5, 3.5, _TEX[1], 1, 1]), 400,
    ),
    "nexidot": (
        "nexidot", {}, _NEXI, nexidot, _EXCHANGE | {"fdot": (0.0, 0.2)},
        ([0, 0.1, 0.1, _TEX[0], 0], [1, 3.5, 3.5, _TEX[1], 1]), 400,
    ),
    "smex": (
        "smex", {}, _NEXI, smex, _EXCHANGE,
        ([0, 0.1, 0.1, _TEX[0]], [1, 3.5, 3.5, _TEX[1]]), 400,
    ),
    "sandi": (
        "sandi", {}, _SANDI, sandi, _SOMA | {"dn": (0.5, 3), "de": (0.5, 3)},
        ([0.1, 0, 0, 0.1, 0.1], [15, 1, 1, 3.5, 3.5]), 280,
    ),
    "sandix": (
        "sandix", {}, _NEXI, sandix, _SOMA | {k: v for k, v in _EXCHANGE.items() if k != "fn"},
        ([0.1, 0, 0, 0.1, 0.1, _TEX[0]], [15, 1, 1, 3.5, 3.5, _TEX[1]]), 400,
    ),
    "meaxcalibersmt": (
        "meaxcalibersmt", {}, _ECHO, meaxcalibersmt,
        {"fn": (0.3, 0.9), "fcsf": (0, 0.2), "deperp": (0.5, 1.5), "diameter": (1, 6),
         "r2e": (15, 40)},
        ([0, 0, 0.01, 0.1, 1], [1, 1, 1.7, 20, 75]), 240,
    ),
    "axonalt2": (
        "axonalt2", {}, DiffusionScheme(b=np.full(4, 6.0), echo_time=TE4), axonalt2,
        {"diameter": (1, 6), "S0": (0.3, 0.6)}, ([0.1, 0], [20, np.inf]), 240,
    ),
}  # fmt: skip


def make(name, n, rng):
    """Return the SNR, and model, truth, numpy signal and bounds of a `protocols.Case`."""
    model, options, scheme, signal, ranges, bounds, snr = CASES[name]
    built = get_model(model)(scheme, **options)
    truth = {p: rng.uniform(*ranges[p], n) for p in built.parameter_names}
    assert list(ranges) == list(built.parameter_names), (list(ranges), built.parameter_names)
    return snr, built, truth, signal, bounds
