"""Which class of a model is which category of a data set."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

from detrkit.common.errors import AnnotationError
from detrkit.common.schema import Category
from detrkit.common.text import did_you_mean, match_names
from detrkit.data.documents import category_name

_NAMED_IN_ERRORS = 5
_PLACEHOLDER = re.compile(r"LABEL_\d+|N/A")


def match_categories(
    names: Mapping[int, str], categories: Iterable[Category], used: Iterable[int]
) -> dict[int, int]:
    """Matches a model's classes with a data set's categories, by name (see ``match_names``).

    Only a model without class names (LABEL_0, LABEL_1, ...) is matched by id, with a warning, if it has all
    ids.

    Args:
        names: Class id -> class name of the model.
        categories: The data set's, each with ``id`` and ``name``.
        used: Ids of the categories that have annotations.

    Returns:
        Class id of the model -> category id of the data set, for the classes that the data set has.

    Raises:
        AnnotationError: A category with annotations has no class.
    """
    categories = list(categories)
    used = sorted(set(used))
    by_name = classes_by_name(names, categories)
    missing = [category for category in used if category not in by_name.values()]
    if not missing:
        return by_name
    name_of = {category["id"]: category_name(category) for category in categories}
    if all(map(_PLACEHOLDER.fullmatch, names.values())) and all(category in names for category in used):
        first = used[0]
        warnings.warn(
            f"the model has no class names, so its classes are matched with the data set's categories by id, "
            f"such as {first}: {names[first]!r} = {name_of.get(first, first)!r}",
            stacklevel=2,
        )
        return {label: label for label in names if label in name_of}
    raise AnnotationError(
        f"the model has no class for {listed_categories(missing, name_of)} of the data set"
        f"{did_you_mean(name_of.get(missing[0], ''), names.values())}; use a model trained on these classes, "
        "or correct the names in the annotation file"
    )


def listed_categories(ids: Sequence[int], name_of: Mapping[int, str]) -> str:
    """The first few categories with their names, for a message."""
    listed = ", ".join(f"{c} ({_shown(name_of.get(c, '?'))})" for c in ids[:_NAMED_IN_ERRORS])
    more = f" and {len(ids) - _NAMED_IN_ERRORS} more" if len(ids) > _NAMED_IN_ERRORS else ""
    return f"{'category' if len(ids) == 1 else 'categories'} {listed}{more}"


def _shown(name: str) -> str:
    """A name, in quotes if it has blanks that cannot be seen."""
    return name if name == " ".join(name.split()) else repr(name)


def classes_by_name(names: Mapping[int, str], categories: Iterable[Category]) -> dict[int, int]:
    """Class id -> category id for the classes whose name a category has (see ``match_names``)."""
    return match_names(names, {category["id"]: category_name(category) for category in categories})
