"""The folder of an exported model, read without PyTorch and Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detrkit.checkpoints.loading import unreadable
from detrkit.common.errors import CheckpointError, SettingError
from detrkit.common.schema import JsonObject
from detrkit.common.screening import check_folder
from detrkit.engines.exported import ExportedModel, Manifest, open_exported
from detrkit.families import Family, family_of
from detrkit.models.ranges import check_ranges
from detrkit.processing.array_processor import ArrayImageProcessor

# What Transformers leaves out of a config.json.
_TWO_CLASSES = {"0": "LABEL_0", "1": "LABEL_1"}


class ExportedConfig:
    """The ``config.json`` of an exported model; its other entries are attributes too.

    Attributes:
        model_type: The family's.
        id2label: Label -> class name.
        num_channels: Channels of the images.
    """

    def __init__(self, values: JsonObject) -> None:
        """Takes over the content of the file.

        Raises:
            ValueError: An entry is missing or not of its kind.
        """
        self._values = dict(values)
        self.model_type = str(values.get("model_type"))
        names = values.get("id2label") or _TWO_CLASSES
        if not isinstance(names, Mapping):
            raise ValueError("id2label must map labels to class names")
        self.id2label: Mapping[int, str] = {int(label): str(name) for label, name in names.items()}
        if self.id2label.keys() != set(range(len(self.id2label))):
            raise ValueError("id2label must name the labels of the class head from 0 without gaps")
        check_ranges(values)
        self.num_channels = _count(values, "num_channels", 3)

    @property
    def object_queries(self) -> int:
        """How many object queries the model has."""
        two_stage = self._values.get("two_stage")
        return _count(self._values, "two_stage_num_proposals" if two_stage else "num_queries")

    @property
    def num_labels(self) -> int:
        """How many classes the model has."""
        return len(self.id2label)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return dict(self._values)

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"the exported model's config.json has no {name!r}")
        return values[name]


def _count(values: JsonObject, name: str, otherwise: int | None = None) -> int:
    value = values.get(name, otherwise)
    if not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class ExportedFiles:
    """The folder of an exported model, its configuration read and checked once.

    Attributes:
        name: The folder.
        manifest: Its ``engine.json``.
        family: The model's family.
        config: Its ``config.json``.
        contents: The configuration files by their names.
    """

    name: str
    manifest: Manifest
    family: Family
    config: ExportedConfig
    contents: Mapping[str, JsonObject]

    def check_queries(self, queries: int | None) -> None:
        """Raises a SettingError for another number of object queries than the graph has."""
        if queries not in (None, self.config.object_queries):
            raise SettingError(
                f"queries={queries} cannot be set for {self.name}: an exported model has the number of "
                f"queries that it was exported with, {self.config.object_queries}; export it again with "
                f"--queries {queries}"
            )

    def load_model(self, engine: str) -> ExportedModel:
        """The model, opened for an engine; see :func:`detrkit.engines.exported.open_exported`."""
        return open_exported(self.name, engine, self.config, self.manifest)

    def load_processor(self) -> ArrayImageProcessor:
        """The image processor.

        Raises:
            CheckpointError: It cannot be read.
        """
        values = self.contents.get("processor_config.json", {}).get("image_processor")
        values = values or self.contents.get("preprocessor_config.json")
        try:
            if values is None:
                raise CheckpointError(
                    "it is missing; export the model with its processor, or copy the file from its folder"
                )
            processor = ArrayImageProcessor(self.family.class_scores, **values)
            processor.check()
            return processor.fitted_to(self.config.num_channels)
        except Exception as error:  # a file from elsewhere can hold anything
            raise unreadable(self.name, None, "preprocessor_config.json", error) from error


def read_exported_files(name: str, manifest: Manifest) -> ExportedFiles:
    """Reads and checks the configuration of an exported model's folder.

    Raises:
        CheckpointError: There is no config.json, or one of another kind of model, or a file of the folder
            must not be read.
    """
    contents = check_folder(name)
    values = contents.get("config.json")
    if values is None:
        raise CheckpointError(f"{Path(name)} has no config.json; export the model again")
    family = family_of(values.get("model_type"), name)
    try:
        config = ExportedConfig(values)
        assert config.object_queries > 0
    except Exception as error:  # a file from elsewhere can hold anything
        raise unreadable(name, None, "config.json", error) from error
    return ExportedFiles(name=name, manifest=manifest, family=family, config=config, contents=contents)
