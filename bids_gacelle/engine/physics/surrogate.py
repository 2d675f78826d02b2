"""Spoiled steady states of two exchanging pools by a small neural network.

`epgx.spoiled_steady_state` is exact; what is here is a fit to it. One network for each increment
of the RF phase it knows gives the logarithms of both pools' complex magnetisation over the ideally
spoiled one. It starts from the exact solution, cut off after a few orders, of one pool
whose ideally spoiled signal is that of the free one and which loses transverse magnetisation at
the slower rate of both: the network is left with what exchange and higher orders change.

The recurrence is no slower on a CPU than these networks, knows any increment and any T1 and T2 of
myelin, and has derivatives of its own (benchmarks/epgx.py). The networks are for where real
arithmetic of a fixed and small size is wanted, as in a fused kernel.

The weights lie beside this file, with a card that tells how they came about and how large the
errors are; `train_epgx` makes both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.physics.two_pools import exchange_modes, pool_signals

WEIGHTS = Path(__file__).with_name("surrogate.npz")
CARD = Path(__file__).with_name("surrogate.json")
R2_MYELIN = 1 / 0.015
# Orders of the single pool that the network starts from.
_ORDERS = 4
# Least fraction and recovery: below these rounding errors of single precision take over.
_NO_SHARE, _NO_RECOVERY = 1e-6, 1e-4

Layers = tuple[tuple[Tensor, Tensor], ...]


class SpoiledPools(NamedTuple):
    """Transverse magnetisation right after the pulse, for unit equilibrium (1 - f, f).

    Attributes
    ----------
    free, myelin
        Magnitudes.
    free_phase, myelin_phase
        Phases in radian with the RF phase taken off; 0 is where ideal spoiling leaves them.
    """

    free: Tensor
    myelin: Tensor
    free_phase: Tensor
    myelin_phase: Tensor


class Start(NamedTuple):
    """What a network is given, (features, ...), and what its output is added to, (4, ...)."""

    features: Tensor
    base: Tensor
    ideal: tuple[Tensor, Tensor]


def surrogate_start(
    fraction: Tensor,
    r1_free: Tensor,
    r2_free: Tensor,
    r1_myelin: Tensor,
    exchange: Tensor,
    tr: Tensor,
    angle: Tensor,
    increment: float,
) -> Start:
    """Return features of a network and the four numbers it corrects.

    These are log |S / B| and the phase of the free pool, then of the myelin pool, B being the
    ideally spoiled steady state.
    """
    fraction, r1_free, r2_free, r1_myelin, exchange, tr, angle = torch.broadcast_tensors(
        fraction, r1_free, r2_free, r1_myelin, exchange, tr, angle
    )
    signals = pool_signals(fraction, r1_free, r1_myelin, exchange, tr, angle)
    slow, _, cosine, _ = exchange_modes(
        fraction, r2_free, torch.full_like(r2_free, R2_MYELIN), exchange
    )
    decay = torch.exp(-2 * tr * slow)
    recovered, recovered_myelin = (_recovery(signal, angle) for signal in signals)
    tangent2 = torch.tan(0.5 * angle) ** 2
    log_size, phase, echo = _one_pool(decay, recovered, tangent2, math.radians(increment))
    features = (
        log_size,
        phase,
        *echo,
        decay,
        tangent2 / (tangent2 + recovered),
        torch.log(recovered),
        torch.log(recovered_myelin),
        torch.log(tr * slow),
        angle,
        fraction,
        cosine,
        torch.exp(-tr * r1_free),
        torch.exp(-tr * r1_myelin),
        tr * exchange,
        torch.exp(-tr * exchange / fraction.clamp_min(_NO_SHARE)),
        torch.log(tr),
    )
    nothing = torch.zeros_like(phase)
    base = torch.stack((log_size, phase, nothing, nothing))
    ideal = (1 - fraction) * signals[0], fraction * signals[1]
    return Start(torch.stack(features), base, ideal)


def _recovery(signal: Tensor, angle: Tensor) -> Tensor:
    """Return 1 - E1 of the pool that has an ideally spoiled signal alone."""
    versine = 2 * torch.sin(0.5 * angle) ** 2
    recovery = signal * versine / (torch.sin(angle) - signal * torch.cos(angle))
    return recovery.clamp(_NO_RECOVERY, 1 - _NO_RECOVERY)


def _one_pool(
    decay: Tensor, recovered: Tensor, tangent2: Tensor, increment: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return log |S / B| and phase of one pool, and the first echo; as in `epgx`, but real.

    `decay` is E2^2, `recovered` 1 - E1 and `tangent2` tan(a / 2)^2.
    """
    e = 1 - recovered
    echo = torch.zeros_like(decay), torch.zeros_like(decay)
    for k in range(_ORDERS - 1, -1, -1):
        turn = decay * math.cos((2 * k + 1) * increment), decay * math.sin((2 * k + 1) * increment)
        line = (
            1 - turn[0] * echo[0] + turn[1] * echo[1],
            -turn[0] * echo[1] - turn[1] * echo[0],
        )
        x = _reciprocal(line)
        if k == 0:
            break
        scale = tangent2 / (recovered**2 + e * (4 * math.sin(0.5 * k * increment) ** 2))
        y = scale * recovered * (1 + e), scale * e * (2 * math.sin(k * increment))
        gone = _reciprocal((x[0] + y[0], x[1] + y[1]))
        echo = 1 - gone[0], -gone[1]
    y0 = tangent2 * (1 + e)
    change = recovered * (2 * x[0] - 2) / (recovered + y0)
    log_size = 0.5 * torch.log(x[0] ** 2 + x[1] ** 2) - torch.log1p(change)
    return log_size, torch.atan(x[1] / x[0]), echo


def _reciprocal(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    scale = 1 / (z[0] * z[0] + z[1] * z[1])
    return z[0] * scale, -z[1] * scale


def network(layers: Sequence[tuple[Tensor, Tensor]], features: Tensor) -> Tensor:
    """Return what a network with tanh between its layers gives, (4, ...)."""
    state = features.flatten(1)
    for i, (weight, bias) in enumerate(layers):
        state = torch.addmm(bias[:, None], weight, torch.tanh(state) if i else state)
    return state.reshape(-1, *features.shape[1:])


class Surrogate:
    """Spoiled steady states for one increment of the RF phase.

    Parameters
    ----------
    increment
        In degrees; `increments()` are known.

    Raises
    ------
    ValueError
        There is no network for this increment.
    """

    def __init__(self, increment: float) -> None:
        if increment not in increments():
            raise ValueError(_other_increment(increment))
        self.increment = float(increment)
        with np.load(WEIGHTS) as file:
            names = sorted(n for n in file.files if n.startswith(f"{increment:g}/weight"))
            self._layers = tuple(
                (torch.from_numpy(file[n]), torch.from_numpy(file[n.replace("weight", "bias")]))
                for n in names
            )

    def layers(self, like: Tensor) -> Layers:
        """Return weights (out, in) and biases of all layers on the device of a tensor."""
        return tuple((weight.to(like), bias.to(like)) for weight, bias in self._layers)

    def __call__(
        self,
        fraction: Tensor,
        r1_free: Tensor,
        r2_free: Tensor,
        r1_myelin: Tensor,
        exchange: Tensor,
        tr: Tensor,
        angle: Tensor,
    ) -> SpoiledPools:
        """Return the steady state; parameters as of `epgx.spoiled_steady_state`, T2m 15 ms."""
        start = surrogate_start(
            fraction, r1_free, r2_free, r1_myelin, exchange, tr, angle, self.increment
        )
        free, free_phase, myelin, myelin_phase = start.base + network(
            self.layers(start.features), start.features
        )
        return SpoiledPools(
            start.ideal[0] * torch.exp(free),
            start.ideal[1] * torch.exp(myelin),
            free_phase,
            myelin_phase,
        )


@cache
def model_card() -> dict[str, Any]:
    """Return the card: ranges, increments, errors and how the weights were made."""
    return json.loads(CARD.read_text())


def increments() -> tuple[float, ...]:
    """Return the increments of the RF phase in degrees that there are networks for."""
    return tuple(model_card()["increments_deg"])


def _other_increment(increment: float) -> str:
    known = ", ".join(f"{value:g}" for value in increments())
    return (
        f"The surrogate of EPG-X knows RF phase increments of {known} degrees and nothing between "
        f"them, not {increment:g}."
    )


def outside_range(
    tr: float, angles: Sequence[float], t1_myelin: float, increment: float
) -> str | None:
    """Return a sentence on why a protocol is outside what the networks were trained on, or None.

    Parameters
    ----------
    tr, t1_myelin
        In s.
    angles
        Flip angles in radian, transmit field included.
    increment
        In degrees.
    """
    if increment not in increments():
        return _other_increment(increment)
    ranges = model_card()["ranges"]
    asked = {
        "tr_s": ("a TR", [1e3 * tr], "ms", 1e3),
        "angle_deg": ("flip angles", [math.degrees(a) for a in angles], "degrees", 1.0),
        "t1_myelin_s": ("a myelin T1", [1e3 * t1_myelin], "ms", 1e3),
    }
    for name, (what, values, unit, factor) in asked.items():
        low, high = (factor * limit for limit in ranges[name])
        wrong = [v for v in values if not low * (1 - 1e-6) <= v <= high * (1 + 1e-6)]
        if wrong:
            return (
                f"The surrogate of EPG-X was trained with {what} of {low:g} to {high:g} {unit}, "
                f"not {', '.join(f'{v:.4g}' for v in wrong)}."
            )
    return None
