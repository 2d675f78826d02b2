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
from bids_gacelle.workflows.plan import blocked_by_error

KILLED = (
    "its process ended without a message, probably killed for want of memory; give fewer "
    "--nprocs, a lower --omp-nthreads, or a machine with more memory"
)


def outcomes(
    settings: Settings, plan: Plan, run: dict[str, Any], resumed: Sequence[Job]
) -> list[dict[str, Any]]:
    """One status per job of the plan: ok, failed or skipped, with the reason and the numbers."""
    failures, done = _records(run["failures"]), _records(run["done"])
    return [_outcome(settings, plan, job, failures, done, job in resumed) for job in plan.jobs]


def summary(plan: Plan, run: dict[str, Any], status: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``logs/<run>/summary.json``."""
    return {
        "run": run["run_id"],
        "version": run["version"],
        "command": run["command"],
        "jobs": list(status),
        "findings": [asdict(f) for f in plan.findings],
    }


def _outcome(
    settings: Settings,
    plan: Plan,
    job: Job,
    failures: Sequence[dict[str, Any]],
    done: Sequence[dict[str, Any]],
    resumed: bool,
) -> dict[str, Any]:
    series = job.series
    about = {
        "subject": series.subject,
        "session": series.session,
        "series": series.label,
        "model": job.model,
    }
    if not job.eligible:
        blocked = bool(settings.models) and blocked_by_error(plan, job)
        return {**about, "status": "failed" if blocked else "skipped", "reason": job.reason}
    if resumed:
        return {**about, "status": "ok", "reason": "unchanged since an earlier run"}
    for record in done:
        if all(record[k] == v for k, v in about.items()):
            missing = missing_outputs(settings.output_dir, record["outputs"])
            if missing:
                reason = "promised outputs are missing: " + ", ".join(missing)
                return {**about, "status": "failed", "reason": reason}
            return {**record, "status": "ok", "reason": ""}
    for record in failures:
        shared = ("subject", "session", "series")
        if all(record[k] == about[k] for k in shared) and record["model"] in ("", job.model):
            return {
                **about,
                "status": "failed",
                "reason": record["message"],
                "step": record["step"],
                "expected": record["expected"],
                "traceback": record["traceback"],
            }
    return {**about, "status": "failed", "reason": KILLED}


def _records(folder: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except ValueError:  # cut short by a full disk
            continue
    return found
