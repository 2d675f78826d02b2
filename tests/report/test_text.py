"""Numbers, units and acquisition tables as a reader sees them."""

import math

import numpy as np
import pytest

from bids_gacelle.report import tables, text


@pytest.mark.parametrize(
    ("cmixf", "readable"),
    [
        ("um^2/ms", "µm²/ms"),
        ("ms/um^2", "ms/µm²"),
        ("1/s", "1/s"),
        ("s/mm^2", "s/mm²"),
        ("um", "µm"),
        ("1", ""),
        ("arbitrary", "a.u."),
        ("ms", "ms"),
        ("deg", "°"),
        ("%", "%"),
        ("s^-1", "s⁻¹"),
        ("ppm", "ppm"),
    ],
)
def test_units(cmixf, readable):
    assert text.unit(cmixf) == readable


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0102, "0.0102"),
        (1527.4, "1527"),
        (100000, "100000"),
        (0, "0"),
        (-0.25, "\N{MINUS SIGN}0.25"),
        (1.23456e-7, "1.235e-07"),
        (math.nan, "n/a"),
        (None, "n/a"),
        ("n/a", "n/a"),
        ("3.50", "3.5"),
        (9.99999, "10"),
    ],
)
def test_numbers(value, shown):
    assert text.number(value) == shown


@pytest.mark.parametrize(
    ("value", "deviation", "shown"),
    [
        (22.634, 0.861, "22.63 ± 0.86"),
        (1414.2, 54.3, "1414 ± 54"),
        (0.5, None, "0.5 (no SD)"),
        (-0.1234, 0.02, "\N{MINUS SIGN}0.123 ± 0.020"),
        (None, 1, "n/a"),
        (2.0, math.nan, "2 (no SD)"),
        (90.0, 250.0, "90 ± 250"),
    ],
)
def test_estimates_show_two_digits_of_their_sd(value, deviation, shown):
    assert text.estimate(value, deviation) == shown


def test_intervals_may_be_open():
    assert text.interval([0.1, 3.5], "um^2/ms") == "0.1 to 3.5 µm²/ms"
    assert text.interval([0, None], "1/s") == "at least 0 1/s"
    assert text.interval([None, math.inf], "s") == text.interval(None, "s") == "none"


def test_axis_labels_get_readable_units():
    assert text.axis_label("b (ms/um^2)") == "b (ms/µm²)"
    assert text.axis_label("Signal (up to scale) of us") == "Signal (up to scale) of us"


def test_percentages_durations_and_order():
    assert text.percent(0.0004) == "< 0.1\N{NARROW NO-BREAK SPACE}%"
    assert text.percent(0) == "0\N{NARROW NO-BREAK SPACE}%"
    assert text.percent(0.9999) == "> 99.9\N{NARROW NO-BREAK SPACE}%"
    assert text.percent(0.1234) == "12.3\N{NARROW NO-BREAK SPACE}%"
    assert [text.seconds(s) for s in (1.234, 16.42, 200, 7500)] == [
        "1.2 s",
        "16.4 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert sorted(["10", "2", "pre", "b1"], key=text.natural) == ["2", "10", "b1", "pre"]


def test_clean_removes_what_html_forbids():
    dirty = "a\x00b\x1b[31mred\x1b[0m\ud800\ufdd0\U0001ffffé\t\nok\r\n"
    assert text.clean(dirty) == "a\ufffdbred\ufffd\ufffd\ufffdé\t\nok\n"
    assert text.clean(3) == 3


def test_jittering_volumes_become_shells_with_counts():
    rng = np.random.default_rng(0)
    shells = np.repeat([0.0, 1.0, 2.5], [6, 30, 60])
    b = np.where(shells > 0, shells + rng.uniform(-0.01, 0.01, shells.size), 0.0)
    delta = np.repeat([20.0, 20.0, 40.0], [6, 30, 60])
    order = rng.permutation(shells.size)
    entries = [
        {"name": "b", "unit": "ms/um^2", "values": b[order].tolist(), "sources": ["dwi.bval"]},
        {
            "name": "BigDelta",
            "unit": "ms",
            "values": delta[order].tolist(),
            "sources": ["dwi.json"],
        },
        {"name": "TE", "unit": "s", "values": [0.06], "sources": ["dwi.json"]},
    ]
    (table,) = tables.acquisition_lists(entries)
    assert table["head"] == ["number", "b (ms/µm²)", "BigDelta (ms)"]
    assert [row[0] for row in table["rows"]] == ["6", "30", "60"]
    assert [row[2] for row in table["rows"]] == ["20", "20", "40"]
    assert float(table["rows"][1][1].split()[0]) == pytest.approx(b[shells == 1].mean(), abs=1e-3)
    values = {row["name"]: row["value"] for row in tables.acquisition_values(entries)}
    assert values["TE"] == "0.06"
    assert values["b"].startswith("96 values from 0 to 2.5")


def test_short_lists_stay_in_line():
    entry = {
        "name": "EchoTime",
        "unit": "s",
        "values": [0.004, 0.008],
        "sources": ["a.json", "b.json"],
    }
    assert tables.acquisition_lists([entry]) == []
    (row,) = tables.acquisition_values([entry])
    assert row == {
        "name": "EchoTime",
        "unit": "s",
        "value": "0.004, 0.008",
        "sources": ["a.json", "b.json"],
    }


def test_roi_table_without_its_columns_is_refused(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("index\tname\n1\tx\n")
    with pytest.raises(ValueError, match="no column param"):
        tables.read_rois(path)
    path.write_text("index\tname\tparam\n")
    with pytest.raises(ValueError, match="no rows"):
        tables.read_rois(path)
