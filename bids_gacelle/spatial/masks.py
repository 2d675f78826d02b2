"""Where there is something to fit: masks that were given, and a quick one where none was."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import SpatialImage
from scipy import ndimage

from bids_gacelle.errors import InputError
from bids_gacelle.spatial.grids import describe_grid, load_volumes, same_grid

# Below this ratio of typical intensities the darker class is tissue, not air: an image without
# background, such as a crop inside the head, is left whole.
_AIR_RATIO = 4.0
_BINS = 256
# Axes with fewer voxels are stacks of (perhaps distant) slices: no shape across them.
_THIN = 5
# Parts smaller than this share of the largest are debris; larger ones may be vials of a phantom.
_SMALL_PART = 0.01

_ROUNDING = 0.01  # mm
_AWAY = 3  # voxels from the object, where there is little of its ringing and motion


def quick_mask(volume: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Separate the object from air in one magnitude image.

    Otsu's threshold (1979, doi:10.1109/TSMC.1979.4310076) on the logarithm of the positive
    intensities, opening, removal of small parts, closing, filled holes. The skull stays. An image
    without air around the object is kept whole, as are the positive voxels of an image whose
    background is already zero.

    Parameters
    ----------
    volume : (x, y, z), for example the first echo or the mean b = 0 image.

    Returns
    -------
    (x, y, z)

    Raises
    ------
    InputError
        When no voxel is finite and positive.
    """
    inside = np.isfinite(volume) & (volume > 0)
    if not inside.any():
        raise InputError(
            "no mask can be made: the image has no finite positive voxel; give one with --mask"
        )
    logarithm = np.log(volume, where=inside, out=np.zeros(volume.shape, np.float64))
    threshold, difference = _otsu(logarithm[inside])
    if difference < np.log(_AIR_RATIO):
        return _clean(inside) & inside
    return _clean(inside & (logarithm > threshold)) & inside


def air(volume: npt.NDArray[np.floating], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Find the voxels of a magnitude image some way from the object and from a mask.

    Parameters
    ----------
    volume : (x, y, z)
    mask : (x, y, z) voxels that are part of the object anyway.

    Returns
    -------
    (x, y, z), false everywhere where the image has no air.
    """
    inside = mask.copy()
    if (np.isfinite(volume) & (volume > 0)).any():
        inside |= quick_mask(volume)
    return ~ndimage.binary_dilation(inside, iterations=_AWAY)


def load_mask(path: str, reference: SpatialImage) -> npt.NDArray[np.bool_]:
    """Read a mask drawn on the grid of ``reference``; true where the value is above 0.5.

    Some tools store affines with two decimals: with the same shape and entries that close, the
    mask is taken voxel for voxel.

    Raises
    ------
    InputError
        When the mask is not three-dimensional, empty, or on another grid.
    """
    image, data = load_volumes([path])[0]
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise InputError(f"{path} has the shape {data.shape}, a mask needs three dimensions")
    rounded = image.shape[:3] == reference.shape[:3] and bool(
        np.abs(image.affine - reference.affine).max() <= _ROUNDING
    )
    if not rounded and not same_grid(image, reference):
        raise InputError(
            f"the mask {path} is not on the grid of the images: the mask has "
            f"{describe_grid(image)}, the images have {describe_grid(reference)}; resample it "
            "to the images (nearest neighbour) or make it from them"
        )
    mask = data > 0.5
    if not mask.any():
        raise InputError(f"the mask {path} is empty: no voxel is above 0.5")
    return mask


def _otsu(values: npt.NDArray[np.floating]) -> tuple[float, float]:
    """Threshold that splits the histogram with the largest between-class variance.

    Also how far the means of the two classes lie apart (0 for a constant image).
    """
    # A few extreme voxels must not use up the bins.
    low, high = np.percentile(values, [0.1, 99.9])
    if not high > low:
        return float(low), 0.0
    counts, edges = np.histogram(np.clip(values, low, high), _BINS, (low, high))
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = values.size - below
    sums = np.cumsum(counts * centres)
    valid = (below > 0) & (above > 0)
    mean_below = sums[:-1] / np.maximum(below, 1)
    mean_above = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    between = np.where(valid, below * above * (mean_above - mean_below) ** 2.0, -1.0)
    best = int(np.argmax(between))
    return float(edges[best + 1]), float(mean_above[best] - mean_below[best])


def _clean(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Open, remove small parts, close, fill holes; the border of the image is no edge."""
    cross = ndimage.generate_binary_structure(3, 1)
    for axis, size in enumerate(mask.shape):
        if size < _THIN:
            # keep the middle plane of the structuring element only
            outer = [slice(None)] * 3
            outer[axis] = slice(0, 3, 2)
            cross[tuple(outer)] = False
    opened = ndimage.binary_dilation(ndimage.binary_erosion(mask, cross, border_value=1), cross)
    opened &= mask
    labels, n = ndimage.label(opened if opened.any() else mask, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    sizes[0] = 0
    kept = (sizes >= _SMALL_PART * sizes.max())[labels] & (labels > 0)
    closed = ndimage.binary_erosion(
        ndimage.binary_dilation(kept, cross, iterations=2), cross, 2, border_value=1
    )
    return ndimage.binary_fill_holes(closed | kept, cross)
