"""How many EPG-X steady states are found in a minute, and how well, against pulse by pulse.

The cases have T1 < 2 s, T2 < 0.2 s and TR of 25 to 85 ms. The reference is a simulation of the
configurations, pulse by pulse, of all cases of a sample at once, for as many pulses as it takes
to come within the tolerance of the steady state. Times per case are also those of the networks,
differentiated in forward mode, and of the recurrence with its own derivatives.

Run as ``.venv/bin/python benchmarks/epgx.py``; it writes results/epgx.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import numpy as np
import torch
from protocols import RESULTS, machine
from torch.func import jvp

from bids_gacelle.engine.physics.epgx import spoiled_steady_state
from bids_gacelle.engine.physics.epgx_derivatives import spoiled_steady_state_derivatives
from bids_gacelle.engine.physics.surrogate import R2_MYELIN, Surrogate

INCREMENTS = (50.0, 117.0, 150.0)
TOLERANCE = 1e-6


def draw(n, seed=0):
    """Draw fraction, r1_free, r2_free, r1_myelin, r2_myelin, exchange, TR and angle."""
    rng = np.random.default_rng(seed)
    rows = (
        rng.uniform(0, 0.72, n),
        1 / rng.uniform(0.5, 2, n),
        1 / rng.uniform(0.02, 0.2, n),
        1 / rng.uniform(0.15, 0.6, n),
        np.full(n, R2_MYELIN),
        rng.uniform(0, 10, n),
        rng.uniform(0.025, 0.085, n),
        np.deg2rad(rng.uniform(1, 110, n)),
    )
    return tuple(torch.tensor(row) for row in rows)


def pulse_by_pulse(values, increment):
    """Simulate all cases together, configurations up to the order that fades to the tolerance."""
    f, r1_free, r2_free, r1_myelin, r2_myelin, exchange, tr, angle = values
    back = exchange * (1 - f) / f

    def decay(r_free, r_myelin):
        rows = [r_free + exchange, -back], [-exchange, r_myelin + back]
        rates = torch.stack([torch.stack(row, -1) for row in rows], -2)
        return torch.linalg.matrix_exp(-tr[:, None, None] * rates).to(torch.complex128)

    e1, e2 = decay(r1_free, r1_myelin), decay(r2_free, r2_myelin)
    pulses = math.ceil(float((-math.log(TOLERANCE) / (tr * r1_free)).max()))
    orders = math.ceil(float((-math.log(TOLERANCE) / (2 * tr * r2_free)).max())) + 1
    equilibrium = torch.stack((1 - f, f), -1).to(torch.complex128)
    recovery = equilibrium - (e1 @ equilibrium[..., None])[..., 0]
    plus, minus = (torch.zeros(len(f), 2, orders, dtype=torch.complex128) for _ in range(2))
    z = torch.zeros_like(plus)
    z[..., 0] = equilibrium
    cos2, sin2 = (g(angle / 2)[:, None, None] ** 2 for g in (torch.cos, torch.sin))
    cosine, sine = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    for n in range(pulses):
        phase = math.radians(increment) * n * (n + 1) / 2 % (2 * math.pi)
        turn = complex(math.cos(phase), math.sin(phase))
        plus, minus, z = (
            cos2 * plus + turn**2 * sin2 * minus - 1j * turn * sine * z,
            turn**-2 * sin2 * plus + cos2 * minus + 1j / turn * sine * z,
            cosine * z + 0.5j * sine * (turn * minus - plus / turn),
        )
        signal = 1j * plus[..., 0] / turn
        plus, minus, z = e2 @ plus, e2 @ minus, e1 @ z
        z[..., 0] += recovery
        plus, minus = plus.roll(1, -1), minus.roll(-1, -1)
        minus[..., -1] = 0
        plus[..., 0] = minus[..., 0].conj()
    return signal.T, pulses


def timed(function, repeats=5):
    """Return the shortest time in s."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def slopes(function, values):
    """Differentiate by every argument in forward mode."""
    for i in range(len(values)):
        along = tuple((torch.ones_like if i == j else torch.zeros_like)(v)
                      for j, v in enumerate(values))  # fmt: skip
        jvp(function, values, along)


def of_increment(increment, n, sample):
    values = draw(n)
    result = {}
    for name, given in (("float64", values), ("float32", tuple(v.float() for v in values))):
        seconds = timed(lambda given=given: spoiled_steady_state(*given, increment))
        tight = torch.stack(spoiled_steady_state(*values, increment, tolerance=1e-13))
        error = (torch.stack(spoiled_steady_state(*given, increment)) - tight).abs().amax(0)
        result[name] = {
            "per_minute": round(60 * n / seconds),
            "error_p99": float(torch.quantile(error, 0.99)),
            "error_max": float(error.max()),
        }
    few = draw(sample, seed=1)
    began = time.perf_counter()
    simulated, pulses = pulse_by_pulse(few, increment)
    seconds = (time.perf_counter() - began) / sample
    ours = torch.stack(spoiled_steady_state(*few, increment, tolerance=1e-13))
    result["pulse_by_pulse"] = {
        "cases": sample,
        "pulses": pulses,
        "per_minute": round(60 / seconds),
        "difference_max": float((ours - simulated).abs().max()),
        "times_faster": round(result["float64"]["per_minute"] * seconds / 60),
    }
    result["single_precision_us"] = of_surrogate(increment, tuple(v.float() for v in values))
    return result


def of_surrogate(increment, values):
    """Time the networks, and the recurrence with a fixed number of orders, for the same cases."""
    few = tuple(v[:8192] for v in values)
    f, r1, r2, r1_myelin, _, exchange, tr, angle = few
    surrogate = Surrogate(increment)
    n = len(f)

    def networks(f, r1, r2, k, a):
        return torch.stack(surrogate(f, r1, r2, r1_myelin, k, tr, a))

    varied = f, r1, r2, exchange, angle
    per_case = {
        "networks": timed(lambda: networks(*varied)),
        "networks_with_five_slopes": timed(lambda: slopes(networks, varied), 3),
    }
    for orders in (12, 16, 24):
        for name, function in (
            (f"{orders}_orders", spoiled_steady_state),
            (f"{orders}_orders_with_five_slopes", spoiled_steady_state_derivatives),
        ):
            per_case[name] = timed(
                lambda function=function, orders=orders: function(*few, increment, orders=orders)
            )
    return {name: round(1e6 * seconds / n, 3) for name, seconds in per_case.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--sample", type=int, default=300)
    options = parser.parse_args()
    found = {
        "machine": machine(),
        "cases": options.cases,
        "tolerance": TOLERANCE,
        "increments_deg": {
            f"{i:g}": of_increment(i, options.cases, options.sample) for i in INCREMENTS
        },
    }
    text = json.dumps(found, indent=1)
    (RESULTS / "epgx.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
