"""What a model that somebody else wrote is checked for before anything is fitted."""

from __future__ import annotations

import itertools
import re
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Parameter, SignalModel
from bids_gacelle.engine.scheme import DiffusionScheme, GradientEchoScheme, Scheme

KINDS = {"megre": "anat", "vfa": "anat", "dwi": "dwi"}
"""Kinds of data, and the datatype that maps made from them have."""

_TRIED = 6
_AGREE = 1e-3


def check_model(model: Any) -> None:
    """Check a model object that is about to be fitted, once, unless the class is one of ours.

    Raises
    ------
    EngineError
        It is no model, or `check_declaration` or `check_signal` refuse it.
    """
    if not isinstance(model, SignalModel):
        raise EngineError(
            f"The model must be an object of a SignalModel class, got {model!r:.60}. A class is "
            "called with the acquisition first: fit(get_model('r2star')(scheme), data)."
        )
    own = str(type(model).__module__).startswith(f"{__package__}.")
    if not own and "checked" not in model.kept:
        check_declaration(model)
        with torch.no_grad():
            check_signal(model)
        model.kept["checked"] = True


def check_declaration(cls: type[SignalModel] | SignalModel) -> None:
    """Check the attributes of a model class, or those of an object where these differ.

    Raises
    ------
    EngineError
        Something is missing or cannot be; one sentence says what.
    """
    for attribute in ("name", "title", "description", "kind", "datatype", "parameters"):
        if not hasattr(cls, attribute):
            of = cls if isinstance(cls, type) else type(cls)
            raise EngineError(f"The model class {of.__name__} lacks {attribute!r}.")
    name = cls.name
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z][A-Za-z0-9]*", name):
        raise EngineError(
            f"The model name {name!r} cannot stand in file names; use letters and digits only, "
            "the first a letter."
        )
    if cls.kind not in KINDS:
        raise EngineError(f"The kind of {name} is {cls.kind!r}; it can be {', '.join(KINDS)}.")
    if cls.datatype != KINDS[cls.kind]:
        raise EngineError(
            f"The datatype of {name} is {cls.datatype!r}; maps from {cls.kind} data are "
            f"{KINDS[cls.kind]!r}."
        )
    columns = (DiffusionScheme if cls.kind == "dwi" else GradientEchoScheme)._names
    for column in cls.required:
        if column not in columns:
            raise EngineError(
                f"{name} requires {column!r}, which {cls.kind} data do not have; they have "
                f"{', '.join(columns)}."
            )
    _check_parameters(cls)
    least = cls.minimum_measurements
    if isinstance(least, bool) or not isinstance(least, Integral) or least < 1:
        raise EngineError(
            f"minimum_measurements of {name} is {least!r}; give a whole number of at least 1."
        )


def _check_parameters(cls: type[SignalModel] | SignalModel) -> None:
    given: Any = cls.parameters
    everything = (*given, *cls.derived) if isinstance(given, tuple) else ()
    if not everything or not all(isinstance(p, Parameter) for p in everything):
        raise EngineError(
            f"The parameters of {cls.name} must be a tuple of Parameter(...), got {given!r}."
        )
    names = [p.name for p in everything]
    # maps are named in lower case
    twice = [n for i, n in enumerate(names) if n.lower() in [m.lower() for m in names[:i]]]
    if twice:
        raise EngineError(f"{cls.name} has two parameters named {twice[0]!r} (case aside).")
    shaping = [p for p in given if not p.amplitude]
    if not shaping or len(given) - len(shaping) > 1:
        raise EngineError(
            f"{cls.name} must have at most one amplitude and at least one other parameter."
        )
    for parameter in shaping:
        _check_range(cls.name, parameter)
    unknown = [name for name in cls.linear if name not in [p.name for p in given]]
    if unknown:
        raise EngineError(f"{cls.name} has no parameter {unknown[0]!r}, which it calls linear.")


def _check_range(model: str, parameter: Parameter) -> None:
    where = f"The parameter {parameter.name} of {model}"
    try:
        low, high = (float(v) for v in parameter.bounds)
        first, last = (float(v) for v in parameter.start or parameter.bounds)
    except (TypeError, ValueError) as error:
        raise EngineError(
            f"{where} has bounds {parameter.bounds!r} and start {parameter.start!r}; "
            "each must be a pair of numbers (low, high)."
        ) from error
    if not low < high:
        raise EngineError(f"{where} has bounds ({low:g}, {high:g}); the first must be lower.")
    if not np.isfinite([first, last]).all():
        raise EngineError(f"{where} needs a start box or finite bounds to start from.")
    if not low <= first < last <= high:
        raise EngineError(
            f"{where} starts in ({first:g}, {last:g}), which is no box inside its bounds "
            f"({low:g}, {high:g})."
        )
    if parameter.coordinate not in ("linear", "log"):
        raise EngineError(f"{where} has coordinate {parameter.coordinate!r}; linear or log.")
    if parameter.coordinate == "log" and low <= 0:
        raise EngineError(f"{where} is fitted as a logarithm; give a lower bound above 0.")


def probe_scheme(cls: type[SignalModel]) -> Scheme:
    """Return a plausible acquisition with every column, to try a model on before there are data.

    Its values differ from each other and are as many as the model needs, 8 at least.
    """
    n = max(8, int(cls.minimum_measurements))
    ramp = np.arange(1, n + 1) / n
    if cls.kind == "dwi":
        scheme = DiffusionScheme(
            b=5 * ramp,
            big_delta=20 + 20 * ramp,
            small_delta=10.0,
            echo_time=0.08 + 0.04 * ramp if cls.minimum_echo_times > 1 else 0.08,
            n_directions=30.0,
        )
        wanted = cls.wanted(scheme, {})
        return scheme if wanted is None else scheme.take(wanted)
    return GradientEchoScheme(
        echo_time=0.04 * ramp,
        flip_angle=30 * ramp,
        repetition_time=0.03 + 0.01 * ramp,
        field_strength=3.0,
        spoiling_increment=50.0,
    )


def check_signal(model: SignalModel) -> None:
    """Try a model at a few points of its start boxes.

    A signal must have the shape, precision and device of its parameters, be finite, change nothing
    that it is given, treat voxels independently, scale with the amplitude, and have the derivative
    that the solvers are given.

    Raises
    ------
    EngineError
        It does not, or the code fails; one sentence says how.
    """
    params = _draw(model)
    signal = _call(model, params)
    shape = (model.n_measurements, *next(iter(params.values())).shape)
    if not isinstance(signal, Tensor):
        raise EngineError(
            f"The signal of {model.name} is of type {type(signal).__name__}; return a tensor, "
            "made with functions of torch."
        )
    if signal.shape != shape:
        raise EngineError(
            f"The signal of {model.name} has shape {tuple(signal.shape)} for parameters of shape "
            f"{shape[1:]}; it must be (measurements, ...), here {shape}."
        )
    if signal.is_complex():
        raise EngineError(f"The signal of {model.name} is complex; it must be real.")
    bad = ~signal.isfinite()
    if bad.any():
        m, *voxel = bad.nonzero()[0].tolist()
        at = ", ".join(f"{k} = {float(v[tuple(voxel)]):.4g}" for k, v in params.items())
        raise EngineError(
            f"The signal of {model.name} is {float(signal[(m, *voxel)])} at measurement {m + 1} "
            f"for {at}; it must be finite within the start boxes."
        )
    single = _call(model, {k: v.float() for k, v in params.items()})
    if signal.dtype != torch.float64 or single.dtype != torch.float32:
        raise EngineError(
            f"The signal of {model.name} does not keep the precision of its parameters "
            f"(torch.float32 became {single.dtype}); make constants with "
            "dtype=... of a parameter."
        )
    _check_purity(model, params, signal)
    _check_derivative(model, params)
    derived = model.derive(params)
    for name in model.derived_names:
        if name not in derived:
            raise EngineError(
                f"{model.name} has the derived quantity {name!r}, which its derive "
                "does not return."
            )


def _draw(model: SignalModel) -> dict[str, Tensor]:
    """Return parameters of shape (2, 3) inside the start boxes, no two alike."""
    engine = torch.quasirandom.SobolEngine(len(model.parameters), scramble=True, seed=0)
    unit = engine.draw(_TRIED, dtype=torch.float64).T.reshape(-1, 2, _TRIED // 2)
    params = {}
    for parameter, u in zip(model.parameters, unit, strict=True):
        low, high = (0.5, 2.0) if parameter.amplitude else parameter.start or parameter.bounds
        params[parameter.name] = low + (high - low) * (0.02 + 0.96 * u)
    return params


def _call(model: SignalModel, params: dict[str, Tensor], *, derive: bool = False) -> Any:
    """Call the signal or the Jacobian; what goes wrong inside becomes a sentence."""
    try:
        return model.jacobian(params, None) if derive else model.signal(params, None)
    except EngineError:
        raise
    except Exception as error:
        what = "derivatives" if derive else "signal"
        if isinstance(error, KeyError):
            reason = f"it has no {error}; its parameters are {', '.join(model.parameter_names)}"
        else:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        advice = " Use functions of torch only, not numpy." if derive else ""
        raise EngineError(
            f"The {what} of {model.name} cannot be computed: {reason}.{advice} The parameters had "
            f"the shape {tuple(next(iter(params.values())).shape)}."
        ) from error


def _check_purity(model: SignalModel, params: dict[str, Tensor], signal: Tensor) -> None:
    """Refuse a signal that changes what it is given, or mixes voxels, or is random."""
    if any(not torch.equal(params[k], v) for k, v in _draw(model).items()):
        raise EngineError(
            f"The signal of {model.name} changes its parameters in place; write x = x * 2 instead "
            "of x *= 2."
        )
    for i, j in itertools.product(*map(range, signal.shape[1:])):
        alone = _call(model, {k: v[i : i + 1, j] for k, v in params.items()})
        expected = signal[:, i : i + 1, j]
        if not (alone.shape == expected.shape and torch.allclose(alone, expected, rtol=1e-6)):
            raise EngineError(
                f"The signal of {model.name} is another one when a voxel comes alone; it must "
                "depend on this voxel's parameters only, not be random, and change nothing in "
                "place."
            )
    for parameter in model.parameters:
        if parameter.amplitude:
            name = parameter.name
            twice = _call(model, {**params, name: 2 * params[name]})
            if not torch.allclose(twice, 2 * signal, rtol=1e-6):
                raise EngineError(
                    f"{name} of {model.name} is declared as amplitude, but the signal does not "
                    f"double when it does."
                )


def _check_derivative(model: SignalModel, params: dict[str, Tensor]) -> None:
    """Hold the Jacobian against differences; numpy or detach() inside would make it 0 unseen."""
    _, jacobian = _call(model, params, derive=True)
    for parameter, column in zip(model.parameters, jacobian, strict=True):
        name, value = parameter.name, params[parameter.name]
        step = 1e-5 * value.abs().clamp_min(1e-3)
        up, down = (_call(model, {**params, name: value + s * step}) for s in (1, -1))
        slope = (up - down) / (2 * step)
        limit = _AGREE * max(float(slope.abs().max()), float(column.abs().max())) + 1e-6
        if not bool(((column - slope).abs() <= limit).all()):
            raise EngineError(
                f"The derivative of {model.name} by {name} is not that of its signal; use "
                "functions of torch only (no numpy, no .item(), no .detach())."
            )
