"""Batched Levenberg-Marquardt: own damping, bounds, stop and retirement for every voxel.

Marquardt (1963) scaling, Nielsen's (1999) gain-ratio damping, bounds by an active set. Voxels are
worked on in lanes; when a lane has finished it is refilled with the next voxel, so that the work
does not depend on the slowest voxel of a batch, and a result not on the neighbours of a voxel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.kernels import Compiled, Kernel, Voxels
from bids_gacelle.engine.solvers.base import Problem, Settings, Solution, default_lanes
from bids_gacelle.engine.starts import build_dictionary, find_starts

_FIRST_DAMPING = 0.1
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


def solve(problem: Problem) -> Solution:
    """Fit every voxel of a block from each of its starts and keep the lowest cost."""
    kernel, settings = problem.kernel, problem.settings
    dictionary = build_dictionary(kernel, settings.dictionary, settings.starts, settings.seed)
    starts = find_starts(kernel, problem.voxels, dictionary)
    n_starts, n_parameters, n_voxels = starts.shape
    end = minimise(problem, starts.permute(1, 0, 2).reshape(n_parameters, -1))
    cost = end.cost.reshape(n_starts, n_voxels)
    ends = end.position.reshape(n_parameters, n_starts, n_voxels).transpose(0, 1)
    winner = cost.argmin(0)
    voxel = torch.arange(n_voxels, device=kernel.device)
    return Solution(
        position=ends[winner, :, voxel].T.contiguous(),
        converged=end.converged.reshape(n_starts, n_voxels)[winner, voxel],
        evaluations=end.evaluations.reshape(n_starts, n_voxels)[winner, voxel],
        winner=winner,
        ends=ends,
        end_costs=cost,
    )


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
    return State(
        position=0.5 * torch.ones(n, lanes, **real),  # type: ignore[call-overload]
        cost=torch.full((lanes,), torch.inf, **real),  # type: ignore[call-overload]
        gradient=torch.zeros(n, lanes, **real),  # type: ignore[call-overload]
        hessian=torch.eye(n, **real)[..., None].repeat(1, 1, lanes),  # type: ignore[call-overload]
        damping=torch.full((lanes,), _FIRST_DAMPING, **real),  # type: ignore[call-overload]
        growth=torch.full((lanes,), 2.0, **real),  # type: ignore[call-overload]
        evaluations=torch.zeros(lanes, dtype=torch.int32, device=kernel.device),
        running=torch.zeros(lanes, dtype=torch.bool, device=kernel.device),
        converged=torch.zeros(lanes, dtype=torch.bool, device=kernel.device),
    )


class LmStep:
    """One Levenberg-Marquardt step of all lanes, a pure function of tensors."""

    def __init__(self, kernel: Kernel, settings: Settings) -> None:
        self.kernel = kernel
        self.settings = settings
        # In single precision a smaller damping is lost in the rounding of the diagonal.
        self.least_damping = 1e-6 if kernel.dtype == torch.float32 else 1e-12
        # Costs below this are rounding errors of data that are normalised to about one.
        self.noise_floor = torch.finfo(kernel.dtype).eps ** 2

    def __call__(self, state: State, voxels: Voxels) -> tuple[Tensor, ...]:
        """Return the next state; lanes that do not run keep theirs."""
        kernel, settings = self.kernel, self.settings
        scale = kernel.width
        if kernel.amplitude is not None:
            scale = torch.where(torch.isnan(scale), state.position.abs().clamp_min(1e-3), scale)
        step = self._bounded_step(state, scale)
        trial = torch.maximum(torch.minimum(state.position + step, kernel.upper), kernel.lower)
        new = kernel.normal_equations(trial, voxels)
        fresh = torch.isinf(state.cost)
        curved = (state.hessian * step).sum(1)
        predicted = -(step * (state.gradient + 0.5 * curved)).sum(0)
        actual = state.cost - new.cost
        better = state.running & (new.cost < state.cost)
        finite = torch.isfinite(new.cost)

        small_step = ((step / scale).abs() < settings.xtol).all(0)
        limit = settings.ftol * state.cost + self.noise_floor * voxels.data.shape[0]
        small_gain = (predicted <= limit) & (actual.abs() <= limit)
        converged = state.running & ~fresh & (small_step | small_gain)

        gain = actual / predicted.clamp_min(torch.finfo(kernel.dtype).tiny)
        shrink = (1 - (2 * gain.clamp(0, 1) - 1) ** 3).clamp_min(0.2)
        damping = torch.where(better, state.damping * shrink, state.damping * state.growth)
        damping = torch.where(fresh, state.damping, damping.clamp(self.least_damping, 1e12))
        growth = torch.where(better, 2.0, state.growth * 2).clamp_max(1e6)
        evaluations = state.evaluations + state.running
        lost = evaluations >= settings.max_evaluations
        running = state.running & ~converged & ~lost & (finite | ~fresh)
        keep = state.running
        return (
            torch.where(better, trial, state.position),
            torch.where(better, new.cost, state.cost),
            torch.where(better, new.gradient, state.gradient),
            torch.where(better, new.hessian, state.hessian),
            torch.where(keep, damping, state.damping),
            torch.where(keep, growth, state.growth),
            evaluations,
            running,
            state.converged | converged,
        )

    def _bounded_step(self, state: State, scale: Tensor) -> Tensor:
        """Solve the damped normal equations within the bounds by an active set.

        Parameters at a bound that the gradient pushes outward are held. Parameters whose step
        leaves the box go exactly to the bound and the others are solved again. Clipping alone
        would leave the others at the answer to a different question.
        """
        lower, upper = self.kernel.lower, self.kernel.upper
        position, gradient = state.position, state.gradient
        held = ((position <= lower) & (gradient > 0)) | ((position >= upper) & (gradient < 0))
        free = ~held
        step = torch.zeros_like(position)
        # A parameter without influence here (exchange without neurites) has no curvature to be
        # damped by; it would jump from bound to bound and get every joint step rejected.
        cost = torch.where(torch.isinf(state.cost), 0.0, state.cost)
        diagonal = torch.maximum(torch.diagonal(state.hessian).T, _LEAST_SHARE * cost / scale**2)
        matrix = state.hessian + torch.diag_embed((diagonal * state.damping).T).permute(1, 2, 0)
        for _ in range(_PASSES):
            fixed = torch.where(free, 0.0, step)
            rhs = -gradient - (state.hessian * fixed).sum(1)
            step = torch.where(free, _solve(matrix, rhs, free), fixed)
            trial = position + step
            inside = torch.maximum(torch.minimum(trial, upper), lower)
            outside = free & (trial != inside)
            if not torch.compiler.is_compiling() and not bool(outside.any()):
                break
            step = torch.where(outside, inside - position, step)
            free = free & ~outside
        return step


def get_step(kernel: Kernel, settings: Settings) -> Callable[..., tuple[Tensor, ...]]:
    """Return the step function, compiled when asked for; made once for all blocks of a fit."""
    if kernel.lm_step is None:
        step = LmStep(kernel, settings)
        kernel.lm_step = Compiled(step) if settings.compiled else step
    return kernel.lm_step


def _solve(matrix: Tensor, rhs: Tensor, free: Tensor) -> Tensor:
    """Solve (P, P, V) x = (P, V) for the free unknowns by elimination; the others get 0.

    The matrix is symmetric and positive, so no pivoting is needed; unrolled over P and elementwise
    over voxels this is several times faster than a batched library call.
    """
    n = rhs.shape[0]
    mask = free.to(rhs.dtype)
    tiny = torch.finfo(rhs.dtype).tiny * 1e6
    both = matrix * (mask[:, None] * mask)
    rows = [torch.cat((both[i, i:], (rhs[i] * mask[i])[None])) for i in range(n)]
    pivots = []
    for i in range(n):
        pivot = torch.where(free[i] & (rows[i][0] > tiny), rows[i][0], 1.0)
        pivots.append(pivot)
        for j in range(i + 1, n):
            factor = rows[i][j - i] / pivot
            rows[j] = rows[j] - factor * rows[i][j - i :]
    solution: list[Tensor] = [rhs[0]] * n
    for i in reversed(range(n)):
        total = rows[i][-1]
        for j in range(i + 1, n):
            total = total - rows[i][j - i] * solution[j]
        solution[i] = total / pivots[i] * mask[i]
    return torch.stack(solution)
