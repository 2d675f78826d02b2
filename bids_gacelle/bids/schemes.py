"""Acquisition schemes of Camino and AMICO: one text file with a row per volume.

``VERSION: STEJSKALTANNER`` (AMICO also: 1) has the columns gx gy gz |G| Delta delta TE in T/m and
s; ``VERSION: BVECTOR`` (AMICO also: 0) has gx gy gz b, in s/m^2 for Camino and s/mm^2 for AMICO.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bids_gacelle.bids.metadata import MetadataError

_Float = npt.NDArray[np.float64]

GAMMA = 2.6751525e8  # rad/s/T, proton
_COLUMNS = {
    "STEJSKALTANNER": "gx gy gz |G| Delta delta TE",
    "BVECTOR": "gx gy gz b",
}
_NUMBERED = {"0": "BVECTOR", "1": "STEJSKALTANNER"}
_STRONGEST = 5.0  # T/m, above those of any scanner; below any gradient in mT/m
_LONGEST = 1.0  # s, of a time; below any time in ms
_SI_B = 1e6  # b-values that reach this are in s/m^2: as s/mm^2 they would be 1000 ms/um^2


@dataclass(frozen=True)
class SchemeTable:
    """An acquisition volume by volume; the times are None where the file has none.

    Attributes
    ----------
    b : (N,) s/mm^2.
    directions : (N, 3), 0 at b = 0.
    big_delta, small_delta, echo_time : (N,) s.
    note : what the unit of the b-values was taken for, "" where it is certain.
    """

    b: _Float
    directions: _Float
    big_delta: _Float | None = None
    small_delta: _Float | None = None
    echo_time: _Float | None = None
    note: str = ""


def read_scheme(path: str | Path) -> SchemeTable:
    """Read a scheme file.

    Raises
    ------
    MetadataError
        No such file, an unknown version, rows of another length, or numbers in another unit.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise MetadataError(f"`{path}` cannot be read as a scheme file ({error}).", path) from None
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    version = _version(path, lines[0] if lines else "")
    columns = _COLUMNS[version]
    rows = [line.split() for line in lines[1:]]
    try:
        table = np.array([[float(word) for word in row] for row in rows])
        fits = table.ndim == 2 and table.shape[1] == len(columns.split())
    except ValueError:
        fits = False
    if not fits or not np.isfinite(table).all() or (table[:, 3:] < 0).any():
        raise MetadataError(
            f"`{path}`: every row of a {version} scheme needs the numbers {columns}, none of them "
            "negative but the direction.",
            path,
        )
    return (_from_b if version == "BVECTOR" else _from_gradients)(path, table)


def _version(path: Path, line: str) -> str:
    name, _, value = line.partition(":")
    version = _NUMBERED.get(value.strip(), value.strip().upper())
    if name.strip().upper() != "VERSION" or version not in _COLUMNS:
        raise MetadataError(
            f"`{path}` begins with {line[:40]!r}; a scheme file begins with VERSION: "
            "STEJSKALTANNER (or 1) or VERSION: BVECTOR (or 0).",
            path,
        )
    return version


def _from_gradients(path: Path, table: _Float) -> SchemeTable:
    strength, big, small, echo = table[:, 3:].T
    if strength.max() > _STRONGEST or table[:, 4:].max() > _LONGEST:
        raise MetadataError(
            f"`{path}`: gradients of up to {strength.max():g} and times of up to "
            f"{table[:, 4:].max():g} cannot be in T/m and s, as a scheme file has them (not mT/m "
            "and ms).",
            path,
        )
    if (small > big).any():
        raise MetadataError(
            f"`{path}`: delta (column 6) is longer than Delta (column 5) in row "
            f"{int(np.argmax(small > big)) + 1}; are the two columns exchanged?",
            path,
        )
    directions, weighted = _directions(table)
    b = (GAMMA * strength * small) ** 2 * (big - small / 3) * 1e-6
    return SchemeTable(
        np.where(weighted, b, 0.0), directions, big, small, echo if (echo > 0).all() else None
    )


def _from_b(path: Path, table: _Float) -> SchemeTable:
    directions, weighted = _directions(table)
    b = table[:, 3]
    si = b.max() >= _SI_B
    note = (
        ""
        if si
        else f"the b-values of `{path.name}`, up to {b.max():g}, are taken as s/mm^2 (as AMICO "
        "has them): in s/m^2 they would be next to nothing"
    )
    return SchemeTable(np.where(weighted, b * (1e-6 if si else 1.0), 0.0), directions, note=note)


def _directions(table: _Float) -> tuple[_Float, npt.NDArray[np.bool_]]:
    """Unit vectors, and where there are any: a row without a direction is a b=0 volume."""
    length = np.linalg.norm(table[:, :3], axis=1)
    weighted = length > 0
    return table[:, :3] / np.where(weighted, length, 1.0)[:, None], weighted


def scheme_text(
    b: _Float, directions: _Float, big_delta: _Float, small_delta: _Float, echo_time: _Float
) -> str:
    """Write an acquisition as a STEJSKALTANNER scheme.

    The gradient of trapezoids without ramps, from b = GAMMA^2 G^2 delta^2 (Delta - delta/3)
    (Stejskal and Tanner 1965, doi:10.1063/1.1695690).

    Parameters
    ----------
    b : (N,) s/mm^2.
    directions : (N, 3)
    big_delta, small_delta : (N,) s; at b = 0 they may be 0.
    echo_time : (N,) s, 0 where it is unknown.
    """
    weighted = b > 0
    encoding = np.where(weighted, small_delta**2 * (big_delta - small_delta / 3), 1.0)
    strength = np.sqrt(np.where(weighted, b, 0.0) * 1e6 / encoding) / GAMMA
    table = np.column_stack([directions, strength, big_delta, small_delta, echo_time])
    rows = [" ".join(f"{value:.8g}" for value in row) for row in table]
    return "\n".join(["VERSION: STEJSKALTANNER", *rows, ""])
