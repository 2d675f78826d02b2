"""The registry of signal models; nothing is imported before it is asked for."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Parameter, Reference, SignalModel

MODELS: dict[str, str] = {
    "r2star": "bids_gacelle.engine.models.r2star:R2Star",
    "despot1": "bids_gacelle.engine.models.despot1:Despot1",
    "mcmicro": "bids_gacelle.engine.models.mcmicro:McMicro",
    "nexi": "bids_gacelle.engine.models.nexi:Nexi",
    "axcalibersmt": "bids_gacelle.engine.models.axcalibersmt:AxCaliberSmt",
}


ENTRY_POINTS = "bids_gacelle.models"


def _registered() -> dict[str, str]:
    """Return our models and those other packages announce; our names cannot be taken over."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return MODELS | {e.name: e.value for e in found if e.name not in MODELS}


def list_models() -> tuple[str, ...]:
    """Return the names of all models, those of installed entry points included."""
    return tuple(_registered())


def get_model(model: str | type[SignalModel]) -> type[SignalModel]:
    """Return a model class by its name; a class is returned as it is.

    Raises
    ------
    EngineError
        No model has this name.
    """
    if isinstance(model, type) and issubclass(model, SignalModel):
        return model
    known = _registered()
    if model not in known:
        close = difflib.get_close_matches(str(model).lower(), known, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise EngineError(f"There is no model {model!r}; known are {', '.join(known)}.{hint}")
    module, _, name = known[str(model)].partition(":")
    found: type[SignalModel] = getattr(importlib.import_module(module), name)
    return found


__all__ = ["MODELS", "Parameter", "Reference", "SignalModel", "get_model", "list_models"]
