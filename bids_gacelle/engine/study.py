"""The caller's arrays: checked once, then handed out block by block in normalised form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bids_gacelle.engine.arrays import (
    REAL,
    Array,
    Columns,
    Rows,
    Sliceable,
    host,
    is_lazy,
    memory_order,
    on_disk,
    real_numbers,
    tensor,
)
from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import SharedFactor, Voxels
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.objective import Prior

# Numbers looked at together for the common scale of all voxels.
_AT_ONCE = 1 << 20
# Times the median magnitude: the square has no place in single precision.
_TOO_BRIGHT = 1e18
# Losses with a smaller factor have none either.
_LEAST_WEIGHT = 1e-25


@dataclass(frozen=True)
class Raw:
    """Voxels of a block as they came, in contiguous tensors; what there is not is None.

    Attributes
    ----------
    data
        (measurements, voxels).
    sigma
        (1 or measurements, 1 or voxels).
    common
        (groups, voxels) relative standard deviations of shared factors.
    emphasis
        (measurements, 1 or voxels).
    mean, precision
        (parameters, voxels) of the prior in solver coordinates.
    inputs
        (inputs, voxels), in the order of `Study.inputs`.
    """

    data: Tensor
    sigma: Tensor | None
    common: Tensor | None
    emphasis: Tensor | None
    mean: Tensor | None
    precision: Tensor | None
    inputs: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Raw:
        """Apply a function to every tensor."""
        values = [None if value is None else change(value) for value in self.values()]
        return Raw(*values)  # type: ignore[arg-type]

    def values(self) -> list[Tensor | None]:
        """Return what there is, in order."""
        return [getattr(self, f.name) for f in fields(self)]


@dataclass(frozen=True)
class Block:
    """Usable voxels of a block in double precision.

    Attributes
    ----------
    voxels
        Data, weights, noise variance and inputs; data divided by `scale`.
    prior
        Mean and precision of the prior in solver coordinates, each (parameters, usable voxels), or
        None.
    scale
        (usable voxels,) what the data were divided by: the largest magnitude of the voxel, or the
        common scale of all; 1 for models without an amplitude.
    shared
        Noise that measurements share, or None.
    usable
        (voxels of the block,) bool, on the host.
    """

    voxels: Voxels
    prior: tuple[Tensor, Tensor] | None
    shared: SharedFactor | None
    scale: Tensor
    usable: NDArray[np.bool_]

    def tensors(self) -> list[Tensor]:
        """Return all tensors on the device."""
        shared = [] if self.shared is None else [self.shared.sigma, self.shared.group]
        return [*self.voxels.tensors(), *(self.prior or ()), *shared, self.scale]


class Study:
    """Data, mask, noise and voxel inputs of one fit, kept where they are and never copied whole.

    Parameters
    ----------
    model, data, mask, sigma, scale_sigma, scale_group, weights, inputs
        As in `fit`.
    prior
        Numbers or maps, as `make_objective` returns them.

    Attributes
    ----------
    n, n_measurements, grid
        Voxels in the mask, measurements, shape of the maps.
    index
        (n,) flat indices of the voxels of the mask, in the order in which the data lie in memory.
    degrees
        Measurements minus parameters.
    covers_grid
        Whether `index` counts all voxels of the grid from the first to the last.
    on_disk
        Whether reading the data may have to wait for a disk.
    common_scale
        What the data of all voxels are divided by; None: each voxel's by its own scale.
    largest
        A voxel with a larger magnitude is unusable.

    Raises
    ------
    EngineError
        A shape does not match, the data are complex, sigma is not positive, a weight is negative,
        only one of `scale_sigma` and `scale_group` is given or they do not match, the model has
        no such input, or it lacks one that it needs.
    """

    def __init__(
        self,
        model: SignalModel,
        data: ArrayLike | Tensor,
        *,
        mask: ArrayLike | Tensor | None = None,
        sigma: float | ArrayLike | Tensor | None = None,
        scale_sigma: ArrayLike | Tensor | None = None,
        scale_group: ArrayLike | None = None,
        weights: ArrayLike | Tensor | None = None,
        prior: Prior | None = None,
        inputs: Mapping[str, ArrayLike | Tensor] | None = None,
    ) -> None:
        array: Array | Sliceable = data if is_lazy(data) else host(data)  # type: ignore[assignment]
        if np.dtype(array.dtype).kind not in REAL:
            raise EngineError(f"{model.name} fits real data (magnitudes), got {array.dtype}.")
        if len(array.shape) == 0 or array.shape[0] != model.n_measurements:
            raise EngineError(
                f"{model.name} expects {model.n_measurements} measurements on the first axis "
                f"for this acquisition, got data of shape {tuple(array.shape)}."
            )
        self.n_measurements = array.shape[0]
        self.grid = tuple(array.shape[1:])
        self.degrees = self.n_measurements - len(model.parameters)
        self.on_disk = on_disk(data)
        self.common_scale: float | None = None
        self.largest = float("inf")
        self._model = model
        self._axes = memory_order(array)
        self._data = Rows(array, self._axes)
        self._find_voxels(mask)
        self.sigma = None if sigma is None else self._read_sigma(sigma)
        self.shared = self._read_scale(scale_sigma, scale_group)
        self._emphasis = None if weights is None else self._read_weights(weights)
        self._prior = self._read_prior(prior)
        self.inputs: dict[str, Rows] = {}
        if not isinstance(inputs or {}, Mapping):
            raise EngineError(f"inputs is {inputs!r:.60}; give {{name: map}}.")
        for name, value in (inputs or {}).items():
            if name not in model.voxel_inputs:
                raise EngineError(
                    f"{model.name} has no voxel input {name!r}; "
                    f"it has {', '.join(model.voxel_inputs) or 'none'}."
                )
            array = real_numbers(f"Voxel input {name}", value)
            self._require(f"Voxel input {name}", array.shape)
            self.inputs[name] = self._rows(array[None])
        missing = [n for n in model.needed_inputs(model.chosen) if n not in self.inputs]
        if missing:
            raise EngineError(
                f"{model.name} with these options cannot be fitted without the voxel input"
                f"{'s' if len(missing) > 1 else ''} {', '.join(missing)}: give a map of each."
            )

    @property
    def arrays(self) -> int:
        """How many arrays as large as the data a block has: data, noise weights, weights."""
        noisy = isinstance(self.sigma, Rows) and self.sigma.n > 1
        return 1 + noisy + (self._emphasis is not None)

    @property
    def row_bytes(self) -> int:
        """Bytes of a voxel as it is read."""
        rows = [self._data, self.sigma, self._emphasis, *self.inputs.values()]
        rows += [] if self.shared is None else [self.shared[0]]
        bytes_ = sum(r.n * r.itemsize for r in rows if isinstance(r, Rows))
        return bytes_ + (16 * len(self._model.parameters) if self._prior else 0)

    def _find_voxels(self, mask: ArrayLike | Tensor | None) -> None:
        """Number the voxels of the mask."""
        size = int(np.prod(self.grid))
        if mask is None:
            self._place = np.arange(size)
        else:
            chosen = np.nan_to_num(real_numbers("mask", mask, hidden=0)).astype(bool)
            self._require("mask", chosen.shape)
            self._place = np.flatnonzero(chosen.transpose(self._axes))
        self.n = len(self._place)
        self.index = self._place
        in_order = self._axes == tuple(range(len(self.grid)))
        self.covers_grid = in_order and self.n == size
        if not in_order:
            numbers = np.arange(size).reshape(self.grid).transpose(self._axes)
            self.index = numbers.reshape(-1)[self._place]

    def _rows(self, array: Array) -> Rows:
        return Rows(array, self._axes)

    def _require(self, what: str, shape: tuple[int, ...]) -> None:
        if shape != self.grid:
            raise EngineError(f"{what} has shape {shape} but the data have the grid {self.grid}.")

    def _read_sigma(self, sigma: float | ArrayLike | Tensor) -> float | Rows:
        """Return sigma as a number, or as 1 or `n_measurements` rows."""
        array = real_numbers("sigma", sigma, "iuf")
        if array.shape == self.grid and array.ndim:
            return self._rows(array[None])
        if array.shape == (self.n_measurements, *self.grid):
            return self._rows(array)
        if array.ndim:
            raise EngineError(
                f"sigma has shape {array.shape}; it must be a number, {self.grid} or "
                f"{(self.n_measurements, *self.grid)}."
            )
        if not (np.isfinite(array) and array > 0):  # type: ignore[operator]
            raise EngineError(f"sigma is {array}; it must be a positive number.")
        return float(array)

    def _read_weights(self, weights: ArrayLike | Tensor) -> Tensor | Rows:
        """Return weights as a tensor (measurements, 1) or as rows."""
        array = real_numbers("weights", weights, hidden=0)
        if array.shape not in (
            (self.n_measurements,),
            self.grid,
            (self.n_measurements, *self.grid),
        ):
            raise EngineError(
                f"weights have shape {array.shape}; they must be {(self.n_measurements,)}, "
                f"{self.grid} or {(self.n_measurements, *self.grid)}."
            )
        for row in np.atleast_1d(array):  # by rows: an array as large as the data is not copied
            if not (np.isfinite(row) & (row >= 0)).all():
                raise EngineError("weights hold a value that is negative or not finite.")
        if array.shape == (self.n_measurements,):
            return torch.tensor(array.astype(np.float64)[:, None])
        if array.shape == self.grid:
            array = np.broadcast_to(array, (self.n_measurements, *self.grid))
        return self._rows(array)

    def _read_prior(self, prior: Prior | None) -> dict[str, tuple[float | Rows, float | Rows]]:
        """Return mean and standard deviation by parameter, numbers or maps."""

        def read(array: NDArray[np.float64]) -> float | Rows:
            return self._rows(array[None]) if array.ndim else float(array)

        if prior is None:
            return {}
        return {name: (read(mean), read(prior.sd[name])) for name, mean in prior.mean.items()}

    def _read_scale(
        self, sigma: ArrayLike | Tensor | None, group: ArrayLike | None
    ) -> tuple[Rows, NDArray[np.intp]] | None:
        """Return relative deviations, a row for each group, and the group of each measurement."""
        if sigma is None and group is None:
            return None
        if sigma is None or group is None:
            raise EngineError("scale_sigma and scale_group are needed together; one is missing.")
        array, number = real_numbers("scale_sigma", sigma), np.asarray(group)
        if array.shape[1:] != self.grid or array.ndim == 0 or len(array) == 0:
            raise EngineError(
                f"scale_sigma has shape {array.shape}; it must be (groups, *grid) with the grid "
                f"{self.grid}."
            )
        if number.shape != (self.n_measurements,) or number.dtype.kind not in "iu":
            raise EngineError(
                f"scale_group must be {self.n_measurements} whole numbers, one for each "
                f"measurement, got {number.dtype} of shape {number.shape}."
            )
        if number.min() < 0 or number.max() >= len(array):
            raise EngineError(
                f"scale_group holds {number.min()} to {number.max()}, but scale_sigma has the "
                f"groups 0 to {len(array) - 1}."
            )
        return self._rows(array), number.astype(np.intp)

    def use_common_scale(self) -> None:
        """Divide all voxels by one number, the median over voxels of the largest magnitude.

        For spatial terms: maps of an amplitude in units of each voxel would show edges that are
        none. Without an amplitude nothing is divided. Voxels whose squares would then be infinite,
        such as those that a file marks as empty by a huge number, have no objective.
        """
        largest = [np.zeros(0)]
        step = -(-_AT_ONCE // self.n_measurements)
        for start in range(0, self.n, step):
            data = self._data.read(self._columns(start, min(start + step, self.n)))
            largest.append(np.abs(data.astype(np.float64)).max(0))
        values = np.concatenate(largest)
        values = values[np.isfinite(values) & (values > 0)]
        typical = float(np.median(values)) if len(values) else 1.0
        self.largest = _TOO_BRIGHT * typical
        if any(p.amplitude for p in self._model.parameters):
            self.common_scale = typical

    def block(self, start: int, stop: int, device: torch.device) -> Block:
        """Return the usable voxels from `start` to `stop` of the mask, normalised.

        The rule for unusable voxels is in the notes of `fit`.
        """
        return self.prepare(self.read(start, stop).map(lambda t: t.to(device)))

    def read(self, start: int, stop: int) -> Raw:
        """Return voxels of the mask on the host, as they came."""
        columns = self._columns(start, stop)

        def rows(values: Rows | None) -> Tensor | None:
            return None if values is None else tensor(values.read(columns))

        sigma = self.sigma
        if isinstance(sigma, float):
            noise: Tensor | None = torch.tensor([[sigma]], dtype=torch.float64)
        else:
            noise = rows(sigma)
        mean, precision = self._read_block_prior(columns, stop - start)
        inputs = [tensor(values.read(columns)).double() for values in self.inputs.values()]
        emphasis = self._emphasis
        return Raw(
            data=tensor(self._data.read(columns)),
            sigma=noise,
            common=None if self.shared is None else rows(self.shared[0]),
            emphasis=emphasis if isinstance(emphasis, Tensor | None) else rows(emphasis),
            mean=mean,
            precision=precision,
            inputs=torch.cat(inputs) if inputs else None,
        )

    def prepare(self, raw: Raw) -> Block:
        """Judge and normalise voxels, in double precision on the device where they are.

        Sums run row by row: how a library splits a sum depends on the number of voxels.
        """
        model = self._model
        data, sigma, common, emphasis, mean, precision, inputs = (
            None if value is None else value.double() for value in raw.values()
        )
        assert data is not None
        # Row by row: a mask, or a magnitude, of the whole block would take as much as the data.
        largest = functools.reduce(torch.maximum, (row.abs() for row in data))  # NaN if one is
        usable = largest.isfinite() & (largest > 0) & (largest <= self.largest)
        if not model.signed:
            usable &= data[0] > 0
        if inputs is not None:
            for name, row in zip(self.inputs, inputs, strict=True):
                usable &= row.isfinite()
                if name in model.input_limits:
                    low, high = model.input_limits[name]
                    usable &= (row >= low) & (row <= high)
                else:
                    usable &= row > 0
        if sigma is not None:
            usable &= (sigma > 0).all(0) & sigma.isfinite().any(0)
        if common is not None:
            usable &= (common.isfinite() & (common >= 0)).all(0)
        if emphasis is not None:
            emphasis = torch.where(emphasis < _LEAST_WEIGHT, 0.0, emphasis)
            usable &= (emphasis != 0).any(0)
        if mean is None and (sigma is not None or emphasis is not None):
            told = torch.ones_like(data)
            for factor in (None if sigma is None else sigma.isfinite(), emphasis):
                if factor is not None:
                    told = told * (factor != 0)
            usable &= told.sum(0) >= min(len(model.parameters), self.n_measurements)
        n = int(usable.sum())
        pick = _Picker(usable, n)
        data = pick(data)
        scale = torch.ones_like(data[0])
        if any(p.amplitude for p in model.parameters):
            if self.common_scale is None:
                scale = pick(largest[None])[0]
            else:
                scale = scale * self.common_scale
        weight, variance = (None, None) if sigma is None else _weigh(pick(sigma) / scale)
        given = {} if inputs is None else dict(zip(self.inputs, pick(inputs), strict=True))
        voxels = Voxels(
            data=data.div_(scale),
            weight=weight,
            noise_variance=variance,
            emphasis=None if emphasis is None else pick(emphasis),
            inputs=given,
        )
        shared = None
        if self.shared is not None and common is not None:
            group = torch.as_tensor(self.shared[1], device=data.device)
            shared = SharedFactor(pick(common), group)
        prior = None
        if mean is not None and precision is not None:
            prior = (pick(mean), pick(precision))
        return Block(voxels, prior, shared, scale, usable.cpu().numpy())

    def _columns(self, start: int, stop: int) -> Columns:
        """Return where voxels are: a slice where the mask has no gaps."""
        place = self._place[start:stop]
        if len(place) and place[-1] - place[0] == len(place) - 1:
            return slice(int(place[0]), int(place[-1]) + 1)
        return place

    def _read_block_prior(
        self, columns: Columns, count: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return mean and precision of the prior of some voxels, (parameters, voxels) each."""
        if not self._prior:
            return None, None
        mean, precision = np.zeros((2, len(self._model.parameters), count))
        for i, name in enumerate(self._model.parameter_names):
            if name in self._prior:
                centre, sd = (
                    value.read(columns)[0] if isinstance(value, Rows) else np.full(count, value)
                    for value in self._prior[name]
                )
                there = np.isfinite(centre) & np.isfinite(sd) & (sd > 0)
                mean[i], precision[i] = centre, np.where(there, sd, np.inf) ** -2.0
                mean[i][~there] = 0
        return torch.from_numpy(mean), torch.from_numpy(precision)


class _Picker:
    """Selects the usable columns, without a copy where all are."""

    def __init__(self, usable: Tensor, n: int) -> None:
        self._n = n
        self._index = None if n == len(usable) else usable.nonzero()[:, 0]

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.shape[1] != 1 and self._index is not None:
            return rows[:, self._index].contiguous()
        return rows.expand(-1, self._n).contiguous()


def _weigh(sigma: Tensor) -> tuple[Tensor | None, Tensor]:
    """Split sigma (1 or measurements, voxels) into weights of mean 1 and the variance at weight 1.

    Weights of mean 1 keep the cost in the units of the normalised data, whatever sigma is.
    """
    square = sigma * sigma
    if len(sigma) == 1:
        return None, square[0]
    inverse = square.reciprocal_()
    variance = len(sigma) / functools.reduce(torch.add, inverse.unbind(0))
    return inverse.mul_(variance), variance
