"""Iterations that a GPU repeats by itself, without being told each of their operations again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bids_gacelle.engine.kernels import Kernel, Recording, Voxels

logger = logging.getLogger(__name__)

State = TypeVar("State", bound=Any)

_rehearsal = threading.local()
_recording = threading.Lock()
_COPIES = frozenset({"aten::_to_copy", "aten::copy_"})
_INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_"})
_LOOKS = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "_unique2",
        "equal",
        "masked_select",
        "nonzero",
        "repeat_interleave",
        "unique_consecutive",
        "unique_dim",
    )
)


def is_recorded(like: Tensor) -> bool:
    """Tell whether operations on a tensor are being recorded: no value can be looked at then."""
    if getattr(_rehearsal, "runs", False):
        return True
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


class Rehearsal(TorchDispatchMode):
    """Finds out whether what runs inside of it could be recorded.

    A recording that fails half-way leaves torch's allocator unable to free memory, up to 2.11.

    Attributes
    ----------
    looked
        Whether a value was looked at, or sent from one device to another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.looked = False

    def __enter__(self) -> Rehearsal:
        """Begin."""
        _rehearsal.runs = True
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        _rehearsal.runs = False
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and see what kind it is of."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name  # type: ignore[attr-defined]
        if name in _LOOKS:
            self.looked = True
        elif name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            by_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            self.looked |= by_mask or any(index.device != out.device for index in indices)
        elif name in _COPIES:
            devices = {value.device for value in (*args, out) if isinstance(value, Tensor)}
            self.looked |= len(devices) > 1
        return out


class Replay(Generic[State]):
    """An iteration of all lanes, recorded as a CUDA graph where it is called again.

    Telling a GPU to do a small operation takes longer than doing it. A recorded iteration reads
    and writes the tensors it was recorded with, so that they may be filled anew but not replaced;
    with others it is recorded again. The first call is made as it is: it compiles, and fills
    caches of constants.

    Parameters
    ----------
    advance
        From states, a named tuple of tensors, and voxels to the states an iteration later. One
        that looks at values cannot be recorded and is called as it is.
    kernel
        Keeps what was recorded last, and whether its iterations can be, from block to block.
    """

    def __init__(self, advance: Callable[[State, Voxels], State], kernel: Kernel) -> None:
        self.advance, self.kernel = advance, kernel
        self.recorded: tuple[State, Voxels, torch.cuda.CUDAGraph] | None = None
        self.called = False

    def __call__(self, state: State, voxels: Voxels) -> State:
        """Return the states an iteration later, once recorded in the same tensors."""
        kernel = self.kernel
        if not self.called:
            self.called = True
            return self.advance(state, voxels)
        if kernel.recordable is None:
            if not kernel.runs_compiled:
                with Rehearsal() as rehearsal:
                    state = self.advance(state, voxels)
                kernel.recordable = not rehearsal.looked
                return state
            kernel.recordable = True  # one that looks at values does not compile
        if not kernel.recordable:
            return self.advance(state, voxels)
        known = self.recorded
        if known is None or known[0] is not state or known[1] is not voxels:
            known = self.recorded = None
            try:
                with _recording:  # no thread can empty a cache while another one records
                    known = state, voxels, self._record(state, voxels)
            except RuntimeError as error:
                logger.debug("Iterations are not recorded: %s", error)
                kernel.recordable = False
                return self.advance(state, voxels)
            self.recorded = known
        known[2].replay()
        return state

    def _record(self, state: State, voxels: Voxels) -> torch.cuda.CUDAGraph:
        """Return the graph of an iteration that leaves its result where the states were."""
        device, last = self.kernel.device, self.kernel.recording
        graph, pool = torch.cuda.CUDAGraph(), None
        if last is None:
            # Of another priority than streams that copy: torch gives out the same few over again.
            # All recordings on one stream, as memory is used again on the same stream only.
            stream = torch.cuda.Stream(device, priority=-1)
            torch.cuda.empty_cache()  # not possible while something is being recorded
        else:
            stream, pool = last.stream, last.graph.pool()
        now = torch.cuda.current_stream(device)
        stream.wait_stream(now)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            # Threads of other devices, and those that copy, go on meanwhile.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                for old, new in zip(state, self.advance(state, voxels), strict=True):
                    if new is not old:
                        old.copy_(new)
            finally:
                graph.capture_end()
        now.wait_stream(stream)
        self.kernel.recording = Recording(graph, stream)
        return graph
