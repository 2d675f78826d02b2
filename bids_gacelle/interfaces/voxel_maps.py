"""Maps that models take as voxel inputs, on the grid of the series they are fitted with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from nibabel import Nifti1Image
from nibabel.spatialimages import SpatialImage

from bids_gacelle.bids.series import Series
from bids_gacelle.errors import InputError
from bids_gacelle.spatial.fibres import AXES, Axes, fibre_angles, folded
from bids_gacelle.spatial.grids import load_volumes, resample_to, same_grid

_LEAST_WEIGHT = 0.5  # of the neighbours that have a value, for a voxel between them to have one
_MANY = ("theta", "ff")
"""Inputs that a model has for each fibre, numbered."""


def voxel_inputs(series: Series, reference: SpatialImage) -> dict[str, np.ndarray]:
    """Read the maps (x, y, z) of all voxel inputs of a series.

    ``b1`` is the relative transmit field. Volumes of ``theta`` and ``ff`` are those of fibres and
    become ``theta1``, ``theta2``, ...; ``fo``, three volumes for each fibre, becomes their angles.
    Maps on another grid are resampled: linearly, angles and vectors from the nearest voxel.

    Raises
    ------
    InputError
        A map cannot be read, or is not what its name says.
    """
    found = {}
    if series.b1_map is not None:
        [values] = _on_grid(series.b1_map.image, reference, positive=True)
        found["b1"] = values * np.float32(series.b1_map.factor)
    for name, given in series.voxel_maps.items():
        path = given.image
        if name == "fo":
            found |= _numbered("theta", _angles_of_vectors(path, reference))
        elif name.rstrip("0123456789") == "theta":
            angles = [_folded(path, v) for v in _on_grid(path, reference, nearest=True)]
            found |= (
                _numbered("theta", angles) if name == "theta" else {name: _single(path, angles)}
            )
        elif name in _MANY:
            found |= _numbered(name, _on_grid(path, reference))
        else:
            found[name] = _single(path, _on_grid(path, reference))
    return found


def _numbered(name: str, volumes: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}{n}": values for n, values in enumerate(volumes, 1)}


def _single(path: str, volumes: list[np.ndarray]) -> np.ndarray:
    if len(volumes) != 1:
        raise InputError(f"{path} has {len(volumes)} volumes; a map of one volume is needed.")
    return volumes[0]


def _folded(path: str, angles: np.ndarray) -> np.ndarray:
    largest = float(np.nanmax(np.abs(angles), initial=0))
    if largest > 2 * np.pi:
        raise InputError(
            f"{path} has angles up to {largest:.4g}, which cannot be rad; if they are degrees, "
            "multiply them by pi/180."
        )
    return folded(angles)


def _angles_of_vectors(path: str, reference: SpatialImage) -> list[np.ndarray]:
    [(image, data)] = load_volumes([path])
    if data.ndim < 4 or np.prod(data.shape[3:]) % 3:
        raise InputError(
            f"{path} has the shape {data.shape}; a map of fibre orientations needs three volumes "
            "for each fibre, x, y and z."
        )
    vectors = data.reshape(*data.shape[:3], -1, 3, order="C")
    if data.ndim == 5 and data.shape[3] == 3:  # (x, y, z, 3, fibres)
        vectors = np.moveaxis(data, 3, 4)
    angles = fibre_angles(vectors, image.affine, _axes(Path(path)))
    volumes = np.moveaxis(angles, -1, 0).astype(np.float32)
    return [_resampled(path, v, image, reference, order=0) for v in volumes]


def _axes(path: Path) -> Axes:
    """What vectors are along by their sidecar (``OrientationEncoding``); else as FSL has them.

    Raises
    ------
    InputError
        There is a sidecar, but it cannot be read, or names no axes that are known.
    """
    sidecar = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    if not sidecar.exists():
        return "bvec"
    try:
        content = json.loads(sidecar.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{sidecar} cannot be read as JSON ({error}).") from error
    encoding = content.get("OrientationEncoding", {}) if isinstance(content, dict) else content
    named = encoding.get("Reference", "bvec") if isinstance(encoding, dict) else encoding
    if named not in AXES:
        raise InputError(
            f"{sidecar}: the Reference of OrientationEncoding is {named!r}; it must be one of "
            f"{', '.join(AXES)}."
        )
    return AXES[AXES.index(named)]


def _on_grid(
    path: str, reference: SpatialImage, *, nearest: bool = False, positive: bool = False
) -> list[np.ndarray]:
    """Volumes of an image on the grid of a series, NaN where the map has no value."""
    [(image, data)] = load_volumes([path])
    volumes = np.moveaxis(data.reshape(*data.shape[:3], -1), 3, 0)
    if positive:
        volumes = np.where(volumes > 0, volumes, np.nan)
    return [_resampled(path, v, image, reference, 0 if nearest else 1) for v in volumes]


def _resampled(
    path: str, values: np.ndarray, image: SpatialImage, reference: SpatialImage, order: int
) -> np.ndarray:
    """Resample values and their support apart and divide.

    What a masked or cropped map lacks then does not leak into its rim.
    """
    if same_grid(image, reference, 1e-3):
        return values

    def moved(part: np.ndarray) -> np.ndarray:
        source = Nifti1Image(part.astype(np.float32), image.affine)
        source.set_filename(path)  # for the message if it does not overlap
        return np.asarray(resample_to(source, reference, order=order).dataobj)

    known = np.isfinite(values)
    total, weight = moved(np.where(known, values, 0)), moved(known)
    out = np.full(weight.shape, np.nan, dtype=np.float32)
    np.divide(total, weight, out=out, where=weight >= _LEAST_WEIGHT)
    return out


def without_value(series: Series, inputs: dict[str, np.ndarray]) -> list[str]:
    """Say of which inputs (voxels,) voxels of the mask have no value."""
    said = []
    for name, values in inputs.items():
        what = f"the map of {name}"
        if name == "b1" and series.b1_map is not None:
            what = f"the B1 map {Path(series.b1_map.image).name}"
        if missing := np.isnan(values).mean():
            said.append(
                f"{what} has no value in {100 * missing:.1f} % of the mask: these voxels are not "
                "fitted (flag 4)" + " by models that take it" * (name != "b1")
            )
    return said
