"""What is written can be read back, is the same every time, and is whole or absent."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_gacelle.bids import output
from bids_gacelle.errors import InputError

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.1, -0.2, 0.3) @ np.diag([-2.0, 2.0, 2.5]), [90.0, -126.0, -72.0]
)


@pytest.fixture
def reference():
    """An oblique image whose sform and qform have different codes."""
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), OBLIQUE)
    image.set_sform(OBLIQUE, code=4)
    image.set_qform(OBLIQUE, code=1)
    return image


def values(shape=(3, 4, 5)):
    return np.random.default_rng(0).normal(1, 0.3, shape)


def test_an_image_keeps_the_grid_of_its_reference(tmp_path, reference):
    path = tmp_path / "sub-01" / "anat" / "sub-01_R1map.nii.gz"
    output.write_image(path, values(), reference.affine, reference)
    image = nib.load(path)
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), np.float32(values()))
    assert image.get_data_dtype() == np.float32
    for name in ("sform", "qform"):
        got = getattr(image.header, f"get_{name}")(coded=True)
        want = getattr(reference.header, f"get_{name}")(coded=True)
        np.testing.assert_array_equal(got[0], want[0])
        assert got[1] == want[1]
    np.testing.assert_array_equal(image.affine, reference.affine)
    assert image.header.get_zooms() == reference.header.get_zooms()
    assert image.header.get_xyzt_units() == ("mm", "sec")


def test_an_image_without_codes_stays_without(tmp_path, reference):
    reference.header["sform_code"] = reference.header["qform_code"] = 0
    affine = reference.header.get_best_affine()
    output.write_image(tmp_path / "a.nii.gz", values(), affine, reference.header)
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.header["sform_code"] == image.header["qform_code"] == 0
    np.testing.assert_allclose(image.affine, affine)


@pytest.mark.parametrize("like", [None, "other grid"])
def test_an_image_on_a_grid_of_its_own_has_both_forms(tmp_path, reference, like):
    affine = np.diag([1.5, 1.5, 3.0, 1.0])
    output.write_image(tmp_path / "a.nii.gz", values(), affine, reference if like else None)
    header = nib.load(tmp_path / "a.nii.gz").header
    for form, code in (header.get_sform(coded=True), header.get_qform(coded=True)):
        np.testing.assert_allclose(form, affine)
        assert code == 1


def test_no_value_becomes_zero_in_maps_and_nan_in_standard_deviations(tmp_path):
    array = values()
    array[0, 0, :4] = np.nan, np.inf, -np.inf, 1e300
    output.write_image(tmp_path / "map.nii.gz", array, np.eye(4))
    output.write_image(tmp_path / "std.nii.gz", array, np.eye(4), keep_nan=True)
    best, std = (nib.load(tmp_path / f"{n}.nii.gz").get_fdata() for n in ("map", "std"))
    assert (best[0, 0, :4] == 0).all()
    assert np.isnan(std[0, 0, :4]).all()
    assert np.isfinite(std[1:]).all()


def test_integers_are_stored_as_they_are_or_refused(tmp_path):
    path = tmp_path / "a.nii.gz"
    output.write_image(path, values() > 1, np.eye(4), dtype=np.uint8)
    image = nib.load(path)
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(image.dataobj), values() > 1)
    for wrong in (np.full((1, 1, 1), 300), np.full((1, 1, 1), 0.5), np.full((1, 1, 1), np.nan)):
        with pytest.raises(ValueError, match="do not fit uint8"):
            output.write_image(path, wrong, np.eye(4), dtype=np.uint8)
    assert nib.load(path).shape == (3, 4, 5)


def test_the_same_content_gives_the_same_bytes(tmp_path, reference, monkeypatch):
    path = tmp_path / "a.nii.gz"
    output.write_image(path, values(), OBLIQUE, reference)
    before = path.read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    output.write_image(tmp_path / "b.nii.gz", values(), OBLIQUE, reference)
    assert (tmp_path / "b.nii.gz").read_bytes() == before


def test_json_takes_numpy_and_writes_no_nan(tmp_path):
    data = {
        "a": np.float32(0.5),
        "b": np.arange(3),
        "c": float("nan"),
        "d": [np.nan, {"e": Path("x/y"), 3: (True, None)}],
        "f": "µm",
    }
    output.write_json(tmp_path / "a.json", data)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "a": 0.5,
        "b": [0, 1, 2],
        "c": None,
        "d": [None, {"e": "x/y", "3": [True, None]}],
        "f": "µm",
    }


def test_a_table_reads_back_and_says_na(tmp_path):
    rows = [
        {"name": "a\tb", "mean": np.float32(0.1), "n": np.int64(3), "ok": True},
        {"name": "", "mean": np.nan, "n": 0, "ok": None},
        {"name": "c", "mean": -np.inf},
    ]
    output.write_tsv(tmp_path / "a.tsv", rows, ("name", "mean", "n", "ok"))
    assert (tmp_path / "a.tsv").read_text().splitlines() == [
        "name\tmean\tn\tok",
        "a b\t0.100000001\t3\ttrue",
        "n/a\tn/a\t0\tn/a",
        "c\tn/a\tn/a\tn/a",
    ]
    table = pd.read_csv(tmp_path / "a.tsv", sep="\t", na_values="n/a")
    assert np.float32(table["mean"][0]) == np.float32(0.1)
    with pytest.raises(ValueError, match="no column for extra"):
        output.write_tsv(tmp_path / "a.tsv", [{"extra": 1}], ("name",))


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    output.write_text(path, "old")
    with output.atomic_write(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]  # noqa: PTH208


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    output.write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, error):
    path = tmp_path / "a.nii.gz"
    output.write_image(path, values(), OBLIQUE)
    before = path.read_bytes()

    def fail(_):
        raise error

    monkeypatch.setattr("os.fsync", fail)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        output.write_image(path, values() + 1, OBLIQUE)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    if expected is InputError:
        assert str(path) in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert "MB free" in str(caught.value)


DISK_FULL = """
import numpy as np, resource, sys
from pathlib import Path
from bids_gacelle.bids import output
from bids_gacelle.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = np.random.default_rng(0).normal(size=(40, 40, 40))
writes = {
    "a.nii.gz": lambda path: output.write_image(path, noise, np.eye(4)),
    "a.json": lambda path: output.write_json(path, {"x": noise}),
    "a.tsv": lambda path: output.write_tsv(path, [{"x": v} for v in noise.ravel()], ("x",)),
}
for name, write in writes.items():
    try:
        write(Path(sys.argv[1]) / name)
    except InputError as error:
        print(error)
"""


def test_a_file_that_the_system_refuses_to_grow_is_not_left_half_written(tmp_path):
    assert hasattr(resource, "RLIMIT_FSIZE")
    names = ["a.json", "a.nii.gz", "a.tsv"]
    for name in names[1:]:
        (tmp_path / name).write_bytes(b"before")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DISK_FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.count("Cannot write") == done.stdout.count("File too large") == 3
    # what was there survives, what was not is still not
    assert sorted(path.name for path in tmp_path.iterdir()) == names[1:]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"before"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write .*file/sub/a\.json: Not a directory"):
        output.write_json(tmp_path / "file" / "sub" / "a.json", {})


def test_missing_outputs_are_the_absent_and_the_empty(tmp_path):
    output.write_text(tmp_path / "sub-01" / "there.json", "{}")
    (tmp_path / "sub-01" / "empty.json").touch()
    (tmp_path / "sub-01" / "folder.json").mkdir()
    promised = [Path("sub-01") / f"{n}.json" for n in ("there", "empty", "folder", "absent")]
    assert output.missing_outputs(tmp_path, promised) == [str(path) for path in promised[1:]]
