"""Lanes: voxels worked on at once, refilled as soon as some of them have finished.

The work then does not depend on the slowest voxel of a batch, and a result neither on the block
a voxel is in nor on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bids_gacelle.engine.kernels import Voxels
from bids_gacelle.engine.solvers.base import Ends, Problem
from bids_gacelle.engine.solvers.replay import Replay

FEWEST = 256
_REFILL_SHARE = 0.2
# Steps between looks at how many lanes have finished: each look makes a GPU wait for the host, and
# compiled steps are short.
_STEPS_CUDA, _STEPS_CUDA_COMPILED = 4, 8
_LONGEST_RECORDED = 50  # iterations

State = TypeVar("State", bound=Any)


def on_gpu(tensor: Tensor) -> bool:
    """Tell whether a tensor is where each operation has to be told to the device."""
    return tensor.is_cuda


class Lanes(Generic[State]):
    """Feeds a queue of (start, voxel) items through lanes of a fixed, or falling, number.

    A state is a named tuple of tensors with lanes on the last axis, one of them `running`.

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
        length: int = 1,
    ) -> None:
        self.problem, self.starts, self.stale = problem, starts, stale
        self.load, self.outcome = load, outcome
        gpu = on_gpu(starts)
        recorded = gpu and length <= _LONGEST_RECORDED
        self.advance = Replay(advance, problem.kernel) if recorded else advance
        self.n_items = starts.shape[1]
        self.n_voxels = problem.voxels.data.shape[-1]
        # A compiled step is bound to its shapes: one number of lanes for all blocks, to the end.
        self.fixed = problem.settings.compiled
        lanes = most if self.fixed else min(FEWEST, most)
        while lanes < min(self.n_items, most):
            lanes *= 2
        on_cuda = _STEPS_CUDA_COMPILED if self.fixed else _STEPS_CUDA
        self.steps = max(on_cuda // length, 1) if gpu else 1
        first = torch.zeros(lanes, dtype=torch.long, device=starts.device)
        self.item = torch.full_like(first, -1)
        self.voxels = problem.voxels.take(first)
        fresh = load(starts[:, first], self.voxels)
        self.state = fresh._make(tensor.contiguous() for tensor in fresh)
        self.state.running.fill_(False)
        self.next_item = self.n_done = 0

    def run(self) -> Ends:
        """Return where all items ended."""
        ends = Ends(
            *(kept.new_empty(*kept.shape[:-1], self.n_items) for kept in self.outcome(self.state))
        )
        while True:
            idle = ~self.state.running
            if int(idle.sum()) >= _REFILL_SHARE * len(idle):
                self._flush(idle, ends)
                self._refill(idle)
                if self.next_item == self.n_items:
                    n_running = int(self.state.running.sum())
                    if n_running == 0:
                        return ends
                    if not self.fixed:
                        self._shrink(n_running)
            for _ in range(self.steps):
                self.state = self.advance(self.state, self.voxels)

    def _flush(self, idle: Tensor, ends: Ends) -> None:
        """Store the lanes that have finished."""
        lanes = (idle & (self.item >= 0)).nonzero()[:, 0]
        if len(lanes) == 0:
            return
        items = self.item[lanes]
        for target, source in zip(ends, self.outcome(self.state), strict=True):
            target.index_copy_(-1, items, source.index_select(-1, lanes))
        self.item[lanes] = -1
        self.n_done += len(lanes)
        self.problem.report(self.n_done / self.n_items)

    def _refill(self, idle: Tensor) -> None:
        """Load the next items into idle lanes."""
        lanes = idle.nonzero()[:, 0][: self.n_items - self.next_item]
        if len(lanes) == 0:
            return
        first, n = self.next_item, len(lanes)
        self.next_item += n
        self.item[lanes] = torch.arange(first, first + n, device=lanes.device)
        starts, source = self._from(first, n)
        fresh = self.load(starts, source)
        renewed = [name not in self.stale for name in self.state._fields]
        targets = (*compress(self.state, renewed), *self.voxels.tensors())
        new = (*compress(fresh, renewed), *source.tensors())
        for old, value in zip(targets, new, strict=True):
            old.index_copy_(-1, lanes, value[..., :n])

    def _from(self, first: int, n: int) -> tuple[Tensor, Voxels]:
        """Return starts and voxels of `n` items, and more of them to be as many as lanes.

        Sums may round differently when shapes change.
        """
        size, voxel = len(self.item), first % self.n_voxels
        if voxel + size <= self.n_voxels:  # nothing to be copied
            return self.starts[:, first : first + size], self.problem.voxels.take(
                slice(voxel, voxel + size)
            )
        items = torch.arange(first, first + size, device=self.item.device)
        items = items.clamp_max(first + n - 1)
        starts = self.starts.index_select(-1, items)
        return starts, self.problem.voxels.take(items % self.n_voxels)

    def _shrink(self, n_running: int) -> None:
        """Drop idle lanes once the queue is empty; their number is halved and halved again."""
        lanes = len(self.item)
        while lanes > FEWEST and n_running <= lanes // 2:
            lanes //= 2
        if lanes < len(self.item):
            index = torch.argsort(~self.state.running, stable=True)[:lanes]
            self.item = self.item[index]
            self.state = self._take(index)
            self.voxels = self.voxels.take(index)

    def _take(self, index: Tensor) -> State:
        return self.state._make(tensor.index_select(-1, index) for tensor in self.state)
