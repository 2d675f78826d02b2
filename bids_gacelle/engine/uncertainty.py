"""Standard deviations and the flags that say when not to trust them, in double precision."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.derivatives import voxelwise_gradients
from bids_gacelle.engine.kernels import (
    Kernel,
    SharedFactor,
    Voxels,
    packed,
    settle,
    span,
    unpack,
)
from bids_gacelle.engine.objective import LOSS_VARIANCE
from bids_gacelle.engine.physics import rician
from bids_gacelle.engine.solvers.base import Solution

# An end of another start counts as a minimum of its own when its chi-square is within this ...
RIVAL_DEPTH = 1.0
# ... although the curvature at the best end predicts that it lies this much higher.
RIVAL_RISE = 9.0


# What those before it leave of the information on a parameter, scaled to 1: below this it has no
# estimate of its own in double precision.
_LEAST_PIVOT = 1e-14
# A direction along which the signal does not change has parts, scaled likewise, above this.
_LEAST_PART = 1e-6
# Voxels assessed at once: tensors of double precision that stay in a processor's cache ...
_AT_ONCE = 1024
_AT_ONCE_COMPILED = 8192
# ... or keep a GPU busy.
_AT_ONCE_CUDA = 1 << 16


class Assessment(NamedTuple):
    """Facts about the end point of each voxel.

    Attributes
    ----------
    squares, power
        (voxels,) mean squared residual and mean squared data.
    chi2
        (voxels,) sum of squares over noise variance and degrees of freedom; it tells nothing where
        the noise was taken from the residuals.
    at_bound
        (parameters, voxels) bool.
    covariance
        (parameters, parameters, voxels) in solver coordinates, conditional on the parameters at a
        bound (their rows are 0), and on those that the signal does not determine (NaN on their
        diagonal); NaN everywhere where the noise is unknown.
    rivals
        (voxels,) bool: another minimum is about as deep.
    """

    squares: Tensor
    power: Tensor
    chi2: Tensor
    at_bound: Tensor
    covariance: Tensor
    rivals: Tensor


class Moments(NamedTuple):
    """Sums over the measurements of a voxel, and what its covariance is made of.

    Attributes
    ----------
    squares, weighted, power
        (voxels,) mean squared residual, sum of squares weighted by inverse variance, mean squared
        data.
    at_bound
        (parameters, voxels) bool.
    information
        (packed, voxels) what the estimate minimises, curvature at the expected data.
    inverse
        (parameters, parameters, voxels) of the information on the parameters at no bound; rows of
        the others, and of those without an estimate of their own, are 0.
    undetermined
        (parameters, voxels) bool: others can make up for the parameter, or it has no influence.
    noise
        (packed, voxels) covariance of its gradient at unit noise variance. It equals the
        information unless measurements are emphasised.
    shared
        (groups, parameters, voxels) gradient that a relative change of the signals of a group
        makes; no groups where no noise is shared.
    """

    squares: Tensor
    weighted: Tensor
    power: Tensor
    at_bound: Tensor
    information: Tensor
    inverse: Tensor
    undetermined: Tensor
    noise: Tensor
    shared: Tensor


class Assessor:
    """Judges solutions of one model in double precision, compiled when asked for.

    On a GPU `lanes` voxels at once, if that many fit.
    """

    def __init__(self, kernel: Kernel, *, compiled: bool, lanes: int) -> None:
        self.kernel, self.compiled = kernel, compiled
        on_gpu = kernel.device.type == "cuda"
        most = _AT_ONCE_COMPILED if compiled else _AT_ONCE
        self.at_once = max(min(lanes, _AT_ONCE_CUDA), _AT_ONCE) if on_gpu else most
        self._moments = kernel.compile("moments", self.moments) if compiled else self.moments

    def assess(
        self, voxels: Voxels, solution: Solution, shared: SharedFactor | None = None
    ) -> Iterator[tuple[slice, Solution, Assessment]]:
        """Yield slices of the voxels with their solution and assessment, in double precision."""
        n = voxels.data.shape[-1]
        for begin in range(0, n, self.at_once):
            count = min(self.at_once, n - begin)
            where = slice(begin, begin + count)
            common = None if shared is None else shared.take(where)
            ended = solution.take(where)
            moments = self._moments(
                span(solution.position, begin, self.at_once),
                voxels.span(begin, self.at_once),
                _membership(shared, voxels),
            )
            moments = Moments(*(m[..., :count] for m in moments))
            yield where, ended, self._judge(voxels.take(where), ended, moments, common)

    def moments(self, position: Tensor, voxels: Voxels, membership: Tensor) -> Moments:
        """Return the sums over measurements; `membership` is (groups, measurements, 1)."""
        kernel = self.kernel
        expected, columns = kernel.expected(position, voxels)
        counted = voxels.counted()
        squares = counted * (expected - voxels.data) ** 2
        weight = voxels.weight
        information, noise = self._weights(expected, voxels)
        pairs = packed(len(columns))

        def gram(factor: Tensor | None) -> list[Tensor]:
            rows = columns if factor is None else [c * factor for c in columns]
            return [(rows[i] * columns[j]).sum(0) for i, j in pairs]

        inner = gram(information)
        middle = inner if noise is information else gram(noise)
        if voxels.stiffness is not None:
            pull = voxels.stiffness.unbind(0)
            inner = [h + pull[i] if i == j else h for h, (i, j) in zip(inner, pairs, strict=True)]
            middle = [
                h + pull[i] if i == j else h for h, (i, j) in zip(middle, pairs, strict=True)
            ]
        moved = expected if information is None else expected * information
        pulls = [
            torch.stack([(column * (moved * member)).sum(0) for column in columns])
            for member in membership.unbind(0)
        ]
        at_bound = _at_bound(kernel, position)
        return Moments(
            squares.sum(0) / counted.sum(0),
            (squares if weight is None else squares * weight).sum(0),
            (counted * voxels.data**2).sum(0) / counted.sum(0),
            at_bound,
            torch.stack(inner),
            *_inverse(inner, ~at_bound),
            torch.stack(middle),
            torch.stack(pulls) if pulls else position.new_zeros(0, *position.shape),
        )

    def _weights(self, expected: Tensor, voxels: Voxels) -> tuple[Tensor | None, Tensor | None]:
        """Return weights (measurements, voxels) of the information and of the gradient's noise."""
        weight = voxels.weight
        if self.kernel.objective.noise == "rician" and self.kernel.averages is None:
            # What the mean of a magnitude tells of its signal: a little less than all.
            variance = voxels.channel_variance
            assert variance is not None
            _, slope = rician.mean(expected, variance)
            told = slope**2 * variance / rician.spread(expected, variance)
            weight = told if weight is None else weight * told
        if voxels.emphasis is None:
            return weight, weight
        stressed = voxels.emphasis if weight is None else voxels.emphasis * weight
        return stressed, voxels.emphasis * stressed

    def _judge(
        self, voxels: Voxels, solution: Solution, moments: Moments, shared: SharedFactor | None
    ) -> Assessment:
        degrees = voxels.counted().sum(0) - (~moments.at_bound).sum(0)
        from_residuals = moments.weighted / torch.where(degrees > 0, degrees, torch.nan)
        variance = voxels.noise_variance
        if variance is None:
            variance = from_residuals
        inverse = moments.inverse
        if solution.slopes is not None:
            covariance = variance * _propagated(solution.slopes, voxels)
        elif voxels.emphasis is None:
            covariance = variance * inverse
        else:
            covariance = variance * _between(inverse, unpack(moments.noise))
        covariance = covariance * LOSS_VARIANCE[self.kernel.objective.loss]
        if shared is not None:
            covariance = covariance + self._shared(shared, solution, voxels, moments)
        if solution.slopes is None:
            diagonal = torch.diagonal(covariance, dim1=0, dim2=1).T
            diagonal.masked_fill_(moments.undetermined, torch.nan)
        return Assessment(
            squares=moments.squares,
            power=moments.power,
            chi2=from_residuals / variance,
            at_bound=moments.at_bound,
            covariance=covariance,
            rivals=_rivals(moments.information, variance, solution),
        )

    def _shared(
        self,
        shared: SharedFactor,
        solution: Solution,
        voxels: Voxels,
        moments: Moments,
    ) -> Tensor:
        """Return what shared noise adds to the covariance (P, P, V), to first order.

        A factor 1 + e of group g moves the estimate by e c_g, where c_g is the sum over the
        measurements of the group of slope (derivative of the estimate by the data) times signal.
        """
        if solution.slopes is None:
            shifts = torch.einsum("pqv,gqv->gpv", moments.inverse, moments.shared)
        else:
            moved = solution.slopes * self.kernel.signal(solution.position, voxels.inputs)
            groups = range(len(shared.sigma))
            shifts = torch.stack([moved[:, shared.group == g].sum(1) for g in groups])
        shifts = shifts * shared.sigma[:, None]
        return torch.einsum("gpv,gqv->pqv", shifts, shifts)


def _membership(shared: SharedFactor | None, voxels: Voxels) -> Tensor:
    """Return (groups, measurements, 1), 1 where a measurement belongs to a group."""
    if shared is None:
        return voxels.data.new_zeros(0, len(voxels.data), 1)
    groups = torch.arange(len(shared.sigma), device=shared.group.device)
    return (shared.group == groups[:, None]).to(voxels.data.dtype)[..., None]


def _between(inverse: Tensor, middle: Tensor) -> Tensor:
    """Return inverse x middle x inverse of (P, P, V) matrices."""
    return torch.einsum("pqv,qrv,rsv->psv", inverse, middle, inverse)


def _at_bound(kernel: Kernel, position: Tensor) -> Tensor:
    """Tell which parameters are at (or, for closed forms, beyond) a bound."""
    # Single precision stores bounds in log coordinates inexactly.
    margin = torch.nan_to_num(1e-6 * (kernel.upper - kernel.lower), posinf=0.0)
    return (position <= kernel.lower + margin) | (position >= kernel.upper - margin)


def _inverse(information: list[Tensor], free: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse (P, P, V) of a packed matrix over the free parameters.

    Rows of the others are 0. The sweep operator (Beaton 1964) on every parameter of the matrix
    scaled to a unit diagonal, elementwise over voxels: for so small matrices several times faster
    than a library call. A parameter that those before it leave no information on is not swept; the
    coefficients of its regression on them then tell which of them it can make up for. They are the
    other parameters returned, (P, V), as undetermined.
    """
    n = len(free)
    rows = dict(zip(packed(n), information, strict=True))
    sizes = [rows[k, k] for k in range(n)]
    scale = [
        torch.where(f & (size > 0), size, 1.0).rsqrt() * f
        for f, size in zip(free, sizes, strict=True)
    ]
    rows = {(i, j): entry * (scale[i] * scale[j]) for (i, j), entry in rows.items()}
    swept = []
    for k in range(n):
        swept.append(free[k] & ~(rows[k, k] <= _LEAST_PIVOT))
        inverse = torch.where(swept[k], 1 / rows[k, k], 0.0)
        row = [rows[min(k, j), max(k, j)] for j in range(n)]
        factor = [r * inverse for r in row]
        for i, j in rows:
            if k not in (i, j):
                rows[i, j] = rows[i, j] - factor[i] * row[j]
        for j in range(n):
            new = factor[j] if j != k else -inverse
            rows[min(k, j), max(k, j)] = torch.where(swept[k], new, row[j])
        if torch.compiler.is_compiling():
            rows = {place: settle(entry) for place, entry in rows.items()}
    undetermined = [f & ~s for f, s in zip(free, swept, strict=True)]
    unswept = list(undetermined)
    for i, j in itertools.combinations(range(n), 2):
        part = rows[i, j].abs() > _LEAST_PART
        undetermined[i] = undetermined[i] | (unswept[j] & swept[i] & part)
        undetermined[j] = undetermined[j] | (unswept[i] & swept[j] & part)
    known = {
        (i, j): torch.where(swept[i] & swept[j], -entry * (scale[i] * scale[j]), 0.0)
        for (i, j), entry in rows.items()
    }
    full = [known[min(i, j), max(i, j)] for i in range(n) for j in range(n)]
    return torch.stack(full).unflatten(0, (n, n)), torch.stack(undetermined)


def _propagated(slopes: Tensor, voxels: Voxels) -> Tensor:
    """Return the covariance (P, P, V) that noise of unit variance at weight 1 leads to."""
    scaled = slopes if voxels.weight is None else slopes / voxels.weight.sqrt()
    return (scaled[:, None] * scaled).sum(2)


def _rivals(information: Tensor, variance: Tensor, solution: Solution) -> Tensor:
    """Tell where another start ended as deep in a place the curvature of the best excludes."""
    rival = torch.zeros_like(variance, dtype=torch.bool)
    if len(solution.ends) == 1:
        return rival
    hessian = unpack(information)
    best = solution.end_costs.amin(0)
    for end, cost in zip(solution.ends, solution.end_costs, strict=True):
        offset = end.to(hessian.dtype) - solution.position
        rise = (offset[:, None] * hessian * offset).sum((0, 1)) / variance
        depth = 2 * (cost - best).to(hessian.dtype) / variance
        rival |= (depth < RIVAL_DEPTH) & (rise - depth > RIVAL_RISE)
    return rival


def standard_deviations(
    kernel: Kernel, position: Tensor, at_bound: Tensor, covariance: Tensor
) -> dict[str, Tensor]:
    """Return standard deviations by name in each parameter's own unit, derived ones included.

    First-order propagation from the solver's coordinates. NaN for a parameter at a bound and for a
    derived quantity that depends on one: what is conditional on the bound would look too certain.

    Parameters
    ----------
    kernel
        In double precision.
    position
        (parameters, voxels) in solver coordinates.
    at_bound, covariance
        See `Assessment`.
    """
    names = kernel.model.parameter_names
    variance = torch.diagonal(covariance, dim1=0, dim2=1).T
    out = {}
    params = kernel.parameters(position)
    for i, name in enumerate(names):
        sd = variance[i].sqrt() * (params[name] if kernel.logs[i] else 1)
        out[name] = torch.where(at_bound[i], torch.nan, sd)
    if not kernel.model.derived:
        return out
    slopes = voxelwise_gradients(lambda z: kernel.model.derive(kernel.parameters(z)), position)
    for name in kernel.model.derived_names:
        gradient = slopes[name]
        weighed = torch.where(gradient != 0, covariance * gradient, 0.0)
        total = (weighed.sum(1) * gradient).sum(0)
        total = torch.where((at_bound & (gradient != 0)).any(0), torch.nan, total)
        out[name] = torch.where(total > 0, total, torch.nan).sqrt()
    return out
