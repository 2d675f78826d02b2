"""What gradient-echo series are fitted to: magnitudes, demodulated complex images, their noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bids_gacelle.bids.series import Series
from bids_gacelle.engine import EngineError, GradientEchoScheme
from bids_gacelle.engine.prepare import Demodulated, demodulate
from bids_gacelle.engine.prepare.echoes import background_sigma, scatter_sigma
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.base import LOGGER
from bids_gacelle.settings import Settings
from bids_gacelle.spatial.masks import air

_ENOUGH_IMAGES = 4  # of which the background tells the noise


def uses_phases(series: Series, settings: Settings) -> bool:
    """Whether complex images can be fitted."""
    return series.second is not None and "phase" not in settings.ignore


def no_phases(settings: Settings) -> str:
    """Why there are no complex images to fit."""
    if "phase" in settings.ignore:
        return "the phase is left out (--ignore phase)"
    return "there is no phase of every image (part-phase, or part-real and part-imag)"


def gradient_echo_scheme(series: Series) -> GradientEchoScheme:
    """The acquisition of a series, an entry for each image.

    Of one echo for each flip angle the echo time is left out: it scales M0 and tells nothing else.
    """
    given = {
        name: list(value.values)
        for name in (
            "echo_time",
            "flip_angle",
            "repetition_time",
            "field_strength",
            "spoiling_increment",
        )
        if (value := getattr(series, name)) is not None
    }
    columns = [given[k] for k in ("flip_angle", "repetition_time") if k in given]
    settings_of_images = set(zip(*columns, strict=True))
    if series.kind == "vfa" and len(settings_of_images) == len(series.images):
        given.pop("echo_time", None)
    return GradientEchoScheme(**given)


def prepare_gradient_echo(
    series: Series, collected: dict[str, Any], mask: np.ndarray, settings: Settings, cwd: Path
) -> dict[str, Any]:
    """Write what models are fitted to, and return where it is.

    ``complex`` is the same for models of complex images, with the field (excitations, voxels) in
    Hz and the initial phase (voxels,) in rad that were taken out; ``complex_error`` says why there
    is none. ``noise_level`` is the standard deviation of one channel where something tells it;
    only the Rician likelihood takes it for ``sigma``, as all others do better with residuals.
    """
    volumes = np.load(collected["volumes"], mmap_mode="r")
    magnitudes = volumes[:, mask]
    scheme = gradient_echo_scheme(series)
    columns = {k: None if v is None else v.tolist() for k, v in scheme.columns().items()}
    about = {"type": "GradientEchoScheme", **columns}
    prepared: dict[str, Any] = {
        "signals": save(cwd / "signals.npy", magnitudes),
        "scheme": about,
        "sigma": "",
        "warnings": [],
    }
    found = None
    if lacking := _lacks_phases(collected, scheme, settings):
        prepared["complex_error"] = lacking
    else:
        phases = np.load(collected["phases"], mmap_mode="r")[:, mask]
        sign = -1j if settings.phase_sign == "negative" else 1j
        try:
            found = demodulate(magnitudes * np.exp(np.complex64(sign) * phases), scheme)
        except EngineError as error:
            raise InputError(str(error)) from error
        prepared["warnings"] = found.warnings
        prepared["phase_unit"] = collected.get("phase_unit", "")
        prepared["complex"] = {
            "signals": save(cwd / "complex_signals.npy", found.signals),
            "field": save(cwd / "field.npy", found.field),
            "phase": save(cwd / "initial_phase.npy", found.phase),
            "scheme": about,
            "sigma": "",
        }
    level, source = _noise_level(volumes, mask, found, scheme)
    if level is not None:
        prepared |= {"noise_level": level, "noise_source": source}
        place = f"sub-{series.subject} {series.label}"
        LOGGER.info("%s: the noise of one channel is %.4g, from %s", place, level, source)
        if settings.noise == "rician":
            sigma = np.broadcast_to(np.float32(level), magnitudes.shape)
            prepared["sigma"] = save(cwd / "sigma.npy", sigma)
    return prepared


def _lacks_phases(
    collected: dict[str, Any], scheme: GradientEchoScheme, settings: Settings
) -> str:
    """Why there are no complex signals, "" if there are."""
    if "phases" not in collected or "phase" in settings.ignore:
        return str(collected.get("phase_error") or no_phases(settings))
    if scheme.echo_time is None:
        return "the flip angles have one echo each, which does not tell field and phase apart"
    return ""


def save(path: Path, array: np.ndarray) -> str:
    """Write an array in single precision; its path."""
    np.save(path, np.ascontiguousarray(array, dtype=np.float32))
    return str(path)


def _noise_level(
    volumes: np.ndarray, mask: np.ndarray, found: Demodulated | None, scheme: GradientEchoScheme
) -> tuple[float | None, str]:
    """The noise of one channel where something tells it, and what does."""
    if found is not None and (level := scatter_sigma(found, scheme)) is not None:
        return level, "the imaginary parts of the demodulated echoes"
    outside = air(np.asarray(volumes[0]), mask)
    some = volumes[:: -(-len(volumes) // _ENOUGH_IMAGES)]
    return background_sigma(some[:, outside]), "the background of the magnitudes"
