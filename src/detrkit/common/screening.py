"""Checks before a checkpoint is opened: that it is safe to read and fits into memory.

Files of unknown origin can give false sizes, name files elsewhere, or ask for code to be run. These checks
read headers and lists only.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detrkit.common.errors import CheckpointError
from detrkit.common.files import read_json
from detrkit.common.schema import JsonObject

MAX_WEIGHTS_BYTES = 32 * 2**30
"""Maximum number of bytes of a checkpoint, however much memory there is: a detector has less than 1 GiB."""

MAX_JSON_BYTES = 16 * 2**20
"""Maximum number of bytes of a configuration or an index."""

# Configuration entries that make Transformers or timm fetch or run code.
_CODE_ENTRIES = frozenset({"auto_map", "trust_remote_code", "code_revision", "custom_pipelines"})

MOST_LAYERS = 512
"""Maximum number of layers of a network, in all its stages; the deepest that are in use have a third."""

_REMEDY = "save or fetch the model again"

DETECTION_CONFIG = "detection_config.json"
"""File beside a model that says how its scores become detections."""

_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def weights_limit() -> int:
    """Maximum number of bytes of tensors: this machine's memory, at most ``MAX_WEIGHTS_BYTES``."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not known on every system
        return MAX_WEIGHTS_BYTES
    return min(MAX_WEIGHTS_BYTES, memory)


def check_weights_file(path: Path) -> int:
    """Refuses a file that cannot contain weights or is too large.

    The entries of a zip file (from ``torch.save``) must not be compressed: uncompressed they could be a
    thousand times larger than the file.

    Args:
        path: The file, which must exist.

    Returns:
        Its size in bytes.

    Raises:
        CheckpointError: The file is not a regular file, is damaged or is too large.
    """
    size = _regular_size(path)
    if size > weights_limit():
        raise CheckpointError(
            f"refused to read {path}: {size} bytes exceed the limit of {weights_limit()} bytes (this "
            f"machine's memory, at most {MAX_WEIGHTS_BYTES}); use a smaller checkpoint"
        )
    if path.suffix != ".safetensors" and is_archive(path):
        _check_archive(path, size)
    return size


def is_archive(path: Path) -> bool:
    """Whether a file is a zip file, even a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def check_folder(folder: str | os.PathLike[str]) -> dict[str, JsonObject]:
    """Refuses a model folder that is not safe to read.

    Returns:
        The content of each configuration in the folder by its file name.

    Raises:
        CheckpointError: A file is not a regular file or too large, a configuration asks for code to be run,
            or an index names files outside the folder.
    """
    folder = Path(folder)
    configs = {name: read_model_json(folder / name) for name in _CONFIGS if _exists(folder / name)}
    for name, config in configs.items():
        check_config(config, str(folder / name))
    weights = {folder / name for name in _WEIGHTS}
    for name in _WEIGHTS:
        if _exists(index := folder / f"{name}.index.json"):
            weights |= _shards(index)
    limit = weights_limit()
    total = sum(check_weights_file(path) for path in sorted(weights) if _exists(path))
    if total > limit:
        raise CheckpointError(
            f"refused to read {folder}: {total} bytes of weights exceed the limit of {limit} bytes (this "
            f"machine's memory, at most {MAX_WEIGHTS_BYTES}); use a smaller checkpoint"
        )
    return configs


def check_config(config: object, where: str) -> None:
    """Refuses a configuration that asks for code to be run, or for another file in its place.

    Args:
        config: The content of the file.
        where: The file's name in errors.

    Raises:
        CheckpointError: ``config`` is not a mapping, or asks for code or for another file.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} must contain a JSON object, not {type(config).__name__}; {_REMEDY}")
    if not isinstance(config.get("model_type", ""), (str, type(None))):
        raise CheckpointError(f"cannot read {where}: model_type must be a string; correct it")
    for name, value in _entries(config):
        if name in _CODE_ENTRIES and value:
            raise CheckpointError(
                f"refused to read {where}: {name} asks for code from elsewhere, which detrkit never runs; if "
                "you trust the model, remove the entry"
            )
        if name == "configuration_files" and value:
            # Transformers would read one of these in place of the file that was checked.
            raise CheckpointError(
                f"refused to read {where}: configuration_files names other files to be read in its place; "
                "save the one that you want as config.json, without this entry"
            )
        if is_too_deep(name, value):
            raise CheckpointError(
                f"refused to read {where}: {name} asks for more than {MOST_LAYERS} layers, which would take "
                "minutes and memory; correct it"
            )
        if name.endswith("attn_implementation") and "/" in str(value):
            raise CheckpointError(
                f"refused to read {where}: {name} asks for a kernel from elsewhere ({str(value)[:100]!r}), "
                "which detrkit never runs; if you trust the model, remove the entry"
            )


def is_too_deep(name: str, value: object) -> bool:
    """Whether an entry of a configuration, of the network or its backbone, asks for too many layers."""
    is_depth = name in ("depths", "depth") or name.endswith(("layers", "blocks", "repeats"))
    return is_depth and _total(value) > MOST_LAYERS


def _total(value: object) -> float:
    """The sum of all numbers in a value, however deep in lists; of a number itself, the number."""
    waiting, total = [value], 0.0
    while waiting:
        found = waiting.pop()
        if isinstance(found, (list, tuple)):
            waiting += found
        elif isinstance(found, (int, float)) and not isinstance(found, bool):
            total += min(found, MOST_LAYERS + 1)
    return total


def is_plain_name(name: str) -> bool:
    """Whether a name is a plain file name, without a folder."""
    # Separators of every system, because folders are moved between systems.
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\:\0")


def _entries(config: JsonObject) -> Iterator[tuple[str, object]]:
    """All entries of a mapping and of the mappings inside it, however deep."""
    waiting: list[object] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            yield from ((str(name), inner) for name, inner in value.items())
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _shards(index: Path) -> set[Path]:
    """The files that an index names, which must be in the same folder."""
    content = read_model_json(index)
    names = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"cannot read {index}: it has no weight_map from tensors to files; {_REMEDY}")
    for name in set(names.values()):
        if not is_plain_name(name):
            raise CheckpointError(
                f"refused to read {index}: it names the file {name[:200]!r}; files must be in the same folder"
            )
    return {index.parent / name for name in names.values()}


def _check_archive(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(
            f"cannot read {path}: damaged, truncated or not a checkpoint ({error}); fetch it again"
        ) from error
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            f"refused to read {path}: its entry {packed[0].filename[:100]!r} is compressed from "
            f"{packed[0].file_size} to {packed[0].compress_size} bytes; save it again with torch.save"
        )
    if sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(
            f"refused to read {path}: its entries claim more bytes than the file has; fetch it again"
        )


def read_model_json(path: Path, remedy: str = _REMEDY) -> Any:
    """The content of a JSON file of a model; it must be a regular file of at most ``MAX_JSON_BYTES``.

    Args:
        path: The file.
        remedy: What an error suggests for an invalid file.

    Raises:
        CheckpointError: The file is not a regular file, is too large or is not JSON.
    """
    size = _regular_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"refused to read {path}: {size} bytes exceed the limit of {MAX_JSON_BYTES} for JSON files"
        )
    return read_json(path, CheckpointError, remedy)


def _regular_size(path: Path) -> int:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        # Reading a pipe would wait for a writer, and a device may never end.
        raise CheckpointError(f"refused to read {path}: it is not a regular file; copy it to one")
    return found.st_size


def _exists(path: Path) -> bool:
    """Whether a path exists; a broken link does, and is reported when it is read."""
    return os.path.lexists(path)
