"""What part of which datasets is asked for: participants, sessions, and the opened datasets."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from bids_gacelle.bids.files import open_dataset, session_labels, subject_labels
from bids_gacelle.bids.layouts import (
    Visit,
    expected_dwi,
    find_visits,
    guess_layout,
    open_layout,
)
from bids_gacelle.bids.metadata import QUANTITIES, TIMES_IN_MS
from bids_gacelle.bids.options import Context, Options
from bids_gacelle.bids.queries import read_filters
from bids_gacelle.errors import InputError

_SHOWN = 10


def open_request(bids_dir: Path, options: Options) -> tuple[Context, dict[str, list[str]]]:
    """Open the datasets; give the sessions wanted of each participant wanted.

    Sessions are labels, "" for what lies outside sessions where all are wanted.

    Raises
    ------
    InputError
        The request cannot be met: no dataset there, unknown participant, session, query or field.
    """
    visits = _visits(bids_dir, options)
    subjects = _participants(bids_dir, options, visits)
    sessions = _sessions(bids_dir, subjects, options, visits)
    _refuse_shared_maps(subjects, options)
    return _open(bids_dir, subjects, options, visits), sessions


def _visits(bids_dir: Path, options: Options) -> list[Visit]:
    """Folders of the participants where the data are no BIDS dataset."""
    if not bids_dir.exists():
        raise InputError(f"The dataset {bids_dir} does not exist.")
    if not bids_dir.is_dir():
        raise InputError(f"{bids_dir} is a file; give the folder of a BIDS dataset.")
    if options.input_type == "bids":
        return []
    found = find_visits(options.input_type, bids_dir)
    if not found:
        raise InputError(
            f"{bids_dir} has no folder of a participant as --input-type {options.input_type} has "
            f"them, with {expected_dwi(options.input_type)} in it."
        )
    return found


def _participants(bids_dir: Path, options: Options, visits: Sequence[Visit]) -> list[str]:
    there = sorted({v.subject for v in visits}) or subject_labels(bids_dir)
    if not there:
        hint = "; is the dataset one of the folders in it?" if any(bids_dir.iterdir()) else ""
        if layout := guess_layout(bids_dir):
            hint = f"; it looks like --input-type {layout}"
        raise InputError(f"{bids_dir} is no BIDS dataset: it has no folder sub-<label>{hint}")
    return _chosen("participant", "sub-", options.participant_labels, there, str(bids_dir))


def _sessions(
    bids_dir: Path, subjects: Sequence[str], options: Options, visits: Sequence[Visit]
) -> dict[str, list[str]]:
    """Wanted sessions of each subject, [""] and more where all are wanted."""
    roots = [bids_dir, *options.derivatives.values()]

    def there(of: Sequence[str]) -> list[str]:
        named = {label for root in roots for s in of for label in session_labels(root, s)}
        return sorted(named | {v.session for v in visits if v.subject in of and v.session})

    if not options.session_labels:
        return {s: ["", *there([s])] for s in subjects}
    # of all participants: with one cluster job for each, one that lacks a session is no mistake
    everything = there([v.subject for v in visits] or subject_labels(bids_dir))
    wanted = _chosen("session", "ses-", options.session_labels, everything, str(bids_dir))
    return dict.fromkeys(subjects, wanted)


def _chosen(
    what: str, prefix: str, wanted: Sequence[str], there: Sequence[str], where: str
) -> list[str]:
    if not wanted:
        return list(there)
    labels = [w.removeprefix(prefix) for w in wanted]
    for label in labels:
        if label not in there:
            shown = ", ".join(there[:_SHOWN]) + (", ..." if len(there) > _SHOWN else "")
            listed = f"it has {len(there)}: {shown}" if there else "it has none"
            raise InputError(f"No {what} '{label}' in {where}; {listed}.")
    return [label for label in there if label in labels]


def _refuse_shared_maps(subjects: Sequence[str], options: Options) -> None:
    """Refuse one image for the voxels of several participants."""
    given = {"--noise-map": options.noise_map, "--gradient-deviation": options.gradient_deviation}
    beside = {"--noise-map": "desc-noise_dwimap", "--gradient-deviation": "graddev"}
    for option, path in given.items():
        if path and len(subjects) > 1:
            raise InputError(
                f"{option} {path} is an image of one participant, but {len(subjects)} are to be "
                "fitted. Choose one with --participant-label, or give a derivative dataset (-d) "
                f"with a *_{beside[option]}.nii.gz for each."
            )
    for name, template in options.voxel_maps.items():
        unknown = set(re.findall(r"\{(.*?)\}", template)) - {"subject", "session"}
        if unknown:
            raise InputError(
                f"--voxel-map {name}={template}: {{{min(unknown)}}} stands for nothing; in the "
                "path {subject} and {session} stand for labels."
            )
        if "{subject}" not in template and len(subjects) > 1:
            raise InputError(
                f"--voxel-map {name}={template} is an image of one participant, but "
                f"{len(subjects)} are to be fitted. Choose one with --participant-label, or write "
                "{subject} for its label in the path."
            )


def _open(
    bids_dir: Path, subjects: Sequence[str], options: Options, visits: Sequence[Visit]
) -> Context:
    queries = read_filters(options.filters)
    if not (math.isfinite(options.b0_threshold) and options.b0_threshold >= 0):
        raise InputError(
            f"--b0-threshold {options.b0_threshold:g}: the highest b-value (s/mm^2) that counts "
            "as b=0 is needed, 0 or more."
        )
    for option, given, field in (
        ("--field-strength", options.field_strength, "MagneticFieldStrength"),
        ("--spoiling-increment", options.spoiling_increment, "SpoilingRFPhaseIncrement"),
    ):
        known = QUANTITIES[field]
        if given is not None and not known.low <= given <= known.high:
            raise InputError(
                f"{option} {given:g}: a number from {known.low:g} to {known.high:g} {known.unit} "
                "is needed."
            )
    for field in options.assume_ms:
        if field not in TIMES_IN_MS:
            valid = ", ".join(TIMES_IN_MS)
            raise InputError(f"--assume-ms {field}: not a field read in s; valid are {valid}.")
    for name, path in options.derivatives.items():
        if name == "raw":
            raise InputError("The name raw stands for the dataset itself; rename -d raw=... .")
        if not path.is_dir():
            raise InputError(f"-d {name}={path}: there is no such folder.")
    if options.input_type == "bids":
        raw = open_dataset("raw", bids_dir, subjects, options.database_dir)
    else:
        raw = open_layout(options.input_type, "raw", bids_dir, visits, subjects)
    derivatives = tuple(
        open_dataset(name, path.absolute(), subjects, options.database_dir)
        for name, path in options.derivatives.items()
    )
    return Context(raw, derivatives, options, queries, tuple(visits))
