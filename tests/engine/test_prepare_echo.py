"""Measurements relative to the b=0 signal of the shortest echo time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bids_gacelle.engine import (
    DiffusionScheme,
    DwiVolumes,
    EngineError,
    fit,
    get_model,
    prepare_dwi,
)
from bids_gacelle.engine.prepare.magnitudes import expected

from .helpers import even_directions

G = even_directions(30)


def run(blocks, noise=0.0, voxels=3, seed=0, gain=100.0) -> DwiVolumes:
    """Volumes in blocks of (TE s, level of b=0, number of b=0, [(b, big, small, S/S0), ...])."""
    rng = np.random.default_rng(seed)
    rows = []
    for te, level, n_b0, shells in blocks:
        rows += [(level, 0.0, np.zeros(3), 0.0, 0.0, te)] * n_b0
        rows += [
            (level * ratio, b, g, big, small, te) for b, big, small, ratio in shells for g in G
        ]
    signal, bval, bvec, big, small, te = (np.array(column) for column in zip(*rows, strict=True))
    data = gain * (signal[:, None] + noise * rng.normal(size=(len(signal), voxels)))
    return DwiVolumes(data.astype(np.float32), bval, bvec, big, small, te)


SHORT = [(2000, 20.0, 8.0, 0.3), (1000, 20.0, 8.0, 0.5)]
LONG = [(1000, 40.0, 8.0, 0.45), (3000, 30.0, 8.0, 0.2), (1000, 30.0, 8.0, 0.48)]


def test_rows_are_relative_to_the_shortest_echo_time():
    """Two runs, the later echo time first; b=0 has the timing of the first shell of its own."""
    runs = [
        run([(0.09, 0.4, 5, LONG)]),
        run([(0.06, 1.0, 4, SHORT), (0.12, 0.2, 3, SHORT[:1])]),
    ]
    prepared = prepare_dwi(runs, l_max=2)
    np.testing.assert_allclose(prepared.signals[:3, 0], [0.48, 0.2, 0.45], rtol=1e-6)
    decay = prepared.with_echo_decay()
    scheme = decay.scheme
    np.testing.assert_allclose(scheme.echo_time, [0.06] * 2 + [0.09] * 4 + [0.12] * 2)
    np.testing.assert_allclose(scheme.b, [1, 2, 0, 1, 3, 1, 0, 2])
    np.testing.assert_allclose(scheme.big_delta, [20, 20, 30, 30, 30, 40, 20, 20])
    np.testing.assert_allclose(scheme.small_delta, 8)
    np.testing.assert_allclose(scheme.n_directions, [30, 30, 5, 30, 30, 30, 3, 30])
    expected = [0.5, 0.3, 0.4, 0.48 * 0.4, 0.2 * 0.4, 0.45 * 0.4, 0.2, 0.3 * 0.2]
    for voxel in range(3):
        np.testing.assert_allclose(decay.signals[:, voxel], expected, rtol=1e-5)
    np.testing.assert_array_equal(decay.scale_group, 0)
    assert decay.scale_sigma.shape == decay.signals[:1].shape
    np.testing.assert_array_equal(decay.weights, 1)


def test_timing_need_not_be_known():
    without = replace(
        run([(0.06, 1.0, 4, SHORT), (0.09, 0.4, 4, SHORT)]), big_delta=None, small_delta=None
    )
    decay = prepare_dwi([without]).with_echo_decay()
    assert decay.scheme.big_delta is None
    np.testing.assert_allclose(decay.scheme.b, [1, 2, 0, 1, 2])
    np.testing.assert_allclose(decay.signals[:, 0], [0.5, 0.3, 0.4, 0.2, 0.12], rtol=1e-5)


def test_noise_is_that_of_the_new_rows():
    """Against the covariance over 20,000 noisy copies."""
    noisy = run([(0.06, 1.0, 3, SHORT), (0.09, 0.5, 2, SHORT)], noise=0.03, voxels=20_000)
    decay = prepare_dwi([noisy]).with_echo_decay()
    common = decay.signals * decay.scale_sigma[decay.scale_group]
    said = np.median(np.hypot(decay.sigma, common), axis=1)
    np.testing.assert_allclose(said, decay.signals.std(axis=1, dtype=np.float64), rtol=0.06)
    covariance = np.cov(decay.signals.astype(np.float64))
    shared = np.median(common, axis=1)
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(covariance[off], np.outer(shared, shared)[off], rtol=0.15)


def test_runs_of_one_echo_time_keep_their_own_b0():
    """Drift between runs is divided out; another echo time is relative to the mean of both."""
    blocks = [(0.06, 1.0, 6, SHORT)]
    later = [(0.09, 0.4, 6, SHORT)]
    options = {"noise": 0.02, "voxels": 20_000}
    runs = [
        run(blocks, seed=1, **options),
        run(blocks, gain=80, seed=2, **options),
        run(later, seed=3, **options),
        run(later, gain=110, seed=4, **options),
    ]
    decay = prepare_dwi(runs).with_echo_decay()
    np.testing.assert_allclose(decay.scheme.b, [1, 1, 2, 2, 0, 1, 1, 2, 2])
    ratio = 0.4 * 105 / 90
    expected = np.array([0.5, 0.5, 0.3, 0.3, 1, 0.5, 0.5, 0.3, 0.3]) * ([1] * 4 + [ratio] * 5)
    np.testing.assert_allclose(decay.signals.mean(axis=1), expected, rtol=2e-3)
    np.testing.assert_array_equal(decay.scale_group, [0, 1, 0, 1, 2, 2, 2, 2, 2])
    assert decay.scheme.n_directions[4] == 12
    scale = np.median(decay.scale_sigma, axis=1)
    # as relative to a mean of 100 and 80: half of the root of 1 + (80 / 100)^2, all by 90 / 100
    np.testing.assert_allclose(scale[:2], 0.02 / np.sqrt(6), rtol=0.05)
    np.testing.assert_allclose(scale[2], 0.01 * np.hypot(100, 80) / 90 / np.sqrt(6), rtol=0.05)
    common = decay.signals * decay.scale_sigma[decay.scale_group]
    said = np.median(np.hypot(decay.sigma, common), axis=1)
    np.testing.assert_allclose(said, decay.signals.std(axis=1, dtype=np.float64), rtol=0.06)


def test_unknown_noise():
    few = even_directions(5)
    bval = np.array([0, *[1000] * 5] * 2, float)
    bvec = np.concatenate([np.zeros((1, 3)), few] * 2)
    te = np.repeat([0.06, 0.09], 6)
    volumes = DwiVolumes(np.full((12, 2), 7, np.float32), bval, bvec, echo_time=te)
    decay = prepare_dwi([volumes]).with_echo_decay()
    assert decay.sigma is None
    assert decay.scale_sigma is None
    np.testing.assert_allclose(decay.weights, [1, 0.2, 1])  # one b=0 volume


def test_magnitudes_of_b0_stay_magnitudes():
    """A likelihood of magnitudes expects the floor in b=0 as everywhere else."""
    noise, level = 0.1, 0.15
    rng = np.random.default_rng(4)
    volumes = run([(0.06, 1.0, 20, SHORT), (0.09, level, 20, SHORT)], voxels=4000)
    data = volumes.signal / 100 + noise * rng.normal(size=volumes.signal.shape)
    data = np.hypot(data, noise * rng.normal(size=data.shape)).astype(np.float32)
    told = {"noise": [np.full(4000, noise)], "noise_model": "rician"}
    decay = prepare_dwi([replace(volumes, signal=data)], **told).with_echo_decay()
    signal = np.array([0.5, 0.3, level, 0.5 * level, 0.3 * level])
    target = expected(signal, np.array(noise))
    np.testing.assert_allclose(decay.signals.mean(axis=1, dtype=np.float64), target, atol=2e-3)


@pytest.mark.parametrize("kept", [True, False])
def test_one_echo_time_or_none_is_refused(kept):
    volumes = run([(0.06, 1.0, 4, SHORT)])
    prepared = prepare_dwi([volumes if kept else replace(volumes, echo_time=None)])
    with pytest.raises(EngineError, match="echo time 60 ms" if kept else "are not known"):
        prepared.with_echo_decay()


def test_a_model_of_relaxation_finds_the_truth():
    """mcmicro with relaxation, from volumes of isotropic tissue made by its own definition."""
    truth = {"fn": 0.6, "d": 1.9, "r2a": 12.0, "r2e": 20.0}
    plain = get_model("mcmicro")
    shells, times = [0.7, 1.5, 3.0], [0.055, 0.08, 0.11]
    blocks = []
    for te in times:
        weights = {"n": truth["fn"] * np.exp(-te * truth["r2a"])}
        weights["e"] = (1 - truth["fn"]) * np.exp(-te * truth["r2e"])
        level = sum(weights.values())
        at = {"d": torch.tensor(truth["d"]).double()}
        model = plain(DiffusionScheme(b=shells))
        mixed = model.signal({"fn": torch.tensor(truth["fn"]).double(), **at}).numpy()
        stick = model.signal({"fn": torch.tensor(1.0).double(), **at}).numpy()
        extra = (mixed - truth["fn"] * stick) / (1 - truth["fn"])
        ratio = (weights["n"] * stick + weights["e"] * extra) / level
        blocks.append(
            (te, level, 4, [(1e3 * b, 20.0, 8.0, r) for b, r in zip(shells, ratio, strict=True)])
        )
    decay = prepare_dwi([run(blocks)]).with_echo_decay()
    model = plain(decay.scheme, relaxation=True)
    result = fit(model, decay.signals, precision="float64")
    for name, value in truth.items():
        np.testing.assert_allclose(result.maps[name], value, rtol=0.02)
