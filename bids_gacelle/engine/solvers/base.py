"""What every solver takes and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from bids_gacelle.engine.kernels import Kernel, Voxels


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
    compiled
        Whether to compile the step.
    """

    starts: int = 1
    seed: int = 0
    dictionary: int = 512
    lanes: int | None = None
    compiled: bool = False


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

    def take(self, index: slice) -> Solution:
        """Return the solution of some voxels."""
        slopes = None if self.slopes is None else self.slopes[..., index]
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "slopes"}
        taken = {name: tensor[..., index] for name, tensor in rest.items()}
        return Solution(**taken, slopes=slopes)


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
    """

    solve: Callable[[Problem], Solution]
    settings: type[Settings] = Settings
    kept: Callable[[int], int] = lambda n: 2 * n + n * (n + 1) // 2 + 4
    copies: int = 0


def default_lanes(device: torch.device) -> int:
    """Return how many voxels to work on at once: what fits the cache, or fills the device."""
    return 2048 if device.type == "cpu" else 1 << 17
