"""Fits with spatial terms: the volume as a whole, its data block by block."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.blocks import Feeder, Link, Plan, Queue, for_blocks
from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import Kernel, Voxels, unpack
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.noise import from_residuals
from bids_gacelle.engine.regularise import (
    Geometry,
    Regulariser,
    Term,
    as_regularisers,
    check_regularisers,
    check_voxel_size,
)
from bids_gacelle.engine.result import Assessor, BlockResult, Maps
from bids_gacelle.engine.solvers import Problem, Settings, Solution, Solver
from bids_gacelle.engine.solvers.adam import minimise_whole
from bids_gacelle.engine.solvers.admm import AdmmSettings, Ended, Pull, minimise_with_terms
from bids_gacelle.engine.solvers.lm import LmSettings, minimise
from bids_gacelle.engine.solvers.lm import solve as solve_by_lm
from bids_gacelle.engine.study import Block, Study

# ADMM costs about as much as so many more starts.
EXTRA_STARTS = 15
# Prepared data of several blocks are kept on the host up to this size, or what the plan leaves of
# the host's memory, and else prepared again.
KEEP_BYTES = 2**30
# Weight of the median noise variance of all voxels beside the residuals of a voxel, as degrees of
# freedom: with few of its own, a voxel that fits well by chance would count for far too much.
_SHARED_DEGREES = 4.0
_LEAST_VARIANCE = 1e-12
# Evaluations of the voxel-wise start before ADMM, with one start of a voxel and with several to
# choose from. Where its own data leave a voxel undetermined, going on would lead it away from its
# neighbours: the objective ends higher, not lower.
_ONE_START, _SEVERAL_STARTS = 4, 12
# Of so many voxels, spread over all, the second derivatives tell how stiff the terms should pull.
_SAMPLE = 4096
# Shares of the progress where the voxel-wise start ends and the last fits begin.
_START_SHARE, _STORE_FROM = 0.4, 0.9

Report = Callable[[float], None]

logger = logging.getLogger(__name__)


class VoxelFitter(Protocol):
    """What fits voxels on their own: model, objective and solver on one device."""

    model: SignalModel
    device: torch.device
    settings: Settings
    kernel: Kernel
    exact: Kernel
    assessor: Assessor
    link: Link

    def problem(self, kernel: Kernel, exact: Voxels) -> Problem:
        """Return the problem of some voxels in the precision of the kernel."""

    def with_noise(self, block: Block) -> Voxels:
        """Return the voxels with what the objective needs besides the data."""

    def feeder(self, study: Study, queue: Queue, size: int) -> Feeder:
        """Return what sends blocks of the voxels in a queue to the device."""

    def blocks(
        self, study: Study, size: int, pieces: Sequence[tuple[int, int]] | None = None
    ) -> Iterator[tuple[slice, Block]]:
        """Yield slices of the voxels in the mask with their block on the device."""


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
    """

    regularisers: tuple[Regulariser, ...]
    convention: str
    voxel_size: tuple[float, ...] | None

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
        plan: Plan,
        report: Report = lambda share: None,
    ) -> dict[str, Any]:
        """Fit all voxels together, store them and return the trace.

        Parameters
        ----------
        fitter, study, plan
            Of the voxels; the plan says how many at once.
        maps
            Get nothing before the joint minimisation has ended.
        report
            Called with the share that is done.
        """
        return _SpatialFit(self, fitter, study, plan, report).run(maps)


def plan_spatial(
    regularise: Sequence[Regulariser] | Regulariser | None,
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
    terms = as_regularisers(regularise)
    convention = check_regularisers(terms, model, grid)
    active = tuple(r for r in terms if r.weight > 0)  # type: ignore[attr-defined]
    if not active:
        return None
    if solver.settings is Settings:
        raise EngineError("A closed form takes no regularisers: use solver 'lm' or 'adam'.")
    size = None if voxel_size is None else tuple(float(s) for s in voxel_size)
    return SpatialPlan(active, convention, size)


def spatial_settings(solver: Solver) -> type[Settings]:
    """Return the class of a solver's settings where there are regularisers."""
    return AdmmSettings if solver.settings is LmSettings else solver.settings


class Part(NamedTuple):
    """A block: its voxels of the mask, and the place of the usable ones among all usable ones.

    Blocks without any are not among the parts.
    """

    start: int
    stop: int
    place: slice


@dataclass
class _Start:
    """Voxel-wise estimates of all usable voxels, in the order of the mask.

    Blocks without any are kept apart, with their first voxel.
    """

    parts: list[Part] = field(default_factory=list)
    unusable: list[tuple[int, np.ndarray]] = field(default_factory=list)
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
        blocks: Plan,
        report: Report,
    ) -> None:
        self.plan, self.fitter, self.study, self.size = plan, fitter, study, blocks.block_size
        self.kernel, self.device = fitter.kernel, fitter.device
        self._report = report
        study.use_common_scale()
        self.variance: Tensor | None = None
        self._kept: dict[int, Voxels] = {}
        self._keep = KEEP_BYTES
        if blocks.limit is not None and self.device.type == "cpu":
            self._keep = max(blocks.limit - blocks.predicted, 0)
        own = {f.name: getattr(fitter.settings, f.name) for f in fields(Settings)}
        known = isinstance(fitter.settings, LmSettings)
        self.lm = fitter.settings if known else LmSettings(**own)

    def run(self, maps: Maps) -> dict[str, Any]:
        """Fit, store in the maps and return the trace."""
        start = self._fit_voxels()
        if start.n == 0:
            self._store_unusable(maps, start)
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
        self._check_end(told, objective)
        self._store(maps, start, position, pull, unit, bool(told["converged"]))
        return {"spatial": told, "objective": objective}

    # ------------------------------------------------------------------ start and data

    def _fit_voxels(self) -> _Start:
        """Fit every voxel on its own."""
        start = _Start()

        def work(first: int, last: int, block: Block) -> None:
            if block.usable.any():
                exact = self.fitter.with_noise(block)
                solution = solve_by_lm(self._first_problem(exact), self._first_evaluations(exact))
                variance = exact.noise_variance
                if variance is None:
                    position = solution.position.double()
                    variance = from_residuals(self.fitter.exact, exact, position)
                index = self.study.index[first:last][block.usable]
                start.add(first, last, index, solution)
                start.variance.append(variance)
            else:
                start.unusable.append((first, block.usable))
            self._report(_START_SHARE * last / self.study.n)

        with self.fitter.feeder(self.study, Queue(self.study.n), self.size) as feeder:
            for_blocks(feeder, work)
        return start

    def _first_evaluations(self, exact: Voxels) -> int | None:
        """Return how many evaluations the voxel-wise start may take; None: to its end."""
        by_admm = isinstance(self.fitter.settings, AdmmSettings)
        if exact.noise_variance is None or not by_admm:  # residuals tell the noise only at the end
            return None
        return _ONE_START if self.lm.starts == 1 else _SEVERAL_STARTS

    def _first_problem(self, exact: Voxels) -> Problem:
        """Return the problem of voxels without spatial terms."""
        problem = self.fitter.problem(self.kernel, exact)
        voxels = _pullable(problem.voxels, len(self.kernel.lower))
        return replace(problem, voxels=voxels, settings=self.lm)

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

    def _exact(self, parts: Sequence[Part]) -> Iterator[tuple[Block, Voxels]]:
        """Yield the blocks of parts and their voxels in double precision."""
        assert self.variance is not None
        pieces = [(part.start, part.stop) for part in parts]
        blocks = self.fitter.blocks(self.study, self.study.n, pieces)
        for part, (_, block) in zip(parts, blocks, strict=True):
            voxels = block.voxels
            if self.kernel.objective.needs_noise and voxels.noise_variance is None:
                voxels = voxels._replace(noise_variance=self.variance[part.place])
            yield block, self.fitter.with_noise(replace(block, voxels=voxels))

    def _voxels(self) -> Iterator[tuple[Part, Voxels]]:
        """Yield the parts with their voxels on the device in the precision of the fit."""
        missing = self._exact([part for part in self.parts if part.start not in self._kept])
        for part in self.parts:
            if part.start in self._kept:
                kept = self._kept[part.start]
                yield part, kept.map(lambda t: t.to(self.device, non_blocking=True))
            else:
                voxels = self.fitter.problem(self.kernel, next(missing)[1]).voxels
                self._remember(part, voxels)
                yield part, voxels

    def _remember(self, part: Part, voxels: Voxels) -> None:
        """Keep prepared voxels: a single block where it is, of several those that fit the host."""
        size = sum(t.numel() * t.element_size() for t in voxels.tensors())
        if len(self.parts) == 1:
            self._kept[part.start] = voxels
        elif size <= self._keep:
            self._keep -= size
            pinned = self.device.type == "cuda"
            self._kept[part.start] = voxels.map(lambda t: t.cpu().pin_memory() if pinned else t)

    # ------------------------------------------------------------------ joint minimisation

    def _by_admm(
        self, position: Tensor, unit: Tensor, terms: list[Term], settings: AdmmSettings
    ) -> Ended:
        def step(x: Tensor, pull: Pull) -> tuple[Tensor, Tensor]:
            new, fidelity = torch.empty_like(x), torch.empty_like(unit)
            for part, own in self._voxels():
                at = part.place
                problem = self._problem(own, pull, at, unit)
                state = minimise(problem, x[:, at], settings.spatial_evaluations)
                new[:, at] = state.position
                fidelity[at] = _without_pull(state.cost, state.position, problem.voxels, own)
            return new, fidelity / unit

        position, fidelity, curvature = self._look(position, unit)
        return minimise_with_terms(
            step,
            position,
            fidelity / unit,
            curvature,
            terms,
            settings,
            self._report_joint,
        )

    def _report_joint(self, share: float) -> None:
        self._report(_START_SHARE + (_STORE_FROM - _START_SHARE) * share)

    def _by_gradients(
        self, position: Tensor, unit: Tensor, terms: list[Term]
    ) -> tuple[Tensor, dict[str, Any], list[float]]:
        """Minimise over the volume by a first-order solver, which needs all data at once."""
        if len(self.parts) > 1:
            logger.warning(
                "First-order solvers with spatial terms hold all data in memory, whatever the "
                "limit; solver 'lm' does not."
            )
        settings: Any = self.fitter.settings
        whole = minimise_whole(
            self.kernel,
            [(part.place, voxels) for part, voxels in self._voxels()],
            position,
            unit.to(self.kernel.dtype),
            terms,
            settings,
            self._report_joint,
        )
        told = {"iterations": len(whole.trace), "converged": whole.converged}
        return whole.position(settings.output), told, whole.trace

    def _check_end(self, told: dict[str, Any], objective: list[float]) -> None:
        """Refuse an objective that is no number, and warn of one that was still falling."""
        if not math.isfinite(objective[-1]):
            raise EngineError(
                f"The objective of the fit with spatial terms became {objective[-1]} after "
                f"{told['iterations']} iterations, because the model or its loss did: exclude "
                "such voxels by the mask, or narrow the bounds of the model."
            )
        if not told["converged"]:
            by_admm = isinstance(self.fitter.settings, AdmmSettings)
            logger.warning(
                "The fit with spatial terms has not converged after %d iterations, and all its "
                "voxels are flagged as not converged: raise the option %r.",
                told["iterations"],
                "spatial_iterations" if by_admm else "iterations",
            )

    def _look(self, position: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions near by, costs (voxels,) there, and second derivatives of a sample.

        One evaluation of every voxel in the lanes of the solver, which may end with a short step.
        The second derivatives (parameters, some voxels) are those of the objective.
        """
        moved, costs, curvatures = torch.empty_like(position), [], []
        stride = -(-position.shape[1] // _SAMPLE)
        for part, voxels in self._voxels():
            at, own = part.place, _pullable(voxels, len(position))
            end = minimise(
                Problem(self.kernel, own, self.fitter.exact, own, self.lm), position[:, at], 1
            )
            moved[:, at] = end.position
            costs.append(end.cost.double())
            some = torch.arange(at.stop - at.start, device=moved.device)[
                -at.start % stride :: stride
            ]
            found = self.kernel.normal_equations(end.position[:, some], own.take(some))
            curvatures.append(_profile(unpack(found.hessian)) / unit[at][some].to(moved))
        return moved, torch.cat(costs), torch.cat(curvatures, 1)

    def _problem(self, own: Voxels, pull: Pull, at: slice, unit: Tensor) -> Problem:
        """Return the problem of some voxels under a pull; costs are unit x objective."""
        stiffness = pull.stiffness[:, at] * unit[at].to(pull.stiffness)
        voxels = _with_pull(own, Pull(pull.target[:, at], stiffness))
        return Problem(self.kernel, voxels, self.fitter.exact, voxels, self.lm)

    # ------------------------------------------------------------------ results

    def _store(
        self,
        maps: Maps,
        start: _Start,
        position: Tensor,
        pull: Pull | None,
        unit: Tensor,
        settled: bool,
    ) -> None:
        """Fit all voxels to the end, assess and store them; unsettled ones are flagged."""
        self._store_unusable(maps, start)
        assessor = self.fitter.assessor
        for k, (block, exact) in enumerate(self._exact(self.parts)):
            part = self.parts[k]
            own = self._kept.get(part.start)
            if own is None:
                own = self.fitter.problem(self.kernel, exact).voxels
            own = own.map(lambda t: t.to(self.device, non_blocking=True))
            solution = self._solution(start, k, own, position, pull, unit)
            if not settled:
                unsettled = torch.zeros_like(solution.converged)
                solution = replace(solution, converged=unsettled)
            result = assessor.results(exact, solution, block.scale, block.shared)
            maps.put(part.start, block.usable, BlockResult(*self.fitter.link.fetch(result)()))
            self._report(_STORE_FROM + (1 - _STORE_FROM) * part.stop / self.study.n)

    def _store_unusable(self, maps: Maps, start: _Start) -> None:
        for first, usable in start.unusable:
            maps.put(first, usable, None)

    def _solution(
        self,
        start: _Start,
        k: int,
        own: Voxels,
        position: Tensor,
        pull: Pull | None,
        unit: Tensor,
    ) -> Solution:
        """Return the solution of a block; with a pull, after a last fit of it to the end."""
        at = self.parts[k].place
        place, evaluations = position[:, at], start.evaluations[k]
        converged = torch.ones_like(evaluations, dtype=torch.bool)
        cost = torch.zeros_like(place[0])
        if pull is not None:
            problem = self._problem(own, pull, at, unit)
            end = minimise(problem, place)
            place, converged, cost = end.position, end.converged, end.cost
            evaluations = evaluations + end.evaluations
        exact = place.double()
        return Solution(exact, converged, evaluations, start.winner[k], exact[None], cost[None])


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
