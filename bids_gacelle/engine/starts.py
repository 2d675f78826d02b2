"""Where a fit begins: the model's own guess, and the best entries of a small shared dictionary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bids_gacelle.engine.kernels import Kernel, Voxels

# Voxels are scored in chunks of one fixed size: a matrix product may round differently when its
# shape changes, and a start must not depend on the size of a block.
CHUNK = 2048


@dataclass(frozen=True)
class Dictionary:
    """Signals at Sobol points of the start boxes, split into regions of parameter space.

    Attributes
    ----------
    position
        (parameters, entries) in solver coordinates; an amplitude is 1.
    signal
        (measurements, entries).
    regions
        Indices of the entries of each region.
    """

    position: Tensor
    signal: Tensor
    regions: tuple[Tensor, ...]


def build_dictionary(kernel: Kernel, entries: int, regions: int, seed: int) -> Dictionary:
    """Return a dictionary of `entries` points split into `regions` regions.

    Regions are the cells of points chosen far from each other, beginning at the centre of the box:
    the best entry of each region gives starts that are good and far apart.
    """
    fitted = [i for i in range(len(kernel.box)) if i != kernel.amplitude]
    engine = torch.quasirandom.SobolEngine(len(fitted), scramble=True, seed=seed)
    unit = engine.draw(entries, dtype=torch.float64).T
    position = torch.ones(len(kernel.box), entries, dtype=torch.float64)
    for row, i in enumerate(fitted):
        low, high = kernel.box[i]
        position[i] = low + (high - low) * unit[row]
    position = position.to(kernel.device, kernel.dtype)
    inputs = {
        name: torch.full_like(position[0], value)
        for name, value in kernel.model.input_defaults.items()
    }
    centres = [((unit - 0.5) ** 2).sum(0).argmin()]
    nearest = torch.full((entries,), torch.inf, dtype=torch.float64)
    cell = torch.zeros(entries, dtype=torch.long)
    for region in range(regions):
        distance = ((unit - unit[:, centres[region], None]) ** 2).sum(0)
        cell = torch.where(distance < nearest, region, cell)
        nearest = torch.minimum(nearest, distance)
        centres.append(nearest.argmax())
    cells = tuple((cell == r).nonzero()[:, 0].to(kernel.device) for r in range(regions))
    return Dictionary(position, kernel.signal(position, inputs), cells)


def find_starts(kernel: Kernel, voxels: Voxels, dictionary: Dictionary) -> Tensor:
    """Return starts (starts, parameters, voxels) in solver coordinates.

    One start comes from each region of the dictionary; where the model has a guess, it takes the
    place of the first.
    """
    n = voxels.data.shape[-1]
    chunks = []
    for begin in range(0, n, CHUNK):
        index = torch.arange(begin, begin + CHUNK, device=kernel.device).clamp_max(n - 1)
        chunks.append(_chunk_starts(kernel, voxels.take(index), dictionary))
    return torch.cat(chunks, -1)[..., :n]


def _chunk_starts(kernel: Kernel, voxels: Voxels, dictionary: Dictionary) -> Tensor:
    guess = _guess(kernel, voxels)
    if guess is not None and len(dictionary.regions) == 1 and bool(guess.isfinite().all()):
        starts = [guess]
    else:
        score = _misfit(kernel, voxels, dictionary)
        starts = [
            dictionary.position[:, region[score[region].argmin(0)]]
            for region in dictionary.regions
        ]
        if guess is not None:
            fallback = dictionary.position[:, score.argmin(0)]
            starts[0] = torch.where(guess.isfinite(), guess, fallback)
    bounded = [torch.maximum(torch.minimum(s, kernel.upper), kernel.lower) for s in starts]
    return torch.stack([_project_amplitude(kernel, s, voxels) for s in bounded])


def _guess(kernel: Kernel, voxels: Voxels) -> Tensor | None:
    """Return the model's guess in solver coordinates, an amplitude as 1; None if it has none."""
    guess = kernel.model.guess(voxels.data, voxels.inputs)
    if guess is None:
        return None
    if kernel.amplitude is not None:
        amplitude = kernel.model.parameters[kernel.amplitude].name
        guess = {**guess, amplitude: torch.ones_like(voxels.data[0])}
    return kernel.coordinates(guess)


def _misfit(kernel: Kernel, voxels: Voxels, dictionary: Dictionary) -> Tensor:
    """Return sums of squares up to a constant of each voxel, (entries, voxels)."""
    signal = dictionary.signal.T
    weight = voxels.loss_weight()
    if weight is None:
        product = signal @ voxels.data
        power = (signal * signal).sum(1)[:, None]
    else:
        product = signal @ (voxels.data * weight)
        power = (signal * signal) @ weight
    if kernel.amplitude is None:
        return power - 2 * product
    return -(product.clamp_min(0) ** 2) / power  # at the best amplitude of each entry


def _project_amplitude(kernel: Kernel, position: Tensor, voxels: Voxels) -> Tensor:
    """Set the amplitude to its least-squares value given the other parameters."""
    if kernel.amplitude is None:
        return position
    position = position.clone()
    position[kernel.amplitude] = 1
    signal = kernel.signal(position, voxels.inputs)
    weight = voxels.loss_weight()
    weighted = signal if weight is None else signal * weight
    best = (weighted * voxels.data).sum(0) / (weighted * signal).sum(0)
    position[kernel.amplitude] = best.nan_to_num(nan=1.0, posinf=1.0).clamp_min(1e-3)
    return position
