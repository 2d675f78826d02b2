"""EPG-X steady states against simulations pulse by pulse, isochromats and reference numbers."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch

from bids_gacelle.engine.derivatives import directional
from bids_gacelle.engine.physics.epgx import spoiled_steady_state, truncation_order
from bids_gacelle.engine.physics.epgx_derivatives import spoiled_steady_state_derivatives
from bids_gacelle.engine.physics.two_pools import bloch_mcconnell

F64 = torch.float64
INCREMENTS = (0.0, 50.0, 117.0, 150.0)


def cases(n, t1=(0.3, 0.8), t2=(0.02, 0.1), seed=1):
    """Fraction, rates, exchange, TR and angle of tissue that soon reaches its steady state."""
    rng = np.random.default_rng(seed)
    rows = (
        rng.uniform(0, 0.72, n),
        1 / rng.uniform(*t1, n),
        1 / rng.uniform(*t2, n),
        1 / rng.uniform(0.15, 0.6, n),
        1 / rng.uniform(0.01, 0.02, n),
        rng.uniform(0, 10, n),
        rng.uniform(0.025, 0.085, n),
        np.deg2rad(rng.uniform(2, 110, n)),
    )
    return tuple(torch.tensor(row) for row in rows)


def generator(fraction, r_free, r_myelin, exchange):
    back = exchange * (1 - fraction) / fraction
    return np.array([[-r_free - exchange, back], [exchange, -r_myelin - back]])


def pulse_by_pulse(case, increment, pulses=600, orders=150):
    """Configurations after many pulses: F+, F- and Z of either pool, RF phase in the rotation."""
    f, r1_free, r2_free, r1_myelin, r2_myelin, exchange, tr, a = (float(v) for v in case)
    e1 = scipy.linalg.expm(tr * generator(f, r1_free, r1_myelin, exchange))
    e2 = scipy.linalg.expm(tr * generator(f, r2_free, r2_myelin, exchange))
    states = np.zeros((3, 2, orders), complex)
    equilibrium = np.array([1 - f, f])
    states[2, :, 0] = equilibrium
    for n in range(pulses):
        phase = np.deg2rad(increment) * n * (n + 1) / 2
        turn, cos2, sin2 = np.exp(1j * phase), np.cos(a / 2) ** 2, np.sin(a / 2) ** 2
        rotation = np.array(
            [
                [cos2, turn**2 * sin2, -1j * turn * np.sin(a)],
                [turn**-2 * sin2, cos2, 1j * np.sin(a) / turn],
                [-0.5j * np.sin(a) / turn, 0.5j * turn * np.sin(a), np.cos(a)],
            ]
        )
        plus, minus, z = np.einsum("ij,jpk->ipk", rotation, states)
        signal = 1j * plus[:, 0] / turn
        plus, minus, z = e2 @ plus, e2 @ minus, e1 @ z
        z[:, 0] += (np.eye(2) - e1) @ equilibrium
        plus = np.roll(plus, 1, 1)
        minus = np.roll(minus, -1, 1)
        minus[:, -1] = 0
        plus[:, 0] = minus[:, 0].conj()
        states = np.stack((plus, minus, z))
    return signal


def isochromats(case, increment, n=500, pulses=500):
    """Mean over isochromats that gradients turn by different angles, each a vector of six."""
    f, r1_free, r2_free, r1_myelin, r2_myelin, exchange, tr, a = (float(v) for v in case)
    rates = np.zeros((6, 6))
    across = generator(f, r2_free, r2_myelin, exchange)
    for axis, part in enumerate((across, across, generator(f, r1_free, r1_myelin, exchange))):
        rates[axis::3, axis::3] = part
    decay = scipy.linalg.expm(tr * rates)
    equilibrium = np.array([0, 0, 1 - f, 0, 0, f])
    recovery = equilibrium - decay @ equilibrium
    theta = 2 * np.pi * np.arange(n) / n

    def about_z(angle):
        c, s, one = np.cos(angle), np.sin(angle), np.ones_like(angle)
        return np.array([[c, -s, 0 * one], [s, c, 0 * one], [0 * one, 0 * one, one]])

    c, s = np.cos(a), np.sin(a)
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    dephase = about_z(theta)
    state = np.tile(equilibrium[:, None], (1, n))
    for pulse in range(pulses):
        phase = np.deg2rad(increment) * pulse * (pulse + 1) / 2
        rotation = about_z(np.array(phase)) @ about_x @ about_z(np.array(-phase))
        state = np.concatenate((rotation @ state[:3], rotation @ state[3:]))
        mean = state.mean(1)
        signal = 1j * (mean[[0, 3]] + 1j * mean[[1, 4]]) * np.exp(-1j * phase)
        state = decay @ state + recovery[:, None]
        state = np.concatenate(
            [np.einsum("ijn,jn->in", dephase, part) for part in (state[:3], state[3:])]
        )
    return signal


@pytest.mark.parametrize("increment", INCREMENTS)
def test_it_is_where_a_simulation_pulse_by_pulse_ends(increment):
    values = cases(8)
    ours = torch.stack(spoiled_steady_state(*values, increment, tolerance=1e-12), -1).numpy()
    for i, case in enumerate(zip(*values, strict=True)):
        np.testing.assert_allclose(ours[i], pulse_by_pulse(case, increment), atol=1e-9)


@pytest.mark.parametrize("increment", INCREMENTS[1:])
def test_it_is_the_mean_of_many_isochromats(increment):
    values = cases(2, seed=2)
    ours = torch.stack(spoiled_steady_state(*values, increment, tolerance=1e-12), -1).numpy()
    for i, case in enumerate(zip(*values, strict=True)):
        np.testing.assert_allclose(ours[i], isochromats(case, increment), atol=1e-9)


def test_without_transverse_memory_it_is_ideal_spoiling():
    f, r1_free, _, r1_myelin, _, exchange, tr, angle = cases(200)
    fast = torch.tensor(2000.0, dtype=F64)
    ours = spoiled_steady_state(f, r1_free, fast, r1_myelin, fast, exchange, tr, angle, 50.0)
    ideal = bloch_mcconnell(f, r1_free, r1_myelin, exchange, tr, angle)
    for pool, expected in zip(ours, ideal, strict=True):
        torch.testing.assert_close(pool.real, expected, atol=1e-10, rtol=0)
        assert pool.imag.abs().max() < 1e-10


@pytest.mark.parametrize("exchange", [0.0, 5.0])
def test_no_myelin_leaves_the_configurations_of_one_pool(exchange):
    _, r1_free, r2_free, r1_myelin, r2_myelin, _, tr, angle = cases(4)
    nothing, k = torch.zeros(4, dtype=F64), torch.tensor(exchange, dtype=F64)
    rest = r1_free, r2_free, r1_myelin, r2_myelin
    free, myelin = spoiled_steady_state(nothing, *rest, k, tr, angle, 117.0, tolerance=1e-12)
    alone = zip(nothing + 0.5, r1_free, r2_free, r1_free, r2_free, nothing, tr, angle, strict=True)
    expected = [pulse_by_pulse(case, 117.0).sum() for case in alone]
    np.testing.assert_allclose(free.numpy(), expected, atol=1e-7)
    assert myelin.abs().max() < 1e-7


def test_pools_that_are_alike_are_one_pool():
    f, r1_free, r2_free, _, _, exchange, tr, angle = cases(50)
    twins = spoiled_steady_state(f, r1_free, r2_free, r1_free, r2_free, exchange, tr, angle, 50.0)
    alone = spoiled_steady_state(
        f, r1_free, r2_free, r1_free, r2_free, 0 * exchange, tr, angle, 50.0
    )
    for pool, expected, share in zip(twins, alone, (1 - f, f), strict=True):
        torch.testing.assert_close(pool, expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(pool, share * sum(alone), atol=1e-9, rtol=0)


@pytest.mark.parametrize("increment", INCREMENTS)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_orders_that_are_left_out_matter_less_than_the_tolerance(increment, tolerance):
    values = cases(500, t1=(0.5, 6), t2=(0.025, 2))
    ours = spoiled_steady_state(*values, increment, tolerance=tolerance)
    exact = spoiled_steady_state(*values, increment, tolerance=1e-13)
    for pool, expected in zip(ours, exact, strict=True):
        assert (pool - expected).abs().max() < tolerance


def test_single_precision_is_good_for_1e_6():
    values = cases(500, t1=(0.5, 6), t2=(0.025, 0.5))
    for increment in INCREMENTS[1:]:
        single = spoiled_steady_state(*(value.float() for value in values), increment)
        double = spoiled_steady_state(*values, increment)
        for pool, expected in zip(single, double, strict=True):
            torch.testing.assert_close(pool.to(expected.dtype), expected, atol=1e-6, rtol=0)


def test_neighbours_blocks_and_shape_do_not_matter():
    values = cases(60, t2=(0.025, 2))
    free, myelin = spoiled_steady_state(*values, 50.0)
    parts = spoiled_steady_state(*(value.reshape(3, 20) for value in values), 50.0, block=7)
    torch.testing.assert_close(parts[0].reshape(-1), free, atol=1e-14, rtol=0)
    torch.testing.assert_close(parts[1].reshape(-1), myelin, atol=1e-14, rtol=0)
    single = spoiled_steady_state(*(value[7] for value in values), 50.0)
    torch.testing.assert_close(single[0], free[7], atol=1e-14, rtol=0)


def test_a_fixed_number_of_orders_suits_vmap():
    values = cases(20)
    expected = spoiled_steady_state(*values, 50.0, orders=16)
    mapped = torch.func.vmap(lambda *v: spoiled_steady_state(*v, 50.0, orders=16))(*values)
    for ours, pool in zip(mapped, expected, strict=True):
        torch.testing.assert_close(ours, pool, atol=1e-14, rtol=0)


@pytest.mark.parametrize("increment", INCREMENTS)
def test_derivatives_are_those_of_forward_mode(increment):
    values = cases(100)
    ours = spoiled_steady_state_derivatives(*values, increment, 16)
    single = spoiled_steady_state_derivatives(*(v.float() for v in values), increment, 16)

    def signal(*v):
        return torch.view_as_real(torch.stack(spoiled_steady_state(*v, increment, orders=16)))

    for which, name in zip((0, 1, 2, 5, 7), ours._fields[1:], strict=True):
        tangents = tuple((torch.ones_like if i == which else torch.zeros_like)(v)
                         for i, v in enumerate(values))  # fmt: skip
        value, slope = directional(signal, values, tangents)
        torch.testing.assert_close(torch.view_as_real(ours.signal), value, atol=1e-13, rtol=0)
        mine = torch.view_as_real(getattr(ours, name))
        torch.testing.assert_close(mine, slope, atol=1e-10, rtol=1e-9)
        mine = torch.view_as_real(getattr(single, name))
        torch.testing.assert_close(mine.double(), slope, atol=2e-6, rtol=1e-4)


def test_derivatives_are_those_of_central_differences():
    values = cases(100)
    needed = int(truncation_order(*(values[i] for i in (0, 2, 4, 5, 6)), 1e-12).max())
    ours = spoiled_steady_state_derivatives(*values, 50.0, needed)
    step = 1e-6
    for which, name in zip((0, 1, 2, 5, 7), ours._fields[1:], strict=True):
        up, down = (
            torch.stack(
                spoiled_steady_state(
                    *(v + s * step * (i == which) for i, v in enumerate(values)),
                    50.0,
                    tolerance=1e-12,
                )
            )
            for s in (1, -1)
        )
        torch.testing.assert_close(
            getattr(ours, name), (up - down) / (2 * step), atol=1e-7, rtol=1e-6
        )


def test_derivatives_are_finite_at_the_limits():
    f, k, a = torch.tensor(
        [[f, k, a] for f in (0.0, 1e-8, 0.72) for k in (0.0, 1e-8, 10.0) for a in (0.001, 1.9)]
    ).T
    one = torch.ones_like(f)
    for r1 in (0.3, 2.0):
        rates = r1 * one, 10 * one, one / 0.234, one / 0.015
        found = spoiled_steady_state_derivatives(f, *rates, k, 0.04 * one, a, 50.0, 12)
        for part in found:
            assert part.isfinite().all()
            assert part.abs().max() < 10


def test_published_surrogate_is_as_close_as_it_is_accurate(shared):
    reference = json.loads((shared / "reference/bm_ann.json").read_text())
    f, t1, t2, exchange, tr, angle = torch.tensor(reference["params"], dtype=F64).T
    r1_myelin, r2_myelin = (torch.tensor(1 / t) for t in (reference["T1_myelin"], 0.015))
    pools = spoiled_steady_state(
        f, 1 / t1, 1 / t2, r1_myelin, r2_myelin, exchange, tr, angle, 50.0
    )
    ideal = bloch_mcconnell(f, 1 / t1, r1_myelin, exchange, tr, angle)
    phase = torch.tensor(reference["ann_phase_IEW_rad"], dtype=F64).reshape(-1)
    torch.testing.assert_close(pools[0].angle(), phase, atol=0.004, rtol=0)
    for i in range(2):
        change = torch.tensor(reference["ann_magn_diff"], dtype=F64)[:, i]
        torch.testing.assert_close(pools[i].abs() - ideal[i], change, atol=8e-5, rtol=0)
