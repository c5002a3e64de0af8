"""The description of the service for programs: OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Mapping

from detrkit import __version__
from detrkit.common.schema import JsonObject

_NUMBER, _INTEGER, _TEXT = {"type": "number"}, {"type": "integer"}, {"type": "string"}


def document(models: Mapping[str, str], max_bytes: int | None) -> JsonObject:
    """The content of ``/openapi.json``.

    Args:
        models: The models by name, the first one is the default.
        max_bytes: The most bytes of an image.
    """
    names = list(models)
    model = _parameter("model", {"type": "string", "enum": names, "default": names[0]}, "Which model.")
    threshold = _parameter(
        "threshold",
        {"type": "number", "minimum": 0, "maximum": 1},
        "Only objects or segments with a higher score; by default as chosen for the model.",
    )
    overlap = _parameter(
        "overlap",
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "IoU above which the lower-scored of two boxes is dropped; by default as chosen for the model.",
    )
    most = _parameter(
        "max_objects",
        {"type": "integer", "minimum": 1},
        "The most objects of an image; by default as chosen for the model.",
    )
    body = _body(max_bytes)
    return {
        "openapi": "3.1.0",
        "info": {"title": "detrkit", "version": __version__, "description": "Objects in images."},
        "paths": {
            "/v1/detect": {
                "post": {
                    "summary": "Find the objects in an image.",
                    "parameters": [model, threshold, overlap, most],
                    "requestBody": body,
                    "responses": _responses("Detections", _ERRORS),
                }
            },
            "/v1/segment": {
                "post": {
                    "summary": "Assign every pixel to an object or background class.",
                    "parameters": [model, threshold],
                    "requestBody": body,
                    "responses": _responses("Segmentation", _ERRORS),
                }
            },
            "/v1/model": {
                "get": {
                    "summary": "Classes and limits of a model.",
                    "parameters": [model],
                    "responses": _responses("Model", ("400", "503")),
                }
            },
            "/health/live": {"get": {"summary": "The process runs.", "responses": _responses("Status", ())}},
            "/health/ready": {
                "get": {"summary": "Requests are accepted.", "responses": _responses("Status", ("503",))}
            },
            "/metrics": {
                "get": {
                    "summary": "Counters for Prometheus.",
                    "responses": {"200": {"description": "OK", "content": {"text/plain": {"schema": _TEXT}}}},
                }
            },
            "/openapi.json": {
                "get": {
                    "summary": "This document.",
                    "responses": {
                        "200": {"description": "OK", "content": _json({"type": "object"})},
                    },
                }
            },
        },
        "components": {"schemas": _schemas()},
    }


_REASONS = {
    "400": "The image or an option is not usable.",
    "408": "The request took too long to arrive.",
    "413": "The image has too many bytes or pixels.",
    "415": "The content type is none of those.",
    "429": "The queue is full; Retry-After says when to try again.",
    "503": "The server is loading or stopping.",
}
_ERRORS = tuple(_REASONS)


def _json(schema: JsonObject) -> JsonObject:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> JsonObject:
    return {"$ref": f"#/components/schemas/{name}"}


def _parameter(name: str, schema: JsonObject, description: str) -> JsonObject:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


def _responses(schema: str, errors: tuple[str, ...]) -> JsonObject:
    refused = {
        status: {"description": _REASONS[status], "content": _json(_ref("Error"))} for status in errors
    }
    return {"200": {"description": "OK", "content": _json(_ref(schema))}, **refused}


def _body(max_bytes: int | None) -> JsonObject:
    most = "" if max_bytes is None else f", at most {max_bytes} bytes"
    binary = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
    base64 = {"type": "string", "contentEncoding": "base64"}
    return {
        "required": True,
        "description": f"An image file{most}.",
        "content": {
            "image/*": binary,
            "application/octet-stream": binary,
            "application/json": {"schema": _object({"image": base64})},
            "multipart/form-data": {"schema": _object({"image": {"type": "string", "format": "binary"}})},
        },
    }


def _object(properties: JsonObject) -> JsonObject:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: JsonObject) -> JsonObject:
    return {"type": "array", "items": items}


def _schemas() -> JsonObject:
    box = {
        "type": "array",
        "items": _NUMBER,
        "minItems": 4,
        "maxItems": 4,
        "description": "x0, y0, x1, y1 in pixels",
    }
    size = _object({"width": _INTEGER, "height": _INTEGER})
    found = {"label": _INTEGER, "name": _TEXT, "score": _NUMBER, "box": box}
    answer = {"model": _TEXT, "image": size, "objects": _list(_ref("Object"))}
    return {
        "Object": _object(found),
        "Segment": _object({"id": _INTEGER, **found, "isthing": {"type": "boolean"}, "area": _INTEGER}),
        "Detections": _object(answer),
        "Segmentation": _object(
            {
                **answer,
                "segments": _list(_ref("Segment")),
                "panoptic": {
                    "type": "string",
                    "contentEncoding": "base64",
                    "contentMediaType": "image/png",
                    "description": "The id of each pixel's segment as R + 256 G + 65536 B; 0 for none.",
                },
            }
        ),
        "Model": _object(
            {
                "model": _TEXT,
                "models": _list(_TEXT),
                "family": _TEXT,
                "classes": _list(_object({"label": _INTEGER, "name": _TEXT})),
                "masks": {"type": "boolean"},
                "detection_config": {"type": "object", "description": "What turns scores into decisions."},
                "limits": {"type": "object"},
            }
        ),
        "Status": _object({"status": _TEXT}),
        "Error": _object({"error": _TEXT}),
    }
