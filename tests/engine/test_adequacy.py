"""Expected standard deviations against closed forms, real fits and the spread of many fits."""

import numpy as np
import pytest
import torch

from bids_gacelle.engine import (
    DiffusionScheme,
    DwiVolumes,
    EngineError,
    GradientEchoScheme,
    adequacy,
    expected_sd,
    fit,
    get_model,
    prepare_dwi,
)

from .helpers import ALL_MODELS, Line, Square, even_directions, make_model, noisy

THREE_POOLS = ("gremwi", "mcrmwi")


def by_name(found, tissue=None):
    return {e.parameter: e for e in found if tissue in (None, e.tissue)}


class Slope(Line):
    """A line somewhere else than in the middle of its start boxes."""

    name = "slope"
    tissues = {"here": {"offset": 0.4, "factor": 1.6}}  # noqa: RUF012


def test_two_echoes_of_an_exponential_are_solved_by_hand():
    """R2* = log(S1 / S2) / (TE2 - TE1) and log S0 is a line through two points."""
    times, sigma = np.array([0.005, 0.03]), 0.01
    model = get_model("r2star")(GradientEchoScheme(echo_time=times))
    found = by_name(expected_sd(model, sigma), "white matter")
    rate = model.tissues["white matter"]["R2star"]
    signal = np.exp(-(times - times[0]) * rate)  # the largest is 1
    gap, spread = np.diff(times)[0], sigma / signal
    slope = np.hypot(*spread) / gap
    assert found["R2star"].sd == pytest.approx(slope, rel=1e-9)
    assert found["T2star"].sd == pytest.approx(slope / rate**2, rel=1e-9)
    amplitude = np.hypot(times[1] * spread[0], times[0] * spread[1]) / gap
    assert found["S0"].sd == pytest.approx(amplitude, rel=1e-9)  # relative to S0
    assert found["S0"].unit == "1"


def test_a_line_has_the_covariance_of_linear_regression():
    """With unequal noise, with noise that measurements share, and with a prior."""
    times = np.array([0.5, 1.0, 2.0, 4.0])
    sigma, spread, group = np.array([0.1, 0.2, 0.1, 0.3]), [0.05, 0.02], np.array([0, 0, 1, 1])
    model = Slope.of(times)
    design = np.stack([np.ones(4), times], axis=1)
    weight = np.diag(1 / sigma**2)
    bound = np.linalg.inv(design.T @ weight @ design)
    found = by_name(expected_sd(model, sigma))
    assert found["offset"].sd == pytest.approx(np.sqrt(bound[0, 0]))
    assert found["factor"].sd == pytest.approx(1.6 * np.sqrt(bound[1, 1]))
    gradient = np.array([1.6, 0.4 * 1.6])  # of offset x factor by offset and log(factor)
    assert found["product"].sd == pytest.approx(np.sqrt(gradient @ bound @ gradient))
    assert np.isnan(found["offset"].posterior_sd)

    expected = design @ [0.4, np.log(1.6)]
    total = np.diag(sigma**2)
    for g, s in enumerate(spread):
        total += s**2 * np.outer(expected * (group == g), expected * (group == g))
    estimator = bound @ design.T @ weight
    shared = estimator @ total @ estimator.T
    found = by_name(expected_sd(model, sigma, scale_sigma=spread, scale_group=group))
    assert found["offset"].sd == pytest.approx(np.sqrt(shared[0, 0]))
    assert found["factor"].sd == pytest.approx(1.6 * np.sqrt(shared[1, 1]))

    prior = np.diag([1 / p.prior[1] ** 2 for p in model.parameters])
    posterior = np.linalg.inv(design.T @ weight @ design + prior)
    found = by_name(expected_sd(model, sigma, prior="weak"))
    assert found["offset"].sd == pytest.approx(np.sqrt(bound[0, 0]))
    assert found["offset"].posterior_sd == pytest.approx(np.sqrt(posterior[0, 0]))
    assert found["factor"].posterior_sd == pytest.approx(1.6 * np.sqrt(posterior[1, 1]))


@pytest.mark.parametrize(
    ("name", "options"),
    # At one diffusion time, other values of sandi give the same signals, as do those of the
    # water in and outside of axons when they change places.
    [(name, options) for name, options in ALL_MODELS if name not in ("sandi", *THREE_POOLS)],
)
def test_a_fit_of_typical_tissue_reports_what_was_expected(name, options):
    model = make_model(name, **options)
    shared = {}
    if model.kind == "dwi":
        shared = {"scale_group": np.zeros(model.n_measurements, int)}
    sigma = 2e-3 * np.linspace(1, 2, model.n_measurements)
    found = expected_sd(model, sigma, **shared, **({"scale_sigma": [0.002]} if shared else {}))
    if options.get("fit_r2a"):  # with k2a: only a prior tells the two apart
        assert {e.verdict for e in found} == {adequacy.UNDETERMINED}
        return
    tissues = list(dict.fromkeys(e.tissue for e in found))
    params = {
        p: torch.tensor([by_name(found, t)[p].value for t in tissues])
        for p in model.parameter_names
    }
    voxels = len(tissues)
    result = fit(
        model,
        model.signal({k: v.double() for k, v in params.items()}).numpy(),
        sigma=np.repeat(sigma[:, None], voxels, 1),
        precision="float64",
        starts=8,
        **shared,
        **({"scale_sigma": np.full((1, voxels), 0.002)} if shared else {}),
    )
    for i, tissue in enumerate(tissues):
        for e in by_name(found, tissue).values():
            amplitude = [p.name for p in model.parameters if p.amplitude]
            scale = result.maps[e.parameter][i] if e.parameter in amplitude else 1
            assert result.maps[e.parameter][i] == pytest.approx(e.value, rel=2e-3)
            assert result.std[e.parameter][i] / scale == pytest.approx(e.sd, rel=5e-3), e


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name, options in ALL_MODELS
        if name in THREE_POOLS and options.get("signal") != "magnitude"
    ],
)
def test_complex_measurements_of_three_pools_have_their_cramer_rao_bound(name, options):
    """The root of the diagonal of (J^T J / sigma^2)^-1, J by differences in double precision."""
    model, sigma = make_model(name, **options), 1 / 150
    found = by_name(expected_sd(model, sigma))
    point = {p: torch.tensor([found[p].value], dtype=torch.float64) for p in model.parameter_names}
    columns = []
    for p in model.parameter_names:
        step = 1e-5 * max(abs(float(point[p])), 1e-2)
        ends = [model.signal({**point, p: point[p] + s * step})[:, 0] for s in (1, -1)]
        columns.append(((ends[0] - ends[1]) / (2 * step)).numpy())
    jacobian = np.stack(columns, axis=1)
    scale = np.linalg.norm(jacobian, axis=0)
    inverse = np.linalg.inv((jacobian / scale).T @ (jacobian / scale))
    bound = sigma * np.sqrt(np.diag(inverse)) / scale
    for p, sd in zip(model.parameters, bound, strict=True):
        size = float(point[p.name]) if p.amplitude else 1
        assert found[p.name].sd == pytest.approx(sd / size, rel=0.02), p.name


def test_fits_of_mcmicro_spread_as_expected():
    model, sigma = make_model("mcmicro"), 1 / 300
    found = expected_sd(model, sigma)
    for tissue in model.tissues:
        truth = by_name(found, tissue)
        params = {p: torch.full((4000,), truth[p].value) for p in model.parameter_names}
        result = fit(model, noisy(model, params, sigma, seed=4), sigma=sigma)
        for p in model.parameter_names:
            assert result.maps[p].std() == pytest.approx(truth[p].sd, rel=0.04), (tissue, p)


def test_verdicts_change_at_half_and_all_of_the_start_box():
    model = Slope.of([0.5, 1.0, 2.0])
    unit = by_name(expected_sd(model, 1.0))
    # the width of the box in the solver's coordinate, over the root of 12
    for name, box in (("offset", 2.0), ("factor", np.log(4))):
        step = unit[name].sd / (1.6 if name == "factor" else 1)
        assert unit[name].share == pytest.approx(step / (box / np.sqrt(12)))
        for share, verdict in (
            (0.49, adequacy.ESTIMABLE),
            (0.51, adequacy.POOR),
            (0.99, adequacy.POOR),
            (1.01, adequacy.NOT_ESTIMABLE),
        ):
            found = by_name(expected_sd(model, share / unit[name].share))
            assert found[name].verdict == verdict
    assert unit["product"].verdict == ""


@pytest.mark.parametrize(
    ("name", "scheme", "rank"),
    [
        ("mcmicro", DiffusionScheme(b=[1.0]), 1),
        ("mcmicro", DiffusionScheme(b=[2.0, 2.0], big_delta=[20.0, 40.0]), 1),
        ("mcmicro", DiffusionScheme(b=[1.0, 2.0]), 2),
        ("nexi", DiffusionScheme(b=[2.0] * 5, big_delta=[20.0] * 5), 1),
        ("nexi", DiffusionScheme(b=[1.0, 2.0] * 3, big_delta=[20.0, 20.0] * 3), 2),
        ("nexi", DiffusionScheme(b=[1.0, 2.5] * 3, big_delta=[12, 12, 25, 25, 50, 50]), 4),
    ],
)
def test_alike_measurements_do_not_determine_parameters(name, scheme, rank):
    cls = get_model(name)
    model = type(cls.__name__, (cls,), {"minimum_measurements": 1})(scheme)
    assert adequacy.independent_measurements(model) == rank
    wanted = len(model.parameters)
    found = expected_sd(model, 0.01)
    if rank == wanted:
        assert adequacy.undetermined(model) == ""
        assert all(np.isfinite(e.sd) for e in found)
        return
    said = adequacy.sentences(model, found, snr=100)
    assert len(said) == 1
    assert f"gives {rank} independent measurement" in said[0]
    assert f"for {wanted} parameters" in said[0]
    assert all(p in said[0] for p in model.parameter_names)
    assert {e.verdict for e in found} == {adequacy.UNDETERMINED}
    assert all(np.isnan([e.sd, e.share]).all() for e in found)


def test_sentences_name_parameter_tissue_number_and_what_to_do():
    scheme = DiffusionScheme(b=[1, 2, 3] * 2, big_delta=[20] * 3 + [40] * 3, n_directions=[30] * 6)
    model = get_model("nexi")(scheme)
    found = expected_sd(model, adequacy.assumed_sigma(model))
    worst = [e for e in found if e.parameter == "dn" and e.verdict == adequacy.NOT_ESTIMABLE]
    assert [e.tissue for e in worst] == ["grey matter", "white matter"]
    said = adequacy.sentences(model, found, snr=50, assumed=True)
    [about_dn] = [s for s in said if s.startswith("nexi: dn: ")]
    assert about_dn == (
        f"nexi: dn: expected SD {worst[0].sd:.2g} um^2/ms in grey matter and {worst[1].sd:.2g} "
        "um^2/ms in white matter at an assumed SNR of 50: not estimable voxel by voxel; use a "
        "prior, a spatial term or ROI averages."
    )
    others = adequacy.sentences(model, found, snr=50, prior=True)
    assert any("at SNR 50: not" in s and "use a spatial term" in s for s in others)
    assert adequacy.sentences(model, expected_sd(model, 1e-6), snr=1e6) == []


def test_assumed_noise_is_that_of_prepared_images():
    """For powder averages and invariants of even directions, from images of known SNR."""
    rng, snr, voxels = np.random.default_rng(5), 40.0, 300
    counts = {1000.0: 32, 2000.0: 60}
    bval = np.concatenate([np.zeros(6), *(np.full(n, b) for b, n in counts.items())])
    vectors = np.concatenate([np.zeros((6, 3)), *(even_directions(n) for n in counts.values())])
    clean = np.exp(-bval / 1000 * (0.4 + 1.2 * vectors[:, 2] ** 2))
    volumes = clean[:, None] + rng.normal(size=(len(bval), voxels)) / snr
    run = DwiVolumes((100 * volumes).astype(np.float32), bval, vectors)
    prepared = prepare_dwi([run], l_max=2)

    class Both(get_model("nexi")):
        required = ("b",)
        minimum_measurements = 2

    scheme = DiffusionScheme(
        b=prepared.scheme.b, big_delta=20.0, n_directions=prepared.scheme.n_directions
    )
    model = Both(scheme, l_max=2)
    measured = np.median(prepared.sigma, axis=1)
    np.testing.assert_allclose(adequacy.assumed_sigma(model, snr), measured, rtol=0.06)
    assert adequacy.image_snr(model, measured) == pytest.approx(snr, rel=0.06)
    np.testing.assert_allclose(
        [d.shape[0] for d in prepared.directions], prepared.scheme.n_directions
    )


def test_values_that_options_rule_out_give_way_to_the_middle_of_the_box():
    scheme = DiffusionScheme(b=[1, 2, 4, 6], big_delta=30.0, small_delta=6.0)
    model = get_model("axcalibersmt")(scheme, depar=0.5)  # the tissue has deperp 0.6
    found = by_name(expected_sd(model, 0.01))
    box = model.parameters[3].start
    assert found["deperp"].value == pytest.approx(sum(box) / 2)
    assert found["diameter"].value == 4.0


def test_every_declared_tissue_lies_inside_the_bounds():
    for name in dict(ALL_MODELS):
        model = make_model(name)
        for tissue in model.tissues.values():
            named = {p.name for p in model.parameters if p.name in tissue}
            if name not in THREE_POOLS:  # of which the middle of their boxes is typical
                assert set(model.parameter_names) - {"S0", "M0"} <= named
            for p in model.parameters:
                assert p.name not in named or p.bounds[0] < tissue[p.name] < p.bounds[1]


def test_a_signal_that_is_flat_in_the_middle_of_its_box_is_not_refused():
    """Square has no slope at 0, a root none that is finite."""

    class Root(Square):
        def signal(self, params, inputs=None):
            time = self.table("time", self.scheme.echo_time, params["offset"])
            return params["offset"].abs().sqrt() + time

    for model in (Square, Root):
        assert adequacy.undetermined(model.of([1.0, 2.0])) == ""
        assert expected_sd(model.of([1.0, 2.0]), 0.1)


def test_noise_that_cannot_be_is_refused():
    model = make_model("mcmicro")
    for sigma in ([0.1, 0.2], 0.0, np.nan):
        with pytest.raises(EngineError, match="sigma has shape"):
            expected_sd(model, sigma)
    with pytest.raises(EngineError, match="scale_group"):
        expected_sd(model, 0.1, scale_sigma=[0.1], scale_group=[0, 0])
