"""Batched Levenberg-Marquardt: own damping, bounds, stop and retirement for every voxel.

Marquardt (1963) scaling, Nielsen's (1999) gain-ratio damping, bounds by an active set. Voxels are
worked on in lanes; when a lane has finished it is refilled with the next voxel, so that the work
does not depend on the slowest voxel of a batch, and a result not on the neighbours of a voxel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.kernels import Kernel, Voxels, packed
from bids_gacelle.engine.solvers.base import (
    Ends,
    Problem,
    Settings,
    Solution,
    Solver,
    best_of_starts,
    default_lanes,
)
from bids_gacelle.engine.starts import build_dictionary, find_starts

_FIRST_DAMPING = 0.01
_FEWEST_LANES = 256
_REFILL_SHARE = 0.2
_PASSES = 3
# A move by the whole start box is taken to change the cost by at least this share.
_LEAST_SHARE = 1e-3


class State(NamedTuple):
    """State of all lanes; lanes on the last axis. A cost of inf marks a lane just filled."""

    position: Tensor
    cost: Tensor
    gradient: Tensor
    hessian: Tensor
    damping: Tensor
    growth: Tensor
    evaluations: Tensor
    running: Tensor
    converged: Tensor

    def take(self, index: Tensor) -> State:
        """Return the lanes at `index`."""
        return State(*(tensor[..., index] for tensor in self))


@dataclass(frozen=True)
class LmSettings(Settings):
    """How Levenberg-Marquardt works.

    Attributes
    ----------
    max_evaluations
        A voxel that needs more is "not converged".
    ftol
        Stop when the predicted and the actual decrease of the cost fall below this share of it.
    xtol
        Stop when every step falls below this share of the width of the start box (for an
        amplitude: of its value).
    """

    max_evaluations: int = 50
    ftol: float = 1e-5
    xtol: float = 1e-4


def solve(problem: Problem) -> Solution:
    """Fit every voxel of a block from each of its starts and keep the lowest cost."""
    kernel, settings = problem.kernel, problem.settings
    dictionary = build_dictionary(kernel, settings.dictionary, settings.starts, settings.seed)
    starts = find_starts(kernel, problem.voxels, dictionary)
    n_starts, n_parameters, n_voxels = starts.shape
    position = starts.permute(1, 0, 2).reshape(n_parameters, -1)
    evaluations = torch.zeros(n_starts * n_voxels, dtype=torch.int32, device=kernel.device)
    for stage in problem.stages():
        end = minimise(stage, position)
        position, evaluations = end.position, evaluations + end.evaluations
    ends = Ends(end.position, end.cost, evaluations, end.converged)
    return best_of_starts(ends, n_starts)


def minimise(problem: Problem, starts: Tensor) -> State:
    """Return the end state of Levenberg-Marquardt from given starts.

    Parameters
    ----------
    problem
        Its voxels are fitted, over and over when there are more starts than voxels.
    starts
        (parameters, starts) in solver coordinates; start i belongs to voxel i modulo their number.
    """
    return _Runner(problem, starts).run()


class _Runner:
    """Feeds a queue of (start, voxel) items through the lanes."""

    def __init__(self, problem: Problem, starts: Tensor) -> None:
        self.problem = problem
        self.starts = starts
        self.n_items = starts.shape[1]
        self.n_voxels = problem.voxels.data.shape[-1]
        device = problem.kernel.device
        most = problem.settings.lanes or default_lanes(device)
        lanes = _FEWEST_LANES
        while lanes < min(self.n_items, most):
            lanes *= 2
        self.next_item = 0
        # A compiled step is bound to its shapes: one number of lanes for all blocks, to the end.
        self.fixed = problem.settings.compiled
        lanes = most if self.fixed else lanes
        self.item = torch.full((lanes,), -1, device=device)
        self.lanes = problem.voxels.take(torch.zeros(lanes, dtype=torch.long, device=device))
        self.state = _empty_state(problem.kernel, lanes)
        self.end = _empty_state(problem.kernel, self.n_items)
        self.n_done = 0

    def run(self) -> State:
        """Return the end state of all items."""
        step = get_step(self.problem.kernel, self.problem.settings)
        while True:
            idle = ~self.state.running
            n_idle = int(idle.sum())
            if n_idle >= _REFILL_SHARE * len(idle):
                self._flush(idle)
                self._refill(idle)
                if self.next_item == self.n_items:
                    n_running = int(self.state.running.sum())
                    if n_running == 0:
                        return self.end
                    if not self.fixed:
                        self._shrink(n_running)
            self.state = State(*step(self.state, self.lanes))

    def _flush(self, idle: Tensor) -> None:
        """Store the lanes that have finished."""
        lanes = (idle & (self.item >= 0)).nonzero()[:, 0]
        if len(lanes) == 0:
            return
        items = self.item[lanes]
        for target, source in zip(self.end, self.state, strict=True):
            target[..., items] = source[..., lanes]
        self.item[lanes] = -1
        self.n_done += len(lanes)
        self.problem.report(self.n_done / self.n_items)

    def _refill(self, idle: Tensor) -> None:
        """Load the next items into idle lanes."""
        lanes = idle.nonzero()[:, 0][: self.n_items - self.next_item]
        if len(lanes) == 0:
            return
        items = torch.arange(self.next_item, self.next_item + len(lanes), device=lanes.device)
        self.next_item += len(lanes)
        self.item[lanes] = items
        fresh = _empty_state(self.problem.kernel, len(lanes))
        fresh.position.copy_(self.starts[:, items])
        fresh.running.fill_(True)
        source = self.problem.voxels.take(items % self.n_voxels)
        for target, new in zip(
            (*self.state, *self.lanes.tensors()), (*fresh, *source.tensors()), strict=True
        ):
            target[..., lanes] = new

    def _shrink(self, n_running: int) -> None:
        """Drop idle lanes once the queue is empty; the number of lanes stays a power of two."""
        lanes = len(self.item)
        while lanes > _FEWEST_LANES and n_running <= lanes // 2:
            lanes //= 2
        if lanes < len(self.item):
            index = torch.argsort(~self.state.running, stable=True)[:lanes]
            self.item = self.item[index]
            self.state = self.state.take(index)
            self.lanes = self.lanes.take(index)


def _empty_state(kernel: Kernel, lanes: int) -> State:
    n = len(kernel.model.parameters)
    real = {"dtype": kernel.dtype, "device": kernel.device}
    diagonal = torch.tensor([float(i == j) for i, j in packed(n)])
    return State(
        position=0.5 * torch.ones(n, lanes, **real),  # type: ignore[call-overload]
        cost=torch.full((lanes,), torch.inf, **real),  # type: ignore[call-overload]
        gradient=torch.zeros(n, lanes, **real),  # type: ignore[call-overload]
        hessian=diagonal.to(**real)[:, None].repeat(1, lanes),  # type: ignore[call-overload]
        damping=torch.full((lanes,), _FIRST_DAMPING, **real),  # type: ignore[call-overload]
        growth=torch.full((lanes,), 2.0, **real),  # type: ignore[call-overload]
        evaluations=torch.zeros(lanes, dtype=torch.int32, device=kernel.device),
        running=torch.zeros(lanes, dtype=torch.bool, device=kernel.device),
        converged=torch.zeros(lanes, dtype=torch.bool, device=kernel.device),
    )


class LmStep:
    """One Levenberg-Marquardt step of all lanes, a pure function of tensors.

    Everything but the model works on one (lanes,) tensor per number, without joining them: a
    compiler then keeps all numbers of a lane in registers.
    """

    def __init__(self, kernel: Kernel, settings: LmSettings) -> None:
        self.kernel = kernel
        self.settings = settings
        # In single precision a smaller damping is lost in the rounding of the diagonal.
        self.least_damping = 1e-6 if kernel.dtype == torch.float32 else 1e-12
        # Costs below this are rounding errors of data that are normalised to about one.
        self.noise_floor = torch.finfo(kernel.dtype).eps ** 2
        self.lower, self.upper, self.width = (
            column[:, 0].tolist() for column in (kernel.lower, kernel.upper, kernel.width)
        )

    def __call__(self, state: State, voxels: Voxels) -> tuple[Tensor, ...]:
        """Return the next state; lanes that do not run keep theirs."""
        settings = self.settings
        position, gradient = list(state.position.unbind(0)), list(state.gradient.unbind(0))
        hessian = _Symmetric(list(state.hessian.unbind(0)))
        scale = [
            z.abs().clamp_min(1e-3) if i == self.kernel.amplitude else self.width[i]
            for i, z in enumerate(position)
        ]
        step = self._bounded_step(state, position, gradient, hessian, scale)
        trial = [
            (z + s).clamp(low, high)
            for z, s, low, high in zip(position, step, self.lower, self.upper, strict=True)
        ]
        cost, new_gradient, new_hessian = self.kernel.sums(torch.stack(trial), voxels)
        fresh = torch.isinf(state.cost)
        curved = hessian.times(step)
        predicted = -sum_of(
            [s * (g + 0.5 * c) for s, g, c in zip(step, gradient, curved, strict=True)]
        )
        actual = state.cost - cost
        better = state.running & (cost < state.cost)

        small_step = all_of(
            [(s / w).abs() < settings.xtol for s, w in zip(step, scale, strict=True)]
        )
        limit = settings.ftol * state.cost + self.noise_floor * voxels.data.shape[0]
        small_gain = (predicted <= limit) & (actual.abs() <= limit)
        converged = state.running & ~fresh & (small_step | small_gain)

        gain = actual / predicted.clamp_min(torch.finfo(self.kernel.dtype).tiny)
        shrink = (1 - (2 * gain.clamp(0, 1) - 1) ** 3).clamp_min(0.2)
        damping = torch.where(better, state.damping * shrink, state.damping * state.growth)
        damping = torch.where(fresh, state.damping, damping.clamp(self.least_damping, 1e12))
        growth = torch.where(better, 2.0, state.growth * 2).clamp_max(1e6)
        evaluations = state.evaluations + state.running
        lost = evaluations >= settings.max_evaluations
        running = state.running & ~converged & ~lost & (torch.isfinite(cost) | ~fresh)

        def updated(new: list[Tensor], old: list[Tensor]) -> Tensor:
            return torch.stack([torch.where(better, a, b) for a, b in zip(new, old, strict=True)])

        return (
            updated(trial, position),
            torch.where(better, cost, state.cost),
            updated(new_gradient, gradient),
            updated(new_hessian, hessian.triangle),
            torch.where(state.running, damping, state.damping),
            torch.where(state.running, growth, state.growth),
            evaluations,
            running,
            state.converged | converged,
        )

    def _bounded_step(
        self,
        state: State,
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
        share = _LEAST_SHARE * torch.where(torch.isinf(state.cost), 0.0, state.cost)
        damped = hessian.with_diagonal(
            [
                d + torch.maximum(d, share / w**2) * state.damping
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
            if not torch.compiler.is_compiling() and not bool(torch.stack(outside).any()):
                break
            step = [
                torch.where(o, i - z, s)
                for o, i, z, s in zip(outside, inside, position, step, strict=True)
            ]
            free = [f & ~o for f, o in zip(free, outside, strict=True)]
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

    def times(self, vector: list[Tensor]) -> list[Tensor]:
        """Return the product with a vector."""
        return [sum_of([self[i, j] * v for j, v in enumerate(vector)]) for i in range(self.n)]


def sum_of(terms: list[Tensor]) -> Tensor:
    """Return the elementwise sum of tensors."""
    return functools.reduce(torch.add, terms)


def all_of(terms: list[Tensor]) -> Tensor:
    """Return the elementwise conjunction of tensors."""
    return functools.reduce(torch.logical_and, terms)


def get_step(kernel: Kernel, settings: LmSettings) -> Callable[..., tuple[Tensor, ...]]:
    """Return the step function, compiled when asked for."""
    step = LmStep(kernel, settings)
    return kernel.compile("lm", step) if settings.compiled else step


def _solve(matrix: _Symmetric, rhs: list[Tensor], free: list[Tensor]) -> list[Tensor]:
    """Solve a system for the free unknowns by elimination; the others get 0.

    The matrix is symmetric and positive, so no pivoting is needed; unrolled over the unknowns and
    elementwise over lanes this is several times faster than a batched library call.
    """
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


LM = Solver(solve, LmSettings)
