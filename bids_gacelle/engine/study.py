"""The caller's arrays: checked once, then handed out block by block in normalised form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import SharedFactor, Voxels
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.objective import Prior

Array = NDArray[np.generic]

# Voxels looked at together where a copy of all data would be too large.
_AT_ONCE = 1 << 16


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
        (usable voxels,) what the data were divided by; 1 for models without an amplitude.
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


class Study:
    """Data, mask, noise and voxel inputs of one fit, kept on the host as they came.

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
        (n,) flat indices of the voxels of the mask.
    degrees
        Measurements minus parameters.

    Raises
    ------
    EngineError
        A shape does not match, the data are complex, sigma is not positive, a weight is negative,
        only one of `scale_sigma` and `scale_group` is given or they do not match, or the model
        has no such input.
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
        array = _host(data)
        if np.iscomplexobj(array):
            raise EngineError(f"{model.name} fits real data (magnitudes), got {array.dtype}.")
        if array.ndim == 0 or array.shape[0] != model.n_measurements:
            raise EngineError(
                f"{model.name} expects {model.n_measurements} measurements on the first axis "
                f"for this acquisition, got data of shape {array.shape}."
            )
        self.n_measurements = array.shape[0]
        self.grid = array.shape[1:]
        self.degrees = self.n_measurements - len(model.parameters)
        self._data = array.reshape(self.n_measurements, -1)
        chosen = np.ones(self.grid, bool) if mask is None else _host(mask).astype(bool)
        self._require("mask", chosen.shape)
        self.index = np.flatnonzero(chosen)
        self.n = len(self.index)
        self.sigma = None if sigma is None else self._read_sigma(sigma)
        self.shared = self._read_scale(scale_sigma, scale_group)
        self._emphasis = None if weights is None else self._read_weights(weights)
        self._prior = prior
        self._names = model.parameter_names
        self.inputs: dict[str, Array] = {}
        for name, value in (inputs or {}).items():
            if name not in model.voxel_inputs:
                raise EngineError(
                    f"{model.name} has no voxel input {name!r}; "
                    f"it has {', '.join(model.voxel_inputs) or 'none'}."
                )
            self._require(f"Voxel input {name}", _host(value).shape)
            self.inputs[name] = _host(value).reshape(-1)

    def _require(self, what: str, shape: tuple[int, ...]) -> None:
        if shape != self.grid:
            raise EngineError(f"{what} has shape {shape} but the data have the grid {self.grid}.")

    def _read_sigma(self, sigma: float | ArrayLike | Tensor) -> Array:
        """Return sigma as a 0-d, (voxels,) or (measurements, voxels) array."""
        array = _host(sigma)
        if array.shape == self.grid and array.ndim:
            return array.reshape(-1)
        if array.shape == (self.n_measurements, *self.grid):
            return array.reshape(self.n_measurements, -1)
        if array.ndim:
            raise EngineError(
                f"sigma has shape {array.shape}; it must be a number, {self.grid} or "
                f"{(self.n_measurements, *self.grid)}."
            )
        if not (np.isfinite(array) and array > 0):  # type: ignore[operator]
            raise EngineError(f"sigma is {array}; it must be a positive number.")
        return array

    def _read_weights(self, weights: ArrayLike | Tensor) -> Array:
        """Return weights as (measurements, 1 or voxels)."""
        array = _host(weights)
        if array.shape == (self.n_measurements,):
            array = array[:, None]
        elif array.shape == self.grid:
            array = np.broadcast_to(array.reshape(1, -1), self._data.shape)
        elif array.shape == (self.n_measurements, *self.grid):
            array = array.reshape(self.n_measurements, -1)
        else:
            raise EngineError(
                f"weights have shape {array.shape}; they must be {(self.n_measurements,)}, "
                f"{self.grid} or {(self.n_measurements, *self.grid)}."
            )
        numbers = array.astype(np.float64)
        if not (np.isfinite(numbers) & (numbers >= 0)).all():
            raise EngineError("weights hold a value that is negative or not finite.")
        return numbers

    def _read_scale(
        self, sigma: ArrayLike | Tensor | None, group: ArrayLike | None
    ) -> tuple[Array, NDArray[np.intp]] | None:
        """Return relative deviations (groups, voxels) and the group of each measurement."""
        if sigma is None and group is None:
            return None
        if sigma is None or group is None:
            raise EngineError("scale_sigma and scale_group are needed together; one is missing.")
        array, number = _host(sigma), np.asarray(group)
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
        return array.reshape(len(array), -1), number.astype(np.intp)

    def common_scale(self) -> float:
        """Return the median over voxels of the largest magnitude, to divide all data by."""
        largest = [
            np.abs(self._data[:, index]).max(0)
            for index in np.array_split(self.index, self.n // _AT_ONCE + 1)
        ]
        values = np.concatenate(largest)
        values = values[np.isfinite(values) & (values > 0)]
        return float(np.median(values)) if len(values) else 1.0

    def block(
        self,
        start: int,
        stop: int,
        device: torch.device,
        model: SignalModel,
        common_scale: float | None = None,
    ) -> Block:
        """Return the usable voxels from `start` to `stop` of the mask, normalised.

        The rule for unusable voxels is in the notes of `fit`. Data of models with an amplitude
        are divided by the largest magnitude of their voxel or, if given, by the common scale.
        """
        index = self.index[start:stop]
        data = self._data[:, index].astype(np.float64)
        usable = np.isfinite(data).all(0) & (data != 0).any(0)
        if not model.signed:
            usable &= data[0] > 0
        inputs = {name: value[index].astype(np.float64) for name, value in self.inputs.items()}
        for value in inputs.values():
            usable &= np.isfinite(value) & (value > 0)
        sigma = self._block_sigma(index)
        if sigma is not None:
            rows = np.atleast_2d(sigma)
            usable &= (rows > 0).all(0) & np.isfinite(rows).any(0)
        common = None if self.shared is None else self.shared[0][:, index].astype(np.float64)
        if common is not None:
            usable &= (np.isfinite(common) & (common >= 0)).all(0)
        emphasis = self._block_emphasis(index)
        if emphasis is not None:
            usable &= emphasis.any(0)
        data = data[:, usable]
        has_amplitude = any(p.amplitude for p in model.parameters)
        scale = np.abs(data).max(0) if has_amplitude else np.ones(data.shape[1])
        if has_amplitude and common_scale is not None:
            scale = np.full(data.shape[1], common_scale)
        weight, variance = None, None
        if sigma is not None:
            weight, variance = _weigh(sigma[..., usable] / scale)

        def tensor(array: Array) -> Tensor:
            return torch.as_tensor(array, dtype=torch.float64, device=device)

        voxels = Voxels(
            data=tensor(data / scale),
            weight=None if weight is None else tensor(weight),
            noise_variance=None if variance is None else tensor(variance),
            emphasis=None if emphasis is None else tensor(emphasis[:, usable]),
            inputs={name: tensor(value[usable]) for name, value in inputs.items()},
        )
        prior = self._block_prior(index[usable])
        shared = None
        if self.shared is not None and common is not None:
            group = torch.as_tensor(self.shared[1], device=device)
            shared = SharedFactor(tensor(common[:, usable]), group)
        return Block(
            voxels,
            None if prior is None else (tensor(prior[0]), tensor(prior[1])),
            shared,
            tensor(scale),
            usable,
        )

    def _block_emphasis(self, index: NDArray[np.intp]) -> NDArray[np.float64] | None:
        """Return the weights of some voxels, (measurements, voxels)."""
        if self._emphasis is None:
            return None
        columns = index if self._emphasis.shape[1] > 1 else np.zeros_like(index)
        return self._emphasis[:, columns].astype(np.float64)

    def _block_prior(
        self, index: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Return mean and precision of the prior of some voxels, (parameters, voxels) each."""
        if self._prior is None:
            return None
        mean, precision = np.zeros((2, len(self._names), len(index)))
        for i, name in enumerate(self._names):
            if name in self._prior.mean:
                centre, sd = (
                    a.reshape(-1)[index] if a.ndim else np.full(len(index), a)
                    for a in (self._prior.mean[name], self._prior.sd[name])
                )
                there = np.isfinite(centre) & np.isfinite(sd) & (sd > 0)
                mean[i], precision[i] = centre, np.where(there, sd, np.inf) ** -2.0
                mean[i][~there] = 0
        return mean, precision

    def _block_sigma(self, index: NDArray[np.intp]) -> NDArray[np.float64] | None:
        """Return sigma of some voxels, (voxels,) or (measurements, voxels)."""
        if self.sigma is None:
            return None
        if self.sigma.ndim == 0:
            return np.full(len(index), self.sigma, dtype=np.float64)
        return self.sigma[..., index].astype(np.float64)


def _weigh(
    sigma: NDArray[np.float64],
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64]]:
    """Split sigma into weights of mean 1 and the variance at weight 1.

    Weights of mean 1 keep the cost in the units of the normalised data, whatever sigma is.
    """
    if sigma.ndim == 1:
        return None, sigma**2
    inverse = sigma**-2.0
    variance = 1 / inverse.mean(0)
    return inverse * variance, variance


def _host(values: ArrayLike | Tensor) -> Array:
    """Return a numpy view (or copy, from a GPU) of an array or tensor."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values)
