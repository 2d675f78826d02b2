"""Lanes: voxels worked on at once, refilled as soon as some of them have finished.

The work then does not depend on the slowest voxel of a batch, and a result neither on the block
a voxel is in nor on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from bids_gacelle.engine.kernels import Voxels, span
from bids_gacelle.engine.replay import Replay, on_gpu
from bids_gacelle.engine.solvers.base import Ends, Problem

# Progress is told, and an interruption noticed, whenever so many more items have ended.
_TOLD_SHARE = 0.02
# A step of fewer lanes takes as long.
_FEWEST, _FEWEST_CUDA = 256, 4096
_REFILL_SHARE = 0.2
# Steps between looks at how many lanes have finished: each look makes a GPU wait for the host.
_STEPS_CUDA = 4
# Iterations. Recording takes as long as telling them once.
_LONGEST_RECORDED = 50

State = TypeVar("State", bound=Any)


class Work(NamedTuple):
    """What lanes hold, on their last axis.

    Attributes
    ----------
    state
        A named tuple of tensors, one of them `running`.
    voxels
        The data of their voxels.
    item
        (lanes,) which item they work on; one past the last for those that have none.
    queue
        0-d, the next item.
    """

    state: Any
    voxels: Voxels
    item: Tensor
    queue: Tensor

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in a fixed order."""
        return [*self.state, *self.voxels.tensors(), self.item, self.queue]


class Lanes(Generic[State]):
    """Feeds a queue of (start, voxel) items through lanes of a fixed, or falling, number.

    Parameters
    ----------
    problem
        Its voxels are worked on, over and over when there are more starts than voxels.
    starts
        (parameters, starts); start i belongs to voxel i modulo their number.
    most
        Number of lanes at work where there is enough to do.
    load
        From starts (parameters, lanes) and their voxels to fresh states that run.
    advance
        From states and voxels to the states some iterations later; lanes that do not run keep
        theirs.
    outcome
        From states to what is kept of them.
    length
        Iterations that `advance` makes.
    stale
        Fields that a lane may have as the voxel before left them, until its first step.
    depends
        What `load` depends on besides the kernel of the problem, for refilling to be compiled
        where steps are, unless a GPU records it; None: it is not.
    """

    def __init__(
        self,
        problem: Problem,
        starts: Tensor,
        most: int,
        load: Callable[[Tensor, Voxels], State],
        advance: Callable[[State, Voxels], State],
        outcome: Callable[[State], Ends],
        stale: frozenset[str] = frozenset(),
        depends: Hashable = None,
        length: int = 1,
    ) -> None:
        self.problem, self.starts = problem, starts
        self.step, self.outcome = advance, outcome
        self.n_items = starts.shape[1]
        self.n_voxels = problem.voxels.data.shape[-1]
        # A compiled step is bound to its shapes: one number of lanes for all blocks, to the end.
        self.fixed = problem.settings.compiled
        gpu = on_gpu(starts)
        self.recorded = gpu and length <= _LONGEST_RECORDED
        # Compiled steps, being few kernels each, are recorded together.
        between_looks = max(_STEPS_CUDA // length, 1) if gpu else 1
        self.steps, self.calls = (between_looks, 1) if self.fixed else (1, between_looks)
        self.fewest = _FEWEST_CUDA if gpu else _FEWEST
        lanes = most if self.fixed else min(self.fewest, most)
        while lanes < min(self.n_items, most):
            lanes *= 2
        self.left, self.told = max(self.n_items - lanes, 0), 0.0
        self.numbers = torch.arange(lanes, device=starts.device)
        item = self.numbers.clamp_max(self.n_items)
        first, voxels = self._take(item)
        fresh = load(first, voxels)
        fresh = fresh._replace(running=fresh.running * (item < self.n_items))
        # Each in memory of its own: what is recorded writes one after the other.
        state = fresh._make(
            tensor.clone(memory_format=torch.contiguous_format) for tensor in fresh
        )
        queue = torch.full_like(item[0], self.n_items - self.left)
        self.end = torch.full_like(queue, self.n_items)
        self.refill = _refill(load, stale)
        if self.fixed and not gpu and depends is not None:
            self.refill = problem.kernel.compile("refill", self.refill, depends)
        self.work = Work(state, voxels, item, queue)
        # The last place is for lanes that have no item.
        self.ends = Ends(
            *(kept.new_empty(*kept.shape[:-1], self.n_items + 1) for kept in outcome(state))
        )

    def run(self) -> Ends:
        """Return where all items ended."""
        advance, refill = self._advanced, self._refilled
        if self.recorded:
            # Not kept by these lanes, for graphs to be freed now and not amid another recording.
            advance = Replay(advance, "advance", self.problem.kernel)
            refill = Replay(refill, "refill", self.problem.kernel)
        while True:
            for _ in range(self.calls):
                self.work = advance(self.work)
            lanes = len(self.work.item)
            n_running = int(self.work.state.running.sum())
            n_idle = lanes - n_running
            self._tell(n_running)
            if self.left and n_idle >= _REFILL_SHARE * lanes:
                self.work = refill(self.work)
                self.left = max(self.left - n_idle, 0)
            elif n_running == 0:
                self._keep(self.work)
                return Ends(*(kept[..., : self.n_items] for kept in self.ends))
            elif not self.fixed and not self.left and lanes // 2 >= max(n_running, self.fewest):
                self._shrink(n_running)

    def _tell(self, n_running: int) -> None:
        """Report how much is done, when that has grown, and at the end."""
        share = max(self.n_items - self.left - n_running, 0) / self.n_items
        if share >= min(self.told + _TOLD_SHARE, 1):
            self.told = share
            self.problem.report(share)

    def _advanced(self, work: Work) -> Work:
        state = work.state
        for _ in range(self.steps):
            state = self.step(state, work.voxels)
        return work._replace(state=state)

    def _refilled(self, work: Work) -> Work:
        """Return the work with the next items in idle lanes, having kept where theirs ended."""
        self._keep(work)
        found = iter(self.refill(work, *self._next(work), self.end))
        state = work.state._make(next(found) for _ in work.state)
        return Work(state, work.voxels.map(lambda _: next(found)), next(found), next(found))

    def _keep(self, work: Work) -> None:
        """Store where items are; those still worked on are stored again later."""
        for kept, now in zip(self.ends, self.outcome(work.state), strict=True):
            kept.scatter_(-1, work.item.expand_as(now), now)

    def _take(self, item: Tensor) -> tuple[Tensor, Voxels]:
        """Return starts and voxels of items; of the last one where there is none."""
        item = item.clamp_max(self.n_items - 1)
        voxel = item if self.n_items == self.n_voxels else item % self.n_voxels
        return self.starts.index_select(-1, item), self.problem.voxels.take(voxel)

    def _next(self, work: Work) -> tuple[Tensor, Voxels]:
        """Return starts and voxels of the next items, as many as there are lanes."""
        if self.recorded or self.n_items != self.n_voxels:
            return self._take(work.queue + self.numbers)
        begin, lanes = self.n_items - self.left, len(work.item)
        return span(self.starts, begin, lanes), self.problem.voxels.span(begin, lanes)

    def _shrink(self, n_running: int) -> None:
        """Drop idle lanes once the queue is empty; their number is halved and halved again."""
        self._keep(self.work)
        state, voxels, item, queue = self.work
        lanes = len(item)
        while lanes // 2 >= max(n_running, self.fewest):
            lanes //= 2
        index = torch.argsort(state.running == 0, stable=True)[:lanes]
        state = state._make(tensor.index_select(-1, index) for tensor in state)
        self.work = Work(state, voxels.take(index), item[index], queue)


def _refill(
    load: Callable[[Tensor, Voxels], Any], stale: frozenset[str]
) -> Callable[..., tuple[Tensor, ...]]:
    """Return what puts the next items in idle lanes; it holds on to no data."""

    def refill(work: Work, starts: Tensor, voxels: Voxels, end: Tensor) -> tuple[Tensor, ...]:
        # All lanes are written, so that nothing depends on how many of them are idle.
        idle = work.state.running == 0
        rank = idle.cumsum(0) - 1
        item = work.queue + rank
        renewed = idle & (item < end)
        rank = rank.clamp_min(0)
        state, following = work.state, voxels.take(rank)
        fresh = load(starts.index_select(-1, rank), following)
        changed = {
            name: torch.where(renewed, new, getattr(state, name))
            for name, new in fresh._asdict().items()
            if name not in stale
        }
        pairs = zip(following.tensors(), work.voxels.tensors(), strict=True)
        return (
            *state._replace(**changed),
            *(torch.where(renewed, new, old) for new, old in pairs),
            torch.where(renewed, item, work.item),
            work.queue + renewed.sum(),
        )

    return refill
