"""Where a fit begins: the model's own guess, and the best entries of a small shared dictionary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import Kernel, Voxels, packed, span
from bids_gacelle.engine.replay import Replay, on_gpu
from bids_gacelle.engine.simplex import MOST_SIGNALS, Mixing, best_weights, lowest_cost

# Voxels are worked on in chunks of one fixed size: a matrix product may round differently when its
# shape changes, and a start must not depend on the size of a block.
_CHUNK, _CHUNK_CUDA = 1 << 11, 1 << 15
# Entries are scored by one matrix product, unless signals are mixed: the many temporaries of a
# closed form should stay in cache.
_CHUNK_SCORED = 1 << 13
TILE = 128
"""Entries of the dictionary scored at once."""

# More entries than these for each parameter find no more optima. Where linear ones are projected,
# every entry stands for many.
_ENTRIES_PER_PARAMETER = 128
_ENTRIES_PER_PARAMETER_PROJECTED = 64
# So few parameters can be searched for all over their bounds, where noisy optima often lie.
_FEW = 2


Choose = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class Dictionary:
    """Signals at Sobol points of the start boxes, split into regions of parameter space.

    Attributes
    ----------
    position
        (parameters, entries) in solver coordinates; an amplitude is 1.
    signal
        (entries, measurements); for a model with linear parameters the signals it mixes,
        (entries, signals, measurements).
    regions
        Indices of the entries of each region.
    """

    position: Tensor
    signal: Tensor
    regions: tuple[Tensor, ...]


def build_dictionary(kernel: Kernel, entries: int, regions: int, seed: int) -> Dictionary:
    """Return a dictionary of `entries` points split into `regions` regions.

    The best entry of each region gives starts that are good and far apart. Linear parameters are
    not varied, every entry standing for all their values; where that leaves one or two others,
    the dictionary spans their bounds instead of their start boxes. The model keeps it for other
    blocks and fits.
    """
    asked = (entries, regions, seed, kernel.model.parameters, kernel.dtype, kernel.device)
    kept = kernel.model.kept
    key = ("dictionary", *asked)
    if key not in kept:
        kept[key] = _build_dictionary(kernel, entries, regions, seed)
    return kept[key]


def _build_dictionary(kernel: Kernel, entries: int, regions: int, seed: int) -> Dictionary:
    names = kernel.model.parameter_names
    linear = {names.index(name) for name in kernel.model.linear}
    fitted = [i for i in range(len(names)) if i != kernel.amplitude and i not in linear]
    bounded = bool((kernel.lower[fitted].isfinite() & kernel.upper[fitted].isfinite()).all())
    few = bool(linear) and len(fitted) <= _FEW and bounded
    each = _ENTRIES_PER_PARAMETER_PROJECTED if linear else _ENTRIES_PER_PARAMETER
    entries = max(regions, min(entries, each * len(fitted)))
    engine = torch.quasirandom.SobolEngine(len(fitted), scramble=True, seed=seed)
    unit = engine.draw(entries, dtype=torch.float64).T
    position = torch.ones(len(kernel.box), entries, dtype=torch.float64)
    for row, i in enumerate(fitted):
        low, high = (float(kernel.lower[i]), float(kernel.upper[i])) if few else kernel.search[i]
        position[i] = low + (high - low) * unit[row]
    position = position.to(kernel.device, kernel.dtype)
    inputs = {
        name: torch.full_like(position[0], value)
        for name, value in kernel.model.input_defaults.items()
    }
    split = _slabs(unit, regions) if few else _cells(unit, regions)
    cells = tuple(cell.to(kernel.device) for cell in split)
    if not linear:
        return Dictionary(position, kernel.signal(position, inputs).T.contiguous(), cells)
    params = kernel.parameters(position)
    mixture = kernel.model.mixture({names[i]: params[names[i]] for i in fitted}, inputs)
    if kernel.amplitude is not None or not 2 <= len(mixture) <= MOST_SIGNALS:
        raise EngineError(
            f"{kernel.model.name} mixes {len(mixture)} signals; a model with linear parameters "
            f"mixes 2 to {MOST_SIGNALS}, and has no amplitude."
        )
    return Dictionary(position, mixture.permute(2, 0, 1).contiguous(), cells)


def _cells(unit: Tensor, regions: int) -> list[Tensor]:
    """Return the cells of points chosen far from each other, beginning at the centre.

    Parameters
    ----------
    unit
        (parameters, entries) in the unit cube.
    regions
        How many.

    Returns
    -------
    Indices of the entries of each.
    """
    centres = [((unit - 0.5) ** 2).sum(0).argmin()]
    nearest = torch.full_like(unit[0], torch.inf)
    cell = torch.zeros_like(unit[0], dtype=torch.long)
    for region in range(regions):
        distance = ((unit - unit[:, centres[region], None]) ** 2).sum(0)
        cell = torch.where(distance < nearest, region, cell)
        nearest = torch.minimum(nearest, distance)
        centres.append(nearest.argmax())
    return [(cell == r).nonzero()[:, 0] for r in range(regions)]


def _slabs(unit: Tensor, regions: int) -> list[Tensor]:
    """Return equal shares of the entries along the first parameter.

    In few dimensions cells around far points are corners, and the draw decides which.
    """
    return list(unit[0].argsort().tensor_split(regions))


def chunk_size(device: torch.device) -> int:
    """Return how many voxels to compute at once outside of a solver's lanes."""
    return _CHUNK if device.type == "cpu" else _CHUNK_CUDA


def starts_at_once(kernel: Kernel) -> int:
    """Return for how many voxels at once starts are looked for."""
    if kernel.device.type == "cpu" and not kernel.model.linear:
        return _CHUNK_SCORED
    return chunk_size(kernel.device)


def find_starts(
    kernel: Kernel, voxels: Voxels, dictionary: Dictionary, *, compiled: bool = False
) -> Tensor:
    """Return starts (starts, parameters, voxels) in solver coordinates.

    One start comes from each region of the dictionary; where the model has a guess, it takes the
    place of the first.
    """
    choose = _best_mixture if kernel.model.linear else _best_entry
    if compiled:
        choose = kernel.compile("starts", choose)

    def starts_of(part: Voxels) -> Tensor:
        return _chunk_starts(kernel, part, dictionary, choose)

    n, size = voxels.data.shape[-1], starts_at_once(kernel)
    parts = (voxels.span(begin, size) for begin in range(0, n, size))
    if on_gpu(voxels.data) and n > size and _is_repeatable(kernel, voxels, compiled):
        found = _replayed(kernel, starts_of, parts)
    else:
        found = [starts_of(part) for part in parts]
    return torch.cat(found, -1)[..., :n]


class _Chunk(NamedTuple):
    """Voxels, and the starts found for them."""

    voxels: Voxels
    starts: Tensor

    def tensors(self) -> list[Tensor]:
        return [*self.voxels.tensors(), self.starts]


def _is_repeatable(kernel: Kernel, voxels: Voxels, compiled: bool) -> bool:
    """Tell whether the search may be recorded: whether a guess is good is looked at.

    What is compiled is not rehearsed, and how a model takes apart its mixtures is not compiled.
    """
    guessed = _guess(kernel, voxels.take(slice(0, 1))) is not None
    return not guessed and not (compiled and kernel.model.linear)


def _replayed(
    kernel: Kernel, starts_of: Callable[[Voxels], Tensor], parts: Iterable[Voxels]
) -> list[Tensor]:
    """Return the starts of parts of one size, found in the same tensors over and over."""

    def search(chunk: _Chunk) -> _Chunk:
        return chunk._replace(starts=starts_of(chunk.voxels))

    replay, parts = Replay(search, "starts", kernel), iter(parts)
    first = next(parts)
    found = [starts_of(first)]
    chunk = _Chunk(first.map(Tensor.clone), found[0].clone())
    for part in parts:
        for old, new in zip(chunk.voxels.tensors(), part.tensors(), strict=True):
            old.copy_(new)
        chunk = replay(chunk)
        found.append(chunk.starts.clone())
    return found


def _chunk_starts(
    kernel: Kernel, voxels: Voxels, dictionary: Dictionary, choose: Choose
) -> Tensor:
    guess = _guess(kernel, voxels)
    if guess is not None and len(dictionary.regions) == 1 and bool(guess.isfinite().all()):
        starts = [guess]
    else:
        starts, costs = _best_of_regions(kernel, voxels, dictionary, choose)
        if guess is not None:
            best = torch.stack(costs).argmin(0)
            fallback = torch.stack(starts)[best, :, torch.arange(len(best), device=best.device)].T
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


def _best_of_regions(
    kernel: Kernel, voxels: Voxels, dictionary: Dictionary, choose: Choose
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the best entry (parameters, voxels) of each region, and its misfit (voxels,)."""
    # All tiles of one size, to which a compiled function is bound.
    size = min(TILE, max(len(region) for region in dictionary.regions))
    starts, costs = [], []
    for region in dictionary.regions:
        lowest = torch.full_like(voxels.data[0], torch.inf)
        entry = torch.zeros_like(lowest, dtype=torch.long)
        weights: Tensor | None = None
        for begin in range(0, len(region), size):
            tile = span(region, begin, size)
            cost, best, mixed = choose(dictionary.signal[tile], voxels, kernel.amplitude)
            better = cost < lowest
            entry = torch.where(better, tile[best], entry)
            if mixed is not None:
                weights = mixed if weights is None else torch.where(better, mixed, weights)
            lowest = torch.where(better, cost, lowest)
        position = dictionary.position[:, entry]
        if weights is not None:
            mixture = kernel.model.unmix(weights)
            position = kernel.coordinates(kernel.parameters(position) | mixture)
        starts.append(position)
        costs.append(lowest)
    return starts, costs


def _best_entry(
    signal: Tensor, voxels: Voxels, amplitude: int | None
) -> tuple[Tensor, Tensor, None]:
    """Return the lowest sum of squares of each voxel, up to a constant, its entry, and no weights.

    Parameters
    ----------
    signal
        (entries, measurements).
    amplitude
        Index of the amplitude; there is one: at the best amplitude of each entry.
    """
    weight = voxels.loss_weight()
    data = voxels.data if weight is None else voxels.data * weight
    square = signal * signal
    power = square.sum(1)[:, None] if weight is None else square @ weight
    if amplitude is None:
        misfit = torch.addmm(power, signal, data, alpha=-2)
    else:
        misfit = -((signal @ data).clamp_min(0) ** 2) / power
    return *_lowest(misfit), None


def _best_mixture(
    signal: Tensor, voxels: Voxels, amplitude: None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lowest sum of squares of each voxel, up to a constant, its entry, and weights.

    Every entry is taken at its best mixing weights, (signals, voxels).

    Parameters
    ----------
    signal
        (entries, signals, measurements).
    """
    *others, last = signal.unbind(1)
    others = [other - last for other in others]
    weight = voxels.loss_weight()
    data = voxels.data if weight is None else voxels.data * weight

    def power(first: Tensor, second: Tensor) -> Tensor:
        product = first * second
        return product.sum(1)[:, None] if weight is None else product @ weight

    products = {pair: power(others[pair[0]], others[pair[1]]) for pair in packed(len(others))}
    order = range(len(others))
    gram = [[products[min(i, j), max(i, j)] for j in order] for i in order]
    slope = [torch.addmm(power(a, last), a, data, beta=-1) for a in others]
    alone = torch.addmm(power(last, last), last, data, alpha=-2)
    lowest, best = _lowest(lowest_cost(Mixing(gram, slope)) + alone)

    def chosen(values: Tensor) -> Tensor:
        return values.expand(-1, len(best)).gather(0, best[None])[0]

    found = Mixing([[chosen(g) for g in row] for row in gram], [chosen(s) for s in slope])
    return lowest, best, best_weights(found)


def _lowest(misfit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest misfit of each voxel, and its first entry; the last one where it is NaN.

    A minimum and its place in one pass would go through a voxel's entries one by one.
    """
    lowest, last = misfit.amin(0), len(misfit) - 1
    number = torch.arange(last + 1, dtype=misfit.dtype, device=misfit.device)[:, None]
    return lowest, torch.where(misfit == lowest, number, last).amin(0).long()


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
