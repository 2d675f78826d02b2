"""Gradient-echo images of one session as series, with everything their sidecars say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from bids_gacelle.bids.candidates import Candidate, groups, kept_entities
from bids_gacelle.bids.files import BidsFile
from bids_gacelle.bids.metadata import (
    QUANTITIES,
    MetadataError,
    Sidecars,
    constant_fields,
    scalar,
    sourced,
)
from bids_gacelle.bids.options import Context
from bids_gacelle.bids.parts import Pair, Parts, pair_parts, same_value, second_part
from bids_gacelle.bids.queries import matches
from bids_gacelle.bids.series import Kind, Series, Sourced

_CONTRASTS = ("mpm", "mts")
"""Queries of protocols whose images differ in flip angle and MT pulse, and often in ``acq``."""
_FEWEST_ECHOES = 3  # of a contrast whose decay is worth a fit of its own
MHZ_PER_T = 42.57747892  # gyromagnetic ratio of protons over 2 pi


def gradient_echo_candidates(
    kind: Kind, context: Context, subject: str, session: str
) -> list[Candidate]:
    """Series of kind ``megre`` or ``vfa``, in the order of names.

    To ``vfa`` belong VFA images and the contrasts of MPM and MTS without MT pulse, which make one
    series whatever their ``acq``; to ``megre`` MEGRE images and each contrast alone.
    """
    images = [f for f in context.raw.images(subject) if f.session == session]
    main = [f for f in images if matches(context.queries[kind], f)]
    found = _main_candidates(kind, main, context)
    others = _contrast_images(kind, images, context)
    if kind == "vfa":
        found += [
            c
            for files in _protocols(others)
            if (c := _vfa(files, _common_entities(files), context)) is not None
        ]
    else:
        contrasts, left_out = _contrasts(others)
        notes = tuple(left_out.values())
        found += [
            replace(c, notes=(*c.notes, *_about_mt(files), *notes))
            for files in contrasts
            for c in [_megre(files, context)]
        ]
    return _without_shared_names(found)


def contrasts_not_offered(kind: Kind, context: Context, subject: str, session: str) -> list[str]:
    """Why a session with MPM or MTS images has nothing of a kind, as parts of a sentence."""
    images = [f for f in context.raw.images(subject) if f.session == session]
    others = _contrast_images(kind, images, context)
    if kind == "megre":
        return list(_contrasts(others)[1].values())
    suffixes = sorted({f.suffix for f in others})
    return [f"all {' and '.join(suffixes)} images have an MT pulse (mt-on)"] if suffixes else []


# ------------------------------------------------------------------------- what belongs together


def _main_candidates(kind: Kind, files: Sequence[BidsFile], context: Context) -> list[Candidate]:
    if kind == "megre":
        return [_megre(group, context) for group in groups(files)]
    # a filter file may make MPM or MTS the images of the query vfa
    suffixes = {s for q in _CONTRASTS for s in _suffixes(context.queries[q])}
    protocols = _protocols([f for f in files if f.suffix in suffixes])
    plain = groups([f for f in files if f.suffix not in suffixes])
    found = [_vfa(group, _common_entities(group), context) for group in (*plain, *protocols)]
    return [c for c in found if c is not None]


def _contrast_images(kind: Kind, images: Iterable[BidsFile], context: Context) -> list[BidsFile]:
    """MPM and MTS images, but for a suffix that the query of the kind itself asks for."""
    own = _suffixes(context.queries[kind])
    queries = [context.queries[q] for q in _CONTRASTS]
    return [f for f in images if f.suffix not in own and any(matches(q, f) for q in queries)]


def _suffixes(query: Mapping[str, Any]) -> set[str]:
    return set(query["suffix"]) if isinstance(query["suffix"], list) else {query["suffix"]}


def _protocols(files: Sequence[BidsFile]) -> list[list[BidsFile]]:
    """Contrasts that belong together: ``acq`` tells them apart, or else whole protocols.

    It tells protocols apart where one ``acq`` has several flip angles.
    """
    found = []
    for suffix in dict.fromkeys(f.suffix for f in files):
        for group in groups([f for f in files if f.suffix == suffix], ignoring="acq"):
            apart = groups(group)
            complete = any(len({f.entities.get("flip") for f in g}) > 1 for g in apart)
            found += apart if complete and len(apart) > 1 else [group]
    return found


def _common_entities(files: Sequence[BidsFile]) -> dict[str, str]:
    """Entities of the names of maps: those that all images of a series have."""
    first = kept_entities(files[0])
    return {k: v for k, v in first.items() if all(f.entities.get(k) == v for f in files)}


def _contrasts(files: Iterable[BidsFile]) -> tuple[list[list[BidsFile]], dict[str, str]]:
    """Contrasts with a name and enough echoes of their own, and why others are left out."""
    found, left_out = [], {}
    by_suffix = defaultdict(list)
    for file in files:
        by_suffix[file.suffix].append(file)
    for suffix, images in by_suffix.items():
        for group in groups(images):
            settings = {(f.entities.get("flip"), f.entities.get("mt")) for f in group}
            echoes = {f.entities.get("echo") for f in group}
            acq = group[0].entities.get("acq")
            name = f"{suffix} images" + (f" acq-{acq}" if acq else "")
            if len(settings) > 1:
                left_out[name] = (
                    f"{name} are no series of echoes: they differ in flip- or mt-, which the "
                    "names of maps cannot keep (acq- would tell them apart)"
                )
            elif len(echoes) < _FEWEST_ECHOES:
                count = "1 echo" if len(echoes) == 1 else f"{len(echoes)} echoes"
                left_out[name] = f"{name} have {count} only, too few for a decay of their own"
            else:
                found.append(group)
    return found, left_out


def _about_mt(files: Sequence[BidsFile]) -> tuple[str, ...]:
    if all(f.entities.get("mt") == "on" for f in files):
        return (
            "acquired with an MT pulse, which weakens the signal of myelin: R2* may differ from "
            "that of images without",
        )
    return ()


def _without_shared_names(found: Sequence[Candidate]) -> list[Candidate]:
    """Leave out series whose maps would have the names of those of another, and say so there."""
    kept: list[Candidate] = []
    places: dict[tuple[tuple[str, str], ...], int] = {}
    for candidate in found:
        key = tuple(sorted(candidate.series.entities.items()))
        if candidate.problem or key not in places:
            if not candidate.problem:
                places[key] = len(kept)
            kept.append(candidate)
            continue
        suffix, query = candidate.files[0].suffix, candidate.series.kind
        note = (
            f"`{candidate.files[0].label}` and its like not used: their maps would have the same "
            "names. To fit them instead, give a filter file with "
            f'{{"{query}": {{"suffix": "{suffix}"}}}}'
        )
        first = kept[places[key]]
        kept[places[key]] = replace(first, notes=(*first.notes, note))
    return kept


# ---------------------------------------------------------------------------------- the two kinds


@dataclass(frozen=True)
class _Read:
    """The images of a series in order, with their sidecars."""

    pairs: tuple[Pair, ...]
    sidecars: tuple[Sidecars, ...]
    columns: Mapping[str, Sourced]


def _megre(files: Sequence[BidsFile], context: Context) -> Candidate:
    start = _start("megre", files, kept_entities(files[0]))
    try:
        parts = pair_parts(_without_ignored(files, context))
        sidecars = _sidecars(parts.pairs, context)
        fields = ("FlipAngle", "RepetitionTimeExcitation", "RepetitionTime")
        _require_one_setting(
            sidecars,
            fields,
            "the images of one series",
            "A decay over echo times needs one setting. Tell the images apart by acq- or run-, or "
            "by a filter file; images of several flip angles are called VFA.",
        )
        echo_time = sourced("EchoTime", sidecars, context.options.assume_ms)
        order = np.argsort(echo_time.values, kind="stable")
        read = _ordered(parts.pairs, sidecars, {"echo_time": echo_time}, order)
        _refuse_repeated(read, ("echo_time",))
        candidate = _filled(start, parts, read, context)
    except MetadataError as error:
        return replace(start, problem=error)
    return replace(candidate, measurements=_distinct(echo_time.values, "TE {:g} s"))


def _vfa(
    files: Sequence[BidsFile], entities: dict[str, str], context: Context
) -> Candidate | None:
    """Images of several flip angles without MT pulse; None where all have one."""
    start, assume_ms = _start("vfa", files, entities), context.options.assume_ms
    try:
        used, notes = _without_mt_pulse(files, context)
        if not used:
            return None
        start = _start("vfa", used, entities)
        parts = pair_parts(_without_ignored(used, context))
        sidecars = _sidecars(parts.pairs, context)
        for each in sidecars:
            _refuse_ssfp(each)
        flips = sourced("FlipAngle", sidecars, assume_ms)
        _hint_repetition_time(sidecars)
        repetition = sourced("RepetitionTimeExcitation", sidecars, assume_ms)
        _require_one_setting_per_flip(sidecars)
        columns = {"flip_angle": flips, "repetition_time": repetition}
        echo_time, lacking = _echo_times(sidecars, columns, assume_ms)
        if echo_time is not None:
            columns["echo_time"] = echo_time
        order = np.lexsort([c.values for c in reversed(columns.values())])
        read = _ordered(parts.pairs, sidecars, columns, order)
        _refuse_repeated(read, tuple(columns))
        candidate = _filled(start, parts, read, context)
    except MetadataError as error:
        return replace(start, problem=error)
    return replace(
        candidate,
        files=tuple(dict.fromkeys((*candidate.files, *files))),
        measurements=_distinct(flips.values, "flip angle {:g} degrees"),
        lacking={**candidate.lacking, **lacking},
        warnings=(*candidate.warnings, *_without_rf_spoiling(sidecars)),
        notes=(*candidate.notes, *notes),
    )


def _start(kind: Kind, files: Sequence[BidsFile], entities: dict[str, str]) -> Candidate:
    """Give the series without its metadata."""
    first = files[0]
    images = tuple(str(f.path) for f in files)
    return Candidate(Series(kind, first.subject, first.session, entities, images), tuple(files))


def _without_ignored(files: Sequence[BidsFile], context: Context) -> list[BidsFile]:
    """Images without the phases where those are to be ignored, unless there is nothing else."""
    ignored = "phase" if "phase" in context.options.ignore else ""
    return [f for f in files if f.entities.get("part") != ignored] or list(files)


def _sidecars(pairs: Sequence[Pair], context: Context) -> list[Sidecars]:
    return [Sidecars(context.raw, p.image) for p in pairs]


def _ordered(
    pairs: Sequence[Pair],
    sidecars: Sequence[Sidecars],
    columns: Mapping[str, Sourced],
    order: npt.NDArray[np.intp],
) -> _Read:
    def sort(values: Sourced) -> Sourced:
        return replace(
            values,
            values=tuple(values.values[i] for i in order),
            sources=tuple(values.sources[i] for i in order),
        )

    return _Read(
        tuple(pairs[i] for i in order),
        tuple(sidecars[i] for i in order),
        {name: sort(values) for name, values in columns.items()},
    )


def _filled(start: Candidate, parts: Parts, read: _Read, context: Context) -> Candidate:
    """Complete a series whose images are in order."""
    others = [Sidecars(context.raw, p.other) for p in read.pairs if p.other is not None]
    second, warnings, notes = second_part(read.pairs, read.sidecars, others)
    lacking: dict[str, MetadataError] = {}
    values: dict[str, Sourced | None] = dict(read.columns)
    for name, find in (
        ("field_strength", _field_strength),
        ("spoiling_increment", _spoiling_increment),
    ):
        try:
            values[name], said = find(read.sidecars, context)
            warnings += said
        except MetadataError as problem:
            lacking[name] = problem
    series = replace(
        start.series,
        images=tuple(str(p.image.path) for p in read.pairs),
        second=second,
        metadata=constant_fields(read.sidecars),
        **values,  # type: ignore[arg-type]
    )
    used = [p.image for p in read.pairs] + [p.other for p in read.pairs if p.other is not None]
    return replace(
        start,
        series=series,
        files=tuple(dict.fromkeys((*used, *start.files))),
        lacking=lacking,
        warnings=(*parts.warnings, *warnings),
        notes=(*parts.notes, *notes),
    )


# ---------------------------------------------------------------------- MT and spoiling


def _without_mt_pulse(
    files: Sequence[BidsFile], context: Context
) -> tuple[list[BidsFile], tuple[str, ...]]:
    """Images without magnetisation transfer pulse, and a note on the others."""
    used = [f for f in files if not _has_mt_pulse(f, context)]
    left_out = [f for f in files if f not in used]
    if not left_out or not used:
        return used, ()
    names = sorted({f.entities[k] for f in left_out for k in ("acq",) if k in f.entities})
    which = f" (acq-{', acq-'.join(names)})" if names else ""
    count = "1 image" if len(left_out) == 1 else f"{len(left_out)} images"
    return used, (f"{count} with an MT pulse (mt-on){which} not used",)


def _has_mt_pulse(file: BidsFile, context: Context) -> bool:
    """What the name says of an MT pulse, else the sidecar; the two must not differ."""
    named = {"on": True, "off": False}.get(file.entities.get("mt", ""))
    found = Sidecars(context.raw, file).find("MTState")
    stated = found.value if found and isinstance(found.value, bool) else None
    if found and named is not None and stated is not None and named != stated:
        raise MetadataError(
            f"`MTState` is {str(stated).lower()} in `{found.file.label}`, but the name of the "
            f"image says mt-{file.entities['mt']}; correct the one that is wrong.",
            found.file.path,
            "MTState",
        )
    return bool(stated if named is None else named)


def _without_rf_spoiling(sidecars: Sequence[Sidecars]) -> tuple[str, ...]:
    """Warn of images that are not RF-spoiled."""
    for each in sidecars:
        state, kind = each.find("SpoilingState"), each.find("SpoilingType")
        found = None
        if state and state.value is False:
            found, said = state, "`SpoilingState` is false"
        elif kind and str(kind.value).upper() == "GRADIENT":
            found, said = kind, f"`SpoilingType` is {kind.value!r}"
        if found:
            return (
                f"{said} in `{found.file.label}`: without RF spoiling the signal keeps transverse "
                "magnetisation of earlier pulses, which the steady state of the model has not; T1 "
                "will be biased",
            )
    return ()


def _spoiling_increment(
    sidecars: Sequence[Sidecars], context: Context
) -> tuple[Sourced | None, tuple[str, ...]]:
    given = context.options.spoiling_increment
    return _one_value("SpoilingRFPhaseIncrement", "--spoiling-increment", given, sidecars)


# --------------------------------------------------------------------------------- field strength


def _field_strength(
    sidecars: Sequence[Sidecars], context: Context
) -> tuple[Sourced | None, tuple[str, ...]]:
    """Field strength from the option, MagneticFieldStrength or ImagingFrequency."""
    given = context.options.field_strength
    found, warnings = _one_value("MagneticFieldStrength", "--field-strength", given, sidecars)
    if found:
        return found, warnings
    frequency, _ = _one_value("ImagingFrequency", "", None, sidecars)
    if frequency:
        (source,) = frequency.sources
        tesla = frequency.values[0] / MHZ_PER_T
        return Sourced((tesla,), "T", (f"{source}: ImagingFrequency",)), ()
    first = sidecars[0]
    raise MetadataError(
        f"`MagneticFieldStrength` missing for `{first.image.label}`. Looked in: "
        f'{first.looked_in()}. Add e.g. "MagneticFieldStrength": 3 (T) to '
        f"{first.image.suffix}.json at the root of the dataset, or pass --field-strength 3.",
        first.image.path,
        "MagneticFieldStrength",
    )


def _one_value(
    field: str, option: str, given: float | None, sidecars: Sequence[Sidecars]
) -> tuple[Sourced | None, tuple[str, ...]]:
    """The value of an option, else of the sidecars, which must agree on it; None: nothing says."""
    unit = QUANTITIES[field].unit
    found = [f for s in sidecars if (f := s.find(field))]
    if given is not None:
        warnings = (
            f"`{field}` is {f.value!r} in `{f.file.label}`; {option} {given:g} is used instead"
            for f in found
            if not same_value(f.value, given)
        )
        return Sourced((given,), unit, (option,)), tuple(dict.fromkeys(warnings))[:1]
    if not found:
        return None, ()
    advice = f", or pass {option}" if option else ""
    values = []
    for each in found:
        try:
            values.append(scalar(each, field))
        except MetadataError as problem:
            message = f"{str(problem).rstrip('.')}{advice}."
            raise MetadataError(message, problem.file, problem.field) from None
    for value, each in zip(values, found, strict=True):
        if not same_value(value, values[0]):
            raise MetadataError(
                f"`{field}` is {values[0]:g} in `{found[0].file.label}`, but {value:g} in "
                f"`{each.file.label}`; images of one fit need the same. Correct it{advice}.",
                each.file.path,
                field,
            )
    return Sourced((values[0],), unit, (found[0].file.label,)), ()


# ------------------------------------------------------------ echoes and repetitions


def _echo_times(
    sidecars: Sequence[Sidecars], columns: Mapping[str, Sourced], assume_ms: Sequence[str]
) -> tuple[Sourced | None, dict[str, MetadataError]]:
    """Echo times, or why they are unknown where one image of each setting can do without."""
    try:
        return sourced("EchoTime", sidecars, assume_ms), {}
    except MetadataError as problem:
        settings = Counter(zip(*(c.values for c in columns.values()), strict=True))
        if max(settings.values()) > 1:
            raise
        return None, {"echo_time": problem}


def _refuse_repeated(read: _Read, columns: Sequence[str]) -> None:
    """Two images of the same setting: one of the sidecars is wrong, or they are two series."""
    fields = {
        "echo_time": ("EchoTime", "{:g} s"),
        "flip_angle": ("FlipAngle", "{:g} degrees"),
        "repetition_time": ("RepetitionTimeExcitation", "{:g} s"),
    }
    rows = list(zip(*(read.columns[c].values for c in columns), strict=True))
    for i, (first, second) in enumerate(pairwise(rows)):
        if first == second:
            said = ", ".join(
                f"{fields[c][0]} {fields[c][1].format(value)}"
                for c, value in zip(columns, first, strict=True)
            )
            last = columns[-1] if "echo_time" not in columns else "echo_time"
            sources = read.columns[last].sources
            image, other = read.pairs[i].image, read.pairs[i + 1].image
            raise MetadataError(
                f"`{image.label}` and `{other.label}` have the same {said} (from {sources[i]} and "
                f"{sources[i + 1]}); correct it, or tell them apart by a filter file.",
                other.path,
                fields[last][0],
            )


def _require_one_setting(
    sidecars: Iterable[Sidecars], fields: Sequence[str], between: str, advice: str
) -> None:
    """Refuse images that differ in a field, where they have it."""
    for field in fields:
        found = [f for s in sidecars if (f := s.find(field))]
        for each in found[1:]:
            if not same_value(found[0].value, each.value):
                raise MetadataError(
                    f"`{field}` differs between {between}: it is {found[0].value!r} in "
                    f"`{found[0].file.label}` and {each.value!r} in `{each.file.label}`. {advice}",
                    each.file.path,
                    field,
                )


def _require_one_setting_per_flip(sidecars: Sequence[Sidecars]) -> None:
    flips = defaultdict(list)
    for each in sidecars:
        if label := each.image.entities.get("flip"):
            flips[label, each.image.entities.get("acq")].append(each)
    for (label, _), echoes in flips.items():
        fields = ("FlipAngle", "RepetitionTimeExcitation")
        _require_one_setting(echoes, fields, f"the echoes of flip-{label}", "Correct it.")


def _refuse_ssfp(sidecars: Sidecars) -> None:
    found = sidecars.find("PulseSequenceType")
    if found and any(word in str(found.value).upper() for word in ("SSFP", "FISP", "FIESTA")):
        raise MetadataError(
            f"`PulseSequenceType` is {found.value!r} in `{found.file.label}`: balanced "
            "steady-state images need DESPOT2; T1 from variable flip angles needs a spoiled "
            "gradient echo.",
            found.file.path,
            "PulseSequenceType",
        )


def _hint_repetition_time(sidecars: Sequence[Sidecars]) -> None:
    """Refuse RepetitionTime alone, as converters often write it: it need not be the same."""
    for each in sidecars:
        other = each.find("RepetitionTime")
        if other and each.find("RepetitionTimeExcitation") is None:
            raise MetadataError(
                f"`RepetitionTimeExcitation` missing for `{each.image.label}`. Looked in: "
                f'{each.looked_in()}. `{other.file.label}` has "RepetitionTime": {other.value}; '
                "if that is the time from one excitation pulse to the next, add it as "
                f'"RepetitionTimeExcitation" (s), for all images in {each.image.suffix}.json at '
                "the root of the dataset.",
                each.image.path,
                "RepetitionTimeExcitation",
            )


def _distinct(values: Iterable[float], text: str) -> tuple[str, ...]:
    return tuple(text.format(v) for v in sorted(set(values)))
