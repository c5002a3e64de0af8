"""Adapters of PEFT: folders and Hub repositories that hold what is added to another model's layers."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from detrkit.common.errors import CheckpointError
from detrkit.common.schema import JsonObject
from detrkit.common.screening import check_config, check_weights_file, read_model_json
from detrkit.common.text import first_line

CONFIG = "adapter_config.json"


def base_of_adapter(folder: str | os.PathLike[str]) -> str | None:
    """The name of the model that a folder's adapter is added to.

    None for anything else, and for a folder that also holds the model: Transformers reads both.

    Raises:
        CheckpointError: The adapter is not safe to read, does not name its model, or PEFT is not installed.
    """
    path = Path(folder) / CONFIG
    if not os.path.lexists(path):
        return None
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if os.path.lexists(path.parent / name):
            check_weights_file(path.parent / name)
    base = model_of(read_model_json(path), str(path))
    return None if Path(base).resolve() == path.parent.resolve() else base


def model_of(adapter: JsonObject, where: str) -> str:
    """The name of the model in an adapter's configuration.

    Args:
        adapter: The content of adapter_config.json.
        where: The file's name in errors.

    Raises:
        CheckpointError: As for :func:`base_of_adapter`.
    """
    check_config(adapter, where)
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{where} belongs to an adapter and does not name its model; load the model, add the adapter "
            f"with "
            "model.load_adapter, and pass the model to Detector"
        )
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            f"{where} belongs to an adapter for the model {base[:200]}, which needs PEFT: pip install peft"
        )
    return base


def add_adapter(model: Any, adapter: str | os.PathLike[str], revision: str | None = None) -> None:
    """Adds an adapter to a model, in place.

    Raises:
        CheckpointError: The adapter cannot be read, or does not fit the model.
    """
    try:
        options = {"adapter_kwargs": {"revision": revision}} if revision else {}
        report = model.load_adapter(os.fspath(adapter), **options)
    except Exception as error:  # a file from elsewhere can raise anything
        raise CheckpointError(f"cannot read the adapter {os.fspath(adapter)}: {first_line(error)}") from error
    wrong = [*report.missing_keys, *report.unexpected_keys, *(key for key, *_ in report.mismatched_keys)]
    if wrong:
        raise CheckpointError(
            f"the adapter {os.fspath(adapter)} does not fit its model: {len(wrong)} tensors differ, such as "
            f"{min(wrong)}; name the model that it was trained on in {CONFIG}"
        )
