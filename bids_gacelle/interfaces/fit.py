"""Node that fits one model to the signals of one series."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nipype.interfaces.base import TraitedSpec, traits

from bids_gacelle.bids.series import series_from_json
from bids_gacelle.engine import (
    EngineError,
    FitInterrupted,
    FitResult,
    GradientEchoScheme,
    Progress,
    fit,
)
from bids_gacelle.engine.prepare.echoes import RULES, first_echo_weights, implausible
from bids_gacelle.engine.result import FLAG_IMPLAUSIBLE
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.adequacy import protocol_adequacy
from bids_gacelle.interfaces.base import LOGGER, Step, StepInputSpec
from bids_gacelle.interfaces.models import echo_options, model_class, prior_of, split_options
from bids_gacelle.interfaces.plots import example_voxels, plot_axes
from bids_gacelle.interfaces.prepare import fallback, measurements_of, options_of
from bids_gacelle.settings import Settings

PILOT_VOXELS = 1024
"""Voxels timed beforehand to say how long the fit will take."""

SECONDS_BETWEEN_LINES = 5.0

SIGN_VOXELS = 200
"""Voxels that are fitted with the phase of the other sign, too, to notice a wrong one."""

# Residuals of the right sign are below this share of those of the wrong one.
_CLEARLY_LESS = 0.8
# Median frequencies of myelin water (ppm) of the two signs differ by more, if phases tell it.
_CLEARLY_HIGHER = 0.015


class _FitInputSpec(StepInputSpec):
    model = traits.Str(mandatory=True)
    mask = traits.Dict(mandatory=True)
    prepared = traits.Dict(mandatory=True)
    use_gpu = traits.Bool(False, usedefault=True, desc="tells Nipype that this node takes a GPU")


class _FitOutputSpec(TraitedSpec):
    fitted = traits.Dict(desc="file (npz), settings, examples, plot")


class FittedInputSpec(StepInputSpec):
    """Inputs of the nodes that come after a fit."""

    model = traits.Str(mandatory=True)
    collected = traits.Dict(mandatory=True)
    mask = traits.Dict(mandatory=True)
    prepared = traits.Dict(mandatory=True)
    fitted = traits.Dict(mandatory=True)


class FitModel(Step):
    """Call the engine on one model and keep its maps as arrays over the voxels of the mask."""

    input_spec = _FitInputSpec
    output_spec = _FitOutputSpec

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Fit, and pick the example voxels of the report."""
        torch.set_num_threads(settings.omp_nthreads)
        name, prepared = self.inputs.model, self.inputs.prepared
        series = series_from_json(self.inputs.series)
        title = f"sub-{series.subject} {series.label} {name}".replace("  ", " ")
        try:
            model, data = build_model(name, settings, prepared)
            if said := fallback(name, settings, prepared):
                LOGGER.warning("%s: %s", title, said)
            if settings.noise == "rician" and _is_complex(model):
                LOGGER.info("%s: complex signals have Gaussian noise.", title)
            call = _fit_call(model, settings, prepared)
            suited = protocol_adequacy(model, prepared, settings)
            for sentence in suited["sentences"]:
                LOGGER.warning("%s: %s", title.removesuffix(f" {name}"), sentence)
            _announce(title, call, data)
            result = call(data, slice(None), _progress(title))
            if doubt := _doubt_of_sign(model, call, data, result, settings):
                LOGGER.warning("%s: %s", title, doubt)
                result.settings["sign_doubt"] = doubt
        except EngineError as error:
            raise InputError(str(error)) from error
        except FitInterrupted:  # an unfinished fit is no fit: the run ends
            raise KeyboardInterrupt from None
        if self.inputs.use_gpu:
            result.settings["peak_vram_gb"] = torch.cuda.max_memory_allocated() / 1e9
        result.settings["adequacy"] = suited
        _log_outcome(title, result)
        flags, broken = _flag_implausible(model, settings, prepared, result.flags)
        for rule, share in broken.items():
            LOGGER.info("%s: %.1f %% of the voxels are flagged for %s", title, 100 * share, rule)
        result.settings["echoes"] = _echo_settings(model, settings, broken)
        arrays: dict[str, Any] = {"flags": flags, "nrmse": result.nrmse}
        if result.chi2 is not None:
            arrays["chi2"] = result.chi2
        arrays |= {f"map_{k}": v for k, v in result.maps.items()}
        arrays |= {f"std_{k}": v for k, v in result.std.items()}
        np.savez(cwd / "fit.npz", **arrays)
        inputs = {k: np.load(v) for k, v in prepared["inputs"].items()}
        mask = np.load(self.inputs.mask["file"])
        return {
            "fitted": {
                "file": str(cwd / "fit.npz"),
                "settings": result.settings,
                "phase_unit": prepared.get("phase_unit", ""),
                "plot": plot_axes(model),
                "examples": example_voxels(model, data, inputs, result, mask),
            }
        }


def build_model(name: str, settings: Settings, prepared: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """The model for the prepared scheme, and the rows of the signals that it describes."""
    measured, scheme, rows = measurements_of(name, settings, prepared)
    model = model_class(name, settings)(scheme, **options_of(name, settings, prepared))
    # Invariants follow each other by order, so a model of a lower l_max takes the first ones.
    signals = np.load(measured["signals"], mmap_mode="r")[rows]
    if model.n_measurements > len(signals):
        raise InputError(f"{name}: {prepared['l_max_error']}")
    return model, signals[: model.n_measurements]


def load_fit(fitted: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of a fit over the voxels of the mask.

    ``map_*``, ``std_*``, ``flags``, ``nrmse``, and ``chi2`` where the noise level was known.
    """
    with np.load(fitted["file"]) as arrays:
        return dict(arrays)


def _fit_call(
    model: Any, settings: Settings, prepared: dict[str, Any]
) -> Callable[..., FitResult]:
    given = settings.model_options.get(model.name, {})
    _, options = split_options(model.name, given, settings.solver)
    inputs = {k: np.load(v) for k, v in prepared["inputs"].items() if k in model.voxel_inputs}
    measured, _, rows = measurements_of(model.name, settings, prepared)
    sigma = np.load(measured["sigma"], mmap_mode="r")[rows] if measured["sigma"] else None
    scale = np.load(measured["scale_sigma"], mmap_mode="r") if "scale_sigma" in measured else None
    group = None if scale is None else np.asarray(measured["scale_group"])[rows]
    weights = None
    if sigma is None and "weights" in measured:  # sigma tells all that they do
        weights = np.asarray(measured["weights"])[rows][: model.n_measurements]
        weights = None if np.ptp(weights) == 0 else weights
    elif (weighted := echo_weights(model, settings, prepared)) is not None:
        weights = weighted
    noise = "gaussian" if _is_complex(model) else settings.noise

    def call(
        data: np.ndarray, voxels: slice, progress: Any, *, conjugate: bool = False
    ) -> FitResult:
        chosen = data[:, voxels]
        if conjugate:
            real, imaginary = np.split(chosen, 2)
            chosen = np.concatenate((real, -imaginary))
        return fit(
            model,
            chosen,
            sigma=None if sigma is None else sigma[: len(data), voxels],
            scale_sigma=None if scale is None else scale[:, voxels],
            scale_group=None if group is None else group[: len(data)],
            weights=weights if weights is None or weights.ndim == 1 else weights[:, voxels],
            inputs={k: v[voxels] for k, v in inputs.items()},
            solver=settings.solver,
            noise=noise,
            loss=settings.loss,
            prior=prior_of(model, settings),
            device=settings.device,
            precision=settings.precision,
            seed=settings.random_seed,
            progress=progress,
            **options,
        )

    return call


def _doubt_of_sign(
    model: Any,
    call: Callable[..., FitResult],
    data: np.ndarray,
    result: FitResult,
    settings: Settings,
) -> str:
    """Say if the phase probably has the other sign; "" if not.

    One sign only suits the phases of steady states, and puts myelin water at a higher frequency
    than the water outside, except where fibres run along the field.
    """
    if not _is_complex(model) or "freqMW" not in {p.name for p in type(model).parameters}:
        return ""
    option = "--phase-sign " + ("negative" if settings.phase_sign == "positive" else "positive")
    n = data.shape[1]
    voxels = slice(0, n, max(1, n // SIGN_VOXELS))
    with _quiet_engine():
        other = call(data, voxels, None, conjugate=True)
    ours, theirs = result.nrmse[voxels], other.nrmse
    known = np.isfinite(ours) & np.isfinite(theirs)
    if known.any() and np.median(theirs[known]) < _CLEARLY_LESS * np.median(ours[known]):
        return (
            f"the residuals would be {np.median(theirs[known] / ours[known]):.2f} times as large "
            f"with {option}: the sign of the phase is probably wrong, and so are these maps"
        )
    if "freqMW" not in result.maps or not known.any():
        return ""
    shift, opposite = (float(np.nanmedian(r.maps["freqMW"])) for r in (result, other))
    if opposite - shift > _CLEARLY_HIGHER:
        return (
            f"the median frequency of myelin water is {shift:.3f} ppm, with {option} it would be "
            f"{opposite:.3f} ppm, and it should be positive: the sign of the phase is probably "
            "wrong, and so are these maps"
        )
    return ""


def _is_complex(model: Any) -> bool:
    """Whether real and imaginary parts of gradient echoes are fitted."""
    return bool(model.kind != "dwi" and model.n_measurements > len(model.scheme))


def echo_weights(model: Any, settings: Settings, prepared: dict[str, Any]) -> np.ndarray | None:
    """Weights (measurements, voxels) of gradient echoes where they are asked for."""
    if model.kind == "dwi":
        return None
    asked = echo_options(model.name, settings.model_options.get(model.name, {}))
    if not asked.weighted:
        return None
    magnitudes, scheme = _magnitudes(model, settings, prepared)
    weights = first_echo_weights(magnitudes, scheme, float(asked.weighting_power))
    return np.tile(weights, (model.n_measurements // len(scheme), 1))


def _magnitudes(
    model: Any, settings: Settings, prepared: dict[str, Any]
) -> tuple[np.ndarray, GradientEchoScheme]:
    """Magnitudes of the images that a model of gradient echoes is fitted to."""
    _, scheme, rows = measurements_of(model.name, settings, prepared)
    assert isinstance(scheme, GradientEchoScheme)
    if not isinstance(rows, slice):
        rows = rows[: len(scheme)]
    return np.load(prepared["signals"], mmap_mode="r")[rows], scheme


def _flag_implausible(
    model: Any, settings: Settings, prepared: dict[str, Any], flags: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """The flags with those of voxels that break a rule, and the share of voxels by rule."""
    if model.kind == "dwi":
        return flags, {}
    if not echo_options(model.name, settings.model_options.get(model.name, {})).plausibility:
        return flags, {}
    magnitudes, scheme = _magnitudes(model, settings, prepared)
    b1 = prepared["inputs"].get("b1")
    rules = model.plausibility or tuple(RULES)
    broken = implausible(magnitudes, scheme, rules, None if b1 is None else np.load(b1))
    for voxels in broken.values():
        flags = flags | (voxels * np.uint8(FLAG_IMPLAUSIBLE)).astype(flags.dtype)
    return flags, {RULES[rule]: float(voxels.mean()) for rule, voxels in broken.items()}


def _echo_settings(model: Any, settings: Settings, broken: dict[str, float]) -> dict[str, Any]:
    """How the echoes were weighted and judged, for the sidecars."""
    if model.kind == "dwi":
        return {}
    asked = echo_options(model.name, settings.model_options.get(model.name, {}))
    found: dict[str, Any] = {}
    if asked.weighted:
        found["weighting"] = f"(S(TE) / S(TE1))^{asked.weighting_power:g} of each flip angle"
    if broken:
        found["implausible"] = {rule: float(f"{share:.4g}") for rule, share in broken.items()}
    return found


def _announce(title: str, call: Callable[..., FitResult], data: np.ndarray) -> None:
    """Say how long a large fit will take, from a small pilot fit; the engine says the memory."""
    n = data.shape[1]
    if n < 20 * PILOT_VOXELS:
        return
    voxels = slice(0, n, n // PILOT_VOXELS)
    with _quiet_engine():
        call(data, voxels, None)  # warms up
        start = time.perf_counter()
        call(data, voxels, None)
    seconds = (time.perf_counter() - start) * n / len(range(*voxels.indices(n)))
    LOGGER.info(
        "%s: %s voxels, about %s.",
        title,
        f"{n:,}",
        f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min",
    )


@contextmanager
def _quiet_engine() -> Iterator[None]:
    """Keep what the engine says of small fits out of the log."""
    logger = logging.getLogger("bids_gacelle.engine")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _progress(title: str) -> Callable[[Progress], None]:
    """A bar on a terminal, else a line for every 10 %, some seconds apart at least."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(desc=title, unit="voxel", unit_scale=True, leave=False)

        def draw(progress: Progress) -> None:
            bar.total = progress.total
            bar.set_postfix_str(_converged(progress), refresh=False)
            bar.update(progress.done - bar.n)
            if progress.done >= progress.total:
                bar.close()

        return draw
    reported, said = 0, time.monotonic()

    def line(progress: Progress) -> None:
        nonlocal reported, said
        tenth = math.floor(10 * progress.done / max(progress.total, 1))
        if tenth > reported and time.monotonic() - said > SECONDS_BETWEEN_LINES:
            reported, said = tenth, time.monotonic()
            parts = [
                f"{10 * tenth} % of {progress.total:,} voxels",
                f"{progress.voxels_per_second:,.0f} voxels/s",
                _converged(progress),
            ]
            LOGGER.info("%s: %s", title, ", ".join(filter(None, parts)))

    return line


def _converged(progress: Progress) -> str:
    if math.isnan(progress.converged):
        return ""
    return f"{100 * progress.converged:.0f} % converged"


def _log_outcome(title: str, result: FitResult) -> None:
    done = result.settings
    LOGGER.info(
        "%s: %s voxels in %.1f s on %s",
        title,
        f"{done['n_voxels']:,}",
        done["seconds"],
        done["device"],
    )
    for parameter, share in done["at_bound"].items():
        if share > 0.2:
            LOGGER.warning(
                "%s: %s is at a bound in %.0f %% of the voxels, where it has no uncertainty.",
                title,
                parameter,
                100 * share,
            )
