"""Compartments that relax, relative to their common signal without diffusion weighting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RelaxedSlopes(NamedTuple):
    """Derivatives of `relaxed`, one for each compartment, each (measurements, ...)."""

    fraction: list[Tensor]
    signal: list[Tensor]
    rate: list[Tensor]


def relaxed(
    fractions: Sequence[Tensor],
    signals: Sequence[Tensor],
    rates: Sequence[Tensor],
    echo_time: Tensor,
    first: float,
) -> Tensor:
    """Return E = sum_k f_k S_k exp(-TE R_k) / sum_k f_k exp(-TE0 R_k).

    Parameters
    ----------
    fractions
        f_k at an echo time of zero, (...) each; they add up to 1.
    signals
        S_k, (measurements, ...) each, 1 without diffusion weighting.
    rates
        R_k in 1/s, (...) each.
    echo_time
        TE in s, (measurements, 1...).
    first
        TE0 in s, of the signal without diffusion weighting that all others are relative to.
    """
    return _parts(fractions, signals, rates, echo_time, first)[0]


def relaxed_slopes(
    fractions: Sequence[Tensor],
    signals: Sequence[Tensor],
    rates: Sequence[Tensor],
    echo_time: Tensor,
    first: float,
) -> tuple[Tensor, RelaxedSlopes]:
    """Return `relaxed` and its derivatives by fractions, signals and rates (quotient rule)."""
    signal, share, later = _parts(fractions, signals, rates, echo_time, first)
    by_fraction, by_signal, by_rate = [], [], []
    for f, s, e, d in zip(fractions, signals, share, later, strict=True):
        by_fraction.append(e * (d * s - signal))
        by_signal.append(f * e * d)
        by_rate.append(f * e * (first * signal - echo_time * (d * s)))
    return signal, RelaxedSlopes(by_fraction, by_signal, by_rate)


def _parts(
    fractions: Sequence[Tensor],
    signals: Sequence[Tensor],
    rates: Sequence[Tensor],
    echo_time: Tensor,
    first: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return E, and of each compartment exp(-TE0 R) over the denominator and exp(-(TE - TE0) R).

    Fractions times the former are the compartments' shares of the signal at TE0.
    """
    decays = [torch.exp(-first * r) for r in rates]
    total = sum((f * e for f, e in zip(fractions, decays, strict=True)), start=0.0)
    share = [e / total for e in decays]
    later = [torch.exp(-(echo_time - first) * r) for r in rates]
    weighted = (
        f * e * (d * s) for f, e, d, s in zip(fractions, share, later, signals, strict=True)
    )
    signal = next(weighted)
    for part in weighted:
        signal = signal + part
    return signal, share, later
