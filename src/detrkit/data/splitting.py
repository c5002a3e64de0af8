"""Splits of a data set into training and validation images, and what makes two data sets the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from detrkit.common.errors import AnnotationError
from detrkit.data.coco import DetectionDataset

_AUGMENTED = ".rf."  # Roboflow's copies of one image are called by its name, this, and a hash


def split_dataset(
    dataset: DetectionDataset, fraction: float, *, seed: int = 0
) -> tuple[DetectionDataset, DetectionDataset]:
    """Splits a checked data set so that every class has the same share of its objects in both parts.

    The split depends only on the images, their objects, the fraction and the seed. Copies of one image that
    Roboflow augmented stay together. A class with a single image stays in training.

    Args:
        dataset: A data set from ``check_dataset``.
        fraction: Share of the images that become validation images, above 0 and below 1.
        seed: Any non-negative number.

    Returns:
        The training and the validation data set.

    Raises:
        AnnotationError: There are too few images.
        ValueError: ``fraction`` is out of range.

    Source: iterative stratification, Sechidis et al., 2011.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be above 0 and below 1, not {fraction}")
    groups: dict[str, list[int]] = {}
    for image in sorted(dataset.document["images"], key=lambda entry: str(entry["file_name"])):
        groups.setdefault(str(image["file_name"]).split(_AUGMENTED)[0], []).append(image["id"])
    objects = _objects_of_images(dataset)
    contents = {
        name: sum((objects.get(image_id, Counter()) for image_id in ids), Counter[int]())
        for name, ids in groups.items()
    }
    order = np.random.default_rng(seed).permutation(len(groups))
    names = np.array(list(groups), dtype=object)[order].tolist()
    validation = _chosen(names, groups, contents, fraction)
    ids = {image_id for name in validation for image_id in groups[name]}
    parts = (
        [image for image in dataset.document["images"] if image["id"] not in ids],
        [image for image in dataset.document["images"] if image["id"] in ids],
    )
    if not all(parts):
        raise AnnotationError(
            f"{dataset.source}: {len(dataset)} images are too few for a validation fraction of {fraction:g}"
        )
    train, val = ([image["id"] for image in part] for part in parts)
    return subset(dataset, train), subset(dataset, val)


def repeated_images(dataset: DetectionDataset, threshold: float, *, seed: int = 0) -> list[int]:
    """Images to show again in each epoch, since they have classes that few images have.

    An image is shown sqrt(threshold / f) times on average, if f is the fraction of the images that have its
    rarest class and is below the threshold.

    Args:
        dataset: A checked data set.
        threshold: Fraction of the images, from 0 (no image is repeated) to 1.
        seed: Any non-negative number; decides how fractions are rounded.

    Returns:
        Indices of images, in ascending order; one for each additional time.

    Source: repeat-factor sampling, appendix B of Gupta et al., "LVIS", CVPR 2019.
    """
    objects = _objects_of_images(dataset)
    contents = [set(objects.get(image["id"], ())) for image in dataset.document["images"]]
    numbers = Counter(category for content in contents for category in content)
    factors = [
        max([1.0, *((threshold * len(contents) / numbers[category]) ** 0.5 for category in content)])
        for content in contents
    ]
    chance = np.random.default_rng(seed).random(len(factors))
    return [index for index, factor in enumerate(factors) for _ in range(int(factor - 1 + chance[index]))]


def subset(dataset: DetectionDataset, image_ids: list[int]) -> DetectionDataset:
    """The data set with some of its images."""
    chosen = set(image_ids)
    document = dataset.document
    return replace(
        dataset,
        document={
            "images": [image for image in document["images"] if image["id"] in chosen],
            "annotations": [entry for entry in document["annotations"] if entry["image_id"] in chosen],
            "categories": document["categories"],
        },
    )


def _objects_of_images(dataset: DetectionDataset) -> dict[int, Counter[int]]:
    """Number of objects of each category, by image id."""
    found: dict[int, Counter[int]] = {}
    for row in dataset.document["annotations"]:
        counts = found.setdefault(row["image_id"], Counter())
        if dataset.panoptic_dir is None:
            counts[row["category_id"]] += 1
        else:
            counts.update(segment["category_id"] for segment in row["segments_info"])
    return found


def _chosen(
    names: list[str],
    groups: Mapping[str, list[int]],
    contents: Mapping[str, Counter[int]],
    fraction: float,
) -> set[str]:
    """Names of the groups for validation: rare classes first, each group to the part that lacks more."""
    totals = sum(contents.values(), Counter[int]())
    images = sum(map(len, groups.values()))
    lacking = {c: [count * (1 - fraction), count * fraction] for c, count in totals.items()}
    room = [images * (1 - fraction), images * fraction]
    left = dict.fromkeys(names)
    parts: tuple[set[str], set[str]] = (set(), set())

    def assign(name: str, part: int) -> None:
        parts[part].add(name)
        del left[name]
        room[part] -= len(groups[name])
        for category, count in contents[name].items():
            lacking[category][part] -= count
            totals[category] -= count

    while remaining := {c: n for c, n in totals.items() if n > 0}:
        rare = min(remaining, key=lambda category: (remaining[category], category))
        for name in [name for name in left if contents[name][rare]]:
            assign(name, int((lacking[rare][1], room[1]) > (lacking[rare][0], room[0])))
    for name in list(left):
        assign(name, int(room[1] > room[0]))
    return parts[1]


def fingerprint(dataset: DetectionDataset) -> str:
    """What a checked data set contains, wherever it is stored: images by name and size, and their objects."""
    names = dataset.category_names
    rows: dict[int, list[object]] = {}
    for entry in dataset.document["annotations"]:
        objects = rows.setdefault(entry["image_id"], [])
        if dataset.panoptic_dir is None:
            objects.append([names[entry["category_id"]], list(entry["bbox"]), entry["iscrowd"]])
        else:
            objects += [[names[segment["category_id"]], segment["id"]] for segment in entry["segments_info"]]
    images = sorted(
        [
            Path(image["file_name"]).name,
            image["height"],
            image["width"],
            sorted(rows.get(image["id"], []), key=str),
        ]
        for image in dataset.document["images"]
    )
    content = [images, sorted(names.values()), dataset.upright]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
