"""Where results come from: which weights a model's name stands for, and what runs them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from detrkit import __version__
from detrkit.checkpoints.registry import resolve_model
from detrkit.common.files import content_hash
from detrkit.common.hub_access import cache_if_hub_is_away
from detrkit.common.screening import read_model_json
from detrkit.models.adapters import base_of_adapter

_CONFIGS = (
    *("config.json", "preprocessor_config.json", "processor_config.json", "detection_config.json"),
    *("engine.json", "adapter_config.json"),
)
_WEIGHTS = frozenset({".safetensors", ".bin", ".onnx", ".data", ".xml"})


def run_info(
    command: str, model: str | None, *, engine: str | None, revision: str | None, **settings: Any
) -> dict[str, Any]:
    """The ``info`` of a document: version, model, settings and date.

    Args:
        command: Which command it is.
        model: The model as the user named it; None if none is run.
        engine: The engine that the user chose; None for the one that the model implies.
        revision: Branch, tag or commit on the Hub.
        settings: What else the results depend on.
    """
    about = {
        "tool": f"detrkit {command}",
        "version": __version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if model is None:
        return {**about, **settings}
    name = resolve_model(model)
    folder = Path(name) if Path(name).is_dir() else None
    if engine is None:
        manifest = None if folder is None else folder / "engine.json"
        content = read_model_json(manifest) if manifest is not None and manifest.exists() else {}
        engine = content.get("engine", "torch") if isinstance(content, dict) else "torch"
    return {**about, "model": model, **weights_of(model, revision), "engine": engine, **settings}


def model_files(model: str | None) -> list[Path]:
    """The weights and configurations in the folder of a model, and of the one that an adapter is added to.

    None of a model on the Hub.
    """
    folder = Path(resolve_model(model)) if model is not None else None
    if folder is None or not folder.is_dir():
        return []
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    named = (*_CONFIGS, "model.safetensors.index.json", "pytorch_model.bin.index.json")
    own = [path for path in files if path.suffix in _WEIGHTS or path.name in named]
    return own + (model_files(base) if (base := base_of_adapter(folder)) is not None else [])


def weights_of(model: str, revision: str | None = None) -> dict[str, str | None]:
    """What tells the weights of a model from those of others.

    Args:
        model: The model as the user named it.
        revision: Branch, tag or commit on the Hub.

    Returns:
        ``weights``, a hash of the files of a folder, or ``revision``, the commit on the Hub.
    """
    name = resolve_model(model)
    files = model_files(name)
    return {"weights": _hash_of(files)} if files else {"revision": _commit(name, revision)}


def _hash_of(files: Sequence[Path]) -> str:
    lines = (f"{path.name} {content_hash(path)}\n" for path in files)
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a branch or tag on the Hub stands for; as it was given if the Hub does not say."""
    from huggingface_hub import hf_hub_download

    try:
        with cache_if_hub_is_away(name):
            return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except Exception:  # loading the model will say what is wrong
        return revision
