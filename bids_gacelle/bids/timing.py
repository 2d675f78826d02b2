"""Diffusion times of a dwi run: the first source that has them wins, and is written down.

Order: command line, ``--timing-file``, ``--scheme-file``, the sidecar fields ``SmallDelta`` with
``BigDelta`` or ``LargeDelta``, text files ``.smalldelta`` and ``.bigdelta`` beside the image, and
for preprocessed images the same in the raw runs, put in the order in which these were joined.
Numbers are in s; numbers of 1 or more can only be ms and are read so with a warning.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bids_gacelle.bids.concatenation import (
    RunImage,
    joined_values,
    same_b_values,
    value_range,
)
from bids_gacelle.bids.files import BidsFile, loose_file
from bids_gacelle.bids.gradients import read_numbers
from bids_gacelle.bids.layouts import LAYOUTS
from bids_gacelle.bids.metadata import (
    Found,
    MetadataError,
    as_list,
    as_number,
    number,
    per_volume,
)
from bids_gacelle.bids.options import Options
from bids_gacelle.bids.schemes import read_scheme
from bids_gacelle.bids.series import Sourced

_FIELDS = {"SmallDelta": ("SmallDelta",), "BigDelta": ("BigDelta", "LargeDelta")}
_OPTIONS = {"SmallDelta": "--small-delta", "BigDelta": "--big-delta"}
_EXAMPLES = {"SmallDelta": "0.006", "BigDelta": "0.021", "LargeDelta": "0.021"}
_SHORTEST, _LONGEST = 0.1, 1000.0  # ms
_TOLERANCE = 0.01  # ms
_ECHO_TOLERANCE = 1e-4  # s
_Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Timing:
    """Diffusion times of one run, or the ``problem`` why there are none."""

    small_delta: Sourced | None
    big_delta: Sourced | None
    echo_time: Sourced | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    problem: MetadataError | None
    overruled: Mapping[str, Sourced]
    """Times in files of the image itself that an option replaces, by field."""


def resolve_timing(run: RunImage, parents: Sequence[RunImage], options: Options) -> Timing:
    """Find SmallDelta, BigDelta and EchoTime of a run.

    Parameters
    ----------
    run : the image that is fitted.
    parents : raw runs that a preprocessed image may stem from; used when the image itself has
        no times, and where they differ only if their order can be told.
    options : command line.

    Raises
    ------
    MetadataError
        An echo time that cannot be right. Problems with the diffusion times are returned, since
        not every model needs them.
    """
    warnings: list[str] = []
    echo_time = _echo_time(run, parents, options, warnings.append)
    overruled = {f: t for f in _FIELDS if (t := _overruled(f, run, parents, options, warnings))}
    try:
        small, big = (_resolve(f, run, parents, options, warnings.append) for f in _FIELDS)
        if small and big:
            _check_order(small, big, run)
            notes = tuple(_joined_notes(run, {"SmallDelta": small, "BigDelta": big}, echo_time))
            return Timing(small, big, echo_time, tuple(warnings), notes, None, overruled)
        absent = [f for f, v in zip(_FIELDS, (small, big), strict=True) if not v]
        problem = _missing(run, parents, absent, options)
    except MetadataError as error:
        problem = error
    notes = tuple(_joined_notes(run, {}, echo_time))
    return Timing(None, None, echo_time, (), notes, problem, overruled)


def _resolve(
    field: str,
    run: RunImage,
    parents: Sequence[RunImage],
    options: Options,
    warn: Callable[[str], None],
) -> Sourced | None:
    if (given := _given(field, options)) is not None:
        return Sourced((given,), "ms", (_OPTIONS[field],))
    own = next(_candidates(field, run, options), None)
    if own is None:
        return _from_parents(field, run, parents, options, warn)
    times = _in_ms(*own, run, options, warn)
    if len(times.values) > 1 or own[0].file.path in (options.timing_file, options.scheme_file):
        return times
    return _or_from_differing(field, times, own[0].file, run, parents, options, warn)


def _given(field: str, options: Options) -> float | None:
    return {"SmallDelta": options.small_delta_ms, "BigDelta": options.big_delta_ms}[field]


def _overruled(
    field: str,
    run: RunImage,
    parents: Sequence[RunImage],
    options: Options,
    warnings: list[str],
) -> Sourced | None:
    """Times that files have although an option gives them; warn where the two differ."""
    given = _given(field, options)
    if given is None:
        return None
    used = f"; {_OPTIONS[field]} {given:g} ms is used instead"
    own: Sourced | None = None
    for image in (run, *(p for p in parents if p.weighted.any())):
        try:
            stated = options if image is run else _of_raw(options)
            candidate = next(_candidates(field, image, stated), None)
            if not candidate:
                continue
            found, name = candidate
            times = _in_ms(found, name, image, options, _silent)
        except MetadataError as error:
            warnings.append(str(error).rstrip(".") + used)
            continue
        if _apart(values := image.at_weighted(times), given):
            warnings.append(f"`{name}` is {value_range(values)} ms in `{found.file.label}`{used}")
        if image is run:
            own = times
            break
    return own


def differing_times(runs: Sequence[Mapping[str, Sourced]]) -> MetadataError | None:
    """One option given for runs of a joined series whose own times differ: all but one are lost.

    Parameters
    ----------
    runs : `Timing.overruled` of each run.
    """
    for field in _FIELDS:
        stated = [times[field] for times in runs if field in times]
        for first, second in combinations(stated, 2):
            a, b = np.array(first.values), np.array(second.values)
            if a.shape == b.shape and not _apart(a, b):
                continue
            return MetadataError(
                f"{_OPTIONS[field]} would replace times that differ between the runs of one "
                f"series: {value_range(a[a > 0])} ms ({first.sources[0]}) and "
                f"{value_range(b[b > 0])} ms ({second.sources[0]}). Leave {_OPTIONS[field]} out, "
                "correct the sidecars, or fit the runs apart (without --combine-dwi).",
                field=field,
            )
    return None


def _apart(a: npt.ArrayLike, b: npt.ArrayLike) -> bool:
    return not np.allclose(a, b, rtol=0, atol=_TOLERANCE)


def _candidates(field: str, run: RunImage, options: Options) -> Iterator[tuple[Found, str]]:
    """Values as they stand in files, best source first, and the name of the field there."""
    if options.timing_file and (
        column := _timing_column(field, options.timing_file, len(run.weighted))
    ):
        yield column, field
    if options.scheme_file and (column := _scheme_column(field, options.scheme_file, run)):
        yield column, field
    for name in _FIELDS[field]:
        if found := run.sidecars.find(name):
            yield found, name
    for text in run.dataset.inherited(run.image, f".{field.lower()}"):
        yield Found(read_numbers(text.path), text), field


def _in_ms(
    found: Found, name: str, run: RunImage, options: Options, warn: Callable[[str], None]
) -> Sourced:
    raw = as_list(found, name, len(run.weighted))
    values = np.array([np.nan if (v := number(r)) is None else v for r in raw])
    # times of b=0 volumes mean nothing: a missing or zero one is no fault
    used = values[run.weighted] if len(values) > 1 else values
    where = f"`{name}` in `{found.file.label}`"
    if np.isnan(used).any():
        odd = next(r for r, v in zip(raw, values, strict=True) if np.isnan(v))
        raise MetadataError(
            f"{where} holds {odd!r}; numbers in s are needed, e.g. {_EXAMPLES[name]}.",
            found.file.path,
            name,
        )
    is_ms = used.max() >= 1
    if is_ms and name not in options.assume_ms:
        warn(
            f"{where} is {value_range(used)}, which cannot be s (as BIDS has it) and was read as "
            f"ms; write {value_range(used / 1000)} there"
        )
    scale = 1.0 if is_ms or name in options.assume_ms else 1000.0
    if used.min() * scale < _SHORTEST or used.max() * scale > _LONGEST:
        raise MetadataError(
            f"{where} is {value_range(used)}: as {value_range(used * scale)} ms that is no "
            f"diffusion time ({_SHORTEST:g} to {_LONGEST:g} ms); correct it.",
            found.file.path,
            name,
        )
    values = used[:1] if np.ptp(used) == 0 else np.nan_to_num(values)
    times = tuple(round(float(v) * scale, 9) for v in values)
    return Sourced(times, "ms", (f"{found.file.label}: {name}",))


def _from_parents(
    field: str,
    run: RunImage,
    parents: Sequence[RunImage],
    options: Options,
    warn: Callable[[str], None],
) -> Sourced | None:
    """Look in the raw run, or in several concatenated ones, each with its own times."""
    times = [_times_of(field, p, options, warn) if p.weighted.any() else None for p in parents]
    weighted = [t for t, parent in zip(times, parents, strict=True) if parent.weighted.any()]
    if not any(weighted):
        return None
    first = weighted[0]
    if first and all(t and len(t.values) == 1 and not _differ(t, first) for t in weighted):
        return first
    return joined_values(field, run, parents, times, "ms")


def _silent(_: str) -> None:
    """For values that are only compared, and so need no warning."""


def _of_raw(options: Options) -> Options:
    """Options for a raw run: files of the command line are about what was made of it."""
    return replace(options, timing_file=None, scheme_file=None)


def _times_of(
    field: str, parent: RunImage, options: Options, warn: Callable[[str], None]
) -> Sourced | None:
    """Times of a raw run."""
    found = next(_candidates(field, parent, _of_raw(options)), None)
    return _in_ms(*found, parent, options, warn) if found else None


def _differ(a: Sourced, b: Sourced, tolerance: float = _TOLERANCE) -> bool:
    return len(a.values) != len(b.values) or not np.allclose(a.values, b.values, 0, tolerance)


def _or_from_differing(
    field: str,
    own: Sourced,
    file: BidsFile,
    run: RunImage,
    parents: Sequence[RunImage],
    options: Options,
    warn: Callable[[str], None],
) -> Sourced:
    """Keep the one time in a file of the image itself, unless it was joined of runs that differ.

    A pipeline may hand on the sidecar of the first run only.
    """
    weighted = [p for p in parents if p.weighted.any()]
    try:
        stated = [_times_of(field, p, options, _silent) for p in weighted]
    except MetadataError:
        return own
    first = stated[0] if stated else None
    if not first or not all(stated) or not any(s and _differ(s, first) for s in stated):
        return own
    joined = _from_parents(field, run, parents, options, warn)
    assert joined is not None
    warn(
        f"`{field}` is {own.values[0]:g} ms for all volumes in `{file.label}`, but the raw runs "
        "of the image differ; those of the raw runs are used"
    )
    return joined


def _joined_notes(
    run: RunImage, times: Mapping[str, Sourced], echo_time: Sourced | None
) -> Iterator[str]:
    """Say of what an image was joined, where its times were put together from raw runs."""
    for field, value in {**times, "EchoTime": echo_time}.items():
        if value and len(value.sources) > 1:
            order = ", ".join(dict.fromkeys(value.sources))
            yield (
                f"`{field}` of the {len(run.b)} volumes of `{run.image.label}` was put together "
                f"from its raw runs, in this order: {order}"
            )


def _check_order(small: Sourced, big: Sourced, run: RunImage) -> None:
    pulse, separation = (run.at_weighted(t) for t in (small, big))
    if (pulse > separation + _TOLERANCE).any():
        raise MetadataError(
            f"`{run.image.label}`: SmallDelta ({value_range(pulse)} ms, {small.sources[0]}) is "
            f"longer than BigDelta ({value_range(separation)} ms, {big.sources[0]}); correct "
            "them.",
            run.image.path,
            "SmallDelta",
        )


def _missing(
    run: RunImage, parents: Sequence[RunImage], fields: Sequence[str], options: Options
) -> MetadataError:
    looked_in = [run.sidecars.looked_in()]
    looked_in += [f"{p.sidecars.looked_in()} of the raw run" for p in parents if p.weighted.any()]
    add = ", ".join(f'"{f}": {_EXAMPLES[f]}' for f in fields)
    flags = " ".join(f"{_OPTIONS[f]} {float(_EXAMPLES[f]) * 1000:g}ms" for f in fields)
    hint = LAYOUTS[options.input_type].hint if options.input_type in LAYOUTS else ""
    return MetadataError(
        f"{' and '.join(f'`{f}`' for f in fields)} missing for `{run.image.label}`. Looked in: "
        f"{'; '.join(looked_in)}. Add e.g. {add} (s) to {run.image.sibling('.json').name}, or "
        f"pass {flags}.{hint}",
        run.image.path,
        fields[0],
    )


def _echo_time(
    run: RunImage,
    parents: Sequence[RunImage],
    options: Options,
    warn: Callable[[str], None],
) -> Sourced | None:
    """Echo time in s, None when nothing says."""
    if options.timing_file and (
        column := _timing_column("EchoTime", options.timing_file, len(run.b))
    ):
        return _echoes(column, run, options)
    if options.scheme_file and (column := _scheme_column("EchoTime", options.scheme_file, run)):
        return _echoes(column, run, options)
    found = run.sidecars.find("EchoTime")
    own = _echoes(found, run, options) if found else None
    if own and len(own.values) > 1:
        return own
    of_parents = [p.sidecars.find("EchoTime") for p in parents]
    times = [
        _echoes(f, p, options) if f else None for f, p in zip(of_parents, parents, strict=True)
    ]
    known = [t for t in times if t]
    if all(len(t.values) == 1 and not _differ(t, known[0], _ECHO_TOLERANCE) for t in known):
        return own or (known[0] if known and len(known) == len(times) else None)
    # one time cannot be that of an image which was joined of runs with different ones
    joined = joined_values("EchoTime", run, parents, times, "s")
    if own and found:
        warn(
            f"`EchoTime` is {own.values[0]:g} s for all volumes in `{found.file.label}`, but the "
            "raw runs of the image differ; those of the raw runs are used"
        )
    return joined


def _echoes(found: Found, run: RunImage, options: Options) -> Sourced:
    values = tuple(per_volume(found, "EchoTime", len(run.b), options.assume_ms))
    if len(set(values)) == 1:
        values = values[:1]
    return Sourced(values, "s", (found.file.label,))


def _timing_column(field: str, path: Path, n: int) -> Found | None:
    """Read a column of the timing file, in the order of the volumes."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, ValueError, csv.Error) as error:
        raise MetadataError(f"Timing file {path} cannot be read ({error}).", path) from None
    if not rows or "volume" not in rows[0] or len(rows) != n:
        raise MetadataError(
            f"Timing file {path} must have the columns volume, SmallDelta, BigDelta (and EchoTime "
            f"if it varies), separated by tabs, and a row for each of the {n} volumes; it has "
            f"{len(rows)} rows{f' and the columns {list(rows[0])}' if rows else ''}.",
            path,
        )
    if field not in rows[0]:
        return None
    number_of = {as_number(row["volume"]): as_number(row[field]) for row in rows}
    first = min((v for v in number_of if v is not None), default=0)
    if first not in (0, 1) or set(number_of) != {first + i for i in range(n)}:
        raise MetadataError(
            f"Timing file {path}: the column volume must count from 0 (or 1) to {n - 1} (or {n}).",
            path,
        )
    column = [number_of[first + i] for i in range(n)]
    return Found(column, loose_file(path))


def _scheme_column(field: str, path: Path, run: RunImage) -> Found | None:
    """Read the times of a scheme file, which must be of these volumes."""
    table = read_scheme(path)
    if not same_b_values(run.b, table.b, run.b0_threshold):
        raise MetadataError(
            f"Scheme file {path} is not of `{run.image.label}`: it has {len(table.b)} volumes "
            f"with b up to {table.b.max():.0f} s/mm^2, the image {len(run.b)} with b up to "
            f"{run.b.max():.0f}, and they must agree one by one.",
            path,
        )
    name = {"BigDelta": "big_delta", "SmallDelta": "small_delta", "EchoTime": "echo_time"}[field]
    column = getattr(table, name)
    return None if column is None else Found(column.tolist(), loose_file(path))
