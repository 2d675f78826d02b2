"""The tables of the report: acquisition values with their provenance, and ROI statistics."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

from bids_gacelle.report import text

ROI_FIRST = ("mean", "std", "median", "n_valid", "coverage", "at_bound")
ROI_REST = ("iqr", "cov", "q05", "q95", "min", "max", "weighted_mean", "n_voxels")
ROI_TITLES = {
    "mean": "mean",
    "std": "SD",
    "median": "median",
    "n_valid": "n",
    "coverage": "coverage",
    "at_bound": "at a bound",
    "iqr": "IQR",
    "cov": "CoV",
    "q05": "5 %",
    "q95": "95 %",
    "min": "min",
    "max": "max",
    "weighted_mean": "mean weighted by 1/SD²",
    "n_voxels": "voxels in ROI",
}
_LISTED = 16


def acquisition_values(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarise each quantity in a row: name, unit, value(s) in short, where they were read.

    Parameters
    ----------
    entries : the manifest's ``acquisition``: name, unit, values, sources
    """
    rows = []
    for entry in entries:
        values = list(entry.get("values") or [])
        distinct = list(dict.fromkeys(values))
        if not values:
            shown = "none"
        elif len(distinct) == 1:
            shown = text.number(values[0], 6)
        elif len(values) <= _LISTED:
            shown = ", ".join(text.number(v, 5) for v in values)
        else:
            low, high = text.number(min(values)), text.number(max(values))
            shown = f"{len(values)} values from {low} to {high}, see the list"
        sources = list(dict.fromkeys(str(s) for s in entry.get("sources") or []))
        rows.append(
            {
                "name": entry.get("name", ""),
                "unit": text.unit(str(entry.get("unit", ""))) or "none",
                "value": shown,
                "sources": sources,
            }
        )
    return rows


def acquisition_lists(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tabulate quantities that vary together (shells, echoes): one row per distinct combination.

    Values that only jitter (gradient amplitudes per volume) are grouped at gaps of 2 % of the
    largest one. Lists that ``acquisition_values`` already shows in full are left out.
    """
    tables = []
    for length in dict.fromkeys(len(entry.get("values") or []) for entry in entries):
        together = [e for e in entries if len(e.get("values") or []) == length]
        if length < 2 or (len(together) == 1 and length <= _LISTED):
            continue
        columns = [_grouped([float(v) for v in entry["values"]]) for entry in together]
        combined = list(zip(*columns, strict=True))
        counts = Counter(combined)
        unique = len(counts) == length
        rows = list(counts) if unique else sorted(counts)
        head = [text.with_unit(str(e.get("name", "")), str(e.get("unit", ""))) for e in together]
        tables.append(
            {
                "head": ["measurement" if unique else "number", *head],
                "rows": [
                    [str(n + 1 if unique else counts[row]), *(label for _, label in row)]
                    for n, row in enumerate(rows)
                ],
                "length": length,
            }
        )
    return tables


def _grouped(values: list[float]) -> list[tuple[float, str]]:
    """Each value as (representative, label); close values share one when there are many."""
    distinct = sorted(set(values))
    if len(distinct) <= _LISTED:
        return [(v, text.number(v, 5)) for v in values]
    gap = 0.02 * max(abs(distinct[0]), abs(distinct[-1]))
    clusters: list[list[float]] = [[distinct[0]]]
    for value in distinct[1:]:
        if value - clusters[-1][-1] > gap:
            clusters.append([])
        clusters[-1].append(value)
    named: dict[float, tuple[float, str]] = {}
    for cluster in clusters:
        members = [v for v in values if cluster[0] <= v <= cluster[-1]]
        mean = sum(members) / len(members)
        label = text.number(mean, 4)
        if cluster[0] < cluster[-1]:
            label += f" ({text.number(cluster[0], 4)} to {text.number(cluster[-1], 4)})"
        named |= dict.fromkeys(cluster, (mean, label))
    return [named[v] for v in values]


def adequacy_rows(
    expected: list[dict[str, Any]], obtained: dict[str, dict[str, list[float]]]
) -> list[dict[str, Any]]:
    """Put the standard deviations that were expected beside those of the maps.

    Parameters
    ----------
    expected
        The ``expected`` of the fit's ``adequacy``: tissue, parameter, unit, value, sd,
        posterior_sd, verdict.
    obtained
        The manifest's ``obtained_sd``: by tissue and quantity, the median standard deviation and
        the share of voxels that have one; ``all voxels`` stands in for a tissue that is not there.

    Returns
    -------
    One row per tissue and quantity, with ``state``, how the verdict is shown, and ``span``, the
    number of rows of the tissue that begins here (0: it began before).
    """
    states = {"estimable": "ok", "poorly estimable voxel by voxel": "incomplete", "": ""}
    rows = []
    for n, row in enumerate(expected):
        tissue, name = str(row["tissue"]), str(row["parameter"])
        where = tissue if tissue in obtained else "all voxels"
        median, share = obtained.get(where, {}).get(name, (None, None))
        verdict = str(row.get("verdict") or "")
        rows.append(
            {
                "tissue": tissue,
                "span": _span(expected, n),
                "parameter": name,
                "unit": text.unit(str(row.get("unit", ""))),
                "value": text.number(row.get("value"), 3),
                "sd": text.number(row.get("sd"), 2),
                "posterior_sd": text.number(row.get("posterior_sd"), 2),
                "obtained": text.number(median, 2),
                "where": where,
                "share": share,
                "verdict": verdict.removesuffix(" by this protocol"),
                "state": states.get(verdict, "failed"),
            }
        )
    return rows


def _span(expected: list[dict[str, Any]], n: int) -> int:
    """Return the number of rows of the tissue that begins in a row, 0 if it began before."""
    tissues = [row["tissue"] for row in expected]
    return 0 if n and tissues[n - 1] == tissues[n] else tissues.count(tissues[n])


def read_rois(path: Path) -> list[dict[str, str]]:
    """Read the rows of a scalarstats table.

    Raises
    ------
    FileNotFoundError
        There is no such table.
    ValueError
        A column that identifies the row is missing, or there are no rows.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", restval="n/a"))
    if not rows:
        raise ValueError(f"{path.name} has no rows")
    lacking = [name for name in ("index", "name", "param") if name not in rows[0]]
    if lacking:
        raise ValueError(f"{path.name} has no column {', '.join(lacking)}")
    return rows


def roi_cells(row: dict[str, str], columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Format the cells of one row: text to read and number to sort by (None without one)."""
    cells = []
    for name in columns:
        value = text.finite(row.get(name))
        if name in ("coverage", "cov", "at_bound"):
            shown = text.percent(value)
        elif name.startswith("n_"):
            shown = text.count(value)
        else:
            shown = text.number(value)
        cells.append({"text": shown, "sort": value})
    return cells
