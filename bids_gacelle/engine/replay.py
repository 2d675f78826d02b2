"""Work that a GPU repeats by itself, without being told each of its operations again."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bids_gacelle.engine.kernels import Kernel

logger = logging.getLogger(__name__)

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


def on_gpu(tensor: Tensor) -> bool:
    """Tell whether a tensor is where each operation has to be told to the device."""
    return tensor.is_cuda


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


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all recordings: memory is used again on the same stream only.

    It has another priority than streams that copy, as torch gives out the same few over again.
    """
    return torch.cuda.Stream(device, priority=-1)


class Held(Protocol):
    """What is worked on: a number of tensors."""

    def tensors(self) -> list[Tensor]:
        """Return all of them, in a fixed order."""


T = TypeVar("T", bound=Held)


class Replay(Generic[T]):
    """A function from tensors to what takes their place, recorded as a CUDA graph.

    Telling a GPU to do a small operation takes longer than doing it. A recorded function reads
    and writes the tensors it was recorded with; with others it is recorded again. The first call
    for a kernel is made as it is: it compiles, and fills caches of constants.

    Parameters
    ----------
    function
        One that looks at values cannot be recorded and is called as it is.
    name
        What the kernel knows it by.
    kernel
        Keeps what was recorded last, and what can be, from block to block.
    """

    def __init__(self, function: Callable[[T], T], name: str, kernel: Kernel) -> None:
        self.function, self.name, self.kernel = function, name, kernel
        self.recorded: tuple[T, torch.cuda.CUDAGraph] | None = None

    def __call__(self, work: T) -> T:
        """Return what follows, once recorded in the same tensors."""
        recordable = self.kernel.recordable
        if self.name not in recordable:
            recordable[self.name] = None
            return self.function(work)
        if recordable[self.name] is None:
            recordable[self.name] = True  # one that looks at values does not compile
            if not self.kernel.runs_compiled:
                with Rehearsal() as rehearsal:
                    work = self.function(work)
                recordable[self.name] = not rehearsal.looked
                return work
        if not recordable[self.name]:
            return self.function(work)
        known = self.recorded
        if known is None or known[0] is not work:
            known = self.recorded = None
            try:
                with _recording:  # no thread can empty a cache while another one records
                    known = work, self._record(work)
            except RuntimeError as error:
                logger.debug("%s is not recorded: %s", self.name, error)
                recordable[self.name] = False
                return self.function(work)
            self.recorded = known
        known[1].replay()
        return work

    def _record(self, work: T) -> torch.cuda.CUDAGraph:
        """Return the graph of a call that leaves its result where the work was."""
        device, last = self.kernel.device, self.kernel.recording
        graph, stream = torch.cuda.CUDAGraph(), _recording_stream(device)
        if last is None:
            torch.cuda.empty_cache()  # not possible while something is being recorded
        now = torch.cuda.current_stream(device)
        stream.wait_stream(now)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            # Threads of other devices, and those that copy, go on meanwhile.
            pool = None if last is None else last.pool()
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                following = self.function(work).tensors()
                for old, new in zip(work.tensors(), following, strict=True):
                    if new is not old:
                        old.copy_(new)
            finally:
                graph.capture_end()
        now.wait_stream(stream)
        self.kernel.recording = graph
        return graph
