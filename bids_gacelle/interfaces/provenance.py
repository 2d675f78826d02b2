"""What a fit was made from, and how to say so: hashes, sources, methods text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bids_gacelle import __version__
from bids_gacelle.bids.dataset import bids_uri
from bids_gacelle.bids.series import Series, Sourced, to_json
from bids_gacelle.bids.sidecar import FitRecord, estimation_text
from bids_gacelle.interfaces.gradient_echo import uses_phases
from bids_gacelle.interfaces.model_files import model_file
from bids_gacelle.interfaces.units import map_units, prior_in_map_units
from bids_gacelle.settings import Settings

FIT_SETTINGS = (
    "solver",
    "noise",
    "loss",
    "prior",
    "precision",
    "random_seed",
    "b0_threshold",
    "phase_sign",
)
"""Settings that change the numbers in the maps."""


def input_files(series: Series) -> list[tuple[str, str]]:
    """(role, path) of every file that the maps of a series depend on."""
    if series.kind == "dwi":
        roles = []
        for i, run in enumerate(series.dwi_runs, 1):
            name = f"run {i}" if len(series.dwi_runs) > 1 else "run"
            parts = {"image": run.image, "bval": run.bval, "bvec": run.bvec}
            if run.bvec == run.bval:
                parts = {"image": run.image, "scheme": run.bval}
            if run.noise_map:
                parts["noise map"] = run.noise_map.image
            roles += [(f"dwi {name} {part}", path) for part, path in parts.items()]
    else:
        role = {"megre": "echo", "vfa": "flip angle"}[series.kind]
        if _echoes_per_flip(series) > 1:
            role = "image"
        roles = [(f"{role} {i}", path) for i, path in enumerate(series.images, 1)]
        if series.second is not None:
            part = {"phase": "phase", "imag": "imaginary part"}[series.second.part]
            roles += [(f"{role} {i} {part}", p) for i, p in enumerate(series.second.images, 1)]
    roles += [("mask", path) for path in series.mask.images]
    if series.b1_map is not None:
        roles.append(("B1 map", series.b1_map.image))
    roles += [(f"map of {name}", given.image) for name, given in series.voxel_maps.items()]
    if series.gradient_deviation is not None:
        roles.append(("gradient deviations", series.gradient_deviation.image))
    return roles


def input_digests(series: Series) -> list[list[str]]:
    """[role, SHA-256 of the content] of every file that the maps of a series depend on."""
    return [[role, _digest(path)] for role, path in input_files(series)]


def atlas_digests(series: Series) -> list[list[str]]:
    """Name, image and table (as SHA-256) of the atlases, which decide the ROI tables."""
    return [[a.name, *(_digest(p) for p in (a.image, a.table) if p)] for a in series.atlases]


def fit_hash(series: Series, model: str, settings: Settings, digests: list[list[str]]) -> str:
    """Digest of everything that decides the maps: inputs, metadata, options, version.

    Two runs with the same hash write the same maps (on the same kind of device). ``digests`` are
    those of `input_digests`.
    """
    asked = {name: getattr(settings, name) for name in FIT_SETTINGS}
    about = to_json(series)
    for key in ("images", "second", "dwi_runs", "atlases", "gradient_deviation"):
        about.pop(key)  # paths may differ between machines; the content below counts
    about["voxel_maps"] = sorted(series.voxel_maps)
    about["phase"] = (
        series.second.units if series.second and uses_phases(series, settings) else None
    )
    about["mask"] = about["mask"]["origin"]
    about["b1_map"] = series.b1_map.factor if series.b1_map else None
    about["timing"] = [
        [to_json(getattr(run, k)) for k in ("small_delta", "big_delta", "echo_time")]
        for run in series.dwi_runs
    ]
    content = {
        "model": model,
        "options": settings.model_options.get(model, {}),
        "settings": asked,
        "series": about,
        "files": digests,
        "version": __version__,
    }
    if given := model_file(model):
        content["model_file"] = given[1]
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sources(series: Series, datasets: dict[str, str]) -> list[str]:
    """BIDS URIs of the images the maps were computed from."""
    return [
        uri
        for role, uri, _ in listed_inputs(series, datasets)
        if not role.endswith((" bval", " bvec"))
    ]


def listed_inputs(series: Series, datasets: dict[str, str]) -> list[tuple[str, str, str]]:
    """(role, BIDS URI, path) of every input file."""
    return [(role, bids_uri(path, datasets), path) for role, path in input_files(series)]


def fit_record(
    series: Series,
    model: Any,
    settings: Settings,
    datasets: dict[str, str],
    fitted: dict[str, Any],
    digests: list[list[str]],
) -> FitRecord:
    """What all sidecars of one fit share."""
    columns = model.scheme.columns()
    done = fitted["settings"]
    done = {**done, "prior": prior_in_map_units(done.get("prior"), model)}
    units = map_units(model)
    shells = None
    if series.kind == "dwi":
        shells = {k: None if v is None else v.tolist() for k, v in columns.items()}
    return FitRecord(
        series=series,
        model=model.name,
        title=model.title,
        version=__version__,
        fit_hash=fit_hash(series, model.name, settings, digests),
        sources=sources(series, datasets),
        settings=done,
        bounds={p.name: units[p.name].pair(p.bounds) for p in model.parameters if not p.amplitude},
        reference=next((r.doi for r in model.references), ""),
        options=settings.model_options.get(model.name, {}),
        shells=shells,
        model_file=_model_file(model.name),
        echoes=None
        if series.kind == "dwi"
        else echoes_of(series, model, settings, fitted, datasets),
    )


def echoes_of(
    series: Series,
    model: Any,
    settings: Settings,
    fitted: dict[str, Any],
    datasets: dict[str, str],
) -> dict[str, Any]:
    """What the sidecars of gradient-echo maps say of the signals, in their words."""
    is_complex = model.n_measurements > len(model.scheme)
    found: dict[str, Any] = {"SignalFitted": "complex" if is_complex else "magnitude"}
    if is_complex:
        if series.second is not None and series.second.part == "phase":
            found["PhaseScaling"] = fitted.get("phase_unit")
        found["PhaseSign"] = (
            f"{settings.phase_sign}: the phase {_SIGNS[settings.phase_sign]} with echo time where "
            "the field is higher"
        )
    done = fitted["settings"].get("echoes", {})
    found["EchoWeights"] = done.get("weighting")
    found["ImplausibleVoxels"] = done.get("implausible")
    if (increment := spoiling(series, model)) is not None:
        found["SpoilingRFPhaseIncrement"] = increment.values[0]
        found["SpoilingRFPhaseIncrementSource"] = _entry("", increment, "")["sources"][0]
    if series.b1_map is not None and "b1" in model.voxel_inputs:
        found["B1Map"] = bids_uri(series.b1_map.image, datasets)
        found["B1MapFactor"] = series.b1_map.factor
    return found


def spoiling(series: Series, model: Any) -> Sourced | None:
    """The increment of the RF phase: that of the series, or what the model takes instead."""
    if series.spoiling_increment is not None or "spoiling_increment" not in model.options:
        return series.spoiling_increment
    value = float(model.chosen["spoiling_increment"])
    return Sourced((value,), "degrees", ("assumed (option of the model)",))


_SIGNS = {"positive": "grows", "negative": "falls"}


def acquisition(series: Series, model: Any) -> list[dict[str, Any]]:
    """Every acquisition value that the fit used, with the file or option it came from."""
    if series.kind != "dwi":
        fields = {
            "EchoTime": (series.echo_time, "s"),
            "FlipAngle": (series.flip_angle, "degrees"),
            "RepetitionTimeExcitation": (series.repetition_time, "s"),
            "MagneticFieldStrength": (series.field_strength, "T"),
            "SpoilingRFPhaseIncrement": (spoiling(series, model), "degrees"),
        }
        found = [_entry(k, v, unit) for k, (v, unit) in fields.items() if v is not None]
        if series.b1_map is not None:
            b1 = series.b1_map
            found.append(
                {
                    "name": "B1 map, multiplied by",
                    "unit": "1",
                    "values": [b1.factor],
                    "sources": [b1.source],
                }
            )
        return found
    columns = model.scheme.columns()
    of_shells = {"b": "ms/um^2", "big_delta": "ms", "small_delta": "ms", "echo_time": "s"}
    labels = {"b": "b", "big_delta": "Delta", "small_delta": "delta", "echo_time": "EchoTime"}
    found = []
    for key, unit in of_shells.items():
        if columns[key] is not None:
            origin = _dwi_sources(series, key)
            values = [float(f"{v:.6g}") for v in columns[key]]
            found.append({"name": labels[key], "unit": unit, "values": values, "sources": origin})
    if columns["n_directions"] is not None:
        bvecs = [Path(run.bvec).name for run in series.dwi_runs]
        # Where directions are weighted their effective number, which is no whole one.
        counts = [int(n) if n == int(n) else round(float(n), 1) for n in columns["n_directions"]]
        found.append({"name": "directions", "unit": "1", "values": counts, "sources": bvecs})
    return found


def methods_text(series: Series, model: Any, fitted: dict[str, Any], mask: dict[str, Any]) -> str:
    """The paragraph a paper needs, from what was really done."""
    done = fitted["settings"]
    images = _images_text(series, model)
    if series.kind == "dwi":
        images += " (each run normalised by its own mean b = 0 signal)"
        if not series.preprocessed:
            images += ", NOT corrected for motion, eddy currents or distortion"
    masked = {
        "option": "inside the given mask",
        "derivatives": "inside the brain mask of the derivatives",
        "quick": "inside a mask made from the signal itself",
    }[mask["origin"]]
    sigma = (
        "the noise estimated from repeated b = 0 images and residuals of the angular fit"
        if done.get("sigma") == "given"
        else "the residual variance of each voxel "
        f"({done.get('degrees_of_freedom')} degrees of freedom)"
    )
    noise_maps = [run.noise_map for run in series.dwi_runs]
    if done.get("sigma") == "given" and noise_maps and all(noise_maps):
        sigma = "the noise map"
    has_b1 = series.b1_map is not None and "b1" in model.voxel_inputs
    b1 = " Flip angles were corrected with the B1 map." if has_b1 else ""
    if series.gradient_deviation is not None and "bscale" in model.voxel_inputs:
        b1 = " The b-values of each voxel were corrected for gradient nonlinearity."
    deviations = done.get("note") or (
        "Standard deviations come from the inverse of the Gauss-Newton Hessian at the optimum and "
        f"{sigma}."
    )
    given = _model_file(model.name)
    origin = f" The model was defined by the user in {given}." if given else ""
    fitted_with = f"bids_gacelle {__version__} ({estimation_text(done)})"
    return (
        f"{model.title}: {model.description}{origin} The data were {images}; "
        f"{done['n_voxels']:,} voxels {masked} were fitted with {fitted_with}.{b1} "
        f"{deviations}"
    )


def _echoes_per_flip(series: Series) -> int:
    """How many echoes a flip angle of a series has at most; 1 of other kinds of series."""
    if series.kind != "vfa":
        return 1
    columns = [v.values for v in (series.flip_angle, series.repetition_time) if v is not None]
    return max(Counter(zip(*columns, strict=True)).values(), default=1)


def _images_text(series: Series, model: Any) -> str:
    """What was fitted, in words."""
    if series.kind == "dwi":
        return f"{len(model.scheme)} diffusion shells"
    n, is_complex = len(model.scheme), model.n_measurements > len(model.scheme)
    part = "complex" if is_complex else "magnitude"
    if series.kind == "megre":
        text = f"the {part} signals of {n} gradient echoes"
    else:
        flips = len(set(model.scheme.flip_angle.tolist()))
        text = f"{n} {part} images of spoiled gradient echoes at {flips} flip angles"
    if is_complex:
        text += (
            " (the field of each flip angle and one initial phase, estimated from the echoes, "
            "were taken out before)"
        )
    return text


def _model_file(name: str) -> str:
    """Name and digest of the user's file that defines a model, "" for installed ones."""
    given = model_file(name)
    return f"{Path(given[0]).name} (SHA-256 {given[1]})" if given else ""


def _entry(name: str, value: Sourced, unit: str) -> dict[str, Any]:
    origin = [Path(s).name if "/" in s else s for s in value.sources]
    return {"name": name, "unit": unit, "values": list(value.values), "sources": origin}


def _dwi_sources(series: Series, key: str) -> list[str]:
    if key == "b":
        return [Path(run.bval).name for run in series.dwi_runs]
    values: Iterable[Sourced | None] = (getattr(run, key) for run in series.dwi_runs)
    return list(dict.fromkeys(s for v in values if v is not None for s in v.sources))


def _digest(path: str) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
