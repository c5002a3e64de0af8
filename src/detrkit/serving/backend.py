"""What answers requests: models in this process, or replicas on a cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from detrkit.common.schema import JsonObject
from detrkit.inference.requests import RequestOptions
from detrkit.serving.batching import Times
from detrkit.serving.uploads import Upload

Kind: TypeAlias = Literal["detect", "segment"]

OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "detect": ("threshold", "overlap", "max_objects"),
    "segment": ("threshold",),
}
"""What is asked for -> the options that it takes."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a request asks for.

    Attributes:
        kind: Whether to detect objects or to segment.
        model: Name of the model.
        upload: The image.
        options: Thresholds and the like.
    """

    kind: Kind
    model: str
    upload: Upload
    options: RequestOptions


@dataclass(frozen=True)
class Answer:
    """An answer to a task.

    Attributes:
        document: The content of the answer, without the model's name.
        times: Where the time was spent.
    """

    document: JsonObject
    times: Times = field(default_factory=Times)


class Backend(Protocol):
    """Loads models and answers tasks."""

    async def start(self) -> None:
        """Loads the models.

        Raises:
            DetrkitError: One cannot be loaded.
        """

    async def stop(self) -> None:
        """Lets go of the models; there are no more tasks."""

    async def answer(self, task: Task) -> Answer:
        """Answers a task for a model that is loaded.

        Raises:
            RequestError: It is refused.
        """

    def describe(self, model: str) -> JsonObject:
        """What ``GET /v1/model`` says of a model that is loaded."""
