"""ROI statistics against scipy.ndimage and pandas."""

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from bids_gacelle.errors import InputError
from bids_gacelle.spatial.rois import integer_labels, read_lookup, roi_statistics, tissue_of

SHAPE = (7, 8, 9)
LABELS = (1, 2, 5, 40, 1000)
LOOKUP = [(5, "five"), (1, "one"), (77, "absent"), (1000, "thousand"), (2, "two"), (40, "forty")]


@pytest.fixture
def data():
    rng = np.random.default_rng(3)
    values = rng.lognormal(0, 1, SHAPE).astype(np.float32)
    labels = rng.choice([0, *LABELS], SHAPE).astype(np.int16)
    std = rng.uniform(0.1, 2, SHAPE).astype(np.float32)
    valid = rng.random(SHAPE) < 0.8
    values[rng.random(SHAPE) < 0.05] = np.nan
    std[rng.random(SHAPE) < 0.1] = np.nan
    return values, labels, std, valid


def test_statistics_agree_with_scipy_and_pandas(data):
    values, labels, std, valid = data
    rows = {
        row["index"]: row for row in roi_statistics(values, labels, LOOKUP, std=std, valid=valid)
    }
    assert [(i, row["name"]) for i, row in rows.items()] == LOOKUP

    used = np.where(valid & np.isfinite(values), labels, 0)
    clean = np.nan_to_num(values).astype(np.float64)
    for name, function in {
        "mean": ndimage.mean,
        "median": ndimage.median,
        "min": ndimage.minimum,
        "max": ndimage.maximum,
    }.items():
        expected = function(clean, used, LABELS)
        np.testing.assert_allclose([rows[i][name] for i in LABELS], expected, rtol=1e-12)

    table = pd.DataFrame(
        {"label": labels.ravel(), "value": values.ravel().astype(float), "std": std.ravel()}
    )
    usable = table[valid.ravel() & np.isfinite(table["value"])]
    groups = usable.groupby("label")["value"]
    expected = pd.DataFrame(
        {
            "std": groups.std(),
            "iqr": groups.quantile(0.75) - groups.quantile(0.25),
            "cov": groups.std() / groups.mean(),
            "q05": groups.quantile(0.05),
            "q95": groups.quantile(0.95),
            "n_valid": groups.size(),
            "n_voxels": table.groupby("label").size(),
            "coverage": groups.size() / table.groupby("label").size(),
        }
    ).loc[list(LABELS)]
    got = pd.DataFrame(rows).T.loc[list(LABELS), expected.columns].astype(float)
    np.testing.assert_allclose(got, expected, rtol=1e-12)

    known = usable.dropna()
    for label, region in known.groupby("label"):
        if label:
            expected_mean = np.average(region["value"], weights=1 / region["std"] ** 2.0)
            assert rows[label]["weighted_mean"] == pytest.approx(expected_mean, rel=1e-6)


def test_a_region_without_values_has_counts_and_nothing_else(data):
    values, labels, std, _ = data
    values[labels == 5] = np.nan
    empty, _, absent, *_ = roi_statistics(values, labels, LOOKUP, std=std)
    assert empty["n_voxels"] == (labels == 5).sum() > 0
    assert empty["n_valid"] == 0
    assert empty["coverage"] == 0
    assert absent["n_voxels"] == absent["n_valid"] == 0
    assert np.isnan(absent["coverage"])
    counts = ("index", "name", "n_voxels", "n_valid", "coverage")
    for row in (empty, absent):
        assert all(np.isnan(value) for key, value in row.items() if key not in counts)


def test_a_single_voxel_has_no_spread():
    labels = np.array([[[1, 2, 2]]])
    one, two = roi_statistics(np.array([[[3.0, -1.0, 1.0]]]), labels, [(1, "a"), (2, "b")])
    assert one["mean"] == one["median"] == one["q95"] == 3.0
    assert np.isnan(one["std"])
    assert np.isnan(one["cov"])
    assert one["coverage"] == 1.0
    # no coefficient of variation around zero
    assert two["mean"] == 0.0
    assert np.isnan(two["cov"])


def test_voxels_without_standard_deviation_have_no_weight():
    values = np.array([[[1.0, 2.0, 100.0, 200.0, 300.0]]])
    std = np.array([[[1e-30, 1e-30, 0.0, np.nan, np.inf]]])
    [row] = roi_statistics(values, np.ones_like(values, int), [(1, "a")], std=std)
    assert row["weighted_mean"] == pytest.approx(1.5)
    assert row["n_valid"] == 5
    [row] = roi_statistics(values, np.ones_like(values, int), [(1, "a")], std=0 * values)
    assert np.isnan(row["weighted_mean"])
    [row] = roi_statistics(values, np.ones_like(values, int), [(1, "a")])
    assert np.isnan(row["weighted_mean"])


def test_shapes_and_types_are_checked():
    values = np.ones((2, 2, 2))
    with pytest.raises(ValueError, match="Shapes differ"):
        roi_statistics(values, np.ones((2, 2, 1), int), [(1, "a")])
    with pytest.raises(ValueError, match="Shapes differ"):
        roi_statistics(values, np.ones((2, 2, 2), int), [(1, "a")], valid=np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="integers"):
        roi_statistics(values, values, [(1, "a")])


def table(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "dseg.tsv"
    path.write_text(text, encoding=encoding)
    return path


def test_the_table_names_labels_and_the_image_adds_its_own(tmp_path):
    path = table(
        tmp_path,
        'index\tname\tcolor\n0\tbackground\t#000\n3\tGlobus "pallidus"\t#fff\n'
        "1.0\tHöhle\t#aaa\n9\tn/a\t#bbb\n",
        "utf-8-sig",
    )
    labels = np.array([[[0, 1, 7, 3], [3, -2, 7, 0]]])
    assert read_lookup(path, labels) == [
        (3, 'Globus "pallidus"'),
        (1, "Höhle"),
        (9, "label-9"),
        (-2, "label--2"),
        (7, "label-7"),
    ]
    rows = roi_statistics(np.ones(labels.shape), labels, read_lookup(path, labels))
    assert {row["name"]: row["n_voxels"] for row in rows} == {
        'Globus "pallidus"': 2,
        "Höhle": 1,
        "label-9": 0,
        "label--2": 1,
        "label-7": 2,
    }


def test_without_a_table_labels_name_themselves():
    labels = np.array([[[0, 12, 4]]], np.uint8)
    assert read_lookup(None, labels) == [(4, "label-4"), (12, "label-12")]


def test_the_column_of_atlaspack_is_read(tmp_path):
    path = table(tmp_path, "index\tlabel\n1\tLH_Vis\n")
    assert read_lookup(path, np.zeros((1, 1, 1), int)) == [(1, "LH_Vis")]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "index,name\n1,a\n",
            "needs tab-separated columns 'index' and 'name'; found 'index,name'",
        ),
        ("index\tcolor\n1\t#fff\n", "'index' and 'name'; found 'index', 'color'"),
        ("", "found none"),
        ("index\tname\n1\ta\n1\tb\n", "index 1 twice"),
        ("index\tname\n1.5\ta\n", "index '1.5', which is not a whole number"),
        ("index\tname\nx\ta\n", "index 'x', which is not a whole number"),
        ("index\tname\ninf\ta\n", "index 'inf', which is not a whole number"),
    ],
)
def test_a_bad_table_is_refused_by_name(tmp_path, text, complaint):
    path = table(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_lookup(path, np.zeros((1, 1, 1), int))
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)


def test_an_absent_table_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"absent\.tsv"):
        read_lookup(tmp_path / "absent.tsv", np.zeros((1, 1, 1), int))


def test_labels_stored_as_floats_are_integers_or_refused():
    labels = integer_labels(np.array([[[0.0, 2.0, -1.0]]], np.float32), "dseg.nii.gz")
    assert labels.dtype.kind == "i"
    assert labels.ravel().tolist() == [0, 2, -1]
    kept = np.array([[[1, 2]]], np.uint8)
    assert integer_labels(kept, "dseg.nii.gz") is kept
    for bad in (0.5, np.nan):
        with pytest.raises(InputError, match=r"dseg\.nii\.gz has 1 voxels that are not whole"):
            integer_labels(np.array([[[1.0, bad]]]), "dseg.nii.gz")


@pytest.mark.parametrize(
    ("name", "tissue"),
    [
        ("WM", "white matter"),
        ("Left-Cerebral-White-Matter", "white matter"),
        ("White matter", "white matter"),
        ("wm-lh-insula", "white matter"),
        ("WM-hypointensities", ""),
        ("GM", "grey matter"),
        ("Gray matter", "grey matter"),
        ("ctx-rh-precuneus", "grey matter"),
        ("Cerebral cortex", "grey matter"),
        ("Right-Lateral-Ventricle", "CSF"),
        ("Cerebrospinal fluid", "CSF"),
        ("Left-Putamen", ""),
        ("label-2", ""),
        ("Cortical spinal tract", ""),
        ("Whiteboard", ""),
    ],
)
def test_names_of_regions_tell_the_tissue(name, tissue):
    assert tissue_of(name) == tissue
