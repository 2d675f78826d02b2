"""Node that turns volumes into what the models fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import TraitedSpec, traits

from bids_gacelle.bids.gradients import read_gradients
from bids_gacelle.bids.series import Series, Sourced, series_from_json
from bids_gacelle.engine import DiffusionScheme, DwiVolumes, GradientEchoScheme, prepare_dwi
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
            try:
                result = prepare_dwi(
                    _dwi_volumes(series, signals), self.inputs.l_max, settings.b0_threshold
                )
            except ValueError as error:
                raise InputError(f"sub-{series.subject} {series.label}: {error}") from error
            scheme, signals = result.scheme, result.signals
            prepared["warnings"] = list(result.warnings)
            if result.sigma is not None:
                prepared["sigma"] = _save(cwd / "sigma.npy", result.sigma)
        else:
            scheme = _gradient_echo_scheme(series)
        if series.b1_map is not None:
            reference = reference_image(self.inputs.collected)
            prepared["inputs"]["b1"] = _save(cwd / "b1.npy", _b1(series, reference)[mask])
        for warning in prepared["warnings"]:
            LOGGER.warning("sub-%s %s: %s", series.subject, series.label, warning)
        prepared["signals"] = _save(cwd / "signals.npy", signals)
        prepared["scheme"] = scheme_to_json(scheme)
        return {"prepared": prepared}


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


def _dwi_volumes(series: Series, signals: np.ndarray) -> list[DwiVolumes]:
    runs, start = [], 0
    for run in series.dwi_runs:
        bval, bvec = read_gradients(run.bval, run.bvec)
        timing = {
            name: _per_volume(getattr(run, name), len(bval))
            for name in ("big_delta", "small_delta", "echo_time")
        }
        runs.append(DwiVolumes(signals[start : start + len(bval)], bval, bvec, **timing))
        start += len(bval)
    return runs


def _per_volume(value: Sourced | None, n: int) -> np.ndarray | None:
    return None if value is None else np.broadcast_to(np.asarray(value.values, float), n)


def _b1(series: Series, reference: Any) -> np.ndarray:
    """Relative transmit field on the grid of the series, 1 where the map has no value."""
    assert series.b1_map is not None
    [(image, _)] = load_volumes([series.b1_map.image])
    resampled = resample_to(image, reference, order=1)
    b1 = np.asarray(resampled.dataobj, dtype=np.float32) * series.b1_map.factor
    return np.where(np.isfinite(b1) & (b1 > 0), b1, np.float32(1))


def _save(path: Path, array: np.ndarray) -> str:
    np.save(path, np.ascontiguousarray(array, dtype=np.float32))
    return str(path)
