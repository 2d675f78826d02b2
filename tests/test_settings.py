"""Settings survive TOML, and wrong values are refused by name."""

from pathlib import Path

import pytest

from bids_gacelle.errors import InputError
from bids_gacelle.settings import Settings, read_config

FULL = Settings(
    Path("/data"),
    Path("/out"),
    participant_label=("01", "02"),
    derivatives={"qsiprep": Path("/q")},
    atlas={"aseg": Path("/a.nii.gz")},
    small_delta=6.0,
    model_options={"nexi": {"l_max": 2, "starts": 8}},
    mem=4.0,
    combine_dwi=True,
    input_type="hcpya",
    noise_map=Path("/noise.nii.gz"),
    gradient_deviation=Path("/grad_dev.nii.gz"),
    scheme_file=Path("/protocol.scheme"),
    field_strength=7.0,
    spoiling_increment=117.0,
    voxel_map={"theta": "/maps/{subject}.nii.gz"},
    write_scheme=True,
    dataset_link={"raw": "doi:10.1/x"},
)


def test_toml_round_trip(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(FULL.to_toml())
    assert Settings.from_dict(read_config(path)) == FULL


def test_defaults_round_trip():
    plain = Settings(Path("/data"), Path("/out"))
    assert Settings.from_dict(plain.to_dict()) == plain


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"smoothing": 3}, "smoothing"),
        ({"nprocs": "two"}, "nprocs"),
        ({"combine_dwi": 1}, "combine_dwi"),
        ({"models": "nexi"}, "models"),
        ({"input_type": "hcp"}, "input_type"),
        ({"noise_map": 3}, "noise_map"),
    ],
)
def test_wrong_settings_are_named(wrong, word):
    with pytest.raises(InputError, match=word):
        Settings.from_dict({"bids_dir": "/data", "output_dir": "/out", **wrong})


def test_config_file_that_is_no_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("models = [")
    with pytest.raises(InputError, match=r"run\.toml"):
        read_config(path)
    with pytest.raises(InputError, match="absent"):
        read_config(tmp_path / "absent.toml")
