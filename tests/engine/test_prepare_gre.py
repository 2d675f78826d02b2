"""Fields and initial phases from complex echoes, held against what was simulated."""

from __future__ import annotations

import numpy as np
import pytest

from bids_gacelle.engine import EngineError, GradientEchoScheme
from bids_gacelle.engine.prepare import demodulate

ANGLES = np.array([5.0, 10.0, 20.0, 50.0, 70.0])
LEVELS = np.array([0.7, 1.0, 0.9, 0.45, 0.3])
SPOILING = np.array([0.0, 0.1, 0.2, 0.4, 0.6])  # rad, as RF spoiling does to water


def protocol(times, angles=ANGLES) -> GradientEchoScheme:
    return GradientEchoScheme(
        echo_time=np.tile(times, len(angles)),
        flip_angle=np.repeat(angles, len(times)),
        repetition_time=0.05,
    )


def simulate(times, n=1500, snr=np.inf, reach=150.0, seed=0, angles=ANGLES):
    """Complex images (images, voxels) and their true fields (angles, voxels) and phases."""
    random = np.random.default_rng(seed)
    field = random.uniform(-reach, reach, n) + random.normal(0, 3, (len(angles), n))
    phase = random.uniform(-np.pi, np.pi, n)
    rate = random.uniform(10, 40, n)
    te = np.asarray(times)[None, :, None]
    angle = 2 * np.pi * field[:, None] * te + phase + SPOILING[: len(angles), None, None]
    signal = LEVELS[: len(angles), None, None] * np.exp(-te * rate + 1j * angle)
    signal = signal.reshape(-1, n)
    noise = random.normal(size=(2, *signal.shape)) / snr
    return (signal + noise[0] + 1j * noise[1]).astype(np.complex64), field, phase


TIMES = 2.2e-3 + 3.07e-3 * np.arange(12)


def apart(phase, other):
    return np.angle(np.exp(1j * (phase - other)))


def test_fields_far_beyond_one_turn_over_the_echo_train():
    volumes, field, phase = simulate(TIMES)
    found = demodulate(volumes, protocol(TIMES))
    np.testing.assert_allclose(found.field, field, atol=1e-3)
    # one phase for all flip angles: theirs from spoiling stay, apart from a common one
    assert np.ptp(apart(found.phase, phase)) < 1e-3
    left = found.signals[:60] + 1j * found.signals[60:]
    turned = np.angle(left).reshape(5, 12, -1)
    np.testing.assert_allclose(
        turned - turned[:1], (SPOILING[:, None, None]) * np.ones_like(turned), atol=2e-3
    )
    np.testing.assert_allclose(np.abs(left), np.abs(volumes), rtol=1e-5)
    assert not found.warnings


def test_noise_of_the_fields_is_that_of_the_cramer_rao_bound():
    """Var f = sigma^2 / ((2 pi)^2 sum |S|^2 (TE - mean)^2), the mean weighted by |S|^2."""
    snr = 40.0
    volumes, field, _ = simulate(TIMES, 4000, snr, seed=1)
    clean, _, _ = simulate(TIMES, 4000, seed=1)
    found = demodulate(volumes, protocol(TIMES))
    power = np.abs(clean.reshape(5, 12, -1)) ** 2
    te = TIMES[:, None]
    mean = (power * te).sum(1, keepdims=True) / power.sum(1, keepdims=True)
    bound = 1 / (2 * np.pi * snr * np.sqrt((power * (te - mean) ** 2).sum(1)))
    ratio = np.sqrt(np.mean(((found.field - field) / bound) ** 2, axis=1))
    assert (np.abs(ratio - 1) < 0.06).all()


def test_flip_angles_share_one_alias_where_the_field_is_at_the_end_of_the_range():
    """At 1 / (2 x 3.07 ms) = 163 Hz one flip angle must not be taken for -163 Hz."""
    volumes, field, _ = simulate(TIMES, snr=60, reach=0)
    edge = 1 / (2 * 3.07e-3)
    shift = np.exp(2j * np.pi * edge * np.tile(TIMES, 5))[:, None]
    found = demodulate(volumes * shift, protocol(TIMES)).field
    alias = 1 / 3.07e-3
    distance = (found - (field + edge)) / alias
    assert np.abs(distance - np.round(distance[:1])).max() * alias < 6
    assert set(np.round(distance[0])) <= {-1.0, 0.0}


def test_unequal_echo_times_and_a_single_excitation():
    times = np.array([0.003, 0.0075, 0.015, 0.024])
    volumes, field, phase = simulate(times, snr=100, reach=105, angles=ANGLES[:1])
    scheme = GradientEchoScheme(echo_time=times)
    found = demodulate(volumes, scheme)
    assert found.field.shape == (1, volumes.shape[1])
    assert np.quantile(np.abs(found.field - field), 0.99) < 3
    assert np.abs(apart(found.phase, phase)).std() < 0.02


def test_echo_trains_of_different_length_as_of_mpm():
    lengths = (8, 6)
    times = np.concatenate([2.3e-3 * np.arange(1, k + 1) for k in lengths])
    angles = np.repeat([6.0, 21.0], lengths)
    random = np.random.default_rng(3)
    field = random.uniform(-200, 200, 500)
    volumes = np.exp(2j * np.pi * field * times[:, None] - 20 * times[:, None])
    scheme = GradientEchoScheme(echo_time=times, flip_angle=angles, repetition_time=0.025)
    found = demodulate(volumes, scheme)
    np.testing.assert_allclose(found.field, np.tile(field, (2, 1)), atol=1e-2)
    assert found.excitation.tolist() == [0] * 8 + [1] * 6


def test_voxels_do_not_see_each_other_and_poor_ones_stay_finite():
    volumes, _, _ = simulate(TIMES, 300, snr=2)
    volumes[:, 5] = 0
    scheme = protocol(TIMES)
    found = demodulate(volumes, scheme)
    for values in (found.signals, found.field, found.phase):
        assert np.isfinite(values).all()
    alone = demodulate(volumes[:, 7:8], scheme)
    np.testing.assert_allclose(alone.field[:, 0], found.field[:, 7], atol=1e-3)
    broken = volumes.copy()
    broken[3, 9] = np.nan
    found = demodulate(broken, scheme)
    assert np.isnan(found.signals[[3, 63], 9]).all()
    assert np.isfinite(np.delete(found.signals[:, 9], [3, 63])).all()
    assert np.isfinite(found.field).all()


def test_the_other_sign_of_the_phase_gives_the_other_sign_of_the_field():
    volumes, _, _ = simulate(TIMES, 300, snr=100)
    one, other = (demodulate(v, protocol(TIMES)) for v in (volumes, volumes.conj()))
    np.testing.assert_allclose(one.field, -other.field, atol=2e-3)
    np.testing.assert_allclose(one.signals[:60], other.signals[:60], atol=1e-3)
    np.testing.assert_allclose(one.signals[60:], -other.signals[60:], atol=1e-3)


def test_one_echo_has_no_field():
    volumes, _, _ = simulate(TIMES[:1], 100, reach=0)
    found = demodulate(volumes, protocol(TIMES[:1]))
    assert (found.field == 0).all()
    assert np.isfinite(found.phase).all()


@pytest.mark.parametrize(("offset", "warned"), [(0.5, True), (0.0, False)])
def test_readouts_of_alternating_polarity_are_noticed(offset, warned):
    volumes, _, _ = simulate(TIMES, snr=60)
    odd = np.tile(np.arange(12) % 2, 5)[:, None]
    found = demodulate(volumes * np.exp(1j * offset * odd), protocol(TIMES))
    assert bool(found.warnings) is warned
    if warned:
        assert "0.5 rad" in found.warnings[0]


def test_noise_alone_is_no_alternating_polarity():
    random = np.random.default_rng(0)
    volumes = random.normal(size=(2, 60, 2000))
    assert not demodulate(volumes[0] + 1j * volumes[1], protocol(TIMES)).warnings


def test_what_cannot_be_demodulated():
    with pytest.raises(EngineError, match="need their echo times"):
        demodulate(np.ones((2, 3), complex), GradientEchoScheme(flip_angle=[5, 10]))
    with pytest.raises(EngineError, match=r"\(60, voxels\) is needed"):
        demodulate(np.ones((2, 3), complex), protocol(TIMES))
