"""The body of a request: how much of it is read, and the image's bytes in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request

from detrkit.common.errors import ImageError
from detrkit.inference.requests import image_bytes
from detrkit.serving.problems import ClientGoneError, RequestError

_Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]

FIELD = "image"

# What curl and Python's urllib call the bytes that they are given, if nobody tells them otherwise.
_PLAIN_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
ACCEPTED = "an image type, application/octet-stream, application/json or multipart/form-data"

# The frame around an image in a form or a JSON object takes no more than this.
_FRAME = 2**16


@dataclass(frozen=True)
class Upload:
    """An image as a request holds it, not yet decoded.

    Attributes:
        content: The bytes of the image file, or of the JSON document around it.
        form: Which of them.
    """

    content: bytes
    form: Literal["bytes", "json"] = "bytes"

    def image(self, max_bytes: int | None) -> bytes:
        """The bytes of the image file. To be called in a thread, as decoding takes time.

        Args:
            max_bytes: The most bytes that it may have.

        Raises:
            RequestError: There is no image, or it is too large.
            ImageError: It is not valid base64.
        """
        content = self._content_of_json() if self.form == "json" else self.content
        if not content:
            raise RequestError(400, "the image is empty; send the bytes of an image file")
        if max_bytes is not None and len(content) > max_bytes:
            raise too_large(max_bytes)
        return content

    def _content_of_json(self) -> bytes:
        try:
            document = json.loads(self.content)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"the body is not valid JSON: {error}") from error
        if not isinstance(document, dict) or FIELD not in document:
            raise RequestError(400, 'the JSON must be an object like {"image": "<base64>"}')
        unknown = [name for name in document if name != FIELD]
        if unknown:
            raise RequestError(
                400, f'unknown entry {unknown[0][:100]!r} besides "image"; pass options in the query'
            )
        return image_bytes(document[FIELD], FIELD)


def too_large(limit: int) -> RequestError:
    """The error for an image of too many bytes."""
    return RequestError(413, f"the image has more than {limit} bytes; shrink it, or compress it more")


async def read_upload(request: Request, max_bytes: int | None, patience: float) -> Upload:
    """Reads the body of a request, and no more of it than an image may have.

    Args:
        request: The request.
        max_bytes: The most bytes of an image.
        patience: Seconds within which all of it must arrive.

    Raises:
        RequestError: It is too large, too slow, empty or of another type.
        ClientGoneError: The client closed the connection.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (*_PLAIN_TYPES, "application/json", "multipart/form-data") and not kind.startswith(
        "image/"
    ):
        raise RequestError(415, f"the content type must be {ACCEPTED}, not {kind[:100]!r}")
    most = max_bytes
    if max_bytes is not None and kind == "application/json":
        most = max_bytes * 4 // 3 + _FRAME
    elif max_bytes is not None and kind == "multipart/form-data":
        most = max_bytes + _FRAME
    length = request.headers.get("content-length", "")
    if max_bytes is not None and most is not None and length.isdecimal() and int(length) > most:
        raise too_large(max_bytes)
    limited = Request(request.scope, _limited(request.receive, most, max_bytes))
    try:
        read = _read_form(limited, max_bytes) if kind == "multipart/form-data" else limited.body()
        content = await asyncio.wait_for(read, patience)
    except asyncio.TimeoutError as error:
        raise RequestError(408, f"the request did not arrive within {patience:g} seconds") from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    if isinstance(content, Upload):
        return content
    if not content:
        raise RequestError(400, "the body is empty; send the bytes of an image file")
    return Upload(content, "json" if kind == "application/json" else "bytes")


def _limited(receive: _Receive, most: int | None, max_bytes: int | None) -> _Receive:
    """The parts of a body, until there are too many bytes."""
    taken = 0

    async def receive_limited() -> MutableMapping[str, Any]:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if most is not None and max_bytes is not None and taken > most:
            raise too_large(max_bytes)
        return message

    return receive_limited


async def _read_form(request: Request, max_bytes: int | None) -> Upload:
    largest = 2**63 if max_bytes is None else max_bytes * 4 // 3 + _FRAME
    try:
        form = await request.form(max_files=2, max_fields=2, max_part_size=largest)
    except HTTPException as error:
        raise RequestError(400, f"the form cannot be read: {error.detail}") from error
    except (MultiPartException, FormParserError) as error:  # outside an application, and by Starlette 1.3
        raise RequestError(400, f"the form cannot be read: {error}") from error
    try:
        unknown = [name for name in form if name != FIELD]
        if unknown:
            raise RequestError(
                400, f'unknown field {unknown[0][:100]!r} besides "image"; pass options in the query'
            )
        values = form.getlist(FIELD)
        if len(values) != 1:
            raise RequestError(400, f'the form must have one field "image", not {len(values)}')
        if isinstance(values[0], UploadFile):
            return Upload(await values[0].read())
        try:
            return Upload(await asyncio.to_thread(image_bytes, values[0], FIELD))
        except ImageError as error:
            raise RequestError(400, str(error)) from error
    finally:
        await form.close()
