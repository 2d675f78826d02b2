"""Fixtures shared by all tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference numbers and real scans kept beside the checkout; the test skips without them."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "DESIGN.md").exists():
        pytest.skip("needs ../shared")
    return path
