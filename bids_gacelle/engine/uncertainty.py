"""Standard deviations and the flags that say when not to trust them, in double precision."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.derivatives import voxelwise_gradients
from bids_gacelle.engine.kernels import Kernel, Voxels, packed, settle, unpack
from bids_gacelle.engine.objective import LOSS_VARIANCE
from bids_gacelle.engine.physics import rician

# An end of another start counts as a minimum of its own when its chi-square is within this ...
RIVAL_DEPTH = 1.0
# ... although the curvature at the best end predicts that it lies this much higher.
RIVAL_RISE = 9.0
# What those before it leave of the information on a parameter, scaled to 1: below this it has no
# estimate of its own in double precision.
_LEAST_PIVOT = 1e-14
# A direction along which the signal does not change has parts, scaled likewise, above this.
_LEAST_PART = 1e-6


class EndPoints(NamedTuple):
    """Voxels whose fit has ended, all with voxels on the last axis, in double precision.

    Attributes
    ----------
    position
        (parameters, voxels) in solver coordinates.
    voxels
        Their data.
    common
        (groups, voxels) relative standard deviations of factors that measurements share, or None.
    slopes
        As in `Solution`, or None.
    ends, end_costs
        As in `Solution`; None of a single start.
    """

    position: Tensor
    voxels: Voxels
    common: Tensor | None = None
    slopes: Tensor | None = None
    ends: Tensor | None = None
    end_costs: Tensor | None = None


class Assessment(NamedTuple):
    """Facts about the end point of each voxel.

    What is true or not is 1 or 0 in double precision: compiled code of that precision works on
    truth values one by one.

    Attributes
    ----------
    squares, power
        (voxels,) mean squared residual and mean squared data.
    chi2
        (voxels,) sum of squares over noise variance and degrees of freedom; it tells nothing where
        the noise was taken from the residuals.
    at_bound
        (parameters, voxels).
    covariance
        (parameters, parameters, voxels) in solver coordinates, conditional on the parameters at a
        bound (their rows are 0), and on those that the signal does not determine (NaN on their
        diagonal); NaN everywhere where the noise is unknown.
    rivals
        (voxels,): another minimum is about as deep.
    """

    squares: Tensor
    power: Tensor
    chi2: Tensor
    at_bound: Tensor
    covariance: Tensor
    rivals: Tensor


def assess(kernel: Kernel, ended: EndPoints, group: Tensor | None = None) -> Assessment:
    """Return the facts about the end points of voxels.

    Parameters
    ----------
    kernel
        In double precision.
    ended
        The voxels.
    group
        (measurements,) the factor of each measurement, where they share some.
    """
    position, voxels = ended.position, ended.voxels
    expected, columns = kernel.expected(position, voxels)
    counted = voxels.counted()
    n = counted.sum(0)
    squares = counted * (expected - voxels.data) ** 2
    weighted = (squares if voxels.weight is None else squares * voxels.weight).sum(0)
    information, noise = _weights(kernel, expected, voxels)
    pairs = packed(len(columns))

    def gram(factor: Tensor | None) -> list[Tensor]:
        rows = columns if factor is None else [c * factor for c in columns]
        sums = [(rows[i] * columns[j]).sum(0) for i, j in pairs]
        if voxels.stiffness is None:
            return sums
        pull = voxels.stiffness.unbind(0)
        return [h + pull[i] if i == j else h for h, (i, j) in zip(sums, pairs, strict=True)]

    # What the estimate minimises, curvature at the expected data.
    inner = gram(information)
    at_bound = _at_bound(kernel, position)
    inverse, undetermined = _inverse(inner, list((1 - at_bound).unbind(0)))
    degrees = n - (1 - at_bound).sum(0)
    from_residuals = weighted / torch.where(degrees > 0, degrees, torch.nan)
    variance = from_residuals if voxels.noise_variance is None else voxels.noise_variance
    if ended.slopes is not None:
        covariance = variance * _propagated(ended.slopes, voxels)
    elif voxels.emphasis is None:
        covariance = variance * inverse
    else:
        # The gradient's noise equals the information unless measurements are emphasised.
        covariance = variance * _between(inverse, unpack(torch.stack(gram(noise))))
    covariance = covariance * LOSS_VARIANCE[kernel.objective.loss]
    if ended.common is not None and group is not None:
        moved = expected if information is None else expected * information
        members = [(group == g).to(moved.dtype)[:, None] for g in range(len(ended.common))]
        if ended.slopes is None:
            pulls = [
                torch.stack([(column * (moved * member)).sum(0) for column in columns])
                for member in members
            ]
            shifts = torch.einsum("pqv,gqv->gpv", inverse, torch.stack(pulls))
        else:
            moved = ended.slopes * kernel.signal(position, voxels.inputs)
            shifts = torch.stack([(moved * member).sum(1) for member in members])
        covariance = covariance + _shared(shifts, ended.common)
    if ended.slopes is None:
        identity = torch.eye(len(columns), dtype=position.dtype, device=position.device)
        unknown = identity[..., None] * undetermined
        covariance = torch.where(unknown > 0, torch.nan, covariance)
    return Assessment(
        squares=squares.sum(0) / n,
        power=(counted * voxels.data**2).sum(0) / n,
        chi2=from_residuals / variance,
        at_bound=at_bound,
        covariance=covariance,
        rivals=_rivals(inner, variance, ended),
    )


def _weights(
    kernel: Kernel, expected: Tensor, voxels: Voxels
) -> tuple[Tensor | None, Tensor | None]:
    """Return weights (measurements, voxels) of the information and of the gradient's noise."""
    weight = voxels.weight
    if kernel.objective.noise == "rician" and kernel.averages is None:
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


def _shared(shifts: Tensor, common: Tensor) -> Tensor:
    """Return what shared noise adds to the covariance (P, P, V), to first order.

    A factor 1 + e of group g moves the estimate by e c_g. `shifts` are these c_g, (groups, P, V):
    sums over the measurements of a group of slope (derivative of the estimate by the data) times
    signal.
    """
    shifts = shifts * common[:, None]
    return torch.einsum("gpv,gqv->pqv", shifts, shifts)


def _between(inverse: Tensor, middle: Tensor) -> Tensor:
    """Return inverse x middle x inverse of (P, P, V) matrices."""
    return torch.einsum("pqv,qrv,rsv->psv", inverse, middle, inverse)


def _at_bound(kernel: Kernel, position: Tensor) -> Tensor:
    """Tell which parameters are at (or, for closed forms, beyond) a bound, (P, V), 1 or 0."""
    # Single precision stores bounds in log coordinates inexactly.
    margin = torch.nan_to_num(1e-6 * (kernel.upper - kernel.lower), posinf=0.0)
    none = torch.zeros_like(position)
    above = torch.where(position >= kernel.upper - margin, 1.0, none)
    return torch.where(position <= kernel.lower + margin, 1.0, above)


def _inverse(information: list[Tensor], free: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the inverse (P, P, V) of a packed matrix over the free parameters.

    Rows of the others are 0. The sweep operator (Beaton 1964) on every parameter of the matrix
    scaled to a unit diagonal, elementwise over voxels: for so small matrices several times faster
    than a library call. A parameter that those before it leave no information on is not swept; the
    coefficients of its regression on them then tell which of them it can make up for. They are the
    other parameters returned, (P, V), as undetermined. `free` and they are 1 or 0.
    """
    n = len(free)
    rows = dict(zip(packed(n), information, strict=True))
    sizes = [rows[k, k] for k in range(n)]
    scale = [
        torch.where(size > 0, size, 1.0).rsqrt() * f for f, size in zip(free, sizes, strict=True)
    ]
    rows = {(i, j): entry * (scale[i] * scale[j]) for (i, j), entry in rows.items()}
    swept: list[Tensor] = []
    for k in range(n):
        swept.append(torch.where(rows[k, k] <= _LEAST_PIVOT, 0.0, free[k]))
        chosen = swept[k] > 0
        inverse = torch.where(chosen, 1 / rows[k, k], 0.0)
        row = [rows[min(k, j), max(k, j)] for j in range(n)]
        factor = [r * inverse for r in row]
        for i, j in rows:
            if k not in (i, j):
                rows[i, j] = rows[i, j] - factor[i] * row[j]
        for j in range(n):
            new = factor[j] if j != k else -inverse
            rows[min(k, j), max(k, j)] = torch.where(chosen, new, row[j])
        if torch.compiler.is_dynamo_compiling():
            rows = {place: settle(entry) for place, entry in rows.items()}
    unswept = [f - s for f, s in zip(free, swept, strict=True)]
    undetermined = list(unswept)
    for i, j in itertools.combinations(range(n), 2):
        part = torch.where(rows[i, j].abs() > _LEAST_PART, 1.0, torch.zeros_like(free[i]))
        undetermined[i] = torch.maximum(undetermined[i], unswept[j] * swept[i] * part)
        undetermined[j] = torch.maximum(undetermined[j], unswept[i] * swept[j] * part)
    known = {
        (i, j): torch.where(swept[i] * swept[j] > 0, -entry * (scale[i] * scale[j]), 0.0)
        for (i, j), entry in rows.items()
    }
    full = [known[min(i, j), max(i, j)] for i in range(n) for j in range(n)]
    return torch.stack(full).unflatten(0, (n, n)), torch.stack(undetermined)


def _propagated(slopes: Tensor, voxels: Voxels) -> Tensor:
    """Return the covariance (P, P, V) that noise of unit variance at weight 1 leads to."""
    scaled = slopes if voxels.weight is None else slopes / voxels.weight.sqrt()
    return (scaled[:, None] * scaled).sum(2)


def _rivals(information: list[Tensor], variance: Tensor, ended: EndPoints) -> Tensor:
    """Tell where another start ended as deep in a place the curvature of the best excludes."""
    rival = torch.zeros_like(variance)
    if ended.ends is None or ended.end_costs is None:
        return rival
    hessian = unpack(torch.stack(information))
    best = ended.end_costs.amin(0)
    for end, cost in zip(ended.ends.unbind(0), ended.end_costs.unbind(0), strict=True):
        offset = end - ended.position
        rise = (offset[:, None] * hessian * offset).sum((0, 1)) / variance
        depth = 2 * (cost - best) / variance
        apart = torch.where(rise - depth > RIVAL_RISE, 1.0, rival)
        rival = torch.where(depth < RIVAL_DEPTH, apart, rival)
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
        out[name] = torch.where(at_bound[i] > 0, torch.nan, sd)
    if not kernel.model.derived:
        return out
    slopes = voxelwise_gradients(lambda z: kernel.model.derive(kernel.parameters(z)), position)
    for name in kernel.model.derived_names:
        gradient = slopes[name]
        weighed = torch.where(gradient != 0, covariance * gradient, 0.0)
        total = (weighed.sum(1) * gradient).sum(0)
        conditional = torch.where(gradient != 0, at_bound, 0.0).amax(0)
        total = torch.where(conditional > 0, torch.nan, total)
        out[name] = torch.where(total > 0, total, torch.nan).sqrt()
    return out
