"""COCO-format data sets: boxes, instance masks, and panoptic segments.

A category id in a file can be any number, often with gaps (COCO's 80 categories go up to 90). A label is the
index in the model's class head. For a new model, the categories in ascending order of their ids get the
labels 0, 1, 2, ... A model that already knows the categories, such as a released COCO checkpoint with its 91
outputs, keeps its own labels: :meth:`DetectionDataset.with_labels` sets them, and
:meth:`DetectionDataset.labels_in` finds them by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import PIL.Image

from detrkit.common.errors import AnnotationError
from detrkit.common.schema import Annotation, Document, Target
from detrkit.common.text import did_you_mean, match_names
from detrkit.data.documents import DocumentSource, name_of, read_lists
from detrkit.data.problems import Problem
from detrkit.processing.images import load_image

Labels: TypeAlias = Mapping[Any, int]
"""Labels by category name or category id."""

UNUSED_LABEL = "N/A"
"""Name of a label that no category has, as in the released checkpoints."""


@dataclass(frozen=True, eq=False, repr=False)
class DetectionDataset:
    """Images and their objects, described by a COCO document; images are read when they are requested.

    Indexing gives an image (PIL, RGB) and its target with boxes xyxy in pixels, see
    :func:`detrkit.processing.annotations.prepare_detection` and ``prepare_panoptic``. Crowds are no targets
    of a detector (they stay in ``document``, where evaluation wants them); panoptic segments that are crowds
    are targets, as in the original.

    Attributes:
        document: ``images``, ``annotations`` and ``categories`` as lists of COCO entries.
        images_dir: The folder that file names are relative to.
        source: The data set's name in messages: the annotation file or folder it came from.
        labels: Labels by category name or category id, if they are not 0, 1, 2, ...
        panoptic_dir: Folder of the PNG files of panoptic annotations; None for a detection data set.
        return_masks: Whether targets have ``masks``.
        exif_orientation: Whether images are rotated as their EXIF orientation says. COCO's boxes refer
            to the pixels as they are stored. None lets ``check_dataset`` see which of the two the sizes in
            the document are those of.
        problems: What the reader of the data set's format could not read, for ``check_dataset`` to report.
        checked: Whether ``check_dataset`` made it.
        format: The format that it was read from, for a person to read.
    """

    document: Document
    images_dir: Path | None
    source: str
    labels: Labels | None = None
    panoptic_dir: Path | None = None
    return_masks: bool = False
    exif_orientation: bool | None = None
    problems: tuple[Problem, ...] = ()
    checked: bool = False
    format: str = "COCO"

    @classmethod
    def from_coco(
        cls,
        images_dir: str | os.PathLike[str],
        annotation_file: DocumentSource,
        *,
        labels: Labels | None = None,
        panoptic_dir: str | os.PathLike[str] | None = None,
        return_masks: bool = False,
        exif_orientation: bool | None = None,
    ) -> DetectionDataset:
        """Reads an annotation file. Its entries are checked by ``check_dataset``, not here.

        Args:
            images_dir: The folder of the images.
            annotation_file: COCO JSON, as text or compressed with gzip: instances, or panoptic with
                ``segments_info``. Or the document itself.
            labels: Labels by category name or category id; by default 0, 1, 2, ... in ascending order of the
                category ids.
            panoptic_dir: The folder of the PNG files of a panoptic file.
            return_masks: Whether targets have ``masks``. Without, ``check_dataset`` drops polygons and run
                lengths, which take memory.
            exif_orientation: Whether images are rotated as their EXIF orientation says; see the attribute.

        Raises:
            AnnotationError: A file or folder is missing, or the file is not COCO JSON of that kind.
        """
        read = read_lists(annotation_file, "images", "annotations", "categories")
        images, annotations, categories = read["images"], read["annotations"], read["categories"]
        document: Document = {"images": images, "annotations": annotations, "categories": categories}
        name = name_of(annotation_file)
        panoptic = any(isinstance(a, Mapping) and "segments_info" in a for a in document["annotations"])
        if panoptic and panoptic_dir is None:
            raise AnnotationError(
                f"{name} contains panoptic annotations; also pass the folder of their PNG files"
            )
        if panoptic_dir is not None and not panoptic and document["annotations"]:
            raise AnnotationError(
                f"{name} has no panoptic annotations (segments_info); leave out the folder of "
                "panoptic PNG files"
            )
        return cls(
            document,
            existing_folder(images_dir, "images"),
            name,
            labels,
            None if panoptic_dir is None else existing_folder(panoptic_dir, "panoptic PNG files"),
            return_masks,
            exif_orientation,
        )

    def __repr__(self) -> str:
        return f"DetectionDataset({self.source}: {len(self)} images, {len(self.category_names)} categories)"

    def __len__(self) -> int:
        return len(self.document["images"])

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, Target]:
        """One image and its target.

        Raises:
            ImageError: The image cannot be read.
            AnnotationError: An annotation does not make sense.
        """
        # Targets are tensors, which only training needs: evaluation runs without PyTorch.
        from detrkit.processing.annotations import only_objects, prepare_detection, prepare_panoptic

        image = load_image(self.path(index), exif_orientation=self.upright)
        size = (image.height, image.width)
        image_id = self.document["images"][index]["id"]
        labels = self.category_to_label
        entries = self._entries.get(image_id, [])
        if self.panoptic_dir is not None:
            if not entries:
                raise AnnotationError(
                    f"{self.source}: image {image_id} has no panoptic annotation; run check_dataset first"
                )
            entry = entries[0]
            segments = [{**s, "category_id": labels[s["category_id"]]} for s in entry["segments_info"]]
            target = prepare_panoptic(
                {**entry, "segments_info": segments}, *size, masks_path=self.panoptic_dir
            )
            visible = target["masks"].flatten(1).any(1)  # a segment may have no pixel in the PNG
            target = only_objects(target, visible)
            if not self.return_masks:
                del target["masks"]
            return image, target
        objects = [{**a, "category_id": labels[a["category_id"]]} for a in entries]
        return image, prepare_detection(
            {"image_id": image_id, "annotations": objects}, *size, return_masks=self.return_masks
        )

    @property
    def upright(self) -> bool:
        """Whether images are read as their EXIF orientation says."""
        return bool(self.exif_orientation)

    def path(self, index: int) -> Path:
        """The file of an image."""
        assert self.images_dir is not None
        return self.images_dir / self.document["images"][index]["file_name"]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the images in pixels, as the document says; a checked one has them all."""
        return [(image["height"], image["width"]) for image in self.document["images"]]

    @cached_property
    def category_names(self) -> dict[int, str]:
        """Names by category id, in ascending order of the ids.

        Raises:
            AnnotationError: A category has no id or name, or two have the same id or name.
        """
        names: dict[int, str] = {}
        try:
            for category in sorted(self.document["categories"], key=lambda entry: entry["id"]):
                if category["id"] in names or category["name"] in names.values():
                    raise AnnotationError(
                        f"{self.source}: category {category['id']} ({category['name']}) has the id or name "
                        "of another category; rename it, or let check_dataset merge them"
                    )
                names[category["id"]] = category["name"]
        except (KeyError, TypeError) as error:
            raise AnnotationError(
                f"{self.source}: every category must have an id (a number) and a name ({error})"
            ) from error
        return names

    @property
    def has_segmentations(self) -> bool:
        """Whether every annotation has a segmentation, so that masks can be evaluated."""
        entries = [entry for entry in self.document["annotations"] if isinstance(entry, Mapping)]
        return all(entry.get("segmentation") for entry in entries)

    @property
    def used_categories(self) -> list[int]:
        """Ids of the categories that have objects, in ascending order."""
        rows = self.document["annotations"]
        if self.panoptic_dir is None:
            return sorted({row["category_id"] for row in rows})
        return sorted({segment["category_id"] for row in rows for segment in row["segments_info"]})

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of objects of each category by name, without crowds, in the order of the category ids."""
        counts = dict.fromkeys(self.category_names, 0)
        for row in self.document["annotations"]:
            for entry in row["segments_info"] if self.panoptic_dir is not None else [row]:
                counts[entry["category_id"]] += not entry.get("iscrowd")
        return {name: counts[category] for category, name in self.category_names.items()}

    @cached_property
    def category_to_label(self) -> dict[int, int]:
        """The label of every category id.

        Raises:
            AnnotationError: ``labels`` has no label for a category.
        """
        if self.labels is None:
            return {category: label for label, category in enumerate(self.category_names)}
        found, missing = {}, []
        for category, name in self.category_names.items():
            label = self.labels.get(category, self.labels.get(name))
            if label is None:
                missing.append(name)
            else:
                found[category] = int(label)
        if missing:
            known = [key for key in self.labels if isinstance(key, str)]
            raise AnnotationError(
                f"{self.source}: {_listed(missing)} among its {len(self.category_names)} categories are not "
                f"classes of the model ({_listed(known)}); rename them, or train new classes"
                f"{did_you_mean(missing[0], known)}"
            )
        return found

    @property
    def num_labels(self) -> int:
        """Number of labels: one more than the highest."""
        return max(self.category_to_label.values(), default=-1) + 1

    @property
    def id2label(self) -> dict[int, str]:
        """Class names of all labels below ``num_labels``; "N/A" for labels that no category has."""
        names = {self.category_to_label[category]: name for category, name in self.category_names.items()}
        return {label: names.get(label, UNUSED_LABEL) for label in range(self.num_labels)}

    @property
    def label2id(self) -> dict[str, int]:
        """Labels by category name; can be passed as ``labels`` to another split or file."""
        return {name: self.category_to_label[category] for category, name in self.category_names.items()}

    @property
    def is_thing(self) -> dict[int, bool]:
        """Whether a label is a thing rather than stuff; True if the file does not say."""
        categories = self.document["categories"]
        return {self.category_to_label[c["id"]]: bool(c.get("isthing", True)) for c in categories}

    def labels_in(self, id2label: Mapping[int, str]) -> dict[str, int] | None:
        """The labels that a model has for the categories of this data set, by name (see ``match_names``).

        Args:
            id2label: The model's class names (``model.config.id2label``).

        Returns:
            Labels by category name, or None if not every category has a class of its own, so that the model
            needs new classes.
        """
        names = self.category_names.values()
        found = match_names({name: name for name in names}, id2label)
        return found if len(set(found.values())) == len(names) else None

    def with_labels(self, labels: Labels | None) -> DetectionDataset:
        """The same data set with different labels.

        A validation split uses the labels of the training split (``val.with_labels(train.label2id)``), since
        its file may have different categories.

        Args:
            labels: Labels by category name or category id; None for 0, 1, 2, ...
        """
        return replace(self, labels=labels)

    @cached_property
    def _entries(self) -> dict[int, list[Annotation]]:
        """Annotations by image id."""
        grouped: dict[int, list[Annotation]] = {}
        for annotation in self.document["annotations"]:
            grouped.setdefault(annotation["image_id"], []).append(annotation)
        return grouped


def existing_folder(folder: str | os.PathLike[str], what: str) -> Path:
    """A folder as a path; an AnnotationError unless it exists, which says what it should contain."""
    path = Path(folder)
    if not path.is_dir():
        raise AnnotationError(f"{path}: folder of {what} not found; check the path")
    return path


def _listed(names: Sequence[object]) -> str:
    """The first few names."""
    shown = ", ".join(map(str, names[:5]))
    return f"{shown}, ..." if len(names) > 5 else shown or "nothing"
