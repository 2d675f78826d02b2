"""Closed-form estimates of models that have one, in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from bids_gacelle.engine.solvers.base import Problem, Solution


def solve(problem: Problem) -> Solution:
    """Return the model's closed-form estimate; no bounds apply.

    The covariance is that of the estimator itself (first-order propagation of the measurement
    noise), not of a least-squares fit of the signal.

    Raises
    ------
    ValueError
        The model has no closed form, or a prior was asked for.
    """
    kernel, voxels = problem.exact, problem.exact_voxels
    if kernel.objective.prior is not None:
        raise ValueError("The linear solver takes no prior: use solver 'lm'.")

    def estimate(data: Tensor) -> Tensor:
        return kernel.coordinates(kernel.model.closed_form(data, voxels.inputs))

    data = voxels.data
    position = estimate(data)
    n, n_voxels = position.shape
    covariance = torch.zeros(n, n, n_voxels, dtype=data.dtype, device=data.device)
    for m in range(len(data)):
        unit = torch.zeros_like(data)
        unit[m] = 1
        _, slope = torch.func.jvp(estimate, (data,), (unit,))
        variance = 1 if voxels.weight is None else 1 / voxels.weight[m]
        covariance += slope[:, None] * slope * variance
    valid = position.isfinite().all(0)
    count = torch.ones(n_voxels, dtype=torch.int32, device=data.device)
    problem.report(1.0)
    return Solution(
        position=torch.where(valid, position, torch.nan),
        converged=valid,
        evaluations=count,
        winner=torch.zeros_like(count),
        ends=position[None],
        end_costs=torch.zeros(1, n_voxels, dtype=data.dtype, device=data.device),
        covariance=covariance,
    )
