"""Signal preparation of dwi against real scans, reference vectors, DIPY and simulation."""

import json

import numpy as np
import pytest
import torch
from scipy.special import eval_legendre

from bids_gacelle.engine import EngineError, fit, get_model
from bids_gacelle.engine.prepare import DwiVolumes, measure, prepare_dwi, real_sh, sh_fit_matrix

from .helpers import even_directions


def stick(b: float, directions: np.ndarray, axis: np.ndarray, d: float = 1.7) -> np.ndarray:
    return np.exp(-b * d * (directions @ axis) ** 2)


def stick_invariant(b: float, degree: int, d: float = 1.7) -> float:
    """|int_0^1 exp(-b d x^2) P_l(x) dx|, the S_l of one stick, by dense quadrature."""
    x, w = np.polynomial.legendre.leggauss(200)
    return abs(0.5 * np.sum(w * np.exp(-b * d * x**2) * eval_legendre(degree, x)))


def volumes(shells, n_b0=6, noise=0.0, voxels=1, seed=1, scale=100.0, **timing) -> DwiVolumes:
    """A run of sticks along one axis; ``shells`` is a list of (b s/mm^2, directions)."""
    rng = np.random.default_rng(seed)
    axis = np.array([0.6, 0.48, 0.64])
    bval = np.concatenate([np.zeros(n_b0)] + [np.full(len(g), b) for b, g in shells])
    bvec = np.concatenate([np.zeros((n_b0, 3))] + [g for _, g in shells])
    signal = np.concatenate([np.ones(n_b0)] + [stick(b / 1e3, g, axis) for b, g in shells])
    signal = signal[:, None] + noise * rng.normal(size=(len(bval), voxels))
    return DwiVolumes((scale * signal).astype(np.float32), bval, bvec, **timing)


def test_basis_is_dipys():
    shm = pytest.importorskip("dipy.reconst.shm")
    g = even_directions(25)
    theta, phi = np.arccos(g[:, 2]), np.arctan2(g[:, 1], g[:, 0])
    expected = shm.real_sh_descoteaux(8, theta, phi, legacy=False)[0]
    np.testing.assert_allclose(real_sh(g, 8), expected, atol=1e-12)


def test_basis_at_the_poles():
    basis = real_sh([[0, 0, 1], [0, 0, -1]], 4)
    expected = np.zeros(15)
    expected[[0, 3, 10]] = np.sqrt(np.array([1, 5, 9]) / (4 * np.pi))
    np.testing.assert_allclose(basis, [expected, expected], atol=1e-15)


def test_reference_invariants(shared):
    """Upstream: order-2 least squares for S_0 and S_2, plain mean for l_max = 0."""
    reference = json.loads((shared / "reference" / "rotinv.json").read_text())
    b, g = np.array(reference["b"]), np.array(reference["bvec"])
    dwi = np.array(reference["dwi"])
    dwi = (dwi if dwi.shape[0] == len(b) else dwi.T).astype(np.float32)
    run = DwiVolumes(dwi, 1e3 * b, g)
    plain = prepare_dwi([run], powder="mean")
    np.testing.assert_allclose(plain.scheme.b, [1.0, 2.5])
    np.testing.assert_allclose(plain.signals.T, reference["lmax0_output"], atol=2e-7)

    expected = np.array(reference["lmax2_output"]).T
    for i, shell in enumerate((1.0, 2.5)):
        x = dwi[b == shell] / dwi[b == 0].mean(axis=0)
        fit = sh_fit_matrix(g[b == shell], 2) @ x
        np.testing.assert_allclose(np.abs(fit[0]) / np.sqrt(4 * np.pi), expected[i], atol=1e-6)
        s2 = np.sqrt(np.sum(fit[1:] ** 2, axis=0)) / np.sqrt(4 * np.pi * 5)
        np.testing.assert_allclose(s2, expected[2 + i], atol=1e-6)


def _load_run(root, name):
    nibabel = pytest.importorskip("nibabel")
    stem = root / "sub-01" / "dwi" / f"sub-01_acq-{name}_dwi"
    mask_file = f"derivatives/masks/sub-01/dwi/sub-01_acq-{name}_desc-brain_mask.nii.gz"
    mask = np.asarray(nibabel.load(root / mask_file).dataobj) > 0
    data = nibabel.load(f"{stem}.nii.gz").get_fdata(dtype=np.float32)[mask].T
    bval, bvec = np.loadtxt(f"{stem}.bval"), np.loadtxt(f"{stem}.bvec").T
    sidecar = json.loads(stem.with_name(stem.name + ".json").read_text())
    times = {"big_delta": 1e3 * sidecar["LargeDelta"], "small_delta": 1e3 * sidecar["SmallDelta"]}
    times["echo_time"] = sidecar["EchoTime"]
    return DwiVolumes(data, bval, bvec, **{k: np.full(len(bval), v) for k, v in times.items()})


def test_powder_averages_of_a_brain(shared):
    root = shared / "data" / "dwi_brain_mdt"
    b2k, b6k = (prepare_dwi([_load_run(root, name)]) for name in ("b2k", "b6k"))
    np.testing.assert_allclose(
        np.median(b2k.signals[:, b2k.usable], axis=1), [0.46, 0.26], atol=0.005
    )
    np.testing.assert_allclose(b6k.scheme.b, [0.75, 1.5, 2.25, 3, 3.75, 4.5, 5.2, 6])
    np.testing.assert_array_equal(b6k.scheme.n_directions, [3, 6, 9, 12, 15, 18, 21, 24])
    medians = np.median(b6k.signals[:, b6k.usable], axis=1)
    np.testing.assert_allclose(medians[:4], [0.53, 0.33, 0.22, 0.16], atol=0.005)
    assert abs(medians[-1] - 0.078) < 0.005
    for prepared in (b2k, b6k):
        assert prepared.usable.mean() > 0.99


@pytest.mark.parametrize("name", ["b2k", "b6k"])
@pytest.mark.parametrize("noise_model", ["gaussian", "rician"])
def test_negative_samples_do_not_spoil_voxels_of_a_brain(shared, name, noise_model):
    """Interpolation left some; what counts is the average."""
    run = _load_run(shared / "data" / "dwi_brain_mdt", name)
    negative = (run.signal < 0).any(axis=0)
    assert negative.mean() > 0.04
    prepared = prepare_dwi([run], noise_model=noise_model)
    assert prepared.usable.mean() > 0.99
    assert prepared.usable[negative].mean() > 0.93  # most others have b=0 at the noise floor


def test_two_runs_are_joined_each_by_its_own_b0():
    g = even_directions(30)
    first = volumes([(1000, g), (2000, g)], scale=100, voxels=4)
    second = volumes([(1000, g)], scale=37, voxels=4)
    timed = [
        DwiVolumes(
            run.signal,
            run.bval,
            run.bvec,
            big_delta=np.full(len(run.bval), big),
            small_delta=np.full(len(run.bval), 8.0),
            echo_time=np.full(len(run.bval), te),
        )
        for run, big, te in ((first, 26.5, 0.06), (second, 42.0, 0.091))
    ]
    prepared = prepare_dwi(timed)
    np.testing.assert_allclose(prepared.scheme.big_delta, [26.5, 26.5, 42.0])
    np.testing.assert_allclose(prepared.scheme.echo_time, [0.06, 0.06, 0.091])
    np.testing.assert_allclose(prepared.signals[0], prepared.signals[2], atol=1e-6)
    np.testing.assert_allclose(prepared.b0, 100, rtol=1e-6)
    np.testing.assert_array_equal(prepared.scale_group, [0, 0, 1])
    # timing that only one run states is no timing of the scheme
    assert prepare_dwi([first, timed[1]]).scheme.big_delta is None


def test_jittered_b_values_are_one_shell():
    g = even_directions(30)
    run = volumes([(1000, g), (2500, g)])
    jitter = np.where(run.bval > 0, np.resize([-5, 0, 5, 5, -5], len(run.bval)), 0)
    jittered = _change(run, bval=run.bval + jitter)
    prepared = prepare_dwi([jittered])
    np.testing.assert_allclose(prepared.scheme.b, [1.0, 2.5], atol=2e-3)
    np.testing.assert_array_equal(prepared.scheme.n_directions, 30)
    np.testing.assert_array_equal(prepared.signals, prepare_dwi([run]).signals)


def test_b_of_5_is_b0():
    run = volumes([(1000, even_directions(30))], n_b0=4)
    run.signal[2:4] *= 3
    low = _change(run, bval=np.where(np.arange(34) < 4, [0, 5, 5, 0] + [0] * 30, run.bval))
    prepared = prepare_dwi([low])
    np.testing.assert_allclose(prepared.scheme.b, [1.0])
    np.testing.assert_allclose(prepared.b0, 200)  # the mean of all four
    np.testing.assert_array_equal(prepared.b0_groups.count, [4])


def test_runs_of_different_echo_time_have_their_own_b0():
    """Each run halves its own b=0 signal, whatever that of the other is."""
    g = even_directions(20)
    runs = []
    for te, level in ((0.06, 300.0), (0.09, 120.0)):
        run = volumes([(1000, g)])
        signal = np.where(run.bval[:, None] > 0, level / 2, level).astype(np.float32)
        runs.append(_change(run, signal=signal, echo_time=np.full(26, te)))
    prepared = prepare_dwi(runs)
    np.testing.assert_allclose(prepared.signals[:, 0], [0.5, 0.5])
    np.testing.assert_allclose(prepared.scheme.echo_time, [0.06, 0.09])
    np.testing.assert_allclose(prepared.b0_groups.signal[:, 0], [300, 120])
    np.testing.assert_allclose(prepared.b0_groups.echo_time, [0.06, 0.09])


def test_unknown_diffusion_times_hinder_only_models_that_need_them():
    truth = {"fn": 0.5, "d": 1.9}
    scheme = prepare_dwi([volumes([(b, even_directions(30)) for b in (700, 1500, 3000)])]).scheme
    assert scheme.big_delta is None
    assert scheme.small_delta is None
    model = get_model("mcmicro")(scheme)
    data = model.signal({k: torch.full((2,), v).double() for k, v in truth.items()}).numpy()
    for name, value in truth.items():
        np.testing.assert_allclose(fit(model, data).maps[name], value, rtol=1e-3)
    with pytest.raises(EngineError, match="nexi needs big_delta"):
        get_model("nexi")(scheme)


def test_shells_by_tolerance():
    """Jittered b, b0 = 5, two echo times and two diffusion times in one run."""
    g = even_directions(20)
    rng = np.random.default_rng(3)
    blocks = [
        (b, te, big) for b in (1000, 1150) for te, big in ((0.06, 20), (0.09, 20.02), (0.06, 40))
    ]
    n_b0 = 5
    bval, te, big, bvec, signal = [], [], [], [], []
    for time, level in ((0.06, 200.0), (0.09, 50.0)):
        bval += [5.0] * n_b0
        te, big, bvec = te + [time] * n_b0, big + [0.0] * n_b0, bvec + [np.zeros(3)] * n_b0
        signal += [level] * n_b0
    for b, time, delta in blocks:
        bval += list(b + rng.choice([-5, 0, 5], size=20))
        te, big, bvec = te + [time] * 20, big + [delta] * 20, bvec + list(g)
        signal += [0.5 * (200.0 if time == 0.06 else 50.0) + (10 if b > 1100 else 0)] * 20
    order = rng.permutation(len(bval))
    arrays = [np.array(a, dtype=float)[order] for a in (signal, bval, bvec, big, te)]
    run = DwiVolumes(
        arrays[0][:, None].astype(np.float32),
        arrays[1],
        arrays[2],
        big_delta=arrays[3],
        small_delta=np.full(len(bval), 6.0),
        echo_time=arrays[4],
    )
    prepared = prepare_dwi([run])
    scheme = prepared.scheme
    np.testing.assert_allclose(scheme.b, np.tile([1.0, 1.15], 3), atol=0.003)
    np.testing.assert_allclose(scheme.echo_time, [0.06] * 4 + [0.09] * 2)
    np.testing.assert_allclose(scheme.big_delta, [20, 20, 40, 40, 20.02, 20.02])
    np.testing.assert_array_equal(scheme.n_directions, 20)
    expected = [0.5, 0.55, 0.5, 0.55, 0.5, 0.7]
    np.testing.assert_allclose(prepared.signals[:, 0], expected, rtol=1e-6)
    assert prepared.b0[0] == 200
    np.testing.assert_array_equal(prepared.scale_group, [0] * 4 + [1] * 2)
    # the longer echo has 1/4 of the signal and so 4 times the relative noise
    np.testing.assert_allclose(4 * prepared.scale_sigma[0], prepared.scale_sigma[1], rtol=1e-6)
    np.testing.assert_array_equal(
        prepare_dwi([run, run], l_max=2).scale_group,
        np.tile([0] * 4 + [1] * 2 + [2] * 4 + [3] * 2, 2),
    )


@pytest.mark.parametrize("n", [30, 64])
def test_invariants_of_a_stick(n):
    g = even_directions(n)
    prepared = prepare_dwi([volumes([(1000, g), (3000, g)])], l_max=2)
    expected = [stick_invariant(b, degree) for degree in (0, 2) for b in (1, 3)]
    np.testing.assert_allclose(prepared.signals[:, 0], expected, atol=0.006)


def test_uneven_directions_are_averaged_by_spherical_harmonics():
    """A crowd of directions around one pole must not decide the average."""
    crowd = np.array([0, 0, 1]) + 0.3 * np.random.default_rng(5).normal(size=(25, 3))
    g = np.vstack([even_directions(30), crowd / np.linalg.norm(crowd, axis=1)[:, None]])
    truth = stick_invariant(2.0, 0)
    run = volumes([(2000, g)])
    chosen, plain = prepare_dwi([run]), prepare_dwi([run], powder="mean")
    assert abs(plain.signals[0, 0] - truth) > 0.03
    assert abs(chosen.signals[0, 0] - truth) < 0.005
    assert any("uneven" in w for w in chosen.warnings)
    even = prepare_dwi([volumes([(2000, even_directions(30))])])
    assert not even.warnings
    [several] = prepare_dwi([volumes([(1000, g), (2000, g)])]).warnings
    assert "b = 1000" in several
    assert "b = 2000" in several


@pytest.mark.parametrize("uneven", [False, True])
def test_noise_is_recovered_and_propagated(uneven):
    """Against the scatter of 20,000 noisy copies of one voxel."""
    noise, voxels = 0.03, 20_000
    g = even_directions(40)
    if uneven:
        g = np.vstack([g, g[g[:, 2] > 0.8], g[g[:, 2] > 0.8]])
    run = volumes([(1000, g), (2500, even_directions(60))], n_b0=4, noise=noise, voxels=voxels)
    prepared = prepare_dwi([run], l_max=2)
    assert any("averaged by spherical" in w for w in prepared.warnings) == uneven
    # to the noise of its own a measurement adds its value times that of the b=0 mean
    common = prepared.signals * prepared.scale_sigma
    scatter = prepared.signals.std(axis=1, dtype=np.float64)
    np.testing.assert_allclose(
        np.median(np.hypot(prepared.sigma, common), axis=1), scatter, rtol=0.1
    )
    covariance = np.cov(prepared.signals[:2].astype(np.float64))[0, 1]
    np.testing.assert_allclose(
        np.sqrt(np.median(common[0] * common[1])), np.sqrt(covariance), rtol=0.1
    )
    # undo the propagation of S_0 of the even shell: the noise of one volume
    sigma = prepared.sigma[1] * np.sqrt(prepared.scheme.n_directions[1])
    assert abs(np.median(sigma) / noise - 1) < 0.1
    assert abs(np.median(prepared.scale_sigma) * np.sqrt(4) / noise - 1) < 0.1


def test_noise_needs_degrees_of_freedom():
    run = volumes([(1000, even_directions(9))], n_b0=3, noise=0.02, voxels=5)
    prepared = prepare_dwi([run])
    assert prepared.sigma is None
    assert prepared.scale_sigma is None
    np.testing.assert_array_equal(prepared.scale_group, [0])
    assert any("noise not estimated" in w for w in prepared.warnings)
    assert any("fewer than 12" in w for w in prepared.warnings)
    more = volumes([(1000, even_directions(9))], n_b0=9, noise=0.02, voxels=5)
    assert prepare_dwi([more]).sigma is not None


def test_repeated_directions_give_the_noise():
    """Six directions five times: no SH fit of order 4, but repeats."""
    g = np.tile(even_directions(6), (5, 1))
    run = volumes([(1000, g)], n_b0=1, noise=0.05, voxels=2000)
    prepared = prepare_dwi([run])
    for noise in (prepared.sigma[0] * np.sqrt(30), prepared.scale_sigma[0]):
        assert abs(np.sqrt(np.mean(noise**2)) / 0.05 - 1) < 0.1


def test_given_noise_replaces_the_estimate():
    g = even_directions(30)
    runs = [volumes([(1000, g)], noise=0.03, voxels=40, seed=s) for s in (1, 2)]
    estimated = prepare_dwi(runs)
    assert estimated.noise_source == "b=0 repeats and SH residuals"
    level = np.linspace(1, 9, 40)
    level[:3] = np.nan, 0, np.inf
    given = prepare_dwi(runs, noise=[level, None])
    assert given.noise_source == "run 1: noise map; run 2: b=0 repeats and SH residuals"
    np.testing.assert_array_equal(given.signals, estimated.signals)
    np.testing.assert_array_equal(given.sigma[1], estimated.sigma[1])
    np.testing.assert_array_equal(given.sigma[0, :3], estimated.sigma[0, :3])
    b0 = runs[0].signal[:6].mean(axis=0)
    np.testing.assert_allclose(given.sigma[0, 3:], (level / b0 / np.sqrt(30))[3:], rtol=1e-5)
    np.testing.assert_allclose(given.scale_sigma[0, 3:], (level / b0 / np.sqrt(6))[3:], rtol=1e-5)
    assert [w for w in given.warnings if "3 of 40 voxels" in w and "b=0 repeats" in w]


def test_given_noise_where_none_can_be_estimated():
    run = volumes([(1000, even_directions(9))], n_b0=3, noise=0.02, voxels=5)
    assert prepare_dwi([run]).noise_source == "unknown"
    prepared = prepare_dwi([run], noise=[np.array([1.0, 2.0, 3.0, np.nan, 4.0])])
    assert prepared.noise_source == "noise map"
    assert not any("not estimated" in w for w in prepared.warnings)
    b0 = run.signal[:3].mean(axis=0)
    np.testing.assert_allclose(prepared.sigma[0] * b0 * 3, [1, 2, 3, 2.5, 4], rtol=1e-5)
    assert any("1 of 5 voxels" in w and "median" in w for w in prepared.warnings)
    with pytest.raises(EngineError, match="2 noise levels"):
        prepare_dwi([run], noise=[None, None])
    with pytest.raises(EngineError, match=r"shape \(4,\)"):
        prepare_dwi([run], noise=[np.ones(4)])
    with pytest.raises(EngineError, match="no positive value in any voxel"):
        prepare_dwi([run], noise=[np.zeros(5)])


def test_no_noise_gives_finite_weights():
    prepared = prepare_dwi([volumes([(1000, even_directions(30))])], l_max=2)
    assert np.all(prepared.sigma > 0)


def test_usable_is_judged_on_averages():
    run = volumes([(3000, even_directions(30))], voxels=6)
    run.signal[10, 1] = -3.0  # one negative sample
    run.signal[0, 2] = -1.0  # one negative b=0 sample
    run.signal[12, 3] = np.nan
    run.signal[:6, 4] = 0.0
    run.signal[:6, 5] = -2.0
    prepared = prepare_dwi([run], l_max=2)
    np.testing.assert_array_equal(prepared.usable, [True, True, True, False, False, False])
    assert np.isfinite(prepared.signals[:, :3]).all()
    assert np.isnan(prepared.signals[:, 3:]).all()


def test_blocks_and_neighbours_do_not_matter(monkeypatch):
    run = volumes([(1000, even_directions(30))], noise=0.05, voxels=50)
    whole = prepare_dwi([run], l_max=2)
    monkeypatch.setattr(measure, "_BLOCK_ELEMENTS", 7 * run.signal.shape[0])
    parts = prepare_dwi([run], l_max=2)
    np.testing.assert_allclose(parts.signals, whole.signals, rtol=1e-6)
    np.testing.assert_allclose(parts.sigma, whole.sigma, rtol=1e-6)
    np.testing.assert_allclose(parts.scale_sigma, whole.scale_sigma, rtol=1e-6)


def _change(run: DwiVolumes, **arrays) -> DwiVolumes:
    return DwiVolumes(**{**run.__dict__, **arrays})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: {"bvec": np.where(np.arange(36)[:, None] == 9, 0, r.bvec)}, "volume 9"),
        (lambda r: {"bvec": np.where(np.arange(36)[:, None] == 7, np.nan, r.bvec)}, "volume 7"),
        (lambda r: {"bval": r.bval[:-1]}, "36 volumes"),
        (lambda r: {"bvec": r.bvec.T}, "36 volumes"),
        (lambda r: {"bval": np.where(np.arange(36) == 8, np.nan, r.bval)}, "volume 8"),
        (lambda r: {"bval": r.bval / 1000}, "s/mm"),
        (lambda r: {"bval": r.bval + 500}, "no volume has b up to"),
        (lambda r: {"echo_time": np.where(r.bval > 0, 0.06, 0.09)}, "b=0 volume has the echo"),
        (lambda r: {"big_delta": np.where(np.arange(36) == 20, 0.0, 30)}, "volume 20"),
        (lambda r: {"small_delta": np.ones(3)}, "small_delta of shape"),
        (lambda r: {"bval": np.where(r.bval > 0, np.linspace(900, 1500, 36), 0)}, "without a gap"),
    ],
)
def test_unusable_input_is_named(change, words):
    run = volumes([(1000, even_directions(30))])
    with pytest.raises(EngineError, match=words):
        prepare_dwi([_change(run, **change(run))])


def test_the_threshold_is_the_highest_b_that_is_b0():
    run = volumes([(50, even_directions(30)), (1000, even_directions(30))])
    np.testing.assert_allclose(prepare_dwi([run], b0_threshold=50).scheme.b, [1.0])
    np.testing.assert_allclose(prepare_dwi([run], b0_threshold=49.9).scheme.b, [0.05, 1.0])
    np.testing.assert_allclose(prepare_dwi([run], b0_threshold=0).scheme.b, [0.05, 1.0])
    for threshold in (-1.0, np.nan, np.inf):
        with pytest.raises(EngineError, match="b=0 threshold is"):
            prepare_dwi([run], b0_threshold=threshold)


def test_invariants_are_left_out_where_directions_do_not_determine_them():
    """A shell of 5 directions, and one whose many directions are all in one plane."""
    ring = np.stack([np.cos(np.arange(20)), np.sin(np.arange(20)), np.zeros(20)], axis=1)
    shells = [(700, even_directions(5)), (1500, ring), (2000, even_directions(30))]
    run = volumes(shells, noise=0.02, voxels=4)
    alone = prepare_dwi([volumes(shells, noise=0.02, voxels=4)])
    assert not any("left out" in w for w in alone.warnings)
    np.testing.assert_array_equal(alone.weights, 1)
    prepared = prepare_dwi([run], l_max=2)
    np.testing.assert_array_equal(prepared.signals[:3], alone.signals)
    np.testing.assert_array_equal(prepared.weights, [1, 1, 1, 0, 0, 1])
    assert np.isinf(prepared.sigma[3:5]).all()
    assert np.isfinite(prepared.sigma[[0, 1, 2, 5]]).all()
    assert np.isfinite(prepared.signals).all()
    [note] = [w for w in prepared.warnings if "left out" in w]
    assert "S_2" in note
    assert "b = 700 s/mm^2: 5; b = 1500 s/mm^2: 20" in note
    # of higher orders what the directions do determine stays
    higher = prepare_dwi([run], l_max=4)
    np.testing.assert_array_equal(higher.weights, [1, 1, 1, 0, 0, 1, 0, 0, 1])
    twelve = prepare_dwi([volumes([*shells, (3000, even_directions(12))])], l_max=4)
    np.testing.assert_array_equal(twelve.weights, [1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0])


def test_an_order_that_no_shell_determines_is_refused():
    run = volumes([(1000, even_directions(5)), (2200, even_directions(12))])
    with pytest.raises(EngineError, match=r"l = 4 .*15 well.*b = 2200 .*has 12\); use l_max 2"):
        prepare_dwi([run], l_max=4)
    with pytest.raises(EngineError, match="do not determine"):
        prepare_dwi([run], powder="sh")
    with pytest.raises(EngineError, match="noise model is 'poisson'"):
        prepare_dwi([run], noise_model="poisson")


@pytest.mark.parametrize("known", [True, False])
def test_a_fit_ignores_what_is_left_out(known):
    """NEXI with S_2 of two of three shells, against the fit that has just those."""
    truth = {"fn": 0.5, "dn": 2.2, "de": 0.9, "tex": 25.0, "p2": 0.6}
    g, few = even_directions(30), even_directions(4)
    shells = [(1000, g), (2000, few), (3000, g), (5000, g), (7000, g)]
    run = volumes(shells, voxels=3, n_b0=10 if known else 1)
    run = _change(run, big_delta=np.full(len(run.bval), 20.0))
    prepared = prepare_dwi([run], l_max=2)
    assert prepared.weights[6] == 0
    model = get_model("nexi")(prepared.scheme, l_max=2)
    clean = model.signal({k: torch.full((3,), v).double() for k, v in truth.items()}).numpy()
    clean[6] = 0.0
    sigma = np.where(np.isinf(prepared.sigma), np.inf, 1e-3)
    noise = {"sigma": sigma} if known else {"weights": prepared.weights}
    result = fit(model, clean, **noise)
    for name, value in truth.items():
        np.testing.assert_allclose(result.maps[name], value, rtol=1e-3)


def test_direction_length_is_normalised_with_a_warning():
    g = even_directions(30)
    run, doubled = volumes([(1000, g)]), volumes([(1000, g)])
    doubled = _change(doubled, bvec=2 * doubled.bvec)
    prepared = prepare_dwi([doubled], l_max=2)
    np.testing.assert_allclose(prepared.signals, prepare_dwi([run], l_max=2).signals, rtol=1e-6)
    assert any("unit length" in w for w in prepared.warnings)
