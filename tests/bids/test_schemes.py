"""Scheme files of Camino and AMICO."""

from __future__ import annotations

import numpy as np
import pytest

from bids_gacelle.bids.gradients import read_gradients
from bids_gacelle.bids.metadata import MetadataError
from bids_gacelle.bids.schemes import read_scheme, scheme_text

STEJSKAL = """\
# made by hand
VERSION: STEJSKALTANNER
0 0 0 0 0.03 0.01 0.08
1 0 0 0.0400 0.030 0.010 0.080
0 0.6 0.8 0.0600 0.040 0.020 0.090
0 0 2 0.0600 0.040 0.020 0.090
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text: str):
        path = tmp_path / "p.scheme"
        path.write_text(text)
        return path

    return write_file


@pytest.mark.parametrize("version", ["STEJSKALTANNER", "1", "stejskaltanner"])
def test_stejskal_tanner(write, version: str) -> None:
    table = read_scheme(write(STEJSKAL.replace("STEJSKALTANNER", version)))
    # b = (2 pi 42.577 MHz/T G delta)^2 (Delta - delta / 3), from the frequency of the free proton
    gamma = 2 * np.pi * 42.577478518e6
    expected = [0, (gamma * 4e-4) ** 2 * (0.03 - 0.01 / 3), (gamma * 1.2e-3) ** 2 * (0.1 / 3)]
    assert table.b == pytest.approx(np.array([*expected, expected[2]]) * 1e-6, rel=1e-4)
    assert table.directions == pytest.approx(
        np.array([[0, 0, 0], [1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]])
    )
    assert table.big_delta == pytest.approx([0.03, 0.03, 0.04, 0.04])
    assert table.small_delta == pytest.approx([0.01, 0.01, 0.02, 0.02])
    assert table.echo_time == pytest.approx([0.08, 0.08, 0.09, 0.09])


@pytest.mark.parametrize("version", ["BVECTOR", "0"])
@pytest.mark.parametrize(("unit", "noted"), [(1e6, False), (1.0, True)])
def test_b_vectors_in_either_unit(write, version: str, unit: float, noted: bool) -> None:
    table = read_scheme(
        write(f"VERSION: {version}\n0 0 0 0\n1 0 0 {700 * unit}\n0 1 0 {2500 * unit}\n")
    )
    assert table.b == pytest.approx([0, 700, 2500])
    assert table.big_delta is table.small_delta is table.echo_time is None
    assert ("up to 2500, are taken as s/mm^2" in table.note) is noted


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "begins with ''"),
        ("1 0 0 1000\n", "begins with '1 0 0 1000'"),
        ("VERSION: 2\n1 0 0 1000\n", "begins with 'VERSION: 2'"),
        ("VERSION: BVECTOR\n", "needs the numbers gx gy gz b"),
        ("VERSION: BVECTOR\n1 0 0 1000\n1 0 0\n", "needs the numbers gx gy gz b"),
        ("VERSION: BVECTOR\n1 0 0 x\n", "needs the numbers gx gy gz b"),
        ("VERSION: BVECTOR\n1 0 0 nan\n", "needs the numbers gx gy gz b"),
        ("VERSION: BVECTOR\n1 0 0 -5\n", "none of them negative"),
        ("VERSION: STEJSKALTANNER\n1 0 0 1000\n", "needs the numbers gx gy gz |G| Delta delta TE"),
        ("VERSION: 1\n1 0 0 40 0.03 0.01 0.08\n", "gradients of up to 40"),
        ("VERSION: 1\n1 0 0 0.04 30 10 80\n", "times of up to 80 cannot be in T/m and s"),
        ("VERSION: 1\n1 0 0 0.04 0.01 0.03 0.08\n", "longer than Delta (column 5) in row 1"),
    ],
)
def test_what_is_no_scheme(write, text: str, sentence: str) -> None:
    with pytest.raises(MetadataError) as raised:
        read_scheme(write(text))
    assert sentence in str(raised.value)


def test_a_scheme_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(MetadataError, match=r"cannot be read as a scheme file"):
        read_scheme(tmp_path / "none.scheme")


def test_there_and_back(write) -> None:
    random = np.random.default_rng(0)
    n = 20
    b = np.r_[0, 5, random.uniform(500, 20000, n - 2)]
    directions = random.normal(size=(n, 3))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    small = random.uniform(0.005, 0.02, n)
    big = small + random.uniform(0, 0.05, n)
    echo = random.uniform(0.06, 0.1, n)
    table = read_scheme(write(scheme_text(b, directions, big, small, echo)))
    for found, given in (
        (table.b, b),
        (table.directions, directions),
        (table.big_delta, big),
        (table.small_delta, small),
        (table.echo_time, echo),
    ):
        np.testing.assert_allclose(found, given, rtol=1e-6, atol=1e-7)


def test_b0_needs_no_times(write) -> None:
    n = np.zeros(1)
    table = read_scheme(write(scheme_text(n, np.zeros((1, 3)), n, n, n)))
    assert (table.b[0], table.echo_time) == (0, None)


def test_gradients_of_a_scheme_file(write) -> None:
    path = write(STEJSKAL)
    b, directions = read_gradients(path, path)
    assert np.array_equal(b, read_scheme(path).b)
    assert directions.shape == (4, 3)


# ----------------------------------------------------------------------- in a dataset

FOUR = """\
VERSION: 1
0 0 0 0 0 0 0.08
0 0 0 0 0 0 0.08
1 0 0 0.06 0.030 0.010 0.08
0 1 0 0.09 0.030 0.010 0.08
0 0 1 0.12 0.030 0.010 0.08
1 0 0 0.12 0.040 0.010 0.08
"""


def bval_of(path) -> str:
    return " ".join(f"{v:.0f}" for v in read_scheme(path).b)


def test_a_dwi_without_gradients(tree, pick) -> None:
    scheme = tree.text("protocol.scheme", FOUR)
    tree.image("sub-01/dwi/sub-01_dwi.nii.gz")
    job = pick(tree.discover(scheme_file=scheme), "nexi")
    assert job.eligible
    (run,) = job.series.dwi_runs
    assert run.bval == run.bvec == str(scheme)
    assert run.big_delta.values == (0, 0, 30, 30, 30, 40)
    assert run.small_delta.values == (10,)
    assert run.echo_time.values == (0.08,)
    assert run.big_delta.sources == ("protocol.scheme: BigDelta",)
    assert "No .bval file" in pick(tree.discover(), "nexi").reason


def test_times_of_a_scheme_replace_those_of_the_sidecar(tree, pick) -> None:
    scheme = tree.text("protocol.scheme", FOUR)
    tree.dwi(bval=bval_of(scheme), SmallDelta=0.012, BigDelta=0.05)
    (run,) = pick(tree.discover(scheme_file=scheme), "nexi").series.dwi_runs
    assert run.bval.endswith("sub-01_dwi.bval")
    assert (run.small_delta.values, run.big_delta.values) == ((10,), (0, 0, 30, 30, 30, 40))
    given = {"scheme_file": scheme, "small_delta_ms": 9.0}
    (run,) = pick(tree.discover(**given), "nexi").series.dwi_runs
    assert run.small_delta.values == (9,)


def test_a_scheme_of_other_images(tree, pick) -> None:
    tree.dwi(bval="0 0 1000 2000 3000 4000")
    reason = pick(tree.discover(scheme_file=tree.text("p.scheme", FOUR)), "mcmicro").reason
    assert "is not of `sub-01/dwi/sub-01_dwi.nii.gz`: it has 6 volumes with b up to" in reason
    assert "the image 6 with b up to 4000" in reason
    bad = tree.text("p.scheme", "VERSION: 7\n")
    assert "begins with 'VERSION: 7'" in pick(tree.discover(scheme_file=bad), "mcmicro").reason


def test_a_scheme_without_times(tree, pick, messages) -> None:
    rows = "".join(f"1 0 0 {b}\n" for b in (0, 0, 1000, 2000, 3000, 4000))
    scheme = tree.text("p.scheme", "VERSION: BVECTOR\n" + rows)
    tree.image("sub-01/dwi/sub-01_dwi.nii.gz")
    plan = tree.discover(scheme_file=scheme)
    assert pick(plan, "mcmicro").eligible
    assert "`SmallDelta` and `BigDelta` missing" in pick(plan, "nexi").reason
    assert "are taken as s/mm^2" in messages(plan, "info")
