"""Arrays that stay where they are, in memory or in a file, and are read for some voxels at a time.

Voxels are counted in the order in which the data lie in memory, so that a block is a piece of it.
"""

from __future__ import annotations

import itertools
import math
import mmap
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bids_gacelle.engine.errors import EngineError

Array = NDArray[np.generic]
Columns = slice | NDArray[np.intp]
REAL = "biuf"
"""Kinds of numpy types that hold real numbers."""
# Types that torch computes with; others become double precision on the host.
_DIRECT = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1")


class Sliceable(Protocol):
    """What can be opened piece by piece: nibabel's ArrayProxy, an HDF5 or a Zarr array."""

    shape: tuple[int, ...]
    dtype: Any

    def __getitem__(self, index: Any) -> Any:
        """Return a slice."""


def is_lazy(values: object) -> bool:
    """Tell whether something has to be read by slices."""
    return not isinstance(values, np.ndarray | np.generic | Tensor) and all(
        hasattr(values, name) for name in ("shape", "dtype", "__getitem__")
    )


def host(values: ArrayLike | Tensor, hidden: float = math.nan) -> Array:
    """Return a numpy view (or copy, from a GPU) of an array or tensor.

    Numbers that are Python objects become floats.

    Parameters
    ----------
    values
        Anything that is an array of numbers.
    hidden
        What stands for the values that a masked array of real numbers hides.

    Raises
    ------
    EngineError
        It is no array.
    """
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu().numpy()
        if isinstance(values, np.ma.MaskedArray) and values.dtype.kind in REAL:
            return np.asarray(np.ma.filled(values.astype(np.float64), hidden))
        array = np.asarray(values)
        return array.astype(np.float64) if array.dtype.kind == "O" else array
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise EngineError(f"This cannot be read as an array of numbers: {reason}") from error


def real_numbers(
    what: str, values: ArrayLike | Tensor, kinds: str = REAL, hidden: float = math.nan
) -> Array:
    """Return an array as `host` does.

    Raises
    ------
    EngineError
        Its type is not of these kinds; `what` it is, is said.
    """
    array = host(values, hidden)
    if array.dtype.kind not in kinds:
        raise EngineError(f"{what} must hold real numbers, got {array.dtype}: {values!r:.60}.")
    return array


def on_disk(values: object) -> bool:
    """Tell whether reading may have to wait for a disk."""
    if is_lazy(values):
        return True
    while isinstance(values, np.ndarray):
        values = values.base
    return isinstance(values, mmap.mmap)


def memory_order(values: Array | Sliceable) -> tuple[int, ...]:
    """Return the grid axes of (measurements, *grid), the one with the largest steps first."""
    axes = range(len(values.shape) - 1)
    if isinstance(values, np.ndarray):
        return tuple(sorted(axes, key=lambda axis: -abs(values.strides[1 + axis])))
    return tuple(reversed(axes)) if getattr(values, "order", "C") == "F" else tuple(axes)


class Rows:
    """The rows of an array (rows, *grid), read for some voxels at a time.

    Parameters
    ----------
    values
        Never copied as a whole.
    axes
        Order of the grid axes in which voxels are counted.
    """

    def __init__(self, values: Array | Sliceable, axes: tuple[int, ...]) -> None:
        self._values = values
        self._axes = axes
        self.shape = tuple(values.shape[1 + axis] for axis in axes)
        self.n = len(values) if isinstance(values, np.ndarray) else values.shape[0]
        self.itemsize = min(np.dtype(values.dtype).itemsize, 8)
        self._flat: Array | None = None
        self._turned: Array | None = None
        if isinstance(values, np.ndarray):
            turned = values.transpose(0, *(1 + axis for axis in axes))
            self._turned = turned
            if _merges(turned):
                self._flat = turned.reshape(self.n, math.prod(self.shape))

    def read(self, columns: Columns) -> Array:
        """Return a contiguous copy (rows, voxels) of ascending columns."""
        if self._turned is None:
            return self._read_slices(columns)
        if self._flat is None:
            flat = (
                np.arange(columns.start, columns.stop) if isinstance(columns, slice) else columns
            )
            places = np.unravel_index(flat, self.shape)
            return np.stack([row[places] for row in self._turned])
        if isinstance(columns, slice):
            return np.array(self._flat[:, columns], order="C")
        if self._flat.strides[0] < self._flat.strides[1]:  # all rows of a voxel lie together
            return np.ascontiguousarray(self._flat.T[columns].T)
        out = np.empty((self.n, len(columns)), self._flat.dtype)
        for target, row in zip(out, self._flat, strict=True):
            target[:] = row[columns]
        return out

    def _read_slices(self, columns: Columns) -> Array:
        """Read the hyperplanes of the slowest axis that hold the columns, and pick from them."""
        if not self._axes:
            return np.array(host(self._values[:])).reshape(self.n, 1)[:, columns]
        if isinstance(columns, slice):
            first, last = columns.start, columns.stop - 1
        else:
            first, last = int(columns[0]), int(columns[-1])
        plane = math.prod(self.shape[1:])
        low, high = first // plane, last // plane + 1
        index = [slice(None)] * (1 + len(self._axes))
        index[1 + self._axes[0]] = slice(low, high)
        slab = Rows(host(self._values[tuple(index)]), self._axes)
        skipped = low * plane
        if isinstance(columns, slice):
            return slab.read(slice(first - skipped, last + 1 - skipped))
        return slab.read(columns - skipped)


def tensor(array: Array) -> Tensor:
    """Return a tensor on the memory of a fresh array, or in double if torch lacks its type."""
    if array.dtype.str[1:] not in _DIRECT or not array.dtype.isnative:
        array = array.astype(np.float64)
    return torch.from_numpy(array)


def _merges(array: Array) -> bool:
    """Tell whether the grid axes are one axis in memory, so that they can be joined in place."""
    steps = [
        (count, step)
        for count, step in zip(array.shape[1:], array.strides[1:], strict=True)
        if count != 1
    ]
    return array.size == 0 or all(
        step == count_within * step_within
        for (_, step), (count_within, step_within) in itertools.pairwise(steps)
    )
