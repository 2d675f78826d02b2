"""Turns a model and an objective into the functions a solver calls, eager or compiled."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.objective import Objective

logger = logging.getLogger(__name__)

COMPILE_VARIABLE = "BIDS_GACELLE_COMPILE"


class Voxels(NamedTuple):
    """Normalised data of some voxels, all with voxels on the last axis.

    Attributes
    ----------
    data
        (measurements, voxels).
    weight
        (measurements, voxels), mean 1 in every voxel, or None for equal weights.
    noise_variance
        (voxels,) variance of a measurement of weight 1, in the units of `data`; None: unknown.
    inputs
        Voxel inputs of the model, each (voxels,).
    """

    data: Tensor
    weight: Tensor | None
    noise_variance: Tensor | None
    inputs: dict[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> Voxels:
        """Apply a function to every tensor."""
        return Voxels(
            change(self.data),
            None if self.weight is None else change(self.weight),
            None if self.noise_variance is None else change(self.noise_variance),
            {name: change(value) for name, value in self.inputs.items()},
        )

    def take(self, index: Tensor | slice) -> Voxels:
        """Return the voxels at `index`."""
        return self.map(lambda tensor: tensor[..., index])

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in a fixed order."""
        fixed = [t for t in (self.data, self.weight, self.noise_variance) if t is not None]
        return fixed + list(self.inputs.values())


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

    def take(self, index: slice) -> SharedFactor:
        """Return the voxels at `index`."""
        return self._replace(sigma=self.sigma[:, index])


class NormalEquations(NamedTuple):
    """Cost, gradient and Gauss-Newton Hessian: (voxels,), (P, voxels), (P, P, voxels)."""

    cost: Tensor
    gradient: Tensor
    hessian: Tensor


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
        self.width = self._column([high - low for low, high in coordinates])
        prior = objective.prior
        self._mean = None if prior is None else self._column(prior.mean.tolist())
        self._precision = None if prior is None else self._column(prior.precision.tolist())
        self.lm_step: Callable[..., tuple[Tensor, ...]] | None = None

    @property
    def runs_compiled(self) -> bool:
        """Whether a step of this kernel was compiled and works."""
        return isinstance(self.lm_step, Compiled) and self.lm_step.works

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

    def normal_equations(self, position: Tensor, voxels: Voxels) -> NormalEquations:
        """Return half the weighted sum of squares (plus prior) and its derivatives.

        The unit of the cost is that of the squared normalised data: the prior is multiplied by the
        noise variance instead of the data term being divided by it.
        """
        signal, columns = self.signal_and_jacobian(position, voxels.inputs)
        residual = signal - voxels.data
        weighted = residual if voxels.weight is None else residual * voxels.weight
        cost = 0.5 * (weighted * residual).sum(0)
        gradient = torch.stack([(column * weighted).sum(0) for column in columns])
        n = len(columns)
        upper: dict[tuple[int, int], Tensor] = {}
        for i in range(n):
            row = columns[i] if voxels.weight is None else columns[i] * voxels.weight
            for j in range(i, n):
                upper[i, j] = (row * columns[j]).sum(0)
        hessian = torch.stack(
            [torch.stack([upper[min(i, j), max(i, j)] for j in range(n)]) for i in range(n)]
        )
        if self._mean is not None and self._precision is not None:
            assert voxels.noise_variance is not None
            precision = self._precision * voxels.noise_variance
            offset = position - self._mean
            cost = cost + 0.5 * (precision * offset**2).sum(0)
            gradient = gradient + precision * offset
            hessian = hessian + torch.diag_embed(precision.T).permute(1, 2, 0)
        return NormalEquations(cost, gradient, hessian)


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

    Parameters
    ----------
    function
        A pure function of tensors whose shapes do not change.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._call: Callable[..., tuple[Tensor, ...]] | None = None
        self.works = False

    def __call__(self, *args: object) -> tuple[Tensor, ...]:
        """Call the compiled function, or the eager one after a failed compilation."""
        if self._call is None:
            return self._first_call(*args)
        return self._call(*args)

    def _first_call(self, *args: object) -> tuple[Tensor, ...]:
        try:
            # What torch's own passes warn about concerns nobody here.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled = torch.compile(self._function, dynamic=False)
                result = compiled(*args)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            # Any failure of the tool chain (no compiler, no headers, no space for the cache) may
            # only cost speed; a real error of the function comes again in eager mode.
            logger.warning("Compilation failed, continuing without: %s", _first_line(error))
            self._call = self._function
            return self._function(*args)
        self._call, self.works = compiled, True
        return result


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
