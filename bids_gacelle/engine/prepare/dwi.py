"""The entry point of the preparation of dwi."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.prepare.directions import (
    Powder,
    check_orders,
    direction_warnings,
    make_estimator,
)
from bids_gacelle.engine.prepare.measure import measure
from bids_gacelle.engine.prepare.noise import MIN_DEGREES_OF_FREEDOM, Run, check_noise
from bids_gacelle.engine.prepare.prepared import PreparedDwi
from bids_gacelle.engine.prepare.shells import find_shells
from bids_gacelle.engine.prepare.volumes import DwiVolumes

_NOISE_MODELS = ("gaussian", "rician")
_Float = npt.NDArray[np.floating]


def prepare_dwi(
    runs: Sequence[DwiVolumes],
    l_max: int = 0,
    b0_threshold: float = 100.0,
    powder: Powder = "auto",
    noise: Sequence[_Float | None] | None = None,
    noise_model: str = "gaussian",
    gradient_tensor: _Float | None = None,
) -> PreparedDwi:
    """Shells, b=0 normalisation, powder averages and rotational invariants with their noise.

    Each run is divided by its own mean b=0 image of the same echo time. S_0 is the mean over
    directions; with ``powder="auto"`` it is the l=0 part of a spherical-harmonics (SH) fit where
    the directions are uneven (``||mean(g g^T) - I/3|| > 0.03``) and still determine that fit.
    S_l = sqrt(sum_m f_lm^2) / sqrt(4 pi (2l+1)) with f_lm the coefficients in real orthonormal SH
    (order 6, Laplace-Beltrami penalty on l > max(2, l_max) only, so that S_2 is never shrunk),
    less the power of noise; where that is larger S_l is negative. S_l of a shell whose directions
    do not determine it is left out. The noise of a run, unless given, is pooled per voxel from its
    b=0 repeats and from the residuals of SH fits to the shells with enough directions, and
    propagated through all of this.

    Parameters
    ----------
    runs : volumes of the same voxels; shells of all runs are concatenated, sorted within a run
        by echo time, delta, Delta, b.
    l_max : 0, or the highest even order of the invariants.
    b0_threshold : s/mm^2, from 0 up; volumes up to this b are b=0.
    powder : "auto" (above), "mean" or "sh" for all shells.
    noise : standard deviation of one volume of each run, (voxels,) in the unit of its signal, or
        None for a run whose noise is to be estimated. Values that are not positive and finite are
        no values: the estimate, or where there is none the median of the others, replaces them.
    noise_model : "gaussian", or "rician" for fits with Rician noise. The noise is then that of
        one channel, the noise floor leaves b=0 signals and S_2, and S_0 becomes the expected
        magnitude of the mean signal, which the mean magnitude exceeds where signals differ between
        directions.
    gradient_tensor : (voxels, 3, 3) deviation L of the gradients: a voxel sees (I + L) g where g
        is nominal, and |(I + L) g|^2 b. ``bscale`` is the mean of that factor over all weighted
        volumes. What it leaves: shells of uneven directions have another mean, by up to
        2 ||L|| ||mean(g g^T) - I/3||; and averages over coherent fibres along u are those at
        |(I + L)^T u|^2 b, so that about half of the error stays there, a tenth where fibres have
        no common orientation.

    Raises
    ------
    EngineError
        When noise, gradients, timing or shells cannot be used; the message names run and volume or
        shell.
    """
    _check_arguments(runs, l_max, b0_threshold)
    if noise_model not in _NOISE_MODELS:
        raise EngineError(f"the noise model is {noise_model!r}; it must be gaussian or rician")
    given = [None] * len(runs) if noise is None else list(noise)
    if len(given) != len(runs):
        raise EngineError(f"there are {len(runs)} dwi runs but {len(given)} noise levels")
    warnings: list[str] = []
    parts: list[Run] = []
    for number, volumes in enumerate(runs, start=1):
        name = f"dwi run {number}" if len(runs) > 1 else "the dwi run"
        shells, notes = find_shells(volumes, b0_threshold, name)
        estimators = [make_estimator(shell, l_max, powder, name) for shell in shells]
        warnings += notes + direction_warnings(shells, estimators, l_max, name)
        part = Run(volumes.signal, shells, estimators, noise_model == "rician")
        level, notes = check_noise(given[number - 1], part, name)
        parts.append(replace(part, noise=level))
        warnings += notes
    check_orders(
        [shell for part in parts for shell in part.shells],
        [estimator for part in parts for estimator in part.estimators],
        l_max,
    )
    unknown = [part for part in parts if part.noise is None and not part.noise_estimable]
    if unknown:
        biased = ", and S_2 and higher hold the power of noise" if l_max else ""
        warnings.append(
            "noise not estimated: too few b=0 repeats and directions "
            f"({min(part.degrees_of_freedom for part in unknown)} degrees of freedom, "
            f"{MIN_DEGREES_OF_FREEDOM} needed); standard deviations of maps leave out that of the "
            f"b=0 signal{biased}"
        )
    bscale, notes = _b_scale(gradient_tensor, parts)
    return measure(parts, l_max, not unknown, bscale, warnings + notes)


def _check_arguments(runs: Sequence[DwiVolumes], l_max: int, b0_threshold: float) -> None:
    if not (np.isfinite(b0_threshold) and b0_threshold >= 0):
        raise EngineError(
            f"the b=0 threshold is {b0_threshold:g}; a number of s/mm^2 from 0 up is needed"
        )
    if not runs:
        raise EngineError("no dwi run given")
    if l_max < 0 or l_max % 2:
        raise EngineError(f"l_max must be 0 or even, found {l_max}")
    if len({run.signal.shape[1:] for run in runs}) > 1:
        raise EngineError(f"the runs differ in voxels: {[run.signal.shape[1] for run in runs]}")


def _b_scale(
    tensor: _Float | None, runs: Sequence[Run]
) -> tuple[npt.NDArray[np.float32] | None, list[str]]:
    """Ratio of actual to nominal b, the mean of |(I + L) g|^2 over all weighted volumes."""
    if tensor is None:
        return None, []
    voxels = runs[0].signal.shape[1]
    deviation = np.asarray(tensor, np.float64)
    if deviation.shape != (voxels, 3, 3):
        raise EngineError(
            f"the gradient deviation has the shape {deviation.shape}; {(voxels, 3, 3)} is needed"
        )
    g = np.concatenate([shell.directions for run in runs for shell in run.shells])
    actual = np.eye(3) + deviation
    scale = np.einsum("vij,vik,jk->v", actual, actual, g.T @ g / len(g)).astype(np.float32)
    absent = ~(np.isfinite(scale) & (scale > 0))
    if not absent.any():
        return scale, []
    scale[absent] = np.nan
    return scale, [
        f"the gradient deviation has no value in {absent.sum()} of {voxels} voxels: models that "
        "take it are not fitted there (flag 4)"
    ]
