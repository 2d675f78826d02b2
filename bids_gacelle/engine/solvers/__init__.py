"""Solvers: one file each, found by name; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib

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
    if name not in SOLVERS:
        raise EngineError(f"There is no solver {name!r}; known are {', '.join(SOLVERS)}.")
    module, _, attribute = SOLVERS[name].partition(":")
    solver: Solver = getattr(importlib.import_module(module), attribute)
    return solver


__all__ = ["SOLVERS", "Problem", "Settings", "Solution", "Solver", "get_solver"]
