"""From a NIfTI file to slices a reader can orient: reorientation, slice choice, page layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))
"""Names of the two ends of each axis of a volume in RAS+ order."""


class Plane(NamedTuple):
    """A viewing plane: the axis it cuts, and the axes drawn to the right and upwards."""

    name: str
    cut: int
    across: int
    up: int


# Columns run towards the subject's right and rows upwards: the neurological convention.
PLANES = (
    Plane("axial", 2, 0, 1),
    Plane("coronal", 1, 0, 2),
    Plane("sagittal", 0, 1, 2),
)


@dataclass(frozen=True)
class Volume:
    """A 3-D image turned so that its axes run to the subject's right, front and top.

    ``data`` is (x, y, z); ``spacing`` is the voxel size in mm; ``stored`` says for each axis which
    axis of the file it is and whether it was flipped; ``tilt`` is the largest angle in degrees
    between a voxel axis and the anatomical axis it is named after.
    """

    data: np.ndarray
    spacing: tuple[float, float, float]
    stored: tuple[tuple[int, bool], ...]
    tilt: float

    def stored_index(self, axis: int, index: int) -> str:
        """Position along an axis in the file's own voxel numbering, such as ``k 12``."""
        origin, flipped = self.stored[axis]
        return f"{'ijk'[origin]} {self.data.shape[axis] - 1 - index if flipped else index}"

    def from_stored(self, voxel: tuple[int, int, int]) -> tuple[int, ...]:
        """Where a voxel of the file lies in ``data``."""
        return tuple(
            self.data.shape[axis] - 1 - voxel[origin] if flipped else voxel[origin]
            for axis, (origin, flipped) in enumerate(self.stored)
        )


def load_volume(path: Path) -> Volume:
    """Read a 3-D image and turn it to RAS+ axis order (no interpolation).

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        The image is not 3-D or its affine names no axes.
    """
    image: Any = nib.load(path)
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise ValueError(f"{path.name} has {len(shape)} dimensions, expected 3")
    affine = image.affine
    spacing = nib.affines.voxel_sizes(affine)
    if not np.all(np.isfinite(affine)) or np.any(spacing == 0):
        raise ValueError(f"the affine of {path.name} does not span three dimensions")
    turn = nib.io_orientation(affine)
    data = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    origin = np.argsort(turn[:, 0])
    return Volume(
        nib.apply_orientation(data, turn),
        tuple(float(s) for s in spacing[origin]),  # type: ignore[arg-type]
        tuple((int(axis), bool(turn[axis, 1] < 0)) for axis in origin),
        float(np.degrees(nib.affines.obliquity(affine).max())),
    )


@dataclass(frozen=True)
class View:
    """Which part of a grid is drawn: a crop box and, per plane, the slice indices."""

    grid: Volume
    box: tuple[slice, slice, slice]
    cuts: dict[str, tuple[int, ...]]

    def section(self, data: np.ndarray, plane: Plane, index: int) -> np.ndarray:
        """One cropped slice as an image: first row on top, first column at the left."""
        crop = list(self.box)
        crop[plane.cut] = slice(index, index + 1)
        cut = data[tuple(crop)].squeeze(plane.cut)
        return cut.T[
            ::-1
        ]  # both remaining axes ascend, so (across, up) -> (row from the top, column)

    def fewer(self, number: int) -> View:
        """Return the same view with at most ``number`` slices per plane, evenly taken."""
        cuts = {
            name: tuple(indices[int((n + 0.5) * len(indices) / number)] for n in range(number))
            if len(indices) > number
            else indices
            for name, indices in self.cuts.items()
        }
        return View(self.grid, self.box, cuts)

    def size(self, plane: Plane) -> tuple[float, float]:
        """Width and height of a slice in mm."""
        steps = [
            (s.stop - s.start) * mm for s, mm in zip(self.box, self.grid.spacing, strict=True)
        ]
        return steps[plane.across], steps[plane.up]


def choose_view(mask: Volume, *, surround: np.ndarray | None = None, per_plane: int = 7) -> View:
    """Choose slices spread over the extent of a mask, cropped to it (or to it and ``surround``).

    Planes in which the volume is one voxel thin show nothing and are left out.

    Raises
    ------
    ValueError
        The mask is empty.
    """
    inside = mask.data > 0
    if not inside.any():
        raise ValueError("the mask is empty")
    shown = inside if surround is None else inside | surround
    box, cuts = [], {}
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        extent = np.flatnonzero(shown.any(axis=others))
        margin = max(1, round(0.06 * np.ptp(extent)))
        stop = min(int(extent[-1]) + margin + 1, inside.shape[axis])
        box.append(slice(max(int(extent[0]) - margin, 0), stop))
        filled = np.flatnonzero(inside.any(axis=others))
        pick = ((np.arange(per_plane) + 0.5) * len(filled) / per_plane).astype(int)
        chosen = filled if len(filled) <= per_plane else filled[pick]
        plane = next(p for p in PLANES if p.cut == axis)
        if all(inside.shape[a] > 1 for a in others):
            cuts[plane.name] = tuple(int(i) for i in chosen)
    return View(mask, (box[0], box[1], box[2]), cuts)


class Panel(NamedTuple):
    """Where one slice goes on the page, in CSS pixels from the top left corner."""

    plane: Plane
    position: int
    first: bool
    x: float
    y: float
    width: float
    height: float


GAP = 5.0
CAPTION = 15.0


def arrange(
    view: View, width: float, height: float, limit: float = np.inf
) -> tuple[list[Panel], float, float]:
    """Lay out all slices at one common scale, the largest with which they fit.

    Slices of a plane stand in one row; flat strips (thin volumes) may wrap into several.

    Returns
    -------
    panels, scale (CSS pixels per mm), height used
    """
    panels: list[Panel] = []
    bottom, scale = height, 0.0
    for scale in np.minimum(np.geomspace(12, 0.02, 800), limit):
        panels, bottom, right = _flow(view, float(scale), width)
        if bottom <= height and right <= width:
            break
    return panels, float(scale), bottom


def _flow(view: View, scale: float, width: float) -> tuple[list[Panel], float, float]:
    planes = [plane for plane in PLANES if view.cuts.get(plane.name)]
    sizes = {plane: tuple(mm * scale for mm in view.size(plane)) for plane in planes}
    strips = {plane for plane, (w, h) in sizes.items() if h < w / 4}
    # Slices that are no strips share one column width, so that they stand below each other.
    column_width = max((sizes[plane][0] for plane in planes if plane not in strips), default=0.0)
    panels: list[Panel] = []
    y, right = 0.0, 0.0
    for plane in planes:
        cuts = view.cuts[plane.name]
        w, h = sizes[plane]
        cell, columns = column_width, len(cuts)
        if plane in strips:
            cell, columns = w, min(max(int((width + GAP) // (w + GAP)), 1), columns)
            columns = -(-len(cuts) // -(-len(cuts) // columns))  # even rows
        for n, index in enumerate(cuts):
            row, column = divmod(n, columns)
            x = column * (cell + GAP) + (cell - w) / 2
            top = y + row * (h + CAPTION + GAP) + CAPTION
            panels.append(Panel(plane, index, n == 0, x, top, w, h))
        y += -(-len(cuts) // columns) * (h + CAPTION + GAP) + GAP
        right = max(right, columns * (cell + GAP) - GAP)
    return panels, y - GAP, right
