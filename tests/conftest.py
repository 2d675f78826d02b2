"""Fixtures shared by all tests."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference numbers and real scans kept beside the checkout; the test skips without them."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "DESIGN.md").exists():
        pytest.skip("needs ../shared")
    return path


@pytest.fixture(scope="session")
def bids_errors():
    """Function from a dataset to what the BIDS validator calls errors in it; skips without it."""
    validator = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    if validator is None:
        pytest.skip("needs bids-validator-deno")

    def errors(dataset: Path) -> list[str]:
        command = [validator, str(dataset), "--format", "json"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        issues = json.loads(ran.stdout)["issues"]["issues"]
        return [f"{i['code']} {i.get('location', '')}" for i in issues if i["severity"] == "error"]

    return errors
