"""The registry of signal models; nothing is imported before it is asked for."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Iterable

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Parameter, Reference, SignalModel
from bids_gacelle.engine.models.checks import check_declaration
from bids_gacelle.engine.models.function import signal_model

MODELS: dict[str, str] = {
    "r2star": "bids_gacelle.engine.models.r2star:R2Star",
    "despot1": "bids_gacelle.engine.models.despot1:Despot1",
    "r1r2star": "bids_gacelle.engine.models.r1r2star:R1R2Star",
    "gremwi": "bids_gacelle.engine.models.gremwi:GreMwi",
    "mcrmwi": "bids_gacelle.engine.models.mcrmwi:McrMwi",
    "mcmicro": "bids_gacelle.engine.models.mcmicro:McMicro",
    "nexi": "bids_gacelle.engine.models.nexi:Nexi",
    "nexidot": "bids_gacelle.engine.models.nexidot:NexiDot",
    "smex": "bids_gacelle.engine.models.smex:Smex",
    "sandi": "bids_gacelle.engine.models.sandi:Sandi",
    "sandix": "bids_gacelle.engine.models.sandix:Sandix",
    "axcalibersmt": "bids_gacelle.engine.models.axcalibersmt:AxCaliberSmt",
    "meaxcalibersmt": "bids_gacelle.engine.models.meaxcalibersmt:MeAxCaliberSmt",
    "axonalt2": "bids_gacelle.engine.models.axonalt2:AxonalT2",
}


ENTRY_POINTS = "bids_gacelle.models"

_used: dict[str, type[SignalModel]] = {}


def _registered() -> dict[str, str]:
    """Return our models and those other packages announce; our names cannot be taken over."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return MODELS | {e.name: e.value for e in found if e.name not in MODELS}


def list_models() -> tuple[str, ...]:
    """Return the names of all models: ours, those of entry points and of `use_models`."""
    return (*_registered(), *_used)


def use_models(models: Iterable[type[SignalModel]]) -> None:
    """Make model classes known by their names, in place of those of an earlier call.

    It holds for this process. Classes can be fitted without; this is for programs that choose
    models by name.

    Raises
    ------
    EngineError
        A declaration cannot be, or a name is taken, upper and lower case being the same.
    """
    found: dict[str, type[SignalModel]] = {}
    for model in models:
        check_declaration(model)
        taken = {name.lower(): name for name in (*_registered(), *found)}
        if model.name.lower() in taken:
            raise EngineError(
                f"The model name {model.name!r} is taken by {taken[model.name.lower()]!r}, which "
                "is already there; choose another."
            )
        found[model.name] = model
    _used.clear()
    _used.update(found)


def get_model(model: str | type[SignalModel]) -> type[SignalModel]:
    """Return a model class by its name; a class is returned as it is.

    Raises
    ------
    EngineError
        No model has this name.
    """
    if isinstance(model, type) and issubclass(model, SignalModel):
        return model
    if model in _used:
        return _used[str(model)]
    places = _registered()
    if model not in places:
        known = list_models()
        close = difflib.get_close_matches(str(model).lower(), known, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise EngineError(f"There is no model {model!r}; known are {', '.join(known)}.{hint}")
    return _load(str(model), places[str(model)])


def _load(name: str, place: str) -> type[SignalModel]:
    """Import a model class from its place, "module:Class"."""
    module, _, attribute = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        if name in MODELS:
            raise
        raise EngineError(
            f"The model {name!r} that an installed package announces as {place} cannot be loaded "
            f"({type(error).__name__}: {error}); mend or remove that package."
        ) from error
    if not (isinstance(found, type) and issubclass(found, SignalModel)):
        raise EngineError(
            f"The model {name!r} that an installed package announces as {place} is no "
            "SignalModel; a function needs @signal_model above it."
        )
    return found


__all__ = [
    "MODELS",
    "Parameter",
    "Reference",
    "SignalModel",
    "get_model",
    "list_models",
    "signal_model",
    "use_models",
]
