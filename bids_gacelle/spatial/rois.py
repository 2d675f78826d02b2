"""Statistics of a map over the regions of a segmentation."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np

from bids_gacelle.errors import InputError

_NAMELESS = ("", "n/a")


def roi_statistics(
    values: np.ndarray,
    labels: np.ndarray,
    lookup: list[tuple[int, str]],
    *,
    std: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Describe the values in each region; one dict per entry of ``lookup``, in its order.

    Parameters
    ----------
    values : ndarray, shape (x, y, z)
        A map; what is not finite does not count.
    labels : ndarray of int, shape (x, y, z)
        Segmentation on the same grid.
    lookup : list of (index, name)
        As `read_lookup` gives it.
    std : ndarray, shape (x, y, z), optional
        Standard deviation of the values, for ``weighted_mean``. Voxels without one (NaN or 0, as
        where a parameter is at its bound) have no weight.
    valid : ndarray of bool, shape (x, y, z), optional
        Voxels that count; all by default.

    Returns
    -------
    list of dict
        index, name, mean, std (n - 1), median, iqr, cov (std over the absolute mean), q05, q95,
        min, max, n_voxels (of the region), n_valid (of those, the ones used), coverage (their
        ratio), weighted_mean (by 1/std^2). What is not defined is NaN: everything but the counts
        in a region without valid voxels, ``std`` of a single voxel, ``cov`` at mean zero,
        ``coverage`` of a region that the segmentation does not have.

    Raises
    ------
    ValueError
        The shapes differ, or the labels are not integers.
    """
    arrays = [values, labels, *(a for a in (std, valid) if a is not None)]
    if len({np.shape(array) for array in arrays}) != 1:
        raise ValueError(f"Shapes differ: {', '.join(str(np.shape(a)) for a in arrays)}")
    if np.asarray(labels).dtype.kind not in "iu":
        raise ValueError("Labels must be integers; see integer_labels")
    voxels = _by_label(np.asarray(labels), [index for index, _ in lookup])
    # float64: the mean of a million float32 values is not known to seven digits
    flat = np.asarray(values, dtype=np.float64).ravel()
    usable = np.isfinite(flat)
    if valid is not None:
        usable &= np.asarray(valid, dtype=bool).ravel()
    spread = None if std is None else np.asarray(std, dtype=np.float64).ravel()
    rows = []
    for index, name in lookup:
        inside = voxels[index]
        used = inside[usable[inside]]
        weights = None if spread is None else spread[used]
        row = {"index": index, "name": name, **_describe(flat[used], weights)}
        row["n_voxels"] = inside.size
        row["coverage"] = used.size / inside.size if inside.size else np.nan
        rows.append(row)
    return rows


def read_lookup(table: Path | str | None, labels: np.ndarray) -> list[tuple[int, str]]:
    """Index and name of every region: those of the table, then those only the image has.

    Parameters
    ----------
    table : path or None
        BIDS ``dseg.tsv``: columns ``index`` and ``name`` (or ``label``, as AtlasPack has it).
        None when the segmentation comes without one.
    labels : ndarray of int
        The segmentation. A label without a name is called ``label-<index>``; 0 is background
        and never a region.

    Raises
    ------
    InputError
        The table cannot be read, lacks a column, or has an index twice or not an integer.
    """
    named = {} if table is None else _read_table(Path(table))
    present = {int(label) for label in np.unique(labels)}
    nameless = sorted(present - set(named) - {0})
    return [*named.items(), *((label, f"label-{label}") for label in nameless)]


def integer_labels(data: np.ndarray, source: Path | str) -> np.ndarray:
    """Labels as integers; segmentations are often stored as floating point numbers.

    Parameters
    ----------
    data : ndarray, shape (x, y, z)
    source : path
        Where they come from, for the message.

    Raises
    ------
    InputError
        A value is not an integer, as after an interpolation that a segmentation must not have.
    """
    data = np.asarray(data)
    if data.dtype.kind in "iu":
        return data
    wrong = data[~(np.isfinite(data) & (data == np.round(data)))]
    if wrong.size:
        raise InputError(
            f"The segmentation {source} has {wrong.size} voxels that are not whole numbers (such "
            f"as {wrong.flat[0]:g}); resample it with nearest neighbours, or give the dseg and "
            "not a probability map."
        )
    return data.astype(np.int64)


def tissue_of(name: str) -> str:
    """``white matter``, ``grey matter`` or ``CSF`` from the name of a region; "" for any other.

    Knows BIDS labels (``WM``), names of FreeSurfer (``Left-Cerebral-White-Matter``,
    ``ctx-lh-insula``) and plain words; nuclei are no class of their own.
    """
    words = set(re.split(r"[^a-z]+", name.lower()))
    if words & {"hypointensities", "hyperintensities", "lesion"}:
        return ""
    if words & {"wm"} or words >= {"white", "matter"}:
        return "white matter"
    if words & {"gm", "ctx", "cortex"} or (words & {"grey", "gray"} and "matter" in words):
        return "grey matter"
    return "CSF" if words & {"csf", "cerebrospinal", "ventricle"} else ""


def _by_label(labels: np.ndarray, wanted: list[int]) -> dict[int, np.ndarray]:
    """Flat positions of the voxels of each label, with one sort for all labels."""
    flat = labels.ravel()
    order = np.argsort(flat, kind="stable")
    ranked = flat[order]
    first = np.searchsorted(ranked, wanted, side="left")
    last = np.searchsorted(ranked, wanted, side="right")
    return {index: order[a:b] for index, a, b in zip(wanted, first, last, strict=True)}


def _describe(values: np.ndarray, std: np.ndarray | None) -> dict[str, Any]:
    nan = float("nan")
    names = ("mean", "std", "median", "iqr", "cov", "q05", "q95", "min", "max")
    row: dict[str, Any] = dict.fromkeys(names, nan)
    row |= {"n_voxels": 0, "n_valid": values.size, "coverage": nan, "weighted_mean": nan}
    if not values.size:
        return row
    q05, q25, median, q75, q95 = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    row |= {"mean": float(values.mean()), "median": median, "iqr": q75 - q25}
    row |= {"q05": q05, "q95": q95, "min": float(values.min()), "max": float(values.max())}
    if values.size > 1:
        row["std"] = float(values.std(ddof=1))
        row["cov"] = row["std"] / abs(row["mean"]) if row["mean"] else nan
    if std is not None:
        known = np.isfinite(std) & (std > 0)
        if known.any():
            # relative to the smallest, so that no square leaves the range of numbers
            weights = (std[known].min() / std[known]) ** 2
            row["weighted_mean"] = float(weights @ values[known] / weights.sum())
    return row


def _read_table(path: Path) -> dict[int, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Cannot read the segmentation table {path}: {error}.") from error
    name = next((column for column in ("name", "label") if column in columns), None)
    if "index" not in columns or name is None:
        raise InputError(
            f"The segmentation table {path} needs tab-separated columns 'index' and 'name'; "
            f"found {', '.join(map(repr, columns)) or 'none'}."
        )
    found: dict[int, str] = {}
    for row in rows:
        index = _index(row["index"], path)
        if index in found:
            raise InputError(f"The segmentation table {path} has index {index} twice; keep one.")
        text = (row[name] or "").strip()
        found[index] = f"label-{index}" if text in _NAMELESS else text
    found.pop(0, None)
    return found


def _index(text: str | None, path: Path) -> int:
    try:
        number = float(text or "")
        if number.is_integer():
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise InputError(
        f"The segmentation table {path} has index {text!r}, which is not a whole number."
    )
