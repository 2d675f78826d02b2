"""First-order solvers with the options of GACELLE's askadam: Adam, SGDM and RMSProp.

Every voxel is a problem of its own: its loss, criteria, lowest point and end do not depend on how
many others are fitted with it. `minimise_whole` is for objectives that couple voxels.

Loss
    The objective of the fit (its loss, noise, weights and prior), made free of units: for L2 the
    sum of squared residuals over the sum of squared data, for L1 the mean absolute residual over
    the root mean square of the data. Huber and Rician losses are divided by what L2 is divided by.
    GACELLE averages over all voxels, so that gradients shrink with their number.

Uncertainty
    Standard deviations are those of the objective's curvature where a fit ended, whether or not
    that is its optimum.

Behaviour of GACELLE's first version and paper, for comparisons
    ``fit(model, data, solver="adam", loss="l1", sigma=..., options=ASKADAM_1_0)``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import Kernel, Voxels, span
from bids_gacelle.engine.solvers.base import (
    Ends,
    Problem,
    Settings,
    Solution,
    Solver,
    best_of_starts,
    default_lanes,
    within,
)
from bids_gacelle.engine.solvers.lanes import Lanes
from bids_gacelle.engine.starts import build_dictionary, chunk_size, find_starts

# A sigmoid start keeps this share of the range away from the bounds, where slopes vanish.
_EDGE = 1e-4
# Iterations between looks at which lanes have finished, each of which waits for the device.
_STRIDE = 10
# The compiled step takes fewer lanes than the device's default: its last voxels, which may need
# all iterations, are worked on in full lanes.
_COMPILED_LANES = 2048
# From the median absolute deviation to the standard deviation of normal noise.
_MAD_TO_SD = 1.4826
# An outlier is trusted again below this share of the threshold; a measurement at the threshold
# would otherwise change sides for ever.
_FORGIVEN = 0.8

# A criterion that is met where the loss is higher than the lowest on the way by more than this
# share of it, or of the data, is no convergence: a step that was too long has led to a corner
# where the signal, and with it the gradient, is 0.
_NEAR, _NEAR_DATA = 1e-2, 1e-3

# Options of GACELLE 1.0 and its paper that differ from the defaults here. Still different: the
# loss's unit, the clamped state, the projected gradient, a rising loss that is no convergence.
ASKADAM_1_0: dict[str, Any] = {
    "learning_rate": 1e-3,
    "iterations": 4000,
    "transform": "linear",
    "convergence": "linear",
    "convergence_window": 20,
    "convergence_value": 1e-8,
    "step_tolerance": 0.0,
    "gradient_tolerance": 0.0,
}

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GradientSettings(Settings):
    """Options that Adam, SGDM and RMSProp share; in parentheses GACELLE's names.

    Attributes
    ----------
    learning_rate
        Step size of the first iteration (initialLearnRate), in shares of the range between the
        bounds ("linear") or in logits ("sigmoid").
    decay_rate
        The step size of iteration k = 1, 2, ... is learning_rate / (1 + decay_rate (k - 1))
        (decayRate).
    iterations
        A voxel that needs more is "not converged" (iteration).
    tolerance
        A voxel stops when its loss is below this (tol). 0, the default, never: GACELLE's 1e-3 ends
        the fit of good data before it began.
    convergence
        "ema": relative change of an exponential moving average E of the loss L,
        E <- d E + (1 - d) L, the signal being abs(E - E_before) / (abs(E_before) + 1e-8).
        "linear": the absolute slope of a straight line through the last losses. GACELLE takes the
        signed slope, which lets a rising loss pass (convergenceModel).
    convergence_value
        Convergence is a signal below this (convergenceValue); 0 turns it off.
    convergence_window
        Number of losses of the line; with both signals, iterations before they count
        (convergenceWindow).
    ema_decay
        The d of the average (emaDecay).
    patience
        A criterion must hold more than this many times in a row (patience).
    convergence_patience, step_patience, gradient_patience
        The same for one criterion; None: `patience`.
    step_tolerance
        A step dz is small when |dz| / (1 + |z|) is below this (convergenceStepTol); 0: off.
    gradient_tolerance
        A gradient is small when its norm is below this (convergenceGradTol); 0: off. Components
        that push against a bound do not count.
    transform
        "sigmoid": z = logit of the position between the bounds, never quite at one; starts are
        1e-4 of the range inside. "linear": z = the position in shares of the range; z itself is
        kept between 0 and 1, where GACELLE lets it drift outside (parameterTransform). Parameters
        without two finite bounds are linear in both, in units of their start box (an amplitude:
        of the largest measurement).
    randomness
        Share r of chance in the start, (1 - r) z + r u, with u normal ("sigmoid") or uniform
        between 0 and 1 ("linear"). One draw serves all voxels, another each start.
    output
        "min": the lowest point on the way; "final": the last.
    robust
        Every `robust_interval` iterations, the measurements of a voxel whose residual exceeds
        `robust_threshold` robust standard deviations (1.4826 times the median absolute residual of
        the voxel, corrected for its parameters) get `outlier_weight` until the next time. This
        is not GACELLE's robustConvergence, which gives less weight to whole voxels that lag behind
        the others, so that they do not hold up a stop common to all: here every voxel stops by
        itself. Standard deviations do not know of these weights, and without a known noise level
        outliers widen them. ``loss="huber"`` is the convex alternative.
    robust_interval, robust_threshold, outlier_weight
        See `robust` (weightUpdateInterval, none, outlierWeight).
    """

    learning_rate: float = within("(0, inf)", 1e-2)
    decay_rate: float = within("[0, inf)", 0.0)
    iterations: int = within("[1, inf)", 4000)
    tolerance: float = within("[0, inf)", 0.0)
    convergence: Literal["ema", "linear"] = "ema"
    convergence_value: float = within("[0, inf)", 1e-6)
    convergence_window: int = within("[2, inf)", 20)
    ema_decay: float = within("[0, 1)", 0.95)
    patience: int = within("[0, inf)", 5)
    convergence_patience: int | None = within("[0, inf)", None)
    step_patience: int | None = within("[0, inf)", None)
    gradient_patience: int | None = within("[0, inf)", None)
    step_tolerance: float = within("[0, inf)", 1e-6)
    gradient_tolerance: float = within("[0, inf)", 1e-6)
    transform: Literal["sigmoid", "linear"] = "sigmoid"
    randomness: float = within("[0, 1]", 0.0)
    output: Literal["min", "final"] = "min"
    robust: bool = False
    robust_interval: int = within("[1, inf)", 5)
    robust_threshold: float = within("(0, inf)", 3.0)
    outlier_weight: float = within("[0, 1]", 0.1)

    def rate(self, count: Tensor) -> Tensor:
        """Return the step size of iteration `count` = 1, 2, ..."""
        return self.learning_rate / (1 + self.decay_rate * (count - 1))

    def patiences(self) -> list[int]:
        """Return the patience of convergence, step and gradient."""
        own = (self.convergence_patience, self.step_patience, self.gradient_patience)
        return [self.patience if value is None else value for value in own]

    def update(
        self, position: Tensor, gradient: Tensor, moments: Moments, count: Tensor
    ) -> tuple[Tensor, Moments]:
        """Return the next position and moments; elementwise and pure.

        Parameters
        ----------
        position, gradient
            Of any equal shape (..., lanes).
        moments
            Two tensors of this shape, 0 before the first iteration; a rule may use one only.
        count
            Number of the iteration, from 1, as floats: (lanes,) or 0-d.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class AdamSettings(GradientSettings):
    """Adam with bias correction (Kingma and Ba 2015, algorithm 1).

    Attributes
    ----------
    beta1, beta2
        Decay of the first and second moment of the gradient.
    epsilon
        Added to the root of the second moment.
    """

    beta1: float = within("[0, 1)", 0.9)
    beta2: float = within("[0, 1)", 0.999)
    epsilon: float = within("[0, inf)", 1e-8)

    def update(
        self, position: Tensor, gradient: Tensor, moments: Moments, count: Tensor
    ) -> tuple[Tensor, Moments]:
        """See `GradientSettings.update`."""
        first = self.beta1 * moments[0] + (1 - self.beta1) * gradient
        second = self.beta2 * moments[1] + (1 - self.beta2) * gradient**2
        root = (second / _bias(self.beta2, count)).sqrt() + self.epsilon
        step = self.rate(count) * (first / _bias(self.beta1, count)) / root
        return position - step, (first, second)


def _bias(beta: float, count: Tensor) -> Tensor:
    """Return 1 - beta^count; in single precision 1 - 0.999 would already be off by 1e-4."""
    return -torch.expm1(count * (math.log(beta) if beta else -math.inf))


@dataclass(frozen=True)
class SgdmSettings(GradientSettings):
    """Stochastic gradient descent with momentum, v <- m v - rate g, z <- z + v.

    Attributes
    ----------
    momentum
        The m of the rule.
    """

    learning_rate: float = within("(0, inf)", 1e-1)
    momentum: float = within("[0, 1)", 0.9)

    def update(
        self, position: Tensor, gradient: Tensor, moments: Moments, count: Tensor
    ) -> tuple[Tensor, Moments]:
        """See `GradientSettings.update`."""
        velocity = self.momentum * moments[0] - self.rate(count) * gradient
        return position + velocity, (velocity, moments[1])


@dataclass(frozen=True)
class RmspropSettings(GradientSettings):
    """RMSProp, s <- q s + (1 - q) g^2, z <- z - rate g / (sqrt(s) + epsilon).

    Steps stay about as long as the rate: it settles with a `decay_rate` only.

    Attributes
    ----------
    squares_decay
        The q of the rule.
    epsilon
        Added to the root.
    """

    squares_decay: float = within("[0, 1)", 0.9)
    epsilon: float = within("[0, inf)", 1e-8)

    def update(
        self, position: Tensor, gradient: Tensor, moments: Moments, count: Tensor
    ) -> tuple[Tensor, Moments]:
        """See `GradientSettings.update`."""
        squares = self.squares_decay * moments[1] + (1 - self.squares_decay) * gradient**2
        step = self.rate(count) * gradient / (squares.sqrt() + self.epsilon)
        return position - step, (moments[0], squares)


class Transform:
    """From what the optimiser moves, z, to solver coordinates x = base + scale s(z).

    Parameters
    ----------
    kernel
        Gives the bounds.
    kind
        "sigmoid" or "linear", see `GradientSettings`.

    Attributes
    ----------
    low, high
        Limits of z, (parameters, 1).
    """

    def __init__(self, kernel: Kernel, kind: str) -> None:
        self.lower, self.upper = lower, upper = kernel.lower, kernel.upper
        bounded = lower.isfinite() & upper.isfinite()
        one_end = torch.where(upper.isfinite(), upper, torch.zeros_like(upper))
        self.base = torch.where(lower.isfinite(), lower, one_end)
        width = torch.where(kernel.width.isfinite(), kernel.width, torch.ones_like(lower))
        self.scale = torch.where(bounded, upper - lower, width)
        self.squashed = bounded if kind == "sigmoid" else torch.zeros_like(bounded)
        self.low = torch.where(self.squashed, -torch.inf, (lower - self.base) / self.scale)
        self.high = torch.where(self.squashed, torch.inf, (upper - self.base) / self.scale)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return solver coordinates and their derivatives by z, both (parameters, lanes)."""
        squashed = torch.sigmoid(z)
        share = torch.where(self.squashed, squashed, z)
        slope = torch.where(self.squashed, squashed * (1 - squashed), torch.ones_like(z))
        return self.base + self.scale * share, self.scale * slope

    def inverse(self, position: Tensor) -> Tensor:
        """Return z of solver coordinates."""
        share = (position - self.base) / self.scale
        logit = _in_chunks(lambda part: torch.logit(part, eps=_EDGE), share)
        return self.clamp(torch.where(self.squashed, logit, share))

    def clamp(self, z: Tensor) -> Tensor:
        """Return z within its limits."""
        return torch.minimum(torch.maximum(z, self.low), self.high)

    def projected(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient without what pushes z against its limits."""
        outward = ((z <= self.low) & (gradient > 0)) | ((z >= self.high) & (gradient < 0))
        return torch.where(outward, torch.zeros_like(gradient), gradient)

    def end(self, z: Tensor) -> Tensor:
        """Return solver coordinates that are exactly at a bound where z is at its limit."""
        position = torch.minimum(torch.maximum(self(z)[0], self.lower), self.upper)
        return torch.where(z >= self.high, self.upper, position)

    def scattered(self, z: Tensor, share: float, seed: int, n_starts: int) -> Tensor:
        """Return z mixed with chance; see `GradientSettings.randomness`.

        Parameters
        ----------
        z
            (parameters, starts x voxels), start by start.
        share, seed, n_starts
            How much chance, what it is drawn from, and how many draws.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (len(z), n_starts)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        draw = torch.where(self.squashed, normal.to(z), uniform.to(z))
        draws = draw.repeat_interleave(z.shape[1] // n_starts, 1)
        return self.clamp((1 - share) * z + share * draws)


def _in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply a function to (rows, n) in chunks of one shape, lest the rounding depend on n."""
    n, size = rows.shape[1], chunk_size(rows.device)
    parts = [function(span(rows, begin, size)) for begin in range(0, n, size)]
    return torch.cat(parts, 1)[:, :n]


class Watch(NamedTuple):
    """What the criteria remember of each lane.

    Attributes
    ----------
    memory
        (1 or window, lanes): moving average, or the last losses.
    counters
        (3, lanes): how often in a row convergence, step and gradient were small enough.
    moved
        (lanes,) relative length of the last step.
    """

    memory: Tensor
    counters: Tensor
    moved: Tensor


class Criteria:
    """The tests that end a fit, for every lane."""

    def __init__(self, settings: GradientSettings, like: Tensor) -> None:
        self.settings = settings
        window = settings.convergence_window
        place = {"dtype": like.dtype, "device": like.device}
        offset = torch.arange(window, **place)[:, None] - (window - 1) / 2  # type: ignore[call-overload]
        self.line = offset / (offset**2).sum()
        self.patience = torch.tensor(settings.patiences(), device=like.device)[:, None]

    def start(self, loss: Tensor) -> Watch:
        """Return what is remembered before the first iteration, for as many lanes as `loss`."""
        rows = self.settings.convergence_window if self.settings.convergence == "linear" else 1
        counters = torch.zeros(3, len(loss), dtype=torch.int32, device=loss.device)
        return Watch(loss.new_zeros(rows, len(loss)), counters, torch.full_like(loss, torch.inf))

    def __call__(
        self, watch: Watch, loss: Tensor, slope: Tensor, count: Tensor
    ) -> tuple[Watch, Tensor]:
        """Return what is remembered now, and whether a criterion is met.

        Parameters
        ----------
        watch
            From the iteration before.
        loss, slope
            (lanes,) loss and norm of its gradient.
        count
            (lanes,) number of the iteration, from 1.
        """
        settings = self.settings
        memory, signal = self._signal(watch.memory, loss, count)
        small = torch.stack(
            (
                (signal < settings.convergence_value) & (count > settings.convergence_window),
                watch.moved < settings.step_tolerance,
                slope < settings.gradient_tolerance,
            )
        )
        counters = torch.where(small, watch.counters + 1, 0)
        met = (counters > self.patience).any(0) | (loss < settings.tolerance)
        return Watch(memory, counters, watch.moved), met

    def _signal(self, memory: Tensor, loss: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        if self.settings.convergence == "linear":
            memory = torch.cat((memory[1:], loss[None]))
            # Differences to the last loss lose less in single precision than losses.
            return memory, (self.line * (memory - loss)).sum(0).abs()
        before, decay = memory[0], self.settings.ema_decay
        average = torch.where(count == 1, loss, decay * before + (1 - decay) * loss)
        return average[None], (average - before).abs() / (before.abs() + 1e-8)


class State(NamedTuple):
    """State of all lanes, on the last axis.

    Attributes
    ----------
    z, first, second
        (parameters, lanes) position and moments.
    loss
        (lanes,) of the last iteration.
    best, best_loss
        The lowest point so far.
    unit
        (lanes,) what costs are divided by.
    memory, counters, moved
        See `Watch`.
    trust
        (measurements, lanes) weights of the robust option; no rows without.
    iterations, running, converged
        (lanes,).
    """

    z: Tensor
    first: Tensor
    second: Tensor
    loss: Tensor
    best: Tensor
    best_loss: Tensor
    unit: Tensor
    memory: Tensor
    counters: Tensor
    moved: Tensor
    trust: Tensor
    iterations: Tensor
    running: Tensor
    converged: Tensor


class Step:
    """One iteration of all lanes, a pure function of tensors.

    As in GACELLE: loss and gradient, lowest point, criteria, and only then the move, which the
    last iteration does without, so that the final position and loss belong together.
    """

    def __init__(self, kernel: Kernel, settings: GradientSettings) -> None:
        self.kernel, self.settings = kernel, settings
        self.transform = Transform(kernel, settings.transform)
        self.criteria = Criteria(settings, kernel.lower)

    def __call__(self, state: State, voxels: Voxels) -> tuple[Tensor, ...]:
        """Return the next state; lanes that do not run keep theirs."""
        settings = self.settings
        if settings.robust:
            emphasis = voxels.emphasis
            trust = state.trust if emphasis is None else emphasis * state.trust
            voxels = voxels._replace(emphasis=trust)
        position, stretch = self.transform(state.z)
        loss, gradient = loss_and_gradient(self.kernel, position, voxels, state.unit)
        gradient = self.transform.projected(state.z, gradient * stretch)
        running = state.running
        iterations = state.iterations + running
        count = iterations.to(loss.dtype)

        slope = _norm(gradient)
        better = running & (loss < state.best_loss) & slope.isfinite()
        before = Watch(state.memory, state.counters, state.moved)
        watch, met = self.criteria(before, loss, slope, count)
        sound = loss.isfinite() & slope.isfinite()
        ended = met | ~sound | (iterations >= settings.iterations)

        moving = running & ~ended
        moments = (state.first, state.second)
        z, (first, second) = settings.update(state.z, gradient, moments, count)
        z = self.transform.clamp(z)
        moved = _norm(z - state.z) / (1 + _norm(state.z))
        return (
            torch.where(moving, z, state.z),
            torch.where(moving, first, state.first),
            torch.where(moving, second, state.second),
            torch.where(running, loss, state.loss),
            torch.where(better, state.z, state.best),
            torch.where(better, loss, state.best_loss),
            state.unit,
            torch.where(running, watch.memory, state.memory),
            torch.where(running, watch.counters, state.counters),
            torch.where(moving, moved, state.moved),
            state.trust,
            iterations,
            moving,
            state.converged | (running & met & sound & _is_near(loss, state.best_loss)),
        )

    def load(self, starts: Tensor, voxels: Voxels) -> State:
        """Return fresh states at starts z (parameters, lanes)."""
        lanes = starts.shape[1]
        unit = loss_unit(self.kernel, voxels)
        unknown = torch.full_like(unit, torch.inf)
        rows = len(voxels.data) if self.settings.robust else 0
        no = torch.zeros(lanes, dtype=torch.bool, device=starts.device)
        return State(
            starts.clone(),
            torch.zeros_like(starts),
            torch.zeros_like(starts),
            unknown.clone(),
            starts.clone(),
            unknown,
            unit,
            *self.criteria.start(unit),
            trust=starts.new_ones(rows, lanes),
            iterations=no.to(torch.int32),
            running=~no,
            converged=no,
        )

    def outcome(self, state: State) -> Ends:
        """Return where the states ended, in solver coordinates, with the kernel's costs."""
        final = self.settings.output == "final"
        last = (state.loss.isfinite() & state.z.isfinite().all(0)) if final else ~state.running
        last = last & final
        loss = torch.where(last, state.loss, state.best_loss)
        position = self.transform.end(torch.where(last, state.z, state.best))
        return Ends(position, loss * state.unit, state.iterations, state.converged)

    def reweigh(self, state: State, voxels: Voxels) -> State:
        """Return the states with new weights of the robust option.

        Losses under different weights do not compare: a lane whose weights have changed looks for
        its lowest point anew.
        """
        settings = self.settings
        expected, _ = self.kernel.expected(self.transform(state.z)[0], voxels)
        residual = (expected - voxels.data).abs()
        weight = voxels.loss_weight()
        if weight is not None:
            noise = residual if voxels.weight is None else residual * voxels.weight.sqrt()
            residual = torch.where(weight > 0, noise, torch.nan)
        n = residual.isfinite().sum(0)
        spare = (n / (n - len(state.z)).clamp_min(1)).sqrt()
        sd = _MAD_TO_SD * spare * residual.nanmedian(0).values
        floor = torch.finfo(residual.dtype).eps * voxels.data.abs().amax(0)
        share = torch.where(state.trust < 1, _FORGIVEN, 1.0)
        outlying = residual > settings.robust_threshold * share * torch.maximum(sd, floor)
        trust = torch.where(outlying, settings.outlier_weight, torch.ones_like(residual))
        trust = torch.where(state.running, trust, state.trust)
        changed = (trust != state.trust).any(0)
        anew = torch.where(changed, torch.inf, state.best_loss)
        return state._replace(trust=trust, best_loss=anew)


def _is_near(loss: Tensor, lowest: Tensor) -> Tensor:
    """Tell whether losses are about as low as the lowest before."""
    return loss <= lowest + (_NEAR * lowest.abs()).clamp_min(_NEAR_DATA)


def _norm(rows: Tensor) -> Tensor:
    """Return the 2-norm over the first axis."""
    return (rows * rows).sum(0).sqrt()


def loss_unit(kernel: Kernel, voxels: Voxels) -> Tensor:
    """Return what the costs of voxels are divided by to be free of units, (voxels,).

    Half the weighted sum of squared data; for L1, whose cost is the standard deviation of the
    noise times the sum of absolute residuals, that standard deviation times the number of
    measurements and the root mean square of the data.
    """
    squares = voxels.data**2
    weight = voxels.loss_weight()
    power = (squares if weight is None else squares * weight).sum(0)
    power = power.clamp_min(torch.finfo(power.dtype).tiny * 1e6)
    if kernel.objective.loss != "l1":
        return 0.5 * power
    assert voxels.noise_variance is not None
    return (voxels.noise_variance * len(squares) * power).sqrt()


def loss_and_gradient(
    kernel: Kernel, position: Tensor, voxels: Voxels, unit: Tensor
) -> tuple[Tensor, Tensor]:
    """Return loss (voxels,) and gradient (parameters, voxels) by solver coordinates."""
    cost, gradient, _ = kernel.sums(position, voxels, curved=False)
    return cost / unit, torch.stack(gradient) / unit


def solve(problem: Problem) -> Solution:
    """Fit every voxel of a block from each of its starts and keep the lowest loss."""
    kernel, settings = problem.kernel, problem.settings
    dictionary = build_dictionary(kernel, settings.dictionary, settings.starts, settings.seed)
    starts = find_starts(kernel, problem.voxels, dictionary)
    n_starts, n_parameters, _ = starts.shape
    position = starts.permute(1, 0, 2).reshape(n_parameters, -1)
    return best_of_starts(minimise(problem, position, n_starts), n_starts)


def minimise(problem: Problem, starts: Tensor, n_starts: int = 1) -> Ends:
    """Return where the iterations end from given starts.

    Parameters
    ----------
    problem
        Its voxels are fitted, over and over when there are more starts than voxels.
    starts
        (parameters, starts) in solver coordinates; start i belongs to voxel i modulo their number.
    n_starts
        Starts of each voxel.
    """
    kernel, settings = problem.kernel, problem.settings
    step = Step(kernel, settings)
    call: Callable[..., Any] = (
        kernel.compile("step", step, settings) if settings.compiled else step
    )
    z = step.transform.inverse(starts)
    if settings.randomness:
        z = step.transform.scattered(z, settings.randomness, settings.seed, n_starts)
    interval = settings.robust_interval
    # Lanes are refilled at these strides only, so that their weights are renewed in step.
    stride = interval * math.ceil(_STRIDE / interval) if settings.robust else _STRIDE

    def advance(state: State, voxels: Voxels) -> State:
        for k in range(1, stride + 1):
            state = State(*call(state, voxels))
            if settings.robust and k % interval == 0:
                state = step.reweigh(state, voxels)
        return state

    most = settings.lanes or _lanes(kernel, settings.compiled)
    lanes = Lanes(problem, z, most, step.load, advance, step.outcome, length=stride)
    return lanes.run()


class Term(Protocol):
    """A term of an objective that couples voxels."""

    def value(self, x: Tensor) -> Tensor:
        """Return the term, 0-d, at solver coordinates (parameters, voxels)."""

    def gradient(self, x: Tensor) -> Tensor:
        """Return its derivative, of the shape of x."""


@dataclass(frozen=True)
class Whole:
    """Where the minimisation of a coupled objective ended.

    Attributes
    ----------
    final, lowest
        (parameters, voxels) in solver coordinates: the last position, and that of the lowest
        objective on the way.
    trace
        The objective at each iteration.
    converged
        Whether a criterion ended it, not the number of iterations.
    """

    final: Tensor
    lowest: Tensor
    trace: list[float]
    converged: bool

    def position(self, output: str) -> Tensor:
        """Return the position that the option `output` ("min" or "final") chooses."""
        return self.final if output == "final" else self.lowest


Blocks = Sequence[tuple[slice, Voxels]]


def minimise_whole(
    kernel: Kernel,
    blocks: Blocks,
    start: Tensor,
    unit: Tensor,
    terms: Sequence[Term],
    settings: GradientSettings,
    report: Callable[[float], None] = lambda share: None,
) -> Whole:
    """Minimise J = sum over voxels of cost / unit + sum of terms, all voxels moving together.

    One schedule of the step size and one end for all. The criteria see J per voxel and root mean
    squares over voxels of gradients and steps, so that they mean the same for any number of them.

    Parameters
    ----------
    kernel
        Gives the costs.
    blocks
        The voxels, as slices of the last axis of `start` with their data; together they are all.
    start
        (parameters, voxels) in solver coordinates.
    unit
        (voxels,) what the costs are divided by, such as `loss_unit` or the noise variance.
    terms
        See `Term`.
    settings
        The `robust` option is for single voxels only.
    report
        Called with the share of the iterations done.

    Raises
    ------
    EngineError
        The robust option is on.
    """
    if settings.robust:
        raise EngineError("The option robust is not available for objectives that couple voxels.")
    transform = Transform(kernel, settings.transform)
    z = transform.inverse(start)
    if settings.randomness:
        z = transform.scattered(z, settings.randomness, settings.seed, 1)
    # Models make their tables at their first call, which compilation would stop at.
    kernel.signal(transform(z[:, :1])[0], blocks[0][1].take(slice(0, 1)).inputs)
    objective = _Coupled(kernel, blocks, unit, terms, settings)
    criteria = Criteria(settings, torch.empty(0, dtype=torch.float64, device=z.device))
    share = torch.ones(1, dtype=torch.float64, device=z.device) / z.shape[1]
    watch, moments = criteria.start(share), (torch.zeros_like(z), torch.zeros_like(z))
    lowest, least, trace, met = z, math.inf, [], False
    for iteration in range(1, settings.iterations + 1):
        position, stretch = transform(z)
        total, gradient = objective(position)
        gradient = transform.projected(z, gradient * stretch)
        trace.append(float(total))
        if trace[-1] < least:
            lowest, least = z, trace[-1]
        count = torch.full_like(share, iteration)
        watch, ended = criteria(watch, total * share, _length(gradient), count)
        met = bool(ended)
        near = bool(_is_near(total * share, least * share))
        report(iteration / settings.iterations)
        if met or not math.isfinite(trace[-1]) or iteration == settings.iterations:
            break
        moved, moments = settings.update(z, gradient, moments, count.to(z.dtype))
        moved = transform.clamp(moved)
        watch = watch._replace(moved=_length(moved - z) / (1 + _length(z)))
        z = moved
    report(1.0)
    return Whole(transform.end(z), transform.end(lowest), trace, met and near)


def _length(columns: Tensor) -> Tensor:
    """Return the root mean square over voxels of the 2-norms of (parameters, voxels), (1,)."""
    return (columns.double() ** 2).sum(0).mean().sqrt()[None]


class _Coupled:
    """Value and gradient of a coupled objective, tile by tile."""

    def __init__(
        self,
        kernel: Kernel,
        blocks: Blocks,
        unit: Tensor,
        terms: Sequence[Term],
        settings: GradientSettings,
    ) -> None:
        def evaluate(position: Tensor, voxels: Voxels, unit: Tensor) -> tuple[Tensor, Tensor]:
            return loss_and_gradient(kernel, position, voxels, unit)

        self.terms = terms
        self.evaluate = (
            kernel.compile("whole", evaluate, once=True) if settings.compiled else evaluate
        )
        size = settings.lanes or default_lanes(kernel, compiled=False)
        self.tiles: list[tuple[Tensor, int, Voxels, Tensor]] = []
        for where, voxels in blocks:
            n = voxels.data.shape[-1]
            first = where.start or 0
            for begin in range(0, n, size):
                # A compiled function is bound to its shapes: the last tile repeats its last voxel.
                stop = begin + size if settings.compiled else min(begin + size, n)
                index = torch.arange(begin, stop, device=unit.device).clamp_max(n - 1)
                tile = first + index
                used = min(begin + size, n) - begin
                self.tiles.append((tile, used, voxels.take(index), unit[tile]))

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return J, 0-d in double precision, and its gradient (parameters, voxels)."""
        total = position.new_zeros((), dtype=torch.float64)
        gradient = torch.empty_like(position)
        for tile, used, voxels, unit in self.tiles:
            loss, slope = self.evaluate(position[:, tile], voxels, unit)
            total = total + loss[:used].double().sum()
            gradient[:, tile[:used]] = slope[:, :used]
        for term in self.terms:
            total = total + term.value(position).double()
            gradient = gradient + term.gradient(position)
        return total, gradient


# Thousands of evaluations, where Levenberg-Marquardt takes one or two dozen.
_EFFORT = 50


def _kept(n: int) -> int:
    return 5 * n + 24


def _lanes(kernel: Kernel, compiled: bool) -> int:
    small = compiled and kernel.device.type == "cpu"
    return _COMPILED_LANES if small else default_lanes(kernel, compiled)


ADAM = Solver(solve, AdamSettings, kept=_kept, lanes=_lanes, effort=_EFFORT)
SGDM = Solver(solve, SgdmSettings, kept=_kept, lanes=_lanes, effort=_EFFORT)
RMSPROP = Solver(solve, RmspropSettings, kept=_kept, lanes=_lanes, effort=_EFFORT)
