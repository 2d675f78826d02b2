"""Standard deviations where measurements share a noisy factor, such as their b=0 signal."""

import numpy as np
import pytest
import torch

from bids_gacelle.engine import DwiVolumes, fit, get_model, prepare_dwi

from .helpers import Line, even_directions, make_model, noisy

AXIS = np.array([0.6, 0.48, 0.64])


def check_coverage(result, truth, label=""):
    for name, value in truth.items():
        error, sd = result.maps[name] - value, result.std[name]
        assert np.isfinite(sd).all()
        assert 0.93 < (np.abs(error) < 1.96 * sd).mean() < 0.97, f"{name} {label}"
        assert abs(np.median(sd) / error.std() - 1) < 0.1, f"{name} {label}"


def brain_run(n_b0, fn, d, snr, voxels):
    """Volumes of one bundle of sticks in a tortuous space, which is what mcmicro averages."""
    rng = np.random.default_rng(n_b0)
    bval, bvec = [np.zeros(n_b0)], [np.zeros((n_b0, 3))]
    signal = [np.ones(n_b0)]
    for b, n in ((1.0, 32), (2.0, 48), (3.0, 60)):
        g = even_directions(n)
        cosine2 = (g @ AXIS) ** 2
        radial = (1 - fn) * d * (1 - cosine2)
        signal.append(
            fn * np.exp(-b * d * cosine2) + (1 - fn) * np.exp(-b * (d * cosine2 + radial))
        )
        bval.append(np.full(n, 1e3 * b))
        bvec.append(g)
    clean = np.concatenate(signal)[:, None]
    noisy_volumes = clean + rng.normal(size=(len(clean), voxels)) / snr
    return DwiVolumes(
        (100 * noisy_volumes).astype(np.float32), np.concatenate(bval), np.concatenate(bvec)
    )


@pytest.mark.parametrize("n_b0", [1, 3, 8])
def test_intervals_of_mcmicro_cover_whatever_the_number_of_b0_volumes(n_b0):
    truth = {"fn": 0.55, "d": 1.8}
    prepared = prepare_dwi([brain_run(n_b0, **truth, snr=30, voxels=4000)])
    model = get_model("mcmicro")(prepared.scheme)
    shared = {"scale_sigma": prepared.scale_sigma, "scale_group": prepared.scale_group}
    result = fit(model, prepared.signals, sigma=prepared.sigma, **shared)
    check_coverage(result, truth, f"with {n_b0} b=0 volumes")
    if n_b0 == 1:  # what was wrong without it
        alone = fit(model, prepared.signals, sigma=prepared.sigma)
        assert np.median(alone.std["d"]) < 0.8 * np.median(result.std["d"])


def test_intervals_of_nexi_cover_with_a_b0_for_each_diffusion_time():
    model = make_model("nexi")
    truth = {"fn": 0.5, "dn": 2.2, "de": 0.9, "tex": 25.0}
    rng = np.random.default_rng(1)
    group = np.unique(model.scheme.big_delta, return_inverse=True)[1]
    voxels, sd, common = 3000, 2e-4, np.array([1e-3, 2e-3, 1.5e-3])
    clean = model.signal({k: torch.tensor(v).double() for k, v in truth.items()}).numpy()
    factor = 1 + common[:, None] * rng.normal(size=(3, voxels))
    data = clean[:, None] * factor[group] + sd * rng.normal(size=(len(clean), voxels))
    scale_sigma = np.tile(common[:, None], voxels)
    result = fit(model, data, sigma=sd, scale_sigma=scale_sigma, scale_group=group)
    check_coverage(result, truth | {"rn": 0.5 / 25})
    alone = fit(model, data, sigma=sd)
    assert np.median(alone.std["de"]) < 0.75 * np.median(result.std["de"])


@pytest.mark.parametrize("prior", [None, {"offset": (0.0, 0.5)}])
def test_covariance_is_that_of_generalised_propagation(prior):
    """A straight line, whose estimate is a known matrix times the data."""
    times = np.array([0.1, 0.2, 0.4, 0.8, 1.6, 2.0])
    rng = np.random.default_rng(2)
    group, relative = np.array([0, 2, 0, 1, 1, 2]), rng.uniform(0.01, 0.2, (3, 2, 5))
    sigma = rng.uniform(0.02, 0.1, (6, 2, 5))
    data = (0.7 + np.log(1.8) * times)[:, None, None] + sigma * rng.normal(size=(6, 2, 5))
    options = {"sigma": sigma, "prior": prior, "precision": "float64"}
    plain = fit(Line.of(times), data, **options)
    result = fit(Line.of(times), data, scale_sigma=relative, scale_group=group, **options)
    assert result.settings["scale_sigma"] == "given"
    assert plain.settings["scale_sigma"] is None
    jacobian = np.stack([np.ones(6), times], axis=1)
    for name in result.maps:
        np.testing.assert_array_equal(result.maps[name], plain.maps[name])
    for i in np.ndindex(2, 5):
        weight = np.diag(sigma[:, *i] ** -2)
        inverse = np.linalg.inv(
            jacobian.T @ weight @ jacobian + (np.diag([4.0, 0.0]) if prior else 0)
        )
        offset, factor = (float(result.maps[name][i]) for name in ("offset", "factor"))
        signal = offset + np.log(factor) * times
        same = (group[:, None] == group) * relative[group][:, *i] ** 2
        moves = inverse @ jacobian.T @ weight
        covariance = inverse + moves @ (same * np.outer(signal, signal)) @ moves.T
        expected = np.sqrt(np.diag(covariance)) * [1, factor]
        found = [float(result.std[name][i]) for name in ("offset", "factor")]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        slope = np.array([factor, offset * factor])  # of offset x factor, in solver coordinates
        np.testing.assert_allclose(
            result.std["product"][i], np.sqrt(slope @ covariance @ slope), rtol=1e-5
        )


@pytest.mark.parametrize("solver", ["lm", "linear"])
def test_a_factor_of_all_measurements_is_one_of_the_amplitude(solver):
    model = make_model("despot1")
    rng = np.random.default_rng(3)
    params = {
        "M0": torch.full((50,), 800.0).double(),
        "R1": torch.tensor(rng.uniform(0.5, 1.5, 50)),
    }
    data = noisy(model, params, 0.2, 4)
    options = {"sigma": 0.2, "solver": solver, "precision": "float64"}
    plain = fit(model, data, **options)
    result = fit(model, data, scale_sigma=np.full((1, 50), 0.03), scale_group=[0] * 5, **options)
    np.testing.assert_allclose(result.std["R1"], plain.std["R1"], rtol=2e-3)
    expected = np.hypot(plain.std["M0"], 0.03 * result.maps["M0"])
    np.testing.assert_allclose(result.std["M0"], expected, rtol=2e-3)


def test_blocks_do_not_matter_and_bad_voxels_are_flagged():
    model = make_model("mcmicro")
    params = {"fn": torch.full((40,), 0.5).double(), "d": torch.full((40,), 1.7).double()}
    data = noisy(model, params, 0.01, 5)
    scale = np.random.default_rng(6).uniform(0, 0.05, (2, 40))
    scale[1, 3], scale[0, 4] = np.nan, -1
    options = {"sigma": 0.01, "scale_sigma": scale, "scale_group": [0, 0, 0, 1, 1, 1]}
    whole, parts = fit(model, data, **options), fit(model, data, block_size=7, **options)
    np.testing.assert_array_equal(whole.std["d"], parts.std["d"])
    np.testing.assert_array_equal(np.flatnonzero(whole.flags & 4), [3, 4])
