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

from detrkit.common.errors import SettingError
from detrkit.common.schema import JsonObject
from detrkit.inference.detector import Detector
from detrkit.inference.requests import image_bytes, read_options

_EXAMPLE = {"threshold": 0.5}


class EndpointHandler:
    """Loads a model once and answers requests."""

    def __init__(self, path: str = "") -> None:
        """Loads the model in the folder of the repository, which the endpoint passes."""
        self.detector = Detector.from_pretrained(path or ".")

    def __call__(self, data: JsonObject) -> list[dict[str, float | str | dict[str, int]]]:
        """Detects the objects in the image of a request.

        Args:
            data: ``inputs`` is a PIL image, the bytes of an image file, or these in base64 (a ``data:`` URL
                too). ``parameters`` may hold ``threshold`` (the minimum score), ``overlap`` and
                ``max_objects``; by default they are as the model's detection settings say.

        Returns:
            A dict for each object, the best first: ``score``, ``label`` (its name) and ``box`` (``xmin``,
            ``ymin``, ``xmax``, ``ymax`` in whole pixels of the image turned as its EXIF entry says, which is
            how browsers show it and how Transformers' pipeline reads it).

        Raises:
            ImageError: The image is missing or unreadable.
            SettingError: A parameter does not exist or is out of range.
        """
        import PIL.Image

        if not isinstance(data, Mapping):
            raise SettingError(f"a request must be an object with inputs, not a {type(data).__name__}")
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            kind = type(parameters).__name__
            raise SettingError(f"parameters must be an object like {_EXAMPLE}, not a {kind}")
        options = read_options(parameters)
        inputs = data.get("inputs")
        image = inputs if isinstance(inputs, PIL.Image.Image) else image_bytes(inputs, "inputs")
        found = self.detector(image, masks=False, exif_orientation=True, **options.given())
        return [
            {
                "score": detection.score,
                "label": detection.name,
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(round, detection.box.tolist()))),
            }
            for detection in found
        ]
