"""Turns a model and an objective into the functions a solver calls, eager or compiled."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import threading
import types
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.derivatives import FORWARD
from bids_gacelle.engine.device import is_out_of_memory
from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.objective import Misfit, Objective
from bids_gacelle.engine.physics import rician

logger = logging.getLogger(__name__)

COMPILE_VARIABLE = "BIDS_GACELLE_COMPILE"
_said: set[str] = set()
# Let inductor compute a voxel's measurements inside the loop that sums over them, and join the
# many numbers of a step into one loop over voxels.
_OPTIONS: dict[str, Any] = {
    "loop_ordering_after_fusion": True,
    "max_fusion_size": 2000,
    "size_asserts": False,  # `Compiled` looks at those of arguments
}


def span(tensor: Tensor, begin: int, size: int) -> Tensor:
    """Return `size` entries of the last axis from a place on; past the end the last is repeated.

    What is computed for pieces of one size neither compiles again for the last of them nor rounds
    otherwise there.
    """
    part = tensor[..., begin : begin + size]
    missing = size - part.shape[-1]
    if missing:
        part = torch.cat((part, part[..., -1:].expand(*part.shape[:-1], missing)), -1)
    return part.contiguous()


class Voxels(NamedTuple):
    """Normalised data of some voxels, all with voxels on the last axis.

    Attributes
    ----------
    data
        (measurements, voxels).
    weight
        (measurements, voxels) inverse noise variance, mean 1 in every voxel; None: equal.
    noise_variance
        (voxels,) variance of a measurement of weight 1, in the units of `data`; None: unknown.
    emphasis
        (measurements, voxels) factors of the loss that say nothing about noise, or None.
    target, stiffness
        (parameters, voxels) where quadratic terms pull each solver coordinate, and how strongly,
        in squared units of the data; None: nowhere.
    channel_variance
        (measurements or 1, voxels) noise variance of one channel of a single magnitude, for
        Rician noise.
    inputs
        Voxel inputs of the model, each (voxels,).
    """

    data: Tensor
    weight: Tensor | None = None
    noise_variance: Tensor | None = None
    emphasis: Tensor | None = None
    target: Tensor | None = None
    stiffness: Tensor | None = None
    channel_variance: Tensor | None = None
    inputs: dict[str, Tensor] = {}  # noqa: RUF012

    def map(self, change: Callable[[Tensor], Tensor]) -> Voxels:
        """Apply a function to every tensor."""
        changed = {
            name: None if tensor is None else change(tensor)
            for name, tensor in zip(self._fields[:-1], self[:-1], strict=True)
        }
        inputs = {name: change(value) for name, value in self.inputs.items()}
        return self._replace(**changed, inputs=inputs)  # type: ignore[arg-type]

    def take(self, index: Tensor | slice) -> Voxels:
        """Return the voxels at `index`."""
        if isinstance(index, slice):
            return self.map(lambda tensor: tensor[..., index])
        return self.map(lambda tensor: tensor.index_select(-1, index))

    def span(self, begin: int, size: int) -> Voxels:
        """Return `size` voxels from a place on; past the end the last is repeated."""
        return self.map(lambda tensor: span(tensor, begin, size))

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in a fixed order."""
        return [t for t in self[:-1] if t is not None] + list(self.inputs.values())

    def loss_weight(self) -> Tensor | None:
        """Return what multiplies the loss of each measurement; None: 1."""
        if self.weight is None or self.emphasis is None:
            return self.emphasis if self.weight is None else self.weight
        return self.weight * self.emphasis

    def counted(self) -> Tensor:
        """Return 1 for measurements that an estimate uses and 0 for those left out, as `data`."""
        counted = torch.ones_like(self.data)
        for factor in (self.weight, self.emphasis):
            if factor is not None:
                counted = counted * (factor != 0)
        return counted

    def variance(self) -> Tensor:
        """Return the noise variance of each measurement, (measurements or 1, voxels)."""
        assert self.noise_variance is not None
        if self.weight is None:
            return self.noise_variance[None]
        return self.noise_variance / self.weight.clamp_min(1e-12)


class SharedFactor(NamedTuple):
    """Noise of factors that several measurements have in common, besides noise of their own.

    Attributes
    ----------
    sigma
        (groups, voxels) relative standard deviation of each factor.
    group
        (measurements,) the factor of each measurement.
    """

    sigma: Tensor
    group: Tensor


class NormalEquations(NamedTuple):
    """Cost (voxels,), gradient (P, voxels), and Gauss-Newton Hessian in `packed` order."""

    cost: Tensor
    gradient: Tensor
    hessian: Tensor


def packed(n: int) -> list[tuple[int, int]]:
    """Return the order in which a symmetric n x n matrix is kept: its upper triangle by rows."""
    return [(i, j) for i in range(n) for j in range(i, n)]


def unpack(triangle: Tensor) -> Tensor:
    """Return the full matrix (P, P, voxels) of a packed one."""
    n = int((2 * len(triangle)) ** 0.5)
    position = {pair: k for k, pair in enumerate(packed(n))}
    index = [position[min(i, j), max(i, j)] for i in range(n) for j in range(n)]
    return triangle[index].reshape(n, n, *triangle.shape[1:])


def settle(tensor: Tensor) -> Tensor:
    """Make a compiler compute a tensor once instead of inlining its formula wherever it is used.

    Without it the formulas of one pass are inlined into those of the next, and compiling takes
    minutes.
    """
    if tensor.dtype == torch.bool:  # which would be stored one by one
        return settle(tensor.to(torch.float32)) > 0
    return tensor.as_strided(tensor.shape, tensor.stride())


class Kernel:
    """A model on one device in one precision, in the coordinates solvers work in.

    Parameters
    ----------
    model, objective
        What to fit and what to minimise.
    dtype, device
        Precision and place of all tensors.

    Attributes
    ----------
    lower, upper
        Bounds in solver coordinates, (parameters, 1).
    width
        Widths of the start boxes in solver coordinates, (parameters, 1); NaN for an amplitude.
    amplitude
        Index of the amplitude parameter, or None.
    recording
        What a GPU recorded last of a solver's work; the next recording works in its memory.
    recordable
        Whether that can be recorded, by name; None: not known yet, called once.
    """

    def __init__(
        self, model: SignalModel, objective: Objective, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model = model
        self.objective = objective
        self.dtype = dtype
        self.device = device
        parameters = model.parameters
        self.logs = tuple(p.coordinate == "log" for p in parameters)
        amplitudes = [i for i, p in enumerate(parameters) if p.amplitude]
        if len(amplitudes) > 1:
            raise EngineError(
                f"{model.name} declares {len(amplitudes)} amplitudes; one is allowed."
            )
        self.amplitude = amplitudes[0] if amplitudes else None
        self.lower = self._column([p.to_coordinate(p.bounds[0]) for p in parameters])
        self.upper = self._column([p.to_coordinate(p.bounds[1]) for p in parameters])
        boxes = [(0.0, float("nan")) if p.amplitude else p.start or p.bounds for p in parameters]
        coordinates = [
            tuple(p.to_coordinate(v) for v in box)
            for p, box in zip(parameters, boxes, strict=True)
        ]
        self.box = tuple(coordinates)
        self.search = tuple(
            box if p.search is None else tuple(p.to_coordinate(v) for v in p.search)
            for p, box in zip(parameters, coordinates, strict=True)
        )
        self.width = self._column([high - low for low, high in coordinates])
        self.averages = self._averages()
        self.compiled: dict[tuple[str, tuple[Hashable, ...]], Compiled] = {}
        self.recording: torch.cuda.CUDAGraph | None = None
        self.recordable: dict[str, bool | None] = {}

    def _averages(self) -> Tensor | None:
        """Return how many magnitudes each measurement averages, (measurements, 1).

        None for Gaussian noise, and for single magnitudes whose exact likelihood is used.
        """
        if self.objective.noise != "rician":
            return None
        averages = self.model.averages
        if self.objective.loss == "l2" and (averages == 1).all():
            return None
        return self._column(averages.tolist())

    @property
    def runs_compiled(self) -> bool:
        """Whether any function of this kernel was compiled and works."""
        return any(function.works for function in self.compiled.values())

    def compile(
        self, name: str, function: Callable[..., Any], *depends: Hashable, once: bool = False
    ) -> Callable[..., Any]:
        """Return the function compiled, the same for all blocks of a fit.

        Parameters
        ----------
        name
            One name, and what the function depends on, stand for one function in a kernel.
        function
            A pure function of tensors.
        depends
            What it depends on besides this kernel. A function that depends on the same is not
            compiled again in another fit of the same model object.
        once
            It depends on more than can be told.
        """
        if (name, depends) not in self.compiled:
            objective, parameters = self.objective, self.model.parameters
            key = (name, depends, objective.noise, objective.loss, objective.corner, parameters)
            kept = {} if once else self.model.kept
            compiled = kept.setdefault((*key, self.dtype, self.device), Compiled(function))
            compiled.look_again()
            self.compiled[name, depends] = compiled
        return self.compiled[name, depends]

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.device)[:, None]

    def parameters(self, position: Tensor) -> dict[str, Tensor]:
        """Return the parameters in their own units from solver coordinates (P, ...)."""
        return {
            name: torch.exp(position[i]) if self.logs[i] else position[i]
            for i, name in enumerate(self.model.parameter_names)
        }

    def coordinates(self, params: dict[str, Tensor]) -> Tensor:
        """Return solver coordinates (P, ...) from the parameters in their own units."""
        return torch.stack(
            [
                torch.log(params[name]) if self.logs[i] else params[name]
                for i, name in enumerate(self.model.parameter_names)
            ]
        )

    def signal(self, position: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return the signal (measurements, voxels) at solver coordinates (P, voxels)."""
        return self.model.signal(self.parameters(position), inputs)

    def signal_and_jacobian(
        self, position: Tensor, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the signal (M, voxels) and its P derivatives by the solver coordinates."""
        params = self.parameters(position)
        signal, jacobian = self.model.jacobian(params, inputs)
        columns = list(jacobian.unbind(0))
        for i, name in enumerate(self.model.parameter_names):
            if self.logs[i]:
                columns[i] = columns[i] * params[name]
        return signal, columns

    def expected(self, position: Tensor, voxels: Voxels) -> tuple[Tensor, list[Tensor]]:
        """Return what measurements are expected, and derivatives; as `signal_and_jacobian`.

        That is the signal or, where magnitudes are averaged, the mean of their Rice distribution.
        """
        signal, columns = self.signal_and_jacobian(position, voxels.inputs)
        if self.averages is None:
            return signal, columns
        assert voxels.channel_variance is not None
        mean, slope = rician.mean(signal, voxels.channel_variance)
        is_magnitude = self.averages > 0  # a count of 0 is no magnitude
        slope = torch.where(is_magnitude, slope, 1.0)
        return torch.where(is_magnitude, mean, signal), [c * slope for c in columns]

    def misfit(self, expected: Tensor, voxels: Voxels) -> Misfit:
        """Return the loss of each measurement, without weights."""
        objective = self.objective
        if objective.noise == "rician" and self.averages is None:
            assert voxels.channel_variance is not None
            return Misfit(*rician.likelihood(expected, voxels.data, voxels.channel_variance))
        sd = None if objective.loss == "l2" else voxels.variance().sqrt()
        return objective.misfit(expected - voxels.data, sd)

    def sums(
        self, position: Tensor, voxels: Voxels, *, curved: bool = True
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return cost, gradient and packed Hessian, the last two as lists of (voxels,).

        Without `curved` the list of the Hessian is empty.

        The unit of the cost is that of the squared normalised data: a prior is multiplied by the
        noise variance instead of the data term being divided by it.
        """
        expected, columns = self.expected(position, voxels)
        cost, slope, curvature = self.misfit(expected, voxels)
        weight = voxels.loss_weight()
        if weight is not None:
            cost, slope = cost * weight, slope * weight
            curvature = weight if curvature is None else curvature * weight
        rows = columns if curvature is None else [column * curvature for column in columns]
        total = cost.sum(0)
        gradient = [(column * slope).sum(0) for column in columns]
        pairs = packed(len(columns)) if curved else []
        hessian = [(rows[i] * columns[j]).sum(0) for i, j in pairs]
        if voxels.target is not None:
            assert voxels.stiffness is not None
            for i, stiffness in enumerate(voxels.stiffness.unbind(0)):
                offset = position[i] - voxels.target[i]
                total = total + 0.5 * stiffness * offset**2
                gradient[i] = gradient[i] + stiffness * offset
                if curved:
                    diagonal = pairs.index((i, i))
                    hessian[diagonal] = hessian[diagonal] + stiffness
        return total, gradient, hessian

    def normal_equations(self, position: Tensor, voxels: Voxels) -> NormalEquations:
        """Return cost, gradient and packed Hessian as tensors; see `sums`."""
        cost, gradient, hessian = self.sums(position, voxels)
        return NormalEquations(cost, torch.stack(gradient), torch.stack(hessian))


def compile_wanted(model: SignalModel, fits: int, device: torch.device) -> bool:
    """Tell whether to compile: the environment variable decides, "auto" weighs cost and gain.

    Parameters
    ----------
    model
        Says from what size on compiling it pays.
    fits
        Voxels times starts of the whole problem.
    device
        Where the fit runs.

    Raises
    ------
    EngineError
        The variable holds anything but never, auto or always.
    """
    choice = os.environ.get(COMPILE_VARIABLE, "auto")
    if choice not in ("never", "auto", "always"):
        raise EngineError(f"{COMPILE_VARIABLE} is {choice!r}; it must be never, auto or always.")
    if choice != "auto":
        return choice == "always"
    if fits < model.compile_from:
        return False
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    if device.type == "cuda":
        return compiler and importlib.util.find_spec("triton") is not None
    return compiler


class Compiled:
    """A function compiled at its first call; eager, with one logged line, when that fails.

    At every call torch looks whether anything changed that the function could depend on, which
    takes as long as a step of a small model. Here it looks once in a fit, for each kind of
    arguments, and then the code is called directly.

    Parameters
    ----------
    function
        A pure function of tensors, numbers and None, also in tuples and dictionaries, to a tensor
        or a tuple of them. It is compiled for each kind of arguments: shapes of tensors, numbers,
        and what is None.

    Attributes
    ----------
    works
        Whether compiled code was run.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._looked: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._calls: dict[tuple[Any, ...], Callable[[list[Tensor]], Any]] = {}
        self._failed = self.works = False

    def look_again(self) -> None:
        """Let torch look once more at what the function depends on."""
        self._calls = {}

    def __call__(self, *args: Any) -> Any:
        """Call the compiled function, or the eager one after a failed compilation."""
        if self._failed:
            return self._function(*args)
        tensors: dict[int, Tensor] = {}
        unfolded: list[Any] = []
        _unfold(args, tensors, unfolded)
        kind, given = tuple(unfolded), list(tensors.values())
        call = self._calls.get(kind)
        return self._first_call(kind, args, given) if call is None else call(given)

    def _first_call(
        self, kind: tuple[Any, ...], args: tuple[Any, ...], given: list[Tensor]
    ) -> Any:
        known = kind in self._looked
        if not known:
            self._function(*args)  # fills caches of constants, which a trace had better find full
        try:
            if not known:
                self._looked[kind] = _looked_at(self._function)
            # What torch's own passes warn about concerns nobody here.
            with FORWARD, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result, self._calls[kind] = _with_direct(self._looked[kind], args, given)
            self.works = True
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            del self._looked[kind]  # what it depends on changed so often that it is given up
            return self._first_call(kind, args, given)
        except Exception as error:
            if is_out_of_memory(error):
                raise  # a smaller block may fit
            # Any failure of the tool chain (no compiler, no headers, no space for the cache) may
            # only cost speed; a real error of the function comes again in eager mode.
            line = _first_line(error)
            if line not in _said:  # several functions of one fit fail for one reason
                logger.warning("Compilation failed, continuing without: %s", line)
                _said.add(line)
            self._failed, self.works = True, False
            return self._function(*args)
        return result


def _unfold(value: Any, tensors: dict[int, Tensor], kind: list[Any]) -> None:
    """List the tensors of some arguments by id, and as their kind all but what tensors hold."""
    if isinstance(value, Tensor):
        if id(value) in tensors:  # torch makes one input of the two
            kind.append(("again", list(tensors).index(id(value))))
        else:
            tensors[id(value)] = value
            kind.append((value.shape, value.stride(), value.dtype))
    elif isinstance(value, tuple):
        kind.append((tuple, len(value)))
        for inner in value:
            _unfold(inner, tensors, kind)
    elif isinstance(value, dict):
        kind.append((dict, tuple(value)))
        for inner in value.values():
            _unfold(inner, tensors, kind)
    else:
        kind.append((type(value), value))


def _looked_at(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch compiles, and looks at in every call."""

    def call(*args: Any) -> Any:
        return function(*args)

    # torch keeps what it compiled, up to a limit, by code object, which all functions made here
    # share: the ninth of a process would run eager.
    own = types.FunctionType(
        call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__
    )
    return torch.compile(own, backend=_backend, dynamic=False, fullgraph=True)


# What code was called last in a thread, with which tensors, and what it returned. torch keeps
# backends and what they return for ever: these must not know a function, and by it a model.
_last = threading.local()


def _backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    code = torch._inductor.compile(graph, examples, options=_OPTIONS)

    def call(*entering: Tensor) -> Sequence[Tensor]:
        left = code(*entering)
        _last.call = code, entering, left
        return left

    return call


def _with_direct(
    looked: Callable[..., Any], args: tuple[Any, ...], given: list[Tensor]
) -> tuple[Any, Callable[[list[Tensor]], Any]]:
    """Return the result, and its code as a function of the tensors given.

    What enters the code and is not given is a constant of the function.
    """
    _last.call = None
    result = looked(*args)
    if _last.call is None:
        raise RuntimeError("no code was called")
    (code, entered, left), _last.call = _last.call, None
    known = [*given, *left]
    place = {id(known[k]): k for k in reversed(range(len(known)))}
    single = isinstance(result, Tensor)
    results = (result,) if single else result
    for value in results:
        if isinstance(value, tuple | list | dict | Tensor) and id(value) not in place:
            raise TypeError(f"a result is no tensor that was computed: {type(value).__name__}")
    make = getattr(type(result), "_make", tuple)

    def placed(values: Iterable[Any]) -> list[tuple[int | None, Any]]:
        places = [(place.get(id(value)), value) for value in values]
        return [(k, value if k is None else None) for k, value in places]

    inputs, outputs = placed(entered), placed(results)

    def call(given: list[Tensor]) -> Any:
        left = code(*[constant if k is None else given[k] for k, constant in inputs])
        known = [*given, *left]
        values = [constant if k is None else known[k] for k, constant in outputs]
        return values[0] if single else make(values)

    return result, call


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
