"""The result of a fit, and how it is filled block by block."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_gacelle.engine.kernels import Kernel, SharedFactor, Voxels, span
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.solvers import Solution
from bids_gacelle.engine.study import Study
from bids_gacelle.engine.uncertainty import EndPoints, assess, standard_deviations

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

# Voxels assessed at once: tensors of double precision that stay in a processor's cache ...
_AT_ONCE = 1024
# ... derivatives in so many bytes, of so many voxels, where compiled code is called ...
_CACHED, _FEWEST, _MOST = 1_300_000, 512, 4096
# ... or what keeps a GPU busy.
_AT_ONCE_CUDA = 1 << 16


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
    chi2
        float32 (*grid): reduced chi-square, about 1 where model and noise level describe the data
        (noise that measurements share, as that of a common b=0 image, is not counted); None when
        no noise level was given.
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
    chi2: NDArray[np.float32] | None
    trace: dict[str, Any]
    settings: dict[str, Any]


class BlockResult(NamedTuple):
    """Results of the usable voxels of a block, (..., voxels), on the device or on the host."""

    values: Tensor
    std: Tensor
    flags: Tensor
    nrmse: Tensor
    chi2: Tensor
    at_bound: Tensor
    evaluations: Tensor
    winner: Tensor


class Assessor:
    """Turns the solutions of one model into results, compiled when asked for.

    Parameters
    ----------
    kernel
        In double precision.
    compiled
        Whether to compile.
    lanes
        On a GPU so many voxels at once, if that many fit.
    """

    def __init__(self, kernel: Kernel, *, compiled: bool, lanes: int) -> None:
        self.kernel = kernel
        if kernel.device.type == "cuda":
            self._size = max(min(lanes, _AT_ONCE_CUDA), _AT_ONCE)
        else:
            self._size = _cached(kernel.model) if compiled else _AT_ONCE
        self._found = kernel.compile("results", self._results) if compiled else self._results

    def results(
        self, voxels: Voxels, solution: Solution, scale: Tensor, shared: SharedFactor | None = None
    ) -> BlockResult:
        """Return the results of voxels.

        Parameters
        ----------
        voxels
            In double precision.
        solution
            In any precision.
        scale
            (voxels,) what their data were divided by.
        shared
            Noise that measurements share.
        """
        model, n, size = self.kernel.model, len(scale), self._size
        names = (*model.parameter_names, *model.derived_names)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, n, dtype=dtype, device=scale.device)

        found = _Found(
            values=empty(len(names)),
            std=empty(len(names)),
            nrmse=empty(),
            chi2=empty(),
            at_bound=empty(len(model.parameters), dtype=torch.bool),
            rivals=empty(dtype=torch.bool),
        )
        several = len(solution.ends) > 1
        common, group = (None, None) if shared is None else shared

        def part(tensor: Tensor | None, begin: int) -> Tensor | None:
            return None if tensor is None else span(tensor, begin, size).double()

        for begin in range(0, n, size):
            ended = EndPoints(
                position=span(solution.position, begin, size).double(),
                voxels=voxels.span(begin, size),
                common=part(common, begin),
                slopes=part(solution.slopes, begin),
                ends=part(solution.ends, begin) if several else None,
                end_costs=part(solution.end_costs, begin) if several else None,
            )
            pieces = self._found(ended, span(scale, begin, size), group)
            for whole, piece in zip(found, pieces, strict=True):
                there = whole[..., begin : begin + size]
                there.copy_(piece[..., : there.shape[-1]])
        flags = (
            found.at_bound.any(0) * FLAG_AT_BOUND
            + ~solution.converged * FLAG_NOT_CONVERGED
            + found.rivals * FLAG_SEVERAL_MINIMA
        )
        return BlockResult(
            values=found.values,
            std=found.std,
            flags=flags.to(torch.uint8),
            nrmse=found.nrmse,
            chi2=found.chi2,
            at_bound=found.at_bound,
            evaluations=solution.evaluations.int(),
            winner=solution.winner.int(),
        )

    def _results(self, ended: EndPoints, scale: Tensor, group: Tensor | None) -> _Found:
        verdict = assess(self.kernel, ended, group)
        known = (ended.position, verdict.at_bound, verdict.covariance, scale)
        values, std = _in_units(self.kernel, *known)
        return _Found(
            values=values,
            std=std,
            nrmse=(verdict.squares / verdict.power).sqrt().float(),
            chi2=verdict.chi2.float(),
            at_bound=verdict.at_bound,
            rivals=verdict.rivals,
        )


def _cached(model: SignalModel) -> int:
    """Return how many voxels to assess at once by compiled code, a power of two."""
    size, each = _MOST, 8 * model.n_measurements * (len(model.parameters) + 1)
    while size > _FEWEST and size * each > _CACHED:
        size //= 2
    return size


class _Found(NamedTuple):
    """What is found out of voxels from where they ended."""

    values: Tensor
    std: Tensor
    nrmse: Tensor
    chi2: Tensor
    at_bound: Tensor
    rivals: Tensor


def _in_units(
    kernel: Kernel, position: Tensor, at_bound: Tensor, covariance: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return values and standard deviations (names, voxels) in units of the data."""
    model = kernel.model
    values = _natural(kernel, position)
    values.update(model.derive(values))
    std = standard_deviations(kernel, position, at_bound, covariance)
    for parameter in model.parameters:
        if parameter.amplitude:
            values[parameter.name] = values[parameter.name] * scale
            std[parameter.name] = std[parameter.name] * scale
    maps, deviations = [], []
    for name in (*model.parameter_names, *model.derived_names):
        # NaN is not below it; one comparison is compiled better than a test for two things.
        finite = values[name].abs() < torch.inf
        maps.append(torch.where(finite, values[name], torch.nan).float())
        deviation = std[name].float()
        known = torch.where(deviation.abs() < torch.inf, deviation, torch.nan)
        deviations.append(torch.where(finite, known, torch.nan))
    return torch.stack(maps), torch.stack(deviations)


def _natural(kernel: Kernel, position: Tensor) -> dict[str, Tensor]:
    """Return parameters; one at a bound of its log coordinate is exactly at its bound."""
    values = kernel.parameters(position)
    for i, parameter in enumerate(kernel.model.parameters):
        if parameter.coordinate == "log":
            low, high = parameter.bounds
            value = torch.where(position[i] <= kernel.lower[i], low, values[parameter.name])
            values[parameter.name] = torch.where(position[i] >= kernel.upper[i], high, value)
    return values


class Maps:
    """Results of the voxels of a mask on the host, filled block by block, also by several threads.

    Parameters
    ----------
    model
        Gives the names.
    n
        Voxels in the mask.

    Attributes
    ----------
    fitted, converged
        Usable voxels in finished blocks, and those that converged.
    """

    def __init__(self, model: SignalModel, n: int) -> None:
        self.model = model
        names = (*model.parameter_names, *model.derived_names)
        self._values = {name: np.full(n, np.nan, np.float32) for name in names}
        self._std = {name: np.full(n, np.nan, np.float32) for name in names}
        # What is never reached has not converged.
        self._flags = np.full(n, FLAG_NOT_CONVERGED, np.uint8)
        self._nrmse = np.full(n, np.nan, np.float32)
        self._chi2 = np.full(n, np.nan, np.float32)
        self._finished = np.zeros(n, bool)
        self._at_bound = np.zeros(len(model.parameters), np.int64)
        self._evaluations = np.zeros(0, np.int64)
        self._winner = np.zeros(0, np.int64)
        self._lock = threading.Lock()
        self.fitted = self.converged = 0

    def put(self, start: int, usable: NDArray[np.bool_], block: BlockResult | None) -> None:
        """Store a finished block.

        Parameters
        ----------
        start
            Index of its first voxel in the mask.
        usable
            (voxels of the block,), the others are flagged.
        block
            Results of the usable ones on the host; None where there are none.
        """
        whole = slice(start, start + len(usable))
        where = whole if usable.all() else start + np.flatnonzero(usable)
        flags = np.full(len(usable), FLAG_UNUSABLE, np.uint8)
        with self._lock:
            if block is not None:
                flags[usable] = block.flags.numpy()
                for i, name in enumerate(self._values):
                    self._values[name][where] = block.values[i].numpy()
                    self._std[name][where] = block.std[i].numpy()
                self._nrmse[where] = block.nrmse.numpy()
                self._chi2[where] = block.chi2.numpy()
                self._at_bound += block.at_bound.sum(1).numpy()
                self._evaluations = _added(self._evaluations, block.evaluations)
                self._winner = _added(self._winner, block.winner)
                self.fitted += len(block.flags)
                self.converged += int((block.flags & FLAG_NOT_CONVERGED == 0).sum())
            self._flags[whole] = flags
            self._finished[whole] = True

    @property
    def n_finished(self) -> int:
        """Voxels in finished blocks."""
        return int(self._finished.sum())

    def forget_unfinished(self) -> None:
        """Take back what an interrupted block has left."""
        quality = (self._nrmse, self._chi2)
        for values in (*self._values.values(), *self._std.values(), *quality):
            values[~self._finished] = np.nan

    def share_at_bound(self) -> dict[str, float]:
        """Return the share of the usable voxels at a bound, by parameter."""
        shares = (self._at_bound / max(self.fitted, 1)).tolist()
        return dict(zip(self.model.parameter_names, shares, strict=True))

    def result(
        self, study: Study, settings: dict[str, Any], trace: dict[str, Any] | None = None
    ) -> FitResult:
        """Return everything on the grid; a trace is added to that of the voxels."""
        evaluations = int(self._evaluations @ np.arange(len(self._evaluations)))
        trace = (trace or {}) | {
            "evaluations": self._evaluations.tolist(),
            "mean_evaluations": evaluations / max(self.fitted, 1),
            "winning_start": self._winner.tolist(),
        }
        return FitResult(
            maps={name: _on_grid(study, v, np.nan) for name, v in self._values.items()},
            std={name: _on_grid(study, v, np.nan) for name, v in self._std.items()},
            flags=_on_grid(study, self._flags, FLAG_OUTSIDE),
            nrmse=_on_grid(study, self._nrmse, np.nan),
            chi2=None if study.sigma is None else _on_grid(study, self._chi2, np.nan),
            trace=trace,
            settings=settings,
        )


def _added(counts: NDArray[np.int64], numbers: Tensor) -> NDArray[np.int64]:
    """Return a histogram of small numbers with more of them counted in."""
    more = np.bincount(numbers.numpy(), minlength=len(counts))
    more[: len(counts)] += counts
    return more


def _on_grid(study: Study, values: NDArray[Any], outside: float) -> NDArray[Any]:
    if study.covers_grid:
        return values.reshape(study.grid)
    full = np.full(int(np.prod(study.grid)), outside, values.dtype)
    full[study.index] = values
    return full.reshape(study.grid)
