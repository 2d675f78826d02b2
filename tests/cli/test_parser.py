"""What the command line means."""

import argparse
from pathlib import Path

import pytest

from bids_gacelle.cli import argtypes
from bids_gacelle.cli.main import main
from bids_gacelle.cli.parser import available_cores, build_parser, settings_from
from bids_gacelle.errors import InputError


def parse(*words):
    return settings_from(build_parser().parse_args(["/data", "/out", "participant", *words]))


def test_labels_lose_their_prefix_and_may_come_from_a_file(tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("sub-03\n04\n")
    settings = parse("--participant-label", "sub-01", "02", "--participant_label", str(labels))
    assert settings.participant_label == ("01", "02", "03", "04")
    assert parse("--session-id", "ses-a").session_label == ("a",)


def test_models_by_comma_or_space():
    assert parse("--models", "r2star,nexi", "despot1").models == ("r2star", "nexi", "despot1")


def test_named_paths(tmp_path):
    settings = parse("-d", f"q={tmp_path}", "--atlas", f"aseg={tmp_path}")
    assert settings.derivatives == {"q": tmp_path}
    assert settings.atlas == {"aseg": tmp_path}
    assert parse("-d", str(tmp_path)).derivatives  # named by its folder
    with pytest.raises(InputError, match="given twice"):
        parse("-d", f"q={tmp_path}", f"q={tmp_path}")


def test_files_of_inputs_must_be_there(tmp_path, capsys):
    file = tmp_path / "f"
    file.write_text("")
    for name in ("noise_map", "gradient_deviation", "scheme_file"):
        flag = "--" + name.replace("_", "-")
        assert getattr(parse(flag, str(file)), name) == file
        with pytest.raises(SystemExit):
            parse(flag, str(tmp_path / "none"))
        assert f"argument {flag}: {tmp_path}/none does not exist" in capsys.readouterr().err


def test_input_type(capsys):
    assert parse().input_type == "bids"
    assert parse("--input-type", "ukb").input_type == "ukb"
    with pytest.raises(SystemExit):
        parse("--input-type", "hcp")
    assert "choose from" in capsys.readouterr().err


def test_model_options_are_typed():
    settings = parse("--set", "nexi.l_max=2", "nexi.tol=1e-3", "mcmicro.flag=true")
    assert settings.model_options == {"nexi": {"l_max": 2, "tol": 1e-3}, "mcmicro": {"flag": True}}


@pytest.mark.parametrize(
    ("text", "ms"), [("6ms", 6), ("0.006s", 6), (" 13.5 ms", 13.5), ("1e-2s", 10)]
)
def test_times_need_their_unit(text, ms):
    assert argtypes.milliseconds(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["6", "6us", "-1ms", "0ms", "2s"])
def test_times_without_or_with_odd_unit_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        argtypes.milliseconds(text)


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("3T", 3), ("0.55 T", 0.55), ("7.0t", 7)])
def test_field_strengths(text, value):
    assert argtypes.tesla(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["30000", "0", "3G", "-3", "1.2.3", ""])
def test_field_strengths_that_cannot_be(text):
    with pytest.raises(argparse.ArgumentTypeError, match="field strength in T"):
        argtypes.tesla(text)


@pytest.mark.parametrize(("text", "value"), [("50", 50), ("117deg", 117), ("150.5", 150.5)])
def test_spoiling_increments(text, value):
    assert argtypes.degrees(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["0.87", "360", "fifty", "nan", ""])
def test_spoiling_increments_that_cannot_be(text):
    with pytest.raises(argparse.ArgumentTypeError, match="from 4 to 360 degrees"):
        argtypes.degrees(text)


def test_voxel_maps(tmp_path):
    file = tmp_path / "ff.nii.gz"
    file.write_text("")
    settings = parse("--voxel-map", f"ff={file}", "theta=/x/{subject}_{session}.nii.gz")
    assert settings.voxel_map == {"ff": str(file), "theta": "/x/{subject}_{session}.nii.gz"}
    with pytest.raises(InputError, match="given twice"):
        parse("--voxel-map", f"ff={file}", f"ff={file}")
    for text in ("theta", "=x", "theta=", "the-ta=x", f"ff={tmp_path}/none.nii"):
        with pytest.raises(argparse.ArgumentTypeError):
            argtypes.voxel_map(text)


@pytest.mark.parametrize(("text", "gb"), [("8", 8), ("8G", 8), ("8000M", 8), ("1.5GB", 1.5)])
def test_memory(text, gb):
    assert argtypes.gigabytes(text) == pytest.approx(gb)


def test_command_line_wins_over_the_config_file(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text('models = ["nexi"]\nnprocs = 3\nrandom_seed = 7\n')
    settings = parse("--config-file", str(config), "--models", "r2star")
    assert settings.models == ("r2star",)
    assert (settings.nprocs, settings.random_seed) == (3, 7)


def test_cores_respect_slurm(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert available_cores() == 1


def test_prior_is_that_of_the_model_unless_given():
    assert parse().prior is None
    assert parse("--prior", "none").prior == "none"
    assert parse("--prior", "weak").prior == "weak"


@pytest.mark.parametrize(
    "words",
    [
        ["/data", "/out"],
        ["/data", "/out", "subject"],
        ["/data", "/out", "participant", "--small-delta", "6"],
        ["/data", "/out", "participant", "--mask", "/nowhere.nii.gz"],
        ["/data", "/out", "participant", "--nprocs", "0"],
        ["/data", "/out", "participant", "--model", "nexi"],
    ],
)
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_list_models_needs_no_dataset(capsys):
    assert main(["--list-models"]) == 0
    out = capsys.readouterr().out
    assert "nexi" in out
    assert "R2star [1/s]" in out
    assert "vfa, at least 2 flip angles" in out
    assert "vfa, at least 8 images of different flip angle or echo time" in out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("bids-gacelle ")


def test_absolute_paths():
    assert parse().bids_dir == Path("/data")
