import numpy as np
import pytest
from scipy.integrate import quad
from scipy.spatial.transform import Rotation
from scipy.special import eval_legendre

from bids_gacelle.phantom.directions import directional_signal, spread_directions

COUNT = 32


@pytest.fixture(scope="module")
def axes() -> np.ndarray:
    return spread_directions(COUNT)


def test_directions_are_unit_vectors_well_apart(axes):
    np.testing.assert_allclose(np.linalg.norm(axes, axis=1), 1)
    between = np.degrees(np.arccos(np.abs(axes @ axes.T)[~np.eye(COUNT, dtype=bool)]))
    # 32 axes can be about 24 degrees apart at best
    assert between.min() > 17


@pytest.mark.parametrize("degree", [2, 4, 6, 8])
def test_directions_average_every_even_harmonic_to_nothing(axes, degree):
    """Sum over all pairs of P_l is 4 pi / (2l+1) times the sum of squared means of Y_lm."""
    assert np.mean(eval_legendre(degree, axes @ axes.T)) < 1e-9


@pytest.mark.parametrize("s0", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("ratio", [0.0, 1e-6, 0.05, 0.2, 0.35, 0.45])
def test_invariants_of_the_directional_signal_are_those_asked_for(s0, ratio):
    """Against adaptive integrals over the angle to the fibre."""

    def signal(x):
        return directional_signal(np.array([s0]), np.array([ratio * s0]), np.array([[x]]))[0, 0]

    zeroth = quad(signal, 0, 1, epsabs=1e-12)[0]
    second = quad(lambda x: signal(x) * eval_legendre(2, x), 0, 1, epsabs=1e-12)[0]
    assert zeroth == pytest.approx(s0, rel=1e-8)
    assert second == pytest.approx(-ratio * s0, abs=1e-7 * s0)
    assert signal(1.0) > 0


def test_mean_over_directions_is_the_powder_average_however_the_fibre_lies(axes):
    """Up to S_2 / S_0 = 0.33, that of the densest fibres of the digital brain."""
    for turn in Rotation.random(20, random_state=1):
        fibre = turn.as_matrix()[0]
        ratio = np.linspace(0, 0.33, 8)
        signal = directional_signal(np.ones(8), ratio, np.tile((axes @ fibre)[:, None], (1, 8)))
        assert np.abs(signal.mean(axis=0) - 1).max() < 1e-3


def test_a_model_without_s2_is_the_same_in_all_directions():
    signal = directional_signal(np.array([0.4, 0.2]), None, np.linspace(-1, 1, 6).reshape(3, 2))
    np.testing.assert_array_equal(signal, [[0.4, 0.2]] * 3)


def test_impossible_invariants_are_refused():
    with pytest.raises(ValueError, match="must be within 0 and 0"):
        directional_signal(np.array([0.1]), np.array([0.06]), np.zeros((1, 1)))
