"""Models and their image processors from a Hub id or a folder; errors name what is wrong with it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.checkpoints.registry import is_released, resolve_model
from detrkit.common.errors import CheckpointError, DetrkitError, MissingExtraError, SettingError
from detrkit.common.hub_access import cache_if_hub_is_away
from detrkit.common.quiet import no_warnings
from detrkit.common.schema import JsonObject
from detrkit.common.screening import check_config, check_folder, read_model_json
from detrkit.common.text import first_line
from detrkit.common.without_torch import require_torch
from detrkit.families import Family, family_of, has_masks
from detrkit.models.adapters import CONFIG, add_adapter, base_of_adapter, model_of
from detrkit.results.detection_config import DetectionConfig

if TYPE_CHECKING:
    from detrkit.engines.exported import Manifest
    from detrkit.models.configuration import DetrFamilyConfig
    from detrkit.models.detection import ModelWithHeads
    from detrkit.processing.image_processor import DetrImageProcessorBase


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model's folder or Hub repository, its configuration read and checked once.

    Attributes:
        name: A Hub id or a folder.
        revision: Branch, tag or commit on the Hub.
        has_masks: Whether it is a segmentation model's.
        contents: The configuration files of a folder by their names; None for a Hub id.
        adapter: Folder or Hub id of an adapter that is added to the model.
        adapter_revision: Branch, tag or commit of the adapter.
    """

    name: str
    revision: str | None
    family: Family
    config: DetrFamilyConfig
    has_masks: bool
    contents: Mapping[str, JsonObject] | None
    adapter: str | None = None
    adapter_revision: str | None = None

    @property
    def model_class(self) -> str:
        """Name of the model's class."""
        family = self.family
        return family.segmenter if self.has_masks and family.segmenter else family.detector

    def load_model(self) -> ModelWithHeads:
        """The model.

        Raises:
            CheckpointError: The weights cannot be found, read or used.
        """
        name, revision = self.name, self.revision
        try:
            # The warning is no help to a user.
            with cache_if_hub_is_away(name), no_warnings("Detected pickle protocol"):
                model, report = self.family.load(self.model_class).from_pretrained(
                    name,
                    config=self.config,
                    revision=revision,
                    output_loading_info=True,
                    folder_is_checked=self.contents is not None,
                )
        except MissingExtraError:
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"refused to read the weights of {_where(name, revision)}: they are a pickle of more than "
                "tensors, and pickled code is never run; save them as model.safetensors"
            ) from error
        except Exception as error:  # a file from elsewhere can raise anything
            raise unreadable(name, revision, "weights", error) from error
        missing = sorted(report["missing_keys"])
        if missing:
            # Transformers would fill these with random numbers and continue.
            raise CheckpointError(
                f"the weights of {_where(name, revision)} lack {len(missing)} of the model's tensors, such "
                f"as {missing[0]}; {_remedy(name)}"
            )
        if self.adapter is not None:
            add_adapter(model, self.adapter, self.adapter_revision)
        return model

    def load_processor(self) -> DetrImageProcessorBase:
        """The image processor.

        Raises:
            CheckpointError: It cannot be read.
        """
        contents = self.contents or {}
        values = contents.get("processor_config.json", {}).get("image_processor")
        values = values or contents.get("preprocessor_config.json")
        processor_class = self.family.load(self.family.processor)
        if values is None and is_folder(self.name) and not _has_processor(Path(self.name)):
            raise CheckpointError(
                f"{self.name} has no preprocessor_config.json, which describes the image preprocessing; save "
                f"the model's image processor there, too: processor.save_pretrained({self.name!r})"
            )
        try:
            if values is None:
                with cache_if_hub_is_away(self.name):
                    processor = processor_class.from_pretrained(self.name, revision=self.revision)
            else:
                processor = processor_class.from_dict(dict(values))
            processor.check()
            processor = processor.fitted_to(self.config.num_channels)
        except Exception as error:  # a file from elsewhere can raise anything
            raise unreadable(self.name, self.revision, "preprocessor_config.json", error) from error
        return processor


def _has_processor(folder: Path) -> bool:
    """Whether a folder has one of the files in which Transformers stores an image processor."""
    return any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json"))


def read_detection_config(name: str, revision: str | None = None) -> DetectionConfig:
    """The detection settings of a Hub id or folder; the defaults where it has none.

    The Hub is not asked for those of a released checkpoint, which has none.

    Raises:
        CheckpointError: They cannot be read or used.
    """
    if is_released(name):
        return DetectionConfig()
    with cache_if_hub_is_away(name):
        return DetectionConfig.from_pretrained(name, revision=revision)


def read_model_files(name: str, revision: str | None = None, queries: int | None = None) -> ModelFiles:
    """Reads and checks the configuration of a Hub id or folder; for an adapter's, that of its model.

    Args:
        name: The Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        queries: Object queries that a two-stage model is to have; None for those of its configuration.

    Raises:
        SettingError: The model cannot have so many queries.
        CheckpointError: There is no config.json, or one of another kind of model, or a file of the folder
            must not be read.
    """
    contents = check_folder(name) if is_folder(name) else None
    base = base_of_adapter(name) if contents is not None else None
    if base is None:
        try:
            values = (contents or {}).get("config.json") or _fetch_config(name, revision)
        except CheckpointError:
            base = None if contents is not None else _base_on_hub(name, revision)
            if base is None:
                raise
    if base is not None:
        files = read_model_files(resolve_model(base), queries=queries)
        if files.adapter is not None:
            raise CheckpointError(
                f"{_where(name, revision)} is an adapter of the adapter {base}; merge that one into "
                "its model first"
            )
        known = {**(files.contents or {}), **(contents or {})}
        return replace(files, adapter=name, adapter_revision=revision, contents=known or None)
    family = family_of(values.get("model_type"), name)
    try:
        config = family.load(family.config).from_dict(values)
    except Exception as error:  # a file from elsewhere can raise anything
        raise unreadable(name, revision, "config.json", error) from error
    config.name_or_path = name
    if queries is not None and queries != config.object_queries:
        config.set_object_queries(queries)
    masks = has_masks(values)
    return ModelFiles(
        name=name,
        revision=revision,
        family=family,
        config=config,
        has_masks=_has_mask_head(name, revision) if masks is None else masks,
        contents=contents,
    )


def _fetch_config(name: str, revision: str | None) -> JsonObject:
    from transformers import PretrainedConfig

    try:
        with cache_if_hub_is_away(name):
            config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(name, revision, "config.json", error) from error
    if not config:
        raise CheckpointError(f"{_where(name, revision)} has no config.json; {_remedy(name)}")
    check_config(config, f"config.json of {_where(name, revision)}")
    return config


def _base_on_hub(name: str, revision: str | None) -> str | None:
    """The model's name, if a repository without config.json holds an adapter."""
    from transformers.utils import cached_file

    try:
        with cache_if_hub_is_away(name):
            path = cached_file(name, CONFIG, revision=revision)
    except OSError:
        return None
    return model_of(read_model_json(Path(path)), f"{CONFIG} of {_where(name, revision)}")


def _has_mask_head(name: str, revision: str | None) -> bool:
    """Whether the weights are those of a segmentation model."""
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    try:
        with cache_if_hub_is_away(name):
            path = cached_file(name, "model.safetensors", revision=revision)
        with safe_open(path, framework="pt") as file:
            return any(key.startswith("mask_head.") for key in file.keys())  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):  # reported when the weights are loaded
        return False


def is_folder(name: str) -> bool:
    """Whether a model's name is that of a folder rather than a Hub id."""
    return os.path.isdir(name)  # noqa: PTH112 - a Hub id is not a path


def is_exported(name: str) -> bool:
    """Whether a model's name is that of a folder with an exported model."""
    from detrkit.engines.exported import MANIFEST

    return is_folder(name) and os.path.lexists(Path(name) / MANIFEST)


def manifest_of(name: str) -> Manifest | None:
    """The manifest of a folder with an exported model; None for any other model."""
    if not is_folder(name):
        return None
    from detrkit.engines.exported import read_manifest

    return read_manifest(name)


def choose_engine(name: str, engine: str | None) -> tuple[Manifest | None, str]:
    """The manifest of an exported model's folder, and the engine: by default that it was exported for.

    Raises:
        MissingTorchError: Any other model needs PyTorch, which is not installed.
    """
    manifest = manifest_of(name)
    if manifest is None:
        require_torch_for(name)
    return manifest, engine or (manifest.engine if manifest else "torch")


def require_torch_for(name: str) -> None:
    """Raises a MissingTorchError for a model that is not an exported one, where PyTorch is not installed."""
    require_torch(f"{name} is not the folder of an exported model; running it")


def load_pretrained(
    name: str, revision: str | None, queries: int | None = None
) -> tuple[ModelWithHeads, DetrImageProcessorBase]:
    """The model of a Hub id or folder, as its family's class, and its image processor.

    Args:
        name: The Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        queries: Object queries that a two-stage model is to have; None for those of its configuration.

    Raises:
        CheckpointError: One of them cannot be found, read or used.
        SettingError: The model cannot have so many queries.
    """
    files = read_model_files(name, revision, queries)
    model, processor = files.load_model(), files.load_processor()
    if queries is not None:
        check_positions(model, processor, queries)
    return model, processor


def check_positions(model: ModelWithHeads, processor: DetrImageProcessorBase, queries: int) -> None:
    """Raises a SettingError for more queries than the largest images of a model have positions to propose.

    Of a smaller image all positions are proposed.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from detrkit.models.layers.backbone import ConvEncoder

    for module in model.modules():
        if isinstance(module, ConvEncoder):
            module.find_sides()  # by trials, which need arithmetic
    size = dict(processor.size) if processor.do_resize and processor.size else {}
    for names in (("height", "width"), ("shortest_edge", "longest_edge"), ("max_height", "max_width")):
        if all(size.get(name) for name in names):
            height, width = size[names[0]], size[names[1]]
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # shapes alone, no arithmetic
                outputs = model(torch.empty(1, model.config.num_channels, height, width))
            proposed = outputs.get("enc_outputs_class")
            positions = queries if proposed is None else proposed.shape[1]
            if queries > positions:
                raise SettingError(
                    f"queries={queries} is more than the {positions} positions that the model has to propose "
                    f"in an image of {width}x{height} pixels, the size that its images are resized to; ask "
                    f"for at most {positions}"
                )
            return


def _where(name: str, revision: str | None) -> str:
    return f"{name} (revision {revision})" if revision else name


def _remedy(name: str) -> str:
    if is_folder(name):
        return "save or convert the model again: detrkit convert CHECKPOINT OUTPUT --model NAME"
    return (
        "check the name and the revision, your network and, for a private model, your login (hf auth login)"
    )


def unreadable(name: str, revision: str | None, part: str, error: Exception) -> CheckpointError:
    """One line that names the model and the part; the libraries' own messages run over many."""
    remedy = "" if isinstance(error, DetrkitError) else f"; {_remedy(name)}"  # our own errors name theirs
    return CheckpointError(f"cannot read the {part} of {_where(name, revision)}: {first_line(error)}{remedy}")
