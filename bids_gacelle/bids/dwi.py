"""Diffusion-weighted images of one session as series, with everything their sidecars say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from bids_gacelle.bids.candidates import Candidate, groups, kept_entities
from bids_gacelle.bids.concatenation import RunImage
from bids_gacelle.bids.files import BidsFile, Dataset, loose_file
from bids_gacelle.bids.gradients import (
    NotWeighted,
    check_b_values,
    read_gradients,
    read_numbers,
    shells,
)
from bids_gacelle.bids.metadata import MetadataError, constant_fields
from bids_gacelle.bids.options import Context
from bids_gacelle.bids.parts import magnitudes
from bids_gacelle.bids.queries import matches
from bids_gacelle.bids.schemes import read_scheme
from bids_gacelle.bids.series import DwiRun, Series
from bids_gacelle.bids.timing import differing_times, resolve_timing


def dwi_candidates(context: Context, subject: str, session: str) -> list[Candidate]:
    """Preprocessed images of the first dataset that has them, else raw ones."""
    found = [[f for f in files if f.session == session] for files in _all_dwi(context, subject)]
    processed = [p for files in found if (p := [f for f in files if _preprocessed(f)])]
    raw = [f for f in found[-1] if not _preprocessed(f)]
    used = next(iter(processed), [] if replacing_dwi(context, subject, session) else raw)
    notes: tuple[str, ...] = ()
    unused = [f for files in processed[1:] for f in files] + (raw if processed else [])
    if unused:
        names = ", ".join(f"`{f.label}`" for f in unused)
        notes = (f"{names} not used: the session has preprocessed dwi in '{used[0].dataset}'",)
    single = [_dwi_run(f, context) for f in _without_other_parts(used)]
    single, left_out = _without_reversed(single)
    notes += left_out
    if context.options.combine_dwi:
        single = _combined(single)
    return [replace(c, notes=c.notes + notes) for c in single]


def replacing_dwi(context: Context, subject: str, session: str) -> list[BidsFile]:
    """Preprocessed images that the raw ones of a session, without any of its own, went into.

    A pipeline may write at the level of the subject what was acquired in sessions, or the
    reverse; to fit the raw images as well would count the same data twice.
    """
    files = [f for files in _all_dwi(context, subject) for f in files]
    if not any(f.session == session and not _preprocessed(f) for f in files):
        return []
    processed = [f for f in files if _preprocessed(f)]
    if any(f.session == session for f in processed):
        return []
    return [f for f in processed if not session or not f.session]


def _all_dwi(context: Context, subject: str) -> list[list[BidsFile]]:
    """Dwi images of all sessions, by dataset."""
    query = context.queries["dwi"]
    return [[f for f in d.images(subject) if matches(query, f)] for d in context.datasets]


def _without_reversed(
    candidates: Sequence[Candidate],
) -> tuple[list[Candidate], tuple[str, ...]]:
    """Leave runs of b=0 volumes out, unless there is nothing else."""
    kept = [c for c in candidates if not isinstance(c.problem, NotWeighted)]
    if not kept:
        return list(candidates), ()
    names = [f"`{c.files[0].label}`" for c in candidates if c not in kept]
    return kept, (f"{', '.join(names)} not used: b=0 volumes only",) if names else ()


def _without_other_parts(files: Sequence[BidsFile]) -> list[BidsFile]:
    return [image for group in groups(files) for image in magnitudes(group)]


def _preprocessed(file: BidsFile) -> bool:
    return "desc" in file.entities or "space" in file.entities


def _dwi_run(image: BidsFile, context: Context) -> Candidate:
    dataset, threshold = context.dataset(image.dataset), context.options.b0_threshold
    series = Series(
        "dwi",
        image.subject,
        image.session,
        kept_entities(image),
        (str(image.path),),
        preprocessed=_preprocessed(image),
        spatial_reference=_spatial_reference(image, dataset),
        metadata={},
    )
    start = Candidate(series, (image,))
    try:
        bval, bvec = _gradient_files(dataset, image, context.options.scheme_file)
        b, _ = read_gradients(bval.path, bvec.path)
        check_b_values(b, threshold, bval.label, bval.path)
        run = RunImage(dataset, image, b, threshold)
        timing = resolve_timing(run, _raw_runs(run, context), context.options)
        metadata = constant_fields([run.sidecars])
    except MetadataError as error:
        return replace(start, problem=error)
    times = (timing.big_delta, timing.small_delta)
    found = shells(b, [None if t is None else t.values for t in times], threshold)
    dwi_run = DwiRun(
        str(image.path),
        str(bval.path),
        str(bvec.path),
        timing.small_delta,
        timing.big_delta,
        timing.echo_time,
    )
    return replace(
        start,
        series=replace(series, dwi_runs=(dwi_run,), metadata=metadata),
        measurements=tuple(_shell_name(s) for s in found),
        timing_problem=timing.problem,
        warnings=timing.warnings,
        notes=timing.notes + _scheme_notes(bval, context.options.scheme_file),
        overruled=timing.overruled,
    )


def _shell_name(shell: Sequence[float]) -> str:
    times = "".join(f", {n} {t:g} ms" for n, t in zip(("Delta", "delta"), shell[1:], strict=False))
    return f"b {shell[0]:.0f} s/mm^2{times}"


def _gradient_files(
    dataset: Dataset, image: BidsFile, scheme: Path | None
) -> tuple[BidsFile, BidsFile]:
    """Files of b-values and directions: those of the dataset, else a scheme file for both."""
    try:
        return _gradient_file(dataset, image, ".bval"), _gradient_file(dataset, image, ".bvec")
    except MetadataError:
        if scheme is None:
            raise
        return loose_file(scheme), loose_file(scheme)


def _scheme_notes(bval: BidsFile, scheme: Path | None) -> tuple[str, ...]:
    note = read_scheme(bval.path).note if bval.path == scheme else ""
    return (note,) if note else ()


def _gradient_file(dataset: Dataset, image: BidsFile, extension: str) -> BidsFile:
    files = dataset.inherited(image, extension)
    if not files:
        raise MetadataError(
            f"No {extension} file for `{image.label}`. Looked for "
            f"{image.sibling(extension).name} beside it and for a {image.suffix}{extension} that "
            "it inherits, up to the root of the dataset.",
            image.path,
        )
    return files[0]


def _raw_runs(run: RunImage, context: Context) -> list[RunImage]:
    """Raw runs that a preprocessed image may stem from: its entities are theirs too."""
    image = run.image
    if not _preprocessed(image):
        return []
    said = {k: v for k, v in image.entities.items() if k not in ("ses", "space", "desc", "res")}
    found = [
        f
        for f in context.raw.images(image.subject)
        if (f.session in (image.session, "") or not image.session)
        and f.suffix == "dwi"
        and f.datatype == "dwi"
        and not _preprocessed(f)
        and f.entities.get("part", "mag") == "mag"
        and said.items() <= f.entities.items()
    ]
    own = [f for f in found if f.session == image.session]
    return [_raw_run(f, run, context) for f in own or found]


def _raw_run(image: BidsFile, made_of_it: RunImage, context: Context) -> RunImage:
    """A raw run; where it has no b-values, those of what was made of it stand for them."""
    try:
        b = np.array(read_numbers(_gradient_file(context.raw, image, ".bval").path))
    except MetadataError:
        b = np.zeros(0)
    return replace(made_of_it, dataset=context.raw, image=image, b=b if b.size else made_of_it.b)


def _spatial_reference(image: BidsFile, dataset: Dataset) -> str:
    """BIDS URI of the anatomical image that spans the space of a preprocessed one."""
    space = image.entities.get("space")
    for session, file in product((image.session, ""), dataset.images(image.subject)):
        if (
            space
            and file.datatype == "anat"
            and file.session == session
            and file.suffix in ("T1w", "T2w")
            and file.entities.get("desc") == "preproc"
            and file.entities.get("space", "T1w") == space
        ):
            return file.uri
    return ""


def _combined(candidates: Sequence[Candidate]) -> list[Candidate]:
    """All runs of a session that share a space as one series; runs with a problem stop it."""
    spaces = defaultdict(list)
    for candidate in candidates:
        spaces[candidate.series.entities.get("space")].append(candidate)
    return [_join(members) for members in spaces.values()]


def _join(members: Sequence[Candidate]) -> Candidate:
    if len(members) == 1:
        return members[0]
    runs = [c.series for c in members]
    first = runs[0].entities.items()
    entities = {k: v for k, v in first if all(r.entities.get(k) == v for r in runs)}
    metadata = {
        k: v for k, v in runs[0].metadata.items() if all(r.metadata.get(k) == v for r in runs)
    }
    series = replace(
        runs[0],
        entities=entities,
        images=tuple(i for r in runs for i in r.images),
        dwi_runs=tuple(d for r in runs for d in r.dwi_runs),
        metadata=metadata,
    )
    return Candidate(
        series,
        tuple(f for c in members for f in c.files),
        tuple(dict.fromkeys(m for c in members for m in c.measurements)),
        next((c.problem for c in members if c.problem), None),
        next((c.timing_problem for c in members if c.timing_problem), None)
        or differing_times([c.overruled for c in members]),
        warnings=tuple(w for c in members for w in c.warnings),
        notes=tuple(n for c in members for n in c.notes),
    )
