"""A signal model from a plain function of parameters and acquisition."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import Inputs, Parameter, Reference, SignalModel
from bids_gacelle.engine.models.checks import (
    KINDS,
    check_declaration,
    check_model,
    probe_scheme,
)
from bids_gacelle.engine.scheme import Scheme

SignalFunction = Callable[..., Tensor]


class Acquisition:
    """The columns of a scheme as tensors that broadcast against the parameters.

    Each has shape (measurements, 1, ...) with a 1 for every axis of the parameters, in their
    precision and on their device; a column that was not given is None.
    """

    def __init__(self, columns: Mapping[str, Tensor | None], touched: list[str] | None) -> None:
        self._columns = columns
        self._touched = touched

    def __getattr__(self, name: str) -> Tensor | None:
        """Return a column by its name."""
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._columns:
            known = ", ".join(self._columns)
            raise EngineError(f"The acquisition has no column {name!r}; it has {known}.")
        if self._touched is not None and name not in self._touched:
            self._touched.append(name)
        return self._columns[name]


class FunctionModel(SignalModel):
    """What `signal_model` makes of a function; see there."""

    function: ClassVar[SignalFunction]

    def __init__(self, scheme: Scheme, **options: Any) -> None:
        super().__init__(scheme, **options)
        self._given = {name: column is not None for name, column in scheme.columns().items()}
        self._touched: list[str] | None = []
        check_model(self)
        self.touched, self._touched = tuple(self._touched), None

    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Call the function; shapes as in `SignalModel.signal`."""
        like = params[self.parameters[0].name]
        # A compiler cannot take in an array once differentiation has begun: nothing here may look
        # at one whose table is there already.
        columns = {
            name: self.table(name, getattr(self.scheme, name), like) if given else None
            for name, given in self._given.items()
        }
        arguments: list[Any] = [dict(params), Acquisition(columns, self._touched)]
        if self.voxel_inputs:
            arguments.append({k: self.voxel_input(k, inputs, like) for k in self.voxel_inputs})
        return type(self).function(*arguments, **self.chosen)


def signal_model(
    *,
    kind: Literal["megre", "vfa", "dwi"],
    parameters: Sequence[Parameter],
    name: str | None = None,
    title: str | None = None,
    description: str | None = None,
    references: Sequence[Reference] = (),
    minimum_measurements: int | None = None,
    required: Sequence[str] | None = None,
    inputs: Mapping[str, float] | None = None,
    starts: int = 1,
    signed: bool = False,
) -> Callable[[SignalFunction], type[SignalModel]]:
    """Make a `SignalModel` class of the function below this line.

    The function is called as ``function(params, scheme)`` and returns the signal, of shape
    (measurements, ...). ``params`` holds one tensor of shape (...) for each parameter, by name;
    ``scheme`` has the columns of the acquisition (``scheme.b``, ``scheme.echo_time``, ...) as
    tensors of shape (measurements, 1, ...), so that a formula can be written as on paper. It must
    use functions of torch, and may be called with any shape, precision and device. Keyword-only
    arguments become options of the model: ``def model(params, scheme, *, order=2)``.

    Parameters
    ----------
    kind
        Which data: echoes ("megre"), flip angles ("vfa") or shells ("dwi", relative to b = 0).
    parameters
        What is fitted, in order.
    name
        The function's name without underscores when left out.
    title, description, references
        For the report; left out, title and description are the first line and the rest of the
        docstring.
    minimum_measurements
        Fewest echoes, flip angles or shells; as many as there are parameters when left out.
    required
        Columns the acquisition must have; when left out, those that the function is seen to use
        on an acquisition of 8 measurements that has all.
    inputs
        Maps the signal depends on, such as {"b1": 1.0}, with their value where there is no map.
        The function then gets a third argument, tensors of shape (...) by name.
    starts
        Starts per voxel; 1 where the optimum is unique.
    signed
        True when data of either sign are meant.

    Returns
    -------
    A decorator from the function to the class.

    Raises
    ------
    EngineError
        A declaration cannot be, or the function gives no valid signal.
    """

    def decorate(function: SignalFunction) -> type[SignalModel]:
        options = _options(function, with_inputs=bool(inputs))
        first, _, rest = inspect.cleandoc(function.__doc__ or "").partition("\n")
        heading, rest = first.rstrip("."), " ".join(rest.split())
        label = name if name is not None else function.__name__.replace("_", "")
        attributes: dict[str, Any] = {
            "__module__": function.__module__,
            "__qualname__": function.__qualname__,
            "__doc__": function.__doc__,
            "function": staticmethod(function),
            "name": label,
            "title": title or heading or label,
            "description": description or rest or f"{heading or label}.",
            "references": tuple(references),
            "kind": kind,
            "datatype": KINDS.get(kind, ""),
            "parameters": tuple(parameters),
            "minimum_measurements": (
                len(parameters) if minimum_measurements is None else minimum_measurements
            ),
            "voxel_inputs": tuple(inputs or ()),
            "input_defaults": dict(inputs or {}),
            "options": options,
            "required": tuple(required or ()),
            "starts": starts,
            "signed": signed,
        }
        model: type[FunctionModel] = type(function.__name__, (FunctionModel,), attributes)
        check_declaration(model)
        if required is None:
            with torch.no_grad():
                model.required = model(probe_scheme(model)).touched
        model.needs_diffusion_times = bool({"big_delta", "small_delta"} & set(model.required))
        return model

    return decorate


def _options(function: SignalFunction, *, with_inputs: bool) -> dict[str, Any]:
    """Return the keyword-only arguments with their defaults, after a look at the others."""
    arguments = inspect.signature(function).parameters.values()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [a.name for a in arguments if a.kind in by_position]
    expected = ["params", "scheme", *(["inputs"] if with_inputs else [])]
    if len(positional) != len(expected):
        raise EngineError(
            f"The function {function.__name__} takes ({', '.join(positional)}); a signal model "
            f"takes ({', '.join(expected)}) and, after a *, its options."
        )
    options = {a.name: a.default for a in arguments if a.kind == a.KEYWORD_ONLY}
    taken = {*dir(FunctionModel), *SignalModel.__annotations__, "scheme", "touched"}
    for option, default in options.items():
        if default is inspect.Parameter.empty or option in taken:
            raise EngineError(
                f"The option {option} of {function.__name__} needs a default value and a name "
                "that a SignalModel does not use itself."
            )
    return options
