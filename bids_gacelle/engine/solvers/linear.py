"""Closed-form estimates of models that have one, in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from bids_gacelle.engine.derivatives import voxelwise_gradients
from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.solvers.base import Problem, Solution, Solver


def solve(problem: Problem) -> Solution:
    """Return the model's closed-form estimate; no bounds apply.

    Its slopes let the noise of the measurements be propagated through the estimator itself, which
    is no least-squares fit of the signal.

    Raises
    ------
    EngineError
        The model has no closed form, or a prior, other noise or another loss was asked for.
    """
    kernel, voxels = problem.exact, problem.exact_voxels
    if kernel.objective.prior is not None:
        raise EngineError("The linear solver takes no prior: use solver 'lm'.")
    noise, loss = kernel.objective.noise, kernel.objective.loss
    if noise != "gaussian" or loss != "l2":
        raise EngineError(
            f"The linear solver takes no {noise} noise with {loss} loss, only Gaussian noise with "
            "l2: use solver 'lm'."
        )

    names = kernel.model.parameter_names

    def estimate(data: Tensor) -> dict[str, Tensor]:
        position = kernel.coordinates(kernel.model.closed_form(data, voxels.inputs))
        return dict(zip(names, position, strict=True))

    position = torch.stack(list(estimate(voxels.data).values()))
    slopes = torch.stack(list(voxelwise_gradients(estimate, voxels.data).values()))
    n_voxels = position.shape[1]
    valid = position.isfinite().all(0)
    count = torch.ones(n_voxels, dtype=torch.int32, device=kernel.device)
    problem.report(1.0)
    return Solution(
        position=torch.where(valid, position, torch.nan),
        converged=valid,
        evaluations=count,
        winner=torch.zeros_like(count),
        ends=position[None],
        end_costs=torch.zeros(1, n_voxels, dtype=position.dtype, device=kernel.device),
        slopes=slopes,
    )


LINEAR = Solver(solve, kept=lambda n: 2 * n, copies=8)
