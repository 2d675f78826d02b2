"""The page of a subject, rebuilt from what was written for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bids_gacelle import __version__
from bids_gacelle.bids.output import write_text
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.base import LOGGER
from bids_gacelle.report import build_subject_report

LOG_LINES = 40
MANIFEST_KEYS = {"subject", "session", "series", "model", "maps", "fit_hash", "outputs", "atlases"}
MANIFEST_KEYS |= {"references", "tables"}


def reported_subjects(out_dir: Path) -> list[str]:
    """Labels of the subjects that have maps."""
    manifests = [*out_dir.glob("sub-*/figures/*_manifest.json")]
    manifests += out_dir.glob("sub-*/ses-*/figures/*_manifest.json")
    return sorted({p.relative_to(out_dir).parts[0].removeprefix("sub-") for p in manifests})


def write_citations(out_dir: Path) -> None:
    """Write ``logs/CITATION.{md,bib}``: what to cite for all maps that are in the folder."""
    found: dict[str, dict[str, str]] = {}
    for subject in reported_subjects(out_dir):
        for manifest in _manifests(out_dir, subject):
            found |= {r["key"]: r for r in manifest["references"]}
    ordered = [found[key] for key in sorted(found)]
    listed = "".join(f"- {r['text']} https://doi.org/{r['doi']}\n" for r in ordered)
    entries = "".join(
        f"@article{{{r['key']},\n  note = {{{r['text']}}},\n  doi = {{{r['doi']}}}\n}}\n"
        for r in ordered
    )
    if ordered:
        write_text(out_dir / "logs/CITATION.md", f"If you use these maps, cite:\n\n{listed}")
        write_text(out_dir / "logs/CITATION.bib", entries)


def write_report(out_dir: Path, subject: str) -> Path:
    """Build ``sub-<subject>.html`` from the manifests and the latest run of the subject."""
    status, run = _latest(out_dir, subject)
    try:
        return build_subject_report(out_dir, subject, _manifests(out_dir, subject), status, run)
    except OSError as error:
        path = out_dir / f"sub-{subject}.html"
        raise InputError(
            f"Cannot write {path}: {error.strerror or error}; free space or see that you may "
            "write there, then run again with --reports-only."
        ) from error


def _manifests(out_dir: Path, subject: str) -> list[dict[str, Any]]:
    """Read what the node that writes maps left for the reports of a subject."""
    folder = out_dir / f"sub-{subject}"
    paths = [
        *folder.glob("figures/*_manifest.json"),
        *folder.glob("ses-*/figures/*_manifest.json"),
    ]
    return [manifest for path in sorted(paths) if (manifest := read_manifest(path))]


def read_manifest(path: Path) -> dict[str, Any]:
    """The record of a fit; {} where there is none, or none that can be read."""
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text())
        missing = MANIFEST_KEYS - set(manifest)
    except (OSError, ValueError, TypeError) as error:
        LOGGER.warning("%s cannot be read (%s); its fit counts as not there.", path, error)
        return {}
    if missing:
        LOGGER.warning("%s lacks %s; its fit counts as not there.", path, ", ".join(missing))
        return {}
    return dict(manifest)


def _latest(out_dir: Path, subject: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Status of every job of a subject in the last run that had it, and that run."""
    status: dict[tuple[str, ...], dict[str, Any]] = {}
    run: dict[str, Any] = {"version": __version__}
    for path in sorted((out_dir / "logs").glob("*/summary.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):  # of a run that a full disk cut short
            continue
        # the page tells of what was tried, and of what was asked for by name; what an earlier run
        # did stays although a later one found nothing to do it with
        jobs = [
            j
            for j in content["jobs"]
            if j["subject"] == subject and (j["status"] != "skipped" or j.get("named"))
        ]
        for job in jobs:
            key = tuple(job.get(k, "") for k in ("session", "series", "model"))
            if job["status"] != "skipped" or key not in status:
                status[key] = job
        if jobs:
            run = _run_of(path.parent, content, any(j["status"] == "failed" for j in jobs))
    return list(status.values()), run


def _run_of(folder: Path, content: dict[str, Any], failed: bool) -> dict[str, Any]:
    """What the page says of a run; the end of its log only where something failed."""
    log = folder / "bids_gacelle.log"
    config = folder / "bids_gacelle.toml"
    lines = log.read_text().splitlines() if failed and log.exists() else []
    return {
        "command": content["command"],
        "run_id": content["run"],
        "version": content["version"],
        "config_toml": config.read_text() if config.exists() else "",
        "log_tail": "\n".join(lines[-LOG_LINES:]),
    }
