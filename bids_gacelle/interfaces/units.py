"""The one place that decides in which unit a quantity of a model is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bids_gacelle.engine import Parameter, SignalModel
from bids_gacelle.engine.physics.phase import GYROMAGNETIC_RATIO


class MapUnit(NamedTuple):
    """Unit of a map, and what a value of the engine is multiplied by to be in it."""

    unit: str
    factor: float

    def pair(self, values: tuple[float, float]) -> tuple[float, float]:
        """A window or bounds in this unit."""
        return float(self.factor * values[0]), float(self.factor * values[1])


def map_unit(parameter: Parameter, field_strength: float | None) -> MapUnit:
    """The unit of the map of a parameter, of images at a field strength in T.

    It is that of the engine, but for two: what BIDS says is a percentage (MWFmap), and
    frequencies, which the engine has in ppm of the field and maps in Hz.
    """
    if parameter.suffix == "MWFmap" and parameter.unit == "1":
        return MapUnit("percent", 100.0)
    if parameter.unit == "ppm" and parameter.suffix != "Chimap" and field_strength is not None:
        return MapUnit("Hz", GYROMAGNETIC_RATIO * field_strength)
    return MapUnit(parameter.unit, 1.0)


def map_units(model: SignalModel) -> dict[str, MapUnit]:
    """The units of the maps of all parameters and derived quantities, by name."""
    column = getattr(model.scheme, "field_strength", None)
    field = None if column is None else float(column[0])
    return {p.name: map_unit(p, field) for p in (*model.parameters, *model.derived)}


def in_map_units(values: Mapping[str, Any], model: SignalModel) -> dict[str, Any]:
    """Values by name of parameter, numbers or arrays, in the units of the maps."""
    units = map_units(model)
    return {k: np.asarray(v) * units[k].factor for k, v in values.items()}


def prior_in_map_units(prior: Any, model: SignalModel) -> Any:
    """The prior as `FitResult.settings` describes it, in the units of the maps."""
    if not isinstance(prior, Mapping):
        return prior
    units, found = map_units(model), {}
    for name, about in prior.items():
        factor, of = units[name].factor, dict(about)
        if factor != 1 and isinstance(of["mean"], float):
            log = of["coordinate"] == "log"
            of["mean"] = of["mean"] + float(np.log(factor)) if log else of["mean"] * factor
        if factor != 1 and isinstance(of["sd"], float) and of["coordinate"] != "log":
            of["sd"] *= factor
        found[name] = of
    return found
