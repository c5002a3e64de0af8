"""What a check can find in a data set, and what happens to the entries that have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

# The description of each kind of problem, and what happens to the entries that have it.
_KINDS = {
    "missing_image": ("image file missing", "dropped"),
    "unreadable_image": ("image file unreadable", "dropped"),
    "size_mismatch": ("image size differs from the annotation file", "dropped"),
    "duplicate_image_id": ("image id used more than once", "dropped"),
    "duplicate_file_name": ("image file listed twice", "merged with its annotations"),
    "missing_panoptic": ("image without panoptic annotation", "dropped"),
    "broken_panoptic": ("panoptic PNG missing, unreadable or of a different size", "dropped"),
    "duplicate_category": ("category id or name used twice", "merged"),
    "broken_file": ("annotation file unreadable", "dropped with its image"),
    "broken_entry": ("entry with a missing or malformed key", "dropped"),
    "unknown_image": ("annotation refers to an image that is not listed", "dropped"),
    "unknown_category": ("annotation refers to a category that is not listed", "dropped"),
    "degenerate_box": ("box without area or with infinite values", "dropped"),
    "outside_box": ("box completely outside its image", "dropped"),
    "clipped_box": ("box partly outside its image", "clipped"),
    "broken_segmentation": ("segmentation missing or malformed", "dropped"),
    "identical_annotation": ("annotation listed twice", "dropped"),
    "duplicate_annotation_id": ("annotation id used twice", "renumbered"),
    "corner_boxes": (
        "box that fits its image only as two corners (x_min, y_min, x_max, y_max), as all boxes do; COCO's "
        "boxes are x, y, width, height",
        "kept as written",
    ),
    "similar_names": ("class name that differs from another only in case or spaces", "kept apart"),
}

# Loses nothing, and is no reason for --strict to refuse.
_NOTES = {
    "written_number": ("number written as text, with a fraction of .0, or as true or false", "read"),
    "unknown_size": ("image size not stated (null or 0)", "read from the file"),
    "numeric_name": ("class name that is missing or a number", "read as the id or number"),
    "boxless": ("annotation without a box", "box computed from its segmentation"),
    "rotated_box": ("box with a rotation in its attributes", "replaced by the upright box around it"),
    "flat_polygon": ("polygon that is not in a list", "read"),
    "renamed_image": ("image file under a slightly different name", "found"),
    "upright_images": (
        "image whose EXIF orientation rotates it, and whose size in the annotation file is the rotated one",
        "read upright, as all images of this data set",
    ),
    "root_category": ("category without objects that only groups the others", "dropped"),
}


@dataclass(frozen=True)
class Problem:
    """One kind of problem.

    Attributes:
        kind: Its name, such as ``"missing_image"``.
        count: Number of images or annotations that have it.
        example: The first of them.
    """

    kind: str
    count: int
    example: str

    @property
    def is_note(self) -> bool:
        """Whether nothing is lost, so that ``strict`` does not refuse it."""
        return self.kind in _NOTES

    def __str__(self) -> str:
        name, action = (_NOTES if self.is_note else _KINDS)[self.kind]
        return f"{name}: {self.count} {action} (first: {self.example})"


@dataclass
class Findings:
    """The number and first example of each kind of problem."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Counts a problem."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, example)

    def lacks(self, entry: object, keys: Mapping[str, type], name: str) -> bool:
        """Whether an entry lacks a key with a value of its type, which is noted."""
        fault = fault_of(entry, keys)
        if fault:
            self.add("broken_entry", f"{name} {fault}")
        return fault is not None

    def problems(self) -> tuple[Problem, ...]:
        """The kinds that were found, in a fixed order: those of images first, notes last."""
        kinds = (kind for kind in (*_KINDS, *_NOTES) if kind in self.counts)
        return tuple(Problem(kind, self.counts[kind], self.examples[kind]) for kind in kinds)


def fault_of(entry: object, keys: Mapping[str, type]) -> str | None:
    """What is wrong with an entry that must have these keys and types, as the end of a sentence."""
    if not isinstance(entry, Mapping):
        return f"is {type(entry).__name__}, not a dictionary"
    for key, kind in keys.items():
        if key not in entry:
            return f"has no {key}"
        if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
            return f"has {key} {entry[key]!r}, which must be {_TYPE_NAMES[kind]}"
        if kind is int and abs(entry[key]) >= 2**63:
            return f"has {key} {entry[key]}, which must be an integer of 64 bits"
    return None


_TYPE_NAMES: dict[type, str] = {
    int: "an integer",
    str: "a string",
    list: "a list",
    Real: "a number",
}
