from __future__ import annotations

import pytest

from detrkit.common.text import (
    did_you_mean,
    first_line,
    is_url,
    markdown,
    match_names,
    printable,
    spreadsheet_cell,
)


@pytest.mark.parametrize(
    ("message", "line"),
    [("one.\ntwo.", "one"), ("\n  first \nsecond", "first"), ("", "ValueError"), (" \n.\n", "ValueError")],
)
def test_the_first_line_of_an_error_has_words(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line


def test_close_names_are_suggested_whatever_the_case() -> None:
    assert did_you_mean("COSIN", ["cosine", "step"]) == "; did you mean 'cosine'?"
    assert did_you_mean("cosin", ["Cosine", "cosines"], most=2) == "; did you mean 'Cosine' or 'cosines'?"
    assert did_you_mean("xyz", ["cosine", "step"]) == ""
    assert did_you_mean("cosin", ["cosine"], cutoff=0.95) == ""


def test_names_are_compared_without_case_and_surrounding_spaces() -> None:
    known = {1: "STRASSE", 2: "Strasse 1", 3: "dog"}
    assert match_names({"a": " Straße\n", "b": "DOG", "c": "cat"}, known) == {"a": 1, "b": 3}


@pytest.mark.parametrize("known", [{1: "cat", 2: "Cat"}, {2: "Cat", 1: "cat"}])
def test_an_exact_name_wins(known: dict[int, str]) -> None:
    assert match_names({"a": "cat", "b": "Cat"}, known) == {"a": 1, "b": 2}


def test_a_name_is_not_taken_for_one_of_several_that_differ_in_case() -> None:
    assert match_names({"a": "CAT"}, {1: "cat", 2: "Cat"}) == {}


def test_the_first_of_equal_names_is_found() -> None:
    assert match_names({"a": "cat", "b": "CAT"}, {1: "cat", 2: "cat"}) == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("text", "wanted"), [("https://a.b/c", True), ("HTTP://a", True), ("file:///a", False), ("http", False)]
)
def test_urls_begin_with_http_or_https(text: str, wanted: bool) -> None:
    assert is_url(text) == wanted


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("white blood cell (WBC), 2-fold", "white blood cell (WBC), 2-fold"),
        ("Käse/チーズ", "Käse/チーズ"),
        ("<script>alert(1)</script>", "`<script>alert(1)</script>`"),
        ("![x](http://example.com/x.png)", "`![x](http://example.com/x.png)`"),
        ("a\n---\nlicense: other", "`a --- license: other`"),
        ("`<b>`", "`'<b>'`"),
        ("a & b", "`a & b`"),
        ("\x1b[31m", "`\\x1b[31m`"),
        ("", "``"),
    ],
)
def test_names_have_no_effect_in_markdown(name: str, shown: str) -> None:
    assert markdown(name) == shown


def test_formulas_are_text_in_spreadsheets() -> None:
    assert [*map(spreadsheet_cell, ["=1+1", "@x", "-x", "cat", -1.5, 3])] == [
        "'=1+1",
        "'@x",
        "'-x",
        "cat",
        -1.5,
        3,
    ]


def test_controls_and_changes_of_direction_are_escaped() -> None:
    assert printable("a\x1b]0;T\x07\u202eb\x7f\x9b\u2028é\U0001f469") == (
        "a\\x1b]0;T\\x07\\u202eb\\x7f\\x9b\\u2028é\U0001f469"
    )
