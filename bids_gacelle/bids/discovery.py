"""Which models can be fitted to what in a BIDS dataset, and why the rest cannot."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bids_gacelle.bids.candidates import Candidate, nameable
from bids_gacelle.bids.companions import FIBRE_MAPS, add_companions
from bids_gacelle.bids.dwi import dwi_candidates, replacing_dwi
from bids_gacelle.bids.files import BidsFile, subject_labels
from bids_gacelle.bids.gradient_echo import (
    contrasts_not_offered,
    gradient_echo_candidates,
)
from bids_gacelle.bids.layouts import expected_dwi
from bids_gacelle.bids.metadata import (
    MetadataError,
    Sidecars,
    per_volume,
    scalar,
)
from bids_gacelle.bids.options import Context, ModelNeeds, Options, names_of
from bids_gacelle.bids.queries import matches
from bids_gacelle.bids.request import open_request
from bids_gacelle.bids.series import Finding, Job, Kind, Plan, Series, Severity
from bids_gacelle.errors import InputError

__all__ = ["ModelNeeds", "Options", "discover"]

# fmt: off
_CHECKED_SUFFIXES = frozenset({
    "MEGRE", "MESE", "VFA", "MPM", "MTS", "MP2RAGE", "IRT1", "TB1AFI", "TB1DAM", "TB1EPI",
    "TB1RFM", "TB1SRGE", "TB1TFL", "dwi",
})
# fmt: on
_CHECKED_FIELDS = ("EchoTime", "RepetitionTimeExcitation", "InversionTime", "FlipAngle")
_DATATYPE = {"megre": "anat", "vfa": "anat", "dwi": "dwi"}
_COUNTED = {"megre": "echoes", "vfa": "flip angles", "dwi": "shells"}
_FITTED = ("megre", "vfa", "mpm", "mts", "dwi")
_SHOWN = 10


def discover(bids_dir: Path, needs: Sequence[ModelNeeds], options: Options) -> Plan:
    """Find the series of every session and decide which model can be fitted to which.

    File names and text files are read, images never opened.

    Parameters
    ----------
    bids_dir : the dataset, raw or preprocessed.
    needs : the models asked for.
    options : what the command line says.

    Returns
    -------
    Plan
        A job per session, model and series; where a session has nothing for a model, one job that
        says so. ``findings`` hold every message, errors, warnings and notes.

    Raises
    ------
    InputError
        The request itself cannot be met: no dataset there, unknown participant, session, query
        or metadata field.
    """
    bids_dir = bids_dir.absolute()
    _check_voxel_maps(needs, options)
    context, sessions = open_request(bids_dir, options)
    findings: dict[Finding, None] = {}
    jobs: list[Job] = []
    for subject in sessions:
        own = [v.dwi for v in context.visits if v.subject == subject and v.dwi]
        if closed := _closed_folder(own if context.visits else [bids_dir / f"sub-{subject}"]):
            for need in needs:
                job, finding = _unreadable(subject, need, closed)
                jobs.append(job)
                findings[finding] = None
            continue
        used: set[Path] = set()
        for session in _units(context, subject, sessions[subject]):
            for job, found in _session_jobs(context, subject, session, needs, used):
                jobs.append(job)
                findings.update(dict.fromkeys(found))
        findings.update(dict.fromkeys(_unused_poison(context, subject, used)))
    findings.update(dict.fromkeys(_about_datasets(context, list(sessions))))
    findings.update(dict.fromkeys(_unused_maps(needs, options)))
    datasets = {d.name: str(d.root) for d in (context.raw, *context.derivatives)}
    return Plan(tuple(jobs), tuple(findings), datasets)


def _check_voxel_maps(needs: Sequence[ModelNeeds], options: Options) -> None:
    """Refuse maps that no model can use."""
    for name in options.voxel_maps:
        if name not in FIBRE_MAPS and not any(n.takes(name) for n in needs):
            have = dict.fromkeys(i for n in needs for i in (*n.voxel_inputs, *n.needed_inputs))
            raise InputError(
                f"--voxel-map {name}: no model asked for has a voxel input {name}; there "
                f"{'are ' + ', '.join(have) if have else 'is none'}."
            )


def _units(context: Context, subject: str, sessions: Sequence[str]) -> list[str]:
    """Sessions of a subject; "" only if it has no other or holds images that models use."""
    outside = any(
        f.session == "" and any(matches(context.queries[k], f) for k in _FITTED)
        for d in context.datasets
        for f in d.images(subject)
    )
    return [s for s in sessions if s or outside or sessions == [""]]


# ---------------------------------------------------------------------------------- jobs


def _session_jobs(
    context: Context, subject: str, session: str, needs: Sequence[ModelNeeds], used: set[Path]
) -> Iterator[tuple[Job, list[Finding]]]:
    """Jobs of one session with their findings; ``used`` collects the images looked at."""
    of_kind: dict[Kind, list[Candidate]] = {}
    for need in needs:
        if need.kind not in of_kind:
            found = _candidates(need.kind, context, subject, session)
            inputs = [i for n in needs if n.kind == need.kind for i in n.voxel_inputs]
            of_kind[need.kind] = [add_companions(c, context, inputs) for c in found]
            used.update(f.path for c in found for f in c.files)
        for candidate in of_kind[need.kind]:
            yield _job(candidate, need)
        if not of_kind[need.kind]:
            yield _nothing(context, subject, session, need)


def _candidates(kind: Kind, context: Context, subject: str, session: str) -> list[Candidate]:
    """Series of a kind in one session ("" for images outside sessions), in the order of names."""
    if kind == "dwi":
        found = dwi_candidates(context, subject, session)
    else:
        found = gradient_echo_candidates(kind, context, subject, session)
    return [nameable(c) for c in found]


def _job(candidate: Candidate, need: ModelNeeds) -> tuple[Job, list[Finding]]:
    series, prefix = candidate.series, f"{_place(candidate.series)} {candidate.series.label}: "
    notes = [_finding("info", series, f"{prefix}{n}.") for n in _notes(candidate, need)]
    problem = _problem(candidate, need)
    if candidate.problem:
        job = Job(series, need.name, str(problem), "broken")
        return job, [skipped(series, need.name, candidate.problem)]
    if problem:
        job = Job(series, need.name, str(problem), "unsuited")
        return job, [skipped(series, need.name, problem), *notes]
    warnings = [_finding("warning", series, f"{prefix}{w}.") for w in _warnings(candidate, need)]
    return Job(series, need.name, needed_inputs=need.needed_inputs), [*warnings, *notes]


def _problem(candidate: Candidate, need: ModelNeeds) -> MetadataError | None:
    """Why the model cannot be fitted to the series, None if it can."""
    if candidate.problem:
        return candidate.problem
    lacking = _lacking(candidate, need)
    few = _too_few(candidate, need)
    if not few and not (lacking and lacking.field == "EchoTime"):
        few = _too_few_echo_times(candidate, need) or _too_few_images(candidate, need)
    if few and lacking:  # said together: adding the values alone would not help
        return MetadataError(f"{few} Also, {lacking}", lacking.file, lacking.field)
    return few or lacking


def _lacking(candidate: Candidate, need: ModelNeeds) -> MetadataError | None:
    """A value that the model needs and that is not known."""
    if need.needs_diffusion_times and candidate.timing_problem:
        return candidate.timing_problem
    columns = list(need.columns)
    columns += ["echo_time"] * need.knows_echoes
    columns += ["spoiling_increment"] * (need.default_spoiling is not None)
    columns += [name for name in candidate.lacking if need.takes(name)]
    known = next((candidate.lacking[c] for c in columns if c in candidate.lacking), None)
    return known or _without_map(candidate, need)


def _without_map(candidate: Candidate, need: ModelNeeds) -> MetadataError | None:
    """A map that the model cannot do without."""
    maps = candidate.series.voxel_maps
    missing = [i for i in need.needed_inputs if not any(n in maps for n in names_of(i))]
    if not missing:
        return None
    first = dict.fromkeys(names_of(i)[1] for i in missing)
    given = " ".join(f"{name}=PATH" for name in first)
    return MetadataError(
        f"{need.name} needs maps of {', '.join(missing)} with the options it has, but there are "
        f"none: pass --voxel-map {given}, or give a derivative dataset (-d) with "
        f"{', '.join(f'*_param-{name}_dwimap.nii.gz' for name in first)}.",
        candidate.files[0].path,
    )


def _warnings(candidate: Candidate, need: ModelNeeds) -> list[str]:
    result = list(candidate.warnings)
    if candidate.series.gradient_deviation and not need.takes_gradient_deviation:
        result.append(
            f"{need.name} is fitted with nominal b-values: it has no voxel input bscale for the "
            "map of gradient deviations"
        )
    if need.default_spoiling is not None and not candidate.series.spoiling_increment:
        result.append(
            f"no `SpoilingRFPhaseIncrement` in a sidecar of `{candidate.files[0].label}`: "
            f"{need.name} takes {need.default_spoiling:g} degrees. Add that of the sequence, or "
            "pass --spoiling-increment"
        )
    if candidate.series.kind == "dwi" and not candidate.series.preprocessed:
        result.append(
            "fitted without preprocessing (raw dwi: no correction of noise, eddy currents, motion)"
        )
    return result


def _notes(candidate: Candidate, need: ModelNeeds) -> list[str]:
    result = list(candidate.notes)
    fits = _problem(candidate, need) is None
    if need.kind == "vfa" and not need.knows_echoes and _most_echoes(candidate) > 1 and fits:
        result.append(f"{need.name} uses the first echo of each flip angle")
    for name, given in candidate.series.voxel_maps.items():
        if need.takes(name) and fits:
            result.append(f"{need.name} uses `{given.image}` as its map {name}")
    return result


def _too_few(candidate: Candidate, need: ModelNeeds) -> MetadataError | None:
    found, wanted = candidate.measurements, need.minimum_measurements
    counted, advice = _COUNTED[need.kind], ""
    if need.kind == "vfa":
        # several echoes of a flip angle are measurements of their own if the model knows them
        wanted = 1 if need.knows_echoes else wanted
        wanted = max(wanted, need.minimum_flip_angles)
    if len(found) >= wanted:
        return None
    if need.kind == "dwi":
        counted += " (b-values or diffusion times)"
        advice = _joining(candidate, "More runs of a session")
    elif need.kind == "vfa" and any(f.entities.get("mt") == "on" for f in candidate.files):
        advice = " Images with an MT pulse are not among them."
    advice += " --fit-undetermined fits it nonetheless."
    first = candidate.files[0]
    there = f"`{first.label}`" + (" and its like have" if len(candidate.files) > 1 else " has")
    return MetadataError(
        f"{need.name} needs at least {wanted} different {counted}, but {there} "
        f"{len(found)} ({'; '.join(found)}).{advice}",
        first.path,
    )


def _too_few_images(candidate: Candidate, need: ModelNeeds) -> MetadataError | None:
    images = candidate.series.images
    if need.kind != "vfa" or not need.knows_echoes or len(images) >= need.minimum_measurements:
        return None
    first = candidate.files[0]
    return MetadataError(
        f"{need.name} needs at least {need.minimum_measurements} images of different flip angle "
        f"or echo time, but `{first.label}` and its like are {len(images)}. --fit-undetermined "
        "fits it nonetheless.",
        first.path,
    )


def _too_few_echo_times(candidate: Candidate, need: ModelNeeds) -> MetadataError | None:
    found = max(_echo_times(candidate.series).values(), key=len, default=[])
    if need.minimum_echo_times < 2 or len(found) >= need.minimum_echo_times:
        return None
    first, advice, wanted = candidate.files[0], "", "different echo times"
    if need.kind == "dwi":
        advice = _joining(candidate, "Runs with other echo times")
    elif need.kind == "vfa":
        wanted += " of a flip angle"
    there = f"{', '.join(f'{v:.1f}' for v in found)} ms only" if found else "no EchoTime"
    has = "and its like have" if len(candidate.series.images) > 1 else "has"
    return MetadataError(
        f"{need.name} needs at least {need.minimum_echo_times} {wanted}, but `{first.label}` "
        f"{has} {there}.{advice}",
        first.path,
    )


def _echo_times(series: Series) -> dict[tuple[float, ...], list[float]]:
    """Different echo times (ms) of images that differ in nothing else, by their setting."""
    times: dict[tuple[float, ...], set[float]] = defaultdict(set)
    for run in series.dwi_runs:
        times[()].update(run.echo_time.values if run.echo_time else ())
    if series.echo_time:
        columns = [c.values for c in (series.flip_angle, series.repetition_time) if c]
        for time, *setting in zip(series.echo_time.values, *columns, strict=True):
            times[tuple(setting)].add(time)
    digits = 1 if series.kind == "dwi" else 2
    return {key: sorted({round(1e3 * t, digits) for t in found}) for key, found in times.items()}


def _most_echoes(candidate: Candidate) -> int:
    return max((len(v) for v in _echo_times(candidate.series).values()), default=0)


def _joining(candidate: Candidate, what: str) -> str:
    """How more could be fitted together; "" where all runs of the session already are."""
    joined = len(candidate.series.dwi_runs) > 1
    return "" if joined else f" {what} can be joined with --combine-dwi."


def _nothing(
    context: Context, subject: str, session: str, need: ModelNeeds
) -> tuple[Job, list[Finding]]:
    """Make the job of a session that has no image for a model."""
    series = Series(need.kind, subject, session, {}, ())
    reason = _why_nothing(context, series, need)
    message = f"{_place(series)} model {need.name} skipped: {reason}."
    finding = Finding("info", message, subject, session, need.name)
    return Job(series, need.name, reason, "absent"), [finding]


def _why_nothing(context: Context, series: Series, need: ModelNeeds) -> str:
    subject, session = series.subject, series.session
    if session and session not in context.sessions(subject):
        return f"no session ses-{session}"
    replacing = replacing_dwi(context, subject, session) if need.kind == "dwi" else []
    if replacing:
        level = "in its sessions" if not session else "outside its sessions"
        return (
            f"the preprocessed dwi of the subject is {level} (`{replacing[0].label}`) and is "
            "fitted there instead of the raw one"
            + (", without --session-label" if context.options.session_labels else "")
        )
    query = context.queries[need.kind]
    suffix, folder = query["suffix"], f"{_place(series)}/{_DATATYPE[need.kind]}"
    here = [f for d in context.datasets for f in d.images(subject) if f.session == session]
    reason = f"no {suffix} images in {folder}"
    visit = [v for v in context.visits if (v.subject, v.session) == (subject, session)]
    if visit and need.kind == "dwi":
        reason = f"no {expected_dwi(context.options.input_type)} in {visit[0].folder.name}"
    if need.kind in context.options.filters:
        reason += " that match the filter file"
    others = [f.label for f in here if f.suffix == suffix and f.datatype == _DATATYPE[need.kind]]
    if others:
        rules = {k: v for k, v in query.items() if k not in ("suffix", "datatype")}
        listed = ", ".join(others[:_SHOWN])
        reason += f" (there are {listed}, but the entities must be {json.dumps(rules)})"
    if need.kind != "dwi":
        why = contrasts_not_offered(need.kind, context, subject, session)
        reason += f" ({'; '.join(why)})" if why else ""
    return reason


def _closed_folder(folders: Iterable[Path]) -> str:
    """The first folder at or below a subject's that may not be listed, "" if all may."""
    closed: list[str] = []
    for folder in folders:
        for _ in os.walk(folder, onerror=lambda error: closed.append(str(error.filename))):
            if closed:
                return closed[0]
    return ""


def _unreadable(subject: str, need: ModelNeeds, folder: str) -> tuple[Job, Finding]:
    """A subject with a folder that may not be listed: what it holds cannot be known."""
    reason = f"the folder `{folder}` cannot be read: permission denied"
    message = f"sub-{subject} model {need.name} skipped: {reason}."
    job = Job(Series(need.kind, subject, "", {}, ()), need.name, reason, "broken")
    return job, Finding("error", message, subject, "", need.name, folder)


def skipped(series: Series, model: str, problem: MetadataError) -> Finding:
    """An error: why a model is not fitted to a series that is there."""
    message = f"{_place(series)} {series.label} model {model} skipped: {problem}"
    return Finding(
        "error",
        message,
        series.subject,
        series.session,
        model,
        problem.file,
        problem.field,
        series.label,
    )


def _finding(severity: Severity, series: Series, message: str) -> Finding:
    return Finding(
        severity,
        message,
        series.subject,
        series.session,
        file=series.images[0],
        series=series.label,
    )


def _place(series: Series) -> str:
    return f"sub-{series.subject}" + (f"/ses-{series.session}" if series.session else "")


# ------------------------------------------------------------- beside what is fitted


def _unused_poison(context: Context, subject: str, used: set[Path]) -> Iterator[Finding]:
    """Values that cannot be right in raw images which no model asked for uses."""
    for image in context.raw.images(subject):
        if image.path in used or image.suffix not in _CHECKED_SUFFIXES:
            continue
        sidecars = Sidecars(context.raw, image)
        for field in _CHECKED_FIELDS:
            try:
                _check_field(field, image, sidecars, context.options.assume_ms)
            except MetadataError as error:
                # about a file, not about a subject: no job of the subject is stopped by it
                message = f"{error} (No model asked for uses `{image.suffix}` images.)"
                yield Finding("error", message, file=error.file, field=error.field)


def _check_field(
    field: str, image: BidsFile, sidecars: Sidecars, assume_ms: Sequence[str]
) -> None:
    found = sidecars.find(field)
    if found is None:
        return
    if isinstance(found.value, list):  # per volume or per echo: each must make sense
        per_volume(found, field, len(found.value), assume_ms)
    else:
        scalar(found, field, assume_ms)


def _about_datasets(context: Context, subjects: Sequence[str]) -> Iterator[Finding]:
    """Name derivatives that were given but hold nothing, and those that were not given."""
    for dataset in context.derivatives:
        if not any(dataset.images(subject) for subject in subjects):
            message = (
                f"-d {dataset.name}={dataset.root} has no image of the participants asked for; it "
                "must be the folder with their sub-<label> folders."
            )
            yield Finding("warning", message, file=str(dataset.root))
    folder = context.raw.root / "derivatives"
    given = {d.root.resolve() for d in context.derivatives}
    there = [
        p
        for p in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if p.is_dir() and p.resolve() not in given and _is_dataset(p)
    ]
    if there:
        names = ", ".join(f"derivatives/{p.name}" for p in there)
        message = (
            f"{names} in the dataset not used. To use masks, segmentations, B1 maps or "
            f"preprocessed dwi from there, give e.g. -d {there[0].name}={there[0]}."
        )
        yield Finding("info", message, file=str(folder))


def _unused_maps(needs: Sequence[ModelNeeds], options: Options) -> Iterator[Finding]:
    """Name maps of fibres that were given but are of no use with the options of the models."""
    for name, template in options.voxel_maps.items():
        if not any(n.takes(name) for n in needs):
            message = (
                f"--voxel-map {name}={template} is not used: no model asked for takes such a map "
                "with the options it has (--set)."
            )
            yield Finding("warning", message, file=template)


def _is_dataset(folder: Path) -> bool:
    return (folder / "dataset_description.json").exists() or bool(subject_labels(folder))
