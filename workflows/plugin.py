"""Nipype's MultiProc plugin, made to survive a worker that is killed."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node

from bids_gacelle.interfaces.base import start_logging

RETRIES = 1
"""A killed worker takes its neighbours with it; each of their nodes is started once more."""


class GuardedMultiProcPlugin(MultiProcPlugin):  # type: ignore[misc]
    """MultiProc in which a killed worker (out of memory) is a crash of its node, not a hang.

    A pool of processes is lost as a whole when one of its workers is killed. Nipype then waits for
    results that never come; here a new pool takes over what was running, and a node that dies
    twice is reported as crashed. ``plugin_args["run"]`` names the log that the workers write to.
    """

    def __init__(self, plugin_args: dict[str, Any] | None = None) -> None:
        super().__init__(plugin_args)
        self._pool_lock = threading.Lock()
        self.pool.shutdown()  # never used: its workers would not know our log
        self.pool = self._new_pool()

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        self._taskid += 1
        self._start(self._taskid, node, updatehash, RETRIES)
        return self._taskid

    def _start(self, taskid: int, node: Any, updatehash: bool, retries: int) -> None:
        with self._pool_lock:
            try:
                future = self.pool.submit(run_node, node, updatehash, taskid)
            except BrokenProcessPool:
                self.pool = self._new_pool()
                future = self.pool.submit(run_node, node, updatehash, taskid)
        self._task_obj[taskid] = future
        future.add_done_callback(partial(self._finished, taskid, node, updatehash, retries))

    def _finished(
        self, taskid: int, node: Any, updatehash: bool, retries: int, future: Future[Any]
    ) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._taskresult[taskid] = future.result()
        elif isinstance(error, BrokenProcessPool) and retries:
            self._start(taskid, node, updatehash, retries - 1)
        else:
            message = [f"{type(error).__name__}: the process of this node was killed\n"]
            self._taskresult[taskid] = {"result": None, "traceback": message, "taskid": taskid}

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=self.processors,
            initializer=_start_worker,
            initargs=(self._cwd, self.plugin_args["run"]),
            mp_context=mp.get_context(self.plugin_args.get("mp_context")),
        )


def _start_worker(cwd: str, run: dict[str, Any]) -> None:
    os.chdir(cwd)
    start_logging(run)
