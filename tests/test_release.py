"""What a release consists of beside the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import detrkit
from detrkit.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"


def test_the_version_stands_in_one_place() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in settings
    assert detrkit.__version__ not in settings
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\S+)", text, re.MULTILINE)
    versions = [heading for heading in headings if heading != "Unreleased"]
    assert versions[0] == detrkit.__version__


def test_the_citation_names_the_papers_of_all_families() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    cited = {(work["title"], work["url"]) for work in citation["references"]}
    assert cited == {(family.paper.title, family.paper.url) for family in FAMILIES.values()}


@pytest.mark.parametrize("name", ["bug", "feature", "wrong_result"])
def test_issue_templates_ask_for_what_an_answer_needs(name: str) -> None:
    form = yaml.safe_load((TEMPLATES / f"{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    ids = [entry["id"] for entry in form["body"]]
    assert len(set(ids)) == len(ids) >= 3
    assert all(entry["attributes"]["label"] for entry in form["body"])
    assert any(entry.get("validations", {}).get("required") for entry in form["body"])
