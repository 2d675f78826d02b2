"""What is handed to the report: medians of tissues, curves, gradient tables, tissue classes."""

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_gacelle.bids.series import Atlas, Series
from bids_gacelle.engine import DiffusionScheme, GradientEchoScheme, get_model
from bids_gacelle.interfaces.plots import (
    decays,
    gradient_table,
    obtained_sd,
    plot_axes,
    smooth_models,
    timing_groups,
    train_groups,
)
from bids_gacelle.interfaces.rois import tissue_voxels


def test_groups_name_what_differs_besides_b():
    scheme = DiffusionScheme(
        b=[1, 2, 1, 2], big_delta=[20, 20, 40, 40], small_delta=8, echo_time=[0.06] * 3 + [0.09]
    )
    assert timing_groups(scheme) == [
        "Δ 20 ms, TE 60 ms",
        "Δ 20 ms, TE 60 ms",
        "Δ 40 ms, TE 60 ms",
        "Δ 40 ms, TE 90 ms",
    ]
    assert timing_groups(DiffusionScheme(b=[1, 2])) == ["", ""]
    assert timing_groups(GradientEchoScheme(echo_time=[0.01, 0.02])) == ["", ""]


def arrays(model, params, flags):
    n = len(flags)
    fit = {"flags": flags, "nrmse": np.zeros(n)}
    fit |= {f"map_{k}": np.asarray(v) for k, v in params.items()}
    return fit | {f"std_{k}": 0.1 * np.asarray(v) for k, v in params.items()}


def test_decays_are_medians_of_data_and_of_the_signals_of_each_voxel():
    rng = np.random.default_rng(0)
    model = get_model("mcmicro")(DiffusionScheme(b=[1, 2, 3, 2], big_delta=[20, 20, 20, 40]))
    params = {"fn": rng.uniform(0.2, 0.8, 300), "d": rng.uniform(0.8, 2.5, 300)}
    signal = model.signal({k: torch.tensor(v) for k, v in params.items()}).numpy()
    data = signal + 0.02 * rng.normal(size=signal.shape)
    flags = np.zeros(300, np.uint8)
    flags[::7] = 8
    some = np.arange(300) < 120
    tissues = {"white matter": some, "grey matter": ~some, "CSF": np.arange(300) < 4}
    found = decays(model, data, {}, arrays(model, params, flags), tissues)
    assert [t["name"] for t in found] == ["white matter", "grey matter"]  # too little CSF
    for tissue, inside in zip(found, (some, ~some), strict=True):
        chosen = inside & (flags == 0)
        assert tissue["n_voxels"] == tissue["n_shown"] == chosen.sum()
        np.testing.assert_allclose(tissue["median"], np.median(data[:, chosen], axis=1))
        np.testing.assert_allclose(tissue["q75"], np.quantile(data[:, chosen], 0.75, axis=1))
        np.testing.assert_allclose(tissue["fit"], np.median(signal[:, chosen], axis=1))
        groups = [curve["group"] for curve in tissue["curves"]]
        assert groups == list(dict.fromkeys(plot_axes(model)["groups"]))
        for x, value in zip(model.scheme.b[:3], tissue["fit"][:3], strict=True):
            curve = tissue["curves"][0]
            assert np.interp(x, curve["x"], curve["y"]) == pytest.approx(value, rel=2e-3)


def test_large_tissues_are_drawn_from_evenly_taken_voxels():
    model = get_model("r2star")(GradientEchoScheme(echo_time=[0.01, 0.03]))
    n = 4500
    params = {"S0": np.arange(1.0, n + 1), "R2star": np.full(n, 20.0)}
    data = model.signal({k: torch.tensor(v) for k, v in params.items()}).numpy()
    fit = arrays(model, params, np.zeros(n, np.uint8))
    [tissue] = decays(model, data, {}, fit, {"all voxels": np.ones(n, bool)})
    assert (tissue["n_voxels"], tissue["n_shown"]) == (n, 900)
    np.testing.assert_allclose(tissue["median"], np.median(data, axis=1), rtol=2e-3)


def test_models_with_constants_have_smooth_curves_too():
    scheme = DiffusionScheme(b=[1, 2, 4, 6], big_delta=30.0, small_delta=6.0)
    model = get_model("axcalibersmt")(scheme, d0=2.0, limit="neuman")
    params = {"diameter": [4.0] * 6, "fn": [0.5] * 6, "fcsf": [0.1] * 6, "deperp": [0.5] * 6}
    signal = model.signal({k: torch.tensor(v).double() for k, v in params.items()}).numpy()
    fit = arrays(model, params, np.zeros(6, np.uint8))
    [tissue] = decays(model, signal, {}, fit, {"all voxels": np.ones(6, bool)})
    [curve] = tissue["curves"]
    middle = np.interp(scheme.b, curve["x"], curve["y"])
    np.testing.assert_allclose(middle, signal[:, 0], rtol=3e-3)


def test_obtained_deviations_are_medians_of_what_there_is():
    model = get_model("r2star")(GradientEchoScheme(echo_time=[0.01, 0.03]))
    params = {"S0": [100.0, 200.0, 0.0, 300.0], "R2star": [10.0, 20.0, 30.0, 40.0]}
    fit = arrays(model, params, np.zeros(4, np.uint8))
    fit |= {"map_T2star": 1 / fit["map_R2star"], "std_T2star": np.full(4, np.nan)}
    fit["std_S0"] = np.array([5.0, 20.0, 1.0, np.nan])
    fit["std_R2star"][3] = np.nan
    found = obtained_sd(model, fit, {"here": np.array([True] * 4), "there": np.array([False] * 4)})
    assert found["there"] == {}
    assert found["here"]["R2star"] == [pytest.approx(2.0), 0.75]
    assert found["here"]["S0"] == [pytest.approx(0.075), 0.5]  # relative, where there is signal
    assert "T2star" not in found["here"]


def test_gradient_table_holds_the_shells_with_their_evenness():
    scheme = DiffusionScheme(b=[0, 1, 2], big_delta=20.0, echo_time=[0.09, 0.06, 0.06])
    axes, alike = np.eye(3).tolist(), [[0, 0, 1.0]] * 5
    first, second = gradient_table(scheme, [axes, alike])
    assert (first["b"], second["b"]) == (1, 2)
    assert first["unevenness"] == pytest.approx(0, abs=1e-12)
    assert second["unevenness"] == pytest.approx(np.sqrt(2 / 3), rel=1e-3)
    assert second["group"] == "Δ 20 ms, TE 60 ms"


def test_tissues_come_from_the_segmentation_that_names_most_of_them(tmp_path):
    def atlas(name, data, table):
        image = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(data.astype(np.int16), np.eye(4)), image)
        (tmp_path / f"{name}.tsv").write_text("index\tname\n" + table)
        return Atlas(name, str(image), str(tmp_path / f"{name}.tsv"))

    labels = np.zeros((4, 3, 2))
    labels[0], labels[1], labels[2] = 1, 2, 3
    regions = atlas("regions", labels, "1\tctx-lh-insula\n2\tLeft-Putamen\n3\tThalamus\n")
    tissues = atlas("tissues", labels, "1\tGM\n2\tWM\n3\tHippocampus\n")
    elsewhere = atlas("elsewhere", np.ones((2, 2, 2)), "1\tWM\n")
    mask = np.ones((4, 3, 2), bool)
    mask[:, 0] = False
    reference = nib.Nifti1Image(np.zeros((4, 3, 2), np.float32), np.eye(4))
    series = Series("dwi", "01", "", {}, (), atlases=(elsewhere, regions, tissues))
    name, found = tissue_voxels(series, reference, mask)
    assert name == "tissues"
    assert list(found) == ["white matter", "grey matter"]
    np.testing.assert_array_equal(found["grey matter"], labels[mask] == 1)
    np.testing.assert_array_equal(found["white matter"], labels[mask] == 2)
    bare = Series("dwi", "01", "", {}, (), atlases=(elsewhere,))
    assert tissue_voxels(bare, reference, mask) == ("", {})


def test_complex_echoes_of_several_flip_angles_are_drawn_over_time():
    times = 0.002 * np.arange(1, 9)
    scheme = GradientEchoScheme(
        echo_time=np.tile(times, 2),
        flip_angle=np.repeat([5.0, 30.0], 8),
        repetition_time=0.05,
        field_strength=3,
    )
    model = get_model("mcrmwi")(scheme, steady_state="ideal")
    axes = plot_axes(model)
    assert axes["x_label"] == "Echo time (ms)"
    np.testing.assert_allclose(axes["x"], np.tile(1e3 * times, 4))
    groups = ["5°, real", "30°, real", "5°, imaginary", "30°, imaginary"]
    assert axes["groups"] == list(np.repeat(groups, 8))
    middle = {p.name: 100.0 if p.amplitude else np.mean(p.start) for p in model.parameters}
    params = {k: torch.tensor([v]) for k, v in middle.items()}
    signal = model.signal(params)[:, 0].numpy()
    curves = smooth_models(model)
    assert [curve.group for curve in curves] == groups
    for k, curve in enumerate(curves):
        smooth = curve.model.signal(params)[curve.rows, 0].numpy()
        found = np.interp(1e3 * times, curve.x, smooth)
        np.testing.assert_allclose(found, signal[8 * k : 8 * k + 8], atol=0.05)


def test_single_echoes_are_drawn_over_the_flip_angle():
    scheme = GradientEchoScheme(
        echo_time=[0.002, 0.0021], flip_angle=[5, 20], repetition_time=[0.02, 0.03]
    )
    assert plot_axes(get_model("despot1")(scheme))["x"] == [5, 20]
    assert train_groups(scheme) == ["5°, TR 20 ms", "20°, TR 30 ms"]
