"""Spatial terms of the objective: total variation on grids and meshes, TGV, maps, your own.

What the user writes (`TV`, `TGV2`, `MeshTV`, `MapPrior`, `Custom`) is bound to the voxels of a fit
and becomes `Term`s: functions of the solver coordinates of all fitted voxels. Differences exist
only between neighbours that are both fitted: nothing wraps around, no edge of the mask is
penalised, and parts of a mask that do not touch do not know each other.

Conventions
-----------
"scaled": a coordinate counts in widths of its start box, an amplitude in the common scale of the
data, and the objective is the negative log-likelihood plus weight x R. One weight then means the
same for every parameter, unit and data scale: neighbours that differ by 1/weight widths cost as
much as 2 more in chi-square. Distances are relative to the smallest voxel size along the axes in
question, so that images of 1 mm and 2 mm take the same weight, and the thickness of slices changes
nothing within them.

"gacelle": the objective of GACELLE, mean over measurements and voxels of the loss, plus
weight / voxels x the sum of |difference| / mm in the parameter's own unit, anisotropic.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bids_gacelle.engine.errors import EngineError
from bids_gacelle.engine.kernels import Kernel
from bids_gacelle.engine.models.base import SignalModel

Convention = Literal["scaled", "gacelle"]
CONVENTIONS = ("scaled", "gacelle")
_AXES = {"2d": 2, "3d": 3}
# Steps towards the best vector field of TGV whenever its value or gradient is asked for.
_TGV_STEPS = 50
# Shape of the neighbours of a mesh, for errors.
_TABLE = "(vertices, most neighbours)"


@dataclass(frozen=True)
class Geometry:
    """Where the fitted voxels are.

    Attributes
    ----------
    grid
        Shape of the maps; (vertices,) for a mesh.
    index
        (voxels,) flat indices of the fitted ones, in any order in which the neighbours of a voxel
        further along an axis come after it.
    voxel_size
        Along each axis in mm, or None.
    """

    grid: tuple[int, ...]
    index: NDArray[np.intp]
    voxel_size: tuple[float, ...] | None = None

    def places(self) -> NDArray[np.intp]:
        """Return the place among the fitted voxels of every element of the grid, -1 for none."""
        places = np.full(math.prod(self.grid), -1, np.intp)
        places[self.index] = np.arange(len(self.index))
        return places


class Graph:
    """Differences along edges, and their transpose, by gathers: the same numbers on every run.

    Parameters
    ----------
    head
        (slots, voxels) the voxel that an edge from each voxel leads to; negative: no edge.
    distance
        Broadcastable to `head`; differences are divided by it.
    dtype, device
        Of the maps.

    Attributes
    ----------
    weight
        (slots, voxels) 1 / distance, 0 where there is no edge.
    norm_squared
        Upper bound of the squared operator norm (Gershgorin's, of the graph Laplacian).
    """

    def __init__(
        self,
        head: NDArray[np.intp],
        distance: ArrayLike,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        slots, n = head.shape
        exists = head >= 0
        weight = np.where(exists, 1 / np.broadcast_to(np.asarray(distance, float), head.shape), 0)
        edges = np.flatnonzero(exists)
        ends = head.reshape(-1)[edges]
        order = np.argsort(ends, kind="stable")
        edges, ends = edges[order], ends[order]
        rank = np.arange(len(ends)) - np.searchsorted(ends, ends)
        # The last voxel never begins an edge, so that its first slot stands for "none".
        tail = np.full((rank.max(initial=0) + 1, n), n - 1)
        tail[rank, ends] = edges
        total = (weight**2).sum(0)
        np.add.at(total, ends, weight.reshape(-1)[edges] ** 2)
        self.norm_squared = max(float(2 * total.max(initial=0)), 1e-12)
        # Half the memory of 64-bit indices; a gather is bound by memory.
        self._head = _index(np.where(exists, head, np.arange(n)), device)
        self._tail = _index(tail, device)
        self.weight = torch.as_tensor(weight, dtype=dtype, device=device)
        self._shapes = (slots, n), tail.shape

    def difference(self, maps: Tensor) -> Tensor:
        """Return differences (..., slots, voxels) of maps (..., voxels)."""
        ahead = maps.index_select(-1, self._head).unflatten(-1, self._shapes[0])
        return (ahead - maps[..., None, :]) * self.weight

    def transpose(self, edges: Tensor) -> Tensor:
        """Return the transposed operator applied to (..., slots, voxels)."""
        weighted = edges * self.weight
        arriving = weighted.flatten(-2).index_select(-1, self._tail)
        return arriving.unflatten(-1, self._shapes[1]).sum(-2) - weighted.sum(-2)


def _index(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.as_tensor(array.reshape(-1), dtype=torch.int32, device=device)


class Term(ABC):
    """weight x R of the maps of some parameters, bound to the voxels of a fit.

    Works on `u`, (parameters of the term, voxels): solver coordinates in the units of the
    convention. A term keeps where its last proximal step ended, to begin there the next time.

    Attributes
    ----------
    label
        What errors call it.
    parameters
        Indices of its parameters in the model.
    scale
        (parameters of the term, 1): u = coordinate / scale.
    weight
        Factor of R.
    obstacle
        Why there is no proximal step; "" when there is.
    """

    obstacle = ""

    def __init__(
        self, kernel: Kernel, names: Sequence[str], weight: float, convention: str, title: str
    ) -> None:
        order = kernel.model.parameter_names
        self.names = tuple(names)
        self.label = f"{title} of {', '.join(names)}"
        self.parameters = tuple(order.index(name) for name in names)
        self.weight = weight
        self._rows = torch.tensor(self.parameters, device=kernel.device)
        self.scale = torch.ones(len(names), 1, dtype=kernel.dtype, device=kernel.device)
        logs = [convention == "gacelle" and kernel.logs[i] for i in self.parameters]
        self._logs = torch.tensor(logs, device=kernel.device)[:, None]
        self._curved = any(logs)
        if self._curved:
            self.obstacle = (
                f"{', '.join(names)} is fitted on a log scale but GACELLE's convention penalises "
                "it on a linear one"
            )
        elif convention == "scaled":
            for row, i in enumerate(self.parameters):
                if i != kernel.amplitude:
                    self.scale[row] = kernel.width[i]

    def units(self, x: Tensor) -> Tensor:
        """Return u (parameters of the term, voxels) of solver coordinates (P, voxels)."""
        u = x.index_select(0, self._rows) / self.scale
        return torch.where(self._logs, u.exp(), u) if self._curved else u

    def value(self, x: Tensor) -> Tensor:
        """Return weight x R at solver coordinates (P, voxels), 0-d in double precision.

        Raises
        ------
        EngineError
            It is no finite number.
        """
        value = self.weight * self.roughness(self.units(x))
        if not value.isfinite():
            raise EngineError(
                f"The regulariser {self.label} became {float(value)}: it must be a finite number "
                "wherever the bounds of the parameters allow."
            )
        return value

    def gradient(self, x: Tensor) -> Tensor:
        """Return a (sub)gradient of `value`, (P, voxels)."""
        u = self.units(x)
        slope = self.weight * self.slope(u) / self.scale
        if self._curved:
            slope = torch.where(self._logs, slope * u, slope)
        gradient = torch.zeros_like(x)
        gradient[self._rows] = slope
        return gradient

    @abstractmethod
    def roughness(self, u: Tensor) -> Tensor:
        """Return R in double precision."""

    @abstractmethod
    def slope(self, u: Tensor) -> Tensor:
        """Return a subgradient of R by u; 0 where there is a choice."""

    @abstractmethod
    def prox(self, u: Tensor, step: float, iterations: int) -> Tensor:
        """Return argmin over z of |z - u|^2 / 2 + step x weight x R(z)."""


class _Variation(Term):
    """Sum over groups of edges of phi(norm of the differences), phi(n) = n or Huber's."""

    def __init__(
        self, kernel: Kernel, names: Sequence[str], graph: Graph, spec: TV | MeshTV, weight: float
    ) -> None:
        super().__init__(kernel, names, weight, spec.convention, type(spec).__name__)
        self._graph = graph
        grouped = [-2] if isinstance(spec, TV) and spec.is_isotropic else []
        self._groups = grouped + ([-3] if spec.joint else [])
        self._corner = spec.huber or 0.0
        self._dual: Tensor | None = None
        self._time = 0.0

    def _norm(self, edges: Tensor) -> Tensor:
        if not self._groups:
            return edges.abs()
        return torch.linalg.vector_norm(edges, dim=self._groups, keepdim=True)

    def roughness(self, u: Tensor) -> Tensor:
        norm = self._norm(self._graph.difference(u)).double()
        if self._corner:
            inner = norm.clamp_max(self._corner)
            norm = inner * (norm - 0.5 * inner) / self._corner
        return norm.sum()

    def slope(self, u: Tensor) -> Tensor:
        edges = self._graph.difference(u)
        least = self._corner or torch.finfo(u.dtype).tiny
        return self._graph.transpose(edges / self._norm(edges).clamp_min(least))

    def prox(self, u: Tensor, step: float, iterations: int) -> Tensor:
        """Accelerated projected gradients on the dual (Beck & Teboulle 2009).

        With t = step x weight, z = u - t D^T p, where p minimises |u - t D^T p|^2 / 2
        (+ t corner |p|^2 / 2 for Huber) over fields of norm at most 1.
        """
        time = step * self.weight
        bound = time * self._graph.norm_squared
        shrink = 1 / (1 + self._corner / bound)
        dual = self._start(u, time)
        ahead, momentum = dual, 1.0
        for _ in range(iterations):
            z = u - time * self._graph.transpose(ahead)
            new = (ahead + self._graph.difference(z) / bound) * shrink
            new = new / self._norm(new).clamp_min(1.0)
            faster = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = new + ((momentum - 1) / faster) * (new - dual)
            dual, momentum = new, faster
        self._dual, self._time = dual, time
        return u - time * self._graph.transpose(dual)

    def _start(self, u: Tensor, time: float) -> Tensor:
        """Return the last dual, rescaled for another step size: it is t p that hardly changes."""
        if self._dual is None:
            return torch.zeros_like(self._graph.difference(u))
        dual = self._dual * (self._time / time)
        return dual / self._norm(dual).clamp_min(1.0)


class _Curvature(Term):
    """TGV2: min over fields w of sum |D u - w| + ratio sum |E w| (Bredies et al. 2010)."""

    def __init__(self, kernel: Kernel, name: str, graphs: list[Graph], spec: TGV2) -> None:
        super().__init__(kernel, (name,), spec.weight, "scaled", "TGV2")
        self._first, *self._second = graphs
        self._there = (self._first.weight > 0).to(kernel.dtype)
        self._ratio = spec.ratio
        a = math.sqrt(self._first.norm_squared)
        b = math.sqrt(max(graph.norm_squared for graph in self._second))
        self._step = 1 / float(np.linalg.norm([[a, 1.0], [0.0, b]], 2))
        self._fields: tuple[Tensor, Tensor, Tensor] | None = None
        self._start: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._time = 1.0

    def _strain(self, w: Tensor) -> Tensor:
        """Return the symmetrised differences (1, axes, axes, voxels) of a field."""
        rows = [graph.difference(w[:, d]) for d, graph in enumerate(self._second)]
        full = torch.stack(rows, 1)
        return 0.5 * (full + full.transpose(1, 2))

    def _strain_transposed(self, q: Tensor) -> Tensor:
        q = 0.5 * (q + q.transpose(1, 2))
        return torch.stack([g.transpose(q[:, d]) for d, g in enumerate(self._second)], 1)

    def _sum(self, u: Tensor, w: Tensor) -> Tensor:
        first = (self._first.difference(u) - w).norm(dim=1).sum(dtype=torch.float64)
        second = self._strain(w).norm(dim=(1, 2)).sum(dtype=torch.float64)
        return first + self._ratio * second

    def _ascend(
        self, p: Tensor, q: Tensor, first: Tensor, w: Tensor, time: float
    ) -> tuple[Tensor, Tensor]:
        """Step up in the duals, projected on the balls of radius t and t x ratio."""
        p = p + self._step * (first - w)
        p = p / (p.norm(dim=1, keepdim=True) / time).clamp_min(1.0)
        q = q + self._step * self._strain(w)
        return p, q / (q.norm(dim=(1, 2), keepdim=True) / (time * self._ratio)).clamp_min(1.0)

    def _best_field(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return w, p and q after some steps of Chambolle and Pock (2011) with u held."""
        first = self._first.difference(u)
        if self._fields is None:
            p = torch.zeros_like(first)
            self._fields = first, p, torch.zeros_like(self._strain(first))
        w, p, q = self._fields
        ahead = w
        for _ in range(_TGV_STEPS):
            p, q = self._ascend(p, q, first, ahead, 1.0)
            new = (w + self._step * (p - self._strain_transposed(q))) * self._there
            ahead, w = 2 * new - w, new
        self._fields = w, p, q
        return self._fields

    def roughness(self, u: Tensor) -> Tensor:
        """Return the lowest sum found: from above, and 0 for an affine map."""
        first = self._first.difference(u)
        fields = [first, torch.zeros_like(first), self._best_field(u)[0]]
        if self._start is not None:  # of the last proximal step, near whose end u is
            fields.append(self._start[1])
        return torch.stack([self._sum(u, w) for w in fields]).amin()

    def slope(self, u: Tensor) -> Tensor:
        """Return D^T p of the best dual, the gradient of a minimum by the envelope theorem."""
        return self._first.transpose(self._best_field(u)[1])

    def prox(self, u: Tensor, step: float, iterations: int) -> Tensor:
        """Chambolle & Pock (2011), beginning where the last step ended."""
        time = step * self.weight
        if self._start is None:
            w = self._first.difference(u)
            self._start = u, w, torch.zeros_like(w), torch.zeros_like(self._strain(w))
        z, w, p, q = self._start
        ahead_z, ahead_w = z, w
        for _ in range(iterations):
            p, q = self._ascend(p, q, self._first.difference(ahead_z), ahead_w, time)
            down = z - self._step * (self._first.transpose(p) - u)
            new_z = down / (1 + self._step)
            new_w = (w + self._step * (p - self._strain_transposed(q))) * self._there
            ahead_z, ahead_w = 2 * new_z - z, 2 * new_w - w
            z, w = new_z, new_w
        self._start = z, w, p, q
        return z


class _Distance(Term):
    """Sum of |u - centre| x precision."""

    def __init__(self, kernel: Kernel, spec: MapPrior, geometry: Geometry, weight: float) -> None:
        super().__init__(kernel, (spec.parameter,), weight, spec.convention, "MapPrior")
        mean, sd = (
            a.reshape(-1)[geometry.index] if a.ndim else np.full(len(geometry.index), a)
            for a in (np.asarray(spec.mean, float), np.asarray(spec.sd, float))
        )
        there = np.isfinite(mean) & np.isfinite(sd) & (sd > 0)
        self._centre = self.scale.new_tensor(np.where(there, mean, 0.0)) / self.scale
        self._precision = self.scale.new_tensor(np.where(there, sd, np.inf) ** -1.0) * self.scale

    def roughness(self, u: Tensor) -> Tensor:
        return ((u - self._centre).abs() * self._precision).sum(dtype=torch.float64)

    def slope(self, u: Tensor) -> Tensor:
        return (u - self._centre).sign() * self._precision

    def prox(self, u: Tensor, step: float, iterations: int) -> Tensor:
        """Soft thresholding, exact."""
        offset = u - self._centre
        threshold = step * self.weight * self._precision
        return self._centre + offset.sign() * (offset.abs() - threshold).clamp_min(0.0)


class _Maps(dict[str, Tensor]):
    """Maps by name, which say what there is when asked for another."""

    def __missing__(self, name: str) -> Tensor:
        raise EngineError(
            f"The function of a Custom regulariser asks for the map {name!r}; there are "
            f"{', '.join(self)}."
        )


class _Function(Term):
    """A function of the user, differentiated by autograd."""

    def __init__(self, kernel: Kernel, spec: Custom, geometry: Geometry) -> None:
        names = kernel.model.parameter_names
        super().__init__(kernel, names, spec.weight, "none", "Custom")
        name = getattr(spec.function, "__name__", type(spec.function).__name__)
        self.label = f"Custom({name})"
        self.obstacle = "nothing is known of the function but its gradient"
        self._kernel, self._function, self._grid = kernel, spec.function, geometry.grid
        self._index = torch.as_tensor(geometry.index, device=kernel.device)
        mask = torch.zeros(math.prod(geometry.grid), dtype=torch.bool, device=kernel.device)
        mask[self._index] = True
        self._mask = mask.reshape(geometry.grid)

    def roughness(self, u: Tensor) -> Tensor:
        maps = _Maps()
        for name, values in self._kernel.parameters(u).items():
            empty = torch.zeros(self._mask.numel(), dtype=u.dtype, device=u.device)
            maps[name] = empty.index_put((self._index,), values).reshape(self._grid)
        value = self._function(maps, self._mask)
        if not isinstance(value, Tensor) or value.ndim:
            raise EngineError(f"The function of {self.label} must return a 0-d tensor.")
        return value.double()

    def slope(self, u: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_(True)
            value = self.roughness(leaf)
            slope = None
            if value.requires_grad:
                (slope,) = torch.autograd.grad(value, leaf, allow_unused=True)
        if slope is None:
            raise EngineError(
                f"The value of {self.label} does not depend on the maps by operations of torch: "
                "calculate it from the tensors that the function gets."
            )
        if not slope.isfinite().all():
            raise EngineError(
                f"The gradient of {self.label} is not finite: keep roots and quotients away from "
                "0, for example by adding a small number under the root."
            )
        return slope

    def prox(self, u: Tensor, step: float, iterations: int) -> Tensor:
        raise EngineError(f"A Custom regulariser has no proximal step: {self.obstacle}.")


@dataclass(frozen=True)
class Regulariser(ABC):
    """What a user gives as `fit(regularise=[...])`."""

    convention = "scaled"

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the parameters it is about; none: any."""

    @abstractmethod
    def bind(self, kernel: Kernel, geometry: Geometry) -> list[Term]:
        """Return its terms, as many as can be minimised independently of each other."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""

    def check(self, model: SignalModel, grid: tuple[int, ...]) -> None:
        """Raise an EngineError when it does not suit the model or the grid."""
        unknown = [name for name in self.names if name not in model.parameter_names]
        if unknown:
            raise EngineError(
                f"{type(self).__name__} names {unknown[0]!r}, which {model.name} does not fit; "
                f"it fits {', '.join(model.parameter_names)}."
            )
        for p in model.parameters:
            if p.name in self.names and not p.amplitude and self.convention == "scaled":
                box = p.start or p.bounds
                if not all(np.isfinite(p.to_coordinate(v)) for v in box):
                    raise EngineError(f"{p.name} declares no start box, which is its scale.")


@dataclass(frozen=True)
class TV(Regulariser):
    """Total variation on a grid: weight x sum of |grad u| (Rudin, Osher & Fatemi 1992).

    Forward differences; isotropic: the Euclidean norm over the axes of a voxel, anisotropic: the
    sum of absolute values.

    Attributes
    ----------
    parameters
        Names.
    weight
        See the conventions in this module.
    mode
        "2d": along the first two axes; "3d": along three.
    isotropic
        None: True, and False for GACELLE's convention, which has no other.
    voxel_size
        Along each axis in mm; None: that of the fit, else 1.
    huber
        Differences below this many widths cost their square / (2 huber) instead, so that slopes
        do not become stairs; None: plain TV.
    joint
        One norm over all parameters, so that they prefer edges at the same place.
    convention
        "scaled" or "gacelle".
    """

    parameters: Sequence[str]
    weight: float
    mode: Literal["2d", "3d"] = "2d"
    isotropic: bool | None = None
    voxel_size: Sequence[float] | None = None
    huber: float | None = None
    joint: bool = False
    convention: Convention = "scaled"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises
        ------
        EngineError
            One cannot be used.
        """
        _check_common(self, self.weight, self.convention, self.huber)
        if self.mode not in _AXES:
            raise EngineError(f"The mode of TV is {self.mode!r}; it must be '2d' or '3d'.")
        if self.convention == "gacelle" and (self.isotropic or self.joint):
            raise EngineError("GACELLE's TV is anisotropic and not joint.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return _names(self.parameters)

    @property
    def is_isotropic(self) -> bool:
        """Whether the norm is Euclidean."""
        return self.convention == "scaled" if self.isotropic is None else self.isotropic

    def check(self, model: SignalModel, grid: tuple[int, ...]) -> None:
        """Raise an EngineError when it does not suit the model or the grid."""
        super().check(model, grid)
        _check_grid("TV", self.mode, self.voxel_size, grid)

    def bind(self, kernel: Kernel, geometry: Geometry) -> list[Term]:
        """Return a term for each parameter, or one for all if joint."""
        axes = _AXES[self.mode]
        size = _distances(self.voxel_size, geometry, axes, self.convention)
        graph = Graph(grid_edges(geometry, axes), size, kernel.dtype, kernel.device)
        weight = _total_weight(self, geometry)
        groups = [self.names] if self.joint else [(name,) for name in self.names]
        return [_Variation(kernel, group, graph, self, weight) for group in groups]

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        size = None if self.voxel_size is None else [float(s) for s in self.voxel_size]
        return {
            "term": "TV",
            "parameters": list(self.names),
            "weight": float(self.weight),
            "mode": self.mode,
            "isotropic": bool(self.is_isotropic),
            "voxel_size": size,
            "huber": None if self.huber is None else float(self.huber),
            "joint": bool(self.joint),
            "convention": self.convention,
        }


@dataclass(frozen=True)
class TGV2(Regulariser):
    """Total generalised variation of second order (Bredies, Kunisch & Pock 2010).

    weight x min over fields w of sum |grad u - w| + ratio sum |E w|, E the symmetrised gradient:
    free for affine maps, so that slopes do not become stairs.

    Attributes
    ----------
    parameters, weight, mode, voxel_size
        As of `TV`.
    ratio
        Price of curvature relative to that of edges.
    """

    parameters: Sequence[str]
    weight: float
    mode: Literal["2d", "3d"] = "2d"
    ratio: float = 2.0
    voxel_size: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises
        ------
        EngineError
            One cannot be used.
        """
        _check_common(self, self.weight, "scaled", self.ratio)
        if self.mode not in _AXES:
            raise EngineError(f"The mode of TGV2 is {self.mode!r}; it must be '2d' or '3d'.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return _names(self.parameters)

    def check(self, model: SignalModel, grid: tuple[int, ...]) -> None:
        """Raise an EngineError when it does not suit the model or the grid."""
        super().check(model, grid)
        _check_grid("TGV2", self.mode, self.voxel_size, grid)

    def bind(self, kernel: Kernel, geometry: Geometry) -> list[Term]:
        """Return a term for each parameter."""
        axes = _AXES[self.mode]
        size = _distances(self.voxel_size, geometry, axes, "scaled")
        head = grid_edges(geometry, axes)
        heads = [head]
        for row in head:
            # Differences of a component exist where the component does: on edges along its axis.
            both = (row >= 0) & (head >= 0) & (row[head] >= 0)
            heads.append(np.where(both, head, -1))
        graphs = [Graph(h, size, kernel.dtype, kernel.device) for h in heads]
        return [_Curvature(kernel, name, graphs, self) for name in self.names]

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        size = None if self.voxel_size is None else [float(s) for s in self.voxel_size]
        return {
            "term": "TGV2",
            "parameters": list(self.names),
            "weight": float(self.weight),
            "mode": self.mode,
            "ratio": float(self.ratio),
            "voxel_size": size,
        }


@dataclass(frozen=True, eq=False)
class MeshTV(Regulariser):
    """Total variation on a mesh: weight x sum over edges of |u_i - u_j| / length.

    Data are (measurements, vertices) then. One of `edges`, `neighbours` and `triangles` says what
    is connected; each pair of vertices counts once. GACELLE's convention counts both directions.

    Attributes
    ----------
    parameters, weight, huber, joint, convention
        As of `TV`.
    edges
        (edges, 2) vertex numbers.
    neighbours
        (vertices, most) vertex numbers; those of the vertex itself, or negative ones, are padding.
    triangles
        (triangles, 3) vertex numbers.
    lengths
        Of the `edges` or to the `neighbours`, in their shape, in mm; differences are divided by
        length / median length (for GACELLE's convention: by the length).
    positions
        (vertices, 3) in mm, to take the lengths from; neither: all lengths are equal.
    """

    parameters: Sequence[str]
    weight: float
    edges: ArrayLike | None = None
    neighbours: ArrayLike | None = None
    triangles: ArrayLike | None = None
    lengths: ArrayLike | None = None
    positions: ArrayLike | None = None
    huber: float | None = None
    joint: bool = False
    convention: Convention = "scaled"

    def __post_init__(self) -> None:
        """Check the arrays and numbers.

        Raises
        ------
        EngineError
            One cannot be used.
        """
        _check_common(self, self.weight, self.convention, self.huber)
        given = [a for a in (self.edges, self.neighbours, self.triangles) if a is not None]
        if len(given) != 1:
            raise EngineError("MeshTV needs one of edges, neighbours and triangles.")
        self._check_arrays()
        if self.lengths is not None and (
            self.triangles is not None
            or _floats("lengths of MeshTV", self.lengths).shape != self._length_shape()
        ):
            raise EngineError(
                "The lengths of MeshTV must be one for each edge or neighbour; "
                "for triangles give positions."
            )

    def _check_arrays(self) -> None:
        if self.edges is not None:
            _check_vertices("edges", self.edges, 2)
        elif self.triangles is not None:
            _check_vertices("triangles", self.triangles, 3)
        elif self.neighbours is not None:
            _check_vertices("neighbours", self.neighbours, None)
        if self.positions is not None:
            shape = _floats("positions of MeshTV", self.positions).shape
            if len(shape) != 2 or shape[1] != 3:
                raise EngineError(_wrong_shape("positions", shape, "(vertices, 3)"))

    def _length_shape(self) -> tuple[int, ...]:
        if self.edges is not None:
            return (len(np.asarray(self.edges)),)
        return np.asarray(self.neighbours).shape

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return _names(self.parameters)

    def check(self, model: SignalModel, grid: tuple[int, ...]) -> None:
        """Raise an EngineError when it does not suit the model or the vertices."""
        super().check(model, grid)
        if len(grid) != 1:
            raise EngineError(
                f"MeshTV needs data of (measurements, vertices), but theirs have the grid {grid}."
            )
        for name, rows in (("neighbours", self.neighbours), ("positions", self.positions)):
            if rows is not None and len(np.asarray(rows)) != grid[0]:
                raise EngineError(
                    f"The {name} of MeshTV have {len(np.asarray(rows))} rows, but the data have "
                    f"{grid[0]} vertices: give one row for each."
                )
        given = (self.edges, self.neighbours, self.triangles)
        (vertices,) = [np.asarray(a) for a in given if a is not None]
        if vertices.max(initial=-1) >= grid[0]:
            raise EngineError(
                f"MeshTV has vertices up to number {vertices.max()}, but the data have the "
                f"grid {grid}: number the vertices from 0."
            )
        _, length = self._pairs()
        if not (np.isfinite(length) & (length > 0)).all():
            raise EngineError("An edge of MeshTV has a length that is not a positive number.")

    def _pairs(self) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Return each connected pair (lower, higher) once, and its length."""
        if self.edges is not None:
            pairs = np.asarray(self.edges, np.intp).reshape(-1, 2)
        elif self.neighbours is not None:
            table = np.asarray(self.neighbours, np.intp)
            own = np.broadcast_to(np.arange(len(table))[:, None], table.shape)
            pairs = np.stack([own.ravel(), table.ravel()], 1)
        else:
            corners = np.asarray(self.triangles, np.intp).reshape(-1, 3)
            pairs = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
        length = np.ones(len(pairs))
        if self.lengths is not None:
            length = np.asarray(self.lengths, float).ravel()
        real = (pairs[:, 0] != pairs[:, 1]) & (pairs >= 0).all(1)
        pairs, first = np.unique(np.sort(pairs[real], 1), axis=0, return_index=True)
        length = length[real][first]
        if self.positions is not None and self.lengths is None:
            place = np.asarray(self.positions, float)
            length = np.linalg.norm(place[pairs[:, 0]] - place[pairs[:, 1]], axis=1)
        return pairs, length

    def bind(self, kernel: Kernel, geometry: Geometry) -> list[Term]:
        """Return a term for each parameter, or one for all if joint."""
        pairs, length = self._pairs()
        weight = _total_weight(self, geometry)
        if self.convention == "gacelle":
            weight *= 2
        elif len(length):
            length = length / np.median(length)
        pairs = geometry.places()[pairs]
        there = (pairs >= 0).all(1)
        pairs, length = pairs[there], length[there]
        slot = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])
        shape = (slot.max(initial=0) + 1, len(geometry.index))
        head, distance = np.full(shape, -1), np.ones(shape)
        head[slot, pairs[:, 0]] = pairs[:, 1]
        distance[slot, pairs[:, 0]] = length
        graph = Graph(head, distance, kernel.dtype, kernel.device)
        groups = [self.names] if self.joint else [(name,) for name in self.names]
        return [_Variation(kernel, group, graph, self, weight) for group in groups]

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        pairs, _ = self._pairs()
        return {
            "term": "MeshTV",
            "parameters": list(self.names),
            "weight": float(self.weight),
            "edges": len(pairs),
            "lengths": self.lengths is not None or self.positions is not None,
            "huber": None if self.huber is None else float(self.huber),
            "joint": bool(self.joint),
            "convention": self.convention,
        }


@dataclass(frozen=True, eq=False)
class MapPrior(Regulariser):
    """Absolute distance to a map or number: weight x sum of |u - mean| / sd.

    Tolerates voxels or regions that the map is wrong about, which the quadratic
    `fit(prior={name: (mean, sd)})` does not.

    Attributes
    ----------
    parameter
        Name.
    mean, sd
        Numbers or maps (*grid), in the solver's coordinate (the logarithm for parameters fitted on
        a log scale; GACELLE's convention: the parameter's unit). Voxels where one is not finite,
        or the sd not positive, have no prior.
    weight, convention
        As of `TV`.
    """

    parameter: str
    mean: ArrayLike
    sd: ArrayLike
    weight: float = 1.0
    convention: Convention = "scaled"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises
        ------
        EngineError
            One cannot be used.
        """
        _check_common(self, self.weight, self.convention, None)
        for name in ("mean", "sd"):
            _floats(f"{name} of MapPrior", getattr(self, name))

    @property
    def names(self) -> tuple[str, ...]:
        """Name of the parameter."""
        return _names(self.parameter)

    def check(self, model: SignalModel, grid: tuple[int, ...]) -> None:
        """Raise an EngineError when it does not suit the model or the grid."""
        super().check(model, grid)
        for array in (self.mean, self.sd):
            if np.ndim(array) and np.shape(array) != grid:
                raise EngineError(
                    f"MapPrior of {self.parameter} has a map of shape {np.shape(array)} but the "
                    f"data have the grid {grid}."
                )
        if any(p.amplitude and p.name == self.parameter for p in model.parameters):
            raise EngineError(
                f"{self.parameter} is an amplitude and takes no prior: its scale is that of the "
                "data."
            )

    def bind(self, kernel: Kernel, geometry: Geometry) -> list[Term]:
        """Return its term."""
        return [_Distance(kernel, self, geometry, _total_weight(self, geometry))]

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "term": "MapPrior",
            "parameters": list(self.names),
            "weight": float(self.weight),
            "mean": "map" if np.ndim(self.mean) else float(np.asarray(self.mean)),
            "sd": "map" if np.ndim(self.sd) else float(np.asarray(self.sd)),
            "convention": self.convention,
        }


@dataclass(frozen=True, eq=False)
class Custom(Regulariser):
    """A function of yours: weight x function(maps, mask).

    Solvers of first order only: ADMM would need its proximal step.

    Attributes
    ----------
    function
        From {name: map (*grid) in the parameter's unit, 0 outside the fitted voxels; an amplitude
        in units of the data's common scale} and the mask (*grid) to a 0-d tensor, differentiable
        by torch.
    weight
        Factor.
    """

    function: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    weight: float = 1.0

    # It says nothing about conventions, and suits any.
    convention = "none"

    def __post_init__(self) -> None:
        """Check the function and the weight.

        Raises
        ------
        EngineError
            One cannot be used.
        """
        _check_weight("Custom", self.weight)
        if not callable(self.function):
            raise EngineError(f"Custom needs a function of maps and mask, got {self.function!r}.")

    @property
    def names(self) -> tuple[str, ...]:
        """No names: the function gets all parameters."""
        return ()

    def bind(self, kernel: Kernel, geometry: Geometry) -> list[Term]:
        """Return its term."""
        return [_Function(kernel, self, geometry)]

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return {"term": "Custom", "function": name, "weight": float(self.weight)}


def as_regularisers(
    regularise: Sequence[Regulariser] | Regulariser | None,
) -> tuple[Regulariser, ...]:
    """Return what the user gives as terms: a list, a single one or None.

    Raises
    ------
    EngineError
        It holds something else.
    """
    if regularise is None:
        return ()
    if isinstance(regularise, Regulariser):
        return (regularise,)
    listed = isinstance(regularise, Iterable) and not isinstance(regularise, str | Mapping)
    terms: tuple[Any, ...] = tuple(regularise) if listed else (regularise,)
    for term in terms:
        if not isinstance(term, Regulariser):
            raise EngineError(
                f"regularise must be a list of TV, TGV2, MeshTV, MapPrior or Custom, got {term!r}."
            )
    return terms


def check_regularisers(
    regularisers: Sequence[Regulariser], model: SignalModel, grid: tuple[int, ...]
) -> str:
    """Check them against the model and the grid and return their common convention.

    Raises
    ------
    EngineError
        One does not suit, or they follow different conventions.
    """
    for regulariser in as_regularisers(regularisers):
        regulariser.check(model, grid)
    conventions = {r.convention for r in regularisers} - {"none"}
    if len(conventions) > 1:
        raise EngineError("Regularisers of one fit must follow one convention, not both.")
    return conventions.pop() if conventions else "scaled"


def grid_edges(geometry: Geometry, axes: int) -> NDArray[np.intp]:
    """Return (axes, voxels): the fitted neighbour one further along each axis, or -1."""
    places = geometry.places()
    where = np.unravel_index(geometry.index, geometry.grid)
    head = np.full((axes, len(geometry.index)), -1, np.intp)
    for axis in range(axes):
        inside = where[axis] + 1 < geometry.grid[axis]
        stride = math.prod(geometry.grid[axis + 1 :])
        head[axis, inside] = places[geometry.index[inside] + stride]
    return head


def _names(parameters: Sequence[str]) -> tuple[str, ...]:
    if isinstance(parameters, str):
        return (parameters,)
    if not isinstance(parameters, Iterable) or not all(isinstance(n, str) for n in parameters):
        raise EngineError(f"A regulariser takes names of parameters, got {parameters!r}.")
    return tuple(parameters)


def _floats(what: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        return np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise EngineError(f"The {what} must be numbers, got {values!r}.") from error


def _wrong_shape(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """Return what to say of an array of MeshTV."""
    columns = int(wanted[-2]) if wanted[-2].isdigit() else None
    transposed = len(shape) == 2 and shape[0] == columns
    hint = ": transpose them" if transposed else ""
    return f"The {name} of MeshTV have the shape {shape} instead of {wanted}{hint}."


def _check_vertices(name: str, values: ArrayLike, columns: int | None) -> None:
    """Check a table of vertex numbers; without a number of columns, negative ones are padding."""
    try:
        table = np.asarray(values)
    except ValueError as error:
        raise EngineError(f"The {name} of MeshTV have rows of different lengths.") from error
    if columns and not table.size:
        return
    if table.ndim != 2 or (columns and table.shape[1] != columns):
        raise EngineError(
            _wrong_shape(name, table.shape, f"({name}, {columns})" if columns else _TABLE)
        )
    if table.dtype.kind not in "iu":
        raise EngineError(
            f"The {name} of MeshTV are of type {table.dtype}; vertex numbers must be integers."
        )
    if columns and table.min() < 0:
        raise EngineError(
            f"The {name} of MeshTV hold the vertex number {table.min()}: number the vertices "
            "from 0, and leave out what is none."
        )


def _is_number(value: object) -> bool:
    kinds = int | float | np.integer | np.floating
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def _check_weight(what: str, weight: object) -> None:
    if not _is_number(weight) or not weight >= 0:  # type: ignore[operator]
        raise EngineError(f"The weight of {what} is {weight!r}; it must be a number from 0 up.")


def _check_common(
    spec: TV | TGV2 | MeshTV | MapPrior, weight: float, convention: str, positive: float | None
) -> None:
    what = type(spec).__name__
    _check_weight(what, weight)
    if convention not in CONVENTIONS:
        raise EngineError(
            f"The convention of {what} is {convention!r}; it must be 'scaled' or 'gacelle'."
        )
    if positive is not None and not (_is_number(positive) and positive > 0):
        field = "ratio" if isinstance(spec, TGV2) else "huber"
        raise EngineError(f"The {field} of {what} is {positive!r}; it must be a positive number.")
    names = spec.names
    if not names or len(set(names)) < len(names):
        raise EngineError(f"{what} names no parameter, or one twice.")


def _check_grid(what: str, mode: str, size: Sequence[float] | None, grid: tuple[int, ...]) -> None:
    if len(grid) < _AXES[mode]:
        raise EngineError(f"{what} {mode} needs {_AXES[mode]} axes but the grid is {grid}.")
    if size is not None:
        check_voxel_size(size, grid)


def _distances(
    own: Sequence[float] | None, geometry: Geometry, axes: int, convention: str
) -> NDArray[np.float64]:
    """Return distances (axes, 1): relative to the smallest, for GACELLE in mm."""
    size = geometry.voxel_size if own is None else tuple(own)
    if size is None:
        if convention == "gacelle":
            raise EngineError("GACELLE's convention divides by millimetres: give voxel_size.")
        return np.ones((axes, 1))
    check_voxel_size(size, geometry.grid)
    array = np.asarray(size, float)[:axes, None]
    return array / array.min() if convention == "scaled" else array


def check_voxel_size(size: Sequence[float], grid: tuple[int, ...]) -> None:
    """Raise an EngineError unless there is a positive number for each axis of the grid."""
    try:
        array = np.asarray(size, float)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (len(grid),) or not (np.isfinite(array) & (array > 0)).all():
        raise EngineError(
            f"voxel_size is {size!r}; it must be a positive number for each of the "
            f"{len(grid)} axes of the grid."
        )


def _total_weight(spec: TV | MeshTV | MapPrior, geometry: Geometry) -> float:
    """Return the weight of the sum over voxels; GACELLE's is that of their mean."""
    return spec.weight / (len(geometry.index) if spec.convention == "gacelle" else 1)
