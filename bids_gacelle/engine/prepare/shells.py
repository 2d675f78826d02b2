"""Which volumes belong together: the shells of a run and the b=0 volumes that divide them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.prepare.volumes import DwiVolumes
from bids_gacelle.engine.scheme import DiffusionScheme

_Float = npt.NDArray[np.floating]
_Index = npt.NDArray[np.intp]

# b-values closer than this to their neighbour in the sorted list belong to the same shell.
_B_GAP = (30.0, 0.05)  # s/mm^2, or this fraction of b, whichever is larger
_B_SPREAD = (100.0, 0.15)  # a chain of b-values longer than this is no shell
_TIMING_GAP_MS = 0.1
ECHO_TIME_GAP_S = 1e-4


@dataclass(frozen=True)
class Shell:
    """Volumes of one b-value and timing (None: unknown), and the b=0 volumes that divide them."""

    volumes: _Index
    b0_volumes: _Index
    directions: _Float
    b: float  # s/mm^2
    big_delta: float | None
    small_delta: float | None
    echo_time: float | None

    def __str__(self) -> str:
        """Return b-value and timing as sentences name them."""
        timing = [f"Delta {self.big_delta:g} ms"] if self.big_delta is not None else []
        timing += [f"delta {self.small_delta:g} ms"] if self.small_delta is not None else []
        timing += [f"TE {1e3 * self.echo_time:g} ms"] if self.echo_time is not None else []
        return f"b = {self.b:.0f} s/mm^2" + (f" ({', '.join(timing)})" if timing else "")


def find_shells(run: DwiVolumes, b0_threshold: float, name: str) -> tuple[list[Shell], list[str]]:
    """Return the shells of a run, sorted by echo time, delta, Delta, b, and doubts about them.

    Raises
    ------
    EngineError
        Gradients or timing cannot be used; the message names the volume or shell.
    """
    bval, directions, notes = _check_gradients(run, b0_threshold, name)
    n = len(bval)
    is_b0 = bval <= b0_threshold
    timing = {
        key: _check_timing(getattr(run, key), key, n, ~is_b0 | (key == "echo_time"), name)
        for key in ("big_delta", "small_delta", "echo_time")
    }
    echo = cluster(timing["echo_time"], ECHO_TIME_GAP_S, n)
    key = np.stack(
        [
            echo,
            cluster(timing["small_delta"], _TIMING_GAP_MS, n),
            cluster(timing["big_delta"], _TIMING_GAP_MS, n),
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
            shell = Shell(volumes, b0_volumes, directions[volumes], b, **of_shell)
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


def cluster(values: _Float | None, gap: float, n: int) -> _Index:
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


def _check_shell(shell: Shell, bval: _Float, name: str) -> None:
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


def shell_scheme(shells: Sequence[Shell], n_directions: Sequence[float]) -> DiffusionScheme:
    """Shells as the acquisition of a model; timing that one does not state is left out."""

    def of(key: str) -> _Float | None:
        values = [getattr(shell, key) for shell in shells]
        return None if any(v is None for v in values) else np.array(values, np.float64)

    return DiffusionScheme(
        b=np.array([shell.b for shell in shells]) / 1e3,
        big_delta=of("big_delta"),
        small_delta=of("small_delta"),
        echo_time=of("echo_time"),
        n_directions=n_directions,
    )
