"""The pages beside the code say what the code does."""

import re
from pathlib import Path

import pytest

from bids_gacelle.cli.parser import build_parser
from bids_gacelle.engine import list_models

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_usage_names_every_option():
    usage = (ROOT / "docs" / "usage.md").read_text()
    options = {
        next(name for name in action.option_strings if name.startswith("--"))
        for action in build_parser()._actions
        if action.option_strings and action.dest != "help"
    }
    shown = set(re.findall(r"--[a-z0-9-]+", usage))
    assert {"--models", "--dry-run"} <= options
    assert sorted(options - shown) == []


def test_usage_and_readme_name_every_model():
    for page in (ROOT / "README.md", ROOT / "docs" / "usage.md"):
        rows = set(re.findall(r"^\| `(\w+)` \|", page.read_text(), re.M))
        assert set(list_models()) <= rows, page


def test_the_model_of_the_models_page_can_be_fitted():
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "models.md").read_text(), re.M | re.S
    )
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    result = names["result"]
    assert result.maps["d"] == pytest.approx([0.7, 1.4], rel=1e-4)
    assert list(result.flags) == [0, 0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_project_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
