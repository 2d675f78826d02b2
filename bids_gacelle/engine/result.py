"""The result of a fit, and how it is filled block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_gacelle.engine.kernels import Kernel
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.solvers import Solution
from bids_gacelle.engine.study import Study
from bids_gacelle.engine.uncertainty import Assessment, standard_deviations

FLAG_OUTSIDE = 1
FLAG_AT_BOUND = 2
FLAG_UNUSABLE = 4
FLAG_NOT_CONVERGED = 8
FLAG_SEVERAL_MINIMA = 16
FLAG_IMPLAUSIBLE = 32
FLAG_NAMES = {
    FLAG_OUTSIDE: "outside the mask",
    FLAG_AT_BOUND: "a parameter at a bound",
    FLAG_UNUSABLE: "unusable input",
    FLAG_NOT_CONVERGED: "not converged",
    FLAG_SEVERAL_MINIMA: "several minima of similar depth",
    FLAG_IMPLAUSIBLE: "excluded by a plausibility rule",
}


@dataclass(frozen=True)
class FitResult:
    """Maps of a fit, on the grid of the data.

    Attributes
    ----------
    maps, std
        Estimate and standard deviation of every parameter and derived quantity, float32 (*grid);
        NaN outside the mask and where there is none (a standard deviation also at a bound).
    flags
        uint8 (*grid): 0 ok, else the sum of the bits in `FLAG_NAMES`.
    nrmse
        float32 (*grid): root mean squared residual over root mean squared data.
    trace
        How the solver went: "evaluations" (voxels by number of model evaluations),
        "mean_evaluations", "winning_start" (voxels by index of the start that won); with spatial
        terms the "objective" at the start and after every iteration.
    settings
        What was done, ready for JSON.
    """

    maps: dict[str, NDArray[np.float32]]
    std: dict[str, NDArray[np.float32]]
    flags: NDArray[np.uint8]
    nrmse: NDArray[np.float32]
    trace: dict[str, Any]
    settings: dict[str, Any]


class Maps:
    """Results of the voxels of a mask, filled block by block.

    Parameters
    ----------
    model
        Gives the names.
    n
        Voxels in the mask.
    """

    def __init__(self, model: SignalModel, n: int) -> None:
        self.model = model
        names = (*model.parameter_names, *model.derived_names)
        self._values = {name: np.full(n, np.nan, np.float32) for name in names}
        self._std = {name: np.full(n, np.nan, np.float32) for name in names}
        self._flags = np.full(n, FLAG_UNUSABLE, np.uint8)
        self._nrmse = np.full(n, np.nan, np.float32)
        self._at_bound = np.zeros((len(model.parameters), n), bool)
        self._evaluations = np.zeros(n, np.int32)
        self._winner = np.zeros(n, np.int32)

    def store(
        self,
        where: NDArray[np.intp],
        scale: Tensor,
        kernel: Kernel,
        solution: Solution,
        assessment: Assessment,
    ) -> None:
        """Store some voxels.

        Parameters
        ----------
        where
            Their indices in the mask.
        scale
            What their data were divided by.
        kernel, solution, assessment
            In double precision.
        """
        values = self._natural(kernel, solution.position)
        values.update(kernel.model.derive(values))
        std = standard_deviations(kernel, solution.position, assessment)
        for parameter in self.model.parameters:
            if parameter.amplitude:
                values[parameter.name] = values[parameter.name] * scale
                std[parameter.name] = std[parameter.name] * scale
        for name in self._values:
            finite = values[name].isfinite()
            self._values[name][where] = _to_host(torch.where(finite, values[name], torch.nan))
            self._std[name][where] = _to_host(torch.where(finite, std[name], torch.nan))
        flags = (
            assessment.at_bound.any(0) * FLAG_AT_BOUND
            + ~solution.converged * FLAG_NOT_CONVERGED
            + assessment.rivals * FLAG_SEVERAL_MINIMA
        )
        self._flags[where] = _to_host(flags)
        self._nrmse[where] = _to_host((assessment.squares / assessment.power).sqrt())
        self._at_bound[:, where] = _to_host(assessment.at_bound)
        self._evaluations[where] = _to_host(solution.evaluations)
        self._winner[where] = _to_host(solution.winner)

    def _natural(self, kernel: Kernel, position: Tensor) -> dict[str, Tensor]:
        """Return parameters; one at a bound of its log coordinate is exactly at its bound."""
        values = kernel.parameters(position)
        for i, parameter in enumerate(self.model.parameters):
            if parameter.coordinate == "log":
                low, high = parameter.bounds
                value = torch.where(position[i] <= kernel.lower[i], low, values[parameter.name])
                values[parameter.name] = torch.where(position[i] >= kernel.upper[i], high, value)
        return values

    def share_at_bound(self) -> dict[str, float]:
        """Return the share of the usable voxels at a bound, by parameter."""
        usable = max(int((self._flags & FLAG_UNUSABLE == 0).sum()), 1)
        return {
            name: float(row.sum() / usable)
            for name, row in zip(self.model.parameter_names, self._at_bound, strict=True)
        }

    def result(self, study: Study, settings: dict[str, Any], trace: dict[str, Any]) -> FitResult:
        """Return everything on the grid."""
        usable = self._flags & FLAG_UNUSABLE == 0
        evaluations = self._evaluations[usable]
        trace = trace | {
            "evaluations": np.bincount(evaluations).tolist(),
            "mean_evaluations": float(evaluations.mean()) if len(evaluations) else 0.0,
            "winning_start": np.bincount(self._winner[usable]).tolist(),
        }
        return FitResult(
            maps={name: _on_grid(study, v, np.nan) for name, v in self._values.items()},
            std={name: _on_grid(study, v, np.nan) for name, v in self._std.items()},
            flags=_on_grid(study, self._flags, FLAG_OUTSIDE),
            nrmse=_on_grid(study, self._nrmse, np.nan),
            trace=trace,
            settings=settings,
        )


def _to_host(tensor: Tensor) -> NDArray[Any]:
    return tensor.cpu().numpy()


def _on_grid(study: Study, values: NDArray[Any], outside: float) -> NDArray[Any]:
    full = np.full(int(np.prod(study.grid)), outside, values.dtype)
    full[study.index] = values
    return full.reshape(study.grid)
