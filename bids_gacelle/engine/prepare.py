"""From diffusion-weighted volumes to the few numbers per shell that the models are fitted to.

All volumes of one shell (same b, Delta, delta and echo time) become one powder average S_0 and,
on request, rotational invariants S_2, S_4, ... divided by the b=0 signal of their own run and
echo time, each with its standard deviation. Every step is linear in the volumes of one voxel, so
that the noise is propagated exactly and no voxel ever sees its neighbours. The noise of a b=0
signal is common to all shells that it divides; it is handed on apart from theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.scheme import DiffusionScheme

Powder = Literal["auto", "mean", "sh"]
_Float = npt.NDArray[np.floating]
_Index = npt.NDArray[np.intp]

# b-values closer than this to their neighbour in the sorted list belong to the same shell.
_B_GAP = (30.0, 0.05)  # s/mm^2, or this fraction of b, whichever is larger
_B_SPREAD = (100.0, 0.15)  # a chain of b-values longer than this is no shell
_TIMING_GAP_MS = 0.1
_ECHO_TIME_GAP_S = 1e-4

# ||mean(g g^T) - I/3||: the plain mean is off by at most ~0.6 of this (one fibre, b = 2 ms/um^2).
_EVEN = 0.03
# Smallest singular value (1 = ideal) at which SH coefficients are taken to be determined.
_DETERMINED = 0.15
_FEW_DIRECTIONS = 12
_MIN_DEGREES_OF_FREEDOM = 8
_FIT_ORDER = 6
_LAPLACE_BELTRAMI = 0.006  # Descoteaux et al. 2007, doi:10.1002/mrm.21277
_RESIDUAL_ORDERS = (8, 6, 4)
_SMALLEST_SIGMA = 1e-6  # of S_0 = 1: the rounding of float32 sums; keeps weights finite
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class DwiVolumes:
    """One dwi run as arrays.

    Parameters
    ----------
    signal : (volumes, voxels), any unit.
    bval : (volumes,) in s/mm^2.
    bvec : (volumes, 3); the frame does not matter, the length is normalised.
    big_delta, small_delta : (volumes,) in ms, or None when unknown.
    echo_time : (volumes,) in s, or None when unknown (then taken as constant).
    """

    signal: npt.NDArray[np.float32]
    bval: npt.NDArray[np.floating]
    bvec: npt.NDArray[np.floating]
    big_delta: npt.NDArray[np.floating] | None = None
    small_delta: npt.NDArray[np.floating] | None = None
    echo_time: npt.NDArray[np.floating] | None = None


@dataclass(frozen=True)
class PreparedDwi:
    """What the dwi models are fitted to; M measurements: S_0 of all shells, then S_2, ...

    Attributes
    ----------
    signals : (M, voxels), relative to b = 0; NaN where not ``usable``.
    scheme : the shells, ``n_directions`` set.
    sigma : (M, voxels) standard deviation of each measurement, that of its b=0 signal left out,
        or None when the volumes do not tell (fewer than 8 degrees of freedom).
    scale_sigma : (groups, voxels) relative standard deviation of the mean b=0 signal of each run
        and echo time; None together with ``sigma``.
    scale_group : (M,) row of ``scale_sigma`` whose b=0 signal divides the measurement.
    b0 : (voxels,) mean b=0 signal of the first run (its shortest echo time), input units.
    usable : (voxels,) every average is finite and every b=0 average positive.
    directions : (n, 3) unit vectors of the volumes of each shell, in the order of the scheme.
    warnings : sentences for the user.
    """

    signals: npt.NDArray[np.float32]
    scheme: DiffusionScheme
    sigma: npt.NDArray[np.float32] | None
    scale_sigma: npt.NDArray[np.float32] | None
    scale_group: _Index
    b0: npt.NDArray[np.float32]
    usable: npt.NDArray[np.bool_]
    directions: list[_Float]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Shell:
    volumes: _Index
    b0_volumes: _Index
    directions: _Float
    b: float  # s/mm^2
    big_delta: float | None
    small_delta: float | None
    echo_time: float | None

    def __str__(self) -> str:
        timing = [f"Delta {self.big_delta:g} ms"] if self.big_delta is not None else []
        timing += [f"delta {self.small_delta:g} ms"] if self.small_delta is not None else []
        timing += [f"TE {1e3 * self.echo_time:g} ms"] if self.echo_time is not None else []
        return f"b = {self.b:.0f} s/mm^2" + (f" ({', '.join(timing)})" if timing else "")


@dataclass(frozen=True)
class _Estimator:
    """The linear maps that turn the volumes of one shell into its measurements."""

    mean: _Float  # (n,)
    coefficients: dict[int, _Float]  # l -> (2l+1, n)
    fitted: _Float  # (rank, n), orthonormal: what an SH fit explains; empty without residual
    degrees_of_freedom: int


def prepare_dwi(
    runs: Sequence[DwiVolumes],
    l_max: int = 0,
    b0_threshold: float = 100.0,
    powder: Powder = "auto",
) -> PreparedDwi:
    """Shells, b=0 normalisation, powder averages and rotational invariants with their noise.

    Each run is divided by its own mean b=0 image of the same echo time. S_0 is the mean over
    directions; with ``powder="auto"`` it is the l=0 part of a spherical-harmonics (SH) fit where
    the directions are uneven (``||mean(g g^T) - I/3|| > 0.03``) and still determine that fit.
    S_l = sqrt(sum_m f_lm^2) / sqrt(4 pi (2l+1)) with f_lm the coefficients in real orthonormal SH
    (order 6, Laplace-Beltrami penalty on l > max(2, l_max) only, so that S_2 is never shrunk).
    The noise of a run is pooled per voxel from its b=0 repeats and from the residuals of SH fits
    to the shells with enough directions, and propagated through all of this.

    Parameters
    ----------
    runs : volumes of the same voxels; shells of all runs are concatenated, sorted within a run
        by echo time, delta, Delta, b.
    l_max : 0, or the highest even order of the invariants.
    b0_threshold : s/mm^2, from 0 up; volumes up to this b are b=0.
    powder : "auto" (above), "mean" or "sh" for all shells.

    Raises
    ------
    EngineError
        When gradients, timing or shells cannot be used; the message names run and volume or
        shell.
    """
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
    warnings: list[str] = []
    parts, shells = [], []
    for number, run in enumerate(runs, start=1):
        name = f"dwi run {number}" if len(runs) > 1 else "the dwi run"
        found, notes = _find_shells(run, b0_threshold, name)
        estimators = [_estimator(shell, l_max, powder, name) for shell in found]
        warnings += notes + _direction_warnings(found, estimators, name)
        parts.append(_Run(run.signal, found, estimators))
        shells += found
    sigma_known = all(part.degrees_of_freedom >= _MIN_DEGREES_OF_FREEDOM for part in parts)
    if not sigma_known:
        warnings.append(
            "noise not estimated: too few b=0 repeats and directions "
            f"({min(part.degrees_of_freedom for part in parts)} degrees of freedom, "
            f"{_MIN_DEGREES_OF_FREEDOM} needed); standard deviations of maps leave out that of "
            "the b=0 signal"
        )
    return _measure(parts, l_max, sigma_known, _scheme(shells), warnings)


def real_sh(directions: npt.ArrayLike, order: int) -> _Float:
    """Real orthonormal spherical harmonics of even degree.

    Descoteaux et al. 2007, eq. 3: columns l = 0, 2, ... ``order``, within l m = -l ... l;
    sqrt(2) Re Y_lm for m < 0, Y_l0, sqrt(2) Im Y_lm for m > 0 (Condon-Shortley phase).

    Parameters
    ----------
    directions : (n, 3) unit vectors.
    order : highest (even) degree.

    Returns
    -------
    (n, (order + 1) (order + 2) / 2)
    """
    x, y, z = np.asarray(directions, dtype=np.float64).T
    phi, sine = np.arctan2(y, x), np.hypot(x, y)
    legendre: dict[tuple[int, int], _Float] = {(0, 0): np.full_like(z, np.sqrt(1 / (4 * np.pi)))}
    for m in range(order + 1):
        if m:
            legendre[m, m] = -np.sqrt((2 * m + 1) / (2 * m)) * sine * legendre[m - 1, m - 1]
        for degree in range(m + 1, order + 1):
            below = legendre.get((degree - 2, m), np.zeros_like(z))
            step = np.sqrt(((degree - 1) ** 2 - m**2) / (4 * (degree - 1) ** 2 - 1))
            scale = np.sqrt((4 * degree**2 - 1) / (degree**2 - m**2))
            legendre[degree, m] = scale * (z * legendre[degree - 1, m] - step * below)
    columns = []
    for degree in range(0, order + 1, 2):
        for m in range(-degree, degree + 1):
            # Re Y_l,-m = (-1)^m Re Y_lm
            angle = (-1) ** m * np.cos(m * phi) if m < 0 else np.sin(m * phi)
            angular = np.sqrt(2) * angle if m else 1.0
            columns.append(angular * legendre[degree, abs(m)])
    return np.stack(columns, axis=1)


def sh_fit_matrix(
    directions: npt.ArrayLike, order: int, penalty_above: int | None = None
) -> _Float:
    """Matrix that turns the signals of one shell into even real SH coefficients.

    Least squares, with the Laplace-Beltrami penalty of Descoteaux et al. 2007 on the degrees
    above ``penalty_above`` only (None: no penalty). Antipodes need not be added: the even basis
    has them.

    Returns
    -------
    ((order + 1) (order + 2) / 2, n)
    """
    basis = real_sh(directions, order)
    if penalty_above is None:
        return np.linalg.pinv(basis)
    degree = _degrees(order)
    penalty = np.where(degree > penalty_above, (degree * (degree + 1.0)) ** 2, 0.0)
    normal = basis.T @ basis + _LAPLACE_BELTRAMI * np.diag(penalty)
    return np.linalg.solve(normal, basis.T)


def _degrees(order: int) -> _Index:
    """Degree l of each column of ``real_sh``."""
    return np.concatenate([np.full(2 * degree + 1, degree) for degree in range(0, order + 1, 2)])


# ---------------------------------------------------------------------------------- shells


def _find_shells(
    run: DwiVolumes, b0_threshold: float, name: str
) -> tuple[list[_Shell], list[str]]:
    bval, directions, notes = _check_gradients(run, b0_threshold, name)
    n = len(bval)
    is_b0 = bval <= b0_threshold
    timing = {
        key: _check_timing(getattr(run, key), key, n, ~is_b0 | (key == "echo_time"), name)
        for key in ("big_delta", "small_delta", "echo_time")
    }
    echo = _cluster(timing["echo_time"], _ECHO_TIME_GAP_S, n)
    key = np.stack(
        [
            echo,
            _cluster(timing["small_delta"], _TIMING_GAP_MS, n),
            _cluster(timing["big_delta"], _TIMING_GAP_MS, n),
        ]
    )
    shells = []
    for group in np.unique(key[:, ~is_b0], axis=1).T:
        in_group = np.flatnonzero(~is_b0 & (key == group[:, None]).all(axis=0))
        b0_volumes = np.flatnonzero(is_b0 & (echo == group[0]))
        for volumes in _split_b(bval, in_group):
            of_shell = {
                k: None if v is None else round(float(v[volumes].mean()), 6)
                for k, v in timing.items()
            }
            b = float(bval[volumes].mean())
            shell = _Shell(volumes, b0_volumes, directions[volumes], b, **of_shell)
            _check_shell(shell, bval, name)
            shells.append(shell)
    return shells, notes


def _check_gradients(
    run: DwiVolumes, b0_threshold: float, name: str
) -> tuple[_Float, _Float, list[str]]:
    bval, bvec = np.asarray(run.bval, np.float64), np.asarray(run.bvec, np.float64)
    n = run.signal.shape[0]
    if run.signal.ndim != 2 or bval.shape != (n,) or bvec.shape != (n, 3):
        raise EngineError(
            f"{name} has {n} volumes, but bval of shape {bval.shape} and bvec of shape "
            f"{bvec.shape}; ({n},) and ({n}, 3) are needed"
        )
    bad = np.flatnonzero(~np.isfinite(bval) | (bval < 0))
    if bad.size:
        raise EngineError(
            f"{name}: the b-value of volume {bad[0]} (counted from 0) is {bval[bad[0]]:g}; "
            "a number of s/mm^2 from 0 up is needed"
        )
    weighted = bval > b0_threshold
    if not weighted.any():
        raise EngineError(
            f"{name}: no b-value is above {b0_threshold:g} s/mm^2 (highest {bval.max():g}); "
            "b-values must be in s/mm^2"
        )
    if weighted.all():
        raise EngineError(
            f"{name}: no volume has b up to {b0_threshold:g} s/mm^2 (lowest {bval.min():g}); "
            "a b=0 volume is needed to normalise, or a higher b=0 threshold"
        )
    length = np.linalg.norm(bvec, axis=1)
    bad = np.flatnonzero(weighted & ~(np.isfinite(length) & (length > 1e-3)))
    if bad.size:
        raise EngineError(
            f"{name}: volume {bad[0]} (counted from 0) has b = {bval[bad[0]]:g} s/mm^2 but the "
            f"gradient direction {bvec[bad[0]].tolist()}; correct the bvec file"
        )
    odd = np.flatnonzero(weighted & (np.abs(length - 1) > 0.05))
    notes = [
        f"{name}: {odd.size} gradient directions are not of unit length (volume {v}: "
        f"{length[v]:.3f}); they were normalised and b-values left as they are"
        for v in odd[:1]
    ]
    return bval, bvec / np.where(weighted, length, 1.0)[:, None], notes


def _check_timing(
    values: npt.NDArray[np.floating] | None,
    field: str,
    n: int,
    needed: npt.NDArray[np.bool_],
    name: str,
) -> _Float | None:
    if values is None:
        return None
    array = np.asarray(values, np.float64)
    if array.shape != (n,):
        raise EngineError(f"{name} has {n} volumes, but {field} of shape {array.shape}")
    bad = np.flatnonzero(needed & ~(np.isfinite(array) & (array > 0)))
    if bad.size:
        raise EngineError(
            f"{name}: {field} of volume {bad[0]} (counted from 0) is {array[bad[0]]:g}; "
            "a positive time is needed"
        )
    return array


def _cluster(values: _Float | None, gap: float, n: int) -> _Index:
    """Labels 0, 1, ... in ascending order; values closer than ``gap`` share one."""
    if values is None:
        return np.zeros(n, np.intp)
    order = np.argsort(values, kind="stable")
    labels = np.empty(n, np.intp)
    labels[order] = np.concatenate([[0], np.cumsum(np.diff(values[order]) > gap)])
    return labels


def _split_b(bval: _Float, volumes: _Index) -> list[_Index]:
    """Volumes of one timing, split where the sorted b-values leave a gap; ascending b."""
    order = volumes[np.argsort(bval[volumes], kind="stable")]
    gap = np.maximum(_B_GAP[0], _B_GAP[1] * bval[order[1:]])
    pieces = np.split(order, np.flatnonzero(np.diff(bval[order]) > gap) + 1)
    return [np.sort(piece) for piece in pieces]


def _check_shell(shell: _Shell, bval: _Float, name: str) -> None:
    if not shell.b0_volumes.size:
        raise EngineError(
            f"{name}: no b=0 volume has the echo time of the shell {shell}; every echo time needs "
            "its own b=0 volume"
        )
    low, high = bval[shell.volumes].min(), bval[shell.volumes].max()
    if high - low > max(_B_SPREAD[0], _B_SPREAD[1] * shell.b):
        raise EngineError(
            f"{name}: b-values from {low:g} to {high:g} s/mm^2 run on without a gap; powder "
            "averages need shells, this acquisition has none there"
        )


def _scheme(shells: list[_Shell]) -> DiffusionScheme:
    def of(key: str) -> _Float | None:
        values = [getattr(shell, key) for shell in shells]
        return None if any(v is None for v in values) else np.array(values, np.float64)

    return DiffusionScheme(
        b=np.array([shell.b for shell in shells]) / 1e3,
        big_delta=of("big_delta"),
        small_delta=of("small_delta"),
        echo_time=of("echo_time"),
        n_directions=np.array([len(shell.volumes) for shell in shells]),
    )


# ------------------------------------------------------------------------------ directions


def unevenness(directions: _Float) -> float:
    """Frobenius norm of mean(g g^T) - I/3: 0 for directions even up to l = 2."""
    return float(np.linalg.norm(directions.T @ directions / len(directions) - np.eye(3) / 3))


def _determines(directions: _Float, order: int) -> bool:
    """Whether the directions tell the SH coefficients up to ``order`` apart from each other."""
    basis = real_sh(directions, order) * np.sqrt(4 * np.pi / len(directions))
    if basis.shape[0] < basis.shape[1]:
        return False
    return bool(np.linalg.svd(basis, compute_uv=False)[-1] > _DETERMINED)


def _estimator(shell: _Shell, l_max: int, powder: Powder, name: str) -> _Estimator:
    directions, n = shell.directions, len(shell.directions)
    top = max(2, l_max)
    determined = _determines(directions, top)
    if not determined and (l_max or powder == "sh"):
        raise EngineError(
            f"{name}: the {n} directions of the shell {shell} do not determine spherical "
            f"harmonics up to l = {top} (at least {(top + 1) * (top + 2) // 2} well spread "
            "directions are needed); use l_max 0 or leave this shell out"
        )
    mean = np.full(n, 1 / n)
    coefficients: dict[int, _Float] = {}
    if determined:
        fit = sh_fit_matrix(directions, max(_FIT_ORDER, l_max), penalty_above=top)
        degree = _degrees(max(_FIT_ORDER, l_max))
        coefficients = {k: fit[degree == k] for k in range(2, l_max + 1, 2)}
        if powder == "sh" or (powder == "auto" and unevenness(directions) > _EVEN):
            mean = fit[0] / np.sqrt(4 * np.pi)
    fitted = _explained(directions)
    return _Estimator(mean, coefficients, fitted, n - len(fitted) if len(fitted) else 0)


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


def _direction_warnings(
    shells: list[_Shell], estimators: list[_Estimator], name: str
) -> list[str]:
    notes = []
    few = [s for s in shells if _distinct(s.directions) < _FEW_DIRECTIONS]
    if few:
        notes.append(
            f"{name}: fewer than {_FEW_DIRECTIONS} distinct directions, so the powder average "
            "depends on the orientation of the fibres: "
            + "; ".join(f"{s}: {_distinct(s.directions)}" for s in few)
        )
    for shell, estimator in zip(shells, estimators, strict=True):
        uneven = unevenness(shell.directions)
        if uneven > _EVEN:
            plain = np.ptp(estimator.mean) == 0
            done = "averaged as they are" if plain else "averaged by spherical harmonics"
            notes.append(
                f"{name}: the directions of the shell {shell} are uneven over the sphere "
                f"({uneven:.2f}; even is below {_EVEN}); they were {done}"
            )
    return notes


def _distinct(directions: _Float) -> int:
    """Count directions that differ by more than about 2 degrees; antipodes are the same."""
    cosine = np.abs(directions @ directions.T)
    return int(np.sum(np.triu(cosine > 0.9995, k=1).sum(axis=0) == 0))


# ---------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class _Run:
    signal: npt.NDArray[np.float32]
    shells: list[_Shell]
    estimators: list[_Estimator]

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
        repeats = sum(len(group) - 1 for group in self.b0_groups)
        return repeats + sum(e.degrees_of_freedom for e in self.estimators)


def _measure(
    parts: list[_Run],
    l_max: int,
    sigma_known: bool,
    scheme: DiffusionScheme,
    warnings: list[str],
) -> PreparedDwi:
    """Signals and their noise for all voxels, in blocks of bounded memory."""
    voxels = parts[0].signal.shape[1]
    orders = l_max // 2 + 1
    signals = np.empty((len(scheme) * orders, voxels), np.float32)
    group = _groups(parts)
    sigma = np.empty_like(signals)
    scale_sigma = np.empty((group.max() + 1, voxels), np.float32)
    b0 = np.empty(voxels, np.float32)
    usable = np.empty(voxels, bool)
    step = max(1, _BLOCK_ELEMENTS // max(part.signal.shape[0] for part in parts))
    for start in range(0, voxels, step):
        block = slice(start, start + step)
        measured = [_measure_run(part, block, sigma_known) for part in parts]
        values, deviations = (
            np.concatenate([getattr(m, key) for m in measured], axis=1).reshape(len(signals), -1)
            for key in ("values", "deviations")
        )
        references = np.concatenate([m.b0 for m in measured])
        relative = np.concatenate([m.b0_deviations for m in measured])
        good = np.isfinite(values).all(axis=0) & (references > 0).all(axis=0)
        signals[:, block] = np.where(good, values, np.nan)
        sigma[:, block] = np.where(good, np.maximum(deviations, _SMALLEST_SIGMA), np.nan)
        scale_sigma[:, block] = np.where(good, relative, np.nan)
        b0[block] = references[0]
        usable[block] = good
    return PreparedDwi(
        signals=signals,
        scheme=scheme,
        sigma=sigma if sigma_known else None,
        scale_sigma=scale_sigma if sigma_known else None,
        scale_group=np.tile(group, orders),
        b0=b0,
        usable=usable,
        directions=[shell.directions for part in parts for shell in part.shells],
        warnings=warnings,
    )


def _groups(parts: list[_Run]) -> _Index:
    """Number of the b=0 group of each shell, counted through all runs."""
    numbers: list[int] = []
    before = 0
    for part in parts:
        numbers += [before + number for number in part.b0_group]
        before += len(part.b0_groups)
    return np.array(numbers, np.intp)


class _Measured(NamedTuple):
    """A block: (orders, shells, voxels), and (groups, voxels) of the b=0 means, relative SDs."""

    values: _Float
    deviations: _Float
    b0: _Float
    b0_deviations: _Float


def _measure_run(part: _Run, block: slice, sigma_known: bool) -> _Measured:
    y = part.signal[:, block].astype(np.float64)
    orders = [0, *part.estimators[0].coefficients]
    values = np.empty((len(orders), len(part.shells), y.shape[1]))
    factors = np.empty_like(values)
    number = np.array([len(group) for group in part.b0_groups])[:, None]
    # Infinities and zeros in the background are expected; they end as "not usable".
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        noise = np.sqrt(_noise_variance(part, y)) if sigma_known else np.zeros(y.shape[1])
        references = np.stack([y[group].mean(axis=0) for group in part.b0_groups])
        b0 = references[part.b0_group]
        for i, (shell, estimator) in enumerate(zip(part.shells, part.estimators, strict=True)):
            x = y[shell.volumes] / b0[i]
            values[0, i] = estimator.mean @ x
            factors[0, i] = np.sum(estimator.mean**2)
            for k, (degree, matrix) in enumerate(estimator.coefficients.items(), start=1):
                values[k, i], factors[k, i] = _invariant(matrix, x, degree)
        return _Measured(
            values, np.sqrt(factors) * noise / b0, references, noise / references / np.sqrt(number)
        )


def _invariant(matrix: _Float, x: _Float, degree: int) -> tuple[_Float, _Float]:
    """S_l of each voxel and its variance for unit noise variance (first order in the noise).

    S_l = |f| / sqrt(4 pi (2l+1)), so var S_l = u^T C u / (4 pi (2l+1)) with u = f/|f| and
    C = matrix matrix^T. Where S_l is below its own noise this is too large, by up to 1.5 in SD.
    """
    f = matrix @ x
    power = np.sum(f**2, axis=0)
    scale = 4 * np.pi * (2 * degree + 1)
    covariance = matrix @ matrix.T
    along = np.sum(f * (covariance @ f), axis=0) / np.where(power > 0, power, 1.0)
    along = np.where(power > 0, along, np.trace(covariance) / (2 * degree + 1))
    return np.sqrt(power / scale), along / scale


def _noise_variance(part: _Run, y: _Float) -> _Float:
    """Variance of one volume, pooled over b=0 repeats and residuals of the SH fits."""
    total = np.zeros(y.shape[1])
    for group in part.b0_groups:
        total += np.sum((y[group] - y[group].mean(axis=0)) ** 2, axis=0)
    for shell, estimator in zip(part.shells, part.estimators, strict=True):
        if estimator.degrees_of_freedom:
            x = y[shell.volumes]
            total += np.sum((x - estimator.fitted.T @ (estimator.fitted @ x)) ** 2, axis=0)
    return total / part.degrees_of_freedom
