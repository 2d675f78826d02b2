import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bids_gacelle.phantom.cli import main

needs_template = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="needs nilearn (extra `phantom`)"
)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("part", ["", "derivatives/truth"])
def test_the_validator_finds_no_error(noisy, part):
    beside = Path(sys.executable).parent / "bids-validator-deno"
    validator = str(beside) if beside.exists() else shutil.which("bids-validator-deno")
    if validator is None:
        pytest.skip("needs bids-validator-deno")
    command = [validator, str(noisy.root / part), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in found if issue["severity"] == "error"] == []
    assert done.returncode == 0


def test_both_datasets_say_what_they_are(noisy):
    raw = json.loads((noisy.root / "dataset_description.json").read_text())
    truth = json.loads((noisy.root / "derivatives/truth/dataset_description.json").read_text())
    assert (raw["DatasetType"], truth["DatasetType"]) == ("raw", "derivative")
    assert (noisy.root / "participants.tsv").read_text().splitlines()[1].startswith("sub-01")


@needs_template
def test_same_seed_same_bytes_and_one_more_contrast_or_subject_changes_nothing(tmp_path):
    common = ["--snr", "30", "--resolution", "12"]
    small = ["--contrasts", "megre", "--subjects", "1"]
    assert main([str(tmp_path / "a"), *small, *common]) == 0
    assert main([str(tmp_path / "b"), *small, *common]) == 0
    assert main([str(tmp_path / "c"), "--contrasts", "vfa,megre", *common]) == 0
    assert main([str(tmp_path / "d"), *small, *common, "--seed", "1"]) == 0
    a, b, c, d = (digests(tmp_path / name) for name in "abcd")
    assert a == b
    images = [name for name in a if name.endswith(".nii.gz")]
    assert len(images) == 12 + 3 + 2
    assert all(a[name] == c[name] for name in images)
    assert all(a[name] != d[name] for name in images)


@needs_template
def test_sessions_are_named_only_when_there_are_several(tmp_path):
    common = ["--contrasts", "megre", "--subjects", "1", "--resolution", "12"]
    assert main([str(tmp_path / "one"), *common]) == 0
    assert main([str(tmp_path / "two"), *common, "--sessions", "2"]) == 0
    assert (tmp_path / "one/sub-01/anat/sub-01_echo-1_MEGRE.nii.gz").exists()
    for session in ("1", "2"):
        folder = tmp_path / f"two/sub-01/ses-{session}/anat"
        assert (folder / f"sub-01_ses-{session}_echo-12_MEGRE.nii.gz").exists()
    truth = tmp_path / "two/derivatives/truth/sub-01/ses-2/anat/sub-01_ses-2_R2starmap.nii.gz"
    assert truth.exists()


@needs_template
def test_an_earlier_phantom_is_replaced_on_request_only_and_nothing_else_ever(tmp_path, capsys):
    out = tmp_path / "brain"
    command = [str(out), "--contrasts", "megre", "--resolution", "12"]
    assert main([*command, "--subjects", "2"]) == 0
    mine = out / "derivatives" / "bids_gacelle" / "precious.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("kept")
    capsys.readouterr()
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--subjects", "1", "--overwrite"]) == 0
    assert not (out / "sub-02").exists()
    assert not (out / "derivatives/truth/sub-02").exists()
    assert mine.read_text() == "kept"

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("kept")
    capsys.readouterr()
    assert main([str(other), "--overwrite"]) == 2
    assert "not an earlier digital brain" in capsys.readouterr().err
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


@needs_template
def test_it_says_what_it_wrote_and_how_to_go_on(tmp_path, capsys):
    out = tmp_path / "a brain"
    command = [str(out), "--contrasts", "megre,vfa", "--subjects", "1", "--resolution", "12"]
    assert main(command) == 0
    said = capsys.readouterr().out
    count = len(list(out.rglob("*.nii.gz")))
    assert f"Wrote {count} images" in said
    line = said.splitlines()[-1].strip()
    assert line.startswith(f"bids-gacelle '{out}' '{out}/derivatives/bids_gacelle' participant")
    assert "--models r2star,despot1 " in line
    assert "--combine-dwi" not in line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--subjects", "0"], "--subjects is 0"),
        (["--sessions", "-1"], "--sessions is -1"),
        (["--snr", "0"], "--snr is 0"),
        (["--snr", "nan"], "--snr is nan"),
        (["--contrasts", "megre,asl"], "'asl' is unknown; choose among megre, vfa, dwi"),
        (["--contrasts", ""], "--contrasts must name"),
        (["--contrasts", "vfa,vfa"], "at most once"),
        (["--resolution", "0.1"], "--resolution is 0.1 mm"),
        (["--seed", "-3"], "--seed is -3"),
        (["--dwi-model", "dti"], "'dti' is unknown; choose among nexi, mcmicro"),
    ],
)
def test_a_bad_value_is_said_in_one_sentence(tmp_path, capsys, options, sentence):
    assert main([str(tmp_path / "brain"), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bids-gacelle-phantom: error: ")
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "brain").exists()


@needs_template
def test_a_file_in_the_way_is_said(tmp_path, capsys):
    (tmp_path / "brain").write_text("")
    assert main([str(tmp_path / "brain")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main([str(tmp_path / "brain" / "inside"), "--subjects", "1"]) == 2
    assert "Cannot write" in capsys.readouterr().err


def test_the_command_does_not_import_torch_to_answer_help():
    code = (
        "import sys, bids_gacelle.phantom.cli as c; c.build_parser().format_help(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'nilearn', 'nibabel')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
