"""What is looked at before a checkpoint is opened: that it can be read safely, and in the memory there is.

Files of unknown origin can lie about their sizes, name files elsewhere, or ask for code to be run. These
checks read headers and lists only.
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

MAX_WEIGHTS_BYTES = 32 * 2**30
"""Most bytes of a checkpoint, wherever there is memory for more: a detector has less than one gibibyte."""

MAX_JSON_BYTES = 16 * 2**20
"""Most bytes of a configuration or an index."""

# Entries of a configuration that let Transformers or timm fetch or run something.
_CODE_ENTRIES = frozenset({"auto_map", "trust_remote_code", "code_revision", "custom_pipelines"})

_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def weights_limit() -> int:
    """Most bytes of tensors that are read: what this machine's memory holds, but no more than the limit."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not everywhere known
        return MAX_WEIGHTS_BYTES
    return min(MAX_WEIGHTS_BYTES, memory)


def check_weights_file(path: Path) -> int:
    """Refuses a file of weights that is none, or too large.

    A zip file (of ``torch.save``) must hold its entries as they are, which makes their sizes those in the
    file: packed ones could be a thousand times larger.

    Args:
        path: The file, which must exist.

    Returns:
        Its size in bytes.

    Raises:
        CheckpointError: It must not be read.
    """
    size = _regular_size(path)
    if size > weights_limit():
        raise CheckpointError(
            f"refused to read {path}: {size} bytes, more than the {weights_limit()} bytes that this machine "
            "has memory for or that a checkpoint may have"
        )
    if path.suffix != ".safetensors" and is_archive(path):
        _check_archive(path, size)
    return size


def is_archive(path: Path) -> bool:
    """Whether a file is a zip file, be it a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def check_folder(folder: str | os.PathLike[str]) -> dict[str, Mapping[str, Any]]:
    """Refuses a model's folder whose files must not be read.

    Returns:
        The content of each configuration in the folder by its file name.

    Raises:
        CheckpointError: A file is no regular file or too large, a configuration asks for code to be run, or
            an index names files outside of the folder.
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
            f"refused to read {folder}: {total} bytes of weights, more than the {limit} bytes that this "
            "machine has memory for or that a checkpoint may have"
        )
    return configs


def check_config(config: Any, where: str) -> None:
    """Refuses a configuration that asks for code to be run.

    Args:
        config: What the file holds.
        where: What errors call it.

    Raises:
        CheckpointError: It is no mapping, or asks for code.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} holds {type(config).__name__} where a mapping should be")
    if not isinstance(config.get("model_type", ""), (str, type(None))):
        raise CheckpointError(f"cannot read {where}: model_type must be text")
    for name, value in _entries(config):
        if name in _CODE_ENTRIES and value:
            raise CheckpointError(
                f"refused to read {where}: {name} asks for code from elsewhere, which is never run; if you "
                "trust the model, remove the entry"
            )
        if name.endswith("attn_implementation") and "/" in str(value):
            raise CheckpointError(
                f"refused to read {where}: {name} asks for a kernel from elsewhere ({str(value)[:100]!r}), "
                "which is never run; if you trust the model, remove the entry"
            )


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in the same folder."""
    # Both kinds of separators, whatever the system: a folder is moved between them.
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\:\0")


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All entries of a mapping and of those inside of it, however deep."""
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            yield from ((str(name), inner) for name, inner in value.items())
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _shards(index: Path) -> set[Path]:
    """The files that an index names, which must lie beside it."""
    content = read_model_json(index)
    names = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"cannot read {index}: it has no weight_map from tensors to files")
    for name in set(names.values()):
        if not is_plain_name(name):
            raise CheckpointError(
                f"refused to read {index}: it names the file {name[:200]!r}, and only files beside it are "
                "read"
            )
    return {index.parent / name for name in names.values()}


def _check_archive(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(
            f"cannot read {path}: it is damaged, cut short or not a checkpoint ({error})"
        ) from error
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            f"refused to read {path}: its entry {packed[0].filename[:100]!r} is compressed, to "
            f"{packed[0].compress_size} bytes of {packed[0].file_size}, which torch.save never does; save it "
            "again with torch.save"
        )
    if sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(f"refused to read {path}: its entries claim more bytes than the file has")


def read_model_json(path: Path, remedy: str = "save or fetch the model again") -> Any:
    """The content of a JSON file of a model; it must be a regular file of at most ``MAX_JSON_BYTES``.

    Args:
        path: The file.
        remedy: What an error suggests for an invalid file.

    Raises:
        CheckpointError: The file is not a regular file, is too large or is not JSON.
    """
    size = _regular_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"refused to read {path}: {size} bytes, more than {MAX_JSON_BYTES}")
    return read_json(path, CheckpointError, remedy)


def _regular_size(path: Path) -> int:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        # A pipe would be waited for, and a device may never end.
        raise CheckpointError(f"refused to read {path}: it is no regular file")
    return found.st_size


def _exists(path: Path) -> bool:
    """Whether something is there, a link that leads nowhere included: that is told when it is read."""
    return os.path.lexists(path)
