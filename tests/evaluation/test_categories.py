from __future__ import annotations

import warnings

import pytest

from detrkit.errors import AnnotationError
from detrkit.evaluation.categories import match_categories

CATEGORIES = [{"id": 10, "name": "Cat"}, {"id": 20, "name": "dog"}, {"id": 30, "name": "unused"}]


def test_names_match_whatever_their_case_and_place() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = match_categories({0: "DOG", 1: "bird", 2: " cat"}, CATEGORIES, [10, 20, 20])
    assert found == {0: 20, 2: 10}


def test_a_category_without_annotations_need_not_match_but_may() -> None:
    assert match_categories({0: "cat"}, CATEGORIES, [10]) == {0: 10}
    assert match_categories({0: "cat", 5: "unused"}, CATEGORIES, [10]) == {0: 10, 5: 30}


def test_two_classes_of_one_name_are_one_category() -> None:
    assert match_categories({0: "cat", 1: "Cat", 2: "dog"}, CATEGORIES, [10, 20]) == {0: 10, 1: 10, 2: 20}


def test_categories_that_differ_in_case_are_told_apart() -> None:
    categories = [{"id": 10, "name": "cat"}, {"id": 20, "name": "CAT"}]
    assert match_categories({0: "CAT", 1: "cat"}, categories, [10, 20]) == {0: 20, 1: 10}
    assert match_categories({0: "cat"}, categories, [10]) == {0: 10}
    with pytest.raises(AnnotationError, match=r"no class for category 20 \(CAT\)"):
        match_categories({0: "cat"}, categories, [10, 20])


def test_ids_match_where_the_model_has_no_names() -> None:
    names = {10: "LABEL_10", 20: "LABEL_20", 7: "LABEL_7"}
    with pytest.warns(UserWarning, match="no class names.* by id, such as 10: 'LABEL_10' = 'Cat'"):
        assert match_categories(names, CATEGORIES, [10, 20]) == {10: 10, 20: 20}


def test_one_wrong_name_does_not_match_all_by_id() -> None:
    names = {10: "cats", 20: "dog", 30: "unused"}
    with pytest.raises(AnnotationError, match=r"no class for category 10 \(Cat\).*did you mean 'cats'"):
        match_categories(names, CATEGORIES, [10, 20])


def test_neither_matches() -> None:
    with pytest.raises(AnnotationError, match=r"no class for category 20 \(dog\) of the data set"):
        match_categories({0: "cat"}, CATEGORIES, [10, 20])
    many = [{"id": i, "name": f"c{i}"} for i in range(8)]
    with pytest.raises(AnnotationError, match=r"0 \(c0\), .*4 \(c4\) and 3 more of"):
        match_categories({100: "x"}, many, range(8))
