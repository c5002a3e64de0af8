"""Which class of a model is which category of a data set."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from detrkit.common.errors import AnnotationError
from detrkit.common.schema import Category
from detrkit.common.text import match_names
from detrkit.data.documents import category_name

_NAMED_IN_ERRORS = 5


def match_categories(
    names: Mapping[int, str], categories: Iterable[Category], used: Iterable[int]
) -> dict[int, int]:
    """Matches a model's classes with a data set's categories.

    By name (see ``match_names``) when the model has a class for every category with annotations; else by id,
    with a warning, when it has all of their ids.

    Args:
        names: Class id -> class name of the model.
        categories: The data set's, each with ``id`` and ``name``.
        used: Ids of the categories that have annotations.

    Returns:
        Class id of the model -> category id of the data set, for the classes that the data set has.

    Raises:
        AnnotationError: Neither names nor ids match.
    """
    categories = list(categories)
    name_of = {category["id"]: category_name(category) for category in categories}
    used = sorted(set(used))
    by_name = classes_by_name(names, categories)
    unnamed = [category for category in used if category not in by_name.values()]
    if not unnamed:
        return by_name
    unknown = [category for category in used if category not in names]
    if unknown:
        listed = ", ".join(f"{c} ({name_of.get(c, '?')})" for c in unnamed[:_NAMED_IN_ERRORS])
        more = f" and {len(unnamed) - _NAMED_IN_ERRORS} more" if len(unnamed) > _NAMED_IN_ERRORS else ""
        raise AnnotationError(
            f"the model has no class for the categories {listed}{more} of the data set; "
            "use a model trained on these categories, or set its id2label to their names"
        )
    first = unnamed[0]
    warnings.warn(
        f"the model has no class named {name_of.get(first, first)!r}, so classes are matched with the data "
        f"set's categories by id, such as {first}: {names[first]!r} = {name_of.get(first, first)!r}",
        stacklevel=2,
    )
    return {label: label for label in names if label in name_of}


def classes_by_name(names: Mapping[int, str], categories: Iterable[Category]) -> dict[int, int]:
    """Class id -> category id for the classes whose name a category has (see ``match_names``)."""
    return match_names(names, {category["id"]: category_name(category) for category in categories})
