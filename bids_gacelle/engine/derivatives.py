"""Derivatives by automatic differentiation, for what has no analytic ones."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FORWARD = threading.RLock()
"""Held while torch differentiates forward: its levels belong to the process, not to a thread."""


def directional(
    function: Callable[..., Tensor], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return a function's value and its derivative along `tangents` (forward mode)."""
    result: tuple[Any, ...]
    if torch.compiler.is_dynamo_compiling():
        # Compilation stops at a lock or a change of the warning filters and leaves the rest
        # uncompiled; who compiles holds the lock.
        result = torch.func.jvp(function, values, tangents)
        return result[0], result[1]
    with FORWARD, warnings.catch_warnings():
        # torch loads its own forward rules through an interface that it deprecates itself.
        warnings.filterwarnings(
            "ignore", message=".*torch.jit.script", category=DeprecationWarning
        )
        result = torch.func.jvp(function, values, tangents)
    return result[0], result[1]


def voxelwise_gradients(
    function: Callable[[Tensor], dict[str, Tensor]], point: Tensor
) -> dict[str, Tensor]:
    """Return the gradient of each output of a function that treats voxels independently.

    One reverse pass per output; voxels do not mix, so the gradient of the sum over voxels holds
    the gradient of each.

    Parameters
    ----------
    function
        From (n, voxels) to named outputs of shape (voxels,).
    point
        Where to differentiate, (n, voxels).

    Returns
    -------
    {name: (n, voxels)}
    """
    if torch.compiler.is_dynamo_compiling():  # uncompiled this takes three times as long
        found, pull = torch.func.vjp(function, point)[:2]
        nothing = {name: torch.zeros_like(value) for name, value in found.items()}
        return {
            name: pull(nothing | {name: torch.ones_like(value)})[0]
            for name, value in found.items()
        }
    with torch.enable_grad():
        variable = point.detach().requires_grad_()
        outputs = function(variable)
        return {
            name: torch.autograd.grad(output.sum(), variable, retain_graph=True)[0]
            for name, output in outputs.items()
        }
