"""What a signal model is: declared parameters, a signal, and optionally closed forms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_gacelle.engine.derivatives import directional
from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.scheme import DiffusionScheme, GradientEchoScheme, Scheme

Inputs = dict[str, Tensor]

POSITIVE = (float(np.finfo(np.float64).tiny), float(np.finfo(np.float64).max))
NOT_NEGATIVE = (0.0, POSITIVE[1])
"""Limits of options that are any positive number, or also 0."""


@dataclass(frozen=True)
class Reference:
    """A publication to cite: citation key, formatted text, DOI."""

    key: str
    text: str
    doi: str


@dataclass(frozen=True)
class Parameter:
    """A fitted parameter or a quantity derived from the fitted ones.

    Attributes
    ----------
    name, unit, description
        As in maps and tables; the unit in CMIXF spelling ("1/s", "um^2/ms", "ms", "1").
    bounds
        Limits of the fit, in the parameter's unit.
    start
        Where tissue usually lies, in the parameter's unit: the box of the start dictionary, and
        the scale of steps, of spatial weights and of the weak prior. Unused for amplitudes, which
        are projected, and for derived quantities.
    search
        Range of the start dictionary where minima lie outside the start box; None: the box.
    prior
        Mean and standard deviation of the "weak" prior in the solver's coordinate. Left out, it is
        that of a uniform box with the centre and twice the width of the start box. None for
        amplitudes.
    window, colormap
        Display window (None: from the data) and matplotlib colour map.
    suffix
        Official BIDS suffix of the map ("R2starmap"), or "".
    compartment
        Which of several compartments a map of this suffix is about ("MW"), for its file name; ""
        where there is one.
    coordinate
        "linear", or "log" when the solver works on the logarithm.
    amplitude
        True for the one parameter that scales the whole signal: the data of a voxel are divided
        by their own largest magnitude before the fit and this parameter is scaled back after it.
    """

    name: str
    unit: str
    description: str
    bounds: tuple[float, float] = (-np.inf, np.inf)
    start: tuple[float, float] | None = None
    search: tuple[float, float] | None = None
    prior: tuple[float, float] | None = None
    window: tuple[float, float] | None = None
    colormap: str = "viridis"
    suffix: str = ""
    compartment: str = ""
    coordinate: Literal["linear", "log"] = "linear"
    amplitude: bool = False

    def __post_init__(self) -> None:
        """Fill in the weak prior."""
        if self.prior is None and self.start is not None and not self.amplitude:
            low, high = (self.to_coordinate(value) for value in self.start)
            prior = ((low + high) / 2, 2 * (high - low) / np.sqrt(12))
            object.__setattr__(self, "prior", (float(prior[0]), float(prior[1])))

    def to_coordinate(self, value: float) -> float:
        """Return a value of the parameter in the solver's coordinate."""
        return float(np.log(value)) if self.coordinate == "log" else float(value)


def _is_a(value: object, wanted: type) -> bool:
    """Tell whether a value can stand for a default of this type; 1 is a float, True no number."""
    if isinstance(value, bool) or wanted is bool:
        return type(value) is wanted
    numbers = {int: Integral, float: Real}
    return isinstance(value, numbers.get(wanted, wanted))


class SignalModel(ABC):
    """A forward model: parameters of a voxel to its measurements.

    A subclass declares the class attributes below and gives `signal`. It may also give an analytic
    `jacobian` (tested against forward mode), a closed-form `guess` to start from, `mixture` with
    `unmix` for parameters that need no search, and `closed_form`, the estimate of the linear
    solver. One line in `models.MODELS` registers it.

    Attributes
    ----------
    name, title, description, references
        For file names, headings and methods text.
    kind
        "megre", "vfa" or "dwi": which images it needs.
    bare_names
        True when its map files need not name the model (official BIDS suffixes).
    signed
        True when data of either sign are meant; otherwise a first measurement that is not positive
        makes a voxel unusable.
    minimum_measurements
        Smallest number of echoes, flip angles or shells; of images, where flip angles have several
        echoes and the model describes them.
    minimum_flip_angles
        Smallest number of different flip angles.
    minimum_echo_times
        Smallest number of different echo times that a dwi series must have, or one flip angle.
    voxel_inputs, input_defaults
        Names of maps the signal depends on (such as b1), and the value when none is given. Those
        that an instance has may depend on its options.
    input_limits
        Least and largest value of voxel inputs that may be 0 or have an upper limit; the others
        are positive. A voxel with another value is unusable.
    options, choices
        Constructor options with their defaults, whose type they keep; allowed values of those
        that have few. An instance has its values as attributes (unless there is a method of that
        name), and all of them in `chosen`.
    option_limits
        Least and largest value of options that are numbers with a limit.
    required
        Columns the acquisition must have.
    plausibility
        Of a model of gradient echoes, the rules (`prepare.echoes.RULES`) by which voxels are
        flagged unless told otherwise.
    has_closed_form
        Whether the model gives a `closed_form`; set by itself.
    starts
        Number of starts the fit uses unless told otherwise.
    default_prior
        "weak" where estimates without a prior are of no use at usual noise; the command line then
        takes it unless told otherwise.
    max_evaluations
        After so many evaluations Levenberg-Marquardt gives a voxel up unless told otherwise.
    compile_from
        Voxels times starts from which compiling the fit pays for its 20 to 60 s.
    tissues
        Parameters of typical tissues, by name, for the standard deviations to expect of a
        protocol; none: the middle of the start boxes.
    linear
        Names of the parameters that `unmix` gives: the signal is, given the others, a mixture of
        known signals. None of them, nor another parameter, may be an amplitude then.
    parameters, derived
        What is fitted, in order; what is computed from it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    description: ClassVar[str]
    references: ClassVar[tuple[Reference, ...]] = ()
    kind: ClassVar[Literal["megre", "vfa", "dwi"]]
    datatype: ClassVar[Literal["anat", "dwi"]]
    bare_names: ClassVar[bool] = False
    signed: bool = False
    needs_diffusion_times: ClassVar[bool] = False
    minimum_measurements: ClassVar[int] = 1
    minimum_flip_angles: ClassVar[int] = 1
    minimum_echo_times: ClassVar[int] = 1
    voxel_inputs: tuple[str, ...] = ()
    input_defaults: dict[str, float] = {}  # noqa: RUF012
    input_limits: dict[str, tuple[float, float]] = {}  # noqa: RUF012
    options: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {}
    option_limits: ClassVar[dict[str, tuple[float, float]]] = {}
    required: ClassVar[tuple[str, ...]] = ()
    plausibility: ClassVar[tuple[str, ...]] = ()
    starts: ClassVar[int] = 1
    default_prior: ClassVar[Literal["weak"] | None] = None
    max_evaluations: ClassVar[int] = 50
    compile_from: ClassVar[int] = 300_000
    has_closed_form: ClassVar[bool] = False
    tissues: ClassVar[dict[str, dict[str, float]]] = {}
    linear: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...]
    derived: tuple[Parameter, ...] = ()

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Note whether the model has a closed form."""
        super().__init_subclass__(**arguments)
        cls.has_closed_form = cls.closed_form is not SignalModel.closed_form

    def __init__(self, scheme: Scheme, **options: Any) -> None:
        for attribute in ("name", "kind"):
            if not hasattr(self, attribute):
                raise EngineError(f"The model class {type(self).__name__} lacks {attribute!r}.")
        expected = DiffusionScheme if self.kind == "dwi" else GradientEchoScheme
        if not isinstance(scheme, expected):
            raise EngineError(
                f"{self.name} needs a {expected.__name__}, got {type(scheme).__name__}."
            )
        self.check_options(options)
        self.chosen = {**self.options, **options}
        for name, value in self.chosen.items():
            if not callable(getattr(type(self), name, None)):  # the option "signal" is no method
                setattr(self, name, value)
        missing = [column for column in self.required if getattr(scheme, column) is None]
        if missing:
            raise EngineError(f"{self.name} needs {' and '.join(missing)} in its acquisition.")
        if len(scheme) < self.minimum_measurements:
            raise EngineError(
                f"{self.name} needs at least {self.minimum_measurements} measurements "
                f"(echoes, flip angles or shells), got {len(scheme)}."
            )
        self.scheme = scheme
        self._tables: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.kept: dict[Hashable, Any] = {}  # by kernels and starts, for further fits

    def like(self, scheme: Scheme) -> SignalModel:
        """Return this model, with the options it was made with, for another acquisition."""
        return type(self)(scheme, **self.chosen)

    @classmethod
    def check_options(cls, options: Mapping[str, object]) -> None:
        """Check constructor options; no data are needed.

        Raises
        ------
        EngineError
            An option is unknown, or its value is of the wrong type, not allowed or out of limits.
        """
        for name, value in options.items():
            if name not in cls.options:
                known = ", ".join(cls.options) or "none"
                raise EngineError(f"{cls.name} has no option {name!r}; it has {known}.")
            wanted = type(cls.options[name])
            allowed = cls.choices.get(name)
            if not _is_a(value, wanted) or (allowed is not None and value not in allowed):
                one_of = " or ".join(map(repr, allowed or ())) or f"of type {wanted.__name__}"
                raise EngineError(f"The option {name} of {cls.name} is {one_of}, got {value!r}.")
            low, high = limits = cls.option_limits.get(name, (-np.inf, np.inf))
            if isinstance(value, Real) and not low <= float(value) <= high:
                words = {POSITIVE: "a positive number", NOT_NEGATIVE: "a number of at least 0"}
                wanted_value = words.get(limits, f"a number from {low:g} to {high:g}")
                raise EngineError(f"{name} must be {wanted_value}, got {value}.")

    @classmethod
    def wants_echo_decay(cls, options: Mapping[str, Any]) -> bool:
        """Tell whether a model with these options fits how dwi signals decay with echo time.

        It then gets them relative to b=0 of the shortest echo time, not of each, and b=0 of the
        other echo times among them.
        """
        return False

    @classmethod
    def wanted(cls, scheme: Scheme, options: Mapping[str, Any]) -> NDArray[np.bool_] | None:
        """Tell which measurements a model with these options fits; None: all of them.

        The others must be left out of the scheme that the model is made for (`scheme.take`), and
        of its data: a model describes each measurement of its scheme.

        Raises
        ------
        EngineError
            There are too few of them.
        """
        return None

    @classmethod
    def needed_inputs(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the voxel inputs that a model with these options cannot be fitted without."""
        return ()

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the fitted parameters, in order."""
        return tuple(p.name for p in self.parameters)

    @property
    def derived_names(self) -> tuple[str, ...]:
        """Names of the derived quantities."""
        return tuple(p.name for p in self.derived)

    @property
    def n_measurements(self) -> int:
        """Length of the signal."""
        return len(self.scheme)

    @property
    def averages(self) -> NDArray[np.float64]:
        """How many magnitudes each measurement averages; 0: it is no average of magnitudes."""
        counts = getattr(self.scheme, "n_directions", None)
        return np.ones(self.n_measurements) if counts is None else counts

    @abstractmethod
    def signal(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the noise-free signal.

        Parameters
        ----------
        params
            One tensor per parameter, all of the same shape (...), in the units of `parameters`.
        inputs
            Voxel inputs of the same shape (...), by name; those left out take their default.

        Returns
        -------
        Tensor of shape (measurements, ...).
        """

    def jacobian(
        self, params: dict[str, Tensor], inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the signal (measurements, ...) and derivatives (parameters, measurements, ...).

        This default uses forward-mode differentiation, one pass per parameter.
        """
        values = tuple(params[name] for name in self.parameter_names)

        def of_values(*values: Tensor) -> Tensor:
            return self.signal(dict(zip(self.parameter_names, values, strict=True)), inputs)

        zeros = [torch.zeros_like(v) for v in values]
        columns = []
        for i, value in enumerate(values):
            tangents = (*zeros[:i], torch.ones_like(value), *zeros[i + 1 :])
            signal, column = directional(of_values, values, tangents)
            columns.append(column)
        return signal, torch.stack(columns)

    def derive(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the derived quantities, by name, of the shape of the parameters."""
        return {}

    def guess(self, data: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor] | None:
        """Return a closed-form start from data (measurements, voxels), or None.

        Amplitudes need not be given; voxels without a valid guess hold NaN.
        """
        return None

    def mixture(self, params: dict[str, Tensor], inputs: Inputs | None = None) -> Tensor:
        """Return the 2 to 4 signals that a model with `linear` parameters mixes.

        The signal is their average with weights that are at least 0 and add up to 1; every such
        set of weights stands for values of the linear parameters within their bounds.

        Parameters
        ----------
        params
            The parameters that are not linear, all of the same shape (...).
        inputs
            As in `signal`.

        Returns
        -------
        Tensor of shape (signals, measurements, ...).
        """
        raise EngineError(f"{self.name} declares linear parameters but no mixture.")

    def unmix(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the linear parameters of mixing weights (signals, ...), each of shape (...)."""
        raise EngineError(f"{self.name} declares linear parameters but no unmix.")

    def closed_form(self, data: Tensor, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Return the model's linear estimate from data (measurements, voxels).

        Raises
        ------
        EngineError
            The model has none, or the acquisition does not allow it.
        """
        raise EngineError(
            f"{self.name} has no closed-form estimate: use another solver than 'linear'."
        )

    def table(self, name: str, values: NDArray[np.float64], like: Tensor) -> Tensor:
        """Return a constant in the precision, on the device and with the trailing axes of `like`.

        Parameters
        ----------
        name
            Key of the cache; one name always stands for the same values.
        values
            Array of any shape (...).
        like
            A parameter tensor of shape (voxel axes).

        Returns
        -------
        Tensor of shape (..., 1, 1) with one trailing 1 for each axis of `like`.
        """
        key = (name, like.dtype, like.device)
        if key not in self._tables:
            self._tables[key] = torch.tensor(values, dtype=like.dtype, device=like.device)
        constant = self._tables[key]
        return constant.reshape(constant.shape + (1,) * like.ndim)

    def places(self, name: str, values: NDArray[np.int64], like: Tensor) -> Tensor:
        """Return a constant index on the device of `like`; see `table`.

        A list in its place would be sent to a GPU, which then waits, each time it is used.
        """
        key = (name, torch.int64, like.device)
        if key not in self._tables:
            self._tables[key] = torch.tensor(values, dtype=torch.int64, device=like.device)
        return self._tables[key]

    def voxel_input(self, name: str, inputs: Inputs | None, like: Tensor) -> Tensor:
        """Return a voxel input, or its default as a tensor that broadcasts."""
        if inputs is not None and name in inputs:
            return inputs[name]
        return torch.full_like(like, self.input_defaults[name])
