"""What each analysis level does, from settings to an exit code."""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter
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
from bids_gacelle.group import NothingToMerge, merge_tables
from bids_gacelle.interfaces.base import LOGGER, start_logging, stop_logging
from bids_gacelle.interfaces.model_files import load_model_files
from bids_gacelle.interfaces.models import resolve_device
from bids_gacelle.interfaces.provenance import atlas_digests, fit_hash, input_digests
from bids_gacelle.interfaces.report import (
    read_manifest,
    reported_subjects,
    write_citations,
    write_report,
)
from bids_gacelle.interfaces.write import scheme_file
from bids_gacelle.settings import Settings
from bids_gacelle.workflows.base import init_participants_wf, series_key
from bids_gacelle.workflows.outcome import outcomes, summary
from bids_gacelle.workflows.plan import check_plan, eligible, make_plan, say
from bids_gacelle.workflows.plugin import GuardedMultiProcPlugin, read_plugin

OK, FAILED, NOTHING = 0, 1, 3


def dry_run(settings: Settings) -> int:
    """Print what would be fitted and why the rest would not."""
    load_model_files(settings.model_file)
    plan = check_plan(make_plan(settings), wait_for_files=True)
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
    except NothingToMerge as error:
        print(f"bids-gacelle: {error}", file=sys.stderr)
        return NOTHING
    except InputError as error:
        print(f"bids-gacelle: error: {error}", file=sys.stderr)
        return FAILED
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
    if not wanted:
        print(f"bids-gacelle: {settings.output_dir} has no maps to report.", file=sys.stderr)
    return OK if wanted else NOTHING


def participant(settings: Settings, command: Sequence[str], level: int) -> int:
    """Fit every eligible model, write maps, tables and reports, and tell the truth about it."""
    check_output_dir(settings.bids_dir, settings.output_dir)
    settings = replace(
        settings,
        device=resolve_device(settings.device),
        model_file=tuple(path.absolute() for path in settings.model_file),
    )
    model_files = load_model_files(settings.model_file)
    plan = make_plan(settings)
    run = _start(settings, plan, command, level)
    run["model_files"] = model_files
    started = time.perf_counter()
    try:
        _keep_model_files(run)
        plan = check_plan(plan)
        say(plan, LOGGER)
        jobs = eligible(plan)
        resumed = [j for j in jobs if settings.resume and _unchanged(settings, j)]
        run["warnings"] = _warnings(plan)
        todo = [j for j in jobs if j not in resumed]
        error = _execute(settings, todo, run) if todo else None
        status = outcomes(settings, plan, run, resumed, error)
        code = _finish(settings, plan, run, status)
        LOGGER.info("%s, in %.0f s.", _counts(status), time.perf_counter() - started)
        return code
    finally:
        stop_logging()
        shutil.rmtree(run["failures"][1], ignore_errors=True)
        if not settings.keep_work:
            shutil.rmtree(run["work_dir"], ignore_errors=True)


def _work_base(settings: Settings) -> Path:
    """Folder of the intermediate files of all runs; never inside the input dataset."""
    base = settings.work_dir or Path(tempfile.gettempdir()) / f"bids_gacelle-{os.getuid()}"
    inside = base.resolve().is_relative_to(settings.bids_dir.resolve())
    if inside and not base.resolve().is_relative_to(settings.output_dir.resolve()):
        raise InputError(f"The work folder {base} is inside the input dataset; choose another -w.")
    return base


def _start(settings: Settings, plan: Plan, command: Sequence[str], level: int) -> dict[str, Any]:
    """Make the folders of the run, open its log, and set up the output dataset."""
    base = _work_base(settings)
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}_{uuid.uuid4()}"
    out = settings.output_dir
    models = {job.model: get_model(job.model).title for job in plan.jobs}
    init_dataset(out, plan.datasets, __version__, settings.dataset_link, models=models)
    log_dir = out / "logs" / run_id
    work = base / run_id
    try:
        for folder in (log_dir / "failures", work / "failures", work / "done"):
            folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"Cannot make {folder}: {error.strerror}; choose another -w.") from error
    run = {
        "run_id": run_id,
        "version": __version__,
        "pid": os.getpid(),
        "command": shlex.join(command),
        "log_dir": str(log_dir),
        "log_file": str(log_dir / "bids_gacelle.log"),
        "log_level": level,
        "work_dir": str(work),
        "failures": [str(work / "failures"), str(log_dir / "failures")],
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


def _keep_model_files(run: dict[str, Any]) -> None:
    """Keep what the user's models were beside the settings of the run."""
    for i, (path, text) in enumerate(run["model_files"], 1):
        write_text(Path(run["log_dir"]) / "model_files" / f"{i}_{Path(path).name}", text)


def _execute(settings: Settings, jobs: Sequence[Job], run: dict[str, Any]) -> Exception | None:
    """Run the graph; what fails is in the records of the nodes, Nipype's own word is returned."""
    plugin, arguments = _plugin(settings, run)
    memory = {series_key(job.series): _memory_gb(job.series) for job in jobs}
    workflow = init_participants_wf(settings, jobs, run, memory)
    workflow.config["execution"] = {
        "crashdump_dir": run["log_dir"],
        "crashfile_format": "txt",
        "stop_on_first_crash": settings.stop_on_first_crash,
        "check_version": False,
        "poll_sleep_duration": 0.2,
    }
    LOGGER.info("%d fits to do, up to %.1f GB of memory each", len(jobs), max(memory.values()))
    try:
        workflow.run(plugin=plugin, plugin_args=arguments)
    except Exception as error:  # raised when any node failed; the records say which, and why
        LOGGER.debug("Nipype: %s", error, exc_info=True)
        return error
    return None


def _plugin(settings: Settings, run: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    arguments: dict[str, Any] = {
        "n_procs": settings.nprocs,
        "raise_insufficient": False,
        # torch must not be forked after use; a fresh process per worker is also safe for CUDA
        "mp_context": "forkserver",
        "run": run,
    }
    if settings.mem:
        arguments["memory_gb"] = settings.mem
    if run["use_gpu"]:
        arguments["n_gpu_procs"] = 1
    name = "Linear" if settings.nprocs == 1 else "MultiProc"
    if settings.use_plugin:
        name, given = read_plugin(settings.use_plugin)
        arguments |= given
    if name == "MultiProc":
        return GuardedMultiProcPlugin(arguments), {}
    return name, {} if name == "Linear" else arguments


def _finish(
    settings: Settings, plan: Plan, run: dict[str, Any], status: list[dict[str, Any]]
) -> int:
    """Write the summary, the reports and the citations, and say what failed."""
    path = Path(run["log_dir"]) / "summary.json"
    pages = []
    try:
        # the pages read the summary, and may fail themselves: hence twice
        write_json(path, summary(plan, run, status))
        for subject in sorted({s["subject"] for s in status if s["status"] != "skipped"}):
            try:
                pages.append(write_report(settings.output_dir, subject))
            except Exception as error:  # a page that cannot be drawn must not cost the maps
                LOGGER.debug("Report of sub-%s", subject, exc_info=True)
                reason = f"no report: {error}"
                status.append({"subject": subject, "status": "failed", "reason": reason})
        write_citations(settings.output_dir)
        write_json(path, summary(plan, run, status))
    except InputError as error:
        status.append({"subject": "", "status": "failed", "reason": str(error)})
    failed = [s for s in status if s["status"] == "failed"]
    _tidy_crashes(run, failed)
    for record in failed:
        words = [f"sub-{record['subject']}" * bool(record["subject"])]
        words += [str(record.get(k, "")) for k in ("session", "series", "model")]
        LOGGER.error("%s failed: %s", " ".join(w for w in words if w), record["reason"])
    for page in pages:
        LOGGER.info("Report: %s", page)
    if not eligible(plan):
        LOGGER.error("Nothing could be fitted; the messages above say what each model misses.")
        return NOTHING
    return FAILED if failed else OK


def _counts(status: Sequence[dict[str, Any]]) -> str:
    """Say how many fits ended how."""
    counts = Counter(s["status"] for s in status)
    return f"{counts['ok']} fits done, {counts['failed']} failed, {counts['skipped']} not possible"


def _tidy_crashes(run: dict[str, Any], failed: Sequence[dict[str, Any]]) -> None:
    """Keep Nipype's crash files of our own faults only; bad input has its sentence."""
    unexpected = any(not s.get("expected", False) for s in failed)
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
    manifest = read_manifest(path)
    if not manifest or missing_outputs(settings.output_dir, manifest["outputs"]):
        return False
    scheme = scheme_file(settings, job.series)
    if scheme is not None and str(scheme) not in manifest["outputs"]:
        return False
    digests = input_digests(job.series)
    same_fit = manifest["fit_hash"] == fit_hash(job.series, job.model, settings, digests)
    return bool(same_fit and manifest["atlases"] == atlas_digests(job.series))


def _warnings(plan: Plan) -> dict[str, list[str]]:
    """Warnings of the plan by series, for the reports."""
    found: dict[str, list[str]] = {}
    for series in {series_key(job.series): job.series for job in eligible(plan)}.values():
        images = [*series.images, *(run.image for run in series.dwi_runs), *series.mask.images]
        images += [series.b1_map.image] if series.b1_map else []
        images += [*(series.second.images if series.second else ())]
        images += [given.image for given in series.voxel_maps.values()]
        others = {
            image
            for job in plan.jobs
            if (job.series.subject, job.series.session) == (series.subject, series.session)
            for image in job.series.images
        } - set(images)
        found[series_key(series)] = [
            finding.message
            for finding in plan.findings
            if finding.severity == "warning"
            and (finding.subject, finding.session) == (series.subject, series.session)
            and finding.file not in others
            and finding.series in ("", series.label)
        ]
    return found


def _memory_gb(series: Series) -> float:
    """Estimated memory of reading and fitting a series: its volumes, three times, and torch."""
    images = series.images or tuple(run.image for run in series.dwi_runs)
    images += series.second.images if series.second else ()
    shapes = [cast(SpatialImage, nib.load(image)).shape for image in dict.fromkeys(images)]
    voxels = sum(math.prod(shape) for shape in shapes)
    return 3 * 4 * voxels / 1e9 + 0.5
