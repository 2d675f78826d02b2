"""Anatomy of the digital brain: tissue labels on a scanner-like grid.

Cortex, white matter and cerebrospinal fluid come from the ICBM 152 (2009a, symmetric) tissue
probability maps that nilearn ships inside its wheel; the deep nuclei, which such maps show poorly,
are ellipsoids in MNI coordinates. Labels are hard (one tissue per voxel), because only then is
the true parameter of a voxel a number rather than a mixture.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_gacelle.errors import InputError
from bids_gacelle.phantom.fields import stream

SKULL_MM = 7.0
"""Thickness of the signal-free gap between brain and scalp."""
SCALP_MM = 6.0
MARGIN_MM = 6.0
"""Air around the head on every side."""
NECK_MM = -48.0
"""The scalp ends at this MNI z: below it there is no skull cap."""


class Label(IntEnum):
    """Values of the label image; 0 is bone and air."""

    CSF = 1
    CORTEX = 2
    WHITE_MATTER = 3
    CEREBELLUM = 4
    THALAMUS = 5
    CAUDATE = 6
    PUTAMEN = 7
    PALLIDUM = 8
    SCALP = 9
    """Skin and fat around the skull: has a signal, is not brain."""


@dataclass(frozen=True)
class Ellipsoid:
    """A region: centre and semi-axes in MNI mm (right side), turned about z by ``yaw``."""

    label: Label
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    yaw: float

    def contains(self, mni: np.ndarray) -> np.ndarray:
        """Which points (..., 3), mirrored to the right side, lie inside: bool (...)."""
        mirrored = mni * np.where(mni[..., :1] < 0, [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
        turn = Rotation.from_euler("z", self.yaw, degrees=True).as_matrix()
        local = (mirrored - np.array(self.centre)) @ turn
        return np.sum((local / np.array(self.radii)) ** 2, axis=-1) <= 1


# Later entries win where two overlap.
NUCLEI = (
    Ellipsoid(Label.THALAMUS, (11.5, -18.0, 7.0), (9.0, 15.0, 9.0), 20.0),
    Ellipsoid(Label.CAUDATE, (12.5, 13.0, 6.0), (5.5, 9.5, 9.0), 15.0),
    Ellipsoid(Label.CAUDATE, (16.0, -3.0, 19.5), (4.5, 15.0, 5.0), 15.0),
    Ellipsoid(Label.PUTAMEN, (26.5, 2.0, 1.0), (6.0, 16.5, 9.5), 18.0),
    Ellipsoid(Label.PALLIDUM, (19.0, -4.0, -0.5), (5.5, 9.5, 6.5), 25.0),
)
CEREBELLUM = Ellipsoid(Label.CEREBELLUM, (0.0, -63.0, -38.0), (58.0, 33.0, 27.0), 0.0)
# The probability maps call most of the brainstem gray; its signal is rather that of white matter.
BRAINSTEM = Ellipsoid(Label.WHITE_MATTER, (0.0, -29.0, -32.0), (15.0, 14.0, 30.0), 0.0)


@dataclass(frozen=True)
class Template:
    """Tissue probabilities (x, y, z) in 0..1 and brain mask, with the affine to MNI mm."""

    gray: np.ndarray
    white: np.ndarray
    brain: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True)
class Anatomy:
    """One head on one scanner grid.

    Attributes
    ----------
    labels
        uint8 (x, y, z): `Label`, 0 in bone and air.
    mni
        float64 (x, y, z, 3): MNI coordinates of every voxel, mm; parameter fields are
        functions of them.
    affine
        float64 (4, 4): voxel indices to scanner coordinates, mm.
    """

    labels: np.ndarray
    mni: np.ndarray
    affine: np.ndarray

    @property
    def brain(self) -> np.ndarray:
        """Brain mask, bool (x, y, z)."""
        return (self.labels > 0) & (self.labels != Label.SCALP)


@cache
def load_template() -> Template:
    """Read the tissue maps from nilearn's installed files, without importing nilearn.

    Raises
    ------
    InputError
        nilearn is not installed, or its files have moved.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "The digital brain needs the tissue maps that come with nilearn, which is not "
            "installed: run `pip install bids-gacelle[phantom]`."
        )
    # Imported here so that signals can be simulated where only torch, numpy and scipy are.
    import nibabel as nib

    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    images: list[nib.Nifti1Image] = []
    for tissue in ("gm", "wm", "t1"):
        path = folder / f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz"
        if not path.exists():
            raise InputError(
                f"The digital brain needs {path.name}, which this version of nilearn no longer "
                "ships: run `pip install 'nilearn>=0.10,<0.15'`."
            )
        images.append(nib.Nifti1Image.from_filename(path))
    gray, white, t1 = (np.asarray(image.dataobj, dtype=np.float32) / 255 for image in images)
    return Template(gray, white, ndimage.binary_fill_holes(t1 > 0), images[0].affine)


def make_anatomy(
    subject: int = 1, session: int = 1, *, resolution: float = 4.0, seed: int = 0
) -> Anatomy:
    """Return the head of one subject as placed in the scanner in one session.

    Size and shape belong to the subject, the position in the scanner to the session. Slices are
    straight axial for odd subjects and oblique for even ones, stored right to left as scanners
    do.

    Parameters
    ----------
    subject, session
        Counted from 1.
    resolution
        Isotropic voxel size in mm.
    seed
        Same seed, same head.
    """
    to_mni = np.linalg.inv(_placement(session, subject, seed) @ _shape(subject, seed))
    affine, shape = _grid(np.linalg.inv(to_mni), resolution, oblique=subject % 2 == 0)
    index = np.moveaxis(np.indices(shape, dtype=np.float64), 0, -1)
    mni = _apply(to_mni @ affine, index)
    gray, white, brain = _sample(mni, resolution)
    labels = _label(gray, white, brain, mni)
    labels[_scalp(labels > 0, mni, resolution)] = Label.SCALP
    return Anatomy(labels, mni, affine)


def _shape(subject: int, seed: int) -> np.ndarray:
    """MNI to the subject's own head: a small scaling and shear, (4, 4)."""
    rng = stream(seed, subject, "shape")
    scaling, shear = np.diag(rng.normal(1, 0.03, 3)), np.triu(rng.normal(0, 0.02, (3, 3)), 1)
    matrix = np.eye(4)
    matrix[:3, :3] = 0.94 * (scaling + shear)  # the MNI brain is larger than the average one
    return matrix


def _placement(session: int, subject: int, seed: int) -> np.ndarray:
    """Head to scanner: a rigid movement of a few mm and degrees, (4, 4)."""
    rng = stream(seed, subject, session, "placement")
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(rng.normal(0, 2.0, 3), degrees=True).as_matrix()
    matrix[:3, 3] = rng.normal(0, 3.0, 3)
    return matrix


@cache
def _surface() -> np.ndarray:
    """Return MNI coordinates of the outermost voxels of the brain, (points, 3)."""
    template = load_template()
    edge = template.brain & ~ndimage.binary_erosion(template.brain)
    return _apply(template.affine, np.argwhere(edge))


@cache
def _smoothed(resolution: float) -> tuple[np.ndarray, ...]:
    """Return gray, white and brain of the template averaged over about a voxel."""
    template = load_template()
    # A box of the voxel's width has this standard deviation.
    blur = resolution / np.sqrt(12) / np.abs(template.affine[0, 0])
    volumes = (template.gray, template.white, template.brain.astype(np.float32))
    return tuple(ndimage.gaussian_filter(volume, blur) for volume in volumes)


def _grid(
    from_mni: np.ndarray, resolution: float, *, oblique: bool
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine and shape of the smallest grid that holds the head with its margin."""
    tilt = Rotation.from_euler("xy", (-12.0, 5.0) if oblique else (0.0, 0.0), degrees=True)
    axes = tilt.as_matrix() @ np.diag([-resolution, resolution, resolution])
    in_voxels = _apply(from_mni, _surface()) @ np.linalg.inv(axes).T
    margin = (SKULL_MM + SCALP_MM + MARGIN_MM) / resolution
    first = np.floor(in_voxels.min(axis=0) - margin)
    last = np.ceil(in_voxels.max(axis=0) + margin)
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = axes @ first
    nx, ny, nz = (last - first).astype(int) + 1
    return affine, (int(nx), int(ny), int(nz))


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Homogeneous transform (4, 4) of points (..., 3)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _sample(mni: np.ndarray, resolution: float) -> list[np.ndarray]:
    """Return gray, white and brain probability of every voxel."""
    where = np.moveaxis(_apply(np.linalg.inv(load_template().affine), mni), -1, 0)
    return [ndimage.map_coordinates(volume, where, order=1) for volume in _smoothed(resolution)]


def _label(gray: np.ndarray, white: np.ndarray, brain: np.ndarray, mni: np.ndarray) -> np.ndarray:
    """Return the most probable tissue of each voxel, deep nuclei over it; uint8 (x, y, z)."""
    labels = np.full(gray.shape, Label.CSF, dtype=np.uint8)
    # Averaging over heads has blurred the sulci; the weight opens them again.
    fluid = 1.3 * (brain - gray - white)
    labels[(gray >= white) & (gray > fluid)] = Label.CORTEX
    labels[(white > gray) & (white > fluid)] = Label.WHITE_MATTER
    for region in (CEREBELLUM, BRAINSTEM):
        labels[(labels == Label.CORTEX) & region.contains(mni)] = region.label
    solid = labels != Label.CSF
    for nucleus in NUCLEI:
        labels[nucleus.contains(mni) & solid] = nucleus.label
    return np.where(_largest_component(brain > 0.5), labels, 0).astype(np.uint8)


def _largest_component(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    return parts == 1 + np.argmax(ndimage.sum_labels(mask, parts, range(1, count + 1)))


def _scalp(brain: np.ndarray, mni: np.ndarray, resolution: float) -> np.ndarray:
    """Return a shell of skin and fat, clear of the brain by the thickness of the skull."""
    reach = round(10 / resolution)
    hull = ndimage.binary_closing(np.pad(brain, reach), iterations=reach)
    distance = ndimage.distance_transform_edt(~hull)[(slice(reach, -reach),) * 3] * resolution
    shell = (distance > SKULL_MM) & (distance <= SKULL_MM + SCALP_MM)
    return shell & (mni[..., 2] > NECK_MM)
