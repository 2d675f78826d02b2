"""Spatial terms with second-order fits: consensus ADMM (Boyd et al. 2011).

min over x of f(x) + sum over terms of R_t(u_t), where f is a sum over voxels and u_t the maps of a
term in its units. Every term has its copy z_t of u_t and a scaled dual d_t:

    x   <- argmin f(x) + sum_t rho_t / 2 |u_t(x) - z_t + d_t|^2     Levenberg-Marquardt
    z_t <- argmin R_t(z) + rho_t / 2 |z - u_t - d_t|^2              the proximal step of the term
    d_t <- d_t + u_t - z_t

It begins with the two lower lines, as the voxels have been fitted before.

The first line is a fit of independent voxels with a quadratic pull, so it runs block by block; the
others need the maps only. The result therefore does not depend on the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.regularise import Term
from bids_gacelle.engine.solvers.base import within
from bids_gacelle.engine.solvers.lm import LmSettings

# Over-relaxation of x (Eckstein & Bertsekas 1992).
_RELAXATION = 1.6
# The first rho is such that proximal steps move by at most so many units, if not stiffer than the
# data.
_FIRST_MOVE = 1 / 30
# Every so many iterations rho is looked at: first balanced, where residuals are this far apart,
# and later raised where they no longer fall to this share. A voxel with several minima may jump
# between them for ever; the stiffer its pull, the fewer it has.
_LOOK_EVERY, _APART, _BALANCE_UNTIL, _FALL = 4, 3.0, 16, 0.7
_STIFFEST = 100.0  # times the curvature of the data


@dataclass(frozen=True)
class AdmmSettings(LmSettings):
    """How ADMM works, besides the Levenberg-Marquardt settings.

    Attributes
    ----------
    spatial_iterations
        At most so many.
    spatial_tolerance
        Stop when maps and their regularised copies differ, and the copies change, by less than
        this share of the scale of a parameter (root mean square).
    spatial_evaluations
        At most so many model evaluations of a voxel in each iteration, the first of where it is.
    spatial_prox
        Inner iterations of a proximal step.
    """

    spatial_iterations: int = within("[1, inf)", 200)
    spatial_tolerance: float = within("[0, inf)", 2e-4)
    spatial_evaluations: int = within("[1, inf)", 8)
    spatial_prox: int = within("[1, inf)", 50)


class Pull(NamedTuple):
    """Quadratic terms stiffness / 2 (x - target)^2 of the objective, (parameters, voxels)."""

    target: Tensor
    stiffness: Tensor


# From positions and a pull to new positions and the objective of each voxel there, without pull.
VoxelStep = Callable[[Tensor, Pull], tuple[Tensor, Tensor]]


@dataclass
class Split:
    """A term, its copy of the maps and its scaled dual, (parameters of the term, voxels).

    Attributes
    ----------
    curvature
        Typical second derivative of the objective of a voxel in the units of the term.
    primal, gap
        Residuals in units of the term: root mean square difference between maps and copies, and
        how far the minima of the voxels are off because the copies still move (rho x change /
        curvature).
    change
        Root mean square change of the copies.
    worst
        The larger residual when rho was last looked at.
    """

    term: Term
    curvature: float
    rho: float
    copy: Tensor
    dual: Tensor
    primal: float = math.inf
    gap: float = math.inf
    change: float = math.inf
    worst: float = math.inf

    def update(self, x: Tensor, iterations: int) -> None:
        """Take the proximal and the dual step."""
        u = self.term.units(x)
        relaxed = _RELAXATION * u + (1 - _RELAXATION) * self.copy
        copy = self.term.prox(relaxed + self.dual, 1 / self.rho, iterations)
        self.dual = self.dual + relaxed - copy
        change = _rms(copy - self.copy)
        self.primal, self.gap = _rms(u - copy), self.rho / self.curvature * change
        self.change, self.copy = change, copy

    def settled(self, tolerance: float) -> bool:
        """Tell whether all residuals are below the tolerance."""
        return max(self.primal, self.gap, self.change) < tolerance

    def adapt(self, iteration: int) -> None:
        """Change rho by a factor of 2 when that helps."""
        worst, before = max(self.primal, self.gap), self.worst
        self.worst = worst
        factor = 1.0
        if iteration > _BALANCE_UNTIL:
            jumping = worst > _FALL * before and self.primal > self.gap
            if jumping and self.rho < _STIFFEST * self.curvature:
                factor = 2.0
        elif self.primal > _APART * self.gap:
            factor = 2.0
        elif self.gap > _APART * self.primal:
            factor = 0.5
        self.rho *= factor
        self.dual = self.dual / factor


@dataclass
class Ended:
    """Where ADMM ended.

    Attributes
    ----------
    position
        (parameters, voxels) the maps that fit the data.
    pull
        What pulled them last.
    splits
        The terms with their copies of the maps.
    converged
        Whether the residuals fell below the tolerance.
    objective
        Objective at the start and after every iteration.
    """

    position: Tensor
    pull: Pull
    splits: list[Split]
    converged: bool
    objective: list[float] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """Return how it went, as plain data."""
        return {
            "iterations": len(self.objective) - 1,
            "converged": self.converged,
            "rho": [split.rho for split in self.splits],
            "primal_residual": [split.primal for split in self.splits],
            "dual_residual": [max(split.gap, split.change) for split in self.splits],
        }


def minimise_with_terms(
    step: VoxelStep,
    position: Tensor,
    fidelity: Tensor,
    curvature: Tensor,
    terms: list[Term],
    settings: AdmmSettings,
    report: Callable[[float], None] = lambda share: None,
) -> Ended:
    """Minimise the sum of the voxels' objectives and the terms.

    Parameters
    ----------
    step
        Moves all voxels towards their own minimum under a pull.
    position
        (parameters, voxels) where to begin.
    fidelity
        (voxels,) objective of the voxels there.
    curvature
        (parameters, some voxels) its second derivatives there, with the other parameters
        following.
    terms
        At least one.
    settings
        When to stop.
    report
        Called with the share that is done.

    Raises
    ------
    EngineError
        A term has no proximal step.
    """
    for term in terms:
        if term.obstacle:
            raise EngineError(
                f"Solver 'lm' cannot be used with {term.label}: {term.obstacle}. "
                "Use solver 'adam'."
            )
    splits = [_split(term, position, curvature) for term in terms]
    for split in splits:  # the voxels are about where they would go without a pull
        split.update(position, settings.spatial_prox)
    pull = _pull(splits, position)
    ended = Ended(position, pull, splits, converged=False)
    ended.objective.append(_objective(fidelity, position, terms))
    for iteration in range(1, settings.spatial_iterations + 1):
        position, fidelity = step(position, pull)
        ended.objective.append(_objective(fidelity, position, terms))
        for split in splits:
            split.update(position, settings.spatial_prox)
        if all(split.settled(settings.spatial_tolerance) for split in splits):
            ended.converged = True
            break
        if iteration % _LOOK_EVERY == 0:
            for split in splits:
                split.adapt(iteration)
        pull = _pull(splits, position)
        report(iteration / settings.spatial_iterations)
    ended.position, ended.pull = position, _pull(splits, position)
    return ended


def _split(term: Term, position: Tensor, curvature: Tensor) -> Split:
    u = term.units(position)
    rows = list(term.parameters)
    # A power of two, which no rounding of a sum over measurements changes.
    median = max(float((curvature[rows] * term.scale**2).median()), 1e-30)
    typical = 2.0 ** round(math.log2(median))
    rho = min(term.weight / _FIRST_MOVE, typical)
    return Split(term, typical, rho, u, torch.zeros_like(u))


def _pull(splits: list[Split], position: Tensor) -> Pull:
    """Return the sum of the pulls of all terms as one for each parameter."""
    total = torch.zeros_like(position[:, :1])
    target = torch.zeros_like(position)
    for split in splits:
        rows = list(split.term.parameters)
        stiffness = split.rho / split.term.scale**2
        total[rows] += stiffness
        target[rows] += stiffness * split.term.scale * (split.copy - split.dual)
    pulled = total > 0
    target = torch.where(pulled, target / torch.where(pulled, total, 1.0), position)
    return Pull(target, total.expand_as(position))


def _objective(fidelity: Tensor, position: Tensor, terms: list[Term]) -> float:
    total = fidelity.sum(dtype=torch.float64)
    return float(total + torch.stack([term.value(position) for term in terms]).sum())


def _rms(values: Tensor) -> float:
    return float(values.square().mean(dtype=torch.float64).sqrt())
