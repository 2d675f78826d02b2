"""Gradients that are not linear, against volumes simulated with the gradients of each voxel."""

import numpy as np
import pytest

from bids_gacelle.engine import DwiVolumes, EngineError, fit, get_model, prepare_dwi

from .helpers import even_directions

B, N = (0.7, 1.5, 3.0), 60


def fibres(rng, kappa, n=60):
    """Axes around a random direction (Watson); kappa 0: around none."""
    axis, u = rng.normal(size=3), rng.normal(size=(5000, 3))
    u /= np.linalg.norm(u, axis=1)[:, None]
    cosine2 = (u @ axis) ** 2 / (axis @ axis)
    return u[rng.random(len(u)) < np.exp(kappa * (cosine2 - 1))][:n]


def volumes(tissue, tensors):
    """Sticks in tortuous spaces, what mcmicro averages, at (I + L) g instead of g."""
    directions = [even_directions(N, seed) for seed in range(3)]
    columns = []
    for (fn, d, u), tensor in zip(tissue, tensors, strict=True):
        signal = [np.ones(2)]
        for b, g in zip(B, directions, strict=True):
            actual = g @ (np.eye(3) + tensor).T
            along = b * (actual @ u.T) ** 2
            across = b * np.sum(actual**2, axis=1)[:, None] - along
            extra = np.exp(-d * along - (1 - fn) * d * across)
            signal.append((fn * np.exp(-d * along) + (1 - fn) * extra).mean(axis=1))
        columns.append(np.concatenate(signal))
    bval = np.concatenate([np.zeros(2), np.repeat(1e3 * np.array(B), N)])
    bvec = np.concatenate([np.zeros((2, 3)), *directions])
    return DwiVolumes(np.stack(columns, axis=1).astype(np.float32), bval, bvec)


@pytest.mark.parametrize(("kappa", "gain"), [(0, 6), (2, 3), (8, 1.4)])
def test_parameters_are_closer_with_the_actual_b(kappa, gain):
    """Deviations up to 5 %: the error of d falls, least where fibres have one orientation."""
    rng, voxels = np.random.default_rng(0), 60
    tissue = [
        (rng.uniform(0.3, 0.8), rng.uniform(1.2, 2.4), fibres(rng, kappa)) for _ in range(voxels)
    ]
    deviation = rng.uniform(-0.05, 0.05, (voxels, 3, 3))
    linear = prepare_dwi([volumes(tissue, np.zeros((voxels, 3, 3)))])
    assert linear.bscale is None
    prepared = prepare_dwi([volumes(tissue, deviation)], gradient_tensor=deviation)
    model = get_model("mcmicro")(prepared.scheme)
    reference = fit(model, linear.signals).maps["d"]
    without = fit(model, prepared.signals).maps["d"]
    corrected = fit(model, prepared.signals, inputs={"bscale": prepared.bscale}).maps["d"]
    errors = [np.sqrt(np.mean((d - reference) ** 2)) for d in (without, corrected)]
    assert errors[0] > 0.04
    assert errors[1] < errors[0] / gain


def test_bscale_is_the_mean_over_weighted_volumes():
    rng = np.random.default_rng(1)
    g = even_directions(8)
    bval = np.array([0, 5, *[1000] * 8], float)
    bvec = np.concatenate([rng.normal(size=(2, 3)), 2 * g])  # directions are normalised
    run = DwiVolumes(np.ones((10, 3), np.float32), bval, bvec)
    tensor = rng.uniform(-0.1, 0.1, (3, 3, 3))
    tensor[2, 1, 1] = np.nan
    prepared = prepare_dwi([run, run], gradient_tensor=tensor)
    expected = [np.mean([np.sum((v + t @ v) ** 2) for v in g]) for t in tensor]
    np.testing.assert_allclose(prepared.bscale, expected, rtol=1e-6)
    assert any("gradient deviation has no value in 1 of 3 voxels" in w for w in prepared.warnings)
    uniform = prepare_dwi([run], gradient_tensor=np.broadcast_to(0.02 * np.eye(3), (3, 3, 3)))
    np.testing.assert_allclose(uniform.bscale, 1.02**2, rtol=1e-6)
    with pytest.raises(EngineError, match=r"shape \(3, 9\)"):
        prepare_dwi([run], gradient_tensor=np.zeros((3, 9)))
