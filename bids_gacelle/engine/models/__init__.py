"""The registry of signal models; nothing is imported before it is asked for."""

from __future__ import annotations

import difflib
import importlib

from bids_gacelle.engine.models.base import Parameter, Reference, SignalModel

MODELS: dict[str, str] = {
    "r2star": "bids_gacelle.engine.models.r2star:R2Star",
    "despot1": "bids_gacelle.engine.models.despot1:Despot1",
    "mcmicro": "bids_gacelle.engine.models.mcmicro:McMicro",
    "nexi": "bids_gacelle.engine.models.nexi:Nexi",
}


def list_models() -> tuple[str, ...]:
    """Return the names of all models."""
    return tuple(MODELS)


def get_model(model: str | type[SignalModel]) -> type[SignalModel]:
    """Return a model class by its name; a class is returned as it is.

    Raises
    ------
    ValueError
        No model has this name.
    """
    if isinstance(model, type) and issubclass(model, SignalModel):
        return model
    if model not in MODELS:
        close = difflib.get_close_matches(str(model).lower(), MODELS, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no model {model!r}; known are {', '.join(MODELS)}.{hint}")
    module, _, name = MODELS[str(model)].partition(":")
    found: type[SignalModel] = getattr(importlib.import_module(module), name)
    return found


__all__ = ["MODELS", "Parameter", "Reference", "SignalModel", "get_model", "list_models"]
