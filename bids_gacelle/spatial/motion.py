"""Whether the images of one fit show the object in the same place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

_Array = npt.NDArray[np.floating]

_THIN = 5  # axes with fewer voxels have no shift that could be measured
_LARGE = 128  # longer axes are averaged to at most this many voxels
_FLOOR = 0.02  # of the bright intensities: darker is air
_SHIFTED = 0.75  # voxels
# Height of the correlation peak over its surroundings, in their standard deviations. Measured on
# our real scans: 15 to 200 for the same head at any contrast (noise of 60 % added: 15), 4 to 10
# for unrelated, mirrored or empty images.
_SHARP = 10.0
# In an image of a few voxels the peak has no surroundings to rise over; edges that agree as they
# lie need no better proof.
_ALIKE = 0.5


@dataclass(frozen=True)
class Displacement:
    """One image compared with the first one of its fit.

    Attributes
    ----------
    index : position of the image in the fit.
    shift : voxels along x, y, z by which the object lies further than in the first image; 0 along
        axes with fewer than five voxels.
    distance : length of the shift in mm.
    sharpness : height of the phase-correlation peak in standard deviations of its surroundings.
    correlation : Pearson correlation of the edges as they lie.
    """

    index: int
    shift: tuple[float, float, float]
    distance: float
    sharpness: float
    correlation: float

    @property
    def warning(self) -> str:
        """Say what was found if it looks like motion, else an empty string."""
        if self.sharpness < _SHARP and self.correlation < _ALIKE:
            return (
                "shares hardly any structure with the first image (correlation of edges "
                f"{self.correlation:.2f}): it is very noisy, or the head moved far"
            )
        if np.linalg.norm(self.shift) < _SHIFTED:
            return ""
        along = ", ".join(f"{s:+.1f}" for s in self.shift)
        return (
            f"appears shifted by {self.distance:.1f} mm ({along} voxels along x, y, z) against "
            "the first image: align the images before the fit"
        )


def displacement(
    volumes: Sequence[_Array],
    voxel_sizes: Sequence[float],
    mask: npt.NDArray[np.bool_] | None = None,
) -> list[Displacement]:
    """Compare every image of a fit with the first one, whatever their contrasts.

    Phase correlation (Kuglin & Hines 1975) of the edges: the gradient magnitude of the
    logarithm of the image stays where the object is while flip angle, echo time or diffusion
    weighting change the intensities; a centre of mass does not.

    Parameters
    ----------
    volumes : images (x, y, z) of the same shape.
    voxel_sizes : mm along x, y, z.
    mask : (x, y, z); only the box around it is compared.

    Returns
    -------
    One entry per image but the first; none when every axis is shorter than five voxels.
    """
    box = _box(mask, volumes[0].shape)
    axes = [axis for axis in range(3) if box[axis].stop - box[axis].start >= _THIN]
    if len(volumes) < 2 or not axes:
        return []
    first = _edges(volumes[0][box], axes)
    found = []
    for index, volume in enumerate(volumes[1:], start=1):
        edges, factors = _edges(volume[box], axes), _factors(volume[box].shape)
        shift, sharpness = _phase_correlation(first, edges, axes)
        voxels = shift * factors
        found.append(
            Displacement(
                index,
                (float(voxels[0]), float(voxels[1]), float(voxels[2])),
                float(np.linalg.norm(voxels * np.asarray(voxel_sizes))),
                sharpness,
                _pearson(first, edges),
            )
        )
    return found


def _box(
    mask: npt.NDArray[np.bool_] | None, shape: tuple[int, ...], margin: int = 5
) -> tuple[slice, ...]:
    if mask is None or not mask.any():
        return tuple(slice(0, n) for n in shape)
    return tuple(
        slice(max(0, s.start - margin), min(n, s.stop + margin))
        for s, n in zip(ndimage.find_objects(mask.astype(np.uint8))[0], shape, strict=True)
    )


def _factors(shape: tuple[int, ...]) -> npt.NDArray[np.intp]:
    """How many voxels are averaged along each axis."""
    return np.array([-(-n // _LARGE) for n in shape])


def _edges(volume: _Array, axes: list[int]) -> _Array:
    """Gradient magnitude of the log image, smoothed by one voxel, averaged to <= 128 per axis."""
    image = np.where(np.isfinite(volume), volume, 0).astype(np.float32)
    for axis, factor in enumerate(_factors(image.shape)):
        whole = np.take(image, range(image.shape[axis] // factor * factor), axis)
        split = (*whole.shape[:axis], -1, factor, *whole.shape[axis + 1 :])
        image = whole.reshape(split).mean(axis=axis + 1)
    bright = np.percentile(image, 98)
    if not bright > 0:
        return np.zeros_like(image)
    image = np.log(np.maximum(image / bright, _FLOOR))
    sigma = [1.0 if axis in axes else 0.0 for axis in range(3)]
    power = np.zeros_like(image)
    for axis in axes:
        power += (
            ndimage.gaussian_filter(image, sigma, order=[int(a == axis) for a in range(3)]) ** 2
        )
    return np.sqrt(power)


def _phase_correlation(a: _Array, b: _Array, axes: list[int]) -> tuple[_Array, float]:
    """Shift (3,) of b against a in voxels, and how far the peak stands out."""
    window = np.ones(1, np.float32)
    for axis in axes:
        taper = np.hanning(a.shape[axis] + 2)[1:-1].astype(np.float32)
        window = window * np.expand_dims(taper, [i for i in range(3) if i != axis])
    spectra = [fft.rfftn((x - x.mean()) * window, axes=axes) for x in (a, b)]
    cross = spectra[1] * spectra[0].conj()
    cross /= np.maximum(np.abs(cross), np.finfo(np.float32).tiny)
    surface = fft.irfftn(cross, [a.shape[axis] for axis in axes], axes=axes)
    thin = tuple(axis for axis in range(3) if axis not in axes)
    surface = surface.sum(axis=thin, keepdims=True)
    smoothing = [1.0 if axis in axes else 0.0 for axis in range(3)]
    surface = ndimage.gaussian_filter(surface, smoothing, mode="wrap")
    peak = np.unravel_index(np.argmax(surface), surface.shape)
    shift = np.zeros(3)
    for axis in axes:
        # centroid of the peak and its two neighbours along the axis (periodic)
        line = surface[tuple(slice(None) if i == axis else peak[i] for i in range(3))]
        near = np.maximum(line.take(range(peak[axis] - 1, peak[axis] + 2), mode="wrap"), 0)
        at = peak[axis] + (near[2] - near[0]) / max(near.sum(), np.finfo(np.float32).tiny)
        shift[axis] = at - len(line) if at > len(line) / 2 else at
    spread = float(surface.std())
    sharpness = float(surface.max() - surface.mean()) / spread if spread > 0 else 0.0
    return shift, sharpness


def _pearson(a: _Array, b: _Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.sum(a * b)) / norm if norm > 0 else 0.0
