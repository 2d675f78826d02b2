"""Node that turns volumes into what the models fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel import Nifti1Image
from nipype.interfaces.base import TraitedSpec, traits

from bids_gacelle.bids.gradients import read_gradients
from bids_gacelle.bids.series import Series, Sourced, series_from_json
from bids_gacelle.engine import (
    DiffusionScheme,
    DwiVolumes,
    EngineError,
    GradientEchoScheme,
    PreparedDwi,
    prepare_dwi,
)
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.base import LOGGER, Step, StepInputSpec
from bids_gacelle.interfaces.collect import reference_image
from bids_gacelle.settings import Settings
from bids_gacelle.spatial.grids import load_volumes, resample_to

SCHEMES = {"GradientEchoScheme": GradientEchoScheme, "DiffusionScheme": DiffusionScheme}


class _PrepareInputSpec(StepInputSpec):
    collected = traits.Dict(mandatory=True)
    mask = traits.Dict(mandatory=True)
    l_max = traits.Int(0, usedefault=True, desc="highest rotational invariant any model asks for")


class _PrepareOutputSpec(TraitedSpec):
    prepared = traits.Dict(desc="signals, sigma, inputs (npy paths), scheme, warnings")


class PrepareSignals(Step):
    """Signals of the voxels in the mask, the acquisition they belong to, and their noise."""

    input_spec = _PrepareInputSpec
    output_spec = _PrepareOutputSpec

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Gradient echo: the masked volumes. Diffusion: powder averages or invariants."""
        series = series_from_json(self.inputs.series)
        mask = np.load(self.inputs.mask["file"])
        volumes = np.load(self.inputs.collected["volumes"], mmap_mode="r")
        signals = volumes[:, mask]
        prepared: dict[str, Any] = {"sigma": "", "inputs": {}, "warnings": []}
        scheme: GradientEchoScheme | DiffusionScheme
        if series.kind == "dwi":
            result, prepared["l_max_error"] = self._prepare_dwi(series, signals, settings)
            scheme, signals = result.scheme, result.signals
            prepared["warnings"] = list(result.warnings)
            prepared["directions"] = [np.round(d, 4).tolist() for d in result.directions]
            if result.sigma is not None and result.scale_sigma is not None:
                prepared["sigma"] = _save(cwd / "sigma.npy", result.sigma)
                prepared["scale_sigma"] = _save(cwd / "scale_sigma.npy", result.scale_sigma)
                prepared["scale_group"] = np.asarray(result.scale_group).tolist()
        else:
            scheme = _gradient_echo_scheme(series)
        if series.b1_map is not None:
            reference = reference_image(self.inputs.collected)
            b1 = _b1(series, reference)[mask]
            prepared["inputs"]["b1"] = _save(cwd / "b1.npy", b1)
            if missing := np.isnan(b1).mean():
                prepared["warnings"].append(
                    f"the B1 map {Path(series.b1_map.image).name} has no value in "
                    f"{100 * missing:.1f} % of the mask: these voxels are not fitted (flag 4)"
                )
        for warning in prepared["warnings"]:
            LOGGER.warning("sub-%s %s: %s", series.subject, series.label, warning)
        prepared["signals"] = _save(cwd / "signals.npy", signals)
        prepared["scheme"] = scheme_to_json(scheme)
        return {"prepared": prepared}

    def _prepare_dwi(
        self, series: Series, signals: np.ndarray, settings: Settings
    ) -> tuple[PreparedDwi, str]:
        """Prepare up to the highest order asked for, or powder averages alone and why.

        Models that fit powder averages must not suffer from a shell with few directions.
        """
        volumes = _dwi_volumes(series, signals)
        problem = ""
        for l_max in dict.fromkeys((self.inputs.l_max, 0)):
            try:
                return prepare_dwi(volumes, l_max, settings.b0_threshold), problem
            except EngineError as error:
                problem = problem or str(error)
        raise InputError(f"sub-{series.subject} {series.label}: {problem}")


def acquired_scheme(series: Series, settings: Settings) -> GradientEchoScheme | DiffusionScheme:
    """The acquisition that `PrepareSignals` will find, from names and text files alone.

    Raises
    ------
    EngineError, InputError
        It cannot be prepared.
    """
    if series.kind != "dwi":
        return _gradient_echo_scheme(series)
    return prepare_dwi(_dwi_volumes(series, None), 0, settings.b0_threshold).scheme


def scheme_to_json(scheme: GradientEchoScheme | DiffusionScheme) -> dict[str, Any]:
    """An acquisition scheme as JSON data, with the name of its class."""
    fields = {
        k: None if v is None else np.asarray(v).tolist() for k, v in scheme.columns().items()
    }
    return {"type": type(scheme).__name__, **fields}


def scheme_from_json(data: dict[str, Any]) -> GradientEchoScheme | DiffusionScheme:
    """Inverse of `scheme_to_json`."""
    fields = dict(data)
    return SCHEMES[fields.pop("type")](**fields)


def _gradient_echo_scheme(series: Series) -> GradientEchoScheme:
    given = {
        name: list(getattr(series, name).values)
        for name in ("echo_time", "flip_angle", "repetition_time")
        if getattr(series, name) is not None
    }
    if series.kind == "vfa":
        given.pop("echo_time", None)  # one echo: it scales M0 and says nothing about T1
    return GradientEchoScheme(**given)


def _dwi_volumes(series: Series, signals: np.ndarray | None) -> list[DwiVolumes]:
    """The runs of a series, with the signals (volumes, voxels) of all or of no voxel."""
    runs, start = [], 0
    for run in series.dwi_runs:
        bval, bvec = read_gradients(run.bval, run.bvec)
        timing = {
            name: _per_volume(getattr(run, name), len(bval))
            for name in ("big_delta", "small_delta", "echo_time")
        }
        stop = start + len(bval)
        own = np.empty((len(bval), 0), np.float32) if signals is None else signals[start:stop]
        runs.append(DwiVolumes(own, bval, bvec, **timing))
        start = stop
    return runs


def _per_volume(value: Sourced | None, n: int) -> np.ndarray | None:
    return None if value is None else np.broadcast_to(np.asarray(value.values, float), n)


def _b1(series: Series, reference: Any) -> np.ndarray:
    """Relative transmit field on the grid of the series, NaN where the map has no value.

    Values and their support are resampled apart and divided, so that the zeros around a masked or
    cropped map do not leak into its rim.
    """
    assert series.b1_map is not None
    [(image, data)] = load_volumes([series.b1_map.image])
    values = data.reshape(data.shape[:3])
    known = np.isfinite(values) & (values > 0)
    weighted, weight = (
        np.asarray(resample_to(Nifti1Image(part, image.affine), reference, order=1).dataobj)
        for part in (np.where(known, values, 0), known.astype(np.float32))
    )
    b1 = np.full(weight.shape, np.nan, dtype=np.float32)
    np.divide(weighted * series.b1_map.factor, weight, out=b1, where=weight >= 0.5)
    return b1


def _save(path: Path, array: np.ndarray) -> str:
    np.save(path, np.ascontiguousarray(array, dtype=np.float32))
    return str(path)
