"""What every solver takes and gives back."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import Kernel, Voxels


def within(interval: str, default: float | None) -> Any:
    """Return a field of settings whose values are limited, as in ``within("[0, 1)", 0.9)``."""
    return field(default=default, metadata={"interval": interval})


# Measurements and state of a voxel up to which twice as many fit the cache of a core.
_SMALL = 44
# More threads than these have too little to do in the last steps of a block.
_MOST_THREADS = 4


@dataclass(frozen=True)
class Settings:
    """What all solvers can be told; the fields, and those a solver adds, are `fit(options=...)`.

    Attributes
    ----------
    starts
        Number of starts of every voxel.
    seed
        Seed of everything random.
    dictionary
        Number of entries of the start dictionary.
    lanes
        Number of voxels worked on at once; None: what suits the device.
    compiled, compiled_fully
        Whether to compile the step; also what comes before and after all steps.
    """

    starts: int = within("[1, inf)", 1)
    seed: int = 0
    dictionary: int = within("[1, inf)", 512)
    lanes: int | None = within("[1, inf)", None)
    compiled: bool = False
    compiled_fully: bool = False

    def __post_init__(self) -> None:
        """Check types and limits.

        Raises
        ------
        EngineError
            A value is of the wrong type or outside its limits.
        """
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            _check(f, hints[f.name], getattr(self, f.name))


def _check(option: Field[Any], hint: Any, value: object) -> None:
    optional = isinstance(hint, types.UnionType)
    if optional:
        if value is None:
            return
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    interval = option.metadata.get("interval", "")
    if typing.get_origin(hint) is typing.Literal:
        allowed = typing.get_args(hint)
        right, wanted = value in allowed, " or ".join(map(repr, allowed))
    elif hint in (int, float):
        kind = Integral if hint is int else Real
        right = isinstance(value, kind) and not isinstance(value, bool)
        right = right and (not interval or _inside(float(value), interval))  # type: ignore[arg-type]
        wanted = "a whole number" if hint is int else "a number"
        wanted += f" in {interval}" if interval else ""
    else:
        right, wanted = isinstance(value, hint), "True or False" if hint is bool else hint.__name__
    if not right:
        none = " or None" if optional else ""
        raise EngineError(f"The option {option.name} must be {wanted}{none}, got {value!r}.")


def _inside(value: float, interval: str) -> bool:
    """Tell whether a value is in an interval written as ``[0, 1)``."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


@dataclass(frozen=True)
class Problem:
    """One block of voxels to fit.

    Attributes
    ----------
    kernel, voxels
        Model and data in the precision of the fit.
    exact, exact_voxels
        The same in double precision, for closed forms.
    earlier
        Kernels of easier objectives whose optima lead to the one wanted, in order.
    report
        Called with the share of the block that is done.
    """

    kernel: Kernel
    voxels: Voxels
    exact: Kernel
    exact_voxels: Voxels
    settings: Any
    report: Callable[[float], None] = field(default=lambda share: None)
    earlier: tuple[Kernel, ...] = ()

    def stages(self) -> list[Problem]:
        """Return the problems to solve one after the other; the last is the one wanted."""
        return [replace(self, kernel=kernel) for kernel in (*self.earlier, self.kernel)]


@dataclass(frozen=True)
class Solution:
    """Where a solver ended.

    Attributes
    ----------
    position
        (parameters, voxels) in solver coordinates; NaN where there is no estimate.
    converged
        (voxels,) bool.
    evaluations
        (voxels,) model evaluations of the winning start.
    winner
        (voxels,) index of the winning start.
    ends, end_costs
        (starts, parameters, voxels) and (starts, voxels): where every start ended.
    slopes
        (parameters, measurements, voxels) derivatives of the position by the data, for a solver
        that does not minimise the weighted sum of squares; None: those of its minimum.
    """

    position: Tensor
    converged: Tensor
    evaluations: Tensor
    winner: Tensor
    ends: Tensor
    end_costs: Tensor
    slopes: Tensor | None = None


class Ends(NamedTuple):
    """Where all starts of all voxels ended, on the last axis: start by start, voxel by voxel."""

    position: Tensor
    cost: Tensor
    evaluations: Tensor
    converged: Tensor


def best_of_starts(end: Ends, n_starts: int) -> Solution:
    """Return the solution that keeps the lowest of the ends of each voxel."""
    n_voxels = end.cost.shape[0] // n_starts
    cost = end.cost.reshape(n_starts, n_voxels)
    ends = end.position.reshape(-1, n_starts, n_voxels).transpose(0, 1)
    winner = cost.argmin(0)

    def best(values: Tensor) -> Tensor:
        return values.gather(0, winner.expand(1, *values.shape[1:]))[0]

    return Solution(
        position=best(ends),
        converged=best(end.converged.reshape(n_starts, n_voxels)),
        evaluations=best(end.evaluations.reshape(n_starts, n_voxels)),
        winner=winner,
        ends=ends,
        end_costs=cost,
    )


def default_lanes(kernel: Kernel, compiled: bool) -> int:
    """Return how many voxels to work on at once: what fits the cache, or fills the device.

    Compiled steps divide them among the threads, each with a cache of its own.
    """
    if kernel.device.type != "cpu":
        # Compiled steps have one shape: the last ones take as long though few lanes are at work.
        return 1 << 15 if compiled else 1 << 17
    n = len(kernel.model.parameters)
    state = kernel.model.n_measurements + n * (n + 7) // 2 + 6
    threads = min(torch.get_num_threads(), _MOST_THREADS) if compiled else 1
    return (4096 if state <= _SMALL else 2048) * threads


@dataclass(frozen=True)
class Solver:
    """A way to solve a problem, and what it can be told.

    Attributes
    ----------
    solve
        From a problem, whose settings are of the class `settings`, to its solution.
    settings
        Class of the settings, with defaults.
    kept
        From the number of parameters to how many numbers it keeps for every start of a voxel.
    copies
        How many arrays (parameters, measurements, voxels) in double precision it makes.
    lanes
        From a kernel, and whether it is compiled, to how many voxels to work on at once.
    effort
        About how many times the model evaluations of Levenberg-Marquardt a voxel takes: the more,
        the smaller the fits for which compiling pays.
    """

    solve: Callable[[Problem], Solution]
    settings: type[Settings] = Settings
    kept: Callable[[int], int] = lambda n: 3 * n + n * (n + 1) // 2 + 5
    copies: int = 0
    lanes: Callable[[Kernel, bool], int] = default_lanes
    effort: int = 1
