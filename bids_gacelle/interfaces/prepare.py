"""Node that turns volumes into what the models fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import TraitedSpec, traits

from bids_gacelle.bids.gradients import read_gradients
from bids_gacelle.bids.series import Series, Sourced, series_from_json
from bids_gacelle.engine import (
    DiffusionScheme,
    DwiVolumes,
    EngineError,
    GradientEchoScheme,
    PreparedDwi,
    prepare_dwi,
)
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.base import LOGGER, Step, StepInputSpec
from bids_gacelle.interfaces.collect import reference_image
from bids_gacelle.interfaces.gradient_echo import (
    gradient_echo_scheme,
    no_phases,
    prepare_gradient_echo,
    save,
    uses_phases,
)
from bids_gacelle.interfaces.models import get_model, split_options
from bids_gacelle.interfaces.voxel_maps import voxel_inputs, without_value
from bids_gacelle.settings import Settings
from bids_gacelle.spatial.grids import load_volumes

_OTHER_SCALE = 5.0  # denoising and interpolation alone do not change the noise by more
_ENOUGH_B0 = 4
_LARGE_DEVIATION = 0.5  # gradients of real coils are off by less, inside of a head

COMPLEX, MAGNITUDE = "complex", "magnitude"
"""Values of the option ``signal`` of models of gradient echoes."""

SCHEMES = {"GradientEchoScheme": GradientEchoScheme, "DiffusionScheme": DiffusionScheme}


class _PrepareInputSpec(StepInputSpec):
    collected = traits.Dict(mandatory=True)
    mask = traits.Dict(mandatory=True)
    l_max = traits.Int(0, usedefault=True, desc="highest rotational invariant any model asks for")


class _PrepareOutputSpec(TraitedSpec):
    prepared = traits.Dict(desc="signals, sigma, inputs (npy paths), scheme, warnings")


class PrepareSignals(Step):
    """Signals of the voxels in the mask, the acquisition they belong to, and their noise."""

    input_spec = _PrepareInputSpec
    output_spec = _PrepareOutputSpec

    def work(self, settings: Settings, cwd: Path) -> dict[str, Any]:
        """Gradient echo: the masked volumes. Diffusion: powder averages or invariants."""
        series = series_from_json(self.inputs.series)
        mask = np.load(self.inputs.mask["file"])
        prepared: dict[str, Any] = {"sigma": "", "inputs": {}, "warnings": []}
        if series.kind == "dwi":
            volumes = np.load(self.inputs.collected["volumes"], mmap_mode="r")
            runs = _dwi_volumes(series, volumes[:, mask])
            noise, warnings = _noise(series, runs, mask, settings.b0_threshold)
            deviation = series.gradient_deviation
            tensor = None if deviation is None else gradient_tensor(deviation.image, mask)
            result, problem = self._prepare_dwi(series, runs, noise, tensor, settings)
            prepared |= save_dwi(result, cwd)
            prepared["l_max_error"] = problem
            prepared["directions"] = [np.round(d, 4).tolist() for d in result.directions]
            prepared["warnings"] = [*warnings, *result.warnings]
            prepared["noise_source"] = result.noise_source
            if result.bscale is not None:
                prepared["inputs"]["bscale"] = save(cwd / "bscale.npy", result.bscale)
            if settings.write_scheme and not series.has_diffusion_times:
                prepared["warnings"].append(
                    "no scheme file is written: SmallDelta or BigDelta is unknown"
                )
        else:
            prepared |= prepare_gradient_echo(series, self.inputs.collected, mask, settings, cwd)
        maps = voxel_inputs(series, reference_image(self.inputs.collected))
        inputs = {name: values[mask] for name, values in maps.items()}
        prepared["inputs"] |= {k: save(cwd / f"input_{k}.npy", v) for k, v in inputs.items()}
        prepared["warnings"] += without_value(series, inputs)
        for warning in prepared["warnings"]:
            LOGGER.warning("sub-%s %s: %s", series.subject, series.label, warning)
        return {"prepared": prepared}

    def _prepare_dwi(
        self,
        series: Series,
        runs: list[DwiVolumes],
        noise: list[np.ndarray | None],
        tensor: np.ndarray | None,
        settings: Settings,
    ) -> tuple[PreparedDwi, str]:
        """Prepare up to the highest order asked for, or powder averages alone and why.

        Models that fit powder averages must not suffer from directions too few for others.
        """
        problem = ""
        for l_max in dict.fromkeys((self.inputs.l_max, 0)):
            try:
                result = prepare_dwi(
                    runs,
                    l_max,
                    settings.b0_threshold,
                    noise=noise,
                    noise_model=settings.noise,
                    gradient_tensor=tensor,
                )
                return result, problem
            except EngineError as error:
                problem = problem or str(error)
        raise InputError(problem)


def save_dwi(result: PreparedDwi, cwd: Path) -> dict[str, Any]:
    """Write what models are fitted to, and return where it is.

    ``echo_decay`` is the same for models of the decay with echo time, or ``echo_decay_error`` says
    why there is nothing for them.
    """
    prepared = _save_measurements(result, cwd, "")
    try:
        decay = result.with_echo_decay()
    except EngineError as error:
        return prepared | {"echo_decay_error": str(error)}
    return prepared | {"echo_decay": _save_measurements(decay, cwd, "echo_decay_")}


def _save_measurements(result: PreparedDwi, cwd: Path, prefix: str) -> dict[str, Any]:
    saved: dict[str, Any] = {
        "signals": save(cwd / f"{prefix}signals.npy", result.signals),
        "scheme": scheme_to_json(result.scheme),
        "sigma": "",
        "weights": np.asarray(result.weights).tolist(),
    }
    if result.sigma is not None and result.scale_sigma is not None:
        saved["sigma"] = save(cwd / f"{prefix}sigma.npy", result.sigma)
        saved["scale_sigma"] = save(cwd / f"{prefix}scale_sigma.npy", result.scale_sigma)
        saved["scale_group"] = np.asarray(result.scale_group).tolist()
    return saved


def acquired(series: Series, settings: Settings) -> dict[str, Any]:
    """The acquisitions that `PrepareSignals` will find, from names and text files alone.

    Raises
    ------
    EngineError, InputError
        They cannot be prepared.
    """
    if series.kind != "dwi":
        scheme = {"scheme": scheme_to_json(gradient_echo_scheme(series))}
        if uses_phases(series, settings):
            return scheme | {"complex": scheme}
        return scheme | {"complex_error": no_phases(settings)}
    found = prepare_dwi(_dwi_volumes(series, None), 0, settings.b0_threshold)
    schemes: dict[str, Any] = {"scheme": scheme_to_json(found.scheme)}
    try:
        decay = found.with_echo_decay()
    except EngineError as error:
        return schemes | {"echo_decay_error": str(error)}
    return schemes | {"echo_decay": {"scheme": scheme_to_json(decay.scheme)}}


def measurements_of(
    name: str, settings: Settings, prepared: dict[str, Any]
) -> tuple[dict[str, Any], Any, Any]:
    """The measurements for a model, the acquisition it is made for, and the rows that it has.

    Raises
    ------
    InputError
        The acquisition has none for it.
    """
    own = options_of(name, settings, prepared)
    model = get_model(name)
    if model.wants_echo_decay(own):
        if "echo_decay" not in prepared:
            raise InputError(f"{name}: {prepared['echo_decay_error']}")
        prepared = prepared["echo_decay"]
    parts = 1
    if own.get("signal") == COMPLEX:
        prepared, parts = prepared["complex"], 2
    scheme = scheme_from_json(prepared["scheme"])
    wanted = model.wanted(scheme, own)
    if wanted is None:
        return prepared, scheme, slice(None)
    rows = np.flatnonzero(wanted)
    places = np.concatenate([rows + part * len(scheme) for part in range(parts)])
    return prepared, scheme.take(rows), places


def options_of(name: str, settings: Settings, prepared: dict[str, Any]) -> dict[str, Any]:
    """The options that a model is made with: those asked for, and the signal that there is.

    A model of complex signals is fitted to magnitudes where there are no phases.

    Raises
    ------
    InputError
        Complex signals were asked for, and there are none.
    """
    own, _ = split_options(name, settings.model_options.get(name, {}), settings.solver)
    model = get_model(name)
    if COMPLEX not in model.choices.get("signal", ()):
        return own
    chosen = own.get("signal", model.options["signal"])
    if chosen == COMPLEX and "complex" not in prepared:
        if "signal" in own:
            raise InputError(
                f"{name}: signal=complex was asked for, but {prepared['complex_error']}"
            )
        chosen = MAGNITUDE
    return own | {"signal": chosen}


def fallback(name: str, settings: Settings, prepared: dict[str, Any]) -> str:
    """What to say where a model of complex signals is fitted to magnitudes, else ""."""
    model = get_model(name)
    if COMPLEX not in model.choices.get("signal", ()):
        return ""
    asked, _ = split_options(name, settings.model_options.get(name, {}), settings.solver)
    wished = asked.get("signal", model.options["signal"])
    if options_of(name, settings, prepared)["signal"] == wished:
        return ""
    return (
        f"{name} is fitted to the magnitudes, which tell less of it: {prepared['complex_error']}"
    )


def scheme_to_json(scheme: GradientEchoScheme | DiffusionScheme) -> dict[str, Any]:
    """An acquisition scheme as JSON data, with the name of its class."""
    fields = {
        k: None if v is None else np.asarray(v).tolist() for k, v in scheme.columns().items()
    }
    return {"type": type(scheme).__name__, **fields}


def scheme_from_json(data: dict[str, Any]) -> GradientEchoScheme | DiffusionScheme:
    """Inverse of `scheme_to_json`."""
    fields = dict(data)
    return SCHEMES[fields.pop("type")](**fields)


def _dwi_volumes(series: Series, signals: np.ndarray | None) -> list[DwiVolumes]:
    """The runs of a series, with the signals (volumes, voxels) of all or of no voxel."""
    runs, start = [], 0
    for run in series.dwi_runs:
        bval, bvec = read_gradients(run.bval, run.bvec)
        timing = {
            name: _per_volume(getattr(run, name), len(bval))
            for name in ("big_delta", "small_delta", "echo_time")
        }
        stop = start + len(bval)
        own = np.empty((len(bval), 0), np.float32) if signals is None else signals[start:stop]
        runs.append(DwiVolumes(own, bval, bvec, **timing))
        start = stop
    return runs


def _per_volume(value: Sourced | None, n: int) -> np.ndarray | None:
    return None if value is None else np.broadcast_to(np.asarray(value.values, float), n)


def _noise(
    series: Series, runs: list[DwiVolumes], mask: np.ndarray, b0_threshold: float
) -> tuple[list[np.ndarray | None], list[str]]:
    """Noise maps of the runs inside the mask (None: there is none), and doubts about them."""
    levels: list[np.ndarray | None] = []
    warnings = []
    for run, volumes in zip(series.dwi_runs, runs, strict=True):
        if run.noise_map is None:
            levels.append(None)
            continue
        [(_, data)] = load_volumes([run.noise_map.image])
        level = data.reshape(data.shape[:3])[mask]
        if not (np.isfinite(level) & (level > 0)).any():
            raise InputError(
                f"The noise map {run.noise_map.image} has no positive value in any voxel of the "
                "mask; give another with --noise-map, or pass --ignore noise."
            )
        levels.append(level)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = level / _spread(volumes, b0_threshold)
        compared = ratio[np.isfinite(ratio) & (ratio > 0)]
        usual = np.median(compared) if compared.size else 1.0
        if not 1 / _OTHER_SCALE < usual < _OTHER_SCALE:
            warnings.append(
                f"the noise map {Path(run.noise_map.image).name} is {usual:.2g} times the spread "
                "of the b=0 images (median): it seems to be of images in another unit, such as "
                "before their intensities were scaled. --ignore noise estimates the noise instead"
            )
    return levels, warnings


def _spread(run: DwiVolumes, b0_threshold: float) -> np.ndarray:
    """Standard deviation over the b=0 images of one echo time, NaN where they are too few."""
    low = run.bval <= b0_threshold
    if run.echo_time is not None:
        low &= np.isclose(run.echo_time, run.echo_time[low][0], rtol=0, atol=1e-4)
    if low.sum() < _ENOUGH_B0:
        return np.full(run.signal.shape[1], np.nan)
    return run.signal[low].astype(np.float64).std(axis=0, ddof=1)


def gradient_tensor(path: str, mask: np.ndarray) -> np.ndarray:
    """Deviation L of the diffusion gradients: a voxel sees (I + L) g where g is nominal.

    The nine volumes are the columns of L one after the other, as in HCP's ``grad_dev.nii.gz``
    (Sotiropoulos et al. 2013, doi:10.1016/j.neuroimage.2013.05.057: the x, y and z component of
    the field of the x gradient, then of y, of z) and as FSL reads it. QSIPrep's ``graddev`` has
    the rows of I + L; what is near the identity is taken to be that.

    Parameters
    ----------
    path : 4D image.
    mask : (x, y, z)

    Returns
    -------
    (voxels, 3, 3), NaN where the map has no value.

    Raises
    ------
    InputError
        The values are no such fractions.
    """
    [(_, data)] = load_volumes([path])
    tensor = data[mask].reshape(-1, 3, 3).astype(np.float64)
    usual = np.nanmedian(tensor, axis=0)
    identity = np.eye(3)
    if np.abs(usual - identity).max() < _LARGE_DEVIATION:
        return np.asarray(tensor - identity)
    size = np.nanmedian(np.abs(tensor).max(axis=(1, 2)))
    if not size < _LARGE_DEVIATION:  # NaN too
        raise InputError(
            f"The gradient deviations of {path} are {size:.3g} (median of the largest of each "
            "voxel), where fractions of the nominal gradient are needed. If they are percent, "
            "divide them by 100."
        )
    return tensor.transpose(0, 2, 1)
