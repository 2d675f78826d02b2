"""What the report draws of single voxels: the data, the fit, and a smooth curve through it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bids_gacelle.engine import EngineError, FitResult

CURVE_POINTS = 80
ABSCISSA = {"megre": ("echo_time", 1000.0), "vfa": ("flip_angle", 1.0), "dwi": ("b", 1.0)}
"""Column of the scheme that signals are drawn over, and its factor to the unit drawn."""

UNUSABLE = 4 | 8 | 32
"""Flags of voxels that are not shown as examples: no estimate to show."""


def plot_axes(model: Any) -> dict[str, Any]:
    """Abscissa, labels and group of every measurement of a model."""
    scheme = model.scheme
    name, per_unit = ABSCISSA[model.kind]
    orders = model.n_measurements // len(scheme)
    shells = [_group(scheme, i) for i in range(len(scheme))]
    labels = [f"S{2 * k} {g}".strip() if k else g for k in range(orders) for g in shells]
    return {
        "x": np.tile(scheme.columns()[name] * per_unit, orders).tolist(),
        "x_label": {
            "megre": "Echo time (ms)",
            "vfa": "Flip angle (degrees)",
            "dwi": "b (ms/um^2)",
        }[model.kind],
        "y_label": "Signal relative to b = 0" if model.kind == "dwi" else "Signal",
        "groups": labels,
    }


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
    grid = np.argwhere(mask)
    examples = []
    for label, voxel in picks.items():
        one = {k: v[voxel : voxel + 1] for k, v in inputs.items() if k in model.voxel_inputs}
        values = {name: float(result.maps[name][voxel]) for name in model.parameter_names}
        examples.append(
            {
                "label": label,
                "voxel": grid[voxel].tolist(),
                "data": np.asarray(data[:, voxel], float).tolist(),
                "fit": _signal(model, values, one).tolist(),
                "curves": _curves(model, values, one),
                "values": {k: float(v[voxel]) for k, v in result.maps.items()},
                "std": {k: float(v[voxel]) for k, v in result.std.items()},
                "nrmse": float(result.nrmse[voxel]),
            }
        )
    return examples


def _group(scheme: Any, entry: int) -> str:
    """What sets a measurement apart besides the abscissa: its diffusion time."""
    big_delta = scheme.columns().get("big_delta")
    return "" if big_delta is None else f"Δ {big_delta[entry]:g} ms"


def _signal(model: Any, values: dict[str, float], inputs: dict[str, np.ndarray]) -> np.ndarray:
    params = {k: torch.tensor([v], dtype=torch.float64) for k, v in values.items()}
    extra = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in inputs.items()}
    return model.signal(params, extra)[:, 0].numpy()


def _curves(
    model: Any, values: dict[str, float], inputs: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Smooth curves of the fitted model, one per group of `plot_axes`."""
    axes = plot_axes(model)
    groups = list(dict.fromkeys(axes["groups"]))
    curves = []
    for group in groups:
        members = [i for i, g in enumerate(axes["groups"]) if g == group]
        scheme, x, rows = _dense(model, members)
        try:
            dense = type(model)(scheme, **{name: getattr(model, name) for name in model.options})
            y = _signal(dense, values, inputs)[rows]
        except EngineError:
            continue  # a model may refuse what was not measured, which must not cost the maps
        curves.append({"group": group, "x": x.tolist(), "y": y.tolist()})
    return curves


def _dense(model: Any, members: list[int]) -> tuple[Any, np.ndarray, slice]:
    """A finely sampled scheme like that of some measurements, its abscissa, its rows."""
    scheme, n = model.scheme, CURVE_POINTS
    order, entry = divmod(members[0], len(scheme))
    columns = {k: None if v is None else np.full(n, v[entry]) for k, v in scheme.columns().items()}
    name, per_unit = ABSCISSA[model.kind]
    measured = scheme.columns()[name]
    top = 1.05 * max(measured[i % len(scheme)] for i in members)
    dense = np.linspace(top / (20 * n), top, n)
    return (
        type(scheme)(**{**columns, name: dense}),
        dense * per_unit,
        slice(order * n, (order + 1) * n),
    )
