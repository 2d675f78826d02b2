"""Least squares over the mixing weights of a few signals, in closed form.

The data y are compared with sum_k w_k S_k, w_k >= 0 and sum w_k = 1. The minimum is the lowest of
the stationary points of all faces of the simplex (corners, edges, triangles ...), of which there
are so few that all can be written down for any number of problems at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

MOST_SIGNALS = 4
# Relative to its diagonal; a smaller pivot is rounding error. Such a face is flat in a direction,
# and the faces around it hold a point that is as good.
_LEAST_PIVOT = 1e-5


class Mixing(NamedTuple):
    """Least-squares problems seen from the last signal S_K.

    Attributes
    ----------
    gram
        gram[i][j] = (S_i - S_K) . (S_j - S_K); tensors that broadcast to (...).
    slope
        slope[i] = (S_i - S_K) . (y - S_K), each (...).
    """

    gram: list[list[Tensor]]
    slope: list[Tensor]


class _Face(NamedTuple):
    """Squared distance to a face, less that to S_K, and the weights of all corners but the last.

    The cost is infinite where the lowest point lies outside the face.
    """

    cost: Tensor
    corners: tuple[int, ...]
    weights: list[Tensor]


def lowest_cost(problem: Mixing) -> Tensor:
    """Return min |y - sum w S|^2 - |y - S_K|^2 over the simplex, (...)."""
    faces = _faces(problem)
    lowest = next(faces).cost
    for face in faces:
        lowest = torch.minimum(lowest, face.cost)
    return lowest


def best_weights(problem: Mixing) -> Tensor:
    """Return the weights at the minimum, (K, ...)."""
    n = len(problem.slope) + 1
    shape = problem.slope[0].shape
    lowest = problem.slope[0].new_full(shape, torch.inf)
    best = problem.slope[0].new_full((n, *shape), 1 / n)
    for face in _faces(problem):
        weights = torch.zeros_like(best)
        for corner, weight in zip(face.corners, face.weights, strict=False):
            weights[corner] = weight
        weights[face.corners[-1]] = 1 - sum(face.weights)
        best = torch.where(face.cost < lowest, weights, best)
        lowest = torch.minimum(lowest, face.cost)
    return best


def _faces(problem: Mixing) -> Iterator[_Face]:
    """Go through all faces with two corners or more, corners being ends of edges."""
    last = len(problem.slope)
    for origin in range(last, 0, -1):
        gram, slope, base = _seen_from(origin, problem)
        for size in range(1, origin + 1):
            for corners in combinations(range(origin), size):
                cost, weights = _lowest_on_face(
                    [[gram[i][j] for j in corners] for i in corners], [slope[i] for i in corners]
                )
                yield _Face(cost if base is None else cost + base, (*corners, origin), weights)


def _seen_from(
    origin: int, problem: Mixing
) -> tuple[list[list[Tensor]], list[Tensor], Tensor | None]:
    """Return Gram matrix and slopes of the corners before another origin, and its own cost."""
    gram, slope = problem
    if origin == len(slope):
        return gram, slope, None
    own, before = gram[origin][origin], range(origin)
    moved = [
        [gram[i][j] - gram[i][origin] - gram[j][origin] + own for j in before] for i in before
    ]
    slopes = [slope[i] - slope[origin] + (own - gram[i][origin]) for i in before]
    return moved, slopes, own - 2 * slope[origin]


def _lowest_on_face(gram: list[list[Tensor]], slope: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return cost and weights of the lowest point: on an edge with its ends, else inside."""
    if len(slope) == 1:
        square, along = gram[0][0], slope[0]
        tiny = torch.finfo(along.dtype).tiny
        weight = (along / square.clamp_min(tiny)).clamp(0, 1)
        return weight * (weight * square - 2 * along), [weight]
    inverse = _inverse(gram)
    weights = [_dot(row, slope) for row in inverse]
    inside = torch.minimum(weights[0], weights[1])
    total = weights[0] + weights[1]
    for weight in weights[2:]:
        inside = torch.minimum(inside, weight)
        total = total + weight
    inside = (inside >= 0) & (total <= 1)
    return torch.where(inside, -_dot(weights, slope), torch.inf), weights


def _dot(first: list[Tensor], second: list[Tensor]) -> Tensor:
    total = first[0] * second[0]
    for a, b in zip(first[1:], second[1:], strict=True):
        total = torch.addcmul(total, a, b)
    return total


def _inverse(matrix: list[list[Tensor]]) -> list[list[Tensor]]:
    """Invert small symmetric matrices by elimination; NaN where they are singular."""
    n = len(matrix)
    one, zero = torch.ones_like(matrix[0][0]), torch.zeros_like(matrix[0][0])
    rows = [[*matrix[i], *(one if i == j else zero for j in range(n))] for i in range(n)]
    for i in range(n):
        pivot = rows[i][i]
        sound = pivot > _LEAST_PIVOT * matrix[i][i]
        scale = torch.where(sound, 1 / pivot, torch.nan)
        rows[i] = [entry * scale for entry in rows[i]]
        for j in range(n):
            if j != i:
                factor = rows[j][i]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[n:] for row in rows]
