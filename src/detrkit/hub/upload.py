"""Publishing a model on the Hugging Face Hub: weights, image processor and card in one commit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.common.errors import CheckpointError, DetrkitError, SettingError
from detrkit.common.screening import check_folder
from detrkit.common.text import first_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import BaseImageProcessor, PreTrainedModel

CHECKPOINTS = "checkpoints"
"""Sub-folder of a training run that is not uploaded."""

HANDLER = {
    "handler.py": '"""What an Inference Endpoint loads: detrkit\'s detector."""\n\n'
    "from detrkit.endpoint import EndpointHandler as EndpointHandler\n",
    "requirements.txt": "detrkit\n",
}
"""File name -> content of what Inference Endpoints need beside a model."""


def push_to_hub(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    processor: BaseImageProcessor | None = None,
    private: bool | None = None,
    handler: bool = False,
    message: str = "Upload a detrkit model",
    token: str | None = None,
) -> str:
    """Uploads a model, its image processor and its card to the Hub, in one commit.

    Creates the repository if it does not exist. Other files in it are kept.

    Args:
        model: A model folder, of which everything but hidden files and training checkpoints is uploaded; or a
            model, which needs ``processor``. A folder without README.md gets a card.
        repo_id: "name" (under your account) or "organisation/name"; by default the folder's name.
        processor: Image processor of a model that is not a folder.
        private: Whether a new repository is private; by default as your account or organisation has it.
        handler: Upload ``handler.py`` and ``requirements.txt`` for Inference Endpoints as well (see
            :mod:`detrkit.endpoint`).
        message: Commit message.
        token: Token with write access; by default that of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        Address of the repository.

    Raises:
        CheckpointError: The folder contains no model of detrkit.
        SettingError: The arguments contradict each other, or the Hub does not accept the name.
        DetrkitError: You are not logged in, may not write there, or the Hub cannot be reached.
    """
    check_login(token)
    if isinstance(model, (str, os.PathLike)):
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} is not a model folder: it has no config.json")
        return _upload(folder, repo_id or folder.resolve().name, private, handler, message, token)
    if not hasattr(model, "save_pretrained"):
        raise SettingError(
            "push_to_hub takes a model folder, or a model with its processor, not a "
            f"{type(model).__name__}; of a Detector give the folder that it was loaded from"
        )
    if processor is None or repo_id is None:
        missing = (
            "processor=..., its image processor" if processor is None else "repo_id=..., a name on the Hub"
        )
        raise SettingError(f"push_to_hub of a model needs {missing}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return _upload(folder, repo_id, private, handler, message, token)


def check_login(token: str | None = None) -> None:
    """Checks that a token is available, so that a long run does not fail at its end.

    Raises:
        DetrkitError: No token is available.
    """
    from huggingface_hub import get_token

    if not (token or get_token()):
        raise DetrkitError(
            "you are not logged in to the Hub: run hf auth login, or set HF_TOKEN to a token that may write"
        )


def _upload(
    folder: Path, repo_id: str, private: bool | None, handler: bool, message: str, token: str | None
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    from detrkit.hub.cards import plain_card

    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    if "README.md" not in files:
        files["README.md"] = plain_card(check_folder(folder)["config.json"], repo_id).encode()
    if handler:
        files |= {name: text.encode() for name, text in HANDLER.items() if name not in files}
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()
    ]
    api = HfApi(token=token)
    with _one_line(repo_id, api.endpoint):
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repository.repo_id, operations, commit_message=message)
    return str(repository)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] != CHECKPOINTS and not any(part.startswith(".") for part in parts):
            yield path


@contextmanager
def _one_line(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turns errors of the Hub's client into one line with a remedy."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        yield
    except HFValidationError as error:
        raise SettingError(f"{repo_id!r} is not a valid repository name: {first_line(error)}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HTTPError):
            cause = cause.__cause__  # an upload of a large file wraps what went wrong
        if isinstance(cause, HfHubHTTPError):
            raise DetrkitError(_refusal(repo_id, cause)) from error
        if isinstance(cause, HTTPError) or isinstance(error, ConnectionError):
            raise DetrkitError(
                f"cannot reach the Hub at {endpoint} ({first_line(error)}); check your network, and that "
                "HF_HUB_OFFLINE is not set"
            ) from error
        raise DetrkitError(f"could not upload to {repo_id}: {first_line(error)}") from error


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return "the Hub rejected your token (401): log in again with hf auth login, or correct HF_TOKEN"
    if status == 403:
        return (
            f"your token may not write to {repo_id} (403): use a token with write access, and a name under "
            "your account or an organisation that you belong to"
        )
    said = getattr(error, "server_message", None) or first_line(error)
    return f"the Hub refused {repo_id} ({status}): {said}"
