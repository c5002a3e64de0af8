from __future__ import annotations

import pytest

from detrkit.common.text import did_you_mean, first_line, is_url, match_names


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
