"""Spatial terms against independent solvers, closed forms and brute force."""

import json

import numpy as np
import pytest
import scipy.optimize
import torch

from bids_gacelle.engine import TGV2, TV, Custom, EngineError, MapPrior, MeshTV
from bids_gacelle.engine.kernels import Kernel
from bids_gacelle.engine.objective import Objective
from bids_gacelle.engine.regularise import (
    Geometry,
    Graph,
    as_regularisers,
    check_regularisers,
    check_voxel_size,
    grid_edges,
)

from .helpers import Line, make_model, read

DOUBLE = torch.float64
CPU = torch.device("cpu")
LINE = Line.of([0.5, 1.0, 2.0])
WIDTH = 2.0  # of the start box of `offset`


def kernel(model=LINE):
    return Kernel(model, Objective(), DOUBLE, CPU)


def geometry(mask, voxel_size=None):
    return Geometry(mask.shape, np.flatnonzero(mask), voxel_size)


def bind(spec, mask, voxel_size=None, model=LINE):
    return spec.bind(kernel(model), geometry(mask, voxel_size))


def coordinates(offset):
    """Solver coordinates of the line whose offset is this map of u."""
    x = torch.zeros(2, offset.size, dtype=DOUBLE)
    x[0] = torch.tensor(WIDTH * offset.ravel())
    return x


def value(spec, u, mask=None, voxel_size=None):
    mask = np.ones(u.shape, bool) if mask is None else mask
    return sum(float(t.value(coordinates(u[mask]))) for t in bind(spec, mask, voxel_size))


def prox(term, u, step=1.0, rounds=8):
    for _ in range(rounds):
        z = term.prox(torch.tensor(u.reshape(1, -1)), step, 200)
    return z.numpy().reshape(u.shape)


def random_mask(shape, seed, share=0.7):
    return np.random.default_rng(seed).random(shape) < share


def edges_of(mask, axes):
    """Pairs of fitted neighbours by brute force, as places among the fitted voxels."""
    place = {tuple(v): k for k, v in enumerate(np.argwhere(mask))}
    pairs = []
    for v, k in place.items():
        for axis in range(axes):
            other = list(v)
            other[axis] += 1
            if tuple(other) in place:
                pairs.append((axis, k, place[tuple(other)]))
    return pairs


@pytest.mark.parametrize("axes", [2, 3])
def test_differences_are_those_of_brute_force_and_the_transpose_is_theirs(axes):
    mask = random_mask((5, 4, 6), 1)
    head = grid_edges(geometry(mask), axes)
    graph = Graph(head, np.arange(1.0, axes + 1)[:, None], DOUBLE, CPU)
    n = mask.sum()
    matrix = np.zeros((axes * n, n))
    for axis, k, other in edges_of(mask, axes):
        matrix[axis * n + k, [k, other]] = np.array([-1, 1]) / (axis + 1)
    eye = torch.eye(n, dtype=DOUBLE)
    np.testing.assert_array_equal(graph.difference(eye).flatten(1).T, matrix)
    slots = torch.eye(axes * n, dtype=DOUBLE).unflatten(1, (axes, n))
    np.testing.assert_array_equal(graph.transpose(slots), matrix)
    largest = np.linalg.norm(matrix, 2) ** 2
    assert largest <= graph.norm_squared <= 2 * largest


def test_values_of_known_images():
    step = np.zeros((6, 6))
    step[3:] = 1  # a straight edge of 6 voxels
    corner = np.zeros((6, 6))
    corner[:3, :3] = 1
    for isotropic in (True, False):
        assert value(TV(["offset"], 2.0, isotropic=isotropic), step) == pytest.approx(12)
    assert value(TV(["offset"], 1.0, isotropic=False), corner) == pytest.approx(6)
    assert value(TV(["offset"], 1.0), corner) == pytest.approx(4 + np.sqrt(2))
    # 0.5 n^2 / huber below the corner, n - huber / 2 above
    assert value(TV(["offset"], 1.0, huber=2.0), step) == pytest.approx(6 / 4)
    assert value(TV(["offset"], 1.0, huber=0.5), step) == pytest.approx(6 * 0.75)


def test_distances_are_relative_to_the_smallest_voxel_size_within_the_mode():
    u = np.random.default_rng(2).normal(size=(4, 5, 3))
    spec = TV(["offset"], 1.0, "3d", isotropic=False)
    sums = [np.abs(np.diff(u, axis=axis)).sum() for axis in range(3)]
    assert value(spec, u) == pytest.approx(sum(sums))
    assert value(spec, u, voxel_size=(2, 2, 2)) == pytest.approx(sum(sums))
    assert value(spec, u, voxel_size=(2, 1, 3)) == pytest.approx(
        sums[0] / 2 + sums[1] + sums[2] / 3
    )
    assert value(TV(["offset"], 1.0), u, voxel_size=(2, 2, 1)) == pytest.approx(
        value(TV(["offset"], 1.0), u)
    )
    own = TV(["offset"], 1.0, "3d", isotropic=False, voxel_size=(2, 1, 3))
    assert value(own, u) == pytest.approx(value(spec, u, voxel_size=(2, 1, 3)))


def test_one_weight_means_the_same_in_every_unit():
    u = np.random.default_rng(3).normal(size=(4, 4))
    mask = np.ones((4, 4), bool)
    x = torch.zeros(2, 16, dtype=DOUBLE)
    x[1] = torch.tensor(np.log(4.0) * u.ravel())  # the log of factor, start box 0.5 to 2
    (term,) = bind(TV(["factor"], 3.0), mask)
    assert float(term.value(x)) == pytest.approx(value(TV(["offset"], 3.0), u))


def test_amplitudes_count_in_the_scale_of_the_data():
    model = make_model("r2star")
    (term,) = bind(TV(["S0"], 1.0), np.ones((2, 2), bool), model=model)
    x = torch.zeros(2, 4, dtype=DOUBLE)
    x[0, 2:] = 0.5
    assert float(term.value(x)) == pytest.approx(1.0)


@pytest.mark.parametrize("isotropic", [True, False])
def test_voxels_outside_the_mask_and_islands_do_not_matter(isotropic):
    mask = np.zeros((7, 6), bool)
    mask[:3, :3] = mask[4:, 3:] = True
    u = np.random.default_rng(4).normal(size=mask.shape)
    spec = TV(["offset"], 0.3, isotropic=isotropic)
    parts = [np.where(np.arange(7)[:, None] < 3, mask, False), mask.copy()]
    parts[1][:3] = False
    assert value(spec, u, mask) == pytest.approx(sum(value(spec, u, part) for part in parts))
    (term,) = bind(spec, mask)
    together = prox(term, u[mask])
    for part in parts:
        (alone,) = bind(spec, part)
        np.testing.assert_allclose(together[part[mask]], prox(alone, u[part]), atol=1e-9)
    assert value(spec, u, np.eye(6, dtype=bool).repeat([2, 1, 1, 1, 1, 1], 0)[:7]) >= 0


@pytest.mark.parametrize(
    "spec",
    [
        TV(["offset", "factor"], 0.7, "3d"),
        TV(["offset", "factor"], 0.7, isotropic=False),
        TV(["offset", "factor"], 0.7, "3d", joint=True),
        TV(["offset"], 0.7, huber=0.3),
        TV(["offset", "factor"], 0.7, convention="gacelle", voxel_size=(1, 2, 3)),
        MapPrior("factor", 0.3, 0.2, 1.3),
        MapPrior("factor", 0.3, 0.2, 1.3, convention="gacelle"),
        Custom(lambda maps, mask: (maps["factor"][mask] ** 2).sum() + maps["offset"][0, 0].sum()),
    ],
)
def test_gradients_are_those_of_autograd(spec):
    mask = random_mask((4, 3, 3), 5)
    for term in bind(spec, mask):
        x = torch.tensor(np.random.default_rng(6).normal(size=(2, mask.sum())))
        leaf = x.clone().requires_grad_(True)
        # Where no neighbour is, the norm is 0 and its derivative undefined: there move x a little.
        (wanted,) = torch.autograd.grad(term.value(leaf), leaf)
        np.testing.assert_allclose(term.gradient(x), wanted, atol=1e-12)


def taut_string(y, weight):
    """The exact minimiser of |x - y|^2 / 2 + weight sum |x_i+1 - x_i|: its dual by quadratic
    programming over the box, with an active-set solver."""
    n = len(y)
    d = np.diff(np.eye(n), axis=0)
    found = scipy.optimize.lsq_linear(d.T, y, (-weight, weight), tol=1e-14, method="bvls")
    return y - d.T @ found.x


@pytest.mark.parametrize("weight", [0.01, 0.4, 3.0, 100.0])
def test_prox_in_one_dimension_is_the_taut_string(weight):
    y = np.random.default_rng(7).normal(size=40).cumsum() / 3
    (term,) = bind(TV(["offset"], weight), np.ones((40, 1), bool))
    np.testing.assert_allclose(prox(term, y), taut_string(y, weight), atol=1e-6)
    if weight == 100:
        np.testing.assert_allclose(prox(term, y), y.mean(), atol=1e-6)


def generic_prox(spec, mask, y):
    """Minimise the smoothed objective by scipy, without duals."""
    (term,) = bind(spec, mask)
    pairs = edges_of(mask, 2)

    def objective(z):
        gap = np.zeros((2, len(z)))
        for axis, k, other in pairs:
            gap[axis, k] = z[other] - z[k]
        norm = np.sqrt((gap**2).sum(0) + 1e-12)
        slope = np.zeros(len(z))
        for axis, k, other in pairs:
            slope[other] += gap[axis, k] / norm[k]
            slope[k] -= gap[axis, k] / norm[k]
        return 0.5 * ((z - y) ** 2).sum() + spec.weight * norm.sum(), z - y + spec.weight * slope

    found = scipy.optimize.minimize(
        objective, y, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15}
    )
    return term, objective, found.x


def test_isotropic_prox_is_as_low_as_scipy_gets():
    mask = random_mask((5, 5), 8, 0.9)
    y = np.random.default_rng(9).normal(size=mask.sum())
    term, objective, theirs = generic_prox(TV(["offset"], 0.3), mask, y)
    ours = prox(term, y)
    assert objective(ours)[0] <= objective(theirs)[0] + 1e-5
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_joint_and_huber_prox_satisfy_the_optimality_of_smooth_terms():
    """For Huber-TV the optimum has a gradient: z - u + weight R'(z) = 0."""
    mask = random_mask((5, 4), 10, 0.9)
    u = torch.tensor(np.random.default_rng(11).normal(size=(2, mask.sum())))
    for joint in (True, False):
        names = ["offset", "factor"] if joint else ["offset"]
        (term,) = bind(TV(names, 0.3, huber=0.05, joint=joint), mask)
        own = u[: len(names)]
        z = own
        for _ in range(6):
            z = term.prox(own, 0.7, 200)
        left = z - own + 0.7 * 0.3 * term.slope(z)
        assert left.abs().max() < 1e-5


def test_tgv_of_an_affine_map_is_zero_and_of_a_step_that_of_tv():
    i, j, k = np.meshgrid(np.arange(6), np.arange(5), np.arange(4), indexing="ij")
    ramp = 0.3 * i - 0.2 * j + 0.5 * k + 1.0
    mask = random_mask(ramp.shape, 12, 0.8)
    spec = TGV2(["offset"], 1.0, "3d")
    assert value(spec, ramp, mask) == pytest.approx(0, abs=1e-12)
    assert value(TV(["offset"], 1.0, "3d"), ramp, mask) > 10
    step = np.repeat([0.0, 1.0], 10)[:, None].repeat(3, 1)
    assert value(TGV2(["offset"], 1.0), step) == pytest.approx(3, rel=1e-3)
    (term,) = bind(spec, mask)
    np.testing.assert_allclose(prox(term, ramp[mask], rounds=4), ramp[mask], atol=1e-6)


def test_tgv_prox_is_no_higher_than_a_generic_solver_gets():
    """In one dimension min |z-y|^2/2 + a sum|Dz - w| + b sum|Dw| is a quadratic program."""
    rng = np.random.default_rng(13)
    y = np.where(np.arange(16) < 8, 0.2 * np.arange(16), 1.0) + 0.1 * rng.normal(size=16)
    a, b = 0.2, 0.4
    d, e = np.diff(np.eye(16), axis=0), np.diff(np.eye(15), axis=0)

    def objective(z, w):
        first, second = np.abs(d @ z - w).sum(), np.abs(e @ w).sum()
        return 0.5 * ((z - y) ** 2).sum() + a * first + b * second

    def smooth(v):
        z, w = v[:16], v[16:]
        first, second = d @ z - w, e @ w
        n1, n2 = np.sqrt(first**2 + 1e-10), np.sqrt(second**2 + 1e-10)
        cost = 0.5 * ((z - y) ** 2).sum() + a * n1.sum() + b * n2.sum()
        g1, g2 = a * first / n1, b * second / n2
        return cost, np.concatenate([z - y + d.T @ g1, e.T @ g2 - g1])

    theirs = scipy.optimize.minimize(
        smooth, np.concatenate([y, d @ y]), jac=True, options={"maxiter": 20000, "gtol": 1e-9}
    ).x
    (term,) = bind(TGV2(["offset"], a, ratio=b / a), np.ones((16, 1), bool))
    z = prox(term, y)
    w = term._start[1][0, 0, :-1].numpy()
    lowest = objective(theirs[:16], theirs[16:])
    assert objective(z, w) <= lowest + 1e-5
    told = 0.5 * ((z - y) ** 2).sum() + float(term.value(coordinates(z[:, None])))
    assert told == pytest.approx(lowest, abs=1e-4)


def test_gradient_of_tgv_is_that_of_its_value():
    mask = np.ones((5, 4), bool)
    u = np.random.default_rng(14).normal(size=mask.shape)
    (term,) = bind(TGV2(["offset"], 0.5), mask)
    x = coordinates(u)
    for _ in range(30):
        gradient = term.gradient(x)[0]
    move = torch.tensor(np.random.default_rng(15).normal(size=mask.size))
    ends = []
    for sign in (1, -1):
        shifted = x.clone()
        shifted[0] += sign * 1e-3 * move
        for _ in range(30):
            end = float(term.value(shifted))
        ends.append(end)
    assert float(gradient @ move) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=2e-2)


def test_mesh_of_a_grid_is_the_grid():
    mask = random_mask((5, 6), 16)
    u = np.random.default_rng(17).normal(size=mask.shape)
    flat = np.arange(30).reshape(5, 6)
    pairs = np.concatenate(
        [np.stack([a.ravel(), b.ravel()], 1) for a, b in ((flat[:-1], flat[1:]),)]
        + [np.stack([flat[:, 1:].ravel(), flat[:, :-1].ravel()], 1)]
    )
    grid = TV(["offset"], 0.4, isotropic=False)
    mesh = MeshTV(["offset"], 0.4, edges=pairs)
    assert value(mesh, u.ravel(), mask.ravel()) == pytest.approx(value(grid, u, mask))
    (a,), (b,) = bind(grid, mask), bind(mesh, mask.ravel())
    np.testing.assert_allclose(prox(a, u[mask]), prox(b, u[mask]), atol=1e-9)
    table = np.full((30, 4), -1)
    for i, j in pairs:
        for v, other in ((i, j), (j, i)):
            table[v, (table[v] >= 0).sum()] = other
    neighbours = MeshTV(["offset"], 0.4, neighbours=table)
    assert value(neighbours, u.ravel(), mask.ravel()) == pytest.approx(value(grid, u, mask))


def test_mesh_lengths_and_triangles():
    u = np.array([0.0, 1.0, 3.0, 7.0])
    triangles = [[0, 1, 2], [1, 3, 2]]  # sides 1, 2, 3 | 6, 4 and 2 again
    assert value(MeshTV(["offset"], 1.0, triangles=triangles), u) == pytest.approx(16)
    places = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    long = np.sqrt(2)
    spec = MeshTV(["offset"], 1.0, triangles=triangles, positions=10 * places)
    assert value(spec, u) == pytest.approx(1 + 3 + 6 + 4 + 2 / long)
    ours = MeshTV(["offset"], 4.0, triangles=triangles, positions=places, convention="gacelle")
    # both directions, per vertex, in the parameter's unit
    assert value(ours, u) == pytest.approx(4 / 4 * 2 * WIDTH * (14 + 2 / long))


def test_gacelle_convention_gives_its_numbers(shared):
    """Upstream wraps around, and looks from the mask to what is outside: edges built to do so."""
    wanted = read(shared, "tv")
    u, mask = np.array(wanted["map"]), np.array(wanted["mask"], bool)
    flat = np.arange(u.size).reshape(u.shape)
    for axes, size, name in (
        (2, (2, 2), "tv2d_voxel_2_2"),
        (3, (1, 1.5, 2), "tv3d_voxel_1_1.5_2"),
    ):
        ends = [np.roll(flat, -1, axis=axis) for axis in range(axes)]
        pairs = np.concatenate([np.stack([flat[mask], end[mask]], 1) for end in ends])
        lengths = np.repeat(np.array(size, float), mask.sum())
        weight = wanted["lambda"] * u.size / mask.sum() / 2  # an edge counts once here
        spec = MeshTV(["offset"], weight, edges=pairs, lengths=lengths, convention="gacelle")
        found = value(spec, u.ravel() / WIDTH)
        assert found == pytest.approx(wanted[name], rel=1e-6)


def test_gacelle_convention_without_its_faults():
    u = np.random.default_rng(18).normal(size=(4, 3))
    spec = TV(["offset"], 0.5, convention="gacelle")
    differences = np.abs(np.diff(u, axis=0)).sum() / 2 + np.abs(np.diff(u, axis=1)).sum() / 3
    assert value(spec, u, voxel_size=(2, 3)) == pytest.approx(0.5 / 12 * WIDTH * differences)
    with pytest.raises(EngineError, match="give voxel_size"):
        value(spec, u)


def test_map_prior_ignores_what_is_no_number_and_thresholds():
    mean = np.array([[0.0, 1.0], [np.nan, 2.0]])
    sd = np.array([[1.0, 0.5], [1.0, 0.0]])
    spec = MapPrior("offset", mean, sd, 2.0)
    u = np.array([[3.0, 0.5], [9.0, 9.0]]) / WIDTH
    assert value(spec, u) == pytest.approx(2 * (3 + 0.5 / 0.5))
    (term,) = bind(spec, np.ones((2, 2), bool))
    z = prox(term, u, step=0.25) * WIDTH
    # in units of 2: threshold .25 x 2 x 2 = 1 for the first, 2 for the second (which stops at 1)
    np.testing.assert_allclose(z, [[3 - 2.0, 1.0], [9, 9]])


def test_what_is_refused():
    grid = (4, 4)
    for make, message in (
        (lambda: TV(["offset"], -1.0), "weight of TV"),
        (lambda: TV(["offset"], 1.0, "4d"), "mode of TV"),
        (lambda: TV([], 1.0), "names no parameter"),
        (lambda: TV(["offset"], 1.0, huber=0.0), "huber of TV"),
        (lambda: TV(["offset"], 1.0, huber="a"), "huber of TV is 'a'"),
        (lambda: TGV2(["offset"], 1.0, ratio="b"), "ratio of TGV2 is 'b'"),
        (lambda: TV(["offset"], 1j), "weight of TV"),
        (lambda: TV([1], 1.0), "names of parameters"),
        (lambda: MapPrior("offset", "a", 1), "mean of MapPrior must be numbers"),
        (lambda: MapPrior("offset", 1, "b"), "sd of MapPrior must be numbers"),
        (lambda: Custom("a"), "needs a function"),
        (lambda: TV(["offset"], 1.0, joint=True, convention="gacelle"), "anisotropic"),
        (lambda: TV(["offset"], 1.0, convention="mine"), "convention"),
        (lambda: MeshTV(["offset"], 1.0), "needs one of"),
        (lambda: MeshTV(["offset"], 1.0, edges=[[0, 1]], lengths=[1.0, 2.0]), "lengths"),
        (lambda: check_regularisers([TV(["fn"], 1.0)], LINE, grid), "does not fit"),
        (lambda: check_regularisers([TV(["offset"], 1.0, "3d")], LINE, grid), "needs 3 axes"),
        (
            lambda: check_regularisers([TV(["offset"], 1.0, voxel_size=(1,))], LINE, grid),
            "voxel_size",
        ),
        (
            lambda: check_regularisers([MeshTV(["offset"], 1.0, edges=[[0, 1]])], LINE, grid),
            "grid",
        ),
        (lambda: check_regularisers([MapPrior("offset", np.ones(3), 1.0)], LINE, grid), "shape"),
        (lambda: check_regularisers(["TV"], LINE, grid), "must be a list.*'TV'"),
        (lambda: as_regularisers("TV"), "must be a list.*'TV'"),
        (lambda: as_regularisers(3), "must be a list.*3"),
        (
            lambda: check_regularisers(
                [TV(["offset"], 1.0), TV(["factor"], 1.0, convention="gacelle")], LINE, grid
            ),
            "one convention",
        ),
    ):
        with pytest.raises(EngineError, match=message):
            make()


EDGES = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
TRIANGLES = np.array([[0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 3, 4]])
TABLE = np.array([[1, -1], [0, 2], [1, 3], [2, 4], [3, -1]])
PLACES = np.arange(15.0).reshape(5, 3) ** 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"edges": EDGES.T}, r"edges .*\(2, 4\) instead of \(edges, 2\): transpose"),
        ({"edges": EDGES.ravel()}, r"edges .*\(8,\) instead of"),
        ({"edges": EDGES - 1}, "edges .*number -1"),
        ({"edges": EDGES + 0.5}, "edges .*float64"),
        ({"edges": EDGES + 1}, "up to number 5"),
        ({"edges": [[0, 1], [2]]}, "edges .*different lengths"),
        ({"triangles": TRIANGLES.T}, r"triangles .*\(3, 4\) instead of .*: transpose"),
        ({"triangles": TRIANGLES - 1}, "triangles .*number -1"),
        ({"triangles": TRIANGLES * 1.0}, "triangles .*float64"),
        ({"neighbours": TABLE[:4]}, "neighbours .*4 rows.*5 vertices"),
        ({"neighbours": TABLE.T}, "neighbours .*2 rows.*5 vertices"),
        ({"neighbours": TABLE.ravel()}, r"neighbours .*\(10,\) instead of"),
        ({"neighbours": TABLE * 1.0}, "neighbours .*float64"),
        ({"edges": EDGES, "positions": PLACES[:4]}, "positions .*4 rows.*5 vertices"),
        ({"edges": EDGES, "positions": PLACES.T}, r"positions .*\(3, 5\) .*: transpose"),
        ({"edges": EDGES, "positions": "a"}, "positions of MeshTV must be numbers"),
        ({"edges": EDGES, "lengths": ["a"] * 4}, "lengths of MeshTV must be numbers"),
    ],
)
def test_meshes_that_are_refused(arrays, message):
    with pytest.raises(EngineError, match=message):
        check_regularisers([MeshTV(["offset"], 1.0, **arrays)], LINE, (5,))


@pytest.mark.parametrize(
    "arrays",
    [
        {"edges": EDGES, "positions": PLACES},
        {"edges": []},
        {"triangles": TRIANGLES.tolist(), "positions": PLACES},
        {"neighbours": TABLE.astype(np.int16)},
    ],
)
def test_meshes_that_are_accepted(arrays):
    spec = MeshTV(["offset"], 1.0, **arrays)
    check_regularisers([spec], LINE, (5,))
    assert np.isfinite(value(spec, np.arange(5.0)))


@pytest.mark.parametrize("size", ["abc", 2, None, (1, 0), (1, np.nan), [[1, 1]], object()])
def test_voxel_sizes_that_are_refused(size):
    with pytest.raises(EngineError, match="voxel_size is"):
        check_voxel_size(size, (4, 4))
    if size is not None:
        with pytest.raises(EngineError, match="voxel_size is"):
            check_regularisers([TV(["offset"], 1.0, voxel_size=size)], LINE, (4, 4))


def test_terms_may_be_one_or_none():
    term = TV("offset", 1.0)
    assert as_regularisers(term) == as_regularisers([term]) == (term,)
    assert as_regularisers(None) == as_regularisers([]) == ()


@pytest.mark.parametrize(
    "term",
    [
        TV("offset", np.float32(1), huber=np.float32(0.5), joint=np.bool_(True)),
        TGV2("offset", np.int64(1), ratio=np.float32(2), voxel_size=np.ones(2, np.float32)),
        MeshTV("offset", np.float32(1), edges=EDGES, huber=np.float32(0.5)),
        MapPrior("offset", np.float32(1), np.ones(5), np.float32(1)),
        Custom(torch.sum, np.float32(1)),
    ],
)
def test_descriptions_are_plain_data(term):
    told = term.describe()
    assert json.loads(json.dumps(told)) == told
    assert type(told["weight"]) is float
