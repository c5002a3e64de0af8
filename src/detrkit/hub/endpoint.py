"""A detector as a Hugging Face Inference Endpoint: what ``handler.py`` in a model's repository loads.

The answers are those of the Hub's object-detection task.

Example:
    ```python
    from PIL import Image

    from detrkit.endpoint import EndpointHandler

    handler = EndpointHandler("blood-cells")
    handler({"inputs": Image.open("smear.jpg"), "parameters": {"threshold": 0.6}})
    ```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from detrkit.common.errors import ImageError, SettingError
from detrkit.common.schema import JsonObject
from detrkit.common.text import is_data_url
from detrkit.inference.detector import Detector

if TYPE_CHECKING:
    from PIL.Image import Image

_PARAMETERS = {"threshold": None}


class EndpointHandler:
    """Loads a model once and answers requests."""

    def __init__(self, path: str = "") -> None:
        """Loads the model in the folder of the repository, which the endpoint passes."""
        self.detector = Detector.from_pretrained(path or ".")

    def __call__(self, data: JsonObject) -> list[dict[str, float | str | dict[str, int]]]:
        """Detects the objects in the image of a request.

        Args:
            data: ``inputs`` is a PIL image, the bytes of an image file, or these in base64 (a ``data:`` URL
                too). ``parameters`` may hold ``threshold``, the minimum score, by default
                as chosen for the model, or 0.5.

        Returns:
            A dict for each object, the best first: ``score``, ``label`` (its name) and ``box`` (``xmin``,
            ``ymin``, ``xmax``, ``ymax`` in whole pixels of the image turned as its EXIF entry says, which is
            how browsers show it and how Transformers' pipeline reads it).

        Raises:
            ImageError: The image is missing or unreadable.
            SettingError: A parameter does not exist or is out of range.
        """
        if not isinstance(data, Mapping):
            raise SettingError(f"a request must be an object with inputs, not a {type(data).__name__}")
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            kind = type(parameters).__name__
            raise SettingError(f"parameters must be an object like {{'threshold': 0.5}}, not a {kind}")
        unknown = [name for name in parameters if name not in _PARAMETERS]
        if unknown:
            raise SettingError(f"unknown parameter {str(unknown[0])[:100]!r}; the only one is threshold")
        threshold = (_PARAMETERS | dict(parameters))["threshold"]
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if threshold is not None and not (number and 0 <= threshold <= 1):
            given = repr(threshold)[:100] if not isinstance(threshold, int) else "another integer"
            raise SettingError(f"threshold must be a number between 0 and 1, not {given}")
        image = _read(data.get("inputs"))
        found = self.detector(image, threshold=threshold, masks=False, exif_orientation=True)
        return [
            {
                "score": detection.score,
                "label": detection.name,
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(round, detection.box.tolist()))),
            }
            for detection in found
        ]


def _read(inputs: object) -> Image | bytes | bytearray | str:
    """The image of a request, for the detector to read; paths and addresses are not opened."""
    import PIL.Image

    from detrkit.processing.sources import decode_base64

    if isinstance(inputs, str):
        return inputs if is_data_url(inputs) else decode_base64(inputs, "inputs")
    if not isinstance(inputs, (PIL.Image.Image, bytes, bytearray)):
        found = "nothing" if inputs is None else f"a {type(inputs).__name__}"
        raise ImageError(f"inputs must be an image, its bytes or its base64 text, not {found}")
    return inputs
