"""What a fit minimises: noise model, loss and prior, checked and turned into numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Parameter, SignalModel

NOISE_MODELS = ("gaussian",)
LOSSES = ("l2",)

PriorArgument = str | Mapping[str, tuple[float, float]] | None


@dataclass(frozen=True)
class Prior:
    """Independent normal priors on the solver's coordinates; precision 0 means none.

    Attributes
    ----------
    mean, precision
        Shape (parameters,).
    """

    mean: NDArray[np.float64]
    precision: NDArray[np.float64]


@dataclass(frozen=True)
class Objective:
    """sum_m w_m (S_m - y_m)^2 / sigma^2 (+ ((z - mean) / sd)^2 for each parameter with a prior).

    The minimum without a prior is the maximum-likelihood estimate under Gaussian noise, with a
    prior the maximum a posteriori.
    """

    noise: str = "gaussian"
    loss: str = "l2"
    prior: Prior | None = None


def make_objective(model: SignalModel, noise: str, loss: str, prior: PriorArgument) -> Objective:
    """Return the checked objective.

    Parameters
    ----------
    model
        Gives the names, coordinates and weak priors.
    noise, loss
        One of `NOISE_MODELS`, one of `LOSSES`.
    prior
        None, "weak" (the prior every parameter declares), or {name: (mean, standard deviation)}
        in the solver's coordinate (the logarithm for parameters fitted on a log scale).

    Raises
    ------
    EngineError
        Something is unknown or not available.
    """
    if noise not in NOISE_MODELS:
        raise EngineError(f"Noise model {noise!r} is not available; there is {NOISE_MODELS[0]!r}.")
    if loss not in LOSSES:
        raise EngineError(f"Loss {loss!r} is not available; there is {LOSSES[0]!r}.")
    return Objective(noise, loss, _make_prior(model, prior))


def _make_prior(model: SignalModel, prior: PriorArgument) -> Prior | None:
    if prior is None:
        return None
    if isinstance(prior, str):
        if prior != "weak":
            raise EngineError(
                f"Prior {prior!r} is unknown; give None, 'weak' or {{name: (mean, sd)}}."
            )
        given = {p.name: p.prior for p in model.parameters if p.prior is not None}
    else:
        given = dict(prior)
    unknown = sorted(set(given) - set(model.parameter_names))
    if unknown:
        raise EngineError(
            f"The prior names {unknown[0]!r}, which {model.name} does not fit; "
            f"it fits {', '.join(model.parameter_names)}."
        )
    mean, precision = np.zeros(len(model.parameters)), np.zeros(len(model.parameters))
    for i, parameter in enumerate(model.parameters):
        if parameter.name in given:
            mean[i], sd = _check_normal(parameter, given[parameter.name])
            precision[i] = sd**-2
    return Prior(mean, precision)


def _check_normal(parameter: Parameter, normal: tuple[float, float]) -> tuple[float, float]:
    try:
        mean, sd = (float(value) for value in normal)
    except (TypeError, ValueError) as error:
        raise EngineError(
            f"The prior of {parameter.name} is {normal!r}; it must be (mean, sd)."
        ) from error
    if parameter.amplitude:
        raise EngineError(
            f"{parameter.name} is an amplitude and takes no prior: its scale is that of the data."
        )
    if not (np.isfinite(mean) and np.isfinite(sd) and sd > 0):
        raise EngineError(
            f"The prior of {parameter.name} is ({mean}, {sd}); "
            "the mean must be finite and the sd positive."
        )
    return mean, sd


def describe_prior(model: SignalModel, prior: Prior | None) -> dict[str, dict[str, object]] | None:
    """Return the prior as plain data, {parameter: {mean, sd, coordinate}}, for settings."""
    if prior is None:
        return None
    return {
        parameter.name: {
            "mean": float(mean),
            "sd": float(precision**-0.5),
            "coordinate": parameter.coordinate,
        }
        for parameter, mean, precision in zip(
            model.parameters, prior.mean, prior.precision, strict=True
        )
        if precision > 0
    }
