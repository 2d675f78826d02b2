"""Images that a pipeline joined of several raw runs: whose time is that of each volume."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from bids_gacelle.bids.concatenation import possible_orders, same_b_values

PREPROC = "sub-01/dwi/sub-01_space-ACPC_desc-preproc_dwi"
CONFOUNDS = "sub-01/dwi/sub-01_desc-confounds_timeseries.tsv"
SHELLS = {"a": "0 1000 2000", "b": "0 1000 3000", "c": "0 5"}
DIRECTIONS = "0 1 0\n0 0 1\n0 0 0\n"


@pytest.fixture
def joined(tree, other_tree, pick):
    """Runs a and b (Delta 20 and 30 ms), and the job of what was joined of them in some order."""

    def add_run(name: str, bval: str, **fields: object) -> None:
        stem = f"sub-01/dwi/sub-01_acq-{name}_dwi"
        tree.image(f"{stem}.nii.gz", **fields)
        tree.text(f"{stem}.bval", bval)
        tree.text(f"{stem}.bvec", "\n".join(["0 " * len(bval.split())] * 3))

    def job(bval: str, confounds: str = "", model: str = "nexi", **options: object):
        n = len(bval.split())
        other_tree.image(f"{PREPROC}.nii.gz")
        other_tree.text(f"{PREPROC}.bval", bval)
        other_tree.text(f"{PREPROC}.bvec", "\n".join(["0 " * n] * 3))
        if confounds:
            rows = [f"0.1\tsub-01_acq-{name}_dwi.nii.gz" for name in confounds]
            other_tree.text(CONFOUNDS, "\n".join(["trans_x\toriginal_file", *rows, ""]))
        plan = tree.discover(derivatives={"q": other_tree.root}, **options)
        job.plan = plan
        return pick(plan, model)

    add_run("a", SHELLS["a"], SmallDelta=0.01, BigDelta=0.02, EchoTime=0.07)
    add_run("b", SHELLS["b"], SmallDelta=0.01, BigDelta=0.03, EchoTime=0.07)
    job.add_run = add_run
    return job


def test_order_from_b_values(joined, messages) -> None:
    (run,) = joined(f"{SHELLS['b']} {SHELLS['a']}").series.dwi_runs
    assert run.big_delta.values == (30, 30, 30, 20, 20, 20)
    assert run.small_delta.values == (10,)
    assert run.echo_time.values == (0.07,)  # of the raw runs, which agree
    of_b = "sub-01/dwi/sub-01_acq-b_dwi.json: BigDelta"
    assert run.big_delta.sources[:4] == (of_b, of_b, of_b, of_b.replace("acq-b", "acq-a"))
    assert "in this order: sub-01/dwi/sub-01_acq-b_dwi.json: BigDelta, " in messages(
        joined.plan, "info"
    )


def test_rounded_b_values_and_a_run_of_b0_volumes_only(joined) -> None:
    joined.add_run("c", SHELLS["c"])
    (run,) = joined("5 990 2005 20 30 0 1010 3000").series.dwi_runs
    assert run.big_delta.values == (20, 20, 20, 0, 0, 30, 30, 30)
    (run,) = joined("5 990 2005 0 1010 3000").series.dwi_runs  # without it
    assert run.big_delta.values == (20, 20, 20, 30, 30, 30)


def test_times_per_volume_keep_their_place(joined, tree) -> None:
    tree.json(
        "sub-01/dwi/sub-01_acq-b_dwi.json", SmallDelta=[0, 0.01, 0.012], BigDelta=[0, 0.03, 0.04]
    )
    (run,) = joined(f"{SHELLS['b']} {SHELLS['a']}").series.dwi_runs
    assert run.big_delta.values == (0, 30, 40, 20, 20, 20)
    assert run.small_delta.values == (0, 10, 12, 10, 10, 10)


def test_one_raw_run_with_times_per_volume(joined, tree) -> None:
    for name in "ab":
        (tree.root / f"sub-01/dwi/sub-01_acq-{name}_dwi.nii.gz").unlink()
    joined.add_run(
        "d", "0 1000 2000 3000 4000", SmallDelta=0.01, BigDelta=[0, 0.02, 0.02, 0.03, 0.03]
    )
    (run,) = joined("0 1000 2000 3000 4000").series.dwi_runs
    assert run.big_delta.values == (0, 20, 20, 30, 30)
    assert run.big_delta.sources == ("sub-01/dwi/sub-01_acq-d_dwi.json: BigDelta",)
    reason = joined("0 2000 1000 3000 4000").reason
    assert "the volumes of the raw run it may stem from differ" in reason
    assert "in no order are their 5 b-values those of its 5 volumes" in reason


def test_order_from_the_table_of_confounds(joined, tree) -> None:
    tree.text("sub-01/dwi/sub-01_acq-b_dwi.bval", SHELLS["a"])
    bval = f"{SHELLS['a']} {SHELLS['a']}"
    reason = joined(bval).reason
    assert "acq-a_dwi.nii.gz: 20 ms, sub-01/dwi/sub-01_acq-b_dwi.nii.gz: 30 ms)" in reason
    assert "their b-values fit in more than one order. Give it per volume" in reason
    (run,) = joined(bval, confounds="bbbaaa").series.dwi_runs
    assert run.big_delta.values == (30, 30, 30, 20, 20, 20)
    mixed = "0 0 1000 1000 2000 2000"  # volumes of both runs in turn
    (run,) = joined(mixed, confounds="abbaba").series.dwi_runs
    assert run.big_delta.values == (20, 30, 30, 20, 30, 20)


@pytest.mark.parametrize("confounds", ["aaaabb", "bbbxxx", "bbbaa"])
def test_a_table_that_cannot_be_right_is_not_used(joined, tree, confounds: str) -> None:
    tree.text("sub-01/dwi/sub-01_acq-b_dwi.bval", SHELLS["a"])
    assert "more than one order" in joined(f"{SHELLS['a']} {SHELLS['a']}", confounds).reason


def test_a_table_of_other_b_values_is_not_used(joined) -> None:
    (run,) = joined(f"{SHELLS['a']} {SHELLS['b']}", confounds="bbbaaa").series.dwi_runs
    assert run.big_delta.values == (20, 20, 20, 30, 30, 30)


def test_what_cannot_be_told_is_refused(joined, tree) -> None:
    reason = joined("0 1000 2000 3000 4000 5000").reason
    assert "`BigDelta` of the volumes of `q:" in reason
    assert "the 2 raw runs it may stem from differ (" in reason
    assert "in no order are their 6 b-values those of its 6 volumes" in reason
    assert "in no order are their 6 b-values those of its 3" in joined("0 1000 2000").reason
    both = f"{SHELLS['b']} {SHELLS['a']}"
    assert joined("0 1000 2000 3000 4000", big_delta_ms=20.0).eligible
    tree.json("sub-01/dwi/sub-01_acq-b_dwi.json", SmallDelta=0.01)
    assert "sub-01_acq-b_dwi.nii.gz: none)" in joined(both).reason
    assert joined(both, model="mcmicro").eligible  # needs no times


def test_a_timing_file_is_of_the_joined_image(joined, tree, messages) -> None:
    rows = "".join(f"{i}\t0.01\t0.0{i}\n" for i in range(1, 7))
    timing = tree.text("t.tsv", "volume\tSmallDelta\tBigDelta\n" + rows)
    both = f"{SHELLS['a']} {SHELLS['b']}"
    (run,) = joined(both, timing_file=timing).series.dwi_runs
    assert run.big_delta.values == pytest.approx((10, 20, 30, 40, 50, 60))
    joined(both, timing_file=timing, small_delta_ms=10.0)
    assert "t.tsv" not in messages(joined.plan, "warning")


def test_runs_of_the_same_times_are_interchangeable(joined, tree) -> None:
    tree.json("sub-01/dwi/sub-01_acq-b_dwi.json", SmallDelta=0.01, BigDelta=0.02)
    (run,) = joined("0 1000 2000 3000 4000").series.dwi_runs  # no order is needed
    assert run.big_delta.values == (20,)


def test_one_time_of_the_joined_image_gives_way(joined, other_tree, messages) -> None:
    """A pipeline may hand on the sidecar of the first run."""
    other_tree.json(f"{PREPROC}.json", SmallDelta=0.01, BigDelta=0.02)
    (run,) = joined(f"{SHELLS['a']} {SHELLS['b']}").series.dwi_runs
    assert run.big_delta.values == (20, 20, 20, 30, 30, 30)
    warning = messages(joined.plan, "warning")
    assert "`BigDelta` is 20 ms for all volumes in `q:" in warning
    assert "SmallDelta" not in warning
    each = [0.04, 0.04, 0.04, 0.05, 0.05, 0.05]
    other_tree.json(f"{PREPROC}.json", SmallDelta=0.01, BigDelta=each)
    (run,) = joined(f"{SHELLS['a']} {SHELLS['b']}").series.dwi_runs
    assert run.big_delta.values == pytest.approx([1000 * v for v in each])


def test_echo_times_of_joined_runs(joined, tree, other_tree, messages) -> None:
    tree.json("sub-01/dwi/sub-01_acq-b_dwi.json", SmallDelta=0.01, BigDelta=0.03, EchoTime=0.09)
    other_tree.json(f"{PREPROC}.json", EchoTime=0.07)
    both = f"{SHELLS['a']} {SHELLS['b']}"
    (run,) = joined(both).series.dwi_runs
    assert run.echo_time.values == (0.07, 0.07, 0.07, 0.09, 0.09, 0.09)
    assert "`EchoTime` is 0.07 s for all volumes in `q:" in messages(joined.plan, "warning")
    # images of unknown echo times must not be divided by the b=0 of another one
    assert "0.07 s, sub-01/" in joined("0 1000 2000 3000 4000", model="mcmicro").reason


def test_orders_against_all_permutations() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        parts = [rng.choice([0.0, 1000.0, 2000.0], size=rng.integers(1, 4)) for _ in range(4)]
        for part in parts:
            part[0] = 1000.0
        b = np.concatenate([parts[i] for i in rng.permutation(4)])
        expected = {
            order
            for order in permutations(range(4))
            if np.array_equal(np.concatenate([parts[i] for i in order]), b)
        }
        assert set(possible_orders(b, parts, range(4), 100.0)) == expected
        kinds = [tuple(part) for part in parts]
        found = list(possible_orders(b, parts, kinds, 100.0))
        distinct = {tuple(kinds[i] for i in order) for order in expected}
        assert sorted(tuple(kinds[i] for i in order) for order in found) == sorted(distinct)


def test_many_runs_alike_take_no_time() -> None:
    parts = [np.array([0.0, 1000.0])] * 16
    b = np.concatenate(parts)
    assert len(list(possible_orders(b, parts, ["x"] * 16, 100.0))) == 1


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ([0, 1000], [90, 1050], True),
        ([0, 1000], [0, 1060], False),
        ([0, 6000], [0, 6250], True),
        ([95], [105], False),
        ([0], [0, 0], False),
    ],
)
def test_same_b_values(a, b, same: bool) -> None:
    assert same_b_values(np.array(a, float), np.array(b, float), 100.0) is same
