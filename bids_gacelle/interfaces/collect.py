"""Nodes that read images: the volumes of a series, and its mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from nipype.interfaces.base import TraitedSpec, traits

from bids_gacelle.bids.gradients import read_gradients
from bids_gacelle.bids.series import Series, series_from_json
from bids_gacelle.engine import EngineError
from bids_gacelle.engine.prepare import phase_scale
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.base import LOGGER, Step, StepInputSpec
from bids_gacelle.interfaces.gradient_echo import gradient_echo_scheme, uses_phases
from bids_gacelle.interfaces.provenance import input_digests
from bids_gacelle.settings import Settings
from bids_gacelle.spatial.grids import load_volumes
from bids_gacelle.spatial.masks import load_mask, quick_mask
from bids_gacelle.spatial.motion import displacement


class _CollectOutputSpec(TraitedSpec):
    collected = traits.Dict(
        desc="volumes, phases, reference (paths), reference_label, phase_unit or phase_error, "
        "warnings, digests"
    )


class Collect(Step):
    """Read every image of a series, whole, so that a damaged file is found before any fit."""

    input_spec = StepInputSpec
    output_spec = _CollectOutputSpec

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Store the volumes (n, x, y, z) as float32, and the image that shows the anatomy.

        Of complex images, ``phases`` are the phases in rad of the same shape, and the volumes
        their magnitudes.
        """
        series = series_from_json(self.inputs.series)
        loaded = load_volumes(series.images or [run.image for run in series.dwi_runs])
        image = loaded[0][0]
        volumes = _stacked([data for _, data in loaded])
        warnings: list[str] = []
        phases: dict[str, str] = {}
        if series.second is not None and (
            uses_phases(series, settings) or series.second.part == "imag"
        ):
            volumes, turned, phases, warnings = _complex(series, volumes)
            if turned is not None:
                np.save(cwd / "phases.npy", turned)
                phases["phases"] = str(cwd / "phases.npy")
        label, compared = _anatomy(series, volumes, settings.b0_threshold)
        reference = nib.Nifti1Image(compared[0][1], image.affine, image.header)
        nib.save(reference, cwd / "reference.nii.gz")
        np.save(cwd / "volumes.npy", volumes)
        zooms = nib.affines.voxel_sizes(image.affine)
        moved = [m for m in displacement([v for _, v in compared], zooms) if m.warning]
        warnings += [
            f"{compared[m.index][0]} {m.warning} (compared with {compared[0][0]})" for m in moved
        ]
        for warning in warnings:
            LOGGER.warning("sub-%s %s: %s", series.subject, series.label, warning)
        return {
            "collected": {
                "volumes": str(cwd / "volumes.npy"),
                **phases,
                "reference": str(cwd / "reference.nii.gz"),
                "reference_label": label,
                "warnings": warnings,
                "digests": input_digests(series),
            }
        }


class _MaskInputSpec(StepInputSpec):
    collected = traits.Dict(mandatory=True)


class _MaskOutputSpec(TraitedSpec):
    mask = traits.Dict(desc="file (npy), origin, sources, n_voxels")


class MakeMask(Step):
    """Decide which voxels are fitted."""

    input_spec = _MaskInputSpec
    output_spec = _MaskOutputSpec

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Intersect the given masks, or make a quick one of the voxels with signal.

        Voxels of a given mask stay in it without a signal, where the fit calls them unusable.
        """
        series = series_from_json(self.inputs.series)
        reference = reference_image(self.inputs.collected)
        signal = np.asarray(reference.dataobj, dtype=np.float32)
        if series.mask.images:
            mask = np.logical_and.reduce([load_mask(p, reference) for p in series.mask.images])
        else:
            mask = quick_mask(signal)
        if not (mask & np.isfinite(signal) & (signal > 0)).any():
            where = ", ".join(series.mask.images) or "made from the signal"
            raise InputError(
                f"the mask ({where}) holds no voxel with signal. Check that it is not empty and "
                "belongs to these images, or give another with --mask."
            )
        np.save(cwd / "mask.npy", mask)
        return {
            "mask": {
                "file": str(cwd / "mask.npy"),
                "origin": series.mask.origin,
                "sources": list(series.mask.images),
                "n_voxels": int(mask.sum()),
            }
        }


def reference_image(collected: dict[str, Any]) -> SpatialImage:
    """The image that gives the grid of a series and shows its anatomy."""
    return cast(SpatialImage, nib.load(collected["reference"]))


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """Volumes of all images one after the other, (n, x, y, z)."""
    parts = [np.moveaxis(d, 3, 0) if d.ndim == 4 else d[None] for d in images]
    return np.concatenate(parts).astype(np.float32, copy=False)


def _complex(
    series: Series, volumes: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, dict[str, str], list[str]]:
    """Magnitudes and phases in rad of complex images, what to say of the phases, and doubts.

    The phases are those of the scanner: nothing is said of their sign. Without a known scale
    there are none, and ``phase_error`` says why.
    """
    second = series.second
    assert second is not None
    others = _stacked([data for _, data in load_volumes(second.images)])
    if others.shape != volumes.shape:
        raise InputError(
            f"{second.images[0]} and the other {second.part} images have the shape "
            f"{others.shape[1:]}, the images beside them {volumes.shape[1:]}; convert them again, "
            "or pass --ignore phase."
        )
    if second.part == "imag":
        return np.hypot(volumes, others), np.arctan2(others, volumes), {}, []
    # a background that was masked has the phase 0, or the lowest integer
    inside = [phase[magnitude > 0] for phase, magnitude in zip(others, volumes, strict=True)]
    names = f"{Path(second.images[0]).name}, ..."
    try:
        scale = phase_scale(inside, second.units)
    except EngineError as error:
        problem = f"the phase images {names} cannot be used: {error}"
        return volumes, None, {"phase_error": problem}, [f"{problem}. Magnitudes alone are fitted"]
    said = f"the phase images {names} are taken for {scale.text}"
    if not scale.assumed:  # else a warning
        LOGGER.info("sub-%s %s: %s", series.subject, series.label, said)
    others -= np.float32(scale.zero)
    others *= np.float32(scale.factor)
    return volumes, others, {"phase_unit": scale.text}, [said] if scale.assumed else []


def _anatomy(
    series: Series, volumes: np.ndarray, b0_threshold: float
) -> tuple[str, list[tuple[str, np.ndarray]]]:
    """Images (name, volume) that must show the same anatomy in the same place.

    The first one is the reference; what it shows comes before the list.
    """
    files = [Path(path).name for path in series.images]
    if series.kind == "dwi":
        bvals = [read_gradients(run.bval, run.bvec)[0] for run in series.dwi_runs]
        parts = np.split(volumes, np.cumsum([len(b) for b in bvals])[:-1])
        means = [v[b <= b0_threshold].mean(0) for v, b in zip(parts, bvals, strict=True)]
        files = [Path(run.image).name for run in series.dwi_runs]
        return "mean b0", list(zip(files, means, strict=True))
    images = list(zip(files, volumes, strict=True))
    if series.kind == "megre":
        return "first echo", images
    # the largest flip angle is the most T1-weighted: the best picture to judge a mask on; echoes
    # of one excitation cannot move against each other
    trains, _ = gradient_echo_scheme(series).excitations()
    firsts = np.unique(trains, return_index=True)[1]
    label = "largest flip angle" + ", first echo" * (len(firsts) < len(images))
    return label, [images[i] for i in firsts[::-1]]
