"""What the site's pages are made from."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

pytest.importorskip("mkdocs", reason="the extra docs is not installed")

CSV = """\
model,side,device,median_s,fastest_s,ratio,ratio_low,ratio_high,failure
r50,torch,cpu,0.5,0.4,2.0,1.9,2.1,
r50,transformers,cpu,1.0,0.9,,,,out of | memory
"""


@pytest.fixture(scope="module")
def results() -> Callable[[Path], str]:
    return runpy.run_path(str(ROOT / "docs" / "hooks.py"))["benchmark_results"]


def test_without_measurements_the_page_says_how_to_make_them(
    results: Callable[[Path], str], tmp_path: Path
) -> None:
    assert "benchmarks/" in results(tmp_path / "missing")


def test_measurements_are_a_table_of_what_differs(results: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "engines.csv").write_text(CSV)
    page = results(tmp_path)
    assert "| side | median_s | ratio | failure |" in page
    assert "| torch | 0.5 | 2.0 (1.9 to 2.1) |  |" in page
    assert "| transformers | 1.0 |  | out of &#124; memory |" in page
    assert "model r50, device cpu" in page
    assert "0.9" not in page.replace("0.9 to", "")


def test_a_measurement_without_rows_is_said_to_be_empty(
    results: Callable[[Path], str], tmp_path: Path
) -> None:
    (tmp_path / "engines.csv").write_text(CSV.splitlines()[0])
    assert "Empty." in results(tmp_path)
