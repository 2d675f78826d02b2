"""Train the networks of `surrogate` on exact steady states.

``python -m bids_gacelle.engine.physics.train_epgx OUT --minutes 20`` makes OUT/surrogate.npz and
OUT/surrogate.json; torch and numpy are all it needs. The networks of all increments are trained
side by side. The loss counts errors of the magnetisation and of its derivative by flip angle, both
from the exact recurrence, as in the supplement of Chan et al. 2025. The optimiser is SOAP: Adam in
the eigenbasis of Shampoo's preconditioner, which brings such small networks to a few times smaller
errors in the same time than Adam alone.

References
----------
Vyas et al., arXiv 2409.11321 (2024), for the optimiser.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.physics.epgx import spoiled_steady_state
from bids_gacelle.engine.physics.surrogate import R2_MYELIN, Start, network, surrogate_start
from bids_gacelle.engine.physics.two_pools import bloch_mcconnell

INCREMENTS = (50.0, 117.0, 150.0)
# What the networks may be asked. T2 of free water above T1 does not occur and is left out.
RANGES = {
    "fraction": (0.0, 0.72),
    "t1_free_s": (0.5, 6.0),
    "t2_free_s": (0.02, 4.0),
    "t1_myelin_s": (0.15, 0.6),
    "exchange_per_s": (0.0, 10.0),
    "tr_s": (0.025, 0.085),
    "angle_deg": (1.0, 110.0),
}
# Tissue: most cases have a T2 below this, and errors are also stated for them alone.
TISSUE_T2 = 0.2
TISSUE_SHARE = 0.7
HELD_OUT_SEED = 1_000_003
ERRORS = ("free_magnitude", "myelin_magnitude", "free_phase_rad", "myelin_phase_signal")
# Errors that count as much as one another: of magnetisation, and of phases at vanishing ones.
_MAGNITUDE, _COMPLEX, _FREE_PHASE, _MYELIN_PHASE = 3e-5, 1e-4, 1.5e-3, 3e-2
_SLOPE, _SLOPE_WEIGHT = 0.3, 0.1
_STEP = 1e-4


class Tissue(NamedTuple):
    """What networks are asked: rates in 1/s, TR in s, the angle in radian, each (cases,)."""

    fraction: Tensor
    r1_free: Tensor
    r2_free: Tensor
    r1_myelin: Tensor
    exchange: Tensor
    tr: Tensor
    angle: Tensor

    def ideal(self) -> tuple[Tensor, Tensor]:
        """Return the steady state of both pools without echoes."""
        r1 = self.r1_free, self.r1_myelin
        return bloch_mcconnell(self.fraction, *r1, self.exchange, self.tr, self.angle)

    def start(self, increment: float) -> Start:
        """Return what a network starts from."""
        return surrogate_start(**self._asdict(), increment=increment)


class Cases(NamedTuple):
    """Training data of one increment, or of all with these on the first axis; single precision.

    Attributes
    ----------
    features, feature_slopes
        (features, cases), and their derivatives by flip angle.
    target, target_slopes
        (4, cases) what the network should give.
    scale
        (4, cases) reciprocal of the errors that count as one.
    """

    features: Tensor
    feature_slopes: Tensor
    target: Tensor
    target_slopes: Tensor
    scale: Tensor


def draw(n: int, seed: int, device: torch.device) -> Tissue:
    """Draw tissue and sequences, those of one device in double precision."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(8, n, generator=generator, dtype=torch.float64).to(device)

    def uniform(row: int, name: str) -> Tensor:
        low, high = RANGES[name]
        return low + (high - low) * u[row]

    low, high = RANGES["t1_free_s"]
    t1 = low * (high / low) ** u[1]
    low, high = RANGES["t2_free_s"]
    longest = t1.clamp_max(high)
    longest = torch.where(u[7] < TISSUE_SHARE, longest.clamp_max(TISSUE_T2), longest)
    t2 = low * (longest / low) ** u[2]
    return Tissue(
        uniform(0, "fraction"),
        1 / t1,
        1 / t2,
        1 / uniform(3, "t1_myelin_s"),
        uniform(4, "exchange_per_s"),
        uniform(5, "tr_s"),
        torch.deg2rad(uniform(6, "angle_deg")),
    )


def exact(tissue: Tissue, increment: float, block: int) -> Tensor:
    """Return log |S / B| and phase of the free and of the myelin pool, (4, cases)."""
    pools = spoiled_steady_state(
        **tissue._asdict(),
        r2_myelin=torch.full_like(tissue.r2_free, R2_MYELIN),
        increment=increment,
        tolerance=1e-7,
        block=block,
    )
    pairs = zip(pools, tissue.ideal(), strict=True)
    return torch.stack([v for s, b in pairs for v in (torch.log(s.abs() / b), s.angle())])


def make_cases(tissue: Tissue, increment: float, block: int) -> Cases:
    """Simulate the cases of one increment."""

    def at(angle: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and what is left for the network."""
        there = tissue._replace(angle=angle)
        begun = there.start(increment)
        return begun.features, exact(there, increment, block) - begun.base

    features, target = at(tissue.angle)
    up, down = (at(tissue.angle + s * _STEP) for s in (1, -1))
    slopes = [(u - d) / (2 * _STEP) for u, d in zip(up, down, strict=True)]
    free, myelin = tissue.ideal()
    scale = (
        free / _MAGNITUDE,
        free / _COMPLEX + 1 / _FREE_PHASE,
        myelin / _MAGNITUDE,
        myelin / _COMPLEX + 1 / _MYELIN_PHASE,
    )
    cases = Cases(features, slopes[0], target, slopes[1], torch.stack(scale))
    return Cases(*(part.float() for part in cases))


def all_cases(n: int, seed: int, device: torch.device) -> Cases:
    """Simulate the same cases for all increments, (increments, rows, cases)."""
    tissue = draw(n, seed, device)
    # Many small operations take as long for many cases as for a few on an accelerator.
    block = 8192 if device.type == "cpu" else 2**22
    chunk = 2**22
    made = []
    for increment in INCREMENTS:
        parts = [
            make_cases(Tissue(*(row[i : i + chunk] for row in tissue)), increment, block)
            for i in range(0, n, chunk)
        ]
        made.append([torch.cat(part, 1) for part in zip(*parts, strict=True)])
    return Cases(*(torch.stack(part) for part in zip(*made, strict=True)))


class Soap:
    """SOAP for matrices (networks, out, in); state is a list of dictionaries of tensors."""

    def __init__(self, parameters: list[Tensor], beta: float = 0.95, every: int = 10) -> None:
        self.parameters, self.beta, self.every = parameters, beta, every
        self.count = 0
        self.state: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the parameters along their gradients; the first call only looks at these."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not self.state:
            self.state = [_first_state(g) for g in gradients]
            return
        self.count += 1
        faded = 1 - self.beta**self.count
        for parameter, gradient, s in zip(self.parameters, gradients, self.state, strict=True):
            s["mean"].lerp_(gradient, 1 - self.beta)
            turned = s["left"].mT @ gradient @ s["right"]
            s["square"].lerp_(turned * turned, 1 - self.beta)
            step = (s["left"].mT @ s["mean"] @ s["right"]) / faded
            step = step / ((s["square"] / faded).sqrt() + 1e-8)
            parameter.sub_(rate * (s["left"] @ step @ s["right"].mT))
            s["rows"].lerp_(gradient @ gradient.mT, 1 - self.beta)
            s["columns"].lerp_(gradient.mT @ gradient, 1 - self.beta)
            if self.count % self.every == 0:
                s["left"] = torch.linalg.qr(s["rows"] @ s["left"])[0]
                s["right"] = torch.linalg.qr(s["columns"] @ s["right"])[0]


def _first_state(gradient: Tensor) -> dict[str, Tensor]:
    rows, columns = gradient @ gradient.mT, gradient.mT @ gradient
    return {
        "rows": rows,
        "columns": columns,
        "left": torch.linalg.eigh(rows)[1],
        "right": torch.linalg.eigh(columns)[1],
        "mean": torch.zeros_like(gradient),
        "square": torch.zeros_like(gradient),
    }


def forward(parameters: list[Tensor], values: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Networks (networks, out, in + 1 with the bias last) and their derivative along slopes."""
    for i, layer in enumerate(parameters):
        if i:
            values = torch.tanh(values)
            slopes = (1 - values * values) * slopes
        weight, bias = layer[..., :-1], layer[..., -1:]
        values, slopes = torch.baddbmm(bias, weight, values), weight @ slopes
    return values, slopes


def loss(parameters: list[Tensor], cases: Cases) -> Tensor:
    """Mean over cases of errors that grow as their square when small and linearly when large."""
    value, slope = forward(parameters, cases.features, cases.feature_slopes)
    error = (value - cases.target) * cases.scale
    turn = (slope - cases.target_slopes) * cases.scale * _SLOPE
    return _soft(error) + _SLOPE_WEIGHT * _soft(turn)


def _soft(error: Tensor) -> Tensor:
    return (torch.sqrt(1 + error * error) - 1).mean()


def first_parameters(cases: Cases, width: int, depth: int, seed: int) -> list[Tensor]:
    """Random layers; the last one is small enough for outputs to start below the targets."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [cases.features.shape[1], *[width] * depth, 4]
    device = cases.features.device
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        weight = torch.randn(len(INCREMENTS), fan_out, fan_in, generator=generator)
        bias = torch.zeros(len(INCREMENTS), fan_out, 1)
        layers.append(torch.cat((weight / fan_in**0.5, bias), 2).to(device))
    layers[-1] *= 0.3 * cases.target.std(2, keepdim=True)
    return layers


def train(cases: Cases, out: Path, options: argparse.Namespace) -> list[Tensor]:
    """Train from a checkpoint or from the start until the time is over."""
    checkpoint = out / "checkpoint.pt"
    parameters = first_parameters(cases, options.width, options.depth, options.seed)
    soap = Soap(parameters)
    spent, steps = 0.0, 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, map_location=cases.features.device, weights_only=True)
        for parameter, value in zip(parameters, kept["parameters"], strict=True):
            parameter.copy_(value)
        soap.state, soap.count = kept["state"], kept["count"]
        spent, steps = kept["spent"], kept["steps"]
        print(f"going on after {steps} steps and {spent / 60:.1f} minutes", flush=True)
    for parameter in parameters:
        parameter.requires_grad_()
    n, total = cases.features.shape[2], 60 * options.minutes
    began, saved = time.monotonic() - spent, spent
    generator = torch.Generator(cases.features.device).manual_seed(options.seed + steps)
    while (spent := time.monotonic() - began) < total:
        index = torch.randint(
            n, (min(options.batch, n),), generator=generator, device=cases.features.device
        )
        cost = loss(parameters, Cases(*(part[..., index] for part in cases)))
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(cost)
        rate = 0.5 * options.rate * (1 + math.cos(math.pi * spent / total))
        soap.step(rate * min(1, (steps + 1) / 100))
        steps += 1
        if steps % 500 == 0:
            print(
                f"{steps} steps, {spent / 60:.2f} minutes, loss {float(cost.detach()):.4f}",
                flush=True,
            )
        if spent - saved > options.checkpoint_s:
            saved = spent
            _save(checkpoint, parameters, soap, spent, steps)
    _save(checkpoint, parameters, soap, spent, steps)
    print(f"{steps} steps in {spent / 60:.1f} minutes", flush=True)
    return [parameter.detach() for parameter in parameters]


def _save(path: Path, parameters: list[Tensor], soap: Soap, spent: float, steps: int) -> None:
    """Write a checkpoint; a kill in between leaves the one before."""
    kept = {
        "parameters": [parameter.detach() for parameter in parameters],
        "state": soap.state,
        "count": soap.count,
        "spent": spent,
        "steps": steps,
    }
    part = path.with_suffix(".part")
    torch.save(kept, part)
    part.replace(path)


def standardise(cases: Cases) -> tuple[Cases, Tensor, Tensor]:
    """Return cases with features of mean 0 and deviation 1, and both of these."""
    mean = cases.features.mean(2, keepdim=True)
    deviation = cases.features.std(2, keepdim=True)
    return scaled(cases, mean, deviation), mean, deviation


def scaled(cases: Cases, mean: Tensor, deviation: Tensor) -> Cases:
    """Return cases with their features less a mean, over a deviation."""
    return cases._replace(
        features=(cases.features - mean) / deviation,
        feature_slopes=cases.feature_slopes / deviation,
    )


def folded(parameters: list[Tensor], mean: Tensor, deviation: Tensor) -> dict[str, np.ndarray]:
    """Return what is stored: layers that take features as they are, by increment."""
    first = parameters[0].double()
    weight = first[..., :-1] / deviation.mT.double()
    bias = first[..., -1:] - weight @ mean.double()
    layers = [torch.cat((weight, bias), 2), *parameters[1:]]
    arrays = {}
    for i, increment in enumerate(INCREMENTS):
        for j, layer in enumerate(layers):
            single = layer[i].float().cpu().numpy()
            arrays[f"{increment:g}/weight{j}"] = np.ascontiguousarray(single[:, :-1])
            arrays[f"{increment:g}/bias{j}"] = np.ascontiguousarray(single[:, -1])
    return arrays


def errors(arrays: dict[str, np.ndarray], n: int, seed: int) -> dict[str, Any]:
    """Errors of stored networks on cases of a seed: mean, 99th percentile and largest.

    Magnitudes are those of unit equilibrium. The phase of the myelin pool, which means nothing
    where there is next to no myelin, is given times its magnitude.
    """
    tissue = draw(n, seed, torch.device("cpu"))
    stated: dict[str, Any] = {}
    for increment in INCREMENTS:
        start = Tissue(*(row.float() for row in tissue)).start(increment)
        depth = sum(name.startswith(f"{increment:g}/weight") for name in arrays)
        layers = [
            tuple(
                torch.as_tensor(arrays[f"{increment:g}/{kind}{j}"]) for kind in ("weight", "bias")
            )
            for j in range(depth)
        ]
        ours = start.base + network(layers, start.features)  # type: ignore[arg-type]
        truth = exact(tissue, increment, 8192)
        free, myelin = tissue.ideal()
        wrong = dict(
            zip(
                ERRORS,
                (
                    free * (ours[0].exp() - truth[0].exp()).abs(),
                    myelin * (ours[2].exp() - truth[2].exp()).abs(),
                    (ours[1] - truth[1]).abs(),
                    myelin * truth[2].exp() * (ours[3] - truth[3]).abs(),
                ),
                strict=True,
            )
        )
        tissues = {"all": tissue.r2_free > 0, "t2_below_200_ms": 1 / tissue.r2_free < TISSUE_T2}
        stated[f"{increment:g}"] = {
            where: {name: _summary(error[chosen]) for name, error in wrong.items()}
            for where, chosen in tissues.items()
        }
    return stated


def _summary(error: Tensor) -> dict[str, float]:
    found = (error.mean(), torch.quantile(error, 0.99), error.max())
    return {k: float(f"{v:.3g}") for k, v in zip(("mean", "p99", "max"), found, strict=True)}


def _commit() -> str:
    """Return the commit of the checkout, or nothing where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def write(
    out: Path, arrays: dict[str, np.ndarray], options: argparse.Namespace, commit: str
) -> None:
    """Write weights and card."""
    np.savez(out / "surrogate.npz", **arrays)  # type: ignore[arg-type]
    card = {
        "what": "log magnitude over Bloch-McConnell, and phase, of the free and the myelin pool "
        "in an RF- and gradient-spoiled steady state with exchange (EPG-X)",
        "increments_deg": list(INCREMENTS),
        "ranges": RANGES,
        "t2_myelin_s": 1 / R2_MYELIN,
        "weights_per_increment": sum(a.size for a in arrays.values()) // len(INCREMENTS),
        "errors": errors(arrays, options.held_out, HELD_OUT_SEED),
        "held_out": {"cases": options.held_out, "seed": HELD_OUT_SEED},
        "training": {
            key: getattr(options, key)
            for key in ("cases", "minutes", "batch", "rate", "width", "depth", "seed")
        }
        | {"device": options.device, "torch": torch.__version__, "commit": commit},
    }
    (out / "surrogate.json").write_text(json.dumps(card, indent=1) + "\n")
    for increment, where in card["errors"].items():  # type: ignore[attr-defined]
        for tissue, rows in where.items():
            print(increment, tissue, json.dumps(rows), flush=True)


def parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    made = argparse.ArgumentParser(description=__doc__, prog="train_epgx")
    made.add_argument("out", type=Path, help="folder of weights, card and checkpoint")
    made.add_argument("--device", default="cpu")
    made.add_argument("--cases", type=int, default=300_000, help="simulated for training")
    made.add_argument("--minutes", type=float, default=20, help="of training, data not counted")
    made.add_argument("--batch", type=int, default=4096)
    made.add_argument("--rate", type=float, default=3e-3)
    made.add_argument("--width", type=int, default=40)
    made.add_argument("--depth", type=int, default=3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--held-out", type=int, default=100_000, help="cases errors are stated for")
    made.add_argument("--checkpoint-s", type=float, default=20, help="between two checkpoints")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, train, and write weights and card."""
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    began, commit = time.monotonic(), _commit()
    cases = all_cases(options.cases, options.seed, torch.device(options.device))
    print(f"simulated in {time.monotonic() - began:.0f} s", flush=True)
    cases, mean, deviation = standardise(cases)
    parameters = train(cases, options.out, options)
    write(options.out, folded(parameters, mean, deviation), options, commit)


if __name__ == "__main__":
    main()
