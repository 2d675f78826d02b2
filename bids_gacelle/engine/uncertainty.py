"""Standard deviations and the flags that say when not to trust them, in double precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bids_gacelle.engine.derivatives import voxelwise_gradients
from bids_gacelle.engine.kernels import Kernel, SharedFactor, Voxels
from bids_gacelle.engine.solvers.base import Solution

# An end of another start counts as a minimum of its own when its chi-square is within this ...
RIVAL_DEPTH = 1.0
# ... although the curvature at the best end predicts that it lies this much higher.
RIVAL_RISE = 9.0


class Assessment(NamedTuple):
    """Facts about the end point of each voxel.

    Attributes
    ----------
    squares, power
        (voxels,) mean squared residual and mean squared data.
    at_bound
        (parameters, voxels) bool.
    covariance
        (parameters, parameters, voxels) in solver coordinates, conditional on the parameters at a
        bound (their rows are 0); NaN where the noise or the curvature leaves it undetermined.
    rivals
        (voxels,) bool: another minimum is about as deep.
    """

    squares: Tensor
    power: Tensor
    at_bound: Tensor
    covariance: Tensor
    rivals: Tensor


def assess(
    kernel: Kernel, voxels: Voxels, solution: Solution, shared: SharedFactor | None = None
) -> Assessment:
    """Judge a solution; `kernel`, `voxels` and `shared` are in double precision."""
    position = solution.position
    at_bound = _at_bound(kernel, position)
    free = ~at_bound
    residual = kernel.signal(position, voxels.inputs) - voxels.data
    weighted = residual if voxels.weight is None else residual * voxels.weight
    variance = voxels.noise_variance
    if variance is None:
        degrees = len(residual) - free.sum(0)
        variance = (weighted * residual).sum(0) / torch.where(degrees > 0, degrees, torch.nan)
    known = voxels._replace(noise_variance=variance)
    hessian = kernel.normal_equations(position, known).hessian
    inverse = _inverse(hessian, free)
    if solution.slopes is None:
        covariance = variance * inverse
    else:
        covariance = variance * _propagated(solution.slopes, voxels)
    if shared is not None:
        signal, columns = kernel.signal_and_jacobian(position, voxels.inputs)
        slopes = solution.slopes
        if slopes is None:
            slopes = _slopes(inverse, torch.stack(columns), voxels)
        covariance = covariance + _shared_covariance(shared, slopes, signal)
    return Assessment(
        squares=(residual**2).mean(0),
        power=(voxels.data**2).mean(0),
        at_bound=at_bound,
        covariance=covariance,
        rivals=_rivals(hessian, variance, solution),
    )


def _at_bound(kernel: Kernel, position: Tensor) -> Tensor:
    """Tell which parameters are at (or, for closed forms, beyond) a bound."""
    # Single precision stores bounds in log coordinates inexactly.
    margin = torch.nan_to_num(1e-6 * (kernel.upper - kernel.lower), posinf=0.0)
    return (position <= kernel.lower + margin) | (position >= kernel.upper - margin)


def _inverse(hessian: Tensor, free: Tensor) -> Tensor:
    """Invert (P, P, V) over the free parameters; rows of the others are 0, NaN where singular."""
    n = len(hessian)
    matrix = hessian.permute(2, 0, 1)
    mask = free.T.to(matrix.dtype)
    scale = torch.diagonal(matrix, dim1=1, dim2=2).clamp_min(1e-300).rsqrt() * mask
    outer = scale[:, :, None] * scale[:, None]
    scaled = matrix * outer + torch.diag_embed(1 - mask)
    usable = scaled.isfinite().all(2).all(1)
    eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(torch.where(usable[:, None, None], scaled, eye))
    inverse = torch.cholesky_solve(eye.expand_as(scaled), factor) * outer
    return torch.where((usable & (info == 0))[:, None, None], inverse, torch.nan).permute(1, 2, 0)


def _slopes(inverse: Tensor, jacobian: Tensor, voxels: Voxels) -> Tensor:
    """Return H^-1 J^T W, derivatives (P, M, V) of a least-squares estimate by the data."""
    weighted = jacobian if voxels.weight is None else jacobian * voxels.weight
    return torch.einsum("pqv,qmv->pmv", inverse, weighted)


def _propagated(slopes: Tensor, voxels: Voxels) -> Tensor:
    """Return the covariance (P, P, V) that noise of unit variance at weight 1 leads to."""
    scaled = slopes if voxels.weight is None else slopes / voxels.weight.sqrt()
    return (scaled[:, None] * scaled).sum(2)


def _shared_covariance(shared: SharedFactor, slopes: Tensor, signal: Tensor) -> Tensor:
    """Return what shared noise adds to the covariance (P, P, V) of an estimate, to first order.

    A factor 1 + e of group g moves the estimate by e c_g, where c_g is the sum over the
    measurements of the group of slope (derivative of the estimate by the data) times signal.
    """
    moved = slopes * signal
    shifts = [
        sigma * moved[:, shared.group == number].sum(1)
        for number, sigma in enumerate(shared.sigma)
    ]
    return torch.stack([shift[:, None] * shift for shift in shifts]).sum(0)


def _rivals(hessian: Tensor, variance: Tensor, solution: Solution) -> Tensor:
    """Tell where another start ended as deep in a place the curvature of the best excludes."""
    rival = torch.zeros_like(variance, dtype=torch.bool)
    best = solution.end_costs.amin(0)
    for end, cost in zip(solution.ends, solution.end_costs, strict=True):
        offset = end.to(hessian.dtype) - solution.position
        rise = (offset[:, None] * hessian * offset).sum((0, 1)) / variance
        depth = 2 * (cost - best).to(hessian.dtype) / variance
        rival |= (depth < RIVAL_DEPTH) & (rise - depth > RIVAL_RISE)
    return rival


def standard_deviations(
    kernel: Kernel, position: Tensor, assessment: Assessment
) -> dict[str, Tensor]:
    """Return standard deviations by name in each parameter's own unit, derived ones included.

    First-order propagation from the solver's coordinates. NaN for a parameter at a bound and for a
    derived quantity that depends on one: what is conditional on the bound would look too certain.
    """
    names = kernel.model.parameter_names
    variance = torch.diagonal(assessment.covariance, dim1=0, dim2=1).T
    out = {}
    params = kernel.parameters(position)
    for i, name in enumerate(names):
        sd = variance[i].sqrt() * (params[name] if kernel.logs[i] else 1)
        out[name] = torch.where(assessment.at_bound[i], torch.nan, sd)
    if not kernel.model.derived:
        return out
    slopes = voxelwise_gradients(lambda z: kernel.model.derive(kernel.parameters(z)), position)
    for name in kernel.model.derived_names:
        gradient = slopes[name]
        total = (gradient[:, None] * assessment.covariance * gradient).sum((0, 1))
        total = torch.where((assessment.at_bound & (gradient != 0)).any(0), torch.nan, total)
        out[name] = torch.where(total > 0, total, torch.nan).sqrt()
    return out
