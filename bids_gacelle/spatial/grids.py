"""Images on grids: reading them, comparing their grids, bringing one onto another's."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.processing import resample_from_to
from nibabel.spatialimages import HeaderDataError, SpatialImage

from bids_gacelle.errors import InputError


def load_volumes(
    paths: Iterable[str | Path],
) -> list[tuple[SpatialImage, npt.NDArray[np.float32]]]:
    """Read images with their scaled data as float32, in the order of ``paths``.

    Raises
    ------
    InputError
        When a file is missing, truncated, corrupt or not an image; the message names it.
    """
    return [_load(Path(path)) for path in paths]


def _load(path: Path) -> tuple[SpatialImage, npt.NDArray[np.float32]]:
    try:
        image = nib.load(path)
        if not isinstance(image, SpatialImage):
            raise InputError(f"{path} is no volume image but {type(image).__name__}")
        if image.get_data_dtype().kind not in "biuf":
            raise InputError(
                f"{path} holds values of type {image.get_data_dtype()}; real numbers are needed, "
                "such as the magnitude"
            )
        if path.name.endswith(".nii.gz"):
            return image, _read_checked(path, type(image))
        return image, np.asarray(image.dataobj, dtype=np.float32)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: permission denied") from error
    # ValueError is what a memory-mapped file raises when it is shorter than its header says.
    except (
        EOFError,
        ImageFileError,
        HeaderDataError,
        gzip.BadGzipFile,
        zlib.error,
        OSError,
        ValueError,
    ) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(
            f"{path} cannot be read as an image: it is truncated, corrupt or no NIfTI file "
            f"({reason}); copy or convert it again"
        ) from error


def _read_checked(path: Path, image_class: type[SpatialImage]) -> npt.NDArray[np.float32]:
    """Read the data, then on to the end of the stream: only there gzip compares its checksum."""
    with gzip.open(path) as stream:
        image = image_class.from_file_map({"image": FileHolder(fileobj=stream)})
        data = np.asarray(image.dataobj, dtype=np.float32)
        stream.read()
    return data


def same_grid(a: SpatialImage, b: SpatialImage, tolerance: float = 0.1) -> bool:
    """Whether two images have the same voxels in the same places.

    The corners of the volume are compared, so that a small rotation counts as much as it moves
    them.

    Parameters
    ----------
    a, b : images; only their first three dimensions matter.
    tolerance : fraction of the smallest voxel edge of ``a`` by which a corner may be off.
    """
    if a.shape[:3] != b.shape[:3]:
        return False
    corners = _corners(a.shape)
    apart = np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1)
    return bool(apart.max() <= tolerance * nib.affines.voxel_sizes(a.affine).min())


def describe_grid(image: SpatialImage) -> str:
    """Shape, voxel size and affine in words, for messages."""
    shape = " x ".join(str(n) for n in image.shape[:3])
    size = " x ".join(f"{s:.3g}" for s in nib.affines.voxel_sizes(image.affine))
    rows = ", ".join("[" + " ".join(f"{v:.4g}" for v in row) + "]" for row in image.affine[:3])
    return f"{shape} voxels of {size} mm with the affine {rows}"


def resample_to(image: SpatialImage, reference: SpatialImage, order: int) -> SpatialImage:
    """Resample an image onto the grid of another by their affines; 0 outside its field of view.

    Parameters
    ----------
    image : (x, y, z)
    reference : gives shape (its first three dimensions) and affine.
    order : of the spline: 0 nearest neighbour for labels and masks, 1 linear, 3 cubic.

    Raises
    ------
    InputError
        When the fields of view do not overlap.
    """
    into = np.linalg.inv(image.affine) @ reference.affine
    voxels = (_corners(reference.shape) @ into.T)[:, :3]
    outside = (voxels.max(axis=0) < -0.5) | (voxels.min(axis=0) > np.array(image.shape[:3]) - 0.5)
    if outside.any():
        name = image.get_filename() or "the image"
        raise InputError(
            f"{name} does not overlap with {reference.get_filename() or 'the reference'}: it has "
            f"{describe_grid(image)}, the reference has {describe_grid(reference)}; check that "
            "both are in the same space"
        )
    return resample_from_to(image, (reference.shape[:3], reference.affine), order=order)


def _corners(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Homogeneous voxel coordinates (8, 4) of the corner voxels."""
    return np.array([(*c, 1) for c in product(*[(0, n - 1) for n in shape[:3]])], dtype=float)
