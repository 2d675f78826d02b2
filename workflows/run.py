"""What each analysis level does, from settings to an exit code."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import nibabel as nib
from nibabel.spatialimages import SpatialImage

from bids_gacelle import __version__
from bids_gacelle.bids import names
from bids_gacelle.bids.dataset import check_output_dir, init_dataset
from bids_gacelle.bids.output import missing_outputs, write_json, write_text
from bids_gacelle.bids.series import Job, Plan, Series
from bids_gacelle.engine import get_model
from bids_gacelle.errors import InputError
from bids_gacelle.group import merge_tables
from bids_gacelle.interfaces.base import LOGGER, start_logging, stop_logging
from bids_gacelle.interfaces.models import resolve_device
from bids_gacelle.interfaces.provenance import fit_hash
from bids_gacelle.interfaces.report import reported_subjects, write_citations, write_report
from bids_gacelle.settings import Settings
from bids_gacelle.workflows.base import init_participants_wf, series_key
from bids_gacelle.workflows.outcome import outcomes, summary
from bids_gacelle.workflows.plan import check_plan, eligible, make_plan, say
from bids_gacelle.workflows.plugin import GuardedMultiProcPlugin

OK, FAILED, NOTHING = 0, 1, 3


def dry_run(settings: Settings) -> int:
    """Print what would be fitted and why the rest would not."""
    plan = make_plan(settings)
    LOGGER.addHandler(screen := logging.StreamHandler(sys.stdout))
    LOGGER.setLevel(logging.INFO)
    try:
        say(plan, LOGGER)
    finally:
        LOGGER.removeHandler(screen)
    n = len(eligible(plan))
    print(f"{n} of {len(plan.jobs)} fits are possible.")
    return OK if n else NOTHING


def group(settings: Settings) -> int:
    """Merge the ROI tables of all participants into one table per model."""
    try:
        tables = merge_tables(settings.output_dir)
    except InputError as error:
        print(f"bids-gacelle: {error}")
        return NOTHING
    for path in tables:
        print(f"Group table: {path}")
    return OK


def reports_only(settings: Settings) -> int:
    """Rebuild the pages of the subjects from what earlier runs wrote."""
    subjects = reported_subjects(settings.output_dir)
    wanted = settings.participant_label or subjects
    missing = [s for s in wanted if s not in subjects]
    if missing:
        have = ", ".join(subjects) or "none"
        raise InputError(
            f"{settings.output_dir} has no maps of participant {missing[0]}; it has: {have}."
        )
    for subject in wanted:
        print(f"Report: {write_report(settings.output_dir, subject)}")
    return OK if wanted else NOTHING


def participant(settings: Settings, command: Sequence[str], level: int) -> int:
    """Fit every eligible model, write maps, tables and reports, and tell the truth about it."""
    check_output_dir(settings.bids_dir, settings.output_dir)
    device = resolve_device(settings.device)
    plan = make_plan(settings)
    settings = replace(settings, device=device)
    run = _start(settings, plan, command, level)
    started = time.perf_counter()
    try:
        plan = check_plan(plan)
        say(plan, LOGGER)
        jobs = eligible(plan)
        resumed = [j for j in jobs if settings.resume and _unchanged(settings, j)]
        run["warnings"] = _warnings(plan)
        todo = [j for j in jobs if j not in resumed]
        if todo:
            _execute(settings, todo, run)
        status = outcomes(settings, plan, run, resumed)
        return _finish(settings, plan, run, status, time.perf_counter() - started)
    finally:
        stop_logging()
        if not settings.keep_work:
            shutil.rmtree(run["work_dir"], ignore_errors=True)


def _start(settings: Settings, plan: Plan, command: Sequence[str], level: int) -> dict[str, Any]:
    """Make the folders of the run, open its log, and set up the output dataset."""
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}_{uuid.uuid4()}"
    out = settings.output_dir
    models = {job.model: get_model(job.model).title for job in plan.jobs}
    init_dataset(out, plan.datasets, __version__, settings.dataset_link, models=models)
    log_dir = out / "logs" / run_id
    base = settings.work_dir or Path(tempfile.gettempdir()) / f"bids_gacelle-{os.getuid()}"
    work = base / run_id
    if work.is_relative_to(settings.bids_dir) and not out.is_relative_to(settings.bids_dir):
        raise InputError(f"The work folder {base} is inside the input dataset; choose another.")
    try:
        for folder in (log_dir, work / "failures", work / "done"):
            folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"Cannot make {folder}: {error.strerror}; choose another -w.") from error
    run = {
        "run_id": run_id,
        "version": __version__,
        "command": " ".join(command),
        "log_dir": str(log_dir),
        "log_file": str(log_dir / "bids_gacelle.log"),
        "log_level": level,
        "work_dir": str(work),
        "failures": str(work / "failures"),
        "done": str(work / "done"),
        "datasets": plan.datasets,
        "use_gpu": settings.device.startswith("cuda"),
        "warnings": {},
    }
    start_logging(run)
    write_text(log_dir / "bids_gacelle.toml", settings.to_toml())
    LOGGER.info("bids-gacelle %s, run %s", __version__, run_id)
    LOGGER.info(
        "Device %s, %d cores, %d per fit; intermediate files in %s",
        settings.device,
        settings.nprocs,
        settings.omp_nthreads,
        work,
    )
    return run


def _execute(settings: Settings, jobs: Sequence[Job], run: dict[str, Any]) -> None:
    """Run the graph; what fails is in the records of the nodes, not in an exception."""
    memory = {series_key(job.series): _memory_gb(job.series) for job in jobs}
    workflow = init_participants_wf(settings, jobs, run, memory)
    workflow.config["execution"] = {
        "crashdump_dir": run["log_dir"],
        "crashfile_format": "txt",
        "stop_on_first_crash": settings.stop_on_first_crash,
        "check_version": False,
        "poll_sleep_duration": 0.2,
    }
    plugin, arguments = _plugin(settings, run)
    LOGGER.info("Fitting %d model%s, %s", len(jobs), "s" * (len(jobs) > 1), _largest(memory))
    try:
        workflow.run(plugin=plugin, plugin_args=arguments)
    except Exception as error:
        # Nipype raises when any node failed; the records say which, and why.
        LOGGER.debug("Nipype: %s", error, exc_info=True)


def _plugin(settings: Settings, run: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    arguments: dict[str, Any] = {
        "n_procs": settings.nprocs,
        "raise_insufficient": False,
        # torch must not be forked after use; a fresh process per worker is also safe for CUDA
        "mp_context": "forkserver",
    }
    if settings.mem:
        arguments["memory_gb"] = settings.mem
    if run["use_gpu"]:
        arguments["n_gpu_procs"] = 1
    if settings.use_plugin:
        import yaml

        try:
            given = yaml.safe_load(settings.use_plugin.read_text())
            return given["plugin"], {**arguments, **given.get("plugin_args", {})}
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(
                f"The plugin file {settings.use_plugin} needs the keys 'plugin' and, where it "
                f"has any, 'plugin_args': {error}."
            ) from error
    if settings.nprocs == 1:
        return "Linear", {}
    return GuardedMultiProcPlugin({**arguments, "run": run}), {}


def _finish(
    settings: Settings,
    plan: Plan,
    run: dict[str, Any],
    status: list[dict[str, Any]],
    seconds: float,
) -> int:
    """Write the reports and the summary, and say how it went."""
    write_json(Path(run["log_dir"]) / "summary.json", summary(plan, run, status))
    fitted = {s["subject"] for s in status if s["status"] == "ok" or "step" in s}
    pages = []
    for subject in sorted(fitted):
        try:
            pages.append(write_report(settings.output_dir, subject))
        except Exception as error:  # a page that cannot be drawn must not cost the maps
            LOGGER.error(
                "The report of sub-%s could not be made: %s", subject, error, exc_info=True
            )
            status.append({"subject": subject, "status": "failed", "reason": f"report: {error}"})
    write_citations(settings.output_dir)
    failed = [s for s in status if s["status"] == "failed"]
    _tidy_crashes(run, failed)
    for record in failed:
        where = " ".join(str(record.get(k, "")) for k in ("series", "model")).strip()
        LOGGER.error("sub-%s %s failed: %s", record["subject"], where, record["reason"])
    done = sum(s["status"] == "ok" for s in status)
    LOGGER.info("%d fits done, %d failed, in %.0f s.", done, len(failed), seconds)
    for page in pages:
        LOGGER.info("Report: %s", page)
    if not done and not any("step" in s for s in failed):
        LOGGER.error("Nothing could be fitted; the messages above say what each model misses.")
        return NOTHING
    return FAILED if failed else OK


def _tidy_crashes(run: dict[str, Any], failed: Sequence[dict[str, Any]]) -> None:
    """Keep Nipype's crash files of our own faults only; bad input has its sentence."""
    unexpected = any(not s.get("expected", True) for s in failed)
    for folder in Path(run["log_dir"]).glob("sub-*"):
        for crash in folder.glob("crash-*"):
            if unexpected:
                LOGGER.info("Details: %s", crash)
            else:
                crash.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _unchanged(settings: Settings, job: Job) -> bool:
    """Whether an earlier run wrote this fit from the same inputs with the same options."""
    path = settings.output_dir / names.manifest_path(job.series, model=job.model)
    if not path.exists():
        return False
    manifest = json.loads(path.read_text())
    files = [entry[key] for entry in manifest["maps"] for key in ("file", "std")]
    files += [manifest["nrmse"], manifest["flags"], manifest["mask"]["file"], *manifest["tables"]]
    return manifest["fit_hash"] == fit_hash(
        job.series, job.model, settings
    ) and not missing_outputs(settings.output_dir, files)


def _warnings(plan: Plan) -> dict[str, list[str]]:
    """Warnings of the plan by series, for the reports."""
    found: dict[str, list[str]] = {}
    for job in eligible(plan):
        series = job.series
        for finding in plan.findings:
            same = (finding.subject, finding.session) == (series.subject, series.session)
            about = finding.model in ("", job.model) and finding.severity == "warning"
            listed = found.setdefault(series_key(series), [])
            if (
                same
                and about
                and _concerns(finding.file, series)
                and finding.message not in listed
            ):
                listed.append(finding.message)
    return found


def _concerns(file: str, series: Series) -> bool:
    images = [*series.images, *(run.image for run in series.dwi_runs)]
    return not file or file in images or any(file in image for image in images)


def _memory_gb(series: Series) -> float:
    """Estimated memory of reading and fitting a series: its volumes, three times, and torch."""
    images = series.images or tuple(run.image for run in series.dwi_runs)
    shapes = [cast(SpatialImage, nib.load(image)).shape for image in dict.fromkeys(images)]
    voxels = sum(math.prod(shape) for shape in shapes)
    return 3 * 4 * voxels / 1e9 + 0.5


def _largest(memory: dict[str, float]) -> str:
    return f"up to {max(memory.values()):.1f} GB of memory each"
