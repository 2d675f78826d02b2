import numpy as np
import pytest

from bids_gacelle.engine import DiffusionScheme, EngineError, GradientEchoScheme


def test_single_values_stand_for_all_measurements():
    scheme = GradientEchoScheme(flip_angle=[5, 20, 40], repetition_time=0.02)
    assert len(scheme) == 3
    np.testing.assert_array_equal(scheme.repetition_time, [0.02, 0.02, 0.02])
    assert scheme.echo_time is None


def test_field_and_spoiling_stand_for_all_images():
    scheme = GradientEchoScheme(
        echo_time=[0.002, 0.005], field_strength=3, spoiling_increment=[0, 117]
    )
    np.testing.assert_array_equal(scheme.field_strength, [3, 3])
    np.testing.assert_array_equal(scheme.spoiling_increment, [0, 117])
    taken = scheme.take(np.array([False, True]))
    np.testing.assert_array_equal(taken.spoiling_increment, [117])
    assert eval(repr(taken), {"GradientEchoScheme": GradientEchoScheme}).columns() == {
        "echo_time": [0.005],
        "flip_angle": None,
        "repetition_time": None,
        "field_strength": [3],
        "spoiling_increment": [117],
    }


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("field_strength", 0.0, r"field_strength holds 0\.0; .* positive number in T"),
        ("spoiling_increment", -1, r"spoiling_increment holds -1\.0; .*at least 0 in degrees"),
        ("spoiling_increment", [50, 50, 50], "echo_time has 2, spoiling_increment has 3"),
    ],
)
def test_impossible_gradient_echoes_are_refused(column, value, message):
    with pytest.raises(EngineError, match=message):
        GradientEchoScheme(echo_time=[0.002, 0.005], **{column: value})


def test_columns_are_read_only():
    scheme = DiffusionScheme(b=[1.0, 2.0])
    with pytest.raises(ValueError, match="read-only"):
        scheme.b[0] = 3


def test_repr_makes_an_equal_scheme():
    scheme = DiffusionScheme(b=[1.0, 2.0], big_delta=30.0, small_delta=6.0, n_directions=32)
    again = eval(repr(scheme), {"DiffusionScheme": DiffusionScheme})
    for name, column in scheme.columns().items():
        np.testing.assert_array_equal(column, again.columns()[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b": [1.0, -0.1]}, r"b holds -0\.1.*at least 0.*ms/um"),
        ({"b": [1.0, np.nan]}, "b holds nan"),
        ({"b": [1.0, 2.0], "big_delta": [1.0, 2.0, 3.0]}, "b has 2, big_delta has 3"),
        ({"b": [1.0], "big_delta": [5.0], "small_delta": [6.0]}, "cannot outlast"),
        ({"b": [[1.0], [2.0]]}, "list of numbers"),
        ({"b": ["high"]}, "list of numbers in ms/um.*'high'"),
    ],
)
def test_impossible_diffusion_schemes_are_refused(arguments, message):
    with pytest.raises(EngineError, match=message):
        DiffusionScheme(**arguments)


def test_empty_gradient_echo_scheme_is_refused():
    with pytest.raises(EngineError, match="at least one of echo_time"):
        GradientEchoScheme()


def test_excitations_ascend_whatever_the_order_of_the_images():
    scheme = GradientEchoScheme(
        echo_time=[0.002, 0.002, 0.005, 0.002, 0.005],
        flip_angle=[20, 5, 20, 20, 5],
        repetition_time=[0.04, 0.04, 0.04, 0.03, 0.04],
    )
    number, values = scheme.excitations()
    np.testing.assert_array_equal(number, [2, 0, 2, 1, 0])
    np.testing.assert_array_equal(values, [[5, 0.04], [20, 0.03], [20, 0.04]])
    number, values = GradientEchoScheme(echo_time=[0.005, 0.002]).excitations()
    np.testing.assert_array_equal(number, [0, 0])
    np.testing.assert_array_equal(values, [[0, 0]])
