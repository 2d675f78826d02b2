"""What became of every job: gathered from the records of the nodes, told in summary.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bids_gacelle.bids.output import missing_outputs
from bids_gacelle.bids.series import Job, Plan
from bids_gacelle.settings import Settings
from bids_gacelle.workflows.base import series_node
from bids_gacelle.workflows.plugin import KILLED

OUT_OF_MEMORY = (
    "its process was killed, probably for want of memory; give fewer --nprocs, a smaller "
    "--omp-nthreads, or a machine with more memory"
)
NOT_STARTED = "not fitted: the run stopped at the first failure (--stop-on-first-crash)"


def outcomes(
    settings: Settings,
    plan: Plan,
    run: dict[str, Any],
    resumed: Sequence[Job],
    error: Exception | None,
) -> list[dict[str, Any]]:
    """One status per job of the plan: ok, failed or skipped, with the reason and the numbers.

    ``error`` is what Nipype raised, for jobs of which no node left a word.
    """
    failures = [record for folder in run["failures"] for record in _records(folder)]
    done = _records(run["done"])
    status = []
    for job in plan.jobs:
        about = {
            "subject": job.series.subject,
            "session": job.series.session,
            "series": job.series.label,
            "model": job.model,
        }
        if not job.eligible:
            found = _not_tried(settings, job)
        elif job in resumed:
            found = {"status": "ok", "reason": "unchanged since an earlier run"}
        else:
            found = (
                _done(settings, about, done)
                or _failed(about, failures)
                or _silent(settings, job, run, error)
            )
        status.append({**about, **found})
    return status


def summary(plan: Plan, run: dict[str, Any], status: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``logs/<run>/summary.json``."""
    return {
        "run": run["run_id"],
        "version": run["version"],
        "command": run["command"],
        "jobs": list(status),
        "findings": [asdict(f) for f in plan.findings],
    }


def _not_tried(settings: Settings, job: Job) -> dict[str, Any]:
    """Missing images are no failure; nor are unsuited ones, unless the model was asked for."""
    named = bool(settings.models)
    failed = job.cause == "broken" or (job.cause == "unsuited" and named)
    status = "failed" if failed else "skipped"
    return {"status": status, "reason": job.reason, "expected": True, "named": named}


def _done(
    settings: Settings, about: dict[str, str], done: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    for record in done:
        if all(record[key] == value for key, value in about.items()):
            missing = missing_outputs(settings.output_dir, record["outputs"])
            problems = list(record["problems"])
            if missing:
                problems.append("promised outputs are missing: " + ", ".join(missing))
            status = "failed" if problems else "ok"
            return {**record, "status": status, "reason": "; ".join(problems), "expected": True}
    return None


def _failed(about: dict[str, str], failures: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    for record in failures:
        same = all(record[key] == about[key] for key in ("subject", "session", "series"))
        if same and record["model"] in ("", about["model"]):
            kept = {key: record[key] for key in ("step", "expected", "traceback")}
            return {"status": "failed", "reason": record["message"], **kept}
    return None


def _silent(
    settings: Settings, job: Job, run: dict[str, Any], error: Exception | None
) -> dict[str, Any]:
    """A job that left neither result nor failure: killed, never started, or Nipype's own fault."""
    crashes = [
        p.read_text() for p in Path(run["log_dir"]).glob(f"sub-{job.series.subject}/crash-*")
    ]
    if any(KILLED in text and f".{series_node(job.series)}." in text for text in crashes):
        reason = OUT_OF_MEMORY
    elif settings.stop_on_first_crash:
        reason = NOT_STARTED
    else:
        reason = f"Nipype could not run it: {error or 'no message'}"
    return {"status": "failed", "reason": reason, "expected": False, "traceback": ""}


def _records(folder: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except ValueError:  # cut short by a full disk
            continue
    return found
