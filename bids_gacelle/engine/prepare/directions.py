"""What the directions of a shell allow to measure, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.prepare.harmonics import degrees, real_sh, sh_fit_matrix
from bids_gacelle.engine.prepare.shells import Shell

Powder = Literal["auto", "mean", "sh"]
_Float = npt.NDArray[np.floating]
_Index = npt.NDArray[np.intp]

# ||mean(g g^T) - I/3||: the plain mean is off by at most ~0.6 of this (one fibre, b = 2 ms/um^2).
_EVEN = 0.03
# Smallest singular value (1 = ideal) at which SH coefficients are taken to be determined.
_DETERMINED = 0.15
_FEW_DIRECTIONS = 12
_FIT_ORDER = 6
_RESIDUAL_ORDERS = (8, 6, 4)


@dataclass(frozen=True)
class Estimator:
    """The linear maps that turn the n volumes of one shell into its measurements.

    Attributes
    ----------
    mean
        (n,) weights of the powder average; they add up to 1.
    basis, fit, degree
        (n, k) SH, (k, n) least squares to them, (k,) their degree; empty where the directions do
        not determine a fit.
    top
        Highest degree that is measured; 0: none but the powder average.
    fitted
        (rank, n), orthonormal: what an SH fit explains; empty where it leaves no residual.
    degrees_of_freedom
        Of the residual.
    """

    mean: _Float
    basis: _Float
    fit: _Float
    degree: _Index
    top: int
    fitted: _Float
    degrees_of_freedom: int

    @property
    def effective_number(self) -> float:
        """Number of directions whose plain mean would have the noise of this average."""
        return round(float(1 / np.sum(self.mean**2)), 6)

    def coefficients(self, degree: int) -> _Float:
        """Return the map to the SH coefficients of one degree, (2l+1, n)."""
        return self.fit[self.degree == degree]

    def precision(self, degree: int) -> float:
        """Inverse noise variance of S_l of a weak signal at unit noise variance; 0: unknown."""
        if degree == 0:
            return self.effective_number
        if degree > self.top:
            return 0.0
        components = 2 * degree + 1
        return float(4 * np.pi * components**2 / np.sum(self.coefficients(degree) ** 2))


def make_estimator(shell: Shell, l_max: int, powder: Powder, name: str) -> Estimator:
    """Return the estimator of S_0 ... S_l, with l as high as the directions allow up to l_max.

    Raises
    ------
    EngineError
        ``powder`` is "sh" and the directions do not determine a fit.
    """
    directions, n = shell.directions, len(shell.directions)
    top = max((k for k in range(0, l_max + 1, 2) if _determines(directions, max(2, k))), default=0)
    mean = np.full(n, 1 / n)
    basis: _Float = np.empty((n, 0))
    fit: _Float = np.empty((0, n))
    degree = np.empty(0, np.intp)
    if _determines(directions, 2):
        order = max(_FIT_ORDER, l_max)
        basis, degree = real_sh(directions, order), degrees(order)
        fit = sh_fit_matrix(directions, order, penalty_above=max(2, top))
        if powder == "sh" or (powder == "auto" and unevenness(directions) > _EVEN):
            mean = fit[0] / np.sqrt(4 * np.pi)
    elif powder == "sh":
        raise EngineError(
            f"{name}: the {n} directions of the shell {shell} do not determine spherical "
            f"harmonics up to l = 2 (at least {_needed(2)} well spread directions are needed); "
            "leave this shell out"
        )
    fitted = _explained(directions)
    left = n - len(fitted) if len(fitted) else 0
    return Estimator(mean, basis, fit, degree, top, fitted, left)


def direction_warnings(
    shells: Sequence[Shell], estimators: Sequence[Estimator], l_max: int, name: str
) -> list[str]:
    """Sentences about shells whose directions are few, uneven, or do not determine S_l."""
    notes = []
    few = [s for s in shells if _distinct(s.directions) < _FEW_DIRECTIONS]
    if few:
        notes.append(
            f"{name}: fewer than {_FEW_DIRECTIONS} distinct directions, so the powder average "
            "depends on the orientation of the fibres: "
            + "; ".join(f"{s}: {_distinct(s.directions)}" for s in few)
        )
    for degree in range(2, l_max + 1, 2):
        without = [s for s, e in zip(shells, estimators, strict=True) if e.top < degree]
        if without:
            notes.append(
                f"{name}: S_{degree} is left out of the fit where the directions do not determine "
                f"spherical harmonics up to l = {degree} (at least {_needed(degree)} well spread "
                "ones are needed): " + "; ".join(f"{s}: {len(s.volumes)}" for s in without)
            )
    uneven: dict[str, list[str]] = {}
    for shell, estimator in zip(shells, estimators, strict=True):
        size = unevenness(shell.directions)
        if size > _EVEN:
            plain = np.ptp(estimator.mean) == 0
            done = "averaged as they are" if plain else "averaged by spherical harmonics"
            uneven.setdefault(done, []).append(f"{shell}: {size:.2f}")
    notes += [
        f"{name}: directions uneven over the sphere (even is below {_EVEN}) were {done}: "
        + "; ".join(found)
        for done, found in uneven.items()
    ]
    return notes


def check_orders(shells: Sequence[Shell], estimators: Sequence[Estimator], l_max: int) -> None:
    """Refuse an l_max that the directions of no shell determine.

    Raises
    ------
    EngineError
        The message names the shell with the most directions.
    """
    reached = max(estimator.top for estimator in estimators)
    if reached < l_max:
        most = max(shells, key=lambda shell: len(shell.volumes))
        raise EngineError(
            f"the directions of no shell determine spherical harmonics up to l = {l_max} "
            f"(at least {_needed(l_max)} well spread directions are needed; the shell {most} has "
            f"{len(most.volumes)}); use l_max {reached}"
        )


def _needed(order: int) -> int:
    """Number of even SH up to an order."""
    return (order + 1) * (order + 2) // 2


def unevenness(directions: _Float) -> float:
    """Frobenius norm of mean(g g^T) - I/3: 0 for directions even up to l = 2."""
    return float(np.linalg.norm(directions.T @ directions / len(directions) - np.eye(3) / 3))


def _determines(directions: _Float, order: int) -> bool:
    """Whether the directions tell the SH coefficients up to ``order`` apart from each other."""
    basis = real_sh(directions, order) * np.sqrt(4 * np.pi / len(directions))
    if basis.shape[0] < basis.shape[1]:
        return False
    return bool(np.linalg.svd(basis, compute_uv=False)[-1] > _DETERMINED)


def _explained(directions: _Float) -> _Float:
    """Orthonormal rows spanning what an SH fit can explain; none if it leaves too few residuals.

    Order 4 at least: the residuals of a lower one hold anatomy, not noise.
    """
    n = len(directions)
    for order in _RESIDUAL_ORDERS:
        left, singular, _ = np.linalg.svd(real_sh(directions, order), full_matrices=False)
        rank = int(np.sum(singular > 1e-6 * singular[0]))
        if 3 * rank <= 2 * n:
            return left[:, :rank].T
    return np.empty((0, n))


def _distinct(directions: _Float) -> int:
    """Count directions that differ by more than about 2 degrees; antipodes are the same."""
    cosine = np.abs(directions @ directions.T)
    return int(np.sum(np.triu(cosine > 0.9995, k=1).sum(axis=0) == 0))
