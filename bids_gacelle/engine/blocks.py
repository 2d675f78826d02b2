"""How any number of voxels goes through any memory, on any number of devices.

A block is read on the host, sent to the device, fitted, and its results are fetched. A device that
copies by itself reads and sends the next block while the current one is fitted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from bids_gacelle.engine.device import is_out_of_memory
from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.memory import Footprint
from bids_gacelle.engine.study import Block, Study

logger = logging.getLogger(__name__)

FEWEST = 2048
"""Blocks are not made smaller than this."""

# More voxels at once fill no device better; fewer are lost when a fit is interrupted. At the end
# of a block few voxels are left, which compiled steps make as slowly as many.
_MOST, _MOST_COMPILED, _MOST_CUDA = 2**16, 2**18, 2**20
# What a laptop has to spare.
_CPU_LIMIT = 512 * 2**20
# Blocks per device, so that the last ones to finish do not wait long for each other.
_ROUNDS = 4


@dataclass(frozen=True)
class Plan:
    """How a fit is cut into blocks.

    Attributes
    ----------
    n
        Voxels in all.
    block_size, lanes
        Voxels on a device at once, and those of them that a solver works on at once.
    predicted, limit
        Bytes that will be taken on each device, beside the caller's arrays and the maps, and
        bytes that may be; the limit is None where the block size was given.
    """

    n: int
    block_size: int
    lanes: int
    predicted: int
    limit: int | None

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return -(-self.n // max(self.block_size, 1))

    def __str__(self) -> str:
        """One line for the log."""
        limit = "" if self.limit is None else f" of at most {_megabytes(self.limit)}"
        blocks = f"{self.n_blocks} block{'' if self.n_blocks == 1 else 's'}"
        return (
            f"{self.n:,} voxels in {blocks} of up to {self.block_size:,}, "
            f"about {_megabytes(self.predicted)}{limit}"
        )


def default_limit(device: torch.device) -> int:
    """Return the bytes a fit may take: half of a GPU's free memory, or a share any laptop has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return _CPU_LIMIT


def make_plan(
    n: int,
    need: Footprint,
    *,
    device: torch.device,
    limit: int | None,
    block_size: int | None,
    lanes: int,
    least_lanes: int,
    ahead: bool,
    compiled: bool = False,
    n_devices: int = 1,
) -> Plan:
    """Return the largest blocks that stay below a limit.

    Parameters
    ----------
    need
        What a voxel takes.
    limit
        Bytes on each device; None: `default_limit`, which even the smallest block may exceed.
    block_size
        Overrides the limit.
    lanes, least_lanes
        Voxels a solver works on at once; they are halved, down to the second number, where that
        many leave less than half of the memory to the blocks.
    ahead
        Whether a block is read while another one is fitted.
    compiled
        Whether the steps of the solver are compiled.

    Raises
    ------
    EngineError
        The limit is too small for the smallest block.
    """
    each = need.voxel(ahead=ahead)
    allowed = default_limit(device) if limit is None else limit
    smallest = min(FEWEST, max(n, 1))
    if block_size is None:
        while lanes > least_lanes and need.fixed(lanes) > allowed / 2:
            saved = need.fixed(lanes) - need.fixed(lanes // 2)
            if saved < allowed / 16 and need.fixed(lanes) + smallest * each <= allowed:
                break  # fewer lanes are slower, and little would be won
            lanes //= 2
    if block_size is not None:
        size = min(block_size, max(n, 1))
    else:
        size = (allowed - need.fixed(lanes)) // each
        if size < smallest and limit is not None:
            raise EngineError(
                f"memory_limit is {_megabytes(limit)}, but this fit needs at least "
                f"{_megabytes(need.fixed(lanes) + smallest * each)} (blocks of {smallest:,} "
                f"voxels)."
            )
        most = _MOST_COMPILED if compiled else _MOST
        most = _MOST_CUDA if device.type == "cuda" else most
        if n_devices > 1:
            most = min(most, -(-n // (n_devices * _ROUNDS)))
        size = max(min(size, most), smallest)
        size = -(-n // -(-max(n, 1) // size))  # equal blocks instead of a small last one
    return Plan(
        n=n,
        block_size=max(size, 1),
        lanes=lanes,
        predicted=need.fixed(lanes) + size * each,
        limit=None if block_size is not None else allowed,
    )


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.0f} MB"


class Cancelled(Exception):
    """Another device has failed, or the user has interrupted the fit."""


class Queue:
    """Voxels that no device has taken yet; used by the threads of all devices.

    Parameters
    ----------
    n
        Voxels in all.
    pieces
        Start and stop of those to be taken; None: all.
    """

    def __init__(self, n: int, pieces: Sequence[tuple[int, int]] | None = None) -> None:
        whole = [(0, n)] if n else []
        self._rest = deque(whole if pieces is None else pieces)
        self._lock = threading.Lock()
        self.cancelled = False

    def take(self, size: int) -> tuple[int, int] | None:
        """Return start and stop of the next block of up to `size` voxels; None: all are taken."""
        with self._lock:
            self.check()
            if not self._rest:
                return None
            start, stop = self._rest.popleft()
            if stop - start > size:
                self._rest.appendleft((start + size, stop))
                stop = start + size
            return start, stop

    def give_back(self, start: int, stop: int) -> None:
        """Let voxels be taken again."""
        with self._lock:
            self._rest.appendleft((start, stop))

    def check(self) -> None:
        """Raise `Cancelled` when the fit has been given up."""
        if self.cancelled:
            raise Cancelled


@dataclass
class _Sent:
    block: Block
    event: Any


class Link:
    """Moves blocks to a device and results back to the host.

    On a GPU both happen on streams of their own, from and to pinned memory: the copies run while
    the device computes. Elsewhere there is nothing to move.

    Parameters
    ----------
    device
        Where to compute.
    cuda
        The module `torch.cuda`, or what stands for it; None: no GPU.
    """

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        self.device = device
        self._cuda = torch.cuda if cuda is None and device.type == "cuda" else cuda
        if self._cuda is not None:
            self._up, self._down = self._cuda.Stream(device), self._cuda.Stream(device)

    def load(self, study: Study, start: int, stop: int) -> _Sent:
        """Read, send and normalise a block; called from any thread."""
        with torch.no_grad():
            raw = study.read(start, stop)
            if self._cuda is None:
                return _Sent(study.prepare(raw), None)
            with self._cuda.stream(self._up):
                # Torch does not reuse pinned memory before the copy out of it has ended.
                there = raw.map(lambda t: t.pin_memory().to(device=self.device, non_blocking=True))
                block = study.prepare(there)
                return _Sent(block, self._up.record_event())

    def receive(self, sent: _Sent) -> Block:
        """Return a block for use on the current stream."""
        if self._cuda is not None:
            stream = self._cuda.current_stream(self.device)
            stream.wait_event(sent.event)
            for tensor in sent.block.tensors():
                tensor.record_stream(stream)  # freed memory is not reused before the fit has ended
        return sent.block

    def fetch(self, tensors: tuple[Tensor, ...]) -> Callable[[], list[Tensor]]:
        """Begin to copy tensors to the host; the function returned waits for them."""
        if self._cuda is None:
            return lambda: list(tensors)
        self._down.wait_event(self._cuda.current_stream(self.device).record_event())
        with self._cuda.stream(self._down):
            there = []
            for tensor in tensors:
                there.append(_pinned_like(tensor).copy_(tensor, non_blocking=True))
                tensor.record_stream(self._down)
            event = self._down.record_event()

        def wait_for_it() -> list[Tensor]:
            event.synchronize()
            return there

        return wait_for_it

    def empty_cache(self) -> None:
        """Give unused memory back to the device."""
        if self._cuda is not None:
            self._cuda.empty_cache()


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class Feeder:
    """Takes blocks from a queue and has the next one ready when it is asked for.

    Parameters
    ----------
    study, link, queue
        What to read, where to send it, and which voxels are left.
    size
        Voxels of a block.
    ahead
        Whether to read the next block, in a thread, while the current one is fitted.
    """

    def __init__(self, study: Study, link: Link, queue: Queue, size: int, *, ahead: bool) -> None:
        self._study, self._link, self._queue = study, link, queue
        self.size = size
        self._pool = ThreadPoolExecutor(1, "blocks") if ahead else None
        self._current: tuple[int, int] | None = None
        self._next: tuple[tuple[int, int], Future[_Sent]] | None = None

    def __enter__(self) -> Feeder:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._next = None

    def take(self) -> tuple[int, int, Block] | None:
        """Return the next block; None when all are taken. Errors of the thread come up here."""
        if self._pool is None:
            self._current = self._queue.take(self.size)
            if self._current is None:
                return None
            sent = self._link.load(self._study, *self._current)
        else:
            if self._next is None:
                self._begin()
            if self._next is None:
                self._current = None
                return None
            (self._current, future), self._next = self._next, None
            sent = future.result()
            del future
            self._begin()
        return (*self._current, self._link.receive(sent))

    def _begin(self) -> None:
        assert self._pool is not None
        piece = self._queue.take(self.size)
        if piece is not None:
            self._next = (piece, self._pool.submit(self._link.load, self._study, *piece))

    @property
    def can_halve(self) -> bool:
        """Whether the last block is larger than the smallest that is tried."""
        return self._current is not None and self._current[1] - self._current[0] > FEWEST

    def halve(self) -> None:
        """Put the last block back and go on with blocks of half its size.

        The block made ready is dropped: its memory is needed now.
        """
        assert self._current is not None
        if self._next is not None:
            piece, future = self._next
            if not future.cancel():
                future.exception()  # waits; what went wrong comes up again when it is read again
            self._queue.give_back(*piece)
            self._next = None
            del future
        start, stop = self._current
        self._queue.give_back(start, stop)
        self._current = None
        self.size = (stop - start + 1) // 2
        self._link.empty_cache()
        logger.warning("Memory is short: continuing with blocks of %s voxels.", f"{self.size:,}")


def for_blocks(feeder: Feeder, work: Callable[[int, int, Block], None]) -> None:
    """Call `work(start, stop, block)` for all blocks; one that is too large is done in halves.

    Raises
    ------
    torch.OutOfMemoryError, MemoryError
        Not even the smallest block fits.
    """
    item: tuple[int, int, Block] | None = None
    while True:
        try:
            item = feeder.take()
            if item is None:
                return
            work(*item)
        except Exception as error:
            if not is_out_of_memory(error) or not feeder.can_halve:
                raise
            short = True
        else:
            short = False
        item = None  # before the next block is read
        if short:  # not in the handler, where the traceback still keeps the memory of the block
            feeder.halve()


def share(workers: Sequence[Callable[[], None]], queue: Queue) -> None:
    """Run workers side by side, each in a thread; the first error ends all of them."""
    if len(workers) == 1:
        workers[0]()
        return
    with ThreadPoolExecutor(len(workers), "device") as pool:
        futures = [pool.submit(worker) for worker in workers]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also when the user interrupts the wait
            queue.cancelled = any(not f.done() or f.exception() for f in futures)
    errors = [error for f in futures if (error := f.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, Cancelled)):
        raise error


@dataclass(frozen=True)
class Progress:
    """How far a fit is.

    Attributes
    ----------
    done, total
        Voxels of the mask.
    converged
        Share of the fitted voxels in finished blocks that converged; NaN before the first.
    seconds
        Since the first block was begun.
    """

    done: int
    total: int
    converged: float
    seconds: float

    @property
    def voxels_per_second(self) -> float:
        """Voxels done over seconds."""
        return self.done / max(self.seconds, 1e-9)


class Tally:
    """Counts what all devices have done and tells the user's function.

    Parameters
    ----------
    total
        Voxels in all.
    converged
        Gives the share that converged.
    call
        The user's function, called by one thread at a time; or None.
    """

    def __init__(
        self,
        total: int,
        converged: Callable[[], float],
        call: Callable[[Progress], None] | None,
    ) -> None:
        self.total = total
        self._converged, self._call = converged, call
        self._finished = 0
        self._running: dict[int, float] = {}
        self._told = -1
        self._lock = threading.Lock()
        self._began = time.perf_counter()

    def running(self, start: int, stop: int, share: float) -> None:
        """Note which share of a block is done; its last voxel counts when all is stored."""
        with self._lock:
            self._running[start] = min(share * (stop - start), stop - start - 1)
            self._tell()

    def finished(self, start: int, voxels: int) -> None:
        """Note that a block is finished."""
        with self._lock:
            self._running.pop(start, None)
            self._finished += voxels
            self._tell()

    def dropped(self, start: int) -> None:
        """Note that a block has to be done again."""
        with self._lock:
            self._running.pop(start, None)

    def end(self) -> None:
        """Tell of a fit without voxels too."""
        with self._lock:
            self._tell()

    def _tell(self) -> None:
        done = self._finished + int(sum(self._running.values()))
        if self._call is None or done <= self._told:
            return
        self._told = done
        seconds = time.perf_counter() - self._began
        self._call(Progress(done, self.total, self._converged(), seconds))
