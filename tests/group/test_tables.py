"""The group table is all the ROI tables, and the same every time."""

import errno
import json
import logging
from pathlib import Path

import pandas as pd
import pytest

from bids_gacelle.errors import InputError
from bids_gacelle.group import NothingToMerge, merge_tables

HEADER = "index\tname\tparam\tmean\tn_voxels"
KEYS = ["subject", "session", "atlas", "index", "param"]


def make(out, name, *rows, header=HEADER, folder="dwi", listed=True):
    """A ROI table and the manifest of the fit that wrote it."""
    labels = dict(part.split("-", 1) for part in name.split("_") if "-" in part)
    place = [
        f"sub-{labels['sub']}",
        *([f"ses-{labels['ses']}"] if "ses" in labels else []),
        folder,
    ]
    path = Path(out, *place, f"{name}_scalarstats.tsv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    if listed:
        manifest = manifest_of(path)
        manifest.parent.mkdir(exist_ok=True)
        manifest.write_text(json.dumps({"tables": [path.relative_to(out).as_posix()]}))
    return path


def manifest_of(path):
    name = path.name.replace("scalarstats.tsv", "manifest.json")
    return path.parent.parent / "figures" / name


@pytest.fixture
def out(tmp_path):
    make(tmp_path, "sub-02_atlas-a_desc-nexi", "1\tNAc\tfn\t0.5\t10", "2\tnull\tfn\tn/a\t0")
    make(tmp_path, "sub-01_ses-b_acq-x_atlas-a_desc-nexi", "1\tNAc\tfn\t0.123456789012\t9")
    make(tmp_path, "sub-01_ses-b_acq-x_atlas-b_desc-nexi", "1\tNAc\tfn\t0.3\t9")
    make(tmp_path, "sub-01_ses-a_space-ACPC_atlas-a_desc-nexi", "1\tNAc\tfn\t0.4\t8")
    make(tmp_path, "sub-01_atlas-a_desc-r2star", "1\tNAc\tR2star\t20\t8", folder="anat")
    return tmp_path


def read(path):
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def test_every_row_arrives_once_with_where_it_is_from(out):
    paths = merge_tables(out)
    assert [path.name for path in paths] == ["group_nexi.tsv", "group_r2star.tsv"]
    table = read(paths[0])
    assert list(table.columns[:2]) == ["subject", "session"]
    assert list(table.columns[-5:]) == HEADER.split("\t")
    assert table[
        ["subject", "session", "atlas", "acq", "space", "name", "mean"]
    ].to_numpy().tolist() == [
        ["sub-01", "ses-a", "a", "n/a", "ACPC", "NAc", "0.4"],
        ["sub-01", "ses-b", "a", "x", "n/a", "NAc", "0.123456789012"],
        ["sub-01", "ses-b", "b", "x", "n/a", "NAc", "0.3"],
        ["sub-02", "n/a", "a", "n/a", "n/a", "NAc", "0.5"],
        ["sub-02", "n/a", "a", "n/a", "n/a", "null", "n/a"],
    ]
    assert not table.duplicated(KEYS).any()


def test_it_is_what_pandas_would_join(out):
    merged = read(merge_tables(out)[0])
    tables = pd.concat(
        read(path) for path in sorted(out.glob("sub-*/**/*_desc-nexi_scalarstats.tsv"))
    )
    columns = HEADER.split("\t")
    both = [t[columns].sort_values(columns).reset_index(drop=True) for t in (merged, tables)]
    pd.testing.assert_frame_equal(*both)


def test_running_again_gives_the_same_bytes(out):
    first = [path.read_bytes() for path in merge_tables(out)]
    assert [path.read_bytes() for path in merge_tables(out)] == first
    assert len(list(out.iterdir())) == 4


def test_columns_that_some_tables_lack_are_na(out):
    make(out, "sub-03_atlas-a_desc-nexi", "1\tNAc\tfn\t7", header="index\tname\tparam\textra")
    table = read(merge_tables(out)[0])
    assert table["extra"].tolist() == ["n/a"] * 5 + ["7"]
    assert table["mean"].tolist()[-1] == "n/a"


def test_tables_elsewhere_are_not_taken(out):
    before = read(merge_tables(out)[0])
    make(out / "sourcedata", "sub-09_atlas-a_desc-nexi", "1\tNAc\tfn\t1\t1")
    pd.testing.assert_frame_equal(read(merge_tables(out)[0]), before)


def test_nothing_to_merge_is_said(tmp_path):
    with pytest.raises(NothingToMerge, match="No ROI tables"):
        merge_tables(tmp_path)
    make(tmp_path, "sub-01_atlas-a_desc-nexi", "1\tNAc\tfn\t1\t1", listed=False)
    with pytest.raises(NothingToMerge, match="No ROI tables"):
        merge_tables(tmp_path)


def test_tables_that_the_latest_run_did_not_write_are_left_out(out):
    make(out, "sub-02_atlas-old_desc-nexi", "1\tNAc\tfn\t99\t1", listed=False)
    table = read(merge_tables(out)[0])
    assert len(table) == 5
    assert "99" not in table["mean"].tolist()


@pytest.mark.parametrize("content", ["{", "[]", '{"tables": "x"}', '{"tables": [1]}', "\xff"])
def test_a_damaged_manifest_is_left_out_and_named(out, caplog, content):
    path = out / "sub-02/figures/sub-02_atlas-a_desc-nexi_manifest.json"
    path.write_bytes(content.encode("latin-1"))
    logger = logging.getLogger("bids_gacelle.group.tables")
    logger.addHandler(caplog.handler)
    try:
        table = read(merge_tables(out)[0])
    finally:
        logger.removeHandler(caplog.handler)
    assert "sub-02" not in table["subject"].tolist()
    assert "sub-02/figures/sub-02_atlas-a_desc-nexi_manifest.json cannot be read" in caplog.text
    for manifest in out.rglob("*_manifest.json"):
        manifest.write_text("")
    with pytest.raises(NothingToMerge, match=r"cannot be read: sub-01/figures/.*sub-02/figures/"):
        merge_tables(out)


def test_a_listed_table_that_is_gone_is_named(out):
    make(out, "sub-04_atlas-a_desc-nexi", "1\tNAc\tfn\t1\t1").unlink()
    with pytest.raises(InputError, match=r"Cannot read .*sub-04_atlas-a_desc-nexi_sc") as caught:
        merge_tables(out)
    assert not isinstance(caught.value, NothingToMerge)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("", "is empty"), (f"{HEADER}\n1\tx\n", "2 cells in line 2 where its header has 5")],
)
def test_a_damaged_table_is_named(out, content, complaint):
    path = make(out, "sub-04_atlas-a_desc-nexi")
    path.write_text(content)
    with pytest.raises(InputError, match=complaint) as caught:
        merge_tables(out)
    assert str(path) in str(caught.value)
    assert not isinstance(caught.value, NothingToMerge)


def test_a_table_without_a_model_is_named(out):
    make(out, "sub-04_atlas-a")
    with pytest.raises(InputError, match=r"sub-04_atlas-a_scalarstats\.tsv does not say"):
        merge_tables(out)


def test_a_full_disk_leaves_the_previous_table(out, monkeypatch):
    [path, _] = merge_tables(out)
    before = path.read_bytes()
    make(out, "sub-05_atlas-a_desc-nexi", "1\tNAc\tfn\t1\t1")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"group_nexi\.tsv: No space left on device"):
        merge_tables(out)
    assert path.read_bytes() == before
    assert not list(out.glob(".*"))
