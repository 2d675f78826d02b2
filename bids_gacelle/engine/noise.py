"""What an objective needs besides the data: the noise level, priors in its units, Rician terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bids_gacelle.engine.arrays import real_numbers
from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import Kernel, Voxels, span
from bids_gacelle.engine.objective import L1_CORNERS, Objective
from bids_gacelle.engine.physics import rician
from bids_gacelle.engine.starts import chunk_size
from bids_gacelle.engine.study import Block

Solve = Callable[[Objective, Voxels], Tensor]
"""From an objective and voxels to the position of its optimum, in double precision."""

# From the median absolute deviation to the standard deviation of normal noise.
_MAD = 1.4826


def complete(kernel: Kernel, block: Block, solve: Solve) -> Voxels:
    """Return the voxels of a block with what the objective of a fit needs.

    Parameters
    ----------
    kernel
        Model and objective, in any precision.
    block
        Data as they came.
    solve
        Used for the noise level where none was given.
    """
    voxels = block.voxels
    if kernel.objective.needs_noise and voxels.noise_variance is None:
        variance = residual_variance(kernel, voxels, solve)
        voxels = voxels._replace(noise_variance=variance)
    if block.prior is not None:
        assert voxels.noise_variance is not None
        mean, precision = block.prior
        voxels = voxels._replace(target=mean, stiffness=precision * voxels.noise_variance)
    if kernel.objective.noise == "rician":
        voxels = _with_magnitudes(kernel, voxels)
    return voxels


def _with_magnitudes(kernel: Kernel, voxels: Voxels) -> Voxels:
    """Add the noise of single channels, and the weights of averages of magnitudes.

    The variance of a measurement is that of its average far above the noise floor; near the floor
    magnitudes vary less.
    """
    if kernel.averages is None:
        return voxels._replace(channel_variance=voxels.variance())
    averages = kernel.averages.double()
    channel = voxels.variance() * averages.clamp_min(1.0)
    voxels = voxels._replace(channel_variance=channel)
    parts = []
    for part in _chunks(voxels):
        variance = part.variance() * averages.clamp_min(1.0)
        varies = rician.spread(rician.invert_mean(part.data, variance), variance) / variance
        varies = torch.where(averages > 0, varies, 1.0)
        parts.append(1 / varies if part.weight is None else part.weight / varies)
    return voxels._replace(weight=torch.cat(parts, -1))


def residual_variance(kernel: Kernel, voxels: Voxels, solve: Solve) -> Tensor:
    """Return the noise variance (voxels,) of measurements of weight 1 from a plain fit.

    The mean squared residual of least squares. With a loss that is there for outliers, the median
    absolute residual of an L1 fit, which outliers move little.
    """
    mean = from_residuals(kernel, voxels, solve(Objective(), voxels))
    if kernel.objective.loss == "l2":
        return mean
    known = voxels._replace(noise_variance=mean.clamp_min(torch.finfo(mean.dtype).tiny))
    position = solve(replace(Objective(loss="l1"), corner=L1_CORNERS[-1]), known)
    return from_residuals(kernel, voxels, position, median=True)


def from_residuals(
    kernel: Kernel, voxels: Voxels, position: Tensor, *, median: bool = False
) -> Tensor:
    """Return the noise variance (voxels,) of measurements of weight 1 at an estimate.

    Parameters
    ----------
    kernel, voxels
        As in `complete`.
    position
        The estimate, in double precision.
    median
        From the median absolute residual instead of the sum of squares.
    """
    exact = Kernel(kernel.model, Objective(), torch.float64, kernel.device)
    n, size = voxels.data.shape[-1], chunk_size(kernel.device)
    out = []
    for begin in range(0, n, size):
        part = voxels.span(begin, size)
        residual = exact.signal(span(position, begin, size), part.inputs) - part.data
        if part.weight is not None:
            residual = residual * part.weight.sqrt()
        counted = part.counted()
        m = counted.sum(0)
        degrees = (m - len(position)).clamp_min(1)
        if median:
            sizes = torch.where(counted > 0, residual.abs(), torch.nan)
            scale = _MAD * sizes.nanquantile(0.5, dim=0)
            # Residuals that are all 0 would leave robust losses without a unit.
            out.append((scale**2 * (m / degrees)).clamp_min(1e-12))
        else:
            out.append((counted * residual**2).sum(0) / degrees)
    return torch.cat(out)[:n]


def _chunks(voxels: Voxels) -> Iterator[Voxels]:
    """Yield pieces whose intermediate values take little memory."""
    size = chunk_size(voxels.data.device)
    for begin in range(0, voxels.data.shape[-1], size):
        yield voxels.take(slice(begin, begin + size))


def sigma_from_repeats(data: ArrayLike | Tensor, group: ArrayLike) -> NDArray[np.float64]:
    """Return the standard deviation of one measurement from measurements made more than once.

    Parameters
    ----------
    data
        (measurements, *grid).
    group
        (measurements,) measurements of one number are repeats of each other.

    Returns
    -------
    (*grid) root of the pooled variance of all groups, for `fit(sigma=...)`; NaN where a repeated
    measurement is not finite.

    Raises
    ------
    EngineError
        The lengths differ, the data are no real numbers, or nothing was repeated.
    """
    values = real_numbers("data", data).astype(np.float64)
    numbers = np.asarray(group)
    if values.ndim == 0 or numbers.shape != values.shape[:1]:
        raise EngineError(
            f"group has shape {numbers.shape} but there are {len(np.atleast_1d(values))} "
            "measurements."
        )
    squares, degrees = np.zeros(values.shape[1:]), 0
    for number in np.unique(numbers):
        repeats = values[numbers == number]
        squares += ((repeats - repeats.mean(0)) ** 2).sum(0)
        degrees += len(repeats) - 1
    if degrees == 0:
        raise EngineError("No measurement was repeated: there is nothing to tell the noise from.")
    return np.sqrt(squares / degrees)
