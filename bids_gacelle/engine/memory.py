"""How much memory a fit will take, and how much it took."""

from __future__ import annotations

import ctypes
import os
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bids_gacelle.engine.kernels import Kernel, Voxels
from bids_gacelle.engine.solvers import Settings, Solver
from bids_gacelle.engine.starts import TILE, starts_at_once
from bids_gacelle.engine.study import Study

_DOUBLE = 8
_PROBED = 64
# Temporaries when entries of the start dictionary are scored, and in a closed form for so many
# signals that are mixed, without and with weights.
_COPIES_OF_TILE, _COPIES_CLOSED = 4, {2: (8, 10), 3: (15, 29), 4: (19, 50)}
# What an allocator keeps in reserve or cannot fill, over what is asked of it.
_SLACK = 1.2
# Work space of numerical libraries, code that is loaded at its first use.
_FIXED = 16 * 2**20


# Of mallopt, and the size in question: most arrays of a block, not those of a solver's lanes.
_M_MMAP_THRESHOLD, _LARGE = -3, 2**20


def return_freed_memory() -> None:
    """Have the C library return large arrays to the system at once when they are freed.

    glibc keeps ever larger ones for later, up to 32 MiB each, which no plan foresees. What earlier
    fits of the process have left in pieces is not mended by this.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a fit takes beside the caller's arrays and the maps.

    Attributes
    ----------
    loaded
        Per voxel while a block is read and normalised.
    held
        Per voxel of a block that is fitted.
    lane
        Per voxel of those that a solver works on at once.
    start
        For finding starts, whatever the size of a block.
    recorded
        Per voxel of those worked on at once, for what a GPU repeats by itself; 0: it does not.
    """

    loaded: int
    held: int
    lane: int
    start: int
    recorded: int = 0

    def fixed(self, lanes: int) -> int:
        """Return the bytes that do not depend on the size of a block."""
        working = max(self.start, lanes * self.lane)
        if self.recorded:  # in memory of its own
            working += max(self.start, lanes * self.recorded)
        return int(_SLACK * working) + _FIXED

    def voxel(self, *, ahead: bool) -> int:
        """Return bytes per voxel; `ahead`: a block is read while another one is fitted."""
        return int(_SLACK * (self.held + self.loaded if ahead else max(self.held, self.loaded)))


def footprint(
    kernel: Kernel, study: Study, solver: Solver, settings: Settings, *, pulled: bool = False
) -> Footprint:
    """Return what a fit will take; `pulled`: every parameter of every voxel has a quadratic term.

    Counted from the arrays that exist together, except for the intermediate values of the model:
    these are measured by computing it for a few voxels.
    """
    model, item = kernel.model, kernel.dtype.itemsize
    m, p = study.n_measurements, len(model.parameters)
    names = p + len(model.derived_names)
    shared = 0 if study.shared is None else study.shared[0].n
    numbers = m * study.arrays + len(study.inputs) + (study.sigma is not None)
    if kernel.averages is not None and study.arrays == 1:
        numbers += m  # averages have weights
    prepared = _DOUBLE * (numbers + shared + 1)
    if kernel.objective.needs_noise:
        numbers += 2 * p + 1
        prepared += _DOUBLE * (4 * p + 1)
    elif pulled:
        numbers += 2 * p
    converted = 0 if item == _DOUBLE else item * numbers
    stages = min(len(kernel.objective.stages()), 2)
    ends = settings.starts * (2 * item * p + stages * (item * solver.kept(p) + 8))
    solution = _DOUBLE * (2 + solver.copies * m) * p + settings.starts * item * (p + 1)
    results = 8 * names + p + 17
    scored = item * min(settings.dictionary, TILE) * _COPIES_OF_TILE
    if model.linear:
        copies = _COPIES_CLOSED[_signals(kernel)][study.arrays > 1]
        scored = item * min(settings.dictionary, TILE) * copies
    intermediate = _probe(kernel, study)
    lane = item * (3 * solver.kept(p) + 2 * numbers) + intermediate
    # The assessment of the same number of voxels is in double precision.
    lane *= 2 if item < _DOUBLE else 1
    return Footprint(
        loaded=study.row_bytes + prepared + _DOUBLE * m,
        held=prepared + max(converted + ends, solution + results),
        lane=lane,
        start=starts_at_once(kernel) * (scored + 2 * item * numbers),
        recorded=stages * intermediate if kernel.device.type == "cuda" else 0,
    )


def _signals(kernel: Kernel) -> int:
    """Return how many signals the linear parameters of a model mix."""
    model, like = kernel.model, torch.ones(1, dtype=kernel.dtype, device=kernel.device)
    inputs = {name: value * like for name, value in model.input_defaults.items()}
    params = {
        p.name: p.start[0] * like if p.start else like
        for p in model.parameters
        if p.name not in model.linear
    }
    return len(model.mixture(params, inputs))


def _probe(kernel: Kernel, study: Study) -> int:
    """Return the bytes per voxel that computing the normal equations takes at its peak."""
    if study.n == 0:
        return 0
    middle = [
        1.0 if i == kernel.amplitude else 0.5 * (low + high)
        for i, (low, high) in enumerate(kernel.box)
    ]
    ones = torch.ones(_PROBED, dtype=kernel.dtype, device=kernel.device)
    data = ones.repeat(study.n_measurements, 1)
    voxels = Voxels(
        data=data,
        weight=data if study.arrays > 1 else None,
        noise_variance=ones if kernel.objective.needs_noise else None,
        channel_variance=ones[None] if kernel.objective.noise == "rician" else None,
        inputs=dict.fromkeys(study.inputs, ones),
    )
    position = torch.tensor(middle, dtype=kernel.dtype, device=kernel.device)[:, None] * ones
    with AllocationCounter() as counter:
        kernel.normal_equations(position, voxels)
    return counter.peak // _PROBED


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of tensors made inside of it that exist at the same time.

    Attributes
    ----------
    peak
        The most at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._alive.pop(key)


_STATM = Path("/proc/self/statm")
_BETWEEN_LOOKS = 2e-3  # s; asking the system takes time, too


class Watch:
    """Measures the memory taken since it was made, on some devices.

    On the CPU it looks, whenever it is told to, at how much memory of its own the process has
    (Linux only); a GPU counts by itself.
    """

    def __init__(self, devices: list[torch.device]) -> None:
        self._cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})
        for index in self._cuda:
            torch.cuda.reset_peak_memory_stats(index)
        self._before = {i: torch.cuda.memory_allocated(i) for i in self._cuda}
        self._first = _own_bytes() if not self._cuda else None
        self._most, self._looked = self._first, 0.0

    def look(self) -> None:
        """Take note of the memory that is taken now."""
        now = time.monotonic()
        if self._most is not None and now > self._looked + _BETWEEN_LOOKS:
            self._most, self._looked = max(self._most, _own_bytes() or 0), now

    def peak(self) -> int | None:
        """Return the most that was taken (on any one GPU) in bytes; None: unknown."""
        if self._cuda:
            return max(torch.cuda.max_memory_allocated(i) - self._before[i] for i in self._cuda)
        if self._first is None or self._most is None:
            return None
        return self._most - self._first


def _own_bytes() -> int | None:
    """Return the resident memory of this process that is no file's, or None where unknown."""
    if not sys.platform.startswith("linux"):
        return None
    with _STATM.open("rb", buffering=0) as file:
        _, resident, shared, *_ = file.read().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
