"""Whether an acquisition suits a model: said before the fit, kept with it, refused if hopeless."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from bids_gacelle.bids.series import Finding, Job, Series
from bids_gacelle.engine import EngineError, SignalModel, adequacy
from bids_gacelle.engine.scheme import Scheme
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.models import model_class, prior_of
from bids_gacelle.interfaces.prepare import acquired, measurements_of, options_of
from bids_gacelle.interfaces.units import MapUnit, map_units
from bids_gacelle.settings import Settings

MOST_VOXELS = 50_000
"""Voxels that tell the noise of a series."""


class Doubt(NamedTuple):
    """Why an acquisition does not suit a model, and whether the fit can be tried nonetheless."""

    reason: str
    can_be_fitted: bool


def suited_jobs(
    jobs: Sequence[Job], settings: Settings
) -> tuple[tuple[Job, ...], tuple[Finding, ...]]:
    """The jobs, with a reason where images cannot determine the model; and what to say of them.

    With ``--fit-undetermined`` they stay eligible, with a warning.
    """
    judge = _Judge(settings)
    judged = [_judged(job, judge.doubt(job), settings) for job in jobs]
    return tuple(job for job, _ in judged), tuple(f for _, f in judged if f is not None)


def _judged(job: Job, doubt: Doubt | None, settings: Settings) -> tuple[Job, Finding | None]:
    if doubt is None:
        return job, None
    series = job.series
    place = f"sub-{series.subject}" + (f"/ses-{series.session}" if series.session else "")
    about = {"subject": series.subject, "session": series.session, "file": series.images[0]}
    if settings.fit_undetermined and doubt.can_be_fitted:
        message = f"{place} {series.label}: {doubt.reason}; fitted as --fit-undetermined asks."
        return job, Finding("warning", message, **about)
    apart = series.kind == "dwi" and not settings.combine_dwi
    advice = " More runs of a session can be joined with --combine-dwi." * apart
    reason = f"{doubt.reason}.{advice}"
    if doubt.can_be_fitted:
        reason += " --fit-undetermined fits it nonetheless."
    message = f"{place} {series.label} model {job.model} skipped: {reason}"
    finding = Finding("error", message, model=job.model, **about)
    return replace(job, reason=reason, cause="unsuited"), finding


class _Judge:
    """Asks the engine once for each acquisition and model, however many series share them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._series: Series | None = None
        self._acquired: dict[str, Any] = {}
        self._known: dict[tuple[str, str, str], Doubt | None] = {}

    def doubt(self, job: Job) -> Doubt | None:
        """What speaks against a job; None also where its preparation will say what is wrong."""
        if not job.eligible:
            return None
        if self._series is not job.series:  # the jobs of a series come one after the other
            self._series, self._acquired = job.series, {}
            with suppress(EngineError, InputError):
                self._acquired = acquired(job.series, self.settings)
        if not self._acquired:
            return None
        try:
            own = options_of(job.model, self.settings, self._acquired)
            _, scheme, _ = measurements_of(job.model, self.settings, self._acquired)
        except (EngineError, InputError) as error:
            return Doubt(str(error).rstrip("."), can_be_fitted=False)
        key = (job.model, repr(scheme), repr(own))
        if key not in self._known:
            self._known[key] = self._ask(job.model, scheme, own)
        return self._known[key]

    def _ask(self, name: str, scheme: Scheme, own: dict[str, Any]) -> Doubt | None:
        try:
            model = model_class(name, self.settings)(scheme, **own)
            # sums of decays are hard to tell apart by any number of echoes: that is said with the
            # standard deviations to expect, and no reason to refuse the customary protocols
            least = {} if model.kind == "dwi" else {"least_change": adequacy.ROUNDING}
            lost = adequacy.undetermined(model, **least)
        except EngineError as error:
            return Doubt(str(error).rstrip("."), can_be_fitted=False)
        return Doubt(lost, can_be_fitted=True) if lost else None


def protocol_adequacy(
    model: SignalModel, prepared: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    """What the acquisition tells of typical tissue, at the noise of the series.

    Returns
    -------
    dict
        snr (of one image), assumed (whether it is a guess), sentences (on what is not estimable
        well), expected (a row for each tissue and quantity; None where there is no number).
    """
    measured, _, rows = measurements_of(model.name, settings, prepared)
    noise = _noise(model, prepared, measured, rows)
    assumed = noise is None
    sigma = adequacy.assumed_sigma(model) if noise is None else noise
    units, prior = map_units(model), prior_of(model, settings)
    shared = not assumed and "scale_sigma" in measured
    scale = _median(measured["scale_sigma"]) if shared else None
    groups = np.asarray(measured["scale_group"])[rows] if shared else None
    found = adequacy.expected_sd(
        model,
        sigma,
        scale_sigma=scale,
        scale_group=None if groups is None else groups[: model.n_measurements],
        prior=prior,
    )
    found = [_in_map_unit(row, units) for row in found]
    snr = adequacy.image_snr(model, sigma)
    return {
        "snr": float(f"{snr:.3g}"),
        "assumed": assumed,
        "sentences": adequacy.sentences(
            model, found, snr=snr, assumed=assumed, prior=prior is not None
        ),
        "expected": [_plain(vars(row)) for row in found],
    }


def _in_map_unit(row: adequacy.Expectation, units: dict[str, MapUnit]) -> adequacy.Expectation:
    """What is expected of a quantity, in the unit of its map."""
    unit, factor = units[row.parameter]
    if factor == 1:
        return row
    value, sd, posterior = (factor * v for v in (row.value, row.sd, row.posterior_sd))
    return replace(row, unit=unit, value=value, sd=sd, posterior_sd=posterior)


def _noise(
    model: SignalModel, prepared: dict[str, Any], measured: dict[str, Any], rows: Any
) -> np.ndarray | None:
    """Median noise of each measurement over the voxels; None where it is not known.

    It is infinite for measurements that are left out, and relative to the largest signal of
    gradient echoes, which are in a unit of their own.
    """
    if model.kind != "dwi":
        if "noise_level" not in prepared:
            return None
        largest = float(_median(measured["signals"])[rows].max())
        if not largest > 0:
            return None
        return np.full(model.n_measurements, prepared["noise_level"] / largest)
    if not measured["sigma"]:
        return None
    sigma = _median(measured["sigma"])[rows][: model.n_measurements]
    return sigma if (sigma > 0).all() else None


def _median(path: str) -> np.ndarray:
    values = np.load(path, mmap_mode="r")
    values = values[:, :: -(-values.shape[1] // MOST_VOXELS)]
    known = values[:, ~np.isnan(values).any(axis=0)]
    if not known.size:
        return np.full(len(values), np.nan)
    return np.median(known, axis=1).astype(np.float64)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers to four digits, as JSON knows them."""
    return {
        k: v if isinstance(v, str) else float(f"{v:.4g}") if np.isfinite(v) else None
        for k, v in row.items()
    }
