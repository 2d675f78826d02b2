"""What is told before anything runs, from the command line."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from bids_gacelle.cli.main import main
from tests.datasets import (
    SHAPE,
    add_complex,
    add_dwi,
    add_megre,
    add_vfa,
    new_dataset,
    write_image,
    write_json,
)


@pytest.fixture
def study(tmp_path):
    return new_dataset(tmp_path / "data")


@pytest.fixture
def dry(study, capsys):
    """Exit code and text of a dry run."""

    def run(*words):
        out = study.parent / "out"
        code = main([str(study), str(out), "participant", "--dry-run", *words])
        assert not out.exists()
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_a_wrong_number_of_volumes(study, dry):
    path = add_dwi(study)
    bval = path.with_name("sub-01_dwi.bval")
    bval.write_text(bval.read_text().strip() + " 3000")
    bvec = path.with_name("sub-01_dwi.bvec")
    bvec.write_text("\n".join(line + " 0.577" for line in bvec.read_text().splitlines()))
    code, text = dry("--models", "mcmicro")
    assert code == 3
    assert "has 62 volumes, but sub-01_dwi.bval has 63 b-values" in text
    assert "0 of 1 fits are possible." in text


def test_a_phase_off_the_grid(study, dry):
    for path in add_megre(study):
        phase = path.name.replace("_MEGRE", "_part-phase_MEGRE")
        write_image(path.with_name(phase), np.zeros(SHAPE))
        write_json(path.with_name(phase.replace(".nii.gz", ".json")), {"Units": "rad"})
    assert dry("--models", "r2star")[0] == 0
    moved = np.diag([2.0, 2.0, 3.0, 1.0])
    write_image(path.with_name(phase), np.zeros(SHAPE), moved)
    code, text = dry("--models", "r2star")
    assert code == 3
    assert "sub-01_echo-4_part-phase_MEGRE.nii.gz` is not on the grid of" in text


def test_images_that_are_not_there_yet(study, dry):
    paths = add_megre(study)
    paths[0].write_bytes(b"")
    paths[1].unlink()
    paths[1].symlink_to("nowhere")
    code, text = dry("--models", "r2star")
    assert code == 0
    assert "sub-01_echo-1_MEGRE.nii.gz` and 1 more images cannot be looked at yet" in text
    assert "1 of 1 fits are possible." in text


@pytest.mark.parametrize(("option", "value"), [("sandi.ds", "-1"), ("axcalibersmt.dn", "0")])
def test_constants_out_of_limits(study, dry, option, value):
    add_dwi(study)
    model, name = option.split(".")
    code, text = dry("--models", model, "--set", f"{option}={value}")
    assert code == 2
    assert f"--set {model}: {name} must be a positive number, got {value}" in text


def test_a_field_strength_and_maps_from_the_command_line(study, dry, tmp_path):
    add_megre(study)
    write_image(tmp_path / "theta_01.nii.gz", np.zeros((*SHAPE, 2)))
    words = ("--field-strength", "3T", "--spoiling-increment", "117")
    given = f"theta={tmp_path}/theta_{{subject}}.nii.gz"
    assert dry("--models", "r2star", *words, "--voxel-map", given)[0] == 0
    for wrong in (("--field-strength", "30000"), ("--spoiling-increment", "1")):
        with pytest.raises(SystemExit):
            dry(*wrong)


def test_a_map_that_is_no_image(study, dry, tmp_path):
    add_megre(study)
    (tmp_path / "theta.nii.gz").write_text("no image")
    code, text = dry("--models", "r2star", "--voxel-map", f"theta={tmp_path}/theta.nii.gz")
    assert code == 3
    assert "cannot be read as an image" in text
    assert "It was asked for with --voxel-map theta." in text
    assert nib.load(study / "sub-01/anat/sub-01_echo-1_MEGRE.nii.gz").shape == SHAPE


def test_single_echoes_tell_no_decay(study, dry):
    add_vfa(study)
    write_json(study / "VFA.json", {"EchoTime": 0.004})
    code, text = dry("--models", "r1r2star,despot1")
    assert code == 0
    assert "r1r2star needs at least 2 different echo times of a flip angle" in text


@pytest.mark.parametrize(
    ("volumes", "code", "words"),
    [
        ({"theta": 1, "ff": 2}, 3, "theta.nii.gz` has the shape"),
        ({"fo": 5, "ff": 2}, 3, "holds no theta2: the map fo needs three volumes for each fibre."),
        ({"fo": 6, "ff": 1}, 3, "holds no ff2: the map ff needs one volume for each fibre."),
        ({"theta1": 1, "theta2": 1, "ff": 2}, 0, "1 of 1 fits are possible."),
        ({"theta": 1, "theta2": 1, "ff": 3}, 0, "1 of 1 fits are possible."),
        ({"theta": 3, "fo": 3, "ff": 3}, 0, "1 of 1 fits are possible."),
    ],
)
def test_maps_of_too_few_fibres(study, dry, tmp_path, volumes, code, words):
    times = 0.002 + 0.002 * np.arange(16)
    add_complex(study, "MEGRE", {(0.0, te): np.exp(-20 * te) for te in times})
    given = []
    for name, n in volumes.items():
        write_image(tmp_path / f"{name}.nii.gz", np.zeros((*SHAPE, n) if n > 1 else SHAPE))
        given.append(f"{name}={tmp_path / name}.nii.gz")
    options = ("gremwi.fibres=2", "gremwi.fit_freq_mw=false")
    found, text = dry("--models", "gremwi", "--set", *options, "--voxel-map", *given)
    assert (found, words in text) == (code, True), text


@pytest.mark.parametrize("option", ["fibres=2", "rho=2", "t1_myelin=234"])
def test_options_of_myelin_water_out_of_limits(study, dry, option):
    code, text = dry("--models", "mcrmwi", "--set", f"mcrmwi.{option}")
    assert code == 2
    assert "error: --set mcrmwi: " in text
