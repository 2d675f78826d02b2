"""The engine's models as the other layers need to know them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from bids_gacelle.bids.options import ModelNeeds
from bids_gacelle.engine import EngineError, SignalModel, list_models
from bids_gacelle.engine import get_model as engine_model
from bids_gacelle.engine.device import resolve_devices
from bids_gacelle.engine.solvers import check_solver_options, solver_options
from bids_gacelle.errors import InputError
from bids_gacelle.interfaces.model_files import model_file
from bids_gacelle.interfaces.units import map_unit
from bids_gacelle.settings import Settings

WEIGHTINGS = ("none", "first-echo")
"""How the echoes of gradient-echo data can be weighted."""


@dataclass(frozen=True)
class EchoOptions:
    """What ``--set`` says of the data of a model of gradient echoes, not of model or solver.

    ``weighting`` "first-echo" weighs each image by its magnitude relative to the first echo of
    its flip angle, to the power ``weighting_power``. ``plausibility`` flags (and does not leave
    out) voxels that break a rule; by default where the model names rules.
    """

    weighting: str = "none"
    weighting_power: float = 1.0
    plausibility: bool = False

    @property
    def weighted(self) -> bool:
        """Whether echoes have different weights."""
        return self.weighting == "first-echo"


ECHO_OPTIONS = tuple(f.name for f in fields(EchoOptions))


def get_model(name: str) -> type[SignalModel]:
    """The class of a known model.

    Raises
    ------
    InputError
        An installed package announces it and cannot give it.
    """
    try:
        return engine_model(name)
    except EngineError as error:
        raise InputError(str(error)) from error


def model_class(name: str, settings: Settings) -> type[SignalModel]:
    """The class of a model for a run; with --fit-undetermined it takes any number of measurements.

    Raises
    ------
    InputError
        An installed package announces it and cannot give it.
    """
    model = get_model(name)
    if not settings.fit_undetermined:
        return model
    relaxed = {"minimum_measurements": 1, "minimum_flip_angles": 1}
    return type(model.__name__, (model,), relaxed)


def prior_of(model: SignalModel, settings: Settings) -> str | None:
    """The prior of a fit: the one asked for, or else the one that the model recommends."""
    prior = settings.prior or model.default_prior
    return None if prior == "none" else prior


def select_models(names: Iterable[str], solver: str = "lm") -> tuple[str, ...]:
    """The models to fit: those named, or all that the solver can fit.

    Raises
    ------
    InputError
        A name is not a model, or the linear solver has no closed form for it.
    """
    known = list_models()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise InputError(f"Unknown model '{name}'.{hint} Models: {', '.join(known)}.")
    chosen = tuple(names) or tuple(known)
    if solver != "linear":
        return chosen
    closed = tuple(name for name in chosen if get_model(name).has_closed_form)
    refused = [name for name in names if name not in closed]
    if refused:
        have = ", ".join(name for name in known if get_model(name).has_closed_form)
        raise InputError(f"--solver linear: {refused[0]} has no closed form; {have} has.")
    return closed


def split_options(
    model: str, options: Mapping[str, Any], solver: str = "lm"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the model's constructor, and arguments of `engine.fit`: starts and options.

    Raises
    ------
    InputError
        Neither the model nor the solver has such an option, or not with this value.
    """
    known = get_model(model).options
    tuning = [name for name in ("starts", *solver_options(solver)) if name not in known]
    if get_model(model).kind != "dwi":
        echo_options(model, options)
        tuning += ECHO_OPTIONS
        options = {k: v for k, v in options.items() if k not in ECHO_OPTIONS}
    for name in options:
        if name not in known and name not in tuning:
            have = ", ".join([*known, *tuning])
            raise InputError(
                f"--set {model}.{name}: neither {model} nor the solver {solver} has such an "
                f"option. There are: {have}."
            )
    own = {k: v for k, v in options.items() if k in known}
    rest = {k: v for k, v in options.items() if k not in known}
    try:
        get_model(model).check_options(own)
        check_solver_options(solver, rest)
    except EngineError as error:
        raise InputError(f"--set {model}: {error}") from error
    starts = {"starts": rest.pop("starts")} if "starts" in rest else {}
    return own, starts | ({"options": rest} if rest else {})


def echo_options(model: str, options: Mapping[str, Any]) -> EchoOptions:
    """The options of the data of a model of gradient echoes.

    Raises
    ------
    InputError
        A value is not allowed.
    """
    given = {k: v for k, v in options.items() if k in ECHO_OPTIONS}
    chosen = EchoOptions(**{"plausibility": bool(get_model(model).plausibility), **given})
    power = chosen.weighting_power
    number = isinstance(power, int | float) and not isinstance(power, bool) and power >= 0
    for right, name, wanted in (
        (chosen.weighting in WEIGHTINGS, "weighting", " or ".join(WEIGHTINGS)),
        (number, "weighting_power", "a number of at least 0"),
        (isinstance(chosen.plausibility, bool), "plausibility", "true or false"),
    ):
        if not right:
            value = getattr(chosen, name)
            raise InputError(f"--set {model}.{name}: it can be {wanted}, not {value!r}.")
    return chosen


def check_options(
    models: Iterable[str], options: Mapping[str, Mapping[str, Any]], solver: str = "lm"
) -> None:
    """Refuse ``--set`` for models that are not there or options they do not have."""
    for model, values in options.items():
        select_models([model])
        split_options(model, values, solver)
        if model not in models:
            raise InputError(f"--set {model}: {model} is not among the models to fit.")


def needs_of(name: str, settings: Settings) -> ModelNeeds:
    """What discovery must find for a model."""
    model = model_class(name, settings)
    own, _ = split_options(name, settings.model_options.get(name, {}), settings.solver)
    return ModelNeeds(
        name=name,
        kind=model.kind,
        needs_diffusion_times=model.needs_diffusion_times,
        minimum_measurements=model.minimum_measurements,
        minimum_flip_angles=model.minimum_flip_angles,
        minimum_echo_times=model.minimum_echo_times,
        takes_gradient_deviation="bscale" in model.voxel_inputs,
        columns=model.required,
        voxel_inputs=model.voxel_inputs,
        needed_inputs=model.needed_inputs(own),
        default_spoiling=(model.options | own).get("spoiling_increment"),
    )


def describe_models() -> str:
    """The table that ``--list-models`` prints."""
    lines = []
    for name in list_models():
        model = get_model(name)
        parameters = ", ".join(
            f"{p.name} [{map_unit(p, field_strength=1.0).unit}]"
            for p in (*model.parameters, *model.derived)
        )
        counted = {"megre": "echoes", "vfa": "flip angles", "dwi": "shells"}[model.kind]
        if model.kind == "vfa" and "echo_time" in model.required:
            counted = "images of different flip angle or echo time"
        needs = f"{model.kind}, at least {model.minimum_measurements} {counted}"
        if model.needs_diffusion_times:
            needs += " with known pulse duration and separation"
        if model.minimum_echo_times > 1:
            needs += f", at least {model.minimum_echo_times} echo times"
        known = dict(model.options)
        if model.kind != "dwi":
            known |= vars(echo_options(name, {}))
        options = ", ".join(f"{k}={v}" for k, v in known.items()) or "none"
        given = model_file(name)
        lines += [
            f"{name}: {model.title}" + (f" ({given[0]})" if given else ""),
            f"    needs    {needs}",
            f"    maps     {parameters}",
            f"    options  {options}",
        ]
    return "\n".join(lines)


def resolve_device(device: str) -> str:
    """The device that ``--device`` means on this machine: ``cpu``, ``cuda:N`` or ``cuda:all``.

    Raises
    ------
    InputError
        The device is not there.
    """
    try:
        devices = resolve_devices(device)
        return str(devices[0]) if len(devices) == 1 else device
    except ValueError as error:
        raise InputError(f"--device {device}: {error}") from error
