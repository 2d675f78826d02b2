"""What a fit minimises: noise model, loss and prior, checked and turned into numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Parameter, SignalModel

NOISE_MODELS = ("gaussian", "rician")
LOSSES = ("l2", "l1", "huber")

# Huber's corner in standard deviations: 95 % efficient for normal noise.
HUBER_CORNER = 1.345
# |r| is rounded off within this many standard deviations, first widely to come near the optimum.
L1_CORNERS = (0.3, 0.03)
# Variance of an estimate relative to least squares, for normal noise (Huber 1964; pi/2 for L1).
LOSS_VARIANCE = {"l2": 1.0, "huber": 1 / 0.95, "l1": np.pi / 2}

Normal = tuple[Any, Any]
PriorArgument = str | Mapping[str, Normal] | None


class Misfit(NamedTuple):
    """A loss and its first two derivatives by the signal; None: a curvature of 1."""

    cost: Tensor
    slope: Tensor
    curvature: Tensor | None


@dataclass(frozen=True)
class Prior:
    """Independent normal priors on the solver's coordinates.

    Attributes
    ----------
    mean, sd
        By parameter, 0-d or (*grid); where the sd is not a positive number there is no prior.
    """

    mean: dict[str, NDArray[np.float64]]
    sd: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Objective:
    """The sum over measurements of loss(S_m - y_m), plus ((z - mean) / sd)^2 / 2 of each prior.

    L2 with Gaussian noise and without a prior gives the maximum-likelihood estimate, with a prior
    the maximum a posteriori. L1 and Huber are in units of the noise. With Rician noise the L2 loss
    of single magnitudes is the exact likelihood; averages of magnitudes, and the other losses, are
    compared with the expected magnitude instead of the signal.

    Attributes
    ----------
    corner
        Where an absolute value is rounded off, in standard deviations.
    """

    noise: str = "gaussian"
    loss: str = "l2"
    prior: Prior | None = None
    corner: float = field(default=L1_CORNERS[-1])

    @property
    def needs_noise(self) -> bool:
        """Whether it cannot be computed without the noise level."""
        return self.noise != "gaussian" or self.loss != "l2" or self.prior is not None

    def stages(self) -> tuple[Objective, ...]:
        """Return the objectives to minimise one after the other, each from the last optimum."""
        if self.loss != "l1":
            return (self,)
        return tuple(replace(self, corner=corner) for corner in L1_CORNERS)

    def misfit(self, residual: Tensor, sd: Tensor | None) -> Misfit:
        """Return the loss of residuals.

        Parameters
        ----------
        residual
            Expected minus measured, (measurements, voxels).
        sd
            Standard deviation of each measurement; not needed for L2.

        Returns
        -------
        Misfit in squared units of the data: half the squared residual near 0 for every loss but
        L1, which is sd |residual|.
        """
        if self.loss == "l2":
            return Misfit(0.5 * residual**2, residual, None)
        assert sd is not None
        if self.loss == "huber":
            corner = HUBER_CORNER * sd
            size = residual.abs()
            inner = torch.minimum(size, corner)
            return Misfit(
                inner * (size - 0.5 * inner),
                torch.maximum(torch.minimum(residual, corner), -corner),
                corner / torch.maximum(size, corner),
            )
        rounded = torch.sqrt(residual**2 + (self.corner * sd) ** 2)
        return Misfit(sd * (rounded - self.corner * sd), sd * residual / rounded, sd / rounded)


def make_objective(
    model: SignalModel, noise: str, loss: str, prior: PriorArgument, grid: tuple[int, ...] = ()
) -> Objective:
    """Return the checked objective.

    Parameters
    ----------
    model
        Gives the names, coordinates and weak priors.
    noise, loss
        One of `NOISE_MODELS`, one of `LOSSES`.
    prior
        None, "weak" (the prior every parameter declares), or {name: (mean, standard deviation)}
        in the solver's coordinate (the logarithm for parameters fitted on a log scale), each a
        number or a map.
    grid
        Shape of the maps.

    Raises
    ------
    EngineError
        Something is unknown or not available.
    """
    if noise not in NOISE_MODELS:
        raise EngineError(
            f"Noise model {noise!r} is unknown; there are {', '.join(NOISE_MODELS)}."
        )
    if loss not in LOSSES:
        raise EngineError(f"Loss {loss!r} is unknown; there are {', '.join(LOSSES)}.")
    if noise == "rician" and model.signed:
        raise EngineError(
            f"{model.name} with these options is fitted to signed data, whose noise is Gaussian; "
            "Rician noise is that of magnitudes."
        )
    return Objective(noise, loss, _make_prior(model, prior, grid))


def _make_prior(model: SignalModel, prior: PriorArgument, grid: tuple[int, ...]) -> Prior | None:
    if prior is None:
        return None
    if isinstance(prior, str):
        if prior != "weak":
            raise EngineError(
                f"Prior {prior!r} is unknown; give None, 'weak' or {{name: (mean, sd)}}."
            )
        given: dict[str, Normal] = {
            p.name: p.prior for p in model.parameters if p.prior is not None
        }
    elif isinstance(prior, Mapping):
        given = dict(prior)
    else:
        raise EngineError(f"prior is {prior!r}; give None, 'weak' or {{name: (mean, sd)}}.")
    unknown = sorted(set(given) - set(model.parameter_names))
    if unknown:
        raise EngineError(
            f"The prior names {unknown[0]!r}, which {model.name} does not fit; "
            f"it fits {', '.join(model.parameter_names)}."
        )
    normals = {
        p.name: _check_normal(p, given[p.name], grid) for p in model.parameters if p.name in given
    }
    return Prior(
        mean={name: normal[0] for name, normal in normals.items()},
        sd={name: normal[1] for name, normal in normals.items()},
    )


def _check_normal(
    parameter: Parameter, normal: Normal, grid: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    try:
        mean, sd = (_number_or_map(value) for value in normal)
    except (TypeError, ValueError) as error:
        raise EngineError(
            f"The prior of {parameter.name} is {normal!r}; it must be (mean, sd)."
        ) from error
    if parameter.amplitude:
        raise EngineError(
            f"{parameter.name} is an amplitude and takes no prior: its scale is that of the data."
        )
    for array in (mean, sd):
        if array.ndim and array.shape != grid:
            raise EngineError(
                f"The prior map of {parameter.name} has shape {array.shape} but the data have the "
                f"grid {grid}."
            )
    usable = np.isfinite(mean) & np.isfinite(sd) & (sd > 0)
    if not usable.any():
        raise EngineError(
            f"The prior of {parameter.name} is ({mean}, {sd}); "
            "the mean must be finite and the sd positive."
        )
    return mean, sd


def _number_or_map(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def describe_prior(model: SignalModel, prior: Prior | None) -> dict[str, dict[str, object]] | None:
    """Return the prior as plain data, {parameter: {mean, sd, coordinate}}, for settings."""
    if prior is None:
        return None

    def plain(array: NDArray[np.float64]) -> object:
        return "map" if array.ndim else float(array)

    return {
        parameter.name: {
            "mean": plain(prior.mean[parameter.name]),
            "sd": plain(prior.sd[parameter.name]),
            "coordinate": parameter.coordinate,
        }
        for parameter in model.parameters
        if parameter.name in prior.mean
    }
