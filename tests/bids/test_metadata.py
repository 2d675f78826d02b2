"""Values with unit and source; what cannot be right is refused with the probable unit."""

from __future__ import annotations

import pytest

from bids_gacelle.bids.files import open_dataset, parse_file
from bids_gacelle.bids.metadata import (
    Found,
    MetadataError,
    Sidecars,
    constant_fields,
    per_volume,
    scalar,
)


@pytest.fixture
def found(tmp_path):
    """A value as if read from a sidecar."""
    path = tmp_path / "sub-01/anat/sub-01_x.json"
    return lambda value: Found(value, parse_file(path, tmp_path, "raw"))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("EchoTime", 4.0, "probably ms; write 0.004, or pass --assume-ms EchoTime"),
        ("EchoTime", 0.51, "probably ms; write 0.00051"),
        ("EchoTime", 4000, "probably us; write 0.004."),
        ("EchoTime", "0.004", "a string, not a number; write 0.004 (in s) without quotes"),
        ("EchoTime", "4", "a string, not a number; not plausible in s (BIDS), probably ms"),
        ("EchoTime", "four", 'a number in s is needed, e.g. "EchoTime": 0.004'),
        ("EchoTime", True, "a number in s is needed"),
        ("EchoTime", None, "a number in s is needed"),
        ("EchoTime", float("nan"), "a number in s is needed"),
        ("EchoTime", 0, "nor in any other usual unit"),
        ("EchoTime", -0.004, "nor in any other usual unit"),
        ("EchoTime", [0.004, 0.008], "is a list of 2"),
        ("RepetitionTimeExcitation", 15, "probably ms; write 0.015"),
        (
            "RepetitionTimeExcitation",
            "6.8",
            "a string, not a number; not plausible in s (BIDS), p",
        ),
        ("InversionTime", 45, "probably ms; write 0.045"),
        ("FlipAngle", 0.2094, "probably radians; write 11.9977"),
        ("FlipAngle", 361, "nor in any other usual unit"),
    ],
)
def test_implausible_values(found, field: str, value: object, sentence: str) -> None:
    with pytest.raises(MetadataError) as caught:
        scalar(found(value), field)
    message = str(caught.value)
    assert message.startswith(f"`{field}` is ")
    assert "`sub-01/anat/sub-01_x.json`" in message
    assert sentence in message
    assert caught.value.field == field
    assert caught.value.file.endswith("sub-01_x.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("EchoTime", 0.5),
        ("EchoTime", 3e-5),
        ("RepetitionTimeExcitation", 5),
        ("FlipAngle", 1),
        ("EchoTime", [0.004]),
    ],
)
def test_plausible_values(found, field: str, value: object) -> None:
    assert scalar(found(value), field) == (value[0] if isinstance(value, list) else value)


def test_values_read_as_ms(found) -> None:
    assert scalar(found(4.0), "EchoTime", ["EchoTime"]) == 0.004
    assert scalar(found("6.8"), "RepetitionTimeExcitation", ["RepetitionTimeExcitation"]) == 0.0068
    assert scalar(found(0.07), "EchoTime", ["EchoTime"]) == pytest.approx(7e-5)
    with pytest.raises(MetadataError, match=r"is 0\.004 \(read as ms\).*outside 1e-05 to 0\.5 s"):
        scalar(found(0.004), "EchoTime", ["EchoTime"])


def test_values_per_volume(found) -> None:
    assert per_volume(found(0.08), "EchoTime", 3) == [0.08]
    assert per_volume(found([0.08, 0.09, 0.1]), "EchoTime", 3) == [0.08, 0.09, 0.1]
    with pytest.raises(MetadataError, match=r"has 2 values in .* 3 volumes"):
        per_volume(found([0.08, 0.09]), "EchoTime", 3)


def test_inheritance_takes_the_nearest_that_applies(tree) -> None:
    tree.json("MEGRE.json", a=1, b=1, c=1, d=1)
    tree.json("acq-x_MEGRE.json", b=2, c=2, d=2)
    tree.json("sub-01/sub-01_MEGRE.json", c=3, d=3)
    tree.json("sub-01/anat/sub-01_acq-x_echo-1_MEGRE.json", d=4)
    tree.json("acq-y_MEGRE.json", a=5)
    tree.json("sub-02/sub-02_MEGRE.json", a=6)
    tree.json("acq-x_VFA.json", a=7)
    path = tree.image("sub-01/anat/sub-01_acq-x_echo-1_MEGRE.nii.gz")
    dataset = open_dataset("raw", tree.root, ["01", "02"])
    sidecars = Sidecars(dataset, parse_file(path, tree.root, "raw"))
    got = {k: (f.value, f.file.label) for k in "abcde" if (f := sidecars.find(k))}
    assert got == {
        "a": (1, "MEGRE.json"),
        "b": (2, "acq-x_MEGRE.json"),
        "c": (3, "sub-01/sub-01_MEGRE.json"),
        "d": (4, "sub-01/anat/sub-01_acq-x_echo-1_MEGRE.json"),
    }
    assert sidecars.looked_in() == (
        "sub-01/anat/sub-01_acq-x_echo-1_MEGRE.json (beside the image), sub-01/sub-01_MEGRE.json "
        "(subject level), acq-x_MEGRE.json (root), MEGRE.json (root)"
    )


def test_labels_of_other_datasets_carry_their_name(tmp_path) -> None:
    file = parse_file(tmp_path / "sub-01/dwi/sub-01_dwi.nii.gz", tmp_path, "qsiprep")
    assert file.label == "qsiprep:sub-01/dwi/sub-01_dwi.nii.gz"
    assert file.uri == "bids:qsiprep:sub-01/dwi/sub-01_dwi.nii.gz"
    assert (file.subject, file.session, file.datatype) == ("01", "", "dwi")
    assert (file.suffix, file.extension) == ("dwi", ".nii.gz")


def test_constant_fields(tree) -> None:
    common = {"MagneticFieldStrength": 3, "Manufacturer": "X", "PartialFourier": "6/8"}
    tree.image("sub-01/anat/sub-01_echo-1_MEGRE.nii", **common, RepetitionTime=1, SequenceName="a")
    tree.image("sub-01/anat/sub-01_echo-2_MEGRE.nii", **common, RepetitionTime=2, SequenceName="a")
    dataset = open_dataset("raw", tree.root, ["01"])
    sidecars = [Sidecars(dataset, image) for image in dataset.images("01")]
    assert constant_fields(sidecars) == {
        "MagneticFieldStrength": 3,
        "Manufacturer": "X",
        "SequenceName": "a",
    }


def test_byte_order_mark_is_no_fault(tree) -> None:
    tree.image("sub-01/anat/sub-01_echo-1_MEGRE.nii")
    path = tree.root / "sub-01/anat/sub-01_echo-1_MEGRE.json"
    path.write_bytes(b'\xef\xbb\xbf{"EchoTime": 0.01}')
    dataset = open_dataset("raw", tree.root, ["01"])
    assert Sidecars(dataset, dataset.images("01")[0]).require("EchoTime").value == 0.01
