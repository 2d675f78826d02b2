"""Nipype's MultiProc plugin, made to survive a worker that is killed."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from nipype.pipeline import plugins
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node

from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.base import start_logging

KILLED = "the process of this node was killed"


class GuardedMultiProcPlugin(MultiProcPlugin):
    """MultiProc in which a killed worker (out of memory) is a crash of its node, not a hang.

    A pool of processes is lost as a whole when one of its workers is killed. Nipype then waits for
    results that never come; here what was running is started once more, each node in a process
    of its own, and a node that dies again is reported as crashed. ``plugin_args["run"]`` names the
    log that the workers write to.
    """

    pool: ProcessPoolExecutor

    def __init__(self, plugin_args: dict[str, Any] | None = None) -> None:
        super().__init__(plugin_args)
        self._pool_lock = threading.Lock()
        self.pool.shutdown()  # its workers would not know our log
        self.pool = self._new_pool(self.processors)

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        self._taskid += 1
        with self._pool_lock:
            try:
                future = self.pool.submit(run_node, node, updatehash, self._taskid)
            except BrokenProcessPool:
                self.pool = self._new_pool(self.processors)
                future = self.pool.submit(run_node, node, updatehash, self._taskid)
        self._task_obj[self._taskid] = future
        future.add_done_callback(partial(self._finished, self._taskid, node, updatehash))
        return int(self._taskid)

    def _finished(self, taskid: int, node: Any, updatehash: bool, future: Future[Any]) -> None:
        if future.cancelled():
            return
        if isinstance(future.exception(), BrokenProcessPool):
            # Which of the nodes was killed cannot be told: each gets a second chance, alone.
            alone = self._new_pool(1)
            future = alone.submit(run_node, node, updatehash, taskid)
            future.add_done_callback(partial(self._settled, taskid, alone))
        else:
            self._settled(taskid, None, future)

    def _settled(
        self, taskid: int, alone: ProcessPoolExecutor | None, future: Future[Any]
    ) -> None:
        error = future.exception()
        if error is None:
            self._taskresult[taskid] = future.result()
        else:
            killed = isinstance(error, BrokenProcessPool)
            message = [f"{type(error).__name__}: {KILLED if killed else error}\n"]
            self._taskresult[taskid] = {"result": None, "traceback": message, "taskid": taskid}
        if alone is not None:
            alone.shutdown(wait=False)

    def _new_pool(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=workers,
            initializer=_start_worker,
            initargs=(self._cwd, self.plugin_args["run"]),
            mp_context=mp.get_context(self.plugin_args.get("mp_context")),
        )


def read_plugin(path: Path) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a Nipype plugin from a YAML file.

    Raises
    ------
    InputError
        The file cannot be read, or names no plugin of Nipype.
    """
    try:
        given = yaml.safe_load(path.read_text())
        name, arguments = str(given["plugin"]), dict(given.get("plugin_args") or {})
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"The plugin file {path} needs the key 'plugin' and, where there are any, "
            f"'plugin_args': {error}."
        ) from error
    if not hasattr(plugins, f"{name}Plugin"):
        known = sorted(n.removesuffix("Plugin") for n in dir(plugins) if n.endswith("Plugin"))
        raise InputError(f"The plugin file {path}: Nipype has no plugin '{name}'; {known}.")
    return name, arguments


def _start_worker(cwd: str, run: dict[str, Any]) -> None:
    os.chdir(cwd)
    start_logging(run)
    threading.Thread(target=_leave_with, args=(run["pid"],), daemon=True).start()


def _leave_with(run: int) -> None:
    """End this worker, and the server that forked it, when the process of the run was killed."""
    server = os.getppid()
    while _lives(run):
        time.sleep(1)
    with contextlib.suppress(OSError):
        os.kill(server, signal.SIGTERM)
    os._exit(1)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
