import numpy as np

from bids_gacelle.phantom.fields import smooth_field, stream


def test_fields_are_bounded_smooth_and_of_unit_variance():
    axis = np.arange(0.0, 2000.0, 40.0)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    fields = [smooth_field(points, stream(seed, "test")) for seed in range(6)]
    assert all(np.abs(field).max() <= 2 for field in fields)
    assert abs(np.mean(fields)) < 0.05
    # tanh takes a little off the unit variance of the sum of waves
    assert 0.75 < np.std(fields) < 1.0
    # One millimetre changes a wave of at least 60 mm by at most 2 pi / 60 of its amplitude.
    step = smooth_field(points + np.array([1.0, 0, 0]), stream(0, "test")) - fields[0]
    assert np.abs(step).max() < 8 * np.sqrt(2 / 8) * 2 * np.pi / 60


def test_streams_depend_on_seed_and_purpose_only():
    def draw(*labels):
        return stream(*labels).normal(size=4)

    np.testing.assert_array_equal(draw(1, "a", 2), draw(1, "a", 2))
    for other in ((2, "a", 2), (1, "b", 2), (1, "a", 3)):
        assert np.abs(draw(1, "a", 2) - draw(*other)).max() > 1e-3
