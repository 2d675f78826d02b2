"""The one entry point: arrays in, maps with their uncertainty out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bids_gacelle.engine.blocks import default_block_size, for_blocks
from bids_gacelle.engine.device import resolve_device
from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import Kernel, Voxels, compile_wanted
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.objective import (
    Objective,
    PriorArgument,
    describe_prior,
    make_objective,
)
from bids_gacelle.engine.physics import rician
from bids_gacelle.engine.result import FitResult, Maps
from bids_gacelle.engine.solvers import Problem, Settings, Solver, get_solver, solver_options
from bids_gacelle.engine.study import Block, Study
from bids_gacelle.engine.uncertainty import Assessor

_PRECISIONS = {
    "float32": torch.float32,
    "float64": torch.float64,
}
# Half widths of 95 % intervals in standard deviations, where 1.96 is far too small.
_STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18}

Progress = Callable[[int, int], None]


def fit(
    model: SignalModel,
    data: ArrayLike | Tensor,
    *,
    mask: ArrayLike | Tensor | None = None,
    sigma: float | ArrayLike | Tensor | None = None,
    scale_sigma: ArrayLike | Tensor | None = None,
    scale_group: ArrayLike | None = None,
    weights: ArrayLike | Tensor | None = None,
    inputs: Mapping[str, ArrayLike | Tensor] | None = None,
    solver: str = "lm",
    noise: str = "gaussian",
    loss: str = "l2",
    prior: PriorArgument = None,
    device: str = "auto",
    precision: str = "float32",
    seed: int = 0,
    starts: int | None = None,
    block_size: int | None = None,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> FitResult:
    """Fit a model to every voxel of a mask.

    Parameters
    ----------
    model
        An instance of a `SignalModel`.
    data
        (measurements, *grid), real.
    mask
        (*grid); all voxels when left out.
    sigma
        Standard deviation of the measurements in the units of the data: a number, (*grid) or
        (measurements, *grid); infinity excludes a measurement. Left out, each voxel's noise
        variance is its sum of squares over its degrees of freedom.
    scale_sigma, scale_group
        (groups, *grid) relative standard deviation of a factor that the measurements of a group
        share, such as the b = 0 signal they were divided by, and the (measurements,) group of
        each, counted from 0. It widens the standard deviations of the maps; weights and estimates
        do not depend on it.
    weights
        Factors of the loss, (measurements,), (*grid) or (measurements, *grid), not negative; 0
        leaves a measurement out. They say nothing about noise (that is `sigma`): the standard
        deviations are those of the weighted estimate.
    inputs
        Voxel inputs of the model, (*grid) each; those left out take the model's default.
    solver
        "lm" (least squares, or maximum a posteriori with a prior), "adam", "sgdm" or "rmsprop"
        (first-order, see `solvers.adam`), or "linear" (closed form).
    noise
        "gaussian", or "rician" for magnitudes: the exact likelihood of single ones; of averages
        over `model.averages` magnitudes the mean and variance. `sigma` is then that of the
        measurements far above the noise, the one of an average over n being sigma/sqrt(n).
    loss
        "l2", "l1" or "huber", the last two in units of the noise.
    prior
        None, "weak", or {name: (mean, sd)} in the solver's coordinate (see `Parameter`), each a
        number or a map (*grid).
    device
        "auto" (a working GPU, else the CPU), "cpu", "cuda" or "cuda:0".
    precision
        "float32" or "float64" of the solver; uncertainties are always computed in float64.
    seed
        Of the start dictionary.
    starts
        Starts per voxel; None: what the model recommends.
    block_size
        Voxels on the device at once; None: by memory. Maps do not depend on it.
    progress
        Called with (voxels done, voxels in all), both increasing to the number in the mask.
    options
        Fields of the solver's settings (`solvers.Settings`, `solvers.lm.LmSettings`,
        `solvers.adam.AdamSettings`), such as {"ftol": 1e-8}.

    Returns
    -------
    FitResult

    Raises
    ------
    EngineError
        An argument is unknown, or a shape does not match.

    Notes
    -----
    A voxel is unusable (flag 4) when a measurement is not finite, all are zero, the first (echo,
    flip angle or shell) is not positive, its sigma or a voxel input is not a positive number, or
    its scale_sigma is negative or no number. Single non-positive values elsewhere are noise and
    are fitted.
    """
    began = time.perf_counter()
    grid = tuple(np.shape(data)[1:])
    objective = make_objective(model, noise, loss, prior, grid)
    run = get_solver(solver)
    place = resolve_device(device)
    if precision not in _PRECISIONS:
        raise EngineError(f"Precision {precision!r} is unknown; give float32 or float64.")
    if block_size is not None and block_size < 1:
        raise EngineError(f"block_size must be positive, got {block_size}.")
    study = Study(
        model,
        data,
        mask=mask,
        sigma=sigma,
        scale_sigma=scale_sigma,
        scale_group=scale_group,
        weights=weights,
        prior=objective.prior,
        inputs=inputs,
    )
    if objective.needs_noise and study.sigma is None and study.degrees < 1:
        raise EngineError(
            f"This prior, noise or loss needs the noise level, but {model.name} has as many "
            "parameters as there are measurements: give sigma."
        )
    tuning = _tune(solver, model.starts if starts is None else starts, seed, options)
    fits = study.n * tuning.starts * run.effort
    tuning = replace(tuning, compiled=compile_wanted(model, fits, place))
    fitter = _Fitter(model, objective, run, _PRECISIONS[precision], place, tuning)
    maps = Maps(model, study.n)
    with torch.no_grad(), _full_float32():
        fitter.fit(study, maps, block_size, progress)
    settings = {
        "model": model.name,
        "solver": solver,
        "noise": noise,
        "loss": loss,
        "prior": describe_prior(model, objective.prior),
        "device": str(place),
        "precision": precision,
        "seed": seed,
        "starts": tuning.starts,
        "options": dict(options or {}),
        "compiled": fitter.compiled,
    }
    return maps.result(study, settings | _account(study, maps, time.perf_counter() - began))


def _account(study: Study, maps: Maps, seconds: float) -> dict[str, Any]:
    """Return the settings that are known after the fit."""
    account: dict[str, Any] = {
        "sigma": "residual" if study.sigma is None else "given",
        "scale_sigma": None if study.shared is None else "given",
        "degrees_of_freedom": study.degrees,
        "n_voxels": study.n,
        "seconds": seconds,
        "voxels_per_second": study.n / seconds,
        "at_bound": maps.share_at_bound(),
    }
    if study.sigma is None and study.degrees <= max(_STUDENT_T):
        account["note"] = _note(study.degrees)
    return account


def _note(degrees: int) -> str:
    """Say for the report what so few degrees of freedom mean for standard deviations."""
    if degrees < 1:
        return (
            "There are no more measurements than parameters, so that no residuals are left to "
            "tell the noise from, and no noise level was given: there are no standard deviations, "
            "except of the other parameters where one is at a bound."
        )
    return (
        f"Standard deviations rest on the residuals of {degrees} "
        f"degree{'s' if degrees > 1 else ''} of freedom in each voxel: a 95 % interval is the "
        f"estimate plus or minus {_STUDENT_T[degrees]:.2f} (not 1.96) standard deviations, by "
        "Student's t distribution with that many degrees of freedom."
    )


class _Fitter:
    """Model, objective and solver on one device, applied block by block."""

    def __init__(
        self,
        model: SignalModel,
        objective: Objective,
        solver: Solver,
        dtype: torch.dtype,
        device: torch.device,
        settings: Settings,
    ) -> None:
        def kernel(objective: Objective) -> Kernel:
            return Kernel(model, objective, dtype, device)

        self.model, self.solver, self.device, self.settings = model, solver, device, settings
        *earlier, last = (kernel(stage) for stage in objective.stages())
        self.earlier, self.kernel = tuple(earlier), last
        self.exact = Kernel(model, objective, torch.float64, device)
        self.plain = kernel(objective.plain())
        self.assessor = Assessor(self.exact, compiled=settings.compiled)

    @property
    def compiled(self) -> bool:
        """Whether compiled code was run."""
        kernels = (*self.earlier, self.kernel, self.plain)
        return any(kernel.runs_compiled for kernel in kernels)

    def fit(
        self, study: Study, maps: Maps, block_size: int | None, progress: Progress | None
    ) -> None:
        """Fit all blocks and store them."""
        per_voxel = 64 * (study.n_measurements + len(self.model.parameters) * self.settings.starts)
        size = block_size or default_block_size(per_voxel, self.device)
        done = 0

        def work(start: int, stop: int) -> None:
            def report(share: float) -> None:
                nonlocal done
                now = start + int(share * (stop - start))
                if progress is not None and now > done:
                    done = now
                    progress(done, study.n)

            block = study.block(start, stop, self.device, self.model)
            if block.usable.any():
                self._fit_block(block, start, maps, report)
            report(1.0)

        for_blocks(study.n, size, work)

    def _fit_block(
        self, block: Block, begin: int, maps: Maps, report: Callable[[float], None]
    ) -> None:
        exact = self._with_noise(block)
        solution = self.solver.solve(self._problem(self.kernel, exact, report))
        solution = replace(solution, position=solution.position.double())
        where = begin + np.flatnonzero(block.usable)
        for part, ended, verdict in self.assessor.assess(exact, solution, block.shared):
            maps.store(where[part], block.scale[part], self.exact, ended, verdict)

    def _problem(
        self, kernel: Kernel, exact: Voxels, report: Callable[[float], None] = lambda share: None
    ) -> Problem:
        voxels = exact.map(lambda tensor: tensor.to(kernel.dtype))
        earlier = self.earlier if kernel is self.kernel else ()
        return Problem(kernel, voxels, self.exact, exact, self.settings, report, earlier)

    def _with_noise(self, block: Block) -> Voxels:
        """Return the voxels with what the objective needs besides the data."""
        exact = block.voxels
        objective = self.kernel.objective
        if objective.needs_noise and exact.noise_variance is None:
            exact = exact._replace(noise_variance=self._residual_variance(exact))
        if block.prior is not None:
            assert exact.noise_variance is not None
            mean, precision = block.prior
            exact = exact._replace(target=mean, stiffness=precision * exact.noise_variance)
        if self.kernel.averages is not None:
            # Averages of magnitudes vary less near the noise floor than far above it.
            averages = self.kernel.averages.double()
            variance = exact.variance() * averages.clamp_min(1.0)
            varies = rician.spread(rician.invert_mean(exact.data, variance), variance) / variance
            varies = torch.where(averages > 0, varies, 1.0)
            weight = 1 / varies if exact.weight is None else exact.weight / varies
            exact = exact._replace(weight=weight)
        return exact

    def _residual_variance(self, exact: Voxels) -> Tensor:
        """Return the noise variance of each voxel from a plain least-squares fit.

        With a loss that is there for outliers, from the median instead of the mean of squares.
        """
        position = self.solver.solve(self._problem(self.plain, exact)).position.double()
        plain = Kernel(self.model, self.plain.objective, torch.float64, self.device)
        residual = plain.signal(position, exact.inputs) - exact.data
        if exact.weight is not None:
            residual = residual * exact.weight.sqrt()
        m, degrees = len(residual), len(residual) - len(position)
        if self.kernel.objective.loss == "l2":
            return (residual**2).sum(0) / degrees
        # 1.4826: from the median absolute deviation to the standard deviation of normal noise.
        median = 1.4826 * residual.abs().quantile(0.5, dim=0)
        return (median**2 * (m / degrees)).clamp_min(1e-12)


def _tune(solver: str, starts: int, seed: int, options: Mapping[str, Any] | None) -> Settings:
    """Return the checked settings of the solver."""
    if isinstance(starts, bool) or not isinstance(starts, Integral) or starts < 1:
        raise EngineError(f"starts must be a whole number and at least 1, got {starts!r}.")
    known = solver_options(solver)
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise EngineError(f"There is no option {unknown[0]!r}; known are {sorted(known)}.")
    settings = get_solver(solver).settings(starts=int(starts), seed=seed, **(options or {}))
    if settings.dictionary < starts:
        raise EngineError(
            f"A dictionary of {settings.dictionary} entries cannot give {starts} starts."
        )
    return settings


@contextmanager
def _full_float32() -> Iterator[None]:
    """Keep TF32 off in matrix products, whatever the caller has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
