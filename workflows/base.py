"""From jobs to a graph: participants hold sessions, sessions hold series, a series its fits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from nipype.interfaces import utility as niu
from nipype.pipeline import engine as pe

from bids_gacelle.bids.series import Job, Series, to_json
from bids_gacelle.engine import get_model
from bids_gacelle.interfaces.collect import Collect, MakeMask
from bids_gacelle.interfaces.fit import FitModel
from bids_gacelle.interfaces.prepare import PrepareSignals
from bids_gacelle.interfaces.rois import RoiStatistics
from bids_gacelle.interfaces.write import WriteManifest, WriteMaps
from bids_gacelle.settings import Settings


def init_participants_wf(
    settings: Settings, jobs: Sequence[Job], run: dict[str, Any], memory_gb: dict[str, float]
) -> pe.Workflow:
    """All sessions of all participants.

    Parameters
    ----------
    jobs
        Eligible jobs only, those of a session and of a series next to each other.
    run
        What every node needs to know of the run (see `interfaces.base.StepInputSpec`).
    memory_gb
        Estimated need of each series, by its label as `series_key` gives it.
    """
    workflow = pe.Workflow(name="bids_gacelle", base_dir=run["work_dir"])
    for (subject, session), group in groupby(jobs, lambda j: (j.series.subject, j.series.session)):
        name = (
            _node_name("sub", subject, "ses", session) if session else _node_name("sub", subject)
        )
        session_wf = init_session_wf(settings, list(group), run, memory_gb, name=name + "_wf")
        crashes = Path(run["log_dir"]) / f"sub-{subject}"
        for node in session_wf._get_all_nodes():
            node.config = {"execution": {"crashdump_dir": str(crashes)}}
        workflow.add_nodes([session_wf])
    return workflow


def init_session_wf(
    settings: Settings,
    jobs: Sequence[Job],
    run: dict[str, Any],
    memory_gb: dict[str, float],
    name: str,
) -> pe.Workflow:
    """All series of one session of one participant."""
    workflow = pe.Workflow(name=name)
    for key, group in groupby(jobs, lambda j: series_key(j.series)):
        members = list(group)
        models = [job.model for job in members]
        series_wf = init_series_wf(settings, members[0].series, models, run, memory_gb[key])
        workflow.add_nodes([series_wf])
    return workflow


def init_series_wf(
    settings: Settings, series: Series, models: Sequence[str], run: dict[str, Any], mem_gb: float
) -> pe.Workflow:
    """Read and mask one series, prepare its signals once, and fit every model to them."""
    workflow = pe.Workflow(name=series_node(series))
    common = {"settings": settings.to_dict(), "run": run, "series": to_json(series)}

    inputnode = pe.Node(niu.IdentityInterface(list(common)), name="inputnode")
    inputnode.inputs.trait_set(**common)
    outputnode = pe.Node(
        niu.IdentityInterface([f"outputs_{m}" for m in models]), name="outputnode"
    )

    collect = pe.Node(Collect(), name="collect", mem_gb=mem_gb)
    mask = pe.Node(MakeMask(), name="mask", mem_gb=0.5)
    prepare = pe.Node(
        PrepareSignals(l_max=_l_max(settings, models)), name="prepare", mem_gb=mem_gb
    )
    for node in (collect, mask, prepare):
        workflow.connect([(inputnode, node, [(k, k) for k in common])])
    workflow.connect([
        (collect, mask, [("collected", "collected")]),
        (collect, prepare, [("collected", "collected")]),
        (mask, prepare, [("mask", "mask")]),
    ])  # fmt: skip

    for model in models:
        fit = pe.Node(
            FitModel(model=model, use_gpu=run["use_gpu"]),
            name=f"fit_{model}",
            n_procs=settings.omp_nthreads,
            mem_gb=mem_gb,
        )
        write = pe.Node(WriteMaps(model=model), name=f"write_{model}", mem_gb=0.5)
        rois = pe.Node(RoiStatistics(model=model), name=f"rois_{model}", mem_gb=0.5)
        manifest = pe.Node(WriteManifest(model=model), name=f"manifest_{model}", mem_gb=0.2)
        for node in (fit, write, rois, manifest):
            workflow.connect([(inputnode, node, [(k, k) for k in common])])
            workflow.connect([
                (mask, node, [("mask", "mask")]),
                (prepare, node, [("prepared", "prepared")]),
            ])  # fmt: skip
        for node in (write, rois, manifest):
            workflow.connect([
                (collect, node, [("collected", "collected")]),
                (fit, node, [("fitted", "fitted")]),
            ])  # fmt: skip
        workflow.connect([
            (write, rois, [("written", "written")]),
            (write, manifest, [("written", "written")]),
            (rois, manifest, [("tables", "tables")]),
            (manifest, outputnode, [("outputs", f"outputs_{model}")]),
        ])  # fmt: skip
    return workflow


def series_key(series: Series) -> str:
    """Label of a series that is unique within a run."""
    return f"{series.subject}/{series.session}/{series.label}"


def series_node(series: Series) -> str:
    """Name of the workflow of a series within its session."""
    return _node_name(series.label) + "_wf"


def _l_max(settings: Settings, models: Sequence[str]) -> int:
    """Highest order of rotational invariant that any of the models fits."""
    orders = [
        settings.model_options.get(m, {}).get("l_max", get_model(m).options.get("l_max", 0))
        for m in models
    ]
    return int(max(orders))


def _node_name(*parts: str) -> str:
    return re.sub(r"[^0-9a-zA-Z]+", "_", "_".join(parts)).strip("_")
