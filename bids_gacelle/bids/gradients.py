"""b-values and gradient directions as text files, and how many shells they make."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bids_gacelle.bids.metadata import MetadataError
from bids_gacelle.bids.schemes import read_scheme

_Float = npt.NDArray[np.float64]

# As in the engine's signal preparation: b-values closer than this to their neighbour in the
# sorted list are one shell.
B_GAP = (30.0, 0.05)  # s/mm^2, or this fraction of b, whichever is larger
_FEW = 5  # volumes: so few with low b may well be b=0 volumes only
_TIMING_DIGITS = 1  # of times in ms


def read_gradients(bval: str | Path, bvec: str | Path) -> tuple[_Float, _Float]:
    """b-values and directions of a dwi image.

    Parameters
    ----------
    bval : text file of N numbers, s/mm^2.
    bvec : text file of 3 rows of N numbers, or N rows of 3. The same file as ``bval``: a scheme
        file, which holds both.

    Returns
    -------
    (N,) b-values in s/mm^2 and (N, 3) directions as they stand in the file.

    Raises
    ------
    MetadataError
        No numbers, negative b-values, or directions whose shape does not fit the b-values.
    """
    if Path(bval) == Path(bvec):
        table = read_scheme(bval)
        return table.b, table.directions
    b = np.concatenate([np.zeros(0), *_rows(bval)])
    if b.size == 0 or not np.isfinite(b).all() or (b < 0).any():
        raise MetadataError(
            f"`{Path(bval).name}` must hold one b-value from 0 up (s/mm^2) per volume.",
            bval,
        )
    rows = _rows(bvec)
    shape = (len(rows), len(rows[0]) if rows else 0)
    if any(len(row) != shape[1] for row in rows) or 3 not in shape:
        raise MetadataError(
            f"`{Path(bvec).name}` must have 3 rows with a number per volume (or a row of 3 per "
            f"volume), but it has {shape[0]} rows of {sorted({len(r) for r in rows})} numbers.",
            bvec,
        )
    numbers = np.array(rows)
    directions = numbers.T if shape[0] == 3 else numbers
    if len(directions) != len(b):
        raise MetadataError(
            f"`{Path(bvec).name}` has {len(directions)} directions, but `{Path(bval).name}` has "
            f"{len(b)} b-values; both need one per volume.",
            bvec,
        )
    return b, directions


def read_numbers(path: str | Path) -> list[float]:
    """All numbers of a text file, row by row."""
    return [float(value) for row in _rows(path) for value in row]


def _rows(path: str | Path) -> list[list[float]]:
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [[float(word) for word in line.split()] for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise MetadataError(f"`{path.name}` cannot be read as numbers ({error}).", path) from None


class NotWeighted(MetadataError):
    """A run of b=0 volumes only, such as one with reversed phase encoding."""


def check_b_values(b: _Float, b0_threshold: float, name: str, file: Path) -> None:
    """Refuse b-values without b = 0, without diffusion weighting, or in the wrong unit."""
    if b.max() <= b0_threshold:
        message = (
            f"`{name}` has no diffusion-weighted volume: the highest b-value is {b.max():g} "
            f"s/mm^2, not above the b0 threshold of {b0_threshold:g}"
        )
        if 0.1 <= b.max() < 60 and len(b) > _FEW:
            raise MetadataError(f"{message}; they look like ms/um^2, BIDS wants s/mm^2.", file)
        raise NotWeighted(f"{message}.", file)
    if b.min() > b0_threshold:
        raise MetadataError(
            f"`{name}` has no b=0 volume to normalise by: the lowest b-value is {b.min():g} "
            f"s/mm^2; raise --b0-threshold (now {b0_threshold:g}) if it may count as b=0.",
            file,
        )


def shells(
    b: _Float, timing: Sequence[npt.ArrayLike | None], b0_threshold: float
) -> list[tuple[float, ...]]:
    """Distinct measurements above the b0 threshold.

    Parameters
    ----------
    b : (N,) in s/mm^2.
    timing : big delta, small delta (both ms), each one number or (N,), or None.

    Returns
    -------
    One tuple per shell: mean b in s/mm^2, then the times that are given, in ms.
    """
    weighted = b > b0_threshold
    times = [np.broadcast_to(np.asarray(t, float), b.shape) for t in timing if t is not None]
    groups = defaultdict(list)
    for volume in np.flatnonzero(weighted):
        groups[tuple(round(float(t[volume]), _TIMING_DIGITS) for t in times)].append(b[volume])
    result = []
    for group in sorted(groups):
        ordered = np.sort(groups[group])
        gap = np.maximum(B_GAP[0], B_GAP[1] * ordered[1:])
        pieces = np.split(ordered, np.flatnonzero(np.diff(ordered) > gap) + 1)
        result += [(float(piece.mean()), *group) for piece in pieces]
    return result
