"""What will be fitted, and why the rest will not: decided and said before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bids_gacelle.bids.discovery import Options, discover, skipped
from bids_gacelle.bids.images import absent_images, review_series, too_few_fibres
from bids_gacelle.bids.queries import load_filter_file
from bids_gacelle.bids.series import Finding, Job, Plan, Series
from bids_gacelle.interfaces.adequacy import suited_jobs
from bids_gacelle.interfaces.models import check_options, needs_of, select_models
from bids_gacelle.settings import Settings
from bids_gacelle.spatial.rois import read_lookup
from bids_gacelle.workflows.base import series_key

LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO}


def make_plan(settings: Settings) -> Plan:
    """Every model on every series of the sessions asked for, from names and metadata alone.

    Raises
    ------
    InputError
        What was asked for cannot be: unknown model, option, participant, filter, ...
    """
    models = select_models(settings.models, settings.solver)
    check_options(models, settings.model_options, settings.solver)
    options = Options(
        input_type=settings.input_type,
        participant_labels=settings.participant_label,
        session_labels=settings.session_label,
        filters=load_filter_file(settings.bids_filter_file) if settings.bids_filter_file else {},
        derivatives=settings.derivatives,
        mask=settings.mask,
        noise_map=settings.noise_map,
        gradient_deviation=settings.gradient_deviation,
        atlases=settings.atlas,
        combine_dwi=settings.combine_dwi,
        small_delta_ms=settings.small_delta,
        big_delta_ms=settings.big_delta,
        timing_file=settings.timing_file,
        scheme_file=settings.scheme_file,
        field_strength=settings.field_strength,
        spoiling_increment=settings.spoiling_increment,
        voxel_maps=settings.voxel_map,
        b0_threshold=settings.b0_threshold,
        assume_ms=settings.assume_ms,
        database_dir=settings.bids_database_dir,
        ignore=settings.ignore,
    )
    plan = discover(settings.bids_dir, [needs_of(m, settings) for m in models], options)
    # Nodes of one series share its images, so its jobs stand together.
    jobs = sorted(
        plan.jobs, key=lambda j: (j.series.subject, j.series.session, series_key(j.series))
    )
    suited, findings = suited_jobs(jobs, settings)
    return replace(plan, jobs=suited, findings=(*plan.findings, *findings))


def check_plan(plan: Plan, *, wait_for_files: bool = False) -> Plan:
    """The plan after a look at the headers of all images; jobs with bad images drop out.

    With ``wait_for_files`` those whose images are there by name only stay in it: a dry run may
    come before the data, as in a clone of a DataLad dataset.
    """
    reviewed: dict[str, tuple[Series, str]] = {}
    awaited: set[str] = set()
    jobs, findings = [], list(plan.findings)
    for job in plan.jobs:
        key = series_key(job.series)
        if job.eligible and key not in reviewed:
            absent = absent_images(job.series) if wait_for_files else []
            if absent:
                awaited.add(key)
                series, found, reason = job.series, [_awaited(job.series, absent)], ""
            else:
                series, found, reason = review_series(job.series, _check_table)
            reviewed[key] = series, reason
            findings += found
        if job.eligible:
            series, reason = reviewed[key]
            job = replace(job, series=series, reason=reason, cause="broken" if reason else "")
        if job.eligible and key not in awaited:
            few = too_few_fibres(job.series, job.needed_inputs)
            if few:
                job = replace(job, reason=str(few), cause="unsuited")
                findings.append(skipped(job.series, job.model, few))
        jobs.append(job)
    return replace(plan, jobs=tuple(jobs), findings=tuple(findings))


def _awaited(series: Series, absent: Sequence[str]) -> Finding:
    """A warning that images could not be looked at."""
    place = f"sub-{series.subject}" + (f"/ses-{series.session}" if series.session else "")
    more = f" and {len(absent) - 1} more images" if len(absent) > 1 else ""
    message = (
        f"{place} {series.label}: `{absent[0]}`{more} cannot be looked at yet: empty, or a link "
        "to a file that is not there (datalad get?)."
    )
    about = {"file": absent[0], "series": series.label}
    return Finding("warning", message, series.subject, series.session, **about)


def _check_table(path: Path) -> None:
    """Refuse a table that cannot name the labels of a segmentation."""
    read_lookup(path, np.empty(0, dtype=int))


def eligible(plan: Plan) -> list[Job]:
    """Jobs that can be run."""
    return [job for job in plan.jobs if job.eligible]


def table(jobs: Sequence[Job]) -> str:
    """Subject, session, series and model of every job, and whether it is eligible or why not."""
    header = ("subject", "session", "series", "model", "eligible")
    rows = [
        (
            f"sub-{j.series.subject}",
            f"ses-{j.series.session}" if j.series.session else "-",
            j.series.label,
            j.model,
            "yes" if j.eligible else f"no: {j.reason}",
        )
        for j in jobs
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(4)]
    lines = []
    for row in (header, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[4]]))
    return "\n".join(lines)


def say(plan: Plan, log: logging.Logger) -> None:
    """Log the table of jobs and every finding that it does not already tell, errors first."""
    log.info("What can be fitted:\n%s", table(plan.jobs))
    told: dict[tuple[str, str], set[str]] = {}
    for job in plan.jobs:
        if job.reason:
            told.setdefault((job.series.subject, job.series.session), set()).add(job.reason)
    order = list(LEVELS)
    for finding in sorted(dict.fromkeys(plan.findings), key=lambda f: order.index(f.severity)):
        reasons = told.get((finding.subject, finding.session), set())
        if not any(reason in finding.message for reason in reasons):
            log.log(LEVELS[finding.severity], finding.message)
