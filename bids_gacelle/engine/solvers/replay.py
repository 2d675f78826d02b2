"""Iterations that a GPU repeats by itself, without being told each of their operations again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bids_gacelle.engine.kernels import Kernel, Voxels

logger = logging.getLogger(__name__)

State = TypeVar("State", bound=Any)


def is_recorded(like: Tensor) -> bool:
    """Tell whether operations on a tensor are being recorded: no value can be looked at then."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


class Replay(Generic[State]):
    """An iteration of all lanes, recorded as a CUDA graph where it is called again.

    Telling a GPU to do a small operation takes longer than doing it. A recorded iteration reads
    and writes the tensors it was recorded with, so that they may be filled anew but not replaced;
    with others it is recorded again. The very first call is made as it is: it compiles, and fills
    caches of constants.

    Parameters
    ----------
    advance
        From states, a named tuple of tensors, and voxels to the states an iteration later. One
        that looks at values cannot be recorded and is called as it is.
    kernel
        Keeps the last recording, from block to block.
    """

    def __init__(self, advance: Callable[[State, Voxels], State], kernel: Kernel) -> None:
        self.advance, self.kernel = advance, kernel
        self.graph: torch.cuda.CUDAGraph | None = None
        self.recorded: tuple[State, Voxels] | None = None
        self.called = self.fails = False

    def __call__(self, state: State, voxels: Voxels) -> State:
        """Return the states an iteration later, from the second call on in the same tensors."""
        if self.fails or not self.called:
            self.called = True
            return self.advance(state, voxels)
        known = self.recorded
        if known is None or known[0] is not state or known[1] is not voxels:
            try:
                self.graph, self.recorded = self._record(state, voxels), (state, voxels)
            except RuntimeError as error:
                logger.debug("Iterations are not recorded: %s", error)
                self.fails = True
                return self.advance(state, voxels)
        assert self.graph is not None
        self.graph.replay()
        return state

    def _record(self, state: State, voxels: Voxels) -> torch.cuda.CUDAGraph:
        """Return the graph of an iteration that leaves its result where the states were."""
        device = self.kernel.device
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        now, last = torch.cuda.current_stream(device), self.kernel.recording
        stream.wait_stream(now)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            # Threads of other devices, and those that copy, go on meanwhile.
            pool = None if last is None else last.pool()
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                for old, new in zip(state, self.advance(state, voxels), strict=True):
                    if new is not old:
                        old.copy_(new)
            finally:
                graph.capture_end()
        now.wait_stream(stream)
        self.kernel.recording = graph
        return graph
