"""The one entry point: arrays in, maps with their uncertainty out."""

from __future__ import annotations

import functools
import logging
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bids_gacelle.engine.arrays import host
from bids_gacelle.engine.blocks import (
    Feeder,
    Link,
    Plan,
    Progress,
    Queue,
    Tally,
    for_blocks,
    make_plan,
    share,
)
from bids_gacelle.engine.device import resolve_devices
from bids_gacelle.engine.errors import EngineError, FitInterrupted
from bids_gacelle.engine.kernels import Kernel, Voxels, compile_wanted
from bids_gacelle.engine.memory import Watch, footprint, return_freed_memory
from bids_gacelle.engine.models.base import SignalModel
from bids_gacelle.engine.models.checks import check_model
from bids_gacelle.engine.noise import complete
from bids_gacelle.engine.objective import (
    Objective,
    PriorArgument,
    describe_prior,
    make_objective,
)
from bids_gacelle.engine.regularise import Regulariser
from bids_gacelle.engine.result import Assessor, BlockResult, FitResult, Maps
from bids_gacelle.engine.solvers import Problem, Settings, Solver, get_solver, settings_options
from bids_gacelle.engine.spatial_fit import (
    EXTRA_STARTS,
    SpatialPlan,
    plan_spatial,
    spatial_settings,
)
from bids_gacelle.engine.study import Block, Study

_PRECISIONS = {
    "float32": torch.float32,
    "float64": torch.float64,
}
# Half widths of 95 % intervals in standard deviations, where 1.96 is far too small.
_STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18}
_FEWEST_LANES = 256
# By how much less compiling the assessment of a voxel gains than compiling its fit.
_ASSESSMENT_SHARE = 4

logger = logging.getLogger(__name__)


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
    regularise: Regulariser | Sequence[Regulariser] | None = None,
    voxel_size: Sequence[float] | None = None,
    device: str | Sequence[str] = "auto",
    precision: str = "float32",
    seed: int = 0,
    starts: int | None = None,
    block_size: int | None = None,
    memory_limit: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    options: Mapping[str, Any] | None = None,
) -> FitResult:
    """Fit a model to every voxel of a mask.

    Parameters
    ----------
    model
        An instance of a `SignalModel`.
    data
        (measurements, *grid), real: array, tensor, memory map, or anything that has a shape, a
        dtype and slices, such as an ArrayProxy of nibabel. It is never copied as a whole.
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
        Factors of the loss, (measurements,), (*grid) or (measurements, *grid), not negative; 0,
        and what is below 1e-25, leaves a measurement out. They say nothing about noise (that is
        `sigma`): the standard deviations are those of the weighted estimate.
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
    regularise
        Spatial terms and others that join voxels, see `engine.regularise`: by ADMM for "lm", by
        gradients of the whole volume for first-order solvers. Estimates then do depend on
        neighbours; standard deviations are those of each voxel's own data (and prior) at the
        regularised estimate, without what the neighbours add to the knowledge of it.
    voxel_size
        Along each axis of the grid in mm, for spatial terms; None: the same along all.
    device
        "auto" (a working GPU, else the CPU), "cpu", "cuda", "cuda:0", "cuda:all", or several
        names: blocks then go to whichever device is free. Spatial terms use the first only.
    precision
        "float32" or "float64" of the solver; uncertainties are always computed in float64.
    seed
        Of the start dictionary.
    starts
        Starts per voxel; None: what the model recommends.
    block_size
        Voxels on a device at once; None: by memory. Maps do not depend on it.
    memory_limit
        Bytes to take on each device, the host's when that is the CPU, beside the arrays given and
        the maps. None: half of the free memory of a GPU, 512 MiB on the CPU. With spatial terms
        the maps include their copies for every term; first-order solvers then need all data.
    progress
        Called with a `Progress` whose `done` increases to the voxels in the mask; with several
        devices from their threads, one at a time.
    options
        Fields of the solver's settings (`solvers.Settings`, `solvers.lm.LmSettings`,
        `solvers.adam.AdamSettings`), such as {"ftol": 1e-8}.

    Returns
    -------
    FitResult

    Raises
    ------
    EngineError
        An argument is unknown, a shape does not match, or the memory limit is too small.
    FitInterrupted
        Instead of KeyboardInterrupt, at Ctrl-C. Its `result` has the blocks that were finished;
        other voxels are NaN and flagged 8. With spatial terms no block is finished before the
        volume is.

    Notes
    -----
    Large fits are compiled; compiled and eager code round differently, by far less than a standard
    deviation. The number of voxels decides, and `settings["compiled"]` tells; set the environment
    variable BIDS_GACELLE_COMPILE to never or always to have one of them whatever the size.

    A voxel is unusable (flag 4) when a measurement is not finite (or hidden by a masked array),
    all are zero, the first (echo, flip angle or shell) is not positive (of magnitudes), one is
    1e18 times the median of all voxels (with spatial terms), its sigma or a voxel input is not a
    positive number (or not within the limits that the model has for that input), its scale_sigma
    is negative or no number, or, without a prior, fewer measurements than parameters have a finite
    sigma and a weight. Single non-positive values elsewhere are noise and are fitted.
    """
    began = time.perf_counter()
    check_model(model)
    grid = tuple((data if hasattr(data, "shape") else host(data)).shape[1:])
    objective = make_objective(model, noise, loss, prior, grid)
    run = get_solver(solver)
    spatial = plan_spatial(regularise, voxel_size, model, grid, run)
    places = resolve_devices(device)
    if spatial is not None and len(places) > 1:
        logger.info("Spatial terms need all voxels on one device: using %s.", places[0])
        places = places[:1]
    if not isinstance(precision, str) or precision not in _PRECISIONS:
        raise EngineError(f"Precision {precision!r} is unknown; give float32 or float64.")
    for name, count in (("block_size", block_size), ("memory_limit", memory_limit)):
        if count is not None and (not isinstance(count, Integral) or count < 1):
            raise EngineError(f"{name} must be positive and whole, got {count!r}.")
    if progress is not None and not callable(progress):
        raise EngineError(f"progress must be a function of a Progress, got {progress!r}.")
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
    if noise == "rician" and study.sigma is None:
        logger.warning(
            "%s: the noise level is taken from residuals, which are too small near the noise "
            "floor, where Rician noise matters: give sigma.",
            model.name,
        )
    kind = run.settings if regularise is None else spatial_settings(run)
    tuning = _tune(kind, model, starts, seed, options)
    fits = study.n * (tuning.starts + (EXTRA_STARTS if spatial else 0)) * run.effort
    dtype = _PRECISIONS[precision]
    tuning = replace(tuning, **_compilation(model, places[0], fits, study.n))
    settings = {
        "model": model.name,
        "solver": solver,
        "noise": noise,
        "loss": loss,
        "prior": describe_prior(model, objective.prior),
        "regularise": None,
        "device": ", ".join(str(place) for place in places),
        "precision": precision,
        "seed": tuning.seed,
        "starts": tuning.starts,
        "options": dict(options or {}),
    }
    maps = Maps(model, study.n)
    with torch.no_grad(), _full_float32():
        fitters = [_Fitter(model, objective, run, dtype, place, tuning) for place in places]
        plan = _plan(fitters, study, memory_limit, block_size, spatial)
        if memory_limit is not None:
            return_freed_memory()
        logger.info("%s: %s on %s.", model.name, plan, settings["device"])
        watch = Watch(places)
        trace, stopped = _fit_all(fitters, study, maps, plan, watch, progress, spatial)
    settings |= {"compiled": any(fitter.compiled for fitter in fitters)}
    if spatial is not None:
        settings["regularise"] = spatial.describe() | trace.pop("spatial", {})
    settings |= _account(study, maps, time.perf_counter() - began) | _memory(plan, watch)
    if stopped is None:
        return maps.result(study, _plain(settings), trace)
    maps.forget_unfinished()
    interrupted = {"interrupted": True, "n_finished": maps.n_finished}
    raise FitInterrupted(
        f"The fit was interrupted after {maps.n_finished:,} of {study.n:,} voxels.",
        maps.result(study, _plain(settings | interrupted)),
    ) from stopped


def _plain(value: Any) -> Any:
    """Return settings as JSON knows them: callers pass numbers of numpy too."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def _plan(
    fitters: list[_Fitter],
    study: Study,
    limit: int | None,
    block_size: int | None,
    spatial: SpatialPlan | None,
) -> Plan:
    """Return one plan for all devices, that of the one with the least memory."""
    pulled, n_devices = spatial is not None, len(fitters)
    plans = [f.plan(study, limit, block_size, n_devices, pulled=pulled) for f in fitters]
    plan = min(plans, key=lambda plan: plan.block_size)
    for fitter in fitters:
        fitter.follow(plan)
    return plan


def _fit_all(
    fitters: list[_Fitter],
    study: Study,
    maps: Maps,
    plan: Plan,
    watch: Watch,
    progress: Callable[[Progress], None] | None,
    spatial: SpatialPlan | None,
) -> tuple[dict[str, Any], KeyboardInterrupt | None]:
    """Fill the maps, block by block on all devices or, with spatial terms, on the first.

    Return what is to be told of the way, and what the user interrupted it with.
    """

    def converged() -> float:
        return maps.converged / maps.fitted if maps.fitted else float("nan")

    queue, tally = Queue(study.n), Tally(study.n, converged, progress)
    workers = [
        functools.partial(fitter.fit, study, maps, queue, plan.block_size, tally, watch)
        for fitter in fitters
    ]

    def report(share: float) -> None:
        watch.look()
        tally.running(0, study.n, share)

    trace: dict[str, Any] = {}
    try:
        if spatial is None:
            share(workers, queue)
        else:
            trace = spatial.fit(fitters[0], study, maps, plan, report)
            tally.finished(0, study.n)
        tally.end()
    except KeyboardInterrupt as stopped:
        return trace, stopped
    finally:
        for fitter in fitters:
            fitter.release()
    return trace, None


def _memory(plan: Plan, watch: Watch) -> dict[str, Any]:
    return {
        "blocks": plan.n_blocks,
        "block_size": plan.block_size,
        "memory_limit": plan.limit,
        "memory_predicted": plan.predicted,
        "memory_peak": watch.peak(),
    }


def _compilation(
    model: SignalModel, device: torch.device, fits: int, voxels: int
) -> dict[str, bool]:
    """Return whether to compile the solver, and what comes before and after it."""
    compiled = compile_wanted(model, fits, device)
    fully = compiled and compile_wanted(model, voxels // _ASSESSMENT_SHARE, device)
    return {"compiled": compiled, "compiled_fully": fully}


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
        self.plain: dict[Objective, Kernel] = {}
        self.link = Link(device)

    @property
    def compiled(self) -> bool:
        """Whether compiled code was run."""
        kernels = (*self.earlier, self.kernel, *self.plain.values())
        return any(kernel.runs_compiled for kernel in kernels)

    def plan(
        self,
        study: Study,
        limit: int | None,
        block_size: int | None,
        n_devices: int,
        *,
        pulled: bool,
    ) -> Plan:
        """Return how to cut the voxels into blocks."""
        lanes = self.settings.lanes
        return make_plan(
            study.n,
            footprint(self.kernel, study, self.solver, self.settings, pulled=pulled),
            device=self.device,
            limit=limit,
            block_size=block_size,
            lanes=lanes or self.solver.lanes(self.kernel, self.settings.compiled),
            least_lanes=lanes or _FEWEST_LANES,
            ahead=self.reads_ahead(study),
            compiled=self.settings.compiled,
            n_devices=n_devices,
        )

    def follow(self, plan: Plan) -> None:
        """Work on no more voxels at once than planned."""
        self.settings = replace(self.settings, lanes=plan.lanes)
        fully = self.settings.compiled_fully
        self.assessor = Assessor(self.exact, compiled=fully, lanes=plan.lanes)

    def release(self) -> None:
        """Give back the memory of a GPU that recorded iterations work in."""
        for kernel in (self.kernel, *self.earlier, *self.plain.values()):
            kernel.recording = None

    def reads_ahead(self, study: Study) -> bool:
        """Whether to read a block while another is fitted: not if both need the same processor."""
        return self.device.type == "cuda" or study.on_disk

    def feeder(self, study: Study, queue: Queue, size: int) -> Feeder:
        """Return what sends blocks of the voxels in a queue to the device."""
        return Feeder(study, self.link, queue, size, ahead=self.reads_ahead(study))

    def blocks(
        self, study: Study, size: int, pieces: Sequence[tuple[int, int]] | None = None
    ) -> Iterator[tuple[slice, Block]]:
        """Yield slices of the voxels in the mask with their block on the device.

        Those of the pieces (start, stop) if given, else all.
        """
        with self.feeder(study, Queue(study.n, pieces), size) as feeder:
            while (item := feeder.take()) is not None:
                yield slice(item[0], item[1]), item[2]
                item = None

    def fit(
        self, study: Study, maps: Maps, queue: Queue, size: int, tally: Tally, watch: Watch
    ) -> None:
        """Fit blocks until none are left, and store them."""
        finish: Callable[[], None] | None = None

        def work(start: int, stop: int, block: Block) -> None:
            nonlocal finish

            def report(share: float) -> None:
                queue.check()
                watch.look()
                tally.running(start, stop, share)

            try:
                result = self._fit_block(block, report) if block.usable.any() else None
            except BaseException:
                tally.dropped(start)
                raise
            watch.look()
            fetched = None if result is None else self.link.fetch(result)
            last, finish = finish, store(start, block.usable, fetched)
            if last is not None:
                last()

        def store(
            start: int, usable: NDArray[np.bool_], fetched: Callable[[], list[Tensor]] | None
        ) -> Callable[[], None]:
            def now() -> None:
                result = None if fetched is None else BlockResult(*fetched())
                maps.put(start, usable, result)
                tally.finished(start, len(usable))

            return now

        # A new thread computes gradients unless told otherwise.
        with (
            torch.no_grad(),
            self.feeder(study, queue, size) as feeder,
        ):
            try:
                for_blocks(feeder, work)
            finally:
                if finish is not None:
                    finish()

    def _fit_block(self, block: Block, report: Callable[[float], None]) -> BlockResult:
        exact = self.with_noise(block)
        solution = self.solver.solve(self.problem(self.kernel, exact, report))
        return self.assessor.results(exact, solution, block.scale, block.shared)

    def problem(
        self, kernel: Kernel, exact: Voxels, report: Callable[[float], None] = lambda share: None
    ) -> Problem:
        """Return the problem of some voxels in the precision of the kernel."""
        voxels = exact.map(lambda tensor: tensor.to(kernel.dtype))
        earlier = self.earlier if kernel is self.kernel else ()
        return Problem(kernel, voxels, self.exact, exact, self.settings, report, earlier)

    def with_noise(self, block: Block) -> Voxels:
        """Return the voxels with what the objective needs besides the data."""
        return complete(self.kernel, block, self._solve_plain)

    def _solve_plain(self, objective: Objective, exact: Voxels) -> Tensor:
        """Return the optimum of another objective, in double precision."""
        if objective not in self.plain:
            kernel = self.kernel
            self.plain[objective] = Kernel(self.model, objective, kernel.dtype, kernel.device)
        problem = self.problem(self.plain[objective], exact)
        return self.solver.solve(problem).position.double()


def _tune(
    kind: type[Settings],
    model: SignalModel,
    starts: int | None,
    seed: int,
    options: Mapping[str, Any] | None,
) -> Settings:
    """Return the checked settings of a solver; what is not given is as the model recommends."""
    starts = model.starts if starts is None else starts
    if isinstance(starts, bool) or not isinstance(starts, Integral) or starts < 1:
        raise EngineError(f"starts must be a whole number and at least 1, got {starts!r}.")
    if not isinstance(options or {}, Mapping):
        raise EngineError(f"options is {options!r}; give {{name: value}}.")
    try:
        number = operator.index(seed)
    except TypeError:
        number = 2**63
    if abs(number) >= 2**63:
        raise EngineError(f"seed must be a whole number of at most 63 bits, got {seed!r}.")
    known = settings_options(kind)
    unknown = sorted(set(options or {}) - set(known), key=str)
    if unknown:
        raise EngineError(f"There is no option {unknown[0]!r}; known are {sorted(known)}.")
    recommended = {"max_evaluations": model.max_evaluations}
    given = {k: v for k, v in recommended.items() if k in known} | dict(options or {})
    settings = kind(starts=int(starts), seed=number, **given)
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
