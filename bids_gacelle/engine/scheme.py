"""Acquisitions as data: what was measured, in fixed units, with nothing about files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bids_gacelle.engine.errors import EngineError

FloatArray = NDArray[np.float64]


def _column(name: str, unit: str, values: ArrayLike, *, zero: bool = False) -> FloatArray:
    """Return `values` as a vector of finite positive numbers, or with `zero` also 0."""
    try:
        array = np.atleast_1d(np.array(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise EngineError(f"{name} must be a list of numbers in {unit}: {error}.") from error
    if array.ndim != 1 or array.size == 0:
        raise EngineError(f"{name} must be a list of numbers in {unit}, got shape {array.shape}.")
    good = np.isfinite(array) & ((array > 0) | (zero & (array == 0)))
    if not good.all():
        wanted = "number of at least 0" if zero else "positive number"
        raise EngineError(
            f"{name} holds {array[~good][0]}; every value must be a finite {wanted} in {unit}."
        )
    return array


def _equal_length(columns: dict[str, FloatArray | None]) -> dict[str, FloatArray | None]:
    """Broadcast single values to the common length; raise EngineError when lengths differ."""
    lengths = {name: column.size for name, column in columns.items() if column is not None}
    if not lengths:
        raise EngineError(f"The acquisition is empty: give at least one of {', '.join(columns)}.")
    n = max(lengths.values())
    wrong = {name: size for name, size in lengths.items() if size not in (1, n)}
    if wrong:
        listed = ", ".join(f"{name} has {size}" for name, size in lengths.items())
        raise EngineError(f"The columns of the acquisition differ in length: {listed}.")
    out: dict[str, FloatArray | None] = {}
    for name, column in columns.items():
        if column is not None:
            column = np.broadcast_to(column, (n,)).copy()
            column.setflags(write=False)
        out[name] = column
    return out


class _Scheme:
    """Columns of equal length, one entry per measurement; read-only."""

    _names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of entries."""
        return next(len(c) for c in self.columns().values() if c is not None)

    def __repr__(self) -> str:
        """Return the constructor call that makes this scheme."""
        given = {k: v.tolist() for k, v in self.columns().items() if v is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in given.items())})"

    def columns(self) -> dict[str, FloatArray | None]:
        """Return all columns by name, None for those that were not given."""
        return {name: getattr(self, name) for name in self._names}

    def take(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Self:
        """Return the scheme of some of the measurements, chosen by a mask or by their places."""
        return type(self)(**{k: None if c is None else c[rows] for k, c in self.columns().items()})


class DiffusionScheme(_Scheme):
    """Diffusion weightings of the shells, one entry per shell.

    Parameters
    ----------
    b
        b-values in ms/um^2 (s/mm^2 divided by 1000). Signals of one echo time are relative to
        b = 0, which is then no shell; at several echo times it may be.
    big_delta, small_delta
        Gradient separation and duration in ms; None for models that need no timing.
    echo_time
        Echo time in s, or None.
    n_directions
        Number of gradient directions averaged in each shell, or None; of weighted averages the
        effective one, 1 / sum w^2, of b = 0 the number of volumes.

    Raises
    ------
    EngineError
        A value is not positive (b: negative) or not finite, the lengths differ, or a pulse lasts
        longer than the separation of the two.
    """

    _names = ("b", "big_delta", "small_delta", "echo_time", "n_directions")

    def __init__(
        self,
        b: ArrayLike,
        big_delta: ArrayLike | None = None,
        small_delta: ArrayLike | None = None,
        echo_time: ArrayLike | None = None,
        n_directions: ArrayLike | Sequence[int] | None = None,
    ) -> None:
        given: dict[str, tuple[Any, str]] = {
            "b": (b, "ms/um^2"),
            "big_delta": (big_delta, "ms"),
            "small_delta": (small_delta, "ms"),
            "echo_time": (echo_time, "s"),
            "n_directions": (n_directions, "directions"),
        }
        columns = _equal_length(
            {
                k: None if v is None else _column(k, unit, v, zero=k == "b")
                for k, (v, unit) in given.items()
            }
        )
        self.b: FloatArray = columns["b"]  # type: ignore[assignment]
        self.big_delta = columns["big_delta"]
        self.small_delta = columns["small_delta"]
        self.echo_time = columns["echo_time"]
        self.n_directions = columns["n_directions"]
        if self.big_delta is not None and self.small_delta is not None:
            late = self.small_delta > self.big_delta
            if late.any():
                raise EngineError(
                    f"small_delta {self.small_delta[late][0]} ms is longer than big_delta "
                    f"{self.big_delta[late][0]} ms; a pulse cannot outlast the separation."
                )


class GradientEchoScheme(_Scheme):
    """Echo times, flip angles and repetition times of gradient-echo images, one entry per image.

    Parameters
    ----------
    echo_time
        Echo times in s, or None.
    flip_angle
        Nominal flip angles in degrees, or None.
    repetition_time
        Repetition times (excitation to excitation) in s, or None.
    field_strength
        Static magnetic field in T, or None.
    spoiling_increment
        Increment of the RF phase from one excitation to the next, from which quadratic RF spoiling
        is made, in degrees; 0 without RF spoiling, None where it is not known.

    Notes
    -----
    A single value stands for all measurements.

    Raises
    ------
    EngineError
        A value is not positive (spoiling_increment: negative) or not finite, or lengths differ.
    """

    _names = ("echo_time", "flip_angle", "repetition_time", "field_strength", "spoiling_increment")

    def __init__(
        self,
        echo_time: ArrayLike | None = None,
        flip_angle: ArrayLike | None = None,
        repetition_time: ArrayLike | None = None,
        field_strength: ArrayLike | None = None,
        spoiling_increment: ArrayLike | None = None,
    ) -> None:
        given: dict[str, tuple[Any, str]] = {
            "echo_time": (echo_time, "s"),
            "flip_angle": (flip_angle, "degrees"),
            "repetition_time": (repetition_time, "s"),
            "field_strength": (field_strength, "T"),
            "spoiling_increment": (spoiling_increment, "degrees"),
        }
        columns = _equal_length(
            {
                k: None if v is None else _column(k, unit, v, zero=k == "spoiling_increment")
                for k, (v, unit) in given.items()
            }
        )
        self.echo_time = columns["echo_time"]
        self.flip_angle = columns["flip_angle"]
        self.repetition_time = columns["repetition_time"]
        self.field_strength = columns["field_strength"]
        self.spoiling_increment = columns["spoiling_increment"]

    def excitations(self) -> tuple[NDArray[np.intp], FloatArray]:
        """Return the excitation, a pair of flip angle and repetition time, that made each image.

        Returns
        -------
        number, values
            (images,) counted from 0, and (excitations, 2) their flip angles in degrees and
            repetition times in s, in ascending order; 0 where the scheme has none.
        """
        columns = [
            np.zeros(len(self)) if column is None else column
            for column in (self.flip_angle, self.repetition_time)
        ]
        rows: FloatArray = np.stack(columns, 1).round(6)
        values, number = np.unique(rows, axis=0, return_inverse=True)
        return number.reshape(-1), values


Scheme = DiffusionScheme | GradientEchoScheme
