"""Solvers: one file each, found by name; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.solvers.base import Problem, Settings, Solution, Solver

SOLVERS: dict[str, str] = {
    "lm": "bids_gacelle.engine.solvers.lm:LM",
    "adam": "bids_gacelle.engine.solvers.adam:ADAM",
    "sgdm": "bids_gacelle.engine.solvers.adam:SGDM",
    "rmsprop": "bids_gacelle.engine.solvers.adam:RMSPROP",
    "linear": "bids_gacelle.engine.solvers.linear:LINEAR",
}


def get_solver(name: str) -> Solver:
    """Return a solver by its name.

    Raises
    ------
    EngineError
        No solver has this name.
    """
    if not isinstance(name, str) or name not in SOLVERS:
        raise EngineError(f"There is no solver {name!r}; known are {', '.join(SOLVERS)}.")
    module, _, attribute = SOLVERS[name].partition(":")
    solver: Solver = getattr(importlib.import_module(module), attribute)
    return solver


def solver_options(name: str) -> list[str]:
    """Return the names of a solver's options: the fields of its settings that users may set."""
    return settings_options(get_solver(name).settings)


def settings_options(settings: type[Settings]) -> list[str]:
    """Return the names of the fields of settings that users may set."""
    decided_by_fit = ("starts", "seed", "compiled", "compiled_fully")
    return [f.name for f in fields(settings) if f.name not in decided_by_fit]


def check_solver_options(name: str, options: Mapping[str, Any]) -> None:
    """Check values of a solver's options, and of `starts`; no data are needed.

    Raises
    ------
    EngineError
        A value is of the wrong type or outside its limits.
    """
    get_solver(name).settings(**options)


__all__ = [
    "SOLVERS",
    "Problem",
    "Settings",
    "Solution",
    "Solver",
    "check_solver_options",
    "get_solver",
    "settings_options",
    "solver_options",
]
