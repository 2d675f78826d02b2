"""Which raw volume each volume of a concatenated dwi image was.

QSIPrep joins the dwi runs of a session into one image. What differs between the runs, such as
diffusion times, then needs the order in which they were joined: its table of confounds names the
raw file of every volume; without it, the b-values tell where they allow one order only.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bids_gacelle.bids.files import BidsFile, Dataset
from bids_gacelle.bids.gradients import B_GAP
from bids_gacelle.bids.metadata import MetadataError, Sidecars
from bids_gacelle.bids.series import Sourced

_Float = npt.NDArray[np.float64]
_ADVICE = "Give it per volume in the sidecar of the preprocessed image, or pass --timing-file."


@dataclass(frozen=True)
class RunImage:
    """A dwi image with what is needed to look up its metadata."""

    dataset: Dataset
    image: BidsFile
    b: _Float
    """(volumes,) s/mm^2."""
    b0_threshold: float

    @property
    def weighted(self) -> npt.NDArray[np.bool_]:
        """(volumes,) True where b is above the b0 threshold: only there must times make sense."""
        return self.b > self.b0_threshold

    @property
    def sidecars(self) -> Sidecars:
        """The JSON files of the image."""
        return Sidecars(self.dataset, self.image)

    def at_weighted(self, times: Sourced) -> _Float:
        """Values of the diffusion-weighted volumes."""
        return np.broadcast_to(times.values, len(self.b))[self.weighted]


def joined_values(
    field: str,
    run: RunImage,
    parents: Sequence[RunImage],
    values: Sequence[Sourced | None],
    unit: str,
) -> Sourced:
    """Values per volume of an image that was joined of raw runs which differ in them.

    Raises
    ------
    MetadataError
        A run has none, or it cannot be told which volume is of which run.
    """
    # a run of b=0 volumes has an echo time but needs no diffusion times
    needed = [p.weighted.any() or field == "EchoTime" for p in parents]
    if any(v is None and need for v, need in zip(values, needed, strict=True)):
        raise _order_lost(field, run, parents, values, unit, "")
    columns = [
        np.broadcast_to(v.values if v else (0.0,), len(p.b))
        for v, p in zip(values, parents, strict=True)
    ]
    volumes = _volumes(run, parents) or _by_b_values(field, run, parents, values, columns, unit)
    labels = [
        v.sources[0] if v else f"{p.image.label}: b=0"
        for v, p in zip(values, parents, strict=True)
    ]
    sources = tuple(labels[i] for i, _ in volumes)
    return Sourced(
        tuple(float(columns[i][k]) for i, k in volumes),
        unit,
        sources if len(set(sources)) > 1 else sources[:1],
    )


def _volumes(run: RunImage, parents: Sequence[RunImage]) -> list[tuple[int, int]] | None:
    """Run and volume of each volume by the table of confounds beside the image, if it says."""
    own = {k: v for k, v in run.image.entities.items() if k not in ("space", "desc", "res")}
    for table in run.dataset.files:
        if (
            table.path.parent == run.image.path.parent
            and (table.suffix, table.extension) == ("timeseries", ".tsv")
            and table.entities == {**own, "desc": "confounds"}
        ):
            names = [p.image.path.name for p in parents]
            found = listed_volumes(table.path, names, [len(p.b) for p in parents])
            if found and same_b_values(
                run.b, np.array([parents[i].b[k] for i, k in found]), run.b0_threshold
            ):
                return found
    return None


def _by_b_values(
    field: str,
    run: RunImage,
    parents: Sequence[RunImage],
    values: Sequence[Sourced | None],
    columns: Sequence[_Float],
    unit: str,
) -> list[tuple[int, int]]:
    """Run and volume of each volume by the only order in which the b-values fit."""
    kinds = [(tuple(p.b), tuple(c)) for p, c in zip(parents, columns, strict=True)]
    found: dict[tuple[float, ...], tuple[int, ...]] = {}
    for order in possible_orders(run.b, [p.b for p in parents], kinds, run.b0_threshold):
        found[tuple(np.concatenate([columns[i] for i in order]))] = order
        if len(found) > 1:
            why = "their b-values fit in more than one order"
            raise _order_lost(field, run, parents, values, unit, why)
    if not found:
        total = sum(len(p.b) for p in parents)
        why = f"in no order are their {total} b-values those of its {len(run.b)} volumes"
        raise _order_lost(field, run, parents, values, unit, why)
    (order,) = found.values()
    return [(i, k) for i in order for k in range(len(parents[i].b))]


def _order_lost(
    field: str,
    run: RunImage,
    parents: Sequence[RunImage],
    values: Sequence[Sourced | None],
    unit: str,
    why: str,
) -> MetadataError:
    listed = ", ".join(
        f"{p.image.label}: " + (f"{value_range(p.at_weighted(v))} {unit}" if v else "none")
        for v, p in zip(values, parents, strict=True)
        if p.weighted.any()
    )
    runs = f"the {len(parents)} raw runs" if len(parents) > 1 else "the volumes of the raw run"
    return MetadataError(
        f"`{field}` of the volumes of `{run.image.label}` is not known: {runs} it may stem from "
        f"differ ({listed}){f', and {why}' if why else ''}. {_ADVICE}",
        run.image.path,
        field,
    )


def value_range(values: _Float) -> str:
    """Smallest and largest value in words, one number where they are equal."""
    low, high = f"{values.min():.6g}", f"{values.max():.6g}"
    return low if low == high else f"{low} to {high}"


def listed_volumes(
    table: Path, names: Sequence[str], lengths: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Read the raw file of each volume from a table of confounds.

    Parameters
    ----------
    table : tab-separated, with a column ``original_file`` and a row per volume.
    names : file names of the raw runs.
    lengths : number of volumes of each.

    Returns
    -------
    (run, volume in it) of every volume, the volumes of a run in their own order; None where the
    table does not say, or names other files or other numbers of volumes.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            listed = [row.get("original_file") for row in csv.DictReader(file, delimiter="\t")]
    except (OSError, ValueError, csv.Error):
        return None
    if not listed or any(name not in names for name in listed):
        return None
    counted: Counter[int] = Counter()
    result = []
    for name in listed:
        run = names.index(name or "")
        result.append((run, counted[run]))
        counted[run] += 1
    whole = all(count == lengths[run] for run, count in counted.items())
    return result if whole else None


def possible_orders(
    b: _Float,
    parts: Sequence[_Float],
    kinds: Sequence[Hashable],
    b0_threshold: float,
) -> Iterator[tuple[int, ...]]:
    """Orders of the runs whose b-values, one after the other, are those of an image.

    Parameters
    ----------
    b : (N,) of the image, s/mm^2.
    parts : b-values of each run. A run of b=0 volumes only may be missing in the image, any other
        must be in it.
    kinds : runs of the same kind are interchangeable: of the orders that differ in nothing else,
        one is given.
    b0_threshold : b-values up to this one are all alike.

    Yields
    ------
    Indices into ``parts``.
    """
    optional = [bool((part <= b0_threshold).all()) for part in parts]

    def orders(start: int, left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if start == len(b) and all(optional[i] for i in left):
            yield ()
            return
        tried = set()
        for i in left:
            end = start + len(parts[i])
            if kinds[i] in tried or end > len(b):
                continue
            tried.add(kinds[i])
            if same_b_values(b[start:end], parts[i], b0_threshold):
                for rest in orders(end, tuple(j for j in left if j != i)):
                    yield (i, *rest)

    return orders(0, tuple(range(len(parts))))


def same_b_values(a: _Float, b: _Float, b0_threshold: float) -> bool:
    """Whether b-values agree one by one, up to what separates two shells (both b=0, or close)."""
    if a.shape != b.shape:
        return False
    low = (a <= b0_threshold) & (b <= b0_threshold)
    high = (a > b0_threshold) & (b > b0_threshold)
    close = np.abs(a - b) <= np.maximum(B_GAP[0], B_GAP[1] * np.maximum(a, b))
    return bool((low | (high & close)).all())
