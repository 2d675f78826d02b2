"""The package as it is handed on: wheel, editable install, pins and the files beside the code."""

import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bids_gacelle

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {"bids_gacelle": ROOT / "bids_gacelle", "bids_gacelle/workflows": ROOT / "workflows"}

# Runs inside the clean environment: imports everything, and says where it came from.
PROBE = """
import importlib, json, pkgutil
import bids_gacelle, bids_gacelle.workflows
from bids_gacelle.engine import get_model, list_models
names = [m.name for m in pkgutil.walk_packages(bids_gacelle.__path__, "bids_gacelle.")]
names += [m.name for m in pkgutil.walk_packages(
    bids_gacelle.workflows.__path__, "bids_gacelle.workflows.")]
for name in names:
    importlib.import_module(name)
print(json.dumps({"package": bids_gacelle.__file__, "workflows": bids_gacelle.workflows.__file__,
                  "modules": names, "models": [get_model(name).name for name in list_models()]}))
"""


def source_files() -> set[str]:
    """Every file of the package as its path inside a wheel."""
    return {
        f"{prefix}/{path.relative_to(top).as_posix()}"
        for prefix, top in SOURCES.items()
        for path in top.rglob("*")
        if path.is_file()
        and not any(p.startswith((".", "__pycache__")) for p in path.relative_to(top).parts)
    }


def python(*args: str | Path, executable: str | Path = sys.executable, cwd: Path) -> str:
    """Run Python in ``cwd``, away from the checkout, and return what it prints."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(executable), *map(str, args)], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("bids_gacelle", "workflows"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """The wheel, built with the setuptools of this environment."""
    out = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    log = python("-m", "pip", "wheel", "-v", *offline, "-w", out, source, cwd=out)
    assert "would be ignored" not in log, "a folder is missing in [tool.setuptools] packages"
    return next(out.glob("*.whl"))


@pytest.fixture(params=["wheel", "editable"])
def installed(request, source, tmp_path) -> tuple[str, Path, Path]:
    """Install into a new environment that shares only the dependencies of this one."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    executable = home / "bin" / "python"
    # A folder named in a .pth file is searched, but its own .pth files are not read: the
    # editable install that this test suite itself runs on stays out of sight.
    purelib = Path(python("-c", "import site; print(site.getsitepackages()[0])",
                          executable=executable, cwd=tmp_path).strip())  # fmt: skip
    (purelib / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    what = [request.getfixturevalue("wheel")] if request.param == "wheel" else ["-e", source]
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    python("-m", "pip", "--python", executable, "install", *offline, *what, cwd=tmp_path)
    return request.param, executable, purelib if request.param == "wheel" else source


def test_every_folder_of_the_package_is_listed():
    """A folder that is missing in the list is missing in the wheel."""
    folders = {str(Path(name).parent).replace("/", ".") for name in source_files()}
    assert sorted(folders) == PYPROJECT["tool"]["setuptools"]["packages"]


def test_the_wheel_holds_every_file_and_nothing_else(wheel):
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert inside == source_files()


def test_the_wheel_states_licence_and_commands(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"bids_gacelle-{bids_gacelle.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert archive.read(f"{info}/entry_points.txt").decode().split() == [
        "[console_scripts]",
        *("bids-gacelle", "=", "bids_gacelle.cli.main:main"),
        *("bids-gacelle-phantom", "=", "bids_gacelle.phantom.cli:main"),
    ]


def test_an_install_works_away_from_the_checkout(installed, tmp_path):
    kind, executable, where = installed
    found = json.loads(python("-P", "-c", PROBE, executable=executable, cwd=tmp_path))
    assert Path(found["package"]).is_relative_to(where)
    assert Path(found["workflows"]).is_relative_to(where)
    expected = {
        re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".")
        for name in source_files()
        if name.endswith(".py")
    } - {"bids_gacelle", "bids_gacelle.workflows"}
    assert set(found["modules"]) >= expected
    assert {"r2star", "despot1", "mcmicro", "nexi"} <= set(found["models"])
    for command in ("bids-gacelle", "bids-gacelle-phantom"):
        script = executable.parent / command
        assert bids_gacelle.__version__ in python(
            script, "--version", executable=executable, cwd=tmp_path
        ), kind


def test_constraints_pin_every_dependency_inside_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = PYPROJECT["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    for requirement in map(Requirement, project["dependencies"] + extras):
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} but {pinned} is pinned"


def test_the_installed_version_is_the_one_in_the_source():
    assert importlib.metadata.version("bids-gacelle") == bids_gacelle.__version__


def test_every_file_beside_the_code_names_the_same_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (\S+)$", citation, re.M)[1] == bids_gacelle.__version__
    changes = (ROOT / "CHANGES.md").read_text()
    assert re.search(r"^## \[(\d[^\]]*)\]", changes, re.M)[1] == bids_gacelle.__version__
    for recipe in ("Dockerfile", "singularity.def"):
        label = re.search(r"image\.version[= ]\"?([^\s\"]+)", (ROOT / recipe).read_text())
        assert label[1] == bids_gacelle.__version__, recipe


def test_docker_and_apptainer_images_set_the_same_variables():
    docker = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-1].replace("\\\n", " ")
    env = " ".join(re.findall(r"^ENV (.*)$", docker, re.M))
    definition = (ROOT / "singularity.def").read_text()
    section = re.search(r"^%environment\n((?: .*\n|\n)+)", definition, re.M)[1]
    inside, apptainer = (dict(re.findall(r"(\w+)=(\S+)", text)) for text in (env, section))
    del inside["HOME"]  # Apptainer does not let an image set it
    assert inside.pop("BIDS_GACELLE_CONTAINER") == "docker"
    assert apptainer.pop("BIDS_GACELLE_CONTAINER") == "apptainer"
    assert inside == apptainer
    assert "PYTHONNOUSERSITE" in inside
