"""What the report draws of a fit: single voxels and tissues, data with smooth curves through."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from bids_gacelle.engine import EngineError, FitResult
from bids_gacelle.engine.prepare import unevenness
from bids_gacelle.interfaces.units import in_map_units, map_units

CURVE_POINTS = 80
UNUSABLE = 4 | 8 | 32
"""Flags of voxels that are not shown as examples: no estimate to show."""

MOST_VOXELS = 1000
"""Voxels that stand for a tissue; evenly taken from all of them."""

FEWEST_VOXELS = 5

ALL_VOXELS = "all voxels"
"""Where no segmentation tells tissues apart."""


class Smooth(NamedTuple):
    """A model of a finely sampled acquisition like that of one group of measurements.

    Attributes
    ----------
    group
        As in `plot_axes`.
    x
        What the curve is drawn over.
    model, rows
        The model, and which of its measurements belong to the curve.
    """

    group: str
    x: np.ndarray
    model: Any
    rows: slice


def plot_axes(model: Any) -> dict[str, Any]:
    """Abscissa, labels and group of every measurement of a model."""
    scheme = model.scheme
    parts = model.n_measurements // len(scheme)
    name, per_unit, label = _abscissa(model)
    if model.kind == "dwi":
        shells = timing_groups(scheme)
        labels = [f"S{2 * k} {g}".strip() if k else g for k in range(parts) for g in shells]
    else:
        trains = train_groups(scheme) if name == "echo_time" else [""] * len(scheme)
        words = ("real", "imaginary") if parts == 2 else ("",)
        labels = [", ".join(filter(None, (g, part))) for part in words for g in trains]
    return {
        "x": np.tile(scheme.columns()[name] * per_unit, parts).tolist(),
        "x_label": label,
        "y_label": "Signal relative to b = 0" if model.kind == "dwi" else "Signal",
        "groups": labels,
    }


def _abscissa(model: Any) -> tuple[str, float, str]:
    """Column of the scheme that signals are drawn over, factor to the unit drawn, and label."""
    if model.kind == "dwi":
        return "b", 1.0, "b (ms/um^2)"
    if model.scheme.echo_time is not None and np.bincount(model.scheme.excitations()[0]).max() > 1:
        return "echo_time", 1000.0, "Echo time (ms)"
    return "flip_angle", 1.0, "Flip angle (degrees)"


def train_groups(scheme: Any) -> list[str]:
    """What sets the images of each echo train apart: flip angle, and TR where it differs."""
    trains, _ = scheme.excitations()
    if trains.max() == 0:
        return [""] * len(scheme)
    words: list[list[str]] = [[] for _ in range(len(scheme))]
    for name, form, factor in (
        ("flip_angle", "{:g}°", 1.0),
        ("repetition_time", "TR {:g} ms", 1e3),
    ):
        values = scheme.columns()[name]
        if values is not None and (name == "flip_angle" or np.ptp(values) > 0):
            for entry, value in zip(words, values, strict=True):
                entry.append(form.format(value * factor))
    return [", ".join(entry) for entry in words]


def timing_groups(scheme: Any) -> list[str]:
    """What sets each measurement apart besides b: Delta, and delta and TE where they differ."""
    columns = scheme.columns()
    words: list[list[str]] = [[] for _ in range(len(scheme))]
    for name, label, factor in (
        ("big_delta", "Δ", 1.0),
        ("small_delta", "δ", 1.0),
        ("echo_time", "TE", 1000.0),
    ):
        values = columns.get(name)
        if "big_delta" not in columns or values is None:  # gradient echoes have no groups
            continue
        if name == "big_delta" or np.ptp(values) > 1e-9:
            for entry, value in zip(words, values, strict=True):
                entry.append(f"{label} {value * factor:.4g} ms")
    return [", ".join(entry) for entry in words]


def gradient_table(scheme: Any, directions: list[Any]) -> list[dict[str, Any]]:
    """The shells of a dwi series as the report draws them.

    Parameters
    ----------
    scheme : DiffusionScheme
    directions : unit vectors (n, 3) of each shell that is not b=0, in order
    """
    columns = {k: v for k, v in scheme.columns().items() if v is not None}
    weighted = np.flatnonzero(scheme.b > 0)
    groups = timing_groups(scheme)
    return [
        {
            **{k: float(f"{v[i]:.6g}") for k, v in columns.items()},
            "group": groups[i],
            "directions": vectors,
            "unevenness": float(f"{unevenness(np.asarray(vectors)):.3g}"),
        }
        for i, vectors in zip(weighted, directions, strict=True)
    ]


def example_voxels(
    model: Any,
    data: np.ndarray,
    inputs: dict[str, np.ndarray],
    result: FitResult,
    mask: np.ndarray,
) -> list[dict[str, Any]]:
    """The best, the median and the worst fitted voxel by NRMSE, with data and fit.

    Parameters
    ----------
    data : ndarray, shape (measurements, voxels)
    mask : ndarray of bool, shape (x, y, z)
        Its true voxels, in C order, are the voxels of ``data`` and ``result``.
    """
    shown = np.flatnonzero(((result.flags & UNUSABLE) == 0) & np.isfinite(result.nrmse))
    if not len(shown):
        return []
    ordered = shown[np.argsort(result.nrmse[shown], kind="stable")]
    picks = {"best": ordered[0], "median": ordered[len(ordered) // 2], "worst": ordered[-1]}
    grid, smooth = np.argwhere(mask), smooth_models(model)
    examples = []
    for label, voxel in picks.items():
        one = {k: v[voxel : voxel + 1] for k, v in inputs.items() if k in model.voxel_inputs}
        values = {k: result.maps[k][voxel : voxel + 1] for k in model.parameter_names}
        examples.append(
            {
                "label": label,
                "voxel": grid[voxel].tolist(),
                "data": np.asarray(data[:, voxel], float).tolist(),
                "fit": _signal(model, values, one)[:, 0].tolist(),
                "curves": _curves(smooth, values, one),
                "values": _at(result.maps, voxel, model),
                "std": _at(result.std, voxel, model),
                "nrmse": float(result.nrmse[voxel]),
            }
        )
    return examples


def _at(maps: dict[str, np.ndarray], voxel: int, model: Any) -> dict[str, float]:
    """Values of a voxel in the units of the maps."""
    values = {k: float(v[voxel]) for k, v in maps.items()}
    return {k: float(v) for k, v in in_map_units(values, model).items()}


def decays(
    model: Any,
    data: np.ndarray,
    inputs: dict[str, np.ndarray],
    fit: dict[str, np.ndarray],
    tissues: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """Signals and fits of whole tissues.

    The fit of a tissue is the median over its voxels of the signal that the model predicts with
    each voxel's own parameters: a model of the median parameters would be no fit of any data.

    Parameters
    ----------
    data : ndarray, shape (measurements, voxels)
    fit : arrays over the voxels, as `interfaces.fit.load_fit` gives them
    tissues : ndarray of bool, shape (voxels,), by name

    Returns
    -------
    list of dict
        name, n_voxels (with an estimate), n_shown, data (median, q25, q75), fit, and curves (as
        in `example_voxels`); tissues of fewer than 5 voxels are left out.
    """
    usable = (fit["flags"] & UNUSABLE) == 0
    usable &= np.logical_and.reduce([np.isfinite(fit[f"map_{k}"]) for k in model.parameter_names])
    smooth = smooth_models(model)
    found = []
    for name, inside in tissues.items():
        voxels = np.flatnonzero(inside & usable)
        if len(voxels) < FEWEST_VOXELS:
            continue
        shown = voxels[:: -(-len(voxels) // MOST_VOXELS)]
        values = {k: fit[f"map_{k}"][shown] for k in model.parameter_names}
        extra = {k: v[shown] for k, v in inputs.items() if k in model.voxel_inputs}
        q25, median, q75 = np.percentile(np.asarray(data[:, shown], float), [25, 50, 75], axis=1)
        found.append(
            {
                "name": name,
                "n_voxels": len(voxels),
                "n_shown": len(shown),
                "median": median.tolist(),
                "q25": q25.tolist(),
                "q75": q75.tolist(),
                "fit": np.median(_signal(model, values, extra), axis=1).tolist(),
                "curves": _curves(smooth, values, extra),
            }
        )
    return found


def obtained_sd(
    model: Any, fit: dict[str, np.ndarray], tissues: dict[str, np.ndarray]
) -> dict[str, dict[str, list[float]]]:
    """Median standard deviation in the map, and the share of voxels that have one.

    By tissue and quantity, in the units of the maps; of an amplitude relative to its value.
    """
    found: dict[str, dict[str, list[float]]] = {}
    units = map_units(model)
    for name, inside in tissues.items():
        found[name] = {}
        for about in (*model.parameters, *model.derived):
            spread = fit[f"std_{about.name}"][inside] * units[about.name].factor
            if about.amplitude:
                size = np.abs(fit[f"map_{about.name}"][inside])
                spread = spread / np.where(size > 0, size, np.nan)
            known = spread[np.isfinite(spread)]
            if known.size:
                share = known.size / spread.size
                found[name][about.name] = [float(np.median(known)), float(share)]
    return found


def _signal(
    model: Any, values: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
) -> np.ndarray:
    """Signals (measurements, voxels) of parameters (voxels,)."""
    params = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in values.items()}
    extra = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in inputs.items()}
    return model.signal(params, extra).numpy()


def smooth_models(model: Any) -> list[Smooth]:
    """One finely sampled model per group of measurements; none where the model refuses it."""
    groups = plot_axes(model)["groups"]
    found = []
    dense = _dense_echoes if _abscissa(model)[0] == "echo_time" else _dense
    for group in dict.fromkeys(groups):
        scheme, x, rows = dense(model, [i for i, g in enumerate(groups) if g == group])
        try:
            found.append(Smooth(group, x, model.like(scheme), rows))
        except EngineError:
            continue  # a model may refuse what was not measured, which must not cost the maps
    return found


def _curves(
    smooth: list[Smooth], values: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Smooth curves of the fitted model, medians over the voxels, one per group."""
    return [
        {
            "group": each.group,
            "x": each.x.tolist(),
            "y": np.median(_signal(each.model, values, inputs)[each.rows], axis=1).tolist(),
        }
        for each in smooth
    ]


def _dense(model: Any, members: list[int]) -> tuple[Any, np.ndarray, slice]:
    """A finely sampled scheme like that of some measurements, its abscissa, its rows."""
    scheme, n = model.scheme, CURVE_POINTS
    order, entry = divmod(members[0], len(scheme))
    columns = {k: None if v is None else np.full(n, v[entry]) for k, v in scheme.columns().items()}
    name, per_unit, _ = _abscissa(model)
    dense = _up_to(max(scheme.columns()[name][i % len(scheme)] for i in members))
    return (
        type(scheme)(**{**columns, name: dense}),
        dense * per_unit,
        slice(order * n, (order + 1) * n),
    )


def _dense_echoes(model: Any, members: list[int]) -> tuple[Any, np.ndarray, slice]:
    """Echo trains of many echoes in place of all that there are, as a model may need them all."""
    scheme, n = model.scheme, CURVE_POINTS
    trains, _ = scheme.excitations()
    part, entry = divmod(members[0], len(scheme))
    firsts = np.unique(trains, return_index=True)[1]
    columns = {
        k: None if v is None else np.repeat(v[firsts], n) for k, v in scheme.columns().items()
    }
    dense = [_up_to(scheme.echo_time[trains == g].max()) for g in range(len(firsts))]
    begin = (part * len(firsts) + trains[entry]) * n
    return (
        type(scheme)(**{**columns, "echo_time": np.concatenate(dense)}),
        dense[trains[entry]] * 1000.0,
        slice(begin, begin + n),
    )


def _up_to(largest: float) -> np.ndarray:
    top = 1.05 * largest
    return np.linspace(top / (20 * CURVE_POINTS), top, CURVE_POINTS)
