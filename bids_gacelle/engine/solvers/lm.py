"""Batched Levenberg-Marquardt: own damping, bounds, stop and retirement for every voxel.

Marquardt (1963) scaling, Nielsen's (1999) gain-ratio damping, whose factor after a failed step
begins at 3 here, not 2, bounds by an active set. Voxels are worked on in lanes; when a lane has
finished it is refilled with the next voxel, so that the work does not depend on the slowest voxel
of a batch, and a result not on the neighbours of a voxel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.kernels import Kernel, Voxels, packed, settle
from bids_gacelle.engine.replay import is_recorded
from bids_gacelle.engine.solvers.base import (
    Ends,
    Problem,
    Settings,
    Solution,
    Solver,
    best_of_starts,
    default_lanes,
    within,
)
from bids_gacelle.engine.solvers.lanes import Lanes
from bids_gacelle.engine.starts import build_dictionary, find_starts

# Damping at the start, and what the first of several failed steps multiplies it by.
_FIRST_DAMPING, _FIRST_GROWTH = 0.005, 3.0
_PASSES = 2
# A prediction below this share of what ends a fit is believed though the step before still gained
# more, unless it is strongly damped. Losses with kinks hardly follow predictions.
_SURE, _LITTLE_DAMPING = 0.1, 1.0
# The last step is taken without an evaluation where it is shorter than this share of the start box
# in every parameter.
_SHORT = 0.05
# A move by the whole start box is taken to change the cost by at least this share.
_LEAST_SHARE = 1e-3


class State(NamedTuple):
    """State of all lanes; lanes on the last axis.

    Attributes
    ----------
    position, cost, gradient, hessian
        Where a lane is; a cost of inf marks one just filled, which has not been anywhere.
    trial, predicted
        Where it goes next, and the decrease of the cost to expect from that.
    evaluations, running, converged
        int32; the last two are 0 or 1, as compiled code stores truth values one by one.
    """

    position: Tensor
    cost: Tensor
    gradient: Tensor
    hessian: Tensor
    trial: Tensor
    predicted: Tensor
    damping: Tensor
    growth: Tensor
    evaluations: Tensor
    running: Tensor
    converged: Tensor


@dataclass(frozen=True)
class LmSettings(Settings):
    """How Levenberg-Marquardt works.

    Attributes
    ----------
    max_evaluations
        A voxel that needs more is "not converged".
    ftol
        Stop when the decrease of the cost by the last step and the one to expect of the next fall
        below this share of it, or, of L2, the latter below a tenth of that.
    xtol
        Stop when every step falls below this share of the width of the start box (for an
        amplitude: of its value).
    """

    max_evaluations: int = within("[1, inf)", 50)
    ftol: float = within("[0, 1)", 1e-5)
    xtol: float = within("[0, 1)", 1e-4)


def solve(problem: Problem, most_evaluations: int | None = None) -> Solution:
    """Fit every voxel of a block from each of its starts and keep the lowest cost.

    Parameters
    ----------
    problem
        With `LmSettings`.
    most_evaluations
        See `minimise`.
    """
    kernel, settings = problem.kernel, problem.settings
    dictionary = build_dictionary(kernel, settings.dictionary, settings.starts, settings.seed)
    starts = find_starts(kernel, problem.voxels, dictionary, compiled=settings.compiled_fully)
    n_starts, n_parameters, n_voxels = starts.shape
    position = starts.permute(1, 0, 2).reshape(n_parameters, -1)
    evaluations = torch.zeros(n_starts * n_voxels, dtype=torch.int32, device=kernel.device)
    for stage in problem.stages():
        ends = minimise(stage, position, most_evaluations)
        position, evaluations = ends.position, evaluations + ends.evaluations
    return best_of_starts(ends._replace(evaluations=evaluations), n_starts)


def minimise(problem: Problem, starts: Tensor, most_evaluations: int | None = None) -> Ends:
    """Return where Levenberg-Marquardt ends from given starts.

    Parameters
    ----------
    problem
        Its voxels are fitted, over and over when there are more starts than voxels.
    starts
        (parameters, starts) in solver coordinates; start i belongs to voxel i modulo their number.
    most_evaluations
        Stop after fewer evaluations than the settings allow, to which a compiled step is bound.
    """
    kernel, settings = problem.kernel, problem.settings
    step = get_step(kernel, settings)
    most = settings.max_evaluations
    # Those not to be made count as made.
    spent = most - min(most_evaluations or most, most)
    lanes: Lanes[State] = Lanes(
        problem,
        starts,
        settings.lanes or default_lanes(kernel, settings.compiled),
        load=lambda position, voxels: _fresh(position, spent),
        advance=lambda state, voxels: State(*step(state, voxels)),
        outcome=lambda state: Ends(
            state.position, state.cost, state.evaluations - spent, state.converged
        ),
        stale=frozenset({"gradient", "hessian", "predicted"}),
        depends=spent,
    )
    ends = lanes.run()
    return ends._replace(converged=ends.converged > 0)


def _fresh(position: Tensor, spent: int) -> State:
    """Return lanes that have just been filled, with so many evaluations counted."""
    n, zeros = len(position), torch.zeros_like(position[0])
    none = torch.zeros_like(zeros, dtype=torch.int32)
    return State(
        position=position,
        cost=torch.full_like(zeros, torch.inf),
        gradient=zeros.expand(n, -1),
        hessian=zeros.expand(len(packed(n)), -1),
        trial=position,
        predicted=zeros,
        damping=torch.full_like(zeros, _FIRST_DAMPING),
        growth=torch.full_like(zeros, _FIRST_GROWTH),
        evaluations=none + spent,
        running=none + 1,
        converged=none,
    )


class LmStep:
    """One Levenberg-Marquardt step of all lanes, a pure function of tensors.

    Everything but the model works on one (lanes,) tensor per number, without joining them: a
    compiler then keeps all numbers of a lane in registers. Only what takes as many operations as a
    matrix has entries is done on joined tensors where nothing is compiled.
    """

    def __init__(self, kernel: Kernel, settings: LmSettings) -> None:
        self.kernel = kernel
        self.settings = settings
        self.smooth = kernel.objective.loss == "l2"
        # In single precision a smaller damping is lost in the rounding of the diagonal.
        self.least_damping = 1e-6 if kernel.dtype == torch.float32 else 1e-12
        # Costs below this share of the weighted squared data are rounding errors.
        self.noise_floor = torch.finfo(kernel.dtype).eps ** 2
        self.lower, self.upper, self.width = (
            column[:, 0].tolist() for column in (kernel.lower, kernel.upper, kernel.width)
        )

    def __call__(self, state: State, voxels: Voxels) -> tuple[Tensor, ...]:
        """Return the next state; lanes that do not run keep theirs.

        The trial is evaluated and kept if it is better, and the next one chosen. What is expected
        of that may end the fit, which then costs no evaluation to confirm it.
        """
        settings = self.settings
        cost, new_gradient, new_hessian = self.kernel.sums(state.trial, voxels)
        fresh = state.cost == torch.inf
        at_work = state.running > 0
        better = at_work & (cost < state.cost)

        def updated(new: Iterable[Tensor], old: Iterable[Tensor]) -> list[Tensor]:
            return [torch.where(better, a, b) for a, b in zip(new, old, strict=True)]

        position = updated(state.trial.unbind(0), state.position.unbind(0))
        gradient = updated(new_gradient, state.gradient.unbind(0))
        hessian = _Symmetric(updated(new_hessian, state.hessian.unbind(0)))
        now = torch.where(better, cost, state.cost)

        actual = state.cost - cost
        gain = actual / state.predicted.clamp_min(torch.finfo(self.kernel.dtype).tiny)
        shrink = (1 - (2 * gain.clamp(0, 1) - 1) ** 3).clamp_min(0.2)
        damping = torch.where(better, state.damping * shrink, state.damping * state.growth)
        damping = torch.where(fresh, state.damping, damping.clamp(self.least_damping, 1e12))
        growth = torch.where(better, _FIRST_GROWTH, state.growth * 2).clamp_max(1e6)

        scale = [
            z.abs().clamp_min(1e-3) if i == self.kernel.amplitude else self.width[i]
            for i, z in enumerate(position)
        ]
        step = self._bounded_step(now, damping, position, gradient, hessian, scale)
        trial = [
            (z + s).clamp(low, high)
            for z, s, low, high in zip(position, step, self.lower, self.upper, strict=True)
        ]
        curved = hessian.times(step)
        predicted = -sum_of(
            [s * (g + 0.5 * c) for s, g, c in zip(step, gradient, curved, strict=True)]
        )

        length = [(s / w).abs() for s, w in zip(step, scale, strict=True)]
        limit = settings.ftol * now + self.noise_floor * _power(voxels)
        slow, gentle = actual.abs() <= limit, damping <= _LITTLE_DAMPING
        small_gain = slow & (predicted.abs() <= limit)
        small_step = all_of([x < settings.xtol for x in length])
        if self.smooth:
            small_gain = small_gain | (gentle & (predicted.abs() <= _SURE * limit))
        else:
            small_step = small_step & slow
        known = at_work & torch.isfinite(now)
        converged = known & (small_step | small_gain)
        evaluations = state.evaluations + state.running
        lost = evaluations >= settings.max_evaluations
        running = known & ~converged & ~lost

        last = converged & gentle & (predicted >= 0) & all_of([x < _SHORT for x in length])
        last = last & self.smooth
        position = [torch.where(last, a, b) for a, b in zip(trial, position, strict=True)]
        return (
            torch.stack(position),
            torch.where(last, (now - predicted).clamp_min(0), now),
            torch.stack(gradient),
            torch.stack(hessian.triangle),
            torch.stack(trial),
            predicted,
            torch.where(at_work, damping, state.damping),
            torch.where(at_work, growth, state.growth),
            evaluations,
            running.to(torch.int32),
            torch.where(converged, 1, state.converged),
        )

    def _bounded_step(
        self,
        cost: Tensor,
        damping: Tensor,
        position: list[Tensor],
        gradient: list[Tensor],
        hessian: _Symmetric,
        scale: list[Tensor | float],
    ) -> list[Tensor]:
        """Solve the damped normal equations within the bounds by an active set.

        Parameters at a bound that the gradient pushes outward are held. Parameters whose step
        leaves the box go exactly to the bound and the others are solved again. Clipping alone
        would leave the others at the answer to a different question.
        """
        bounds = list(zip(self.lower, self.upper, strict=True))
        free = [
            ~(((z <= low) & (g > 0)) | ((z >= high) & (g < 0)))
            for z, g, (low, high) in zip(position, gradient, bounds, strict=True)
        ]
        step = [torch.zeros_like(z) for z in position]
        # A parameter without influence here (exchange without neurites) has no curvature to be
        # damped by; it would jump from bound to bound and get every joint step rejected.
        share = _LEAST_SHARE * torch.where(cost == torch.inf, 0.0, cost)
        damped = hessian.with_diagonal(
            [
                d + torch.maximum(d, share / w**2) * damping
                for d, w in zip(hessian.diagonal(), scale, strict=True)
            ]
        )
        for _ in range(_PASSES):
            fixed = [torch.where(f, 0.0, s) for f, s in zip(free, step, strict=True)]
            pulled = hessian.times(fixed)
            rhs = [-g - p for g, p in zip(gradient, pulled, strict=True)]
            solved = _solve(damped, rhs, free)
            step = [torch.where(f, s, t) for f, s, t in zip(free, solved, fixed, strict=True)]
            inside = [
                (z + s).clamp(low, high)
                for z, s, (low, high) in zip(position, step, bounds, strict=True)
            ]
            outside = [
                f & (z + s != i) for f, z, s, i in zip(free, position, step, inside, strict=True)
            ]
            compiling = torch.compiler.is_dynamo_compiling()
            if not (compiling or is_recorded(cost)) and not bool(torch.stack(outside).any()):
                break
            step = [
                torch.where(o, i - z, s)
                for o, i, z, s in zip(outside, inside, position, step, strict=True)
            ]
            free = [f & ~o for f, o in zip(free, outside, strict=True)]
            if compiling:
                step, free = [settle(s) for s in step], [settle(f) for f in free]
        return step


class _Symmetric:
    """A symmetric matrix of (lanes,) tensors, its upper triangle in `packed` order."""

    def __init__(self, triangle: list[Tensor]) -> None:
        self.triangle = triangle
        self.n = int((2 * len(triangle)) ** 0.5)
        self._place = {pair: k for k, pair in enumerate(packed(self.n))}

    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        return self.triangle[self._place[min(pair), max(pair)]]

    def diagonal(self) -> list[Tensor]:
        return [self[i, i] for i in range(self.n)]

    def with_diagonal(self, diagonal: list[Tensor]) -> _Symmetric:
        """Return the matrix with another diagonal."""
        pairs = packed(self.n)
        return _Symmetric([diagonal[i] if i == j else self[i, j] for i, j in pairs])

    def joined(self) -> Tensor:
        """Return the matrix as one tensor (n, n, lanes)."""
        order = range(self.n)
        return torch.stack([self[i, j] for i in order for j in order]).unflatten(0, (self.n, -1))

    def times(self, vector: list[Tensor]) -> list[Tensor]:
        """Return the product with a vector."""
        if not torch.compiler.is_dynamo_compiling():
            return list((self.joined() * torch.stack(vector)).sum(1))
        return [sum_of([self[i, j] * v for j, v in enumerate(vector)]) for i in range(self.n)]


def sum_of(terms: list[Tensor]) -> Tensor:
    """Return the elementwise sum of tensors."""
    return functools.reduce(torch.add, terms)


def all_of(terms: list[Tensor]) -> Tensor:
    """Return the elementwise conjunction of tensors."""
    return functools.reduce(torch.logical_and, terms)


def _power(voxels: Voxels) -> Tensor:
    """Return the weighted sum of the squared data of each lane."""
    weight, square = voxels.loss_weight(), voxels.data**2
    return (square if weight is None else square * weight).sum(0)


def get_step(kernel: Kernel, settings: LmSettings) -> Callable[..., tuple[Tensor, ...]]:
    """Return the step function, compiled when asked for."""
    step = LmStep(kernel, settings)
    return kernel.compile("step", step, settings) if settings.compiled else step


def _solve(matrix: _Symmetric, rhs: list[Tensor], free: list[Tensor]) -> list[Tensor]:
    """Solve a system for the free unknowns by elimination; the others get 0.

    The matrix is symmetric and positive, so no pivoting is needed; unrolled over the unknowns and
    elementwise over lanes this is several times faster than a batched library call.
    """
    if not torch.compiler.is_dynamo_compiling():
        return _solve_joined(matrix, rhs, free)
    n = len(rhs)
    mask = [f.to(r.dtype) for f, r in zip(free, rhs, strict=True)]
    tiny = torch.finfo(rhs[0].dtype).tiny * 1e6
    rows = [
        [matrix[i, j] * (mask[i] * mask[j]) for j in range(i, n)] + [rhs[i] * mask[i]]
        for i in range(n)
    ]
    inverse = []
    for i in range(n):
        inverse.append(1 / torch.where(free[i] & (rows[i][0] > tiny), rows[i][0], 1.0))
        for j in range(i + 1, n):
            factor = rows[i][j - i] * inverse[i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i][j - i :], strict=True)]
    solution: list[Tensor] = [rhs[0]] * n
    for i in reversed(range(n)):
        total = rows[i][-1]
        for j in range(i + 1, n):
            total = total - rows[i][j - i] * solution[j]
        solution[i] = total * inverse[i] * mask[i]
    return solution


def _solve_joined(matrix: _Symmetric, rhs: list[Tensor], free: list[Tensor]) -> list[Tensor]:
    """Solve a system as `_solve` does, by a few operations for every unknown."""
    mask = torch.stack(free).to(rhs[0].dtype)
    tiny = torch.finfo(mask.dtype).tiny * 1e6
    rows, right = matrix.joined() * (mask[:, None] * mask), torch.stack(rhs) * mask
    inverse = []
    for i, is_free in enumerate(free):
        inverse.append(1 / torch.where(is_free & (rows[i, i] > tiny), rows[i, i], 1.0))
        after = rows[i, i + 1 :]
        factor = after * inverse[i]
        rows[i + 1 :, i + 1 :] -= factor[:, None] * after
        right[i + 1 :] -= factor * right[i]
    for i in reversed(range(len(free))):
        right[i] -= (rows[i, i + 1 :] * right[i + 1 :]).sum(0)
        right[i] *= inverse[i] * mask[i]
    return list(right)


LM = Solver(solve, LmSettings)
