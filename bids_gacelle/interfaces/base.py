"""What every node shares: settings in, a failure record out, one log for all processes."""

from __future__ import annotations

import json
import logging
import shutil
import traceback
from pathlib import Path
from typing import Any

from nipype.interfaces.base import BaseInterfaceInputSpec, SimpleInterface, traits

from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.model_files import use_model_files
from bids_gacelle.settings import Settings

LOGGER = logging.getLogger("bids_gacelle")


class StepInputSpec(BaseInterfaceInputSpec):
    """Inputs of every node."""

    settings = traits.Dict(mandatory=True, desc="the run's settings, as Settings.to_dict gives")
    run = traits.Dict(
        mandatory=True,
        desc="log_file, log_level, failures (folders), done (folder), model_files, ...",
    )
    series = traits.Dict(mandatory=True, desc="a bids.series.Series as JSON data")


class Step(SimpleInterface):
    """A node whose failure is written down where the parent process finds it.

    Subclasses implement ``work(settings, cwd) -> dict`` of outputs.
    """

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Do the step in the folder ``cwd`` and return the values of the output traits."""
        raise NotImplementedError

    def _run_interface(self, runtime: Any) -> Any:
        run = self.inputs.run
        start_logging(run)
        settings = Settings.from_dict(self.inputs.settings)
        cwd = Path(runtime.cwd)
        try:
            use_model_files(run["model_files"])
            try:
                self._results.update(self.work(settings, cwd))
            except OSError as error:  # what we read and write for the user has its InputError
                free = shutil.disk_usage(cwd).free / 1e6
                raise InputError(
                    f"Cannot write intermediate files in {cwd}: {error} ({free:,.0f} MB free); "
                    "free space or choose another folder with -w."
                ) from error
        except Exception as error:
            self._record_failure(error)
            raise
        return runtime

    def _record_failure(self, error: Exception) -> None:
        expected = isinstance(error, InputError)
        series, model = self.inputs.series, getattr(self.inputs, "model", "")
        record = {
            "step": type(self).__name__,
            "subject": series["subject"],
            "session": series["session"],
            "series": series_label(series),
            "model": model if isinstance(model, str) else "",
            "expected": expected,
            "message": str(error) if expected else f"{type(error).__name__}: {error}",
            "traceback": "" if expected else traceback.format_exc(),
        }
        name = "_".join(str(record[k]) for k in ("step", "subject", "session", "series", "model"))
        for folder in self.inputs.run["failures"]:  # one of the two disks may be full
            try:
                (Path(folder) / (name.replace(" ", "-") + ".json")).write_text(json.dumps(record))
            except OSError:
                continue
            return
        LOGGER.error("%s", record["message"])


def series_label(series: dict[str, Any]) -> str:
    """`Series.label` of a series in JSON form."""
    from bids_gacelle.bids.series import series_from_json

    return series_from_json(series).label


def start_logging(run: dict[str, Any]) -> None:
    """Send our messages to the terminal and the run's log file, once per process and run.

    Nipype's own messages, tracebacks of nodes among them, go to the file only.
    """
    log_file = str(Path(run["log_file"]).absolute())
    if any(getattr(handler, "baseFilename", "") == log_file for handler in LOGGER.handlers):
        return
    stop_logging()
    logging.raiseExceptions = False  # a full disk must not print a traceback per line of the log
    line = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    file = logging.FileHandler(log_file, delay=True)
    handlers: list[logging.Handler] = [file, logging.StreamHandler()]
    for handler in handlers:
        handler.setFormatter(line)
    LOGGER.handlers = handlers
    LOGGER.setLevel(run["log_level"])
    LOGGER.propagate = False
    for name in ("nipype", "nipype.workflow", "nipype.interface", "nipype.utils"):
        other = logging.getLogger(name)
        other.handlers = [file]
        other.propagate = False


def stop_logging() -> None:
    """Close the log of the run."""
    for handler in LOGGER.handlers:
        handler.close()
    LOGGER.handlers = []
