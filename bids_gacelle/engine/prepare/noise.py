"""The noise of the volumes of one run: given, or from repeats and residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.prepare.directions import Estimator
from bids_gacelle.engine.prepare.magnitudes import invert, spread
from bids_gacelle.engine.prepare.shells import Shell

_Float = npt.NDArray[np.floating]
_Index = npt.NDArray[np.intp]

MIN_DEGREES_OF_FREEDOM = 8
_FLOOR_ITERATIONS = 3


@dataclass(frozen=True)
class Run:
    """One run with its shells and how each is measured.

    Attributes
    ----------
    signal
        (volumes, voxels)
    magnitudes
        Whether the noise is Rician.
    noise
        (voxels,) standard deviation of one volume as given, NaN: take the estimate; or None.
    """

    signal: npt.NDArray[np.float32]
    shells: list[Shell]
    estimators: list[Estimator]
    magnitudes: bool
    noise: _Float | None = None

    @property
    def b0_groups(self) -> list[_Index]:
        """The b=0 volumes of each echo time, shortest first."""
        unique = {tuple(shell.b0_volumes): shell.b0_volumes for shell in self.shells}
        return list(unique.values())

    @property
    def b0_group(self) -> list[int]:
        """The place in ``b0_groups`` of the b=0 volumes of each shell."""
        groups = [tuple(group) for group in self.b0_groups]
        return [groups.index(tuple(shell.b0_volumes)) for shell in self.shells]

    @property
    def degrees_of_freedom(self) -> int:
        """How many differences between volumes tell the noise."""
        repeats = sum(len(group) - 1 for group in self.b0_groups)
        return repeats + sum(e.degrees_of_freedom for e in self.estimators)

    @property
    def noise_estimable(self) -> bool:
        """Whether they are enough."""
        return self.degrees_of_freedom >= MIN_DEGREES_OF_FREEDOM

    @property
    def noise_source(self) -> str:
        """What the noise comes from, in words."""
        if self.noise is not None:
            return "noise map"
        sources = []
        if any(len(group) > 1 for group in self.b0_groups):
            sources.append("b=0 repeats")
        if any(estimator.degrees_of_freedom for estimator in self.estimators):
            sources.append("SH residuals")
        return " and ".join(sources)


def check_noise(noise: _Float | None, run: Run, name: str) -> tuple[_Float | None, list[str]]:
    """Check a given noise level: NaN where it has no value and the estimate stands in.

    Raises
    ------
    EngineError
        Its shape does not match, or it has no value at all.
    """
    if noise is None:
        return None, []
    voxels = run.signal.shape[1]
    level = np.array(noise, np.float64)
    if level.shape != (voxels,):
        raise EngineError(
            f"{name} has {voxels} voxels, but its noise level has the shape {level.shape}"
        )
    absent = ~(np.isfinite(level) & (level > 0))
    if absent.all():
        raise EngineError(f"the noise level of {name} has no positive value in any voxel")
    if not absent.any():
        return level, []
    estimable = run.noise_estimable
    level[absent] = np.nan if estimable else np.median(level[~absent])
    instead = f"from {run.noise_source}" if estimable else "as the median of all others"
    note = f"{name}: the noise level has no positive value in {absent.sum()} of {voxels} voxels"
    return level, [f"{note}; it was taken {instead} there"]


def describe_noise(runs: Sequence[Run]) -> str:
    """Say where the noise comes from; run by run where runs differ."""
    sources = [run.noise_source for run in runs]
    if len(set(sources)) == 1:
        return sources[0]
    return "; ".join(f"run {i}: {source}" for i, source in enumerate(sources, start=1))


def noise_of(run: Run, y: _Float, block: slice) -> _Float:
    """Return the standard deviation of one volume in each voxel: as given, else as estimated."""
    if run.noise is None:
        return np.sqrt(_estimate(run, y))
    given = run.noise[block]
    if not np.isnan(given).any():
        return given
    return np.where(np.isnan(given), np.sqrt(_estimate(run, y)), given)


def _estimate(run: Run, y: _Float) -> _Float:
    """Variance of one volume, pooled over b=0 repeats and residuals of the SH fits.

    Magnitudes vary less near the noise floor: theirs is what leads to as large residuals.
    """
    total = np.zeros(y.shape[1])
    for group in run.b0_groups:
        total += np.sum((y[group] - y[group].mean(axis=0)) ** 2, axis=0)
    pairs = zip(run.shells, run.estimators, strict=True)
    told = [(shell, estimator) for shell, estimator in pairs if estimator.degrees_of_freedom]
    for shell, estimator in told:
        x = y[shell.volumes]
        total += np.sum((x - estimator.fitted.T @ (estimator.fitted @ x)) ** 2, axis=0)
    variance = total / run.degrees_of_freedom
    if not run.magnitudes:
        return variance
    for _ in range(_FLOOR_ITERATIONS):
        sigma = np.sqrt(variance)
        degrees = np.full(y.shape[1], float(run.degrees_of_freedom))
        for shell, estimator in told:
            level = invert(y[shell.volumes].mean(axis=0), sigma)
            degrees += estimator.degrees_of_freedom * (spread(level, sigma) - 1)
        variance = total / degrees
    return variance
