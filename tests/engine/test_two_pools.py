"""Bloch-McConnell steady states against matrix exponentials and reference numbers."""

import json

import pytest
import torch

from bids_gacelle.engine.derivatives import directional
from bids_gacelle.engine.physics.steady_state import spgr
from bids_gacelle.engine.physics.two_pools import bloch_mcconnell

F64 = torch.float64


def cases(n=400):
    """Tissue and sequences, a good part of them at the limits."""
    generator = torch.Generator().manual_seed(1)

    def pick(*values):
        return torch.tensor(values, dtype=F64)[
            torch.randint(len(values), (n,), generator=generator)
        ]

    def draw(low, high):
        return low + (high - low) * torch.rand(n, generator=generator, dtype=F64)

    return (
        pick(1e-7, 1e-4, 1e-3, 0.1, 0.3, 0.72, 0.999),
        pick(0.2, 1.0, 2.0) * draw(0.9, 1.1),
        pick(1.0, 5.0) * draw(0.9, 1.1),
        pick(0.0, 1e-6, 0.1, 2.0, 10.0),
        draw(0.005, 0.1),
        draw(0.01, 2.0),
    )


def exact(fraction, r1_free, r1_myelin, exchange, tr, angle):
    """The definition, with a matrix exponential."""
    back = exchange * (1 - fraction) / fraction
    rows = [-r1_free - exchange, back], [exchange, -r1_myelin - back]
    rates = torch.stack([torch.stack(row, -1) for row in rows], -2)
    e = torch.linalg.matrix_exp(rates * tr[:, None, None])
    one = torch.eye(2, dtype=e.dtype)
    equilibrium = torch.stack((1 - fraction, fraction), -1)[..., None]
    cosine = torch.cos(angle)[:, None, None]
    signal = torch.linalg.solve(one - e * cosine, (one - e) @ equilibrium)[..., 0]
    return tuple((torch.sin(angle)[:, None] * signal).unbind(-1))


def test_it_is_the_definition_with_a_matrix_exponential():
    values = cases()
    usable = values[0] > 1e-6  # rounding spoils the definition below
    for ours, theirs in zip(bloch_mcconnell(*values), exact(*values), strict=True):
        torch.testing.assert_close(ours[usable], theirs[usable], atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(ours, theirs, atol=2e-8, rtol=0)


def test_single_precision_loses_nothing_but_its_rounding():
    values = cases()
    single = bloch_mcconnell(*(value.float() for value in values))
    for ours, theirs in zip(single, bloch_mcconnell(*values), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-7, rtol=1e-5)


def test_the_pools_are_alone_without_exchange():
    fraction, r1_free, r1_myelin, _, tr, angle = cases()
    free, myelin = bloch_mcconnell(fraction, r1_free, r1_myelin, torch.tensor(0.0), tr, angle)
    torch.testing.assert_close(free, (1 - fraction) * spgr(angle, tr, r1_free)[0])
    torch.testing.assert_close(myelin, fraction * spgr(angle, tr, r1_myelin)[0])


@pytest.mark.parametrize("exchange", [0.0, 3.0])
def test_no_myelin_leaves_one_pool(exchange):
    _, r1_free, r1_myelin, _, tr, angle = cases()
    zero = torch.tensor(0.0, dtype=F64)
    free, myelin = bloch_mcconnell(zero, r1_free, r1_myelin, zero + exchange, tr, angle)
    torch.testing.assert_close(free, spgr(angle, tr, r1_free)[0], atol=1e-7, rtol=0)
    assert (myelin == 0).all()


@pytest.mark.parametrize("which", range(6))
def test_derivatives_are_those_of_the_definition(which):
    values = cases()
    tangents = tuple((torch.ones_like if i == which else torch.zeros_like)(v)
                     for i, v in enumerate(values))  # fmt: skip
    _, ours = directional(lambda *v: torch.stack(bloch_mcconnell(*v)), values, tangents)
    usable = values[0] > 1e-6
    _, theirs = directional(lambda *v: torch.stack(exact(*v)), values, tangents)
    torch.testing.assert_close(ours[:, usable], theirs[:, usable], atol=1e-6, rtol=1e-6)
    single = directional(
        lambda *v: torch.stack(bloch_mcconnell(*v)),
        tuple(v.float() for v in values),
        tuple(v.float() for v in tangents),
    )[1]
    # With next to no exchange a change of the fraction by itself changes the modes: its reciprocal
    # multiplies the rounding error.
    usable = (values[0] > 2e-4) | (values[3] > 1e-3)
    torch.testing.assert_close(single.double()[:, usable], ours[:, usable], atol=3e-5, rtol=2e-4)


def test_derivatives_are_finite_where_modes_meet_and_without_myelin():
    one = torch.ones(4, dtype=torch.float32)
    fraction = torch.tensor([0.0, 0.0, 0.2, 0.2])
    exchange = torch.tensor([0.0, 2.0, 0.0, 0.0])
    values = (fraction, one, one, exchange, 0.05 * one, 0.5 * one)
    for which in range(6):
        tangents = tuple((torch.ones_like if i == which else torch.zeros_like)(v)
                         for i, v in enumerate(values))  # fmt: skip
        _, slope = directional(lambda *v: torch.stack(bloch_mcconnell(*v)), values, tangents)
        assert slope.isfinite().all()
        assert slope.abs().max() < 10


def test_it_is_one_graph():
    compiled = torch.compile(bloch_mcconnell, backend="eager", fullgraph=True)
    values = cases(10)
    for ours, theirs in zip(compiled(*values), bloch_mcconnell(*values), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reference_numbers(shared):
    reference = json.loads((shared / "reference/bm_ann.json").read_text())
    f, t1, _, exchange, tr, angle = torch.tensor(reference["params"], dtype=F64).T
    r1_myelin = torch.tensor(1 / reference["T1_myelin"], dtype=F64)
    free, myelin = bloch_mcconnell(f, 1 / t1, r1_myelin, exchange, tr, angle)
    expected = torch.tensor(reference["bloch_mcconnell"], dtype=F64)
    torch.testing.assert_close(torch.stack((myelin, free), 1), expected, atol=1e-10, rtol=0)
