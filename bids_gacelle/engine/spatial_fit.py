"""Fits with spatial terms: the volume as a whole, its data block by block."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.blocks import for_blocks
from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import Kernel, Voxels, unpack
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.regularise import (
    Geometry,
    Regulariser,
    Term,
    check_regularisers,
    check_voxel_size,
)
from bids_gacelle.engine.result import Maps
from bids_gacelle.engine.solvers import Problem, Settings, Solution, Solver
from bids_gacelle.engine.solvers.admm import AdmmSettings, Ended, Pull, minimise_with_terms
from bids_gacelle.engine.solvers.lm import LmSettings, minimise
from bids_gacelle.engine.solvers.lm import solve as solve_by_lm
from bids_gacelle.engine.study import Block, Study
from bids_gacelle.engine.uncertainty import Assessor

# ADMM costs about as much as so many more starts.
EXTRA_STARTS = 15
# Prepared data of several blocks are kept on the host up to this size, and else prepared again.
KEEP_BYTES = 2**30
# Weight of the median noise variance of all voxels beside the residuals of a voxel, as degrees of
# freedom: with few of its own, a voxel that fits well by chance would count for far too much.
_SHARED_DEGREES = 4.0
_LEAST_VARIANCE = 1e-12
# Share of the progress that the voxel-wise start takes.
_START_SHARE = 0.4

Progress = Callable[[int, int], None]


class VoxelFitter(Protocol):
    """What fits voxels on their own: model, objective and solver on one device."""

    model: SignalModel
    device: torch.device
    settings: Settings
    kernel: Kernel
    exact: Kernel
    assessor: Assessor

    def problem(self, kernel: Kernel, exact: Voxels) -> Problem:
        """Return the problem of some voxels in the precision of the kernel."""

    def with_noise(self, block: Block, variance: Tensor | None = None) -> Voxels:
        """Return the voxels with what the objective needs besides the data."""


@dataclass(frozen=True)
class SpatialPlan:
    """The spatial terms of a fit, checked.

    Attributes
    ----------
    regularisers
        Those with a weight above 0.
    convention
        Theirs.
    voxel_size
        In mm, or None.
    solver
        What the voxels are fitted with.
    settings
        Class of the settings.
    """

    regularisers: tuple[Regulariser, ...]
    convention: str
    voxel_size: tuple[float, ...] | None
    solver: Solver
    settings: type[Settings]

    def describe(self) -> dict[str, Any]:
        """Return the terms as plain data, for settings."""
        return {
            "terms": [regulariser.describe() for regulariser in self.regularisers],
            "convention": self.convention,
            "voxel_size": None if self.voxel_size is None else list(self.voxel_size),
            "std": "of each voxel's own data (and prior) at the regularised estimate",
        }

    def fit(
        self,
        fitter: VoxelFitter,
        study: Study,
        maps: Maps,
        size: int,
        progress: Progress | None,
    ) -> dict[str, Any]:
        """Fit all voxels together, store them and return the trace."""
        return _SpatialFit(self, fitter, study, size, progress).run(maps)


def plan_spatial(
    regularise: Sequence[Regulariser],
    voxel_size: Sequence[float] | None,
    model: SignalModel,
    grid: tuple[int, ...],
    solver: Solver,
) -> SpatialPlan | None:
    """Return the checked plan, or None when there is no term of any weight.

    Raises
    ------
    EngineError
        A regulariser does not suit the model, the grid or the solver.
    """
    if voxel_size is not None:
        check_voxel_size(voxel_size, grid)
    convention = check_regularisers(regularise, model, grid)
    active = tuple(r for r in regularise if r.weight > 0)  # type: ignore[attr-defined]
    if not active:
        return None
    if solver.settings is Settings:
        raise EngineError("A closed form takes no regularisers: use solver 'lm' or 'adam'.")
    settings = AdmmSettings if solver.settings is LmSettings else solver.settings
    size = None if voxel_size is None else tuple(float(s) for s in voxel_size)
    return SpatialPlan(active, convention, size, solver, settings)


class Part(NamedTuple):
    """A block: its voxels of the mask, and the place of the usable ones among all usable ones."""

    start: int
    stop: int
    place: slice


@dataclass
class _Start:
    """Voxel-wise estimates of all usable voxels, in the order of the mask."""

    parts: list[Part] = field(default_factory=list)
    index: list[np.ndarray] = field(default_factory=list)
    position: list[Tensor] = field(default_factory=list)
    variance: list[Tensor] = field(default_factory=list)
    evaluations: list[Tensor] = field(default_factory=list)
    winner: list[Tensor] = field(default_factory=list)
    n: int = 0

    def add(self, start: int, stop: int, index: np.ndarray, solution: Solution) -> None:
        """Add the usable voxels of a block."""
        self.parts.append(Part(start, stop, slice(self.n, self.n + len(index))))
        self.n += len(index)
        self.index.append(index)
        self.position.append(solution.position)
        self.evaluations.append(solution.evaluations)
        self.winner.append(solution.winner)


class _SpatialFit:
    """One fit: start, joint minimisation and assessment."""

    def __init__(
        self,
        plan: SpatialPlan,
        fitter: VoxelFitter,
        study: Study,
        size: int,
        progress: Progress | None,
    ) -> None:
        self.plan, self.fitter, self.study, self.size = plan, fitter, study, size
        self.kernel, self.device = fitter.kernel, fitter.device
        self._progress, self._done = progress, 0
        amplitude = self.kernel.amplitude is not None
        self.scale = study.common_scale() if amplitude else None
        self.variance: Tensor | None = None
        self._kept: dict[int, Voxels] = {}
        self._kept_bytes = 0
        own = {f.name: getattr(fitter.settings, f.name) for f in fields(Settings)}
        known = isinstance(fitter.settings, LmSettings)
        self.lm = fitter.settings if known else LmSettings(**own)

    def run(self, maps: Maps) -> dict[str, Any]:
        """Fit, store in the maps and return the trace."""
        start = self._fit_voxels()
        if start.n == 0:
            self._report(1.0)
            return {"spatial": {}, "objective": []}
        self.variance = self._shared_variance(torch.cat(start.variance))
        self.parts = start.parts
        unit = self._unit(self.variance, start.n)
        geometry = Geometry(self.study.grid, np.concatenate(start.index), self.plan.voxel_size)
        terms = [t for r in self.plan.regularisers for t in r.bind(self.kernel, geometry)]
        position = torch.cat(start.position, 1).to(self.kernel.dtype)
        if isinstance(self.fitter.settings, AdmmSettings):
            ended = self._by_admm(position, unit, terms, self.fitter.settings)
            told, objective, pull = ended.describe(), ended.objective, ended.pull
            position = ended.position
        else:
            position, told, objective = self._by_gradients(position, unit, terms)
            pull = None
        self._store(maps, start, position, pull, unit)
        self._report(1.0)
        return {"spatial": told, "objective": objective}

    # ------------------------------------------------------------------ start and data

    def _fit_voxels(self) -> _Start:
        """Fit every voxel on its own."""
        start = _Start()

        def work(first: int, last: int) -> None:
            block = self._block(first, last)
            if block.usable.any():
                exact = self.fitter.with_noise(block)
                problem = replace(self.fitter.problem(self.kernel, exact), settings=self.lm)
                problem = replace(
                    problem, voxels=_pullable(problem.voxels, len(self.kernel.lower))
                )
                solution = solve_by_lm(problem)
                variance = exact.noise_variance
                if variance is None:
                    variance = self._residual_variance(exact, solution.position.double())
                index = self.study.index[first:last][block.usable]
                start.add(first, last, index, solution)
                start.variance.append(variance)
            self._report(_START_SHARE * last / self.study.n)

        for_blocks(self.study.n, self.size, work)
        return start

    def _block(self, first: int, last: int) -> Block:
        return self.study.block(first, last, self.device, self.fitter.model, self.scale)

    def _residual_variance(self, exact: Voxels, position: Tensor) -> Tensor:
        residual = self.fitter.exact.signal(position, exact.inputs) - exact.data
        return (residual**2).sum(0) / max(self.study.degrees, 1)

    def _shared_variance(self, variance: Tensor) -> Tensor:
        """Return noise variances; estimated ones are drawn to their median."""
        if self.study.sigma is None:
            degrees = self.study.degrees
            if degrees < 1 and self.plan.convention == "scaled":
                raise EngineError(
                    f"Weights of spatial terms need the noise level, but {self.fitter.model.name} "
                    "has as many parameters as there are measurements: give sigma."
                )
            shared = _SHARED_DEGREES * variance.median()
            variance = (degrees * variance + shared) / (degrees + _SHARED_DEGREES)
        return variance.clamp_min(_LEAST_VARIANCE)

    def _unit(self, variance: Tensor, n: int) -> Tensor:
        """Return what the cost of each voxel is divided by in the objective."""
        if self.plan.convention == "scaled":
            return variance
        # Costs are r^2 / 2, sd |r| or r^2 / 2 near 0; GACELLE's losses r^2, |r| and r^2 / 2.
        total = float(n * self.study.n_measurements)
        factor = {"l2": torch.full_like(variance, 0.5), "l1": variance.sqrt()}
        return total * factor.get(self.kernel.objective.loss, torch.ones_like(variance))

    def exact(self, part: Part) -> tuple[Block, Voxels]:
        """Return a block and its voxels in double precision."""
        assert self.variance is not None
        block = self._block(part.start, part.stop)
        return block, self.fitter.with_noise(block, self.variance[part.place])

    def voxels(self, part: Part) -> Voxels:
        """Return the voxels of a block on the device in the precision of the fit."""
        if part.start in self._kept:
            return self._kept[part.start].map(lambda t: t.to(self.device, non_blocking=True))
        problem = self.fitter.problem(self.kernel, self.exact(part)[1])
        voxels = problem.voxels
        size = sum(t.numel() * t.element_size() for t in voxels.tensors())
        if len(self.parts) == 1:
            self._kept[part.start] = voxels
        elif self._kept_bytes + size <= KEEP_BYTES:
            self._kept_bytes += size
            pinned = self.device.type == "cuda"
            self._kept[part.start] = voxels.map(lambda t: t.cpu().pin_memory() if pinned else t)
        return voxels

    # ------------------------------------------------------------------ joint minimisation

    def _by_admm(
        self, position: Tensor, unit: Tensor, terms: list[Term], settings: AdmmSettings
    ) -> Ended:
        def step(x: Tensor, pull: Pull) -> tuple[Tensor, Tensor]:
            new, fidelity = torch.empty_like(x), torch.empty_like(unit)
            for part in self.parts:
                at = part.place
                own = self.voxels(part)
                problem = self._problem(own, pull, at, unit)
                state = minimise(problem, x[:, at], settings.spatial_evaluations)
                new[:, at] = state.position
                fidelity[at] = _without_pull(state.cost, state.position, problem.voxels, own)
            return new, fidelity / unit

        fidelity, curvature = self._look(position)
        return minimise_with_terms(
            step,
            position,
            fidelity / unit,
            curvature / unit.to(curvature),
            terms,
            settings,
            lambda share: self._report(_START_SHARE + (0.95 - _START_SHARE) * share),
        )

    def _by_gradients(
        self, position: Tensor, unit: Tensor, terms: list[Term]
    ) -> tuple[Tensor, dict[str, Any], list[float]]:
        """Minimise over the volume by a first-order solver."""
        try:
            module: Any = importlib.import_module("bids_gacelle.engine.solvers.adam")
        except ModuleNotFoundError as error:
            raise EngineError("This solver takes no regularisers: use solver 'lm'.") from error
        settings: Any = self.fitter.settings
        whole = module.minimise_whole(
            self.kernel,
            [(part.place, self.voxels(part)) for part in self.parts],
            position,
            unit.to(self.kernel.dtype),
            terms,
            settings,
            lambda share: self._report(_START_SHARE + (0.95 - _START_SHARE) * share),
        )
        told = {"iterations": len(whole.trace), "converged": whole.converged}
        return whole.position(settings.output), told, whole.trace

    def _look(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return costs (voxels,) and second derivatives (parameters, voxels) at a position."""
        costs, curvatures = [], []
        for part in self.parts:
            found = self.kernel.normal_equations(position[:, part.place], self.voxels(part))
            costs.append(found.cost.double())
            curvatures.append(_profile(unpack(found.hessian)))
        return torch.cat(costs), torch.cat(curvatures, 1)

    def _problem(self, own: Voxels, pull: Pull, at: slice, unit: Tensor) -> Problem:
        """Return the problem of some voxels under a pull; costs are unit x objective."""
        stiffness = pull.stiffness[:, at] * unit[at].to(pull.stiffness)
        voxels = _with_pull(own, Pull(pull.target[:, at], stiffness))
        return Problem(self.kernel, voxels, self.fitter.exact, voxels, self.lm)

    # ------------------------------------------------------------------ results

    def _store(
        self, maps: Maps, start: _Start, position: Tensor, pull: Pull | None, unit: Tensor
    ) -> None:
        """Assess all voxels and store them."""
        for k, part in enumerate(self.parts):
            block, exact = self.exact(part)
            solution = self._solution(start, k, position, pull, unit)
            where = part.start + np.flatnonzero(block.usable)
            for piece, ended, verdict in self.fitter.assessor.assess(
                exact, solution, block.shared
            ):
                maps.store(where[piece], block.scale[piece], self.fitter.exact, ended, verdict)

    def _solution(
        self, start: _Start, k: int, position: Tensor, pull: Pull | None, unit: Tensor
    ) -> Solution:
        """Return the solution of a block; with a pull, after a last fit of it to the end."""
        at = self.parts[k].place
        place, evaluations = position[:, at], start.evaluations[k]
        converged = torch.ones_like(evaluations, dtype=torch.bool)
        cost = torch.zeros_like(place[0])
        if pull is not None:
            problem = self._problem(self.voxels(self.parts[k]), pull, at, unit)
            end = minimise(problem, place)
            place, converged, cost = end.position, end.converged, end.cost
            evaluations = evaluations + end.evaluations
        exact = place.double()
        return Solution(exact, converged, evaluations, start.winner[k], exact[None], cost[None])

    def _report(self, share: float) -> None:
        now = int(share * self.study.n)
        if self._progress is not None and now > self._done:
            self._done = now
            self._progress(now, self.study.n)


def _profile(hessian: Tensor) -> Tensor:
    """Return second derivatives (P, V) by each parameter while the others follow its moves.

    At least a thousandth of the plain second derivatives, which directions without information
    would make of no use.
    """
    matrix = hessian.permute(2, 0, 1).double()
    diagonal = torch.diagonal(matrix, dim1=1, dim2=2)
    scale = diagonal.clamp_min(1e-300).rsqrt()
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    scaled = matrix * scale[:, :, None] * scale[:, None] + 1e-3 * eye
    inverse = torch.linalg.inv_ex(scaled).inverse
    return (diagonal / torch.diagonal(inverse, dim1=1, dim2=2)).T.to(hessian.dtype)


def _pullable(voxels: Voxels, n_parameters: int) -> Voxels:
    """Return voxels with a pull of stiffness 0 where there is none.

    A compiled step is bound to what its voxels hold: one then serves the voxel-wise start and all
    iterations.
    """
    if voxels.target is not None:
        return voxels
    nowhere = voxels.data.new_zeros(n_parameters, voxels.data.shape[1])
    return voxels._replace(target=nowhere, stiffness=nowhere)


def _with_pull(own: Voxels, pull: Pull) -> Voxels:
    """Return voxels with a pull besides that of their prior."""
    if own.target is None:
        return own._replace(target=pull.target, stiffness=pull.stiffness)
    assert own.stiffness is not None
    total = own.stiffness + pull.stiffness
    target = own.stiffness * own.target + pull.stiffness * pull.target
    there = total > 0
    target = torch.where(there, target / torch.where(there, total, 1.0), 0.0)
    return own._replace(target=target, stiffness=total)


def _without_pull(cost: Tensor, position: Tensor, pulled: Voxels, own: Voxels) -> Tensor:
    """Return costs in double precision without the pull, but with the prior of the voxels."""
    return cost.double() - _pull_cost(position, pulled) + _pull_cost(position, own)


def _pull_cost(position: Tensor, voxels: Voxels) -> Tensor:
    if voxels.target is None:
        return torch.zeros_like(position[0], dtype=torch.float64)
    assert voxels.stiffness is not None
    offset = position.double() - voxels.target.double()
    return (0.5 * voxels.stiffness.double() * offset**2).sum(0)
