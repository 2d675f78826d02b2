"""Crashes, killed processes and neighbours: one failure costs one fit, and is told."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import pytest

from bids_gacelle.cli.main import main
from bids_gacelle.interfaces.fit import FitModel
from bids_gacelle.workflows import run as workflow_run
from tests.datasets import add_megre, new_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def two_subjects(tmp_path):
    root = new_dataset(tmp_path / "data")
    add_megre(root, "01")
    add_megre(root, "02", seed=1)
    return root


@pytest.fixture
def no_pages(monkeypatch):
    monkeypatch.setattr(workflow_run, "write_report", lambda out, subject: out / "page")


def jobs(out):
    newest = max(out.glob("logs/*/summary.json"), key=lambda p: p.stat().st_mtime)
    return {j["subject"]: j for j in json.loads(newest.read_text())["jobs"]}


@pytest.mark.parametrize("bad", ["01", "02"])
def test_a_fault_of_ours_costs_one_fit(two_subjects, tmp_path, no_pages, monkeypatch, capfd, bad):
    work = FitModel.work

    def faulty(self, settings, cwd):
        if self.inputs.series["subject"] == bad:
            raise ZeroDivisionError("a fault of ours")
        return work(self, settings, cwd)

    monkeypatch.setattr(FitModel, "work", faulty)
    out = tmp_path / "out"
    words = [str(two_subjects), str(out), "participant", "--models", "r2star", "--nprocs", "1"]
    assert main(words) == 1
    found = jobs(out)
    good = "02" if bad == "01" else "01"
    assert found[good]["status"] == "ok"
    assert found[bad]["status"] == "failed"
    assert "a fault of ours" in found[bad]["reason"]
    [crash] = out.glob(f"logs/*/sub-{bad}/crash-*.txt")
    assert "ZeroDivisionError" in crash.read_text()
    assert "Traceback" not in capfd.readouterr().err


def test_stop_on_first_crash(two_subjects, tmp_path, no_pages, monkeypatch):
    def faulty(self, settings, cwd):
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(FitModel, "work", faulty)
    out = tmp_path / "out"
    words = [str(two_subjects), str(out), "participant", "--models", "r2star", "--nprocs", "1"]
    assert main([*words, "--stop-on-first-crash"]) == 1
    assert len(list(out.glob("logs/*/sub-*/crash-*.txt"))) == 1


KILLED = """
import os, signal, sys
from nipype.interfaces.utility import Function
from nipype.pipeline import engine as pe
from bids_gacelle.workflows.plugin import GuardedMultiProcPlugin

def kill(x):
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)

def double(x):
    return 2 * x

if __name__ == "__main__":
    base = sys.argv[1]
    run = {"log_file": base + "/log", "log_level": 20, "pid": os.getpid()}
    wf = pe.Workflow("wf", base_dir=base)
    for name, function in (("bad", kill), ("good", double), ("late", double)):
        node = pe.Node(Function(["x"], ["y"], function), name=name)
        node.inputs.x = 21
        wf.add_nodes([node])
    arguments = {"n_procs": 2, "mp_context": "forkserver", "run": run}
    try:
        wf.run(plugin=GuardedMultiProcPlugin(arguments))
    except RuntimeError:
        print("crashed nodes were reported")
"""


def test_a_killed_worker_does_not_hang_the_run(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert "crashed nodes were reported" in ran.stdout, ran.stderr
    assert (tmp_path / "wf/good/result_good.pklz").exists()
    assert (tmp_path / "wf/late/result_late.pklz").exists()


def test_a_killed_run_leaves_no_processes_and_no_half_files(two_subjects, tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    command = [sys.executable, "-m", "bids_gacelle.cli.main", str(two_subjects), str(out)]
    command += ["participant", "--models", "r2star", "--nprocs", "2", "-w", str(work)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(work.rglob("mask")) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.kill()
    run.wait()
    while (alive := _processes_with(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert alive == []
    assert not list(out.rglob("*.tmp"))
    assert main([*command[3:], "--nprocs", "1"]) == 0


def _processes_with(folder: str) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(folder):
                found.append(link.parent.name)
    return found


def test_two_runs_into_one_folder_at_once(two_subjects, tmp_path, bids_errors):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bids_gacelle.cli.main", str(two_subjects), str(out)]
    command += ["participant", "--models", "r2star", "--nprocs", "1", "--participant-label"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([*command, s], stderr=subprocess.PIPE, env=environment, cwd=tmp_path)
        for s in ("01", "02")
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [p.returncode for p in both] == [0, 0], errors
    for subject in ("01", "02"):
        nib.load(out / f"sub-{subject}/anat/sub-{subject}_R2starmap.nii.gz").get_fdata()
        assert (out / f"sub-{subject}.html").exists()
    assert bids_errors(out) == []
    assert len(list(out.glob("logs/*/summary.json"))) == 2


@pytest.mark.slow
def test_multiproc_gives_the_same_maps(two_subjects, tmp_path, no_pages):
    maps = []
    for n in (1, 2):
        out = tmp_path / f"out{n}"
        words = [str(two_subjects), str(out), "participant", "--models", "r2star"]
        assert main([*words, "--nprocs", str(n), "--omp-nthreads", "1"]) == 0
        maps.append((out / "sub-02/anat/sub-02_R2starmap.nii.gz").read_bytes())
    assert maps[0] == maps[1]


def test_plugin_file(two_subjects, tmp_path, no_pages):
    plugin = tmp_path / "plugin.yml"
    plugin.write_text("plugin: Linear\n")
    out = tmp_path / "out"
    words = [str(two_subjects), str(out), "participant", "--models", "r2star"]
    assert main([*words, "--use-plugin", str(plugin)]) == 0
    plugin.write_text("nothing: here\n")
    assert main([*words, "--use-plugin", str(plugin)]) == 2
