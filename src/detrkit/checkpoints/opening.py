"""A model of any kind with its image processor: exported, or one of PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detrkit.engines.exported import Manifest
    from detrkit.engines.interface import RunnableModel
    from detrkit.processing.array_processor import ArrayImageProcessor
    from detrkit.processing.image_processor import DetrImageProcessorBase


def open_model(
    name: str, revision: str | None, engine: str, manifest: Manifest | None, queries: int | None = None
) -> tuple[RunnableModel, DetrImageProcessorBase | ArrayImageProcessor]:
    """The model of a Hub id or folder, and its image processor.

    Args:
        name: The Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        engine: What will run the model.
        manifest: That of an exported model's folder; None for any other.
        queries: Object queries that a two-stage model is to have; None for those of its configuration.

    Raises:
        CheckpointError: One of them cannot be found, read or used.
        MissingExtraError: They need packages that are not installed.
        SettingError: The model cannot have so many queries.
    """
    if manifest is not None:
        from detrkit.checkpoints.exported import read_exported_files

        exported = read_exported_files(name, manifest)
        exported.check_queries(queries)
        return exported.load_model(engine), exported.load_processor()
    from detrkit.checkpoints.loading import load_pretrained

    return load_pretrained(name, revision, queries)


def open_processor(name: str, revision: str | None) -> DetrImageProcessorBase | ArrayImageProcessor:
    """The image processor alone of a Hub id or folder.

    Raises:
        CheckpointError: It cannot be found, read or used.
        MissingExtraError: It needs packages that are not installed.
    """
    from detrkit.checkpoints.loading import choose_engine, read_model_files

    manifest, _ = choose_engine(name, None)
    if manifest is not None:
        from detrkit.checkpoints.exported import read_exported_files

        return read_exported_files(name, manifest).load_processor()
    return read_model_files(name, revision).load_processor()
