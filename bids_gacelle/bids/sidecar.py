"""The JSON beside each output: what it is, from what, how it was estimated.

Built from plain values only; nothing here reads files or knows the engine. Times are in the units
of BIDS (seconds), b-values in ms/um^2 with their unit stated, because that is what was fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bids_gacelle.bids.names import FLAGS, STATISTICS
from bids_gacelle.bids.series import Series, Sourced

TABLE_COLUMNS = {
    "index": "Label in the segmentation",
    "name": "Name of the region",
    "hemi": "Hemisphere (L, R) where the name says so",
    "model": "Model",
    "param": "Parameter, as in the name of its map",
    "unit": "Unit of the parameter; that of all statistics but cov, coverage and the counts",
    "mean": "Mean",
    "std": "Standard deviation over the voxels of the region (n - 1)",
    "median": "Median",
    "iqr": "Interquartile range",
    "cov": "Coefficient of variation: standard deviation over the absolute mean",
    "q05": "5 % quantile",
    "q95": "95 % quantile",
    "min": "Minimum",
    "max": "Maximum",
    "n_voxels": "Voxels of the region in the segmentation",
    "n_valid": "Voxels of the region that have an estimate; the statistics are over these",
    "coverage": "n_valid over n_voxels",
    "at_bound": "Share of the valid voxels where the parameter is at a bound of the fit",
    "weighted_mean": "Mean weighted by 1/sd^2, over the valid voxels that have one",
}
"""Columns of the ROI tables, in order, and their meaning."""

_SOLVERS = {
    "lm": "Levenberg-Marquardt",
    "adam": "Adam",
    "sgdm": "gradient descent with momentum",
    "rmsprop": "RMSProp",
    "linear": "linear least squares",
}
_COUNTS = ("n_voxels", "n_valid")
_RATIOS = ("cov", "coverage", "at_bound")


@dataclass(frozen=True)
class FitRecord:
    """What the sidecars of one model on one series have in common.

    ``settings`` is what the engine reports of the fit: solver, noise, loss, prior, starts, device,
    precision, seed, n_voxels, at_bound (share per parameter); whatever is absent is left out.
    ``shells`` describes what a diffusion model was fitted to: ``b`` (ms/um^2), ``big_delta`` and
    ``small_delta`` (ms), ``echo_time`` (s), each with one entry per shell or None.
    """

    series: Series
    model: str
    title: str
    version: str
    fit_hash: str
    sources: Sequence[str]
    settings: Mapping[str, Any]
    bounds: Mapping[str, tuple[float, float]]
    reference: str = ""
    """DOI of the model's paper, as ``doi:10...`` or bare."""
    options: Mapping[str, Any] = field(default_factory=dict)
    shells: Mapping[str, Sequence[float] | None] | None = None
    echoes: Mapping[str, Any] | None = None
    """Further fields on gradient-echo signals: parts, phase, weights, spoiling, B1 map."""
    model_file: str = ""
    """Name and digest of the user's file that defines the model, "" for installed ones."""


def map_sidecar(
    record: FitRecord, *, parameter: str, description: str, unit: str, statistic: str = ""
) -> dict[str, Any]:
    """Sidecar of one map (spec BIDS 1.11.1, derivatives/imaging; BEP016 for ``Model``).

    Parameters
    ----------
    parameter : str
        As in Python, for the count of voxels at its bound.
    description : str
        Of the parameter ("Neurite signal fraction").
    unit : str
        CMIXF spelling ("um^2/ms", "1/s", "1").
    statistic : str
        "" for the estimate itself, else a key of `names.STATISTICS`.
    """
    settings = record.settings
    meaning = f"{STATISTICS[statistic]}: " if statistic else ""
    sidecar = {
        "Description": f"{meaning}{description}, {record.title}",
        "Units": unit,
        "SkullStripped": True,
        **_provenance(record),
        "EstimationAlgorithm": estimation_text(settings),
        "EstimationReference": _doi(record.reference),
        "Model": _model(record),
        **_acquisition(record),
        **(record.echoes or {}),
        **_preprocessing(record.series),
        "FitDevice": settings.get("device"),
        "FitPrecision": settings.get("precision"),
        "RandomSeed": settings.get("seed"),
        "NoiseModel": settings.get("noise"),
        "VoxelsFitted": settings.get("n_voxels"),
        "VoxelsAtBound": _voxels_at_bound(settings, parameter),
        "CramerRaoBound": None if statistic else _expected(settings, parameter),
        "FitHash": record.fit_hash,
        "Version": record.version,
    }
    return {key: value for key, value in sidecar.items() if value not in (None, "")}


def mask_sidecar(record: FitRecord, *, origin: str) -> dict[str, Any]:
    """Sidecar of the mask of fitted voxels; ``origin`` is that of the Series' mask."""
    made = {
        "option": "the mask given with --mask",
        "derivatives": "the brain mask of the derivatives",
        "quick": "a mask from the image intensities, made here and rough",
    }
    return {
        "Description": f"Voxels fitted, {record.title}: {made[origin]} where signals are usable",
        "Type": "ROI",
        **_provenance(record),
        "Version": record.version,
    }


def flag_sidecar(record: FitRecord) -> dict[str, Any]:
    """Sidecar of the flag map."""
    bits = ", ".join(f"{bit} {meaning}" for bit, meaning in FLAGS.items())
    return {
        "Description": f"What limits the fit of each voxel, {record.title}; sum of: {bits}",
        **_provenance(record),
        "Version": record.version,
    }


def table_sidecar(record: FitRecord, *, segmentation: str, units: Mapping[str, str]) -> dict:
    """Sidecar of an ROI table.

    Parameters
    ----------
    segmentation : str
        URI of the segmentation.
    units : mapping
        Parameter -> unit.
    """
    columns: dict[str, dict[str, Any]] = {
        name: {"Description": meaning} for name, meaning in TABLE_COLUMNS.items()
    }
    for name in _RATIOS:
        columns[name]["Units"] = "1"
    for name in _COUNTS:
        columns[name]["Units"] = "voxels"
    columns["unit"]["Levels"] = {name: f"{name} in {unit}" for name, unit in units.items()}
    return {**columns, "Sources": [segmentation, *record.sources], "Version": record.version}


def estimation_text(settings: Mapping[str, Any]) -> str:
    """Say in words how the parameters were estimated ("Levenberg-Marquardt, ...")."""
    solver = str(settings.get("solver", ""))
    words = [_SOLVERS.get(solver, solver)]
    if solver != "linear":
        prior = settings.get("prior")
        likelihood = settings.get("loss", "l2") == "l2"
        if prior:
            words.append("maximum a posteriori")
        elif likelihood:
            words.append("maximum likelihood")
        words.append(f"{settings.get('noise', 'gaussian')} noise".capitalize())
        if (loss := settings.get("loss", "l2")) != "l2":
            words.append(f"{loss} loss")
        if prior:
            words.append(f"{prior} prior" if isinstance(prior, str) else "prior as given in Model")
        if starts := settings.get("starts"):
            words.append(f"{starts} start" + "s" * (starts > 1))
    return ", ".join(word for word in words if word)


def _provenance(record: FitRecord) -> dict[str, Any]:
    series = record.series
    found: dict[str, Any] = {"Sources": list(record.sources)}
    if "space" in series.entities:
        # required unless the space is a standard one; without a named reference, the fitted image
        # itself is what the maps are aligned with
        reference = series.spatial_reference or next(iter(record.sources), "")
        found |= {"SpatialReference": reference} if reference else {}
    if "res" in series.entities:
        found["Resolution"] = series.metadata.get("Resolution", "That of the fitted images")
    return found


def _model(record: FitRecord) -> dict[str, Any]:
    parameters = {
        "Bounds": {name: list(bounds) for name, bounds in record.bounds.items()},
        "Prior": record.settings.get("prior"),
        "Starts": record.settings.get("starts"),
        "Loss": record.settings.get("loss"),
        **record.options,
    }
    about = {"Name": record.model, "Description": record.title, "Parameters": parameters}
    return about | ({"File": record.model_file} if record.model_file else {})


def _acquisition(record: FitRecord) -> dict[str, Any]:
    series = record.series
    found: dict[str, Any] = {k: v for k, v in series.metadata.items() if k != "Resolution"}
    found["EchoTime"] = _constant(series.echo_time)
    found["FlipAngle"] = _constant(series.flip_angle)
    repetition = _constant(series.repetition_time)
    # BIDS allows this field one number only
    key = "RepetitionTimeExcitation" + ("PerImage" if isinstance(repetition, list) else "")
    found[key] = repetition
    if series.field_strength is not None:
        found["MagneticFieldStrength"] = _constant(series.field_strength)
    found["SpoilingRFPhaseIncrement"] = _constant(series.spoiling_increment)
    if record.shells is not None:
        shells = {name: _listed(values) for name, values in record.shells.items()}
        found["BValues"] = shells.get("b")
        found["BValueUnits"] = "ms/um^2"
        for name, field_name in (("small_delta", "SmallDelta"), ("big_delta", "BigDelta")):
            if values := shells.get(name):
                found[field_name] = [_seconds(value) for value in values]
        if times := shells.get("echo_time"):
            found["EchoTime"] = times[0] if len(set(times)) == 1 else times
    return found


def _preprocessing(series: Series) -> dict[str, Any]:
    if series.kind != "dwi":
        return {}
    if series.preprocessed:
        return {"Preprocessed": True}
    return {
        "Preprocessed": False,
        "PreprocessingNote": (
            "Fitted to raw diffusion images: not corrected for motion, eddy currents or "
            "susceptibility distortion."
        ),
    }


def _constant(values: Sourced | None) -> float | list[float] | None:
    """One number where all images agree, else one per image."""
    if values is None:
        return None
    return values.values[0] if len(set(values.values)) == 1 else list(values.values)


def _listed(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _seconds(milliseconds: float) -> float:
    # 13 ms is 0.013 s and not 0.013000000000000001
    return float(f"{milliseconds / 1000:.12g}")


def _voxels_at_bound(settings: Mapping[str, Any], parameter: str) -> int | None:
    share = settings.get("at_bound", {}).get(parameter)
    if share is None or settings.get("n_voxels") is None or not math.isfinite(share):
        return None
    return round(share * settings["n_voxels"])


def _expected(settings: Mapping[str, Any], parameter: str) -> dict[str, Any] | None:
    """What the protocol was expected to tell of a parameter, by typical tissue."""
    found = settings.get("adequacy") or {}
    rows = [row for row in found.get("expected", ()) if row["parameter"] == parameter]
    if not rows:
        return None
    return {
        "Description": "Smallest standard deviation of an unbiased estimate of one voxel",
        "SNR": found["snr"],
        "SNRAssumed": found["assumed"],
        "Units": rows[0]["unit"],
        "StandardDeviation": {row["tissue"]: row["sd"] for row in rows},
        "Verdict": {row["tissue"]: row["verdict"] for row in rows if row["verdict"]},
    }


def _doi(reference: str) -> str:
    bare = reference.removeprefix("https://doi.org/").removeprefix("doi:")
    return f"doi:{bare}" if bare else ""
