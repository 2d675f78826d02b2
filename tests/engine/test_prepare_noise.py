"""What noise does to powder averages and invariants, by simulation with known orientations."""

import numpy as np
import pytest
import torch
from scipy.special import eval_legendre

from bids_gacelle.engine import DwiVolumes, fit, get_model, prepare_dwi
from bids_gacelle.engine.physics import rician
from bids_gacelle.engine.prepare import sh_fit_matrix
from bids_gacelle.engine.prepare.magnitudes import expected, invert, spread

from .helpers import even_directions

B0, D = 6, 1.7


def watson(kappa: float, n: int = 60) -> np.ndarray:
    """Fibre axes around one direction; 0: over the whole sphere."""
    rng = np.random.default_rng(5)
    u = rng.normal(size=(40_000, 3))
    u /= np.linalg.norm(u, axis=1)[:, None]
    return u[rng.random(len(u)) < np.exp(kappa * ((u @ [0.6, 0.48, 0.64]) ** 2 - 1))][:n]


FIBRES = {
    "none": even_directions(200),
    "dispersed": watson(2),
    "crossing": np.array([[1.0, 0, 0], [0, 0.6, 0.8]]),
    "coherent": watson(8),
    "one": np.array([[0.6, 0.48, 0.64]]),
}


def sticks(b: float, g: np.ndarray, fibres: np.ndarray) -> np.ndarray:
    return np.exp(-b * D * (g @ fibres.T) ** 2).mean(axis=1)


def invariant(b: float, fibres: np.ndarray, degree: int) -> float:
    """S_l of sticks: the kernel times the root of mean P_l(u . v) over pairs of fibres."""
    x, w = np.polynomial.legendre.leggauss(200)
    kernel = abs(0.5 * np.sum(w * np.exp(-b * D * x**2) * eval_legendre(degree, x)))
    return kernel * np.sqrt(max(eval_legendre(degree, fibres @ fibres.T).mean(), 0))


def noisy_run(clean, g, b, noise, voxels, *, magnitude=False, seed=0):
    """Volumes of shells with the same directions; ``clean`` is (shells, n)."""
    rng = np.random.default_rng(seed)
    signal = np.concatenate([np.ones(B0), clean.ravel()])[:, None]
    signal = signal + noise * rng.normal(size=(len(signal), voxels))
    if magnitude:
        signal = np.hypot(signal, noise * rng.normal(size=signal.shape))
    bval = np.concatenate([np.zeros(B0), np.repeat(1e3 * np.array(b), len(g))])
    bvec = np.concatenate([np.zeros((B0, 3)), *[g] * len(b)])
    return DwiVolumes((100 * signal).astype(np.float32), bval, bvec)


@pytest.mark.parametrize("snr", [20, 50])
@pytest.mark.parametrize("kind", FIBRES)
@pytest.mark.parametrize("degree", [2, 4])
def test_invariants_lose_the_power_of_noise(kind, snr, degree):
    b, g, voxels = 2.0, even_directions(30), 20_000
    clean = sticks(b, g, FIBRES[kind])[None]
    run = noisy_run(clean, g, [b], 1 / snr, voxels)
    known = {"l_max": degree, "noise": [np.full(voxels, 100 / snr)]}
    prepared = prepare_dwi([run], **known)
    noise_free = noisy_run(clean, g, [b], 0, 1)
    truth = prepare_dwi([noise_free], degree, noise=[np.full(1, 1e-3)]).signals[-1, 0]
    assert abs(truth - invariant(b, FIBRES[kind], degree)) < 0.006  # of 30 directions
    found = prepared.signals[-1].astype(np.float64)

    f = sh_fit_matrix(g, 6, penalty_above=degree)
    f = f[1:6] if degree == 2 else f[6:15]
    volumes = run.signal[B0:] / run.signal[:B0].mean(axis=0)
    scale = np.sqrt(4 * np.pi * (2 * degree + 1))
    raw = np.linalg.norm(f @ volumes, axis=0) / scale
    noise = np.sqrt(np.mean(f**2) * f.shape[1]) / scale / snr  # of S_l where it is large
    bias, before = found.mean() - truth, raw.mean() - truth
    assert abs(bias) < 0.45 * noise
    if before > 0.3 * noise:  # what there is to correct
        assert abs(bias) < 0.35 * before
    if kind == "none":
        assert before > 0.9 * noise

    common = prepared.signals[-1] * prepared.scale_sigma[0]
    said = np.sqrt(np.mean(np.hypot(prepared.sigma[-1], common) ** 2))
    assert 0.95 < said / found.std() < 1.2
    # weights that follow the noise of the data must not bring the bias back
    weight = prepared.sigma[-1].astype(np.float64) ** -2
    assert abs((weight * found).sum() / weight.sum() - truth) < 0.45 * noise


def test_coherence_of_isotropic_tissue_is_not_noise():
    """NEXI with S_2: p2 of tissue without anisotropy, with and without what noise adds."""
    b, g, voxels = [1.0, 2.0, 3.0, 5.0], even_directions(30), 1500
    truth = {"fn": 0.5, "dn": 2.2, "de": 0.9, "tex": 25.0, "p2": 0.0}
    run = noisy_run(np.zeros((4, 30)), g, b, 0, 1)
    times = np.full(len(run.bval), 20.0)
    scheme = prepare_dwi([DwiVolumes(run.signal, run.bval, run.bvec, big_delta=times)]).scheme
    model = get_model("nexi")(scheme, l_max=2)
    s0 = model.signal({k: torch.tensor(v).double() for k, v in truth.items()}).numpy()[:4]
    run = noisy_run(np.repeat(s0[:, None], 30, axis=1), g, b, 1 / 25, voxels)
    p2 = {}
    for known in (True, False):
        noise = [np.full(voxels, 4.0 if known else 1e-3)]  # next to none: nothing is subtracted
        prepared = prepare_dwi([run], l_max=2, noise=noise)
        p2[known] = np.median(fit(model, prepared.signals, sigma=prepared.sigma).maps["p2"])
    assert p2[False] > 0.1
    assert p2[True] < 0.4 * p2[False]


def test_unknown_noise_stays_in_the_invariants_and_is_said():
    g = even_directions(9)
    run = noisy_run(np.full((1, 9), 0.4), g, [1.0], 0.05, 500)
    run = DwiVolumes(run.signal[5:], run.bval[5:], run.bvec[5:])  # one b=0 volume
    prepared = prepare_dwi([run], l_max=2)
    assert prepared.sigma is None
    assert (prepared.signals[1] > 0).all()
    assert any("S_2 and higher hold the power of noise" in w for w in prepared.warnings)
    assert not any("hold the power" in w for w in prepare_dwi([run]).warnings)


def test_unknown_noise_still_weighs_shells_by_their_directions():
    """S_l of n even directions has the variance sigma^2 / n (2l+1)."""
    few, more = even_directions(7), even_directions(28)
    bval = np.concatenate([[0], np.full(7, 1000), np.full(28, 2000), np.full(5, 3000)])
    bvec = np.concatenate([np.zeros((1, 3)), few, more, even_directions(5)])
    run = DwiVolumes(np.ones((len(bval), 2), np.float32), bval, bvec)
    alone = prepare_dwi([DwiVolumes(run.signal[:8], bval[:8], bvec[:8])])
    assert alone.sigma is None
    joined = [
        DwiVolumes(run.signal[[0, *rows]], bval[[0, *rows]], bvec[[0, *rows]])
        for rows in (range(1, 8), range(8, 36), range(36, 41))
    ]
    prepared = prepare_dwi(joined, l_max=2)
    assert prepared.sigma is None
    expected = np.array([7, 28, 5, 7 * 5, 28 * 5, 0]) / (28 * 5)
    np.testing.assert_allclose(prepared.weights, expected, rtol=0.12)
    np.testing.assert_allclose(prepare_dwi(joined).weights, [7 / 28, 1, 5 / 28], rtol=1e-6)


def test_tables_of_the_rice_distribution():
    signal = np.array([0.0, 1e-3, 0.4, 1.0, 3.0, 11.0, 30.0, 300.0])
    sigma = np.array([0.5, 2.0])[:, None]
    tensors = torch.tensor(signal), torch.tensor(sigma**2)
    mean = expected(signal, sigma)
    np.testing.assert_allclose(mean, rician.mean(*tensors)[0], rtol=1e-5)
    np.testing.assert_allclose(invert(mean, sigma)[:, 2:], [signal[2:]] * 2, rtol=1e-4)
    np.testing.assert_array_equal(invert(0.9 * mean[:, 0], sigma[:, 0]), 0)
    exact = rician.spread(*tensors) / tensors[1]
    np.testing.assert_allclose(spread(signal, sigma), exact, rtol=2e-3)


@pytest.mark.parametrize("b", [3.0, 6.0])
@pytest.mark.parametrize("snr", [15, 20])
def test_averages_of_magnitudes_of_coherent_fibres(b, snr):
    """Sticks around one axis in an isotropic ball, 64 directions.

    Near the floor the mean magnitude is far above the magnitude of the mean; a likelihood that
    knows the mean alone must get data without that excess.
    """
    g, voxels = even_directions(64), 3000
    u = watson(8)
    clean = 0.6 * np.exp(-b * 2.2 * (g @ u.T) ** 2).mean(axis=1) + 0.4 * np.exp(-b * 0.7)
    run = noisy_run(clean[None], g, [b], 1 / snr, voxels, magnitude=True)
    noise = [np.full(voxels, 100 / snr)]
    target = expected(clean.mean(), np.array(1 / snr))
    plain, corrected = (
        prepare_dwi([run], noise=noise, noise_model=kind) for kind in ("gaussian", "rician")
    )
    before, after = (p.signals[0].mean(dtype=np.float64) - target for p in (plain, corrected))
    assert before > 0.003
    assert abs(after) < (0.25 if b > 5 else 0.95) * before
    scatter = corrected.signals[0].std(dtype=np.float64)
    said = np.median(np.hypot(corrected.sigma, corrected.signals * corrected.scale_sigma))
    assert 0.9 < said / scatter < 1.1


@pytest.mark.parametrize("uneven", [False, True])
def test_averages_of_magnitudes_of_isotropic_tissue_stay(uneven):
    """Also weighted averages, whose effective number of directions is 1 / sum w^2."""
    g, snr, voxels = even_directions(40), 12, 6000
    if uneven:
        g = np.vstack([g, g[g[:, 2] > 0.8], g[g[:, 2] > 0.8]])
    run = noisy_run(np.full((1, len(g)), 0.12), g, [4.0], 1 / snr, voxels, magnitude=True)
    prepared = prepare_dwi([run], noise_model="rician")
    number = prepared.scheme.n_directions[0]
    assert number == len(g) if not uneven else number < 0.95 * len(g)
    # repeats at b=0 and residuals at the floor tell the same noise of one channel
    channel = np.sqrt(np.mean((prepared.sigma[0] * np.sqrt(number)) ** 2))
    assert abs(channel * snr - 1) < 0.03
    assert np.sqrt(np.mean(prepare_dwi([run]).scale_sigma ** 2) * B0) * snr < 0.9
    bias = prepared.signals[0].mean(dtype=np.float64) - expected(0.12, np.array(1 / snr))
    assert abs(bias) < 0.0015
    weights = prepared.sigma[0] / (prepared.scale_sigma[0] * np.sqrt(B0))
    np.testing.assert_allclose(weights, 1 / np.sqrt(number), rtol=1e-3)


@pytest.mark.parametrize("b", [3.0, 6.0])
@pytest.mark.parametrize("snr", [15, 20, 40])
@pytest.mark.parametrize("kappa", [4, 16])
def test_coherence_of_magnitudes_is_that_of_signals(b, snr, kappa):
    """Near the floor magnitudes have less contrast between directions than signals."""
    g, voxels = even_directions(64), 3000
    u = watson(kappa)
    clean = 0.6 * np.exp(-b * 2.2 * (g @ u.T) ** 2).mean(axis=1) + 0.4 * np.exp(-b * 0.7)
    signals, magnitudes = (
        noisy_run(clean[None], g, [b], 1 / snr, voxels, magnitude=kind) for kind in (False, True)
    )
    known = {"l_max": 2, "noise": [np.full(voxels, 100 / snr)]}
    exact = prepare_dwi([signals], **known).signals[1].mean(dtype=np.float64)
    plain = prepare_dwi([magnitudes], **known)
    corrected = prepare_dwi([magnitudes], **known, noise_model="rician")
    before, after = (p.signals[1].mean(dtype=np.float64) - exact for p in (plain, corrected))
    said, scatter = np.median(corrected.sigma[1]), corrected.signals[1].std(dtype=np.float64)
    assert before < 0
    assert abs(after) < 0.55 * max(said, -before)
    assert abs(after) < 0.5 * -before or -before < said
    assert 0.8 < said / scatter < 1.6
